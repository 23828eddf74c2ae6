"""A plugin of pytest that runs the tests from the last to the first:    -p reversed_order"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.reverse()
