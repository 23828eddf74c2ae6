"""The list of properties holds for any layer, and its bounds are tight; its mistakes and its command are beside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.nn import Linear, LinearBase, Parameter
from minilora.quant import BLOCK_SIZES, KINDS
from minilora.verify import (
    PROPERTIES,
    Case,
    Measured,
    make_case,
    measure,
    over_codes,
    random_case,
    verify,
)
from minilora.verify import ends as of_ends
from minilora.verify import layers as of_layers
from minilora.verify import lora as of_lora
from minilora.verify import sums as of_sums
from minilora.verify import tasks as of_tasks
from minilora.verify.case import ADAPTERS
from minilora.verify.measuring import worst

BY_NAME = {p.name: p for p in PROPERTIES}
LORAS = {
    p.name for room in (of_lora, of_layers, of_tasks, of_sums, of_ends) for p in room.PROPERTIES
}
EXACT = {
    "start is the base", "disabled is the base", "count", "gauge by powers of two", "start moves B alone",
    "merge in any portions", "merge refuses", "unmerge", "files", "dropout off", "dropout spares the base",
    "files of both ends",
    "DoRA starts as the base", "DoRA's scale", "DoRA's count",
    "AdaLoRA starts as the base", "AdaLoRA's count", "AdaLoRA's penalty at rest", "AdaLoRA's budget",
    "absmax stays", "coded again", "codes know no scale", "codes know no neighbour", "codes in bytes", "bits",
    "absent task",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """`files` saves hundreds of times; that a file is on the disk before it has its name is test_disk's."""
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr("os.fsync", lambda file: None)
        yield


def sample(kind: str, quantized: bool) -> Case:
    case = make_case(
        3, 9, 7, [2] if kind == "dora" else [2, 2], [4] if kind == "dora" else [4, 8], kind=kind
    )
    return over_codes(case) if quantized else case


SAMPLES = {
    (kind, quantized): sample(kind, quantized) for kind in ADAPTERS for quantized in (False, True)
}
APPLIES = {p.name: [of for of, case in SAMPLES.items() if p.applies(case)] for p in PROPERTIES}


@st.composite
def cases(draw: st.DrawFn, of: list[tuple[str, bool]]) -> Case:
    """Any shape from 1 x 1, any rank, above full rank too, any scale, dtype and codes, one to three adapters."""
    kind, quantized = draw(st.sampled_from(of))
    count = 1 if kind == "dora" else draw(st.integers(1, 3))
    ranks = draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    case = make_case(
        draw(st.integers(0, 2**32)),
        draw(st.integers(1, 24)),
        draw(st.integers(1, 24)),
        ranks[:1] * count if kind == "adalora" else ranks,
        draw(st.lists(st.floats(0.01, 1000), min_size=count, max_size=count)),
        draw(st.sampled_from(["float32", "float64"])),
        use_rslora=draw(st.booleans()),
        bias=draw(st.booleans()),
        rows=(draw(st.integers(1, 3)), draw(st.integers(1, 7))),
        exponents=(draw(st.integers(-9, 9)), draw(st.integers(-9, 9)), draw(st.integers(-9, 9))),
        kind=kind,
    )
    if not quantized:
        return case
    return over_codes(
        case,
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from(BLOCK_SIZES[:3])),
        double_quant=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", BY_NAME)
@given(data=st.data())
def test_a_property_holds_for_any_layer(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(APPLIES[name]))
    if BY_NAME[name].applies(case):
        found = BY_NAME[name].check(case)
        assert found.ok, found
        assert (found.bound == 0) == (name in EXACT) or found.measured == 0


def state(case: Case) -> Any:
    """All that a layer is."""
    layer = case.subject
    modules = [
        {k: v for k, v in vars(m).items() if not isinstance(v, (Parameter, dict, Linear))}
        for _, m in layer.named_modules()
    ]
    parameters = {
        name: (p.numpy().tobytes(), p.requires_grad, p.grad) for name, p in layer.named_parameters()
    }
    weight = case.weight if case.weight is not None else layer.base_layer.weight.data
    held = [(name, id(adapter)) for name, adapter in layer.adapters.items()]
    return (
        repr(modules),
        parameters,
        held,
        id(layer.base_layer),
        id(weight),
        weight.tobytes(),
        case.x.tobytes(),
    )


@pytest.mark.parametrize(
    ("name", "of"), [(name, of) for name, many in APPLIES.items() for of in many]
)
def test_a_measurement_leaves_the_layer_as_it_was_and_repeats_itself(
    name: str, of: tuple[str, bool]
) -> None:
    case = SAMPLES[of]
    before, versions = state(case), [p.version[0] for p in case.subject.parameters() if p.version]
    first = BY_NAME[name].check(case)
    assert BY_NAME[name].check(case) == first
    assert state(case) == before
    assert [p.version[0] for p in case.subject.parameters() if p.version] == versions


# ---- the default run ----


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return {row.property: row for row in verify()}


def test_every_property_holds_and_was_measured(rows: dict[str, Any]) -> None:
    assert list(rows) == list(BY_NAME)
    assert all(row.ok for row in rows.values())
    assert all(row.cases >= 40 for row in rows.values())
    assert len(BY_NAME) == len(PROPERTIES)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - EXACT))
def test_no_bound_is_far_too_loose(name: str, rows: dict[str, Any]) -> None:
    print(f"{name}: {rows[name].ratio:.4f}")
    assert 1e-3 < rows[name].ratio <= 1


@pytest.mark.parametrize("name", sorted(EXACT))
def test_what_is_exact_has_no_tolerance(name: str, rows: dict[str, Any]) -> None:
    assert (rows[name].measured, rows[name].bound, rows[name].ratio) == (0, 0, 0)


def test_random_cases_repeat_themselves_and_reach_the_corners() -> None:
    made = [random_case(seed) for seed in range(100)]
    assert state(random_case(7))[1] == state(random_case(7))[1]
    shapes = [case.subject.base_layer.weight.shape for case in made]
    ranks = [a.r for case in made for a in case.subject.adapters.values()]
    assert {1} < {side for shape in shapes for side in shape}
    assert any(
        r > max(shape)
        for case, shape in zip(made, shapes, strict=True)
        for r in [case.configs["a0"].r]
    )
    assert max(ranks) > 16
    assert {case.dtype.name for case in made} == {"float32", "float64"}
    assert {case.subject.base_layer.bias is None for case in made} == {True, False}
    assert {len(case.configs) for case in made} == {1, 2, 3}
    coded = [random_case(seed, quantized=True) for seed in range(50)]
    held = [case.subject.base_layer.weight.quantized for case in coded]
    assert {q.kind for q in held} == set(KINDS)
    assert {q.double_quant for q in held} == {True, False}
    assert max(q.size / q.block_size for q in held) > 256  # absmax have more than one scale, too
    assert any(q.size % q.block_size for q in held)


def test_counts_that_are_known() -> None:
    """c_attn of GPT-2 (r = 8), 0.2364 % of its 124,734,720 with them; q_proj and v_proj of Llama-2-7B (r = 8)."""

    def numbers(kind: str, inputs: int, outputs: int, r: int) -> int:
        size = LinearBase()  # a size and nothing else: no memory
        size.in_features, size.out_features = inputs, outputs
        return sum(math.prod(shape) for shape in ADAPTERS[kind].shapes(size, r).values())

    assert 12 * numbers("lora", 768, 2304, 8) == 294_912
    assert round(100 * 294_912 / 124_734_720, 4) == 0.2364
    assert 32 * 2 * numbers("lora", 4096, 4096, 8) == 4_194_304
    assert 32 * 2 * numbers("dora", 4096, 4096, 8) == 4_194_304 + 32 * 2 * 4096
    assert 32 * 2 * numbers("adalora", 4096, 4096, 8) == 4_194_304 + 32 * 2 * 8


# ---- measuring ----


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
def test_a_nan_never_passes_and_the_worst_entry_is_shown(
    error: Any, bound: Any, ok: bool, ratio: float
) -> None:
    found = worst((np.array(error), np.array(bound)), (0, 0))
    assert (found.ok, found.ratio) == (ok, ratio)


def test_what_cannot_be_computed_does_not_hold() -> None:
    case = make_case(0, 4, 4, [2], [4])
    adapter = case.subject.adapters["a0"]
    adapter.lora_A.data = np.full_like(adapter.lora_A.data, math.nan)
    row = {r.property: r for r in measure([case])}["unmerge"]
    assert not row.ok
    assert "not finite" in row.note


def test_a_measurement_has_the_worse_of_two() -> None:
    assert worst((1, 2), (3, 4)) == Measured(3, 4)
