"""A quick bench that all tests of the laboratory share: its bases and fits are made once."""

from __future__ import annotations

import pytest

from minilora.lab.bench import Bench
from minilora.lab.protocol import Plan


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("lab"), Plan(quick=True))
