"""Special tokens: where a folder names them, and that transformers finds the same ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from special_folders import (
    BOS,
    END,
    EOS,
    IDS,
    OWN,
    PAD,
    PROCESSORS,
    SIZE,
    TURN,
    VOCAB_SIZE,
    random_files,
    write_folder,
)

from minilora.data.records import read_records
from minilora.data.special import CLASS_TOKENS, SpecialTokens, surrounding_ids
from minilora.data.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer
from minilora.errors import DataError, FormatError


def read(folder: Path) -> HubTokenizer:
    tokenizer = load_tokenizer(folder, VOCAB_SIZE)
    assert isinstance(tokenizer, HubTokenizer)
    return tokenizer


# ---- against transformers ------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(120))
def test_special_tokens_and_prompts_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path, **random_files(seed))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if (folder / "generation_config.json").exists():
        generation = transformers.GenerationConfig.from_pretrained(folder)
    else:
        fields = json.loads((folder / "config.json").read_text())
        generation = transformers.GenerationConfig.from_model_config(fields)

    def expected(name: str) -> list[int]:
        """The ids of transformers, except those that it makes for texts that are no tokens."""
        own = getattr(theirs, name)
        listed = getattr(generation, name)
        ids = [own] if own is not None and own < SIZE else []
        ids += listed if isinstance(listed, list) else [listed]
        return [id for id in dict.fromkeys(ids) if id is not None and id < VOCAB_SIZE]

    tokenizer = read(folder)
    special = tokenizer.special
    assert special.texts == theirs.special_tokens_map
    assert list(special.eos) == expected("eos_token_id")
    for name, id in (("bos_token_id", special.bos), ("pad_token_id", special.pad)):
        assert id == next(iter(expected(name)), None)
    for text in ("the cat", "a</s>b", "<s>the<|im_end|>", "<x> it<|endoftext|>é", ""):
        ids = theirs(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=True).tolist() == ids
        if not text.startswith(("<s>", "<x>")):
            assert [*tokenizer.encode_prompt(text), *special.after] == ids


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_class_tokens_are_the_defaults_of_transformers(name: str) -> None:
    import inspect

    transformers = pytest.importorskip("transformers")
    parameters = inspect.signature(getattr(transformers, name).__init__).parameters
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    defaults = {field: parameters[field].default for field in names if field in parameters}
    assert CLASS_TOKENS[name] == defaults


# ---- by hand -------------------------------------------------------------------------------------

ENDS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "nothing": ({}, ()),
    "tokenizer_config": ({"settings": {"eos_token": "</s>"}}, (EOS,)),
    "special_tokens_map": ({"tokens_map": {"eos_token": {"content": "</s>"}}}, (EOS,)),
    "the map before tokenizer_config": (
        {"settings": {"eos_token": "</s>"}, "tokens_map": {"eos_token": "<x>"}},
        (OWN,),
    ),
    "added_tokens_decoder before the map": (
        {
            "settings": {"eos_token": "</s>", "added_tokens_decoder": {}},
            "tokens_map": {"eos_token": "<x>"},
        },
        (EOS,),
    ),
    "GPT-2 as on the hub": (
        {"model": {"model_type": "gpt2"}, "settings": {"model_max_length": 1024}},
        (END,),
    ),
    "GPT-2's class": ({"settings": {"tokenizer_class": "GPT2TokenizerFast"}}, (END,)),
    "GPT-2 without an end": (
        {"model": {"model_type": "gpt2"}, "settings": {"eos_token": None}},
        (),
    ),
    "config": ({"model": {"eos_token_id": TURN}}, (TURN,)),
    "several in config": ({"model": {"eos_token_id": [TURN, EOS]}}, (TURN, EOS)),
    "generation_config before config": (
        {"model": {"eos_token_id": 7}, "generation": {"eos_token_id": [TURN, EOS]}},
        (TURN, EOS),
    ),
    "generation_config without one": ({"model": {"eos_token_id": 7}, "generation": {}}, ()),
    "the tokenizer's first, and each once": (
        {"settings": {"eos_token": "</s>"}, "generation": {"eos_token_id": [TURN, EOS]}},
        (EOS, TURN),
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_eos_is_what_the_folder_names(tmp_path: Path, name: str) -> None:
    files, eos = ENDS[name]
    tokenizer = read(write_folder(tmp_path, **files))
    assert tokenizer.special.eos == eos
    assert tokenizer.special.notes == ()
    assert bool(tokenizer.missing_end) == (not eos)
    assert str(tmp_path) in tokenizer.missing_end or eos


def test_special_tokens_of_bytes_are_none(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 10}')
    tokenizer = load_tokenizer(tmp_path, 256)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.special == SpecialTokens()
    assert tokenizer.missing_end == ""
    assert tokenizer.encode_prompt("ab").tolist() == [97, 98]


def test_special_tokens_that_are_unknown_are_ignored_with_a_note(tmp_path: Path) -> None:
    settings = {"eos_token": "<nowhere>", "bos_token": "<s>"}
    generation = {"eos_token_id": [TURN, VOCAB_SIZE, -1]}
    special = read(write_folder(tmp_path, settings=settings, generation=generation)).special
    assert special.eos == (TURN,)
    unknown, outside = special.notes
    assert "tokenizer_config.json': eos_token '<nowhere>' is not a token" in unknown
    assert f"generation_config.json': eos_token_id [{TURN}, {VOCAB_SIZE}, -1]" in outside
    assert f"vocab_size of {VOCAB_SIZE}" in outside


def test_special_tokens_cut_a_text_though_tokenizer_json_does_not_list_them(tmp_path: Path) -> None:
    tokenizer = read(write_folder(tmp_path, added=[], settings={"eos_token": "</s>"}))
    assert tokenizer.encode("</s>").tolist() == [EOS]
    assert len(tokenizer.encode("<s>")) == 3  # named by no file, so a text like any other
    assert tokenizer.added == [EOS]


FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
LISTS: dict[str, dict[str, Any]] = {
    "additional_special_tokens": {"settings": {"additional_special_tokens": ["<x>", "<nowhere>"]}},
    "extra_special_tokens": {"settings": {"extra_special_tokens": ["<x>"]}},
    "extra_special_tokens by name": {"settings": {"extra_special_tokens": {"image_token": "<x>"}}},
    "added_tokens_decoder": {
        "settings": {"added_tokens_decoder": {OWN: {"content": "<x>", "special": False, **FLAGS}}}
    },
    "special_tokens_map": {"tokens_map": {"additional_special_tokens": [{"content": "<x>"}]}},
    "values that are no tokens": {
        "settings": {
            "additional_special_tokens": [3, None, {}, "", "<x>"],
            "added_tokens_decoder": 4,
        }
    },
}


@pytest.mark.parametrize("name", LISTS)
def test_listed_texts_cut_a_text_though_tokenizer_json_does_not_list_them(
    tmp_path: Path, name: str
) -> None:
    tokenizer = read(write_folder(tmp_path, added=[], **LISTS[name]))
    assert tokenizer.encode("a<x>b").tolist()[1:-1] == [OWN]
    assert tokenizer.added == [OWN]
    assert tokenizer.special.eos == ()


AROUND = {
    "none": ((), ()),
    "ByteLevel": ((), ()),
    "bos": ((BOS,), ()),
    "bos and eos": ((BOS,), (EOS,)),
    "two before": ((BOS, OWN), ()),
    "a sequence": ((BOS,), (EOS,)),
    "a sequence the other way": ((BOS, OWN), (EOS,)),
    "Bert": ((BOS,), (EOS,)),
    "Roberta": ((BOS,), (EOS,)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_surrounding_ids_are_those_that_the_package_adds(tmp_path: Path, name: str) -> None:
    assert surrounding_ids(PROCESSORS[name]) == AROUND[name]
    tokenizer = read(write_folder(tmp_path, processor=name))
    before, after = AROUND[name]
    special = tokenizer.special
    assert (special.before, special.after) == (before, after)
    for text in ("", "the"):
        ids = [*before, *tokenizer.encode(text), *after]
        assert tokenizer.encode(text, add_special_tokens=True).tolist() == ids
        assert tokenizer.encode_prompt(text).tolist() == ids[: len(ids) - len(after)]


def test_surrounding_ids_of_a_sequence_are_those_of_its_parts_from_the_inside() -> None:
    parts = [PROCESSORS["two before"], PROCESSORS["ByteLevel"], PROCESSORS["Bert"]]
    assert surrounding_ids({"type": "Sequence", "processors": parts}) == ((BOS, BOS, OWN), (EOS,))


def test_load_tokenizer_refuses_a_template_of_very_many_tokens(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, processor="bos")
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["post_processor"]["special_tokens"]["<s>"] |= {"ids": [BOS] * 999, "tokens": ["s"] * 999}
    fields["post_processor"]["single"] *= 999
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"tokenizer\.json.* more than 1024 tokens"):
        load_tokenizer(folder, VOCAB_SIZE)


def test_load_tokenizer_refuses_a_template_with_a_token_that_it_lacks(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, processor="bos")
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["post_processor"]["single"][0]["SpecialToken"]["id"] = "taken"
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"tokenizer\.json.* 'taken' .* special_tokens lack it"):
        load_tokenizer(folder, VOCAB_SIZE)


def test_encode_prompt_adds_no_second_bos(tmp_path: Path) -> None:
    tokenizer = read(write_folder(tmp_path, processor="bos"))
    assert tokenizer.encode_prompt("<s>ab").tolist() == tokenizer.encode_prompt("ab").tolist()
    assert tokenizer.encode_prompt("a<s>b").tolist().count(BOS) == 2


@pytest.mark.parametrize(
    ("after", "last", "closing"),
    [
        ((), 5, (EOS,)),
        ((), None, (EOS,)),
        ((), TURN, ()),
        ((PAD,), TURN, (PAD, EOS)),
        ((TURN,), 5, (TURN,)),
    ],
)
def test_closing_ends_a_text_once(
    after: tuple[int, ...], last: int | None, closing: tuple[int, ...]
) -> None:
    special = SpecialTokens(eos=(EOS, TURN), after=after)
    assert special.closing(last) == closing
    assert SpecialTokens(after=after).closing(last) == after


# ---- files that are wrong ------------------------------------------------------------------------

WRONG_IDS = ["2", 2.0, True, {"id": 2}, [2, "3"], [[2]], [True]]


@pytest.mark.parametrize("value", WRONG_IDS, ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_load_tokenizer_refuses_ids_that_are_not_integers(
    tmp_path: Path, file: str, value: object
) -> None:
    kind = "model" if file == "config.json" else "generation"
    folder = write_folder(tmp_path, **{kind: {"eos_token_id": value}})
    with pytest.raises(FormatError) as caught:
        load_tokenizer(folder, VOCAB_SIZE)
    for part in (f"{file}'", "eos_token_id", "a list of integers, or null", repr(value)):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [1, 2.5, True, ["</s>"], {}, {"content": 1}], ids=str)
@pytest.mark.parametrize("file", ["settings", "tokens_map"])
def test_load_tokenizer_refuses_tokens_that_are_not_texts(
    tmp_path: Path, file: str, value: object
) -> None:
    folder = write_folder(tmp_path, **{file: {"eos_token": value}})
    name = {"settings": "tokenizer_config.json", "tokens_map": "special_tokens_map.json"}[file]
    with pytest.raises(FormatError) as caught:
        load_tokenizer(folder, VOCAB_SIZE)
    for part in (f"{name}'", "eos_token must be a text", repr(value)):
        assert part in str(caught.value)


@pytest.mark.parametrize("file", ["generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": NaN}', b'{"a":' * 99 + b"1" + b"}" * 99])
def test_load_tokenizer_refuses_a_damaged_file_beside_it(
    tmp_path: Path, file: str, content: bytes
) -> None:
    folder = write_folder(tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(FormatError, match=file):
        load_tokenizer(folder, VOCAB_SIZE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("file", ["generation_config.json", "special_tokens_map.json"])
def test_load_tokenizer_does_not_wait_for_a_pipe_beside_it(tmp_path: Path, file: str) -> None:
    folder = write_folder(tmp_path)
    os.mkfifo(folder / file)
    with pytest.raises((FormatError, DataError), match="not a regular file"):
        load_tokenizer(folder, VOCAB_SIZE)


def test_ids_of_the_support_folders_are_what_they_say(tmp_path: Path) -> None:
    tokenizer = read(write_folder(tmp_path))
    assert {text: int(tokenizer.encode(text)[0]) for text in IDS} == IDS
    assert tokenizer.vocab_size == SIZE


# ---- a tokenizer with more tokens than the model ----


def test_encode_refuses_a_token_that_the_model_lacks_where_it_occurs(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, processor="bos and eos", settings={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(folder, BOS + 1)
    assert isinstance(tokenizer, HubTokenizer)
    assert tokenizer.encode("plain").tolist() == tokenizer.encode(b"plain").tolist()
    assert tokenizer.encode_prompt("plain")[0] == BOS, "the last id of the model"
    for use in (tokenizer.encode, tokenizer.encode_prompt, tokenizer.encode_with_edges):
        with pytest.raises(
            DataError, match=rf"token '<x>' with id {OWN}, and the model has ids 0 to"
        ):
            use("a <x> b")
    with pytest.raises(DataError, match=rf"token '</s>' with id {EOS}"):
        tokenizer.encode("a", add_special_tokens=True)
    with pytest.raises(DataError, match=rf"token '<s>' with id {BOS}"):
        load_tokenizer(folder, BOS).encode_prompt("a")


def test_special_tokens_that_the_model_lacks_are_ignored_with_a_note(tmp_path: Path) -> None:
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    folder = write_folder(tmp_path, settings=settings, generation={"eos_token_id": [5, TURN]})
    special = load_tokenizer(folder, TURN).special
    assert (special.bos, special.eos, special.pad) == (BOS, (5,), None)
    notes = "; ".join(special.notes)
    for words in (f"eos_token '<|im_end|>' has id {TURN}", f"pad_token '<pad>' has id {PAD}"):
        assert f"{words}, outside the model's vocab_size of {TURN}" in notes
    assert "tokenizer_config.json" in notes
    whole = load_tokenizer(folder, VOCAB_SIZE).special
    assert (whole.eos, whole.pad, whole.notes) == ((TURN, 5), PAD, ())


def test_read_records_names_an_end_that_the_model_lacks(tmp_path: Path) -> None:
    """The tokenizer puts it after each record."""
    folder = write_folder(tmp_path, processor="bos and eos")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=rf"data\.jsonl.* token '</s>' with id {EOS}"):
        read_records(data, load_tokenizer(folder, EOS), 8)
