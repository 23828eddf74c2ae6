"""What commands print and what a notebook shows: tables, and text that cannot control either.

For a terminal   print_table, printable
For a notebook   HTML of a Tensor, of modules, of a model with adapters, of a run's settings and
                 results: without scripts, all names escaped, and less than LIMIT bytes each

The objects are described by what they offer, since nothing here can import their classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from .errors import printable

__all__ = [
    "Picture",
    "equal_neighbours",
    "print_table",
    "printable",
    "render_adapted_model",
    "render_module",
    "render_result",
    "render_settings",
    "render_tensor",
]

LIMIT = 20_000  # bytes of a notebook's output
CORNER = 8  # rows and columns that are shown of a tensor
DEPTH = 6  # levels of modules
CHILDREN = 16  # modules inside one, after which the others are counted
LONGEST = 60  # characters of a name or a value
POINTS = 240  # of a curve
WARM = "#c8553d"  # of held-out losses, as in lab/plots.py
COOL = "#2a6f97"  # of training
ROWS = 24  # of a table of held-out losses, and dots in a picture of them


# ---- a terminal ----------------------------------------------------------------------------------


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows with the same keys, with columns as wide as they need to be."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([printable(str(row[key])) for key in rows[0]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = map(str.ljust, line, widths)
        print("  ".join(cells).rstrip())


# ---- HTML ----------------------------------------------------------------------------------------


def to_html(value: Any, longest: int = LONGEST) -> str:
    """A value as text in HTML: printable, at most `longest` characters, escaped."""
    text = printable(str(value)[:LIMIT])
    return escape(text if len(text) <= longest else f"{text[: longest - 3]}...")


def render_table(rows: Sequence[Sequence[Any]], header: Sequence[Any] = ()) -> str:
    """A table of texts and numbers, of which nothing is taken for HTML.

    It has less than half of LIMIT bytes: the rows after that are counted.
    """
    lines = ["".join(f"<th>{to_html(name)}</th>" for name in header)] if header else []
    size = 0
    for i, row in enumerate(rows):
        line = "".join(f"<td>{to_html(value)}</td>" for value in row)
        size += len(line.encode())
        if size > LIMIT // 3:
            lines.append(f"<td>... and {len(rows) - i} more</td>")
            break
        lines.append(line)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{body}</table>"


# ---- a Tensor ------------------------------------------------------------------------------------


def render_tensor(tensor: Any) -> str:
    """HTML: shape, dtype, range, and the corner of the last two axes."""
    xp = tensor.backend.xp
    values = tensor.data
    facts = [f"{tuple(values.shape)} {values.dtype}"]
    if tensor.backend.name != "cpu":
        facts.append(tensor.backend.name)
    facts += [*_describe_range(xp, values), *_describe_gradient(tensor)]
    kind = to_html(type(tensor).__name__)
    corner = tensor.backend.to_numpy(_corner(values))
    rows = [[_number(value) for value in row] for row in corner]
    return f"<div><b>{kind}</b> {to_html(', '.join(facts), 400)}{render_table(rows)}</div>"


def _describe_range(xp: Any, values: Any) -> list[str]:
    """In words: from which number to which, and how many are not finite."""
    if not values.size or values.dtype.kind not in "biuf":
        return []
    if values.dtype.kind != "f":
        return [f"from {int(values.min())} to {int(values.max())}"]
    finite = xp.isfinite(values)
    count = int(finite.sum())
    facts = []
    if count:
        low = float(xp.where(finite, values, np.inf).min())
        high = float(xp.where(finite, values, -np.inf).max())
        facts.append(f"from {low:.4g} to {high:.4g}")
    if count < values.size:
        nan = int(xp.isnan(values).sum())
        facts.append(f"{nan:,} NaN, {values.size - count - nan:,} infinite")
    return facts


def _describe_gradient(tensor: Any) -> list[str]:
    if tensor.node is not None:
        return [f"made by {tensor.node.name}"]
    return ["requires a gradient"] if tensor.requires_grad else []


def _corner(values: Any) -> Any:
    """The first rows and columns of the last two axes: a matrix, of one row for a vector."""
    if not values.size:
        return values.reshape(0, 1)
    if values.ndim < 2:
        values = values.reshape(1, -1)
    first = (0,) * (values.ndim - 2)
    return values[first][:CORNER, :CORNER]


def _number(value: Any) -> str:
    return f"{value:.4g}" if np.asarray(value).dtype.kind in "fc" else str(value)


# ---- modules -------------------------------------------------------------------------------------


def render_module(module: Any, name: str = "") -> str:
    """HTML: the tree of modules as nested <details>, each with its number of parameters.

    What is too large for LIMIT loses its deepest level, and then the next.
    """
    for depth in range(DEPTH, -1, -1):
        tree = _tree(module, name, depth)
        if len(tree.encode()) < LIMIT // 2:
            break
    return f"<div>{tree}</div>"


def _tree(module: Any, name: str, depth: int, is_open: bool = True) -> str:
    """A module and `depth` levels below it."""
    line = _summary(module, name)
    children = list(module.named_children()) if depth else []
    if not children:
        return f"<div>{line}</div>"
    groups = equal_neighbours(children)
    inner = []
    for names, _, child in groups[:CHILDREN]:
        label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, {len(names)} alike"
        inner.append(_tree(child, label, depth - 1, is_open=False))
    if len(groups) > CHILDREN:
        inner.append(f"<div>... and {len(groups) - CHILDREN} more</div>")
    indented = f'<div style="margin-left:1.5em">{"".join(inner)}</div>'
    state = ' open=""' if is_open else ""
    return f"<details{state}><summary>{line}</summary>{indented}</details>"


def _summary(module: Any, name: str) -> str:
    """One line about a module: its name, class and parameters, and what it says of itself."""
    label = f"<b>{to_html(name)}</b> " if name else ""
    text = f"{label}{to_html(type(module).__name__)}: {_count(module)}"
    details = module.extra_repr()
    return f"{text} <small>{to_html(details, 120)}</small>" if details else text


def _count(module: Any) -> str:
    """In words: how many parameters a module has, and how many of them train."""
    parameters = list(module.parameters())
    total = sum(p.size for p in parameters)
    trained = sum(p.size for p in parameters if p.requires_grad)
    if not total:
        return "no parameters"
    if trained in (0, total):
        return f"{total:,} parameters, {'all train' if trained else 'all frozen'}"
    return f"{total:,} parameters, {trained:,} train ({trained / total:.2%})"


def equal_neighbours(children: Iterable[tuple[str, Any]]) -> list[tuple[list[str], str, Any]]:
    """(names, repr, module) of each child, or of several in a row: numbered ones with one repr.

    The module is the first of them.
    """
    groups: list[tuple[list[str], str, Any]] = []
    for name, child in children:
        text = repr(child)
        numbered = name.rpartition(".")[2].isdecimal()
        if groups and numbered and groups[-1][1] == text:
            groups[-1][0].append(name)
        else:
            groups.append(([name], text, child))
    return groups


def render_adapted_model(model: Any) -> str:
    """HTML of a PeftModel: its adapters with ranks and targets, and the tree of its modules."""
    rows = []
    for name, config in model.peft_config.items():
        state = "active" if name in model.active_adapters else "inactive"
        if name in model.merged_adapters:
            state += ", merged"
        size = sum(p.size for p in model.adapter_parameters(name).values())
        targets = config.target_modules or ()
        if not isinstance(targets, str):
            targets = ", ".join(sorted({path.rpartition(".")[2] for path in targets}))
        rank = getattr(config, "init_r", config.r)
        rows.append((name, type(config).__name__, state, rank, f"{size:,}", targets))
    header = ("adapter", "configuration", "state", "r", "parameters", "target_modules")
    kind = to_html(type(model).__name__)
    tree = render_module(model.get_base_model())
    return f"<div><b>{kind}</b>: {_count(model)}{render_table(rows, header)}{tree}</div>"


# ---- runs ----------------------------------------------------------------------------------------


def render_settings(settings: Any) -> str:
    """HTML of a dataclass of settings: those that differ from their defaults, then all."""
    defaults = type(settings)()
    values = vars(settings)
    changed = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    kind = to_html(type(settings).__name__)
    summary = f"<summary>all {len(values)}</summary>"
    rest = f"<details>{summary}{render_table(list(values.items()))}</details>"
    first = render_table(list(changed.items()))
    return f"<div><b>{kind}</b>: {len(changed)} changed{first}{rest}</div>"


def render_result(result: Any) -> str:
    """HTML of a training run: its curve, its held-out losses, and its time."""
    steps = len(result.losses)
    facts = f"{steps:,} steps in {result.seconds:.1f} seconds"
    if not math.isnan(result.loss):
        facts += f"; held-out loss {result.loss:.4f} with the weights of step {result.step}"
    evaluations = _thin(result.evaluations, ROWS)
    table = render_table(
        [(step, f"{loss:.4f}") for step, loss in evaluations], ("step", "held out")
    )
    kind = to_html(type(result).__name__)
    curve = render_losses(result.losses, result.evaluations)
    return f"<div><b>{kind}</b>: {facts}{curve}{table if evaluations else ''}</div>"


def render_losses(losses: Sequence[float], evaluations: Sequence[tuple[int, float]]) -> str:
    """SVG: a line of each step's loss, and dots of held-out ones (step, loss); "" for neither."""
    training = [(step, loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    held_out = [(step, loss) for step, loss in evaluations if math.isfinite(loss)]
    values = [loss for _, loss in training + held_out]
    if not values:
        return ""
    low = min(values)
    high = max(values)
    last = max(len(losses), *(step for step, _ in training + held_out), 1)
    width, height, left, bottom = 460, 180, 50, 20

    def place(point: tuple[int, float]) -> tuple[str, str]:
        step, loss = point
        x = left + (width - left - 10) * step / last
        y = 10 + (height - bottom - 20) * ((high - loss) / (high - low) if high > low else 0.5)
        return f"{x:.1f}", f"{y:.1f}"

    line = " ".join(",".join(place(point)) for point in _thin(training, POINTS))
    dots = []
    for point in _thin(held_out, ROWS):
        x, y = place(point)
        dots.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{WARM}"/>')
    texts = []
    for value, at in ((high, 14), (low, height - bottom - 6)):
        texts.append(f'<text x="{left - 6}" y="{at}" text-anchor="end">{value:.3g}</text>')
    labels = f"steps 1 to {last:,}; line: training, dots: held out"
    texts.append(f'<text x="{left}" y="{height - 4}">{labels}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'font-size="11" font-family="sans-serif" fill="currentColor"><title>loss: {labels}</title>'
        f'<polyline points="{line}" fill="none" stroke="{COOL}"/>{"".join(dots)}{"".join(texts)}'
        "</svg>"
    )


def _thin(points: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the points, evenly spread, with the first and the last."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(i * step)] for i in range(most)]


# ---- pictures ------------------------------------------------------------------------------------


class Picture:
    """A picture in a file: a notebook shows it where it is the value of a cell.

    path   ends in .png, .svg, or another format, of which only the path is shown
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)

    def __repr__(self) -> str:
        return f"Picture({self.path!r})"

    def _repr_png_(self) -> bytes | None:
        return self._read(".png")

    def _repr_svg_(self) -> str | None:
        data = self._read(".svg")
        return None if data is None else data.decode()

    def _read(self, ending: str) -> bytes | None:
        """The file's content if its name has this ending."""
        if not self.path.lower().endswith(ending):
            return None
        with open(self.path, "rb") as file:
            return file.read()
