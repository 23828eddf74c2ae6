"""Adapters added up: sum_i c_i B_i A_i, c_i = w_i s_i, as one adapter with s = 1. Three ways, under PEFT's names:

          A                            B                             what B A is
cat       [A_1; A_2; ...]              [c_1 B_1, c_2 B_2, ...]       the sum itself; ranks add up
svd       sqrt(sigma) V^T, r rows      U sqrt(sigma), r columns      of rank r the nearest to it (Eckart & Young 1936)
linear    sum sgn(c_i) sqrt|c_i| A_i   sum sqrt|c_i| B_i             the sum and cross terms, sqrt|c_i c_j| B_i A_j

To add up what models were trained to is task arithmetic (Ilharco et al. 2023). Nothing here is as large as dW: norms
and distances, too, are computed from factors.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, NonFiniteError
from . import factors
from .config import LoraConfig
from .factors import Part, cat, error_row, pad_rank, product_norm, rounding_error, svd
from .plan import ENDS, check_wrapped, describe_model, plan_adapter

Array = np.ndarray
Row = dict[str, Any]
COMBINATION_TYPES = ("cat", "svd", "linear")
MAX_RANK = 2**16


# ---- factors --------------------------------------------------------------------------------------------------------


# ---- one layer, and the rank of all ---------------------------------------------------------------------------------


def check_weights(adapters: Any, weights: Any, name: str) -> list[float]:
    """The weight of each of `adapters`: 1 if none is given. ConfigError unless they are a list, and so many numbers."""
    if not isinstance(adapters, Sequence) or isinstance(adapters, str | bytes) or not adapters:
        raise ConfigError(f"adapters: expected a list of one or more, got {adapters!r:.200}")
    given = [1.0] * len(adapters) if weights is None else weights
    given = list(given) if isinstance(given, Sequence | np.ndarray) else []
    if len(given) != len(adapters) or not all(map(_is_finite, given)):
        wanted = f"expected {len(adapters)} finite numbers, one for each adapter"
        raise ConfigError(f"{name}: {wanted}, got {weights!r:.300}")
    return [float(w) for w in given]


def _is_finite(weight: Any) -> bool:
    try:
        return isinstance(weight, numbers.Real) and math.isfinite(weight)
    except OverflowError:  # an integer that no float holds
        return False


def choose_rank(ranks: Mapping[str, Sequence[int]], way: str, r: int | None = None) -> int:
    """The rank that every layer gets, by the ranks of the parts of each: with svd it is r, or else the largest of them.

    ConfigError for a way that there is not, a rank that is none, and parts that `linear` cannot add.
    """
    if way not in COMBINATION_TYPES:
        raise ConfigError(
            f"adapters are combined by {', '.join(COMBINATION_TYPES)}; there is no {way!r:.60}"
        )
    if r is not None and (way != "svd" or type(r) is not int or not 1 <= r <= MAX_RANK):
        raise ConfigError(
            f"a rank is for svd, which takes one from 1 to {MAX_RANK}; {way} got {r!r:.60}"
        )
    for path, own in ranks.items():
        if way == "linear" and len(set(own)) > 1:
            found = ", ".join(map(str, own))
            raise ConfigError(
                f"{path}: linear adds factors of one rank, and these have {found}: use cat or svd"
            )
    return r or max(1, *(sum(own) if way == "cat" else max(own) for own in ranks.values()))


def combine_layer(
    path: str, parts: Sequence[Part], way: str, r: int, dtype: Any = np.float32
) -> tuple[Array, Array, Row]:
    """A (r, I), B (O, r) of the layer `path` in `dtype`, with s = 1, and a row: how far they are from the sum.

    |dW| is the sum's norm, and error that of the difference, with the rounding to `dtype` in it. NonFiniteError names
    the layer.
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
        A, B = (
            svd(parts, r)
            if way == "svd"
            else pad_rank(*(total if way == "cat" else factors.linear(parts)), r)
        )
        A, B = A.astype(dtype), B.astype(dtype)
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise NonFiniteError(
                f"{path}: the sum of its adapters is too large for {np.dtype(dtype)}"
            )
    missed = product_norm(np.concatenate([A, total[0]]), np.concatenate([B, -total[1]], axis=1))
    ranks = " + ".join(str(len(p.A)) for p in parts)
    return A, B, {"layer": path, "r": f"{ranks} -> {r}", **error_row(whole, missed)}


# ---- in a model -----------------------------------------------------------------------------------------------------


def add_weighted_adapter(
    self: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> list[Row]:
    """Add the adapter `adapter_name`, which is the sum of `adapters` times `weights`; inactive until `set_adapter`.

    Every layer that one of them has gets one rank, and s = 1; svd_rank None is the largest rank of them. Returns a row
    a layer: the sum's |dW|, and how far from it the new one is. (peft keeps use_rslora, by which its s is sqrt(r).)

    ConfigError, before anything changes, for what is no sum of factors: DoRA, AdaLoRA, HydraLoRA, biases, copied
    modules, tokens, and an embedding that a tied head follows; and for ranks and names as `rank_of`. NonFiniteError.
    """
    weights = check_weights(adapters, weights, "weights")
    names = list(adapters)
    self._known(names)
    for name in names:
        _require_plain(name, self._plans[name])
    layers = {
        path: [
            (n, wrapper.held[n], w)
            for n, w in zip(names, weights, strict=True)
            if n in wrapper.held
        ]
        for path, wrapper in self._wrappers().items()
    }
    layers = {path: held for path, held in layers.items() if held}
    r = choose_rank(
        {path: [a.r for _, a, _ in held] for path, held in layers.items()},
        combination_type,
        svd_rank,
    )
    first: LoraConfig = self.peft_config[names[0]]
    fields: dict[str, Any] = {
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    fields |= {
        "target_modules": sorted(map(_name, layers)),
        "exclude_modules": None,
        "ensure_weight_tying": False,
    }
    config = dataclasses.replace(first, **fields, layers_to_transform=None, layers_pattern=None)
    self._check_name(adapter_name, config)
    plan = plan_adapter(describe_model(self.model), config)
    check_wrapped(self.model, plan)
    made = {}
    for path, held in layers.items():
        parts = [a.part()._replace(c=w * a.scaling) for _, a, w in held]
        made[path] = combine_layer(path, parts, combination_type, r, held[0][1].lora_A.dtype)
    self._inject(adapter_name, plan, seed=0)
    for path, wrapper in self._wrappers().items():
        if path in made:
            own = wrapper.held[adapter_name]
            for p, array in zip((own.lora_A, own.lora_B), made[path], strict=False):
                p.data = p.backend.from_numpy(array)
    return [row for _, _, row in made.values()]


def _require_plain(name: str, plan: Any) -> None:
    config, more = plan.config, None
    if type(config) is not LoraConfig or config.use_dora:
        more = "is DoRA's" if config.use_dora else f"is of {config.peft_type}"
    elif config.bias != "none" or plan.saved or plan.tokens:
        more = "trains biases" if config.bias != "none" else "replaces modules or tokens"
    elif plan.follows:
        more = "adapts an embedding and the head that is tied to it"
    if more:
        raise ConfigError(
            f"adapter {name!r} {more}: only LoRA's own factors can be added up in a model"
        )


def _name(path: str) -> str:
    """How target_modules say it: in full; but an embedding and a head by the names by which PEFT knows them."""
    last = path.rpartition(".")[2]
    return last if last in ENDS else path
