"""Two checkpoints, tensor by tensor: how far apart they are, and in how many directions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..formats import Checkpoint, read_checkpoint
from .rewriting import Row, progress

Array = np.ndarray
# The largest relative error of rounding to a dtype.
HALF_STEPS = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# The shorter side of the largest matrix whose rank is computed by default, which takes seconds.
RANKED = 2048


def numerical_rank(D: Array, norm: float, half_step: float) -> int:
    """The number of singular values of D (O, I) that rounding W (O, I) to its stored dtype does not
    explain.

    Rounding errs like noise of at most u rms(W), rms(W) = `norm` / sqrt(O I), whose largest
    singular value is about that times sqrt(O) + sqrt(I) (Vershynin 2018, theorem 4.4.5).
    """
    noise = half_step * norm / math.sqrt(D.size or 1)
    return count_above(D, noise * sum(map(math.sqrt, D.shape)))


def count_above(D: Array, threshold: float) -> int:
    """The number of singular values of D (O, I) above the threshold.

    Their squares, the eigenvalues of D D^T, take a third of the time, but are only known up to
    `error`, what rounding makes of the product and of its decomposition (Higham 2002, section 3.5;
    Golub & Van Loan 2013, section 8.3). If a square is that near to the threshold's, or if squares
    underflow, LAPACK decomposes D itself.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        G = D @ D.T if D.shape[0] <= D.shape[1] else D.T @ D
        limits = np.finfo(np.float64)
        error = 2 * sum(D.shape) * limits.eps * float(np.trace(G)) + limits.tiny
    if math.isfinite(error) and error < threshold**2:
        squares = np.linalg.eigvalsh(G)
        least = int((squares > threshold**2 + error).sum())
        most = int((squares > threshold**2 - error).sum())
        if least == most:
            return least
    values = np.linalg.svd(D, compute_uv=False)
    return int((values > threshold).sum())


def diff(a: str | Path, b: str | Path, ranks: bool | None = None) -> Row:
    """How the checkpoint `b` differs from `a`: tensors that only one has, and a row for every other
    one.

    A row has |b - a| (Frobenius), the same over |a|, the largest difference, and, for a matrix, the
    numerical rank of b - a: with `ranks` always or never, by default (None) if a side is at most
    RANKED. None means not finite, or not known. FormatError for a damaged file.
    """
    with read_checkpoint(a)[1] as one, read_checkpoint(b)[1] as other:
        both = [key for key in one.keys() if key in other]
        rows = [_compare(one, other, key, ranks) for key in progress(both, "diff", "tensors")]
        return {
            "a": str(a),
            "b": str(b),
            "only in a": sorted(set(one.keys()) - set(both)),
            "only in b": sorted(set(other.keys()) - set(both)),
            "tensors": rows,
            "equal": sum(row["|b - a|"] == 0 for row in rows),
        }


def _compare(one: Checkpoint, other: Checkpoint, key: str, ranks: bool | None) -> Row:
    """The row of one tensor."""
    shape = one.shape(key)
    shapes = [" x ".join(map(str, file.shape(key))) for file in (one, other)]
    row: Row = {"tensor": key, "shape": " and ".join(dict.fromkeys(shapes))}
    row |= dict.fromkeys(("|b - a|", "relative", "largest", "rank"))
    if shapes[0] != shapes[1]:
        return row
    A = one.read(key, np.float64)
    D = other.read(key, np.float64)
    with np.errstate(all="ignore"):
        size = float(np.linalg.norm(A))
        other_size = float(np.linalg.norm(D))
        D -= A
        distance = float(np.linalg.norm(D))
    if not math.isfinite(distance + size):
        return row
    row["|b - a|"] = distance
    row["largest"] = float(np.abs(D).max(initial=0))
    if not distance:
        row["relative"] = 0.0
    elif size:
        row["relative"] = distance / size
    if ranks is None:
        ranks = min(shape, default=0) <= RANKED
    if len(shape) == 2 and ranks:
        half_step = max(HALF_STEPS.get(file.dtype(key), 0) for file in (one, other))
        row["rank"] = numerical_rank(D, max(size, other_size), half_step) if distance else 0
    return row
