"""Every kind of adapter over every base and backend: the table of test_method_table.py.

A method's row states what its paper states, in numbers that the package has not computed.
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

    config    its configuration, of rank R by default
    count     the number of trainable numbers in a layer of I inputs and O outputs
    keys      the ends of its tensors' names in PEFT's files
    moves     the tensors that have a gradient at the start
    constant  methods of the adapter whose values its gradient takes for constants, by definition
    merges    whether a dW exists that can be merged, and formed for a step; ConfigError otherwise
    """

    config: Callable[..., LoraConfig]
    count: Callable[[int, int], int]
    keys: set[str]
    moves: set[str]
    constant: tuple[str, ...] = ()
    merges: bool = True


PAIR = {"lora_A.weight", "lora_B.weight"}
METHODS: dict[str, Method] = {}
METHODS["lora"] = Method(
    functools.partial(LoraConfig, r=R),
    count=lambda I, O: R * (I + O),
    keys=PAIR,
    moves={"lora_B"},
)
METHODS["rslora"] = METHODS["lora"]._replace(
    config=functools.partial(LoraConfig, r=R, use_rslora=True)
)
METHODS["dora"] = Method(
    functools.partial(LoraConfig, r=R, use_dora=True),
    count=lambda I, O: R * (I + O) + O,
    keys=PAIR | {"lora_magnitude_vector"},
    moves={"lora_B", "lora_magnitude_vector"},
    constant=("norms",),
)
METHODS["adalora"] = Method(
    functools.partial(AdaLoraConfig, init_r=R, target_r=2, total_step=9),
    count=lambda I, O: R * (I + O + 1),
    keys={"lora_A", "lora_E", "lora_B"},
    moves={"lora_E"},
)
METHODS["hydra"] = Method(
    functools.partial(HydraConfig, r=R, experts=2),
    count=lambda I, O: R * I + 2 * (R * O + I),
    keys=PAIR | {"lora_route.weight"},
    moves={"lora_B"},
    merges=False,
)
BASES = ("dense", "bfloat16", "nf4", "fp4", "int8")
BACKENDS: dict[str, Backend] = {"cpu": NUMPY, "strict": STRICT}


class Combination(NamedTuple):
    """A row of the table: a method, the kind of the base's weights, and a device."""

    name: str
    kind: str
    device: str

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.device]

    def config(self, **changes: Any) -> LoraConfig:
        fields = {"lora_alpha": 6, "target_modules": "all-linear"}
        return self.method.config(**fields | changes)

    def base(self, dtype: str = "float32") -> CausalLM:
        model = small.base(dtype, self.backend, num_hidden_layers=1)
        if self.kind == "dense":
            return model
        if self.kind in KINDS:
            quantize(model, self.kind)
            return model
        for module in half_weight_owners(model).values():
            module.weight.data = encode_half(module.weight.data, self.kind).decode(dtype)
        convert_to_half(model, self.kind)
        return model

    def model(self, dtype: str = "float32", moved: bool = True, **changes: Any) -> PeftModel:
        """A base with one adapter; `moved`: away from its start, as if it had been trained."""
        model = get_peft_model(self.base(dtype), self.config(**changes), seed=2)
        if moved:
            move(model, "default")
        return model.eval()  # type: ignore[no-any-return]


TABLE = list(itertools.starmap(Combination, itertools.product(METHODS, BASES, BACKENDS)))


def move(model: PeftModel, name: str, seed: int = 3) -> None:
    """Add noise to every parameter of the adapter `name`."""
    rng = np.random.default_rng(seed)
    for p in model.adapter_parameters(name).values():
        noise = (rng.standard_normal(p.shape) / 4).astype(p.dtype)
        p.data = p.data + p.backend.from_numpy(noise)


def layers(model: PeftModel) -> dict[str, LoraLinear]:
    """The adapted layers, by path."""
    modules = model.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, LoraLinear)}


def tensors(layer: LoraLinear, name: str = "default") -> list[Any]:
    """One adapter's parameters, in the order of its TENSORS."""
    adapter = layer.adapters[name]
    return [getattr(adapter, tensor) for tensor in adapter.TENSORS]


def freeze_constants(adapter: Any, method: Method, W: Any) -> None:
    """Fix what the adapter's gradient takes for constants at the values that they have over W."""
    for name in method.constant:
        value = getattr(adapter, name)(W)
        setattr(adapter, name, lambda W, value=value: value)


def absolute(layer: LoraLinear, method: Method, x: Any, dy: Any) -> list[Any]:
    """S of y and of every gradient, that of x first: the scale of their rounding errors.

    It is what the layer computes over absolute values, where nothing cancels. The base's own part
    counts twice more: DoRA subtracts it and adds it again.
    """
    twin = copy.deepcopy(layer)
    twin.end_step()
    base = layer.base_layer
    W = base.dense_weight()
    xp = base.backend.xp
    bias = None if base.bias is None else xp.abs(base.bias.data)
    twin.base_layer = Linear(xp.abs(W), bias)
    for adapter in twin.adapters.values():
        freeze_constants(adapter, method, W)
        for p in adapter.parameters():
            p.data = xp.abs(p.data)
    leaf = Tensor(xp.abs(x), requires_grad=True)
    y = twin(leaf) + 2 * twin.base_layer(leaf)
    return [y.data, *gradients(y, [leaf, *tensors(twin)], xp.abs(dy))]


def gamma(n: int, dtype: Any) -> float:
    """n u / (1 - n u): the most that n roundings do (Higham 2002, lemma 3.1)."""
    u = float(np.finfo(dtype).eps) / 2
    return n * u / (1 - n * u)
