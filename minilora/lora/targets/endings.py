"""Many plain texts looked up at once among the endings of one name.

A plain pattern is a text in which some characters, its unescaped dots, stand for any character. All
plain patterns of one width that have these in the same places are one dictionary, whose keys are
their other characters. So a name takes one look into a dictionary for each width and each set of
places that occur, however many patterns there are: a model's names take time in proportion to their
number, and not to that times the number of patterns. Only where every pattern has its dots in other
places does each of them take a look of its own, which is the time that `re` takes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from .patterns import MAX_LENGTH

ANY = ""  # in the place of a character: every character fits
Spans = tuple[tuple[int, int], ...]  # where the literal characters of a pattern are: [start, end)
Texts = tuple[str, ...]  # these characters


class Endings:
    """Texts by their numbers. A text is a sequence of characters and ANY."""

    def __init__(self) -> None:
        self._tables: dict[int, dict[Spans, dict[Texts, list[int]]]] = {}  # first by width

    def add(self, number: int, text: Sequence[str]) -> None:
        """Let `text` be found by `number`."""
        spans = _literal_spans(text)
        key = tuple("".join(text[start:end]) for start, end in spans)
        table = self._tables.setdefault(len(text), {}).setdefault(spans, {})
        table.setdefault(key, []).append(number)

    def find(self, name: str, end: int, starts: Container[int]) -> Iterator[tuple[int, int]]:
        """(number, start) of every text that fits name[start:end], for a start in `starts`."""
        for width, tables in self._tables.items():
            first = end - width
            if first not in starts:
                continue
            for spans, table in tables.items():
                key = tuple([name[first + start : first + stop] for start, stop in spans])
                for number in table.get(key, ()):
                    yield number, first


def _literal_spans(text: Sequence[str]) -> Spans:
    if ANY not in text or isinstance(text, str):
        return ((0, len(text)),)
    spans = []
    start = 0
    for at, character in enumerate([*text, ANY]):
        if character == ANY:
            if start < at:
                spans.append((start, at))
            start = at + 1
    return tuple(spans)


def plain_text(pattern: str) -> list[str] | None:
    """The characters, or ANY, that a regular expression means one after another.

    None if it has a choice, a class or a repetition, or is not valid: that is for `Pattern`.
    """
    if len(pattern) > MAX_LENGTH:
        return None
    text = []
    characters = iter(pattern)
    for character in characters:
        if character in "()[]{}*+?|^$":
            return None
        if character == ".":
            character = ANY
        elif character == "\\":
            character = next(characters, "")
            if not character or character.isalnum():
                return None
        text.append(character)
    return text
