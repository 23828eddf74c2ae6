"""From gradients to new weights: SGD and AdamW, learning-rate schedules, clipping, LoRA+ groups.

An optimiser owns its moments and step counts, nothing else. It computes no gradient and does not know where in a run it
is: a schedule is a plain function of the step, whose factor is handed to `optimizer.step(grads, scale=factor)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Array, backend_of
from .errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from .nn import Parameter

SMALL = 1 << 16  # elements: parameters up to this size are updated together
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("lr", "ratio"), ("a finite number > 0", lambda x: 0 < x < math.inf)),
    **dict.fromkeys(("eps", "weight_decay"), ("a finite number >= 0", lambda x: 0 <= x < math.inf)),
    "betas": ("two numbers in [0, 1)", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x)),
    "momentum": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "max_norm": ("a number > 0", lambda x: x > 0),
}


def _checked(name: str, value: Any) -> Any:
    """The value in Python floats: one NumPy float64 would turn the float32 arrays it meets into float64."""
    expected, valid = RANGES[name]
    try:
        if valid(value):  # no NaN passes: every comparison with it is false
            return tuple(map(float, value)) if name == "betas" else float(value)
    except TypeError:
        pass
    raise ConfigError(f"{name} must be {expected}, got {value!r:.99}")


@dataclass(eq=False)
class Member:
    """One parameter in an optimiser's care: its group, how many steps it has taken, its moments by name."""

    name: str
    parameter: Parameter
    group: dict[str, Any]
    steps: int = 0
    moments: dict[str, Array] = field(default_factory=dict)


class Optimizer:
    """Parameters in groups of equal hyper-parameters.

    params   parameters, or (name, parameter) pairs, or groups {"params": either of these, "lr": ...} that override the
             defaults. Without a name, a parameter is called by its index.

    A parameter without a gradient keeps its value, moments and step count. Moments are made at the first gradient, so a
    frozen parameter costs nothing. ConfigError: a number out of its range, no parameters at all, one given twice.
    """

    slots: tuple[str, ...]  # the names of a parameter's moments

    def __init__(self, params: Iterable[Any], **defaults: Any):
        given = list(params)
        self.groups: list[dict[str, Any]] = []
        self.members: list[Member] = []
        for item in given if any(isinstance(item, dict) for item in given) else [{"params": given}]:
            if not isinstance(item, dict) or not {"params"} <= set(item) <= {"params", *defaults}:
                got = list(item) if isinstance(item, dict) else type(item).__name__
                raise ConfigError(
                    f"expected groups of 'params' and some of {list(defaults)}, got {got!r:.300}"
                )
            self.groups.append(
                {
                    name: _checked(name, item.get(name, default))
                    for name, default in defaults.items()
                }
            )
            for entry in item["params"]:
                name, p = entry if isinstance(entry, tuple) else (str(len(self.members)), entry)
                self.members.append(Member(name, p, self.groups[-1]))
        if not self.members:
            raise ConfigError("the optimiser got no parameters: there is nothing to train")
        if min(len({m.name for m in self.members}), len({id(p) for p in self.params})) < len(
            self.members
        ):
            raise ConfigError(
                "a parameter, or a name, was given twice: one step would update it twice"
            )

    @property
    def params(self) -> list[Parameter]:
        """Every parameter, in the order that `step(grads)` expects."""
        return [m.parameter for m in self.members]

    def update(
        self,
        p: Array,
        g: Array,
        moments: dict[str, Array],
        group: dict[str, Any],
        steps: int,
        lr: float,
    ) -> Array:
        """The new values of p at its step number `steps` (from 1), element by element; changes its moments in place."""
        raise NotImplementedError

    def step(self, grads: Sequence[Array | None] | None = None, scale: float = 1.0) -> None:
        """Update every parameter that has a gradient: `grads`, aligned with `params`, or else each p.grad.

        `scale` multiplies the learning rate of every group: the schedule's factor.
        """
        grads = [p.grad for p in self.params] if grads is None else grads
        pairs = list(zip(self.members, grads, strict=False))
        wrong = [m.name for m, g in pairs if g is not None and g.shape != m.parameter.shape]
        if wrong or len(grads) != len(self.members):
            raise ConfigError(
                f"{len(grads)} gradients for {len(self.members)} parameters, not fitting: {wrong!r:.300}"
            )
        alike: dict[
            Any, list[tuple[Member, Array]]
        ] = {}  # small ones of one kind: for them a call costs the most
        for m, g in pairs:
            if g is not None:
                p, m.steps = m.parameter, m.steps + 1
                m.moments = m.moments or {
                    slot: p.backend.xp.zeros_like(p.data) for slot in self.slots
                }
                kind = (id(m.group), m.steps, p.dtype, id(p.backend)) if p.size <= SMALL else id(m)
                alike.setdefault(kind, []).append((m, g.astype(p.dtype, copy=False)))
        for together in alike.values():
            members = [m for m, _ in together]
            xp, group, steps = members[0].parameter.backend.xp, members[0].group, members[0].steps
            old, g = (
                _end_to_end(xp, arrays)
                for arrays in ([m.parameter.data for m in members], [g for _, g in together])
            )
            new = self.update(
                old, g, self._moments(xp, members), group, steps, float(group["lr"] * scale)
            )
            for m, part in zip(members, _apart(new, members), strict=True):
                m.parameter.data = part

    def _moments(self, xp: Any, members: list[Member]) -> dict[str, Array]:
        """The moments of several parameters end to end; from now on each one's own are views of that."""
        found = {}
        for slot in self.slots:
            parts = [m.moments[slot] for m in members]
            whole = parts[0] if len(parts) == 1 else parts[0].base
            size = sum(part.size for part in parts)
            if (
                whole is None
                or whole.size != size
                or any(len(parts) > 1 and part.base is not whole for part in parts)
            ):
                whole = _end_to_end(xp, parts)
                for m, part in zip(members, _apart(whole, members), strict=True):
                    m.moments[slot] = part
            found[slot] = whole
        return found

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, numbers): copies of the moments under "<slot>.<parameter>", and what goes into JSON beside them."""
        moments = [
            (f"{k}.{m.name}", m.parameter.backend, a)
            for m in self.members
            for k, a in m.moments.items()
        ]
        arrays = {key: np.array(backend.to_numpy(moment)) for key, backend, moment in moments}
        return arrays, {
            "optimizer": type(self).__name__,
            "steps": {m.name: m.steps for m in self.members},
        }

    def load_state_dict(self, arrays: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        """Continue from a `state_dict`. CheckpointError says what differs from this optimiser; nothing changes then."""
        kind, steps = numbers.get("optimizer"), numbers.get("steps")
        if kind != type(self).__name__ or not isinstance(steps, dict):
            raise CheckpointError(
                f"expected {type(self).__name__} and its 'steps', got {kind!r:.99} and {steps!r:.99}"
            )
        stepped = [m for m in self.members if steps.get(m.name)]  # the others have no moments yet
        expected = {f"steps.{m.name}": "a count" for m in self.members}
        expected |= {
            f"{k}.{m.name}": f"{m.parameter.dtype} {m.parameter.shape}"
            for m in stepped
            for k in self.slots
        }
        found = {
            f"steps.{k}": "a count" if type(t) is int and t >= 0 else f"{t!r:.40}"
            for k, t in steps.items()
        }
        found |= {key: f"{array.dtype} {array.shape}" for key, array in arrays.items()}
        sides = {
            key: (expected.get(key, "nothing"), found.get(key, "nothing"))
            for key in [*expected, *found]
        }
        wrong = [f"{key!r}: expected {e}, got {f}" for key, (e, f) in sides.items() if e != f]
        if wrong:
            raise CheckpointError(
                f"the optimiser's state differs in {len(wrong)} places: {'; '.join(wrong):.400}"
            )
        for m in self.members:
            m.steps, m.moments = steps[m.name], {}
        for m in stepped:
            m.moments = {
                k: m.parameter.backend.from_numpy(arrays[f"{k}.{m.name}"].copy())
                for k in self.slots
            }


def _end_to_end(xp: Any, arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else xp.concatenate([a.reshape(-1) for a in arrays])


def _apart(whole: Array, members: Sequence[Member]) -> Iterator[Array]:
    """Views of what `_end_to_end` gave, in the shapes of the members' parameters."""
    end = 0
    for m in members:
        end += m.parameter.size
        yield whole.reshape(-1)[end - m.parameter.size : end].reshape(m.parameter.shape)


class SGD(Optimizer):
    """u <- momentum u + g + weight_decay p;  p <- p - lr u. As in PyTorch, the decay is a part of the gradient."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.slots = ("u",) if any(group["momentum"] for group in self.groups) else ()

    def update(
        self,
        p: Array,
        g: Array,
        moments: dict[str, Array],
        group: dict[str, Any],
        steps: int,
        lr: float,
    ) -> Array:
        u = g + group["weight_decay"] * p
        if self.slots:
            moments["u"] *= group["momentum"]
            moments["u"] += u
            u = moments["u"]
        return p - lr * u


class AdamW(Optimizer):
    """Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- (1 - lr wd) p - lr m' / (sqrt(v') + eps)
    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t), t counted per parameter. As in PyTorch, and unlike the paper, the
    decay too is multiplied by lr; it applies to every parameter unless a group says otherwise.
    """

    slots = ("m", "v")

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01):  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(
        self,
        p: Array,
        g: Array,
        moments: dict[str, Array],
        group: dict[str, Any],
        steps: int,
        lr: float,
    ) -> Array:
        xp, (b1, b2), first, second = backend_of(p).xp, group["betas"], moments["m"], moments["v"]
        work = xp.empty_like(
            first
        )  # for every intermediate: fresh memory would cost more than the arithmetic
        first *= b1
        first += xp.multiply(g, 1 - b1, out=work)
        second *= b2
        second += xp.multiply(xp.multiply(g, g, out=work), 1 - b2, out=work)
        xp.sqrt(second, out=work)
        work /= math.sqrt(1 - b2**steps)
        work += group["eps"]
        xp.multiply(xp.divide(first, work, out=work), -lr / (1 - b1**steps), out=work)
        return xp.add(work, (1 - lr * group["weight_decay"]) * p, out=work)


def constant(step: int, warmup: int = 0) -> float:
    """A schedule: the factor of the learning rate at step 0, 1, ... is 1 / warmup, 2 / warmup, ..., 1, 1, 1."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def warmup_cosine(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """A schedule: the same warm-up, then half a cosine from 1 at step == warmup to `floor` at step total - 1 and after.

    Where the warm-up leaves no step to fall in (warmup >= total - 1), the factor stays 1.
    """
    if step <= warmup or warmup >= total - 1:
        return constant(step, warmup)
    x = min(1.0, (step - warmup) / (total - 1 - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2


def clip_by_global_norm(
    grads: Sequence[Array | None], max_norm: float
) -> tuple[list[Array | None], Array]:
    """(grads * min(1, max_norm / (norm + 1e-6)), norm); norm is the length of all gradients as one vector, in float64.

    None entries pass through, and so does everything when the norm is not finite: the caller decides what that means.
    The norm is a scalar where the gradients are, and decides there: nothing waits for a GPU until someone reads it.
    """
    max_norm = _checked("max_norm", max_norm)
    some = next((g for g in grads if g is not None), np.zeros(0))
    xp = backend_of(some).xp
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # beyond 1e154 the norm is inf, which says enough
        norm = xp.sqrt(
            sum(((g.astype(np.float64) ** 2).sum() for g in grads if g is not None), xp.zeros(()))
        )
        factor = xp.where(xp.isfinite(norm), xp.minimum(1.0, max_norm / (norm + 1e-6)), 1.0)
    return [None if g is None else g * factor.astype(g.dtype) for g in grads], norm


def loraplus_groups(
    named: Iterable[tuple[str, Parameter]], lr: float, ratio: float = 16.0
) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al. 2024): groups for an optimiser in which every B learns `ratio` times as fast as every A.

    Vectors (biases, DoRA's magnitudes) go with B, as in PEFT. B is known by its name, "...lora_B.<adapter>[.weight]".
    """
    rates = {"slow": _checked("lr", lr), "fast": lr * _checked("ratio", ratio)}
    groups: dict[str, list[tuple[str, Parameter]]] = {"slow": [], "fast": []}
    for name, p in named:
        groups["fast" if p.ndim == 1 or "lora_B" in name.split(".")[-3:-1] else "slow"].append(
            (name, p)
        )
    return [{"params": pairs, "lr": rates[speed]} for speed, pairs in groups.items() if pairs]
