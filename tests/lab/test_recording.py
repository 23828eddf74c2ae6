"""A layer or a block as it was computed: what it keeps for backward, and which gradients exist."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from methods import METHODS, TABLE
from operations import TABLE as OPERATIONS

from minilora import (
    CausalLM,
    Embedding,
    LayerNorm,
    Linear,
    LoraConfig,
    Module,
    Parameter,
    ReLU,
    RMSNorm,
    Sequential,
    Tensor,
    get_peft_model,
    no_grad,
    quantize,
)
from minilora.autograd import observer
from minilora.errors import ConfigError, MiniloraError
from minilora.lab.graphs import CONSTANT, INPUT, OPERATION, OUTPUT, PARAMETER, Graph
from minilora.lab.recording import record_graph
from minilora.models.config import TransformerConfig
from minilora.quant.half import convert_to_half

GPT2 = TransformerConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    model_type="gpt2",
    hidden_act="gelu_new",
)


TIED = dataclasses.replace(small.SMALLER, tie_word_embeddings=True)


def adapted(**fields: Any) -> Any:
    options = {"r": 2, "target_modules": "all-linear"} | fields
    return get_peft_model(small.base(), LoraConfig(**options))


def edges_of(graph: Graph, name: str, module: str) -> list[tuple[str, bool]]:
    """(what an operation reads, whether that has a gradient)."""
    (target,) = [i for i, v in enumerate(graph.vertices) if (v.name, v.module) == (name, module)]
    return [(graph.vertices[s].name, g) for s, t, g in graph.edges if t == target]


# ---- bytes ---------------------------------------------------------------------------------------


def traced() -> int:
    """The bytes of all arrays of NumPy that have been made since tracemalloc started."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    traces = tracemalloc.take_snapshot().filter_traces([domain]).traces
    return sum(trace.size for trace in traces)


def measured(model: Any, *inputs: Any) -> int:
    """The bytes of arrays that a forward leaves behind once its output is dropped."""
    model(*[x.copy() if isinstance(x, np.ndarray) else x for x in inputs])  # fills tables
    tracemalloc.start(1)
    try:
        before = traced()
        y = model(*[x.copy() if isinstance(x, np.ndarray) else x for x in inputs])
        node = y.node
        del y
        after = traced()
        del node
        return after - before
    finally:
        tracemalloc.stop()


class Apply(Module):
    """An operation of the table, over results of operations that keep nothing."""

    def __init__(self, function: Any):
        self.function = function

    def __call__(self, *leaves: Tensor) -> Any:
        return self.function(*[leaf + 0.0 for leaf in leaves])


# NumPy allocates a byte or more for an array without elements.
NOT_EMPTY = [op for op in OPERATIONS if all(a.size for a in op.inputs)]


@pytest.mark.parametrize("op", NOT_EMPTY, ids=lambda op: op.id)
def test_record_graph_counts_what_each_operation_keeps(op):
    leaves = op.leaves()
    model = Apply(op.function)
    assert record_graph(model, "", *leaves).backward_bytes == measured(model, *leaves)


ROWS = [row for row in TABLE if row.device == "cpu"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.kind}")
def test_record_graph_counts_what_a_model_with_adapters_keeps(row):
    model = row.model(lora_dropout=0.1 if row.name == "dora" else 0.0).train()
    graph = record_graph(model, "", small.IDS)
    assert graph.backward_bytes == measured(model, small.IDS) > 0


def test_record_graph_counts_what_a_training_step_keeps():
    model = adapted()
    model.prepare_step()
    graph = record_graph(model, "", small.IDS)
    assert graph.backward_bytes == measured(model, small.IDS) > 0
    assert [v.module for v in graph.find(OPERATION) if v.name == "effective_linear"][:2] == [
        "model.layers.0.self_attn",
        "model.layers.0.self_attn.o_proj",
    ]
    model.end_step()
    assert graph.backward_bytes < record_graph(model, "", small.IDS).backward_bytes


BASES = {
    "trained": lambda: small.base(),
    "window": lambda: small.base(model_type="mistral", sliding_window=4, attention_bias=False),
    "float64": lambda: small.base("float64"),
    "gpt2": lambda: CausalLM(GPT2),
    "nf4 without adapter": lambda: quantize(small.base()),
}


@pytest.mark.parametrize("name", BASES)
def test_record_graph_counts_what_a_base_keeps(name):
    model = BASES[name]()
    ids = small.IDS % 13
    assert record_graph(model, "", ids).backward_bytes == measured(model, ids) > 0


@st.composite
def networks(draw):
    """A network of layers of several kinds, some frozen, some with adapters."""
    C = draw(st.integers(2, 9))
    layers: list[Any] = []
    if draw(st.booleans()):
        layers.append(Embedding(7, C))
    for kind in draw(st.lists(st.sampled_from(["linear", "norm", "rms", "relu"]), max_size=4)):
        if kind == "linear":
            O = draw(st.integers(2, 9))
            layers.append(Linear(C, O, bias=draw(st.booleans())))
            C = O
        else:
            layers.append(
                {"norm": LayerNorm, "rms": RMSNorm}[kind](C) if kind != "relu" else ReLU()
            )
    network = Sequential(*layers, Linear(C, 3))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    if layers and isinstance(layers[0], Embedding):
        x: Any = np.arange(np.prod(shape)).reshape(shape) % 7
    else:
        first = next((v for p in network.parameters() for v in [p.shape[-1]]), 1)
        x = np.ones((*shape, first), np.float32)
    if draw(st.booleans()):
        targets = [str(len(layers))]
        method = draw(st.sampled_from(["lora", "dora"]))
        config = LoraConfig(r=2, target_modules=targets, use_dora=method == "dora")
        return get_peft_model(network, config), x
    for parameter in network.parameters():
        parameter.requires_grad = draw(st.booleans())
    return network, x


class FromArray(Module):
    """A network over an array, which becomes the result of an operation."""

    def __init__(self, network: Any):
        self.network = network

    def __call__(self, x: Any) -> Any:
        return self.network(x if x.dtype.kind == "i" else Tensor(x) + 0.0)


@given(networks())
def test_record_graph_counts_what_a_network_keeps(drawn):
    network, x = drawn
    model = FromArray(network)
    assert record_graph(model, "", x).backward_bytes == measured_or_nothing(model, x)


def measured_or_nothing(model: Any, x: Any) -> int:
    return measured(model, x) if model(x).node is not None else 0


def test_record_graph_counts_shared_memory_once():
    """q, k and v read one input, which the first of their adapters keeps."""
    graph = record_graph(adapted(), "model.layers.1.self_attn", small.IDS)
    keeping = [v for v in graph.find(OPERATION) if v.name == "lora_linear"]
    rank = 2 * 10 * 2 * 4  # B T r float32
    assert [v.backward_bytes - rank for v in keeping[:3]] == [2 * 10 * 16 * 4, 0, 0]
    assert [v.shared_bytes for v in keeping[:3]] == [0, 2 * 10 * 16 * 4, 2 * 10 * 16 * 4]
    assert graph.backward_bytes == sum(v.backward_bytes for v in graph.vertices)


# ---- frozen weights, gradients -------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(2))
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_record_graph_shows_that_frozen_weights_keep_nothing(kind, layer):
    base = small.base(attention_bias=False)
    if kind == "nf4":
        quantize(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    graph = record_graph(model, f"model.layers.{layer}", small.IDS)
    frozen = {i for i, v in enumerate(graph.vertices) if v.kind == PARAMETER and not v.gradient}
    trained = {i for i, v in enumerate(graph.vertices) if v.kind == PARAMETER and v.gradient}
    assert (len(frozen), len(trained)) == (9, 14)
    for source, target, gradient in graph.edges:
        assert gradient == (source in trained) or source not in frozen | trained
        if source in frozen and "norm" not in graph.vertices[target].name:
            assert graph.vertices[target].name == (
                "linear" if kind == "dense" else "quantized_linear"
            )
            assert graph.vertices[target].backward_bytes == graph.vertices[target].shared_bytes == 0
    dot = graph.to_dot()
    for i in frozen:
        assert f"n{i} [" in dot
        (line,) = [line for line in dot.splitlines() if line.startswith(f"  n{i} [")]
        assert "frozen" in line
        assert 'fillcolor="#dddddd"' in line
        arrows = [line for line in dot.splitlines() if line.startswith(f"  n{i} -> ")]
        assert arrows
        assert all("style=dashed" in arrow for arrow in arrows)


def test_record_graph_of_full_training_keeps_what_lora_does_not():
    path = "model.layers.0.self_attn.q_proj"
    trained = record_graph(small.base(attention_bias=False), path, small.IDS)
    assert edges_of(trained, "linear", "") == [("input", True), ("weight", True)]
    assert trained.backward_bytes == 2 * 10 * 16 * 4  # x, for the gradient of W
    model = adapted(target_modules=["o_proj"])
    frozen = record_graph(model, path, small.IDS)
    assert edges_of(frozen, "linear", "") == [("input", False), ("weight", False), ("bias", False)]
    assert frozen.backward_bytes == 0


def test_record_graph_names_operations_and_weights_of_a_layer():
    graph = record_graph(adapted(), "model.layers.1.mlp.down_proj", small.IDS)
    kinds = [(v.kind, v.name, v.module) for v in graph.vertices]
    assert kinds == [
        (INPUT, "input", ""),
        (PARAMETER, "weight", "base_layer"),
        (OPERATION, "linear", "base_layer"),
        (PARAMETER, "lora_A", "adapters.default"),
        (PARAMETER, "lora_B", "adapters.default"),
        (OPERATION, "lora_linear", "adapters.default"),
        (OUTPUT, "output", ""),
    ]
    reads = edges_of(graph, "lora_linear", "adapters.default")
    assert reads == [("input", True), ("linear", True), ("lora_A", True), ("lora_B", True)]
    assert edges_of(graph, "output", "") == [("lora_linear", True)]
    assert graph.vertices[1].shape == (16, 24)


@pytest.mark.parametrize("name", METHODS)
def test_record_graph_has_gradients_for_each_tensor_of_a_method(name):
    row = next(row for row in ROWS if row.name == name and row.kind == "dense")
    graph = record_graph(row.model(), "model.layers.0.mlp.up_proj", small.IDS)
    trained = {v.name for v in graph.find(PARAMETER) if v.gradient}
    assert trained == {key.partition(".")[0] for key in row.method.keys}
    frozen = {v.name for v in graph.find(PARAMETER) if not v.gradient}
    assert frozen == {"weight"}


def test_record_graph_shows_codes_as_a_weight_of_every_product():
    row = next(row for row in ROWS if (row.name, row.kind) == ("dora", "nf4"))
    model = row.model(lora_dropout=0.5).train()
    graph = record_graph(model, "model.layers.0.self_attn.q_proj", small.IDS)
    (weight,) = [i for i, v in enumerate(graph.vertices) if v.dtype == "nf4"]
    targets = [graph.vertices[t].name for s, t, _ in graph.edges if s == weight]
    assert targets == ["quantized_linear"] * 2
    assert graph.vertices[weight].nbytes < 16 * 16 * 2


def test_record_graph_shows_a_tied_weight_in_half_precision_at_both_ends():
    model = CausalLM(TIED)
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(np.float16).astype(np.float32)
    graph = record_graph(convert_to_half(model, "float16"), "", small.IDS % 13)
    (weight,) = [i for i, v in enumerate(graph.vertices) if v.shape == (13, 8)]
    targets = [graph.vertices[t].name for s, t, _ in graph.edges if s == weight]
    assert targets == ["embedding", "quantized_linear"]


class Unread(Module):
    def __init__(self) -> None:
        self.spare = Parameter(np.ones(3, np.float32), requires_grad=False)

    def __call__(self, x: Tensor) -> Tensor:
        return x * 2.0


def test_record_graph_leaves_out_a_weight_that_nothing_reads():
    graph = record_graph(Unread(), "", Tensor(np.ones(3, np.float32)))
    assert graph.find(PARAMETER) == []


def test_record_graph_in_no_grad_keeps_nothing():
    with no_grad():
        graph = record_graph(small.base(), "model.layers.0", small.IDS)
    assert graph.backward_bytes == 0
    assert not any(edge.gradient for edge in graph.edges)


class Scaled(Module):
    def __init__(self) -> None:
        self.inner = Linear(3, 3)

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2.0 + x


def test_record_graph_shows_constants_and_residuals():
    graph = record_graph(Scaled(), "", Tensor(np.ones((2, 3), np.float32)))
    assert edges_of(graph, "mul", "") == [("linear", True), ("constant", False)]
    assert edges_of(graph, "add", "") == [("mul", True), ("input", False)]
    assert len(graph.find(CONSTANT)) == 1


@pytest.mark.parametrize("path", ["", "model", "model.layers.1", "model.embed_tokens", "lm_head"])
def test_record_graph_has_sources_before_targets_and_an_output(path):
    graph = record_graph(adapted(), path, small.IDS)
    assert all(source < target for source, target, _ in graph.edges)
    assert len(set(graph.edges)) == len(graph.edges)
    assert len(graph.find(OUTPUT)) == 1
    read = {source for source, _, _ in graph.edges}
    outputs = {i for i, v in enumerate(graph.vertices) if v.kind == OUTPUT}
    assert read | outputs == set(range(len(graph.vertices)))


def test_record_graph_leaves_the_model_and_its_inputs_alone():
    model = adapted()
    ids = small.IDS.copy()
    before = small.bits(model)
    record_graph(model, "model", ids)
    assert small.bits(model) == before
    assert np.array_equal(ids, small.IDS)
    assert all(p.grad is None for p in model.parameters())


def test_record_graph_takes_peft_s_path():
    model = adapted()
    one = record_graph(model, "model.layers.0", small.IDS)
    other = record_graph(model, "base_model.model.model.layers.0", small.IDS)
    assert one == other


# ---- errors --------------------------------------------------------------------------------------


def test_record_graph_refuses_an_unknown_path_and_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean model\.layers\.0\.self_attn\.q_proj\?"):
        record_graph(adapted(), "model.layers.0.self_attn.q_pro", small.IDS)
    with pytest.raises(ConfigError, match="has no module"):
        record_graph(adapted(), "x" * 10**5, small.IDS)


def test_record_graph_refuses_a_module_that_computes_nothing():
    path = "model.layers.0.self_attn.q_proj.adapters.default.dropout"
    with pytest.raises(ConfigError, match="nothing is computed inside"):
        record_graph(adapted(), path, small.IDS)


def test_record_graph_removes_its_observer_when_the_model_fails():
    with pytest.raises(MiniloraError, match="integers"):
        record_graph(small.base(), "model", np.ones((2, 3)))
    assert observer.get() is None


def test_record_graph_of_a_block_that_is_computed_again_keeps_its_input_alone():
    model = adapted()
    model.get_base_model().gradient_checkpointing_enable()
    assert record_graph(model, "model.layers.1", small.IDS).backward_bytes == 0
    graph = record_graph(model, "model", small.IDS)
    inputs = [v.backward_bytes for v in graph.find(OPERATION) if v.name == "checkpoint"]
    assert inputs == [2 * 10 * 16 * 4] * 2
