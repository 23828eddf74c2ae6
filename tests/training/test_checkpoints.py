"""A run's folder: one writer, logs that only grow, checkpoints that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import stat
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faults import (
    NO_DISK,
    NO_ROOM,
    Disk,
    in_child,
    naive_save,
    no_disk,
    no_room,
    power_cuts,
    power_off,
    read_tree,
    start,
    stay_full,
    wait,
    write_tree,
)
from harness import open_descriptors

import minilora.training.checkpoints
from minilora.errors import CheckpointError, ConfigError, LockError, MiniloraError
from minilora.formats import load_file, save_file, write_json
from minilora.formats.disk import parse_json
from minilora.formats.folders import LOCK, locked, numbered_folder, require_free_space
from minilora.training.checkpoints import (
    MANIFEST,
    Log,
    find_checkpoint,
    open_folder,
    read_log,
    save_checkpoint,
)

fcntl = pytest.importorskip("fcntl", reason="needs locks and processes as POSIX has them")

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def files(folder: Path):
    """Every file below a folder, with its bytes and its time."""
    return {
        p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


# ---- folders ----


def test_open_folder_makes_a_folder_with_its_parents(tmp_path):
    out = open_folder(tmp_path / "a" / "b")
    assert out == tmp_path / "a" / "b"
    assert not list(out.iterdir())
    assert open_folder(str(out)) == out  # an empty one may be used


def test_open_folder_refuses_a_folder_with_content_unless_resumed(tmp_path):
    (tmp_path / ".hidden").touch()
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, resume=True) == tmp_path
    assert files(tmp_path) == before


def test_open_folder_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match="is a file"):
        open_folder(tmp_path / "file", resume=True)
    with pytest.raises(NotADirectoryError):
        open_folder(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a file system on which nothing can be made"
)
def test_open_folder_raises_where_nothing_can_be_made():
    with pytest.raises(OSError, match="/proc/"):
        open_folder("/proc/minilora-test")


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_open_folder_refuses_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        open_folder(tmp_path)
    tmp_path.chmod(0o700)


def test_numbered_folder_takes_the_first_free_number(tmp_path):
    parent = tmp_path / "runs"
    names = [numbered_folder(parent, "demo").name for _ in range(3)]
    assert names == ["demo-001", "demo-002", "demo-003"]
    (parent / "demo-002").rmdir()
    (parent / "other-001").write_text("a file takes its number, too")
    assert numbered_folder(parent, "demo").name == "demo-002"
    assert numbered_folder(parent, "demo").name == "demo-004"
    assert numbered_folder(parent, "other").name == "other-002"


# ---- logs ----


def test_log_grows_by_whole_lines_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for step in range(3):
            log.write(step=step, loss=step / 3)
            last = path.read_text().splitlines()[-1]
            assert json.loads(last) == {"step": step, "loss": step / 3}
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("step", [1, 2, 3, 5, 9])
def test_log_resumed_drops_that_step_and_later_ones_only(step, tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for i in range(5):
            log.write(step=i, text="ü \u2028")
    earlier = path.read_bytes().splitlines(keepends=True)[:step]
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "te')  # killed while it wrote
    with Log(path, step) as log:
        assert path.read_bytes() == b"".join(earlier)
        log.write(step=step)
    assert path.read_bytes() == b"".join(earlier) + f'{{"step": {step}}}\n'.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_log_of_a_new_run_starts_empty(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n')
    Log(tmp_path / "log.jsonl").__exit__()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_log_of_a_new_run_refuses_a_file_that_is_not_a_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"text": "training data"}\n')
    with pytest.raises(CheckpointError, match=r"log\.jsonl.*is not the log of a run; move it away"):
        Log(path)
    assert path.read_bytes() == b'{"text": "training data"}\n'


@pytest.mark.parametrize(
    "line", [b"hello", b"\xff\xfe", b"[]", b"{}", b'{"step": "x"}', b"3", b"", b'{"step": null}']
)
def test_log_that_was_edited_is_refused_and_unchanged(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 1}\n')
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"log\.jsonl"):
        Log(path, 2)
    assert files(tmp_path) == before


def test_read_log_leaves_out_a_line_that_is_being_written(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write(step=0, loss=math.nan)
        log.write(step=1, ranks={"q_proj": 3})
    lines = [{"step": 0, "loss": "nan"}, {"step": 1, "ranks": {"q_proj": 3}}]
    assert read_log(tmp_path / "log.jsonl") == lines
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == lines


# ---- checkpoints ----


def save(out: Path, step: int, text: str = "weights", **state):
    def write(folder: Path) -> None:
        (folder / "model.bin").write_text(f"{text} {step}")
        (folder / "inner").mkdir()
        (folder / "inner" / "more.bin").write_bytes(b"\x00" * step)

    return save_checkpoint(out, step, state, write)


def names(out: Path):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_find_checkpoint_returns_what_was_saved(tmp_path):
    folder = save(tmp_path, 3, run={"lr": 0.1}, losses=[1 / 3])
    assert folder == tmp_path / "checkpoints" / "step-3"
    for resume in ("auto", folder, str(folder)):
        newest_folder, manifest = find_checkpoint(resume, tmp_path)
        assert newest_folder == folder
        assert manifest["step"] == 3
        assert manifest["state"] == {"run": {"lr": 0.1}, "losses": [1 / 3]}
        assert set(manifest["files"]) == {"model.bin", "inner/more.bin"}


def test_find_checkpoint_takes_the_newest_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(minilora.training.checkpoints, "KEPT", 9)
    for step in (10, 9, 100):
        save(tmp_path, step)
    os.utime(tmp_path / "checkpoints" / "step-9")
    (tmp_path / "checkpoints" / "step-x").mkdir()
    (tmp_path / "checkpoints" / "step-1000").write_text("a file is no checkpoint")
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 100


def test_save_checkpoint_keeps_two(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-6", "step-8"]


def test_save_checkpoint_of_an_older_step_keeps_it(tmp_path):
    for step in (6, 8, 3):
        assert save(tmp_path, step).is_dir()
    assert names(tmp_path) == ["step-3", "step-8"]


def test_save_checkpoint_of_a_saved_step_replaces_it(tmp_path):
    save(tmp_path, 5, "old")
    save(tmp_path, 5, "new")
    assert names(tmp_path) == ["step-5"]
    assert (tmp_path / "checkpoints" / "step-5" / "model.bin").read_text() == "new 5"
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 5


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")]
)
@pytest.mark.parametrize("where", ["write", "_sha256", "write_json", "rename"])
def test_save_checkpoint_that_fails_leaves_the_previous_one_newest(
    error, where, tmp_path, monkeypatch
):
    save(tmp_path, 2)
    before = files(tmp_path)

    def fail(*_arguments):
        raise error

    if where == "write":  # the second file of `save`
        monkeypatch.setattr(Path, "write_bytes", fail)
    elif where == "rename":
        monkeypatch.setattr(os, "rename", fail)
    else:
        monkeypatch.setattr(minilora.training.checkpoints, where, fail)
    with pytest.raises(type(error)) as caught:
        save(tmp_path, 4)
    assert caught.value is error
    monkeypatch.undo()
    assert names(tmp_path) == ["step-2"]
    assert files(tmp_path) == before
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 2
    save(tmp_path, 4)
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 4


def test_save_checkpoint_writes_the_manifest_last_and_renames_the_folder_after_that(
    tmp_path, monkeypatch
):
    order = []
    plain = minilora.training.checkpoints.write_json

    def watched(path, value):
        order.append(sorted(p.name for p in path.parent.iterdir()))
        assert path.parent.name.startswith("step-7.tmp-")
        plain(path, value)

    monkeypatch.setattr(minilora.training.checkpoints, "write_json", watched)
    save(tmp_path, 7)
    assert order == [["inner", MANIFEST, "model.bin"]]
    sizes = find_checkpoint("auto", tmp_path)[1]["files"]
    assert sorted(sizes) == ["inner/more.bin", "model.bin"]


def test_save_checkpoint_removes_what_a_killed_run_left(tmp_path):
    stale = tmp_path / "checkpoints" / "step-9.tmp-123"
    stale.mkdir(parents=True)
    (stale / "model.bin").write_text("half")
    (stale / MANIFEST).write_text('{"step": 9}')
    same_process = tmp_path / "checkpoints" / f"step-4.tmp-{os.getpid()}"
    same_process.mkdir()
    with pytest.raises(CheckpointError, match=r"(no|not a) checkpoint"):
        find_checkpoint("auto", tmp_path)
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-4"]


def foreign(path: Path, name: str = "notes.txt") -> Path:
    """A folder of somebody else, with a file in it."""
    path.mkdir(parents=True)
    (path / name).write_text("mine")
    return path


def test_save_checkpoint_never_removes_what_it_did_not_make(tmp_path):
    """Folders under the names of stale, replaced and rotated checkpoints, without our manifest."""
    names = ["step-1", "step-2.tmp-99999", "step-2.tmp-old", "step-3.old", "checkpoint-10"]
    places = [foreign(tmp_path / "checkpoints" / name) for name in names]
    # A manifest of something else, and one of another step.
    places.append(foreign(tmp_path / "checkpoints" / "step-4", MANIFEST))
    other_step = foreign(tmp_path / "checkpoints" / "step-5")
    (other_step / MANIFEST).write_text('{"step": 6}')
    (tmp_path / "checkpoints" / "step-0").symlink_to(tmp_path / "elsewhere")
    foreign(tmp_path / "elsewhere")
    before = files(tmp_path)
    for step in (20, 21, 22, 23):
        save(tmp_path, step)
    kept = {path: file for path, file in files(tmp_path).items() if path in before}
    assert kept == before
    assert (tmp_path / "checkpoints" / "step-0").is_symlink()
    own = ["step-20", "step-21", "step-22", "step-23"]
    assert [name for name in own if (tmp_path / "checkpoints" / name).exists()] == own[2:]


def test_save_checkpoint_moves_away_what_is_in_its_place(tmp_path):
    foreign(tmp_path / "checkpoints" / "step-3")
    foreign(tmp_path / "checkpoints" / "step-3.moved-1")
    foreign(tmp_path / "checkpoints" / "step-3.old")
    with pytest.warns(UserWarning, match="is not a sound checkpoint of minilora: moved to"):
        save(tmp_path, 3)
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 3
    for name in ("step-3.moved-1", "step-3.moved-2", "step-3.old.moved-1"):
        assert (tmp_path / "checkpoints" / name / "notes.txt").read_text() == "mine"


def edit(change):
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def flip(folder: Path) -> None:
    path = folder / "model.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def other_name(name):
    def change(manifest):
        manifest["files"][name] = manifest["files"].pop("model.bin")

    return edit(change)


def write(content):
    def damage(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(content)

    return damage


def update(**changes):
    return edit(lambda manifest: manifest.update(changes))


def update_entry(**changes):
    return edit(lambda manifest: manifest["files"]["model.bin"].update(changes))


def put_folder(folder: Path) -> None:
    (folder / "model.bin").unlink()
    (folder / "model.bin").mkdir()


DAMAGE = {}
DAMAGE["a byte"] = flip
DAMAGE["a longer file"] = lambda folder: (folder / "model.bin").write_text("weights 4!")
DAMAGE["a cut file"] = lambda folder: os.truncate(folder / "model.bin", 3)
DAMAGE["a missing file"] = lambda folder: (folder / "inner" / "more.bin").unlink()
DAMAGE["a renamed file"] = lambda folder: (folder / "model.bin").rename(folder / "model2.bin")
DAMAGE["a folder for a file"] = put_folder
DAMAGE["no manifest"] = lambda folder: (folder / MANIFEST).unlink()
DAMAGE["an empty manifest"] = write(b"")
DAMAGE["half a manifest"] = lambda folder: os.truncate(folder / MANIFEST, 60)
DAMAGE["a manifest of something else"] = write(b'{"a": 1}')
DAMAGE["a manifest that is a list"] = write(b"[]")
DAMAGE["a manifest in Latin-1"] = write(b'{"\xe9": 1}')
DAMAGE["a step in letters"] = update(step="4")
DAMAGE["a step that is true"] = update(step=True)
DAMAGE["no step"] = edit(lambda manifest: manifest.pop("step"))
DAMAGE["no state"] = edit(lambda manifest: manifest.pop("state"))
DAMAGE["a state that is a list"] = update(state=[])
DAMAGE["files that are a list"] = update(files=["model.bin"])
DAMAGE["an entry that is null"] = edit(lambda m: m["files"].update({"model.bin": None}))
DAMAGE["an entry without a sum"] = edit(lambda m: m["files"]["model.bin"].pop("sha256"))
DAMAGE["another size"] = update_entry(size=3)
DAMAGE["a sum in capitals"] = update_entry(sha256="A" * 64)
DAMAGE["a name that leads out"] = other_name("../step-2/model.bin")
DAMAGE["a name from the root"] = other_name("/etc/hostname")
DAMAGE["a name with a NUL"] = other_name("model\0.bin")
DAMAGE["a name too long"] = other_name("x" * 5000)
DAMAGE["an empty name"] = other_name("")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_find_checkpoint_skips_a_damaged_one_for_auto_and_refuses_it_by_name(damage, tmp_path):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    damage(newest)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="step-4") as caught:
        find_checkpoint(str(newest), tmp_path)
    assert len(str(caught.value)) <= 500
    assert str(caught.value).isprintable()
    with pytest.warns(UserWarning, match="step-4.*the one before"):
        folder, manifest = find_checkpoint("auto", tmp_path)
    assert (folder.name, manifest["step"]) == ("step-2", 2)
    shutil.rmtree(folder)
    with (
        pytest.warns(UserWarning, match="step-4"),
        pytest.raises(CheckpointError, match="no sound checkpoint"),
    ):
        find_checkpoint("auto", tmp_path)
    expected = {path: file for path, file in before.items() if "step-2" not in path.parts}
    assert files(tmp_path) == expected


def test_find_checkpoint_refuses_a_name_that_leads_out_of_the_folder(tmp_path):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    shutil.copy(newest / "model.bin", tmp_path / "checkpoints" / "outside.bin")
    other_name("../outside.bin")(newest)
    with pytest.raises(CheckpointError, match="outside"):
        find_checkpoint(newest, tmp_path)


def test_find_checkpoint_reads_the_manifest_of_a_very_long_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        minilora.training.checkpoints.read_json, "__defaults__", (1000,)
    )  # the limit for other files
    save(tmp_path, 4, losses=[0.123456789] * 1000)
    assert len(find_checkpoint("auto", tmp_path)[1]["state"]["losses"]) == 1000


def test_find_checkpoint_raises_without_a_checkpoint(tmp_path):
    for resume in ("auto", tmp_path, tmp_path / "nowhere", "step-4"):
        with pytest.raises(CheckpointError, match=r"(no|not a) checkpoint"):
            find_checkpoint(resume, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- a disk that fails ----


def put(out: Path, step: int, text: str, save=save_checkpoint):
    """A small checkpoint of several files, in the formats that a run writes."""

    def write(folder: Path) -> None:
        write_json(folder / "config.json", {"text": text})
        save_file(folder / "model.safetensors", {"w": np.frombuffer(text.encode() * 9, np.uint8)})
        os.makedirs(folder / "inner")
        save_file(folder / "inner" / "more.safetensors", {"v": np.arange(step)})

    return save(out, step, {"losses": [1 / 3] * step}, write)


def newest(out: Path):
    """The newest checkpoint as a tree, or None; an error if a damaged one is skipped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read_tree(find_checkpoint("auto", out)[0])
    except CheckpointError as error:
        if "no checkpoint" in str(error):
            return None
        raise


SITUATIONS = {  # what was saved before, and what is saved now
    "the first": ([], (2, "new")),
    "the next": ([(2, "older"), (4, "old")], (6, "new")),
    "the same step again": ([(4, "old")], (4, "new")),
}


@pytest.fixture(params=SITUATIONS)
def situation(request, tmp_path):
    """(a folder before the save, save(out) that adds the new checkpoint, the old and new tree)"""
    before, (step, text) = SITUATIONS[request.param]
    out = tmp_path / "before"
    out.mkdir()
    for earlier in before:
        put(out, *earlier)
    old = newest(out)
    shutil.copytree(out, tmp_path / "after")
    put(tmp_path / "after", step, text)
    new = newest(tmp_path / "after")
    assert new != old

    def save(out: Path, how=save_checkpoint) -> None:
        put(out, step, text, how)

    return out, save, old, new


def left_behind(out: Path):
    return [
        p.name
        for p in (out / "checkpoints").rglob("*")
        if ".tmp-" in p.name or p.name.endswith(".old")
    ]


def changes(situation, tmp_path) -> int:
    out, save, _, _ = situation
    shutil.copytree(out, tmp_path / "counted")
    with Disk() as disk:
        save(tmp_path / "counted")
    assert disk.changes > 25
    return disk.changes


@pytest.mark.parametrize("wrong", [no_room, no_disk, stay_full])
def test_save_checkpoint_after_an_error_at_any_change_leaves_the_old_one_or_the_new(
    wrong, situation, tmp_path
):
    before, save, old, new = situation
    for at in range(1, changes(situation, tmp_path) + 1):
        out = tmp_path / f"out-{at}"
        shutil.copytree(before, out)
        failed = []
        with Disk(at, wrong):
            try:
                save(out)
            except OSError as error:
                failed.append(error.errno)
        assert failed in ([], [NO_ROOM.errno], [NO_DISK.errno])
        assert newest(out) in ((old, new) if failed else (new,)), at
        with Disk():
            save(out)
        assert newest(out) == new
        assert not left_behind(out)
        shutil.rmtree(out)


def killed_anywhere(situation, tmp_path, how):
    """The changes at which an end of the process leaves neither the old nor the new checkpoint."""
    before, save, old, new = situation
    bad, at, code = [], 0, 9
    while code == 9:
        at, out = at + 1, tmp_path / "out"
        shutil.copytree(before, out)

        def work(out=out, at=at) -> None:
            with Disk(at, power_off):
                save(out, how)

        code = in_child(work)
        assert code in (0, 9)
        try:
            if newest(out) not in (old, new):
                bad.append(at)
        except (UserWarning, CheckpointError):
            bad.append(at)
        if how is save_checkpoint:
            assert code == 9 or newest(out) == new
            with Disk():
                save(out)
            assert newest(out) == new
            assert not left_behind(out)
        shutil.rmtree(out)
    assert at > 15
    return bad


def test_save_checkpoint_killed_at_any_change_leaves_the_old_one_or_the_new(situation, tmp_path):
    assert not killed_anywhere(situation, tmp_path, save_checkpoint)


def test_naive_save_killed_at_some_change_is_noticed(situation, tmp_path):
    assert len(killed_anywhere(situation, tmp_path, naive_save)) >= 3


def cut_anywhere(situation, tmp_path, how):
    """(how many states a power cut may leave, those of them that are neither old nor new)"""
    before, save, old, new = situation
    out, bad = tmp_path / "out", []
    shutil.copytree(before, out)
    states = power_cuts(out, lambda: save(out, how))
    end = max(number for number, _ in states)
    for number, tree in states:
        write_tree(out, tree)
        try:
            tree = newest(out)
        except (UserWarning, CheckpointError):
            bad.append(number)
        else:
            if tree not in (old, new):
                bad.append(number)
            # A save that has returned must be there for good.
            assert number < end or how is naive_save or tree == new
        for folder in (out / "checkpoints").glob("step-*"):
            # A checkpoint whose sums are right is what was saved, to the last byte.
            with contextlib.suppress(CheckpointError):
                find_checkpoint(folder, out)
                assert read_tree(folder) in trees(before, old, new)
    return len(states), bad


def trees(before: Path, *more):
    return [*more, *(read_tree(p) for p in (before / "checkpoints").glob("*"))]


def test_save_checkpoint_after_a_power_cut_leaves_the_old_one_or_the_new(situation, tmp_path):
    count, bad = cut_anywhere(situation, tmp_path, save_checkpoint)
    assert count > 12
    assert not bad


def test_naive_save_after_a_power_cut_is_noticed(situation, tmp_path):
    assert cut_anywhere(situation, tmp_path, naive_save)[1]


def test_save_checkpoint_survives_real_kills(tmp_path):
    """Kills at random moments of some saves; benchmarks/faults.py kills whole runs, fifty times."""

    def big(out: Path, step: int) -> None:
        def write(folder: Path) -> None:
            save_file(folder / "model.safetensors", {"w": np.full(1 << 20, step, np.uint32)})

        save_checkpoint(out, step, {}, write)

    big(tmp_path, 1)
    begun = time.perf_counter()
    big(tmp_path, 2)
    length = time.perf_counter() - begun
    rng = np.random.default_rng(0)

    def work() -> None:
        for step in range(3, 10_000):
            big(tmp_path, step)

    for _ in range(5):
        child = start(work)
        time.sleep(length * rng.uniform(0.2, 3))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folder, manifest = find_checkpoint("auto", tmp_path)
        assert (load_file(folder / "model.safetensors")["w"] == manifest["step"]).all()
    big(tmp_path, 20_000)
    assert not left_behind(tmp_path)


# ---- one writer ----


def test_locked_again_in_the_same_context_leaves_nothing(tmp_path):
    out = tmp_path / "new" / "run"
    with locked(out) as folder:
        assert folder == out
        assert (out / LOCK).read_text() == f"minilora {os.getpid()}\n"
        with locked(str(out)), locked(out / ".." / "run"):
            assert open_folder(out) == out
        assert (out / LOCK).exists()
        with locked(out / "inner"):
            assert (out / "inner" / LOCK).exists()
    assert [p.name for p in out.iterdir()] == ["inner"]
    with pytest.raises(ZeroDivisionError), locked(out):
        raise ZeroDivisionError
    assert not (out / LOCK).exists()


def elsewhere(work):
    """The result of `work()` in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_locked_refuses_another_thread_or_process_at_once(tmp_path):
    holder = os.getpid()

    def attempt():
        with pytest.raises(LockError, match=f"run' is in use: process {holder} ") as caught:
            open_folder(tmp_path / "run")
        assert caught.value.exit_code == 6
        assert len(str(caught.value)) <= 500

    with locked(tmp_path / "run"):
        before = files(tmp_path)
        elsewhere(attempt)
        assert in_child(lambda: elsewhere(attempt)) == 0
        assert files(tmp_path) == before
    elsewhere(lambda: open_folder(tmp_path / "run"))


def test_locked_takes_the_lock_of_a_process_that_ended(tmp_path):
    def killed():
        with locked(tmp_path):
            os._exit(9)

    assert in_child(killed) == 9
    assert (tmp_path / LOCK).exists()
    assert open_folder(tmp_path) == tmp_path  # the lock is not what makes a folder full
    (tmp_path / LOCK).write_text("minilora 1\n")  # process 1 exists, but has no lock
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"minilora {os.getpid()}\n"
    assert not list(tmp_path.iterdir())


def test_locked_lets_one_of_twenty_processes_in(tmp_path):
    out = tmp_path / "run"
    go, gun = os.pipe()

    def race(number: int) -> None:
        os.close(gun)
        os.read(go, 1)  # until the parent closes the other end
        try:
            with locked(out):
                open_folder(out)
                (out / f"winner-{number}").touch()
                time.sleep(0.05 * (number % 2))
        except MiniloraError as error:
            os._exit(error.exit_code)

    children = [start(lambda number=number: race(number)) for number in range(20)]
    os.close(go)
    os.close(gun)
    codes = [wait(child) for child in children]
    assert codes.count(0) == 1
    assert set(codes) <= {0, 2, 6}
    assert [p.name for p in out.iterdir()] == [f"winner-{codes.index(0)}"]


def test_locked_never_lets_two_threads_in(tmp_path):
    """Threads lock and unlock as fast as they can; a removed lock file must not count as locked."""
    inside, overlaps, taken = [], [], []

    def work(name):
        for _ in range(300):
            try:
                with locked(tmp_path):
                    inside.append(name)
                    overlaps.extend([] if inside == [name] else [list(inside)])
                    taken.append(name)
                    inside.remove(name)
            except LockError:
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not overlaps
    assert taken
    assert not list(tmp_path.iterdir())


def test_locked_notices_a_file_removed_between_opening_and_locking(tmp_path, monkeypatch):
    plain, removed = fcntl.flock, []

    def late(descriptor, how):
        plain(descriptor, how)
        if not removed:
            removed.append(os.fstat(descriptor).st_ino)
            (tmp_path / LOCK).unlink()
            (tmp_path / "so that the number is not used again").touch()

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert removed
        monkeypatch.undo()
        with pytest.raises(LockError):
            elsewhere(lambda: open_folder(tmp_path))


def test_locked_does_not_remove_another_run_s_lock(tmp_path):
    with contextlib.ExitStack() as second, ThreadPoolExecutor(1) as pool:
        with locked(tmp_path):
            (tmp_path / LOCK).unlink()  # somebody tidies up
            pool.submit(second.enter_context, locked(tmp_path)).result()
        with pytest.raises(LockError):
            open_folder(tmp_path)
        pool.submit(second.close).result()
    assert open_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_locked_warns_where_nothing_can_be_locked(reason, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked") as seen, locked(tmp_path):
        open_folder(tmp_path)
    assert len(seen) == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with pytest.warns(UserWarning, match="no flock"), locked(tmp_path):
        pass


def test_locked_raises_other_errors_of_flock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pass
    assert open_descriptors() == open_descriptors()


FOREIGN_LOCKS = {}
FOREIGN_LOCKS["notes"] = lambda path: path.write_text("my notes")
FOREIGN_LOCKS["the number of a process"] = lambda path: path.write_text(f"{os.getpid()}\n")
FOREIGN_LOCKS["our mark and more"] = lambda path: path.write_text("minilora notes\n")
FOREIGN_LOCKS["a folder"] = lambda path: path.mkdir()
FOREIGN_LOCKS["a pipe"] = lambda path: os.mkfifo(path)
FOREIGN_LOCKS["a socket"] = lambda path: os.mknod(path, 0o600 | stat.S_IFSOCK)
FOREIGN_LOCKS["a link to a file"] = lambda path: path.symlink_to(path.parent / "other")
FOREIGN_LOCKS["a link to nothing"] = lambda path: path.symlink_to("nowhere")
FOREIGN_LOCKS["a link to a device"] = lambda path: path.symlink_to("/dev/null")


@pytest.mark.parametrize("make", FOREIGN_LOCKS.values(), ids=FOREIGN_LOCKS)
def test_locked_refuses_a_lock_that_is_not_its_own_and_leaves_it(make, tmp_path):
    (tmp_path / "other").write_text("")
    make(tmp_path / LOCK)
    before, count = files(tmp_path), open_descriptors()
    kind = os.lstat(tmp_path / LOCK).st_mode
    match = r"\.lock' is not the lock of a run: choose another folder, or move it away"
    with pytest.raises(ConfigError, match=match), locked(tmp_path):
        pass
    assert (files(tmp_path), open_descriptors()) == (before, count)
    assert os.lstat(tmp_path / LOCK).st_mode == kind
    assert not (tmp_path / "nowhere").exists()


def test_locked_ends_well_if_the_folder_was_removed(tmp_path):
    count = open_descriptors()
    with locked(tmp_path / "out"):
        shutil.rmtree(tmp_path / "out")
    with locked(tmp_path / "out"):
        (tmp_path / "out" / LOCK).unlink()
    assert not list((tmp_path / "out").iterdir())
    assert open_descriptors() == count


def test_find_checkpoint_needs_no_lock(tmp_path):
    put(tmp_path, 2, "text")
    with locked(tmp_path):
        assert elsewhere(lambda: find_checkpoint("auto", tmp_path)[1]["step"]) == 2


# ---- what is known before ----


def test_require_free_space_raises_on_a_full_disk(tmp_path):
    require_free_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"saving takes 1,\d{3},.* the disk has") as caught:
        require_free_space(tmp_path, 10**18 + shutil.disk_usage(tmp_path).free)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)


def test_require_free_space_accepts_a_file_system_that_reports_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    require_free_space(tmp_path, 10**18)


@pytest.mark.parametrize(
    "name", ["with spaces", "line\nbreak", "ünï", b"\xff\xfe".decode("utf-8", "surrogateescape")]
)
def test_save_checkpoint_and_find_checkpoint_accept_any_name_of_a_folder(name, tmp_path):
    out = tmp_path / name
    try:
        out.mkdir()
    except OSError:
        pytest.skip("not a name on this file system")
    with locked(out):
        put(open_folder(out), 2, "text")
    assert find_checkpoint("auto", out)[1]["step"] == 2
    flip_one(out / "checkpoints" / "step-2" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(out / "checkpoints" / "step-2", out)
    assert str(caught.value).isprintable()
    with pytest.raises(ConfigError, match="not empty") as caught:
        open_folder(out)
    assert str(caught.value).isprintable()


def flip_one(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_find_checkpoint_finds_one_that_was_about_to_be_replaced(tmp_path):
    put(tmp_path, 2, "older")
    put(tmp_path, 4, "old")
    folder = tmp_path / "checkpoints"
    (folder / "step-4").rename(folder / "step-4.old")
    assert find_checkpoint("auto", tmp_path)[0].name == "step-4.old"
    put(tmp_path, 6, "new")
    assert names(tmp_path) == ["step-4.old", "step-6"]
    put(tmp_path, 8, "newer")
    assert names(tmp_path) == ["step-6", "step-8"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_writes_nan_and_infinity_as_strict_json(value, tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write(step=0, loss=value, lr=0.5)
        log.sync()
    line = parse_json((tmp_path / "log.jsonl").read_bytes(), "the line")
    assert str(float(line["loss"])) == str(value)
    assert (line["step"], line["lr"]) == (0, 0.5)


def test_log_that_is_a_pipe_is_written_if_somebody_reads(tmp_path):
    path = tmp_path / "log.jsonl"
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device"):  # and does not wait for a reader
        Log(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with Log(path) as log:
        log.write(step=0)
        log.sync()
        assert os.read(reader, 100) == b'{"step": 0}\n'
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_log_on_a_full_disk_raises(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = Log(tmp_path / "log.jsonl", 3)
    log.sync()
    with pytest.raises(OSError, match="No space"):
        log.write(step=3)
    with pytest.raises(OSError, match="No space"):
        log.__exit__()


def test_log_sync_raises_for_a_failing_disk_but_not_for_a_pipe(tmp_path, monkeypatch):
    with Log(tmp_path / "log.jsonl") as log:
        for number, kind in (
            (errno.EINVAL, contextlib.nullcontext()),
            (errno.EIO, pytest.raises(OSError)),
        ):
            monkeypatch.setattr(os, "fsync", lambda descriptor, number=number: fail(number))
            with kind:
                log.sync()


def fail(number):
    raise OSError(number, os.strerror(number))
