"""Folders that appear whole or not at all, and folders that must be empty or outside others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from minilora.errors import ConfigError, FormatError
from minilora.formats import folders
from minilora.formats.folders import (
    LOCK,
    STAMP,
    fingerprint,
    new_folder,
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
    rmtree = shutil.rmtree
    out = tmp_path / "out"
    for inputs, is_continued in (({"a": 1}, False), ({"a": 1}, True), ({"a": 2}, False)):
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt), new_folder(out, inputs) as stage:  # noqa: PT012
            assert (stage / "file").exists() == is_continued
            assert (stage / STAMP).exists()
            (stage / "file").touch()
            # A killed process removes nothing.
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
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


def test_require_empty_ignores_the_lock_and_ends_with_the_advice(tmp_path):
    require_empty(tmp_path)
    (tmp_path / LOCK).touch()
    require_empty(tmp_path)
    (tmp_path / ".hidden").touch()
    with pytest.raises(ConfigError, match=r"not empty: choose another folder, or remove it$"):
        require_empty(tmp_path)
    with pytest.raises(ConfigError, match=r"or remove it, or wait$"):
        require_empty(tmp_path, ", or wait")


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
