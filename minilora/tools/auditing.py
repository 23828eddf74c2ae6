"""Is a merged checkpoint right, and if not, what was done? From files alone, whoever made it.

Each tensor of the merged checkpoint (places.py) is explained from the base's and the adapter's
(explaining.py). All adapted tensors must have one explanation in common: the hypothesis, and the
tightest arithmetic in which it survives everywhere (conclusions.py). The others must be the base's,
bit by bit.

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

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError, check_fields
from ..formats import Checkpoint
from ..formats.checkpoint import are_equal, is_stored_transposed
from ..formats.disk import quoted
from ..formats.dtypes import DTYPES, FLOATS, round_to, row_blocks, widen
from ..lora.adalora import AdaLoraConfig
from ..lora.files.adapter import AdapterFile
from ..lora.multitask import FILE as MULTITASK
from ..lora.targets.base import EMBEDDINGS
from ..threads import Workers, available_cores, keep_memory, one_blas_thread
from .conclusions import Finding, conclude, make_row
from .explaining import Explanation, explain, join_explanations
from .hypotheses import LISTED, NOT_MERGED, RIGHT, Hypothesis, Precision, Scales
from .hypotheses import Change as Added
from .layers import Layer, Pair
from .merging import HEAD_WEIGHT, RULES, Change, MergePlan, plan_merge, resize_rows
from .places import Place, compare_configs, find_places
from .rewriting import Row, progress, read_dense

Array = np.ndarray
# Dtypes of 16 bits in which a tensor may have been merged before it was stored in another.
COARSER = {"F64": ("BF16", "F16"), "F32": ("BF16", "F16"), "F16": ("BF16",), "BF16": ()}


class Files(NamedTuple):
    """The open files of an audit, and what a right merge does."""

    base: Checkpoint
    merged: Checkpoint
    plan: MergePlan
    model_type: str
    types: tuple[str, ...]  # that codes may have been made from
    workers: Workers


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


# ---- one tensor ----


def explain_place(files: Files, place: Place, changes: Sequence[Change]) -> Explanation:
    """What explains a tensor that `changes`, one or none, should have made."""
    explanations = []
    for dtype in _possible_dtypes(files.merged, place.merged):
        explanations.append(_explain_rounded(files, place, changes, dtype))
        if not changes and not explanations[-1].best:
            break
    return join_explanations(explanations)._replace(is_head=place.key == HEAD_WEIGHT)


def _explain_rounded(
    files: Files, place: Place, changes: Sequence[Change], dtype: str
) -> Explanation:
    """What explains a tensor whose numbers were rounded to `dtype`."""
    pair = _pair(files, place, changes, dtype)
    if not changes:
        layer = Layer(pair, None, None, _precision(files, place, pair))
        plain = explain(layer, files.workers, False)
        if plain.survivors() or not pair.encodable:
            return plain
        return explain(Layer(pair, None, None, layer.precision), files.workers)
    [change] = changes
    if change.key:
        return _explain_replaced(files, place, pair, change)
    adapter, path = change.adapter, change.path
    keys = (key for part, key in adapter.layers[path].items() if part in "AB")
    dtypes = files.base.dtype(place.source), *map(adapter.file.dtype, keys)
    precision = _precision(files, place, pair, *dtypes)
    return explain(Layer(pair, change.part(), _scales(adapter, path), precision), files.workers)


def _pair(files: Files, place: Place, changes: Sequence[Change], dtype: str) -> Pair:
    base, merged = files.base, files.merged
    shape = merged.shape(place.merged)
    read = lambda rows: base.read_rows(place.source, rows)  # noqa: E731
    if place.source in files.plan.resized:
        whole = resize_rows(base.read_bits(place.source), files.plan.resized[place.source])
        read = lambda rows: whole[rows]  # noqa: E731
    is_table = place.source.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS
    is_added = bool(changes) and not changes[0].key
    embeds = is_added and changes[0].adapter.embeds(changes[0].path)

    def read_merged(rows: slice) -> Array:
        bits = merged.read_rows(place.merged, rows)
        return bits if dtype == merged.dtype(place.merged) else round_to(bits, dtype)

    return Pair(
        quoted(place.key),
        shape,
        dtype,
        read,
        read_merged,
        embeds or is_stored_transposed(files.model_type, place.source),
        len(shape) == 2 and not is_table,
    )


def _possible_dtypes(file: Checkpoint, key: str) -> list[str]:
    """The dtypes to which the numbers of a tensor may have been rounded when they were summed.

    Some models are merged in 16 bits and written in 32, or in the other dtype of 16 bits. Numbers
    that are subnormal in float16 may be numbers of bfloat16 as well.
    """
    stored = file.dtype(key)
    fitting = [dtype for dtype in COARSER[stored] if _has_numbers_of(file, key, dtype)]
    return [stored, *fitting] if stored == "F16" else fitting or [stored]


def _has_numbers_of(file: Checkpoint, key: str, dtype: str) -> bool:
    """Does rounding a tensor to a dtype change nothing?"""
    parts = (file.read_rows(key, rows) for rows in row_blocks(file.shape(key)))
    return all(np.array_equal(widen(round_to(part, dtype)), widen(part)) for part in parts)


def _precision(files: Files, place: Place, pair: Pair, *dtypes: str) -> Precision:
    """What may have been rounded: to the dtypes of the merged tensor, the base's, the factors'."""
    stored = files.merged.dtype(place.merged)
    narrow = [stored] if stored in COARSER["F32"] else []
    types = tuple(dict.fromkeys((pair.dtype, *narrow, *dtypes)))
    return Precision(pair.dtype, types, files.types)


def _scales(adapter: AdapterFile, path: str) -> Scales:
    config = adapter.config
    s = float(config.scaling(path))
    if isinstance(config, AdaLoraConfig):
        return Scales(s, config.lora_alpha, config.init_r, s)
    r = math.sqrt(config.r) if config.use_rslora else config.r
    return Scales(s, config.layer_alpha(path), config.rank(path), config.lora_alpha / r)


def _explain_replaced(files: Files, place: Place, pair: Pair, change: Change) -> Explanation:
    """What explains a tensor that the adapter replaces, or some of whose rows it does."""
    new = change.adapter.file.read(change.key, np.float64)

    def read(rows: slice) -> Array:
        if not change.rows:
            return new[rows]
        values = widen(pair.base(rows)).astype(np.float64)
        for place, row in enumerate(change.rows):
            if rows.start <= row < rows.stop:
                values[row - rows.start] = new[place]
        return values

    def level(read: Callable[[slice], Array]) -> Explanation:
        layer = Layer(pair._replace(base=read), None, None, _precision(files, place, pair))
        return explain(layer, files.workers, False)

    replaced, unchanged = level(read), level(pair.base)
    levels = {RIGHT: replaced.best, NOT_MERGED: unchanged.best}
    return unchanged._replace(levels=levels, hypotheses={}, differing={}, runner_up=None)


def require_floats(files: Files, place: Place) -> None:
    """FormatError unless both tensors are stored as floats that are read."""
    for file, key in ((files.base, place.source), (files.merged, place.merged)):
        if file.dtype(key) not in FLOATS:
            raise FormatError(
                f"{quoted(file.directory)}: {quoted(key)} is {file.dtype(key)}, and only "
                f"{', '.join(FLOATS)} can be audited: convert it first"
            )


# ---- the whole checkpoint ----


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
