"""Rewriting: an interrupted run leaves nothing, a killed one is continued, sources stay as they
are."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tool_files import tree, write_small

from minilora.errors import ConfigError
from minilora.formats import folders, read_json, write_stream
from minilora.formats.checkpoint import INDEX_FILE
from minilora.tools import rewriting
from minilora.tools.converting import convert
from minilora.tools.factoring import extract, resize
from minilora.tools.merging import merge


class FailingWriter:
    """write_stream, which raises `error` at the `number`-th file."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.number = number
        self.error = error
        self.names: list[str] = []

    def __call__(self, path: Path, *rest: Any) -> None:
        self.names.append(path.name)
        if len(self.names) == self.number:
            raise self.error
        write_stream(path, *rest)


ERRORS = [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS)
def test_merge_that_ends_in_the_middle_leaves_nothing(error, tmp_path, monkeypatch):
    base, adapter = write_small(tmp_path, shards=3)
    before = tree(tmp_path)
    writer = FailingWriter(2, error)
    monkeypatch.setattr(rewriting, "write_stream", writer)
    with pytest.raises(type(error)):
        merge(base, [adapter], tmp_path / "out")
    assert len(writer.names) == 2
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("same", [True, False])
def test_merge_that_was_killed_is_continued_if_nothing_changed(same, tmp_path, monkeypatch):
    base, adapter = write_small(tmp_path, shards=3)
    rows = merge(base, [adapter], tmp_path / "whole", [0.5])
    unfinished = tmp_path / ".out.unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "write_stream", FailingWriter(3, KeyboardInterrupt()))
        # A killed process removes nothing.
        patch.setattr(folders, "remove_folder", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [adapter], tmp_path / "out", [0.5])
    assert unfinished.exists()
    writer = FailingWriter(99, KeyboardInterrupt())
    monkeypatch.setattr(rewriting, "write_stream", writer)
    again = merge(base, [adapter], tmp_path / "out", [0.5 if same else 1.0])
    assert len(writer.names) == (1 if same else 3)
    assert (tree(tmp_path / "out") == tree(tmp_path / "whole")) == same
    assert (again == rows) == same
    assert not unfinished.exists()


def test_merge_into_another_dtype_keeps_the_index_but_for_the_size(tmp_path):
    base, adapter = write_small(tmp_path, shards=3)
    merge(base, [adapter], tmp_path / "out", dtype="float16")
    index = read_json(tmp_path / "out" / INDEX_FILE)
    assert index["weight_map"] == read_json(base / INDEX_FILE)["weight_map"]
    assert index["metadata"] == {"of": "us", "total_size": 2 * (16 + 28 + 28)}


def test_new_folder_takes_names_that_begin_alike_at_once(tmp_path):
    """The longest name that a file system takes is one of them."""
    snow = "\N{SNOWMAN}" * 40
    names = ["x" * 40, "x" * 41, "x" * 254 + "a", "x" * 254 + "b", snow + "a", snow + "b"]
    with ExitStack() as opened:
        for name in names:
            stage = opened.enter_context(folders.new_folder(tmp_path / name, {"of": name}))
            (stage / "mine").write_text(name)
    written = {file.parent.name: file.read_text() for file in tmp_path.glob("*/mine")}
    assert written == {name: name for name in names}


TOOLS = {
    "merge": lambda base, adapter, out: merge(base, [adapter], out),
    "resize": lambda base, adapter, out: resize(adapter, 1, out),
    "convert": lambda base, adapter, out: convert(adapter, out, dtype="float16"),
    "extract": lambda base, adapter, out: extract(base, adapter, 1, out),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_write_nothing_inside_their_sources(tool, tmp_path):
    base, adapter = write_small(tmp_path)
    before = tree(tmp_path)
    for out in (adapter, adapter / "new", tmp_path / "base" / ".." / "adapter"):
        with pytest.raises(ConfigError, match=r"--out .* is inside --"):
            TOOLS[tool](base, adapter, out)
    assert tree(tmp_path) == before
