"""HydraLoRA: the mixture and its gradient, what equals LoRA, what there is not (a dW), and its files.

Shapes: W (O, I), A (r, I), B (O, k r), R (k, I), w (..., k). u is the unit roundoff.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import SMALLER as SHAPE
from strict_xp import STRICT, no_sync

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.data import Batch
from minilora.errors import ConfigError, FormatError
from minilora.formats import read_adapter
from minilora.gradcheck import check_gradient
from minilora.lora import (
    HydraAdapter,
    HydraConfig,
    LoraConfig,
    LoraLinear,
    PeftModel,
    get_peft_model,
    read_config,
)
from minilora.lora.hydra import mixture
from minilora.models.generation import generate
from minilora.models.transformer import CausalLM
from minilora.nn import Linear
from minilora.optim import AdamW
from minilora.tools.inspecting import inspect_adapter
from minilora.training.parallel import ShardedStep
from minilora.verify import verify_files

IDS = np.random.default_rng(0).integers(0, 13, (4, 7))
OPTIONS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": "all-linear",
    "init_lora_weights": False,
}


def hydra(**changes: Any) -> HydraConfig:
    return HydraConfig(**{**OPTIONS, **changes})


def model(
    device: Any = "cpu", dtype: str = "float64", config: LoraConfig | None = None, **changes: Any
) -> PeftModel:
    return get_peft_model(
        CausalLM(SHAPE, seed=1, dtype=dtype, device=device), config or hydra(**changes), seed=2
    )


def layer(experts: int, seed: int = 0, outputs: int = 6, **changes: Any) -> LoraLinear:
    rng = np.random.default_rng(seed)
    made = LoraLinear(Linear(rng.standard_normal((outputs, 5))))
    made.base_layer.weight.requires_grad = False
    made.adapters["x"] = HydraAdapter(
        made.base_layer, "x", hydra(experts=experts, **changes), rng, 3
    )
    made.active = ["x"]
    return made


# ---- the operation ----


def definition(x: Tensor, y: Tensor, w: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The sum, expert by expert."""
    r = A.shape[0]
    for i in range(w.shape[-1]):
        y = y + w[..., i : i + 1] * (x @ A.T @ B[:, i * r : (i + 1) * r].T) * s
    return y


SIZES = st.tuples(*(st.integers(1, 5) for _ in range(5)))


@given(SIZES, st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 99))
def test_the_mixture_is_the_sum_over_experts_forward_and_backward(
    sizes: Any, rows: Any, seed: int
) -> None:
    I, O, r, k, _ = sizes
    rng = np.random.default_rng(seed)
    shapes = (*rows, I), (*rows, O), (*rows, k), (r, I), (O, k * r)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    results = []
    for operation in (mixture, definition):
        leaves = [Tensor(a.copy(), requires_grad=True) for a in arrays]
        y = operation(*leaves, 0.7)
        results.append([y.data, *gradients(y, leaves, np.ones(y.shape))])
    top = max(np.abs(a).max() for a in results[1])
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        assert np.abs(mine - expected).max() <= 1e-13 * top
    check_gradient(lambda *leaves: mixture(*leaves, 0.7), *arrays)


@pytest.mark.parametrize("trained", range(5))
def test_only_what_is_wanted_has_a_gradient(trained: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((3, 4), (3, 5), (3, 2), (2, 4), (5, 4))]
    everything = [Tensor(a, requires_grad=True) for a in arrays]
    one = [Tensor(a, requires_grad=i == trained) for i, a in enumerate(arrays)]
    dy = rng.standard_normal((3, 5))
    by_hand = mixture(*one, 0.7).node.vjp(dy)
    assert [i for i in (0, 3, 4) if by_hand[i] is not None] == [
        i for i in (0, 3, 4) if i == trained
    ]  # x, A, B
    expected, found = (gradients(mixture(*leaves, 0.7), leaves, dy) for leaves in (everything, one))
    assert [g is not None for g in found] == [i == trained for i in range(5)]
    assert np.array_equal(found[trained], expected[trained])


def test_the_layer_is_equation_6() -> None:
    made = layer(3)
    adapter, x = made.adapters["x"], np.random.default_rng(1).standard_normal((2, 3, 5))
    A, B, R = (getattr(adapter, name).data for name in HydraAdapter.TENSORS)
    W = made.base_layer.weight.data
    for row, y in zip(x.reshape(-1, 5), made(Tensor(x)).data.reshape(-1, 6), strict=True):
        e = np.exp(R @ row)
        w = e / e.sum()
        expected = W @ row + 3 / 2 * sum(
            w[i] * B[:, 2 * i : 2 * i + 2] @ (A @ row) for i in range(3)
        )
        assert np.abs(y - expected).max() <= 1e-14 * np.abs(expected).max() * 10


# ---- what equals LoRA ----


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_expert_is_lora_bit_for_bit(init: Any, dropout: float) -> None:
    options = {**OPTIONS, "init_lora_weights": init, "lora_dropout": dropout}
    models = [
        model(config=c).train() for c in (HydraConfig(**options, experts=1), LoraConfig(**options))
    ]
    results = []
    for made in models:
        params = [p for n, p in made.named_parameters() if p.requires_grad and "route" not in n]
        loss = F.cross_entropy(made(IDS)[:, :-1], IDS[:, 1:])
        results.append([loss.data.tobytes(), *(g.tobytes() for g in gradients(loss, params))])
    assert results[0] == results[1]


@given(st.integers(2, 5), st.integers(0, 99))
def test_equal_experts_share_lora_s_gradient_and_move_no_router(k: int, seed: int) -> None:
    made, plain = layer(k, seed), layer(1, seed)
    one = plain.adapters["x"]
    own = made.adapters["x"]
    own.lora_A.data, own.lora_B.data = one.lora_A.data, np.tile(one.lora_B.data, (1, k))
    x, dy = (np.random.default_rng(seed + i).standard_normal((4, n)) for i, n in enumerate((5, 6)))
    dA, dB, dR = gradients(
        made(Tensor(x)), [getattr(own, name) for name in HydraAdapter.TENSORS], dy
    )
    expected_dA, expected_dB, _ = gradients(
        plain(Tensor(x)), [getattr(one, n) for n in HydraAdapter.TENSORS], dy
    )
    top = np.abs(expected_dA).max() + np.abs(expected_dB).max()
    assert np.abs(dA - expected_dA).max() <= 1e-13 * top
    assert np.abs(dB.reshape(6, k, 2).sum(axis=1) - expected_dB).max() <= 1e-13 * top
    assert np.abs(dR).max() <= 1e-12 * top * np.abs(x).max()


def test_the_start_is_the_base_and_only_the_experts_move_at_first() -> None:
    made = model(init_lora_weights=True)
    assert np.array_equal(made(IDS).data, CausalLM(SHAPE, seed=1, dtype="float64")(IDS).data)
    named = {n: p for n, p in made.named_parameters() if p.requires_grad}
    found = gradients(made(IDS).sum(), list(named.values()), np.ones(()))
    assert all(bool(g.any()) == ("lora_B" in n) for n, g in zip(named, found, strict=True))


def test_experts_part_as_they_train() -> None:
    """All start at zero, alike; the router, which does not, sends each another share of every gradient."""
    made = model(init_lora_weights=True).train()
    params = [p for p in made.parameters() if p.requires_grad]
    optimizer, batch, losses = AdamW(params, lr=0.02), Batch(IDS[:, :-1], IDS[:, 1:]), []
    for step in range(30):
        with ShardedStep(made, 1, shard=2) as sharded:
            loss, grads = sharded.gradients(batch, params, step=step)
        optimizer.step(grads)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    B = made.model.model.layers[0].self_attn.q_proj.adapters["default"].lora_B.data.reshape(8, 3, 2)
    assert np.abs(B[:, 0] - B[:, 1]).max() > 0.01 * np.abs(B).max()


# ---- the configuration ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "experts must be an integer of at least 1"),
        ({"experts": 2.0}, "experts"),
        ({"experts": True}, "experts"),
        ({"experts": 2**10}, "experts"),
        ({"use_dora": True}, "use_dora must be False"),
        ({"r": 0}, "r must be"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        hydra(**changes)


def test_trainable_numbers_are_counted() -> None:
    I, O, r, k = 5, 6, 2, 4
    adapter = layer(k).adapters["x"]
    assert {n: getattr(adapter, n).shape for n in adapter.TENSORS} == HydraAdapter.shapes(
        layer(k).base_layer, r, k
    )
    assert sum(p.size for p in adapter.parameters()) == r * I + k * (r * O + I)


def test_dropout_spares_the_router() -> None:
    made = layer(3, lora_dropout=0.5).train()
    adapter, seen = made.adapters["x"], []
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 5)))
    weights, real = adapter.weights(x).data, adapter.weights
    adapter.weights = lambda z: seen.append(real(z).data) or real(z)  # type: ignore[method-assign]
    made(x)
    assert np.array_equal(seen[0], weights)


# ---- there is no dW ----


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name_and_nothing_changes(action: str) -> None:
    made = model()
    before = made(IDS).data
    with pytest.raises(ConfigError, match="HydraLoRA cannot be merged"):
        getattr(made, action)()
    assert np.array_equal(made(IDS).data, before)
    assert not any(m.merged for _, m in made.named_modules() if isinstance(m, LoraLinear))


def test_a_step_never_forms_a_weight_that_there_is_not() -> None:
    """Nor where a plain adapter runs beside it."""
    made = model()
    made.prepare_step(1 << 20)
    formed = [m for _, m in made.named_modules() if any(getattr(m, "_effective", {}).values())]
    assert not formed
    assert "W, then A and B" in made.explain(1 << 20)
    assert ": W + dW " not in made.explain(1 << 20)
    made.end_step()
    made.add_adapter("plain", LoraConfig(**OPTIONS))
    made.set_adapter(["default", "plain"])
    y = made(IDS).data
    made.prepare_step()
    assert np.array_equal(made(IDS).data, y)


def test_generation_and_its_cache_go_the_ordinary_way() -> None:
    made = model().eval()
    tokens = generate(made, IDS[:, :3], 4, temperature=0)
    expected = IDS[:, :3]
    for _ in range(4):
        expected = np.concatenate(
            [expected, made(expected).data[:, -1].argmax(-1)[:, None]], axis=1
        )
    assert np.array_equal(tokens, expected)


def test_the_bits_do_not_depend_on_threads() -> None:
    made = model(dtype="float32", lora_dropout=0.2).train()
    params, results = [p for p in made.parameters() if p.requires_grad], []
    for threads in (1, 2, 3):
        with ShardedStep(made, threads, shard=1) as sharded:
            loss, found = sharded.gradients(Batch(IDS[:, :-1], IDS[:, 1:]), params, 3, 4)
        results.append([float(loss), *(g.tobytes() for g in found)])
    assert results[0] == results[1] == results[2]


def test_another_device_has_the_same_bits_and_waits_for_nothing() -> None:
    results = []
    for where in ("cpu", STRICT):
        made = model(where, "float32").train()
        params = [p for p in made.parameters() if p.requires_grad]
        with ShardedStep(made, 1, shard=4) as sharded, no_sync():
            loss, found = sharded.gradients(Batch(IDS[:, :-1], IDS[:, 1:]), params)
        results.append(
            [
                float(loss),
                *(p.backend.to_numpy(g).tobytes() for p, g in zip(params, found, strict=True)),
            ]
        )
    assert results[0] == results[1]


# ---- files ----


def test_files_go_there_and_come_back(tmp_path: Path) -> None:
    made = model(
        dtype="float32", experts=4, rank_pattern={"q_proj": 3}, modules_to_save=["lm_head"]
    )
    made.save_pretrained(tmp_path)
    raw, tensors = read_adapter(tmp_path)
    assert (raw["peft_type"], raw["experts"]) == ("HYDRALORA", 4)
    assert type(read_config(raw, "here")) is HydraConfig
    first = "base_model.model.model.layers.0.self_attn."
    assert tensors[first + "q_proj.lora_B.weight"].shape == (8, 12)
    assert tensors[first + "v_proj.lora_route.weight"].shape == (4, 8)
    again = PeftModel.from_pretrained(CausalLM(SHAPE, seed=1), tmp_path)
    assert np.array_equal(again(IDS).data, made(IDS).data)
    again.save_pretrained(tmp_path / "twice")
    files = [p / "adapter_model.safetensors" for p in (tmp_path, tmp_path / "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("field", "value"), [("experts", 3), ("peft_type", "LORA")])
def test_a_file_that_does_not_fit_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    model(dtype="float32", experts=2).save_pretrained(tmp_path)
    where = tmp_path / "adapter_config.json"
    config = json.loads(where.read_text()) | {field: value}
    where.write_text(
        json.dumps({k: v for k, v in config.items() if k != "experts" or field == "experts"})
    )
    with pytest.raises(FormatError, match="does not fit this base"):
        PeftModel.from_pretrained(CausalLM(SHAPE, seed=1), tmp_path)


def test_inspect_shows_an_even_mixture_and_verify_says_there_is_no_dW(tmp_path: Path) -> None:
    made = model(dtype="float32")
    made.save_pretrained(tmp_path / "adapter")
    CausalLM(SHAPE, seed=1).save_pretrained(tmp_path / "base")
    report = inspect_adapter(tmp_path / "adapter")
    adapter = made.model.model.layers[0].self_attn.q_proj.adapters["default"]
    B = adapter.lora_B.data.reshape(8, 3, 2).mean(axis=1)
    even = adapter.scaling * B @ adapter.lora_A.data
    row = next(
        row for row in report["tensors"] if row["layer"] == "model.layers.0.self_attn.q_proj"
    )
    assert float(row["|dW|"]) == pytest.approx(np.linalg.norm(even), rel=1e-3)
    with pytest.raises(ConfigError, match="HydraLoRA cannot be merged"):
        verify_files(tmp_path / "base", tmp_path / "adapter")
