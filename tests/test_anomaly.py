"""Anomaly mode finds the first NaN, and only that: every operation is broken in turn, forward and backward."""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from operations import TABLE, Operation
from test_autograd import captured, graph, run, some_dy

from minilora import CausalLM, LoraConfig, TransformerConfig, effective, get_peft_model
from minilora import autograd as ag
from minilora import functional as F
from minilora.anomaly import detect_anomaly
from minilora.autograd import Tensor, gradients, no_grad, observer
from minilora.data import Batch
from minilora.effective import EffectiveWeight, effective_linear
from minilora.errors import GraphError, NonFiniteError
from minilora.training.nonfinite import explain_non_finite
from minilora.training.parallel import ShardedStep, language_modelling_loss

RECORDING = [op for op in TABLE if op.id != "dropout-p=0.0"]  # that one returns its input
EVERY = pytest.mark.parametrize("op", RECORDING, ids=lambda op: op.id)
LAST = {
    "minimum": "mul",
    "mean": "mul",
    "min": "mul",
}  # operations made of others: what the last of them is called
HERE = Path(__file__).name


def call(op: Operation, *inputs: Tensor) -> tuple[Tensor, str]:
    """The operation's output, and the line on which it was called, as the messages write it."""
    y = op.function(*inputs)
    line = inspect.currentframe().f_lineno - 1
    own = inspect.getsourcefile(inspect.unwrap(getattr(op.function, "func", op.function)))
    inside = own is None or os.path.basename(own) not in (
        "autograd.py",
        "functional.py",
        "effective.py",
        HERE,
    )
    return y, r"operations\.py:\d+" if inside else rf"test_anomaly\.py:{line}\b"


# ---- nothing is found where nothing is wrong ------------------------------------------------------------------------


@EVERY
def test_every_operation_has_the_same_bits_inside(op: Operation) -> None:
    leaves = op.leaves()
    y = op.function(*leaves)
    dy = some_dy(y)
    expected = [y.data.copy(), *gradients(y, leaves, dy)]
    with detect_anomaly(infinities=True):
        y = op.function(*leaves)
        got = [y.data, *gradients(y, leaves, dy, retain_graph=True)]
        again = gradients(y, leaves, dy)
    for a, b in zip([*got, *again], [*expected, *expected[1:]], strict=True):
        np.testing.assert_array_equal(a, b)
    assert observer.get() is None


@EVERY
def test_a_nan_that_was_brought_in_is_no_operation_s_fault(op: Operation) -> None:
    for i, a in enumerate(op.inputs):
        if a.size:
            leaves = op.leaves()
            leaves[i] = Tensor(np.full_like(a, np.nan), True)
            with detect_anomaly(infinities=True), np.errstate(all="ignore"):
                y = ag.mul(op.function(*leaves), 2.0)
                gradients(y, leaves, some_dy(y))


# ---- what is seeded is found ----------------------------------------------------------------------------------------


def sabotage(
    monkeypatch: pytest.MonkeyPatch, op: Operation, change: Callable[..., tuple[Any, Any]]
) -> None:
    """Let an operation hand `record` what `change(data, vjp)` makes of its output and its vjp.

    One that is made of others records several times: then only the last is changed.
    """
    real, last, calls = ag.record, len(list(graph(op.function(*op.leaves())))), itertools.count(1)

    def record(data: Any, inputs: tuple[Tensor, ...], vjp: Any) -> Tensor:
        if any(t.requires_grad for t in inputs) and next(calls) == last:
            data, vjp = change(data, vjp)
        return real(data, inputs, vjp)

    inside = {
        **globals(),
        "__name__": "minilora.autograd",
    }  # a frame of the engine, not of this test
    record = types.FunctionType(record.__code__, inside, closure=record.__closure__)  # type: ignore[assignment]
    monkeypatch.setattr(ag, "record", record)
    monkeypatch.setattr(F, "record", record)
    monkeypatch.setattr(effective, "record", record)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_seeded_output_names_the_operation_its_shape_and_the_line(
    op: Operation, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = op.leaves()
    shape = op.function(*leaves).shape
    if 0 in shape:
        return  # no place for a NaN
    last = LAST.get(op.name, op.name)

    def change(data: Any, vjp: Any) -> tuple[Any, Any]:
        data = np.array(data)
        data.flat[-1] = bad
        return data, vjp

    _, line = call(op, *leaves)
    sabotage(monkeypatch, op, change)
    kind = "NaN" if bad != bad else "infinity"
    with pytest.raises(NonFiniteError) as caught, detect_anomaly(infinities=bad == bad):
        call(op, *leaves)
    assert re.search(rf"^first {kind}: the output of {last} \([\d, ]*\), 1 of \d+ entries, made at {line}$",
                     str(caught.value)), str(caught.value)  # fmt: skip
    assert f"{last} {shape}, 1 of {np.prod(shape, dtype=int)} " in str(caught.value)
    if bad == bad:
        sabotage(monkeypatch, op, change)
        with detect_anomaly():
            op.function(*leaves)  # an infinity is no NaN


@EVERY
def test_a_seeded_gradient_names_the_operation_the_input_and_the_line(
    op: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = op.leaves()
    probe = op.function(*leaves)
    dy = some_dy(probe)
    for i in range(len(probe.node.vjp(dy))):

        def change(data: Any, vjp: Any, i: int = i) -> tuple[Any, Any]:
            @functools.wraps(vjp)
            def broken(dz: Any) -> Any:
                found = [g if g is None else np.array(g) for g in vjp(dz)]
                if found[i] is not None and found[i].size:
                    found[i].flat[0] = np.nan
                return tuple(found)

            return data, broken

        with monkeypatch.context() as patch:
            sabotage(patch, op, change)
            with detect_anomaly():
                y, line = call(op, *leaves)
                last, g = LAST.get(op.name, op.name), probe.node.vjp(dy)[i]
                if g is None or not g.size or probe.node.parents[i] is None:
                    gradients(y, leaves, dy)
                    continue
                with pytest.raises(NonFiniteError) as caught:
                    gradients(y, leaves, dy)
        what = (
            rf"the gradient of input {i} of {last} {re.escape(str(g.shape))}, 1 of {g.size} entries"
        )
        assert re.search(rf"^first NaN: {what}, which was called at {line}$", str(caught.value)), (
            str(caught.value)
        )


@EVERY
def test_a_write_into_a_kept_array_names_the_operation(op: Operation) -> None:
    with detect_anomaly():
        leaves = op.leaves()
        y, line = call(op, *leaves)
        dy = some_dy(y)
        expected = gradients(y, leaves, dy, retain_graph=True)
        for node in graph(y):
            for array in {
                id(a): a for a in captured(node.vjp) if isinstance(a, np.ndarray)
            }.values():
                if not array.flags.writeable or not array.size:
                    continue
                before = array.copy()
                array.flat[0] = not array.flat[0] if array.dtype == bool else array.flat[0] + 1
                with pytest.raises(
                    GraphError, match=rf"backward of '\w+' needs was written to .* at {line}$"
                ):
                    gradients(y, leaves, dy, retain_graph=True)
                array[...] = before
        for g, h in zip(gradients(y, leaves, dy), expected, strict=True):
            np.testing.assert_array_equal(g, h)


# ---- faults as they happen ------------------------------------------------------------------------------------------

ZERO, ONE, INF = np.zeros((2, 3)), np.ones((2, 3)), np.full((2, 3), np.inf)
BIG = np.full((2, 3), 1e300)
Fault = tuple[Callable[..., Tensor], list[np.ndarray], str]
FORWARD: dict[str, Fault] = {  # the operation, what it is given, what is found first
    "log of a negative number": (ag.log, [-ONE], "NaN: the output of log"),
    "root of a negative number": (ag.sqrt, [-ONE], "NaN: the output of sqrt"),
    "0 / 0": (ag.div, [ZERO, ZERO], "NaN: the output of div"),
    "1 / 0": (ag.div, [ONE, ZERO], "infinity: the output of div"),
    "log of 0": (ag.log, [ZERO], "infinity: the output of log"),
    "exp of 1e300": (ag.exp, [BIG], "infinity: the output of exp"),
    "1e300 squared": (ag.mul, [BIG, BIG], "infinity: the output of mul"),
    "root of -1 as a power": (ag.power, [-ONE, ONE / 2], "NaN: the output of power"),
    "sum of 1e308": (lambda x: ag.sum(x * 1e8), [BIG], "infinity: the output of sum"),
    "a product that overflows": (ag.matmul, [BIG, BIG.T], "infinity: the output of matmul"),
    "a layer that overflows": (F.linear, [BIG, BIG], "infinity: the output of linear"),
    "an adapter that overflows": (
        functools.partial(F.lora_linear, scaling=1.0), [ONE, np.ones((2, 2)), BIG, np.full((2, 2), 1e10)],
        "infinity: the output of lora_linear"),
    "merged weights that are broken": (
        lambda x: effective_linear(x, EffectiveWeight(np.full((4, 3), np.nan), [(4, None, [])])), [ONE],
        "NaN: the output of effective_linear"),
    "a softmax of infinities": (F.softmax, [INF], "NaN: the output of softmax"),
    "infinity - infinity": (ag.sub, [INF, INF], "NaN: the output of sub"),
    "0 x infinity": (ag.mul, [ZERO, INF], "NaN: the output of mul"),
    "a gate at -infinity": (F.silu, [-INF], "NaN: the output of silu"),
    "a loss of infinite logits": (
        lambda z: F.cross_entropy(z, np.array([0, 1])), [INF], "NaN: the output of cross_entropy"),
    "a norm of infinities": (F.layer_norm, [INF, np.ones(3), np.ones(3)], "NaN: the output of layer_norm"),
    "attention to an infinite key": (
        lambda qkv: F.attention(qkv, 1, 1, np.ones((2, 4)), np.zeros((2, 4))),
        [np.array([[[1, 1, np.inf, np.inf, 1, 1]] * 2])], "NaN: the output of attention"),
}  # fmt: skip
BACKWARD: dict[str, Fault] = {  # finite forward; dy is 0 or 1
    "root at 0": (lambda x: ag.sqrt(x), [ZERO], "infinity: the gradient of input 0 of sqrt"),
    "root at 0 of nothing": (lambda x: ag.sqrt(x) * 0.0, [ZERO], "NaN: the gradient of input 0 of sqrt"),
    "|x| by way of a square": (lambda x: ag.sqrt(x * x), [ZERO], "infinity: the gradient of input 0 of sqrt"),
    "x^(1/2) at 0": (lambda x: ag.power(x, 0.5), [ZERO], "infinity: the gradient of input 0 of power"),
    "1 / x of a small x": (lambda x: ag.div(1e-300, x), [ONE * 1e-310], "infinity: the gradient of input 1 of div"),
    "a product of large factors": (
        lambda x, y: (x * y) * 1e300, [BIG, ZERO], "infinity: the gradient of input 1 of mul"),
    "paths that add up": (
        lambda x: (lambda y: y * 1.5e308 + y * 1.5e308)(x * 1.0), [ZERO],
        "infinity: the gradient that reached the output of mul"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_a_fault_going_forward_is_named(name: str) -> None:
    function, inputs, first = FORWARD[name]
    # An infinity that is given counts only where a NaN comes of it.
    infinities = all(np.isfinite(a).all() for a in inputs)
    for recorded in (True, False):
        found = pytest.raises(
            NonFiniteError, match=f"^first {first} .* of .* entries, made at test_anomaly.py"
        )
        with found as caught, detect_anomaly(infinities), np.errstate(all="ignore"):
            function(*(Tensor(a, recorded) for a in inputs))
        assert infinities != ("from numbers that were infinite" in str(caught.value))
    with np.errstate(all="ignore"):
        function(*map(Tensor, inputs))  # outside, nothing


@pytest.mark.parametrize("name", BACKWARD)
def test_a_fault_going_backward_is_named(name: str) -> None:
    function, inputs, first = BACKWARD[name]
    leaves = [Tensor(a, True) for a in inputs]
    with detect_anomaly(infinities=True), np.errstate(all="ignore"):
        y = function(*leaves)
        assert np.isfinite(y.data).all()
        with pytest.raises(
            NonFiniteError,
            match=f"^first {first} .* of 6 entries, which was called at test_anomaly",
        ):
            y.backward(np.ones(y.shape))
    assert all(x.grad is None for x in leaves)


def test_twenty_faults_and_more_are_seeded_by_hand() -> None:
    assert len(FORWARD) + len(BACKWARD) >= 20


def test_a_nan_in_dy_is_not_blamed_on_a_vjp() -> None:
    x = Tensor(np.ones(3), True)
    with detect_anomaly():
        y = x * 2.0
        with pytest.raises(
            NonFiniteError,
            match=r"the gradient that reached the output of mul \(3,\), given to backward",
        ):
            y.backward(np.array([1, np.nan, 1]))


# ---- where it is switched on ----------------------------------------------------------------------------------------


def test_it_nests_and_ends_with_its_block() -> None:
    bad = Tensor(-np.ones(1))
    with np.errstate(invalid="ignore"):
        with detect_anomaly():
            with detect_anomaly(infinities=True):
                pass
            with pytest.raises(NonFiniteError):
                ag.log(bad)
        assert observer.get() is None
        with pytest.raises(KeyError), detect_anomaly():
            raise KeyError
        assert observer.get() is None
        assert np.isnan(ag.log(bad).data)


def test_it_sees_what_is_not_recorded() -> None:
    with detect_anomaly(), no_grad(), pytest.raises(NonFiniteError, match="the output of log"):
        ag.log(Tensor(-np.ones(1), True))


def test_outside_the_mode_it_leaves_numpy_s_warnings_alone() -> None:
    with (
        detect_anomaly(),
        np.errstate(invalid="warn"),
        pytest.warns(RuntimeWarning),
        pytest.raises(NonFiniteError),
    ):
        ag.log(Tensor(-np.ones(1)))
    with pytest.warns(RuntimeWarning, match="invalid value"):
        ag.log(Tensor(-np.ones(1)))


# ---- a training step ------------------------------------------------------------------------------------------------

CONFIG = TransformerConfig(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=8,
)  # fmt: skip


def batch(sequences: int = 4, seed: int = 0) -> Batch:
    ids = np.random.default_rng(seed).integers(0, 17, (sequences, 7))
    return Batch(ids[:, :-1], ids[:, 1:])


def lora(dropout: float = 0.0) -> Any:
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    return get_peft_model(CausalLM(CONFIG, seed=1), config, seed=2)


def bits(model: Any) -> list[bytes]:
    return [p.data.tobytes() for p in model.parameters()]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside swiglu, the first of each row's numbers becomes a NaN."""
    real = F._sigmoid
    monkeypatch.setattr(
        F, "_sigmoid", lambda xp, x: np.where(np.arange(x.shape[-1]) == 0, np.nan, real(xp, x))
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_of_a_step_are_watched_too(threads: int, poisoned: None) -> None:
    model = lora()
    params = [p for p in model.parameters() if p.requires_grad]
    step = ShardedStep(model, threads, shard=1)
    with pytest.raises(NonFiniteError) as caught, step as sharded, detect_anomaly(model=model):
        sharded.gradients(batch(), params)
    assert re.search(
        r"^first NaN: the output of swiglu \(1, 6, 12\), 6 of 72 entries, made at transformer.py:\d+ "
        r"in model.model.layers.0.mlp$", str(caught.value))  # fmt: skip


def test_a_step_is_explained_and_nothing_changed(poisoned: None) -> None:
    model = lora(dropout=0.5).train()
    before = bits(model)
    calls = [m.calls for _, m in model.named_modules() if hasattr(m, "calls")]
    said = explain_non_finite(model, batch(), seed=3, step=4, shard=2)
    assert re.search(
        r"^first NaN: the output of swiglu \(2, 6, 12\), 12 of 144 entries, made at transformer",
        said,
    )
    assert bits(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert calls == [m.calls for _, m in model.named_modules() if hasattr(m, "calls")]
    assert all(
        not any(m._effective.values()) for _, m in model.named_modules() if hasattr(m, "_effective")
    )
    assert observer.get() is None


def put(model: Any, name: str, at: Any, value: float) -> None:
    parameter = dict(model.named_parameters())[name]
    changed = parameter.data.copy()
    changed[at] = value
    parameter.data = changed


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_were_broken_before_are_named(value: float) -> None:
    base = "base_model.model.model.layers.1.mlp.up_proj.base_layer.weight"
    for name, at, count in (
        ("base_model.model.model.embed_tokens.weight", 17, "8 of 160, all in row 17"),
        (base, (3, 2), "1 of 96, all in row 3"),
        (base, ([3, 4], 2), "2 of 96"),
        (base.replace("base_layer", "lora_B.default"), (1, 1), "1 of 24, all in row 1"),
        ("base_model.model.model.norm.weight", slice(2), "2 of 8"),
    ):
        model = lora()
        put(model, name, at, value)
        said = explain_non_finite(model, batch())
        assert said.startswith(
            f"before the step, values that are not finite were in {name} ({count})"
        )
        assert ("; first" in said) == (
            name == base
        )  # effective_linear was handed W + dW, and not told of W
    for p in model.parameters():
        p.data = np.full_like(p.data, value)
    said = explain_non_finite(model, batch())
    assert re.search(r"\(8 of 8\)|\(160 of 160\)", said)
    assert len(said) <= 500
    assert said.count(" of ") == 3
    assert f" and {len(list(model.parameters())) - 3} more" in said


def test_an_overflow_is_explained_by_the_operation_that_overflows() -> None:
    model = CausalLM(CONFIG, seed=1)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = np.full_like(weight.data, 3e38)
    said = explain_non_finite(model, batch())
    assert re.search(
        r"^first infinity: the output of effective_linear \(2, 2, 6, 12\), \d+ of 288 entries, made at transformer.py:"
        r"\d+ in model.layers.1.mlp$", said)  # fmt: skip


def test_a_sum_that_overflows_and_a_step_that_is_sound() -> None:
    model = CausalLM(CONFIG, seed=1)
    assert explain_non_finite(model, batch()).startswith("taken again, the step is finite")

    def huge(model: Any, shard: Batch) -> Tensor:
        return ag.add(language_modelling_loss(model, shard) * 0.0, 3e38)

    said = explain_non_finite(model, batch(), shard=1, loss=lambda m, b: huge(m, b) * 1.0)
    assert said.startswith("taken again")  # the sum of losses is a Python number, a float64

    def steep(model: Any, shard: Batch) -> Tensor:
        return (model.model.norm.weight.sum() - 7.5) * 2e38

    said = explain_non_finite(model, Batch(batch().ids, np.full((4, 6), -100)), shard=1, loss=steep)
    assert (
        said
        == "every operation gave finite values for finite inputs, and only their sum is not finite"
    )


def test_the_dropout_masks_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = lora(dropout=0.5).train(), []
    real = F.dropout
    monkeypatch.setattr(
        F,
        "dropout",
        lambda x, p, key, first: (seen.append((key, first)), real(x, p, key, first))[1],
    )
    params = [p for p in model.parameters() if p.requires_grad]
    with ShardedStep(model, 1, shard=3) as sharded:
        sharded.gradients(batch(), params, seed=5, step=6)
    first, seen[:] = list(seen), []
    explain_non_finite(model, batch(), seed=5, step=6, shard=3)
    assert seen == first
    seen.clear()
    explain_non_finite(model, batch(), seed=5, step=7, shard=3)
    assert seen != first


# ---- what it leaves behind ------------------------------------------------------------------------------------------


def test_no_cycle_after_an_error() -> None:
    x = Tensor(np.zeros(3), True)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            with np.errstate(all="ignore"), detect_anomaly():
                y = (ag.sqrt(x) * 0.0).sum()
                try:
                    y.backward()
                except NonFiniteError as error:
                    kept = str(error)
            del y
        assert "sqrt" in kept
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_thousand_steps_leak_nothing_inside() -> None:
    pytest.importorskip("resource")
    from test_autograd import LEAK

    run("from minilora.anomaly import detect_anomaly\nwith detect_anomaly():\n" + "\n".join(
        "    " + line for line in LEAK.strip().splitlines()))  # fmt: skip
