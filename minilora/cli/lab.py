"""lab: claims about LoRA measured, with verdicts and pictures."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Any

from ..display import print_table, printable
from ..errors import ConfigError, Interrupted, SweepError, check_names
from ..formats.folders import locked
from ..threads import available_cores
from ..training.pool import POOLS, Pool, open_pool
from ..training.signals import stop_signals
from .options import Args, Command, Parser, add_json, option
from .rates import lab_rates
from .sweep import choose_pool
from .training import add_tuning_options

RATES = "rates"  # short runs of the user's own model, by the options of finetune
RATES_USAGE = "minilora lab rates --base DIR --data FILE"
OTHERS = ("all", "list", "gallery")
OUT = "runs/lab"


def add_lab_options(parser: Parser) -> None:
    if [word for word in parser.words if word != "--debug"][:2] == ["lab", RATES]:
        _add_rates_options(parser)
        return
    text = "experiments by name, all, list (what they are), gallery (a page of their results), or "
    text += "rates, which has options of its own: minilora lab rates --help"
    parser.set_defaults(prints="list" in parser.words)
    parser.add_argument("names", nargs="+", metavar="NAME", help=text)
    option(
        parser, "--out DIR", "results: new, or of the same laboratory, which goes on", default=OUT
    )
    option(parser, "--jobs K", "cases at a time (default: one per core)")
    text = f"where cases are measured: {', '.join(POOLS)} (default: by --jobs)"
    option(parser, "--pool HOW", text, choices=POOLS)
    text = "gallery: a Markdown file that gets the page between its two comments, beside pictures"
    option(parser, "--page FILE", text)
    option(parser, "--quick", "runs of three steps, which show only that everything works")


def _add_rates_options(parser: Parser) -> None:
    """The options of finetune, whose learning rate is wanted."""
    parser.prog = "minilora lab rates"
    parser.usage = "minilora lab rates [options]"
    parser.description = (
        "Find the learning rate of a run of finetune by short runs, from --lr up and down.\n"
        "Together they take about as long as that run. The options are those of finetune."
    )
    parser.epilog = "example: minilora lab rates --base base --data notes.txt --r 8"
    parser.add_argument("name", choices=[RATES], help=argparse.SUPPRESS)
    add_tuning_options(parser)
    add_json(parser)
    parser.set_defaults(method=None, run=lab_rates, prints=True)


def lab(args: Args) -> None:
    from ..lab.experiments import EXPERIMENTS

    if RATES in args.names:
        raise ConfigError(f"{RATES} has other options, and stands alone: {RATES_USAGE}")
    check_names("lab", args.names, [*EXPERIMENTS, *OTHERS, RATES])
    alone = [name for name in OTHERS if name in args.names]
    if alone and len(args.names) > 1:
        raise ConfigError(
            f"lab {alone[0]} is for all experiments, and {len(args.names)} names were given: give "
            "it alone, or name experiments only"
        )
    if args.page is not None and "gallery" not in args.names:
        raise ConfigError("--page is of `minilora lab gallery`: leave it out, or give that name")
    if "list" in args.names:
        _print_list(EXPERIMENTS)
    elif "gallery" in args.names:
        _write_gallery(args)
    else:
        chosen = EXPERIMENTS if "all" in args.names else dict.fromkeys(args.names)
        _run(args, list(chosen))


def _print_list(experiments: dict[str, Any]) -> None:
    rows = []
    for name, experiment in experiments.items():
        rows.append({"name": name, "seconds": experiment.SECONDS, "claim": experiment.CLAIM})
    print_table(rows)


def _write_gallery(args: Args) -> None:
    from ..lab.gallery import publish_gallery, write_gallery
    from ..lab.store import Store

    store = Store(args.out)
    page = write_gallery(store) if args.page is None else publish_gallery(store, args.page)
    print(printable(f"-> {page}"))


def _run(args: Args, names: Sequence[str]) -> None:
    from ..lab.protocol import Plan
    from ..lab.store import Store, describe_surroundings

    kind, jobs = choose_pool(args, available_cores() if args.pool != "here" else 1)
    plan = Plan(args.quick)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(open_pool(kind, jobs))
        out = stack.enter_context(locked(args.out))
        store = Store(out)
        store.claim(describe_surroundings(plan))
        stopped = stack.enter_context(stop_signals())
        _run_all(names, store, plan, pool, stopped)


def _run_all(names: Sequence[str], store: Any, plan: Any, pool: Pool, stopped: list[int]) -> None:
    """Run the experiments in turn; errors come at the end, when all others are done."""
    from ..lab.experiments import EXPERIMENTS
    from ..lab.running import describe_results, run_experiment

    failures = {}
    begun = time.monotonic()
    expected = 0.0  # seconds of what was measured in this run
    for number, name in enumerate(names, 1):
        title = f"{name} ({number} of {len(names)})"
        outcome = run_experiment(name, store, plan, pool, stopped, title=title)
        if stopped:
            text = f"{signal.Signals(stopped[0]).name}: stopped in experiment {name}"
            raise Interrupted(f"{text}; the same command goes on", stopped[0])
        failures.update(outcome.failures)
        if outcome.measured:
            expected += EXPERIMENTS[name].SECONDS
        if outcome.results is None:
            continue
        seconds = sum(store.seconds(name).values())
        print("\n".join(describe_results(outcome.results)))
        print(printable(f"  {seconds:.0f} s of all cases -> {store.results_file(name)}"))
        left = sum(EXPERIMENTS[other].SECONDS for other in names[number:])
        if left and not plan.quick:
            minutes = minutes_left(left, expected, time.monotonic() - begun)
            print(f"  about {minutes} minutes are left")
    if failures:
        case, first = next(iter(failures.items()))
        count = "1 case" if len(failures) == 1 else f"{len(failures)} cases"
        raise SweepError(
            f"{count} failed; {case}: {first['reason']}; the same command tries them again",
            first["exit_code"],
        )


def minutes_left(left: float, expected: float, taken: float) -> int:
    """How long `left` expected seconds will take, after `expected` ones took `taken`; at least 1.

    Five minutes at the expected speed count as taken too: the first experiments are short, and
    make bases that later ones use.
    """
    prior = 300.0
    return max(1, round(left * (taken + prior) / (expected + prior) / 60))


COMMANDS = (
    Command(
        lab,
        add_lab_options,
        "Measure claims about LoRA, each with its control, over several seeds.",
        "rank --out runs/lab",
    ),
)
