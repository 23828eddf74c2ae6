"""The pictures are drawn for ordinary runs and for odd ones: one step, nothing measured, nothing changed."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from minilora.lab import plots

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install -e .[plot]")


def size_of(path):
    """(width, height) of a PNG file, from its header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def spectrum(count, top=1.0):
    return top * np.exp(-np.arange(count) / 3)


RUNS = {
    "ordinary": {
        "a": (np.linspace(8, 4, 200), [(0, 8.0), (100, 5.0), (200, 4.2)]),
        "b": ([4.0] * 50, [(0, 4.1)]),
    },
    "one stage": {"a": ([8.0, 7.0, 6.0], [(3, 6.0)])},
    "one step": {"a": ([8.0], [(0, 8.0), (1, 7.9)]), "b": ([4.0], [])},
    "nothing measured": {"a": ([8.0, 7.0], []), "b": ([6.0, 5.0], [])},
    "no steps": {"a": ([], []), "b": ([], [(0, 4.0)])},
    "three stages": dict.fromkeys("abc", ([3.0, 2.0], [(0, 3.0)])),
    "a long title with $ _ ^ and \\": {"a $x_^ \\frac": ([1.0, 2.0], [])},
}


@pytest.mark.parametrize("stages", RUNS.values(), ids=RUNS)
def test_loss_curves(stages, tmp_path):
    plots.loss_curves(tmp_path / "loss.png", stages)
    width, height = size_of(tmp_path / "loss.png")
    assert width > 2 * height > 400


def block(number, delta):
    return {
        f"model.layers.{number}.self_attn.{name}": (spectrum(16), delta)
        for name in ("q_proj", "v_proj")
    }


LAYERS = {
    "ordinary": {
        **block(0, spectrum(4, 0.1)),
        **block(1, spectrum(4, 3.0)),
        **block(10, spectrum(2, 0.2)),
    },
    "one layer": {"model.layers.0.mlp.up_proj": (spectrum(8), spectrum(2))},
    "rank one": {"model.layers.0.mlp.up_proj": (spectrum(8), spectrum(1))},
    "nothing changed": {**block(0, np.zeros(4)), **block(1, np.zeros(4))},
    "one of two changed": {**block(0, np.zeros(4)), **block(1, spectrum(4))},
    "no block number": {
        "lm_head": (spectrum(16), spectrum(4)),
        "score": (spectrum(3), spectrum(2)),
    },
    "some without": {**block(0, spectrum(4)), "lm_head": (spectrum(16), spectrum(4))},
    "blocks of different kinds": {
        **block(0, spectrum(4)),
        "model.layers.1.mlp.up_proj": (spectrum(8), spectrum(2)),
    },
    "all zero": {"model.layers.0.mlp.up_proj": (np.zeros(8), np.zeros(2))},
    "a tail of zeros": {"model.layers.0.mlp.up_proj": (spectrum(8), np.array([1e-3, 1e-12, 0.0]))},
    "tiny and huge": {**block(0, spectrum(4, 1e-12)), **block(1, spectrum(4, 1e12))},
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_delta_spectrum(layers, tmp_path):
    plots.delta_spectrum(tmp_path / "delta.png", layers)
    width, height = size_of(tmp_path / "delta.png")
    assert width > 300
    assert height > 200


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_every_row_and_column_is_named(layers, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        plots.delta_spectrum(tmp_path / "delta.png", layers)
    shown = [axis for axis in plt.gcf().axes if axis.get_visible()]
    plt.close("all")
    assert len(shown) == len(layers)
    assert sorted(t for axis in shown if (t := axis.get_title())) == sorted(
        {name.split(".")[-1] for name in layers}
    )
    numbers = {part for name in layers for part in name.split(".") if part.isdecimal()}
    assert sorted(t for axis in shown if (t := axis.get_ylabel())) == sorted(
        f"layer {number}" for number in numbers
    )


@pytest.mark.parametrize("shape", [(5, 4), (1, 1), (2, 9)])
@pytest.mark.parametrize("equal", [False, True])
def test_heat_table(shape, equal, tmp_path):
    values = np.ones(shape) if equal else np.arange(shape[0] * shape[1], dtype=float).reshape(shape)
    rows, columns = (
        [f"{kind} {i}" for i in range(n)] for kind, n in zip(("row", "column"), shape, strict=True)
    )
    plots.heat_table(tmp_path / "table.png", values, rows, columns, "a $ title")
    width, height = size_of(tmp_path / "table.png")
    assert width > height > 150 or shape == (5, 4)


def ranks(*values, blocks=2):
    names = [
        f"model.layers.{number}.self_attn.{kind}"
        for number in range(blocks)
        for kind in ("q_proj", "v_proj")
    ]
    return dict(zip(names, values, strict=True))


HISTORIES = {
    "ordinary": ([(0, ranks(6, 6, 6, 6)), (10, ranks(6, 5, 6, 4)), (30, ranks(0, 5, 6, 1))], 50),
    "one allocation": ([(0, ranks(3, 3, blocks=1))], 5),
    "the last step": ([(0, ranks(2, 2, blocks=1)), (9, ranks(1, 2, blocks=1))], 10),
    "one step": ([(0, ranks(2, 1, blocks=1))], 1),
    "nothing left": ([(0, ranks(1, 1, blocks=1)), (3, ranks(0, 0, blocks=1))], 9),
    "all zero": ([(0, ranks(0, 0, blocks=1))], 9),
    "resumed": ([(120, ranks(4, 4, 4, 4)), (130, ranks(4, 3, 4, 4))], 20),
    "no block number": ([(0, {"lm_head": 3, "score": 4})], 9),
    "blocks out of order": ([(0, {"layers.1.up_proj": 3, "layers.0.up_proj": 4, "lm_head": 1})], 9),
    "no allocation": ([], 9),
    "no step": ([], 0),
}


@pytest.mark.parametrize(("history", "steps"), HISTORIES.values(), ids=HISTORIES)
def test_rank_allocation(history, steps, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        plots.rank_allocation(tmp_path / "ranks.png", history, steps)
    assert min(size_of(tmp_path / "ranks.png")) > 200
    above, below = plt.gcf().axes[:2]
    plt.close("all")
    found = history[-1][1] if history else {}
    names = [name.split(".") for name in found]
    assert sorted(label.get_text() for label in below.get_yticklabels()) == sorted(
        f"{parts[parts.index('layers') + 1]} {parts[-1]}" if "layers" in parts else parts[-1]
        for parts in names
    )
    # The numbers at the right, from the top: by block, those without one first, and in a block as they came.
    place = sorted(
        found, key=lambda name: next((int(p) for p in name.split(".") if p.isdecimal()), -1)
    )
    assert [text.get_text() for text in below.texts] == [str(found[name]) for name in place]
    if history:
        drawn = below.collections[0].get_array().reshape(len(place), len(history))
        assert drawn.tolist() == [[ranks[name] for _, ranks in history] for name in place]
        assert above.patches[0].get_data().values.tolist() == [
            np.mean(list(r.values())) for _, r in history
        ]


def test_a_picture_depends_on_its_numbers_alone(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for path, name in zip(files, ("ordinary", "ordinary", "one of two changed"), strict=True):
        plots.delta_spectrum(path, LAYERS[name])
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(
    "layers",
    [{"a.q": [3.0, 1.0, 0.0], "b.q": [2.0], "a.$v": None}, {"q": [0.0]}, {}],
    ids=["some", "zero", "none"],
)
def test_spectra(layers, tmp_path):
    plots.spectra(tmp_path / "spectra.png", layers)
    assert size_of(tmp_path / "spectra.png") == (975, 600)


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_a_picture_that_fails_leaves_the_one_before(name, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    (tmp_path / name).write_bytes(b"the one before")

    def full(self, file, **options):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space") as caught:
        plots.spectra(tmp_path / name, {"q": [1.0]})
    assert caught.value.filename == str(tmp_path / name)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        (name, b"the one before")
    ]
    assert plt.get_fignums() == []


@pytest.mark.parametrize("count", [1, 2, 4, 9, 100])
def test_singular_values_are_counted_in_whole_numbers(count, tmp_path, monkeypatch):
    ticks = []

    def look(plt, figure, path):
        ticks.extend(figure.axes[0].get_xticks())
        plt.close(figure)

    monkeypatch.setattr(plots, "_save", look)
    plots.spectra(tmp_path / "a.png", {"q": [1.0 / (i + 1) for i in range(count)]})
    assert ticks == [round(tick) for tick in ticks]


def test_no_figure_stays_open(tmp_path):
    import matplotlib.pyplot as plt

    plots.loss_curves(tmp_path / "loss.png", RUNS["ordinary"])
    plots.delta_spectrum(tmp_path / "delta.png", LAYERS["ordinary"])
    plots.spectra(tmp_path / "spectra.png", {"q": [1.0]})
    assert plt.get_fignums() == []
    assert plots.available()


def test_the_running_mean():
    assert plots._running_mean([1.0, 2.0, 6.0, 0.0], 2).tolist() == [1.0, 1.5, 4.0, 3.0]
    assert plots._running_mean([3.0, 1.0], 100).tolist() == [3.0, 2.0]
    assert plots._running_mean([], 5).tolist() == []
