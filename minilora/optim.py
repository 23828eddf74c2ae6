"""From gradients to new weights: SGD and AdamW, learning-rate schedules, clipping.

An optimiser keeps its moments and step counts, nothing else. It computes no gradient and does not
know its step in a run: a schedule is a plain function of the step, whose factor is the argument of
`optimizer.step(grads, scale=factor)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .autograd import Tensor
from .backend import Array, Backend, Shape, backend_of
from .errors import CheckpointError, ConfigError, Rule, check_fields, is_number

if TYPE_CHECKING:
    from .nn import Parameter

Group = dict[str, Any]
Moments = dict[str, Array]

SMALL = 1 << 16  # elements: parameters up to this size are updated together
is_positive = is_number(above=0)
is_fraction = is_number(least=0, below=1)


def _are_betas(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_fraction, value))


RULES = (
    Rule("lr", is_positive, "a finite number above 0"),
    Rule("eps", is_number(0), "a finite number of at least 0"),
    Rule("weight_decay", is_number(0), "a finite number of at least 0"),
    Rule("betas", _are_betas, "two numbers in [0, 1)"),
    Rule("momentum", is_fraction, "a number in [0, 1)"),
    Rule("max_norm", lambda value: value == math.inf or is_positive(value), "a number above 0"),
)


def _listed_gradients(grads: Any) -> list[Any]:
    """The gradients as a list of arrays or None. ConfigError for one alone, or for Tensors."""
    if hasattr(grads, "dtype") or not isinstance(grads, Iterable):
        raise ConfigError(f"gradients must be a list of arrays, got one {type(grads).__name__}")
    listed = list(grads)
    for i, g in enumerate(listed):
        if g is None:
            continue
        dtype = getattr(g, "dtype", None)
        if isinstance(g, Tensor) or dtype is None or dtype.kind not in "iuf":
            got = f"{type(g).__name__} {dtype or ''}".strip()
            raise ConfigError(f"gradients must be arrays of real numbers or None, got {got} at {i}")
    return listed


def _listed(params: Any) -> list[Any]:
    """The parameters as a list. ConfigError for one alone, whose rows would be taken."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        got = f"one {type(params).__name__}"
        raise ConfigError(
            f"params must be a list of parameters, got {got}: "
            "pass [parameter], or model.parameters() for all of a model"
        )
    return list(params)


def _check_leaf(name: Any, p: Any) -> None:
    """ConfigError unless p is a Tensor that an optimiser can change."""
    if not isinstance(p, Tensor) or p.node is not None:
        got = "an operation's result" if isinstance(p, Tensor) else f"{p!r:.100}"
        raise ConfigError(
            f"expected parameters or (name, parameter) pairs, got {got} as {name!r:.100}: "
            "give leaves, such as model.parameters() or model.named_parameters()"
        )
    if p.dtype.kind != "f":
        raise ConfigError(
            f"parameters must be floats to be trained, got {p.dtype} as {name!r:.100}"
        )


def _checked(name: str, value: Any) -> Any:
    """The value in Python floats. ConfigError if it is invalid.

    One NumPy float64 would turn the float32 arrays it meets into float64.
    """
    check_fields({name: value}, [rule for rule in RULES if rule.field == name])
    return tuple(map(float, value)) if name == "betas" else float(value)


@dataclass(eq=False)
class Member:
    """One parameter of an optimiser: its group, how many steps it took, its moments by name."""

    name: str
    parameter: Parameter
    group: Group
    steps: int = 0
    moments: Moments = field(default_factory=dict)


class Update(NamedTuple):
    """Parameters of one group, step count, dtype and device, with their gradients."""

    members: list[Member]
    grads: list[Array]


class Rates(NamedTuple):
    """What an update is computed with besides the gradients.

    group     the group's hyper-parameters
    numbers   what `Optimizer.rates` gives: Python's floats, or an array on the device, whose values
              are read when the update runs
    check     a float64 scalar on the device: unless it is finite, nothing changes
    """

    group: Group
    numbers: Any
    check: Array | None = None


class Prepared(NamedTuple):
    """What a captured step reads from the device: a CUDA graph keeps the host's numbers for ever.

    numbers   (updates, numbers) float64, written before each launch: see `Optimizer.prepare`
    check     a float64 scalar; unless it is finite, parameters and moments stay as they are
    """

    numbers: Array
    check: Array


class Optimizer:
    """Parameters in groups of equal hyper-parameters.

    params   parameters, or (name, parameter) pairs, or groups {"params": either of these,
             "lr": ...} that override the defaults. A parameter without a name gets its index.

    A parameter without a gradient keeps its value, moments and step count. Moments are made at the
    first gradient, so a frozen parameter costs nothing. ConfigError: a number out of its range, no
    parameters at all, a parameter or a name given twice.
    """

    slots: tuple[str, ...]  # the names of a parameter's moments
    # What the gradients become before the update, in the order of `params`: see lora/optimizers.py.
    precondition: Callable[[list[Array | None]], list[Array | None]] | None = None
    uncaptured = ""  # why a step cannot be captured as a CUDA graph; "" if it can

    def __init__(self, params: Iterable[Any], **defaults: Any):
        self.groups: list[Group] = []
        self.members: list[Member] = []
        items = _listed(params)
        if not any(isinstance(item, dict) for item in items):
            items = [{"params": items}]
        for item in items:
            self._add_group(item, defaults)
        if not self.members:
            raise ConfigError("the optimiser got no parameters: there is nothing to train")
        names = {member.name for member in self.members}
        identities = set(map(id, self.params))
        if min(len(names), len(identities)) < len(self.members):
            raise ConfigError(
                "a parameter, or a name, was given twice: one step would update it twice"
            )

    def _add_group(self, item: Any, defaults: Group) -> None:
        if not isinstance(item, dict) or not {"params"} <= set(item) <= {"params", *defaults}:
            got = list(item) if isinstance(item, dict) else type(item).__name__
            raise ConfigError(
                f"expected groups of 'params' and some of {list(defaults)}, got {got!r:.300}"
            )
        group = {name: _checked(name, item.get(name, value)) for name, value in defaults.items()}
        self.groups.append(group)
        for entry in _listed(item["params"]):
            is_pair = isinstance(entry, tuple) and len(entry) == 2
            name, p = entry if is_pair else (str(len(self.members)), entry)
            _check_leaf(name, p)
            self.members.append(Member(name, p, group))

    def __repr__(self) -> str:
        """How many parameters are trained, and each group's numbers."""
        lines = []
        for group in self.groups:
            sizes = [member.parameter.size for member in self.members if member.group is group]
            numbers = ", ".join(f"{name}={value}" for name, value in group.items())
            lines.append(f"{len(sizes)} parameters of {sum(sizes):,} numbers, {numbers}")
        name = type(self).__name__
        if len(lines) == 1:
            return f"{name}({lines[0]})"
        return "\n".join([f"{name}(", *(f"  {i}: {line}" for i, line in enumerate(lines)), ")"])

    @property
    def params(self) -> list[Parameter]:
        """Every parameter, in the order that `step(grads)` expects."""
        return [member.parameter for member in self.members]

    def update(
        self, params: Sequence[Array], grads: Sequence[Array], moments: Moments, rates: Rates
    ) -> Sequence[Array]:
        """The new values of parameters that are updated together, element by element.

        moments   one vector each for all the parameters, end to end; they change in place
        """
        raise NotImplementedError

    def rates(self, group: Group, steps: int, lr: float) -> tuple[float, ...]:
        """The numbers of an update that differ from step to step; `steps` counts from 1."""
        raise NotImplementedError

    def step(self, grads: Sequence[Array | None] | None = None, scale: float = 1.0) -> None:
        """Update every parameter that has a gradient: `grads`, aligned with `params`, or p.grad.

        `scale` multiplies the learning rate of every group: the schedule's factor.
        """
        updates = self.updates([p.grad for p in self.params] if grads is None else grads)
        numbers = self._numbers(updates, scale)
        for update in updates:
            for member in update.members:
                member.steps += 1
        for update, row in zip(updates, numbers, strict=True):
            self._change(update, Rates(update.members[0].group, row))

    def apply(self, updates: Sequence[Update], prepared: Prepared) -> None:
        """`step` apart from `count`, with numbers that are read when it runs on the device."""
        for i, update in enumerate(updates):
            rates = Rates(update.members[0].group, prepared.numbers[i], prepared.check)
            self._change(update, rates)

    def count(self, updates: Sequence[Update]) -> None:
        """Take a step of these updates as done: their parameters have changed."""
        for update in updates:
            for member in update.members:
                member.steps += 1
                member.parameter.data = member.parameter.data

    def prepare(self, updates: Sequence[Update], scale: float) -> np.ndarray:
        """The numbers of the next step of these updates, (updates, numbers) in float64."""
        return np.array(self._numbers(updates, scale))

    def _numbers(self, updates: Sequence[Update], scale: float) -> list[tuple[float, ...]]:
        firsts = [update.members[0] for update in updates]
        return [self.rates(m.group, m.steps + 1, float(m.group["lr"] * scale)) for m in firsts]

    def updates(self, grads: Sequence[Array | None]) -> list[Update]:
        """The parameters that have a gradient, in parts that are updated together.

        For small parameters a call costs the most: those of one group, step count, dtype and device
        are one part. ConfigError for gradients that do not fit the parameters.
        """
        grads = _listed_gradients(grads)
        pairs = list(zip(self.members, grads, strict=False))
        wrong = [m.name for m, g in pairs if g is not None and g.shape != m.parameter.shape]
        if wrong or len(grads) != len(self.members):
            raise ConfigError(
                f"{len(grads)} gradients for {len(self.members)} parameters, "
                f"with wrong shapes: {wrong!r:.300}"
            )
        if self.precondition is not None:
            grads = self.precondition(grads)
            pairs = list(zip(self.members, grads, strict=True))
        updates: dict[Any, Update] = {}
        for member, g in pairs:
            if g is None:
                continue
            p = member.parameter
            if not member.moments:
                member.moments = {slot: p.backend.xp.zeros_like(p.data) for slot in self.slots}
            kind: Any = id(member)
            if p.size <= SMALL or p.backend.joins:
                kind = id(member.group), member.steps, p.dtype, id(p.backend)
            update = updates.setdefault(kind, Update([], []))
            update.members.append(member)
            update.grads.append(g.astype(p.dtype, copy=False))
        return list(updates.values())

    def _change(self, update: Update, rates: Rates) -> None:
        params = [member.parameter for member in update.members]
        moments = self._moments(params[0].backend, update.members)
        new = self.update([p.data for p in params], update.grads, moments, rates)
        for p, values in zip(params, new, strict=True):
            p.data = values

    def _moments(self, backend: Backend, members: list[Member]) -> Moments:
        """The moments of several parameters end to end; each one's moments become views of that."""
        moments = {}
        for slot in self.slots:
            parts = [member.moments[slot] for member in members]
            whole = parts[0]
            if len(parts) > 1:
                whole = whole.base
                size = sum(part.size for part in parts)
                shared = whole is not None and all(part.base is whole for part in parts)
                if not shared or whole.size != size:
                    whole = _joined(backend, parts)
                    shapes = [part.shape for part in parts]
                    for member, part in zip(members, _parts(whole, shapes), strict=True):
                        member.moments[slot] = part
            moments[slot] = whole
        return moments

    def zero_grad(self) -> None:
        """Forget every p.grad."""
        for p in self.params:
            p.grad = None

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, numbers): the moments' copies by "<slot>.<parameter>"; what goes into JSON."""
        arrays = {}
        for member in self.members:
            for slot, moment in member.moments.items():
                array = member.parameter.backend.to_numpy(moment)
                arrays[f"{slot}.{member.name}"] = np.array(array)
        steps = {member.name: member.steps for member in self.members}
        return arrays, {"optimizer": type(self).__name__, "steps": steps}

    def load_state_dict(self, arrays: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        CheckpointError says what differs from this optimiser, which then stays as it was.
        """
        kind = numbers.get("optimizer")
        steps = numbers.get("steps")
        if kind != type(self).__name__ or not isinstance(steps, dict):
            wanted = f"{type(self).__name__} and its 'steps'"
            raise CheckpointError(f"expected {wanted}, got {kind!r:.99} and {steps!r:.99}")
        expected = {f"steps.{member.name}": "a count" for member in self.members}
        # The others have no moments yet.
        stepped = [member for member in self.members if steps.get(member.name)]
        for member in stepped:
            p = member.parameter
            for slot in self.slots:
                expected[f"{slot}.{member.name}"] = f"{p.dtype} {p.shape}"
        given = {}
        for name, count in steps.items():
            valid = type(count) is int and count >= 0
            given[f"steps.{name}"] = "a count" if valid else f"{count!r:.40}"
        for key, array in arrays.items():
            given[key] = f"{array.dtype} {array.shape}"
        wrong = [
            f"{key!r}: expected {expected.get(key, 'nothing')}, got {given.get(key, 'nothing')}"
            for key in expected | given
            if expected.get(key) != given.get(key)
        ]
        if wrong:
            raise CheckpointError(
                f"the optimiser's state differs in {len(wrong)} places: {'; '.join(wrong):.400}"
            )
        for member in self.members:
            member.steps = steps[member.name]
            member.moments = {}
        for member in stepped:
            for slot in self.slots:
                array = arrays[f"{slot}.{member.name}"].copy()
                member.moments[slot] = member.parameter.backend.from_numpy(array)


def _joined(backend: Backend, arrays: Sequence[Array]) -> Array:
    """Several arrays end to end; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else backend.join(arrays)


def _parts(whole: Array, shapes: Sequence[Shape]) -> Iterator[Array]:
    """Views of what `_joined` returned, in the shapes of what it joined; one array is as it is."""
    if len(shapes) == 1:
        yield whole
        return
    start = 0
    for shape in shapes:
        end = start + math.prod(shape)
        yield whole[start:end].reshape(shape)
        start = end


class SGD(Optimizer):
    """u <- momentum u + g + weight_decay p;  p <- p - lr u

    As in PyTorch, the decay is a part of the gradient.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.slots = ("u",) if any(group["momentum"] for group in self.groups) else ()

    def rates(self, group: Group, steps: int, lr: float) -> tuple[float, ...]:
        return (lr,)

    def update(
        self, params: Sequence[Array], grads: Sequence[Array], moments: Moments, rates: Rates
    ) -> Sequence[Array]:
        backend = backend_of(params[0])
        p = _joined(backend, params)
        u = _joined(backend, grads) + rates.group["weight_decay"] * p
        if self.slots:
            moments["u"] *= rates.group["momentum"]
            moments["u"] += u
            u = moments["u"]
        (lr,) = rates.numbers
        return list(_parts(p - lr * u, [array.shape for array in params]))


class AdamW(Optimizer):
    """Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay.

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- (1 - lr wd) p - lr m' / (sqrt(v') + eps)
    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t), t counted per parameter. The decay is that of
    Loshchilov & Hutter (2019, algorithm 2); as in PyTorch, and unlike the paper, it too is
    multiplied by lr. It applies to every parameter unless a group says otherwise.
    """

    slots = ("m", "v")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def rates(self, group: Group, steps: int, lr: float) -> tuple[float, ...]:
        """-lr / (1 - b1^t), sqrt(1 - b2^t) and 1 - lr wd"""
        b1, b2 = group["betas"]
        keep = 1 - lr * group["weight_decay"]
        return -lr / (1 - b1**steps), math.sqrt(1 - b2**steps), keep

    def update(
        self, params: Sequence[Array], grads: Sequence[Array], moments: Moments, rates: Rates
    ) -> Sequence[Array]:
        backend = backend_of(params[0])
        return backend.run(  # type: ignore[no-any-return]
            _adamw, params, grads, moments["m"], moments["v"], rates
        )


def _adamw(
    backend: Backend,
    params: Sequence[Array],
    grads: Sequence[Array],
    first: Array,
    second: Array,
    rates: Rates,
) -> Sequence[Array]:
    """The new parameters of `AdamW`. The moments, one vector each for all, change in place."""
    xp = backend.xp
    b1, b2 = rates.group["betas"]
    step, root, keep = rates.numbers
    p = _joined(backend, params)
    g = _joined(backend, grads)
    # For every intermediate: fresh memory would cost more than the arithmetic.
    work = xp.empty_like(first)
    first *= b1
    first += xp.multiply(g, 1 - b1, out=work)
    second *= b2
    xp.multiply(g, g, out=work)
    second += xp.multiply(work, 1 - b2, out=work)
    xp.sqrt(second, out=work)
    work /= root
    work += rates.group["eps"]
    xp.divide(first, work, out=work)
    work *= step
    new = xp.add(work, keep * p, out=work)
    return list(_parts(new, [array.shape for array in params]))


def constant(step: int, warmup: int = 0) -> float:
    """The learning rate's factor: 1 / warmup, 2 / warmup, ..., 1, 1, 1 at steps 0, 1, ..."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def warmup_cosine(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """The learning rate's factor: the warm-up of `constant`, then half a cosine down to `floor`.

    It falls from 1 at step == warmup to `floor` at step total - 1 and after. If the warm-up leaves
    no step to fall in (warmup >= total - 1), the factor stays 1.
    """
    if step <= warmup or warmup >= total - 1:
        return constant(step, warmup)
    x = min(1.0, (step - warmup) / (total - 1 - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2


def clip_by_global_norm(
    grads: Sequence[Array | None], max_norm: float
) -> tuple[list[Array | None], Array]:
    """(grads * min(1, max_norm / (norm + 1e-6)), norm) for the norm of all gradients together.

    The norm is the length of all gradients as one vector, in float64. None entries pass through,
    and so does everything if the norm is not finite: the caller decides what that means. The norm
    is a scalar on the gradients' device, and decides there: nothing waits for a GPU until someone
    reads it.
    """
    max_norm = _checked("max_norm", max_norm)
    grads = _listed_gradients(grads)
    places = [i for i, g in enumerate(grads) if g is not None]
    present = [grads[i] for i in places]
    backend = backend_of(present[0] if present else np.zeros(0))
    scaled, norm = backend.run(_clip, present, max_norm)
    clipped: list[Array | None] = list(grads)
    for i, g in zip(places, scaled, strict=True):
        clipped[i] = g
    return clipped, norm


def _clip(
    backend: Backend, grads: Sequence[Array], max_norm: float
) -> tuple[Sequence[Array], Array]:
    """(gradients scaled to the norm, if theirs is larger; their norm)"""
    xp = backend.xp
    # Beyond 1e154 the norm is inf, which says enough.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = ((g.astype(np.float64) ** 2).sum() for g in grads)
        norm = xp.sqrt(sum(squares, xp.zeros(())))
        factor = xp.where(xp.isfinite(norm), xp.minimum(1.0, max_norm / (norm + 1e-6)), 1.0)
    return [g * factor.astype(g.dtype) for g in grads], norm
