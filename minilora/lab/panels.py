"""Panels: what a picture of an experiment shows, as plain data, and how it is drawn.

A panel is a dictionary that goes into the results as it is, so that a page can draw the same:

    lines   series of points over a number, joined unless they are dots
    bars    groups of bars, one bar per series
    heat    a table of numbers with colours

A series is {"name", "x", "y"} and, if need be, "spread" (half the width of an interval), "dots"
and "control". Controls are grey and broken, whatever the panel. The other colours are those of
Okabe and Ito, which colour-blind eyes tell apart; each has a marker of its own as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

Panel = dict[str, Any]
Series = dict[str, Any]

INK = "#222222"
GREY = "#8a8a8a"
CONTROLS = ((GREY, "x", "--"), ("#5a5a5a", "+", ":"), ("#b0b0b0", "1", "-."))
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b5a800")
DIGIT = 7.0  # pixels: the width of a digit of a label at 100 dots per inch
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


# ---- plain data ----------------------------------------------------------------------------------


def series(name: str, x: Sequence[Any], y: Sequence[Any], **others: Any) -> Series:
    """A line of a panel: see above for the others."""
    return {"name": name, "x": list(x), "y": list(y), **others}


def lines(title: str, x: str, y: str, content: Sequence[Series], **others: Any) -> Panel:
    """Series over a number.

    x, y     labels of the axes
    others   log: the axes that are logarithmic, "x", "y" or "xy"; levels: {name: y} of horizontal
             lines, which are controls
    """
    return {"kind": "lines", "title": title, "x": x, "y": y, "series": list(content), **others}


def bars(
    title: str, y: str, labels: Sequence[str], content: Sequence[Series], **others: Any
) -> Panel:
    """Groups of bars under their labels; the x of a series is not used. Others as for `lines`."""
    kind = {"kind": "bars", "title": title, "y": y, "labels": list(labels)}
    return {**kind, "series": list(content), **others}


def bar(name: str, y: Sequence[Any], **others: Any) -> Series:
    return {"name": name, "y": list(y), **others}


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Any]],
    **others: Any,
) -> Panel:
    """A table with colours.

    others   x and y: what columns and rows are; digits behind the point; limits of the colours
    """
    table = [list(row) for row in values]
    return {
        "kind": "heat",
        "title": title,
        "rows": list(rows),
        "columns": list(columns),
        "values": table,
        **others,
    }


# ---- drawing -------------------------------------------------------------------------------------


def draw(axis: Any, panel: Panel) -> None:
    """Draw a panel into matplotlib's axes."""
    {"lines": _draw_lines, "bars": _draw_bars, "heat": _draw_heat}[panel["kind"]](axis, panel)
    axis.set_title(panel["title"], loc="left", fontsize=9)


def _styles(content: Sequence[Series]) -> list[dict[str, Any]]:
    """Colour, marker and line of each series; controls are grey."""
    styles: list[dict[str, Any]] = []
    colours = itertools.cycle(zip(COLOURS, MARKERS, itertools.repeat("-")))
    controls = itertools.cycle(CONTROLS)
    for line in content:
        style = next(controls) if line.get("control") else next(colours)
        styles.append(dict(zip(("color", "marker", "linestyle"), style, strict=True)))
    return styles


def _draw_lines(axis: Any, panel: Panel) -> None:
    for line, style in zip(panel["series"], _styles(panel["series"]), strict=True):
        is_shown = [value is not None and math.isfinite(value) for value in line["y"]]
        x = [value for value, shown in zip(line["x"], is_shown, strict=True) if shown]
        y = [value for value, shown in zip(line["y"], is_shown, strict=True) if shown]
        size = {"markersize": 4, "linewidth": 1.4, "label": line["name"]}
        if line.get("dots"):
            axis.plot(x, y, **{**size, **style, "linestyle": "none", "markersize": 3.5}, alpha=0.75)
        else:
            axis.plot(x, y, **size, **style)
        spread = line.get("spread")
        if spread:
            shown = [value or 0 for value, keep in zip(spread, is_shown, strict=True) if keep]
            axis.errorbar(x, y, yerr=shown, fmt="none", color=style["color"], capsize=3, lw=1)
    for place in panel.get("log", ""):
        getattr(axis, f"set_{place}scale")("log")
    if "x" in panel.get("log", ""):
        _mark_values(axis, panel["series"])
    if "y" in panel.get("log", ""):
        _write_out_numbers(axis)
    _draw_levels(axis, panel)
    axis.set_xlabel(panel["x"])
    axis.set_ylabel(panel["y"])
    _add_legend(axis, panel)


def _mark_values(axis: Any, content: Sequence[Series]) -> None:
    """Label a logarithmic axis with the numbers that were measured, if they are few.

    If there is not enough space for all labels, every second or third is left.
    """
    values = sorted({value for line in content if not line.get("dots") for value in line["x"]})
    if not 0 < len(values) <= 12:
        return
    labels = [f"{value:g}" for value in values]
    space = axis.get_window_extent().width / DIGIT
    longest = max(map(len, labels)) + 1
    step = max(1, math.ceil(len(labels) * longest / space))
    axis.set_xticks(values[::step], labels[::step], fontsize=8)
    axis.set_xticks([], minor=True)


def _write_out_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: 0.5 and 20, not powers of ten."""
    low, high = axis.get_ylim()
    is_short = high < 50 * low

    def label(value: float, place: int) -> str:
        first = f"{value:.0e}"[0]
        return f"{value:g}" if first == "1" or (is_short and first in "25") else ""

    axis.yaxis.set_major_formatter(label)
    axis.yaxis.set_minor_formatter(label)


def _draw_bars(axis: Any, panel: Panel) -> None:
    count = len(panel["series"])
    width = 0.8 / count
    for number, (line, style) in enumerate(
        zip(panel["series"], _styles(panel["series"]), strict=True)
    ):
        places = [group + (number - (count - 1) / 2) * width for group in range(len(line["y"]))]
        heights = [math.nan if value is None else value for value in line["y"]]
        spread = [value or 0 for value in line["spread"]] if line.get("spread") else None
        hatch = "//" if line.get("control") else None
        axis.bar(
            places,
            heights,
            0.92 * width,
            yerr=spread,
            capsize=2,
            color=style["color"],
            label=line["name"],
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
        )
    axis.set_xticks(range(len(panel["labels"])), panel["labels"], fontsize=8)
    axis.tick_params(axis="x", length=0)
    if panel.get("log"):
        axis.set_yscale("log")
        _write_out_numbers(axis)
    _draw_levels(axis, panel)
    low, high = axis.get_ylim()
    values = [value for line in panel["series"] for value in line["y"] if value is not None]
    if panel.get("zoom") and values:  # differences between long bars would not be seen
        values += panel.get("levels", {}).values()
        space = (max(values) - min(values)) or 1.0
        low, high = min(values) - 0.25 * space, max(values) + 0.15 * space
    margin = 0.25 * (high - low) if count > 1 else 0.0  # for the legend
    axis.set_ylim(low, high + margin)
    axis.set_ylabel(panel["y"])
    _add_legend(axis, panel)


def _draw_levels(axis: Any, panel: Panel) -> None:
    for name, y in panel.get("levels", {}).items():
        axis.axhline(y, color=GREY, linestyle="--", linewidth=1.2)
        right = axis.get_yaxis_transform()
        style = {"ha": "right", "va": "bottom", "fontsize": 8, "color": INK}
        ground = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.6}
        axis.text(0.995, y, name, transform=right, bbox=ground, **style)


def _add_legend(axis: Any, panel: Panel) -> None:
    axis.grid(axis="y", color="#eeeeee")
    axis.set_axisbelow(True)
    several = len(panel["series"]) > 1
    if several or panel["series"][0]["name"]:
        place = {"loc": "upper left", "ncols": 2} if panel["kind"] == "bars" else {}
        axis.legend(fontsize=7.5, handlelength=1.8, borderaxespad=0.2, **place)


def _draw_heat(axis: Any, panel: Panel) -> None:
    table = [[math.nan if v is None else v for v in row] for row in panel["values"]]
    finite = [value for row in table for value in row if math.isfinite(value)]
    low, high = panel.get("limits", (min(finite, default=0), max(finite, default=1)))
    axis.imshow(table, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    middle = (low + high) / 2
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            if math.isfinite(value):
                color = INK if value > middle else "white"
                text = f"{value:.{panel.get('digits', 2)}f}"
                axis.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(panel["columns"])), panel["columns"], fontsize=8)
    axis.set_yticks(range(len(panel["rows"])), panel["rows"], fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(panel.get("x", ""))
    axis.set_ylabel(panel.get("y", ""))
