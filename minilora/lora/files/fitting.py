"""Whether an adapter's file fits a base, and its plan over that base.

`match` settles what only the base can say (reading.py, starts/residual.py), plans the adapter, and
compares the planned tensors with those of the file. A tensor without a place in the plan must
repeat another one, of the file or of the base (repeats.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import ConfigError, FormatError
from ...formats import Checkpoint, SafetensorsFile
from ...formats.checkpoint import (
    describe_prefix,
    describe_prefixes,
    differing_prefixes,
    is_stored_transposed,
)
from ...formats.dtypes import round_to, widen
from ..config import LoraConfig
from ..factors import Part
from ..names import EMBEDDING, LINEAR, MODEL_PREFIX, PREFIX
from ..starts.residual import is_left_by_start, resolve_start
from ..targets.base import DECODERS, FIRST_EMBEDDINGS, HEAD, Base, describe_checkpoint
from ..targets.plan import Plan, plan_adapter
from .adapter import AdapterFile
from .reading import decoder_of, settle_saved, settle_vocabulary, with_vocabulary
from .repeats import Read, is_weight_of_base, keys_of_adapter, names_of_base

DECODER_PREFIXES = tuple(f"{decoder}." for decoder in DECODERS)
Array = np.ndarray


def fit(adapter: AdapterFile, base: Base, read: Read, warn: bool = True) -> Plan:
    """The adapter's plan over `base`, whose vocabulary the adapter may have changed.

    One FormatError lists everything that does not fit.
    """
    plan, wrong, cause = match(adapter, base, read, warn)
    if plan is None or wrong:
        prefix = _differing_prefix(adapter, plan) if plan else ""
        wrong = [prefix, *wrong] if prefix else wrong
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(
            f"{adapter.where}: the adapter does not fit this base: {'; '.join(wrong[:3])}{more}"
        ) from cause
    return plan


def match(
    adapter: AdapterFile, base: Base, read: Read, warn: bool = False
) -> tuple[Plan | None, list[str], ConfigError | None]:
    """(the plan over `base` or None, what does not fit, the error that left no plan or None)."""
    file = adapter.file
    try:
        decoder = decoder_of(file.keys(), base.parameters)
        if decoder:
            adapter.put_into(decoder)
        vocabulary = settle_vocabulary(file, base, read)
        read = reading_first(vocabulary, read)
        resized = with_vocabulary(base, vocabulary)
        if adapter.began:
            resolve_start(adapter, resized, read)
        adapter.config, notes = settle_saved(file, adapter.config, adapter.whole, resized, read)
        plan = plan_adapter(resized, adapter.config, file.keys(), warn)
        plan = plan._replace(vocabulary=vocabulary)
    except ConfigError as error:
        return None, [str(error)], error
    wrong = mismatches(adapter, plan, read)
    if not wrong:
        adapter.keep(plan)
        for name, W in vocabulary.items():
            before = base.parameters[name][0]
            notes.append(f"{name}: the base has {before} tokens and the file {len(W)}: resized")
        for note in (*notes, *plan.notes):
            adapter.note(f"{adapter.where}: {note}")
    return plan, wrong, None


def reading_first(tensors: Mapping[str, Array], read: Read) -> Read:
    """A function that gives these tensors by their names, and others as `read` does."""
    return lambda name: tensors[name] if name in tensors else read(name)


def _differing_prefix(adapter: AdapterFile, plan: Plan) -> str:
    """How the adapter's keys differ from the planned ones if only their beginnings do, or "".

    The base is at fault if its own names have a beginning that no model has: `torch.compile`,
    DataParallel and PEFT put one before every name of a model that was not unwrapped.
    """
    keys = adapter.file.keys()
    if all(key.startswith(PREFIX) for key in keys):
        names = [key.removeprefix(PREFIX) for key in keys]
        prefixes = differing_prefixes(names, [key.removeprefix(PREFIX) for key in plan.shapes()])
        if prefixes and prefixes[1] not in ("", *DECODER_PREFIXES):
            wanted, given = prefixes
            return describe_prefixes("the base's", given, wanted)
    return describe_prefix(keys, plan.shapes())


def mismatches_with(
    adapter: AdapterFile, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> list[str]:
    """`mismatches` with a checkpoint, or why the configuration does not fit it."""
    base = describe_checkpoint(checkpoint, config)
    plan, wrong, _ = match(adapter, base, read_base(checkpoint))
    if plan is None:
        wrong += [f"unknown {path}" for path in adapter.layers if path not in base.layers]
    return wrong


def mismatches(adapter: AdapterFile, plan: Plan, read: Read) -> list[str]:
    """The missing and unknown keys, wrong shapes and wrong values of a file, one line for each."""
    file = adapter.file
    keys = dict.fromkeys(file.keys())
    expected = plan.shapes()
    # A module that only its keys declare may be there in part: the rest stays the base's.
    partial = [path for path in adapter.whole if path in plan.saved]
    optional = {PREFIX + name for path in partial for name, _ in plan.base.below(path)}
    missing = [key for key in expected if key not in keys and key not in optional]
    repeats = {key: _repeats(adapter, key, plan, read) for key in keys if key not in expected}
    wrong = _describe_missing(missing, plan.config.bias)
    if any(key == f"{MODEL_PREFIX}vera_A" for key in missing):
        wrong = [
            "base_model.vera_A and base_model.vera_B are missing, but save_projection is true: "
            "set it to false in adapter_config.json to compute them from projection_prng_key"
        ]
    wrong += [f"unknown {key}" for key, equal in repeats.items() if equal is None]
    for key, shape in expected.items():
        if key in keys and file.shape(key) != shape:
            wrong.append(f"{key} is {file.shape(key)}, the base needs {shape}")
    for key, equal in repeats.items():
        if equal is False:
            wrong.append(f"{key} differs from the base's or from what it repeats")
    return wrong


def _describe_missing(missing: list[str], bias: str) -> list[str]:
    """A line for each missing key; one for all biases if nothing else is missing."""
    if missing and bias != "none" and all(key.endswith(".bias") for key in missing):
        return [
            f"bias = {bias!r}, but {len(missing)} trained biases are missing, such as {missing[0]} "
            "(peft had versions that did not save them): set bias to 'none' in "
            "adapter_config.json to have the base's biases, as peft does, or save it again"
        ]
    return [f"missing {key}" for key in missing]


def _repeats(adapter: AdapterFile, key: str, plan: Plan, read: Read) -> bool | None:
    """Is a tensor equal to what it repeats, in the file or in the base? None if it repeats none."""
    file = adapter.file
    for other, transposed in keys_of_adapter(key, plan.follows):
        if other in file:
            array = file.read(other, np.float64)
            return _equal_as_stored(file, key, array.T if transposed else array)
    for name in names_of_base(key):
        if name in plan.base.parameters:
            path = name.removesuffix(".weight")
            part = None
            if path in plan.targets:
                part = _plain_part(file, path, plan.config)
            transposed = is_stored_transposed(plan.base.model_type, name)
            table = transposed or plan.base.layers[path].kind == "embedding" if part else False
            W = read(name)
            if is_weight_of_base(file, key, W, part, table):
                return True
            is_linear = path in plan.targets and plan.base.layers[path].kind == "linear"
            return is_linear and is_left_by_start(adapter, key, path, W, transposed)
    return None


def _plain_part(file: SafetensorsFile, path: str, config: LoraConfig) -> Part | None:
    """What plain LoRA adds to the layer `path`; None for every other method."""
    for names in (LINEAR, EMBEDDING):
        A, B = (f"{PREFIX}{path}.{names[part]}" for part in "AB")
        if A in file and B in file and not config.use_dora:
            s = float(config.scaling(path))
            return Part(file.read(A, np.float64), file.read(B, np.float64), s)
    return None


def _equal_as_stored(file: SafetensorsFile, key: str, expected: Array) -> bool:
    """Is a tensor of a file `expected`, or what rounding once to the file's dtype makes of it?"""
    stored = file.read_bits(key)
    rounded = round_to(expected, file.dtype(key))
    return np.array_equal(widen(stored), widen(rounded), equal_nan=True)


# ---- reading tensors by name ---------------------------------------------------------------------


def base_key(base: Checkpoint, name: str) -> str | None:
    """The key in `base` of the tensor that an adapter calls `name`, or None.

    Files come with and without the decoder's name.
    """
    bare = [name.removeprefix(prefix) for prefix in DECODER_PREFIXES]
    return next((key for key in (name, *bare, f"transformer.{name}") if key in base), None)


def read_base(base: Checkpoint) -> Read:
    """A function that reads a tensor of a checkpoint by the name that an adapter has for it."""

    def read(name: str) -> Array:
        key = stored_key(base, name)
        if key is None:
            raise FormatError(f"{base.directory!r} has no {name}")
        return base.read(key)

    return read


def stored_key(base: Checkpoint, name: str) -> str | None:
    """The key in `base` where `name` is stored: that of the embedding for a head that is tied."""
    names = [name]
    if name == f"{HEAD}.weight":  # tied if it is missing, so its weight is the embedding's
        names += [f"{path}.weight" for path in FIRST_EMBEDDINGS]
    keys = (base_key(base, alias) for alias in names)
    return next((key for key in keys if key is not None), None)
