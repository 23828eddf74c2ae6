"""generate and evaluate: commands that use a model."""

from __future__ import annotations

import math
import sys

from ..data.batches import Ids
from ..data.chat import Chat
from ..data.tokenizer import Tokenizer
from ..display import printable
from ..errors import DataError
from .options import (
    DATA,
    Args,
    Command,
    Parser,
    add_adapter,
    add_allow_nonfinite,
    add_base,
    add_device_and_threads,
    add_quantize,
    add_seed,
    add_strict,
    integer_from,
    option,
    positive_integer,
)
from .reading import load_model, read_tokens, require_context


def _add_model_options(parser: Parser) -> None:
    add_base(parser)
    add_adapter(parser)
    add_allow_nonfinite(parser)
    add_quantize(parser)
    add_device_and_threads(parser)
    add_seed(parser)


def add_generate_options(parser: Parser) -> None:
    _add_model_options(parser)
    option(parser, "--prompt TEXT", "text to continue, not empty", required=True)
    text = "tokens to generate, at least 0"
    option(parser, "--max-new-tokens N", text, type=integer_from(0), default=200)
    text = "randomness, at least 0; 0 takes the likeliest token"
    option(parser, "--temperature X", text, default=0.8)
    text = "choose among the K likeliest tokens, at least 1 (default: all)"
    option(parser, "--top-k K", text)
    text = "choose among the likeliest tokens up to probability P, in (0, 1] (default: all)"
    option(parser, "--top-p P", text)
    text = "--prompt is a user's message: use the model's chat template, and print the answer only"
    option(parser, "--chat", text)
    option(parser, "--ignore-eos", "go on where the text ends, up to --max-new-tokens")


def generate(args: Args) -> None:
    from ..models.generation import stream

    model, tokenizer = load_model(args, args.adapter, args.task)
    prompt, ids = _encode_prompt(args, tokenizer)
    if not len(prompt):
        raise DataError("--prompt is empty: give the model at least one token to continue")
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    eos: tuple[int, ...] = ()
    if not args.ignore_eos:
        eos = tokenizer.special.eos
        if tokenizer.missing_end:
            note = f"{tokenizer.missing_end}: only --max-new-tokens ends the text"
            print(printable(note), file=sys.stderr)
    shown = ""
    for token in stream(model, prompt[None], args.max_new_tokens, **sampling, eos=eos):
        if token[0] in eos:
            break
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # wait for the rest of a character
            print(printable(text[len(shown) :], "\n\t"), end="", flush=True)
            shown = text
    print(printable(tokenizer.decode(ids)[len(shown) :], "\n\t"))


def _encode_prompt(args: Args, tokenizer: Tokenizer) -> tuple[Ids, list[int]]:
    """(the ids to continue, those of them to show): as training encodes a record."""
    if not args.chat:
        # A BOS is not shown.
        return tokenizer.encode_prompt(args.prompt), tokenizer.encode(args.prompt).tolist()
    messages = [{"role": "user", "content": args.prompt}]
    with Chat(tokenizer) as chat:
        text = chat.render(messages, add_generation_prompt=True)
    return tokenizer.encode(text), []


def add_evaluate_options(parser: Parser) -> None:
    _add_model_options(parser)
    option(parser, "--data FILE", DATA, required=True)
    add_strict(parser)
    option(parser, "--context T", "tokens per window, at least 1 (default: up to 256)")
    text = "most windows to measure, spread over the text, at least 1 (default: all)"
    option(parser, "--limit N", text, type=positive_integer)


def evaluate(args: Args) -> None:
    from ..training.loop import bits_per_byte
    from ..training.loop import evaluate as measure
    from ..training.run import text_checksums, weights_checksum

    model, tokenizer = load_model(args, args.adapter, args.task)
    context = args.context or min(256, model.config.context)
    require_context(context, model.config)
    tokens, ratio = read_tokens(args.data, tokenizer, context, args.strict)
    if len(tokens) < 2:
        raise DataError(
            f"--data {args.data}: needs at least 2 tokens, has {len(tokens)}: add to it"
        )
    if args.ranks.size > 1:
        checksums = {
            "the content of --data": text_checksums(tokens)[""],
            "the content of the model": weights_checksum(model.parameters()),
        }
        args.ranks.require_same(checksums, "give all ranks the same files")
    processors = {"threads": args.threads, "ranks": args.ranks}
    loss = measure(model, tokens, context, limit=args.limit, **processors)
    bits = bits_per_byte(loss, ratio)
    perplexity = math.exp(min(loss, 700))
    measures = f"loss {loss:.6f} nats per token, {bits:.4f} bits per byte"
    print(f"{measures}, perplexity {perplexity:.4f} (context {context})")


COMMANDS = (
    Command(
        generate,
        add_generate_options,
        "Continue a prompt.",
        '--base base --adapter adapter --prompt "def "',
        prints=True,
    ),
    Command(
        evaluate,
        add_evaluate_options,
        "Print the loss, bits per byte and perplexity of a text.",
        "--base base --data held-out.txt",
        prints=True,
        has_ranks=True,
    ),
)
