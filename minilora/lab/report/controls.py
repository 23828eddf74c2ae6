"""Charts in which a control chooses what is shown: a layer, a rank, or a factor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .charts import (
    HEIGHT,
    Choice,
    Figure,
    Number,
    Trace,
    axis,
    is_known,
    known,
    layout,
    percent,
    rounded,
    show,
    ticks,
)
from .cleaning import label
from .content import Intruders, RankCurve, Row, Scaling, Spectrum

# ---- singular values -----------------------------------------------------------------------------


def draw_spectra(spectra: list[Spectrum]) -> Figure:
    """The singular values of one layer's dW over those of W; a control chooses the layer."""
    choices = [
        Choice(
            name=spectrum.layer,
            description=_describe_spectrum(spectrum),
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
            axis("singular value", type="log", tickformat="~g", dtick=_log_ticks(spectra)),
            hovermode="x unified",
        ),
        header=["layer", "singular values of dW", "the largest of W"],
        rows=[
            [spectrum.layer, _list(spectrum.update), _list(spectrum.weight)] for spectrum in spectra
        ],
        changed=[0, 1],
        choices=choices,
    )


def _log_ticks(spectra: list[Spectrum]) -> str | int:
    """Ticks at 1, 2 and 5 times powers of ten ("D2"), or at powers alone if these are many."""
    values = [v for s in spectra for v in known([*s.update, *s.weight]) if v > 0]
    decades = math.log10(max(values)) - math.log10(min(values)) if values else 0.0
    return "D2" if decades <= 6 else 1


def _indices(values: Sequence[Number]) -> list[int]:
    return list(range(1, len(values) + 1))


def _positive(values: Sequence[Number]) -> Row:
    """The values that a logarithmic axis can show."""
    return rounded(value if is_known(value) and value > 0 else None for value in values)


def _list(values: Sequence[Number]) -> str:
    return "  ".join(show(value) for value in values)


def _describe_spectrum(spectrum: Spectrum) -> str:
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
            description=_describe_rank(curve, i),
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


def _describe_rank(curve: RankCurve, i: int) -> str:
    """The loss at a rank, the share of the gain, and the energy, in words."""
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
    parts = ", ".join(
        f"{count} below {show(limit)}"
        for limit, count in zip(intruders.limits, intruders.counts, strict=True)
    )
    return Figure(
        name="intruder-counts",
        alt=f"Bar chart of intruders among {intruders.examined} directions: {parts}.",
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
    parts = []
    for scaling in scalings:
        if factor not in scaling.factors:
            continue
        i = scaling.factors.index(factor)
        new.append(scaling.new[i])
        old.append(scaling.old[i])
        second = f" / {show(scaling.old[i])}" if is_known(scaling.old[i]) else ""
        parts.append(f"{scaling.name} {show(scaling.new[i])}{second}")
    count = 2 if has_old else 1
    x: list[list[Any]] = [rounded([factor]) * len(new)] * count
    y: list[list[Any]] = [rounded(new), rounded(old)][:count]
    name = show(factor)
    what = f"learned / second text, {unit}" if has_old else unit
    description = f"\N{GREEK SMALL LETTER LAMDA} = {name} ({what}): {', '.join(parts)}."
    return Choice(name=name, description=description, x=x, y=y)
