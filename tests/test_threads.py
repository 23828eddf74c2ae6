"""Blocks and workers: the cut, the order of results, work ahead, and what an exception stops."""

from __future__ import annotations

import contextvars
import threading
import time
import types

import pytest
import threadpoolctl

from minilora.threads import Workers, available_cores, blocks, keep_memory, one_blas_thread


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("size", [-1, 0, 1, 3, 7, 9])
def test_blocks_cover_everything_once_in_order(count, size):
    cut = blocks(count, size)
    covered = [i for block in cut for i in range(block.start, block.stop)]
    assert covered == list(range(count))
    for block in cut[:-1]:
        assert block.stop - block.start == max(1, size)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("ahead", [None, 1, 2])
def test_workers_map_gives_results_in_order(threads, ahead):
    with Workers(threads) as workers:
        squares = workers.map(lambda i: i * i, range(9), ahead)
        assert list(squares) == [i * i for i in range(9)]
        assert list(workers.map(lambda i: i, [], ahead)) == []


def test_workers_map_makes_the_next_result_while_one_is_in_use():
    begun = [threading.Event() for _ in range(5)]

    def work(i: int) -> int:
        begun[i].set()
        return i

    with Workers(1) as workers:
        for i, result in enumerate(workers.map(work, range(5), ahead=1)):
            assert result == i
            assert i == 4 or begun[i + 1].wait(60)  # although nobody asked for it yet
            assert not any(event.is_set() for event in begun[i + 2 :])


@pytest.mark.parametrize("ahead", [None, 1, 2])
def test_workers_without_threads_do_all_in_the_calling_thread(ahead):
    here = [threading.get_ident()] * 3
    with Workers(0) as workers:
        assert list(workers.map(lambda i: threading.get_ident(), range(3), ahead)) == here
        assert workers.together(lambda i: threading.get_ident(), range(3)) == here


def test_workers_map_raises_at_the_part_that_failed_and_starts_no_other():
    made = []

    def work(i: int) -> int:
        made.append(i)
        return 1 // (2 - i)

    with Workers(1) as workers:
        results = workers.map(work, range(5), ahead=1)
        assert next(results) == 0
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert made == [0, 1, 2]


def test_workers_map_drops_the_parts_that_wait_when_it_is_closed():
    made = []

    def work(i: int) -> int:
        made.append(i)
        if i > 0:
            time.sleep(0.2)  # long enough for the parts behind to wait
        return i

    with Workers(1) as workers:
        results = workers.map(work, range(9), ahead=3)
        assert next(results) == 0
        results.close()
    assert 3 not in made


def test_workers_together_gives_results_in_order_and_works_in_the_calling_thread():
    with Workers(1) as workers:
        names = workers.together(lambda _: threading.current_thread().name, range(3))
    assert names[0] == threading.current_thread().name
    for name in names[1:]:
        assert name.startswith("minilora")


def test_workers_map_runs_each_part_in_the_caller_s_context():
    variable = contextvars.ContextVar("variable", default=0)
    token = variable.set(1)
    with Workers(2) as workers:
        assert list(workers.map(lambda i: variable.get() + i, range(3))) == [1, 2, 3]
    variable.reset(token)


def test_workers_map_works_in_the_calling_thread_if_there_is_one():
    with Workers(1) as workers:
        names = list(workers.map(lambda _: threading.current_thread().name, range(3)))
    assert names == [threading.current_thread().name] * 3


def test_workers_map_starts_one_part_more_than_there_are_threads():
    started, proceed = [], threading.Event()

    def work(i: int) -> int:
        started.append(i)
        assert proceed.wait(60)
        return i

    taken = []
    with Workers(2) as workers:
        parts = (taken.append(i) or i for i in range(9))
        results = workers.map(work, parts)
        threading.Timer(0.05, proceed.set).start()
        assert next(results) == 0
        assert taken[:3] == [0, 1, 2]
        assert len(taken) == 4  # the third waited beside the two at work, then the fourth
        assert list(results) == list(range(1, 9))


def test_one_blas_thread_holds_blas_to_one_thread_and_restores_it():
    def counts() -> list[int]:
        pools = threadpoolctl.threadpool_info()
        return [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]

    with threadpoolctl.threadpool_limits(2, "blas"):
        before = counts()
        with one_blas_thread():
            assert set(counts()) == {1}
            with one_blas_thread():
                assert set(counts()) == {1}
        assert counts() == before


def test_keep_memory_sets_the_documented_thresholds(monkeypatch):
    calls = []
    library = types.SimpleNamespace(mallopt=lambda option, value: calls.append((option, value)))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    keep_memory()
    # glibc's malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
    assert calls == [(-3, 2**30), (-1, 2**31 - 1), (-2, 2**24), (-8, 1)]


def test_available_cores_without_affinity_are_those_of_the_machine(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert available_cores() == 7
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert available_cores() == 1
