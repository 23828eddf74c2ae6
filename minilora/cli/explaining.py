"""compare: how two adapters overlap, and how they interfere on a text."""

from __future__ import annotations

from typing import Any

from ..data.batches import Text
from ..display import print_table, printable
from ..errors import ConfigError
from ..formats.disk import JsonObject
from ..lora import PeftModel
from .files import format_row, print_json
from .measuring import (
    add_measuring_options,
    format_estimate,
    load_plain_base,
    read_measured_text,
    require_data,
    require_vocabulary,
)
from .options import (
    DATA,
    Args,
    Command,
    Parser,
    add_download,
    add_json,
    find_models,
    option,
    path,
)
from .reading import has_tasks, read_tokenizer, require_finite

NAMES = ("first", "second")  # of the two adapters in a model


def add_compare_options(parser: Parser) -> None:
    option(parser, "first A", "an adapter in PEFT's format", type=path)
    option(parser, "second B", "another adapter of the same model", type=path)
    text = "their base, its folder or org/name: checks that both fit it; needed for --data"
    option(parser, "--base DIR", text)
    add_download(parser)
    option(parser, "--data FILE", f"measures how they interfere on it: {DATA}")
    add_measuring_options(parser)
    add_json(parser)


def compare(args: Args) -> None:
    from ..tools.overlap import compare as run

    require_data(args)
    for folder in (args.first, args.second):
        if has_tasks(folder, None):
            raise ConfigError(
                f"{folder!r:.200} has several tasks: give the folder of one adapter inside it"
            )
    find_models(args)
    report = run(args.first, args.second, args.base)
    if args.data is not None:
        report["loss"] = _measure_interference(args)
    if args.json:
        print_json(report)
    else:
        _print_comparison(report)


def _measure_interference(args: Args) -> JsonObject:
    """Losses in nats per token, each with its standard error."""
    from ..tools.interference import measure_interference

    base = load_plain_base(args)
    size = base.config.vocab_size
    folders = (args.first, args.second)
    tokenizers = [read_tokenizer(args.base, size, folder) for folder in folders]
    model: Any = PeftModel.from_pretrained(base, folders[0], NAMES[0])
    model.load_adapter(folders[1], NAMES[1])
    require_vocabulary(model, size, args.base)
    require_finite(model, args.base, advice="")
    model.set_adapter(list(NAMES), inference_mode=True)
    texts = [read_measured_text(args, tokenizer, base) for tokenizer in tokenizers]
    (text, context), (other, _) = texts
    if not _are_equal_texts(text, other):
        raise ConfigError(
            f"{folders[0]!r:.150} and {folders[1]!r:.150} have different tokenizers, which make "
            "different tokens of --data: their losses cannot be compared; leave out --data"
        )
    measured = measure_interference(model, NAMES, text, context, args.limit, args.threads)
    return {name: one.as_dict() for name, one in measured.items()}


def _are_equal_texts(one: Text, other: Text) -> bool:
    from ..training.run import text_checksums

    return text_checksums(one) == text_checksums(other)


def _print_comparison(report: JsonObject) -> None:
    rows = [_comparison_row(row) for row in report["layers"]]
    total = report["total"]
    last: JsonObject = {"layer": "total", "r": ""}
    for name in ("|dW1|", "|dW2|", "cosine", "|B1 A2|", "|B2 A1|"):
        last[name] = total[name]
    for side, short in (("outputs", "out"), ("inputs", "in")):
        last[f"phi(1,1) {short}"] = total[f"phi of first {side}"]
        last[f"phi {short}"] = total[f"phi of all {side}"]
        last[f"chance {short}"] = total[f"chance of all {side}"]
        last[f"angle {short}"] = None
    last = {name: last[name] for name in rows[0]} if rows else last
    print_table([format_row(row) for row in [*rows, last]])
    print()
    for name in ("only in a", "only in b", "replaced"):
        if report[name]:
            print(printable(f"{name}: {', '.join(report[name])}"))
    print("phi: overlap of the first, or of all, directions of outputs and inputs, in [0, 1];")
    print("chance: phi of random directions; angle: the smallest, in degrees; total: means of phi")
    for name, one in report.get("loss", {}).items():
        measured = format_estimate(one, name == "interference")
        print(f"{name:12} {measured} nats per token")


def _comparison_row(row: JsonObject) -> JsonObject:
    result = {"layer": row["layer"], "r": " and ".join(map(str, row["r"]))}
    result |= {name: row[name] for name in ("|dW1|", "|dW2|", "cosine")}
    for side, short in (("outputs", "out"), ("inputs", "in")):
        table, angles = row[side]["phi"], row[side]["angles"]
        result[f"phi(1,1) {short}"] = table[0]["phi"] if table else None
        result[f"phi {short}"] = table[-1]["phi"] if table else None
        result[f"chance {short}"] = table[-1]["chance"] if table else None
        result[f"angle {short}"] = angles[0] if angles else None
    result |= {name: row[name] for name in ("|B1 A2|", "|B2 A1|")}
    return result


COMMANDS = (
    Command(
        compare,
        add_compare_options,
        "Show how two adapters overlap, and with --data how they interfere on a text.",
        "a b --base base --data notes.txt",
        prints=True,
    ),
)
