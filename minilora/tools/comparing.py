"""Two checkpoints, tensor by tensor: how far apart they are, and in how many directions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..formats import Checkpoint, read_checkpoint
from ..formats.checkpoint import align_keys, are_equal
from ..formats.safetensors import DTYPES
from .rewriting import Row, progress

Array = np.ndarray
Shape = tuple[int, ...]
# The largest relative error of rounding to a dtype.
HALF_STEPS = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# The shorter side of the largest matrix whose rank is computed by default, which takes seconds.
RANKED = 2048
VOCABULARY = ("embed_tokens", "wte", "lm_head")  # layers with a row for each token


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

    Tensors have the names of `a`. Keys of `b` that differ in their beginning alone are the same
    ones, and of an embedding or a head with another number of rows those are compared that both
    have: "notes" says so.
    """
    with read_checkpoint(a)[1] as one, read_checkpoint(b)[1] as other:
        alignment = align_keys(other.keys(), one.keys())
        keys = {alignment.names.get(key, key): key for key in other.keys()}
        both = [key for key in one.keys() if key in keys]
        rows = [
            _compare(one, key, other, keys[key], ranks) for key in progress(both, "diff", "tensors")
        ]
        resized = [key for key in both if one.shape(key) != other.shape(keys[key])]
        report: Row = {
            "a": str(a),
            "b": str(b),
            "only in a": sorted(set(one.keys()) - set(both)),
            "only in b": sorted(keys[name] for name in set(keys) - set(both)),
            "tensors": rows,
            "equal": sum(row["|b - a|"] == 0 and row["tensor"] not in resized for row in rows),
        }
        notes = [alignment.describe("b", "a")] if alignment.names else []
        for key in resized:
            shapes = one.shape(key), other.shape(keys[key])
            if _is_vocabulary(key) and has_other_rows(*shapes):
                rows_of = [shape[0] for shape in shapes]
                notes.append(
                    f"{key} has {rows_of[0]} rows in a and {rows_of[1]} in b: the first "
                    f"{min(rows_of)} are compared"
                )
        return {**report, "notes": notes} if notes else report


def has_other_rows(one: Shape | None, other: Shape | None) -> bool:
    """Whether two matrices differ in the number of their rows alone."""
    if one is None or other is None or len(one) != 2 or len(other) != 2:
        return False
    return one[1] == other[1] and one[0] != other[0]


def _is_vocabulary(key: str) -> bool:
    """Whether the rows of a tensor are tokens."""
    *_, layer, tensor = ("", *key.split("."))
    return layer in VOCABULARY and tensor == "weight"


def _compare(
    one: Checkpoint, key: str, other: Checkpoint, other_key: str, ranks: bool | None
) -> Row:
    """The row of one tensor."""
    shape, other_shape = one.shape(key), other.shape(other_key)
    shapes = [" x ".join(map(str, sides)) for sides in (shape, other_shape)]
    row: Row = {"tensor": key, "shape": " and ".join(dict.fromkeys(shapes))}
    row |= dict.fromkeys(("|b - a|", "relative", "largest", "rank"))
    is_resized = _is_vocabulary(key) and has_other_rows(shape, other_shape)
    if shape != other_shape and not is_resized:
        return row
    dtypes = one.dtype(key), other.dtype(other_key)
    if not {*dtypes} <= DTYPES.keys():  # not read, but equal bytes are equal numbers
        if are_equal(one, key, other, other_key):
            row |= {"|b - a|": 0.0, "relative": 0.0, "largest": 0.0}
        return row
    A = one.read(key, np.float64)
    D = other.read(other_key, np.float64)
    if is_resized:
        rows = min(len(A), len(D))
        A, D = A[:rows], D[:rows]
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
        half_step = max(HALF_STEPS.get(dtype, 0) for dtype in dtypes)
        row["rank"] = numerical_rank(D, max(size, other_size), half_step) if distance else 0
    return row
