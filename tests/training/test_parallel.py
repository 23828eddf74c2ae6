"""A step over many shards: any cut equals no cut, threads change no bit, failures leave nothing."""

from __future__ import annotations

import dataclasses
import threading
import traceback
import types
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st
from shapes import shape

import minilora.training.parallel
from minilora import CausalLM, LoraConfig, LoraLinear, TransformerConfig, get_peft_model, gradients
from minilora.autograd import Node, Tensor, no_grad
from minilora.data import Batch, evaluation_windows
from minilora.data.batches import IGNORE
from minilora.data.records import Record, pack
from minilora.errors import ConfigError, GraphError
from minilora.models.dialects import MODEL_TYPES
from minilora.nn import Dropout, FusedProjection, checkpoint, dropout_counter
from minilora.threads import MAX_THREADS, available_cores
from minilora.training.parallel import (
    FLOATS_PER_SHARD,
    TOKENS_PER_SHARD,
    ShardedStep,
    language_modelling_loss,
    shard_size,
)

CONFIG = TransformerConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
)


def lora_model(dropout: float = 0.0, dtype: str = "float64"):
    """Both factors random, so that no gradient is zero by chance."""
    config = LoraConfig(
        r=2, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False
    )
    return get_peft_model(CausalLM(CONFIG, seed=1, dtype=dtype), config, seed=2)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def batch_of(sequences: int, length: int, seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (sequences, length + 1))
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy())


def layers(model):
    """The modules that prepare a step: fused projections, and layers that are in none of them."""
    modules = []
    inside = set()
    for _, module in model.named_modules():
        if isinstance(module, (FusedProjection, LoraLinear)):
            modules.append(module)
        if isinstance(module, FusedProjection):
            inside |= {id(getattr(module, name)) for name in module.projections}
    return [module for module in modules if id(module) not in inside]


def has_effective_weights(model):
    return [any(layer._effective.values()) for layer in layers(model)]


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("minilora")]


def whole(model, batch, params, seed=0, step=0):
    """The definition: one forward, one backward, one division, no ShardedStep."""
    with dropout_counter(seed, step):
        loss = language_modelling_loss(model, batch)
    counted = max(int((batch.targets != IGNORE).sum()), 1)
    return loss.item() / counted, [g / counted for g in gradients(loss, params)]


def assert_same_to_rounding(result, expected, rel=1e-12):
    loss, grads = result
    expected_loss, expected_grads = expected
    assert loss == pytest.approx(expected_loss, rel=rel, abs=1e-300)
    scale = max(np.abs(g).max() for g in expected_grads)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert np.abs(grad - other).max() <= rel * scale


def step_bits(result):
    loss, grads = result
    return float(loss), [g.tobytes() for g in grads]


# ---- any cut equals no cut ----


@st.composite
def batches(draw):
    """A batch in which any targets do not count, maybe none in a row, maybe none at all."""
    sequences = draw(st.integers(1, 7))
    length = draw(st.integers(1, 5))
    batch = batch_of(sequences, length, draw(st.integers(0, 99)))
    counts = draw(st.lists(st.integers(0, length), min_size=sequences, max_size=sequences))
    for row, count in zip(batch.targets, counts, strict=True):
        order = draw(st.permutations(range(length)))
        row[order[count:]] = IGNORE
    return batch


@given(
    batch=batches(),
    shard=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.4]),
    step=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_gradients_of_any_cut_equal_those_of_the_whole_batch(batch, shard, dropout, step, seed):
    model = lora_model(dropout).train()
    params = trainable(model)
    expected = whole(model, batch, params, seed, step)
    with ShardedStep(model, threads=2, shard=shard) as sharded:
        assert_same_to_rounding(sharded.gradients(batch, params, seed, step), expected)


def test_gradients_draw_dropout_masks_from_seed_and_step():
    model = lora_model(0.5).train()
    params, batch = trainable(model), batch_of(4, 4)
    losses = []
    with ShardedStep(model, threads=1, shard=2) as sharded:
        for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
            loss, _ = sharded.gradients(batch, params, seed, step)
            losses.append(loss)
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_gradients_of_a_batch_without_counted_targets_are_zero():
    model, batch = lora_model(), batch_of(3, 4)
    batch.targets[:] = IGNORE
    with ShardedStep(model, threads=2, shard=2) as sharded:
        loss, grads = sharded.gradients(batch, trainable(model))
    assert loss == 0
    assert all(g is None or not g.any() for g in grads)


def test_losses_are_the_sums_of_the_shards_in_order_without_gradients():
    model, batch = lora_model().eval(), batch_of(5, 3)
    batch.targets[3:] = IGNORE
    recorded = []

    def loss(model, shard):
        value = language_modelling_loss(model, shard)
        recorded.append(value.requires_grad)
        return value

    with ShardedStep(model, threads=3, shard=2, loss=loss) as sharded:
        losses = list(sharded.losses([batch, batch.shard(0, 1)]))
    assert recorded == [False] * 4
    shards = [batch.shard(0, 2), batch.shard(2, 4), batch.shard(4, 6), batch.shard(0, 1)]
    assert losses == [(language_modelling_loss(model, s).item(), s.tokens) for s in shards]
    assert [count for _, count in losses] == [6, 3, 0, 3]


def test_gradients_are_none_for_a_parameter_that_takes_no_part():
    model = CausalLM(CONFIG, dtype="float64")
    weight = model.lm_head.weight
    unused = CausalLM(CONFIG, seed=9).lm_head.weight
    with ShardedStep(model, threads=1) as sharded:
        _, (grad, none) = sharded.gradients(batch_of(2, 3), [weight, unused])
    assert grad.shape == weight.shape
    assert none is None


def test_sharded_step_keeps_the_effective_weight_for_one_step_without_dropout():
    for dropout in (0.0, 0.3):
        model = lora_model(dropout).train()
        seen = []

        def loss(model, batch, seen=seen):
            seen.extend(has_effective_weights(model))
            return language_modelling_loss(model, batch)

        with ShardedStep(model, threads=2, shard=1, loss=loss) as sharded:
            sharded.gradients(batch_of(3, 2), trainable(model))
        assert set(seen) == {dropout == 0}
        assert not any(has_effective_weights(model))


# ---- the same bits ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_have_the_same_bits_for_any_number_of_threads(dropout):
    model = lora_model(dropout, "float32").train()
    params, batch = trainable(model), batch_of(9, 6)
    results = []
    for threads in (1, 2, 4):
        with ShardedStep(model, threads=threads, shard=2) as sharded:
            grads = step_bits(sharded.gradients(batch, params, 5, 6))
            # Dropout is off where a text is measured.
            losses = [] if dropout else list(sharded.losses([batch]))
            results.append((grads, losses))
    assert results[1] == results[0]
    assert results[2] == results[0]


@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_are_added_as_a_tree_over_the_shards(threads, monkeypatch):
    model = lora_model(dtype="float32").train()
    params, batch = trainable(model), batch_of(5, 6)
    plain = minilora.training.parallel.gradients
    shards = {}

    def recorded(loss, params, upstream):
        grads = plain(loss, params, upstream)
        shards[loss.item()] = [grad.copy() for grad in grads]
        return grads

    monkeypatch.setattr(minilora.training.parallel, "gradients", recorded)
    with ShardedStep(model, threads=threads, shard=1) as sharded:
        _, grads = sharded.gradients(batch, params)
        losses = [loss for loss, _ in sharded.losses([batch])]
    assert len(shards) == 5
    a, b, c, d, e = (shards[loss] for loss in losses)
    tree = [((v + w) + (x + y)) + z for v, w, x, y, z in zip(a, b, c, d, e, strict=True)]
    row = [(((v + w) + x) + y) + z for v, w, x, y, z in zip(a, b, c, d, e, strict=True)]
    assert [g.tobytes() for g in grads] == [g.tobytes() for g in tree]
    assert [g.tobytes() for g in grads] != [g.tobytes() for g in row]


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (0, 1, 2, 3), (2, 0, 3, 1)])
def test_gradients_do_not_depend_on_the_order_in_which_shards_finish(order):
    model = lora_model(dtype="float32").train()
    params, batch = trainable(model), batch_of(4, 6)
    with ShardedStep(model, threads=1, shard=1) as sharded:
        expected = sharded.gradients(batch, params)
    finished = {place: threading.Event() for place in order}

    def in_that_order(model, shard):
        value = language_modelling_loss(model, shard)
        before = order[: order.index(shard.first)]
        assert all(finished[place].wait(60) for place in before)
        finished[shard.first].set()
        return value

    with ShardedStep(model, threads=4, shard=1, loss=in_that_order) as sharded:
        result = sharded.gradients(batch, params)
    assert step_bits(result) == step_bits(expected)


def test_sharded_step_runs_at_most_one_shard_per_thread():
    model = lora_model()
    lock = threading.Lock()
    running = set()
    counts = []

    def loss(model, shard):
        with lock:
            running.add(shard.first)
            counts.append(len(running))
        value = language_modelling_loss(model, shard)
        with lock:
            running.discard(shard.first)
        return value

    with ShardedStep(model, threads=2, shard=1, loss=loss) as sharded:
        sharded.gradients(batch_of(12, 3), trainable(model))
    assert 1 <= max(counts) <= 2


def test_losses_cut_shards_only_as_they_are_needed():
    """A long text never waits whole: the number of threads limits the shards that wait."""
    model = lora_model()
    drawn = []
    seen = []

    def text():
        for i in range(20):
            drawn.append(i)
            yield batch_of(1, 3, i)

    with ShardedStep(model, threads=2, shard=1) as sharded:
        for loss in sharded.losses(text()):
            seen.append(loss)
            assert len(drawn) <= len(seen) + 3
    assert len(seen) == 20


# ---- failures leave nothing behind ----


class ShardError(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 3, 5])
def test_gradients_raise_a_shard_s_exception_once_and_can_be_used_again(threads, bad):
    model = lora_model()
    params, batch = trainable(model), batch_of(6, 3)
    expected = whole(model, batch, params)
    broken, running = [True], set()

    def loss_that_breaks(model, shard):
        running.add(shard.first)
        try:
            if broken[0] and shard.first == bad:
                raise ShardError(f"shard {bad}")
            return language_modelling_loss(model, shard)
        finally:
            running.discard(shard.first)

    with ShardedStep(model, threads=threads, shard=1, loss=loss_that_breaks) as sharded:
        with pytest.raises(ShardError, match=f"shard {bad}") as caught:
            sharded.gradients(batch, params)
        error = caught.value
        assert error.__cause__ is None
        assert error.__context__ is None
        frames = traceback.extract_tb(error.__traceback__)
        assert "loss_that_breaks" in {frame.name for frame in frames}
        assert not running
        assert not any(has_effective_weights(model))
        with pytest.raises(ShardError, match=f"shard {bad}"):
            list(sharded.losses([batch]))
        broken[0] = False
        assert_same_to_rounding(sharded.gradients(batch, params), expected)
    assert not workers()


def test_gradients_raise_only_after_the_running_shards_end():
    started, finished = threading.Event(), threading.Event()

    def loss(model, shard):
        if shard.first == 0:
            assert started.wait(60)
            raise ShardError
        started.set()
        finished.wait(0.2)  # long after the other has failed
        finished.set()
        return language_modelling_loss(model, shard)

    model = lora_model()
    with ShardedStep(model, threads=2, shard=1, loss=loss) as sharded:
        with pytest.raises(ShardError):
            sharded.gradients(batch_of(2, 3), trainable(model))
        assert finished.is_set()


def test_gradients_raise_the_first_shard_s_exception_if_all_fail():
    def loss(model, shard):
        raise ShardError(f"shard {shard.first}")

    model = lora_model()
    with (
        ShardedStep(model, threads=4, shard=1, loss=loss) as sharded,
        pytest.raises(ShardError, match="shard 0"),
    ):
        sharded.gradients(batch_of(6, 3), trainable(model))
    assert not workers()


@pytest.mark.parametrize("keep", [True, False])
def test_sharded_step_calls_keep_memory_only_if_set(keep, monkeypatch):
    called = []
    monkeypatch.setattr(minilora.training.parallel, "keep_memory", lambda: called.append(True))
    with ShardedStep(lora_model(0.0), threads=1, keep_memory=keep):
        pass
    assert called == [True] * keep


def test_keep_memory_does_nothing_without_glibc(monkeypatch):
    for missing in (OSError, TypeError, AttributeError):

        def nothing(name, missing=missing):
            raise missing

        monkeypatch.setattr(minilora.threads.ctypes, "CDLL", nothing)
        minilora.threads.keep_memory()


def test_sharded_step_ends_its_threads_with_the_block():
    model = lora_model()
    with ShardedStep(model, threads=3, shard=1) as sharded:
        sharded.gradients(batch_of(6, 3), trainable(model))
        assert workers()
        half_read = sharded.losses([batch_of(6, 3)])
        next(half_read)
    assert not workers()


@pytest.mark.parametrize("name", ["threads", "shard"])
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), "2", True])
def test_sharded_step_refuses_bad_numbers_of_threads_and_sequences(name, value):
    with pytest.raises(ConfigError, match=name):
        ShardedStep(lora_model(), **{name: value})


def test_sharded_step_limits_the_number_of_threads():
    model = lora_model()
    with ShardedStep(model, threads=10**9, shard=1) as sharded:
        assert sharded.threads == MAX_THREADS
        assert len(list(sharded.losses([batch_of(5, 2)]))) == 5


def test_gradients_refuse_a_model_with_nothing_to_train():
    model = lora_model()
    for p in model.parameters():
        p.requires_grad = False
    with (
        ShardedStep(model, threads=2, shard=1) as sharded,
        pytest.raises(ConfigError, match="nothing to train"),
    ):
        sharded.gradients(batch_of(3, 3), [])
    assert not workers()


def test_shard_size_depends_on_the_shape_alone():
    model = lora_model()
    sizes = []
    assert shard_size(model, 10**6, 1) == TOKENS_PER_SHARD
    assert [shard_size(model, 8, n * TOKENS_PER_SHARD) for n in (1, 10)] == [1, 1]
    two_cores = [shard_size(model, n, 2) for n in (1, 2, 3, 8, 9)]
    assert two_cores == [1, 1, 2, 4, 5]
    config = types.SimpleNamespace(intermediate_size=2048)
    wide = types.SimpleNamespace(parameters=model.parameters, config=config)
    assert shard_size(wide, 100, 32) == FLOATS_PER_SHARD // 2048 // 32

    def loss(model, shard):
        sizes.append(len(shard))
        return language_modelling_loss(model, shard)

    with ShardedStep(model, threads=1, loss=loss) as sharded:
        sharded.gradients(batch_of(TOKENS_PER_SHARD // 4 + 3, 4), trainable(model))
        sharded.gradients(batch_of(TOKENS_PER_SHARD // 2 + 3, 4), trainable(model))
    tokens = TOKENS_PER_SHARD
    assert sizes == [tokens // 8 + 2, tokens // 8 + 1, tokens // 4, tokens // 4, 3]
    assert ShardedStep(model).threads == available_cores() >= 1


# ---- BLAS ----


def blas_threads():
    pools = threadpoolctl.threadpool_info()
    return [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]


@pytest.mark.parametrize("threads", [1, 2])
def test_sharded_step_limits_blas_to_one_thread_inside_the_block(threads):
    model = lora_model()
    if not blas_threads():
        pytest.skip("no BLAS that threadpoolctl knows")
    with threadpoolctl.threadpool_limits(2, "blas"):
        before, inside = blas_threads(), []

        def loss(model, shard):
            inside.append(blas_threads())
            return language_modelling_loss(model, shard)

        with ShardedStep(model, threads=threads, shard=1, loss=loss) as sharded:
            sharded.gradients(batch_of(3, 2), trainable(model))
        assert blas_threads() == before
        with pytest.raises(ShardError), ShardedStep(model, threads=threads):
            raise ShardError
        assert blas_threads() == before
    assert {count for counts in inside for count in counts} == {1}


def test_sharded_step_warns_of_a_blas_that_it_cannot_limit(monkeypatch):
    class NothingFound(threadpoolctl.threadpool_limits):
        def get_original_num_threads(self):
            return dict.fromkeys(super().get_original_num_threads())

    monkeypatch.setattr(threadpoolctl, "threadpool_limits", NothingFound)
    with pytest.warns(UserWarning, match="no BLAS"), ShardedStep(lora_model(), threads=1):
        pass


# ---- recomputation ----


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_checkpointing_changes_no_bit(dropout, threads):
    model = lora_model(dropout).train()
    batch = batch_of(5, 4)
    results = []
    for enable in (False, True):
        model.get_base_model().gradient_checkpointing_enable(enable)
        with ShardedStep(model, threads=threads, shard=2) as sharded:
            result = sharded.gradients(batch, trainable(model), seed=3, step=4)
        results.append(step_bits(result))
    assert results[0] == results[1]


def stored_floats(loss, least):
    """The total size of the arrays of at least `least` values that the graph of a loss stores."""
    sizes = {}
    waiting = [loss.node]
    while waiting:
        node = waiting.pop()
        waiting += [p for p in node.parents if isinstance(p, Node)]
        for cell in node.vjp.__closure__ or ():
            array = cell.cell_contents
            if isinstance(array, np.ndarray) and array.size >= least:
                sizes[id(array)] = array.size
    return sum(sizes.values())


def test_gradient_checkpointing_stores_only_the_input_of_a_block():
    model = lora_model(0.0).train()
    batch = batch_of(5, 4)
    stored = []
    for enable in (False, True):
        model.get_base_model().gradient_checkpointing_enable(enable)
        loss = language_modelling_loss(model, batch)
        stored.append(stored_floats(loss, batch.ids.size))
    hidden = batch.ids.size * CONFIG.hidden_size
    assert stored[1] <= (CONFIG.num_hidden_layers + 4) * hidden < stored[0]


def test_checkpoint_repeats_dropout_without_a_counter():
    x, layer = Tensor(np.ones((2, 50)), True), Dropout(0.5)
    for _ in range(2):
        y = checkpoint(layer, x, [])
        np.testing.assert_array_equal(gradients(y, [x], np.ones((2, 50)))[0], y.data)
    with no_grad():
        assert not checkpoint(layer, x, []).requires_grad
    assert not checkpoint(layer, x.detach(), []).requires_grad


def test_checkpoint_loses_no_gradient_of_a_leaf_that_params_lacks():
    x, A, B = (Tensor(np.arange(1.0, 5).reshape(2, 2), True) for _ in range(3))
    for params in ([A], [], A):
        y = checkpoint(lambda z: z @ A @ B, x, params)
        with pytest.raises(GraphError, match="not among params: their gradients would be lost"):
            y.backward(np.ones((2, 2)))


def test_checkpoint_counts_a_leaf_once_that_params_has_twice():
    x, A = (Tensor(np.arange(1.0, 5).reshape(2, 2), True) for _ in range(2))
    dy = np.ones((2, 2))
    expected = gradients(x @ A, [x, A], dy)
    got = gradients(checkpoint(lambda z: z @ A, x, [A, A]), [x, A], dy)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_checkpoint_notices_a_parameter_that_changes_before_the_second_forward():
    x, w = Tensor(np.ones(3), True), Tensor(np.ones(3), True)
    y = checkpoint(lambda z: z * w, x, [w])
    w.data = np.full(3, 2.0)
    with pytest.raises(GraphError, match="checkpoint"):
        y.backward(np.ones(3))


# ---- packed records ------------------------------------------------------------------------------


def records(sizes: list[int]) -> list[Record]:
    """Records of these sizes, each with its own ids and targets."""
    made = []
    for number, size in enumerate(sizes):
        rng = np.random.default_rng([number, size])
        learned = rng.random(size) < 0.7
        learned[0] = False
        learned[-1] = True
        made.append(Record(rng.integers(0, 16, size).astype(np.int32), learned, float(size)))
    return made


@st.composite
def two_packings(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """(order, context) of the same 2 to 8 records, twice; each context holds the longest record."""
    count = draw(st.integers(2, 8))
    return [(draw(st.permutations(range(count))), draw(st.integers(5, 16))) for _ in range(2)]


def adapted(kind: str, dtype: str) -> Any:
    model = CausalLM(dataclasses.replace(shape(kind), vocab_size=16), seed=1, dtype=dtype)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config, seed=2)


# Gradients are sums in which terms cancel, so that float32 keeps a digit less of them.
PACKING_BOUNDS = {"float64": (1e-12, 2e-12), "float32": (1e-6, 1e-5)}


@pytest.mark.parametrize("dtype", PACKING_BOUNDS)
@pytest.mark.parametrize("kind", MODEL_TYPES)
@given(st.data())
def test_losses_and_gradients_do_not_depend_on_how_records_are_packed(kind, dtype, data):
    (first, context), (second, other) = data.draw(two_packings())
    made = records([2 + (5 * i) % 5 for i in range(len(first))])
    model = adapted(kind, dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    measured = []
    for order, width in ((first, context), (second, other)):
        packed = pack([made[i] for i in order], width)
        windows = list(evaluation_windows(packed, width, 4))
        with ShardedStep(model, 2) as sharded:
            loss = sum(loss for loss, _ in sharded.losses(windows))
            sums = [np.zeros(p.shape) for p in params]
            for batch in windows:
                _, grads = sharded.gradients(batch, params)
                for total, grad in zip(sums, grads, strict=True):
                    total += grad * float(batch.tokens)
        measured.append((loss, np.concatenate([total.ravel() for total in sums])))
    (loss, grads), (other_loss, other_grads) = measured
    loss_bound, gradient_bound = PACKING_BOUNDS[dtype]
    assert abs(loss - other_loss) <= loss_bound * loss
    assert np.abs(grads - other_grads).max() <= gradient_bound * np.abs(grads).max()


def test_trim_changes_no_loss_and_no_gradient():
    model = adapted("llama", "float64")
    params = [p for p in model.parameters() if p.requires_grad]
    [batch] = evaluation_windows(pack(records([6, 4, 3]), 7), 7, 4)
    trimmed = batch.trim()
    assert (batch.ids.shape, trimmed.ids.shape) == ((2, 7), (2, 6))
    assert trimmed.tokens == batch.tokens
    losses = [language_modelling_loss(model, b) for b in (batch, trimmed)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-14)
    for one, other in zip(*(gradients(loss, params) for loss in losses), strict=True):
        assert np.allclose(one, other, rtol=1e-12, atol=1e-15)
    empty = dataclasses.replace(batch, targets=np.full_like(batch.targets, IGNORE))
    assert empty.trim().ids.shape == (2, 1)
