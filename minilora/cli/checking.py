"""verify and devices: commands that check the mathematics and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..backend import gpus
from ..display import print_table, printable
from ..errors import ConfigError, MiniloraError
from .files import format_row, print_json
from .options import (
    Args,
    Command,
    Once,
    Parser,
    add_download,
    add_json,
    add_seed,
    find_models,
    option,
    positive_integer,
)

LAYERS = 100  # random ones that verify measures
MODELS = 8  # with --training


def add_verify_options(parser: Parser) -> None:
    text = "measure the layers of this base, with --adapter (default: random layers)"
    option(parser, "--base DIR", text)
    add_download(parser)
    option(parser, "--adapter DIR", "the adapter of --base, in PEFT's format", action=Once)
    text = "measure the theorems of training, on random models that are trained"
    option(parser, "--training", text)
    text = f"random layers (default: {LAYERS}), or models for --training (default: {MODELS})"
    option(parser, "--cases N", text, type=positive_integer)
    add_seed(parser)
    add_json(parser)


def verify(args: Args) -> None:
    from ..verify.run import Stopped, as_json

    _require_one_subject(args)
    try:
        report = _measure(args)
    except Stopped as stopped:
        if not args.json:
            _print_report(stopped.report, args.training)
            unit = "models" if args.training else "layers"
            print(f"\ninterrupted: {stopped.done} of {stopped.total} {unit} were measured whole")
        raise
    if args.json:
        print_json(as_json(report))
    else:
        _print_report(report, args.training)
        _print_summary(report.rows)
    for row in report.rows:
        if not row.ok:
            measured = f"measured {row.measured:.3g}, bound {row.bound:.3g}"
            detail = f"{measured}, at {row.where} {row.note}".rstrip()
            what = f"property '{row.property}' fails"
            if not row.is_true:
                what = f"'{row.property}' is false and must fail, but holds"
            raise MiniloraError(f"{what}: {row.equation}: {detail}")


def _require_one_subject(args: Args) -> None:
    """ConfigError unless random layers, random models, or given files are to be measured."""
    if args.training and (args.base, args.adapter) != (None, None):
        given = "--adapter" if args.base is None else "--base"
        raise ConfigError(
            f"--training measures random models, and {given} was given: leave out one of the two"
        )
    if (args.base is None) != (args.adapter is None):
        given = "--base" if args.adapter is None else "--adapter"
        raise ConfigError(
            f"only {given} was given: give --base and --adapter, or neither for random layers"
        )


def _measure(args: Args) -> Any:
    """The report of what the options ask for."""
    from ..verify import Report, verify_files, verify_training
    from ..verify import verify as verify_random

    if args.base is not None:
        find_models(args)
        return verify_files(args.base, args.adapter, args.seed)
    if args.training:
        return Report(verify_training(args.cases or MODELS, args.seed), [])
    return Report(verify_random(args.cases or LAYERS, args.seed), [])


def _print_summary(rows: Sequence[Any]) -> None:
    """How near the true claims come to their bounds, and whether the false ones fail."""
    from ..verify.run import worst_ratio

    false = [row for row in rows if not row.is_true]
    print(
        f"\nworst measured / bound: {worst_ratio(rows):.3f}, of {len(rows) - len(false)} properties"
    )
    if false:
        print(f"false claims that fail: {sum(row.ok for row in false)} of {len(false)}")


def _print_report(report: Any, training: bool) -> None:
    """A table of the rows, in training with a column that says which claims are true."""
    rows = []
    for row in report.rows:
        columns = {
            "property": row.property,
            "equation": row.equation,
            "claim": "true" if row.is_true else "false",
            "measured": f"{row.measured:.2e}",
            "bound": f"{row.bound:.2e}",
            "ratio": f"{row.ratio:.3f}" if row.is_true else f"{row.ratio:.1e}",
            "ok": row.ok,
            "source": row.source,
        }
        if not training:
            del columns["claim"]
        rows.append(columns)
    print_table(rows)
    if report.layers:
        print()
        print_table([format_row(layer._asdict()) for layer in report.layers])


def add_devices_options(parser: Parser) -> None:
    """No options of its own."""


def devices(args: Args) -> None:
    import threadpoolctl

    from ..threads import available_cores

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    libraries = [
        f"{pool['internal_api']} {pool['version']} with {pool['num_threads']} threads"
        for pool in pools
    ]
    blas = ", ".join(libraries) or "no BLAS that threadpoolctl knows"
    states = {"cpu": f"usable, {available_cores()} cores, {blas}", **gpus()}
    for name, state in states.items():
        print(f"{name:8} {printable(state.removeprefix(f'device {name!r} is '))}")


COMMANDS = (
    Command(
        verify,
        add_verify_options,
        "Measure every property of LoRA's mathematics and compare it with its bound.",
        "--base base --adapter adapter",
    ),
    Command(
        devices,
        add_devices_options,
        "List the CPU and each GPU, or why it cannot be used.",
        "",
        prints=True,
    ),
)
