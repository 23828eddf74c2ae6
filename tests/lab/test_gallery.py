"""The gallery: a page that depends on the results alone, with a picture for each experiment."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from minilora.errors import ConfigError, FormatError
from minilora.formats import write_json
from minilora.lab import gallery
from minilora.lab.experiments import EXPERIMENTS
from minilora.lab.gallery import (
    BEGIN,
    COPIES,
    END,
    SECONDS,
    gallery_text,
    marked_text,
    publish_gallery,
    published_text,
    read_copies,
    replace_marked,
    shows_results,
    write_gallery,
)
from minilora.lab.panels import lines, series
from minilora.lab.plots import why_unavailable
from minilora.lab.store import LAB, Store
from minilora.lab.verdicts import decide, describe_part, judge

MADE_WITH = {
    "minilora": "1.0",
    "python": "3.12.1",
    "machine": {"numpy": "2.1", "processor": "a processor"},
}
VERDICT = decide(judge("gain", [0.5, 0.6, 0.7], at_least=0.95), note="A note.")
RESULTS = {
    "claim": "LoRA is enough",
    "source": "a paper",
    "control": "full training",
    "panels": [],
    "made_with": MADE_WITH,
    **VERDICT,
}
EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = f"# A page\n\nBefore.\n\n{BEGIN}\n{END}\n\nAfter.\n"


def test_gallery_text_has_claim_picture_verdict_numbers_time_and_command():
    text = gallery_text({"rank": RESULTS}, {"rank": 12.3}, MADE_WITH)
    for words in (
        "LoRA is enough",
        "](rank/rank.png)",
        "does not hold here",
        "0.60 +- 0.25",
        "Control: full training.",
        "`minilora lab rank`: 12 seconds",
        "a processor",
    ):
        assert words in text
    assert text == gallery_text({"rank": dict(RESULTS)}, {"rank": 12.3}, dict(MADE_WITH))


def test_gallery_text_says_that_quick_results_mean_nothing():
    quick = gallery_text({"rank": RESULTS}, {"rank": 1.0}, MADE_WITH | {"quick": True})
    assert "mean nothing" in quick
    whole = gallery_text({"rank": RESULTS}, {"rank": 1.0}, MADE_WITH | {"quick": False})
    assert "mean nothing" not in whole


@pytest.fixture
def drawn(monkeypatch):
    """The results that were drawn: a picture here is the checksum of its results alone."""
    sources = []

    def draw(source, content, picture, say):
        sources.append(source)
        picture.write_bytes(b"PNG " + hashlib.sha256(source.read_bytes()).hexdigest().encode())

    monkeypatch.setattr(gallery, "draw_results", draw)
    return sources


@pytest.fixture
def store(tmp_path):
    """A laboratory's folder with results of two experiments, one of which has its picture."""
    folder = tmp_path / "lab"
    folder.mkdir()
    store = Store(folder)
    store.claim(MADE_WITH)
    store.write_results("rank", RESULTS)
    store.write_case("rank", {"seed": 0}, {"loss": 2.0}, 12.3)
    source = store.write_results("layers", RESULTS | {"claim": "Layers differ"})
    store.picture_file("layers").write_bytes(
        hashlib.sha256(source.read_bytes()).hexdigest().encode()
    )
    return store


@pytest.fixture
def page(tmp_path):
    """A page with a place for the gallery."""
    (tmp_path / "pages").mkdir()
    file = tmp_path / "pages" / "README.md"
    file.write_text(PAGE, encoding="utf-8")
    return file


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}


def test_write_gallery_without_results_says_what_to_do(tmp_path):
    store = Store(tmp_path)
    store.claim(MADE_WITH)
    with pytest.raises(ConfigError, match="no results yet"):
        write_gallery(store)


def test_write_gallery_draws_the_pictures_that_are_missing_or_of_other_results(store, drawn):
    page = write_gallery(store).read_text(encoding="utf-8")
    assert drawn == [store.results_file("rank")]
    assert page.index("## rank") < page.index("## layers")  # the order of the table
    source = store.write_results("layers", RESULTS | {"claim": "Layers do not differ"})
    write_gallery(store)
    assert drawn[1:] == [source]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "is not as this version of the laboratory writes it"),
        ({"claim": "C"}, "run `minilora lab rank`"),
        (RESULTS | {"parts": [{"x": 1}]}, "KeyError('what')"),
        (RESULTS | {"parts": 5}, "is not as"),
        (RESULTS | {"verdict": 3}, "is not as"),
        (RESULTS | {"panels": [{"x": 1}]}, "is not as"),
        (RESULTS | {"made_with": MADE_WITH | {"minilora": "0.9"}}, "such numbers are not mixed"),
    ],
)
def test_write_gallery_refuses_results_that_the_laboratory_did_not_write(store, content, words):
    store.write_results("rank", content)
    if reason := why_unavailable():
        pytest.skip(reason)
    with pytest.raises((ConfigError, FormatError), match=re.escape(words)):
        write_gallery(store)
    assert not (store.folder / "README.md").exists()


@pytest.mark.parametrize("machine", [None, "a machine", {}])
def test_write_gallery_refuses_a_folder_that_does_not_say_its_machine(store, machine):
    write_json(store.folder / LAB, MADE_WITH | {"machine": machine})
    with pytest.raises(FormatError, match=r"lab\.json.*is not as this version"):
        write_gallery(store)


def test_write_gallery_leaves_out_seconds_that_are_none(store, drawn):
    times = {"a": 2.0, "b": "x", "c": -5, "d": None}
    write_json(store.folder / "rank" / "seconds.json", times)
    assert "`minilora lab rank`: 2 seconds" in write_gallery(store).read_text(encoding="utf-8")


# ---- a page elsewhere ----------------------------------------------------------------------------


def test_publish_gallery_writes_text_pictures_and_results(store, page, drawn):
    assert publish_gallery(store, page) == page
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# A page\n\nBefore.\n\n")
    assert text.endswith(f"{END}\n\nAfter.\n")
    for words in (
        "\n## What LoRA",
        "\n### rank\n",
        "](lab/rank.png)",
        "12 seconds",
        "Layers differ",
    ):
        assert words in text
    folder = page.parent / COPIES
    names = {"rank.json", "rank.png", "layers.json", "layers.png", SECONDS}
    assert {file.name for file in folder.iterdir()} == names
    for name in ("rank", "layers"):
        copy = folder / f"{name}.json"
        assert copy.read_bytes() == store.results_file(name).read_bytes()
        assert shows_results(folder / f"{name}.png", copy)
    assert marked_text(text) == published_text(folder)


def test_publish_gallery_again_changes_nothing(store, page, drawn):
    publish_gallery(store, page)
    before = files(page.parent)
    publish_gallery(store, page)
    assert files(page.parent) == before


def test_publish_gallery_replaces_what_an_experiment_said_before(store, page, drawn):
    publish_gallery(store, page)
    store.write_results("layers", RESULTS | {"claim": "Layers do not differ"})
    publish_gallery(store, page)
    text = page.read_text(encoding="utf-8")
    assert "Layers do not differ" in text
    assert "Layers differ" not in text
    assert marked_text(text) == published_text(page.parent / COPIES)


def test_publish_gallery_keeps_experiments_of_the_same_laboratory(store, page, drawn):
    publish_gallery(store, page)
    store.results_file("layers").unlink()
    publish_gallery(store, page)
    assert "Layers differ" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no comments", "no place for the gallery: put the lines"),
        ("one comment", "no place for the gallery"),
        ("twice", "no place for the gallery"),
        ("wrong order", "no place for the gallery"),
        ("not a text", "not a text in UTF-8"),
        ("quick", "ran without --quick"),
        ("no results", "no results yet"),
        ("another machine", "numbers of two are not mixed"),
        ("another file", "numbers of two are not mixed"),
    ],
)
def test_publish_gallery_refuses_before_it_writes(store, page, drawn, fault, message):
    texts = {"no comments": "# A page\n", "one comment": BEGIN, "twice": PAGE + PAGE}
    texts["wrong order"] = f"{END}\n{BEGIN}\n"
    if fault in texts:
        page.write_text(texts[fault], encoding="utf-8")
    elif fault == "not a text":
        page.write_bytes(b"\xff" + PAGE.encode())
    elif fault == "no results":
        for name in ("rank", "layers"):
            store.results_file(name).unlink()
    elif fault == "quick":
        store = Store(store.folder)
        (store.folder / "lab.json").write_text('{"quick": true, "machine": {}}', encoding="utf-8")
    else:
        publish_gallery(store, page)
        other = store.results_file("layers")
        copy = page.parent / COPIES / "layers.json"
        foreign = b"{}" if fault == "another file" else other.read_bytes()
        copy.write_bytes(foreign.replace(b"a processor", b"another"))
        other.unlink()
    before = files(page.parent)
    with pytest.raises(ConfigError, match=message):
        publish_gallery(store, page)
    assert files(page.parent) == before


def test_publish_gallery_needs_pictures(store, page, monkeypatch):
    monkeypatch.setattr(gallery, "draw_results", lambda *arguments: None)
    monkeypatch.setattr(gallery, "why_unavailable", lambda: "install matplotlib")
    before = files(page.parent)
    with pytest.raises(ConfigError, match="rank has none: install matplotlib"):
        publish_gallery(store, page)
    assert files(page.parent) == before


def test_publish_gallery_draws_real_pictures(store, page):
    pytest.importorskip("matplotlib")
    panel = lines("Losses", "rank r", "bits", [series("LoRA", [1, 4], [2.8, 2.7])], log="x")
    store.write_results("rank", RESULTS | {"panels": [panel]})
    store.write_results("layers", RESULTS | {"panels": [panel, panel]})
    publish_gallery(store, page)
    assert_published(page)


def test_replace_marked_leaves_the_rest():
    page = replace_marked(replace_marked(PAGE, "old\n"), "new\n")
    assert marked_text(page) == "new\n"
    assert replace_marked(page, "") == PAGE


def assert_published(page):
    """The page says what its copies come to, and each has a small picture of these results."""
    folder = page.parent / COPIES
    assert marked_text(page.read_text(encoding="utf-8")) == published_text(folder)
    results, seconds = read_copies(folder)
    for name in results:
        picture = folder / f"{name}.png"
        assert shows_results(picture, folder / f"{name}.json")
        assert picture.stat().st_size < 40_000
        assert seconds[name] >= 0
    known = {f"{name}{end}" for name in results for end in (".json", ".png")}
    files = {file.name for file in folder.iterdir()} if folder.exists() else set()
    assert files - {SECONDS} == known


def test_gallery_of_the_examples_is_what_its_results_say():
    assert_published(EXAMPLES / "README.md")


def test_gallery_of_the_examples_says_what_the_experiments_say():
    """A claim, a source or a control that was changed must be published again."""
    results, _ = read_copies(EXAMPLES / COPIES)
    for name, content in results.items():
        experiment = EXPERIMENTS[name]
        said = [content["claim"], content["source"], content["control"]]
        assert said == [experiment.CLAIM, experiment.SOURCE, experiment.CONTROL]
        assert not content["made_with"]["quick"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_results_follow_from_their_rows(name):
    """Today's claim and rule give the same verdict, in the digits that a page shows."""
    results, experiment = read_copies(EXAMPLES / "lab")[0][name], EXPERIMENTS[name]
    again = experiment.verdict(results["rows"])
    assert (results["claim"], results["control"]) == (experiment.CLAIM, experiment.CONTROL)
    assert (results["verdict"], results["note"]) == (again["verdict"], again["note"])
    assert list(map(describe_part, results["parts"])) == list(map(describe_part, again["parts"]))
    assert not [arm for arm, rates in results["rates"].items() if rates["is_at_edge"]]
