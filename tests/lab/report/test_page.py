"""A report's page as text: its structure, its policy, its size, and hostile texts as text."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import html.parser
import itertools
import json
import sys
from collections import Counter

import pytest
import reports
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError, printable
from minilora.lab.report import page as module
from minilora.lab.report.content import (
    ColouredText,
    Fact,
    Guess,
    ModuleCount,
    Spectrum,
    TokenChange,
    Training,
)
from minilora.lab.report.page import LIMIT, render, why_unavailable
from minilora.lab.report.words import PARTS, describe_tokens

needs_page = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}")
ALL = ["clean", "adalora", "gpt2", "hostile"]
OPTIONAL = {
    "training": None,
    "maps": [],
    "spectra": [],
    "rank_curve": None,
    "text": None,
    "intruders": None,
}
TOOL = "tests use this in the place of Plotly's script, which is long"


class Parsed(html.parser.HTMLParser):
    """A page's elements in order, and the text inside each kind of element.

    elements   (tag, names of its attributes, values by name)
    texts      by tag, the texts directly inside of such elements
    """

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, list[str], dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.stack: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, [name for name, _ in attrs], dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in ("meta", "link", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack:
            self.texts[self.stack[-1]][-1] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")

    @property
    def structure(self):
        return [(tag, names) for tag, names, _ in self.elements]

    def values(self, name):
        return [values[name] for _, _, values in self.elements if name in values]


@pytest.fixture
def short_script(monkeypatch):
    """Pages without Plotly's five megabytes."""
    monkeypatch.setattr(module, "_plotly_script", lambda: f'"{TOOL}"')


@functools.cache
def page_of(name: str) -> str:
    return render(getattr(reports, name)())


# ---- structure -----------------------------------------------------------------------------------


@needs_page
@pytest.mark.parametrize("name", ALL)
def test_render_is_small_and_safe_to_write(name):
    page = page_of(name)
    assert 4_000_000 < len(page.encode()) < LIMIT
    assert page.startswith("<!DOCTYPE html>")
    Parsed(page)


@needs_page
@pytest.mark.parametrize("name", ALL)
def test_render_has_a_policy_that_runs_its_own_scripts_only(name):
    parsed = Parsed(page_of(name))
    (policy,) = [v["content"] for _, _, v in parsed.elements if "http-equiv" in v]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    inline = [text for text in parsed.texts["script"] if not text.startswith("{")]
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in inline]
    assert directives == {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{value}'" for value in hashes),
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert len(inline) == 2
    scripts = [values for tag, _, values in parsed.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}, {}]


@needs_page
@pytest.mark.parametrize("name", ALL)
def test_render_refers_to_nothing_outside(name):
    parsed = Parsed(page_of(name))
    assert {href for href in parsed.values("href") if not href.startswith("#")} == {"data:,"}
    assert not parsed.values("src")
    assert not [a for _, names, _ in parsed.elements for a in names if a.startswith("on")]


@needs_page
@pytest.mark.parametrize("name", ALL)
def test_render_names_what_it_refers_to(name):
    parsed = Parsed(page_of(name))
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    targets = [href[1:] for href in parsed.values("href") if href.startswith("#")]
    for target in [*targets, *parsed.values("aria-labelledby"), *parsed.values("for")]:
        assert target in ids
    sections = [v["id"] for tag, _, v in parsed.elements if tag == "section"]
    assert targets == sections
    assert sections == [part for part in PARTS if part in sections]


@needs_page
@pytest.mark.parametrize("name", ALL)
def test_render_gives_each_chart_alternative_text_a_caption_and_a_table(name):
    parsed = Parsed(page_of(name))
    charts = [v for _, _, v in parsed.elements if v.get("role") == "img"]
    data = json.loads(parsed.texts["script"][0])
    assert {chart["id"] for chart in charts} == set(data["figures"])
    assert all(len(chart["aria-label"]) > 20 for chart in charts)
    count = Counter(tag for tag, _, _ in parsed.elements)
    has_text = "text" in parsed.values("id")
    assert count["figcaption"] == count["figure"] == len(charts)
    assert count["table"] == len(charts) + has_text


@needs_page
def test_render_gives_each_control_a_label_and_a_live_output():
    parsed = Parsed(page_of("clean"))
    controls = [v["id"] for tag, _, v in parsed.elements if tag in ("input", "select")]
    labels = [v["for"] for tag, _, v in parsed.elements if tag == "label"]
    outputs = [v for tag, _, v in parsed.elements if tag == "output" and "for" in v]
    assert controls == labels == [output["for"] for output in outputs]
    assert controls == ["spectrum-control", "rank-control", "scaling-control"]
    assert {output["aria-live"] for output in outputs} == {"polite"}


@needs_page
def test_render_has_one_tab_stop_in_the_text_and_a_sign_beside_each_colour():
    parsed = Parsed(page_of("clean"))
    tokens = [v for _, _, v in parsed.elements if v.get("role") == "option"]
    assert [token["tabindex"] for token in tokens] == ["0"] + ["-1"] * (len(tokens) - 1)
    assert {token.get("class") for token in tokens} == {None, "fall", "rise"}
    style = "".join(parsed.texts["style"])
    assert ".tokens .fall::before { content: " in style
    assert ".tokens .rise::before { content: " in style


@needs_page
def test_render_depends_on_nothing_but_the_report(short_script):
    assert render(reports.clean()) == render(reports.clean())


@needs_page
@pytest.mark.parametrize("count", [1, 5, 6])
def test_render_works_without_any_of_the_parts(short_script, count):
    for parts in itertools.combinations(OPTIONAL, count):
        empty = {part: OPTIONAL[part] for part in parts}
        omitted = {part: f"because of {part}" for part in parts}
        report = dataclasses.replace(reports.clean(), omitted=omitted, **empty)
        parsed = Parsed(render(report))
        assert not set(parts) & set(parsed.values("id"))
        definitions = " ".join(parsed.texts["dd"])
        assert all(reason in definitions for reason in omitted.values())


@needs_page
def test_render_works_with_parts_that_hold_nothing(short_script):
    report = dataclasses.replace(
        reports.clean(),
        summary=[],
        provenance=[],
        architecture=ModuleCount("", "", 0, 0),
        training=Training("", []),
        spectra=[Spectrum("", [], [])],
        text=ColouredText("", []),
        rank_curve=dataclasses.replace(
            reports.clean().rank_curve, ranks=[], losses=[], errors=[], energies=[]
        ),
        intruders=dataclasses.replace(
            reports.clean().intruders, limits=[], counts=[], scalings=[], examined=0
        ),
    )
    ids = Parsed(render(report)).values("id")
    assert not {"summary", "provenance", "training", "text", "rank_curve"} & set(ids)
    assert {"architecture", "maps", "spectra", "intruders"} <= set(ids)


@needs_page
def test_render_says_that_some_of_a_shown_part_is_missing(short_script):
    report = dataclasses.replace(reports.clean(), omitted={"maps": "too large", "text": "y"})
    names = Parsed(render(dataclasses.replace(report, text=None))).texts["dt"]
    assert names[-2:] == [f"{PARTS['maps']} (some of it)", PARTS["text"]]


@needs_page
def test_render_says_a_reason_of_several_parts_once(short_script):
    omitted = {"maps": "too large", "text": "y", "rank_curve": "too large"}
    report = dataclasses.replace(reports.clean(), omitted=omitted, text=None, rank_curve=None)
    parsed = Parsed(render(report))
    both = f"{PARTS['maps']} (some of it); {PARTS['rank_curve']}"
    assert parsed.texts["dt"][-2:] == [both, PARTS["text"]]
    assert parsed.texts["dd"][-2:] == ["too large", "y"]


# ---- size ----------------------------------------------------------------------------------------


@needs_page
def test_render_leaves_out_the_largest_part_of_a_page_that_would_be_too_large(monkeypatch):
    monkeypatch.setattr(module, "_plotly_script", lambda: "1;" * 2_400_000)
    spectrum = Spectrum("layer", [1.2345 + i for i in range(64)], [1.2345 + i for i in range(64)])
    report = dataclasses.replace(reports.gpt2(), spectra=[spectrum] * 900)
    page = render(report)
    assert len(page.encode()) < LIMIT
    parsed = Parsed(page)
    assert "spectra" not in parsed.values("id")
    assert "maps" in parsed.values("id")
    assert "with it the page would be larger than 5.5 MB" in " ".join(parsed.texts["dd"])


@needs_page
def test_render_limits_what_is_always_shown(short_script):
    leaf = ModuleCount("n" * 9_999, "k", 1, 1)
    deep = leaf
    for _ in range(900):
        deep = ModuleCount("deep", "k", 1, 1, "", [deep])
    wide = ModuleCount("wide", "k", 5_000, 5_000, "", [leaf] * 5_000)
    report = dataclasses.replace(
        reports.clean(),
        title="t" * 9_999,
        summary=[Fact("n" * 9_999, "v" * 9_999)] * 9_999,
        architecture=ModuleCount("model", "k", 5_001, 5_001, "", [wide, deep]),
    )
    page = render(report)
    assert len(page.encode()) < 500_000
    assert "and 4,900 more" in page
    assert "and 9,899 more" in page


# ---- hostile texts -------------------------------------------------------------------------------


@needs_page
def test_render_shows_hostile_texts_as_text(short_script):
    parsed = Parsed(render(reports.hostile()))
    shown = parsed.texts["dt"] + parsed.texts["dd"]
    for text in reports.HOSTILE:
        if len(text) < 100:
            assert printable(text) in shown


texts = st.one_of(
    st.sampled_from(reports.HOSTILE), st.text(st.characters(exclude_categories=()), max_size=30)
)
small = dataclasses.replace(
    reports.clean(),
    spectra=reports.clean().spectra[:2],
    text=dataclasses.replace(
        reports.clean().text, tokens=[TokenChange("a", 2.0, 1.0, [Guess("b", 0.5)])] * 2
    ),
    omitted={"other": "reason"},
)


@needs_page
@given(st.lists(texts, min_size=1, max_size=40))
def test_render_has_the_same_elements_whatever_the_texts_are(drawn):
    """No text adds an element or an attribute, or ends the page's data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_plotly_script", lambda: f'"{TOOL}"')
        source = itertools.cycle(drawn)
        page = render(reports.replace_texts(small, lambda _: next(source)))
        source = itertools.cycle(drawn)  # whether a text is empty may decide about its element
        plain = render(reports.replace_texts(small, lambda _: "x" if next(source) else ""))
    page.encode()
    assert not set(page) & set("\0\r\x1b\x7f\u2028\u2029\u202e\u2066\u200f")
    parsed = Parsed(page)
    assert parsed.structure == Parsed(plain).structure
    data = json.loads(parsed.texts["script"][0])
    assert data.keys() == {"colours", "figures"}


# ---- words ---------------------------------------------------------------------------------------


def test_describe_tokens_colours_by_the_change_of_loss():
    changes = [(None, None), (2.0, 1.0), (1.0, 2.0), (1.0, 1.01), (3.0, 2.5)]
    text = ColouredText("t", [TokenChange("a\n", base, after) for base, after in changes])
    shown = describe_tokens(text)
    assert [token.direction for token in shown.tokens] == ["", "fall", "rise", "", "fall"]
    assert [token.strength for token in shown.tokens] == ["0.00", "1.00", "1.00", "0.01", "0.50"]
    assert [token.change for token in shown.tokens] == ["–", "−1", "+1", "+0.01", "−0.5"]
    assert shown.tokens[0].text == "a↵\n"
    assert shown.summary.startswith("5 tokens: the loss falls at 2 and rises at 1;")
    assert describe_tokens(ColouredText("t", [])) is None


def test_describe_tokens_counts_the_tokens_of_a_character():
    text = ColouredText("t", [TokenChange("a", 2.0, 1.0), TokenChange("é", 3.0, 1.0, count=2)])
    shown = describe_tokens(text)
    assert shown.summary == (
        "3 tokens, shown as 2, because some characters are several: "
        "the loss falls at 2 and rises at 0; on average it changes by −1 nats per token."
    )


# ---- optional packages ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["jinja2", "plotly"])
def test_why_unavailable_says_what_to_install(monkeypatch, missing):
    for name in ("jinja2", "plotly"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(sys.modules, "plotly.offline", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    reason = why_unavailable()
    assert "pip install -e .[page]" in reason
    assert "\n" not in reason
    with pytest.raises(ConfigError, match="page needs jinja2 and plotly"):
        render(reports.gpt2())


@needs_page
@pytest.mark.parametrize("script", ["a</SCRIPT>b", "a<!--b"])
def test_render_refuses_a_script_that_would_end_its_element(monkeypatch, script):
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: script)
    with pytest.raises(ConfigError, match=r"install another version"):
        render(reports.gpt2())
