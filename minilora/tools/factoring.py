"""Nearest low-rank factors: an adapter from the difference of two checkpoints, or of another rank.

The first r terms of the singular value decomposition are the nearest matrix of rank r in the
Frobenius norm, and their error is sqrt(sum_{i>r} sigma_i^2) (Eckart & Young 1936), which both tools
report.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import Checkpoint, read_checkpoint, write_adapter
from ..formats.checkpoint import align_keys, are_equal, is_stored_transposed
from ..formats.disk import quoted
from ..formats.dtypes import row_blocks, widen
from ..formats.folders import fingerprint, new_folder, require_outside
from ..formats.hub import model_name
from ..lora import AdaLoraConfig, HydraConfig, LoraConfig
from ..lora.config import plain_fields
from ..lora.factors import factors_from_svd, product_norm, truncate_rank
from ..lora.files.adapter import AdapterFile
from ..lora.names import PREFIX, factor_keys
from ..lora.ranks import Spectrum, check_rank_rule, choose_ranks, factors_spectrum, matrix_spectrum
from ..lora.singular import leading_triplets
from ..lora.targets.base import FIRST_EMBEDDINGS, HEAD, Base, canonical_names, describe_checkpoint
from ..lora.tying import are_transposed
from ..threads import one_blas_thread
from .comparing import has_other_rows
from .rewriting import Row, progress

Array = np.ndarray
Tensors = dict[str, Array]
HEAD_WEIGHT = f"{HEAD}.weight"
NOT_TARGETS = ("embed_tokens", "wte", "wpe", HEAD)  # extract saves these whole
ADALORA_FIELDS = {field.name for field in dataclasses.fields(AdaLoraConfig)}
ADALORA_FIELDS -= {field.name for field in dataclasses.fields(LoraConfig)}


def resize(
    adapter: str | Path,
    r: int | None,
    out: str | Path,
    *,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    initial: str | Path | None = None,
    base_is: str | None = None,
) -> list[Row]:
    """Write the adapter with the nearest dW of rank r in every layer to the folder `out`.

    energy, error, budget   choose a rank for each layer in place of r: see lora/ranks.py. A layer
                            of rank 0 is left out, unless more than its factors would be lost
    initial, base_is        see AdapterFile

    The result is plain LoRA, or DoRA. Returns one row per layer: |dW|, |dW' - dW|, and that over
    |dW|. AdaLoRA's E is multiplied into the factors. All other tensors stay as they are, also
    DoRA's m: its rows are about s B A alone.

    ConfigError for an invalid rank, or HydraLoRA; FormatError, NonFiniteError, OSError. After an
    error `out` is as it was.
    """
    rule = check_rank_rule(r, energy, error, budget)
    require_outside(out, adapter=adapter)
    with AdapterFile(adapter, initial=initial, base_is=base_is) as file:
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
        tied = _tied_embedding(file)
        ranks = choose_ranks(_spectra(file, tied), rule)
        if tied is not None:
            ranks[HEAD] = ranks[tied]
        rows = []
        remaining = {path: rank for path, rank in ranks.items() if rank}
        for path in progress(file.layers, "resize"):
            before = file.part(path)
            A, B, row = truncate_rank(before.A, before.B, before.c, ranks[path])
            if path in remaining:
                tensors |= factor_tensors(path, A, B, file.embeds(path))
            rows.append({"layer": path, "r": f"{len(before.A)} -> {ranks[path]}", **row})
        if tied in remaining:
            tensors |= head_factors(tensors, tied)
        fields = {name: value for name, value in file.raw.items() if name not in ADALORA_FIELDS}
        if len(remaining) < len(file.layers):
            targets = [target_name(path, "base" in file.layers[path]) for path in remaining]
            fields |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
            fields["target_modules"] = sorted(targets)
        _write(out, adapter, {**fields, **rank_fields(remaining)}, tensors)
    return rows


def _spectra(file: AdapterFile, tied: str | None) -> dict[str, Spectrum]:
    """The spectrum of each layer, without a head that is tied to an embedding. NonFiniteError."""
    spectra = {}
    for path in file.layers:
        part = file.part(path)
        if not math.isfinite(part.c * product_norm(part.A, part.B)):
            raise NonFiniteError(f"{file.where}: {path} is not finite")
        if tied is None or path != HEAD:
            more = set(file.layers[path]) - {"A", "B", "E"} or file.config.bias != "none"
            spectra[path] = factors_spectrum(part, least=int(bool(more)))
    return spectra


def extract(
    base: str | Path,
    tuned: str | Path,
    r: int | None,
    out: str | Path,
    *,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
) -> list[Row]:
    """Write the difference of the checkpoints `tuned` and `base` as an adapter of rank r to `out`.

    energy, error, budget   choose a rank for each layer in place of r: see lora/ranks.py. Singular
                            values that may be rounding errors of the tuned weights do not count

    A linear layer whose weight changed gets the nearest factors of the difference. Its bias is
    saved if the bias of any such layer changed. Other changed modules (norms, the embedding, the
    head) are saved whole. An embedding and a head with one weight are saved once, with
    `ensure_weight_tying`; if only the tuned model has two weights, each that changed is saved, and
    merging needs tied="untie". Returns one row per layer as `resize` does.

    Memory holds a few tensors in float64. BLAS runs in one thread, so that equal checkpoints give
    equal bits on any machine.

    Keys may begin in two ways ("model.layers.0" and "layers.0"), and the tuned model may have
    another vocabulary: then its embedding and head are saved whole, with a warning.

    FormatError if the two have different tensors or shapes, ConfigError if nothing changed.
    """
    rule = check_rank_rule(r, energy, error, budget)
    require_outside(out, base=base, tuned=tuned)
    config, one = read_checkpoint(base)
    with one, read_checkpoint(tuned)[1] as other, one_blas_thread():
        pair = _Pair(one, other, describe_checkpoint(one, config))
        changed = pair.changes()
        ranks = dict.fromkeys(changed.linear, r or 0)
        if rule.is_adaptive:
            biased = bool(changed.biases)
            spectra = {path: pair.spectrum(path, biased) for path in changed.linear}
            ranks = choose_ranks(spectra, rule)
        tensors, rows = _factor_differences(pair, ranks)
        tensors |= _whole_tensors(pair, changed)
        ranks = {path: rank for path, rank in ranks.items() if rank}
        fields = _extracted_fields(pair, changed, ranks)
        fields["base_model_name_or_path"] = model_name(base)
        _write(out, base, {**fields, **rank_fields(ranks)}, tensors)
    return rows


def _factor_differences(pair: _Pair, ranks: Mapping[str, int]) -> tuple[Tensors, list[Row]]:
    """(the factors of each layer's difference by key, rows of the report); none at rank 0."""
    tensors: Tensors = {}
    rows = []
    for path in progress(ranks, "extract"):
        rank = ranks[path]
        D = pair.difference(f"{path}.weight")
        triplets = leading_triplets(D, max(1, rank))
        A, B, row = factors_from_svd(*triplets, rank)
        if rank:
            tensors |= factor_tensors(path, A, B)
        rows.append({"layer": path, "r": str(rank), **row})
    return tensors, rows


def _whole_tensors(pair: _Pair, changed: _Changes) -> Tensors:
    """The tuned tensors that the adapter holds as they are, by key."""
    tensors: Tensors = {}
    for name in pair.names:
        if name.rpartition(".")[0] in changed.whole:
            tensors[PREFIX + name] = pair.read_tuned(name, np.float32)
    if changed.tied:
        tensors[PREFIX + HEAD_WEIGHT] = pair.read_tuned(HEAD_WEIGHT, np.float32)
    for name in changed.biases:
        path = name.removesuffix(".bias")
        tensors[f"{PREFIX}{path}.base_layer.bias"] = pair.read_tuned(name, np.float32)
    return tensors


def _extracted_fields(pair: _Pair, changed: _Changes, layers: Iterable[str]) -> dict[str, Any]:
    """The fields of adapter_config.json for factors of these layers, without their ranks."""
    targets = list(layers)
    model_type = pair.described.model_type
    return {
        "target_modules": sorted(targets),
        "modules_to_save": sorted(changed.whole) or None,
        "bias": "lora_only" if changed.biases else "none",
        "ensure_weight_tying": changed.tied,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": is_stored_transposed(model_type, f"{targets[-1]}.weight"),
    }


class _Changes(NamedTuple):
    """What differs between two checkpoints.

    linear   the linear layers whose weight changed
    whole    the other modules that changed, which are saved whole
    biases   the names of the biases of `linear`, if one of them changed
    tied     have embedding and head one weight, before and after, which changed?
    """

    linear: list[str]
    whole: list[str]
    biases: list[str]
    tied: bool


class _Pair:
    """A base and a checkpoint that was tuned from it, by the names of tensors in an adapter.

    names   the names in both; a head that one of them does not store is its embedding

    FormatError if the two have different tensors or shapes, apart from another vocabulary.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, described: Base) -> None:
        self.base = base
        self.tuned = tuned
        self.described = described
        alignment = align_keys(tuned.keys(), base.keys())
        if alignment.names:
            whose, others = quoted(tuned.directory), quoted(base.directory)
            warnings.warn(alignment.describe(whose, others), stacklevel=3)
        self._base_keys = canonical_names(base)
        self._tuned_keys = canonical_names(tuned, alignment.names)
        self.names = list(self._base_keys)
        if described.tied and HEAD_WEIGHT in self._tuned_keys:
            self.names = list(dict.fromkeys([*self.names, HEAD_WEIGHT]))
        resized = []
        for name in dict.fromkeys([*self.names, *self._tuned_keys]):
            shapes = [self._shape(file, name) for file in (base, tuned)]
            if shapes[0] == shapes[1]:
                continue
            if not self._is_vocabulary(name) or not has_other_rows(*shapes):
                raise FormatError(
                    f"{tuned.directory!r} is not tuned from {base.directory!r}: {name} is in one "
                    "alone, or differs in shape"
                )
            resized.append(name)
        if resized:
            self._describe_vocabulary(resized)

    def _is_vocabulary(self, name: str) -> bool:
        return name in (f"{self.described.embedding}.weight", HEAD_WEIGHT)

    def _describe_vocabulary(self, names: list[str]) -> None:
        """Warn of another vocabulary, with the number of changed rows in the part that both have.

        FormatError if only one of embedding and head has another number of rows.
        """
        ends = [name for name in self.names if self._is_vocabulary(name)]
        if names != ends:
            raise FormatError(
                f"{self.tuned.directory!r}: {names[0]} has another number of tokens than in "
                f"{self.base.directory!r}, but {ends[0] if ends[0] not in names else ends[-1]} has "
                "the same: give checkpoints whose embedding and head agree"
            )
        before, after = self._read(self.base, names[0]), self.read_tuned(names[0])
        rows = min(len(before), len(after))
        changed = int((before[:rows] != after[:rows]).any(axis=1).sum())
        warnings.warn(
            f"{quoted(self.tuned.directory)} has {len(after)} tokens, the base {len(before)}: "
            f"{' and '.join(names)} are saved whole ({changed} of the first {rows} rows of "
            f"{names[0]} changed)",
            stacklevel=4,
        )

    def _key(self, file: Checkpoint, name: str) -> str | None:
        keys = self._base_keys if file is self.base else self._tuned_keys
        if name == HEAD_WEIGHT and name not in keys and self.described.tied:
            name = f"{self.described.embedding}.weight"
        return keys.get(name)

    def _shape(self, file: Checkpoint, name: str) -> tuple[int, ...] | None:
        key = self._key(file, name)
        return None if key is None else file.shape(key)

    def _read(self, file: Checkpoint, name: str, dtype: Any = None) -> Array:
        key = self._key(file, name)
        assert key is not None  # __init__ has found it
        return file.read(key, dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in the base."""
        shape = self._shape(self.base, name)
        assert shape is not None
        return shape

    def read_tuned(self, name: str, dtype: Any = None) -> Array:
        """A tensor of the tuned model."""
        return self._read(self.tuned, name, dtype)

    def is_tied(self) -> bool:
        """Whether embedding and head have one weight, before and after tuning."""
        embedding = f"{self.described.embedding}.weight"
        if not self.described.tied or self._key(self.tuned, embedding) is None:
            return False
        if self._key(self.tuned, HEAD_WEIGHT) == self._key(self.tuned, embedding):
            return True
        tuned = self.read_tuned(embedding)
        return np.array_equal(tuned, self.read_tuned(HEAD_WEIGHT), equal_nan=True)

    def changes(self) -> _Changes:
        """What differs. ConfigError if no weight of a linear layer does."""
        changed = self.changed_modules()
        tied = self.is_tied() and self.described.embedding in changed
        if tied:
            changed.pop(HEAD, None)  # the same change of the one weight
        linear = [path for path in changed if self.is_linear(path, changed[path])]
        if not linear:
            raise ConfigError(
                f"no weight of a linear layer of {self.tuned.directory!r} differs from the "
                "base's, and an adapter needs one"
            )
        biases = [f"{path}.bias" for path in linear if f"{path}.bias" in self.names]
        is_changed = [name in changed[name.removesuffix(".bias")] for name in biases]
        if not any(is_changed):
            biases = []
        whole = [path for path in changed if path not in linear]
        return _Changes(linear, whole, biases, tied)

    def changed_modules(self) -> dict[str, list[str]]:
        """The names of the tensors that differ, by the paths of their modules."""
        changed: dict[str, list[str]] = {}
        for name in self.names:
            key, tuned_key = self._key(self.base, name), self._key(self.tuned, name)
            assert key is not None  # __init__ has found both
            assert tuned_key is not None
            if not are_equal(self.base, key, self.tuned, tuned_key):
                self.base.require_floats([key])
                self.tuned.require_floats([tuned_key])
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

    def is_linear(self, path: str, names: Sequence[str]) -> bool:
        """Whether the module is a linear layer whose weight is among the changed `names`."""
        weight = f"{path}.weight"
        is_matrix = weight in names and len(self.shape(weight)) == 2
        return is_matrix and path.rpartition(".")[2] not in NOT_TARGETS

    def spectrum(self, path: str, biased: bool) -> Spectrum:
        """The spectrum of the difference of a linear layer's weight.

        biased   whether biases are saved: a layer of rank 0 would lose its bias
        """
        weight = f"{path}.weight"
        key = self._key(self.tuned, weight)
        assert key is not None  # as in _read
        W = self.tuned.read_bits(key)
        noise = rounding_noise(W)
        if is_stored_transposed(self.described.model_type, weight):
            W = W.T
        least = int(biased and f"{path}.bias" in self.names)
        return matrix_spectrum(W.shape, lambda: self.difference(weight), least, noise)


def rounding_noise(W: Array) -> float:
    """An estimate of the largest singular value of the rounding errors of a stored weight W (O, I).

    W   floats, or uint16 for bfloat16

    A rounding error is uniform in [-ulp / 2, ulp / 2] and has the variance ulp^2 / 12. The largest
    singular value of a matrix of independent errors is about the root of the largest sum of
    variances of a row, plus that of a column (Latala 2005).
    """
    rows = np.zeros(len(W))
    columns = np.zeros(W.shape[1])
    for at in row_blocks(W.shape):
        block = widen(W[at])
        ulp = np.spacing(np.abs(block)).astype(np.float64)
        if W.dtype == np.uint16:
            ulp *= 2.0**16  # bfloat16 is the upper half of a float32
        variance = ulp * ulp / 12
        rows[at] = variance.sum(axis=1)
        columns += variance.sum(axis=0)
    return float(np.sqrt(rows.max()) + np.sqrt(columns.max()))


# ---- a plain LoRA adapter ----


def head_factors(tensors: Tensors, embedding: str) -> Tensors:
    """The factors, by key, of a head tied to the layer `embedding`: that layer's, transposed."""
    A, B = (tensors[key] for key in factor_keys(embedding, embeds=True))
    head_A, head_B = factor_keys(HEAD)
    return {head_A: np.ascontiguousarray(B.T), head_B: np.ascontiguousarray(A.T)}


def _tied_embedding(file: AdapterFile) -> str | None:
    """The embedding whose factors the head has, too, transposed; None if they differ."""
    path = next((name for name in FIRST_EMBEDDINGS if name in file.layers), None)
    if path is None or HEAD not in file.layers or not file.config.ensure_weight_tying:
        return None
    return path if are_transposed(file.part(path), file.part(HEAD)) else None


def factor_tensors(path: str, A: Array, B: Array, embeds: bool = False) -> Tensors:
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


def rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of adapter_config.json that give each layer its rank, and s = 1.

    If ranks differ, both patterns have all full names, the longest first, because a pattern also
    matches the names that end in it.
    """
    fields = plain_fields(max(ranks.values()))
    if len(set(ranks.values())) > 1:
        pattern = {path: ranks[path] for path in sorted(ranks, key=lambda path: (-len(path), path))}
        fields |= {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return fields


def target_name(path: str, has_weight: bool) -> str:
    """The name of a layer in target_modules: its path, or its last part if the file has its weight.

    PEFT looks for the base's weight in an adapter's file only if the target is the last part.
    """
    return path.rpartition(".")[2] if has_weight else path


def _write(out: str | Path, source: str | Path, config: dict[str, Any], tensors: Tensors) -> None:
    LoraConfig.from_dict(config, str(source))  # so that what is written can be read
    with new_folder(out, {"source": fingerprint(source)}) as stage:
        write_adapter(stage, config, tensors)
