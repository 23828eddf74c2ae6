"""DoRA: its start, its two ways to compute, the detached norm, merging, files, and what it cannot stand beside.

Shapes: W (O, I), A (r, I), B (O, r), m (O,), V = W + s B A. u is the unit roundoff.
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

from minilora import functional as F
from minilora.autograd import Tensor, gradients, no_grad
from minilora.data import Batch
from minilora.errors import ConfigError, FormatError
from minilora.formats import load_file, read_adapter, write_adapter
from minilora.gradcheck import check_gradient
from minilora.lora import DoraAdapter, LoraConfig, LoraLinear, PeftModel, get_peft_model
from minilora.models.decoding import Decoding, Weights
from minilora.models.transformer import KeyValueCache
from minilora.nn import Linear, dropout_counter
from minilora.optim import AdamW
from minilora.quant import QuantizedLinear, quantize
from minilora.threads import Workers
from minilora.tools.inspecting import inspect_adapter
from minilora.training.nonfinite import explain_non_finite
from minilora.training.parallel import ShardedStep
from minilora.verify import verify_files

SIZES = st.integers(1, 40)


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(
        **({"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True} | changes)
    )


def layer(
    seed: int = 0, inputs: int = 5, outputs: int = 6, dtype: str = "float64", moved: bool = True,
    zero: int | None = None, bias: bool = True, scale: float = 1.0, quantized: bool = False, **changes: Any,
) -> LoraLinear:  # fmt: skip
    """A frozen base (one of whose rows may be zero) with one active adapter; `moved`: trained away from its start."""
    rng = np.random.default_rng(seed)
    W = (scale * rng.standard_normal((outputs, inputs))).astype(dtype)
    if zero is not None:
        W[zero] = 0
    base: Any = Linear(W, rng.standard_normal(outputs).astype(dtype) if bias else None)
    for p in base.parameters():
        p.requires_grad = False
    made = LoraLinear(QuantizedLinear.from_linear(base) if quantized else base)
    adapter = DoraAdapter(made.base_layer, "x", config(**changes), rng, 3)
    if moved:
        adapter.lora_B.data = (scale * rng.standard_normal(adapter.lora_B.shape)).astype(dtype)
        m = adapter.lora_magnitude_vector
        m.data = (m.data * rng.uniform(-0.5, 2, outputs)).astype(dtype)
    made.adapters["a"], made.active = adapter, ["a"]
    return made


def pieces(made: LoraLinear) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(getattr(made.adapters["a"], name).data for name in DoraAdapter.TENSORS)  # type: ignore[return-value]


def direction(made: LoraLinear, wide: Any = np.float64) -> np.ndarray:
    """V, in plain arithmetic."""
    A, B, _ = (p.astype(wide) for p in pieces(made))
    base = made._original or made.base_layer
    return base.dense_weight().astype(wide) + made.adapters["a"].scaling * (B @ A)  # type: ignore[no-any-return]


def in_a_step(made: LoraLinear, x: Tensor) -> Tensor:
    made.prepare_step()
    assert any(made._effective.values())
    try:
        return made(x)
    finally:
        made.end_step()


def model(
    dtype: str = "float32", device: Any = "cpu", moved: bool = True, **changes: Any
) -> PeftModel:
    made = get_peft_model(small.base(dtype, device), config(**changes), seed=2)
    rng = np.random.default_rng(3)
    for key, p in made.adapter_parameters("default").items() if moved else ():
        values = (
            p.numpy() * rng.uniform(0.5, 2, p.shape)
            if "magnitude" in key
            else rng.standard_normal(p.shape) / 4
        )
        p.data = p.backend.from_numpy(values.astype(dtype))
    return made


# ---- the start ----


@given(
    st.integers(0, 99), SIZES, SIZES, st.integers(1, 9), st.sampled_from(["float32", "float64"]), st.booleans(),
    st.integers(-20, 20), st.booleans(), st.booleans(),
)  # fmt: skip
def test_the_start_is_the_base_bit_for_bit(
    seed: int,
    i: int,
    o: int,
    r: int,
    dtype: str,
    bias: bool,
    exponent: int,
    empty: bool,
    quantized: bool,
) -> None:
    """On its own, in a step, merged, and with a row that is zero: whatever the shape and the size of numbers."""
    scale, zero = 2.0**exponent, 0 if empty else None
    made = layer(
        seed, i, o, dtype, moved=False, bias=bias, scale=scale, zero=zero, r=r, quantized=quantized
    )
    assert np.array_equal(pieces(made)[2], made.adapters["a"].norms(made.base_layer.dense_weight()))
    x = Tensor(np.random.default_rng(seed).standard_normal((2, 3, i)).astype(dtype))
    expected, W = made.base_layer(x).data, made.base_layer.dense_weight().copy()
    assert np.array_equal(made(x).data, expected)
    if not quantized:
        assert np.array_equal(in_a_step(made, x).data, expected)
    made.merge()  # m is a rounded norm, so k may be (i + 4) / 2 roundings from 1
    u = np.finfo(dtype).eps / 2
    assert (np.abs(made.base_layer.dense_weight() - W) <= (i + 4) * u * np.abs(W)).all()


@pytest.mark.parametrize("init", [True, False])
def test_magnitudes_start_as_the_norms_of_what_runs(init: bool) -> None:
    made = layer(moved=False, init_lora_weights=init)
    V = direction(made)
    assert pieces(made)[2] == pytest.approx(np.linalg.norm(V, axis=1), rel=1e-14)
    x = Tensor(np.ones((1, 5)))
    assert made(x).data == pytest.approx(x.data @ V.T + made.bias.data, abs=1e-13)


def test_an_adapter_added_over_a_merged_one_starts_as_the_base() -> None:
    made = model()
    base = made.unload()(IDS).data
    made = get_peft_model(small.base(), config(use_dora=False, init_lora_weights=False))
    made.merge_adapter()
    made.add_adapter("second", config())
    made.unmerge_adapter()
    made.set_adapter("second")
    assert np.array_equal(made(IDS).data, base)


# ---- forward and backward ----


def defined(
    x: Tensor, A: Tensor, B: Tensor, m: Tensor, W: np.ndarray, b: Any, s: float, norms: np.ndarray
) -> Tensor:
    """k V x + b in elementary operations, with norms that are constants."""
    k = m * np.where(norms == 0, 0, 1 / np.where(norms == 0, 1, norms)) + (norms == 0) * 1.0
    return k * (x @ (B @ A * s + W).T) + b


@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_both_ways_have_the_gradients_of_the_detached_definition(
    seed: int, i: int, o: int, r: int, empty: bool, muted: bool
) -> None:
    """Also where a row of V is zero, and where a magnitude is: its output is nothing, and its gradient is not."""
    made = layer(seed, i, o, r=r, zero=0 if empty else None)
    adapter = made.adapters["a"]
    if empty:
        adapter.lora_B.data = np.where(np.arange(o)[:, None] == 0, 0, adapter.lora_B.data)
    if muted:
        adapter.lora_magnitude_vector.data = np.where(
            np.arange(o) == o - 1, 0, adapter.lora_magnitude_vector.data
        )
    made.base_layer.bias.requires_grad = True
    rng = np.random.default_rng(seed)
    W, s, norms = (
        made.base_layer.weight.data,
        adapter.scaling,
        np.linalg.norm(direction(made), axis=1),
    )
    leaves = [
        Tensor(rng.standard_normal((2, 3, i)), True),
        adapter.lora_A,
        adapter.lora_B,
        adapter.lora_magnitude_vector,
    ]
    leaves.append(made.base_layer.bias)
    dy = rng.standard_normal((2, 3, o))

    def reference(*inputs: Tensor) -> Tensor:
        x, A, B, m, b = inputs
        return defined(x, A, B, m, W, b, s, norms)

    check_gradient(reference, *[leaf.data for leaf in leaves], tolerance=1e-7)
    expected = reference(*leaves)
    expected = [expected.data, *gradients(expected, leaves, dy)]
    assert not empty or not expected[4][0]  # no direction: k is the constant 1
    for y in (made(leaves[0]), in_a_step(made, leaves[0])):
        for got, want in zip([y.data, *gradients(y, leaves, dy)], expected, strict=True):
            assert got is not None
            assert got.shape == want.shape
            assert np.abs(got - want).max() <= 1e-11 * max(1, np.abs(want).max())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_is_peft_s_on_both_parts(base: str) -> None:
    """y + (k - 1) W x' + k s B A x', for the mask that fell."""
    made = layer(lora_dropout=0.5, quantized=base == "nf4")
    adapter, W = made.adapters["a"], made.base_layer.dense_weight()
    A, B, m = pieces(made)
    x = np.random.default_rng(1).standard_normal((4, 9, 5))
    with dropout_counter(7, 3):
        y = made.train()(Tensor(x)).data
        kept = adapter.dropout(Tensor(x)).data
    assert (kept == 0).any()
    k = m / np.linalg.norm(direction(made), axis=1)
    expected = (
        x @ W.T
        + made.bias.data
        + (k - 1) * (kept @ W.T)
        + k * (adapter.scaling * (kept @ A.T) @ B.T)
    )
    assert np.abs(y - expected).max() < 1e-12
    still = made.eval()(Tensor(x)).data
    assert np.abs(still - (k * (x @ direction(made).T) + made.bias.data)).max() < 1e-12


def test_a_weight_that_trains_itself_is_not_formed_beforehand() -> None:
    made = layer()
    made.base_layer.weight.requires_grad = True
    made.prepare_step()
    assert not any(made._effective.values())
    (dW,) = gradients(made(Tensor(np.eye(5))), [made.base_layer.weight], np.ones((5, 6)))
    k = pieces(made)[2] / np.linalg.norm(direction(made), axis=1)
    assert dW == pytest.approx(np.repeat(k[:, None], 5, axis=1), rel=1e-12)


def test_even_few_tokens_are_worth_one_weight() -> None:
    """The other way has to form V, too, to know its norms."""
    made = layer()
    merged, apart = made.costs(1)
    assert merged < apart
    made.prepare_step(1)
    assert any(made._effective.values())


def test_only_dora_keeps_its_output_until_backward() -> None:
    for adapter, kept in ((config(r=2), True), (config(r=2, use_dora=False), False)):
        made = get_peft_model(small.base(), adapter).get_base_model().model.layers[0].mlp.down_proj
        made.prepare_step()
        y = made(Tensor(np.ones((1, 3, 24), np.float32)))
        node, owner = y.node, weakref.ref(y.data if y.data.base is None else y.data.base)
        assert node is not None
        del y
        assert (owner() is not None) == kept


@pytest.mark.parametrize("size", [3, 40, 500])
def test_norms_are_formed_in_blocks_without_a_seam(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(0, 7, 11)
    whole = made.adapters["a"].norms(made.base_layer.weight.data)
    monkeypatch.setattr("minilora.lora.dora.BLOCK", size)
    assert made.adapters["a"].norms(made.base_layer.weight.data) == pytest.approx(whole, rel=1e-15)
    W = made.base_layer.weight.data.copy()
    made.adapters["a"].norms(W, scaled=True)
    assert pytest.approx((pieces(made)[2] / whole)[:, None] * direction(made), rel=1e-13) == W


@given(st.integers(0, 99), st.integers(0, 12), SIZES)
def test_a_norm_is_right_where_dw_takes_away_nearly_all_of_w(
    seed: int, digits: int, i: int
) -> None:
    """V = W + s B A errs by (r + 2) u |W|, and so may |V|; the squares' formula would err by u |W|^2 / |V|."""
    made, rng = layer(seed, i, 4, r=1, lora_alpha=1), np.random.default_rng(seed)
    adapter = made.adapters["a"]
    near = -(adapter.lora_B.data @ adapter.lora_A.data)
    W = near + 10.0**-digits * rng.standard_normal(near.shape)
    exact = np.linalg.norm(
        W.astype(np.longdouble) + adapter.lora_B.data.astype(np.longdouble) @ adapter.lora_A.data,
        axis=1,
    )
    u, length = np.finfo(float).eps / 2, np.linalg.norm(np.abs(W) + np.abs(near), axis=1)
    assert (np.abs(adapter.norms(W) - exact) <= 3 * u * length + (i + 3) * u * exact).all()


# ---- merging ----


def test_a_norm_beyond_its_dtype_is_never_a_row_of_zeros() -> None:
    """In float32 it is NaN; merged in float64, where the norm is finite, it is right."""
    made = layer(dtype="float32")
    made.adapters["a"].lora_B.data = np.full((6, 3), 1e30, np.float32)
    V, m = direction(made), made.adapters["a"].lora_magnitude_vector.data
    made.merge()
    expected = m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
    assert made.base_layer.dense_weight() == pytest.approx(expected, rel=1e-6)
    made.unmerge()
    with np.errstate(all="ignore"):
        assert np.isnan(in_a_step(made, Tensor(np.ones((1, 5), np.float32))).data).all()


# ---- in company ----


@pytest.mark.parametrize("second", [True, False])
def test_it_stands_alone(second: bool) -> None:
    """It scales what a layer gives, so beside another adapter the order would count: refused, and nothing changes."""
    made = model(target_modules=["q_proj", "v_proj"])
    made.add_adapter(
        "other", config(use_dora=second, target_modules=["q_proj"], init_lora_weights=False)
    )
    made.add_adapter(
        "elsewhere", config(use_dora=second, target_modules=["o_proj"], init_lora_weights=False)
    )
    before, active = bits(made), made.active_adapters
    for refused in (
        lambda: made.set_adapter(["default", "other"]),
        lambda: made.set_adapter(["other", "default"]),
        lambda: made.merge_adapter(["default", "other"]),
        lambda: made.merge_and_unload(adapter_names=["other", "default"]),
    ):
        with pytest.raises(
            ConfigError, match=r"'(default|other)' is DoRA's .* not together with (other|default)"
        ):
            refused()
        assert (bits(made), made.active_adapters) == (before, active)
        assert not any(m.merged for m in made._wrappers().values())
    made.merge_adapter(["default"])
    with pytest.raises(ConfigError, match="not together with"):
        made.merge_adapter(["other"])
    made.unmerge_adapter()
    made.set_adapter(["default", "elsewhere"])  # they share no layer
    made.set_adapter("other")
    assert bits(made) == before


def test_what_does_not_go_with_it_is_refused_by_name() -> None:
    for name, value in (
        ("lora_bias", True),
        ("megatron_config", {"a": 1}),
        ("use_bdlora", {"a": 1}),
    ):
        with pytest.raises(ConfigError, match=name):
            LoraConfig.from_dict({"use_dora": True, name: value})
    for value in (1, "yes", None):
        with pytest.raises(ConfigError, match="use_dora must be True or False"):
            LoraConfig(use_dora=value)  # type: ignore[arg-type]


# ---- files ----


def test_files_have_peft_s_keys(tmp_path: Path) -> None:
    made = model()
    assert (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"
        in bits(made)
    )
    made.save_pretrained(tmp_path)
    ends = {key.partition("_proj.")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert ends == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_magnitude_that_does_not_fit_is_named(tmp_path: Path, change: str) -> None:
    model().save_pretrained(tmp_path)
    raw, tensors = read_adapter(tmp_path)
    key = next(k for k in tensors if "magnitude" in k)
    tensors = {
        k: a[:-1] if k == key else a for k, a in tensors.items() if change == "shape" or k != key
    }
    write_adapter(tmp_path, raw, tensors)
    base = small.base()
    with pytest.raises(FormatError, match=key):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(FormatError, match="lora_magnitude_vector that fits it"):
        inspect_adapter(tmp_path)


def test_inspect_and_verify_read_such_a_folder(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path / "adapter")
    small.base().save_pretrained(tmp_path / "base")
    layers = dict(made._wrappers())
    for row in inspect_adapter(tmp_path / "adapter")["tensors"]:
        a = layers[row["layer"]].adapters["default"]
        assert float(row["|dW|"]) == pytest.approx(
            np.linalg.norm(a.scaling * a.lora_B.data @ a.lora_A.data), rel=1e-3
        )
        least, most = map(float, row["magnitude"].split(" to "))
        assert (least, most) == pytest.approx(
            (a.lora_magnitude_vector.data.min(), a.lora_magnitude_vector.data.max()), rel=1e-3
        )
    found = verify_files(tmp_path / "base", tmp_path / "adapter")
    assert all(row.ok for row in found.rows)
    for finding in found.layers:
        assert finding.dW == pytest.approx(
            np.linalg.norm(layers[finding.layer].delta_weight("default")), rel=1e-6
        )


# ---- a whole model ----


def test_decoding_takes_its_weight() -> None:
    made = model().eval()
    cache = KeyValueCache(made.get_base_model(), 2, 10)
    with no_grad(), Workers(1) as workers:
        made(IDS[:, :9], cache=cache)
        weights = Weights.of(made.get_base_model(), workers)
        assert weights is not None
        assert Decoding(weights, cache)(IDS[:, 9]) == pytest.approx(made(IDS).data[:, 9], abs=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_shards_find_the_gradients_of_the_whole(recompute: bool) -> None:
    made = model("float64").train()
    made.get_base_model().gradient_checkpointing_enable(recompute)
    params = [p for p in made.parameters() if p.requires_grad]
    expected = gradients(F.cross_entropy(made(IDS[:, :-1]), IDS[:, 1:]), params)
    with ShardedStep(made, 2, shard=1) as sharded:
        _, grads = sharded.gradients(Batch(IDS[:, :-1], IDS[:, 1:]), params)
    for g, want in zip(grads, expected, strict=True):
        assert g is not None
        assert np.abs(g - want).max() <= 1e-12


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_it_learns(kind: str | None) -> None:
    base = small.base()
    made = get_peft_model(base if kind is None else quantize(base, kind), config()).train()
    params = [p for p in made.parameters() if p.requires_grad]
    optimizer, losses = AdamW(params, lr=0.02), []
    for _ in range(30):
        loss = F.cross_entropy(made(IDS[:, :-1]), IDS[:, 1:])
        optimizer.step(gradients(loss, params))
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_broken_magnitude_is_found() -> None:
    made = model().train()
    name, p = next((n, p) for n, p in made.named_parameters() if "magnitude" in n)
    p.data = np.where(np.arange(p.size) == 1, np.float32(np.nan), p.data)
    said = explain_non_finite(made, Batch(IDS[:, :-1], IDS[:, 1:]), seed=0, step=0, shard=2)
    assert name in said
