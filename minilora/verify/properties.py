"""The mathematics of LoRA as a list: every equation, its paper, a measurement, and its bound.

Each entry of PROPERTIES is one claim and says to which cases it applies. One module lists the
claims of each thing that makes promises: LoRA, a layer with adapters of any kind, DoRA, AdaLoRA, a
base of codes, several tasks, sums of adapters and pruned ones, optimisers of pairs, the two ends of
a model, starts, and maps. QLoRA has no list: it is any of these over a base of codes, and all of
them are measured there too. Letters and shapes are case.py's.

**Where bounds come from.** A property that is exact in floating point has the bound 0, and its
measurement counts the entries that differ. For the others no tolerance is chosen. If a result is a
sum of products and each of them passes through at most n roundings on its way, in whatever order a
library adds them, then (Higham 2002, section 3.1)

    |computed - exact| <= gamma_n S,    gamma_n = n u / (1 - n u),

entry by entry, with S the same formula over absolute values: literally `abs(formula)`. The
reference has roundings too, in its own u, and they are added (`Case.gamma`). Where a single
rounding is known by its result, |fl(a) - a| <= u |fl(a)| is sharper, and used. Each docstring says
how its measurement counts. Shown is the entry that comes nearest to its bound, or is furthest
beyond it.
"""

from __future__ import annotations

from . import (
    adalora,
    codes,
    dora,
    ends,
    layers,
    lora,
    maps,
    optimizers,
    pruning,
    starts,
    sums,
    tasks,
)
from .measuring import Property

SUBJECTS = (
    lora, layers, dora, adalora, codes, tasks, sums, pruning, optimizers, ends, starts, maps
)  # fmt: skip
PROPERTIES: list[Property] = []
for module in SUBJECTS:
    PROPERTIES += module.PROPERTIES
