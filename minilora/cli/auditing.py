"""audit: which hypothesis explains a merged checkpoint."""

from __future__ import annotations

from ..display import print_table, printable
from ..errors import MiniloraError
from ..formats.disk import JsonObject
from .files import format_row, print_json
from .options import Args, Command, Once, Parser, add_base, add_json, find_models, option


def add_audit_options(parser: Parser) -> None:
    add_base(parser)
    option(parser, "--adapter DIR", "the adapter, in PEFT's format", required=True, action=Once)
    text = "the checkpoint that should be the base with the adapter merged, whoever made it"
    option(parser, "--merged DIR", text, required=True)
    text = "what dW should be added to, as merge --onto has it: nf4 or nf4,double (default: to the "
    option(parser, "--onto Q", text + "weights themselves)")
    option(parser, "--threads K", "threads, at least 1 (default: one per core)")
    add_json(parser)


def audit(args: Args) -> None:
    from ..tools.auditing import audit as run

    find_models(args)
    report = run(args.base, args.adapter, args.merged, args.onto, args.threads)
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    if not report["right"]:
        raise MiniloraError(f"{args.merged} is not a right merge: {report['verdict']}")


def _print_report(report: JsonObject) -> None:
    if report["tensors"]:
        print_table([format_row(row) for row in report["tensors"]])
        print()
    for note in report["notes"]:
        print(printable(note))
    print(f"{report['equal']:,} other tensors equal the base's")
    how = f" ({report['arithmetic']})" if report["arithmetic"] else ""
    print(f"verdict: {printable(report['verdict'])}{how}")


COMMANDS = (
    Command(
        audit,
        add_audit_options,
        "Say whether a merged checkpoint is right, and if not, what was done to it.",
        "--base base --adapter adapter --merged merged",
    ),
)
