"""Which processes are ranks: what launchers say, and mpi4py only where one has started several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import minilora.training.ranks
from minilora.cli import main
from minilora.errors import ConfigError
from minilora.threads import available_cores
from minilora.training.ranks import LAUNCHERS, Alone, connect, launched


@pytest.mark.parametrize(("rank", "size"), LAUNCHERS)
def test_launched_reads_what_a_launcher_says(rank, size):
    assert launched({rank: "2", size: "4", "HOME": "/"}) == (2, 4)
    assert launched({rank: "0", size: "1"}) == (0, 1)
    for incomplete in (
        {},
        {rank: "2"},
        {size: "4"},
        {rank: "2", size: "many"},
        {rank: "", size: ""},
    ):
        assert launched(incomplete) == (0, 1)


def test_launched_takes_no_worker_of_a_pool_for_a_rank(monkeypatch):
    rank, size = LAUNCHERS[0]
    monkeypatch.setitem(sys.modules, "mpi4py.futures", None)
    assert launched({rank: "2", size: "4"}) == (0, 1)


def test_connect_without_mpiexec_imports_nothing():
    program = (
        "import sys; from minilora.cli import main; from minilora.training.ranks import connect; "
        "print(type(connect()).__name__, main(['devices']), 'mpi4py' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "Alone 0 False"


def test_alone_is_one_process():
    alone = Alone()
    assert (alone.rank, alone.size, alone.cores) == (0, 1, available_cores())
    assert alone.owned(3) == range(3)
    assert alone.share("value") == "value"
    assert list(alone.gather(iter([(1.0, 2)]))) == [(1.0, 2)]
    assert alone.signal == 0
    alone.watch([signal.SIGTERM, signal.SIGINT])
    assert alone.signal == signal.SIGTERM


@pytest.fixture
def started_without_mpi4py(monkeypatch):
    """A function that makes this process rank 0 or 1 of two, without mpi4py."""

    def start(rank):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        monkeypatch.setitem(sys.modules, "mpi4py", None)

    return start


def test_connect_says_what_mpiexec_needs(started_without_mpi4py):
    started_without_mpi4py(1)
    with pytest.raises(
        ConfigError, match=r"mpiexec started 2 processes, which need mpi4py .*\[mpi\]"
    ):
        connect()


@pytest.mark.parametrize("argv", [["evaluate", "--base=b", "--data=d"], ["merge"], ["--help"]])
def test_main_under_mpiexec_without_mpi4py_reports_on_rank_0_alone(
    argv, started_without_mpi4py, capsys
):
    for rank in (0, 1):
        started_without_mpi4py(rank)
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        if rank == 0:
            assert err.startswith("minilora: error: mpiexec started 2 processes, which need mpi4py")
            assert err.count("\n") == 1
        else:
            assert err == ""


def test_main_takes_cuda_local_as_the_first_gpu(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("text " * 100)
    argv = ["pretrain", f"--data={tmp_path / 'text.txt'}", "--device=cuda:local", "--context=8"]
    os.chdir(tmp_path)
    code = main([*argv, "--steps=1"])
    assert code == 2
    assert "cuda:0" in capsys.readouterr().err


class Machine:
    """The ranks of one machine, by the cores that each may use."""

    def __init__(self, *usable):
        self.usable = usable

    def allgather(self, mine):
        return [mine if cores is None else cores for cores in self.usable]


@pytest.mark.parametrize(
    ("others", "share"), [([], 1), ([[999]], 1), ([None], 2), ([None, [999], None], 3)]
)
def test_ranks_share_the_cores_that_they_all_may_use(others, share, monkeypatch):
    """Bound to cores of its own, a rank has all of them; otherwise as many as there are for it."""
    monkeypatch.setattr(minilora.training.ranks, "available_cores", lambda: 12)
    cores = minilora.training.ranks._share_of_cores(Machine(None, *others))
    assert cores == 12 // share
