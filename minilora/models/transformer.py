"""The language model: a Llama-shaped decoder and its head, under the names that files use.

x = embed(ids);  per layer  x += attention(norm(x)),  x += mlp(norm(x));  logits = head(norm(x))
Shapes: B batch, T time, C = hidden_size, H query heads, K key/value heads, D = head_dim,
V vocabulary. Contents, in call order from the bottom up: RotaryTable, Attention, MLP, Block,
Decoder, CausalLM. The configuration is in config.py, GPT-2's decoder in gpt2.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, concat
from ..backend import Array, Backend
from ..errors import ConfigError, DataError, GraphError, check_names
from ..formats.hub import find_model
from ..nn import Embedding, FusedProjection, Linear, Module, RMSNorm, normal, random_linear
from ..precision import FLOAT32, check_compute
from .cache import Cache
from .cache import KeyValueCache as KeyValueCache
from .config import TransformerConfig
from .decoder import BaseDecoder, Generator, Positions
from .generation import generate
from .gpt2 import GPT2Decoder
from .pretrained import load_model, save_model
from .rotary import rotary_frequencies

# What CausalLM.generate takes besides the arguments that it names.
GENERATION_OPTIONS = ["temperature", "top_k", "top_p", "seed", "tasks"]

# ---- the decoder --------------------------------------------------------------------------------


class RotaryTable:
    """cos and sin of position * frequency, computed in float64 and rounded once.

    The table grows to the longest context seen. It is laid out as `functional.attention` reads it:
    each row serves all heads of q and k, with the scale 1/sqrt(D) in q's part.
    """

    def __init__(self, config: TransformerConfig):
        D: Any = config.head_dim
        context = config.max_position_embeddings
        rotation = rotary_frequencies(config.rope_parameters, D, context)
        self.frequency = rotation.frequencies
        self.growth = rotation.scale  # of every cos and sin: YaRN's
        scale = [D**-0.5] * config.num_attention_heads + [1.0] * config.kv_heads
        self.scale = np.array(scale)[:, None]
        self.tables: dict[tuple[str, Any], tuple[Array, Array]] = {}

    def __call__(self, start: int, stop: int, like: Any) -> tuple[Array, Array]:
        """(cos, sin), each (stop - start, (H + K) D), for positions from `start` on.

        They have the dtype and the device of `like`.
        """
        key = (like.backend.name, like.dtype)
        table = self.tables.get(key)  # read once: another thread may put a shorter one in its place
        if table is None or len(table[0]) < stop:
            count = max(64, 1 << (stop - 1).bit_length())  # grows by doubling
            angle = np.arange(count)[:, None] * self.frequency
            cos = np.cos(angle) * self.growth
            sin = np.sin(angle) * self.growth
            table = self._rows(cos, cos, like), self._rows(-sin, sin, like)
            self.tables[key] = table
        return table[0][start:stop], table[1][start:stop]

    def _rows(self, first: np.ndarray, second: np.ndarray, like: Any) -> Array:
        """The factors of the first and the second half of a head, for all heads: (S, (H + K) D)."""
        heads = np.concatenate([first, second], axis=1)[:, None] * self.scale  # (S, H + K, D)
        return like.backend.from_numpy(heads.reshape(len(heads), -1).astype(like.dtype))


class Attention(FusedProjection):
    """Grouped-query causal self-attention with rotary positions.    (B, T, C) -> (B, T, C)

    In Qwen3 each head of q and k has an RMSNorm before the rotation. In Mistral, and in some layers
    of Qwen, a position sees only a window of the newest positions.
    """

    projections = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: TransformerConfig, layer: int, rng: Generator):
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.kv_heads
        self.window = config.window(layer)
        C = config.hidden_size
        D: Any = config.head_dim
        new_linear = functools.partial(random_linear, rng, config.initializer_range)
        self.q_proj = new_linear(C, self.heads * D, config.qkv_bias)
        self.k_proj = new_linear(C, self.kv_heads * D, config.qkv_bias)
        self.v_proj = new_linear(C, self.kv_heads * D, config.qkv_bias)
        self.o_proj = new_linear(self.heads * D, C, config.attention_bias)
        self.q_norm = _new_norm(config, D) if config.qk_norm else None
        self.k_norm = _new_norm(config, D) if config.qk_norm else None

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        H = self.heads
        K = self.kv_heads
        qkv = self.project(x)  # (B, T, (H + 2 K) D)
        if self.q_norm is not None and self.k_norm is not None:
            heads = qkv.reshape(*x.shape[:2], H + 2 * K, -1)
            q = self.q_norm(heads[:, :, :H])
            k = self.k_norm(heads[:, :, H : H + K])
            v = heads[:, :, H + K :]
            qkv = concat([q, k, v], axis=2).reshape(*qkv.shape)
        first_key, cos, sin, _ = positions
        options = positions.earlier(self.layer)
        y = F.attention(qkv, H, K, cos, sin, window=self.window, first_key=first_key, **options)
        return self.o_proj(y)


class MLP(FusedProjection):
    """down(silu(gate(x)) * up(x))    (..., C) -> (..., C)"""

    projections = ("gate_proj", "up_proj")
    stacked = True  # NumPy takes twice as long for rows with gaps between them

    def __init__(self, config: TransformerConfig, rng: Generator):
        C = config.hidden_size
        M = config.intermediate_size
        new_linear = functools.partial(random_linear, rng, config.initializer_range)
        self.gate_proj = new_linear(C, M, config.mlp_bias)
        self.up_proj = new_linear(C, M, config.mlp_bias)
        self.down_proj = new_linear(M, C, config.mlp_bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(F.swiglu(self.project(x)))


class Block(Module):
    """x += attention(norm(x)), x += mlp(norm(x))    (B, T, C) -> (B, T, C)"""

    def __init__(self, config: TransformerConfig, layer: int, rng: Generator):
        self.input_layernorm = _new_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer, rng)
        self.post_attention_layernorm = _new_norm(config, config.hidden_size)
        self.mlp = MLP(config, rng)

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(BaseDecoder):
    """Token embeddings, blocks that share one rotary table, a norm.    ids (B, T) -> (B, T, C)"""

    part_names = ("embed_tokens", "layers", "norm")

    def __init__(self, config: TransformerConfig, rng: Generator):
        C = config.hidden_size
        self.rotary = RotaryTable(config)
        self.embed_tokens = Embedding(normal(rng, config.initializer_range, (config.vocab_size, C)))
        self.layers = [Block(config, i, rng) for i in range(config.num_hidden_layers)]
        self.norm = _new_norm(config, C)

    def rotation(self, places: Array, end: int, like: Tensor) -> tuple[Array, Array]:
        cos, sin = self.rotary(0, end, like)
        if places.ndim == 1:  # consecutive: a view is enough
            return cos[-len(places) :], sin[-len(places) :]
        take = like.backend.xp.take
        return take(cos, places, axis=0), take(sin, places, axis=0)


def _new_norm(config: TransformerConfig, size: int) -> RMSNorm:
    return RMSNorm(np.ones(size, np.float32), config.rms_norm_eps)


# ---- the model ----------------------------------------------------------------------------------


class CausalLM(Module):
    """A language model: the logits of the next token at every position.

    seed   weights come from N(0, initializer_range^2), drawn by NumPy's generator on the CPU, so
           that every device starts alike; norms are one. None leaves the weights zero, for
           `from_pretrained` to fill
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
        is_gpt2 = config.model_type == "gpt2"
        self.decoder_name = "transformer" if is_gpt2 else "model"  # as in files
        decoder = GPT2Decoder(config, rng) if is_gpt2 else Decoder(config, rng)
        setattr(self, self.decoder_name, decoder)
        std = config.initializer_range
        self.lm_head = random_linear(rng, std, config.hidden_size, config.vocab_size, False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight
        self.to(device, np.dtype(dtype))
        self._names = {name for name, _ in self.named_parameters()}

    def __call__(
        self,
        ids: Any,
        cache: Cache | None = None,
        targets: Array | None = None,
        first_key: Array | None = None,
    ) -> Tensor:
        """ids (B, T) integers -> logits (B, T, V).

        With a cache, which holds earlier positions, the logits (B, 1, V) of the last position
        alone. With `targets` (B, T), in place of logits the sum of -log p(target) over the targets
        that are not F.IGNORE, a scalar; a plain head then never holds all logits at once. With
        `first_key` (B, T) integers, a position sees no key before that one, and is numbered from
        there: what shares a row, such as packed records, is computed as if each were alone. Keys
        are counted from the cache's first.
        DataError for ids outside the vocabulary, too many positions, or a `first_key` that is
        negative or after its own position.
        """
        ids = self._check_ids(ids)
        end = ids.shape[1] + (cache.length if cache else 0)
        limit = self.config.context
        if end > limit:
            raise DataError(f"{end} positions, but the model has {self.config.describe_context()}")
        if first_key is not None:
            first_key = self._check_first_key(first_key, ids.shape, end)
        hidden = self.decoder(ids, cache, first_key)
        if cache:
            if hidden.requires_grad and not cache.passes_gradients:
                raise GraphError(
                    "a KeyValueCache holds arrays, through which no gradient flows: "
                    "use it under no_grad()"
                )
            cache.advance(ids.shape[1])
        if targets is None:
            return self.lm_head(hidden[:, -1:] if cache else hidden)
        return self.sum_losses(hidden, targets)

    def sum_losses(self, hidden: Tensor, targets: Array) -> Tensor:
        """The sum of -log p(target), a scalar, from the decoder's output (B, T, C)."""
        head = self.lm_head
        if isinstance(head, Linear) and head.bias is None:
            return F.linear_cross_entropy(
                hidden, head.weight, targets, reduction="sum", compute=head.compute
            )
        return F.cross_entropy(head(hidden), targets, reduction="sum")

    def _check_ids(self, ids: Any) -> Array:
        """ids as an array (B, T) on the model's device. An array of a device is taken as it is."""
        backend = self.get_input_embeddings().weight.backend
        if isinstance(ids, Tensor):
            ids = ids.data
        if isinstance(ids, backend.xp.ndarray) and not isinstance(ids, np.ndarray):
            return ids  # to look at its values would wait for the device
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise DataError(
                f"ids must be integers of shape (batch, time), got {ids.dtype} {ids.shape}"
            )
        V = self.config.vocab_size
        if ids.min() < 0 or ids.max() >= V:
            raise DataError(f"ids must be in [0, {V}), got {ids.min()} to {ids.max()}")
        return backend.from_numpy(ids)

    def _check_first_key(self, first_key: Any, shape: tuple[int, ...], end: int) -> Array:
        """first_key as an array (B, T) on the model's device. Values on the host are checked."""
        backend = self.get_input_embeddings().weight.backend
        if isinstance(first_key, backend.xp.ndarray) and not isinstance(first_key, np.ndarray):
            return first_key
        first_key = np.asarray(first_key)
        if first_key.shape != shape or first_key.dtype.kind not in "iu":
            raise DataError(
                f"first_key must be integers of the ids' shape {shape}, "
                f"got {first_key.dtype} {first_key.shape}"
            )
        positions = np.arange(end - shape[1], end)
        if first_key.min() < 0 or (first_key > positions).any():
            raise DataError(
                "first_key must be at least 0 and at most each position's own key, "
                f"got {first_key.min()} to {first_key.max()} for keys {positions[0]} to "
                f"{positions[-1]}"
            )
        return backend.from_numpy(first_key.astype(np.int64, copy=False))

    @property
    def decoder(self) -> Any:
        """The model without its head, whichever name it has in the files."""
        return getattr(self, self.decoder_name)

    @property
    def is_llama_shaped(self) -> bool:
        """Is it made of this file's classes alone, which `decoding.Weights` knows?"""
        return type(self) is CausalLM and type(self.decoder) is Decoder

    @property
    def device(self) -> str:
        """The name of the device of the weights: "cpu", "cuda:0"."""
        return str(self.get_input_embeddings().weight.backend.name)

    @property
    def dtype(self) -> Any:
        """The dtype of the embedding's weight."""
        return self.get_input_embeddings().weight.dtype

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> Any:
        """`models.generation.generate` by transformers' names.    (B, T) -> (B, T + N)

        do_sample      False: always the likeliest token. True: drawn, with temperature (1), top_k
                       (all; transformers: 50), top_p (1) and seed (0)
        eos_token_id   the ids at which a text ends; None: none does

        ConfigError lists the names for one that is unknown.
        """
        check_names("generate()", options, GENERATION_OPTIONS)
        if not do_sample:
            ignored = [name for name in ("temperature", "top_k", "top_p") if name in options]
            if ignored:
                raise ConfigError(
                    f"{', '.join(ignored)} has no effect without do_sample=True, which draws "
                    "tokens: give that, too, or leave it out"
                )
            options["temperature"] = 0
        ends = () if eos_token_id is None else eos_token_id
        return generate(self, input_ids, max_new_tokens, eos=ends, pad=pad_token_id, **options)

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Train in less memory, with the same bits.

        Only one block's activations are held at a time, which takes about a third more time.
        """
        self.decoder.recompute = enable

    def get_base_model(self) -> CausalLM:
        """The model itself: a PeftModel has the same method."""
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
        compute: str = FLOAT32,
        download: bool = False,
    ) -> CausalLM:
        """The model of a folder, config.json and safetensors, read tensor by tensor; in eval mode.

        directory  the folder, or `org/name` or `org/name@revision` on the Hugging Face hub, whose
                   cache is read (formats/hub.py)
        stored   keep the weights that the files store in 16 bits so, frozen, and compute with them
                 in `dtype` (quant/half.py)
        compute  the arithmetic of the products with frozen weights: see `set_compute`
        download fetch what the cache lacks, by the package huggingface_hub

        FormatError lists every tensor that is missing, unknown, or of another shape than
        config.json says. Layers that are stored as bitsandbytes' codes become QuantizedLinear;
        ConfigError names a quantization that cannot be read.
        """
        # Before files are read.
        check_compute(compute, np.float64 if dtype in ("float64", np.float64) else np.float32)
        folder = find_model(directory, download)
        model = load_model(cls, folder, dtype, stored).to(device).eval()
        model.set_compute(compute)
        return model  # type: ignore[no-any-return]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that transformers loads: model.safetensors and config.json.

        Each file is written whole or not at all. ConfigError while the model has adapters, or
        layers of int8 codes, which transformers cannot read.
        """
        for name, _ in self.named_parameters():
            if name not in self._names and name != "lm_head.weight":
                raise ConfigError(
                    f"the model holds adapters ({name}, ...): save the PeftModel, "
                    "or merge_and_unload first"
                )
        save_model(self, directory)
