"""What several tasks in one batch promise, and HydraLoRA's mixture of experts.

Measured on the same layers as plain LoRA, whose adapters are here the tasks, or an expert each: what several tasks in
one batch, or several experts that are equal, must give is what one adapter gives by itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..autograd import Tensor, gradients
from ..backend import Array
from ..lora import HydraAdapter, HydraConfig, LoraLinear, MultiTask, get_multitask_model
from ..lora.multitask import BASE
from ..nn import Parameter
from .case import Case
from .layers import OneLayer
from .measuring import Measured, Property, differing, listing, lora, run, worst

PROPERTIES: list[Property] = []
holds = listing(PROPERTIES, lora)

ABSENT = "absent"  # a task of which no batch has a row

# -- several tasks in one batch


def _tasks(case: Case) -> MultiTask:
    """A model of one layer, in which each adapter of the case is a task's own."""
    first, layer = next(iter(case.configs.values())), case.layer()
    made = get_multitask_model(
        OneLayer(layer.base_layer), {**case.configs, ABSENT: first}, seed=case.seed
    )
    for name, adapter in layer.adapters.items():
        own = made.model.proj.adapters[name]
        own.lora_A.data, own.lora_B.data = adapter.lora_A.data, adapter.lora_B.data
    return made.eval()  # type: ignore[no-any-return]


def _mixed(case: Case) -> tuple[Array, list[str], Array]:
    """(x, tasks, order): every row of the case's x once for every task, and for the base alone, in a random order.

    Row i was number order[i] while they stood sorted by task.
    """
    names = [*case.configs, BASE]
    order = case.rng.permutation(len(names) * len(case.x))
    tasks = np.repeat(names, len(case.x))[order].tolist()
    return np.concatenate([case.x] * len(names))[order], tasks, order


@holds(
    "mixed batch",
    "yᵢ = xᵢ Wᵀ + b + sₜ (xᵢ Aₜᵀ) Bₜᵀ,  t the task of row i",
    "Sheng et al. 2023, section 4.1",
)
def _mixed_batch(case: Case) -> Measured:
    """What every task gives by itself, to 2 gamma_n S: both sides err as `forward`. So rows may stand in any order, and
    adapters may have any ranks: one that is filled up with zeros, which round nothing, has the same n."""
    made, (x, tasks, order) = _tasks(case), _mixed(case)
    again, wide = case.rng.permutation(len(x)), np.dtype(np.longdouble)
    y = made(Tensor(x), tasks=tasks).data
    moved = made(Tensor(x[again]), tasks=[tasks[i] for i in again]).data
    alone, bounds, pairs = [], [], []
    for name in case.configs:
        layer = case.layer(name)
        alone.append(run(layer, case.x))
        bounds.append(2 * case.gamma(case.roundings(layer), abs(case.formula(layer)).y()))
        pairs.append((run(_padded(layer, name), case.x) - alone[-1].astype(wide), bounds[-1]))
    base = case.layer()
    base.active = []
    alone.append(run(base.base_layer, case.x))
    bounds.append(2 * case.gamma(base.in_features + 1, abs(case.formula(base)).y()))
    sequences = (len(x), -1, alone[0].shape[1])
    expected, bound = (np.concatenate(side).reshape(sequences)[order] for side in (alone, bounds))
    return worst(
        (y.astype(wide) - expected, bound), (moved.astype(wide) - y[again], bound[again]), *pairs
    )


def _padded(layer: LoraLinear, name: str) -> LoraLinear:
    """The layer with three ranks more in one adapter, all zero."""
    adapter = layer.adapters[name]
    A, B = adapter.lora_A.data, adapter.lora_B.data
    adapter.lora_A = Parameter(np.concatenate([A, np.zeros((3, A.shape[1]), A.dtype)]))
    adapter.lora_B = Parameter(np.concatenate([B, np.zeros((len(B), 3), B.dtype)], axis=1))
    return layer


@holds("absent task", "no row of t  ⇒  dAₜ = 0, dBₜ = 0", "the loss does not depend on them")
def _absent(case: Case) -> Measured:
    """Exact, on their own and by the weights of a step; and each task that is there has a gradient."""
    made, (x, tasks, _), wrong = _tasks(case), _mixed(case), 0
    adapters = made.model.proj.adapters
    parameters = {
        name: [getattr(adapter, t) for t in adapter.TENSORS] for name, adapter in adapters.items()
    }
    leaves = [p for own in parameters.values() for p in own]
    for prepared in (False, True):
        for name in parameters if prepared else ():
            with made.task(name):
                made.prepare_step()
        y = made(Tensor(x, requires_grad=True), tasks=tasks)
        found = dict(zip(leaves, gradients(y, leaves, np.ones_like(y.data)), strict=True))
        for name, own in parameters.items():
            mine = [g for g in (found[p] for p in own) if g is not None]
            wrong += (
                sum(int(np.count_nonzero(g)) for g in mine)
                if name == ABSENT
                else len(mine) != len(own)
            )
    return worst((wrong, 0))


# -- HydraLoRA


def _hydra(case: Case, experts: int) -> tuple[str, LoraLinear]:
    """A layer whose one adapter has all its experts equal to the B of the case's first, and any router."""
    name, config = next(iter(case.configs.items()))
    layer, fields = case.layer(name), {f.name for f in dataclasses.fields(config)} - {"extra"}
    adapter, own = (
        layer.adapters[name],
        HydraConfig(**{f: getattr(config, f) for f in fields}, experts=experts),
    )
    made = HydraAdapter(layer.base_layer, "proj", own, case.rng)
    made.lora_A.data, made.lora_B.data = (
        adapter.lora_A.data,
        np.tile(adapter.lora_B.data, (1, experts)),
    )
    made.lora_route.data = (2 * made.lora_route.data).astype(case.dtype)
    layer.adapters = {name: made.eval()}
    return name, layer


@holds("router", "Σ wᵢ(x) = 1,  w = softmax(R x)", "Tian et al. 2024, eq. (6)")
def _router(case: Case) -> Measured:
    """gamma_k for k experts: k - 1 roundings in the sum that all are divided by, and one in each division."""
    k = int(case.rng.integers(1, 7))
    name, layer = _hydra(case, k)
    w = layer.adapters[name].weights(Tensor(case.x)).data.astype(np.longdouble)  # type: ignore[attr-defined]
    return worst((w.sum(axis=-1) - 1, case.gamma(k, np.ones(()))))


@holds("equal experts", "B₁ = … = Bₖ  ⇒  s Σ wᵢ Bᵢ A x = s B A x", "Tian et al. 2024, eq. (6)")
def _equal_experts(case: Case) -> Measured:
    """One expert is LoRA bit for bit: w = 1. Of k, the sum over k r products in place of r, each with one rounding more
    for w, and k in what the w add up to, make n + (k - 1) r + k + 1 on that side, and n on LoRA's."""
    name, _ = _hydra(case, 1)
    layer, k = case.layer(name), int(case.rng.integers(2, 5))
    n, r, S = case.roundings(layer), layer.adapters[name].r, abs(case.formula(layer)).y()
    y = run(layer, case.x)
    bound = case.gamma(n, S) + case.gamma(n + (k - 1) * r + k + 1, S)
    several = run(_hydra(case, k)[1], case.x).astype(np.longdouble)
    return worst((several - y, bound), (differing(run(_hydra(case, 1)[1], case.x), y), 0))
