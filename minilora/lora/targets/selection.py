"""The modules of a base that each field of a configuration means.

    find_saved     modules_to_save
    find_targets   target_modules, exclude_modules, layers_to_transform
    find_tokens    trainable_token_indices
    replace_head   ensure_weight_tying, before these: the embedding takes the head's place,
    add_head       and after them: the head has what the embedding has

A name that matches nothing is an error with the candidates. Rules for names are in rules.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Container, Mapping

from ...errors import ConfigError
from ..config import DEFAULT_TARGETS, LoraConfig
from ..maps import MapConfig
from ..names import ENDS, PREFIX
from .base import Base, Layer
from .rules import Layers, Targets, matches

SHORTENED = 20  # PEFT replaces so many names by endings, which layers_to_transform applies to


def replace_head(config: LoraConfig, tie: tuple[str, str] | None, keys: Container[str]) -> bool:
    """Put the embedding in the head's place in the configuration; False if that has neither.

    PEFT's rule: `ensure_weight_tying` concerns an adapter if a name ends in one of ENDS. Files
    written without such a name show it by their keys.
    """
    if tie is None:
        warnings.warn(
            "ensure_weight_tying: the embedding and the head have weights of their own",
            stacklevel=5,
        )
        return False
    head, embedding = tie
    done = False
    for field, key in (("modules_to_save", "weight"), ("target_modules", "lora_A.weight")):
        names = getattr(config, field)
        if isinstance(names, str):
            named = names.lower() != "all-linear" and any(matches(name, names) for name in ENDS)
            ending = "|^" + embedding.replace(".", r"\.") + "$)"
            if named and not names.endswith(ending):  # which the pattern of a file has already
                setattr(config, field, f"(?:{names}{ending}")
        else:
            names = names or []
            named = any(name.rpartition(".")[2] in ENDS for name in names)
            named = named or f"{PREFIX}{head}.{key}" in keys
            if named:
                others = [name for name in names if not matches(head, [name])]
                setattr(config, field, list(dict.fromkeys([*others, embedding])))
        if named and done:
            raise ConfigError(
                "ensure_weight_tying: the embedding and the head must be adapted or saved, not both"
            )
        done |= named
    if not done:
        warnings.warn(
            f"ensure_weight_tying: no target and no module to save ends in {' or '.join(ENDS)}",
            stacklevel=5,
        )
    return done


def find_saved(
    layers: Mapping[str, Layer], config: LoraConfig, notes: list[str] | None
) -> dict[str, Layer]:
    """The modules that modules_to_save means.

    `notes` gets the names that mean none; if it is None, they raise.
    """
    # PEFT's rule for these differs from that for targets: "norm" also ends "input_layernorm".
    names = Targets(config.modules_to_save or [], anywhere=True)
    unused = [name for name, paths in names.group(layers).items() if not paths]
    if unused and notes is not None:
        notes.append(f"modules_to_save: {_quote(unused)} match nothing in this base")
    elif unused:
        raise ConfigError(f"modules_to_save: {_quote(unused)} match nothing; {candidates(layers)}")
    return {path: layer for path, layer in layers.items() if names.mean(path)}


def find_targets(
    base: Base,
    linear: Mapping[str, Layer],
    saved: Container[str],
    config: LoraConfig,
    keys: Collection[str],
    notes: list[str],
) -> dict[str, Layer]:
    """The layers that target_modules, exclude_modules and layers_to_transform leave.

    Sets config.target_modules.
    """
    if config.target_modules is None:
        config.target_modules = _default_targets(base, config, linear, keys)
        if config.target_modules is None:
            return {}
    targets = config.target_modules
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    if all_linear:
        chosen = {path: layer for path, layer in linear.items() if path not in (base.head, "")}
    else:
        chosen = _named_targets(base, linear, saved, targets, notes if keys else None)
    chosen = _keep_numbered_layers(chosen, config)
    chosen = _leave_out_excluded(chosen, config)
    if not chosen:
        given = f"target_modules {targets!r:.120}"
        for field in ("layers_to_transform", "exclude_modules"):
            value = getattr(config, field)
            if value is not None:
                given += f", {field} {value!r:.120}"
        raise ConfigError(f"no target is left: {given} match nothing; {candidates(linear)}")
    if all_linear:
        config.target_modules = sorted(chosen)  # PEFT's files name them one by one
    return chosen


def _default_targets(
    base: Base, config: LoraConfig, linear: Mapping[str, Layer], keys: Collection[str]
) -> list[str] | None:
    """The method's targets for this type of model; None for a file of trained tokens alone."""
    tokens_alone = bool(keys) and not any(".lora_" in key for key in keys)
    if config.trainable_token_indices is not None and tokens_alone:
        return None
    choices = DEFAULT_TARGETS
    if isinstance(config, MapConfig) and config.TARGETS:
        choices = dict(config.TARGETS)
    if base.model_type not in choices:
        raise ConfigError(
            f"target_modules must be given for a model of type {base.model_type!r}; "
            f"{candidates(linear)}"
        )
    return list(choices[base.model_type])


def _named_targets(
    base: Base,
    linear: Mapping[str, Layer],
    saved: Container[str],
    targets: str | list[str],
    notes: list[str] | None,
) -> dict[str, Layer]:
    """The layers that `targets` means, without those inside saved modules.

    `notes` gets names that match nothing, if others match; if it is None, they raise.
    """
    wanted = Targets(targets)
    chosen = {}
    for path, layer in base.layers.items():
        if path != "" and wanted.mean(path) and not is_within(path, saved):
            chosen[path] = layer
    if isinstance(targets, str):
        return chosen
    # PEFT's files of "all-linear" also name what is inside a saved module, which is right.
    paths = [path for path in base.layers if path] if chosen else []
    unused = [name for name, matched in wanted.group(paths).items() if not matched]
    # A file may have names for several kinds of model; its tensors say what it adapts.
    if unused and notes is not None and chosen:
        notes.append(f"target_modules: {_quote(unused)} match nothing in this base")
    elif unused:
        raise ConfigError(f"target_modules: {_quote(unused)} match nothing; {candidates(linear)}")
    return chosen


def _keep_numbered_layers(chosen: dict[str, Layer], config: LoraConfig) -> dict[str, Layer]:
    """The layers that layers_to_transform leaves. Full names stay in any layer, as in PEFT."""
    targets = config.target_modules
    full_names = set(targets) if isinstance(targets, list) else set()
    layers = Layers(config.layers_to_transform, config.layers_pattern)
    outside = {path for path in chosen if not layers.contain(path)}
    if len(full_names) >= SHORTENED and outside & full_names:
        raise ConfigError(
            f"layers_to_transform {config.layers_to_transform!r:.120} leaves out "
            f"{min(outside & full_names)}, which target_modules names in full: with {SHORTENED} "
            "names or more PEFT might keep it or not, so leave one of the two out"
        )
    return {p: layer for p, layer in chosen.items() if p in full_names or p not in outside}


def _leave_out_excluded(chosen: dict[str, Layer], config: LoraConfig) -> dict[str, Layer]:
    """The layers that exclude_modules leaves. Warns if it excludes none."""
    if not config.exclude_modules:
        return chosen
    excluded = Targets(config.exclude_modules)
    remaining = {p: layer for p, layer in chosen.items() if not excluded.mean(p)}
    if len(remaining) == len(chosen):
        text = f"exclude_modules {config.exclude_modules!r:.200} excludes nothing"
        warnings.warn(text, stacklevel=7)
    return remaining


def add_head(
    config: LoraConfig,
    head: str,
    embedding: str,
    layers: Mapping[str, Layer],
    targets: dict[str, Layer],
    saved: dict[str, Layer],
) -> None:
    """Add the head to `targets` or `saved`, wherever the embedding is."""
    if embedding in saved:
        saved[head] = layers[head]
        return
    targets.pop(head, None)
    if embedding not in targets:
        raise ConfigError(
            f"ensure_weight_tying: {embedding} is not a target, so {head} cannot follow it; "
            "add it to target_modules"
        )
    targets[head] = layers[head]  # the last one, as in PEFT
    if config.use_dora:
        raise ConfigError(
            f"ensure_weight_tying with use_dora: {embedding} and {head} would be scaled apart; "
            "use one of the two options"
        )
    same_rank = config.rank(head) == config.rank(embedding)
    if not same_rank or config.scaling(head) != config.scaling(embedding):
        raise ConfigError(
            f"ensure_weight_tying: {head} must have the rank and the lora_alpha of {embedding}"
        )


def find_tokens(
    base: Base, config: LoraConfig, tie: tuple[str, str] | None, taken: Container[str]
) -> tuple[dict[str, list[int]], tuple[str, str] | None]:
    """The rows that are trained, by module, and (head, embedding) if the head follows."""
    where = "trainable_token_indices"
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}, None
    rows_of = []
    if not isinstance(wanted, dict):
        if not base.embedding:
            raise ConfigError(
                f"{where} as a list needs a model that says where its embedding is: define "
                "get_input_embeddings(), or give a dictionary from a module's name to its rows"
            )
        rows_of.append((base.embedding, wanted))
    else:
        meant = Targets(wanted, anywhere=True).group(base.layers)
        for name, rows in wanted.items():
            paths = meant[name]
            if not paths:
                raise ConfigError(
                    f"{where}: {name!r:.99} matches nothing; {candidates(base.layers)}"
                )
            rows_of += [(path, rows) for path in paths]
    for path, rows in rows_of:
        layer = base.layers[path]
        if not layer.shape:
            raise ConfigError(f"{where}: {path} is a {layer.kind}, not an embedding")
        if max(rows) >= layer.shape[0]:
            raise ConfigError(f"{where}: {path} has no row {max(rows)}, only {layer.shape[0]}")
    tokens = dict(rows_of)
    head, embedding = tie or ("", "")
    follows = embedding in tokens
    if follows and tokens.get(head, tokens[embedding]) != tokens[embedding]:
        if config.ensure_weight_tying:
            raise ConfigError(
                f"ensure_weight_tying: {head} and {embedding} must have the same trainable tokens"
            )
        follows = False
    if follows:
        tokens.pop(head, None)
    for path in [*tokens, head] if follows else tokens:
        if path in taken:
            raise ConfigError(
                f"{where}: {path} is a target or a module to save already; choose one"
            )
    return tokens, (head, embedding) if follows else None


def is_within(path: str, saved: Container[str]) -> bool:
    """Is the module `path` one of `saved`, or inside one?"""
    while path and path not in saved:
        path = path.rpartition(".")[0]
    return path != ""


def _quote(names: list[str]) -> str:
    return ", ".join(map(repr, names))[:200]


def candidates(layers: Mapping[str, Layer]) -> str:
    names = sorted({path.rpartition(".")[2] for path in layers if path})
    return f"choose from {', '.join(names)}"
