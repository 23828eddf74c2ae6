"""What several commands read: a model with its adapter, and the tokens of texts."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..data.batches import Ids, PackedRecords
from ..data.files import BOM, LINE_NAMES, DataFile, open_data, parse_record
from ..data.records import bytes_per_token, pack, read_records, split_records
from ..data.texts import read_text, split_text
from ..data.tokenizer import ByteTokenizer, HubTokenizer, load_adapter_tokenizer, load_tokenizer
from ..display import printable
from ..errors import ConfigError, DataError, NonFiniteError
from ..formats.disk import quoted
from ..lora import MultiTask, PeftModel
from ..lora.multitask import BASE
from ..lora.multitask import FILE as MULTITASK
from ..models.config import TransformerConfig
from ..models.transformer import CausalLM
from ..precision import FLOAT32
from ..quant.half import iterate_pieces
from ..quant.linear import quantize
from .options import Args, find_models

Tokenizer = ByteTokenizer | HubTokenizer
Tokens = Ids | PackedRecords

# ---- models --------------------------------------------------------------------------------------


def load_model(
    args: Args, adapter: str | None = None, task: str | None = None, quantized: bool = True
) -> tuple[Any, Tokenizer]:
    """(model, tokenizer) of --base, quantized by --quantize, with an adapter or one task of it.

    quantized   False leaves codes to the caller, as for a start that needs the weights

    The tokenizer is the adapter's, if its folder has one.

    NonFiniteError for a weight that is NaN or infinite, before a command makes anything of it.
    """
    model: Any = load_base(args, quantized)
    if adapter is not None:
        start = {"initial": args.initial, "base_is": args.base_is}
        model = _load_adapter(model, adapter, task, args.compute == FLOAT32, start)
    elif task is not None:
        raise ConfigError("--task chooses a task of an adapter: give --adapter too")
    tokenizer = read_tokenizer(args.base, model.config.vocab_size, adapter)
    if not args.allow_nonfinite:
        require_finite(model, args.base)
    return model, tokenizer


def load_base(args: Args, quantized: bool = True) -> CausalLM:
    """The model of --base, quantized by --quantize, unless `quantized` is False."""
    find_models(args)
    kind = args.quantize
    options = {"device": args.device, "stored": kind == "stored", "compute": args.compute}
    model = CausalLM.from_pretrained(args.base, **options)
    if quantized and kind not in ("none", "stored"):
        quantize(model, kind)
    return model


def read_tokenizer(base: str, vocab_size: int, adapter: str | None = None) -> Tokenizer:
    """The tokenizer of a model, or of its adapter; its notes go to stderr."""
    tokenizer = None
    if adapter is not None:
        tokenizer = load_adapter_tokenizer(adapter, base, vocab_size)
    if tokenizer is not None:
        note = f"--adapter {quoted(adapter)} has a tokenizer or a chat template: it is used"
        print(printable(note), file=sys.stderr)
    else:
        tokenizer = load_tokenizer(base, vocab_size)
    for note in (tokenizer.note, *tokenizer.special.notes):
        if note:
            print(note, file=sys.stderr)
    return tokenizer


def _load_adapter(
    model: CausalLM, adapter: str, task: str | None, merged: bool, start: dict[str, Any]
) -> Any:
    """The model with an adapter, or with one task of it, which may be `merged` into the weights."""
    if not has_tasks(adapter, task):
        return PeftModel.from_pretrained(model, adapter, **start)
    for option, value in start.items():
        if value is not None:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} is for an adapter without tasks: leave it out")
    multitask = MultiTask.from_pretrained(model, adapter)
    task = choose_task(adapter, task, (*multitask.tasks, BASE))
    if merged:
        return multitask.merge_task(task)
    if task == BASE:
        return multitask.unload()
    PeftModel.set_adapter(multitask, multitask.adapters_of(task), inference_mode=True)
    return multitask.get_base_model()


def has_tasks(adapter: str, task: str | None) -> bool:
    """Whether the folder has several tasks. ConfigError if it has none and one was chosen."""
    if (Path(adapter) / MULTITASK).exists():
        return True
    if task is not None:
        raise ConfigError(f"--adapter {adapter!r} has one adapter and no tasks: leave out --task")
    return False


def choose_task(adapter: str, task: str | None, tasks: Iterable[str]) -> str:
    """`task`, which must be one of `tasks`."""
    if task is not None and task in tasks:
        return task
    given = "" if task is None else f", but not {task!r:.60}"
    known = f"--adapter {adapter!r:.100} has the tasks {', '.join(tasks)}{given}"
    raise ConfigError(f"{known}: choose one of them with --task")


def require_finite(model: Any, base: str, advice: str = ", or give --allow-nonfinite") -> None:
    """NonFiniteError for a weight that is NaN or infinite.

    advice   what to do besides repairing it, if the command has such an option; or ""
    """
    for name, p in model.named_parameters():
        isfinite = p.backend.xp.isfinite
        if not all(bool(isfinite(piece).all()) for piece in iterate_pieces(p)):
            message = f"{name} in {base!r} or in the adapter is not finite"
            raise NonFiniteError(f"{message}: repair the weights{advice}")


# ---- texts ---------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text: tokens to train on, tokens to evaluate on, and bytes per token of the latter."""

    tokens: Tokens
    held_out: Tokens
    bytes_per_token: float


def open_text(path: str) -> DataFile:
    """What a file holds; a warning where its name does not say so."""
    file = open_data(path)
    if file.note:
        warnings.warn(file.note, stacklevel=2)
    return file


class Prompt(NamedTuple):
    """A text to continue.

    where     the option, or the file and the line, that it is from
    is_json   whether the line is a JSON object
    """

    text: str
    where: str
    is_json: bool = False


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file, one per line: a text, or, by the file's name, JSON {"prompt": text}.

    DataError for a file that is empty or not UTF-8, FormatError for a line that is not such JSON.
    Both name the line.
    """
    is_json = path.lower().endswith(LINE_NAMES)
    lines = read_text(path, "continue in each line").removeprefix(BOM).split(b"\n")
    if not lines[-1]:
        lines.pop()  # the end of the last line
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"{quoted(path)} line {number}"
        line = line.removesuffix(b"\r")
        if is_json and not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"{where} is not UTF-8 at byte {error.start + 1}"
            raise DataError(f"{place}: convert the file to UTF-8") from None
        if is_json:
            text = _prompt_of(parse_record(line, where), where)
        prompts.append(Prompt(text, where, is_json))
    if not prompts:
        raise DataError(f"{quoted(path)} has no prompt: give at least one line")
    return prompts


def _prompt_of(record: dict[str, Any], where: str) -> str:
    text = record.get("prompt")
    if not isinstance(text, str):
        given = f"{text!r:.60}" if "prompt" in record else "no prompt"
        raise DataError(f'{where}: expected {{"prompt": a text}}, got {given}')
    return text


def read_tokens(
    path: str, tokenizer: Tokenizer, context: int, strict: bool = False
) -> tuple[Tokens, float]:
    """(tokens, bytes per token) of a text or of records to evaluate on."""
    file = open_text(path)
    if file.is_records:
        records = read_records(file, tokenizer, context, strict)
        with _naming(quoted(path)):
            return pack(records, context), bytes_per_token(records)
    with _naming(quoted(path)):
        return _encode(file.text(), tokenizer)


def read_training_text(
    path: str,
    eval_path: str | None,
    tokenizer: Tokenizer,
    context: int,
    option: str = "--data",
    strict: bool = False,
) -> Text:
    """The text of `option`; without a text to evaluate on, its last tenth is held out."""
    tokens: Tokens
    what = f"{option} {path}"
    file = open_text(path)
    if file.is_records:
        records = read_records(file, tokenizer, context, strict)
        if eval_path is None:
            with _naming(what):
                records, others = split_records(records)
                ratio = bytes_per_token(others)
            return Text(pack(records, context), pack(others, context), ratio)
        tokens = pack(records, context)
    else:
        text = file.text()
        rest = b""
        require_bytes(text, 2 if eval_path else 10, what)
        if eval_path is None:
            text, rest = split_text(text)
        with _naming(quoted(path)):
            tokens, _ = _encode(text, tokenizer)
        if len(tokens) <= context:
            needed = f"a context of {context} needs at least {context + 1} tokens"
            remaining = "" if eval_path else " once its last tenth is held out"
            raise DataError(f"{what}: {needed}, it has {len(tokens)}{remaining}")
    if eval_path is not None:
        what = f"--eval-data {eval_path}"
        held_out, ratio = read_tokens(eval_path, tokenizer, context, strict)
    else:
        held_out, ratio = _encode(rest, tokenizer)
    if len(held_out) < 2:
        raise DataError(f"{what}: needs at least 2 tokens to evaluate on, has {len(held_out)}")
    return Text(tokens, held_out, ratio)


def read_also(
    args: Args, tokenizer: Tokenizer, context: int, has_tasks: bool
) -> tuple[Tokens | None, float]:
    """(tokens, bytes per token) of --also-evaluate; (None, 1.0) without it, as in a sweep."""
    file = getattr(args, "also_evaluate", None)
    if file is None:
        return None, 1.0
    if has_tasks:
        raise ConfigError(
            f"--also-evaluate {file!r:.200} is for one adapter, and --tasks trains several: leave "
            "it out, or give --data"
        )
    tokens, ratio = read_tokens(file, tokenizer, context, args.strict)
    if len(tokens) < 2:
        raise DataError(f"--also-evaluate {file}: needs at least 2 tokens, has {len(tokens)}")
    return tokens, ratio


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors of what is read here begin with the file or the option that they are about."""
    try:
        yield
    except DataError as error:
        message = str(error)
        raise DataError(message if what in message else f"{what}: {message}") from None


def _encode(text: bytes, tokenizer: Tokenizer) -> tuple[Ids, float]:
    """(ids, bytes per token) of a plain text, a stream without special tokens: windows of it begin
    anywhere."""
    ids = tokenizer.encode(text)
    return ids, len(text) / max(1, len(ids))


def require_bytes(text: bytes, least: int, what: str) -> None:
    if len(text) < least:
        raise DataError(f"{what}: needs at least {least} bytes, has {len(text)}")


def require_context(context: int, config: TransformerConfig) -> None:
    if context > config.context:
        limit = config.describe_context()
        raise ConfigError(f"--context {context} must be at most the model's {limit}")
