"""Adapters added up: sum_i c_i B_i A_i, c_i = w_i s_i, as one adapter with s = 1, in three ways.

          A                            B                          B A, the ways having PEFT's names
cat       [A_1; A_2; ...]              [c_1 B_1, c_2 B_2, ...]    the sum itself; ranks add up
svd       sqrt(sigma) V^T, r rows      U sqrt(sigma), r columns   the nearest to it of rank r
linear    sum sgn(c_i) sqrt|c_i| A_i   sum sqrt|c_i| B_i          the sum, and cross terms
                                                                  sqrt|c_i c_j| B_i A_j

"Nearest" is by Eckart & Young 1936. Adding up what models were trained to is task arithmetic
(Ilharco et al. 2023). No array here is as large as dW: norms and distances, too, are computed from
factors.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, NonFiniteError, is_integer
from . import factors
from .config import LoraConfig
from .factors import Part, cat, error_row, pad_rank, product_norm, rounding_error, svd
from .names import ENDS
from .plan import Plan, check_wrapped, describe_model, plan_adapter

Array = np.ndarray
Row = dict[str, Any]
COMBINATION_TYPES = ("cat", "svd", "linear")
MAX_RANK = 2**16
_is_rank = is_integer(1, MAX_RANK)


# ---- one layer, and the rank of all --------------------------------------------------------------


def check_weights(adapters: Any, weights: Any, name: str) -> list[float]:
    """The weight of each of `adapters`: 1 if `weights` is None.

    ConfigError unless `adapters` is a list and `weights`, called `name`, has a number for each.
    """
    if not isinstance(adapters, Sequence) or isinstance(adapters, str | bytes) or not adapters:
        raise ConfigError(f"adapters: expected a list of one or more, got {adapters!r:.200}")
    given = [1.0] * len(adapters) if weights is None else weights
    given = list(given) if isinstance(given, Sequence | np.ndarray) else []
    if len(given) != len(adapters) or not all(map(_is_finite, given)):
        wanted = f"expected {len(adapters)} finite numbers, one for each adapter"
        raise ConfigError(f"{name}: {wanted}, got {weights!r:.300}")
    return [float(weight) for weight in given]


def _is_finite(weight: Any) -> bool:
    try:
        return isinstance(weight, numbers.Real) and math.isfinite(weight)
    except OverflowError:  # an integer beyond the floats
        return False


def choose_rank(ranks: Mapping[str, Sequence[int]], way: str, r: int | None = None) -> int:
    """The rank of every layer of a combined adapter, from the ranks of the parts of each layer.

    With svd it is r, or else the largest of them. ConfigError for an unknown way, an invalid rank,
    and parts that `linear` cannot add.
    """
    if way not in COMBINATION_TYPES:
        raise ConfigError(
            f"no combination type {way!r:.60}; choose from {', '.join(COMBINATION_TYPES)}"
        )
    if r is not None and not (way == "svd" and _is_rank(r)):
        raise ConfigError(
            f"a rank is for svd, which takes one from 1 to {MAX_RANK}; {way} got {r!r:.60}"
        )
    largest = 1
    for path, of_parts in ranks.items():
        if way == "linear" and len(set(of_parts)) > 1:
            raise ConfigError(
                f"{path}: linear adds factors of one rank, and these have "
                f"{', '.join(map(str, of_parts))}: use cat or svd"
            )
        largest = max(largest, sum(of_parts) if way == "cat" else max(of_parts))
    return r or largest


def combine_layer(
    path: str, parts: Sequence[Part], way: str, r: int, dtype: Any = np.float32
) -> tuple[Array, Array, Row]:
    """A (r, I), B (O, r) of the layer `path`, with s = 1, and how far B A is from the sum.

    A and B are of `dtype`. In the row, |dW| is the sum's norm, and error that of the difference,
    with the rounding to `dtype` in it. NonFiniteError names the layer.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = cat(parts)
        if not all(np.isfinite(array).all() for array in total):
            raise NonFiniteError(f"{path}: the sum of its adapters is not finite")
        whole = product_norm(*total)
        if not math.isfinite(whole):
            raise NonFiniteError(f"{path}: the sum of its adapters is too large for float64")
        if whole < rounding_error(*total):  # the parts cancel
            whole = 0.0
        if way == "svd":
            A, B = svd(parts, r)
        elif way == "cat":
            A, B = pad_rank(*total, r)
        else:
            A, B = pad_rank(*factors.linear(parts), r)
        A = A.astype(dtype)
        B = B.astype(dtype)
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise NonFiniteError(
                f"{path}: the sum of its adapters is too large for {np.dtype(dtype)}"
            )
    difference = np.concatenate([A, total[0]]), np.concatenate([B, -total[1]], axis=1)
    ranks = " + ".join(str(len(part.A)) for part in parts)
    row = {"layer": path, "r": f"{ranks} -> {r}", **error_row(whole, product_norm(*difference))}
    return A, B, row


# ---- in a model ----------------------------------------------------------------------------------


def add_weighted_adapter(
    self: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> list[Row]:
    """Add the adapter `adapter_name`, the sum of `adapters` times `weights`; inactive at first.

    Every layer that one of them has gets one rank, and s = 1; svd_rank None is the largest rank of
    them. Returns one row per layer: the sum's |dW|, and how far from it the new one is. (peft keeps
    use_rslora, which makes its s sqrt(r).)

    ConfigError, before anything changes, for adapters that are not plain factors: DoRA, AdaLoRA,
    HydraLoRA, biases, copied modules, tokens, and an embedding that a tied head follows; and for
    ranks and names as `choose_rank` and `add_adapter`. NonFiniteError.
    """
    weights = check_weights(adapters, weights, "weights")
    names = list(adapters)
    self._require_known(names)
    for name in names:
        _require_plain(name, self._plans[name])
    sources = {}
    for path, wrapper in self._wrappers().items():
        pairs = zip(names, weights, strict=True)
        entries = wrapper.entries
        of_layer = [(entries[name], weight) for name, weight in pairs if name in entries]
        if of_layer:
            sources[path] = of_layer
    ranks = {path: [adapter.r for adapter, _ in of_layer] for path, of_layer in sources.items()}
    r = choose_rank(ranks, combination_type, svd_rank)
    config = dataclasses.replace(
        self.peft_config[names[0]],
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=sorted(map(_target_name, sources)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        ensure_weight_tying=False,
    )
    self._check_name(adapter_name, config)
    plan = plan_adapter(describe_model(self.model), config)
    check_wrapped(self.model, plan)
    made = {}
    for path, of_layer in sources.items():
        parts = [
            adapter.part()._replace(c=weight * adapter.scaling) for adapter, weight in of_layer
        ]
        dtype = of_layer[0][0].lora_A.dtype
        made[path] = combine_layer(path, parts, combination_type, r, dtype)
    self._inject(adapter_name, plan, seed=0)
    wrappers = self._wrappers()
    for path, (A, B, _) in made.items():
        adapter = wrappers[path].entries[adapter_name]
        adapter.lora_A.data = adapter.lora_A.backend.from_numpy(A)
        adapter.lora_B.data = adapter.lora_B.backend.from_numpy(B)
    return [row for _, _, row in made.values()]


def _require_plain(name: str, plan: Plan) -> None:
    config = plan.config
    if config.use_dora:
        why = "is DoRA's"
    elif type(config) is not LoraConfig:
        why = f"is of {config.peft_type}"
    elif config.bias != "none":
        why = "trains biases"
    elif plan.saved or plan.tokens:
        why = "replaces modules or tokens"
    elif plan.follows:
        why = "adapts an embedding and the head that is tied to it"
    else:
        return
    raise ConfigError(f"adapter {name!r} {why}: only LoRA's own factors can be added up in a model")


def _target_name(path: str) -> str:
    """The path's name in target_modules: itself, but PEFT knows an embedding or a head by ENDS."""
    last = path.rpartition(".")[2]
    return last if last in ENDS else path
