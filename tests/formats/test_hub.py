"""Models by their names on the hub: folders first, then the cache, then a download if asked for."""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import open_descriptors
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError
from minilora.formats.hub import HubName, cache_folder, find_model, model_name, read_name

GOLDEN = Path(__file__).parents[1] / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an empty folder to work in."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


def snapshot(cache: Path, name: str, commit: str = COMMIT) -> Path:
    """A model's snapshot in the cache."""
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    shutil.copytree(GOLDEN / "llama", folder)
    return folder


def refer(cache: Path, name: str, reference: str, commit: str = COMMIT) -> None:
    path = cache / f"models--{name.replace('/', '--')}" / "refs" / reference
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/d", "HF_HOME": "/b"}, "/d"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HOME": "~/b"}, "/home/me/b/hub"),
        ({"HF_HUB_CACHE": "$HOME/a"}, "/home/me/a"),
        ({"HF_HUB_CACHE": ""}, "/home/me/.cache/huggingface/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_cache_folder_follows_the_variables_of_huggingface_hub(monkeypatch, variables, expected):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected


@pytest.mark.parametrize("name", ["org/model", "gpt2", "Org-1/a_b.C-2", "0/1"])
@pytest.mark.parametrize(
    ("given", "reference"),
    [("", "main"), ("@v1.0", "v1.0"), ("@refs/pr/1", "refs/pr/1"), (f"@{COMMIT}", None)],
)
def test_find_model_reads_the_cache(cache, name, given, reference):
    folder = snapshot(cache, name)
    snapshot(cache, name, OTHER)
    if reference is not None:
        refer(cache, name, reference)
    before = open_descriptors()
    assert find_model(name + given) == str(folder)
    assert open_descriptors() == before
    assert model_name(folder) == name


def test_find_model_takes_a_local_folder_or_file_first(cache):
    snapshot(cache, "org/model")
    refer(cache, "org/model", "main")
    Path("org").mkdir()
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        make(Path("org/model"))
        assert find_model("org/model") == "org/model"
        assert find_model(Path("org/model"), download=True) == "org/model"
        if os.path.isdir("org/model"):
            os.rmdir("org/model")
        else:
            os.unlink("org/model")
    assert find_model("org/model") != "org/model"


def test_find_model_says_where_it_looked_and_what_to_do(cache):
    with pytest.raises(FileNotFoundError) as caught:
        find_model("org/model")
    text = str(caught.value)
    for words in ("no such model folder", str(cache / "models--org--model"), "'main'"):
        assert words in text
    assert "nothing is downloaded): give a folder, or --download" in text
    assert caught.value.filename == "org/model"
    with pytest.raises(FileNotFoundError, match=r"of 'v2'.*org/model@v2"):
        find_model("org/model@v2")


LETTERS = st.text("aZ0_.-/@~ \\\n\0:é", max_size=12)


@given(LETTERS | st.text(max_size=12))
def test_read_name_gives_parts_that_stay_inside_a_folder(text):
    wanted = read_name(text)
    if wanted is None:
        return
    for part in (*wanted.name.split("/"), *wanted.revision.split("/")):
        assert part.isascii()
        assert set(part) & set("/\\:~$@ \n\0") == set()
        assert part[0] not in ".-"
        assert ".." not in part
    assert "--" not in wanted.name
    folder = os.path.normpath(wanted.folder)
    assert os.path.dirname(folder) == os.path.normpath(cache_folder())


def test_read_name_reads_names_and_revisions():
    assert read_name("org/model") == HubName("org/model", "main")
    assert read_name("gpt2@refs/pr/3") == HubName("gpt2", "refs/pr/3")
    assert read_name("a" * 96) is not None
    assert read_name("a" * 97) is None
    for text in (
        "a/b/c",
        "a--b",
        "a/b.git",
        "a/b@",
        ".a",
        "a.",
        "-a",
        "a/",
        "/a",
        "@main",
        "a@b@c",
    ):
        assert read_name(text) is None


@pytest.mark.oracle
@given(LETTERS)
def test_read_name_accepts_only_what_huggingface_hub_accepts(text):
    utils = pytest.importorskip("huggingface_hub.utils")
    wanted = read_name(text)
    if wanted is not None:
        utils.validate_repo_id(wanted.name)


@pytest.mark.oracle
def test_find_model_finds_what_huggingface_hub_finds(cache):
    hub = pytest.importorskip("huggingface_hub")
    folder = snapshot(cache, "org/model")
    refer(cache, "org/model", "main")
    cached = hub.try_to_load_from_cache("org/model", "config.json", cache_dir=cache_folder())
    assert os.path.dirname(cached) == find_model("org/model") == str(folder)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (f"/x/models--org--model/snapshots/{COMMIT}", "org/model"),
        (f"models--gpt2/snapshots/{COMMIT}/", "gpt2"),
        ("/x/models--a--b--c/snapshots/1", "/x/models--a--b--c/snapshots/1"),
        ("/x/models--/snapshots/1", "/x/models--/snapshots/1"),
        ("/x/other--a--b/snapshots/1", "/x/other--a--b/snapshots/1"),
        ("/x/models--a--b/blobs", "/x/models--a--b/blobs"),
        ("base", "base"),
        (".", "."),
    ],
)
def test_model_name_is_the_hub_s_for_a_snapshot_alone(folder, name):
    assert model_name(folder) == name


# ---- downloads -----------------------------------------------------------------------------------


@pytest.fixture
def downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of a stand-in for the package, which puts a snapshot into the cache."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / "llama", folder)
        refer(cache, name, options["revision"])
        return str(folder)

    package: Any = types.ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    return calls


def test_find_model_downloads_only_what_is_asked_for_and_missing(cache, downloads):
    with pytest.raises(FileNotFoundError):
        find_model("org/model@v2")
    assert not downloads
    folder = find_model("org/model@v2", download=True)
    assert folder == find_model("org/model@v2") == find_model("org/model@v2", download=True)
    (call,) = downloads
    patterns = call.pop("allow_patterns")
    assert call == {"name": "org/model", "revision": "v2", "cache_dir": str(cache)}
    assert not [p for p in patterns if p.endswith((".bin", ".py", ".pt", ".gguf")) or p == "*"]


def leave_config_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_a_blob(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")


def leave_one_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    "damage", [leave_config_alone, lose_a_blob, leave_one_shard, lose_config, lambda folder: None]
)
def test_find_model_completes_a_download_that_was_stopped(
    cache: Path, downloads: list[Any], damage: Callable[[Path], None]
) -> None:
    folder = snapshot(cache, "org/model")
    refer(cache, "org/model", "main")
    damage(folder)
    assert find_model("org/model", download=True) == str(folder)
    assert len(downloads) == (damage.__name__ != "<lambda>")


def test_find_model_never_downloads_a_name_that_the_hub_has_not(downloads):
    for name in (
        "../x",
        "/org/model",
        "org/..",
        "org/mod el",
        "org/model\n",
        "a/b/c",
        "http://x/y",
    ):
        with pytest.raises(FileNotFoundError, match="not a model's name on the hub"):
            find_model(name, download=True)
    assert not downloads


class Unreachable(Exception):
    """An error of a package, not an OSError."""


@pytest.mark.parametrize("error", [Unreachable("no\nroute"), ValueError("bad"), OSError("gone")])
def test_find_model_names_a_download_that_fails(downloads, monkeypatch, error):
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fail)
    says = f"org/model at main could not be downloaded: {type(error).__name__}: "
    with pytest.raises(OSError, match=says) as caught:
        find_model("org/model", download=True)
    assert str(caught.value).isprintable()


def test_find_model_names_the_package_that_downloads(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"needs the package 'huggingface_hub': pip install .*hf"):
        find_model("org/model", download=True)
