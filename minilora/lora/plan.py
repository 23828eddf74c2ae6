"""Plan an adapter: find the layers that a configuration means, before the first layer is changed.

A plan is made over a `Base`, the list of a model's modules with their kinds and shapes. A model in
memory gives that list (`describe_model`), and so does the header of a checkpoint
(`describe_checkpoint`): get_peft_model, load_adapter, merge and inspect all plan alike. Whatever a
user can get wrong about targets raises here and names the candidates; what is allowed but hardly
meant warns. Rules for names are in targets.py.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Collection, Container, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import ConfigError, Rule, check_fields, is_flag, shorten
from ..formats import Checkpoint
from ..formats.checkpoint import BUFFERS, are_equal, is_stored_transposed
from ..nn import Embedding, LinearBase, Module, Parameter
from .config import DEFAULT_TARGETS, LoraConfig
from .embedding import LoraEmbedding
from .hydra import HydraConfig
from .layer import LoraLinear, SavedModule, Wrapper
from .maps import Map, MapConfig
from .names import ENDS, PREFIX, TOKENS, adapter_class, file_key
from .targets import Layers, Patterns, Targets, matches
from .tokens import TrainableTokens
from .tying import embedding_and_head, is_tied, model_type_of, unwrap

HEAD = "lm_head"
FIRST_EMBEDDINGS = ("model.embed_tokens", "transformer.wte")  # paths of the embedding of tokens
# The decoders of models without a head (AutoModel), by the first part of their names there.
DECODERS = {
    "model": ("layers", "embed_tokens", "norm"),
    "transformer": ("h", "wte", "wpe", "ln_f"),
}
EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # last parts of the paths of a checkpoint's embeddings
TIED = Rule("tie_word_embeddings", is_flag, "true or false")
SHORTENED = 20  # PEFT replaces so many names by endings, which layers_to_transform applies to
Shape = tuple[int, ...]


# ---- a base model as a plan sees it --------------------------------------------------------------


class Layer(NamedTuple):
    """A module of the base.

    kind    "linear", "embedding" or, for everything without a matrix, the name of its class
    shape   the weight's: (O, I) of a linear layer, (V, C) of an embedding; () of anything else
    bias    O, or None without a bias
    fixed   can its parameters not be trained?
    """

    kind: str
    shape: Shape
    bias: int | None
    fixed: bool

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
    embedding, head   their paths; "" for a missing one
    tied              do embedding and head share one weight?
    """

    model_type: str
    layers: dict[str, Layer]
    parameters: dict[str, Shape]
    embedding: str
    head: str
    tied: bool

    def below(self, path: str) -> Iterator[tuple[str, Shape]]:
        """(name, shape) of the parameters of the module `path` and of those inside it."""
        for name in self._names_below.get(path, ()):
            yield name, self.parameters[name]

    @functools.cached_property
    def _names_below(self) -> dict[str, list[str]]:
        """The names of the parameters of every module and of those inside it, by its path."""
        below: dict[str, list[str]] = {}
        for name in self.parameters:
            path = name.rpartition(".")[0]
            while path:
                below.setdefault(path, []).append(name)
                path = path.rpartition(".")[0]
        return below


def describe_model(model: Any) -> Base:
    """The base of a model in memory, whatever adapters it has already."""
    layers: dict[str, Layer] = {}
    parameters: dict[str, Shape] = {}
    paths = {}
    for path, module in modules_inside(model).items():
        paths[id(module)] = path
        for name, value in vars(module).items():
            if isinstance(value, Parameter):
                parameters[f"{path}.{name}" if path else name] = tuple(value.shape)
        kind = type(module).__name__
        if isinstance(module, Embedding):
            kind = "embedding"
        elif isinstance(module, LinearBase):
            kind = "linear"
        fixed = any(p.fixed for p in module.parameters())
        layers[path] = _describe_layer(kind, path, parameters, fixed)
    ends = map(unwrap, embedding_and_head(model))
    embedding, head = ("" if end is None else paths.get(id(end), "") for end in ends)
    tied = bool(embedding and head) and is_tied(model)
    return Base(model_type_of(model), layers, parameters, embedding, head, tied)


def modules_inside(model: Module) -> dict[str, Any]:
    """The model's modules by path as it was without adapters.

    The path of a wrapper is that of its inner module.
    """
    modules: dict[str, Any] = {}

    def visit(path: str, module: Module) -> None:
        modules[path] = unwrap(module)
        for name, child in modules[path].named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return modules


def describe_checkpoint(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Base:
    """The base that a checkpoint's header and config.json describe.

    Tensors are read in one case alone: a head beside the embedding that config.json says it is.
    """
    model_type = str(config.get("model_type"))
    parameters: dict[str, Shape] = {}
    keys = canonical_names(checkpoint)
    for name, key in keys.items():
        if not key.endswith(BUFFERS):
            shape = checkpoint.shape(key)
            parameters[name] = shape[::-1] if is_stored_transposed(model_type, key) else shape
    head_weight = f"{HEAD}.weight"
    embedding = next((p for p in FIRST_EMBEDDINGS if f"{p}.weight" in parameters), "")
    tied = says_tied(config)
    if head_weight not in parameters and embedding:
        tied = True
        parameters[head_weight] = parameters[f"{embedding}.weight"]
    elif tied and embedding:
        key = keys[f"{embedding}.weight"]
        tied = are_equal(checkpoint, keys[head_weight], checkpoint, key)
    layers: dict[str, Layer] = {}
    for name in parameters:
        path = name.rpartition(".")[0]
        while path and path not in layers:
            kind = "embedding" if path.rpartition(".")[2] in EMBEDDINGS else "linear"
            if len(parameters.get(f"{path}.weight", ())) != 2:
                kind = "module"
            layers[path] = _describe_layer(kind, path, parameters)
            path = path.rpartition(".")[0]
    head = HEAD if head_weight in parameters else ""
    return Base(model_type, layers, parameters, embedding, head, tied)


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that embedding and head are one weight. ConfigError for others."""
    tied: bool = config.get(TIED.field, config.get("model_type") == "gpt2")
    check_fields({TIED.field: tied}, [TIED], "config: ")
    return tied


def canonical_names(
    checkpoint: Checkpoint, aligned: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """A checkpoint's keys by the names that models and adapters have for them.

    aligned   the keys of another checkpoint by those that differ from them: see `align_keys`
    """
    keys = checkpoint.keys()
    names = {canonical_name(aligned.get(key, key)): key for key in keys}
    is_clear = len(names) == len(keys)
    return names if is_clear else {key: key for key in keys}


def canonical_name(key: str) -> str:
    """A key with the decoder's name, which files of a model without a head lack: model.layers.0."""
    first = key.partition(".")[0]
    decoders = (f"{decoder}." for decoder, parts in DECODERS.items() if first in parts)
    return next(decoders, "") + key


def _describe_layer(
    kind: str, path: str, parameters: Mapping[str, Shape], fixed: bool = False
) -> Layer:
    shape = parameters[f"{path}.weight"] if kind in ("linear", "embedding") else ()
    bias = parameters.get(f"{path}.bias")
    return Layer(kind, shape, bias[0] if bias else None, fixed)


# ---- the plan ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Layers to adapt, modules to copy and tokens to train, by path, with the full configuration.

    config    as the user's, with the values that depend on the base
    saved     modules that are trained whole, as copies
    tokens    embeddings and heads of which some rows are trained, and which rows
    follows   (head, embedding): the head has what the embedding has, because their weight is one
    notes     names in a file's configuration that match nothing here
    vocabulary   weights of the base's embedding and head, by name, with as many rows as in the
              adapter's file; {} if it has as many already
    resized   was the model's vocabulary changed to that of the adapter?
    """

    base: Base
    targets: dict[str, Layer]
    saved: dict[str, Layer]
    config: LoraConfig
    tokens: dict[str, list[int]]
    follows: tuple[str, str] | None
    notes: tuple[str, ...] = ()
    vocabulary: Mapping[str, Any] = {}
    resized: bool = False

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors in the adapter's file, by key."""
        model_type = self.base.model_type
        follower = self.follows and self.follows[0]
        shapes: dict[str, Shape] = {}
        maps = self.maps()
        for path, layer in self.targets.items():
            if path in maps:
                for name, shape in maps[path].file_shapes().items():
                    shapes[file_key(path, maps[path], name)] = shape
            elif path != follower:
                shapes |= self._layer_shapes(path, layer)
            if self.config.bias != "none" and layer.bias is not None:
                shapes[f"{PREFIX}{path}.base_layer.bias"] = (layer.bias,)
        for path in self.saved:
            if path != follower:
                for name, shape in self.base.below(path):
                    stored = is_stored_transposed(model_type, name)
                    shapes[PREFIX + name] = shape[::-1] if stored else shape
        for path, rows in self.tokens.items():
            shapes[f"{PREFIX}{path}.{TOKENS}"] = (len(rows), self.base.layers[path].shape[1])
        if self.config.bias == "all":
            for path, layer in self.base.layers.items():
                if layer.bias is not None and path not in self.targets:
                    shapes[f"{PREFIX}{path}.bias"] = (layer.bias,)
        return shapes

    def layer_sizes(self) -> dict[str, Shape]:
        """(O, I) of each target."""
        return {p: (layer.out_features, layer.in_features) for p, layer in self.targets.items()}

    def maps(self) -> dict[str, Map]:
        """The map of each target; {} for methods that have none."""
        config = self.config
        return config.maps(self.layer_sizes()) if isinstance(config, MapConfig) else {}

    def _layer_shapes(self, path: str, layer: Layer) -> dict[str, Shape]:
        kind = adapter_class(self.config, layer.kind)
        experts = [self.config.experts] if isinstance(self.config, HydraConfig) else []
        shapes = {}
        for name, shape in kind.shapes(layer, self.config.rank(path), *experts).items():
            shapes[file_key(path, kind, name)] = shape
        return shapes


def plan_adapter(
    base: Base, config: LoraConfig, keys: Collection[str] = (), warn: bool = True
) -> Plan:
    """The plan for what `config` means in `base`. ConfigError for what does not fit.

    keys   those of the file that the adapter is read from; they too say whether a tied head follows
           its embedding, and whether an adapter has tokens alone. Names that match nothing are
           then notes, not errors: its tensors say what it adapts
    warn   about what is allowed but hardly meant
    """
    config = dataclasses.replace(config)
    tie = (base.head, base.embedding) if base.tied else None
    if config.ensure_weight_tying and not base.embedding and not keys:
        raise ConfigError(
            "ensure_weight_tying needs a model that says where its embedding and its head are: "
            "define get_input_embeddings() and get_output_embeddings(), or leave the option out"
        )
    follows = tie if config.ensure_weight_tying and _replace_head(config, tie, keys) else None
    notes: list[str] = []
    saved = _find_saved(base.layers, config, notes if keys else None)
    linear = {}
    for path, layer in base.layers.items():
        if layer.kind == "linear" and not _is_within(path, saved):
            linear[path] = layer
    targets = _find_targets(base, linear, saved, config, keys, notes)
    for path, layer in targets.items():
        adaptable = layer.kind == "embedding" and config.peft_type == "LORA"
        if not adaptable and path not in linear:
            raise ConfigError(
                f"target {path} is not a linear layer but of kind {layer.kind}; "
                f"{_candidates(linear)}"
            )
    if follows:
        _add_head(config, *follows, base.layers, targets, saved)
    for path, layer in saved.items():
        if layer.fixed:
            raise ConfigError(
                f"modules_to_save: {path} is quantised or in 16 bits and cannot be trained; "
                "choose a base that is not, or leave it out"
            )
    tokens, token_follows = _find_tokens(base, config, tie, {*targets, *saved})
    fan_in_fan_out = config.fan_in_fan_out
    for path, layer in targets.items():
        if layer.kind == "linear":  # PEFT's value is that of the last layer
            fan_in_fan_out = is_stored_transposed(base.model_type, f"{path}.weight")
    if warn:
        _warn(config, targets, fan_in_fan_out)
    config.fan_in_fan_out = fan_in_fan_out
    plan = Plan(base, targets, saved, config, tokens, follows or token_follows, tuple(notes))
    if isinstance(config, MapConfig):
        config.settle(targets)
        for one in plan.maps().values():  # raises for a layer that the method cannot adapt
            if not keys:
                one.check()
    return plan


def _replace_head(config: LoraConfig, tie: tuple[str, str] | None, keys: Container[str]) -> bool:
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


def _find_saved(
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
        raise ConfigError(f"modules_to_save: {_quote(unused)} match nothing; {_candidates(layers)}")
    return {path: layer for path, layer in layers.items() if names.mean(path)}


def _find_targets(
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
    targets = config.target_modules
    if targets is None:
        tokens_alone = bool(keys) and not any(".lora_" in key for key in keys)
        if config.trainable_token_indices is not None and tokens_alone:
            return {}
        choices = DEFAULT_TARGETS
        if isinstance(config, MapConfig) and config.TARGETS:
            choices = dict(config.TARGETS)
        if base.model_type not in choices:
            raise ConfigError(
                f"target_modules must be given for a model of type {base.model_type!r}; "
                f"{_candidates(linear)}"
            )
        targets = list(choices[base.model_type])
        config.target_modules = targets
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    wanted = Targets([] if all_linear else targets)
    chosen = {}
    for path, layer in (linear if all_linear else base.layers).items():
        if all_linear:
            meant = path not in (base.head, "")
        else:
            meant = path != "" and wanted.mean(path) and not _is_within(path, saved)
        if meant:
            chosen[path] = layer
    if isinstance(targets, list):
        # PEFT's files of "all-linear" also name what is inside a saved module, which is right.
        paths = [path for path in base.layers if path] if chosen else []
        unused = [name for name, meant_by in wanted.group(paths).items() if not meant_by]
        # A file may have names for several kinds of model; its tensors say what it adapts.
        if unused and keys and chosen:
            notes.append(f"target_modules: {_quote(unused)} match nothing in this base")
        elif unused:
            raise ConfigError(
                f"target_modules: {_quote(unused)} match nothing; {_candidates(linear)}"
            )
    # Full names stay in any layer, as in PEFT.
    whole = set(targets) if isinstance(targets, list) else set()
    layers = Layers(config.layers_to_transform, config.layers_pattern)
    outside = {path for path in chosen if not layers.contain(path)}
    if len(whole) >= SHORTENED and outside & whole:
        raise ConfigError(
            f"layers_to_transform {config.layers_to_transform!r:.120} leaves out "
            f"{min(outside & whole)}, which target_modules names in full: with {SHORTENED} names "
            "or more PEFT might keep it or not, so leave one of the two out"
        )
    chosen = {p: layer for p, layer in chosen.items() if p in whole or p not in outside}
    if config.exclude_modules:
        excluded = Targets(config.exclude_modules)
        remaining = {p: layer for p, layer in chosen.items() if not excluded.mean(p)}
        if len(remaining) == len(chosen):
            text = f"exclude_modules {config.exclude_modules!r:.200} excludes nothing"
            warnings.warn(text, stacklevel=6)
        chosen = remaining
    if not chosen:
        given = f"target_modules {targets!r:.120}"
        for field in ("layers_to_transform", "exclude_modules"):
            value = getattr(config, field)
            if value is not None:
                given += f", {field} {value!r:.120}"
        raise ConfigError(f"no target is left: {given} match nothing; {_candidates(linear)}")
    if all_linear:
        config.target_modules = sorted(chosen)  # PEFT's files name them one by one
    return chosen


def _add_head(
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


def _find_tokens(
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
                    f"{where}: {name!r:.99} matches nothing; {_candidates(base.layers)}"
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


def _warn(config: LoraConfig, targets: Mapping[str, Layer], fan_in_fan_out: bool) -> None:
    """Warn about what is allowed but hardly meant."""
    notes = []
    if config.fan_in_fan_out and not fan_in_fan_out:
        notes.append(
            "fan_in_fan_out is for layers whose files store W as (in, out); "
            "these do not: set to False"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        # AdaLoRA's rank_pattern has the names of lora_E, every other one is a pattern.
        keys = [key for key in getattr(config, field) if key.removesuffix(".lora_E") not in targets]
        for key in Patterns(keys).unused(targets):
            notes.append(f"{field}: {key!r:.200} matches no target")
    for path, layer in targets.items():
        if isinstance(config, MapConfig):  # r is not the rank of dW
            break
        r = config.rank(path)
        full = min(layer.shape)
        if r > full:
            notes.append(f"{path}: r = {r} is above the full rank {full}")
            break
    for note in notes:
        warnings.warn(shorten(note), stacklevel=6)


def _is_within(path: str, saved: Container[str]) -> bool:
    """Is the module `path` one of `saved`, or inside one?"""
    while path and path not in saved:
        path = path.rpartition(".")[0]
    return path != ""


def _quote(names: list[str]) -> str:
    return ", ".join(map(repr, names))[:200]


def _candidates(layers: Mapping[str, Layer]) -> str:
    names = sorted({path.rpartition(".")[2] for path in layers if path})
    return f"choose from {', '.join(names)}"


# ---- a plan beside the adapters that a model has -------------------------------------------------


def wrappers(model: Module) -> Iterator[tuple[str, Wrapper]]:
    """(path, wrapper) of every module that has adapters."""
    for path, module in model.named_modules():
        if isinstance(module, Wrapper):
            yield path, module


def check_wrapped(model: Module, plan: Plan) -> None:
    """ConfigError if `plan` and the adapters that `model` has need one module in two ways."""
    present = dict(wrappers(model))
    follower, leading = plan.follows or ("", "")
    wanted: dict[str, type] = dict.fromkeys(plan.targets, LoraLinear)
    for path, layer in plan.targets.items():
        if layer.kind == "embedding":
            wanted[path] = LoraEmbedding
    wanted |= dict.fromkeys(plan.saved, SavedModule)
    wanted |= dict.fromkeys(plan.tokens, TrainableTokens)
    if leading in plan.tokens:
        wanted[follower] = TrainableTokens
    kinds: dict[str, type] = {path: type(wrapper) for path, wrapper in present.items()}
    both = {**kinds, **wanted}
    parents = set()
    for path in both:
        parent = path.rpartition(".")[0]
        while parent and parent not in parents:
            parents.add(parent)
            parent = parent.rpartition(".")[0]
    for path, kind in both.items():
        if path in parents or kinds.get(path, kind) is not kind:
            raise ConfigError(
                f"{path} cannot be saved whole and also be adapted, nor be adapted and have "
                "trainable tokens, nor contain a module that is: choose one of them"
            )
    for head, wrapper in present.items():
        if not isinstance(wrapper, TrainableTokens):
            continue
        leader = next((path for path, m in present.items() if m is wrapper.leader), "")
        if (leader and head in plan.tokens) or (head == follower and leader != leading):
            raise ConfigError(
                f"{head} has its own trainable tokens in one adapter and the embedding's in "
                "another: use the same in both"
            )
