"""Bad and odd bases: the Hugging Face hub's cache, names of models, codes, rare dtypes, tokenizers
with more tokens than their model (hostile.py)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hostile import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    CONFIG,
    EVALUATE,
    MERGE,
    Build,
    World,
    add,
    both,
    changed_tensors,
    command,
    edited,
    first_shard,
    nothing,
    removed,
    set_to,
    split,
    write_index,
)

from minilora import CausalLM
from minilora.data.tokenizer import load_tokenizer
from minilora.errors import DataError, FormatError
from minilora.formats import Entry, SafetensorsFile, write_stream
from minilora.quant import quantize

# ---- the hub's cache -----------------------------------------------------------------------------

MODEL = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = Path("hub", "models--org--model")
REFERENCE = REPOSITORY / "refs" / "main"
SNAPSHOT = REPOSITORY / "snapshots" / COMMIT
SHARD = "model-00001-of-00003.safetensors"


def make_cache(folder: Path) -> None:
    """The base in three shards as the hub's cache has it: links to blobs."""
    snapshot = folder / SNAPSHOT
    blobs = folder / REPOSITORY / "blobs"
    shutil.copytree(folder / "base", snapshot)
    split(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    (folder / REFERENCE).parent.mkdir()
    (folder / REFERENCE).write_text(COMMIT)


def loading(name: str) -> Callable[[World], object]:
    """Load a model of this name, with the row's folder `hub` for the cache."""

    def load(world: World) -> None:
        with mock.patch.dict(os.environ, {"HF_HUB_CACHE": str(world.folder / "hub")}):
            CausalLM.from_pretrained(name)

    return load


def cache(name: str, change: Build, ends: Any, *says: str) -> None:
    add(42, f"hub's cache: {name}", both(make_cache, change), loading(MODEL), ends, *says)


def reference(content: bytes) -> Build:
    return lambda folder: (folder / REFERENCE).write_bytes(content)


def linked(path: Path, target: str) -> Build:
    """A file that is replaced by a link."""

    def build(folder: Path) -> None:
        (folder / path).unlink()
        (folder / path).symlink_to(target)

    return build


def naming(shard: str) -> Build:
    """An index that names this shard for its first tensor."""

    def build(folder: Path) -> None:
        shutil.rmtree(folder / SNAPSHOT)
        shutil.copytree(folder / "base", folder / SNAPSHOT)
        weight_map = split(folder / SNAPSHOT)
        first_shard(shard)(folder / SNAPSHOT, weight_map)
        write_index(folder / SNAPSHOT, weight_map)

    return build


def replaced_by_folder(path: Path) -> Build:
    return both(removed(str(path)), lambda folder: (folder / path).mkdir())


def replaced_by_pipe(path: Path) -> Build:
    return both(removed(str(path)), lambda folder: os.mkfifo(folder / path))


def add_cache_rows() -> None:
    cache("good", nothing, None)
    cache("a line break after the commit", reference(COMMIT.encode() + b"\n"), None)
    cache("links to another disk", linked(SNAPSHOT / SHARD, "/dev/zero"), FormatError, "regular")
    contents = (b"../..", b"../../../base", b"/etc", b"", b"\n", b"main", b"\0" * 40, b"\x1b[2J")
    contents += (
        COMMIT.upper().encode(),
        COMMIT[:-1].encode(),
        COMMIT.encode() + b"0",
        b"f" * 10**6,
    )
    contents += (COMMIT.encode() + b"/../..", COMMIT.encode() + b"\n\n..", b"\xff" * 40)
    says = ("refs/main", "40 hexadecimal digits", "download the model again")
    for content in contents:
        cache(f"refs/main of {content[:45]!r}", reference(content), FormatError, *says)
    for build in (replaced_by_folder(REFERENCE), replaced_by_pipe(REFERENCE)):
        cache(f"refs/main is a {build.__name__}", build, FormatError, "refs/main", "regular file")
    cache("refs/main in a circle", linked(REFERENCE, "main"), OSError, "refs/main", "links")
    missing = ("no snapshot of 'main'", "nothing is downloaded", "--download")
    cache("no refs/main", removed(str(REFERENCE)), FileNotFoundError, *missing)
    other = reference(COMMIT[::-1].encode())
    cache("refs/main of a snapshot that is gone", other, FileNotFoundError, *missing)
    none = lambda folder: shutil.rmtree(folder / SNAPSHOT)  # noqa: E731
    cache("no snapshot", none, FileNotFoundError, *missing)
    circle = both(none, lambda folder: (folder / SNAPSHOT).symlink_to(COMMIT))
    cache("a snapshot in a circle", circle, FileNotFoundError, *missing)
    for shard in ("../x.safetensors", "../../blobs/0.safetensors", "/x.safetensors"):
        says = ("model.safetensors.index.json", repr(shard), "not the name of")
        cache(f"an index that names {shard}", naming(shard), FormatError, *says)
    says = (SHARD, "regular file")
    cache("a link to a folder", linked(SNAPSHOT / SHARD, ".."), FormatError, *says)
    says = (SHARD, "a symbolic link to '../../blobs/gone', which is missing")
    gone = linked(SNAPSHOT / SHARD, "../../blobs/gone")
    cache("a link that leads nowhere", gone, FileNotFoundError, *says)
    cache("links in a circle", linked(SNAPSHOT / SHARD, SHARD), OSError, SHARD, "links")
    config = linked(SNAPSHOT / "config.json", "../../blobs/gone")
    says = ("config.json", "a symbolic link to '../../blobs/gone', which is missing")
    cache("a config.json that leads nowhere", config, FileNotFoundError, *says)


def add_name_rows() -> None:
    """Names that are no folder, and that the hub does not have either: nothing is looked up."""
    names = ["../x", "org/../../x", "/org/model", "org/model/", "org//model", "a/b/c", "org\\model"]
    names += ["org/mod el", "org/model\n", "org/\x1b[31m", "org/model\0", "org/m\u00f6del", "org/."]
    names += [
        "org/..",
        "org/.model",
        "-org/model",
        "org/model.git",
        "a--b/model",
        "~/model",
    ]
    names += ["org/model@", "org/model@..", "org/model@../main", "org/model@a//b", "org/model@a/.."]
    names += [
        "org/model@refs/../../..",
        "org/model@main@main",
        "$HOME/model",
        "http://org/model",
        "",
    ]
    for name in names:
        says = ("no such model folder", "not a model's name on the hub", "nothing is downloaded")
        build = both(make_cache, nothing)
        add(36, f"model {name!r}", build, loading(name), FileNotFoundError, *says)
    for name in ("org/model@other", "org/model@refs/pr/1", "org/other", f"org/model@{'0' * 40}"):
        says = ("no such model folder", "models--org--", "no snapshot of", "--download")
        add(36, f"model {name}", make_cache, loading(name), FileNotFoundError, *says)
    command(36, f"evaluate --data book.txt --base org/{'x' * 5000} --download", 4, "no such model")
    command(36, "evaluate --data book.txt --base ../x --download", 4, "no such model", "../x")


# ---- codes, and dtypes that are not read ---------------------------------------------------------

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
HALVE = "convert base --dtype float16 --out new"


def quantized(folder: Path) -> None:
    quantize(CausalLM(CONFIG, seed=1)).save_pretrained(folder / "base")


def with_unread(folder: Path) -> None:
    """The base with one more tensor, of a dtype that is not read."""
    with SafetensorsFile(folder / BASE_WEIGHTS) as file:
        entries = [
            Entry(k, file.dtype(k), file.shape(k), lambda k=k: file.read_bits(k)) for k in file
        ]
        entries.append(Entry("extra", "F8_E4M3", (3,), lambda: np.zeros(3, np.uint8)))
        write_stream(folder / BASE_WEIGHTS, entries)


def as_unread(tensor: str) -> Build:
    """The base with the dtype of one tensor changed to one that is not read."""

    def build(folder: Path) -> None:
        with SafetensorsFile(folder / BASE_WEIGHTS) as file:
            entries = []
            for key in file:
                dtype, shape = file.dtype(key), file.shape(key)
                if key == tensor:
                    size = int(np.prod(shape))
                    entries.append(
                        Entry(key, "F8_E5M2", shape, lambda n=size: np.zeros(n, np.uint8))
                    )
                else:
                    entries.append(Entry(key, dtype, shape, lambda k=key: file.read_bits(k)))
            write_stream(folder / BASE_WEIGHTS, entries)

    return build


def add_code_rows() -> None:
    def damaged(change: Callable[[dict[str, np.ndarray]], object]) -> Build:
        return both(quantized, changed_tensors(BASE_WEIGHTS, change))

    cases: dict[str, tuple[Build, tuple[str, ...]]] = {}
    short = damaged(lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}))
    cases["too few codes"] = short, ("q_proj", "(127, 1)", "(16, 16)")
    absent = damaged(lambda t: t.pop(f"{Q_PROJ}.absmax"))
    cases["no absmax"] = absent, ("q_proj", "missing weight.absmax")
    state = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
    for name, content in (("no JSON", b"{"), ("a large shape", b'{"shape": [9e99, 1]}')):
        bad = damaged(lambda t, c=content: t.update({state: np.frombuffer(c, np.uint8)}))
        cases[f"a state of {name}"] = bad, ("q_proj", "quant_state")
    gone = damaged(lambda t: t.pop(Q_PROJ))
    cases["no codes"] = gone, ("no tensor", Q_PROJ)
    lost = damaged(lambda t: t.pop(state))
    cases["no state"] = lost, ("q_proj", "expected one weight.quant_state")
    for name, (build, says) in cases.items():
        for line in (MERGE, HALVE):
            add(63, f"{line[:8]}: codes, {name}", build, line, 3, "base", *says)
    for method in ("gptq", "awq", "fp8", "../evil", None, 4):
        build = set_to(BASE_CONFIG, quantization_config={"quant_method": method})
        for line in (MERGE, HALVE):
            says = ("config.json", "it is quantized", "quant_method must be", "made from")
            add(63, f"{line[:8]}: quantized by {method}", build, line, 2, *says)
    scheme = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    build = set_to(BASE_CONFIG, quantization_config=scheme)
    for line in (MERGE, HALVE):
        command(63, line, 3, "quantization_config says nf4", "no layer is stored", build=build)


def add_unread_rows() -> None:
    command(33, "inspect base", None, build=with_unread)
    command(33, "diff base base", None, build=with_unread)
    command(33, HALVE, 3, "'extra'", "(3,)", "F8_E4M3", "not read", build=with_unread)
    command(33, EVALUATE, 3, "unknown extra", build=with_unread)
    for line in (MERGE, EVALUATE, HALVE):
        command(33, line, 3, "base", Q_PROJ, "F8_E5M2", build=as_unread(Q_PROJ))
    tied = set_to(BASE_CONFIG, tie_word_embeddings=True)
    head = both(tied, as_unread("lm_head.weight"))
    add(33, "a tied head of F8", head, EVALUATE, 3, "lm_head.weight", "F8_E5M2")


# ---- tokenizers with more tokens than the model --------------------------------------------------


def add_more_token_rows() -> None:
    has_package = importlib.util.find_spec("tokenizers") is not None
    for id in (256, 100_000, 2**31, 2**32 - 1):

        def add_token(fields: dict[str, Any], id: int = id) -> None:
            token = {"id": id, "content": "zz", "special": False, "normalized": False}
            token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            fields["model"]["vocab"]["zz"] = id
            fields["added_tokens"].append(token)

        def with_it(world: World) -> None:
            load_tokenizer("base", 256).encode("a zz")

        def without_it(world: World) -> None:
            load_tokenizer("base", 256).encode("a z")

        build = edited("base/tokenizer.json", add_token)
        says = ["tokenizer.json"]
        if has_package and id < 2**31:
            says += ["token 'zz'", f"id {id}", "ids 0 to 255"]
        add(52, f"a token of id {id} occurs", build, with_it, DataError, *says)
        ends = None if has_package else DataError
        add(52, f"a token of id {id} does not occur", build, without_it, ends)


add_cache_rows()
add_name_rows()
add_code_rows()
add_unread_rows()
add_more_token_rows()
