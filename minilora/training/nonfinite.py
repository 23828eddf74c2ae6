"""Why a training step gave a loss or a gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..anomaly import all_finite, detect_anomaly
from ..autograd import Tensor
from ..data.batches import Batch
from ..errors import NonFiniteError
from .parallel import ShardedStep, language_modelling_loss


def explain_non_finite(
    model: Any,
    batch: Batch,
    seed: int = 0,
    step: int = 0,
    *,
    shard: int | None = None,
    loss: Callable[[Any, Batch], Tensor] = language_modelling_loss,
) -> str:
    """Why does this training step give a loss or a gradient that is not finite? One sentence of at most 500 characters.

    Takes the forward and the backward of `ShardedStep.gradients` again (same batch, seed and step, so the same dropout
    masks; same `shard`, so the same cut) in anomaly mode, one shard after another, and looks at the parameters. Changes
    nothing: no weight, no `.grad`.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    found = ""
    with (
        np.errstate(all="ignore"),
        ShardedStep(model, 1, shard, loss) as sharded,
        detect_anomaly(True, model),
    ):
        try:
            total, grads = sharded.gradients(batch, params, seed, step)
            if not math.isfinite(float(total)) or not all(
                g is None or all_finite(p.backend.xp, g) for p, g in zip(params, grads, strict=True)
            ):
                found = "every operation gave finite numbers for finite ones, and only their sum is not finite"
        except NonFiniteError as error:
            found = str(error)
    broken = [
        _described(name, p)
        for name, p in model.named_parameters()
        if not all_finite(p.backend.xp, p.data)
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        before = (
            f"before the step, values that are not finite stood in {', '.join(broken[:3])}{more}"
        )
        # An operation that was given them is not to blame; and one that holds W + dW was given them unseen.
        return f"{before}; {found}"[:500] if found.startswith("first") else before[:500]
    return (
        found
        or "taken again, the step is finite: nothing in the batch or in the weights explains it"
    )


def _described(name: str, parameter: Tensor) -> str:
    """'model.norm.weight (1 of 64)'; and which row, where one row of a matrix, as one token's embedding is, has all."""
    bad = ~np.isfinite(parameter.numpy())
    rows = np.flatnonzero(bad.any(axis=1)).tolist() if bad.ndim == 2 else []
    return (
        f"{name} ({bad.sum()} of {bad.size}{f', all in row {rows[0]}' if len(rows) == 1 else ''})"
    )
