"""Special tokens: which ids begin, end and fill a text, as transformers 5 reads a model's folder.

A folder says so in up to six files:

    the texts of the tokens    special_tokens_map.json, unless tokenizer_config.json has an
                               added_tokens_decoder; else tokenizer_config.json; else the default of
                               the tokenizer's class; for pad_token also tokenizer.json's padding
    what surrounds a text      the post-processor of tokenizer.json. With such a file, add_bos_token
                               and add_eos_token of tokenizer_config.json have no effect
    where generation stops     eos_token_id of generation_config.json or, without that file, of
                               config.json; one id or several

A text ends at each id that generation stops at, and at the tokenizer's own eos_token, which comes
first. transformers joins them too: before training, its Trainer puts the tokenizer's eos_token_id
into the generation config (`align_special_tokens` in trainer_utils.py), because a model that learns
to end its texts with this token must be stopped by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, FormatError, Rule, check_fields, is_integer, optional, rules_for
from ..formats.disk import JsonObject, PathLike, quoted, read_json

MODEL_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MAP_FILE = "special_tokens_map.json"
SETTINGS_FILE = "tokenizer_config.json"
MAX_SURROUNDING = 1024  # tokenizers in use put one or two ids around a text

Ids = tuple[int, ...]
TokenToId = Callable[[str], int | None]

# ---- the texts of the tokens ---------------------------------------------------------------------

NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
END = "<|endoftext|>"

# The tokens of a tokenizer's class where the folder names none. Other classes have none. A None
# counts as named: tokenizer.json's padding is then not asked.
CLASS_TOKENS: dict[str, dict[str, str | None]] = {
    "GPT2Tokenizer": {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": None},
    "Qwen2Tokenizer": {"bos_token": None, "eos_token": END, "unk_token": END, "pad_token": END},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPTNeoXTokenizer": {
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "pad_token": "<|padding|>",
    },
}
# The tokenizer's class of a type of model where the folder names none.
MODEL_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def tokenizer_class(directory: PathLike, settings: JsonObject, is_byte_level: bool) -> str:
    """The class that transformers' AutoTokenizer uses for a folder's tokenizer.json; "" if it is of
    no importance which.

    settings        tokenizer_config.json
    is_byte_level   whether tokenizer.json has a part of type ByteLevel
    """
    model = read_fields(directory, MODEL_FILE) or {}
    kind = str(model.get("model_type"))
    declared = settings.get("tokenizer_class") or model.get("tokenizer_class")
    name = MODEL_CLASSES.get(kind, "")
    # What folders of Qwen2 declare is often wrong, and Mistral has one class: both count for
    # nothing. Folders of Llama 3 declare Llama 2's class.
    if isinstance(declared, str) and kind not in ("qwen2", "mistral"):
        name = declared.removesuffix("Fast")
        if name == "LlamaTokenizer" and is_byte_level:
            name = ""
    return name


def default_tokens(
    directory: PathLike, settings: JsonObject, is_byte_level: bool
) -> dict[str, str | None]:
    """The tokens of a folder's `tokenizer_class` where the folder names none."""
    return CLASS_TOKENS.get(tokenizer_class(directory, settings, is_byte_level), {})


class NamedToken(NamedTuple):
    """A token's text, and the file that names it (empty: a default)."""

    text: str
    file: str


def named_tokens(
    directory: PathLike, settings: JsonObject, default: Mapping[str, str | None]
) -> dict[str, NamedToken]:
    """bos_token, eos_token and others by name, those that have a text.

    settings   tokenizer_config.json
    default    the texts by name, for names that no file has
    """
    texts: dict[str, tuple[str | None, str]] = {}
    for name, value in default.items():
        texts[name] = value, ""
    for file, fields in _files_of_tokens(directory, settings).items():
        extra = fields.get("extra_special_tokens")
        extra = extra if isinstance(extra, dict) else {}
        for name, value in {**fields, **extra}.items():
            # A model's own tokens, such as image_token, are for its chat template. Other fields
            # have such names too: add_bos_token is true or false.
            text = _content(value)
            is_own = name.endswith("_token") and isinstance(text, str)
            if name in NAMES or is_own:
                texts[name] = _token_text(name, value, Path(directory, file)), file
    return {name: NamedToken(text, file) for name, (text, file) in texts.items() if text}


def listed_texts(directory: PathLike, settings: JsonObject) -> set[str]:
    """The texts of tokens that files list beside the named ones: a text is cut at these, too."""
    name, older_name = "extra_special_tokens", "additional_special_tokens"
    extra: list[Any] = []
    has_list = False  # in an earlier file: then the list under the older name does not count
    for fields in _files_of_tokens(directory, settings).values():
        extra += _values(fields.get(name))
        if not extra and not has_list:
            extra += _values(fields.get(older_name))
        has_list = has_list or name in fields or older_name in fields
    values = [*extra, *_values(settings.get("added_tokens_decoder"))]
    return {text for text in map(_content, values) if isinstance(text, str) and text}


def _files_of_tokens(directory: PathLike, settings: JsonObject) -> dict[str, JsonObject]:
    """The files that name tokens, by their names; a later one counts."""
    files = {SETTINGS_FILE: settings}
    if "added_tokens_decoder" not in settings:
        files[MAP_FILE] = read_fields(directory, MAP_FILE) or {}
    return files


def _values(value: Any) -> list[Any]:
    """Those of a list or an object; none of anything else."""
    if isinstance(value, dict):
        value = list(value.values())
    return value if isinstance(value, list) else []


def _content(value: Any) -> Any:
    """The content of an AddedToken; anything else as it is."""
    return value.get("content") if isinstance(value, dict) else value


def _token_text(name: str, value: Any, path: Path) -> str | None:
    """The text of a token: itself, or the content of an AddedToken."""
    text: str | None = _content(value)
    if value is not None and not isinstance(text, str):
        raise FormatError(
            f"{quoted(path)}: {name} must be a text, an object with a text as its content, or "
            f"null, got {value!r:.100}: correct it"
        )
    return text


# ---- what surrounds a text -----------------------------------------------------------------------


def surrounding_ids(processor: JsonObject | None, where: str = "tokenizer.json") -> tuple[Ids, Ids]:
    """(before, after): the ids that a post-processor of tokenizer.json puts around one text.

    DataError, which begins with `where`, for more than MAX_SURROUNDING of them, or for a token
    without ids.
    """
    before: list[int] = []
    after: list[int] = []
    for part in _parts(processor):
        is_before = True
        start: list[int] = []
        for piece in _pieces(part, where):
            if piece is None:
                is_before = False
            elif is_before:
                start.extend(piece)
            else:
                after.extend(piece)
            if len(start) + len(before) + len(after) > MAX_SURROUNDING:
                raise DataError(
                    f"{where}: its post_processor puts more than {MAX_SURROUNDING} tokens "
                    "around a text: use a tokenizer.json with fewer"
                )
        before = start + before
    return tuple(before), tuple(after)


def _parts(processor: JsonObject | None) -> Iterator[JsonObject]:
    """The post-processors that a sequence of them has, the innermost first."""
    if processor is None:
        return
    if processor["type"] != "Sequence":
        yield processor
        return
    for part in processor["processors"]:
        yield from _parts(part)


def _pieces(processor: JsonObject, where: str) -> Iterator[list[int] | None]:
    """The ids of each special token that a post-processor adds, and None in place of the text.

    DataError for a token that its special_tokens lack, which the package `tokenizers` takes.
    """
    kind = processor["type"]
    if kind == "TemplateProcessing":
        for piece in processor["single"]:
            if "Sequence" in piece:
                yield None
            else:
                token = piece["SpecialToken"]["id"]
                if token not in processor["special_tokens"]:
                    raise DataError(
                        f"{where}: its post_processor puts the special token {quoted(token, 40)} "
                        "around a text, but its special_tokens lack it: add it there"
                    )
                yield processor["special_tokens"][token]["ids"]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        yield [processor["cls"][1]]
        yield None
        yield [processor["sep"][1]]


# ---- all together --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a model. Bytes have none.

    bos       the id that begins a text
    eos       the ids at which a text ends; training puts the first one there
    pad       the id that fills a batch where a text has ended
    before    the ids that the tokenizer puts before a text
    after     the ids that the tokenizer puts after a text
    texts     bos_token and the like with their texts, for a chat template
    notes     what was ignored and why, for the user
    """

    bos: int | None = None
    eos: Ids = ()
    pad: int | None = None
    before: Ids = ()
    after: Ids = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def closing(self, last: int | None) -> Ids:
        """The ids to put after a text whose last id is given, so that one of `eos` ends it."""
        if self.after:
            last = self.after[-1]
        return self.after if last in self.eos else self.after + self.eos[:1]


def read_special_tokens(
    directory: PathLike,
    tokens: Mapping[str, NamedToken],
    token_to_id: TokenToId,
    around: tuple[Ids, Ids],
    vocab_size: int,
    model_directory: PathLike | None = None,
) -> SpecialTokens:
    """The special tokens of a model: its folder, and that of its tokenizer, may be two.

    tokens        the result of `named_tokens`
    token_to_id   the id of a text, None if the tokenizer has no such token
    around        the result of `surrounding_ids`
    vocab_size    of the model, which can write no other ids

    FormatError for an id in config.json or generation_config.json that is not an integer.
    """
    notes = []
    own: dict[str, list[int]] = {}  # the tokenizer's
    for name in ("bos_token", "eos_token", "pad_token"):
        own[name] = []
        if token := tokens.get(name):
            id = token_to_id(token.text)
            if id is not None and id >= vocab_size:
                notes.append(
                    f"{quoted(Path(directory, token.file or 'tokenizer.json'))}: {name} "
                    f"{quoted(token.text, 40)} has id {id}, outside the model's vocab_size of "
                    f"{vocab_size}, so it is ignored"
                )
            elif id is not None:
                own[name] = [id]
            elif token.file:
                notes.append(
                    f"{quoted(Path(directory, token.file))}: {name} {quoted(token.text, 40)} is "
                    "not a token of tokenizer.json, so it is ignored"
                )
    where, listed = _listed_ids(directory if model_directory is None else model_directory)
    stops = [i for i in listed["eos_token_id"] if 0 <= i < vocab_size]
    if len(stops) < len(listed["eos_token_id"]):
        notes.append(
            f"{where}: eos_token_id {listed['eos_token_id']!r:.100} has ids outside the model's "
            f"vocab_size of {vocab_size}, which are ignored"
        )

    def first(name: str) -> int | None:
        ids = own[name] + [i for i in listed[f"{name}_id"] if 0 <= i < vocab_size]
        return ids[0] if ids else None

    return SpecialTokens(
        bos=first("bos_token"),
        eos=tuple(dict.fromkeys(own["eos_token"] + stops)),
        pad=first("pad_token"),
        before=around[0],
        after=around[1],
        texts={name: token.text for name, token in tokens.items()},
        notes=tuple(notes),
    )


def _is_id_or_list(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(type(i) is int for i in ids)


ID_RULES = [
    *rules_for(("bos_token_id", "pad_token_id"), optional(is_integer()), "an integer, or null"),
    Rule("eos_token_id", optional(_is_id_or_list), "an integer, a list of integers, or null"),
]


def _listed_ids(directory: PathLike) -> tuple[str, dict[str, list[int]]]:
    """(file, ids by field) of generation_config.json, or of config.json if that file is missing."""
    where = ""
    listed: dict[str, list[int]] = {rule.field: [] for rule in ID_RULES}
    for file in (MODEL_FILE, GENERATION_FILE):  # the later one counts
        fields = read_fields(directory, file)
        if fields is None:
            continue
        where = quoted(Path(directory, file))
        ids = {name: fields.get(name) for name in listed}
        check_fields(ids, ID_RULES, f"{where}: ", FormatError)
        for name, value in ids.items():
            several = value if isinstance(value, list) else [value]
            listed[name] = [id for id in several if id is not None]
    return where, listed


def read_fields(directory: PathLike, file: str) -> JsonObject | None:
    """The JSON object in a file of a folder; None without the file."""
    path = Path(directory, file)
    return read_json(path) if os.path.lexists(path) else None
