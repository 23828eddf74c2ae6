"""What an adapter leaves as it was: where A does not see an old text, and how far a head may move.

Letters are case.py's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..autograd import Tensor, no_grad
from ..backend import Array
from ..data.batches import Batch
from ..lora import LoraLinear, PeftModel
from ..lora.optimizers import freeze_first_factors
from ..optim import SGD, AdamW
from .case import unit_roundoff
from .measuring import (
    Measured,
    Property,
    compare,
    count_differences,
    expect_zero,
    svd_error,
    worst,
)
from .studies import (
    NAME,
    LayerStep,
    Pairs,
    Study,
    adapted_layers,
    loss_gradients,
    make_registrars,
    take_step,
    train,
    trained,
)

PROPERTIES: list[Property] = []
holds, fails = make_registrars(PROPERTIES)
STEPS = 4
OLD = 8  # tokens that occur in an old text
INFLORA = "Liang & Li 2024 (InfLoRA)"

# ---- nothing is forgotten ------------------------------------------------------------------------


def read_old_text(study: Study) -> list[LayerStep]:
    """What each adapted layer of the base reads of an old text: one sequence, so N < I - r."""
    model = study.model()
    [old] = study.batches(1, text=1, sequences=1)
    return take_step(model, SGD(trained(model), lr=1.0), old)


def rows_unseen(X: Array, r: int) -> Array:
    """r orthonormal rows (r, I) that are orthogonal to all rows of X (N, I)."""
    _, _, Vt = np.linalg.svd(X.astype(np.float64))
    N, I = X.shape
    assert N + r <= I
    return np.asarray(Vt[N : N + r])


def train_on_new_text(study: Study, inputs: list[LayerStep], is_unseen: bool) -> PeftModel:
    """A model with B trained on another text, where A does not see the old inputs, or is random."""
    model = study.model()
    layers = adapted_layers(model)
    for step in inputs:
        A = layers[step.path].adapters[NAME].lora_A
        if is_unseen:
            A.data = rows_unseen(step.formula.X, len(A.data)).astype(A.dtype)
    freeze_first_factors(model)
    train(model, AdamW(trained(model), lr=2.0**-5), study.batches(STEPS, text=2))
    return model


def compare_old_outputs(study: Study, is_unseen: bool) -> Measured:
    """Layer by layer, what the adapter adds to the output for the base's inputs of the old text.

    A is rounded once, and its rows miss orthogonality by `svd_error`: |A x| ≤ u |A| |x| + that. I
    roundings in A x, r and two in s B (A x), and one in the sum are added.
    """
    inputs = read_old_text(study)
    layers = adapted_layers(train_on_new_text(study, inputs, is_unseen))
    pairs: Pairs = []
    for step in inputs:
        layer = layers[step.path]
        adapter = layer.adapters[NAME]
        X = step.formula.X  # (N, I)
        A = abs(adapter.lora_A.data.astype(X.dtype))
        B = abs(adapter.lora_B.data.astype(X.dtype))
        before = run(step.layer.base_layer, step.case.x)
        after = run(layer, step.case.x)
        largest = float(np.linalg.norm(X.astype(np.float64), 2))
        r, I = A.shape
        unseen = step.case.gamma(I + 1, abs(X) @ A.T) + svd_error(X.shape, largest)  # |A x|
        added = adapter.scaling * (unseen @ B.T) * (1 + (r + 3) * step.case.u)
        pairs.append((after - before, added + step.case.u * abs(after)))
        pairs.append((float(not B.any()), 0))  # an untrained B shows nothing
    return worst(*pairs)


def run(layer: Any, x: Array) -> Array:
    with no_grad():
        return layer(Tensor(x)).data.astype(np.float64)


def count_changed_logits(study: Study) -> int:
    """How many logits of an old text have other bits after training, where A x is exactly 0.

    The old text has the first OLD tokens only. The second half of their embeddings is 0, and also
    after RMSNorm. A of the first layer reads that half alone, and so adds 0, whatever B becomes.
    """
    model = study.model(target_modules=r"model\.layers\.0\.self_attn\.q_proj")
    [layer] = adapted_layers(model).values()
    half = layer.in_features // 2
    table = model.get_base_model().get_input_embeddings().weight
    table.data = np.where(is_part(table.shape, OLD, half), 0, table.data)
    A = layer.adapters[NAME].lora_A
    A.data = np.where(np.arange(2 * half) < half, 0, A.data)
    [old] = study.batches(1, text=1)
    old = Batch(old.ids % OLD, old.targets % OLD)
    before = run_model(model, old)
    freeze_first_factors(model)
    train(model, AdamW(trained(model), lr=2.0**-5), study.batches(STEPS, text=2))
    untrained = not layer.adapters[NAME].lora_B.data.any()
    return count_differences(run_model(model, old), before) + untrained


def is_part(shape: tuple[int, int], rows: int, start: int) -> Array:
    """True in the first rows of a matrix, from column `start` on."""
    i, j = np.indices(shape)
    part: Array = (i < rows) & (j >= start)
    return part


@holds("nothing forgotten", "A x = 0 for all inputs x of an old text: its outputs stay", INFLORA)
def measure_nothing_forgotten(study: Study) -> Measured:
    """A is frozen, and B is trained on another text by AdamW.

    Where A x is exactly 0 in a first layer, the logits of the whole model keep their bits.
    """
    m = compare_old_outputs(study, is_unseen=True)
    return max(m, expect_zero(count_changed_logits(study)), key=lambda m: m.badness)


@fails("forgotten with a random A", "the same for A as it is made", INFLORA)
def measure_random_A(study: Study) -> Measured:
    return compare_old_outputs(study, is_unseen=False)


# ---- the head alone ------------------------------------------------------------------------------


@holds(
    "forgetting of a head",
    "0 ≤ L(W + D) - L(W) - ⟨dL/dW, D⟩ ≤ mean osc(D h)² / 8",
    "log-sum-exp is convex; Hoeffding 1963, the lemma on bounded variables",
)
def measure_head(study: Study) -> Measured:
    """In float64. L is the mean loss of an old text, D = s B A of a head that learnt another one.

    osc is the largest minus the smallest entry of D h, over the vocabulary. Shown is the distance
    from the middle of the interval. A logit errs by C + r + 5 roundings of |h| |w|, where |h| ≤ √C
    after the norm, each loss by twice that and by V + 9 roundings of logits and their logarithm,
    and osc² / 8 by at most 1 + osc² / 8 times the logits' error.
    """
    study = study.in_float64()
    [old] = study.batches(1, text=1)
    base = study.base()
    head = base.lm_head.weight
    head.requires_grad = True
    loss, [slope] = loss_gradients(base, old, [head])
    logits = run_model(base, old)

    model = study.model(target_modules=["lm_head"])
    train(model, AdamW(trained(model), lr=2.0**-4), study.batches(STEPS, text=2))
    layer: LoraLinear = adapted_layers(model)["lm_head"]
    D = layer.delta_weight(NAME)
    later, _ = loss_gradients(model, old, trained(model))
    moved = run_model(model, old) - logits  # D h (N, V)
    gap = later - loss - float((slope * D).sum())
    upper = float((np.ptp(moved, axis=-1) ** 2).mean() / 8)

    V, C = D.shape
    u = unit_roundoff(np.float64)
    largest = math.sqrt(C) * float(np.linalg.norm(abs(head.data) + abs(D), axis=1).max())
    logit_error = (C + study.r + 5) * u * largest
    loss_error = 2 * logit_error + (V + 9) * u * (largest + math.log(V))
    product_error = (D.size + old.ids.size + C) * u * float((abs(slope) * abs(D)).sum())
    rounded = 2 * loss_error + product_error + (1 + upper) * logit_error
    return compare(gap - upper / 2, upper / 2 + rounded)


def run_model(model: Any, batch: Batch) -> Array:
    """Logits (N, V) of a batch."""
    with no_grad():
        logits = model(batch.ids).data
    return logits.reshape(-1, logits.shape[-1])
