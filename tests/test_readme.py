"""What the pages say must be true: README's snippet, CONTRIBUTING's tree, commands, links."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import test_layout as layout

from minilora.cli import COMMANDS, build_parser
from minilora.cli.options import hyphenate
from minilora.lab import protocol

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "benchmarks/README.md",
        "examples/README.md",
        "examples/commands.md",
        "examples/files.md",
    )
]
MOST_WORDS = 1550  # of the first page, with its program and its tables
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "minilora"


def blocks(language: str, page: str = README) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def command_lines() -> list[str]:
    """What follows `minilora` in each line of the pages that shows a command."""
    lines = []
    for page in PAGES:
        for block in blocks("", page.read_text(encoding="utf-8")):
            shown = re.findall(r"^(?:mpiexec .* -m )?minilora (\w.*)$", block, re.MULTILINE)
            lines += [line for line in shown if "..." not in line]
    return lines


def test_the_snippet_prints_what_the_page_says():
    (snippet,) = blocks("python")
    expected = README.split("It prints\n\n```\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_the_two_commands_are_the_first_install_lines():
    lines = [line for line in README.splitlines() if line.startswith("python -m pip install -e")]
    assert len(lines) == 2
    assert lines[0].endswith("&& python -m minilora demo")
    assert lines[1].endswith("&& python -m pytest -n auto --dist loadfile")


def test_first_page_is_short():
    words = [word for word in README.split() if set(word) - set("|-")]
    assert len(words) <= MOST_WORDS


@pytest.mark.parametrize("line", command_lines())
def test_a_command_on_a_page_has_known_options(line):
    argv = hyphenate(shlex.split(line, comments=True))
    _, unknown = build_parser(argv).parse_known_args(argv)
    assert not unknown


def test_every_command_is_on_the_first_page_and_has_an_example():
    names = {command.run.__name__ for command in COMMANDS}
    table = README.split("## Commands")[1].split("\n## ")[0]
    first = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(first))) == names
    shown = {line.split()[0] for line in command_lines()}
    assert names - shown <= {"demo", "devices"}  # one is the first command of all


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    places = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [p for p in places if "://" not in p and not (page.parent / p).exists()]
    assert places
    assert not missing


def test_reading_path_has_the_promised_minutes_and_counts_every_line():
    """A minute is 25 lines; what the files import, and need not be read, is counted too."""
    section = README.split("## Reading path")[1].split("\n## ")[0]
    path = []
    for names, minutes in re.findall(r"^\| ([^|]*\.py) \| (\d+) \|", section, re.MULTILINE):
        files = [PACKAGE / name for name in names.split(", ")]
        assert abs(sum(map(count_lines, files)) / 25 - int(minutes)) <= 3, names
        path += files
    modules = {layout.module_of(file) for file in layout.FILES}
    needed = {layout.module_of(file) for file in path}
    todo = list(needed)
    while todo:
        for module in layout.imported_modules(file_of(todo.pop())):
            if module in modules - needed:
                needed.add(module)
                todo.append(module)
    read = sum(map(count_lines, path))
    rest = sum(count_lines(file_of(module)) for module in needed) - read
    promised = [int(n.replace(",", "")) for n in re.findall(r"(\d+,\d{3}) (?:lines|more)", section)]
    assert [abs(a - b) <= 100 for a, b in zip((read, rest), promised, strict=True)] == [True, True]


def count_lines(file):
    return len(file.read_text(encoding="utf-8").splitlines())


def file_of(module):
    return next(file for file in layout.FILES if layout.module_of(file) == module)


def test_tree_in_contributing_names_every_file_and_no_other():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = page.split("```\nminilora/")[1].split("\ntests/")[0]
    named, folders = set(), []
    for line in tree.splitlines()[1:]:
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = folders[: depth // 2 - 1]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join(folders) + name)
    files = (
        p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".cu") and not p.name.startswith("__")
    )
    assert named == {p.relative_to(PACKAGE).as_posix() for p in files}


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("[0-9]*.py")), ids=lambda p: p.stem
)
def test_an_example_is_short_and_says_what_you_should_see(example):
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert "You should see" in text.split('"""')[1]


@pytest.mark.parametrize("name", ["01_autograd_by_hand", "03_lora", "06_adalora"])
def test_an_example_runs(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some leave a picture
    values = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out
    assert "False" not in out
    if name == "06_adalora":  # the claim: ranks go where the updates are
        assert min(values["found"].values()) >= values["RANK"]
        assert np.mean(values["others"]) < 0.5


@pytest.mark.parametrize(("name", "count"), [("04_qlora", 2), ("05_dora", 3), ("07_multitask", 5)])
def test_an_example_of_an_experiment_runs_in_its_quick_form(
    name, count, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(protocol, "BriefPlan", lambda: protocol.Plan(quick=True))
    values = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "bits per byte" in capsys.readouterr().out
    assert len(values["rows"]) == count
    if name == "07_multitask":  # what holds before training, too
        assert values["error"] < 1e-5
        assert values["reached"] == ["python"]
        assert values["same"]


def test_every_dependency_has_a_reason_on_the_page():
    sections = (
        (ROOT / "setup.cfg")
        .read_text(encoding="utf-8")
        .split("install_requires =")[1]
        .split("[options.entry_points]")[0]
    )
    packages = set(
        re.findall(r"^\s*(?:\w+ = )?([a-z][a-z0-9-]+)(?:\[\w+\])?\s*[>=]=", sections, re.MULTILINE)
    )
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.split("## Dependencies")[1].split("## Papers")[0]
    missing = {name for name in packages if name.replace("cupy-cuda13x", "cupy") not in table}
    assert packages >= {"numpy", "tqdm", "threadpoolctl", "matplotlib", "torch", "pytest"}, packages
    assert not missing
    assert sys.version_info >= (3, 11)
