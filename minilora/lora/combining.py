"""Adapters added up: sum_i c_i B_i A_i, c_i = w_i s_i, as one adapter with s = 1.

          A                            B                          B A
cat       [A_1; A_2; ...]              [c_1 B_1, c_2 B_2, ...]    the sum; the ranks add up
svd       sqrt(sigma) V^T, r rows      U sqrt(sigma), r columns   the nearest to the sum of rank r
linear    sum sgn(c_i) sqrt|c_i| A_i   sum sqrt|c_i| B_i          the sum, and for i != j the terms
                                                                  sgn(c_j) sqrt|c_i c_j| B_i A_j
ties, dare_linear, dare_ties, magnitude_prune                     the nearest of rank r to a sum of
                                                                  pruned dW: see pruning.py

The names are PEFT's. "Nearest" is in the Frobenius norm (Eckart & Young 1936). Sums of updates of
models are task arithmetic (Ilharco et al. 2023). The first three form no array as large as dW:
norms and distances, too, are computed from factors.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import (
    ConfigError,
    NonFiniteError,
    Rule,
    check_fields,
    is_integer,
    is_number,
    optional,
)
from . import factors
from .config import LoraConfig
from .factors import (
    Part,
    Term,
    cat,
    clamp_factors,
    error_row,
    factors_from_svd,
    pad_rank,
    product_norm,
    rounding_error,
    svd,
)
from .names import ENDS
from .pruning import PRUNED, Pruning, check_pruning, pruned_sum
from .ranks import MAX_RANK
from .singular import distance, leading_triplets
from .targets.base import describe_model
from .targets.plan import Plan, check_wrapped, plan_adapter

Array = np.ndarray
Row = dict[str, Any]
FACTORWISE = ("cat", "svd", "linear")  # computed from factors, without dW
COMBINATION_TYPES = (*FACTORWISE, *PRUNED)
OF_ANY_RANK = ("svd", *PRUNED)
_is_rank = is_integer(1, MAX_RANK)
_CLAMP = Rule("svd_clamp", optional(is_number(above=0, below=1 + 1e-15)), "a number in (0, 1]")


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


def check_way(way: Any, r: int | None, count: int, **options: Any) -> Pruning | None:
    """The pruning by which `way` adds up `count` adapters; None for a way of FACTORWISE.

    options   of `check_pruning`

    ConfigError for an unknown way, an invalid rank, or a rank or an option that `way` does not use.
    """
    if way not in COMBINATION_TYPES:
        raise ConfigError(
            f"no combination type {way!r:.60}; choose from {', '.join(COMBINATION_TYPES)}"
        )
    if r is not None and not (way in OF_ANY_RANK and _is_rank(r)):
        raise ConfigError(
            f"a rank is for svd and for pruned sums, which take one from 1 to {MAX_RANK}; "
            f"{way} got {r!r:.60}"
        )
    pruning = check_pruning(way, **options)
    if pruning is not None and count < 2:
        raise ConfigError(
            f"{way} adds up two or more adapters, got {count}: "
            f"use {', '.join(FACTORWISE)} for a single one"
        )
    return pruning


def common_rank(ranks: Mapping[str, Sequence[int]], way: str, r: int | None = None) -> int:
    """The one rank that all layers of a combined adapter get.

    ranks   by path, the ranks of the layer's parts
    r       the result if it is given; otherwise it is the largest rank, or with cat the largest sum

    ConfigError for parts of different ranks, which `linear` cannot add.
    """
    largest = 1
    for path, part_ranks in ranks.items():
        if way == "linear" and len(set(part_ranks)) > 1:
            raise ConfigError(
                f"{path}: linear adds factors of one rank, and these have "
                f"{', '.join(map(str, part_ranks))}: use cat or svd"
            )
        largest = max(largest, sum(part_ranks) if way == "cat" else max(part_ranks))
    return r or largest


def combine_terms(
    path: str,
    terms: Sequence[Term],
    way: str,
    r: int,
    pruning: Pruning | None = None,
    clamp: float | None = None,
    dtype: Any = np.float32,
) -> tuple[Array, Array, Row]:
    """A (r, I), B (O, r) in `dtype` for the sum of one layer's terms, and a row of the report.

    way       one of COMBINATION_TYPES: see `combine_layer` for those of FACTORWISE
    pruning   that of a way of PRUNED, from `check_way`
    clamp     the quantile of `factors.clamp_factors`; None clips nothing
    """
    if pruning is None:
        parts = [term.weighted() for term in terms]
        return combine_layer(path, parts, way, r, dtype, clamp)
    total, report = sum_layer(path, terms, pruning)
    A, B, _ = factors_from_svd(*leading_triplets(total, max(1, r)), r)
    A, B = _finish(path, A, B, clamp, dtype)
    missed = distance(total, B.astype(np.float64), A.astype(np.float64))
    row = {**_label(path, [term.part for term in terms], r), **report}
    return A, B, row | error_row(report["|dW|"], missed)


def sum_layer(path: str, terms: Sequence[Term], pruning: Pruning) -> tuple[Array, Row]:
    """The pruned sum (O, I) of a layer, and its row: see `pruned_sum`.

    NonFiniteError if a factor, or the sum's norm, is not finite.
    """
    if not all(np.isfinite(M).all() for term in terms for M in term.weighted()[:2]):
        raise NonFiniteError(f"{path}: the sum of its adapters is not finite")
    total, report = pruned_sum(terms, pruning, path)
    if not math.isfinite(report["|dW|"]):
        raise NonFiniteError(f"{path}: the sum of its adapters is too large for float64")
    if report["|dW|"] < rounding_error(*cat([term.weighted() for term in terms])):
        report["|dW|"] = 0.0  # the updates cancel
    return total, report


def combine_layer(
    path: str,
    parts: Sequence[Part],
    way: str,
    r: int,
    dtype: Any = np.float32,
    clamp: float | None = None,
) -> tuple[Array, Array, Row]:
    """A (r, I), B (O, r) in `dtype` with s = 1, and a row with the distance of B A from the sum.

    way   one of FACTORWISE

    In the row, |dW| is the norm of the sum, and error that of B A minus the sum, with the rounding
    to `dtype`. NonFiniteError names the layer.
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
        A, B = _finish(path, A, B, clamp, dtype)
    difference = np.concatenate([A, total[0]]), np.concatenate([B, -total[1]], axis=1)
    row = {**_label(path, parts, r), **error_row(whole, product_norm(*difference))}
    return A, B, row


def _finish(path: str, A: Array, B: Array, clamp: float | None, dtype: Any) -> tuple[Array, Array]:
    """A and B, clipped with `clamp` and rounded to `dtype`. NonFiniteError names the layer."""
    if clamp is not None:
        A, B = clamp_factors(A, B, clamp)
    with np.errstate(over="ignore"):
        A = A.astype(dtype)
        B = B.astype(dtype)
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise NonFiniteError(f"{path}: the sum of its adapters is too large for {np.dtype(dtype)}")
    return A, B


def _label(path: str, parts: Sequence[Part], r: int) -> Row:
    ranks = " + ".join(str(len(part.A)) for part in parts)
    return {"layer": path, "r": f"{ranks} -> {r}"}


# ---- in a model ----------------------------------------------------------------------------------


def add_weighted_adapter(
    self: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> list[Row]:
    """Add the adapter `adapter_name`, the sum of `adapters` times `weights`; inactive at first.

    All layers of the new adapter have one rank, and s = 1; without svd_rank it is the largest rank
    of `adapters`. Returns one row per layer: |dW| of the sum, and the distance of the new dW from
    it. (PEFT copies use_rslora, by which its s becomes sqrt(r).)

    combination_type   one of COMBINATION_TYPES. Those of PRUNED prune dW, as PEFT does under the
                       same names with _svd, which are accepted, too
    svd_clamp          for svd and PRUNED: see `factors.clamp_factors`
    density, majority_sign_method   for PRUNED: see pruning.py
    seed               for dare's random masks
    svd_full_matrices, svd_driver   PEFT's; they do not change the result

    ConfigError, before anything changes, for adapters that are not plain factors: DoRA, AdaLoRA,
    HydraLoRA, biases, copied modules, tokens, and an embedding that a tied head follows; and for
    ranks and names as `check_way` and `add_adapter`. NonFiniteError.
    """
    way = combination_type
    if way in [f"{pruned}_svd" for pruned in PRUNED]:
        way = way.removesuffix("_svd")
    weights = check_weights(adapters, weights, "weights")
    names = list(adapters)
    options = {"density": density, "majority_sign_method": majority_sign_method, "seed": seed}
    pruning = check_way(way, svd_rank, len(names), **options)
    _check_clamp(svd_clamp, way)
    self._require_known(names)
    for name in names:
        _require_plain(name, self._plans[name])
    sources = _collect_terms(self, names, weights)
    ranks = {path: [len(term.part.A) for term in terms] for path, terms in sources.items()}
    r = common_rank(ranks, way, svd_rank)
    config = _sum_config(self.peft_config[names[0]], r, sources)
    self._check_name(adapter_name, config)
    plan = plan_adapter(describe_model(self.model), config)
    check_wrapped(self.model, plan)
    combined = {}
    for path, terms in sources.items():
        dtype = self._wrappers()[path].entries[names[terms[0].number]].lora_A.dtype
        combined[path] = combine_terms(path, terms, way, r, pruning, svd_clamp, dtype)
    self._inject(adapter_name, plan, seed=0)
    wrappers = self._wrappers()
    for path, (A, B, _) in combined.items():
        adapter = wrappers[path].entries[adapter_name]
        adapter.lora_A.data = adapter.lora_A.backend.from_numpy(A)
        adapter.lora_B.data = adapter.lora_B.backend.from_numpy(B)
    return [row for _, _, row in combined.values()]


def _check_clamp(clamp: float | None, way: str) -> None:
    """ConfigError unless `clamp` is a quantile, and `way` clips factors by it."""
    check_fields({"svd_clamp": clamp}, [_CLAMP])
    if clamp is not None and way not in OF_ANY_RANK:
        raise ConfigError(f"svd_clamp is for {', '.join(OF_ANY_RANK)}, not for {way}: leave it out")


def _sum_config(config: LoraConfig, r: int, paths: Iterable[str]) -> LoraConfig:
    """The sum's configuration: the first adapter's, with s = 1 and rank r in `paths`."""
    return dataclasses.replace(
        config,
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=sorted(map(_target_name, paths)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        ensure_weight_tying=False,
    )


def _collect_terms(
    model: Any, names: Sequence[str], weights: Sequence[float]
) -> dict[str, list[Term]]:
    """The weighted updates of the named adapters, by the path of their layer."""
    sources = {}
    for path, wrapper in model._wrappers().items():
        terms = []
        for number, (name, weight) in enumerate(zip(names, weights, strict=True)):
            if name in wrapper.entries:
                terms.append(Term(wrapper.entries[name].part(), weight, number))
        if terms:
            sources[path] = terms
    return sources


def _require_plain(name: str, plan: Plan) -> None:
    """ConfigError unless the adapter is LoRA's factors alone."""
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
    """The name of a layer in target_modules: its path, or its last part for those in ENDS.

    PEFT recognises embeddings and heads by these names.
    """
    last = path.rpartition(".")[2]
    return last if last in ENDS else path
