"""The losses of a run from its logs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from minilora.errors import ConfigError, FormatError
from minilora.lab.report.history import POINTS, draw_training, list_results, read_history


def write(folder: Any, steps: list[Any], evaluations: list[Any]) -> Any:
    for name, lines in (("log.jsonl", steps), ("eval.jsonl", evaluations)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluation(step: int, bits: float, also: float | None = None) -> dict[str, Any]:
    line = {"step": step, "loss": bits * math.log(2) * 3, "bits_per_byte": bits}
    if also is not None:
        line |= {"also_loss": also * math.log(2) * 2, "also_bits_per_byte": also}
    return line


def test_draw_training_has_every_curve_in_bits_per_byte(tmp_path):
    steps = [{"step": i, "loss": (5 - i) * math.log(2) * 3} for i in range(4)]
    evaluations = [evaluation(0, 4.0, 2.0), evaluation(4, 1.5, 2.5)]
    drawn = draw_training(read_history(write(tmp_path, steps, evaluations)))
    assert drawn.unit == "bits per byte"
    training, held_out, second = drawn.curves
    assert training.steps == [0, 1, 2, 3]
    assert training.values == pytest.approx([5, 4, 3, 2])
    assert (held_out.name, held_out.steps, held_out.values) == ("held-out text", [0, 4], [4.0, 1.5])
    assert second.values == [2.0, 2.5]


def test_draw_training_without_evaluations_is_in_nats(tmp_path):
    drawn = draw_training(read_history(write(tmp_path, [{"step": 0, "loss": 3.5}], [])))
    assert drawn.unit == "nats per token"
    assert [curve.name for curve in drawn.curves] == ["training"]
    assert drawn.curves[0].values == [3.5]


def test_draw_training_averages_a_long_run_and_leaves_out_what_is_not_finite(tmp_path):
    steps = [{"step": i, "loss": float(i)} for i in range(3 * POINTS)]
    steps[-1]["loss"] = "nan"
    curve = draw_training(read_history(write(tmp_path, steps, []))).curves[0]
    assert len(curve.steps) == len(curve.values) == POINTS
    assert curve.steps[:2] == [2, 5]
    assert curve.values[:2] == [1.0, 4.0]
    assert curve.values[-1] is None


def test_list_results_are_those_of_the_saved_weights(tmp_path):
    steps = [{"step": i, "loss": 1.0} for i in range(8)]
    lines = [evaluation(0, 4.0, 2.0), evaluation(4, 1.5, 2.25), evaluation(8, 2.0, 3.0)]
    history = read_history(write(tmp_path, steps, lines))
    last = {fact.name: fact.value for fact in list_results(history)}
    assert last["Steps"] == "8"
    assert last["Held-out bits per byte"] == "4.0000 -> 2.0000 (-2.0000)"
    assert last["Second text's bits per byte"] == "2.0000 -> 3.0000 (+1.0000)"
    assert "Weights saved" not in last
    best = {fact.name: fact.value for fact in list_results(history, keeps_best=True)}
    assert best["Held-out bits per byte"] == "4.0000 -> 1.5000 (-2.5000)"
    assert best["Second text's bits per byte"] == "2.0000 -> 2.2500 (+0.2500)"
    assert best["Weights saved"] == "after 4 steps"


LINES = ["x", "[]", "{}", '{"step": "a", "loss": 1}', '{"step": 1}', '{"step": "inf", "loss": 1}']
LINES += ['{"step": 1, "loss": [1]}', f'{{"step": 1{"0" * 400}, "loss": 1}}', "[" * 10**5]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_read_history_refuses_what_is_no_log(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(FormatError, match=r"log\.jsonl"):
        read_history(tmp_path)


def test_read_history_names_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"log\.jsonl"):
        read_history(tmp_path)
