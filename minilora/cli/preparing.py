"""What finetune trains, from its options: a model with its adapter, texts and settings."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..display import printable
from ..errors import ConfigError
from ..formats.hub import model_name
from ..lora import AdaLoraConfig, LoraConfig, get_multitask_model, get_peft_model
from ..lora.optimizers import freeze_first_factors, require_optimizable
from ..precision import FLOAT32
from ..quant.codes import KINDS
from ..training.methods import (
    METHODS,
    adapter_config,
    format_weight_memory,
    measure_weight_memory,
)
from .continuing import continue_adapter, read_continued_config
from .fields import select_adapter_fields
from .options import Args, select_fields
from .reading import (
    Tokenizer,
    load_base,
    read_also,
    read_tokenizer,
    read_training_text,
    require_context,
    require_finite,
)
from .reporting import Report
from .starting import check_start, read_start, require_start_for_tasks, start_of_new

AUTO = "auto"  # --lr of finetune: see rates.py


def require_rate(lr: object) -> None:
    """ConfigError for a text that is neither a number nor `auto`."""
    if isinstance(lr, str) and lr != AUTO:
        raise ConfigError(f"--lr must be a finite number above 0, or {AUTO}, got {lr!r:.99}")


class Prepared(NamedTuple):
    """All that `train` needs.

    options   the arguments of `train` that follow from the files: held_out, origin, ...
    config    of the adapter; None for a base
    memory    of the base's weights: see `measure_weight_memory`
    sizes     the number of tokens to train on, as text
    trained   the number of parameters that train
    """

    model: Any
    tokens: Any
    settings: Any
    options: dict[str, Any]
    config: LoraConfig | None
    tokenizer: Tokenizer
    memory: dict[str, Any]
    sizes: str
    trained: int

    @property
    def origin(self) -> str | None:
        """A checksum of the adapter that training goes on from."""
        return self.options["origin"]  # type: ignore[no-any-return]

    def report(self, out: Path, result: Any) -> Report:
        ratios = self.options["bytes_per_token"], self.options["also_bytes_per_token"]
        return Report("finetune", out, result, ratios[0], self.trained, ratios[1])


def prepare_finetune(args: Args) -> Prepared:
    """Read what the options of finetune name. Everything that can be refused is refused here."""
    settings, config, tasks = read_finetune_options(args)
    start = start_of_new(args, config)
    is_coded_later = start is not None and args.quantize in KINDS
    model: Any = load_base(args, quantized=not is_coded_later)
    if not args.allow_nonfinite:
        require_finite(model, args.base)
    memory = measure_weight_memory(model)
    origin = None
    if config is not None and args.adapter is not None:
        model, origin = continue_adapter(args, model, config)
    tokenizer = read_tokenizer(args.base, model.config.vocab_size, args.adapter)
    require_context(settings.context, model.config)
    read = functools.partial(
        read_training_text, tokenizer=tokenizer, context=settings.context, strict=args.strict
    )
    tokens: Any
    held_out: Any
    also, also_ratio = read_also(args, tokenizer, settings.context, bool(tasks))
    if tasks:
        texts = {task: read(file, None, option="--tasks") for task, file in tasks.items()}
        tokens = {task: text.tokens for task, text in texts.items()}
        held_out = {task: text.held_out for task, text in texts.items()}
        ratio = statistics.fmean(text.bytes_per_token for text in texts.values())
        sizes = ", ".join(f"{task} {len(text.tokens):,}" for task, text in texts.items())
    else:
        tokens, held_out, ratio = read(args.data, args.eval_data)
        sizes = f"{len(tokens):,}"
    if config is not None and args.adapter is None:
        begin: dict[str, Any] = {"quantize": args.quantize if is_coded_later else None}
        if start is not None and not tasks:
            begin |= read_start(args, start, settings, tokens)
        model = _add_adapters(args, model, config, tasks, begin)
        memory = measure_weight_memory(model, is_adapted=True) if is_coded_later else memory
    elif config is None and memory["layers"]:
        given = f"--method full cannot train --base {args.base!r}"
        raise ConfigError(f"{given}, which is held as {memory['kind']}: train an adapter")
    if settings.optimizer == "lorafa":
        freeze_first_factors(model)  # before the parameters that train are counted
    trainable = sum(p.size for p in model.parameters() if p.requires_grad)
    options = {"held_out": held_out, "origin": origin, "bytes_per_token": ratio}
    options |= {"also": also, "also_bytes_per_token": also_ratio}
    return Prepared(model, tokens, settings, options, config, tokenizer, memory, sizes, trainable)


def print_preparation(args: Args, prepared: Prepared) -> None:
    """Say how the base is stored and what of it trains."""
    if prepared.memory["layers"]:
        print(format_weight_memory(prepared.memory))
    if args.compute != FLOAT32:
        print(f"products with frozen weights: {args.compute}")
    if prepared.config is None:
        count = sum(p.size for p in prepared.model.parameters())
        print(f"all {count:,} parameters of the base train")
    else:
        prepared.model.print_trainable_parameters()
    if prepared.origin is not None:
        print(printable(f"goes on from {args.adapter}"))


def read_finetune_options(args: Args) -> tuple[Any, LoraConfig | None, dict[str, str]]:
    """(settings, configuration of the adapter, files by task) that the options mean.

    ConfigError for options that are out of range or do not fit together. No weight is read.
    """
    from ..training.loop import Settings

    if args.lr == AUTO:
        raise ConfigError(
            "--lr auto is for finetune, which trains once: give a number, such as the one that "
            "`minilora lab rates` finds"
        )
    settings = Settings(**select_fields(args, Settings))
    fields = select_adapter_fields(args)
    config: LoraConfig | None
    if args.adapter is None:
        args.method = args.method or METHODS[0]
        config = adapter_config(args.method, args.quantize, fields, settings.steps)
        if config is None and args.compute != FLOAT32:
            given = f"--method full trains all weights, and --compute {args.compute}"
            raise ConfigError(f"{given} is for frozen ones: leave it out, or train an adapter")
    else:
        config = read_continued_config(args, fields, settings.steps)
    require_optimizable(settings.optimizer, config)
    check_start(args, config)
    return settings, config, _name_tasks(args, config)


def _name_tasks(args: Args, config: LoraConfig | None) -> dict[str, str]:
    """{name of the file: file} of --tasks. ConfigError for options that do not fit together."""
    if (args.data is None) == (args.tasks is None):
        raise ConfigError("give --data FILE for one text, or --tasks FILE FILE ... for several")
    if args.tasks is None:
        if args.shared_r is not None:
            raise ConfigError("--shared-r is for an adapter that tasks share: give --tasks too")
        return {}
    tasks = {Path(file).stem.replace(".", "-"): file for file in args.tasks}
    if len(tasks) < len(args.tasks):
        files = ", ".join(args.tasks)
        raise ConfigError(f"--tasks {files}: each file names a task, and two are alike: rename one")
    if args.batch_size * args.accumulate < len(tasks):
        given = f"--batch-size {args.batch_size} times --accumulate {args.accumulate}"
        raise ConfigError(f"{given} must be at least the number of --tasks, {len(tasks)}")
    if args.eval_data is not None:
        raise ConfigError("--tasks hold out the last tenth of each text: leave out --eval-data")
    require_start_for_tasks(config)
    if isinstance(config, AdaLoraConfig):
        raise ConfigError("--method adalora does not support --tasks; train one adapter per run")
    if args.shared_r is not None and (config is None or config.use_dora):
        raise ConfigError(f"--method {args.method} does not support --shared-r; use --method lora")
    return tasks


def _add_adapters(
    args: Args, model: Any, config: LoraConfig, tasks: Iterable[str], begin: dict[str, Any]
) -> Any:
    """The model with one adapter, which begins with `begin`, or with one per task."""
    base = os.fsencode(model_name(args.base)).decode("utf-8", "replace")
    config = dataclasses.replace(config, task_type="CAUSAL_LM", base_model_name_or_path=base)
    if not tasks:
        return get_peft_model(model, config, seed=args.seed, **begin)
    shared = dataclasses.replace(config, r=args.shared_r) if args.shared_r else None
    return get_multitask_model(model, dict.fromkeys(tasks, config), shared, seed=args.seed)
