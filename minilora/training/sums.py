"""The sum over the shards of a step: a binary tree over their numbers, whoever adds.

A node covers the shards i 2^k to (i + 1) 2^k, or up to the last one, and is the sum of its two
halves. The sum of 6 shards is ((0 + 1) + (2 + 3)) + (4 + 5). Floating-point sums depend on their
form; this form depends on the number of shards alone. Neighbouring shards add up to few nodes
without the others, so that a process which owns them sends little, and the bits of the whole sum
do not depend on who owns what. Up to three shards the tree is the sum from left to right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from ..backend import Array

FORM = "binary tree over the shards"  # part of what a run is: see `Run.identity`
T = TypeVar("T")


class Node(NamedTuple, Generic[T]):
    """The sum of the shards first ... stop - 1."""

    first: int
    stop: int
    value: T


def add_up(nodes: Iterable[Node[T]], count: int, add: Callable[[T, T], T]) -> list[Node[T]]:
    """The largest nodes of a sum of `count` shards that these nodes add up to, in their order.

    nodes   in the order of their shards; those of all shards add up to one node

    They are taken one at a time, and at most log2(count) + 1 sums exist at once.
    """
    found: list[Node[T]] = []
    for node in nodes:
        while found and _are_halves(found[-1], node, count):
            left = found.pop()
            node = Node(left.first, node.stop, add(left.value, node.value))
        found.append(node)
    return found


def _are_halves(left: Node[T], right: Node[T], count: int) -> bool:
    """Whether two nodes are the halves of one. A left half is whole, a right one may be shorter."""
    size = left.stop - left.first
    is_left_half = left.first % (2 * size) == 0 and left.stop == right.first
    return is_left_half and right.stop == min(right.first + size, count)


def owned(count: int, size: int, rank: int) -> range:
    """Which of `count` neighbours belong to one of `size` owners; equally many, but for one."""
    return range(rank * count // size, (rank + 1) * count // size)


def owned_nodes(count: int, size: int, rank: int) -> list[tuple[int, int]]:
    """(first, stop) of the nodes that the shards of one owner add up to."""
    leaves = (Node(i, i + 1, None) for i in owned(count, size, rank))
    return [(node.first, node.stop) for node in add_up(leaves, count, lambda left, right: None)]


@dataclasses.dataclass
class Partial:
    """What some shards add up to.

    losses    float64 scalars by task
    grads     by parameter; None for one that takes no part
    trained   whether any of the losses required a gradient
    """

    losses: dict[str | None, Array]
    grads: list[Array | None]
    trained: bool

    def add(self, other: Partial) -> Partial:
        """The sum of both, in the memory of this one. No value is read: a GPU need not wait."""
        for task, loss in other.losses.items():
            self.losses[task] = self.losses[task] + loss if task in self.losses else loss
        for i, grad in enumerate(other.grads):
            if self.grads[i] is None:
                self.grads[i] = grad
            elif grad is not None:
                self.grads[i] += grad
        self.trained = self.trained or other.trained
        return self
