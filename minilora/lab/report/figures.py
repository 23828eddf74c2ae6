"""The figures of a report: what Plotly draws, in plain data, with words and a table for each.

A colour is the name of one of the page's colours, such as "warm": the page puts in the shade that
fits a light or a dark screen. Texts in a chart go through `label`, or are the positions of a
control, which the page writes outside of the chart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from .cleaning import LONGEST_LABEL, label
from .content import (
    Curve,
    Intruders,
    LayerMap,
    RankCurve,
    Report,
    Row,
    Scaling,
    Spectrum,
    Training,
)

Trace = dict[str, Any]
Number = float | None

MOST_POINTS = 1_000  # of a curve; more are averaged
HEIGHT = 340
MINUS = "\N{MINUS SIGN}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One position of a control: what it says, and the points that change, by trace."""

    name: str
    says: str
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
    short = [float(f"{value:.{digits}g}") if is_known(value) else None for value in values]
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


# ---- losses and forgetting -----------------------------------------------------------------------

LINES: list[dict[str, Any]] = [  # the second curve, the third ...
    {"line": {"color": "warm", "width": 2}, "marker": {"size": 6}},
    {"line": {"color": "ink", "width": 1.5, "dash": "dash"}, "marker": {"size": 6, "symbol": 1}},
    {"line": {"color": "cool", "width": 1.5, "dash": "dot"}, "marker": {"size": 6, "symbol": 2}},
]


def thin(curve: Curve) -> tuple[Curve, int]:
    """(the curve in at most MOST_POINTS points, steps in each: a point is their mean)."""
    count = len(curve.steps)
    width = max(1, math.ceil(count / MOST_POINTS))
    steps, values = [], []
    for start in range(0, count, width):
        group = known(curve.values[start : start + width])
        steps.append(curve.steps[min(start + width, count) - 1])
        values.append(sum(group) / len(group) if group else None)
    return Curve(curve.name, steps, values), width


def running_mean(values: Row) -> Row:
    """The mean of each value and those before it, over a fortieth of all."""
    window = max(1, len(values) // 40)
    means: Row = []
    for stop in range(1, len(values) + 1):
        group = known(values[max(0, stop - window) : stop])
        means.append(sum(group) / len(group) if group else None)
    return means


def draw_losses(training: Training) -> Figure:
    """The loss of each step and its running mean, and the losses of held-out texts."""
    thinned = [thin(curve) for curve in training.curves]
    traces = []
    for i, (curve, _) in enumerate(thinned):
        points = {"x": curve.steps, "name": label(curve.name)}
        if i or len(curve.steps) < 40:
            style = LINES[(i - 1) % len(LINES)] if i else {"line": {"color": "cool", "width": 2}}
            mode = "lines+markers" if len(curve.steps) <= 60 else "lines"
            traces.append(points | {"y": rounded(curve.values), "mode": mode} | style)
            continue
        steps = points | {"y": rounded(curve.values), "mode": "lines", "showlegend": False}
        mean = points | {"y": rounded(running_mean(curve.values)), "mode": "lines"}
        traces.append(steps | {"line": {"color": "quiet", "width": 0.8}, "hoverinfo": "skip"})
        traces.append(mean | {"line": {"color": "cool", "width": 2}})
    told = [_tell_curve(curve, training.unit) for curve in training.curves]
    widths = {f"each point of {c.name} is the mean of {n} steps" for c, n in thinned if n > 1}
    alt = "Line chart of losses over steps. " + " ".join([*told, *sorted(widths)])
    header = ["step", *(curve.name for curve, _ in thinned)]
    return Figure(
        name="losses",
        alt=alt,
        traces=traces,
        layout=layout(
            axis("step", showgrid=False), axis(label(training.unit)), hovermode="x unified"
        ),
        header=header,
        rows=_join([curve for curve, _ in thinned]),
    )


def _tell_curve(curve: Curve, unit: str) -> str:
    points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if is_known(v)]
    if not points:
        return f"{curve.name}: no values."
    (first, before), (last, after) = points[0], points[-1]
    return (
        f"{curve.name}: {show(before)} {unit} at step {first}, {show(after)} at step {last}; "
        f"lowest {show(min(value for _, value in points))}."
    )


def _join(curves: list[Curve]) -> list[list[str]]:
    """A row of all curves' values for each step of any."""
    columns = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    steps = sorted(set().union(*columns))
    return [[str(step), *(show(column.get(step)) for column in columns)] for step in steps]


def draw_forgetting(training: Training) -> Figure | None:
    """The second text's loss against the held-out text's; None without both at two steps."""
    if len(training.curves) < 3:
        return None
    held_out, second = training.curves[1:3]
    of_second = dict(zip(second.steps, second.values, strict=True))
    points = [
        (step, learned, of_second[step])
        for step, learned in zip(held_out.steps, held_out.values, strict=True)
        if is_known(learned) and is_known(of_second.get(step))
    ]
    if len(points) < 2:
        return None
    names = [f"step {step}" for step, _, _ in points]
    traces: list[Trace] = [
        {
            "x": rounded(learned for _, learned, _ in points),
            "y": rounded(old for _, _, old in points),
            "name": "evaluations",
            "text": names,
            "mode": "lines+markers",
            "line": {"color": "quiet", "width": 1.2},
            "marker": {"color": "cool", "size": 7},
            "hovertemplate": "%{text}: %{x}, %{y}<extra></extra>",
        },
        _end(points[0], "circle-open", "start"),
        _end(points[-1], "diamond", "end"),
    ]
    change = points[-1][1] - points[0][1], (points[-1][2] or 0.0) - (points[0][2] or 0.0)
    alt = (
        f"Path of {len(points)} evaluations: {held_out.name} changes by {signed(change[0])} and "
        f"{second.name} by {signed(change[1])} {training.unit} from the first to the last."
    )
    return Figure(
        name="forgetting",
        alt=alt,
        traces=traces,
        layout=layout(
            axis(f"{label(held_out.name)}, {label(training.unit)}"),
            axis(f"{label(second.name)}, {label(training.unit)}"),
        ),
        header=["step", held_out.name, second.name],
        rows=[[str(step), show(learned), show(old)] for step, learned, old in points],
    )


def _end(point: tuple[int, Number, Number], symbol: str, name: str) -> Trace:
    step, x, y = point
    return {
        "x": rounded([x]),
        "y": rounded([y]),
        "mode": "markers",
        "name": f"{name}, step {step}",
        "marker": {
            "color": "warm",
            "size": 11,
            "symbol": symbol,
            "line": {"color": "warm", "width": 2},
        },
    }


# ---- layer by layer ------------------------------------------------------------------------------


def draw_map(table: LayerMap, index: int) -> Figure:
    """One number for each kind of layer (columns) in each block (rows), written in its cell."""
    by_block = [[row[j] for row in table.values] for j in range(len(table.blocks))]
    values = known(value for row in by_block for value in row)
    largest = max(map(abs, values), default=0.0)
    exponent = _common_exponent(largest)
    decimals = _decimals(values, largest / 10.0**exponent, table.digits)
    cells = [[_cell(value, exponent, decimals) for value in row] for row in by_block]
    lowest = min(values, default=0.0)
    hover = [
        [
            f"{label(table.kinds[i])}, {label(table.blocks[j])}: {show(value, table.digits)}"
            for i, value in enumerate(row)
        ]
        for j, row in enumerate(by_block)
    ]
    trace = {
        "type": "heatmap",
        "z": [rounded(row) for row in by_block],
        "x": list(range(len(table.kinds))),
        "y": list(range(len(table.blocks))),
        "text": cells,
        "texttemplate": "%{text}",
        "textfont": {"color": "ink"},
        "hovertext": hover,
        "hoverinfo": "text",
        "hoverongaps": False,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
    } | _scale(lowest, largest)
    rows = len(table.blocks)
    longest = max((len(label(kind, 20)) for kind in table.kinds), default=0)
    plain: dict[str, Any] = {"showgrid": False, "ticks": "", "showline": False}
    alt = f"Heat map of {table.title}: {len(table.kinds)} kinds of layers in {rows} blocks. "
    alt += _tell_extremes(table)
    return Figure(
        name=f"map-{index}",
        alt=alt,
        traces=[trace],
        layout=layout(
            axis(side="top", tickangle=-90, **plain, **ticks(table.kinds, 20)),
            axis(autorange="reversed", **plain, **ticks(table.blocks, 10)),
            height=28 * max(rows, 1) + 7 * longest + 32,
        ),
        header=["block", *table.kinds],
        rows=[
            [table.blocks[j], *(show(value, table.digits) for value in row)]
            for j, row in enumerate(by_block)
        ],
        unit=f"1e{exponent}" if exponent else "",
    )


def _common_exponent(largest: float) -> int:
    """0, or a multiple of 3: the power of ten that is taken out of all cells of a map."""
    if not largest or 0.01 <= largest < 10_000:
        return 0
    return max(3 * math.floor(math.log10(largest) / 3), -300)  # 10.0**-324 is 0


def _decimals(values: list[float], largest: float, digits: int) -> int:
    """Decimals of all cells of a map, so that they are easily compared: those of the largest."""
    if all(value == round(value) for value in values):
        return 0
    before = math.floor(math.log10(largest)) + 1
    return min(max(0, digits - before), 8)


def _cell(value: Number, exponent: int, decimals: int) -> str:
    if not is_known(value):
        return ""
    return f"{value / 10.0**exponent:.{decimals}f}"


def _scale(lowest: float, largest: float) -> Trace:
    """One hue up to the largest value; with negative numbers, one hue for each sign."""
    if lowest >= 0:
        scale = [[0, "cell-low"], [1, "cell-high"]]
        return {"colorscale": scale, "zmin": 0, "zmax": largest or 1.0}
    scale = [[0, "cell-negative"], [0.5, "cell-low"], [1, "cell-high"]]
    return {"colorscale": scale, "zmin": -largest, "zmax": largest}


def _tell_extremes(table: LayerMap) -> str:
    places = [
        (value, f"{table.kinds[i]}, block {table.blocks[j]}")
        for i, row in enumerate(table.values)
        for j, value in enumerate(row)
        if is_known(value)
    ]
    if not places:
        return "No values."
    (low, where_low), (high, where_high) = min(places), max(places)
    return (
        f"Lowest {show(low, table.digits)} ({where_low}), "
        f"highest {show(high, table.digits)} ({where_high})."
    )


# ---- singular values -----------------------------------------------------------------------------


def draw_spectra(spectra: list[Spectrum]) -> Figure:
    """The singular values of one layer's dW over those of W; a control chooses the layer."""
    choices = [
        Choice(
            name=spectrum.layer,
            says=_tell_spectrum(spectrum),
            x=[_indices(spectrum.weight), _indices(spectrum.update)],
            y=[_positive(spectrum.weight), _positive(spectrum.update)],
        )
        for spectrum in spectra
    ]
    first = choices[0]
    traces: list[Trace] = [
        {
            "name": "W, the largest",
            "mode": "lines+markers",
            "line": {"color": "quiet", "width": 1.5},
            "marker": {"size": 5, "symbol": "square"},
        },
        {
            "name": "dW",
            "mode": "lines+markers",
            "line": {"color": "warm", "width": 2},
            "marker": {"size": 7},
        },
    ]
    for trace, x, y in zip(traces, first.x, first.y, strict=True):
        trace |= {"x": x, "y": y}
    return Figure(
        name="spectrum",
        alt="Line chart, logarithmic: singular values of dW and the largest of W, by index.",
        traces=traces,
        layout=layout(
            axis("index", showgrid=False, rangemode="tozero", tickformat="d"),
            axis("singular value", type="log", tickformat="~g"),
            hovermode="x unified",
        ),
        header=["layer", "singular values of dW", "the largest of W"],
        rows=[
            [spectrum.layer, _list(spectrum.update), _list(spectrum.weight)] for spectrum in spectra
        ],
        changed=[0, 1],
        choices=choices,
    )


def _indices(values: Sequence[Number]) -> list[int]:
    return list(range(1, len(values) + 1))


def _positive(values: Sequence[Number]) -> Row:
    """The values that a logarithmic axis can show."""
    return rounded(value if is_known(value) and value > 0 else None for value in values)


def _list(values: Sequence[Number]) -> str:
    return "  ".join(show(value) for value in values)


def _tell_spectrum(spectrum: Spectrum) -> str:
    update = known(spectrum.update)
    used = [value for value in update if value > 0]
    if not used:
        return f"{len(update)} singular values of dW, all 0."
    words = f"{len(used)} singular values of dW"
    if len(used) < len(update):
        words += f" (and {len(update) - len(used)} that are 0)"
    words += f", from {show(used[0], 3)} to {show(used[-1], 3)}"
    weight = known(spectrum.weight)
    if weight:
        words += f"; the largest of W is {show(weight[0], 3)}"
    return f"{words}."


# ---- rank ----------------------------------------------------------------------------------------


def draw_rank(curve: RankCurve) -> Figure:
    """The loss that is left at each rank, and the energy; a control chooses the rank."""
    places = list(range(len(curve.ranks)))
    losses = rounded(curve.losses)
    traces: list[Trace] = [
        {
            "x": places,
            "y": losses,
            "mode": "lines+markers",
            "line": {"color": "cool", "width": 2},
            "error_y": {"array": rounded(curve.errors), "color": "cool", "thickness": 1.2},
            "name": "loss",
            "text": [f"rank {rank}" for rank in curve.ranks],
            "hovertemplate": "%{text}: %{y}<extra></extra>",
        },
        _ring("x", "y"),
        {
            "type": "bar",
            "x": places,
            "y": rounded(100 * energy for energy in curve.energies),
            "yaxis": "y2",
            "marker": {"color": "quiet"},
            "width": 0.5,
            "name": "energy",
            "text": [f"rank {rank}" for rank in curve.ranks],
            "textposition": "none",
            "hovertemplate": "%{text}: %{y} % of the energy<extra></extra>",
        },
        _ring("x", "y2"),
    ]
    choices = [
        Choice(
            name=f"{rank}",
            says=_tell_rank(curve, i),
            x=[[i], [i]],
            y=[rounded([curve.losses[i]]), rounded([100 * curve.energies[i]])],
        )
        for i, rank in enumerate(curve.ranks)
    ]
    start = len(choices) - 1
    for trace, x, y in zip((traces[1], traces[3]), choices[start].x, choices[start].y, strict=True):
        trace |= {"x": x, "y": y}
    alt = (
        f"Line chart of the loss on {curve.text} against the rank, from {show(curve.losses[0])} "
        f"{curve.unit} at rank {curve.ranks[0]} to {show(curve.losses[-1])} at rank "
        f"{curve.ranks[-1]}; below it, bars for the share of energy that is left."
    )
    return Figure(
        name="rank",
        alt=alt,
        traces=traces,
        layout=layout(
            axis("rank", showgrid=False, anchor="y2", **ticks([str(r) for r in curve.ranks])),
            axis(label(curve.unit), domain=[0.38, 1]),
            yaxis2=axis("energy, %", domain=[0, 0.26], range=[0, 112], tickvals=[0, 50, 100]),
            showlegend=False,
            height=420,
        ),
        header=["rank", curve.unit, "standard error", "energy"],
        rows=[
            [str(rank), show(loss), show(error, 2), percent(energy)]
            for rank, loss, error, energy in zip(
                curve.ranks, curve.losses, curve.errors, curve.energies, strict=True
            )
        ],
        changed=[1, 3],
        choices=choices,
        start=start,
    )


def _ring(x: str, y: str) -> Trace:
    """The mark of what a control has chosen."""
    return {
        "xaxis": x,
        "yaxis": y,
        "mode": "markers",
        "marker": {
            "symbol": "circle-open",
            "size": 15,
            "color": "warm",
            "line": {"color": "warm", "width": 3},
        },
        "cliponaxis": False,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _tell_rank(curve: RankCurve, i: int) -> str:
    """What the slider says: the loss, the share of the gain, the energy."""
    base, loss, whole = curve.losses[0], curve.losses[i], curve.losses[-1]
    words = f"Rank {curve.ranks[i]}: {show(loss)} {curve.unit}"
    error = curve.errors[i]
    if error:
        words += f" \N{PLUS-MINUS SIGN} {show(error, 2)}"
    if base > whole and curve.ranks[0] == 0:
        words += f", {percent((base - loss) / (base - whole))} of the gain"
    return f"{words}, {percent(curve.energies[i])} of the energy."


# ---- intruders -----------------------------------------------------------------------------------

SERIES: list[dict[str, Any]] = [
    {"line": {"color": "warm", "width": 2}, "marker": {"size": 7}},
    {"line": {"color": "muted", "width": 2, "dash": "dash"}, "marker": {"size": 7, "symbol": 1}},
    {"line": {"color": "cool", "width": 2, "dash": "dot"}, "marker": {"size": 8, "symbol": 2}},
]


def draw_counts(intruders: Intruders) -> Figure:
    """How many directions are intruders, for each limit of |cos|."""
    places = list(range(len(intruders.limits)))
    chosen = ["warm" if limit == intruders.limit else "quiet" for limit in intruders.limits]
    told = ", ".join(
        f"{count} below {show(limit)}"
        for limit, count in zip(intruders.limits, intruders.counts, strict=True)
    )
    return Figure(
        name="intruder-counts",
        alt=f"Bar chart of intruders among {intruders.examined} directions: {told}.",
        traces=[
            {
                "type": "bar",
                "x": places,
                "y": intruders.counts,
                "text": [str(count) for count in intruders.counts],
                "textposition": "outside",
                "cliponaxis": False,
                "marker": {"color": chosen},
                "width": 0.6,
                "hoverinfo": "skip",
            }
        ],
        layout=layout(
            axis("limit of |cos|", showgrid=False, **ticks([show(x) for x in intruders.limits])),
            axis("intruders", rangemode="tozero"),
            height=280,
        ),
        header=["limit of |cos|", "intruders"],
        rows=[
            [show(limit), str(count)]
            for limit, count in zip(intruders.limits, intruders.counts, strict=True)
        ],
    )


def draw_scalings(intruders: Intruders) -> Figure | None:
    """The losses with parts of dW multiplied by a factor, which a control chooses."""
    scalings = [_with_old(scaling) for scaling in intruders.scalings]
    factors = sorted({factor for scaling in scalings for factor in scaling.factors})
    if not factors:
        return None
    has_old = any(known(scaling.old) for scaling in scalings)
    panels = ["y", "y2"] if has_old else ["y"]
    traces: list[Trace] = []
    for panel in panels:
        for i, scaling in enumerate(scalings):
            values = scaling.new if panel == "y" else scaling.old
            traces.append(
                {
                    "x": rounded(scaling.factors),
                    "y": rounded(values),
                    "yaxis": panel,
                    "mode": "lines+markers",
                    "name": label(scaling.name),
                    "legendgroup": str(i),
                    "showlegend": panel == "y",
                }
                | SERIES[i % len(SERIES)]
            )
    changed = []
    for panel in panels:
        changed.append(len(traces))
        traces.append(_ring("x", panel))
    choices = [_choose_factor(factor, scalings, has_old, intruders.unit) for factor in factors]
    start = factors.index(1.0) if 1.0 in factors else len(factors) - 1
    for i, x, y in zip(changed, choices[start].x, choices[start].y, strict=True):
        traces[i] |= {"x": x, "y": y}
    unit = label(intruders.unit)
    new = axis(f"learned, {unit}", domain=[0.55, 1] if has_old else [0, 1])
    options: dict[str, Any] = {"height": 520 if has_old else HEIGHT}
    if has_old:
        options["yaxis2"] = axis(f"second, {unit}", domain=[0, 0.45])
    alt = (
        f"Line chart of losses for {len(scalings)} parts of dW that are multiplied by a factor"
        f" from {show(factors[0])} to {show(factors[-1])}: of the text that was learned"
        f"{' and, below it, of the second text' if has_old else ''}."
    )
    return Figure(
        name="scaling",
        alt=alt,
        traces=traces,
        layout=layout(
            axis("factor \N{GREEK SMALL LETTER LAMDA}", anchor=panels[-1]), new, **options
        ),
        header=["part", "factor", "learned", "second"],
        rows=[
            [scaling.name, show(factor), show(new), show(old)]
            for scaling in scalings
            for factor, new, old in zip(scaling.factors, scaling.new, scaling.old, strict=True)
        ],
        changed=changed,
        choices=choices,
        start=start,
    )


def _with_old(scaling: Scaling) -> Scaling:
    """The scaling with a place for each factor's loss of the second text, if it has none."""
    return dataclasses.replace(scaling, old=scaling.old or [None] * len(scaling.factors))


def _choose_factor(factor: float, scalings: list[Scaling], has_old: bool, unit: str) -> Choice:
    """The points of all scalings at a factor."""
    new: Row = []
    old: Row = []
    told = []
    for scaling in scalings:
        if factor not in scaling.factors:
            continue
        i = scaling.factors.index(factor)
        new.append(scaling.new[i])
        old.append(scaling.old[i])
        second = f" / {show(scaling.old[i])}" if is_known(scaling.old[i]) else ""
        told.append(f"{scaling.name} {show(scaling.new[i])}{second}")
    count = 2 if has_old else 1
    x: list[list[Any]] = [rounded([factor]) * len(new)] * count
    y: list[list[Any]] = [rounded(new), rounded(old)][:count]
    name = show(factor)
    what = f"learned / second text, {unit}" if has_old else unit
    says = f"\N{GREEK SMALL LETTER LAMDA} = {name} ({what}): {', '.join(told)}."
    return Choice(name=name, says=says, x=x, y=y)


# ---- all -----------------------------------------------------------------------------------------


def draw_all(report: Report) -> dict[str, list[Figure]]:
    """The figures of each part of a cleaned report; a part that is missing has none."""
    drawn: dict[str, list[Figure | None]] = {
        "training": [],
        "maps": [draw_map(table, i) for i, table in enumerate(report.maps)],
        "spectra": [draw_spectra(report.spectra)] if report.spectra else [],
        "rank_curve": [],
        "intruders": [],
    }
    if report.training and report.training.curves:
        drawn["training"] = [draw_losses(report.training), draw_forgetting(report.training)]
    if report.rank_curve and report.rank_curve.ranks:
        drawn["rank_curve"] = [draw_rank(report.rank_curve)]
    if report.intruders:
        drawn["intruders"] = [draw_counts(report.intruders), draw_scalings(report.intruders)]
    return {part: [f for f in figures if f is not None] for part, figures in drawn.items()}
