"""The checks are checked: forty small mistakes in the source, and every one must be found."""

from __future__ import annotations

from collections import Counter

import mutants
import pytest
from mutants import MUTANTS, Mutant, applied, source_of

killed: list[Mutant] = []


def test_the_kinds_are_those_that_were_planned() -> None:
    kinds = Counter(m.kind for m in MUTANTS)
    assert list(kinds.values()) == [6, 4, 4, 4, 4, 2, 3, 3, 2, *[1] * 8]
    assert len(MUTANTS) == len({(m.room, m.old, m.new) for m in MUTANTS}) == 40


@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: f"{m.room}: {m.old.strip()[:40]}")
def test_the_replaced_text_is_there_once(m: Mutant) -> None:
    _, source = source_of(m.room)
    assert source.count(m.old) == 1


def checks() -> dict[str, mutants.Check]:
    """Every check once, by what it is about."""
    return {
        m.check.__name__ + str([c.cell_contents for c in m.check.__closure__ or ()]): m.check
        for m in MUTANTS
    }


@pytest.mark.parametrize("name", checks())
def test_the_source_as_it_is_passes(name: str) -> None:
    checks()[name]()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: f"{m.kind}: {m.room}")
def test_a_mistake_is_found(m: Mutant) -> None:
    with (
        applied(m.room, m.old, m.new),
        pytest.raises((AssertionError, ValueError, ArithmeticError)),
    ):
        m.check()
    killed.append(m)


def test_forty_of_forty_and_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    if not killed:
        pytest.skip("the mistakes were not selected in this run")
    with capsys.disabled():
        print(f" [{len(killed)} of {len(MUTANTS)}] ", end="")
    assert len(killed) == len(MUTANTS)
    for check in checks().values():
        check()


def test_a_mistake_is_gone_after_its_block_whatever_happened() -> None:
    m = MUTANTS[0]
    for _ in range(2):
        with pytest.raises(AssertionError, match="gradient is off"), applied(m.room, m.old, m.new):
            m.check()
        m.check()
    with (
        pytest.raises(AssertionError, match="has 0 times"),
        applied("autograd", "no such text", ""),
    ):
        pass
