"""Whether a checkpoint and a run are the same run: field by field, with what differs named."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from typing import Any

from ..errors import CheckpointError
from ..formats.disk import JsonObject
from ..optim import warmup_cosine
from ..precision import FLOAT32

CHECKSUM = 64  # characters of a SHA-256
# What checkpoints mean that do not say these.
OLDER: JsonObject = {"compute": FLOAT32, "keep": "last", "optimizer": "adamw"}


def require_same_run(
    folder: str, before: JsonObject, now: JsonObject, done: int, changed: Collection[str] = ()
) -> None:
    """CheckpointError unless a checkpoint after `done` steps belongs to this run.

    before, now   what makes the two runs what they are (`Run.identity`); `before` may lack OLDER
    changed       fields that may differ

    Another number of steps is the same run if the steps that are done had the learning rates that
    this run gives them: it then ends with the bits of a run that began with that number.
    """
    before = OLDER | before
    if now["steps"] < done:
        raise CheckpointError(
            f"{folder!r} has done {done} steps, more than steps = {now['steps']}: "
            f"give at least {done}, or begin a new run in another folder"
        )
    if "sum" not in before:
        raise CheckpointError(
            f"{folder!r} was written by an older minilora, which added the gradients of a step's "
            f"shards from left to right; now the sum is a {now['sum']}, whose last bits differ: "
            "finish the run with the version that began it, or begin a new run in another folder"
        )
    advice = "resume with the values that it had, or begin a new run in another folder"
    differences = []
    for field, value in now.items():
        was = before.get(field)
        if was == value or field in changed:
            continue
        if field == "steps" and type(was) is int:
            if _learning_rates(now, was, done) == _learning_rates(now, value, done):
                continue
            advice += (
                f"; the learning rates of the {done} steps done depend on steps, "
                "which may change during the warm-up, and with floor = 1 at any time"
            )
        differences.append(f"{field} (was {_shown(was)}, now {_shown(value)})")
    if differences:
        raise CheckpointError(
            f"{folder!r} belongs to another run: {', '.join(differences)}; {advice}"
        )


def _learning_rates(now: JsonObject, steps: int, done: int) -> list[float]:
    """The factors of the learning rate in the first `done` steps of a run of `steps`."""
    return [warmup_cosine(step, steps, now["warmup"], now["floor"]) for step in range(done)]


def _shown(value: object) -> str:
    """A value in a message; the beginning is enough of a checksum."""
    text = repr(value)
    is_checksum = isinstance(value, str) and len(value) == CHECKSUM
    return f"{text[:9]}...'" if is_checksum else f"{text:.40}"


def finite_loss(loss: Any) -> float:
    """A loss of a checkpoint: a run with another one could not be saved again. Or ValueError."""
    if type(loss) not in (int, float) or not math.isfinite(loss):
        raise ValueError(f"a loss of {loss!r:.40}")
    return float(loss)


def read_also(state: Any, text: dict[str, str] | None) -> list[tuple[int, float]]:
    """The evaluations of a second text that a checkpoint has; none, with a warning, of another one.

    state   what the checkpoint says of it, or None
    text    the checksums of the run's second text, or None
    """
    if state is None or text is None:
        return []
    if state["text"] != text:
        warnings.warn(
            "the second text to evaluate on is another one than before: its earlier losses are "
            "left out",
            stacklevel=4,
        )
        return []
    return [(int(step), finite_loss(loss)) for step, loss in state["losses"]]
