"""The loss of each window of a text, and the paired error of a difference between models.

All models that are compared read the same windows, so what makes one window harder than another is
in both, and only what differs counts: the standard error is that of the differences.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Tensor, no_grad
from ..data.batches import Batch, Text, evaluation_windows
from ..errors import ConfigError, NonFiniteError
from ..lora.layer import Wrapper
from ..lora.targets.plan import wrappers
from ..threads import Workers, available_cores, one_blas_thread

Array = np.ndarray
PER_THREAD = 4  # windows in work at a time whose activations are in memory


class Estimate(NamedTuple):
    """A mean per token over all windows, in nats, and its standard error.

    The error is NaN for a single window.
    """

    mean: float
    error: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN."""
        return {"mean": self.mean, "error": None if math.isnan(self.error) else self.error}


def estimate(sums: Array, tokens: Array) -> Estimate:
    """The mean per token of what each window adds, and its standard error over windows.

    sums, tokens   (W,): each window's sum over its tokens, and their number

    Windows may have different lengths, so it is the error of a ratio: see Cochran 1977,
    section 2.11.
    """
    count = len(sums)
    whole = float(tokens.sum())
    mean = math.fsum(sums) / whole
    if count < 2:
        return Estimate(mean, math.nan)
    rest = sums - mean * tokens
    return Estimate(mean, math.sqrt(count / (count - 1) * float(np.vdot(rest, rest))) / whole)


@contextlib.contextmanager
def evaluating(model: Any, threads: int | None) -> Iterator[Workers]:
    """Threads for windows, while the model is in eval mode and BLAS has one thread."""
    was_training = model.training
    model.eval()
    try:
        with one_blas_thread(), Workers(threads or available_cores()) as workers, no_grad():
            yield workers
    finally:
        model.train(was_training)


def windows_of(text: Text, context: int, limit: int | None) -> list[Batch]:
    """The windows of a text, each as a batch of one: at most `limit`, spread over the text."""
    windows = list(evaluation_windows(text, context, 1, limit))
    return [window.trim() if window.first_key is not None else window for window in windows]


def token_counts(windows: Sequence[Batch]) -> Array:
    return np.array([window.tokens for window in windows], np.float64)


def wrappers_of(model: Any) -> dict[str, Wrapper]:
    """The layers with adapters, and modules that are saved whole, by their paths in the base."""
    return dict(wrappers(model.get_base_model()))


def require_switchable(model: Any) -> None:
    """ConfigError if an active adapter changed the base in what no layer of it can switch."""
    for name in model.active_adapters:
        bias = model.peft_config[name].bias
        if bias != "none":
            raise ConfigError(
                f"bias = {bias!r}: an adapter trained biases of the base, which cannot be switched "
                "off with its layers: measure the whole with evaluate"
            )


def window_losses(model: Any, windows: Sequence[Batch], workers: Workers) -> Array:
    """(W,): the sum of -log p over each window's targets. NonFiniteError."""
    losses = list(workers.map(_loss_of(model.get_base_model()), windows))
    return require_finite(np.array(losses, np.float64))


def _loss_of(base: Any) -> Callable[[Batch], float]:
    def loss(window: Batch) -> float:
        with no_grad():
            value: Tensor = base(window.ids, targets=window.targets, first_key=window.first_key)
            return float(value.data)

    return loss


def require_finite(losses: Array) -> Array:
    if not np.isfinite(losses).all():
        place = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NonFiniteError(
            f"the loss of window {place} is {losses[place]}: the model's weights are not finite, "
            "or too large"
        )
    return losses
