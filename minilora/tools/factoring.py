"""The best low-rank factors: an adapter from the difference of two checkpoints, and an adapter of
another rank.

Eckart & Young 1936: the first r terms of the singular value decomposition are the nearest matrix of
rank r in the Frobenius norm, and miss sqrt(sum of the squares of the other singular values). Both
tools report that.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import Checkpoint, read_checkpoint, write_adapter
from ..formats.checkpoint import is_stored_transposed
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import AdaLoraConfig, HydraConfig, LoraConfig
from ..lora.combining import MAX_RANK
from ..lora.factors import factors_from_svd, product_norm, truncate_rank
from ..lora.files import AdapterFile
from ..lora.names import EMBEDDING, LINEAR, PREFIX
from ..lora.plan import HEAD, canonical_name
from ..threads import one_blas_thread
from .leading import leading_triplets
from .rewriting import Row, progress

Array = np.ndarray
Tensors = dict[str, Array]
NOT_TARGETS = ("embed_tokens", "wte", "wpe", HEAD)  # extract saves these whole
ADALORA_FIELDS = {field.name for field in dataclasses.fields(AdaLoraConfig)}
ADALORA_FIELDS -= {field.name for field in dataclasses.fields(LoraConfig)}


def resize(adapter: str | Path, r: int, out: str | Path) -> list[Row]:
    """Write the adapter with the nearest dW of rank r in every layer, as plain LoRA (or DoRA), to
    the folder `out`.

    Returns one row per layer: |dW|, |dW' - dW|, and that over |dW|. AdaLoRA's E goes into the
    factors. The adapter's other tensors stay as they are; DoRA's m, too, so that its row is about s
    B A alone. ConfigError for an invalid rank, or HydraLoRA; FormatError, NonFiniteError, OSError;
    `out` is then as it was.
    """
    _require_rank(r)
    require_outside(out, adapter=adapter)
    with AdapterFile(adapter) as file:
        if isinstance(file.config, HydraConfig):
            raise ConfigError(
                f"{file.where} is HydraLoRA's: it has several B's, and so "
                "no single dW to approximate"
            )
        tensors: Tensors = {}
        layers = file.layers.values()
        replaced = {
            key for layer in layers for part, key in layer.items() if part not in ("m", "base")
        }
        for key in file.file.keys():
            if key not in replaced:
                tensors[key] = file.file.read(key)
        rows = []
        for path in progress(file.layers, "resize"):
            before = file.part(path)
            if not math.isfinite(before.c * product_norm(before.A, before.B)):
                raise NonFiniteError(f"{file.where}: {path} is not finite")
            A, B, row = truncate_rank(before.A, before.B, before.c, r)
            tensors |= _factor_tensors(path, A, B, file.embeds(path))
            rows.append({"layer": path, "r": f"{len(before.A)} -> {r}", **row})
        fields = {name: value for name, value in file.raw.items() if name not in ADALORA_FIELDS}
        _write(out, adapter, {**fields, **plain(r)}, tensors)
    return rows


def extract(base: str | Path, tuned: str | Path, r: int, out: str | Path) -> list[Row]:
    """Write the difference of the checkpoints `tuned` and `base` as an adapter of rank r, in PEFT's
    files, to `out`.

    A linear layer of which the weight alone changed gets the nearest factors of the difference;
    other changed modules (norms, biases, the embedding, the head) are saved whole. Returns one row
    per layer as `resize` does. Memory holds a few tensors in float64; BLAS runs in one thread, so
    that equal checkpoints give equal bits everywhere.

    FormatError if the two have different tensors or shapes, ConfigError if nothing changed or a
    tied embedding did.
    """
    _require_rank(r)
    require_outside(out, base=base, tuned=tuned)
    config, one = read_checkpoint(base)
    with one, read_checkpoint(tuned)[1] as other, one_blas_thread():
        model_type = str(config.get("model_type"))
        changed = _changed_modules(one, other, model_type)
        tensors: Tensors = {}
        rows = []
        layers = []
        whole = []
        for path in progress(changed, "extract"):
            keys = changed[path]
            name = path.rpartition(".")[2]
            if name in ("embed_tokens", "wte") and f"{HEAD}.weight" not in one:
                raise ConfigError(
                    f"{keys[0]} changed, and the head is tied to it, which an adapter cannot "
                    "express: untie them in both checkpoints first"
                )
            weight = keys[0]
            is_matrix = weight.endswith(".weight") and len(one.shape(weight)) == 2
            if is_matrix and len(keys) == 1 and name not in NOT_TARGETS:
                D = _difference(one, other, weight)
                D = D.T if is_stored_transposed(model_type, weight) else D
                A, B, row = factors_from_svd(*leading_triplets(D, r), r)
                tensors |= _factor_tensors(path, A, B)
                layers.append(path)
                rows.append({"layer": path, "r": str(r), **row})
                continue
            whole.append(path)
            for key in one.keys():
                module, _, parameter = canonical_name(model_type, key).rpartition(".")
                if module == path:
                    tensors[f"{PREFIX}{path}.{parameter}"] = other.read(key, np.float32)
        if not layers:
            raise ConfigError(
                f"no linear layer of {other.directory!r} differs from the base's by its "
                "weight alone"
            )
        fields = {
            "target_modules": sorted(layers),
            "modules_to_save": sorted(whole) or None,
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": is_stored_transposed(model_type, f"{layers[-1]}.weight"),
            "base_model_name_or_path": str(base),
        }
        _write(out, base, {**fields, **plain(r)}, tensors)
    return rows


def _changed_modules(one: Checkpoint, other: Checkpoint, model_type: str) -> dict[str, list[str]]:
    """The keys that differ, by the paths of their modules as an adapter names them."""
    shapes, other_shapes = (
        {(key, file.shape(key)) for key in file.keys()} for file in (one, other)
    )
    if shapes != other_shapes:
        key = min(shapes ^ other_shapes)[0]
        raise FormatError(
            f"{other.directory!r} is not tuned from {one.directory!r}: {key} is in one alone, or "
            "differs in shape"
        )
    changed: dict[str, list[str]] = {}
    for key in one.keys():
        if not np.array_equal(one.read(key), other.read(key), equal_nan=True):
            one.require_floats([key])
            other.require_floats([key])
            path = canonical_name(model_type, key).rpartition(".")[0]
            changed.setdefault(path, []).append(key)
    if not changed:
        raise ConfigError(
            f"{other.directory!r} and {one.directory!r} are equal: there is nothing to extract"
        )
    return changed


def _difference(one: Checkpoint, other: Checkpoint, key: str) -> Array:
    D = other.read(key, np.float64)
    D -= one.read(key)
    if not np.isfinite(D).all():
        raise NonFiniteError(f"the difference of {key} is not finite")
    return D


# ---- a plain LoRA adapter ----


def factor_keys(path: str, embeds: bool = False) -> tuple[str, str]:
    """The keys of A and B of a layer in PEFT's file."""
    if embeds:
        names = EMBEDDING
    else:
        names = LINEAR
    return f"{PREFIX}{path}.{names['A']}", f"{PREFIX}{path}.{names['B']}"


def _factor_tensors(path: str, A: Array, B: Array, embeds: bool = False) -> Tensors:
    """A and B in float32, by their keys."""
    tensors: Tensors = {}
    for key, factor in zip(factor_keys(path, embeds), (A, B), strict=True):
        with np.errstate(over="ignore"):  # too large for float32 becomes inf, and raises below
            tensors[key] = np.ascontiguousarray(factor, np.float32)
        if not np.isfinite(tensors[key]).all():
            raise NonFiniteError(
                f"{path} is too large for float32, in which its factors are written"
            )
    return tensors


def plain(r: int) -> dict[str, Any]:
    """The fields of adapter_config.json that give every layer rank r and s = 1."""
    fields: dict[str, Any] = {"peft_type": "LORA", "r": r, "lora_alpha": r, "use_rslora": False}
    return {**fields, "rank_pattern": {}, "alpha_pattern": {}}


def _require_rank(r: int) -> None:
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ConfigError(f"--r must be an integer from 1 to {MAX_RANK}, got {r!r:.60}")


def _write(out: str | Path, source: str | Path, config: dict[str, Any], tensors: Tensors) -> None:
    LoraConfig.from_dict(config, str(source))  # so that what is written can be read
    with new_folder(out, {"source": fingerprint(source)}) as stage:
        write_adapter(stage, config, tensors)
