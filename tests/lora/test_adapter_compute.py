"""Adapters over a base whose products are rounded: what belongs to an adapter stays in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from methods import METHODS

from minilora import LoraConfig, PeftModel, get_multitask_model, get_peft_model, gradients
from minilora.autograd import Tensor
from minilora.backend import NUMPY, get_backend
from minilora.errors import ConfigError
from minilora.lora import LoraLinear, MultiTask
from minilora.nn import Linear, LinearBase, Parameter
from minilora.precision import MANTISSA, round_operand
from minilora.quant import quantize
from minilora.quant.half import convert_to_half, encode_half, half_weight_owners

ROUNDED = [name for name in MANTISSA if name != "float32"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ANY_ARITHMETIC = pytest.mark.parametrize("compute", ROUNDED)
ANY_DEVICE = pytest.mark.parametrize("device", DEVICES)
ANY_METHOD = pytest.mark.parametrize("method", METHODS)
MANY = 1 << 20  # positions, for which W + dW would be formed in float32


def dense(device: str = "cpu") -> Any:
    model = small.base("float32", get_backend(device))
    for module in half_weight_owners(model).values():
        module.weight.data = encode_half(module.weight.data, "bfloat16").decode("float32")
    return model


BASES: dict[str, Callable[[Any], Any]] = {
    "dense": lambda model: model,
    "bfloat16": convert_to_half,
    "nf4": quantize,
}


def adapted(method: str, base: Any, **fields: Any) -> PeftModel:
    config = METHODS[method].config(target_modules="all-linear", **fields)
    return get_peft_model(base, config, seed=2)


def host(array: Any) -> np.ndarray:
    return Tensor(array).numpy()


def representable(shape: tuple[int, ...], compute: str, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return round_operand(NUMPY, x, compute)  # type: ignore[no-any-return]


# ---- the start -----------------------------------------------------------------------------------


@ANY_DEVICE
@ANY_ARITHMETIC
@ANY_METHOD
@pytest.mark.parametrize("kind", BASES)
def test_get_peft_model_starts_with_the_bits_of_its_base(
    kind: str, method: str, compute: str, device: str
) -> None:
    base = BASES[kind](dense(device))
    base.set_compute(compute)
    before = small.logits(base)
    model = adapted(method, base)
    assert small.logits(model).tobytes() == before.tobytes()
    model.prepare_step(MANY)
    assert small.logits(model).tobytes() == before.tobytes()
    model.end_step()
    model.train()
    assert small.logits(model).tobytes() == before.tobytes()


@ANY_ARITHMETIC
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_of_embedding_and_head_start_with_the_bits_of_their_base(
    use_dora: bool, tied: bool, compute: str
) -> None:
    base = small.base(tie_word_embeddings=tied)
    base.set_compute(compute)
    before = small.logits(base)
    names = ["embed_tokens", "lm_head", "q_proj"]
    together = tied and not use_dora
    config = LoraConfig(r=2, target_modules=names, use_dora=use_dora, ensure_weight_tying=together)
    model = get_peft_model(base, config, seed=2)
    assert small.logits(model).tobytes() == before.tobytes()
    params = [p for p in model.parameters() if p.requires_grad]
    grads = gradients(model(small.IDS, targets=small.IDS), params)
    assert all(np.isfinite(grad).all() for grad in grads)


@ANY_ARITHMETIC
@ANY_METHOD
def test_set_compute_after_or_before_the_adapter_is_the_same(method: str, compute: str) -> None:
    base = dense()
    base.set_compute(compute)
    before = adapted(method, base, init_lora_weights=False)
    after = adapted(method, dense(), init_lora_weights=False)
    after.set_compute(compute)
    assert small.logits(after).tobytes() == small.logits(before).tobytes()


# ---- what stays in float32 -----------------------------------------------------------------------


@ANY_DEVICE
@ANY_ARITHMETIC
@ANY_METHOD
def test_adapters_have_float32_s_gradients_where_the_base_rounds_nothing(
    method: str, compute: str, device: str
) -> None:
    """x and W have few bits; A, B and dY have all of them."""
    backend = get_backend(device)
    X = representable((2, 5, 20), compute, 0)
    W = representable((9, 20), compute, 1)
    dY = np.random.default_rng(2).standard_normal((2, 5, 9)).astype(np.float32)
    found = []
    for arithmetic in ("float32", compute):
        layer = LoraLinear(Linear(backend.from_numpy(W)))
        layer.base_layer.weight.requires_grad = False
        config = METHODS[method].config(init_lora_weights=False)
        kind = type(next(iter(adapter_of(method).values())))
        adapter = kind(layer.base_layer, "layer", config, np.random.default_rng(3))
        layer.adapters["default"] = adapter
        layer.active = ("default",)
        layer.set_compute(arithmetic)
        x = Tensor(backend.from_numpy(X), True)
        y = layer(x)
        params = list(adapter.parameters())
        loss = (y * Tensor(backend.from_numpy(dY))).sum()
        found.append([y.numpy(), *map(host, gradients(loss, params))])
    scale = [max(abs(a).max(), 1.0) for a in found[0]]
    for mine, reference, size in zip(found[1], found[0], scale, strict=True):
        bound = 0.0 if device == "cpu" else 64 * 2.0**-24 * size
        assert abs(mine - reference).max() <= bound


def adapter_of(method: str) -> dict[str, Any]:
    model = adapted(method, dense())
    return model.model.model.layers[0].mlp.up_proj.adapters  # type: ignore[no-any-return]


@ANY_DEVICE
@ANY_ARITHMETIC
def test_lora_adds_an_update_that_rounding_w_plus_dw_would_lose(compute: str, device: str) -> None:
    backend = get_backend(device)
    I, O = 8, 4
    layer = LoraLinear(Linear(backend.from_numpy(np.ones((O, I), np.float32))))
    config = LoraConfig(r=1, lora_alpha=1)
    kind = type(adapter_of("lora")["default"])
    adapter = kind(layer.base_layer, "layer", config, np.random.default_rng(0))
    layer.adapters["default"] = adapter
    layer.active = ("default",)
    adapter.lora_A.data = backend.from_numpy(np.full((1, I), 1.0, np.float32))
    adapter.lora_B.data = backend.from_numpy(np.full((O, 1), 2.0**-16, np.float32))
    layer.set_compute(compute)
    x = Tensor(backend.from_numpy(np.eye(I, dtype=np.float32)))
    for prepare in (False, True):
        if prepare:
            layer.prepare_step(MANY)
        assert (layer(x).numpy() == 1 + 2.0**-16).all()
    layer.merge()  # asked for: now W + dW is what is rounded
    if device == "cpu":
        assert (layer(x).numpy() == 1).all()
    layer.unmerge()
    assert (layer(x).numpy() == 1 + 2.0**-16).all()


@ANY_ARITHMETIC
def test_explain_says_that_a_and_b_run_by_themselves(compute: str) -> None:
    model = adapted("lora", dense())
    assert ": W + dW " in model.explain(MANY)
    model.set_compute(compute)
    assert ": W + dW " not in model.explain(MANY)
    assert "W, then A and B" in model.explain(MANY)


# ---- modules that train whole --------------------------------------------------------------------


@ANY_ARITHMETIC
def test_modules_to_save_and_token_rows_stay_in_float32(compute: str) -> None:
    base = dense()
    base.set_compute(compute)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "layers.0.mlp"])
    model = get_peft_model(base, config)
    model.set_compute(compute)
    by_path = {
        path: layer.compute
        for path, layer in model.named_modules()
        if isinstance(layer, LinearBase)
    }
    copies = {path: name for path, name in by_path.items() if "modules_to_save" in path}
    assert set(copies.values()) == {"float32"}
    assert len(copies) == 4
    assert {name for path, name in by_path.items() if path not in copies} == {compute}
    merged = model.merge_and_unload()
    assert merged.lm_head.compute == "float32"
    assert merged.model.layers[0].mlp.up_proj.compute == "float32"
    assert merged.model.layers[0].self_attn.q_proj.compute == compute


@ANY_DEVICE
@ANY_ARITHMETIC
def test_trainable_tokens_of_a_tied_head_train_over_a_rounded_base(
    compute: str, device: str
) -> None:
    model = small.base("float32", get_backend(device), tie_word_embeddings=True)
    model.set_compute(compute)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 4])
    model = get_peft_model(model, config)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = gradients(model(small.IDS, targets=small.IDS), params)
    assert all(np.isfinite(host(g)).all() for g in grads)


# ---- merging, switching, moving ------------------------------------------------------------------


@ANY_ARITHMETIC
@ANY_METHOD
def test_merge_unmerge_and_disable_do_not_depend_on_compute(method: str, compute: str) -> None:
    if not METHODS[method].merges:
        pytest.skip("has no dW")
    base = dense()
    base.set_compute(compute)
    of_base = small.logits(base)
    model = adapted(method, base, init_lora_weights=False)
    plain = adapted(method, dense(), init_lora_weights=False)
    before = small.logits(model)
    bits = small.bits(model)
    with model.disable_adapter():
        assert small.logits(model).tobytes() == of_base.tobytes()
    for one in (model, plain):
        one.merge_adapter()
    assert small.bits(model) == small.bits(plain)
    near = abs(small.logits(model) - before).max() / abs(before).max()
    assert near < 2.0 ** -(MANTISSA[compute] - 5)
    with model.disable_adapter():
        assert small.logits(model).tobytes() == of_base.tobytes()
    model.unmerge_adapter()
    assert small.bits(model) == bits
    assert small.logits(model).tobytes() == before.tobytes()
    assert model.unload() is base
    assert small.logits(base).tobytes() == of_base.tobytes()


@ANY_ARITHMETIC
def test_set_compute_while_merged_holds_after_unmerge(compute: str) -> None:
    model = adapted("lora", dense(), init_lora_weights=False)
    model.merge_adapter()
    model.set_compute(compute)
    merged = {m.compute for _, m in model.named_modules() if isinstance(m, LinearBase)}
    assert merged == {compute}
    model.unmerge_adapter()
    expected = adapted("lora", dense(), init_lora_weights=False)
    expected.set_compute(compute)
    assert small.logits(model).tobytes() == small.logits(expected).tobytes()


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_merge_over_stored_weights_keeps_compute(kind: str) -> None:
    base = BASES[kind](dense())
    base.set_compute("tf32")
    model = adapted("lora", base, init_lora_weights=False)
    model.merge_adapter(requantize=kind == "nf4")
    layers = [m for _, m in model.named_modules() if isinstance(m, LinearBase)]
    assert {layer.compute for layer in layers} == {"tf32"}


@ANY_ARITHMETIC
def test_peft_model_refuses_float64_over_a_rounded_base(compute: str) -> None:
    model = adapted("lora", dense())
    model.set_compute(compute)
    with pytest.raises(ConfigError, match=f"compute='{compute}' with float64"):
        model.to(dtype="float64")
    assert {p.dtype for p in model.parameters()} == {np.dtype("float32")}


@ANY_ARITHMETIC
def test_peft_model_from_pretrained_keeps_the_base_s_compute(compute: str, tmp_path: Path) -> None:
    model = adapted("lora", dense(), init_lora_weights=False)
    model.save_pretrained(tmp_path)
    model.set_compute(compute)
    base = dense()
    base.set_compute(compute)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert small.logits(loaded).tobytes() == small.logits(model).tobytes()


@ANY_ARITHMETIC
def test_multitask_runs_each_task_over_the_rounded_base(compute: str) -> None:
    base = dense()
    base.set_compute(compute)
    of_base = small.logits(base)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model: MultiTask = get_multitask_model(base, {"a": config, "b": config}, seed=1)
    assert model(small.IDS, tasks="__base__").numpy().tobytes() == of_base.tobytes()
    rows = [model(small.IDS, tasks=task).numpy() for task in ("a", "b")]
    both = model(small.IDS, tasks=["a", "b"]).numpy()
    np.testing.assert_allclose(both[0], rows[0][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both[1], rows[1][1], rtol=1e-5, atol=1e-5)
    twin = model.merge_task("a")
    assert {m.compute for _, m in twin.named_modules() if isinstance(m, LinearBase)} == {compute}


@ANY_ARITHMETIC
def test_get_peft_model_has_gradients_near_float32_s(compute: str) -> None:
    """One step's gradients differ by the base's rounding alone: a few times its unit."""
    found = []
    for arithmetic in ("float32", compute):
        model = adapted("lora", dense(), init_lora_weights=False)
        model.set_compute(arithmetic)
        params: list[Parameter] = [p for p in model.parameters() if p.requires_grad]
        found.append(gradients(model(small.IDS, targets=small.IDS), params))
    difference = np.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(*found, strict=True)))
    size = np.sqrt(sum(float((a**2).sum()) for a in found[0]))
    assert 2.0 ** -(MANTISSA[compute] + 5) < difference / size < 2.0 ** -(MANTISSA[compute] - 5)
