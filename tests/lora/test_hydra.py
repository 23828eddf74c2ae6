"""HydraLoRA: the mixture and its gradient, what equals LoRA, and its files.

Shapes: W (O, I), A (r, I), B (O, k r), R (k, I), w (..., k). u is the unit roundoff. What holds of
every method, and that HydraLoRA refuses to merge, is in test_method_table.py.
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
from minilora.models.transformer import CausalLM
from minilora.nn import Linear
from minilora.optim import AdamW
from minilora.tools.inspecting import inspect_adapter
from minilora.training.parallel import ShardedStep
from minilora.verify import verify_files

IDS = np.random.default_rng(0).integers(0, 13, (4, 7))
BATCH = Batch(IDS[:, :-1], IDS[:, 1:])
OPTIONS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": "all-linear",
    "init_lora_weights": False,
}


def hydra(**changes: Any) -> HydraConfig:
    return HydraConfig(**OPTIONS | changes)


def model(dtype: str = "float64", config: LoraConfig | None = None, **changes: Any) -> PeftModel:
    base = CausalLM(SHAPE, seed=1, dtype=dtype)
    return get_peft_model(base, config or hydra(**changes), seed=2)


def layer(experts: int, seed: int = 0, **changes: Any) -> LoraLinear:
    """A frozen base of 5 inputs and 6 outputs with one active adapter."""
    rng = np.random.default_rng(seed)
    made = LoraLinear(Linear(rng.standard_normal((6, 5))))
    made.base_layer.weight.requires_grad = False
    config = hydra(experts=experts, **changes)
    made.adapters["x"] = HydraAdapter(made.base_layer, "x", config, rng, 3)
    made.active = ["x"]
    return made


def tensors(made: LoraLinear) -> list[Any]:
    return [getattr(made.adapters["x"], name) for name in HydraAdapter.TENSORS]


# ---- the operation ----


def definition(x: Tensor, y: Tensor, w: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The sum, expert by expert."""
    r = A.shape[0]
    for i in range(w.shape[-1]):
        expert = B[:, i * r : (i + 1) * r]
        y = y + w[..., i : i + 1] * (x @ A.T @ expert.T) * s
    return y


SIZES = st.integers(1, 5)
BATCHES = st.sampled_from([(), (3,), (2, 3)])


@given(SIZES, SIZES, SIZES, SIZES, BATCHES, st.integers(0, 99))
def test_mixture_is_the_sum_over_experts_forward_and_backward(
    I: int, O: int, r: int, k: int, rows: tuple[int, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(*rows, I), (*rows, O), (*rows, k), (r, I), (O, k * r)]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    results = []
    for operation in (mixture, definition):
        leaves = [Tensor(array.copy(), requires_grad=True) for array in arrays]
        y = operation(*leaves, 0.7)
        results.append([y.data, *gradients(y, leaves, np.ones(y.shape))])
    top = max(np.abs(array).max() for array in results[1])
    for one, expected in zip(*results, strict=True):
        assert one.shape == expected.shape
        assert np.abs(one - expected).max() <= 1e-13 * top
    check_gradient(lambda *leaves: mixture(*leaves, 0.7), *arrays)


@pytest.mark.parametrize("trained", range(5))
def test_mixture_computes_only_the_gradients_that_are_needed(trained: int) -> None:
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (3, 5), (3, 2), (2, 4), (5, 4)]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    everything = [Tensor(array, requires_grad=True) for array in arrays]
    one = [Tensor(array, requires_grad=i == trained) for i, array in enumerate(arrays)]
    dy = rng.standard_normal((3, 5))
    node = mixture(*one, 0.7).node
    assert node is not None
    direct = node.vjp(dy)
    for i in (0, 3, 4):  # x, A, B
        assert (direct[i] is not None) == (i == trained)
    expected = gradients(mixture(*everything, 0.7), everything, dy)
    grads = gradients(mixture(*one, 0.7), one, dy)
    for i, g in enumerate(grads):
        assert (g is not None) == (i == trained)
    assert np.array_equal(grads[trained], expected[trained])


def test_hydra_adapter_is_equation_6() -> None:
    made = layer(3)
    A, B, R = (p.data for p in tensors(made))
    W = made.base_layer.weight.data
    x = np.random.default_rng(1).standard_normal((2, 3, 5))
    outputs = made(Tensor(x)).data.reshape(-1, 6)
    for row, y in zip(x.reshape(-1, 5), outputs, strict=True):
        e = np.exp(R @ row)
        w = e / e.sum()
        experts = [B[:, 2 * i : 2 * i + 2] for i in range(3)]
        mixed = sum(w[i] * expert @ (A @ row) for i, expert in enumerate(experts))
        expected = W @ row + 3 / 2 * mixed
        assert np.abs(y - expected).max() <= 1e-14 * np.abs(expected).max() * 10


# ---- what equals LoRA ----


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hydra_adapter_of_one_expert_is_lora_bit_for_bit(init: Any, dropout: float) -> None:
    options = OPTIONS | {"init_lora_weights": init, "lora_dropout": dropout}
    results = []
    for config in (HydraConfig(**options, experts=1), LoraConfig(**options)):
        made = model(config=config).train()
        named = dict(made.named_parameters())
        params = [p for name, p in named.items() if p.requires_grad and "route" not in name]
        loss = F.cross_entropy(made(IDS)[:, :-1], IDS[:, 1:])
        grads = [g.tobytes() for g in gradients(loss, params)]
        results.append([loss.data.tobytes(), *grads])
    assert results[0] == results[1]


@given(st.integers(2, 5), st.integers(0, 99))
def test_hydra_adapter_of_equal_experts_shares_loras_gradient(k: int, seed: int) -> None:
    """And the router does not move."""
    made = layer(k, seed)
    plain = layer(1, seed)
    A, B, _ = tensors(plain)
    A_k, B_k, _ = tensors(made)
    A_k.data = A.data
    B_k.data = np.tile(B.data, (1, k))
    x = np.random.default_rng(seed).standard_normal((4, 5))
    dy = np.random.default_rng(seed + 1).standard_normal((4, 6))
    dA, dB, dR = gradients(made(Tensor(x)), tensors(made), dy)
    expected_dA, expected_dB, _ = gradients(plain(Tensor(x)), tensors(plain), dy)
    top = np.abs(expected_dA).max() + np.abs(expected_dB).max()
    assert np.abs(dA - expected_dA).max() <= 1e-13 * top
    assert np.abs(dB.reshape(6, k, 2).sum(axis=1) - expected_dB).max() <= 1e-13 * top
    assert np.abs(dR).max() <= 1e-12 * top * np.abs(x).max()


def test_hydra_experts_diverge_as_they_train() -> None:
    """All start at zero; the random router sends each a different share of every gradient."""
    made = model(init_lora_weights=True).train()
    params = [p for p in made.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr=0.02)
    losses = []
    for step in range(30):
        with ShardedStep(made, 1, shard=2) as sharded:
            loss, grads = sharded.gradients(BATCH, params, step=step)
        optimizer.step(grads)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    adapter = made.model.model.layers[0].self_attn.q_proj.adapters["default"]
    B = adapter.lora_B.data.reshape(8, 3, 2)
    assert np.abs(B[:, 0] - B[:, 1]).max() > 0.01 * np.abs(B).max()


# ---- the configuration ----


def test_hydra_config_refuses_values_without_a_meaning() -> None:
    for experts in (0, -1, 2.0, True, None, "3", 2**10):
        with pytest.raises(ConfigError, match="experts must be an integer of at least 1 and below"):
            hydra(experts=experts)
    assert hydra(experts=2**10 - 1).experts == 1023
    with pytest.raises(ConfigError, match="use_dora must be False"):
        hydra(use_dora=True)
    with pytest.raises(ConfigError, match="r must be"):
        hydra(r=0)


def test_hydra_shapes_are_those_of_the_tensors() -> None:
    I, O, r, k = 5, 6, 2, 4
    made = layer(k)
    shapes = HydraAdapter.shapes(made.base_layer, r, k)
    assert [p.shape for p in tensors(made)] == [shapes[name] for name in HydraAdapter.TENSORS]
    count = sum(p.size for p in made.adapters["x"].parameters())
    assert count == r * I + k * (r * O + I)


def test_hydra_dropout_spares_the_router() -> None:
    made = layer(3, lora_dropout=0.5).train()
    adapter = made.adapters["x"]
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 5)))
    expected = adapter.weights(x).data
    real = adapter.weights
    seen = []

    def record(z: Tensor) -> Tensor:
        seen.append(real(z))
        return seen[-1]

    adapter.weights = record  # type: ignore[method-assign]
    made(x)
    assert np.array_equal(seen[0].data, expected)


# ---- without a dW ----


def test_prepare_step_never_forms_a_weight_for_hydra() -> None:
    """Neither where a plain adapter runs beside it."""
    made = model()
    made.prepare_step(1 << 20)
    for _, module in made.named_modules():
        assert not any(getattr(module, "_effective", {}).values())
    explained = made.explain(1 << 20)
    assert "W, then A and B" in explained
    assert ": W + dW " not in explained
    made.end_step()
    made.add_adapter("plain", LoraConfig(**OPTIONS))
    made.set_adapter(["default", "plain"])
    y = made(IDS).data
    made.prepare_step()
    assert np.array_equal(made(IDS).data, y)


# ---- files ----


def test_save_pretrained_writes_experts_and_router(tmp_path: Path) -> None:
    options = {"experts": 4, "rank_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"]}
    made = model("float32", **options)
    made.save_pretrained(tmp_path)
    raw, stored = read_adapter(tmp_path)
    assert raw["peft_type"] == "HYDRALORA"
    assert raw["experts"] == 4
    assert type(read_config(raw, "here")) is HydraConfig
    first = "base_model.model.model.layers.0.self_attn."
    assert stored[first + "q_proj.lora_B.weight"].shape == (8, 12)
    assert stored[first + "v_proj.lora_route.weight"].shape == (4, 8)
    again = PeftModel.from_pretrained(CausalLM(SHAPE, seed=1), tmp_path)
    assert np.array_equal(again(IDS).data, made(IDS).data)
    again.save_pretrained(tmp_path / "twice")
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.parametrize(("field", "value"), [("experts", 3), ("peft_type", "LORA")])
def test_from_pretrained_refuses_a_file_of_another_method_or_count(
    field: str, value: Any, tmp_path: Path
) -> None:
    model("float32", experts=2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config[field] = value
    if field == "peft_type":
        del config["experts"]
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="does not fit this base"):
        PeftModel.from_pretrained(CausalLM(SHAPE, seed=1), tmp_path)


def test_inspect_adapter_shows_an_even_mixture_and_verify_files_refuses(tmp_path: Path) -> None:
    made = model("float32")
    made.save_pretrained(tmp_path / "adapter")
    CausalLM(SHAPE, seed=1).save_pretrained(tmp_path / "base")
    adapter = made.model.model.layers[0].self_attn.q_proj.adapters["default"]
    B = adapter.lora_B.data.reshape(8, 3, 2).mean(axis=1)
    even = adapter.scaling * B @ adapter.lora_A.data
    rows = {row["layer"]: row for row in inspect_adapter(tmp_path / "adapter")["tensors"]}
    shown = float(rows["model.layers.0.self_attn.q_proj"]["|dW|"])
    assert shown == pytest.approx(np.linalg.norm(even), rel=1e-3)
    with pytest.raises(ConfigError, match="HydraLoRA cannot be merged"):
        verify_files(tmp_path / "base", tmp_path / "adapter")
