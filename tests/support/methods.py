"""Every kind of adapter over every kind of base on every backend: the table that test_methods.py goes through.

A method's line says what its paper says of it, in numbers that no line of the package has computed.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import small
from strict_xp import STRICT

from minilora.autograd import Tensor, gradients
from minilora.backend import NUMPY, Backend
from minilora.lora import (
    AdaLoraConfig,
    HydraConfig,
    LoraConfig,
    LoraLinear,
    PeftModel,
    get_peft_model,
)
from minilora.models.transformer import CausalLM
from minilora.nn import Linear
from minilora.quant import KINDS, quantize
from minilora.quant.half import convert_to_half, encode_half, half_weight_owners

R = 3


class Method(NamedTuple):
    """One kind of adapter.

    config    its configuration; rank R unless told
    count     the numbers that it trains in a layer of I inputs and O outputs
    moves     the tensors that have a gradient at the start
    constant  methods of the adapter whose values its gradient takes for constants, by definition
    merges    is there a dW, that can be merged, and formed for a step? ConfigError says so where there is none
    """

    config: Callable[..., LoraConfig]
    count: Callable[[int, int], int]
    moves: set[str]
    constant: tuple[str, ...] = ()
    merges: bool = True


METHODS = {
    "lora": Method(functools.partial(LoraConfig, r=R), lambda i, o: R * (i + o), {"lora_B"}),
    "rslora": Method(
        functools.partial(LoraConfig, r=R, use_rslora=True), lambda i, o: R * (i + o), {"lora_B"}
    ),
    "dora": Method(
        functools.partial(LoraConfig, r=R, use_dora=True),
        lambda i, o: R * (i + o) + o,
        {"lora_B", "lora_magnitude_vector"},
        constant=("norms",),
    ),
    "adalora": Method(
        functools.partial(AdaLoraConfig, init_r=R, target_r=2, total_step=9),
        lambda i, o: R * (i + o + 1),
        {"lora_E"},
    ),
    "hydra": Method(
        functools.partial(HydraConfig, r=R, experts=2),
        lambda i, o: R * i + 2 * (R * o + i),
        {"lora_B"},
        merges=False,
    ),
}
BASES = ("dense", "bfloat16", "nf4", "fp4", "int8")
BACKENDS: dict[str, Backend] = {"cpu": NUMPY, "strict": STRICT}


class Combination(NamedTuple):
    """A line of the table."""

    name: str  # of the method
    kind: str  # of the base's weights
    device: str

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.device]

    def config(self, **changes: Any) -> LoraConfig:
        return self.method.config(**{"lora_alpha": 6, "target_modules": "all-linear", **changes})

    def base(self, dtype: str = "float32") -> CausalLM:
        model = small.base(dtype, self.backend, num_hidden_layers=1)
        if self.kind in KINDS:
            quantize(model, self.kind)
        elif self.kind != "dense":
            for module in half_weight_owners(model).values():
                module.weight.data = encode_half(module.weight.data, self.kind).decode(dtype)
            convert_to_half(model, self.kind)
        return model

    def model(self, dtype: str = "float32", moved: bool = True, **changes: Any) -> PeftModel:
        """A base with one adapter; `moved`: away from its start, as if it had been trained."""
        made = get_peft_model(self.base(dtype), self.config(**changes), seed=2)
        if moved:
            move(made, "default")
        return made.eval()  # type: ignore[no-any-return]


TABLE = list(itertools.starmap(Combination, itertools.product(METHODS, BASES, BACKENDS)))


def move(model: PeftModel, name: str, seed: int = 3) -> None:
    rng = np.random.default_rng(seed)
    for p in model.adapter_parameters(name).values():
        p.data = p.data + p.backend.from_numpy((rng.standard_normal(p.shape) / 4).astype(p.dtype))


def layers(model: PeftModel) -> dict[str, LoraLinear]:
    return {
        path: m for path, m in model.get_base_model().named_modules() if isinstance(m, LoraLinear)
    }


def tensors(layer: LoraLinear, name: str = "default") -> list[Any]:
    """One adapter's parameters, in the order of its TENSORS."""
    return [getattr(layer.adapters[name], tensor) for tensor in layer.adapters[name].TENSORS]


def hold(adapter: Any, method: Method, W: Any) -> None:
    """Let what the adapter's gradient takes for constants be constants: the values they have over W."""
    for name in method.constant:
        value = getattr(adapter, name)(W)
        setattr(adapter, name, lambda W, value=value: value)


def absolute(layer: LoraLinear, method: Method, x: Any, dy: Any) -> list[Any]:
    """S of y and of every gradient, that of x first: what their rounding errors are measured in.

    It is what the layer computes over absolute values, where nothing cancels. The base's own part counts twice more:
    DoRA takes it away and adds it again.
    """
    twin, base = copy.deepcopy(layer), layer.base_layer
    twin.end_step()
    W, xp = base.dense_weight(), base.backend.xp
    twin.base_layer = Linear(xp.abs(W), None if base.bias is None else xp.abs(base.bias.data))
    for adapter in twin.adapters.values():
        hold(adapter, method, W)
        for p in adapter.parameters():
            p.data = xp.abs(p.data)
    leaf = Tensor(xp.abs(x), requires_grad=True)
    y = twin(leaf) + 2 * twin.base_layer(leaf)
    return [y.data, *gradients(y, [leaf, *tensors(twin)], xp.abs(dy))]


def gamma(n: int, dtype: Any) -> float:
    """n u / (1 - n u): what n roundings do at most (Higham 2002, lemma 3.1)."""
    u = float(np.finfo(dtype).eps) / 2
    return n * u / (1 - n * u)
