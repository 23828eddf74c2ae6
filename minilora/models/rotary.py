"""Rotary positions: how a config.json words their parameters, and the frequencies that follow.

Contents: pop_rope_parameters, every spelling in a file - complete_rope_parameters, what
transformers assumes for a missing field - rotary_frequencies. A head has D channels, so D/2 planes;
plane i turns by frequency[i] radians from one position to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, Predicate, Rule, check_fields, is_flag, is_number, optional
from ..formats.disk import JsonObject

DEFAULT_THETA = 10000.0
OLD_CONTEXT = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"

# ---- what each type takes -----------------------------------------------------------------------

_is_positive = is_number(above=1e-30, below=1e30, kinds=(int, float))
_is_weight = is_number(least=0, below=1e30, kinds=(int, float))
POSITIVE = _is_positive, "a positive number"
WEIGHT = optional(_is_weight), "a number of at least 0, or null"
FRACTION = (lambda value: _is_positive(value) and value <= 1), "above 0 and at most 1"
WHOLE = (lambda value: _is_positive(value) and value == 1), "1: all of a head is rotated"
NULL_OR_WHOLE = optional(WHOLE[0]), WHOLE[1]

# The fields of each rope_type: which values are valid, and that in words. A tuple of three has the
# value of a missing field at its end; the others are required. rope_theta is a field of all.
Field = tuple[Predicate, str] | tuple[Predicate, str, Any]
LLAMA3: dict[str, Field] = {
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    OLD_CONTEXT: POSITIVE,
    PARTIAL: (*WHOLE, 1),
}
YARN: dict[str, Field] = {
    "factor": (optional(_is_positive), "a positive number, or null"),
    OLD_CONTEXT: POSITIVE,
    "attention_factor": (optional(_is_positive), "a positive number, or null", None),
    "beta_fast": (*WEIGHT, None),
    "beta_slow": (*WEIGHT, None),
    "mscale": (*WEIGHT, None),
    "mscale_all_dim": (*WEIGHT, None),
    "truncate": (is_flag, "true or false", True),
    PARTIAL: (*WHOLE, 1),
}
ROPE_FIELDS: dict[str, dict[str, Field]] = {
    "default": {PARTIAL: (*NULL_OR_WHOLE, 1)},
    "linear": {"factor": POSITIVE, PARTIAL: (*WHOLE, 1)},
    "llama3": LLAMA3,
    "yarn": YARN,
    "proportional": {"factor": (*POSITIVE, 1.0), PARTIAL: (*FRACTION, 1.0)},
    "dynamic": {"factor": POSITIVE, PARTIAL: (*WHOLE, 1)},
}
NOTES = ("rope_type", "rope_theta", "finetuned")  # of every type; YaRN's own files have the last
LARGEST = 2**31 - 1
ROPE_TYPES = tuple(ROPE_FIELDS)

# ---- reading ------------------------------------------------------------------------------------


def pop_rope_parameters(config: JsonObject) -> JsonObject:
    """Take the rotary parameters out of a config.json, with the precedence of transformers 5.23.

    rope_scaling   the old name of rope_parameters; it replaces that object whole
    rope_theta, partial_rotary_factor   beside the object: for what the object lacks
    original_max_position_embeddings    beside the object: it replaces the object's (llama3, yarn)
    """
    objects = {name: config.pop(name, None) for name in ("rope_parameters", "rope_scaling")}
    for name, value in objects.items():
        if not (value is None or isinstance(value, Mapping)):
            raise ConfigError(f"config: {name} must be an object, got {value!r:.200}")
    parameters = dict(objects["rope_scaling"] or objects["rope_parameters"] or {})
    parameters.setdefault("rope_theta", config.pop("rope_theta", DEFAULT_THETA))
    partial = config.pop(PARTIAL, None)
    if partial is not None:
        parameters.setdefault(PARTIAL, partial)
    if OLD_CONTEXT in config and OLD_CONTEXT in _fields(_type(parameters)):
        parameters[OLD_CONTEXT] = config.pop(OLD_CONTEXT)
    return parameters


def complete_rope_parameters(parameters: Mapping[str, Any], context: int) -> JsonObject:
    """The parameters with rope_type, rope_theta and the old context, as transformers assumes them.

    context   max_position_embeddings
    """
    kind = _type(parameters)
    complete = {name: value for name, value in parameters.items() if name != "type"}
    complete["rope_type"] = kind
    complete.setdefault("rope_theta", DEFAULT_THETA)
    if OLD_CONTEXT in _fields(kind):
        complete.setdefault(OLD_CONTEXT, context)
    return complete


def _type(parameters: Mapping[str, Any]) -> Any:
    """rope_type or, as older files call it, type."""
    return parameters.get("rope_type", parameters.get("type", "default"))


def _fields(kind: Any) -> dict[str, Field]:
    return ROPE_FIELDS.get(kind, {}) if isinstance(kind, str) else {}


def unused_rope_fields(parameters: Mapping[str, Any]) -> list[str]:
    """The names of the parameters that mean nothing to their rope_type."""
    used = {*NOTES, *_fields(parameters["rope_type"])}
    return [f"rope_parameters.{name}" for name in parameters if name not in used]


def longest_context(parameters: Mapping[str, Any], context: int) -> int:
    """How many positions complete parameters are for: linear and yarn stretch the old context.

    Many files keep the old context in max_position_embeddings, which is `context` here.
    """
    stretched: float = context
    if parameters["rope_type"] == "linear":
        stretched = context * parameters["factor"]
    if parameters["rope_type"] == "yarn" and parameters["factor"] is not None:
        stretched = parameters[OLD_CONTEXT] * parameters["factor"]
    return max(context, int(min(stretched, LARGEST)))


# ---- frequencies --------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """frequencies (D/2,) in float64, and the factor of every cos and sin."""

    frequencies: np.ndarray
    scale: float


def rotary_frequencies(parameters: Mapping[str, Any], D: int, context: int) -> Rotation:
    """The rotation that complete parameters describe; ConfigError names an invalid one.

    Without a change plane i has frequency theta^(-2i/D) (Su et al. 2021); `rope_type` says how it
    changes for a context that is longer than the one of the first training.

    context   max_position_embeddings
    """
    values = _checked(parameters)
    theta = float(values["rope_theta"])
    plain = theta ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    kind = parameters["rope_type"]
    if kind == "linear":
        return Rotation(plain / values["factor"], 1.0)
    if kind == "llama3":
        return Rotation(_llama3(plain, values), 1.0)
    if kind == "yarn":
        return _yarn(plain, values, context)
    if kind == "proportional":  # the first planes turn; the others have frequency 0
        turning = int(values[PARTIAL] * D // 2)
        return Rotation(np.where(np.arange(D // 2) < turning, plain, 0) / values["factor"], 1.0)
    if kind == "dynamic" and D == 2:
        raise ConfigError("config: rope_type dynamic needs a head_dim above 2, got 2")
    return Rotation(plain, 1.0)  # also dynamic's, which changes only beyond `context`


def _checked(parameters: Mapping[str, Any]) -> JsonObject:
    """The parameters that the rope_type has, each checked; missing ones have their default."""
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ConfigError(
            "config: rope_parameters must be those of all layers: "
            "one set for each type of layer is not supported"
        )

    def check(name: str, value: Any, is_valid: Predicate, wanted: str) -> None:
        field = f"rope_parameters.{name}"
        check_fields({field: value}, [Rule(field, is_valid, wanted)], "config: ")

    kind = parameters["rope_type"]
    check("rope_type", kind, lambda _: _fields(kind) != {}, f"one of {', '.join(ROPE_TYPES)}")
    values: JsonObject = {}
    for name, (is_valid, wanted, *default) in {"rope_theta": POSITIVE, **_fields(kind)}.items():
        if name not in parameters and not default:
            raise ConfigError(
                f"config: rope_parameters.{name} is missing: rope_type {kind} needs it ({wanted})"
            )
        values[name] = parameters.get(name, *default)
        check(name, values[name], is_valid, wanted)
    if kind == "llama3":
        low = values["low_freq_factor"]
        high = values["high_freq_factor"]
        check("high_freq_factor", high, lambda _: high > low, f"above low_freq_factor = {low}")
    if kind == "yarn":
        theta = values["rope_theta"]
        fast = values["beta_fast"] = values["beta_fast"] or 32  # 0 means the default, too
        slow = values["beta_slow"] = values["beta_slow"] or 1
        check("rope_theta", theta, lambda _: theta > 1, "above 1 with rope_type yarn")
        check("beta_fast", fast, lambda _: fast >= slow, f"at least beta_slow = {slow}")
    return values


def _llama3(plain: np.ndarray, values: JsonObject) -> np.ndarray:
    """Llama 3's rule: planes that turn slowly are slowed by `factor`, fast ones kept.

    Those between are interpolated.
    """
    low = values["low_freq_factor"]
    high = values["high_freq_factor"]
    turns: np.ndarray = (
        values[OLD_CONTEXT] * plain / (2 * math.pi)
    )  # full turns within the old context
    keep = np.clip((turns - low) / (high - low), 0, 1)
    slowed: np.ndarray = plain * (keep + (1 - keep) / values["factor"])
    return slowed


def _yarn(plain: np.ndarray, values: JsonObject, context: int) -> Rotation:
    """YaRN (Peng et al. 2023): as `_llama3`, but linear in the plane's number; cos and sin grow.

    A plane that makes `beta_fast` turns within the old context keeps its frequency; one that makes
    `beta_slow` is slowed by `factor`.
    """
    planes = len(plain)
    old_context = values[OLD_CONTEXT]
    factor = values["factor"] or context / old_context

    def plane_with(turns: float) -> float:
        """The plane, a real number, that makes so many turns within the old context."""
        wavelength = old_context / turns
        return planes * math.log(wavelength / (2 * math.pi)) / math.log(values["rope_theta"])

    first = plane_with(values["beta_fast"])
    last = plane_with(values["beta_slow"])
    if values["truncate"]:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, 2 * planes - 1)
    if first == last:
        last += 0.001  # as transformers, which divides by the difference, too
    slowed = np.clip((np.arange(planes) - first) / (last - first), 0, 1)
    frequencies = plain * (1 - slowed) + plain / factor * slowed

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = values["attention_factor"]
    if scale is None:
        scale = growth(1)
        if values["mscale"] and values["mscale_all_dim"]:
            scale = growth(values["mscale"]) / growth(values["mscale_all_dim"])
    return Rotation(frequencies, float(scale))
