"""The structure: imports point left in ORDER, and each optional package has one importer.

`python tests/test_layout.py` prints the table of imports between folders.
"""

from __future__ import annotations

import ast
import configparser
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minilora"
PAGE = PACKAGE.parent / "CONTRIBUTING.md"

# Twelve levels. A folder or top-level file may import what stands left of it; what stands on one
# level with `|` between knows nothing of its neighbours. CONTRIBUTING quotes this line.
ORDER = (
    "errors, threads, display, progress < formats, cuda, precision, backend < protocols, "
    "arguments, arrays, graph, autograd < attention, losses, functional < data, effective, "
    "gradcheck < modules, containers, nn < optim, anomaly, quant < models | lora < training "
    "< tools | verify < lab < cli"
)
EXCEPTIONS = {("verify", "tools")}  # the one import between neighbours
EXEMPT = {
    "__init__",
    "__main__",
    "public",
}  # they collect public names, and import the whole package
IMPORTERS = {  # the only files that may import an optional package
    "cupy": ("backend.py", "cuda/"),
    "cupyx": ("backend.py", "cuda/"),
    "matplotlib": ("lab/plots.py",),
    "jinja2": ("data/sandboxed.py", "lab/report/page.py"),
    "tokenizers": ("data/sandboxed.py",),
    "plotly": ("lab/report/page.py",),
    # Of ranks that take a step together, and of ranks that take calls one by one.
    "mpi4py": ("training/ranks.py", "training/pool.py"),
    "huggingface_hub": ("formats/hub.py",),
}
NEVER = {"torch", "transformers", "peft", "safetensors", "scipy", "pickle", "importlib", "re"}
MOST_LINES = 700
FILES = sorted(PACKAGE.rglob("*.py"))


def levels() -> list[list[list[str]]]:
    """ORDER as levels of groups: groups are separated by `|`, the names in a group by commas."""
    return [
        [[name.strip() for name in group.split(",")] for group in level.split("|")]
        for level in ORDER.split("<")
    ]


def rank_of(name: str) -> tuple[int, int, int]:
    """(level, group, place in the group) of a folder or top-level file."""
    for i, level in enumerate(levels()):
        for j, group in enumerate(level):
            if name in group:
                return i, j, group.index(name)
    raise AssertionError(f"give {name!r} its place in ORDER")


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in EXCEPTIONS:
        return True
    here, there = rank_of(importer), rank_of(imported)
    if here[0] != there[0]:
        return there[0] < here[0]
    return here[1] == there[1] and there[2] < here[2]


def module_of(path: Path) -> tuple[str, ...]:
    """("lora", "config") of minilora/lora/config.py, and ("lora",) of minilora/lora/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, also those inside functions."""
    package = ["minilora", *path.relative_to(PACKAGE).parts[:-1]]
    result = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            result += [(module, alias.name) for alias in node.names]
    return result


MODULES = {module_of(path) for path in FILES}


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports, apart from the version."""
    result = set()
    for module, name in imports(path):
        parts = tuple(module.split("."))
        if parts[0] != "minilora" or (parts == ("minilora",) and name == "__version__"):
            continue
        inner = (*parts[1:], name)
        result.add(inner if inner in MODULES else parts[1:])
    return result


def table() -> Counter[tuple[str, str]]:
    """How many files of one folder import another folder: {(importer, imported): files}."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in FILES:
        if module_of(path)[0] not in EXEMPT:
            folders = {module[0] for module in imported_modules(path) if module}
            counts.update((module_of(path)[0], folder) for folder in folders)
    return counts


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_imports_point_left(path):
    here = module_of(path)[0]
    if here in EXEMPT:
        return
    for module in imported_modules(path):
        assert module, f"{here} imports the package itself"
        assert may_import(here, module[0]), (
            f"{'.'.join(module_of(path))} imports {'.'.join(module)}"
        )


def test_imports_form_no_circle_inside_a_folder():
    graph = {module_of(path): imported_modules(path) for path in FILES}
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        if module in done:
            return
        assert module not in trail, " -> ".join(".".join(m) for m in (*trail, module))
        for other in graph[module]:
            if other in graph and other[0] == module[0] and other != module:
                visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        if module[0] not in EXEMPT:
            visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_imports_of_optional_packages_have_one_file_each(path):
    packages = {module.split(".")[0] for module, _ in imports(path)}
    for package, importers in IMPORTERS.items():
        if package in packages:
            assert path.relative_to(PACKAGE).as_posix().startswith(importers)
    assert not packages & NEVER


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_imports_take_no_private_name_of_another_file(path):
    taken = [(m, n) for m, n in imports(path) if m.startswith("minilora") and n.startswith("_")]
    assert not [(m, n) for m, n in taken if n != "__version__"]


def test_public_names_are_not_modules_too():
    for init in PACKAGE.rglob("__init__.py"):
        modules = {p.stem for p in init.parent.iterdir() if p.suffix == ".py" or p.is_dir()}
        for node in ast.parse(init.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                assert not modules & set(ast.literal_eval(node.value))


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_files_say_what_they_are_and_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= MOST_LINES


def test_rules_are_quoted_word_for_word():
    assert ORDER in " ".join(PAGE.read_text(encoding="utf-8").split())


def test_package_data_covers_every_file_that_is_not_python():
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    data = settings["options.package_data"]
    for path in PACKAGE.rglob("*"):
        if path.is_dir():
            assert (path / "__init__.py").exists() or not list(path.glob("*.py")), path
        elif path.suffix not in (".py", ".pyc"):
            folder = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
            patterns = [pattern.strip() for pattern in data[folder].split(",")]
            assert any(path.match(pattern) for pattern in patterns), path


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("lora", "nn", True),
        ("nn", "lora", False),
        ("lora", "models", False),
        ("models", "lora", False),
        ("verify", "tools", True),
        ("tools", "verify", False),
        ("threads", "errors", True),
        ("errors", "threads", False),
    ],
)
def test_may_import_tells_left_from_right(importer, imported, allowed):
    assert may_import(importer, imported) is allowed


def main() -> None:
    counts = table()
    print("importer    imported (files)")
    for level in levels():
        for name in (name for group in level for name in group):
            row = [f"{other} {n}" for (here, other), n in counts.items() if here == name != other]
            print(f"{name:<11} {', '.join(sorted(row)) or '-'}")
    pairs = {pair for pair in counts if pair[0] != pair[1]}
    backwards = [pair for pair in pairs if not may_import(*pair)]
    print(f"{len(pairs)} imports between folders, {len(backwards)} backwards")


if __name__ == "__main__":
    main()
