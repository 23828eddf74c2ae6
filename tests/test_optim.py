"""minilora/optim.py against scalar arithmetic written out again, against PyTorch, and against its own promises."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import optim
from minilora.errors import CheckpointError, ConfigError
from minilora.nn import Parameter

SHAPES = [(3, 4), (5,), (), (2, 0)]


def parameters(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (f"layer.{i}.weight", Parameter(np.array(rng.normal(size=s), dtype)))
        for i, s in enumerate(SHAPES)
    ]


def gradients(step, dtype=np.float64, missing=()):
    rng = np.random.default_rng([1, step])
    drawn = [np.array(rng.normal(size=s) * 10.0 ** rng.integers(-3, 3), dtype) for s in SHAPES]
    return [None if i in missing else g for i, g in enumerate(drawn)]


def values(named):
    return [p.data.tobytes() for _, p in named]


# ---- the update -----------------------------------------------------------------------------------------------------


@given(
    lr=st.floats(1e-4, 0.3),
    b1=st.floats(0, 0.99),
    b2=st.floats(0.5, 0.9999),
    eps=st.floats(1e-8, 1e-2),
    decay=st.floats(0, 0.5),
    seed=st.integers(0, 10**6),
)
def test_adamw_is_the_published_algorithm(lr, b1, b2, eps, decay, seed):
    x, m, v = 0.7, 0.0, 0.0
    p = Parameter(np.array([x]))
    optimizer = optim.AdamW([p], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    rng = np.random.default_rng(seed)
    travelled = 1.0
    for t in range(1, 21):
        g, scale = float(rng.normal()), float(rng.uniform(0.1, 1))
        optimizer.step([np.array([g])], scale=scale)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        move = m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + eps)
        x = x - lr * scale * decay * x - lr * scale * move
        travelled += abs(lr * move)
    assert abs(p.data[0] - x) <= 1e-12 * travelled


def test_adamw_stays_equal_over_a_thousand_steps():
    rng = np.random.default_rng(0)
    start, drawn = rng.normal(size=7), rng.normal(size=(1000, 7)) * np.logspace(-3, 3, 7)
    p = Parameter(start.copy())
    optimizer = optim.AdamW([p], lr=0.01, weight_decay=0.1)
    for g in drawn:
        optimizer.step([g])
    for i in range(7):
        x, m, v = float(start[i]), 0.0, 0.0
        for t, g in enumerate(map(float, drawn[:, i]), 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            x = (1 - 0.001) * x - 0.01 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert p.data[i] == pytest.approx(x, rel=1e-12, abs=1e-12)


def test_the_first_adamw_step_is_the_sign_of_the_gradient():
    g = np.array([1e-3, -5.0, 40.0])
    p = Parameter(np.zeros(3))
    optim.AdamW([p], lr=0.5, eps=0.0, weight_decay=0.0).step([g])
    np.testing.assert_allclose(p.data, -0.5 * np.sign(g), rtol=1e-14)


@given(momentum=st.floats(0, 0.99), decay=st.floats(0, 0.5), seed=st.integers(0, 10**6))
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


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AdamW", {"lr": 3e-3}),
        ("AdamW", {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.3}),
        ("SGD", {"lr": 0.01}),
        ("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_two_hundred_steps_equal_torch(kind, options):
    torch = pytest.importorskip("torch")
    ours = parameters()
    theirs = [torch.nn.Parameter(torch.tensor(p.data.copy())) for _, p in ours]
    mine, other = (
        getattr(optim, kind)(ours, **options),
        getattr(torch.optim, kind)(theirs, **options),
    )
    for step in range(200):
        grads = gradients(step, missing=(1,) if step % 3 == 0 else ())
        mine.step(grads)
        for q, g in zip(theirs, grads, strict=True):
            q.grad = None if g is None else torch.tensor(g)
        other.step()
        for (_, p), q in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "make",
    [
        lambda named: optim.AdamW(named, lr=np.float64(0.1)),
        lambda named: optim.SGD(
            named, lr=0.1, momentum=np.float64(0.9), weight_decay=np.float64(0.1)
        ),
        lambda named: optim.SGD(named, lr=0.1),
    ],
)
@pytest.mark.parametrize("given_dtype", [np.float32, np.float64])
def test_float32_stays_float32_in_the_same_storage(make, given_dtype):
    named = parameters(np.float32)
    storage = [p.data for _, p in named]
    optimizer = make(named)
    for step in range(2):
        grads = gradients(step, given_dtype)
        before = [g.copy() for g in grads]
        optimizer.step(grads, scale=np.float64(0.5))
        assert all(np.array_equal(a, b) for a, b in zip(grads, before, strict=True)), (
            "the caller's gradients changed"
        )
    for (_, p), array in zip(named, storage, strict=True):
        assert p.data is array
        assert p.version == [2]
    assert all(array.dtype == np.float32 for array in optimizer.state_dict()[0].values())


def test_float32_follows_float64():
    narrow, wide = parameters(np.float32), parameters(np.float64)
    for (_, p), (_, q) in zip(narrow, wide, strict=True):
        q.data = p.data.astype(np.float64)
    one, two = optim.AdamW(narrow), optim.AdamW(wide)
    for step in range(50):
        grads = gradients(step, np.float32)
        one.step(grads)
        two.step(grads)
    for (_, p), (_, q) in zip(narrow, wide, strict=True):
        assert np.all(np.abs(p.data - q.data) <= 50 * 2.0**-23 * (1 + np.abs(q.data)))


# ---- which parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD])
def test_a_parameter_without_a_gradient_keeps_everything(kind):
    options = {"momentum": 0.9} if kind is optim.SGD else {}
    named = parameters()
    optimizer = kind(named, lr=0.1, weight_decay=0.1, **options)
    optimizer.step(gradients(0))
    value, (arrays, numbers) = named[1][1].data.copy(), optimizer.state_dict()
    optimizer.step(gradients(1, missing=(1,)))
    after, counted = optimizer.state_dict()
    assert np.array_equal(named[1][1].data, value)
    for key in arrays:
        mine = key.endswith(".layer.1.weight")
        assert not arrays[key].size or np.array_equal(after[key], arrays[key]) == mine
    assert numbers["steps"] == dict.fromkeys(numbers["steps"], 1)
    assert counted["steps"] == {name: 2 - (name == "layer.1.weight") for name, _ in named}
    # When its gradient comes back, it goes on as if the step without it had not been.
    alone = Parameter(parameters()[1][1].data)
    other = kind([alone], lr=0.1, weight_decay=0.1, **options)
    for step in (0, 2):
        other.step([gradients(step)[1]])
    optimizer.step(gradients(2))
    assert np.array_equal(named[1][1].data, alone.data)


def test_p_grad_is_used_and_cleared():
    named, again = parameters(), parameters()
    optimizer = optim.AdamW([p for _, p in named])
    for (_, p), g in zip(named, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    optim.AdamW([p for _, p in again]).step(gradients(0))
    assert values(named) == values(again)
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in named)
    optimizer.step()
    assert values(named) == values(again)


def test_the_defaults_are_pytorch_s_and_without_options_a_schedule_is_flat_or_falls_to_zero():
    p = Parameter(np.ones(2))
    assert optim.AdamW([p]).groups == [
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    ]
    assert optim.SGD([p], 1.0).groups == [{"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}]
    assert [optim.constant(step) for step in (0, 1, 9)] == [1.0, 1.0, 1.0]
    assert [optim.warmup_cosine(step, 9) for step in (0, 4, 8, 9)] == [
        1.0,
        pytest.approx(0.5, rel=1e-15),
        0.0,
        0.0,
    ]


def test_groups_override_the_defaults_and_scale_multiplies_all():
    a, b = (Parameter(np.ones(2)) for _ in range(2))
    optimizer = optim.SGD([{"params": [a]}, {"params": [("b", b)], "lr": 0.5}], lr=0.25)
    assert [(group["lr"], group["momentum"]) for group in optimizer.groups] == [
        (0.25, 0.0),
        (0.5, 0.0),
    ]
    optimizer.step([np.ones(2), np.ones(2)], scale=0.5)
    assert a.data.tolist() == [0.875, 0.875]
    assert b.data.tolist() == [0.75, 0.75]
    optimizer.groups[0]["lr"] = 1.0
    optimizer.step([np.ones(2), None])
    assert a.data.tolist() == [-0.125, -0.125]
    assert optimizer.state_dict()[1]["steps"] == {"0": 2, "b": 1}


def test_a_group_may_override_everything_and_parameters_may_be_many():
    options = {"lr": 0.5, "betas": (0.5, 0.5), "eps": 0.25, "weight_decay": 0.0}
    assert optim.AdamW([{"params": parameters(), **options}]).groups == [options]
    many = [Parameter(np.zeros(1)) for _ in range(300)]
    optim.SGD(many, 1.0).step([np.ones(1)] * 300)
    assert all(p.data[0] == -1 for p in many)


def test_only_the_groups_with_momentum_have_momentum():
    a, b = (Parameter(np.ones(1)) for _ in range(2))
    optimizer = optim.SGD([{"params": [a], "momentum": 0.5}, {"params": [b]}], lr=1.0)
    for _ in range(2):
        optimizer.step([np.ones(1), np.ones(1)])
    assert (a.data[0], b.data[0]) == (1 - 1 - 1.5, 1 - 1 - 1)


NAN = math.nan


@pytest.mark.parametrize(
    "options",
    [{"lr": v} for v in (0, -1e-3, NAN, float("inf"), "0.1", None)]
    + [
        {"betas": v}
        for v in ((1.0, 0.9), (0.9, 1.5), (-0.1, 0.9), (NAN, 0.9), (0.9,), (0.9, 0.9, 0.9), 0.9)
    ]
    + [{"eps": v} for v in (-1e-9, NAN, float("inf"))]
    + [{"weight_decay": v} for v in (-0.1, NAN, float("inf"))],
)
def test_hyper_parameters_that_mean_nothing_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        optim.AdamW(parameters(), **options)
    with pytest.raises(ConfigError, match=name):
        optim.AdamW([{"params": parameters(), **options}])


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, NAN])
def test_sgd_refuses_momentum_outside_its_range(momentum):
    with pytest.raises(ConfigError, match="momentum"):
        optim.SGD(parameters(), 0.1, momentum=momentum)


def test_parameters_that_mean_nothing_are_refused():
    p, q = Parameter(np.ones(1)), Parameter(np.ones(1))
    for params in ([], [{"params": []}]):
        with pytest.raises(ConfigError, match="no parameters"):
            optim.AdamW(params)
    for params in ([p, p], [("x", p), ("x", q)], [{"params": [p]}, {"params": [p]}]):
        with pytest.raises(ConfigError, match="twice"):
            optim.AdamW(params)
    for params in (
        [{"params": [p]}, q],
        [{"params": [p]}, None],
        [{"params": [p], "learning_rate": 1}],
        [{"lr": 1}],
    ):
        with pytest.raises(ConfigError, match="expected groups"):
            optim.AdamW(params)


@pytest.mark.parametrize(
    "grads",
    [[np.ones(2)], [np.ones(2), None, None], [np.ones(2), np.ones((1, 3))], [None, np.ones(4)]],
)
def test_gradients_that_do_not_fit_change_nothing(grads):
    a, b = Parameter(np.ones(2)), Parameter(np.ones(3))
    optimizer = optim.AdamW([a, ("second", b)])
    with pytest.raises(
        ConfigError, match=r"gradients for 2 parameters.*" + ("second" if len(grads) == 2 else "")
    ):
        optimizer.step(grads)
    assert (a.data.tolist(), optimizer.state_dict()[0]) == ([1, 1], {})


# ---- the state ------------------------------------------------------------------------------------------------------

KINDS = {
    "adamw": lambda named: optim.AdamW(named, lr=0.1),
    "sgd": lambda named: optim.SGD(named, lr=0.1, momentum=0.9),
    "plain": lambda named: optim.SGD(named, lr=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
@given(
    cut=st.integers(0, 4),
    missing=st.sets(st.integers(0, 3)),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_a_run_continued_from_its_state_is_the_same_run(kind, cut, missing, dtype):
    straight = parameters(dtype)
    whole = KINDS[kind](straight)
    for step in range(cut):
        whole.step(gradients(step, dtype, missing))
    arrays, numbers = whole.state_dict()
    numbers = json.loads(json.dumps(numbers))  # as a checkpoint keeps them
    resumed = [(name, Parameter(p.data.copy())) for name, p in straight]
    rest = KINDS[kind](resumed)
    rest.step(gradients(99, dtype))  # what was there before is forgotten
    for (_, p), (_, q) in zip(straight, resumed, strict=True):
        q.data = p.data
    rest.load_state_dict(arrays, numbers)
    for step in range(cut, 5):
        whole.step(gradients(step, dtype))
        rest.step(gradients(step, dtype))
    assert values(straight) == values(resumed)
    (one, counts), (two, others) = whole.state_dict(), rest.state_dict()
    assert counts == others
    assert {k: a.tobytes() for k, a in one.items()} == {k: a.tobytes() for k, a in two.items()}


def test_the_state_is_a_copy_both_ways():
    named = parameters()
    optimizer = optim.AdamW(named)
    optimizer.step(gradients(0))
    arrays, numbers = optimizer.state_dict()
    kept = {key: array.copy() for key, array in arrays.items()}
    optimizer.step(gradients(1))
    assert all(np.array_equal(arrays[key], kept[key]) for key in kept)
    optimizer.load_state_dict(arrays, numbers)
    optimizer.step(gradients(1))
    assert all(np.array_equal(arrays[key], kept[key]) for key in kept)


def test_a_state_that_does_not_fit_is_refused_whole():
    named = parameters()
    optimizer = optim.AdamW(named)
    optimizer.step(gradients(0, missing=(3,)))
    arrays, numbers = optimizer.state_dict()
    steps = numbers["steps"]
    assert sorted(arrays) == [f"{slot}.layer.{i}.weight" for slot in "mv" for i in range(3)]
    assert steps["layer.3.weight"] == 0

    def refuses(arrays, numbers, *words):
        with pytest.raises(CheckpointError) as caught:
            optimizer.load_state_dict(arrays, numbers)
        assert len(str(caught.value)) <= 500
        assert all(word in str(caught.value) for word in words), str(caught.value)

    first = "m.layer.0.weight"
    others = {key: array for key, array in arrays.items() if key != first}
    refuses(others, numbers, f"'{first}': expected float64 (3, 4), got nothing")
    refuses({**arrays, "m.x": np.ones(1)}, numbers, "'m.x': expected nothing, got float64 (1,)")
    refuses(
        {**arrays, first: np.ones((4, 3))},
        numbers,
        first,
        "expected float64 (3, 4), got float64 (4, 3)",
    )
    refuses({**arrays, first: np.ones((3, 4), np.float32)}, numbers, first, "got float32 (3, 4)")
    refuses({**others, "m.x": np.ones(1)}, numbers, "differs in 2 places", first, "m.x")
    for t in (-1, 1.0, True, "1", None):
        refuses(
            arrays,
            {**numbers, "steps": {**steps, "layer.1.weight": t}},
            "steps.layer.1.weight",
            repr(t),
        )
    refuses(
        arrays,
        {**numbers, "steps": {**steps, "layer.3.weight": 1}},
        "m.layer.3.weight",
        "v.layer.3.weight",
    )
    refuses(arrays, {**numbers, "steps": {**steps, "x": 1}}, "'steps.x': expected nothing")
    refuses(
        arrays,
        {**numbers, "steps": {"layer.0.weight": 1}},
        "differs in 7 places",
        "steps.layer.1.weight",
    )
    refuses(arrays, {**numbers, "optimizer": "SGD"}, "expected AdamW", "SGD")
    refuses(arrays, {}, "expected AdamW")
    refuses(arrays, {**numbers, "steps": [1]}, "'steps'")
    assert optimizer.state_dict()[1] == numbers


# ---- schedules ------------------------------------------------------------------------------------------------------


@given(warmup=st.integers(0, 50), step=st.integers(0, 200))
def test_constant_is_a_ramp_and_then_one(warmup, step):
    factor = optim.constant(step, warmup)
    assert factor == ((step + 1) / warmup if step < warmup else 1.0)


@given(total=st.integers(1, 300), warmup=st.integers(0, 300), floor=st.floats(0, 1))
@example(total=8, warmup=7, floor=0.5)
@example(total=8, warmup=6, floor=0.5)
@example(total=1, warmup=0, floor=0.5)
def test_warmup_cosine_is_exact_at_its_ends_and_falls_between(total, warmup, floor):
    factors = [
        optim.warmup_cosine(step, total, warmup, floor) for step in range(max(total, warmup) + 2)
    ]
    assert factors[0] == (1 / warmup if warmup else 1.0)
    assert factors[warmup] == 1.0
    assert all(a < b for a, b in pairwise(factors[:warmup]))
    falling = factors[warmup:]
    if warmup >= total - 1:
        assert set(falling) == {1.0}
    else:
        assert factors[total - 1] == factors[total] == floor
        assert all(a >= b >= floor for a, b in pairwise(falling))
        for step in range(warmup, total):  # a cosine is point-symmetric about its middle
            mirror = factors[warmup + total - 1 - step]
            assert factors[step] + mirror == pytest.approx(1 + floor, abs=8e-15)


def test_the_middle_of_the_cosine():
    assert optim.warmup_cosine(2, total=9) == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-15)
    assert optim.warmup_cosine(4, total=9, floor=0.2) == pytest.approx(0.6, rel=1e-15)


# ---- clipping -------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    size=st.floats(1e-6, 1e6),
    max_norm=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_clipping_shortens_and_keeps_the_direction(seed, size, max_norm, dtype):
    rng = np.random.default_rng(seed)
    grads = [np.array(size * rng.normal(size=s), dtype) for s in SHAPES] + [None]
    before = [None if g is None else g.copy() for g in grads]
    clipped, norm = optim.clip_by_global_norm(grads, np.float64(max_norm))
    exact = math.sqrt(math.fsum(float(x) ** 2 for g in grads[:-1] for x in g.ravel()))
    assert norm == pytest.approx(exact, rel=1e-14)
    assert isinstance(norm, float)
    assert clipped[-1] is None
    coefficient = min(1.0, max_norm / (exact + 1e-6))
    for g, old, new in zip(grads[:-1], before[:-1], clipped[:-1], strict=True):
        assert np.array_equal(g, old), "clipping must not write into the caller's gradients"
        assert new.dtype == dtype
        assert not np.shares_memory(new, g)
        assert coefficient < 1.0 or new.tobytes() == old.tobytes()
        u = np.finfo(dtype).eps
        assert np.all(
            np.abs(new - old.astype(np.float64) * coefficient) <= 2 * u * np.abs(old) * coefficient
        )


@pytest.mark.oracle
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_clipping_equals_torch(max_norm):
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


def test_the_norm_is_summed_in_float64():
    many = np.full(3_000_000, 1e-3, np.float32)
    _, norm = optim.clip_by_global_norm([many, np.full((), 1e30, np.float32)], math.inf)
    assert norm == float(np.float32(1e30))
    _, norm = optim.clip_by_global_norm([many], 1.0)
    assert norm == pytest.approx(float(many[0]) * math.sqrt(len(many)), rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_a_norm_that_is_not_finite_clips_nothing(bad):
    grads = [np.ones(2), None, np.array([bad])]
    same, norm = optim.clip_by_global_norm(grads, 1.0)
    assert not math.isfinite(norm)
    assert same[1] is None
    assert [a.tobytes() for a in same[::2]] == [b.tobytes() for b in grads[::2]]


def test_a_norm_just_below_the_limit_is_clipped_as_torch_does():
    (clipped,), _ = optim.clip_by_global_norm([np.array([1 - 5e-7])], 1.0)
    assert clipped[0] == (1 - 5e-7) * (1 / (1 - 5e-7 + 1e-6)) < 1 - 5e-7
    (clipped,), _ = optim.clip_by_global_norm([np.array([1 - 2e-6])], 1.0)
    assert clipped[0] == 1 - 2e-6
    (clipped,), _ = optim.clip_by_global_norm([np.array([1.0])], 1.0 + 1e-6)
    assert clipped[0] == 1.0


def test_clipping_nothing_and_refusing_nonsense():
    assert optim.clip_by_global_norm([None, None], 1.0) == ([None, None], 0.0)
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="max_norm"):
            optim.clip_by_global_norm([], max_norm)


# ---- LoRA+ ----------------------------------------------------------------------------------------------------------


def test_loraplus_gives_b_and_vectors_the_higher_rate():
    stem = "base_model.model.model.layers.0.self_attn.q_proj."
    shapes = {
        stem + "lora_A.default.weight": (2, 4),
        stem + "lora_B.default.weight": (4, 2),
        stem + "lora_A.lora_B_of_before.weight": (2, 4),
        stem + "lora_B.default": (4, 2),
        stem + "lora_E.default": (2, 1),
        stem + "lora_magnitude_vector.default.weight": (4,),
        "base_model.model.lora_B.lora_A.default.weight": (2, 4),
        "base_model.model.model.norm.bias": (4,),
        "lm_head.modules_to_save.default.weight": (4, 4),
        "head.lora_B": (4, 4),
        "head.logit_scale": (),
    }
    named = [(name, Parameter(np.zeros(shape))) for name, shape in shapes.items()]
    slow, fast = optim.loraplus_groups(named, lr=0.1, ratio=8.0)
    names = list(shapes)
    assert [name for name, _ in fast["params"]] == [names[i] for i in (1, 3, 5, 7)]
    assert [name for name, _ in slow["params"]] == [names[i] for i in (0, 2, 4, 6, 8, 9, 10)]
    assert (slow["lr"], fast["lr"]) == (0.1, 0.8)
    optimizer = optim.AdamW([slow, fast], weight_decay=0.0)
    optimizer.step([np.ones(p.shape) for p in optimizer.params])
    for m in optimizer.members:
        assert np.allclose(
            m.parameter.data, -0.8 if m in optimizer.members[7:] else -0.1, rtol=1e-6
        )


def test_loraplus_leaves_out_an_empty_group_and_refuses_nonsense():
    p = Parameter(np.zeros((2, 2)))
    assert optim.loraplus_groups([("x.lora_B.default.weight", p)], 0.5) == [
        {"params": [("x.lora_B.default.weight", p)], "lr": 8.0}
    ]
    for options in (
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": 0.1, "ratio": -1.0},
        {"lr": 0.1, "ratio": math.inf},
    ):
        with pytest.raises(ConfigError):
            optim.loraplus_groups([("x", p)], **options)


@pytest.mark.parametrize(
    "make", [lambda p: optim.AdamW(p, lr=0.1), lambda p: optim.SGD(p, lr=0.1, momentum=0.9)]
)
@given(
    missing=st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=6), loads=st.integers(0, 5)
)
def test_small_parameters_are_updated_together_with_the_bits_of_one_by_one(make, missing, loads):
    found = []
    for small in (optim.SMALL, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "SMALL", small)
            named = parameters(np.float32)
            optimizer = make(named)
            for step, absent in enumerate(missing):
                optimizer.step(gradients(step, np.float32, absent))
                if step == loads:
                    arrays, numbers = optimizer.state_dict()
                    optimizer.load_state_dict(arrays, numbers)
            arrays, numbers = optimizer.state_dict()
        found.append((values(named), {key: a.tobytes() for key, a in arrays.items()}, numbers))
    assert found[0] == found[1]
