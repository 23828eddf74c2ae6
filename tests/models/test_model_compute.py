"""A model whose products with frozen weights are rounded: what is set where, loss and text."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from minilora import generate
from minilora.autograd import no_grad
from minilora.backend import get_backend
from minilora.errors import ConfigError
from minilora.models.decoding import Weights
from minilora.models.transformer import CausalLM
from minilora.nn import Linear, LinearBase
from minilora.precision import MANTISSA
from minilora.quant import dequantize, quantize
from minilora.quant.half import HalfLinear, convert_to_half, encode_half, half_weight_owners
from minilora.threads import Workers

ROUNDED = [name for name in MANTISSA if name != "float32"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ANY_ARITHMETIC = pytest.mark.parametrize("compute", ROUNDED)
ANY_DEVICE = pytest.mark.parametrize("device", DEVICES)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3, tied": {"model_type": "qwen3", "attention_bias": False, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "rope_parameters": {}, "num_key_value_heads": 2},
}
ANY_MODEL = pytest.mark.parametrize("name", MODELS)


def base(name: str = "llama", device: str = "cpu", dtype: str = "float32") -> CausalLM:
    changes = {"attention_bias": False, **MODELS[name]}
    return small.base(dtype, get_backend(device), **changes).eval()


def with_bfloat16_values(model: CausalLM) -> CausalLM:
    for module in half_weight_owners(model).values():
        module.weight.data = encode_half(module.weight.data, "bfloat16").decode("float32")
    return model


def linear_layers(model: Any) -> dict[str, LinearBase]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LinearBase)}


def computes(model: Any) -> set[str]:
    return {layer.compute for layer in linear_layers(model).values()}


# ---- setting it ----------------------------------------------------------------------------------


@ANY_MODEL
def test_set_compute_changes_the_logits_and_back(name: str) -> None:
    model = base(name)
    before = small.logits(model)
    found = {}
    for compute in ROUNDED:
        model.set_compute(compute)
        assert computes(model) == {compute}
        found[compute] = small.logits(model)
        far = abs(found[compute] - before).max() / abs(before).max()
        assert 2.0 ** -(MANTISSA[compute] + 5) < far < 2.0 ** -(MANTISSA[compute] - 5)
    model.set_compute("float32")
    assert small.logits(model).tobytes() == before.tobytes()


@pytest.mark.parametrize("compute", ["fp16", "TF32", None])
def test_set_compute_refuses_another_name(compute: Any) -> None:
    model = base()
    with pytest.raises(ConfigError, match="compute must be one of float32, tf32, bfloat16, got"):
        model.set_compute(compute)
    assert computes(model) == {"float32"}


@ANY_ARITHMETIC
def test_set_compute_refuses_float64_and_to_does(compute: str) -> None:
    model = base(dtype="float64")
    model.set_compute("float32")
    with pytest.raises(ConfigError, match=f"compute='{compute}' with float64: .* in float32"):
        model.set_compute(compute)
    assert computes(model) == {"float32"}
    model = base()
    model.set_compute(compute)
    with pytest.raises(ConfigError, match=f"compute='{compute}' with float64"):
        model.to(dtype="float64")
    assert {p.dtype for p in model.parameters()} == {np.dtype("float32")}
    model.to("cpu", "float32").set_compute("float32")
    assert model.to(dtype="float64").lm_head.dtype == np.float64


@ANY_ARITHMETIC
def test_from_pretrained_sets_compute(compute: str, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    model = CausalLM.from_pretrained(tmp_path, compute=compute)
    expected = CausalLM.from_pretrained(tmp_path)
    assert computes(model) == {compute}
    assert computes(expected) == {"float32"}
    expected.set_compute(compute)
    assert small.logits(model).tobytes() == small.logits(expected).tobytes()


def test_from_pretrained_refuses_a_wrong_compute_before_it_reads(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match=r"compute must be one of .*, got 'fp16'"):
        CausalLM.from_pretrained(missing, compute="fp16")
    with pytest.raises(ConfigError, match="compute='tf32' with float64"):
        CausalLM.from_pretrained(missing, "float64", compute="tf32")


@ANY_ARITHMETIC
def test_layers_that_take_another_s_place_keep_its_compute(compute: str) -> None:
    model = with_bfloat16_values(base())
    model.set_compute(compute)
    before = small.logits(model)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert small.logits(same).tobytes() == before.tobytes()
    half = convert_to_half(copy.deepcopy(model))
    assert {type(layer) for layer in linear_layers(half).values()} == {HalfLinear}
    assert computes(half) == {compute}
    assert small.logits(half).tobytes() == before.tobytes()
    coded = quantize(copy.deepcopy(model), "nf4", block_size=32)
    assert computes(coded) == {compute}
    expected = small.logits(coded)
    assert small.logits(dequantize(coded)).tobytes() == expected.tobytes()
    layer = linear_layers(model)["lm_head"]
    assert layer.rebuilt(layer.dense_weight()).compute == compute


# ---- computing -----------------------------------------------------------------------------------


def softmax_loss(logits: np.ndarray) -> float:
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    return float(-np.log(np.take_along_axis(p, small.IDS[..., None], axis=-1)).sum())


@ANY_DEVICE
@ANY_ARITHMETIC
@ANY_MODEL
@pytest.mark.parametrize("stored", [False, True])
def test_causal_lm_has_one_loss_by_its_logits_and_without_them(
    name: str, compute: str, stored: bool, device: str
) -> None:
    model = with_bfloat16_values(base(name, device))
    if stored:
        convert_to_half(model)
    model.set_compute(compute)
    loss = model(small.IDS, targets=small.IDS).item()
    assert loss == pytest.approx(softmax_loss(small.logits(model)), rel=1e-6)


@ANY_DEVICE
@ANY_ARITHMETIC
def test_a_step_s_preparation_leaves_the_bits(compute: str, device: str) -> None:
    """No weight of several layers is formed: their products are those of each layer alone."""
    model = base(device=device)
    model.set_compute(compute)
    before = small.logits(model)
    model.prepare_step(1 << 20)
    assert not any(getattr(module, "_effective", {}) for _, module in model.named_modules())
    assert small.logits(model).tobytes() == before.tobytes()
    model.end_step()


@ANY_DEVICE
@ANY_ARITHMETIC
@ANY_MODEL
def test_generate_takes_the_likeliest_tokens_of_the_rounded_model(
    name: str, compute: str, device: str
) -> None:
    model = base(name, device)
    model.set_compute(compute)
    with Workers(0) as workers:
        assert Weights.of(model, workers) is None
    text = generate(model, small.IDS[:, :3], 6, temperature=0)
    for end in range(3, 9):
        with no_grad():
            logits = model(text[:, :end]).numpy()[:, -1]
        top = np.sort(logits, axis=-1)[:, -2:]
        chosen = np.take_along_axis(logits, text[:, end, None], axis=-1)[:, 0]
        assert (chosen >= top[:, 1] - 1e-2 * (top[:, 1] - top[:, 0] + 1e-3)).all()


def test_linear_by_float32_is_as_before() -> None:
    layer = Linear(np.ones((2, 2), np.float32))
    assert layer.compute == "float32"
    assert "compute" not in vars(layer)
