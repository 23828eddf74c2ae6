"""Pictures are drawn for ordinary runs and for unusual ones: one step, no evaluation, no change."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from minilora.lab import plots

plt = pytest.importorskip(
    "matplotlib.pyplot", reason="pictures need matplotlib: pip install -e .[plot]"
)


def size_of(path):
    """(width, height) of a PNG file, from its header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures that were saved, for a test to look at."""
    figures = []
    save = plots._save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


# ---- loss_curves ----

RUNS = {}
RUNS["ordinary"] = {
    "a": (np.linspace(8, 4, 200), [(0, 8.0), (100, 5.0), (200, 4.2)]),
    "b": ([4.0] * 50, [(0, 4.1)]),
}
RUNS["one stage"] = {"a": ([8.0, 7.0, 6.0], [(3, 6.0)])}
RUNS["one step"] = {"a": ([8.0], [(0, 8.0), (1, 7.9)]), "b": ([4.0], [])}
RUNS["nothing measured"] = {"a": ([8.0, 7.0], []), "b": ([6.0, 5.0], [])}
RUNS["no steps"] = {"a": ([], []), "b": ([], [(0, 4.0)])}
RUNS["three stages"] = dict.fromkeys("abc", ([3.0, 2.0], [(0, 3.0)]))
RUNS["a long title with $ _ ^ and \\"] = {"a $x_^ \\frac": ([1.0, 2.0], [])}


@pytest.mark.parametrize("stages", RUNS.values(), ids=RUNS)
def test_loss_curves(stages, tmp_path):
    path = tmp_path / "loss.png"
    plots.loss_curves(path, stages)
    width, height = size_of(path)
    assert width > 2 * height > 400


@pytest.mark.parametrize("name", ["loss.png", "loss.svg"])
def test_loss_curves_returns_the_picture_for_a_notebook(name, tmp_path):
    picture = plots.loss_curves(tmp_path / name, RUNS["one stage"])
    assert picture.path == str(tmp_path / name)
    shown = picture._repr_png_() or picture._repr_svg_().encode()
    assert shown == (tmp_path / name).read_bytes()


def test_running_mean_looks_back_over_a_window():
    assert plots._running_mean([1.0, 2.0, 6.0, 0.0], 2).tolist() == [1.0, 1.5, 4.0, 3.0]
    assert plots._running_mean([3.0, 1.0], 100).tolist() == [3.0, 2.0]
    assert plots._running_mean([], 5).tolist() == []


# ---- delta_spectrum ----

UP = "model.layers.0.mlp.up_proj"


def spectrum(count, top=1.0):
    return top * np.exp(-np.arange(count) / 3)


def block(number, delta):
    """Two layers of a block, by path: their singular values of W and, for both, `delta`."""
    attention = f"model.layers.{number}.self_attn"
    return {f"{attention}.{name}": (spectrum(16), delta) for name in ("q_proj", "v_proj")}


ZERO = block(0, np.zeros(4))
FIRST = block(0, spectrum(4))
HEAD = {"lm_head": (spectrum(16), spectrum(4))}
LAYERS = {}
LAYERS["ordinary"] = block(0, spectrum(4, 0.1))
LAYERS["ordinary"] |= block(1, spectrum(4, 3.0))
LAYERS["ordinary"] |= block(10, spectrum(2, 0.2))
LAYERS["one layer"] = {UP: (spectrum(8), spectrum(2))}
LAYERS["rank one"] = {UP: (spectrum(8), spectrum(1))}
LAYERS["nothing changed"] = ZERO | block(1, np.zeros(4))
LAYERS["one of two changed"] = ZERO | block(1, spectrum(4))
LAYERS["no block number"] = HEAD | {"score": (spectrum(3), spectrum(2))}
LAYERS["some without"] = FIRST | HEAD
LAYERS["blocks of different kinds"] = FIRST | {
    "model.layers.1.mlp.up_proj": (spectrum(8), spectrum(2))
}
LAYERS["all zero"] = {UP: (np.zeros(8), np.zeros(2))}
LAYERS["a tail of zeros"] = {UP: (spectrum(8), np.array([1e-3, 1e-12, 0.0]))}
LAYERS["tiny and huge"] = block(0, spectrum(4, 1e-12)) | block(1, spectrum(4, 1e12))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_delta_spectrum(layers, tmp_path):
    path = tmp_path / "delta.png"
    plots.delta_spectrum(path, layers)
    width, height = size_of(path)
    assert width > 300
    assert height > 200


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_delta_spectrum_names_every_row_and_column(layers, tmp_path, saved_figures):
    plots.delta_spectrum(tmp_path / "delta.png", layers)
    shown = [axis for axis in saved_figures[-1].axes if axis.get_visible()]
    assert len(shown) == len(layers)
    titles = [axis.get_title() for axis in shown if axis.get_title()]
    labels = [axis.get_ylabel() for axis in shown if axis.get_ylabel()]
    kinds = set()
    rows = set()
    for name in layers:
        parts = name.split(".")
        kinds.add(parts[-1])
        rows |= {f"layer {part}" for part in parts if part.isdecimal()}
    assert sorted(titles) == sorted(kinds)
    assert sorted(labels) == sorted(rows)


def test_delta_spectrum_depends_on_its_numbers_alone(tmp_path):
    def draw(name):
        path = tmp_path / "delta.png"
        plots.delta_spectrum(path, LAYERS[name])
        return path.read_bytes()

    first = draw("ordinary")
    assert draw("ordinary") == first
    assert draw("one of two changed") != first


# ---- losses_by_setting ----

LOSSES = {
    "seeds": {"r 4, lr 1e-3": [2.0, 2.1, 1.9], "r 8, lr 1e-3": [1.5, 1.6, 1.7]},
    "one run each": {"r 4": [2.0], "r 8": [1.5], "r 16": [1.7]},
    "one setting": {"r 4": [2.0]},
    "some failed": {"r 4": [2.0, 2.1], "r 8": []},
    "all failed": {"r 4": [], "r 8": []},
    "equal losses": {"r 4": [2.0, 2.0], "r 8": [2.0, 2.0]},
    "odd labels": {r"target $x_^ \frac": [1.0], "target " + "q" * 80: [2.0]},
    "many": {f"r {number}": [1.0 / number] for number in range(1, 400)},
}


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_losses_by_setting(losses, tmp_path):
    path = tmp_path / "results.png"
    plots.losses_by_setting(path, losses)
    width, height = size_of(path)
    assert width > 700
    assert height > 100


def test_losses_by_setting_mark_the_lowest_mean(tmp_path, saved_figures):
    plots.losses_by_setting(tmp_path / "results.png", LOSSES["seeds"])
    axis = saved_figures[-1].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(LOSSES["seeds"])
    colors = [container.lines[0].get_color() for container in axis.containers]
    assert colors == [plots.COOL, plots.WARM]
    (bar,) = axis.containers[1].lines[2]
    (left, _), (right, _) = bar.get_segments()[0]
    assert (left, right) == pytest.approx((1.5, 1.7))


# ---- heat_table ----


@pytest.mark.parametrize("shape", [(5, 4), (1, 1), (2, 9)])
@pytest.mark.parametrize("equal", [False, True])
def test_heat_table(shape, equal, tmp_path):
    path = tmp_path / "table.png"
    values = np.ones(shape) if equal else np.arange(np.prod(shape), dtype=float).reshape(shape)
    rows = [f"row {i}" for i in range(shape[0])]
    columns = [f"column {j}" for j in range(shape[1])]
    plots.heat_table(path, values, rows, columns, "a $ title")
    width, height = size_of(path)
    assert width > height > 150 or shape == (5, 4)


# ---- rank_allocation ----


def ranks(*values, blocks=2):
    """Ranks by layer: those of q_proj and v_proj in each block."""
    names = []
    for number in range(blocks):
        names.append(f"model.layers.{number}.self_attn.q_proj")
        names.append(f"model.layers.{number}.self_attn.v_proj")
    return dict(zip(names, values, strict=True))


def two(q, v):
    return ranks(q, v, blocks=1)


HISTORIES = {}
HISTORIES["ordinary"] = (
    [(0, ranks(6, 6, 6, 6)), (10, ranks(6, 5, 6, 4)), (30, ranks(0, 5, 6, 1))],
    50,
)
HISTORIES["one allocation"] = ([(0, two(3, 3))], 5)
HISTORIES["the last step"] = ([(0, two(2, 2)), (9, two(1, 2))], 10)
HISTORIES["one step"] = ([(0, two(2, 1))], 1)
HISTORIES["nothing left"] = ([(0, two(1, 1)), (3, two(0, 0))], 9)
HISTORIES["all zero"] = ([(0, two(0, 0))], 9)
HISTORIES["resumed"] = ([(120, ranks(4, 4, 4, 4)), (130, ranks(4, 3, 4, 4))], 20)
HISTORIES["no block number"] = ([(0, {"lm_head": 3, "score": 4})], 9)
UNSORTED = {"layers.1.up_proj": 3, "layers.0.up_proj": 4, "lm_head": 1}
HISTORIES["blocks out of order"] = ([(0, UNSORTED)], 9)
HISTORIES["no allocation"] = ([], 9)
HISTORIES["no step"] = ([], 0)


def block_of(name):
    """The number of the block in a layer's path; -1 without one."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers[0] if numbers else -1


def label_of(name):
    kind = name.split(".")[-1]
    number = block_of(name)
    return kind if number < 0 else f"{number} {kind}"


@pytest.mark.parametrize(("history", "steps"), HISTORIES.values(), ids=HISTORIES)
def test_rank_allocation(history, steps, tmp_path, saved_figures):
    path = tmp_path / "ranks.png"
    plots.rank_allocation(path, history, steps)
    assert min(size_of(path)) > 200
    above, below = saved_figures[-1].axes[:2]
    last = history[-1][1] if history else {}
    # From the top: by block, those without a block first, and within a block in the given order.
    names = sorted(last, key=block_of)
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert labels == [label_of(name) for name in names]
    numbers = [text.get_text() for text in below.texts]
    assert numbers == [str(last[name]) for name in names]
    if history:
        drawn = below.collections[0].get_array().reshape(len(names), len(history))
        means = above.patches[0].get_data().values.tolist()
        for column, mean, (_, expected) in zip(drawn.T, means, history, strict=True):
            assert column.tolist() == [expected[name] for name in names]
            assert mean == np.mean(list(expected.values()))


# ---- spectra ----

SPECTRA = {}
SPECTRA["some"] = {"a.q": [3.0, 1.0, 0.0], "b.q": [2.0], "a.$v": None}
SPECTRA["zero"] = {"q": [0.0]}
SPECTRA["none"] = {}


@pytest.mark.parametrize("layers", SPECTRA.values(), ids=SPECTRA)
def test_spectra(layers, tmp_path):
    path = tmp_path / "spectra.png"
    plots.spectra(path, layers)
    assert size_of(path) == (975, 600)


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_spectra_that_cannot_be_written_leave_the_previous_picture(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"the previous one")

    def full(self, file, **options):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space") as caught:
        plots.spectra(path, {"q": [1.0]})
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the previous one"
    assert plt.get_fignums() == []


@pytest.mark.parametrize("count", [1, 2, 4, 9, 100])
def test_spectra_count_singular_values_in_whole_numbers(count, tmp_path, saved_figures):
    values = [1.0 / (i + 1) for i in range(count)]
    plots.spectra(tmp_path / "a.png", {"q": values})
    ticks = saved_figures[-1].axes[0].get_xticks()
    assert len(ticks) > 0
    assert list(ticks) == [round(tick) for tick in ticks]


def test_plots_leave_no_figure_open(tmp_path):
    path = tmp_path / "picture.png"
    plots.loss_curves(path, RUNS["ordinary"])
    plots.delta_spectrum(path, LAYERS["ordinary"])
    plots.spectra(path, {"q": [1.0]})
    assert plt.get_fignums() == []
    assert plots.available()


def test_plots_leave_the_backend_the_settings_and_the_figures_of_a_program(tmp_path):
    matplotlib = plt.matplotlib
    figure = plt.figure()
    with matplotlib.rc_context({"font.size": 31}):
        before = dict(matplotlib.rcParams)
        plots.loss_curves(str(tmp_path / "picture.png"), RUNS["ordinary"])
        plots.heat_table(tmp_path / "table.png", np.eye(2), "ab", "cd", "a title")
        assert dict(matplotlib.rcParams) == before
    assert plt.gcf() is figure
    plt.close(figure)


PROGRAM = """
import sys
from minilora.lab import plots
assert plots.available(), plots.why_unavailable()
plots.spectra(sys.argv[1], {"q": [1.0]})
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
print(matplotlib.rcParams._get_backend_or_none())
"""


@pytest.mark.parametrize("backend", ["svg", "module://of.a.notebook", "no such backend", None])
def test_plots_leave_a_backend_that_pyplot_has_not_chosen_yet(backend, tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    if backend:
        variables["MPLBACKEND"] = backend
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "a.png")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    chosen = None if backend == "no such backend" else backend
    assert done.stdout.strip() == str(chosen)
