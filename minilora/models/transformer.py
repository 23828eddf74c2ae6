"""The language model: a decoder, Llama-shaped, and its head, under the names that the ecosystem's files use.

x = embed(ids);  per layer  x += attention(norm(x)),  x += mlp(norm(x));  logits = head(norm(x))
Shapes: B batch, T time, C = hidden_size, H query heads, K key/value heads, D = head_dim, V vocabulary. Read bottom-up
in call order: Attention, MLP, Block, Decoder, CausalLM. The config is architecture.py's, GPT-2's decoder gpt2.py's.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, concat
from ..backend import Array, Backend
from ..errors import ConfigError, DataError, GraphError
from ..nn import (
    Embedding,
    FusedProjection,
    Linear,
    Module,
    RMSNorm,
    normal,
    random_linear,
    run_blocks,
)
from .cache import KeyValueCache
from .config import TransformerConfig, rotary_frequencies
from .gpt2 import GPT2Decoder
from .pretrained import load_model, save_model


class Attention(FusedProjection):
    """Grouped-query causal self-attention with rotary positions.    (B, T, C) -> (B, T, C)

    In Qwen3 each head of q and k has an RMSNorm before that. In Mistral, and in layers of Qwen, only a window is seen.
    """

    projections = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        config: TransformerConfig,
        layer: int,
        rotary: RotaryTable,
        rng: np.random.Generator | None,
    ):
        C, H, K, D = (
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.head_dim,
        )
        assert D is not None
        self.layer, self.heads, self.kv_heads, self.rotary = layer, H, K, rotary
        self.window, std = config.window(layer), config.initializer_range
        self.q_proj = random_linear(rng, std, C, H * D, config.qkv_bias)
        self.k_proj = random_linear(rng, std, C, K * D, config.qkv_bias)
        self.v_proj = random_linear(rng, std, C, K * D, config.qkv_bias)
        self.o_proj = random_linear(rng, std, H * D, C, config.attention_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(np.ones(D, np.float32), config.rms_norm_eps) if config.qk_norm else None
            for _ in "qk"
        )

    def __call__(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        H, K, qkv = self.heads, self.kv_heads, self.project(x)  # (B, T, (H + 2 K) D)
        if self.q_norm is not None and self.k_norm is not None:
            z = qkv.reshape(*x.shape[:2], H + 2 * K, -1)
            normed = [self.q_norm(z[:, :, :H]), self.k_norm(z[:, :, H : H + K]), z[:, :, H + K :]]
            qkv = concat(normed, axis=2).reshape(*qkv.shape)
        start = cache.length if cache else 0
        cos, sin = self.rotary(start, start + x.shape[1], x)
        extend = functools.partial(cache.extend, self.layer) if cache else None
        return self.o_proj(F.attention(qkv, H, K, cos, sin, extend, self.window))


class MLP(FusedProjection):
    """down(silu(gate(x)) * up(x))    (..., C) -> (..., C)"""

    projections = ("gate_proj", "up_proj")
    stacked = True  # NumPy takes twice as long for rows with gaps between them

    def __init__(self, config: TransformerConfig, rng: np.random.Generator | None):
        C, M, std, bias = (
            config.hidden_size,
            config.intermediate_size,
            config.initializer_range,
            config.mlp_bias,
        )
        self.gate_proj = random_linear(rng, std, C, M, bias)
        self.up_proj = random_linear(rng, std, C, M, bias)
        self.down_proj = random_linear(rng, std, M, C, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(F.swiglu(self.project(x)))


class Block(Module):
    """x += attention(norm(x)), x += mlp(norm(x))    (B, T, C) -> (B, T, C)"""

    def __init__(
        self,
        config: TransformerConfig,
        layer: int,
        rotary: RotaryTable,
        rng: np.random.Generator | None,
    ):
        ones = np.ones(config.hidden_size, np.float32)
        self.input_layernorm = RMSNorm(ones, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, rotary, rng)
        self.post_attention_layernorm = RMSNorm(ones.copy(), config.rms_norm_eps)
        self.mlp = MLP(config, rng)

    def __call__(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(Module):
    """Everything but the head.    ids (B, T) -> (B, T, C)"""

    recompute = False  # keep a block's input alone for backward, and run the block again there

    def __init__(self, config: TransformerConfig, rng: np.random.Generator | None):
        rotary = RotaryTable(config)
        self.embed_tokens = Embedding(
            normal(rng, config.initializer_range, (config.vocab_size, config.hidden_size))
        )
        self.layers = [Block(config, i, rotary, rng) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(np.ones(config.hidden_size, np.float32), config.rms_norm_eps)

    def get_input_embeddings(self) -> Embedding:
        return self.embed_tokens

    def __call__(self, ids: Array, cache: KeyValueCache | None = None) -> Tensor:
        return self.norm(run_blocks(self.layers, self.embed_tokens(ids), cache, self.recompute))


# The decoder of each type of model, and its name in the files.
DECODERS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model", Decoder)),
    "gpt2": ("transformer", GPT2Decoder),
}


class CausalLM(Module):
    """A language model: the logits of the next token at every position.

    seed   weights from N(0, initializer_range^2) by NumPy's generator on the CPU, norms at one: every device starts
           alike. None leaves them zero (`from_pretrained` fills them)
    """

    def __init__(
        self,
        config: TransformerConfig,
        seed: int | None = 0,
        dtype: Any = "float32",
        device: str | Backend = "cpu",
    ):
        if dtype not in ("float32", "float64", np.float32, np.float64):
            raise ConfigError(f"dtype must be float32 or float64, got {dtype!r:.99}")
        rng = None if seed is None else np.random.default_rng(seed)
        self.config = config
        self.decoder_name, decoder = DECODERS[config.model_type]
        setattr(self, self.decoder_name, decoder(config, rng))
        self.lm_head = random_linear(
            rng, config.initializer_range, config.hidden_size, config.vocab_size, False
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight
        self.to(device, np.dtype(dtype))
        self._names = {name for name, _ in self.named_parameters()}

    def __call__(
        self, ids: Any, cache: KeyValueCache | None = None, targets: Array | None = None
    ) -> Tensor:
        """ids (B, T) integers -> logits (B, T, V). DataError for ids outside the vocabulary, or too many positions.

        With a cache, logits (B, 1, V) of the last position alone. With `targets` (B, T), in place of logits the sum of
        -log p(target) over those that are not F.IGNORE, a scalar: a plain head then never holds all logits at once.
        """
        weight, c = self.get_input_embeddings().weight, self.config
        ids = ids.data if isinstance(ids, Tensor) else ids
        if not isinstance(ids, weight.backend.xp.ndarray) or isinstance(ids, np.ndarray):
            ids = np.asarray(ids)
            if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
                raise DataError(
                    f"ids must be integers of shape (batch, time), got {ids.dtype} {ids.shape}"
                )
            if not (ids.min() >= 0 and ids.max() < c.vocab_size):
                raise DataError(
                    f"ids must be in [0, {c.vocab_size}), got {ids.min()} to {ids.max()}"
                )
            ids = weight.backend.from_numpy(ids)
        end = ids.shape[1] + (cache.length if cache else 0)
        if end > c.max_position_embeddings:
            raise DataError(
                f"{end} positions, but the model has max_position_embeddings = {c.max_position_embeddings}"
            )
        hidden, head = self.decoder(ids, cache), self.lm_head
        if cache and hidden.requires_grad:
            raise GraphError(
                "a KeyValueCache holds arrays, through which no gradient flows: use it under no_grad()"
            )
        if cache:
            cache.advance(ids.shape[1])
            hidden = hidden[:, -1:]
        if targets is None:
            return head(hidden)
        if isinstance(head, Linear) and head.bias is None:
            return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum")
        return F.cross_entropy(head(hidden), targets, reduction="sum")

    @property
    def decoder(self) -> Any:
        """Everything but the head, under whichever name it stands in the files."""
        return getattr(self, self.decoder_name)

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Train in less memory: one block's activations at a time, in about a third more time, with the same bits."""
        self.decoder.recompute = enable

    def get_base_model(self) -> CausalLM:
        """Itself: a PeftModel has the same method."""
        return self

    def get_input_embeddings(self) -> Embedding:
        return self.decoder.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> Linear:
        return self.lm_head

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: Any = "float32",
        device: str | Backend = "cpu",
        stored: bool = False,
    ) -> CausalLM:
        """Read config.json and the safetensors beside it, tensor by tensor; returns eval mode.

        With `stored` what the files hold in sixteen bits stays so, frozen, and is computed with in `dtype`: halves.py.
        FormatError lists every tensor that is missing, unknown, or of another shape than config.json says. Layers that
        are stored as bitsandbytes' codes become QuantizedLinear; ConfigError names a quantization that is not read.
        """
        return load_model(cls, directory, dtype, stored).to(device).eval()  # type: ignore[no-any-return]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that transformers loads: model.safetensors and config.json, each whole or not at all.

        ConfigError while adapters are in the model, or layers of int8, which have no form in such a folder.
        """
        strange = [
            name
            for name, _ in self.named_parameters()
            if name not in self._names and name != "lm_head.weight"
        ]
        if strange:
            raise ConfigError(
                f"the model holds adapters ({strange[0]}, ...): save the PeftModel, or merge_and_unload first"
            )
        save_model(self, directory)


class RotaryTable:
    """cos and sin of position * frequency, computed in float64 and rounded once; grows to the longest context seen.

    Laid out as `functional.attention` reads them: a row for all heads of q and k, with the scale 1/sqrt(D) in q's part.
    """

    def __init__(self, config: TransformerConfig):
        self.frequency = rotary_frequencies(config)
        scale = [config.head_dim**-0.5] * config.num_attention_heads + [1.0] * config.kv_heads  # type: ignore[operator]
        self.scale = np.array(scale)[:, None]
        self.tables: dict[tuple[str, Any], tuple[Any, ...]] = {}

    def __call__(self, start: int, stop: int, like: Any) -> tuple[Any, Any]:
        """(cos, sin), each (stop - start, (H + K) D), for positions from start on, in the dtype and place of `like`."""
        key = (like.backend.name, like.dtype)
        table = self.tables.get(
            key, ()
        )  # read once: another thread may put a shorter one in its place
        if not table or len(table[0]) < stop:
            angle = (
                np.arange(max(64, 1 << (stop - 1).bit_length()))[:, None] * self.frequency
            )  # grows by doubling
            halves = (np.cos(angle), np.cos(angle)), (-np.sin(angle), np.sin(angle))
            full = [
                (np.concatenate(pair, axis=1)[:, None] * self.scale).reshape(len(angle), -1)
                for pair in halves
            ]
            table = tuple(like.backend.from_numpy(f.astype(like.dtype)) for f in full)
            self.tables[key] = table
        return table[0][start:stop], table[1][start:stop]
