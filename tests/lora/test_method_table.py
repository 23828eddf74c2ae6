"""What holds of every method, over every base and backend: a new method is one row in methods.py.

The identities of a single method are in that method's file, those of one LoRA layer of any shape in
test_verify.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from methods import (
    TABLE,
    Combination,
    R,
    absolute,
    freeze_constants,
    gamma,
    layers,
    move,
    tensors,
)
from small import IDS, bits, logits
from strict_xp import STRICT, no_sync

from minilora import functional as F
from minilora.autograd import Tensor, gradients, no_grad
from minilora.data import Batch
from minilora.errors import ConfigError, FormatError, NonFiniteError
from minilora.formats import load_file, read_adapter, write_adapter
from minilora.gradcheck import check_gradient
from minilora.lora import LoraLinear, PeftModel, RankAllocator
from minilora.lora.factors import Part
from minilora.lora.targets.base import describe_model
from minilora.lora.targets.plan import plan_adapter
from minilora.models.decoding import Decoding, Weights
from minilora.models.generation import generate
from minilora.models.transformer import KeyValueCache
from minilora.nn import Linear, dropout_counter
from minilora.optim import SGD, AdamW
from minilora.quant import KINDS, QuantizedLinear, QuantizedWeight, quantization_report
from minilora.quant.half import HalfLinear, encode_half
from minilora.threads import Workers
from minilora.tools.inspecting import inspect_adapter
from minilora.training.parallel import ShardedStep
from minilora.verify import PROPERTIES, cases_of, verify_files

ROWS = 6
BATCH = Batch(IDS[:, :-1], IDS[:, 1:])


def over(rows: Iterable[Combination]) -> Any:
    return pytest.mark.parametrize("case", list(rows), ids="-".join)


HOSTED = [row for row in TABLE if row.device == "cpu"]
PLAIN = [row for row in HOSTED if row.kind == "dense"]
MERGEABLE = [row for row in TABLE if row.method.merges]

ANY = over(TABLE)
HOST = over(HOSTED)
DENSE = over(PLAIN)
MERGING = over(MERGEABLE)
REFUSING = over(row for row in TABLE if not row.method.merges)
CODED = over(row for row in MERGEABLE if row.kind in KINDS)
ANY_DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Files are saved hundreds of times; test_disk checks that they are on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


def loss(model: PeftModel) -> Tensor:
    return F.cross_entropy(model(BATCH.ids), BATCH.targets)


def trained(model: PeftModel) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def inputs(case: Combination, layer: LoraLinear) -> tuple[Any, Any]:
    """x (2, 3, I) and dL/dy (2, 3, O), at random."""
    rng = np.random.default_rng(0)
    arrays = []
    for size in layer.in_features, layer.out_features:
        values = rng.standard_normal((2, ROWS // 2, size)).astype(layer.dtype)
        arrays.append(case.backend.from_numpy(values))
    return arrays[0], arrays[1]


def weights(model: PeftModel) -> list[bytes]:
    return [layer.base_layer.dense_weight().tobytes() for layer in layers(model).values()]


def is_formed(layer: LoraLinear) -> bool:
    """Whether a weight has been formed for the step."""
    return any(layer._effective.values())


def is_due(case: Combination) -> bool:
    """Whether a step forms a weight: never of codes or in sixteen bits, and only if a dW exists."""
    return case.kind == "dense" and case.method.merges


def is_within(one: Any, other: Any, bound: Any) -> bool:
    return bool((abs(one - other) <= bound).all())


# ---- the properties that `minilora verify` measures ----

NEED_UPDATE = {"merge in any portions", "merge refuses", "unmerge", "files"}
# Merging into sixteen bits rounds to those; test_merge_adapter_... has the bound.
ROUND_ONCE = {
    "merged forward",
    "merge rounds once",
    "round trip",
    "DoRA's forward",
    "DoRA's rows",
}


@HOST
@ANY_DTYPE
def test_verify_properties_hold_for_the_layers_of_a_model(case: Combination, dtype: str) -> None:
    left_out: set[str] = set()
    if not case.method.merges:
        left_out |= NEED_UPDATE
    if case.kind == "bfloat16":
        left_out |= ROUND_ONCE
    assert left_out <= {claim.name for claim in PROPERTIES}
    measured = 0
    for subject in cases_of(case.model(dtype)):
        for claim in PROPERTIES:
            if claim.name in left_out or not claim.applies(subject):
                continue
            measured += 1
            assert claim.check(subject).ok, (claim.name, claim.check(subject))
    assert measured >= 7 * 2


# ---- the start, and what trains ----


@ANY
def test_get_peft_model_starts_as_the_base_bit_for_bit(case: Combination) -> None:
    """As it is, in a step, and merged where that is possible."""
    plain = case.base()
    model = case.model(moved=False)
    assert logits(model).tobytes() == logits(plain).tobytes()
    before = weights(model)
    plain.prepare_step()
    model.prepare_step()
    assert logits(model).tobytes() == logits(plain).tobytes()
    model.end_step()
    if not case.method.merges:
        return
    model.merge_adapter()
    if model.peft_config["default"].use_dora:
        # The magnitude is the norm rounded once, so k is one rounding from 1.
        for layer, start in zip(layers(model).values(), before, strict=True):
            merged = case.backend.to_numpy(layer.base_layer.dense_weight())
            W = np.frombuffer(start, merged.dtype).reshape(merged.shape)
            assert is_within(merged, W, np.spacing(np.abs(W)))
    else:
        assert weights(model) == before


@ANY
def test_gradients_at_the_start_are_zero_but_for_what_the_paper_names(case: Combination) -> None:
    model = case.model(moved=False)
    for layer in layers(model).values():
        grads = gradients(loss(model), tensors(layer))
        for name, g in zip(layer.adapters["default"].TENSORS, grads, strict=True):
            assert g is not None
            assert bool(g.any()) == (name in case.method.moves)


@ANY
def test_get_nb_trainable_parameters_follows_the_formula(case: Combination) -> None:
    model = case.model()
    sizes = [(layer.in_features, layer.out_features) for layer in layers(model).values()]
    expected = sum(case.method.count(I, O) for I, O in sizes)
    total = sum(p.size for p in case.base().parameters())
    assert model.get_nb_trainable_parameters() == (expected, total + expected)
    planned = plan_adapter(describe_model(case.base()), case.config()).shapes()
    shapes = {key: p.shape for key, p in model.adapter_parameters("default").items()}
    assert shapes == planned


@ANY
def test_backward_reaches_only_the_adapter(case: Combination) -> None:
    model = case.model().train()
    adapter_ids = {id(p) for layer in layers(model).values() for p in tensors(layer)}
    before = bits(model)
    loss(model).backward()
    for p in model.parameters():
        assert (p.grad is not None) == (id(p) in adapter_ids)
    params = trained(model)
    SGD(params, lr=0.1).step([p.grad for p in params])
    changed = {name for name, after in bits(model).items() if after != before[name]}
    assert changed == {name for name, p in model.named_parameters() if id(p) in adapter_ids}


@over(row for row in HOSTED if row.kind in ("dense", "nf4"))
def test_optimizer_steps_lower_the_loss(case: Combination) -> None:
    model = case.model(moved=False).train()
    params = trained(model)
    optimizer = AdamW(params, lr=0.02)
    ranks = RankAllocator.of(model) if case.name == "adalora" else None
    losses = []
    for _ in range(30):
        value = loss(model)
        grads = gradients(value, params)
        optimizer.step(grads)
        if ranks is not None:
            ranks.step(grads)
        losses.append(value.item())
    share = 0.2 if ranks is None else 0.5  # AdaLoRA cuts ranks meanwhile
    assert losses[-1] < share * losses[0]


# ---- gradients ----


@HOST
def test_gradients_match_finite_differences(case: Combination) -> None:
    layer = layers(case.model("float64"))["model.layers.0.self_attn.v_proj"]
    adapter = layer.adapters["default"]
    leaves = [p.data for p in tensors(layer)]
    freeze_constants(adapter, case.method, layer.base_layer.dense_weight())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        for name, value in zip(adapter.TENSORS, values, strict=True):
            setattr(adapter, name, value)
        return layer(x)

    check_gradient(run, inputs(case, layer)[0], *leaves)


@ANY
@ANY_DTYPE
def test_prepare_step_computes_what_the_layer_computes(case: Combination, dtype: str) -> None:
    """y and all gradients: 2 gamma_n S.

    n counts the I + r + 8 roundings of y, and O + rows more of each gradient. Where no weight is
    formed only one way exists, and the bits are equal.
    """
    for layer in layers(case.model(dtype)).values():
        x, dy = inputs(case, layer)
        leaves = [Tensor(x, requires_grad=True), *tensors(layer)]
        results = []
        for prepare in (layer.end_step, layer.prepare_step):
            prepare()
            y = layer(leaves[0])
            results.append([y.data, *gradients(y, leaves, dy)])
        assert is_formed(layer) == is_due(case)
        n = layer.in_features + layer.out_features + R + ROWS + 8
        unit = 2 * gamma(n, dtype) if is_due(case) else 0
        scales = absolute(layer, case.method, x, dy)
        for one, other, scale in zip(*results, scales, strict=True):
            assert one.dtype == other.dtype == np.dtype(dtype)
            assert is_within(one, other, unit * scale)


@ANY
def test_prepare_step_forms_nothing_with_dropout(case: Combination) -> None:
    """The masks differ from shard to shard. Outside training they do not exist."""
    dropped = layers(case.model(lora_dropout=0.5).train())
    plain = layers(case.model())
    for path, layer in dropped.items():
        x = Tensor(inputs(case, layer)[0])
        assert not layer.merges(None)
        with dropout_counter(1, 2):
            expected = layer(x).data.tobytes()
            layer.prepare_step()
            assert layer(x).data.tobytes() == expected
        still = layer.eval()(x).data.tobytes()
        assert still != expected
        assert still == plain[path](x).data.tobytes()
        layer.prepare_step()
        assert is_formed(layer) == is_due(case)


# ---- a step in shards ----


@HOST
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sharded_step_has_the_same_bits_on_a_device_without_waiting(
    case: Combination, dropout: float
) -> None:
    results = []
    for row in (case._replace(device="strict"), case):
        model = row.model(lora_dropout=dropout).train()
        params = trained(model)
        with ShardedStep(model, shard=2) as sharded:
            if row.backend is STRICT:
                with no_sync():
                    value, grads = sharded.gradients(BATCH, params)
            else:
                value, grads = sharded.gradients(BATCH, params)
        if case.method.merges:
            model.merge_adapter()
        host = [row.backend.to_numpy(g).tobytes() for g in grads]
        results.append([float(value), *host, *bits(model).values()])
    assert results[0] == results[1]


@DENSE
@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_step_finds_the_gradients_of_the_whole_batch(
    case: Combination, recompute: bool
) -> None:
    model = case.model("float64").train()
    model.get_base_model().gradient_checkpointing_enable(recompute)
    params = trained(model)
    expected = gradients(loss(model), params)
    with ShardedStep(model, 2, shard=1) as sharded:
        _, grads = sharded.gradients(BATCH, params)
    for g, want in zip(grads, expected, strict=True):
        assert g is not None
        assert np.abs(g - want).max() <= 1e-12


@DENSE
def test_sharded_step_has_the_same_bits_for_any_number_of_threads(case: Combination) -> None:
    model = case.model(lora_dropout=0.2).train()
    params = trained(model)
    results = set()
    for threads in (1, 2, 3):
        with ShardedStep(model, threads, shard=1) as sharded:
            value, grads = sharded.gradients(BATCH, params, 3, 4)
        results.add((float(value), *(g.tobytes() for g in grads)))
    assert len(results) == 1


# ---- generating ----


@DENSE
def test_generate_takes_the_tokens_of_whole_forwards(case: Combination) -> None:
    model = case.model()
    expected = IDS[:, :3]
    for _ in range(4):
        newest = model(expected).data[:, -1].argmax(-1)
        expected = np.concatenate([expected, newest[:, None]], axis=1)
    assert np.array_equal(generate(model, IDS[:, :3], 4, temperature=0), expected)


@DENSE
def test_decoding_weights_include_the_update(case: Combination) -> None:
    model = case.model()
    base = model.get_base_model()
    cache = KeyValueCache(base, 2, 10)
    with no_grad(), Workers(1) as workers:
        model(IDS[:, :9], cache=cache)
        decoder = Weights.of(base, workers)
        assert (decoder is not None) == case.method.merges
        if decoder is not None:
            newest = Decoding(decoder, cache)(IDS[:, 9])
            assert newest == pytest.approx(model(IDS).data[:, 9], abs=1e-4)


# ---- merging ----


def merged_sum(W: np.ndarray, part: Part) -> np.ndarray:
    """W + c B A, or DoRA's k (W + c B A), in float64 and in the order in which it is merged."""
    V = (part.c * part.B) @ part.A + W
    if part.m is not None:
        V *= (part.m / np.sqrt(np.einsum("oi,oi->o", V, V)))[:, None]
    return V


@MERGING
@ANY_DTYPE
def test_merge_adapter_keeps_the_output_and_unmerge_adapter_restores_the_base(
    case: Combination, dtype: str
) -> None:
    """Property 9: |merged - y| <= 2 gamma_(I + r + 6) S.

    The merged weight is fl(W + dW); W returns bit for bit. In sixteen bits fl is bfloat16's, whose
    u is 2^-8.
    """
    model = case.model(dtype)
    half = case.kind == "bfloat16"
    whole = logits(model).tobytes()
    wrappers = list(layers(model).values())
    bases = [layer.base_layer for layer in wrappers]
    deltas = [layer.delta_weight("default") for layer in wrappers]
    before = [layer(Tensor(inputs(case, layer)[0])).data for layer in wrappers]
    scales = [absolute(layer, case.method, *inputs(case, layer))[0] for layer in wrappers]
    model.merge_adapter()
    for layer, base, dW, y, scale in zip(wrappers, bases, deltas, before, scales, strict=True):
        merged = layer.base_layer
        W = case.backend.to_numpy(base.dense_weight()).astype(np.float64)
        assert type(merged) is (HalfLinear if half else Linear)
        assert merged.bias is base.bias
        assert not merged.trainable
        exact = merged_sum(W, layer.adapters["default"].part())
        assert is_within(exact, W + dW, 1e-14 * np.abs(exact).max())
        expected = encode_half(exact, case.kind).decode(dtype) if half else exact.astype(dtype)
        assert merged.weight.numpy().tobytes() == expected.tobytes()
        assert layer.delta_weight("default").tobytes() == dW.tobytes()  # over the base that is kept
        output = layer(Tensor(inputs(case, layer)[0])).data
        unit = 2 * gamma(layer.in_features + R + 6, dtype) + half * 2.0**-8
        assert is_within(output, y, unit * scale)
    merged_bits = bits(model)
    merged_logits = logits(model).tobytes()
    with model.disable_adapter():
        assert logits(model).tobytes() == logits(case.base(dtype)).tobytes()
    assert bits(model) == merged_bits
    assert logits(model).tobytes() == merged_logits
    model.unmerge_adapter()
    for layer, base in zip(wrappers, bases, strict=True):
        assert layer.base_layer is base
    assert logits(model).tobytes() == whole
    plain = model.merge_and_unload()
    assert logits(plain).tobytes() == merged_logits
    assert not quantization_report(plain)
    assert all(p.requires_grad != p.fixed for p in plain.parameters())
    assert list(bits(plain)) == list(bits(case.base(dtype)))


@MERGING
def test_merge_adapter_refuses_what_is_not_finite(case: Combination) -> None:
    """In the last layer: those before it have been merged by then, and are restored."""
    model = case.model()
    wrappers = list(layers(model).values())
    for p in tensors(wrappers[-1]):
        good = p.data
        for value in (np.nan, np.inf):
            spoilt = p.numpy().copy()
            spoilt[1] = value
            p.data = p.backend.from_numpy(spoilt)
            before = bits(model)
            message = r"^model\.layers\.0\.mlp\.down_proj: merging default"
            with pytest.raises(NonFiniteError, match=message):
                model.merge_adapter()
            assert bits(model) == before
            assert not any(layer.merged for layer in wrappers)
        p.data = good


@REFUSING
@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
def test_merge_adapter_without_a_dW_is_refused_and_changes_nothing(
    case: Combination, action: str
) -> None:
    model = case.model()
    before = bits(model)
    output = logits(model).tobytes()
    with pytest.raises(ConfigError, match="cannot be merged"):
        getattr(model, action)()
    assert bits(model) == before
    assert logits(model).tobytes() == output
    assert not any(layer.merged for layer in layers(model).values())


@CODED
def test_merge_into_codes_reports_how_much_was_lost(case: Combination) -> None:
    model = case.model()
    for layer in layers(model).values():
        base = layer.base_layer
        dW = layer.delta_weight("default")
        layer.merge(requantize=True)
        merged = layer.base_layer
        assert isinstance(merged, QuantizedLinear)
        for name in ("kind", "block_size", "double_quant"):
            assert getattr(merged.weight.quantized, name) == getattr(base.weight.quantized, name)
        left = merged.weight.numpy().astype(np.float64) - base.weight.numpy()
        lost = np.linalg.norm(left - dW) / np.linalg.norm(dW)
        assert merged.lost == pytest.approx(lost, rel=1e-5)
        assert 0 < merged.lost < 1
    codes = bits(model)
    with model.disable_adapter():
        assert logits(model).tobytes() == logits(case.base()).tobytes()
    assert bits(model) == codes
    plain = model.merge_and_unload(requantize=True)
    assert [row.lost is None for row in quantization_report(plain)] == [False] * 7
    assert type(plain.lm_head) is Linear  # a dense layer stays dense


# ---- switching ----


@ANY
def test_disable_adapter_and_unload_give_the_base_bit_for_bit(case: Combination) -> None:
    model = case.model()
    plain = case.base()
    changed = logits(model).tobytes()
    expected = logits(plain).tobytes()
    assert changed != expected
    with model.disable_adapter():
        with model.disable_adapter():
            assert logits(model).tobytes() == expected
        assert logits(model).tobytes() == expected  # the inner block restores what it met
    assert logits(model).tobytes() == changed
    assert bits(model.unload()) == bits(plain)
    assert logits(model.get_base_model()).tobytes() == expected


@ANY
def test_set_adapter_makes_one_of_two_compute_and_train(case: Combination) -> None:
    model = case.model()
    model.add_adapter("b", case.config(), seed=5)
    move(model, "b", seed=6)
    model.eval()
    alone = logits(case.model()).tobytes()
    outputs = []
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        outputs.append(logits(model).tobytes())
        active = {id(p) for layer in layers(model).values() for p in tensors(layer, name)}
        assert {id(p) for p in trained(model)} == active
    assert outputs[0] == outputs[2] == alone != outputs[1]
    if case.method.merges:
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="unmerged, to be inactive: default"):
            model.set_adapter("b")
        assert logits(model).tobytes() == outputs[1]
        model.set_adapter("default")
    else:
        with pytest.raises(ConfigError, match="cannot be merged"):
            model.merge_adapter(["default"])
    model.delete_adapter("b")
    assert logits(model).tobytes() == alone


# ---- files ----


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@ANY
def test_save_pretrained_writes_equal_bits_under_any_name_and_device(
    case: Combination, tmp_path: Path
) -> None:
    model = case.model()
    model.save_pretrained(tmp_path / "first")
    stored = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert len(stored) == 7 * len(case.method.keys)
    assert {key.partition("_proj.")[2] for key in stored} == case.method.keys
    state = {key: array.tobytes() for key, array in model.state_dict().items()}
    assert {key: array.tobytes() for key, array in stored.items()} == state
    again = PeftModel.from_pretrained(case.base(), tmp_path / "first", "another")
    assert logits(again).tobytes() == logits(model).tobytes()
    assert not trained(again)
    again.save_pretrained(tmp_path)
    case._replace(device="cpu").model().save_pretrained(tmp_path / "host")
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "another")
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "host")


@DENSE
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_from_pretrained_names_a_tensor_that_does_not_fit(
    case: Combination, change: str, tmp_path: Path
) -> None:
    case.model().save_pretrained(tmp_path)
    raw, stored = read_adapter(tmp_path)
    for ending in case.method.keys:
        key = next(key for key in stored if key.endswith(f"q_proj.{ending}"))
        changed = dict(stored)
        wrong = changed.pop(key)
        if change == "shape":
            changed[key] = wrong[:-1]
        write_adapter(tmp_path, raw, changed)
        with pytest.raises(FormatError, match=key):
            PeftModel.from_pretrained(case.base(), tmp_path)


@over(row for row in PLAIN if row.method.merges)
def test_inspect_adapter_and_verify_files_read_a_saved_adapter(
    case: Combination, tmp_path: Path
) -> None:
    model = case.model()
    model.save_pretrained(tmp_path / "adapter")
    case.base().save_pretrained(tmp_path / "base")
    wrappers = layers(model)
    for row in inspect_adapter(tmp_path / "adapter")["tensors"]:
        adapter = wrappers[row["layer"]].adapters["default"]
        E = adapter.lora_E.data if case.name == "adalora" else 1
        product = adapter.scaling * adapter.lora_B.data @ (E * adapter.lora_A.data)
        assert float(row["|dW|"]) == pytest.approx(np.linalg.norm(product), rel=1e-3)
    report = verify_files(tmp_path / "base", tmp_path / "adapter")
    assert all(row.ok for row in report.rows)
    assert len(report.layers) == 7
    for finding in report.layers:
        norm = np.linalg.norm(wrappers[finding.layer].delta_weight("default"))
        assert finding.dW == pytest.approx(norm, rel=1e-6)


# ---- copies ----


@ANY
def test_deepcopy_is_another_model_and_to_keeps_the_numbers(case: Combination) -> None:
    model = case.model()
    before = bits(model)
    expected = logits(model).tobytes()
    twin = copy.deepcopy(model)
    assert bits(twin) == before
    assert logits(twin).tobytes() == expected
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert all(p.backend is case.backend for p in twin.parameters())
    move(twin, "default", seed=9)
    assert bits(model) == before
    codes = stored_codes(model)
    model.to(dtype="float64")
    assert {p.dtype for p in model.parameters()} == {np.dtype("f8")}
    assert {g.dtype for g in gradients(loss(model), trained(model))} == {np.dtype("f8")}
    assert stored_codes(model) == codes
    model.to(dtype="float32")
    assert bits(model) == before
    assert logits(model).tobytes() == expected


def stored_codes(model: PeftModel) -> list[bytes]:
    quantized = [p.quantized for p in model.parameters() if isinstance(p, QuantizedWeight)]
    return [weight.codes.tobytes() for weight in quantized]
