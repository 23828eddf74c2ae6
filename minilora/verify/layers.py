"""What every layer with adapters promises: merging, files, dropout. Letters are case.py's."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor
from ..backend import Array
from ..errors import NonFiniteError
from ..formats import load_file
from ..lora import AdaLoraAdapter, DoraAdapter, LoraAdapter, PeftModel, get_peft_model
from ..models.config import TransformerConfig
from ..nn import Embedding, Module, dropout_counter
from .case import Case, active_adapters
from .measuring import (
    Measured,
    Property,
    always,
    backward,
    compare,
    count_differences,
    expect_zero,
    gradient_errors,
    has_factors,
    has_rank,
    is_additive,
    is_dense,
    make_registrar,
    set_tensors,
    tensors_of,
    worst,
)

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, has_factors)
CHANCE = 1e-9  # that a correct layer misses a statistical bound, for each measurement
# The keys of a layer's tensors in PEFT's files.
KEYS: dict[type[LoraAdapter], tuple[str, ...]] = {
    LoraAdapter: ("lora_A.weight", "lora_B.weight"),
    DoraAdapter: ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    AdaLoraAdapter: ("lora_A", "lora_B", "lora_E"),
}

# ---- the effective weight, and merging -----------------------------------------------------------


@holds(
    "disabled is the base",
    "no adapter enabled  ⇒  y = x Wᵀ + b",
    "Hu et al. 2021, section 4.1",
    always,
)
def measure_disabled(case: Case) -> Measured:
    """Exact: the base runs alone."""
    layer = case.layer()
    layer.enabled = False
    return expect_zero(count_differences(case.run(layer), case.run(layer.base_layer)))


@holds(
    "effective weight",
    "y and every gradient by one product with W + Σ s B A",
    "Hu et al. 2021, section 4.1: no latency",
    is_additive,
)
def measure_effective(case: Case) -> Measured:
    """W + dW is formed in the layer's own precision: r + 1 + k roundings.

    Then come I (O in backward) and the bias.
    """
    layer = case.layer()
    dY = case.draw_dY()
    layer.prepare_step()
    exact = case.formula(layer)
    absolute = abs(exact)
    G = case.wide_rows(dY)
    y, dX, slopes = backward(case, layer, dY)
    n = case.roundings(layer, 1)
    n_dX = n - layer.in_features + layer.out_features
    y_bound = case.gamma(n, absolute.y())
    dX_bound = case.gamma(n_dX, absolute.dX(abs(G)))
    pairs = [(y - exact.y(), y_bound), (dX - exact.dX(G), dX_bound)]
    pairs += gradient_errors(case, layer, exact, G, slopes)
    return worst(*pairs)


@holds(
    "merged forward",
    "x (W + Σ s B A)ᵀ = x Wᵀ + Σ s (x Aᵀ) Bᵀ",
    "Hu et al. 2021, section 4.1",
    is_additive,
)
def measure_merged_forward(case: Case) -> Measured:
    """Both sides err by at most gamma_(n+1) S, n as for `forward`.

    The merged one needs only the I of a product, the bias, and what making W + dW takes.
    """
    layer = case.layer()
    n = case.roundings(layer, 1)
    S = abs(case.formula(layer)).y()
    y = case.run_wide(layer)
    layer.merge()
    return compare(case.run(layer) - y, 2 * case.gamma(n, S))


@holds("merge rounds once", "W' = fl(W + Σ s B A)", "IEEE 754-2019, section 4.3.1", is_additive)
def measure_merge(case: Case) -> Measured:
    """Half an ulp of W' (Higham 2002, section 2.1), and the float64 sum's own gamma_(r+1+k) S."""
    layer = case.layer()
    exact = case.formula(layer)
    n = case.roundings(layer) - layer.in_features
    layer.merge()
    W = layer.base_layer.dense_weight()
    half_ulp = np.spacing(abs(W)).astype(case.wide) / 2
    S = abs(exact).merged()
    return compare(W - exact.merged(), half_ulp + case.gamma(n, S, np.float64))


@holds(
    "merge in any portions",
    "twice, or one by one  ⇒  the same bits",
    "one sum from the kept W",
    always,
)
def measure_portions(case: Case) -> Measured:
    """Exact: the order of the terms depends on their numbers alone, however merges are cut."""
    names = [str(name) for name in case.rng.permutation(list(case.adapters))]
    once = case.layer()
    once.merge(names)
    W = once.base_layer.dense_weight()
    wrong = int(once.merged != tuple(names))
    one_by_one = [[name] for name in names]
    for portions in ([names, names], [names + names], one_by_one, [names[:1], names]):
        layer = case.layer()
        for portion in portions:
            layer.merge(portion)
        wrong += count_differences(layer.base_layer.dense_weight(), W)
        wrong += layer.merged != once.merged
    return expect_zero(wrong)


@holds(
    "merge refuses",
    "W + dW not finite  ⇒  an error, W as it was",
    "nothing is merged half",
    has_rank,
)
def measure_refusal(case: Case) -> Measured:
    """Exact: a NaN or inf in one entry of a factor, or finite factors whose product overflows."""
    wrong = 0
    for value in (math.nan, math.inf, -math.inf, float(np.finfo(case.dtype).max)):
        layer = case.layer()
        normed = any(a.NORMED for a in layer.adapters.values())
        if normed and math.isfinite(value) and case.dtype != np.float64:
            continue  # DoRA divides by the norm, and in float64 both are finite
        tensors = []
        for adapter in layer.adapters.values():
            tensors += tensors_of(adapter)
        if math.isfinite(value):
            for p in tensors:
                p.data = np.full_like(p.data, value)
        else:
            p = tensors[case.rng.integers(len(tensors))]
            spoilt = p.data.copy()
            spoilt.flat[case.rng.integers(p.size)] = value
            p.data = spoilt
        base = layer.base_layer
        W = base.dense_weight().copy()
        try:
            layer.merge()
            wrong += 1
        except NonFiniteError:
            wrong += count_differences(layer.base_layer.dense_weight(), W)
            wrong += layer.base_layer is not base
            wrong += len(layer.merged)
    return expect_zero(wrong)


@holds("unmerge", "W comes back, every bit", "the base itself is kept")
def measure_unmerge(case: Case) -> Measured:
    """Exact, and it is the same array, however often."""
    layer = case.layer()
    base = layer.base_layer
    W = base.dense_weight().copy()
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    wrong = count_differences(layer.base_layer.dense_weight(), W)
    wrong += layer.base_layer is not base
    wrong += len(layer.merged)
    return expect_zero(wrong)


@holds(
    "round trip",
    "|fl(W' - dW) - W| ≤ u (|W'| + |W|): why W is kept",
    "Higham 2002, eq. (2.5)",
    is_additive,
)
def measure_round_trip(case: Case) -> Measured:
    """What subtracting dW, computed while it is merged, would restore.

    The two sums round once each, to W' and to the result R: u |W'| + u |R|, and gamma_(r+1+k) S for
    dW in float64, twice. Nearly all of that is really lost.
    """
    layer = case.layer()
    exact = case.formula(layer)
    n = case.roundings(layer) - layer.in_features
    layer.merge()
    W = layer.base_layer.dense_weight().astype(case.wide)
    dW = sum(layer.delta_weight(name) for name in layer.active)
    R = (W - dW).astype(case.dtype).astype(case.wide)
    S = abs(exact).merged()
    bound = case.u * (abs(W) + abs(R)) + case.gamma(2 * n, S, np.float64)
    return compare(R - exact.W, bound)


# ---- files ---------------------------------------------------------------------------------------


class OneLayer(Module):
    """The smallest model that an adapter can be put into."""

    config = TransformerConfig()  # of Llama's type, whose files store W as (out, in)

    def __init__(self, layer: Any):
        self.proj = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> Embedding:
        return Embedding(np.zeros((1, 1), np.float32))


def save_twice(model: PeftModel, base: Module) -> tuple[PeftModel, dict[str, Array], int]:
    """Save, load over `base` under another adapter's name, and save again.

    (the loaded model, the tensors of the first file, 1 if the bytes of the second file differ)
    """
    name = "adapter_model.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base, folder, "another")
        loaded.save_pretrained(folder)
        first = Path(folder, name)
        second = Path(folder, "another", name)
        differ = first.read_bytes() != second.read_bytes()
        return loaded, load_file(first), int(differ)


@holds(
    "files",
    "save, load  ⇒  the same bits under PEFT's keys, whatever the name",
    "peft 0.21, save_pretrained",
    lambda case: has_factors(case) and is_dense(case),
)
def measure_files(case: Case) -> Measured:
    """Exact: tensors, outputs, the keys, and the bytes of a file saved under another name."""
    layer = case.layer(case.first)
    adapter = layer.adapters[case.first]
    model = get_peft_model(OneLayer(case.layer().base_layer), case.configs[case.first])
    values = [p.data for p in tensors_of(adapter)]
    set_tensors(model.model.proj, [values])
    loaded, stored, wrong = save_twice(model, OneLayer(case.layer().base_layer))
    keys = {f"base_model.model.proj.{key}" for key in KEYS[type(adapter)]}
    wrong += len(stored.keys() ^ keys)
    again = loaded.model.proj
    parameters = again.adapters["another"].parameters()
    for p, q in zip(adapter.parameters(), parameters, strict=True):
        wrong += count_differences(p.data, q.data)
    wrong += count_differences(case.run(layer), case.run(again))
    return expect_zero(wrong)


# ---- dropout -------------------------------------------------------------------------------------


@holds("dropout off", "evaluating, or p = 0  ⇒  x is untouched", "Srivastava et al. 2014")
def measure_dropout_off(case: Case) -> Measured:
    """Exact: dropout is then the identity."""
    layer = case.layer()
    for adapter in layer.adapters.values():
        adapter.dropout.p = 0.0
    y = case.run(layer)
    wrong = count_differences(case.run(layer.train()), y)
    for adapter in layer.adapters.values():
        adapter.dropout.p = 0.5
    wrong += count_differences(case.run(layer.eval()), y)
    return expect_zero(wrong)


@holds(
    "dropout spares the base",
    "y = x Wᵀ + b + Σ s (drop(x) Aᵀ) Bᵀ",
    "peft 0.21, forward of its LoRA layer",
    is_additive,
)
def measure_dropout_base(case: Case) -> Measured:
    """Exact: the same operations with the same masks give the same bits; the base reads x."""
    layer = case.layer().train()
    x = Tensor(case.x)
    adapters = active_adapters(layer)
    for adapter in adapters:
        adapter.dropout.p = 0.5
    with dropout_counter(case.seed, 0):
        y = case.run(layer)
        expected = layer.base_layer(x)
        for adapter in adapters:
            A = adapter.lora_A
            if isinstance(adapter, AdaLoraAdapter):
                A = A * adapter.lora_E
            dropped = adapter.dropout(x)
            expected = F.lora_linear(dropped, expected, A, adapter.lora_B, adapter.scaling)
    return expect_zero(count_differences(y, F.rows(expected.data)))


@holds(
    "dropout is unbiased",
    "E[s (drop(x) Aᵀ) Bᵀ] = s (x Aᵀ) Bᵀ",
    "Srivastava et al. 2014; Hoeffding 1963, theorem 2",
    is_additive,
)
def measure_dropout_mean(case: Case) -> Measured:
    """The mean over M masks is a mean of independent terms, each 0 or cⱼ / (1 - p).

    It is further than R from Σ cⱼ with a chance of at most 2 exp(-2 M R² (1-p)² / Σ cⱼ²). R makes
    that 1e-9 for all outputs together. As many elements as p says must be dropped, by the same
    inequality.
    """
    p = 0.25
    M = 512
    layer = case.layer(case.first).train()
    adapter = layer.adapters[case.first]
    adapter.dropout.p = p
    exact = case.formula(layer)
    A, B, s = exact.factors[0]
    O = len(B)
    x = exact.X[0]  # (I,)
    repeated = np.repeat(case.x[:1, :1], M, axis=0)  # (M, 1, I): a mask for each sequence
    ones = Tensor(np.ones_like(repeated))
    zeros = Tensor(np.zeros((M, 1, O), case.dtype))
    with dropout_counter(case.seed, 1):
        dropped = adapter.dropout(ones).data == 0
        y = adapter(Tensor(repeated), zeros, layer.base_layer).data
    c = s * (B @ A) * x  # (O, I): what each element of x adds to each output
    log = math.log(2 * (O + 1) / CHANCE)
    R = np.sqrt((c * c).sum(axis=1) * log / (2 * M)) / (1 - p)
    S = abs(s) * (abs(B) @ abs(A)) @ abs(x) / (1 - p)
    rounding = case.gamma(case.roundings(layer, 1), S)
    mean = y[:, 0].astype(case.wide).mean(axis=0)
    share_bound = math.sqrt(log / (2 * dropped.size))
    return worst((mean - c.sum(axis=1), R + rounding), (dropped.mean() - p, share_bound))
