"""What a theorem of training is measured on: a small language model with adapters, trained.

    Study           the shapes, the dtype and the seed of a base, its adapters and its texts
    train           training, and its losses
    recorded_steps  training, with what the gradients of each step were made of
    take_step       the same for one step
    expect_same     for a claim that is false: is the difference more than rounding?

Letters are case.py's. A step is the engine's own: gradients of a `ShardedStep`, clipped, then an
optimiser of `optim` or of `lora.optimizers`. Where rounding grows over a run, the claim is about a
step from a common state, and the bounds of the steps are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..data.batches import Batch
from ..lora import LoraConfig, LoraLinear, PeftModel, get_peft_model
from ..lora.targets.plan import wrappers
from ..models.config import TransformerConfig
from ..models.transformer import CausalLM
from ..nn import Parameter
from ..optim import Optimizer, clip_by_global_norm, warmup_cosine
from ..training.parallel import ShardedStep
from .case import Case, Formula, unit_roundoff
from .measuring import (
    Measured,
    Property,
    Registrar,
    always,
    compare,
    gradient_errors,
    make_registrar,
)

TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")
SEQUENCES, CONTEXT = 4, 8
SHARD = 4  # sequences: one shard, and two where two batches are one
WARMUP = 2  # steps
NAME = "default"  # of an adapter
Pairs = list[tuple[Any, Any]]  # errors and bounds
MakeOptimizer = Callable[[PeftModel], Optimizer]
APART = 2.0**10  # roundings: a claim whose two sides are further apart is false


def make_registrars(properties: list[Property]) -> tuple[Registrar, Registrar]:
    """Two decorators with a name, an equation and a source: of a claim that holds, of a false one.

    Both append to `properties`.
    """
    return make_registrar(properties, always), make_registrar(properties, always, is_true=False)


@dataclass(frozen=True)
class Study:
    """A base with random weights, an adapter, and random texts, all of them from the seed."""

    seed: int
    dtype: str = "float32"
    r: int = 4
    use_rslora: bool = False
    blocks: int = 2

    @property
    def name(self) -> str:
        method = "rsLoRA" if self.use_rslora else "LoRA"
        return f"{self.dtype}, {method}, r = {self.r}, seed {self.seed}"

    @property
    def rng(self) -> np.random.Generator:
        """A new generator, which draws the same numbers each time."""
        return np.random.default_rng(self.seed)

    def in_float64(self) -> Study:
        """The same in float64: where a claim is false, no rounding should be what shows it."""
        return replace(self, dtype="float64")

    def base(self) -> CausalLM:
        config = TransformerConfig(
            vocab_size=23,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=self.blocks,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
        return CausalLM(config, self.seed, self.dtype)

    def config(self, **fields: Any) -> LoraConfig:
        defaults = {
            "r": self.r,
            "lora_alpha": 2.0 * self.r,
            "use_rslora": self.use_rslora,
            "target_modules": list(TARGETS),
        }
        return LoraConfig(**{**defaults, **fields})

    def model(self, **fields: Any) -> PeftModel:
        """The base with an adapter; `fields` of its configuration may differ."""
        return get_peft_model(self.base(), self.config(**fields), seed=self.seed)

    def batches(self, count: int, text: int = 0, sequences: int = SEQUENCES) -> list[Batch]:
        """Batches of the text number `text`."""
        rng = np.random.default_rng([self.seed, text])
        batches = []
        for _ in range(count):
            ids = rng.integers(0, 23, (sequences, CONTEXT + 1))
            batches.append(Batch(ids[:, :-1], ids[:, 1:]))
        return batches


def random_study(seed: int) -> Study:
    rng = np.random.default_rng([seed, 2])
    dtype = ("float32", "float64")[seed % 2]
    return Study(seed, dtype, int(rng.integers(4, 7)), bool(rng.integers(2)))


# ---- parts of a model ----------------------------------------------------------------------------


def adapted_layers(model: PeftModel) -> dict[str, LoraLinear]:
    """The layers with adapters by their path."""
    layers = {}
    for path, layer in wrappers(model.get_base_model()):
        assert isinstance(layer, LoraLinear)
        layers[path] = layer
    return layers


def trained(model: Any) -> list[Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gamma_float64(n: int, S: Array) -> Array:
    """gamma_n S in float64, twice: for what is measured and for what it is measured against."""
    u = unit_roundoff(np.float64)
    bound: Array = 2 * n * u / (1 - n * u) * S + np.finfo(np.float64).tiny
    return bound


def factors_of(layer: LoraLinear, name: str = NAME) -> tuple[Array, Array, float]:
    """A (r, I), B (O, r) in float64 and s of an adapter."""
    adapter = layer.adapters[name]
    return *adapter.factors(np.float64), adapter.scaling


def set_factors(layer: LoraLinear, A: Array, B: Array, name: str = NAME) -> None:
    adapter = layer.adapters[name]
    adapter.lora_A.data = A.astype(adapter.lora_A.dtype)
    adapter.lora_B.data = B.astype(adapter.lora_B.dtype)


def weight_of(layer: LoraLinear) -> Array:
    """W (O, I) of the base, in float64."""
    W: Array = layer.base_layer.dense_weight().astype(np.float64)
    return W


def on_grid(a: Array, bits: int) -> Array:
    """`a` in multiples of 2^-bits: products and short sums of such numbers have no rounding."""
    grid: Array = np.round(a * 2.0**bits) / 2.0**bits
    return grid.astype(a.dtype)


def put_on_grid(model: PeftModel) -> None:
    """Short binary numbers for W, A and B: W + s B A, s a power of two, has no rounding."""
    for layer in adapted_layers(model).values():
        layer.base_layer.weight.data = on_grid(layer.base_layer.weight.data, 10)
        A, B, _ = factors_of(layer)
        set_factors(layer, on_grid(A, 4), on_grid(B, 8))


# ---- training ------------------------------------------------------------------------------------


def open_step(model: Any) -> ShardedStep:
    """What computes the gradients of a step, to be used in a `with` block."""
    return ShardedStep(model, threads=1, shard=SHARD, keep_memory=False)


def loss_gradients(
    model: Any, batch: Batch, params: Sequence[Parameter]
) -> tuple[float, list[Any]]:
    """The mean loss of a batch, and its gradients."""
    with open_step(model) as sharded:
        loss, grads = sharded.gradients(batch, params)
    return float(loss), grads


class LayerStep(NamedTuple):
    """What the gradient of one adapted layer, at `path`, was made of in one step.

    case              the layer, with the step's inputs as its x
    formula           of the weights before the step, in the reference's dtype
    G                 dL/dy (N, O), likewise
    bound_A, bound_B  how far the engine's dA and dB may be from the formula's
    """

    path: str
    case: Case
    layer: LoraLinear
    adapter: Any
    formula: Formula
    G: Array
    bound_A: Array
    bound_B: Array

    @property
    def dA(self) -> Array:
        """s Bᵀ Gᵀ X (r, I)"""
        return self.formula.dA(self.G)

    @property
    def dB(self) -> Array:
        """s Gᵀ X Aᵀ (O, r)"""
        return self.formula.dB(self.G)

    @property
    def dW(self) -> Array:
        """dL/dW = Gᵀ X (O, I)"""
        return self.G.T @ self.formula.X


class Recorder:
    """Keeps X (N, I) and dL/dy (N, O) of every adapted layer of a model during its steps.

    Layers compute their gradients from W + dW formed once per step, and hand both arrays to the
    adapter: see `LoraAdapter.write_effective_weight`.
    """

    def __init__(self, model: PeftModel):
        self.layers = adapted_layers(model)
        self.products: dict[str, list[tuple[Array, Array]]] = {path: [] for path in self.layers}
        for path, layer in self.layers.items():
            [name] = layer.active
            self._record(layer.adapters[name], self.products[path])

    def _record(self, adapter: Any, products: list[tuple[Array, Array]]) -> None:
        real = adapter.write_effective_weight

        def write_effective_weight(W: Array, base: Any = None) -> Any:
            params, pull = real(W, base)

            def gradients(X: Array, dY: Array, *Y: Array) -> Any:
                products.append((X.copy(), dY.copy()))
                return pull.gradients(X, dY, *Y)

            return params, pull._replace(gradients=gradients)

        adapter.write_effective_weight = write_effective_weight

    def take(self) -> Iterator[LayerStep]:
        """What was recorded of each layer since the last call."""
        for path, layer in self.layers.items():
            inputs, slopes = zip(*self.products[path], strict=True)
            self.products[path].clear()
            case = Case(path, layer, np.concatenate(inputs), {})
            formula = case.formula(layer)
            G = np.concatenate(slopes).astype(case.wide)
            [name] = layer.active
            zero = (np.zeros(1), np.zeros(1))  # only the bounds are needed
            (_, bound_A), (_, bound_B) = gradient_errors(case, layer, formula, G, [zero])
            yield LayerStep(path, case, layer, layer.adapters[name], formula, G, bound_A, bound_B)


def take_steps(
    model: PeftModel,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    max_norm: float = math.inf,
    schedule: bool = False,
    recorder: Recorder | None = None,
) -> Iterator[tuple[float, list[LayerStep]]]:
    """Train; yield each step's loss, and what was recorded, before the weights change."""
    with open_step(model) as sharded:
        for number, batch in enumerate(batches):
            loss, grads = sharded.gradients(batch, optimizer.params, step=number)
            yield float(loss), list(recorder.take()) if recorder else []
            clipped, _ = clip_by_global_norm(grads, max_norm)
            scale = warmup_cosine(number, len(batches), WARMUP) if schedule else 1.0
            optimizer.step(clipped, scale)


def train(*arguments: Any, **options: Any) -> list[float]:
    """The losses of `take_steps`."""
    return [loss for loss, _ in take_steps(*arguments, **options)]


def recorded_steps(
    model: PeftModel, optimizer: Optimizer, batches: Sequence[Batch]
) -> Iterator[list[LayerStep]]:
    """Train; yield what each step's gradients were made of, before the weights change."""
    for _, layer_steps in take_steps(model, optimizer, batches, recorder=Recorder(model)):
        yield layer_steps


def take_step(model: PeftModel, optimizer: Optimizer, batch: Batch) -> list[LayerStep]:
    """Take one step; what its gradients were made of."""
    [layer_steps] = recorded_steps(model, optimizer, [batch])
    return layer_steps


# ---- a claim that is false -----------------------------------------------------------------------


def expect_same(a: Any, b: Any) -> Measured:
    """|a - b| beside a thousand roundings of the largest number, in float64."""
    u = np.finfo(np.float64).eps / 2
    return compare(np.max(np.abs(a - b)), APART * u * np.max(np.abs(b)))
