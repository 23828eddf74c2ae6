"""What a model does to a text, measured window by window: for compare, and for inspect --data."""

from __future__ import annotations

from typing import Any

from ..data.batches import Text
from ..display import print_table
from ..errors import ConfigError, DataError
from ..formats.disk import JsonObject
from ..lora import PeftModel
from ..precision import FLOAT32
from .options import DATA, Args, Parser, add_strict, option, positive_integer
from .reading import (
    Tokenizer,
    load_base,
    read_tokenizer,
    read_tokens,
    require_context,
    require_finite,
)

CONTEXT = 256  # tokens per window, unless the model has fewer
NEEDS_DATA = ("context", "limit", "strict", "threads", "directions")


def add_measuring_options(parser: Parser) -> None:
    """How a text is measured in windows."""
    text = f"tokens per window, at least 1 (default: up to {CONTEXT})"
    option(parser, "--context T", text)
    text = "most windows to measure, spread over the text, at least 1 (default: all)"
    option(parser, "--limit N", text, type=positive_integer)
    option(parser, "--threads K", "threads, each for a window, at least 1 (default: one per core)")
    add_strict(parser)


def require_data(args: Args) -> None:
    """ConfigError for options that mean nothing without --data, or for --data without --base."""
    given = [name for name in NEEDS_DATA if getattr(args, name, None)]
    if given and args.data is None:
        raise ConfigError(f"--{given[0]} is for a text: give --data FILE, or leave it out")
    if args.data is not None and args.base is None:
        raise ConfigError("--data measures a model: give its folder with --base, too")


def read_measured_text(args: Args, tokenizer: Tokenizer, model: Any) -> tuple[Text, int]:
    """(tokens of --data, tokens per window)"""
    context = args.context or min(CONTEXT, model.config.context)
    require_context(context, model.config)
    tokens, _ = read_tokens(args.data, tokenizer, context, args.strict)
    if len(tokens) < 2:
        raise DataError(
            f"--data {args.data}: needs at least 2 tokens, has {len(tokens)}: add to it"
        )
    return tokens, context


def load_plain_base(args: Args) -> Any:
    """The model of --base in float32 on the CPU."""
    args.device = "cpu"
    args.compute = FLOAT32
    args.quantize = "none"
    return load_base(args)


# ---- inspect --data ------------------------------------------------------------------------------


def add_effects_options(parser: Parser) -> None:
    text = "measures on it what each layer of the adapter does: out, and alone; needs --base: "
    option(parser, "--data FILE", text + DATA)
    text = "layers, by the end of their names, whose directions are taken out one by one"
    option(parser, "--directions NAME,NAME", text)
    add_measuring_options(parser)


def measure_adapter(args: Args, adapter: str) -> JsonObject:
    """What the parts of an adapter do to --data: see tools/effects.py."""
    from ..tools.effects import measure_effects

    base = load_plain_base(args)
    size = base.config.vocab_size
    start = {"initial": args.initial, "base_is": args.base_is}
    model: Any = PeftModel.from_pretrained(base, adapter, **start)
    tokenizer = read_tokenizer(args.base, model.get_base_model().config.vocab_size, adapter)
    require_vocabulary(model, size, args.base)
    require_finite(model, args.base, advice="")
    text, context = read_measured_text(args, tokenizer, base)
    effects = measure_effects(model, text, context, args.limit, args.threads, args.directions or ())
    return {
        "windows": effects.windows,
        "tokens": effects.tokens,
        "base": effects.base.as_dict(),
        "adapter": effects.adapter.as_dict(),
        "gain": effects.gain.as_dict(),
        "layers": [
            {"layer": path, "out": out.as_dict(), "alone": effects.alone[path].as_dict()}
            for path, out in effects.out.items()
            if path
        ],
        "sum": {"out": effects.out[""].as_dict(), "alone": effects.alone[""].as_dict()},
        "lambda": [
            {"lambda": factor, "loss": loss.as_dict(), "change": change.as_dict()}
            for factor, loss, change in effects.scaled
        ],
        "directions": [
            {"layer": one.path, "i": one.number, "sigma": one.value, "out": one.out.as_dict()}
            for one in effects.directions
        ],
    }


def require_vocabulary(model: Any, size: int, base: str) -> None:
    """ConfigError if an adapter has changed the number of tokens, on which every loss depends."""
    now = model.get_base_model().config.vocab_size
    if now != size:
        raise ConfigError(
            f"--data compares losses with those of --base {base!r:.100}, which has {size} tokens, "
            f"and the adapter makes {now} of them: leave out --data"
        )


def print_effects(report: JsonObject, sizes: dict[str, str]) -> None:
    """Print tables of what the layers, the directions and lambda do.

    sizes   |dW| / |W| by layer, as text
    """
    print(f"\n{report['windows']} windows, {report['tokens']:,} tokens; nats per token")
    for name in ("base", "adapter", "gain"):
        print(f"{name:18} {format_estimate(report[name], name == 'gain')}")
    rows = []
    for row in [*report["layers"], {"layer": "sum", **report["sum"]}]:
        size = sizes.get(row["layer"], "")
        out, alone = format_estimate(row["out"]), format_estimate(row["alone"])
        rows.append({"layer": row["layer"], "|dW| / |W|": size, "out": out, "alone": alone})
    print("\nout: the loss without the layer - the adapter's; alone: the base's - with it alone\n")
    print_table(rows)
    if report["directions"]:
        print("\ndirections out: the loss without sigma u v^T - the adapter's\n")
        print_table(
            [
                {**row, "sigma": f"{row['sigma']:.4g}", "out": format_estimate(row["out"])}
                for row in report["directions"]
            ]
        )
    if report["lambda"]:
        print("\nW + lambda dW\n")
        rows = []
        for row in report["lambda"]:
            change = format_estimate(row["change"])
            loss = f"{row['loss']['mean']:.6f}"
            rows.append({"lambda": row["lambda"], "loss": loss, "loss - base's": change})
        print_table(rows)
    else:
        print("\nno lambda: s does not scale all that this adapter does")


def format_estimate(one: JsonObject, is_difference: bool = True) -> str:
    """A mean with its standard error, which a single window does not have.

    A difference has its sign.
    """
    error = "unknown" if one["error"] is None else f"{one['error']:.6f}"
    sign = "+" if is_difference else ""
    return f"{one['mean']:{sign}.6f} +- {error}"
