"""Anomaly mode finds the first NaN, and only that: each operation is broken, in both directions."""

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

from minilora import CausalLM, LoraConfig, TransformerConfig, effective, get_peft_model, losses
from minilora import attention as attention_operations
from minilora import autograd as ag
from minilora import functional as F
from minilora.anomaly import detect_anomaly
from minilora.autograd import Tensor, gradients, no_grad, observer
from minilora.data import Batch
from minilora.effective import EffectiveWeight, effective_linear
from minilora.errors import GraphError, NonFiniteError
from minilora.nn import Module
from minilora.training.nonfinite import explain_non_finite
from minilora.training.parallel import ShardedStep, language_modelling_loss

RECORDING = [op for op in TABLE if op.id != "dropout-p=0.0"]  # that one returns its input
EVERY = pytest.mark.parametrize("op", RECORDING, ids=lambda op: op.id)
# Operations made of others: the name of the last of them.
LAST = {"mean": "mul"}
HERE = Path(__file__).name
ENGINE_FILES = ("autograd.py", "attention.py", "losses.py", "functional.py", "effective.py", HERE)


def last_name(op: Operation) -> str:
    return LAST.get(op.name, op.name)


def call(op: Operation, *inputs: Tensor) -> tuple[Tensor, str]:
    """The operation's output, and a pattern of the line on which the messages say it was called."""
    y = op.function(*inputs)
    frame = inspect.currentframe()
    assert frame is not None
    line = frame.f_lineno - 3
    function = inspect.unwrap(getattr(op.function, "func", op.function))
    file = inspect.getsourcefile(function)
    if file is None or os.path.basename(file) not in ENGINE_FILES:
        return y, r"operations\.py:\d+"
    return y, rf"test_anomaly\.py:{line}\b"


# ---- nothing is found where nothing is wrong -----------------------------------------------------


@EVERY
def test_detect_anomaly_changes_no_bit(op: Operation) -> None:
    leaves = op.leaves()
    y = op.function(*leaves)
    dy = some_dy(y)
    output = y.data.copy()
    expected = gradients(y, leaves, dy)
    with detect_anomaly(infinities=True):
        y = op.function(*leaves)
        np.testing.assert_array_equal(y.data, output)
        first = gradients(y, leaves, dy, retain_graph=True)
        second = gradients(y, leaves, dy)
    for one, other, g in zip(first, second, expected, strict=True):
        np.testing.assert_array_equal(one, g)
        np.testing.assert_array_equal(other, g)
    assert observer.get() is None


@EVERY
def test_detect_anomaly_blames_no_operation_for_a_nan_in_its_input(op: Operation) -> None:
    for i, a in enumerate(op.inputs):
        if a.size:
            leaves = op.leaves()
            leaves[i] = Tensor(np.full_like(a, np.nan), True)
            with detect_anomaly(infinities=True), np.errstate(all="ignore"):
                y = ag.mul(op.function(*leaves), 2.0)
                gradients(y, leaves, some_dy(y))


# ---- what is seeded is found ---------------------------------------------------------------------


def sabotage(
    monkeypatch: pytest.MonkeyPatch, op: Operation, change: Callable[..., tuple[Any, Any]]
) -> None:
    """Let an operation hand `record` what `change(data, vjp)` makes of its output and its vjp.

    An operation made of others records several times: then only the last is changed.
    """
    real = ag.record
    last = len(list(graph(op.function(*op.leaves()))))
    calls = itertools.count(1)

    def record(data: Any, inputs: tuple[Tensor, ...], vjp: Any) -> Tensor:
        if any(t.requires_grad for t in inputs) and next(calls) == last:
            data, vjp = change(data, vjp)
        return real(data, inputs, vjp)

    # Its frame must look like one of the engine, not of this test.
    names = {**globals(), "__name__": "minilora.autograd"}
    of_engine = types.FunctionType(record.__code__, names, closure=record.__closure__)
    for module in (ag, attention_operations, losses, F, effective):
        monkeypatch.setattr(module, "record", of_engine)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_detect_anomaly_names_the_operation_shape_and_line_of_a_seeded_output(
    op: Operation, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = op.leaves()
    shape = op.function(*leaves).shape
    if 0 in shape:
        return  # no element can be a NaN
    is_infinite = bool(np.isinf(bad))

    def change(data: Any, vjp: Any) -> tuple[Any, Any]:
        data = np.array(data)
        data.flat[-1] = bad
        return data, vjp

    _, line = call(op, *leaves)
    sabotage(monkeypatch, op, change)
    with pytest.raises(NonFiniteError) as caught, detect_anomaly(infinities=is_infinite):
        call(op, *leaves)
    message = str(caught.value)
    kind = "infinity" if is_infinite else "NaN"
    size = np.prod(shape, dtype=int)
    what = re.escape(f"first {kind}: the output of {last_name(op)} {shape}, 1 of {size} entries")
    assert re.search(f"^{what}, made at {line}$", message), message
    if is_infinite:
        sabotage(monkeypatch, op, change)
        with detect_anomaly():
            op.function(*leaves)  # an infinity is not a NaN


@EVERY
def test_detect_anomaly_names_the_operation_input_and_line_of_a_seeded_gradient(
    op: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = op.leaves()
    probe = op.function(*leaves)
    assert probe.node is not None
    dy = some_dy(probe)
    for i in range(len(probe.node.vjp(dy))):

        def change(data: Any, vjp: Any, i: int = i) -> tuple[Any, Any]:
            @functools.wraps(vjp)
            def broken(dz: Any) -> Any:
                grads = [g if g is None else np.array(g) for g in vjp(dz)]
                if grads[i] is not None and grads[i].size:
                    grads[i].flat[0] = np.nan
                return tuple(grads)

            return data, broken

        g = probe.node.vjp(dy)[i]
        with monkeypatch.context() as patch:
            sabotage(patch, op, change)
            with detect_anomaly():
                y, line = call(op, *leaves)
                if g is None or not g.size or probe.node.parents[i] is None:
                    gradients(y, leaves, dy)
                    continue
                with pytest.raises(NonFiniteError) as caught:
                    gradients(y, leaves, dy)
        message = str(caught.value)
        what = f"the gradient of input {i} of {last_name(op)} {g.shape}, 1 of {g.size} entries"
        pattern = f"^first NaN: {re.escape(what)}, which was called at {line}$"
        assert re.search(pattern, message), message


@EVERY
def test_detect_anomaly_names_the_operation_whose_kept_array_was_written_to(op: Operation) -> None:
    with detect_anomaly():
        leaves = op.leaves()
        y, line = call(op, *leaves)
        message = rf"backward of '\w+' needs was written to .* at {line}$"
        dy = some_dy(y)
        expected = gradients(y, leaves, dy, retain_graph=True)
        for node in graph(y):
            arrays = {id(a): a for a in captured(node.vjp) if isinstance(a, np.ndarray)}
            for array in arrays.values():
                if not array.flags.writeable or not array.size:
                    continue
                before = array.copy()
                first = array.flat[0]
                array.flat[0] = not first if array.dtype == bool else first + 1
                with pytest.raises(GraphError, match=message):
                    gradients(y, leaves, dy, retain_graph=True)
                array[...] = before
        for g, other in zip(gradients(y, leaves, dy), expected, strict=True):
            np.testing.assert_array_equal(g, other)


# ---- faults as they happen -----------------------------------------------------------------------

ZERO = np.zeros((2, 3))
ONE = np.ones((2, 3))
INF = np.full((2, 3), np.inf)
BIG = np.full((2, 3), 1e300)
SMALL = np.full((2, 3), 1e-310)
BROKEN = EffectiveWeight(np.full((4, 3), np.nan), [(4, None, [])])
ADAPTER = [ONE, np.ones((2, 2)), BIG, np.full((2, 2), 1e10)]
QKV = np.array([[[1, 1, np.inf, np.inf, 1, 1]] * 2])


def attention(qkv: Tensor) -> Tensor:
    return F.attention(qkv, 1, 1, np.ones((2, 4)), np.zeros((2, 4)))


def add_large(x: Tensor) -> Tensor:
    y = x * 1.0
    return y * 1.5e308 + y * 1.5e308


Fault = tuple[Callable[..., Tensor], list[np.ndarray], str]
# The operation, its inputs, the first anomaly.
FORWARD: dict[str, Fault] = {}
FORWARD["log of a negative number"] = ag.log, [-ONE], "NaN: the output of log"
FORWARD["root of a negative number"] = ag.sqrt, [-ONE], "NaN: the output of sqrt"
FORWARD["0 / 0"] = ag.div, [ZERO, ZERO], "NaN: the output of div"
FORWARD["1 / 0"] = ag.div, [ONE, ZERO], "infinity: the output of div"
FORWARD["log of 0"] = ag.log, [ZERO], "infinity: the output of log"
FORWARD["exp of 1e300"] = ag.exp, [BIG], "infinity: the output of exp"
FORWARD["1e300 squared"] = ag.mul, [BIG, BIG], "infinity: the output of mul"
FORWARD["root of -1 as a power"] = ag.power, [-ONE, ONE / 2], "NaN: the output of power"
FORWARD["sum of 1e308"] = lambda x: ag.sum(x * 1e8), [BIG], "infinity: the output of sum"
FORWARD["matmul that overflows"] = ag.matmul, [BIG, BIG.T], "infinity: the output of matmul"
FORWARD["linear that overflows"] = F.linear, [BIG, BIG], "infinity: the output of linear"
FORWARD["adapter that overflows"] = (
    functools.partial(F.lora_linear, scaling=1.0), ADAPTER, "infinity: the output of lora_linear"
)  # fmt: skip
FORWARD["broken merged weights"] = (
    lambda x: effective_linear(x, BROKEN), [ONE], "NaN: the output of effective_linear"
)  # fmt: skip
FORWARD["softmax of infinities"] = F.softmax, [INF], "NaN: the output of softmax"
FORWARD["infinity - infinity"] = ag.sub, [INF, INF], "NaN: the output of sub"
FORWARD["0 x infinity"] = ag.mul, [ZERO, INF], "NaN: the output of mul"
FORWARD["gate at -infinity"] = F.silu, [-INF], "NaN: the output of silu"
FORWARD["loss of infinite logits"] = (
    lambda z: F.cross_entropy(z, np.array([0, 1])), [INF], "NaN: the output of cross_entropy"
)  # fmt: skip
FORWARD["norm of infinities"] = (
    F.layer_norm, [INF, np.ones(3), np.ones(3)], "NaN: the output of layer_norm"
)  # fmt: skip
FORWARD["attention to an infinite key"] = attention, [QKV], "NaN: the output of attention"

# Finite forward; dy is 1.
ROOT = "the gradient of input 0 of sqrt"
BACKWARD: dict[str, Fault] = {}
BACKWARD["root at 0"] = lambda x: ag.sqrt(x), [ZERO], f"infinity: {ROOT}"
BACKWARD["0 times root at 0"] = lambda x: ag.sqrt(x) * 0.0, [ZERO], f"NaN: {ROOT}"
BACKWARD["|x| as the root of a square"] = lambda x: ag.sqrt(x * x), [ZERO], f"infinity: {ROOT}"
BACKWARD["x^(1/2) at 0"] = (
    lambda x: ag.power(x, 0.5), [ZERO], "infinity: the gradient of input 0 of power"
)  # fmt: skip
BACKWARD["1 / x of a small x"] = (
    lambda x: ag.div(1e-300, x), [SMALL], "infinity: the gradient of input 1 of div"
)  # fmt: skip
BACKWARD["product of large factors"] = (
    lambda x, y: (x * y) * 1e300, [BIG, ZERO], "infinity: the gradient of input 1 of mul"
)  # fmt: skip
BACKWARD["paths that add up"] = (
    add_large, [ZERO], "infinity: the gradient that reached the output of mul"
)  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_detect_anomaly_names_a_fault_going_forward(name: str) -> None:
    function, inputs, first = FORWARD[name]
    message = f"^first {first} .* of .* entries, made at test_anomaly.py"
    # An infinity among the inputs counts only if it leads to a NaN.
    infinities = all(np.isfinite(a).all() for a in inputs)
    for recorded in (True, False):
        leaves = [Tensor(a, recorded) for a in inputs]
        error = pytest.raises(NonFiniteError, match=message)
        with error as caught, detect_anomaly(infinities), np.errstate(all="ignore"):
            function(*leaves)
        from_infinite = "from numbers that were infinite" in str(caught.value)
        assert from_infinite == (not infinities)
    with np.errstate(all="ignore"):
        function(*map(Tensor, inputs))  # outside, no error


@pytest.mark.parametrize("name", BACKWARD)
def test_detect_anomaly_names_a_fault_going_backward(name: str) -> None:
    function, inputs, first = BACKWARD[name]
    message = f"^first {first} .* of 6 entries, which was called at test_anomaly"
    leaves = [Tensor(a, True) for a in inputs]
    with detect_anomaly(infinities=True), np.errstate(all="ignore"):
        y = function(*leaves)
        assert np.isfinite(y.data).all()
        with pytest.raises(NonFiniteError, match=message):
            y.backward(np.ones(y.shape))
    for x in leaves:
        assert x.grad is None


def test_detect_anomaly_is_tested_with_twenty_faults_and_more() -> None:
    assert len(FORWARD) + len(BACKWARD) >= 20


def test_detect_anomaly_does_not_blame_a_vjp_for_a_nan_in_dy() -> None:
    x = Tensor(np.ones(3), True)
    message = r"the gradient that reached the output of mul \(3,\), given to backward"
    with detect_anomaly():
        y = x * 2.0
        with pytest.raises(NonFiniteError, match=message):
            y.backward(np.array([1, np.nan, 1]))


# ---- where it is switched on ---------------------------------------------------------------------


def test_detect_anomaly_nests_and_ends_with_its_block() -> None:
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


def test_detect_anomaly_sees_what_is_not_recorded() -> None:
    with detect_anomaly(), no_grad(), pytest.raises(NonFiniteError, match="the output of log"):
        ag.log(Tensor(-np.ones(1), True))


def test_detect_anomaly_leaves_numpy_s_warnings_alone_outside() -> None:
    bad = Tensor(-np.ones(1))
    warning = pytest.warns(RuntimeWarning)
    error = pytest.raises(NonFiniteError)
    with detect_anomaly(), np.errstate(invalid="warn"), warning, error:
        ag.log(bad)
    with pytest.warns(RuntimeWarning, match="invalid value"):
        ag.log(bad)


def logarithm(x: Tensor) -> Tensor:
    return ag.log(x)


class Logarithm(Module):
    def __call__(self, x: Tensor) -> Tensor:
        return logarithm(x)


def test_detect_anomaly_names_the_module_although_a_function_called_the_operation() -> None:
    model = Module()
    model.inner = Logarithm()
    message = r"made at test_anomaly.py:\d+ in inner$"
    with detect_anomaly(model=model), pytest.raises(NonFiniteError, match=message):
        model.inner(Tensor(-np.ones(1)))


# ---- a training step -----------------------------------------------------------------------------

CONFIG = TransformerConfig(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=8,
)  # fmt: skip


def batch() -> Batch:
    ids = np.random.default_rng(0).integers(0, 17, (4, 7))
    return Batch(ids[:, :-1], ids[:, 1:])


def lora(dropout: float = 0.0) -> Any:
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    return get_peft_model(CausalLM(CONFIG, seed=1), config, seed=2)


def trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def bits(model: Any) -> list[bytes]:
    return [p.data.tobytes() for p in model.parameters()]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside swiglu, the first number of each row becomes a NaN."""
    real = F._sigmoid

    def broken(xp: Any, x: Any) -> Any:
        return np.where(np.arange(x.shape[-1]) == 0, np.nan, real(xp, x))

    monkeypatch.setattr(F, "_sigmoid", broken)


@pytest.mark.parametrize("threads", [1, 2])
def test_detect_anomaly_watches_the_threads_of_a_step(threads: int, poisoned: None) -> None:
    model = lora()
    step = ShardedStep(model, threads, shard=1)
    with pytest.raises(NonFiniteError) as caught, step as sharded, detect_anomaly(model=model):
        sharded.gradients(batch(), trainable(model))
    what = r"^first NaN: the output of swiglu \(1, 6, 12\), 6 of 72 entries"
    where = r"made at transformer.py:\d+ in model.model.layers.0.mlp$"
    assert re.search(f"{what}, {where}", str(caught.value))


def test_explain_non_finite_changes_nothing(poisoned: None) -> None:
    model = lora(dropout=0.5).train()
    modules = [module for _, module in model.named_modules()]
    dropouts = [module for module in modules if hasattr(module, "calls")]
    before = bits(model)
    calls = [module.calls for module in dropouts]
    text = explain_non_finite(model, batch(), seed=3, step=4, shard=2)
    what = r"^first NaN: the output of swiglu \(2, 6, 12\), 12 of 144 entries"
    assert re.search(f"{what}, made at transformer", text)
    assert bits(model) == before
    assert [module.calls for module in dropouts] == calls
    for p in model.parameters():
        assert p.grad is None
    for module in modules:
        if hasattr(module, "_effective"):
            assert not any(module._effective.values())
    assert observer.get() is None


UP = "base_model.model.model.layers.1.mlp.up_proj."
BROKEN_PARAMETERS: list[tuple[str, Any, str]] = []  # name, index, the words of the message
BROKEN_PARAMETERS.append(
    ("base_model.model.model.embed_tokens.weight", 17, "8 of 160, all in row 17")
)
BROKEN_PARAMETERS.append((UP + "base_layer.weight", (3, 2), "1 of 96, all in row 3"))
BROKEN_PARAMETERS.append((UP + "base_layer.weight", ([3, 4], 2), "2 of 96"))
BROKEN_PARAMETERS.append((UP + "lora_B.default.weight", (1, 1), "1 of 24, all in row 1"))
BROKEN_PARAMETERS.append(("base_model.model.model.norm.weight", slice(2), "2 of 8"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "index", "words"), BROKEN_PARAMETERS)
def test_explain_non_finite_names_a_parameter_that_was_broken_before(
    name: str, index: Any, words: str, value: float
) -> None:
    model = lora()
    parameter = dict(model.named_parameters())[name]
    broken = parameter.data.copy()
    broken[index] = value
    parameter.data = broken
    text = explain_non_finite(model, batch())
    assert text.startswith(f"before the step, values that are not finite were in {name} ({words})")
    # effective_linear reads W + dW, so the operation did not see that W was broken.
    assert ("; first" in text) == ("base_layer" in name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_explain_non_finite_names_three_broken_parameters_at_most(value: float) -> None:
    model = lora()
    parameters = list(model.parameters())
    for p in parameters:
        p.data = np.full_like(p.data, value)
    text = explain_non_finite(model, batch())
    assert re.search(r"\(8 of 8\)|\(160 of 160\)", text)
    assert len(text) <= 500
    assert text.count(" of ") == 3
    assert f" and {len(parameters) - 3} more" in text


def test_explain_non_finite_names_the_operation_that_overflows() -> None:
    model = CausalLM(CONFIG, seed=1)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = np.full_like(weight.data, 3e38)
    text = explain_non_finite(model, batch())
    what = r"^first infinity: the output of effective_linear \(2, 2, 6, 12\), \d+ of 288 entries"
    assert re.search(rf"{what}, made at transformer.py:\d+ in model.layers.1.mlp$", text)


def test_explain_non_finite_says_that_a_sound_step_is_finite() -> None:
    model = CausalLM(CONFIG, seed=1)
    assert explain_non_finite(model, batch()).startswith("taken again, the step is finite")

    def huge(model: Any, shard: Batch) -> Tensor:
        return ag.add(language_modelling_loss(model, shard) * 0.0, 3e38) * 1.0

    # The sum of losses is a Python number, a float64.
    text = explain_non_finite(model, batch(), shard=1, loss=huge)
    assert text.startswith("taken again")


def test_explain_non_finite_says_that_only_a_sum_overflows() -> None:
    model = CausalLM(CONFIG, seed=1)

    def steep(model: Any, shard: Batch) -> Tensor:
        return (model.model.norm.weight.sum() - 7.5) * 2e38

    ignored = Batch(batch().ids, np.full((4, 6), -100))
    text = explain_non_finite(model, ignored, shard=1, loss=steep)
    assert text == (
        "every operation gave finite values for finite inputs, and only their sum is not finite"
    )


def test_explain_non_finite_uses_the_dropout_masks_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lora(dropout=0.5).train()
    real = F.dropout
    seen: list[tuple[int, int]] = []

    def dropout(x: Tensor, p: float, key: int, first: int, start: int) -> Tensor:
        seen.append((key, first))
        return real(x, p, key, first, start=start)

    monkeypatch.setattr(F, "dropout", dropout)
    with ShardedStep(model, 1, shard=3) as sharded:
        sharded.gradients(batch(), trainable(model), seed=5, step=6)
    of_step = seen.copy()
    seen.clear()
    explain_non_finite(model, batch(), seed=5, step=6, shard=3)
    assert seen == of_step
    seen.clear()
    explain_non_finite(model, batch(), seed=5, step=7, shard=3)
    assert seen != of_step


# ---- what it leaves behind -----------------------------------------------------------------------


def test_detect_anomaly_leaves_no_cycle_after_an_error() -> None:
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
                    message = str(error)
            del y
        assert "sqrt" in message
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_detect_anomaly_leaks_nothing_in_a_thousand_steps() -> None:
    pytest.importorskip("resource")
    from test_autograd import LEAK

    lines = ["from minilora.anomaly import detect_anomaly", "with detect_anomaly():"]
    for line in LEAK.strip().splitlines():
        lines.append(f"    {line}")
    run("\n".join(lines))
