"""Measure `minilora lab rates`: does its interval hold the best learning rate of the whole run?

    python benchmarks/rates.py [--lab DIR] [--only NUMBER ...] [--write]

Each trial is an arm of the laboratory, a method with its rank, base and text, and a seed of the
short runs' start and orders. The arm's best rate is the one of the lowest mean loss of whole runs
over three seeds, on the laboratory's grid of rates, which has factors of two and is extended while
the best one is at its edge. The ladder begins at the same rate for every arm, that of `finetune`,
and knows nothing of that grid. `--lab` names the folder of a laboratory (`minilora lab all`), whose
runs are used and which gets those that it lacks; without it every run is made anew, which takes an
hour and a half of one core. With it, the trials take ten minutes.

The rule of the interval was chosen with the trials of the first seed in view; those of the second
one are fresh. Conditions, exit code 1 if one does not hold:

    holds    the interval holds the best rate in at least nine of ten trials, and of fresh trials
    width    it has three rates of the grid on average, or fewer

Beside it are shown how often the best rate of the short runs and its two neighbours would hold it,
and the bits per byte that the middle of the interval loses against the best rate. `--write` stores
the numbers in benchmarks/results/rates.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.cli.rates import FIRST
from minilora.lab.bench import Bench, silent
from minilora.lab.experiments import (
    dora,
    family,
    forgets,
    interference,
    lowrank,
    qlora,
    rank,
)
from minilora.lab.protocol import Arm, Plan, Row, training_ids
from minilora.lab.tuning import arm_of, best_rate, measure_fit, tuned
from minilora.training.ladder import FACTOR, ORDERS, Rates, find_rates, shorten

RESULT = Path(__file__).parent / "results" / "rates.json"
LEAST = 0.9  # of the trials
WIDEST = 3.0  # rates of the grid, on average
PLAN = Plan()
SEEN, FRESH = 0, 2  # seeds; the orders of the data are 0 and 1, 2 and 3


def arms(experiment: Any, *names: str) -> list[Arm]:
    return [arm_of(experiment.ARMS, {"arm": name}) for name in names]


MAPS = ["LoHa", "LoKr", "HiRA", "VeRA", "OFT", "IA3", "FourierFT", "MiSS", "UniLoRA"]
ARMS = [
    *rank.ARMS,
    *arms(dora, "DoRA"),
    *arms(qlora, "nf4"),
    *arms(forgets, forgets.WHOLE),
    *arms(family, "AdaLoRA", *MAPS, "LoRA+", "LoRA-FA", "Riemannian"),
    *arms(interference, "c r=4", "charmap r=1", "json r=4", "python r=4", "shared r=4"),
    *lowrank.ARMS,
]


def tune(bench: Bench, arm: Arm) -> list[Row]:
    """The whole runs that tune an arm."""
    rows: list[Row] = []
    while True:
        known = [(row["lr"], row["seed"]) for row in rows]
        cases = [c for c in tuned(PLAN, rows, [arm]) if (c["lr"], c["seed"]) not in known]
        if not cases:
            return rows
        rows += [case | measure_fit(bench, [arm], case) for case in cases]


def search(bench: Bench, arm: Arm, seed: int) -> Rates:
    """What the ladder says; an AdaLoRA plans its ranks for the short run, as in finetune."""
    whole = bench.settings(arm, FIRST, seed)
    short = {**arm.settings, "steps": shorten(whole).steps}
    with silent():
        model = bench.prepare(dataclasses.replace(arm, settings=short), seed)
        held_out = bench.held_out(arm.task)["tune"]
        return find_rates(model, training_ids(arm.task), whole, held_out)


def loss_at(bench: Bench, arm: Arm, rate: float) -> float:
    """Bits per byte of the reported half: the mean over the seeds; inf if one diverged."""
    losses = [bench.fit(arm, rate, seed)["report"] for seed in PLAN.seeds]
    return math.inf if None in losses else statistics.fmean(losses)


def neighbours(rates: Rates) -> tuple[float, float]:
    """The best rate of the short runs, by the mean over the orders, and its two neighbours."""
    curve = [row for row in rates.curve() if None not in row["losses"]]
    best = min(curve, key=lambda row: statistics.fmean(row["losses"]))["rate"]
    return best / FACTOR, best * FACTOR


def holds(interval: Sequence[float], rate: float) -> bool:
    low, high = interval
    return low <= rate * (1 + 1e-9) and rate <= high * (1 + 1e-9)


def measure(bench: Bench, arm: Arm, seed: int) -> dict[str, Any]:
    best = best_rate(tune(bench, arm), arm.name)
    begun = time.process_time()
    rates = search(bench, arm, seed)
    seconds = time.process_time() - begun
    steps = sum(len(short.losses) for short in rates.arms)
    interval = rates.low, rates.high
    return {
        "arm": arm.name,
        "base": arm.base,
        "seed": seed,
        "best rate": best,
        "interval": interval,
        "rungs": round(math.log(rates.high / rates.low, FACTOR)) + 1,
        "holds": holds(interval, best),
        "neighbours hold": holds(neighbours(rates), best),
        "chosen": rates.middle,
        "loss": loss_at(bench, arm, rates.middle) - loss_at(bench, arm, best),
        "short runs": len(rates.arms),
        "whole runs' worth": round(steps / rates.whole, 2),
        "seconds": round(seconds, 1),
        "bests": [best_of(rates, order) for order in range(ORDERS)],
    }


def best_of(rates: Rates, order: int) -> float:
    """The best rate of the short runs of an order."""
    return min((a for a in rates.arms if a.order == order), key=lambda arm: arm.score).rate


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    fresh = [row for row in rows if row["seed"] == FRESH]
    return {
        "trials": len(rows),
        "intervals that hold": sum(row["holds"] for row in rows),
        "fresh trials": len(fresh),
        "fresh ones that hold": sum(row["holds"] for row in fresh),
        "best and neighbours that hold": sum(row["neighbours hold"] for row in rows),
        "mean rungs": round(statistics.fmean(row["rungs"] for row in rows), 2),
        "median loss": round(statistics.median(row["loss"] for row in rows), 4),
        "largest loss": round(max(row["loss"] for row in rows), 4),
        "mean of whole runs' worth": round(
            statistics.fmean(row["whole runs' worth"] for row in rows), 2
        ),
    }


def meets_conditions(summary: dict[str, Any]) -> bool:
    kinds = (("intervals that hold", "trials"), ("fresh ones that hold", "fresh trials"))
    enough = all(summary[count] >= LEAST * summary[trials] for count, trials in kinds)
    return enough and summary["mean rungs"] <= WIDEST


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lab", help="the folder of a laboratory")
    parser.add_argument("--only", type=int, nargs="+", help="trials by number, from 1")
    parser.add_argument("--write", action="store_true", help=f"store the numbers in {RESULT.name}")
    args = parser.parse_args()
    trials = [(arm, seed) for seed in (SEEN, FRESH) for arm in ARMS]
    rows = []
    with contextlib.ExitStack() as stack:
        bench = Bench(args.lab or stack.enter_context(tempfile.TemporaryDirectory()), PLAN)
        for number in args.only or range(1, len(trials) + 1):
            row = measure(bench, *trials[number - 1])
            rows.append(row)
            low, high = row["interval"]
            verdict = "holds" if row["holds"] else "MISSES"
            print(
                f"{number:2} {verdict:6} {row['best rate']:.4g} in {low:.4g} .. {high:.4g}, "
                f"loses {row['loss']:+.4f}, {row['short runs']} short runs  "
                f"{row['arm']} ({row['base']}), seed {row['seed']}",
                flush=True,
            )
    summary = summarize(rows)
    print(json.dumps(summary, indent=1))
    if args.write:
        RESULT.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    return int(not meets_conditions(summary))


if __name__ == "__main__":
    sys.exit(main())
