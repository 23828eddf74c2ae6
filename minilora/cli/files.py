"""merge, combine, inspect, diff, extract, resize, convert: commands that read and write files."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..display import print_table, printable
from ..errors import ConfigError, FormatError
from ..formats.disk import JsonObject, read_json
from ..lora.combining import COMBINATION_TYPES
from ..lora.multitask import FILE as MULTITASK
from ..lora.pruning import MAJORITY_SIGNS, PRUNED
from ..lora.tying import CHOICES
from .measuring import add_effects_options, measure_adapter, print_effects, require_data
from .options import (
    DTYPES,
    Args,
    Command,
    Parser,
    add_allow_nonfinite,
    add_base,
    add_download,
    add_json,
    add_seed,
    add_start,
    add_task,
    find_models,
    option,
    path,
)
from .reading import choose_task, has_tasks

PLAIN = "plain"
PICTURES = (".png", ".svg", ".pdf")


def _add_out(parser: Parser) -> None:
    option(parser, "--out DIR", "a new or empty folder", required=True)


def _add_adapters(parser: Parser) -> None:
    text = "adapter in PEFT's format; repeat the option to add several"
    option(parser, "--adapter DIR", text, dest="adapters", required=True, action="append")
    text = "finite factor of each adapter, in their order (default: 1 for each)"
    option(parser, "--weights X,X", text)


def _add_dtype(parser: Parser, default: str) -> None:
    text = f"dtype of the written floats: {', '.join(DTYPES)} (default: {default})"
    option(parser, "--dtype D", text, choices=DTYPES)


# ---- merge ---------------------------------------------------------------------------------------


def add_merge_options(parser: Parser) -> None:
    add_base(parser)
    _add_adapters(parser)
    add_start(parser)
    add_task(parser)
    _add_dtype(parser, "as stored")
    text = "threads, each for a block of rows, at least 1 (default: one per core)"
    option(parser, "--threads K", text)
    text = "for an adapter of the embedding or of the head that shares its weight: untie keeps the "
    text += "output with two weights, share changes both places as peft does (default: refuse)"
    option(parser, "--tied WAY", text, choices=CHOICES)
    text = "add dW to what NF4 makes of the linear layers, on which QLoRA trained: nf4, or "
    text += "nf4,double with double quantization (default: to the weights themselves)"
    option(parser, "--onto Q", text)
    _add_out(parser)
    add_allow_nonfinite(parser)
    add_json(parser)


def merge(args: Args) -> None:
    from ..formats.folders import require_outside
    from ..tools.merging import merge as run

    find_models(args)
    require_outside(args.out, base=args.base)
    for folder in args.adapters:
        require_outside(args.out, adapter=folder)
    rows = run(
        args.base,
        _adapters_of_task(args.adapters, args.task),
        args.out,
        args.weights,
        dtype=args.dtype,
        threads=args.threads,
        allow_nonfinite=args.allow_nonfinite,
        tied=args.tied,
        initial=args.initial,
        base_is=args.base_is,
        onto=args.onto,
    )
    if args.json:
        print_json({"merged": args.out, "tensors": rows})
        return
    print(f"merged into {printable(args.out)}")
    known = [row for row in rows if row["lost"] is not None]
    if not known:
        return
    worst = max(known, key=lambda row: row["lost"])
    print(f"rounding took at most {worst['lost']:.2%} of a dW, in {printable(worst['tensor'])}")
    if worst["lost"] > 0.01 or args.onto:
        print_table([format_row(row) for row in rows])


def _adapters_of_task(folders: list[str], task: str | None) -> list[str]:
    """The folders of the adapters that a task adds; `folders` if none of them has tasks."""
    several = [folder for folder in folders if (Path(folder) / MULTITASK).exists()]
    if len(folders) > 1 and (several or task is not None):
        message = "--adapter must be given once if it has tasks or with --task"
        raise ConfigError(f"{message}, got {len(folders)}: merge one task at a time")
    folder = folders[0]
    if not has_tasks(folder, task):
        return folders
    tasks = _read_tasks(Path(folder))
    names = tasks[choose_task(folder, task, tasks)]
    return [folder if name == "default" else str(Path(folder) / name) for name in names]


def _read_tasks(folder: Path) -> dict[str, list[str]]:
    """{task: names of its adapters} of a folder. FormatError if a name leads out of the folder."""
    tasks = read_json(folder / MULTITASK).get("tasks")
    if not isinstance(tasks, dict) or not all(map(_is_names, tasks.values())):
        raise FormatError(f"{folder / MULTITASK}: expected tasks, each with the names of adapters")
    return tasks


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _is_name(value: Any) -> bool:
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    return not set(value) & {"/", "\\", "\0"}


# ---- combine, extract, resize --------------------------------------------------------------------


def add_combine_options(parser: Parser) -> None:
    _add_adapters(parser)
    add_start(parser)
    text = (
        "cat (exact: ranks add up), svd (nearest of rank r), linear (PEFT's, with cross terms), or "
    )
    text += f"the nearest of rank r to a sum of pruned dW: {', '.join(PRUNED)}"
    option(parser, "--how WAY", text, choices=COMBINATION_TYPES, default="cat")
    text = "pruned sums: the share of each dW that stays, in (0, 1]"
    option(parser, "--density X", text)
    text = f"ties, dare_ties: whose sign counts: {' or '.join(MAJORITY_SIGNS)}"
    option(parser, "--majority-sign-method M", text, choices=MAJORITY_SIGNS, default="total")
    add_seed(parser)
    text = "rank of every layer, but with cat and linear, at least 1 (default: the largest of the "
    option(parser, "--r R", text + "adapters)")
    _add_rank_rules(parser)
    _add_out(parser)
    add_json(parser)


def combine(args: Args) -> None:
    from ..tools.combining import combine as run

    names = ("density", "majority_sign_method", "seed", "initial", "base_is")
    options = {name: getattr(args, name) for name in names}
    rules = _rank_rules(args)
    rows = run(args.adapters, args.out, args.weights, args.how, args.r, **options, **rules)
    _print_errors(args, rows, args.how)


def _add_rank(parser: Parser) -> None:
    option(parser, "--r R", "rank of every layer, at least 1; or one of the next three")
    _add_rank_rules(parser)
    _add_out(parser)
    add_json(parser)


def _add_rank_rules(parser: Parser) -> None:
    text = "rank of each layer: the smallest that keeps this share of |dW|^2, in (0, 1]"
    option(parser, "--energy X", text)
    text = "rank of each layer: the smallest whose error / |dW| is at most this, at least 0"
    option(parser, "--error X", text)
    text = "ranks that keep the most of all dW in this many numbers, at least 1"
    option(parser, "--budget N", text)


def _rank_rules(args: Args) -> JsonObject:
    return {name: getattr(args, name) for name in ("energy", "error", "budget")}


def add_extract_options(parser: Parser) -> None:
    add_base(parser)
    option(
        parser, "--tuned DIR", "the same model after training, given as --base is", required=True
    )
    _add_rank(parser)


def extract(args: Args) -> None:
    from ..tools.factoring import extract as run

    find_models(args)
    rows = run(args.base, args.tuned, args.r, args.out, **_rank_rules(args))
    _print_errors(args, rows, _rank_text(args))


def add_resize_options(parser: Parser) -> None:
    option(parser, "--adapter DIR", "adapter in PEFT's format", required=True)
    add_start(parser)
    _add_rank(parser)


def resize(args: Args) -> None:
    from ..tools.factoring import resize as run

    start = {"initial": args.initial, "base_is": args.base_is}
    rows = run(args.adapter, args.r, args.out, **_rank_rules(args), **start)
    _print_errors(args, rows, _rank_text(args))


def _rank_text(args: Args) -> str:
    """How the ranks were chosen: "rank 4", or "energy 0.9"."""
    if args.r is not None:
        return f"rank {args.r}"
    [(name, value)] = [pair for pair in _rank_rules(args).items() if pair[1] is not None]
    return f"{name} {value}"


def _print_errors(args: Args, rows: list[JsonObject], how: str) -> None:
    """Print how far the new adapter is from the exact dW, per layer and over all layers."""
    if args.json:
        print_json({"out": args.out, "tensors": rows})
        return
    print_table([format_row(row) for row in rows])
    whole = math.sqrt(sum(row["|dW|"] ** 2 for row in rows))
    error = math.sqrt(sum(row["error"] ** 2 for row in rows))
    share = f"{error:.3g} of a dW that is 0"
    if whole:
        relative = error / whole
        share = f"{relative:.3%} of dW ({max(0.0, 1 - relative**2):.3%} of its energy stays)"
    print(f"\nerror with {how} over all layers: {share} -> {printable(args.out)}")


# ---- inspect, diff -------------------------------------------------------------------------------


def add_inspect_options(parser: Parser) -> None:
    option(parser, "directory DIR", "an adapter or a checkpoint")
    add_download(parser)
    option(parser, "--base DIR", "base of the adapter: shows |dW| / |W|, and whether the two fit")
    add_start(parser)
    text = f"draw the singular values of each layer's dW; ends in {', '.join(PICTURES)}"
    option(parser, "--plot FILE", text)
    add_effects_options(parser)
    add_json(parser)


def inspect(args: Args) -> None:
    from ..tools.inspecting import inspect_adapter, inspect_checkpoint

    require_data(args)
    find_models(args)
    folder = Path(args.directory)
    if (folder / MULTITASK).exists():
        names = sorted({name for adapters in _read_tasks(folder).values() for name in adapters})
        given = f"{args.directory!r:.100} has the adapters {', '.join(names)}"
        raise ConfigError(f"{given}: inspect one of these folders inside it")
    is_adapter = (folder / "adapter_config.json").exists()
    if not is_adapter and (args.base or args.plot or args.initial or args.base_is):
        message = "--base, --data, --plot, --initial and --base-is are for an adapter, and "
        message += f"{args.directory!r:.100} is none"
        raise ConfigError(f"{message}: leave them out, or compare checkpoints with diff")
    if args.plot and Path(args.plot).suffix not in PICTURES:
        raise ConfigError(f"--plot must end in {', '.join(PICTURES)}, got {args.plot!r:.200}")
    if is_adapter:
        report = inspect_adapter(folder, args.base, args.initial, args.base_is)
    else:
        report = inspect_checkpoint(folder)
    spectra = report.pop("spectra", {})
    if args.plot:
        from ..lab import plots  # matplotlib is optional, and slow to import

        plots.spectra(Path(args.plot), spectra)
    effects = measure_adapter(args, args.directory) if args.data is not None else None
    if not args.json:
        _print_report(report)
        if effects is not None:
            sizes = {row["layer"]: row["|dW| / |W|"] for row in report["tensors"]}
            print_effects(effects, sizes)
        return
    if effects is not None:
        report["effects"] = effects
    if spectra:
        report["spectra"] = spectra
    print_json(report)


def add_diff_options(parser: Parser) -> None:
    option(parser, "directory A", "a checkpoint", type=path)
    add_download(parser)
    option(parser, "other B", "another checkpoint of the same model", type=path)
    text = "show the rank of B - A of each matrix (default: of those with a side up to 2,048)"
    option(parser, "--ranks", text, action=argparse.BooleanOptionalAction)
    add_json(parser)


def diff(args: Args) -> None:
    from ..tools.comparing import diff as run

    find_models(args)
    report = run(args.directory, args.other, args.ranks)
    if args.json:
        print_json(report)
        return
    changed = [row for row in report["tensors"] if row["|b - a|"] != 0]
    _print_report({**report, "tensors": [format_row(row) for row in changed]})


# ---- convert -------------------------------------------------------------------------------------


def add_convert_options(parser: Parser) -> None:
    option(parser, "directory DIR", "a checkpoint or an adapter")
    add_download(parser)
    _add_dtype(parser, "none; give this or --to")
    text = "peft or mlx: whose files the adapter gets; plain: LoRA over the base as it was before "
    text += "the adapter's start changed it (default: none; give this or --dtype)"
    option(parser, "--to F", text, choices=("peft", "mlx", PLAIN))
    text = "with --to plain: the base as it was, from which the first values of pissa, olora follow"
    option(parser, "--base DIR", text)
    add_start(parser)
    text = "with --to plain: the nearest adapter of this rank (default: twice the rank, no error)"
    option(parser, "--r R", text)
    _add_out(parser)
    add_allow_nonfinite(parser)
    add_json(parser)


def convert(args: Args) -> None:
    from ..tools.converting import convert as run

    find_models(args)
    given = {name: getattr(args, name) for name in ("base", "r") if getattr(args, name)}
    if args.to == PLAIN:
        _convert_to_plain(args)
        return
    if given:
        names = ", ".join(f"--{name}" for name in given)
        raise ConfigError(f"{names}: for --to plain alone: leave it out")
    start = args.initial, args.base_is
    kind = run(args.directory, args.out, args.dtype, args.to, args.allow_nonfinite, *start)
    if args.json:
        print(json.dumps({"out": args.out, "is": kind}))
    else:
        print(f"{kind} -> {printable(args.out)}")


def _convert_to_plain(args: Args) -> None:
    from ..tools.plain import make_plain

    for option_name, value in (("--dtype", args.dtype), ("--base-is", args.base_is)):
        if value is not None:
            raise ConfigError(
                f"--to plain writes an adapter for the base as it was: leave out "
                f"{option_name} {value}"
            )
    rows = make_plain(args.directory, args.out, args.base, args.initial, args.r)
    _print_errors(args, rows, "plain LoRA")


# ---- what they print -----------------------------------------------------------------------------


def print_json(value: JsonObject) -> None:
    print(json.dumps(value, indent=2))


def _print_report(report: JsonObject) -> None:
    for name, value in report.items():
        if name == "tensors":
            continue
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "-"
        shown = f"{value:,}" if type(value) is int else printable(str(value))
        print(f"{name:18} {shown}")
    if report["tensors"]:
        print()
        print_table(report["tensors"])


def format_row(row: JsonObject) -> JsonObject:
    """A row of a table with four digits of each float, also in lists, and "-" for None."""
    result = dict(row)
    for key, value in row.items():
        if value is None:
            result[key] = "-"
        elif isinstance(value, float):
            result[key] = f"{value:.4g}"
        elif isinstance(value, list):
            result[key] = ", ".join("-" if one is None else f"{one:.4g}" for one in value)
    return result


COMMANDS = (
    Command(
        merge,
        add_merge_options,
        "Add adapters to their base's weights, file to file, in float64 and rounded once.",
        "--base base --adapter adapter --out merged",
    ),
    Command(
        combine,
        add_combine_options,
        "Add several adapters up to one.",
        "--adapter a --adapter b --weights 0.5,0.5 --how svd --r 8 --out both",
    ),
    Command(
        inspect,
        add_inspect_options,
        "Show what an adapter or a checkpoint contains.",
        "adapter --base base",
        prints=True,
    ),
    Command(
        diff,
        add_diff_options,
        "Compare two checkpoints, tensor by tensor.",
        "base tuned",
        prints=True,
    ),
    Command(
        extract,
        add_extract_options,
        "Make an adapter from the difference of two checkpoints.",
        "--base base --tuned tuned --r 16 --out adapter",
    ),
    Command(
        resize,
        add_resize_options,
        "Make the nearest adapter of another rank.",
        "--adapter adapter --energy 0.9 --out small",
    ),
    Command(
        convert,
        add_convert_options,
        "Write a checkpoint or an adapter in another dtype, or an adapter in other files.",
        "adapter --to mlx --out adapter-mlx",
    ),
)
