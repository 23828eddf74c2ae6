"""AdaLoRA: triplets and their scaling, the penalty, importance and budget, pruning, files, and the loop that calls it.

Shapes: W (O, I), A (r, I), E (r, 1), B (O, r). u is the unit roundoff.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from small import bits
from strict_xp import METER, STRICT, counted, no_sync

from minilora import functional as F
from minilora.autograd import Tensor, gradients, no_grad
from minilora.data import Batch
from minilora.errors import CheckpointError, ConfigError, FormatError
from minilora.formats import load_file, read_adapter, write_adapter
from minilora.gradcheck import check_gradient
from minilora.lora import (
    AdaLoraAdapter,
    AdaLoraConfig,
    LoraConfig,
    LoraLinear,
    PeftModel,
    RankAllocator,
    get_peft_model,
    orthogonality,
    read_config,
)
from minilora.nn import Linear
from minilora.optim import SGD, clip_by_global_norm
from minilora.tools.inspecting import inspect_adapter
from minilora.training.loop import Run, Settings, train
from minilora.training.parallel import ShardedStep
from minilora.training.runs import MANIFEST
from minilora.verify import PROPERTIES, make_case, measure, verify_files

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = (
    np.random.default_rng(0).integers(0, 4, 400).cumsum().astype(np.int32) % 16
)  # each token is near the one before
IDS = TEXT[:20].reshape(2, 10)


def config(**changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(
        **({"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": "all-linear"} | changes)
    )


def layer(
    seed: int = 0, inputs: int = 5, outputs: int = 6, dtype: str = "float64", **changes: Any
) -> LoraLinear:
    """A frozen base with one active adapter, all of whose numbers are random."""
    rng = np.random.default_rng(seed)
    made = LoraLinear(Linear(rng.standard_normal((outputs, inputs)).astype(dtype)))
    made.base_layer.weight.requires_grad = False
    made.adapters["a"] = AdaLoraAdapter(
        made.base_layer, "x", config(**{"init_lora_weights": False, **changes}), rng, 3
    )
    made.active = ["a"]
    return made


def model(dtype: str = "float32", device: Any = "cpu", **changes: Any) -> PeftModel:
    return get_peft_model(small.base(dtype, device), config(**changes), seed=2)


def pieces(made: AdaLoraAdapter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return made.lora_A.data, made.lora_E.data, made.lora_B.data


# ---- the configuration ----


def test_peft_s_file_goes_through_unchanged() -> None:
    raw, _ = read_adapter(GOLDEN / "llama--adalora")
    made = read_config(raw, "here")
    assert type(made) is AdaLoraConfig
    assert (made.init_r, made.target_r, made.tinit, made.tfinal, made.total_step) == (
        6,
        3,
        10,
        20,
        100,
    )
    assert made.to_dict() == raw
    assert made.rank("any") == 6
    assert made.scaling("any") == 8 / (6 + 1e-5)


BAD: dict[str, list[Any]] = {
    "init_r": [0, -1, 2.0, True, None, "4", 2**24],
    "target_r": [0, -1, 2.0, True, None, 5],
    "total_step": [0, -3, 9.0, None, True, "9"],
    "tinit": [-1, 1.0, None, 9, 10],
    "tfinal": [-1, 1.0, None, 9, 10],
    "deltaT": [0, -1, 1.0, None],
    "beta1": [0, 1, -0.1, 1.5, None, True, math.nan, "x"],
    "beta2": [0, 1, -0.1, 1.5, None, True, math.nan, "x"],
    "orth_reg_weight": [-0.1, math.inf, math.nan, None, "x", True],
    "init_lora_weights": ["gaussian", "pissa", None, 1],
    "use_rslora": [True],
    "use_dora": [True, None, "yes"],
    "alpha_pattern": [{"q_proj": 3}],
    "lora_alpha": [0, -1, None],
    "rank_pattern": [
        {"x.lora_E": [True] * 3},
        {"x.lora_E": [1, 0, 1, 0]},
        {"x.lora_E": 4},
        {"x.lora_A": [True] * 4},
        {3: [True] * 4},
        [True],
        "x",
    ],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=field if field != "tfinal" or value not in (9, 10) else "tinit .*tfinal"
    ):
        config(**{field: value})
    with pytest.raises(ConfigError, match=r"^here: "):
        read_config(
            {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9, field: value},
            "here",
        )


def test_every_field_of_its_own_is_checked() -> None:
    own = {f.name for f in dataclasses.fields(AdaLoraConfig)} - {
        f.name for f in dataclasses.fields(LoraConfig)
    }
    assert own - {"use_dora"} <= set(BAD)
    with pytest.raises(
        ConfigError,
        match="total_step must be an integer of at least 1 and below 16777216, got None",
    ):
        AdaLoraConfig()


def test_what_lora_checks_is_checked_here_too() -> None:
    for wrong in (
        {"lora_dropout": 1},
        {"bias": "some"},
        {"target_modules": []},
        {"target_modules": "(("},
    ):
        with pytest.raises(ConfigError):
            config(**wrong)


def test_r_means_nothing_and_says_so() -> None:
    with pytest.warns(UserWarning, match="r = 5 has no effect in AdaLoRA"):
        assert config(r=5).rank("x") == 4


@pytest.mark.parametrize("kind", ["IA3", None, ["LORA"], {}, 3])
def test_another_kind_of_adapter_is_refused_by_name(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="peft_type must be 'LORA' or 'ADALORA' or 'HYDRALORA', got"
    ):
        read_config({"peft_type": kind}, "here")
    with pytest.raises(ConfigError, match="use_dora must be False"):
        read_config({"peft_type": "ADALORA", "total_step": 9, "use_dora": True}, "here")


# ---- one layer ----


def test_first_values_follow_their_laws() -> None:
    for init, std in ((True, 0.02), (False, 1.0)):
        made = AdaLoraAdapter(
            Linear(np.zeros((90, 80))),
            "x",
            config(init_r=50, init_lora_weights=init),
            np.random.default_rng(0),
        )
        for name, p in zip(made.TENSORS, pieces(made), strict=True):
            wanted = 0.0 if init and name == "lora_E" else std
            assert abs(p.std() - wanted) <= 5 * wanted / math.sqrt(
                2 * p.size
            )  # five standard errors
            assert abs(p.mean()) <= 5 * wanted / math.sqrt(p.size)


@pytest.mark.parametrize("left", [0, 1])
def test_a_layer_that_lost_its_triplets_keeps_every_promise(left: int) -> None:
    case = make_case(1, 7, 5, [4, 4], [4, 2], kind="adalora")
    for adapter in list(case.subject.adapters.values())[left:]:
        adapter.keep(np.zeros(4, bool))
    case.subject.prepare_step()
    assert any(case.subject._effective.values()) == (
        left > 0
    )  # without a triplet there is nothing to form
    case.subject.end_step()
    config = dataclasses.replace(
        case.configs["a0"], rank_pattern={} if left else {"proj.lora_E": [False] * 4}
    )
    rows = measure([dataclasses.replace(case, configs={"a0": config})])
    assert {"forward", "effective weight", "AdaLoRA's gradients", "merge rounds once", "files"} < {
        r.property for r in rows
    }
    assert [row for row in rows if not row.ok] == []


def test_dropout_is_on_x_in_training_alone() -> None:
    made, x = layer(lora_dropout=0.5), Tensor(np.ones((1, 40, 5)))
    A, E, B = pieces(made.adapters["a"])
    still = made.eval()(x).data
    assert np.ptp(still, axis=1).max() == 0  # the rows are equal
    moved = made.train()(x).data - made.base_layer(x).data
    assert np.ptp(moved, axis=1).max() > 0
    kept = np.array([[i >> k & 1 for k in range(5)] for i in range(32)])  # every mask there is
    possible = (2 * kept * 1.0) @ (made.adapters["a"].scaling * B @ (A * E)).T
    assert all(np.abs(possible - row).max(axis=1).min() < 1e-12 for row in moved[0])


# ---- the penalty ----


@given(st.integers(0, 99), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)), min_size=1,
                                    max_size=3))  # fmt: skip
def test_the_penalty_is_the_mean_norm_and_its_gradient_is_true(
    seed: int, sizes: list[tuple[int, int, int]]
) -> None:
    rng = np.random.default_rng(seed)
    flat = [rng.standard_normal(shape) for r, i, o in sizes for shape in ((r, i), (o, r))]

    def paired(items: Any) -> list[Any]:
        return list(zip(items[::2], items[1::2], strict=True))

    # |A A^T - I|^2 is the sum of (sigma^2 - 1)^2 over r singular values, the missing ones being 0.
    norms = []
    for A, B in paired(flat):
        for M, r in ((A, len(A)), (B, len(A))):
            sigma = np.zeros(r)
            values = np.linalg.svd(M, compute_uv=False)
            sigma[: len(values)] = values
            norms.append(math.sqrt(((sigma**2 - 1) ** 2).sum()))
    value = orthogonality(paired([Tensor(a) for a in flat])).item()
    assert value == pytest.approx(np.mean(norms), rel=1e-12)
    if min(norms) > 0.05:  # at 0 a norm has a kink
        check_gradient(lambda *leaves: orthogonality(paired(leaves)), *flat, tolerance=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_layer_without_triplets_costs_nothing(dtype: str) -> None:
    leaves = [Tensor(np.zeros(shape, dtype), True) for shape in ((0, 5), (6, 0))]
    value = orthogonality([(leaves[0], leaves[1])])
    assert (value.item(), value.dtype) == (0, np.dtype(dtype))
    for g, leaf in zip(gradients(value, leaves), leaves, strict=True):
        assert (g.shape, g.dtype) == (leaf.shape, leaf.dtype)


# ---- importance and budget ----


def allocator(
    seed: int = 0, layers: int = 2, dtype: str = "float64", **changes: Any
) -> RankAllocator:
    made = config(**{"init_lora_weights": False, **changes})
    rng = np.random.default_rng(seed)
    adapters = {}
    for i in range(layers):
        base = Linear(np.zeros(rng.integers(1, 5, 2), dtype))
        adapters[f"l{i}"] = AdaLoraAdapter(base, f"l{i}", made, rng)
    return RankAllocator(adapters, made)


def random_grads(made: RankAllocator, rng: np.random.Generator) -> list[Any]:
    return [rng.standard_normal(p.shape).astype(p.dtype) for p in made.params]


def test_sensitivity_uncertainty_and_importance_are_the_paper_s() -> None:
    """Number by number, in plain loops, for two steps with weights that change between them."""
    made, rng = (
        allocator(layers=2, init_r=3, total_step=90, beta1=0.7, beta2=0.6),
        np.random.default_rng(1),
    )
    smoothed: dict[int, np.ndarray] = {}
    strayed: dict[int, np.ndarray] = {}
    for _ in range(2):
        grads = random_grads(made, rng)
        for i, (p, g) in enumerate(zip(made.params, grads, strict=True)):
            p.data = rng.standard_normal(p.shape)
            now = np.abs(p.data * g)
            smoothed[i] = 0.7 * smoothed.get(i, 0 * now) + 0.3 * now
            strayed[i] = 0.6 * strayed.get(i, 0 * now) + 0.4 * np.abs(now - smoothed[i])
        weights = [p.data.copy() for p in made.params]
        made.config.deltaT = 50  # no mask yet
        made.step(grads)
        assert all(np.array_equal(p.data, w) for p, w in zip(made.params, weights, strict=True))
    made.final_step = 3
    made.step(grads)  # the last allocation chooses by what was seen before it
    expected = []
    for i in range(0, len(smoothed), 3):
        A, E, B = (smoothed[j] * strayed[j] for j in (i, i + 1, i + 2))
        expected += [E[k, 0] + A[k].mean() + B[:, k].mean() for k in range(len(E))]
    assert np.allclose(made.importance(), expected, rtol=1e-13, atol=0)


def test_the_budget_is_kept_over_2000_random_schedules() -> None:
    """Property 21, of another schedule, shape and dtype for each seed."""
    [budget] = [p for p in PROPERTIES if p.name == "AdaLoRA's budget"]
    for seed in range(2000):
        r, layers, dtype = 1 + seed % 4, 1 + seed % 3, ("float32", "float64")[seed % 2]
        case = make_case(
            seed, 1 + seed % 5, 1 + seed % 7, [r] * layers, [4.0] * layers, dtype, kind="adalora"
        )
        assert budget.check(case).ok, seed


def test_the_cubic_in_numbers() -> None:
    made = allocator(layers=5, init_r=20, target_r=4, total_step=100, tinit=10, tfinal=30)
    assert [made.budget(t) for t in (0, 10, 11, 25, 40, 55, 69, 70, 71, 100)] == [
        100, 100, 96, 53, 30, 21, 20, 20, 20, 20,
    ]  # fmt: skip


def test_of_all_layers_the_most_important_stay() -> None:
    """One global order, not one a layer: a layer of no use loses all."""
    made = allocator(layers=3, init_r=4, target_r=2, total_step=2, tinit=0)
    worth = {"l0": 0.0, "l1": 3.0, "l2": 1.0}
    grads = []
    for name, a in made.adapters.items():
        for tensor in a.TENSORS:
            getattr(a, tensor).data = np.ones(getattr(a, tensor).shape)
            size = worth[name] * np.linspace(1, 2, 4)  # the last triplet is the best
            shaped = size[None, :] if tensor == "lora_B" else size[:, None]
            grads.append(np.ones(getattr(a, tensor).shape) * shaped)
    made.step(grads)
    made.step(grads)
    assert made.ranks == {"l0": 0, "l1": 4, "l2": 2}
    assert made.adapters["l2"].lora_E.data.ravel().tolist() == [0, 0, 1, 1]
    assert not made.adapters["l0"].lora_E.data.any()


@pytest.mark.parametrize("tfinal", [0, 3])
def test_equal_ranks_are_nothing_to_do(tfinal: int) -> None:
    made, rng = (
        allocator(init_r=3, target_r=3, total_step=8, tfinal=tfinal),
        np.random.default_rng(0),
    )
    for _ in range(8):
        before = [p.data.copy() for p in made.params]
        made.step(random_grads(made, rng))
        assert all(np.array_equal(p.data, w) for p, w in zip(made.params, before, strict=True))
    assert set(made.ranks.values()) == {3}
    made.prune()
    assert set(made.config.rank_pattern) == {"l0.lora_E", "l1.lora_E"}
    assert [a.r for a in made.adapters.values()] == [3, 3]


def test_equal_importance_still_meets_the_budget() -> None:
    """Where nothing is better than the rest, as with no gradients at all, as many stay as the budget says."""
    made = allocator(layers=2, init_r=4, target_r=2, total_step=3)
    for _ in range(3):
        made.step([None] * 6)
    assert sum(made.ranks.values()) == 4


def test_gradients_that_do_not_fit_change_nothing() -> None:
    made = allocator()
    grads = random_grads(made, np.random.default_rng(0))
    for wrong in (grads[:-1], [*grads, grads[0]], [np.zeros((9, 9)), *grads[1:]]):
        with pytest.raises(
            ConfigError, match=f"{len(wrong)} gradients do not fit the 6 parameters"
        ):
            made.step(wrong)
    assert made.steps == 0
    assert not made.sensitivity.any()
    with pytest.raises(ConfigError, match="no AdaLoRA layer was given"):
        RankAllocator({}, made.config)


@given(st.integers(0, 999), st.integers(0, 9))
def test_the_state_is_all_that_the_next_steps_depend_on(seed: int, at: int) -> None:
    options = {"total_step": 9, "tinit": 1, "tfinal": 2, "deltaT": 2, "dtype": "float32"}
    one, rng = allocator(seed, **options), np.random.default_rng(seed)
    plan = [(random_grads(one, rng), random_grads(one, rng)) for _ in range(10)]

    def go(made: RankAllocator, steps: list[Any]) -> None:
        for change, grads in steps:
            for p, d in zip(made.params, change, strict=True):
                p.data = p.data + d
            made.step(grads)

    go(one, plan[:at])
    arrays, numbers = one.state_dict()
    saved = [p.data.copy() for p in one.params]
    go(one, plan[at:])  # what was handed out is a copy
    other = allocator(seed, **options)
    for p, w in zip(other.params, saved, strict=True):
        p.data = w
    other.load_state_dict(arrays, json.loads(json.dumps(numbers)))
    go(other, plan[at:])
    assert [p.data.tobytes() for p in one.params] == [p.data.tobytes() for p in other.params]
    ends = [made.state_dict() for made in (one, other)]
    assert ends[0][1] == ends[1][1] == {"steps": 10}
    assert all(
        ends[0][0][k].tobytes() == ends[1][0][k].tobytes()
        for k in ("sensitivity", "uncertainty", "kept")
    )


def test_another_s_state_is_refused_and_changes_nothing() -> None:
    made = allocator(0)
    made.step(random_grads(made, np.random.default_rng(0)))
    arrays, numbers = made.state_dict()
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({k: v for k, v in arrays.items() if k != "kept"}, numbers),
        ({**arrays, "kept": arrays["kept"].astype(np.uint8)}, numbers),
        ({**arrays, "sensitivity": arrays["sensitivity"][1:]}, numbers),
        ({**arrays, "more": arrays["kept"]}, numbers),
        (arrays, {}),
        (arrays, {"steps": -1}),
        (arrays, {"steps": 1.0}),
        (arrays, {"steps": True}),
    ]
    for wrong in cases:
        with pytest.raises(CheckpointError, match="the allocator's state must be"):
            made.load_state_dict(*wrong)
    assert made.steps == 1
    assert np.array_equal(made.sensitivity, arrays["sensitivity"])


# ---- cutting for good ----


def test_to_keep_triplets_is_to_make_smaller_parameters() -> None:
    made, kept = layer(init_r=4).adapters["a"], np.array([True, False, False, True])
    before, scaling = pieces(made), made.scaling
    old = made.lora_A
    made.keep(kept)
    assert (made.r, made.scaling) == (2, scaling)
    assert made.lora_A is not old
    assert all(getattr(made, name).requires_grad for name in made.TENSORS)
    for now, was, axis in zip(pieces(made), before, (0, 0, 1), strict=True):
        assert np.array_equal(now, was.take([0, 3], axis=axis))


def trained(
    seed: int = 0, dtype: str = "float32", **changes: Any
) -> tuple[PeftModel, RankAllocator]:
    """A model whose allocator has come to its end, with hand-made gradients; some layers keep nothing."""
    made = model(dtype, **{"init_lora_weights": False, "total_step": 4, "tfinal": 1, **changes})
    ranks, rng = RankAllocator.of(made), np.random.default_rng(seed)
    for _ in range(4):
        for a in ranks.adapters.values():  # what was masked grows again, but for the last time
            a.lora_E.data = a.lora_E.data + a.lora_E.dtype.type(0.1) * (a.lora_E.data == 0)
        sizes = np.repeat(rng.uniform(0, 1, len(ranks.adapters)) ** 4, 3)
        ranks.step([g * s for g, s in zip(random_grads(ranks, rng), sizes, strict=True)])
    return made.eval(), ranks


def test_a_pruned_model_is_the_same_and_goes_through_its_files(tmp_path: Path) -> None:
    made, ranks = trained()
    whole, counts = made(IDS).data, ranks.ranks
    assert min(counts.values()) == 0  # a layer that keeps nothing is a case of its own
    assert max(counts.values()) > 2
    made.save_pretrained(tmp_path / "whole")
    assert (
        json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["rank_pattern"] is None
    )
    kept = {f"{n}.lora_E": (a.lora_E.data.ravel() != 0).tolist() for n, a in ranks.adapters.items()}
    ranks.prune()
    assert np.abs(made(IDS).data - whole).max() <= 1e-5 * np.abs(whole).max()
    assert {n: a.r for n, a in ranks.adapters.items()} == counts == ranks.ranks
    assert made.get_nb_trainable_parameters()[0] == sum(p.size for p in ranks.params)
    assert sum(counts.values()) == 2 * len(counts)

    made.save_pretrained(tmp_path / "cut")
    raw, tensors = read_adapter(tmp_path / "cut")
    assert raw["rank_pattern"] == kept
    assert {len(v) for v in raw["rank_pattern"].values()} == {4}
    assert {k.rpartition(".")[2] for k in tensors} == {"lora_A", "lora_E", "lora_B"}
    for key, tensor in tensors.items():
        path = key.removeprefix("base_model.model.").rpartition(".")[0]
        assert tensor.shape[1 if key.endswith("lora_B") else 0] == counts[path]
    for folder in ("whole", "cut"):
        again = PeftModel.from_pretrained(small.base(), tmp_path / folder)
        assert np.abs(again(IDS).data - whole).max() <= 1e-5 * np.abs(whole).max()
        assert bits(again) == bits(made) or folder == "whole"
        again.save_pretrained(tmp_path / f"{folder} again")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / folder / name).read_bytes() == (
                tmp_path / f"{folder} again" / name
            ).read_bytes()
        merged = again.merge_and_unload()
        assert np.abs(merged(IDS).data - whole).max() <= 1e-5 * np.abs(whole).max()


def test_what_was_pruned_trains_on_and_may_be_pruned_again(tmp_path: Path) -> None:
    """The pattern of the file is always over init_r triplets: a second cut is a cut of what the first has left."""
    made, ranks = trained(target_r=3)
    ranks.prune()
    first = dict(made.peft_config["default"].rank_pattern)
    with pytest.raises(ConfigError, match="ranks are final after step 3, this is step 0"):
        RankAllocator.of(made).prune()
    raw = made.peft_config["default"].to_dict() | {"target_r": 1, "inference_mode": False}
    made.save_pretrained(tmp_path / "first")
    write_adapter(
        tmp_path / "first", raw, load_file(tmp_path / "first" / "adapter_model.safetensors")
    )
    again = PeftModel.from_pretrained(small.base(), tmp_path / "first", is_trainable=True)
    more, rng = RankAllocator.of(again), np.random.default_rng(1)
    assert more.initial == 3 * len(more.adapters)
    for _ in range(4):
        more.step(random_grads(more, rng))
    more.prune()
    second = again.peft_config["default"].rank_pattern
    assert set(first) == set(second)
    assert all(a >= b for key in first for a, b in zip(first[key], second[key], strict=True))
    assert sum(map(sum, second.values())) == len(second) == sum(a.r for a in more.adapters.values())
    again.eval().save_pretrained(tmp_path / "second")
    last = PeftModel.from_pretrained(small.base(), tmp_path / "second")
    assert last(IDS).data.tobytes() == again(IDS).data.tobytes()


def test_a_file_that_does_not_fit_its_pattern_is_refused(tmp_path: Path) -> None:
    made, ranks = trained()
    ranks.prune()
    made.save_pretrained(tmp_path)
    raw, tensors = read_adapter(tmp_path)
    key = max(ranks.ranks, key=ranks.ranks.__getitem__)
    wrong = {**raw["rank_pattern"], f"{key}.lora_E": [False] * 4}
    write_adapter(tmp_path, {**raw, "rank_pattern": wrong}, tensors)
    with pytest.raises(FormatError, match=rf"{key}\.lora_A is \(\d, \d+\), the base needs \(0, "):
        PeftModel.from_pretrained(small.base(), tmp_path)
    with pytest.warns(UserWarning, match=r"rank_pattern: 'nowhere\.lora_E' matches no target"):
        model(rank_pattern={"nowhere.lora_E": [True] * 4})


def test_a_rank_that_nothing_backs_takes_no_memory(tmp_path: Path) -> None:
    model(target_modules=["q_proj"]).save_pretrained(tmp_path)
    raw, tensors = read_adapter(tmp_path)
    write_adapter(tmp_path, {**raw, "init_r": 2**24 - 1}, tensors)
    plain = small.base()
    tracemalloc.start()
    try:
        with (
            pytest.warns(UserWarning, match="r = 16777215 is above the full rank 16"),
            pytest.raises(
                FormatError, match=r"lora_A is \(4, 16\), the base needs \(16777215, 16\)"
            ),
        ):
            PeftModel.from_pretrained(plain, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_inspect_and_verify_read_such_a_folder(tmp_path: Path) -> None:
    made, ranks = trained(dtype="float32")
    ranks.prune()
    made.save_pretrained(tmp_path / "adapter")
    small.base().save_pretrained(tmp_path / "base")
    report = inspect_adapter(tmp_path / "adapter")
    assert {row["layer"]: row["r"] for row in report["tensors"]} == ranks.ranks
    assert report["r"] == 4
    for row in report["tensors"]:
        norm = np.linalg.norm(dict(made._wrappers())[row["layer"]].delta_weight("default"))
        assert float(row["|dW|"]) == pytest.approx(norm, rel=1e-3)
    found = verify_files(tmp_path / "base", tmp_path / "adapter")
    assert all(row.ok for row in found.rows)
    for finding in found.layers:
        norm = np.linalg.norm(dict(made._wrappers())[finding.layer].delta_weight("default"))
        assert finding.dW == pytest.approx(norm, rel=1e-6)
    raw, tensors = read_adapter(tmp_path / "adapter")
    first = next(key for key in tensors if key.endswith("lora_E"))
    write_adapter(tmp_path / "adapter", raw, {k: v for k, v in tensors.items() if k != first})
    with pytest.raises(FormatError, match=r"lora_A .* has no lora_E that fits it"):
        inspect_adapter(tmp_path / "adapter")


def test_adapters_of_two_kinds_live_side_by_side(tmp_path: Path) -> None:
    made = model(init_lora_weights=False, target_modules=["q_proj"])
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    made.add_adapter("plain", lora, seed=5)
    names = {n for n, _ in made.named_parameters() if "q_proj" in n and ".0." in n and "lora_" in n}
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    assert names == {f"{path}.{t}.default" for t in ("lora_A", "lora_E", "lora_B")} | {
        f"{path}.{t}.plain.weight" for t in ("lora_A", "lora_B")
    }
    made.set_adapter(["default", "plain"])
    both = made.eval()(IDS).data
    made.merge_adapter()
    assert np.abs(made(IDS).data - both).max() <= 1e-5 * np.abs(both).max()
    made.unmerge_adapter()
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small.base(), tmp_path)
    again.load_adapter(tmp_path / "plain", "plain")
    again.set_adapter(["default", "plain"])
    assert again(IDS).data.tobytes() == both.tobytes()
    with pytest.raises(ConfigError, match=r"'plain' is not an ADALORA adapter, .* plain \(LORA\)"):
        RankAllocator.of(made, "plain")
    with pytest.raises(
        ConfigError, match=r"'nothing' is not an ADALORA adapter, .* default \(ADALORA\)"
    ):
        RankAllocator.of(made, "nothing")


# ---- training ----


def hand_made_step(made: PeftModel, optimizer: SGD) -> list[Any]:
    grads = gradients(F.cross_entropy(made(IDS[:, :-1]), IDS[:, 1:]), optimizer.params)
    optimizer.step(grads)
    return grads


def test_to_train_without_the_allocator_is_an_error_and_not_silence() -> None:
    made = model().train()
    optimizer = SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    hand_made_step(made, optimizer)
    with pytest.raises(
        ConfigError, match=r"AdaLoRA trains with a RankAllocator, .*RankAllocator\.of\(model\)"
    ):
        hand_made_step(made, optimizer)
    ranks = RankAllocator.of(made)  # takes the weights as they are
    hand_made_step(made, optimizer)
    with pytest.raises(
        ConfigError, match="AdaLoRA trains with a RankAllocator"
    ):  # to make one is not to call it
        hand_made_step(made, optimizer)
    with no_grad():
        made(IDS)
    made.eval()(IDS)  # only what trains needs one
    ranks = RankAllocator.of(made)
    optimizer = SGD(ranks.params, lr=0.1)
    made.train()
    for _ in range(3):
        ranks.step(hand_made_step(made, optimizer))
    made.set_adapter("default", inference_mode=True)
    RankAllocator.of(made)
    for p in ranks.params:
        p.data = 2 * p.data
    made(IDS)


def test_a_prepared_step_wants_the_allocator_too() -> None:
    made = model().train()
    ranks = RankAllocator.of(made)
    optimizer, batch = SGD(ranks.params, lr=0.1), Batch(IDS[:, :-1], IDS[:, 1:])
    with ShardedStep(made, 2, 1) as sharded:
        for called in (True, False):
            _, grads = sharded.gradients(batch, ranks.params)
            optimizer.step(grads)
            if called:
                ranks.step(grads)
        with pytest.raises(ConfigError, match="AdaLoRA trains with a RankAllocator"):
            sharded.gradients(batch, ranks.params)


def test_who_goes_back_to_a_state_and_its_weights_trains_on_from_there() -> None:
    made = model().train()
    ranks = RankAllocator.of(made)
    optimizer = SGD(ranks.params, lr=0.1)
    state, weights, seen = ranks.state_dict(), [p.data.copy() for p in ranks.params], []
    for _ in range(2):
        for p, w in zip(ranks.params, weights, strict=True):
            p.data = w
        ranks.load_state_dict(*state)
        ranks.step(hand_made_step(made, optimizer))
        seen.append(bits(made))
    assert seen[0] == seen[1]


def test_forwards_between_two_steps_are_as_many_as_one_likes() -> None:
    made = model().train()
    for _ in range(3):
        gradients(
            F.cross_entropy(made(IDS[:, :-1]), IDS[:, 1:]),
            [p for p in made.parameters() if p.requires_grad],
        )


SCHEDULE = {"total_step": 12, "tinit": 2, "tfinal": 4, "deltaT": 3}
SHORT = Settings(steps=12, batch_size=4, context=8, lr=1e-2, warmup=2, threads=1, shard=2)


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def test_a_run_allocates_logs_and_prunes(tmp_path: Path) -> None:
    made = model(**SCHEDULE)
    train(made, TEXT, SHORT, tmp_path)
    log = lines(tmp_path)
    assert all(line["penalty"] > 0 for line in log)
    assert set(log[0]["ranks"].values()) == {4}
    told = {line["step"]: sum(line["ranks"].values()) for line in log if "ranks" in line}
    expected = RankAllocator(RankAllocator.of(made).adapters, made.peft_config["default"])
    expected.initial = 4 * 14
    assert told == {
        0: 56,
        2: expected.budget(3),
        5: expected.budget(6),
        7: 28,
    }  # step 7 is the eighth
    adapters = RankAllocator.of(made).adapters
    assert {path: a.r for path, a in adapters.items()} == log[7]["ranks"]
    assert all(a.lora_E.data.all() for a in adapters.values())
    assert set(made.peft_config["default"].rank_pattern) == {f"{path}.lora_E" for path in adapters}


def test_the_penalty_comes_once_a_step_before_clipping_and_with_its_weight(tmp_path: Path) -> None:
    for w, shard in ((0.5, 1), (0.5, 4), (0.0, 2)):
        made = model("float64", orth_reg_weight=w, init_lora_weights=False, **SCHEDULE).train()
        run = Run(made, TEXT, dataclasses.replace(SHORT, shard=shard, max_grad_norm=1e-3), tmp_path)
        params = run.optimizer.params
        ranks = run.allocator
        assert ranks is not None
        pairs = [(a.lora_A, a.lora_B) for a in ranks.adapters.values()]
        apart = orthogonality(pairs)
        extra = dict(zip(map(id, ranks.params), gradients(apart, ranks.params), strict=True))
        with ShardedStep(made, 1, shard) as sharded:
            _, found = sharded.gradients(run.windows.batch(0), params, 0, 0)
            total = [
                g if extra.get(id(p)) is None else g + w * extra[id(p)]
                for g, p in zip(found, params, strict=True)
            ]
            clipped, norm = clip_by_global_norm(total, 1e-3)
            seen: list[Any] = []
            step = ranks.step
            ranks.step = lambda grads, seen=seen, step=step: seen.extend(grads) or step(grads)  # type: ignore[method-assign]
            line = run.step(sharded)
        assert line["penalty"] == pytest.approx(w * apart.item(), rel=1e-14)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-12)
        by_id = dict(zip(map(id, params), clipped, strict=True))
        for p, g in zip(ranks.params, seen, strict=True):
            assert np.allclose(g, by_id[id(p)], rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("at", [1, 3, 4, 8, 10, 12])
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(at: int, tmp_path: Path) -> None:
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    straight = model(lora_dropout=0.1, **SCHEDULE)
    train(straight, TEXT, SHORT, tmp_path / "whole")
    begun = model(lora_dropout=0.1, **SCHEDULE).train()
    run = Run(begun, TEXT, SHORT, tmp_path / "part")
    with ShardedStep(begun, 1, 2) as sharded:
        told = [run.step(sharded) for _ in range(at)]
    folder = run.save()
    for again in (
        model(lora_dropout=0.1, **SCHEDULE),
        begun,
    ):  # in a fresh model, and in the one that has gone on
        (tmp_path / str(again is begun)).mkdir()
        train(again, TEXT, SHORT, tmp_path / str(again is begun), resume=folder)
        assert bits(again) == bits(straight)
        rest = [line for line in lines(tmp_path / "whole") if line["step"] >= at]
        assert lines(tmp_path / str(again is begun)) == rest
        if again is not begun:
            assert [{k: v for k, v in line.items() if k != "seconds"} for line in told] == lines(
                tmp_path / "whole"
            )[:at]
            with ShardedStep(begun, 1, 2) as sharded:
                run.step(sharded)


def test_a_checkpoint_without_the_allocator_s_state_is_refused(tmp_path: Path) -> None:
    made = model(**SCHEDULE).train()
    run = Run(made, TEXT, SHORT, tmp_path)
    run.save()
    manifest = tmp_path / "checkpoints" / "step-0" / MANIFEST
    written = json.loads(manifest.read_text())
    assert set(written["files"]) == {
        "adapter_config.json", "adapter_model.safetensors", "allocator.safetensors", "optimizer.safetensors",
    }  # fmt: skip
    del written["state"]["allocator"]
    manifest.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="its state cannot be read"):
        Run(model(**SCHEDULE), TEXT, SHORT, tmp_path).restore(manifest.parent)


def test_a_schedule_for_another_run_is_refused_before_anything_changes(tmp_path: Path) -> None:
    made = model(**{**SCHEDULE, "total_step": 40})
    before = bits(made)
    with pytest.raises(
        ConfigError, match=r"'default' has its ranks planned for total_step = 40, .* steps = 12"
    ):
        train(made, TEXT, SHORT, tmp_path)
    assert bits(made) == before
    made.add_adapter("second", config(**SCHEDULE))
    made.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="adapters default, second share no budget"):
        train(made, TEXT, SHORT, tmp_path)
    made.set_adapter("second")  # the other is not active, and its schedule does not matter
    train(made, TEXT, SHORT, tmp_path)
    assert "rank_pattern" in made.peft_config["second"].to_dict()


def test_a_frozen_adapter_beside_one_that_trains_needs_no_allocator(tmp_path: Path) -> None:
    made = model(init_lora_weights=False, inference_mode=True, target_modules=["q_proj"])
    made.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    made.set_adapter(["default", "plain"])
    before = {k: v for k, v in bits(made).items() if ".default" in k}
    train(made, TEXT, SHORT, tmp_path)
    assert before == {k: v for k, v in bits(made).items() if ".default" in k}
    assert "ranks" not in lines(tmp_path)[0]


# ---- on any device ----


def test_the_allocator_waits_for_the_device_only_when_it_allocates() -> None:
    results = []
    for device in (STRICT, "cpu"):
        made = model(device=device, init_lora_weights=False, **{**SCHEDULE, "tinit": 3})
        ranks, rng = RankAllocator.of(made), np.random.default_rng(0)
        backend = ranks.params[0].backend
        for t in range(1, 13):
            grads = [backend.from_numpy(g) for g in random_grads(ranks, rng)]
            with counted():
                with no_sync():
                    ranks.penalty()
                if t in (6, 8):  # at 3 there is nothing to cut yet
                    ranks.step(grads)
                    assert METER.downloads == (["to_numpy"] if device is STRICT else [])
                    assert METER.uploads == (["from_numpy"] if device is STRICT else [])
                else:
                    with no_sync():
                        ranks.step(grads)
                    assert METER.uploads == []
        arrays, numbers = ranks.state_dict()
        ranks.load_state_dict(arrays, numbers)
        value, more = ranks.penalty()
        ranks.prune()
        host = backend.to_numpy
        results.append(
            [
                host(value).tobytes(),
                [None if g is None else host(g).tobytes() for g in more],
                bits(made),
                numbers,
            ]
            + [a.tobytes() for a in arrays.values()]
        )
    assert results[0] == results[1]


def test_a_whole_run_has_the_same_bits_on_either_device(tmp_path: Path) -> None:
    found = []
    for name, device in (("there", STRICT), ("here", "cpu")):
        made = model(device=device, **SCHEDULE)
        train(made, TEXT, dataclasses.replace(SHORT, shard=2**31, save_every=5), tmp_path / name)
        found.append((bits(made), lines(tmp_path / name)))
    assert found[0] == found[1]
