"""What several tasks in one batch promise, and HydraLoRA's mixture of experts.

Measured on the same layers as plain LoRA. Their adapters are here the tasks, or one expert each:
several tasks in one batch, or several equal experts, must give what one adapter gives by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..autograd import Tensor, gradients
from ..backend import Array
from ..lora import HydraAdapter, HydraConfig, LoraLinear, MultiTask, get_multitask_model
from ..lora.factors import pad_rank
from ..lora.multitask import BASE
from ..nn import Parameter
from .case import Case
from .layers import OneLayer
from .measuring import (
    Measured,
    Property,
    compare,
    count_differences,
    count_nonzeros,
    expect_zero,
    is_lora,
    make_registrar,
    tensors_of,
    worst,
)

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, is_lora)

ABSENT = "absent"  # a task without rows in any batch

# ---- several tasks in one batch ------------------------------------------------------------------


def make_multitask(case: Case) -> MultiTask:
    """A model of one layer, in which each adapter of the case belongs to its own task."""
    layer = case.layer()
    configs = {**case.configs, ABSENT: case.configs[case.first]}
    model = get_multitask_model(OneLayer(layer.base_layer), configs, seed=case.seed)
    for name, adapter in layer.adapters.items():
        task = model.model.proj.adapters[name]
        task.lora_A.data = adapter.lora_A.data
        task.lora_B.data = adapter.lora_B.data
    return model.eval()  # type: ignore[no-any-return]


def mix_rows(case: Case) -> tuple[Array, list[str], Array]:
    """(x, tasks, order): every row of the case's x once per task and once for the base, shuffled.

    Row i has number order[i] if they are sorted by task.
    """
    names = [*case.configs, BASE]
    batch = len(case.x)
    order = case.rng.permutation(len(names) * batch)
    x = np.concatenate([case.x] * len(names))[order]
    tasks = np.repeat(names, batch)[order].tolist()
    return x, tasks, order


@holds(
    "mixed batch",
    "yᵢ = xᵢ Wᵀ + b + sₜ (xᵢ Aₜᵀ) Bₜᵀ,  t the task of row i",
    "Sheng et al. 2023, section 4.1",
)
def measure_mixed_batch(case: Case) -> Measured:
    """What every task gives by itself, to 2 gamma_n S: both sides err as `forward`.

    So rows may come in any order, and adapters may have any ranks: one that is filled up with
    zeros, which round nothing, has the same n.
    """
    wide = np.dtype(np.longdouble)
    model = make_multitask(case)
    x, tasks, order = mix_rows(case)
    shuffle = case.rng.permutation(len(x))
    y = model(Tensor(x), tasks=tasks).data
    shuffled_tasks = [tasks[i] for i in shuffle]
    y_shuffled = model(Tensor(x[shuffle]), tasks=shuffled_tasks).data
    padded = []
    alone = []
    bounds = []
    for name in case.configs:
        layer = case.layer(name)
        y_alone = case.run(layer)
        S = abs(case.formula(layer)).y()
        bound = 2 * case.gamma(case.roundings(layer), S)
        y_padded = case.run(pad_adapter(layer, name))
        padded.append((y_padded - y_alone.astype(wide), bound))
        alone.append(y_alone)
        bounds.append(bound)
    base = case.layer()
    base.active = []
    S = abs(case.formula(base)).y()
    alone.append(case.run(base.base_layer))
    bounds.append(2 * case.gamma(base.in_features + 1, S))
    expected = np.concatenate(alone).reshape(y.shape)[order]
    bound = np.concatenate(bounds).reshape(y.shape)[order]
    in_order = y.astype(wide) - expected, bound
    shuffled = y_shuffled.astype(wide) - y[shuffle], bound[shuffle]
    return worst(in_order, shuffled, *padded)


def pad_adapter(layer: LoraLinear, name: str) -> LoraLinear:
    """The layer with three ranks more in one adapter, all zero."""
    adapter = layer.adapters[name]
    A, B = pad_rank(adapter.lora_A.data, adapter.lora_B.data, adapter.r + 3)
    adapter.lora_A = Parameter(A)
    adapter.lora_B = Parameter(B)
    return layer


@holds("absent task", "no row of t  ⇒  dAₜ = 0, dBₜ = 0", "the loss does not depend on them")
def measure_absent_task(case: Case) -> Measured:
    """Exact, with and without prepared weights; and each task with rows has gradients."""
    model = make_multitask(case)
    x, tasks, _ = mix_rows(case)
    adapters = model.model.proj.adapters
    owners = []
    leaves = []
    for name, adapter in adapters.items():
        tensors = tensors_of(adapter)
        leaves += tensors
        owners += [name] * len(tensors)
    wrong = 0
    for prepared in (False, True):
        if prepared:
            for name in adapters:
                with model.task(name):
                    model.prepare_step()
        y = model(Tensor(x, requires_grad=True), tasks=tasks)
        slopes = gradients(y, leaves, np.ones_like(y.data))
        for owner, slope in zip(owners, slopes, strict=True):
            if owner != ABSENT:
                wrong += slope is None
            elif slope is not None:
                wrong += count_nonzeros(slope)
    return expect_zero(wrong)


# ---- HydraLoRA -----------------------------------------------------------------------------------


def make_hydra(case: Case, experts: int) -> LoraLinear:
    """A layer whose one adapter has k experts, all the B of the case's first, and any router."""
    config = case.configs[case.first]
    names = {field.name for field in dataclasses.fields(config)} - {"extra"}
    fields: dict[str, Any] = {name: getattr(config, name) for name in names}
    layer = case.layer(case.first)
    adapter = layer.adapters[case.first]
    hydra = HydraAdapter(layer.base_layer, "proj", HydraConfig(**fields, experts=experts), case.rng)
    hydra.lora_A.data = adapter.lora_A.data
    hydra.lora_B.data = np.tile(adapter.lora_B.data, (1, experts))
    hydra.lora_route.data = (2 * hydra.lora_route.data).astype(case.dtype)
    layer.adapters = {case.first: hydra.eval()}
    return layer


@holds("router", "Σ wᵢ(x) = 1,  w = softmax(R x)", "Tian et al. 2024, eq. (6)")
def measure_router(case: Case) -> Measured:
    """gamma_k for k experts: k - 1 roundings in the sum that divides all, one in each division."""
    k = int(case.rng.integers(1, 7))
    adapter: Any = make_hydra(case, k).adapters[case.first]
    w = adapter.weights(Tensor(case.x)).data.astype(np.longdouble)
    return compare(w.sum(axis=-1) - 1, case.gamma(k, np.ones(())))


@holds("equal experts", "B₁ = … = Bₖ  ⇒  s Σ wᵢ Bᵢ A x = s B A x", "Tian et al. 2024, eq. (6)")
def measure_equal_experts(case: Case) -> Measured:
    """One expert is LoRA bit for bit: w = 1.

    With k, the sum over k r products in place of r, each with one rounding more for w, and k in
    what the w add up to, make n + (k - 1) r + k + 1 on that side, and n on LoRA's.
    """
    layer = case.layer(case.first)
    k = int(case.rng.integers(2, 5))
    n = case.roundings(layer)
    r = layer.adapters[case.first].r
    S = abs(case.formula(layer)).y()
    bound = case.gamma(n, S) + case.gamma(n + (k - 1) * r + k + 1, S)
    y = case.run(layer)
    y_1 = case.run(make_hydra(case, 1))
    y_k = case.run(make_hydra(case, k)).astype(np.longdouble)
    return worst((y_k - y, bound), (count_differences(y_1, y), 0))
