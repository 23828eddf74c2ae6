"""Panels: plain data that becomes JSON as it is, and pictures in which controls are seen."""

from __future__ import annotations

import json
import struct

import pytest

from minilora.lab import plots
from minilora.lab.panels import COLOURS, DIGIT, bar, bars, heat, lines, series

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install -e .[plot]")

LINES = lines(
    "losses",
    "rank",
    "bits",
    [
        series("LoRA", [1, 4], [3.0, 2.0], spread=[0.1, None]),
        series("random", [1, 4], [4.0, None], control=True),
        series("dots", [1, 2], [2.5, 2.6], dots=True),
    ],
    log="x",
    levels={"full": 2.5},
)
BARS = bars("bars", "bits", ["a", "b"], [bar("x", [1.0, None], spread=[0.1, 0.1])], zoom=True)
GROUPS = bars("groups", "", ["a"], [bar("x", [2.0]), bar("y", [1.0], control=True)], log="y")
HEAT = heat("table", ["r1", "r2"], ["c1"], [[0.5], [None]], x="columns", digits=1, limits=[0, 1])
PANELS = [LINES, BARS, GROUPS, HEAT]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_are_plain_data(panel):
    assert json.loads(json.dumps(panel, allow_nan=False)) == panel


def test_plots_panels_is_small_and_has_the_source_in_its_metadata(tmp_path):
    title = "a claim that is so long that it needs more than one line of the picture, " * 2
    plots.panels(tmp_path / "picture.png", title, PANELS, "the checksum")
    data = (tmp_path / "picture.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (680, 660)
    assert b"the checksum" in data
    assert len(data) < 40_000


def test_plots_panels_again_has_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        plots.panels(tmp_path / f"{name}.png", "claim", [LINES], "source")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def drawn(panel):
    """matplotlib's axes with a panel in it."""
    from matplotlib.figure import Figure

    from minilora.lab.panels import draw

    axis = Figure().subplots()
    draw(axis, panel)
    return axis


def test_draw_shows_controls_grey_and_broken():
    axis = drawn(LINES)
    styles = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axis.lines}
    assert styles["LoRA"] == (COLOURS[0], "-")
    assert styles["random"][0] not in COLOURS
    assert styles["random"][1] == "--"
    assert [text.get_text() for text in axis.texts] == ["full"]


def test_draw_leaves_out_what_is_not_known():
    points = {line.get_label(): len(line.get_xdata()) for line in drawn(LINES).lines}
    assert (points["LoRA"], points["random"]) == (2, 1)


def test_draw_marks_the_numbers_that_were_measured():
    labels = [label.get_text() for label in drawn(LINES).get_xticklabels()]
    assert labels == ["1", "4"]


def test_draw_leaves_out_marks_that_would_overlap():
    rates = [1e-4 * 2**k for k in range(12)]
    axis = drawn(lines("", "rate", "loss", [series("", rates, [1.0] * 12)], log="x"))
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels[0] == "0.0001"
    assert 3 <= len(labels) < 12
    assert len(labels) * max(map(len, labels)) * DIGIT < axis.get_window_extent().width


def test_draw_writes_out_the_numbers_of_a_logarithmic_axis():
    axis = drawn(lines("", "r", "norm", [series("", [1, 4], [0.3, 2.2])], log="xy"))
    axis.figure.draw_without_rendering()
    ticks = [*axis.yaxis.get_major_ticks(), *axis.yaxis.get_minor_ticks()]
    assert {"0.5", "1", "2"} <= {tick.label1.get_text() for tick in ticks}


def test_draw_zooms_bars_to_their_differences():
    panel = bars("", "", ["a", "b"], [bar("", [2.7, 2.8])], zoom=True)
    low, high = drawn(panel).get_ylim()
    assert 2.6 < low < 2.7
    assert 2.8 < high < 2.9
