"""The options of every command, and how each is read.

What an adapter is to be has no defaults here: what was not given is left to the configuration (recipes.py), which so
can tell what does not go together from what was never said.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from ..errors import ConfigError, FormatError
from ..formats.disk import parse_json
from ..lora import AdaLoraConfig, LoraConfig
from ..training.methods import ADALORA_FIELDS, CODES, METHODS, QUANTIZE
from . import files

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        if message.endswith("expected one argument"):
            option = message.removeprefix("argument ").partition(":")[0]
            message += f"; one that begins with - goes after =, as in {option}=-1"
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _targets(text: str) -> list[str] | str:
    """Letters, digits, `_ . ,` alone are a list; "all-linear" is itself; anything else is a pattern."""
    plain = all(c.isalnum() or c in "_.," for c in text)
    return [name for name in text.split(",") if name] if plain else text


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text) if text.strip().lstrip("+-").isdecimal() and len(text) < 40 else -1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least} and below 2^63, got {text!r:.60}"
            )
        return value

    return whole


def _table(text: str) -> dict[str, Any]:
    try:
        return parse_json(os.fsencode(text), repr(text))
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None


def _initialiser(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() and "." not in text and abs(value) < 2**53 else value


# How each field of a configuration is read from the command line; a field that is missing here is no option.
LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "r": {
        "type": int,
        "metavar": "R",
        "help": "rank, at the end that of the average layer (DEFAULT)",
    },
    "lora_alpha": {"type": number, "metavar": "X", "help": "scaling is lora_alpha / r (DEFAULT)"},
    "target_modules": {
        "type": _targets,
        "metavar": "T",
        "help": "all-linear, q_proj,v_proj or a pattern",
    },
    "exclude_modules": {
        "type": _targets,
        "metavar": "T",
        "help": "the same, for what is no target after all",
    },
    "lora_dropout": {"type": float, "metavar": "P", "help": "(DEFAULT)"},
    "bias": {
        "choices": ("none", "all", "lora_only"),
        "help": "which of the base's biases train (DEFAULT)",
    },
    "use_rslora": {"action": "store_true", "help": "scaling is lora_alpha / sqrt(r)"},
    "use_dora": {
        "action": "store_true",
        "help": argparse.SUPPRESS,
    },  # PEFT's name for --method dora
    "init_lora_weights": {
        "type": _initialiser,
        "metavar": "HOW",
        "help": "true, false or gaussian (true)",
    },
    "rank_pattern": {
        "type": _table,
        "metavar": "JSON",
        "help": "such as '{\"q_proj\": 4}'; and so --alpha-pattern",
    },
    "alpha_pattern": {"type": _table, "help": argparse.SUPPRESS},
    "layers_to_transform": {"type": _layers, "metavar": "N,N", "help": "such as 0,1"},
    "layers_pattern": {
        "type": _names,
        "metavar": "NAME",
        "help": "what the number follows in a name, such as layers",
    },
    "modules_to_save": {
        "type": _names,
        "metavar": "NAME,NAME",
        "help": "trained whole, such as lm_head",
    },
    "trainable_token_indices": {
        "type": _layers,
        "help": argparse.SUPPRESS,
    },  # rows of the embedding, such as 0,7
    "ensure_weight_tying": {
        "action": "store_true",
        "help": argparse.SUPPRESS,
    },  # a tied head goes by the embedding
    "fan_in_fan_out": {
        "action": "store_true",
        "help": argparse.SUPPRESS,
    },  # taken, and found out anyway
}
ADALORA_OPTIONS: dict[str, dict[str, Any]] = {
    name: {
        "type": float if name.startswith("beta") else number if name == "orth_reg_weight" else int
    }
    for name in ADALORA_FIELDS
}


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minilora", description="LoRA from scratch in NumPy: train, adapt, look inside."
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        options: dict[str, Any] = {
            "help": text,
            "description": text,
            "usage": f"minilora {name} [options]",
        }
        options |= {"epilog": f"example: minilora {name} {example}", "allow_abbrev": False}
        sub = commands.add_parser(name, **options, formatter_class=_Wide, add_help=False)
        sub.add_argument(
            "-h", "--help", action="help", help=argparse.SUPPRESS
        )  # whoever reads it knows
        return sub

    def common(sub: argparse.ArgumentParser, seed: bool = True) -> None:
        sub.add_argument("--device", default="cpu", metavar="DEV", help="cpu, cuda or cuda:N")
        sub.add_argument(
            "--threads",
            type=_whole(1),
            metavar="K",
            help="shards run at once (default: one a core)",
        )
        if seed:
            sub.add_argument("--seed", type=_whole(0), default=0, metavar="N")
        sub.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )

    def model(sub: argparse.ArgumentParser, adapter: bool | None = False) -> None:
        sub.add_argument(
            "--base", required=True, metavar="DIR", help="config.json and model.safetensors"
        )
        if adapter is not None:
            sub.add_argument("--adapter", required=adapter, metavar="DIR", help="in PEFT's format")
            sub.add_argument(
                "--task", metavar="NAME", help="which one of an adapter that finetune --tasks made"
            )
        sub.add_argument(
            "--allow-nonfinite", action="store_true", help="even where a weight is NaN or infinite"
        )

    def method(sub: Any) -> None:
        text = f"{', '.join(METHODS)}: what is trained (lora)"
        sub.add_argument("--method", choices=METHODS, default="lora", metavar="M", help=text)

    def quantized(sub: Any, kinds: Sequence[str] = QUANTIZE) -> None:
        text = f"{', '.join(kinds)}: what the frozen base is held as (none)"
        sub.add_argument("--quantize", choices=kinds, default="none", metavar="Q", help=text)

    def training(sub: argparse.ArgumentParser, lr: float, tasks: bool = False) -> None:
        text = "text to train on; a line of .jsonl: text, prompt and completion, or messages"
        sub.add_argument("--data", required=not tasks, metavar="FILE", help=text)
        if tasks:
            text = "or several texts: an adapter for each, trained in one batch"
            sub.add_argument("--tasks", nargs="+", metavar="FILE", help=text)
            text = "and one of rank R that all of them share"
            sub.add_argument("--shared-r", type=_whole(1), metavar="R", help=text)
        sub.add_argument(
            "--eval-data", metavar="FILE", help="held-out text (default: the last tenth of --data)"
        )
        sub.add_argument("--out", metavar="DIR", help="a new folder (default: runs/...)")
        sub.add_argument(
            "--resume", nargs="?", const="auto", metavar="auto|DIR", help="go on from a checkpoint"
        )
        sub.add_argument(
            "--abort-on-divergence", action="store_true", help="stop when the loss leaves for good"
        )
        sub.add_argument(
            "--gradient-checkpointing", action="store_true", help="less memory, a third more time"
        )
        common(sub, seed=False)
        numbers = {"steps": 400, "batch-size": 16, "context": 128, "lr": lr, "warmup": 20}
        numbers |= {"weight-decay": 0.0, "max-grad-norm": 1.0, "accumulate": 1}
        shown = [f"--{name} {default:g}" for name, default in numbers.items()]
        others = "--seed 0  --shard N (sequences that run together)  --save-every N  --eval-every N (steps)"
        run = sub.add_argument_group("the run", f"{'  '.join(shown[:-1])}\n{shown[-1]}  {others}")
        for name, default in numbers.items():
            run.add_argument(
                f"--{name}", type=type(default), default=default, help=argparse.SUPPRESS
            )
        run.add_argument("--seed", type=_whole(0), default=0, help=argparse.SUPPRESS)
        for name in ("shard", "save-every", "eval-every"):
            run.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)

    def adapter(group: Any, options: dict[str, dict[str, Any]], config: type[LoraConfig]) -> None:
        """The fields of a configuration, absent from what is parsed unless they were given."""
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        for name, reading in options.items():
            text = reading.get("help", argparse.SUPPRESS).replace("DEFAULT", str(defaults[name]))
            reading = {**reading, "help": text, "default": argparse.SUPPRESS, "dest": name}
            group.add_argument(f"--{name.replace('_', '-')}", **reading)

    text = "Pretrain a small model on prose, adapt it to code with LoRA or its kin, and measure."
    sub = command("demo", text, "--method adalora --out my-demo")
    sub.add_argument(
        "--quick", action="store_true", help="20 seconds: shows that everything runs, no more"
    )
    method(sub)
    quantized(sub, CODES)
    sub.add_argument(
        "--pretrain-data", metavar="FILE", help="your own text in place of the language reference"
    )
    sub.add_argument(
        "--adapt-data", metavar="FILE", help="your own text in place of the standard library"
    )
    missing: dict[str, Any] = {"default": argparse.SUPPRESS}
    sub.add_argument("--r", type=int, **missing, help="rank of the adapter (4)")
    sub.add_argument(
        "--lora-alpha",
        type=number,
        **missing,
        metavar="X",
        help="scaling is lora_alpha / r (16; adalora: 256)",
    )
    sub.add_argument("--out", metavar="DIR", help="a new folder (default: runs/demo-NNN)")
    common(sub)

    sub = command(
        "pretrain",
        "Train a small Llama-shaped model on a text's bytes.",
        "--data book.txt --out base",
    )
    training(sub, 3e-3)
    for name in (*SHAPE, "max_position_embeddings"):
        sub.add_argument(f"--{name.replace('_', '-')}", type=_whole(1), metavar="N")
    sub.add_argument("--untied", action="store_true", help="a head with weights of its own")

    text = "Train an adapter and leave the base as it is; with --method full, train the base."
    sub = command("finetune", text, "--base base --data notes.txt --r 8")
    model(sub, None)
    training(sub, 2e-3, tasks=True)
    group = sub.add_argument_group("the method, and an adapter's fields by PEFT's names")
    method(group)
    quantized(group)
    adapter(group, LORA_OPTIONS, LoraConfig)
    shown = "  ".join(f"--{name.replace('_', '-')}" for name in ADALORA_OPTIONS)
    text = "by default r, r + r/2, steps/10, steps/4, steps/100, 0.85, 0.85, 0.1"
    adapter(
        sub.add_argument_group("of AdaLoRA", f"{shown}\n{text}"), ADALORA_OPTIONS, AdaLoraConfig
    )

    sub = command("generate", "Continue a prompt.", '--base base --adapter adapter --prompt "def "')
    model(sub)
    quantized(sub)
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    sub.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="(%(default)s)")
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 takes the likeliest (%(default)s)",
    )
    sub.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    sub.add_argument(
        "--top-p", type=float, metavar="P", help="only the likeliest, up to probability P"
    )
    common(sub)

    sub = command(
        "evaluate",
        "Loss, bits per byte and perplexity of a text.",
        "--base base --data held-out.txt",
    )
    model(sub)
    quantized(sub)
    sub.add_argument("--data", required=True, metavar="FILE")
    sub.add_argument(
        "--context", type=_whole(1), metavar="T", help="positions a window (default: up to 256)"
    )
    sub.add_argument(
        "--limit", type=int, metavar="N", help="at most N windows, spread over the text"
    )
    common(sub)

    files.define(command, _whole)

    sub = command(
        "devices",
        "What there is to compute on: the CPU, and each GPU or why it cannot be used.",
        "",
    )
    sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")

    sub = command(
        "verify",
        "Measure every property of LoRA's mathematics beside its bound.",
        "--base base --adapter adapter",
    )
    sub.add_argument(
        "--base",
        metavar="DIR",
        help="measure your own files instead of random layers: their base ...",
    )
    sub.add_argument("--adapter", metavar="DIR", help="... and their adapter, in PEFT's format")
    sub.add_argument(
        "--cases", type=_whole(1), default=100, metavar="N", help="random layers (%(default)s)"
    )
    sub.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="of what is random (%(default)s)"
    )
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser


class _Wide(argparse.RawDescriptionHelpFormatter):
    """An option and its help on one line, so that the help of each command fits a screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def hyphens(argv: Sequence[str]) -> list[str]:
    """--batch_size and --batch-size are the same option. What follows `=`, and what follows `--`, stays as it is.

    Numbers that begin with a minus (`--weights -1,0.5`) would look like an option: they are put behind a `=`.
    """
    out: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return [*out, *argv[i:]]
        name, equals, value = word.partition("=")
        negative = word.startswith("-") and "," in word and (word[1].isdecimal() or word[1] == ".")
        if negative and out and out[-1].startswith("--") and "=" not in out[-1]:
            out[-1] += f"={word}"
        else:
            out.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return out
