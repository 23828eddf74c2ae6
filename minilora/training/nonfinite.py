"""Why a training step gave a loss or a gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..anomaly import all_finite, detect_anomaly
from ..autograd import Tensor
from ..data.batches import Batch
from ..errors import NonFiniteError, shorten
from .parallel import ShardedStep, language_modelling_loss


def explain_non_finite(
    model: Any,
    batch: Batch,
    seed: int = 0,
    step: int = 0,
    *,
    shard: int | None = None,
    part: int | None = None,
    loss: Callable[[Any, Batch], Tensor] = language_modelling_loss,
) -> str:
    """The reason why a training step is not finite: one sentence of at most 500 characters.

    The forward and backward of `ShardedStep.gradients` run again in anomaly mode, one shard after
    another, with the same batch, seed and step (so the same dropout masks) and the same `shard` and
    `part` (so the same cut); then the parameters are checked. No weight and no `.grad` changes.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    reason = ""
    quiet = np.errstate(all="ignore")
    sharded_step = ShardedStep(model, 1, shard, loss, part=part)
    with quiet, sharded_step as sharded, detect_anomaly(True, model):
        try:
            total, grads = sharded.gradients(batch, params, seed, step)
            finite = math.isfinite(float(total))
            for p, grad in zip(params, grads, strict=True):
                finite = finite and (grad is None or all_finite(p.backend.xp, grad))
            if not finite:
                reason = (
                    "every operation gave finite values for finite inputs, "
                    "and only their sum is not finite"
                )
        except NonFiniteError as error:
            reason = str(error)
    broken = []
    for name, p in model.named_parameters():
        if not all_finite(p.backend.xp, p.data):
            broken.append(_describe(name, p))
    if not broken:
        return reason or (
            "taken again, the step is finite: nothing in the batch or in the weights explains it"
        )
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    before = f"before the step, values that are not finite were in {', '.join(broken[:3])}{more}"
    # An operation with such values among its inputs is not the cause; nor is one that uses W + dW,
    # whose inputs do not show them.
    return shorten(f"{before}; {reason}" if reason.startswith("first") else before)


def _describe(name: str, parameter: Tensor) -> str:
    """The name of a parameter and how many of its values are not finite: 'norm.weight (1 of 64)'.

    If they are all in one row of a matrix, as in the embedding of one token, that row too.
    """
    bad = ~np.isfinite(parameter.numpy())
    count = f"{bad.sum()} of {bad.size}"
    if bad.ndim == 2:
        rows = np.flatnonzero(bad.any(axis=1))
        if len(rows) == 1:
            count = f"{count}, all in row {rows[0]}"
    return f"{name} ({count})"
