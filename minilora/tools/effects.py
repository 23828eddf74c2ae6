"""What each part of an adapter does to the loss of a text: parts are switched, and nothing trained.

    out      L(adapter without the part) - L(adapter): above 0 if the part helps
    alone    L(base) - L(base with this part only): above 0 if it helps by itself
    lambda   L(W + lambda dW), for lambda from 0 to 1

Parts are layers, and of chosen layers the terms sigma_i u_i v_i^T of dW. The effects of parts do
not add up to that of the whole: they act on each other.

Below the layer that is switched nothing changes, so what enters each block is computed once, with
the whole adapter and without it, and a part runs only what follows. The numbers are the same bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Tensor, no_grad
from ..data.batches import Batch, Text
from ..errors import ConfigError
from ..lora import AdaLoraConfig, LoraConfig, LoraLinear
from ..lora.layer import Wrapper, use_adapters
from ..lora.lora import LoraAdapter
from ..models.decoder import Positions
from ..progress import progress_bar
from ..threads import Workers
from .overlap import Directions, find_directions
from .windows import (
    PER_THREAD,
    Estimate,
    estimate,
    evaluating,
    require_finite,
    require_switchable,
    token_counts,
    windows_of,
    wrappers_of,
)

Array = np.ndarray
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLAIN = (LoraConfig, AdaLoraConfig)  # methods whose layers compute W x + s B A x
Context = contextlib.AbstractContextManager[Any]


class Prefix(NamedTuple):
    """One window and what enters each of its L blocks: L + 1 states, the last leaves the blocks."""

    window: Batch
    positions: Positions
    states: list[Tensor]


class Change(NamedTuple):
    """Something to switch for a measurement.

    switch   makes a context in which the model is changed
    stage    the first block in which something changes; -1: before the blocks
    alone    does it start from the base, and not from the whole adapter?
    """

    switch: Callable[[], Context]
    stage: int = -1
    alone: bool = False


class Direction(NamedTuple):
    """The term number `number`, from 1, of dW of the layer `path`, and its effect."""

    path: str
    number: int
    value: float
    out: Estimate


class Effects(NamedTuple):
    """What the parts of an adapter do, in nats per token, with standard errors over windows.

    base, adapter    the losses of both
    gain             L(base) - L(adapter)
    out, alone       by layer; "" has the sum of all layers
    scaled           (lambda, the loss, L(lambda) - L(base)); [] if the adapter has no lambda
    directions       of the chosen layers
    windows, tokens  how many were measured
    """

    base: Estimate
    adapter: Estimate
    gain: Estimate
    out: dict[str, Estimate]
    alone: dict[str, Estimate]
    scaled: list[tuple[float, Estimate, Estimate]]
    directions: list[Direction]
    windows: int
    tokens: int


def measure_effects(
    model: Any,
    text: Text,
    context: int,
    limit: int | None = None,
    threads: int | None = None,
    directions: Sequence[str] = (),
) -> Effects:
    """The effects of the layers of a PeftModel's only adapter on a text.

    limit        the most windows of `context` tokens to measure, spread over the text
    directions   names of layers, or the ends of names, whose terms of dW are switched one by one

    A module that is saved whole counts as a layer. The model comes back as it was.

    ConfigError for a model with several adapters, trained biases, or a name in `directions` that is
    no layer's or has no such terms; NonFiniteError.
    """
    [name] = model.active_adapters
    config = model.peft_config[name]
    require_switchable(model)
    wrappers = wrappers_of(model)
    chosen = _choose_layers(directions, wrappers, name, config)
    terms = {path: find_directions(wrappers[path].entries[name].part()) for path in chosen}
    changes = _list_changes(model, wrappers, name, terms)
    if _has_lambda(wrappers, name, config):
        for factor in LAMBDAS:
            changes["lambda", factor] = Change(functools.partial(_scaled, wrappers, name, factor))
    windows = windows_of(text, context, limit)
    losses = _measure_changes(model, windows, changes, wrappers, threads)
    return _summarise(losses, token_counts(windows), wrappers, terms)


# ---- what is switched ----------------------------------------------------------------------------


def _choose_layers(
    names: Sequence[str], wrappers: Mapping[str, Wrapper], adapter: str, config: LoraConfig
) -> list[str]:
    """The layers that `names` mean. ConfigError."""
    chosen = []
    for name in dict.fromkeys(names):
        paths = [path for path in wrappers if path == name or path.endswith(f".{name}")]
        if not paths:
            known = ", ".join(wrappers)
            raise ConfigError(
                f"directions: {name!r:.100} is not the name, or the end of one, of a layer of the "
                f"adapter: choose among {known:.200}"
            )
        for path in paths:
            is_linear = isinstance(wrappers[path], LoraLinear)
            entry = wrappers[path].entries.get(adapter)
            has_terms = is_linear and hasattr(getattr(entry, "lora_B", None), "requires_grad")
            if not has_terms or not _adds_product(config):
                raise ConfigError(
                    f"directions: what the adapter does to {path} is not s B A of a linear layer, "
                    "which has directions: choose layers of LoRA or AdaLoRA"
                )
        chosen += paths
    return list(dict.fromkeys(chosen))


def _adds_product(config: LoraConfig) -> bool:
    """Is the output of each layer W x + s B A x?"""
    return type(config) in PLAIN and not config.use_dora


def _has_lambda(wrappers: Mapping[str, Wrapper], adapter: str, config: LoraConfig) -> bool:
    """Does s scale everything that the adapter does?"""
    entries = [wrapper.entries.get(adapter) for wrapper in wrappers.values()]
    return _adds_product(config) and all(hasattr(entry, "scaling") for entry in entries)


def _list_changes(
    model: Any,
    wrappers: Mapping[str, Wrapper],
    adapter: str,
    terms: Mapping[str, Directions],
) -> dict[Any, Change]:
    """Each layer out and alone, and each term out, by ("out", path), ("term", path, i), ..."""
    changes: dict[Any, Change] = {}
    for path, wrapper in wrappers.items():
        stage = _stage_of(model.get_base_model(), path)
        others = [other for other in wrappers.values() if other is not wrapper]
        changes["out", path] = Change(functools.partial(use_adapters, [wrapper], None), stage)
        changes["alone", path] = Change(functools.partial(use_adapters, others, None), stage, True)
        for i in range(len(terms[path].values) if path in terms else 0):
            u = terms[path].outputs[:, i]
            entry = wrapper.entries[adapter]
            changes["term", path, i] = Change(functools.partial(_without, entry, u), stage)
    return changes


def _stage_of(base: Any, path: str) -> int:
    """The first block whose computation the module takes part in."""
    _, blocks, norm = base.decoder.part_names
    first = f"{base.decoder_name}.{blocks}."
    if path.startswith(first):
        return int(path.removeprefix(first).partition(".")[0])
    is_behind = path == "lm_head" or path == f"{base.decoder_name}.{norm}"
    return len(getattr(base.decoder, blocks)) if is_behind else -1


@contextlib.contextmanager
def _without(adapter: LoraAdapter, u: Array) -> Iterator[None]:
    """A context in which B has no part in the direction u (O,): dW is (1 - u u^T) dW."""
    parameter = adapter.lora_B
    before = parameter.data.copy()  # an assignment copies into the parameter's own array
    B = parameter.numpy().astype(np.float64)
    changed = (B - np.outer(u, u @ B)).astype(parameter.dtype)
    parameter.data = parameter.backend.from_numpy(changed)
    try:
        yield
    finally:
        parameter.data = before


@contextlib.contextmanager
def _scaled(wrappers: Mapping[str, Wrapper], adapter: str, factor: float) -> Iterator[None]:
    """A context in which dW of every layer is `factor` times what it is."""
    entries = [wrapper.entries[adapter] for wrapper in wrappers.values()]
    before = [entry.scaling for entry in entries]
    try:
        for entry, scaling in zip(entries, before, strict=True):
            entry.scaling = factor * scaling
        yield
    finally:
        for entry, scaling in zip(entries, before, strict=True):
            entry.scaling = scaling


# ---- measuring -----------------------------------------------------------------------------------


def _measure_changes(
    model: Any,
    windows: Sequence[Batch],
    changes: Mapping[Any, Change],
    wrappers: Mapping[str, Wrapper],
    threads: int | None,
) -> dict[Any, Array]:
    """{what: (W,) the summed loss of each window}: "adapter", "base" and each change."""
    base = model.get_base_model()
    losses: dict[Any, list[float]] = {key: [] for key in ("adapter", "base", *changes)}

    def whole() -> Context:
        return contextlib.nullcontext()

    def none() -> Context:
        return use_adapters(wrappers.values(), None)

    with evaluating(model, threads) as workers:
        size = PER_THREAD * workers.threads
        chunks = [windows[start : start + size] for start in range(0, len(windows), size)]
        for chunk in progress_bar(chunks, desc="inspect", unit=" parts", leave=False):
            prefixes = {}
            for key, switch in (("adapter", whole), ("base", none)):
                with switch():
                    prefixes[key] = list(workers.map(lambda w: run_prefix(base, w), chunk))
                    losses[key] += _resume(base, prefixes[key], count_blocks(base), workers)
            for key, change in changes.items():
                start = prefixes["base" if change.alone else "adapter"]
                with change.switch():
                    losses[key] += _resume(base, start, change.stage, workers)
    return {key: require_finite(np.array(values, np.float64)) for key, values in losses.items()}


def count_blocks(base: Any) -> int:
    """The number of blocks."""
    return len(getattr(base.decoder, base.decoder.part_names[1]))


def run_prefix(base: Any, window: Batch) -> Prefix:
    """What enters each block of the model as it is now."""
    with no_grad():
        x, positions = base.decoder.begin(window.ids, None, window.first_key)
        states = [x]
        for block in getattr(base.decoder, base.decoder.part_names[1]):
            states.append(block(states[-1], positions))
    return Prefix(window, positions, states)


def run_from(base: Any, prefix: Prefix, stage: int) -> float:
    """The summed loss of a window, computed from the block `stage` on; from the ids for -1."""
    _, blocks, norm = base.decoder.part_names
    window = prefix.window
    with no_grad():
        if stage < 0:
            return float(base(window.ids, targets=window.targets, first_key=window.first_key).data)
        x = prefix.states[stage]
        for block in getattr(base.decoder, blocks)[stage:]:
            x = block(x, prefix.positions)
        hidden = getattr(base.decoder, norm)(x)
        return float(base.sum_losses(hidden, window.targets).data)


def _resume(base: Any, prefixes: Iterable[Prefix], stage: int, workers: Workers) -> list[float]:
    return list(workers.map(lambda prefix: run_from(base, prefix, stage), prefixes))


def _summarise(
    losses: Mapping[Any, Array],
    tokens: Array,
    wrappers: Mapping[str, Wrapper],
    terms: Mapping[str, Directions],
) -> Effects:
    """Means per token, and the standard errors of the differences."""
    base, adapter = losses["base"], losses["adapter"]
    out = {path: losses["out", path] - adapter for path in wrappers}
    alone = {path: base - losses["alone", path] for path in wrappers}
    for parts in (out, alone):
        parts[""] = np.sum(list(parts.values()), axis=0)
    scaled = []
    for factor in LAMBDAS:
        if ("lambda", factor) in losses:
            loss = losses["lambda", factor]
            scaled.append((factor, estimate(loss, tokens), estimate(loss - base, tokens)))
    directions = []
    for path, layer in terms.items():
        for i, value in enumerate(layer.values.tolist()):
            effect = estimate(losses["term", path, i] - adapter, tokens)
            directions.append(Direction(path, i + 1, value, effect))
    return Effects(
        estimate(base, tokens),
        estimate(adapter, tokens),
        estimate(base - adapter, tokens),
        {path: estimate(sums, tokens) for path, sums in out.items()},
        {path: estimate(sums, tokens) for path, sums in alone.items()},
        scaled,
        directions,
        len(tokens),
        int(tokens.sum()),
    )
