"""A base model as a plan sees it: its modules with their kinds and shapes.

A model in memory gives this list (`describe_model`), and so does the header of a checkpoint
(`describe_checkpoint`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ...errors import Rule, check_fields, is_flag
from ...formats import Checkpoint
from ...formats.checkpoint import BUFFERS, are_equal, is_stored_transposed
from ...nn import Embedding, LinearBase, Module, Parameter
from ..tying import embedding_and_head, is_tied, model_type_of, unwrap

HEAD = "lm_head"
FIRST_EMBEDDINGS = ("model.embed_tokens", "transformer.wte")  # paths of the embedding of tokens
# The decoders of models without a head (AutoModel), by the first part of their names there.
DECODERS = {
    "model": ("layers", "embed_tokens", "norm"),
    "transformer": ("h", "wte", "wpe", "ln_f"),
}
EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # last parts of the paths of a checkpoint's embeddings
TIED = Rule("tie_word_embeddings", is_flag, "true or false")
Shape = tuple[int, ...]


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
