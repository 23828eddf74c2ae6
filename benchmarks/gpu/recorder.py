"""A plugin of pytest that writes each test's outcome into a file as soon as it is known.

    GPU_CHECK_OUTCOMES=FILE python -m pytest -p recorder ...

One JSON object per line. What has been written is kept when pytest is killed.
"""

from __future__ import annotations

import json
import os
from typing import Any

LINES = 20  # of a failure


def write(outcome: str, name: str, **facts: Any) -> None:
    line = json.dumps({"outcome": outcome, "name": name, **facts})
    with open(os.environ["GPU_CHECK_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(line + "\n")


def pytest_collection_finish(session: Any) -> None:
    write("selected", "", count=len(session.items))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        write("failed", report.nodeid, **describe(report))


def pytest_runtest_logreport(report: Any) -> None:
    if report.skipped:
        # (path, line, "Skipped: reason")
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        write("skipped", report.nodeid, reason=reason.removeprefix("Skipped: "))
    elif report.failed:
        write("failed", report.nodeid, **describe(report), phase=report.when)
    elif report.when == "call":
        write("passed", report.nodeid)


def describe(report: Any) -> dict[str, Any]:
    """The error in one line, and the first lines of what pytest shows of it."""
    lines = report.longreprtext.strip().splitlines() or [""]
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message.strip().splitlines()[0] if crash and crash.message.strip() else ""
    return {"error": (message or lines[-1])[:300], "lines": [line[:300] for line in lines[:LINES]]}
