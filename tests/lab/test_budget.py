"""What a run would take: bytes by kind and phase, measured on a shard and counted from shapes."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from minilora import CausalLM, LoraConfig, get_peft_model, quantize
from minilora.backend import NUMPY, BlockSizes
from minilora.data.batches import PackedRecords
from minilora.lab import budget
from minilora.lab.budget import (
    LENGTHS,
    LOADING,
    SHARDS,
    THREAD,
    UPDATE,
    count_sums,
    count_together,
    extrapolate,
    measure_work,
    predict_memory,
    probe_shard,
    read_resident,
    text_bytes,
    weight_bytes,
)
from minilora.lab.recording import record_graph
from minilora.lora.multitask import get_multitask_model
from minilora.models.config import TransformerConfig
from minilora.training.loop import Run, Settings
from minilora.training.methods import METHODS, adapter_config
from minilora.training.parallel import ShardedStep
from minilora.training.parts import part_edges
from minilora.training.sums import Node, add_up

TOKENS = np.random.default_rng(0).integers(0, 16, 400)
SETTINGS = Settings(batch_size=8, context=12, threads=2)
LONG = TransformerConfig(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=1024,
)


def adapted(base: Any = None, **fields: Any) -> Any:
    return get_peft_model(base or small.base(), LoraConfig(**{"r": 2} | fields)).train()


def run_of(model: Any, tokens: Any = TOKENS, settings: Settings = SETTINGS) -> Run:
    return Run(model, tokens, settings, "unused")


# ---- one shard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_probe_shard_counts_what_record_graph_counts(targets):
    model = adapted(CausalLM(LONG), target_modules=targets)
    run = run_of(model, settings=Settings(batch_size=4, context=128, threads=1))
    batch = run.batch(0)
    probe = probe_shard(model, run.optimizer.params, batch, [0, 128])
    graph = record_graph(model, "", batch.ids, None, batch.targets)
    # tracemalloc counts Python's objects, too.
    assert graph.backward_bytes <= probe.kept <= 1.02 * graph.backward_bytes + 200_000
    assert probe.kept < probe.peak < 2 * probe.kept


def test_probe_shard_changes_no_weight_and_stops_tracing():
    model = adapted()
    run = run_of(model)
    before = small.bits(model)
    probe_shard(model, run.optimizer.params, run.batch(0), [0, 12])
    assert small.bits(model) == before
    assert not tracemalloc.is_tracing()


def test_probe_shard_of_parts_runs_all_of_them():
    """They keep what the whole sequence keeps; their gradients are small beside it."""
    model = adapted(CausalLM(LONG))
    run = run_of(model, settings=Settings(batch_size=1, context=256, threads=1))
    whole = probe_shard(model, run.optimizer.params, run.batch(0), [0, 256])
    parts = probe_shard(model, run.optimizer.params, run.batch(0), [0, 128, 256])
    assert parts.length == whole.length == 256
    assert parts.kept == pytest.approx(whole.kept, rel=0.1)


# ---- lengths -------------------------------------------------------------------------------------


@given(*[st.floats(0, 1e6)] * 3, st.integers(513, 100_000))
def test_extrapolate_is_exact_for_a_square(a, b, c, length):
    def size(T: int) -> float:
        return a + b * T + c * T * T

    value = extrapolate(LENGTHS, [size(T) for T in LENGTHS], length)
    assert value == pytest.approx(size(length), rel=1e-6, abs=1e-3)


def test_extrapolate_returns_a_measured_value_as_it_is():
    assert extrapolate([12], [7.0], 12) == 7.0
    assert extrapolate(LENGTHS, [1.0, 5.0, 3.0], 256) == 5.0


@pytest.mark.parametrize("context", [192, 256])
@pytest.mark.parametrize("part", [64, 256])
def test_measure_work_extrapolates_what_the_whole_length_takes(context, part, monkeypatch):
    """Attention keeps the scores of short parts, and computes those of long ones again."""
    monkeypatch.setattr(budget, "LENGTHS", (64, 96, 128))
    monkeypatch.setattr(NUMPY, "sizes", BlockSizes(queries=32, kept_scores=4 * 200 * 200))
    model = adapted(CausalLM(LONG))
    settings = Settings(batch_size=1, context=context, threads=1, part=min(part, context))
    run = run_of(model, settings=settings)
    work = measure_work(run)
    assert [probe.length for probe in work.probes] == [64, 96, 128]
    assert NUMPY.sizes.kept_scores == 4 * 200 * 200
    edges = part_edges(LONG, context, run.settings.part)
    model.prepare_step(context)
    whole = probe_shard(model, run.optimizer.params, run.batch(0), edges)
    model.end_step()
    assert work.at_length("kept") == pytest.approx(whole.kept, rel=0.05)
    # The peak is not of the same operation at each length.
    assert work.at_length("peak") == pytest.approx(whole.peak, rel=0.15)


# ---- the shards of a step ------------------------------------------------------------------------


def test_measure_work_counts_shards_as_a_step_cuts_them():
    model = adapted()
    run = run_of(model)
    work = measure_work(run)
    with ShardedStep(model, 2, run.settings.shard) as sharded:
        assert work.shards == sharded.count_shards(run.batch(0))
    assert work.together == work.threads == 2
    assert (work.sequences, work.length) == (run.settings.shard, 12)
    one = measure_work(run_of(model, settings=Settings(batch_size=1, context=4, threads=2)))
    assert (one.shards, one.together, one.threads) == (1, 1, 1)


def test_measure_work_measures_the_effective_weights_of_all_tasks():
    tasks = {name: LoraConfig(r=2, target_modules="all-linear") for name in ("a", "b")}
    sizes = []
    for count in (1, 2):
        chosen = dict(list(tasks.items())[:count])
        model = get_multitask_model(CausalLM(LONG), chosen).train()
        texts = dict.fromkeys(chosen, TOKENS)
        settings = Settings(batch_size=8, context=64, threads=1)
        sizes.append(measure_work(run_of(model, texts, settings)).effective)
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert 4 * linear <= sizes[0] <= 4 * linear + 14 * 3000  # and Python's objects, of each layer


def test_count_together_of_whole_shards_and_of_parts():
    assert count_together(shards=4, parts=1, threads=2) == 2
    assert count_together(shards=1, parts=1, threads=2) == 1
    assert count_together(shards=1, parts=2, threads=2) == 1
    assert count_together(shards=8, parts=2, threads=2) == 1.5
    assert count_together(shards=8, parts=4, threads=1) == 1
    assert count_together(shards=8, parts=4, threads=8) == 2.25
    assert count_together(shards=1, parts=2, threads=8) == 1


@given(st.integers(1, 200), st.integers(1, 16))
def test_count_sums_bounds_the_tree_of_partial_sums(shards, together):
    together = min(shards, together)
    most = 0
    for done in range(1, shards - together + 1):
        leaves = [Node(i, i + 1, 0) for i in range(done)]
        nodes = add_up(leaves, shards, lambda left, right: 0)
        most = max(most, len(nodes) + 1)
    assert most <= count_sums(shards, together) <= most + 1


# ---- bytes ---------------------------------------------------------------------------------------


def test_weight_bytes_by_kind():
    model = adapted(target_modules="all-linear")
    run = run_of(model)
    trained = sum(p.size for p in run.optimizer.params)
    frozen = sum(p.size for p in small.base().parameters())
    assert weight_bytes(run) == {
        "weights in float32": 4 * frozen,
        "trained parameters": 4 * trained,
    }
    whole = run_of(small.base().train())
    assert weight_bytes(whole) == {"trained parameters": 4 * frozen}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weight_bytes_of_codes(kind):
    base = quantize(small.base(), kind)
    sizes = weight_bytes(run_of(adapted(base)))
    stored = sum(p.quantized.nbytes for p in base.parameters() if hasattr(p, "quantized"))
    assert sizes[f"weights in {kind}"] == stored > 0


def test_weight_bytes_counts_the_weights_that_a_start_changed():
    model = adapted(init_lora_weights="pissa", target_modules=["q_proj"])
    weights = 2 * (16 * 16 + 16)  # two layers, with biases
    assert weight_bytes(run_of(model))["weights before the start"] == 4 * weights


def test_text_bytes_of_ids_records_and_tasks():
    ids = np.zeros(10, np.int64)
    records = PackedRecords(ids, np.arange(10) > 0, np.array([0, 10]), np.array([0]))
    assert text_bytes(ids) == 80
    assert text_bytes(records) == 80 + 10 + 16 + 8
    assert text_bytes({"a": ids, "b": ids}, ids) == 240


@pytest.mark.parametrize("method", METHODS)
def test_predict_memory_of_every_method(method):
    fields = {"r": 4} if method == "miss" else {}  # its default is above the width
    config = adapter_config(method, "none", fields, SETTINGS.steps)
    base = CausalLM(LONG)
    model = base if config is None else get_peft_model(base, config)
    check_phases(run_of(model.train()))


def check_phases(run: Run) -> None:
    memory = predict_memory(run, measure_work(run), process=1000, text=200, loading=5000)
    trained = 4 * sum(p.size for p in run.optimizer.params)
    assert list(memory.phases) == [LOADING, SHARDS, UPDATE]
    assert memory.total(LOADING) == 6000
    for phase in (SHARDS, UPDATE):
        kinds = memory.phases[phase]
        assert kinds["moments"] == 2 * trained
        assert kinds["trained parameters"] == trained
        assert kinds["threads"] == 2 * THREAD
        assert min(kinds.values()) > 0
    assert memory.phases[UPDATE]["gradients"] == trained
    assert memory.peak == max(map(memory.total, memory.phases)) == memory.total(memory.largest)
    assert memory.rows()[-1]["MiB"] == "all"


def test_predict_memory_of_checkpointing():
    settings = Settings(batch_size=2, context=64, threads=1)
    model = adapted(CausalLM(LONG), target_modules="all-linear")
    activations = []
    for recompute in (False, True):
        model.get_base_model().gradient_checkpointing_enable(recompute)
        run = run_of(model, settings=settings)
        memory = predict_memory(run, measure_work(run), process=0, text=0, loading=0)
        activations.append(memory.phases[SHARDS]["activations"])
    assert activations[1] < 0.5 * activations[0]


def test_predict_memory_of_the_copy_of_the_best_weights():
    settings = dataclasses.replace(SETTINGS, keep="best")
    run = Run(adapted(), TOKENS, settings, "unused", held_out=TOKENS)
    memory = predict_memory(run, measure_work(run), process=0, text=0, loading=0)
    kinds = memory.phases[UPDATE]
    assert kinds["best weights"] == kinds["trained parameters"]


def test_read_resident_has_a_peak_above_what_is_used():
    resident = read_resident()
    assert 1 << 20 < resident.now <= resident.peak


@pytest.fixture(autouse=True)
def _without_tracing() -> Iterator[None]:
    yield
    assert not tracemalloc.is_tracing()
