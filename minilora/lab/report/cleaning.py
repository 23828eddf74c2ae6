"""The texts of a report made safe to show, before anything is drawn from them.

Texts come from files: names of layers, tokens, settings. Whatever they contain, they must come out
as text. Control characters, lone surrogates, directional controls and unusual line ends are
replaced by their escapes here, in every field at once; HTML is escaped by the template, and
Plotly's own markup by `label`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ...display import printable
from .content import ColouredText, Fact, Guess, ModuleCount, Report, TokenChange

LONGEST = 500  # characters of any text
LONGEST_TITLE = 120
LONGEST_SUMMARY = 160
LONGEST_TOKEN = 40
LONGEST_LABEL = 32  # in a chart
MOST_FACTS = 100
MOST_TOKENS = 400
MOST_INSIDE = 100  # modules inside one
DEPTH = 8  # levels of modules


def clean(report: Report) -> Report:
    """The same report with printable texts, and limits on their lengths and numbers."""
    report = dataclasses.replace(
        report,
        title=_shorten(report.title, LONGEST_TITLE),
        summary=_limit_facts(report.summary, LONGEST_SUMMARY),
        provenance=_limit_facts(report.provenance, LONGEST),
        architecture=_limit_modules(report.architecture),
        text=report.text and _limit_text(report.text),
    )
    cleaned: Report = _cleaned(report)
    return cleaned


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    """A text for a chart: short, with the characters escaped that Plotly takes for markup."""
    short = _shorten(printable(text), longest)
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cleaned(value: Any) -> Any:
    """A copy of `value` in which every text is printable."""
    if isinstance(value, str):
        return _shorten(printable(_shorten(value, LONGEST)), LONGEST)
    if isinstance(value, Guess):
        return Guess(_clean_token(value.text), value.probability)
    if isinstance(value, tuple):  # a named one
        return type(value)(*map(_cleaned, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: _cleaned(getattr(value, name)) for name in names}
        if isinstance(value, TokenChange):
            parts["text"] = _clean_token(value.text)
        return dataclasses.replace(value, **parts)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return value


def _clean_token(text: str) -> str:
    """A token, whose line ends and tabs stay."""
    return _shorten(printable(text, "\n\t"), LONGEST_TOKEN)


def _shorten(text: str, longest: int) -> str:
    """`text` in at most `longest` characters: its start and its end, which tells names apart."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 1]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def _limit_facts(facts: list[Fact], longest: int) -> list[Fact]:
    """The first facts, with short values; those after them are counted."""
    limited = [Fact(fact.name, _shorten(fact.value, longest)) for fact in facts[:MOST_FACTS]]
    rest = len(facts) - MOST_FACTS
    return limited if rest <= 0 else [*limited, Fact(f"and {rest:,} more", "")]


def _limit_text(text: ColouredText) -> ColouredText:
    return dataclasses.replace(text, tokens=text.tokens[:MOST_TOKENS])


def _limit_modules(module: ModuleCount, depth: int = DEPTH) -> ModuleCount:
    """The module without levels below `depth`; modules after the first ones are one entry."""
    if not depth:
        return dataclasses.replace(module, inside=[])
    inside = [_limit_modules(child, depth - 1) for child in module.inside[:MOST_INSIDE]]
    rest = module.inside[MOST_INSIDE:]
    if rest:
        parameters = sum(child.parameters for child in rest)
        trained = sum(child.trained for child in rest)
        inside.append(ModuleCount(f"and {len(rest):,} more", "", parameters, trained))
    return dataclasses.replace(module, inside=inside)
