"""A part's own process: what it notes is in its file at once, whatever happens to it later."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conducting import Facts, write_json

ROOT = Path(__file__).resolve().parents[2]
# Where the function of each part is. Imported late: each needs more than Python's own library.
FUNCTIONS = {
    "probe": "floors",
    "floors": "floors",
    "tests": "checks",
    "parity": "checks",
    "graph": "checks",
    "ours": "ours",
    "speed": "ours",
    "method": "ours",
    "variant": "ours",
    "count": "counting",
    "eager": "pytorch",
    "compiled": "pytorch",
    "reduce-overhead": "pytorch",
}


class Notes:
    """What a part has found so far, in a file that is written anew with each fact."""

    def __init__(self, path: Path):
        self.path = path
        self.facts: Facts = {}

    def add(self, **facts: Any) -> None:
        self.facts |= facts
        write_json(self.path, self.facts)

    def fail(self, error: str) -> None:
        """Note that something is wrong; several reasons are kept, in order."""
        errors = [*filter(None, [self.facts.get("error")]), error]
        self.add(ok=False, error="; ".join(errors)[:2000])

    def measure(self, name: str, function: Callable[[], Any]) -> None:
        """Note what `function` returns, or its error: the part goes on with the next thing."""
        try:
            self.add(**{name: function()})
        except Exception as error:
            traceback.print_exc()
            self.add(**{name: None})
            self.fail(f"{name}: {last_line(error)}")


def last_line(error: BaseException) -> str:
    """An error's kind, and the last line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:500]


def replace_missing_packages() -> None:
    """Stand-ins for what minilora imports and no part needs: a progress bar, limits for BLAS."""
    if importlib.util.find_spec("tqdm") is None:
        bar: Any = types.ModuleType("tqdm")
        bar.tqdm = None
        sys.modules["tqdm"] = bar
    if importlib.util.find_spec("threadpoolctl") is None:

        class Limits(contextlib.nullcontext):  # type: ignore[type-arg]
            def __enter__(self) -> Any:
                return self

            def get_original_num_threads(self) -> dict[str, int]:
                return {"blas": 1}

        limits: Any = types.ModuleType("threadpoolctl")
        limits.threadpool_limits = lambda *arguments, **options: Limits()
        sys.modules["threadpoolctl"] = limits


def prepare_process(emulated: bool) -> None:
    """Import this minilora and, if asked, an emulated device; let nothing reach for a network."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    replace_missing_packages()
    if emulated:
        cupy_on_cpu = importlib.import_module("cupy_on_cpu")
        cupy_on_cpu.install()


def main(
    name: str, notes: Notes, folder: Path, seconds: float, rehearse: bool, emulate: bool
) -> int:
    """Run one part. Its exit code is 0 if it came to its end."""
    begun = time.monotonic()
    faulthandler.enable()  # a crash in a library shows where it was
    faulthandler.dump_traceback_later(max(1.0, seconds - 1))  # and so does a part that hangs
    kind, _, argument = name.partition(":")
    try:
        prepare_process(rehearse or emulate)
        from .bench import Bench

        module = importlib.import_module(f"{__package__}.{FUNCTIONS[kind]}")
        function = getattr(module, kind.replace("-", "_"))
        bench = Bench(notes, folder, begun + seconds, rehearse, rehearse or emulate)
        function(bench, *filter(None, [argument]))
        notes.add()
    except BaseException as error:
        traceback.print_exc()
        notes.fail(last_line(error))
        return 1
    return 0
