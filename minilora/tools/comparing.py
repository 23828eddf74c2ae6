"""Two checkpoints, tensor by tensor: how far apart they are, and in how many directions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..formats import Checkpoint, read_checkpoint

Array = np.ndarray
HALF_STEPS = {
    "F64": 2.0**-53,
    "F32": 2.0**-24,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
}  # of rounding, relative
RANKED = 2048  # the shorter side of the largest matrix whose spectrum is computed unasked: above, it takes seconds


def numerical_rank(D: Array, norm: float, half_step: float) -> int:
    """How many singular values of D (O, I) stand out of what rounding W (O, I) to its stored type makes by itself.

    Rounding errs like noise of at most u rms(W), rms(W) = `norm` / sqrt(O I), whose largest singular value is about
    that times sqrt(O) + sqrt(I) (Vershynin 2018, theorem 4.4.5).
    """
    return count_above(D, half_step * norm / math.sqrt(D.size or 1) * sum(map(math.sqrt, D.shape)))


def count_above(D: Array, threshold: float) -> int:
    """How many singular values of D (O, I) are above the threshold.

    Their squares, the eigenvalues of D D^T, take a third of the time, but are only known up to `error`, what rounding
    makes of the product and of its decomposition (Higham 2002, section 3.5; Golub & Van Loan 2013, section 8.3). Where
    one lies that near to the threshold's square, or squares underflow, LAPACK's decomposition of D itself says it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        G = D @ D.T if D.shape[0] <= D.shape[1] else D.T @ D
        error = (
            2 * sum(D.shape) * np.finfo(np.float64).eps * float(np.trace(G))
            + np.finfo(np.float64).tiny
        )
    if math.isfinite(error) and error < threshold**2:
        squares = np.linalg.eigvalsh(G)
        least, most = (int((squares > threshold**2 + shift).sum()) for shift in (error, -error))
        if least == most:
            return least
    return int((np.linalg.svd(D, compute_uv=False) > threshold).sum())


def diff(a: str | Path, b: str | Path, ranks: bool | None = None) -> dict[str, Any]:
    """What sets the checkpoint `b` apart from `a`: tensors that only one has, and of each other one |b - a|.

    A row has |b - a| (Frobenius), that over |a|, the largest difference, and of a matrix the numerical rank of b - a:
    with `ranks` always or never, by default (None) for those with a side of at most RANKED. None stands for what is
    not finite, or is not known. FormatError for a damaged file.
    """
    with read_checkpoint(a)[1] as one, read_checkpoint(b)[1] as other:
        both = [key for key in one.keys() if key in other]
        rows = [
            _row(one, other, key, ranks)
            for key in tqdm(both, desc="diff", unit=" tensors", disable=None, leave=False)
        ]
        return {
            "a": str(a),
            "b": str(b),
            "only in a": sorted(set(one.keys()) - set(both)),
            "only in b": sorted(set(other.keys()) - set(both)),
            "tensors": rows,
            "equal": sum(row["|b - a|"] == 0 for row in rows),
        }


def _row(one: Checkpoint, other: Checkpoint, key: str, ranks: bool | None) -> dict[str, Any]:
    shape = one.shape(key)
    row: dict[str, Any] = {"tensor": key, "shape": " x ".join(map(str, shape))}
    row |= {"|b - a|": None, "relative": None, "largest": None, "rank": None}
    if other.shape(key) != shape:
        return {**row, "shape": f"{row['shape']} and {' x '.join(map(str, other.shape(key)))}"}
    A = one.read(key, np.float64)
    D = other.read(key, np.float64)
    with np.errstate(all="ignore"):
        size, other_size = float(np.linalg.norm(A)), float(np.linalg.norm(D))
        D -= A
        distance = float(np.linalg.norm(D))
    if not math.isfinite(distance + size):
        return row
    relative = distance / size if size else None
    row |= {
        "|b - a|": distance,
        "relative": relative if distance else 0.0,
        "largest": float(np.abs(D).max(initial=0)),
    }
    if len(shape) == 2 and (ranks or (ranks is None and min(shape) <= RANKED)):
        half = max(HALF_STEPS.get(file.dtype(key), 0) for file in (one, other))
        row["rank"] = numerical_rank(D, max(size, other_size), half) if distance else 0
    return row
