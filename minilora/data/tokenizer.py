"""Tokenizers: bytes, and a model's own tokenizer.json, which needs the package `tokenizers`.

A tokenizer.json is of unknown origin: it runs in a process of its own (sandbox.py).

A tokenizer may have more tokens than the model has ids, as long as none of them occurs in a text.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..formats.contents import describe_content
from ..formats.disk import (
    JsonObject,
    PathLike,
    atomic_file,
    open_regular,
    quoted,
    read_json,
    write_json,
)
from ..formats.hub import find_model
from .sandbox import Sandbox
from .special import (
    MAP_FILE,
    SETTINGS_FILE,
    SpecialTokens,
    default_tokens,
    listed_texts,
    named_tokens,
    read_special_tokens,
    surrounding_ids,
    tokenizer_class,
)

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_TOKENIZER_BYTES = 128 << 20  # the largest in use, of 256,000 tokens, take about 35 MB

# What a tokenizer.json may take: some ten times the processor time, and three times the memory, of
# the slowest tokenizers in use.
LOADING_SECONDS = 1.0
LOADING_SECONDS_PER_BYTE = 1e-6
LOADING_MEMORY = 1 << 29
LOADING_MEMORY_PER_BYTE = 64
CALL_SECONDS = 0.001
SECONDS_PER_BYTE = 1e-5
MEMORY_PER_BYTE = 512

# Classes of transformers that put spaces otherwise than tokenizer.json says.
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")

# Fields of tokenizer.json that change no id. (transformers drops or rewrites them.)
HARMLESS = {"version", "decoder", "truncation", "padding"}
OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")  # tokenizers that cannot be used


def _utf8(text: str | bytes) -> bytes:
    """A text's bytes.

    A byte that the command line could not decode (U+DC80 to U+DCFF in a str) becomes itself again.
    """
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise DataError(
            f"expected a text, got {type(text).__name__}: encode takes one text at a time"
        )
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is half of a surrogate pair: it has no bytes"
        ) from None


def _id_list(ids: Any) -> list[int]:
    """The ids of one text as integers. DataError for several texts, and for other values."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise DataError(f"decode takes a list of ids, got {ids!r:.99}: one id is [id]")
    numbers = []
    for i in ids:
        if getattr(i, "ndim", 0) or isinstance(i, (list, tuple)):
            got = f"shape {ids.shape}" if hasattr(ids, "shape") else "a list of lists"
            raise DataError(
                f"decode takes the ids of one text, got {got}: give ids[0], or one row at a time"
            )
        if int(i) != i:
            raise DataError(f"ids must be integers, got {i!r:.99}")
        numbers.append(int(i))
    return numbers


def _byte_level() -> JsonObject:
    """Our tokenizer.json: byte-level BPE without merges. Its pieces are bytes, its ids too.

    Byte-level BPE (Radford et al. 2019) writes each byte as one visible character: a printable
    Latin-1 character is itself, the other 68 bytes are U+0100, U+0101, ... in order. So the space,
    byte 32, is U+0120.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(byte if byte in visible else next(others)): byte for byte in range(256)}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    model: JsonObject = {"type": "BPE", "vocab": vocabulary, "merges": []}
    model |= dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    }


@dataclass(frozen=True)
class ByteTokenizer:
    """Ids 0 to 255 are the bytes: any text has ids, in any encoding, and no package is needed."""

    note: str = ""  # why bytes were chosen, where the model's own files do not say so
    limit: int = 256  # the model's vocab_size, if it is smaller
    vocab_size: ClassVar[int] = 256
    special: ClassVar[SpecialTokens] = SpecialTokens()  # none: all 256 bytes may occur in a text
    missing_end: ClassVar[str] = ""

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> NDArray[np.int32]:
        """The bytes of the text, a str as UTF-8. No special tokens exist to be added.

        DataError for a byte that is not an id of the model.
        """
        return self.require_known(np.frombuffer(_utf8(text), np.uint8).astype(np.int32))

    def require_known(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ids. DataError for one that the model's vocabulary lacks."""
        id = _first_unknown(ids, self.limit)
        if id is not None:
            where = f"{self.note}: " if self.note else ""
            raise _unknown_token(where, f"byte {id:#04x}", id, self.limit)
        return ids

    def encode_prompt(self, text: str | bytes) -> NDArray[np.int32]:
        """The same bytes: see `HubTokenizer.encode_prompt`."""
        return self.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes again. Other ids (a model may have a larger vocabulary) give U+FFFD."""
        return b"".join(bytes([i]) if 0 <= i < 256 else b"\xef\xbf\xbd" for i in _id_list(ids))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text, as UTF-8.

        errors="surrogateescape" gives back what the command line gave, be it UTF-8 or not.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def save(self, directory: PathLike) -> None:
        """Write both files from which `transformers.AutoTokenizer` gives the same ids."""
        write_json(Path(directory, TOKENIZER_FILE), _byte_level())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        write_json(Path(directory, SETTINGS_FILE), config)


class HubTokenizer:
    """Any other tokenizer.json, run by the `tokenizers` package in a process with limits.

    special       the model's special tokens (special.py)
    missing_end   a note if no token ends a text, else empty
    added         the ids of the tokens that a text is searched for before it is cut up

    directory         the folder of the tokenizer
    vocab_size        of the model
    model_directory   the folder of the model, whose configuration names tokens, too; None: the same

    DataError for a file that the package cannot run, that gives two tokens one id, or that takes
    more time or memory than tokenizers in use.
    """

    FILES = (TOKENIZER_FILE, SETTINGS_FILE, MAP_FILE, TEMPLATE_FILE)
    note = ""

    def __init__(
        self, directory: PathLike, vocab_size: int, model_directory: PathLike | None = None
    ):
        model_directory = directory if model_directory is None else model_directory
        self._path = os.path.join(directory, TOKENIZER_FILE)
        self._limit = vocab_size
        where = quoted(self._path)
        self._files = {}
        for name in self.FILES:
            path = Path(directory, name)
            if os.path.isfile(path):
                self._files[name] = _read_bytes(path)
        self._template_path = ""  # of a chat template that is not beside the tokenizer
        content = self._files[TOKENIZER_FILE]
        seconds = LOADING_SECONDS + LOADING_SECONDS_PER_BYTE * len(content)
        memory = LOADING_MEMORY + LOADING_MEMORY_PER_BYTE * len(content)
        self._sandbox = Sandbox(where, {"tokenizer": content}, seconds, memory)
        is_byte_level = b'"ByteLevel"' in content
        default = default_tokens(model_directory, self._settings, is_byte_level)
        self._class = tokenizer_class(model_directory, self._settings, is_byte_level)
        if self._class in LLAMA_CLASSES:
            self._sandbox.program["prepend_scheme"] = self._prepend_scheme()
        summary = self._ask("summary", 0)
        if summary["ids"] < max(1, summary["tokens"]):
            raise DataError(
                f"{where}: expected at least one token and an id of its own for each of "
                f"{summary['tokens']}"
            )
        self.vocab_size = summary["largest"] + 1
        self.special = self._read_special_tokens(
            directory, vocab_size, summary, default, model_directory
        )
        self.missing_end = ""
        if not self.special.eos:
            self.missing_end = (
                f"{quoted(directory)} names no token that ends a text (eos_token in "
                "tokenizer_config.json, or eos_token_id in generation_config.json)"
            )

    def _read_special_tokens(
        self,
        directory: PathLike,
        vocab_size: int,
        summary: JsonObject,
        default: dict[str, str | None],
        model_directory: PathLike,
    ) -> SpecialTokens:
        """The model's special tokens, which the tokenizer then finds in texts, too."""
        if summary["pad_token"] is not None:
            default = {"pad_token": summary["pad_token"], **default}
        named = named_tokens(directory, self._settings, default)
        # transformers cuts a text at each of them, even if tokenizer.json does not list it.
        listed = listed_texts(directory, self._settings)
        texts = sorted(listed | {token.text for token in named.values()})
        self._sandbox.program["special"] = texts  # for a process that starts again
        added = self._ask("add_special", sum(map(len, texts)), texts=texts)
        self.added: list[int] = added["added"]
        around = surrounding_ids(summary["processor"], quoted(self._path))
        id_of = added["ids"].get
        return read_special_tokens(directory, named, id_of, around, vocab_size, model_directory)

    def _prepend_scheme(self) -> str:
        """Where transformers' classes for Llama 2 put a space: before each piece of text between
        special tokens, only before the first, or nowhere."""
        if self._settings.get("add_prefix_space") is False:
            return "never"
        is_legacy = self._class == "LlamaTokenizer" and self._settings.get("legacy")
        return "always" if is_legacy else "first"

    def _ask(self, method: str, size: int, **fields: Any) -> Any:
        """What a method of sandboxed.py's Tokenizer returns for a text or ids of so many bytes."""
        seconds = CALL_SECONDS + SECONDS_PER_BYTE * size
        return self._sandbox.ask({"do": method, **fields}, seconds, MEMORY_PER_BYTE * size)

    @cached_property
    def _settings(self) -> JsonObject:
        """tokenizer_config.json; an empty object if it is another value, or missing.

        Python's own parser reads it: minilora uses few of its fields, and others have integers of
        31 digits.
        """
        try:
            settings = json.loads(self._files.get(SETTINGS_FILE, b"{}"))
        except (ValueError, RecursionError):
            content = describe_content(self._files[SETTINGS_FILE])
            reason = f"it is {content}" if content else "it cannot be parsed"
            where = f"the {SETTINGS_FILE} beside {quoted(self._path)}"
            raise DataError(f"{where} is not JSON: {reason}") from None
        return settings if isinstance(settings, dict) else {}

    @property
    def chat_template(self) -> tuple[str, str] | None:
        """(template, where it is from): chat_template.jinja, or the one of tokenizer_config.json.

        If that has several, the one whose name is "default". None without one. DataError for one
        that is not a text in UTF-8.
        """
        name = TEMPLATE_FILE
        template: Any = self._files.get(TEMPLATE_FILE)
        if template is None:
            name = f"the chat_template in {SETTINGS_FILE}"
            template = self._settings.get("chat_template")
        if isinstance(template, list):
            template = _template_of_name(template, "default")
        return self._as_template(template, name)

    def replace_template(self, path: PathLike) -> None:
        """Use the chat template of a file, and save it with the tokenizer from now on."""
        self._files[TEMPLATE_FILE] = _read_bytes(Path(path))
        self._template_path = quoted(path)

    @property
    def tool_template(self) -> tuple[str, str] | None:
        """The template for conversations with tools, if tokenizer_config.json has several templates
        and names one "tool_use"; else None. Otherwise as `chat_template`."""
        templates = self._settings.get("chat_template")
        if TEMPLATE_FILE in self._files or not isinstance(templates, list):
            return None
        name = f"the chat_template 'tool_use' in {SETTINGS_FILE}"
        return self._as_template(_template_of_name(templates, "tool_use"), name)

    def _as_template(self, template: Any, name: str) -> tuple[str, str] | None:
        """(template, where it is from), or None for None. DataError for what is not a text."""
        if template is None:
            return None
        where = self._template_path or f"{name} beside {quoted(self._path)}"
        if isinstance(template, bytes):
            content = describe_content(template)
            if template and content:
                raise DataError(f"{where} is not a template: it is {content}")
            try:
                template = template.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8 at byte {error.start}") from None
        if not isinstance(template, str):
            raise DataError(f"{where}: expected a text, found {type(template).__name__}")
        return template, where

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> NDArray[np.int32]:
        """The ids of a text in UTF-8.

        `add_special_tokens` puts what the file asks for around it (a BOS, say). DataError for a
        token that the model's vocabulary lacks.
        """
        data = _utf8(text)
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the text is not UTF-8 at byte {error.start}; this model's tokenizer needs that: "
                "convert it to UTF-8"
            ) from None
        ids = self._ask("encode", len(data), text=data, special=add_special_tokens)
        return self.require_known(_unpacked(ids))

    def require_known(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ids. DataError for one that the model's vocabulary lacks.

        A tokenizer may have more tokens than its model, as long as none of them occurs.
        """
        id = _first_unknown(ids, self._limit)
        if id is not None:
            token = quoted(self._ask("token", 0, id=id), 60)
            raise _unknown_token(f"{quoted(self._path)}: ", f"token {token}", id, self._limit)
        return ids

    def encode_prompt(self, text: str | bytes) -> NDArray[np.int32]:
        """The ids of a text that is to be continued, in training and in generation.

        What the file asks for before a text comes first, unless the text begins with it: what a
        chat template writes has a BOS. What the file asks for after a text is left out.
        """
        before = np.array(self.special.before, np.int32)
        ids = self.encode(text)
        if np.array_equal(ids[: len(before)], before):
            return ids
        return np.concatenate([self.require_known(before), ids])

    def encode_with_edges(
        self, text: str
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """(ids, starts, ends), each (n,): token i is part of text[starts[i] : ends[i]].

        No special tokens are added. Each part of a character has all of it.
        """
        data = _utf8(text)
        ids, starts, ends = self._ask("edges", len(data), text=data)
        starts, ends = (_unpacked(places).astype(np.int64) for places in (starts, ends))
        return self.require_known(_unpacked(ids)), starts, ends

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        numbers = _id_list(ids)
        return base64.b64decode(self._ask("decode", 8 * len(numbers), ids=numbers))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8")

    def save(self, directory: PathLike) -> None:
        """Write the files again as they were read."""
        for name, content in self._files.items():
            with atomic_file(Path(directory, name)) as file:
                file.write(content)


def _read_bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        if file.size() > MAX_TOKENIZER_BYTES:
            raise DataError(f"{quoted(path)}: expected at most {MAX_TOKENIZER_BYTES} bytes")
        return file.read()


def _template_of_name(templates: list[Any], name: str) -> Any:
    """The template of that name in a list of {"name": ..., "template": ...}; None without one."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == name:
            return entry.get("template")
    return None


def _first_unknown(ids: NDArray[np.int32], limit: int) -> int | None:
    """The first id that is not below `limit`, or None."""
    unknown = ids[ids >= limit]
    return int(unknown[0]) if len(unknown) else None


def _unknown_token(where: str, token: str, id: int, limit: int) -> DataError:
    return DataError(
        f"{where}the text has the {token} with id {id}, and the model has ids 0 to {limit - 1} "
        "(vocab_size in its config.json): leave it out of the text, or use a model that knows it"
    )


def _unpacked(packed: str) -> NDArray[np.int32]:
    """The array of `sandboxed.py`, in memory of its own."""
    return np.frombuffer(base64.b64decode(packed), np.int32).copy()


Tokenizer = ByteTokenizer | HubTokenizer


def load_tokenizer(
    directory: PathLike, vocab_size: int, model_directory: PathLike | None = None
) -> Tokenizer:
    """The tokenizer in a model's folder: bytes, with a `note` that says so, without tokenizer.json.

    directory         the folder, or the model's name on the hub (formats/hub.py)
    vocab_size        of the model. A tokenizer may have more tokens: one that occurs in a text is a
                      DataError then
    model_directory   the model's folder, if the tokenizer is in another one, as that of an adapter
    """
    directory = find_model(directory)
    path = Path(directory, TOKENIZER_FILE)
    limit = min(vocab_size, ByteTokenizer.vocab_size)
    if not os.path.lexists(path):
        note = f"{quoted(directory)} has no {TOKENIZER_FILE}: texts are read as bytes, ids 0 to 255"
        others = [name for name in OTHER_FILES if Path(directory, name).exists()]
        if others:
            note += f" ({', '.join(others)} cannot be used)"
        return ByteTokenizer(note, limit)
    if _is_byte_level(read_json(path, limit=MAX_TOKENIZER_BYTES)):
        return ByteTokenizer(limit=limit)
    return HubTokenizer(directory, vocab_size, model_directory)


def has_tokenizer(adapter: PathLike) -> bool:
    """Whether an adapter's folder has a tokenizer or a chat template."""
    return any(os.path.lexists(Path(adapter, name)) for name in (TOKENIZER_FILE, TEMPLATE_FILE))


def load_adapter_tokenizer(adapter: PathLike, base: PathLike, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that an adapter's folder has; None if the base's is to be used as it is.

    A folder with a chat_template.jinja alone means the base's tokenizer with that template.
    """
    if os.path.lexists(Path(adapter, TOKENIZER_FILE)):
        return load_tokenizer(adapter, vocab_size, base)
    if not has_tokenizer(adapter):
        return None
    tokenizer = load_tokenizer(base, vocab_size)
    if isinstance(tokenizer, ByteTokenizer):
        return None  # it has no tokens with which a template could mark turns
    tokenizer.replace_template(Path(adapter, TEMPLATE_FILE))
    return tokenizer


def _is_byte_level(fields: JsonObject) -> bool:
    """Whether a tokenizer.json gives the same ids as `_byte_level`."""
    ours = _byte_level()
    template = fields.get("post_processor")
    if isinstance(template, dict) and template.get("special_tokens") == {}:
        fields["post_processor"] = (
            None  # transformers writes ours with a template that adds nothing
        )
    return all(fields.get(key) == ours[key] for key in ours.keys() - HARMLESS)
