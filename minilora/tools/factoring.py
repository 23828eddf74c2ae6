"""The best low-rank factors: an adapter from the difference of two checkpoints, and an adapter of another rank.

Eckart & Young 1936: of all matrices of rank r the singular value decomposition's first r terms are the nearest one in
the Frobenius norm, and miss  sqrt(sum of the squares of the other singular values).  Both tools report that.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from tqdm import tqdm

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import Checkpoint, read_checkpoint, write_adapter
from ..formats.checkpoint import is_stored_transposed
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import AdaLoraConfig, HydraConfig, LoraConfig
from ..lora.combining import MAX_RANK
from ..lora.factors import factors_from_svd, product_norm, truncate_rank
from ..lora.files import AdapterFile
from ..lora.names import EMBEDDING, LINEAR, PREFIX
from .leading import leading_triplets
from .rewriting import Row

Array = np.ndarray
OWN_OF_ADALORA = {f.name for f in dataclasses.fields(AdaLoraConfig)} - {
    f.name for f in dataclasses.fields(LoraConfig)
}


def resize(adapter: str | Path, r: int, out: str | Path) -> list[Row]:
    """Write the adapter with every layer at rank r, each as near as rank r can be, as plain LoRA (or DoRA) to `out`.

    Returns a row a layer: |dW|, |dW' - dW| and that over |dW|. AdaLoRA's E goes into the factors. What else the adapter
    holds stays as it is; DoRA's m, too, so that of it the row speaks of s B A alone. ConfigError for a rank that is
    none, or HydraLoRA; FormatError, NonFiniteError, OSError; `out` is then as it was.
    """
    _require_rank(r)
    require_outside(out, adapter=adapter)
    with AdapterFile(adapter) as file:
        if isinstance(file.config, HydraConfig):
            raise ConfigError(
                f"{file.where} is HydraLoRA's: it has several B's, and no dW to be nearest to"
            )
        factors = {key for layer in file.layers.values() for key in layer.values()}
        tensors = {key: file.file.read(key) for key in file.file.keys() if key not in factors}
        rows = []
        for path, layer in tqdm(
            file.layers.items(), desc="resize", unit=" layers", disable=None, leave=False
        ):
            was = file.part(path)
            if not math.isfinite(was.c * product_norm(was.A, was.B)):
                raise NonFiniteError(f"{file.where}: {path} is not finite")
            A, B, row = truncate_rank(was.A, was.B, was.c, r)
            names = EMBEDDING if file.embeds(path) else LINEAR
            tensors |= {
                f"{PREFIX}{path}.{names[x]}": _single(array, path)
                for x, array in (("A", A), ("B", B))
            }
            tensors |= {
                key: file.file.read(key) for part, key in layer.items() if part in ("m", "base")
            }
            rows.append({"layer": path, "r": f"{len(was.A)} -> {r}", **row})
        kept = {k: v for k, v in file.raw.items() if k not in OWN_OF_ADALORA}
        _write(out, adapter, {**kept, **plain(r)}, tensors)
    return rows


def extract(base: str | Path, tuned: str | Path, r: int, out: str | Path) -> list[Row]:
    """Write, as an adapter of rank r in PEFT's files, what sets the checkpoint `tuned` apart from `base`, to `out`.

    A linear layer of which the weight alone changed gets the nearest factors of the difference; what else changed
    (norms, biases, the embedding, the head) is saved whole. Returns a row a layer as `resize` does. Memory holds a few
    tensors in float64; BLAS runs in one thread, so that equal checkpoints give equal bits wherever it is asked for.

    FormatError where the two have other tensors or shapes, ConfigError where nothing changed or a tied embedding did.
    """
    _require_rank(r)
    require_outside(out, base=base, tuned=tuned)
    config, one = read_checkpoint(base)
    with one, read_checkpoint(tuned)[1] as other, threadpoolctl.threadpool_limits(1, "blas"):
        keys = one.keys()
        apart = sorted(set(keys) ^ set(other.keys())) or [
            k for k in keys if one.shape(k) != other.shape(k)
        ]
        if apart:
            raise FormatError(
                f"{str(tuned)!r} is no tuned {str(base)!r}: {apart[0]} is in one alone, or differs in shape"
            )
        kind = str(config.get("model_type"))
        changed: dict[str, list[str]] = {}
        for key in keys:
            if not np.array_equal(one.read(key), other.read(key), equal_nan=True):
                changed.setdefault(_path(key, kind), []).append(key)
        if not changed:
            raise ConfigError(
                f"{str(tuned)!r} and {str(base)!r} are equal: there is nothing to extract"
            )
        tensors: dict[str, Array] = {}
        rows: list[Row] = []
        whole: list[str] = []
        layers: list[str] = []
        for path, own in tqdm(
            changed.items(), desc="extract", unit=" layers", disable=None, leave=False
        ):
            name = path.rpartition(".")[2]
            if name in ("embed_tokens", "wte") and "lm_head.weight" not in one:
                raise ConfigError(
                    f"{own[0]} changed, and the head is tied to it: no adapter says that; untie it first"
                )
            whole_key = f"{own[0].rpartition('.')[0]}.weight"
            if own == [whole_key] and len(one.shape(whole_key)) == 2 and name not in _NO_TARGETS:
                A, B, row = _difference(
                    one, other, whole_key, is_stored_transposed(kind, whole_key), r
                )
                tensors |= {
                    f"{PREFIX}{path}.{LINEAR[x]}": _single(array, path)
                    for x, array in (("A", A), ("B", B))
                }
                layers.append(path)
                rows.append({"layer": path, "r": str(r), **row})
            else:
                whole.append(path)
                module = [k for k in keys if _path(k, kind) == path]
                tensors |= {
                    f"{PREFIX}{path}.{k.rpartition('.')[2]}": other.read(k, np.float32)
                    for k in module
                }
        if not layers:
            raise ConfigError(
                f"no linear layer of {str(tuned)!r} differs from the base's by its weight alone"
            )
        fields: dict[str, Any] = {
            "target_modules": sorted(layers),
            "modules_to_save": sorted(whole) or None,
            "task_type": "CAUSAL_LM",
        }
        fields["fan_in_fan_out"] = is_stored_transposed(kind, f"{layers[-1]}.weight")
        fields["base_model_name_or_path"] = str(base)
        _write(out, base, {**fields, **plain(r)}, tensors)
    return rows


_NO_TARGETS = ("embed_tokens", "wte", "wpe", "lm_head")


def _difference(
    one: Checkpoint, other: Checkpoint, key: str, flip: bool, r: int
) -> tuple[Array, Array, Row]:
    D = other.read(key, np.float64)
    D -= one.read(key)
    if not np.isfinite(D).all():
        raise NonFiniteError(f"the difference of {key} is not finite")
    return factors_from_svd(*leading_triplets(D.T if flip else D, r), r)


def _path(key: str, kind: str) -> str:
    """The module of a key, under the name that an adapter has for it."""
    path = key.rpartition(".")[0]
    return (
        f"transformer.{path.removeprefix('transformer.')}"
        if kind == "gpt2" and path != "lm_head"
        else path
    )


def plain(r: int) -> dict[str, Any]:
    """Of adapter_config.json, what says rank r and s = 1 for every layer."""
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _single(array: Array, path: str) -> Array:
    with np.errstate(over="ignore"):  # beyond float32 is inf, and is found here
        single = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(single).all():
        raise NonFiniteError(f"{path} is too large for float32, in which its factors are written")
    return single


def _require_rank(r: int) -> None:
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ConfigError(f"--r must be an integer from 1 to {MAX_RANK}, got {r!r:.60}")


def _write(
    out: str | Path, source: str | Path, config: dict[str, Any], tensors: dict[str, Array]
) -> None:
    LoraConfig.from_dict(config, str(source))  # what is written can be read
    with new_folder(out, {"source": fingerprint(source)}) as stage:
        write_adapter(stage, config, tensors)
