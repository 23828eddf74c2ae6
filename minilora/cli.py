"""The command line: demo, pretrain, finetune, generate, evaluate, merge, inspect, verify, devices.

Each command is a function here that turns options into calls of the rooms below. A user's mistake ends in one line on
stderr and an exit code (errors.py); `--debug` shows where it came from.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .architecture import TransformerConfig
from .backend import get_backend, gpus
from .data import ByteTokenizer, HubTokenizer, load_tokenizer, prose, read_text, split_text
from .errors import ConfigError, DataError, FormatError, Interrupted, MiniloraError, NonFiniteError
from .formats.disk import parse_json
from .inspection import inspect_adapter, inspect_checkpoint
from .lora import LoraConfig, PeftModel, get_peft_model
from .runs import find_checkpoint, locked, numbered_folder, open_folder
from .transformer import CausalLM

PATHS = ("base", "adapter", "data", "eval_data", "out", "resume", "pretrain_data", "adapt_data", "directory")
MAX_PARAMETERS = 2**32  # 64 GiB to train; a shape beyond that is a mistake of typing
SUCCESS, FAILED, USAGE, IO = 0, 1, 2, 4
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

# ---- commands -------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    from .demo import Plan
    from .demo import demo as run

    plan = Plan()
    plan = plan.quick() if args.quick else plan
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, r=args.r, lora_alpha=args.lora_alpha))
    texts = {"pretrain_data": args.pretrain_data, "adapt_data": args.adapt_data}
    for name, path in texts.items():
        if path:
            _long_enough(read_text(path), 10 * (plan.pretrain.context + 1), f"--{name.replace('_', '-')} {path}")
    get_backend(args.device)  # what cannot work ends here, before a folder is made
    if not args.pretrain_data:
        prose()
    with locked(args.out or numbered_folder("runs", "demo")) as out:
        run(open_folder(out), plan, **texts, seed=args.seed, threads=args.threads, device=args.device)


def pretrain(args: argparse.Namespace) -> None:
    from .train import Settings, bits_per_byte, train

    settings = _settings(args, Settings)
    tokenizer = ByteTokenizer()
    shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    limit = args.max_position_embeddings or max(settings.context, 256)
    _within_positions(settings.context, limit)
    config = TransformerConfig(**shape, max_position_embeddings=limit, tie_word_embeddings=not args.untied)
    if config.parameter_count() > MAX_PARAMETERS:
        raise ConfigError(f"a model of {config.parameter_count():,} parameters: at most {MAX_PARAMETERS:,} are trained")
    tokens, held_out, _ = _texts(args.data, args.eval_data, tokenizer, settings.context)
    model = CausalLM(config, seed=settings.seed, device=args.device)
    with _run_folder(args, "pretrain") as out:
        print(f"{sum(p.size for p in model.parameters()):,} parameters, {len(tokens):,} tokens -> {out}")
        result = train(model, tokens, settings, out, held_out=held_out, resume=args.resume, title="pretrain")
        model.save_pretrained(out)
        tokenizer.save(out)
    _print_result(result, bits_per_byte, 1.0)


def finetune(args: argparse.Namespace) -> None:
    from .train import Settings, bits_per_byte, train

    settings = _settings(args, Settings)
    config = LoraConfig(**{f.name: getattr(args, f.name) for f in _lora_fields()})
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", os.fsencode(args.base).decode("utf-8", "replace")
    model, tokenizer = _base(args)
    _within_positions(settings.context, model.config.max_position_embeddings)
    tokens, held_out, ratio = _texts(args.data, args.eval_data, tokenizer, settings.context)
    peft_model = get_peft_model(model, config, seed=settings.seed)
    options: dict[str, Any] = {"held_out": held_out, "resume": args.resume, "bytes_per_token": ratio}
    with _run_folder(args, "finetune") as out:
        peft_model.print_trainable_parameters()
        print(f"{len(tokens):,} tokens -> {out}")
        result = train(peft_model, tokens, settings, out, **options, title="finetune")
        peft_model.save_pretrained(out)
    _print_result(result, bits_per_byte, ratio)


def generate(args: argparse.Namespace) -> None:
    from .generate import stream

    model, tokenizer = _base(args)
    prompt = tokenizer.encode(args.prompt)
    if not len(prompt):
        raise DataError("--prompt is empty: the model needs at least one token to go on from")
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    ids = list(map(int, prompt))
    shown = ""
    for token in stream(model, np.asarray(prompt)[None], args.max_new_tokens, **sampling):
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # wait for the rest of a character
            print(_printable(text[len(shown) :]), end="", flush=True)
            shown = text
    print(_printable(tokenizer.decode(ids)[len(shown) :]))


def evaluate(args: argparse.Namespace) -> None:
    from .train import bits_per_byte
    from .train import evaluate as measure

    model, tokenizer = _base(args)
    text = read_text(args.data)
    tokens = tokenizer.encode(text)
    context = args.context or min(256, model.config.max_position_embeddings)
    _within_positions(context, model.config.max_position_embeddings)
    loss = measure(model, tokens, context, limit=args.limit, threads=args.threads)
    bits = bits_per_byte(loss, len(text) / len(tokens))
    perplexity = math.exp(min(loss, 700))
    print(f"loss {loss:.6f} nats a token, {bits:.4f} bits a byte, perplexity {perplexity:.4f} (context {context})")


def merge(args: argparse.Namespace) -> None:
    out = Path(args.out).resolve()
    for name, source in (("base", Path(args.base).resolve()), ("adapter", Path(args.adapter).resolve())):
        if out == source or source in out.parents:
            raise ConfigError(f"--out {args.out!r} is inside --{name}: choose another folder")
    model, tokenizer = _base(args)
    merged = model.merge_and_unload()
    with locked(args.out) as folder:
        merged.save_pretrained(open_folder(folder))
        if not tokenizer.note:  # a base that came without a tokenizer.json stays without
            tokenizer.save(folder)
    print(f"merged into {folder}")


def inspect(args: argparse.Namespace) -> None:
    folder = Path(args.directory)
    report = (inspect_adapter if (folder / "adapter_config.json").exists() else inspect_checkpoint)(folder)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        if name != "tensors":
            print(f"{name:18} {format(value, ',') if type(value) is int else _printable(str(value))}")
    if report["tensors"]:
        print()
        _print_table(report["tensors"])


def devices(args: argparse.Namespace) -> None:
    import threadpoolctl

    from .parallel import available_cores

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    blas = [f"{p['internal_api']} {p['version']} with {p['num_threads']} threads" for p in pools]
    found = {"cpu": f"usable, {available_cores()} cores, {', '.join(blas) or 'no BLAS that threadpoolctl knows'}"}
    for name, state in {**found, **gpus()}.items():
        print(f"{name:8} {_printable(state.removeprefix(f'device {name!r} is '))}")


def verify(args: argparse.Namespace) -> None:
    from .verify import Report, verify_files
    from .verify import verify as over_random_cases
    from .verify.run import as_json, worst_ratio

    if (args.base is None) != (args.adapter is None):
        raise ConfigError("verify takes --base and --adapter, or neither of them: then it measures random layers")
    if args.base is None:
        report = Report(over_random_cases(args.cases, args.seed), [])
    else:
        report = verify_files(args.base, args.adapter, args.seed)
    if args.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        heads = ("property", "equation", "measured", "bound", "ratio", "ok", "source")
        shown = (
            (r.property, r.equation, f"{r.measured:.2e}", f"{r.bound:.2e}", f"{r.ratio:.3f}", r.ok, r.source)
            for r in report.rows
        )
        _print_table([dict(zip(heads, row, strict=True)) for row in shown])
        if report.layers:
            print()
            _print_table(
                [{k: f"{v:.4g}" if type(v) is float else v for k, v in f._asdict().items()} for f in report.layers]
            )
        print(f"\nworst measured / bound: {worst_ratio(report.rows):.3f}, of {len(report.rows)} properties")
    for row in report.rows:
        if not row.ok:
            detail = f"measured {row.measured:.3g}, bound {row.bound:.3g}, at {row.where} {row.note}".rstrip()
            raise MiniloraError(f"property '{row.property}' fails: {row.equation}: {detail}")


# ---- what commands share --------------------------------------------------------------------------------------------


def _base(args: argparse.Namespace) -> tuple[Any, ByteTokenizer | HubTokenizer]:
    """The model of --base, with --adapter if there is one, and its tokenizer."""
    model: Any = CausalLM.from_pretrained(args.base, device=args.device)
    tokenizer = load_tokenizer(args.base, model.config.vocab_size)
    if tokenizer.note:
        print(tokenizer.note, file=sys.stderr)
    if getattr(args, "adapter", None):
        model = PeftModel.from_pretrained(model, args.adapter)
    for name, p in model.named_parameters():  # known before anything is made of them: no text, no run, no merged file
        if not args.allow_nonfinite and not p.backend.xp.isfinite(p.data).all():
            raise NonFiniteError(f"the weights in {args.base!r}, or of its adapter, are broken: {name} is not finite")
    return model, tokenizer


def _settings(args: argparse.Namespace, settings: Any) -> Any:
    return settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(settings) if hasattr(args, f.name)})


@contextlib.contextmanager
def _run_folder(args: argparse.Namespace, stem: str) -> Iterator[Path]:
    """--out, or a new folder in runs/, held while it is written to.

    It may hold something only if the run goes on with a checkpoint from there.
    """
    with contextlib.ExitStack() as held:
        own = False
        if args.resume is not None:
            if args.resume == "auto" and args.out is None:
                raise ConfigError("--resume auto needs --out, the folder of the run to go on with")
            if args.out is not None and Path(args.out).is_dir():  # first of all: another run's checkpoints come and go
                held.enter_context(locked(args.out))
            checkpoint, _ = find_checkpoint(args.resume, Path(args.out or "runs"))
            own = args.out is not None and Path(args.out).resolve() in checkpoint.resolve().parents
        out = held.enter_context(locked(args.out or numbered_folder("runs", stem)))
        yield open_folder(out, own)


def _texts(
    data: str, eval_data: str | None, tokenizer: ByteTokenizer | HubTokenizer, context: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """(training ids, held-out ids, bytes a token). Without --eval-data the last tenth of --data is held out."""
    text = read_text(data)
    _long_enough(text, 2 if eval_data else 10, f"--data {data}")
    text, held_out = (text, read_text(eval_data)) if eval_data else split_text(text)
    tokens = tokenizer.encode(text)
    if len(tokens) < context + 1:
        whole = "" if eval_data else " once its last tenth is held out"
        raise DataError(
            f"--data {data}: a context of {context} needs at least {context + 1} tokens, it has {len(tokens)}{whole}"
        )
    held_ids = tokenizer.encode(held_out)
    if len(held_ids) < 2:
        raise DataError(f"--eval-data {eval_data or data}: needs at least 2 tokens to evaluate on, has {len(held_ids)}")
    return tokens, held_ids, len(held_out) / len(held_ids)


def _long_enough(text: bytes, least: int, what: str) -> None:
    if len(text) < least:
        raise DataError(f"{what}: needs at least {least} bytes, has {len(text)}")


def _within_positions(context: int, limit: int) -> None:
    if context > limit:
        raise ConfigError(f"--context {context} is more than max_position_embeddings = {limit}")


def _print_result(result: Any, bits_per_byte: Callable[[float, float], float], ratio: float) -> None:
    first, last = result.evaluations[0][1], result.evaluations[-1][1]
    before, after = bits_per_byte(first, ratio), bits_per_byte(last, ratio)
    print(f"held-out bits per byte {before:.3f} -> {after:.3f} in {result.seconds:.0f} s")


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    widths = {key: max(len(key), *(len(_printable(str(row[key]))) for row in rows)) for key in rows[0]}
    print("  ".join(f"{key:{width}}" for key, width in widths.items()).rstrip())
    for row in rows:
        print("  ".join(f"{_printable(str(row[key])):{width}}" for key, width in widths.items()).rstrip())


def _printable(text: str) -> str:
    """Control characters could steer the terminal: show them escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _tell(kind: str, text: str) -> None:
    """An error or a warning: one line on stderr, its middle left out if it is long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    line = line if len(line) <= 480 else f"{line[:240]} ... {line[-230:]}"
    with contextlib.suppress(OSError):  # there is nobody left to tell; the exit code still does
        print(f"minilora: {kind}: {line}", file=sys.stderr)


# ---- options --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
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
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least} and below 2^63, got {text!r:.60}")
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
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers") from None


def _initialiser(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() and "." not in text and abs(value) < 2**53 else value


# How each field of LoraConfig is read from the command line; a field that is missing here is no option.
LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "r": {"type": int, "metavar": "R", "help": "rank (%(default)s)"},
    "lora_alpha": {"type": number, "metavar": "X", "help": "scaling is lora_alpha / r (%(default)s)"},
    "target_modules": {"type": _targets, "metavar": "T", "help": "all-linear, q_proj,v_proj or a pattern"},
    "exclude_modules": {"type": _targets, "metavar": "T", "help": "the same, for what is no target after all"},
    "lora_dropout": {"type": float, "metavar": "P", "help": "(%(default)s)"},
    "bias": {"choices": ("none", "all", "lora_only"), "help": "which of the base's biases train (%(default)s)"},
    "use_rslora": {"action": "store_true", "help": "scaling is lora_alpha / sqrt(r)"},
    "use_dora": {"action": "store_true", "help": "DoRA: the length of each row of W + dW is learnt apart"},
    "init_lora_weights": {"type": _initialiser, "metavar": "HOW", "help": "true, false or gaussian (true)"},
    "rank_pattern": {"type": _table, "metavar": "JSON", "help": "such as '{\"q_proj\": 4}'"},
    "alpha_pattern": {"type": _table, "metavar": "JSON", "help": "such as '{\"q_proj\": 8}'"},
    "layers_to_transform": {"type": _layers, "metavar": "N,N", "help": "such as 0,1"},
    "layers_pattern": {"type": _names, "metavar": "NAME", "help": "what the number follows in a name, such as layers"},
    "modules_to_save": {"type": _names, "metavar": "NAME,NAME", "help": "trained whole, such as lm_head"},
    "fan_in_fan_out": {"action": "store_true", "help": argparse.SUPPRESS},  # taken, with a warning: no base here is so
}


def _lora_fields() -> list[Any]:
    return [f for f in dataclasses.fields(LoraConfig) if f.name in LORA_OPTIONS]


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minilora", description="LoRA from scratch in NumPy: train, adapt, look inside.")
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(run: Callable[[argparse.Namespace], None], text: str, example: str) -> argparse.ArgumentParser:
        options: dict[str, Any] = {"help": text, "description": text, "usage": f"minilora {run.__name__} [options]"}
        options |= {"epilog": f"example: minilora {run.__name__} {example}", "allow_abbrev": False}
        sub = commands.add_parser(run.__name__, **options, formatter_class=_Wide, add_help=False)
        sub.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # whoever reads it knows
        sub.set_defaults(run=run)
        return sub

    def common(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", default="cpu", metavar="DEV", help="cpu, cuda or cuda:N")
        sub.add_argument("--threads", type=_whole(1), metavar="K", help="shards run at once (default: one a core)")
        sub.add_argument("--seed", type=_whole(0), default=0, metavar="N")
        sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")

    def model(sub: argparse.ArgumentParser, adapter: bool | None = False) -> None:
        sub.add_argument("--base", required=True, metavar="DIR", help="config.json and model.safetensors")
        if adapter is not None:
            sub.add_argument("--adapter", required=adapter, metavar="DIR", help="in PEFT's format")
        sub.add_argument("--allow-nonfinite", action="store_true", help="even where a weight is NaN or infinite")

    def training(sub: argparse.ArgumentParser, lr: float) -> None:
        sub.add_argument("--data", required=True, metavar="FILE", help="text to train on")
        sub.add_argument("--eval-data", metavar="FILE", help="held-out text (default: the last tenth of --data)")
        sub.add_argument("--out", metavar="DIR", help="a new folder (default: runs/...)")
        sub.add_argument("--resume", nargs="?", const="auto", metavar="auto|DIR", help="go on from a checkpoint")
        sub.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
        sub.add_argument("--eval-every", type=int, metavar="N", help="steps between evaluations")
        sub.add_argument("--abort-on-divergence", action="store_true", help="stop when the loss leaves for good")
        sub.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
        for name, default, kind in (
            ("steps", 400, int), ("batch-size", 16, int), ("context", 128, int), ("lr", lr, float), ("warmup", 20, int),
            ("weight-decay", 0.0, float), ("max-grad-norm", 1.0, float), ("accumulate", 1, int),
        ):  # fmt: skip
            sub.add_argument(f"--{name}", type=kind, default=default, metavar="X", help="(%(default)s)")
        sub.add_argument("--shard", type=int, metavar="N", help="sequences that run together (default: by shape)")
        common(sub)

    sub = command(demo, "Pretrain a small model on prose, adapt it to code with LoRA, and measure.", "--out my-demo")
    sub.add_argument("--quick", action="store_true", help="20 seconds: shows that everything runs, no more")
    sub.add_argument("--pretrain-data", metavar="FILE", help="your own text in place of the language reference")
    sub.add_argument("--adapt-data", metavar="FILE", help="your own text in place of the standard library")
    sub.add_argument("--r", type=int, default=4, help="rank of the adapter (4)")
    sub.add_argument("--lora-alpha", type=number, default=16, metavar="X", help="scaling is lora_alpha / r (16)")
    sub.add_argument("--out", metavar="DIR", help="a new folder (default: runs/demo-NNN)")
    common(sub)

    sub = command(pretrain, "Train a small Llama-shaped model on a text's bytes.", "--data book.txt --out base")
    training(sub, 3e-3)
    for name in (*SHAPE, "max_position_embeddings"):
        sub.add_argument(f"--{name.replace('_', '-')}", type=_whole(1), metavar="N")
    sub.add_argument("--untied", action="store_true", help="a head with weights of its own")

    sub = command(finetune, "Train a LoRA adapter; the base stays as it is.", "--base base --data notes.txt --r 8")
    model(sub, None)
    training(sub, 2e-3)
    defaults = {f.name: f.default for f in _lora_fields()}
    for name, reading in LORA_OPTIONS.items():
        default = None if isinstance(defaults[name], dataclasses._MISSING_TYPE) else defaults[name]
        sub.add_argument(f"--{name.replace('_', '-')}", dest=name, default=default, **reading)

    sub = command(generate, "Continue a prompt.", '--base base --adapter adapter --prompt "def "')
    model(sub)
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    sub.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="(%(default)s)")
    sub.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest (%(default)s)")
    sub.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    sub.add_argument("--top-p", type=float, metavar="P", help="only the likeliest, up to probability P")
    common(sub)

    sub = command(evaluate, "Loss, bits per byte and perplexity of a text.", "--base base --data held-out.txt")
    model(sub)
    sub.add_argument("--data", required=True, metavar="FILE")
    sub.add_argument("--context", type=_whole(1), metavar="T", help="positions a window (default: up to 256)")
    sub.add_argument("--limit", type=int, metavar="N", help="at most N windows, spread over the text")
    common(sub)

    sub = command(merge, "Add an adapter into its base's weights.", "--base base --adapter adapter --out merged")
    model(sub, True)
    sub.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    common(sub)

    sub = command(inspect, "What an adapter or a checkpoint holds.", "adapter")
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")

    sub = command(devices, "What there is to compute on: the CPU, and each GPU or why it cannot be used.", "")
    sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")

    sub = command(
        verify, "Measure every property of LoRA's mathematics beside its bound.", "--base base --adapter adapter"
    )
    sub.add_argument("--base", metavar="DIR", help="measure your own files instead of random layers: their base ...")
    sub.add_argument("--adapter", metavar="DIR", help="... and their adapter, in PEFT's format")
    sub.add_argument("--cases", type=_whole(1), default=100, metavar="N", help="random layers (%(default)s)")
    sub.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of what is random (%(default)s)")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser


class _Wide(argparse.HelpFormatter):
    """An option and its help on one line, so that the help of each command fits a screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _hyphens(argv: Sequence[str]) -> list[str]:
    """--batch_size and --batch-size are the same option. What follows `=`, and what follows `--`, stays as it is."""
    out: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return [*out, *argv[i:]]
        name, equals, value = word.partition("=")
        out.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without Unicode shows an escape, and no traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: _tell("warning", str(message))
        with _terminable():
            return _run(argv, debug)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: temporary files and the lock of a folder are removed first."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:  # whoever calls us from Python may have plans of their own
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: Sequence[str], debug: bool) -> int:
    try:
        parser = build_parser()
        args = parser.parse_args(_hyphens(argv))
        if args.command is None:
            parser.print_help()
            parser.error("no command was given")
        for name in PATHS:
            path = getattr(args, name, None)
            if path is not None and (not path or "\0" in path):  # "" is what a shell makes of an unset variable
                flag = "DIR" if name == "directory" else f"--{name.replace('_', '-')}"
                parser.error(f"argument {flag}: {path!r} is no path")
        args.run(args)
        sys.stdout.flush()
        return SUCCESS
    except BrokenPipeError:  # the reader of our output has gone: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except (MiniloraError, OSError, MemoryError, KeyboardInterrupt) as error:
        if debug:
            raise
        if isinstance(error, KeyboardInterrupt):
            print("\nminilora: interrupted", file=sys.stderr)
            return 128 + (error.args[0] if error.args else signal.SIGINT)
        text = str(error) if isinstance(error, MiniloraError) else _os_message(error)
        _tell("interrupted" if isinstance(error, Interrupted) else "error", text)
        return error.exit_code if isinstance(error, MiniloraError) else IO if isinstance(error, OSError) else FAILED


def _os_message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    return str(error) or "out of memory"
