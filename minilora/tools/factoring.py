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
from ..lora.files import AdapterFile, base_key, stored_key
from ..lora.names import EMBEDDING, LINEAR, PREFIX
from ..lora.plan import FIRST_EMBEDDINGS, HEAD, Base, canonical_name, describe_checkpoint
from ..lora.tying import are_transposed
from ..threads import one_blas_thread
from .leading import leading_triplets
from .rewriting import Row, progress

Array = np.ndarray
Tensors = dict[str, Array]
HEAD_WEIGHT = f"{HEAD}.weight"
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
        file.require_factors("resize")
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
        tied = _tied_embedding(file)
        if tied is not None:
            tensors |= head_factors(tensors, tied)
        fields = {name: value for name, value in file.raw.items() if name not in ADALORA_FIELDS}
        _write(out, adapter, {**fields, **plain(r)}, tensors)
    return rows


def extract(base: str | Path, tuned: str | Path, r: int, out: str | Path) -> list[Row]:
    """Write the difference of the checkpoints `tuned` and `base` as an adapter of rank r, in PEFT's
    files, to `out`.

    A linear layer whose weight changed gets the nearest factors of the difference, and its bias if
    any such bias changed; other changed modules (norms, the embedding, the head) are saved whole.
    An embedding and a head with one weight are saved once, with `ensure_weight_tying`; if only the
    tuned model has two weights, each that changed is saved, and merging needs tied="untie". Returns
    one row per layer as `resize` does. Memory holds a few tensors in float64; BLAS runs in one
    thread, so that equal checkpoints give equal bits everywhere.

    FormatError if the two have different tensors or shapes, ConfigError if nothing changed.
    """
    _require_rank(r)
    require_outside(out, base=base, tuned=tuned)
    config, one = read_checkpoint(base)
    with one, read_checkpoint(tuned)[1] as other, one_blas_thread():
        pair = _Pair(one, other, describe_checkpoint(one, config))
        changed = pair.changed_modules()
        tied = pair.is_tied() and pair.described.embedding in changed
        if tied:
            changed.pop(HEAD, None)  # the same change of the one weight
        tensors: Tensors = {}
        rows = []
        layers = []
        whole = []
        for path in progress(changed, "extract"):
            names = changed[path]
            weight = f"{path}.weight"
            is_matrix = weight in names and len(pair.shape(weight)) == 2
            if is_matrix and path.rpartition(".")[2] not in NOT_TARGETS:
                D = pair.difference(weight)
                A, B, row = factors_from_svd(*leading_triplets(D, r), r)
                tensors |= _factor_tensors(path, A, B)
                layers.append(path)
                rows.append({"layer": path, "r": str(r), **row})
                continue
            whole.append(path)
            for name in pair.names:
                if name.rpartition(".")[0] == path:
                    tensors[PREFIX + name] = pair.read_tuned(name, np.float32)
        if tied:
            tensors[PREFIX + HEAD_WEIGHT] = pair.read_tuned(HEAD_WEIGHT, np.float32)
        if not layers:
            raise ConfigError(
                f"no weight of a linear layer of {other.directory!r} differs from the base's, and "
                "an adapter needs one"
            )
        biases = [f"{path}.bias" for path in layers if f"{path}.bias" in pair.names]
        biased = any(name in changed[name.removesuffix(".bias")] for name in biases)
        if biased:
            for name in biases:
                path = name.removesuffix(".bias")
                tensors[f"{PREFIX}{path}.base_layer.bias"] = pair.read_tuned(name, np.float32)
        model_type = pair.described.model_type
        fields = {
            "target_modules": sorted(layers),
            "modules_to_save": sorted(whole) or None,
            "bias": "lora_only" if biased else "none",
            "ensure_weight_tying": tied,
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": is_stored_transposed(model_type, f"{layers[-1]}.weight"),
            "base_model_name_or_path": str(base),
        }
        _write(out, base, {**fields, **plain(r)}, tensors)
    return rows


class _Pair:
    """A base and what was tuned from it, by the names that an adapter has for their tensors.

    names   those of both; a head that one of them does not store is its embedding

    FormatError if the two have different tensors or shapes.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, described: Base) -> None:
        self.base = base
        self.tuned = tuned
        self.described = described
        names = [{self._name(key): None for key in file.keys()} for file in (base, tuned)]
        self.names = list(names[0])
        if described.tied and HEAD_WEIGHT in names[1] and HEAD_WEIGHT not in names[0]:
            self.names.append(HEAD_WEIGHT)
        for name in dict.fromkeys([*self.names, *names[1]]):
            shapes = [self._shape(file, name) for file in (base, tuned)]
            if shapes[0] != shapes[1]:
                raise FormatError(
                    f"{tuned.directory!r} is not tuned from {base.directory!r}: {name} is in one "
                    "alone, or differs in shape"
                )

    def _name(self, key: str) -> str:
        return canonical_name(self.described.model_type, key)

    def _key(self, file: Checkpoint, name: str) -> str | None:
        return stored_key(file, name) if self.described.tied else base_key(file, name)

    def _shape(self, file: Checkpoint, name: str) -> tuple[int, ...] | None:
        key = self._key(file, name)
        return None if key is None else file.shape(key)

    def _read(self, file: Checkpoint, name: str, dtype: Any = None) -> Array:
        key = self._key(file, name)
        assert key is not None  # __init__ has found it
        return file.read(key, dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, which is the same in both."""
        shape = self._shape(self.base, name)
        assert shape is not None
        return shape

    def read_tuned(self, name: str, dtype: Any = None) -> Array:
        """A tensor of the tuned model."""
        return self._read(self.tuned, name, dtype)

    def is_tied(self) -> bool:
        """Do embedding and head have one weight, before and after tuning?"""
        embedding = f"{self.described.embedding}.weight"
        if not self.described.tied or self._key(self.tuned, embedding) is None:
            return False
        if self._key(self.tuned, HEAD_WEIGHT) == self._key(self.tuned, embedding):
            return True
        tuned = self.read_tuned(embedding)
        return np.array_equal(tuned, self.read_tuned(HEAD_WEIGHT), equal_nan=True)

    def changed_modules(self) -> dict[str, list[str]]:
        """The names of the tensors that differ, by the paths of their modules."""
        changed: dict[str, list[str]] = {}
        for name in self.names:
            if not np.array_equal(
                self._read(self.base, name), self.read_tuned(name), equal_nan=True
            ):
                for file in (self.base, self.tuned):
                    file.require_floats([key for key in [self._key(file, name)] if key])
                changed.setdefault(name.rpartition(".")[0], []).append(name)
        if not changed:
            raise ConfigError(
                f"{self.tuned.directory!r} and {self.base.directory!r} are equal: there is "
                "nothing to extract"
            )
        return changed

    def difference(self, name: str) -> Array:
        """tuned - base of a linear layer's weight, (O, I) in float64. NonFiniteError."""
        D = self.read_tuned(name, np.float64)
        D -= self._read(self.base, name)
        if not np.isfinite(D).all():
            raise NonFiniteError(f"the difference of {name} is not finite")
        return D.T if is_stored_transposed(self.described.model_type, name) else D


# ---- a plain LoRA adapter ----


def factor_keys(path: str, embeds: bool = False) -> tuple[str, str]:
    """The keys of A and B of a layer in PEFT's file."""
    if embeds:
        names = EMBEDDING
    else:
        names = LINEAR
    return f"{PREFIX}{path}.{names['A']}", f"{PREFIX}{path}.{names['B']}"


def head_factors(tensors: Tensors, embedding: str) -> Tensors:
    """The factors of a head that is tied to the layer `embedding`: its factors transposed, to the
    bit, by their keys."""
    A, B = (tensors[key] for key in factor_keys(embedding, embeds=True))
    head_A, head_B = factor_keys(HEAD)
    return {head_A: np.ascontiguousarray(B.T), head_B: np.ascontiguousarray(A.T)}


def _tied_embedding(file: AdapterFile) -> str | None:
    """The embedding whose factors the head has, too, transposed; None if it has its own."""
    path = next((name for name in FIRST_EMBEDDINGS if name in file.layers), None)
    if path is None or HEAD not in file.layers or not file.config.ensure_weight_tying:
        return None
    return path if are_transposed(file.part(path), file.part(HEAD)) else None


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
    # PEFT looks at how an adapter began when it loads it, too, and not every start has any rank.
    fields |= {"init_lora_weights": True, "eva_config": None}
    return {**fields, "rank_pattern": {}, "alpha_pattern": {}}


def _require_rank(r: int) -> None:
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ConfigError(f"--r must be an integer from 1 to {MAX_RANK}, got {r!r:.60}")


def _write(out: str | Path, source: str | Path, config: dict[str, Any], tensors: Tensors) -> None:
    LoraConfig.from_dict(config, str(source))  # so that what is written can be read
    with new_folder(out, {"source": fingerprint(source)}) as stage:
        write_adapter(stage, config, tensors)
