"""minilora/texts.py: what is read, what comes with Python, and what is held out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.texts import four_tasks, prose, python_sources, read_text, split, split_text
from minilora.errors import ConfigError, DataError

GOLDEN = Path(__file__).parents[1] / "golden"


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
    found = prose()
    assert found == sorted(found)
    assert 300_000 < sum(len(text) for _, text in found) < 2_000_000
    assert len(found) > 50


def test_prose_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="--pretrain-data"):
        prose()


def test_python_sources_come_with_python():
    found = python_sources()
    names = [name for name, _ in found]
    assert names == sorted(set(names))
    assert found == python_sources()
    assert 2_000_000 < sum(len(text) for _, text in found) <= 3_000_000
    assert sum("/" not in name for name in names) < 0.8 * len(names), (
        "packages as well as single modules"
    )
    for name, text in found:
        text.decode("utf-8")
        assert name.endswith(".py")
        assert not {"test", "tests", "idle_test", "site-packages", "pydoc_data"} & set(
            name.split("/")
        )
    fewer = python_sources(500_000)
    assert 400_000 < sum(len(text) for _, text in fewer) <= 500_000


def test_python_sources_takes_only_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="without its sources"):
        python_sources()
    latin = "# é".encode("latin-1")
    for name, text in {
        "a.py": b"a", "z/b.py": b"bb", "z/c.txt": b"c", "empty.py": b"", "latin.py": latin, "test/d.py": b"d",
        "z/tests/e.py": b"e", "site-packages/f.py": b"f", "_sysconfigdata_x.py": b"g", "config-3/h.py": b"h",
        "long.py": b"x" * 9, "__pycache__/i.py": b"i",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(text)
    assert python_sources(5) == [("a.py", b"a"), ("z/b.py", b"bb")]
    assert python_sources(2) in ([("a.py", b"a")], [("z/b.py", b"bb")])


DOCUMENTS = st.lists(
    st.binary(max_size=40).map(lambda text: text.replace(b"\n", b"")), max_size=12
).map(lambda texts: [(str(i), text) for i, text in enumerate(texts)])


@given(DOCUMENTS, st.floats(0.01, 0.99), st.integers(0, 100))
def test_split_holds_out_whole_documents(documents, fraction, seed):
    texts = [text for _, text in documents if text]
    if len(texts) < 2:
        with pytest.raises(DataError, match=f"got {len(texts)}"):
            split(documents, fraction, seed)
        return
    sides = split(documents, fraction, seed)
    assert sides == split(documents, fraction, seed)
    train, held = (side.split(b"\n") for side in sides)
    assert all((train, held, *sides))
    assert sorted(train + held) == sorted(texts)
    left = iter(texts)
    assert all(text in left for text in train), "the order is kept"
    size = sum(map(len, held))
    budget = fraction * sum(map(len, texts))
    assert size <= budget or (held == [min(texts, key=len)] and len(held[0]) > budget)
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
        train, held = split_text(text, fraction)
    except DataError:
        assert len(text) * (1 - fraction) < 4
        return
    assert train
    assert held
    assert train + held == text
    assert 0 <= len(held) - len(text) * fraction < 4
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    train.decode()
    held.decode()


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
    found = four_tasks(100_000)
    assert list(found) == ["python", "c", "charmap", "json"]
    for documents in found.values():
        sizes = [len(text) for _, text in documents]
        assert min(sizes) > 0
        assert 20_000 < sum(sizes) <= 100_000
        assert len(dict(documents)) > 2  # documents are held out whole
    line = json.loads(found["json"][0][1].decode().splitlines()[33])
    assert line == {
        "code": "U+0041",
        "name": "LATIN CAPITAL LETTER A",
        "category": "Lu",
        "char": "A",
    }


def test_four_tasks_names_a_task_without_a_text(monkeypatch, tmp_path):
    monkeypatch.setattr(np, "get_include", lambda: str(tmp_path))
    with pytest.raises(DataError, match="the texts of task 'c'"):
        four_tasks()
