"""Plan an adapter: which layers a configuration means, checked whole before the first layer is touched.

A plan is made over a `Base`, the list of a model's modules with their kinds and shapes. A model in
memory gives that list (`describe_model`), and so does the header of a checkpoint
(`describe_checkpoint`): get_peft_model, load_adapter, merge and inspect all plan alike. Whatever a
user can get wrong about targets raises here and names the candidates; what is allowed but hardly
meant warns. Rules for names are in targets.py.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError, shorten
from ..formats import Checkpoint
from ..formats.checkpoint import BUFFERS, is_stored_transposed
from ..nn import Embedding, LinearBase, Module, Parameter
from .adalora import AdaLoraAdapter, AdaLoraConfig
from .config import DEFAULT_TARGETS, LoraConfig
from .dora import DoraAdapter
from .embedding import DoraEmbeddingAdapter, EmbeddingAdapter, LoraEmbedding
from .hydra import HydraAdapter, HydraConfig
from .layer import LoraLinear, SavedModule, Wrapper
from .lora import LoraAdapter
from .targets import in_layers, matches, pattern_value
from .tokens import TokenRows, TrainableTokens
from .tying import embedding_and_head, is_tied, unwrap

PREFIX = "base_model.model."  # of every name in PEFT's files
# By peft_type; a relative of LoRA is one line here. DoRA has LoRA's peft_type: see adapter_class.
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
ENDS = (
    "embed_tokens",
    "lm_head",
)  # an embedding and a head, as PEFT knows them by a path's last part
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "wpe",
)  # modules that a checkpoint's header shows as embeddings
FIRST_EMBEDDINGS = ("model.embed_tokens", "transformer.wte")  # that of the tokens, by its path
HEAD = "lm_head"


# ---- a base model as a plan sees it -----------------------------------------------------------


class Layer(NamedTuple):
    """A module of the base.

    kind    "linear", "embedding" or, for everything without a matrix, the name of its class
    shape   the weight's: (O, I) of a linear layer, (V, C) of an embedding; () of anything else
    bias    O, or None without a bias
    fixed   can its parameters not be trained?
    """

    kind: str
    shape: tuple[int, ...] = ()
    bias: int | None = None
    fixed: bool = False

    @property
    def in_features(self) -> int:
        return self.shape[0] if self.kind == "embedding" else self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.kind == "embedding" else self.shape[0]


@dataclasses.dataclass(frozen=True)
class Base:
    """The modules of a base model by path, as it is without adapters.

    parameters        the shape of each parameter, as a model holds it
    embedding, head   their paths; "" if there is none
    tied              do embedding and head share one weight?
    """

    model_type: str
    layers: dict[str, Layer]
    parameters: dict[str, tuple[int, ...]]
    embedding: str
    head: str
    tied: bool

    def below(self, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the parameters of the module `path` and of those inside it."""
        for name, shape in self.parameters.items():
            if name.startswith(path + "."):
                yield name, shape


def describe_model(model: Any) -> Base:
    """The base of a model in memory, whatever adapters it has already."""
    modules = modules_inside(model)
    paths = {id(module): path for path, module in modules.items()}
    layers, parameters = {}, {}
    for path, module in modules.items():
        own = {name: p for name, p in vars(module).items() if isinstance(p, Parameter)}
        layers[path] = _layer(module, any(p.fixed for p in module.parameters()))
        for name, p in own.items():
            parameters[f"{path}.{name}" if path else name] = tuple(p.shape)
    embedding, head = (paths.get(id(unwrap(m)), "") for m in embedding_and_head(model))
    tied = bool(embedding and head) and is_tied(model)
    return Base(model.config.model_type, layers, parameters, embedding, head, tied)


def _layer(module: Module, fixed: bool) -> Layer:
    if isinstance(module, Embedding):
        return Layer("embedding", tuple(module.weight.shape), None, fixed)
    if isinstance(module, LinearBase):
        bias = None if module.bias is None else len(module.bias)
        return Layer("linear", (module.out_features, module.in_features), bias, fixed)
    bias = vars(module).get("bias")
    return Layer(type(module).__name__, (), None if bias is None else len(bias), fixed)


def describe_checkpoint(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Base:
    """The base that a checkpoint's header and config.json describe; no tensor is read."""
    model_type = str(config.get("model_type"))
    parameters: dict[str, tuple[int, ...]] = {}
    for key in checkpoint.keys():
        if not key.endswith(BUFFERS):
            shape = checkpoint.shape(key)
            name = canonical_name(model_type, key)
            parameters[name] = shape[::-1] if is_stored_transposed(model_type, key) else shape
    head = f"{HEAD}.weight"
    embedding = next((p for p in FIRST_EMBEDDINGS if f"{p}.weight" in parameters), "")
    tied = bool(config.get("tie_word_embeddings", model_type == "gpt2"))
    if head not in parameters and embedding:
        tied = True
        parameters[head] = parameters[f"{embedding}.weight"]
    layers: dict[str, Layer] = {}
    for name in parameters:
        path = name.rpartition(".")[0]
        while path and path not in layers:
            layers[path] = _header_layer(path, parameters)
            path = path.rpartition(".")[0]
    return Base(model_type, layers, parameters, embedding, HEAD if head in parameters else "", tied)


def _header_layer(path: str, parameters: Mapping[str, tuple[int, ...]]) -> Layer:
    shape = parameters.get(f"{path}.weight", ())
    bias = parameters.get(f"{path}.bias")
    if len(shape) != 2:
        return Layer("module", (), None if bias is None else bias[0])
    kind = "embedding" if path.rpartition(".")[2] in EMBEDDINGS else "linear"
    return Layer(kind, shape, None if bias is None else bias[0])


def canonical_name(model_type: str, key: str) -> str:
    """A checkpoint's key as models and adapters name it: GPT-2's files may lack the prefix."""
    if model_type != "gpt2" or key.startswith(HEAD):
        return key
    return f"transformer.{key.removeprefix('transformer.')}"


# ---- the plan ---------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Layers to adapt, modules to copy and tokens to train, by path, and the resolved configuration.

    saved     modules that are trained whole, as copies
    tokens    embeddings and heads of which some rows are trained, and which rows
    follows   (head, embedding): the head has what the embedding has, because their weight is one
    """

    base: Base
    targets: dict[str, Layer]
    saved: dict[str, Layer]
    config: LoraConfig
    tokens: dict[str, list[int]]
    follows: tuple[str, str] | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The keys of the adapter's file, and the shapes there."""
        shapes: dict[str, tuple[int, ...]] = {}
        follower = self.follows and self.follows[0]
        experts = [self.config.experts] if isinstance(self.config, HydraConfig) else []
        for path, layer in self.targets.items():
            if path != follower:
                kind = adapter_class(self.config, layer)
                tensors = kind.shapes(layer, self.config.rank(path), *experts)
                for name, shape in tensors.items():
                    suffix = "" if name in BARE else kind.SUFFIX
                    shapes[f"{PREFIX}{path}.{name}{suffix}"] = shape
            if self.config.bias != "none" and layer.bias is not None:
                shapes[f"{PREFIX}{path}.base_layer.bias"] = (layer.bias,)
        for path in self.saved:
            for name, shape in self.base.below(path) if path != follower else ():
                stored = is_stored_transposed(self.base.model_type, name)
                shapes[PREFIX + name] = shape[::-1] if stored else shape
        for path, rows in self.tokens.items():
            shapes[f"{PREFIX}{path}.{TOKENS}"] = (len(rows), self.base.layers[path].shape[1])
        if self.config.bias == "all":
            for path, layer in self.base.layers.items():
                if layer.bias is not None and path not in self.targets:
                    shapes[f"{PREFIX}{path}.bias"] = (layer.bias,)
        return shapes


def read_config(fields: dict[str, Any], where: str) -> LoraConfig:
    """The configuration that an adapter_config.json holds, of whichever kind it says. ConfigError as from_dict's."""
    kind = fields.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ConfigError(
            f"{where}: peft_type must be {' or '.join(map(repr, CONFIGS))}, got {kind!r:.100}"
        )
    return CONFIGS[kind].from_dict(fields, where)


def adapter_class(config: LoraConfig, layer: Layer | None = None) -> type[LoraAdapter]:
    """The class of adapter that `config` puts on a layer."""
    if layer is not None and layer.kind == "embedding":
        return DoraEmbeddingAdapter if config.use_dora else EmbeddingAdapter
    return DoraAdapter if config.use_dora else ADAPTERS[config.peft_type]


def plan_adapter(
    base: Base, config: LoraConfig, keys: Collection[str] = (), warn: bool = True
) -> Plan:
    """The layers that `config` means in `base`. ConfigError for what does not fit.

    keys   those of the file that the adapter is read from; they too say whether a tied head follows
           its embedding, and whether an adapter has tokens alone
    warn   about what is allowed but hardly meant
    """
    config = dataclasses.replace(config)
    tie = (base.head, base.embedding) if base.tied else None
    follows = tie if config.ensure_weight_tying and _tie(config, tie, keys) else None
    saved = _saved(base.layers, config)
    linear = {
        path: layer
        for path, layer in base.layers.items()
        if layer.kind == "linear" and not _within(path, saved)
    }
    targets = _targets(base, linear, saved, config, keys)
    for path, layer in targets.items():
        adaptable = layer.kind == "embedding" and config.peft_type == "LORA"
        if not adaptable and path not in linear:
            raise ConfigError(
                f"target {path} is not a linear layer but of kind {layer.kind}; "
                f"{_candidates(linear)}"
            )
    if follows:
        _follow(config, *follows, base.layers, targets, saved)
    for path, layer in saved.items():
        if layer.fixed:
            raise ConfigError(
                f"modules_to_save: {path} is quantised or in 16 bits and cannot be trained; "
                "choose a base that is not, or leave it out"
            )
    tokens, token_head = _tokens(base, config, tie, {*targets, *saved})
    fan_in_fan_out = config.fan_in_fan_out  # PEFT's value is that of the last layer
    on_linear = [path for path, layer in targets.items() if layer.kind == "linear"]
    if on_linear:
        fan_in_fan_out = is_stored_transposed(base.model_type, f"{on_linear[-1]}.weight")
    if warn:
        _warn(config, targets, fan_in_fan_out)
    config.fan_in_fan_out = fan_in_fan_out
    return Plan(base, targets, saved, config, tokens, follows or token_head)


def check_wrapped(model: Module, plan: Plan) -> None:
    """ConfigError if the plan and the adapters that `model` has already need one module in two ways."""
    present = dict(wrappers(model))
    kinds: dict[str, type] = {path: type(wrapper) for path, wrapper in present.items()}
    wanted: dict[str, type] = {
        path: LoraEmbedding if layer.kind == "embedding" else LoraLinear
        for path, layer in plan.targets.items()
    }
    wanted |= dict.fromkeys(plan.saved, SavedModule)
    token_head = plan.follows if plan.tokens and plan.follows else ()
    wanted |= dict.fromkeys([*plan.tokens, *token_head], TrainableTokens)
    both = {**kinds, **wanted}
    for path, kind in both.items():
        if kinds.get(path, kind) is not kind or any(p.startswith(path + ".") for p in both):
            raise ConfigError(
                f"{path} cannot be saved whole and also be adapted, nor be adapted and have trainable "
                "tokens, nor contain a module that is: choose one of them"
            )
    for head, wrapper in present.items():
        if isinstance(wrapper, TrainableTokens):
            leader = next((p for p, m in present.items() if wrapper.leader is m), None)
            to_follow = dict([token_head] if token_head else []).get(head)
            if (head in plan.tokens and leader) or (to_follow and leader != to_follow):
                raise ConfigError(
                    f"{head} has its own trainable tokens in one adapter and the embedding's in another: "
                    "use the same in both"
                )


def wrappers(model: Module) -> Iterator[tuple[str, Wrapper]]:
    """(path, wrapper) of every module that holds adapters."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Wrapper))


def _saved(layers: Mapping[str, Layer], config: LoraConfig) -> dict[str, Layer]:
    # PEFT's rule for these differs from that for targets: "norm" also ends "input_layernorm".
    names = config.modules_to_save or []
    unused = [n for n in names if not any(path.endswith(n) for path in layers)]
    if unused:
        raise ConfigError(
            f"modules_to_save: {_listed(unused)} match nothing; {_candidates(layers)}"
        )
    return {path: layer for path, layer in layers.items() if path.endswith(tuple(names))}


def _targets(
    base: Base,
    linear: Mapping[str, Layer],
    saved: Container[str],
    config: LoraConfig,
    keys: Collection[str],
) -> dict[str, Layer]:
    """The layers that target_modules, exclude_modules and layers_to_transform leave; sets config.target_modules."""
    targets = config.target_modules
    if targets is None:
        tokens_alone = bool(keys) and not any(".lora_" in key for key in keys)
        if config.trainable_token_indices is not None and tokens_alone:
            return {}
        if base.model_type not in DEFAULT_TARGETS:
            raise ConfigError(
                f"target_modules must be given for a model of type {base.model_type!r}; "
                f"{_candidates(linear)}"
            )
        config.target_modules = targets = list(DEFAULT_TARGETS[base.model_type])
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    if everything:
        chosen = {path: layer for path, layer in linear.items() if path != base.head}
    else:
        chosen = {
            path: layer
            for path, layer in base.layers.items()
            if path and matches(path, targets) and not _within(path, saved)
        }
    if isinstance(targets, list):
        # PEFT's files of "all-linear" also name what is inside a saved module: that is no mistake.
        names = base.layers if chosen else ()
        unused = [t for t in targets if not any(matches(path, [t]) for path in names if path)]
        if unused:
            raise ConfigError(
                f"target_modules: {_listed(unused)} match nothing; {_candidates(linear)}"
            )
    whole = targets if isinstance(targets, list) else []  # full names stay in any layer, as in PEFT
    where = config.layers_to_transform, config.layers_pattern
    chosen = {p: layer for p, layer in chosen.items() if p in whole or in_layers(p, *where)}
    excluded = config.exclude_modules
    if excluded:
        remaining = {p: layer for p, layer in chosen.items() if not matches(p, excluded)}
        if len(remaining) == len(chosen):
            warnings.warn(f"exclude_modules {excluded!r:.200} excludes nothing", stacklevel=6)
        chosen = remaining
    if not chosen:
        fields: dict[str, Any] = {"target_modules": targets}
        fields["layers_to_transform"] = config.layers_to_transform
        fields["exclude_modules"] = excluded
        given = ", ".join(f"{k} {v!r:.120}" for k, v in fields.items() if v is not None)
        raise ConfigError(f"no target is left: {given} match nothing; {_candidates(linear)}")
    if everything:
        config.target_modules = sorted(chosen)  # PEFT's files name them one by one
    return chosen


def _tie(config: LoraConfig, tie: tuple[str, str] | None, keys: Container[str]) -> bool:
    """Does `ensure_weight_tying` concern this adapter? The embedding then replaces the head in the configuration.

    PEFT's rule: it does if a name ends in one of ENDS. Files written without such a name show it by their keys.
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
            if named and not names.endswith(ending):  # of a file it has it already
                setattr(config, field, f"(?:{names}{ending}")
        else:
            named = (
                any(n.rpartition(".")[2] in ENDS for n in names or ())
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
            f"ensure_weight_tying: no target and no module to save ends in {' or '.join(ENDS)}",
            stacklevel=5,
        )
    return done


def _follow(
    config: LoraConfig,
    head: str,
    embedding: str,
    layers: Mapping[str, Layer],
    targets: dict[str, Layer],
    saved: dict[str, Layer],
) -> None:
    """Let the head be adapted or saved as the embedding is."""
    if embedding in saved:
        saved[head] = layers[head]
        return
    targets.pop(head, None)
    if embedding not in targets:
        raise ConfigError(
            f"ensure_weight_tying: {embedding} is not a target, so {head} cannot follow it; add it to "
            "target_modules"
        )
    targets[head] = layers[head]  # the last one, as in PEFT
    if config.use_dora:
        raise ConfigError(
            f"ensure_weight_tying with use_dora: {embedding} and {head} would be scaled apart; "
            "use one of the two options"
        )
    of_head = config.rank(head), config.scaling(head)
    if of_head != (config.rank(embedding), config.scaling(embedding)):
        raise ConfigError(
            f"ensure_weight_tying: {head} must have the rank and the lora_alpha of {embedding}"
        )


def _tokens(
    base: Base, config: LoraConfig, tie: tuple[str, str] | None, taken: Container[str]
) -> tuple[dict[str, list[int]], tuple[str, str] | None]:
    """The modules of which some rows are trained, and those rows; and (head, embedding) if the head follows."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}, None
    tokens: dict[str, list[int]] = {}
    for name, rows in wanted.items() if isinstance(wanted, dict) else [(None, wanted)]:
        paths = [base.embedding] if name is None else [p for p in base.layers if p.endswith(name)]
        if not paths:
            raise ConfigError(
                f"trainable_token_indices: {name!r:.99} matches nothing; {_candidates(base.layers)}"
            )
        for path in paths:
            layer = base.layers[path]
            if not layer.shape:
                raise ConfigError(
                    f"trainable_token_indices: {path} is a {layer.kind}, not an embedding"
                )
            if max(rows) >= layer.shape[0]:
                raise ConfigError(
                    f"trainable_token_indices: {path} has no row {max(rows)}, only {layer.shape[0]}"
                )
            tokens[path] = rows
    head, embedding = tie or ("", "")
    follows = embedding in tokens
    if follows and head in tokens and tokens[head] != tokens[embedding]:
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
                f"trainable_token_indices: {path} is a target or a module to save already; choose one"
            )
    return tokens, (head, embedding) if follows else None


def _warn(config: LoraConfig, targets: Mapping[str, Layer], fan_in_fan_out: bool) -> None:
    """Warn about what is allowed but hardly meant."""
    notes = []
    if config.fan_in_fan_out and not fan_in_fan_out:
        notes.append(
            "fan_in_fan_out is for layers whose files store W as (in, out); these do not: set to False"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            # AdaLoRA's rank_pattern has the names of lora_E, every other one is a pattern.
            named = key.removesuffix(".lora_E") in targets
            if not named and not any(pattern_value(path, {key: True}, False) for path in targets):
                notes.append(f"{name}: {key!r:.200} matches no target")
    for path, layer in targets.items():
        full = min(layer.shape)
        if config.rank(path) > full:
            notes.append(f"{path}: r = {config.rank(path)} is above the full rank {full}")
            break
    for note in notes:
        warnings.warn(shorten(note), stacklevel=6)


def modules_inside(model: Module) -> dict[str, Any]:
    """The model's modules by path as it was without adapters: a wrapper's path is that of its inner module."""
    inside = {*LoraLinear.ATTRIBUTES, *SavedModule.ATTRIBUTES}
    return {
        path: unwrap(m) for path, m in model.named_modules() if not inside & set(path.split("."))
    }


def _within(path: str, saved: Container[str]) -> bool:
    """Is the module `path` one of `saved`, or inside one?"""
    parts = path.split(".")
    return any(".".join(parts[:i]) in saved for i in range(1, len(parts) + 1))


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))[:200]


def _candidates(layers: Mapping[str, Layer]) -> str:
    names = sorted({path.rpartition(".")[2] for path in layers if path})
    return f"choose from {', '.join(names)}"
