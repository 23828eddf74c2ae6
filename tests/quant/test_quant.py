"""Quantised weights: what a code may cost, for every input; a layer; a model; adapters over it.

The bounds are computed, not fitted. u = 2^-24 is float32's unit roundoff, and half a kind's widest gap between levels
is what its nearest level can be away, in units of the block's absmax.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from minilora.training.parallel import language_modelling_loss
from minilora.verify import PROPERTIES, Case, cases_of, measure
from minilora.verify import codes as of_codes
from minilora.verify.codes import HALF_GAP

U = 2.0**-24
SMALLEST = 2.0**-126
ANY_KIND = pytest.mark.parametrize("kind", KINDS)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Finite arrays of any shape: any bits at all, or many values whose size runs over all of float32's exponents."""
    if draw(st.booleans()):
        floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
        return draw(arrays(np.float32, array_shapes(max_dims=2, max_side=9), elements=floats))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    top, spread = draw(st.integers(-152, 126)), draw(st.sampled_from([0, 3, 60, 300]))
    values = rng.uniform(-2, 2, shape) * 2.0 ** np.maximum(
        top - rng.integers(0, spread + 1, shape), -160
    )
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    largest = float(np.finfo(dtype).max)
    return np.clip(values, -largest, largest).astype(dtype)


def linear(
    outputs: int = 24, inputs: int = 20, seed: int = 1, bias: bool = True, dtype: str = "float32"
) -> Linear:
    rng = np.random.default_rng(seed)
    return Linear(
        rng.standard_normal((outputs, inputs)).astype(dtype),
        rng.standard_normal(outputs).astype(dtype) if bias else None,
    )


def adapted(subject: Any, **changes: Any) -> PeftModel:
    options = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        **changes,
    }
    return get_peft_model(subject, LoraConfig(**options), seed=2)


# ---- the maps -------------------------------------------------------------------------------------------------------


def test_nf4_is_the_normal_distributions_quantiles() -> None:
    """QLoRA, appendix E: eight positive levels and seven negative ones from evenly spaced quantiles, and 0."""
    from statistics import NormalDist

    quantile, offset = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    built = np.sort([*positive, 0.0, *negative]) / max(positive)
    assert np.abs(built - LEVELS["nf4"]).max() < 2e-7


def test_the_other_maps() -> None:
    fp4 = LEVELS["fp4"].astype(np.float64) * 12
    for code, value in enumerate(
        fp4[:8]
    ):  # two bits that choose the binade, 0 the subnormals, and one that halves it
        binade, half = code >> 1, code & 1
        exact = half / 16 if binade == 0 else {1: 8, 2: 4, 3: 2}[binade] * (1 + half / 2)
        assert abs(value - exact) <= 12 * U
    assert np.array_equal(fp4[8:], -fp4[:8])
    assert np.array_equal(LEVELS["int8"], (np.arange(-127, 128) / 127).astype(np.float32))
    dynamic = LEVELS["dynamic"].astype(np.float64)
    assert len(np.unique(dynamic)) == 256
    assert (dynamic[-1], dynamic[0], dynamic[127]) == (1.0, pytest.approx(-0.99296875), 0.0)
    for i in range(7):  # 2^i values of each sign in a decade
        assert (
            np.count_nonzero((dynamic[:-1] > 10.0 ** (i - 7)) & (dynamic[:-1] < 10.0 ** (i - 6)))
            == 2**i
        )


# ---- what a code costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [p.name for p in of_codes.PROPERTIES])
@given(weights(), st.sampled_from(KINDS), st.sampled_from(BLOCK_SIZES[:4]), st.booleans())
def test_what_verify_says_of_codes_holds_for_every_float(
    name: str, w: np.ndarray, kind: str, block_size: int, double_quant: bool
) -> None:
    """Subnormal, at the end of the range, all zero: `verify` measures weights as they are in models."""
    w = np.atleast_2d(w)
    if (
        name == "double quantisation"
    ):  # a rounded absmax can leave the range at its very end: the layer refuses that
        w = np.clip(w, -(2.0**126), 2.0**126) if w.dtype != np.float16 else w
    base = QuantizedLinear(encode(w, kind, block_size, double_quant), dtype=w.dtype)
    case = Case(
        "weights",
        LoraLinear(base),
        np.zeros((1, w.shape[1]), np.float32),
        {},
        seed=w.size,
        w=w,
    )
    found = next(p for p in of_codes.PROPERTIES if p.name == name).check(case)
    assert found.ok, found


@ANY_KIND
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_block_without_a_normal_number_becomes_zeros(kind: str, double_quant: bool) -> None:
    w = np.zeros((4, 64), np.float32)
    w[1], w[2, 3] = np.nextafter(np.float32(SMALLEST), np.float32(0)), -np.float32(2.0**-149)
    w[3] = -SMALLEST
    held = encode(w, kind, 64, double_quant)
    assert not held.decode()[:3].any()
    assert np.array_equal(encode(w, kind, 64).absmax, np.array([0, 0, 0, SMALLEST], np.float32))
    assert np.array_equal(encode(w, kind, 64).decode()[3], w[3])


@ANY_KIND
def test_the_bound_is_reached(kind: str) -> None:
    levels = np.sort(LEVELS[kind].astype(np.float64))
    widest = np.diff(levels).argmax()
    w = np.full(64, (levels[widest] + levels[widest + 1]) / 2, np.float32)
    w[0] = 1
    error = np.abs(w - encode(w, kind).decode()).max()
    assert error >= HALF_GAP[kind] - U


def test_the_published_error_of_normal_weights() -> None:
    """bitsandbytes' table: mean |w - decoded| is 0.0728 for N(0, 1) in blocks of 64, give or take seven deviations."""
    w = np.random.default_rng(0).standard_normal(2**19).astype(np.float32)
    assert abs(np.abs(w - encode(w, "nf4", 64).decode()).mean() - 0.072798) < 7 * 0.000074
    errors = {kind: np.abs(w - encode(w, kind, 64).decode()).mean() for kind in KINDS}
    assert errors["int8"] < errors["nf4"] < errors["fp4"]  # QLoRA, table 2: NF4 above FP4


def test_bits_per_parameter() -> None:
    """QLoRA, section 3: 0.5 bits a weight for absmax, 0.127 with double quantisation."""
    w = np.ones((1024, 1024), np.float32)
    bits = {dq: 8 * encode(w, "nf4", 64, dq).nbytes / w.size for dq in (False, True)}
    assert bits[False] == 4.5
    assert round(bits[True], 3) == 4.127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_what_has_no_code_is_refused(bad: float) -> None:
    w = np.ones(100)
    w[70] = bad
    with pytest.raises(NonFiniteError, match="no code"):
        encode(w)


def test_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(0, 3\)"):
        encode(np.zeros((0, 3)))


# ---- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 20), (5, 20), (20,), (0, 20)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_operation_is_the_dense_one_bit_for_bit(
    shape: tuple[int, ...], bias: bool, dtype: str
) -> None:
    layer = QuantizedLinear.from_linear(linear(bias=bias, dtype=dtype))
    assert (layer.dtype, layer.out_features, layer.in_features) == (np.dtype(dtype), 24, 20)
    x = np.random.default_rng(2).standard_normal(shape).astype(dtype)
    found = []
    for run in (layer, lambda t: F.linear(t, Tensor(layer.dense_weight()), layer.bias)):
        t = Tensor(x, requires_grad=True)
        y = run(t)
        leaves = [t] if layer.bias is None else [t, layer.bias]
        found.append([y.numpy(), *gradients(y, leaves, np.cos(y.numpy()))])
    for own, dense in zip(*found, strict=True):
        assert own.dtype == np.dtype(dtype)
        assert own.tobytes() == dense.tobytes()


@ANY_KIND
def test_the_operations_gradient(kind: str) -> None:
    layer = QuantizedLinear.from_linear(linear(dtype="float64"), kind)
    check_gradient(lambda x, b: quantized_linear(x, layer.weight, b), np.ones((3, 20)), np.ones(24))


def kept(item: Any, seen: set[int]) -> int:
    """Bytes of the arrays that a graph holds on to."""
    if id(item) in seen or item is None:
        return 0
    seen.add(id(item))
    if isinstance(item, np.ndarray):
        return item.nbytes
    if isinstance(item, Quantized):
        return sum(kept(part, seen) for part in vars(item).values())
    if isinstance(item, (list, tuple)):
        return sum(kept(part, seen) for part in item)
    cells = getattr(item, "__closure__", None) or ()
    return sum(kept(getattr(c, "cell_contents", None), seen) for c in cells)


def test_the_graph_holds_codes_and_never_the_dense_weight() -> None:
    layer = QuantizedLinear.from_linear(linear(256, 256))
    x = Tensor(np.ones((1, 256), np.float32), requires_grad=True)
    y = layer(x)
    assert y.node is not None
    assert kept(y.node.vjp, set()) <= layer.nbytes
    dense = F.linear(x, Tensor(layer.dense_weight()), layer.bias)
    assert dense.node is not None
    assert (
        kept(dense.node.vjp, set()) >= 4 * 256 * 256
    )  # the measure sees a dense weight where there is one


def test_a_quantised_weight_reads_as_the_dense_one_and_cannot_be_written() -> None:
    layer = QuantizedLinear.from_linear(linear())
    weight = layer.weight
    dense = weight.quantized.decode()
    assert not layer.trainable
    assert (weight.shape, weight.ndim, weight.size, len(weight)) == ((24, 20), 2, 480, 24)
    for read in (
        weight.data,
        weight.numpy(),
        layer.dense_weight(),
        np.array(weight),
        Tensor(weight).data,
    ):
        assert read.tobytes() == dense.tobytes()
    before = weight.quantized.codes.copy()
    with pytest.raises(ConfigError, match="nf4 cannot be assigned to"):
        weight.data = dense
    weight.data[...] = 0  # of an array that was made for this look alone
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
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("device", ["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_device_finds_the_same_codes(kind: str, double_quant: bool, device: str) -> None:
    backend = STRICT if device == "strict" else get_backend(device)
    w = np.random.default_rng(6).standard_normal((300, 70)) * 10.0 ** np.arange(-35, 35)
    here, there = (encode(b.from_numpy(w), kind, 64, double_quant) for b in (NUMPY, backend))
    for own, other in ((here.codes, there.codes), (here.decode_absmax(), there.decode_absmax())):
        assert own.tobytes() == backend.to_numpy(other).tobytes()
    assert here.decode().tobytes() == backend.to_numpy(there.decode()).tobytes()
    assert here.codes.base is None  # nothing longer is held behind it


@ANY_KIND
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_device_codes_decodes_and_multiplies_alike(kind: str, double_quant: bool) -> None:
    """Encoded there or here and moved: the same bits. A step moves nothing and waits for nothing."""
    quant.codes._tables.cache_clear()  # the maps move with the layer, too
    here = QuantizedLinear.from_linear(linear(5, 39), kind, 64, double_quant)
    moved = QuantizedLinear.from_linear(linear(5, 39), kind, 64, double_quant).to(STRICT)
    x = np.random.default_rng(2).standard_normal((4, 39)).astype(np.float32)

    def step(layer: QuantizedLinear) -> list[bytes]:
        t = Tensor(layer.backend.from_numpy(x), requires_grad=True)
        with counted() as meter, no_sync():
            y = layer(t)
            found = gradients(y, [t, layer.bias], y.data)
        assert (meter.uploads, meter.downloads, meter.syncs) == ([], [], [])
        return [layer.backend.to_numpy(a).tobytes() for a in (y.data, *found)]

    assert (moved.backend, moved.weight.backend) == (STRICT, STRICT)
    assert step(moved) == step(here)
    there = QuantizedLinear.from_linear(linear(5, 39).to(STRICT), kind, 64, double_quant)
    host = STRICT.to_numpy
    assert host(there.weight.quantized.codes).tobytes() == here.weight.quantized.codes.tobytes()
    assert (
        host(there.weight.quantized.decode_absmax()).tobytes()
        == here.weight.quantized.decode_absmax().tobytes()
    )
    assert (there.nbytes, moved.nbytes, there.error) == (here.nbytes, here.nbytes, here.error)
    assert step(there) == step(here)
    here.bias = None
    with pytest.raises(DeviceError, match="strict"):
        here(Tensor(STRICT.from_numpy(x)))
    assert moved.to("cpu").weight.data.tobytes() == here.weight.data.tobytes()


def test_moving_to_another_dtype_changes_what_is_computed_in_and_not_the_codes() -> None:
    layer = QuantizedLinear.from_linear(linear())
    codes = layer.weight.quantized.codes.copy()
    single = layer.dense_weight()
    layer.to(dtype="float64")
    assert layer.dtype == layer.bias.dtype == np.float64
    assert np.array_equal(layer.dense_weight(), single)
    assert np.array_equal(layer.weight.quantized.codes, codes)


def test_the_error_is_measured() -> None:
    dense = linear(64, 64)
    for kind in KINDS:
        layer = QuantizedLinear.from_linear(dense, kind)
        W = dense.weight.data.astype(np.float64)
        expected = np.linalg.norm(W - layer.dense_weight()) / np.linalg.norm(W)
        assert layer.error == pytest.approx(expected, rel=1e-12)
    assert QuantizedLinear.from_linear(Linear(np.zeros((2, 3), np.float32))).error == 0
    huge = Linear(dense.weight.data * np.float32(2.0**125))
    assert QuantizedLinear.from_linear(huge).error == pytest.approx(
        QuantizedLinear.from_linear(dense).error, rel=1e-5
    )


def test_an_absmax_that_leaves_the_dtype_is_refused() -> None:
    """Double quantisation rounds absmax, here to above float16's largest number."""
    w = np.full((6, 64), 65504, np.float16)
    w[0] = 0
    with pytest.raises(NonFiniteError, match="double_quant=False"):
        QuantizedLinear.from_linear(Linear(w))
    assert QuantizedLinear.from_linear(Linear(w), double_quant=False).error is not None


# ---- a model --------------------------------------------------------------------------------------------------------


@ANY_KIND
def test_quantize_replaces_every_linear_layer_but_those_to_skip(kind: str) -> None:
    plain, subject = base(), base()
    names = [name for name, _ in plain.named_parameters()]
    assert quantize(subject, kind) is subject
    assert [name for name, _ in subject.named_parameters()] == names
    layers = {p: m for p, m in subject.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(layers) == {
        p for p, m in plain.named_modules() if isinstance(m, Linear) and p != "lm_head"
    }
    assert type(subject.lm_head) is Linear
    assert all(layer.training for layer in layers.values())
    assert not any(m.training for _, m in quantize(base().eval(), kind).named_modules())
    for row in quantization_report(subject):
        layer, dense = layers[row.path], dict(plain.named_modules())[row.path]
        assert (row.kind, row.parameters, row.nbytes) == (kind, dense.weight.size, layer.nbytes)
        assert row.bits_per_parameter == 8 * row.nbytes / row.parameters
        assert (row.error, row.lost) == (layer.error, None)
        assert layer.bias is None or np.array_equal(layer.bias.data, dense.bias.data)
        within = HALF_GAP[kind] + HALF_GAP["dynamic"] + 1e-5
        assert (
            np.abs(layer.dense_weight() - dense.weight.data).max()
            <= within * np.abs(dense.weight.data).max()
        )
    assert len(quantization_report(subject)) == 14


def test_quantised_layers_take_an_eighth() -> None:
    wide = quantize(base(hidden_size=64, intermediate_size=128))
    rows = quantization_report(wide)
    assert sum(r.nbytes for r in rows) <= 0.131 * 4 * sum(r.parameters for r in rows)


class Tied(Module):
    def __init__(self) -> None:
        self.embed = Embedding(np.ones((4, 3), np.float32))
        self.blocks = [linear(3, 3, bias=False)]
        self.lm_head = Linear(self.embed.weight.data)
        self.lm_head.weight = self.embed.weight


def _spoiled() -> CausalLM:
    subject = base()
    subject.model.layers[1].mlp.up_proj.weight.data[3, 2] = np.nan
    return subject


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "kind": (base, {"kind": "nf3"}, ConfigError, "'nf3': the kinds are nf4, fp4, int8"),
    "inner kind": (base, {"kind": "dynamic"}, ConfigError, "the kinds are"),
    "no kind": (base, {"kind": ["nf4"]}, ConfigError, "the kinds are"),
    "block": (base, {"block_size": 48}, ConfigError, "one of 32, 64, .*, 4096, got 48"),
    "small block": (base, {"block_size": 16}, ConfigError, "got 16"),
    "large block": (base, {"block_size": 8192}, ConfigError, "got 8192"),
    "block's type": (base, {"block_size": 64.0}, ConfigError, "got 64.0"),
    "double": (base, {"double_quant": 1}, ConfigError, "double_quant must be True or False, got 1"),
    "skip": (base, {"skip": ("lm_head", "head")}, ConfigError, "skip: 'head' matches nothing"),
    "nothing left": (base, {"skip": ["proj", *"qkvo"]}, ConfigError, "'proj' matches nothing"),
    "all skipped": (Tied, {"skip": ("blocks.0", "lm_head")}, ConfigError, "no linear layer"),
    "no model": (lambda: "model", {}, ConfigError, "expected a model"),
    "one layer": (linear, {"skip": ()}, ConfigError, "QuantizedLinear.from_linear"),
    "twice": (lambda: quantize(base()), {}, ConfigError, "q_proj is quantised already, as nf4"),
    "adapters": (lambda: adapted(base()), {}, ConfigError, "q_proj has adapters"),
    "under adapters": (lambda: adapted(base()).model, {}, ConfigError, "q_proj has adapters"),
    "tied": (lambda: base(tie_word_embeddings=True), {"skip": ()}, ConfigError, "lm_head shares its weight with"),
    "tied too": (Tied, {"skip": "0"}, ConfigError, "lm_head shares its weight with embed"),
    "NaN": (_spoiled, {}, NonFiniteError, r"model\.layers\.1\.mlp\.up_proj: a weight is NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_quantize_refuses_before_anything_changes(case: str) -> None:
    make, options, kind, message = REFUSED[case]
    subject = make()
    before = (
        [*map(id, dict(subject.named_modules()).values())] if isinstance(subject, Module) else []
    )
    with pytest.raises(kind, match=message):
        quantize(subject, **options)
    if before:
        assert [*map(id, dict(subject.named_modules()).values())] == before


def test_skip_takes_names_endings_and_one_text() -> None:
    subject = quantize(base(), skip=["lm_head", "model.layers.0.mlp.up_proj", "self_attn.q_proj"])
    paths = {r.path for r in quantization_report(subject)}
    assert len(paths) == 14 - 3
    assert not any(p.endswith("q_proj") or p == "model.layers.0.mlp.up_proj" for p in paths)
    assert type(quantize(Tied(), skip="lm_head").lm_head) is Linear


def test_a_quantised_module_cannot_be_trained_whole() -> None:
    subject = quantize(base(), skip=())
    with pytest.raises(ConfigError, match="lm_head is quantised"):
        adapted(subject, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not any(isinstance(m, LoraLinear) for _, m in subject.named_modules())


@ANY_KIND
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantised_it_computes_the_same_and_trains(kind: str, double_quant: bool) -> None:
    subject = quantize(base(), kind, double_quant=double_quant)
    names, expected = [name for name, _ in subject.named_parameters()], subject(IDS).numpy()
    biases = [m.bias for _, m in subject.named_modules() if isinstance(m, QuantizedLinear)]
    assert dequantize(subject.eval()) is subject
    assert not quantization_report(subject)
    assert [name for name, _ in subject.named_parameters()] == names
    assert subject(IDS).numpy().tobytes() == expected.tobytes()
    assert all(p.requires_grad for p in subject.parameters())
    assert not any(m.training for _, m in subject.named_modules())
    dense = [m.bias for p, m in subject.named_modules() if isinstance(m, Linear) and p != "lm_head"]
    assert all(one is other for one, other in zip(biases, dense, strict=True))
    with pytest.raises(ConfigError, match="there is no quantised layer"):
        dequantize(subject)
    over = adapted(quantize(base()))
    with pytest.raises(ConfigError, match=r"q_proj has adapters: merge_and_unload or unload first"):
        dequantize(over.model)
    assert len(quantization_report(over.model)) == 14


# ---- QLoRA: adapters over it ----------------------------------------------------------------------------------------


@ANY_KIND
@pytest.mark.parametrize(
    "adapter", [{}, {"use_dora": True}, {"init_r": 2, "target_r": 1, "total_step": 5}]
)
def test_every_property_of_a_layer_holds_over_a_quantised_model(
    kind: str, adapter: dict[str, Any]
) -> None:
    """Of whose weights nobody knows what they were before."""
    made, rng = quantize(base(), kind), np.random.default_rng(0)
    config = AdaLoraConfig(**adapter, target_modules="all-linear") if "init_r" in adapter else None
    subject = adapted(made, **adapter) if config is None else get_peft_model(made, config, seed=2)
    for name, p in subject.adapter_parameters("default").items():  # trained away from the start
        p.data = p.data + (0.1 * rng.standard_normal(p.shape)).astype(p.dtype) * (
            "lora_A" not in name
        )
    cases = list(cases_of(subject, seed=3))[:7]
    assert all(isinstance(case.original.base_layer, QuantizedLinear) for case in cases)
    rows = measure(cases, PROPERTIES)
    assert len(rows) > 10
    assert [row.property for row in rows if not row.ok] == []


def test_adapters_over_codes_have_the_gradients_of_adapters_over_the_decoded_model() -> None:
    codes, dense = quantize(base("float64")), base("float64")
    for p, q in zip(dense.parameters(), codes.parameters(), strict=True):
        p.data = q.data
    found = []
    for subject in map(adapted, (codes, dense)):
        loss = F.cross_entropy(subject(IDS[:, :-1]), IDS[:, 1:])
        params = list(subject.adapter_parameters("default").values())
        assert all(p.requires_grad for p in params)
        found.append([loss.numpy(), *gradients(loss, params)])
    for a, b in zip(*found, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_step_forms_no_dense_weight_of_a_quantised_layer() -> None:
    """Over a dense base it does, once for all shards; here codes stay codes between one product and the next."""
    batch = Batch(IDS[:, :-1], IDS[:, 1:])
    for make, formed in ((lambda: quantize(base()), False), (base, True)):
        subject = adapted(make())
        loss, plain = language_modelling_loss(subject, batch).item(), subject(IDS).numpy()
        subject.prepare_step(1 << 20)
        assert (
            any(any(getattr(m, "_effective", {}).values()) for _, m in subject.named_modules())
            == formed
        )
        assert subject(IDS).numpy() == pytest.approx(plain, rel=1e-4, abs=1e-5)
        assert language_modelling_loss(subject, batch).item() == pytest.approx(loss, rel=1e-5)
        subject.end_step()


def test_a_head_of_codes_has_the_loss_of_its_logits() -> None:
    subject = quantize(base("float64"), skip=())
    expected = F.cross_entropy(subject(IDS[:, :-1]), IDS[:, 1:], reduction="sum")
    assert (
        language_modelling_loss(subject, Batch(IDS[:, :-1], IDS[:, 1:])).item() == expected.item()
    )


def test_lora_trains_over_a_quantised_base_which_stays_as_it_is() -> None:
    subject = adapted(quantize(base()), r=4, init_lora_weights=True)
    before = {
        name: p.numpy().tobytes() for name, p in subject.named_parameters() if not p.requires_grad
    }
    trained = [p for p in subject.parameters() if p.requires_grad]
    assert not any(isinstance(p, QuantizedWeight) for p in trained)
    optimiser, losses = AdamW(trained, lr=0.02), []
    for _ in range(30):
        loss = F.cross_entropy(subject(IDS[:, :-1]), IDS[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    frozen = {
        name: p.numpy().tobytes() for name, p in subject.named_parameters() if not p.requires_grad
    }
    assert frozen == before


def test_the_last_merge_says_how_all_that_is_merged_is_held() -> None:
    subject = adapted(quantize(base()))
    layer = subject.model.model.layers[0].self_attn.q_proj
    for requantize, kind in (False, Linear), (True, QuantizedLinear), (False, Linear):
        subject.merge_adapter(requantize=requantize)
        made = layer.base_layer
        assert type(made) is kind
        subject.merge_adapter(requantize=requantize)
        assert layer.base_layer is made  # nothing to do
    subject.merge_adapter(requantize=True)
    subject.unmerge_adapter()
    assert (layer.merged, layer.requantized) == ((), False)


@pytest.mark.parametrize(("size", "low", "high"), [(1e-5, 0.9, 1.1), (30.0, 0.05, 0.15)])
def test_a_small_update_is_rounded_away_and_a_large_one_mostly_kept(
    size: float, low: float, high: float
) -> None:
    """Far below the levels' gap dW changes no code, and only the few at a threshold jump; far above, 9 % is noise."""
    layer = QuantizedLinear.from_linear(linear(64, 64), double_quant=False)
    dW = size * np.random.default_rng(4).standard_normal((64, 64))
    made = layer.rebuilt((layer.dense_weight() + dW).astype(np.float32))
    assert made.lost is not None
    assert low < made.lost < high


def test_a_merge_that_fails_half_way_leaves_every_layer_as_it_was() -> None:
    subject = adapted(quantize(base()))
    subject.add_adapter(
        "bad", LoraConfig(r=1, target_modules=["down_proj"], init_lora_weights=False)
    )
    subject.merge_adapter(requantize=True)
    layers = [m for _, m in subject.named_modules() if isinstance(m, LoraLinear)]
    codes = [layer.base_layer.dense_weight().tobytes() for layer in layers]
    layers[-1].adapters["bad"].lora_B.data[...] = np.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        subject.merge_adapter(["default", "bad"], requantize=False)
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers)
    assert [layer.base_layer.dense_weight().tobytes() for layer in layers] == codes
