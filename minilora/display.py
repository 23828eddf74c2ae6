"""What commands print: tables, and text that cannot steer the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, in columns as wide as they need to be."""
    widths = {
        key: max(len(key), *(len(printable(str(row[key]))) for row in rows)) for key in rows[0]
    }
    print("  ".join(f"{key:{width}}" for key, width in widths.items()).rstrip())
    for row in rows:
        print(
            "  ".join(
                f"{printable(str(row[key])):{width}}" for key, width in widths.items()
            ).rstrip()
        )


def printable(text: str, kept: str = "") -> str:
    """Control characters but the `kept` ones could steer the terminal, or look like another line: show them escaped."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
