"""Pictures of a run. The only room that imports matplotlib, which is optional: `pip install -e .[plot]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..formats import atomic_file

INK, QUIET, WARM, COOL = "#222222", "#b0b0b0", "#c8553d", "#2a6f97"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install -e .[plot]") from None
    matplotlib.use("agg")  # files only: no window, no display
    import matplotlib.pyplot as plt

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
    }
    plt.rcParams.update(
        {
            **style,
            "axes.titlesize": 9,
            "legend.frameon": False,
            "figure.dpi": 150,
            "svg.hashsalt": "0",
        }
    )
    return plt


def available() -> bool:
    """Can pictures be drawn here?"""
    try:
        _pyplot()
    except ConfigError:
        return False
    return True


def _save(plt: Any, figure: Any, path: Path) -> None:
    """Write the picture whole, or leave what was there; the figure is closed either way."""
    try:
        with atomic_file(path) as file:
            figure.savefig(file, format=path.suffix[1:])
    finally:
        plt.close(figure)


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    """A running mean of up to `window` values back."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return np.asarray((total[stop] - total[start]) / (stop - start))


def loss_curves(
    path: Path, stages: Mapping[str, tuple[Sequence[float], Sequence[tuple[int, float]]]]
) -> None:
    """One panel a stage, side by side: bits per byte of every step, their running mean, and the held-out text.

    stages   title -> (bits per byte of each step, [(step, bits per byte held out), ...])
    """
    plt = _pyplot()
    widths = [max(len(losses), 1) for losses, _ in stages.values()]
    figure, axes = plt.subplots(
        1, len(stages), figsize=(9, 3.4), sharey=True, squeeze=False, width_ratios=widths
    )
    for axis, (title, (losses, held_out)) in zip(axes[0], stages.items(), strict=True):
        axis.plot(losses, color=QUIET, linewidth=0.6)
        axis.plot(
            _smooth(losses, max(1, len(losses) // 40)), color=COOL, linewidth=1.6, label="training"
        )
        if held_out:
            steps, values = zip(*held_out, strict=True)
            axis.plot(
                steps,
                values,
                color=WARM,
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                label="held out (its first 20 kB)",
            )
            axis.annotate(
                f"{values[-1]:.2f}",
                (steps[-1], values[-1]),
                (3, 5),
                textcoords="offset points",
                color=WARM,
            )
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("bits per byte")
    axes[0][0].legend(loc="upper right")
    figure.tight_layout()
    _save(plt, figure, path)


def delta_spectrum(
    path: Path, layers: Mapping[str, tuple[np.ndarray, np.ndarray]], formula: str = "dW = s B A"
) -> None:
    """Small multiples, a row a block and a column a projection: singular values of dW in front of those of W.

    layers   module path ("model.layers.0.self_attn.q_proj") -> (singular values of W, those of dW), each descending
    """
    plt = _pyplot()
    places = {name: _place(name) for name in layers}
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    size = (max(5.2, 1.35 * len(kinds) + 0.8), 1.15 * len(blocks) + 0.9)
    figure, axes = plt.subplots(
        len(blocks), len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    floor = min(
        (float(d[d > d[0] * 1e-3].min()) for _, d in layers.values() if d.size and d[0] > 0),
        default=1e-3,
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for name, (of_weight, of_delta) in layers.items():
        block, kind = places[name]
        axis = axes[blocks.index(block)][kinds.index(kind)]
        axis.set_visible(True)
        axis.fill_between(
            np.arange(1, len(of_weight) + 1), of_weight, floor / 2, color="#dddddd", linewidth=0
        )
        axis.plot(
            np.arange(1, len(of_delta) + 1),
            np.maximum(of_delta, floor / 2),
            color=WARM,
            marker=".",
            markersize=4,
            linewidth=1,
        )
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.tick_params(labelsize=7)
        if block == min(b for b, k in places.values() if k == kind):  # the first of its column
            axis.set_title(kind, fontsize=8)
        if kind == min((k for b, k in places.values() if b == block), key=kinds.index):
            axis.set_ylabel(f"layer {block}" if block >= 0 else "", fontsize=8)
    tops = [float(values.max()) for pair in layers.values() for values in pair if values.size]
    axes[0][0].set_ylim(floor / 2, 1.5 * max(max(tops, default=1.0), floor))  # one scale for all
    figure.suptitle(
        f"Singular values by index: of W (grey) and of {formula} (red)",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.tight_layout()
    _save(plt, figure, path)


def heat_table(
    path: Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    ylabel: str = "",
) -> None:
    """A table whose cells are the darker the larger; the best of a column, its smallest, is framed.

    values   (rows, columns)
    """
    plt = _pyplot()
    figure, axis = plt.subplots(
        figsize=(1.0 * len(columns) + 2.0, 0.42 * len(rows) + 1.1), layout="constrained"
    )
    axis.imshow(values, cmap="Blues", aspect="auto")
    middle = (values.max() + values.min()) / 2
    for i, j in np.ndindex(values.shape):
        color = "white" if values[i, j] > middle else INK
        axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=color)
        if values[i, j] == values[:, j].min():
            frame = {"fill": False, "edgecolor": WARM, "linewidth": 1.8}
            axis.add_patch(plt.Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, **frame))
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, loc="left")
    axis.set_ylabel(ylabel)
    _save(plt, figure, path)


def rank_allocation(
    path: Path, history: Sequence[tuple[int, Mapping[str, int]]], steps: int
) -> None:
    """Who keeps how many ranks: a row a layer, a column a step, the darker the more; above it their mean, the budget.

    history   [(step, ranks by layer) of each allocation]; they stand until the next, the last to the end
    steps     of the run
    """
    plt = _pyplot()
    places = {name: _place(name) for name in history[0][1]} if history else {}
    order = sorted(places, key=lambda name: places[name][0])  # by block; in a block as they come
    edges = (
        [step for step, _ in history] + [max(steps, history[-1][0] + 1)]
        if history
        else [0, max(steps, 1)]
    )
    ranks = np.array([[found[name] for name in order] for _, found in history], float).reshape(
        len(edges) - 1, -1
    )
    height = max(0.19 * len(order), 0.6)
    figure, (above, below) = plt.subplots(
        2,
        1,
        figsize=(8, height + 1.9),
        sharex=True,
        height_ratios=(0.9, height),
        layout="constrained",
    )
    if order:
        above.stairs(ranks.mean(axis=1), edges, color=INK, linewidth=1.2, baseline=None)
        rows = np.arange(len(order) + 1)
        picture = below.pcolormesh(
            edges, rows, ranks.T, cmap="Blues", vmin=0, vmax=max(ranks.max(), 1)
        )
        figure.colorbar(
            picture, ax=below, label="rank", ticks=range(int(ranks.max()) + 1), pad=0.06, aspect=30
        )
        for row, rank in enumerate(ranks[-1]):
            below.text(
                1.008,
                row + 0.5,
                f"{rank:.0f}",
                transform=below.get_yaxis_transform(),
                va="center",
                fontsize=7,
            )
    blocks = [places[name][0] for name in order]
    for row in range(1, len(order)):
        if blocks[row] != blocks[row - 1]:
            below.axhline(row, color="white", linewidth=2.5)
    labels = [
        f"{block} {kind}" if block >= 0 else kind
        for block, kind in (places[name] for name in order)
    ]
    below.set_yticks(np.arange(len(order)) + 0.5, labels, fontsize=7)
    below.invert_yaxis()
    below.tick_params(axis="y", length=0)
    below.spines[["left", "bottom"]].set_visible(False)
    below.set_xlabel("step")
    above.set_ylim(bottom=0)
    above.set_title("Mean rank of a layer", loc="left")
    below.set_title("Ranks by block and layer; at the right how many are left", loc="left")
    _save(plt, figure, path)


def _place(name: str) -> tuple[int, str]:
    """(number of the block or -1, last part of the name)"""
    parts = name.split(".")
    return next((int(part) for part in parts if part.isdecimal()), -1), parts[-1]


def spectra(path: Path, layers: Mapping[str, Sequence[float] | None]) -> None:
    """The singular values of each layer's dW, falling, on a logarithmic axis; a colour for each kind of layer.

    layers   path of a layer -> its values, or None where they are not finite: that one is left out
    """
    plt = _pyplot()
    kinds: dict[str, list[list[float]]] = {}
    for name, values in layers.items():
        above = [value for value in values or () if value > 0]
        if above:
            kinds.setdefault(name.rpartition(".")[2], []).append(above)
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for i, (kind, lines) in enumerate(sorted(kinds.items())):
        colour = plt.get_cmap("viridis")(i / len(kinds))
        for n, values in enumerate(lines):
            label = "" if n else kind.replace("$", r"\$")
            axis.plot(
                range(1, len(values) + 1),
                values,
                color=colour,
                lw=0.9,
                marker=".",
                ms=3,
                label=label,
            )
    axis.set(
        yscale="log",
        xlabel="i",
        ylabel="singular value i of dW",
        title="How many directions each update uses",
    )
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # there is no value 1.5
    if kinds:
        axis.legend()
    _save(plt, figure, path)
