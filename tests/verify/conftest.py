"""What all tests of `verify` share: files are written without waiting for the disk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _without_fsync() -> Iterator[None]:
    """`files` saves hundreds of times; test_disk tests what reaches the disk."""
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr("os.fsync", lambda file: None)
        yield
