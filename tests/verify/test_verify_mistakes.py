"""Each property of the list catches a mistake of its own: made on purpose, and seen by what it violates alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from test_verify import BY_NAME, LORAS

import minilora.functional as F
import minilora.lora.combining
import minilora.lora.dora
import minilora.lora.hydra
import minilora.lora.merging
import minilora.lora.model
import minilora.lora.multitask
import minilora.nn
from minilora import quant
from minilora.autograd import Tensor, record
from minilora.errors import NonFiniteError
from minilora.lora import (
    AdaLoraAdapter,
    DoraAdapter,
    HydraAdapter,
    LoraAdapter,
    LoraConfig,
    LoraLinear,
    RankAllocator,
)
from minilora.lora.embedding import EmbeddingAdapter, HeadAdapter
from minilora.lora.factors import Part, cat, pad_rank, truncate_rank
from minilora.lora.layer import Wrapper
from minilora.nn import Dropout, Parameter
from minilora.optim import SGD
from minilora.quant import KINDS, Quantized
from minilora.verify import Case, make_case, measure, over_codes
from minilora.verify import adalora as of_adalora
from minilora.verify import codes as of_codes
from minilora.verify import dora as of_dora
from minilora.verify import ends as of_ends


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr("os.fsync", lambda file: None)
        yield


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
    return [
        make_case(i, 20, 12, [3], [6], dtype, kind="dora")
        for i, dtype in enumerate(("float32", "float64"))
    ]


def wrong_adalora() -> list[Case]:
    """Their schedules cut something, and go on after that."""
    dtypes = {4: "float32", 5: "float64", 7: "float32"}
    return [
        make_case(seed, 20, 12, [4, 4], [6, 2], dtype, kind="adalora")
        for seed, dtype in dtypes.items()
    ]


def wrong_codes() -> list[Case]:
    made = [
        make_case(i, 33, 7, [2], [6]) for i in range(6)
    ]  # the last block is short, and the last byte half full
    return [
        over_codes(case, kind, 32, i > 2)
        for i, (case, kind) in enumerate(zip(made, 2 * KINDS, strict=True))
    ]


WRONG: list[tuple[set[str], Callable[[], list[Case]]]] = [
    ({p.name for p in of_dora.PROPERTIES}, wrong_dora),
    ({p.name for p in of_adalora.PROPERTIES}, wrong_adalora),
    ({p.name for p in of_codes.PROPERTIES}, wrong_codes),
    (LORAS, wrong_layers),
]


def largest_A() -> float:
    return max(
        float(abs(a.lora_A.data).max())
        for case in wrong_layers()
        for a in case.subject.adapters.values()
    )


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
        if (
            not self.dropout.active
            and y.data.shape == base(x).shape
            and not np.array_equal(y.data, base(x).data)
        ):
            out._data = out.data * (1 + 4 * np.finfo(out.dtype).eps)
        return out

    after(mp, LoraAdapter, "__call__", change)


@breaks("linear in s")
def s_saturates(mp: pytest.MonkeyPatch) -> None:
    known = {
        a.lora_A.data.tobytes(): a.scaling
        for c in wrong_layers()
        for a in c.subject.adapters.values()
    }

    def call(self: Any, x: Any, y: Any, base: Any) -> Any:
        s = min(self.scaling, known.get(self.lora_A.data.tobytes(), math.inf))
        return F.lora_linear(self.dropout(x), y, self.lora_A, self.lora_B, s)

    mp.setattr(LoraAdapter, "__call__", call)


@breaks("scaling")
def rslora_divides_by_another_root(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(
        LoraConfig,
        "scaling",
        lambda self, name: self.lora_alpha / self.r ** (0.501 if self.use_rslora else 1),
    )


@breaks("count")
def an_adapter_has_one_number_more(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        LoraAdapter,
        "__init__",
        lambda _, self, *rest: setattr(self, "more", Parameter(np.zeros(1, "f4"))),
    )


def in_delta(mp: pytest.MonkeyPatch, change: Callable[..., np.ndarray]) -> None:
    """delta_weight over change(A, B) where a float32 layer's dW is formed in float64."""
    real = LoraAdapter.delta_weight

    def delta_weight(self: Any, W: np.ndarray) -> np.ndarray:
        if self.lora_A.dtype == np.float32 and W.dtype == np.float64:
            return (
                change(self.lora_A.data.astype(W.dtype), self.lora_B.data.astype(W.dtype))
                * self.scaling
            )
        return real(self, W)

    mp.setattr(LoraAdapter, "delta_weight", delta_weight)


@breaks("rank")
def the_update_has_noise_of_full_rank(mp: pytest.MonkeyPatch) -> None:
    def change(A: np.ndarray, B: np.ndarray) -> np.ndarray:
        return B @ A + 1e-13 * np.random.default_rng(0).standard_normal((len(B), A.shape[1]))

    in_delta(mp, change)


@breaks("gauge")
def the_update_saturates_in_A(mp: pytest.MonkeyPatch) -> None:
    limits = {
        a.lora_A.shape: abs(a.lora_A.data).max()
        for c in wrong_layers()
        for a in c.subject.adapters.values()
    }
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
            y._data = y.data + (s * (F.rows(x.data) @ cut.T @ B.data.T)).reshape(y.shape).astype(
                y.dtype
            )
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
    after(mp, minilora.nn, "effective_linear", shifted)
    after(mp, minilora.lora.layer, "effective_linear", shifted)


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
        self._original = (
            None  # goes on from the merged weight, where all merged adapters are added anew
        )
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
    after(
        mp,
        LoraLinear,
        "delta_weight",
        lambda delta, self, name: 0 * delta if self.merged else delta,
    )


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
    after(
        mp,
        DoraAdapter,
        "__call__",
        lambda y, self, *rest: shifted(y) if self.lora_B.data.any() else y,
    )


@breaks("DoRA's gradients")
def dm_is_a_thousandth_too_large(mp: pytest.MonkeyPatch) -> None:
    def change(k: Any, *rest: Any) -> Any:
        if k.node is not None:
            real = k.node.vjp
            k.node.vjp = lambda dk: (real(dk)[0] * 1.001,)
        return k

    after(mp, minilora.lora.dora, "row_scales", change)


@breaks("DoRA's scale")
def a_norm_has_an_epsilon(mp: pytest.MonkeyPatch) -> None:
    after(mp, F, "row_dot", lambda square, *rest: square + 32 * np.finfo(square.dtype).eps)


@breaks("DoRA's rows")
def merging_takes_a_magnitude_a_few_ulps_too_large(mp: pytest.MonkeyPatch) -> None:
    def change(part: Part, self: Any) -> Part:
        return part._replace(m=part.m * (1 + 40 * np.finfo(self.lora_A.dtype).eps))

    after(mp, DoraAdapter, "part", change)


@breaks("DoRA's count")
def a_magnitude_too_many(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        DoraAdapter,
        "__init__",
        lambda _, self, *rest: setattr(self, "z", Parameter(np.zeros(1, "f4"))),
    )


@breaks("AdaLoRA starts as the base")
def E_does_not_start_at_zero(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        AdaLoraAdapter,
        "__init__",
        lambda _, self, *rest: setattr(self.lora_E, "data", self.lora_E.data + 1),
    )


@breaks("AdaLoRA's gradients")
def the_gradient_of_E_A_is_a_thousandth_too_large(mp: pytest.MonkeyPatch) -> None:
    in_backward(mp, lambda grads, *rest: (*grads[:2], grads[2] * 1.001, grads[3]))


@breaks("AdaLoRA's count")
def a_singular_value_too_many(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        AdaLoraAdapter,
        "__init__",
        lambda _, self, *rest: setattr(self, "z", Parameter(np.zeros(1, "f4"))),
    )


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
    after(
        mp,
        RankAllocator,
        "step",
        lambda _, self, *rest: setattr(self, "sensitivity", self.sensitivity * 1.001),
    )


@breaks("AdaLoRA's order")
def the_first_triplets_count_more(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        RankAllocator,
        "importance",
        lambda S, self: S * (1 - 1e-3 * np.arange(len(S), dtype=S.dtype)),
    )


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


def in_encode(
    mp: pytest.MonkeyPatch, kinds: str, change: Callable[[Quantized, np.ndarray], Quantized]
) -> None:
    """The codes of weights, of some kinds, go through change(codes, weights)."""
    after(
        mp,
        quant.codes,
        "_encode",
        lambda held, flat, *rest: change(held, flat) if held.kind in kinds.split() else held,
    )


def in_thresholds(mp: pytest.MonkeyPatch, kind: str, change: Callable[[np.ndarray], Any]) -> None:
    """Where one level ends and the next begins goes through change(thresholds)."""

    def changed(tables: Any, of: str, backend: Any) -> Any:
        return (
            tables._replace(thresholds=np.float32(change(tables.thresholds)))
            if of == kind
            else tables
        )

    after(mp, quant.codes, "_tables", changed)


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
    in_thresholds(
        mp, "nf4", lambda t: np.where(np.arange(15) == 7, 0.09, t)
    )  # the eighth level is 0.0796


@breaks("codes know no scale")
def what_is_below_an_eighth_counts_as_nothing(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(quant.codes, "_SMALLEST", 0.125)


@breaks("codes know no neighbour")
def every_other_weight_is_rounded_up(mp: pytest.MonkeyPatch) -> None:
    def change(held: Quantized, flat: np.ndarray) -> Quantized:
        codes, v = of_codes.codes(held), flat / np.repeat(held.absmax, held.block_size)[: len(flat)]
        codes = np.where(
            (np.arange(len(v)) % 2 == 0) & (v > 0) & (v < 0.039), 8, codes
        )  # from 0 to 0.0796
        codes = np.append(codes, 7)[: 2 * len(held.codes)].astype(np.uint8)
        return dataclasses.replace(held, codes=(codes[0::2] << 4) | codes[1::2])

    in_encode(mp, "nf4", change)


@breaks("double quantisation")
def absmax_comes_back_a_hundredth_too_large(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        Quantized,
        "decode_absmax",
        lambda absmax, self: absmax * np.float32(1 + 0.01 * self.double_quant),
    )


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
    after(
        mp, minilora.lora.multitask, "interleave", lambda y, *rest: y[np.roll(np.arange(len(y)), 1)]
    )


@breaks("absent task")
def what_does_not_run_has_a_gradient(mp: pytest.MonkeyPatch) -> None:
    def change(y: Any, self: Any, x: Any) -> Any:
        idle = [a.lora_B for a in self.adapters.values() if a not in self.running]
        return record(
            y.data, (y, *idle), lambda dy: (dy, *(np.full_like(p.data, 1e-30) for p in idle))
        )

    after(mp, LoraLinear, "__call__", change)


@breaks("router")
def the_router_adds_up_to_a_few_ulps_more(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        HydraAdapter,
        "weights",
        lambda w, *rest: w * (1 + (w.shape[-1] > 1) * 8 * np.finfo(w.dtype).eps),
    )


@breaks("equal experts")
def an_expert_counts_a_thousandth_more(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.hydra, "mixture", lambda out, x, y, *rest: y + (out - y) * 1.001)


@breaks("embedding")
def an_embedding_s_adapter_counts_a_thousandth_more(mp: pytest.MonkeyPatch) -> None:
    after(mp, EmbeddingAdapter, "__call__", lambda out, self, ids, y, base: y + (out - y) * 1.001)


@breaks("one weight, two places")
def a_tied_head_has_a_copy_of_its_embedding_s_factor(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(
        HeadAdapter, "lora_A", property(lambda self: Tensor(self._source.lora_embedding_B.data.T))
    )


@breaks("files of both ends")
def a_tied_head_is_not_written(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        minilora.lora.model,
        "repeated",
        lambda again, *_: {k: a for k, a in again.items() if "lora_" not in k},
    )


@breaks("half precision")
def a_sum_is_rounded_to_float32_first(mp: pytest.MonkeyPatch) -> None:
    real = of_ends.bf16_from
    mp.setattr(of_ends, "bf16_from", lambda total: real(total.astype(np.float32)))


@breaks("half precision")
def a_half_goes_by_way_of_float32(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(of_ends, "to_half", lambda total: total.astype(np.float32).astype(np.float16))


@breaks("half precision")
def what_is_below_the_normal_halves_counts_as_nothing(mp: pytest.MonkeyPatch) -> None:
    after(
        mp,
        of_ends,
        "to_half",
        lambda half, *_: np.where(abs(half) < np.float16(2.0**-14), np.float16(0), half),
    )


@breaks("principal part first")
def the_last_principal_term_is_forgotten(mp: pytest.MonkeyPatch) -> None:
    real = of_ends.factors_from_svd
    mp.setattr(
        of_ends,
        "factors_from_svd",
        lambda U, s, Vt, r: real(U, np.where(np.arange(len(s)) == r - 1, 0, s), Vt, r),
    )


@breaks("weighted sum")
def a_sum_is_a_millionth_too_large(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.combining, "cat", lambda pair, *_: (pair[0], pair[1] * (1 + 1e-6)))


@breaks("weighted sum")
def the_last_direction_of_a_sum_is_forgotten(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(
        minilora.lora.combining,
        "svd",
        lambda parts, r: pad_rank(*truncate_rank(*cat(parts), 1.0, r - 1)[:2], r),
    )


@breaks("cross terms")
def what_linear_makes_of_several_is_a_millionth_too_large(mp: pytest.MonkeyPatch) -> None:
    change = lambda pair, parts: (pair[0], pair[1] * (1 + 1e-6 * (len(parts) > 1)))  # noqa: E731
    after(mp, minilora.lora.factors, "linear", change)


@breaks("best of lower rank")
def a_spectrum_lacks_a_hundredth(mp: pytest.MonkeyPatch) -> None:
    after(mp, of_ends, "singular_values", lambda values, *_: values * 0.99)


# Mistakes that are seen from several sides.


@breaks("weighted sum", "cross terms")
def a_minus_is_lost(mp: pytest.MonkeyPatch) -> None:
    real = minilora.lora.factors.linear
    mp.setattr(
        minilora.lora.factors,
        "linear",
        lambda parts: real([p._replace(c=abs(p.c)) for p in parts]),
    )


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


@breaks("merge rounds once", "merged forward", "round trip", "principal part first")
def merging_adds_in_the_layer_s_precision(mp: pytest.MonkeyPatch) -> None:
    after(mp, minilora.lora.merging, "cat", lambda pair, *_: tuple(M.astype("f4") for M in pair))


@breaks("count", "files")
def shapes_count_one_rank_too_many(mp: pytest.MonkeyPatch) -> None:
    real = LoraAdapter.shapes
    mp.setattr(LoraAdapter, "shapes", staticmethod(lambda base, r: real(base, r + 1)))


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_mistake_is_caught_by_what_it_violates_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, patch = SABOTAGES[name]
    patch(monkeypatch)
    layers = next(make for names, make in WRONG if names & expected)()
    failing = {row.property for row in measure(layers) if not row.ok}
    assert failing == expected


def test_every_property_has_a_mistake_of_its_own() -> None:
    alone = {name for names, _ in SABOTAGES.values() if len(names) == 1 for name in names}
    assert alone == set(BY_NAME)
    assert all(row.ok for _, make in WRONG for row in measure(make()))
