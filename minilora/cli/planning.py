"""plan: what a run of finetune would take, before its first step."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from ..display import print_table, printable
from ..errors import ConfigError
from ..formats.disk import JsonObject
from ..training.pool import open_pool
from ..training.ranks import Alone
from .files import print_json
from .options import Args, Command, Parser, add_json, option
from .preparing import AUTO, Prepared, prepare_finetune, print_preparation
from .rates import FIRST
from .training import add_tuning_options

FROM_MAIN = ("command", "parser", "run", "prints", "has_ranks", "ranks", "debug")
OWN = ("measure", "json", "out")  # options of which a step knows nothing
MEASURED_STEPS = 2  # the second one has the optimiser's moments
MIB = 1 << 20


def add_plan_options(parser: Parser) -> None:
    add_tuning_options(parser)
    parser.set_defaults(method=None)  # to tell "lora" from an option that was not given
    text = "take two steps in another process, and show its peak and seconds beside the prediction"
    option(parser, "--measure", text)
    add_json(parser)
    # So that the line of finetune can be planned as it is; its help describes them.
    option(parser, "--out DIR", argparse.SUPPRESS)
    option(parser, "--also-evaluate FILE", argparse.SUPPRESS)


def plan(args: Args) -> None:
    from ..lab.budget import measure_work, predict_memory, read_resident, text_bytes

    if args.device != "cpu":
        raise ConfigError(
            f"--device {args.device}: plan counts the memory of a processor; leave out --device"
        )
    options = {k: v for k, v in vars(args).items() if k not in (*FROM_MAIN, *OWN)}
    process = read_resident().now
    ready, run = _prepare(args)
    loading = read_resident().peak - process
    work = measure_work(run)
    texts = (ready.options["held_out"], ready.options["also"])
    text = text_bytes(ready.tokens, *(text for text in texts if text is not None))
    memory = predict_memory(run, work, process, text, loading)
    report = _describe_layers(ready)
    report["bytes"] = memory.phases
    report |= {"phase": memory.largest, "peak": memory.peak}
    report |= _describe_time(ready, work)
    report["measured"] = None
    if args.measure:
        with open_pool("processes", 1) as pool:
            report["measured"] = pool.submit(measure_steps, options).result()
    if args.json:
        print_json(report)
        return
    print_preparation(args, ready)
    _print_layers(report)
    print()
    print_table(memory.rows())
    _print_summary(report)


def _prepare(args: Args) -> tuple[Prepared, Any]:
    """(what the run begins with, the run), with the model as training has it."""
    from ..training.run import Run

    args.resume = None
    args.lr = FIRST if args.lr == AUTO else args.lr  # any rate takes the same memory and time
    ready = prepare_finetune(args)
    settings = ready.settings
    held_out = {"held_out": ready.options["held_out"]}
    run = Run(ready.model, ready.tokens, settings, os.devnull, ready.origin, **held_out)
    base = ready.model.train().get_base_model()
    base.gradient_checkpointing_enable(settings.gradient_checkpointing)
    return ready, run


def measure_steps(options: dict[str, Any]) -> JsonObject:
    """Take two steps of the run that `options` mean; returns this process's peak, and seconds.

    It is for a process of its own, whose peak is that of the run.
    """
    from ..lab.budget import read_resident
    from ..training.parallel import ShardedStep

    args = argparse.Namespace(**options, ranks=Alone())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        ready, run = _prepare(args)  # its notes are the first process's, too
    sizes = ready.settings.threads, run.settings.shard
    with ShardedStep(ready.model, *sizes, part=run.settings.part) as sharded:
        for _ in range(min(MEASURED_STEPS, ready.settings.steps)):
            line = run.step(sharded)
            run.add_evaluation(line["loss"])  # which copies the weights if the best ones are kept
    return {"peak": read_resident().peak, "seconds": line["seconds"]}


# ---- what is shown -------------------------------------------------------------------------------


def _describe_layers(ready: Prepared) -> JsonObject:
    """The layers with adapters, those without, and how many numbers train."""
    from ..lab.products import adapted_layers, layers_left_out

    config = None
    if ready.config is not None:
        config = next(iter(ready.model.peft_config.values()))  # with the targets it has chosen
    adapted = adapted_layers(ready.model, config)
    left_out = []
    if config is not None:
        left_out = layers_left_out(ready.model, adapted, config.target_modules)
    return {
        "layers": [layer._asdict() for layer in adapted],
        "left_out": [layer._asdict() for layer in left_out],
        "trained": ready.trained,
    }


def _describe_time(ready: Prepared, work: Any) -> JsonObject:
    """Operations and seconds of a step: see `products`.

    overhead   the seconds of a shard over those of its products alone
    """
    from ..lab.products import count_operations, measure_products

    settings, model = ready.settings, ready.model
    positions = settings.sequences * work.length
    recompute = settings.gradient_checkpointing
    operations = count_operations(model, positions, work.length, recompute)
    longest = work.probes[-1]
    measured = work.sequences * longest.length
    of_probe = sum(count_operations(model, measured, longest.length, recompute).values())
    forward, seconds = measure_products(model, measured)
    products = of_probe * seconds / forward
    overhead = longest.seconds / products
    total = sum(operations.values())
    return {
        "operations": operations,
        "operations_per_second": forward / seconds,
        "overhead": overhead,
        "seconds_per_step": total * seconds / forward * overhead / work.threads,
    }


def _print_layers(report: JsonObject) -> None:
    from ..lab.products import Adapted, table_of_layers

    layers = [Adapted(**layer) for layer in report["layers"]]
    if layers:
        print()
        print_table(table_of_layers(layers))
    for layer in report["left_out"]:
        near = f": {layer['near']}" if layer["near"] else ""
        print(printable(f"no adapter: {layer['number']} x {layer['name']}{near}"))


def _print_summary(report: JsonObject) -> None:
    phase, measured = report["phase"], report["measured"]
    beside = ""
    if measured:
        off = report["peak"] / measured["peak"] - 1
        beside = f"; measured {measured['peak'] / MIB:,.1f} MiB, prediction {off:+.1%}"
    print(f"\npeak: {report['peak'] / MIB:,.1f} MiB, in {phase}{beside}")
    kinds = ", ".join(f"{kind} {n / 1e9:,.2f}" for kind, n in report["operations"].items())
    print(f"operations of a step (1e9): {kinds}")
    rate = report["operations_per_second"] / 1e9
    seconds = f"{report['seconds_per_step']:.3g} seconds per step"
    if measured:
        seconds += f"; measured {measured['seconds']:.3g}"
    print(f"products: {rate:,.1f}e9 a second by one thread")
    print(f"a whole step takes {report['overhead']:.2f} times as long as its products: {seconds}")


COMMANDS = (
    Command(
        plan,
        add_plan_options,
        "Show what a run of finetune would take: layers, memory, operations, seconds.",
        "--base base --data notes.txt --r 8 --measure",
        prints=True,
    ),
)
