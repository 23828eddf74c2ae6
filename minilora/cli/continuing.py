"""finetune --adapter: training goes on from an adapter, with a new optimizer, from step 0.

The adapter's own configuration says what it is: rank, scaling, targets, method. An option that
contradicts it is refused. AdaLoRA's schedule is the run's: its budget falls again, from the ranks
that the adapter has to target_r, over the steps of this run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..formats.hub import model_name
from ..lora import AdaLoraConfig, LoraConfig, PeftModel
from ..lora.files.adapter import AdapterFile
from ..lora.multitask import FILE as MULTITASK
from ..training.methods import adalora_defaults, method_of
from .options import Args
from .reading import require_finite

NAME = "default"  # of the adapter in the model: it is saved to --out itself
SCHEDULE = ("tinit", "tfinal", "deltaT")


def read_continued_config(args: Args, fields: dict[str, Any], steps: int) -> LoraConfig:
    """The configuration of --adapter, for a run of `steps`.

    fields   the given options that have the name of a field of a configuration

    ConfigError for an option that contradicts the adapter, and for an adapter of several tasks.
    """
    if args.tasks is not None:
        raise ConfigError("--adapter goes on from one adapter, not from one per task: give --data")
    if (Path(args.adapter) / MULTITASK).exists():
        given = f"--adapter {args.adapter!r:.100} has one adapter per task"
        raise ConfigError(f"{given}: give the folder of one of them, which is inside")
    with AdapterFile(
        args.adapter, False, args.initial, args.base_is, over_base=True, to_train=True
    ) as file:
        config = file.config
    given = f"--adapter {args.adapter!r:.100}"
    method = method_of(config)
    if args.method not in (None, method):
        raise ConfigError(f"--method {args.method}, but {given} has method {method}: leave it out")
    if isinstance(config, AdaLoraConfig):
        whole = adalora_defaults({name: fields[name] for name in SCHEDULE if name in fields}, steps)
        schedule = {name: whole[name] for name in SCHEDULE}
        config = dataclasses.replace(config, **schedule, total_step=steps)
    for name, value in fields.items():
        _require_same(name, value, config, given)
    return config


def _require_same(field: str, value: Any, config: LoraConfig, given: str) -> None:
    """ConfigError if the option for a field contradicts the adapter's own configuration."""
    option = f"--{field.replace('_', '-')}"
    # AdaLoRA's rank has another name in its files, and so has --r for it.
    name = "target_r" if field == "r" and isinstance(config, AdaLoraConfig) else field
    if not hasattr(config, name):
        raise ConfigError(f"{option} is for AdaLoRA, and {given} is not AdaLoRA's: leave it out")
    configured = getattr(config, name)
    if _normal(value) != _normal(configured):
        raise ConfigError(
            f"{option} {value!r:.60}, but {given} has {name} = {configured!r:.60}: "
            "leave it out, "
            "or begin a new adapter without --adapter"
        )


def _normal(value: Any) -> Any:
    """A value of a field to compare: the order of names and numbers has no meaning."""
    return sorted(value, key=repr) if isinstance(value, list) else value


def continue_adapter(args: Args, model: Any, config: LoraConfig) -> tuple[PeftModel, str]:
    """(the model with --adapter to train, a checksum of the adapter's weights).

    config   of `read_continued_config`

    FormatError for an adapter of another base; NonFiniteError for weights that are not finite.
    """
    start = {"initial": args.initial, "base_is": args.base_is}
    adapted = PeftModel.from_pretrained(model, args.adapter, NAME, is_trainable=True, **start)
    if not args.allow_nonfinite:
        require_finite(adapted, args.base)
    digest = hashlib.sha256()
    for key, array in sorted(adapted.state_dict(NAME).items()):
        digest.update(f"{key} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    now = adapted.peft_config[NAME]
    if isinstance(config, AdaLoraConfig):
        for name in (*SCHEDULE, "total_step"):
            setattr(now, name, getattr(config, name))
    now.base_model_name_or_path = os.fsencode(model_name(args.base)).decode("utf-8", "replace")
    now.task_type = "CAUSAL_LM"
    now.extra.pop("task_type", None)  # of a file for another task
    return adapted, digest.hexdigest()
