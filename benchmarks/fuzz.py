"""A hundred thousand damaged files: none may crash a reader, none be accepted that the reference refuses.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--write]

Valid files, written by minilora and by the reference package, are changed: bytes anywhere; or the header's text with
its length put right again, so that the damage gets past the first check - numbers become boundary values, words are
exchanged, repeated, dropped, spliced from another file. Four in five are safetensors files, the others config.json,
adapter_config.json and tokenizer.json. Every input goes through the real reader, from a real file.

Counted is who accepts what. A crash (anything but minilora's own errors), an input that only minilora accepts, or a
value in which the two differ ends in exit code 1, the input printed. Without the package `safetensors` (extra `oracle`)
there is no second opinion, and only crashes are looked for. `--write` keeps the counts in benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minilora import LoraConfig, TransformerConfig
from minilora.architecture import DIALECTS, MODEL_TYPES
from minilora.errors import FormatError, MiniloraError
from minilora.formats import SafetensorsFile, save_file
from minilora.formats.disk import parse_json
from minilora.formats.safetensors import NAMES
from minilora.tokenizer import ByteTokenizer, load_tokenizer

try:
    import safetensors
    import safetensors.numpy
except ImportError:
    safetensors = None

RESULT = Path(__file__).parent / "results" / "fuzz.json"
NUMBERS = (
    "0", "1", "-1", "-0", "2", "3", "7", "8", "63", "64", "65", "255", "256", "1.0", "1e0", "1e400", "NaN", "Infinity",
    "2147483647", "2147483648", "4294967296", "4611686018427387904", "9223372036854775807", "18446744073709551615",
    "18446744073709551616", "9" * 30, "9" * 5000,
)  # fmt: skip
WORDS = (
    '"F32"', '"F64"', '"BF16"', '"F16"', '"BOOL"', '"U8"', '"I64"', '"F8_E4M3"', '"f32"', '"O"', '""', '"dtype"',
    '"shape"', '"data_offsets"', '"__metadata__"', '"format"', '"pt"', "null", "true", "false", "[]", "{}", "[0]",
    "[0,0]", '"\\ud800"', '"\\u0000"', '"../x"', '"a"', '{"a":"b"}', "[[[[[]]]]]", '"(.*)*x"', '"r"', '"all-linear"',
)  # fmt: skip
PUNCTUATION = ("", ",", ":", "{", "}", "[", "]", '"', " ", "\n", "\t", "\0", "\ufeff", "}{", ",,", "//")
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[{}\[\],:]|[a-z]+')


# ---- inputs ---------------------------------------------------------------------------------------------------------


def valid_files(rng: random.Random, count: int = 60) -> list[bytes]:
    """Small good safetensors files of every dtype, rank 0 to 4, sides of 0 too; half of them by the reference."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            tensors = {}
            for name in rng.sample(["a", "b", "weight", "x.lora_A.weight", "é", "", "long" * 9], rng.randrange(4)):
                dtype = rng.choice(sorted(NAMES, key=str))
                shape = [rng.randrange(4) for _ in range(rng.randrange(5))]
                count = int(np.prod(shape)) * dtype.itemsize
                content = bytes(rng.randrange(2 if dtype == np.bool_ else 256) for _ in range(count))
                tensors[name] = np.frombuffer(content, dtype).reshape(shape)
            metadata = rng.choice(
                [None, {}, {"format": "pt"}, {"a": "\N{BULLET}"}]
            )  # not two: the reference has no order
            if safetensors and i % 2 and (tensors or metadata):  # of {} and {} safetensors 0.8 makes no valid file
                made.append(safetensors.numpy.save(tensors, metadata))
            else:
                save_file(Path(folder, "file"), tensors, metadata)
                made.append(Path(folder, "file").read_bytes())
    return made


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three changes of bytes: flipped, set, dropped, added, repeated, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 8, 40))
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = rng.randbytes(length)
        elif kind == 4:
            out[at:at] = out[max(0, at - length) : at]
        else:
            del out[at:]
    return bytes(out)


def damaged_json(rng: random.Random, text: bytes, other: bytes) -> bytes:
    """One to three changes of what JSON is made of: numbers, words and signs exchanged, dropped, repeated, spliced."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        tokens = list(TOKEN.finditer(text))
        if not tokens:
            return text
        first = rng.randrange(len(tokens))
        last = min(len(tokens) - 1, first + rng.choice((0, 0, 0, 1, 2, 6)))
        begin, end = tokens[first].start(), tokens[last].end()
        kind = rng.randrange(7)
        if kind == 0 and (numbers := [t for t in tokens if t.group()[:1].isdigit()]):
            begin, end = rng.choice(numbers).span()
            new = rng.choice(NUMBERS).encode()
        elif kind == 1:
            begin, end = rng.choice(tokens).span()
            new = rng.choice(WORDS).encode()
        elif kind == 2:
            new = text[begin:end] + rng.choice((b"", b",")) + text[begin:end]
        elif kind == 3:
            new = b""
        elif kind == 4 and (pieces := list(TOKEN.finditer(other))):
            start = rng.randrange(len(pieces))
            new = other[pieces[start].start() : pieces[min(len(pieces) - 1, start + rng.randrange(8))].end()]
        elif kind == 5:
            begin = end = rng.choice((0, begin, len(text)))
            new = rng.choice(PUNCTUATION).encode()
        else:
            begin, end = rng.choice(tokens).span()
            new = rng.choice(PUNCTUATION).encode()
        text = text[:begin] + new + text[end:]
    return text


def altered_header(rng: random.Random, text: bytes) -> bytes:
    """One change that a program might make: another name, dtype, shape or order, a field more, an entry twice."""
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)] if names else {}
    kind = rng.randrange(8)
    if kind == 0:
        header = dict(sorted(header.items(), key=lambda _: rng.random()))
    elif kind == 1 and names:
        header[rng.choice(("z", "", "a", "../../etc/passwd", "\x1b[2J", names[0]))] = header.pop(rng.choice(names))
    elif kind == 2 and entry:
        entry["dtype"] = rng.choice(("F32", "I32", "U32", "F16", "BF16", "I16", "U8", "I8", "BOOL", "F8_E4M3", "C64"))
    elif kind == 3 and entry:
        entry["shape"] = rng.choice((entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 0], [1] * 65))
    elif kind == 4:
        header["__metadata__"] = rng.choice(({}, {"a": "b"}, {"a": 1}, None, {"a": {"b": "c"}}, "text"))
    elif kind == 5 and entry:
        entry[rng.choice(("more", "dtype ", "Shape"))] = rng.choice((1, None, "F32", []))
    elif kind == 6 and entry:
        at, by = rng.randrange(2), rng.choice((-8, -4, -1, 1, 4, 8))
        entry["data_offsets"][at] += by
    new = json.dumps(header, ensure_ascii=rng.random() < 0.5, separators=rng.choice(((",", ":"), (", ", " : "))))
    if kind == 7 and names:  # an entry twice, with the same value or another
        again = json.dumps(rng.choice(names)) + ":" + json.dumps(header[rng.choice(names)])
        new = new[:-1] + ("," if header else "") + again + "}"
    return new.encode()


def damaged_safetensors(rng: random.Random, files: list[bytes]) -> bytes:
    data, other = rng.choice(files), rng.choice(files)
    if rng.random() < 0.3:
        return damaged_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    header = altered_header(rng, header) if rng.random() < 0.4 else damaged_json(rng, header, other[8:])
    body = data[8 + length :] if rng.random() < 0.9 else damaged_bytes(rng, data[8 + length :])
    pad = rng.choice((b" " * (-len(header) % 8), b"", b" ", b"\t", b"\0"))
    return (len(header) + len(pad)).to_bytes(8, "little") + header + pad + body


# ---- one input ------------------------------------------------------------------------------------------------------

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


class Wrong(Exception):
    """An input by which a reader shows a fault."""


def by_minilora(path: Path) -> Tensors | str:
    """What the file holds, or what is wrong with it (the message without names and numbers)."""
    try:
        with SafetensorsFile(path) as file:
            return {k: (file.dtype(k), file.shape(k), file.read_bits(k).tobytes()) for k in file.keys()}  # noqa: SIM118
    except FormatError as error:
        if len(str(error)) > 500 or not str(error).isprintable():
            raise Wrong(f"a message that is long or not printable: {str(error)[:700]!r}") from None
        return reason(str(error), path)


def reason(message: str, path: Path) -> str:
    text = re.sub(r"'[^']*'|\"[^\"]*\"|[0-9][0-9,.]*", "_", message.replace(str(path), ""))
    return text.split("(")[0][:60].strip(" :_")


def by_the_reference(content: bytes) -> Tensors | None:
    try:
        found = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        return None
    return {k: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for k, v in found.items()}


def compare(content: bytes, path: Path, counts: collections.Counter[str]) -> None:
    path.write_bytes(content)
    ours = by_minilora(path)
    if safetensors is None:
        counts["accepted" if isinstance(ours, dict) else "refused"] += 1
        return
    theirs = by_the_reference(content)
    if isinstance(ours, str):
        counts["refused by both" if theirs is None else f"only the reference accepts: {ours}"] += 1
    elif theirs is None:
        raise Wrong("minilora accepts what the reference refuses")
    elif ours != theirs:
        raise Wrong("the values differ")
    else:
        counts["accepted by both, equal values"] += 1


def read_tokenizer(content: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    load_tokenizer(folder, 256)


READERS: dict[str, Callable[[bytes, Path], object]] = {
    "config.json": lambda content, folder: TransformerConfig.from_dict(parse_json(content, "config.json")),
    "adapter_config.json": lambda content, folder: LoraConfig.from_dict(parse_json(content, "adapter_config.json")),
    "tokenizer.json": read_tokenizer,
}


def configurations(folder: Path) -> dict[str, list[bytes]]:
    ByteTokenizer().save(folder)
    lora = LoraConfig(rank_pattern={"q_proj": 4, ".*v_proj": 2}, alpha_pattern={"k": 3.5}, target_modules=["q", "v"])
    models = [TransformerConfig(model_type=kind, hidden_act=DIALECTS[kind].activations[0]) for kind in MODEL_TYPES]
    return {
        "config.json": [json.dumps(model.to_dict(), indent=2).encode() for model in models],
        "adapter_config.json": [json.dumps(lora.to_dict(), indent=2).encode()],
        "tokenizer.json": [(folder / "tokenizer.json").read_bytes()],
    }


def inputs(seed: int, folder: Path) -> Iterator[tuple[str, bytes]]:
    """(kind, content) without end"""
    rng = random.Random(seed)
    files, good = valid_files(rng), configurations(folder)
    yield from (("safetensors", content) for content in files)  # undamaged: all must be accepted
    while True:
        kind = rng.choice(("safetensors",) * 12 + tuple(good))
        if kind == "safetensors":
            yield kind, damaged_safetensors(rng, files)
        elif kind == "tokenizer.json" and rng.random() < 0.5:
            yield kind, damaged_bytes(rng, good[kind][0])
        else:
            yield kind, damaged_json(rng, rng.choice(good[kind]), good["adapter_config.json"][0])


def fuzz(count: int, seed: int) -> dict[str, dict[str, int]]:
    """Counts of outcomes for each kind of file. SystemExit names the input that shows a fault."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None  # a folder that no disk stands behind
    with tempfile.TemporaryDirectory(dir=memory) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        for number, (kind, content) in enumerate(inputs(seed, folder)):
            if number == count:
                break
            try:
                if kind == "safetensors":
                    compare(content, folder / "file", counts[kind])
                    continue
                READERS[kind](content, folder)
                counts[kind]["loads"] += 1
            except MiniloraError as error:
                counts[kind][f"refused: {type(error).__name__}"] += 1
            except Exception as error:
                raise SystemExit(
                    f"input {number} of seed {seed}, {kind}: {type(error).__name__}: {error}\n{content[:3000]!r}"
                ) from error
    return {kind: dict(found.most_common()) for kind, found in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    begun = time.perf_counter()
    counts = fuzz(args.inputs, args.seed)
    result = {
        "command": f"python benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed} --write",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "reference": f"safetensors {safetensors.__version__}" if safetensors else None,
        "inputs": args.inputs,
        "seconds": round(time.perf_counter() - begun, 1),
        "crashes": 0,
        "accepted by minilora alone": 0 if safetensors else None,
        "counts": counts,
    }
    if args.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
