"""What starts measure on the user's data: the covariance of a layer's inputs, and gradients.

    eva       the covariance (I, I) of the inputs of each layer
    lora_ga   G (O, I), the gradient of the loss by each weight

Both are measured on the base, in eval mode, and added up in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...autograd import Tensor, gradients, no_grad
from ...data.batches import Batch
from ...errors import ConfigError
from ...functional import IGNORE, rows
from ...nn import LinearBase, Module, Parameter, replace_module
from ...threads import one_blas_thread
from ..targets.base import modules_inside
from .values import STARTS

Array = np.ndarray


def read_batches(name: str, needs: str, data: Iterable[Any] | None) -> list[Batch]:
    """`data` as batches, for a start that needs some; otherwise none."""
    if needs not in ("covariance", "gradient"):
        return []
    batches = []
    for batch in data or ():
        ids = batch if isinstance(batch, Batch) else np.asarray(batch)
        batches.append(ids if isinstance(ids, Batch) else Batch(ids[:, :-1], ids[:, 1:]))
    if not any(batch.tokens for batch in batches):
        others = [word for word, start in STARTS.items() if start.needs in ("", "decode")]
        raise ConfigError(
            f"init_lora_weights={name!r} begins from data, and none is given: pass data, a list of "
            f"batches of ids, or choose a start without, such as {', '.join(others)}"
        )
    return batches


class _Recorder(Module):
    """A linear layer that sums its inputs: their number, their sum (I,), their Gram matrix (I, I).

    counted   (N,) booleans: the rows of the next input (N, I) that count; None for all
    """

    running = ()

    def __init__(self, layer: LinearBase):
        self.layer = layer
        self.bias = layer.bias
        self.counted: Array | None = None
        self.count = 0
        self.total: Array = np.zeros(layer.in_features)
        self.gram: Array = np.zeros((layer.in_features, layer.in_features))

    def __call__(self, x: Tensor) -> Tensor:
        X = self.layer.backend.to_numpy(rows(x.data)).astype(np.float64)
        X = X if self.counted is None else X[self.counted]
        self.count += len(X)
        self.total += X.sum(axis=0)
        self.gram += X.T @ X
        y: Tensor = self.layer(x)
        return y

    def covariance(self) -> Array:
        """The covariance (I, I) of the inputs: E (x - mean)(x - mean)^T."""
        mean = self.total / self.count
        return self.gram / self.count - np.outer(mean, mean)


def measure_covariances(
    model: Any, paths: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Array]:
    """The covariance (I, I) of each layer's inputs at positions that have a target."""
    modules = modules_inside(model)
    recorders = {path: _Recorder(modules[path]) for path in paths}
    places = {path: _place(model, path) for path in paths}
    for path, recorder in recorders.items():
        replace_module(model, places[path], recorder)
    try:
        with no_grad(), _evaluating(model), one_blas_thread():
            for batch in batches:
                counted = (batch.targets != IGNORE).reshape(-1)
                for recorder in recorders.values():
                    recorder.counted = counted
                model(batch.ids, first_key=batch.first_key)
    finally:
        for path, recorder in recorders.items():
            replace_module(model, places[path], recorder.layer)
    return {path: recorder.covariance() for path, recorder in recorders.items()}


def measure_gradients(
    model: Any, paths: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Array]:
    """G (O, I) by path: dL/dW of the loss per token, averaged over the batches."""
    modules = modules_inside(model)
    weights: list[Parameter] = [modules[path].weight for path in paths]
    fixed = [path for path, weight in zip(paths, weights, strict=True) if weight.fixed]
    if fixed:
        raise ConfigError(
            f"lora_ga needs the gradient of {fixed[0]}.weight, which is in 16 bits: load the base "
            "in float32"
        )
    trained = {id(p): p.requires_grad for p in model.parameters()}
    sums = [np.zeros(weight.shape) for weight in weights]
    try:
        for p in model.parameters():
            p.requires_grad = False
        for weight in weights:
            weight.requires_grad = True
        with _evaluating(model), one_blas_thread():
            for batch in batches:
                batch = batch.to(weights[0].backend, model.config.vocab_size)
                loss = model(batch.ids, targets=batch.targets, first_key=batch.first_key)
                for total, grad in zip(sums, gradients(loss, weights), strict=True):
                    total += weights[0].backend.to_numpy(grad) / max(1, batch.tokens)
    finally:
        for p in model.parameters():
            p.requires_grad = trained[id(p)]
    return {path: total / len(batches) for path, total in zip(paths, sums, strict=True)}


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Inside, the model is in eval mode, without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _place(model: Any, path: str) -> str:
    """The name in `model` of the base's module `path`, which may be inside a wrapper."""
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(modules_inside(model)[path])]
