"""The axes of a grid: options of finetune that get several values, `r=4,8 lr=1e-3,3e-3`.

Which options can be an axis, and which values they take, is read from finetune's parser.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError
from .options import Args, Parser

# Short names of options for which the beginning of the name is not enough.
SHORT = {
    "alpha": "lora-alpha",
    "batch": "batch-size",
    "dropout": "lora-dropout",
    "init": "init-lora-weights",
    "target": "target-modules",
}
FILES = ("DIR", "auto|DIR", "FILE", "DEV", "JSON")  # values that are the same for all points
LISTS = ("NAMES", "N,N", "NAME,NAME")  # values in which + separates what a comma does elsewhere
# They say what is refused or shown, not what is trained.
NOT_TRAINING = ("help", "debug", "strict", "allow_nonfinite", "download", "base_is", "as_trained")
SWITCH = {"true": True, "false": False}


class Axis(NamedTuple):
    """An option with several values.

    name     as it was given; it names the column of the table, too
    action   the option in finetune's parser
    texts    the values as they were given
    """

    name: str
    action: argparse.Action
    texts: list[str]

    @property
    def option(self) -> str:
        return self.action.option_strings[0]

    def word(self, text: str) -> str | None:
        """The option with a value, as for finetune; None for a switch that is off."""
        if self.action.nargs == 0:
            return self.option if SWITCH[text.lower()] else None
        if self.action.metavar in LISTS:
            text = text.replace("+", ",")
        return f"{self.option}={text}"


def possible_axes(parser: Parser) -> dict[str, argparse.Action]:
    """The options of finetune that can be an axis, by their names without the hyphens.

    Left out are files, what does not change the result, such as the number of threads, and an
    option with the name of a short one: `alpha` of a grid is --lora-alpha.
    """
    from ..training.loop import Settings

    excluded = (*NOT_TRAINING, *Settings.FREE)
    return {
        action.option_strings[0].removeprefix("--"): action
        for action in parser._actions
        if action.dest not in excluded and action.metavar not in FILES and action.dest not in SHORT
    }


def read_grid(words: Sequence[str], parser: Parser, given: Args) -> list[Axis]:
    """The axes that `--grid` means.

    words    such as "r=4,8"
    parser   of the options that all points have
    given    those that were given

    ConfigError for a name that is unknown, that comes twice, or that is among `given`; for an axis
    without values, and for a value that comes twice or that the option refuses.
    """
    options = possible_axes(parser)
    axes: dict[str, Axis] = {}
    for word in words:
        name, equals, values = word.partition("=")
        where = f"--grid {word!r:.100}"
        if not equals or not name:
            raise ConfigError(f"{where} must be an option and its values, such as r=4,8")
        axis = Axis(name, _find_option(name, options, parser, where), values.split(","))
        if axis.option in axes:
            raise ConfigError(f"{where}: {axis.option} is an axis already: give all values at once")
        if hasattr(given, axis.action.dest):
            raise ConfigError(
                f"{where}: {axis.option} is an axis and is given for all points, too: "
                "leave one of them out"
            )
        if not all(axis.texts):
            raise ConfigError(
                f"{where} has an empty value: give at least one value, separated by single commas"
            )
        _check_values(axis, parser, where)
        axes[axis.option] = axis
    return list(axes.values())


def _find_option(
    name: str, options: Mapping[str, argparse.Action], parser: Parser, where: str
) -> argparse.Action:
    wanted = name.replace("_", "-").removeprefix("--")
    wanted = SHORT.get(wanted, wanted)
    if wanted in options:
        return options[wanted]
    if any(f"--{wanted}" in action.option_strings for action in parser._actions):
        raise ConfigError(
            f"{where}: --{wanted} cannot be an axis, because it does not say how to train: "
            "give it once, for all points"
        )
    known = sorted({*options, *SHORT})
    nearest = difflib.get_close_matches(wanted, known, 3, 0.5) or ["r", "lr", "target", "seed"]
    raise ConfigError(
        f"{where}: finetune has no option --{wanted!s:.60} that can be an axis; "
        f"near to it are {', '.join(nearest)}; minilora finetune --help lists all"
    )


def _check_values(axis: Axis, parser: Parser, where: str) -> None:
    """ConfigError for a value that the option cannot read, or that is the same as another one."""
    seen: list[tuple[str, Any]] = []
    for text in axis.texts:
        value = _normal(read_value(axis, text, parser, where))
        for other, known in seen:
            if value == known:
                same = "comes twice" if other == text else f"and {other} are the same value"
                raise ConfigError(f"{where}: {text} {same}: leave one of them out")
        seen.append((text, value))


def read_value(axis: Axis, text: str, parser: Parser, where: str) -> Any:
    """The value that finetune would read from the text."""
    if axis.action.nargs == 0:
        if text.lower() not in SWITCH:
            raise ConfigError(f"{where}: {axis.option} is a switch: give true, false or both")
        return SWITCH[text.lower()]
    given = argparse.Namespace(base="base", **{axis.action.dest: None})
    try:
        args = parser.parse_args(["--base=base", str(axis.word(text))], given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return getattr(args, axis.action.dest)


def _normal(value: Any) -> Any:
    """The value to compare: the order of names has no meaning."""
    return sorted(value, key=repr) if isinstance(value, list) else value
