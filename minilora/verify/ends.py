"""What adapters promise at the two ends of a model, and what a smaller rank or a shorter number may cost.

Measured on the layers of plain LoRA, turned: the embedding has W^T (V, C) with V = I tokens and C = O channels, and the
head that is tied to it has the same weight.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import Tensor, gradients
from ..backend import Array
from ..formats import bf16_from, bf16_to_float32, load_file
from ..lora import LoraAdapter, LoraConfig, LoraEmbedding, LoraLinear, PeftModel, get_peft_model
from ..lora.embedding import EmbeddingAdapter
from ..lora.factors import factors_from_svd, singular_values
from ..models.config import TransformerConfig
from ..nn import Embedding, Linear, Module
from .case import Case
from .measuring import Measured, Property, differing, factors, listing, lora, worst

PROPERTIES: list[Property] = []


def plain(case: Case) -> bool:
    """LoRA over a dense weight, which an embedding is."""
    return lora(case) and not case.subject.base_layer.weight.fixed


holds = listing(PROPERTIES, plain)


class Ends(Module):
    """A model that is nothing but an embedding (V, C) and a head of the same weight."""

    config = TransformerConfig(tie_word_embeddings=True)

    def __init__(self, weight: Array):
        self.embed_tokens, self.lm_head = Embedding(weight), Linear(weight)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> Embedding:
        return self.embed_tokens

    def get_output_embeddings(self) -> Linear:
        return self.lm_head


def _weight(case: Case) -> Array:
    return np.ascontiguousarray(case.subject.base_layer.dense_weight().T)  # (V, C)


def _tied(case: Case) -> tuple[PeftModel, Any]:
    """A model with the case's first adapter at both its ends, and that adapter as the case has it."""
    name, config = next(iter(case.configs.items()))
    own: LoraConfig = dataclasses.replace(
        config, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    made, adapter = get_peft_model(Ends(_weight(case)), own), case.subject.adapters[name]
    embedding = made.model.embed_tokens.adapters["default"]
    embedding.lora_embedding_A.data, embedding.lora_embedding_B.data = (
        adapter.lora_A.data,
        adapter.lora_B.data,
    )
    return made, adapter


@holds("embedding", "y(t) = W[t] + Σ s B A[:, t]", "peft 0.21, forward of its LoRA embedding")
def _embedding(case: Case) -> Measured:
    """All rows. gamma_n S with n = r + 2 + k: r in the product, two with s, and k in sums with what is there so far."""
    layer, formula = LoraEmbedding(Embedding(_weight(case))), case.formula(case.layer())
    for name, config in case.configs.items():
        there = case.subject.adapters[name]
        layer.adapters[name] = made = EmbeddingAdapter(
            layer.as_linear(layer.base_layer), "proj", config, case.rng
        )
        made.lora_embedding_A.data, made.lora_embedding_B.data = (
            there.lora_A.data,
            there.lora_B.data,
        )
    layer.active = list(case.configs)
    y, absolute = layer(np.arange(formula.W.shape[1])).data, abs(formula)
    n = max(a.r for a in layer.adapters.values()) + 2 + len(case.configs)
    return worst((y - (formula.W + formula.dW()).T, case.gamma(n, (absolute.W + absolute.dW()).T)))


@holds(
    "one weight, two places",
    "d(A, B) = that of the embedding + that of the head, turned",
    "peft 0.21, ensure_weight_tying",
)
def _two_places(case: Case) -> Measured:
    """What each place would give by itself, added. The head by itself has plain LoRA, its A being the embedding's Bᵀ,
    its B the Aᵀ: the same sums, of which BLAS may change the order with the layout. 2 gamma_n of the head's part, with
    n = N + 3 for s G₂ᵀ (x B), two with s, C more in x B or V in G₂ Aᵀ, and one where the two gradients meet. In the
    model the parameters are counted once, and are nowhere else."""
    made, _ = _tied(case)
    embedding, head, name = made.model.embed_tokens, made.model.lm_head, next(iter(case.configs))
    (V, C), own, rng = embedding.weight.shape, embedding.adapters["default"], case.rng
    ids, G1 = np.arange(V), Tensor(rng.standard_normal((V, C)).astype(case.dtype))
    x, G2 = (
        Tensor(rng.standard_normal((3, n)).astype(case.dtype), requires_grad=True) for n in (C, V)
    )
    wrong = abs(made.get_nb_trainable_parameters()[0] - own.r * (V + C))
    plain = LoraLinear(head.base_layer)
    plain.adapters["alone"] = turned = LoraAdapter(
        head.base_layer, "lm_head", case.configs[name], rng
    )
    turned.lora_A.data, turned.lora_B.data = (
        own.lora_embedding_B.data.T,
        own.lora_embedding_A.data.T,
    )
    plain.active = ["alone"]
    both = [own.lora_embedding_A, own.lora_embedding_B]
    found = gradients((embedding(ids) * G1).sum() + (head(x) * G2).sum(), both)
    first = gradients((embedding(ids) * G1).sum(), both)
    second = gradients((plain(x) * G2).sum(), [turned.lora_B, turned.lora_A])
    pairs: list[tuple[Any, Any]] = [(wrong, 0)]
    A, B, s = abs(own.lora_embedding_A.data), abs(own.lora_embedding_B.data), own.scaling
    G = (abs(G2.data).T @ abs(x.data)).astype(np.longdouble)  # (V, C)
    sizes = [s * (B.T @ G.T), s * (G.T @ A.T)]
    for whole, one, other, size in zip(found, first, second, sizes, strict=True):
        if whole is None or one is None or other is None:
            return Measured(np.nan, 0, "no gradient")
        pairs.append(
            (whole - (one + other.T), 2 * case.gamma(V + C + len(x.data) + 3, size + abs(one)))
        )
    return worst(*pairs)


@holds(
    "files of both ends",
    "save, load  ⇒  the same bits, the base's weight and both factors twice",
    "peft 0.21, save_pretrained",
)
def _files(case: Case) -> Measured:
    """Exact: tensors and keys; and the bytes of a file that was saved again under another adapter's name."""
    made, adapter = _tied(case)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        again = PeftModel.from_pretrained(Ends(_weight(case)), folder, "another")
        again.save_pretrained(folder)
        first, second = (
            path / "adapter_model.safetensors" for path in (Path(folder), Path(folder, "another"))
        )
        there = {key.removeprefix("base_model.model."): a for key, a in load_file(first).items()}
        wrong = int(first.read_bytes() != second.read_bytes())
    A, B, W = adapter.lora_A.data, adapter.lora_B.data, _weight(case)
    expected = {
        "embed_tokens.lora_embedding_A": A,
        "embed_tokens.lora_embedding_B": B,
        "embed_tokens.base_layer.weight": W,
    }
    expected |= {
        "lm_head.lora_A.weight": B.T,
        "lm_head.lora_B.weight": A.T,
        "lm_head.base_layer.weight": W,
    }
    wrong += len(set(there) ^ set(expected))
    return worst(
        (wrong + sum(differing(a, expected[key]) for key, a in there.items() if key in expected), 0)
    )


# ---- what is left out -----------------------------------------------------------------------------------------------


def to_half(total: Array) -> Array:
    return np.asarray(total, np.float16)


def _halves(total: Array, digits: int, least: int) -> Array:
    """Half an ulp there, of a format of so many digits whose smallest normal number is 2^(least - 1)."""
    return np.asarray(np.ldexp(0.5, np.maximum(np.frexp(total)[1], least) - digits))


@holds(
    "half precision",
    "|fl(W + dW) - (W + dW)| ≤ ulp / 2 in bfloat16, float16",
    "IEEE 754-2019, section 4.3.1",
)
def _half_precision(case: Case) -> Measured:
    """From the float64 sum, rounded once. Rounded twice, by way of float32, it is wrong just above the middle between
    two neighbours: so the sum is taken as it is, and also moved there. For float16, which ends at 65,504 and at 2^-14
    goes on in even steps, it is moved into its range by powers of two: to the upper end, and among those steps."""
    name = next(iter(case.configs))
    total = case.subject.base_layer.dense_weight().astype(np.float64) + case.subject.delta_weight(
        name
    )
    total = total[abs(total) > 2.0**-100]
    top = int(np.frexp(abs(total).max(initial=1))[1])
    formats: list[tuple[Array, int, int, Any]] = [
        (total, 8, -125, lambda t: bf16_to_float32(bf16_from(t)))
    ]
    formats += [(np.ldexp(total, end - top), 11, -13, to_half) for end in (15, -14)]
    pairs = []
    for exact, digits, least, stored in formats:
        half = _halves(exact, digits, least)
        middle = (np.trunc(exact / (2 * half)) * 2 * half + np.sign(exact) * half) * (1 + 2.0**-45)
        pairs += [(stored(t).astype(np.float64) - t, half) for t in (exact, middle)]
    return worst(*pairs)


@holds("best of lower rank", "min |dW - P Q|² = Σ σᵢ², i > k", "Eckart & Young 1936; Mirsky 1960")
def _lower_rank(case: Case) -> Measured:
    """The σᵢ are found from the small factors, and the least error by the SVD of dW itself, cut off at k. Both are off
    by max(V, C) eps σ₁ each, and dW by the norm of its own roundings (see `rank`), √r of them. Nothing of rank k is
    nearer: neither P Q at random, scaled as well as can be, nor the first k columns of B with their rows of A."""
    pairs = []
    for name, adapter in case.subject.adapters.items():
        layer = case.layer(name)
        A, B, s = adapter.lora_A.data, adapter.lora_B.data, adapter.scaling
        dW, values, k = (
            layer.delta_weight(name),
            singular_values(A, B, s),
            int(case.rng.integers(0, adapter.r)),
        )
        least = float(np.linalg.norm(values[k:]))
        moved = np.linalg.norm(
            case.gamma(adapter.r + 2, abs(case.formula(layer)).dW(), np.float64).astype(float)
        )
        bound = np.sqrt(adapter.r) * (
            moved + 2 * max(dW.shape) * np.finfo(np.float64).eps * values[0]
        )
        U, S, Vt = np.linalg.svd(dW, full_matrices=False)
        pairs.append((np.linalg.norm(dW - (U[:, :k] * S[:k]) @ Vt[:k]) - least, bound))
        random = case.rng.standard_normal((len(dW), k)) @ case.rng.standard_normal((k, dW.shape[1]))
        random *= (random * dW).sum() / max((random * random).sum(), 1e-300)
        for other in (random, s * (B[:, :k].astype(float) @ A[:k].astype(float))):
            pairs.append((max(0.0, least - float(np.linalg.norm(dW - other))), bound))
    return worst(*pairs)


@holds(
    "principal part first", "W = W_res + s B A,  |W_res|₂ = σᵣ₊₁(W)", "Meng et al. 2024, section 3"
)
def _principal(case: Case) -> Measured:
    """s B A is the first r terms of W's own SVD, W_res what they leave, and merged it is W again: W_res is rounded
    once, and so is the sum; dW is float64's both times. The spectrum moves by no more than W_res does (Weyl): that
    rounding, one of each factor, and max(I, O) eps σ₁ for each of the decompositions and the product of the terms."""
    name, u = next(iter(case.configs)), float(np.finfo(case.dtype).eps) / 2
    layer = case.layer(name)
    adapter, W = layer.adapters[name], layer.base_layer.dense_weight().astype(np.float64)
    U, values, Vt = np.linalg.svd(W, full_matrices=False)
    A, B, _ = factors_from_svd(U, values, Vt, adapter.r)
    factors(layer, [(A / np.sqrt(adapter.scaling), B / np.sqrt(adapter.scaling))])
    S = abs(case.formula(layer)).dW()
    layer.base_layer.weight.data = residual = (W - layer.delta_weight(name)).astype(case.dtype)
    layer.merge()
    again = layer.base_layer.dense_weight().astype(np.float64)
    left, float64 = (
        abs(residual.astype(np.float64)),
        case.gamma(adapter.r + 4, S + abs(W), np.float64).astype(float),
    )
    moved = np.linalg.norm(u * left + case.gamma(2, S).astype(float) + float64)
    of_svd = 3 * max(W.shape) * np.finfo(np.float64).eps * values[0]
    largest = np.linalg.svd(residual.astype(np.float64), compute_uv=False)[0]
    next_one = values[adapter.r] if adapter.r < len(values) else 0.0
    return worst(
        (again - W, u * (left + abs(again)) + 2 * float64), (largest - next_one, moved + of_svd)
    )
