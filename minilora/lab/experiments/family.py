"""Do LoRA's relatives and its other optimisers learn more than plain LoRA, at tuned rates?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench import Bench
from ..panels import Panel, heat, lines, series
from ..protocol import Arm, Case, Plan, Row, full, lora
from ..tuning import at_best, differences, mean, measure_fit, seeds_of, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA's relatives and its optimisers learn more than plain LoRA of rank 4"
SOURCE = "the papers of the methods, each for its own (not checked)"
CONTROL = "LoRA of ranks 1 and 16: fewer and more numbers without another method"
SECONDS = 340
BASES = ("micro",)

R = 4
PLAIN = f"LoRA r={R}"
MARGIN = 0.02  # bits per byte that count as learning more


def _map(name: str, rate: float, **fields: Any) -> Arm:
    """A map theta -> dW, at rates around a first guess."""
    grid = [rate / 2, rate, 2 * rate]
    return Arm(name, name.lower(), {"target_modules": "all-linear", **fields}, rates=grid)


FIELDS = {"r": R, "lora_alpha": 32, "target_modules": "all-linear"}
OTHERS = [
    Arm("DoRA", "dora", FIELDS),
    Arm("AdaLoRA", "adalora", FIELDS | {"lora_alpha": 64 * R}),
    _map("LoHa", 1.6e-2, r=2, alpha=8),
    _map("LoKr", 1.6e-2, r=64, alpha=64, decompose_factor=8),
    _map("HiRA", 3.2e-2, r=R),
    _map("VeRA", 3.2e-2, r=256),
    _map("OFT", 8e-3, oft_block_size=16),
    _map("IA3", 3.2e-2, feedforward_modules=["down_proj"]),
    _map("FourierFT", 3.2e-2, n_frequency=600, init_weights=True),
    _map("MiSS", 4e-3, r=8),
    _map("UniLoRA", 1.6e-2, r=R, theta_d_length=8_000),
    lora(R, "LoRA+", settings={"optimizer": "loraplus"}, rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    lora(R, "LoRA-FA", settings={"optimizer": "lorafa"}),
    lora(R, "Riemannian", settings={"optimizer": "riemannian"}),
]
CONTROLS = [lora(1), lora(16), full()]
ARMS = [lora(R), *OTHERS, *CONTROLS]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def lead(rows: Sequence[Row], name: str) -> list[float]:
    """Bits per byte by which an arm is better than plain LoRA, by seed."""
    return differences(at_best(rows, PLAIN), at_best(rows, name))


def verdict(rows: Sequence[Row]) -> Verdict:
    parts = [
        judge(f"bits by which {arm.name} is better", lead(rows, arm.name), at_least=MARGIN)
        for arm in OTHERS
    ]
    ranks = " and ".join(f"{mean(lead(rows, f'LoRA r={r}')):+.3f} for r = {r}" for r in (1, 16))
    return decide(*parts, note=f"For comparison, LoRA's lead over r = {R} is {ranks}.")


def panels(rows: Sequence[Row]) -> list[Panel]:
    table = [lead(rows, arm.name) for arm in OTHERS]
    names = [arm.name for arm in OTHERS]
    columns = [f"seed {seed}" for seed in seeds_of(rows, PLAIN)]
    content = []
    for title, chosen in (("others", names), ("LoRA", ["LoRA r=1", PLAIN, "LoRA r=16"])):
        trained = [at_best(rows, name, "trained")[0] for name in chosen]
        losses = [mean(at_best(rows, name)) for name in chosen]
        is_control = chosen is not names
        content.append(series(title, trained, losses, dots=not is_control, control=is_control))
    levels = {"full training": mean(at_best(rows, "full"))}
    x, y = "trained numbers", "bits per byte"
    return [
        heat(f"Bits by which each beats {PLAIN}", names, columns, table, digits=3),
        lines("Each at its best rate", x, y, content, log="x", levels=levels),
    ]
