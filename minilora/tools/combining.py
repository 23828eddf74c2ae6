"""Several adapters -> one, from files alone: the sum of what they add to a model, as another
adapter's folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, shorten
from ..formats import write_adapter
from ..formats.disk import quoted
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import LoraConfig
from ..lora.combining import check_weights, choose_rank, combine_layer
from ..lora.files import AdapterFile
from ..lora.plan import FIRST_EMBEDDINGS, HEAD
from ..lora.repeats import is_weight_of_base
from .factoring import ADALORA_FIELDS, Tensors, factor_keys, head_factors, plain
from .merging import Change, Changes, alike, changes_of, require_addable
from .rewriting import Row, progress


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    how: str = "cat",
    r: int | None = None,
) -> list[Row]:
    """Write the sum of PEFT `adapters`, times `weights` (1), as one plain LoRA adapter to the
    folder `out`.

    how     "cat", the sum itself; "svd", the nearest of rank r (by default the largest of theirs);
            or "linear", PEFT's sum of factors, which has cross terms: see lora/combining.py

    Every layer that one of them has gets one rank, and s = 1; zeros fill up lower ranks. AdaLoRA's
    E goes into the factors. What replaces tensors of the base (copied modules, biases, tokens)
    stays as it is if only one adapter does that, and so does the m of a single DoRA adapter. Other
    fields are those of the first adapter. Returns one row per layer, sorted by name: |dW| of the
    sum, how far the new dW is from it, and that distance over |dW|.

    ConfigError for what cannot be added up, as in `merging.merge`, or for an invalid `how` or `r`;
    FormatError for adapters of different bases; NonFiniteError, OSError; `out` is then as it was.
    """
    weights = check_weights(adapters, weights, "--weights")
    for folder in adapters:
        require_outside(out, adapter=folder)
    with ExitStack() as opened:
        files = [opened.enter_context(AdapterFile(folder)) for folder in adapters]
        for file in files:
            file.require_factors("combine")
        plan: Changes = {}
        for file, weight in zip(files, weights, strict=True):
            for name, change in changes_of(file, weight).items():
                plan.setdefault(name, []).append(change)
        layers: Changes = {}  # by path, where the adapters add to a layer
        for name, changes in sorted(plan.items()):
            require_addable(name, changes)
            if changes[0].path:
                layers[changes[0].path] = changes
        _check_together(files, layers)
        bases = {str(file.raw.get("base_model_name_or_path") or "") for file in files} - {""}
        if len(bases) > 1:  # not an error, because one model may have several names
            names = ", ".join(map(quoted, sorted(bases)))
            text = f"the adapters name different bases, and a sum is for one model: {names}"
            warnings.warn(shorten(text), stacklevel=2)
        ranks = {path: [_shape(c, "A")[0] for c in changes] for path, changes in layers.items()}
        r = choose_rank(ranks, how, r)
        tensors: Tensors = {}
        for changes in plan.values():
            for change in changes:
                if change.key:
                    tensors[change.key] = change.adapter.file.read(change.key)
        for file in files:  # what is of the base says for which vocabulary the adapter is
            tensors |= {key: file.file.read(key) for key in file.of_base}
        rows = []
        for path in progress(layers, "combine"):
            changes = layers[path]
            parts = [change.part()._replace(m=None) for change in changes]
            A, B, row = combine_layer(path, parts, how, r)
            key_A, key_B = _keys(path, changes)
            tensors |= {key_A: A, key_B: B}
            tensors |= _other_tensors(path, changes)
            rows.append(row)
        tied = _tied_embedding(layers)
        if tied is not None:
            tensors |= head_factors(tensors, tied)
        config = _fields(files, layers)
        is_tied = tied is not None or any(map(_saves_one_weight, files))
        config |= {"ensure_weight_tying": is_tied, **plain(r)}
    LoraConfig.from_dict(config, str(out))  # so that what is written can be read
    sources = [fingerprint(folder) for folder in adapters]
    inputs = {"adapters": sources, "weights": weights, "how": how, "r": r}
    with new_folder(out, inputs) as stage:
        write_adapter(stage, config, tensors)
    return rows


def _check_together(files: Sequence[AdapterFile], layers: Changes) -> None:
    """Raise for adapters that do not go together, although each tensor's changes can be added."""
    if not layers:
        names = ", ".join(file.where for file in files)
        raise ConfigError(f"{names}: no layer is adapted, so nothing can be added up")
    for path, changes in layers.items():
        sizes = []
        for change in changes:
            kind = " of an embedding" if change.adapter.embeds(path) else ""
            sizes.append(f"({_shape(change, 'B')[0]}, {_shape(change, 'A')[1]}){kind}")
        if len(set(sizes)) > 1:
            where = changes[-1].adapter.where
            raise FormatError(
                f"{where}: {path} is another layer than the other adapters': {', '.join(sizes)}"
            )
    for file in files:
        if file.config.use_dora and len(files) > 1:
            raise ConfigError(
                f"{file.where}: DoRA's scales cannot be added to another adapter, which has none"
            )
        more = [path for path in layers if path not in file.layers]
        if file.config.bias != "none" and more:
            raise ConfigError(
                f"{file.where} trains the biases of its layers, but does not adapt {more[0]}"
            )
    tokens = [file.where for file in files if file.tokens]
    if len(tokens) > 1:
        raise ConfigError(
            f"{tokens[1]}: only one adapter can have trainable tokens, {tokens[0]} has some"
        )


def _shape(change: Change, part: str) -> tuple[int, ...]:
    """The shape of the factor "A" or "B"."""
    return change.adapter.file.shape(change.adapter.layers[change.path][part])


def _keys(path: str, changes: list[Change]) -> tuple[str, str]:
    return factor_keys(path, changes[0].adapter.embeds(path))


def _other_tensors(path: str, changes: list[Change]) -> Tensors:
    """The tensors of a layer besides its factors: DoRA's m, and the weight of a targeted embedding
    or head."""
    tensors: Tensors = {}
    for change in changes:
        file = change.adapter.file
        for part, key in change.adapter.layers[path].items():
            if part not in ("m", "base"):
                continue
            first = tensors.setdefault(key, file.read(key))
            if not is_weight_of_base(file, key, first):
                raise FormatError(
                    f"{change.adapter.where}: {path}.base_layer.weight differs from another "
                    "adapter's: combine adapters of one base"
                )
    return tensors


def _saves_one_weight(file: AdapterFile) -> bool:
    """Does the adapter save an embedding and the head that is tied to it whole, as one weight?"""
    return file.config.ensure_weight_tying and f"{HEAD}.weight" in file.replaced


def _tied_embedding(layers: Changes) -> str | None:
    """The embedding whose adapters the head has, too, transposed; None if one adapter differs
    there."""
    path = next((name for name in FIRST_EMBEDDINGS if name in layers), None)
    if path is None or HEAD not in layers or len(layers[path]) != len(layers[HEAD]):
        return None
    for embedding, head in zip(layers[path], layers[HEAD], strict=True):
        if not (embedding.adapter.config.ensure_weight_tying and alike(embedding, head)):
            return None
    return path


def _fields(files: Sequence[AdapterFile], layers: Changes) -> dict[str, Any]:
    """adapter_config.json without rank and scaling: the first adapter's, with exactly these
    layers."""
    targets = []
    for path, changes in layers.items():
        # PEFT looks for a base weight in an adapter's file only if the target is the last name.
        has_weight = any("base" in change.adapter.layers[path] for change in changes)
        targets.append(path.rpartition(".")[2] if has_weight else path)
    configs = [file.config for file in files]
    saved = {name for config in configs for name in config.modules_to_save or ()}
    tokens = [file.config.trainable_token_indices for file in files if file.tokens] or [None]
    biases = [config.bias for config in configs if config.bias != "none"] or ["none"]
    fields = {name: value for name, value in files[0].raw.items() if name not in ADALORA_FIELDS}
    return {
        **fields,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "target_modules": sorted(targets),
        "modules_to_save": sorted(saved) or None,
        "bias": biases[0],
        "fan_in_fan_out": any(config.fan_in_fan_out for config in configs),
        "trainable_token_indices": tokens[0],
    }
