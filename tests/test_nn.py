"""Modules: parameters by name, layers beside their functions, and dropout that no cut of a batch
changes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strict_xp import STRICT

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.backend import get_backend
from minilora.errors import GraphError
from minilora.nn import (
    Dropout,
    Embedding,
    FusedProjection,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    ReLU,
    RMSNorm,
    Sequential,
    checkpoint,
    dropout_counter,
    normal,
    replace_module,
    uniform,
)

RNG = np.random.default_rng(7)


def array(*shape: int, dtype: str = "float64") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


class Tree(Module):
    """One of each thing that a module can contain, and things that are not parts of its tree."""

    def __init__(self) -> None:
        self.first = Linear(array(2, 3), array(2))
        self.blocks = [Linear(array(2, 2)), RMSNorm(array(2))]
        self.byname = {"b": Linear(array(1, 2)), "a": Embedding(array(4, 2))}
        self.last = Linear(self.first.weight.data)
        self.last.weight = self.first.weight  # tied
        self.own = Parameter(array(1))
        self.notes = ["text", 3, None]
        self.table = array(5)
        self._hidden = Linear(array(2, 2))


PATHS = ["", "first", "blocks.0", "blocks.1", "byname.b", "byname.a", "last"]
NAMES = ["own", "first.weight", "first.bias", "blocks.0.weight", "blocks.1.weight"]
NAMES += ["byname.b.weight", "byname.a.weight"]


def test_named_modules_come_in_the_order_of_assignment() -> None:
    tree = Tree()
    assert [path for path, _ in tree.named_modules()] == PATHS
    assert [path for path, _ in tree.named_modules("x")] == ["x", *(f"x.{p}" for p in PATHS[1:])]


def test_named_parameters_contain_a_tied_parameter_once() -> None:
    tree = Tree()
    named = list(tree.named_parameters())
    assert [name for name, _ in named] == NAMES
    assert [id(p) for p in tree.parameters()] == [id(p) for _, p in named]
    assert dict(named)["first.weight"] is tree.last.weight


def test_module_repr_shows_the_tree_with_shapes_dtypes_and_what_trains() -> None:
    tree = Tree()
    tree.last.to(dtype="float32")
    tree.blocks += [RMSNorm(array(2)), RMSNorm(array(2))]
    tree.blocks[0].weight.requires_grad = False
    assert (
        repr(tree)
        == """Tree(
  own=(1,), float64, requires_grad=True
  (first): Linear(in_features=3, out_features=2, bias=True, float32 and float64, requires_grad=True)
  (blocks.0): Linear(in_features=2, out_features=2, bias=False, float64, requires_grad=False)
  (blocks.1 to blocks.3): 3 x RMSNorm(weight=(2,), float64, requires_grad=True)
  (byname.b): Linear(in_features=2, out_features=1, bias=False, float64, requires_grad=True)
  (byname.a): Embedding(weight=(4, 2), float64, requires_grad=True)
  (last): Linear(in_features=3, out_features=2, bias=False, float32, requires_grad=True)
)"""
    )
    assert repr(Sequential()) == "Sequential()"
    assert (
        repr(Sequential(ReLU(), Sequential(Dropout(0.5))))
        == """Sequential(
  (0): ReLU()
  (1): Sequential(
    (0): Dropout(p=0.5)
  )
)"""
    )


def test_replace_module_leads_through_attributes_and_lists() -> None:
    tree = Tree()
    new = RMSNorm(array(2))
    replace_module(tree, "blocks.0", new)
    assert tree.blocks[0] is new
    replace_module(tree, "last", new)
    assert tree.last is new


def test_train_and_eval_reach_every_module() -> None:
    tree = Tree()
    assert all(m.training for _, m in tree.named_modules())
    assert tree.eval() is tree
    assert not any(m.training for _, m in tree.named_modules())
    assert tree.train() is tree
    assert all(m.training for _, m in tree.named_modules())
    assert Module.training  # the class itself was not switched


def test_to_another_dtype_and_back() -> None:
    tree = Tree()
    before = {name: p.data.copy() for name, p in tree.named_parameters()}
    out = tree.first(Tensor(array(1, 3), requires_grad=True))
    assert tree.to("cpu", "float32") is tree
    assert tree.first.weight is tree.last.weight
    for name, p in tree.named_parameters():
        assert p.dtype == np.float32
        assert np.array_equal(p.data, before[name].astype(np.float32))
    with pytest.raises(GraphError, match="changed"):
        gradients(out, [tree.first.weight], np.ones((1, 2)))
    storage = {name: p.data for name, p in tree.named_parameters()}
    tree.to(dtype="float32")
    for name, p in tree.named_parameters():
        assert p.data is storage[name]  # nothing to do: nothing moved


def test_parameter_data_assignment_copies_and_counts_a_version() -> None:
    p = Parameter(array(2, 3))
    assert p.requires_grad
    assert not Parameter(array(1), requires_grad=False).requires_grad
    assert p.version is not None
    storage = p.data
    new = array(2, 3)
    (version,) = p.version
    y = F.linear(Tensor(array(1, 3), requires_grad=True), p)
    p.data = new
    assert p.data is storage
    assert np.array_equal(storage, new)
    assert not np.shares_memory(p.data, new)
    assert p.version == [version + 1]
    with pytest.raises(GraphError, match="changed"):
        gradients(y, [p], np.ones((1, 2)))
    for wrong in (array(3, 2), array(2, 3, dtype="float32")):
        with pytest.raises(ValueError, match="cannot assign"):
            p.data = wrong


SHAPES = st.tuples(*[st.integers(1, 5)] * 4)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.requires_grad
    assert got.dtype == expected.dtype
    assert np.array_equal(got.data, expected.data)


@given(SHAPES, st.sampled_from(["float32", "float64"]))
def test_layers_are_their_functions(shape: tuple[int, int, int, int], dtype: Any) -> None:
    B, T, n, m = shape
    x = Tensor(array(B, T, n, dtype=dtype))
    W = array(m, n, dtype=dtype)
    b = array(m, dtype=dtype)
    scale = array(n, dtype=dtype)
    shift = array(n, dtype=dtype)
    ids = RNG.integers(0, m, (B, T))
    full = Linear(W, b)
    bare = Linear(W)
    assert full.in_features == n
    assert full.out_features == m
    assert full.dense_weight() is W
    assert bare.bias is None
    gain, move = Tensor(scale), Tensor(shift)
    assert_same(full(x), F.linear(x, Tensor(W), Tensor(b)))
    assert_same(bare(x), F.linear(x, Tensor(W)))
    assert_same(Embedding(W)(ids), F.embedding(ids, Tensor(W)))
    assert_same(RMSNorm(scale, 1e-3)(x), F.rms_norm(x, gain, 1e-3))
    assert_same(RMSNorm(scale)(x), F.rms_norm(x, gain, 1e-6))
    assert_same(LayerNorm(scale, shift, 1e-3)(x), F.layer_norm(x, gain, move, 1e-3))
    assert_same(LayerNorm(scale, shift)(x), F.layer_norm(x, gain, move, 1e-5))
    assert full(x).dtype == np.dtype(dtype)


class Layers(FusedProjection):
    def __init__(self, layers: list[Linear], stacked: bool):
        self.projections = tuple(f"layer{i}" for i in range(len(layers)))
        self.stacked = stacked
        for name, layer in zip(self.projections, layers, strict=True):
            setattr(self, name, layer)


WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(WIDTHS, st.booleans(), st.booleans(), st.booleans())
def test_fused_projection_computes_its_layers_outputs(
    widths: list[int], bias: bool, stacked: bool, frozen: bool
) -> None:
    if stacked:
        widths = [widths[0]] * len(widths)
    layers = [Linear(array(m, 3), array(m) if bias else None) for m in widths]
    layers[0].weight.requires_grad = not frozen
    x = Tensor(array(2, 3, 3), requires_grad=True)
    fused = Layers(layers, stacked)
    outputs = [layer(x).data for layer in layers]
    expected = np.stack(outputs) if stacked else np.concatenate(outputs, axis=-1)
    leaves = [x, *fused.parameters()]
    dy = array(*expected.shape)
    results = []
    for tokens in (None, 6):
        if tokens:
            fused.prepare_step(tokens)
        y = fused.project(x)
        assert y.node is not None
        if any(fused._effective.values()):
            assert y.node.vjp.__qualname__.startswith("effective_linear")
        np.testing.assert_allclose(y.data, expected, rtol=1e-14, atol=1e-14)
        results.append(gradients(y, leaves, dy))
        fused.end_step()
        assert not any(fused._effective.values())
    for p, one, other in zip(leaves, *results, strict=True):
        assert (one is None) == (other is None) == (not p.requires_grad)
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_is_the_identity_in_eval_mode_and_for_p_0() -> None:
    x = Tensor(array(2, 3, 4))
    dropout = Dropout(0.5)
    assert dropout(x) is not x
    assert dropout.eval()(x) is x
    assert not dropout.active
    assert Dropout(0.0)(x) is x
    assert not Dropout(0.0).active


def test_dropout_without_a_counter_draws_anew_and_a_new_layer_repeats_it() -> None:
    x = Tensor(np.ones((3, 40, 5)))
    layer = Dropout(0.5, stream=1)
    calls = [layer(x).data for _ in range(6)]
    assert len({c.tobytes() for c in calls}) == 6
    again = Dropout(0.5, stream=1)
    for call in calls:
        assert np.array_equal(again(x).data, call)
    assert not np.array_equal(Dropout(0.5, stream=2)(x).data, calls[0])
    assert len({row.tobytes() for row in calls[0]}) == 3  # each sequence has another mask


CUTS = st.lists(st.integers(1, 3), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**40)
STEPS = st.integers(0, 2**20)
PROBABILITIES = st.sampled_from([0.1, 0.5, 0.9])


@given(CUTS, SEEDS, STEPS, st.integers(0, 9), PROBABILITIES)
def test_dropout_masks_do_not_depend_on_the_cut_of_a_batch(
    parts: list[int], seed: int, step: int, first: int, p: float
) -> None:
    layer = Dropout(p, stream=3)
    x = array(sum(parts), 7, 5)

    def dropped(x: np.ndarray, seed: int, step: int, first: int) -> np.ndarray:
        with dropout_counter(seed, step, first):
            return layer(Tensor(x)).data

    with dropout_counter(seed, step, first):
        whole = layer(Tensor(x)).data
        twice = layer(Tensor(x)).data
    assert np.array_equal(whole, twice)  # the mask belongs to the step, not to the call
    pieces = []
    start = 0
    for size in parts:
        pieces.append(dropped(x[start : start + size], seed, step, first + start))
        start += size
    assert np.array_equal(np.concatenate(pieces), whole)
    other_step = dropped(x, seed, step + 1, first)
    other_seed = dropped(x, seed + 1, step, first)
    if x.size * min(p, 1 - p) >= 15:  # two masks agree with a chance below e^-15
        assert not np.array_equal(other_step, whole)
        assert not np.array_equal(other_seed, whole)


def test_dropout_counter_belongs_to_its_thread_and_ends_with_its_block() -> None:
    layer = Dropout(0.5, stream=4)
    x = Tensor(np.ones((2, 50)))
    others = []

    def run_in_thread() -> None:
        with dropout_counter(9, 9):
            others.append(layer(x).data)

    with dropout_counter(1, 1):
        mask = layer(x).data
        thread = threading.Thread(target=run_in_thread)
        thread.start()
        thread.join()
        assert np.array_equal(layer(x).data, mask)
    (other,) = others
    assert not np.array_equal(other, mask)
    assert not np.array_equal(layer(x).data, layer(x).data)


DEVICES = ["cpu", "strict", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [0, 7, 2**40, 2**64 - 1])
def test_dropout_counter_takes_its_step_from_an_array(step: int, device: str) -> None:
    """The same mask as for the number, forward and backward, also where backward runs it again."""
    backend = STRICT if device == "strict" else get_backend(device)
    number = backend.from_numpy(np.array([step], np.uint64))
    layer = Dropout(0.5, stream=3)
    values = array(3, 7, 5)

    def run(step: Any, again: bool) -> list[bytes]:
        x = Tensor(backend.from_numpy(values), True)
        with dropout_counter(11, step, first=2):
            y = checkpoint(layer, x, []) if again else layer(x)
        (dx,) = gradients(y, [x], backend.from_numpy(values))
        return [backend.to_numpy(a).tobytes() for a in (y.data, dx)]

    expected = run(step, False)
    assert len(set(expected)) == 1
    assert run(number, False) == run(number, True) == expected
    with dropout_counter(11, step, first=2):
        assert layer(Tensor(values)).data.tobytes() == expected[0]  # as on the CPU
    number += np.uint64(1)
    assert run(number, False) != expected


@pytest.mark.gpu
def test_dropout_counter_may_change_between_replays_of_a_graph() -> None:
    gpu = get_backend("cuda")
    number = gpu.from_numpy(np.zeros(1, np.uint64))
    layer = Dropout(0.3, stream=4)
    x = Tensor(gpu.from_numpy(array(4, 9)), True)
    dy = gpu.xp.ones((4, 9))

    def work(step: Any) -> tuple[Any, Any]:
        with dropout_counter(5, step):
            y = layer(x)
        return y.data, gradients(y, [x], dy)[0]

    work(number)  # compiles
    graph = gpu.recorder.capture(lambda: work(number))
    for step in (0, 3, 2**50):
        number[...] = step
        graph.replay()
        for replayed, eager in zip(graph.result, work(step), strict=True):
            assert gpu.to_numpy(replayed).tobytes() == gpu.to_numpy(eager).tobytes()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_backward_uses_the_mask_of_the_forward(p: float) -> None:
    x = Tensor(np.ones((64, 1000)), requires_grad=True)
    y = Dropout(p, stream=5)(x)
    assert set(np.unique(y.data)) == {0.0, 1 / (1 - p)}
    deviation = np.sqrt(p / (1 - p) / x.size)
    assert abs(y.data.mean() - 1) <= 6 * deviation  # the chance of more is 2e-9
    dy = array(*x.shape)
    (dx,) = gradients(y, [x], dy)
    assert np.array_equal(dx, dy * y.data)


# ---- first values --------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [uniform, normal])
def test_uniform_and_normal_do_not_depend_on_the_dtype(draw: Any) -> None:
    double = draw(np.random.default_rng(3), 0.7, (50, 20), np.float64)
    single = draw(np.random.default_rng(3), 0.7, (50, 20), np.float32)
    assert double.dtype == np.float64
    assert single.dtype == np.float32
    assert np.array_equal(double.astype(np.float32), single)


def test_uniform_stays_within_its_bound() -> None:
    values = uniform(np.random.default_rng(3), 0.7, (50, 20))
    assert np.abs(values).max() <= np.float32(0.7)


def test_normal_without_a_generator_is_zero() -> None:
    assert not normal(None, 0.7, (3, 2)).any()
