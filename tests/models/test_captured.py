"""Generation on a GPU: kernels beside their reference bodies, a graph beside eager tokens."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import numpy as np
import pytest
from cupy_on_cpu import counted
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, randomised, shape

from minilora import CausalLM, TransformerConfig, generate, no_grad
from minilora.backend import NUMPY, get_backend
from minilora.cuda.attention import MOST_CHANNELS
from minilora.cuda.operations import OPERATIONS
from minilora.errors import NonFiniteError
from minilora.models.cache import KeyValueCache
from minilora.models.captured import WARM_UP, CapturedDecoding, _attend_newest, start_decoding
from minilora.models.decoding import Decoding, Weights
from minilora.models.generation import _pick_largest, stream
from minilora.threads import Workers

pytestmark = pytest.mark.gpu
ROUNDING = {"float32": 2e-6, "float64": 2e-12}
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


def started(model: Any, prompt: np.ndarray, limit: int) -> Any:
    """What continues after a prompt."""
    with Workers(0) as workers:
        weights = Weights.of(model, workers)
    assert weights is not None
    cache = KeyValueCache(model, len(prompt), limit)
    with no_grad():
        model(prompt, cache)
    return start_decoding(weights, cache)


# ---- kernels -------------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.sampled_from([2, 6, 16, 18, 64, 80, 256]),
    st.integers(1, 300),
    st.sampled_from([None, 1, 5, 100]),
    st.booleans(),
    st.sampled_from(list(ROUNDING)),
    st.integers(0, 99),
)
def test_attend_newest_kernel_equals_the_reference_body(
    B: int,
    heads: tuple[int, int],
    D: int,
    limit: int,
    window: int | None,
    has_norms: bool,
    dtype: str,
    seed: int,
) -> None:
    """y within the rounding of the largest value; in the cache nothing changes but the newest."""
    H, K = heads
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, limit, B)
    shapes = (B, (H + 2 * K) * D), (2, B, K, limit, D), (limit, (H + K) * D), (H + K, D)
    qkv, cache, rotations, norms = (rng.standard_normal(size).astype(dtype) for size in shapes)
    arrays = [qkv, cache, rotations * score_scale(D, dtype), norms if has_norms else None]
    gpu = get_backend("cuda")
    there = [None if z is None else gpu.from_numpy(z) for z in (*arrays, lengths)]
    y = OPERATIONS["_attend_newest"](gpu, *there, H, window, 1e-6)
    exactly = [None if z is None else z.astype(float) for z in arrays]
    exact = _attend_newest(NUMPY, *exactly, lengths, H, window, 1e-6)
    near(gpu.to_numpy(y), exact, dtype)
    changed = gpu.to_numpy(there[1])
    near(changed, exactly[1], dtype)
    others = np.arange(limit) != lengths[:, None]  # (B, limit)
    mine, before = (z.transpose(1, 3, 0, 2, 4)[others] for z in (changed, cache))
    np.testing.assert_array_equal(mine, before)
    np.testing.assert_array_equal(gpu.to_numpy(there[0]), qkv)


def score_scale(D: int, dtype: str) -> Any:
    """A factor for cos and sin, so that scores are of the order of 1."""
    return np.array(D**-0.25, dtype)


def near(mine: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    assert mine.dtype == dtype
    np.testing.assert_allclose(mine, exact, rtol=0, atol=ROUNDING[dtype] * np.abs(exact).max())


def test_attend_newest_reads_nothing_beyond_the_newest_position() -> None:
    """Memory of a cache that was never written may hold anything, NaN too."""
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    qkv = gpu.from_numpy(rng.standard_normal((2, 3 * 4)))
    cache = np.full((2, 2, 1, 9, 4), np.nan)
    cache[..., :5, :] = 1
    rotations = gpu.from_numpy(np.ones((9, 2 * 4)))
    inputs = qkv, gpu.from_numpy(cache), rotations, None, gpu.from_numpy(np.array([5, 5]))
    y = OPERATIONS["_attend_newest"](gpu, *inputs, 1, None, 1e-6)
    assert np.isfinite(gpu.to_numpy(y)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("V", [1, 2, 31, 33, 500, 5000])
def test_pick_largest_kernel_equals_the_reference_body(V: int, dtype: str) -> None:
    rng = np.random.default_rng(V)
    Z = np.rint(rng.standard_normal((9, V)) * 2).astype(dtype)  # most have several largest
    Z[1] = -np.inf
    Z[2, V // 2] = np.nan
    Z[3, V - 1] = np.inf
    Z[4, : V - 1] = -np.inf
    Z[5] = np.finfo(dtype).min
    Z[6, V // 3 :] = 7
    Z[7, 0] = np.nan
    gpu = get_backend("cuda")
    ids = OPERATIONS["_pick_largest"](gpu, gpu.from_numpy(Z))
    np.testing.assert_array_equal(gpu.to_numpy(ids), _pick_largest(NUMPY, Z))
    assert (gpu.to_numpy(ids)[[1, 2, 3, 7]] == -1).all()
    there = _pick_largest(gpu, gpu.from_numpy(Z))
    np.testing.assert_array_equal(gpu.to_numpy(there), gpu.to_numpy(ids))


# ---- tokens --------------------------------------------------------------------------------------


@given(configs(LLAMA_LIKE), st.integers(0, 99), st.integers(1, 6), st.integers(1, 8))
def test_captured_decoding_gives_the_logits_of_the_cpu(
    config: TransformerConfig, seed: int, prompt: int, steps: int
) -> None:
    count = prompt + steps
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, count))
    model = randomised(config, seed=seed).eval()
    on_cpu = started(model, ids[:, :prompt], count)
    assert isinstance(on_cpu, Decoding)
    expected = [on_cpu(ids[:, t]) for t in range(prompt, count)]
    mine = started(model.to("cuda"), ids[:, :prompt], count)
    assert isinstance(mine, CapturedDecoding)
    for t, exact in enumerate(expected, start=prompt):
        logits = get_backend("cuda").to_numpy(mine(ids[:, t]))
        bound = 1e-12 * max(1, np.abs(exact).max())
        np.testing.assert_allclose(logits, exact, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_captured_decoding_replays_the_bits_of_eager_tokens(kind: str) -> None:
    config = shape(kind, max_position_embeddings=64)
    model = CausalLM(config, seed=3, device="cuda").eval()
    ids = np.random.default_rng(3).integers(0, config.vocab_size, (3, 60))
    graph, eager = (started(model, ids[:, :4], 60) for _ in range(2))
    eager.weights.recorder = None
    eager.calls = WARM_UP + 1  # never captures
    to_numpy = get_backend("cuda").to_numpy
    for t in range(4, 60):
        np.testing.assert_array_equal(to_numpy(graph(ids[:, t])), to_numpy(eager(ids[:, t])))
    assert graph.graph is not None
    assert eager.graph is None


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("temperature", "launches"), [(0, 1), (0.9, 0)])
def test_stream_on_a_gpu_takes_one_graph_and_one_wait_per_token(
    temperature: float, launches: int
) -> None:
    """Greedy choices are made on the device: one more launch, and only ids move."""
    model = CausalLM(shape("qwen3", max_position_embeddings=64), seed=1, device="cuda").eval()
    tokens = stream(model, np.ones((2, 3), int), 30, temperature=temperature, top_k=4)
    operations = []
    for i in range(30):
        with counted() as device:
            next(tokens)
        operations.append(device.operations)
        if i > WARM_UP:  # the first token is the prompt's
            counts = device.counts._replace(allocations=0)
            assert counts == (launches, 0, 0, 0, 1, 1, 1, 1, 0)
        else:
            assert device.waits == 1
            assert device.replays == 0
    # Per layer two norms, attention, SwiGLU and products; none of them depends on the length.
    assert operations[1] == operations[2]


def test_stream_on_a_gpu_captures_once_however_often_its_context_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = CausalLM(shape("llama", max_position_embeddings=12), seed=2, device="cuda").eval()
    captures = []
    capture = CapturedDecoding._capture

    def counting(self: CapturedDecoding) -> None:
        captures.append(self.lengths)
        capture(self)

    monkeypatch.setattr(CapturedDecoding, "_capture", counting)
    prompt = np.arange(6).reshape(2, 3)
    text = generate(model, prompt, 60, temperature=0)
    assert len(captures) == 1
    np.testing.assert_array_equal(text, generate(model.to("cpu"), prompt, 60, temperature=0))


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_generate_on_a_gpu_takes_prompts_of_several_lengths(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one graph, in which each sequence has its own length; contexts are full by turns."""
    model = randomised(shape(kind, max_position_embeddings=12), seed=2).eval()
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 11, length) for length in (3, 9, 1, 3, 40)]
    expected = generate(model, prompts, 40, temperature=0)
    captures = []
    capture = CapturedDecoding._capture

    def counting(self: CapturedDecoding) -> None:
        captures.append(self.lengths)
        capture(self)

    monkeypatch.setattr(CapturedDecoding, "_capture", counting)
    texts = generate(model.to("cuda"), prompts, 40, temperature=0)
    assert len(captures) == 1
    for text, exact in zip(texts, expected, strict=True):
        np.testing.assert_array_equal(text, exact)


def test_streams_on_a_gpu_may_take_turns() -> None:
    """Their graphs share the memory of intermediate results."""
    models = [
        CausalLM(shape(kind, max_position_embeddings=64), seed=2, device="cuda").eval()
        for kind in ("llama", "qwen3", "qwen2")
    ]
    prompts = [np.ones((count, 3), int) for count in (1, 3, 2)]
    pairs = list(zip(models, prompts, strict=True))
    alone = [list(stream(*pair, 20, temperature=0)) for pair in pairs]
    by_turns = zip(*(stream(*pair, 20, temperature=0) for pair in pairs), strict=True)
    for expected, tokens in zip(zip(*alone, strict=True), by_turns, strict=True):
        for one, other in zip(expected, tokens, strict=True):
            np.testing.assert_array_equal(one, other)


def test_generate_on_a_gpu_leaves_no_memory_behind() -> None:
    gpu = get_backend("cuda")
    model = CausalLM(shape("llama"), seed=2, device="cuda").eval()
    used = []
    for _ in range(3):
        generate(model, np.ones((2, 3), int), 10, temperature=0)
        gc.collect()
        used.append(gpu.xp.get_default_memory_pool().used_bytes())
    assert used[1] == used[2]


def test_captured_decoding_without_a_graph_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = CausalLM(shape("llama"), seed=2, device="cuda").eval()
    prompt = np.arange(6).reshape(2, 3)
    expected = generate(model, prompt, 20, temperature=0)

    def refuse(self: Any, work: Any) -> Any:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported\nmore")

    monkeypatch.setattr("minilora.cuda.graphs.Recorder.capture", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = generate(model, prompt, 20, temperature=0)
    np.testing.assert_array_equal(text, expected)
    (warning,) = caught
    assert "cuda:0: a token's work cannot be captured" in str(warning.message)
    assert "(cudaErrorStreamCaptureUnsupported); it runs one operation" in str(warning.message)


def test_stream_on_a_gpu_with_heads_beyond_the_kernels_uses_the_reference_body() -> None:
    config = shape("llama", head_dim=MOST_CHANNELS + 2, num_attention_heads=1)
    model = CausalLM(config, seed=2, device="cuda").eval()
    prompt = np.arange(6).reshape(2, 3)
    text = generate(model, prompt, 12, temperature=0)
    np.testing.assert_array_equal(text, generate(model.to("cpu"), prompt, 12, temperature=0))


@pytest.mark.parametrize("temperature", [0, 1])
def test_generate_on_a_gpu_refuses_logits_that_are_not_finite(temperature: float) -> None:
    model = CausalLM(shape("llama"), seed=2, device="cuda").eval()
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="no finite logit"):
        generate(model, np.ones((2, 3), int), 5, temperature=temperature)
