"""How two adapters interfere on a text:  L12 - L1 - L2 + L0.

L0 is the loss of the base, L1 and L2 those with one adapter, L12 with both added. It is 0 if what
both change adds up, above 0 if they disturb each other. The cosine of dW1 and dW2 does not show it:
two changes that are orthogonal as matrices may act on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.batches import Text
from ..lora.layer import use_adapters
from .windows import (
    Estimate,
    estimate,
    evaluating,
    require_switchable,
    token_counts,
    window_losses,
    windows_of,
    wrappers_of,
)

MODELS = ("base", "a", "b", "both")


def measure_interference(
    model: Any,
    names: Sequence[str],
    text: Text,
    context: int,
    limit: int | None = None,
    threads: int | None = None,
) -> dict[str, Estimate]:
    """The loss of each of MODELS and "interference", in nats per token, with standard errors.

    model   a PeftModel with the two adapters `names`, both active

    ConfigError for an adapter with trained biases; NonFiniteError.
    """
    require_switchable(model)
    windows = windows_of(text, context, limit)
    tokens = token_counts(windows)
    wrappers = wrappers_of(model).values()
    one, other = names
    losses = {}
    with evaluating(model, threads) as workers:
        for name, running in zip(MODELS, (None, [one], [other], names), strict=True):
            with use_adapters(wrappers, running):
                losses[name] = window_losses(model, windows, workers)
    result = {name: estimate(sums, tokens) for name, sums in losses.items()}
    parts = losses["both"] - losses["a"] - losses["b"] + losses["base"]
    result["interference"] = estimate(parts, tokens)
    return result
