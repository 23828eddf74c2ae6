"""The experiments by name: each file measures one claim about LoRA.

Every file has

    CLAIM     the claim in one sentence, without its full stop
    SOURCE    where it is made; "checked": the place was compared with the paper
    CONTROL   what would show that the measurement itself is wrong
    SECONDS   how long it takes on two cores, about, if nothing was measured before
    BASES     the bases that it needs (protocol.py)
    cases(plan, rows)       the cases to measure, given the rows that are known (tuning.py)
    measure(bench, case)    the result of a case; it depends on its arguments alone
    verdict(rows)           the verdict, whose margins are written down before the run (verdicts.py)
    panels(rows)            the picture as plain data (panels.py)
"""

from __future__ import annotations

from typing import Any

from . import (
    adalora,
    amplification,
    counts,
    dora,
    family,
    forgets,
    interference,
    intrinsic,
    intruders,
    layers,
    loftq,
    lowrank,
    qlora,
    rank,
    ratio,
    regret,
    rslora,
    sharing,
    stability,
    starts,
    subspaces,
)

EXPERIMENTS: dict[str, Any] = {
    "counts": counts,
    "rank": rank,
    "lowrank": lowrank,
    "intrinsic": intrinsic,
    "subspaces": subspaces,
    "amplification": amplification,
    "stability": stability,
    "rslora": rslora,
    "ratio": ratio,
    "starts": starts,
    "layers": layers,
    "regret": regret,
    "forgets": forgets,
    "intruders": intruders,
    "qlora": qlora,
    "loftq": loftq,
    "dora": dora,
    "adalora": adalora,
    "interference": interference,
    "sharing": sharing,
    "family": family,
}
