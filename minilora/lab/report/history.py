"""How a run went, from its logs: the losses of its batches, and of held-out texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError, FormatError
from ...training.checkpoints import read_log
from .content import Curve, Fact, Row, Training
from .measuring import UNIT, finite

NUMBERS = ("step", "loss", "bits_per_byte", "also_loss", "also_bits_per_byte")
POINTS = 1000  # of a curve; more steps are averaged


class History(NamedTuple):
    """The lines of a run's logs, of which NUMBERS are read: see training/checkpoints.py."""

    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]


def read_history(run: Path) -> History:
    """The logs of a run. ConfigError if it has none; FormatError for lines that are not a log's."""
    if not (run / "log.jsonl").is_file():
        raise ConfigError(f"{run.name} has no log.jsonl, in which a run notes its losses")
    return History(*(_read_lines(run / name) for name in ("log.jsonl", "eval.jsonl")))


def _read_lines(path: Path) -> list[dict[str, float]]:
    """Each line with a step and a loss, and what else of NUMBERS it has."""
    lines = []
    try:
        for line in read_log(path) if path.is_file() else []:
            numbers = {name: float(line[name]) for name in NUMBERS if name in line}
            if not {"step", "loss"} <= numbers.keys() or not math.isfinite(numbers["step"]):
                raise ValueError("a line has no step, or no loss")
            lines.append(numbers)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path} is not the log of a run: {error!r:.100}") from None
    return lines


def draw_training(history: History) -> Training:
    """The losses over the steps, in bits per byte if the evaluations say how long tokens are."""
    ratio = _nats_per_bit(history.evaluations)
    unit = UNIT if ratio else "nats per token"
    steps = [int(line["step"]) for line in history.steps]
    losses = [line["loss"] / (ratio or 1.0) for line in history.steps]
    curves = [Curve("training", *_average(steps, losses))]
    field = "bits_per_byte" if ratio else "loss"
    for name, key in (("held-out text", field), ("second text", f"also_{field}")):
        lines = [line for line in history.evaluations if key in line]
        if lines:
            at = [int(line["step"]) for line in lines]
            curves.append(Curve(name, at, [finite(line[key]) for line in lines]))
    return Training(unit, curves)


def _nats_per_bit(evaluations: Sequence[dict[str, float]]) -> float | None:
    """Nats per token over bits per byte of the held-out text; None if no evaluation says it."""
    for line in evaluations:
        bits = line.get("bits_per_byte", 0.0)
        if bits > 0 and 0 < line["loss"] / bits < math.inf:
            return line["loss"] / bits
    return None


def _average(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], Row]:
    """At most POINTS points: means of as many neighbours as that takes. None if not finite."""
    size = max(1, math.ceil(len(steps) / POINTS))
    places: list[int] = []
    means: Row = []
    for start in range(0, len(steps), size):
        part = values[start : start + size]
        places.append(steps[min(start + size, len(steps)) - 1])
        means.append(finite(sum(part) / len(part)))
    return places, means


def format_change(before: float, after: float, error: float = math.nan) -> str:
    """Both losses, their difference, and its standard error if there is one."""
    margin = "" if math.isnan(error) else f" +- {error:.4f}"
    return f"{before:.4f} -> {after:.4f} ({after - before:+.4f}{margin})"


def list_results(history: History, keeps_best: bool = False) -> list[Fact]:
    """The steps, and the losses before and after of the texts that the run evaluated.

    keeps_best   whether the run has saved the weights with the lowest held-out loss
    """
    facts = [Fact("Steps", f"{len(history.steps):,}")]
    held_out = {int(line["step"]): line["loss"] for line in history.evaluations}
    for name, key in (("Held-out", "bits_per_byte"), ("Second text's", "also_bits_per_byte")):
        lines = [line for line in history.evaluations if key in line]
        values = {int(line["step"]): line[key] for line in lines}
        if len(values) > 1:
            saved = min(values, key=held_out.__getitem__) if keeps_best else max(values)
            before, after = values[min(values)], values[saved]
            facts.append(Fact(f"{name} {UNIT}", format_change(before, after)))
            if saved != max(values):
                where = Fact("Weights saved", f"after {saved:,} steps")
                facts += [] if where in facts else [where]
    return facts
