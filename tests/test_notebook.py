"""Examples as notebooks: the same cells as their programs, and they run from `pip install` on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from notebooks import PLACEHOLDER, PROGRAMS, ROOT, notebook, notebook_of, read_repository

SECONDS = 120  # that a cell may take
MLP, LESSON = PROGRAMS
RESULTS = {  # of an experiment, as `minilora lab` writes them, in what the lesson reads
    "experiment": "rank",
    "made_with": {"quick": False},
    "verdict": "in part",
    "parts": [
        {
            "what": "share of the gain",
            "claimed": "at least 0.95",
            "mean": 0.5,
            "half_width": 0.125,
            "seeds": 3,
            "verdict": "does not hold here",
        }
    ],
    "note": "",
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_notebook_is_made_from_its_program(program):
    text = program.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == notebook_of(program), "run python tests/support/notebooks.py"
    cells = json.loads(text)["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert not any(cell.get("outputs") for cell in cells)


def test_notebook_of_the_lesson_opens_in_colab_once_the_repository_has_an_address():
    settings = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    addressed = settings.replace("[metadata]", "[metadata]\nurl = https://github.com/me/lora.git")
    assert read_repository(addressed) == "me/lora"
    assert read_repository("[metadata]\nurl = https://example.org/lora") == PLACEHOLDER
    assert read_repository("") == PLACEHOLDER
    text = notebook(LESSON.read_text(encoding="utf-8"), read_repository(addressed))
    badge = "https://colab.research.google.com/github/me/lora/blob/main/examples/lesson.ipynb"
    assert badge in text
    assert "git+https://github.com/me/lora" in text
    assert PLACEHOLDER not in text


def test_notebook_of_the_lesson_has_ten_sections_with_assertions():
    cells = json.loads(notebook_of(LESSON))["cells"]
    sections = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("## "):
            heading = source.splitlines()[0]
            sections[heading] = ""
        elif cell["cell_type"] == "code" and sections:
            sections[heading] += source
    numbered = [heading for heading in sections if heading[3:].split(".")[0].isdigit()]
    assert [int(heading[3:].split(".")[0]) for heading in numbered] == [*range(1, 11)]
    for heading in numbered:
        assert "\nassert " in sections[heading], heading
        assert heading.endswith(")"), heading  # the heading in Russian


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """(program) -> what its notebook prints, in a new environment that has no minilora yet.

    The environment's Python also sees the packages of this one. The notebook runs in a clone.
    """
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: .[notebook]")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel: .[notebook]")
    nbformat = pytest.importorskip("nbformat")
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
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    clone = tmp_path / "clone"  # pip leaves files in the folder that it installs from
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "runs", "build", "tests"))

    def run(program: Path):
        book = nbformat.reads(program.with_suffix(".ipynb").read_text(encoding="utf-8"), 4)
        client = nbclient.NotebookClient(
            book,
            timeout=SECONDS,
            kernel_name="fresh",
            resources={"metadata": {"path": str(clone / "examples")}},
        )
        client.execute()  # raises for a cell that does
        assert list(site.glob("minilora-*.dist-info")), "pip did not install minilora"
        return book, "".join(output.get("text", "") for output in _outputs(book))

    return run


def _outputs(book):
    return [output for cell in book.cells for output in cell.get("outputs", [])]


@pytest.mark.oracle
def test_notebook_runs_from_pip_install_to_a_merged_network(execute):
    _, shown = execute(MLP)
    for line in ("nothing has changed", "without the adapter", "loaded", "merged"):
        (answer,) = [text for text in shown.splitlines() if text.startswith(line)]
        assert answer.endswith("True"), answer
    assert "Warning" not in shown


@pytest.mark.oracle
@pytest.mark.timeout(600)
def test_notebook_of_the_lesson_runs_and_shows_pictures_and_verdicts(execute, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: .[plot]")
    folder = tmp_path / "clone" / "runs" / "lab" / "rank"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    published = tmp_path / "clone" / "examples" / "lab"
    (published / "qlora.json").unlink()
    layers = json.loads((published / "layers.json").read_text(encoding="utf-8"))
    book, shown = execute(LESSON)
    pictures = [output for output in _outputs(book) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 9
    assert "rank: in part\n" in shown  # measured
    assert "  share of the gain: 0.50 +- 0.12, claimed at least 0.95: does not hold here" in shown
    assert f"layers: {layers['verdict']}\n" in shown  # published
    assert "run `minilora lab qlora`" in shown  # neither
    assert "\nrank           in part " in shown  # the table at the end
    assert "\nqlora          not measured yet " in shown
    assert "Warning" not in shown
