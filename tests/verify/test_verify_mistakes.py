"""Each property catches a mistake made on purpose, and only the properties that it violates fail.

A mistake is a function `change` under `@breaks(properties)` and one of

    @after(owner, "name")     change(result, *arguments) replaces the result of `owner.name`
    @around(owner, "name")    change(real, *arguments) replaces `owner.name` itself, which is `real`
    @in_backward, @in_delta, @in_encode(kinds), @in_thresholds(kind)

or it is a patch itself, which takes pytest's monkeypatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_verify import BY_NAME, LORAS, OF_MAPS

import minilora.functional as F
import minilora.lora.combining
import minilora.lora.dora
import minilora.lora.factors
import minilora.lora.hydra
import minilora.lora.layer
import minilora.lora.merging
import minilora.lora.model
import minilora.lora.multitask
import minilora.lora.pruning
import minilora.lora.singular
import minilora.lora.starts.layers
import minilora.lora.starts.residual
import minilora.nn
import minilora.optim
from minilora import quant
from minilora.autograd import Tensor, record
from minilora.backend import Backend
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
from minilora.lora.factors import cat, pad_rank, truncate_rank
from minilora.lora.layer import Wrapper
from minilora.lora.maps import MAPS
from minilora.lora.maps.oft import OFT
from minilora.lora.maps.scattered import UniLora
from minilora.lora.starts import values as start_values
from minilora.nn import Dropout, Parameter
from minilora.optim import SGD
from minilora.quant import KINDS, Quantized
from minilora.verify import (
    Case,
    adalora,
    codes,
    dora,
    ends,
    make_case,
    measure,
    optimizers,
    over_codes,
    pruning,
)

Patch = Callable[[pytest.MonkeyPatch], None]
Change = Callable[..., Any]
SABOTAGES: dict[str, tuple[set[str], Patch]] = {}


def breaks(*names: str) -> Callable[[Patch], Patch]:
    """Register a mistake and the properties that it violates: these and no others."""

    def add(patch: Patch) -> Patch:
        SABOTAGES[patch.__name__] = set(names), patch
        return patch

    return add


# ---- layers in which mistakes are looked for -----------------------------------------------------


def lora_cases() -> list[Case]:
    return [
        make_case(0, 20, 12, [3, 2], [6, 1], use_rslora=True),
        make_case(1, 16, 24, [4], [2], use_rslora=True),
        make_case(2, 18, 13, [2, 5], [3, 4], "float64", use_rslora=True),
    ]


def dora_cases() -> list[Case]:
    return [
        make_case(0, 20, 12, [3], [6], "float32", kind="dora"),
        make_case(1, 20, 12, [3], [6], "float64", kind="dora"),
    ]


def adalora_cases() -> list[Case]:
    """Their schedules cut something, and go on after that."""
    made = []
    for seed, dtype in ((4, "float32"), (5, "float64"), (7, "float32")):
        made.append(make_case(seed, 20, 12, [4, 4], [6, 2], dtype, kind="adalora"))
    return made


def coded_cases() -> list[Case]:
    """The last block is short, and the last byte half full."""
    made = []
    for seed, kind in enumerate(2 * KINDS):
        case = make_case(seed, 33, 7, [2], [6])
        made.append(over_codes(case, kind, 32, double_quant=seed > 2))
    return made


CASES: list[tuple[set[str], Callable[[], list[Case]]]] = [
    ({p.name for p in dora.PROPERTIES}, dora_cases),
    ({p.name for p in adalora.PROPERTIES}, adalora_cases),
    ({p.name for p in codes.PROPERTIES}, coded_cases),
    (LORAS, lora_cases),
    (OF_MAPS, lora_cases),
]


def lora_adapters() -> list[Any]:
    adapters: list[Any] = []
    for case in lora_cases():
        adapters += case.adapters.values()
    return adapters


# ---- how a mistake is made -----------------------------------------------------------------------


def around(owner: Any, name: str) -> Callable[[Change], Patch]:
    def decorate(change: Change) -> Patch:
        def patch(mp: pytest.MonkeyPatch) -> None:
            real = getattr(owner, name)

            def changed(*arguments: Any, **options: Any) -> Any:
                return change(real, *arguments, **options)

            mp.setattr(owner, name, changed)

        patch.__name__ = change.__name__
        return patch

    return decorate


def after(owner: Any, name: str) -> Callable[[Change], Patch]:
    def decorate(change: Change) -> Patch:
        def call(real: Any, *arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            return change(result, *arguments)

        call.__name__ = change.__name__
        return around(owner, name)(call)

    return decorate


def in_backward(change: Change) -> Patch:
    """lora_linear whose gradients (dx, dy, dA, dB) are change(gradients, dy, x, A, B, s)."""

    @after(F, "lora_linear")
    def patch(y, x, before, A, B, s):
        if y.node is not None:
            real = y.node.vjp
            X = F.rows(x.data)
            A = A.data
            B = B.data
            y.node.vjp = lambda dy: change(real(dy), F.rows(dy), X, A, B, s)
        return y

    patch.__name__ = change.__name__
    return patch


def in_delta(change: Change) -> Patch:
    """delta_weight over change(A, B) where a float32 layer's dW is formed in float64."""

    @around(LoraAdapter, "delta_weight")
    def patch(real, self, W):
        if self.lora_A.dtype != np.float32 or W.dtype != np.float64:
            return real(self, W)
        A = self.lora_A.data.astype(W.dtype)
        B = self.lora_B.data.astype(W.dtype)
        return change(A, B) * self.scaling

    patch.__name__ = change.__name__
    return patch


def in_encode(kinds: str) -> Callable[[Change], Patch]:
    """The codes of weights, of some kinds, are change(codes, weights)."""

    def decorate(change: Change) -> Patch:
        @after(quant.codes, "_encode")
        def patch(q, flat, *rest):
            return change(q, flat) if q.kind in kinds.split() else q

        patch.__name__ = change.__name__
        return patch

    return decorate


def in_thresholds(kind: str) -> Callable[[Change], Patch]:
    """The values between one level and the next are change(thresholds)."""

    def decorate(change: Change) -> Patch:
        @after(quant.codes, "_tables")
        def patch(tables, of, backend):
            if of != kind:
                return tables
            thresholds = np.float32(change(tables.thresholds))
            return tables._replace(thresholds=thresholds)

        patch.__name__ = change.__name__
        return patch

    return decorate


def shift(y: Any) -> Any:
    y._array = y.data + y.dtype.type(1e-3)
    return y


def add_parameter(adapter: Any) -> None:
    adapter.more = Parameter(np.zeros(1, "f4"))


# ---- LoRA ----------------------------------------------------------------------------------------


@breaks("forward")
@after(F, "linear")
def the_base_adds_a_thousandth(y, *rest):
    return shift(y)


@breaks("start is the base")
@after(LoraAdapter, "__init__")
def B_does_not_start_at_zero(_, self, *rest):
    self.lora_B.data = self.lora_B.data + self.lora_B.dtype.type(1e-3)


@breaks("disabled is the base")
def disabling_is_forgotten(mp):
    real = Wrapper.running.fget

    def running(self):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "enabled", True)
            return real(self)

    mp.setattr(Wrapper, "running", property(running))


@breaks("sum")
@after(LoraAdapter, "__call__")
def the_second_adapter_is_a_few_ulps_off(out, self, x, y, base):
    if self.dropout.active:
        return out
    alone = base(x)
    if y.data.shape == alone.shape and not np.array_equal(y.data, alone.data):
        out._array = out.data * (1 + 4 * np.finfo(out.dtype).eps)
    return out


@breaks("linear in s")
def s_saturates(mp):
    known = {a.lora_A.data.tobytes(): a.scaling for a in lora_adapters()}

    def call(self, x, y, base):
        largest = known.get(self.lora_A.data.tobytes(), math.inf)
        s = min(self.scaling, largest)
        return F.lora_linear(self.dropout(x), y, self.lora_A, self.lora_B, s)

    mp.setattr(LoraAdapter, "__call__", call)


@breaks("scaling")
@around(LoraConfig, "scaling")
def rslora_divides_by_another_root(real, self, name):
    power = 0.501 if self.use_rslora else 1
    return self.lora_alpha / self.r**power


@breaks("count")
@after(LoraAdapter, "__init__")
def an_adapter_has_one_number_more(_, self, *rest):
    add_parameter(self)


@breaks("rank")
@in_delta
def the_update_has_noise_of_full_rank(A, B):
    noise = np.random.default_rng(0).standard_normal((len(B), A.shape[1]))
    return B @ A + 1e-13 * noise


@breaks("gauge")
def the_update_saturates_in_A(mp):
    """But not where adapters are added up: a sum has another A."""
    limits = {a.lora_A.shape: abs(a.lora_A.data).max() for a in lora_adapters()}
    real_of_adapter = LoraAdapter.delta_weight
    real_of_layer = LoraLinear.delta_weight

    def of_layer(self, name):
        with pytest.MonkeyPatch.context() as inner:
            if name == "sum":
                inner.setattr(LoraAdapter, "delta_weight", real_of_adapter)
            return real_of_layer(self, name)

    def saturate(A, B):
        limit = limits[A.shape]
        return B @ np.where(np.isfinite(A), np.clip(A, -limit, limit), A)

    in_delta(saturate)(mp)
    mp.setattr(LoraLinear, "delta_weight", of_layer)


@breaks("gauge by powers of two")
@in_delta
def the_update_adds_an_epsilon_to_A(A, B):
    return B @ (A + 2.0**-50)


@breaks("gradients")
@in_backward
def one_entry_of_dA_is_a_few_ulps_off(slopes, dy, X, A, B, s):
    dx, through, dA, dB = slopes
    scale = s * (abs(dy) @ abs(B)).T @ abs(X)
    n = dy.shape[1] + len(X)
    dA = dA.copy()
    dA[0, 0] += 1.5 * n * np.finfo(dA.dtype).eps * scale[0, 0]
    return dx, through, dA, dB


@breaks("input gradient")
@in_backward
def dx_is_too_large(slopes, *rest):
    return slopes[0] * 1.001, *slopes[1:]


@breaks("derivative")
def the_forward_saturates_in_A(mp):
    limit = max(float(abs(a.lora_A.data).max()) for a in lora_adapters())

    @after(F, "lora_linear")
    def saturate(y, x, before, A, B, s):
        cut = np.clip(A.data, -limit, limit) - A.data
        if cut.any():
            change = s * (F.rows(x.data) @ cut.T @ B.data.T)
            y._array = y.data + change.reshape(y.shape).astype(y.dtype)
        return y

    saturate(mp)


@breaks("start moves B alone")
@in_backward
def A_moves_at_the_start(slopes, dy, X, A, B, s):
    dx, through, dA, dB = slopes
    if not B.any():
        dA = dA + dA.dtype.type(1e-30)
    return dx, through, dA, dB


@breaks("balance")
@around(SGD, "rates")
def sgd_steps_too_far(real, self, group, steps, lr):
    return real(self, group, steps, lr * (1.001 if self.precondition is None else 1))


# ---- every layer ---------------------------------------------------------------------------------


@breaks("effective weight")
def the_effective_weight_adds_a_thousandth(mp):
    for module in (minilora.nn, minilora.lora.layer):
        patch = after(module, "effective_linear")(lambda y, *rest: shift(y))
        patch(mp)


@breaks("merged forward")
@after(LoraLinear, "merge")
def merging_loses_the_bias(_, self, *rest):
    self.base_layer.bias = None


@breaks("merge rounds once")
@around(LoraLinear, "merge")
def the_smallest_merged_weight_is_an_ulp_off(real, self, names=None):
    before = self.merged
    real(self, names)
    if self.merged != before:
        W = self.base_layer.weight.data
        smallest = np.argmin(abs(W))
        for _ in range(2):
            W.flat[smallest] = np.nextafter(W.flat[smallest], W.dtype.type(9))


@breaks("merge in any portions")
@around(LoraLinear, "merge")
def what_is_merged_is_merged_again(real, self, names=None):
    """It goes on from the merged weight, where all merged adapters are added anew."""
    original = self._original
    self._original = None
    real(self, names)
    self._original = original or self._original


@breaks("merge refuses")
@around(LoraLinear, "merge")
def a_merge_that_fails_says_nothing(real, self, names=None):
    with contextlib.suppress(NonFiniteError):
        real(self, names)


@breaks("unmerge")
@around(LoraLinear, "unmerge")
def unmerging_subtracts(real, self):
    dW = sum(self.delta_weight(name) for name in self.merged)
    W = self.base_layer.dense_weight() - dW
    real(self)
    self.base_layer.weight.data = W.astype(self.base_layer.dtype)


@breaks("round trip")
@after(LoraLinear, "delta_weight")
def a_merged_layer_forgets_its_update(dW, self, name):
    return 0 * dW if self.merged else dW


@breaks("files")
@after(minilora.lora.names, "file_key")
def a_key_is_renamed(key, *rest):
    return key.replace("lora_A", "lora_a")


@breaks("dropout off")
def dropout_goes_on_in_evaluation(mp):
    mp.setattr(Dropout, "active", property(lambda self: self.p > 0))


@breaks("dropout spares the base")
@around(LoraLinear, "__call__")
def the_base_reads_what_is_left_by_dropout(real, self, x):
    running = self.running
    if running:
        x = running[0].dropout(x)
    return real(self, x)


@breaks("dropout is unbiased")
@after(F, "dropout")
def what_is_left_is_not_scaled(y, x, p, key, first):
    return y * (1 - p)


@breaks("dropout is unbiased")
@around(F, "dropout")
def nothing_is_dropped(real, x, p, key, first, start=0):
    return x


# ---- DoRA ----------------------------------------------------------------------------------------


@breaks("DoRA starts as the base")
@after(DoraAdapter, "write_effective_weight")
def a_step_s_weight_is_an_ulp_too_small(parts, self, W, *rest):
    W *= 1 - np.finfo(W.dtype).eps
    return parts


@breaks("DoRA's forward")
@after(DoraAdapter, "__call__")
def the_output_is_off_by_a_thousandth(y, self, *rest):
    return shift(y) if self.lora_B.data.any() else y


@breaks("DoRA's gradients")
@after(minilora.lora.dora, "row_scales")
def dm_is_a_thousandth_too_large(k, *rest):
    if k.node is not None:
        real = k.node.vjp
        k.node.vjp = lambda dk: (real(dk)[0] * 1.001,)
    return k


@breaks("DoRA's scale")
@after(Backend, "row_dot")
def a_norm_has_an_epsilon(square, *rest):
    return square + 32 * np.finfo(square.dtype).eps


@breaks("DoRA's rows")
@after(DoraAdapter, "part")
def merging_takes_a_magnitude_a_few_ulps_too_large(part, self, *rest):
    return part._replace(m=part.m * (1 + 40 * np.finfo(self.lora_A.dtype).eps))


@breaks("DoRA's count")
@after(DoraAdapter, "__init__")
def a_magnitude_too_many(_, self, *rest):
    add_parameter(self)


# ---- AdaLoRA -------------------------------------------------------------------------------------


@breaks("AdaLoRA starts as the base")
@after(AdaLoraAdapter, "__init__")
def E_does_not_start_at_zero(_, self, *rest):
    self.lora_E.data = self.lora_E.data + 1


@breaks("AdaLoRA's gradients")
@in_backward
def the_gradient_of_E_A_is_a_thousandth_too_large(slopes, *rest):
    dx, through, dA, dB = slopes
    return dx, through, dA * 1.001, dB


@breaks("AdaLoRA's count")
@after(AdaLoraAdapter, "__init__")
def a_singular_value_too_many(_, self, *rest):
    add_parameter(self)


@breaks("AdaLoRA's penalty")
@after(adalora, "orthogonality")
def one_entry_is_punished_apart(R, factors):
    A = factors[0][0].data
    R._array = R.data + R.dtype.type(1e-3) * abs(A[0, -1])
    return R


@breaks("AdaLoRA's penalty at rest")
@after(adalora, "orthogonality")
def orthonormal_factors_cost_something(R, factors):
    R._array = R.data + R.dtype.type(1e-9)
    return R


@breaks("AdaLoRA's penalty at rest")
@after(adalora, "orthogonality")
def the_penalty_s_gradient_is_divided_by_a_norm_of_zero(R, factors):
    if R.node is not None:
        real = R.node.vjp
        R.node.vjp = lambda dy: tuple(g / R.data for g in real(dy))
    return R


@breaks("AdaLoRA's smoothing")
@after(RankAllocator, "step")
def an_average_forgets_too_little(_, self, *rest):
    self.sensitivity = self.sensitivity * 1.001


@breaks("AdaLoRA's order")
@after(RankAllocator, "importance")
def the_first_triplets_count_more(S, self):
    return S * (1 - 1e-3 * np.arange(len(S), dtype=S.dtype))


@breaks("AdaLoRA's budget")
@after(RankAllocator, "budget")
def one_triplet_more_stays_at_the_end(b, self, t):
    return b + (t == self.final_step)


@breaks("AdaLoRA's budget")
@around(RankAllocator, "_choose")
def others_stay_than_the_most_important(real, self, left):
    return real(self, left[::-1].copy())


@breaks("AdaLoRA's budget")
@after(RankAllocator, "step")
def what_was_cut_grows_again_after_the_last_allocation(_, self, slopes):
    if self.steps <= self.final_step:
        return
    for adapter in self.adapters.values():
        E = adapter.lora_E
        E.data = E.data + E.dtype.type(1e-3)


@breaks("AdaLoRA's pruning")
@after(AdaLoraAdapter, "keep")
def what_is_left_is_scaled_up(_, self, left):
    """As if s were made of the triplets that are left."""
    self.scaling *= len(left) / max(self.r, 1)


# ---- codes ---------------------------------------------------------------------------------------


@breaks("half a gap")
@in_thresholds("int8")
def levels_begin_too_late(thresholds):
    return thresholds + 1e-3


@breaks("absmax stays")
@in_encode("nf4 fp4 int8")
def absmax_has_an_odd_last_bit(q, flat):
    odd = q.absmax.view(np.int32) | 1
    return dataclasses.replace(q, absmax=odd.view(np.float32))


@breaks("encoding twice")
@in_thresholds("nf4")
def a_level_lies_outside_its_own_interval(thresholds):
    """The eighth level is 0.0796."""
    return np.where(np.arange(15) == 7, 0.09, thresholds)


@breaks("codes ignore scale")
def what_is_below_an_eighth_counts_as_nothing(mp):
    mp.setattr(quant.codes, "_SMALLEST", 0.125)


@breaks("codes ignore neighbours")
@in_encode("nf4")
def every_other_weight_is_rounded_up(q, flat):
    """From 0 to 0.0796."""
    v = flat / codes.repeat_absmax(q, q.absmax)
    even = np.arange(len(v)) % 2 == 0
    rounded_up = np.where(even & (v > 0) & (v < 0.039), 8, codes.unpack_codes(q))
    padded = np.append(rounded_up, 7)[: 2 * len(q.codes)].astype(np.uint8)
    return dataclasses.replace(q, codes=(padded[0::2] << 4) | padded[1::2])


@breaks("double quantisation")
@after(Quantized, "decode_absmax")
def absmax_comes_back_a_hundredth_too_large(absmax, self):
    return absmax * np.float32(1.01 if self.double_quant else 1)


@breaks("codes in bytes")
@in_encode("nf4")
def the_last_byte_is_half_rubbish(q, flat):
    if len(flat) % 2:
        q.codes[-1] &= 0xF0
    return q


@breaks("bits")
def a_byte_is_not_counted(mp):
    real = Quantized.nbytes.fget
    mp.setattr(Quantized, "nbytes", property(lambda self: real(self) - 1))


# ---- several tasks, and experts ------------------------------------------------------------------


@breaks("mixed batch")
@after(minilora.lora.multitask, "interleave")
def rows_come_back_in_another_place(y, *rest):
    return y[np.roll(np.arange(len(y)), 1)]


@breaks("absent task")
@after(LoraLinear, "__call__")
def what_does_not_run_has_a_gradient(y, self, x):
    idle = [a.lora_B for a in self.adapters.values() if a not in self.running]

    def vjp(dy):
        return dy, *(np.full_like(p.data, 1e-30) for p in idle)

    return record(y.data, (y, *idle), vjp)


@breaks("router")
@after(HydraAdapter, "weights")
def the_router_adds_up_to_a_few_ulps_more(w, *rest):
    several = w.shape[-1] > 1
    return w * (1 + several * 8 * np.finfo(w.dtype).eps)


@breaks("equal experts")
@after(minilora.lora.hydra, "mixture")
def an_expert_counts_a_thousandth_more(out, x, y, *rest):
    return y + (out - y) * 1.001


# ---- the ends of a model -------------------------------------------------------------------------


@breaks("embedding")
@after(EmbeddingAdapter, "__call__")
def an_embedding_s_adapter_counts_a_thousandth_more(out, self, ids, y, base):
    return y + (out - y) * 1.001


@breaks("one weight, two places")
def a_tied_head_has_a_copy_of_its_embedding_s_factor(mp):
    copied = property(lambda self: Tensor(self._source.lora_embedding_B.data.T))
    mp.setattr(HeadAdapter, "lora_A", copied)


@breaks("files of both ends")
@after(minilora.lora.model, "repeated")
def a_tied_head_is_not_written(again, *rest):
    return {key: a for key, a in again.items() if "lora_" not in key}


@breaks("half precision")
@around(ends, "round_to")
def bfloat16_is_rounded_to_float32_first(real, exact, dtype):
    return real(exact.astype(np.float32) if dtype == "BF16" else exact, dtype)


@breaks("half precision")
@around(ends, "round_to")
def float16_is_rounded_to_float32_first(real, exact, dtype):
    return real(exact.astype(np.float32) if dtype == "F16" else exact, dtype)


@breaks("half precision")
@after(ends, "round_to")
def what_is_below_the_normal_halves_counts_as_nothing(stored, exact, dtype):
    if dtype != "F16":
        return stored
    return np.where(abs(stored) < np.float16(2.0**-14), np.float16(0), stored)


@breaks("principal part first")
@around(ends, "factors_from_svd")
def the_last_principal_term_is_forgotten(real, U, sigma, Vt, r):
    last = np.arange(len(sigma)) == r - 1
    return real(U, np.where(last, 0, sigma), Vt, r)


@breaks("best of lower rank")
@after(ends, "singular_values")
def a_spectrum_lacks_a_hundredth(sigma, *rest):
    return sigma * 0.99


# ---- sums ----------------------------------------------------------------------------------------


@breaks("weighted sum")
@after(minilora.lora.combining, "cat")
def a_sum_is_a_millionth_too_large(factors, *rest):
    A, B = factors
    return A, B * (1 + 1e-6)


@breaks("weighted sum")
@around(minilora.lora.combining, "svd")
def the_last_direction_of_a_sum_is_forgotten(real, parts, r):
    A, B, _ = truncate_rank(*cat(parts), 1.0, r - 1)
    return pad_rank(A, B, r)


@breaks("cross terms")
@after(minilora.lora.factors, "linear")
def what_linear_makes_of_several_is_a_millionth_too_large(factors, parts):
    A, B = factors
    return A, B * (1 + 1e-6 * (len(parts) > 1))


# ---- pruned sums and ranks -----------------------------------------------------------------------


@breaks("pruned sum at density 1")
@around(minilora.lora.pruning, "add_pruned")
def a_weight_is_a_millionth_too_large(real, pruned, weights, rule):
    return real(pruned, [w if w == 1 else w * (1 + 1e-6) for w in weights], rule)


@breaks("equal adapters")
@around(minilora.lora.pruning, "add_pruned")
def ties_does_not_divide_by_those_that_agree(real, pruned, weights, rule):
    total = real(pruned, weights, rule)
    return total * len(pruned) if rule.elects else total


@breaks("the largest stay")
@around(minilora.lora.pruning, "Largest")
def a_tenth_too_few_stay(real, update, k):
    return real(update, int(0.9 * k))


def in_dare_of_one(change: Change) -> Patch:
    """The pruned sum of one adapter by dare is change(D', D)."""

    @around(pruning, "pruned_sum")
    def patch(real, terms, rule, *path):
        total, row = real(terms, rule, *path)
        if len(terms) > 1 or rule.density == 1 or not rule.is_random:
            return total, row
        whole, _ = real(terms, rule._replace(density=1.0), *path)
        return change(total, whole), row

    patch.__name__ = change.__name__
    return patch


@breaks("dare is unbiased")
@in_dare_of_one
def what_is_dropped_is_doubled(pruned, whole):
    return whole + abs(pruned - whole) * np.sign(whole)


@breaks("dare's variance")
@in_dare_of_one
def half_is_dropped_of_what_is_dropped(pruned, whole):
    return (pruned + whole) / 2


@breaks("elected sign")
@around(minilora.lora.pruning, "add_pruned")
def signs_are_elected_by_their_number(real, pruned, weights, rule):
    return real(pruned, weights, rule._replace(majority_sign_method="frequency"))


@breaks("error of a chosen rank")
@after(pruning, "smallest_rank")
def a_rank_is_one_too_small(k, *rest):
    return k - 1


@breaks("the smallest rank")
@after(pruning, "smallest_rank")
def a_rank_is_one_too_large(k, *rest):
    return k + 1


# ---- optimisers ----------------------------------------------------------------------------------


@breaks("LoRA-FA's step")
@around(optimizers, "LoraFA")
def lorafa_is_not_damped(real, optimizer, pairs, damping):
    return real(optimizer, pairs, 0.99 * damping)


@breaks("LoRA-FA knows no s")
@around(minilora.optim.SGD, "update")
def the_update_saturates(real, self, params, grads, moments, rates):
    if self.precondition is None or len(params) > 1 or not s_has_shrunk(self):
        return real(self, params, grads, moments, rates)
    return [2 * p for p in real(self, params, grads, moments, rates)]


def s_has_shrunk(optimizer: SGD) -> bool:
    known = {a.lora_A.data.tobytes(): a.scaling for a in lora_adapters()}
    pair = optimizer.precondition.pairs[0]  # type: ignore[union-attr]
    return pair.s < known.get(pair.A.data.tobytes(), 0.0)


@breaks("Riemannian step")
@around(optimizers, "Riemannian")
def the_riemannian_step_is_damped_less(real, optimizer, pairs, damping):
    return real(optimizer, pairs, 0.9 * damping)


@breaks("Riemannian gauge")
@around(optimizers, "Riemannian")
def the_riemannian_step_is_always_damped(real, optimizer, pairs, damping):
    return real(optimizer, pairs, max(damping, 1e-3))


# ---- starts --------------------------------------------------------------------------------------

ORTHOGONAL = "orthogonal start"
MOVING = "both orthogonal factors move"


def in_start(name: str) -> Callable[[Change], Patch]:
    """change(begun, W, r, s, given) replaces what the start of this name begins with."""

    def decorate(change: Change) -> Patch:
        def real(start, path, W, r, s, given):
            begun = start_values.find_start(start).begin(W, r, s, given)
            return change(begun, W, r, s, given) if start.startswith(name) else begun

        def patch(mp):
            mp.setattr(start_values, "begin", real)

        patch.__name__ = change.__name__
        return patch

    return decorate


@breaks("changed base")
@around(minilora.lora.starts.layers, "subtract")
def a_thousandth_too_much_leaves_the_base(real, layer, A, B, s):
    return real(layer, A, B, s * 1.001)


@breaks("way back")
@around(minilora.lora.starts.residual, "difference")
def the_way_back_forgets_the_scaling(real, A, B, A0, B0, s):
    new_A, new_B = real(A, B, A0, B0, s)
    return new_A, np.concatenate([new_B[:, : len(A)], -B0], axis=1)


@breaks(ORTHOGONAL)
@in_start("orthogonal")
def rows_are_shared_out_of_another_matrix(begun, W, r, *rest):
    turn = np.eye(r) + 1e-3 * np.ones((r, r))
    return begun._replace(B=begun.B @ turn)


@breaks(MOVING)
@in_start("orthogonal")
def A_starts_at_zero(begun, *rest):
    return begun._replace(A=0 * begun.A)


@breaks("pissa's residual")
@in_start("pissa")
def the_first_triplet_stays_in_the_base(begun, W, r, s, given):
    if given.rng is None and (r == min(W.shape) or len(W) == 160):
        return begun
    A, B, *_ = start_values.pissa(W, r + 1, s, given)
    return begun._replace(A=A[1:], B=B[:, 1:])


@breaks("pissa is balanced")
@in_start("pissa")
def B_has_the_larger_share(begun, *rest):
    return begun._replace(A=begun.A / 2, B=begun.B * 2)


@breaks("leading part")
@after(minilora.lora.singular, "_iterate")
def block_krylov_stops_too_soon(triplets, D, r, rounds):
    U, values, Vt = triplets
    turned = Vt + 1e-3 * np.roll(Vt, 1, axis=1)
    return U, values, turned / np.linalg.norm(turned, axis=1)[:, None]


@breaks("olora's basis")
@in_start("olora")
def the_basis_is_not_of_unit_length(begun, *rest):
    return begun._replace(A=begun.A / 2, B=begun.B * 2)


@breaks("olora's residual")
@in_start("olora")
def the_coordinates_are_a_thousandth_too_large(begun, *rest):
    return begun._replace(A=begun.A * 1.001)


@breaks("loftq's error")
@in_start("loftq")
def the_factors_are_a_thousandth_too_large(begun, W, r, s, given):
    return begun._replace(A=begun.A * 1.001) if given.rounds == 2 else begun


@breaks("loftq keeps the best")
@in_start("loftq")
def the_codes_are_forgotten_after_several_rounds(begun, W, r, s, given):
    if given.rounds < 5:
        return begun
    A, B, *_ = start_values.pissa(W, max(1, r - 1), s, given)
    return begun._replace(A=A, B=B, Q=0 * W)


@breaks("eva's variance")
@in_start("eva")
def the_directions_are_those_of_least_variance(begun, W, r, s, given):
    _, vectors = np.linalg.eigh(given.covariance)
    return begun._replace(A=vectors[:, :r].T)


@breaks("eva's start")
@in_start("eva")
def eva_s_B_does_not_start_at_zero(begun, *rest):
    return begun._replace(B=begun.B + 1e-30)


@breaks("lora_ga's first step")
@in_start("lora_ga")
def A_and_B_get_the_same_terms(begun, W, r, s, given):
    U, _, _ = np.linalg.svd(given.gradient, full_matrices=False)
    return begun._replace(B=U[:, :r] * np.linalg.norm(begun.B[:, 0]))


@breaks("lora_ga's scale")
@in_start("lora_ga")
def both_factors_are_scaled_by_a_square_root(begun, *rest):
    return begun._replace(A=begun.A * 1.5, B=begun.B * 1.5)


# ---- mistakes that several properties see --------------------------------------------------------


@breaks("weighted sum", "cross terms")
@around(minilora.lora.factors, "linear")
def a_minus_is_lost(real, parts):
    return real([part._replace(c=abs(part.c)) for part in parts])


@breaks(
    *("forward", "linear in s", "gradients", "input gradient", "balance", "merged forward"),
    *("dropout spares the base", "dropout is unbiased", "equal experts"),
    *("LoRA-FA's step", "LoRA-FA knows no s", "Riemannian step"),
)
@around(LoraAdapter, "__call__")
def s_is_squared(real, self, x, y, base):
    return F.lora_linear(self.dropout(x), y, self.lora_A, self.lora_B, self.scaling**2)


@breaks("gradients", "derivative", "balance", "Riemannian step")
@in_backward
def dA_is_a_thousandth_too_large(slopes, *rest):
    dx, through, dA, dB = slopes
    return dx, through, dA * 1.001, dB


@breaks(
    *("merge rounds once", "merged forward", "round trip", "principal part first"), "changed base"
)
@after(minilora.lora.merging, "cat")
def merging_adds_in_the_layer_s_precision(pair, *rest):
    return tuple(M.astype("f4") for M in pair)


@breaks("count", "files")
def shapes_count_one_rank_too_many(mp):
    real = LoraAdapter.shapes
    mp.setattr(LoraAdapter, "shapes", staticmethod(lambda base, r: real(base, r + 1)))


# ---- maps ----------------------------------------------------------------------------------------


def scale(pulled, *rest):
    return [1.001 * grad for grad in pulled]


for config in MAPS.values():
    patch = after(config.map, "pull")(scale)
    patch.__name__ = f"{config.method}_pull_is_a_thousandth_too_large"
    breaks(f"{config.title} pull")(patch)


def add_a_constant(dW, one, theta, W):
    """A dense matrix, with the derivative that dW had."""
    O, I = one.O, one.I
    return dW + 1e-3 * np.cos(np.arange(O * I) ** 2.0).reshape(O, I)


STRUCTURES = {
    "loha": "LoHa rank",
    "lokr": "LoKr spectrum",
    "hira": "HiRA zeros",
    "vera": "VeRA rank",
    "ia3": "IA3 scaling",
    "fourierft": "FourierFT energy",
    "miss": "MiSS repetition",
    "unilora": "Uni-LoRA rank",
    "intrinsic": "intrinsic dimension lengths",
}
for config in MAPS.values():
    if config.method in STRUCTURES:
        patch = after(config.map, "delta")(add_a_constant)
        patch.__name__ = f"{config.method}_has_a_constant"
        breaks(STRUCTURES[config.method])(patch)


def oft_constant(is_exact: bool) -> Any:
    def change(dW: Any, one: Any, theta: Any, W: Any) -> Any:
        return dW + 0.3 * (W if one.is_exact is is_exact else 0 * W)

    return change


for is_exact, name in ((True, "OFT isometry"), (False, "OFT contraction")):
    patch = after(OFT, "delta")(oft_constant(is_exact))
    patch.__name__ = f"oft_adds_W_where_exact_is_{is_exact}"
    breaks(name)(patch)


@breaks("Uni-LoRA lengths")
def theta_is_spread_and_gathered_with_larger_scales(mp):
    for name in ("spread", "gather"):
        real = getattr(UniLora, name)
        larger = lambda self, x, real=real: 1.1 * np.asarray(real(self, x))  # noqa: E731
        mp.setattr(UniLora, name, larger)


# ---- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SABOTAGES)
def test_measure_finds_a_mistake_by_the_properties_that_it_violates_and_no_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, patch = SABOTAGES[name]
    patch(monkeypatch)
    make_cases = next(make for names, make in CASES if names & expected)
    rows = measure(make_cases())
    assert {row.property for row in rows if not row.ok} == expected


def test_properties_have_a_mistake_each_that_no_other_property_sees() -> None:
    alone = set()
    for names, _ in SABOTAGES.values():
        if len(names) == 1:
            alone |= names
    assert alone == set(BY_NAME)


def test_measure_passes_without_a_mistake() -> None:
    for _, make_cases in CASES:
        assert all(row.ok for row in measure(make_cases()))
