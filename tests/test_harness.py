"""The harness of hostile inputs itself: it must detect each kind of harm and of bad message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import COSTS, refused, summary, unharmed

from minilora.errors import FormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


OPEN_FILES: list[Any] = []


def create_a_file(folder: Path) -> None:
    (folder / "more").touch()


def change_a_file(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")


def leave_a_file_open(folder: Path) -> None:
    OPEN_FILES.append(open(folder / "config.json"))  # noqa: SIM115


def take_memory(folder: Path) -> None:
    np.ones(64 << 20, np.uint8)


HARMS = [create_a_file, change_a_file, leave_a_file_open, take_memory]


@pytest.mark.parametrize("harm", HARMS)
def test_unharmed_detects_harm(harm: Callable[[Path], None], folder: Path) -> None:
    with pytest.raises(AssertionError), unharmed(folder, "harm on purpose"):
        harm(folder)
    COSTS.pop()
    while OPEN_FILES:
        OPEN_FILES.pop().close()


def test_unharmed_records_its_costs(folder: Path) -> None:
    before = len(COSTS)
    with unharmed(folder, "a harmless input"):
        pass
    assert len(COSTS) == before + 1
    assert summary().startswith(f"{before + 1} hostile inputs: the slowest took ")
    COSTS.pop()


MESSAGES = ["config: " + "x" * 500, "config \x1b[2J", "other", "config, and not what was meant"]


@pytest.mark.parametrize("text", MESSAGES)
def test_refused_detects_a_bad_message(text: str, folder: Path) -> None:
    harness = refused(ValueError, "config: |other|J", folder, "message", "config")
    with pytest.raises(AssertionError), harness:
        raise ValueError(text)
    COSTS.pop()


def test_refused_detects_another_kind_of_error(folder: Path) -> None:
    with pytest.raises(AssertionError), refused(ValueError, "", folder, "kind", ""):
        raise FormatError("a kind of ValueError, but not the one")
    COSTS.pop()
