"""The shape of a model in the words of config.json: reading, checking and writing it.

Contents: DIALECTS, how each type of model words its config.json - TransformerConfig -
rotary_frequencies, which the rotary parameters decide
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import (
    ConfigError,
    Predicate,
    Rule,
    check_fields,
    is_flag,
    is_integer,
    is_number,
    is_plain_number,
    one_of,
    optional,
    rules_for,
)
from ..formats.disk import JsonObject

ROPE_TYPES = ("default", "linear", "llama3")
SLIDING = "sliding_attention"
LAYER_TYPES = ("full_attention", SLIDING)
GATED = ("silu", "swish")  # the activations of a gated feed-forward layer
GPT2_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "silu", "swish", "relu")

# ---- the dialects of config.json ----------------------------------------------------------------


class Dialect(NamedTuple):
    """How the config.json of one type of model expresses a TransformerConfig.

    architecture   the model's class in transformers
    fields         the fields of TransformerConfig that the type has; the others keep their defaults
    absent         what transformers assumes for a missing field, where that is not the default here
    activations    the values that hidden_act may have
    names          the names of fields in config.json, where they differ
    demands        fields that would change the model in a way that this package does not implement,
                   and the only value that each may have
    """

    architecture: str
    fields: tuple[str, ...]
    absent: Mapping[str, Any]
    activations: tuple[str, ...] = GATED
    names: Mapping[str, str] = {}
    demands: Mapping[str, bool] = {}


REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
COMMON = (
    *REQUIRED,
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
SHARED = (*COMMON, "num_key_value_heads", "head_dim", "rope_parameters")
WINDOWED = (*SHARED, "sliding_window", "max_window_layers", "layer_types")
MISTRAL_ABSENT = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
QWEN_ABSENT = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GPT2_ABSENT = {
    "max_position_embeddings": 1024,
    "hidden_act": "gelu_new",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "intermediate_size": None,
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
GPT2_DEMANDS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
LLAMA_FIELDS = (*SHARED, "attention_bias", "mlp_bias")
QWEN3_FIELDS = (*WINDOWED, "attention_bias")

DIALECTS = {
    "llama": Dialect("LlamaForCausalLM", LLAMA_FIELDS, {"max_position_embeddings": 2048}),
    "mistral": Dialect("MistralForCausalLM", (*SHARED, "sliding_window"), MISTRAL_ABSENT),
    "qwen2": Dialect("Qwen2ForCausalLM", WINDOWED, QWEN_ABSENT),
    "qwen3": Dialect("Qwen3ForCausalLM", QWEN3_FIELDS, {**QWEN_ABSENT, "head_dim": 128}),
}
DIALECTS["gpt2"] = Dialect(
    "GPT2LMHeadModel", COMMON, GPT2_ABSENT, GPT2_ACTIVATIONS, GPT2_NAMES, GPT2_DEMANDS
)
MODEL_TYPES = tuple(DIALECTS)

# ---- what each field may hold -------------------------------------------------------------------


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


_LARGEST = 2**31 - 1
_is_size = is_integer(1, _LARGEST)
_is_head_dim = is_integer(1, 2**16 - 1)
_is_rotary_number = is_number(above=1e-30, below=1e30, kinds=(int, float))
SIZES = (*REQUIRED, "num_key_value_heads", "max_position_embeddings")
SCALES = ("rms_norm_eps", "initializer_range")
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings")
MODEL_TYPE_RULE = Rule("model_type", MODEL_TYPES.__contains__, f"one of {', '.join(MODEL_TYPES)}")
RULES = [
    *rules_for(SIZES, _is_size, "a positive integer below 2^31"),
    *rules_for(SCALES, is_plain_number(above=0, below=1e300), "a positive number below 1e300"),
    *rules_for(SWITCHES, is_flag, "true or false"),
    Rule("sliding_window", optional(_is_size), "a positive integer below 2^31, or null"),
    Rule("max_window_layers", is_integer(0, _LARGEST), "an integer of at least 0 and below 2^31"),
    Rule("rope_parameters", _is_object, "an object"),
]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a model in the words of Llama's config.json. ConfigError names an invalid field.

    model_type            "llama", "mistral", "qwen2" (q, k and v have biases), "qwen3" (each head
                          of q and k has a norm) or "gpt2" (learnt positions, LayerNorm, no gate,
                          biases everywhere)
    intermediate_size     None, for GPT-2: four times hidden_size
    num_key_value_heads   None: as many as query heads
    head_dim              None: hidden_size / num_attention_heads
    rms_norm_eps          of every norm, GPT-2's LayerNorm too
    rope_parameters       {"rope_type": "default" | "linear" | "llama3", "rope_theta": 10000.0,
                          ...}; empty for GPT-2
    sliding_window        how many of the newest positions attention sees, the current one included;
                          None: all. It applies to the layers from max_window_layers on or, if
                          layer_types is given, to those that it calls "sliding_attention"
    extra                 fields of a config.json that mean nothing here; they are written back
    """

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 256
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    layer_types: tuple[str, ...] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        fields = vars(self)  # which can be written though the class is frozen
        check_fields(fields, [MODEL_TYPE_RULE], "config: ")
        dialect = DIALECTS[self.model_type]
        is_rotary = "rope_parameters" in dialect.fields
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            fields["num_key_value_heads"] = heads
        if self.intermediate_size is None and not is_rotary and _is_size(self.hidden_size):
            fields["intermediate_size"] = 4 * self.hidden_size
        wanted = f"one of {', '.join(dialect.activations)}"
        self._check("hidden_act", dialect.activations.__contains__, wanted)
        for rule in RULES:
            self._check(*rule)
        if self.head_dim is None:
            wanted = f"a multiple of num_attention_heads = {heads}, or head_dim be given"
            self._check("hidden_size", lambda C: C % heads == 0, wanted)
            fields["head_dim"] = self.hidden_size // heads
        if is_rotary:
            wanted = "even and positive, and below 2^16"
            self._check("head_dim", lambda D: _is_head_dim(D) and D % 2 == 0, wanted)
        else:
            wanted = "hidden_size / num_attention_heads, and nothing else"
            self._check("head_dim", lambda D: _is_head_dim(D) and self._plain_heads, wanted)
        wanted = f"a divisor of num_attention_heads = {heads}"
        self._check("num_key_value_heads", lambda K: heads % K == 0, wanted)
        types = self.layer_types
        if types is not None:
            count = self.num_hidden_layers
            listed = isinstance(types, (list, tuple)) and all(kind in LAYER_TYPES for kind in types)
            wanted = f"{count} of {', '.join(LAYER_TYPES)}, or null"
            self._check("layer_types", lambda _: listed and len(types) == count, wanted)
            if SLIDING in types:
                self._check("sliding_window", _is_size, f"given for {SLIDING}")
            fields["layer_types"] = tuple(types)
        self._check_absent_fields(dialect)
        if is_rotary:
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            fields["rope_parameters"] = {**rope, **self.rope_parameters}
            rotary_frequencies(self)  # ConfigError if the rotary parameters do not fit

    def _check(self, name: str, is_valid: Predicate, wanted: str) -> None:
        """ConfigError if the value is not valid; it names the field as config.json does, too."""
        names = DIALECTS[self.model_type].names
        shown = f"{name} ({names[name]})" if name in names else name
        check_fields({shown: getattr(self, name)}, [Rule(shown, is_valid, wanted)], "config: ")

    def _check_absent_fields(self, dialect: Dialect) -> None:
        """Check that the fields that the type of model does not have keep their defaults."""
        defaults: dict[str, Any] = {
            "attention_bias": False,
            "mlp_bias": False,
            "sliding_window": None,
            "max_window_layers": 0,
            "layer_types": None,
            "rope_parameters": {},
            "num_key_value_heads": self.num_attention_heads,
        }
        for name, default in defaults.items():
            wanted = f"{default!r}, since the model_type is {self.model_type}"
            if name not in dialect.fields:
                self._check(name, functools.partial(operator.eq, default), wanted)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k has an RMSNorm before the rotation."""
        return self.model_type == "qwen3"

    @property
    def _plain_heads(self) -> bool:
        return self.head_dim == self.hidden_size // self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """How many positions attention sees in this layer, the newest among them; None: all."""
        if self.layer_types is None:
            slides = layer >= self.max_window_layers
        else:
            slides = self.layer_types[layer] == SLIDING
        return self.sliding_window if slides else None

    def parameter_count(self) -> int:
        """How many weights the model has; a tied head counts once."""
        C = self.hidden_size
        D = self.head_dim or 0
        H = self.num_attention_heads
        K = self.kv_heads
        M = self.intermediate_size
        tables = self.vocab_size * C
        if not self.tie_word_embeddings:
            tables *= 2
        if self.model_type == "gpt2":
            layer = 4 * C * C + 2 * C * M
            layer += 4 * C + (C + M)  # biases
            layer += 4 * C  # norms
            tables += self.max_position_embeddings * C
            return tables + self.num_hidden_layers * layer + 2 * C
        layer = 2 * C * D * (H + K) + 3 * C * M + 2 * C
        layer += 2 * D * self.qk_norm
        layer += (H + 2 * K) * D * self.qkv_bias
        layer += C * self.attention_bias
        layer += (2 * M + C) * self.mlp_bias
        return tables + self.num_hidden_layers * layer + C

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """The configuration that a config.json describes.

        It is read as transformers writes it today, or did before `rope_parameters` and `dtype`.
        """
        config = dict(config)
        kind = config.pop("model_type", None)
        check_fields({"model_type": kind}, [MODEL_TYPE_RULE], "config: ")
        dialect = DIALECTS[kind]
        for name, value in dialect.demands.items():
            rule = Rule(name, one_of(value), str(value).lower())
            check_fields({name: value, **config}, [rule], "config: ")
        given = dict(dialect.absent)
        if "rope_parameters" in dialect.fields:
            given["rope_parameters"] = _pop_rope_parameters(config)
        for name in dialect.fields:
            key = dialect.names.get(name, name)
            if key in config:
                given[name] = config.pop(key)
        missing = [dialect.names.get(name, name) for name in REQUIRED if name not in given]
        if missing:
            raise ConfigError(f"config: missing {', '.join(sorted(missing))}")
        if "layer_types" in dialect.fields and not config.get("use_sliding_window"):
            given["sliding_window"] = None
        return cls(**given, model_type=kind, extra=config)

    def to_dict(self, dtype: str = "float32") -> JsonObject:
        """The fields for config.json, in the dialect of the type of model."""
        dialect = DIALECTS[self.model_type]
        fields = {dialect.names.get(name, name): getattr(self, name) for name in dialect.fields}
        if "rope_parameters" in fields:
            fields["rope_parameters"] = dict(self.rope_parameters)
        if "layer_types" in fields:
            types = fields.pop("layer_types")
            fields["use_sliding_window"] = self.sliding_window is not None
            if types is not None:
                fields["layer_types"] = list(types)
        if self.model_type == "qwen2" and self._plain_heads:
            del fields["head_dim"]  # as transformers does, which reads it but does not write it
        if fields.get("n_inner") == 4 * self.hidden_size:
            fields["n_inner"] = None
        written = {"architectures": [dialect.architecture], **self.extra, **fields}
        written.pop("torch_dtype", None)  # the old name of `dtype`
        written.pop("quantization_config", None)  # describes weights, not a shape
        return {**written, "model_type": self.model_type, "dtype": dtype}


def _pop_rope_parameters(config: JsonObject) -> JsonObject:
    """Take the rotary parameters out of a config.json, whichever of three spellings it uses."""
    rope = config.pop("rope_parameters", None) or {}
    scaling = config.pop("rope_scaling", None) or {}
    theta = config.pop("rope_theta", None)
    if not (_is_object(rope) and _is_object(scaling)):
        raise ConfigError("config: rope_parameters, or rope_scaling, must be an object")
    parameters = dict(scaling)
    if "type" in parameters:  # the oldest spelling
        parameters["rope_type"] = parameters.pop("type")
    if theta is not None:
        parameters["rope_theta"] = theta
    return {**parameters, **rope}


def rotary_frequencies(config: TransformerConfig) -> np.ndarray:
    """theta^(-2i/D) for i < D/2, float64, changed as `rope_type` says.

    Su et al. 2021; Llama 3's rule for "llama3".
    """
    D = config.head_dim
    assert D is not None
    parameters = config.rope_parameters

    def check(name: str, is_valid: bool, wanted: str) -> None:
        field = f"rope_parameters.{name}"
        values = {field: parameters.get(name)}
        check_fields(values, [Rule(field, lambda _: is_valid, wanted)], "config: ")

    def number(name: str) -> float:
        value: Any = parameters.get(name)
        check(name, _is_rotary_number(value), "a positive number, above 1e-30 and below 1e30")
        return float(value)

    kind = parameters["rope_type"]
    check("rope_type", kind in ROPE_TYPES, f"one of {', '.join(ROPE_TYPES)}")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ConfigError(
            "config: rope_parameters must be those of all layers: "
            "one set for each type of layer is not supported"
        )
    factor = parameters.get("partial_rotary_factor")
    check("partial_rotary_factor", factor in (None, 1), "1: all of a head is rotated")

    frequency = number("rope_theta") ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    if kind == "linear":
        return frequency / number("factor")
    if kind == "llama3":
        # Long waves are stretched by `factor`, short ones kept, those between interpolated.
        low = number("low_freq_factor")
        high = number("high_freq_factor")
        old_context = number("original_max_position_embeddings")
        check("high_freq_factor", high > low, f"above low_freq_factor = {low}")
        turns = old_context * frequency / (2 * math.pi)  # full turns within the old context
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * (keep + (1 - keep) / number("factor"))
    return frequency
