"""The mathematics of LoRA as a list: every equation, its paper, a measurement, and the bound that rounding allows.

Each entry of PROPERTIES is one claim and says to which cases it applies. They stand in a room for each thing that makes
promises: LoRA, a layer with adapters whichever they are, DoRA, AdaLoRA, a base of codes, several tasks, sums of
adapters, and the two ends of a model. QLoRA has no list of its own: it is any of these over a base of codes, and all of
them are measured there too. Letters and shapes are case.py's.

**Where bounds come from.** A property that is exact in floating point has the bound 0, and its measurement counts the
entries that differ. For the others no tolerance is chosen. If a result is a sum of products and each of them passes
through at most n roundings on its way, in whatever order a library adds them, then (Higham 2002, section 3.1)

    |computed - exact| <= gamma_n S,    gamma_n = n u / (1 - n u),    S = the same formula over absolute values,

entry by entry. S is literally that: `abs(formula)`. The reference has roundings too, in its own u, and they are added
(`Case.gamma`). Where a single rounding is known by its result, |fl(a) - a| <= u |fl(a)| is sharper, and used. Each
docstring says how its measurement counts. Shown is the entry that comes nearest to its bound, or is furthest beyond it.
"""

from __future__ import annotations

from . import adalora as of_adalora
from . import codes as of_codes
from . import dora as of_dora
from . import ends as of_ends
from . import layers as of_layers
from . import lora as of_lora
from . import sums as of_sums
from . import tasks as of_tasks
from .measuring import Property

PROPERTIES: list[Property] = [
    *of_lora.PROPERTIES,
    *of_layers.PROPERTIES,
    *of_dora.PROPERTIES,
    *of_adalora.PROPERTIES,
    *of_codes.PROPERTIES,
    *of_tasks.PROPERTIES,
    *of_sums.PROPERTIES,
    *of_ends.PROPERTIES,
]
