"""Tokenizers: bytes, which need nothing, and a model's own tokenizer.json through the package `tokenizers`.

Whether the ids fit a model's vocabulary is checked by whoever knows the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..formats.disk import PathLike, atomic_file, open_regular, quoted, read_json, write_json

SPECIAL = (
    "bos",
    "eos",
    "unk",
    "sep",
    "pad",
    "cls",
    "mask",
)  # tokens that have a meaning of their own
MAX_TOKENIZER_BYTES = 128 << 20  # the largest in use, of 256,000 tokens, take about 35 MB


def _utf8(text: str | bytes) -> bytes:
    """A text's bytes. What the command line could not decode (U+DC80 to U+DCFF in a str) is the byte that it was."""
    try:
        return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is half of a surrogate pair: it has no bytes"
        ) from None


def _byte_level() -> dict[str, Any]:
    """Our tokenizer.json: byte-level BPE without merges. Its pieces are bytes, and a byte's id is its value.

    Byte-level BPE (Radford et al. 2019) writes each byte as one visible character: a printable Latin-1 character is
    itself, the other 68 bytes are U+0100, U+0101, ... in order. So the space, byte 32, is U+0120.
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
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    model |= dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {
        "version": "1.0",
        **absent,
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    }


@dataclass(frozen=True)
class ByteTokenizer:
    """Ids 0 to 255 are the bytes. Any text, in any encoding or none, has ids, and nothing needs to be installed."""

    note: str = ""  # why bytes were chosen, where the model's own files do not say so
    vocab_size: ClassVar[int] = 256
    eos: ClassVar[int | None] = None  # all 256 bytes may stand in a text

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> NDArray[np.int32]:
        """The bytes of the text, a str as UTF-8. There are no special tokens to add."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes again. An id that is no byte (a model may have a larger vocabulary) becomes U+FFFD."""
        return b"".join(bytes([i]) if 0 <= i < 256 else b"\xef\xbf\xbd" for i in ids)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """As UTF-8. errors="surrogateescape" gives back what the command line gave, be it UTF-8 or not."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def save(self, directory: PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json: `transformers.AutoTokenizer` then gives the same ids."""
        write_json(os.path.join(directory, "tokenizer.json"), _byte_level())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        write_json(os.path.join(directory, "tokenizer_config.json"), config)


class HubTokenizer:
    """Any other tokenizer.json, run by the `tokenizers` package. DataError where it cannot be, or for repeated ids."""

    FILES = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )
    note = ""

    def __init__(self, directory: PathLike):
        self._path = path = os.path.join(directory, "tokenizer.json")
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{quoted(path)} needs the package 'tokenizers': pip install -e .[hf]"
            ) from None
        with self._usable():
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        self._tokenizer.no_truncation()  # a file may ask for both, but a corpus is one long text
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if len(set(ids)) < max(1, len(ids)):
            raise DataError(
                f"{quoted(path)}: expected at least one token and an id of its own for each of {len(ids)}"
            )
        self.vocab_size = max(ids) + 1
        self._files = {}
        for name in self.FILES:
            if os.path.isfile(beside := os.path.join(directory, name)):
                with open_regular(beside) as file:
                    if os.fstat(file.fileno()).st_size > MAX_TOKENIZER_BYTES:
                        raise DataError(
                            f"{quoted(beside)}: expected at most {MAX_TOKENIZER_BYTES} bytes"
                        )
                    self._files[name] = file.read()

    @cached_property
    def _config(self) -> dict[str, Any]:
        """tokenizer_config.json, an object without anything if it is none."""
        try:  # by Python's own parser: what is there besides is not ours, and has integers of 31 digits
            config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        except (ValueError, RecursionError):
            raise DataError(
                f"the tokenizer_config.json beside {quoted(self._path)} is not JSON"
            ) from None
        return config if isinstance(config, dict) else {}

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and their like, those that tokenizer_config.json names."""
        named = {f"{name}_token": self._config.get(f"{name}_token") for name in SPECIAL}
        texts = {
            name: found.get("content") if isinstance(found, dict) else found
            for name, found in named.items()
        }
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    @cached_property
    def eos(self) -> int | None:
        """The id of the token that ends a text: tokenizer_config.json's eos_token. None where it names none."""
        with self._usable():
            token = self.special_tokens.get("eos_token")
            return None if token is None else self._tokenizer.token_to_id(token)

    @cached_property
    def added(self) -> list[int]:
        """The ids of the tokens that are found in a text as they are written, before it is cut up: the special ones."""
        with self._usable():
            return sorted(self._tokenizer.get_added_tokens_decoder())

    @property
    def chat_template(self) -> tuple[str, str] | None:
        """(template, where it is from): chat_template.jinja, or the one of tokenizer_config.json. None without one.

        Where that has several, the one whose name is "default". DataError for one that is no text in UTF-8.
        """
        name, found = "chat_template.jinja", self._files.get("chat_template.jinja")
        if found is None:
            name, found = (
                "the chat_template in tokenizer_config.json",
                self._config.get("chat_template"),
            )
            if isinstance(found, list):
                named = [
                    entry
                    for entry in found
                    if isinstance(entry, dict) and entry.get("name") == "default"
                ]
                found = named[-1].get("template") if named else None
        where = f"{name} beside {quoted(self._path)}"
        if found is None:
            return None
        try:
            text = found.decode("utf-8") if isinstance(found, bytes) else found
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 at byte {error.start}") from None
        if not isinstance(text, str):
            raise DataError(f"{where}: expected a text, found {type(text).__name__}")
        return text, where

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """What the package cannot do with this file is a DataError.

        It raises plain Exceptions, and panics (BaseExceptions) for a file that it did not check: with a pattern that
        does not end, say, which it gives up after ten million steps.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise DataError(
                    f"{quoted(self._path)} is not a usable tokenizer: {str(error)[:200]!r}"
                ) from None
            raise

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> NDArray[np.int32]:
        """The ids of a text in UTF-8; `add_special_tokens` puts what the file asks for around it (a BOS, say)."""
        try:
            decoded = _utf8(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the text is not UTF-8 at byte {error.start}; this model's tokenizer needs that"
            ) from None
        with self._usable():
            return np.array(
                self._tokenizer.encode(decoded, add_special_tokens=add_special_tokens).ids, np.int32
            )

    @cached_property
    def _bare(self) -> Any:
        """The same without what it puts around a text: in some files that trims spaces off tokens' places, too."""
        import tokenizers

        bare = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        bare.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        return bare

    def encode_with_edges(
        self, text: str
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """(ids, starts, ends), each (n,): token i is of text[starts[i] : ends[i]]. No special tokens are added.

        Tokens that are parts of one character have that character each.
        """
        _utf8(text)
        with self._usable():
            found = self._bare.encode(text, add_special_tokens=False)
        starts, ends = np.array(found.offsets, np.int64).reshape(-1, 2).T
        return np.array(found.ids, np.int32), starts, ends

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8")

    def decode(self, ids: Iterable[int]) -> str:
        with self._usable():
            return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def save(self, directory: PathLike) -> None:
        """Write the files again as they were read."""
        for name, content in self._files.items():
            with atomic_file(os.path.join(directory, name)) as file:
                file.write(content)


def load_tokenizer(directory: PathLike, vocab_size: int) -> ByteTokenizer | HubTokenizer:
    """The tokenizer in a model's directory: bytes, with a `note` that says so, where it has no tokenizer.json.

    DataError for a tokenizer that gives ids of `vocab_size` or more.
    """
    path = os.path.join(directory, "tokenizer.json")
    if os.path.lexists(path):
        found, ours = read_json(path, limit=MAX_TOKENIZER_BYTES), _byte_level()
        template = found.get("post_processor")
        if isinstance(template, dict) and template.get("special_tokens") == {}:
            found["post_processor"] = (
                None  # transformers writes ours again with a template that adds nothing
            )
        same = all(
            found.get(key) == ours[key]
            for key in ours.keys() - {"version", "decoder", "truncation", "padding"}
        )
        tokenizer: ByteTokenizer | HubTokenizer = (
            ByteTokenizer() if same else HubTokenizer(directory)
        )
    else:
        others = [
            name
            for name in ("tokenizer.model", "vocab.json", "vocab.txt")
            if Path(directory, name).exists()
        ]
        note = f"{quoted(directory)} has no tokenizer.json: texts are read as bytes, ids 0 to 255"
        tokenizer = ByteTokenizer(
            note + (f" ({', '.join(others)} cannot be used)" if others else "")
        )
    if tokenizer.vocab_size > vocab_size:
        source = tokenizer.note or quoted(path)
        raise DataError(
            f"{source}: {tokenizer.vocab_size} ids, more than the model's vocab_size of {vocab_size}"
        )
    return tokenizer
