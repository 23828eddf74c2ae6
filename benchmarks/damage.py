"""Functions that damage a valid file, for benchmarks/fuzz.py.

    damaged_bytes         bytes flipped, set, removed, added, repeated, cut off
    damaged_json          the text of JSON: numbers, words and punctuation replaced, repeated,
                          removed, taken from another file
    altered_json          the values of JSON: another type, out of bounds, missing, renamed, twice,
                          nested, taken from another file
    damaged_safetensors   the header, with its length corrected afterwards, or any bytes
    with_tensor           one tensor replaced

Every function draws its random numbers from the generator that it is given. This is not a script.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

# fmt: off
NUMBERS = (
    "0", "1", "-1", "-0", "2", "3", "7", "8", "63", "64", "65", "255", "256", "1.0", "1e0", "1e400",
    "NaN", "Infinity", "2147483647", "2147483648", "4294967296", "4611686018427387904",
    "9223372036854775807", "18446744073709551615", "18446744073709551616", "9" * 30, "9" * 5000,
)
WORDS = (
    '"F32"', '"F64"', '"BF16"', '"F16"', '"BOOL"', '"U8"', '"I64"', '"F8_E4M3"', '"f32"', '"O"',
    '""', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"format"', '"pt"', "null",
    "true", "false", "[]", "{}", "[0]", "[0,0]", '"\\ud800"', '"\\u0000"', '"../x"', '"a"',
    '{"a":"b"}', "[[[[[]]]]]", '"(.*)*x"', '"r"', '"all-linear"',
)
VALUES: tuple[Any, ...] = (  # values that may replace another one
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64 - 1, 10**19,
    10**30, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, 5e-324, float("inf"), float("nan"), "", "0", "1",
    "None", "nan", "a", "\0", "\x1b[2J", "\ud800", "\N{BULLET}", "/", "/etc/passwd", "..", "../x",
    "x" * 300, "(.*)*x", "(", "[^", "(a|a)*b", "{", "\\", "all-linear", "default", "lora_", ".", [],
    {}, [0], [[]], [None], ["", ""], [0] * 70, {"": None}, {"a": 1},
)
# fmt: on
PUNCTUATION = (
    "",
    ",",
    ":",
    "{",
    "}",
    "[",
    "]",
    '"',
    " ",
    "\n",
    "\t",
    "\0",
    "\ufeff",
    "}{",
    ",,",
    "//",
)
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[{}\[\],:]|[a-z]+')


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three changes of bytes: flipped, set, removed, added, repeated, or the end cut off."""
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
    """One to three changes of JSON's text: numbers, words and punctuation replaced, removed,
    repeated, or taken from the text `other`."""
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
            stop = min(len(pieces) - 1, start + rng.randrange(8))
            new = other[pieces[start].start() : pieces[stop].end()]
        elif kind == 5:
            begin = end = rng.choice((0, begin, len(text)))
            new = rng.choice(PUNCTUATION).encode()
        else:
            begin, end = rng.choice(tokens).span()
            new = rng.choice(PUNCTUATION).encode()
        text = text[:begin] + new + text[end:]
    return text


Place = tuple[Any, Any]  # a dictionary or a list, and one of its keys


def places(value: Any) -> Iterator[Place]:
    """Every place of a value inside a value of JSON."""
    keys: Iterable[Any] = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from places(value[key])


def altered_json(rng: random.Random, text: bytes, other: bytes) -> bytes:
    """One to three changes that a program might make.

    Values of another type or out of bounds; fields missing, renamed, exchanged, nested, repeated,
    or taken from the text `other`; sometimes a field twice.
    """
    value = json.loads(text)
    other_value = json.loads(other)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        candidates = _choose(rng, list(places(value)))
        if not candidates:
            break
        inside, key = rng.choice(candidates)
        old = inside[key]
        kind = rng.randrange(9)
        if kind < 3:
            inside[key] = json.loads(json.dumps(rng.choice(VALUES)))
        elif kind == 3:
            del inside[key]
        elif kind == 4 and isinstance(inside, dict):
            another_key = rng.choice(candidates)[1]
            names = another_key, "", f"{key} ", str(key).upper(), rng.choice(WORDS)
            inside[rng.choice(names)] = old
            del inside[key]
        elif kind == 5 and (others := _choose(rng, list(places(other_value)))):
            source, name = rng.choice(others)
            if isinstance(inside, dict) and isinstance(source, dict):
                key = name
            inside[key] = json.loads(_dumps(source[name]))
        elif kind == 6:
            target, name = rng.choice(candidates)
            if target is inside:
                inside[key], target[name] = target[name], old
            else:
                inside[key], target[name] = json.loads(_dumps(old)), "taken"
        elif kind == 7:
            depth = rng.choice((1, 1, 2, 70, 200))
            for _ in range(depth):
                old = [old] if rng.random() < 0.5 else {"a": old}
            inside[key] = old
        else:
            inside[key] = _vary(rng, old)
    new = _dumps(value).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05 and isinstance(value, dict) and value:
        name = rng.choice(list(value))
        field = f"{_dumps(name)}:{_dumps(value[name])},"
        new = b"{" + field.encode("utf-8", "surrogatepass") + new[1:]
    return new


def _choose(rng: random.Random, candidates: list[Place]) -> list[Place]:
    """Mostly the places near the top, where a vocabulary has thousands of similar ones."""
    if len(candidates) < 100 or rng.random() < 0.2:
        return candidates
    near = [place for place in candidates if len(place[0]) < 50]
    return near or candidates


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _vary(rng: random.Random, old: Any) -> Any:
    """The same value in another form, or a similar one."""
    variants: tuple[Any, ...]
    if isinstance(old, bool) or old is None:
        variants = not old, int(bool(old)), str(old)
    elif isinstance(old, (int, float)):
        variants = (
            old + 1,
            old - 1,
            -old,
            2 * old,
            old * 1000,
            float(old),
            str(old),
            [old],
            old + 0.5,
        )
    elif isinstance(old, str):
        variants = (
            old + old,
            old[1:],
            old[:-1],
            old.upper(),
            f".*{old}",
            f"{old}.x",
            [old],
            list(old),
            "é" + old,
        )
    elif isinstance(old, list):
        longer = old * 200 if len(old) < 50 else []
        variants = old * 2, old[::-1], old[1:], longer, dict(enumerate(map(str, old)))
    else:
        backwards = dict(reversed(old.items()))
        variants = list(old), list(old.values()), [old], backwards, str(list(old))
    return rng.choice(variants)


def altered_header(rng: random.Random, text: bytes) -> bytes:
    """One change that a program might make: another name, dtype, shape or order, one more field,
    or an entry twice."""
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)] if names else {}
    kind = rng.randrange(8)
    if kind == 0:
        header = dict(sorted(header.items(), key=lambda _: rng.random()))
    elif kind == 1 and names:
        entry = header.pop(rng.choice(names))
        header[rng.choice(("z", "", "a", "../../etc/passwd", "\x1b[2J", names[0]))] = entry
    elif kind == 2 and entry:
        entry["dtype"] = rng.choice(
            ("F32", "I32", "U32", "F16", "BF16", "I16", "U8", "I8", "BOOL", "F8_E4M3", "C64")
        )
    elif kind == 3 and entry:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 0], [1] * 65)
        )
    elif kind == 4:
        header["__metadata__"] = rng.choice(
            ({}, {"a": "b"}, {"a": 1}, None, {"a": {"b": "c"}}, "text")
        )
    elif kind == 5 and entry:
        entry[rng.choice(("more", "dtype ", "Shape"))] = rng.choice((1, None, "F32", []))
    elif kind == 6 and entry:
        at, by = rng.randrange(2), rng.choice((-8, -4, -1, 1, 4, 8))
        entry["data_offsets"][at] += by
    new = json.dumps(
        header, ensure_ascii=rng.random() < 0.5, separators=rng.choice(((",", ":"), (", ", " : ")))
    )
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
    header = (
        altered_header(rng, header) if rng.random() < 0.4 else damaged_json(rng, header, other[8:])
    )
    body = data[8 + length :] if rng.random() < 0.9 else damaged_bytes(rng, data[8 + length :])
    pad = rng.choice((b" " * (-len(header) % 8), b"", b" ", b"\t", b"\0"))
    return (len(header) + len(pad)).to_bytes(8, "little") + header + pad + body


def with_tensor(data: bytes, name: str, content: bytes) -> bytes:
    """A safetensors file in which the tensor `name` is `content`, as uint8."""
    length = int.from_bytes(data[:8], "little")
    header, body, end = json.loads(data[8 : 8 + length]), data[8 + length :], 0
    parts = []
    for key, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [-1])):
        if key != "__metadata__":
            begin, stop = entry["data_offsets"]
            parts.append(content if key == name else body[begin:stop])
            if key == name:
                entry["shape"] = [len(content)]
            entry["data_offsets"], end = [end, end + len(parts[-1])], end + len(parts[-1])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def tensor(data: bytes, part: str) -> tuple[str, bytes]:
    """(name, content) of the first tensor of a safetensors file whose name has `part` in it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if part in key)
    begin, stop = header[name]["data_offsets"]
    return name, data[8 + length + begin : 8 + length + stop]
