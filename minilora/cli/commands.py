"""What each command does: it turns options into calls of the rooms below."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import get_backend, gpus
from ..data.batches import Ids, PackedRecords
from ..data.records import bytes_per_token, is_records, pack, read_records, split_records
from ..data.texts import prose, read_text, split_text
from ..data.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer
from ..display import print_table, printable
from ..errors import ConfigError, DataError, MiniloraError, NonFiniteError
from ..formats.folders import locked, numbered_folder
from ..lora import (
    AdaLoraConfig,
    LoraConfig,
    MultiTask,
    PeftModel,
    get_multitask_model,
    get_peft_model,
)
from ..lora.multitask import FILE as MULTITASK
from ..models.config import TransformerConfig
from ..models.transformer import CausalLM
from ..quant.half import iterate_pieces
from ..quant.linear import quantize
from ..training.methods import adapter_config, format_weight_memory, measure_weight_memory
from ..training.runs import find_checkpoint, open_folder
from . import files
from .options import ADALORA_OPTIONS, LORA_OPTIONS, SHAPE

MAX_PARAMETERS = 2**32  # 64 GiB to train; a shape beyond that is a mistake of typing

# ---- commands -------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    from ..lab.demo import Plan
    from ..lab.demo import demo as run

    plan = Plan()
    plan = plan.quick() if args.quick else plan
    plan = plan.adapted_by(args.method, args.quantize, _given(args))
    texts = {"pretrain_data": args.pretrain_data, "adapt_data": args.adapt_data}
    for name, path in texts.items():
        if path:
            _long_enough(
                read_text(path),
                10 * (plan.pretrain.context + 1),
                f"--{name.replace('_', '-')} {path}",
            )
    get_backend(args.device)  # what cannot work ends here, before a folder is made
    if not args.pretrain_data:
        prose()
    with locked(args.out or numbered_folder("runs", "demo")) as out:
        run(
            open_folder(out),
            plan,
            **texts,
            seed=args.seed,
            threads=args.threads,
            device=args.device,
        )


def pretrain(args: argparse.Namespace) -> None:
    from ..training.loop import Settings, bits_per_byte, train

    settings = _settings(args, Settings)
    tokenizer = ByteTokenizer()
    shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    limit = args.max_position_embeddings or max(settings.context, 256)
    _within_positions(settings.context, limit)
    config = TransformerConfig(
        **shape, max_position_embeddings=limit, tie_word_embeddings=not args.untied
    )
    if config.parameter_count() > MAX_PARAMETERS:
        raise ConfigError(
            f"a model of {config.parameter_count():,} parameters: at most {MAX_PARAMETERS:,} are trained"
        )
    tokens, held_out, _ = _texts(args.data, args.eval_data, tokenizer, settings.context)
    model = CausalLM(config, seed=settings.seed, device=args.device)
    with _run_folder(args, "pretrain") as out:
        print(
            f"{sum(p.size for p in model.parameters()):,} parameters, {len(tokens):,} tokens -> {printable(str(out))}"
        )
        result = train(
            model, tokens, settings, out, held_out=held_out, resume=args.resume, title="pretrain"
        )
        model.save_pretrained(out)
        tokenizer.save(out)
    _print_result(result, bits_per_byte, 1.0)


def finetune(args: argparse.Namespace) -> None:
    from ..training.loop import Settings, Text, bits_per_byte, train

    settings = _settings(args, Settings)
    config = adapter_config(args.method, args.quantize, _given(args), settings.steps)
    tasks = _tasks(args, config)
    model, tokenizer = _base(args)
    _within_positions(settings.context, model.config.max_position_embeddings)
    tokens: Text
    held_out: Text
    if tasks:  # of all of them, before anything is made
        read = {
            task: _texts(path, None, tokenizer, settings.context, "--tasks")
            for task, path in tasks.items()
        }
        tokens = {task: learnt for task, (learnt, _, _) in read.items()}
        held_out = {task: kept for task, (_, kept, _) in read.items()}
        ratio = statistics.fmean(found[2] for found in read.values())
    else:
        tokens, held_out, ratio = _texts(args.data, args.eval_data, tokenizer, settings.context)
    held = measure_weight_memory(model)
    if config is None and held["layers"]:
        raise ConfigError(
            f"--base {args.base!r} is held as {held['kind']}: --method full cannot train it"
        )
    if config is not None:
        name = os.fsencode(args.base).decode("utf-8", "replace")
        config = dataclasses.replace(config, task_type="CAUSAL_LM", base_model_name_or_path=name)
        if tasks:
            shared = dataclasses.replace(config, r=args.shared_r) if args.shared_r else None
            model = get_multitask_model(
                model, dict.fromkeys(tasks, config), shared, seed=settings.seed
            )
        else:
            model = get_peft_model(model, config, seed=settings.seed)
    options: dict[str, Any] = {
        "held_out": held_out,
        "resume": args.resume,
        "bytes_per_token": ratio,
    }
    with _run_folder(args, "finetune") as out:
        if held["layers"]:
            print(format_weight_memory(held))
        if config is None:
            print(f"all {sum(p.size for p in model.parameters()):,} parameters of the base train")
        else:
            model.print_trainable_parameters()
        sizes = (
            {task: len(ids) for task, ids in tokens.items()}
            if isinstance(tokens, dict)
            else {"": len(tokens)}
        )
        counts = ", ".join(f"{task} {size:,}".lstrip() for task, size in sizes.items())
        print(printable(f"{counts} tokens -> {out}"))
        result = train(model, tokens, settings, out, **options, title="finetune")
        model.save_pretrained(out)
        if (
            config is None and not tokenizer.note
        ):  # a base that came without a tokenizer.json stays without
            tokenizer.save(out)
        if isinstance(config, AdaLoraConfig):
            _draw_ranks(out)
    _print_result(result, bits_per_byte, ratio)


def _tasks(args: argparse.Namespace, config: LoraConfig | None) -> dict[str, str]:
    """The texts of --tasks by the names of the tasks, which are the files'. ConfigError for what does not fit."""
    if (args.data is None) == (args.tasks is None):
        raise ConfigError(
            "expected a text: --data FILE for one, or --tasks FILE FILE ... for several tasks"
        )
    if args.tasks is None:
        if args.shared_r is not None:
            raise ConfigError(
                "--shared-r is the rank of an adapter that all of --tasks share: name the tasks"
            )
        return {}
    tasks = {Path(path).stem.replace(".", "-"): path for path in args.tasks}
    if len(tasks) < len(args.tasks):
        raise ConfigError(
            f"--tasks: a task has the name of its file, and two are alike: {', '.join(args.tasks)}"[
                :300
            ]
        )
    if args.batch_size * args.accumulate < len(tasks):
        raise ConfigError(
            f"--batch-size {args.batch_size} cannot hold a sequence of each of {len(tasks)} tasks"
        )
    if args.eval_data is not None:
        raise ConfigError("--eval-data is one text; of each of --tasks the last tenth is held out")
    if isinstance(config, AdaLoraConfig):
        raise ConfigError(
            "--method adalora shares out the ranks of one adapter: train its --tasks one by one"
        )
    if args.shared_r is not None and (config is None or config.use_dora):
        raise ConfigError(
            f"--shared-r goes with --method lora, not with {args.method}: what is shared is added up"
        )
    return tasks


def generate(args: argparse.Namespace) -> None:
    from ..models.generation import stream

    model, tokenizer = _base(args)
    prompt = tokenizer.encode(args.prompt)
    if not len(prompt):
        raise DataError("--prompt is empty: the model needs at least one token to go on from")
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    ids = list(map(int, prompt))
    shown = ""
    for token in stream(model, np.asarray(prompt)[None], args.max_new_tokens, **sampling):
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # wait for the rest of a character
            print(printable(text[len(shown) :], "\n\t"), end="", flush=True)
            shown = text
    print(printable(tokenizer.decode(ids)[len(shown) :], "\n\t"))


def evaluate(args: argparse.Namespace) -> None:
    from ..training.loop import bits_per_byte
    from ..training.loop import evaluate as measure

    model, tokenizer = _base(args)
    context = args.context or min(256, model.config.max_position_embeddings)
    _within_positions(context, model.config.max_position_embeddings)
    tokens, ratio = _text(args.data, tokenizer, context)
    loss = measure(model, tokens, context, limit=args.limit, threads=args.threads)
    bits = bits_per_byte(loss, ratio)
    perplexity = math.exp(min(loss, 700))
    print(
        f"loss {loss:.6f} nats a token, {bits:.4f} bits a byte, perplexity {perplexity:.4f} (context {context})"
    )


def devices(args: argparse.Namespace) -> None:
    import threadpoolctl

    from ..threads import available_cores

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    blas = [f"{p['internal_api']} {p['version']} with {p['num_threads']} threads" for p in pools]
    found = {
        "cpu": f"usable, {available_cores()} cores, {', '.join(blas) or 'no BLAS that threadpoolctl knows'}"
    }
    for name, state in {**found, **gpus()}.items():
        print(f"{name:8} {printable(state.removeprefix(f'device {name!r} is '))}")


def verify(args: argparse.Namespace) -> None:
    from ..verify import Report, verify_files
    from ..verify import verify as over_random_cases
    from ..verify.run import as_json, worst_ratio

    if (args.base is None) != (args.adapter is None):
        raise ConfigError(
            "verify takes --base and --adapter, or neither of them: then it measures random layers"
        )
    if args.base is None:
        report = Report(over_random_cases(args.cases, args.seed), [])
    else:
        report = verify_files(args.base, args.adapter, args.seed)
    if args.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        heads = ("property", "equation", "measured", "bound", "ratio", "ok", "source")
        shown = (
            (
                r.property,
                r.equation,
                f"{r.measured:.2e}",
                f"{r.bound:.2e}",
                f"{r.ratio:.3f}",
                r.ok,
                r.source,
            )
            for r in report.rows
        )
        print_table([dict(zip(heads, row, strict=True)) for row in shown])
        if report.layers:
            print()
            print_table(
                [
                    {k: f"{v:.4g}" if type(v) is float else v for k, v in f._asdict().items()}
                    for f in report.layers
                ]
            )
        print(
            f"\nworst measured / bound: {worst_ratio(report.rows):.3f}, of {len(report.rows)} properties"
        )
    for row in report.rows:
        if not row.ok:
            detail = f"measured {row.measured:.3g}, bound {row.bound:.3g}, at {row.where} {row.note}".rstrip()
            raise MiniloraError(f"property '{row.property}' fails: {row.equation}: {detail}")


# ---- what commands share --------------------------------------------------------------------------------------------


def _base(args: argparse.Namespace) -> tuple[Any, ByteTokenizer | HubTokenizer]:
    """The model of --base, with --adapter if there is one, and its tokenizer."""
    held = getattr(args, "quantize", "none")
    model: Any = CausalLM.from_pretrained(args.base, device=args.device, stored=held == "stored")
    tokenizer = load_tokenizer(args.base, model.config.vocab_size)
    if tokenizer.note:
        print(tokenizer.note, file=sys.stderr)
    if held not in ("none", "stored"):
        quantize(model, held)
    task = getattr(args, "task", None)
    if getattr(args, "adapter", None):
        if (Path(args.adapter) / MULTITASK).exists():
            model = _one_task(MultiTask.from_pretrained(model, args.adapter), task)
        elif task is not None:
            raise ConfigError(
                f"--adapter {args.adapter!r} holds one adapter: there is no task to choose"
            )
        else:
            model = PeftModel.from_pretrained(model, args.adapter)
    elif task is not None:
        raise ConfigError("--task chooses one of an --adapter folder's tasks: give that, too")
    for (
        name,
        p,
    ) in (
        model.named_parameters()
    ):  # known before anything is made of them: no text, no run, no merged file
        if not args.allow_nonfinite and not all(
            bool(p.backend.xp.isfinite(piece).all()) for piece in iterate_pieces(p)
        ):
            raise NonFiniteError(
                f"the weights in {args.base!r}, or of its adapter, are broken: {name} is not finite"
            )
    return model, tokenizer


def _one_task(model: MultiTask, task: str | None) -> Any:
    """The plain model of a task."""
    if task is None:
        raise ConfigError(
            f"--adapter holds several tasks: choose one with --task: {', '.join(model.tasks)}"[:300]
        )
    return model.merge_task(task)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The adapter's fields that were given."""
    return {
        name: getattr(args, name)
        for name in (*LORA_OPTIONS, *ADALORA_OPTIONS)
        if hasattr(args, name)
    }


def _settings(args: argparse.Namespace, settings: Any) -> Any:
    return settings(
        **{
            f.name: getattr(args, f.name)
            for f in dataclasses.fields(settings)
            if hasattr(args, f.name)
        }
    )


@contextlib.contextmanager
def _run_folder(args: argparse.Namespace, stem: str) -> Iterator[Path]:
    """--out, or a new folder in runs/, held while it is written to.

    It may hold something only if the run goes on with a checkpoint from there.
    """
    with contextlib.ExitStack() as held:
        own = False
        if args.resume is not None:
            if args.resume == "auto" and args.out is None:
                raise ConfigError("--resume auto needs --out, the folder of the run to go on with")
            if (
                args.out is not None and Path(args.out).is_dir()
            ):  # first of all: another run's checkpoints come and go
                held.enter_context(locked(args.out))
            checkpoint, _ = find_checkpoint(args.resume, Path(args.out or "runs"))
            own = args.out is not None and Path(args.out).resolve() in checkpoint.resolve().parents
        out = held.enter_context(locked(args.out or numbered_folder("runs", stem)))
        yield open_folder(out, own)


def _text(
    data: str, tokenizer: ByteTokenizer | HubTokenizer, context: int
) -> tuple[Ids | PackedRecords, float]:
    """(ids, bytes a token) of a text, or of records, to measure on."""
    if is_records(data):
        records = read_records(data, tokenizer, context)
        return pack(records, context), bytes_per_token(records)
    text = read_text(data)
    tokens = tokenizer.encode(text)
    return tokens, len(text) / max(1, len(tokens))


def _texts(
    data: str,
    eval_data: str | None,
    tokenizer: ByteTokenizer | HubTokenizer,
    context: int,
    option: str = "--data",
) -> tuple[Ids | PackedRecords, Ids | PackedRecords, float]:
    """(training ids, held-out ids, bytes a token). Without --eval-data the last tenth of --data is held out."""
    tokens: Ids | PackedRecords
    if is_records(data):
        records = read_records(data, tokenizer, context)
        if not eval_data:
            try:
                records, kept = split_records(records)
            except DataError as error:
                raise DataError(f"{option} {data}: {error}") from None
            return pack(records, context), pack(kept, context), bytes_per_token(kept)
        tokens = pack(records, context)
    else:
        text = read_text(data)
        _long_enough(text, 2 if eval_data else 10, f"{option} {data}")
        text, held_out = (text, b"") if eval_data else split_text(text)
        tokens = tokenizer.encode(text)
        if len(tokens) < context + 1:
            whole = "" if eval_data else " once its last tenth is held out"
            needed = f"a context of {context} needs at least {context + 1} tokens"
            raise DataError(f"{option} {data}: {needed}, it has {len(tokens)}{whole}")
    if eval_data:
        held_ids, ratio = _text(eval_data, tokenizer, context)
    else:
        held_ids = tokenizer.encode(held_out)
        ratio = len(held_out) / max(1, len(held_ids))
    if len(held_ids) < 2:
        what = f"{'--eval-data' if eval_data or option == '--data' else option} {eval_data or data}"
        raise DataError(f"{what}: needs at least 2 tokens to evaluate on, has {len(held_ids)}")
    return tokens, held_ids, ratio


def _long_enough(text: bytes, least: int, what: str) -> None:
    if len(text) < least:
        raise DataError(f"{what}: needs at least {least} bytes, has {len(text)}")


def _within_positions(context: int, limit: int) -> None:
    if context > limit:
        raise ConfigError(f"--context {context} is more than max_position_embeddings = {limit}")


def _draw_ranks(out: Path) -> None:
    from ..lab import plots  # matplotlib is optional, and slow to import
    from ..training.loop import rank_history

    if plots.available():
        plots.rank_allocation(out / "rank_allocation.png", *rank_history(out))


def _print_result(
    result: Any, bits_per_byte: Callable[[float, float], float], ratio: float
) -> None:
    first, last = result.evaluations[0][1], result.evaluations[-1][1]
    before, after = bits_per_byte(first, ratio), bits_per_byte(last, ratio)
    print(f"held-out bits per byte {before:.3f} -> {after:.3f} in {result.seconds:.0f} s")


OWN = (demo, pretrain, finetune, generate, evaluate, verify, devices)
COMMANDS = {**{f.__name__: f for f in OWN}, **files.COMMANDS}
