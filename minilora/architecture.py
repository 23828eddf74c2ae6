"""The shape of a model, in config.json's own words: read, checked, and written back.

Contents: TransformerConfig - rotary_frequencies, which the rotary parameters decide - RotaryTable, their cos and sin
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import ConfigError

ROPE_TYPES = ("default", "linear", "llama3")
MODEL_TYPES = ("llama",)
ACTIVATIONS = ("silu", "swish")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a model, in config.json's own words. ConfigError names what does not fit.

    num_key_value_heads   None: as many as query heads
    head_dim              None: hidden_size / num_attention_heads
    rope_parameters       {"rope_type": "default" | "linear" | "llama3", "rope_theta": 10000.0, ...}
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
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        def need(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ConfigError(f"config: {name} must be {wanted}, got {getattr(self, name)!r}"[:500])

        need(self.model_type in MODEL_TYPES, "model_type", f"one of {', '.join(MODEL_TYPES)}")
        need(self.hidden_act in ACTIVATIONS, "hidden_act", f"one of {', '.join(ACTIVATIONS)}")
        if self.num_key_value_heads is None:
            put("num_key_value_heads", self.num_attention_heads)
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        for name in [*sizes, "num_key_value_heads", "max_position_embeddings"]:
            value = getattr(self, name)
            need(type(value) is int and 0 < value < 2**31, name, "a positive integer")
        if self.head_dim is None:
            wanted = f"a multiple of num_attention_heads = {self.num_attention_heads}, or head_dim be given"
            need(self.hidden_size % self.num_attention_heads == 0, "hidden_size", wanted)
            put("head_dim", self.hidden_size // self.num_attention_heads)
        need(
            type(self.head_dim) is int and 0 < self.head_dim < 2**16 and self.head_dim % 2 == 0,
            "head_dim",
            "even and positive",
        )
        fits = self.num_attention_heads % self.kv_heads == 0
        need(fits, "num_key_value_heads", f"a divisor of num_attention_heads = {self.num_attention_heads}")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            need(type(value) in (int, float) and 0 < value < 1e300, name, "a positive number")
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            need(isinstance(getattr(self, name), bool), name, "true or false")
        need(isinstance(self.rope_parameters, Mapping), "rope_parameters", "an object")
        put("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, **self.rope_parameters})
        rotary_frequencies(self)  # raises where the rotary parameters do not fit

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    def parameter_count(self) -> int:
        """How many weights the model has; a tied head counts once, biases are left out."""
        C, D, H, K = self.hidden_size, self.head_dim or 0, self.num_attention_heads, self.kv_heads
        layer = 2 * C * D * (H + K) + 3 * C * self.intermediate_size + 2 * C
        return (1 if self.tie_word_embeddings else 2) * self.vocab_size * C + self.num_hidden_layers * layer + C

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """From config.json as transformers writes it today, or did before `rope_parameters` and `dtype`."""
        config = dict(config)
        rope, scaling = (config.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling"))
        if not (isinstance(rope, Mapping) and isinstance(scaling, Mapping)):
            raise ConfigError("config: rope_parameters, or rope_scaling, must be an object")
        scaling = dict(scaling)
        if "type" in scaling:  # the oldest spelling
            scaling["rope_type"] = scaling.pop("type")
        theta = config.pop("rope_theta", None)
        rope = {**scaling, **({} if theta is None else {"rope_theta": theta}), **rope}
        known = {f.name for f in dataclasses.fields(cls)} - {"extra", "rope_parameters"}
        given = {k: v for k, v in config.items() if k in known}
        missing = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"} - set(
            given
        )
        if given.get("model_type") not in MODEL_TYPES:
            raise ConfigError(
                f"config: model_type must be one of {', '.join(MODEL_TYPES)}, got {given.get('model_type')!r}"
            )
        if missing:
            raise ConfigError(f"config: missing {', '.join(sorted(missing))}")
        extra = {k: v for k, v in config.items() if k not in known}
        return cls(**given, rope_parameters=rope, extra=extra)

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """For config.json."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        own["rope_parameters"] = dict(self.rope_parameters)
        stale = "torch_dtype", "quantization_config"  # the first is now `dtype`, the second is its weights' affair
        extra = {k: v for k, v in self.extra.items() if k not in stale}
        return {"architectures": ["LlamaForCausalLM"], **extra, **own, "dtype": dtype}


def rotary_frequencies(config: TransformerConfig) -> np.ndarray:
    """theta^(-2i/D) for i < D/2, float64, changed as `rope_type` says (Su et al. 2021; Llama 3's rule for "llama3")."""
    p, D = config.rope_parameters, config.head_dim
    assert D is not None

    def number(name: str) -> float:
        value = p.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30:
            raise ConfigError(f"config: rope_parameters.{name} must be a positive number, got {value!r}"[:500])
        return float(value)

    if p["rope_type"] not in ROPE_TYPES:
        raise ConfigError(f"config: rope_type must be one of {', '.join(ROPE_TYPES)}, got {p['rope_type']!r}"[:500])
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


class RotaryTable:
    """cos and sin of position * frequency, computed in float64 and rounded once; grows to the longest context seen.

    Laid out as `fused.attention` reads them: a row for all heads of q and k, with the scale 1/sqrt(D) in q's part.
    """

    def __init__(self, config: TransformerConfig):
        self.frequency = rotary_frequencies(config)
        scale = [config.head_dim**-0.5] * config.num_attention_heads + [1.0] * config.kv_heads  # type: ignore[operator]
        self.scale = np.array(scale)[:, None]
        self.tables: dict[tuple[str, Any], tuple[Any, ...]] = {}

    def __call__(self, start: int, stop: int, like: Any) -> tuple[Any, Any]:
        """(cos, sin), each (stop - start, (H + K) D), for positions from start on, in the dtype and place of `like`."""
        key = (like.backend.name, like.dtype)
        table = self.tables.get(key, ())  # read once: another thread may put a shorter one in its place
        if not table or len(table[0]) < stop:
            angle = np.arange(max(64, 1 << (stop - 1).bit_length()))[:, None] * self.frequency  # grows by doubling
            halves = (np.cos(angle), np.cos(angle)), (-np.sin(angle), np.sin(angle))
            full = [(np.concatenate(pair, axis=1)[:, None] * self.scale).reshape(len(angle), -1) for pair in halves]
            table = tuple(like.backend.from_numpy(f.astype(like.dtype)) for f in full)
            self.tables[key] = table
        return table[0][start:stop], table[1][start:stop]
