"""Modules: parameters by name, the few layers beside their functions, and dropout that no cut of a batch changes."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.errors import GraphError
from minilora.nn import (
    Dropout,
    Embedding,
    FusedProjection,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    RMSNorm,
    dropout_counter,
    normal,
    uniform,
)

RNG = np.random.default_rng(7)


def array(*shape: int, dtype: str = "float64") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


class Tree(Module):
    """One of each thing that a module can hold, and things that it must not mistake for one."""

    def __init__(self) -> None:
        self.first = Linear(array(2, 3), array(2))
        self.blocks = [Linear(array(2, 2)), RMSNorm(array(2))]
        self.byname = {"b": Linear(array(1, 2)), "a": Embedding(array(4, 2))}
        self.last = Linear(self.first.weight.data)
        self.last.weight = self.first.weight  # tied
        self.own = Parameter(array(1))
        self.notes = ["text", 3, None]
        self.table = array(5)


NAMES = ["own", "first.weight", "first.bias", "blocks.0.weight", "blocks.1.weight"]
NAMES += ["byname.b.weight", "byname.a.weight"]


def test_names_come_in_the_order_of_assignment_and_a_tied_parameter_once() -> None:
    tree = Tree()
    paths = ["", "first", "blocks.0", "blocks.1", "byname.b", "byname.a", "last"]
    assert [path for path, _ in tree.named_modules()] == paths
    assert [path for path, _ in tree.named_modules("x")] == ["x", *(f"x.{p}" for p in paths[1:])]
    assert [name for name, _ in tree.named_parameters()] == NAMES
    assert [id(p) for p in tree.parameters()] == [id(p) for _, p in tree.named_parameters()]
    assert dict(tree.named_parameters())["first.weight"] is tree.last.weight


def test_train_and_eval_reach_every_module() -> None:
    tree = Tree()
    assert all(m.training for _, m in tree.named_modules())
    assert tree.eval() is tree
    assert not any(m.training for _, m in tree.named_modules())
    assert tree.train() is tree
    assert all(m.training for _, m in tree.named_modules())
    assert Module.training  # the class is not what was switched


def test_to_another_dtype_and_back() -> None:
    tree = Tree()
    before = {n: p.data.copy() for n, p in tree.named_parameters()}
    out = tree.first(Tensor(array(1, 3), requires_grad=True))
    assert tree.to("cpu", "float32") is tree
    assert {p.dtype for p in tree.parameters()} == {np.dtype("float32")}
    assert tree.first.weight is tree.last.weight
    for name, p in tree.named_parameters():
        assert np.array_equal(p.data, before[name].astype(np.float32))
    with pytest.raises(GraphError, match="changed"):
        gradients(out, [tree.first.weight], np.ones((1, 2)))
    storage = {n: p.data for n, p in tree.named_parameters()}
    tree.to(dtype="float32")
    assert all(
        p.data is storage[n] for n, p in tree.named_parameters()
    )  # nothing to do: nothing moved


def test_assigning_data_copies_and_bumps_the_version() -> None:
    p = Parameter(array(2, 3))
    assert p.requires_grad
    assert not Parameter(array(1), requires_grad=False).requires_grad
    storage, new, then = p.data, array(2, 3), list(p.version or [])
    y = F.linear(Tensor(array(1, 3), requires_grad=True), p)
    p.data = new
    assert p.data is storage
    assert np.array_equal(storage, new)
    assert not np.shares_memory(p.data, new)
    assert p.version == [then[0] + 1]
    with pytest.raises(GraphError, match="changed"):
        gradients(y, [p], np.ones((1, 2)))
    for wrong in (array(3, 2), array(2, 3, dtype="float32")):
        with pytest.raises(ValueError, match="cannot assign"):
            p.data = wrong


shapes = st.tuples(*[st.integers(1, 5)] * 4)


@given(shapes, st.sampled_from(["float32", "float64"]))
def test_layers_are_their_functions(shape: tuple[int, int, int, int], dtype: str) -> None:
    B, T, n, m = shape
    x = Tensor(array(B, T, n, dtype=dtype))
    W, b, scale, shift = (array(*s, dtype=dtype) for s in ((m, n), (m,), (n,), (n,)))
    full, bare = Linear(W, b), Linear(W)
    assert (full.in_features, full.out_features) == (n, m)
    assert full.dense_weight() is W
    assert bare.bias is None
    ids = RNG.integers(0, m, (B, T))
    pairs = [
        (full(x), F.linear(x, Tensor(W), Tensor(b))),
        (bare(x), F.linear(x, Tensor(W))),
        (Embedding(W)(ids), F.embedding(ids, Tensor(W))),
        (RMSNorm(scale, 1e-3)(x), F.rms_norm(x, Tensor(scale), 1e-3)),
        (RMSNorm(scale)(x), F.rms_norm(x, Tensor(scale), 1e-6)),
        (LayerNorm(scale, shift, 1e-3)(x), F.layer_norm(x, Tensor(scale), Tensor(shift), 1e-3)),
        (LayerNorm(scale, shift)(x), F.layer_norm(x, Tensor(scale), Tensor(shift), 1e-5)),
    ]
    for got, expected in pairs:
        assert got.requires_grad
        assert got.dtype == np.dtype(dtype)
        assert np.array_equal(got.data, expected.data)


class Layers(FusedProjection):
    def __init__(self, layers: list[Linear], stacked: bool):
        self.projections, self.stacked = tuple(f"layer{i}" for i in range(len(layers))), stacked
        for name, layer in zip(self.projections, layers, strict=True):
            setattr(self, name, layer)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.booleans(), st.booleans()
)
def test_a_fan_gives_its_layers_one_by_one(
    widths: list[int], bias: bool, stacked: bool, frozen: bool
) -> None:
    widths = [widths[0]] * len(widths) if stacked else widths
    layers = [Linear(array(m, 3), array(m) if bias else None) for m in widths]
    layers[0].weight.requires_grad = not frozen
    x, fan = Tensor(array(2, 3, 3), requires_grad=True), Layers(layers, stacked)
    join = np.stack if stacked else functools.partial(np.concatenate, axis=-1)
    apart = join([layer(x).data for layer in layers])
    leaves = [x, *fan.parameters()]
    dy = array(*apart.shape)
    found = []
    for tokens in (None, 6):
        if tokens:
            fan.prepare_step(tokens)
        y = fan.project(x)
        assert not any(fan._effective.values()) or y.node.vjp.__qualname__.startswith(
            "effective_linear"
        )
        np.testing.assert_allclose(y.data, apart, rtol=1e-14, atol=1e-14)
        found.append(gradients(y, leaves, dy))
        fan.end_step()
        assert not any(fan._effective.values())
    for p, one, other in zip(leaves, *found, strict=True):
        assert (one is None) == (other is None) == (not p.requires_grad)
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)


# ---- dropout ----


def test_dropout_is_the_identity_when_there_is_nothing_to_drop() -> None:
    x = Tensor(array(2, 3, 4))
    dropped = Dropout(0.5)
    assert dropped(x) is not x
    assert dropped.eval()(x) is x
    assert not dropped.active
    assert Dropout(0.0)(x) is x
    assert not Dropout(0.0).active


def test_without_a_counter_every_call_draws_anew_and_a_new_layer_repeats_it() -> None:
    x = Tensor(np.ones((3, 40, 5)))
    layer = Dropout(0.5, stream=1)
    calls = [layer(x).data for _ in range(6)]
    assert len({c.tobytes() for c in calls}) == 6
    again = Dropout(0.5, stream=1)
    assert all(np.array_equal(again(x).data, c) for c in calls)
    assert not np.array_equal(Dropout(0.5, stream=2)(x).data, calls[0])
    assert len({row.tobytes() for row in calls[0]}) == 3  # every sequence has a mask of its own


cuts = st.lists(st.integers(1, 3), min_size=1, max_size=5)


@given(
    cuts,
    st.integers(0, 2**40),
    st.integers(0, 2**20),
    st.integers(0, 9),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_any_cut_of_a_batch_gives_the_same_masks(
    parts: list[int], seed: int, step: int, first: int, p: float
) -> None:
    layer = Dropout(p, stream=3)
    x = array(sum(parts), 7, 5)
    with dropout_counter(seed, step, first):
        whole = layer(Tensor(x)).data
        twice = layer(Tensor(x)).data
    assert np.array_equal(whole, twice)  # the mask belongs to the step, not to the call
    pieces, at = [], 0
    for size in parts:
        with dropout_counter(seed, step, first + at):
            pieces.append(layer(Tensor(x[at : at + size])).data)
        at += size
    assert np.array_equal(np.concatenate(pieces), whole)
    with dropout_counter(seed, step + 1, first):
        other_step = layer(Tensor(x)).data
    with dropout_counter(seed + 1, step, first):
        other_seed = layer(Tensor(x)).data
    if x.size * min(p, 1 - p) >= 15:  # two masks agree with a chance below e^-15
        assert not np.array_equal(other_step, whole)
        assert not np.array_equal(other_seed, whole)


def test_the_counter_is_the_thread_s_own_and_ends_with_its_block() -> None:
    layer, x, seen = Dropout(0.5, stream=4), Tensor(np.ones((2, 50))), {}

    def elsewhere() -> None:
        with dropout_counter(9, 9):
            seen["there"] = layer(x).data

    with dropout_counter(1, 1):
        here = layer(x).data
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert np.array_equal(layer(x).data, here)
    assert not np.array_equal(seen["there"], here)
    assert not np.array_equal(layer(x).data, layer(x).data)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_backward_uses_the_mask_of_the_forward(p: float) -> None:
    x = Tensor(np.ones((64, 1000)), requires_grad=True)
    y = Dropout(p, stream=5)(x)
    assert set(np.unique(y.data)) == {0.0, 1 / (1 - p)}
    deviation = np.sqrt(p / (1 - p) / x.size)
    assert abs(y.data.mean() - 1) <= 6 * deviation  # the chance of more is 2e-9
    dy = array(*x.shape)
    assert np.array_equal(gradients(y, [x], dy)[0], dy * y.data)


# ---- first values ----


def test_first_values_do_not_depend_on_the_dtype() -> None:
    for draw in (uniform, normal):
        double, single = (
            draw(np.random.default_rng(3), 0.7, (50, 20), t) for t in (np.float64, np.float32)
        )
        assert double.dtype == np.float64
        assert single.dtype == np.float32
        assert np.array_equal(double.astype(np.float32), single)
    assert np.abs(uniform(np.random.default_rng(3), 0.7, (50, 20))).max() <= np.float32(0.7)
    assert not normal(None, 0.7, (3, 2)).any()
