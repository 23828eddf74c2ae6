"""The checks are checked: forty small mistakes in the source, and every one must be noticed."""

from __future__ import annotations

from collections import Counter

import pytest
from mutants import MUTANTS, Check, Mutant, applied, source_of

killed: list[Mutant] = []


def test_mutants_are_of_the_kinds_that_were_planned():
    kinds = Counter(m.kind for m in MUTANTS)
    assert list(kinds.values()) == [6, 4, 4, 4, 4, 2, 3, 3, 2, *[1] * 8]
    different = {(m.module, m.old, m.new) for m in MUTANTS}
    assert len(MUTANTS) == len(different) == 40


@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: f"{m.module}: {m.old.strip()[:40]}")
def test_mutants_replace_text_that_occurs_once(m):
    _, source = source_of(m.module)
    assert source.count(m.old) == 1


def checks() -> dict[str, Check]:
    """Every check once, by its name and what it is about."""
    result = {}
    for m in MUTANTS:
        about = [cell.cell_contents for cell in m.check.__closure__ or ()]
        result[f"{m.check.__name__}{about}"] = m.check
    return result


@pytest.mark.parametrize("name", checks())
def test_mutants_checks_accept_the_source_as_it_is(name):
    checks()[name]()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: f"{m.kind}: {m.module}")
def test_mutants_are_noticed(m):
    noticed = pytest.raises((AssertionError, ValueError, ArithmeticError))
    with applied(m.module, m.old, m.new), noticed:
        m.check()
    killed.append(m)


def test_mutants_are_all_noticed_and_nothing_is_left_behind(capsys):
    if not killed:
        pytest.skip("the mistakes were not selected in this run")
    with capsys.disabled():
        print(f" [{len(killed)} of {len(MUTANTS)}] ", end="")
    assert len(killed) == len(MUTANTS)
    for check in checks().values():
        check()


def test_applied_ends_with_its_block_whatever_happens():
    m = MUTANTS[0]
    for _ in range(2):
        with (
            pytest.raises(AssertionError, match="gradient is off"),
            applied(m.module, m.old, m.new),
        ):
            m.check()
        m.check()


def test_applied_refuses_text_that_does_not_occur():
    refused = pytest.raises(AssertionError, match="has 0 times")
    with refused, applied("autograd", "no such text", ""):
        pass
