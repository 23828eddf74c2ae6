"""What adapters promise at the two ends of a model, and what a lower rank or precision may cost.

Measured on the layers of plain LoRA, transposed: the embedding has W^T (V, C) with V = I tokens and
C = O channels, and the head that is tied to it has the same weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..autograd import Tensor, gradients
from ..backend import Array
from ..formats.dtypes import round_to, widen
from ..lora import LoraAdapter, LoraEmbedding, LoraLinear, PeftModel, get_peft_model
from ..lora.embedding import EmbeddingAdapter
from ..lora.factors import factors_from_svd, singular_values
from ..models.config import TransformerConfig
from ..nn import Embedding, Linear, Module
from .case import Case
from .layers import save_twice
from .measuring import (
    Measured,
    Property,
    compare,
    count_differences,
    expect_zero,
    is_lora,
    leading_terms,
    make_registrar,
    project,
    set_tensors,
    spectral_norm,
    svd_error,
    update_error,
    worst,
)

PROPERTIES: list[Property] = []


def is_plain(case: Case) -> bool:
    """LoRA over a dense weight, which an embedding is."""
    return is_lora(case) and not case.base.weight.fixed


holds = make_registrar(PROPERTIES, is_plain)


class Ends(Module):
    """A model that is nothing but an embedding (V, C) and a head of the same weight."""

    config = TransformerConfig(tie_word_embeddings=True)

    def __init__(self, weight: Array):
        self.embed_tokens = Embedding(weight)
        self.lm_head = Linear(weight)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> Embedding:
        return self.embed_tokens

    def get_output_embeddings(self) -> Linear:
        return self.lm_head


def embedding_weight(case: Case) -> Array:
    return np.ascontiguousarray(case.base.dense_weight().T)  # (V, C)


def set_embedding(adapter: Any, source: Any) -> None:
    """Give an embedding's adapter the factors of a layer's."""
    adapter.lora_embedding_A.data = source.lora_A.data
    adapter.lora_embedding_B.data = source.lora_B.data


def make_tied(case: Case) -> PeftModel:
    """A model with the case's first adapter at both its ends."""
    config = dataclasses.replace(
        case.configs[case.first],
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )
    model = get_peft_model(Ends(embedding_weight(case)), config)
    set_embedding(model.model.embed_tokens.adapters["default"], case.adapters[case.first])
    return model


@holds("embedding", "y(t) = W[t] + Σ s B A[:, t]", "peft 0.21, forward of its LoRA embedding")
def measure_embedding(case: Case) -> Measured:
    """All rows. gamma_n S with n = r + 2 + k: r in the product, two with s, k in the sums."""
    exact = case.formula(case.layer())
    layer = LoraEmbedding(Embedding(embedding_weight(case)))
    base = layer.as_linear(layer.base_layer)
    for name, config in case.configs.items():
        adapter = EmbeddingAdapter(base, "proj", config, case.rng)
        set_embedding(adapter, case.adapters[name])
        layer.adapters[name] = adapter
    layer.active = list(case.configs)
    V = exact.W.shape[1]
    y = layer(np.arange(V)).data
    n = max(adapter.r for adapter in layer.adapters.values()) + 2 + len(case.configs)
    S = abs(exact).merged().T
    return compare(y - exact.merged().T, case.gamma(n, S))


@holds(
    "one weight, two places",
    "d(A, B) = that of the embedding + that of the head, turned",
    "peft 0.21, ensure_weight_tying",
)
def measure_tied_gradients(case: Case) -> Measured:
    """What each place would give by itself, added.

    The head by itself has plain LoRA, its A being the embedding's Bᵀ, its B the Aᵀ: the same sums,
    of which BLAS may change the order with the layout. 2 gamma_n of the head's part, with n = N + 3
    for s G₂ᵀ (x B), two with s, C more in x B or V in G₂ Aᵀ, and one where the two gradients meet.
    In the model the parameters are counted once, and are nowhere else.
    """
    model = make_tied(case)
    embedding = model.model.embed_tokens
    head = model.model.lm_head
    adapter = embedding.adapters["default"]
    A = adapter.lora_embedding_A
    B = adapter.lora_embedding_B
    V, C = embedding.weight.shape
    rng = case.rng
    N = 3
    G1 = Tensor(rng.standard_normal((V, C)).astype(case.dtype))
    x = Tensor(rng.standard_normal((N, C)).astype(case.dtype), requires_grad=True)
    G2 = Tensor(rng.standard_normal((N, V)).astype(case.dtype), requires_grad=True)

    turned = LoraAdapter(head.base_layer, "lm_head", case.configs[case.first], rng)
    turned.lora_A.data = B.data.T
    turned.lora_B.data = A.data.T
    alone = LoraLinear(head.base_layer)
    alone.adapters["alone"] = turned
    alone.active = ["alone"]

    ids = np.arange(V)
    both = gradients((embedding(ids) * G1).sum() + (head(x) * G2).sum(), [A, B])
    of_embedding = gradients((embedding(ids) * G1).sum(), [A, B])
    of_head = gradients((alone(x) * G2).sum(), [turned.lora_B, turned.lora_A])

    s = adapter.scaling
    G = abs(G2.data).astype(case.wide)  # (N, V)
    X = abs(x.data).astype(case.wide)  # (N, C)
    S_A = s * ((abs(B.data).T @ X.T) @ G)  # (r, V)
    S_B = s * (X.T @ (G @ abs(A.data).T))  # (C, r)
    trained = model.get_nb_trainable_parameters()[0]
    pairs: list[tuple[Any, Any]] = [(trained - adapter.r * (V + C), 0)]
    for d, d1, d2, S in zip(both, of_embedding, of_head, (S_A, S_B), strict=True):
        if d is None or d1 is None or d2 is None:
            return Measured(np.nan, 0, "no gradient")
        bound = 2 * case.gamma(V + C + N + 3, S + abs(d1))
        pairs.append((d - (d1 + d2.T), bound))
    return worst(*pairs)


@holds(
    "files of both ends",
    "save, load  ⇒  the same bits, the base's weight and both factors twice",
    "peft 0.21, save_pretrained",
)
def measure_files(case: Case) -> Measured:
    """Exact: tensors and keys; and the bytes of a file saved again under another adapter's name."""
    W = embedding_weight(case)
    _, stored, wrong = save_twice(make_tied(case), Ends(W))
    adapter = case.adapters[case.first]
    A = adapter.lora_A.data
    B = adapter.lora_B.data
    expected = {
        "embed_tokens.lora_embedding_A": A,
        "embed_tokens.lora_embedding_B": B,
        "embed_tokens.base_layer.weight": W,
        "lm_head.lora_A.weight": B.T,
        "lm_head.lora_B.weight": A.T,
        "lm_head.base_layer.weight": W,
    }
    written = {key.removeprefix("base_model.model."): a for key, a in stored.items()}
    wrong += len(written.keys() ^ expected.keys())
    for key in written.keys() & expected.keys():
        wrong += count_differences(written[key], expected[key])
    return expect_zero(wrong)


# ---- what is left out ----------------------------------------------------------------------------


@holds(
    "half precision",
    "|fl(W + dW) - (W + dW)| ≤ ulp / 2 in bfloat16, float16",
    "IEEE 754-2019, section 4.3.1",
)
def measure_half_precision(case: Case) -> Measured:
    """From the float64 sum, rounded once.

    Rounded twice, by way of float32, it is wrong just above the middle between two neighbours: so
    the sum is taken as it is, and also moved there. For float16, which ends at 65,504 and at 2^-14
    goes on in even steps, it is moved into its range by powers of two: to the upper end, and among
    those steps.
    """
    W = case.base.dense_weight().astype(np.float64)
    total = W + case.original.delta_weight(case.first)
    total = total[abs(total) > 2.0**-100]
    _, top = np.frexp(abs(total).max(initial=1))
    # (values, stored dtype, its significant digits, the exponent of its least normal number)
    formats: list[tuple[Array, str, int, int]] = [(total, "BF16", 8, -126)]
    for end in (15, -14):
        formats.append((total * 2.0 ** (end - int(top)), "F16", 11, -14))
    pairs = []
    for exact, dtype, digits, least in formats:
        half_ulp = np.maximum(power_of_two(exact), 2.0**least) * 2.0**-digits
        below = np.trunc(exact / (2 * half_ulp)) * 2 * half_ulp
        middle = (below + np.sign(exact) * half_ulp) * (1 + 2.0**-45)
        for values in (exact, middle):
            stored = widen(round_to(values, dtype))
            pairs.append((stored.astype(np.float64) - values, half_ulp))
    return worst(*pairs)


def power_of_two(a: Array) -> Array:
    """The largest power of two that is at most |a|: float64's exponent alone; 0 for 0."""
    exponents = a.view(np.int64) & 0x7FF0_0000_0000_0000
    return exponents.view(np.float64)


@holds("best of lower rank", "min |dW - P Q|² = Σ σᵢ², i > k", "Eckart & Young 1936; Mirsky 1960")
def measure_lower_rank(case: Case) -> Measured:
    """The σᵢ come from the small factors, the least error from the SVD of dW = Q T, cut off at k.

    Both are off by max(V, C) eps σ₁ each, and dW by the norm of its own roundings (see `rank`), √r
    of them. Nothing of rank k is nearer: neither a random P Q, scaled as well as can be, nor the
    first k columns of B with their rows of A.
    """
    pairs: list[tuple[Any, Any]] = []
    for name, adapter in case.adapters.items():
        layer = case.layer(name)
        A = adapter.lora_A.data
        B = adapter.lora_B.data
        s = adapter.scaling
        dW = layer.delta_weight(name)
        O, I = dW.shape
        k = int(case.rng.integers(0, adapter.r))
        sigma = singular_values(A, B, s)
        least = float(np.linalg.norm(sigma[k:]))
        error = update_error(case, layer) + svd_error(dW.shape, sigma[0], 2)
        bound = np.sqrt(adapter.r) * error

        Q, T = project(dW, B)
        U, S, Vt = np.linalg.svd(T, full_matrices=False)
        nearest = Q @ (U[:, :k] * S[:k]) @ Vt[:k]
        pairs.append((np.linalg.norm(dW - nearest) - least, bound))

        PQ = case.rng.standard_normal((O, k)) @ case.rng.standard_normal((k, I))
        PQ *= (PQ * dW).sum() / max((PQ * PQ).sum(), 1e-300)
        first_k = s * (B[:, :k].astype(float) @ A[:k].astype(float))
        for other in (PQ, first_k):
            distance = float(np.linalg.norm(dW - other))
            pairs.append((max(0.0, least - distance), bound))
    return worst(*pairs)


@holds(
    "principal part first", "W = W_res + s B A,  |W_res|₂ = σᵣ₊₁(W)", "Meng et al. 2024, section 3"
)
def measure_principal(case: Case) -> Measured:
    """s B A is the first r terms of W's own SVD, W_res the others; merged they are W again.

    W_res is rounded once, and so is the sum; dW is float64's both times. The spectrum moves by no
    more than W_res does (Weyl): that rounding, one of each factor, and max(I, O) eps σ₁ for each of
    the decompositions and the product of the terms.
    """
    layer = case.layer(case.first)
    adapter = layer.adapters[case.first]
    r = adapter.r
    root = np.sqrt(adapter.scaling)
    W = layer.base_layer.dense_weight()
    U, sigma, Vt = leading_terms(W, r + 1)
    A, B, _ = factors_from_svd(U, sigma, Vt, r)
    W = W.astype(np.float64)
    set_tensors(layer, [(A / root, B / root)])
    S = abs(case.formula(layer)).dW()
    W_res = (W - layer.delta_weight(case.first)).astype(case.dtype)
    layer.base_layer.weight.data = W_res
    layer.merge()
    merged = layer.base_layer.dense_weight().astype(np.float64)
    largest = spectral_norm(W_res)
    W_res = W_res.astype(np.float64)

    float64 = case.gamma(r + 4, S + abs(W), np.float64).astype(float)
    bound = case.u * (abs(W_res) + abs(merged)) + 2 * float64
    expected = sigma[r] if r < len(sigma) else 0.0
    moved = case.u * abs(W_res) + case.gamma(2, S).astype(float) + float64
    spectrum_bound = np.linalg.norm(moved) + svd_error(W.shape, sigma[0], 3)
    return worst((merged - W, bound), (largest - expected, spectrum_bound))
