"""The shape of a model in the words of config.json: reading, checking and writing it.

How each type of model words its file is in dialects.py, rotary parameters are in rotary.py.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import (
    ConfigError,
    Predicate,
    Rule,
    check_fields,
    is_flag,
    is_integer,
    is_plain_number,
    optional,
    rules_for,
    shorten,
)
from ..formats.disk import JsonObject
from .dialects import (
    DIALECTS,
    FULL,
    LAYER_TYPES,
    MODEL_TYPES,
    OLD_LAYER_TYPES,
    REQUIRED,
    SLIDING,
    Dialect,
    knadded_fields,
)
from .rotary import (
    complete_rope_parameters,
    longest_context,
    pop_rope_parameters,
    rotary_frequencies,
    unused_rope_fields,
)

# ---- what each field may hold -------------------------------------------------------------------


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_full(count: int, types: Any) -> bool:
    """Whether this is a list of as many layers, in each of which attention sees all positions."""
    is_list = isinstance(types, list) and len(types) == count
    return is_list and all(name in (FULL, *OLD_LAYER_TYPES) for name in types)


_LARGEST = 2**31 - 1
_is_size = is_integer(1, _LARGEST)
_is_head_dim = is_integer(1, 2**16 - 1)
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
    rope_parameters       {"rope_type": one of ROPE_TYPES, "rope_theta": 10000.0, ...}, the rest as
                          rotary.ROPE_FIELDS says; empty for GPT-2
    sliding_window        how many of the newest positions attention sees, the current one included;
                          None: all. It applies to the layers from max_window_layers on or, if
                          layer_types is given, to those that it calls "sliding_attention"
    extra                 fields of a config.json that mean nothing here; they are written back.
                          So are the base's dropouts, which transformers applies in training: here
                          an adapter's own dropout is the only one
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
        for name in SCALES:
            fields[name] = float(fields[name])  # transformers takes no integer for a float
        if self.head_dim is None or self.model_type == "llama":
            wanted = f"a multiple of num_attention_heads = {heads}"
            if self.model_type != "llama":  # transformers' Llama refuses it in any case
                wanted += ", or head_dim be given"
            self._check("hidden_size", lambda C: C % heads == 0, wanted)
        if self.head_dim is None:
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
            if SLIDING in types or self.model_type == "mistral":  # transformers asks for it
                self._check("sliding_window", _is_size, f"given for {SLIDING}")
            fields["layer_types"] = tuple(types)
        self._check_absent_fields(dialect)
        if is_rotary:
            context = self.max_position_embeddings
            rope = complete_rope_parameters(self.rope_parameters, context)
            fields["rope_parameters"] = rope
            rotary_frequencies(rope, self.head_dim or 0, context)  # ConfigError if they do not fit

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

    @property
    def context(self) -> int:
        """How many positions a sequence may have; above max_position_embeddings if a rope_type
        stretches them."""
        context = self.max_position_embeddings
        rope = self.rope_parameters
        return longest_context(rope, context) if rope else context

    def describe_context(self) -> str:
        """`context` in the words of config.json, for messages."""
        words = f"max_position_embeddings = {self.max_position_embeddings}"
        if self.context == self.max_position_embeddings:
            return words
        return f"{words}, stretched to {self.context} by rope_parameters"

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

        It is read as transformers 5.23 reads it, or refused. A field that would change the model in
        a way that is not implemented raises a ConfigError. Unknown fields cause one warning, unless
        they are null, false or empty: then they say that something is not used.
        """
        written = dict(config)
        kind = written.pop("model_type", None)
        check_fields({"model_type": kind}, [MODEL_TYPE_RULE], "config: ")
        dialect = DIALECTS[kind]
        extra = _without_aliases(written, dialect)
        given = dict(dialect.absent)
        if "rope_parameters" in dialect.fields:
            given["rope_parameters"] = pop_rope_parameters(extra)
        for name in dialect.fields:
            key = dialect.names.get(name, name)
            if key in extra:
                given[name] = extra.pop(key)
        missing = [dialect.names.get(name, name) for name in REQUIRED if name not in given]
        if missing:
            raise ConfigError(f"config: missing {', '.join(sorted(missing))}")
        types = given.get("layer_types")
        if isinstance(types, list) and all(isinstance(name, str) for name in types):
            given["layer_types"] = [OLD_LAYER_TYPES.get(name, name) for name in types]
        if "max_window_layers" in dialect.fields and not extra.get("use_sliding_window"):
            given["sliding_window"] = None
        made = cls(**given, model_type=kind, extra=extra)
        rules = [*dialect.file_rules, *dialect.other_rules, *made._rules_of_this_shape(written)]
        check_fields(written, [rule for rule in rules if rule.field in written], "config: ")
        made._warn_of_unknadded_fields()
        return made

    def _rules_of_this_shape(self, written: Mapping[str, Any]) -> list[Rule]:
        """Rules for the fields of a file whose valid values depend on the model's shape."""
        rules = []
        if self.model_type != "gpt2":  # transformers does not train this row, if there is one
            V = self.vocab_size
            is_row = optional(is_integer(-V, V - 1))
            rules.append(Rule("pad_token_id", is_row, f"an id below vocab_size = {V}, or null"))
        if "sliding_window" not in DIALECTS[self.model_type].fields:
            # transformers' class ignores both, its cache does not: generated text would differ.
            count = self.num_hidden_layers
            wanted = f"null, or at least {self.describe_context()}"
            rules.append(Rule("sliding_window", optional(is_integer(self.context)), wanted))
            wanted = f"null, or {FULL} for each of the {count} layers"
            rules.append(Rule("layer_types", optional(functools.partial(_is_full, count)), wanted))
        if self.model_type == "mistral" and "layer_types" in written:
            # transformers then uses a class that takes null for neither, and needs head_dim.
            wanted = "a positive integer, because layer_types is given"
            needed = rules_for(("head_dim", "sliding_window"), _is_size, wanted)
            assumed = {"head_dim": None, "sliding_window": self.sliding_window}
            check_fields({**assumed, **written}, needed, "config: ")
        return rules

    def _warn_of_unknadded_fields(self) -> None:
        known = knadded_fields(self.model_type)
        unknown = [name for name, value in self.extra.items() if name not in known and value]
        if self.rope_parameters:
            unknown += unused_rope_fields(self.rope_parameters)
        if unknown:
            names = ", ".join(sorted(unknown))
            warnings.warn(
                shorten(
                    f"config: fields without effect in a model of type {self.model_type}: {names}"
                ),
                stacklevel=3,
            )

    def to_dict(self, dtype: str = "float32") -> JsonObject:
        """The fields for config.json, in the dialect of the type of model."""
        dialect = DIALECTS[self.model_type]
        fields = {dialect.names.get(name, name): getattr(self, name) for name in dialect.fields}
        if "rope_parameters" in fields:
            fields["rope_parameters"] = dict(self.rope_parameters)
        if "max_window_layers" in fields:
            fields["use_sliding_window"] = self.sliding_window is not None
        types = fields.pop("layer_types", None)
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


def _without_aliases(written: Mapping[str, Any], dialect: Dialect) -> JsonObject:
    """The fields of a file under their first names. ConfigError if two names say two things."""
    fields = dict(written)
    for name, alias in dialect.aliases.items():
        if alias in fields:
            value = fields.pop(alias)
            if fields.setdefault(name, value) != value:
                raise ConfigError(
                    f"config: {name} is {fields[name]!r:.99}, but {alias}, another name for it, is "
                    f"{value!r:.99}: keep one of the two"
                )
    return fields
