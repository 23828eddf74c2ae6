"""Whole commands in trouble: signals, full and read-only disks, lost folders, locked folders."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faults import read_tree

import minilora.training.run
from minilora import CausalLM, PeftModel
from minilora.cli import main
from minilora.formats import load_file
from minilora.formats.folders import LOCK, locked
from minilora.tools import merging
from minilora.training.checkpoints import find_checkpoint

pytest.importorskip("fcntl", reason="needs processes and signals as POSIX has them")

TINY = ["--batch-size=2", "--context=16", "--threads=1"]
TINY += ["--hidden-size=16", "--intermediate-size=24"]
TINY += ["--num-hidden-layers=1", "--num-attention-heads=2"]
PRETRAIN = ["pretrain", "--data=book.txt", "--eval-data=short.txt", *TINY]
FINETUNE = ["finetune", "--base=base", "--data=book.txt", "--batch-size=2", "--context=16"]
# In the background SIGINT is inherited as ignored. From "ready" on `main` handles every signal.
CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from minilora import cli
from minilora.training import loop
{before}
build_parser = cli.build_parser
cli.build_parser = lambda argv: print("ready", flush=True) or build_parser(argv)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(
        b"the quick brown fox jumps over the lazy dog, again and again. " * 40
    )
    Path("short.txt").write_bytes(b"the lazy fox jumps over the quick dog")


def run(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("default")
        code = main(argv)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return code, out.getvalue(), err.getvalue()


def start(argv: list[str], before: str = "") -> subprocess.Popen:
    """A command in a separate process, which has begun `main`."""
    command = [sys.executable, "-c", CHILD.format(before=before), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def end(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, stderr)"""
    _, err = process.communicate(timeout=120)
    assert b"Traceback" not in err
    return process.returncode, err.decode()


def sound(out: str | Path) -> int:
    """The step of the newest checkpoint, which must be sound; 0 without a checkpoint."""
    if not any(Path(out).glob("checkpoints/step-*")):
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, manifest = find_checkpoint("auto", Path(out))
    return manifest["step"]


def left_behind(out: str | Path) -> list[str]:
    return [p.name for p in Path(out).rglob("*") if ".tmp-" in p.name or p.name in (".lock",)]


# ---- one folder, one run ----


def test_commands_that_write_are_refused_in_a_locked_folder_and_readers_are_not():
    assert run([*PRETRAIN, "--steps=2", "--out=base"])[0] == 0
    finetune = [*FINETUNE, "--steps=2"]
    assert run([*finetune, "--out=adapter"])[0] == 0
    writers = [
        [*PRETRAIN, "--out=taken"],
        [*PRETRAIN, "--out=taken", "--resume"],
        [*finetune, "--out=taken"],
        ["merge", "--base=base", "--adapter=adapter", "--out=taken"],
        ["demo", "--quick", "--out=taken"],
    ]
    readers = [
        ["evaluate", "--base=base", "--adapter=adapter", "--data=short.txt"],
        ["generate", "--base=base", "--prompt=x", "--max-new-tokens=2"],
        ["inspect", "adapter"],
    ]
    refusal = f"'taken' is in use: process {os.getpid()} is writing there; choose another folder"
    with ThreadPoolExecutor(1) as other, contextlib.ExitStack() as locks:
        for name in ("taken", "base", "adapter"):
            locks.enter_context(locked(name))
        before = read_tree(Path("taken"))
        for argv in writers:
            code, out, err = other.submit(run, argv).result()
            assert code == 6
            assert err == f"minilora: error: {refusal}\n"
            assert "held out" not in out
            assert read_tree(Path("taken")) == before
        for argv in readers:
            assert other.submit(run, argv).result()[0] == 0
    assert run(writers[3])[0] == 0


def test_commands_lock_their_folder_until_all_is_written(monkeypatch):
    locked_while_writing = []
    for kind in (CausalLM, PeftModel):
        plain = kind.save_pretrained

        def save(self, folder, *rest, plain=plain, **more):
            locked_while_writing.append((Path(folder).name, (Path(folder) / LOCK).exists()))
            return plain(self, folder, *rest, **more)

        monkeypatch.setattr(kind, "save_pretrained", save)
    plain_rewrite = merging.rewrite

    def rewrite(*rest):
        locked_while_writing.append(("merged", Path("merged", LOCK).exists()))
        return plain_rewrite(*rest)

    monkeypatch.setattr(merging, "rewrite", rewrite)
    assert run([*PRETRAIN, "--steps=1", "--out=base"])[0] == 0
    assert run([*FINETUNE, "--steps=1", "--out=adapter"])[0] == 0
    assert run(["merge", "--base=base", "--adapter=adapter", "--out=merged"])[0] == 0
    assert locked_while_writing == [("base", True), ("adapter", True), ("merged", True)]


def test_commands_that_start_together_leave_one_winner():
    started = [start([*PRETRAIN, "--steps=30", "--out=run"]) for _ in range(4)]
    codes = sorted(end(process)[0] for process in started)
    assert codes[0] == 0
    assert set(codes[1:]) <= {2, 6}
    log = Path("run", "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(30))
    assert not left_behind("run")


# ---- the disk ----


def straight(*options: str) -> dict[str, np.ndarray]:
    assert run([*PRETRAIN, *options, "--out=straight"])[0] == 0
    return load_file("straight/model.safetensors")


def same(out: str, expected: dict[str, np.ndarray]) -> None:
    arrays = load_file(Path(out) / "model.safetensors")
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("limit", [16_000, 40_000, 100], ids=["weights", "optimiser", "everything"])
def test_pretrain_under_a_file_size_limit_keeps_the_last_checkpoint(limit):
    expected = straight("--steps=6", "--save-every=2")
    shutil.copytree("straight", "run")
    shutil.rmtree("run/checkpoints/step-6")
    Path("run/model.safetensors").unlink()
    argv = [*PRETRAIN, "--steps=6", "--save-every=2", "--out=run", "--resume"]
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    code, err = end(start(argv, before))
    assert code == 4
    assert err.startswith("minilora: error: File too large")
    assert err.count("\n") == 1
    assert sound("run") == 4
    assert not left_behind("run")
    assert run(argv)[0] == 0
    same("run", expected)


MOUNTED = """
import json, os, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", sys.argv[1], "tmpfs", "disk"], check=True)
from pathlib import Path
from minilora.cli import main
from minilora.training.checkpoints import find_checkpoint
code = main(sys.argv[2:])
step = 0
if any(Path("disk/run").glob("checkpoints/step-*")):
    step = find_checkpoint("auto", Path("disk/run"))[1]["step"]
left = [p.name for p in Path("disk").rglob("*") if ".tmp-" in p.name or p.name == ".lock"]
print(json.dumps([code, step, left]))
"""


def on_a_disk_of(options: str, argv: list[str]) -> tuple[int, int, list[str], str, str]:
    """(exit code, step of the newest checkpoint, what was left, stdout, stderr) of a command.

    It runs on a separate disk, mounted with `options`.
    """
    Path("disk").mkdir()
    try:
        probe = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "disk"], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if probe.returncode:
        pytest.skip("nothing may be mounted here")
    command = ["unshare", "-rm", sys.executable, "-W", "error", "-c", MOUNTED, options, *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    *out, last = done.stdout.splitlines()
    return (*json.loads(last), "\n".join(out), done.stderr)


def test_pretrain_on_a_disk_that_fills_up_keeps_the_last_checkpoint():
    argv = [*PRETRAIN, "--steps=6", "--save-every=1", "--out=disk/run"]
    code, step, left, out, err = on_a_disk_of("size=250k", argv)
    assert (code, left) == (4, [])
    assert err.startswith("minilora: error: No space left on device")
    assert "held out" in out
    assert step == 2


def test_pretrain_on_a_disk_that_is_too_small_stops_before_training():
    argv = [*PRETRAIN, "--steps=6", "--save-every=1", "--out=disk/run"]
    code, step, left, out, err = on_a_disk_of("size=60k", argv)
    assert (code, step, left) == (4, 0, [])
    assert "saving takes" in err
    assert "held out" not in out


def test_pretrain_on_a_read_only_disk_stops_before_training():
    for out in ("disk/run", "disk"):
        code, step, left, printed, err = on_a_disk_of("ro", [*PRETRAIN, f"--out={out}"])
        assert (code, step, left) == (4, 0, [])
        assert "Read-only file system" in err
        assert "held out" not in printed
        Path("disk").rmdir()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_commands_whose_output_cannot_be_written_exit_with_4():
    assert run([*PRETRAIN, "--steps=1", "--out=base"])[0] == 0
    command = [sys.executable, "-m", "minilora"]
    for argv in (["inspect", "base"], ["generate", "--base=base", "--prompt=x"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([*command, *argv], stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (
            4,
            "minilora: error: No space left on device: 'standard output'\n",
        )
    with open("/dev/full", "wb") as full:
        assert subprocess.run([*command, "inspect", "missing"], stderr=full).returncode == 4


def test_pretrain_in_a_folder_that_vanishes_leaves_no_fragments(monkeypatch):
    plain = minilora.training.run.Windows.batch

    def batch(self, step):
        if step == 3:
            shutil.rmtree("run")
        return plain(self, step)

    monkeypatch.setattr(minilora.training.run.Windows, "batch", batch)
    for options in ([], ["--save-every=2"]):
        code, _, _ = run([*PRETRAIN, "--steps=6", "--out=run", *options])
        assert code in (0, 4)
        assert not left_behind("run")
        assert sound("run") == (6 if options else 0)
        shutil.rmtree("run")


@pytest.mark.parametrize(
    "name", ["with spaces", "line\nbreak", b"\xff\xfe".decode("utf-8", "surrogateescape"), "-x"]
)
def test_pretrain_accepts_any_name_of_a_folder(name):
    expected = straight("--steps=4")
    out = f"./{name}"
    assert run([*PRETRAIN, "--steps=4", "--save-every=2", f"--out={out}"])[0] == 0
    same(out, expected)
    (Path(out) / "model.safetensors").unlink()
    assert run([*PRETRAIN, "--steps=4", f"--out={out}", "--resume"])[0] == 0
    same(out, expected)
    finetune = [*FINETUNE, f"--base={out}", "--steps=1"]
    assert run([*finetune, f"--out={out}/adapter"])[0] == 0
    assert run(["merge", f"--base={out}", f"--adapter={out}/adapter", "--out=merged"])[0] == 0


def test_pretrain_refuses_a_text_that_is_larger_than_memory():
    with open("huge.txt", "wb") as file:
        file.truncate(4 << 30)  # takes no space
    before = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1500 << 20, 1500 << 20))"
    argv = ["pretrain", "--data=huge.txt", "--out=run", *TINY]
    code, err = end(start(argv, before))
    assert code == 3
    assert err.startswith(
        "minilora: error: 'huge.txt' has 4,294,967,296 bytes, more than the memory takes"
    )
    assert not Path("run").exists()


# ---- signals ----

KINDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), KINDS)
def test_pretrain_stopped_at_a_random_moment_can_be_resumed(number, code):
    """The exit code is right, without a traceback, and a resumed run ends with the same weights."""
    options = ["--steps=150", "--eval-every=20", "--save-every=15"]
    begun = time.perf_counter()
    expected = straight(*options)
    length = time.perf_counter() - begun
    rng = np.random.default_rng(int(number))
    steps = []
    for attempt in range(5):
        process = start([*PRETRAIN, *options, f"--out=run-{attempt}"])
        time.sleep(length * rng.uniform(0, 0.8))
        process.send_signal(number)
        got, err = end(process)
        # It may just have ended: with its last file written, Python itself may meet the signal.
        has_ended = Path(f"run-{attempt}", "tokenizer.json").exists()
        assert got in (code, 0) or (has_ended and got == -number)
        assert not Path(f"run-{attempt}").exists() or not left_behind(f"run-{attempt}")
        steps.append(sound(f"run-{attempt}"))
        if steps[-1]:
            over = got == 0 or steps[-1] == 150
            assert over or f"stopped after {steps[-1]} steps" in err
            assert run([*PRETRAIN, *options, f"--out=run-{attempt}", "--resume"])[0] == 0
            same(f"run-{attempt}", expected)
    assert any(steps)


@pytest.mark.parametrize(("number", "code"), KINDS[:2])
def test_pretrain_on_a_second_signal_stops_at_once_with_the_last_checkpoint(number, code):
    slow = """
plain = loop.Run.step
def step(self, sharded):
    if self.done == 3:
        import os, time
        os.kill(os.getpid(), {0})
        time.sleep(0.1)
        os.kill(os.getpid(), {0})
        time.sleep(60)
    return plain(self, sharded)
loop.Run.step = step
"""
    begun = time.perf_counter()
    argv = [*PRETRAIN, "--steps=6", "--save-every=2", "--out=run"]
    got, err = end(start(argv, slow.format(int(number))))
    assert time.perf_counter() - begun < 50
    assert got == code
    assert err.splitlines()[-1] == "minilora: interrupted"
    assert sound("run") == 2
    assert not left_behind("run")
    assert run([*argv, "--resume"])[0] == 0
    same("run", straight("--steps=6", "--save-every=2"))


@pytest.mark.parametrize(("number", "code"), KINDS)
def test_commands_other_than_training_stop_at_once_on_a_signal(number, code):
    assert run([*PRETRAIN, "--steps=1", "--out=base"])[0] == 0
    assert run([*FINETUNE, "--steps=1", "--out=adapter"])[0] == 0
    Path("long.txt").write_bytes(Path("book.txt").read_bytes() * 2000)  # some minutes
    waits = "import time; from minilora.tools import merging; merging.rewrite = lambda *_: {}"
    evaluate = ["evaluate", "--base=base", "--data=long.txt"]
    generate = ["generate", "--base=base", "--prompt=x", "--max-new-tokens=10000000"]
    merge = ["merge", "--base=base", "--adapter=adapter", "--out=merged"]
    waiting = waits.format("time.sleep(60)")
    for argv, before in ((evaluate, ""), (generate, ""), (merge, waiting)):
        process = start(argv, before)
        time.sleep(0.3)
        process.send_signal(number)
        begun = time.perf_counter()
        assert end(process) == (code, "\nminilora: interrupted\n")
        assert time.perf_counter() - begun < 30
    assert not Path("merged").exists()


def test_pretrain_under_nohup_ignores_that_the_terminal_is_closed():
    before = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
plain = loop.Run.step
def step(self, sharded):
    signal.raise_signal(signal.SIGHUP)
    return plain(self, sharded)
loop.Run.step = step
"""
    assert end(start([*PRETRAIN, "--steps=3", "--out=run"], before)) == (0, "")
    assert Path("run", "model.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_pretrain_saves_although_the_same_signal_comes_twice(number):
    """The system and the shell send SIGHUP; a batch system and mpiexec may send SIGUSR1."""
    twice = f"""
plain = loop.Run.step
def step(self, sharded):
    if self.done == 1:
        signal.raise_signal({int(number)})
        signal.raise_signal({int(number)})
    return plain(self, sharded)
loop.Run.step = step
"""
    code, err = end(start([*PRETRAIN, "--steps=6", "--out=run"], twice))
    assert code == 128 + number
    assert f"{number.name}: stopped after 2 steps, saved in " in err
    assert sound("run") == 2


def test_merge_whose_terminal_is_closed_cleans_up_although_two_signals_come():
    assert run([*PRETRAIN, "--steps=1", "--out=base"])[0] == 0
    assert run([*FINETUNE, "--steps=1", "--out=adapter"])[0] == 0
    twice = """
from minilora.formats import folders
from minilora.tools import merging
merging.rewrite = lambda *_: signal.raise_signal(signal.SIGHUP)
plain = folders.remove_folder
def remove_folder(*arguments):
    signal.raise_signal(signal.SIGHUP)
    plain(*arguments)
folders.remove_folder = remove_folder
"""
    argv = ["merge", "--base=base", "--adapter=adapter", "--out=merged"]
    assert end(start(argv, twice)) == (129, "\nminilora: interrupted\n")
    assert not Path("merged").exists()
    assert not Path(".merged.unfinished").exists()


def test_commands_leave_the_signal_handlers_of_the_caller():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    assert run([*PRETRAIN, "--steps=1", "--out=run"])[0] == 0
    assert [signal.getsignal(number) for number in numbers] == before
    calls = []
    plain = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        assert run(["inspect", "run"])[0] == 0
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, plain)
    assert calls == [1]


# ---- divergence ----


def test_pretrain_with_abort_on_divergence_exits_with_5():
    argv = [*PRETRAIN, "--steps=40", "--save-every=2"]
    argv += ["--lr=30", "--warmup=0", "--max-grad-norm=1e9"]
    code, _, err = run([*argv, "--abort-on-divergence", "--out=run"])
    assert code == 5
    assert "the loss diverged but is still finite: the loss (" in err
    assert (
        "the latest checkpoint is 'run/checkpoints/step-" in err or "no checkpoint was saved" in err
    )
    code, _, err = run([*argv, "--out=on"])
    assert code == 0
    assert err.count("--abort-on-divergence would stop here") == 1
