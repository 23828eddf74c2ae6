"""Sequences cut by position: the cut changes no gradient, threads change no bit, nothing hangs."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import interleavings
import numpy as np
import pytest
from fake_ranks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import shape
from strict_xp import STRICT

import minilora.training.parallel
import minilora.training.parts
from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    TransformerConfig,
    get_multitask_model,
    get_peft_model,
)
from minilora.anomaly import detect_anomaly
from minilora.data import Batch
from minilora.data.batches import IGNORE
from minilora.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from minilora.lora import HydraConfig
from minilora.models.dialects import MODEL_TYPES
from minilora.training.loop import Settings, train
from minilora.training.nonfinite import explain_non_finite
from minilora.training.parallel import ShardedStep, language_modelling_loss, part_size
from minilora.training.parts import (
    BACKWARD,
    ENOUGH_SHARDS,
    FORWARD,
    Jobs,
    Part,
    PartError,
    Progress,
    Shared,
    choose_part_size,
    jobs_of_parts,
    part_edges,
    schedule,
)
from minilora.training.run import Run

WORDS = 11
PLAIN = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
THREADS = (1, 2, 3, 8)


def base(kind: str = "llama", dtype: str = "float64", **changes: Any) -> CausalLM:
    config = shape(kind, **{"max_position_embeddings": 64, "initializer_range": 0.3} | changes)
    return CausalLM(config, seed=1, dtype=dtype)


def lora(kind: str = "llama", dtype: str = "float64", dropout: float = 0.0, **changes: Any) -> Any:
    config = LoraConfig(**PLAIN, lora_dropout=dropout)
    return get_peft_model(base(kind, dtype, **changes), config, seed=2).train()


def trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def batch_of(sequences: int, length: int, seed: int = 0, **fields: Any) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, WORDS, (sequences, length + 1))
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), **fields)


def packed(batch: Batch, size: int) -> Batch:
    """Records of `size` tokens in place of whole sequences, the first two at other places."""
    starts = np.arange(batch.ids.shape[1]) // size * size
    first_key = np.maximum(starts - np.arange(len(batch))[:, None], 0)
    return dataclasses.replace(batch, first_key=first_key)


def step_of(
    model: Any, batch: Batch, threads: int, part: int | None, shard: int = 1, **options: Any
) -> tuple[float, list[np.ndarray | None]]:
    with ShardedStep(model, threads, shard, part=part, **options) as sharded:
        loss, grads = sharded.gradients(batch, trainable(model), seed=3, step=5)
    return float(loss), grads


def bits(result: tuple[float, list[np.ndarray | None]]) -> tuple[str, list[bytes | None]]:
    loss, grads = result
    return loss.hex(), [None if g is None else g.tobytes() for g in grads]


def assert_close(result: Any, expected: Any, bound: float = 1e-11) -> None:
    assert abs(result[0] - expected[0]) <= bound * abs(expected[0])
    for got, wanted in zip(result[1], expected[1], strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert np.abs(got - wanted).max() <= bound * max(np.abs(wanted).max(), 1e-3)


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("minilora")]


# ---- a cut sequence gives what a whole one gives ----


@st.composite
def any_batches(draw: st.DrawFn) -> Batch:
    """A batch whose targets may not count, whole or packed."""
    sequences = draw(st.integers(1, 4))
    length = draw(st.integers(1, 40))
    batch = batch_of(sequences, length, draw(st.integers(0, 99)))
    if draw(st.booleans()):
        batch = packed(batch, draw(st.integers(1, length)))
    ignored = np.random.default_rng(draw(st.integers(0, 99))).random(batch.ids.shape)
    batch.targets[ignored < draw(st.sampled_from([0.0, 0.3, 0.97]))] = IGNORE
    return batch


@pytest.mark.parametrize("kind", MODEL_TYPES)
@settings(max_examples=20)
@given(
    batch=any_batches(),
    part=st.integers(1, 40),
    shard=st.integers(1, 4),
    threads=st.sampled_from(THREADS),
    dropout=st.sampled_from([0.0, 0.4]),
    recompute=st.booleans(),
)
def test_gradients_of_cut_sequences_equal_those_of_whole_ones(
    kind: str,
    batch: Batch,
    part: int,
    shard: int,
    threads: int,
    dropout: float,
    recompute: bool,
) -> None:
    model = lora(kind, dropout=dropout)
    expected = step_of(model, batch, 1, 64, shard)
    model.get_base_model().gradient_checkpointing_enable(recompute)
    assert_close(step_of(model, batch, threads, part, shard), expected)


@pytest.mark.parametrize("kind", MODEL_TYPES)
@settings(max_examples=15)
@given(any_batches(), st.integers(1, 40), st.integers(1, 4), st.sampled_from(THREADS))
def test_losses_of_cut_sequences_equal_those_of_whole_ones(
    kind: str, batch: Batch, part: int, shard: int, threads: int
) -> None:
    model = lora(kind).eval()
    measured = []
    for size in (64, part):
        with ShardedStep(model, threads, shard, part=size) as sharded:
            measured.append(list(sharded.losses([batch, batch.shard(0, 1)])))
    whole, cut = measured
    assert [count for _, count in cut] == [count for _, count in whole]
    np.testing.assert_allclose([loss for loss, _ in cut], [loss for loss, _ in whole], 1e-12)


# ---- no number of threads and no order changes a bit ----


def full() -> Any:
    return base("qwen3").train()


def adapted(config: LoraConfig, kind: str = "llama", dtype: str = "float32") -> Any:
    return get_peft_model(base(kind, dtype), config, seed=2).train()


def tasks() -> Any:
    config = LoraConfig(**PLAIN, lora_dropout=0.2)
    model = get_multitask_model(base(dtype="float32"), {"a": config, "b": config}, config, seed=2)
    return model.train()


def recomputed() -> Any:
    model = lora("gpt2", "float32", dropout=0.3)
    model.get_base_model().gradient_checkpointing_enable()
    return model


EVERY = {"lora_dropout": 0.2, **PLAIN}
EMBEDDED = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}
MODELS: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted(LoraConfig(**EVERY)),
    "windows": lambda: adapted(LoraConfig(**EVERY), "mistral"),
    "dora": lambda: adapted(LoraConfig(use_dora=True, **EVERY)),
    "adalora": lambda: adapted(
        AdaLoraConfig(
            init_r=3, target_r=2, total_step=9, target_modules="all-linear", lora_dropout=0.2
        )
    ),
    "hydra": lambda: adapted(HydraConfig(**EVERY)),
    "biases": lambda: adapted(LoraConfig(bias="all", **EVERY), "qwen2"),
    "embedding": lambda: adapted(LoraConfig(**EMBEDDED)),
    "tokens": lambda: adapted(LoraConfig(trainable_token_indices=[0, 7], **EVERY)),
    "head": lambda: adapted(LoraConfig(modules_to_save=["lm_head"], **EVERY)),
    "last layer": lambda: adapted(LoraConfig(layers_to_transform=[1], **EVERY)),
    "tasks": tasks,
    "full": full,
    "recomputed": recomputed,
}


class Delays:
    """Pauses of random length, or none, before and after what parts tell each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rng = np.random.default_rng(0)
        for name in ("announce", "wait_for", "has"):
            monkeypatch.setattr(Progress, name, self._delayed(getattr(Progress, name)))

    def _delayed(self, method: Any) -> Any:
        def delayed(progress: Progress, argument: Any) -> Any:
            self._pause()
            result = method(progress, argument)
            self._pause()
            return result

        return delayed

    def _pause(self) -> None:
        if self.rng.random() < 0.3:
            time.sleep(self.rng.random() * 3e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_parts_have_the_same_bits_for_any_threads_in_any_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]()
    fields = {"tasks": ["b", "a", "b"]} if name == "tasks" else {}
    batch = packed(batch_of(3, 24, **fields), 9)
    expected = bits(step_of(model, batch, 1, 5))
    whole = step_of(model, batch, 1, 24)
    assert_close(step_of(model, batch, 1, 5), whole, 1e-3)
    Delays(monkeypatch)
    for threads in (2, 3, 8, 16):
        assert bits(step_of(model, batch, threads, 5)) == expected


@pytest.mark.parametrize("name", ["lora", "adalora", "tasks", "base and task"])
def test_gradients_and_losses_of_parts_have_the_same_bits_on_any_ranks(name: str) -> None:
    tasks_of = {"tasks": ["b", "a", "b"], "base and task": ["__base__", "a", "__base__"]}
    fields = {"tasks": tasks_of[name]} if name in tasks_of else {}
    batch = batch_of(3, 24, **fields)

    def measure(ranks: Any, threads: int = 1) -> Any:
        model = tasks() if fields else MODELS[name]()
        gradients = bits(step_of(model, batch, threads, 5, ranks=ranks))
        with ShardedStep(model.eval(), threads, 1, ranks=ranks, part=5) as sharded:
            return gradients, list(sharded.losses([batch]))

    expected = measure(None)
    for size, threads in ((1, 2), (2, 1), (3, 2), (4, 2)):
        for outcome in run_ranks(size, lambda ranks, k=threads: measure(ranks, k)):
            assert outcome.error is None
            assert outcome.result == expected


def test_losses_of_parts_have_the_same_bits_for_any_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = lora("mistral", "float32").eval(), packed(batch_of(3, 24), 9)
    Delays(monkeypatch)
    measured = set()
    for threads in THREADS:
        with ShardedStep(model, threads, 1, part=5) as sharded:
            measured.add(tuple(sharded.losses([batch, batch])))
    assert len(measured) == 1


def test_gradients_of_parts_add_up_to_one_shard_of_the_sum() -> None:
    model, batch = lora(), batch_of(5, 16)
    with ShardedStep(model, 2, 1, part=4) as sharded:
        assert sharded.count_shards(batch) == 5
        assert len(list(sharded.losses([batch]))) == 5


# ---- errors and threads that wait ----


class Broken(Exception):
    pass


def break_parts(monkeypatch: pytest.MonkeyPatch, broken: set[tuple[int, str, int]]) -> None:
    """Let parts fail in these places: (number of the part, forward or backward, layer)."""

    def breaking(method: Any, what: str) -> Any:
        def broken_method(part: Part, layer: int, one: Any, other: Any) -> Any:
            if (part.number, what, layer) in broken:
                raise Broken(part.number, what, layer)
            return method(part, layer, one, other)

        return broken_method

    monkeypatch.setattr(Part, "extend", breaking(Part.extend, FORWARD))
    monkeypatch.setattr(Part, "extend_back", breaking(Part.extend_back, BACKWARD))


def first_of(broken: set[tuple[int, str, int]]) -> tuple[int, str, int]:
    """The place that fails first where jobs run one after another."""

    def turn(place: tuple[int, str, int]) -> tuple[int, int, int]:
        number, what, layer = place
        return (0, number, layer) if what == FORWARD else (1, -number, -layer)

    return min(broken, key=turn)


def test_progress_waits_for_a_part_that_failed_after_what_is_waited_for() -> None:
    progress = Progress()
    progress.announce((1, FORWARD, 0))
    progress.fail(1)  # in its backward pass, while part 2 is still in its forward pass
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(progress.wait_for, [(1, FORWARD, 0), (2, FORWARD, 0)])
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        progress.announce((2, FORWARD, 0))
        waiting.result(60)
    with pytest.raises(PartError):
        progress.wait_for([(1, FORWARD, 0), (1, FORWARD, 1)])


PLACES = list(itertools.product(range(5), (FORWARD, BACKWARD), range(2)))


@pytest.mark.parametrize("recompute", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    broken=st.sets(st.sampled_from(PLACES), min_size=1, max_size=3),
    threads=st.integers(1, 16),
    sequences=st.integers(1, 3),
)
def test_gradients_raise_one_error_of_parts_and_no_thread_waits(
    recompute: bool, broken: set[tuple[int, str, int]], threads: int, sequences: int
) -> None:
    model = lora("llama", "float32")
    model.get_base_model().gradient_checkpointing_enable(recompute)
    params, batch = trainable(model), batch_of(sequences, 20)
    with ShardedStep(model, threads, 1, part=4) as sharded:
        assert len(part_edges(model.config, 20, 4)) == 6
        expected = bits(sharded.gradients(batch, params))
        with pytest.MonkeyPatch.context() as monkeypatch:
            break_parts(monkeypatch, broken)
            with pytest.raises(Broken) as caught:
                sharded.gradients(batch, params)
            if sequences == 1:
                assert caught.value.args == first_of(broken)
            forward = {place for place in broken if place[1] == FORWARD}
            if forward:
                with pytest.raises(Broken) as caught:
                    list(sharded.losses([batch]))
                assert caught.value.args == first_of(forward)
        assert bits(sharded.gradients(batch, params)) == expected  # it can be used again
    assert not workers()


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 29), max_size=12),
    threads=st.integers(1, 16),
    groups=st.integers(1, 4),
    bad=st.none() | st.integers(0, 29),
)
def test_gradients_end_for_any_cut_and_any_wrong_token(
    cuts: set[int], threads: int, groups: int, bad: int | None
) -> None:
    model = lora("llama", "float32")
    params, batch = trainable(model), batch_of(groups, 30)
    edges = [0, *sorted(cuts), 30]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(minilora.training.parallel, "part_edges", lambda *_: edges)
        expected = bits(step_of(model, batch, 1, None))
        with ShardedStep(model, threads, 1) as sharded:
            if bad is not None:
                batch.ids[groups - 1, bad] = WORDS
                with pytest.raises(DataError, match=f"id must be .* got {WORDS}|{WORDS}"):
                    sharded.gradients(batch, params)
                batch.ids[groups - 1, bad] = batch_of(groups, 30).ids[groups - 1, bad]
            loss, grads = sharded.gradients(batch, params, 3, 5)
    assert bits((float(loss), grads)) == expected
    assert not workers()


def test_gradients_of_parts_leave_no_array_behind() -> None:
    model, batch = lora(), batch_of(2, 16)
    made = []

    class Seen(Shared):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, ShardedStep(model, 2, 1) as sharded:
            sharded.part = 4
            monkeypatch.setattr(minilora.training.parallel, "Shared", Seen)
            sharded.gradients(batch, trainable(model))
            list(sharded.losses([batch]))
        left = [reference() for reference in made]  # without the cycle collector
    finally:
        gc.enable()
    assert left == [None] * 4


# ---- every order of small cases ----


class Case:
    """Jobs of groups of parts whose keys and gradients are numbers that show the form of each sum.

    In layer 1 keys depend on what was read in layer 0, and so do gradients backward.
    """

    def __init__(self, parts: int, layers: int, groups: int, threads: int):
        self.parts, self.layers, self.groups, self.threads = parts, layers, groups, threads

    def work(self, broken: tuple[int, str] | None = None) -> interleavings.Work:
        read: dict[Any, bytes] = {}
        groups = (self._group(number, read, broken) for number in range(self.groups))
        return interleavings.Work(
            list(schedule(groups, self.threads)), lambda: frozenset(read.items())
        )

    def _group(self, group: int, read: dict[Any, bytes], broken: tuple[int, str] | None) -> Jobs:
        shared = Shared(self, 1, range(self.parts + 1))
        shared.data[...] = 0
        results: dict[int, np.ndarray] = {}

        def forward(part: Part) -> Any:
            x = np.full((1, 1, 1, 1), 1 / (3 + part.number))
            for layer in range(self.layers):
                if broken == (part.number, FORWARD) and layer == self.layers - 1:
                    raise Broken(broken)
                k, v = part.extend(layer, x, 2 * x)
                read[group, part.number, FORWARD, layer] = k.tobytes() + v.tobytes()
                x = np.sin(k.sum(axis=1, keepdims=True)) * v[:, -1:]
            results[part.number] = x
            return x

        def backward(part: Part, loss: Any) -> Any:
            assert loss is results[part.number]
            x = loss / 7
            for layer in reversed(range(self.layers)):
                if broken == (part.number, BACKWARD) and layer == 0:
                    raise Broken(broken)
                rows = np.arange(1, part.stop + 1)[None, :, None, None]
                dk, dv = part.extend_back(layer, x / rows, x / (rows + 0.1))
                read[group, part.number, BACKWARD, layer] = dk.tobytes() + dv.tobytes()
                x = dk + dv
            return float(x.item()).hex()

        return jobs_of_parts(shared.parts(), forward, backward)

    # What `KeyValueCache` asks of a model.
    config = property(
        lambda self: type(
            "Config", (), {"num_hidden_layers": self.layers, "kv_heads": 1, "head_dim": 1}
        )
    )

    def parameters(self) -> Any:
        parameter = base().get_input_embeddings().weight
        return iter([parameter])


CASES = [
    Case(2, 2, 1, 2),
    Case(3, 1, 1, 2),
    Case(3, 1, 1, 3),
    Case(2, 1, 2, 2),
]


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions at which `interleavings` stops threads."""
    monkeypatch.setattr(minilora.training.parts, "Condition", interleavings.Condition)


def plain(case: Case) -> list[Any]:
    """The results of the jobs, one after another."""
    return [job() for job in case.work().jobs]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.parts}-{c.layers}-{c.groups}-{c.threads}"
)
def test_schedule_ends_with_the_same_numbers_in_every_order(
    case: Case, stopping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as real:
        real.setattr(minilora.training.parts, "Condition", threading.Condition)
        expected = plain(case)
    outcomes, states = interleavings.explore(case.work, case.threads)
    assert states > 20 * case.parts
    assert outcomes
    assert all(outcome.results == expected for outcome in outcomes)


@pytest.mark.parametrize("what", [FORWARD, BACKWARD])
@pytest.mark.parametrize("number", range(3))
def test_schedule_ends_with_one_error_in_every_order(
    number: int, what: str, stopping: None
) -> None:
    case = Case(3, 1, 1, 2)
    outcomes, _ = interleavings.explore(lambda: case.work((number, what)), 2)
    assert outcomes
    for outcome in outcomes:
        assert isinstance(outcome.first_error, Broken)
        others = [error for error in outcome.results if isinstance(error, Exception)][1:]
        assert all(isinstance(error, PartError) for error in others)


def test_explore_finds_the_deadlock_of_a_wrong_order(stopping: None) -> None:
    def wrong() -> interleavings.Work:
        jobs = Case(3, 1, 1, 2).work().jobs
        return interleavings.Work([*jobs[:3], *reversed(jobs[3:])])  # backward first part first

    with pytest.raises(interleavings.Deadlock):
        interleavings.explore(wrong, 2)


def test_schedule_runs_as_many_groups_forward_as_keep_the_threads_busy() -> None:
    def order(parts: int, groups: int, threads: int) -> str:
        named = [
            Jobs(
                [lambda g=g, i=i: f"F{g}{i}" for i in range(parts)],
                [lambda g=g, i=i: f"B{g}{i}" for i in reversed(range(parts))],
            )
            for g in range(groups)
        ]
        return " ".join(job() for job in schedule(named, threads))

    assert order(2, 2, 1) == order(2, 2, 3) == "F00 F01 B01 B00 F10 F11 B11 B10"
    assert order(2, 3, 4) == "F00 F01 F10 F11 B01 B00 F20 F21 B11 B10 B21 B20"


# ---- where sequences are cut ----


def config(layers: int, width: int, mlp: int, heads: int, words: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
    )


MICRO = config(2, 64, 192, 2, 32)
TINY = config(4, 128, 384, 4, 256)
SMALL = config(6, 384, 1024, 6, 256)
GPT2 = config(12, 768, 2048, 12, 50257)
LONG = config(4, 768, 2048, 12, 256)
WIDE = config(4, 1024, 2736, 16, 256)


def count_parts(config: TransformerConfig, sequences: int, context: int) -> int:
    """Parts per sequence in a batch of this shape."""
    model = base()
    model.config = config
    shard = minilora.training.parallel.shard_size(model, sequences, context)
    return len(part_edges(config, context, part_size(model, sequences, context, shard))) - 1


@pytest.mark.parametrize(
    ("config", "sequences", "context", "parts"),
    [
        (MICRO, 16, 64, 1),
        (TINY, 16, 128, 1),
        (SMALL, 8, 256, 1),
        (GPT2, 2, 256, 1),
        (LONG, 1, 1024, 4),
        (GPT2, 1, 1024, 4),
        (WIDE, 1, 2048, 8),
        (GPT2, 1, 256, 2),  # one shard: work for two cores
        (TINY, 1, 256, 2),
        (TINY, 1, 255, 1),
        (GPT2, 1, 255, 1),
        (TINY, 2, 2048, 1),  # narrow: a part would be too little work
        (SMALL, 2, 512, 2),
        (SMALL, 2, 511, 1),
        (LONG, 15, 1024, 2),
        (LONG, ENOUGH_SHARDS, 1024, 1),
        (LONG, 64, 4096, 1),
        (LONG, 1, 4096, 16),
    ],
)
def test_part_size_cuts_long_sequences_where_shards_are_few(
    config: TransformerConfig, sequences: int, context: int, parts: int
) -> None:
    assert count_parts(config, sequences, context) == parts


def test_part_size_leaves_sequences_whole_on_a_gpu() -> None:
    model = lora("llama", "float32", max_position_embeddings=512)
    assert part_size(model, 1, 512, 1) == 256
    model.to(STRICT)
    assert part_size(model, 1, 512, 1) == 512
    with ShardedStep(model, 1, part=16) as sharded:
        shards = list(sharded._cut(batch_of(1, 64).by_task()))
    assert [shard.edges for shard in shards] == [[0, 64]]


@pytest.mark.parametrize("config", [MICRO, TINY, SMALL, GPT2, LONG, WIDE])
@given(st.integers(1, 4096), st.integers(1, 4096))
def test_part_edges_cover_all_positions_once(
    config: TransformerConfig, positions: int, size: int
) -> None:
    edges = part_edges(config, positions, size)
    assert (edges[0], edges[-1]) == (0, positions)
    assert (np.diff(edges) > 0).all()
    assert len(edges) - 1 <= max(1, round(positions / size))
    if size >= 32:
        assert all(edge % 16 == 0 for edge in edges[:-1])
    assert len(part_edges(config, positions, positions)) == 2


@pytest.mark.parametrize("config", [SMALL, GPT2, LONG, WIDE])
@given(st.integers(2, 16), st.integers(256, 1024))
def test_part_edges_make_parts_of_equal_cost(
    config: TransformerConfig, count: int, size: int
) -> None:
    edges = np.array(part_edges(config, min(count * size, 4096), size))
    C = config.hidden_size
    per_layer = 4 * C * C + 3 * C * config.intermediate_size
    linear = per_layer + C * config.vocab_size / config.num_hidden_layers
    costs = np.diff(linear * edges + 4 * C * edges**2 / 2)
    assert costs.max() <= 1.2 * costs.min()  # edges are multiples of 16


@given(st.integers(1, 99), st.integers(1, 9999))
def test_choose_part_size_never_makes_parts_of_fewer_than_128_positions(
    shards: int, context: int
) -> None:
    for config in (MICRO, LONG, WIDE):
        size = choose_part_size(config, shards, context)
        assert size == context or 128 <= size < context


# ---- settings, and what makes two runs the same ----


TEXT = np.random.default_rng(0).integers(0, WORDS, 600).astype(np.int32)
RUN = Settings(
    steps=4, batch_size=2, context=32, lr=1e-2, warmup=1, threads=2, shard=1, part=8, save_every=2
)


def test_train_resumed_with_other_threads_gives_the_same_bits(tmp_path: Any) -> None:
    straight = lora("qwen3", "float32", dropout=0.2)
    expected = train(straight, TEXT, RUN, tmp_path / "straight", held_out=TEXT[:70])
    model = lora("qwen3", "float32", dropout=0.2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Run, "step", failing_at(3))
        with pytest.raises(Broken):
            train(model, TEXT, RUN, tmp_path / "run", held_out=TEXT[:70])
    now = dataclasses.replace(RUN, threads=3)
    resumed = lora("qwen3", "float32", dropout=0.2)
    result = train(resumed, TEXT, now, tmp_path / "run", held_out=TEXT[:70], resume="auto")
    assert (result.losses, result.evaluations) == (expected.losses, expected.evaluations)
    for got, wanted in zip(trainable(resumed), trainable(straight), strict=True):
        assert got.data.tobytes() == wanted.data.tobytes()


def failing_at(number: int) -> Any:
    step = Run.step

    def failing(run: Run, sharded: Any) -> Any:
        if run.done == number:
            raise Broken
        return step(run, sharded)

    return failing


def test_resume_refuses_another_part(tmp_path: Any) -> None:
    train(lora("llama", "float32"), TEXT, RUN, tmp_path)
    for part, now in ((16, "16"), (None, "32")):  # None: short sequences stay whole
        other = dataclasses.replace(RUN, steps=6, part=part)
        with pytest.raises(CheckpointError, match=rf"part \(was 8, now {now}\)"):
            train(lora("llama", "float32"), TEXT, other, tmp_path, resume="auto")


def test_run_cuts_by_the_shapes_of_its_batches(tmp_path: Any) -> None:
    model = lora("llama", "float32", max_position_embeddings=256)
    for sequences, part in ((1, 128), (4, 256)):
        settings = Settings(steps=1, batch_size=sequences, context=256)
        run = Run(model, TEXT, settings, tmp_path)
        assert run.settings.part == run.identity["part"] == part


@pytest.mark.parametrize("part", [0, -1, 1.5, True, "8"])
def test_part_must_be_a_positive_integer(part: Any) -> None:
    for make in (Settings, lambda part: ShardedStep(lora(), part=part)):
        with pytest.raises(ConfigError, match="part must be "):
            make(part=part)


def test_part_must_not_be_larger_than_the_context() -> None:
    assert Settings(context=64, part=64).part == 64
    with pytest.raises(ConfigError, match=r"part must be at most context \(64\).* got 65"):
        Settings(context=64, part=65)


def test_part_needs_the_loss_that_is_a_sum_over_parts() -> None:
    def loss(model: Any, batch: Batch) -> Any:
        return language_modelling_loss(model, batch)

    with pytest.raises(ConfigError, match="needs the loss language_modelling_loss"):
        ShardedStep(lora(), loss=loss, part=8)
    with ShardedStep(lora(max_position_embeddings=256), 2, loss=loss) as sharded:
        [shard] = sharded._cut(batch_of(1, 256).by_task())
    assert shard.is_whole


# ---- why a step is not finite ----


def test_explain_non_finite_cuts_as_the_step_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = lora("qwen3", "float32", dropout=0.2), batch_of(2, 24)
    made = []

    class Seen(Shared):
        def __init__(self, model: Any, batch: int, edges: Any):
            super().__init__(model, batch, edges)
            made.append(tuple(edges))

    monkeypatch.setattr(minilora.training.parallel, "Shared", Seen)
    assert "is finite" in explain_non_finite(model, batch, shard=1, part=6)
    assert made == [tuple(part_edges(model.config, 24, 6))] * 2
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = np.inf
    reason = explain_non_finite(model, batch, shard=1, part=6)
    assert "up_proj" in reason


@pytest.mark.parametrize("recompute", [False, True])
def test_anomaly_mode_blames_no_operation_of_finite_parts(recompute: bool) -> None:
    model, batch = lora("gpt2", "float32", dropout=0.2), batch_of(1, 24)
    model.get_base_model().gradient_checkpointing_enable(recompute)
    expected = bits(step_of(model, batch, 1, 6))
    with detect_anomaly(True, model):
        assert bits(step_of(model, batch, 1, 6)) == expected
        assert bits(step_of(model, batch, 3, 6)) == expected


def test_anomaly_mode_names_the_operation_of_a_part() -> None:
    model, batch = lora("gpt2", "float32"), batch_of(1, 24)
    model.get_base_model().transformer.wpe.weight.data[20] = 3e38  # seen by the last part alone
    with (
        np.errstate(over="ignore"),
        detect_anomaly(True, model),
        pytest.raises(NonFiniteError, match=r"first NaN: the output of layer_norm \(1, \d+, 8\)"),
    ):
        step_of(model, batch, 1, 6)
