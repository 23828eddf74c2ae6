"""The example as a notebook: the same cells as its program, and they run from `pip install` on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from notebooks import PROGRAM, notebook

ROOT = Path(__file__).parents[1]
SECONDS = 100  # for all cells


def test_notebook_is_made_from_its_program():
    text = PROGRAM.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == notebook(PROGRAM.read_text(encoding="utf-8")), (
        "run python tests/support/notebooks.py"
    )
    cells = json.loads(text)["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert not any(cell.get("outputs") for cell in cells)


@pytest.fixture
def kernel(tmp_path):
    """The Python of a new environment, which also sees the packages of this one."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: .[notebook]")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel: .[notebook]")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(packages)) + "\n")
    spec = tmp_path / "share" / "jupyter" / "kernels" / "fresh"
    spec.mkdir(parents=True)
    python = str(tmp_path / "env" / "bin" / "python")
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": argv, "display_name": "fresh", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    return nbclient, site


@pytest.mark.oracle
def test_notebook_runs_from_pip_install_to_a_merged_network(kernel, tmp_path, monkeypatch):
    nbclient, site = kernel
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    clone = tmp_path / "clone"  # pip leaves files in the folder that it installs from
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "runs", "build", "tests"))
    book = nbformat.reads(PROGRAM.with_suffix(".ipynb").read_text(encoding="utf-8"), 4)
    client = nbclient.NotebookClient(
        book,
        timeout=SECONDS,
        kernel_name="fresh",
        resources={"metadata": {"path": str(clone / "examples")}},
    )
    client.execute()  # raises for a cell that does
    assert list(site.glob("minilora-*.dist-info")), "pip did not install minilora"
    shown = "".join(
        output.get("text", "") for cell in book.cells for output in cell.get("outputs", [])
    )
    for line in ("nothing has changed", "without the adapter", "loaded", "merged"):
        (answer,) = [text for text in shown.splitlines() if text.startswith(line)]
        assert answer.endswith("True"), answer
    assert "Warning" not in shown
