"""What an adapter is to be: PEFT's fields and defaults, checked once, read from and written to adapter_config.json."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..formats import PEFT_CONFIG_DEFAULTS
from .patterns import Pattern
from .targets import pattern_value

# What target_modules=None means, by the model's type (PEFT's table).
_LLAMA = ["q_proj", "v_proj"]
DEFAULT_TARGETS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": ["c_attn"],
}
MAX_NAMES = 10_000  # a list of targets longer than any model is a mistake, or an attack
MAX_PATTERNS, MAX_BRANCHING = (
    2000,
    2000,
)  # patterns, and states of those with a choice: no file takes many seconds


@dataclasses.dataclass
class LoraConfig:
    """Low-rank adaptation, dW = s B A (Hu et al. 2021).

    r, lora_alpha      rank, and the numerator of the scaling s = lora_alpha / r
    target_modules     names or endings of names; a pattern for whole names; "all-linear": every linear layer but
                       the head; None: what PEFT takes for this type of model
    exclude_modules    names, endings or a pattern: what is no target after all
    lora_dropout       probability of dropping an element of the adapter's input, in training
    bias               "none"; "all" or "lora_only" also train the base's biases: to disable the adapter is then not
                       to have the base
    use_rslora         s = lora_alpha / sqrt(r)    Kalajdzievski 2023
    use_dora           W' = m (W + dW) / |W + dW|: the length of each row is learnt apart    Liu et al. 2024
    init_lora_weights  True: A uniform within 1/sqrt(in), B zero; "gaussian": A ~ N(0, 1/r^2), B zero; False: B random
    rank_pattern, alpha_pattern    r and lora_alpha for names that match a pattern; the first that matches holds
    layers_to_transform, layers_pattern    only layers of these numbers
    modules_to_save    endings of names of modules that are trained whole, as copies
    trainable_token_indices    rows of the embedding, or by name of several, that are trained, and nothing else of it
    ensure_weight_tying    what adapts an embedding adapts the head that has its weight, too, as one parameter
    fan_in_fan_out     do the base's files hold W as (in, out)? Found out, as in PEFT, and written to the file
    task_type          "CAUSAL_LM" or None

    ConfigError for a value that means nothing.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    extra: dict[str, Any] = dataclasses.field(
        default_factory=dict, repr=False
    )  # of a file: kept, and written back

    peft_type = "LORA"  # a constant of the class, not a field

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            setattr(self, name, getattr(self, name) or {})
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))
        need = self._need
        need(_is_rank(self.r), "r", "an integer of at least 1")
        need(_is_positive(self.lora_alpha), "lora_alpha", "a positive number")
        need(
            _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
            "lora_dropout",
            "in [0, 1)",
        )
        need(self.bias in ("none", "all", "lora_only"), "bias", "'none', 'all' or 'lora_only'")
        known = isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"
        need(known, "init_lora_weights", "True, False or 'gaussian'")
        need(self.task_type in (None, "CAUSAL_LM"), "task_type", "'CAUSAL_LM' or None")
        for name in (
            "use_rslora",
            "use_dora",
            "fan_in_fan_out",
            "inference_mode",
            "ensure_weight_tying",
        ):
            need(isinstance(getattr(self, name), bool), name, "True or False")
        patterns: list[str] = []
        for name, check in (("rank_pattern", _is_rank), ("alpha_pattern", _is_positive)):
            table = getattr(self, name)
            ok = isinstance(table, dict) and all(
                isinstance(k, str) and check(v) for k, v in table.items()
            )
            need(ok, name, "a dictionary from names to positive numbers")
            patterns += table
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            need(
                value is None or isinstance(value, str) or _is_names(value),
                name,
                "a list of names, or a pattern",
            )
            patterns += [value] if isinstance(value, str) and value.lower() != "all-linear" else []
        need(self.target_modules not in ([], ""), "target_modules", "at least one name")
        need(
            self.modules_to_save is None or _is_names(self.modules_to_save),
            "modules_to_save",
            "a list of names",
        )
        tokens = self.trainable_token_indices
        lists = tokens if isinstance(tokens, dict) else {} if tokens is None else {"": tokens}
        ok = (
            all(isinstance(name, str) and _is_tokens(value) for name, value in lists.items())
            and tokens != {}
        )
        need(
            ok,
            "trainable_token_indices",
            "a list of different tokens, or one for each name of a module",
        )
        layers = self.layers_to_transform
        listed = (
            isinstance(layers, list)
            and len(layers) <= MAX_NAMES
            and all(type(i) is int for i in layers)
        )
        need(
            layers is None or type(layers) is int or listed,
            "layers_to_transform",
            "an integer or a list of them",
        )
        pattern = self.layers_pattern
        need(
            pattern is None or isinstance(pattern, str) or _is_names(pattern),
            "layers_pattern",
            "a name or names",
        )
        patterns += [pattern] if isinstance(pattern, str) else pattern or []
        branching = sum(
            p.size for p in map(Pattern, patterns[: MAX_PATTERNS + 1]) if p.width is None
        )
        if len(patterns) > MAX_PATTERNS or branching > MAX_BRANCHING:
            most = f"at most {MAX_PATTERNS} in all, few of them with a choice or a repetition"
            raise ConfigError(
                f"rank_pattern, alpha_pattern and other patterns: {most}; there are {len(patterns)}"
            )
        if (
            layers is not None
            and isinstance(self.target_modules, str)
            and self.target_modules.lower() != "all-linear"
        ):
            raise ConfigError(
                "layers_to_transform needs target_modules as a list: a pattern names its layers itself"
            )
        if layers is None and pattern:
            raise ConfigError(
                "layers_pattern says where the number of a layer stands; it needs layers_to_transform"
            )

    def _need(self, ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}"[:500])

    def rank(self, name: str) -> int:
        """r of the layer `name`."""
        return pattern_value(name, self.rank_pattern, self.r)

    def scaling(self, name: str) -> float:
        """s of the layer `name`."""
        alpha, r = pattern_value(name, self.alpha_pattern, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "adapter_config.json") -> LoraConfig:
        """From the fields of an adapter_config.json.

        A field of PEFT's that is not implemented here may hold its default, null, false or nothing: it is kept and
        written back. Any other value would change what the adapter means, and raises. A name unknown to PEFT is kept
        with a warning.
        """
        kind = config.get("peft_type", "LORA")
        if kind != cls.peft_type:
            raise ConfigError(f"{where}: peft_type must be {cls.peft_type!r}, got {kind!r}"[:500])
        own = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        given = {k: v for k, v in config.items() if k in own}
        extra = {k: v for k, v in config.items() if k not in own and k != "peft_type"}
        for name, value in extra.items():
            default = PEFT_CONFIG_DEFAULTS.get(name)
            if name not in PEFT_CONFIG_DEFAULTS:
                warnings.warn(
                    f"{where}: {name!r:.100} is no field that is known here; it is kept",
                    stacklevel=2,
                )
            elif (
                value
                and value != default
                and name not in ("peft_version", "revision", "auto_mapping")
            ):
                raise ConfigError(f"{where}: {name} = {value!r:.100} is not supported"[:500])
        try:
            return cls(**given, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}"[:500]) from error

    def to_dict(self) -> dict[str, Any]:
        """Every field that PEFT 0.21 writes, for adapter_config.json."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {
            **PEFT_CONFIG_DEFAULTS,
            **self.extra,
            **own,
            "peft_type": self.peft_type,
            "inference_mode": True,
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**24


def _is_tokens(value: Any) -> bool:
    ok = isinstance(value, list) and 0 < len(value) < 2**24 and {*map(type, value)} == {int}
    return ok and min(value) >= 0 and len(set(value)) == len(value)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_NAMES
        and all(isinstance(v, str) and v for v in value)
    )
