"""generate and evaluate: commands that use a model."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from ..data.batches import Ids
from ..data.chat import Chat
from ..data.tokenizer import Tokenizer
from ..display import printable
from ..errors import ConfigError, DataError
from ..threads import blocks
from .options import (
    DATA,
    Args,
    Command,
    Parser,
    add_adapter,
    add_allow_nonfinite,
    add_base,
    add_compute,
    add_device_and_threads,
    add_quantize,
    add_seed,
    add_strict,
    integer_from,
    option,
    positive_integer,
)
from .reading import Prompt, load_model, read_prompts, read_tokens, require_context

BATCH_SIZE = 16  # prompts that generate continues at a time


def _add_model_options(parser: Parser) -> None:
    add_base(parser)
    add_adapter(parser)
    add_allow_nonfinite(parser)
    add_quantize(parser)
    add_compute(parser)
    add_device_and_threads(parser)
    add_seed(parser)


def add_generate_options(parser: Parser) -> None:
    _add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    option(source, "--prompt TEXT", "text to continue, not empty")
    text = 'a prompt per line in UTF-8, or (.jsonl) {"prompt": ...}; prints a line for each, alike'
    option(source, "--prompts FILE", text)
    text = f"--prompts that are continued at a time, at least 1 (default: {BATCH_SIZE})"
    option(parser, "--batch-size K", text)
    text = "tokens to generate, at least 0"
    option(parser, "--max-new-tokens N", text, type=integer_from(0), default=200)
    text = "randomness, at least 0; 0 takes the likeliest token"
    option(parser, "--temperature X", text, default=0.8)
    text = "choose among the K likeliest tokens, at least 1 (default: all)"
    option(parser, "--top-k K", text)
    text = "choose among the likeliest tokens up to probability P, in (0, 1] (default: all)"
    option(parser, "--top-p P", text)
    text = "a prompt is a user's message: use the model's chat template, and print the answer only"
    option(parser, "--chat", text)
    option(parser, "--ignore-eos", "go on where the text ends, up to --max-new-tokens")


def generate(args: Args) -> None:
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    elif args.batch_size is None:
        prompts = [Prompt(args.prompt, "--prompt")]
    else:
        raise ConfigError("--batch-size is for several prompts: give --prompts, or leave it out")
    model, tokenizer = load_model(args, args.adapter, args.task)
    texts = _encode_prompts(prompts, tokenizer, args.chat)
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    sampling["eos"] = () if args.ignore_eos else tokenizer.special.eos
    if not args.ignore_eos and tokenizer.missing_end:
        note = f"{tokenizer.missing_end}: only --max-new-tokens ends the text"
        print(printable(note), file=sys.stderr)
    if args.prompts is None:
        _print_while_generating(model, tokenizer, *texts[0], args.max_new_tokens, sampling)
        return
    for prompt, (ids, _) in zip(prompts, texts, strict=True):
        if len(ids) > model.config.context:
            limit = model.config.describe_context()
            given = f"{prompt.where} has {len(ids)} tokens, but the model has {limit}"
            raise DataError(f"{given}: shorten it")
    new = _continue_all(model, [ids for ids, _ in texts], args, sampling)
    for prompt, (_, shown), tokens in zip(prompts, texts, new, strict=True):
        _print_line(prompt, shown, tokens, tokenizer)


def _print_while_generating(
    model: Any, tokenizer: Tokenizer, prompt: Ids, ids: list[int], count: int, sampling: Any
) -> None:
    """Print the text of `ids` and what follows the prompt, each character once it is complete."""
    from ..models.generation import stream

    shown = ""
    for token in stream(model, prompt[None], count, **sampling):
        if token[0] in sampling["eos"]:
            break
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # wait for the rest of a character
            print(printable(text[len(shown) :], "\n\t"), end="", flush=True)
            shown = text
    print(printable(tokenizer.decode(ids)[len(shown) :], "\n\t"))


def _continue_all(
    model: Any, prompts: list[Ids], args: Args, sampling: dict[str, Any]
) -> Iterator[list[int]]:
    """Yield the new tokens of each prompt, up to its end."""
    from ..models.generation import stream

    for batch in blocks(len(prompts), args.batch_size or BATCH_SIZE):
        rows = range(batch.start, batch.stop)
        tokens = stream(model, prompts[batch], args.max_new_tokens, **sampling, rows=rows)
        steps = [token.tolist() for token in tokens]
        for i in range(len(rows)):
            text = [step[i] for step in steps]
            yield list(itertools.takewhile(lambda token: token not in sampling["eos"], text))


def _print_line(prompt: Prompt, shown: list[int], new: list[int], tokenizer: Tokenizer) -> None:
    """Print a text on one line, or as a JSON object if that is what its prompt was."""
    text = tokenizer.decode([*shown, *new])
    if prompt.is_json:
        before = tokenizer.decode(shown)
        line = json.dumps({"prompt": prompt.text, "completion": text[len(before) :]})
    else:
        line = printable(text, "\t")
    print(line, flush=True)


def _encode_prompts(
    prompts: list[Prompt], tokenizer: Tokenizer, as_chat: bool
) -> list[tuple[Ids, list[int]]]:
    """(the ids to continue, those of them to show) of each, as training encodes a record."""
    texts: list[tuple[Ids, list[int]]] = []
    if as_chat:
        with Chat(tokenizer) as chat:
            for prompt in prompts:
                messages = [{"role": "user", "content": prompt.text}]
                text = chat.render(messages, add_generation_prompt=True)
                texts.append((tokenizer.encode(text), []))
    else:
        for prompt in prompts:
            shown = tokenizer.encode(prompt.text).tolist()  # without a BOS
            texts.append((tokenizer.encode_prompt(prompt.text), shown))
    for prompt, (ids, _) in zip(prompts, texts, strict=True):
        if not len(ids):
            what = f"{prompt.where} is empty"
            raise DataError(f"{what}: give the model at least one token to continue")
    return texts


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
        "Continue a prompt, or those of a file.",
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
