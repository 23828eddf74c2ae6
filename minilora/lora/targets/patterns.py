"""Regular expressions of the usual subset that cannot hang, for strings from untrusted files.

Over some patterns `re` takes years: `(([a-z]+)*\\.?)*!` on a name of thirty letters. This matcher
follows all ways through a pattern at once (Thompson, "Regular expression search algorithm", 1968):
its time is at most states x letters, whatever the pattern. It does not know what the names mean.

A look-ahead, (?=X) or (?!X), consumes nothing: it passes at the positions where a match of X
begins, or where none does. One pass over the name from its end finds them all, before anything is
matched, so that a look-ahead adds its own states x letters and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ...errors import ConfigError

Test = Callable[[str], bool]  # whether one character fits


@dataclass(frozen=True, eq=False)
class Look:
    """A look-ahead: its states, of which `first` is the first, and whether it is (?!X)."""

    states: range
    first: int
    negated: bool


# What a state asks: that a character fits; or, without a character, that it is at a certain place.
What: TypeAlias = Test | str | Look

# A piece of a pattern: given the state that follows the piece, it adds its own states and returns
# the first of them.
Fragment = Callable[[int], int]

MAX_LENGTH = 30_000  # every layer of a large model by its full name
MAX_DEPTH = 40  # of groups inside each other, so that recursion stays shallow
MAX_REPEAT = 100
MAX_STATES = 30_000

# How many states a pattern may enter in all: these many, and these many for each letter.
MAX_VISITS = 200_000
MAX_VISITS_PER_LETTER = 500

SUPPORTED = (
    r"supported are literals, ., [a-z_0-9], [^.], \d \w \s \D \W \S \b \B \A \Z, \. and the like, "
    r"( ), (?: ), (?P<name> ), (?= ), (?! ), |, *, +, ?, {m}, {m,n} and these with ?, ^, $, up to "
    f"{MAX_LENGTH} characters, {MAX_DEPTH} groups inside each other and {MAX_REPEAT} repetitions"
)
CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}
# States that consume no character: they pass always, only at the start, only at the end, only
# between a character of a word and one of none, only elsewhere.
FREE = ""
START = "^"
END = "$"
EDGE = r"\b"
NO_EDGE = r"\B"
ANCHORS = {"b": EDGE, "B": NO_EDGE, "A": START, "Z": END}  # by the character after a backslash
ACCEPT = 0


class UnsupportedPattern(ConfigError):
    """A pattern that has a meaning for `re`, but is outside the subset."""


class Pattern:
    """A regular expression of the usual subset.

    ConfigError shows one that is invalid or too large, and what is supported; UnsupportedPattern
    one that `re` may know.
    """

    def __init__(self, text: str) -> None:
        parser = _Parser(text)
        self.text = text
        self._states = parser.states
        self._first = parser.parse()
        self._looks = parser.looks  # the inner ones first
        self._visits = 0
        self._letters = 0
        # Lazy repetitions match the same texts, but would prefer the shorter of several matches.
        self.lazy = parser.lazy
        self.size = len(self._states)
        # The number of characters of every match, or None if the pattern has a choice. Then all
        # states can be live at once.
        choice = self._looks or any(len(following) > 1 for _, following in self._states)
        self.width = None if choice else sum(callable(what) for what, _ in self._states)

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of `name` matches, as `re.fullmatch` decides it."""
        return len(name) in self.ends(name, {0})

    def ends(self, name: str, starts: Container[int]) -> set[int]:
        """Every position of `name` where a match can end that begins at a position in `starts`."""
        self._letters += len(name) + 1
        passing = [_passes(name, at) for at in range(len(name) + 1)]
        for look in self._looks:
            begins = self._beginnings(name, look, passing)
            for at, passes in enumerate(passing):
                if (at in begins) != look.negated:
                    passes.add(look)
        ends = set()
        arrived: set[int] = set()
        for at in range(len(name) + 1):
            if at in starts:
                arrived.add(self._first)
            if not arrived:
                continue
            live = self._reachable(arrived, passing[at])
            self._count(len(live))
            if ACCEPT in live:
                ends.add(at)
            arrived = set()
            for state in live:
                what, following = self._states[state]
                if callable(what) and at < len(name) and what(name[at]):
                    arrived.update(following)
        return ends

    def _reachable(self, arrived: set[int], passes: Container[What]) -> set[int]:
        """The states `arrived` and all that follow them without a character.

        passes   the kinds of states that pass here
        """
        live = set(arrived)
        pending = list(arrived)
        while pending:
            what, following = self._states[pending.pop()]
            if what in passes:
                pending += [state for state in following if state not in live]
                live.update(following)
        return live

    def _beginnings(self, name: str, look: Look, passing: list[set[What]]) -> set[int]:
        """The positions of `name` where a match of a look-ahead's pattern begins, wherever it ends.

        From the end of the name back to its start: the states from which a match is found here.
        """
        before: dict[int, list[int]] = {}  # the states before each state
        for state in look.states:
            for after in self._states[state][1]:
                before.setdefault(after, []).append(state)
        begins = set()
        live_after: set[int] = set()  # at the position after this one
        for at in range(len(name), -1, -1):
            self._count(len(look.states))
            live = {ACCEPT}
            for state in look.states:
                what, following = self._states[state]
                consumes = callable(what) and at < len(name) and what(name[at])
                if consumes and not live_after.isdisjoint(following):
                    live.add(state)
            pending = list(live)
            while pending:
                for state in before.get(pending.pop(), ()):
                    if state not in live and self._states[state][0] in passing[at]:
                        live.add(state)
                        pending.append(state)
            if look.first in live:
                begins.add(at)
            live_after = live
        return begins

    def _count(self, visits: int) -> None:
        """ConfigError once so many states were entered that the pattern takes too long."""
        self._visits += visits
        if self._visits > MAX_VISITS + MAX_VISITS_PER_LETTER * self._letters:
            raise ConfigError(
                f"pattern {self.text!r:.120} takes too long: it follows more than "
                f"{MAX_VISITS_PER_LETTER} of its {self.size} states at each letter; write it with "
                "fewer repetitions or alternatives"
            )


def _passes(name: str, at: int) -> set[What]:
    """The kinds of states without a character that pass at this position of `name`."""
    is_word = CLASSES["w"]
    before = at > 0 and is_word(name[at - 1])
    after = at < len(name) and is_word(name[at])
    passes: set[What] = {FREE}
    if at == 0:
        passes.add(START)
    if at == len(name):
        passes.add(END)
    if before != after:
        passes.add(EDGE)
    elif name:  # as in `re`, the empty text has neither
        passes.add(NO_EDGE)
    return passes


compile_pattern = lru_cache(maxsize=4096)(Pattern)  # more than one configuration may hold


class _Parser:
    """Pattern text -> states, by recursive descent: alternatives of sequences of repeated atoms."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.states: list[tuple[What, tuple[int, ...]]] = [("accept", ())]
        self.looks: list[Look] = []
        self.lazy = False
        self.depth = 0
        self.names: set[str] = set()

    def parse(self) -> int:
        """Add the states of the whole pattern; returns the first of them."""
        if len(self.text) > MAX_LENGTH:
            raise self._error(f"{len(self.text)} characters")
        whole = self._alternatives()
        if self.at < len(self.text):
            raise self._error("a ) without its (")
        return whole(ACCEPT)

    def _error(self, problem: str, kind: type[ConfigError] = ConfigError) -> ConfigError:
        return kind(f"pattern {self.text!r:.120}: {problem}, near character {self.at}; {SUPPORTED}")

    def _peek(self, offset: int = 0) -> str:
        at = self.at + offset
        return self.text[at : at + 1]  # "" at the end

    def _take(self, wanted: str = "") -> str:
        """Consume the next character and return it; "" if it is not the wanted one."""
        char = self._peek()
        if wanted and char != wanted:
            return ""
        self.at += 1
        return char

    def _add(self, what: What, *following: int) -> int:
        if len(self.states) >= MAX_STATES:
            raise self._error("too many repetitions")
        self.states.append((what, following))
        return len(self.states) - 1

    def _alternatives(self) -> Fragment:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        # Even an empty group takes this state, so that MAX_STATES also bounds (((){99}){99}){99}.
        return lambda after: self._add(FREE, *[branch(after) for branch in branches])

    def _sequence(self) -> Fragment:
        pieces: list[Fragment] = []
        while self._peek() not in ("", "|", ")"):
            pieces.append(self._repeated())

        def link(after: int) -> int:
            for piece in reversed(pieces):
                after = piece(after)
            return after

        return link

    def _repeated(self) -> Fragment:
        is_anchor = self._peek() == "\\" and self._peek(1) in ANCHORS
        repeatable = self._peek() not in (START, END) and not is_anchor
        piece = self._atom()
        end = self.at
        low, high = self._counts()
        if self.at == end:
            return piece
        if self._take("?"):
            self.lazy = True
        if repeatable and self._peek() == "+":
            raise self._error("a possessive repetition", UnsupportedPattern)
        if not repeatable or self._peek() in ("*", "+", "?", "{"):
            raise self._error("a repetition that is doubled or of nothing")

        def link(after: int) -> int:
            rest = after
            if high is None:
                rest = self._add(FREE)
                self.states[rest] = (FREE, (piece(rest), after))
            else:
                for _ in range(high - low):
                    rest = self._add(FREE, piece(rest), after)
            for _ in range(low):
                rest = piece(rest)
            return rest

        return link

    def _counts(self) -> tuple[int, int | None]:
        """(least, most) repetitions of the atom before; `most` is None without a limit."""
        if self._take("*"):
            return 0, None
        if self._take("+"):
            return 1, None
        if self._take("?"):
            return 0, 1
        if not self._take("{"):
            return 1, 1
        inside, closed, rest = self.text[self.at :].partition("}")
        first, comma, last = inside.partition(",")
        digits = first + last
        if not (closed and first and digits.isascii() and digits.isdecimal()):
            raise self._error("a { that begins no {m}, {m,} or {m,n}", UnsupportedPattern)
        least = int(first)
        most = int(last or first)
        if not least <= most <= MAX_REPEAT:
            raise self._error(f"repetition counts must rise and stay within {MAX_REPEAT}")
        self.at = len(self.text) - len(rest)
        return least, None if comma and not last else most

    def _atom(self) -> Fragment:
        char = self._take()
        if char == "(":
            return self._group()
        if char in ("*", "+", "?", "{"):
            raise self._error(f"nothing to repeat before {char}")
        what: What
        if char in (START, END):
            what = char
        elif char == ".":
            what = bool  # every character is true
        elif char == "[":
            what = self._set()
        elif char == "\\":
            anchor = ANCHORS.get(self._peek())
            what = self._escape() if anchor is None else anchor
            self.at += anchor is not None
        else:
            what = char.__eq__
        return lambda after: self._add(what, after)

    def _group(self) -> Fragment:
        """The rest of ( ), (?: ), (?P<name> ), (?= ) or (?! )."""
        look = ""
        if self._take("?") and not self._take(":"):
            look = self._take("=") or self._take("!")
            if not look:
                self._group_name()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} groups inside each other")
        group = self._alternatives()
        if not self._take(")"):
            raise self._error("a ( without its )")
        self.depth -= 1
        if not look:
            return group

        def link(after: int) -> int:
            start = len(self.states)
            first = group(ACCEPT)
            made = Look(range(start, len(self.states)), first, look == "!")
            self.looks.append(made)
            return self._add(made, after)

        return link

    def _group_name(self) -> None:
        """The rest of (?P<name>."""
        name, closed, _ = self.text[self.at :].removeprefix("P<").partition(">")
        if not (self.text.startswith("P<", self.at) and closed and name.isidentifier()):
            problem = "a group of another kind than ( ), (?: ), (?P<name> ), (?= ), (?! )"
            raise self._error(problem, UnsupportedPattern)
        if name in self.names:
            raise self._error(f"a second group of the name {name:.60}")
        self.names.add(name)
        self.at += len(f"P<{name}>")

    def _escape(self) -> Test:
        char = self._take()
        if char.lower() in CLASSES:
            test = CLASSES[char.lower()]
            return test if char.islower() else lambda c: not test(c)
        if not char:
            raise self._error("a backslash at the end")
        if char.isalnum():
            raise self._error(rf"an escape \{char} that is not supported", UnsupportedPattern)
        return char.__eq__

    def _set(self) -> Test:
        """The rest of [...], where a first ] and a last - mean themselves."""
        negated = self._take("^") == "^"
        tests: list[Test] = []
        while not (tests and self._take("]")):
            low, test = self._member()
            if self._peek() == "-" and self._peek(1) not in ("", "]"):
                self._take()
                high, _ = self._member()
                # A class such as \d has no character, and "" sorts before all characters.
                if not low or high < low:
                    raise self._error("a range that does not rise from one character to another")
                test = _between(low, high)
            tests.append(test)
        return lambda char: any(test(char) for test in tests) != negated

    def _member(self) -> tuple[str, Test]:
        """One member of a set: the character ("" for a class such as \\d) and its test."""
        char = self._take()
        if not char:
            raise self._error("a [ without its ]")
        if char != "\\":
            return char, char.__eq__
        escaped = self._peek()
        return "" if escaped.lower() in CLASSES else escaped, self._escape()


def _between(low: str, high: str) -> Test:
    return lambda char: low <= char <= high
