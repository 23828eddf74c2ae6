"""What every layer with adapters promises: merging, files, dropout. Letters and shapes are those of case.py."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor
from ..errors import NonFiniteError
from ..formats import load_file
from ..lora import AdaLoraAdapter, DoraAdapter, LoraAdapter, PeftModel, get_peft_model
from ..models.config import TransformerConfig
from ..nn import Embedding, Module, dropout_counter
from .case import WIDE, Case
from .measuring import (
    Measured,
    Property,
    adds,
    always,
    backward,
    differing,
    factors,
    listing,
    ranked,
    run,
    slopes,
    worst,
)

PROPERTIES: list[Property] = []
holds = listing(PROPERTIES, always)
CHANCE = 1e-9  # that a right layer misses a statistical bound, for each measurement
KEYS: dict[type[LoraAdapter], tuple[str, ...]] = {  # what a file holds of a layer, in PEFT's words
    LoraAdapter: ("lora_A.weight", "lora_B.weight"),
    DoraAdapter: ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    AdaLoraAdapter: ("lora_A", "lora_B", "lora_E"),
}

# ---- the effective weight, and merging -------------------------------------------------------------------------------


@holds("disabled is the base", "no adapter enabled  ⇒  y = x Wᵀ + b", "Hu et al. 2021, section 4.1")
def _disabled(case: Case) -> Measured:
    """Exact: the base runs alone."""
    layer = case.layer()
    layer.enabled = False
    return worst((differing(run(layer, case.x), run(layer.base_layer, case.x)), 0))


@holds(
    "effective weight",
    "y and every gradient by one product with W + Σ s B A",
    "Hu et al. 2021, section 4.1: no latency",
    adds,
)
def _effective(case: Case) -> Measured:
    """W + dW is formed in the layer's own precision: r + 1 + k roundings, then I (O in backward) and the bias."""
    layer, G = case.layer(), case.upstream()
    layer.prepare_step()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    y, dX, found = backward(layer, case.x, G)
    n = case.roundings(layer, 1)
    into_x = n - exact.X.shape[1] + dY.shape[1]
    pairs = [
        (y - exact.y(), case.gamma(n, abs(exact).y())),
        (dX - exact.dX(dY), case.gamma(into_x, abs(exact).dX(abs(dY)))),
    ]
    return worst(*pairs, *slopes(case, layer, exact, dY, found))


@holds(
    "merged forward", "x (W + Σ s B A)ᵀ = x Wᵀ + Σ s (x Aᵀ) Bᵀ", "Hu et al. 2021, section 4.1", adds
)
def _merged_forward(case: Case) -> Measured:
    """Both sides err by at most gamma_(n+1) S, n as for `forward`: the merged one needs only the I of a product, the
    bias, and what making W + dW takes."""
    layer = case.layer()
    scale, before = abs(case.formula(layer)).y(), run(layer, case.x).astype(WIDE[case.dtype])
    n = case.roundings(layer, 1)
    layer.merge()
    return worst((run(layer, case.x) - before, 2 * case.gamma(n, scale)))


@holds("merge rounds once", "W' = fl(W + Σ s B A)", "IEEE 754-2019, section 4.3.1", adds)
def _merge(case: Case) -> Measured:
    """Half an ulp of W' (Higham 2002, section 2.1), and the float64 sum's own gamma_(r+1+k) S."""
    layer = case.layer()
    exact, n = case.formula(layer), case.roundings(layer) - layer.base_layer.in_features
    layer.merge()
    W = layer.base_layer.dense_weight()
    half = np.spacing(abs(W)).astype(WIDE[case.dtype]) / 2
    absolute = abs(exact)
    return worst(
        (W - (exact.W + exact.dW()), half + case.gamma(n, absolute.W + absolute.dW(), np.float64))
    )


@holds("merge in any portions", "twice, or one by one  ⇒  the same bits", "one sum from the kept W")
def _portions(case: Case) -> Measured:
    """Exact: the order of the sum is that of the names, however they come."""
    names = [str(name) for name in case.rng.permutation(list(case.subject.adapters))]
    once = case.layer()
    once.merge(names)
    W, wrong = once.base_layer.dense_weight(), int(once.merged != tuple(names))
    for portions in (
        [names, names],
        [names + names],
        [[name] for name in names],
        [names[:1], names],
    ):
        layer = case.layer()
        for portion in portions:
            layer.merge(portion)
        wrong += differing(layer.base_layer.dense_weight(), W) + (layer.merged != once.merged)
    return worst((wrong, 0))


@holds(
    "merge refuses", "W + dW not finite  ⇒  an error, W as it was", "nothing is merged half", ranked
)
def _refuses(case: Case) -> Measured:
    """Exact: a NaN or inf in one entry of a factor, or finite factors whose product overflows."""
    wrong = 0
    for value in (math.nan, math.inf, -math.inf, float(np.finfo(case.dtype).max)):
        layer = case.layer()
        normed = any(a.NORMED for a in layer.adapters.values())
        if normed and math.isfinite(value) and case.dtype != np.float64:
            continue  # DoRA divides by the norm, and in float64 both are finite
        tensors = [getattr(a, name) for a in layer.adapters.values() for name in a.TENSORS]
        for p in tensors if math.isfinite(value) else [tensors[case.rng.integers(len(tensors))]]:
            spoilt = np.full_like(p.data, value) if math.isfinite(value) else p.data.copy()
            spoilt.flat[case.rng.integers(p.size)] = value
            p.data = spoilt
        base, before = layer.base_layer, layer.base_layer.dense_weight().copy()
        try:
            layer.merge()
            wrong += 1
        except NonFiniteError:
            wrong += differing(layer.base_layer.dense_weight(), before) + (
                layer.base_layer is not base
            )
            wrong += len(layer.merged)
    return worst((wrong, 0))


@holds("unmerge", "W comes back, every bit", "the base itself is kept")
def _unmerge(case: Case) -> Measured:
    """Exact, and it is the same array, however often."""
    layer = case.layer()
    base, before = layer.base_layer, layer.base_layer.dense_weight().copy()
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    wrong = (layer.base_layer is not base) + len(layer.merged)
    return worst((differing(layer.base_layer.dense_weight(), before) + wrong, 0))


@holds(
    "round trip",
    "|fl(W' - dW) - W| ≤ u (|W'| + |W|): why W is kept",
    "Higham 2002, eq. (2.5)",
    adds,
)
def _round_trip(case: Case) -> Measured:
    """What subtracting dW, asked for while it is merged, would restore. The two sums round once each, to W' and to the
    result R: u |W'| + u |R|, and gamma_(r+1+k) S for dW in float64, twice. Nearly all of that is really lost."""
    layer, wide, u = case.layer(), WIDE[case.dtype], float(np.finfo(case.dtype).eps) / 2
    exact, n = case.formula(layer), case.roundings(layer) - layer.base_layer.in_features
    layer.merge()
    merged = layer.base_layer.dense_weight().astype(wide)
    R = (
        (merged - sum(layer.delta_weight(name) for name in layer.active))
        .astype(case.dtype)
        .astype(wide)
    )
    absolute = abs(exact)
    float64 = case.gamma(2 * n, absolute.W + absolute.dW(), np.float64)
    return worst((R - exact.W, u * (abs(merged) + abs(R)) + float64))


# ---- files -----------------------------------------------------------------------------------------------------------


class OneLayer(Module):
    """The smallest model that an adapter can be put into."""

    config = TransformerConfig()  # of Llama's type, whose files hold W as (out, in)

    def __init__(self, layer: Any):
        self.proj = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> Embedding:
        return Embedding(np.zeros((1, 1), np.float32))


def dense(case: Case) -> bool:
    """A file holds nothing of the base: one kind of base is enough."""
    return case.weight is None


@holds(
    "files",
    "save, load  ⇒  the same bits under PEFT's keys, whatever the name",
    "peft 0.21, save_pretrained",
    dense,
)
def _files(case: Case) -> Measured:
    """Exact: tensors, outputs, the two keys, and the bytes of a file that was saved under another adapter's name."""
    name, config = next(iter(case.configs.items()))
    layer = case.layer(name)
    adapter = layer.adapters[name]
    keys = {f"base_model.model.proj.{key}" for key in KEYS[type(adapter)]}
    with tempfile.TemporaryDirectory() as folder:
        made = get_peft_model(OneLayer(case.layer().base_layer), config)
        factors(
            made.model.proj, [tuple(getattr(adapter, tensor).data for tensor in adapter.TENSORS)]
        )
        made.save_pretrained(folder)
        again = PeftModel.from_pretrained(OneLayer(case.layer().base_layer), folder, "another")
        again.save_pretrained(folder)
        first, second = (
            path / "adapter_model.safetensors" for path in (Path(folder), Path(folder, "another"))
        )
        wrong = len(set(load_file(first)) ^ keys) + (first.read_bytes() != second.read_bytes())
    loaded = again.model.proj.adapters["another"]
    for own, other in zip(adapter.parameters(), loaded.parameters(), strict=True):
        wrong += differing(own.data, other.data)
    return worst((wrong + differing(run(layer, case.x), run(again.model.proj, case.x)), 0))


# ---- dropout ---------------------------------------------------------------------------------------------------------


@holds("dropout off", "evaluating, or p = 0  ⇒  x is untouched", "Srivastava et al. 2014")
def _dropout_off(case: Case) -> Measured:
    """Exact: dropout is then the identity."""
    layer = case.layer()
    for adapter in layer.adapters.values():
        adapter.dropout.p = 0.0
    y = run(layer, case.x)
    wrong = differing(run(layer.train(), case.x), y)
    for adapter in layer.adapters.values():
        adapter.dropout.p = 0.5
    return worst((wrong + differing(run(layer.eval(), case.x), y), 0))


@holds(
    "dropout spares the base",
    "y = x Wᵀ + b + Σ s (drop(x) Aᵀ) Bᵀ",
    "peft 0.21, forward of its LoRA layer",
    adds,
)
def _dropout_base(case: Case) -> Measured:
    """Exact: with the same masks, the same operations give the same bits. The base reads x itself."""
    layer, x = case.layer().train(), Tensor(case.x)
    adapters = [layer.adapters[name] for name in layer.active]
    for adapter in adapters:
        adapter.dropout.p = 0.5
    with dropout_counter(case.seed, 0):
        y, expected = run(layer, case.x), layer.base_layer(x)
        for a in adapters:
            A = a.lora_A * a.lora_E if isinstance(a, AdaLoraAdapter) else a.lora_A
            expected = F.lora_linear(a.dropout(x), expected, A, a.lora_B, a.scaling)
    return worst((differing(y, F.rows(expected.data)), 0))


@holds(
    "dropout is unbiased",
    "E[s (drop(x) Aᵀ) Bᵀ] = s (x Aᵀ) Bᵀ",
    "Srivastava et al. 2014; Hoeffding 1963, theorem 2",
    adds,
)
def _dropout_mean(case: Case) -> Measured:
    """The mean over M masks of a sum of independent terms, each 0 or cⱼ / (1 - p), is further than R from Σ cⱼ with a
    chance of at most 2 exp(-2 M R² (1-p)² / Σ cⱼ²). R makes that 1e-9 for all outputs together. As many elements as
    p says must be dropped, by the same inequality."""
    name, p, M = next(iter(case.subject.adapters)), 0.25, 512
    layer = case.layer(name).train()
    adapter, (X, *_, [(A, B, s)]) = layer.adapters[name], case.formula(layer)
    adapter.dropout.p = p
    x = np.repeat(case.x[:1, :1], M, axis=0)  # (M, 1, I): a mask for each sequence
    with dropout_counter(case.seed, 1):
        dropped = adapter.dropout(Tensor(np.ones_like(x))).data == 0
        y = adapter(Tensor(x), Tensor(np.zeros((M, 1, len(B)), case.dtype)), layer.base_layer).data
    c = s * (B @ A) * X[0]  # (O, I): what each element of x adds to each output
    log = math.log(2 * (len(c) + 1) / CHANCE)
    radius = np.sqrt((c * c).sum(axis=1) * log / (2 * M)) / (1 - p)
    rounding = case.gamma(
        case.roundings(layer, 1), abs(s) * (abs(B) @ abs(A)) @ abs(X[0]) / (1 - p)
    )
    mean = y[:, 0].astype(c.dtype).mean(axis=0)
    share = dropped.mean() - p, math.sqrt(log / (2 * dropped.size))
    return worst((mean - c.sum(axis=1), radius + rounding), share)
