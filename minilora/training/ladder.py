"""A learning rate from short runs: a ladder of rates in two orders of the data, and an interval.

A short run trains what the whole run would train, from the same weights, on the batches with which
that run begins. It takes an eighth of the steps, and its schedule is shrunk alike. The rates of the
ladder differ by factors of two; it goes on while the best rate is at an edge.

Short runs know the best rate of the whole run only to a factor, so that the answer is an interval.
Two orders of the data show how much of a difference is chance. Where the laboratory has measured
it, the best rate of a run is that of its eighth or twice as high: the interval begins at the lowest
of the orders' best rates, and ends one rung above the highest. benchmarks/rates.py measures how
often it holds the best rate.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, NonFiniteError
from ..formats.disk import JsonObject
from ..nn import Parameter
from .loop import evaluate_by_task
from .parallel import ShardedStep
from .run import Run, Text
from .settings import Settings

FACTOR = 2.0  # between neighbouring rates
SHARE = 8  # a short run has one step for so many of the whole run
SHORTEST = 20  # steps that a short run has at least, if the whole run has as many
ORDERS = 2  # of the data
RUNGS = 14  # the ladder ends so many rungs below and above the rate with which it begins
ABOVE = 1  # rungs from the highest of the short runs' best rates to the end of the interval
BIT = math.log(2)  # in nats
LEAST_WINDOWS = 64  # of a held-out text, if it has as many
HELD_OUT = "held-out loss"
TRAINING = "training loss of the second half"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A short run.

    order   of the data: 0 is that of the whole run
    loss    that it is judged by, in nats per token; None if it was stopped
    losses  of its steps
    """

    rate: float
    order: int
    loss: float | None
    losses: Sequence[float]

    @property
    def score(self) -> float:
        return math.inf if self.loss is None else self.loss


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the ladder says.

    arms        the short runs, by order and rate
    steps       of a short run
    whole       steps of the run that they stand for
    judge       what their losses are: HELD_OUT or TRAINING
    low, high   the interval of the best rate
    """

    arms: list[Arm]
    steps: int
    whole: int
    judge: str
    low: float
    high: float

    @property
    def middle(self) -> float:
        """The rate to train at: the middle of the interval by ratio, in three digits."""
        return float(f"{math.sqrt(self.low) * math.sqrt(self.high):.3g}")

    def curve(self) -> list[JsonObject]:
        """The losses of each rate, by order: None if the run was stopped or was not made."""
        losses = {(arm.rate, arm.order): arm.loss for arm in self.arms}
        rates = sorted({arm.rate for arm in self.arms})
        orders = range(ORDERS)
        return [{"rate": r, "losses": [losses.get((r, order)) for order in orders]} for r in rates]

    def to_dict(self) -> JsonObject:
        """The content of rates.json."""
        arms = [
            {"rate": arm.rate, "order": arm.order, "loss": arm.loss, "steps": len(arm.losses)}
            for arm in self.arms
        ]
        return {
            "lr": self.middle,
            "interval": [self.low, self.high],
            "judged by": self.judge,
            "steps": self.steps,
            "steps of the run": self.whole,
            "short runs": arms,
        }


# ---- the search ----------------------------------------------------------------------------------


def find_rates(
    model: Any,
    tokens: Text,
    settings: Settings,
    held_out: Text | None = None,
    report: Callable[[Arm], None] = lambda arm: None,
) -> Rates:
    """An interval that holds the best learning rate of a run, from short runs.

    model     ready to train; it comes back in eval mode, with the weights that it had. An AdaLoRA
              adapter must plan its ranks for the steps of `shorten(settings)`
    settings  of the whole run; the ladder begins at settings.lr
    held_out  the text that decides; without one, the training loss does
    report    is called with each short run

    ConfigError if the best rate is at the end of the ladder.
    """
    runs = ShortRuns(model, tokens, shorten(settings), held_out)
    first = settings.lr

    def measure(rung: int, order: int) -> Arm:
        arm = runs.train(first * FACTOR**rung, order)
        report(arm)
        return arm

    try:
        arms, bests = climb(measure)
    finally:
        runs.restore()
    low, high = interval(bests)
    return Rates(
        arms=arms,
        steps=runs.settings.steps,
        whole=settings.steps,
        judge=TRAINING if held_out is None else HELD_OUT,
        low=first * FACTOR**low,
        high=first * FACTOR**high,
    )


def interval(bests: Sequence[int]) -> tuple[int, int]:
    """The rungs between which the whole run's best rate is, from the best one of each order."""
    return min(bests), max(bests) + ABOVE


def climb(measure: Callable[[int, int], Arm]) -> tuple[list[Arm], list[int]]:
    """(the short runs, the best rung of each order of the data)

    measure   (rung, order) -> its short run; rung 0 is the rate with which the ladder begins

    The ladder of the first order begins with three rungs around 0, that of the next order with
    three around the best rung so far. A ladder grows while its best rung is at an edge.
    """
    arms: list[Arm] = []
    bests: list[int] = []
    for order in range(ORDERS):
        middle = bests[-1] if bests else 0
        ladder = {rung: measure(rung, order) for rung in (middle, middle + 1, middle - 1)}
        best = _best_rung(ladder)
        while best in (min(ladder), max(ladder)):
            next_rung = best - 1 if best == min(ladder) else best + 1
            if abs(next_rung) > RUNGS:
                raise ConfigError(_describe_end(ladder[best]))
            ladder[next_rung] = measure(next_rung, order)
            best = _best_rung(ladder)
        arms += [ladder[rung] for rung in sorted(ladder)]
        bests.append(best)
    return arms, bests


def _best_rung(ladder: dict[int, Arm]) -> int:
    """The rung with the lowest loss; the lowest one of several."""
    return min(sorted(ladder), key=lambda rung: ladder[rung].score)


def _describe_end(arm: Arm) -> str:
    """What is wrong if the arm, at the end of the ladder, is its best one."""
    if arm.loss is None:
        return (
            f"each short run was lost, also at the lowest rate, {arm.rate:.3g}: its loss was not "
            "finite; look at the weights and the text, or give --lr a number"
        )
    return (
        f"short runs do best at the last rate that they try, {arm.rate:.3g}, {RUNGS} factors of "
        f"{FACTOR:g} from the first: perhaps the text teaches the model nothing; begin at another "
        "rate with `minilora lab rates --lr X`, or train with a number as --lr"
    )


# ---- short runs ----------------------------------------------------------------------------------


def shorten(settings: Settings) -> Settings:
    """The settings of a short run: fewer steps, and a warm-up that is shorter by the same ratio."""
    steps = min(settings.steps, max(settings.steps // SHARE, SHORTEST))
    return dataclasses.replace(
        settings,
        steps=steps,
        warmup=round(settings.warmup * steps / settings.steps),
        keep="last",
        eval_every=None,
        save_every=None,
        abort_on_divergence=False,
    )


class ShortRuns:
    """Trains a model again and again from the weights that it has now.

    settings   of a short run: see `shorten`
    """

    def __init__(self, model: Any, tokens: Text, settings: Settings, held_out: Text | None = None):
        self.model = model
        self.tokens = tokens
        self.settings = settings
        self.held_out = held_out
        self.start = [(p, _copy(p)) for p in model.parameters() if p.requires_grad]
        self.best: dict[int, Arm] = {}  # by order

    def restore(self) -> None:
        """Give the model the weights with which each run begins."""
        for p, array in self.start:
            p.data = p.backend.from_numpy(array)
        self.model.eval()

    def train(self, rate: float, order: int) -> Arm:
        """Train at a rate, with the data in an order; the same start and batches at every rate."""
        settings = dataclasses.replace(self.settings, lr=rate, seed=self.settings.seed ^ order)
        self.restore()
        base = self.model.train().get_base_model()
        base.gradient_checkpointing_enable(settings.gradient_checkpointing)
        run = Run(self.model, self.tokens, settings, os.devnull)
        sharded = ShardedStep(
            self.model,
            settings.threads,
            run.settings.shard,
            graph=settings.graph,
            part=run.settings.part,
        )
        # A rate that is too high for the numbers warns, and is one of the results.
        with sharded, warnings.catch_warnings(action="ignore"):
            loss = self._train(run, sharded, order)
        arm = Arm(rate, order, loss, run.losses)
        if order not in self.best or arm.score < self.best[order].score:
            self.best[order] = arm
        return arm

    def _train(self, run: Run, sharded: ShardedStep, order: int) -> float | None:
        """Take all steps; returns the loss that decides, or None for a run that was stopped."""
        try:
            while run.done < run.settings.steps:
                run.step(sharded)
                if self._is_beyond(run.losses, order):
                    return None
            return self._judge(run, sharded)
        except NonFiniteError:
            return None

    def _is_beyond(self, losses: Sequence[float], order: int) -> bool:
        """Is the last loss one bit above that of the best run in the same step?"""
        if order not in self.best or self.best[order].loss is None:
            return False
        return losses[-1] > self.best[order].losses[len(losses) - 1] + BIT

    def _judge(self, run: Run, sharded: ShardedStep) -> float:
        """The held-out loss, of about as many windows as the run has trained on; see `Rates`."""
        if self.held_out is None:
            return statistics.fmean(run.losses[run.done // 2 :])
        settings = run.settings
        limit = max(LEAST_WINDOWS, settings.steps * settings.sequences)
        losses = evaluate_by_task(
            self.model, self.held_out, settings.context, limit=limit, sharded=sharded
        )
        return statistics.fmean(losses.values())


def _copy(p: Parameter) -> np.ndarray:
    return np.array(p.backend.to_numpy(p.data))
