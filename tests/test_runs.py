"""A run's folder: logs that only grow, and checkpoints that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import minilora.runs
from minilora.errors import CheckpointError, ConfigError
from minilora.runs import MANIFEST, Log, find_checkpoint, numbered_folder, open_folder, save_checkpoint

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def files(folder: Path):
    """Every file below a folder, with its bytes and its time."""
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


# ---- folders ----


def test_a_new_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    out = open_folder(tmp_path / "a" / "b")
    assert out == tmp_path / "a" / "b"
    assert not list(out.iterdir())
    assert open_folder(str(out)) == out  # an empty one may be used


def test_a_folder_that_holds_something_is_refused_unless_resumed(tmp_path):
    (tmp_path / ".hidden").touch()
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, resume=True) == tmp_path
    assert files(tmp_path) == before


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="is a file"):
        open_folder(tmp_path / "file", resume=True)
    with pytest.raises(NotADirectoryError):
        open_folder(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system on which nothing can be made")
def test_where_nothing_can_be_made():
    with pytest.raises(OSError, match="/proc/"):
        open_folder("/proc/minilora-test")


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_a_folder_without_leave_to_write_is_found_out_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        open_folder(tmp_path)
    tmp_path.chmod(0o700)


def test_numbers_go_on_from_the_first_free_one(tmp_path):
    parent = tmp_path / "runs"
    assert [numbered_folder(parent, "demo").name for _ in range(3)] == ["demo-001", "demo-002", "demo-003"]
    (parent / "demo-002").rmdir()
    (parent / "other-001").write_text("a file takes its number, too")
    assert numbered_folder(parent, "demo").name == "demo-002"
    assert numbered_folder(parent, "demo").name == "demo-004"
    assert numbered_folder(parent, "other").name == "other-002"


# ---- logs ----


def test_a_log_grows_by_whole_lines_that_are_there_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for step in range(3):
            log.write(step=step, loss=step / 3)
            assert [json.loads(line) for line in path.read_text().splitlines()][-1] == {"step": step, "loss": step / 3}
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("step", [1, 2, 3, 5, 9])
def test_resuming_drops_that_step_and_later_ones_and_nothing_else(step, tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for i in range(5):
            log.write(step=i, text="ü \u2028")
    kept = path.read_bytes().splitlines(keepends=True)[:step]
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "te')  # killed while it wrote
    with Log(path, step) as log:
        assert path.read_bytes() == b"".join(kept)
        log.write(step=step)
    assert path.read_bytes() == b"".join(kept) + f'{{"step": {step}}}\n'.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_run_starts_a_new_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n')
    Log(tmp_path / "log.jsonl").__exit__()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", [b"hello", b"\xff\xfe", b"[]", b"{}", b'{"step": "x"}', b"3", b"", b'{"step": null}'])
def test_a_log_that_was_edited_is_left_as_it_is(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 1}\n')
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"log\.jsonl"):
        Log(path, 2)
    assert files(tmp_path) == before


# ---- checkpoints ----


def save(out: Path, step: int, text: str = "weights", **state):
    def write(folder: Path) -> None:
        (folder / "model.bin").write_text(f"{text} {step}")
        (folder / "inner").mkdir()
        (folder / "inner" / "more.bin").write_bytes(b"\x00" * step)

    return save_checkpoint(out, step, state, write)


def names(out: Path):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_what_is_saved_is_found_again(tmp_path):
    folder = save(tmp_path, 3, run={"lr": 0.1}, losses=[1 / 3])
    assert folder == tmp_path / "checkpoints" / "step-3"
    for resume in ("auto", folder, str(folder)):
        found, manifest = find_checkpoint(resume, tmp_path)
        assert found == folder
        assert (manifest["step"], manifest["state"]) == (3, {"run": {"lr": 0.1}, "losses": [1 / 3]})
        assert set(manifest["files"]) == {"model.bin", "inner/more.bin"}


def test_the_newest_is_found_by_number_not_by_name_or_time(tmp_path, monkeypatch):
    monkeypatch.setattr(minilora.runs, "KEPT", 9)
    for step in (10, 9, 100):
        save(tmp_path, step)
    os.utime(tmp_path / "checkpoints" / "step-9")
    (tmp_path / "checkpoints" / "step-x").mkdir()
    (tmp_path / "checkpoints" / "step-1000").write_text("a file is no checkpoint")
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 100


def test_two_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-6", "step-8"]


def test_going_back_to_an_older_step_keeps_what_is_saved_there(tmp_path):
    for step in (6, 8, 3):
        assert save(tmp_path, step).is_dir()
    assert names(tmp_path) == ["step-3", "step-8"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, "old")
    save(tmp_path, 5, "new")
    assert names(tmp_path) == ["step-5"]
    assert (tmp_path / "checkpoints" / "step-5" / "model.bin").read_text() == "new 5"
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 5


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
@pytest.mark.parametrize("where", ["write", "_sha256", "write_json", "sync_folder", "rename"])
def test_a_failure_while_saving_leaves_the_previous_one_newest(error, where, tmp_path, monkeypatch):
    save(tmp_path, 2)
    before = files(tmp_path)

    def fail(*_arguments):
        raise error

    owner = {"write": Path, "rename": os}.get(where, minilora.runs)
    monkeypatch.setattr(owner, {"write": "write_bytes"}.get(where, where), fail)  # the second file of `save`
    with pytest.raises(type(error)) as caught:
        save(tmp_path, 4)
    assert caught.value is error
    monkeypatch.undo()
    assert names(tmp_path) == ["step-2"]
    assert files(tmp_path) == before
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 2
    save(tmp_path, 4)
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 4


def test_the_manifest_is_written_last_and_the_folder_named_after_that(tmp_path, monkeypatch):
    order = []
    plain = minilora.runs.write_json

    def watched(path, value):
        order.append(sorted(p.name for p in path.parent.iterdir()))
        assert path.parent.name.startswith("step-7.tmp-")
        plain(path, value)

    monkeypatch.setattr(minilora.runs, "write_json", watched)
    save(tmp_path, 7)
    assert order == [["inner", "model.bin"]]


def test_what_a_killed_run_left_is_removed_and_never_found(tmp_path):
    stale = tmp_path / "checkpoints" / "step-9.tmp-123"
    stale.mkdir(parents=True)
    (stale / "model.bin").write_text("half")
    same_process = tmp_path / "checkpoints" / f"step-4.tmp-{os.getpid()}"
    same_process.mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint("auto", tmp_path)
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-4"]


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


DAMAGE = {
    "a byte": flip,
    "a longer file": lambda folder: (folder / "model.bin").write_text("weights 4!"),
    "a cut file": lambda folder: os.truncate(folder / "model.bin", 3),
    "a missing file": lambda folder: (folder / "inner" / "more.bin").unlink(),
    "a renamed file": lambda folder: (folder / "model.bin").rename(folder / "model2.bin"),
    "a folder for a file": lambda folder: ((folder / "model.bin").unlink(), (folder / "model.bin").mkdir()),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 60),
    "a manifest of something else": lambda folder: (folder / MANIFEST).write_text('{"a": 1}'),
    "a manifest that is a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "a manifest in Latin-1": lambda folder: (folder / MANIFEST).write_bytes(b'{"\xe9": 1}'),
    "a step in letters": edit(lambda m: m.update(step="4")),
    "a step that is true": edit(lambda m: m.update(step=True)),
    "no step": edit(lambda m: m.pop("step")),
    "no state": edit(lambda m: m.pop("state")),
    "a state that is a list": edit(lambda m: m.update(state=[])),
    "files that are a list": edit(lambda m: m.update(files=["model.bin"])),
    "an entry that is null": edit(lambda m: m["files"].update({"model.bin": None})),
    "an entry without a sum": edit(lambda m: m["files"]["model.bin"].pop("sha256")),
    "another size": edit(lambda m: m["files"]["model.bin"].update(size=3)),
    "a sum in capitals": edit(lambda m: m["files"]["model.bin"].update(sha256="A" * 64)),
    "a name that leads out": other_name("../step-2/model.bin"),
    "a name from the root": other_name("/etc/hostname"),
    "a name with a NUL": other_name("model\0.bin"),
    "a name too long": other_name("x" * 5000),
    "an empty name": other_name(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_passed_over_by_auto_and_refused_by_name(damage, tmp_path):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    damage(newest)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="step-4") as caught:
        find_checkpoint(str(newest), tmp_path)
    assert len(str(caught.value)) <= 500
    assert str(caught.value).isprintable()
    with pytest.warns(UserWarning, match="step-4.*the one before"):
        found, manifest = find_checkpoint("auto", tmp_path)
    assert (found.name, manifest["step"]) == ("step-2", 2)
    shutil.rmtree(found)
    with pytest.warns(UserWarning, match="step-4"), pytest.raises(CheckpointError, match="no sound checkpoint"):
        find_checkpoint("auto", tmp_path)
    assert {k: v for k, v in before.items() if "step-2" not in k.parts} == files(tmp_path)


def test_a_name_that_leads_out_is_refused_even_where_the_file_there_is_the_right_one(tmp_path):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    shutil.copy(newest / "model.bin", tmp_path / "checkpoints" / "outside.bin")
    other_name("../outside.bin")(newest)
    with pytest.raises(CheckpointError, match="outside"):
        find_checkpoint(newest, tmp_path)


def test_a_manifest_of_a_very_long_run_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(minilora.runs.read_json, "__defaults__", (1000,))  # the limit for other files
    save(tmp_path, 4, losses=[0.123456789] * 1000)
    assert len(find_checkpoint("auto", tmp_path)[1]["state"]["losses"]) == 1000


def test_where_there_is_no_checkpoint(tmp_path):
    for resume in ("auto", tmp_path, tmp_path / "nowhere", "step-4"):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            find_checkpoint(resume, tmp_path)
    assert not list(tmp_path.iterdir())
