"""Boxes of a drawn graph neither overlap nor leave the picture, and every edge leads downwards."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lab.layered import GAP, lay_out


@st.composite
def graphs(draw):
    """(sizes, edges) of a graph without circles; some vertices have no edge, some edges repeat."""
    count = draw(st.integers(1, 14))
    side = st.floats(1, 200)
    sizes = draw(st.lists(st.tuples(side, side), min_size=count, max_size=count))
    pairs = list(itertools.combinations(range(count), 2))
    edges = draw(st.lists(st.sampled_from(pairs), max_size=25)) if pairs else []
    return sizes, edges


def sides(layout, sizes, i):
    (x, y), (width, height) = layout.centres[i], sizes[i]
    return x - width / 2, x + width / 2, y - height / 2, y + height / 2


@given(graphs())
def test_lay_out_keeps_boxes_apart_and_inside(graph):
    sizes, edges = graph
    layout = lay_out(sizes, edges)
    boxes = [sides(layout, sizes, i) for i in range(len(sizes))]
    for left, right, top, bottom in boxes:
        assert left >= -1e-6
        assert top >= -1e-6
        assert right <= layout.width + 1e-6
        assert bottom <= layout.height + 1e-6
    for one, other in itertools.combinations(boxes, 2):
        apart = max(one[0], other[0]) - min(one[1], other[1])
        below = max(one[2], other[2]) - min(one[3], other[3])
        assert apart > GAP - 1e-6 or below > 0


@given(graphs())
def test_lay_out_leads_each_edge_downwards_from_box_to_box(graph):
    sizes, edges = graph
    layout = lay_out(sizes, edges)
    for (source, target), route in zip(edges, layout.routes, strict=True):
        assert all(a[1] <= b[1] + 1e-6 for a, b in itertools.pairwise(route))
        start = layout.centres[source][0], sides(layout, sizes, source)[3]
        end = layout.centres[target][0], sides(layout, sizes, target)[2]
        assert route[0] == pytest.approx(start)
        assert route[-1] == pytest.approx(end)


@given(graphs())
def test_lay_out_leads_long_edges_around_boxes(graph):
    """The vertical stretch beside a box does not pass through it."""
    sizes, edges = graph
    layout = lay_out(sizes, edges)
    for route in layout.routes:
        for (x, top), (_, bottom) in zip(route[1:-1:2], route[2:-1:2], strict=True):
            for i in range(len(sizes)):
                left, right, upper, lower = sides(layout, sizes, i)
                if upper < bottom and top < lower:
                    assert x <= left + 1e-6 or x >= right - 1e-6


def test_lay_out_removes_crossings():
    """Two chains side by side, whose vertices come in the wrong order."""
    edges = [(0, 3), (1, 2), (2, 5), (3, 4)]
    layout = lay_out([(10.0, 10.0)] * 6, edges)
    xs = [x for x, _ in layout.centres]
    assert xs[0] == pytest.approx(xs[3])
    assert xs[3] == pytest.approx(xs[4])
    assert xs[1] == pytest.approx(xs[2])
    assert xs[2] == pytest.approx(xs[5])


def test_lay_out_puts_a_weight_above_what_reads_it():
    layout = lay_out([(10.0, 10.0)] * 4, [(0, 1), (1, 3), (2, 3)])
    ys = [y for _, y in layout.centres]
    assert ys[0] < ys[1] == ys[2] < ys[3]


def test_lay_out_of_nothing_is_empty():
    assert lay_out([], []).centres == []
