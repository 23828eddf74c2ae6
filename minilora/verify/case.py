"""What a property is measured on: a layer with its adapters and an input; and its formula.

    Formula        y, dW and the gradients as the paper writes them, in a wider precision
    Case           the layer, its input, and what rounding may do to a result (`gamma`)
    make_case      a case of a given shape
    random_case    a case of any shape
    cases_of       a case for each adapted layer of a model
    over_codes     the same case with the base's weight in four or eight bits

Letters: N rows of x, I in, O out, r rank, k active adapters, u the unit roundoff. Shapes: X (N, I),
W (O, I), A (r, I), B (O, r), G = dL/dy (N, O), s the scaling, dW = s B A. AdaLoRA has E (r, 1): its
dW = s B diag(E) A is LoRA's, with diag(E) A in A's place. W is what the base computes with: over
codes, what they decode to.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import functional as F
from ..autograd import Tensor
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
from ..lora.maps import MapConfig
from ..lora.targets.plan import wrappers
from ..lora.targets.rules import pattern_value
from ..nn import Linear
from ..quant.codes import BLOCK_SIZES, KINDS
from ..quant.linear import QuantizedLinear

# The precision of a reference. (Where long double is as wide as double the bounds still hold, twice
# as large.)
WIDE: dict[Any, Any] = {
    np.dtype(np.float32): np.dtype(np.float64),
    np.dtype(np.float64): np.dtype(np.longdouble),
}

ADAPTERS: dict[str, type[LoraAdapter]] = {
    "lora": LoraAdapter,
    "dora": DoraAdapter,
    "adalora": AdaLoraAdapter,
}


def active_adapters(layer: LoraLinear) -> list[Any]:
    """The active adapters of a layer, in the order in which it adds them."""
    return [layer.adapters[name] for name in layer.active]


def unit_roundoff(dtype: Any) -> float:
    """u, half the distance from 1 to the next number of a dtype."""
    return float(np.finfo(dtype).eps) / 2


# ---- the formula, over values or over absolute values --------------------------------------------


class Formula(NamedTuple):
    """y = X W^T + b + sum over adapters of s (X A^T) B^T, the update of W and the gradients.

    factors    (A, B, s) of each active adapter; in AdaLoRA diag(E) A is its A
    """

    X: Array
    W: Array
    b: Array
    factors: list[tuple[Array, Array, float]]

    def __abs__(self) -> Formula:
        """The same over absolute values: what rounding errors are measured in."""
        factors = [(abs(A), abs(B), abs(s)) for A, B, s in self.factors]
        return Formula(abs(self.X), abs(self.W), abs(self.b), factors)

    def y(self) -> Array:
        """X W^T + b + sum s (X A^T) B^T (N, O)"""
        y = self.X @ self.W.T + self.b
        for A, B, s in self.factors:
            H = self.X @ A.T  # (N, r)
            y = y + s * (H @ B.T)
        return y

    def dW(self) -> Array:
        """sum s B A (O, I)"""
        return self.add_updates(np.zeros_like(self.W))

    def merged(self) -> Array:
        """W + sum s B A (O, I)"""
        return self.add_updates(self.W)

    def add_updates(self, total: Array) -> Array:
        """total + sum s B A (O, I)"""
        for A, B, s in self.factors:
            total = total + (s * B) @ A
        return total

    def dX(self, G: Array) -> Array:
        """G (W + sum s B A) (N, I)"""
        dX = G @ self.W
        for A, B, s in self.factors:
            dH = G @ B  # (N, r)
            dX = dX + s * (dH @ A)
        return dX

    def dA(self, G: Array, i: int = 0) -> Array:
        """s B^T G^T X (r, I), of the adapter number i"""
        _, B, s = self.factors[i]
        dH = G @ B  # (N, r)
        return s * (dH.T @ self.X)

    def dB(self, G: Array, i: int = 0) -> Array:
        """s G^T X A^T (O, r), of the adapter number i"""
        A, _, s = self.factors[i]
        H = self.X @ A.T  # (N, r)
        return s * (G.T @ H)


# ---- cases ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What a property is measured on. No measurement changes `original`: `layer` copies it.

    original   a layer with adapters, unmerged
    x          (batch, time, I) in the layer's dtype
    configs    the configuration of each adapter, with the r and lora_alpha of this layer
    seed       of all random numbers that a measurement draws
    w          (O, I) the weight that the base's codes were made from; None if unknown, or dense
    is_random  is it a random layer, and not one of a user's files?
    """

    name: str
    original: LoraLinear
    x: np.ndarray
    configs: dict[str, LoraConfig]
    seed: int = 0
    w: np.ndarray | None = None
    is_random: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.x.dtype

    @property
    def wide(self) -> np.dtype[Any]:
        """The dtype of a reference."""
        return WIDE[self.dtype]  # type: ignore[no-any-return]

    @property
    def u(self) -> float:
        """The unit roundoff of the layer's dtype."""
        return unit_roundoff(self.dtype)

    @property
    def rng(self) -> np.random.Generator:
        """A new generator, which draws the same numbers each time."""
        return np.random.default_rng(self.seed)

    @property
    def base(self) -> Any:
        return self.original.base_layer

    @property
    def adapters(self) -> dict[str, Any]:
        return self.original.adapters

    @property
    def first(self) -> str:
        """The name of the first configured adapter."""
        return next(iter(self.configs))

    def layer(self, *names: str) -> LoraLinear:
        """A copy of the layer and its base, without dropout, of which only the adapters train.

        The adapters `names` (or all) are active.
        """
        layer: LoraLinear = copy.deepcopy(self.original)
        layer.active = list(names or layer.adapters)
        for p in layer.parameters():
            p.requires_grad = False
        for adapter in layer.adapters.values():
            for p in adapter.parameters():
                p.requires_grad = True
        return layer.eval()  # type: ignore[no-any-return]

    def run(self, layer: Any) -> Array:
        """layer(x) as rows (N, O)"""
        y = layer(Tensor(self.x))
        return F.rows(y.data)

    def run_wide(self, layer: Any) -> Array:
        """layer(x) as rows (N, O), in the reference's dtype."""
        return self.run(layer).astype(self.wide)

    def formula(self, layer: LoraLinear) -> Formula:
        """What `layer`, with its active adapters, should compute."""
        base = layer.base_layer
        X = F.rows(self.x).astype(self.wide)
        W = base.dense_weight().astype(self.wide)
        b = np.zeros(1) if base.bias is None else base.bias.data
        factors = []
        for adapter in active_adapters(layer):
            A = adapter.lora_A.data.astype(self.wide)
            B = adapter.lora_B.data.astype(self.wide)
            if isinstance(adapter, AdaLoraAdapter):
                A = A * adapter.lora_E.data
            factors.append((A, B, float(adapter.scaling)))
        return Formula(X, W, b.astype(self.wide), factors)

    def draw_dY(self) -> Array:
        """dL/dy at random (batch, time, O), in the layer's dtype."""
        shape = (*self.x.shape[:-1], self.base.out_features)
        return self.rng.standard_normal(shape).astype(self.dtype)

    def wide_rows(self, dY: Array) -> Array:
        """G (N, O), in the reference's dtype, of dL/dy (batch, time, O)."""
        return F.rows(dY).astype(self.wide)

    def roundings(self, layer: LoraLinear, extra: int = 0) -> int:
        """How many roundings a product meets at most on its way into y: I + r + 2 + k.

        I in x A^T, r in (.) B^T, two with s (its own dtype is float64), k in sums with what the
        layer gives so far. AdaLoRA's product with E is one more.
        """
        adapters = active_adapters(layer)
        r: int = max(a.r for a in adapters)
        with_E = any(isinstance(a, AdaLoraAdapter) for a in adapters)
        I: int = layer.in_features
        return I + r + 2 + len(adapters) + with_E + extra

    def gamma(self, n: int, S: Array, dtype: Any = None) -> Array:
        """gamma_n S for n roundings in `dtype` (by default the layer's) and n in the reference's.

        The smallest normal number on top is far more than underflow can add (Higham 2002, equation
        2.8).
        """
        units = [unit_roundoff(d) for d in (dtype or self.dtype, self.wide)]
        gamma = sum(n * u / (1 - n * u) for u in units)
        return gamma * S + np.finfo(self.dtype).tiny


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
    """A random layer of this shape with an adapter for each of `ranks` and `alphas`.

    exponents    W, A and B are multiplied by two to these powers
    kind         "lora"; "dora", which allows one adapter per layer and gets random magnitudes; or
                 "adalora", whose E is random, and whose adapters share a budget and so one rank
    """
    rng = np.random.default_rng(seed)
    W, A, B = (2.0**e for e in exponents)
    b = rng.standard_normal(outputs).astype(dtype) if bias else None
    weight = W * rng.standard_normal((outputs, inputs))
    layer = LoraLinear(Linear(weight.astype(dtype), b))
    for p in layer.parameters():
        p.requires_grad = False
    sizes = {"lora_A": A, "lora_B": B, "lora_E": 1.0, "lora_magnitude_vector": W}
    configs = {}
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = make_config(kind, r, alpha, use_rslora)
        adapter = ADAPTERS[kind](layer.base_layer, "proj", config, rng, stream=i)
        for tensor in adapter.TENSORS:
            p = getattr(adapter, tensor)
            p.data = (sizes[tensor] * rng.standard_normal(p.shape)).astype(dtype)
        configs[f"a{i}"] = config
        layer.adapters[f"a{i}"] = adapter
    layer.active = list(layer.adapters)
    x = rng.standard_normal((*rows, inputs)).astype(dtype)
    name = f"{dtype}, {kind}, W {outputs} x {inputs}, r = {', '.join(map(str, ranks))}, seed {seed}"
    return Case(name, layer.eval(), x, configs, seed, is_random=True)


def make_config(kind: str, r: int, alpha: float, use_rslora: bool) -> LoraConfig:
    """The configuration of an adapter of this kind in a model that is one layer, `proj`."""
    target = ["proj"]
    if kind == "adalora":
        return AdaLoraConfig(
            init_r=r, target_r=1, lora_alpha=alpha, total_step=8, target_modules=target
        )
    dora = kind == "dora"
    return LoraConfig(
        r=r, lora_alpha=alpha, use_rslora=use_rslora, use_dora=dora, target_modules=target
    )


def over_codes(
    case: Case, kind: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> Case:
    """The same case with its base's weight as codes: QLoRA, whatever the adapter.

    Raises what `quant.encode` raises.
    """
    layer = case.layer()
    w = layer.base_layer.dense_weight()
    layer.base_layer = QuantizedLinear.from_linear(layer.base_layer, kind, block_size, double_quant)
    name = f"{case.name}, {kind} in blocks of {block_size}"
    return dataclasses.replace(case, name=name, original=layer, w=w)


def random_case(seed: int, kind: str = "lora", quantized: bool = False) -> Case:
    """A case of any shape from 1 x 1 to 64 x 64, any rank up to 80, either dtype.

    It has one to three adapters, or one DoRA. Over codes it has up to 192 x 192 weights: that is
    more than 256 blocks, and absmax with more than one scale.
    """
    rng = np.random.default_rng([seed, 1])

    def draw_size(end: int) -> int:
        """From 1 to end - 1: shapes go wrong where it is small, rounding where it is large."""
        return int(end ** rng.random())

    def draw_flag() -> bool:
        return bool(rng.integers(2))

    def draw_side() -> int:
        if quantized:
            return max(draw_size(193), draw_size(193))
        return draw_size(65)

    count = 1 if kind == "dora" else int(rng.integers(1, 4))
    inputs = draw_side()
    outputs = draw_side()
    ranks = [draw_size(81 if rng.random() < 0.1 else 17) for _ in range(count)]
    if kind == "adalora":
        ranks = ranks[:1] * count
    alphas = [float(2 ** rng.uniform(-4, 6)) for _ in range(count)]
    dtype = str(rng.choice(["float32", "float64"]))
    use_rslora = draw_flag()
    bias = draw_flag()
    rows = draw_size(4), draw_size(9)
    W, A, B = (int(e) for e in rng.integers(-6, 4, 3))
    case = make_case(
        seed, inputs, outputs, ranks, alphas, dtype, use_rslora, bias, rows, (W, A, B), kind
    )
    if not quantized:
        return case
    code = str(rng.choice(KINDS))
    block_size = int(rng.choice(BLOCK_SIZES[:4]))
    return over_codes(case, code, block_size, double_quant=draw_flag())


def cases_of(model: PeftModel, adapter_name: str = "default", seed: int = 0) -> Iterator[Case]:
    """A case for each adapted layer of a model, with a random input.

    A tied head has none: its numbers are its embedding's.
    """
    config = model.peft_config[adapter_name]
    for number, (path, layer) in enumerate(wrappers(model.get_base_model())):
        if not isinstance(layer, LoraLinear):
            continue
        if isinstance(layer.entries.get(adapter_name), HeadAdapter):
            continue
        if adapter_name not in layer.adapters:
            continue
        base = layer.base_layer
        rng = np.random.default_rng([seed, number])
        x = rng.standard_normal((2, 4, base.in_features)).astype(base.dtype)
        configs = {adapter_name: layer_config(config, path)}
        yield Case(path, layer, x, configs, seed + number)


def layer_config(config: LoraConfig, path: str) -> LoraConfig:
    """The configuration of one layer of a model, for a model that is this layer, `proj`."""
    if isinstance(config, MapConfig):
        return config  # its map is the layer's already
    names = ["use_rslora", "use_dora"]
    alpha = pattern_value(path, config.alpha_pattern, config.lora_alpha)
    fields: dict[str, Any] = {"lora_alpha": alpha, "target_modules": ["proj"]}
    if isinstance(config, AdaLoraConfig):
        common = {field.name for field in dataclasses.fields(LoraConfig)}
        names += {field.name for field in dataclasses.fields(config)} - common
        mask = config.rank_pattern.get(f"{path}.lora_E")
        fields["rank_pattern"] = {} if mask is None else {"proj.lora_E": mask}
    else:
        fields["r"] = config.rank(path)
    fields |= {name: getattr(config, name) for name in names}
    return type(config)(**fields)
