"""Which modules a configuration means: PEFT's rules for names.

    Targets    target_modules, exclude_modules; by looser rules modules_to_save
    Patterns   rank_pattern, alpha_pattern
    Layers     layers_to_transform, layers_pattern

Each is made once for many names: what a list of n names means in a model of m modules takes time in
proportion to n + m (see endings.py). The functions are the same for one name.

A module's name is a dotted path, such as model.layers.0.self_attn.q_proj, without line breaks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from .endings import Endings, plain_text
from .patterns import Pattern, UnsupportedPattern, compile_pattern

V = TypeVar("V")


class Targets:
    """What `targets` means: a str is a pattern for whole names, a list holds names or endings.

    An ending begins after a dot: "proj" does not mean "q_proj", but "c_proj" means "attn.c_proj"
    and "mlp.c_proj". With `anywhere` it may begin anywhere: "norm" also means "input_layernorm".
    """

    def __init__(self, targets: str | Iterable[str], anywhere: bool = False) -> None:
        self._pattern = compile_pattern(targets) if isinstance(targets, str) else None
        self._names = [] if isinstance(targets, str) else list(dict.fromkeys(targets))
        self._anywhere = anywhere
        self._endings = Endings()
        for number, name in enumerate(self._names):
            self._endings.add(number, name)

    def mean(self, name: str) -> bool:
        """Do they mean the module `name`?"""
        if self._pattern is not None:
            return self._pattern.fullmatch(name)
        return next(self._find(name), None) is not None

    def group(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Those of `names` that each of the listed names or endings means."""
        groups: dict[str, list[str]] = {target: [] for target in self._names}
        for name in names:
            for number, _ in self._find(name):
                groups[self._names[number]].append(name)
        return groups

    def _find(self, name: str) -> Iterator[tuple[int, int]]:
        starts: Container[int] = range(len(name) + 1) if self._anywhere else _part_starts(name)
        return self._endings.find(name, len(name), starts)


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether `targets` means the module `name`; see `Targets`."""
    return Targets(targets).mean(name)


class Patterns:
    """Patterns for a name, or for an ending of it that begins after a dot."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = list(texts)
        self._plain, self._others = _sort_patterns(self._texts)

    def first(self, name: str) -> int | None:
        """The number of the first pattern that matches, or None."""
        starts = _part_starts(name)
        plain = min((number for number, _ in self._find_plain(name, starts)), default=None)
        for number, pattern in self._others:
            if plain is not None and plain < number:
                break
            if _matches_ending(pattern, name, starts):
                return number
        return plain

    def unused(self, names: Iterable[str]) -> list[str]:
        """The patterns that match none of `names`."""
        used: set[int] = set()
        for name in names:
            starts = _part_starts(name)
            used.update(number for number, _ in self._find_plain(name, starts))
            for number, pattern in self._others:
                if number not in used and _matches_ending(pattern, name, starts):
                    used.add(number)
        return [text for number, text in enumerate(self._texts) if number not in used]

    def _find_plain(self, name: str, starts: Container[int]) -> Iterable[tuple[int, int]]:
        return self._plain.find(name, len(name), starts)


_patterns = lru_cache(maxsize=64)(Patterns)


def pattern_value(name: str, patterns: Mapping[str, V], default: V) -> V:
    """The value of the first key that matches `name` or an ending of it that begins after a dot."""
    if not patterns:
        return default
    keys = tuple(patterns)
    number = _patterns(keys).first(name)
    return default if number is None else patterns[keys[number]]


class Layers:
    """The modules in the layers `wanted`; None or an empty list mean all of them.

    The number of the layer that contains a module is, without `layers_pattern`, the first number
    with two parts before it and one after: 0 in "model.layers.0.mlp", but none in "layers.0.mlp".
    PEFT has this trap, and a file must mean the same modules here. With `layers_pattern` it is the
    number after the first part that matches, for the first pattern that has one.
    """

    def __init__(
        self,
        wanted: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
    ) -> None:
        self._wanted = {wanted} if isinstance(wanted, int) else set(wanted or ())
        texts = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
        self._has_pattern = bool(layers_pattern)
        self._plain, self._others = _sort_patterns(texts)
        for number, pattern in self._others:
            if pattern.lazy:  # `re` would prefer another of several numbers
                raise UnsupportedPattern(
                    f"layers_pattern {texts[number]!r:.120} has a lazy repetition such as *?: "
                    "leave out its ?"
                )

    def contain(self, name: str) -> bool:
        """Is the module `name` in one of the layers?"""
        return not self._wanted or self.index(name) in self._wanted

    def index(self, name: str) -> int | None:
        """The number of the layer that contains the module `name`, or None."""
        if not self._has_pattern:
            parts = name.split(".")
            return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
        numbers = _numbers_after(name)
        starts = _part_starts(name)
        # As `re` does: the first pattern, its first match, and the last end of that match.
        best: tuple[int, int, int] | None = None
        for end in numbers:
            for pattern, start in self._plain.find(name, end, starts):
                candidate = pattern, start, -end
                best = candidate if best is None else min(best, candidate)
        for pattern, compiled in self._others:
            if best is not None and best[0] < pattern:
                break
            for start in sorted(starts):
                ends = compiled.ends(name, {start}) & numbers.keys()
                if ends:
                    return numbers[max(ends)]
        return None if best is None else numbers[-best[2]]


def layer_index(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The number of the layer that contains the module `name`, or None; see `Layers`."""
    return Layers(None, layers_pattern).index(name)


def in_layers(
    name: str,
    layers_to_transform: int | Sequence[int] | None,
    layers_pattern: str | Sequence[str] | None = None,
) -> bool:
    """Whether the module `name` is in one of the layers; see `Layers`."""
    return Layers(layers_to_transform, layers_pattern).contain(name)


def _sort_patterns(texts: Iterable[str]) -> tuple[Endings, list[tuple[int, Pattern]]]:
    """The plain ones of some patterns, and the others in their order, by their numbers."""
    plain = Endings()
    others = []
    for number, pattern in enumerate(texts):
        text = plain_text(pattern)
        if text is None:
            others.append((number, compile_pattern(pattern)))
        else:
            plain.add(number, text)
    return plain, others


def _matches_ending(pattern: Pattern, name: str, starts: set[int]) -> bool:
    """Does the pattern match an ending of `name` that begins at one of `starts`?"""
    # A pattern without a choice can only begin at one position.
    possible = starts if pattern.width is None else starts & {len(name) - pattern.width}
    return bool(possible) and len(name) in pattern.ends(name, possible)


def _part_starts(name: str) -> set[int]:
    """The positions where a part of the dotted path begins."""
    return {0, *(at + 1 for at, char in enumerate(name) if char == ".")}


def _numbers_after(name: str) -> dict[int, int]:
    """The parts of a path that are numbers, with another part after, by the dot before them."""
    numbers = {}
    at = 0
    *parts, _ = name.split(".")
    for part in parts:
        if at and part.isdecimal():
            numbers[at - 1] = int(part)
        at += len(part) + 1
    return numbers
