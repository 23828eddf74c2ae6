"""Stands in for what draws the page of a report, which needs jinja2 and plotly."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import Any

import pytest

from minilora.lab.report.content import Report

NAME = "minilora.lab.report.page"


class Pages:
    """The reports that were drawn; each page is its report as JSON.

    reason   why no page can be drawn; None: it can
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.reason: str | None = None

    def render(self, report: Report) -> str:
        self.reports.append(report)
        return json.dumps(dataclasses.asdict(report), allow_nan=False)

    def why_unavailable(self) -> str | None:
        return self.reason


def stand_in(patch: pytest.MonkeyPatch) -> Pages:
    """Put a `Pages` in the place of the module."""
    pages = Pages()
    module: Any = types.ModuleType(NAME)
    module.render = pages.render
    module.why_unavailable = pages.why_unavailable
    patch.setitem(sys.modules, NAME, module)
    return pages
