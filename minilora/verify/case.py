"""What a property is measured on: a layer with its adapters and an input; and what that layer should compute.

    Formula        y, dW and the gradients as the paper writes them, in a wider precision than the layer's
    Case           the layer, its input, and what rounding may do to a result (`gamma`)
    make_case, random_case, cases_of    a case of a given shape, of any shape, and those of somebody's model
    over_codes     a case again, its base held in four or eight bits

Letters: N rows of x, I in, O out, r rank, k active adapters, u the unit roundoff. Shapes: X (N, I), W (O, I), A (r, I),
B (O, r), G = dL/dy (N, O), s the scaling, dW = s B A. AdaLoRA has E (r, 1): its dW = s B diag(E) A is LoRA's, with
diag(E) A in A's place. W is what the base computes with: over codes, what they decode to.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import functional as F
from ..backend import Array
from ..lora import (
    AdaLoraAdapter,
    AdaLoraConfig,
    DoraAdapter,
    LoraAdapter,
    LoraConfig,
    LoraLinear,
    PeftModel,
)
from ..lora.embedding import HeadAdapter
from ..lora.plan import wrappers
from ..lora.targets import pattern_value
from ..nn import Linear
from ..quant.codes import BLOCK_SIZES, KINDS
from ..quant.linear import QuantizedLinear

# What a reference is computed in. (Where long double is no wider than double the bounds still hold, twice as large.)
WIDE: dict[Any, Any] = {
    np.dtype(np.float32): np.dtype(np.float64),
    np.dtype(np.float64): np.dtype(np.longdouble),
}

ADAPTERS: dict[str, type[LoraAdapter]] = {
    "lora": LoraAdapter,
    "dora": DoraAdapter,
    "adalora": AdaLoraAdapter,
}

# ---- the formula, over values or over absolute values ---------------------------------------------------------------


class Formula(NamedTuple):
    """y = X W^T + b + sum over adapters of s (X A^T) B^T, the update of W and the gradients, as in the paper."""

    X: Array
    W: Array
    b: Array
    factors: list[
        tuple[Array, Array, float]
    ]  # (A, B, s) of each active adapter; in AdaLoRA diag(E) A is its A

    def __abs__(self) -> Formula:
        """The same over absolute values: what rounding errors are measured in."""
        X, W, b = abs(self.X), abs(self.W), abs(self.b)
        return Formula(X, W, b, [(abs(A), abs(B), abs(s)) for A, B, s in self.factors])

    def y(self) -> Array:
        """(N, O)"""
        low_rank = (
            s * ((self.X @ A.T) @ B.T) for A, B, s in self.factors
        )  # (N, I) @ (I, r) @ (r, O)
        return sum(low_rank, start=self.X @ self.W.T + self.b)

    def dW(self) -> Array:
        """sum s B A (O, I)"""
        return sum((s * (B @ A) for A, B, s in self.factors), start=0 * self.W)

    def dX(self, G: Array) -> Array:
        """G (W + sum s B A) (N, I)"""
        return sum((s * ((G @ B) @ A) for A, B, s in self.factors), start=G @ self.W)

    def dA(self, G: Array, i: int = 0) -> Array:
        """s B^T G^T X (r, I), of the adapter number i"""
        _, B, s = self.factors[i]
        return s * ((G @ B).T @ self.X)

    def dB(self, G: Array, i: int = 0) -> Array:
        """s G^T X A^T (O, r), of the adapter number i"""
        A, _, s = self.factors[i]
        return s * (G.T @ (self.X @ A.T))


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What a property is measured on. Nothing is ever done to `subject` itself: `layer` makes a copy for that.

    subject    a layer with adapters, unmerged
    x          (batch, time, I) in the layer's dtype
    configs    by adapter: its configuration, r and lora_alpha being those of this layer
    seed       of whatever a measurement draws
    weight     (O, I) what the base's codes were made of, where it holds codes and that is known
    """

    name: str
    subject: LoraLinear
    x: np.ndarray
    configs: dict[str, LoraConfig]
    seed: int = 0
    weight: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.x.dtype

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def layer(self, *names: str) -> LoraLinear:
        """A copy of the subject, base and all: the adapters `names` (or all) active, no dropout, only they train."""
        layer = copy.deepcopy(self.subject)
        layer.active = list(names or layer.adapters)
        for p in layer.parameters():
            p.requires_grad = False
        for adapter in layer.adapters.values():
            for p in adapter.parameters():
                p.requires_grad = True
        return layer.eval()  # type: ignore[no-any-return]

    def formula(self, layer: LoraLinear) -> Formula:
        """What `layer`, with its active adapters, is to compute."""
        base, wide = layer.base_layer, WIDE[self.dtype]
        b = np.zeros(1) if base.bias is None else base.bias.data
        factors = []
        for a in (layer.adapters[name] for name in layer.active):
            A, B = a.lora_A.data.astype(wide), a.lora_B.data.astype(wide)
            factors.append(
                (A * a.lora_E.data if isinstance(a, AdaLoraAdapter) else A, B, float(a.scaling))
            )
        return Formula(
            F.rows(self.x).astype(wide), base.dense_weight().astype(wide), b.astype(wide), factors
        )

    def upstream(self) -> Array:
        """G = dL/dy, at random (batch, time, O)."""
        shape = (*self.x.shape[:-1], self.subject.base_layer.out_features)
        return self.rng.standard_normal(shape).astype(self.dtype)

    def roundings(self, layer: LoraLinear, extra: int = 0) -> int:
        """How many a product meets at most on its way into y: I + r + 2 + k, and one with E where there is one.

        I in x A^T, r in (.) B^T, two with s (its own dtype is float64), k in sums with what the layer gives so far.
        """
        adapters = [layer.adapters[name] for name in layer.active]
        rank, ada = max(a.r for a in adapters), any(isinstance(a, AdaLoraAdapter) for a in adapters)
        return layer.base_layer.in_features + rank + 2 + len(adapters) + ada + extra

    def gamma(self, n: int, scale: Array, dtype: Any = None) -> Array:
        """gamma_n S for n roundings in `dtype` (the layer's) and n in the reference's own precision.

        The smallest normal number on top is far more than underflow can add (Higham 2002, equation 2.8).
        """
        us = [float(np.finfo(d).eps) / 2 for d in (dtype or self.dtype, WIDE[self.dtype])]
        return sum(n * u / (1 - n * u) for u in us) * scale + np.finfo(self.dtype).tiny


def make_case(
    seed: int,
    inputs: int,
    outputs: int,
    ranks: Sequence[int],
    alphas: Sequence[float],
    dtype: str = "float32",
    use_rslora: bool = False,
    bias: bool = True,
    rows: tuple[int, int] = (2, 3),
    exponents: tuple[int, int, int] = (0, 0, 0),
    kind: str = "lora",
) -> Case:
    """A random layer of this shape, an adapter for each of `ranks` and `alphas`; W, A, B times a power of two each.

    kind    "lora"; "dora", of which a layer holds one: its magnitudes are then anything; or "adalora", whose E is
            then anything, and whose adapters share a budget and so a rank
    """
    rng = np.random.default_rng(seed)
    W, A, B = (2.0**e for e in exponents)
    b = rng.standard_normal(outputs).astype(dtype) if bias else None
    subject = LoraLinear(Linear((W * rng.standard_normal((outputs, inputs))).astype(dtype), b))
    for p in subject.parameters():
        p.requires_grad = False
    sizes = {"lora_A": A, "lora_B": B, "lora_E": 1.0, "lora_magnitude_vector": W}
    configs = {}
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        configs[f"a{i}"] = config = _config(kind, r, alpha, use_rslora)
        adapter = ADAPTERS[kind](subject.base_layer, "proj", config, rng, stream=i)
        for name in adapter.TENSORS:
            p = getattr(adapter, name)
            p.data = (sizes[name] * rng.standard_normal(p.shape)).astype(dtype)
        subject.adapters[f"a{i}"] = adapter
    subject.active = list(subject.adapters)
    x = rng.standard_normal((*rows, inputs)).astype(dtype)
    name = f"{dtype}, {kind}, W {outputs} x {inputs}, r = {', '.join(map(str, ranks))}, seed {seed}"
    return Case(name, subject.eval(), x, configs, seed)


def _config(kind: str, r: int, alpha: float, use_rslora: bool) -> LoraConfig:
    if kind == "adalora":
        return AdaLoraConfig(
            init_r=r, target_r=1, lora_alpha=alpha, total_step=8, target_modules=["proj"]
        )
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        use_dora=kind == "dora",
        target_modules=["proj"],
    )


def over_codes(
    case: Case, kind: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> Case:
    """The same layer over its base's weight as codes: QLoRA, whatever the adapter. Errors as of `quant.encode`."""
    layer = case.layer()
    base = layer.base_layer
    layer.base_layer = QuantizedLinear.from_linear(base, kind, block_size, double_quant)
    name = f"{case.name}, {kind} in blocks of {block_size}"
    return dataclasses.replace(case, name=name, subject=layer, weight=base.dense_weight())


def random_case(seed: int, kind: str = "lora", quantized: bool = False) -> Case:
    """A case of any shape from 1 x 1 to 64 x 64, any rank up to 80, either dtype; one to three adapters, or one DoRA.

    Over codes to 192 x 192: that is more than 256 blocks, and absmax with more than one scale.
    """
    rng = np.random.default_rng([seed, 1])

    def size(
        most: int,
    ) -> int:  # small ones are where shapes go wrong, large ones where rounding does
        return int(most ** rng.random())

    count, most = 1 if kind == "dora" else int(rng.integers(1, 4)), 193 if quantized else 65
    inputs, outputs = (max(size(most) for _ in range(1 + quantized)) for _ in range(2))
    ranks = [size(81 if rng.random() < 0.1 else 17) for _ in range(count)]
    case = make_case(
        seed,
        inputs,
        outputs,
        ranks[:1] * count if kind == "adalora" else ranks,
        [float(2 ** rng.uniform(-4, 6)) for _ in range(count)],
        str(rng.choice(["float32", "float64"])),
        bool(rng.integers(2)),
        bool(rng.integers(2)),
        (size(4), size(9)),
        tuple(map(int, rng.integers(-6, 4, 3))),  # type: ignore[arg-type]
        kind,
    )
    if not quantized:
        return case
    return over_codes(
        case, str(rng.choice(KINDS)), int(rng.choice(BLOCK_SIZES[:4])), bool(rng.integers(2))
    )


def cases_of(model: PeftModel, adapter_name: str = "default", seed: int = 0) -> Iterator[Case]:
    """Every adapted layer of a model, with a random input."""
    config = model.peft_config[adapter_name]
    for number, (path, layer) in enumerate(wrappers(model.get_base_model())):
        if not isinstance(layer, LoraLinear) or isinstance(
            layer.held.get(adapter_name), HeadAdapter
        ):
            continue  # a tied head's numbers are its embedding's
        if adapter_name in layer.adapters:
            rng, base = np.random.default_rng([seed, number]), layer.base_layer
            x = rng.standard_normal((2, 4, base.in_features)).astype(base.dtype)
            yield Case(path, layer, x, {adapter_name: _of_layer(config, path)}, seed + number)


def _of_layer(config: LoraConfig, path: str) -> LoraConfig:
    """The configuration of one layer of a model, for a model that is this layer, `proj`."""
    kind, names = type(config), ["use_rslora", "use_dora"]
    own: dict[str, Any] = {
        "lora_alpha": pattern_value(path, config.alpha_pattern, config.lora_alpha)
    }
    if isinstance(config, AdaLoraConfig):
        names += {f.name for f in dataclasses.fields(AdaLoraConfig)} - {
            f.name for f in dataclasses.fields(LoraConfig)
        }
        kept = config.rank_pattern.get(f"{path}.lora_E")
        own["rank_pattern"] = {} if kept is None else {"proj.lora_E": kept}
    else:
        own["r"] = config.rank(path)
    return kind(**own, **{name: getattr(config, name) for name in names}, target_modules=["proj"])
