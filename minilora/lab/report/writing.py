"""Writes a report as one HTML file, and never over a file that is something else."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import ConfigError
from ...formats import atomic_file
from .content import Report

MARK = b"<!-- a report of minilora -->\n"  # the end of every file that is written here


def why_unavailable() -> str | None:
    """Why no page can be written here; None if one can."""
    from .page import why_unavailable as why

    return why()


def require_available() -> None:
    """ConfigError if no page can be written here."""
    reason = why_unavailable()
    if reason:
        raise ConfigError(reason)


def require_replaceable(path: Path) -> None:
    """ConfigError for a place where a report must not be written; OSError if its folder is missing.

    An earlier report may be replaced.
    """
    if path.is_dir():
        raise ConfigError(f"--out {str(path)!r:.200} is a folder: give a file that ends in .html")
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out must end in .html, got {str(path)!r:.200}")
    os.stat(path.parent)
    if os.path.lexists(path) and not _is_report(path):
        raise ConfigError(
            f"{str(path)!r:.200} exists and is not a report of minilora: move it away, or choose "
            "another file with --out"
        )


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(MARK)))
        return file.read() == MARK


def write_page(report: Report, path: Path) -> int:
    """Write the whole page, or leave the file as it was; returns the number of bytes."""
    from .page import render

    data = render(report).encode("utf-8", "replace") + b"\n" + MARK
    with atomic_file(path) as file:
        file.write(data)
    return len(data)
