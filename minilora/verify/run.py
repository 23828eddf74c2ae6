"""Every property over many cases, one row each: random layers, or the layers of given files.

verify         over random cases
verify_files   over each adapted layer of a base and an adapter, with a description of each layer
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..formats import Checkpoint, read_checkpoint
from ..formats.dtypes import FLOATS, round_to, widen
from ..lora import AdaLoraAdapter, PeftModel
from ..lora.factors import effective_rank, singular_values
from ..lora.files.fitting import base_key
from ..lora.maps.adapter import MapAdapter
from ..models.transformer import CausalLM
from ..progress import progress_bar
from ..threads import keep_memory, one_blas_thread
from .case import ADAPTERS, Case, cases_of, random_case
from .measuring import Measured, Property
from .properties import PROPERTIES


class Row(NamedTuple):
    """A property's worst case.

    ratio     measured / bound
    ok        is it within its bound, or, if the claim is false, beyond it in every case?
    where     the name of the case
    cases     how many cases the property applies to
    is_true   see `Property`
    """

    property: str
    equation: str
    source: str
    measured: float
    bound: float
    ratio: float
    ok: bool
    where: str
    cases: int
    note: str = ""
    is_true: bool = True


def worst_row(
    name: str,
    equation: str,
    source: str,
    measured: Sequence[tuple[str, Measured]],
    is_true: bool = True,
) -> Row:
    """The row of a property, from its measurements (case's name, measurement).

    The worst case of a false claim is one that cannot be computed, or comes nearest to its bound.
    """
    if is_true:
        where, m = max(measured, key=lambda item: item[1].badness)
        ok = m.ok
    else:
        where, m = min(measured, key=lambda item: (is_beyond(item[1]), item[1].ratio))
        ok = is_beyond(m)
    count = len(measured)
    return Row(
        name, equation, source, m.measured, m.bound, m.ratio, ok, where, count, m.note, is_true
    )


def is_beyond(m: Measured) -> bool:
    """Is this a number, and larger than its bound?"""
    return m.bound < m.measured < math.inf


class Finding(NamedTuple):
    """What the numbers of one adapted layer show.

    rank      the effective rank of dW (of DoRA: of s B A): how many of its r directions it uses
    dW, W     their Frobenius norms
    error     of merging in the stored dtype: how far fl(W + dW) is from W + dW, in halves of an
              ulp; at most 1 if rounded once
    lost      the share of dW's norm that this rounding takes away
    """

    layer: str
    shape: str
    r: int
    scaling: float
    rank: float
    dW: float
    W: float
    finite: bool
    dtype: str
    error: float
    lost: float


class Report(NamedTuple):
    rows: list[Row]
    layers: list[Finding]


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or another signal, while `done` of `total` cases were measured.

    report    what was measured until then
    """

    def __init__(self, signal: KeyboardInterrupt, report: Report, done: int, total: int):
        super().__init__(*signal.args)
        self.report = report
        self.done = done
        self.total = total


def verify(
    cases: int = 100, seed: int = 0, properties: Sequence[Property] = PROPERTIES
) -> list[Row]:
    """Every property's worst case over random layers; the same seed gives the same numbers.

    `cases` layers have LoRA; half as many each have DoRA, AdaLoRA, and any of them over codes.
    """
    seeds = range(seed, seed + cases)
    half = seeds[: (cases + 1) // 2]
    made = [random_case(i) for i in seeds]
    for kind in ("dora", "adalora"):
        made += [random_case(i, kind) for i in half]
    for i, kind in zip(half, itertools.cycle(ADAPTERS)):
        made.append(random_case(i, kind, quantized=True))
    return measure(made, properties)


def measure(
    cases: Sequence[Any], properties: Sequence[Property] = PROPERTIES, unit: str = "layers"
) -> list[Row]:
    """Every property's worst case, in the list's order; one that applies to no case has no row.

    unit   what the progress bar calls the cases

    `Stopped` at Ctrl-C.
    """
    measured: dict[str, list[tuple[str, Measured]]] = {p.name: [] for p in properties}
    done = 0

    def rows() -> list[Row]:
        return [
            worst_row(p.name, p.equation, p.source, measured[p.name], p.is_true)
            for p in properties
            if measured[p.name]
        ]

    with _fast_arrays(), _progress_bar("verify", len(cases), unit) as bar:
        try:
            for case in cases:
                for p in properties:
                    bar.set_postfix_str(f"{case.name}: {p.name}", refresh=False)
                    bar.update(0)
                    if p.applies(case):
                        measured[p.name].append((case.name, p.check(case)))
                done += 1  # the bar does not count where it is not shown
                bar.update()
        except KeyboardInterrupt as signal:
            raise Stopped(signal, Report(rows(), []), done, len(cases)) from None
    return rows()


def _progress_bar(title: str, total: int, unit: str = "layers") -> Any:
    """A bar: layers, or other cases, done of all, and what is in work."""
    return progress_bar(
        desc=title,
        total=total,
        unit=f" {unit}",
        miniters=0,  # a new text is shown soon, although no layer is done meanwhile
        leave=False,
        dynamic_ncols=True,
    )


def _fast_arrays() -> Any:
    """A context for many arrays of a layer's size, one after another.

    Freed memory is kept for the next one. BLAS has one thread: that is as fast here, for half the
    time of two processors, and the bits do not depend on their number.
    """
    keep_memory()
    return one_blas_thread()


# ---- given files ---------------------------------------------------------------------------------


def verify_files(base: str | Path, adapter: str | Path, seed: int = 0) -> Report:
    """Every property on every adapted layer of these files, and a description of each layer.

    The files are only read. Computed in float32, or in float64 where the base is stored so.
    FormatError for files that are damaged or do not fit each other; a number that is not finite
    loads, and then the rows are not ok. `Stopped` at Ctrl-C while properties are measured.
    """
    _, checkpoint = read_checkpoint(base)
    with checkpoint:
        double = any(checkpoint.dtype(key) == "F64" for key in checkpoint.keys())
        dtype = "float64" if double else "float32"
        model = PeftModel.from_pretrained(CausalLM.from_pretrained(base, dtype), adapter)
        cases = list(cases_of(model, seed=seed))
        layers = []
        with _fast_arrays(), _progress_bar("describe", len(cases)) as bar:
            for case in cases:
                bar.set_postfix_str(case.name, refresh=False)
                layers.append(describe_layer(case, checkpoint))
                bar.update()
    infinite = []
    for name, p in model.named_parameters():
        wrong = np.count_nonzero(~np.isfinite(p.numpy()))
        infinite.append((name, Measured(float(wrong), 0)))
    finite = worst_row(
        "finite", "no NaN, no inf", "every tensor of the base and the adapter", infinite
    )
    merged = worst_row(
        "merge as stored",
        "|fl(W + dW) - (W + dW)| ≤ ulp / 2",
        "IEEE 754-2019, section 4.3.1",
        [(layer.layer, Measured(layer.error, 1)) for layer in layers],
    )
    try:
        return Report([finite, merged, *measure(cases)], layers)
    except Stopped as stopped:
        stopped.report = Report([finite, merged, *stopped.report.rows], layers)
        raise


def describe_layer(case: Case, checkpoint: Checkpoint) -> Finding:
    adapter = case.adapters[case.first]
    W = case.base.dense_weight().astype(np.float64)
    key = base_key(checkpoint, f"{case.name}.weight")
    dtype = "F32" if key is None else checkpoint.dtype(key)
    with np.errstate(all="ignore"):  # a number that is not finite is reported, not warned of
        dW = case.original.delta_weight(case.first)
        merged, half_ulp = round_with_half_ulp(W + dW, dtype)
        off = abs(merged - (W + dW))
        norm = float(np.linalg.norm(dW))
        return Finding(
            layer=case.name,
            shape=f"{W.shape[0]} x {W.shape[1]}",
            r=adapter.r,
            scaling=adapter.scaling,
            rank=effective_rank(_spectrum(adapter, dW)),
            dW=norm,
            W=float(np.linalg.norm(W)),
            finite=bool(np.isfinite(merged).all()),
            dtype=dtype,
            error=float((off / half_ulp).max()),
            lost=float(np.linalg.norm(off)) / norm if norm else 0.0,
        )


def _spectrum(adapter: Any, dW: Array) -> Array:
    """The singular values of dW, from its factors if it has some (of DoRA: of s B A)."""
    if isinstance(adapter, MapAdapter):
        is_finite = bool(np.isfinite(dW).all())
        return np.linalg.svd(dW, compute_uv=False) if is_finite else np.array([np.nan])
    A = adapter.lora_A.numpy()
    if isinstance(adapter, AdaLoraAdapter):
        A = A * adapter.lora_E.numpy()
    return singular_values(A, adapter.lora_B.numpy(), adapter.scaling)


def round_with_half_ulp(exact: Array, dtype: str) -> tuple[Array, Array]:
    """(fl(exact), half an ulp there) in a dtype of the file format's, both as float64."""
    stored = widen(round_to(exact, dtype if dtype in FLOATS else "F32"))
    half_ulp = np.spacing(abs(stored)).astype(np.float64) / 2
    if dtype == "BF16":
        half_ulp *= 2.0**16  # bfloat16 is the upper half of a float32
    return stored.astype(np.float64), half_ulp


def worst_ratio(rows: Iterable[Row]) -> float:
    """The largest measured / bound of all claims that are true."""
    return max((row.ratio for row in rows if row.is_true), default=math.nan)


def as_json(report: Report) -> dict[str, Any]:
    """What `minilora verify --json` prints. A number that JSON lacks is a string: "nan", "inf"."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value

    def table(items: Sequence[Any]) -> list[dict[str, Any]]:
        return [{name: plain(value) for name, value in item._asdict().items()} for item in items]

    return {
        "ok": all(row.ok for row in report.rows),
        "worst_ratio": plain(worst_ratio(report.rows)),
        "rows": table(report.rows),
        "layers": table(report.layers),
    }
