"""Any history of a model with adapters of every kind, beside a plain dense model.

The plain model's weights are made here by the equations of the papers, from the tensors and the
fields of an adapter's files, and from nothing else of the package. After every step the two have
one output, and no adapter's tensors have changed by themselves.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from methods import move
from peft_models import PREFIX, is_close
from small import base, logits

from minilora.errors import ConfigError
from minilora.lora import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from minilora.models.transformer import CausalLM
from minilora.quant import quantize

Arrays = dict[str, np.ndarray]
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
BASES: dict[str, Callable[[], CausalLM]] = {
    "untied": lambda: base("float64", **SIZES),
    "tied": lambda: base("float64", tie_word_embeddings=True, **SIZES),
    "int8": lambda: quantize(base("float64", **SIZES), "int8"),
}

Q = {"target_modules": ["q_proj", "up_proj"]}
ENDS = {"target_modules": ["v_proj", "embed_tokens"]}
KINDS: dict[str, LoraConfig] = {
    "plain": LoraConfig(r=2, lora_alpha=3, **Q),
    "ranks": LoraConfig(r=3, rank_pattern={"q_proj": 1}, alpha_pattern={"up_proj": 7}, **Q),
    "rslora": LoraConfig(r=3, use_rslora=True, target_modules="all-linear"),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["k_proj", "q_proj"]),
    "dora of an embedding": LoraConfig(r=2, use_dora=True, **ENDS),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=9, **Q),
    "embedding": LoraConfig(r=2, **ENDS),
    "head": LoraConfig(r=2, target_modules=["lm_head", "o_proj"]),
    "one for both": LoraConfig(r=2, ensure_weight_tying=True, **ENDS),
    "norm": LoraConfig(r=1, modules_to_save=["norm"], **Q),
    "saved head": LoraConfig(r=1, modules_to_save=["lm_head"], **Q),
    "tokens": LoraConfig(r=1, trainable_token_indices=[3, 1], **Q),
    "tokens apart": LoraConfig(
        r=1, trainable_token_indices={"embed_tokens": [3], "lm_head": [4, 5]}, **Q
    ),
    "biases": LoraConfig(r=1, bias="lora_only", **Q),
}
NAMES = ("default", "adapters", "lora_A", "a b")
FACTORS = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
FACTORS |= {"lora_E": "E", "lora_magnitude_vector": "m"}


def add_layer(W: np.ndarray, path: str, factors: Arrays, config: LoraConfig) -> np.ndarray:
    """W as the factors of one adapter change it.    W (O, I), or (V, C) of an embedding"""
    r = len(factors["A"])
    alphas = [alpha for name, alpha in config.alpha_pattern.items() if path.endswith(f".{name}")]
    alpha = alphas[0] if alphas else config.lora_alpha
    A = factors["A"]
    scale = alpha / (math.sqrt(r) if config.use_rslora else r)
    if isinstance(config, AdaLoraConfig):
        A = factors["E"] * A
        scale = config.lora_alpha / (config.init_r + 1e-5)
    dW = scale * (factors["B"] @ A)
    rows = W.T if path == EMBEDDING else W
    V = rows + dW
    if "m" in factors:
        V *= (factors["m"] / np.linalg.norm(V, axis=1))[:, None]
    return V.T if path == EMBEDDING else V


def add_adapter(weights: Arrays, config: LoraConfig, tensors: Arrays, tied: bool) -> None:
    """Make in `weights` the changes that one adapter means."""
    layers: dict[str, Arrays] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        path, _, last = name.removesuffix(".weight").rpartition(".")
        if last in FACTORS:
            layers.setdefault(path, {})[FACTORS[last]] = tensor
        elif last == "trainable_tokens_delta":
            path = path.removesuffix(".token_adapter")
            rows = config.trainable_token_indices
            if isinstance(rows, dict):
                rows = rows[path.rpartition(".")[2]]
            weights[f"{path}.weight"][rows] = tensor
            if tied and not isinstance(config.trainable_token_indices, dict):
                weights[f"{HEAD}.weight"][rows] = tensor
        elif not name.endswith(".base_layer.weight"):
            weights[name.replace(".base_layer", "")] = tensor
    for path, factors in layers.items():
        weight = f"{path}.weight"
        weights[weight] = add_layer(weights[weight], path, factors, config)


class Histories(RuleBasedStateMachine):
    """What is tried may be refused, but then nothing has changed."""

    @initialize(kind=st.sampled_from(sorted(BASES)), first=st.sampled_from(sorted(KINDS)))
    def start(self, kind: str, first: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.tolerance = 1e-11
        self.plain = BASES[kind]()
        self.weights = self.read_weights()
        self.model: Any = None
        try:
            self.wrap("default", first)
        except ConfigError:
            self.wrap("default", "plain")

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    def read_weights(self) -> Arrays:
        """The plain model's parameters, the head's own among them, decoded to float64."""
        self.tied = self.plain.config.tie_word_embeddings
        weights = {}
        for path, module in self.plain.named_modules():
            for name in ("weight", "bias"):
                if getattr(module, name, None) is not None:
                    dense = name == "weight" and hasattr(module, "dense_weight")
                    data = module.dense_weight() if dense else getattr(module, name).data
                    weights[f"{path}.{name}"] = np.array(data, np.float64)
        return weights

    def expected(self, names: Any) -> np.ndarray:
        """The logits of a plain model that these adapters have changed."""
        weights = {name: W.copy() for name, W in self.weights.items()}
        for name in names:
            add_adapter(weights, self.configs[name], self.tensors[name], self.tied)
        config = dataclasses.replace(self.plain.config, tie_word_embeddings=False)
        model = CausalLM(config, dtype="float64")
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        return logits(model)

    def remember(self, name: str) -> None:
        """Take an adapter's tensors as they are now."""
        config = self.model.peft_config[name]
        tensors = self.model.state_dict(name)
        self.configs[name] = config
        self.tensors[name] = {key: np.array(a, np.float64) for key, a in tensors.items()}
        if config.bias != "none":  # they stay in the base
            for key, tensor in self.tensors[name].items():
                if key.endswith(".base_layer.bias"):
                    path = key.removeprefix(PREFIX).replace(".base_layer", "")
                    self.weights[path] = tensor

    def wrap(self, name: str, kind: str) -> None:
        model = get_peft_model(self.plain, KINDS[kind], name)
        self.configs: dict[str, LoraConfig] = {}
        self.tensors: dict[str, Arrays] = {}
        self.model = model.eval()
        move(model, name)
        self.remember(name)

    def attempt(self, call: Callable[..., Any], *inputs: Any, **options: Any) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what is replaced, or unmerged first
            try:
                call(*inputs, **options)
            except ConfigError:
                return False
        return True

    # ---- steps ----

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9))
    def add(self, name: str, kind: str, seed: int) -> None:
        if self.attempt(self.model.add_adapter, name, KINDS[kind], seed):
            if not self.model.merged_adapters:
                move(self.model, name, seed)
            self.remember(name)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    def switch(self, names: list[str]) -> None:
        self.attempt(self.model.set_adapter, names)

    @rule(
        names=st.none() | st.lists(st.sampled_from(NAMES), min_size=1),
        tied=st.sampled_from([None, "untie"]),
    )
    def merge(self, names: list[str] | None, tied: str | None) -> None:
        self.attempt(self.model.merge_adapter, names, tied=tied)

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    @precondition(lambda self: len(self.model.peft_config) > 1)
    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        if self.attempt(self.model.delete_adapter, name):
            del self.tensors[name]

    @rule(seed=st.integers(0, 9))
    def train(self, seed: int) -> None:
        if not self.model.merged_adapters:
            name = self.model.active_adapters[0]
            move(self.model, name, seed)
            self.remember(name)

    @rule(name=st.sampled_from(NAMES), again=st.sampled_from(NAMES))
    def save_and_load(self, name: str, again: str) -> None:
        if self.attempt(self.model.save_pretrained, self.folder, [name]):
            folder = self.folder if name == "default" else self.folder / name
            if self.attempt(self.model.load_adapter, folder, again):
                self.remember(again)
                for key, tensor in self.tensors[name].items():
                    assert np.array_equal(self.tensors[again][key], tensor)

    @rule()
    def to_float32(self) -> None:
        self.model.to(dtype="float32")
        self.tolerance = 1e-3
        for name in self.model.peft_config:
            self.remember(name)

    @rule(names=st.none() | st.lists(st.sampled_from(NAMES), min_size=1))
    def merge_and_unload(self, names: list[str] | None) -> None:
        used = dict.fromkeys([*self.model.merged_adapters, *(names or self.model.active_adapters)])
        if self.attempt(self.model.merge_and_unload, adapter_names=names, tied="untie"):
            assert is_close(logits(self.plain), self.expected(used), self.tolerance)
            self.weights = self.read_weights()
            self.wrap("default", "plain")

    # ---- what holds after each ----

    @invariant()
    def the_output_is_that_of_the_dense_model(self) -> None:
        if getattr(self, "model", None) is None:
            return
        model: PeftModel = self.model
        expected = self.expected(model.active_adapters)
        assert is_close(logits(model), expected, self.tolerance)
        with model.disable_adapter():
            assert is_close(logits(model), self.expected([]), self.tolerance)
        assert set(model.peft_config) == set(self.tensors)
        for name, tensors in self.tensors.items():
            now = model.state_dict(name)
            assert now.keys() == tensors.keys()
            assert all(np.array_equal(now[key], tensors[key]) for key in tensors)


TestHistories = Histories.TestCase
TestHistories.settings = settings(stateful_step_count=8)
pytestmark = pytest.mark.filterwarnings("ignore:(ensure_weight_tying|the adapter trained)")
