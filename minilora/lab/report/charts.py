"""A chart of a report as plain data: what Plotly draws, in words and as a table, too.

A colour is the name of one of the page's colours, such as "warm": the page puts in the shade that
fits a light or a dark screen. Texts in a chart go through `label`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from .cleaning import LONGEST_LABEL, label
from .content import Row

Trace = dict[str, Any]
Number = float | None

HEIGHT = 340
MINUS = "\N{MINUS SIGN}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One position of a control: its description, and the points that change, by trace."""

    name: str
    description: str
    x: list[list[Any]]
    y: list[list[Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart, what it shows in words, and its numbers.

    changed   the traces whose points a control chooses; `choices` has the points of each
    start     the position of the control at first
    unit      of the numbers in the cells of a map, if it is a power of ten
    """

    name: str
    alt: str
    traces: list[Trace]
    layout: dict[str, Any]
    header: list[str]
    rows: list[list[str]]
    changed: list[int] = dataclasses.field(default_factory=list)
    choices: list[Choice] = dataclasses.field(default_factory=list)
    start: int = 0
    unit: str = ""

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.layout["height"])

    def to_json(self) -> dict[str, Any]:
        """What the page's script needs."""
        choices = [choice.__dict__ for choice in self.choices]
        return {
            "traces": self.traces,
            "layout": self.layout,
            "changed": self.changed,
            "choices": choices,
            "alt": self.alt,
            "start": self.start,
        }


# ---- numbers and axes ----------------------------------------------------------------------------


def is_known(value: Number) -> TypeGuard[float]:
    """Whether there is a number, and a finite one: JSON and Plotly have no others."""
    return value is not None and math.isfinite(value)


def show(value: Number, digits: int = 4) -> str:
    """A number with `digits` significant digits, or a dash."""
    if not is_known(value):
        return "\N{EN DASH}"
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign."""
    sign = "+" if value > 0 else MINUS if value < 0 else ""
    return f"{sign}{abs(value):.{digits}g}"


def rounded(values: Iterable[Number], digits: int = 5) -> Row:
    """Numbers in few digits: they are for a chart, and the page should be small."""
    short = [None if value is None else float(f"{value:.{digits}g}") for value in values]
    return [value if is_known(value) else None for value in short]  # the largest round to infinity


def known(values: Iterable[Number]) -> list[float]:
    """The numbers without what is missing."""
    return [value for value in values if is_known(value)]


def axis(title: str = "", **options: Any) -> dict[str, Any]:
    """A quiet axis: one line, a pale grid, no zoom."""
    common = {
        "title": {"text": title, "standoff": 8, "font": {"size": 13}},
        "color": "muted",
        "gridcolor": "pale",
        "linecolor": "quiet",
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
    }
    return common | options


def layout(x: dict[str, Any], y: dict[str, Any], **options: Any) -> dict[str, Any]:
    common = {
        "height": HEIGHT,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "xaxis": x,
        "yaxis": y,
        "font": {"size": 13, "color": "ink"},
        "paper_bgcolor": "clear",
        "plot_bgcolor": "clear",
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1, "bgcolor": "paper", "font": {"color": "ink"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
    }
    return common | options


def ticks(names: Sequence[str], longest: int = LONGEST_LABEL) -> dict[str, Any]:
    """An axis whose positions 0, 1, ... have names; equal names are different positions."""
    texts = [label(name, longest) for name in names]
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": texts}
