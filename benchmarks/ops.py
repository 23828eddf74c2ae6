"""Measure what autograd costs per operation, above the same NumPy calls written by hand.

    python benchmarks/ops.py [--rounds 40] [--links 100] [--write]

An operation is applied `--links` times in a chain over one array, so that the cost of one call of
`gradients` is spread. The same chain is also written by hand on arrays, forward and then backward:
without Tensor, graph or checks. Both take turns and must give the same gradients. The overhead is
the median of their differences, divided by the number of operations. The loop that stores what
backward needs costs time in the chain by hand too; that time is measured and subtracted.

At 8 x 8 nearly all of the time is overhead, at 256 x 256 nearly all is arithmetic. BLAS has one
thread. Exit code 1 if the median over the elementary operations exceeds 5 us. `--write` stores the
result in benchmarks/results/ops.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl

from minilora import autograd, effective, functional
from minilora.autograd import Tensor, gradients
from minilora.effective import EffectiveWeight, Pull

RESULT = Path(__file__).parent / "results" / "ops.json"
TARGET = 5.0  # microseconds
SMALL, LARGE = 8, 256
AT_LARGE = ("mul", "tanh", "matmul", "linear", "rms_norm", "norm_linear_swiglu")

Array = Any
# x -> y, what backward needs
Forward = Callable[[Array], "tuple[Array, Any]"]
# dy, what backward needs, the sum of dw so far -> dx, the sum with this dw added
Backward = Callable[[Array, Any, Array], "tuple[Array, Array]"]


class Case(NamedTuple):
    """An operation whose output has the shape of its input, by the engine and by hand."""

    x: Array
    link: Callable[[Tensor], Tensor]
    forward: Forward
    backward: Backward
    weight: Tensor | None = None  # a leaf that all links share, which gets a gradient too
    operations: int = 1  # per link


def elementary(n: int) -> dict[str, Case]:
    """The algebra of autograd.py over (n, n) float32, and `linear`."""
    rng = np.random.default_rng(0)
    x, perm = start(n), rng.permutation(n)
    half, other = (n // 2, 2 * n), (n, n)
    # The product of a hundred factors near one stays in range.
    near_one = 1 + 0.01 * rng.standard_normal((n, n), np.float32)
    w, q = Tensor(near_one, requires_grad=True), Tensor(rotation(n), requires_grad=True)
    bias = np.zeros(n, np.float32)
    b = Tensor(bias, requires_grad=True)
    W, Q = w.data, q.data

    def unary(
        link: Callable[[Tensor], Tensor],
        forward: Forward,
        backward: Any,
        x: Array = x,
        operations: int = 1,
    ) -> Case:
        return Case(
            x, link, forward, lambda dy, saved, dw: (backward(dy, saved), dw), operations=operations
        )

    def back_to_two(dy: Array, saved: None) -> Array:
        dx = np.zeros(other, np.float32)
        dx[::-1] = dy
        return dx

    def rows_back(dy: Array, saved: None) -> Array:
        dx = np.zeros(other, np.float32)
        np.add.at(dx, perm, dy)
        return dx

    return {
        "add": Case(
            x, lambda t: t + w, lambda x: (x + W, None), lambda dy, _, dw: (dy, dw + dy), w
        ),
        "add, a bias": Case(
            x,
            lambda t: t + b,
            lambda x: (x + bias, None),
            lambda dy, _, dw: (dy, dw + dy.sum(0)),
            b,
        ),
        "sub": Case(
            x, lambda t: t - w, lambda x: (x - W, None), lambda dy, _, dw: (dy, dw - dy), w
        ),
        "mul": Case(
            x, lambda t: t * w, lambda x: (x * W, x), lambda dy, x, dw: (dy * W, dw + dy * x), w
        ),
        "mul, a number": unary(
            lambda t: t * 0.99, lambda x: (x * 0.99, None), lambda dy, _: dy * 0.99
        ),
        "div": Case(
            x,
            lambda t: t / w,
            lambda x: (x / W, x),
            lambda dy, x, dw: (dy / W, dw - dy * x / (W * W)),
            w,
        ),
        "tanh": unary(
            autograd.tanh, lambda x: (y := np.tanh(x), y), lambda dy, y: dy * (1 - y * y)
        ),
        "sqrt": unary(
            autograd.sqrt, lambda x: (y := np.sqrt(x), y), lambda dy, y: dy / (2 * y), np.abs(x) + 1
        ),
        # exp and log alternate: a chain of exp alone overflows.
        "exp, log": unary(
            lambda t: autograd.log(autograd.exp(t)),
            lambda x: (np.log(y := np.exp(x)), y),
            lambda dy, y: dy / y * y,
            operations=2,
        ),
        "sum": unary(
            lambda t: autograd.sum(t, axis=0, keepdims=True),
            lambda x: (x.sum(axis=0, keepdims=True), None),
            lambda dy, _: np.broadcast_to(dy, (1, n * n)),
            x.reshape(1, -1),  # one row: the result has the shape of the input
        ),
        "max": unary(
            lambda t: autograd.max(t, axis=0, keepdims=True),
            lambda x: (y := x.max(axis=0, keepdims=True), x == y),
            lambda dy, hit: hit * (dy / hit.sum(axis=0, keepdims=True).astype(np.float32)),
            x.reshape(1, -1),
        ),
        "reshape": unary(
            lambda t: autograd.reshape(autograd.reshape(t, half), other),
            lambda x: (x.reshape(half).reshape(other), None),
            lambda dy, _: dy.reshape(half).reshape(other),
            operations=2,
        ),
        "transpose": unary(
            autograd.transpose, lambda x: (x.transpose(), None), lambda dy, _: dy.transpose()
        ),
        "index, slices": unary(lambda t: t[::-1], lambda x: (x[::-1], None), back_to_two),
        "index, an array": unary(lambda t: t[perm], lambda x: (x[perm], None), rows_back),
        "matmul": Case(
            x, lambda t: t @ q, lambda x: (x @ Q, x), lambda dy, x, dw: (dy @ Q.T, dw + x.T @ dy), q
        ),
        "linear": Case(
            x,
            lambda t: functional.linear(t, q),
            lambda x: (x @ Q.T, x),
            lambda dy, x, dw: (dy @ Q, dw + dy.T @ x),
            q,
        ),
    }


# ---- the parts of a transformer's layer, over (n, n) float32: several NumPy calls each -----------


def rotation(n: int, seed: int = 0) -> Array:
    """A random orthogonal (n, n) matrix: a hundred products with it preserve a vector's length."""
    normal = np.random.default_rng(seed).standard_normal((n, n))
    return np.linalg.qr(normal)[0].astype(np.float32)


def start(n: int) -> Array:
    return np.random.default_rng(1).standard_normal((n, n), np.float32)


def softmax(n: int) -> Case:
    def forward(x: Array) -> tuple[Array, Array]:
        y = np.exp(x - x.max(axis=-1, keepdims=True))
        y /= y.sum(axis=-1, keepdims=True)
        return y, y

    def backward(dy: Array, y: Array, dw: Array) -> tuple[Array, Array]:
        return y * (dy - (dy * y).sum(axis=-1, keepdims=True)), dw

    return Case(start(n), functional.softmax, forward, backward)


def rms_norm(n: int) -> Case:
    gain = Tensor(np.ones(n, np.float32), requires_grad=True)

    def dot(a: Array, b: Array) -> Array:
        return np.matmul(a[:, None, :], b[:, :, None])[:, 0]

    g = gain.data

    def forward(x: Array) -> tuple[Array, Any]:
        rstd = 1 / np.sqrt(dot(x, x) / n + 1e-6)
        y = x * rstd
        y *= g
        return y, (x, rstd)

    def backward(dy: Array, saved: Any, dw: Array) -> tuple[Array, Array]:
        x, rstd = saved
        xhat = x * rstd
        dw = dw + (dy * xhat).sum(axis=0)
        dx = dy * g
        xhat *= dot(dx, xhat) / n
        dx -= xhat
        dx *= rstd
        return dx, dw

    return Case(start(n), lambda t: functional.rms_norm(t, gain), forward, backward, gain)


def lora_linear(n: int, r: int = 2) -> Case:
    """x + s B A x: x is the layer's input and the base's output; B is trained."""
    A = Tensor(rotation(n)[:r])
    B = Tensor(0.01 * rotation(n, seed=1)[:, :r], requires_grad=True)
    a, b, s = A.data, B.data, np.float32(0.5)

    def forward(x: Array) -> tuple[Array, Array]:
        u = x @ a.T
        y = u @ b.T
        y *= s
        y += x
        return y, u

    def backward(dy: Array, u: Array, dw: Array) -> tuple[Array, Array]:
        return (dy @ b) * s @ a + dy, dw + (dy.T @ u) * s

    return Case(start(n), lambda t: functional.lora_linear(t, t, A, B, 0.5), forward, backward, B)


def effective_linear(n: int, r: int = 2) -> Case:
    """The same layer over a base, with its effective weight computed before the chain."""
    a, B = rotation(n)[:r], Tensor(0.01 * rotation(n, seed=1)[:, :r], requires_grad=True)
    W = rotation(n, seed=2) + 0.5 * B.data @ a
    pull = Pull(lambda X, dY: (dY.T @ (X @ a.T * 0.5),))
    weight = EffectiveWeight(W, [(n, None, [((B,), pull)])])

    def forward(x: Array) -> tuple[Array, Array]:
        return x @ W.T, x

    def backward(dy: Array, x: Array, dw: Array) -> tuple[Array, Array]:
        return dy @ W, dw + dy.T @ (x @ a.T * 0.5)

    return Case(start(n), lambda t: effective.effective_linear(t, weight), forward, backward, B)


def norm_linear_swiglu(n: int) -> Case:
    """The norm, gate and up in one product, the activation: three operations.

    Without the norm x would overflow.
    """
    norm = rms_norm(n)
    W = np.stack([rotation(n), rotation(n, seed=1)])
    fan = EffectiveWeight(W.reshape(2 * n, n), [(n, None, []), (n, None, [])], stacked=True)

    def forward(x: Array) -> tuple[Array, Any]:
        x, normed = norm.forward(x)
        gate, up = np.matmul(x, W.swapaxes(1, 2))
        s = np.negative(gate)
        np.exp(s, out=s)
        s += 1
        np.divide(1, s, out=s)
        y = gate * s
        y *= up
        return y, (normed, gate, up, s)

    def backward(dy: Array, saved: Any, dw: Array) -> tuple[Array, Array]:
        normed, gate, up, s = saved
        dup = gate * s
        dgate = 1 - s
        dgate *= dup
        dgate += s
        dgate *= up
        dgate *= dy
        dup *= dy
        dx = dgate @ W[0]
        dx += dup @ W[1]
        return norm.backward(dx, normed, dw)

    def link(t: Tensor) -> Tensor:
        return functional.swiglu(effective.effective_linear(norm.link(t), fan))

    return Case(start(n), link, forward, backward, norm.weight, operations=3)


def linear_attention(n: int, heads: int = 2) -> Case:
    """q, k, v in one product, attention over n positions, two reshapes: four operations."""
    D = n // heads
    W = np.concatenate([rotation(n), rotation(n, seed=1), rotation(n, seed=2)])
    project = EffectiveWeight(W, [(3 * n, None, [])])
    angle = np.arange(n)[:, None] * np.tile(0.5 ** np.arange(D // 2), 2)  # (n, D)
    cos = np.tile(np.cos(angle), 2 * heads).astype(np.float32)  # (n, 2 heads D): rows for q and k
    sin = np.tile(np.sin(angle) * np.repeat([-1, 1], D // 2), 2 * heads).astype(np.float32)
    is_later = np.arange(n)[:, None] > np.arange(n)  # (key, query)
    mask = np.where(is_later, -np.inf, 0).astype(np.float32)

    def forward(x: Array) -> tuple[Array, Any]:
        z = (x @ W.T).reshape(1, n, 3 * heads, D)
        qk = functional.apply_rotary(np, z[:, :, : 2 * heads], cos, sin)[0]
        qk = qk.swapaxes(0, 1)  # (2 heads, n, D)
        q = qk[:heads]
        k = qk[heads:]
        v = z[0, :, 2 * heads :].swapaxes(0, 1)
        P = k @ q.swapaxes(1, 2)  # (heads, key, query)
        P += mask
        P -= P.max(axis=1, keepdims=True)
        np.exp(P, out=P)
        inv = 1 / P.sum(axis=1)[:, :, None]  # (heads, query, 1)
        y = P.swapaxes(1, 2) @ v
        y *= inv
        return y.swapaxes(0, 1).reshape(n, n), (q, k, v, P, inv, y)

    def backward(dy: Array, saved: Any, dw: Array) -> tuple[Array, Array]:
        q, k, v, P, inv, y = saved
        d = dy.reshape(n, heads, D).swapaxes(0, 1) * inv
        dz = np.empty((1, n, 3 * heads, D), np.float32)
        dqk = np.empty((1, n, 2 * heads, D), np.float32)
        by_head = dqk[0].swapaxes(0, 1)
        dv = dz[0, :, 2 * heads :].swapaxes(0, 1)
        np.matmul(P, d, out=dv)
        dS = v @ d.swapaxes(1, 2)
        dS -= (d * y).sum(axis=2)[:, None, :]
        dS *= P
        np.matmul(dS.swapaxes(1, 2), k, out=by_head[:heads])
        np.matmul(dS, q, out=by_head[heads:])
        functional.apply_rotary(np, dqk, cos, -sin, out=dz[:, :, : 2 * heads])
        return dz.reshape(n, 3 * n) @ W, dw

    def link(t: Tensor) -> Tensor:
        qkv = effective.effective_linear(t, project).reshape(1, n, 3 * n)
        return functional.attention(qkv, heads, heads, cos, sin).reshape(n, n)

    return Case(start(n), link, forward, backward, operations=4)


def composite(n: int) -> dict[str, Case]:
    makers = softmax, rms_norm, lora_linear, effective_linear, norm_linear_swiglu, linear_attention
    return {make.__name__: make(n) for make in makers}


# ---- the two chains ------------------------------------------------------------------------------


def by_engine(case: Case, links: int) -> list[Array]:
    x = Tensor(case.x, requires_grad=True)
    y = x
    for _ in range(links):
        y = case.link(y)
    return gradients(y, [x] if case.weight is None else [x, case.weight], np.ones_like(case.x))


def by_hand(case: Case, links: int) -> list[Array]:
    x = case.x
    dw = np.zeros_like(x if case.weight is None else case.weight.data)
    saved = []
    for _ in range(links):
        x, needed = case.forward(x)
        saved.append(needed)
    dy = np.ones_like(case.x)
    while saved:
        dy, dw = case.backward(dy, saved.pop(), dw)
    return [dy] if case.weight is None else [dy, dw]


# The loop of by_hand without an operation.
LOOP = Case(
    np.ones((1, 1), np.float32), lambda t: t, lambda x: (x, None), lambda dy, saved, dw: (dy, dw)
)


def seconds(chain: Callable[[Case, int], Any], case: Case, links: int) -> float:
    """Processor time of a chain: on a shared machine the clock says less."""
    started = time.process_time()
    chain(case, links)
    return time.process_time() - started


def measure(name: str, case: Case, rounds: int, links: int) -> dict[str, float]:
    """Microseconds per operation by hand, and what the engine adds.

    Both take turns, so that a busy machine slows both. SystemExit if their gradients differ.
    """
    for ours, theirs in zip(by_engine(case, links), by_hand(case, links), strict=True):
        if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max()):
            raise SystemExit(
                f"{name}: the gradients of both chains differ: correct the one by hand"
            )
    hand = []
    overhead = []
    for _ in range(rounds):
        alone = seconds(by_hand, case, links) - seconds(by_hand, LOOP, links)
        hand.append(alone)
        overhead.append(seconds(by_engine, case, links) - alone)
    scale = 1e6 / (links * case.operations)
    return {
        "by_hand_us": statistics.median(hand) * scale,
        "overhead_us": statistics.median(overhead) * scale,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--links", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    measured: dict[str, dict[str, dict[str, float]]] = {}
    with threadpoolctl.threadpool_limits(1, "blas"):
        groups = {"elementary": elementary(SMALL), "composite": composite(SMALL)}
        candidates = elementary(LARGE) | composite(LARGE)
        large = {name: candidates[name] for name in AT_LARGE}
        for group, cases in (groups | {"large": large}).items():
            n = LARGE if group == "large" else SMALL
            links = max(1, args.links // 5) if group == "large" else args.links
            print(f"\n{group}, {n} x {n}{'':8}{'by hand us':>14}{'overhead us':>13}{'%':>7}")
            measured[group] = {}
            for name, case in cases.items():
                row = {}
                for key, value in measure(name, case, args.rounds, links).items():
                    row[key] = round(value, 2)
                percent = 100 * row["overhead_us"] / row["by_hand_us"]
                row["overhead_percent"] = round(percent, 1)
                measured[group][name] = row
                times = f"{row['by_hand_us']:14.2f}{row['overhead_us']:13.2f}"
                print(f"  {name:24}{times}{percent:7.0f}")
    medians = {}
    for group in groups:
        overheads = [row["overhead_us"] for row in measured[group].values()]
        medians[group] = statistics.median(overheads)
    result = {
        "command": "python " + " ".join(["benchmarks/ops.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "numpy": np.__version__,
        "median_overhead_us": {group: round(median, 2) for group, median in medians.items()},
        "target_us": TARGET,
        **measured,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    good = medians["elementary"] <= TARGET
    print(
        f"\nmedian overhead: elementary {medians['elementary']:.2f} us, "
        f"composite {medians['composite']:.2f} us"
    )
    print(f"at most {TARGET:.0f} us per elementary operation: {'yes' if good else 'NO'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
