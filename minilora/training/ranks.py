"""Several processes, on one machine or on many, that take the steps of one run together by MPI.

    mpiexec -n 4 python -m mpi4py -m minilora finetune --base base --data notes.txt

Every rank holds the model and the optimizer, computes the gradients of its shards, and gets the sum
over all shards, whose form depends on the number of shards alone (sums.py). All ranks then take the
same step, so that weights are never sent, and the bits are those of one process. Rank 0 alone
writes files and reports.

This is the only file that imports mpi4py, and only for a process that mpiexec started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import ConfigError
from ..nn import Parameter
from ..threads import available_cores
from .group import Group
from .sums import Node, Partial

# Where launchers say a process's rank and how many they have started: Open MPI; MPICH, Intel MPI
# and Slurm's PMI; Slurm's PMIx.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
)


class Ranks(Protocol):
    """The processes of a run. Use it in a `with` block around all that they do together.

    rank         this process's number
    size         how many processes there are
    local_rank   this process's number among those of its machine
    cores        the processor cores that this process may use
    signal       the number of a signal that stops the run, 0 before one has come
    is_lost      whether this process has failed, and the others cannot know why
    """

    rank: int
    size: int
    local_rank: int
    is_lost: bool

    @property
    def cores(self) -> int: ...

    @property
    def signal(self) -> int: ...

    def watch(self, received: Sequence[int]) -> None:
        """Let `received` be the list of the signals that this process gets."""

    def owned(self, count: int) -> range:
        """Which of the shards of a step are this rank's: neighbours, maybe none."""

    def sum(
        self,
        nodes: Sequence[Node[Partial]],
        count: int,
        tasks: Sequence[str | None],
        params: Sequence[Parameter],
    ) -> Partial:
        """The sum over all `count` shards, from the nodes that each rank's shards add up to."""

    def gather(self, losses: Iterable[tuple[float, int]]) -> Iterable[tuple[float, int]]:
        """The items of all ranks in order; rank r has those with the numbers r, r + size, ..."""

    def share(self, value: Any) -> Any:
        """Rank 0's value. Like every value here it is one that JSON has."""

    def require_same(self, values: Mapping[str, Any], advice: str) -> None:
        """ConfigError, which `advice` ends, on all ranks unless all have the same values."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None: ...

    def close(self, code: int) -> None:
        """Let this process end with an exit code, and the others too where they would wait."""


class Alone:
    """One process: nothing is sent, and mpi4py is not needed."""

    rank, size, local_rank = 0, 1, 0
    is_lost = False

    def __init__(self) -> None:
        self._received: Sequence[int] = ()

    @property
    def cores(self) -> int:
        return available_cores()

    @property
    def signal(self) -> int:
        return self._received[0] if self._received else 0

    def watch(self, received: Sequence[int]) -> None:
        self._received = received

    def owned(self, count: int) -> range:
        return range(count)

    def sum(
        self,
        nodes: Sequence[Node[Partial]],
        count: int,
        tasks: Sequence[str | None],
        params: Sequence[Parameter],
    ) -> Partial:
        for node in nodes:  # the root of the tree; none for a batch without sequences
            return node.value
        return Partial({}, [None] * len(params), trained=False)

    def gather(self, losses: Iterable[tuple[float, int]]) -> Iterable[tuple[float, int]]:
        return losses

    def share(self, value: Any) -> Any:
        return value

    def require_same(self, values: Mapping[str, Any], advice: str) -> None:
        pass

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        pass

    def close(self, code: int) -> None:
        pass


# ---- who started this process --------------------------------------------------------------------


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, size) as the launcher that started this process says; (0, 1) without one.

    The workers of mpi4py's pool, which run functions for one program, are not ranks of a run.
    """
    if "mpi4py.futures" in sys.modules:
        return 0, 1
    for rank, size in LAUNCHERS:
        numbers = environment.get(rank, ""), environment.get(size, "")
        if all(number.isdecimal() for number in numbers):
            return int(numbers[0]), max(1, int(numbers[1]))
    return 0, 1


def connect() -> Ranks:
    """The ranks that mpiexec started together with this process; `Alone` without it.

    ConfigError if mpi4py is missing, or belongs to another MPI than mpiexec.
    """
    _, size = launched()
    if size == 1:
        return Alone()
    started = f"mpiexec started {size} processes"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{started}, which need mpi4py ({reason:.200}): install the extra mpi "
            "(pip install -e .[mpi]), or start minilora without mpiexec"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != size:
        raise ConfigError(
            f"{started}, but mpi4py finds {comm.Get_size()}: it uses another MPI; "
            "use the mpiexec that belongs to the MPI of mpi4py"
        )
    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return Group(comm, machine.Get_rank(), _share_of_cores(machine), MPI.Finalize)


def _share_of_cores(machine: Any) -> int:
    """The cores for this rank: those that it may use, shared with ranks that may use the same."""
    usable: Any = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    sharing = machine.allgather(usable).count(usable)
    return max(1, available_cores() // int(sharing))
