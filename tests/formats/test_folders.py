"""Folders that appear whole or not at all, and folders that must be empty or outside others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import Disk, in_child, power_off
from harness import snapshot

from minilora.errors import ConfigError, FormatError
from minilora.formats import folders, write_json
from minilora.formats.folders import (
    LOCK,
    STAMP,
    fingerprint,
    locked,
    new_folder,
    remove_folder,
    require_empty,
    require_outside,
    whole_folder,
)


def nothing() -> None:
    pass


def fill(stage: Path) -> None:
    stage.mkdir()
    (stage / "file").write_text("whole")


def test_whole_folder_syncs_makes_way_and_renames_in_this_order(tmp_path, monkeypatch):
    calls = []
    rename = os.rename

    def watched_rename(source, target):
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(folders, "sync_folder", lambda path: calls.append(f"sync {path.name}"))
    stage = tmp_path / "stage"
    place = tmp_path / "place"
    with whole_folder(stage, place, lambda: calls.append("make way")):
        fill(stage)
        assert not place.exists()
    assert calls == ["sync stage", "make way", "rename", f"sync {tmp_path.name}"]
    assert not stage.exists()
    assert (place / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["block", "make_way", "rename"])
def test_whole_folder_removes_the_stage_after_a_failure(tmp_path, monkeypatch, where, error):
    stage = tmp_path / "stage"

    def fail(*_: object) -> None:
        raise error

    if where == "rename":
        monkeypatch.setattr(os, "rename", fail)
    make_way = fail if where == "make_way" else nothing
    with pytest.raises(error), whole_folder(stage, tmp_path / "place", make_way):  # noqa: PT012
        fill(stage)
        if where == "block":
            fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existed", [True, False])
def test_new_folder_appears_at_the_end_of_the_block(tmp_path, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with new_folder(out, {"a": 1}) as stage:
        assert stage.parent == tmp_path
        assert sorted(path.name for path in out.iterdir()) == [LOCK]
        (stage / "file").write_text("whole")
        (stage / ".hidden").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]


@pytest.mark.parametrize("existed", [True, False])
def test_new_folder_leaves_the_place_as_it_was_after_a_failure(tmp_path, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(out, {}) as stage:  # noqa: PT012
        (stage / "file").touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * existed
    assert not list(tmp_path.glob("out/*"))


def test_new_folder_continues_a_stage_of_the_same_inputs_only(tmp_path, monkeypatch):
    remove_folder = folders.remove_folder
    out = tmp_path / "out"
    for inputs, is_continued in (({"a": 1}, False), ({"a": 1}, True), ({"a": 2}, False)):
        monkeypatch.setattr(folders, "remove_folder", remove_folder)
        with pytest.raises(KeyboardInterrupt), new_folder(out, inputs) as stage:  # noqa: PT012
            assert (stage / "file").exists() == is_continued
            assert (stage / STAMP).exists()
            (stage / "file").touch()
            # A killed process removes nothing.
            monkeypatch.setattr(folders, "remove_folder", lambda *_: None)
            raise KeyboardInterrupt
        assert stage.exists()


def test_new_folder_refuses_a_full_folder_and_a_file_at_its_stage(tmp_path):
    out = tmp_path / "out"
    stage = tmp_path / ".out.unfinished"
    stage.touch()
    with pytest.raises(FormatError, match="is in the way"), new_folder(out, {}):
        raise AssertionError("never reached")
    assert stage.is_file()
    stage.unlink()
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"), new_folder(out, {}):
        raise AssertionError("never reached")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]


def somebodys(stage: Path) -> None:
    stage.mkdir()
    (stage / "thesis.txt").write_text("mine")


def with_a_stamp_of(content: str):
    def make(stage: Path) -> None:
        somebodys(stage)
        (stage / STAMP).write_text(content)

    return make


def linked(stage: Path) -> None:
    somebodys(stage.parent / "elsewhere")
    stage.symlink_to(stage.parent / "elsewhere")


FOREIGN_STAGES = {
    "a folder": somebodys,
    "a folder with inputs.json": with_a_stamp_of('{"out": "out"}'),
    "a folder with a damaged stamp": with_a_stamp_of("{"),
    "a link to a folder": linked,
    "a link to nothing": lambda stage: stage.symlink_to("nowhere"),
    "a pipe": lambda stage: os.mkfifo(stage),
}


@pytest.mark.parametrize("make", FOREIGN_STAGES.values(), ids=FOREIGN_STAGES)
def test_new_folder_never_removes_what_it_did_not_make(make, tmp_path):
    make(tmp_path / ".out.unfinished")
    before = snapshot(tmp_path)
    wanted = "is in the way: it is not an unfinished folder of minilora; move it away, or choose"
    with pytest.raises(FormatError, match=wanted), new_folder(tmp_path / "out", {}):
        raise AssertionError("never reached")
    assert snapshot(tmp_path) == before


def test_new_folder_uses_an_empty_stage(tmp_path):
    """A run was killed between making the folder and stamping it."""
    stage = tmp_path / ".out.unfinished"
    stage.mkdir()
    (stage / f".{STAMP}.tmp-99999999-00000000").touch()
    with new_folder(tmp_path / "out", {}) as folder:
        assert folder == stage
        assert [path.name for path in folder.iterdir()] == [STAMP]
    assert not list((tmp_path / "out").iterdir())


def test_new_folder_killed_at_any_change_is_made_by_the_next_run(tmp_path):
    """Its unfinished folder is known as its own after every change to the disk but one.

    The stamp is removed immediately before the folder, which is complete, gets its name.
    """

    def make(out: Path) -> None:
        with new_folder(out, {"a": 1}) as stage:
            if not (stage / "file").exists():
                write_json(stage / "file", {})

    complete = []
    at, code = 0, 9
    while code == 9:
        at, out = at + 1, tmp_path / str(at + 1) / "out"
        out.parent.mkdir()

        def work(out=out, at=at) -> None:
            with Disk(at, power_off):
                make(out)

        code = in_child(work)
        if not (out / "file").exists():
            try:
                make(out)
            except FormatError:
                complete.append(sorted(p.name for p in (out.parent / ".out.unfinished").iterdir()))
                continue
        assert (out / "file").exists()
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert at > 15
    assert complete == [["file"]]


def test_remove_folder_removes_the_stamp_last(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name in (STAMP, "a", "inner/b"):
        (folder / name).touch()
    (folder / "link").symlink_to(tmp_path / "kept")
    fill(tmp_path / "kept")
    rmtree = folders.shutil.rmtree

    def last(path: Path) -> None:
        if path == folder:
            assert [p.name for p in folder.iterdir()] == [STAMP]
        rmtree(path)

    monkeypatch.setattr(folders.shutil, "rmtree", last)
    remove_folder(folder, STAMP)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").exists()


def test_require_empty_ignores_the_lock_and_ends_with_the_advice(tmp_path):
    require_empty(tmp_path)
    (tmp_path / LOCK).touch()
    require_empty(tmp_path)
    (tmp_path / ".hidden").touch()
    with pytest.raises(ConfigError, match=r"not empty: choose another folder, or remove it$"):
        require_empty(tmp_path)
    with pytest.raises(ConfigError, match=r"or remove it, or wait$"):
        require_empty(tmp_path, ", or wait")


@pytest.mark.parametrize("target", ["missing", "link"])
def test_locked_refuses_a_link_that_leads_nowhere(target, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="link' is a symbolic link that leads nowhere"):  # noqa: SIM117
        with locked(tmp_path / "link"):
            pass
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "missing").exists()


def test_require_outside_names_the_option_whose_folder_it_is_in(tmp_path):
    require_outside(tmp_path / "out", base=tmp_path / "base")
    require_outside(tmp_path, base=tmp_path / "base")
    for out in (tmp_path / "base", tmp_path / "base" / "x" / "y"):
        with pytest.raises(ConfigError, match="is inside --base: choose another folder"):
            require_outside(out, base=tmp_path / "base")


def test_fingerprint_changes_with_size_and_time_of_the_files_that_matter(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("a.safetensors", "inner/b.json", "c.txt"):
        (tmp_path / name).write_text(name)
    before = fingerprint(tmp_path)
    assert sorted(before) == ["a.safetensors", os.path.join("inner", "b.json")]
    (tmp_path / "c.txt").write_text("another")
    assert fingerprint(tmp_path) == before
    os.utime(tmp_path / "a.safetensors", ns=(1, 1))
    assert fingerprint(tmp_path) != before
