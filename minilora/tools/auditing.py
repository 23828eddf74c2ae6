"""Is a merged checkpoint right, and if not, what was done? From files alone, whoever made it.

Each tensor of the merged checkpoint is explained from the base's and the adapter's (places.py).
All adapted tensors must have one explanation in common: the hypothesis, and the tightest arithmetic
in which it survives everywhere. The others must be the base's, bit by bit.

    right                   W + dW, by the adapter's own configuration
    other root of r         alpha / r in place of alpha / sqrt(r), or the other way round
    alpha not divided by r  s = alpha                 alpha ignored     s = 1
    patterns ignored        lora_alpha / r everywhere
    twice, subtracted, transposed (dW^T), not merged, DoRA without magnitude
    onto NF4                dW was added to what NF4 makes of W (onto double-quantized NF4)
    requantized to NF4      the sum was encoded; these two go with every other name
    partly merged           some tensors are as they should be, the others the base's
    several faults          each tensor has an explanation, but not the same
    other scaling           W + c B A with another c, which the tensor's row has
    tied head changed       embedding and head are one weight, and the adapter changes one of them
    other adapter           nothing explains the adapted tensors, and the others are the base's
    other base              a tensor without an adapter is not the base's

Several names joined by "or" cannot be told apart by these numbers: with alpha = r, s is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError, check_fields
from ..formats.checkpoint import are_equal
from ..formats.disk import quoted
from ..formats.dtypes import DTYPES, FLOATS, row_blocks
from ..lora.factors import cat, singular_values
from ..lora.files import AdapterFile
from ..lora.multitask import FILE as MULTITASK
from ..threads import Workers, available_cores, keep_memory, one_blas_thread
from .explaining import Explanation
from .hypotheses import (
    ARITHMETICS,
    DEAD,
    LISTED,
    NOT_MERGED,
    RIGHT,
    UNCHANGED,
    WIDER,
    Hypothesis,
)
from .hypotheses import Change as Added
from .merging import HEAD_WEIGHT, RULES, plan_merge
from .places import Files, Place, compare_configs, explain_place, find_places, require_floats
from .rewriting import Row, progress, read_dense

Array = np.ndarray


def audit(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    onto: str | None = None,
    threads: int | None = None,
) -> Row:
    """What explains the checkpoint `merged` as a merge of `adapter` into `base`.

    onto    "nf4" or "nf4,double" if dW should be on what NF4 makes of W, as `merge` has it

    The report has "verdict"; "hypotheses", all that it names; "arithmetic"; "right", a bool;
    "notes"; "equal", how many tensors without an adapter equal the base's; and "tensors", a row for
    each tensor that the adapter changes or that differs from the base's: its name, |dW| / |W| (for
    DoRA before its scaling), the verdict, the arithmetic, c, the share of numbers that differ from
    the float64 sum rounded once, and the nearest hypothesis that was refuted.

    FormatError if the files do not belong together; ConfigError for an adapter that cannot be
    merged; OSError. Memory holds a few rows of a tensor.
    """
    threads = available_cores() if threads is None else threads
    check_fields({"--dtype": None, "--onto": onto, "--threads": threads}, RULES)
    if Path(adapter, MULTITASK).exists():
        raise ConfigError(
            f"{quoted(adapter)} has an adapter for each of several tasks: audit one of the folders "
            "inside it, of a task that has no other adapter"
        )
    with ExitStack() as opened:
        config, checkpoint, _ = read_dense(base)
        opened.enter_context(checkpoint)
        made_config, made, dtype = read_dense(merged)
        opened.enter_context(made)
        file = opened.enter_context(AdapterFile(adapter, over_base=True))
        _require_auditable(file)
        plan = plan_merge(checkpoint, config, [file], [1.0], "untie")
        _require_finite(file)
        places, notes = find_places(checkpoint, config, made, plan)
        notes += compare_configs(config, made_config)
        opened.enter_context(one_blas_thread())
        keep_memory()
        workers = opened.enter_context(Workers(threads))
        named = dtype or made_config.get("dtype", made_config.get("torch_dtype"))
        types = (DTYPES[named],) if named in DTYPES else ()
        model_type = str(config.get("model_type"))
        files = Files(checkpoint, made, plan, model_type, types, workers)
        wanted = Hypothesis(Added(RIGHT, 0.0), onto or "")
        return judge(files, places, wanted, notes)


def _require_auditable(adapter: AdapterFile) -> None:
    """ConfigError for an adapter whose right merge is not W + s B A, rounded."""
    adapter.require_factors("audit")
    if adapter.began:
        raise ConfigError(
            f"{adapter.where}: init_lora_weights={adapter.began!r:.40}: it was trained over a "
            "changed base, whose rounding a merge has, too, and no file says it: make the adapter "
            "plain (minilora convert --to plain), merge that, and audit it"
        )


def _require_finite(adapter: AdapterFile) -> None:
    for key in adapter.file.keys():
        if not np.isfinite(adapter.file.read(key)).all():
            raise FormatError(
                f"{adapter.where}: {quoted(key)} has a NaN or an infinity, so no merge can be "
                "right: save the adapter again"
            )


# ---- the whole checkpoint ----


class Finding(NamedTuple):
    """A tensor and what explains it.

    tied   "tied head changed" or so: it has the change of the weight that it shares; or ""
    """

    place: Place
    explanation: Explanation
    tied: str = ""


def find(files: Files, place: Place) -> Finding:
    """Explain one tensor; a tied one perhaps by the change of the other place."""
    require_floats(files, place)
    explanation = explain_place(files, place, place.changes)
    if place.other and not explanation.survivors():
        by_other = explain_place(files, place, place.other)
        if set(by_other.survivors()) - {NOT_MERGED}:
            end = "head" if place.key == HEAD_WEIGHT else "embedding"
            return Finding(place, explanation, f"tied {end} changed")
    return Finding(place, explanation)


def judge(files: Files, places: Sequence[Place], wanted: Hypothesis, notes: list[str]) -> Row:
    """The report of `audit`; `wanted` is the hypothesis that is right."""
    findings = []
    equal = 0
    by_key = {place.key: place for place in places}
    for key in progress(by_key, "audit", "tensors"):
        place = by_key[key]
        shape = files.merged.shape(place.merged)
        is_number = files.merged.dtype(place.merged) in FLOATS and all(shape) and shape
        if not place.changes and not is_number:
            if not are_equal(files.base, place.source, files.merged, place.merged):
                raise FormatError(
                    f"{quoted(files.merged.directory)}: {quoted(place.merged)} differs from the "
                    "base's, and its numbers cannot be audited"
                )
            equal += 1
            continue
        if not place.changes and _have_equal_bits(files, place):
            equal += 1
            continue
        finding = find(files, place)
        if not place.changes and finding.explanation.levels[NOT_MERGED] < LISTED:
            equal += 1
            continue
        findings.append(finding)
    verdict, names, arithmetic = conclude(findings, wanted, notes)
    return {
        "verdict": verdict,
        "hypotheses": names,
        "arithmetic": arithmetic,
        "right": wanted.name in names,
        "notes": notes,
        "equal": equal,
        "tensors": [make_row(finding) for finding in findings],
    }


def _have_equal_bits(files: Files, place: Place) -> bool:
    """Are the two tensors equal as they are stored? Most are that no adapter changes."""
    base, merged = files.base, files.merged
    if base.dtype(place.source) != merged.dtype(place.merged) or place.source in files.plan.resized:
        return False
    return all(
        np.array_equal(base.read_rows(place.source, rows), merged.read_rows(place.merged, rows))
        for rows in row_blocks(merged.shape(place.merged))
    )


Conclusion = tuple[str, list[str], str | None]


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
