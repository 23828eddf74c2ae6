"""Operations that make a step fast, each equal to what it says in elementary operations: the tests hold it to that.

A linear map whose weight was formed once for many calls, attention as one operation, and a loss without all its logits.
Shapes as in functional.py: B batch, T time (queries), S keys, H heads, K key/value heads, G = H / K, D head size, V
vocabulary, I in, O out, r rank, N rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .autograd import Tensor, grad_enabled, namespace, record
from .backend import Array
from .functional import IGNORE, Grads, counted, row_dot, rows

# ---- one weight for a whole step ------------------------------------------------------------------------------------

Pull = Callable[
    [Array, Array], Grads
]  # from X (N, I) and dY (N, O) to the gradients of some parameters


class OfOutput(NamedTuple):
    """A pull that also reads the output Y = X W'^T (N, O), without the bias: y is then kept until backward."""

    pull: Callable[[Array, Array, Array], Grads]


Parts = list[tuple[tuple[Tensor, ...], Pull | OfOutput]]  # these parameters, and how


class Effective:
    """The weight W' (O, I) that layers with one input have in a step, formed beforehand, once for many calls.

    weight   W', the layers' rows below each other
    layers   of each: its size O_i, its bias, and the parameters that its rows were formed of, with their pulls
    stacked  the outputs stand in a new first axis (n, ..., O / n), for layers of equal size; otherwise side by side
    """

    def __init__(
        self,
        weight: Array,
        layers: Sequence[tuple[int, Tensor | None, Parts]],
        stacked: bool = False,
    ):
        ends = list(itertools.accumulate(size for size, _, _ in layers))
        self.weight = weight.reshape(len(layers), -1, weight.shape[1]) if stacked else weight
        self.stacked = stacked
        self.rows = [slice(end - size, end) for end, (size, _, _) in zip(ends, layers, strict=True)]
        self.biases = [(i, bias) for i, (_, bias, _) in enumerate(layers) if bias is not None]
        self.pulls = [(i, pull) for i, (_, _, parts) in enumerate(layers) for _, pull in parts]
        params = (p for _, _, parts in layers for formed_of, _ in parts for p in formed_of)
        self.inputs = (*(bias for _, bias in self.biases), *params)


def effective_linear(x: Tensor, effective: Effective) -> Tensor:
    """y = x W'^T + b    x (..., I), W' (O, I) -> (..., O), or (n, ..., O / n) if it is stacked

    For LoRA W' is W + s B A. By the merge identity this equals `linear` followed by `lora_linear`, with one product a
    direction in place of three; the pulls bring A and B their gradients by way of (N, r), never of dL/dW'.
    """
    xp, W, pulls = namespace(x, *effective.inputs), effective.weight, effective.pulls
    stacked, at, X, shape = effective.stacked, effective.rows, rows(x.data), x.shape
    y = xp.matmul(X, W.swapaxes(-1, -2))  # (N, I) @ (I, O) -> (N, O)

    def layer(z: Array, i: int) -> Array:  # its (N, O_i), a view
        return z[i] if stacked else z[:, at[i]]

    y_kept = y if any(isinstance(pull, OfOutput) for _, pull in pulls) else None
    if y_kept is not None and effective.biases:
        y = y.copy()  # Y + b - b would not be Y
    for i, bias in effective.biases:
        layer(y, i)[...] += bias.data
    need_dx, need_db = (
        x.requires_grad,
        [i if bias.requires_grad else None for i, bias in effective.biases],
    )
    X_kept, flat = X if pulls else None, y.shape

    def vjp(dy: Array) -> Grads:
        dY, dX = dy.reshape(flat), None
        if need_dx and stacked:
            dX = dY[0] @ W[0]
            for i in range(1, len(W)):
                dX += dY[i] @ W[i]
        elif need_dx:
            dX = dY @ W  # (N, O) @ (O, I) -> (N, I)
        found = [None if dX is None else dX.reshape(shape)]
        found += [None if i is None else layer(dY, i).sum(axis=0) for i in need_db]
        for i, pull in pulls:
            if isinstance(pull, OfOutput):
                found += pull.pull(X_kept, layer(dY, i), layer(y_kept, i))
            else:
                found += pull(X_kept, layer(dY, i))
        return tuple(found)

    return record(y.reshape(*flat[:-2], *shape[:-1], flat[-1]), (x, *effective.inputs), vjp)


def costs(tokens: int, inputs: int, outputs: int, r: int, normed: bool = False) -> tuple[int, int]:
    """Operations that LoRA adds to a step over `tokens` positions: (W + dW formed once, the low-rank path at each one).

    Counted from shapes alone, so that a resumed run chooses alike: 2 r I O operations and three passes over W, which
    weigh as much as 12 each element; against 4 r (I + O) a position, forward and for dx, and twice that because skinny
    products run at half the speed of square ones. `normed`: that path has to form W + dW as well, to know its norms.
    """
    formed, apart = inputs * outputs * (2 * r + 12), tokens * 2 * 4 * r * (inputs + outputs)
    return formed, apart + formed * normed


# ---- the head and its loss ------------------------------------------------------------------------------------------

ROWS, LOGITS = (
    1024,
    1 << 20,
)  # at once in `linear_cross_entropy`; with 4 MiB of logits these stay in the cache


def linear_cross_entropy(
    x: Tensor, head: Tensor, targets: Array, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """cross_entropy(x head^T, targets)    x (..., C), head (V, C), targets (...) integers -> scalar

    The logits exist for a few words at a time and never all at once, whose maximum and sum are corrected as they go on
    (Milakov & Gimelshein 2018, algorithm 3). So the gradients are taken on the way, up to the factor dy: with
    E = exp(logits - max) and p = E / sum E they are (p - onehot) head and (p - onehot)^T x.
    """
    xp, V, shape = namespace(x, head), len(head), x.shape
    t, ignored, weight = counted(x.backend, shape[:-1], V, targets, ignore_index, reduction)
    weight = weight.astype(x.dtype)
    X = xp.where(
        ignored[:, None], 0, rows(x.data)
    )  # a row that does not count is read no further, whatever it holds
    dX = xp.empty_like(X) if grad_enabled() and x.requires_grad else None
    dW = xp.zeros(head.shape, head.dtype) if grad_enabled() and head.requires_grad else None
    loss = xp.zeros((), X.dtype)
    for at in _slices(len(X), ROWS):
        Xn, tn, w, skip = X[at], t[at], weight[at], ignored[at]  # (n, C), (n,), (n,), (n,)
        top, total, hit = (xp.full(w.shape, start, X.dtype) for start in (-np.inf, 0, 0))
        words = _slices(V, max(1, LOGITS // len(Xn)))

        def logits(W: Array, Xn: Array = Xn, skip: Array = skip) -> Array:
            Z = W @ Xn.T  # (v, C) @ (C, n) -> (v, n): NumPy reduces over rows with whole vectors
            Z[:, skip] = 0
            return Z

        for v in words:
            W = head.take(v)
            E = logits(W)
            logit = xp.take_along_axis(
                E, xp.clip(tn - v.start, 0, v.stop - v.start - 1)[None], axis=0
            )[0]
            hit = xp.where((tn >= v.start) & (tn < v.stop), logit, hit)
            before, top = top, xp.maximum(top, E.max(axis=0))
            with np.errstate(invalid="ignore"):  # an infinite logit makes its row NaN
                E -= top
                xp.exp(E, out=E)
                shrink = xp.exp(before - top)
            total = total * shrink + E.sum(axis=0)
            if dX is not None:
                part = E.T @ W  # (n, v) @ (v, C)
                dX[at] = part if v.start == 0 else dX[at] * shrink[:, None] + part
        with np.errstate(invalid="ignore"):
            each = xp.log(total) - (
                hit - top
            )  # not log + top - hit: near 0 that would round it away
        loss = loss + (xp.where(skip, 0, each) * w).sum()
        share = (w / total)[:, None]  # (n, 1)
        if dX is not None:
            dX[at] = xp.where(skip[:, None], 0, dX[at] * share - head.take(tn) * w[:, None])
        if dW is not None:
            for v in words:
                E = E if len(words) == 1 else xp.exp(logits(head.take(v)) - top)
                dW[v] += E @ (Xn * share)  # (v, n) @ (n, C)
    if dW is not None:
        dW -= x.backend.add_rows(t, X * weight[:, None], V)

    def vjp(dy: Array) -> Grads:
        return None if dX is None else (dX * dy).reshape(shape), None if dW is None else dW * dy

    return record(loss, (x, head), vjp)


def _slices(size: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, size)) for start in range(0, size, most)]


# ---- attention ------------------------------------------------------------------------------------------------------

QUERY_BLOCK = 64  # queries a block: shorter blocks skip more hidden scores, and cost more calls
KEPT_SCORES = (
    1 << 20
)  # with more of them, backward computes exp(scores) again: memory then grows with T, not T^2


def turn(xp: Any, z: Array, cos: Array, sin: Array, out: Array | None = None) -> Array:
    """Rotate pairs (z_i, z_{i + D/2}) by position-dependent angles, on arrays.    z (B, T, h, D) -> (B, T, h, D)

    Su et al. 2021, eq. (34), in the layout of Llama's checkpoints: the pair of i is i + D/2, not i + 1. cos and sin
    (T, h D) have a row of factors for all heads of a position, because arithmetic over whole rows is fast; sin's sign
    is minus in the first half of each D. -sin turns back, which is the transpose.
    """
    B, T, h, D = z.shape
    pairs = (B, T, h, 2, D // 2)
    y = xp.empty(z.shape, z.dtype) if out is None else out
    xp.multiply(z.reshape(pairs)[..., ::-1, :], sin.reshape(pairs[1:]), out=y.reshape(pairs))
    whole = y.reshape(B, T, h * D)
    whole += z.reshape(B, T, h * D) * cos
    return y


def attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Array | None = None,
    sin: Array | None = None,
    extend: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention, softmax(q k^T) v, with q and k rotated.    qkv (B, T, (H + 2 K) D) -> (B, T, H D)

    Side by side in qkv: q of H heads, k and v of K heads; query head h reads key/value head h // G (grouped queries:
    Ainslie et al. 2023; K = H is the ordinary case). cos and sin (T, (H + K) D) as `turn` reads them; the scale
    1/sqrt(D) of the scores is a factor of theirs in the rows of q; without them nothing is rotated. `extend(k, v)`,
    each (B, T, K, D), may return (B, S, K, D) with earlier positions in front: the T queries are the last of S, and no
    gradient flows then. A query sees the newest `window` keys only (Beltagy et al. 2020, section 3.1), or all of them.
    """
    xp, (B, T, width), turned = namespace(qkv), qkv.shape, heads + kv_heads
    if heads % kv_heads or width % (turned + kv_heads):
        raise ValueError(
            f"attention: {heads} heads and {kv_heads} of keys do not fit each other, or {width} channels"
        )
    D = width // (turned + kv_heads)
    Z = qkv.data.reshape(B, T, heads + 2 * kv_heads, D)
    QK = Z[:, :, :turned].copy() if cos is None else turn(xp, Z[:, :, :turned], cos, sin)
    q, k, v = QK[:, :, :heads], QK[:, :, heads:], Z[:, :, turned:].copy()  # qkv itself is not kept
    if cos is None:
        q *= D**-0.5
    O, back = _attend(xp, q, *(extend(k, v) if extend else (k, v)), window)

    def vjp(dy: Array) -> Grads:
        dZ = xp.empty((B, T, heads + 2 * kv_heads, D), dy.dtype)
        dQK = dZ[:, :, :turned] if cos is None else xp.empty_like(QK)
        back(dy.reshape(B, T, heads, D), dQK[:, :, :heads], dQK[:, :, heads:], dZ[:, :, turned:])
        if cos is None or sin is None:
            dQK[:, :, :heads] *= D**-0.5
        else:
            turn(xp, dQK, cos, -sin, out=dZ[:, :, :turned])
        return (dZ.reshape(B, T, width),)

    return record(O.reshape(B, T, heads * D), (qkv,), vjp)


def _attend(
    xp: Any, q: Array, k: Array, v: Array, window: int | None
) -> tuple[Array, Callable[[Array, Array, Array, Array], None]]:
    """softmax(q k^T) v, causal, on arrays.    q (B, T, H, D), k and v (B, S, K, D) -> O (B, T, H, D) and `back`

    `back(dO, dq, dk, dv)` fills the last three. Queries go in blocks of t, each with the s keys that any of them may
    see. Scores are transposed, (s, H t): softmax then reduces over rows, which NumPy does with whole vectors.
    """
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    G = H // K
    order = xp.arange(min(QUERY_BLOCK, T))
    future = xp.where(order[:, None] > order, -np.inf, 0).astype(q.dtype)  # (key, query)

    def by_head(
        z: Array,
    ) -> Array:  # (B, T, H, D) -> (B, K, G, T, D): no copy, and products with k broadcast over G
        return z.reshape(B, z.shape[1], K, z.shape[2] // K, D).transpose(0, 2, 3, 1, 4)

    def scores(
        keys: Array, queries: Array
    ) -> tuple[Array, Array]:  # in memory (B, s, H t); as a view (B, K, G, s, t)
        s, t = keys.shape[3], queries.shape[3]
        P = xp.empty((B, s, H * t), q.dtype)
        view = P.reshape(B, s, K, G, t).transpose(0, 2, 3, 1, 4)
        xp.matmul(keys, queries.swapaxes(-1, -2), out=view)
        return P, view

    def seen(at: slice) -> tuple[slice, Array, Array]:
        t, last = at.stop - at.start, S - T + at.stop
        keys = slice(max(0, last - t + 1 - window) if window else 0, last)
        P, view = scores(kh[..., keys, :], qh[..., at, :])
        P[:, -t:].reshape(B, t, H, t)[...] += future[
            :t, None, :t
        ]  # only the newest t keys can be too new
        old = (
            last - window - keys.start if window else 0
        )  # < t: so many keys are too old for the newest query
        if old > 0:
            past = xp.where(order[:, None] - old <= order - t, -np.inf, 0).astype(
                q.dtype
            )  # (key, query)
            P[:, :old].reshape(B, old, H, t)[...] += past[:old, None, :t]
        return keys, P, view

    O, inv, kept = xp.empty((B, T, H, D), q.dtype), xp.empty((B, T, H, 1), q.dtype), []
    qh, kh, vh, Oh = by_head(q), by_head(k), by_head(v), by_head(O)
    for at in _slices(T, QUERY_BLOCK):
        keys, P, view = seen(at)
        top = P.max(axis=1, keepdims=True)  # (B, 1, H t)
        P -= top
        xp.exp(P, out=P)
        total = (
            xp.ones((1, P.shape[1]), P.dtype) @ P
        )  # (B, 1, H t): a product sums faster than a reduction
        inv[:, at, :, 0] = 1.0 / total.reshape(B, H, at.stop - at.start).swapaxes(1, 2)
        xp.matmul(view.swapaxes(-1, -2), vh[..., keys, :], out=Oh[..., at, :])  # (t, s) @ (s, D)
        kept.append((at, keys, top, (P, view) if B * H * T * S <= KEPT_SCORES else None))
    O *= inv  # T x D numbers: dividing the scores would be T x S

    def back(dO: Array, dq: Array, dk: Array, dv: Array) -> None:
        d = dO * inv  # (B, T, H, D): softmax's division is here, so P stays exp(scores - top)
        dh, dqh, dkh, dvh = (by_head(z) for z in (d, dq, dk, dv))
        # softmax's gradient p (dp - sum p dp): the sum is rowsum(dO * O), T numbers (Dao et al. 2022, app. B)
        along = row_dot(xp, rows(d), rows(O)).reshape(B, T, H).swapaxes(1, 2)

        def add(total: Array, a: Array, b: Array) -> None:
            if G == 1 and a.shape[3] == S:
                xp.matmul(a, b, out=total)
            elif a.shape[3] == S:
                total[...] = (a @ b).sum(axis=2, keepdims=True)
            else:
                total[..., keys, :] += a @ b if G == 1 else (a @ b).sum(axis=2, keepdims=True)

        if (
            kept[-1][1].start > 0
        ):  # otherwise the latest block sees every key: what it brings is first
            dk[...], dv[...] = 0, 0
        for at, keys, top, exps in reversed(kept):
            if exps is None:
                exps = seen(at)[1:]
                exps[0][...] = xp.exp(exps[0] - top)
            P, view = exps
            add(dvh, view, dh[..., at, :])  # (s, t) @ (t, D)
            dS, dview = scores(vh[..., keys, :], dh[..., at, :])
            dS -= along[..., at].reshape(top.shape)
            dS *= P
            xp.matmul(
                dview.swapaxes(-1, -2), kh[..., keys, :], out=dqh[..., at, :]
            )  # (t, s) @ (s, D)
            add(dkh, dview, qh[..., at, :])  # (s, t) @ (t, D)

    return O, back
