"""The graph that operations leave behind, and the walk back through it.

A `Node` is one operation: where gradients go next, and how. A leaf is a Tensor without a node. The
graph holds on to no output, so an array lives only as long as a backward may read it.
"""

from __future__ import annotations

import contextlib
import contextvars
import heapq
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .backend import Array
from .errors import GraphError
from .protocols import TensorBase

Grads = tuple[Array | None, ...]  # one for each input of an operation; None where none is wanted
Vjp = Callable[[Array], Grads]
Guard = tuple[list[int], int, int]

_order = itertools.count()
_thread = threading.local()
# anomaly.py sets a function here that gets every operation's output, inputs and vjp. A thread that
# runs in a copy of the context calls it too.
observer: contextvars.ContextVar[Any] = contextvars.ContextVar("observer", default=None)


class Node:
    """A vertex of the graph: where gradients go next (`parents`) and how (`vjp`).

    parents   for each input its Node, a leaf Tensor, or None where no gradient is wanted
    guards    for each input that can be assigned to: version cell, version then, id of the memory
    order     the order of creation, which is topological
    """

    __slots__ = ("guards", "order", "parents", "vjp")

    def __init__(
        self, parents: tuple[Node | TensorBase | None, ...], vjp: Vjp, guards: list[Guard]
    ):
        self.order = next(_order)
        self.parents = parents
        self.vjp = vjp
        self.guards = guards

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.vjp.__qualname__.split(".")[0]

    def __repr__(self) -> str:
        """The operation and where its inputs come from; "constant" is one without a gradient."""
        inputs = []
        for parent in self.parents:
            if isinstance(parent, Node):
                inputs.append(parent.name)
            elif parent is None:
                inputs.append("constant")
            else:
                inputs.append(f"leaf {tuple(parent.shape)} {parent.dtype}")
        return f"Node({self.name} of {', '.join(inputs)})" if inputs else f"Node({self.name})"

    def __lt__(self, other: Node) -> bool:
        return self.order > other.order  # heapq pops the smallest: the youngest node


def owner_of(array: Array) -> Array:
    """The array whose memory `array` is a view of, or `array` itself."""
    while isinstance(array.base, type(array)):
        array = array.base
    return array


def _reads(item: Any, owner: int, array_type: type) -> bool:
    """Whether a vjp's closure, or a value in it, refers to the memory with the id `owner`."""
    if isinstance(item, array_type):
        return id(owner_of(item)) == owner
    inner = item if isinstance(item, (tuple, list)) else getattr(item, "__closure__", None) or ()
    return any(_reads(getattr(i, "cell_contents", i), owner, array_type) for i in inner)


def grad_enabled() -> bool:
    """Whether this thread records: False inside `no_grad`."""
    return getattr(_thread, "grad_enabled", True)


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Record nothing in this thread inside the block: no graph, no activation. Also a decorator."""
    before = grad_enabled()
    _thread.grad_enabled = False
    try:
        yield
    finally:
        _thread.grad_enabled = before


def _freed(dy: Array) -> Grads:
    """The vjp of a node that a backward has freed."""
    raise GraphError(
        "this graph was freed by an earlier backward: "
        "run the forward again, or pass retain_graph=True to the earlier one"
    )


def gradients(
    loss: TensorBase,
    params: Sequence[TensorBase],
    dy: Array | None = None,
    *,
    retain_graph: bool = False,
) -> list[Array | None]:
    """d loss / d p for every leaf p of `params`, as new arrays; None where the loss is independent.

    dy             the gradient of the loss itself; 1 for a scalar
    retain_graph   keep the graph for another backward; otherwise each node is freed once visited

    Nodes are visited youngest first, by a heap and without recursion. All accumulators are local,
    so several threads may call this at once over the same parameters. GraphError if the graph was
    freed, if a value that backward needs has changed, or if one of `params` is not a leaf.
    """
    if isinstance(params, TensorBase):
        raise GraphError("params must be a list of leaves, got one Tensor: pass [tensor]")
    params = list(params)
    for i, p in enumerate(params):
        if not isinstance(p, TensorBase) or p.node is not None:
            got = "an operation's result" if isinstance(p, TensorBase) else type(p).__name__
            raise GraphError(
                f"params[{i}] is {got}, but only leaves have gradients: pass a tensor that was "
                "made with requires_grad=True, and compute the loss from it"
            )
    grads = {id(leaf): g for leaf, g in leaf_gradients(loss, dy, retain_graph)}
    return [grads.get(id(p)) for p in params]


def leaf_gradients(
    loss: TensorBase, dy: Array | None, retain_graph: bool
) -> list[tuple[TensorBase, Array]]:
    """Every leaf that the loss depends on, with its gradient. See `gradients`."""
    if not isinstance(loss, TensorBase):
        raise GraphError(f"the loss must be a Tensor, got {type(loss).__name__}")
    if not loss.requires_grad:
        raise GraphError(
            "the loss depends on no tensor that requires a gradient: compute it outside no_grad, "
            "and not from gradients, which are arrays (second derivatives are not supported)"
        )
    loss.backend.select()
    if dy is None:
        if loss.size != 1:
            raise GraphError(
                f"backward from shape {loss.shape} needs dy, an array of that shape: "
                "only for a scalar it is 1 by default"
            )
        dy = loss.backend.xp.ones_like(loss.data)
    array_type = loss.backend.xp.ndarray
    if isinstance(dy, np.generic):
        dy = loss.backend.xp.asarray(dy)
    # Its type must be that of the arrays that the graph keeps, which the guards look for.
    if type(dy) is not array_type or dy.shape != loss.shape or dy.dtype.kind not in "biuf":
        got = f"{type(dy).__name__} {getattr(dy, 'shape', '')} {getattr(dy, 'dtype', '')}".strip()
        raise GraphError(f"dy must be an array of shape {loss.shape}, got {got}")
    # By id: the gradients of leaves, and of nodes not visited yet, which `heap` keeps alive.
    sums: dict[int, Array] = {}
    leaves: list[TensorBase] = []
    heap: list[Node] = []

    def add_gradient(target: Node | TensorBase, g: Array) -> None:
        # Add out of place: another input may have the same array (`add` gives dy to both of its).
        key = id(target)
        if key in sums:
            sums[key] = sums[key] + g
            return
        sums[key] = g
        if isinstance(target, Node):
            heapq.heappush(heap, target)
        else:
            leaves.append(target)

    add_gradient(loss.node or loss, dy)
    while heap:
        node = heapq.heappop(heap)
        for version, before, owner in node.guards:
            if version[0] != before and _reads(node.vjp, owner, array_type):
                raise GraphError(
                    f"a tensor that the backward of '{node.name}' needs was changed after "
                    f"the forward (version {before} then, {version[0]} now): "
                    "run backward before the optimiser step, merge or load"
                )
        parents = node.parents
        grads = node.vjp(sums.pop(id(node)))
        if not retain_graph:
            node.vjp = _freed
            node.parents = ()
            node.guards = []
        for parent, g in zip(parents, grads, strict=True):
            if parent is not None and g is not None:
                add_gradient(parent, g)
    returned = {id(dy)}
    results = []
    for leaf in leaves:
        g = sums[id(leaf)]
        # A new array is needed for a NumPy scalar, a view, dy itself or what another leaf has.
        is_array = type(g) is type(leaf.data) and g.base is None
        if not is_array or id(g) in returned or g.dtype != leaf.dtype:
            g = leaf.backend.xp.array(g, dtype=leaf.dtype)
        returned.add(id(g))
        results.append((leaf, g))
    return results
