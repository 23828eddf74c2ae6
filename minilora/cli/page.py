"""report: one page about a run, or about a base with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..display import printable
from ..errors import ConfigError, MiniloraError
from ..training.replaying import read_command
from .measuring import CONTEXT
from .options import (
    DATA,
    Args,
    Command,
    Once,
    Parser,
    add_download,
    add_quantize,
    add_start,
    add_strict,
    option,
    path,
    positive_integer,
)
from .reading import has_tasks
from .replaying import parse_command
from .reporting import PAGE


def add_report_options(parser: Parser) -> None:
    text = "the folder of a run of finetune; in its place: --base and --adapter"
    option(parser, "directory RUN", text, nargs="?", type=path)
    text = "the base model: its folder, or org/name; of a RUN: what its command names"
    option(parser, "--base DIR", text)
    add_download(parser)
    option(parser, "--adapter DIR", "adapter in PEFT's format", action=Once)
    add_start(parser)
    add_quantize(parser)
    text = f"measures on it; of a RUN: what it held out of its text; {DATA}"
    option(parser, "--data FILE", text)
    option(parser, "--also FILE", "a second text: what the adapter forgets of it")
    text = f"page to write, which ends in .html (default: {PAGE} in RUN, or beside the adapter)"
    option(parser, "--out FILE", text)
    text = f"tokens per window, at least 1 (default: as in the run, or up to {CONTEXT})"
    option(parser, "--context T", text)
    text = "most windows to measure of each text, at least 1 (default: by the model's size)"
    option(parser, "--limit N", text, type=positive_integer)
    option(parser, "--threads K", "threads, each for a window, at least 1 (default: one per core)")
    add_strict(parser)


def report(args: Args) -> None:
    from ..lab.report.gathering import gather
    from ..lab.report.writing import require_available, require_replaceable, write_page
    from .sources import Reader

    require_available()
    _require_subject(args)
    place = Path(args.out or Path(args.directory or args.adapter) / PAGE)
    require_replaceable(place)
    sources = Reader(_find_inputs(args), args).read()
    size = write_page(gather(sources, args.threads), place)
    print(printable(f"{place}, {size / 1e6:.1f} MB"))


def _require_subject(args: Args) -> None:
    """ConfigError unless the options name either a run, or a base and an adapter."""
    if args.directory is not None and args.adapter is not None:
        raise ConfigError("give either RUN, which has its adapter, or --base and --adapter")
    if args.directory is None and (args.base is None or args.adapter is None):
        raise ConfigError("give RUN, the folder of a run, or both --base DIR and --adapter DIR")
    if args.directory is None and args.also is not None and args.data is None:
        raise ConfigError("--also is measured beside --data: give both, or leave --also out")
    if args.directory is not None and not Path(args.directory).is_dir():
        raise ConfigError(f"RUN must be the folder of a run, got {args.directory!r:.200}")
    if args.adapter is not None and has_tasks(args.adapter, None):
        raise ConfigError(
            f"--adapter {args.adapter!r:.200} has several tasks: give the folder of one adapter "
            "inside it"
        )


def _find_inputs(args: Args) -> Any:
    """`Inputs` of the options."""
    from .sources import inputs_of_adapter, inputs_of_run

    if args.directory is None:
        return inputs_of_adapter(args)
    run = Path(args.directory)
    args.directory = None  # a run is not on the hub: --download is for its base
    missing: dict[str, str] = {}
    words: Sequence[str] = ()
    options = None
    if run.is_dir():
        try:
            words = read_command(run)
            options = parse_command(words, run, None, args.threads)
        except MiniloraError as error:
            missing["data"] = f"give --data FILE: the run does not name its text ({error})"
    return inputs_of_run(run, options, words, missing, args)


COMMANDS = (
    Command(
        report,
        add_report_options,
        "Write one page about a run or an adapter: layers, ranks, text and what changed.",
        "runs/finetune-001",
    ),
)
