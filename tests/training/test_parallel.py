"""One step over many shards: any cut equals no cut, threads change no bit, and nothing is left behind."""

from __future__ import annotations

import threading
import traceback
import types

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

import minilora.training.parallel
from minilora import CausalLM, LoraConfig, LoraLinear, TransformerConfig, get_peft_model, gradients
from minilora.autograd import Node, Tensor, no_grad
from minilora.data import Batch
from minilora.data.batches import IGNORE
from minilora.errors import ConfigError, GraphError
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
    """What prepares a step: fans for the layers in them, and the others."""
    found = [m for path, m in model.named_modules() if isinstance(m, (FusedProjection, LoraLinear))]
    inside = {
        id(getattr(fan, name))
        for fan in found
        if isinstance(fan, FusedProjection)
        for name in fan.fan
    }
    return [m for m in found if id(m) not in inside]


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("minilora")]


def whole(model, batch, params, seed=0, step=0):
    """The definition: one forward, one backward, one division, no ShardedStep."""
    with dropout_counter(seed, step):
        loss = language_modelling_loss(model, batch)
    counted = max(int((batch.targets != IGNORE).sum()), 1)
    return loss.item() / counted, [g / counted for g in gradients(loss, params)]


def assert_same_to_rounding(found, expected, rel=1e-12):
    assert found[0] == pytest.approx(expected[0], rel=rel, abs=1e-300)
    scale = max(np.abs(g).max() for g in expected[1])
    for one, other in zip(found[1], expected[1], strict=True):
        assert np.abs(one - other).max() <= rel * scale


# ---- any cut equals no cut ----


@st.composite
def batches(draw):
    sequences, length = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    batch = batch_of(sequences, length, draw(st.integers(0, 99)))
    counts = draw(st.lists(st.integers(0, length), min_size=sequences, max_size=sequences))
    for row, count in zip(batch.targets, counts, strict=True):
        row[draw(st.permutations(range(length)))[count:]] = (
            IGNORE  # a row may count nothing, and so may all of them
        )
    return batch


@given(
    batches(),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.4]),
    st.integers(0, 3),
    st.integers(0, 2**40),
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
    with ShardedStep(model, threads=1, shard=2) as sharded:
        losses = [
            sharded.gradients(batch, params, seed, step)[0]
            for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))
        ]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_gradients_of_a_batch_without_counted_targets_are_zero():
    model, batch = lora_model(), batch_of(3, 4)
    batch.targets[:] = IGNORE
    with ShardedStep(model, threads=2, shard=2) as sharded:
        loss, found = sharded.gradients(batch, trainable(model))
    assert loss == 0
    assert all(g is None or not g.any() for g in found)


def test_losses_are_the_sums_of_the_shards_in_order_without_gradients():
    model, batch = lora_model().eval(), batch_of(5, 3)
    batch.targets[3:] = IGNORE
    recorded = []

    def loss(model, shard):
        value = language_modelling_loss(model, shard)
        recorded.append(value.requires_grad)
        return value

    with ShardedStep(model, threads=3, shard=2, loss=loss) as sharded:
        found = list(sharded.losses([batch, batch.shard(0, 1)]))
    assert recorded == [False] * 4
    shards = [batch.shard(0, 2), batch.shard(2, 4), batch.shard(4, 6), batch.shard(0, 1)]
    assert found == [(language_modelling_loss(model, s).item(), s.tokens) for s in shards]
    assert [count for _, count in found] == [6, 3, 0, 3]


def test_gradients_are_none_for_a_parameter_that_takes_no_part():
    model = CausalLM(CONFIG, dtype="float64")
    stranger = CausalLM(CONFIG, seed=9).lm_head.weight
    with ShardedStep(model, threads=1) as sharded:
        _, (own, other) = sharded.gradients(batch_of(2, 3), [model.lm_head.weight, stranger])
    assert own.shape == model.lm_head.weight.shape
    assert other is None


def test_sharded_step_keeps_the_effective_weight_for_one_step_without_dropout():
    for dropout in (0.0, 0.3):
        model = lora_model(dropout).train()
        seen = []

        def loss(model, batch, seen=seen):
            seen.extend(any(layer._effective.values()) for layer in layers(model))
            return language_modelling_loss(model, batch)

        with ShardedStep(model, threads=2, shard=1, loss=loss) as sharded:
            sharded.gradients(batch_of(3, 2), trainable(model))
        assert set(seen) == {dropout == 0}
        assert all(not any(layer._effective.values()) for layer in layers(model))


# ---- the same bits ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_have_the_same_bits_for_any_number_of_threads(dropout):
    model = lora_model(dropout, "float32").train()
    params, batch = trainable(model), batch_of(9, 6)
    results = []
    for threads in (1, 2, 4):
        with ShardedStep(model, threads=threads, shard=2) as sharded:
            loss, found = sharded.gradients(batch, params, 5, 6)
            held_out = (
                list(sharded.losses([batch])) if dropout == 0 else []
            )  # dropout is off where a text is measured
            results.append((loss, [g.tobytes() for g in found], held_out))
    assert results[1] == results[0]
    assert results[2] == results[0]


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
        loss, found = sharded.gradients(batch, params)
    assert loss == expected[0]
    assert [g.tobytes() for g in found] == [g.tobytes() for g in expected[1]]


def test_sharded_step_runs_at_most_one_shard_per_thread():
    model, lock = lora_model(), threading.Lock()
    running, most = [0], [0]

    def loss(model, shard):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        value = language_modelling_loss(model, shard)
        with lock:
            running[0] -= 1
        return value

    with ShardedStep(model, threads=2, shard=1, loss=loss) as sharded:
        sharded.gradients(batch_of(12, 3), trainable(model))
    assert most[0] <= 2


def test_losses_cut_shards_only_as_they_are_needed():
    """A long text is never queued whole: what waits is bounded by the number of threads."""
    model, drawn, seen = lora_model(), [], []

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
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        assert "loss_that_breaks" in {
            frame.name for frame in traceback.extract_tb(caught.value.__traceback__)
        }
        assert not running
        assert all(not any(layer._effective.values()) for layer in layers(model))
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
    model, sizes = lora_model(), []
    assert shard_size(model, 10**6, 1) == TOKENS_PER_SHARD
    assert [shard_size(model, 8, n * TOKENS_PER_SHARD) for n in (1, 10)] == [1, 1]
    assert [shard_size(model, n, 2) for n in (1, 2, 3, 8, 9)] == [
        1,
        1,
        2,
        4,
        5,
    ]  # work for two cores
    wide = types.SimpleNamespace(
        parameters=model.parameters, config=types.SimpleNamespace(intermediate_size=2048)
    )
    assert shard_size(wide, 100, 32) == FLOATS_PER_SHARD // 2048 // 32

    def loss(model, shard):
        sizes.append(len(shard))
        return language_modelling_loss(model, shard)

    with ShardedStep(model, threads=1, loss=loss) as sharded:
        sharded.gradients(batch_of(TOKENS_PER_SHARD // 4 + 3, 4), trainable(model))
        sharded.gradients(batch_of(TOKENS_PER_SHARD // 2 + 3, 4), trainable(model))
    assert sizes == [
        TOKENS_PER_SHARD // 8 + 2,
        TOKENS_PER_SHARD // 8 + 1,
        *[TOKENS_PER_SHARD // 4] * 2,
        3,
    ]
    assert ShardedStep(model).threads == available_cores() >= 1


# ---- BLAS ----


def blas_threads():
    return [
        pool["num_threads"]
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    ]


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
    model, batch, found = lora_model(dropout).train(), batch_of(5, 4), []
    for enable in (False, True):
        model.get_base_model().gradient_checkpointing_enable(enable)
        with ShardedStep(model, threads=threads, shard=2) as sharded:
            loss, grads = sharded.gradients(batch, trainable(model), seed=3, step=4)
        found.append((float(loss), [g.tobytes() for g in grads]))
    assert found[0] == found[1]


def test_gradient_checkpointing_stores_only_the_input_of_a_block():
    model, batch, kept = lora_model(0.0).train(), batch_of(5, 4), []
    for enable in (False, True):
        model.get_base_model().gradient_checkpointing_enable(enable)
        loss = language_modelling_loss(model, batch)
        seen, waiting = {}, [loss.node]
        while waiting:
            node = waiting.pop()
            waiting += [p for p in node.parents if isinstance(p, Node)]
            for cell in node.vjp.__closure__ or ():
                if (
                    isinstance(cell.cell_contents, np.ndarray)
                    and cell.cell_contents.size >= batch.ids.size
                ):
                    seen[id(cell.cell_contents)] = cell.cell_contents.size
        kept.append(sum(seen.values()))
    hidden = batch.ids.size * CONFIG.hidden_size
    assert kept[1] <= (CONFIG.num_hidden_layers + 4) * hidden < kept[0]


def test_checkpoint_repeats_dropout_without_a_counter():
    x, layer = Tensor(np.ones((2, 50)), True), Dropout(0.5)
    for _ in range(2):
        y = checkpoint(layer, x, [])
        np.testing.assert_array_equal(gradients(y, [x], np.ones((2, 50)))[0], y.data)
    with no_grad():
        assert not checkpoint(layer, x, []).requires_grad
    assert not checkpoint(layer, x.detach(), []).requires_grad


def test_checkpoint_notices_a_parameter_that_changes_before_the_second_forward():
    x, w = Tensor(np.ones(3), True), Tensor(np.ones(3), True)
    y = checkpoint(lambda z: z * w, x, [w])
    w.data = np.full(3, 2.0)
    with pytest.raises(GraphError, match="checkpoint"):
        y.backward(np.ones(3))
