"""A report as one HTML file that needs nothing else.

Only this file imports jinja2 and plotly, which are optional: `pip install -e .[page]`. The
page is safe whatever the report's texts contain: they are cleaned (cleaning.py), the template
escapes them, figures are JSON in an element that is not executed, and the page's policy runs the
two scripts below, by their hashes, and loads nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..plots import COOL, INK, PALE, QUIET, WARM
from .charts import MINUS, Figure, show
from .cleaning import clean
from .content import Fact, Report
from .figures import draw_all
from .words import PARTS, Tokens, describe_tokens

LIMIT = 5_500_000  # bytes of the page; Plotly's script has 4.8 million
LARGEST_FIRST = ("spectra", "text", "training", "maps")
INSTALL = "pip install -e .[page]"
LIGHT = {
    "ink": INK,
    "muted": "#5d6063",
    "quiet": QUIET,
    "pale": PALE,
    "paper": "#ffffff",
    "raised": "#f6f6f4",
    "warm": WARM,
    "warm-text": "#a8432d",
    "cool": COOL,
    "cell-low": "#f1f5f7",
    "cell-high": "#7fb1cf",
    "cell-negative": "#e29c89",
    "clear": "rgba(0,0,0,0)",
}
DARK = {
    "ink": "#e8e6e1",
    "muted": "#a5a7a9",
    "quiet": "#6c7074",
    "pale": "#33373b",
    "paper": "#17191c",
    "raised": "#1f2226",
    "warm": "#e5886f",
    "warm-text": "#e5886f",
    "cool": "#6fb2d9",
    "cell-low": "#1f272c",
    "cell-high": "#2b6c93",
    "cell-negative": "#93452f",
    "clear": "rgba(0,0,0,0)",
}


def why_unavailable() -> str | None:
    """Why no page can be written here, in one line; None if one can."""
    try:
        import jinja2
        import plotly.offline
    except ImportError as error:
        return f"a page needs jinja2 and plotly, and {error.name} is missing: {INSTALL}"
    del jinja2, plotly
    return None


def render(report: Report) -> str:
    """The page, of at most LIMIT bytes: the largest parts are left out first, and it says so.

    ConfigError if jinja2 or plotly is missing.
    """
    reason = why_unavailable()
    if reason is not None:
        raise ConfigError(reason)
    page = _render(report)
    for part in LARGEST_FIRST:
        if len(page.encode()) <= LIMIT:
            break
        report = _leave_out(report, part)
        page = _render(report)
    return page


def _leave_out(report: Report, part: str) -> Report:
    value: Any = getattr(report, part)
    empty: Any = [] if isinstance(value, list) else None
    reason = f"with it the page would be larger than {LIMIT / 1e6:.1f} MB"
    changes: dict[str, Any] = {part: empty, "omitted": report.omitted | {part: reason}}
    return dataclasses.replace(report, **changes)


def _render(report: Report) -> str:
    import jinja2

    report = clean(report)
    figures = draw_all(report)
    scripts = [_plotly_script(), _read("page.js")]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(_read("page.html.j2"))
    text = describe_tokens(report.text) if report.text else None
    sections = _sections(report, figures, text)
    drawn = {figure.name: figure.to_json() for part in figures.values() for figure in part}
    page: str = template.render(
        report=report,
        sections=sections,
        figures=figures,
        text=text,
        omitted=_omitted(report, sections),
        data={"figures": drawn, "colours": list(LIGHT)},
        show=show,
        minus=MINUS,
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        style=_read("page.css"),
        light=LIGHT,
        dark=DARK,
    )
    return page


def _sections(
    report: Report, figures: dict[str, list[Figure]], text: Tokens | None
) -> dict[str, str]:
    """The titles of the parts that the report has, by name and in order."""
    has = {part: bool(drawn) for part, drawn in figures.items()}
    has |= {"summary": bool(report.summary), "architecture": True, "text": text is not None}
    has |= {"provenance": bool(report.provenance), "omitted": bool(report.omitted)}
    return {part: title for part, title in PARTS.items() if has[part]}


def _omitted(report: Report, sections: dict[str, str]) -> list[Fact]:
    """What is missing, by the titles of parts, and why; some of a part that is shown may be."""
    titles: dict[str, list[str]] = {}  # by the reason
    for name, reason in report.omitted.items():
        title = PARTS.get(name, name)
        titles.setdefault(reason, []).append(f"{title} (some of it)" if name in sections else title)
    return [Fact("; ".join(names), reason) for reason, names in titles.items()]


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _plotly_script() -> str:
    """Plotly's JavaScript. ConfigError if it cannot be written between <script> and </script>."""
    import plotly.offline

    script = str(plotly.offline.get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
    lower = script.lower()
    if "</script" in lower or "<!--" in lower:
        raise ConfigError(
            f"the script of plotly {plotly.__version__} cannot be part of a page: "
            "install another version, such as 7.1"
        )
    return script


def _hash(script: str) -> str:
    """The source of a Content-Security-Policy that allows this inline script only."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
