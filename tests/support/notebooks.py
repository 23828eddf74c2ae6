"""A notebook made from a program in percent form: `python tests/support/notebooks.py` writes it.

`# %%` begins a cell of code, `# %% [markdown]` one of comments. The program's docstring is the
first cell, and a line `# %pip ...` is a command of the notebook alone. Nothing is run: the notebook
has no outputs, and the same program gives the same bytes.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[2] / "examples" / "10_mlp.py"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(program: str) -> str:
    """The text of the .ipynb file (nbformat 4.5) of a program in percent form."""
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


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    lines = text.splitlines(keepends=True)
    cell = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}, "source": lines}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


if __name__ == "__main__":
    text = notebook(PROGRAM.read_text(encoding="utf-8"))
    PROGRAM.with_suffix(".ipynb").write_text(text, encoding="utf-8")
