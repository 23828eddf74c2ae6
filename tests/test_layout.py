"""The structure: imports point one way, cupy and matplotlib have a room each, private names stay private."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minilora"

# A room may import any room that stands above it here, and those on its own line only where a line says so below.
ORDER = [
    ["errors"],
    ["architecture", "backend", "formats.disk"],
    ["formats.safetensors"],
    ["formats.checkpoint", "formats.adapter"],
    ["formats"],
    ["autograd", "lora.patterns"],
    ["functional", "lora.targets"],
    ["fused"],
    ["gradcheck", "nn", "tokenizer", "texts", "data", "cache", "weights"],
    ["chat.rendering", "optim", "quant", "gpt2", "lora.config"],
    ["chat"],
    ["records"],
    ["bitsandbytes", "halves"],
    ["pretrained"],
    ["transformer"],
    ["lora.lora", "decoding"],
    ["lora.adalora", "lora.dora", "lora.hydra", "lora.merging", "generate"],
    ["lora.layer"],
    ["lora.embedding"],
    ["lora.tokens"],
    ["lora.plan"],
    ["lora.keys", "lora.injection", "lora.combining"],
    ["lora.model"],
    ["lora.multitask"],
    ["lora"],
    ["tools"],
    ["tools.adapters", "tools.leading"],
    ["inspection", "recipes", "verify.case"],
    ["verify.measuring"],
    [
        "verify.of_lora",
        "verify.of_layers",
        "verify.of_dora",
        "verify.of_adalora",
        "verify.of_codes",
    ],
    ["verify.of_tasks", "verify.of_sums", "verify.of_ends"],
    ["verify.properties"],
    ["verify.run"],
    ["verify"],
    ["parallel", "runs"],
    ["tools.folders"],
    ["tools.merging", "tools.comparing", "tools.factoring", "tools.converting"],
    ["tools.combining"],
    ["anomaly"],
    ["train"],
    ["plots"],
    ["demo"],
    ["cli.shown"],
    ["cli.files"],
    ["cli.options"],
    ["cli.commands"],
    ["cli"],
    ["", "__main__"],
]
RANK = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Besides the order: lora knows no transformer, files know no model, and the command line starts without drawing.
FORBIDDEN = {
    ("lora.model", "transformer"),
    ("lora.layer", "transformer"),
    ("lora.lora", "transformer"),
    ("lora.embedding", "transformer"),
    ("lora.adalora", "transformer"),
    ("lora.dora", "transformer"),
    ("lora.hydra", "transformer"),
    ("lora.multitask", "transformer"),
    ("cli", "plots"),
    ("cli.options", "plots"),
}
ROOMS = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, also those inside functions."""
    found = []
    package = ["minilora", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for module, name in imports(path):
        if module.split(".")[0] == "minilora":
            inner = module.removeprefix("minilora").removeprefix(".")
            deeper = f"{inner}.{name}" if inner else name
            found.add(deeper if deeper in RANK else inner)
    return found


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_imports_point_one_way(path):
    room = room_of(path)
    assert room in RANK, f"give {room} its place in ORDER"
    for other in rooms_imported(path):
        if other == "" and room in ("cli.options", "__main__"):
            continue  # the version
        assert RANK[other] < RANK[room], f"{room} imports {other}"
        assert (room, other) not in FORBIDDEN, f"{room} imports {other}"


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_optional_packages_have_one_room_each(path):
    packages = {module.split(".")[0] for module, _ in imports(path)}
    assert "cupy" not in packages or room_of(path) == "backend"
    assert "matplotlib" not in packages or room_of(path) == "plots"
    assert "jinja2" not in packages or room_of(path) == "chat.rendering"
    assert not packages & {
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "scipy",
        "pickle",
        "importlib",
        "re",
    }


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_no_room_takes_a_private_name_of_another(path):
    taken = [
        (m, n)
        for m, n in imports(path)
        if m.startswith("minilora") and n.startswith("_") and n != "__version__"
    ]
    assert not taken


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_a_room_says_what_it_is_and_stays_readable(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 600
