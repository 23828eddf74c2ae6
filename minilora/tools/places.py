"""Which tensors of a merged checkpoint and of its base belong together, and what changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import FormatError
from ..formats import Checkpoint
from ..formats.checkpoint import BUFFERS, align_keys
from ..formats.disk import quoted
from ..lora.files.fitting import base_key
from ..lora.targets.base import describe_checkpoint
from ..models.dialects import IGNORED
from .merging import HEAD_WEIGHT, Change, MergePlan

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
