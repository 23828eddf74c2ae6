"""benchmarks/gpu_check.py loses nothing, names what failed, and runs on an emulated device."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_check  # noqa: E402
from gpu import checks, conducting, counting, guard, part, plan  # noqa: E402
from gpu.bench import Bench  # noqa: E402

from minilora.backend import get_backend  # noqa: E402

Facts = dict[str, Any]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Facts]:
    """What is printed, line by line."""
    printed: list[Facts] = []
    monkeypatch.setattr(conducting, "print_line", lambda text: printed.append(json.loads(text)))
    return printed


# ---- the plan ------------------------------------------------------------------------------------


def test_gpu_check_limits_fit_into_three_and_eight_minutes() -> None:
    assert sum(plan.QUICK.values()) <= plan.LONGEST["quick"] <= 180
    assert sum(plan.REST.values()) <= plan.LONGEST["rest"] <= 480


def test_gpu_check_parts_are_in_order_of_value() -> None:
    assert list(plan.QUICK) == ["probe", "floors", "tests", "ours:micro", "ours:tiny", "graph"]
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in plan.REST))
    before = ["probe", "parity", "ours", "speed", "method"]
    assert kinds == [*before, "eager", "compiled", "reduce-overhead", "variant"]
    compiled = [name for name in plan.REST if name.startswith("compiled")]
    assert compiled == [f"compiled:{size}" for size in plan.SIZE_NAMES]  # smallest first


def test_gpu_check_has_a_function_for_every_part() -> None:
    for name in {**plan.QUICK, **plan.REST, **plan.COUNT}:
        kind = name.partition(":")[0]
        source = (SCRIPT.parent / "gpu" / f"{part.FUNCTIONS[kind]}.py").read_text()
        assert f"\ndef {kind.replace('-', '_')}(" in source


def test_gpu_check_limits_are_longer_in_a_rehearsal_and_parts_can_be_chosen() -> None:
    chosen, total = gpu_check.choose_parts(gpu_check.parse(["--only", "graph", "ours:tiny"]))
    assert list(chosen) == ["ours:tiny", "graph"]
    assert total == plan.LONGEST["rest"]
    slow, longer = gpu_check.choose_parts(gpu_check.parse(["--rehearse", "--quick"]))
    assert list(slow) == list(plan.QUICK)
    assert longer == plan.REHEARSAL_IS_SLOWER * plan.LONGEST["quick"]


# ---- what is written -----------------------------------------------------------------------------


def test_write_json_leaves_the_file_as_it_was_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    conducting.write_json(path, {"a": np.float32(1), "nan": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1, "nan": "NaN"}
    plain = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        plain(self, text[: len(text) // 2], **options)
        raise OSError(28, "no space")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        conducting.write_json(path, {"b": 2})
    assert json.loads(path.read_text())["a"] == 1


def test_report_is_written_before_a_line_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    path = tmp_path / conducting.RESULT

    def look(text: str) -> None:
        line = json.loads(text)
        if "part" in line:
            seen.append(line.pop("part"))
            assert json.loads(path.read_text())["parts"][seen[-1]] == line

    monkeypatch.setattr(conducting, "print_line", look)
    report = conducting.Report(tmp_path, {"sources": "s", "rehearsal": False})
    for name in ("first", "second"):
        report.begin(name)
        assert json.loads(path.read_text())["running"] == name
        report.add(name, {"ok": name == "first", "value": float("inf")})
    assert seen == ["first", "second"]
    assert not report.finish(seconds=1)
    facts = json.loads(path.read_text())
    assert (facts["ok"], facts["failed"], facts["running"]) == (False, ["second"], None)


def test_report_keeps_parts_of_an_earlier_call_of_the_same_sources(
    tmp_path: Path, lines: list[Facts]
) -> None:
    for sources, name, expected in (("s", "a", "a"), ("s", "b", "ab"), ("other", "c", "c")):
        report = conducting.Report(tmp_path, {"sources": sources, "rehearsal": False})
        report.add(name, {"ok": True})
        assert report.finish()
        assert "".join(json.loads(report.path.read_text())["parts"]) == expected


def test_report_that_cannot_be_written_is_printed_and_is_not_well(
    tmp_path: Path, lines: list[Facts]
) -> None:
    folder = tmp_path / "gone"
    report = conducting.Report(folder, {})
    report.add("a", {"ok": True, "value": 7})
    assert not report.finish()
    assert lines[0]["value"] == 7
    assert str(folder) in lines[1]["not_written"]


def test_gpu_check_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    code = "from gpu.conducting import print_line; print_line('a'); print_line('b')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, stdout=writing, check=False
    )
    os.close(writing)
    assert done.returncode == 0


# ---- one part after another ----------------------------------------------------------------------

# A part that notes a fact, and then does what its first line says.
FAKE = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
from gpu.part import Notes

notes = Notes(Path(sys.argv[1]))
notes.add(value=7)
print("about to", sys.argv[2], flush=True)
exec(sys.argv[2])
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
FAILURES = {
    "raise ValueError('several\\nlines')": "exit code 1: lines",
    "sys.exit(3)": "exit code 3: about to sys.exit(3)",
    "os.kill(os.getpid(), 11)": "ended by SIGSEGV: about to os.kill(os.getpid(), 11)",
    "ctypes.string_at(0)": "ended by SIGSEGV: about to ctypes.string_at(0)",
    "notes.fail('as noted'); sys.exit(1)": "as noted",
    "notes.fail('noted by a part that came to its end')": "noted by",
    "time.sleep(60)": "more than 1 seconds: about to time.sleep(60)",
    # A hang that no signal but SIGKILL ends.
    "import signal; signal.signal(15, signal.SIG_IGN); [time.sleep(60) for i in range(9)]": "more",
}


def fake(code: str) -> conducting.Command:
    def command(name: str, notes: Path, seconds: float) -> list[str]:
        return [sys.executable, "-c", FAKE, str(notes), code]

    return command


def run_fake(code: str, folder: Path, seconds: float = 10) -> Facts:
    notes = folder / "notes.json"
    command = fake(code)("fake", notes, seconds)
    return conducting.run_part(command, notes, seconds, folder / conducting.LOG, ENVIRONMENT)


def test_run_part_returns_what_was_noted_and_logs_what_was_printed(tmp_path: Path) -> None:
    outcome = run_fake("print('to stderr', file=sys.stderr)", tmp_path)
    assert outcome["seconds"] < 10
    assert outcome | {"seconds": 0} == {"ok": True, "value": 7, "seconds": 0}
    log = (tmp_path / conducting.LOG).read_text()
    assert log.index("====") < log.index("about to") < log.index("\nto stderr")


@pytest.mark.parametrize("code", FAILURES)
def test_run_part_records_a_crash_an_exit_and_a_hang_and_keeps_what_was_noted(
    code: str, tmp_path: Path
) -> None:
    outcome = run_fake(code, tmp_path, seconds=1 if "sleep" in code else 10)
    assert not outcome["ok"]
    assert outcome["value"] == 7
    assert outcome["error"].startswith(FAILURES[code])
    assert "output" not in outcome or any("about to" in line for line in outcome["output"])


def test_run_part_records_a_part_without_a_result_and_one_that_does_not_start(
    tmp_path: Path,
) -> None:
    notes, log = tmp_path / "notes.json", tmp_path / "log"
    outcome = conducting.run_part([sys.executable, "-c", ""], notes, 10, log, ENVIRONMENT)
    assert outcome["error"] == "it ended without a result"
    outcome = conducting.run_part([str(tmp_path / "no-program")], notes, 10, log, ENVIRONMENT)
    assert outcome["error"].startswith("not started: ")
    outcome = conducting.run_part([sys.executable, "-c", ""], notes, 10, tmp_path, ENVIRONMENT)
    assert not outcome["ok"]  # a log that cannot be written is no reason to stop


LEAVES_ONE = "subprocess.Popen(['sleep', '61'], start_new_session=True)"


def find_sleeping(seconds: int) -> list[str]:
    """The processes that run `sleep` for this long."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (entry / "cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(entry.name)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("then", ["", "; time.sleep(60)"])
def test_run_part_ends_processes_that_the_part_leaves(then: str, tmp_path: Path) -> None:
    started = "; notes.add(process=" + LEAVES_ONE + ".pid)"
    outcome = run_fake("pass" + started + then, tmp_path, seconds=1 if then else 10)
    assert not Path(f"/proc/{outcome['process']}/cmdline").exists() or not find_sleeping(61)


def test_run_goes_on_after_a_failure_and_keeps_each_part_s_time(
    tmp_path: Path, lines: list[Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}
    codes = {"crashes": "os.abort()", "hangs": "time.sleep(60)", "works": "pass"}

    def command(name: str, notes: Path, seconds: float) -> list[str]:
        given[name] = seconds
        return fake(codes[name])(name, notes, seconds)

    report = conducting.Report(tmp_path, {})
    parts = {"crashes": 2, "hangs": 1, "works": 30}
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    monkeypatch.setattr(conducting, "LEAST", 0)
    conducting.run(parts, command, report, "GPU_CHECK_TEST", time.monotonic() + 33)
    assert [line["part"] for line in lines] == list(parts)
    assert [line["ok"] for line in lines] == [False, False, True]
    assert 0.9 < given["hangs"] < 3  # what `crashes` left over, but nothing of `works`
    assert given["works"] > 29


def test_run_keeps_what_a_part_has_noted_beside_the_results_until_it_has_ended(
    tmp_path: Path, lines: list[Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    monkeypatch.chdir(tmp_path)
    codes = {"a": "os.remove(notes.path)", "b": "Path('copy').write_bytes(notes.path.read_bytes())"}
    report = conducting.Report(tmp_path, {})
    (tmp_path / conducting.RUNNING).write_text('{"of a killed run": 1}')

    def command(name: str, notes: Path, seconds: float) -> list[str]:
        assert not notes.exists()
        return fake(codes[name])(name, notes, seconds)

    conducting.run({"a": 30, "b": 30}, command, report, "GPU_CHECK_TEST", time.monotonic() + 60)
    assert json.loads((tmp_path / "copy").read_text()) == {"value": 7}
    assert [line["ok"] for line in lines] == [False, True]
    assert lines[0]["error"].startswith("it ended without a result: ")
    assert not (tmp_path / conducting.RUNNING).exists()


def test_run_reports_the_parts_for_which_no_time_was_left(
    tmp_path: Path, lines: list[Facts]
) -> None:
    report = conducting.Report(tmp_path, {})
    conducting.run({"a": 5, "b": 5}, fake("pass"), report, "GPU_CHECK_TEST", time.monotonic() + 4)
    errors = {line["part"]: line.get("error") for line in lines}
    assert errors["a"] == "not run: no time was left"


def test_notes_measure_names_what_failed_and_goes_on(tmp_path: Path) -> None:
    notes = part.Notes(tmp_path / "notes.json")
    notes.measure("a", lambda: 1 // 0)
    notes.measure("b", lambda: 2)
    notes.measure("c", lambda: [][0])
    facts = conducting.read_json(notes.path)
    assert (facts["ok"], facts["a"], facts["b"]) == (False, None, 2)
    first, second = facts["error"].split("; ")
    assert first.startswith("a: ZeroDivisionError: ")
    assert second == "c: IndexError: list index out of range"


def test_part_main_notes_an_error_s_last_line(tmp_path: Path, capfd: Any) -> None:
    notes = tmp_path / "notes.json"
    options = ["--part", "ours:no-such-size", "--notes", str(notes), "--seconds", "60"]
    command = [sys.executable, str(SCRIPT), *options, "--folder", str(tmp_path)]
    outcome = conducting.run_part(command, notes, 60, tmp_path / "log", dict(os.environ))
    assert outcome["error"] == "KeyError: 'no-such-size'"


# ---- killed at any moment ------------------------------------------------------------------------

# A run of short parts, each of which starts a process in a session of its own.
KILLED = """
import os, sys, time
from pathlib import Path
from gpu import conducting

code = '''
import subprocess, sys, time
from pathlib import Path
from gpu.part import Notes
subprocess.Popen(['sleep', '62'], start_new_session=True)
Notes(Path(sys.argv[1])).add(value=7)
time.sleep(0.2)
'''
with conducting.guarded() as (folder, mark):
    report = conducting.Report(Path(sys.argv[1]), {"scratch": str(folder)})
    command = lambda name, notes, seconds: [sys.executable, "-c", code, str(notes)]
    parts = {f"p{i}": 5 for i in range(200)}
    conducting.run(parts, command, report, mark, time.monotonic() + 1000)
"""


def kill_at_a_random_moment(
    command: list[str], mark: str, number: int, moment: float, group: bool = False
) -> list[Facts]:
    """What the command had printed when it was killed; asserts that no process of it is left.

    group   send the signal to the whole group of processes
    """
    environment = {**ENVIRONMENT, mark: "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        printed = [process.stdout.readline()]  # it has begun
        time.sleep(moment)
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        printed += process.stdout.readlines()
    last = time.monotonic() + 30
    while (left := guard.find_processes(mark)) and time.monotonic() < last:
        time.sleep(0.05)
    assert not left
    return [json.loads(line) for line in printed if line.endswith(b"\n")]


@pytest.mark.parametrize(
    ("seed", "number", "group"),
    [
        (0, signal.SIGKILL, False),
        (1, signal.SIGKILL, False),
        (2, signal.SIGKILL, True),
        (3, signal.SIGTERM, False),
    ],
)
def test_gpu_check_killed_at_a_random_moment_loses_nothing_and_leaves_no_process(
    seed: int, number: int, group: bool, tmp_path: Path
) -> None:
    moment = random.Random(seed).uniform(0, 0.6)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    mark = f"TEST_{conducting.new_mark()}"
    printed = kill_at_a_random_moment(command, mark, number, moment, group)
    facts = conducting.read_json(tmp_path / conducting.RESULT)
    assert facts["parts"], "the file is whole"
    for line in printed:
        name = line.pop("part")
        assert line["value"] == 7
        assert facts["parts"][name] == line
    assert facts["running"] in (None, f"p{len(facts['parts'])}")
    assert conducting.read_json(tmp_path / conducting.RUNNING).get("value", 7) == 7
    assert not Path(facts["scratch"]).exists()


# ---- the tests marked gpu ------------------------------------------------------------------------

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
HANGS = """

@pytest.mark.gpu
def test_that_hangs():
    import time
    time.sleep(60)
"""
BREAKS = """

@pytest.fixture
def broken():
    yield
    raise OSError("when it was over")


@pytest.mark.gpu
def test_whose_fixture_breaks(broken):
    pass
"""

RunTests = Callable[..., Facts]


@pytest.fixture
def run_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunTests:
    """The notes of the part `tests` on a file with a given source."""

    def run(source: str, seconds: float = 60) -> Facts:
        path = tmp_path / "test_of_a_gpu.py"
        path.write_text(source, encoding="utf-8")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "carried.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(elsewhere))
        monkeypatch.setattr(checks, "files_of_gpu_tests", lambda: [str(path)])
        notes = part.Notes(tmp_path / "notes.json")
        checks.tests(Bench(notes, tmp_path, time.monotonic() + seconds, False, False))
        return {"ok": True, **conducting.read_json(notes.path)}

    return run


def test_gpu_check_tests_pass_with_what_pythonpath_carries_and_a_warning_at_import(
    run_tests: RunTests,
) -> None:
    result = run_tests(GPU_TESTS + SKIPS % checks.MAY_SKIP[0])
    assert result["ok"], result
    assert (result["selected"], result["passed"], result["failed"]) == (2, 1, {})
    assert result["skipped"] == {checks.MAY_SKIP[0]: 1}


def test_gpu_check_tests_name_what_failed_with_its_first_lines(run_tests: RunTests) -> None:
    result = run_tests(GPU_TESTS + FAILS + BREAKS)
    assert not result["ok"]
    assert result["passed"] == 2
    assert result["selected"] == result["ended"] == 4
    names = {name.partition("::")[2]: failure for name, failure in result["failed"].items()}
    assert set(names) == {"test_that_fails[2]", "test_whose_fixture_breaks"}
    assert names["test_that_fails[2]"]["error"] == "AssertionError: two is too many"
    assert names["test_whose_fixture_breaks"]["error"] == "OSError: when it was over"
    assert any("def test_that_fails(n):" in line for line in names["test_that_fails[2]"]["lines"])
    assert "test_that_fails[2]: AssertionError" in result["error"]


@pytest.mark.parametrize("everything", [True, False])
def test_gpu_check_tests_are_not_ok_where_one_is_skipped(
    run_tests: RunTests, everything: bool
) -> None:
    result = run_tests(("import pytest\n" if everything else GPU_TESTS) + SKIPS % "no device")
    assert not result["ok"]
    assert "skipped: no device" in result["error"]
    assert ("no test passed" in result["error"]) == everything


@pytest.mark.parametrize("source", ["import pytest\n", "import no_such_module\n"])
def test_gpu_check_tests_are_not_ok_where_nothing_could_run(
    source: str, run_tests: RunTests
) -> None:
    result = run_tests(source)
    assert not result["ok"]
    assert "no test passed" in result["error"]
    assert ("No module named 'no_such_module'" in result["error"]) == ("no_such" in source)


def test_gpu_check_tests_that_take_too_long_keep_those_that_ended(run_tests: RunTests) -> None:
    result = run_tests(GPU_TESTS + HANGS, seconds=11)  # of which six are for the rest
    assert not result["ok"]
    assert (result["passed"], result["ended"]) == (1, 1)
    assert "after 5 seconds 1 tests had not ended" in result["error"]


def test_gpu_check_finds_the_files_with_tests_of_a_gpu() -> None:
    names = [Path(path).name for path in checks.files_of_gpu_tests()]
    assert {"test_backend.py", "test_devices.py", "test_quant.py"} <= set(names)
    assert not {"test_cupy_on_cpu.py", "test_gpu_check.py", "test_layout.py"} & set(names)


def test_read_outcomes_of_a_killed_pytest_has_all_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "outcomes"
    whole = '{"outcome": "selected", "name": "", "count": 9}\n{"outcome": "passed", "name": "a"}\n'
    path.write_text(whole + '{"outcome": "fai')
    found = checks.read_outcomes(path)
    assert (found["selected"], found["ended"], found["passed"]) == (9, 1, 1)


# ---- what is computed from measurements ----------------------------------------------------------


def test_compare_losses_names_the_first_step_beyond_each_bound() -> None:
    found = checks.compare_losses([1.0, 2.0, 4.0], [1.0, 2.0 + 1e-5, 4.0 + 1e-3])
    assert found["largest_relative_difference"] == pytest.approx(2.5e-4)
    assert list(found["first_step_that_differs_by_more_than"].values()) == [1, 2, 2]
    assert checks.compare_losses([1.0], [float("nan")])["largest_relative_difference"] == np.inf


def test_gpu_check_compares_pytorch_s_losses_with_ours_even_where_they_are_nan() -> None:
    parts = {
        "ours:micro": {"losses": [2.0, 4.0]},
        "eager:micro": {"losses": [2.0, 4.4]},
        "compiled:micro": {"losses": ["NaN"]},
        "eager:gpt2": {"losses": [1.0]},
        "compiled:tiny": {"skipped": "not installed"},
    }
    found = gpu_check.compare_with_pytorch(parts)
    assert found == {"eager:micro": pytest.approx(0.1), "compiled:micro": np.inf}


def test_summarize_counts_what_a_profiler_saw() -> None:
    work = [
        ("kernel", 0.0, 5.0),
        ("kernel", 4.0, 6.0),
        ("Memcpy HtoD (Pageable -> Device)", 10.0, 11.0),
        ("Memcpy DtoH (Device -> Pageable)", 20.0, 21.0),
        ("Memset (Device)", 20.5, 20.7),
    ]
    calls = collections.Counter({"cudaStreamSynchronize": 3, "cudaGraphLaunch": 1, "other": 9})
    found = counting.summarize(work, calls)
    kinds = ("operations", "kernels", "copies", "fills", "uploads", "waits", "waits_unread")
    assert [found[kind] for kind in kinds] == [5, 2, 2, 1, 1, 3, 2]
    assert (found["graph_launches"], found["busy_milliseconds"]) == (1, 0.008)
    assert next(iter(found["longest_kernels"])) == "kernel"


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_pytorch_takes_our_steps(tmp_path: Path) -> None:
    from gpu.pytorch import TorchStep

    bench = Bench(part.Notes(tmp_path / "notes.json"), tmp_path, 0, True, True)
    ours = bench.step("micro", device="cpu")
    theirs = TorchStep(bench, "micro", "cpu", False, None)
    for _ in range(5):
        assert conducting.relative_difference(ours(), theirs()) < 1e-5


# ---- the program ---------------------------------------------------------------------------------


def run_script(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results would be written by default."""
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize("options", [[], ["--quick"], ["--count"]])
def test_gpu_check_without_a_gpu_prints_why_and_writes_nothing(
    options: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: "no driver here")
    monkeypatch.setattr(gpu_check, "why_no_emulation", lambda: "no g++")
    assert gpu_check.main(options) == 0
    text = capsys.readouterr().out
    if options == ["--count"]:
        assert text == "nothing counted: no driver here; none can be emulated: no g++\n"
    else:
        assert text == "nothing checked: no driver here\n"
    assert not out.exists()


def test_gpu_check_rehearsal_without_cupy_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_check, "why_no_emulation", lambda: "not installed: cupy")
    assert gpu_check.main(["--rehearse"]) == 0
    assert capsys.readouterr().out == "nothing rehearsed: not installed: cupy\n"


def test_why_no_gpu_is_the_reason_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_check, "ASK", "class DeviceError(Exception): pass\nraise DeviceError('why')"
    )
    assert gpu_check.why_no_gpu() == "why"
    monkeypatch.setattr(gpu_check, "ASK", "import os; os.abort()")
    assert gpu_check.why_no_gpu() == "exit code -6"
    monkeypatch.setattr(gpu_check, "ASK", "import time; time.sleep(60)")
    monkeypatch.setattr(gpu_check, "PATIENCE", 0.5)
    assert "did not answer" in gpu_check.why_no_gpu()


@pytest.mark.parametrize(
    "options", [["--count", "--quick"], ["--quick", "--only", "probe"], ["--only", "nothing"]]
)
def test_gpu_check_refuses_options_that_contradict(options: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(options)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_gpu_check_out_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    (tmp_path / "file").touch()
    assert gpu_check.main(["--quick", "--out", str(tmp_path / "file" / "out")]) == 4
    assert "name a folder that can be written" in capsys.readouterr().out


# Only Python's own library, numpy, and cupy with what it needs may be imported.
BLOCKING = """
from importlib.machinery import PathFinder

BLOCKED = set("pytest _pytest torch transformers peft hypothesis tqdm threadpoolctl".split())
find = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in BLOCKED else find(name, path, target)


PathFinder.find_spec = find_spec
"""


@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started find neither pytest nor torch nor other packages."""
    folder = tmp_path / "blocking"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKING)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated", "blocked")
def test_gpu_check_needs_numpy_and_cupy_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_script(
        "--rehearse", "--only", "ours:micro", "eager:micro", "tests", "--out", str(out)
    )
    parts = conducting.read_json(out / conducting.RESULT)["parts"]
    assert parts["ours:micro"]["ok"], done.stdout
    assert parts["eager:micro"]["skipped"] == "not installed: torch, transformers, peft"
    assert parts["tests"]["error"] == "not installed: pytest, hypothesis"


QUICK_FACTS = {
    "probe": {"executable", "packages", "device", "cuda", "clocks", "libraries"},
    "floors": {"launch:RawKernel", "launch:node of a graph", "copy", "matmul tf32"},
    "tests": {"selected", "passed", "failed", "skipped"},
    "ours:micro": {"first_step_seconds", "kernels_compiled", "milliseconds", "counts", "graph"},
    "ours:tiny": {"device_busy_milliseconds", "pool_reserved_megabytes", "losses"},
    "graph": set(),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_gpu_check_quick_rehearsal_runs_every_part_and_prints_what_it_writes(
    tmp_path: Path,
) -> None:
    done = run_script("--rehearse", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout
    *printed, summary = map(json.loads, done.stdout.splitlines())
    result = conducting.read_json(tmp_path / conducting.RESULT)
    assert [line.pop("part") for line in printed] == list(result["parts"]) == list(plan.QUICK)
    assert printed == list(result["parts"].values())
    assert summary["ok"]
    assert result["finished"]
    for name, facts in QUICK_FACTS.items():
        assert facts <= result["parts"][name].keys(), name
    assert result["parts"]["tests"]["passed"] > 0
    counts = result["parts"]["ours:micro"]["counts"]
    assert (counts["waits"], counts["waits_unread"], counts["uploads"]) == (1, 0, 1)
    assert (tmp_path / conducting.LOG).read_text().count("====") >= len(plan.QUICK)


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_gpu_check_rehearsal_of_the_rest_runs_every_part() -> None:
    results = gpu_check.RESULTS / conducting.RESULT
    before = results.read_bytes() if results.exists() else None
    done = run_script("--rehearse")
    assert done.returncode == 0, done.stdout
    assert (results.read_bytes() if results.exists() else None) == before
    parts = {line.pop("part"): line for line in map(json.loads, done.stdout.splitlines()[:-1])}
    assert list(parts) == list(plan.REST)
    assert parts["parity"]["largest_relative_difference"] < 1e-6
    assert parts["parity"]["two_runs_bitwise_equal"]
    assert parts["speed"]["generate:gpt2:sampled"]["tokens_per_second"] > 0
    for name in ("method:dora", "method:adalora", "method:nf4"):
        assert parts[name]["counts"]["waits_unread"] == 0
    assert parts["variant:tf32"]["environment"] == {"CUPY_TF32": "1"}


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_gpu_check_count_ends_with_the_counts_by_size() -> None:
    done = run_script("--count")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(plan.SIZE_NAMES)
    for counts in found.values():
        assert (counts["waits"], counts["waits_unread"]) == (1, 0)
        assert {"eager", "graph_launches", "graph_copies"} <= counts.keys()
    operations = [counts["eager"] for counts in found.values()]
    assert operations == sorted(operations)
    # The same step with everything computed.
    get_backend("cuda")
    notes = part.Notes(Path(os.devnull))
    step = Bench(notes, Path(), 0, False, True).step("micro", graph=False)
    for _ in range(counting.WARM_UP):
        step()
    with cupy_on_cpu.counted() as device:
        step()
    assert device.operations == operations[0]


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_count_step_tells_waits_for_a_value_that_is_read_from_others() -> None:
    backend = get_backend("cuda")
    a = backend.xp.arange(5)
    bench = Bench(part.Notes(Path(os.devnull)), Path(), 0, True, True)

    def step() -> float:
        a[a > 2] = 0  # waits
        return float(backend.to_numpy(a)[0])

    found = counting.count_step(bench, step)
    assert (found["waits"], found["waits_unread"]) == (2, 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_why_no_gpu_does_not_take_an_emulated_device_for_one() -> None:
    assert "CuPy is emulated" in str(gpu_check.why_no_gpu())


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_without_results_reads_numbers_that_are_finite() -> None:
    backend = get_backend("cuda")
    memory = backend.xp.full(3, np.nan)
    with counting.without_results():
        assert backend.to_numpy(memory).tolist() == [1, 1, 1]
    assert np.isnan(backend.to_numpy(memory)).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("seed", range(2))
def test_gpu_check_rehearsal_killed_at_a_random_moment_loses_nothing(
    seed: int, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), "--rehearse", "--quick", "--out", str(tmp_path)]
    mark = f"TEST_{conducting.new_mark()}"
    moment = random.Random(seed).uniform(0, 4)
    printed = kill_at_a_random_moment(command, mark, signal.SIGKILL, moment)
    facts = conducting.read_json(tmp_path / conducting.RESULT)
    for line in printed:
        name = line.pop("part")
        assert facts["parts"][name] == line
    assert not facts["finished"]
    assert facts["running"] in (None, *plan.QUICK)
