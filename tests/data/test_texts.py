"""Texts: what is read, what comes with Python, and what is held out."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.texts import four_tasks, prose, python_sources, read_text, split, split_text
from minilora.errors import ConfigError, DataError


@given(st.binary(min_size=1))
def test_read_text_returns_the_bytes(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "text"
    path.write_bytes(raw)
    assert read_text(path) == raw


def test_read_text_refuses_what_is_not_a_text(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty"):
        read_text(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(DataError, match="not a regular file"):
            read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing")


def test_prose_comes_with_python():
    documents = prose()
    assert documents == sorted(documents)
    assert 300_000 < sum(len(text) for _, text in documents) < 2_000_000
    assert len(documents) > 50


def test_prose_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="--pretrain-data"):
        prose()


def test_python_sources_come_with_python():
    documents = python_sources()
    names = [name for name, _ in documents]
    assert names == sorted(set(names))
    assert documents == python_sources()
    assert 2_000_000 < sum(len(text) for _, text in documents) <= 3_000_000
    single = sum("/" not in name for name in names)
    assert single < 0.8 * len(names), "packages as well as single modules"
    skipped = {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    for name, text in documents:
        text.decode("utf-8")
        assert name.endswith(".py")
        assert not skipped & set(name.split("/"))
    fewer = python_sources(500_000)
    assert 400_000 < sum(len(text) for _, text in fewer) <= 500_000


def test_python_sources_takes_only_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="without its sources"):
        python_sources()
    sources = {"a.py": b"a", "z/b.py": b"bb", "z/c.txt": b"c", "empty.py": b""}
    sources |= {"latin.py": "# é".encode("latin-1"), "long.py": b"x" * 9}
    skipped = ["test/d.py", "z/tests/e.py", "site-packages/f.py", "_sysconfigdata_x.py"]
    skipped += ["config-3/h.py", "__pycache__/i.py"]
    for name, text in (sources | dict.fromkeys(skipped, b"d")).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(text)
    assert python_sources(5) == [("a.py", b"a"), ("z/b.py", b"bb")]
    assert python_sources(2) in ([("a.py", b"a")], [("z/b.py", b"bb")])


LINE = st.binary(max_size=40).map(lambda text: text.replace(b"\n", b""))
DOCUMENTS = st.lists(st.tuples(st.text(max_size=2), LINE), max_size=12)


@given(DOCUMENTS, st.floats(0.01, 0.99), st.integers(0, 100))
def test_split_holds_out_whole_documents(documents, fraction, seed):
    texts = [text for _, text in documents if text]
    if len(texts) < 2:
        with pytest.raises(DataError, match=f"got {len(texts)}"):
            split(documents, fraction, seed)
        return
    sides = split(documents, fraction, seed)
    assert sides == split(documents, fraction, seed)
    assert all(sides)
    train, held_out = (side.split(b"\n") for side in sides)
    assert sorted(train + held_out) == sorted(texts)
    remaining = iter(texts)
    assert all(text in remaining for text in train), "the order stays"
    size = sum(map(len, held_out))
    budget = fraction * sum(map(len, texts))
    if size > budget:
        assert held_out == [min(texts, key=len)]
    assert all(size + len(text) > budget for text in train), "no document more would fit"


def test_split_holds_out_a_document_that_fits_exactly():
    documents = [(str(i), b"%010d" % i) for i in range(10)]
    assert len(split(documents, 0.2)[1]) == 10 + 1 + 10


def test_split_depends_on_the_seed():
    documents = [(str(i), b"%d" % (100 + i)) for i in range(50)]
    assert len({split(documents, 0.1, seed)[1] for seed in range(10)}) == 10


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.floats(0.01, 0.99))
def test_split_text_holds_out_the_end(text, fraction):
    try:
        train, held_out = split_text(text, fraction)
    except DataError:
        assert len(text) * (1 - fraction) < 4
        return
    assert train
    assert held_out
    assert train + held_out == text
    assert 0 <= len(held_out) - len(text) * fraction < 4
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    train.decode()
    held_out.decode()


def test_split_text_moves_the_cut_by_three_bytes_at_most():
    assert split_text(b"\x80" * 10, 0.5) == (b"\x80" * 2, b"\x80" * 8)
    assert split_text("a\U0001f600".encode(), 0.2) == (b"a", "\U0001f600".encode())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_split_and_split_text_refuse_a_fraction_outside_0_and_1(fraction):
    with pytest.raises(ConfigError, match="fraction"):
        split([("a", b"a"), ("b", b"b")], fraction)
    with pytest.raises(ConfigError, match="fraction"):
        split_text(b"a text", fraction)


def test_four_tasks_come_with_python():
    tasks = four_tasks(100_000)
    assert list(tasks) == ["python", "c", "charmap", "json"]
    for documents in tasks.values():
        sizes = [len(text) for _, text in documents]
        assert min(sizes) > 0
        assert 20_000 < sum(sizes) <= 100_000
        assert len(dict(documents)) > 2  # documents are held out whole
    line = json.loads(tasks["json"][0][1].decode().splitlines()[33])
    assert list(line) == ["code", "name", "category", "char"]
    assert list(line.values()) == ["U+0041", "LATIN CAPITAL LETTER A", "Lu", "A"]


def test_four_tasks_names_a_task_without_a_text(monkeypatch, tmp_path):
    monkeypatch.setattr(np, "get_include", lambda: str(tmp_path))
    with pytest.raises(DataError, match="the texts of task 'c'"):
        four_tasks()
