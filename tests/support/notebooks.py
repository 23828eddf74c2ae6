"""Notebooks made from programs in percent form: `python tests/support/notebooks.py` writes them.

`# %%` begins a cell of code, `# %% [markdown]` one of comments. The program's docstring is the
first cell, and a line `# %pip ...` is a command of the notebook alone. Nothing is run: a notebook
has no outputs, and the same program gives the same bytes.

OWNER/REPO stands for the repository on GitHub until setup.cfg has its `url`.
"""

from __future__ import annotations

import ast
import configparser
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAMS = [ROOT / "examples" / name for name in ("10_mlp.py", "lesson.py")]
PLACEHOLDER = "OWNER/REPO"
GITHUB = "https://github.com/"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def read_repository(settings: str) -> str:
    """OWNER/REPO of the GitHub address in the text of a setup.cfg, or the placeholder."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(settings)
    url = parser.get("metadata", "url", fallback="")
    if not url.startswith(GITHUB):
        return PLACEHOLDER
    return url.removeprefix(GITHUB).rstrip("/").removesuffix(".git")


def notebook(program: str, repository: str = PLACEHOLDER) -> str:
    """The text of the .ipynb file (nbformat 4.5) of a program in percent form."""
    program = program.replace(PLACEHOLDER, repository)
    first, *parts = re.split(r"^# %%", program, flags=re.MULTILINE)
    cells = [_cell(1, "markdown", ast.get_docstring(ast.parse(first)) or "")]
    for number, part in enumerate(parts, start=2):
        head, _, body = part.partition("\n")
        is_markdown = head.strip() == "[markdown]"
        pattern = r"^# ?" if is_markdown else r"^# (?=%pip )"
        text = re.sub(pattern, "", body.strip("\n"), flags=re.MULTILINE)
        cells.append(_cell(number, "markdown" if is_markdown else "code", text))
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    book = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def notebook_of(program: Path) -> str:
    """The notebook of one of PROGRAMS, with the repository's address if it has one."""
    repository = read_repository((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    return notebook(program.read_text(encoding="utf-8"), repository)


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    lines = text.splitlines(keepends=True)
    cell = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}, "source": lines}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


if __name__ == "__main__":
    for program in PROGRAMS:
        program.with_suffix(".ipynb").write_text(notebook_of(program), encoding="utf-8")
