"""The configuration of an adapter: PEFT's fields and defaults, checked, read and written."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

from ..errors import (
    ConfigError,
    Rule,
    check_fields,
    integer_rules,
    is_flag,
    is_number,
    number_rules,
    optional,
    rules_for,
)
from ..formats import PEFT_CONFIG_DEFAULTS
from ..formats.disk import JsonObject
from .starts.values import NAMES, find_start
from .targets.endings import plain_text
from .targets.patterns import MAX_STATES, MAX_VISITS_PER_LETTER, compile_pattern
from .targets.rules import Layers, pattern_value

# The targets of target_modules=None, by type of model (PEFT's table).
DEFAULT_TARGETS = {name: ["q_proj", "v_proj"] for name in ("llama", "mistral", "qwen2", "qwen3")}
DEFAULT_TARGETS["gpt2"] = ["c_attn"]
HARMLESS = ("peft_version", "revision", "auto_mapping")  # PEFT's fields that change no meaning

# How training began, and for which task, is stored beside the configuration: the start is over, and
# the task chooses PEFT's class of model. These starts leave the base as it is.
UNCHANGED = ("orthogonal", "eva", "mica")
TASKS = ("FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
# These change the base: see starts/residual.py. pissa_niter_N has any N.
CHANGED = ("pissa", "olora", "loftq", "corda", "lora_ga")
# The fields of a file that say more about its start, which must be the one that reads them.
START_FIELDS = {f"{start}_config": start for start in ("eva", "corda", "lora_ga", "loftq")}
MAX_COUNT = 2**24  # ranks and numbers of steps are below it
MAX_NAMES = 10_000  # a list of targets longer than any model is a mistake, or an attack

# Limits for the patterns of one file, for their states, and for the states that those with a choice
# follow at each letter, so that reading a file never takes many seconds.
MAX_PATTERNS = 2000
MAX_BRANCHING = 2000

# ---- the rules for fields ----------------------------------------------------------------------


def _is_names(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        return False
    return all(isinstance(name, str) and name for name in value)


def _is_names_or_pattern(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_names(value)


def is_pattern(value: Any) -> TypeGuard[str]:
    """Is this a pattern for whole names, and neither a list of names nor "all-linear"?"""
    return isinstance(value, str) and value.lower() != "all-linear"


def _is_layers(value: Any) -> bool:
    if not isinstance(value, list):
        return value is None or type(value) is int
    return len(value) <= MAX_NAMES and all(type(i) is int for i in value)


def _is_token_list(value: Any) -> bool:
    if not isinstance(value, list) or not 0 < len(value) < 2**24 or {*map(type, value)} != {int}:
        return False
    return min(value) >= 0 and len(set(value)) == len(value)


def _is_tokens(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None or _is_token_list(value)
    return value != {} and all(
        isinstance(name, str) and _is_token_list(tokens) for name, tokens in value.items()
    )


def _table_rule(field: str, rule: Rule) -> Rule:
    """The rule that a field is a dictionary from names to values that another rule allows."""

    def is_table(table: Any) -> bool:
        if not isinstance(table, dict):
            return False
        return all(isinstance(key, str) and rule.is_valid(value) for key, value in table.items())

    return Rule(field, is_table, f"a dictionary in which each name has {rule.wanted}")


SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "ensure_weight_tying")
_is_scalar = functools.partial(is_number, kinds=(int, float))
(_RANK,) = integer_rules("r", least=1, limit=MAX_COUNT)
(_ALPHA,) = number_rules("lora_alpha", is_kind=_is_scalar, least=0, below=1e300)
RULES = [
    _RANK,
    _ALPHA,
    *number_rules("lora_dropout", is_kind=_is_scalar, least=0, below=1),
    Rule("bias", ("none", "all", "lora_only").__contains__, "'none', 'all' or 'lora_only'"),
    Rule(
        "init_lora_weights",
        lambda value: is_flag(value) or value == "gaussian" or find_start(value) is not None,
        f"True, False, 'gaussian', {', '.join(map(repr, NAMES))}",
    ),
    Rule("task_type", (None, "CAUSAL_LM").__contains__, "'CAUSAL_LM' or None"),
    *rules_for(SWITCHES, is_flag, "True or False"),
    _table_rule("rank_pattern", _RANK),
    _table_rule("alpha_pattern", _ALPHA),
    Rule("target_modules", _is_names_or_pattern, "a list of names, or a pattern"),
    Rule("target_modules", lambda value: value not in ([], ""), "at least one name"),
    Rule("exclude_modules", _is_names_or_pattern, "a list of names, or a pattern"),
    Rule("modules_to_save", optional(_is_names), "a list of names"),
    Rule(
        "trainable_token_indices",
        _is_tokens,
        "a list of different tokens, or one for each name of a module",
    ),
    Rule("layers_to_transform", _is_layers, "an integer or a list of them"),
    Rule("layers_pattern", _is_names_or_pattern, "a name or names"),
]

# ---- the configuration -------------------------------------------------------------------------


@dataclasses.dataclass
class LoraConfig:
    """Low-rank adaptation, dW = s B A (Hu et al. 2021).

    A is (r, in) and B (out, r), for y = x W^T. Where a lesson has y = x W and dW = A B, its A and B
    are these two transposed.

    r, lora_alpha      rank, and the numerator of the scaling s = lora_alpha / r
    target_modules     names or endings of names; a pattern for whole names; "all-linear": every
                       linear layer but the head; None: PEFT's choice for this type of model
    exclude_modules    names, endings or a pattern: modules that are not targets after all
    lora_dropout       probability of dropping an element of the adapter's input, in training
    bias               "none"; "all" or "lora_only" also train the base's biases, and the model with
                       the adapter disabled is then not the base
    use_rslora         s = lora_alpha / sqrt(r)    Kalajdzievski 2023
    use_dora           W' = m (W + dW) / |W + dW|: row lengths are trained apart    Liu et al. 2024
    init_lora_weights  True: A uniform within 1/sqrt(in), B zero; "gaussian": A ~ N(0, 1/r^2), B
                       zero; False: B random; or the name of a start: see starts/
    rank_pattern, alpha_pattern    r and lora_alpha of names that match a pattern; the first counts
    layers_to_transform, layers_pattern    only layers of these numbers
    modules_to_save    endings of names of modules that are trained whole, as copies
    trainable_token_indices    rows of the embedding, or by module name rows of several, that are
                       trained; their other rows are frozen
    ensure_weight_tying    one parameter adapts both the embedding and the head tied to it
    fan_in_fan_out     whether the base's files store W as (in, out); as in PEFT it is detected, and
                       written to the file
    task_type          "CAUSAL_LM" or None
    extra              what is written back unchanged: other fields of a file, and values of these
                       that say how training began, such as init_lora_weights="eva"

    ConfigError for a value that has no meaning.
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
    extra: JsonObject = dataclasses.field(default_factory=dict, repr=False)

    peft_type = "LORA"  # a constant of the class, not a field

    def __post_init__(self) -> None:
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, set):
                setattr(self, name, sorted(value))
            elif isinstance(value, tuple):
                setattr(self, name, list(value))
        check_fields(vars(self), RULES)
        self._check_patterns()
        layered = self.layers_to_transform is not None
        if layered and is_pattern(self.target_modules):
            raise ConfigError(
                "layers_to_transform needs target_modules as a list; a pattern for whole names "
                "chooses the layers itself"
            )
        if self.layers_pattern and not layered:
            raise ConfigError(
                "layers_pattern names the part before a layer's number, so it needs "
                "layers_to_transform: set that too"
            )

    def _check_patterns(self) -> None:
        """ConfigError for an invalid pattern, or for patterns that would take long to match."""
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        for text in self.target_modules, self.exclude_modules:
            if is_pattern(text):
                patterns.append(text)
        layers = self.layers_pattern or []
        patterns += [layers] if isinstance(layers, str) else layers
        Layers(None, layers)  # raises for a pattern that could mean another number than in PEFT
        branching = size = 0
        for text in patterns[: MAX_PATTERNS + 1]:
            if size > MAX_STATES or plain_text(text) is not None:
                continue
            pattern = compile_pattern(text)
            size += pattern.size
            if pattern.width is None:
                branching += min(pattern.size, MAX_VISITS_PER_LETTER)
        if len(patterns) > MAX_PATTERNS or branching > MAX_BRANCHING or size > MAX_STATES:
            raise ConfigError(
                f"rank_pattern, alpha_pattern and the other fields hold {len(patterns)} patterns: "
                f"at most {MAX_PATTERNS} in all, few of them with a choice or a repetition"
            )

    def rank(self, name: str) -> int:
        """r of the layer `name`."""
        return pattern_value(name, self.rank_pattern, self.r)

    def layer_alpha(self, name: str) -> float:
        """lora_alpha of the layer `name`."""
        return pattern_value(name, self.alpha_pattern, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """s of the layer `name`."""
        alpha = self.layer_alpha(name)
        r = self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "adapter_config.json") -> LoraConfig:
        """The configuration from the fields of an adapter_config.json.

        A PEFT field that is not implemented here may have its default, null, false or an empty
        value: it is kept and written back. Any other value would change the meaning of the adapter,
        and raises. A name unknown to PEFT is kept with a warning.
        """
        kind = config.get("peft_type", "LORA")
        if kind != cls.peft_type:
            raise ConfigError(f"{where}: peft_type must be {cls.peft_type!r}, got {kind!r:.200}")
        names = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        given = {}
        extra = {}
        for name, value in config.items():
            if is_file_only(name, value, cls.peft_type):
                extra[name] = value
                continue
            if name in names:
                given[name] = value
                continue
            if name == "peft_type":
                continue
            extra[name] = value
            if name not in PEFT_CONFIG_DEFAULTS and value:
                warnings.warn(
                    f"{where}: {name!r:.100} is not a known field; it is kept", stacklevel=2
                )
            elif START_FIELDS.get(name, "-") == config.get("init_lora_weights"):
                continue
            elif value and value != PEFT_CONFIG_DEFAULTS[name] and name not in HARMLESS:
                raise ConfigError(f"{where}: {name} = {value!r:.100} is not supported")
        try:
            return cls(**given, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def to_dict(self) -> JsonObject:
        """Every field that PEFT 0.21 writes to adapter_config.json."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["extra"]
        return {
            **PEFT_CONFIG_DEFAULTS,
            **values,
            **self.extra,
            "peft_type": self.peft_type,
            "inference_mode": True,
        }


def is_file_only(field: str, value: Any, peft_type: str) -> bool:
    """Does this field say how training began, or for which task, with a value of files alone?"""
    if field == "init_lora_weights":
        is_changed = peft_type == "LORA" and name_of_changed_start(value) != ""
        return is_changed or value in UNCHANGED
    return field == "task_type" and value in TASKS


def name_of_changed_start(value: Any) -> str:
    """PEFT's name of a start that changes the base, for a value of init_lora_weights; or ""."""
    start = find_start(value)
    if start is not None and start.changes_base:
        return start.word
    if isinstance(value, str) and (value in CHANGED or value.lower() == "olora"):
        return value.lower()
    return ""


# The fields of an adapter_config.json that say nothing of how training began.
NO_START: JsonObject = {
    **dict.fromkeys(START_FIELDS),
    "loftq_config": {},
    "init_lora_weights": True,
}


def plain_fields(r: int) -> JsonObject:
    """The fields of adapter_config.json that give every layer rank r and s = 1, over the base."""
    fields: JsonObject = {"peft_type": "LORA", "r": r, "lora_alpha": r, "use_rslora": False}
    # PEFT looks at how an adapter began when it loads it, too, and not every start has any rank.
    return {**fields, **NO_START, "rank_pattern": {}, "alpha_pattern": {}}
