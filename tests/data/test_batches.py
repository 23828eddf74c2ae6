"""Batches: windows for training and for evaluation, shards, and batches of several tasks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import data
from minilora.backend import NUMPY
from minilora.errors import ConfigError, DataError
from minilora.functional import IGNORE
from minilora.threads import blocks


@st.composite
def windows(draw):
    """Windows of a text whose tokens are their own positions."""
    context = draw(st.integers(1, 9))
    batch_size = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([np.int32, np.uint8, np.int64]))
    tokens = np.arange(draw(st.integers(context + 1, 80)), dtype=dtype)
    return data.Windows(tokens, context, batch_size, seed=draw(st.integers(0, 2**64)))


@given(windows(), st.integers(0, 30))
def test_windows_targets_are_the_ids_one_position_later(cut, step):
    batch = cut.batch(step)
    assert batch.ids.shape == batch.targets.shape == (cut.batch_size, cut.context)
    assert batch.ids.dtype == batch.targets.dtype == np.int64
    assert batch.first == 0
    assert len(batch) == cut.batch_size
    assert batch.tokens == cut.batch_size * cut.context
    assert np.array_equal(batch.targets, batch.ids + 1)
    assert np.array_equal(batch.ids, batch.ids[:, :1] + np.arange(cut.context))
    assert batch.ids.min() >= 0
    assert batch.targets.max() < len(cut.tokens)


@given(windows())
def test_windows_visits_each_window_once_per_epoch(cut):
    n = len(cut)
    steps = 3 * n // cut.batch_size + 1
    starts = np.concatenate([cut.batch(step).ids[:, 0] for step in range(steps)])
    for epoch in blocks(3 * n, n):
        visited = np.sort(starts[epoch])
        assert np.array_equal(visited, visited[0] + cut.context * np.arange(n))
    for step in range(steps):
        assert cut.epoch(step) == step * cut.batch_size // n
    if n > 1:  # at most a stride and an offset are left out
        assert (n + 2) * cut.context > len(cut.tokens)


@given(windows(), st.lists(st.integers(0, 60), max_size=8))
def test_windows_batch_depends_on_no_batch_before_it(cut, history):
    for step in history:
        fresh = data.Windows(cut.tokens, cut.context, cut.batch_size, cut.seed)
        assert np.array_equal(cut.batch(step).ids, fresh.batch(step).ids)


def test_windows_order_and_offset_differ_between_epochs_and_seeds():
    tokens = np.arange(1000)
    orders = set()
    offsets = []
    for seed in range(5):
        cut = data.Windows(tokens, 9, 110, seed)
        for epoch in range(20):
            starts = cut.batch(epoch).ids[:, 0]
            orders.add(tuple(np.argsort(starts).tolist()))
            offsets.append(int(starts.min()))
    assert len(orders) == 100
    assert (min(offsets), max(offsets)) == (0, 1000 - 1 - 110 * 9)
    assert len(set(offsets)) == 10


def test_windows_order_is_uniform():
    # Chi-square over 1,000 epochs with 9 degrees of freedom exceeds 33.7 with probability 1e-4.
    cut = data.Windows(np.arange(45), context=4, batch_size=10, seed=3)
    assert len(cut) == 10
    orders = [np.argsort(np.argsort(cut.batch(epoch).ids[:, 0])) for epoch in range(1000)]
    for place in (0, 5, 9):
        counts = np.bincount([order[place] for order in orders], minlength=10)
        assert ((counts - 100) ** 2 / 100).sum() < 33.7


def test_windows_takes_a_text_of_one_window():
    batch = data.Windows(np.array([5, 6, 7]), context=2, batch_size=2).batch(4)
    assert batch.ids.tolist() == [[5, 6]] * 2
    assert batch.targets.tolist() == [[6, 7]] * 2
    with pytest.raises(DataError, match="needs at least 4 tokens, has 3"):
        data.Windows(np.array([5, 6, 7]), context=3, batch_size=1)


@pytest.mark.parametrize(("name", "value"), [("context", 0), ("batch_size", 0), ("seed", -1)])
def test_windows_refuses_numbers_below_their_least_value(name, value):
    options = {"context": 2, "batch_size": 2}
    options[name] = value
    with pytest.raises(ConfigError, match=f"{name} must be"):
        data.Windows(np.arange(9), **options)


@pytest.mark.parametrize("tokens", [np.zeros((3, 3), int), np.zeros(9), np.array(1)])
def test_windows_and_evaluation_windows_refuse_tokens_that_are_not_a_text(tokens):
    with pytest.raises(DataError, match=r"integers \(N,\)"):
        data.Windows(tokens, 2, 2)
    with pytest.raises(DataError, match=r"integers \(N,\)"):
        data.evaluation_windows(tokens, 2, 2)


@given(windows(), st.sets(st.integers(0, 9), max_size=5))
def test_batch_shards_together_are_the_batch(cut, cuts):
    batch = cut.batch(1)
    places = sorted({0, len(batch), *(cut for cut in cuts if cut < len(batch))})
    shards = [batch.shard(start, stop) for start, stop in pairwise(places)]
    assert np.array_equal(np.concatenate([shard.ids for shard in shards]), batch.ids)
    assert np.array_equal(np.concatenate([shard.targets for shard in shards]), batch.targets)
    assert [shard.first for shard in shards] == places[:-1]
    assert sum(shard.tokens for shard in shards) == batch.tokens
    for shard in shards:  # a shard of a shard knows its place too
        inner = shard.shard(len(shard) - 1, 99)
        assert np.array_equal(inner.ids[0], batch.ids[inner.first])
        assert len(inner) == 1
        assert np.shares_memory(inner.ids, batch.ids)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64])
def test_batch_to_keeps_integers_integers(dtype):
    # uint64 beside int64 would be float64.
    ids = np.array([[1, 2, 0]])
    targets = np.array([[2, IGNORE, IGNORE]])
    batch = data.Batch(ids.astype(dtype), targets, first_key=ids.astype(dtype)).to(NUMPY, 3)
    for array, expected in ((batch.ids, ids), (batch.targets, targets), (batch.first_key, ids)):
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("name", "array", "got"),
    [
        ("targets", np.zeros((1, 3), int), r"int64 \(1, 3\)"),
        ("first_key", np.zeros((2, 2), int), r"int64 \(2, 2\)"),
        ("first_key", np.zeros((2, 3)), r"float64 \(2, 3\)"),
        ("targets", np.zeros((2, 3), bool), r"bool \(2, 3\)"),
        ("ids", np.zeros((2, 3)), r"float64 \(2, 3\)"),
    ],
)
def test_batch_to_names_the_array_that_is_wrong(name, array, got):
    ids = np.zeros((2, 3), int)
    batch = data.Batch(**{"ids": ids, "targets": ids, "first_key": ids, name: array})
    expected = rf"batch's {name} must be integers of the ids' shape \(2, 3\), got {got}"
    with pytest.raises(DataError, match=expected):
        batch.to(NUMPY, 3)


def test_batch_tokens_does_not_count_ignored_targets():
    targets = np.array([[1, IGNORE, 0], [IGNORE] * 3])
    batch = data.Batch(np.zeros((2, 3), np.int64), targets)
    assert batch.tokens == 2
    assert batch.shard(1, 2).tokens == 0


@given(st.lists(st.sampled_from(["b", "a", "__base__", "c"]), max_size=9), st.integers(0, 9))
def test_batch_by_task_sorts_stably_and_cuts_between_tasks(tasks, first):
    ids = np.arange(len(tasks))[:, None] + np.zeros((1, 2), np.int64)
    batch = data.Batch(ids, ids + 1, first, tasks)
    parts = batch.by_task()
    assert [task for task, _ in parts] == sorted(set(tasks))
    order = []
    for task, part in parts:
        assert list(part.tasks) == [task] * len(part)
        assert part.first == first + len(order)
        assert np.array_equal(part.targets, part.ids + 1)
        order += part.ids[:, 0].tolist()
    assert order == sorted(range(len(tasks)), key=tasks.__getitem__), "sorted stably"


SIZES = st.lists(st.integers(20, 200), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 9), st.integers(0, 9), st.integers(0, 40))
def test_task_windows_has_each_task_s_own_windows(sizes, more, seed, step):
    texts = {}
    for i, size in enumerate(sizes):
        texts[f"task {i}"] = np.arange(size, dtype=np.int32) + 1000 * i
    count = len(texts) + more
    batch = data.TaskWindows(texts, 7, count, seed).batch(step)
    assert len(batch) == count
    assert batch.tasks == [f"task {b % len(texts)}" for b in range(count)]
    for i, ids in enumerate(texts.values()):
        rows = range(i, count, len(texts))
        alone = data.Windows(ids, 7, len(rows), seed).batch(step)
        assert np.array_equal(batch.ids[rows], alone.ids)
        assert np.array_equal(batch.targets[rows], alone.targets)


def test_task_windows_refuses_texts_that_no_batch_can_hold():
    text = np.arange(50)
    for texts, size in (({}, 4), ({"a": text, "b": text}, 1)):
        with pytest.raises(ConfigError, match="cannot hold one of each"):
            data.TaskWindows(texts, 7, size)
    with pytest.raises(DataError, match="task 'b': "):
        data.TaskWindows({"a": text, "b": text[:7]}, 7, 2)


TASKS = st.lists(st.sampled_from(["b", "a"]), min_size=1, max_size=9)


@given(TASKS, st.integers(0, 9), st.integers(0, 9))
def test_batch_shard_keeps_the_tasks_of_its_sequences(tasks, start, stop):
    ids = np.zeros((len(tasks), 2), np.int64)
    batch = data.Batch(ids, ids, 0, tasks)
    assert batch.shard(start, stop).tasks == tasks[start:stop]
    assert batch.to(NUMPY, 3).tasks == tasks
    without = data.Batch(ids, ids)
    assert without.by_task() == [(None, without)]
    assert without.shard(start, stop).tasks is None


DTYPES = st.sampled_from([np.uint8, np.int32, np.uint64])


@given(st.integers(2, 90), st.integers(1, 9), st.integers(1, 9), DTYPES)
def test_evaluation_windows_counts_each_target_once(size, context, batch_size, dtype):
    tokens = np.arange(size).astype(dtype) + dtype(100)
    batches = list(data.evaluation_windows(tokens, context, batch_size))
    targets = np.concatenate([batch.targets for batch in batches]).ravel()
    ids = np.concatenate([batch.ids for batch in batches]).ravel()
    counted = targets != IGNORE
    assert targets[counted].tolist() == tokens[1:].tolist()
    assert ids[counted].tolist() == tokens[:-1].tolist()
    assert not ids[~counted].any()
    assert len(ids) - size < context
    assert sum(batch.tokens for batch in batches) == size - 1
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert {batch.ids.shape[1] for batch in batches} == {context}


def all_ids(batches):
    return np.concatenate([batch.ids for batch in batches])


@given(st.integers(2, 300), st.integers(1, 9), st.integers(1, 40))
def test_evaluation_windows_with_a_limit_are_spread_over_the_text(size, context, limit):
    tokens = np.arange(size) + 1
    whole = all_ids(data.evaluation_windows(tokens, context, 3))
    some = all_ids(data.evaluation_windows(tokens, context, 3, limit))
    assert len(some) == min(limit, len(whole))
    chosen = (some[:, 0] - 1) // context
    assert np.array_equal(whole[chosen], some)
    gaps = np.diff([*chosen, len(whole)])
    assert chosen[0] == 0
    assert gaps.max() - gaps.min() <= 1
    assert gaps.min() >= 1


def test_evaluation_windows_refuses_what_it_cannot_measure():
    with pytest.raises(DataError, match="needs at least 2 tokens, has 1"):
        data.evaluation_windows(np.arange(1), 4, 1)
    for options in ((0, 1), (1, 0), (1, 1, 0)):
        with pytest.raises(ConfigError, match="must be 1 or more"):
            data.evaluation_windows(np.arange(9), *options)
