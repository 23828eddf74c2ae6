"""Which modules a configuration means: PEFT's rules for names.

    matches                  target_modules, exclude_modules
    pattern_value            rank_pattern, alpha_pattern
    layer_index, in_layers   layers_to_transform, layers_pattern

A module's name is a dotted path, such as model.layers.0.self_attn.q_proj, without line breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from .patterns import Pattern

V = TypeVar("V")
_pattern = lru_cache(maxsize=4096)(
    Pattern
)  # a configuration matches each pattern with every module


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether `targets` means the module `name`.

    A str is a pattern for whole names, a list holds names or endings. An ending begins after a dot:
    "proj" does not mean "q_proj", but "c_proj" means "attn.c_proj" and "mlp.c_proj".
    """
    if isinstance(targets, str):
        return _pattern(targets).fullmatch(name)
    return any(name == target or name.endswith(f".{target}") for target in targets)


def pattern_value(name: str, patterns: Mapping[str, V], default: V) -> V:
    """The value of the first key that matches `name` or an ending of it that begins after a dot."""
    starts = _part_starts(name)
    for key, value in patterns.items():
        pattern = _pattern(key)
        # A pattern without a choice (nearly all are names) can only begin at one position.
        possible = starts if pattern.width is None else starts & {len(name) - pattern.width}
        if possible and len(name) in pattern.ends(name, possible):
            return value
    return default


def layer_index(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The number of the layer that contains the module `name`, or None.

    Without `layers_pattern` it is the first number with two parts before it and one after: 0 in
    "model.layers.0.mlp", but None for "layers.0.mlp". PEFT has this trap, and a file must mean the
    same modules here. With `layers_pattern` it is the number after the first part that matches, for
    the first pattern that has one.
    """
    if not layers_pattern:
        parts = name.split(".")
        return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
    texts = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in map(_pattern, texts):
        for start in sorted(_part_starts(name)):
            # Where a pattern can end at several positions, a greedy expression takes the last one.
            for end in sorted(pattern.ends(name, {start}), reverse=True):
                parts = name[end:].split(".")
                if len(parts) > 2 and parts[0] == "" and parts[1].isdecimal():
                    return int(parts[1])
    return None


def in_layers(
    name: str,
    layers_to_transform: int | Sequence[int] | None,
    layers_pattern: str | Sequence[str] | None = None,
) -> bool:
    """Whether the module `name` is in one of the layers; None or an empty list mean all of them."""
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    return not wanted or layer_index(name, layers_pattern) in wanted


def _part_starts(name: str) -> set[int]:
    """The positions where a part of the dotted path begins."""
    return {0, *(at + 1 for at, char in enumerate(name) if char == ".")}
