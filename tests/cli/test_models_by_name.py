"""Every command takes a base by its name on the hub, and reads it from the cache."""

from __future__ import annotations

import io
import json
import shutil
import sys
import types
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from pages import stand_in

from minilora.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAIN = "--data book.txt --steps 2 --batch-size 2 --context 8 --threads 1"
SHAPE = "--hidden-size 8 --intermediate-size 8 --num-hidden-layers 1 --num-attention-heads 2"


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(line.split())
    return code, out.getvalue(), err.getvalue()


def put(cache: Path, name: str, source: Path) -> Path:
    """A model's folder in the cache, as links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(source, repository / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    with chdir(folder):
        Path("book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
        for name, seed in (("base", 0), ("tuned", 1)):
            code, _, err = run(f"pretrain {TRAIN} {SHAPE} --seed {seed} --out {name}")
            assert code == 0, err
        assert run(f"finetune --base base {TRAIN} --out adapter")[0] == 0
        assert run("merge --base base --adapter adapter --out merged")[0] == 0
        for name in ("base", "tuned"):
            put(folder / "cache", f"org/{name}", folder / name)
            shutil.rmtree(folder / name)
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in(monkeypatch)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


LINES = {
    "generate": "generate --base org/base --prompt the --max-new-tokens 2",
    "evaluate": "evaluate --base org/base --data book.txt --limit 1",
    "merge": "merge --base org/base --adapter adapter --out new",
    "audit": "audit --base org/base --adapter adapter --merged merged",
    "compare": "compare adapter adapter --base org/base --data book.txt",
    "inspect": "inspect org/base",
    "inspect --base": "inspect adapter --base org/base",
    "inspect --data": "inspect adapter --base org/base --data book.txt",
    "diff": "diff org/base org/tuned",
    "graph": "graph --base org/base --block 0",
    "report": "report --base org/base --adapter adapter --data book.txt --out new.html",
    "extract": "extract --base org/base --tuned org/tuned --r 2 --out new",
    "convert": "convert org/base --dtype float16 --out new",
    "verify": "verify --base org/base --adapter adapter",
    "finetune": f"finetune --base org/base {TRAIN} --out new",
    "finetune --adapter": f"finetune --base org/base --adapter adapter {TRAIN} --out new",
    "finetune full": f"finetune --base org/base --method full {TRAIN} --out new",
    "plan": f"plan --base org/base {TRAIN}",
    "lab rates": f"lab rates --base org/base {TRAIN}",
    "sweep": f"sweep --grid r=1,2 --base org/base {TRAIN} --out new",
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_commands_find_a_model_in_the_hub_s_cache(world, name, revision):
    line = LINES[name].replace("org/base", f"org/base{revision}")
    code, _, err = run(line)
    assert code == 0, err
    for config in Path().glob("new/**/adapter_config.json"):
        fields = json.loads(config.read_text())
        assert fields["base_model_name_or_path"] == "org/base", "not a path of this machine"
    if name == "finetune full":
        assert Path("new/tokenizer.json").is_file()
        assert not Path("new/tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", LINES)
def test_commands_say_where_they_looked_for_a_model(world, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_CACHE", str(world / "nowhere"))
    code, _, err = run(LINES[name])
    assert code == 4
    (line,) = err.splitlines()
    for words in ("error: no such model folder", "hub's cache", "--download", "'org/base'"):
        assert words in line
    assert not Path("new").exists()


@pytest.mark.parametrize("name", LINES)
def test_commands_download_a_model_only_when_told_to(world, made, monkeypatch, name):
    calls: list[str] = []

    def snapshot_download(model: str, **options: Any) -> str:
        calls.append(model)
        source = made / "cache" / f"models--{model.replace('/', '--')}" / "blobs"
        return str(put(Path(options["cache_dir"]), model, source))

    package: Any = types.ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setenv("HF_HUB_CACHE", str(world / "new cache"))
    assert run(LINES[name])[0] == 4
    assert not calls
    code, _, err = run(f"{LINES[name]} --download")
    assert code == 0, err
    names = ["org/base", "org/tuned"]
    assert calls == [model for model in names if model in LINES[name]]


def test_sweep_continues_with_and_without_download(world):
    """What a sweep is does not depend on where its base came from."""
    line = LINES["sweep"]
    assert run(line)[0] == 0
    code, _, err = run(f"{line} --download")
    assert code == 0, err
    assert "download" not in Path("new/sweep.json").read_text()
    code, _, err = run(f"sweep --grid download=true,false --base org/base {TRAIN} --out other")
    assert code == 2
    assert "--download cannot be an axis" in err


def test_find_models_comes_after_other_mistakes(world):
    """So that nothing is downloaded for a command that cannot run."""
    code, _, err = run(f"finetune --base org/none --download {TRAIN} --out new --r 0")
    assert code == 2
    assert "--r" in err or "r must be" in err
