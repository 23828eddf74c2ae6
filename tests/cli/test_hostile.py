"""Every row of the table of bad inputs (support/hostile.py) ends as it must and leaves no trace."""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tqdm
from hostile import KINDS, ROWS, SHAPE, TEXT, TINY, Row, World, make_victim, make_world

import minilora
import minilora.training.loop
from minilora.cli import main
from minilora.formats import load_file

for module in ("hostile_files", "hostile_bases", "hostile_commands", "hostile_tools"):
    importlib.import_module(module)  # fills ROWS

# A row may import nothing, so what a command imports when it runs is imported now.
for module in ("combining", "comparing", "converting", "factoring", "inspecting", "merging"):
    importlib.import_module(f"minilora.tools.{module}")
for module in ("minilora.lab.demo", "minilora.models.generation"):
    importlib.import_module(module)
tqdm.tqdm.get_lock()  # imports multiprocessing
importlib.import_module("pydoc_data.topics")  # a text

PACKAGE = Path(minilora.__file__).parent
FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "pickle",
    "marshal.loads",
    "socket",
    "urllib",
    "subprocess",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
)
SANDBOX = [sys.executable, "-IS", str(PACKAGE / "data" / "sandboxed.py")]
ELSEWHERE = {  # kinds whose tests are elsewhere
    55: "test_pretrain_ignores_changes_of_its_text_while_it_trains",
    60: "test_safetensors.test_load_file_refuses_a_changed_byte_or_changes_one_value",
}

events: list[str] | None = None  # what Python reports while a row runs; None: not recorded


def hear(event: str, arguments: tuple[object, ...]) -> None:
    if events is None:
        return
    # A tokenizer.json runs in a process with limits: see test_sandbox.
    is_allowed = event == "subprocess.Popen" and arguments[1] == SANDBOX  # type: ignore[comparison-overlap]
    if event.startswith(FORBIDDEN) and not is_allowed:
        events.append(f"{event} {arguments!r:.100}")
    if event == "open" and "secret" in str(arguments[0]):
        events.append(f"open {arguments[0]}")


sys.addaudithook(hear)  # a hook cannot be removed, so it asks whether `events` records


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gc.collect()  # ends the processes of tokenizers that other tests have left
    folder = tmp_path_factory.mktemp("sound")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def victim() -> tuple:
    return make_victim()


@pytest.fixture(scope="module")
def seconds(request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """Seconds of each row; the slowest are printed at the end."""
    found: dict[str, float] = {}
    yield found
    slowest = sorted(found, key=found.__getitem__, reverse=True)[:3]
    shown = "".join(f"{found[name]:.2f} s {name}; " for name in slowest)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{len(found)} hostile inputs in {sum(found.values()):.1f} s, the slowest {shown}")


def snapshot(folder: Path) -> dict[str, object]:
    """Every file with its bytes and its time, every link with its target, every folder and pipe."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            large = state.st_size > 2**26  # sparse: length and time are enough
            found[str(path)] = (state.st_size if large else path.read_bytes(), state.st_mtime_ns)
        else:
            found[str(path)] = state.st_mode
    return found


def descriptors() -> list[str]:
    folder = Path("/proc/self/fd")
    names = os.listdir(folder) if folder.exists() else []
    links = []
    for name in names:
        with contextlib.suppress(OSError):  # the one through which the folder was listed
            links.append(f"{name} {os.readlink(folder / name)}")
    return sorted(links)


def fingerprint(model, optimizer) -> str:
    arrays, state = optimizer.state_dict()
    digest = hashlib.sha256(repr(state).encode())
    adapters = (model.active_adapters, sorted(model.peft_config), model.training)
    digest.update(repr(adapters).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.requires_grad} {parameter.shape}".encode())
        digest.update(parameter.numpy().tobytes())
    for name, array in arrays.items():
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    return code, out.getvalue(), err.getvalue()


def outcome(row: Row, world: World) -> tuple[type[BaseException] | int | None, str]:
    """(what a row ends in, message): the class of an error, an exit code, or None if it is read."""
    if not isinstance(row.open, str):
        try:
            row.open(world)
        except Exception as error:
            return type(error), str(error)
        return None, ""
    code, out, err = run(row.open)
    assert "Traceback" not in out + err
    assert out.replace("\n", "").replace("\t", "").isprintable()
    *before, last = err.split("\n")
    assert last == ""
    if code == 0:
        return None, err
    assert [line.split(": ")[1] for line in before] == ["warning"] * (len(before) - 1) + ["error"]
    return code, before[-1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("row", ROWS, ids=[f"{row.kind}-{row.name[:70]}" for row in ROWS])
def test_hostile(row, sound, victim, seconds, tmp_path, monkeypatch):
    global events
    if row.whole:
        shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    with warnings.catch_warnings():  # NumPy warns when it converts NaN
        row.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, victim[0])
    files = snapshot(tmp_path)
    before = descriptors()
    whole = fingerprint(*victim)
    paths = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.lstat().st_size for path in paths)
    events = []
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if isinstance(row.open, str) else "error")
            ended, message = outcome(row, world)
        seconds[f"{row.kind}-{row.name[:70]}"] = time.perf_counter() - started
        peak = tracemalloc.get_traced_memory()[1]
        heard = events
    finally:
        tracemalloc.stop()
        events = None
    assert ended == row.ends, message
    for words in row.says:
        assert words in message
    if row.ends is not None:
        assert len(message) <= 500
        assert message.isprintable()
        assert message
    assert not heard
    assert peak <= 2 * size + 16 * 2**20
    assert snapshot(tmp_path) == files
    assert descriptors() == before
    assert fingerprint(*victim) == whole


def test_hostile_kinds_have_rows():
    assert list(KINDS) == list(range(1, 69))
    assert {row.kind for row in ROWS} | set(ELSEWHERE) == set(KINDS)
    assert not {row.kind for row in ROWS} & set(ELSEWHERE)
    assert len(ROWS) >= 60


WORST = [number for number, row in enumerate(ROWS) if row.worst]
CHILD = """
import os, resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from hostile import World, make_victim, make_world
from test_hostile import ROWS, outcome
model = make_victim()[0]
for number in map(int, sys.argv[4:]):
    folder = Path(sys.argv[3], str(number))
    folder.mkdir()
    row = ROWS[number]
    if row.whole:
        make_world(folder)
    row.build(folder)
    os.chdir(folder)
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * size + 64 * 2**20, resource.RLIM_INFINITY))
    ended, message = outcome(row, World(folder, model))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    name = row.name[:60].encode("ascii", "replace").decode()
    print(number, ended == row.ends, row.kind, name, ended, message[:99])
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the limit is set above what /proc says is used"
)
def test_hostile_worst_rows_need_hardly_any_memory(tmp_path):
    """Address space for twice the files and 64 MiB: no memory is taken for what a file claims."""
    assert len(WORST) >= 20
    paths = [str(Path(__file__).parent), str(PACKAGE.parent), str(tmp_path)]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *paths, *map(str, WORST)]
    options = {"text": True, "timeout": 200, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run(command, capture_output=True, **options)
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.split()[1] != "True"], done.stdout
    assert len(lines) == len(WORST), done.stderr


def test_pretrain_ignores_changes_of_its_text_while_it_trains(tmp_path, monkeypatch):
    """A text is read before the first step; what happens to its file later changes nothing."""
    monkeypatch.chdir(tmp_path)
    line = f"pretrain --data book.txt --steps 4 {TINY} {SHAPE}"
    changes = {
        "same": lambda: None,
        "shrunk": lambda: os.truncate("book.txt", 3),
        "grown": lambda: Path("book.txt").write_bytes(TEXT * 9),
        "gone": lambda: Path("book.txt").unlink(),
    }
    weights = {}
    train = minilora.lab.demo.train
    for name, change in changes.items():
        Path("book.txt").write_bytes(TEXT)
        done = []

        def change_first(*arguments, change=change, done=done, **options):
            done.append(change())
            return train(*arguments, **options)

        monkeypatch.setattr("minilora.training.loop.train", change_first)
        assert run(f"{line} --out {name}")[0] == 0
        assert len(done) == 1
        tensors = load_file(f"{name}/model.safetensors")
        weights[name] = {key: array.tobytes() for key, array in tensors.items()}
    assert len(weights) == 4
    assert all(found == weights["same"] for found in weights.values())


def test_package_does_not_evaluate_unpickle_import_by_name_or_backtrack():
    """What the audit hook shows for the rows holds for every line: the words do not occur."""
    modules = {"pickle", "marshal", "shelve", "importlib", "runpy", "code", "mmap", "re"}
    modules |= {"socket", "ssl", "urllib", "http"}
    calls = {"eval", "exec", "compile", "__import__", "breakpoint"}
    for path in sorted(PACKAGE.rglob("*.py")):
        forbidden = modules | {"subprocess"}
        if path == PACKAGE / "data" / "sandbox.py":
            forbidden = modules  # templates and tokenizers run in a process with limits
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level or str(node.module).split(".")[0] not in forbidden, path
            elif isinstance(node, ast.Name):
                assert node.id not in calls, path
            elif isinstance(node, (ast.Attribute, ast.keyword)):
                name = node.attr if isinstance(node, ast.Attribute) else node.arg
                assert name not in {"allow_pickle", "system", "popen", "memmap", "mmap_mode"}, path


def test_hear_reports_what_is_forbidden(tmp_path):
    """An import, a compilation, a connection and the opening of the secret are each reported."""
    global events
    (tmp_path / "colorsys_copy.py").write_text("x = 1")
    for act, word in (
        (lambda: __import__("colorsys_copy"), "import"),
        (lambda: eval("1 + 1"), "compile"),
        (lambda: __import__("socket").socket().close(), "socket"),
        (lambda: (tmp_path / "secret").write_bytes(b""), "open"),
    ):
        sys.path.insert(0, str(tmp_path))
        events = []
        try:
            act()
            heard = events
        finally:
            events = None
            sys.path.remove(str(tmp_path))
            sys.modules.pop("colorsys_copy", None)
        assert any(event.startswith(word) for event in heard), word
    assert np.isfinite(1.0)
