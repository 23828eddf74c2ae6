"""What can go wrong, by kind. Every mistake of a user ends in one of these, never in a bare traceback.

Each kind carries the exit code with which the command line ends when it meets that kind:
2 usage, 3 a bad input file, 4 input or output failed (an `OSError`), 5 training went non-finite or diverged, 6 another
run holds the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class MiniloraError(Exception):
    """The parent of every error that minilora raises on purpose.

    The message is one line of at most 500 printable characters, whatever it quotes: a name in a stranger's file can
    neither steer the terminal that shows it nor fill it.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shorten(message))
        super().__init__(shorten(line))


def shorten(text: str) -> str:
    """`text` within 500 characters: what was given stands at its start and the cure at its end, so both stay."""
    return text if len(text) <= 500 else f"{text[:300]} ... {text[-195:]}"


class ConfigError(MiniloraError, ValueError):
    """An option or a configuration that means nothing, or that does not fit the model."""

    exit_code = 2


class Rule(NamedTuple):
    """A line of a table that checks fields: the field, a predicate of its value, and what would be valid."""

    field: str
    is_valid: Callable[[Any], bool]
    wanted: str


def check_fields(values: Mapping[str, Any], rules: Iterable[Rule], where: str = "") -> None:
    """ConfigError for the first rule that the value of its field breaks; `where` begins the message."""
    for field, is_valid, wanted in rules:
        if not is_valid(values[field]):
            raise ConfigError(f"{where}{field} must be {wanted}, got {values[field]!r:.200}")


class FormatError(MiniloraError, ValueError):
    """A file that is damaged, or not what it claims to be."""

    exit_code = 3


class DataError(MiniloraError, ValueError):
    """A text or a batch that cannot be trained on: empty, too short, ids outside the vocabulary."""

    exit_code = 3


class CheckpointError(MiniloraError):
    """A training checkpoint that is missing, damaged, or belongs to another run."""

    exit_code = 3


class DeviceError(MiniloraError, RuntimeError):
    """Arrays of two devices in one operation, or a device that cannot be used."""

    exit_code = 2


class GraphError(MiniloraError, RuntimeError):
    """A backward pass that is not possible: the graph was freed, or a value it needs has changed."""


class NonFiniteError(MiniloraError, ArithmeticError):
    """A NaN or an infinity where the work cannot go on. In training, `line` is what the step measured."""

    exit_code = 5

    def __init__(self, message: str, line: dict[str, Any] | None = None):
        super().__init__(message)
        self.line = line or {}


class DivergenceError(MiniloraError, ArithmeticError):
    """The loss has left for good, in numbers that are still finite."""

    exit_code = 5


class LockError(MiniloraError):
    """A run's folder that another thread or process is writing into."""

    exit_code = 6


class Interrupted(MiniloraError):
    """A signal asked the run to stop; the step was finished and saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
