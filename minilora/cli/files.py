"""The commands that need files alone, merge, combine, inspect, diff, extract, ...: their options, and what they do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..display import print_table, printable
from ..errors import ConfigError, FormatError
from ..formats.disk import read_json
from ..lora.combining import COMBINATION_TYPES
from ..lora.multitask import FILE as MULTITASK

PICTURES = (".png", ".svg", ".pdf")
DTYPES = ("float32", "float16", "bfloat16")
Command = Callable[[str, str, str], argparse.ArgumentParser]

# ---- options ----


def define(command: Command, whole: Callable[[int], Callable[[str], int]]) -> None:
    """Add the commands to the parser; `whole(n)` reads an integer of at least n."""

    def common(sub: argparse.ArgumentParser, out: bool = True, finite: bool = False) -> None:
        if out:
            sub.add_argument("--out", required=True, metavar="DIR", help="a new folder")
        if finite:
            sub.add_argument(
                "--allow-nonfinite",
                action="store_true",
                help="even where a weight is NaN or infinite",
            )
        sub.add_argument("--json", action="store_true", help="for programs")
        sub.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )

    text = "Add adapters into their base's weights: file to file, in float64, rounded once."
    sub = command("merge", text, "--base base --adapter adapter --out merged")
    sub.add_argument(
        "--base", required=True, metavar="DIR", help="config.json and model.safetensors, or shards"
    )
    text = "in PEFT's format; again for each that is to be added"
    sub.add_argument(
        "--adapter", dest="adapters", required=True, action="append", metavar="DIR", help=text
    )
    sub.add_argument(
        "--task", metavar="NAME", help="which one of an adapter that finetune --tasks made"
    )
    sub.add_argument(
        "--weights", type=_numbers, metavar="X,X", help="times what each adapter is added (1)"
    )
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="D",
        help=f"{', '.join(DTYPES)} (default: as it is stored)",
    )
    sub.add_argument(
        "--threads", type=whole(1), metavar="K", help="blocks of rows at once (default: one a core)"
    )
    common(sub, finite=True)

    text = "Several adapters added up to one."
    sub = command(
        "combine", text, "--adapter a --adapter b --weights 0.5,0.5 --how svd --r 8 --out both"
    )
    text = "in PEFT's format; again for each that is to be added"
    sub.add_argument(
        "--adapter", dest="adapters", required=True, action="append", metavar="DIR", help=text
    )
    sub.add_argument(
        "--weights", type=_numbers, metavar="X,X", help="times what each adapter is added (1)"
    )
    text = "cat (ranks add up: exact), svd (the nearest of rank r) or linear (PEFT's, with cross terms)"
    sub.add_argument("--how", choices=COMBINATION_TYPES, default="cat", metavar="WAY", help=text)
    sub.add_argument(
        "--r",
        type=whole(1),
        metavar="R",
        help="rank of every layer, with svd (default: their largest)",
    )
    common(sub)

    sub = command("inspect", "What an adapter or a checkpoint holds.", "adapter --base base")
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument(
        "--base",
        metavar="DIR",
        help="set an adapter beside its base: |dW| / |W|, and whether they fit",
    )
    sub.add_argument("--plot", metavar="FILE", help="draw the spectrum of each layer's dW")
    common(sub, out=False)

    sub = command("diff", "How far apart two checkpoints are, tensor by tensor.", "base tuned")
    sub.add_argument("directory", metavar="A")
    sub.add_argument("other", metavar="B")
    text = "of each matrix the numerical rank of B - A (default: where a side has at most 2,048)"
    sub.add_argument("--ranks", action=argparse.BooleanOptionalAction, default=None, help=text)
    common(sub, out=False)

    text = "An adapter from the difference of two checkpoints."
    sub = command("extract", text, "--base base --tuned tuned --r 16 --out adapter")
    sub.add_argument("--base", required=True, metavar="DIR")
    sub.add_argument("--tuned", required=True, metavar="DIR", help="the same model, trained on")
    sub.add_argument("--r", required=True, type=whole(1), metavar="R", help="rank of every layer")
    common(sub)

    sub = command(
        "resize",
        "An adapter of another rank, as near as it can be.",
        "--adapter adapter --r 4 --out small",
    )
    sub.add_argument("--adapter", required=True, metavar="DIR", help="in PEFT's format")
    sub.add_argument("--r", required=True, type=whole(1), metavar="R", help="rank of every layer")
    common(sub)

    text = (
        "A checkpoint or an adapter in another dtype; an adapter between PEFT's files and mlx-lm's."
    )
    sub = command("convert", text, "adapter --to mlx --out adapter-mlx")
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="D",
        help=f"{', '.join(DTYPES)}: every float, rounded once",
    )
    sub.add_argument(
        "--to",
        choices=("peft", "mlx"),
        metavar="F",
        help="peft or mlx: whose files an adapter gets",
    )
    common(sub, finite=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is no list of numbers, such as 0.5,-1"
        ) from None


# ---- commands ----


def merge(args: argparse.Namespace) -> None:
    from ..formats.folders import require_outside
    from ..tools.merging import merge as run

    require_outside(args.out, base=args.base)
    for folder in args.adapters:
        require_outside(args.out, adapter=folder)
    if args.task is not None or any(
        (Path(folder) / MULTITASK).exists() for folder in args.adapters
    ):
        args.adapters = _of_task(args.adapters, args.task)
    options = {
        "dtype": args.dtype,
        "threads": args.threads,
        "allow_nonfinite": args.allow_nonfinite,
    }
    rows = run(args.base, args.adapters, args.out, args.weights, **options)
    if args.json:
        print(json.dumps({"merged": args.out, "tensors": rows}, indent=2))
        return
    print(f"merged into {printable(args.out)}")
    known = [row for row in rows if row["lost"] is not None]
    if known:
        worst = max(known, key=lambda row: row["lost"])
        print(f"rounding took at most {worst['lost']:.2%} of a dW: of {printable(worst['tensor'])}")
        if worst["lost"] > 0.01:
            print_table([_short(row) for row in rows])


def _of_task(folders: list[str], task: str | None) -> list[str]:
    """The adapters that a task of a folder of several has."""
    folder = Path(folders[0])
    if len(folders) > 1:
        raise ConfigError(
            "--adapter with several tasks stands alone: the task says which adapters are added"
        )
    if not (folder / MULTITASK).exists():
        raise ConfigError(f"--adapter {folders[0]!r} holds one adapter: there is no task to choose")
    tasks = _tasks(folder)
    if task not in tasks:
        what = "choose one with --task" if task is None else f"there is no {task!r:.60}"
        raise ConfigError(f"--adapter holds several tasks: {what}: {', '.join(tasks)}"[:300])
    return [str(folder if name == "default" else folder / name) for name in tasks[task]]


def _tasks(folder: Path) -> dict[str, list[str]]:
    """A folder's tasks, and the names of the adapters of each, none of which leads out of the folder."""
    tasks = read_json(folder / MULTITASK).get("tasks")
    listed = isinstance(tasks, dict) and all(
        isinstance(v, list) and all(map(_is_name, v)) for v in tasks.values()
    )
    if not isinstance(tasks, dict) or not listed:
        raise FormatError(
            f"{folder / MULTITASK}: expected tasks, and for each of them the names of its adapters"
        )
    return tasks


def _is_name(name: Any) -> bool:
    return (
        isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    )


def combine(args: argparse.Namespace) -> None:
    from ..tools.combining import combine as run

    _print_factored(args, run(args.adapters, args.out, args.weights, args.how, args.r), args.how)


def inspect(args: argparse.Namespace) -> None:
    from ..tools.inspecting import inspect_adapter, inspect_checkpoint

    folder = Path(args.directory)
    if (folder / MULTITASK).exists():
        names = sorted({name for own in _tasks(folder).values() for name in own})
        raise ConfigError(
            f"{args.directory!r} holds several adapters: inspect one of them: {', '.join(names)}"[
                :300
            ]
        )
    adapter = (folder / "adapter_config.json").exists()
    if not adapter and (args.base or args.plot):
        raise ConfigError("--base and --plot are for an adapter: of two checkpoints, diff tells")
    if args.plot and Path(args.plot).suffix not in PICTURES:
        raise ConfigError(
            f"--plot {args.plot!r:.200}: a picture's name ends in {', '.join(PICTURES)}"
        )
    report = inspect_adapter(folder, args.base) if adapter else inspect_checkpoint(folder)
    spectra = report.pop("spectra", {})
    if args.plot:
        from ..lab import plots  # matplotlib is optional, and slow to import

        plots.spectra(Path(args.plot), spectra)
    if args.json:
        print(json.dumps({**report, **({"spectra": spectra} if spectra else {})}, indent=2))
        return
    _print_report(report)


def diff(args: argparse.Namespace) -> None:
    from ..tools.comparing import diff as run

    report = run(args.directory, args.other, args.ranks)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    _print_report(
        {**report, "tensors": [_short(row) for row in report["tensors"] if row["|b - a|"] != 0]}
    )


def extract(args: argparse.Namespace) -> None:
    from ..tools.factoring import extract as run

    _print_factored(args, run(args.base, args.tuned, args.r, args.out), f"rank {args.r}")


def resize(args: argparse.Namespace) -> None:
    from ..tools.factoring import resize as run

    _print_factored(args, run(args.adapter, args.r, args.out), f"rank {args.r}")


def convert(args: argparse.Namespace) -> None:
    from ..tools.converting import convert as run

    said = run(args.directory, args.out, args.dtype, args.to, args.allow_nonfinite)
    print(
        json.dumps({"out": args.out, "is": said})
        if args.json
        else f"{said} -> {printable(args.out)}"
    )


# ---- what they show ----


def _print_factored(args: argparse.Namespace, rows: list[dict[str, Any]], by: str) -> None:
    if args.json:
        print(json.dumps({"out": args.out, "tensors": rows}, indent=2))
        return
    print_table([_short(row) for row in rows])
    whole, missed = (sum(row[name] ** 2 for row in rows) ** 0.5 for name in ("|dW|", "error"))
    share = f"{missed / whole:.3%}" if whole else f"{missed:.3g} of a dW that is 0"
    print(f"\nof all layers together {by} misses {share} -> {printable(args.out)}")


def _print_report(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name != "tensors":
            value = ", ".join(map(str, value)) or "-" if isinstance(value, list) else value
            print(
                f"{name:18} {format(value, ',') if type(value) is int else printable(str(value))}"
            )
    if report["tensors"]:
        print()
        print_table(report["tensors"])


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {
        k: f"{v:.4g}" if isinstance(v, float) else "-" if v is None else v for k, v in row.items()
    }


COMMANDS = {f.__name__: f for f in (merge, combine, inspect, diff, extract, resize, convert)}
