"""graph: a layer or a block as it was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..display import print_table, printable
from ..errors import ConfigError
from ..formats import atomic_file
from ..lora import PeftModel
from ..precision import FLOAT32
from .files import print_json
from .options import (
    Args,
    Command,
    Once,
    Parser,
    add_base,
    add_json,
    add_quantize,
    integer_from,
    option,
    positive_integer,
    text_value,
)
from .reading import has_tasks, load_base, require_context

DRAWINGS = (".svg", ".dot")
CONTEXT = 16


def add_graph_options(parser: Parser) -> None:
    add_base(parser)
    text = "adapter in PEFT's format, which trains (default: all weights of the base do)"
    option(parser, "--adapter DIR", text, action=Once)
    place = parser.add_mutually_exclusive_group(required=True)
    text = "a module by its path, such as model.layers.0.self_attn.q_proj"
    option(place, "--layer PATH", text, type=text_value)
    option(place, "--block N", "a block of the decoder by its number, from 0", type=integer_from(0))
    add_quantize(parser)
    text = "sequences in the batch that is computed, at least 1"
    option(parser, "--batch-size N", text, type=positive_integer, default=1)
    text = f"tokens of each, at least 1 (default: {CONTEXT}, or what the model has if that is less)"
    option(parser, "--context N", text, type=positive_integer)
    text = "as a training step computes it: with W + dW, which is formed before and not drawn"
    option(parser, "--step", text)
    text = f"picture to write, which ends in {' or '.join(DRAWINGS)} (default: print DOT text)"
    option(parser, "--out FILE", text)
    add_json(parser)


def graph(args: Args) -> None:
    from ..lab.recording import record_graph

    if args.out is not None and Path(args.out).suffix not in DRAWINGS:
        raise ConfigError(f"--out must end in {' or '.join(DRAWINGS)}, got {args.out!r:.200}")
    if args.adapter is not None and has_tasks(args.adapter, None):
        raise ConfigError(
            f"--adapter {args.adapter!r:.200} has several tasks: give the folder of one adapter"
        )
    folders = [args.base, *([] if args.adapter is None else [args.adapter])]  # as they were given
    args.device = "cpu"
    args.compute = FLOAT32
    model: Any = load_base(args)
    context = args.context or min(CONTEXT, model.config.context)
    require_context(context, model.config)
    path = args.layer if args.block is None else _path_of_block(model, args.block)
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    model.train()
    if args.step:
        model.prepare_step()
    ids = np.arange(args.batch_size * context).reshape(-1, context) % model.config.vocab_size
    drawn = record_graph(model, path, ids, title=f"{path} of {' + '.join(folders)}")
    if args.out is not None:
        text = drawn.to_svg() if Path(args.out).suffix == ".svg" else drawn.to_dot()
        with atomic_file(Path(args.out)) as file:
            file.write(text.encode())
    if args.json:
        print_json(drawn.as_dict())
    elif args.out is None:
        print(drawn.to_dot(), end="")
    else:
        print_table(drawn.rows())
        print(f"\n{drawn.backward_bytes:,} bytes kept for backward -> {printable(args.out)}")


def _path_of_block(model: Any, number: int) -> str:
    """The path of a block. ConfigError for a number that the model does not have."""
    _, blocks, _ = model.decoder.part_names
    count = len(getattr(model.decoder, blocks))
    if number >= count:
        raise ConfigError(
            f"--block must be from 0 to {count - 1}, the model's blocks, got {number}"
        )
    return f"{model.decoder_name}.{blocks}.{number}"


COMMANDS = (
    Command(
        graph,
        add_graph_options,
        "Draw a layer or a block as it was computed: operations, bytes for backward, gradients.",
        "--base base --adapter adapter --block 0 --out block.svg",
        prints=True,
    ),
)
