"""What commands print: tables, and text that cannot control the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import printable

__all__ = ["print_table", "printable"]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows with the same keys, with columns as wide as they need to be."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([printable(str(row[key])) for key in rows[0]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = map(str.ljust, line, widths)
        print("  ".join(cells).rstrip())
