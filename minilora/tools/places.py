"""The tensors of a merged checkpoint: what each is made from, and which hypotheses explain it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError
from ..formats import Checkpoint
from ..formats.checkpoint import BUFFERS, align_keys, is_stored_transposed
from ..formats.disk import quoted
from ..formats.dtypes import FLOATS, round_to, row_blocks, widen
from ..lora.adalora import AdaLoraConfig
from ..lora.files import AdapterFile, base_key
from ..lora.plan import EMBEDDINGS, describe_checkpoint
from ..models.dialects import IGNORED
from ..threads import Workers
from .explaining import Explanation, explain, join_explanations
from .hypotheses import NOT_MERGED, RIGHT, Precision, Scales
from .layers import Layer, Pair
from .merging import HEAD_WEIGHT, Change, MergePlan, resize_rows

Array = np.ndarray
# Dtypes of 16 bits in which a tensor may have been merged before it was stored in another.
COARSER = {"F64": ("BF16", "F16"), "F32": ("BF16", "F16"), "F16": ("BF16",), "BF16": ()}
# Fields of config.json that do not change what equal weights compute.
OF_STORAGE = {"dtype", "torch_dtype", "vocab_size", "use_cache", "tie_word_embeddings"}
UNMERGED = (".base_layer.", ".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")


class Place(NamedTuple):
    """A tensor of the merged checkpoint.

    key      as the base has it, or the new head's
    source   the base's key that it is made from
    merged   the merged checkpoint's key
    changes  what the adapter does to it: one change, or none
    other    the change of the weight that it is tied to; [] if it is not tied
    """

    key: str
    source: str
    merged: str
    changes: Sequence[Change]
    other: Sequence[Change] = ()


class Files(NamedTuple):
    """The open files of an audit, and what a right merge does."""

    base: Checkpoint
    merged: Checkpoint
    plan: MergePlan
    model_type: str
    types: tuple[str, ...]  # that codes may have been made from
    workers: Workers


# ---- which tensors belong together ----


def find_places(
    base: Checkpoint, config: Mapping[str, Any], merged: Checkpoint, plan: MergePlan
) -> tuple[list[Place], list[str]]:
    """The tensors to compare, and notes. FormatError if names or shapes do not fit."""
    keys = [key for key in base.keys() if not key.endswith(BUFFERS)]
    made = [key for key in merged.keys() if not key.endswith(BUFFERS)]
    _refuse_unmerged(merged, made)
    alignment = align_keys(made, keys)
    names = {alignment.names.get(key, key): key for key in made}
    notes = [alignment.describe("the merged model", "the base")] if alignment.names else []
    described = describe_checkpoint(base, config)
    ends: dict[str, str] = {}  # a tied embedding and head, each with the other
    if described.tied:
        embedding = base_key(base, f"{described.embedding}.weight") or ""
        ends = {embedding: HEAD_WEIGHT, HEAD_WEIGHT: embedding}
        if HEAD_WEIGHT in names or any(map(plan.changes.get, ends)):
            keys = [*dict.fromkeys([*keys, HEAD_WEIGHT])]
        if embedding in names:  # one tensor of the file may be both
            names = {HEAD_WEIGHT: names[embedding], **names}
    wrong = [f"missing {key}" for key in keys if key not in names]
    known = {*keys, *ends}
    wrong += [f"unknown {key}" for name, key in names.items() if name not in known]
    places = []
    for key in keys:
        if key not in names:
            continue
        source = key if key in base else ends[key]
        place = Place(
            key,
            source,
            names[key],
            plan.changes.get(key, []),
            plan.changes.get(ends.get(key, ""), []),
        )
        expected = plan.resized[source].shape if source in plan.resized else base.shape(source)
        if merged.shape(place.merged) != expected:
            wrong.append(f"{place.merged} is {merged.shape(place.merged)}, expected {expected}")
        places.append(place)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(
            f"{quoted(merged.directory)} is not a merge into {quoted(base.directory)}: "
            f"{'; '.join(wrong[:3])}{more}"
        )
    return places, notes


def _refuse_unmerged(merged: Checkpoint, keys: Sequence[str]) -> None:
    """FormatError if the adapter is beside the base in one file: saved before it was merged."""
    for key in keys:
        if any(part in f"{key}." for part in UNMERGED):
            raise FormatError(
                f"{quoted(merged.directory)} has {quoted(key)}: the model was saved with its "
                "adapter beside the weights; merge it, for example by merge_and_unload, and save "
                "it again"
            )


def compare_configs(base: Mapping[str, Any], merged: Mapping[str, Any]) -> list[str]:
    """A note on the fields in which two config.json differ, with which equal weights differ, too.

    A field that one of them lacks may have its default in the other.
    """
    different = [
        f"{name} is {merged[name]!r:.40}, in the base {base[name]!r:.40}"
        for name in sorted(base.keys() & merged.keys() - IGNORED - OF_STORAGE)
        if base[name] != merged[name]
    ]
    if not different:
        return []
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return [f"config.json differs, and so may the outputs: {'; '.join(different[:3])}{more}"]


# ---- one tensor ----


def explain_place(files: Files, place: Place, changes: Sequence[Change]) -> Explanation:
    """What explains a tensor that `changes`, one or none, should have made."""
    explanations = []
    for dtype in _possible_dtypes(files.merged, place.merged):
        explanations.append(_explain_rounded(files, place, changes, dtype))
        if not changes and not explanations[-1].best:
            break
    return join_explanations(explanations)._replace(is_head=place.key == HEAD_WEIGHT)


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


def require_floats(files: Files, place: Place) -> None:
    """FormatError unless both tensors are stored as floats that are read."""
    for file, key in ((files.base, place.source), (files.merged, place.merged)):
        if file.dtype(key) not in FLOATS:
            raise FormatError(
                f"{quoted(file.directory)}: {quoted(key)} is {file.dtype(key)}, and only "
                f"{', '.join(FLOATS)} can be audited: convert it first"
            )


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
