"""The charts of a report: losses and maps here, those with a control in controls.py."""

from __future__ import annotations

import math
from typing import Any

from .charts import (
    Figure,
    Number,
    Trace,
    axis,
    is_known,
    known,
    layout,
    rounded,
    show,
    signed,
    ticks,
)
from .cleaning import label
from .content import Curve, LayerMap, Report, Row, Training
from .controls import draw_counts, draw_rank, draw_scalings, draw_spectra

MOST_POINTS = 1_000  # of a curve; more are averaged

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
        if i or len(curve.steps) < 80:  # the mean would be that of one step
            style = LINES[(i - 1) % len(LINES)] if i else {"line": {"color": "cool", "width": 2}}
            mode = "lines+markers" if len(curve.steps) <= 60 else "lines"
            traces.append(points | {"y": rounded(curve.values), "mode": mode} | style)
            continue
        steps = points | {"y": rounded(curve.values), "mode": "lines", "showlegend": False}
        mean = points | {"y": rounded(running_mean(curve.values)), "mode": "lines"}
        traces.append(steps | {"line": {"color": "quiet", "width": 0.8}, "hoverinfo": "skip"})
        traces.append(mean | {"line": {"color": "cool", "width": 2}})
    sentences = [_describe_curve(curve, training.unit) for curve in training.curves]
    widths = {f"each point of {c.name} is the mean of {n} steps" for c, n in thinned if n > 1}
    alt = "Line chart of losses over steps. " + " ".join([*sentences, *sorted(widths)])
    header = ["step", *(curve.name for curve, _ in thinned)]
    last = max((step for curve, _ in thinned for step in curve.steps), default=0)
    whole = {"dtick": 1} if last <= 10 else {}  # no ticks between steps
    return Figure(
        name="losses",
        alt=alt,
        traces=traces,
        layout=layout(
            axis("step", showgrid=False, **whole), axis(label(training.unit)), hovermode="x unified"
        ),
        header=header,
        rows=_join([curve for curve, _ in thinned]),
    )


def _describe_curve(curve: Curve, unit: str) -> str:
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
    alt += _describe_extremes(table)
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


def _describe_extremes(table: LayerMap) -> str:
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
