"""Quantised weights: what a code may cost, for every input; bitsandbytes' codes; a layer; a model; stored tensors.

The bounds are computed, not fitted. u = 2^-24 is float32's unit roundoff, and half a kind's widest gap between levels
is what its nearest level can be away, in units of the block's absmax.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bitsandbytes_golden import CASES, FILE, weight
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from strict_xp import STRICT, counted, no_sync

from minilora import CausalLM, LoraConfig, PeftModel, TransformerConfig, get_peft_model, quant
from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.backend import NUMPY, get_backend
from minilora.data import Batch
from minilora.errors import ConfigError, DeviceError, FormatError, NonFiniteError
from minilora.formats import load_file
from minilora.gradcheck import check_gradient
from minilora.lora import AdaLoraConfig, LoraLinear
from minilora.nn import Embedding, Linear, Module
from minilora.optim import AdamW
from minilora.parallel import language_modelling_loss
from minilora.quant import (
    BLOCK_SIZES,
    KINDS,
    LEVELS,
    Quantized,
    QuantizedLinear,
    QuantizedWeight,
    encode,
    quantization_report,
    quantize,
    quantized_linear,
    read_bitsandbytes,
    write_bitsandbytes,
)
from minilora.verify import PROPERTIES, Case, cases_of, measure, of_codes
from minilora.verify.of_codes import HALF_GAP, blocks

U = 2.0**-24
SMALLEST = 2.0**-126
ANY_KIND = pytest.mark.parametrize("kind", KINDS)
CONFIG = TransformerConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    initializer_range=0.3,
    attention_bias=True,
)
IDS = np.random.default_rng(0).integers(0, 19, (3, 7))


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Finite arrays of any shape: any bits at all, or many values whose size runs over all of float32's exponents."""
    if draw(st.booleans()):
        floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
        return draw(arrays(np.float32, array_shapes(max_dims=2, max_side=9), elements=floats))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    top, spread = draw(st.integers(-152, 126)), draw(st.sampled_from([0, 3, 60, 300]))
    values = rng.uniform(-2, 2, shape) * 2.0 ** np.maximum(top - rng.integers(0, spread + 1, shape), -160)
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    largest = float(np.finfo(dtype).max)
    return np.clip(values, -largest, largest).astype(dtype)


def linear(outputs: int = 24, inputs: int = 20, seed: int = 1, bias: bool = True, dtype: str = "float32") -> Linear:
    rng = np.random.default_rng(seed)
    return Linear(
        rng.standard_normal((outputs, inputs)).astype(dtype),
        rng.standard_normal(outputs).astype(dtype) if bias else None,
    )


def model(dtype: str = "float32", **changes: Any) -> CausalLM:
    return CausalLM(TransformerConfig(**{**vars(CONFIG), **changes}), seed=1, dtype=dtype)


def adapted(subject: Any, **changes: Any) -> PeftModel:
    options = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes}
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
    for code, value in enumerate(fp4[:8]):  # two bits that choose the binade, 0 the subnormals, and one that halves it
        binade, half = code >> 1, code & 1
        exact = half / 16 if binade == 0 else {1: 8, 2: 4, 3: 2}[binade] * (1 + half / 2)
        assert abs(value - exact) <= 12 * U
    assert np.array_equal(fp4[8:], -fp4[:8])
    assert np.array_equal(LEVELS["int8"], (np.arange(-127, 128) / 127).astype(np.float32))
    dynamic = LEVELS["dynamic"].astype(np.float64)
    assert len(np.unique(dynamic)) == 256
    assert (dynamic[-1], dynamic[0], dynamic[127]) == (1.0, pytest.approx(-0.99296875), 0.0)
    for i in range(7):  # 2^i values of each sign in a decade
        assert np.count_nonzero((dynamic[:-1] > 10.0 ** (i - 7)) & (dynamic[:-1] < 10.0 ** (i - 6))) == 2**i


# ---- what a code costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [p.name for p in of_codes.PROPERTIES])
@given(weights(), st.sampled_from(KINDS), st.sampled_from(BLOCK_SIZES[:4]), st.booleans())
def test_what_verify_says_of_codes_holds_for_every_float(
    name: str, w: np.ndarray, kind: str, block_size: int, double_quant: bool
) -> None:
    """Subnormal, at the end of the range, all zero: `verify` measures weights as they are in models."""
    w = np.atleast_2d(w)
    if name == "double quantisation":  # a rounded absmax can leave the range at its very end: the layer refuses that
        w = np.clip(w, -(2.0**126), 2.0**126) if w.dtype != np.float16 else w
    base = QuantizedLinear(encode(w, kind, block_size, double_quant), dtype=w.dtype)
    case = Case("weights", LoraLinear(base), np.zeros((1, w.shape[1]), np.float32), {}, seed=w.size, weight=w)
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


# ---- beside bitsandbytes --------------------------------------------------------------------------------------------


def stored(name: str) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """A case's tensors as bitsandbytes stores them, and what it decodes them to."""
    tensors = {k.removeprefix(name + "."): v for k, v in load_file(FILE).items() if k.startswith(name + ".")}
    return tensors, tensors.pop("decoded", None)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_absmax_have_the_bits_of_bitsandbytes(name: str) -> None:
    case, (tensors, decoded) = CASES[name], stored(name)
    own = encode(weight(name), case.kind, case.block_size, case.double_quant)
    assert np.array_equal(own.codes, tensors["weight"].reshape(-1))
    theirs = read_bitsandbytes(tensors).weight.quantized
    if decoded is not None:
        assert np.array_equal(theirs.decode(), decoded)
    if not case.double_quant:
        assert own.absmax.tobytes() == tensors["weight.absmax"].tobytes()
        return
    # The mean is summed in float32 there. And their CPU kernel finds the nearest of 256 levels by a table that is
    # too coarse for one code in a thousand: where codes differ, ours must be the nearer.
    assert abs(own.offset - theirs.offset) <= 4 * U * theirs.offset
    exact = encode(weight(name), case.kind, case.block_size).absmax - np.float32(theirs.offset)
    values = np.concatenate([part / np.abs(part).max() for part in blocks(exact, 256)])
    differ = own.absmax.codes != theirs.absmax.codes
    assert differ.sum() <= 1
    away = [np.abs(values - LEVELS["dynamic"][held.absmax.codes]) for held in (own, theirs)]
    assert (away[0][differ] < away[1][differ]).all()
    assert np.abs(own.absmax.absmax - theirs.absmax.absmax).max() <= 4 * U * theirs.offset


@pytest.mark.parametrize("name", CASES)
def test_what_bitsandbytes_stored_is_written_byte_for_byte(name: str) -> None:
    tensors, _ = stored(name)
    written = write_bitsandbytes(read_bitsandbytes(tensors))
    assert written.keys() == tensors.keys()
    for key, array in written.items():
        assert (array.dtype, array.shape) == (tensors[key].dtype, tensors[key].shape), key
        assert array.tobytes() == tensors[key].tobytes(), key


# ---- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 20), (5, 20), (20,), (0, 20)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_operation_is_the_dense_one_bit_for_bit(shape: tuple[int, ...], bias: bool, dtype: str) -> None:
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
    assert kept(dense.node.vjp, set()) >= 4 * 256 * 256  # the measure sees a dense weight where there is one


def test_a_quantised_weight_reads_as_the_dense_one_and_cannot_be_written() -> None:
    layer = QuantizedLinear.from_linear(linear())
    weight = layer.weight
    dense = weight.quantized.decode()
    assert not layer.trainable
    assert (weight.shape, weight.ndim, weight.size, len(weight)) == ((24, 20), 2, 480, 24)
    for read in (weight.data, weight.numpy(), layer.dense_weight(), np.array(weight), Tensor(weight).data):
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
    quant._tables.cache_clear()  # the maps move with the layer, too
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
    assert host(there.weight.quantized.decode_absmax()).tobytes() == here.weight.quantized.decode_absmax().tobytes()
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
    assert QuantizedLinear.from_linear(huge).error == pytest.approx(QuantizedLinear.from_linear(dense).error, rel=1e-5)


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
    plain, subject = model(), model()
    names = [name for name, _ in plain.named_parameters()]
    assert quantize(subject, kind) is subject
    assert [name for name, _ in subject.named_parameters()] == names
    layers = {p: m for p, m in subject.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(layers) == {p for p, m in plain.named_modules() if isinstance(m, Linear) and p != "lm_head"}
    assert type(subject.lm_head) is Linear
    assert all(layer.training for layer in layers.values())
    assert not any(m.training for _, m in quantize(model().eval(), kind).named_modules())
    for row in quantization_report(subject):
        layer, dense = layers[row.path], dict(plain.named_modules())[row.path]
        assert (row.kind, row.parameters, row.nbytes) == (kind, dense.weight.size, layer.nbytes)
        assert row.bits_per_parameter == 8 * row.nbytes / row.parameters
        assert (row.error, row.lost) == (layer.error, None)
        assert layer.bias is None or np.array_equal(layer.bias.data, dense.bias.data)
        within = HALF_GAP[kind] + HALF_GAP["dynamic"] + 1e-5
        assert np.abs(layer.dense_weight() - dense.weight.data).max() <= within * np.abs(dense.weight.data).max()
    assert len(quantization_report(subject)) == 14


def test_a_quantised_weight_counts_once_a_weight() -> None:
    counts = []
    for subject in (model(), quantize(model())):
        peft_model = adapted(subject)
        counts.append(peft_model.get_nb_trainable_parameters())
    assert counts[0] == counts[1]


def test_quantised_layers_take_an_eighth() -> None:
    wide = quantize(model(hidden_size=64, intermediate_size=128))
    rows = quantization_report(wide)
    assert sum(r.nbytes for r in rows) <= 0.131 * 4 * sum(r.parameters for r in rows)


class Tied(Module):
    def __init__(self) -> None:
        self.embed = Embedding(np.ones((4, 3), np.float32))
        self.blocks = [linear(3, 3, bias=False)]
        self.lm_head = Linear(self.embed.weight.data)
        self.lm_head.weight = self.embed.weight


def _spoiled() -> CausalLM:
    subject = model()
    subject.model.layers[1].mlp.up_proj.weight.data[3, 2] = np.nan
    return subject


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "kind": (model, {"kind": "nf3"}, ConfigError, "'nf3': the kinds are nf4, fp4, int8"),
    "inner kind": (model, {"kind": "dynamic"}, ConfigError, "the kinds are"),
    "no kind": (model, {"kind": ["nf4"]}, ConfigError, "the kinds are"),
    "block": (model, {"block_size": 48}, ConfigError, "one of 32, 64, .*, 4096, got 48"),
    "small block": (model, {"block_size": 16}, ConfigError, "got 16"),
    "large block": (model, {"block_size": 8192}, ConfigError, "got 8192"),
    "block's type": (model, {"block_size": 64.0}, ConfigError, "got 64.0"),
    "double": (model, {"double_quant": 1}, ConfigError, "double_quant must be True or False, got 1"),
    "skip": (model, {"skip": ("lm_head", "head")}, ConfigError, "skip: 'head' matches nothing"),
    "nothing left": (model, {"skip": ["proj", *"qkvo"]}, ConfigError, "'proj' matches nothing"),
    "all skipped": (Tied, {"skip": ("blocks.0", "lm_head")}, ConfigError, "no linear layer"),
    "no model": (lambda: "model", {}, ConfigError, "expected a model"),
    "one layer": (linear, {"skip": ()}, ConfigError, "QuantizedLinear.from_linear"),
    "twice": (lambda: quantize(model()), {}, ConfigError, "q_proj is quantised already, as nf4"),
    "adapters": (lambda: adapted(model()), {}, ConfigError, "q_proj has adapters"),
    "under adapters": (lambda: adapted(model()).model, {}, ConfigError, "q_proj has adapters"),
    "tied": (lambda: model(tie_word_embeddings=True), {"skip": ()}, ConfigError, "lm_head shares its weight with"),
    "tied too": (Tied, {"skip": "0"}, ConfigError, "lm_head shares its weight with embed"),
    "NaN": (_spoiled, {}, NonFiniteError, r"model\.layers\.1\.mlp\.up_proj: a weight is NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_quantize_refuses_before_anything_changes(case: str) -> None:
    make, options, kind, message = REFUSED[case]
    subject = make()
    before = [*map(id, dict(subject.named_modules()).values())] if isinstance(subject, Module) else []
    with pytest.raises(kind, match=message):
        quantize(subject, **options)
    if before:
        assert [*map(id, dict(subject.named_modules()).values())] == before


def test_skip_takes_names_endings_and_one_text() -> None:
    subject = quantize(model(), skip=["lm_head", "model.layers.0.mlp.up_proj", "self_attn.q_proj"])
    paths = {r.path for r in quantization_report(subject)}
    assert len(paths) == 14 - 3
    assert not any(p.endswith("q_proj") or p == "model.layers.0.mlp.up_proj" for p in paths)
    assert type(quantize(Tied(), skip="lm_head").lm_head) is Linear


def test_a_quantised_module_cannot_be_trained_whole() -> None:
    subject = quantize(model(), skip=())
    with pytest.raises(ConfigError, match="lm_head is quantised"):
        adapted(subject, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not any(isinstance(m, LoraLinear) for _, m in subject.named_modules())


# ---- QLoRA: adapters over it ----------------------------------------------------------------------------------------


@ANY_KIND
@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"init_r": 2, "target_r": 1, "total_step": 5}])
def test_every_property_of_a_layer_holds_over_a_quantised_model(kind: str, adapter: dict[str, Any]) -> None:
    """Of whose weights nobody knows what they were before."""
    made, rng = quantize(model(), kind), np.random.default_rng(0)
    config = AdaLoraConfig(**adapter, target_modules="all-linear") if "init_r" in adapter else None
    subject = adapted(made, **adapter) if config is None else get_peft_model(made, config, seed=2)
    for name, p in subject.adapter_parameters("default").items():  # trained away from the start
        p.data = p.data + (0.1 * rng.standard_normal(p.shape)).astype(p.dtype) * ("lora_A" not in name)
    cases = list(cases_of(subject, seed=3))[:7]
    assert all(isinstance(case.subject.base_layer, QuantizedLinear) for case in cases)
    rows = measure(cases, PROPERTIES)
    assert len(rows) > 10
    assert [row.property for row in rows if not row.ok] == []


def test_adapters_over_codes_have_the_gradients_of_adapters_over_the_decoded_model() -> None:
    codes, dense = quantize(model("float64")), model("float64")
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
    for make, formed in ((lambda: quantize(model()), False), (model, True)):
        subject = adapted(make())
        loss, plain = language_modelling_loss(subject, batch).item(), subject(IDS).numpy()
        subject.prepare_step(1 << 20)
        assert any(getattr(m, "_effective", None) is not None for _, m in subject.named_modules()) == formed
        assert subject(IDS).numpy() == pytest.approx(plain, rel=1e-4, abs=1e-5)
        assert language_modelling_loss(subject, batch).item() == pytest.approx(loss, rel=1e-5)
        subject.end_step()


def test_a_head_of_codes_has_the_loss_of_its_logits() -> None:
    subject = quantize(model("float64"), skip=())
    expected = F.cross_entropy(subject(IDS[:, :-1]), IDS[:, 1:], reduction="sum")
    assert language_modelling_loss(subject, Batch(IDS[:, :-1], IDS[:, 1:])).item() == expected.item()


def test_lora_trains_over_a_quantised_base_which_stays_as_it_is() -> None:
    subject = adapted(quantize(model()), r=4, init_lora_weights=True)
    before = {name: p.numpy().tobytes() for name, p in subject.named_parameters() if not p.requires_grad}
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
    frozen = {name: p.numpy().tobytes() for name, p in subject.named_parameters() if not p.requires_grad}
    assert frozen == before


def test_merging_gives_dense_layers_and_unmerging_the_codes() -> None:
    subject = adapted(quantize(model()))
    layer = subject.model.model.layers[0].self_attn.q_proj
    base = layer.base_layer
    expected = base.dense_weight().astype(np.float64) + layer.delta_weight("default")
    subject.merge_adapter()
    assert type(layer.base_layer) is Linear
    assert np.array_equal(layer.base_layer.weight.data, expected.astype(np.float32))
    assert layer.base_layer.bias is base.bias
    assert not layer.base_layer.weight.requires_grad
    subject.unmerge_adapter()
    assert layer.base_layer is base
    plain = subject.merge_and_unload()
    assert not quantization_report(plain)
    assert all(p.requires_grad for p in plain.parameters())


@ANY_KIND
def test_requantising_says_how_much_of_dW_was_lost(kind: str) -> None:
    subject = adapted(quantize(model(), kind, 32))
    layer, other = subject.model.model.layers[0].self_attn.q_proj, subject.model.lm_head
    base = layer.base_layer
    dW = layer.delta_weight("default")
    subject.merge_adapter(requantize=True)
    merged = layer.base_layer
    assert isinstance(merged, QuantizedLinear)
    held = merged.weight.quantized
    assert (held.kind, held.block_size, held.double_quant) == (kind, 32, True)
    W = base.dense_weight().astype(np.float64)
    left = merged.dense_weight() - W
    assert merged.lost == pytest.approx(np.linalg.norm(left - dW) / np.linalg.norm(dW), rel=1e-5)
    assert type(other) is Linear  # a dense layer stays one
    codes = merged.weight.quantized.codes.copy()
    with subject.disable_adapter():
        assert layer.base_layer is base
    assert isinstance(layer.base_layer, QuantizedLinear)  # as it was
    assert np.array_equal(layer.base_layer.weight.quantized.codes, codes)
    plain = subject.merge_and_unload(requantize=True)
    rows = quantization_report(plain)
    assert len(rows) == 14
    assert all(row.lost is not None and row.lost > 0 for row in rows)
    assert {type(p) for p in plain.parameters() if not p.requires_grad} == {QuantizedWeight}


def test_the_last_merge_says_how_all_that_is_merged_is_held() -> None:
    subject = adapted(quantize(model()))
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
def test_a_small_update_is_rounded_away_and_a_large_one_mostly_kept(size: float, low: float, high: float) -> None:
    """Far below the levels' gap dW changes no code, and only the few at a threshold jump; far above, 9 % is noise."""
    layer = QuantizedLinear.from_linear(linear(64, 64), double_quant=False)
    dW = size * np.random.default_rng(4).standard_normal((64, 64))
    made = layer.rebuilt((layer.dense_weight() + dW).astype(np.float32))
    assert made.lost is not None
    assert low < made.lost < high


def test_a_merge_that_fails_half_way_leaves_every_layer_as_it_was() -> None:
    subject = adapted(quantize(model()))
    subject.add_adapter("bad", LoraConfig(r=1, target_modules=["down_proj"], init_lora_weights=False))
    subject.merge_adapter(requantize=True)
    layers = [m for _, m in subject.named_modules() if isinstance(m, LoraLinear)]
    codes = [layer.base_layer.dense_weight().tobytes() for layer in layers]
    layers[-1].adapters["bad"].lora_B.data[...] = np.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        subject.merge_adapter(["default", "bad"], requantize=False)
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers)
    assert [layer.base_layer.dense_weight().tobytes() for layer in layers] == codes


def test_a_quantised_model_is_saved_as_the_dense_model_it_computes_with(tmp_path: Any) -> None:
    subject = quantize(model())
    subject.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert not quantization_report(again)
    assert again(IDS).numpy().tobytes() == subject(IDS).numpy().tobytes()


# ---- stored tensors -------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(BLOCK_SIZES[:3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["float32", "float64", "float16"]),
)
def test_a_layer_is_read_as_it_was_written(
    out: int, inside: int, kind: str, block_size: int, double_quant: bool, bias: bool, dtype: str
) -> None:
    layer = QuantizedLinear.from_linear(linear(out, inside, bias=bias, dtype=dtype), kind, block_size, double_quant)
    tensors = write_bitsandbytes(layer)
    again = read_bitsandbytes(tensors)
    assert again.dtype == layer.dtype
    assert again.dense_weight().tobytes() == layer.dense_weight().tobytes()
    assert again.nbytes == layer.nbytes
    assert (again.bias is None) == (layer.bias is None)
    assert again.bias is None or np.array_equal(again.bias.data, layer.bias.data)
    assert {k: v.tobytes() for k, v in write_bitsandbytes(again).items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }


def test_bfloat16_is_computed_in_float32() -> None:
    layer = read_bitsandbytes(changed({"state": {"dtype": "bfloat16"}}))
    assert layer.dtype == np.float32


def test_int8_has_no_such_form() -> None:
    with pytest.raises(ConfigError, match="not int8"):
        write_bitsandbytes(QuantizedLinear.from_linear(linear(), "int8"))


STATE = "weight.quant_state.bitsandbytes__nf4"


def changed(changes: dict[str, Any], double_quant: bool = True) -> dict[str, Any]:
    """A good layer's tensors with some replaced, or left out (None); "state" changes fields of the JSON."""
    tensors: dict[str, Any] = write_bitsandbytes(QuantizedLinear.from_linear(linear(), double_quant=double_quant))
    for key, value in changes.items():
        if key == "state":
            state = json.loads(tensors[STATE].tobytes())
            state = {k: v for k, v in {**state, **value}.items() if v is not None}
            tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        elif value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key]) if callable(value) else value
    return tensors


def _with(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[place] = value
        return array

    return put


HOSTILE: dict[str, tuple[dict[str, Any], bool, str]] = {
    **{f"no {key}": ({key: None}, True, f"missing {key}") for key in (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_quant_map")},
    "no state": ({STATE: None}, True, "found none"),
    "no nested absmax": ({"weight.nested_absmax": None}, True, "unknown weight.nested_quant_map"),
    "nested beside plain": ({"weight.nested_absmax": np.ones(1, np.float32)}, False, "missing weight.nested_quant_map"),
    "another": ({"weight.offset": np.zeros(1)}, True, "unknown weight.offset"),
    "two states": ({"weight.quant_state.bitsandbytes__fp4": np.zeros(2, np.uint8)}, True, "expected one"),
    "another kind's state": ({STATE: None, STATE + "x": np.zeros(2, np.uint8)}, True, "expected one"),
    "state of floats": ({STATE: np.zeros(9)}, True, "must be uint8"),
    "state of two axes": ({STATE: lambda a: a[None]}, True, "must be uint8"),
    "state no array": ({STATE: b"{}"}, True, "must be uint8 .* it is bytes"),
    "state no JSON": ({STATE: lambda a: a[:-1]}, True, "not valid JSON"),
    "state no object": ({STATE: np.frombuffer(b"[]", np.uint8)}, True, "expected a JSON object"),
    "field missing": ({"state": {"dtype": None}}, True, "must hold quant_type, .* it holds"),
    "field unknown": ({"state": {"extra": 1}}, True, "it holds"),
    "nested fields alone": ({"state": {"nested_offset": 1.0}}, False, "it holds"),
    "kind": ({"state": {"quant_type": "fp4"}}, True, "quant_type must be nf4"),
    "block": ({"state": {"blocksize": 48}}, True, "blocksize must be a power of two"),
    "block True": ({"state": {"blocksize": True}}, True, "blocksize must be"),
    "block text": ({"state": {"blocksize": "64"}}, True, "blocksize must be"),
    "block list": ({"state": {"blocksize": [64]}}, True, "blocksize must be"),
    "other block": ({"state": {"blocksize": 128}}, True, "weight.absmax must be uint8"),
    "dtype": ({"state": {"dtype": "int8"}}, True, "dtype must be float32, float64, float16, bfloat16"),
    "dtype list": ({"state": {"dtype": []}}, True, "dtype must be"),
    "shape short": ({"state": {"shape": [480]}}, True, "shape must be two lengths"),
    "shape zero": ({"state": {"shape": [0, 480]}}, True, "shape must be"),
    "shape negative": ({"state": {"shape": [-24, -20]}}, True, "shape must be"),
    "shape True": ({"state": {"shape": [True, 480]}}, True, "shape must be"),
    "shape float": ({"state": {"shape": [24.0, 20]}}, True, "shape must be"),
    "shape no list": ({"state": {"shape": "ab"}}, True, "shape must be"),
    "shape huge": ({"state": {"shape": [10**15, 10**15]}}, True, "weight must be uint8"),
    "shape other": ({"state": {"shape": [24, 22]}}, True, "weight must be uint8"),
    "nested block": ({"state": {"nested_blocksize": 128}}, True, "nested_blocksize must be 256"),
    "nested block float": ({"state": {"nested_blocksize": 256.0}}, True, "nested_blocksize"),
    "nested dtype": ({"state": {"nested_dtype": "float16"}}, True, "nested_dtype must be float32"),
    "offset int": ({"state": {"nested_offset": 1}}, True, "nested_offset must be a float32"),
    "offset wide": ({"state": {"nested_offset": 0.1}}, True, "nested_offset must be a float32"),
    "offset huge": ({"state": {"nested_offset": 1e300}}, True, "nested_offset must be a float32"),
    "offset near": ({"state": {"nested_offset": 2.0**128 - 2.0**103}}, True, "nested_offset must be a float32"),
    "weight flat": ({"weight": lambda a: a.reshape(-1)}, True, r"weight must be uint8 \(240, 1\)"),
    "weight signed": ({"weight": lambda a: a.view(np.int8)}, True, "it is int8"),
    "weight short": ({"weight": lambda a: a[:-1]}, True, r"it is uint8 \(239, 1\)"),
    "weight no array": ({"weight": "codes"}, True, "it is str"),
    "absmax float64": ({"weight.absmax": lambda a: a.astype(float)}, False, "weight.absmax must be float32"),
    "absmax long": ({"weight.absmax": lambda a: np.resize(a, 9)}, False, r"must be float32 \(8,\)"),
    "absmax NaN": ({"weight.absmax": _with(2, np.nan)}, False, "weight.absmax is not finite"),
    "absmax negative": ({"weight.absmax": _with(2, -1)}, False, "weight.absmax is negative"),
    "absmax codes": ({"weight.absmax": lambda a: a.astype(np.float32)}, True, "weight.absmax must be uint8"),
    "scale inf": ({"weight.nested_absmax": _with(0, np.inf)}, True, "weight.nested_absmax is not finite"),
    "scale negative": ({"weight.nested_absmax": _with(0, -1)}, True, "weight.nested_absmax is negative"),
    "scale long": ({"weight.nested_absmax": np.ones(2, np.float32)}, True, "weight.nested_absmax must be"),
    "map": ({"weight.quant_map": _with(3, 0.5)}, True, "weight.quant_map is not the map of nf4"),
    "map of another": ({"weight.quant_map": LEVELS["fp4"]}, True, "is not the map of nf4"),
    "map NaN": ({"weight.quant_map": _with(3, np.nan)}, True, "weight.quant_map is not finite"),
    "map short": ({"weight.quant_map": lambda a: a[:15]}, True, "weight.quant_map must be"),
    "nested map": ({"weight.nested_quant_map": lambda a: a[::-1].copy()}, True, "is not the map of dynamic"),
    "overflow": ({"weight.nested_absmax": np.array([3e38], np.float32), "weight.absmax": np.full(8, 255, np.uint8),
                  "state": {"nested_offset": 2.0**127}}, True, "weights it describes are not finite"),
    "bias long": ({"bias": np.zeros(25, np.float32)}, True, r"bias must be float32 \(24,\)"),
    "bias integers": ({"bias": np.zeros(24, int)}, True, "bias must be an array of floats"),
    "bias text": ({"bias": "none"}, True, "bias must be an array of floats"),
    "bias NaN": ({"bias": np.full(24, np.nan)}, True, "bias is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_field_that_is_not_as_it_must_be_is_named(case: str) -> None:
    changes, double_quant, message = HOSTILE[case]
    with pytest.raises(FormatError, match=f"^model.q_proj: .*{message}"):
        read_bitsandbytes(changed(changes, double_quant), where="model.q_proj")


def test_a_map_may_differ_in_its_last_bit() -> None:
    moved = changed({"weight.nested_quant_map": lambda a: np.nextafter(a, np.float32(2))})
    assert read_bitsandbytes(moved).dense_weight().tobytes() == read_bitsandbytes(changed({})).dense_weight().tobytes()


@given(st.data())
def test_bytes_at_random_are_a_layer_or_an_error(data: st.DataObject) -> None:
    tensors = changed({}, data.draw(st.booleans()))
    key = data.draw(st.sampled_from(sorted(tensors)))
    raw = bytearray(tensors[key].tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    tensors[key] = np.frombuffer(bytes(raw), tensors[key].dtype).reshape(tensors[key].shape)
    try:
        layer = read_bitsandbytes(tensors)
    except FormatError:
        return
    assert np.isfinite(layer.dense_weight()).all()
