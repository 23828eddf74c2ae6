"""The laboratory's folder: whole files, one origin for all numbers, nothing mixed in silence."""

from __future__ import annotations

import json

import pytest

from minilora.errors import ConfigError
from minilora.lab.protocol import Plan
from minilora.lab.store import WORDS, Store, describe_surroundings, rows_in_order

CASE = {"arm": "LoRA r=4", "lr": 0.002, "seed": 1}


@pytest.fixture(scope="module")
def surroundings():
    return describe_surroundings(Plan(quick=True))


def test_describe_surroundings_names_all_that_decides_about_a_number(surroundings):
    assert set(surroundings) == set(WORDS)
    assert all(value not in ("", None, {}) for value in surroundings.values())
    assert surroundings["machine"]["numpy"]
    assert surroundings["machine"]["processor"]


def test_claim_again_is_allowed(tmp_path, surroundings):
    Store(tmp_path).claim(surroundings)
    before = (tmp_path / "lab.json").read_bytes()
    Store(tmp_path).claim(surroundings)
    assert (tmp_path / "lab.json").read_bytes() == before


@pytest.mark.parametrize("name", WORDS)
def test_claim_refuses_numbers_of_another_origin(tmp_path, surroundings, name):
    Store(tmp_path).claim(surroundings | {name: "another"})
    with pytest.raises(ConfigError) as caught:
        Store(tmp_path).claim(surroundings)
    for word in (str(tmp_path), WORDS[name], "another", "choose another folder"):
        assert word in str(caught.value)


def test_claim_refuses_a_folder_with_something_else(tmp_path, surroundings):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        Store(tmp_path).claim(surroundings)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_claim_goes_on_after_a_kill_at_its_first_breath(tmp_path, surroundings):
    (tmp_path / ".lab.json.tmp-99999999-0123abcd").write_text("{")
    Store(tmp_path).claim(surroundings)
    assert json.loads((tmp_path / "lab.json").read_text())["quick"] is True


def test_surroundings_of_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no lab\.json: give the folder"):
        Store(tmp_path).surroundings()


def test_read_case_returns_what_was_written(tmp_path):
    store = Store(tmp_path)
    assert store.read_case("rank", CASE) is None
    store.write_case("rank", CASE, {"report": 2.5}, 1.25)
    assert store.read_case("rank", CASE) == {**CASE, "report": 2.5}
    assert store.read_case("rank", CASE | {"seed": 2}) is None
    assert store.read_case("layers", CASE) is None
    assert list(store.seconds("rank").values()) == [1.25]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"case": 3}', b'{"result": {"x": 1}}'])
def test_read_case_measures_again_what_is_not_whole(tmp_path, content):
    store = Store(tmp_path)
    store.write_case("rank", CASE, {"report": 2.5}, 1.25)
    (file,) = (tmp_path / "rank" / "cases").iterdir()
    file.write_bytes(content)
    assert store.read_case("rank", CASE) is None


def test_write_case_names_different_cases_differently(tmp_path):
    store = Store(tmp_path)
    cases = [
        {"arm": arm, "lr": 0.1}
        for arm in ("a b", "a-b", "A-B", "a/b", "../a", "a" * 300, "a" * 300 + "b")
    ]
    for number, case in enumerate(cases):
        store.write_case("rank", case, {"number": number}, 0.0)
    rows, missing = rows_in_order(store, "rank", cases)
    assert [row["number"] for row in rows] == list(range(len(cases)))
    assert not missing
    files = list((tmp_path / "rank" / "cases").iterdir())
    assert len({file.name.casefold() for file in files}) == len(cases)


def test_rows_in_order_keeps_the_order_of_the_cases(tmp_path):
    store = Store(tmp_path)
    cases = [{"n": n} for n in (3, 1, 2, 0)]
    for case in cases[::-1][:3]:
        store.write_case("x", case, {}, 0.0)
    rows, missing = rows_in_order(store, "x", cases)
    assert [row["n"] for row in rows] == [1, 2, 0]
    assert missing == [{"n": 3}]
