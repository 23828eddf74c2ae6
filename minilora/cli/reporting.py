"""What pretrain and finetune show at their end: a picture of the losses, a table, and a page."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..display import print_table, printable
from ..errors import MiniloraError, describe_os_error, shorten
from ..formats.folders import LOCK
from ..training.checkpoints import read_log

UNIT = "nats per token"
PAGE = "report.html"
WINDOW = 10  # the last steps whose mean is the training loss at the end


class Report(NamedTuple):
    """A run that is done.

    title             the command
    out               its folder
    result            of `train`
    bytes_per_token   of the held-out text
    trained           the number of parameters that were trained
    """

    title: str
    out: Path
    result: Any
    bytes_per_token: float
    trained: int
    also_bytes_per_token: float = 1.0  # of the second text, if there is one


def draw_pictures(report: Report, losses: bool = True, ranks: bool = False) -> None:
    """Write loss.png, and rank_allocation.png for AdaLoRA's `ranks`, into the run's folder.

    The command does not fail if a picture cannot be drawn: one line says why.
    """
    from ..lab import plots  # matplotlib is optional, and slow to import
    from ..training.loop import bits_per_byte, rank_history

    reason = plots.why_unavailable()
    if reason:
        print(printable(f"(no pictures: {reason})"))
        return
    out, result = report.out, report.result

    def bits(loss: float) -> float:
        return bits_per_byte(loss, report.bytes_per_token)

    try:
        if losses:
            training = [bits(loss) for loss in result.losses]
            held_out = [(step, bits(loss)) for step, loss in result.evaluations]
            ratio = report.also_bytes_per_token
            also = [(step, bits_per_byte(loss, ratio)) for step, loss in result.also]
            path = out / "loss.png"
            plots.losses_of_run(path, report.title, training, held_out, result.step, also)
        if ranks:
            plots.rank_allocation(out / "rank_allocation.png", *rank_history(out))
    except Exception as error:  # a full disk, a font: the run is saved, whatever it is
        print(printable(f"(no picture: {_describe(error)})"))


def write_page_of_run(out: Path, options: argparse.Namespace) -> None:
    """Write report.html into the folder of a run of finetune that is done.

    The command does not fail if the page cannot be written: one line says why.
    """
    from ..lab.report.gathering import gather
    from ..lab.report.writing import require_available, require_replaceable, write_page
    from .sources import Reader, inputs_of_run

    args = argparse.Namespace(**vars(options))
    args.initial = args.base_is = None  # of the adapter that training went on from
    args.quantize = "none"  # nothing is given for the page: what the run says counts
    place = out / PAGE
    try:
        require_available()
        require_replaceable(place)
        inputs = inputs_of_run(out, options, options.parser.words, {})
        size = write_page(gather(Reader(inputs, args).read(), options.threads), place)
    except Exception as error:  # a full disk, a text that has changed: the run is saved
        print(printable(f"(no page: {_describe(error)})"))
        return
    print(printable(f"{place}, {size / 1e6:.1f} MB"))


def _describe(error: Exception) -> str:
    """What went wrong; an error that nobody expects has its kind before it."""
    if isinstance(error, OSError):
        return shorten(describe_os_error(error))
    if isinstance(error, MiniloraError):
        return str(error)
    return shorten(f"{type(error).__name__}: {error}")


def print_report(report: Report) -> None:
    """Print what the run measured, and the files that it has written."""
    from ..training.loop import bits_per_byte

    result = report.result
    done = len(result.losses)
    rows = []

    def add(measure: str, value: str, step: int | str = "") -> None:
        rows.append({"measure": measure, "value": value, "step": step})

    if done:
        last = result.losses[-WINDOW:]
        add("training loss, first", f"{result.losses[0]:.4f} {UNIT}", 0)
        mean = math.fsum(last) / len(last)
        add(f"training loss, mean of the last {len(last)}", f"{mean:.4f} {UNIT}", done - 1)
    if result.evaluations:
        best = min(result.evaluations, key=lambda evaluation: evaluation[1])
        named = {"first": result.evaluations[0], "best": best, "last": result.evaluations[-1]}
        for name, (step, loss) in named.items():
            add(f"held-out loss, {name}", f"{loss:.4f} {UNIT}", step)
    if result.also:
        for name, (step, loss) in {"first": result.also[0], "last": result.also[-1]}.items():
            add(f"second text's loss, {name}", f"{loss:.4f} {UNIT}", step)
    add("weights saved", "", result.step)
    speed = _tokens_per_second(report.out / "log.jsonl")
    if speed is not None:
        add("tokens per second", f"{speed:,.0f}")
    add("trained parameters", f"{report.trained:,}")
    print_table(rows)
    names = sorted(name for name in os.listdir(report.out) if name != LOCK)
    print(printable(f"files: {', '.join(names)}"))
    before = bits_per_byte(result.evaluations[0][1], report.bytes_per_token)
    after = bits_per_byte(result.loss, report.bytes_per_token)
    if result.also:
        first, last = result.also[0][1], result.also[-1][1]
        saved = dict(result.also).get(result.step, last)
        bits = [bits_per_byte(loss, report.also_bytes_per_token) for loss in (first, saved)]
        print(f"second text's bits per byte {bits[0]:.3f} -> {bits[1]:.3f}")
    print(f"held-out bits per byte {before:.3f} -> {after:.3f} in {result.seconds:.0f} s")


def _tokens_per_second(log: Path) -> float | None:
    """The tokens of all steps over their seconds, by a run's log; None if that does not say."""
    if not log.is_file():
        return None  # a device, perhaps
    lines = [line for line in read_log(log) if "seconds" in line]
    seconds = math.fsum(line["seconds"] for line in lines)
    return sum(line["tokens"] for line in lines) / seconds if seconds > 0 else None
