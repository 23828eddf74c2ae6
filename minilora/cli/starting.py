"""finetune --init-lora-weights: the checks of options about a start, and the data a start reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.batches import Windows
from ..errors import ConfigError
from ..lora import LoraConfig
from ..lora.starts.residual import start_of
from ..lora.starts.values import STARTS, Start, find_start
from ..quant.codes import KINDS
from ..training.checkpoints import find_checkpoint
from .options import Args

BATCHES = 8  # the run's first batches, for a start that reads data


def start_of_new(args: Args, config: LoraConfig | None) -> Start | None:
    """The start of the run's adapter; None for a base, an adapter to go on from, or no start."""
    is_new = config is not None and args.adapter is None
    return find_start(config.init_lora_weights) if is_new and config else None


def check_start(args: Args, config: LoraConfig | None) -> None:
    """ConfigError for options about a start that do not fit together."""
    for name, value in (("--initial", args.initial), ("--base-is", args.base_is)):
        if value is not None and args.adapter is None:
            raise ConfigError(f"{name} says how --adapter began: give that too, or leave it out")
    if config is None:
        if args.as_trained:
            raise ConfigError("--as-trained is for an adapter, and --method full trains the base")
        return
    if args.as_trained and not (find_start(config.init_lora_weights) or start_of(config)):
        raise ConfigError(
            "--as-trained saves what a start left, and this adapter has none: leave it out, or "
            f"give --init-lora-weights {', '.join(STARTS)}"
        )
    if config.init_lora_weights == "loftq" and args.quantize not in KINDS:
        raise ConfigError(
            f"--init-lora-weights loftq begins from codes, and --quantize is {args.quantize}: "
            f"give --quantize {' or '.join(KINDS)}"
        )


def require_start_for_tasks(config: LoraConfig | None) -> None:
    """ConfigError for a start that several adapters of one base cannot have."""
    start = None if config is None else find_start(config.init_lora_weights)
    if config is not None and start is not None and (start.changes_base or start.needs):
        raise ConfigError(
            f"--init-lora-weights {config.init_lora_weights} is for one adapter, not for each of "
            "--tasks: train them one by one, or begin with orthogonal"
        )


def read_start(args: Args, start: Start, settings: Any, tokens: Any) -> dict[str, Any]:
    """Options of `get_peft_model` for a start: the run's first batches, or its checkpoint."""
    if args.resume is not None:
        folder, _ = find_checkpoint(args.resume, Path(args.out or "runs"))
        return {"resumed": folder}
    if start.needs not in ("covariance", "gradient"):
        return {}
    windows = Windows(tokens, settings.context, settings.sequences, settings.seed)
    return {"data": [windows.batch(number) for number in range(BATCHES)]}
