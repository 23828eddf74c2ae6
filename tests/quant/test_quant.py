"""Quantised weights: what a code may cost, for every input; a layer; a model; adapters over it.

The bounds are computed, not fitted. u = 2^-24 is float32's unit roundoff, and the nearest level of
a kind is at most half of its widest gap away, in units of the block's absmax.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from small import IDS, base
from strict_xp import STRICT, counted, no_sync

from minilora import CausalLM, LoraConfig, PeftModel, get_peft_model, quant
from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.backend import NUMPY, get_backend
from minilora.data import Batch
from minilora.errors import ConfigError, DeviceError, NonFiniteError
from minilora.gradcheck import check_gradient
from minilora.lora import AdaLoraConfig, LoraLinear
from minilora.nn import Embedding, Linear, Module
from minilora.optim import AdamW
from minilora.quant import (
    BLOCK_SIZES,
    KINDS,
    LEVELS,
    Quantized,
    QuantizedLinear,
    QuantizedWeight,
    dequantize,
    encode,
    quantization_report,
    quantize,
    quantized_linear,
)
from minilora.quant.codes import nearest_codes
from minilora.training.parallel import language_modelling_loss
from minilora.verify import PROPERTIES, Case, cases_of, measure
from minilora.verify import codes as of_codes
from minilora.verify.codes import HALF_GAP

U = 2.0**-24
SMALLEST = 2.0**-126
ANY_KIND = pytest.mark.parametrize("kind", KINDS)
WITH_OR_WITHOUT = pytest.mark.parametrize("double_quant", [False, True])


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Finite arrays of any shape: any bits at all, or values over all of float32's exponents."""
    if draw(st.booleans()):
        floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
        return draw(arrays(np.float32, array_shapes(max_dims=2, max_side=9), elements=floats))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    top = draw(st.integers(-152, 126))
    spread = draw(st.sampled_from([0, 3, 60, 300]))
    exponents = top - rng.integers(0, spread + 1, shape)
    values = rng.uniform(-2, 2, shape) * 2.0 ** np.maximum(exponents, -160)
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    largest = float(np.finfo(dtype).max)
    return np.clip(values, -largest, largest).astype(dtype)


def linear(
    outputs: int = 24, inputs: int = 20, seed: int = 1, bias: bool = True, dtype: str = "float32"
) -> Linear:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(dtype)
    if not bias:
        return Linear(weight)
    return Linear(weight, rng.standard_normal(outputs).astype(dtype))


def adapted(model: Any, **changes: Any) -> PeftModel:
    options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    options["init_lora_weights"] = False
    return get_peft_model(model, LoraConfig(**{**options, **changes}), seed=2)


def layers_of(model: Any, kind: type) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def frozen(model: Any) -> dict[str, bytes]:
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            found[name] = p.numpy().tobytes()
    return found


# ---- the levels ---------------------------------------------------------------------------------


def test_levels_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: eight positive and seven negative levels at even quantiles, and 0."""
    quantile = NormalDist().inv_cdf
    offset = 0.9677083
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*positive, 0.0, *negative]) / max(positive)
    assert np.abs(expected - LEVELS["nf4"]).max() < 2e-7


def test_levels_of_fp4_are_a_sign_an_exponent_and_a_bit() -> None:
    fp4 = LEVELS["fp4"].astype(np.float64) * 12
    powers = {1: 8, 2: 4, 3: 2}
    for code, value in enumerate(fp4[:8]):
        binade = code >> 1  # 0 has the subnormals
        half = code & 1
        exact = half / 16 if binade == 0 else powers[binade] * (1 + half / 2)
        assert abs(value - exact) <= 12 * U
    assert np.array_equal(fp4[8:], -fp4[:8])


def test_levels_of_int8_are_steps() -> None:
    steps = np.arange(-127, 128) / 127
    assert np.array_equal(LEVELS["int8"], steps.astype(np.float32))


def test_levels_of_the_dynamic_map_double_in_each_decade() -> None:
    dynamic = LEVELS["dynamic"].astype(np.float64)
    assert len(np.unique(dynamic)) == 256
    assert dynamic[-1] == 1.0
    assert dynamic[0] == pytest.approx(-0.99296875)
    assert dynamic[127] == 0.0
    below_one = dynamic[:-1]
    for i in range(7):  # 2^i values of each sign in a decade
        in_decade = (below_one > 10.0 ** (i - 7)) & (below_one < 10.0 ** (i - 6))
        assert np.count_nonzero(in_decade) == 2**i


# ---- what a code costs --------------------------------------------------------------------------

kinds = st.sampled_from(KINDS)
block_sizes = st.sampled_from(BLOCK_SIZES[:4])


@pytest.mark.parametrize("name", [p.name for p in of_codes.PROPERTIES])
@given(weights(), kinds, block_sizes, st.booleans())
def test_encode_has_the_properties_that_verify_checks_for_every_float(
    name: str, w: np.ndarray, kind: str, block_size: int, double_quant: bool
) -> None:
    """Subnormal, at the end of the range, all zero: `verify` sees weights as they are in models."""
    w = np.atleast_2d(w)
    if name == "double quantisation" and w.dtype != np.float16:
        # A rounded absmax can leave the range at its very end, which the layer refuses.
        w = np.clip(w, -(2.0**126), 2.0**126)
    layer = QuantizedLinear(encode(w, kind, block_size, double_quant), dtype=w.dtype)
    x = np.zeros((1, w.shape[1]), np.float32)
    case = Case("weights", LoraLinear(layer), x, {}, seed=w.size, w=w)
    found = next(p for p in of_codes.PROPERTIES if p.name == name).check(case)
    assert found.ok, found


@ANY_KIND
@WITH_OR_WITHOUT
def test_encode_makes_zeros_of_a_block_without_a_normal_number(
    kind: str, double_quant: bool
) -> None:
    w = np.zeros((4, 64), np.float32)
    w[1] = np.nextafter(np.float32(SMALLEST), np.float32(0))
    w[2, 3] = -np.float32(2.0**-149)
    w[3] = -SMALLEST
    assert not encode(w, kind, 64, double_quant).decode()[:3].any()
    single = encode(w, kind, 64)
    assert np.array_equal(single.absmax, np.array([0, 0, 0, SMALLEST], np.float32))
    assert np.array_equal(single.decode()[3], w[3])


@ANY_KIND
def test_encode_reaches_the_bound_of_half_a_gap(kind: str) -> None:
    levels = np.sort(LEVELS[kind].astype(np.float64))
    widest = np.diff(levels).argmax()
    w = np.full(64, (levels[widest] + levels[widest + 1]) / 2, np.float32)
    w[0] = 1
    error = np.abs(w - encode(w, kind).decode()).max()
    assert error >= HALF_GAP[kind] - U


def test_encode_has_the_published_error_of_normal_weights() -> None:
    """bitsandbytes' table: mean |w - decoded| is 0.0728 for N(0, 1) in blocks of 64.

    The tolerance is seven standard deviations of that mean.
    """
    w = np.random.default_rng(0).standard_normal(2**19).astype(np.float32)
    errors = {}
    for kind in KINDS:
        errors[kind] = np.abs(w - encode(w, kind, 64).decode()).mean()
    assert abs(errors["nf4"] - 0.072798) < 7 * 0.000074
    assert errors["int8"] < errors["nf4"] < errors["fp4"]  # QLoRA, table 2: NF4 above FP4


def test_encode_takes_the_published_bits_per_parameter() -> None:
    """QLoRA, section 3: 0.5 bits per weight for absmax, 0.127 with double quantisation."""
    w = np.ones((1024, 1024), np.float32)
    assert 8 * encode(w, "nf4", 64, False).nbytes / w.size == 4.5
    assert round(8 * encode(w, "nf4", 64, True).nbytes / w.size, 3) == 4.127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_encode_refuses_what_has_no_code(bad: float) -> None:
    w = np.ones(100)
    w[70] = bad
    with pytest.raises(NonFiniteError, match="no code"):
        encode(w)


def test_encode_refuses_an_empty_array() -> None:
    with pytest.raises(ConfigError, match=r"shape \(0, 3\)"):
        encode(np.zeros((0, 3)))


# ---- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 20), (5, 20), (20,), (0, 20)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_quantized_linear_is_the_dense_operation_bit_for_bit(
    shape: tuple[int, ...], bias: bool, dtype: str
) -> None:
    layer = QuantizedLinear.from_linear(linear(bias=bias, dtype=dtype))
    assert layer.dtype == np.dtype(dtype)
    assert (layer.out_features, layer.in_features) == (24, 20)
    x = np.random.default_rng(2).standard_normal(shape).astype(dtype)

    def run(operation: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
        t = Tensor(x, requires_grad=True)
        y = operation(t)
        leaves = [t] if layer.bias is None else [t, layer.bias]
        return [y.numpy(), *gradients(y, leaves, np.cos(y.numpy()))]

    expected = run(lambda t: F.linear(t, Tensor(layer.dense_weight()), layer.bias))
    for ours, dense in zip(run(layer), expected, strict=True):
        assert ours.dtype == np.dtype(dtype)
        assert ours.tobytes() == dense.tobytes()


@ANY_KIND
def test_quantized_linear_has_the_gradient_of_differences(kind: str) -> None:
    layer = QuantizedLinear.from_linear(linear(dtype="float64"), kind)
    check_gradient(lambda x, b: quantized_linear(x, layer.weight, b), np.ones((3, 20)), np.ones(24))


def bytes_held(item: Any, seen: set[int]) -> int:
    """The bytes of the arrays that a graph keeps alive."""
    if id(item) in seen or item is None:
        return 0
    seen.add(id(item))
    if isinstance(item, np.ndarray):
        return item.nbytes
    if isinstance(item, Quantized):
        parts = list(vars(item).values())
    elif isinstance(item, (list, tuple)):
        parts = list(item)
    else:
        cells = getattr(item, "__closure__", None) or ()
        parts = [getattr(cell, "cell_contents", None) for cell in cells]
    return sum(bytes_held(part, seen) for part in parts)


def test_quantized_linear_keeps_codes_and_never_the_dense_weight() -> None:
    layer = QuantizedLinear.from_linear(linear(256, 256))
    x = Tensor(np.ones((1, 256), np.float32), requires_grad=True)
    y = layer(x)
    assert y.node is not None
    assert bytes_held(y.node.vjp, set()) <= layer.nbytes
    dense = F.linear(x, Tensor(layer.dense_weight()), layer.bias)
    assert dense.node is not None
    # The measure sees a dense weight if the graph keeps one.
    assert bytes_held(dense.node.vjp, set()) >= 4 * 256 * 256


def test_quantized_weight_reads_as_the_dense_one_and_cannot_be_written() -> None:
    layer = QuantizedLinear.from_linear(linear())
    weight = layer.weight
    dense = weight.quantized.decode()
    assert not layer.trainable
    assert (weight.shape, weight.ndim) == ((24, 20), 2)
    assert (weight.size, len(weight)) == (480, 24)
    for read in (weight.data, weight.numpy(), layer.dense_weight(), np.array(weight)):
        assert read.tobytes() == dense.tobytes()
    assert Tensor(weight).data.tobytes() == dense.tobytes()
    before = weight.quantized.codes.copy()
    with pytest.raises(ConfigError, match="nf4 cannot be assigned to"):
        weight.data = dense
    weight.data[...] = 0  # of an array that was decoded for this one access
    with pytest.raises(ConfigError, match="nf4 cannot be trained"):
        weight.requires_grad = True
    weight.requires_grad = False
    assert not weight.requires_grad
    assert np.array_equal(weight.quantized.codes, before)
    twin = copy.deepcopy(layer)
    assert twin.weight is not weight
    assert twin.weight.data.tobytes() == dense.tobytes()
    assert twin.bias is not layer.bias


@ANY_KIND
@WITH_OR_WITHOUT
@pytest.mark.parametrize("device", ["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_encode_gives_the_same_codes_on_every_device(
    kind: str, double_quant: bool, device: str
) -> None:
    backend = STRICT if device == "strict" else get_backend(device)
    w = np.random.default_rng(6).standard_normal((300, 70)) * 10.0 ** np.arange(-35, 35)
    here = encode(NUMPY.from_numpy(w), kind, 64, double_quant)
    there = encode(backend.from_numpy(w), kind, 64, double_quant)
    host = backend.to_numpy
    assert here.codes.tobytes() == host(there.codes).tobytes()
    assert here.decode_absmax().tobytes() == host(there.decode_absmax()).tobytes()
    assert here.decode().tobytes() == host(there.decode()).tobytes()
    assert here.codes.base is None  # it does not keep a longer array alive


@ANY_KIND
@pytest.mark.parametrize("device", ["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_encode_gives_the_same_codes_for_tiny_and_huge_numbers_on_every_device(
    kind: str, device: str
) -> None:
    """A GPU's arithmetic takes a subnormal number as 0, but here each has its own code."""
    backend = STRICT if device == "strict" else get_backend(device)
    exponents = np.arange(-149, 128, dtype=np.float64)
    signs = np.array([1.0, -1.0, 0.0])[:, None]
    numbers = (signs * np.exp2(exponents)).reshape(-1)
    absmax = 1.9 * np.exp2(exponents[20:])  # of one block each, from 2^-129 on
    w = np.clip(numbers, -absmax[:, None], absmax[:, None])
    w = np.concatenate([absmax[:, None], w], axis=1).astype(np.float32)
    here = encode(w, kind, 1024)
    there = encode(backend.from_numpy(w), kind, 1024)
    assert here.codes.tobytes() == backend.to_numpy(there.codes).tobytes()
    assert here.absmax.tobytes() == backend.to_numpy(there.absmax).tobytes()


@ANY_KIND
@WITH_OR_WITHOUT
def test_quantized_linear_computes_the_same_on_a_device(kind: str, double_quant: bool) -> None:
    """Encoded there, or here and moved: the same bits. A step moves nothing, waits for nothing."""
    quant.codes._tables.cache_clear()  # the levels move with the layer, too
    here = QuantizedLinear.from_linear(linear(5, 39), kind, 64, double_quant)
    moved = QuantizedLinear.from_linear(linear(5, 39), kind, 64, double_quant).to(STRICT)
    x = np.random.default_rng(2).standard_normal((4, 39)).astype(np.float32)
    host = STRICT.to_numpy

    def step(layer: QuantizedLinear) -> list[bytes]:
        t = Tensor(layer.backend.from_numpy(x), requires_grad=True)
        with counted() as meter, no_sync():
            y = layer(t)
            found = gradients(y, [t, layer.bias], y.data)
        assert (meter.uploads, meter.downloads, meter.syncs) == ([], [], [])
        return [layer.backend.to_numpy(a).tobytes() for a in (y.data, *found)]

    assert moved.backend == STRICT
    assert moved.weight.backend == STRICT
    assert step(moved) == step(here)
    there = QuantizedLinear.from_linear(linear(5, 39).to(STRICT), kind, 64, double_quant)
    ours = here.weight.quantized
    theirs = there.weight.quantized
    assert host(theirs.codes).tobytes() == ours.codes.tobytes()
    assert host(theirs.decode_absmax()).tobytes() == ours.decode_absmax().tobytes()
    assert there.nbytes == moved.nbytes == here.nbytes
    assert there.error == here.error
    assert step(there) == step(here)
    here.bias = None
    with pytest.raises(DeviceError, match="strict"):
        here(Tensor(STRICT.from_numpy(x)))
    assert moved.to("cpu").weight.data.tobytes() == here.weight.data.tobytes()


def test_quantized_linear_to_a_dtype_keeps_the_codes() -> None:
    layer = QuantizedLinear.from_linear(linear())
    codes = layer.weight.quantized.codes.copy()
    single = layer.dense_weight()
    layer.to(dtype="float64")
    assert layer.dtype == layer.bias.dtype == np.float64
    assert np.array_equal(layer.dense_weight(), single)
    assert np.array_equal(layer.weight.quantized.codes, codes)


def test_from_linear_measures_the_error() -> None:
    dense = linear(64, 64)
    W = dense.weight.data.astype(np.float64)
    for kind in KINDS:
        layer = QuantizedLinear.from_linear(dense, kind)
        expected = np.linalg.norm(W - layer.dense_weight()) / np.linalg.norm(W)
        assert layer.error == pytest.approx(expected, rel=1e-12)
    zeros = Linear(np.zeros((2, 3), np.float32))
    assert QuantizedLinear.from_linear(zeros).error == 0
    huge = QuantizedLinear.from_linear(Linear(dense.weight.data * np.float32(2.0**125)))
    expected = QuantizedLinear.from_linear(dense).error
    assert huge.error == pytest.approx(expected, rel=1e-5)


def test_from_linear_refuses_an_absmax_that_leaves_the_dtype() -> None:
    """Double quantisation rounds absmax, here to above float16's largest number."""
    w = np.full((6, 64), 65504, np.float16)
    w[0] = 0
    with pytest.raises(NonFiniteError, match="double_quant=False"):
        QuantizedLinear.from_linear(Linear(w))
    assert QuantizedLinear.from_linear(Linear(w), double_quant=False).error is not None


# ---- a model ------------------------------------------------------------------------------------


@ANY_KIND
def test_quantize_replaces_every_linear_layer_but_those_to_skip(kind: str) -> None:
    plain = base()
    model = base()
    names = [name for name, _ in plain.named_parameters()]
    assert quantize(model, kind) is model
    assert [name for name, _ in model.named_parameters()] == names
    layers = layers_of(model, QuantizedLinear)
    assert set(layers) == set(layers_of(plain, Linear)) - {"lm_head"}
    assert type(model.lm_head) is Linear
    assert all(layer.training for layer in layers.values())
    assert not any(m.training for _, m in quantize(base().eval(), kind).named_modules())
    rows = quantization_report(model)
    assert len(rows) == 14
    bound = HALF_GAP[kind] + HALF_GAP["dynamic"] + 1e-5
    modules = dict(plain.named_modules())
    for row in rows:
        layer = layers[row.path]
        dense = modules[row.path]
        W = dense.weight.data
        assert (row.kind, row.parameters, row.nbytes) == (kind, W.size, layer.nbytes)
        assert row.bits_per_parameter == 8 * row.nbytes / row.parameters
        assert (row.error, row.lost) == (layer.error, None)
        assert layer.bias is None or np.array_equal(layer.bias.data, dense.bias.data)
        assert np.abs(layer.dense_weight() - W).max() <= bound * np.abs(W).max()


def test_quantize_takes_an_eighth_of_float32() -> None:
    model = quantize(base(hidden_size=64, intermediate_size=128))
    rows = quantization_report(model)
    count = sum(row.parameters for row in rows)
    assert sum(row.nbytes for row in rows) <= 0.131 * 4 * count


class Tied(Module):
    def __init__(self) -> None:
        self.embed = Embedding(np.ones((4, 3), np.float32))
        self.blocks = [linear(3, 3, bias=False)]
        self.lm_head = Linear(self.embed.weight.data)
        self.lm_head.weight = self.embed.weight


def with_nan() -> CausalLM:
    model = base()
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = np.nan
    return model


# Case -> (a function that makes the model, options, error, what the message says).
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {}


def refused(
    case: str,
    message: str,
    make: Callable[[], Any] = base,
    error: Any = ConfigError,
    **options: Any,
) -> None:
    REFUSED[case] = (make, options, error, message)


refused("kind", "kind must be one of nf4, fp4, int8, got 'nf3'", kind="nf3")
refused("inner kind", "kind must be one of", kind="dynamic")
refused("no kind", "kind must be one of", kind=["nf4"])
refused("block", "one of 32, 64, .*, 4096, got 48", block_size=48)
refused("small block", "got 16", block_size=16)
refused("large block", "got 8192", block_size=8192)
refused("block's type", "got 64.0", block_size=64.0)
refused("double", "double_quant must be True or False, got 1", double_quant=1)
refused("skip", "skip: 'head' matches nothing", skip=("lm_head", "head"))
refused("nothing left", "'proj' matches nothing", skip=["proj", *"qkvo"])
refused("all skipped", "no linear layer", Tied, skip=("blocks.0", "lm_head"))
refused("no model", "expected a model", lambda: "model")
refused("one layer", "QuantizedLinear.from_linear", linear, skip=())
refused("twice", "q_proj is quantised already, as nf4", lambda: quantize(base()))
refused("adapters", "q_proj has adapters", lambda: adapted(base()))
refused("under adapters", "q_proj has adapters", lambda: adapted(base()).model)
tied_base = "lm_head shares its weight with"
refused("tied", tied_base, lambda: base(tie_word_embeddings=True), skip=())
refused("tied too", "lm_head shares its weight with embed", Tied, skip="0")
refused("NaN", r"model\.layers\.1\.mlp\.up_proj: a weight is NaN", with_nan, NonFiniteError)


@pytest.mark.parametrize("case", REFUSED)
def test_quantize_refuses_before_anything_changes(case: str) -> None:
    make, options, error, message = REFUSED[case]
    model = make()

    def modules() -> list[int]:
        found = dict(model.named_modules()) if isinstance(model, Module) else {}
        return [id(module) for module in found.values()]

    before = modules()
    with pytest.raises(error, match=message):
        quantize(model, **options)
    assert modules() == before


def test_quantize_skips_names_endings_and_one_text() -> None:
    skip = ["lm_head", "model.layers.0.mlp.up_proj", "self_attn.q_proj"]
    model = quantize(base(), skip=skip)
    paths = {row.path for row in quantization_report(model)}
    assert len(paths) == 14 - 3
    assert not any(path.endswith("q_proj") for path in paths)
    assert "model.layers.0.mlp.up_proj" not in paths
    assert type(quantize(Tied(), skip="lm_head").lm_head) is Linear


def test_modules_to_save_refuse_a_quantised_layer() -> None:
    model = quantize(base(), skip=())
    with pytest.raises(ConfigError, match="lm_head is quantised"):
        adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not layers_of(model, LoraLinear)


@ANY_KIND
@WITH_OR_WITHOUT
def test_dequantize_computes_the_same_and_trains(kind: str, double_quant: bool) -> None:
    model = quantize(base(), kind, double_quant=double_quant)
    names = [name for name, _ in model.named_parameters()]
    expected = model(IDS).numpy()
    biases = [layer.bias for layer in layers_of(model, QuantizedLinear).values()]
    assert dequantize(model.eval()) is model
    assert not quantization_report(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert model(IDS).numpy().tobytes() == expected.tobytes()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for _, m in model.named_modules())
    dense = layers_of(model, Linear)
    del dense["lm_head"]
    for before, layer in zip(biases, dense.values(), strict=True):
        assert layer.bias is before


def test_dequantize_refuses_dense_models_and_adapters() -> None:
    with pytest.raises(ConfigError, match="the model has no quantised layer"):
        dequantize(base())
    over = adapted(quantize(base()))
    with pytest.raises(ConfigError, match=r"q_proj has adapters: merge_and_unload or unload first"):
        dequantize(over.model)
    assert len(quantization_report(over.model)) == 14


# ---- QLoRA: adapters over it --------------------------------------------------------------------


@ANY_KIND
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_quantize_keeps_every_property_of_adapted_layers(kind: str, method: str) -> None:
    """The weights before encoding are not known here."""
    model = quantize(base(), kind)
    rng = np.random.default_rng(0)
    if method == "adalora":
        config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules="all-linear")
        made = get_peft_model(model, config, seed=2)
    else:
        made = adapted(model, use_dora=method == "dora")
    for name, p in made.adapter_parameters("default").items():  # trained away from the start
        step = (0.1 * rng.standard_normal(p.shape)).astype(p.dtype)
        p.data = p.data + step * ("lora_A" not in name)
    cases = list(cases_of(made, seed=3))[:7]
    assert all(isinstance(case.original.base_layer, QuantizedLinear) for case in cases)
    rows = measure(cases, PROPERTIES)
    assert len(rows) > 10
    assert [row.property for row in rows if not row.ok] == []


def test_adapters_over_codes_have_the_gradients_of_adapters_over_the_decoded_model() -> None:
    codes = quantize(base("float64"))
    dense = base("float64")
    for p, q in zip(dense.parameters(), codes.parameters(), strict=True):
        p.data = q.data

    def step(model: Any) -> list[bytes]:
        made = adapted(model)
        loss = F.cross_entropy(made(IDS[:, :-1]), IDS[:, 1:])
        params = list(made.adapter_parameters("default").values())
        assert all(p.requires_grad for p in params)
        found = [loss.numpy(), *gradients(loss, params)]
        return [np.asarray(array).tobytes() for array in found]

    assert step(codes) == step(dense)


@pytest.mark.parametrize("quantised", [True, False])
def test_prepare_step_forms_no_dense_weight_of_a_quantised_layer(quantised: bool) -> None:
    """Over a dense base it does, once for all shards; codes stay codes between two products."""
    batch = Batch(IDS[:, :-1], IDS[:, 1:])
    model = adapted(quantize(base()) if quantised else base())
    loss = language_modelling_loss(model, batch).item()
    logits = model(IDS).numpy()
    model.prepare_step(1 << 20)
    formed = []
    for _, module in model.named_modules():
        formed += getattr(module, "_effective", {}).values()
    assert any(formed) != quantised
    assert model(IDS).numpy() == pytest.approx(logits, rel=1e-4, abs=1e-5)
    assert language_modelling_loss(model, batch).item() == pytest.approx(loss, rel=1e-5)
    model.end_step()


def test_language_modelling_loss_of_a_quantised_head_is_that_of_its_logits() -> None:
    model = quantize(base("float64"), skip=())
    expected = F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:], reduction="sum")
    found = language_modelling_loss(model, Batch(IDS[:, :-1], IDS[:, 1:]))
    assert found.item() == expected.item()


def test_lora_trains_over_a_quantised_base_which_stays_as_it_is() -> None:
    model = adapted(quantize(base()), r=4, init_lora_weights=True)
    before = frozen(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(isinstance(p, QuantizedWeight) for p in trained)
    optimiser = AdamW(trained, lr=0.02)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert frozen(model) == before


def test_merge_adapter_stores_the_base_as_the_last_call_says() -> None:
    model = adapted(quantize(base()))
    layer = model.model.model.layers[0].self_attn.q_proj
    for requantize, kind in (False, Linear), (True, QuantizedLinear), (False, Linear):
        model.merge_adapter(requantize=requantize)
        merged = layer.base_layer
        assert type(merged) is kind
        model.merge_adapter(requantize=requantize)
        assert layer.base_layer is merged  # nothing to do
    model.merge_adapter(requantize=True)
    model.unmerge_adapter()
    assert layer.merged == ()
    assert layer.requantized is False


@pytest.mark.parametrize(("size", "low", "high"), [(1e-5, 0.9, 1.1), (30.0, 0.05, 0.15)])
def test_rebuilt_rounds_a_small_update_away_and_keeps_most_of_a_large_one(
    size: float, low: float, high: float
) -> None:
    """Far below the levels' gap dW changes no code but the few at a threshold.

    Far above it, 9 % is noise.
    """
    layer = QuantizedLinear.from_linear(linear(64, 64), double_quant=False)
    dW = size * np.random.default_rng(4).standard_normal((64, 64))
    rebuilt = layer.rebuilt((layer.dense_weight() + dW).astype(np.float32))
    assert rebuilt.lost is not None
    assert low < rebuilt.lost < high


def test_merge_adapter_that_fails_half_way_leaves_every_layer_as_it_was() -> None:
    model = adapted(quantize(base()))
    bad = LoraConfig(r=1, target_modules=["down_proj"], init_lora_weights=False)
    model.add_adapter("bad", bad)
    model.merge_adapter(requantize=True)
    model.set_adapter(["default", "bad"])
    layers = list(layers_of(model, LoraLinear).values())
    codes = [layer.base_layer.dense_weight().tobytes() for layer in layers]
    layers[-1].adapters["bad"].lora_B.data[...] = np.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        model.merge_adapter(["default", "bad"], requantize=False)
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers)
    assert [layer.base_layer.dense_weight().tobytes() for layer in layers] == codes


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (300, 700)])
def test_nearest_codes_is_encode_and_decode_in_parts(shape, double_quant):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    whole = encode(values, "nf4", double_quant=double_quant).decode()
    parts = nearest_codes(values, double_quant)
    assert parts.dtype == np.float32
    assert np.array_equal(parts, whole)
