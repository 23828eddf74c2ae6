"""Plan an adapter: what a configuration means for a base, before the first layer is changed.

A plan is made over a `Base`, which a model and the header of a checkpoint both give, so
get_peft_model, load_adapter, merge and inspect all plan alike. Whatever a user can get wrong about
targets raises here; what is allowed but hardly meant warns.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ...errors import ConfigError, shorten
from ...formats.checkpoint import is_stored_transposed
from ...nn import Module
from ..config import LoraConfig
from ..embedding import LoraEmbedding
from ..hydra import HydraConfig
from ..layer import LoraLinear, SavedModule, Wrapper
from ..maps import Map, MapConfig
from ..names import PREFIX, TOKENS, adapter_class, file_key
from ..tokens import TrainableTokens
from .base import Base, Layer, Shape
from .rules import Patterns
from .selection import (
    add_head,
    candidates,
    find_saved,
    find_targets,
    find_tokens,
    is_within,
    replace_head,
)


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
    follows = tie if config.ensure_weight_tying and replace_head(config, tie, keys) else None
    notes: list[str] = []
    saved = find_saved(base.layers, config, notes if keys else None)
    linear = {}
    for path, layer in base.layers.items():
        if layer.kind == "linear" and not is_within(path, saved):
            linear[path] = layer
    targets = find_targets(base, linear, saved, config, keys, notes)
    for path, layer in targets.items():
        adaptable = layer.kind == "embedding" and config.peft_type == "LORA"
        if not adaptable and path not in linear:
            raise ConfigError(
                f"target {path} is not a linear layer but of kind {layer.kind}; "
                f"{candidates(linear)}"
            )
    if follows:
        add_head(config, *follows, base.layers, targets, saved)
    for path, layer in saved.items():
        if layer.fixed:
            raise ConfigError(
                f"modules_to_save: {path} is quantised or in 16 bits and cannot be trained; "
                "choose a base that is not, or leave it out"
            )
    tokens, token_follows = find_tokens(base, config, tie, {*targets, *saved})
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
