"""Bad and odd files: safetensors, JSON, folders of bases and adapters, tokenizers (hostile.py)."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile import (
    ADAPTER_CONFIG,
    ADAPTER_KEY,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_WEIGHTS,
    EVALUATE,
    FINETUNE,
    GENERATE,
    MERGE,
    Build,
    Tensors,
    World,
    add,
    both,
    broken,
    changed_tensors,
    command,
    cut,
    edited,
    first_shard,
    nothing,
    removed,
    renamed,
    replaced_by_pipe,
    set_to,
    split,
    with_tensor,
    write_index,
    written,
)

from minilora import CausalLM, PeftModel
from minilora.data.special import default_tokens, named_tokens, read_special_tokens
from minilora.data.texts import read_text
from minilora.data.tokenizer import MAX_TOKENIZER_BYTES, HubTokenizer, load_tokenizer
from minilora.errors import ConfigError, DataError, FormatError, NonFiniteError
from minilora.formats import (
    SafetensorsFile,
    load_file,
    read_adapter,
    read_checkpoint,
    read_json,
    save_file,
)
from minilora.formats.disk import MAX_JSON_BYTES
from minilora.formats.safetensors import MAX_HEADER_BYTES

# ---- safetensors ---------------------------------------------------------------------------------

FILE = "hostile.safetensors"
BIG = 2**62
FOUR = b"\0" * 4


def raw(header: object, data: bytes = b"", *, pad: bytes = b"") -> bytes:
    """The bytes of a safetensors file. A header that is not bytes is written as JSON."""
    if isinstance(header, bytes):
        text = header + pad
    else:
        text = json.dumps(header, separators=(",", ":")).encode() + pad
    return len(text).to_bytes(8, "little") + text + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def byte(begin: int) -> dict[str, object]:
    """The entry of one byte without dimensions."""
    return entry("U8", [], [begin, begin + 1])


F32 = entry()
J32 = json.dumps(F32).encode()
JSON_ENTRY = b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[%b,4]}}'


def bad(
    kind: int, name: str, content: bytes | Callable[[], bytes], *says: str, worst: bool = False
) -> None:
    """A file of tensors that is refused."""
    read = lambda world: load_file(FILE)  # noqa: E731
    add(
        kind, name, written(FILE, content), read, FormatError, FILE, *says, whole=False, worst=worst
    )


def bad_header(kind: int, name: str, header: object, *says: str, **options: bool) -> None:
    """A header before four bytes of data."""
    bad(kind, name, raw(header, FOUR), *says, **options)


def bad_entry(kind: int, *says: str, worst: bool = False, **fields: object) -> None:
    """One tensor `a`, four bytes of data, and an entry with `fields` that are wrong."""
    name = f"entry with {fields!r:.60}"
    bad(kind, name, raw({"a": entry(**fields)}, FOUR), "'a'", *says, worst=worst)


def odd(kind: int, name: str, content: bytes, values: dict[str, Any]) -> None:
    """A file of tensors that is odd, but good."""

    def check(world: World) -> None:
        loaded = load_file("odd.safetensors")
        assert {key: array.tolist() for key, array in loaded.items()} == values
        assert all(array.flags.carray for array in loaded.values())

    add(kind, name, written("odd.safetensors", content), check, None, whole=False)


def add_safetensors_rows() -> None:
    reader = "not a safetensors file"
    bad(1, "empty", b"", reader)
    bad(2, "7 bytes", b"\0" * 7, reader)
    bad(3, "N = 0", b"\0" * 8, reader)
    bad(3, "N = 1", raw(b"{"), reader)
    bad(4, "N = 2^64 - 1", b"\xff" * 8 + b"{}", reader, worst=True)
    bad(5, "N = 2^63", (2**63).to_bytes(8, "little") + b"{}", reader, worst=True)
    bad(6, "N one beyond the file", (3).to_bytes(8, "little") + b"{}", reader)

    def sparse(folder: Path) -> None:
        (folder / FILE).write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
        os.truncate(folder / FILE, MAX_HEADER_BYTES + 100)

    read = lambda world: load_file(FILE)  # noqa: E731
    says = (FILE, "header", "100000001")
    add(6, "N beyond the limit", sparse, read, FormatError, *says, whole=False, worst=True)
    bad(7, "not UTF-8", raw(b'{"\xff":1}'), "utf-8")
    bad(8, "byte order mark", raw(b"\xef\xbb\xbf{}"), "must begin")
    bad_header(9, "lone surrogate", b'{"\\ud800":%b}' % J32, "surrogate")
    bad(10, "truncated JSON", raw(b'{"a":}'), "not valid JSON")
    bad(10, "two objects", raw(b"{}{}"), "not valid JSON")
    bad(11, "top level list", raw(b"[]"), "must begin")
    bad(11, "top level null", raw(b"null"), "must begin")
    bad(12, "NaN", raw(b'{"__metadata__":{"a":NaN}}'), "not valid JSON")
    bad_header(12, "Infinity", JSON_ENTRY % (b"Infinity", b"0"), "not valid JSON")
    bad_entry(13, "integers", shape=[1.0])
    bad_header(13, "size 1e0", JSON_ENTRY % (b"1e0", b"0"), "integers")
    bad_entry(13, "integers", shape=[True])
    bad_entry(13, "integers", offsets=[False, 4])
    bad_header(13, "offset -0", JSON_ENTRY % (b"1", b"-0"), "-0")
    bad_entry(13, "integers", shape={})
    bad(14, "nesting 200", raw(b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"), "deeper than 3")
    deep = b"[" * 100_000 + b"]" * 100_000
    bad(14, "nesting 100,000", raw(b'{"a":' + deep + b"}"), "deeper than 3", worst=True)
    bad(14, "nesting unclosed", raw(b"{" + b"[" * 100_000 + b"}"), "deeper than 3")
    bad(14, "nesting behind a quote", raw(b'{"\\\\":' + deep + b"}"), "deeper than 3")
    bad_header(15, "5,000 digits", JSON_ENTRY % (b"9" * 5000, b"0"), "integer")
    brackets = lambda: raw(b'{"a":[' + b"[]," * 1_400_000 + b"[]]}")  # noqa: E731
    bad(16, "4 MB of brackets", brackets, "lists, objects and texts", worst=True)
    quotes = lambda: raw(b'{"a":[' + b'"",' * 1_400_000 + b'""]}')  # noqa: E731
    bad(16, "4 MB of quotes", quotes, "lists, objects and texts", worst=True)
    quotes = lambda: raw(b"{" + b'"' * 4_000_000 + b"}")  # noqa: E731
    bad(16, "4 MB of quotes alone", quotes, "lists, objects and texts", worst=True)
    bad_header(17, "name twice", b'{"a":%b,"a":%b}' % (J32, J32), "'a'", "twice")
    long = b"n" * 2**20
    bad(17, "1 MB name twice", lambda: raw(b'{"%b":1,"%b":1}' % (long, long)), "twice")
    bad_header(18, "field twice", b'{"a":{"dtype":"F32",%b}' % J32[1:], "'dtype'", "twice")
    bad(18, "metadata twice", raw(b'{"__metadata__":{},"__metadata__":{}}'), "twice")
    bad(18, "metadata key twice", raw(b'{"__metadata__":{"a":"1","a":"2"}}'), "twice")
    bad(19, "trailing tab", raw(b"{}", pad=b"\t"), "end with")
    bad(19, "trailing newline", raw(b"{}", pad=b" \n"), "end with")
    bad(19, "trailing NUL", raw(b"{}", pad=b"\0"), "end with")
    for lead in (b"\0", b"\x0b", b"\x0c", b"\xc2\xa0", b" \x0c "):
        bad(19, f"leading {lead!r}", raw(lead + b"{}"), "must begin")
    bad(19, "a MB of spaces alone", lambda: raw(b" " * 2**20), "must begin", worst=True)
    bad_entry(20, "exactly dtype", extra=1)
    bad_header(20, "entry is a list", {"a": [1, 2]}, "'a'", "exactly dtype")
    bad(20, "entry is null", raw({"a": None}), "'a'", "exactly dtype")
    for value in ([], {"a": 1}, {"a": {}}):
        bad(21, f"metadata {value}", raw({"__metadata__": value}), "__metadata__", "strings only")
    bad_header(21, "metadata like a tensor", {"__metadata__": F32}, "__metadata__", "strings only")
    bad_entry(22, "integers >= 0", shape=[-1])
    bad_entry(22, "integers >= 0", shape=[-1, -1])
    bad_entry(23, "integers >= 0", offsets=[-4, 0])
    bad_entry(23, "bytes", "offsets", offsets=[4, 0])
    bad_entry(23, "2 offsets", offsets=[0, 4, 4])
    bad_entry(23, "2 offsets", offsets=[0])
    bad_entry(23, "integers", offsets="04")
    bad(24, "gap at the front", raw({"a": entry(offsets=[4, 8])}, FOUR * 2), "byte 4, expected 0")
    gap = raw({"a": F32, "b": entry(offsets=[8, 12])}, FOUR * 3)
    bad(24, "gap in the middle", gap, "'b'", "byte 8, expected 4")
    bad(25, "trailing byte", raw({"a": F32}, FOUR + b"\0"), "4 bytes", "holds 5")
    bad(25, "trailing zip", raw({"a": F32}, FOUR + b"PK\x05\x06" + b"\0" * 18), "4 bytes")
    bad(25, "data without tensors", raw({}, b"\0"), "0 bytes", "holds 1")
    bad(26, "missing byte", raw({"a": F32}, b"\0" * 3), "4 bytes", "holds 3")
    bad(27, "full overlap", raw({"a": F32, "b": F32}, FOUR), "byte 0, expected 4")
    across = {"a": entry("F64", [1], [0, 8]), "b": entry(offsets=[4, 8])}
    bad(28, "partial overlap", raw(across, FOUR * 2), "expected 8")
    inside = {"a": F32, "b": entry(shape=[0], offsets=[2, 2])}
    bad_header(28, "empty tensor inside another", inside, "expected 4")
    for shape in ([0, BIG, BIG], [0, 2**63 - 1]):
        empty = raw({"a": entry(shape=shape, offsets=[0, 0])})
        bad(30, f"shape {shape}", empty, "no array can have")
    bad_entry(31, "no array can have", shape=[2**33, 2**33], worst=True)
    bad_entry(31, "no array can have", shape=[BIG], worst=True)
    bad_entry(31, "no array can have", shape=[2**64])
    bad_entry(31, "no array can have", shape=[2**32 + 1, 2**32 - 1])
    large = {"a": entry(shape=[2**40], offsets=[0, 2**42])}
    bad_header(31, "4 TiB that are missing", large, "the file holds 4", worst=True)
    bad_entry(32, "at most 64 dimensions", shape=[1] * 65)
    bad_entry(32, "at most 64 dimensions", shape=[1] * 1000)
    for dtype in ("f32", "O", None, ["F32"]):
        bad_entry(33, "unsupported dtype", dtype=dtype)
    bad_entry(33, "F8_E4M3", "(4,)", "not read", dtype="F8_E4M3", shape=[4])
    bad_entry(33, "F4", "(8,)", "not read", dtype="F4", shape=[8])
    complex64 = raw({"a": entry("C64", [1], [0, 8])}, FOUR * 2)
    bad(33, "dtype C64", complex64, "C64", "not read")
    bad_entry(33, "unsupported dtype", dtype="F6", shape=[4])
    bad_entry(34, "do not fill whole bytes", dtype="F4", shape=[7])
    bad_entry(34, "do not fill whole bytes", dtype="F6_E3M2", shape=[2, 3])
    bad_entry(34, "take 3 bytes", dtype="F6_E2M3", shape=[4])
    bad_entry(31, "no array can have", dtype="F4", shape=[2**61])
    bad(33, "1 MB dtype", lambda: raw({"a": entry("\n" * 2**18)}, FOUR), "unsupported dtype")
    bad_entry(34, "2 bytes", dtype="F16")
    for field in F32:
        missing = {name: value for name, value in F32.items() if name != field}
        bad_header(34, f"no {field}", {"a": missing}, "'a'", "exactly dtype")
    bad(35, "BOOL byte 2", raw({"a": entry("BOOL", [4])}, b"\0\1\2\1"), "'a'", "neither 0 nor 1")
    bad_header(36, "terminal escape in a bad entry", {"\x1b[31m" * 100: entry("f32")}, r"\x1b")
    named = {"n" * 2**20: entry("f32", [9] * 9)}
    bad(36, "1 MB name of a bad entry", lambda: raw(named, FOUR), "unsupported dtype")
    bad(41, "a pickle", b"\x80\x02}q\x00X\x01\x00\x00\x00x" * 20, ".bin, .pt")
    bad(41, "a zip", b"PK\x03\x04" + b"\0" * 400, reader)


def add_odd_safetensors_rows() -> None:
    odd(10, "no tensors", raw({}), {})
    empty = {
        "b": entry("U8", [1], [0, 1]),
        "a": entry("I8", [0, 2], [1, 1]),
        "c": entry("U8", [0], [0, 0]),
    }
    values = {"b": [7], "a": [], "c": []}
    odd(29, "tensors without elements share an offset", raw(empty, b"\7"), values)
    odd(29, "no dimensions", raw({"a": byte(0)}, b"\5"), {"a": 5})
    names = ["", "\0", "../../etc/passwd", "\x1b[2J"]
    named = {name: byte(i) for i, name in enumerate(names)}
    odd(36, "names with a meaning", raw(named, FOUR), dict.fromkeys(names, 0))
    twins = {"\u00e9": byte(0), "e\u0301": byte(1)}
    odd(36, "two spellings of one letter", raw(twins, b"\1\2"), {"\u00e9": 1, "e\u0301": 2})
    brackets = '[[[[{{{"\\"\\\\"[[[[' * 50
    odd(36, "brackets and quotes", raw({brackets: byte(0)}, b"\1"), {brackets: 1})
    pair = b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    odd(9, "a whole pair of surrogates", raw(pair, b"\1"), {"\U0001f600": 1})
    header = {"u": entry("U8", [1], [0, 1]), "f": entry("I32", [1], [1, 5])}
    misaligned = raw(header, b"\1\2\0\0\0", pad=b" ")
    odd(37, "misaligned, odd header", misaligned, {"u": [1], "f": [2]})


# ---- files that change, and paths that are not files ---------------------------------------------


def cut_after_opening(world: World) -> None:
    """The file is cut between the header and the data; afterwards it is as it was."""
    path = Path(BASE_WEIGHTS)
    before = path.read_bytes()
    times = path.stat()
    try:
        with SafetensorsFile(path) as file:
            os.truncate(path, len(before) // 2)
            file.read("model.norm.weight")
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced_after_opening(world: World) -> None:
    """An open file still reads the old content."""
    with SafetensorsFile(BASE_WEIGHTS) as file:
        expected = file.read("model.norm.weight")
        save_file("other", {"y": np.zeros(3)})
        os.replace(BASE_WEIGHTS, "aside")
        os.replace("other", BASE_WEIGHTS)
        assert np.array_equal(file.read("model.norm.weight"), expected)
    os.replace("aside", BASE_WEIGHTS)


def add_path_rows() -> None:
    says = ("model.safetensors", "'model.norm.weight'")
    add(39, "cut after opening", nothing, cut_after_opening, FormatError, *says)
    add(39, "replaced after opening", nothing, replaced_after_opening, None)
    read = lambda world: load_file("x")  # noqa: E731
    folder = lambda f: (f / "x").mkdir()  # noqa: E731
    add(40, "a folder", folder, read, FormatError, "'x'", whole=False)
    pipe = lambda f: os.mkfifo(f / "x")  # noqa: E731
    add(40, "a pipe", pipe, read, FormatError, "'x'", "regular file")
    loop = lambda f: (f / "x").symlink_to("x")  # noqa: E731
    add(40, "a loop", loop, read, OSError, "'x'")
    add(40, "missing", nothing, read, FileNotFoundError, "'x'")
    device = "/dev/zero"
    says = (device, "regular")
    read = lambda world: load_file(device)  # noqa: E731
    add(40, "a device as tensors", nothing, read, FormatError, *says, worst=True)
    read = lambda world: read_json(device)  # noqa: E731
    add(40, "a device as JSON", nothing, read, FormatError, *says, worst=True)
    read = lambda world: read_text(device)  # noqa: E731
    add(40, "a device as text", nothing, read, DataError, *says, worst=True)


# ---- JSON ----------------------------------------------------------------------------------------


def bad_json(
    kind: int, name: str, content: bytes | Callable[[], bytes], *says: str, worst: bool = False
) -> None:
    file = "hostile.json"
    read = lambda world: read_json(file)  # noqa: E731
    build = written(file, content)
    add(kind, f"json: {name}", build, read, FormatError, file, *says, whole=False, worst=worst)


def add_json_rows() -> None:
    bad_json(1, "empty", b"", "not valid JSON")
    bad_json(7, "not UTF-8", b'{"a": "\xff"}', "utf-8")
    bad_json(7, "UTF-16", '{"a": 1}'.encode("utf-16"), "utf-8")
    bad_json(8, "byte order mark", b"\xef\xbb\xbf{}", "BOM")
    bad_json(9, "lone surrogate", b'{"a": "\\ud800"}', "surrogates")
    bad_json(9, "lone surrogate in a key", b'{"\\uDFFF": 1}', "surrogates")
    bad_json(10, "truncated", b'{"a": 1', "not valid JSON")
    bad_json(10, "two", b"{} {}", "not valid JSON")
    bad_json(10, "trailing comma", b'{"a": 1,}', "not valid JSON")
    bad_json(10, "comment", b"{} // yes", "not valid JSON")
    bad_json(10, "single quotes", b"{'a': 1}", "not valid JSON")
    bad_json(10, "raw newline in a text", b'{"a": "\n"}', "not valid JSON")
    bad_json(10, "escape", b'{"\x1b[31m": 1}', "not valid JSON")
    bad_json(11, "list", b"[]", "JSON object", "list")
    bad_json(11, "null", b"null", "JSON object", "NoneType")
    bad_json(12, "NaN", b'{"a": NaN}', "not valid JSON")
    bad_json(12, "-Infinity", b'{"a": [-Infinity]}', "not valid JSON")
    bad_json(12, "1e400", b'{"a": {"b": 1e400}}', "not valid JSON")
    bad_json(14, "depth 65", b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64")
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    bad_json(14, "depth 100,000", deep, "deeper than 64", worst=True)
    bad_json(14, "depth unclosed", b"[" * 100_000, "deeper than 64")
    hidden = b'{"\\\\\\"": "\\\\",  "b":' + b"[" * 100_000
    bad_json(14, "depth behind an escaped quote", hidden, "deeper than 64")
    bad_json(15, "5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", "integer")
    bad_json(15, "21 digits", b'{"a": ' + b"9" * 21 + b"}", "integer")
    spaces = lambda: b"{" + b" " * (2 << 20) + b"}"  # noqa: E731
    bad_json(16, "2 MiB", spaces, "at most 1048576", worst=True)
    bad_json(18, "a field twice", b'{"a": 1, "a": 1}', "'a'", "twice")
    bad_json(18, "twice, deep", b'{"x": [{"b": 1, "a": 2, "b": 3}]}', "'b'", "twice")
    bad_json(18, "twice by escape", b'{"a": 1, "\\u0061": 2}', "'a'", "twice")
    long = b"\\n" * 2**17
    bad_json(18, "a long field twice", b'{"%b": 1, "%b": 1}' % (long, long), "twice")


# ---- folders, read without asking what they mean -------------------------------------------------


def bad_base(kind: int, name: str, build: Build, *says: str) -> None:
    read = lambda world: read_checkpoint("base")  # noqa: E731
    add(kind, f"base: {name}", build, read, FormatError, "base", *says)


def bad_adapter(kind: int, name: str, build: Build, *says: str) -> None:
    read = lambda world: read_adapter("adapter")  # noqa: E731
    add(kind, f"adapter: {name}", build, read, FormatError, "adapter", *says)


def add_folder_rows() -> None:
    bad_base(34, "no config", removed(BASE_CONFIG), "config.json")
    bad_base(34, "no weights", removed(BASE_WEIGHTS), "model.safetensors")
    says = ("pickle", "safetensors")
    pickle = renamed(BASE_WEIGHTS, "base/pytorch_model.bin")
    bad_base(41, "only a pickle", pickle, "'pytorch_model.bin'", *says)
    bad_base(41, "only a .pt", renamed(BASE_WEIGHTS, "base/m\x1b.pt"), r"'m\x1b.pt'", *says)
    bad_base(41, "a pickle inside", written(BASE_WEIGHTS, b"\x80\x04\x95" * 99), ".bin, .pt")
    folder = lambda f: (f / BASE_WEIGHTS).mkdir()  # noqa: E731
    bad_base(40, "weights are a folder", both(removed(BASE_WEIGHTS), folder), "regular file")
    bad_base(40, "config is a pipe", replaced_by_pipe(BASE_CONFIG), "regular file")
    bad_base(11, "config is a list", written(BASE_CONFIG, b"[]"), "config.json", "JSON object")
    bad_adapter(34, "no config", removed(ADAPTER_CONFIG), "adapter_config.json")
    bad_adapter(34, "no weights", removed(ADAPTER_WEIGHTS), "adapter_model.safetensors")
    pickle = renamed(ADAPTER_WEIGHTS, "adapter/adapter_model.bin")
    bad_adapter(41, "a pickle", pickle, "adapter_model.bin", "pickle")
    bad_adapter(18, "config twice", written(ADAPTER_CONFIG, b'{"r": 1, "r": 2}'), "'r'", "twice")
    bad_adapter(26, "cut weights", cut(ADAPTER_WEIGHTS, 800), "model.safetensors", "the file holds")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
ZIP = b"PK\x03\x04" + b"\0" * 60
CONTENTS = {
    "a git-lfs pointer": (POINTER, "git lfs pull"),
    "an HTML page": (PAGE, "download the file itself"),
    "a server's message": (b"Entry not found", "check the address"),
    "a zip archive": (ZIP, "torch.save", "save the tensors with safetensors"),
    "a pickle": (b"\x80\x02}q\0." * 20, "torch.save"),
    "a GGUF file": (b"GGUF\x03\0\0\0" + b"\1" * 60, "llama.cpp"),
    "a compressed file": (b"\x1f\x8b\x08" + b"\0" * 60, "unpack it"),
    "empty": (b"", "download it again"),
    "zeros": (b"\0" * 99, "download it again"),
}


def add_content_rows() -> None:
    """A file that is another one is named as what it is, with what to do."""
    for kind, (content, *says) in CONTENTS.items():
        for path in (BASE_WEIGHTS, BASE_CONFIG, "base/tokenizer.json"):
            build = written(path, content)
            command(41, EVALUATE, 3, path, f"it is {kind}", *says, build=build)
        for path in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            build = written(path, content)
            read = lambda world: read_adapter("adapter")  # noqa: E731
            add(41, f"{path}: {kind}", build, read, FormatError, path, f"it is {kind}", *says)
    other = both(removed(BASE_CONFIG), renamed(BASE_WEIGHTS, BASE_CONFIG))
    bad_base(41, "weights for config.json", other, "base/config.json", "it is a safetensors file")


def bad_index(
    kind: int,
    name: str,
    change: Callable[[Path, dict[str, str]], object],
    *says: str,
    file: str = "model.safetensors.index.json",
    worst: bool = False,
) -> None:
    """The base in three shards; `change` changes the index in place or returns another one."""

    def build(folder: Path) -> None:
        save_file(folder / "secret.safetensors", {"x": np.zeros(1)})
        weight_map = split(folder / "base")
        changed = change(folder / "base", weight_map)
        write_index(folder / "base", weight_map if changed is None else changed)

    read = lambda world: read_checkpoint("base")  # noqa: E731
    add(kind, f"index: {name}", build, read, FormatError, file, *says, worst=worst)


def absolute_inside(folder: Path, weight_map: dict[str, str]) -> None:
    first = next(iter(weight_map))
    weight_map[first] = str(folder / "model-00001-of-00003.safetensors")


def swapped(folder: Path, weight_map: dict[str, str]) -> None:
    first, second = list(weight_map)[:2]
    weight_map[first], weight_map[second] = weight_map[second], weight_map[first]


def not_listed(folder: Path, weight_map: dict[str, str]) -> None:
    del weight_map["model.norm.weight"]


def not_stored(folder: Path, weight_map: dict[str, str]) -> None:
    weight_map["zzz"] = "model-00001-of-00003.safetensors"


def damaged_last(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"\0" * 9)


def add_index_rows() -> None:
    bad_index(42, "no weight_map", lambda b, w: "x", "weight_map must")
    bad_index(42, "a weight_map of numbers", lambda b, w: {"a": 1}, "weight_map must")
    name = "not the name of"
    bad_index(42, "parent", first_shard("../secret.safetensors"), name)
    bad_index(42, "absolute", first_shard("/etc/passwd.safetensors"), name)
    bad_index(42, "absolute, though inside", absolute_inside, name)
    bad_index(42, "a folder below", first_shard("a/b.safetensors"), name)
    bad_index(42, "a drive", first_shard("C:secret.safetensors"), name)
    bad_index(42, "a hidden file", first_shard(".secret.safetensors"), name)
    bad_index(42, "backslash", first_shard("..\\secret.safetensors"), name)
    bad_index(42, "NUL", first_shard("a\0.safetensors"), name)
    bad_index(42, "a pickled shard", first_shard("pytorch_model-00001.bin"), name)
    bad_index(42, "an empty name", first_shard(""), name)
    bad_index(42, "a 10 kB name", first_shard("\x1b" * 10_000 + ".safetensors"), name)
    million = first_shard("a/" * 10**6 + ".safetensors")
    bad_index(42, "a path of a million parts", million, name, worst=True)
    bad_index(42, "a missing shard", first_shard("model-00009.safetensors"), "missing")
    not_in_it = "listed for it but not in it"
    detour = first_shard("../base/model-00002-of-00003.safetensors")
    bad_index(42, "by another path", detour, name)
    bad_index(42, "two shards swapped", swapped, not_in_it)
    bad_index(42, "a tensor that is not stored", not_stored, "'zzz'", not_in_it)
    bad_index(42, "a tensor not listed", not_listed, "in it but not listed")
    last = "model-00003-of-00003.safetensors"
    bad_index(42, "a damaged last shard", damaged_last, "not a safetensors file", file=last)
    bad_index(16, "17 MiB", lambda b, w: {"a": " " * (17 << 20)}, "at most 16777216")


# ---- adapters ------------------------------------------------------------------------------------


def load_beside(world: World) -> None:
    world.victim.load_adapter("adapter", "beside")


def load_fresh(world: World) -> None:
    PeftModel.from_pretrained(CausalLM.from_pretrained("base"), "adapter")


def misfit(name: str, build: Build, *says: str) -> None:
    """An adapter that does not fit: refused as a whole, with the names of what is wrong."""
    for load in (load_beside, load_fresh):
        add(43, f"{name}, {load.__name__}", build, load, FormatError, "adapter", "fit", *says)


def bad_adapter_config(kind: int, *says: str, worst: bool = False, **fields: object) -> None:
    """An adapter_config.json with a value that is refused, by the name of its field."""
    build = set_to(ADAPTER_CONFIG, **fields)
    name = f"adapter_config.json: {fields!r:.50}"
    says = (ADAPTER_CONFIG, *says)
    add(
        kind, name, build, load_beside, ConfigError, *says, worst=worst or len(repr(fields)) > 10**4
    )


PREFIX = "base_model.model."


def renaming(old: str, new: str) -> Callable[[Tensors], object]:
    """A change of the beginnings of all names."""

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return rename


def quoted_prefix(prefix: str) -> str:
    return f"its keys begin with {prefix!r}" if prefix else "its keys have no prefix"


INTEGERS = (np.int32, np.int64, np.int8, np.uint8, np.uint16, np.bool_)


def add_integer_rows() -> None:
    """Weights that are stored as integers are refused, wherever they would be used as numbers."""
    name = ADAPTER_KEY.format("q", "A")
    floats = "expected F64, F32, F16, BF16"
    for kind in INTEGERS:
        code = {"bool": "BOOL"}.get(np.dtype(kind).name, np.dtype(kind).str[1:].upper())
        code = {"I4": "I32", "I8": "I64", "I1": "I8", "U1": "U8", "U2": "U16"}.get(code, code)
        build = with_tensor(ADAPTER_WEIGHTS, name, np.ones((2, 16), kind))
        says = (ADAPTER_WEIGHTS, name, code, floats, "save it again")
        for load in (load_beside, load_fresh):
            add(33, f"{code} in an adapter, {load.__name__}", build, load, FormatError, *says)
        build = with_tensor(BASE_WEIGHTS, "lm_head.weight", np.ones((256, 16), kind))
        says = (BASE_WEIGHTS, "lm_head.weight", code, floats)
        add(33, f"{code} in a base", build, load_base, FormatError, *says)
    lines = (MERGE, "inspect adapter", "resize --adapter adapter --r 1 --out new")
    lines += ("convert adapter --dtype float16 --out new", "convert adapter --to mlx --out new")
    lines += ("combine --adapter adapter --out new", f"{EVALUATE} --adapter adapter")
    build = with_tensor(ADAPTER_WEIGHTS, name, np.full((2, 16), 10**9, np.int32))
    for line in lines:
        command(33, line, 3, name, "I32", floats, build=build)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    build = with_tensor(BASE_WEIGHTS, q_proj, np.ones((16, 16), np.int32))
    command(33, MERGE, 3, "base", q_proj, "I32", build=build)


def add_overflow_rows() -> None:
    """A number that the wanted dtype cannot hold is not a broken weight."""
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    build = broken(BASE_WEIGHTS, "q_proj", 1e6)
    says = ("base", q_proj, "65504, the largest of float16", "choose float32 or bfloat16")
    command(38, "convert base --dtype float16 --out new", 5, *says, build=build)
    command(38, f"{MERGE} --dtype float16", 5, *says, build=build)
    build = broken(ADAPTER_WEIGHTS, "q_proj.lora_B", 1e6)
    says = ("adapter", "q_proj.lora_B", "65504, the largest of float16")
    command(38, "convert adapter --dtype float16 --out new", 5, *says, build=build)
    wide = with_tensor(BASE_WEIGHTS, "lm_head.weight", np.full((256, 16), 1e300))
    says = (BASE_WEIGHTS, "lm_head.weight", "3.40282e+38, the largest of float32")
    add(38, "1e300 for float32", wide, load_base, NonFiniteError, *says)
    name = ADAPTER_KEY.format("q", "A")
    wide = with_tensor(ADAPTER_WEIGHTS, name, np.full((2, 16), 1e300))
    says = (ADAPTER_WEIGHTS, name, "the largest of float32")
    add(38, "1e300 in an adapter", wide, load_beside, NonFiniteError, *says)


def add_adapter_rows() -> None:
    key = ADAPTER_KEY.format
    without = lambda name: changed_tensors(ADAPTER_WEIGHTS, lambda t: t.pop(name))  # noqa: E731
    having = lambda name, array: with_tensor(ADAPTER_WEIGHTS, name, array)  # noqa: E731
    misfit("a key is missing", without(key("q", "A")), f"missing {key('q', 'A')}")
    unknown = "base_model.model.extra"
    misfit("a key too many", having(unknown, np.zeros(1)), f"unknown {unknown}")
    escape = having("\x1b[2J", np.zeros(1))
    misfit("a key that steers the terminal", escape, r"unknown \x1b[2J")
    wide = having(key("v", "B"), np.zeros((5, 2)))
    misfit("a wrong shape", wide, key("v", "B"), "(5, 2)", "(16, 2)")
    misfit("another rank", set_to(ADAPTER_CONFIG, r=3), "(2, 16)", "(3, 16)")
    prefixes = ("", "module.", "base_model.model.module.", "base_model.model._orig_mod.")
    for prefix in (*prefixes, "base_model.model.transformer."):
        for load in (load_beside, load_fresh):
            build = changed_tensors(ADAPTER_WEIGHTS, renaming("base_model.model.", prefix))
            says = [quoted_prefix(prefix), "'base_model.model.' is expected: rename them"]
            name = f"keys that begin with {prefix!r}, {load.__name__}"
            add(43, name, build, load, FormatError, "adapter", "fit", *says)
    build = changed_tensors(ADAPTER_WEIGHTS, renaming("base_model.model.model.", PREFIX))
    line = f"{EVALUATE} --adapter adapter"
    add(43, "keys of a model without a head", build, line, None, "'model' is put before")
    for prefix in ("", "module."):
        build = changed_tensors(ADAPTER_WEIGHTS, renaming(PREFIX, prefix))
        command(43, MERGE, 3, "does not begin with 'base_model.model.'", "rename", build=build)
    names = {f"k{i:04}": np.zeros(1) for i in range(1000)}
    thousand = changed_tensors(ADAPTER_WEIGHTS, lambda t: t.update(names))
    misfit("a thousand keys too many", thousand, "unknown k0000", "997 more")
    other = set_to(ADAPTER_CONFIG, target_modules=["c_attn"])
    misfit("another architecture", other, "'c_attn'", "match nothing", "q_proj")
    # A file may name layers of other models, but its tensors must be those of the layers here.
    many = set_to(ADAPTER_CONFIG, target_modules=["q_proj", "c_attn"])
    misfit("tensors of unnamed layers", many, "unknown", "v_proj.lora_A.weight")

    add_base_rows(having)

    for value in (0, -1, 2**31, 1.5, True, "8", None, [8]):
        bad_adapter_config(44, "r must be", r=value)
        bad_adapter_config(44, "rank_pattern must be", rank_pattern={"q": value})

    def grow(tensors: Tensors) -> None:
        for name, array in tensors.items():
            tensors[name] = np.zeros([17 if size == 2 else size for size in array.shape])

    large = both(set_to(ADAPTER_CONFIG, r=17), changed_tensors(ADAPTER_WEIGHTS, grow))
    add(44, "r above the full rank warns", large, f"{EVALUATE} --adapter adapter", None)
    for value in (-1, True, "8", None):
        bad_adapter_config(45, "lora_alpha must be", lora_alpha=value)
    for value in (-0.1, 1.0, 1, True, None, "0"):
        bad_adapter_config(45, "lora_dropout must be", lora_dropout=value)
    for literal in ("NaN", "Infinity", "1e400"):
        build = written(ADAPTER_CONFIG, f'{{"lora_alpha": {literal}}}'.encode())
        says = ("adapter_config.json", "not valid JSON")
        add(45, f"lora_alpha = {literal}", build, load_beside, FormatError, *says)
    add_pattern_rows()
    for value in ([], "", 5, [""], ["q_proj", 1], [None], True, {"a": 1}, ["q_proj"] * 20_000):
        bad_adapter_config(47, "target_modules must be", target_modules=value)
    million = set_to(ADAPTER_CONFIG, target_modules=["q_proj"] * 10**6)
    says = ("adapter_config.json", "at most 1048576")
    add(47, "1,000,000 targets", million, load_beside, FormatError, *says, worst=True)
    layers = [0] * 20_000
    bad_adapter_config(47, "layers_to_transform must be", layers_to_transform=layers)
    repeated = set_to(ADAPTER_CONFIG, target_modules=["q_proj", "v_proj", "q_proj"])
    add(47, "a target twice is a target", repeated, load_fresh, None)
    bad_adapter_config(48, "peft_type", peft_type="BOFT")
    bad_adapter_config(48, "VeRA has no such field; its fields are", peft_type="VERA")
    bad_adapter_config(48, "use_dora", use_dora="yes")
    bad_adapter_config(48, "lora_bias", lora_bias=True)
    bad_adapter_config(48, "layer_replication", layer_replication=[[0, 1]])
    bad_adapter_config(48, "megatron_config", megatron_config={"a": 1})
    bad_adapter_config(48, "megatron_core", megatron_core="os")
    bad_adapter_config(48, "init_lora_weights", init_lora_weights="../weights")
    bad_adapter_config(48, "loftq_config", loftq_config={"bits": 4})
    bad_adapter_config(48, "target_parameters", target_parameters=["x"])
    bad_adapter_config(48, "alora_invocation_tokens", alora_invocation_tokens=[1])
    bad_adapter_config(48, "trainable_token_indices", trainable_token_indices=[0, 0])
    bad_adapter_config(48, "ensure_weight_tying", ensure_weight_tying="yes")
    bad_adapter_config(48, "task_type", task_type="NONSENSE")
    for start in ("pissa_niter_4", "lora_ga"):
        unknown = set_to(ADAPTER_CONFIG, init_lora_weights=start)
        says = ("adapter", start, "Give --initial DIR")
        add(48, f"an unknown start, {start}", unknown, load_beside, FormatError, *says)
    bad_adapter_config(48, "eva_config", eva_config={"rho": 2.0})
    score = having(f"{PREFIX}score.weight", np.zeros((2, 16)))
    score = both(set_to(ADAPTER_CONFIG, task_type="SEQ_CLS", modules_to_save=["score"]), score)
    misfit("a classifier's head", score, "unknown base_model.model.score.weight")
    bad_adapter_config(48, "bias", bias="some")
    mapping = {"base_model_class": "Evil", "parent_library": "os"}
    harmless = {"revision": "../..", "base_model_name_or_path": "/dev/zero"}
    evil = set_to(ADAPTER_CONFIG, auto_mapping=mapping, **harmless)
    add(48, "auto_mapping is kept, not imported", evil, load_fresh, None)


def add_base_rows(having: Callable[[str, Any], Build]) -> None:
    """Tensors of the base in an adapter's file: copies of it, whole modules, other vocabularies."""
    embedding = f"{PREFIX}model.embed_tokens.weight"
    head = f"{PREFIX}lm_head.weight"
    rows = np.ones((260, 16))
    says = (embedding, "260 tokens, the base has 256", "no rows of lm_head", "resized to 260")
    misfit("an embedding with more tokens", having(embedding, rows), *says)
    both_ends = both(having(embedding, rows), having(head, np.ones((270, 16))))
    misfit("two vocabularies", both_ends, "(260, 16)", "(270, 16)", "(256, 16)")
    empty = both(having(embedding, np.ones((0, 16))), having(head, np.ones((0, 16))))
    misfit("no tokens", empty, "(0, 16)", "(256, 16)")
    wide = both(having(embedding, np.ones((260, 17))), having(head, np.ones((260, 17))))
    misfit("other channels", wide, "(260, 17)", "(256, 16)")
    norm = having(f"{PREFIX}model.norm.weight", np.ones(17))
    misfit("a norm of another shape", norm, "norm.weight is (17,), the base needs (16,)")
    for name in ("model.layers.0.self_attn.q_proj.base_layer", "model.norm.original_module"):
        shape = (16,) if "norm" in name else (16, 16)
        build = having(f"{PREFIX}{name}.weight", np.full(shape, 7.0))
        misfit(f"another {name}", build, f"{name}.weight differs from the base's")
    nowhere = having(f"{PREFIX}model.layers.9.self_attn.o_proj.weight", np.ones((16, 16)))
    misfit("a whole module of no layer", nowhere, "unknown", "layers.9.self_attn.o_proj.weight")
    path = having(f"{PREFIX}../../secret.weight", np.ones(3))
    misfit("a whole module that leads out", path, "unknown", "../../secret.weight")
    saved = set_to(ADAPTER_CONFIG, modules_to_save=["../../secret", "/dev/zero"])
    add(43, "names that lead out", saved, f"{EVALUATE} --adapter adapter", None, "match nothing")
    wanted = [ADAPTER_KEY.format(part, "A") for part in "qv"]

    def name_tensors(tensors: Tensors) -> None:
        for key in wanted:
            tensors[key.replace(".weight", ".x.weight")] = tensors.pop(key)

    mixed = changed_tensors(ADAPTER_WEIGHTS, name_tensors)
    mixed = both(mixed, having(wanted[0].replace("_A.", "_A.y."), np.zeros((2, 16))))
    misfit("two names in keys", mixed, "missing")
    biased = set_to(BASE_CONFIG, attention_bias=True)
    bias = {f"model.layers.0.self_attn.{part}_proj.bias": np.zeros(16, "f") for part in "qkvo"}
    biased = both(biased, changed_tensors(BASE_WEIGHTS, lambda t: t.update(bias)))
    biased = both(biased, set_to(ADAPTER_CONFIG, bias="lora_only"))
    says = ("bias = 'lora_only', but 2 trained biases are missing", "set bias to 'none'")
    add(43, "no biases", biased, load_fresh, FormatError, "adapter", *says)
    command(43, MERGE, 3, "adapter", *says, build=biased)


def add_pattern_rows() -> None:
    slow = ["(([a-z_0-9]+)*\\.?)*!", "(.*)*x", "(a|a)*b", "((((.*)*)*)*)*!", "(.?){99}(.?){99}!"]
    for pattern in slow:
        build = set_to(ADAPTER_CONFIG, target_modules=pattern)
        says = ("adapter", "fit", "match nothing")
        name = f"target_modules {pattern}"
        add(46, name, build, load_beside, FormatError, *says, worst=True)
        command(46, f"{FINETUNE} --target-modules '{pattern}'", 2, "no target")
        build = set_to(ADAPTER_CONFIG, rank_pattern={pattern: 2}, exclude_modules=pattern)
        add(46, f"rank_pattern {pattern}", build, f"{EVALUATE} --adapter adapter", None)
    bad_adapter_config(46, "pattern", "40 groups", target_modules="(" * 300)
    bad_adapter_config(46, "pattern", "too many", target_modules="((.{99}){99}){99}")
    bad_adapter_config(46, "pattern", "within 100", target_modules="a{101}")
    for pattern in ("(", "a**", "[a", "a" * 30_001, "(?=" * 41 + ")" * 41):
        bad_adapter_config(46, "pattern", "supported are", rank_pattern={pattern: 2})
    # What is outside the subset is never run: the tensors say which layers are meant, and their
    # ranks; but nothing says their lora_alpha.
    line = f"{EVALUATE} --adapter adapter"
    for pattern in ("(a*)*\\1b", "(?<=q)", "(?i)(.*)*Q_PROJ", "(?>(a|a)*)b", ".*+x", "\\x41"):
        build = set_to(ADAPTER_CONFIG, target_modules=pattern)
        add(46, f"not run: {pattern}", build, line, None, "layers are those that have tensors")
        build = set_to(ADAPTER_CONFIG, rank_pattern={pattern: 2})
        add(46, f"not run for ranks: {pattern}", build, line, None, "ranks are those of the file")
        build = set_to(ADAPTER_CONFIG, alpha_pattern={pattern: 2})
        says = ("adapter", "alpha_pattern", "no tensor says", "name them in full")
        add(46, f"not run for alphas: {pattern}", build, load_beside, FormatError, *says)
    looks = ("(?!(.*)*x).*!", "(?=((.?){20}){9}!).*", "(?:(?=(.|.)*!).)*", "(?!(?!(.*)*!).)x")
    for pattern in looks:
        build = set_to(ADAPTER_CONFIG, target_modules=pattern)
        says = ("adapter", "fit", "match nothing")
        add(46, f"looks ahead: {pattern}", build, load_beside, FormatError, *says, worst=True)
    large = set_to(ADAPTER_CONFIG, target_modules="(?!" + ".*" * 10_000 + "!).*x")
    says = ("adapter", "takes too long", "500 of its")
    add(46, "too many states at each letter", large, load_beside, FormatError, *says, worst=True)
    most = "at most 2000"
    bad_adapter_config(46, most, rank_pattern={f"q{i}": 2 for i in range(5000)})
    branching = {f"(.?){{99}}(.?){{99}}{i}": 2 for i in range(100)}
    bad_adapter_config(46, most, alpha_pattern=branching)
    bad_adapter_config(46, most, layers_pattern=["a"] * 3000, layers_to_transform=[0])


# ---- config.json, and weights that do not go with it ---------------------------------------------


def load_base(world: World) -> None:
    CausalLM.from_pretrained("base")


def bad_config(kind: int, *says: str, **fields: object) -> None:
    """A config.json that describes no model."""
    name = f"config.json: {fields!r:.60}"
    add(
        kind, name, set_to(BASE_CONFIG, **fields), load_base, ConfigError, "base/config.json", *says
    )


def bad_weights(name: str, build: Build, *says: str) -> None:
    """Weights that are not those that config.json describes."""
    add(51, name, build, load_base, FormatError, "base", *says)


def add_config_rows() -> None:
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "architectures": ["../evil"]}
    add(49, "code to load is not loaded", set_to(BASE_CONFIG, **code), load_base, None)
    unknown = {"trust_remote_code": True, "_attn_implementation_internal": "evil/kernel"}
    build = set_to(BASE_CONFIG, **code, **unknown)  # of which a warning tells
    add(49, "nor by a command", build, f"{EVALUATE} --limit 1", None)
    bad_config(49, "torch_dtype must be", torch_dtype="os.system")
    bad_config(49, "configuration_files must be", configuration_files=["../evil.json"])
    bad_config(49, "transformers_weights must be", transformers_weights="../evil.bin")
    bad_config(49, "attribute_map must be", attribute_map={"hidden_size": "__class__"})
    bad_config(49, "_heterogeneity_spec must be", _heterogeneity_spec={})
    bad_config(49, "per_layer_config must be", per_layer_config={"0": {"skip": ["mlp"]}})
    bad_config(49, "model_type", model_type="evil")
    bad_config(49, r"\x1b[2J", model_type="\x1b[2J" * 10_000)

    def values(name: str, *wrong: object) -> None:
        for value in wrong:
            bad_config(50, "must be", **{name: value})

    values("vocab_size", 0, -1, 2**31, 1.5, True, "256", None)
    values("hidden_size", 0, [16])
    values("num_hidden_layers", 0, 2**31)
    values("num_attention_heads", 0, 3, None)
    values("num_key_value_heads", 3, 0, "2")
    values("head_dim", 7, 0, -8, 2**16, 8.0)
    values("intermediate_size", 0, {})
    values("max_position_embeddings", 0, 10**15)
    values("rms_norm_eps", 0, -1, "x", True, None)
    values("hidden_act", "gelu", None, ["silu"])
    values("tie_word_embeddings", 1, "no", None)
    values("attention_bias", 0)
    values("initializer_range", 0, -0.02)
    for window in (0, -4, "4", [4]):
        bad_config(50, "sliding_window", "must be", model_type="mistral", sliding_window=window)
    qwen2 = {"model_type": "qwen2"}
    bad_config(50, "must be", **qwen2, use_sliding_window=True, sliding_window=0)
    for types in ([["full_attention"]], ["full_attention"] * 10**4, ["sliding_attention"]):
        bad_config(50, "must be", **qwen2, layer_types=types)
    bad_config(50, "must be", **qwen2, max_window_layers=-1)
    bad_config(50, "must be", **qwen2, use_sliding_window=True, max_window_layers="0")
    gpt2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16}
    bad_config(50, "must be", **{**gpt2, "n_embd": 15, "hidden_size": 15})
    bad_config(50, "must be", **{**gpt2, "n_layer": 2**31, "num_hidden_layers": 2**31})
    bad_config(50, "n_embd is 15", "keep one of the two", **{**gpt2, "n_embd": 15})
    bad_config(50, "must be", **gpt2, add_cross_attention=True)
    bad_config(50, "must be", **gpt2, activation_function="tanh")
    bad_config(50, "hidden_size", "must be", hidden_size=15, head_dim=None)

    def rope(value: object) -> None:
        bad_config(50, "rope_", rope_parameters=value)

    rope("x")
    rope({"rope_type": "yarn"})
    rope({"rope_type": ["default"]})
    rope({"rope_theta": 0})
    rope({"rope_theta": -1})
    rope({"rope_theta": True})
    rope({"rope_theta": 1e38})
    rope({"rope_type": "linear"})
    rope({"rope_type": "linear", "factor": 0})
    rope({"rope_type": "yarn", "factor": 1e38})
    rope({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 1e38})
    rope({"type": "longrope", "factor": 2.0})
    rope({"rope_type": "llama3", "factor": 8})
    factors = {"low_freq_factor": 4.0, "high_freq_factor": 4.0}
    length = {"original_max_position_embeddings": 64}
    rope({"rope_type": "llama3", "factor": 8.0, **factors, **length})

    def drop_sizes(config: dict[str, Any]) -> None:
        del config["hidden_size"], config["vocab_size"]

    says = ("config", "missing", "hidden_size, vocab_size")
    add(50, "no sizes", edited(BASE_CONFIG, drop_sizes), load_base, ConfigError, *says)
    sizes = {"num_hidden_layers": 10**9, "vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1}
    for name, size in sizes.items():
        build = set_to(BASE_CONFIG, **{name: size})
        says = ("base", "config.json", "parameters", "the file holds")
        add(50, f"{name} = {size}", build, load_base, FormatError, *says, worst=True)


def add_weight_rows() -> None:
    vocabulary = set_to(BASE_CONFIG, vocab_size=255)
    says = ("embed_tokens.weight", "(256, 16)", "(255, 16)")
    bad_weights("another vocabulary", vocabulary, *says)

    def become_qwen2(config: dict[str, Any]) -> None:
        """Its q, k and v have biases in any case."""
        config["model_type"] = "qwen2"
        del config["attention_bias"], config["mlp_bias"]

    qwen2 = edited(BASE_CONFIG, become_qwen2)
    bias = "missing model.layers.0.self_attn.q_proj.bias"
    bad_weights("another type of model", qwen2, bias)
    tied = set_to(BASE_CONFIG, tie_word_embeddings=True)
    says = ("tie_word_embeddings is true", "lm_head.weight differs", "both are used")
    line = f"{EVALUATE} --limit 1"
    add(51, "tied in config.json, another head in the file", tied, line, None, *says)
    wide = both(tied, with_tensor(BASE_WEIGHTS, "lm_head.weight", np.ones((9, 16))))
    command(51, line, 3, "lm_head.weight", "(9, 16)", "(256, 16)", build=wide)
    drop = changed_tensors(BASE_WEIGHTS, lambda t: t.pop("lm_head.weight"))
    bad_weights("no head", drop, "missing lm_head.weight")
    escape = with_tensor(BASE_WEIGHTS, "\x1b[2J\n", np.zeros(1))
    bad_weights("a name that steers the terminal", escape, r"unknown \x1b[2J\n")
    scalar = with_tensor(BASE_WEIGHTS, "model.norm.weight", np.float32(1))
    bad_weights("a scalar for a vector", scalar, "model.norm.weight", "()", "(16,)")
    heads = set_to(BASE_CONFIG, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    command(51, EVALUATE, 3, "q_proj.weight", "(16, 16)", "(32, 16)", build=heads)
    layers = set_to(BASE_CONFIG, num_hidden_layers=2)
    command(51, EVALUATE, 3, "model.layers.1", build=layers)


def add_base_prefix_rows() -> None:
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        build = changed_tensors(BASE_WEIGHTS, renaming("", prefix))
        says = (f"begin with {prefix!r} where none is expected", "rename them")
        bad_weights(f"keys that begin with {prefix!r}", build, *says)
        command(51, MERGE, 3, f"the base's keys {says[0]}", "rename them", build=build)
    build = changed_tensors(BASE_WEIGHTS, renaming("model.", "transformer."))
    says = ("begin with 'transformer.' where 'model.' is expected",)
    bad_weights("keys that begin with 'transformer.'", build, *says)


def add_nonfinite_rows() -> None:
    """A file may hold NaN and infinity, but nothing is made of them."""
    for value in (np.nan, np.inf, -np.inf):
        head = broken(BASE_WEIGHTS, "lm_head", value)
        add(38, f"{value} is loaded", head, load_base, None)
        name = "model.norm.weight" if value < 0 else "lm_head.weight"
        build = broken(BASE_WEIGHTS, name, value)
        for line in (f"{FINETUNE} --steps 1", GENERATE, EVALUATE, MERGE):
            command(38, line, 5, "base", name, "not finite", build=build)
        build = broken(ADAPTER_WEIGHTS, "q_proj.lora_B", value)
        for line in (f"{GENERATE} --adapter adapter", f"{EVALUATE} --adapter adapter", MERGE):
            command(38, line, 5, "q_proj", "not finite", build=build)
    build = broken(ADAPTER_WEIGHTS, "q_proj.lora_B", np.nan)
    command(38, "inspect adapter", None, build=build)


# ---- tokenizers ----------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def bad_tokenizer(name: str, change: Change, *says: str) -> None:
    """A tokenizer.json other than our own, refused with the package `tokenizers` and without it."""
    build = edited("base/tokenizer.json", change)
    add(52, name, build, load_and_encode, DataError, "tokenizer.json", *says)


def bad_tokenizer_json(name: str, content: bytes, *says: str) -> None:
    build = written("base/tokenizer.json", content)
    add(52, name, build, load_and_encode, FormatError, "tokenizer.json", *says)


def load_and_encode(world: World) -> None:
    load_tokenizer("base", 256).encode("a b")


def vocabulary(**more: object) -> Change:
    return lambda value: value["model"]["vocab"].update(more)


def merges(*pairs: list[str]) -> Change:
    return lambda value: value["model"]["merges"].extend(pairs)


TOO_MUCH = "takes too much time or memory"


def greedy_tokenizer(
    name: str, change: Change, use: Callable[[HubTokenizer], object], *says: str
) -> None:
    """A small tokenizer.json that takes much time or memory for a small text.

    Without the package `tokenizers` it is refused before that.
    """
    expected = says or (TOO_MUCH,)
    if importlib.util.find_spec("tokenizers") is None:
        expected = ("needs the package 'tokenizers'",)

    def read(world: World) -> None:
        tokenizer = load_tokenizer("base", 1000)
        assert isinstance(tokenizer, HubTokenizer)
        use(tokenizer)

    build = edited("base/tokenizer.json", change)
    add(52, name, build, read, DataError, "tokenizer.json", *expected)


def replacing(times: int, content: str) -> list[dict[str, Any]]:
    """Rules that replace each `a`, one after another."""
    return [{"type": "Replace", "pattern": {"String": "a"}, "content": content}] * times


def in_sequence(normalizers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": normalizers}


def add_greedy_tokenizer_rows() -> None:
    def encode(tokenizer: HubTokenizer) -> None:
        tokenizer.encode("a b")

    def decode(tokenizer: HubTokenizer) -> None:
        tokenizer.decode([97, 256, 256, *[256] * 5000])

    def long_word(tokenizer: HubTokenizer) -> None:
        tokenizer.encode("a" * 100_000)

    def with_special_tokens(tokenizer: HubTokenizer) -> None:
        tokenizer.encode("a", add_special_tokens=True)

    doubling = in_sequence(replacing(600, "aa"))
    greedy_tokenizer("600 rules that double", lambda t: t.update(normalizer=doubling), encode)
    growing = in_sequence(replacing(60, "a" * 1000))
    greedy_tokenizer("60 rules of 1000 letters", lambda t: t.update(normalizer=growing), encode)
    megabyte = replacing(1, "b" * 10**6)[0]
    greedy_tokenizer("1 MB for a letter", lambda t: t.update(normalizer=megabyte), long_word)

    growth = {"type": "Sequence", "decoders": replacing(60, "a" * 1000)}
    other = {"normalizer": {"type": "NFC"}, "decoder": growth}
    greedy_tokenizer("a decoder that grows", lambda t: t.update(other), decode)

    def long_token(fields: dict[str, Any]) -> None:
        fields["model"]["vocab"]["y" * 20_000] = 256
        fields["decoder"] = None

    greedy_tokenizer("a token of 20 kB", long_token, decode, "more than", "characters of 5,003")
    special = {"id": "S", "ids": [1] * 1000, "tokens": ["S"] * 1000}
    single = [{"SpecialToken": {"id": "S", "type_id": 0}}] * 1100
    around = {"type": "TemplateProcessing", "single": single, "pair": []}
    around["special_tokens"] = {"S": special}
    says = ("its post_processor puts more than 1024 tokens around a text",)
    change = lambda t: t.update(post_processor=around)  # noqa: E731
    greedy_tokenizer("a million special tokens", change, with_special_tokens, *says)
    pieces = {"type": "WordPiece", "vocab": {"a": 0, "##a": 1, "U": 2}, "unk_token": "U"}
    pieces |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 10**9}
    change = lambda t: t.update(model=pieces, pre_tokenizer=None)  # noqa: E731
    greedy_tokenizer("quadratic pieces of a word", change, long_word)
    hangs = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    hangs["invert"] = False
    change = lambda t: t.update(pre_tokenizer=hangs)  # noqa: E731
    backtrack = lambda tokenizer: tokenizer.encode("a" * 40 + "!")  # noqa: E731
    greedy_tokenizer("a pattern that hangs", change, backtrack, "retry-limit")
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    build = edited("base/tokenizer.json", lambda t: t.update(normalizer=None, padding=padding))
    add(52, "a billion tokens to pad with are not added", build, load_and_encode, None)


def add_tokenizer_rows() -> None:
    bad_tokenizer_json("cut", b'{"model": {"vocab": {', "not valid JSON")
    bad_tokenizer_json("no object", b"[]", "JSON object")
    twice = b'{"model": {"vocab": {"a": 1, "a": 2}}}'
    bad_tokenizer_json("a token twice", twice, "'a'", "twice")
    surrogate = b'{"model": {"vocab": {"\\ud800": 1}}}'
    bad_tokenizer_json("half of a surrogate pair", surrogate, "surrogates")
    bad_tokenizer_json("deep", b'{"a":' * 1000 + b"1" + b"}" * 1000, "deeper")
    bad_tokenizer("empty", lambda t: {})
    bad_tokenizer("an id twice", vocabulary(zz=5))
    bad_tokenizer("an id below zero", vocabulary(zz=-1))
    bad_tokenizer("an id that is not an integer", vocabulary(zz=1.5))
    bad_tokenizer("a merge of unknown tokens", merges(["nowhere", "b"]))
    bad_tokenizer("merges in a circle", merges(["x", "x"], ["xx", "x"]))
    bad_tokenizer("no vocabulary", lambda t: t["model"].update(vocab={}))
    bad_tokenizer("an unknown model", lambda t: t["model"].update(type="Unheard"))
    pieces = {"type": "WordPiece", "vocab": {"q": 0}, "max_input_chars_per_word": 9}
    pieces |= {"unk_token": "U", "continuing_subword_prefix": "#"}
    bad_tokenizer("no unknown token", lambda t: t.update(model=pieces))
    split_rule = {"type": "Split", "behavior": "Isolated", "invert": False}
    split_rule["pattern"] = {"Regex": "("}
    bad_tokenizer("a bad pattern to split at", lambda t: t.update(pre_tokenizer=split_rule))
    replace_rule = {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    bad_tokenizer("a bad pattern to replace", lambda t: t.update(normalizer=replace_rule))
    table = {"type": "Precompiled", "precompiled_charsmap": "////////////"}
    bad_tokenizer("a bad table", lambda t: t.update(normalizer=table))

    def sparse(folder: Path) -> None:
        (folder / "base" / "special_tokens_map.json").touch()
        os.truncate(folder / "base" / "special_tokens_map.json", MAX_TOKENIZER_BYTES + 1)

    # Different from our own, so that the files beside it are read too.
    foreign = edited("base/tokenizer.json", lambda t: t["model"].update(unk_token="U"))
    add(52, "128 MiB beside it", both(foreign, sparse), load_and_encode, DataError, "base")
    pipe = replaced_by_pipe("base/tokenizer.json")
    command(52, EVALUATE, 3, "tokenizer.json", "regular file", build=pipe)
    command(52, EVALUATE, 3, "tokenizer.json", build=cut("base/tokenizer.json", 100))


def read_special(world: World) -> None:
    """The special tokens of the base, without the package `tokenizers`."""
    named = named_tokens("base", {}, default_tokens("base", {}, is_byte_level=True))
    read_special_tokens("base", named, lambda text: None, ((), ()), 256)


def add_special_token_rows() -> None:
    """The files beside a tokenizer.json that name special tokens."""
    contents = {
        "cut": (b'{"a": ', "not valid JSON"),
        "a list": (b"[2]", "JSON object"),
        "NaN": (b'{"a": NaN}', "not valid JSON"),
        "too large a number": (b'{"a": 1e400}', "not valid JSON"),
        "a field twice": (b'{"a": 1, "a": 2}', "twice"),
        "deep": (b'{"a":' * 1000 + b"1" + b"}" * 1000, "deeper"),
        "thousands of digits": (b'{"eos_token_id": ' + b"9" * 5000 + b"}", "integer"),
        "half of a surrogate pair": (b'{"eos_token": "\\ud800"}', "surrogates"),
        "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
        "empty": (b"", "not valid JSON"),
        "more than 1 MiB": (b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}', "expected at most"),
    }
    for file in ("generation_config.json", "special_tokens_map.json"):
        path = f"base/{file}"
        for name, (content, says) in contents.items():
            build = written(path, content)
            add(52, f"{file}: {name}", build, read_special, FormatError, file, says)
        pipe = both(written(path, b"{}"), replaced_by_pipe(path))
        add(52, f"{file}: a pipe", pipe, read_special, FormatError, file, "regular file")
        add(52, f"{file}: a folder", make_folder(path), read_special, FormatError, file)
        # Texts are bytes in this base, which have no special tokens: the file is not read.
        command(52, f"{GENERATE} --ignore-eos", None, build=pipe)
    wanted = "an integer, a list of integers, or null"
    ids = {"eos_token_id": ("2", 2.5, True, {}, [[2]], [2, None], ["2"])}
    ids |= dict.fromkeys(("bos_token_id", "pad_token_id"), ("2", 2.5, True, {}, [2]))
    for file in ("config.json", "generation_config.json"):
        for field, values in ids.items():
            for value in values:
                build = both(write_generation, set_to(f"base/{file}", **{field: value}))
                says = wanted if field == "eos_token_id" else "an integer, or null"
                name = f"{file}: {field} {value!r}"
                add(52, name, build, read_special, FormatError, file, field, says)
        # No id of the model, or so many that a slow test for membership would be noticed.
        for value in (-1, 256, 10**19, [], None, list(range(100_000))):
            build = both(write_generation, set_to(f"base/{file}", eos_token_id=value))
            add(52, f"{file}: {value!r:.30}", build, read_special, None)
    for value in (2, True, ["</s>"], {"content": 2}, {}):
        build = written("base/special_tokens_map.json", json.dumps({"eos_token": value}).encode())
        says = ("special_tokens_map.json", "eos_token must be a text")
        add(52, f"eos_token {value!r}", build, read_special, FormatError, *says)


def write_generation(folder: Path) -> None:
    (folder / "base" / "generation_config.json").write_text("{}")


def make_folder(path: str) -> Build:
    return lambda folder: (folder / path).mkdir()


add_safetensors_rows()
add_odd_safetensors_rows()
add_path_rows()
add_json_rows()
add_folder_rows()
add_index_rows()
add_content_rows()
add_adapter_rows()
add_integer_rows()
add_overflow_rows()
add_base_prefix_rows()
add_config_rows()
add_weight_rows()
add_nonfinite_rows()
add_tokenizer_rows()
add_special_token_rows()
add_greedy_tokenizer_rows()
