"""What a configuration means for a model: found out and checked whole, before the first layer is touched.

Everything that a user can get wrong about targets raises here and names what there is; what is allowed but hardly
meant warns. Names are matched by targets.py; this room knows modules.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..formats.checkpoint import is_stored_transposed
from ..nn import Embedding, Linear, LinearBase, Module
from .adalora import AdaLoraAdapter, AdaLoraConfig
from .config import DEFAULT_TARGETS, LoraConfig
from .dora import DoraAdapter
from .embedding import (
    DoraEmbeddingAdapter,
    EmbeddingAdapter,
    LoraEmbedding,
    OneHot,
    embedding_and_head,
    is_tied,
    unwrap,
)
from .hydra import HydraAdapter, HydraConfig
from .layer import LoraLinear, SavedModule, Wrapper
from .lora import LoraAdapter
from .targets import in_layers, matches, pattern_value
from .tokens import TokenRows, TrainableTokens

PREFIX = "base_model.model."  # of every name in PEFT's files
# By peft_type; a relative of LoRA is one line here. DoRA goes by LoRA's name, and use_dora tells: see adapter_class.
ADAPTERS: dict[str, type[LoraAdapter]] = {
    "LORA": LoraAdapter,
    "ADALORA": AdaLoraAdapter,
    "HYDRALORA": HydraAdapter,
}
CONFIGS: dict[str, type[LoraConfig]] = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "HYDRALORA": HydraConfig,
}
TENSORS = {
    *AdaLoraAdapter.TENSORS,
    *DoraEmbeddingAdapter.TENSORS,
    *HydraAdapter.TENSORS,
    *TokenRows.TENSORS,
}
BARE = {"lora_magnitude_vector"}  # in files without the ".weight" that it has in PEFT's models
TOKENS = "token_adapter.trainable_tokens_delta"
NAMES = (
    "embed_tokens",
    "lm_head",
)  # an embedding and a head, as PEFT knows them by the last part of a path
Modules = dict[str, Any]  # by path


class Plan(NamedTuple):
    """Layers to adapt and modules to copy, by path, and the configuration with its targets resolved.

    tokens   embeddings and heads of which some rows are trained, by path, and which rows
    follows  the path of a head whose weight is the embedding's, and which goes by what is done there; and that path
    """

    targets: dict[str, LinearBase]
    saved: dict[str, Module]
    config: LoraConfig
    tokens: dict[str, tuple[Any, list[int]]]
    follows: tuple[str, str] | None

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """The keys of the adapter's file, and the shapes there."""
        found: dict[str, tuple[int, ...]] = {}
        follower = self.follows and self.follows[0]
        for path, base in self.targets.items():
            kind = adapter_class(self.config, base)
            r, more = (
                self.config.rank(path),
                [self.config.experts] if isinstance(self.config, HydraConfig) else [],
            )
            for name, shape in kind.shapes(base, r, *more).items() if path != follower else ():
                found[f"{PREFIX}{path}.{name}{'' if name in BARE else kind.SUFFIX}"] = shape
            if self.config.bias != "none" and base.bias is not None:
                found[f"{PREFIX}{path}.base_layer.bias"] = base.bias.shape
        for path, module in self.saved.items():
            for name, p in module.named_parameters() if path != follower else ():
                key = f"{PREFIX}{path}.{name}"
                found[key] = (
                    p.shape[::-1] if is_stored_transposed(model.config.model_type, key) else p.shape
                )
        for path, (module, rows) in self.tokens.items():
            found[f"{PREFIX}{path}.{TOKENS}"] = (len(rows), module.weight.shape[1])
        for path, module in _inside(model).items() if self.config.bias == "all" else ():
            bias = vars(module).get("bias")
            if bias is not None and path not in self.targets:
                found[f"{PREFIX}{path}.bias"] = bias.shape
        return found


def read_config(fields: dict[str, Any], where: str) -> LoraConfig:
    """The configuration that an adapter_config.json holds, of whichever kind it says. ConfigError as from_dict's."""
    kind = fields.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ConfigError(
            f"{where}: peft_type must be {' or '.join(map(repr, CONFIGS))}, got {kind!r}"[:500]
        )
    return CONFIGS[kind].from_dict(fields, where)


def adapter_class(config: LoraConfig, base: Any = None) -> type[LoraAdapter]:
    """What `config` puts on a layer."""
    if isinstance(base, OneHot):
        return DoraEmbeddingAdapter if config.use_dora else EmbeddingAdapter
    return DoraAdapter if config.use_dora else ADAPTERS[config.peft_type]


def plan_adapter(model: Any, config: LoraConfig, keys: Container[str] = ()) -> Plan:
    """The layers that `config` means in `model`, which may have adapters already. ConfigError for what does not fit.

    keys   those of the file that the adapter is read from: they, too, say whether a tied head goes by its embedding
    """
    config = dataclasses.replace(config)
    modules = _inside(model)
    tie = _tied_paths(model, modules)
    follows = tie if config.ensure_weight_tying and _tie(config, tie, keys) else None
    saved = _saved(modules, config)
    linear = {
        p: m for p, m in modules.items() if isinstance(m, LinearBase) and not _within(p, saved)
    }
    found = _targets(model, modules, linear, saved, config)
    for path, module in found.items():
        if isinstance(module, Embedding) and config.peft_type == "LORA":
            found[path] = OneHot(module)
        elif path not in linear:
            raise ConfigError(
                f"target {path} is a {type(module).__name__}, not a linear layer; {_candidates(linear)}"
            )
    if follows:
        _follow(config, *follows, modules, found, saved)
    for path, module in saved.items():
        if any(p.fixed for p in module.parameters()):
            raise ConfigError(
                f"modules_to_save: {path} is quantised, or held in sixteen bits: it cannot be trained"
            )
    tokens, token_head = _tokens(model, modules, config, tie, {*found, *saved})
    there = {p: type(m) for p, m in wrappers(model)}
    kinds = {p: LoraEmbedding if isinstance(m, OneHot) else LoraLinear for p, m in found.items()}
    rows = dict.fromkeys([*tokens, *(token_head or ())], TrainableTokens)
    both: dict[str, type] = {**there, **kinds, **dict.fromkeys(saved, SavedModule), **rows}
    for path, kind in both.items():
        if there.get(path, kind) is not kind or any(p.startswith(path + ".") for p in both):
            raise ConfigError(
                f"{path} cannot be saved whole and also be adapted, nor be adapted and have trainable tokens, nor hold "
                "what is"
            )
    _check_head(dict(wrappers(model)), token_head, tokens)
    on_linear = [p for p in found if kinds[p] is LoraLinear]
    fan_in_fan_out = config.fan_in_fan_out  # PEFT's: of the last layer
    if on_linear:
        fan_in_fan_out = is_stored_transposed(model.config.model_type, f"{on_linear[-1]}.weight")
    _warn(config, found, fan_in_fan_out)
    config.fan_in_fan_out = fan_in_fan_out
    return Plan(found, saved, config, tokens, follows or token_head)


def wrappers(model: Module) -> Iterator[tuple[str, Wrapper]]:
    """(path, wrapper) of every module that adapters stand in for."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Wrapper))


def _saved(modules: Modules, config: LoraConfig) -> dict[str, Module]:
    # PEFT's rule for these is another than for targets: "norm" also ends "input_layernorm".
    names = config.modules_to_save or []
    unused = [n for n in names if not any(path.endswith(n) for path in modules)]
    if unused:
        raise ConfigError(
            f"modules_to_save: {_listed(unused)} match nothing; {_candidates(modules)}"[:500]
        )
    return {p: m for p, m in modules.items() if p.endswith(tuple(names))}


def _targets(
    model: Any, modules: Modules, linear: Modules, saved: Modules, config: LoraConfig
) -> Modules:
    """The modules that target_modules, exclude_modules and layers_to_transform leave; sets config.target_modules."""
    targets = config.target_modules
    if targets is None:
        kind = model.config.model_type
        if kind not in DEFAULT_TARGETS:
            raise ConfigError(f"target_modules must be given for a model of type {kind!r}")
        config.target_modules = targets = list(DEFAULT_TARGETS[kind])
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    whole: list[str] = []  # names given in full stay whatever their layer, as in PEFT
    if everything:
        head = unwrap(model.get_output_embeddings())
        found = {p: m for p, m in linear.items() if m is not head}
    else:
        found = {
            p: m for p, m in modules.items() if p and matches(p, targets) and not _within(p, saved)
        }
    if isinstance(targets, list):
        whole = targets
        # PEFT's files of "all-linear" name also what is inside a module that is saved whole: that is no mistake.
        unused = [
            t
            for t in targets
            if not any(matches(path, [t]) for path in (modules if found else ()) if path)
        ]
        if unused:  # a name that means nothing is a typing mistake, and says so
            raise ConfigError(
                f"target_modules: {_listed(unused)} match nothing; {_candidates(linear)}"
            )
    chosen = config.layers_to_transform, config.layers_pattern
    found = {p: m for p, m in found.items() if p in whole or in_layers(p, *chosen)}
    if config.exclude_modules:
        kept = {p: m for p, m in found.items() if not matches(p, config.exclude_modules)}
        if len(kept) == len(found):
            warnings.warn(
                f"exclude_modules {config.exclude_modules!r:.200} excludes nothing", stacklevel=6
            )
        found = kept
    if not found:
        asked = [("target_modules", targets)]
        asked += [
            (name, getattr(config, name)) for name in ("layers_to_transform", "exclude_modules")
        ]
        said = ", ".join(f"{name} {value!r:.120}" for name, value in asked if value is not None)
        raise ConfigError(f"no target is left: {said} match nothing; {_candidates(linear)}")
    if everything:
        config.target_modules = sorted(found)  # PEFT's files name them one by one
    return found


def _tied_paths(model: Any, modules: Modules) -> tuple[str, str] | None:
    """The paths of the head and of the embedding, if they have one weight."""
    embedding, head = map(unwrap, embedding_and_head(model))
    paths = {id(m): p for p, m in modules.items()}
    known = id(head) in paths and id(embedding) in paths and is_tied(model)
    return (paths[id(head)], paths[id(embedding)]) if known else None


def _tie(config: LoraConfig, tie: tuple[str, str] | None, keys: Container[str]) -> bool:
    """Does `ensure_weight_tying` concern this adapter? The embedding then takes the head's place in the configuration.

    PEFT's rules: it does if a name ends in one of NAMES. Files that it wrote without such a name say it by their keys.
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
            named = names.lower() != "all-linear" and any(matches(name, names) for name in NAMES)
            ending = "|^" + embedding.replace(".", r"\.") + "$)"
            if named and not names.endswith(ending):  # of a file it has it already
                setattr(config, field, f"(?:{names}{ending}")
        else:
            named = (
                any(n.rpartition(".")[2] in NAMES for n in names or ())
                or f"{PREFIX}{head}.{key}" in keys
            )
            if named:
                others = [n for n in names or () if not matches(head, [n])]
                setattr(config, field, list(dict.fromkeys([*others, embedding])))
        if named and done:
            raise ConfigError(
                "ensure_weight_tying: the embedding and the head are to be adapted or saved, not both"
            )
        done |= named
    if not done:
        warnings.warn(
            f"ensure_weight_tying: no target and no module to save ends in {' or '.join(NAMES)}",
            stacklevel=5,
        )
    return done


def _follow(
    config: LoraConfig, head: str, embedding: str, modules: Modules, found: Modules, saved: Modules
) -> None:
    """Let the head be adapted or saved as the embedding is."""
    if embedding in saved:
        saved[head] = modules[head]
        return
    found.pop(head, None)
    if embedding not in found:
        raise ConfigError(
            f"ensure_weight_tying: {embedding} is no target, and so {head} cannot go by it"
        )
    found[head] = modules[head]  # the last one, as in PEFT
    if config.use_dora:
        raise ConfigError(
            f"ensure_weight_tying with use_dora: {embedding} and {head} would be scaled apart"
        )
    if (config.rank(head), config.scaling(head)) != (
        config.rank(embedding),
        config.scaling(embedding),
    ):
        raise ConfigError(
            f"ensure_weight_tying: {head} must have the rank and the lora_alpha of {embedding}"
        )


def _tokens(
    model: Any,
    modules: Modules,
    config: LoraConfig,
    tie: tuple[str, str] | None,
    taken: Container[str],
) -> tuple[dict[str, tuple[Any, list[int]]], tuple[str, str] | None]:
    """Of which modules some rows are trained, and which; and the head that goes by the embedding, by PEFT's rules."""
    wanted, found = config.trainable_token_indices, {}
    if wanted is None:
        return {}, None
    own = unwrap(model.get_input_embeddings())
    for name, rows in wanted.items() if isinstance(wanted, dict) else [(None, wanted)]:
        paths = [p for p, m in modules.items() if (m is own if name is None else p.endswith(name))]
        if not paths:
            raise ConfigError(
                f"trainable_token_indices: {name!r:.99} matches nothing; {_candidates(modules)}"[
                    :500
                ]
            )
        for path in paths:
            module = modules[path]
            if not isinstance(module, (Embedding, Linear)):
                raise ConfigError(
                    f"trainable_token_indices: {path} is a {type(module).__name__}, not an embedding"
                )
            if max(rows) >= len(module.weight):
                raise ConfigError(
                    f"trainable_token_indices: {path} has no row {max(rows)}, only {len(module.weight)}"
                )
            found[path] = (module, rows)
    head, embedding = tie or ("", "")
    follows = embedding in found
    if follows and head in found and found[head][1] != found[embedding][1]:
        if config.ensure_weight_tying:
            raise ConfigError(
                f"ensure_weight_tying: {head} and {embedding} must have the same trainable tokens"
            )
        follows = False
    if follows:
        found.pop(head, None)
    for path in [*found, head] if follows else found:
        if path in taken:
            raise ConfigError(
                f"trainable_token_indices: {path} is a target or a module to save already"
            )
    return found, (head, embedding) if follows else None


def _check_head(
    there: dict[str, Wrapper], follows: tuple[str, str] | None, tokens: Container[str]
) -> None:
    """ConfigError if the head would go by the embedding for one adapter, and by itself for another."""
    for head, wrapper in there.items():
        if isinstance(wrapper, TrainableTokens):
            path = next((p for p, m in there.items() if p != head and wrapper.follows(m)), None)
            if (head in tokens and path) or (follows and follows[0] == head and path != follows[1]):
                raise ConfigError(
                    f"{head} has trainable tokens of its own in one adapter, and the embedding's in another"
                )


def _warn(config: LoraConfig, found: Modules, fan_in_fan_out: bool) -> None:
    """Say what is allowed but hardly meant."""
    notes = []
    if config.fan_in_fan_out and not fan_in_fan_out:
        notes.append(
            "fan_in_fan_out is for layers whose files hold W as (in, out); these do not: set to False"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(
            config, name
        ):  # a pattern; in AdaLoRA's rank_pattern the name of a layer's lora_E
            named = key.removesuffix(".lora_E") in found
            if not named and not any(pattern_value(path, {key: True}, False) for path in found):
                notes.append(f"{name}: {key!r:.200} matches no target")
    above = [
        p
        for p, layer in found.items()
        if config.rank(p) > min(layer.in_features, layer.out_features)
    ]
    if above:
        full = min(found[above[0]].in_features, found[above[0]].out_features)
        notes.append(f"{above[0]}: r = {config.rank(above[0])} is above the full rank {full}")
    for note in notes:
        warnings.warn(note, stacklevel=6)


def _inside(model: Module) -> Modules:
    """The model as it was without adapters: what a wrapper holds stands at the wrapper's own path."""
    inside = {*LoraLinear.ATTRIBUTES, *SavedModule.ATTRIBUTES}
    return {
        path: unwrap(m) for path, m in model.named_modules() if not inside & set(path.split("."))
    }


def _within(path: str, saved: Modules) -> bool:
    return any(path == p or path.startswith(p + ".") for p in saved)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))[:200]


def _candidates(modules: Modules) -> str:
    return "there is " + ", ".join(sorted({p.rpartition(".")[2] for p in modules if p}))
