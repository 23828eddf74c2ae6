"""Helpers for tests beside torch, transformers and peft; without these three they skip."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minilora import lora
from minilora.lora import PeftModel
from minilora.models.transformer import CausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # on models this small, threads only wait for each other
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = np.random.default_rng(0).integers(0, 13, (2, 9))


def save_llama(folder: Path) -> Any:
    """Transformers' model, saved to this folder."""
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model.parameters())
    model.save_pretrained(folder)
    return model


# ---- adapters on either side ----


def make_theirs(model: Any, options: dict[str, Any]) -> Any:
    """A copy of transformers' `model` with a new adapter of peft's."""
    name = "AdaLoraConfig" if "init_r" in options else "LoraConfig"
    config = getattr(peft, name)(**copy.deepcopy(options))
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def make_ours(base: Path, options: dict[str, Any]) -> PeftModel:
    """Our model of the folder `base` with a new adapter."""
    name = "AdaLoraConfig" if "init_r" in options else "LoraConfig"
    config = getattr(lora, name)(**options)
    return lora.get_peft_model(CausalLM.from_pretrained(base), config).eval()


def load_theirs(model: Any, adapter: Path, name: str = "default") -> Any:
    """A copy of transformers' `model` with the adapter that peft reads from a folder."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter, name).eval()


def load_ours(base: Path, adapter: Path, dtype: str = "float32", **options: Any) -> PeftModel:
    """Our model of the folder `base` with the adapter that we read from a folder."""
    model = CausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, **options)


def load_model(base: Path, dtype: str = "float64") -> Any:
    """Transformers' model of a folder."""
    kind = getattr(torch, dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=kind).eval()


def trainable(model: Any) -> dict[str, Any]:
    """The parameters that are trained, by name, on either side."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_fields(adapter: Path) -> dict[str, Any]:
    """An adapter_config.json; lists of names, which peft keeps as sets, are sorted."""
    fields: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    for name in ("target_modules", "modules_to_save"):
        if isinstance(fields[name], list):
            fields[name].sort()
    return fields


# ---- values ----


def randomise(parameters: Iterable[Any], seed: int = 0) -> None:
    """Fill parameters of either side with values that float32 can represent."""
    rng = np.random.default_rng(seed)
    for p in parameters:
        values = 0.3 * rng.standard_normal(tuple(p.shape)) + (p.ndim == 1)
        values = values.astype(np.float32)
        if torch.is_tensor(p):
            p.data.copy_(torch.tensor(values))
        else:
            p.data = values.astype(p.dtype)


def logits(model: Any, ids: Any = IDS, **options: Any) -> np.ndarray:
    """The logits of transformers' or peft's model."""
    with torch.no_grad():
        return model(torch.tensor(ids), **options).logits.numpy()  # type: ignore[no-any-return]


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Whether all differences are at most `tolerance` of the largest expected number."""
    got, expected = (np.asarray(a.detach() if torch.is_tensor(a) else a) for a in (got, expected))
    assert got.shape == expected.shape
    return bool(np.abs(got - expected).max() <= tolerance * np.abs(expected).max())


def have_logits(model: Any, expected: np.ndarray) -> bool:
    """Whether our model's logits of IDS are within 1e-5."""
    return close(model(IDS).data, expected)


def have_logits_if_stable(model: Any, expected: np.ndarray) -> bool:
    """Within 1e-5, or within four times the rounding error of float32 where that is larger.

    A norm over two channels can divide two small numbers that are left of large ones: about one
    example in 300.
    """
    got = model(IDS).data
    if close(got, expected):
        return True
    exact = copy.deepcopy(model).to(dtype="float64")(IDS).data
    rounding = np.abs(got - exact).max() / np.abs(exact).max()
    return close(got, expected, 4 * float(rounding))


def in_double(model: Any) -> Any:
    """A model of transformers or peft that computes in float64, also where they use float32."""

    def norm(self: Any) -> Any:
        return lambda x: (
            self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        )

    def rope(self: Any) -> Any:
        half = 2 * len(self.inv_freq)
        frequencies = self.config.rope_parameters["rope_theta"] ** -(
            torch.arange(0, half, 2).double() / half
        )

        def forward(x: Any, position_ids: Any) -> Any:
            angles = (position_ids[..., None].double() * frequencies).tile(2)
            return angles.cos(), angles.sin()

        return forward

    def loss(logits: Any, labels: Any, **_: Any) -> Any:
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    for module in model.double().modules():
        for ending, made in (("RMSNorm", norm), ("RotaryEmbedding", rope)):
            if type(module).__name__.endswith(ending):
                module.forward = made(module)
    getattr(model, "get_base_model", lambda: model)().loss_function = loss
    return model
