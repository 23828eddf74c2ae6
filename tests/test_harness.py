"""The harness of hostile inputs is checked: it must see each kind of harm, and each kind of bad message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import TAKEN, refused, unharmed

from minilora.errors import FormatError


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def grow(world: Path) -> None:
    (world / "more").touch()


def touch(world: Path) -> None:
    (world / "config.json").write_text((world / "config.json").read_text() + " ")


def leak(world: Path) -> None:
    KEPT.append(open(world / "config.json"))  # noqa: SIM115


def feast(world: Path) -> None:
    np.ones(64 << 20, np.uint8)


KEPT: list[Any] = []


@pytest.mark.parametrize("harm", [grow, touch, leak, feast])
def test_the_harness_sees_harm(harm: Callable[[Path], None], world: Path) -> None:
    with pytest.raises(AssertionError), unharmed(world, "harm on purpose"):
        harm(world)
    TAKEN.pop()
    while KEPT:
        KEPT.pop().close()


@pytest.mark.parametrize(
    "text", ["config: " + "x" * 500, "config \x1b[2J", "other", "config, and not what was meant"]
)
def test_the_harness_sees_a_bad_message(text: str, world: Path) -> None:
    with (
        pytest.raises(AssertionError),
        refused(ValueError, "config: |other|J", world, "message", "config"),
    ):
        raise ValueError(text)
    with pytest.raises(AssertionError), refused(ValueError, "", world, "kind", ""):
        raise FormatError("a kind of ValueError, but not the one")
    del TAKEN[-2:]
