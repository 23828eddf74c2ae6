"""The starts of a model's layers: A, B and the base of each, from its weight and perhaps from data.

    begin_model            computes the starts of a new adapter, before the first layer changes
    restore_starts         reads them from a checkpoint, for a run that is continued
    read_starts            reads or computes them for an adapter's file
    quantize_with_starts   quantizes the model, and the bases that starts changed
    put_start              sets the start of one layer, which has its adapter by then

A layer whose base changes also stores the base as it was: disabling the adapter, or unloading it,
restores that bit for bit. Everything is computed in float64 on the host. A and B are first rounded
to the dtype of training. R = W - s B A is formed from these rounded factors, and rounded once to
the dtype in which W is stored, so R + s B A is W to that one rounding.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError
from ...formats.dtypes import CODES
from ...nn import LinearBase, frozen_linear, replace_module
from ...quant.codes import encode
from ...quant.half import Half, HalfLinear, HalfWeight
from ...quant.linear import QuantizedLinear, quantize
from ..config import LoraConfig
from ..factors import Part
from ..files.adapter import AdapterFile
from ..merging import merge_weight
from ..names import factor_keys
from ..targets.base import modules_inside
from ..targets.plan import Plan, plan_adapter
from .recomputed import coded_base, loftq_fields
from .statistics import measure_covariances, measure_gradients, read_batches
from .values import RHO, Given, Start, begin, check_rank, find_start, redistribute

Array = np.ndarray
# Fields that exclude layers.
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
BLOCK = 64  # weights per absmax of LoftQ's codes, whose absmax stay in float32


class LayerStart(NamedTuple):
    """The start of one layer.

    A, B    (r, I) and (O, r), in the layer's dtype
    base    the new base layer; None if the base stays
    """

    A: Array
    B: Array
    base: LinearBase | None = None


def begin_model(
    model: Any,
    plan: Plan,
    seed: int = 0,
    data: Iterable[Any] | None = None,
    kind: str | None = None,
) -> tuple[Plan, dict[str, LayerStart]]:
    """(the plan, with other ranks after EVA; the start of each linear layer by path).

    data   batches: `Batch`es, or ids (B, T + 1), each of which predicts the next one
    kind   LoftQ's codes: "nf4", "fp4" or "int8"

    ConfigError if a start's data or codes are missing, for a quantized base, and for a rank that a
    layer cannot have.
    """
    name = plan.config.init_lora_weights
    start = find_start(name)
    assert start is not None
    assert isinstance(name, str)
    modules = modules_inside(model)
    paths = [path for path, layer in plan.targets.items() if layer.kind == "linear"]
    _check_startable(name, start, plan, paths, modules)
    batches = read_batches(name, start.needs, data)
    covariances: dict[str, Array] = {}
    weight_gradients: dict[str, Array] = {}
    if start.needs == "covariance":
        covariances = measure_covariances(model, paths, batches)
        plan = _share_ranks(plan, covariances)
        paths = [path for path in paths if path in plan.targets]
    config = plan.config  # a copy of the user's
    for path in paths:
        check_rank(name, path, plan.targets[path].shape, config.rank(path))
    if start.needs == "gradient":
        weight_gradients = measure_gradients(model, paths, batches)
    if start.needs == "decode" and kind is None:
        raise ConfigError(
            "init_lora_weights='loftq' is for codes: choose quantize nf4, fp4 or int8"
        )
    layer_starts = {}
    rounds = {}
    for path in paths:
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        given = Given(rng, covariances.get(path), weight_gradients.get(path), _decoder(kind))
        layer_starts[path], rounds[path] = _begin_layer(modules[path], path, config, given)
    if kind is not None and name == "loftq":
        config.extra = {**config.extra, "loftq_config": loftq_fields(kind, rounds)}
    return plan, layer_starts


def _check_startable(
    name: str, start: Start, plan: Plan, paths: Sequence[str], modules: Mapping[str, Any]
) -> None:
    """ConfigError if the linear layers `paths` of this plan cannot have the start `name`."""
    if not paths:
        raise ConfigError(f"init_lora_weights={name!r} is for linear layers: target one")
    if (plan.follows and start.changes_base) or (plan.base.tied and plan.base.head in paths):
        raise ConfigError(
            f"init_lora_weights={name!r} would change a head's weight that is the embedding's, "
            "too: leave lm_head out of the targets, or untie the two"
        )
    for path in paths:
        if start.changes_base and isinstance(modules[path], QuantizedLinear):
            raise ConfigError(
                f"init_lora_weights={name!r}: {path} is in codes already, and its weight is gone: "
                "begin over the base as it was before, and name the codes with quantize"
            )
    if name in ("olora", "loftq") and plan.base.model_type == "gpt2":
        raise ConfigError(
            f"init_lora_weights={name!r} on GPT-2's layers: peft takes their weight for its "
            "transpose, so that no file could say this start: choose pissa"
        )


def _begin_layer(
    layer: LinearBase, path: str, config: LoraConfig, given: Given
) -> tuple[LayerStart, int]:
    """(the start of one layer, the iteration of LoftQ that gave it)."""
    name: Any = config.init_lora_weights
    start = find_start(name)
    assert start is not None
    s = config.scaling(path)
    values = begin(name, path, wide_weight(layer), config.rank(path), s, given)
    A, B = (factor.astype(layer.dtype) for factor in (values.A, values.B))
    base: LinearBase | None = None
    if values.Q is not None:
        base = replace_weight(layer, values.Q)
    elif start.changes_base:
        base = subtract(layer, A, B, s)
    return LayerStart(A, B, base), values.rounds


def wide_weight(layer: LinearBase) -> Array:
    """W (O, I) of a layer, in float64 on the host."""
    return layer.backend.to_numpy(layer.dense_weight()).astype(np.float64)


def replace_weight(layer: LinearBase, Q: Array) -> LinearBase:
    """A frozen layer like `layer` over Q (O, I), in its dtype and on its device."""
    return frozen_linear(layer.backend.from_numpy(Q.astype(layer.dtype)), layer)


def starts_from_factors(model: Any, initial: Mapping[str, Part]) -> dict[str, LayerStart]:
    """The starts with these A0, B0 and s, by path."""
    layer_starts = {}
    modules = modules_inside(model)
    for path, part in initial.items():
        layer = modules[path]
        A, B = (factor.astype(layer.dtype) for factor in (part.A, part.B))
        layer_starts[path] = LayerStart(A, B, subtract(layer, A, B, part.c))
    return layer_starts


def restore_starts(
    model: Any, plan: Plan, folder: str | Path
) -> tuple[Plan, dict[str, LayerStart]]:
    """The bits that `begin_model` returned for the adapter in `folder`, saved `as_trained`."""
    with AdapterFile(folder, check=False, over_base=True, to_train=True) as file:
        if plan.config.init_lora_weights == "eva":
            names = ("r", "target_modules", "rank_pattern", "alpha_pattern", *NARROWING)
            shared = {name: getattr(file.config, name) for name in names}
            plan = plan_adapter(plan.base, dataclasses.replace(plan.config, **shared))
        return plan, starts_from_factors(model, file.initial)


def read_starts(model: Any, plan: Plan, file: AdapterFile) -> dict[str, LayerStart]:
    """The starts, by path, over which a file's adapter was trained; none for plain LoRA."""
    if not file.start:
        return {}
    if file.is_low_rank:
        return starts_from_factors(model, file.initial)
    layer_starts = {}
    modules = modules_inside(model)
    for path, described in plan.targets.items():
        if described.kind == "linear":
            layer = modules[path]
            Q = coded_base(file.config, path, wide_weight(layer), file.where)
            A, B = (file.file.read(key, layer.dtype) for key in factor_keys(path))
            layer_starts[path] = LayerStart(A, B, replace_weight(layer, Q))
    return layer_starts


def quantize_with_starts(
    model: Any, layer_starts: Mapping[str, LayerStart], kind: str, name: Any
) -> dict[str, LayerStart]:
    """The starts with quantized bases; the model's linear layers are quantized, too.

    With name = "loftq" the scales are not quantized: Q was computed from codes like that.
    """
    bases = {path: start.base for path, start in layer_starts.items() if start.base is not None}
    unchanged = {path: modules_inside(model)[path] for path in bases}
    double_quant = name != "loftq"
    for path, base in bases.items():
        replace_module(model, path, base)
    try:
        quantize(model, kind, BLOCK, double_quant)
    except BaseException:
        for path, layer in unchanged.items():
            replace_module(model, path, layer)
        raise
    quantized = dict(layer_starts)
    for path, layer in unchanged.items():
        new = modules_inside(model)[path]
        quantized[path] = layer_starts[path]._replace(base=new)
        if isinstance(new, QuantizedLinear):
            layer = QuantizedLinear.from_linear(layer, kind, BLOCK, double_quant)
        replace_module(model, path, layer)
    return quantized


def subtract(layer: LinearBase, A: Array, B: Array, s: float) -> LinearBase:
    """A frozen layer over R = W - s B A (O, I), in float64, rounded once to W's stored dtype."""
    part = Part(A.astype(np.float64), B.astype(np.float64), -s)
    weight = layer.weight
    backend = layer.backend
    if isinstance(weight, HalfWeight):
        half = weight.quantized
        R = merge_weight(backend.to_numpy(half.codes), [part], CODES[half.kind]).weight
        return HalfLinear(HalfWeight(Half(half.kind, backend.from_numpy(R)), weight.dtype), layer)
    W = backend.to_numpy(layer.dense_weight())
    R = merge_weight(W, [part], CODES[str(W.dtype)]).weight
    return frozen_linear(backend.from_numpy(R), layer)


def put_start(layer: Any, adapter_name: str, start: LayerStart) -> None:
    """Set A and B of a layer's adapter, the layer's base, and DoRA's m, which follows from both."""
    adapter = layer.adapters[adapter_name]
    from_numpy = adapter.lora_A.backend.from_numpy
    adapter.lora_A.data = from_numpy(start.A)
    adapter.lora_B.data = from_numpy(start.B)
    if start.base is not None:
        layer.change_base(start.base)
        adapter.initial = start.A, start.B
    if "lora_magnitude_vector" in adapter.TENSORS:
        adapter.lora_magnitude_vector.data = adapter.norms(layer.base_layer.dense_weight())


def _decoder(kind: str | None) -> Callable[[Array], Array] | None:
    """The function from W (O, I) to what its codes of this kind decode to; None without codes."""
    if kind is None:
        return None
    return lambda W: encode(W.astype(np.float32), kind, BLOCK).decode(np.float64)


def _share_ranks(plan: Plan, covariances: Mapping[str, Array]) -> Plan:
    """The plan with EVA's ranks; each layer's scaling stays."""
    config = plan.config
    ratios = {}
    for path, C in covariances.items():
        values = np.linalg.eigvalsh(C)[::-1]
        ratios[path] = values / max(float(np.trace(C)), np.finfo(np.float64).tiny)
    ranks = {path: config.rank(path) for path in covariances}
    fields = config.extra.get("eva_config") or {}
    shared = redistribute(ratios, ranks, float(fields.get("rho", RHO)))
    alphas = {}
    for path, r in shared.items():
        s = config.scaling(path)
        alphas[path] = s * (r**0.5 if config.use_rslora else r)
    others = [path for path in plan.targets if path not in covariances]
    ranks = {path: r for path, r in shared.items() if r}
    changed = dataclasses.replace(
        config,
        rank_pattern=ranks,
        alpha_pattern={path: alphas[path] for path in ranks},
        target_modules=sorted([*ranks, *others]),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    return plan_adapter(plan.base, changed)
