"""The conclusion of an audit: what explains all tensors of a checkpoint, and each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..lora.factors import cat, singular_values
from .explaining import Explanation
from .hypotheses import ARITHMETICS, DEAD, LISTED, NOT_MERGED, RIGHT, UNCHANGED, WIDER, Hypothesis
from .hypotheses import Change as Added
from .places import Place
from .rewriting import Row

Conclusion = tuple[str, list[str], str | None]


class Finding(NamedTuple):
    """A tensor and what explains it.

    tied   "tied head changed" or so: it has the change of the weight that it shares; or ""
    """

    place: Place
    explanation: Explanation
    tied: str = ""


def conclude(findings: Sequence[Finding], wanted: Hypothesis, notes: list[str]) -> Conclusion:
    """(the verdict on all tensors, the hypotheses that explain them, their arithmetic or None)."""
    tied = [finding.tied for finding in findings if finding.tied]
    changed = [f.explanation for f in findings if f.place.changes and not f.tied]
    others = [f.explanation for f in findings if not f.place.changes and not f.tied]
    if not all(explanation.finite for explanation in (*changed, *others)):
        return "not finite", [], None
    if not others and all(explanation.is_head for explanation in changed):
        changed = [e._replace(is_head=False) for e in changed]  # nothing else may be in codes
    # An adapter may only replace tensors, which are right or not merged.
    always = [wanted, Hypothesis(Added(RIGHT, 0.0)), *map(Hypothesis, UNCHANGED)]
    known = {hypothesis.name: hypothesis for hypothesis in always}
    for explanation in changed:
        known |= explanation.hypotheses
    levels = {}
    for name, hypothesis in known.items():
        levels[name] = max((level_of(e, hypothesis) for e in changed), default=0)
    best = min(levels.values())
    if best >= LISTED:
        level = levels[wanted.name]
        if level < DEAD:
            wider = WIDER[level - LISTED]
            notes.append(f"it would be right with {wider}, which no verdict allows for")
        return explain_apart(changed, others), [], None
    names = [name for name, level in levels.items() if level == best] if changed else [wanted.name]
    names = [name for name in names if all(_allows(known[name], e) for e in others)]
    if not names:
        return "other base", [], None
    if tied and wanted.name in names:
        return tied[0], [], None
    return join_names(names), names, ARITHMETICS[best]


def _allows(hypothesis: Hypothesis, other: Explanation) -> bool:
    """Does a hypothesis allow a tensor without an adapter that is not the base's?"""
    if hypothesis.requantized:
        return bool(other.survivors())
    unchanged = Hypothesis(UNCHANGED[0], hypothesis.onto)
    return bool(hypothesis.onto) and other.levels.get(unchanged.name, DEAD) < LISTED


def level_of(explanation: Explanation, hypothesis: Hypothesis) -> int:
    """The level of a hypothesis for a tensor, or of what it means for that tensor.

    A tensor that is not a square has no transposed sum, an embedding is not in NF4, a head is in it
    or not, and what is replaced is right or not.
    """
    right = hypothesis.change._replace(name=RIGHT)
    plain = Hypothesis(hypothesis.change)
    if hypothesis.change.name == NOT_MERGED:
        right = hypothesis.change
    same = (hypothesis, plain, hypothesis._replace(change=right), Hypothesis(right))
    levels = [explanation.levels[h.name] for h in same if h.name in explanation.levels]
    if explanation.is_head and {hypothesis.name, plain.name} <= explanation.levels.keys():
        return min(levels[:2])
    return levels[0]


def explain_apart(changed: Sequence[Explanation], others: Sequence[Explanation]) -> str:
    """The verdict where no hypothesis explains all changed tensors."""
    if not all(e.survivors() for e in others):
        return "other base"
    unexplained = [e for e in changed if not e.survivors()]
    if unexplained:
        fits = all(e.scaling is not None and e.scaling.fits for e in unexplained)
        return "other scaling" if fits else "other adapter"
    known = {name: h for e in changed for name, h in e.hypotheses.items()}
    for name, hypothesis in known.items():
        if hypothesis.change.name != NOT_MERGED and all(
            level_of(e, hypothesis) == e.best or e.levels[NOT_MERGED] == e.best for e in changed
        ):
            return "partly merged" if name == RIGHT else f"partly merged ({name})"
    return "several faults"


def join_names(names: Sequence[str]) -> str:
    """The hypotheses that cannot be told apart, the right one first."""
    shown = sorted(names, key=lambda name: name != RIGHT)
    more = [f"{len(shown) - 3} more"] if len(shown) > 4 else []
    return " or ".join([*(shown[:3] if more else shown), *more])


def make_row(finding: Finding) -> Row:
    """The row of one tensor; None where something does not apply."""
    place, explanation = finding.place, finding.explanation
    row: Row = {"tensor": place.key, "|dW|/|W|": None, "verdict": finding.tied, "arithmetic": None}
    row |= {"c": None, "differ": None, "runner-up": None}
    names = explanation.survivors()
    if place.changes and not place.changes[0].key and explanation.size:
        size = np.linalg.norm(singular_values(*cat([place.changes[0].part()]), 1))
        row["|dW|/|W|"] = float(size) / explanation.size
    if explanation.runner_up is not None:
        name, share = explanation.runner_up
        row["runner-up"] = f"{name} ({share:.0%} outside)"
    if finding.tied:
        return row
    if names:
        row["verdict"] = join_names(names)
        if not place.changes:
            row["verdict"] = names[0].replace(NOT_MERGED, "the base's")
        first = explanation.hypotheses.get(sorted(names, key=lambda name: name != RIGHT)[0])
        if first is not None:
            row["c"] = first.change.c * (2 if first.change.again else 1)
            row["differ"] = explanation.differing[first.name] / explanation.numbers
            row["arithmetic"] = None if first.requantized else ARITHMETICS[explanation.best]
        return row
    scaling = explanation.scaling
    row["verdict"] = "not the base's"
    if not explanation.finite:
        row["verdict"] = "not finite"
    elif place.changes:
        row["verdict"] = "unexplained"
        if scaling is not None:
            row["c"] = scaling.c
            row["verdict"] = "other scaling" if scaling.fits else "unexplained"
            row["runner-up"] = f"W + c B A, off by {scaling.residual:.3g} times rounding's error"
    return row
