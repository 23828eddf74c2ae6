"""finetune --lr auto and lab rates: a learning rate from short runs of what would train."""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..display import print_table
from ..errors import CheckpointError, ConfigError
from ..formats import write_json
from ..progress import progress_bar
from ..training.checkpoints import find_checkpoint
from .files import print_json
from .options import Args, select_fields
from .preparing import AUTO, prepare_finetune, read_finetune_options, require_rate

FIRST = 2e-3  # with which the ladder begins, unless --lr says another rate
FILE = "rates.json"  # in the run's folder
SCALED = ("tinit", "tfinal", "deltaT")  # AdaLoRA's numbers of steps
STOPPED = "stopped"  # in the place of the loss of a run that was stopped


class Search:
    """The search for the rate of a run of finetune. What finetune refuses is refused at once."""

    def __init__(self, args: Args):
        if args.ranks.size > 1:
            raise ConfigError(
                f"--lr auto is for one process, and mpiexec started {args.ranks.size}: find the "
                "rate by `minilora lab rates` with the same options, and give it as --lr"
            )
        require_rate(args.lr)
        whole = argparse.Namespace(**vars(args))
        whole.resume = None
        if whole.lr == AUTO:
            whole.lr = FIRST
        self.settings = read_finetune_options(whole)[0]
        self.prepared = prepare_finetune(_shorten(whole, self.settings))

    def find(self) -> Any:
        """The `Rates` that the short runs say."""
        from ..training.ladder import find_rates

        ready = self.prepared
        held_out = ready.options["held_out"]
        with progress_bar(desc="short runs") as bar:
            return find_rates(
                ready.model, ready.tokens, self.settings, held_out, lambda arm: bar.update()
            )

    def rows(self, rates: Any) -> list[dict[str, str]]:
        """The curve as text: bits per byte of each rate in each order of the data."""
        from ..training.loop import bits_per_byte

        ratio = self.prepared.options["bytes_per_token"]
        texts = {}
        for arm in rates.arms:
            loss = STOPPED if arm.loss is None else f"{bits_per_byte(arm.loss, ratio):.3f}"
            texts[arm.rate, arm.order] = loss
        orders = {"first order": 0, "second order": 1}
        return [
            {"rate": f"{rate:.4g}"} | {name: texts.get((rate, n), "") for name, n in orders.items()}
            for rate in sorted({arm.rate for arm in rates.arms})
        ]


def choose_rate(args: Args, out: Path, search: Search | None) -> float:
    """The rate to train at: searched for and written to the run's folder, or the resumed run's."""
    if search is None:
        return _read_rate(args.resume, out)
    rates = search.find()
    write_json(out / FILE, rates.to_dict())
    print(f"--lr auto: {_describe_runs(rates)}")
    curve = [" ".join(text or "-" for text in row.values()) for row in search.rows(rates)]
    print(f"rate, held-out bits per byte in both orders: {'; '.join(curve)}")
    print(f"{_describe_interval(rates)}: training at {rates.middle:g}")
    return rates.middle  # type: ignore[no-any-return]


def lab_rates(args: Args) -> None:
    search = Search(args)
    rates = search.find()
    if args.json:
        print_json(rates.to_dict())
        return
    print(_describe_runs(rates))
    print()
    print_table(search.rows(rates))
    print()
    print("held-out bits per byte; the second order has runs around the best rate of the first")
    print(f"{_describe_interval(rates)}: --lr {rates.middle:g}")


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Without warnings and notes, which the run itself is about to repeat."""
    with (
        warnings.catch_warnings(action="ignore"),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _read_rate(resume: str, out: Path) -> float:
    """The learning rate of the run of a checkpoint, which went on with it."""
    folder, manifest = find_checkpoint(resume, out)
    try:
        return float(manifest["state"]["run"]["lr"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{str(folder)!r:.200} is damaged: it does not say its lr") from None


def _describe_runs(rates: Any) -> str:
    runs = len(rates.arms)
    return f"{runs} short runs of {rates.steps} of {rates.whole} steps, in two orders of the data"


def _describe_interval(rates: Any) -> str:
    return f"the best rate is between {rates.low:.4g} and {rates.high:.4g}"


def _shorten(whole: Args, settings: Any) -> Args:
    """The options of a short run. A share of AdaLoRA's steps, rounded down, fits into it."""
    from ..training.ladder import shorten

    short = shorten(settings)
    args = argparse.Namespace(**vars(whole))
    for name in select_fields(args, type(short)):
        setattr(args, name, getattr(short, name))
    for name in SCALED:
        if hasattr(args, name):
            setattr(args, name, getattr(args, name) * short.steps // settings.steps)
    return args
