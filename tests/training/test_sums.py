"""The tree over shards: one form for any owners of the shards, and few sums alive."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.sums import Node, Partial, add_up, owned, owned_nodes


def write(left: str, right: str) -> str:
    return f"({left}+{right})"


def leaves(numbers):
    return [Node(i, i + 1, str(i)) for i in numbers]


def definition(first: int, size: int, count: int) -> str | None:
    """The sum of shards first ... first + size - 1 (size a power of two) of `count`, in words."""
    if first >= count:
        return None
    if size == 1:
        return str(first)
    left = definition(first, size // 2, count)
    right = definition(first + size // 2, size // 2, count)
    return left if right is None else write(left, right)


def whole(count: int) -> str:
    return definition(0, 1 << (count - 1).bit_length(), count)


def test_add_up_gives_the_sums_of_halves_of_halves():
    assert whole(3) == "((0+1)+2)"
    assert whole(6) == "(((0+1)+(2+3))+(4+5))"
    for count in (*range(1, 70), 127, 128, 129, 1000):
        assert add_up(leaves(range(count)), count, write) == [Node(0, count, whole(count))]


@given(count=st.integers(1, 200), size=st.integers(1, 40))
def test_add_up_has_the_same_form_for_any_number_of_ranks(count, size):
    nodes = []
    for rank in range(size):
        own = add_up(leaves(owned(count, size, rank)), count, write)
        assert [(node.first, node.stop) for node in own] == owned_nodes(count, size, rank)
        assert len(own) <= max(1, 2 * math.ceil(math.log2(count + 1)))
        nodes += own
    assert add_up(nodes, count, write) == [Node(0, count, whole(count))]


@given(count=st.integers(1, 300), data=st.data())
def test_add_up_has_the_same_form_for_any_cut_into_neighbours(count, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=9)) | {0, count})
    nodes = []
    for start, stop in itertools.pairwise(cuts):
        nodes += add_up(leaves(range(start, stop)), count, write)
    assert add_up(nodes, count, write) == [Node(0, count, whole(count))]


@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_owned_gives_each_shard_to_one_rank_and_none_much_more_than_another(count, size):
    ranges = [owned(count, size, rank) for rank in range(size)]
    assert [i for own in ranges for i in own] == list(range(count))
    sizes = [len(own) for own in ranges]
    assert max(sizes) - min(sizes) <= 1


class Counted:
    """A value that counts how many of its kind exist."""

    alive = 0
    most = 0

    def __init__(self):
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_add_up_keeps_few_sums_while_shards_come():
    Counted.most = 0
    stream = (Node(i, i + 1, Counted()) for i in range(1000))

    def add(left, right):
        return left  # as Partial.add, in the memory of one of them

    [root] = add_up(stream, 1000, add)
    assert (root.first, root.stop) == (0, 1000)
    assert Counted.most <= math.log2(1024) + 2  # and the shard that comes


def test_partial_add_takes_none_as_no_part():
    first = [np.ones(2), None, None, np.ones(3)]
    second = [np.ones(2), np.ones(1), None, None]
    one = Partial({"a": np.float64(1)}, first, trained=False)
    two = Partial({"a": np.float64(2), "b": np.float64(3)}, second, trained=True)
    total = one.add(two)
    assert total.losses == {"a": 3, "b": 3}
    assert total.grads[0].tolist() == [2, 2]
    assert total.grads[1].tolist() == [1]
    assert total.grads[2] is None
    assert total.grads[3].tolist() == [1, 1, 1]
    assert total.trained
