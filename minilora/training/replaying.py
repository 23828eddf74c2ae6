"""A run's steps once more: the command that made it, and whether a log has the same bits.

OUT/command.json    the words of the command line
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import CheckpointError, ConfigError, FormatError, Interrupted
from ..formats import read_json, write_json
from ..formats.disk import JsonObject, require_folder
from .checkpoints import checkpoint_place, checkpoints_by_step, find_checkpoint, read_log
from .resuming import require_same_run

COMMAND = "command.json"
CUT = ("shard", "part")  # follow from the shape of a batch
# What may be changed between steps, by the option's name: the fields of a run that say it. The
# shapes of parameters and the optimizer's state stay what they are.
CHANGEABLE: dict[str, tuple[str, ...]] = {
    "lr": ("lr",),
    "floor": ("floor",),
    "warmup": ("warmup",),
    "steps": ("steps",),
    "weight_decay": ("weight_decay",),
    "max_grad_norm": ("max_grad_norm",),
    "seed": ("seed",),
    "batch_size": ("batch_size", *CUT),
    "accumulate": ("accumulate", *CUT),
    "context": ("context", *CUT),
    "lora_alpha": ("lora_alpha",),
    "lora_dropout": ("lora_dropout",),
    "loraplus_lr_ratio": ("loraplus_lr_ratio",),
    "loraplus_lr_embedding": ("loraplus_lr_embedding",),
    "riemannian_reg": ("riemannian_reg",),
}
NOT_COMPARED = "seconds"  # of a line of the log


def write_command(out: Path, words: Sequence[str]) -> None:
    """Note the words of the command that a run's folder is from.

    JSON has no bytes that are not UTF-8: a run of files with such names cannot be replayed.
    """
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        return
    write_json(out / COMMAND, {"command": list(words)})


@contextlib.contextmanager
def noting_command(out: Path, words: Sequence[str]) -> Iterator[None]:
    """Note the command once the block's run has trained, to its end or until it was stopped.

    A run that is refused, because its checkpoint belongs to another one, changes no file.
    """
    try:
        yield
    except Interrupted:
        write_command(out, words)
        raise
    write_command(out, words)


def read_command(run: Path) -> list[str]:
    """The words of the command that made a run. ConfigError if its folder does not say them."""
    require_folder(run, "run")
    path = run / COMMAND
    if not path.is_file():
        raise ConfigError(
            f"{str(run)!r:.200} has no {COMMAND}, which finetune writes when it ends or is stopped "
            "by a signal (not pretrain or sweep, nor with arguments that are not UTF-8): give the "
            "folder of such a run, or let finetune --resume finish it"
        )
    words = read_json(path).get("command")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise FormatError(f"{path}: expected a list of words under command")
    if not words or words[0] != "finetune":
        raise ConfigError(f"{path}: replay is for runs of finetune, this is {words[:1]!r:.60}")
    return words


def choose_checkpoint(run: Path, step: int) -> Path | None:
    """The checkpoint of a run after `step` steps; None for step 0, where it began. ConfigError."""
    if step == 0:
        return None
    place = checkpoint_place(run, step)
    if not place.is_dir():
        steps = sorted({_step_of(folder) for folder in checkpoints_by_step(run / "checkpoints")})
        known = ", ".join(map(str, [0, *steps]))
        raise ConfigError(
            f"--from {step}: {str(run)!r:.150} has no checkpoint of this step: choose among {known}"
            "; finetune --save-every N writes more, and the last two stay"
        )
    return find_checkpoint(place, run)[0]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1].split(".")[0])


def require_replayable(
    run: Path, checkpoint: Path | None, identity: JsonObject, changed: Sequence[str] | None = None
) -> None:
    """CheckpointError unless what `identity` says is the run, or differs in `changed` alone.

    checkpoint   where it goes on; for None, the run's newest one says what the run was, if any does
    identity     `Run.identity`, of which no step is taken
    """
    newest = max(checkpoints_by_step(run / "checkpoints"), default=None, key=_step_of)
    place = checkpoint or (newest if changed is None else None)
    if place is None:
        return
    folder, manifest = find_checkpoint(place, run)
    with contextlib.suppress(KeyError, TypeError, ValueError):  # which restoring it refuses
        before = dict(manifest["state"]["run"])
        require_same_run(str(folder), before, identity, manifest["step"], changed or ())


def read_steps(run: Path, step: int) -> list[JsonObject]:
    """The lines of a run's log from a step on. ConfigError if it has none."""
    lines = [line for line in read_log(run / "log.jsonl") if line["step"] >= step]
    if not lines:
        raise ConfigError(
            f"--from {step}: the log of {str(run)!r:.200} ends before this step, so there is "
            "nothing to replay: choose an earlier one"
        )
    return lines


def read_evaluations(run: Path, step: int) -> list[JsonObject]:
    """The evaluations of a run after a step."""
    path = run / "eval.jsonl"
    return [line for line in read_log(path) if line["step"] > step] if path.is_file() else []


def require_equal_logs(run: Path, twin: Path, step: int) -> int:
    """The number of steps from `step` on that both logs have. CheckpointError if a bit differs.

    Losses, norms and rates of each step are compared, and the held-out loss where both have one.
    """
    lines = read_steps(run, step)
    repeated = {line["step"]: line for line in read_steps(twin, step)}
    for line in lines:
        _require_equal(run, line, repeated.get(line["step"]))
    measured = {line["step"]: line["loss"] for line in read_evaluations(run, step)}
    for line in read_evaluations(twin, step):
        before = {"step": line["step"], "held-out loss": measured.get(line["step"], line["loss"])}
        _require_equal(run, before, {"step": line["step"], "held-out loss": line["loss"]})
    return len(lines)


def _require_equal(run: Path, line: JsonObject, other: JsonObject | None) -> None:
    """CheckpointError if two lines of logs differ in more than their time."""
    names = [name for name in line if name != NOT_COMPARED]
    different = [name for name in names if other is None or line[name] != other.get(name)]
    if different:
        name = different[0]
        now = "nothing" if other is None else repr(other.get(name))
        raise CheckpointError(
            f"{str(run)!r:.150}, step {line['step']}: the unchanged twin has {name} = {now:.40}, "
            f"the log {line[name]!r:.40}: versions, device or processor are not those of the run, "
            "so no difference could be put down to what is set: replay where the run was made"
        )
