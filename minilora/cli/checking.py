"""verify and devices: commands that check the mathematics and the machine."""

from __future__ import annotations

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


def add_verify_options(parser: Parser) -> None:
    text = "measure the layers of this base, with --adapter (default: random layers)"
    option(parser, "--base DIR", text)
    add_download(parser)
    option(parser, "--adapter DIR", "the adapter of --base, in PEFT's format", action=Once)
    text = "random layers to measure, at least 1"
    option(parser, "--cases N", text, type=positive_integer, default=100)
    add_seed(parser)
    add_json(parser)


def verify(args: Args) -> None:
    from ..verify import Report, verify_files
    from ..verify import verify as verify_random
    from ..verify.run import Stopped, as_json, worst_ratio

    if (args.base is None) != (args.adapter is None):
        given = "--base" if args.adapter is None else "--adapter"
        raise ConfigError(
            f"only {given} was given: give --base and --adapter, or neither for random layers"
        )
    try:
        if args.base is None:
            report = Report(verify_random(args.cases, args.seed), [])
        else:
            find_models(args)
            report = verify_files(args.base, args.adapter, args.seed)
    except Stopped as stopped:
        if not args.json:
            _print_report(stopped.report)
            print(f"\ninterrupted: {stopped.done} of {stopped.total} layers were measured whole")
        raise
    if args.json:
        print_json(as_json(report))
    else:
        _print_report(report)
        worst = worst_ratio(report.rows)
        print(f"\nworst measured / bound: {worst:.3f}, of {len(report.rows)} properties")
    for row in report.rows:
        if not row.ok:
            measured = f"measured {row.measured:.3g}, bound {row.bound:.3g}"
            detail = f"{measured}, at {row.where} {row.note}".rstrip()
            raise MiniloraError(f"property '{row.property}' fails: {row.equation}: {detail}")


def _print_report(report: Any) -> None:
    rows = []
    for row in report.rows:
        rows.append(
            {
                "property": row.property,
                "equation": row.equation,
                "measured": f"{row.measured:.2e}",
                "bound": f"{row.bound:.2e}",
                "ratio": f"{row.ratio:.3f}",
                "ok": row.ok,
                "source": row.source,
            }
        )
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
