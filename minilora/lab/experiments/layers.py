"""Which layers should have an adapter, if all choices train equally many numbers?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bench import Bench
from ..panels import Panel, bar, bars
from ..protocol import BASES as MODELS
from ..protocol import Arm, Case, Plan, Row, full
from ..tuning import at_best, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, interval, judge

CLAIM = "Adapters belong into the queries and values of attention"
SOURCE = "Hu et al. 2021, table 5 (checked); against it Schulman 2025: all layers, the MLP first"
CONTROL = "as many of the block's layers as q and v, drawn at random"
SECONDS = 120
BASES = ("micro",)

BUDGET = 6_000  # numbers: about 5 % of the model
MARGIN = 0.02  # bits per byte by which a choice must be better
KINDS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
KINDS |= {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
CHOICES = {"q": "q", "q, v": "q v", "q, k, v, o": "q k v o", "MLP": "gate up down"}
CHOICES |= {"up, down": "up down", "all": " ".join(KINDS)}


def _arm(name: str, paths: Sequence[str]) -> Arm:
    """The arm that adapts these layers at the rank which comes nearest to the budget."""
    config = MODELS["micro"].model
    h, i = config.hidden_size, config.intermediate_size
    sizes = [2 * h if path.split(".")[1] == "self_attn" else h + i for path in paths]
    r = max(1, round(BUDGET / sum(sizes)))
    targets = r"(?:.*\.)?layers\.(" + "|".join(path.replace(".", r"\.") for path in paths) + ")"
    return Arm(name, fields={"r": r, "lora_alpha": 4 * r, "target_modules": targets})


def _paths(kinds: Sequence[str]) -> list[str]:
    """ "0.self_attn.q_proj" and so on, for both blocks."""
    parts = {kind: "self_attn" if kind in "qkvo" else "mlp" for kind in kinds}
    return [f"{block}.{parts[kind]}.{KINDS[kind]}" for block in (0, 1) for kind in kinds]


def _random(seed: int) -> Arm:
    """Four of the fourteen layers, as many as q and v have."""
    every = _paths(list(KINDS))
    chosen = np.random.default_rng(seed).choice(len(every), 4, replace=False)
    return _arm(f"random {seed}", [every[place] for place in sorted(chosen.tolist())])


CONTROLS = [_random(seed) for seed in (0, 1, 2)]
ARMS = [*(_arm(name, _paths(kinds.split())) for name, kinds in CHOICES.items()), *CONTROLS, full()]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def verdict(rows: Sequence[Row]) -> Verdict:
    qv = at_best(rows, "q, v")

    def lead(other: str) -> list[float]:
        """Bits per byte by which q and v are better than another choice."""
        return differences(at_best(rows, other), qv)

    return decide(
        judge("lead of q, v over all layers", lead("all"), at_least=-MARGIN),
        judge("lead of q, v over the MLP", lead("MLP"), at_least=-MARGIN),
        judge("lead of q, v over q alone", lead("q"), at_least=MARGIN),
        note="A negative lead says that Schulman's choice is better, in bits per byte.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    names = list(CHOICES)
    results = [interval(at_best(rows, name)) for name in names]
    content = bar("", [middle for middle, _ in results], spread=[half for _, half in results])
    random = mean([mean(at_best(rows, arm.name)) for arm in CONTROLS])
    levels = {"layers at random": random, "full training": mean(at_best(rows, "full"))}
    title = f"Choices of about {BUDGET:,} trained numbers"
    labels = [name.replace("k, ", "k,\n") for name in names]
    return [bars(title, "bits per byte", labels, [content], levels=levels, zoom=True)]
