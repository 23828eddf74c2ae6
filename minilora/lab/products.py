"""Which layers a run adapts, and what a step costs in operations and seconds.

Letters: N positions of a step, I inputs, O outputs, T positions of a sequence, C channels.
"""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..lora import LoraConfig
from ..lora.maps import MapConfig
from ..lora.targets.base import Layer, describe_model
from ..lora.targets.plan import wrappers
from ..threads import one_blas_thread

REPEATS = 3  # of a product; the fastest counts
ALIKE = 0.8  # of difflib's ratio: names above it may have been mixed up

# ---- layers --------------------------------------------------------------------------------------


class Adapted(NamedTuple):
    """A layer with an adapter.

    r         its rank; None where the configuration has no rank of dW
    numbers   how many of its numbers train
    """

    name: str
    inputs: int
    outputs: int
    r: int | None
    numbers: int


class LeftOut(NamedTuple):
    """Layers of one name that get no adapter.

    near   why they may have been meant; "" if nothing says so
    """

    name: str
    number: int
    near: str


def adapted_layers(model: Any, config: LoraConfig | None) -> list[Adapted]:
    """The layers with adapters, in the model's order; none for a model that trains whole."""
    base = model.get_base_model()
    layers = describe_model(base).layers
    adapted = []
    for path, wrapper in wrappers(base):
        numbers = sum(p.size for p in wrapper.parameters() if p.requires_grad)
        layer = layers[path]
        sizes = (layer.in_features, layer.out_features) if layer.shape else (0, 0)
        adapted.append(Adapted(path, *sizes, _rank(config, path, layer), numbers))
    return adapted


def table_of_layers(layers: Iterable[Adapted]) -> list[dict[str, str]]:
    """A row for all layers of one name, size and rank, with the numbers that train in them."""
    counts = Counter(layer._replace(name=layer.name.rpartition(".")[2]) for layer in layers)
    rows = []
    for layer, count in counts.items():
        rows.append(
            {
                "layers": f"{count} x {layer.name}",
                "I -> O": f"{layer.inputs} -> {layer.outputs}",
                "r": "-" if layer.r is None else str(layer.r),
                "trained in each": f"{layer.numbers:,}",
                "in all": f"{count * layer.numbers:,}",
            }
        )
    return rows


def _rank(config: LoraConfig | None, path: str, layer: Layer) -> int | None:
    if config is None or isinstance(config, MapConfig) or not layer.shape:
        return None
    return int(config.rank(path))


def layers_left_out(model: Any, adapted: Iterable[Adapted], targets: Any) -> list[LeftOut]:
    """Linear layers without an adapter, by the last part of their names; near misses first.

    targets   target_modules of the configuration
    """
    with_adapter = {layer.name for layer in adapted}
    paths = describe_model(model.get_base_model()).layers.items()
    counts: dict[str, int] = {}
    for path, layer in paths:
        if layer.kind == "linear" and path not in with_adapter:
            name = path.rpartition(".")[2]
            counts[name] = counts.get(name, 0) + 1
    used = {path.rpartition(".")[2] for path in with_adapter}
    names = [] if isinstance(targets, str) else [t.rpartition(".")[2] for t in targets or ()]
    result = [LeftOut(name, count, _reason(name, used, names)) for name, count in counts.items()]
    return sorted(result, key=lambda left: left.near == "")


def _reason(name: str, used: set[str], targets: list[str]) -> str:
    if name in used:
        return "other layers of this name have an adapter"
    nearest = difflib.get_close_matches(name, targets, 1, ALIKE)
    return f"the name is close to the target {nearest[0]}" if nearest else ""


# ---- operations ----------------------------------------------------------------------------------


def count_operations(model: Any, positions: int, context: int, recompute: bool) -> dict[str, int]:
    """Floating-point operations of a step over N = `positions`, by kind.

    A product with a weight takes 2 N I O forward, as many for dX, and for dW only where the weight
    trains. An adapter's numbers count as products of their own: 2 N forward and 4 N backward for
    each. Attention takes 2 N T C forward, its causal half, and 2.5 times as many backward.

    recompute   with gradient checkpointing the blocks run forward twice
    """
    base = model.get_base_model()
    description = describe_model(base)
    again = 1 if recompute else 0
    weights = 0
    for path, layer in description.layers.items():
        if layer.kind == "linear":
            passes = 2 + _trains(base, path) + (again if path != description.head else 0)
            weights += passes * 2 * positions * layer.in_features * layer.out_features
    numbers = sum(layer.numbers for layer in adapted_layers(model, None))
    config = base.config
    attention = 2 * positions * context * config.hidden_size * config.num_hidden_layers
    return {
        "products with weights": weights,
        "adapters": (6 + 2 * again) * positions * numbers,
        "attention": attention * (7 + 2 * again) // 2,
    }


def _trains(base: Any, path: str) -> bool:
    """Whether the weight of a layer itself trains."""
    module = dict(base.named_modules())[path]
    return not hasattr(module, "adapters") and bool(module.weight.requires_grad)


# ---- seconds -------------------------------------------------------------------------------------


def measure_products(model: Any, positions: int) -> tuple[int, float]:
    """(operations, seconds) of products with all weights of a model over some positions, forward.

    One product of each shape runs on this machine, by one thread.
    """
    counts: dict[tuple[int, int], int] = {}
    for layer in describe_model(model.get_base_model()).layers.values():
        if layer.kind == "linear":
            shape = layer.in_features, layer.out_features
            counts[shape] = counts.get(shape, 0) + 1
    operations = 0
    seconds = 0.0
    for (inputs, outputs), count in counts.items():
        operations += count * 2 * positions * inputs * outputs
        seconds += count * _time_product(positions, inputs, outputs)
    return operations, seconds


def _time_product(positions: int, inputs: int, outputs: int) -> float:
    x = np.ones((positions, inputs), np.float32)
    weight = np.ones((outputs, inputs), np.float32)
    times = []
    with one_blas_thread():
        for _ in range(REPEATS):
            begun = time.perf_counter()
            x @ weight.T
            times.append(time.perf_counter() - begun)
    return min(times)
