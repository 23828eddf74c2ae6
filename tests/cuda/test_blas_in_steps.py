"""Every product of a training step and of a generated token is cuBLAS' own, without copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
import shapes
from cupy_on_cpu import counted
from small import CONFIG

import minilora.functional as F
from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    get_peft_model,
    no_grad,
    quantize,
)
from minilora.autograd import Tensor
from minilora.backend import get_backend
from minilora.data import Batch
from minilora.effective import EffectiveWeight, effective_linear
from minilora.lora import HydraConfig, RankAllocator
from minilora.lora.multitask import get_multitask_model
from minilora.models.cache import KeyValueCache
from minilora.models.captured import start_decoding
from minilora.models.decoding import Weights
from minilora.quant.half import convert_to_half, encode_half
from minilora.threads import Workers
from minilora.training.parallel import ShardedStep

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("emulated")]


def lora(**options: Any) -> Callable[[Any], Any]:
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", **options})
    return lambda base: get_peft_model(base, config, seed=2)


def over(store: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """LoRA over weights that are stored in another way."""
    return lambda base: lora()(store(base))


def rounding(compute: str, adapt: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same over a base whose products are rounded."""

    def build(base: Any) -> Any:
        base.set_compute(compute)
        return adapt(base)

    return build


def two_tasks(base: Any) -> Any:
    config = LoraConfig(r=2, target_modules="all-linear")
    return get_multitask_model(base, {"a": config, "b": config}, shared=config)


def checkpointed(base: Any) -> Any:
    base.recompute = True
    return lora()(base)


def modules(*llama: str, gpt2: list[str], **options: Any) -> Callable[[Any], Any]:
    """LoRA on modules that the two model types name differently."""

    def adapt(base: Any) -> Any:
        names = gpt2 if base.config.model_type == "gpt2" else list(llama)
        return lora(target_modules=names, **options)(base)

    return adapt


MODELS: dict[str, Callable[[Any], Any]] = {
    "full training": lambda base: base,
    "lora": lora(),
    "lora with dropout": lora(lora_dropout=0.1),
    "dora": lora(use_dora=True),
    "dora with dropout": lora(use_dora=True, lora_dropout=0.1),
    "adalora": lambda base: get_peft_model(
        base, AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules="all-linear")
    ),
    "hydra": lambda base: get_peft_model(
        base, HydraConfig(r=2, experts=2, target_modules="all-linear")
    ),
    "embedding": modules("embed_tokens", "lm_head", "q_proj", gpt2=["wte", "c_attn"]),
    "dora on an embedding": modules("embed_tokens", "o_proj", gpt2=["wte", "c_fc"], use_dora=True),
    "trainable tokens": lora(trainable_token_indices=[1, 3]),
    "saved modules": modules("q_proj", gpt2=["c_attn"], modules_to_save=["lm_head"]),
    "nf4": over(quantize),
    "bfloat16": over(lambda base: convert_to_half(rounded(base))),
    "tf32": rounding("tf32", lora()),
    "bfloat16 by bfloat16": rounding("bfloat16", over(lambda b: convert_to_half(rounded(b)))),
    "checkpointing": checkpointed,
    "two tasks": two_tasks,
}


def rounded(base: Any) -> Any:
    """The model with weights that bfloat16 holds."""
    for p in base.parameters():
        p.data = encode_half(p.data, "bfloat16").decode(p.dtype)
    return base


def without_attention_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the two operations whose bodies have other products."""

    def attention(qkv: Any, heads: int, kv_heads: int, *_: Any, **__: Any) -> Any:
        head_size = qkv.shape[-1] // (heads + 2 * kv_heads)
        return qkv[..., : heads * head_size]

    def loss(x: Any, head: Any, targets: Any, compute: str, **options: Any) -> Any:
        return F.cross_entropy(F.linear(x, head, compute=compute), targets, **options)

    monkeypatch.setattr(F, "attention", attention)
    monkeypatch.setattr(F, "linear_cross_entropy", loss)


def products_of(work: Callable[[], Any], path: Path) -> list[str]:
    """What the journal has of each product that `work` asks for."""
    with cupy_on_cpu.journal(path):
        work()
    return [line for line in path.read_text().splitlines() if line.startswith("product")]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_has_no_product_of_cupy_s(
    name: str, model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = CausalLM(shapes.shape(model_type), seed=1, device="cuda")
    model = MODELS[name](base).train()
    without_attention_and_loss(monkeypatch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = np.random.default_rng(0).integers(0, 11, (2, 9))
    tasks = ["a", "b"] if name == "two tasks" else None
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), tasks=tasks)

    def step() -> None:
        with ShardedStep(model) as sharded:
            sharded.gradients(batch, parameters)
        if name == "adalora":
            RankAllocator.of(model).penalty()

    products = products_of(step, tmp_path / "journal")
    assert len(products) > 10
    assert [line for line in products if not line.endswith(" workspace")] == []


@pytest.mark.parametrize("batch", [1, 2])
def test_a_generated_token_has_no_product_of_cupy_s(batch: int, tmp_path: Path) -> None:
    model = lora()(CausalLM(CONFIG, seed=1, device="cuda")).eval()
    model.merge_adapter()
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, 3))
    weights = Weights.of(model.get_base_model(), Workers(0))
    cache = KeyValueCache(model.get_base_model(), batch, 8)
    with no_grad():
        model(ids, cache=cache)
    decoding = start_decoding(weights, cache)
    products = products_of(lambda: decoding(ids[:, -1]), tmp_path / "journal")
    assert len(products) == 4 * CONFIG.num_hidden_layers + 1  # four per block, and the head's
    assert [line for line in products if not line.endswith(" workspace")] == []


def test_effective_linear_of_stacked_weights_has_no_copies() -> None:
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    W = gpu.from_numpy(rng.standard_normal((10, 4)))
    x = Tensor(gpu.from_numpy(rng.standard_normal((3, 7, 4))), requires_grad=True)
    weight = EffectiveWeight(W, [(5, None, []), (5, None, [])], stacked=True)
    with counted() as device:
        y = effective_linear(x, weight)
    assert (device.products, device.operations) == (1, 1)
    dy = gpu.from_numpy(rng.standard_normal(y.shape))
    with counted() as device:
        (dx,) = y.node.vjp(dy)
    assert (device.products, device.operations) == (2, 2)
    expected = np.einsum("nbtc,nci->bti", dy.get(), W.get().reshape(2, 5, 4))
    np.testing.assert_allclose(dx.get(), expected, atol=1e-12)


def test_lora_adapter_adds_its_update_in_one_call() -> None:
    gpu = get_backend("cuda")
    model = lora()(CausalLM(CONFIG, seed=1, device="cuda"))
    adapter = model.get_base_model().decoder.layers[0].mlp.gate_proj.adapters["default"]
    W = gpu.xp.zeros((24, 16), np.float32)
    X, dY = (gpu.xp.ones((9, n), np.float32) for n in (16, 24))
    with counted() as device:
        _, pull = adapter.write_effective_weight(W)
    assert (device.products, device.operations) == (1, 1)
    with counted() as device:
        pull.gradients(X, dY)
    assert (device.products, device.operations) == (4, 4)
    assert gpu.to_numpy(W).any() == gpu.to_numpy(adapter.lora_B.data).any()
