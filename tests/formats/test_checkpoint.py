"""Atomic files, JSON, and the folders of models and adapters."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import open_descriptors, refused
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError, FormatError
from minilora.formats import (
    PEFT_CONFIG_DEFAULTS,
    Checkpoint,
    Entry,
    atomic_file,
    read_adapter,
    read_checkpoint,
    read_json,
    save_file,
    write_adapter,
    write_checkpoint,
    write_json,
)
from minilora.formats.disk import parse_json, quoted

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists())
ADAPTERS = sorted(path.name for path in GOLDEN.iterdir() if (path / "adapter_config.json").exists())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- atomic files ----


def test_atomic_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new" * 10_000)
        file.flush()
        assert path.read_bytes() == b"old"
        (temporary,) = set(os.listdir(tmp_path)) - {"a"}
        assert temporary.startswith(f".a.tmp-{os.getpid()}-")
    assert contents(tmp_path) == {"a": b"new" * 10_000}


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", [{}, {"a": b"old"}])
def test_atomic_file_leaves_everything_as_it_was_after_an_exception(tmp_path, problem, old):
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    before = open_descriptors()
    with pytest.raises(problem), atomic_file(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"half")
        file.flush()
        raise problem
    assert contents(tmp_path) == old
    assert open_descriptors() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_file_leaves_the_old_file_when_the_disk_fails(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"a": b"old"}


def test_atomic_file_syncs_the_bytes_before_the_rename_and_the_folder_after_it(
    tmp_path, monkeypatch
):
    calls = []
    fsync = os.fsync
    replace = os.replace

    def watched_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        calls.append("fsync folder" if is_folder else f"fsync {status.st_size} bytes")
        fsync(descriptor)

    def watched_replace(source: str, target: str) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    with atomic_file(tmp_path / "a") as file:
        file.write(b"12345")
    assert calls == ["fsync 5 bytes", "replace", "fsync folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_atomic_file_follows_the_umask_and_keeps_an_old_file_s_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        old = tmp_path / "old"
        old.touch()
        old.chmod(0o640)
        for path, mode in (tmp_path / "new", 0o666 & ~umask), (old, 0o640):
            with atomic_file(path) as file:
                file.write(b"x")
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_atomic_file_replaces_the_target_of_a_symbolic_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "target").write_bytes(b"old")
    for link, target in ("link", "target"), ("dangling", "fresh"):
        (tmp_path / link).symlink_to(tmp_path / "far" / target)
        with atomic_file(tmp_path / link) as file:
            file.write(b"new")
        assert (tmp_path / link).is_symlink()
    assert contents(tmp_path / "far") == {"target": b"new", "fresh": b"new"}


def test_atomic_file_replaces_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "loop", "folder", "absent/a", "n" * 300):
        with pytest.raises(OSError), atomic_file(tmp_path / name):
            raise AssertionError("never reached")
    with pytest.raises(FileExistsError), atomic_file("/dev/null"):
        raise AssertionError("never reached")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop", "pipe"]


def test_atomic_file_takes_the_longest_name_of_a_file_system(tmp_path):
    for name in ("n" * 255, "\u00e9" * 127):
        with atomic_file(tmp_path / name) as file:
            file.write(b"x")
    assert len(os.listdir(tmp_path)) == 2


# ---- JSON ----

CHARACTERS = st.characters(exclude_categories=["Cs"])  # halves of surrogate pairs are not text
TEXT = st.text(CHARACTERS, max_size=5)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(TEXT, JSON, max_size=3))
def test_write_json_and_read_json_return_the_same_value(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, value)
    assert read_json(path) == value
    text = path.read_text(encoding="utf-8")
    assert text == json.dumps(dict(sorted(value.items())), indent=2) + "\n", "inside, as it was"
    assert text.isascii()


BAD_JSON: dict[str, tuple[bytes, str]] = {}


def bad_json(case: str, content: bytes, message: str) -> None:
    BAD_JSON[case] = content, message


bad_json("empty", b"", "not valid JSON")
bad_json("not UTF-8", b'{"a": "\xff"}', "utf-8")
bad_json("UTF-16", '{"a": 1}'.encode("utf-16"), "utf-8")
bad_json("byte order mark", b"\xef\xbb\xbf{}", "BOM")
bad_json("lone surrogate", b'{"a": "\\ud800"}', "surrogates")
bad_json("lone surrogate in a key", b'{"\\uDFFF": 1}', "surrogates")
bad_json("truncated", b'{"a": 1', "not valid JSON")
bad_json("two", b"{} {}", "not valid JSON")
bad_json("trailing comma", b'{"a": 1,}', "not valid JSON")
bad_json("comment", b"{} // yes", "not valid JSON")
bad_json("single quotes", b"{'a': 1}", "not valid JSON")
bad_json("raw newline in a text", b'{"a": "\n"}', "not valid JSON")
bad_json("list", b"[]", "expected a JSON object, found list")
bad_json("null", b"null", "found NoneType")
bad_json("NaN", b'{"a": NaN}', "not valid JSON")
bad_json("Infinity", b'{"a": [-Infinity]}', "not valid JSON")
bad_json("1e400", b'{"a": {"b": 1e400}}', "not valid JSON")
bad_json("duplicate", b'{"a": 1, "a": 1}', "'a' appears twice")
bad_json("duplicate deep", b'{"x": [{"b": 1, "a": 2, "b": 3}]}', "'b' appears twice")
bad_json("duplicate by escape", b'{"a": 1, "\\u0061": 2}', "'a' appears twice")
bad_json("5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", "not an integer")
bad_json("21 digits", b'{"a": ' + b"9" * 21 + b"}", "not an integer")
bad_json("depth 65", b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64")
bad_json("depth 100,000", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 64")
bad_json("depth 100,000 unclosed", b"[" * 100_000, "deeper than 64")
bad_json(
    "depth hidden behind an escaped quote",
    b'{"\\\\\\"": "\\\\",  "b":' + b"[" * 100_000,
    "deeper than 64",
)
bad_json("control characters", b'{"\x1b[31m": 1}', "not valid JSON")
bad_json("half a MB, twice", b'{"%b": 1, "%b": 1}' % ((b"\\n" * 2**17,) * 2), "appears twice")
bad_json("2 MiB", b"{" + b" " * (2 << 20) + b"}", "expected at most 1048576")


@pytest.mark.parametrize("case", BAD_JSON)
def test_read_json_refuses_bad_json(tmp_path, case):
    content, message = BAD_JSON[case]
    (tmp_path / "bad.json").write_bytes(content)
    with refused(FormatError, message, tmp_path, f"JSON, {case}", "bad.json"):
        read_json(tmp_path / "bad.json")


def test_parse_json_has_exact_bounds(tmp_path):
    data = b'{"a": [1, {"b": "c"}]}'  # three texts, three lists and objects, three deep
    assert parse_json(data, "x", depth=3, values=6) == {"a": [1, {"b": "c"}]}
    for bounds in ({"depth": 2}, {"values": 5}, {"values": 2}):
        with pytest.raises(FormatError, match=r"nested deeper|lists, objects and texts"):
            parse_json(data, "x", **bounds)
    # Four deep, also after lists that were closed.
    with pytest.raises(FormatError, match="nested deeper"):
        parse_json(b'{"a": [[], [], [[]]]}', "x", depth=3)
    (tmp_path / "a").write_bytes(data)
    assert read_json(tmp_path / "a", limit=len(data))
    with pytest.raises(FormatError, match="expected at most"):
        read_json(tmp_path / "a", limit=len(data) - 1)


def test_read_json_reads_depth_64_and_does_not_count_brackets_in_texts(tmp_path):
    deep = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    (tmp_path / "a").write_bytes(deep)
    assert read_json(tmp_path / "a") == json.loads(deep)
    many = {'[[[[{{{{\\"' * 100: "\\" + "[" * 1000 + '"', "b": "\\\\"}
    write_json(tmp_path / "a", many)
    assert read_json(tmp_path / "a") == many


def test_read_json_reads_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(FormatError, match="not a regular file"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent")


UNREADABLE = [[], {1: 2, "1": 3}]
UNREADABLE += [{"a": value} for value in (float("nan"), float("inf"), {1, 2}, np.float32(1))]
UNREADABLE += [{"a": value} for value in ("\ud800", 2**70, b"")]


@pytest.mark.parametrize("value", UNREADABLE)
def test_write_json_refuses_what_could_not_be_read_back(tmp_path, value):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ConfigError, match="cannot be written as JSON") as caught:
        write_json(tmp_path / "a", value)
    assert len(str(caught.value)) <= 500
    assert contents(tmp_path) == {"a": b"old"}


def test_write_json_refuses_circular_and_too_deep_values(tmp_path):
    circle: dict[str, object] = {}
    circle["a"] = circle
    deep: dict[str, object] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for value in (circle, deep):
        with pytest.raises(ConfigError):
            write_json(tmp_path / "a", value)
    while deep:  # to free such a deep nest at once, CPython 3.10 would recurse
        deep = deep.pop("a")
    assert contents(tmp_path) == {}


def test_quoted_shows_both_ends():
    assert quoted("a" * 118) == repr("a" * 118)
    assert quoted("a" * 60 + "b" * 60 + "c" * 100) == "'" + "a" * 59 + "..." + "c" * 56 + "'"
    assert quoted("a" * 30 + "b" * 30, 20) == "'" + "a" * 9 + "..." + "b" * 6 + "'"
    assert quoted("\x1b" * 20, 40) == r"'\x1b\x1b\x1b\x1b\x1...\x1b\x1b\x1b\x1b'"


@given(st.text(), st.integers(10, 120))
def test_quoted_is_short_and_printable(text, limit):
    shown = quoted(text, limit)
    assert len(shown) <= limit
    assert shown.isprintable()
    if len(repr(text)) <= limit:
        assert shown == repr(text)


# ---- a base model's folder ----


def split(folder: Path, shards: int = 3) -> dict[str, str]:
    """Rewrite a whole checkpoint as shards; returns the weight map."""
    weight_map = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    with Checkpoint(folder) as whole:
        for i, key in enumerate(whole):
            shard = f"model-{1 + i % shards:05}-of-{shards:05}.safetensors"
            weight_map[key] = shard
            parts.setdefault(shard, {})[key] = whole.read(key)
    (folder / "model.safetensors").unlink()
    for shard, tensors in parts.items():
        save_file(folder / shard, tensors)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "model"))


@pytest.mark.parametrize("name", MODELS)
def test_write_checkpoint_rewrites_a_golden_model(tmp_path, name):
    config, checkpoint = read_checkpoint(GOLDEN / name)
    with checkpoint:
        tensors = {key: checkpoint.read(key) for key in checkpoint}
        assert checkpoint.keys() == list(tensors)
        assert config["model_type"] == name.partition("_")[0]
        norm, width = "model.norm.weight", "hidden_size"
        if name == "gpt2":
            norm, width = "transformer.ln_f.weight", "n_embd"
        assert checkpoint.shape(norm) == (config[width],)
        assert checkpoint.dtype(norm) == "F32"
        assert len(checkpoint) == len(tensors)
        assert checkpoint.read(norm, "float64").dtype == np.float64
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read(norm)
    new = tmp_path / "new" / "deep"
    write_checkpoint(new, config, tensors)
    assert sorted(os.listdir(new)) == ["config.json", "model.safetensors"]
    assert read_json(new / "config.json") == read_json(GOLDEN / name / "config.json")
    written = (new / "model.safetensors").read_bytes()
    assert written == (GOLDEN / name / "model.safetensors").read_bytes()


def test_read_checkpoint_joins_shards(model):
    with Checkpoint(model) as whole:
        expected = {key: whole.read(key) for key in whole}
    before = open_descriptors()
    split(model)
    with read_checkpoint(model)[1] as checkpoint:
        assert set(checkpoint) == set(checkpoint.keys()) == set(expected)
        for key, array in expected.items():
            assert key in checkpoint
            assert np.array_equal(checkpoint.read(key), array)
            assert np.array_equal(checkpoint.read_bits(key), array)
            assert (checkpoint.shape(key), checkpoint.dtype(key)) == (array.shape, "F32")
        with pytest.raises(FormatError, match=r"no tensor 'lm_tail\.weight' among its"):
            checkpoint.read("lm_tail.weight")
    assert open_descriptors() == before


def test_write_checkpoint_takes_entries(tmp_path, model):
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3)
    write_checkpoint(model, {"a": 1}, [Entry("x", "BF16", (2, 3), lambda: stored)])
    config, checkpoint = read_checkpoint(model)
    with checkpoint:
        assert config == {"a": 1}
        assert checkpoint.dtype("x") == "BF16"
        assert np.array_equal(checkpoint.read_bits("x"), stored)


def test_write_checkpoint_writes_the_weights_before_the_config(model, monkeypatch):
    """A reader of the new config reads the new weights; a failure leaves the folder as it was."""
    before = contents(model)
    with pytest.raises(FormatError):
        write_checkpoint(model, {"a": 1}, {"x": np.zeros(1, complex)})
    assert contents(model) == before


Change = Callable[[Path, dict[str, str]], object]
HOSTILE_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {}


def hostile_model(case: str, message: str, prepare: Callable[[Path], object]) -> None:
    HOSTILE_MODELS[case] = prepare, message


def hostile_index(case: str, message: str, change: Change) -> None:
    """A model in shards. `change` edits the folder or the weight map, or returns another one."""

    def prepare(folder: Path) -> None:
        weight_map = split(folder)
        changed = change(folder, weight_map)
        write_index(folder, weight_map if changed is None else changed)

    hostile_model(case, message, prepare)


def hostile_shard(case: str, message: str, shard: str) -> None:
    """A model in shards whose index names this one for its first tensor."""
    hostile_index(
        case, message, lambda folder, weights: weights.update({next(iter(weights)): shard})
    )


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def link_to(target: str) -> Change:
    """A shard that is a link."""

    def link(folder: Path, weights: dict[str, str]) -> None:
        shard = next(iter(weights.values()))
        (folder / shard).unlink()
        (folder / shard).symlink_to(target)

    return link


def absolute(folder: Path, weights: dict[str, str]) -> None:
    weights[next(iter(weights))] = str(folder / "model-00001-of-00003.safetensors")


def swap(folder: Path, weights: dict[str, str]) -> None:
    first, second = list(weights)[:2]
    weights[first], weights[second] = weights[second], weights[first]


def list_another(folder: Path, weights: dict[str, str]) -> None:
    weights["zzz"] = "model-00001-of-00003.safetensors"


def leave_out(folder: Path, weights: dict[str, str]) -> None:
    del weights["model.norm.weight"]


def damage(folder: Path, weights: dict[str, str]) -> None:
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"\0" * 9)


def weights_in_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def config_in_a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


hostile_model("no config", r"has no config\.json$", lambda m: (m / "config.json").unlink())
AN_ADAPTER = r"has no config\.json: it is an adapter's folder, not a model's$"
hostile_model("an adapter", AN_ADAPTER, rename("config.json", "adapter_config.json"))
NO_WEIGHTS = r"has no model\.safetensors"
hostile_model("no weights", NO_WEIGHTS, lambda m: (m / "model.safetensors").unlink())
A_PICKLE = r"'pytorch_model\.bin' is a pickle, and only safetensors are read"
hostile_model("only a pickle", A_PICKLE, rename("model.safetensors", "pytorch_model.bin"))
ONLY = "only safetensors are read"
hostile_model("only a .pt", ONLY, rename("model.safetensors", "m.pt"))
PICKLE = b"\x80\x04\x95" * 99
hostile_model(
    "a pickle under the right name",
    r"no \.bin, \.pt",
    lambda m: (m / "model.safetensors").write_bytes(PICKLE),
)
hostile_model("weights are a folder", "not a regular file", weights_in_a_folder)
hostile_model(
    "config is a list", "expected a JSON object", lambda m: (m / "config.json").write_text("[]")
)
hostile_model("config is a pipe", "not a regular file", config_in_a_pipe)
hostile_index("no weight_map", "weight_map must", lambda m, w: "x")
hostile_index("weight_map of numbers", "weight_map must", lambda m, w: {"a": 1})
hostile_shard("parent", "not the name of", "../secret.safetensors")
hostile_shard("absolute", "not the name of", "/etc/passwd.safetensors")
hostile_index("absolute, though inside", "not the name of", absolute)
hostile_shard("a folder below", "not the name of", "sub/model-00001-of-00003.safetensors")
hostile_shard("the folder itself", "not the name of", "./model-00002-of-00003.safetensors")
hostile_shard("a drive of Windows", "not the name of", "C:secret.safetensors")
hostile_shard("a hidden file", "not the name of", ".secret.safetensors")
hostile_shard("backslash", "not the name of", "..\\secret.safetensors")
hostile_shard("NUL", "not the name of", "a\0.safetensors")
hostile_shard("pickled shard", "not the name of", "pytorch_model-00001.bin")
hostile_shard("empty name", "not the name of", "")
hostile_index("a link to a folder", "not a regular file", link_to("."))
hostile_index("a link to a device", "not a regular file", link_to("/dev/zero"))
hostile_shard("missing shard", "is missing", "model-00009.safetensors")
hostile_shard("name of 255", "is missing", "x" * 243 + ".safetensors")
NO_NAME = "is not the name of a safetensors file"
hostile_shard("name of 256", NO_NAME, "x" * 244 + ".safetensors")
hostile_shard("10 kB name", NO_NAME, "\x1b" * 10_000 + ".safetensors")
ABSENT = "listed for it but not in it"
hostile_shard("by another way", "not the name", "../model/model-00002-of-00003.safetensors")
hostile_index("wrong shard", ABSENT, swap)
hostile_index("tensor not stored", f"'zzz' is {ABSENT}", list_another)
hostile_index("tensor not listed", "in it but not listed", leave_out)
hostile_index("damaged last shard", "not a safetensors file", damage)


@pytest.mark.parametrize("case", HOSTILE_MODELS)
def test_read_checkpoint_refuses_a_hostile_model(tmp_path, model, case):
    prepare, message = HOSTILE_MODELS[case]
    save_file(tmp_path / "secret.safetensors", {"x": np.zeros(1)})
    prepare(model)
    with refused(FormatError, message, tmp_path, f"model, {case}", "model"):
        read_checkpoint(model)


@pytest.mark.parametrize("target", ["nowhere", "model-00001-of-00003.safetensors"])
def test_read_checkpoint_names_a_link_that_leads_nowhere_or_in_a_circle(model, target):
    link_to(target)(model, split(model))
    says = "Too many levels" if "model" in target else "a symbolic link to 'nowhere', which is miss"
    before = open_descriptors()
    with pytest.raises(OSError, match=says) as caught:
        read_checkpoint(model)
    assert caught.value.filename == str(model / "model-00001-of-00003.safetensors")
    assert open_descriptors() == before


def test_read_checkpoint_follows_the_links_of_the_hub_s_cache(tmp_path, model):
    """Shards, and config.json, are links to files elsewhere."""
    with Checkpoint(model) as whole:
        expected = {key: whole.read(key) for key in whole}
    split(model)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(f"../blobs/{number}")
    config, checkpoint = read_checkpoint(model)
    with checkpoint:
        assert config["model_type"] == "llama"
        assert {key: checkpoint.read(key).tobytes() for key in checkpoint} == {
            key: array.tobytes() for key, array in expected.items()
        }


@pytest.mark.parametrize("read", [read_checkpoint, read_adapter])
def test_read_checkpoint_and_read_adapter_name_a_path_that_is_not_a_folder(tmp_path, read):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"nothing is downloaded.*someone/model"):
        read("someone/model")
    with pytest.raises(NotADirectoryError, match="file"):
        read(tmp_path / "file")


# ---- PEFT's folder ----


@pytest.mark.parametrize("name", ADAPTERS)
def test_write_adapter_rewrites_a_golden_adapter_byte_for_byte(tmp_path, name):
    config, tensors = read_adapter(GOLDEN / name)
    assert config.keys() >= PEFT_CONFIG_DEFAULTS.keys()
    assert config.keys() == PEFT_CONFIG_DEFAULTS.keys() or config["peft_type"] != "LORA"
    assert tensors
    write_adapter(tmp_path / "new", config, tensors)
    golden = contents(GOLDEN / name)
    written = contents(tmp_path / "new")
    assert written.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert written["adapter_config.json"] == golden["adapter_config.json"] + b"\n"
    assert written["adapter_model.safetensors"] == golden["adapter_model.safetensors"]


def test_write_adapter_writes_every_key_and_keeps_unknown_ones(tmp_path):
    before = dict(PEFT_CONFIG_DEFAULTS)
    write_adapter(tmp_path, {"r": 3, "unknown": {"x": [1]}}, {"k": np.zeros((3, 2), np.float32)})
    config, tensors = read_adapter(tmp_path)
    assert config == {**before, "r": 3, "unknown": {"x": [1]}}
    assert tensors["k"].shape == (3, 2)
    assert dict(PEFT_CONFIG_DEFAULTS) == before


def test_peft_config_defaults_are_those_of_the_golden_adapter():
    """The golden adapter sets a few fields; the others have PEFT's own defaults."""
    golden, _ = read_adapter(GOLDEN / "llama--lora")
    fields = {"r", "lora_alpha", "target_modules", "task_type", "base_model_name_or_path"}
    assert golden.keys() == PEFT_CONFIG_DEFAULTS.keys()
    for key in golden.keys() - fields:
        assert golden[key] == PEFT_CONFIG_DEFAULTS[key]
    assert (PEFT_CONFIG_DEFAULTS["r"], PEFT_CONFIG_DEFAULTS["lora_alpha"]) == (8, 8)


HOSTILE_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {}


def hostile_adapter(case: str, message: str, prepare: Callable[[Path], object]) -> None:
    HOSTILE_ADAPTERS[case] = prepare, message


def hostile_config(case: str, message: str, text: str) -> None:
    hostile_adapter(case, message, lambda a: (a / "adapter_config.json").write_text(text))


NO_CONFIG = r"has no adapter_config\.json"
NO_ADAPTER = r"has no adapter_model\.safetensors"
hostile_adapter("no config", NO_CONFIG, lambda a: (a / "adapter_config.json").unlink())
hostile_adapter(
    "no weights", f"{NO_ADAPTER}$", lambda a: (a / "adapter_model.safetensors").unlink()
)
BIN = r"adapter_model\.bin is a pickle and is not read"
hostile_adapter("a pickle", BIN, rename("adapter_model.safetensors", "adapter_model.bin"))
MLX = f"{NO_ADAPTER}: an adapter in mlx-lm's files, which `minilora convert --to peft` turns"
hostile_adapter("mlx-lm's", MLX, rename("adapter_model.safetensors", "adapters.safetensors"))
A_MODEL = f"{NO_CONFIG}: it is a model's folder, not an adapter's$"
hostile_adapter("a model", A_MODEL, rename("adapter_config.json", "config.json"))
SEVERAL = f"{NO_CONFIG}: it holds one adapter per task, each in its own folder"
hostile_adapter("several tasks", SEVERAL, rename("adapter_config.json", "multitask.json"))
hostile_config("config twice", "'r' appears twice", '{"r": 1, "r": 2}')
hostile_config("alpha is NaN", "not valid JSON", '{"lora_alpha": NaN}')
hostile_config("alpha is 1e400", "not valid JSON", '{"lora_alpha": 1e400}')
hostile_adapter(
    "cut weights",
    "the file holds",
    lambda a: os.truncate(a / "adapter_model.safetensors", 1200),
)


@pytest.mark.parametrize("case", HOSTILE_ADAPTERS)
def test_read_adapter_refuses_a_hostile_adapter(tmp_path, case):
    adapter = Path(shutil.copytree(GOLDEN / "llama--lora", tmp_path / "adapter"))
    prepare, message = HOSTILE_ADAPTERS[case]
    prepare(adapter)
    with refused(FormatError, message, tmp_path, f"adapter, {case}", "adapter"):
        read_adapter(adapter)


def test_parse_json_refuses_one_changed_byte_or_reads_it_as_json_does():
    source = (GOLDEN / "llama--lora" / "adapter_config.json").read_bytes()
    refused = 0
    for place, byte in enumerate(source):
        for changed in (bytes([byte ^ 1]), bytes([byte ^ 128]), b""):
            text = source[:place] + changed + source[place + 1 :]
            try:
                assert parse_json(text, "a.json") == json.loads(text)
            except FormatError:
                refused += 1
    assert refused > len(source)


FORBIDDEN = {"eval", "exec", "importlib", "__import__", "allow_pickle", "socket", "urllib", "mmap"}
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy
before = set(sys.modules)
import minilora.formats
print(*sorted(set(sys.modules) - before))
"""


def test_formats_cannot_run_code_or_reach_the_network():
    """Nothing that executes, unpickles or connects is imported; NumPy's pickles are not read."""
    folder = Path(__file__).parents[2] / "minilora" / "formats"
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        words = set(text.replace("(", " ").replace(".", " ").split())
        assert not words & FORBIDDEN
    command = [sys.executable, "-c", SCRIPT, str(folder.parent.parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = result.stdout.split()
    assert "minilora.formats.disk" in loaded
    assert not {"socket", "ssl", "urllib.request", "mmap"} & set(loaded)


@pytest.mark.oracle
def test_peft_config_defaults_are_those_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    if peft.__version__ != PEFT_CONFIG_DEFAULTS["peft_version"]:
        pytest.skip("another peft")
    peft.LoraConfig(inference_mode=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == PEFT_CONFIG_DEFAULTS


def test_write_adapter_changes_both_files_or_neither(tmp_path, monkeypatch):
    write_adapter(tmp_path, {"r": 1}, {"a": np.zeros(3, np.float32)})
    before = contents(tmp_path)
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left.*adapter_model\.safetensors"):
        write_adapter(tmp_path, {"r": 2}, {"a": np.ones(3, np.float32)})
    assert contents(tmp_path) == before
