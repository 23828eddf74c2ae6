"""Runs that mpiexec starts: the bits of one process, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.training.checkpoints import find_checkpoint

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]

SUPPORT = Path(__file__).parents[1] / "support"
MPIEXEC = ["mpiexec", "--allow-run-as-root", "--oversubscribe"]
PYTHON = [sys.executable, "-m", "mpi4py"]
PATIENCE = 300  # seconds for a run to end: only one that hangs takes as long
SHAPE = ["--hidden-size=16", "--intermediate-size=24"]
SHAPE += ["--num-hidden-layers=1", "--num-attention-heads=2"]
COMMON = ["--batch-size=6", "--context=16", "--threads=1", "--shard=1", "--warmup=2"]
TRAIN = ["finetune", "--base=base", "--data=book.txt", "--target-modules=all-linear", *COMMON]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a text and a base model."""
    folder = tmp_path_factory.mktemp("mpi")
    text = b"the quick brown fox jumps over the lazy dog, again and again. " * 40
    (folder / "book.txt").write_bytes(text)
    argv = ["pretrain", f"--data={folder / 'book.txt'}", f"--out={folder / 'base'}", "--steps=1"]
    assert main([*argv, *COMMON, *SHAPE]) == 0
    return folder


@pytest.fixture(autouse=True)
def world(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")


def start(*contexts: list[str]) -> subprocess.Popen:
    """mpiexec with these arguments; several lists start different programs together."""
    command = list(MPIEXEC)
    for i, context in enumerate(contexts):
        command += [":"] if i else []
        command += context
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of mpiexec. A run that hangs fails the test."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate()
        pytest.fail(f"the ranks hang: {out} {err}")
    return process.returncode, out, err


def on_ranks(count: int, argv: list[str]) -> tuple[int, str, str]:
    return end(start(["-n", str(count), *PYTHON, "-m", "minilora", *argv]))


def in_trouble(count: int, kind: str, rank: int, argv: list[str]) -> tuple[int, str, str]:
    program = [*PYTHON, str(SUPPORT / "mpi_trouble.py"), kind, str(rank)]
    return end(start(["-n", str(count), *program, *argv]))


def errors(err: str) -> list[str]:
    """The lines that are minilora's, not mpiexec's."""
    return [line for line in err.splitlines() if line.startswith("minilora:")]


def results(out: Path | str) -> tuple[bytes, list[dict]]:
    """The weights of a finished run, and its log without times."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return Path(out, "adapter_model.safetensors").read_bytes(), lines


# ---- bits ----


def test_train_on_ranks_of_mpi_has_the_bits_of_one_process(tmp_path):
    names = ["lora", "dora", "adalora", "multitask", "dropout", "accumulation", "full"]
    program = str(SUPPORT / "mpi_runs.py")
    alone = subprocess.run(
        [sys.executable, program, str(tmp_path / "1"), *names],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    expected = [line for line in alone.stdout.splitlines() if line.startswith("[")]
    assert len(expected) == 2 * len(names)
    by_name = {name: set() for name in names}
    for line in expected:
        name, _, *seen = json.loads(line)
        by_name[name].add(json.dumps(seen))
    assert all(len(seen) == 1 for seen in by_name.values())
    for count in (2, 3, 4):
        folder = str(tmp_path / str(count))
        code, out, err = end(start(["-n", str(count), *PYTHON, program, folder, *names]))
        assert (code, err) == (0, "")
        assert [line for line in out.splitlines() if line.startswith("[")] == expected


def without_times(printed: str) -> list[list[str]]:
    """The words of each line of what a run printed, without how long it took."""
    lines = printed.rpartition(" in ")[0].splitlines()
    return [line.split() for line in lines if not line.startswith("tokens per second")]


def test_finetune_on_ranks_prints_and_writes_what_one_process_does(capsys):
    argv = [*TRAIN, "--steps=4", "--eval-every=2", "--save-every=2"]
    assert main([*argv, "--out=alone"]) == 0
    printed = capsys.readouterr().out.replace("alone", "ranks")
    code, out, err = on_ranks(3, [*argv, "--out=ranks"])
    assert (code, err) == (0, "")
    assert without_times(out) == without_times(printed)
    names = [sorted(p.relative_to(o) for p in Path(o).rglob("*")) for o in ("alone", "ranks")]
    assert names[0] == names[1]
    assert results("ranks") == results("alone")


def test_pretrain_and_evaluate_on_ranks_have_the_bits_of_one_process(capsys):
    argv = ["pretrain", "--data=book.txt", "--steps=2", *COMMON, *SHAPE]
    assert main([*argv, "--out=alone"]) == 0
    assert on_ranks(2, [*argv, "--out=ranks"])[0] == 0
    weights = [Path(out, "model.safetensors").read_bytes() for out in ("alone", "ranks")]
    assert weights[0] == weights[1]
    capsys.readouterr()
    argv = ["evaluate", "--base=alone", "--data=book.txt", "--context=16"]
    assert main(argv) == 0
    assert on_ranks(3, argv) == (0, capsys.readouterr().out, "")


def test_finetune_on_more_ranks_than_shards_says_so_once():
    argv = [*TRAIN[:-1], "--shard=3", "--steps=2"]
    code, _, err = on_ranks(4, [*argv, "--out=ranks"])
    assert code == 0
    [line] = errors(err)
    assert line.startswith("minilora: warning: 2 of 4 ranks have no part in the steps")
    assert main([*argv, "--out=alone"]) == 0
    assert results("ranks") == results("alone")


# ---- ends ----


@pytest.mark.parametrize("count", [2, 4])
def test_finetune_whose_rank_is_killed_resumes_on_other_ranks(count):
    argv = [*TRAIN, "--steps=6", "--save-every=2"]
    code, _, _ = in_trouble(3, "kill", 1, [*argv, "--out=killed"])
    assert code != 0
    assert find_checkpoint("auto", Path("killed"))[1]["step"] == 2
    code, _, err = on_ranks(count, [*argv, "--out=killed", "--resume=auto"])
    assert (code, err) == (0, "")
    assert main([*argv, "--out=straight"]) == 0
    assert results("killed") == results("straight")


ENDS = [
    ("error", 0, 3, "minilora: error: a bad batch"),
    ("error", 2, 3, "minilora: error: rank 2: a bad batch"),
    ("raise", 1, 1, "minilora: error: rank 1: ZeroDivisionError: a mistake"),
    ("exit", 1, 3, None),
    ("_exit", 1, 3, None),
]


@pytest.mark.parametrize(("kind", "rank", "code", "message"), ENDS)
def test_finetune_whose_rank_fails_ends_on_all_ranks(kind, rank, code, message):
    got, _, err = in_trouble(3, kind, rank, [*TRAIN, "--steps=6", "--out=run"])
    assert got == code
    assert errors(err) == ([message] if message else [])
    assert not Path("run", ".lock").exists() or message is None  # after an abort it remains


def processes(count: int) -> list[int]:
    """The processes of the ranks, once all have come to their step."""
    begun = time.monotonic()
    files = [Path(f"process-{rank}") for rank in range(count)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("receiver", ["mpiexec", 0, 2])
def test_finetune_on_ranks_saves_on_a_signal_and_resumes(receiver):
    argv = [*TRAIN, "--steps=60", "--floor=1"]
    program = [*PYTHON, str(SUPPORT / "mpi_trouble.py"), "wait", "0"]
    process = start(["-n", "3", *program, *argv, "--out=run"])
    ranks = processes(3)
    number = signal.SIGUSR1 if receiver == "mpiexec" else signal.SIGTERM
    os.kill(process.pid if receiver == "mpiexec" else ranks[receiver], number)
    Path("go").touch()
    code, _, err = end(process)
    assert code == 128 + number
    done = find_checkpoint("auto", Path("run"))[1]["step"]
    message = f"minilora: interrupted: {number.name}: stopped after {done} steps, saved in "
    assert errors(err) == [f"{message}'run/checkpoints/step-{done}'"]
    steps = ["--steps", str(done + 2)]
    assert on_ranks(2, [*argv, *steps, "--out=run", "--resume=auto"])[0] == 0
    assert main([*argv, *steps, "--out=straight"]) == 0
    assert results("run") == results("straight")


def test_finetune_twice_into_one_folder_runs_once():
    argv = [*TRAIN, "--steps=6", "--out=run"]
    program = [*PYTHON, str(SUPPORT / "mpi_trouble.py"), "wait", "0"]
    first = start(["-n", "2", *program, *argv])
    processes(2)
    code, _, err = on_ranks(2, argv)
    Path("go").touch()
    assert end(first)[0] == 0
    assert len(results("run")[1]) == 6
    assert code == 6
    [line] = errors(err)
    assert line.startswith("minilora: error: 'run' is in use: process ")


# ---- bad input ----


def program(argv: list[str], *place: str) -> list[str]:
    return ["-n", "1", *place, *PYTHON, "-m", "minilora", *argv]


def test_finetune_refuses_ranks_with_other_options():
    argv = [*TRAIN, "--out=run"]
    code, _, err = end(start(program([*argv, "--lr=0.1"]), program([*argv, "--lr=0.2"])))
    assert code == 2
    [line] = errors(err)
    assert "--lr is '0.1' on rank 0 and '0.2' on rank 1: start all ranks" in line
    evaluation = ["evaluate", "--base=base", "--data=book.txt"]
    code, _, err = end(start(program(argv), program(evaluation)))
    assert code == 2
    assert "the command is 'finetune' on rank 0 and 'evaluate' on rank 1" in errors(err)[0]
    assert not Path("run").exists()


@pytest.mark.parametrize("file", ["book.txt", "base", "run"])
def test_finetune_refuses_ranks_with_other_files(file):
    """Each rank has a working folder of its own, and one file in it is another."""
    for name in ("one", "two"):
        Path(name).mkdir()
        os.symlink(Path("book.txt").absolute(), Path(name, "book.txt"))
        os.symlink(Path("base").absolute(), Path(name, "base"))
        os.symlink(Path("shared").absolute(), Path(name, "run"))
    Path("shared").mkdir()
    Path("two", file).unlink()
    if file == "book.txt":
        Path("two", file).write_text("another text. " * 200)
    elif file == "base":
        argv = ["pretrain", "--data=book.txt", "--out=two/base", "--steps=2", *COMMON, *SHAPE]
        assert main(argv) == 0
    argv = [*TRAIN, "--steps=2", "--out=run"]
    contexts = [program(argv, "--wdir", str(Path(name).absolute())) for name in ("one", "two")]
    code, _, err = end(start(*contexts))
    assert code == 2
    [line] = errors(err)
    messages = {"book.txt": "text is ", "base": "frozen weights is "}
    messages["run"] = "rank 1: --out 'run' is not the folder that rank 0 writes to"
    assert messages[file] in line
    assert not list(Path("shared").iterdir())
    code, _, err = on_ranks(2, [*argv[:-1], "--out=absent/run", "--data=absent.txt"])
    assert code == 4
    assert errors(err) == ["minilora: error: No such file or directory: 'absent.txt'"]


def test_evaluate_refuses_ranks_with_other_files():
    Path("two").mkdir()
    Path("two", "book.txt").write_text("another text. " * 200)
    argv = ["evaluate", f"--base={Path('base').absolute()}", "--data=book.txt"]
    code, _, err = end(start(program(argv), program(argv, "--wdir", str(Path("two").absolute()))))
    assert code == 2
    assert "the content of --data is " in errors(err)[0]


def test_finetune_refuses_ranks_of_another_version():
    code, _, err = in_trouble(2, "version", 1, [*TRAIN, "--out=run"])
    assert code == 2
    assert "on rank 0 and '0.0.1' on rank 1: start all ranks with" in errors(err)[0]


def test_finetune_ends_where_ranks_come_to_different_weights():
    argv = [*TRAIN, "--steps=6", "--save-every=2", "--out=run"]
    code, _, err = in_trouble(2, "weights", 1, argv)
    assert code == 2
    [line] = errors(err)
    assert "after 2 steps is " in line
    assert "the ranks round differently; use machines with the same processor" in line


@pytest.mark.parametrize("argv", [["merge", "--base=base"], ["demo"], ["finetune"]])
def test_main_on_ranks_reports_a_mistake_once(argv):
    code, _, err = on_ranks(2, argv)
    assert code == 2
    assert len(errors(err)) == 1
