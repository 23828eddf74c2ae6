"""The theorems of training: what a run of LoRA must do, and what it is wrongly said to do.

dials        lora_alpha, the start of A and two learning rates have two degrees of freedom
steps        a frozen A is projected descent; the first step; the balance of A and B
gauge        which steps depend on how dW is divided into B and A
updates      PiSSA and back; what adapters of rank R can express; sums in any order
merges       merging between steps; two tasks from one start
forgetting   what stays of an old text

Each is measured on small language models that are trained (studies.py), and is within 0 or a
computed bound. A claim that is false follows the true one that it resembles, and must be beyond its
bound: it would pass if clipping or weight decay were silently left out.
"""

from __future__ import annotations

from . import dials, forgetting, gauge, merges, steps, updates
from .measuring import Property
from .run import Row, measure
from .studies import random_study

THEOREMS: list[Property] = []
for module in (dials, steps, gauge, updates, merges, forgetting):
    THEOREMS += module.PROPERTIES


def verify_training(models: int = 8, seed: int = 0) -> list[Row]:
    """Every theorem's worst case over random models; the same seed gives the same numbers."""
    studies = [random_study(i) for i in range(seed, seed + models)]
    return measure(studies, THEOREMS, "models")
