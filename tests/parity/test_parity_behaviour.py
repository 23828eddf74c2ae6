"""What PEFT's users count on, beside peft: the rows of behaviour.py, the same on either side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from behaviour import DIFFERENT, ROWS, Ours, Row, Side, Theirs

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def plain(value: Any) -> Any:
    """Containers as lists and dictionaries, arrays as they are."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def difference(got: Any, expected: Any, where: str = "") -> str:
    """Where two results differ first; "" if they are equal, arrays to 1e-9."""
    if isinstance(expected, np.ndarray):
        scale = np.abs(expected).max()
        is_close = np.shape(got) == expected.shape and np.abs(got - expected).max() <= 1e-6 * scale
        return "" if is_close else f"{where}: other logits"
    if isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            if text := difference(one, other, f"{where}[{i}]"):
                return text
        return ""
    texts = [json.dumps(value, default=str) for value in (got, expected)]
    return "" if got == expected else f"{where}: ours {texts[0]}, peft's {texts[1]}"


def outcome(row: Row, side: Side) -> Any:
    """What the row returns, or the name of the error that it raises."""
    side.scratch.mkdir()
    try:
        return plain(row(side, side.scratch))
    except Exception as error:
        return f"raises {type(error).__name__}"


@pytest.mark.parametrize("name", ROWS)
def test_peft_model_behaves_as_peft_s(name: str, llama: tuple[Path, Any], tmp_path: Path) -> None:
    theirs, ours = (
        outcome(ROWS[name], side(llama[0], tmp_path / side.__name__)) for side in (Theirs, Ours)
    )
    assert not str(ours).startswith("raises"), ours
    text = difference(ours, theirs)
    assert bool(text) == (name in DIFFERENT), text
