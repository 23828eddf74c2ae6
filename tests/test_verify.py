"""The list of properties holds for any layer, and each entry catches a mistake of its own; so does the command."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora.functional as F
import minilora.lora.combining
import minilora.lora.dora
import minilora.lora.hydra
import minilora.lora.model
import minilora.lora.multitask
import minilora.verify.run
from minilora import fused, quant
from minilora.autograd import Tensor, record
from minilora.cli import main
from minilora.errors import FormatError, NonFiniteError
from minilora.formats import load_file, save_file
from minilora.lora import (
    AdaLoraAdapter,
    DoraAdapter,
    HydraAdapter,
    LoraAdapter,
    LoraConfig,
    LoraLinear,
    PeftModel,
    RankAllocator,
    get_peft_model,
)
from minilora.lora.combining import cat, padded, resized
from minilora.lora.embedding import EmbeddingAdapter, HeadAdapter
from minilora.lora.layer import Wrapper
from minilora.nn import Dropout, Linear, LinearBase, Parameter
from minilora.optim import SGD
from minilora.quant import BLOCK_SIZES, KINDS, Quantized
from minilora.transformer import CausalLM, TransformerConfig
from minilora.verify import (
    PROPERTIES,
    Case,
    Measured,
    make_case,
    measure,
    of_adalora,
    of_codes,
    of_dora,
    of_ends,
    of_layers,
    of_lora,
    of_sums,
    of_tasks,
    over_codes,
    random_case,
    verify,
    verify_files,
)
from minilora.verify.case import ADAPTERS
from minilora.verify.measuring import worst
from minilora.verify.run import rounded

BY_NAME = {p.name: p for p in PROPERTIES}
LORAS = {p.name for room in (of_lora, of_layers, of_tasks, of_sums, of_ends) for p in room.PROPERTIES}
EXACT = {
    "start is the base", "disabled is the base", "count", "gauge by powers of two", "start moves B alone",
    "merge in any portions", "merge refuses", "unmerge", "files", "dropout off", "dropout spares the base",
    "files of both ends",
    "DoRA starts as the base", "DoRA's scale", "DoRA's count",
    "AdaLoRA starts as the base", "AdaLoRA's count", "AdaLoRA's penalty at rest", "AdaLoRA's budget",
    "absmax stays", "coded again", "codes know no scale", "codes know no neighbour", "codes in bytes", "bits",
    "absent task",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """`files` saves hundreds of times; that a file is on the disk before it has its name is test_disk's."""
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr("os.fsync", lambda file: None)
        yield


def sample(kind: str, quantized: bool) -> Case:
    case = make_case(3, 9, 7, [2] if kind == "dora" else [2, 2], [4] if kind == "dora" else [4, 8], kind=kind)
    return over_codes(case) if quantized else case


SAMPLES = {(kind, quantized): sample(kind, quantized) for kind in ADAPTERS for quantized in (False, True)}
APPLIES = {p.name: [of for of, case in SAMPLES.items() if p.applies(case)] for p in PROPERTIES}


@st.composite
def cases(draw: st.DrawFn, of: list[tuple[str, bool]]) -> Case:
    """Any shape from 1 x 1, any rank, above full rank too, any scale, dtype and codes, one to three adapters."""
    kind, quantized = draw(st.sampled_from(of))
    count = 1 if kind == "dora" else draw(st.integers(1, 3))
    ranks = draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    case = make_case(
        draw(st.integers(0, 2**32)),
        draw(st.integers(1, 24)),
        draw(st.integers(1, 24)),
        ranks[:1] * count if kind == "adalora" else ranks,
        draw(st.lists(st.floats(0.01, 1000), min_size=count, max_size=count)),
        draw(st.sampled_from(["float32", "float64"])),
        use_rslora=draw(st.booleans()),
        bias=draw(st.booleans()),
        rows=(draw(st.integers(1, 3)), draw(st.integers(1, 7))),
        exponents=(draw(st.integers(-9, 9)), draw(st.integers(-9, 9)), draw(st.integers(-9, 9))),
        kind=kind,
    )
    if not quantized:
        return case
    return over_codes(
        case, draw(st.sampled_from(KINDS)), draw(st.sampled_from(BLOCK_SIZES[:3])), double_quant=draw(st.booleans())
    )


@pytest.mark.parametrize("name", BY_NAME)
@given(data=st.data())
def test_a_property_holds_for_any_layer(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(APPLIES[name]))
    if BY_NAME[name].applies(case):
        found = BY_NAME[name].check(case)
        assert found.ok, found
        assert (found.bound == 0) == (name in EXACT) or found.measured == 0


def state(case: Case) -> Any:
    """All that a layer is."""
    layer = case.subject
    modules = [
        {k: v for k, v in vars(m).items() if not isinstance(v, (Parameter, dict, Linear))}
        for _, m in layer.named_modules()
    ]
    parameters = {name: (p.numpy().tobytes(), p.requires_grad, p.grad) for name, p in layer.named_parameters()}
    weight = case.weight if case.weight is not None else layer.base_layer.weight.data
    held = [(name, id(adapter)) for name, adapter in layer.adapters.items()]
    return repr(modules), parameters, held, id(layer.base_layer), id(weight), weight.tobytes(), case.x.tobytes()


@pytest.mark.parametrize(("name", "of"), [(name, of) for name, many in APPLIES.items() for of in many])
def test_a_measurement_leaves_the_layer_as_it_was_and_repeats_itself(name: str, of: tuple[str, bool]) -> None:
    case = SAMPLES[of]
    before, versions = state(case), [p.version[0] for p in case.subject.parameters() if p.version]
    first = BY_NAME[name].check(case)
    assert BY_NAME[name].check(case) == first
    assert state(case) == before
    assert [p.version[0] for p in case.subject.parameters() if p.version] == versions


# ---- the default run ----


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return {row.property: row for row in verify()}


def test_every_property_holds_and_was_measured(rows: dict[str, Any]) -> None:
    assert list(rows) == list(BY_NAME)
    assert all(row.ok for row in rows.values())
    assert all(row.cases >= 40 for row in rows.values())
    assert len(BY_NAME) == len(PROPERTIES)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - EXACT))
def test_no_bound_is_far_too_loose(name: str, rows: dict[str, Any]) -> None:
    print(f"{name}: {rows[name].ratio:.4f}")
    assert 1e-3 < rows[name].ratio <= 1


@pytest.mark.parametrize("name", sorted(EXACT))
def test_what_is_exact_has_no_tolerance(name: str, rows: dict[str, Any]) -> None:
    assert (rows[name].measured, rows[name].bound, rows[name].ratio) == (0, 0, 0)


def test_random_cases_repeat_themselves_and_reach_the_corners() -> None:
    made = [random_case(seed) for seed in range(100)]
    assert state(random_case(7))[1] == state(random_case(7))[1]
    shapes = [case.subject.base_layer.weight.shape for case in made]
    ranks = [a.r for case in made for a in case.subject.adapters.values()]
    assert {1} < {side for shape in shapes for side in shape}
    assert any(r > max(shape) for case, shape in zip(made, shapes, strict=True) for r in [case.configs["a0"].r])
    assert max(ranks) > 16
    assert {case.dtype.name for case in made} == {"float32", "float64"}
    assert {case.subject.base_layer.bias is None for case in made} == {True, False}
    assert {len(case.configs) for case in made} == {1, 2, 3}
    coded = [random_case(seed, quantized=True) for seed in range(50)]
    held = [case.subject.base_layer.weight.quantized for case in coded]
    assert {q.kind for q in held} == set(KINDS)
    assert {q.double_quant for q in held} == {True, False}
    assert max(q.size / q.block_size for q in held) > 256  # absmax have more than one scale, too
    assert any(q.size % q.block_size for q in held)


def test_counts_that_are_known() -> None:
    """c_attn of GPT-2 (r = 8), 0.2364 % of its 124,734,720 with them; q_proj and v_proj of Llama-2-7B (r = 8)."""

    def numbers(kind: str, inputs: int, outputs: int, r: int) -> int:
        size = LinearBase()  # a size and nothing else: no memory
        size.in_features, size.out_features = inputs, outputs
        return sum(math.prod(shape) for shape in ADAPTERS[kind].shapes(size, r).values())

    assert 12 * numbers("lora", 768, 2304, 8) == 294_912
    assert round(100 * 294_912 / 124_734_720, 4) == 0.2364
    assert 32 * 2 * numbers("lora", 4096, 4096, 8) == 4_194_304
    assert 32 * 2 * numbers("dora", 4096, 4096, 8) == 4_194_304 + 32 * 2 * 4096
    assert 32 * 2 * numbers("adalora", 4096, 4096, 8) == 4_194_304 + 32 * 2 * 8


# ---- measuring ----


@pytest.mark.parametrize(
    ("error", "bound", "ok", "ratio"),
    [
        (0.0, 0.0, True, 0.0),
        (1e-300, 0.0, False, math.inf),
        (math.nan, 1.0, False, math.inf),
        (math.nan, math.inf, False, math.inf),
        (0.0, math.nan, False, math.inf),
        (1.0, math.inf, False, 0.0),
        (math.inf, 1.0, False, math.inf),
        ([1.0, 3.0, 2.0], [2.0, 4.0, 8.0], True, 0.75),
        ([1.0, -9.0, 2.0], [2.0, 4.0, 8.0], False, 2.25),
        ([1.0, math.nan, 20.0], [2.0, 4.0, 8.0], False, math.inf),
        ([0.0, 0.0], [1.0, 0.0], True, 0.0),
    ],
)
def test_a_nan_never_passes_and_the_worst_entry_is_shown(error: Any, bound: Any, ok: bool, ratio: float) -> None:
    found = worst((np.array(error), np.array(bound)), (0, 0))
    assert (found.ok, found.ratio) == (ok, ratio)


def test_what_cannot_be_computed_does_not_hold() -> None:
    case = make_case(0, 4, 4, [2], [4])
    adapter = case.subject.adapters["a0"]
    adapter.lora_A.data = np.full_like(adapter.lora_A.data, math.nan)
    row = {r.property: r for r in measure([case])}["unmerge"]
    assert not row.ok
    assert "not finite" in row.note


# ---- each property catches a mistake of its own ----

Patch = Callable[[pytest.MonkeyPatch], None]
SABOTAGES: dict[str, tuple[set[str], Patch]] = {}


def breaks(*names: str) -> Callable[[Patch], Patch]:
    """Register a mistake and the properties that it violates: these and no others."""

    def add(patch: Patch) -> Patch:
        SABOTAGES[patch.__name__] = set(names), patch
        return patch

    return add


def wrong_layers() -> list[Case]:
    shapes: list[dict[str, Any]] = [
        {"inputs": 20, "outputs": 12, "ranks": [3, 2], "alphas": [6, 1]},
        {"inputs": 16, "outputs": 24, "ranks": [4], "alphas": [2]},
        {"inputs": 18, "outputs": 13, "ranks": [2, 5], "alphas": [3, 4], "dtype": "float64"},
    ]
    return [make_case(seed, use_rslora=True, **shape) for seed, shape in enumerate(shapes)]


def wrong_dora() -> list[Case]:
    return [make_case(i, 20, 12, [3], [6], dtype, kind="dora") for i, dtype in enumerate(("float32", "float64"))]


def wrong_adalora() -> list[Case]:
    """Their schedules cut something, and go on after that."""
    dtypes = {4: "float32", 5: "float64", 7: "float32"}
    return [make_case(seed, 20, 12, [4, 4], [6, 2], dtype, kind="adalora") for seed, dtype in dtypes.items()]


def wrong_codes() -> list[Case]:
    made = [make_case(i, 33, 7, [2], [6]) for i in range(6)]  # the last block is short, and the last byte half full
    return [over_codes(case, kind, 32, i > 2) for i, (case, kind) in enumerate(zip(made, 2 * KINDS, strict=True))]


WRONG: list[tuple[set[str], Callable[[], list[Case]]]] = [
    ({p.name for p in of_dora.PROPERTIES}, wrong_dora),
    ({p.name for p in of_adalora.PROPERTIES}, wrong_adalora),
    ({p.name for p in of_codes.PROPERTIES}, wrong_codes),
    (LORAS, wrong_layers),
]


def largest_A() -> float:
    return max(float(abs(a.lora_A.data).max()) for case in wrong_layers() for a in case.subject.adapters.values())


def after(mp: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """`owner.name` as it is, and then change(result, *arguments) in place of its result."""
    real = getattr(owner, name)

    def changed(*arguments: Any, **options: Any) -> Any:
        return change(real(*arguments, **options), *arguments)

    mp.setattr(owner, name, changed)


def shifted(y: Any, *rest: Any) -> Any:
    y._data = y.data + y.dtype.type(1e-3)
    return y


def in_backward(mp: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """lora_linear whose (dx, dy, dA, dB) go through change(grads, dy, x, A, B, s)."""

    def result(y: Any, x: Any, before: Any, A: Any, B: Any, s: float) -> Any:
        if y.node is not None:
            real, at = y.node.vjp, (F.rows(x.data), A.data, B.data, s)
            y.node.vjp = lambda dy: change(real(dy), F.rows(dy), *at)
        return y

    after(mp, F, "lora_linear", result)


@breaks("forward")
def the_base_adds_a_thousandth(mp: pytest.MonkeyPatch) -> None:
    after(mp, F, "linear", shifted)


@breaks("start is the base")
def B_does_not_start_at_zero(mp: pytest.MonkeyPatch) -> None:
    real = LoraAdapter.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self.lora_B.data = self.lora_B.data + self.lora_B.dtype.type(1e-3)

    mp.setattr(LoraAdapter, "__init__", init)


@breaks("disabled is the base")
def disabling_is_forgotten(mp: pytest.MonkeyPatch) -> None:
    real = Wrapper.running.fget

    def running(self: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "enabled", True)
            return real(self)

    mp.setattr(Wrapper, "running", property(running))


@breaks("sum")
def the_second_adapter_is_a_few_ulps_off(mp: pytest.MonkeyPatch) -> None:
    def change(out: Any, self: Any, x: Any, y: Any, base: Any) -> Any:
        if not self.dropout.active and y.data.shape == base(x).shape and not np.array_equal(y.data, base(x).data):
            out._data = out.data * (1 + 4 * np.finfo(out.dtype).eps)
        return out

    after(mp, LoraAdapter, "__call__", change)


@breaks("linear in s")
def s_saturates(mp: pytest.MonkeyPatch) -> None:
    known = {a.lora_A.data.tobytes(): a.scaling for c in wrong_layers() for a in c.subject.adapters.values()}

    def call(self: Any, x: Any, y: Any, base: Any) -> Any:
        s = min(self.scaling, known.get(self.lora_A.data.tobytes(), math.inf))
        return F.lora_linear(self.dropout(x), y, self.lora_A, self.lora_B, s)

    mp.setattr(LoraAdapter, "__call__", call)


@breaks("scaling")
def rslora_divides_by_another_root(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(LoraConfig, "scaling", lambda self, name: self.lora_alpha / self.r ** (0.501 if self.use_rslora else 1))


@breaks("count")
def an_adapter_has_one_number_more(mp: pytest.MonkeyPatch) -> None:
    after(mp, LoraAdapter, "__init__", lambda _, self, *rest: setattr(self, "more", Parameter(np.zeros(1, "f4"))))


def in_delta(mp: pytest.MonkeyPatch, change: Callable[..., np.ndarray]) -> None:
    """delta_weight over change(A, B) where a float32 layer's dW is formed in float64."""
    real = LoraAdapter.delta_weight

    def delta_weight(self: Any, W: np.ndarray) -> np.ndarray:
        if self.lora_A.dtype == np.float32 and W.dtype == np.float64:
            return change(self.lora_A.data.astype(W.dtype), self.lora_B.data.astype(W.dtype)) * self.scaling
        return real(self, W)

    mp.setattr(LoraAdapter, "delta_weight", delta_weight)


@breaks("rank")
def the_update_has_noise_of_full_rank(mp: pytest.MonkeyPatch) -> None:
    def change(A: np.ndarray, B: np.ndarray) -> np.ndarray:
        return B @ A + 1e-13 * np.random.default_rng(0).standard_normal((len(B), A.shape[1]))

    in_delta(mp, change)


@breaks("gauge")
def the_update_saturates_in_A(mp: pytest.MonkeyPatch) -> None:
    limits = {a.lora_A.shape: abs(a.lora_A.data).max() for c in wrong_layers() for a in c.subject.adapters.values()}
    real, of_layer = LoraAdapter.delta_weight, LoraLinear.delta_weight

    def of_all_but_sums(self: Any, name: str) -> np.ndarray:  # whose A is another one
        with pytest.MonkeyPatch.context() as inner:
            if name == "sum":
                inner.setattr(LoraAdapter, "delta_weight", real)
            return of_layer(self, name)

    def change(A: np.ndarray, B: np.ndarray) -> np.ndarray:
        return B @ np.where(np.isfinite(A), np.clip(A, -limits[A.shape], limits[A.shape]), A)

    in_delta(mp, change)
    mp.setattr(LoraLinear, "delta_weight", of_all_but_sums)


@breaks("gauge by powers of two")
def the_update_adds_an_epsilon_to_A(mp: pytest.MonkeyPatch) -> None:
    in_delta(mp, lambda A, B: B @ (A + 2.0**-50))


@breaks("gradients")
def one_entry_of_dA_is_a_few_ulps_off(mp: pytest.MonkeyPatch) -> None:
    def change(grads: Any, dy: Any, X: Any, A: Any, B: Any, s: float) -> Any:
        dx, through, dA, dB = grads
        scale = s * (abs(dy) @ abs(B)).T @ abs(X)
        dA = dA.copy()
        dA[0, 0] += 1.5 * (dy.shape[1] + len(X)) * np.finfo(dA.dtype).eps * scale[0, 0]
        return dx, through, dA, dB

    in_backward(mp, change)


@breaks("input gradient")
def dx_is_too_large(mp: pytest.MonkeyPatch) -> None:
    in_backward(mp, lambda grads, *rest: (grads[0] * 1.001, *grads[1:]))


@breaks("derivative")
def the_forward_saturates_in_A(mp: pytest.MonkeyPatch) -> None:
    limit = largest_A()

    def change(y: Any, x: Any, before: Any, A: Any, B: Any, s: float) -> Any:
        cut = np.clip(A.data, -limit, limit) - A.data
        if cut.any():
            y._data = y.data + (s * (F.rows(x.data) @ cut.T @ B.data.T)).reshape(y.shape).astype(y.dtype)
        return y

    after(mp, F, "lora_linear", change)


@breaks("start moves B alone")
def A_moves_at_the_start(mp: pytest.MonkeyPatch) -> None:
    def change(grads: Any, dy: Any, X: Any, A: Any, B: Any, s: float) -> Any:
        dx, through, dA, dB = grads
        return dx, through, dA if B.any() else dA + dA.dtype.type(1e-30), dB

    in_backward(mp, change)


@breaks("balance")
def sgd_steps_too_far(mp: pytest.MonkeyPatch) -> None:
    real = SGD.update
    mp.setattr(SGD, "update", lambda self, *others: real(self, *others[:-1], others[-1] * 1.001))


@breaks("effective weight")
def the_effective_weight_adds_a_thousandth(mp: pytest.MonkeyPatch) -> None:
    after(mp, fused, "effective_linear", shifted)


@breaks("merged forward")
def merging_loses_the_bias(mp: pytest.MonkeyPatch) -> None:
    after(mp, LoraLinear, "merge", lambda _, self, *rest: setattr(self.base_layer, "bias", None))


@breaks("merge rounds once")
def the_smallest_merged_weight_is_an_ulp_off(mp: pytest.MonkeyPatch) -> None:
    real = LoraLinear.merge

    def merge(self: Any, names: Any = None) -> None:
        before = self.merged
        real(self, names)
        if self.merged != before:
            W = self.base_layer.weight.data
            at = np.argmin(abs(W))
            W.flat[at] = np.nextafter(np.nextafter(W.flat[at], W.dtype.type(9)), W.dtype.type(9))

    mp.setattr(LoraLinear, "merge", merge)


@breaks("merge in any portions")
def what_is_merged_is_merged_again(mp: pytest.MonkeyPatch) -> None:
    real = LoraLinear.merge

    def merge(self: Any, names: Any = None) -> None:
        kept = self._original
        self._original = None  # goes on from the merged weight, where all merged adapters are added anew
        real(self, names)
        self._original = kept or self._original

    mp.setattr(LoraLinear, "merge", merge)


@breaks("merge refuses")
def a_merge_that_fails_says_nothing(mp: pytest.MonkeyPatch) -> None:
    real = LoraLinear.merge

    def merge(self: Any, names: Any = None) -> None:
        with contextlib.suppress(NonFiniteError):
            real(self, names)

    mp.setattr(LoraLinear, "merge", merge)


@breaks("unmerge")
def unmerging_subtracts(mp: pytest.MonkeyPatch) -> None:
    real = LoraLinear.unmerge

    def unmerge(self: Any) -> None:
        W = self.base_layer.dense_weight() - sum(self.delta_weight(name) for name in self.merged)
        real(self)
        self.base_layer.weight.data = W.astype(self.base_layer.dtype)

    mp.setattr(LoraLinear, "unmerge", unmerge)


@breaks("round trip")
def a_merged_layer_forgets_its_update(mp: pytest.MonkeyPatch) -> None:
    after(mp, LoraLinear, "delta_weight", lambda delta, self, name: 0 * delta if self.merged else delta)


@breaks("files")
def a_key_is_renamed(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.model, "file_key", lambda key, *rest: key.replace("lora_A", "lora_a"))


@breaks("dropout off")
def dropout_goes_on_in_evaluation(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(Dropout, "active", property(lambda self: self.p > 0))


@breaks("dropout spares the base")
def the_base_reads_what_is_left_by_dropout(mp: pytest.MonkeyPatch) -> None:
    real = LoraLinear.__call__

    def call(self: Any, x: Any) -> Any:
        running = self.running
        return real(self, running[0].dropout(x) if running else x)

    mp.setattr(LoraLinear, "__call__", call)


@breaks("dropout is unbiased")
def what_is_left_is_not_scaled(mp: pytest.MonkeyPatch) -> None:
    after(mp, F, "dropout", lambda y, x, p, key, first: y * (1 - p))


@breaks("dropout is unbiased")
def nothing_is_dropped(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(F, "dropout", lambda x, p, key, first: x)


@breaks("DoRA starts as the base")
def a_step_s_weight_is_an_ulp_too_small(mp: pytest.MonkeyPatch) -> None:
    def change(parts: Any, self: Any, W: np.ndarray) -> Any:
        W *= 1 - np.finfo(W.dtype).eps
        return parts

    after(mp, DoraAdapter, "effective", change)


@breaks("DoRA's forward")
def the_output_is_off_by_a_thousandth(mp: pytest.MonkeyPatch) -> None:
    after(mp, DoraAdapter, "__call__", lambda y, self, *rest: shifted(y) if self.lora_B.data.any() else y)


@breaks("DoRA's gradients")
def dm_is_a_thousandth_too_large(mp: pytest.MonkeyPatch) -> None:
    def change(k: Any, *rest: Any) -> Any:
        if k.node is not None:
            real = k.node.vjp
            k.node.vjp = lambda dk: (real(dk)[0] * 1.001,)
        return k

    after(mp, minilora.lora.dora, "scales", change)


@breaks("DoRA's scale")
def a_norm_has_an_epsilon(mp: pytest.MonkeyPatch) -> None:
    after(mp, F, "row_dot", lambda square, *rest: square + 32 * np.finfo(square.dtype).eps)


@breaks("DoRA's rows")
def k_is_a_few_ulps_too_large(mp: pytest.MonkeyPatch) -> None:
    def change(delta: np.ndarray, self: Any, W: np.ndarray) -> np.ndarray:
        return delta + (delta + W) * 40 * np.finfo(self.lora_A.dtype).eps

    after(mp, DoraAdapter, "delta_weight", change)


@breaks("DoRA's count")
def a_magnitude_too_many(mp: pytest.MonkeyPatch) -> None:
    after(mp, DoraAdapter, "__init__", lambda _, self, *rest: setattr(self, "z", Parameter(np.zeros(1, "f4"))))


@breaks("AdaLoRA starts as the base")
def E_does_not_start_at_zero(mp: pytest.MonkeyPatch) -> None:
    after(mp, AdaLoraAdapter, "__init__", lambda _, self, *rest: setattr(self.lora_E, "data", self.lora_E.data + 1))


@breaks("AdaLoRA's gradients")
def the_gradient_of_E_A_is_a_thousandth_too_large(mp: pytest.MonkeyPatch) -> None:
    in_backward(mp, lambda grads, *rest: (*grads[:2], grads[2] * 1.001, grads[3]))


@breaks("AdaLoRA's count")
def a_singular_value_too_many(mp: pytest.MonkeyPatch) -> None:
    after(mp, AdaLoraAdapter, "__init__", lambda _, self, *rest: setattr(self, "z", Parameter(np.zeros(1, "f4"))))


@breaks("AdaLoRA's penalty")
def one_entry_is_punished_apart(mp: pytest.MonkeyPatch) -> None:
    def change(R: Any, factors: Any) -> Any:
        R._data = R.data + R.dtype.type(1e-3) * abs(factors[0][0].data[0, -1])
        return R

    after(mp, of_adalora, "orthogonality", change)


@breaks("AdaLoRA's penalty at rest")
def orthonormal_factors_cost_something(mp: pytest.MonkeyPatch) -> None:
    def change(R: Any, factors: Any) -> Any:
        R._data = R.data + R.dtype.type(1e-9)
        return R

    after(mp, of_adalora, "orthogonality", change)


@breaks("AdaLoRA's penalty at rest")
def the_penalty_s_gradient_is_divided_by_a_norm_of_zero(mp: pytest.MonkeyPatch) -> None:
    def change(R: Any, factors: Any) -> Any:
        if R.node is not None:
            real = R.node.vjp
            R.node.vjp = lambda dy: tuple(g / R.data for g in real(dy))
        return R

    after(mp, of_adalora, "orthogonality", change)


@breaks("AdaLoRA's smoothing")
def an_average_forgets_too_little(mp: pytest.MonkeyPatch) -> None:
    after(mp, RankAllocator, "step", lambda _, self, *rest: setattr(self, "sensitivity", self.sensitivity * 1.001))


@breaks("AdaLoRA's order")
def the_first_triplets_count_more(mp: pytest.MonkeyPatch) -> None:
    after(mp, RankAllocator, "importance", lambda S, self: S * (1 - 1e-3 * np.arange(len(S), dtype=S.dtype)))


@breaks("AdaLoRA's budget")
def one_triplet_more_stays_at_the_end(mp: pytest.MonkeyPatch) -> None:
    after(mp, RankAllocator, "budget", lambda b, self, t: b + (t == self.final_step))


@breaks("AdaLoRA's budget")
def others_stay_than_the_most_important(mp: pytest.MonkeyPatch) -> None:
    real = RankAllocator._choose
    mp.setattr(RankAllocator, "_choose", lambda self, kept: real(self, kept[::-1].copy()))


@breaks("AdaLoRA's budget")
def what_was_cut_grows_again_after_the_last_allocation(mp: pytest.MonkeyPatch) -> None:
    def change(_: None, self: Any, grads: Any) -> None:
        if self.steps > self.final_step:
            for a in self.adapters.values():
                a.lora_E.data = a.lora_E.data + a.lora_E.dtype.type(1e-3)

    after(mp, RankAllocator, "step", change)


@breaks("AdaLoRA's pruning")
def what_is_left_is_scaled_up(mp: pytest.MonkeyPatch) -> None:
    """As if s were made of the triplets that are left."""
    real = AdaLoraAdapter.keep

    def keep(self: Any, kept: np.ndarray) -> None:
        real(self, kept)
        self.scaling *= len(kept) / max(self.r, 1)

    mp.setattr(AdaLoraAdapter, "keep", keep)


def in_encode(mp: pytest.MonkeyPatch, kinds: str, change: Callable[[Quantized, np.ndarray], Quantized]) -> None:
    """The codes of weights, of some kinds, go through change(codes, weights)."""
    after(mp, quant, "_encode", lambda held, flat, *rest: change(held, flat) if held.kind in kinds.split() else held)


def in_thresholds(mp: pytest.MonkeyPatch, kind: str, change: Callable[[np.ndarray], Any]) -> None:
    """Where one level ends and the next begins goes through change(thresholds)."""

    def changed(tables: Any, of: str, backend: Any) -> Any:
        return tables._replace(thresholds=np.float32(change(tables.thresholds))) if of == kind else tables

    after(mp, quant, "_tables", changed)


@breaks("half a gap")
def levels_begin_too_late(mp: pytest.MonkeyPatch) -> None:
    in_thresholds(mp, "int8", lambda t: t + 1e-3)


@breaks("absmax stays")
def absmax_has_an_odd_last_bit(mp: pytest.MonkeyPatch) -> None:
    def change(held: Quantized, flat: np.ndarray) -> Quantized:
        return dataclasses.replace(held, absmax=(held.absmax.view(np.int32) | 1).view(np.float32))

    in_encode(mp, "nf4 fp4 int8", change)


@breaks("coded again")
def a_level_lies_outside_its_own_interval(mp: pytest.MonkeyPatch) -> None:
    in_thresholds(mp, "nf4", lambda t: np.where(np.arange(15) == 7, 0.09, t))  # the eighth level is 0.0796


@breaks("codes know no scale")
def what_is_below_an_eighth_counts_as_nothing(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(quant, "_SMALLEST", 0.125)


@breaks("codes know no neighbour")
def every_other_weight_is_rounded_up(mp: pytest.MonkeyPatch) -> None:
    def change(held: Quantized, flat: np.ndarray) -> Quantized:
        codes, v = of_codes.codes(held), flat / np.repeat(held.absmax, held.block_size)[: len(flat)]
        codes = np.where((np.arange(len(v)) % 2 == 0) & (v > 0) & (v < 0.039), 8, codes)  # from 0 to 0.0796
        codes = np.append(codes, 7)[: 2 * len(held.codes)].astype(np.uint8)
        return dataclasses.replace(held, codes=(codes[0::2] << 4) | codes[1::2])

    in_encode(mp, "nf4", change)


@breaks("double quantisation")
def absmax_comes_back_a_hundredth_too_large(mp: pytest.MonkeyPatch) -> None:
    after(mp, Quantized, "decode_absmax", lambda absmax, self: absmax * np.float32(1 + 0.01 * self.double_quant))


@breaks("codes in bytes")
def the_last_byte_is_half_rubbish(mp: pytest.MonkeyPatch) -> None:
    def change(held: Quantized, flat: np.ndarray) -> Quantized:
        held.codes[-1] &= 0xFF if len(flat) % 2 == 0 else 0xF0
        return held

    in_encode(mp, "nf4", change)


@breaks("bits")
def a_byte_is_not_counted(mp: pytest.MonkeyPatch) -> None:
    real = Quantized.nbytes.fget
    mp.setattr(Quantized, "nbytes", property(lambda self: real(self) - 1))


@breaks("mixed batch")
def rows_come_back_in_another_place(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.multitask, "interleave", lambda y, *rest: y[np.roll(np.arange(len(y)), 1)])


@breaks("absent task")
def what_does_not_run_has_a_gradient(mp: pytest.MonkeyPatch) -> None:
    def change(y: Any, self: Any, x: Any) -> Any:
        idle = [a.lora_B for a in self.adapters.values() if a not in self.running]
        return record(y.data, (y, *idle), lambda dy: (dy, *(np.full_like(p.data, 1e-30) for p in idle)))

    after(mp, LoraLinear, "__call__", change)


@breaks("router")
def the_router_adds_up_to_a_few_ulps_more(mp: pytest.MonkeyPatch) -> None:
    after(mp, HydraAdapter, "weights", lambda w, *rest: w * (1 + (w.shape[-1] > 1) * 8 * np.finfo(w.dtype).eps))


@breaks("equal experts")
def an_expert_counts_a_thousandth_more(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.hydra, "mixture", lambda out, x, y, *rest: y + (out - y) * 1.001)


@breaks("embedding")
def an_embedding_s_adapter_counts_a_thousandth_more(mp: pytest.MonkeyPatch) -> None:
    after(mp, EmbeddingAdapter, "__call__", lambda out, self, ids, y, base: y + (out - y) * 1.001)


@breaks("one weight, two places")
def a_tied_head_has_a_copy_of_its_embedding_s_factor(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(HeadAdapter, "lora_A", property(lambda self: Tensor(self._source.lora_embedding_B.data.T)))


@breaks("files of both ends")
def a_tied_head_is_not_written(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.model, "repeated", lambda again, *_: {k: a for k, a in again.items() if "lora_" not in k})


@breaks("half precision")
def a_sum_is_rounded_to_float32_first(mp: pytest.MonkeyPatch) -> None:
    real = of_ends.bf16_from
    mp.setattr(of_ends, "bf16_from", lambda total: real(total.astype(np.float32)))


@breaks("half precision")
def a_half_goes_by_way_of_float32(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(of_ends, "to_half", lambda total: total.astype(np.float32).astype(np.float16))


@breaks("half precision")
def what_is_below_the_normal_halves_counts_as_nothing(mp: pytest.MonkeyPatch) -> None:
    after(mp, of_ends, "to_half", lambda half, *_: np.where(abs(half) < np.float16(2.0**-14), np.float16(0), half))


@breaks("principal part first")
def the_last_principal_term_is_forgotten(mp: pytest.MonkeyPatch) -> None:
    real = of_ends.low_rank
    mp.setattr(of_ends, "low_rank", lambda U, s, Vt, r: real(U, np.where(np.arange(len(s)) == r - 1, 0, s), Vt, r))


@breaks("weighted sum")
def a_sum_is_a_millionth_too_large(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.combining, "cat", lambda pair, *_: (pair[0], pair[1] * (1 + 1e-6)))


@breaks("weighted sum")
def the_last_direction_of_a_sum_is_forgotten(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(minilora.lora.combining, "svd", lambda parts, r: padded(*resized(*cat(parts), 1.0, r - 1)[:2], r))


@breaks("cross terms")
def what_linear_makes_of_several_is_a_millionth_too_large(mp: pytest.MonkeyPatch) -> None:
    change = lambda pair, parts: (pair[0], pair[1] * (1 + 1e-6 * (len(parts) > 1)))  # noqa: E731
    after(mp, minilora.lora.combining, "linear", change)


@breaks("best of lower rank")
def a_spectrum_lacks_a_hundredth(mp: pytest.MonkeyPatch) -> None:
    after(mp, of_ends, "singular_values", lambda values, *_: values * 0.99)


# Mistakes that are seen from several sides.


@breaks("weighted sum", "cross terms")
def a_minus_is_lost(mp: pytest.MonkeyPatch) -> None:
    real = minilora.lora.combining.linear
    mp.setattr(minilora.lora.combining, "linear", lambda parts: real([p._replace(c=abs(p.c)) for p in parts]))


@breaks(
    *("forward", "linear in s", "gradients", "input gradient", "balance", "merged forward"),
    *("dropout spares the base", "dropout is unbiased", "equal experts"),
)
def s_is_squared(mp: pytest.MonkeyPatch) -> None:
    def call(self: Any, x: Any, y: Any, base: Any) -> Any:
        return F.lora_linear(self.dropout(x), y, self.lora_A, self.lora_B, self.scaling**2)

    mp.setattr(LoraAdapter, "__call__", call)


@breaks("gradients", "derivative", "balance")
def dA_is_a_thousandth_too_large(mp: pytest.MonkeyPatch) -> None:
    in_backward(mp, lambda grads, *rest: (*grads[:2], grads[2] * 1.001, grads[3]))


@breaks("merge rounds once", "round trip", "principal part first")
def merging_adds_in_the_layer_s_precision(mp: pytest.MonkeyPatch) -> None:
    def change(A: np.ndarray, B: np.ndarray) -> np.ndarray:
        return (B.astype("f4") @ A.astype("f4")).astype(np.float64)

    def only_to_merge(self: Any, names: Any = None) -> None:
        with pytest.MonkeyPatch.context() as inner:
            in_delta(inner, change)
            real(self, names)

    real = LoraLinear.merge
    mp.setattr(LoraLinear, "merge", only_to_merge)


@breaks("count", "files")
def shapes_count_one_rank_too_many(mp: pytest.MonkeyPatch) -> None:
    real = LoraAdapter.shapes
    mp.setattr(LoraAdapter, "shapes", staticmethod(lambda base, r: real(base, r + 1)))


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_mistake_is_caught_by_what_it_violates_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, patch = SABOTAGES[name]
    patch(monkeypatch)
    layers = next(make for names, make in WRONG if names & expected)()
    failing = {row.property for row in measure(layers) if not row.ok}
    assert failing == expected


def test_every_property_has_a_mistake_of_its_own() -> None:
    alone = {name for names, _ in SABOTAGES.values() if len(names) == 1 for name in names}
    assert alone == set(BY_NAME)
    assert all(row.ok for _, make in WRONG for row in measure(make()))


# ---- somebody's own files ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    shape = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    base = CausalLM(TransformerConfig(**shape, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4))
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_files_are_measured_layer_by_layer_and_left_alone(files: Path) -> None:
    before = contents(files)
    report = verify_files(files / "base", files / "adapter")
    assert contents(files) == before
    assert all(row.ok for row in report.rows)
    assert {row.property for row in report.rows} == {"finite", "merge as stored", *LORAS} - {"sum", "cross terms"}
    assert {row.cases for row in report.rows if row.property not in ("finite", "rank")} == {4}
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(files / "base"), files / "adapter")
    found = {f.layer: f for f in report.layers}
    paths = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert list(found) == paths
    for path, layer in ((p, m) for p, m in model.get_base_model().named_modules() if p in paths):
        f, delta = found[path], layer.delta_weight("default")
        share = np.linalg.svd(delta, compute_uv=False)[:3] ** 2 / np.linalg.norm(delta) ** 2
        assert (f.shape, f.r, f.scaling, f.dtype, f.finite) == (
            f"8 x {layer.base_layer.in_features}",
            3,
            2.0,
            "F32",
            True,
        )
        assert math.isclose(f.dW, np.linalg.norm(delta), rel_tol=1e-13)
        assert math.isclose(f.W, np.linalg.norm(layer.base_layer.weight.data.astype(float)), rel_tol=1e-13)
        assert math.isclose(f.rank, np.exp(-(share * np.log(share)).sum()), rel_tol=1e-12)
        merged = (layer.base_layer.weight.data + delta).astype(np.float32)
        lost = np.linalg.norm(merged - (layer.base_layer.weight.data + delta)) / np.linalg.norm(delta)
        assert math.isclose(f.lost, lost, rel_tol=1e-12)
        assert 0.5 < f.error <= 1


@pytest.mark.parametrize(("dtype", "least"), [("F64", 0.0), ("F32", 1e-9), ("F16", 1e-5), ("BF16", 1e-4)])
def test_the_stored_dtype_is_seen_and_rounded_to_once(dtype: str, least: float, files: Path, tmp_path: Path) -> None:
    from minilora.formats import Entry, bf16_from, write_stream

    stored = {"F64": lambda a: a.astype("f8"), "F16": lambda a: a.astype("f2"), "BF16": bf16_from}
    cast = stored.get(dtype, np.asarray)
    tensors = {name: cast(a) for name, a in load_file(files / "base" / "model.safetensors").items()}
    (tmp_path / "config.json").write_bytes((files / "base" / "config.json").read_bytes())
    entries = [Entry(name, dtype, a.shape, lambda a=a: a) for name, a in tensors.items()]
    write_stream(tmp_path / "model.safetensors", entries)
    report = verify_files(tmp_path, files / "adapter")
    assert all(row.ok for row in report.rows)
    assert all(f.dtype == dtype and f.error <= 1 and least <= f.lost < 1000 * least + 1e-15 for f in report.layers)


@given(st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-4), st.sampled_from(["F64", "F32", "F16", "BF16"]))
def test_rounding_once_is_within_half_an_ulp(value: float, dtype: str) -> None:
    value = math.fmod(value, 60000) if dtype == "F16" else value
    near, half = rounded(np.array([value]), dtype)
    assert abs(near[0] - value) <= half[0]
    bits = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}[dtype]
    if abs(near[0]) > 1e-4:
        assert half[0] == 2.0 ** (math.frexp(near[0])[1] - bits - 1)


def test_a_wrong_rounding_would_be_seen(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    def truncating(total: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        near, half = rounded(total, dtype)
        return near + 2 * half * (abs(near) < abs(total)), half

    monkeypatch.setattr(minilora.verify.run, "rounded", truncating)
    row = {r.property: r for r in verify_files(files / "base", files / "adapter").rows}["merge as stored"]
    assert not row.ok
    assert 1 < row.measured <= 3  # half an ulp, and one more


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
A, B = FIRST.format("A"), FIRST.format("B")
Tensors = dict[str, np.ndarray]
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str | None]] = {  # how, and what FormatError says, if it is one
    "a NaN": (lambda t: t | {B: np.where(np.arange(3) == 1, np.float32(np.nan), t[B])}, None),
    "an inf": (lambda t: t | {A: np.where(np.arange(8) == 1, np.float32(np.inf), t[A])}, None),
    "dW overflows": (lambda t: t | {A: t[A] / abs(t[A]).max() * np.float32(3e38), B: t[B] * np.float32(1e3)}, None),
    "lora_A is zero": (lambda t: t | {A: 0 * t[A]}, None),
    "another rank": (lambda t: t | {A: t[A][:2]}, "(2, 8), the base needs (3, 8)"),
    "a missing key": (lambda t: {k: v for k, v in t.items() if k != B}, "missing"),
    "an unknown key": (lambda t: t | {"stranger": t[A]}, "unknown stranger"),
    "a swapped pair": (lambda t: t | {A: t[B], B: t[A]}, "the base needs"),
    "a transposed factor": (lambda t: t | {A: t[A].T}, "the base needs"),
}


def broken(files: Path, where: Path, how: str) -> Path:
    tensors = load_file(files / "adapter" / "adapter_model.safetensors")
    (where / "adapter_config.json").write_bytes((files / "adapter" / "adapter_config.json").read_bytes())
    save_file(where / "adapter_model.safetensors", BROKEN[how][0](tensors))
    return where


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_caught(how: str, files: Path, tmp_path: Path) -> None:
    adapter, message = broken(files, tmp_path, how), BROKEN[how][1]
    before = contents(tmp_path)
    if message:
        with pytest.raises(FormatError) as caught:
            verify_files(files / "base", adapter)
        assert message in str(caught.value)
    else:
        failing = [row for row in verify_files(files / "base", adapter).rows if not row.ok]
        assert failing
        assert all("layers.0.self_attn.q_proj" in row.where for row in failing)
    assert contents(tmp_path) == before


# ---- the command ----


def command(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["verify", *map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def test_the_command_prints_a_table() -> None:
    code, out, err = command("--cases", "3", "--seed", "5")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["property", "equation", "measured", "bound", "ratio", "ok", "source"]
    for name, p in BY_NAME.items():
        assert any(re.search(rf"^{re.escape(name)} .* True +{re.escape(p.source)}$", line) for line in lines), name
    assert lines[-1].startswith("worst measured / bound: ")
    assert command("--cases", "3", "--seed", "5")[1] == out
    assert command("--cases", "3", "--seed", "6")[1] != out


def test_the_command_reads_files(files: Path) -> None:
    code, out, err = command("--base", files / "base", "--adapter", files / "adapter")
    assert (code, err) == (0, "")
    assert "merge as stored" in out
    assert re.search(r"^model\.layers\.1\.mlp\.down_proj +8 x 12 +3 +2 ", out, re.MULTILINE)
    code, out, _ = command("--base", files / "base", "--adapter", files / "adapter", "--json")
    report = json.loads(out)
    assert (code, report["ok"], len(report["layers"])) == (0, True, 4)
    assert {row["property"] for row in report["rows"]} == {"finite", "merge as stored", *LORAS} - {"sum", "cross terms"}
    assert 0.5 < report["worst_ratio"] <= 1


@pytest.mark.parametrize("how", ["a NaN", "dW overflows"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_fails_with_one_line(how: str, options: tuple[str, ...], files: Path, tmp_path: Path) -> None:
    code, out, err = command("--base", files / "base", "--adapter", broken(files, tmp_path, how), *options)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("minilora: error: property '")
    assert "model.layers.0.self_attn.q_proj" in err
    if options:

        def strict(constant: str) -> None:
            raise AssertionError(constant)

        assert json.loads(out, parse_constant=strict)["ok"] is False
    else:
        assert re.search(r" False +\w", out)


@pytest.mark.parametrize(
    ("argv", "code", "named"),
    [
        (["--base", "somewhere"], 2, "neither"),
        (["--adapter", "somewhere"], 2, "neither"),
        (["--cases", "0"], 2, "--cases"),
        (["--seed", "-1"], 2, "--seed"),
        (["--base", "nowhere", "--adapter", "nowhere"], 4, "nowhere"),
        (["--base", "", "--adapter", "x"], 2, "--base"),
    ],
)
def test_a_mistake_on_the_command_line(argv: list[str], code: int, named: str) -> None:
    got, out, err = command(*argv)
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert named in err


def test_a_failing_property_is_shown_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    SABOTAGES["unmerging_subtracts"][1](monkeypatch)
    code, out, err = command("--cases", "5")
    assert code == 1
    assert err.startswith("minilora: error: property 'unmerge' fails: W comes back, every bit: measured ")
    assert [line.split()[0] for line in out.splitlines() if " False " in line] == ["unmerge"]


def test_help_fits_a_screen_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 44
    assert max(map(len, lines)) <= 110
    assert any(line.startswith("example: minilora verify --base") for line in lines)


def test_a_measurement_has_the_worse_of_two() -> None:
    assert worst((1, 2), (3, 4)) == Measured(3, 4)
