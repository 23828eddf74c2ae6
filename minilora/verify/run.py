"""Every property over many cases, one row each: over random layers, or over those of somebody's own files.

verify         over random cases
verify_files   over each adapted layer of a base and an adapter, and what there is to find in each
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..backend import Array
from ..formats import Checkpoint, bf16_from, bf16_to_float32, read_checkpoint
from ..lora import AdaLoraAdapter, PeftModel
from ..lora.factors import effective_rank, singular_values
from ..models.transformer import CausalLM
from .case import ADAPTERS, Case, cases_of, random_case
from .measuring import Measured, Property
from .properties import PROPERTIES


class Row(NamedTuple):
    """A property's worst case."""

    property: str
    equation: str
    source: str
    measured: float
    bound: float
    ratio: float  # measured / bound
    ok: bool
    where: str  # which case it was
    cases: int  # to how many the property applies
    note: str = ""

    @classmethod
    def of(
        cls, name: str, equation: str, source: str, found: Sequence[tuple[str, Measured]]
    ) -> Row:
        where, m = max(found, key=lambda item: (not item[1].ok, item[1].ratio))
        return cls(
            name, equation, source, m.measured, m.bound, m.ratio, m.ok, where, len(found), m.note
        )


class Finding(NamedTuple):
    """What there is to know of one adapted layer.

    rank      the effective rank of dW (of DoRA: of s B A): how many of its r directions it really uses
    dW, W     their Frobenius norms
    error     of merging in the stored dtype: how far fl(W + dW) is from W + dW, in halves of an ulp; 1 if rounded once
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


def verify(
    cases: int = 100, seed: int = 0, properties: Sequence[Property] = PROPERTIES
) -> list[Row]:
    """Every property over random cases, half as many each of DoRA, of AdaLoRA and over codes: the worst of each.

    By the seed the same numbers.
    """
    half = [seed + i for i in range((cases + 1) // 2)]
    made = [random_case(seed + i) for i in range(cases)]
    made += [random_case(i, kind) for kind in ("dora", "adalora") for i in half]
    made += [
        random_case(i, kind, quantized=True) for i, kind in zip(half, itertools.cycle(ADAPTERS))
    ]
    return measure(made, properties)


def measure(cases: Sequence[Case], properties: Sequence[Property] = PROPERTIES) -> list[Row]:
    """Every property over these cases, in the list's order; one that applies to none of them has no row."""
    found: dict[str, list[tuple[str, Measured]]] = {p.name: [] for p in properties}
    for case in tqdm(cases, desc="verify", disable=None, leave=False, dynamic_ncols=True):
        for p in properties:
            if p.applies(case):
                found[p.name].append((case.name, p.check(case)))
    return [
        Row.of(p.name, p.equation, p.source, found[p.name]) for p in properties if found[p.name]
    ]


# ---- somebody's own files -------------------------------------------------------------------------------------------


def verify_files(base: str | Path, adapter: str | Path, seed: int = 0) -> Report:
    """Every property on every adapted layer of these files, and what there is to find there. The files are only read.

    Computed in float32, or in float64 where the base is stored so. FormatError for files that are damaged or do not
    fit each other; a number that is not finite loads, and then the rows are not ok.
    """
    _, checkpoint = read_checkpoint(base)
    with checkpoint:
        dtype = (
            "float64"
            if any(checkpoint.dtype(key) == "F64" for key in checkpoint.keys())
            else "float32"
        )
        model = PeftModel.from_pretrained(CausalLM.from_pretrained(base, dtype), adapter)
        cases = list(cases_of(model, seed=seed))
        layers = [_finding(case, checkpoint) for case in cases]
    parameters = [
        (n, Measured(float(np.count_nonzero(~np.isfinite(p.numpy()))), 0))
        for n, p in model.named_parameters()
    ]
    rounded = [(f.layer, Measured(f.error, 1)) for f in layers]
    rows = [
        Row.of("finite", "no NaN, no inf", "every tensor of the base and the adapter", parameters),
        Row.of(
            "merge as stored",
            "|fl(W + dW) - (W + dW)| ≤ ulp / 2",
            "IEEE 754-2019, section 4.3.1",
            rounded,
        ),
    ]
    return Report([*rows, *measure(cases)], layers)


def _finding(case: Case, checkpoint: Checkpoint) -> Finding:
    (adapter,) = (case.subject.adapters[name] for name in case.configs)
    A, B, s = adapter.lora_A.numpy(), adapter.lora_B.numpy(), adapter.scaling
    A = A * adapter.lora_E.numpy() if isinstance(adapter, AdaLoraAdapter) else A
    W, key = case.subject.base_layer.dense_weight().astype(np.float64), f"{case.name}.weight"
    with np.errstate(all="ignore"):  # what is not finite is found, not warned of
        dW = case.subject.delta_weight(next(iter(case.configs)))
        values, norm = singular_values(A, B, s), float(np.linalg.norm(dW))
        stored = checkpoint.dtype(key) if key in checkpoint else "F32"
        merged, half_ulp = rounded(W + dW, stored)
        off = abs(merged - (W + dW))
        error, lost = (
            float((off / half_ulp).max()),
            float(np.linalg.norm(off)) / norm if norm else 0.0,
        )
    shape, finite = f"{len(B)} x {A.shape[1]}", bool(np.isfinite(merged).all())
    size = float(np.linalg.norm(W))
    return Finding(
        case.name, shape, len(A), s, effective_rank(values), norm, size, finite, stored, error, lost
    )


def rounded(total: Array, dtype: str) -> tuple[Array, Array]:
    """(fl(total), half an ulp there) in a dtype of the file format's: F64, F32, F16 or BF16; all four as float64."""
    if dtype == "BF16":  # the upper half of a float32, so an ulp is 2^16 of float32's
        single = bf16_to_float32(bf16_from(total))
        half = np.spacing(abs(single)).astype(np.float64) * 2.0**15
    else:
        single = total.astype({"F64": np.float64, "F16": np.float16}.get(dtype, np.float32))
        half = np.spacing(abs(single)).astype(np.float64) / 2
    return single.astype(np.float64), half


def worst_ratio(rows: Iterable[Row]) -> float:
    """The largest measured / bound of all rows."""
    return max((row.ratio for row in rows), default=math.nan)


def as_json(report: Report) -> dict[str, Any]:
    """For programs: what `minilora verify --json` prints. A number that JSON lacks is a string: "nan", "inf"."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    def table(items: Sequence[Any]) -> list[dict[str, Any]]:
        return [{name: plain(value) for name, value in item._asdict().items()} for item in items]

    rows, layers = table(report.rows), table(report.layers)
    ok = all(row.ok for row in report.rows)
    return {
        "ok": ok,
        "worst_ratio": plain(worst_ratio(report.rows)),
        "rows": rows,
        "layers": layers,
    }
