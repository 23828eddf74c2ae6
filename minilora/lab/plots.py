"""Pictures of a run.

Only this file imports matplotlib, which is optional: `pip install -e .[plot]`. It draws without
pyplot and in a style of its own, so that the backend, the settings and the figures of a notebook
or a program that uses matplotlib stay as they are.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np

from ..display import Picture
from ..errors import ConfigError, shorten
from ..formats import atomic_file
from .panels import Panel, draw

Rest = ParamSpec("Rest")
File = str | Path

INK = "#222222"
QUIET = "#b0b0b0"
PALE = "#dddddd"
WARM = "#c8553d"
COOL = "#2a6f97"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "figure.dpi": 150,
    "svg.hashsalt": "0",
}


def _matplotlib() -> Any:
    """matplotlib, whatever backend is chosen. ConfigError if it cannot draw here."""
    try:
        if "matplotlib" not in sys.modules:
            _import_with_any_backend()
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError:
        raise ConfigError("matplotlib is missing: pip install -e .[plot]") from None
    except Exception as error:  # its settings, its fonts or its cache: anything may be wrong there
        text = f"{type(error).__name__}: {error}"
        raise ConfigError(f"matplotlib cannot be used here: {shorten(text)}") from error
    return matplotlib


def _import_with_any_backend() -> None:
    """Import matplotlib with the backend of MPLBACKEND, or as without it if it names none.

    matplotlib itself could not be imported with a name that it does not know.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def styled_pyplot() -> Any:
    """pyplot in the style of these pictures, for a script that draws its own."""
    _matplotlib()
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def _styled(
    draw: Callable[Concatenate[Any, Rest], None],
) -> Callable[Concatenate[File, Rest], Picture]:
    """A function that draws into a file with STYLE, and returns the picture, for a notebook.

    matplotlib's settings are as before when it returns.
    """

    @functools.wraps(draw)
    def styled(path: File, /, *arguments: Rest.args, **options: Rest.kwargs) -> Picture:
        with _matplotlib().rc_context(STYLE):
            draw(path, *arguments, **options)
        return Picture(path)

    return styled


def _subplots(
    rows: int = 1, columns: int = 1, *, figsize: Any, layout: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """(figure, axes), as from pyplot, which would keep the figure among those of the program."""
    figure = _matplotlib().figure.Figure(figsize=figsize, layout=layout)
    heights = options.pop("height_ratios", None)
    widths = options.pop("width_ratios", None)
    return figure, figure.subplots(
        rows, columns, height_ratios=heights, width_ratios=widths, **options
    )


def why_unavailable() -> str:
    """Why no pictures can be drawn here; empty if they can."""
    try:
        _matplotlib()
    except ConfigError as error:
        return str(error)
    return ""


def available() -> bool:
    """True if pictures can be drawn here."""
    return not why_unavailable()


def _save(figure: Any, path: str | Path) -> None:
    """Write the whole picture, or leave the file as it was."""
    path = Path(path)
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def _save_small(figure: Any, path: str | Path, source: str) -> None:
    """Write the picture as a PNG of 64 colours, a third of the size, with a text in it."""
    from PIL import Image, PngImagePlugin  # which matplotlib needs anyway

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    image = Image.open(drawn).convert("RGB").quantize(64)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Source", source)
    with atomic_file(path) as file:
        image.save(file, "png", optimize=True, pnginfo=texts)


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 values before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return np.asarray((total[stop] - total[start]) / (stop - start))


@_styled
def loss_curves(
    path: str | Path, stages: Mapping[str, tuple[Sequence[float], Sequence[tuple[int, float]]]]
) -> None:
    """Draw one panel per stage: bits per byte of each step, their running mean, and held-out text.

    stages   title -> (bits per byte of each step, [(step, bits per byte held out), ...])
    """
    widths = [max(len(losses), 1) for losses, _ in stages.values()]
    figure, axes = _subplots(
        1, len(stages), figsize=(9, 3.4), sharey=True, squeeze=False, width_ratios=widths
    )
    for axis, (title, (losses, held_out)) in zip(axes[0], stages.items(), strict=True):
        _draw_losses(axis, losses, held_out, "held out (its first 20 kB)")
        if held_out:
            end = held_out[-1]
            axis.annotate(f"{end[1]:.2f}", end, (3, 5), textcoords="offset points", color=WARM)
        axis.set_title(title, loc="left")
    first = axes[0][0]
    first.set_ylabel("bits per byte")
    first.legend(loc="upper right")
    figure.tight_layout()
    _save(figure, path)


@_styled
def losses_of_run(
    path: Path,
    title: str,
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    step: int,
    also: Sequence[tuple[int, float]] = (),
) -> None:
    """Draw the losses of one run as `loss_curves` does; a ring marks the weights that it has.

    losses, held_out   as a stage of `loss_curves`
    step               after which the run had those weights
    also               the evaluations of a second text
    """
    figure, axis = _subplots(figsize=(6, 3.4))
    _draw_losses(axis, losses, held_out, "held out")
    values = dict(held_out)
    if step in values:
        label = f"saved: step {step}, {values[step]:.2f}"
        ring = {"markersize": 9, "markerfacecolor": "none", "linewidth": 0}
        axis.plot(step, values[step], "o", color=WARM, label=label, **ring)
    if also:
        steps, bits = zip(*also, strict=True)
        axis.plot(steps, bits, "--s", color=INK, markersize=3.5, label="second text")
    axis.set_title(title, loc="left")
    axis.set_ylabel("bits per byte")
    axis.legend(loc="upper right")
    figure.tight_layout()
    _save(figure, path)


def _draw_losses(
    axis: Any, losses: Sequence[float], held_out: Sequence[tuple[int, float]], label: str
) -> None:
    """Draw the loss of each step, their running mean, and the held-out losses."""
    axis.plot(losses, color=QUIET, linewidth=0.6)
    mean = _running_mean(losses, max(1, len(losses) // 40))
    axis.plot(mean, color=COOL, linewidth=1.6, label="training")
    if held_out:
        steps, values = zip(*held_out, strict=True)
        axis.plot(steps, values, "-o", color=WARM, markersize=3.5, linewidth=1.2, label=label)
    axis.set_xlabel("step")
    axis.grid(axis="y", color="#eeeeee")
    axis.set_axisbelow(True)


@_styled
def delta_spectrum(
    path: str | Path,
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    formula: str = "dW = s B A",
) -> None:
    """Draw the singular values of dW in front of those of W: one panel per layer.

    Each block is a row, and each kind of projection is a column.

    layers   module path ("model.layers.0.self_attn.q_proj") -> (singular values of W, those of dW),
             each in descending order
    """
    places = {name: _place(name) for name in layers}
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    size = max(5.2, 1.35 * len(kinds) + 0.8), 1.15 * len(blocks) + 0.9
    figure, axes = _subplots(
        len(blocks), len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    smallest = []
    largest = []
    for of_weight, of_delta in layers.values():
        largest += [float(values.max()) for values in (of_weight, of_delta) if values.size]
        if of_delta.size and of_delta[0] > 0:
            smallest.append(float(of_delta[of_delta > of_delta[0] * 1e-3].min()))
    bottom = min(smallest, default=1e-3)
    for axis in axes.flat:
        axis.set_visible(False)
    for name, (of_weight, of_delta) in layers.items():
        block, kind = places[name]
        axis = axes[blocks.index(block)][kinds.index(kind)]
        axis.set_visible(True)
        index = np.arange(1, len(of_weight) + 1)
        axis.fill_between(index, of_weight, bottom / 2, color=PALE, linewidth=0)
        index = np.arange(1, len(of_delta) + 1)
        shown = np.maximum(of_delta, bottom / 2)
        axis.plot(index, shown, ".-", color=WARM, markersize=4, linewidth=1)
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.tick_params(labelsize=7)
        column = [b for b, k in places.values() if k == kind]
        if block == min(column):
            axis.set_title(kind, fontsize=8)
        row = [k for b, k in places.values() if b == block]
        if kind == min(row, key=kinds.index):
            axis.set_ylabel(f"layer {block}" if block >= 0 else "", fontsize=8)
    top = max(largest, default=1.0)
    axes[0][0].set_ylim(bottom / 2, 1.5 * max(top, bottom))  # one scale for all
    title = f"Singular values by index: of W (grey) and of {formula} (red)"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    _save(figure, path)


@_styled
def losses_by_setting(path: str | Path, losses: Mapping[str, Sequence[float]]) -> None:
    """Draw one row per setting: a dot for each seed's loss, their mean, and how far they spread.

    losses   setting -> held-out losses, one per seed; none if the setting failed
    """
    labels = list(losses)
    height = min(0.26 * len(labels) + 1.1, 60)  # matplotlib refuses pictures that are too large
    figure, axis = _subplots(figsize=(7, height), layout="constrained")
    best = min((float(np.mean(values)) for values in losses.values() if values), default=0.0)
    for row, values in enumerate(losses.values()):
        axis.plot(values, [row] * len(values), "o", color=QUIET, markersize=4)
        if not values:
            continue
        mean = float(np.mean(values))
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        color = WARM if mean == best else COOL
        axis.errorbar(mean, row, xerr=spread, fmt="|", color=color, markersize=9, capsize=3)
    axis.set_yticks(range(len(labels)), [label.replace("$", r"\$") for label in labels], fontsize=7)
    axis.set_ylim(len(labels) - 0.5, -0.5)  # the first setting above
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#eeeeee")
    axis.set_axisbelow(True)
    axis.set_xlabel("held-out loss")
    axis.set_title(
        "Loss by setting: runs, mean and standard deviation; red: the lowest mean", loc="left"
    )
    _save(figure, path)


@_styled
def heat_table(
    path: str | Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    ylabel: str = "",
) -> None:
    """Draw a table whose cells get darker with their value; each column's smallest is framed.

    values   (rows, columns)
    """
    size = len(columns) + 2.0, 0.42 * len(rows) + 1.1
    figure, axis = _subplots(figsize=size, layout="constrained")
    axis.imshow(values, cmap="Blues", aspect="auto")
    Rectangle = _matplotlib().patches.Rectangle
    middle = (values.max() + values.min()) / 2
    for i, j in np.ndindex(values.shape):
        value = values[i, j]
        color = "white" if value > middle else INK
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
        if value == values[:, j].min():
            corner = j - 0.48, i - 0.46
            frame = Rectangle(corner, 0.96, 0.92, fill=False, edgecolor=WARM, linewidth=1.8)
            axis.add_patch(frame)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, loc="left")
    axis.set_ylabel(ylabel)
    _save(figure, path)


@_styled
def rank_allocation(
    path: str | Path, history: Sequence[tuple[int, Mapping[str, int]]], steps: int
) -> None:
    """Draw which layers keep how many ranks: one row per layer, steps from left to right.

    More ranks are darker; above the rows is their mean, the budget.

    history   [(step, ranks by layer) of each allocation]; they stay until the next one, the last
              to the end
    steps     of the run
    """
    places = {name: _place(name) for name in history[0][1]} if history else {}
    # By block; layers of the same block in their given order.
    names = sorted(places, key=lambda name: places[name][0])
    edges = [step for step, _ in history] or [0]
    edges.append(max(steps, edges[-1] + 1))
    table = [[ranks[name] for name in names] for _, ranks in history]
    ranks = np.array(table, float).reshape(len(edges) - 1, -1)  # (allocations, layers)
    height = max(0.19 * len(names), 0.6)
    size = 8, height + 1.9
    ratios = 0.9, height
    figure, (above, below) = _subplots(
        2, 1, figsize=size, sharex=True, height_ratios=ratios, layout="constrained"
    )
    if names:
        above.stairs(ranks.mean(axis=1), edges, color=INK, linewidth=1.2, baseline=None)
        rows = np.arange(len(names) + 1)
        top = ranks.max()
        cells = below.pcolormesh(edges, rows, ranks.T, cmap="Blues", vmin=0, vmax=max(top, 1))
        ticks = range(int(top) + 1)
        figure.colorbar(cells, ax=below, label="rank", ticks=ticks, pad=0.06, aspect=30)
        right = below.get_yaxis_transform()
        for row, rank in enumerate(ranks[-1]):
            text = f"{rank:.0f}"
            below.text(1.008, row + 0.5, text, transform=right, va="center", fontsize=7)
    labels = []
    for row, name in enumerate(names):
        block, kind = places[name]
        labels.append(f"{block} {kind}" if block >= 0 else kind)
        if row and block != places[names[row - 1]][0]:
            below.axhline(row, color="white", linewidth=2.5)
    below.set_yticks(np.arange(len(names)) + 0.5, labels, fontsize=7)
    below.invert_yaxis()
    below.tick_params(axis="y", length=0)
    below.spines[["left", "bottom"]].set_visible(False)
    below.set_xlabel("step")
    above.set_ylim(bottom=0)
    above.set_title("Mean rank of a layer", loc="left")
    below.set_title("Ranks by block and layer; at the right how many are left", loc="left")
    _save(figure, path)


def _place(name: str) -> tuple[int, str]:
    """(number of the block or -1, last part of the name)"""
    parts = name.split(".")
    for part in parts:
        if part.isdecimal():
            return int(part), parts[-1]
    return -1, parts[-1]


@_styled
def spectra(path: str | Path, layers: Mapping[str, Sequence[float] | None]) -> None:
    """Draw the singular values of each layer's dW, in descending order, on a logarithmic axis.

    Each kind of layer has its colour.

    layers   path of a layer -> its values, or None where they are not finite: the layer is left out
    """
    kinds: dict[str, list[list[float]]] = {}
    for name, values in layers.items():
        positive = [value for value in values or () if value > 0]
        if positive:
            kind = name.rpartition(".")[2]
            kinds.setdefault(kind, []).append(positive)
    figure, axis = _subplots(figsize=(6.5, 4))
    for i, (kind, lines) in enumerate(sorted(kinds.items())):
        colour = _matplotlib().colormaps["viridis"](i / len(kinds))
        label = kind.replace("$", r"\$")
        for line in lines:
            index = range(1, len(line) + 1)
            axis.plot(index, line, ".-", color=colour, lw=0.9, ms=3, label=label)
            label = ""  # the legend names each kind once
    axis.set(yscale="log", xlabel="i", ylabel="singular value i of dW")
    axis.set_title("How many directions each update uses")
    # The values have whole numbers as indices.
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if kinds:
        axis.legend()
    _save(figure, path)


@_styled
def panels(path: str | Path, title: str, content: Sequence[Panel], source: str = "") -> None:
    """Draw the panels of an experiment, two in a row, under a title; see panels.py.

    source   what the numbers are: it is written into the file, not into the picture
    """
    columns = min(2, len(content))
    rows = -(-len(content) // columns)
    size = 6.8, 2.9 * rows + 0.8
    figure, axes = _subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(content) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, content, strict=False):
        draw(axis, panel)
    lines = textwrap.wrap(title, 76)
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left", fontweight="bold")
    _save_small(figure, path, source)
