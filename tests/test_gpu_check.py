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
