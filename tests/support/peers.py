"""What the tests beside torch, transformers and peft share. Without these three, whoever imports it is skipped."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = np.random.default_rng(0).integers(0, 13, (2, 9))


def save_llama(folder: Path) -> Any:
    """Transformers' model, whose folder this becomes."""
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


def randomise(parameters: Iterable[Any], seed: int = 0) -> None:
    """Values that float32 holds, whoever owns the parameters: nothing stays at its first value."""
    rng = np.random.default_rng(seed)
    for p in parameters:
        values = (0.3 * rng.standard_normal(tuple(p.shape)) + (p.ndim == 1)).astype(np.float32)
        p.data = torch.tensor(values).to(p.dtype) if torch.is_tensor(p) else values.astype(p.dtype)


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()  # type: ignore[no-any-return]


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """To `tolerance` of the largest expected number."""
    got, expected = (np.asarray(a.detach() if torch.is_tensor(a) else a) for a in (got, expected))
    assert got.shape == expected.shape
    return bool(np.abs(got - expected).max() <= tolerance * np.abs(expected).max())


def in_double(model: Any) -> Any:
    """A peft model that computes in float64 throughout, where transformers goes by way of float32."""

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
    model.get_base_model().loss_function = loss
    return model
