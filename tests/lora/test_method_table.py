"""What holds of every method over every base on every backend, said once: a new method is a line in methods.py.

The identities that only one method has are in that method's own file, those of one LoRA layer of any shape in
test_verify.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from methods import TABLE, Combination, R, absolute, gamma, hold, layers, move, tensors
from small import IDS, bits, logits
from strict_xp import STRICT, no_sync

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.data import Batch
from minilora.errors import ConfigError, NonFiniteError
from minilora.formats import load_file
from minilora.gradcheck import check_gradient
from minilora.lora import LoraLinear, PeftModel
from minilora.lora.factors import Part
from minilora.lora.plan import describe_model, plan_adapter
from minilora.nn import Linear, dropout_counter
from minilora.optim import SGD
from minilora.quant import KINDS, QuantizedLinear, QuantizedWeight, quantization_report
from minilora.quant.half import HalfLinear, encode_half
from minilora.training.parallel import ShardedStep

ANY = pytest.mark.parametrize("case", TABLE, ids="-".join)
MERGING = pytest.mark.parametrize("case", [c for c in TABLE if c.method.merges], ids="-".join)
CODED = pytest.mark.parametrize(
    "case", [c for c in TABLE if c.method.merges and c.kind in KINDS], ids="-".join
)
HOST = pytest.mark.parametrize("case", [c for c in TABLE if c.device == "cpu"], ids="-".join)
ANY_DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])
ROWS = 6


def loss(model: PeftModel) -> Tensor:
    return F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])


def inputs(case: Combination, layer: LoraLinear) -> tuple[Any, Any]:
    """x (2, 3, I) and dL/dy (2, 3, O), at random."""
    rng, there = np.random.default_rng(0), case.backend.from_numpy
    sizes = layer.in_features, layer.out_features
    return tuple(there(rng.standard_normal((2, ROWS // 2, n)).astype(layer.dtype)) for n in sizes)  # type: ignore[return-value]


def formed(layer: LoraLinear) -> bool:
    """Has a weight been made for the step?"""
    return any(layer._effective.values())


def due(case: Combination) -> bool:
    """It is to be made, but never of codes or in sixteen bits, and not where there is no dW."""
    return case.kind == "dense" and case.method.merges


def within(one: Any, other: Any, bound: Any) -> bool:
    return bool((abs(one - other) <= bound).all())


# ---- the start, and what trains -------------------------------------------------------------------------------------


@ANY
def test_the_start_is_the_base_bit_for_bit(case: Combination) -> None:
    """As it is, in a step, and merged where that is possible."""
    plain, made = case.base(), case.model(moved=False)
    assert logits(made).tobytes() == logits(plain).tobytes()
    weights = [layer.base_layer.dense_weight().tobytes() for layer in layers(made).values()]
    for model in (plain, made):
        model.prepare_step()
    assert logits(made).tobytes() == logits(plain).tobytes()
    made.end_step()
    if case.method.merges:
        made.merge_adapter()
    merged = [layer.base_layer.dense_weight() for layer in layers(made).values()]
    if made.peft_config["default"].use_dora:  # the magnitude is the norm rounded, so k is near 1
        for W, before in zip(merged, weights, strict=True):
            W = case.backend.to_numpy(W)
            before = np.frombuffer(before, W.dtype).reshape(W.shape)
            assert (np.abs(W - before) <= np.spacing(np.abs(before))).all()
    else:
        assert [W.tobytes() for W in merged] == weights


@ANY
def test_at_the_start_only_what_the_paper_says_has_a_gradient(case: Combination) -> None:
    made = case.model(moved=False)
    for layer in layers(made).values():
        names = layer.adapters["default"].TENSORS
        for name, g in zip(names, gradients(loss(made), tensors(layer)), strict=True):
            assert g is not None
            assert bool(g.any()) == (name in case.method.moves)


@ANY
def test_as_many_numbers_train_as_the_formula_says(case: Combination) -> None:
    made, total = case.model(), sum(p.size for p in case.base().parameters())
    expected = sum(
        case.method.count(layer.in_features, layer.out_features) for layer in layers(made).values()
    )
    assert made.get_nb_trainable_parameters() == (expected, total + expected)
    planned = plan_adapter(describe_model(case.base()), case.config()).shapes()
    assert {key: p.shape for key, p in made.adapter_parameters("default").items()} == planned


@ANY
def test_only_the_adapter_trains(case: Combination) -> None:
    made = case.model().train()
    own, before = {id(p) for layer in layers(made).values() for p in tensors(layer)}, bits(made)
    loss(made).backward()
    assert all((p.grad is not None) == (id(p) in own) for p in made.parameters())
    params = [p for p in made.parameters() if p.requires_grad]
    SGD(params, lr=0.1).step([p.grad for p in params])
    changed = {name for name, after in bits(made).items() if after != before[name]}
    assert changed == {name for name, p in made.named_parameters() if id(p) in own}


# ---- gradients ------------------------------------------------------------------------------------------------------


@HOST
def test_every_gradient_is_true(case: Combination) -> None:
    layer = layers(case.model("float64"))["model.layers.0.self_attn.v_proj"]
    adapter, leaves = layer.adapters["default"], [p.data for p in tensors(layer)]
    hold(adapter, case.method, layer.base_layer.dense_weight())

    def run(x: Tensor, *given: Tensor) -> Tensor:
        for name, value in zip(adapter.TENSORS, given, strict=True):
            setattr(adapter, name, value)
        return layer(x)

    check_gradient(run, inputs(case, layer)[0], *leaves)


@ANY
@ANY_DTYPE
def test_a_step_s_weight_computes_what_the_layer_does(case: Combination, dtype: str) -> None:
    """y and all gradients: 2 gamma_n S, for the I + r + 8 roundings on the way to y, and O more and a row each back.

    Where no weight is formed there is one way only, and the bits are equal.
    """
    for layer in layers(case.model(dtype)).values():
        x, dy = inputs(case, layer)
        leaves, ways = [Tensor(x, requires_grad=True), *tensors(layer)], []
        for prepare in (layer.end_step, layer.prepare_step):
            prepare()
            y = layer(leaves[0])
            ways.append([y.data, *gradients(y, leaves, dy)])
        assert formed(layer) == due(case)
        n = layer.in_features + layer.out_features + R + ROWS + 8
        for one, other, scale in zip(*ways, absolute(layer, case.method, x, dy), strict=True):
            assert one.dtype == other.dtype == np.dtype(dtype)
            assert within(one, other, 2 * gamma(n, dtype) * scale if due(case) else 0)


@ANY
def test_with_dropout_nothing_is_prepared(case: Combination) -> None:
    """The masks differ from shard to shard. Without training there are none."""
    dropped, plain = case.model(lora_dropout=0.5).train(), case.model()
    for layer, like in zip(layers(dropped).values(), layers(plain).values(), strict=True):
        x = Tensor(inputs(case, layer)[0])
        assert not layer.merges(None)
        with dropout_counter(1, 2):
            expected = layer(x).data
            layer.prepare_step()
            assert layer(x).data.tobytes() == expected.tobytes()
        still = layer.eval()(x).data
        assert still.tobytes() != expected.tobytes()
        assert still.tobytes() == like(x).data.tobytes()
        layer.prepare_step()
        assert formed(layer) == due(case)


@HOST
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_device_has_the_same_bits_and_is_never_waited_for(
    case: Combination, dropout: float
) -> None:
    found, batch = [], Batch(IDS[:, :-1], IDS[:, 1:])
    for there in (case._replace(device="strict"), case):
        made = there.model(lora_dropout=dropout).train()
        params = [p for p in made.parameters() if p.requires_grad]
        with ShardedStep(made, shard=2) as sharded:
            if there.backend is STRICT:
                with no_sync():
                    value, grads = sharded.gradients(batch, params)
            else:
                value, grads = sharded.gradients(batch, params)
        if case.method.merges:
            made.merge_adapter()
        found.append(
            [
                float(value),
                *(there.backend.to_numpy(g).tobytes() for g in grads),
                *bits(made).values(),
            ]
        )
    assert found[0] == found[1]


# ---- merging --------------------------------------------------------------------------------------------------------


def summed(W: np.ndarray, part: Part) -> np.ndarray:
    """W + c B A, or DoRA's k (W + c B A), in float64, in the order in which it is merged."""
    V = (part.c * part.B) @ part.A + W
    if part.m is not None:
        V *= (part.m / np.sqrt(np.einsum("oi,oi->o", V, V)))[:, None]
    return V


@MERGING
@ANY_DTYPE
def test_merged_it_gives_the_same_and_comes_out_again(case: Combination, dtype: str) -> None:
    """Property 9: |merged - y| <= 2 gamma_(I + r + 6) S. What is merged is fl(W + dW), and W comes back, every bit.

    In sixteen bits fl is bfloat16's, whose u is 2^-8.
    """
    made, half = case.model(dtype), case.kind == "bfloat16"
    whole, found = logits(made), layers(made).values()
    bases, deltas = (
        [layer.base_layer for layer in found],
        [layer.delta_weight("default") for layer in found],
    )
    before = [layer(Tensor(inputs(case, layer)[0])).data for layer in found]
    scales = [absolute(layer, case.method, *inputs(case, layer))[0] for layer in found]
    made.merge_adapter()
    for layer, base, dW, y, scale in zip(found, bases, deltas, before, scales, strict=True):
        W = case.backend.to_numpy(base.dense_weight()).astype(np.float64)
        assert type(layer.base_layer) is (HalfLinear if half else Linear)
        assert layer.base_layer.bias is base.bias
        assert not layer.base_layer.trainable
        exact = summed(W, layer.adapters["default"].part())
        expected = encode_half(exact, case.kind).decode(dtype) if half else exact.astype(dtype)
        assert np.abs(exact - (W + dW)).max() <= 1e-14 * np.abs(exact).max()
        assert layer.base_layer.weight.numpy().tobytes() == expected.tobytes()
        assert layer.delta_weight("default").tobytes() == dW.tobytes()  # of the base that is kept
        merged = layer(Tensor(inputs(case, layer)[0])).data
        assert within(
            merged, y, (2 * gamma(layer.in_features + R + 6, dtype) + half * 2.0**-8) * scale
        )
    merged_bits, merged_logits = bits(made), logits(made).tobytes()
    with made.disable_adapter():
        assert logits(made).tobytes() == logits(case.base(dtype)).tobytes()
    assert (bits(made), logits(made).tobytes()) == (merged_bits, merged_logits)
    made.unmerge_adapter()
    assert all(layer.base_layer is base for layer, base in zip(found, bases, strict=True))
    assert logits(made).tobytes() == whole.tobytes()
    plain = made.merge_and_unload()
    assert logits(plain).tobytes() == merged_logits
    assert not quantization_report(plain)
    assert all(p.requires_grad != p.fixed for p in plain.parameters())
    assert list(bits(plain)) == list(bits(case.base(dtype)))


@MERGING
def test_what_is_not_finite_is_not_merged(case: Combination) -> None:
    """The last layer's: those before it have been merged by then, and come out again."""
    made = case.model()
    found = list(layers(made).values())
    for p in tensors(found[-1]):
        good = p.data
        for value in (np.nan, np.inf):
            spoilt = p.numpy().copy()
            spoilt[1] = value
            p.data = p.backend.from_numpy(spoilt)
            before = bits(made)
            with pytest.raises(
                NonFiniteError, match=r"^model\.layers\.0\.mlp\.down_proj: merging default"
            ):
                made.merge_adapter()
            assert bits(made) == before
            assert not any(layer.merged for layer in found)
        p.data = good


@CODED
def test_merged_into_codes_it_says_how_much_was_lost(case: Combination) -> None:
    made = case.model()
    for layer in layers(made).values():
        base, dW = layer.base_layer, layer.delta_weight("default")
        layer.merge(requantize=True)
        merged = layer.base_layer
        assert isinstance(merged, QuantizedLinear)
        for name in ("kind", "block_size", "double_quant"):
            assert getattr(merged.weight.quantized, name) == getattr(base.weight.quantized, name)
        left = merged.weight.numpy().astype(np.float64) - base.weight.numpy()
        assert merged.lost == pytest.approx(
            np.linalg.norm(left - dW) / np.linalg.norm(dW), rel=1e-5
        )
        assert 0 < merged.lost < 1
    codes = bits(made)
    with made.disable_adapter():
        assert logits(made).tobytes() == logits(case.base()).tobytes()
    assert bits(made) == codes
    plain = made.merge_and_unload(requantize=True)
    assert [row.lost is None for row in quantization_report(plain)] == [False] * 7
    assert type(plain.lm_head) is Linear  # a dense layer stays one


# ---- switching, files, copies ---------------------------------------------------------------------------------------


@ANY
def test_disabled_or_taken_out_it_is_the_base_bit_for_bit(case: Combination) -> None:
    made, plain = case.model(), case.base()
    changed, expected = logits(made).tobytes(), logits(plain).tobytes()
    assert changed != expected
    with made.disable_adapter():
        with made.disable_adapter():
            assert logits(made).tobytes() == expected
        assert logits(made).tobytes() == expected  # the inner block gives back what it found
    assert logits(made).tobytes() == changed
    assert bits(made.unload()) == bits(plain)
    assert logits(made.get_base_model()).tobytes() == expected


@ANY
def test_of_two_adapters_one_computes_and_trains(case: Combination) -> None:
    made = case.model()
    made.add_adapter("b", case.config(), seed=5)
    move(made, "b", seed=6)
    made.eval()
    alone, seen = logits(case.model()).tobytes(), []
    for name in ("default", "b", "default"):
        made.set_adapter(name)
        seen.append(logits(made).tobytes())
        trained = {id(p) for p in made.parameters() if p.requires_grad}
        assert trained == {id(p) for layer in layers(made).values() for p in tensors(layer, name)}
    assert seen[0] == seen[2] == alone != seen[1]
    if case.method.merges:
        made.merge_adapter(["default"])
        with pytest.raises(ConfigError, match="adapters default are merged"):
            made.set_adapter("b")
        made.unmerge_adapter()
    else:
        with pytest.raises(ConfigError, match="cannot be merged"):
            made.merge_adapter(["default"])
    made.delete_adapter("b")
    assert logits(made).tobytes() == alone


@ANY
def test_files_have_equal_bits_whoever_wrote_them(case: Combination, tmp_path: Path) -> None:
    made = case.model()
    made.save_pretrained(tmp_path / "first")
    stored = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert len(stored) == 7 * len(
        type(next(iter(layers(made).values())).adapters["default"]).TENSORS
    )
    assert {key: a.tobytes() for key, a in stored.items()} == {
        k: a.tobytes() for k, a in made.state_dict().items()
    }
    again = PeftModel.from_pretrained(case.base(), tmp_path / "first", "another")
    assert logits(again).tobytes() == logits(made).tobytes()
    assert not any(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path)
    case._replace(device="cpu").model().save_pretrained(tmp_path / "host")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("first", "another", "host")]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


@ANY
def test_a_copy_is_another_model_and_another_dtype_the_same_numbers(case: Combination) -> None:
    made = case.model()
    before, expected, twin = bits(made), logits(made).tobytes(), copy.deepcopy(made)
    assert bits(twin) == before
    assert logits(twin).tobytes() == expected
    assert not {id(p) for p in made.parameters()} & {id(p) for p in twin.parameters()}
    assert all(p.backend is case.backend for p in twin.parameters())
    move(twin, "default", seed=9)
    assert bits(made) == before
    held = [p.quantized for p in made.parameters() if isinstance(p, QuantizedWeight)]
    made.to(dtype="float64")
    params = [p for p in made.parameters() if p.requires_grad]
    assert (
        {p.dtype for p in made.parameters()}
        == {g.dtype for g in gradients(loss(made), params)}
        == {np.dtype("f8")}
    )
    assert [
        p.quantized.codes.tobytes() for p in made.parameters() if isinstance(p, QuantizedWeight)
    ] == [quantized.codes.tobytes() for quantized in held]
    made.to(dtype="float32")
    assert bits(made) == before
    assert logits(made).tobytes() == expected
