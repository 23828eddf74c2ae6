"""AdaLoRA: configuration, penalty, importance and budget, pruning, files, and the training loop.

Shapes: W (O, I), A (r, I), E (r, 1), B (O, r). u is the unit roundoff. What holds of every method
is in test_method_table.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
from collections.abc import Sequence
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
from minilora.training.checkpoints import MANIFEST
from minilora.training.loop import Run, Settings, train
from minilora.training.parallel import ShardedStep
from minilora.verify import PROPERTIES, make_case, measure, verify_files

GOLDEN = Path(__file__).parents[1] / "golden"
# Each token is near the one before.
TEXT = np.random.default_rng(0).integers(0, 4, 400).cumsum().astype(np.int32) % 16
IDS = TEXT[:20].reshape(2, 10)
BATCH = Batch(IDS[:, :-1], IDS[:, 1:])
NEEDED = {"init_r": 4, "target_r": 2, "total_step": 9}


def config(**changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**NEEDED | {"target_modules": "all-linear"} | changes)


def layer(**changes: Any) -> LoraLinear:
    """A frozen base (6, 5) with one active adapter, all of whose numbers are random."""
    rng = np.random.default_rng(0)
    made = LoraLinear(Linear(rng.standard_normal((6, 5))))
    made.base_layer.weight.requires_grad = False
    options = config(init_lora_weights=False, **changes)
    made.adapters["a"] = AdaLoraAdapter(made.base_layer, "x", options, rng, 3)
    made.active = ["a"]
    return made


def model(dtype: str = "float32", device: Any = "cpu", **changes: Any) -> PeftModel:
    return get_peft_model(small.base(dtype, device), config(**changes), seed=2)


def pieces(made: AdaLoraAdapter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return made.lora_A.data, made.lora_E.data, made.lora_B.data


def copies(params: Sequence[Any]) -> list[np.ndarray]:
    return [p.data.copy() for p in params]


def are_equal(params: Sequence[Any], arrays: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(p.data, array) for p, array in zip(params, arrays, strict=True))


# ---- the configuration ----


def test_read_config_keeps_pefts_file_unchanged() -> None:
    raw, _ = read_adapter(GOLDEN / "llama--adalora")
    made = read_config(raw, "here")
    assert type(made) is AdaLoraConfig
    assert (made.init_r, made.target_r) == (6, 3)
    assert (made.tinit, made.tfinal, made.total_step) == (10, 20, 100)
    assert made.to_dict() == raw
    assert made.rank("any") == 6
    assert made.scaling("any") == 8 / (6 + 1e-5)


BAD: dict[str, list[Any]] = {}


def bad(field: str, *values: Any) -> None:
    BAD[field] = list(values)


bad("init_r", 0, -1, 2.0, True, None, "4", 2**24)
bad("target_r", 0, -1, 2.0, True, None, 5)
bad("total_step", 0, -3, 9.0, None, True, "9", 2**24)
bad("tinit", -1, 1.0, None, 9, 10)
bad("tfinal", -1, 1.0, None, 9, 10)
bad("deltaT", 0, -1, 1.0, None)
bad("beta1", 0, 1, -0.1, 0.0, 1.0, 1.5, None, True, math.nan, "x")
bad("beta2", 0, 1, -0.1, 0.0, 1.0, 1.5, None, True, math.nan, "x")
bad("orth_reg_weight", -0.1, math.inf, math.nan, None, "x", True)
bad("init_lora_weights", "gaussian", "pissa", None, 1)
bad("use_rslora", True)
bad("use_dora", True, None, "yes")
bad("alpha_pattern", {"q_proj": 3})
bad("lora_alpha", -1, None)
bad(
    "rank_pattern",
    {"x.lora_E": [True] * 3},
    {"x.lora_E": [1, 0, 1, 0]},
    {"x.lora_E": 4},
    {"x.lora_A": [True] * 4},
    {"y.lora_E": [True] * 4, "x.lora_E": [True] * 5},
    {3: [True] * 4},
    [True],
    "x",
)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_adalora_config_refuses_a_bad_value_by_name(field: str, value: Any) -> None:
    late = field == "tfinal" and value in (9, 10)
    with pytest.raises(ConfigError, match="tinit .*tfinal" if late else field):
        config(**{field: value})
    with pytest.raises(ConfigError, match=r"^here: "):
        read_config({"peft_type": "ADALORA"} | NEEDED | {field: value}, "here")


def test_adalora_config_checks_every_field() -> None:
    names = [{f.name for f in dataclasses.fields(c)} for c in (AdaLoraConfig, LoraConfig)]
    assert names[0] - names[1] <= set(BAD)
    message = "total_step must be an integer of at least 1 and below 16777216, got None"
    with pytest.raises(ConfigError, match=message):
        AdaLoraConfig()
    wrong = {"lora_dropout": 1, "bias": "some", "exclude_modules": [""], "target_modules": "(("}
    for field, value in wrong.items():
        with pytest.raises(ConfigError):
            config(**{field: value})
    with pytest.raises(ConfigError, match="target_modules"):
        config(target_modules=[])


def test_adalora_config_warns_that_r_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="r = 5 has no effect in AdaLoRA"):
        assert config(r=5).rank("x") == 4


@pytest.mark.parametrize("kind", ["LN_TUNING", None, ["LORA"], {}, 3])
def test_read_config_refuses_another_kind_of_adapter(kind: Any) -> None:
    message = "peft_type must be 'LORA' or 'ADALORA' or 'HYDRALORA' or 'LOHA' or .*, got"
    with pytest.raises(ConfigError, match=message):
        read_config({"peft_type": kind}, "here")
    with pytest.raises(ConfigError, match="use_dora must be False"):
        read_config({"peft_type": "ADALORA", "total_step": 9, "use_dora": True}, "here")


# ---- one layer ----


def test_adalora_adapter_draws_first_values_by_their_laws() -> None:
    for init, std in ((True, 0.02), (False, 1.0)):
        options = config(init_r=50, init_lora_weights=init)
        rng = np.random.default_rng(0)
        made = AdaLoraAdapter(Linear(np.zeros((90, 80))), "x", options, rng)
        for name, p in zip(made.TENSORS, pieces(made), strict=True):
            wanted = 0.0 if init and name == "lora_E" else std
            # Five standard errors each.
            assert abs(p.std() - wanted) <= 5 * wanted / math.sqrt(2 * p.size)
            assert abs(p.mean()) <= 5 * wanted / math.sqrt(p.size)


@pytest.mark.parametrize("left", [0, 1])
def test_keep_nothing_of_a_layer_breaks_no_property(left: int) -> None:
    case = make_case(1, 7, 5, [4, 4], [4, 2], kind="adalora")
    layer = case.original
    for adapter in list(layer.adapters.values())[left:]:
        adapter.keep(np.zeros(4, bool))
    layer.prepare_step()
    # Without a triplet nothing is formed.
    assert any(layer._effective.values()) == (left > 0)
    layer.end_step()
    pattern = {} if left else {"proj.lora_E": [False] * 4}
    options = dataclasses.replace(case.configs["a0"], rank_pattern=pattern)
    rows = measure([dataclasses.replace(case, configs={"a0": options})])
    expected = {"forward", "effective weight", "AdaLoRA's gradients", "merge rounds once", "files"}
    assert expected < {row.property for row in rows}
    assert [row for row in rows if not row.ok] == []


def test_adalora_dropout_acts_on_x_in_training_alone() -> None:
    made = layer(lora_dropout=0.5)
    adapter = made.adapters["a"]
    A, E, B = pieces(adapter)
    x = Tensor(np.ones((1, 40, 5)))
    still = made.eval()(x).data
    assert np.ptp(still, axis=1).max() == 0  # the rows are equal
    moved = made.train()(x).data - made.base_layer(x).data
    assert np.ptp(moved, axis=1).max() > 0
    masks = np.array([[i >> k & 1 for k in range(5)] for i in range(32)])  # all of them
    possible = (2.0 * masks) @ (adapter.scaling * B @ (A * E)).T
    for row in moved[0]:
        assert np.abs(possible - row).max(axis=1).min() < 1e-12


# ---- the penalty ----


def paired(items: Sequence[Any]) -> list[Any]:
    return list(zip(items[::2], items[1::2], strict=True))


def gap_norm(M: np.ndarray, r: int) -> float:
    """|M M^T - I|: its square sums (sigma^2 - 1)^2 over r singular values, missing ones being 0."""
    sigma = np.zeros(r)
    values = np.linalg.svd(M, compute_uv=False)
    sigma[: len(values)] = values
    return math.sqrt(((sigma**2 - 1) ** 2).sum())


SIDES = st.integers(1, 7)
PAIRS = st.tuples(st.integers(1, 5), SIDES, SIDES)


@given(st.integers(0, 99), st.lists(PAIRS, min_size=1, max_size=3))
def test_orthogonality_is_the_mean_norm_and_its_gradient_is_true(
    seed: int, sizes: list[tuple[int, int, int]]
) -> None:
    rng = np.random.default_rng(seed)
    factors = []
    norms = []
    for r, I, O in sizes:
        for shape in ((r, I), (O, r)):
            factors.append(rng.standard_normal(shape))
            norms.append(gap_norm(factors[-1], r))
    value = orthogonality(paired([Tensor(factor) for factor in factors])).item()
    assert value == pytest.approx(np.mean(norms), rel=1e-12)
    if min(norms) > 0.05:  # at 0 a norm has a kink
        check_gradient(lambda *leaves: orthogonality(paired(leaves)), *factors, tolerance=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_orthogonality_without_triplets_is_zero(dtype: str) -> None:
    leaves = [Tensor(np.zeros(shape, dtype), True) for shape in ((0, 5), (6, 0))]
    value = orthogonality(paired(leaves))
    assert (value.item(), value.dtype) == (0, np.dtype(dtype))
    for g, leaf in zip(gradients(value, leaves), leaves, strict=True):
        assert g is not None
        assert (g.shape, g.dtype) == (leaf.shape, leaf.dtype)


# ---- importance and budget ----


def allocator(
    seed: int = 0, layers: int = 2, dtype: str = "float64", **changes: Any
) -> RankAllocator:
    """An allocator over layers of random sizes."""
    options = config(**{"init_lora_weights": False} | changes)
    rng = np.random.default_rng(seed)
    adapters = {}
    for i in range(layers):
        base = Linear(np.zeros(rng.integers(1, 5, 2), dtype))
        adapters[f"l{i}"] = AdaLoraAdapter(base, f"l{i}", options, rng)
    return RankAllocator(adapters, options)


def random_grads(ranks: RankAllocator, rng: np.random.Generator) -> list[Any]:
    return [rng.standard_normal(p.shape).astype(p.dtype) for p in ranks.params]


def test_importance_is_the_papers() -> None:
    """Number by number, in plain loops, for two steps with weights that change between them."""
    ranks = allocator(layers=2, init_r=3, total_step=90, beta1=0.7, beta2=0.6)
    ranks.config.deltaT = 50  # no mask yet
    rng = np.random.default_rng(1)
    sensitivity: dict[int, np.ndarray] = {}
    uncertainty: dict[int, np.ndarray] = {}
    for _ in range(2):
        grads = random_grads(ranks, rng)
        for i, (p, g) in enumerate(zip(ranks.params, grads, strict=True)):
            p.data = rng.standard_normal(p.shape)
            now = np.abs(p.data * g)
            sensitivity[i] = 0.7 * sensitivity.get(i, 0 * now) + 0.3 * now
            distance = np.abs(now - sensitivity[i])
            uncertainty[i] = 0.6 * uncertainty.get(i, 0 * now) + 0.4 * distance
        before = copies(ranks.params)
        ranks.step(grads)
        assert are_equal(ranks.params, before)
    ranks.final_step = 3
    ranks.step(grads)  # the last allocation chooses by what was seen before it
    expected = []
    for i in range(0, len(sensitivity), 3):
        A, E, B = (sensitivity[j] * uncertainty[j] for j in (i, i + 1, i + 2))
        for k in range(len(E)):
            expected.append(E[k, 0] + A[k].mean() + B[:, k].mean())
    assert np.allclose(ranks.importance(), expected, rtol=1e-13, atol=0)


def test_budget_is_kept_over_2000_random_schedules() -> None:
    """Property 21, with another schedule, shape and dtype for each seed."""
    [budget] = [claim for claim in PROPERTIES if claim.name == "AdaLoRA's budget"]
    for seed in range(2000):
        r = 1 + seed % 4
        layers = 1 + seed % 3
        dtype = ("float32", "float64")[seed % 2]
        sizes = 1 + seed % 5, 1 + seed % 7
        case = make_case(seed, *sizes, [r] * layers, [4.0] * layers, dtype, kind="adalora")
        assert budget.check(case).ok, seed


def test_budget_is_the_cubic_in_numbers() -> None:
    ranks = allocator(layers=5, init_r=20, target_r=4, total_step=100, tinit=10, tfinal=30)
    expected = {0: 100, 10: 100, 11: 96, 25: 53, 40: 30, 55: 21, 69: 20, 70: 20, 71: 20, 100: 20}
    assert {t: ranks.budget(t) for t in expected} == expected


def test_step_keeps_the_most_important_triplets_of_all_layers() -> None:
    """One global order, not one per layer: a layer of no use loses all."""
    ranks = allocator(layers=3, init_r=4, target_r=2, total_step=2, tinit=0)
    worth = {"l0": 0.0, "l1": 3.0, "l2": 1.0}
    grads = []
    for name, adapter in ranks.adapters.items():
        size = worth[name] * np.linspace(1, 2, 4)  # the last triplet is the best
        for tensor in adapter.TENSORS:
            p = getattr(adapter, tensor)
            p.data = np.ones(p.shape)
            grads.append(p.data * (size[None, :] if tensor == "lora_B" else size[:, None]))
    ranks.step(grads)
    ranks.step(grads)
    assert ranks.ranks == {"l0": 0, "l1": 4, "l2": 2}
    assert ranks.adapters["l2"].lora_E.data.ravel().tolist() == [0, 0, 1, 1]
    assert not ranks.adapters["l0"].lora_E.data.any()


@pytest.mark.parametrize("tfinal", [0, 3])
def test_step_changes_nothing_if_target_r_is_init_r(tfinal: int) -> None:
    ranks = allocator(init_r=3, target_r=3, total_step=8, tfinal=tfinal)
    rng = np.random.default_rng(0)
    for _ in range(8):
        before = copies(ranks.params)
        ranks.step(random_grads(ranks, rng))
        assert are_equal(ranks.params, before)
    assert set(ranks.ranks.values()) == {3}
    ranks.prune()
    assert set(ranks.config.rank_pattern) == {"l0.lora_E", "l1.lora_E"}
    assert [adapter.r for adapter in ranks.adapters.values()] == [3, 3]


def test_step_meets_the_budget_among_equals() -> None:
    """Where no triplet is better than the rest, as without any gradient, the budget holds too."""
    ranks = allocator(layers=2, init_r=4, target_r=2, total_step=3)
    for _ in range(3):
        ranks.step([None] * 6)
    assert sum(ranks.ranks.values()) == 4
    assert ranks.kept.tolist() == [False] * 4 + [True] * 4  # of equals the first goes first


def test_step_refuses_gradients_that_do_not_fit_and_changes_nothing() -> None:
    ranks = allocator()
    grads = random_grads(ranks, np.random.default_rng(0))
    for wrong in (grads[:-1], [*grads, grads[0]], [np.zeros((9, 9)), *grads[1:]]):
        message = f"{len(wrong)} gradients do not fit the 6 parameters"
        with pytest.raises(ConfigError, match=message):
            ranks.step(wrong)
    assert ranks.steps == 0
    assert not ranks.sensitivity.any()
    with pytest.raises(ConfigError, match="no AdaLoRA layer was given"):
        RankAllocator({}, ranks.config)


@given(st.integers(0, 999), st.integers(0, 9))
def test_state_dict_is_all_that_the_next_steps_depend_on(seed: int, at: int) -> None:
    options: dict[str, Any] = {"total_step": 9, "tinit": 1, "tfinal": 2, "deltaT": 2}
    one = allocator(seed, dtype="float32", **options)
    other = allocator(seed, dtype="float32", **options)
    rng = np.random.default_rng(seed)
    plan = [(random_grads(one, rng), random_grads(one, rng)) for _ in range(10)]

    def follow(ranks: RankAllocator, steps: list[Any]) -> None:
        for changes, grads in steps:
            for p, change in zip(ranks.params, changes, strict=True):
                p.data = p.data + change
            ranks.step(grads)

    follow(one, plan[:at])
    arrays, numbers = one.state_dict()
    saved = copies(one.params)
    follow(one, plan[at:])  # the state is a copy
    for p, array in zip(other.params, saved, strict=True):
        p.data = array
    other.load_state_dict(arrays, json.loads(json.dumps(numbers)))
    follow(other, plan[at:])
    for p, q in zip(one.params, other.params, strict=True):
        assert p.data.tobytes() == q.data.tobytes()
    ends = [ranks.state_dict() for ranks in (one, other)]
    assert ends[0][1] == ends[1][1] == {"steps": 10}
    assert set(ends[0][0]) == {"sensitivity", "uncertainty", "kept"}
    for name, array in ends[0][0].items():
        assert array.tobytes() == ends[1][0][name].tobytes()


def test_load_state_dict_refuses_another_state_and_changes_nothing() -> None:
    ranks = allocator(0)
    ranks.step(random_grads(ranks, np.random.default_rng(0)))
    arrays, numbers = ranks.state_dict()
    kept = arrays["kept"]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = []
    cases.append(({name: a for name, a in arrays.items() if name != "kept"}, numbers))
    cases.append((arrays | {"kept": kept.astype(np.uint8)}, numbers))
    cases.append((arrays | {"sensitivity": arrays["sensitivity"][1:]}, numbers))
    cases.append((arrays | {"more": kept}, numbers))
    cases.append((arrays, {}))
    for steps in (-1, 1.0, True):
        cases.append((arrays, {"steps": steps}))
    for wrong in cases:
        with pytest.raises(CheckpointError, match="the allocator's state must be"):
            ranks.load_state_dict(*wrong)
    assert ranks.steps == 1
    assert np.array_equal(ranks.sensitivity, arrays["sensitivity"])


# ---- pruning ----


def test_keep_makes_smaller_parameters() -> None:
    adapter = layer(init_r=4).adapters["a"]
    before = pieces(adapter)
    scaling = adapter.scaling
    old = adapter.lora_A
    adapter.keep(np.array([True, False, False, True]))
    assert (adapter.r, adapter.scaling) == (2, scaling)
    assert adapter.lora_A is not old
    assert all(getattr(adapter, name).requires_grad for name in adapter.TENSORS)
    for now, was, axis in zip(pieces(adapter), before, (0, 0, 1), strict=True):
        assert np.array_equal(now, was.take([0, 3], axis=axis))


def trained(**changes: Any) -> tuple[PeftModel, RankAllocator]:
    """A model whose allocator has made its final choice, by hand-made gradients.

    Some layers keep nothing.
    """
    made = model(**{"init_lora_weights": False, "total_step": 4, "tfinal": 1} | changes)
    ranks = RankAllocator.of(made)
    rng = np.random.default_rng(0)
    for _ in range(4):
        for adapter in ranks.adapters.values():  # what was masked grows again, until the last time
            E = adapter.lora_E
            E.data = E.data + E.dtype.type(0.1) * (E.data == 0)
        sizes = np.repeat(rng.uniform(0, 1, len(ranks.adapters)) ** 4, 3)
        grads = random_grads(ranks, rng)
        ranks.step([g * size for g, size in zip(grads, sizes, strict=True)])
    return made.eval(), ranks


def are_close(made: Any, expected: np.ndarray) -> bool:
    return bool(np.abs(made(IDS).data - expected).max() <= 1e-5 * np.abs(expected).max())


def reload(folder: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(small.base(), folder, **options)


def test_prune_keeps_the_model_and_its_files(tmp_path: Path) -> None:
    made, ranks = trained()
    whole = made(IDS).data
    counts = ranks.ranks
    assert min(counts.values()) == 0  # a layer that keeps nothing is a case of its own
    assert max(counts.values()) > 2
    made.save_pretrained(tmp_path / "whole")
    written = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert written["rank_pattern"] is None
    masks = {}
    for path, adapter in ranks.adapters.items():
        masks[f"{path}.lora_E"] = (adapter.lora_E.data.ravel() != 0).tolist()
    ranks.prune()
    assert are_close(made, whole)
    assert {path: adapter.r for path, adapter in ranks.adapters.items()} == counts == ranks.ranks
    assert made.get_nb_trainable_parameters()[0] == sum(p.size for p in ranks.params)
    assert sum(counts.values()) == 2 * len(counts)

    made.save_pretrained(tmp_path / "cut")
    raw, stored = read_adapter(tmp_path / "cut")
    assert raw["rank_pattern"] == masks
    assert {len(mask) for mask in raw["rank_pattern"].values()} == {4}
    for key, tensor in stored.items():
        path = key.removeprefix("base_model.model.").rpartition(".")[0]
        assert tensor.shape[1 if key.endswith("lora_B") else 0] == counts[path]
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        again = reload(folder)
        assert are_close(again, whole)
        if folder.name == "cut":
            assert bits(again) == bits(made)
        again.save_pretrained(tmp_path / "again")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert are_close(again.merge_and_unload(), whole)


def test_prune_again_cuts_what_the_first_left(tmp_path: Path) -> None:
    """The pattern of the file is always over init_r triplets."""
    made, ranks = trained(target_r=3)
    ranks.prune()
    first = dict(made.peft_config["default"].rank_pattern)
    with pytest.raises(ConfigError, match="ranks are final after step 3, this is step 0"):
        RankAllocator.of(made).prune()
    raw = made.peft_config["default"].to_dict() | {"target_r": 1, "inference_mode": False}
    folder = tmp_path / "first"
    made.save_pretrained(folder)
    write_adapter(folder, raw, load_file(folder / "adapter_model.safetensors"))
    again = reload(folder, is_trainable=True)
    more = RankAllocator.of(again)
    rng = np.random.default_rng(1)
    assert more.initial == 3 * len(more.adapters)
    for _ in range(4):
        more.step(random_grads(more, rng))
    more.prune()
    second = again.peft_config["default"].rank_pattern
    assert set(first) == set(second)
    for key, mask in second.items():
        assert all(was >= now for was, now in zip(first[key], mask, strict=True))
    left = sum(adapter.r for adapter in more.adapters.values())
    assert sum(map(sum, second.values())) == len(second) == left
    again.eval().save_pretrained(tmp_path / "second")
    assert reload(tmp_path / "second")(IDS).data.tobytes() == again(IDS).data.tobytes()


def test_from_pretrained_refuses_a_file_that_does_not_fit_its_pattern(tmp_path: Path) -> None:
    made, ranks = trained()
    ranks.prune()
    made.save_pretrained(tmp_path)
    raw, stored = read_adapter(tmp_path)
    key = max(ranks.ranks, key=ranks.ranks.__getitem__)
    raw["rank_pattern"] = raw["rank_pattern"] | {f"{key}.lora_E": [False] * 4}
    write_adapter(tmp_path, raw, stored)
    with pytest.raises(FormatError, match=rf"{key}\.lora_A is \(\d, \d+\), the base needs \(0, "):
        reload(tmp_path)
    with pytest.warns(UserWarning, match=r"rank_pattern: 'nowhere\.lora_E' matches no target"):
        model(rank_pattern={"nowhere.lora_E": [True] * 4})


def test_from_pretrained_takes_no_memory_for_a_rank_without_tensors(tmp_path: Path) -> None:
    model(target_modules=["q_proj"]).save_pretrained(tmp_path)
    raw, stored = read_adapter(tmp_path)
    write_adapter(tmp_path, raw | {"init_r": 2**24 - 1}, stored)
    plain = small.base()
    warning = pytest.warns(UserWarning, match="r = 16777215 is above the full rank 16")
    message = r"lora_A is \(4, 16\), the base needs \(16777215, 16\)"
    tracemalloc.start()
    try:
        with warning, pytest.raises(FormatError, match=message):
            PeftModel.from_pretrained(plain, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_inspect_adapter_and_verify_files_read_a_pruned_adapter(tmp_path: Path) -> None:
    made, ranks = trained()
    ranks.prune()
    made.save_pretrained(tmp_path / "adapter")
    small.base().save_pretrained(tmp_path / "base")
    norms = {}
    for path, wrapper in made._wrappers().items():
        norms[path] = np.linalg.norm(wrapper.delta_weight("default"))
    report = inspect_adapter(tmp_path / "adapter")
    assert {row["layer"]: row["r"] for row in report["tensors"]} == ranks.ranks
    assert report["r"] == 4
    for row in report["tensors"]:
        assert float(row["|dW|"]) == pytest.approx(norms[row["layer"]], rel=1e-3)
    measured = verify_files(tmp_path / "base", tmp_path / "adapter")
    assert all(row.ok for row in measured.rows)
    for finding in measured.layers:
        assert finding.dW == pytest.approx(norms[finding.layer], rel=1e-6)
    raw, stored = read_adapter(tmp_path / "adapter")
    del stored[next(key for key in stored if key.endswith("lora_E"))]
    write_adapter(tmp_path / "adapter", raw, stored)
    with pytest.raises(FormatError, match=r"lora_A .* has no lora_E that fits it"):
        inspect_adapter(tmp_path / "adapter")


def test_add_adapter_puts_lora_beside_adalora(tmp_path: Path) -> None:
    made = model(init_lora_weights=False, target_modules=["q_proj"])
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    made.add_adapter("plain", lora, seed=5)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    names = [name for name, _ in made.named_parameters() if name.startswith(f"{path}.lora_")]
    expected = {f"{path}.{tensor}.default" for tensor in ("lora_A", "lora_E", "lora_B")}
    expected |= {f"{path}.{tensor}.plain.weight" for tensor in ("lora_A", "lora_B")}
    assert set(names) == expected
    made.set_adapter(["default", "plain"])
    both = made.eval()(IDS).data
    made.merge_adapter()
    assert are_close(made, both)
    made.unmerge_adapter()
    made.save_pretrained(tmp_path)
    again = reload(tmp_path)
    again.load_adapter(tmp_path / "plain", "plain")
    again.set_adapter(["default", "plain"])
    assert again(IDS).data.tobytes() == both.tobytes()
    for name in ("plain", "nothing"):
        message = rf"'{name}' is not an ADALORA adapter, .* default \(ADALORA\), plain \(LORA\)"
        with pytest.raises(ConfigError, match=message):
            RankAllocator.of(made, name)


# ---- training ----

NO_ALLOCATOR = r"AdaLoRA trains with a RankAllocator, .*RankAllocator\.of\(model\)"


def loss(made: PeftModel) -> Tensor:
    return F.cross_entropy(made(BATCH.ids), BATCH.targets)


def trainable(made: PeftModel) -> list[Any]:
    return [p for p in made.parameters() if p.requires_grad]


def step_by_hand(made: PeftModel, optimizer: SGD) -> list[Any]:
    grads = gradients(loss(made), optimizer.params)
    optimizer.step(grads)
    return grads


def test_forward_in_training_without_the_allocator_is_an_error() -> None:
    made = model().train()
    optimizer = SGD(trainable(made), lr=0.1)
    step_by_hand(made, optimizer)
    with pytest.raises(ConfigError, match=NO_ALLOCATOR):
        step_by_hand(made, optimizer)
    ranks = RankAllocator.of(made)  # takes the weights as they are
    step_by_hand(made, optimizer)
    with pytest.raises(ConfigError, match=NO_ALLOCATOR):  # an allocator alone does not suffice
        step_by_hand(made, optimizer)
    with no_grad():
        made(IDS)
    made.eval()(IDS)  # only training needs one
    ranks = RankAllocator.of(made)
    optimizer = SGD(ranks.params, lr=0.1)
    made.train()
    for _ in range(3):
        ranks.step(step_by_hand(made, optimizer))
    made.set_adapter("default", inference_mode=True)
    RankAllocator.of(made)
    for p in ranks.params:
        p.data = 2 * p.data
    made(IDS)


def test_prepare_step_without_the_allocator_is_an_error_too() -> None:
    made = model().train()
    ranks = RankAllocator.of(made)
    optimizer = SGD(ranks.params, lr=0.1)
    with ShardedStep(made, 2, 1) as sharded:
        for is_called in (True, False):
            _, grads = sharded.gradients(BATCH, ranks.params)
            optimizer.step(grads)
            if is_called:
                ranks.step(grads)
        with pytest.raises(ConfigError, match=NO_ALLOCATOR):
            sharded.gradients(BATCH, ranks.params)


def test_load_state_dict_with_its_weights_trains_on_from_there() -> None:
    made = model().train()
    ranks = RankAllocator.of(made)
    optimizer = SGD(ranks.params, lr=0.1)
    state = ranks.state_dict()
    weights = copies(ranks.params)
    results = []
    for _ in range(2):
        for p, array in zip(ranks.params, weights, strict=True):
            p.data = array
        ranks.load_state_dict(*state)
        ranks.step(step_by_hand(made, optimizer))
        results.append(bits(made))
    assert results[0] == results[1]


def test_forward_between_two_steps_may_run_any_number_of_times() -> None:
    made = model().train()
    for _ in range(3):
        gradients(loss(made), trainable(made))


SCHEDULE = {"total_step": 12, "tinit": 2, "tfinal": 4, "deltaT": 3}
SHORT = Settings(steps=12, batch_size=4, context=8, lr=1e-2, warmup=2, threads=1, shard=2)


def without_seconds(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: v for key, v in line.items() if key != "seconds"} for line in lines]


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return without_seconds([json.loads(line) for line in lines])


def test_train_allocates_logs_and_prunes(tmp_path: Path) -> None:
    made = model(**SCHEDULE)
    train(made, TEXT, SHORT, tmp_path)
    log = log_of(tmp_path)
    assert all(line["penalty"] > 0 for line in log)
    assert set(log[0]["ranks"].values()) == {4}
    totals = {line["step"]: sum(line["ranks"].values()) for line in log if "ranks" in line}
    adapters = RankAllocator.of(made).adapters
    planned = RankAllocator(adapters, made.peft_config["default"])
    planned.initial = 4 * 14
    # Step 7 is the eighth.
    assert totals == {0: 56, 2: planned.budget(3), 5: planned.budget(6), 7: 28}
    assert {path: adapter.r for path, adapter in adapters.items()} == log[7]["ranks"]
    assert all(adapter.lora_E.data.all() for adapter in adapters.values())
    assert set(made.peft_config["default"].rank_pattern) == {f"{path}.lora_E" for path in adapters}


@pytest.mark.parametrize(("weight", "shard"), [(0.5, 1), (0.5, 4), (0.0, 2)])
def test_run_step_adds_the_weighted_penalty_once_before_clipping(
    weight: float, shard: int, tmp_path: Path
) -> None:
    made = model("float64", orth_reg_weight=weight, init_lora_weights=False, **SCHEDULE).train()
    settings = dataclasses.replace(SHORT, shard=shard, max_grad_norm=1e-3)
    run = Run(made, TEXT, settings, tmp_path)
    params = run.optimizer.params
    ranks = run.allocator
    assert ranks is not None
    penalty = orthogonality([(a.lora_A, a.lora_B) for a in ranks.adapters.values()])
    slopes = gradients(penalty, ranks.params)
    extra = {id(p): g for p, g in zip(ranks.params, slopes, strict=True) if g is not None}
    seen: list[Any] = []
    step = ranks.step

    def record(grads: Sequence[Any]) -> None:
        seen.extend(grads)
        step(grads)

    with ShardedStep(made, 1, shard) as sharded:
        _, grads = sharded.gradients(run.windows.batch(0), params, 0, 0)
        total = [g + weight * extra.get(id(p), 0) for g, p in zip(grads, params, strict=True)]
        clipped, norm = clip_by_global_norm(total, 1e-3)
        ranks.step = record  # type: ignore[method-assign]
        line = run.step(sharded)
    assert line["penalty"] == pytest.approx(weight * penalty.item(), rel=1e-14)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-12)
    expected = dict(zip(map(id, params), clipped, strict=True))
    for p, g in zip(ranks.params, seen, strict=True):
        assert np.allclose(g, expected[id(p)], rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("at", [1, 3, 4, 8, 10, 12])
def test_train_resumed_at_any_step_ends_with_the_same_bits(at: int, tmp_path: Path) -> None:
    """In a fresh model, and in the one that has trained on meanwhile."""
    for name in ("whole", "part", "fresh", "begun"):
        (tmp_path / name).mkdir()
    options = SCHEDULE | {"lora_dropout": 0.1}
    straight = model(**options)
    train(straight, TEXT, SHORT, tmp_path / "whole")
    whole = log_of(tmp_path / "whole")
    begun = model(**options).train()
    run = Run(begun, TEXT, SHORT, tmp_path / "part")
    with ShardedStep(begun, 1, 2) as sharded:
        lines = [run.step(sharded) for _ in range(at)]
        folder = run.save()
        assert without_seconds(lines) == whole[:at]
        fresh = model(**options)
        train(fresh, TEXT, SHORT, tmp_path / "fresh", resume=folder)
        run.step(sharded)
    train(begun, TEXT, SHORT, tmp_path / "begun", resume=folder)
    for name, again in (("fresh", fresh), ("begun", begun)):
        assert bits(again) == bits(straight)
        assert log_of(tmp_path / name) == whole[at:]


def test_restore_refuses_a_checkpoint_without_the_allocators_state(tmp_path: Path) -> None:
    run = Run(model(**SCHEDULE).train(), TEXT, SHORT, tmp_path)
    run.save()
    manifest = tmp_path / "checkpoints" / "step-0" / MANIFEST
    written = json.loads(manifest.read_text())
    stems = {"adapter_model", "allocator", "optimizer"}
    expected = {f"{stem}.safetensors" for stem in stems} | {"adapter_config.json"}
    assert set(written["files"]) == expected
    del written["state"]["allocator"]
    manifest.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="its state cannot be read"):
        Run(model(**SCHEDULE), TEXT, SHORT, tmp_path).restore(manifest.parent)


def test_train_refuses_a_schedule_for_another_run_before_anything_changes(tmp_path: Path) -> None:
    made = model(**SCHEDULE | {"total_step": 40})
    before = bits(made)
    message = r"'default' plans its ranks for total_step = 40, .* steps = 12"
    with pytest.raises(ConfigError, match=message):
        train(made, TEXT, SHORT, tmp_path)
    assert bits(made) == before
    made.add_adapter("second", config(**SCHEDULE))
    made.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="adapters default, second cannot share a rank budget"):
        train(made, TEXT, SHORT, tmp_path)
    made.set_adapter("second")  # the other is not active, and its schedule does not matter
    train(made, TEXT, SHORT, tmp_path)
    assert "rank_pattern" in made.peft_config["second"].to_dict()


def test_train_beside_a_frozen_adalora_needs_no_allocator(tmp_path: Path) -> None:
    made = model(init_lora_weights=False, target_modules=["q_proj"])
    made.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    made.set_adapter(["default", "plain"])
    made.set_requires_grad("default", False)

    def frozen() -> dict[str, bytes]:
        return {name: value for name, value in bits(made).items() if ".default" in name}

    before = frozen()
    train(made, TEXT, SHORT, tmp_path)
    assert frozen() == before
    assert "ranks" not in log_of(tmp_path)[0]


# ---- on any device ----


@pytest.mark.parametrize("device", [STRICT, "cpu"])
def test_step_waits_for_the_device_only_when_it_allocates(device: Any) -> None:
    options = SCHEDULE | {"tinit": 3}
    ranks = RankAllocator.of(model(device=device, init_lora_weights=False, **options))
    rng = np.random.default_rng(0)
    moves = (["to_numpy"], ["from_numpy"]) if device is STRICT else ([], [])
    for t in range(1, 13):
        grads = [ranks.params[0].backend.from_numpy(g) for g in random_grads(ranks, rng)]
        with counted():
            with no_sync():
                ranks.penalty()
            if t in (6, 8):  # at 3 nothing is cut yet
                ranks.step(grads)
                assert (METER.downloads, METER.uploads) == moves
                continue
            with no_sync():
                ranks.step(grads)
            assert METER.uploads == []


def test_allocator_has_the_same_bits_on_either_device() -> None:
    results = []
    for device in (STRICT, "cpu"):
        made = model(device=device, init_lora_weights=False, **SCHEDULE | {"tinit": 3})
        ranks = RankAllocator.of(made)
        backend = ranks.params[0].backend
        rng = np.random.default_rng(0)
        for _ in range(12):
            ranks.step([backend.from_numpy(g) for g in random_grads(ranks, rng)])
        arrays, numbers = ranks.state_dict()
        ranks.load_state_dict(arrays, numbers)
        value, slopes = ranks.penalty()
        ranks.prune()
        host = [g if g is None else backend.to_numpy(g).tobytes() for g in (value, *slopes)]
        state = {name: array.tobytes() for name, array in arrays.items()}
        results.append((host, state, numbers, bits(made)))
    assert results[0] == results[1]


def test_train_has_the_same_bits_on_either_device(tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, shard=2**31, save_every=5)
    results = []
    for name, device in (("strict", STRICT), ("cpu", "cpu")):
        made = model(device=device, **SCHEDULE)
        train(made, TEXT, settings, tmp_path / name)
        results.append((bits(made), log_of(tmp_path / name)))
    assert results[0] == results[1]
