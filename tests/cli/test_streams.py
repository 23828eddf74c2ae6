"""Commands whose output is closed, full or gone, in surroundings where something is missing.

Each row of the tables is a real process. What a command writes into files must be there whatever
becomes of its output; a command whose output is what it is for says what is wrong, and how.
"""

from __future__ import annotations

import configparser
import errno
import io
import os
import signal
import subprocess
import sys
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import minilora
from minilora.cli import COMMANDS, main
from minilora.cli.streams import Stream
from minilora.formats import load_file

pytest.importorskip("fcntl", reason="needs a shell and descriptors as POSIX has them")

ROOT = Path(minilora.__file__).parents[1]
FULL = Path("/dev/full")
TRAIN = "--data book.txt --steps 2 --batch-size 2 --context 16 --threads 1"
SHAPE = "--hidden-size 8 --intermediate-size 8 --num-hidden-layers 1 --num-attention-heads 2"
FINETUNE = f"finetune --base base {TRAIN} --out new"
ADALORA = f"finetune --base base {TRAIN} --method adalora --steps 12 --out new"
MERGE = "merge --base base --adapter adapter --out new"
INSPECT = "inspect base"
GENERATE = "generate --base base --prompt x --max-new-tokens 3"
GONE = "| :"
NO_SPACE = "No space left on device"
GOES_ON = f"minilora: warning: {NO_SPACE}: the rest of the output is lost, the command goes on\n"
IS_FULL = f"minilora: error: {NO_SPACE}: 'standard output'\n"
IS_CLOSED = "minilora: error: standard output is closed: give the command a file, a pipe or a"

# condition -> how a shell redirects, or that the output is a pipe whose reader has ended
CONDITIONS = {
    "reader gone": GONE,
    "both readers gone": f"{GONE} 2>&1",
    "closed": ">&-",
    "errors closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "full": ">/dev/full",
    "errors full": "2>/dev/full",
}

# command, condition, exit code, what stderr begins with
ROWS = [
    *((FINETUNE, name, 0, GOES_ON if name == "full" else "") for name in CONDITIONS),
    (MERGE, "reader gone", 0, ""),
    (f"{MERGE} --json", "closed", 0, ""),
    (MERGE, "full", 0, GOES_ON),
    (INSPECT, "reader gone", 0, ""),
    (INSPECT, "closed", 4, IS_CLOSED),
    (INSPECT, "all closed", 4, ""),
    (INSPECT, "full", 4, IS_FULL),
    (GENERATE, "reader gone", 0, ""),
    (GENERATE, "full", 4, IS_FULL),
    ("--help", "reader gone", 0, ""),
    ("finetune --help", "full", 4, IS_FULL),
    ("inspect nowhere", "errors full", 4, ""),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, a tiny base and an adapter."""
    folder = tmp_path_factory.mktemp("streams")
    with chdir(folder), redirect_stdout(io.StringIO()):
        Path("book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
        assert main(f"pretrain {TRAIN} {SHAPE} --out base".split()) == 0
        assert main(FINETUNE.replace("new", "adapter").split()) == 0
        assert main(MERGE.replace("new", "merged").split()) == 0
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A folder of the test's own, from which the base, the adapter and the text can be reached."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, redirect: str = "", before: str = "", **environment: str):
    """(exit code, stdout, stderr) of a command that a shell starts."""
    reader, gone = os.pipe()
    os.close(reader)
    stdout = gone if GONE in redirect else subprocess.PIPE
    script = f'{before} exec "$@" {redirect.replace(GONE, "")}'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "minilora", *line.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    environment.pop("PYTHONUNBUFFERED", None)  # what is in a buffer at the end must not fail either
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment)
    os.close(gone)
    err = done.stderr.decode()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return done.returncode, (done.stdout or b"").decode(), err


def assert_written(line: str, out: str = "new") -> None:
    """The command's files are those of the same command in peace."""
    expected, name = ("adapter", "adapter_model.safetensors")
    if line.startswith("merge"):
        expected, name = ("merged", "model.safetensors")
    arrays = load_file(f"{out}/{name}")
    peaceful = load_file(f"{expected}/{name}")
    assert arrays.keys() == peaceful.keys()
    for key, array in peaceful.items():
        assert arrays[key].tobytes() == array.tobytes()


@pytest.mark.parametrize(("line", "condition", "code", "error"), ROWS)
def test_main_whose_output_cannot_be_written(line, condition, code, error, world):
    redirect = CONDITIONS[condition]
    if "full" in redirect and not FULL.exists():
        pytest.skip("needs /dev/full")
    got, _, err = run(line, redirect)
    assert (got, err[: len(error)]) == (code, error)
    assert err.count("\n") == (1 if error else 0)
    if line in (FINETUNE, MERGE):
        assert_written(line)


SURROUNDINGS = {
    "MPLBACKEND": (ADALORA, "", {"MPLBACKEND": "nonsense"}, 0, ""),
    "matplotlib's settings": (ADALORA, "", {"MATPLOTLIBRC": "broken"}, 0, "(no pictures: "),
    "no home": (ADALORA, "unset HOME;", {"TMPDIR": "/nowhere", "COLUMNS": "0"}, 0, ""),
    "ASCII": (FINETUNE.replace("new", "ünï"), "", {"PYTHONIOENCODING": "ascii"}, 0, r"\xfcn\xef"),
    "no folder": (MERGE, "mkdir gone; cd gone; rmdir ../gone;", {}, 4, "change to another one"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_main_in_broken_surroundings(name, world):
    line, before, environment, code, said = SURROUNDINGS[name]
    if line == ADALORA:
        pytest.importorskip("matplotlib")
    Path("broken").write_bytes(b"\xff\xfe")
    got, out, err = run(line, "", before, **environment)
    assert got == code, err
    assert said in out + err
    is_drawn = Path("new/rank_allocation.png").exists()
    assert is_drawn == (name in ("MPLBACKEND", "no home"))


# ---- Ctrl-C while Python still imports -----------------------------------------------------------

STARTS = {
    "module": ["-m", "minilora"],
    "script": ["-c", "import sys; from minilora.__main__ import main; sys.exit(main())"],
}


@pytest.mark.parametrize("how", STARTS)
def test_main_interrupted_during_its_imports_exits_with_130(how, tmp_path):
    """NumPy is the first large import: this one only sends the signal, and waits for its effect."""
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "numpy.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *STARTS[how], "devices"],
        capture_output=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stderr) == (130, b"\nminilora: interrupted\n")


def test_the_command_minilora_starts_where_the_module_does():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    scripts = settings["options.entry_points"]["console_scripts"]
    assert scripts.strip() == "minilora = minilora.__main__:main"


# ---- the stream ----------------------------------------------------------------------------------


class Failing(io.StringIO):
    """A stream that takes `room` characters and then raises."""

    def __init__(self, room: int, error: int):
        super().__init__()
        self.room = room
        self.error = error

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.room:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_stream_that_is_not_needed_writes_until_it_fails_and_then_nowhere(number):
    plain = Failing(5, number)
    stream = Stream(plain, needed=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for text in ("hello", "a long line", "x"):
            print(text, end="", file=stream, flush=True)
    assert plain.getvalue() == "hello"
    assert stream.error.errno == number
    assert not stream.isatty()
    assert len(seen) == (0 if number == errno.EPIPE else 1)  # once; a reader may go as it likes


def test_stream_that_is_needed_raises_its_failure_at_every_use():
    stream = Stream(Failing(5, errno.ENOSPC), needed=True)
    print("hello", end="", file=stream)
    for _ in range(2):
        with pytest.raises(OSError, match=NO_SPACE) as caught:
            print("a long line", file=stream)
        assert caught.value is stream.error
    with pytest.raises(OSError, match=NO_SPACE):
        stream.flush()


def test_stream_that_was_closed_from_the_beginning():
    stream = Stream(None, needed=False)
    print("hello", file=stream, flush=True)
    assert not stream.isatty()
    stream.needed = True
    with pytest.raises(OSError, match="standard output is closed"):
        stream.require()


def test_open_descriptors_leaves_no_number_to_the_next_file(tmp_path):
    """Without it, `new` would be descriptor 0, and what C code prints would go into it."""
    program = "from minilora.cli.streams import open_descriptors\nopen_descriptors()\n"
    program += "import sys\nsys.exit(open('new', 'w').fileno())"
    script = 'exec "$@" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", script, "sh", sys.executable, "-c", program]
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode > 2


def test_main_restores_the_streams_of_its_caller(world):
    out, err = Failing(40, errno.EPIPE), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(INSPECT.split()) == 0
        assert sys.stdout is out
        assert sys.stderr is err
    assert 0 < len(out.getvalue()) <= 40


def test_a_broken_pipe_of_something_else_is_not_the_end_of_the_output(world, monkeypatch):
    """A helper process that died is a failure, not a reader that has enough."""

    def fail(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("minilora.tools.inspecting.inspect_checkpoint", fail)
    err = io.StringIO()
    with redirect_stderr(err):
        assert main(INSPECT.split()) == 4
    assert err.getvalue() == "minilora: error: Broken pipe\n"


def test_commands_that_print_their_product_write_no_folder():
    with redirect_stdout(io.StringIO()) as out:
        for command in COMMANDS:
            with pytest.raises(SystemExit):
                main([command.run.__name__, "--help"])
            assert not (command.prints and "--out DIR" in out.getvalue())
            out.truncate(0)
