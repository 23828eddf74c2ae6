"""Every error that minilora raises on purpose, by kind, and the checks that raise one.

Each kind carries the exit code with which the command line ends when it meets that kind:
2 usage, 3 a bad input file, 4 input or output failed (an `OSError`), 5 training went non-finite or
diverged, 6 another run is using the folder.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple


class MiniloraError(Exception):
    """The parent of every error that minilora raises on purpose.

    The message is one line of at most 500 printable characters, whatever it quotes: a name from an
    untrusted file can neither control the terminal that shows it nor fill the screen.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(shorten(printable(shorten(message))))


def shorten(text: str) -> str:
    """`text` in at most 500 characters: its start says what was given, its end what to do."""
    return text if len(text) <= 500 else f"{text[:300]} ... {text[-195:]}"


def printable(text: str, allowed: str = "") -> str:
    """`text` with control characters escaped, except the `allowed` ones.

    Unescaped they could control the terminal, or begin a line that looks like another message.
    """
    return "".join(c if c.isprintable() or c in allowed else repr(c)[1:-1] for c in text)


class ConfigError(MiniloraError, ValueError):
    """An option or a configuration that is invalid, or that does not fit the model."""

    exit_code = 2


# ---- checking fields -----------------------------------------------------------------------------

Predicate = Callable[[Any], bool]
LARGEST_FLOAT = sys.float_info.max


class Rule(NamedTuple):
    """One line of a table that checks fields.

    field      its name
    is_valid   a predicate of its value
    wanted     what would be valid: completes the sentence "`field` must be ..."
    """

    field: str
    is_valid: Predicate
    wanted: str


def rules_for(fields: Iterable[str], is_valid: Predicate, wanted: str) -> list[Rule]:
    """The same rule for several fields."""
    return [Rule(field, is_valid, wanted) for field in fields]


def integer_rules(*fields: str, least: int, limit: int | None = None) -> list[Rule]:
    """The rules that these fields are integers of at least `least`, below `limit`."""
    is_valid = is_integer(least, math.inf if limit is None else limit - 1)
    return rules_for(fields, is_valid, describe_integer(least, limit))


def describe_integer(least: int, limit: int | None = None) -> str:
    """What `integer_rules` asks for, in words: it states every limit that exists."""
    below = "" if limit is None else f" and below {_as_power(limit)}"
    return f"an integer of at least {least}{below}"


def _as_power(limit: int) -> str:
    bits = limit.bit_length() - 1
    return f"2^{bits}" if bits >= 31 and limit == 1 << bits else str(limit)


def number_rules(*fields: str, is_kind: Callable[..., Predicate], **bounds: float) -> list[Rule]:
    """The rules that these fields are numbers within the bounds of `is_kind`, as `is_number`'s."""
    return rules_for(fields, is_kind(**bounds), describe_number(**bounds))


def describe_number(
    least: float | None = None, above: float | None = None, below: float | None = None
) -> str:
    """What `number_rules` asks for, in words: it states every limit that exists."""
    limits = []
    if least is not None:
        limits.append(f"of at least {least:g}")
    if above is not None:
        limits.append(f"above {above:g}")
    if below is not None:
        limits.append(f"below {below:g}")
    kind = "a number" if below is not None else "a finite number"
    return f"{kind} {' and '.join(limits)}".rstrip()


def check_fields(
    values: Mapping[str, Any],
    rules: Iterable[Rule],
    where: str = "",
    error: type[MiniloraError] = ConfigError,
) -> None:
    """Raise `error` for the first rule that a field breaks; `where` begins the message."""
    for field, is_valid, wanted in rules:
        if not is_valid(values[field]):
            raise error(f"{where}{field} must be {wanted}, got {values[field]!r:.200}")


def describe_os_error(error: OSError) -> str:
    """What the system says, and the file; without the number of the error."""
    text = error.strerror or str(error)
    return f"{text}: {error.filename!r}" if error.filename else text


def check_names(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    """ConfigError for the first name that is not known: it says the nearest one, and all."""
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}? It" if nearest else "it"
            raise ConfigError(
                f"{where} does not know {name!r:.99}: {hint} knows {', '.join(known)}"
            )


def is_flag(value: Any) -> bool:
    """True for True and False, not for 1 and 0."""
    return isinstance(value, bool)


def is_integer(least: float = -math.inf, most: float = math.inf) -> Predicate:
    """A predicate: an int with least <= value <= most. True and 1.0 do not count as 1."""
    return lambda value: type(value) is int and least <= value <= most


def is_number(
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    kinds: Any = Real,
) -> Predicate:
    """A predicate: a finite real number with least <= value and above < value < below.

    NumPy's scalars count as numbers, unless `kinds`, a type or a tuple of types, leaves them out.
    Bools and NaN do not.
    """

    def is_valid(value: Any) -> bool:
        is_real = isinstance(value, kinds) and not isinstance(value, bool)
        # An integer may be finite and yet beyond the floats.
        if isinstance(value, int) and not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
            return False
        return is_real and least <= value and above < value < below

    return is_valid


def is_plain_number(**bounds: float) -> Predicate:
    """`is_number` of these bounds for Python's own int and float, not for subclasses of them."""
    is_valid = is_number(**bounds)
    return lambda value: type(value) in (int, float) and is_valid(value)


def optional(is_valid: Predicate) -> Predicate:
    """A predicate: None, or valid."""
    return lambda value: value is None or is_valid(value)


def optional_rule(rule: Rule) -> Rule:
    """The same rule for a field that may be None, too."""
    return Rule(rule.field, optional(rule.is_valid), f"{rule.wanted}, or None")


def one_of(*choices: Any) -> Predicate:
    """A predicate: equal to one of `choices` and of the same type, so that True is not 1."""
    return lambda value: any(type(value) is type(c) and value == c for c in choices)


# ---- other kinds ---------------------------------------------------------------------------------


class FormatError(MiniloraError, ValueError):
    """A file that is damaged, or not of the format that it claims."""

    exit_code = 3


class DataError(MiniloraError, ValueError):
    """A text or a batch that cannot be trained on: empty, too short, ids outside the vocabulary."""

    exit_code = 3


class NothingToLearnError(DataError):
    """A record that has no token to learn: readers skip it and count it, unless they are strict."""


class CheckpointError(MiniloraError):
    """A training checkpoint that is missing, damaged, or belongs to another run."""

    exit_code = 3


class DeviceError(MiniloraError, RuntimeError):
    """Arrays of two devices in one operation, or a device that cannot be used."""

    exit_code = 2


class GraphError(MiniloraError, RuntimeError):
    """An impossible backward pass: the graph was freed, or a value that it needs has changed."""


class NonFiniteError(MiniloraError, ArithmeticError):
    """A NaN or an infinity where the work cannot go on.

    In training, `line` is what the step measured.
    """

    exit_code = 5

    def __init__(self, message: str, line: dict[str, Any] | None = None):
        super().__init__(message)
        self.line = line or {}


class DivergenceError(MiniloraError, ArithmeticError):
    """The loss diverged but is still finite."""

    exit_code = 5


class LockError(MiniloraError):
    """Another thread or process is writing into a run's folder."""

    exit_code = 6


class SweepError(MiniloraError):
    """Points of a sweep failed, and the others are finished.

    `exit_code` is that of the first point that failed.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(MiniloraError):
    """A signal asked the run to stop; the current step was finished and saved.

    `exit_code` is 128 + the signal's number.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[Any, ...]:  # a process pool pickles errors
        return type(self), (str(self), self.exit_code - 128)
