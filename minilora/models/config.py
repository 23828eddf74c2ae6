"""The shape of a model, in config.json's own words: read, checked, and written back.

Contents: the dialects of config.json, a line a type of model - TransformerConfig - rotary_frequencies, which the rotary
parameters decide - RotaryTable, their cos and sin
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError

ROPE_TYPES = ("default", "linear", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
GATED = ("silu", "swish")  # the activations of a gated feed-forward layer, and of GPT-2's
GPT2_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "silu", "swish", "relu")


class Dialect(NamedTuple):
    """How the config.json of one type of model says what TransformerConfig says.

    architecture   the model's class in transformers
    fields         those of TransformerConfig that it has; each keeps its default in a type that has not
    absent         what transformers takes where a file leaves a field out, unless it is the default here
    names          of a field there, where it has another
    demands        fields that change the model in a way that is not built here, and the value they may hold
    """

    architecture: str
    fields: tuple[str, ...]
    absent: Mapping[str, Any]
    activations: tuple[str, ...] = GATED
    names: Mapping[str, str] = {}
    demands: Mapping[str, Any] = {}


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
QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

DIALECTS = {
    "llama": Dialect(
        "LlamaForCausalLM",
        (*SHARED, "attention_bias", "mlp_bias"),
        {"max_position_embeddings": 2048},
    ),
    "mistral": Dialect(
        "MistralForCausalLM",
        (*SHARED, "sliding_window"),
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Dialect("Qwen2ForCausalLM", WINDOWED, QWEN),
    "qwen3": Dialect("Qwen3ForCausalLM", (*WINDOWED, "attention_bias"), {**QWEN, "head_dim": 128}),
    "gpt2": Dialect(
        "GPT2LMHeadModel",
        COMMON,
        {
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "intermediate_size": None,
        },
        GPT2_ACTIVATIONS,
        {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
}
MODEL_TYPES = tuple(DIALECTS)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a model, in the words of Llama's config.json. ConfigError names what does not fit.

    model_type            "llama", "mistral", "qwen2" (q, k and v have biases), "qwen3" (q and k have norms) or "gpt2"
                          (learnt positions, LayerNorm, no gate, biases everywhere)
    intermediate_size     None, for GPT-2: four times hidden_size
    num_key_value_heads   None: as many as query heads
    head_dim              None: hidden_size / num_attention_heads
    rms_norm_eps          of every norm, GPT-2's too
    rope_parameters       {"rope_type": "default" | "linear" | "llama3", "rope_theta": 10000.0, ...}; GPT-2 has none
    sliding_window        of the last so many positions attention sees, its own among them; None: all of them. Not all
                          layers: those from max_window_layers on, or the "sliding_attention" among layer_types
    extra                 fields of a config.json that mean nothing here; they are kept, and written back
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
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        def need(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                there = (
                    DIALECTS[self.model_type].names.get(name)
                    if self.model_type in MODEL_TYPES
                    else None
                )
                shown = f"{name} ({there})" if there else name
                raise ConfigError(
                    f"config: {shown} must be {wanted}, got {getattr(self, name)!r}"[:500]
                )

        need(self.model_type in MODEL_TYPES, "model_type", f"one of {', '.join(MODEL_TYPES)}")
        dialect = DIALECTS[self.model_type]
        need(
            self.hidden_act in dialect.activations,
            "hidden_act",
            f"one of {', '.join(dialect.activations)}",
        )
        if self.num_key_value_heads is None:
            put("num_key_value_heads", self.num_attention_heads)
        if (
            self.intermediate_size is None
            and self.model_type == "gpt2"
            and _is_size(self.hidden_size)
        ):
            put("intermediate_size", 4 * self.hidden_size)
        for name in [*REQUIRED, "num_key_value_heads", "max_position_embeddings"]:
            need(_is_size(getattr(self, name)), name, "a positive integer")
        if self.head_dim is None:
            wanted = f"a multiple of num_attention_heads = {self.num_attention_heads}, or head_dim be given"
            need(self.hidden_size % self.num_attention_heads == 0, "hidden_size", wanted)
            put("head_dim", self.hidden_size // self.num_attention_heads)
        fits = type(self.head_dim) is int and 0 < self.head_dim < 2**16
        if "rope_parameters" in dialect.fields:
            need(fits and self.head_dim % 2 == 0, "head_dim", "even and positive")  # type: ignore[operator]
        else:
            need(
                fits and self._plain_heads,
                "head_dim",
                "hidden_size / num_attention_heads, and nothing else",
            )
        fits = self.num_attention_heads % self.kv_heads == 0
        need(
            fits,
            "num_key_value_heads",
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            need(type(value) in (int, float) and 0 < value < 1e300, name, "a positive number")
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            need(isinstance(getattr(self, name), bool), name, "true or false")
        window, first, types = self.sliding_window, self.max_window_layers, self.layer_types
        need(window is None or _is_size(window), "sliding_window", "a positive integer, or null")
        need(
            type(first) is int and 0 <= first < 2**31,
            "max_window_layers",
            "an integer of at least 0",
        )
        if types is not None:
            listed = isinstance(types, (list, tuple)) and all(t in LAYER_TYPES for t in types)
            count = self.num_hidden_layers
            need(
                listed and len(types) == count,
                "layer_types",
                f"{count} of {', '.join(LAYER_TYPES)}, or null",
            )
            need(
                window is not None or LAYER_TYPES[1] not in types,
                "sliding_window",
                f"given for {LAYER_TYPES[1]}",
            )
            put("layer_types", tuple(types))
        need(isinstance(self.rope_parameters, Mapping), "rope_parameters", "an object")
        defaults: dict[str, Any] = {
            "attention_bias": False,
            "mlp_bias": False,
            "sliding_window": None,
        }
        defaults |= {"max_window_layers": 0, "layer_types": None, "rope_parameters": {}}
        for name, default in {**defaults, "num_key_value_heads": self.num_attention_heads}.items():
            same = name in dialect.fields or getattr(self, name) == default
            need(same, name, f"{default!r}, since the model_type is {self.model_type}")
        if "rope_parameters" in dialect.fields:
            put(
                "rope_parameters",
                {"rope_type": "default", "rope_theta": 10000.0, **self.rope_parameters},
            )
            rotary_frequencies(self)  # raises where the rotary parameters do not fit

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Has each head of q and k an RMSNorm before it is rotated?"""
        return self.model_type == "qwen3"

    @property
    def _plain_heads(self) -> bool:
        return self.head_dim == self.hidden_size // self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """How many positions attention sees in this layer, the newest among them; None: all."""
        slides = (
            layer >= self.max_window_layers
            if self.layer_types is None
            else self.layer_types[layer] == LAYER_TYPES[1]
        )
        return self.sliding_window if slides else None

    def parameter_count(self) -> int:
        """How many weights the model has; a tied head counts once."""
        C, D, H, K, V = (
            self.hidden_size,
            self.head_dim or 0,
            self.num_attention_heads,
            self.kv_heads,
            self.vocab_size,
        )
        M, tables = self.intermediate_size, 1 if self.tie_word_embeddings else 2
        if self.model_type == "gpt2":
            layer = (
                4 * C * C + 2 * C * M + (4 * C) + (C + M) + 4 * C
            )  # products, their biases, two norms
            return (
                (tables * V + self.max_position_embeddings) * C
                + self.num_hidden_layers * layer
                + 2 * C
            )
        layer = 2 * C * D * (H + K) + 3 * C * M + 2 * C + 2 * D * self.qk_norm
        layer += (
            (H + 2 * K) * D * self.qkv_bias + C * self.attention_bias + (2 * M + C) * self.mlp_bias
        )
        return tables * V * C + self.num_hidden_layers * layer + C

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """From config.json as transformers writes it today, or did before `rope_parameters` and `dtype`."""
        config = dict(config)
        kind = config.pop("model_type", None)
        if kind not in MODEL_TYPES:
            raise ConfigError(
                f"config: model_type must be one of {', '.join(MODEL_TYPES)}, got {kind!r}"[:500]
            )
        dialect = DIALECTS[kind]
        for name, value in dialect.demands.items():
            if config.get(name, value) is not value:
                raise ConfigError(
                    f"config: {name} must be {str(value).lower()}, got {config[name]!r}"[:500]
                )
        rope = _rope(config) if "rope_parameters" in dialect.fields else {}
        there = {name: dialect.names.get(name, name) for name in dialect.fields}
        given = {
            **dialect.absent,
            **{name: config.pop(key) for name, key in there.items() if key in config},
        }
        missing = sorted(there[name] for name in REQUIRED if name not in given)
        if missing:
            raise ConfigError(f"config: missing {', '.join(missing)}")
        if "layer_types" in dialect.fields and not config.get("use_sliding_window"):
            given["sliding_window"] = None
        return cls(**{**given, "rope_parameters": rope}, model_type=kind, extra=config)

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """For config.json, in the dialect of its type of model."""
        dialect = DIALECTS[self.model_type]
        own = {dialect.names.get(name, name): getattr(self, name) for name in dialect.fields}
        if "rope_parameters" in dialect.fields:
            own["rope_parameters"] = dict(self.rope_parameters)
        if "layer_types" in dialect.fields:
            types = own.pop("layer_types")
            own |= {"use_sliding_window": self.sliding_window is not None}
            own |= {} if types is None else {"layer_types": list(types)}
        if self.model_type == "qwen2" and self._plain_heads:
            del own["head_dim"]  # as transformers, which reads it but does not write it
        if own.get("n_inner") == 4 * self.hidden_size:
            own["n_inner"] = None
        stale = (
            "torch_dtype",
            "quantization_config",
        )  # the first is now `dtype`, the second is its weights' affair
        extra = {k: v for k, v in self.extra.items() if k not in stale}
        return {
            "architectures": [dialect.architecture],
            **extra,
            **own,
            "model_type": self.model_type,
            "dtype": dtype,
        }


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Take the rotary parameters out of a config.json, whichever of three spellings it has."""
    rope, scaling = (config.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    if not (isinstance(rope, Mapping) and isinstance(scaling, Mapping)):
        raise ConfigError("config: rope_parameters, or rope_scaling, must be an object")
    scaling = dict(scaling)
    if "type" in scaling:  # the oldest spelling
        scaling["rope_type"] = scaling.pop("type")
    theta = config.pop("rope_theta", None)
    return {**scaling, **({} if theta is None else {"rope_theta": theta}), **rope}


def rotary_frequencies(config: TransformerConfig) -> np.ndarray:
    """theta^(-2i/D) for i < D/2, float64, changed as `rope_type` says (Su et al. 2021; Llama 3's rule for "llama3")."""
    p, D = config.rope_parameters, config.head_dim
    assert D is not None

    def number(name: str) -> float:
        value = p.get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 1e-30 < value < 1e30
        ):
            raise ConfigError(
                f"config: rope_parameters.{name} must be a positive number, got {value!r}"[:500]
            )
        return float(value)

    if p["rope_type"] not in ROPE_TYPES:
        raise ConfigError(
            f"config: rope_type must be one of {', '.join(ROPE_TYPES)}, got {p['rope_type']!r}"[
                :500
            ]
        )
    if any(isinstance(value, Mapping) for value in p.values()):
        raise ConfigError(
            "config: rope_parameters must be those of all layers: sets by type of layer are not supported"
        )
    if p.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(
            "config: rope_parameters.partial_rotary_factor must be 1: all of a head is rotated"
        )
    frequency = number("rope_theta") ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    if p["rope_type"] == "linear":
        return frequency / number("factor")
    if p["rope_type"] == "llama3":
        # Long waves are stretched by `factor`, short ones kept, those between interpolated.
        low, high, old = (
            number("low_freq_factor"),
            number("high_freq_factor"),
            number("original_max_position_embeddings"),
        )
        if high <= low:
            raise ConfigError(
                f"config: rope_parameters.high_freq_factor must be above low_freq_factor = {low}, got {high}"
            )
        turns = old * frequency / (2 * math.pi)  # full turns within the old context
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * (keep + (1 - keep) / number("factor"))
    return frequency
