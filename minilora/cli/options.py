"""The parser, how the value of an option is read, and options that several commands take."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError, FormatError, describe_integer
from ..formats.disk import parse_json
from ..formats.hub import find_model
from ..lora.starts.residual import RESIDUAL
from ..precision import FLOAT32, MANTISSA
from ..training.methods import METHODS, QUANTIZE

Args = argparse.Namespace
DTYPES = ("float32", "float16", "bfloat16")
DATA = "a text, or JSON: text, messages, prompt + completion, Alpaca or ShareGPT"


class Command(NamedTuple):
    """A command: what runs it, what adds its options, and a text and an example for its help.

    prints      whether its output is what it is for, and not a report beside the files that it
                writes or the exit code
    has_ranks   whether the processes that mpiexec starts run it together (training/ranks.py)
    """

    run: Callable[[Args], None]
    add_options: Callable[[Parser], None]
    text: str
    example: str
    prints: bool = False
    has_ranks: bool = False


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError, with the name of the option first.

    words   of the command line, if the help depends on them: see fields.py
    """

    words: Sequence[str] = ()

    def error(self, message: str) -> Any:
        message = message.removeprefix("argument ").replace(": must", " must", 1)
        if message.endswith("expected one argument"):
            name = message.partition(":")[0]
            message += f"; write a value that begins with - after =, as in {name}=-1"
        raise ConfigError(f"{message} (see {self.prog} --help)")


class Once(argparse.Action):
    """Stores a value, and refuses a second one, which other commands would add to the first."""

    def __call__(self, parser: Any, namespace: Args, value: Any, name: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        if before not in (None, value):
            given = f"got {before!r:.60} and {value!r:.60}"
            message = f"must be given once, {given}: combine makes one adapter of several"
            raise argparse.ArgumentError(self, message)
        setattr(namespace, self.dest, value)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Writes an option and its help on one line of at most 110 characters."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def hyphenate(argv: Sequence[str]) -> list[str]:
    """The arguments with `-` for `_` in the names of options, but not in values or after `--`.

    A list of numbers that begins with a minus (`--weights -1,0.5`) is joined to its option by `=`,
    because it would look like an option.
    """
    result: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return [*result, *argv[i:]]
        name, equals, value = word.partition("=")
        negative = word.startswith("-") and "," in word and (word[1].isdecimal() or word[1] == ".")
        if negative and result and result[-1].startswith("--") and "=" not in result[-1]:
            result[-1] += f"={word}"
        elif name.startswith("--"):
            result.append(name.replace("_", "-") + equals + value)
        else:
            result.append(word)
    return result


def select_fields(args: Args, config: Any) -> dict[str, Any]:
    """The given options that have the name of a field of the dataclass `config`, in its order."""
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


# ---- how a value is read -------------------------------------------------------------------------


def path(text: str) -> str:
    if not text or "\0" in text:  # a shell makes "" of a variable that is not set
        message = f"must not be empty or contain a null character, got {text!r:.100}"
        raise argparse.ArgumentTypeError(message)
    return text


def text_value(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        text = ""
    if not text:
        raise argparse.ArgumentTypeError("must be a text in UTF-8 that is not empty")
    return text


def integer_from(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = integer_or_text(text)
        if isinstance(value, str) or not least <= value < 2**63:
            wanted = describe_integer(least, 2**63)
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r:.60}")
        return value

    return integer


def integer_or_text(text: str) -> int | str:
    """The integer, or the text itself: the rule of its field refuses it, and names the limits.

    Python would also read 1_000, spaces, and digits of other scripts.
    """
    digits = text.removeprefix("-").removeprefix("+")
    is_integer = digits.isascii() and digits.isdecimal() and len(text) < 40
    return int(text) if is_integer else text


def number_or_text(text: str) -> float | str:
    """The number; an integer where `text` is one, because PEFT's files tell 8 from 8.0.

    The text itself if it is none, as for `integer_or_text`.
    """
    if not text.isascii() or "_" in text or text != text.strip():
        return text
    try:
        value = float(text)
    except ValueError:
        return text
    exact = value.is_integer() and "." not in text and abs(value) < 2**53
    return int(value) if exact else value


def integer(text: str) -> int:
    value = integer_or_text(text)
    if isinstance(value, str):
        raise ValueError
    return value


def number(text: str) -> float:
    value = number_or_text(text)
    if isinstance(value, str):
        raise ValueError
    return float(value)


def list_of(kind: Callable[[str], Any], example: str) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            message = f"must be a list of numbers such as {example}, got {text!r:.60}"
            raise argparse.ArgumentTypeError(message) from None

    return values


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def names_or_pattern(text: str) -> list[str] | str:
    """A list if `text` has only letters, digits and `_.,`; otherwise a pattern or "all-linear"."""
    is_list = all(c.isalnum() or c in "_.," for c in text)
    return names(text) if is_list else text


def table(text: str) -> dict[str, Any]:
    try:
        return parse_json(os.fsencode(text), repr(text))
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


positive_integer = integer_from(1)


def true_false_or_name(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


# How the value of an option is read, by the name that the help gives it.
READERS: dict[str, Callable[[str], Any]] = {
    "DIR": path,
    "FILE": path,
    "N": integer_or_text,
    "K": positive_integer,
    "R": positive_integer,
    "T": positive_integer,
    "X": number_or_text,
    "P": number_or_text,
    "N,N": list_of(integer, "0,1"),
    "X,X": list_of(number, "0.5,-1"),
    "NAME,NAME": names,
    "NAMES": names_or_pattern,
    "JSON": table,
}


def option(parser: Any, words: str, text: str, **reading: Any) -> None:
    """Add an option to a parser or to a group: its name and the name of its value, and its help.

    An option without a value is a switch. READERS says how a value is read, by its name. The help
    shows a default.
    """
    name, _, metavar = words.partition(" ")
    default = reading.get("default")
    if default not in (None, argparse.SUPPRESS):
        text = f"{text} (default: {default})"
    if metavar:
        reading["metavar"] = metavar
        reading.setdefault("type", READERS.get(metavar))
    else:
        reading.setdefault("action", "store_true")
    parser.add_argument(name, help=text, **reading)


# ---- options that several commands take ----------------------------------------------------------


def add_device_and_threads(parser: Parser) -> None:
    option(
        parser,
        "--device DEV",
        "where to compute: cpu, cuda, cuda:N or cuda:local (by rank)",
        default="cpu",
    )
    option(parser, "--threads K", "threads, at least 1 (default: one per core)")


def add_strict(parser: Parser) -> None:
    text = "refuse records that are too long or empty, which are cut or skipped"
    option(parser, "--strict", text)


def add_seed(parser: Any) -> None:
    text = "seed of the random numbers, at least 0"
    option(parser, "--seed N", text, type=integer_from(0), default=0)


MODELS = (
    "base",
    "tuned",
    "merged",
    "directory",
    "other",
)  # the options and arguments that name a model


def add_base(parser: Parser) -> None:
    text = "the base model: its folder, or org/name (or org/name@revision) in the hub's cache"
    option(parser, "--base DIR", text, required=True)
    add_download(parser)


def add_download(parser: Parser) -> None:
    text = "fetch a model org/name that the hub's cache lacks (default: no network)"
    option(parser, "--download", text)


def find_models(args: Args) -> None:
    """Put the folder of each model in the place of its name: see formats/hub.py.

    A command calls it once its other options have been checked.
    """
    for name in MODELS:
        model = getattr(args, name, None)
        if model is not None:
            setattr(args, name, find_model(model, args.download))


def add_adapter(parser: Parser) -> None:
    text = "adapter in PEFT's format (default: the base alone)"
    option(parser, "--adapter DIR", text, action=Once)
    add_start(parser)
    add_task(parser)


def add_task(parser: Parser) -> None:
    option(parser, "--task NAME", "which task to use, if finetune --tasks made the adapter")


def add_start(parser: Parser) -> None:
    """How an adapter of pissa, olora, lora_ga, ... began: its file alone does not say it."""
    option(parser, "--initial DIR", "the adapter before training, if its start changed the base")
    text = "residual: the base has the weights that the start left"
    option(parser, "--base-is WHAT", text, choices=(RESIDUAL,))


def add_allow_nonfinite(parser: Parser) -> None:
    option(parser, "--allow-nonfinite", "accept weights that are NaN or infinite")


def add_method(parser: Any, methods: Sequence[str] = METHODS) -> None:
    text = f"what to train: {', '.join(methods)}; -h after it explains its fields"
    option(parser, "--method M", text, choices=methods, default="lora")


def add_quantize(parser: Any, kinds: Sequence[str] = QUANTIZE) -> None:
    text = f"format of the frozen base: {', '.join(kinds)}"
    option(parser, "--quantize Q", text, choices=kinds, default="none")


def add_compute(parser: Any) -> None:
    text = f"products with frozen weights: {', '.join(MANTISSA)}"
    option(parser, "--compute C", text, choices=list(MANTISSA), default=FLOAT32)


def add_json(parser: Parser) -> None:
    option(parser, "--json", "print JSON")
