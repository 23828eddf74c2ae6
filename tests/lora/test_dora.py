"""DoRA: its start, its two ways to compute, the detached norm, and what it cannot run beside.

Shapes: W (O, I), A (r, I), B (O, r), m (O,), V = W + s B A. u is the unit roundoff. What holds of
every method is in test_method_table.py.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, bits

from minilora.autograd import Tensor, gradients
from minilora.backend import NUMPY
from minilora.data import Batch
from minilora.errors import ConfigError, FormatError
from minilora.formats import read_adapter, write_adapter
from minilora.gradcheck import check_gradient
from minilora.lora import DoraAdapter, LoraConfig, LoraLinear, PeftModel, get_peft_model
from minilora.nn import Linear, dropout_counter
from minilora.quant import QuantizedLinear
from minilora.tools.inspecting import inspect_adapter
from minilora.training.nonfinite import explain_non_finite

SEEDS = st.integers(0, 99)
SIZES = st.integers(1, 40)
SMALL_SIZES = st.integers(1, 9)
DTYPES = st.sampled_from(["float32", "float64"])
EXPONENTS = st.integers(-20, 20)


def config(**changes: Any) -> LoraConfig:
    fields = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True}
    return LoraConfig(**fields | changes)


def layer(
    seed: int = 0,
    inputs: int = 5,
    outputs: int = 6,
    dtype: str = "float64",
    *,
    moved: bool = True,
    zero: int | None = None,
    bias: bool = True,
    scale: float = 1.0,
    quantized: bool = False,
    **changes: Any,
) -> LoraLinear:
    """A frozen base with one active adapter.

    moved   the adapter is trained away from its start
    zero    the row of the base's weight that is zero
    scale   the size of the numbers
    """
    rng = np.random.default_rng(seed)
    W = (scale * rng.standard_normal((outputs, inputs))).astype(dtype)
    if zero is not None:
        W[zero] = 0
    base: Any = Linear(W, rng.standard_normal(outputs).astype(dtype) if bias else None)
    for p in base.parameters():
        p.requires_grad = False
    wrapper = LoraLinear(QuantizedLinear.from_linear(base) if quantized else base)
    adapter = DoraAdapter(wrapper.base_layer, "x", config(**changes), rng, 3)
    if moved:
        adapter.lora_B.data = (scale * rng.standard_normal(adapter.lora_B.shape)).astype(dtype)
        m = adapter.lora_magnitude_vector
        m.data = (m.data * rng.uniform(-0.5, 2, outputs)).astype(dtype)
    wrapper.adapters["a"] = adapter
    wrapper.active = ["a"]
    return wrapper


def tensors(wrapper: LoraLinear) -> list[Any]:
    return [getattr(wrapper.adapters["a"], name) for name in DoraAdapter.TENSORS]


def pieces(wrapper: LoraLinear) -> list[np.ndarray]:
    """A, B and m."""
    return [p.data for p in tensors(wrapper)]


def direction(wrapper: LoraLinear) -> np.ndarray:
    """V, in plain arithmetic."""
    A, B, _ = pieces(wrapper)
    base = wrapper._original or wrapper.base_layer
    dW = wrapper.adapters["a"].scaling * (B.astype(np.float64) @ A.astype(np.float64))
    return base.dense_weight().astype(np.float64) + dW  # type: ignore[no-any-return]


def scales(wrapper: LoraLinear) -> np.ndarray:
    """k, in plain arithmetic."""
    m = pieces(wrapper)[2]
    return m / np.linalg.norm(direction(wrapper), axis=1)  # type: ignore[no-any-return]


def in_a_step(wrapper: LoraLinear, x: Tensor) -> Tensor:
    wrapper.prepare_step()
    assert any(wrapper._effective.values())
    try:
        return wrapper(x)
    finally:
        wrapper.end_step()


def model(**changes: Any) -> PeftModel:
    made = get_peft_model(small.base(), config(**changes), seed=2)
    rng = np.random.default_rng(3)
    for key, p in made.adapter_parameters("default").items():
        if "magnitude" in key:
            values = p.numpy() * rng.uniform(0.5, 2, p.shape)
        else:
            values = rng.standard_normal(p.shape) / 4
        p.data = values.astype(np.float32)
    return made


# ---- the start ----


@given(
    SEEDS, SIZES, SIZES, SMALL_SIZES, DTYPES, st.booleans(), EXPONENTS, st.booleans(), st.booleans()
)
def test_dora_adapter_starts_as_the_base_bit_for_bit(
    seed: int,
    I: int,
    O: int,
    r: int,
    dtype: str,
    bias: bool,
    exponent: int,
    empty: bool,
    quantized: bool,
) -> None:
    """Alone, in a step, merged, and with a row of zeros, for any shape and any size of numbers."""
    options = {"bias": bias, "quantized": quantized, "zero": 0 if empty else None, "r": r}
    made = layer(seed, I, O, dtype, moved=False, scale=2.0**exponent, **options)
    W = made.base_layer.dense_weight().copy()
    assert np.array_equal(pieces(made)[2], made.adapters["a"].norms(W))
    x = Tensor(np.random.default_rng(seed).standard_normal((2, 3, I)).astype(dtype))
    expected = made.base_layer(x).data
    assert np.array_equal(made(x).data, expected)
    if not quantized:
        assert np.array_equal(in_a_step(made, x).data, expected)
    made.merge()  # m is a rounded norm, so k may be (I + 4) / 2 roundings from 1
    unit = np.finfo(dtype).eps / 2
    assert (np.abs(made.base_layer.dense_weight() - W) <= (I + 4) * unit * np.abs(W)).all()


@pytest.mark.parametrize("init", [True, False])
def test_dora_adapter_magnitudes_start_as_the_norms_of_v(init: bool) -> None:
    made = layer(moved=False, init_lora_weights=init)
    V = direction(made)
    assert pieces(made)[2] == pytest.approx(np.linalg.norm(V, axis=1), rel=1e-14)
    x = Tensor(np.ones((1, 5)))
    assert made(x).data == pytest.approx(x.data @ V.T + made.bias.data, abs=1e-13)


def test_add_adapter_over_a_merged_one_starts_as_the_base() -> None:
    expected = model().unload()(IDS).data
    made = get_peft_model(small.base(), config(use_dora=False, init_lora_weights=False))
    made.merge_adapter()
    made.add_adapter("second", config())
    made.unmerge_adapter()
    made.set_adapter("second")
    assert np.array_equal(made(IDS).data, expected)


# ---- forward and backward ----


@given(SEEDS, SMALL_SIZES, SMALL_SIZES, st.integers(1, 4), st.booleans(), st.booleans())
def test_dora_gradients_are_those_of_the_detached_definition(
    seed: int, I: int, O: int, r: int, empty: bool, muted: bool
) -> None:
    """Alone and in a step, also where a row of V is zero, and where a magnitude is 0.

    The output of such a magnitude is zero, but its gradient is not.
    """
    made = layer(seed, I, O, r=r, zero=0 if empty else None)
    A, B, m = tensors(made)
    if empty:
        B.data = np.where(np.arange(O)[:, None] == 0, 0, B.data)
    if muted:
        m.data = np.where(np.arange(O) == O - 1, 0, m.data)
    bias = made.base_layer.bias
    bias.requires_grad = True
    rng = np.random.default_rng(seed)
    W = made.base_layer.weight.data
    s = made.adapters["a"].scaling
    norms = np.linalg.norm(direction(made), axis=1)
    zero = norms == 0
    inverse = np.where(zero, 0, 1 / np.where(zero, 1, norms))
    leaves = [Tensor(rng.standard_normal((2, 3, I)), True), A, B, m, bias]
    dy = rng.standard_normal((2, 3, O))

    def reference(x: Tensor, A: Tensor, B: Tensor, m: Tensor, b: Tensor) -> Tensor:
        """k V x + b in elementary operations, with norms that are constants."""
        k = m * inverse + zero * 1.0
        return k * (x @ (B @ A * s + W).T) + b

    check_gradient(reference, *[leaf.data for leaf in leaves], tolerance=1e-7)
    y = reference(*leaves)
    expected = [y.data, *gradients(y, leaves, dy)]
    if empty:
        assert not expected[4][0]  # without a direction k is the constant 1
    for y in (made(leaves[0]), in_a_step(made, leaves[0])):
        for g, want in zip([y.data, *gradients(y, leaves, dy)], expected, strict=True):
            assert g is not None
            assert g.shape == want.shape
            assert np.abs(g - want).max() <= 1e-11 * max(1, np.abs(want).max())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dora_dropout_acts_on_both_parts_as_in_peft(base: str) -> None:
    """y + (k - 1) W x' + k s B A x', for the mask that was drawn."""
    made = layer(lora_dropout=0.5, quantized=base == "nf4")
    adapter = made.adapters["a"]
    W = made.base_layer.dense_weight()
    b = made.bias.data
    A, B, _ = pieces(made)
    k = scales(made)
    x = np.random.default_rng(1).standard_normal((4, 9, 5))
    with dropout_counter(7, 3):
        y = made.train()(Tensor(x)).data
        dropped = adapter.dropout(Tensor(x)).data
    assert (dropped == 0).any()
    update = adapter.scaling * (dropped @ A.T) @ B.T
    expected = x @ W.T + b + (k - 1) * (dropped @ W.T) + k * update
    assert np.abs(y - expected).max() < 1e-12
    still = made.eval()(Tensor(x)).data
    assert np.abs(still - (k * (x @ direction(made).T) + b)).max() < 1e-12


def test_prepare_step_forms_no_weight_over_a_base_that_trains() -> None:
    made = layer()
    weight = made.base_layer.weight
    weight.requires_grad = True
    made.prepare_step()
    assert not any(made._effective.values())
    (dW,) = gradients(made(Tensor(np.eye(5))), [weight], np.ones((5, 6)))
    expected = np.repeat(scales(made)[:, None], 5, axis=1)
    assert dW == pytest.approx(expected, rel=1e-12)


def test_costs_prefer_one_weight_even_for_one_token() -> None:
    """The other way has to form V, too, to know its norms."""
    made = layer()
    formed, apart = made.count_operations(1)
    assert formed < apart
    made.prepare_step(1)
    assert any(made._effective.values())


def test_effective_linear_keeps_its_output_only_for_dora() -> None:
    for use_dora in True, False:
        base = get_peft_model(small.base(), config(r=2, use_dora=use_dora)).get_base_model()
        wrapper = base.model.layers[0].mlp.down_proj
        wrapper.prepare_step()
        y = wrapper(Tensor(np.ones((1, 3, 24), np.float32)))
        node = y.node
        owner = weakref.ref(y.data if y.data.base is None else y.data.base)
        assert node is not None
        del y
        assert (owner() is not None) == use_dora


@pytest.mark.parametrize("size", [3, 40, 500])
def test_norms_are_equal_for_any_size_of_block(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(0, 7, 11)
    adapter = made.adapters["a"]
    W = made.base_layer.weight.data.copy()
    whole = adapter.norms(W)
    monkeypatch.setattr(NUMPY, "sizes", NUMPY.sizes._replace(row_norms=size))
    assert adapter.norms(W) == pytest.approx(whole, rel=1e-15)
    adapter.write_effective_weight(W)
    k = pieces(made)[2] / whole
    assert pytest.approx(k[:, None] * direction(made), rel=1e-13) == W


@given(SEEDS, st.integers(0, 12), SIZES)
def test_norms_are_right_where_dw_cancels_nearly_all_of_w(seed: int, digits: int, I: int) -> None:
    """V = W + s B A errs by (r + 2) u |W|, and so may |V|.

    The formula of squares would err by u |W|^2 / |V|.
    """
    made = layer(seed, I, 4, r=1, lora_alpha=1)
    A, B, _ = pieces(made)
    near = -(B @ A)
    W = near + 10.0**-digits * np.random.default_rng(seed).standard_normal(near.shape)
    V = W.astype(np.longdouble) + B.astype(np.longdouble) @ A
    exact = np.linalg.norm(V, axis=1)
    length = np.linalg.norm(np.abs(W) + np.abs(near), axis=1)
    u = np.finfo(float).eps / 2
    error = np.abs(made.adapters["a"].norms(W) - exact)
    assert (error <= 3 * u * length + (I + 3) * u * exact).all()


def test_merge_is_right_for_a_norm_beyond_float32_and_a_step_gives_nan() -> None:
    """A row of zeros would be wrong without any error; the merged sum is float64."""
    made = layer(dtype="float32")
    made.adapters["a"].lora_B.data = np.full((6, 3), 1e30, np.float32)
    V = direction(made)
    m = made.adapters["a"].lora_magnitude_vector.data
    made.merge()
    expected = m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
    assert made.base_layer.dense_weight() == pytest.approx(expected, rel=1e-6)
    made.unmerge()
    with np.errstate(all="ignore"):
        assert np.isnan(in_a_step(made, Tensor(np.ones((1, 5), np.float32))).data).all()


# ---- beside another adapter ----


@pytest.mark.parametrize("second", [True, False])
def test_set_adapter_refuses_dora_beside_another_adapter_of_a_layer(second: bool) -> None:
    """It scales the layer's output, so the order would count: refused, and nothing changes."""
    made = model(target_modules=["q_proj", "v_proj"])
    beside = config(use_dora=second, target_modules=["q_proj"], init_lora_weights=False)
    made.add_adapter("other", beside)
    apart = config(use_dora=second, target_modules=["o_proj"], init_lora_weights=False)
    made.add_adapter("elsewhere", apart)
    before = bits(made)
    active = made.active_adapters
    both = ["default", "other"]
    message = r"'(default|other)' is DoRA's .* not together with (other|default)"
    for action, names in (
        (made.set_adapter, both),
        (made.set_adapter, both[::-1]),
        (made.merge_adapter, both),
        (lambda names: made.merge_and_unload(adapter_names=names), both[::-1]),
    ):
        with pytest.raises(ConfigError, match=message):
            action(names)
        assert bits(made) == before
        assert made.active_adapters == active
        assert not any(wrapper.merged for wrapper in made._wrappers().values())
    made.merge_adapter(["default"])
    with pytest.raises(ConfigError, match="not together with"):
        made.merge_adapter(["other"])
    made.unmerge_adapter()
    made.set_adapter(["default", "elsewhere"])  # they share no layer
    made.set_adapter("other")
    assert bits(made) == before


def test_lora_config_refuses_what_does_not_go_with_use_dora() -> None:
    fields = {"lora_bias": True, "megatron_config": {"a": 1}, "use_bdlora": {"a": 1}}
    for name, value in fields.items():
        with pytest.raises(ConfigError, match=name):
            LoraConfig.from_dict({"use_dora": True, name: value})
    for value in (1, "yes", None):
        with pytest.raises(ConfigError, match="use_dora must be True or False"):
            LoraConfig(use_dora=value)  # type: ignore[arg-type]


# ---- files ----


def test_save_pretrained_writes_use_dora_and_magnitudes(tmp_path: Path) -> None:
    made = model()
    layer_path = "base_model.model.model.layers.0.self_attn.q_proj"
    assert f"{layer_path}.lora_magnitude_vector.default.weight" in bits(made)
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True


def test_inspect_adapter_shows_magnitudes_and_names_one_that_does_not_fit(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    wrappers = made._wrappers()
    for row in inspect_adapter(tmp_path)["tensors"]:
        m = wrappers[row["layer"]].adapters["default"].lora_magnitude_vector.data
        least, most = map(float, row["magnitude"].split(" to "))
        assert (least, most) == pytest.approx((m.min(), m.max()), rel=1e-3)
    raw, stored = read_adapter(tmp_path)
    key = next(key for key in stored if "magnitude" in key)
    m = stored.pop(key)
    for changed in (stored, {**stored, key: m[:-1]}):
        write_adapter(tmp_path, raw, changed)
        with pytest.raises(FormatError, match="lora_magnitude_vector that fits it"):
            inspect_adapter(tmp_path)


def test_explain_non_finite_names_a_broken_magnitude() -> None:
    made = model().train()
    parameters = dict(made.named_parameters())
    name = next(name for name in parameters if "magnitude" in name)
    p = parameters[name]
    p.data = np.where(np.arange(p.size) == 1, np.float32(np.nan), p.data)
    batch = Batch(IDS[:, :-1], IDS[:, 1:])
    assert name in explain_non_finite(made, batch, seed=0, step=0, shard=2)
