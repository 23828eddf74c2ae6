"""generate and evaluate: commands that use a model."""

from __future__ import annotations

import json
import math
import sys

from ..data.batches import Ids
from ..data.chat import Chat
from ..data.tokenizer import Tokenizer
from ..display import printable
from ..errors import ConfigError, DataError
from ..models.completion import Completion, complete_all, stream_text
from ..threads import blocks
from .chatting import begin_messages, converse
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
    text_value,
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
    source = parser.add_mutually_exclusive_group()
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
    text = "use the chat template, and print answers only; without a prompt: ask in lines of stdin"
    option(parser, "--chat", text)
    text = "with --chat: what the system says first"
    option(parser, "--system TEXT", text, type=text_value, dest="system_message")
    text = "end the text before the first TEXT that the model writes (may be repeated)"
    option(parser, "--stop TEXT", text, action="append", type=text_value)
    option(parser, "--ignore-eos", "go on where the text ends, up to --max-new-tokens")


def generate(args: Args) -> None:
    prompts = _read_prompts(args)
    model, tokenizer = load_model(args, args.adapter, args.task)
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    eos = () if args.ignore_eos else tokenizer.special.eos
    if not args.ignore_eos and tokenizer.missing_end:
        ends = "only --stop and --max-new-tokens end" if args.stop else "only --max-new-tokens ends"
        print(printable(f"{tokenizer.missing_end}: {ends} the text"), file=sys.stderr)
    if not prompts:
        converse(model, tokenizer, args, eos, sampling)
        return
    texts = _encode_prompts(prompts, tokenizer, args)
    completions = [Completion(tokenizer, shown, eos, args.stop or ()) for _, shown in texts]
    if args.prompts is None:
        [(ids, _)], [completion] = texts, completions
        for text in stream_text(model, ids, args.max_new_tokens, completion, **sampling):
            print(printable(text, "\n\t"), end="", flush=True)
        print()
        return
    for prompt, (ids, _) in zip(prompts, texts, strict=True):
        if len(ids) > model.config.context:
            limit = model.config.describe_context()
            given = f"{prompt.where} has {len(ids)} tokens, but the model has {limit}"
            raise DataError(f"{given}: shorten it")
    for batch in blocks(len(prompts), args.batch_size or BATCH_SIZE):
        ids_of_batch = [ids for ids, _ in texts[batch]]
        rows = range(batch.start, batch.stop)
        new = completions[batch]
        complete_all(model, ids_of_batch, args.max_new_tokens, new, **sampling, rows=rows)
        for prompt, completion in zip(prompts[batch], new, strict=True):
            _print_line(prompt, completion)


def _read_prompts(args: Args) -> list[Prompt]:
    """The prompts that the options give; none for a conversation.

    ConfigError for options that do not fit together.
    """
    if args.system_message is not None and not args.chat:
        raise ConfigError("--system is for a chat template: give --chat, too")
    if args.prompts is not None:
        return read_prompts(args.prompts)
    if args.batch_size is not None:
        raise ConfigError("--batch-size is for several prompts: give --prompts, or leave it out")
    if args.prompt is not None:
        return [Prompt(args.prompt, "--prompt")]
    if args.chat:
        return []
    raise ConfigError("give --prompt TEXT, --prompts FILE, or --chat for a conversation")


def _print_line(prompt: Prompt, completion: Completion) -> None:
    """Print a text on one line, or as a JSON object if that is what its prompt was."""
    if prompt.is_json:
        line = json.dumps({"prompt": prompt.text, "completion": completion.completion})
    else:
        line = printable(completion.text, "\t")
    print(line, flush=True)


def _encode_prompts(
    prompts: list[Prompt], tokenizer: Tokenizer, args: Args
) -> list[tuple[Ids, list[int]]]:
    """(the ids to continue, those of them to show) of each, as training encodes a record."""
    texts: list[tuple[Ids, list[int]]] = []
    if args.chat:
        with Chat(tokenizer) as chat:
            begun = begin_messages(chat, args.system_message)
            for prompt in prompts:
                messages = [*begun, {"role": "user", "content": prompt.text}]
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
