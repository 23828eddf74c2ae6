"""The table of hostile inputs: what is built, how it is opened, and what it must end in.

KINDS names sixty-five ways in which an input can be wrong, or odd; each has at least one row. A row that ends in None
must be read or run all the same. Run by test_hostile.py, with the rows of hostile_tools.py. Not a test itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora import (
    AdamW,
    CausalLM,
    LoraConfig,
    PeftModel,
    TransformerConfig,
    get_peft_model,
    gradients,
)
from minilora.data.texts import read_text
from minilora.data.tokenizer import MAX_TOKENIZER_BYTES, ByteTokenizer, load_tokenizer
from minilora.errors import ConfigError, DataError, FormatError
from minilora.formats import (
    Checkpoint,
    SafetensorsFile,
    load_file,
    read_adapter,
    read_checkpoint,
    read_json,
    save_file,
)
from minilora.formats.safetensors import MAX_HEADER_BYTES
from minilora.functional import cross_entropy

KINDS = {
    1: "an empty file", 2: "a file of seven bytes", 3: "a header of no length", 4: "a length of 2^64 - 1",
    5: "a length of 2^63", 6: "a length beyond the file or the limit", 7: "a text that is not UTF-8",
    8: "a byte order mark", 9: "half of a surrogate pair", 10: "JSON that is cut or malformed",
    11: "JSON that is no object", 12: "NaN and infinity as JSON", 13: "sizes that are no plain integers",
    14: "nesting", 15: "integers of thousands of digits", 16: "small files that would take much memory",
    17: "a tensor twice", 18: "a field twice", 19: "padding by anything but spaces behind",
    20: "fields that the format does not have", 21: "metadata that are no strings", 22: "negative sizes",
    23: "offsets that are no pair", 24: "a hole between tensors", 25: "bytes behind the last tensor",
    26: "data that are cut", 27: "tensors on the same bytes", 28: "tensors that overlap", 29: "tensors of no size",
    30: "no elements, but sides beyond all numbers", 31: "products that wrap around", 32: "too many dimensions",
    33: "dtypes that there are not", 34: "sizes that contradict each other", 35: "a bool that is neither",
    36: "names that mean something elsewhere", 37: "tensors out of alignment", 38: "weights that are not finite",
    39: "a file that changes while it is read", 40: "what is no regular file", 41: "pickles",
    42: "an index that leads elsewhere", 43: "an adapter for another base", 44: "ranks", 45: "lora_alpha and dropout",
    46: "patterns that hang", 47: "targets", 48: "methods that are not there, and code to import",
    49: "configurations that ask for code", 50: "shapes of a model that cannot be",
    51: "weights that contradict config.json", 52: "tokenizers",
    53: "texts too short to train on, and odd ones", 54: "texts that are no UTF-8",
    55: "a text that changes while it is trained on", 56: "numbers on the command line", 57: "prompts",
    58: "output that would overwrite", 59: "output that has no place", 60: "one byte changed anywhere",
    61: "records to train on", 62: "adapters of mlx-lm's", 63: "what cannot be merged",
    64: "an end in the middle of writing", 65: "several tasks in a folder",
}  # fmt: skip


@dataclass
class World:
    """The folder of one row, which is also the working directory, and a model that must come out unharmed."""

    folder: Path
    victim: PeftModel


@dataclass(frozen=True)
class Row:
    kind: int
    name: str
    build: Callable[[Path], object]  # into a folder of its own
    open: Callable[[World], object] | str  # a call, or a command line
    ends: type[BaseException] | int | None  # the very class, or the exit code; None: it is read
    says: tuple[str, ...] = ()  # words of the message
    whole: bool = True  # whether the folder holds a base, an adapter and texts before `build`
    worst: bool = False  # run once more with hardly any memory to be had


# ---- the parts that rows are built of -------------------------------------------------------------------------------

TINY = "--batch-size 2 --context 16 --threads 1"
SHAPE = "--hidden-size 16 --intermediate-size 24 --num-hidden-layers 1 --num-attention-heads 2"
F = f"finetune --base base --data book.txt --out new {TINY}"
P = f"pretrain --data book.txt --out new {TINY} {SHAPE}"
G = "generate --base base --prompt hi --max-new-tokens 2"
E = "evaluate --base base --data book.txt"
M = "merge --base base --adapter adapter --out new"
I = "inspect"
LONG = "x" * 5000
TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 10
CONFIG = TransformerConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def make_world(folder: Path) -> None:
    """A base, an adapter for it, and texts."""
    CausalLM(CONFIG, seed=1).save_pretrained(folder / "base")
    ByteTokenizer().save(folder / "base")
    model = get_peft_model(CausalLM(CONFIG, seed=1), LORA)
    for parameter in model.adapter_parameters("default").values():
        parameter.data = parameter.data + np.float32(0.01)
    model.save_pretrained(folder / "adapter")
    (folder / "book.txt").write_bytes(TEXT)
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep me")


def make_victim() -> tuple[PeftModel, AdamW]:
    """A model with an adapter in training: whatever is loaded beside it and fails must leave it as it is."""
    model = get_peft_model(CausalLM(CONFIG, seed=1), LORA)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = np.arange(12).reshape(2, 6)
    optimizer.step(gradients(cross_entropy(model(ids[:, :-1]), ids[:, 1:]), optimizer.params))
    return model, optimizer


def raw(header: object, data: bytes = b"", *, pad: bytes = b"") -> bytes:
    """The bytes of a safetensors file. A header that is not bytes is written as JSON."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return len(text + pad).to_bytes(8, "little") + text + pad + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


Content = bytes | Callable[[], bytes]


def written(path: str, content: Content) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(
        content if isinstance(content, bytes) else content()
    )


def weights(kind: int, name: str, content: Content, *says: str, **options: Any) -> Row:
    """A file of tensors."""
    file = "hostile.safetensors"
    return Row(
        kind,
        name,
        written(file, content),
        lambda w: load_file(file),
        FormatError,
        (file, *says),
        False,
        **options,
    )


def odd_weights(kind: int, name: str, content: bytes, values: dict[str, Any]) -> Row:
    """A file of tensors that is odd, but good."""

    def check(world: World) -> None:
        loaded = load_file("odd.safetensors")
        assert {key: array.tolist() for key, array in loaded.items()} == values
        assert all(array.flags.carray for array in loaded.values())

    return Row(kind, name, written("odd.safetensors", content), check, None, whole=False)


def bad_json(kind: int, name: str, content: Content, *says: str, **options: Any) -> Row:
    """Any file of JSON."""
    file = "hostile.json"
    return Row(
        kind,
        name,
        written(file, content),
        lambda w: read_json(file),
        FormatError,
        (file, *says),
        False,
        **options,
    )


def edited(path: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A file of JSON with something changed in it: `change` works in place or returns another value."""

    def build(folder: Path) -> None:
        value = json.loads((folder / path).read_text())
        changed = change(value)
        (folder / path).write_text(json.dumps(value if changed is None else changed))

    return build


def set_to(path: str, **fields: object) -> Callable[[Path], object]:
    return edited(path, lambda value: value.update(fields))


def adapter_config(kind: int, name: str, says: str | tuple[str, ...], **fields: object) -> Row:
    """An adapter_config.json whose values mean nothing."""
    build = set_to("adapter/adapter_config.json", **fields)
    says = (says,) if isinstance(says, str) else says
    worst = len(repr(fields)) > 10_000
    return Row(
        kind,
        name,
        build,
        load_beside,
        ConfigError,
        ("adapter/adapter_config.json", *says),
        worst=worst,
    )


def load_beside(world: World) -> None:
    world.victim.load_adapter("adapter", "beside")


def load_fresh(world: World) -> None:
    PeftModel.from_pretrained(CausalLM.from_pretrained("base"), "adapter")


def load_base(world: World) -> None:
    CausalLM.from_pretrained("base")


def model_config(
    kind: int, name: str, says: str | tuple[str, ...], ends: Any = ConfigError, **fields: object
) -> Row:
    """A config.json that describes no model, or not this one."""
    says = (says,) if isinstance(says, str) else says
    return Row(kind, name, set_to("base/config.json", **fields), load_base, ends, ("config", *says))


def changed_tensors(
    path: str, change: Callable[[dict[str, np.ndarray]], object]
) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        tensors = load_file(folder / path)
        change(tensors)
        save_file(folder / path, tensors)

    return build


def broken(file: str, key: str, value: float) -> Callable[[Path], object]:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        (name,) = [name for name in tensors if key in name]
        tensors[name].flat[-1] = value

    return changed_tensors(file, spoil)


def cut(path: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / path, size)


def nothing(folder: Path) -> None:
    """The world is as it should be; what is wrong is how it is opened."""


def command(
    kind: int, line: str, code: int | None, *says: str, build: Callable[[Path], object] = nothing
) -> Row:
    """A command line."""
    shown = repr(line)[1:-1]
    shown = shown if len(shown) <= 60 else f"{shown[:8]} ... {shown[-45:]}"
    return Row(kind, shown, build, line, code, says)


def text(kind: int, line: str, content: bytes, code: int | None, *says: str) -> Row:
    """A command line and the text.txt that it reads."""
    return Row(
        kind,
        f"{line.split()[0]} of {content[:24]!r}",
        written("text.txt", content),
        line,
        code,
        says,
    )


# ---- shards ----


def split(folder: Path, shards: int = 3) -> dict[str, str]:
    """Rewrite a whole checkpoint as shards; returns the weight map."""
    with Checkpoint(folder) as whole:
        tensors = {key: whole.read(key) for key in whole.keys()}
    (folder / "model.safetensors").unlink()
    name = "model-{:05}-of-" + f"{shards:05}.safetensors"
    weight_map = {key: name.format(1 + i % shards) for i, key in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file(
            folder / shard, {key: tensors[key] for key in tensors if weight_map[key] == shard}
        )
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index(
    kind: int,
    name: str,
    change: Callable[[Path, dict[str, str]], object],
    *says: str,
    **options: Any,
) -> Row:
    """The base in three shards, whose index is changed in place or replaced."""

    def build(folder: Path) -> None:
        save_file(folder / "secret.safetensors", {"x": np.zeros(1)})
        weight_map = split(folder / "base")
        changed = change(folder / "base", weight_map)
        write_index(folder / "base", weight_map if changed is None else changed)

    says = ("model.safetensors.index.json", *says)
    return Row(
        kind,
        f"index: {name}",
        build,
        lambda w: read_checkpoint("base"),
        FormatError,
        says,
        **options,
    )


def first_shard(shard: str) -> Callable[[Path, dict[str, str]], object]:
    return lambda folder, weight_map: weight_map.update({next(iter(weight_map)): shard})


def linked_outside(folder: Path, weight_map: dict[str, str]) -> None:
    shard = next(iter(weight_map.values()))
    (folder / shard).rename(folder.parent / "secret.safetensors")
    (folder / shard).symlink_to(folder.parent / "secret.safetensors")


def swapped(folder: Path, weight_map: dict[str, str]) -> None:
    first, second = list(weight_map)[:2]
    weight_map[first], weight_map[second] = weight_map[second], weight_map[first]


def folder_of(
    kind: int, what: str, name: str, change: Callable[[Path], object], *says: str, **options: Any
) -> Row:
    """A base's or an adapter's folder, read without asking what it means."""
    read = {"base": read_checkpoint, "adapter": read_adapter}[what]
    return Row(
        kind,
        f"{what}: {name}",
        lambda f: change(f / what),
        lambda w: read(what),
        FormatError,
        (what, *says),
        **options,
    )


def renamed(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def replaced_by_pipe(path: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / path).unlink(), os.mkfifo(folder / path))


# ---- tokenizers ----


def tokenizer(
    name: str, change: Callable[[dict[str, Any]], object] | bytes, *says: str, ends: Any = DataError
) -> Row:
    """A tokenizer.json that is not our own. (With the package `tokenizers` or without, it is refused.)"""
    path = "base/tokenizer.json"
    build = written(path, change) if isinstance(change, bytes) else edited(path, change)
    return Row(
        52,
        name,
        build,
        lambda w: load_tokenizer("base", 256).encode("a b"),
        ends,
        ("tokenizer.json", *says),
    )


def vocabulary(**more: object) -> Callable[[dict[str, Any]], object]:
    return lambda value: value["model"]["vocab"].update(more)


# ---- what changes or hangs while it is read ----


def read_after(change: Callable[[], object]) -> Callable[[World], object]:
    def read(world: World) -> None:
        with SafetensorsFile("base/model.safetensors") as file:
            change()
            file.read("model.norm.weight")

    return read


def still_the_old_one(world: World) -> None:
    with SafetensorsFile("base/model.safetensors") as file:
        expected = file.read("model.norm.weight")
        save_file("other", {"y": np.zeros(3)})
        os.replace("base/model.safetensors", "aside")
        os.replace("other", "base/model.safetensors")
        assert np.array_equal(file.read("model.norm.weight"), expected)
    os.replace("aside", "base/model.safetensors")


def cut_and_mended(world: World) -> None:
    """The file is cut between the header and the data; afterwards it is put back, so that the world is the same."""
    path = Path("base/model.safetensors")
    before, times = path.read_bytes(), path.stat()
    try:
        read_after(lambda: os.truncate(path, len(before) // 2))(world)
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


F32 = entry()
J32 = json.dumps(F32).encode()
FOUR = b"\0" * 4
BIG = 2**62
ODD_NAMES = ["", "\0", "../../etc/passwd", "\x1b[2J"]
ADAPTER_KEY = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"


def rows() -> Iterator[Row]:
    yield from safetensors_rows()
    yield from json_rows()
    yield from folder_rows()
    yield from adapter_rows()
    yield from config_rows()
    yield from text_rows()
    yield from command_rows()


def safetensors_rows() -> Iterator[Row]:
    reader = "not a safetensors file"
    yield weights(1, "empty", b"", reader)
    yield weights(2, "7 bytes", b"\0" * 7, reader)
    yield weights(3, "N = 0", b"\0" * 8, reader)
    yield weights(3, "N = 1", raw(b"{"), reader)
    yield weights(4, "N = 2^64 - 1", b"\xff" * 8 + b"{}", reader, worst=True)
    yield weights(5, "N = 2^63", (2**63).to_bytes(8, "little") + b"{}", reader, worst=True)
    yield weights(6, "N one beyond the file", (3).to_bytes(8, "little") + b"{}", reader)
    file = "hostile.safetensors"

    def sparse(folder: Path) -> None:
        (folder / file).write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
        os.truncate(folder / file, MAX_HEADER_BYTES + 100)

    says = (file, "header of 100000001 bytes")
    yield Row(
        6,
        "N beyond the limit",
        sparse,
        lambda w: load_file(file),
        FormatError,
        says,
        whole=False,
        worst=True,
    )
    yield weights(7, "not UTF-8", raw(b'{"\xff":1}'), "utf-8")
    yield weights(8, "byte order mark", raw(b"\xef\xbb\xbf{}"), "must begin")
    yield weights(9, "lone surrogate", raw(b'{"\\ud800":%b}' % J32, FOUR), "surrogate")
    yield weights(10, "truncated JSON", raw(b'{"a":}'), "not valid JSON")
    yield weights(10, "two objects", raw(b"{}{}"), "not valid JSON")
    yield weights(11, "top level list", raw(b"[]"), "must begin")
    yield weights(11, "top level null", raw(b"null"), "must begin")
    yield weights(12, "NaN", raw(b'{"__metadata__":{"a":NaN}}'), "not valid JSON")
    shape = b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[%b,4]}}'
    yield weights(12, "Infinity", raw(shape % (b"Infinity", b"0"), FOUR), "not valid JSON")
    yield weights(13, "size 1.0", raw({"a": entry(shape=[1.0])}, FOUR), "'a'", "integers")
    yield weights(13, "size 1e0", raw(shape % (b"1e0", b"0"), FOUR), "integers")
    yield weights(13, "size true", raw({"a": entry(shape=[True])}, FOUR), "integers")
    yield weights(13, "offset false", raw({"a": entry(offsets=[False, 4])}, FOUR), "integers")
    yield weights(13, "offset -0", raw(shape % (b"1", b"-0"), FOUR), "-0 is not")
    yield weights(13, "shape as object", raw({"a": entry(shape={})}, FOUR), "integers")
    yield weights(
        14, "nesting 200", raw(b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"), "nested deeper than 3"
    )
    deep = b"[" * 100_000 + b"]" * 100_000
    yield weights(
        14, "nesting 100,000", raw(b'{"a":' + deep + b"}"), "nested deeper than 3", worst=True
    )
    yield weights(14, "nesting unclosed", raw(b"{" + b"[" * 100_000 + b"}"), "nested deeper than 3")
    yield weights(
        14, "nesting behind a quote", raw(b'{"\\\\":' + deep + b"}"), "nested deeper than 3"
    )
    yield weights(15, "5,000 digits", raw(shape % (b"9" * 5000, b"0")), "integer")
    many = "lists, objects and texts"
    yield weights(
        16,
        "4 MB of brackets",
        lambda: raw(b'{"a":[' + b"[]," * 1_400_000 + b"[]]}"),
        many,
        worst=True,
    )
    yield weights(
        16,
        "4 MB of quotes",
        lambda: raw(b'{"a":[' + b'"",' * 1_400_000 + b'""]}'),
        many,
        worst=True,
    )
    yield weights(
        16, "4 MB of quotes alone", lambda: raw(b"{" + b'"' * 4_000_000 + b"}"), many, worst=True
    )
    yield weights(17, "name twice", raw(b'{"a":%b,"a":%b}' % (J32, J32), FOUR), "'a' appears twice")
    yield weights(
        17,
        "1 MB name twice",
        lambda: raw(b'{"%b":1,"%b":1}' % ((b"n" * 2**20,) * 2)),
        "appears twice",
    )
    yield weights(
        18, "field twice", raw(b'{"a":{"dtype":"F32",%b}' % J32[1:], FOUR), "'dtype' appears twice"
    )
    yield weights(18, "metadata twice", raw(b'{"__metadata__":{},"__metadata__":{}}'), "twice")
    yield weights(18, "metadata key twice", raw(b'{"__metadata__":{"a":"1","a":"2"}}'), "twice")
    for pad, name in (b"\t", "tab"), (b" \n", "newline"), (b"\0", "NUL"):
        yield weights(19, f"trailing {name}", raw(b"{}", pad=pad), "end with")
    for pad, name in (b" ", "space"), (b"\n", "newline"):
        yield weights(19, f"leading {name}", raw(pad + b"{}"), "must begin")
    yield weights(20, "unknown field", raw({"a": entry(extra=1)}, FOUR), "'a'", "exactly dtype")
    yield weights(20, "entry is a list", raw({"a": [1, 2]}, FOUR), "exactly dtype")
    yield weights(20, "entry is null", raw({"a": None}), "exactly dtype")
    for name, value in ("list", []), ("integer", {"a": 1}), ("nested", {"a": {}}):
        yield weights(
            21, f"metadata {name}", raw({"__metadata__": value}), "__metadata__", "strings only"
        )
    yield weights(
        21, "metadata like a tensor", raw({"__metadata__": entry()}, FOUR), "strings only"
    )
    yield weights(22, "negative size", raw({"a": entry(shape=[-1])}, FOUR), "integers >= 0")
    yield weights(
        22, "two negative sizes", raw({"a": entry(shape=[-1, -1])}, FOUR), "integers >= 0"
    )
    yield weights(23, "negative offset", raw({"a": entry(offsets=[-4, 0])}, FOUR), "integers >= 0")
    yield weights(
        23, "end before begin", raw({"a": entry(offsets=[4, 0])}, FOUR), "bytes, the offsets"
    )
    yield weights(23, "3 offsets", raw({"a": entry(offsets=[0, 4, 4])}, FOUR), "2 offsets")
    yield weights(23, "1 offset", raw({"a": entry(offsets=[0])}, FOUR), "2 offsets")
    yield weights(23, "offsets as text", raw({"a": entry(offsets="04")}, FOUR), "integers")
    gap = raw({"a": F32, "b": entry(offsets=[8, 12])}, FOUR * 3)
    yield weights(
        24,
        "hole at the front",
        raw({"a": entry(offsets=[4, 8])}, FOUR * 2),
        "begins at byte 4, expected 0",
    )
    yield weights(24, "hole in the middle", gap, "'b' begins at byte 8, expected 4")
    yield weights(
        25, "trailing byte", raw({"a": F32}, FOUR + b"\0"), "take 4 bytes, the file holds 5"
    )
    yield weights(
        25, "trailing zip", raw({"a": F32}, FOUR + b"PK\x05\x06" + b"\0" * 18), "take 4 bytes"
    )
    yield weights(25, "data without tensors", raw({}, b"\0"), "take 0 bytes, the file holds 1")
    yield weights(26, "missing byte", raw({"a": F32}, b"\0" * 3), "take 4 bytes, the file holds 3")
    inside = raw({"a": F32, "b": entry(shape=[0], offsets=[2, 2])}, FOUR)
    across = raw({"a": entry("F64", [1], [0, 8]), "b": entry(offsets=[4, 8])}, FOUR * 2)
    yield weights(
        27, "full overlap", raw({"a": F32, "b": F32}, FOUR), "begins at byte 0, expected 4"
    )
    yield weights(28, "partial overlap", across, "expected 8")
    yield weights(28, "empty tensor inside another", inside, "expected 4")
    none = "no array can have"
    yield weights(
        30, "shape (0, 2^62, 2^62)", raw({"a": entry(shape=[0, BIG, BIG], offsets=[0, 0])}), none
    )
    yield weights(
        30, "shape (0, 2^63 - 1)", raw({"a": entry(shape=[0, 2**63 - 1], offsets=[0, 0])}), none
    )
    yield weights(
        31, "2^33 x 2^33", raw({"a": entry(shape=[2**33, 2**33])}, FOUR), none, worst=True
    )
    yield weights(31, "2^62 floats", raw({"a": entry(shape=[BIG])}, FOUR), none, worst=True)
    yield weights(31, "one side of 2^64", raw({"a": entry(shape=[2**64])}, FOUR), none)
    yield weights(
        31, "a product of 2^64 - 1", raw({"a": entry(shape=[2**32 + 1, 2**32 - 1])}, FOUR), none
    )
    most = {"a": entry(shape=[2**40], offsets=[0, 2**42])}
    yield weights(
        31, "four TiB that are not there", raw(most, FOUR), "the file holds 4", worst=True
    )
    yield weights(32, "rank 65", raw({"a": entry(shape=[1] * 65)}, FOUR), "at most 64 dimensions")
    yield weights(
        32, "rank 1000", raw({"a": entry(shape=[1] * 1000)}, FOUR), "at most 64 dimensions"
    )
    for dtype, shaped in (
        ("f32", [1]),
        ("O", [1]),
        ("F8_E4M3", [4]),
        ("F4", [8]),
        (None, [1]),
        (["F32"], [1]),
    ):
        yield weights(
            33, f"dtype {dtype}", raw({"a": entry(dtype, shaped)}, FOUR), "'a'", "unsupported dtype"
        )
    yield weights(
        33, "dtype C64", raw({"a": entry("C64", [1], [0, 8])}, FOUR * 2), "unsupported dtype"
    )
    yield weights(
        33, "1 MB dtype", lambda: raw({"a": entry("\n" * 2**18)}, FOUR), "unsupported dtype"
    )
    yield weights(34, "size is not shape x dtype", raw({"a": entry("F16")}, FOUR), "take 2 bytes")
    for field in F32:
        missing = {name: value for name, value in F32.items() if name != field}
        yield weights(34, f"no {field}", raw({"a": missing}, FOUR), "'a'", "exactly dtype")
    yield weights(
        35, "BOOL byte 2", raw({"a": entry("BOOL", [4])}, b"\0\1\2\1"), "'a'", "neither 0 nor 1"
    )
    yield weights(
        36, "terminal escape in a bad entry", raw({"\x1b[31m" * 100: entry("f32")}, FOUR), r"\x1b"
    )
    bad = {"n" * 2**20: entry("f32", [9] * 9)}
    yield weights(36, "1 MB name of a bad entry", lambda: raw(bad, FOUR), "unsupported dtype")
    yield odd_weights(10, "no tensors", raw({}), {})
    empty = {
        "b": entry("U8", [1], [0, 1]),
        "a": entry("I8", [0, 2], [1, 1]),
        "c": entry("U8", [0], [0, 0]),
    }
    yield odd_weights(
        29, "zero-size tensors share an offset", raw(empty, b"\7"), {"b": [7], "a": [], "c": []}
    )
    yield odd_weights(29, "no dimensions", raw({"a": entry("U8", [], [0, 1])}, b"\5"), {"a": 5})
    named = {name: entry("U8", [], [i, i + 1]) for i, name in enumerate(ODD_NAMES)}
    yield odd_weights(
        36, "names that mean something", raw(named, FOUR), dict.fromkeys(ODD_NAMES, 0)
    )
    twins = {"\u00e9": entry("U8", [], [0, 1]), "e\u0301": entry("U8", [], [1, 2])}
    yield odd_weights(
        36, "two spellings of one letter", raw(twins, b"\1\2"), {"\u00e9": 1, "e\u0301": 2}
    )
    brackets = '[[[[{{{"\\"\\\\"[[[[' * 50
    yield odd_weights(
        36, "brackets and quotes", raw({brackets: entry("U8", [], [0, 1])}, b"\1"), {brackets: 1}
    )
    pair = raw(b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"\1")
    yield odd_weights(9, "a whole pair of surrogates", pair, {"\U0001f600": 1})
    misaligned = raw(
        {"u": entry("U8", [1], [0, 1]), "f": entry("I32", [1], [1, 5])}, b"\1\2\0\0\0", pad=b" "
    )
    yield odd_weights(37, "misaligned, odd header", misaligned, {"u": [1], "f": [2]})
    yield Row(
        39,
        "cut after opening",
        nothing,
        cut_and_mended,
        FormatError,
        ("model.safetensors", "'model.norm.weight'"),
    )
    yield Row(39, "replaced after opening", nothing, still_the_old_one, None)
    yield Row(
        40,
        "a folder",
        lambda f: (f / "x").mkdir(),
        lambda w: load_file("x"),
        FormatError,
        ("'x'",),
        whole=False,
    )
    says = ("'x'", "not a regular file")
    yield Row(
        40, "a pipe", lambda f: os.mkfifo(f / "x"), lambda w: load_file("x"), FormatError, says
    )
    device = "/dev/zero"
    for read in (load_file, read_json):
        name, says = f"{read.__name__} of {device}", (device, "not a regular file")
        yield Row(
            40, name, nothing, lambda w, read=read: read(device), FormatError, says, worst=True
        )
    yield Row(
        40,
        "a device as text",
        nothing,
        lambda w: read_text(device),
        DataError,
        (device, "regular"),
        worst=True,
    )
    yield Row(
        40,
        "a loop",
        lambda f: (f / "x").symlink_to("x"),
        lambda w: load_file("x"),
        OSError,
        ("'x'",),
    )
    yield Row(40, "not there", nothing, lambda w: load_file("x"), FileNotFoundError, ("'x'",))
    yield weights(41, "a pickle", b"\x80\x02}q\x00X\x01\x00\x00\x00x" * 20, "no .bin, .pt")
    yield weights(41, "a zip", b"PK\x03\x04" + b"\0" * 400, "hostile.safetensors")


def json_rows() -> Iterator[Row]:
    yield bad_json(1, "json: empty", b"", "not valid JSON")
    yield bad_json(7, "json: not UTF-8", b'{"a": "\xff"}', "utf-8")
    yield bad_json(7, "json: UTF-16", '{"a": 1}'.encode("utf-16"), "utf-8")
    yield bad_json(8, "json: byte order mark", b"\xef\xbb\xbf{}", "BOM")
    yield bad_json(9, "json: lone surrogate", b'{"a": "\\ud800"}', "surrogates")
    yield bad_json(9, "json: lone surrogate in a key", b'{"\\uDFFF": 1}', "surrogates")
    for name, content in {
        "truncated": b'{"a": 1', "two": b"{} {}", "trailing comma": b'{"a": 1,}', "comment": b"{} // yes",
        "single quotes": b"{'a': 1}", "raw newline in a text": b'{"a": "\n"}', "escape": b'{"\x1b[31m": 1}',
    }.items():  # fmt: skip
        yield bad_json(10, f"json: {name}", content, "not valid JSON")
    yield bad_json(11, "json: list", b"[]", "expected a JSON object, found list")
    yield bad_json(11, "json: null", b"null", "found NoneType")
    for content in (b'{"a": NaN}', b'{"a": [-Infinity]}', b'{"a": {"b": 1e400}}'):
        yield bad_json(12, f"json: {content.decode()}", content, "not valid JSON")
    yield bad_json(14, "json: depth 65", b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64")
    yield bad_json(
        14,
        "json: depth 100,000",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deeper than 64",
        worst=True,
    )
    yield bad_json(14, "json: depth unclosed", b"[" * 100_000, "deeper than 64")
    hidden = b'{"\\\\\\"": "\\\\",  "b":' + b"[" * 100_000
    yield bad_json(14, "json: depth behind an escaped quote", hidden, "deeper than 64")
    yield bad_json(15, "json: 5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", "not an integer")
    yield bad_json(15, "json: 21 digits", b'{"a": ' + b"9" * 21 + b"}", "not an integer")
    yield bad_json(
        16,
        "json: 2 MiB",
        lambda: b"{" + b" " * (2 << 20) + b"}",
        "expected at most 1048576",
        worst=True,
    )
    yield bad_json(18, "json: a field twice", b'{"a": 1, "a": 1}', "'a' appears twice")
    yield bad_json(
        18, "json: twice, deep", b'{"x": [{"b": 1, "a": 2, "b": 3}]}', "'b' appears twice"
    )
    yield bad_json(18, "json: twice by escape", b'{"a": 1, "\\u0061": 2}', "'a' appears twice")
    long = b'{"%b": 1, "%b": 1}' % ((b"\\n" * 2**17,) * 2)
    yield bad_json(18, "json: a long field twice", long, "appears twice")


def folder_rows() -> Iterator[Row]:
    weights_file, config_file = "model.safetensors", "config.json"
    yield folder_of(
        34, "base", "no config", lambda b: (b / config_file).unlink(), "has no config.json"
    )
    yield folder_of(
        34, "base", "no weights", lambda b: (b / weights_file).unlink(), "has no model.safetensors"
    )
    hint = ("is a pickle, and only safetensors are read",)
    yield folder_of(
        41,
        "base",
        "only a pickle",
        renamed(weights_file, "pytorch_model.bin"),
        "'pytorch_model.bin'",
        *hint,
    )
    yield folder_of(
        41, "base", "only a .pt", renamed(weights_file, "m\x1b.pt"), r"'m\x1b.pt'", *hint
    )
    yield folder_of(
        41, "base", "a pickle inside", written(weights_file, b"\x80\x04\x95" * 99), "no .bin, .pt"
    )
    made = lambda b: ((b / weights_file).unlink(), (b / weights_file).mkdir())  # noqa: E731
    yield folder_of(40, "base", "weights are a folder", made, "not a regular file")
    yield folder_of(
        40, "base", "config is a pipe", replaced_by_pipe(config_file), "not a regular file"
    )
    yield folder_of(
        11,
        "base",
        "config is a list",
        written(config_file, b"[]"),
        "config.json",
        "expected a JSON object",
    )
    yield index(42, "no weight_map", lambda b, w: "x", "weight_map must")
    yield index(42, "a weight_map of numbers", lambda b, w: {"a": 1}, "weight_map must")
    yield index(42, "parent", first_shard("../secret.safetensors"), "is outside the folder")
    yield index(42, "absolute", first_shard("/etc/passwd.safetensors"), "is outside the folder")
    inside = lambda b, w: w.update({next(iter(w)): str(b / "model-00001-of-00003.safetensors")})  # noqa: E731
    yield index(42, "absolute, though inside", inside, "is outside the folder")
    yield index(42, "backslash", first_shard("..\\secret.safetensors"), "not the name of")
    yield index(42, "NUL", first_shard("a\0.safetensors"), "not the name of")
    yield index(42, "a pickled shard", first_shard("pytorch_model-00001.bin"), "not the name of")
    yield index(42, "an empty name", first_shard(""), "not the name of")
    yield index(42, "link to the outside", linked_outside, "is outside the folder")
    yield index(42, "a missing shard", first_shard("model-00009.safetensors"), "is missing")
    yield index(
        42, "a 10 kB name", first_shard("\x1b" * 10_000 + ".safetensors"), "not the name of"
    )
    yield index(
        42,
        "a path of a million parts",
        first_shard("a/" * 10**6 + ".safetensors"),
        "not the name of",
        worst=True,
    )
    yield index(
        42,
        "by another way",
        first_shard("../base/model-00002-of-00003.safetensors"),
        "listed for it but not in it",
    )
    yield index(42, "two shards swapped", swapped, "listed for it but not in it")
    more = lambda b, w: w.update({"zzz": "model-00001-of-00003.safetensors"})  # noqa: E731
    yield index(42, "a tensor that is not stored", more, "'zzz' is listed for it but not in it")
    yield index(
        42,
        "a tensor not listed",
        lambda b, w: w.pop("model.norm.weight") and None,
        "in it but not listed",
    )
    last = "model-00003-of-00003.safetensors"
    damaged = lambda b, w: (b / last).write_bytes(b"\0" * 9) and None  # noqa: E731
    row = index(42, "a damaged last shard", damaged, "not a safetensors file")
    yield Row(
        row.kind, row.name, row.build, row.open, FormatError, (last, "not a safetensors file")
    )
    yield index(16, "17 MiB", lambda b, w: {"a": " " * (17 << 20)}, "expected at most 16777216")


def adapter_rows() -> Iterator[Row]:
    config_file, file = "adapter_config.json", "adapter_model.safetensors"
    yield folder_of(
        34,
        "adapter",
        "no config",
        lambda a: (a / config_file).unlink(),
        "has no adapter_config.json",
    )
    yield folder_of(
        34,
        "adapter",
        "no weights",
        lambda a: (a / file).unlink(),
        "has no adapter_model.safetensors",
    )
    pickled = renamed(file, "adapter_model.bin")
    yield folder_of(
        41, "adapter", "a pickle", pickled, "adapter_model.bin is a pickle and is not read"
    )
    yield folder_of(
        18,
        "adapter",
        "config twice",
        written(config_file, b'{"r": 1, "r": 2}'),
        "'r' appears twice",
    )
    yield folder_of(26, "adapter", "cut weights", cut(file, 800), file, "the file holds")

    # An adapter that does not fit: refused whole, with the names of what is wrong.
    key = ADAPTER_KEY.format
    change = lambda work: changed_tensors(f"adapter/{file}", work)  # noqa: E731
    fits = "adapter: the adapter does not fit this base"
    for load in (load_beside, load_fresh):
        beside = load.__name__.removeprefix("load_")

        def row(name: str, build: Any, *says: str, load: Any = load, beside: str = beside) -> Row:
            return Row(43, f"{name}, {beside}", build, load, FormatError, (fits, *says))

        yield row(
            "a key is missing", change(lambda t: t.pop(key("q", "A"))), f"missing {key('q', 'A')}"
        )
        more = change(lambda t: t.update({"base_model.model.stranger": np.zeros(1)}))
        yield row("a key too many", more, "unknown base_model.model.stranger")
        steer = change(lambda t: t.update({"\x1b[2J": np.zeros(1)}))
        yield row("a key that steers the terminal", steer, r"unknown \x1b[2J")
        wide = change(lambda t: t.update({key("v", "B"): np.zeros((5, 2))}))
        yield row("a wrong shape", wide, f"{key('v', 'B')} is (5, 2), the base needs (16, 2)")
        yield row("another rank", set_to(f"adapter/{config_file}", r=3), "the base needs (3, 16)")
        thousand = change(lambda t: t.update({f"k{i:04}": np.zeros(1) for i in range(1000)}))
        yield row("a thousand keys too many", thousand, "unknown k0000", "and 997 more")
        many = set_to(f"adapter/{config_file}", target_modules=["q_proj", "c_attn"])
        yield row("another architecture", many, "'c_attn' match nothing", "q_proj")

    # Values that mean nothing.
    for value in (0, -1, 2**31, 1.5, True, "8", None, [8]):
        yield adapter_config(44, f"r = {value!r}", "r must be", r=value)
        yield adapter_config(
            44, f"rank_pattern of {value!r}", "rank_pattern must be", rank_pattern={"q": value}
        )
    big = set_to(f"adapter/{config_file}", r=17)
    grown = changed_tensors(
        f"adapter/{file}",
        lambda t: t.update(
            {k: np.zeros([17 if n == 2 else n for n in a.shape]) for k, a in t.items()}
        ),
    )
    yield Row(
        44,
        "r above the full rank warns",
        lambda f: (big(f), grown(f)),
        f"{E} --adapter adapter",
        None,
    )
    for value in (0, -1, True, "8", None):
        yield adapter_config(45, f"lora_alpha = {value!r}", "lora_alpha must be", lora_alpha=value)
    for value in (-0.1, 1.0, 1, True, None, "0"):
        yield adapter_config(
            45, f"lora_dropout = {value!r}", "lora_dropout must be", lora_dropout=value
        )
    for literal in ("NaN", "Infinity", "1e400"):
        build = written(f"adapter/{config_file}", f'{{"lora_alpha": {literal}}}'.encode())
        yield Row(
            45,
            f"lora_alpha = {literal}",
            build,
            load_beside,
            FormatError,
            (config_file, "not valid JSON"),
        )
    hanging = ("(([a-z_0-9]+)*\\.?)*!", "(.*)*x", "(a|a)*b", "((((.*)*)*)*)*!", "(.?){99}(.?){99}!")
    for pattern in hanging:
        build = set_to(f"adapter/{config_file}", target_modules=pattern)
        yield Row(
            46,
            f"target_modules {pattern}",
            build,
            load_beside,
            FormatError,
            (fits, "match nothing"),
            worst=True,
        )
        yield command(46, f"{F} --target-modules '{pattern}'", 2, "no target is left")
        build = set_to(f"adapter/{config_file}", rank_pattern={pattern: 2}, exclude_modules=pattern)
        yield Row(46, f"rank_pattern {pattern}", build, f"{E} --adapter adapter", None)
    for pattern, says in (
        ("(" * 300, "300 groups"),
        ("((.{99}){99}){99}", "too many"),
        ("a{101}", "within 100"),
    ):
        yield adapter_config(
            46, f"target_modules {pattern[:9]}...", ("pattern", says), target_modules=pattern
        )
    for pattern in ("(", "(?=q)", "a**", "\\1", "[a"):
        yield adapter_config(
            46, f"rank_pattern {pattern}", ("pattern", "supported are"), rank_pattern={pattern: 2}
        )
    followed = "at most 2000 in all"
    yield adapter_config(
        46, "5,000 patterns", followed, rank_pattern={f"q{i}": 2 for i in range(5000)}
    )
    branching = {f"(.?){{99}}(.?){{99}}{i}": 2 for i in range(100)}
    yield adapter_config(46, "100 patterns of many choices", followed, alpha_pattern=branching)
    yield adapter_config(
        46, "3,000 layers_patterns", followed, layers_pattern=["a"] * 3000, layers_to_transform=[0]
    )
    for value in ([], "", 5, [""], ["q_proj", 1], [None], True, {"a": 1}):
        yield adapter_config(
            47, f"target_modules = {value!r}", "target_modules must be", target_modules=value
        )
    yield adapter_config(
        47, "20,000 targets", "target_modules must be", target_modules=["q_proj"] * 20_000
    )
    million = set_to(f"adapter/{config_file}", target_modules=["q_proj"] * 10**6)
    large = (config_file, "expected at most 1048576")
    yield Row(47, "1,000,000 targets", million, load_beside, FormatError, large, worst=True)
    yield adapter_config(
        47, "20,000 layers", "layers_to_transform must be", layers_to_transform=[0] * 20_000
    )
    repeated = set_to(f"adapter/{config_file}", target_modules=["q_proj", "v_proj", "q_proj"])
    yield Row(47, "a target twice is a target", repeated, load_fresh, None)
    yield command(
        47, f"{F} --target-modules nothing", 2, "'nothing' match nothing", "q_proj", "down_proj"
    )
    for name, value in {
        "peft_type": "VERA", "use_dora": "yes", "lora_bias": True, "layer_replication": [[0, 1]],
        "megatron_config": {"a": 1}, "megatron_core": "os", "init_lora_weights": "../weights",
        "loftq_config": {"bits": 4}, "target_parameters": ["x"], "alora_invocation_tokens": [1],
        "trainable_token_indices": [0, 0], "ensure_weight_tying": "yes", "task_type": "SEQ_CLS", "bias": "some",
    }.items():  # fmt: skip
        yield adapter_config(48, f"{name} = {value!r}", name, **{name: value})
    harmless = {"base_model_class": "Evil", "parent_library": "os"}
    evil = set_to(
        f"adapter/{config_file}",
        auto_mapping=harmless,
        revision="../..",
        base_model_name_or_path="/dev/zero",
    )
    yield Row(48, "auto_mapping is kept, not imported", evil, load_fresh, None)


def config_rows() -> Iterator[Row]:
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "trust_remote_code": True}
    internal = {
        "_attn_implementation_internal": "evil/kernel",
        "architectures": ["../evil"],
        "torch_dtype": "os.system",
    }
    build = set_to("base/config.json", **code, **internal)
    yield Row(49, "code to load is not loaded", build, load_base, None)
    yield Row(49, "nor kept from a command", build, f"{E} --limit 1", None)
    yield model_config(49, "an architecture of the file's own", "model_type", model_type="evil")
    yield model_config(
        49, "a model_type that steers the terminal", r"\x1b[2J", model_type="\x1b[2J" * 10_000
    )
    for name, values in {
        "vocab_size": (0, -1, 2**31, 1.5, True, "256", None), "hidden_size": (0, [16]), "num_hidden_layers": (0, 2**31),
        "num_attention_heads": (0, 3, None), "num_key_value_heads": (3, 0, "2"), "head_dim": (7, 0, -8, 2**16, 8.0),
        "intermediate_size": (0, {}), "max_position_embeddings": (0, 10**15), "rms_norm_eps": (0, -1, "x", True, None),
        "hidden_act": ("gelu", None, ["silu"]), "tie_word_embeddings": (1, "no", None), "attention_bias": (0,),
        "initializer_range": (0, -0.02),
    }.items():  # fmt: skip
        for value in values:
            yield model_config(50, f"{name} = {value!r}", "must be", **{name: value})
    for kind, fields in {
        "mistral": ({"sliding_window": 0}, {"sliding_window": -4}, {"sliding_window": "4"}, {"sliding_window": [4]}),
        "qwen2": ({"use_sliding_window": True, "sliding_window": 0}, {"layer_types": [["full_attention"]]},
                  {"layer_types": ["full_attention"] * 10**4}, {"layer_types": ["sliding_attention"]},
                  {"max_window_layers": -1}, {"use_sliding_window": True, "max_window_layers": "0"}),
        "gpt2": ({"n_embd": 15, "n_layer": 1, "n_head": 2}, {"n_embd": 16, "n_layer": 2**31, "n_head": 2},
                 {"n_embd": 16, "n_layer": 1, "n_head": 2, "add_cross_attention": True},
                 {"n_embd": 16, "n_layer": 1, "n_head": 2, "activation_function": "tanh"}),
    }.items():  # fmt: skip
        for bad in fields:
            yield model_config(50, f"{kind}: {bad!r}"[:60], "must be", model_type=kind, **bad)
    build = set_to("base/config.json", model_type="qwen2")  # whose q, k and v have biases
    says = ("base", "missing model.layers.0.self_attn.q_proj.bias")
    yield Row(51, "weights of another type of model", build, load_base, FormatError, says)
    yield model_config(
        50, "heads that do not divide", "hidden_size must be", hidden_size=15, head_dim=None
    )
    for rope in ("x", {"rope_type": "yarn"}, {"rope_type": ["default"]}, {"rope_theta": 0}, {"rope_theta": -1},
                 {"rope_theta": True}, {"rope_theta": 10**19 * 10**19 / 1.0}, {"rope_type": "linear"},
                 {"rope_type": "linear", "factor": 0}, {"rope_type": "llama3", "factor": 8},
                 {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 64}):  # fmt: skip
        yield model_config(50, f"rope_parameters = {rope!r}"[:60], "rope_", rope_parameters=rope)
    build = edited(
        "base/config.json",
        lambda c: {k: v for k, v in c.items() if k not in ("hidden_size", "vocab_size")},
    )
    yield Row(
        50, "no sizes", build, load_base, ConfigError, ("config: missing hidden_size, vocab_size",)
    )
    for name, value in {
        "num_hidden_layers": 10**9,
        "vocab_size": 2**31 - 1,
        "intermediate_size": 2**31 - 1,
    }.items():
        says = ("config.json describes", "parameters, the file holds")
        build = set_to("base/config.json", **{name: value})
        yield Row(
            50, f"{name} = {value}", build, load_base, FormatError, ("base", *says), worst=True
        )
    yield model_config(51, "another vocabulary", "embed_tokens.weight is (256, 16), config.json says (255, 16)",
                       FormatError, vocab_size=255)  # fmt: skip
    tied, says = (
        set_to("base/config.json", tie_word_embeddings=True),
        ("base", "tie_word_embeddings is true", "lm_head.weight"),
    )
    yield Row(51, "tied in config.json, two heads in the file", tied, load_base, FormatError, says)
    drop = changed_tensors("base/model.safetensors", lambda t: t.pop("lm_head.weight"))
    yield Row(51, "no head", drop, load_base, FormatError, ("base", "missing lm_head.weight"))
    steer = changed_tensors(
        "base/model.safetensors", lambda t: t.update({"\x1b[2J\n": np.zeros(1)})
    )
    yield Row(
        51,
        "a name that steers the terminal",
        steer,
        load_base,
        FormatError,
        ("base", r"unknown \x1b[2J\n"),
    )
    heads = set_to("base/config.json", num_attention_heads=3, num_key_value_heads=3, head_dim=8)
    yield command(51, E, 3, "q_proj.weight is (16, 16), config.json says (24, 16)", build=heads)
    yield command(51, E, 3, "model.layers.1", build=set_to("base/config.json", num_hidden_layers=2))
    scalar = changed_tensors(
        "base/model.safetensors", lambda t: t.update({"model.norm.weight": np.float32(1)})
    )
    yield Row(
        51,
        "a scalar for a vector",
        scalar,
        load_base,
        FormatError,
        ("model.norm.weight is ()", "says (16,)"),
    )

    # Weights that are no numbers: a file may hold them, but nothing is made of them.
    base, adapter = "base/model.safetensors", "adapter/adapter_model.safetensors"
    for value in (np.nan, np.inf, -np.inf):
        spoilt = broken(base, "model.norm.weight" if value < 0 else "lm_head", value)
        yield Row(38, f"{value} is loaded", broken(base, "lm_head", value), load_base, None)
        for line in (f"{F} --steps 1", G, E, M):
            name, says = (
                f"{value} and {line.split()[0]}",
                "norm.weight" if value < 0 else "lm_head.weight",
            )
            yield Row(38, name, spoilt, line, 5, ("base", says, "not finite"))
        spoilt = broken(adapter, "q_proj.lora_B", value)
        for line in (f"{G} --adapter adapter", f"{E} --adapter adapter", M):
            yield Row(
                38,
                f"{value} in an adapter and {line.split()[0]}",
                spoilt,
                line,
                5,
                ("q_proj", "not finite"),
            )
    yield Row(
        38, "NaN is seen by inspect", broken(adapter, "q_proj.lora_B", np.nan), f"{I} adapter", None
    )


def text_rows() -> Iterator[Row]:
    yield tokenizer("cut", b'{"model": {"vocab": {', "not valid JSON", ends=FormatError)
    yield tokenizer("no object", b"[]", "expected a JSON object", ends=FormatError)
    yield tokenizer(
        "a token twice",
        b'{"model": {"vocab": {"a": 1, "a": 2}}}',
        "'a' appears twice",
        ends=FormatError,
    )
    yield tokenizer(
        "half of a surrogate pair",
        b'{"model": {"vocab": {"\\ud800": 1}}}',
        "surrogates",
        ends=FormatError,
    )
    yield tokenizer("deep", b'{"a":' * 1000 + b"1" + b"}" * 1000, "nested deeper", ends=FormatError)
    yield tokenizer("nothing in it", lambda t: {})
    yield tokenizer("an id twice", vocabulary(zz=5))
    yield tokenizer("ids with a gap", vocabulary(zz=100_000))
    yield tokenizer("an id beyond the vocabulary", vocabulary(zz=256))
    yield tokenizer("the largest id", vocabulary(zz=2**32 - 1))
    yield tokenizer("an id below zero", vocabulary(zz=-1))
    yield tokenizer("an id that is no integer", vocabulary(zz=1.5))
    yield tokenizer(
        "a merge of what is not there", lambda t: t["model"]["merges"].append(["nowhere", "b"])
    )
    yield tokenizer(
        "merges in a circle", lambda t: t["model"]["merges"].extend([["x", "x"], ["xx", "x"]])
    )
    yield tokenizer("no vocabulary", lambda t: t["model"].update(vocab={}))
    yield tokenizer("an unknown model", lambda t: t["model"].update(type="Unheard"))
    pieces = {
        "type": "WordPiece",
        "vocab": {"q": 0},
        "unk_token": "U",
        "continuing_subword_prefix": "#",
    }
    pieces |= {"max_input_chars_per_word": 9}
    yield tokenizer("no unknown token", lambda t: t.update(model=pieces))

    def large(folder: Path) -> None:
        # Not quite our own, so that the files beside it are read, too.
        edited("base/tokenizer.json", lambda t: t["model"].update(unk_token="U"))(folder)
        (folder / "base" / "special_tokens_map.json").touch()
        os.truncate(folder / "base" / "special_tokens_map.json", MAX_TOKENIZER_BYTES + 1)

    yield Row(
        52,
        "a file of 128 MiB beside it",
        large,
        lambda w: load_tokenizer("base", 256),
        DataError,
        ("base",),
    )
    for kind, where in ("Split", "pre_tokenizer"), ("Replace", "normalizer"):
        rule = {
            "type": kind,
            "pattern": {"Regex": "("},
            "behavior": "Isolated",
            "invert": False,
            "content": "",
        }
        yield tokenizer(
            f"a pattern that is none, {where}",
            lambda t, rule=rule, where=where: t.update({where: rule}),
        )
    yield tokenizer("a table that is none", lambda t: t.update(normalizer={"type": "Precompiled",
                    "precompiled_charsmap": "////////////"}))  # fmt: skip
    yield command(
        52,
        E,
        3,
        "tokenizer.json",
        "not a regular file",
        build=replaced_by_pipe("base/tokenizer.json"),
    )
    yield command(52, E, 3, "tokenizer.json", build=cut("base/tokenizer.json", 100))
    folder = lambda f: (f / "text.txt").mkdir()  # noqa: E731
    for line in (P, F, E):
        line = line.replace("book.txt", "text.txt")
        yield command(53, line, 4, "text.txt")
        yield command(53, line, 3, "text.txt", "not a regular file", build=folder)
        yield text(53, line, b"", 3, "text.txt", "empty")
        yield text(53, line, b"a", 3, "needs at least 2" if line.startswith("eval") else "text.txt")
    wants = "text.txt: a context of 16 needs at least 17 tokens"
    for line in (P, F):
        line = line.replace("book.txt", "text.txt")
        yield text(53, line, TEXT[:18], 3, wants, "it has 16 once its last tenth is held out")
        yield text(53, f"{line} --eval-data book.txt", TEXT[:16], 3, wants, "it has 16")
        yield command(53, f"{line} --eval-data text.txt", 4, "text.txt")
        yield command(53, f"{line.replace('text.txt', 'book.txt')} --eval-data empty.txt", 3, "empty.txt",
                      build=written("empty.txt", b""))  # fmt: skip
        yield text(54, line, "\N{SLIGHTLY SMILING FACE}".encode(), 3, "text.txt")
    yield command(
        53,
        "demo --out new --pretrain-data text.txt",
        3,
        "--pretrain-data text.txt",
        build=written("text.txt", b"ab"),
    )
    yield command(53, "demo --out new --adapt-data missing.txt", 4, "missing.txt")
    for path, code in (("/dev/zero", 3), ("book.txt/", 4), (LONG, 4), ("''", 2)):
        yield command(53, f"{P} --data {path}", code, "no path" if path == "''" else path[:60])
    yield command(53, f"{P} --eval-data ''", 2, "--eval-data: '' is no path")
    yield command(
        53, f"{P} --data 'half\n.txt'", 3, r"half\n.txt", build=written("half\n.txt", b"abcd")
    )
    # Odd, and trained on all the same: a text is bytes.
    for content in (
        b"\n" * 400,
        b"\0" * 400,
        b"a\r\n" * 200,
        b"\xef\xbb\xbf" + TEXT,
        b"x" * 100_000,
    ):
        yield text(53, f"{E.replace('book.txt', 'text.txt')} --limit 2", content, None)
    latin, wide = "ÀÉÎÕÜ äöü ß ".encode("latin-1") * 40, TEXT.decode().encode("utf-16")
    for content in (latin, wide, TEXT + "é".encode()[:1]):
        yield text(54, f"{E.replace('book.txt', 'text.txt')} --limit 2", content, None)


def command_rows() -> Iterator[Row]:
    nowhere = "/proc/minilora" if Path("/proc/self").exists() else "book.txt/new"
    for line in (P, F, E):
        yield command(56, f"{line} --context 0", 2, "context")
        yield command(56, f"{line} --context -1", 2, "context")
    yield command(56, f"{F} --context 257", 2, "max_position_embeddings = 256")
    yield command(56, f"{E} --context 257", 2, "max_position_embeddings = 256")
    yield command(56, f"{P} --context 600", 3, "context of 600")
    yield command(
        56, f"{P} --context 16 --max-position-embeddings 15", 2, "max_position_embeddings = 15"
    )
    yield command(56, f"{P} --max-position-embeddings 0", 2, "--max-position-embeddings")
    for name, values in {
        "lr": ("nan", "inf", "-1", "0", "x", ""), "steps": ("-1", "0", "1e30", "1.5", "x", "9" * 30),
        "batch-size": ("-1", "0", "1.5", 10**18), "accumulate": ("-1", "0", 10**18),
        "weight_decay": ("nan", "-1", "inf"), "max_grad_norm": ("nan", "-1", "inf", "0"),
        "save_every": ("0",), "eval_every": ("0",), "shard": ("0",),
    }.items():  # fmt: skip
        for value in values:
            yield command(56, f"{F} --{name}={value}", 2, name.split("-")[0])
    yield command(56, f"{F} --warmup -1", 2, "warmup")
    yield command(56, f"{E} --limit 0", 2, "limit")
    for line in (F, P, G, E):
        for seed in (-1, 2**64, "x"):
            yield command(56, f"{line} --seed {seed}", 2, "--seed")
    for option in "--device cpu", "--seed 0":  # merging is NumPy's, and nothing in it is random
        yield command(56, f"{M} {option}", 2, f"unrecognized arguments: {option}")
    for line in (F, P, G, E, M, "demo --out new"):
        for threads in (0, -3, "1.5"):
            yield command(56, f"{line} --threads {threads}", 2, "--threads")
    for line in (F, P, G, E, "demo --out new"):
        for device in ("tpu", "cuda:x", "CPU"):
            yield command(56, f"{line} --device {device}", 2, device)
    for option, says in {
        "--hidden-size 0": "--hidden-size", "--hidden-size 15": "hidden_size", "--num-attention-heads 16": "head_dim",
        "--num-hidden-layers 1000000000": "parameters", "--num-key-value-heads 3": "num_key_value_heads",
        "--num-hidden-layers 1e9": "--num-hidden-layers",
        "--hidden-size 2147483640 --intermediate-size 2147483640 --num-attention-heads 357913940": "parameters",
    }.items():  # fmt: skip
        yield command(56, f"{P} {option}", 2, says)
    wrong = (
        "temperature -1",
        "temperature nan",
        "temperature inf",
        "top-k 0",
        "top-p 0",
        "top-p 1.5",
        "top-p nan",
    )
    for option in (*wrong, "max-new-tokens -1"):
        yield command(56, f"{G} --{option}", 2, option.split()[0].replace("-", "_"))
    yield command(56, f"{G} --top-k 100000", None)
    yield command(57, f"{G} --prompt ''", 3, "--prompt is empty")
    yield command(57, f"{G} --prompt '{'long ' * 100}'", None)
    yield command(57, f"{G} --prompt '\udcff\x1b\U0001f600 é'", None)
    for line in (F, P, M, "demo"):
        yield command(58, f"{line} --out full", 2, "'full' is not empty")
        yield command(58, f"{line} --out book.txt", 2, "'book.txt' is a file")
        yield command(59, f"{line} --out book.txt/new", 4, "book.txt/new")
        yield command(59, f"{line} --out ''", 2, "--out: ''")
        yield command(59, f"{line} --out {LONG}", 4, "File name too long")
        yield command(59, f"{line} --out {'n' * 300}", 4, "File name too long")
        yield command(59, f"{line} --out {nowhere}", 4, nowhere)
    for out in ("base", "./full/../base", "base/merged", "adapter", "adapter/merged"):
        yield command(
            58, f"{M} --out {out}", 2, "--adapter" if out.startswith("adapter") else "--base"
        )
    # Folders that are not what they are taken for.
    for line, code, says in (
        (f"{E} --base missing", 4, "missing"), (f"{E} --base book.txt", 4, "book.txt"),
        (f"{E} --base full", 3, "config.json"), (f"{E} --base ''", 2, "--base: ''"),
        (f"{E} --adapter ''", 2, "--adapter: ''"), (f"{E} --adapter missing", 4, "missing"),
        (f"{E} --adapter base", 3, "adapter_config.json"), (f"{E} --base adapter", 3, "config.json"),
        (f"{I} missing", 4, "missing"), (f"{I} full", 3, "full"), (f"{I} book.txt", 3, "book.txt"),
        (f"{I} ''", 2, "DIR: ''"),
        ("inspect 'a\nb\x1b[2Jc\t\x07'", 4, r"a\nb\x1b[2Jc\t\x07"), (f"{E} --data 'a\nb\x1b[2Jc'", 4, r"a\nb\x1b[2Jc"),
    ):  # fmt: skip
        yield command(40, line, code, says)
    # Every damage to a folder ends the commands that read it in the same way.
    for what, file, config, line in (
        ("base", "base/model.safetensors", "base/config.json", E),
        (
            "adapter",
            "adapter/adapter_model.safetensors",
            "adapter/adapter_config.json",
            f"{E} --adapter adapter",
        ),
    ):

        def flip(folder: Path, path: str = file) -> None:
            data = bytearray((folder / path).read_bytes())
            data[20] ^= 0xFF
            (folder / path).write_bytes(data)

        for reader in (line, f"{I} {what}"):
            yield command(26, reader, 3, file, build=cut(file, 400))
            yield command(7, reader, 3, file, build=flip)
            yield command(1, reader, 3, file, build=cut(file, 0))
            yield command(34, reader, 3, what, build=lambda f, file=file: (f / file).unlink())
            yield command(10, reader, 3, config, build=cut(config, 50))
            yield command(11, reader, 3, config, build=written(config, b"[]"))
            yield command(18, reader, 3, config, build=written(config, b'{"r": 8, "r": 9}'))


ROWS = list(rows())
