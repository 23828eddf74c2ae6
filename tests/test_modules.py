"""Modules of one's own: two spellings of the forward pass, state, layers from sizes, Sequential."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from minilora import SGD, AdamW, Module, Tensor, manual_seed, quantize
from minilora import functional as F
from minilora.backend import get_backend
from minilora.errors import ConfigError
from minilora.nn import Embedding, LayerNorm, Linear, ReLU, RMSNorm, Sequential, mse_loss, relu

X = Tensor(np.random.default_rng(3).standard_normal((6, 4)))


def network(dtype: str = "float64") -> Sequential:
    manual_seed(5)
    net = Sequential(Linear(4, 8), ReLU(), Linear(8, 8, bias=False), ReLU(), Linear(8, 3))
    return net.to(dtype=dtype)  # type: ignore[no-any-return]


# ---- forward and __call__ ----


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2  # type: ignore[no-any-return]


class Called(Module):
    def __call__(self, x: Tensor) -> Tensor:
        return x * 3


class Both(Called):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1  # type: ignore[no-any-return]


@pytest.mark.parametrize("module", [Doubled(4, 2), Called(), Both(), Linear(4, 2), ReLU()])
def test_module_forward_and_call_are_one(module: Module) -> None:
    assert np.array_equal(module(X).numpy(), module.forward(X).numpy())


def test_module_forward_of_a_subclass_counts() -> None:
    layer = Doubled(4, 2)
    assert np.array_equal(layer(X).numpy(), 2 * Linear.forward(layer, X).numpy())
    assert np.array_equal(Both()(X).numpy(), X.numpy() * 3 + 1)


def test_module_without_a_forward_says_what_to_define() -> None:
    class Empty(Module):
        pass

    for call in (Empty(), Empty().forward):
        with pytest.raises(NotImplementedError, match=r"define forward\(self, x\) in class Empty"):
            call(X)


# ---- state ----


def test_state_dict_returns_copies_and_load_state_dict_copies_them() -> None:
    net, other = network(), network("float32")
    state = net.state_dict()
    assert list(state) == ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]
    state["0.bias"] += 1
    assert not np.array_equal(net[0].bias.numpy(), state["0.bias"])
    storage = other[0].bias.data
    assert other.load_state_dict(state) == ([], [])
    assert other[0].bias.data is storage
    assert np.array_equal(storage, state["0.bias"].astype(np.float32))
    state["0.bias"][:] = 0
    assert other[0].bias.numpy().any()


def test_state_dict_has_a_tied_parameter_under_each_name_and_needs_one() -> None:
    net = Sequential(Linear(3, 3), Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    state = net.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.weight"]
    del state["0.weight"]
    state["1.weight"][:] = 7
    assert net.load_state_dict(state) == ([], [])
    assert (net[0].weight.numpy() == 7).all()


def test_load_state_dict_takes_tensors_lists_and_integers() -> None:
    net = Sequential(Linear(2, 1))
    net.load_state_dict({"0.weight": [[1, 2]], "0.bias": Tensor([3.0])})
    assert net[0].weight.numpy().tolist() == [[1, 2]]
    assert net[0].bias.numpy().tolist() == [3]


def test_load_state_dict_lists_all_that_does_not_fit_and_changes_nothing() -> None:
    net = network()
    before = net.state_dict()
    wrong = {**before, "4.bias": np.zeros(4), "2.weight": np.array(["a"]), "5.bias": np.zeros(1)}
    del wrong["0.bias"]
    with pytest.raises(ConfigError) as caught:
        net.load_state_dict(wrong)
    for part in (
        "4.bias: expected shape (3,), got (4,)",
        "2.weight: expected real numbers, got <U1",
        "missing: 0.bias",
        "unexpected: 5.bias",
        "does not fit Sequential",
    ):
        assert part in str(caught.value)
    assert all(np.array_equal(before[name], p) for name, p in net.state_dict().items())
    with pytest.raises(ConfigError, match="give a dictionary"):
        net.load_state_dict([1])  # type: ignore[arg-type]
    names = net.load_state_dict({"0.bias": np.ones(8), "q": 0}, strict=False)
    assert names.missing_keys == ["0.weight", "2.weight", "4.weight", "4.bias"]
    assert names.unexpected_keys == ["q"]
    assert (net[0].bias.numpy() == 1).all()
    with pytest.raises(ConfigError, match="shape"):  # as in torch, also without strict
        net.load_state_dict({"0.bias": np.ones(9)}, strict=False)


def test_load_state_dict_refuses_codes() -> None:
    net = quantize(network("float32"))
    with pytest.raises(ConfigError, match=r"0\.weight: is quantised .* load before quantising"):
        net.load_state_dict(network().state_dict())


# ---- layers from sizes ----


def test_linear_of_sizes_begins_as_torch_does_and_anew_with_manual_seed() -> None:
    manual_seed(1)
    layers = [Linear(16, 3), Linear(16, 3)]
    assert layers[0].weight.shape == (3, 16)
    assert layers[0].weight.dtype == np.float32
    assert not np.array_equal(layers[0].weight.numpy(), layers[1].weight.numpy())
    for layer in layers:
        for p in layer.parameters():
            assert 0 < np.abs(p.numpy()).max() <= 0.25  # 1 / sqrt(16)
    manual_seed(1)
    again = Linear(16, 3)
    assert np.array_equal(again.weight.numpy(), layers[0].weight.numpy())
    assert Linear(16, 3, bias=False).bias is None
    assert Linear(in_features=2, out_features=5, dtype=np.float64).weight.dtype == np.float64
    assert np.array_equal(Linear(2, 2, rng=4).weight.numpy(), Linear(2, 2, rng=4).weight.numpy())


def test_layers_of_sizes() -> None:
    assert Embedding(5, 2)(np.array([4, 0])).shape == (2, 2)
    assert RMSNorm(4).weight.numpy().tolist() == [1] * 4
    assert LayerNorm(4).bias.numpy().tolist() == [0] * 4


INTEGERS: Any = np.ones((2, 3), int)
MISTAKES = {
    "one size": (lambda: Linear(4), "missing 1 required .*'out_features': give its sizes"),
    "none": (lambda: Linear(), r"as in Linear\(4, 3, bias=True\), or its arrays"),
    "a spelling": (lambda: Linear(4, 3, biass=True), "unexpected keyword argument 'biass'"),
    "zero": (lambda: Linear(0, 3), "in_features must be an integer of at least 1, got 0"),
    "a fraction": (lambda: Linear(4, 2.5), "out_features must be an integer"),
    "an axis": (lambda: Linear(np.ones(3)), r"weight must have shape .*got \(3,\)"),
    "a bias": (lambda: Linear(np.ones((2, 3)), np.ones(3)), r"bias must have shape \(2,\)"),
    "one size of two": (lambda: Embedding(4), "embedding_dim must be an integer"),
    "a list": (lambda: Sequential([ReLU()]), r"write Sequential\(\*modules\)"),
    "a function": (lambda: Sequential(ReLU(), F.relu), r"got function at 1: .*as ReLU\(\)"),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_layers_say_what_they_want(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_linear_says_what_is_wrong_with_integers_and_with_the_size_of_x() -> None:
    with pytest.raises(TypeError, match=r"weight, got int64: give .*astype\(np\.float32\)"):
        Linear(INTEGERS)
    with pytest.raises(ValueError, match=r"x must have 3 numbers in its last axis.*\(6, 4\)"):
        Linear(3, 2)(X)


# ---- Sequential and a training loop ----


def test_sequential_indexes_iterates_and_slices() -> None:
    net = network()
    assert len(net) == 5
    assert [type(m) for m in net] == [Linear, ReLU, Linear, ReLU, Linear]
    assert net[-1] is net[4]
    assert np.array_equal(net[2:](net[:2](X)).numpy(), net(X).numpy())
    assert net.append(ReLU()) is net
    assert [name for name, _ in net.named_children()] == list("012345")
    with pytest.raises(IndexError):
        net[6]


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: AdamW(p, lr=0.02)])
def test_sequential_learns_in_a_loop_of_ten_lines(make: Any) -> None:
    net = network()
    targets = np.sin(X.numpy()[:, :3])
    optimizer = make(net.parameters())
    losses = []
    for _ in range(60):
        net.zero_grad()
        loss = mse_loss(net(X), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.gpu
def test_sequential_has_the_gradients_of_a_cpu_on_a_gpu() -> None:
    host = network()
    device = network().to("cuda")
    targets = np.cos(X.numpy()[:, :3])
    mse_loss(host(X), targets).backward()
    backend = get_backend("cuda")
    mse_loss(device(X.to("cuda")), backend.from_numpy(targets)).backward()
    for p, q in zip(host.parameters(), device.parameters(), strict=True):
        np.testing.assert_allclose(q.backend.to_numpy(q.grad), p.grad, rtol=1e-12, atol=1e-14)
    state = device.state_dict()
    assert all(isinstance(array, np.ndarray) for array in state.values())
    device.load_state_dict({name: backend.from_numpy(array) for name, array in state.items()})
    assert "cuda" in repr(device[0])


def test_mse_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(6, 4\) and \(4,\)"):
        mse_loss(X, np.ones(4))
    with pytest.raises(ValueError, match="reduction"):
        mse_loss(X, X, "none")
    with pytest.raises(ValueError, match="no values"):
        mse_loss(Tensor(np.ones((0, 4))), np.ones((0, 4)))


def test_relu_is_zero_at_zero_and_below() -> None:
    x = Tensor(np.array([-1.0, 0.0, 2.0, np.inf]), requires_grad=True)
    relu(x).backward(np.array([1.0, np.inf, 5.0, 6.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 5, 6]


# ---- repr ----


def test_optimizer_repr_has_counts_and_numbers() -> None:
    net = network()
    one = repr(AdamW(net.parameters(), lr=0.1))
    assert one == (
        "AdamW(5 parameters of 131 numbers, lr=0.1, betas=(0.9, 0.999), eps=1e-08, "
        "weight_decay=0.01)"
    )
    groups = [{"params": net[0].parameters()}, {"params": net[4].parameters(), "lr": 0.5}]
    lines = repr(SGD(groups, lr=0.1)).splitlines()
    assert lines[0] == "SGD("
    assert lines[2] == "  1: 2 parameters of 27 numbers, lr=0.5, momentum=0.0, weight_decay=0.0"


def test_node_repr_names_the_operation_and_its_inputs() -> None:
    layer = Linear(4, 2, dtype=np.float64)
    y = relu(layer(X))
    assert repr(y.node) == "Node(relu of linear)"
    leaves = "constant, leaf (2, 4) float64, leaf (2,) float64"
    assert repr(layer(X).node) == f"Node(linear of {leaves})"
    node = y.node
    y.backward(np.ones(y.shape))
    assert re.fullmatch(r"Node\(\w+\)", repr(node))
