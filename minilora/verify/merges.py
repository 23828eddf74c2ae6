"""Merging between the steps of training, and updates that are trained apart.

Letters are case.py's.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ..data.batches import Batch
from ..lora import PeftModel, get_peft_model
from ..lora.optimizers import create_loraplus_optimizer, freeze_first_factors
from ..optim import SGD, Optimizer
from .case import unit_roundoff
from .measuring import Measured, Property, count_differences, expect_zero, worst
from .studies import (
    NAME,
    MakeOptimizer,
    Pairs,
    Study,
    adapted_layers,
    expect_same,
    factors_of,
    gamma_float64,
    make_registrars,
    put_on_grid,
    set_factors,
    train,
    trained,
)

PROPERTIES: list[Property] = []
holds, fails = make_registrars(PROPERTIES)
STEPS = 3

# ---- merging between steps -----------------------------------------------------------------------


def make_sgd(model: PeftModel) -> Optimizer:
    return SGD(trained(model), lr=0.5, momentum=0.5)


def make_loraplus(model: PeftModel) -> Optimizer:
    """AdamW, with another rate for B."""
    optimizer: Optimizer = create_loraplus_optimizer(model, lr=2.0**-8)
    return optimizer


@holds(
    "beside a merged adapter",
    "adapter 2 trains over W + dW₁ as beside a frozen adapter 1: same bits",
    "Hu et al. 2021, section 4.1: the gradient reads W + dW₁ alone",
)
def measure_beside_merged(study: Study) -> Measured:
    """Exact, with any optimiser: W + dW₁ is on a grid and has no rounding on either side."""
    wrong = 0
    for make in (make_sgd, make_loraplus):
        runs = []
        for is_merged in (False, True):
            model = study.model(init_lora_weights=False, use_rslora=False)
            put_on_grid(model)
            model.add_adapter("second", study.config(), seed=1)
            model.set_adapter([NAME, "second"])
            model.set_requires_grad(NAME, False)
            if is_merged:
                model.merge_adapter([NAME])
            losses = train(model, make(model), study.batches(STEPS))
            runs.append([np.array(losses), *(p.data for p in trained(model))])
        for a, b in zip(*runs, strict=True):
            wrong += count_differences(a, b)
    return expect_zero(wrong)


def restart(study: Study, make: MakeOptimizer, is_frozen: bool) -> list[tuple[Any, Any, Any]]:
    """Each dW's change by a step without, and with a merge before it, and the bound of their error.

    The state is that of a run, with W, A and B put on a grid, where merging has no rounding. After
    the merge B is 0 and the optimiser keeps its moments. The step Δ of B is then B itself, and
    without the merge B + Δ is rounded: u |B + Δ|.
    """

    def prepare(model: PeftModel) -> Optimizer:
        if is_frozen:
            freeze_first_factors(model)
        return make(model)

    [*earlier, batch] = study.batches(STEPS + 1)
    model = study.model(use_rslora=False)
    put_on_grid(model)
    optimizer = prepare(model)
    train(model, optimizer, earlier)
    put_on_grid(model)
    layers = adapted_layers(model)
    starts = {path: factors_of(layer) for path, layer in layers.items()}

    merged = copy.deepcopy(model).merge_and_unload()
    again = get_peft_model(merged, study.config(use_rslora=False))
    for path, layer in adapted_layers(again).items():
        A, B, _ = starts[path]
        set_factors(layer, A, 0 * B)
    carried = prepare(again)
    carried.load_state_dict(*optimizer.state_dict())
    train(model, optimizer, [batch])
    train(again, carried, [batch])

    changes = []
    for path, layer in adapted_layers(again).items():
        A, B, s = starts[path]
        after_A, after_B, _ = factors_of(layers[path])
        new_A, new_B, _ = factors_of(layer)
        S = s * (abs(after_B) @ abs(after_A) + abs(B) @ abs(A) + abs(new_B) @ abs(new_A))
        rounded = s * unit_roundoff(study.dtype) * (abs(after_B) @ abs(after_A))
        change = s * (after_B @ after_A - B @ A)
        changes.append((change, s * (new_B @ new_A), rounded + gamma_float64(study.r + 3, S)))
    return changes


RESTART = "Lialin et al. 2024 (ReLoRA), with the optimiser's state left as it is"


@holds("restart, A frozen", "merge, B = 0, go on: the step of dW stays", RESTART)
def measure_restart(study: Study) -> Measured:
    """From a common state, with momentum and with Adam's moments, without decay."""
    pairs: Pairs = []
    for make in (make_sgd, make_loraplus):
        for one, other, bound in restart(study, make, is_frozen=True):
            pairs.append((one - other, bound))
    return worst(*pairs)


@fails("restart, A trains", "merge, B = 0, go on: the step of dW stays", RESTART)
def measure_restart_with_A(study: Study) -> Measured:
    """Without B, dA is 0: the merge takes A's part out of the step."""
    changes = restart(study.in_float64(), make_sgd, is_frozen=False)
    measured = [expect_same(other, one) for one, other, _ in changes]
    return min(measured, key=lambda m: m.badness)


# ---- two tasks -----------------------------------------------------------------------------------

ADDITIVE = "B = 0: dW is linear in G"


def add_tasks(study: Study, count: int) -> list[tuple[Any, Any, Any]]:
    """Each layer's dW(L₁) + dW(L₂), its dW(L₁ + L₂), and the bound of their error after one step.

    SGD takes `count` steps. η is a power of two, so that in one step only the sum of the gradients
    is rounded: u |B|. Both texts have equally many targets, and the loss of both is the mean of
    theirs: η doubles.
    """
    eta = 0.25
    one = study.batches(count, text=1)
    two = study.batches(count, text=2)
    both = [join_batches(*batches) for batches in zip(one, two, strict=True)]
    models = []
    for batches, rate in ((one, eta), (two, eta), (both, 2 * eta)):
        model = study.model()
        train(model, SGD(trained(model), lr=rate), batches)
        models.append(adapted_layers(model))
    *apart, together = models
    sums = []
    for path, layer in together.items():
        A, B, s = factors_of(layer)
        parts = [layers[path].delta_weight(NAME) for layers in apart]
        sizes = [abs(factors_of(layers[path])[1]) @ abs(A) for layers in apart]
        size = abs(B) @ abs(A)
        rounded = s * unit_roundoff(study.dtype) * size
        bound = rounded + gamma_float64(study.r + 3, s * (sum(sizes) + size))
        sums.append((sum(parts), layer.delta_weight(NAME), bound))
    return sums


def join_batches(one: Batch, two: Batch) -> Batch:
    ids = np.concatenate([one.ids, two.ids])
    return Batch(ids, np.concatenate([one.targets, two.targets]))


@holds("two tasks' first steps", "dW(L₁) + dW(L₂) = dW(L₁ + L₂), SGD, one A₀", ADDITIVE)
def measure_two_tasks(study: Study) -> Measured:
    return worst(*((parts - whole, bound) for parts, whole, bound in add_tasks(study, 1)))


@fails("two tasks' later steps", "the same after several steps", ADDITIVE)
def measure_two_tasks_later(study: Study) -> Measured:
    """A moves, and each task's G changes with its own dW alone."""
    measured = [expect_same(parts, whole) for parts, whole, _ in add_tasks(study.in_float64(), 3)]
    return min(measured, key=lambda m: m.badness)
