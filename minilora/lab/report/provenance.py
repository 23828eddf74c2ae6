"""What a report was made from: settings, the SHA-256 of files, and versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ... import __version__
from ...formats.disk import name_errors
from ...progress import progress_bar
from .content import Fact

BLOCK = 1 << 20
WEIGHTS = (".safetensors", ".json")  # the files of a folder that say what a model computes
NOT_WEIGHTS = ("command.json", "summary.json")


def list_provenance(
    settings: Mapping[str, object], command: Sequence[str], files: Mapping[str, Path]
) -> list[Fact]:
    """Settings, the command, hashes by what a file is for, and versions.

    files   files, or folders of weights
    """
    facts = [Fact(name, str(value)) for name, value in settings.items()]
    if command:
        facts.append(Fact("command", " ".join(["minilora", *command])))
    paths: dict[str, Path] = {}
    for label, path in files.items():
        if path.is_dir():
            paths |= {f"{label}: {one.name}": one for one in _files_of(path)}
        elif path.is_file():
            paths[f"{label}: {path.name}"] = path
    for label in progress_bar(list(paths), desc="SHA-256", unit=" files", leave=False):
        facts.append(Fact(f"SHA-256 of {label}", hash_file(paths[label])))
    facts.append(Fact("minilora", __version__))
    facts.append(Fact("Python", platform.python_version()))
    facts.append(Fact("NumPy", np.__version__))
    return facts


def _files_of(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in WEIGHTS and path.name not in NOT_WEIGHTS and path.is_file()
    ]


def hash_file(path: Path) -> str:
    """SHA-256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with name_errors(path), open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
