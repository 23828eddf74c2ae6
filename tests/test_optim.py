"""minilora/optim.py against scalar arithmetic written out again, against PyTorch, and against its
documented behaviour."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import optim
from minilora.autograd import Tensor
from minilora.errors import CheckpointError, ConfigError
from minilora.nn import Linear, Parameter

SHAPES = [(3, 4), (5,), (), (2, 0)]
SEEDS = st.integers(0, 10**6)
FLOATS = st.sampled_from([np.float32, np.float64])
NAN = math.nan
INF = math.inf


def parameters(dtype=np.float64):
    rng = np.random.default_rng(0)
    named = []
    for i, shape in enumerate(SHAPES):
        value = np.array(rng.normal(size=shape), dtype)
        named.append((f"layer.{i}.weight", Parameter(value)))
    return named


def gradients(step, dtype=np.float64, missing=()):
    rng = np.random.default_rng([1, step])
    grads = []
    for i, shape in enumerate(SHAPES):
        g = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3)
        grads.append(None if i in missing else np.array(g, dtype))
    return grads


def values(named):
    return [p.data.tobytes() for _, p in named]


def array_bits(arrays):
    return {key: array.tobytes() for key, array in arrays.items()}


# ---- the update ----------------------------------------------------------------------------------

ADAMW_OPTIONS = {}
ADAMW_OPTIONS["lr"] = st.floats(1e-4, 0.3)
ADAMW_OPTIONS["b1"] = st.floats(0, 0.99)
ADAMW_OPTIONS["b2"] = st.floats(0.5, 0.9999)
ADAMW_OPTIONS["eps"] = st.floats(1e-8, 1e-2)
ADAMW_OPTIONS["decay"] = st.floats(0, 0.5)


@given(seed=SEEDS, **ADAMW_OPTIONS)
def test_adamw_is_the_published_algorithm(lr, b1, b2, eps, decay, seed):
    x, m, v = 0.7, 0.0, 0.0
    p = Parameter(np.array([x]))
    optimizer = optim.AdamW([p], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    rng = np.random.default_rng(seed)
    travelled = 1.0
    for t in range(1, 21):
        g = float(rng.normal())
        scale = float(rng.uniform(0.1, 1))
        optimizer.step([np.array([g])], scale=scale)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        move = m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + eps)
        x = x - lr * scale * decay * x - lr * scale * move
        travelled += abs(lr * move)
    assert abs(p.data[0] - x) <= 1e-12 * travelled


def test_adamw_stays_equal_over_a_thousand_steps():
    rng = np.random.default_rng(0)
    start = rng.normal(size=7)
    drawn = rng.normal(size=(1000, 7)) * np.logspace(-3, 3, 7)
    p = Parameter(start.copy())
    optimizer = optim.AdamW([p], lr=0.01, weight_decay=0.1)
    for g in drawn:
        optimizer.step([g])
    for i in range(7):
        x = float(start[i])
        m = v = 0.0
        for t, g in enumerate(map(float, drawn[:, i]), 1):
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            root = math.sqrt(v / (1 - 0.999**t))
            x = (1 - 0.001) * x - 0.01 * (m / (1 - 0.9**t)) / (root + 1e-8)
        assert p.data[i] == pytest.approx(x, rel=1e-12, abs=1e-12)


def test_adamw_first_step_is_the_sign_of_the_gradient():
    g = np.array([1e-3, -5.0, 40.0])
    p = Parameter(np.zeros(3))
    optimizer = optim.AdamW([p], lr=0.5, eps=0.0, weight_decay=0.0)
    optimizer.step([g])
    np.testing.assert_allclose(p.data, -0.5 * np.sign(g), rtol=1e-14)


@given(momentum=st.floats(0, 0.99), decay=st.floats(0, 0.5), seed=SEEDS)
def test_sgd_is_the_published_algorithm(momentum, decay, seed):
    x, u = -1.3, 0.0
    p = Parameter(np.array(x))
    optimizer = optim.SGD([p], lr=0.05, momentum=momentum, weight_decay=decay)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        g = float(rng.normal())
        optimizer.step([np.array(g)])
        u = momentum * u + g + decay * x
        x -= 0.05 * u
    assert p.data == pytest.approx(x, rel=1e-12, abs=1e-12)


TORCH_OPTIONS = []
TORCH_OPTIONS.append(("AdamW", {"lr": 3e-3}))
TORCH_OPTIONS.append(("AdamW", {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.3}))
TORCH_OPTIONS.append(("SGD", {"lr": 0.01}))
TORCH_OPTIONS.append(("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}))


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "options"), TORCH_OPTIONS)
def test_optimizers_equal_torch_over_two_hundred_steps(kind, options):
    torch = pytest.importorskip("torch")
    ours = parameters()
    theirs = [torch.nn.Parameter(torch.tensor(p.data.copy())) for _, p in ours]
    mine = getattr(optim, kind)(ours, **options)
    other = getattr(torch.optim, kind)(theirs, **options)
    for step in range(200):
        grads = gradients(step, missing=(1,) if step % 3 == 0 else ())
        mine.step(grads)
        for q, g in zip(theirs, grads, strict=True):
            q.grad = None if g is None else torch.tensor(g)
        other.step()
        for (_, p), q in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-12, atol=1e-13)


DOUBLE_LR = {"lr": np.float64(0.1)}
DOUBLE_OTHERS = {"lr": 0.1, "momentum": np.float64(0.9), "weight_decay": np.float64(0.1)}
DOUBLES = [(optim.AdamW, DOUBLE_LR), (optim.SGD, DOUBLE_OTHERS), (optim.SGD, {"lr": 0.1})]


@pytest.mark.parametrize(("kind", "options"), DOUBLES)
@pytest.mark.parametrize("gradient_dtype", [np.float32, np.float64])
def test_step_keeps_float32_in_the_same_storage(kind, options, gradient_dtype):
    named = parameters(np.float32)
    storage = [p.data for _, p in named]
    optimizer = kind(named, **options)
    for step in range(2):
        grads = gradients(step, gradient_dtype)
        before = [g.copy() for g in grads]
        optimizer.step(grads, scale=np.float64(0.5))
        for g, old in zip(grads, before, strict=True):
            assert np.array_equal(g, old), "the caller's gradients changed"
    for (_, p), array in zip(named, storage, strict=True):
        assert p.data is array
        assert p.version == [2]
    arrays, _ = optimizer.state_dict()
    for array in arrays.values():
        assert array.dtype == np.float32


def test_adamw_in_float32_follows_float64():
    narrow = parameters(np.float32)
    wide = parameters(np.float64)
    for (_, p), (_, q) in zip(narrow, wide, strict=True):
        q.data = p.data.astype(np.float64)
    one = optim.AdamW(narrow)
    two = optim.AdamW(wide)
    for step in range(50):
        grads = gradients(step, np.float32)
        one.step(grads)
        two.step(grads)
    for (_, p), (_, q) in zip(narrow, wide, strict=True):
        bound = 50 * 2.0**-23 * (1 + np.abs(q.data))
        assert np.all(np.abs(p.data - q.data) <= bound)


# ---- which parameters ----------------------------------------------------------------------------

MOMENTUM = [(optim.AdamW, {}), (optim.SGD, {"momentum": 0.9})]


@pytest.mark.parametrize(("kind", "options"), MOMENTUM)
def test_step_leaves_a_parameter_without_a_gradient_as_it_was(kind, options):
    named = parameters()
    _, second = named[1]
    optimizer = kind(named, lr=0.1, weight_decay=0.1, **options)
    optimizer.step(gradients(0))
    value = second.data.copy()
    arrays, numbers = optimizer.state_dict()
    optimizer.step(gradients(1, missing=(1,)))
    after, later = optimizer.state_dict()
    assert np.array_equal(second.data, value)
    for key, array in arrays.items():
        if array.size:
            is_second = key.endswith(".layer.1.weight")
            assert np.array_equal(after[key], array) == is_second
    assert set(numbers["steps"].values()) == {1}
    assert later["steps"] == {name: 2 - (name == "layer.1.weight") for name, _ in named}
    # When its gradient returns, it continues as if the step without it had not happened.
    _, start = parameters()[1]
    alone = Parameter(start.data)
    other = kind([alone], lr=0.1, weight_decay=0.1, **options)
    for step in (0, 2):
        other.step([gradients(step)[1]])
    optimizer.step(gradients(2))
    assert np.array_equal(second.data, alone.data)


def test_step_uses_p_grad_and_zero_grad_clears_it():
    named = parameters()
    again = parameters()
    optimizer = optim.AdamW([p for _, p in named])
    for (_, p), g in zip(named, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    other = optim.AdamW([p for _, p in again])
    other.step(gradients(0))
    assert values(named) == values(again)
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in named)
    optimizer.step()
    assert values(named) == values(again)


def test_adamw_and_sgd_have_pytorch_s_defaults():
    p = Parameter(np.ones(2))
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    assert optim.AdamW([p]).groups == [defaults]
    assert optim.SGD([p], 1.0).groups == [{"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}]


def test_schedules_without_options_are_flat_or_fall_to_zero():
    assert [optim.constant(step) for step in (0, 1, 9)] == [1.0, 1.0, 1.0]
    falling = [optim.warmup_cosine(step, 9) for step in (0, 4, 8, 9)]
    assert falling == [1.0, pytest.approx(0.5, rel=1e-15), 0.0, 0.0]


def test_optimizer_groups_override_the_defaults_and_scale_multiplies_all():
    a = Parameter(np.ones(2))
    b = Parameter(np.ones(2))
    optimizer = optim.SGD([{"params": [a]}, {"params": [("b", b)], "lr": 0.5}], lr=0.25)
    assert [group["lr"] for group in optimizer.groups] == [0.25, 0.5]
    assert [group["momentum"] for group in optimizer.groups] == [0.0, 0.0]
    optimizer.step([np.ones(2), np.ones(2)], scale=0.5)
    assert a.data.tolist() == [0.875, 0.875]
    assert b.data.tolist() == [0.75, 0.75]
    optimizer.groups[0]["lr"] = 1.0
    optimizer.step([np.ones(2), None])
    assert a.data.tolist() == [-0.125, -0.125]
    _, numbers = optimizer.state_dict()
    assert numbers["steps"] == {"0": 2, "b": 1}


def test_optimizer_group_may_override_everything_and_parameters_may_be_many():
    options = {"lr": 0.5, "betas": (0.5, 0.5), "eps": 0.25, "weight_decay": 0.0}
    assert optim.AdamW([{"params": parameters(), **options}]).groups == [options]
    many = [Parameter(np.zeros(1)) for _ in range(300)]
    optimizer = optim.SGD(many, 1.0)
    optimizer.step([np.ones(1)] * 300)
    for p in many:
        assert p.data[0] == -1


def test_sgd_has_momentum_only_in_groups_with_momentum():
    a = Parameter(np.ones(1))
    b = Parameter(np.ones(1))
    optimizer = optim.SGD([{"params": [a], "momentum": 0.5}, {"params": [b]}], lr=1.0)
    for _ in range(2):
        optimizer.step([np.ones(1), np.ones(1)])
    assert a.data[0] == 1 - 1 - 1.5
    assert b.data[0] == 1 - 1 - 1


INVALID = []
for value in (0, -1e-3, NAN, INF, "0.1", None, True):
    INVALID.append(("lr", value))
for value in ((1.0, 0.9), (0.9, 1.5), (-0.1, 0.9), (NAN, 0.9), (0.9,), (0.9, 0.9, 0.9), 0.9, "ab"):
    INVALID.append(("betas", value))
for value in (-1e-9, NAN, INF):
    INVALID.append(("eps", value))
for value in (-0.1, NAN, INF):
    INVALID.append(("weight_decay", value))


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_adamw_refuses_invalid_hyper_parameters(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be .*, got "):
        optim.AdamW(parameters(), **{name: value})
    with pytest.raises(ConfigError, match=f"^{name} must be .*, got "):
        optim.AdamW([{"params": parameters(), name: value}])


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, NAN])
def test_sgd_refuses_momentum_outside_its_range(momentum):
    with pytest.raises(ConfigError, match="momentum"):
        optim.SGD(parameters(), 0.1, momentum=momentum)


P = Parameter(np.ones(1))
Q = Parameter(np.ones(1))
BAD_PARAMS = []
BAD_PARAMS.append(("no parameters", []))
BAD_PARAMS.append(("no parameters", [{"params": []}]))
BAD_PARAMS.append(("twice", [P, P]))
BAD_PARAMS.append(("twice", [("x", P), ("x", Q)]))
BAD_PARAMS.append(("twice", [{"params": [P]}, {"params": [P]}]))
BAD_PARAMS.append(("expected groups", [{"params": [P]}, Q]))
BAD_PARAMS.append(("expected groups", [{"params": [P]}, None]))
BAD_PARAMS.append(("expected groups", [{"params": [P], "learning_rate": 1}]))
BAD_PARAMS.append(("expected groups", [{"lr": 1}]))


@pytest.mark.parametrize(("message", "params"), BAD_PARAMS)
def test_optimizer_refuses_invalid_parameters(message, params):
    with pytest.raises(ConfigError, match=message):
        optim.AdamW(params)


WRONG_GRADIENTS = []
WRONG_GRADIENTS.append(("", [np.ones(2)]))
WRONG_GRADIENTS.append(("", [np.ones(2), None, None]))
WRONG_GRADIENTS.append(("second", [np.ones(2), np.ones((1, 3))]))
WRONG_GRADIENTS.append(("second", [None, np.ones(4)]))


@pytest.mark.parametrize(("name", "grads"), WRONG_GRADIENTS)
def test_step_changes_nothing_if_a_gradient_does_not_fit(name, grads):
    a = Parameter(np.ones(2))
    b = Parameter(np.ones(3))
    optimizer = optim.AdamW([a, ("second", b)])
    with pytest.raises(ConfigError, match=f"{len(grads)} gradients for 2 parameters.*{name}"):
        optimizer.step(grads)
    arrays, _ = optimizer.state_dict()
    assert a.data.tolist() == [1, 1]
    assert arrays == {}


# ---- the state -----------------------------------------------------------------------------------

KINDS = {
    "adamw": (optim.AdamW, {}),
    "sgd": (optim.SGD, {"momentum": 0.9}),
    "plain": (optim.SGD, {}),
}


def make(kind, named):
    optimizer, options = KINDS[kind]
    return optimizer(named, lr=0.1, **options)


@pytest.mark.parametrize("kind", KINDS)
@given(cut=st.integers(0, 4), missing=st.sets(st.integers(0, 3)), dtype=FLOATS)
def test_load_state_dict_continues_the_same_run(kind, cut, missing, dtype):
    straight = parameters(dtype)
    whole = make(kind, straight)
    for step in range(cut):
        whole.step(gradients(step, dtype, missing))
    arrays, numbers = whole.state_dict()
    numbers = json.loads(json.dumps(numbers))  # as a checkpoint stores them
    resumed = [(name, Parameter(p.data.copy())) for name, p in straight]
    rest = make(kind, resumed)
    rest.step(gradients(99, dtype))  # loading forgets this step
    for (_, p), (_, q) in zip(straight, resumed, strict=True):
        q.data = p.data
    rest.load_state_dict(arrays, numbers)
    for step in range(cut, 5):
        whole.step(gradients(step, dtype))
        rest.step(gradients(step, dtype))
    assert values(straight) == values(resumed)
    one, counts = whole.state_dict()
    two, other_counts = rest.state_dict()
    assert counts == other_counts
    assert array_bits(one) == array_bits(two)


def test_state_dict_copies_and_so_does_load_state_dict():
    optimizer = optim.AdamW(parameters())
    optimizer.step(gradients(0))
    arrays, numbers = optimizer.state_dict()
    before = array_bits(arrays)
    optimizer.step(gradients(1))
    assert array_bits(arrays) == before
    optimizer.load_state_dict(arrays, numbers)
    optimizer.step(gradients(1))
    assert array_bits(arrays) == before


class State:
    """An optimiser after one step in which the last parameter had no gradient, and its state."""

    def __init__(self):
        self.optimizer = optim.AdamW(parameters())
        self.optimizer.step(gradients(0, missing=(3,)))
        self.arrays, self.numbers = self.optimizer.state_dict()

    def refuses(self, arrays, numbers, *words):
        """load_state_dict refuses these, and its message contains the words."""
        with pytest.raises(CheckpointError) as caught:
            self.optimizer.load_state_dict(arrays, numbers)
        message = str(caught.value)
        assert len(message) <= 500
        for word in words:
            assert word in message
        _, numbers = self.optimizer.state_dict()
        assert numbers == self.numbers

    def refuses_arrays(self, changes, *words):
        arrays = {**self.arrays, **changes}
        present = {key: array for key, array in arrays.items() if array is not None}
        self.refuses(present, self.numbers, *words)

    def refuses_steps(self, steps, *words):
        self.refuses(self.arrays, {**self.numbers, "steps": steps}, *words)


def test_load_state_dict_refuses_arrays_that_do_not_fit():
    state = State()
    assert sorted(state.arrays) == [f"{slot}.layer.{i}.weight" for slot in "mv" for i in range(3)]
    first = "m.layer.0.weight"
    extra = np.ones(1)
    state.refuses_arrays({first: None}, f"'{first}': expected float64 (3, 4), got nothing")
    state.refuses_arrays({"m.x": extra}, "'m.x': expected nothing, got float64 (1,)")
    wrong = "expected float64 (3, 4), got float64 (4, 3)"
    state.refuses_arrays({first: np.ones((4, 3))}, first, wrong)
    state.refuses_arrays({first: np.ones((3, 4), np.float32)}, first, "got float32 (3, 4)")
    state.refuses_arrays({first: None, "m.x": extra}, "differs in 2 places", first, "m.x")


def test_load_state_dict_refuses_steps_that_do_not_fit():
    state = State()
    steps = state.numbers["steps"]
    assert steps["layer.3.weight"] == 0
    for count in (-1, 1.0, True, "1", None):
        wrong = {**steps, "layer.1.weight": count}
        state.refuses_steps(wrong, "steps.layer.1.weight", repr(count))
    state.refuses_steps({**steps, "layer.3.weight": 1}, "m.layer.3.weight", "v.layer.3.weight")
    state.refuses_steps({**steps, "x": 1}, "'steps.x': expected nothing")
    state.refuses_steps({"layer.0.weight": 1}, "differs in 7 places", "steps.layer.1.weight")
    state.refuses_steps([1], "'steps'")


def test_load_state_dict_refuses_another_optimiser():
    state = State()
    sgd = {**state.numbers, "optimizer": "SGD"}
    state.refuses(state.arrays, sgd, "expected AdamW", "SGD")
    state.refuses(state.arrays, {}, "expected AdamW")


# ---- schedules -----------------------------------------------------------------------------------


@given(warmup=st.integers(0, 50), step=st.integers(0, 200))
def test_constant_is_a_ramp_and_then_one(warmup, step):
    factor = optim.constant(step, warmup)
    assert factor == ((step + 1) / warmup if step < warmup else 1.0)


@given(total=st.integers(1, 300), warmup=st.integers(0, 300), floor=st.floats(0, 1))
@example(total=8, warmup=7, floor=0.5)
@example(total=8, warmup=6, floor=0.5)
@example(total=1, warmup=0, floor=0.5)
def test_warmup_cosine_is_exact_at_its_ends_and_falls_between(total, warmup, floor):
    steps = range(max(total, warmup) + 2)
    factors = [optim.warmup_cosine(step, total, warmup, floor) for step in steps]
    assert factors[0] == (1 / warmup if warmup else 1.0)
    assert factors[warmup] == 1.0
    assert all(a < b for a, b in pairwise(factors[:warmup]))
    falling = factors[warmup:]
    if warmup >= total - 1:
        assert set(falling) == {1.0}
        return
    assert factors[total - 1] == factors[total] == floor
    assert all(a >= b >= floor for a, b in pairwise(falling))
    for step in range(warmup, total):  # a cosine is point-symmetric about its middle
        mirror = factors[warmup + total - 1 - step]
        assert factors[step] + mirror == pytest.approx(1 + floor, abs=8e-15)


def test_warmup_cosine_in_the_middle():
    quarter = optim.warmup_cosine(2, total=9)
    assert quarter == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-15)
    assert optim.warmup_cosine(4, total=9, floor=0.2) == pytest.approx(0.6, rel=1e-15)


# ---- clipping ------------------------------------------------------------------------------------


@given(seed=SEEDS, size=st.floats(1e-6, 1e6), max_norm=st.floats(1e-3, 1e3), dtype=FLOATS)
def test_clip_by_global_norm_shortens_and_keeps_the_direction(seed, size, max_norm, dtype):
    rng = np.random.default_rng(seed)
    grads = [np.array(size * rng.normal(size=shape), dtype) for shape in SHAPES]
    before = [g.copy() for g in grads]
    clipped, norm = optim.clip_by_global_norm([*grads, None], np.float64(max_norm))
    exact = math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.ravel()))
    assert norm == pytest.approx(exact, rel=1e-14)
    assert isinstance(norm, float)
    assert clipped.pop() is None
    factor = min(1.0, max_norm / (norm + 1e-6))
    u = np.finfo(dtype).eps
    for g, old, new in zip(grads, before, clipped, strict=True):
        assert np.array_equal(g, old), "clipping must not write into the caller's gradients"
        assert new.dtype == dtype
        assert not np.shares_memory(new, g)
        if factor >= 1.0:
            assert new.tobytes() == old.tobytes()
        error = np.abs(new - old.astype(np.float64) * factor)
        assert np.all(error <= 2 * u * np.abs(old) * factor)


@pytest.mark.oracle
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_clip_by_global_norm_equals_torch(max_norm):
    torch = pytest.importorskip("torch")
    grads = gradients(0)
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
    for q, g in zip(theirs, grads, strict=True):
        q.grad = torch.tensor(g)
    total = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    clipped, norm = optim.clip_by_global_norm(grads, max_norm)
    assert norm == pytest.approx(float(total), rel=1e-14)
    for new, q in zip(clipped, theirs, strict=True):
        np.testing.assert_allclose(new, q.grad.numpy(), rtol=1e-14)


def test_clip_by_global_norm_sums_in_float64():
    many = np.full(3_000_000, 1e-3, np.float32)
    _, norm = optim.clip_by_global_norm([many, np.full((), 1e30, np.float32)], INF)
    assert norm == float(np.float32(1e30))
    _, norm = optim.clip_by_global_norm([many], 1.0)
    assert norm == pytest.approx(float(many[0]) * math.sqrt(len(many)), rel=1e-13)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e200])
def test_clip_by_global_norm_clips_nothing_if_the_norm_is_not_finite(bad):
    grads = [np.ones(2), None, np.array([bad])]
    clipped, norm = optim.clip_by_global_norm(grads, 1.0)
    assert not math.isfinite(norm)
    assert clipped[1] is None
    assert clipped[0].tobytes() == grads[0].tobytes()
    assert clipped[2].tobytes() == grads[2].tobytes()


def clipped_number(x, max_norm):
    (clipped,), _ = optim.clip_by_global_norm([np.array([x])], max_norm)
    return clipped[0]


def test_clip_by_global_norm_just_below_the_limit_clips_as_torch_does():
    x = 1 - 5e-7
    assert clipped_number(x, 1.0) == x * (1 / (x + 1e-6)) < x
    assert clipped_number(1 - 2e-6, 1.0) == 1 - 2e-6
    assert clipped_number(1.0, 1.0 + 1e-6) == 1.0


def test_clip_by_global_norm_accepts_no_gradients():
    assert optim.clip_by_global_norm([None, None], 1.0) == ([None, None], 0.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, NAN, True, "1"])
def test_clip_by_global_norm_refuses_an_invalid_limit(max_norm):
    with pytest.raises(ConfigError, match="max_norm"):
        optim.clip_by_global_norm([], max_norm)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_optimizer_refuses_one_parameter_and_what_is_none(kind):
    p = Parameter(np.zeros((2, 2)))
    for one in (p, Linear(np.zeros((2, 2))), None, 3):
        with pytest.raises(ConfigError, match=r"must be a list .* got one .* pass \[parameter\]"):
            kind(one, lr=0.1)
        with pytest.raises(ConfigError, match=r"must be a list .* got one .* pass \[parameter\]"):
            kind([{"params": one}], lr=0.1)
    for wrong, got in ((p * 2.0, "an operation's result"), (p.data, "array"), ("w", "'w'")):
        for params in ([wrong], [("name", wrong)], [{"params": [p, wrong]}]):
            with pytest.raises(ConfigError, match=f"got {got}.* give leaves"):
                kind(params, lr=0.1)
    with pytest.raises(ConfigError, match="give leaves"):
        kind(p.data, lr=0.1)
    kind(iter([("a", p)]), lr=0.1)


# ---- small parameters together -------------------------------------------------------------------

STEPS = st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@given(missing=STEPS, loads=st.integers(0, 5))
def test_step_updates_small_parameters_together_with_the_bits_of_one_by_one(kind, missing, loads):
    results = []
    for small in (optim.SMALL, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "SMALL", small)
            named = parameters(np.float32)
            optimizer = make(kind, named)
            for step, absent in enumerate(missing):
                optimizer.step(gradients(step, np.float32, absent))
                if step == loads:
                    optimizer.load_state_dict(*optimizer.state_dict())
            arrays, numbers = optimizer.state_dict()
        results.append((values(named), array_bits(arrays), numbers))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_step_separates_moments_that_other_parameters_share(kind):
    results = []
    g = np.arange(2.0)
    for small in (optim.SMALL, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "SMALL", small)
            named = [(name, Parameter(np.ones(2))) for name in "abc"]
            optimizer = make(kind, named)
            optimizer.step([g, g + 1, None])  # a and b share memory for their moments
            optimizer.step([None, None, g + 2])
            optimizer.step([g, None, g])  # a and c are now as large as that memory
            optimizer.step([g, g, g])
        results.append(values(named))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("grads", "got"),
    [
        (np.ones((1, 3)), "one ndarray"),
        (Tensor(np.ones((1, 3))), "one Tensor"),
        (1.0, "one float"),
        ([Tensor(np.ones(3))], "Tensor float64 at 0"),
        ([np.ones(3) * 1j], "ndarray complex128 at 0"),
        ([[1.0, 1.0, 1.0]], "list at 0"),
    ],
)
def test_step_and_clip_by_global_norm_take_a_list_of_arrays(grads, got):
    # The rows of one array were taken for gradients, and the imaginary part of one was dropped.
    p = Parameter(np.ones(3))
    for call in (optim.SGD([p], lr=0.1).step, lambda grads: optim.clip_by_global_norm(grads, 1.0)):
        with pytest.raises(ConfigError, match=f"^gradients must be .* got {got}$"):
            call(grads)
    np.testing.assert_array_equal(p.data, np.ones(3))


def test_optimizer_refuses_integers():
    with pytest.raises(ConfigError, match="must be floats to be trained, got int64 as '0'"):
        optim.AdamW([Tensor(np.arange(3))])


def test_step_takes_gradients_from_an_iterator():
    p = Parameter(np.ones(3))
    optim.SGD([p], lr=0.5).step(iter([np.ones(3)]))
    np.testing.assert_array_equal(p.data, np.full(3, 0.5))
