"""One training step of one model by each contender: minilora, PyTorch + peft, transformers, JAX.

peers.py starts one process per contender and asks it for steps. All contenders read the same base
and adapter from files, use the same batches, and compute the same step: forward, mean
cross-entropy, backward, AdamW, no clipping. The classes at the end generate text instead: a step
appends the most likely tokens to a batch of prompts.

    contender(work, threads)           work: a folder that peers.prepare made, with base/, adapter/,
                                       batches.npy and job.json
    contender.step(number) -> loss     one step on batch `number`, finished when it returns
    generator.step(number) -> tokens   (B, new) as lists: the continuation of the prompts
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE = 1e-3


class Contender:
    """The job and its batches."""

    def __init__(self, work: Path):
        self.work = work
        self.job = json.loads((work / "job.json").read_text())
        self.method: str = self.job["method"]
        # (count, B, T + 1) int64, or (count, B, T) for prompts
        self.batches = np.load(work / "batches.npy")

    def windows(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, targets) of a batch, each (B, T)."""
        batch = self.batches[number % len(self.batches)]
        return np.ascontiguousarray(batch[:, :-1]), np.ascontiguousarray(batch[:, 1:])

    def step(self, number: int) -> Any:
        raise NotImplementedError


class Minilora(Contender):
    adapter = "adapter"  # the folder in `work`

    def __init__(self, work: Path, threads: int, ranks: Any = None):
        super().__init__(work)
        from minilora import AdamW, CausalLM, PeftModel
        from minilora.data import Batch
        from minilora.training.parallel import ShardedStep

        self.Batch = Batch
        self.model: Any = CausalLM.from_pretrained(work / "base").train()
        if self.method != "full":
            self.model = PeftModel.from_pretrained(
                self.model, work / self.adapter, is_trainable=True
            )
        self.model.get_base_model().gradient_checkpointing_enable(self.method == "recomputed")
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        self.sharded = ShardedStep(self.model, threads, ranks=ranks).__enter__()

    def step(self, number: int) -> float:
        batch = self.Batch(*self.windows(number))
        loss, grads = self.sharded.gradients(batch, self.optimizer.params, step=number)
        self.optimizer.step(grads)
        return float(loss)


class MiniloraDora(Minilora):
    adapter = "dora"


class MiniloraAdalora(Minilora):
    """A step of AdaLoRA also has the penalty, the scores, and an allocation of the ranks."""

    adapter = "adalora"

    def __init__(self, work: Path, threads: int):
        super().__init__(work, threads)
        from minilora.lora import RankAllocator

        self.allocator = RankAllocator.of(self.model)
        index = {id(p): i for i, p in enumerate(self.optimizer.params)}
        # Index of each of the allocator's parameters among the optimiser's.
        self.indices = [index[id(p)] for p in self.allocator.params]

    def step(self, number: int) -> float:
        batch = self.Batch(*self.windows(number))
        loss, grads = self.sharded.gradients(batch, self.optimizer.params, step=number)
        _, penalty_grads = self.allocator.penalty()
        for i, penalty_grad in zip(self.indices, penalty_grads, strict=True):
            if penalty_grad is not None:
                grads[i] = grads[i] + penalty_grad
        self.optimizer.step(grads)
        self.allocator.step([grads[i] for i in self.indices])
        return float(loss)


class MiniloraMap(Minilora):
    """A method of lora/maps/, whose adapter is in the folder of its name."""

    def __init__(self, work: Path, threads: int, method: str):
        self.adapter = method
        super().__init__(work, threads)


class Torch(Contender):
    """PyTorch + peft with the model of `self.base()`; under torch.compile if `compiled`."""

    compiled = False
    adapter = "adapter"

    def __init__(self, work: Path, threads: int):
        super().__init__(work)
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        model = self.base()
        if self.method != "full":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(work / self.adapter), is_trainable=True)
        self.model = model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

        def loss_of(ids: Any, targets: Any) -> Any:
            logits = self.logits(ids)
            return torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
            )

        self.loss_of = torch.compile(loss_of) if self.compiled else loss_of

    def base(self) -> Any:
        return decoder(self.work / "base")

    def logits(self, ids: Any) -> Any:
        return self.model(ids)

    def step(self, number: int) -> float:
        ids, targets = map(self.torch.from_numpy, self.windows(number))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(ids, targets)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class TorchCompiled(Torch):
    compiled = True


class TorchDora(Torch):
    adapter = "dora"


class Transformers(Torch):
    def base(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.work / "base", dtype="float32")

    def logits(self, ids: Any) -> Any:
        return self.model(input_ids=ids, use_cache=False).logits


def decoder(folder: Path) -> Any:
    """A Llama-shaped decoder written by hand in PyTorch, with the names of peft's files."""
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from torch.nn import functional as F

    c = json.loads((folder / "config.json").read_text())
    C, M, H = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    K, D, theta = c["num_key_value_heads"] or H, c["head_dim"], c["rope_parameters"]["rope_theta"]

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    frequency = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(c["max_position_embeddings"], dtype=torch.float64)[:, None] * frequency
    angles = torch.cat([angle, angle], 1)  # (T, D)
    cos = angles.cos().float()
    sin = angles.sin().float()

    def rotate(x: Any) -> Any:  # (B, heads, T, D)
        first, second = x.chunk(2, dim=-1)
        T = x.shape[-2]
        return x * cos[:T] + torch.cat([-second, first], dim=-1) * sin[:T]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = linear(C, H * D)
            self.k_proj = linear(C, K * D)
            self.v_proj = linear(C, K * D)
            self.o_proj = linear(H * D, C)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            projections = self.q_proj, self.k_proj, self.v_proj
            q, k, v = (p(x).view(B, T, -1, D).transpose(1, 2) for p in projections)
            y = F.scaled_dot_product_attention(
                rotate(q), rotate(k), v, is_causal=True, enable_gqa=K != H
            )
            return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = linear(C, M)
            self.up_proj = linear(C, M)
            self.down_proj = linear(M, C)

        def forward(self, x: Any) -> Any:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm = nn.RMSNorm(C, eps=c["rms_norm_eps"])
            self.post_attention_layernorm = nn.RMSNorm(C, eps=c["rms_norm_eps"])
            self.self_attn = Attention()
            self.mlp = MLP()

        def forward(self, x: Any) -> Any:
            x = x + self.self_attn(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(c["vocab_size"], C)
            self.layers = nn.ModuleList([Block() for _ in range(c["num_hidden_layers"])])
            self.norm = nn.RMSNorm(C, eps=c["rms_norm_eps"])

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.lm_head = linear(C, c["vocab_size"])

        def forward(self, ids: Any) -> Any:
            x = self.model.embed_tokens(ids)
            for block in self.model.layers:
                x = block(x)
            return self.lm_head(self.model.norm(x))

    model = Decoder()
    tensors = load_file(str(folder / "model.safetensors"))
    if c["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


class Jax(Contender):
    """The same step as one jitted function of (trainable, moments, batch)."""

    def __init__(self, work: Path, threads: int):
        super().__init__(work)
        os.environ["XLA_FLAGS"] = (
            f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={threads}"
        )
        import jax
        import jax.numpy as jnp
        from safetensors.numpy import load_file

        c = json.loads((work / "base" / "config.json").read_text())
        tensors = load_file(str(work / "base" / "model.safetensors"))
        base = {key: jnp.asarray(value) for key, value in tensors.items()}
        if c["tie_word_embeddings"]:
            base["lm_head.weight"] = base["model.embed_tokens.weight"]
        H, D = c["num_attention_heads"], c["head_dim"]
        eps, scale = c["rms_norm_eps"], self.job["scaling"]
        T = self.batches.shape[2] - 1
        frequency = c["rope_parameters"]["rope_theta"] ** (-np.arange(0, D, 2) / D)
        angle = np.arange(T)[:, None] * frequency
        # (T, 1, D/2)
        cos = jnp.asarray(np.cos(angle), jnp.float32)[:, None]
        sin = jnp.asarray(np.sin(angle), jnp.float32)[:, None]
        causal = jnp.tril(jnp.ones((T, T), bool))
        adapter: dict[str, Any] = {}
        if self.method != "full":
            factors = load_file(str(work / "adapter" / "adapter_model.safetensors"))
            for key, value in factors.items():
                adapter[key.removeprefix("base_model.model.")] = jnp.asarray(value)

        def loss_of(trained: Any, frozen: Any, ids: Any, targets: Any) -> Any:
            weights = {**frozen, **trained}

            def linear(name: str, x: Any) -> Any:
                y = x @ weights[f"{name}.weight"].T
                if f"{name}.lora_A.weight" in weights:
                    A = weights[f"{name}.lora_A.weight"]
                    B = weights[f"{name}.lora_B.weight"]
                    y = y + x @ A.T @ B.T * scale
                return y

            def norm(name: str, x: Any) -> Any:
                scale = jnp.sqrt((x * x).mean(-1, keepdims=True) + eps)
                return x / scale * weights[f"{name}.weight"]

            def rotate(x: Any) -> Any:  # (B, T, heads, D)
                first, second = jnp.split(x, 2, axis=-1)
                return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

            x = weights["model.embed_tokens.weight"][ids]
            for i in range(c["num_hidden_layers"]):
                at = f"model.layers.{i}"
                h = norm(f"{at}.input_layernorm", x)
                q, k, v = (
                    linear(f"{at}.self_attn.{p}_proj", h).reshape(*ids.shape, -1, D) for p in "qkv"
                )
                q = rotate(q)
                k = rotate(k)
                k, v = (jnp.repeat(z, H // z.shape[2], axis=2) for z in (k, v))
                scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D)
                share = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
                y = jnp.einsum("bhts,bshd->bthd", share, v).reshape(*ids.shape, -1)
                x = x + linear(f"{at}.self_attn.o_proj", y)
                h = norm(f"{at}.post_attention_layernorm", x)
                gated = jax.nn.silu(linear(f"{at}.mlp.gate_proj", h)) * linear(
                    f"{at}.mlp.up_proj", h
                )
                x = x + linear(f"{at}.mlp.down_proj", gated)
            logp = jax.nn.log_softmax(linear("lm_head", norm("model.norm", x)))
            return -jnp.take_along_axis(logp, targets[..., None], axis=-1).mean()

        def step(
            trained: Any, moments: Any, count: Any, frozen: Any, ids: Any, targets: Any
        ) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(trained, frozen, ids, targets)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments[1], grads)

            def update(p: Any, m: Any, v: Any) -> Any:
                mean = m / (1 - 0.9**count)
                square = v / (1 - 0.999**count)
                return p - LEARNING_RATE * mean / (jnp.sqrt(square) + 1e-8)

            return loss, jax.tree.map(update, trained, first, second), (first, second)

        self.jitted = jax.jit(step, donate_argnums=(0, 1))
        self.trained, self.frozen = (adapter, base) if adapter else (base, {})
        if not adapter and c["tie_word_embeddings"]:
            raise SystemExit(
                "the base ties its head to its embedding, which the JAX contender does not support "
                "for the method full; choose another method"
            )
        self.moments = tuple(jax.tree.map(jnp.zeros_like, self.trained) for _ in range(2))
        self.count = 0

    def step(self, number: int) -> float:
        self.count += 1
        ids, targets = self.windows(number)
        loss, self.trained, self.moments = self.jitted(
            self.trained, self.moments, float(self.count), self.frozen, ids, targets
        )
        return float(loss)


class Floor(Contender):
    """Not a contender: the matrix products that a LoRA step over frozen weights cannot avoid.

    For every weight (O, I) and the batch's tokens, y = x W^T and dx = dy W. They are computed by
    threaded BLAS over all rows, and by threads over blocks of rows with one BLAS thread each.
    `step` returns the seconds of the faster way.
    """

    def __init__(self, work: Path, threads: int):
        super().__init__(work)
        import threadpoolctl

        self.limits = threadpoolctl.threadpool_limits
        self.threads = threads
        c = json.loads((work / "base" / "config.json").read_text())
        C, M, D = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        H = c["num_attention_heads"]
        K = c["num_key_value_heads"] or H
        layer = [(H * D, C), (K * D, C), (K * D, C), (C, H * D), (M, C), (M, C), (C, M)]
        self.shapes = layer * c["num_hidden_layers"] + [(c["vocab_size"], C)]
        _, B, T = self.batches.shape
        self.rows = B * (T - 1)
        rng = np.random.default_rng(0)
        self.weights = {s: rng.standard_normal(s, np.float32) for s in set(self.shapes)}
        widths = {side for shape in self.shapes for side in shape}
        self.inputs = {side: rng.standard_normal((self.rows, side), np.float32) for side in widths}

    def products(self, part: slice) -> None:
        for O, I in self.shapes:
            W = self.weights[O, I]
            self.inputs[I][part] @ W.T
            self.inputs[O][part] @ W

    def step(self, number: int) -> float:
        import time
        from concurrent.futures import ThreadPoolExecutor

        times = []
        with self.limits(self.threads, "blas"):
            started = time.perf_counter()
            self.products(slice(None))
            times.append(time.perf_counter() - started)
        size = 512
        parts = [slice(i, i + size) for i in range(0, self.rows, size)]
        with self.limits(1, "blas"), ThreadPoolExecutor(self.threads) as pool:
            started = time.perf_counter()
            list(pool.map(self.products, parts))
            times.append(time.perf_counter() - started)
        return min(times)


CONTENDERS: dict[str, type[Any]] = {
    "minilora": Minilora,
    "minilora-dora": MiniloraDora,
    "minilora-adalora": MiniloraAdalora,
    "torch": Torch,
    "torch-dora": TorchDora,
    "torch-compile": TorchCompiled,
    "transformers": Transformers,
    "jax": Jax,
    "floor": Floor,
}


# ---- greedy generation by the base alone, with a cache of keys and values ------------------------


class MiniloraGenerates(Contender):
    def __init__(self, work: Path, threads: int):
        super().__init__(work)
        from minilora import CausalLM
        from minilora.models.generation import generate

        self.generate = generate
        self.model = CausalLM.from_pretrained(work / "base")

    def step(self, number: int) -> list[list[int]]:
        prompts = self.batches[number % len(self.batches)]
        ids = self.generate(self.model, prompts, self.job["new"], temperature=0)
        return ids[:, prompts.shape[1] :].tolist()  # type: ignore[no-any-return]


class TransformersGenerates(Contender):
    def __init__(self, work: Path, threads: int):
        super().__init__(work)
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            work / "base", dtype="float32", attn_implementation="sdpa"
        )
        # Without an end-of-text token every prompt gets all of its tokens.
        self.model.eval().generation_config.eos_token_id = None

    def step(self, number: int) -> list[list[int]]:
        prompts = self.torch.from_numpy(self.batches[number % len(self.batches)])
        with self.torch.inference_mode():
            ids = self.model.generate(
                prompts,
                attention_mask=self.torch.ones_like(prompts),
                max_new_tokens=self.job["new"],
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return ids[:, prompts.shape[1] :].tolist()  # type: ignore[no-any-return]


GENERATORS: dict[str, type[Any]] = {
    "minilora": MiniloraGenerates,
    "transformers": TransformersGenerates,
}
