"""What all tests share: the Hypothesis profiles, the marks that skip, the golden data."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cupy_on_cpu
import harness
import pytest
from hypothesis import settings

from minilora.backend import get_backend
from minilora.errors import DeviceError

settings.register_profile(
    "ci", max_examples=50, derandomize=True, deadline=None, print_blob=True, database=None
)
settings.register_profile(
    "nightly", max_examples=2000, derandomize=False, deadline=None, print_blob=True
)
settings.load_profile(os.environ.get("MINILORA_HYPOTHESIS", "ci"))

# Processes that tests start must import the helpers in support/, too.
SUPPORT = str(Path(__file__).parent / "support")
search_path = filter(None, (SUPPORT, os.environ.get("PYTHONPATH")))
os.environ["PYTHONPATH"] = os.pathsep.join(search_path)


def _why_no_oracle() -> str | None:
    """The reference implementations that are not installed, or None."""
    names = ("torch", "transformers", "peft")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


DRIVER = """
import ctypes, sys
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
sys.exit(driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value)
"""


@functools.cache
def _has_gpu() -> bool:
    """Whether a driver finds a GPU. A process of its own asks: an emulated driver must be first."""
    command = [sys.executable, "-c", DRIVER]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _why_no_gpu() -> str | None:
    """Why the tests marked `gpu` cannot run, or None.

    They run on a real GPU if there is one, and otherwise on the emulation of cupy_on_cpu.
    """
    reason = None if _has_gpu() else cupy_on_cpu.why_not()
    if reason is not None:
        return f"no GPU, and none can be emulated: {reason}"
    if not _has_gpu():
        cupy_on_cpu.install()
    try:
        get_backend("cuda")
    except DeviceError as error:
        return str(error)
    return None


def _why_no_mpi() -> str | None:
    """What is not installed of MPI, or None."""
    if importlib.util.find_spec("mpi4py") is None:
        return "not installed: mpi4py"
    return None if shutil.which("mpiexec") else "not installed: mpiexec"


def _why_no_browser() -> str | None:
    """What is missing to open a report's page in a browser, or None."""
    names = ("selenium", "PIL", "jinja2", "plotly")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    missing += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@pytest.fixture
def emulated() -> None:
    """Skips a test of what only the emulated device can show, such as exact counts."""
    if not cupy_on_cpu.is_installed():
        pytest.skip("this is a real GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests with the marks below if what they need is missing."""
    reasons = (
        ("oracle", _why_no_oracle),
        ("gpu", _why_no_gpu),
        ("mpi", _why_no_mpi),
        ("browser", _why_no_browser),
    )
    for mark, find_reason in reasons:
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = find_reason() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if harness.COSTS:
        terminalreporter.write_line(harness.summary())


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a base model, and transformers' model of it, which no test may change."""
    from peers import save_llama

    folder = tmp_path_factory.mktemp("base")
    return folder, save_llama(folder)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of models, adapters and expected logits that reference implementations wrote."""
    return Path(__file__).parent / "golden"
