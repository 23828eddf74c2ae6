"""The properties hold for any layer, and their bounds are tight.

test_verify_mistakes.py has the mistakes that they find, test_verify_run.py files and the command.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import NonFiniteError
from minilora.nn import Linear, LinearBase, Parameter
from minilora.quant import BLOCK_SIZES, KINDS
from minilora.verify import (
    PROPERTIES,
    Case,
    Measured,
    ends,
    layers,
    lora,
    make_case,
    maps,
    measure,
    optimizers,
    over_codes,
    pruning,
    random_case,
    starts,
    sums,
    tasks,
    verify,
)
from minilora.verify.case import ADAPTERS
from minilora.verify.measuring import leading_terms, project, spectral_norm, worst

BY_NAME = {p.name: p for p in PROPERTIES}
LORAS = {
    p.name
    for module in (lora, layers, tasks, sums, pruning, optimizers, ends, starts)
    for p in module.PROPERTIES
}
OF_MAPS = {p.name for p in maps.PROPERTIES}
EXACT = {
    "start is the base", "disabled is the base", "count", "gauge by powers of two",
    "start moves B alone", "merge in any portions", "merge refuses", "unmerge", "files",
    "dropout off", "dropout spares the base", "files of both ends", "DoRA starts as the base",
    "DoRA's scale", "DoRA's count", "AdaLoRA starts as the base", "AdaLoRA's count",
    "AdaLoRA's penalty at rest", "AdaLoRA's budget", "absmax stays", "encoding twice",
    "codes ignore scale", "codes ignore neighbours", "codes in bytes", "bits", "absent task",
    "equal adapters", "the largest stay", "elected sign",
    "LoRA-FA knows no s", "Riemannian gauge", "HiRA zeros", "MiSS repetition",
}  # fmt: skip


def make_sample(kind: str, quantized: bool) -> Case:
    count = 1 if kind == "dora" else 2
    case = make_case(3, 9, 7, [2] * count, [4, 8][:count], kind=kind)
    return over_codes(case) if quantized else case


Kind = tuple[str, bool]  # of the adapters; whether the base has codes
SAMPLES: dict[Kind, Case] = {}
for kind in ADAPTERS:
    for quantized in (False, True):
        SAMPLES[kind, quantized] = make_sample(kind, quantized)
APPLIES = {p.name: [of for of, case in SAMPLES.items() if p.applies(case)] for p in PROPERTIES}
APPLICATIONS = [(name, of) for name, kinds in APPLIES.items() for of in kinds]


@st.composite
def cases(draw: st.DrawFn, kinds: list[Kind]) -> Case:
    """Any shape from 1 x 1, any rank, scale, dtype and codes; one to three adapters."""
    sides = st.integers(1, 24)
    powers = st.integers(-9, 9)
    kind, quantized = draw(st.sampled_from(kinds))
    count = 1 if kind == "dora" else draw(st.integers(1, 3))
    ranks = draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    if kind == "adalora":
        ranks = ranks[:1] * count
    case = make_case(
        seed=draw(st.integers(0, 2**32)),
        inputs=draw(sides),
        outputs=draw(sides),
        ranks=ranks,
        alphas=draw(st.lists(st.floats(0.01, 1000), min_size=count, max_size=count)),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        use_rslora=draw(st.booleans()),
        bias=draw(st.booleans()),
        rows=(draw(st.integers(1, 3)), draw(st.integers(1, 7))),
        exponents=(draw(powers), draw(powers), draw(powers)),
        kind=kind,
    )
    if not quantized:
        return case
    code = draw(st.sampled_from(KINDS))
    block_size = draw(st.sampled_from(BLOCK_SIZES[:3]))
    return over_codes(case, code, block_size, double_quant=draw(st.booleans()))


@pytest.mark.parametrize("name", BY_NAME)
@given(data=st.data())
def test_property_holds_for_any_layer(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(APPLIES[name]))
    if not BY_NAME[name].applies(case):
        return
    m = BY_NAME[name].check(case)
    assert m.ok, m
    assert (m.bound == 0) == (name in EXACT) or m.measured == 0


def describe_state(case: Case) -> Any:
    """All that a layer is."""
    layer = case.original
    modules = []
    for _, module in layer.named_modules():
        fields = vars(module).items()
        modules.append({k: v for k, v in fields if not isinstance(v, (Parameter, dict, Linear))})
    parameters = {}
    for name, p in layer.named_parameters():
        parameters[name] = p.numpy().tobytes(), p.requires_grad, p.grad
    weight = layer.base_layer.weight.data if case.w is None else case.w
    identities = [(name, id(adapter)) for name, adapter in layer.adapters.items()]
    identities += [("base", id(layer.base_layer)), ("weight", id(weight))]
    return repr(modules), parameters, identities, weight.tobytes(), case.x.tobytes()


def versions(case: Case) -> list[int]:
    """How often each parameter's data has changed."""
    return [p.version[0] for p in case.original.parameters() if p.version]


@pytest.mark.parametrize(("name", "of"), APPLICATIONS)
def test_property_check_leaves_the_layer_as_it_was_and_repeats_itself(name: str, of: Kind) -> None:
    case = SAMPLES[of]
    state_before = describe_state(case)
    versions_before = versions(case)
    first = BY_NAME[name].check(case)
    assert BY_NAME[name].check(case) == first
    assert describe_state(case) == state_before
    assert versions(case) == versions_before


# ---- the default run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return {row.property: row for row in verify()}


def test_verify_measures_every_property_and_all_hold(rows: dict[str, Any]) -> None:
    assert list(rows) == list(BY_NAME)
    assert len(BY_NAME) == len(PROPERTIES)
    for row in rows.values():
        assert row.ok, row
        assert row.cases >= 40, row


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - EXACT))
def test_verify_has_no_bound_that_is_far_too_loose(name: str, rows: dict[str, Any]) -> None:
    print(f"{name}: {rows[name].ratio:.4f}")
    assert 1e-3 < rows[name].ratio <= 1


@pytest.mark.parametrize("name", sorted(EXACT))
def test_verify_has_no_tolerance_for_exact_properties(name: str, rows: dict[str, Any]) -> None:
    row = rows[name]
    assert (row.measured, row.bound, row.ratio) == (0, 0, 0)


# ---- cases ---------------------------------------------------------------------------------------


def test_random_case_repeats_itself() -> None:
    _, parameters, *_ = describe_state(random_case(7))
    _, again, *_ = describe_state(random_case(7))
    assert parameters == again


def test_random_case_reaches_the_corners() -> None:
    sides = set()
    ranks = []
    dtypes = set()
    without_bias = set()
    counts = set()
    above_full_rank = False
    for seed in range(100):
        case = random_case(seed)
        shape = case.base.weight.shape
        sides |= set(shape)
        ranks += [adapter.r for adapter in case.adapters.values()]
        dtypes.add(case.dtype.name)
        without_bias.add(case.base.bias is None)
        counts.add(len(case.configs))
        above_full_rank |= case.configs["a0"].r > max(shape)
    assert {1} < sides
    assert above_full_rank
    assert max(ranks) > 16
    assert dtypes == {"float32", "float64"}
    assert without_bias == {True, False}
    assert counts == {1, 2, 3}


def test_random_case_over_codes_reaches_the_corners() -> None:
    codes = [random_case(seed, quantized=True).base.weight.quantized for seed in range(50)]
    assert {q.kind for q in codes} == set(KINDS)
    assert {q.double_quant for q in codes} == {True, False}
    assert max(q.size / q.block_size for q in codes) > 256  # absmax have more than one scale, too
    assert any(q.size % q.block_size for q in codes)


def test_shapes_give_the_papers_counts() -> None:
    """c_attn of GPT-2 (r = 8), 0.2364 % of 124,734,720; q_proj, v_proj of Llama-2-7B (r = 8)."""

    def count(kind: str, inputs: int, outputs: int) -> int:
        base = LinearBase()  # a size without a weight: no memory
        base.in_features = inputs
        base.out_features = outputs
        shapes = ADAPTERS[kind].shapes(base, 8).values()
        return sum(math.prod(shape) for shape in shapes)

    assert 12 * count("lora", 768, 2304) == 294_912
    assert round(100 * 294_912 / 124_734_720, 4) == 0.2364
    layers = 32 * 2
    assert layers * count("lora", 4096, 4096) == 4_194_304
    assert layers * count("dora", 4096, 4096) == 4_194_304 + layers * 4096
    assert layers * count("adalora", 4096, 4096) == 4_194_304 + layers * 8


# ---- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "bound", "ok", "ratio"),
    [
        (0.0, 0.0, True, 0.0),
        (1e-300, 0.0, False, math.inf),
        (math.nan, 1.0, False, math.inf),
        (math.nan, math.inf, False, math.inf),
        (0.0, math.nan, False, math.inf),
        (1.0, math.inf, False, 0.0),
        (math.inf, 1.0, False, math.inf),
        ([1.0, 3.0, 2.0], [2.0, 4.0, 8.0], True, 0.75),
        ([1.0, -9.0, 2.0], [2.0, 4.0, 8.0], False, 2.25),
        ([1.0, math.nan, 20.0], [2.0, 4.0, 8.0], False, math.inf),
        ([0.0, 0.0], [1.0, 0.0], True, 0.0),
    ],
)
def test_worst_never_passes_a_nan_and_shows_the_worst_entry(
    error: Any, bound: Any, ok: bool, ratio: float
) -> None:
    m = worst((np.array(error), np.array(bound)), (0, 0))
    assert m.ok == ok
    assert m.ratio == ratio


def test_worst_is_the_worse_of_two() -> None:
    assert worst((1, 2), (3, 4)) == Measured(3, 4)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7), (1, 4), (4, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [0, 1, 9])
def test_leading_terms_and_spectral_norm_are_lapacks(
    shape: tuple[int, int], dtype: str, rank: int
) -> None:
    O, I = shape
    rng = np.random.default_rng(0)
    W = (rng.standard_normal((O, rank)) @ rng.standard_normal((rank, I))).astype(dtype)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    k = min(3, *shape)
    U, sigma, Vt = leading_terms(W, 3)
    assert (U.shape, sigma.shape, Vt.shape) == ((O, k), (k,), (k, I))
    np.testing.assert_allclose(sigma, exact[:k], atol=1e-13)
    np.testing.assert_allclose(U.T @ U, np.eye(k), atol=1e-9)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(k), atol=1e-9)
    rest = np.linalg.svd(W - (U * sigma) @ Vt, compute_uv=False)[0]
    np.testing.assert_allclose(rest, np.append(exact, 0)[k], atol=1e-13)
    np.testing.assert_allclose(spectral_norm(W), exact[0], rtol=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_leading_terms_spectral_norm_and_project_refuse_what_is_not_finite(value: float) -> None:
    M = np.ones((3, 2), np.float32)
    M[1, 1] = value
    for decompose in (lambda: leading_terms(M, 1), lambda: spectral_norm(M), lambda: project(M, M)):
        with pytest.raises(NonFiniteError):
            decompose()


def test_measure_fails_what_cannot_be_computed() -> None:
    case = make_case(0, 4, 4, [2], [4])
    A = case.adapters["a0"].lora_A
    A.data = np.full_like(A.data, math.nan)
    rows = {row.property: row for row in measure([case])}
    assert not rows["unmerge"].ok
    assert "not finite" in rows["unmerge"].note
