"""Figures of a report as plain data: finite numbers, escaped labels, a table for each."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import reports
from hypothesis import given
from hypothesis import strategies as st

from minilora.lab.report.cleaning import clean, label
from minilora.lab.report.content import (
    Curve,
    LayerMap,
    ModuleCount,
    RankCurve,
    Report,
    Scaling,
    Spectrum,
    Training,
)
from minilora.lab.report.controls import draw_rank, draw_scalings, draw_spectra
from minilora.lab.report.figures import (
    MOST_POINTS,
    draw_all,
    draw_forgetting,
    draw_losses,
    draw_map,
    running_mean,
    thin,
)

ALL = ["clean", "adalora", "gpt2", "hostile"]
EMPTY = Report("", [], ModuleCount("", "", 0, 0), [])
numbers = st.one_of(st.none(), st.floats(), st.sampled_from([1.7976931348623157e308, 5e-324]))


def figures_of(name):
    parts = draw_all(clean(getattr(reports, name)()))
    return [figure for part in parts.values() for figure in part]


@pytest.mark.parametrize("name", ALL)
def test_draw_all_gives_each_figure_words_and_a_table_of_the_same_width(name):
    figures = figures_of(name)
    assert len({figure.name for figure in figures}) == len(figures) >= 3
    for figure in figures:
        assert len(figure.alt) > 20
        assert figure.rows
        assert {len(row) for row in figure.rows} == {len(figure.header)}
        for trace in figure.traces:
            values = trace["z"] if trace.get("type") == "heatmap" else trace["x"]
            assert len(values) == len(trace["y"])


@pytest.mark.parametrize("name", ALL)
def test_draw_all_gives_controls_points_for_each_trace_that_they_change(name):
    for figure in figures_of(name):
        for choice in figure.choices:
            assert len(choice.x) == len(choice.y) == len(figure.changed)
            for x, y in zip(choice.x, choice.y, strict=True):
                assert len(x) == len(y)
        if figure.choices:
            start = figure.choices[figure.start]
            assert [figure.traces[i]["x"] for i in figure.changed] == start.x
            assert [figure.traces[i]["y"] for i in figure.changed] == start.y


def test_draw_all_draws_nothing_of_an_empty_report():
    report = reports.clean()
    empty = dataclasses.replace(
        report, training=Training("", []), maps=[], spectra=[], rank_curve=None, intruders=None
    )
    assert not any(draw_all(clean(empty)).values())


@given(
    st.one_of(
        st.sampled_from(reports.HOSTILE),
        st.text(st.characters(exclude_categories=())),
        st.text("<b>&lt;/\n"),
    )
)
def test_label_leaves_no_markup_of_plotly_and_is_short(text):
    escaped = label(text)
    assert "<" not in escaped
    assert ">" not in escaped
    rest = escaped.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")
    assert "&" not in rest
    assert escaped.isprintable()
    assert len(escaped) <= 32 * len("&amp;")


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_thin_keeps_the_mean_and_the_last_step(count):
    curve = Curve("c", list(range(1, count + 1)), [float(i % 10) for i in range(count)])
    thinned, width = thin(curve)
    assert len(thinned.steps) == len(thinned.values) <= MOST_POINTS
    assert width == max(1, math.ceil(count / MOST_POINTS))
    if count:
        assert thinned.steps[-1] == count
        assert thinned.values[0] == sum(curve.values[:width]) / width


def test_running_mean_averages_the_values_before_and_skips_missing_ones():
    values = [1.0] * 40 + [3.0, None, 5.0] + [1.0] * 37  # a window of two
    means = running_mean(values)
    assert means[39:44] == [1.0, 2.0, 3.0, 5.0, 3.0]


def test_draw_losses_shows_each_step_and_the_running_mean_of_a_long_curve():
    training = reports.clean().training
    figure = draw_losses(training)
    names = [trace["name"] for trace in figure.traces]
    assert names == ["training", "training", "held-out text", "second text"]
    assert [len(trace["x"]) for trace in figure.traces] == [160, 160, 9, 9]
    assert [row[0] for row in figure.rows] == [str(step) for step in range(161)]
    assert "held-out text: 3.087 bits per byte at step 0, 2.73 at step 160" in figure.alt


def test_draw_forgetting_needs_both_texts_at_two_steps():
    training = reports.clean().training
    figure = draw_forgetting(training)
    assert len(figure.rows) == 9
    assert draw_forgetting(dataclasses.replace(training, curves=training.curves[:2])) is None
    short = [*training.curves[:2], Curve("second text", [0, 1], [2.0, 2.1])]
    assert draw_forgetting(dataclasses.replace(training, curves=short)) is None


# ---- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "cells", "unit"),
    [
        ([0.0621, 0.0031, None], ["0.0621", "0.0031", ""], ""),
        ([7.5, 10.25, -1.0], ["7.5", "10.2", "-1.0"], ""),
        ([3.0, 0.0, 6.0], ["3", "0", "6"], ""),
        ([0.00217, 0.0001, None], ["2.17", "0.10", ""], "1e-3"),
        ([2.5e7, 1e6, None], ["25", "1", ""], "1e6"),
        ([0.0, 0.0, None], ["0", "0", ""], ""),
        ([None, math.nan, math.inf], ["", "", ""], ""),
    ],
)
def test_draw_map_writes_numbers_of_equal_decimals(values, cells, unit):
    table = LayerMap("t", "e", ["q"], ["0", "1", "2"], [values])
    figure = draw_map(table, 0)
    (trace,) = figure.traces
    got = [row[0] for row in trace["text"]]
    if unit == "1e6":
        got = [cell.split(".")[0] for cell in got]
    assert got == cells
    assert figure.unit == unit


def test_draw_map_keeps_equal_names_apart_and_has_rows_for_blocks():
    table = LayerMap("t", "e", ["same", "same"], ["a", "a", "a"], [[1.5, 2, 3], [4, 5, 6]])
    figure = draw_map(table, 3)
    (trace,) = figure.traces
    assert figure.name == "map-3"
    assert trace["z"] == [[1.5, 4], [2, 5], [3, 6]]
    assert trace["x"] == [0, 1]
    assert trace["y"] == [0, 1, 2]
    assert figure.layout["xaxis"]["ticktext"] == ["same", "same"]


def test_draw_map_has_a_hue_for_each_sign():
    positive = draw_map(LayerMap("t", "e", ["q"], ["0", "1"], [[0.5, 2.0]]), 0).traces[0]
    both = draw_map(LayerMap("t", "e", ["q"], ["0", "1"], [[-3.0, 2.0]]), 0).traces[0]
    assert (positive["zmin"], positive["zmax"]) == (0, 2.0)
    assert (both["zmin"], both["zmax"]) == (-3.0, 3.0)
    assert len(both["colorscale"]) == len(positive["colorscale"]) + 1


# ---- controls ------------------------------------------------------------------------------------


def test_draw_spectra_leaves_zeros_out_of_the_chart_and_counts_them():
    figure = draw_spectra([Spectrum("a", [2.0, 1.0, 0.0, 0.0], [9.0]), Spectrum("b", [0.0], [])])
    first, second = figure.choices
    assert first.y == [[9.0], [2.0, 1.0, None, None]]
    assert "2 singular values of dW (and 2 that are 0), from 2 to 1" in first.description
    assert second.description == "1 singular values of dW, all 0."


@pytest.mark.parametrize(("smallest", "dtick"), [(1.0, "D2"), (1e-5, "D2"), (1e-9, 1)])
def test_draw_spectra_has_ticks_that_fit_the_range(smallest, dtick):
    figure = draw_spectra([Spectrum("a", [2.0, smallest], [9.0])])
    assert figure.layout["yaxis"]["dtick"] == dtick


def test_draw_rank_says_the_share_of_the_gain_and_of_the_energy():
    curve = RankCurve("bits", "t", [0, 2, 8], [3.0, 2.25, 2.0], [0.01, 0.002, None], [0, 0.5, 1])
    figure = draw_rank(curve)
    assert figure.start == 2
    assert figure.choices[1].description == (
        "Rank 2: 2.25 bits ± 0.002, 75 % of the gain, 50 % of the energy."
    )
    assert figure.choices[1].x == [[1], [1]]
    assert figure.choices[1].y == [[2.25], [50.0]]


def test_draw_rank_says_no_share_of_a_gain_that_is_none():
    curve = RankCurve("bits", "t", [0, 2], [2.0, 2.5], [None, None], [0, 1])
    assert "gain" not in draw_rank(curve).choices[0].description


def test_draw_scalings_works_without_a_second_text_and_with_other_factors():
    intruders = reports.clean().intruders
    scalings = [Scaling("a", [0.0, 1.0], [3.0, 2.0], []), Scaling("b", [0.5], [2.5], [])]
    figure = draw_scalings(dataclasses.replace(intruders, scalings=scalings))
    assert [choice.name for choice in figure.choices] == ["0", "0.5", "1"]
    assert figure.choices[1].x == [[0.5]]
    assert figure.choices[1].y == [[2.5]]
    assert figure.start == 2
    assert "yaxis2" not in figure.layout
    assert draw_scalings(dataclasses.replace(intruders, scalings=[])) is None


# ---- numbers -------------------------------------------------------------------------------------


@given(st.data())
def test_draw_all_puts_only_finite_numbers_into_json(data):
    def draw(count):
        return data.draw(st.lists(numbers, min_size=count, max_size=count))

    curves = [Curve(name, [0, 1, 2], draw(3)) for name in "abc"]
    report = dataclasses.replace(
        EMPTY,
        training=Training("nats", curves),
        maps=[LayerMap("t", "e", ["q", "k"], ["0", "1"], [draw(2), draw(2)])],
        spectra=[Spectrum("a", draw(3), draw(2))],
    )
    for figures in draw_all(report).values():
        for figure in figures:
            json.dumps(figure.to_json(), allow_nan=False)
