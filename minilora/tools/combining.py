"""One adapter from several, by files alone: the sum of their updates in another folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, shorten
from ..formats import write_adapter
from ..formats.disk import quoted
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import LoraConfig
from ..lora.combining import (
    OF_ANY_RANK,
    check_way,
    check_weights,
    combine_terms,
    common_rank,
    sum_layer,
)
from ..lora.factors import Part, Term, cat, rounding_error
from ..lora.files.adapter import AdapterFile, require_single_adapter
from ..lora.files.repeats import is_weight_of_base
from ..lora.names import factor_keys
from ..lora.pruning import Pruning
from ..lora.ranks import (
    RankRule,
    Spectrum,
    check_rank_rule,
    choose_ranks,
    factors_spectrum,
    matrix_spectrum,
    rule_text,
)
from ..lora.targets.base import FIRST_EMBEDDINGS, HEAD
from .factoring import ADALORA_FIELDS, Tensors, head_factors, rank_fields, target_name
from .merging import Change, Changes, alike, changes_of, require_addable
from .rewriting import Row, progress


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    how: str = "cat",
    r: int | None = None,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    initial: str | Path | None = None,
    base_is: str | None = None,
) -> list[Row]:
    """Write the sum of PEFT `adapters`, times `weights` (1), as one plain LoRA adapter to the
    folder `out`.

    how     "cat", the sum itself; "svd", the nearest of rank r (by default the largest of theirs);
            "linear", PEFT's sum of factors, which has cross terms; or the nearest to a pruned sum,
            "ties", "dare_linear", "dare_ties" or "magnitude_prune": see lora/combining.py
    density, majority_sign_method, seed   options of the pruned sums: see lora/pruning.py
    energy, error, budget   choose a rank for each layer in place of r: see lora/ranks.py
    initial, base_is   for a single adapter: see AdapterFile

    All adapted layers get one rank (unless ranks are chosen), and s = 1; zeros fill up lower ranks.
    AdaLoRA's E is multiplied into the factors. Replaced tensors of the base (copied modules,
    biases, tokens) stay as they are if only one adapter has them, and so does the m of a single
    DoRA adapter. Other fields are those of the first adapter. Returns one row per layer, sorted by
    name: |dW| of the sum, the distance of the new dW from it, and that distance over |dW|.

    ConfigError for what cannot be added up, as in `merging.merge`, or for an invalid `how` or `r`;
    FormatError for adapters of different bases; NonFiniteError, OSError. After an error `out` is as
    it was.
    """
    weights = check_weights(adapters, weights, "--weights")
    options = {"density": density, "majority_sign_method": majority_sign_method, "seed": seed}
    pruning = check_way(how, r, len(adapters), **options)
    rule = check_rank_rule(r, energy, error, budget, required=False)
    if rule.is_adaptive and how not in OF_ANY_RANK:
        raise ConfigError(
            f"{rule_text(rule)} chooses ranks of {', '.join(OF_ANY_RANK)}, not of {how}: "
            "leave it out, or use svd"
        )
    for folder in adapters:
        require_outside(out, adapter=folder)
    with ExitStack() as opened:
        start = {
            "initial": require_single_adapter(adapters, "--initial", initial),
            "base_is": require_single_adapter(adapters, "--base-is", base_is),
        }
        files = [opened.enter_context(AdapterFile(folder, **start)) for folder in adapters]
        for file in files:
            file.require_factors("combine")
        plan, layers = _group_changes(files, weights)
        _check_together(files, layers)
        _warn_of_several_bases(files)
        ranks = {path: [_shape(c, "A")[0] for c in changes] for path, changes in layers.items()}
        r = common_rank(ranks, how, r)
        tied = _tied_embedding(layers)
        chosen = dict.fromkeys(layers, r)
        if rule.is_adaptive:
            chosen = _choose_ranks(files, layers, pruning, rule, tied)
        tensors = _copied_tensors(files, plan)
        summed, rows = _sum_layers(files, layers, how, chosen, pruning)
        tensors |= summed
        layers = {path: changes for path, changes in layers.items() if chosen[path]}
        if tied in layers:
            tensors |= head_factors(tensors, tied)
        config = _fields(files, layers)
        config["ensure_weight_tying"] = tied in layers or any(map(_saves_one_weight, files))
        config |= rank_fields({path: chosen[path] for path in layers})
    LoraConfig.from_dict(config, str(out))  # so that what is written can be read
    sources = [fingerprint(folder) for folder in adapters]
    inputs: dict[str, Any] = {"adapters": sources, "weights": weights, "how": how, "r": r}
    inputs |= {**options, "rule": rule._asdict(), "base_is": base_is}
    inputs["initial"] = None if initial is None else fingerprint(initial)
    with new_folder(out, inputs) as stage:
        write_adapter(stage, config, tensors)
    return rows


def _group_changes(
    files: Sequence[AdapterFile], weights: Sequence[float]
) -> tuple[Changes, Changes]:
    """(all changes by the name of the base's tensor, those that add to a layer by its path)."""
    plan: Changes = {}
    for file, weight in zip(files, weights, strict=True):
        for name, change in changes_of(file, weight).items():
            plan.setdefault(name, []).append(change)
    layers: Changes = {}
    for name, changes in sorted(plan.items()):
        require_addable(name, changes)
        if changes[0].path:
            layers[changes[0].path] = changes
    return plan, layers


def _warn_of_several_bases(files: Sequence[AdapterFile]) -> None:
    """Warn if the adapters name different bases; one model may have two names."""
    bases = {str(file.raw.get("base_model_name_or_path") or "") for file in files} - {""}
    if len(bases) > 1:
        names = ", ".join(map(quoted, sorted(bases)))
        text = f"the adapters name different bases, and a sum is for one model: {names}"
        warnings.warn(shorten(text), stacklevel=3)


def _check_together(files: Sequence[AdapterFile], layers: Changes) -> None:
    """ConfigError or FormatError for adapters that cannot be one, although their tensors can."""
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


def _terms(files: Sequence[AdapterFile], changes: Sequence[Change]) -> list[Term]:
    """The update of one layer by each adapter, with the adapter's weight and number."""
    terms = []
    for change in changes:
        part = change.adapter.part(change.path)._replace(m=None)
        terms.append(Term(part, change.weight, list(files).index(change.adapter)))
    return terms


def _copied_tensors(files: Sequence[AdapterFile], plan: Changes) -> Tensors:
    """The tensors that stay as they are, by key: those that replace the base's, or repeat it."""
    tensors: Tensors = {}
    for changes in plan.values():
        for change in changes:
            if change.key:
                tensors[change.key] = change.adapter.file.read(change.key)
    for file in files:  # copies of the base's tensors, which also give the vocabulary
        tensors |= {key: file.file.read(key) for key in file.of_base}
    return tensors


def _sum_layers(
    files: Sequence[AdapterFile],
    layers: Changes,
    how: str,
    ranks: Mapping[str, int],
    pruning: Pruning | None,
) -> tuple[Tensors, list[Row]]:
    """(the tensors of each layer's sum by key, rows of the report); no tensors at rank 0."""
    tensors: Tensors = {}
    rows = []
    for path in progress(layers, "combine"):
        changes = layers[path]
        A, B, row = combine_terms(path, _terms(files, changes), how, ranks[path], pruning)
        rows.append(row)
        if ranks[path]:
            key_A, key_B = _keys(path, changes)
            tensors |= {key_A: A, key_B: B}
            tensors |= _other_tensors(path, changes)
    return tensors, rows


def _choose_ranks(
    files: Sequence[AdapterFile],
    layers: Changes,
    pruning: Pruning | None,
    rule: RankRule,
    tied: str | None,
) -> dict[str, int]:
    """The rank of each layer by `rule`; a head that is tied to an embedding has the embedding's.

    A layer that has more than factors (DoRA's m, a bias, the weight of a targeted embedding) gets
    at least rank 1, because these would be lost with the layer.
    """
    spectra = {}
    for path, changes in layers.items():
        if tied is not None and path == HEAD:
            continue
        more = any(set(change.adapter.layers[path]) - {"A", "B", "E"} for change in changes)
        biased = any(change.adapter.config.bias != "none" for change in changes)
        shape = _shape(changes[0], "B")[0], _shape(changes[0], "A")[1]
        spectra[path] = _spectrum(path, files, changes, pruning, shape, int(more or biased))
    ranks = choose_ranks(spectra, rule)
    if tied is not None:
        ranks[HEAD] = ranks[tied]
    return ranks


def _spectrum(
    path: str,
    files: Sequence[AdapterFile],
    changes: Sequence[Change],
    pruning: Pruning | None,
    shape: tuple[int, int],
    least: int,
) -> Spectrum:
    """The spectrum of one layer's sum; only a pruned sum is formed for it."""
    terms = _terms(files, changes)
    total = Part(*cat([term.weighted() for term in terms]), 1.0)
    if pruning is None:
        return factors_spectrum(total, least)
    noise = rounding_error(total.A, total.B)

    def form() -> np.ndarray:
        """The sum (O, I); its factors are read again, so that no layer's stay in memory."""
        return sum_layer(path, _terms(files, changes), pruning)[0]

    return matrix_spectrum(shape, form, least, noise)


def _shape(change: Change, part: str) -> tuple[int, ...]:
    """The shape of the factor "A" or "B"."""
    return change.adapter.file.shape(change.adapter.layers[change.path][part])


def _keys(path: str, changes: list[Change]) -> tuple[str, str]:
    """The keys of a layer's A and B."""
    return factor_keys(path, changes[0].adapter.embeds(path))


def _other_tensors(path: str, changes: list[Change]) -> Tensors:
    """DoRA's m, and the weight of a targeted embedding or head, by key, if an adapter has them."""
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
    """Whether the adapter saves an embedding and the head tied to it whole, as one weight."""
    return file.config.ensure_weight_tying and f"{HEAD}.weight" in file.replaced


def _tied_embedding(layers: Changes) -> str | None:
    """The embedding whose updates the head has, too, transposed, in every adapter; or None."""
    path = next((name for name in FIRST_EMBEDDINGS if name in layers), None)
    if path is None or HEAD not in layers or len(layers[path]) != len(layers[HEAD]):
        return None
    for embedding, head in zip(layers[path], layers[HEAD], strict=True):
        if not (embedding.adapter.config.ensure_weight_tying and alike(embedding, head)):
            return None
    return path


def _fields(files: Sequence[AdapterFile], layers: Changes) -> dict[str, Any]:
    """The fields of adapter_config.json for these layers, without rank and scaling."""
    targets = []
    for path, changes in layers.items():
        has_weight = any("base" in change.adapter.layers[path] for change in changes)
        targets.append(target_name(path, has_weight))
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
