"""Several adapters -> one, from files alone: what they add to a model, added up, as another adapter's folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import ConfigError, FormatError
from ..formats import write_adapter
from ..formats.disk import quoted
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import LoraConfig
from ..lora.combining import check_weights, choose_rank, combine_layer
from ..lora.files import AdapterFile
from ..lora.names import EMBEDDING, LINEAR, PREFIX
from ..lora.plan import FIRST_EMBEDDINGS, HEAD
from .factoring import OWN_OF_ADALORA, plain
from .merging import Term, alike, require_addable, terms
from .rewriting import Row

Array = np.ndarray


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    how: str = "cat",
    r: int | None = None,
) -> list[Row]:
    """Write the sum of `adapters` of PEFT's, times `weights` (1), as one plain LoRA adapter to the folder `out`.

    how     "cat", the sum itself; "svd", the nearest of rank r (by default the largest of theirs); or "linear", PEFT's
            sum of factors, which has cross terms: see lora/combining.py

    Every layer that one of them has gets one rank, and s = 1; ranks below it are filled up with zeros. AdaLoRA's E goes
    into the factors. What replaces tensors of the base (copied modules, biases, tokens) stays as it is where only one
    adapter does that, and so does DoRA's m where it stands alone. Other fields are those of the first adapter. Returns
    a row a layer, in the order of names: |dW| of the sum, how far from it the new one is, and that over |dW|.

    ConfigError for what cannot be added up, as in `merging.merge`, or is no way or rank; FormatError where adapters are
    of different bases; NonFiniteError, OSError; `out` is then as it was.
    """
    weights = check_weights(adapters, weights, "--weights")
    for folder in adapters:
        require_outside(out, adapter=folder)
    with ExitStack() as opened:
        files = [opened.enter_context(AdapterFile(folder)) for folder in adapters]
        plan: dict[str, list[Term]] = {}
        for file, weight in zip(files, weights, strict=True):
            for name, term in terms(file, weight).items():
                plan.setdefault(name, []).append(term)
        for name, own in plan.items():
            require_addable(name, own)
        layers = {own[0].path: own for _, own in sorted(plan.items()) if own[0].path}
        _check(files, layers)
        bases = {str(file.raw.get("base_model_name_or_path") or "") for file in files} - {""}
        if len(bases) > 1:  # names of one model may differ, so it is no error
            named = ", ".join(map(quoted, sorted(bases)))
            warnings.warn(
                f"the adapters name different bases, and a sum is for one model: {named}"[:500],
                stacklevel=2,
            )
        ranks = {path: [_shape(t, "A")[0] for t in own] for path, own in layers.items()}
        r = choose_rank(ranks, how, r)
        tensors = {t.key: t.adapter.file.read(t.key) for own in plan.values() for t in own if t.key}
        rows: dict[str, Row] = {}
        for path, own in tqdm(
            layers.items(), desc="combine", unit=" layers", disable=None, leave=False
        ):
            parts = [term.part()._replace(m=None) for term in own]
            A, B, rows[path] = combine_layer(path, parts, how, r)
            tensors |= {_key(path, own, "A"): A, _key(path, own, "B"): B, **_others(path, own)}
        tied = _tied(layers)
        if tied is not None:  # the head has the embedding's factors, turned, to the bit
            for part, other in ("AB", "BA"):
                turned = tensors[_key(tied, layers[tied], other)].T
                tensors[_key(HEAD, layers[HEAD], part)] = np.ascontiguousarray(turned)
        config = {**_fields(files, layers), "ensure_weight_tying": tied is not None, **plain(r)}
    LoraConfig.from_dict(config, str(out))  # what is written can be read
    inputs = {
        "adapters": [fingerprint(folder) for folder in adapters],
        "weights": weights,
        "how": how,
        "r": r,
    }
    with new_folder(out, inputs) as stage:
        write_adapter(stage, config, tensors)
    return [*rows.values()]


def _check(files: Sequence[AdapterFile], layers: dict[str, list[Term]]) -> None:
    """Everything that does not go together as a whole, though no tensor is in the way of another, raises here."""
    if not layers:
        raise ConfigError(
            f"{', '.join(file.where for file in files)}: no layer is adapted, there is nothing to add up"
        )
    for path, own in layers.items():
        sizes = [(_shape(t, "B")[0], _shape(t, "A")[1], t.adapter.embeds(path)) for t in own]
        if len(set(sizes)) > 1:
            there = ", ".join(f"({O}, {I})" + " of an embedding" * embeds for O, I, embeds in sizes)
            raise FormatError(
                f"{own[-1].adapter.where}: {path} is another layer than the other adapters': {there}"
            )
    for file in files:
        if file.config.use_dora and len(files) > 1:
            raise ConfigError(
                f"{file.where}: DoRA's scales cannot be added to another adapter, which has none"
            )
        more = [path for path in layers if path not in file.layers]
        if file.config.bias != "none" and more:
            raise ConfigError(
                f"{file.where} trains the biases of its own layers, and none of {more[0]}"
            )
    tokens = [file for file in files if file.tokens]
    if len(tokens) > 1:
        raise ConfigError(
            f"{tokens[1].where}: only one adapter can have trainable tokens, {tokens[0].where} has some"
        )


def _shape(term: Term, part: str) -> tuple[int, ...]:
    return term.adapter.file.shape(term.adapter.layers[term.path][part])


def _key(path: str, own: list[Term], part: str) -> str:
    """The key of a factor in plain LoRA's file."""
    return f"{PREFIX}{path}.{(EMBEDDING if own[0].adapter.embeds(path) else LINEAR)[part]}"


def _others(path: str, own: list[Term]) -> dict[str, Array]:
    """What files hold of a layer besides its factors: DoRA's m, and the weight of a targeted embedding or head."""
    found: dict[str, Array] = {}
    for term in own:
        for part, key in term.adapter.layers[path].items():
            array = term.adapter.file.read(key) if part in ("m", "base") else None
            if array is not None and not np.array_equal(
                found.setdefault(key, array), array, equal_nan=True
            ):
                raise FormatError(
                    f"{term.adapter.where}: {path}.base_layer.weight is not the others': another base"
                )
    return found


def _tied(layers: dict[str, list[Term]]) -> str | None:
    """The embedding whose adapters the head has, too, turned; None if that is not so of every one of them."""
    path = next((name for name in FIRST_EMBEDDINGS if name in layers), None)
    if path is None or HEAD not in layers or len(layers[path]) != len(layers[HEAD]):
        return None
    pairs = zip(layers[path], layers[HEAD], strict=True)
    return (
        path
        if all(t.adapter.config.ensure_weight_tying and alike(t, other) for t, other in pairs)
        else None
    )


def _fields(files: Sequence[AdapterFile], layers: dict[str, list[Term]]) -> dict[str, Any]:
    """adapter_config.json, but for rank and scaling: the first adapter's, meaning exactly these layers."""
    configs = [file.config for file in files]
    saved = {name for config in configs for name in config.modules_to_save or ()}
    # In full; but where a file has the base's weight besides, PEFT would not look for it under another name than this.
    whole = {
        path for path, own in layers.items() if any("base" in t.adapter.layers[path] for t in own)
    }
    return {
        **{name: value for name, value in files[0].raw.items() if name not in OWN_OF_ADALORA},
        "target_modules": sorted(
            path.rpartition(".")[2] if path in whole else path for path in layers
        ),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "modules_to_save": sorted(saved) or None,
        "bias": next((config.bias for config in configs if config.bias != "none"), "none"),
        "fan_in_fan_out": any(config.fan_in_fan_out for config in configs),
        "trainable_token_indices": next(
            (f.config.trainable_token_indices for f in files if f.tokens), None
        ),
    }
