"""benchmarks/gpu_check.py works on the stand-in for a GPU, and records failures."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minilora.errors import DeviceError

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module that writes its result into `tmp_path`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    specification = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULT", tmp_path / "result.json")
    return module


def test_gpu_check_dry_run_runs_every_part_and_writes_nothing() -> None:
    path = SCRIPT.parent / "results" / "gpu-check.json"
    before = path.read_bytes() if path.exists() else None
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (path.read_bytes() if path.exists() else None) == before
    result = json.loads(done.stdout)
    assert result["ok"]
    parts = result["parts"]
    expected = ["prepare", "parity", "tests", "traffic", "ours:micro", "eager:micro"]
    assert list(parts) == [*expected, "compiled:micro"]
    assert parts["parity"]["largest_relative_difference"] == 0
    assert parts["parity"]["two_runs_bitwise_equal"]
    traffic = parts["traffic"]["micro"]
    assert traffic["moves"] == {"uploads": 1, "downloads": 1, "waits": 1}
    assert traffic["array_operations"] > 100
    ours = parts["ours:micro"]
    assert ours["milliseconds"]["median"] > 0
    assert ours["losses"] == sorted(ours["losses"], reverse=True)
    assert (
        "skipped" in parts["eager:micro"]
        or result["losses_differ_from_ours_by"]["eager:micro"] < 1e-5
    )


def test_gpu_check_without_a_gpu_prints_why_and_writes_nothing(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def refuse(device: Any) -> Any:
        raise DeviceError("no driver here")

    monkeypatch.setattr(script, "get_backend", refuse)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert script.main() == 0
    assert capsys.readouterr().out == "nothing checked: no driver here\n"
    assert list(tmp_path.iterdir()) == []


GPU_TESTS = """
import importlib.util
import warnings

import pytest

warnings.warn("of another library")


@pytest.mark.gpu
def test_that_passes():
    assert importlib.util.find_spec("carried")


def test_without_the_mark():
    raise AssertionError
"""
FAILS = """

@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_that_fails(n):
    assert n == 1, "two is too many"
"""
SKIPS = """

@pytest.mark.gpu
def test_that_skips():
    pytest.skip("%s")
"""


def run_tests_part(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, source: str
) -> dict[str, Any]:
    """The result of the part `tests` on a file with this source."""
    path = folder / "test_of_a_gpu.py"
    path.write_text(source, encoding="utf-8")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    monkeypatch.setattr(script, "files_of_gpu_tests", lambda: [str(path)])
    return script.tests(script.Bench(False, folder))


def test_gpu_check_tests_pass_with_what_pythonpath_carries_and_a_warning_at_import(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = GPU_TESTS + SKIPS % script.MAY_SKIP
    result = run_tests_part(script, monkeypatch, tmp_path, source)
    assert result["ok"], result
    assert (result["passed"], result["failed"]) == (1, {})
    assert result["skipped"] == {script.MAY_SKIP: 1}


def test_gpu_check_tests_name_what_failed_with_the_error_s_last_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = run_tests_part(script, monkeypatch, tmp_path, GPU_TESTS + FAILS)
    assert not result["ok"]
    assert result["passed"] == 2
    ((name, line),) = result["failed"].items()
    assert name.endswith("test_that_fails[2]")
    assert "AssertionError" in line
    assert name in result["error"]


@pytest.mark.parametrize("everything", [True, False])
def test_gpu_check_tests_are_not_ok_where_one_is_skipped(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, everything: bool
) -> None:
    start = "import pytest\n" if everything else GPU_TESTS
    result = run_tests_part(script, monkeypatch, tmp_path, start + SKIPS % "no device")
    assert not result["ok"]
    assert "no device" in result["error"]
    assert ("no test passed" in result["error"]) == everything


@pytest.mark.parametrize("source", ["import pytest\n", "import no_such_module\n"])
def test_gpu_check_tests_are_not_ok_where_nothing_could_run(
    source: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = run_tests_part(script, monkeypatch, tmp_path, source)
    assert not result["ok"]
    assert "no test passed" in result["error"]


def test_gpu_check_finds_the_files_with_tests_of_a_gpu(script: ModuleType) -> None:
    names = [Path(path).name for path in script.files_of_gpu_tests()]
    assert {"test_backend.py", "test_devices.py", "test_quant.py"} <= set(names)
    assert "test_cupy_on_cpu.py" not in names
    assert "test_nn.py" not in names


def test_gpu_check_records_a_part_that_fails_or_takes_too_long(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended, plain = [], os.killpg
    monkeypatch.setattr(
        os, "killpg", lambda group, number: (ended.append(number), plain(group, number))
    )
    bench = script.Bench(True, tmp_path)
    missing = script.run_part("ours:micro", bench, 60)  # whose files nobody has prepared
    assert not missing["ok"]
    assert "no such model folder" in missing["error"]
    late = script.run_part("tests", bench, 0.05)
    assert not late["ok"]
    assert late["error"] == "more than 0 seconds"
    assert ended == [signal.SIGKILL]


def test_gpu_check_reports_the_parts_for_which_no_time_was_left(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert script.LIMIT < 600
    monkeypatch.setattr(script, "LIMIT", 0)
    result = script.check(script.Bench(True, tmp_path))
    assert not result["ok"]
    assert {part["error"] for part in result["parts"].values()} == {
        "not run: the time for all parts was over"
    }
