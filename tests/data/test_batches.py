"""minilora/data.py: batches against their promises."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import data
from minilora.backend import NUMPY
from minilora.errors import ConfigError, DataError
from minilora.functional import IGNORE

GOLDEN = Path(__file__).parents[1] / "golden"


@st.composite
def windows(draw):
    context, batch_size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    tokens = np.arange(
        draw(st.integers(context + 1, 80)),
        dtype=draw(st.sampled_from([np.int32, np.uint8, np.int64])),
    )
    return data.Windows(tokens, context, batch_size, seed=draw(st.integers(0, 2**64)))


@given(windows(), st.integers(0, 30))
def test_windows_targets_are_the_ids_one_position_later(cut, step):
    batch = cut.batch(step)
    assert batch.ids.shape == batch.targets.shape == (cut.batch_size, cut.context)
    assert batch.ids.dtype == batch.targets.dtype == np.int64
    assert (batch.first, len(batch), batch.tokens) == (
        0,
        cut.batch_size,
        cut.batch_size * cut.context,
    )
    # The tokens of these texts are their own positions.
    assert np.array_equal(batch.targets, batch.ids + 1)
    assert np.array_equal(batch.ids, batch.ids[:, :1] + np.arange(cut.context))
    assert batch.ids.min() >= 0
    assert batch.targets.max() < len(cut.tokens)


@given(windows())
def test_windows_visits_each_window_once_per_epoch(cut):
    n, steps = len(cut), 3 * len(cut) // cut.batch_size + 1
    starts = np.concatenate([cut.batch(step).ids[:, 0] for step in range(steps)])
    for epoch in range(3):
        visited = np.sort(starts[epoch * n : (epoch + 1) * n])
        assert np.array_equal(visited, visited[0] + cut.context * np.arange(n))
    for step in range(steps):
        assert cut.epoch(step) == step * cut.batch_size // n
    assert n == 1 or n * cut.context + 2 * cut.context > len(cut.tokens), (
        "at most a stride and an offset are left out"
    )


@given(windows(), st.lists(st.integers(0, 60), max_size=8))
def test_windows_batch_depends_on_no_batch_before_it(cut, history):
    fresh = [
        data.Windows(cut.tokens, cut.context, cut.batch_size, cut.seed).batch(step)
        for step in history
    ]
    for step, batch in zip(history, fresh, strict=True):
        assert np.array_equal(cut.batch(step).ids, batch.ids)


def test_windows_order_and_offset_differ_between_epochs_and_seeds():
    tokens = np.arange(1000)
    epochs = [
        data.Windows(tokens, 9, 110, seed).batch(epoch).ids[:, 0]
        for seed in range(5)
        for epoch in range(20)
    ]
    assert len({tuple(np.argsort(starts).tolist()) for starts in epochs}) == 100
    offsets = [int(starts.min()) for starts in epochs]
    assert (min(offsets), max(offsets)) == (0, 1000 - 1 - 110 * 9)
    assert len(set(offsets)) == 10


def test_windows_order_is_uniform():
    # Chi-square over 1,000 epochs with 9 degrees of freedom: 33.7 is passed with probability 1e-4.
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


@pytest.mark.parametrize("options", [{"context": 0}, {"batch_size": 0}, {"seed": -1}])
def test_windows_refuses_numbers_below_their_least_value(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        data.Windows(np.arange(9), **{"context": 2, "batch_size": 2, **options})


@pytest.mark.parametrize("tokens", [np.zeros((3, 3), int), np.zeros(9), np.array(1)])
def test_windows_and_evaluation_windows_refuse_tokens_that_are_not_a_text(tokens):
    with pytest.raises(DataError, match=r"integers \(N,\)"):
        data.Windows(tokens, 2, 2)
    with pytest.raises(DataError, match=r"integers \(N,\)"):
        data.evaluation_windows(tokens, 2, 2)


@given(windows(), st.lists(st.integers(0, 9), max_size=5))
def test_batch_shards_together_are_the_batch(cut, cuts):
    batch = cut.batch(1)
    places = sorted({0, len(batch), *(min(c, len(batch)) for c in cuts)})
    shards = [batch.shard(a, b) for a, b in pairwise(places)]
    assert np.array_equal(np.concatenate([s.ids for s in shards]), batch.ids)
    assert np.array_equal(np.concatenate([s.targets for s in shards]), batch.targets)
    assert [s.first for s in shards] == places[:-1]
    assert sum(s.tokens for s in shards) == batch.tokens
    for shard in shards:  # a shard of a shard knows its place too
        inner = shard.shard(len(shard) - 1, 99)
        assert np.array_equal(inner.ids[0], batch.ids[inner.first])
        assert len(inner) == 1
        assert np.shares_memory(inner.ids, batch.ids)


def test_batch_tokens_does_not_count_ignored_targets():
    batch = data.Batch(np.zeros((2, 3), np.int64), np.array([[1, IGNORE, 0], [IGNORE] * 3]))
    assert (batch.tokens, batch.shard(1, 2).tokens) == (2, 0)


@given(st.lists(st.sampled_from(["b", "a", "__base__", "c"]), max_size=9), st.integers(0, 9))
def test_batch_by_task_sorts_stably_and_cuts_between_tasks(tasks, first):
    ids = np.arange(len(tasks))[:, None] + np.zeros((1, 2), np.int64)
    batch = data.Batch(ids, ids + 1, first, tasks)
    parts = batch.by_task()
    assert [task for task, _ in parts] == sorted(set(tasks))
    order = [i for _, part in parts for i in part.ids[:, 0].tolist()]
    assert order == sorted(range(len(tasks)), key=lambda i: tasks[i])  # stably
    place = first
    for task, part in parts:
        assert list(part.tasks) == [task] * len(part)
        assert (part.first, part.targets.tolist()) == (place, (part.ids + 1).tolist())
        place += len(part)


@given(
    st.lists(st.integers(20, 200), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(0, 40),
)
def test_task_windows_has_each_task_s_own_windows(sizes, more, seed, step):
    texts = {
        f"task {i}": np.arange(size, dtype=np.int32) + 1000 * i for i, size in enumerate(sizes)
    }
    count = len(texts) + more
    batch = data.TaskWindows(texts, 7, count, seed).batch(step)
    assert [task for task, _ in zip(batch.tasks, batch.ids, strict=True)] == [
        list(texts)[b % len(texts)] for b in range(count)
    ]
    for task, ids in texts.items():
        rows = [b for b, name in enumerate(batch.tasks) if name == task]
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


@given(
    st.lists(st.sampled_from(["b", "a"]), min_size=1, max_size=9),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_batch_shard_keeps_the_tasks_of_its_sequences(tasks, start, stop):
    ids = np.zeros((len(tasks), 2), np.int64)
    batch = data.Batch(ids, ids, 0, tasks)
    assert batch.shard(start, stop).tasks == tasks[start:stop]
    assert batch.to(NUMPY, 3).tasks == tasks
    assert data.Batch(ids, ids).by_task()[0][0] is None
    assert data.Batch(ids, ids).shard(start, stop).tasks is None


@given(
    st.integers(2, 90),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([np.uint8, np.int32, np.uint64]),
)
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


@given(st.integers(2, 300), st.integers(1, 9), st.integers(1, 40))
def test_evaluation_windows_with_a_limit_are_spread_over_the_text(size, context, limit):
    whole = np.concatenate(
        [b.ids for b in data.evaluation_windows(np.arange(size) + 1, context, 3)]
    )
    some = np.concatenate(
        [b.ids for b in data.evaluation_windows(np.arange(size) + 1, context, 3, limit)]
    )
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
