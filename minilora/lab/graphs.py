"""The graph of a computation as data, as DOT text, and as a picture in SVG.

`recording.record_graph` makes one from a layer or a block. In a picture, from top to bottom:

    grey box        a frozen weight             solid arrow    a gradient flows back along it
    warm box        a weight that trains        dashed arrow   no gradient
    white box       an operation: its output's shape, and the bytes that it keeps for backward

Names may come from a file: whatever they contain, they are text in DOT and in SVG, and shortened.
"""

from __future__ import annotations

import dataclasses
from html import escape
from typing import Any, NamedTuple

from ..display import printable
from .layered import Layout, lay_out
from .plots import COOL, INK, PALE, QUIET, WARM

# The kinds of vertices.
OPERATION, PARAMETER, INPUT = "operation", "parameter", "input"
CONSTANT, OUTPUT = "constant", "output"
PALE_WARM = "#f6d9d0"
PALE_COOL = "#e3eef4"
WITHOUT_GRADIENT = "#888888"
LONGEST = 48  # characters of a line in a box
LONGEST_TITLE = 300
CHARACTER = 6.7  # width of a character of the monospaced font at FONT_SIZE
FONT_SIZE = 11
LINE = 14.0
PADDING = 9.0
LEGEND = (
    "solid: a gradient flows back; dashed: none; grey: frozen; red: trains; "
    "kept: bytes held until backward"
)


@dataclasses.dataclass(frozen=True)
class Vertex:
    """An operation, or what one reads.

    kind       operation, parameter, input (computed outside), constant, or output (read outside)
    name       of the operation, of the parameter inside the module, or of the kind
    module     path of the module that called the operation, or that has the parameter
    shape, dtype   of its value
    nbytes     of its value, as it is stored
    gradient   whether it requires a gradient
    backward_bytes   of arrays made by the forward that this operation holds until backward; an
                     array that several hold counts for the first of them
    shared_bytes     of such arrays that count for an earlier operation
    """

    kind: str
    name: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    gradient: bool
    backward_bytes: int = 0
    shared_bytes: int = 0


class Edge(NamedTuple):
    """The value of vertex `source` read by vertex `target`; does a gradient flow back?"""

    source: int
    target: int
    gradient: bool


@dataclasses.dataclass(frozen=True, repr=False)
class Graph:
    """What a module computed; a vertex comes after all that it was made from."""

    title: str
    vertices: list[Vertex]
    edges: list[Edge]

    def __repr__(self) -> str:
        operations = f"{len(self.find(OPERATION))} operations"
        return f"Graph({self.title!r}, {operations}, {self._describe_bytes()})"

    def _describe_bytes(self) -> str:
        return f"{self.backward_bytes:,} bytes kept for backward"

    @property
    def backward_bytes(self) -> int:
        """Bytes that the forward has made and that are held until backward."""
        return sum(vertex.backward_bytes for vertex in self.vertices)

    def find(self, kind: str) -> list[Vertex]:
        """The vertices of a kind."""
        return [vertex for vertex in self.vertices if vertex.kind == kind]

    def as_dict(self) -> dict[str, Any]:
        """The graph as values that JSON has."""
        vertices = [dataclasses.asdict(vertex) for vertex in self.vertices]
        edges = [edge._asdict() for edge in self.edges]
        return {
            "title": self.title,
            "backward_bytes": self.backward_bytes,
            "vertices": vertices,
            "edges": edges,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per operation, for a table: its shape, what it keeps, its inputs' gradients."""
        result = []
        for i, vertex in enumerate(self.vertices):
            if vertex.kind == OPERATION:
                result.append(
                    {
                        "operation": vertex.name,
                        "in": vertex.module,
                        "shape": _describe_shape(vertex),
                        "kept": f"{vertex.backward_bytes:,}",
                        "gradients": ", ".join(self._inputs(i, True)) or "-",
                        "none": ", ".join(self._inputs(i, False)) or "-",
                    }
                )
        return result

    def _inputs(self, target: int, gradient: bool) -> list[str]:
        """The names of what a vertex reads and has a gradient, or has none; each once."""
        names = []
        for edge in self.edges:
            if edge.target == target and edge.gradient == gradient:
                names.append(self.vertices[edge.source].name)
        return list(dict.fromkeys(names))

    def describe(self, i: int) -> str:
        """All about a vertex, in a sentence: the text that a pointer shows."""
        vertex = self.vertices[i]
        value = f"{_describe_shape(vertex)} {vertex.dtype}, {vertex.nbytes:,} bytes"
        place = f" in {vertex.module}" if vertex.module else ""
        if vertex.kind == PARAMETER:
            return f"{vertex.name}{place}: {value}, {_describe_training(vertex)}"
        if vertex.kind != OPERATION:
            gradient = "" if vertex.gradient else "no "
            return f"{vertex.name}: {value}, {gradient}gradient"
        text = f"{vertex.name}{place}: {value}; keeps {vertex.backward_bytes:,} bytes for backward"
        if vertex.shared_bytes:
            text += f" (and {vertex.shared_bytes:,} that another keeps)"
        gradients = ", ".join(self._inputs(i, True)) or "nothing"
        return f"{text}; gradients for {gradients}"

    # ---- as text, and as a picture ----

    def to_dot(self) -> str:
        """The graph in Graphviz's language."""
        caption = f"{self._caption()}\n{LEGEND}"
        lines = [
            f"digraph {_quote(_shorten(self.title, LONGEST_TITLE))} {{",
            f"  label={_quote(caption)}; labelloc=t; fontname=monospace; fontsize=12;",
            "  node [shape=box, fontname=monospace, fontsize=10, height=0.3];",
            "  edge [arrowsize=0.6];",
        ]
        for i, vertex in enumerate(self.vertices):
            fill, border = _colours(vertex)
            style = "filled,rounded" if _is_rounded(vertex) else "filled"
            label = _quote("\n".join(_label(vertex)))
            tooltip = _quote(_shorten(self.describe(i), LONGEST_TITLE))
            colours = f'style="{style}", fillcolor="{fill}", color="{border}"'
            lines.append(f"  n{i} [label={label}, tooltip={tooltip}, {colours}];")
        for source, target, gradient in self.edges:
            style = "solid" if gradient else "dashed"
            colour = INK if gradient else WITHOUT_GRADIENT
            lines.append(f'  n{source} -> n{target} [style={style}, color="{colour}"];')
        return "\n".join([*lines, "}", ""])

    def to_svg(self) -> str:
        """The picture as `layered` lays it out."""
        labels = [_label(vertex) for vertex in self.vertices]
        sizes = []
        for lines in labels:
            width = max(map(len, lines)) * CHARACTER + 2 * PADDING
            sizes.append((width, len(lines) * LINE + PADDING))
        layout = lay_out(sizes, [(edge.source, edge.target) for edge in self.edges])
        texts = [self._caption(), LEGEND]
        width = max(layout.width, max(map(len, texts)) * CHARACTER + 2 * PADDING)
        height = layout.height + 3 * LINE
        shift = (width - layout.width) / 2
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" '
            f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'font-family="monospace" font-size="{FONT_SIZE}" fill="{INK}">',
            f"<title>{escape(self._caption())}</title>",
            f'<rect width="100%" height="100%" fill="white"/>{_marker("arrow", INK)}'
            f"{_marker('arrow-none', WITHOUT_GRADIENT)}",
            _text(width / 2, LINE, self._caption(), "font-weight='bold'"),
            _text(width / 2, height - 0.6 * LINE, LEGEND, "fill='#666666'"),
            f'<g transform="translate({shift:.1f} {1.2 * LINE:.1f})">',
        ]
        for edge, points in zip(self.edges, layout.routes, strict=True):
            parts.append(self._draw_edge(edge, points))
        for i in range(len(self.vertices)):
            parts.append(self._draw_vertex(i, labels[i], sizes[i], layout))
        return "\n".join([*parts, "</g>", "</svg>", ""])

    def _repr_html_(self) -> str:
        """The picture, for a notebook."""
        return self.to_svg()

    def _caption(self) -> str:
        return f"{_shorten(self.title, LONGEST_TITLE)}: {self._describe_bytes()}"

    def _draw_edge(self, edge: Edge, points: list[tuple[float, float]]) -> str:
        names = [self.vertices[i].name for i in edge[:2]]
        gradient = "a gradient flows back" if edge.gradient else "no gradient"
        title = _shorten(f"{names[0]} to {names[1]}: {gradient}", LONGEST_TITLE)
        colour = INK if edge.gradient else WITHOUT_GRADIENT
        dashes = "" if edge.gradient else ' stroke-dasharray="4 3"'
        marker = "arrow" if edge.gradient else "arrow-none"
        style = f'stroke="{colour}"{dashes} marker-end="url(#{marker})"'
        return (
            f'<path fill="none" d="{_curve(points)}" {style}><title>{escape(title)}</title></path>'
        )

    def _draw_vertex(
        self, i: int, lines: list[str], size: tuple[float, float], layout: Layout
    ) -> str:
        x, y = layout.centres[i]
        width, height = size
        vertex = self.vertices[i]
        fill, border = _colours(vertex)
        radius = 9 if _is_rounded(vertex) else 2
        title = escape(_shorten(self.describe(i), LONGEST_TITLE))
        box = (
            f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" rx="{radius}" fill="{fill}" stroke="{border}"/>'
        )
        top = y - height / 2 + PADDING / 2 + FONT_SIZE
        texts = []
        for number, line in enumerate(lines):
            is_bytes = vertex.kind == OPERATION and number == len(lines) - 1
            style = f"fill='{COOL}'" if is_bytes else "font-weight='bold'" if number == 0 else ""
            texts.append(_text(x, top + number * LINE, line, style))
        return f"<g><title>{title}</title>{box}{''.join(texts)}</g>"


# ---- texts ---------------------------------------------------------------------------------------


def _shorten(text: str, longest: int) -> str:
    """`text` on one line, printable, and without its middle if it is long."""
    if len(text) > 2 * longest:  # before it is searched for what is not printable
        text = text[:longest] + text[-longest:]
    text = printable(text)
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def _describe_shape(vertex: Vertex) -> str:
    return "scalar" if vertex.shape == () else " x ".join(map(str, vertex.shape))


def _describe_training(vertex: Vertex) -> str:
    return "trains" if vertex.gradient else "frozen"


def _label(vertex: Vertex) -> list[str]:
    """The lines of a vertex's box."""
    lines = [vertex.name]
    if vertex.kind in (OPERATION, PARAMETER) and vertex.module:
        lines.append(vertex.module)
    lines.append(_describe_shape(vertex))
    if vertex.kind == PARAMETER:
        lines.append(f"{_describe_training(vertex)}, {vertex.nbytes:,} B")
    if vertex.kind == OPERATION:
        lines.append(f"kept {vertex.backward_bytes:,} B")
    return [_shorten(line, LONGEST) for line in lines]


def _colours(vertex: Vertex) -> tuple[str, str]:
    """(fill, border)"""
    if vertex.kind == PARAMETER:
        return (PALE_WARM, WARM) if vertex.gradient else (PALE, QUIET)
    if vertex.kind == OPERATION:
        return "white", INK if vertex.gradient else WITHOUT_GRADIENT
    return PALE_COOL, COOL


def _is_rounded(vertex: Vertex) -> bool:
    return vertex.kind not in (OPERATION, PARAMETER)


def _quote(text: str) -> str:
    """A string of the DOT language, which knows escapes and, in labels, entities."""
    lines = []
    for line in text.split("\n"):
        line = line.replace("&", "&amp;")
        lines.append(line.replace("\\", "\\\\").replace('"', '\\"'))
    return '"' + "\\n".join(lines) + '"'


# ---- SVG -----------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {style}>{escape(text)}</text>'


def _marker(name: str, colour: str) -> str:
    """The head of an arrow."""
    size = 'markerWidth="7" markerHeight="7" refX="6" refY="3.5"'
    head = f'<path d="M0 0.5 L6.5 3.5 L0 6.5 z" fill="{colour}"/>'
    return f'<marker id="{name}" {size} orient="auto">{head}</marker>'


def _curve(points: list[tuple[float, float]]) -> str:
    """A path through points from top to bottom that is vertical at each of them."""
    (x, y), *others = points
    parts = [f"M{x:.1f} {y:.1f}"]
    for next_x, next_y in others:
        middle = (y + next_y) / 2
        if next_x == x:
            parts.append(f"L{next_x:.1f} {next_y:.1f}")
        else:
            parts.append(
                f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {next_y:.1f}"
            )
        x, y = next_x, next_y
    return " ".join(parts)
