"""A0 and B0 of a start, or its base Q, computed once more from W.

    pissa    s B0 A0 = the r leading terms of W's singular value decomposition
    olora    B0 A0 = Q_r R_r of W's QR decomposition
    loftq    Q, which codes decode to

Signs, and rotations among equal singular values, cancel in B0 A0. If W does not determine B0 A0,
nothing is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from ...errors import ConfigError, FormatError
from ...formats.disk import JsonObject
from ...formats.dtypes import round_to
from ...quant.codes import KINDS, encode
from ...threads import one_blas_thread
from ..config import LoraConfig
from ..factors import Part
from .values import Given, begin

Array = np.ndarray
RECOMPUTED = ("pissa", "olora")
# |Q^T W|^2, Q being an orthonormal basis of B's columns, over its maximum for that rank: less means
# that W lacks what the start took out of it.
LEAST_SHARE = 0.5
EQUAL = 2.0**-18  # relative; nearer singular values or columns cannot be distinguished
LOFTQ_KINDS = {4: "nf4", 8: "rows"}
MOST_ROUNDS = 100


def recompute(word: str, path: str, W: Array, B: Array, s: float, where: str) -> Part:
    """A0, B0 and s of a layer whose start was pissa or olora, computed from W.

    W (O, I), and the trained B (O, r), in float64. FormatError if W does not determine A0 and B0,
    or if this W is R already.
    """
    r = B.shape[1]
    head = f"{where}: init_lora_weights={word!r}"
    advice = "give --initial DIR (the adapter as saved before training)"
    if not (np.isfinite(W).all() and np.isfinite(B).all()):
        raise FormatError(f"{head}: {path} is not finite, so it has no first values: repair it")
    if word == "pissa":
        S = np.linalg.svd(W, compute_uv=False)
        if r < len(S) and S[r - 1] - S[r] <= EQUAL * S[0]:
            raise FormatError(
                f"{head}: {path} has equal singular values number {r} and {r + 1}, so W does not "
                f"say which of them the adapter began with: {advice}"
            )
        if energy_along(B, W) < LEAST_SHARE * (S[:r] ** 2).sum() and r < len(S):
            raise looks_like_residual(where, word, path)
    else:
        R = np.linalg.qr(W[:, :r], mode="r")
        if abs(np.diag(R)).min() <= EQUAL * np.linalg.norm(R, axis=0).max():
            raise FormatError(
                f"{head}: the first {r} columns of {path} depend on each other, so W does not say "
                f"what the adapter began with: {advice}"
            )
    A0, B0, *_ = begin(word, path, W, r, s, Given())
    return Part(A0, B0, s)


def energy_along(B: Array, W: Array) -> float:
    """|Q^T W|^2 for W (O, I), Q being an orthonormal basis of the columns of B (O, r)."""
    Q = np.linalg.qr(B)[0]
    return float(np.linalg.norm(Q.T @ W) ** 2)


def looks_like_residual(where: str, word: str, path: str) -> FormatError:
    """The error for a base that already lacks what the start would take out of it."""
    return FormatError(
        f"{where}: init_lora_weights={word!r:.40}, but this base has nothing left where B points "
        f"({path}): it looks like the residual already; say --base-is residual, or give the "
        "base as it was"
    )


def loftq_fields(kind: str, rounds: Mapping[str, int]) -> JsonObject:
    """The loftq_config of a start with codes of this kind, and the iterations of each layer.

    PEFT computes Q again from loftq_bits and loftq_iter. They are 0, which it refuses, if it does
    not have these codes or the layers differ in their iterations. `kind` and `rounds` are
    minilora's.
    """
    several = set(rounds.values())
    iterations = several.pop() if len(several) == 1 else 0
    bits = 4 if kind == "nf4" else 0
    return {"loftq_bits": bits, "loftq_iter": iterations, "kind": kind, "rounds": dict(rounds)}


def coded_base(config: LoraConfig, path: str, W: Array, where: str) -> Array:
    """Q (O, I), the base over which a layer with the start loftq trained.    W (O, I) in float64

    PEFT's codes are NF4 in blocks of 64, or int8 by rows of the weight in float16.
    """
    fields = config.extra.get("loftq_config") or {}
    fields = fields if isinstance(fields, dict) else {}
    kind = fields.get("kind", LOFTQ_KINDS.get(fields.get("loftq_bits", 4)))
    several = fields.get("rounds")
    rounds = several.get(path) if isinstance(several, dict) else fields.get("loftq_iter", 1)
    if type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS or kind not in CODED:
        raise ConfigError(
            f"{where}: loftq_config must have loftq_bits 4 or 8 and loftq_iter from 1 to "
            f"{MOST_ROUNDS}, got {fields!r:.100}"
        )
    decode = CODED[kind]
    r = config.rank(path)
    Q = decode(W)
    with one_blas_thread():
        for _ in range(rounds - 1):
            U, S, Vt = np.linalg.svd(W - Q, full_matrices=False)
            Q = decode(W - (U[:, :r] * S[:r]) @ Vt[:r])
    return Q


def _row_codes(W: Array) -> Array:
    """Q (O, I) of int8 codes with one absmax per row, for W (O, I)."""
    half = round_to(W, "F16").astype(np.float64)
    absmax = abs(half).max(axis=1, keepdims=True)
    scale = np.where(absmax == 0, 1, absmax) / 127
    return np.asarray(np.rint(half / scale) * scale)


def _block_codes(kind: str, W: Array) -> Array:
    """Q (O, I) of blockwise codes of this kind, for W (O, I)."""
    return np.asarray(encode(W.astype(np.float32), kind).decode(np.float64))


CODED: dict[str, Callable[[Array], Array]] = {
    kind: functools.partial(_block_codes, kind) for kind in KINDS
}
CODED["rows"] = _row_codes
