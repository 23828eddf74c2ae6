"""Tokenizers against the packages that will read their files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.tokenizer import ByteTokenizer, HubTokenizer, _byte_level, load_tokenizer
from minilora.errors import DataError, FormatError

GOLDEN = Path(__file__).parents[1] / "golden"


@given(st.text())
def test_byte_tokenizer_decodes_a_text_again(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.binary())
def test_byte_tokenizer_decodes_any_bytes_again(raw):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw
    assert tokenizer.decode(tokenizer.encode(raw)) == raw.decode("utf-8", "replace")
    argument = raw.decode("utf-8", "surrogateescape")  # as sys.argv holds it
    assert tokenizer.decode_bytes(tokenizer.encode(argument)) == raw
    assert tokenizer.decode(tokenizer.encode(argument), errors="surrogateescape") == argument


def test_byte_tokenizer_refuses_half_of_a_surrogate_pair():
    with pytest.raises(DataError, match="character 2 "):
        ByteTokenizer().encode("ab\ud83d")


@given(st.lists(st.integers(-5, 600)))
def test_byte_tokenizer_decodes_other_ids_as_replacement_characters(ids):
    pieces = [bytes([i]) if 0 <= i < 256 else "\ufffd".encode() for i in ids]
    assert ByteTokenizer().decode(np.array(ids, int)) == b"".join(pieces).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    ByteTokenizer().save(directory)
    return directory


def test_byte_tokenizer_save_gives_the_tokenizers_package_the_same_ids(saved):
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert theirs.get_vocab_size() == 256
    ours = ByteTokenizer()

    @given(st.text())
    def same(text):
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text

    same()
    every = "".join(map(chr, range(0x800))) + "\u2028\U0001f600  \r\n"
    assert theirs.encode(every).ids == list(every.encode())
    # All 256 bytes, those that no UTF-8 text has among them.
    pieces = _byte_level()["model"]["vocab"]
    assert list(pieces.values()) == list(range(256))
    assert [theirs.token_to_id(piece) for piece in pieces] == list(range(256))
    assert theirs.decode([0xFF, 0x20, 0xC3, 0xA9]) == b"\xff \xc3\xa9".decode("utf-8", "replace")


@pytest.mark.oracle
@pytest.mark.parametrize("model", [None, "llama"])
def test_byte_tokenizer_save_gives_transformers_the_same_ids(saved, tmp_path, model):
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path)
    # With a config.json beside it, AutoTokenizer may prefer the class of that architecture.
    if model:
        shutil.copy(GOLDEN / model / "config.json", tmp_path)
    file = str(tmp_path / "tokenizer.json")
    kinds = [transformers.AutoTokenizer.from_pretrained(tmp_path)]
    kinds.append(transformers.PreTrainedTokenizerFast(tokenizer_file=file))
    ours = ByteTokenizer()

    @given(st.text())
    def same(text):
        for theirs in kinds:
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode(text).tolist()
            assert theirs.decode(ids) == text

    same()
    again = tmp_path / "again"
    kinds[0].save_pretrained(again)
    assert load_tokenizer(again, 256) == ByteTokenizer()


def test_load_tokenizer_reads_its_own_file_without_the_package(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(saved, 256) == ByteTokenizer()
    assert load_tokenizer(saved, 300).note == ""
    few = load_tokenizer(saved, 128)
    assert few.encode("plain").tolist() == list(b"plain")
    with pytest.raises(DataError, match=r"byte 0xc3 with id 195, and the model has ids 0 to 127"):
        few.encode("caf\u00e9")


def test_load_tokenizer_without_a_file_gives_bytes_and_a_note(tmp_path):
    tokenizer = load_tokenizer(tmp_path, 256)
    assert isinstance(tokenizer, ByteTokenizer)
    assert "no tokenizer.json" in tokenizer.note
    assert "cannot be used" not in tokenizer.note
    with pytest.raises(DataError, match=r"no tokenizer\.json.* byte 0xff with id 255"):
        load_tokenizer(tmp_path, 255).encode(b"\xfe\xff")
    (tmp_path / "tokenizer.model").touch()
    assert "tokenizer.model cannot be used" in load_tokenizer(tmp_path, 256).note


def test_load_tokenizer_ignores_fields_that_change_no_id(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [sequence], "special_tokens": {}}
    fields = {"version": "2.0", "decoder": {"type": "ByteLevel"}}
    fields |= {"post_processor": template, "truncation": {"x": 1}}
    folder = changed(saved, tmp_path, lambda file: file.update(fields))
    assert load_tokenizer(folder, 256) == ByteTokenizer()


def changed(saved, tmp_path, change):
    fields = json.loads((saved / "tokenizer.json").read_text())
    change(fields)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    return tmp_path


ROBERTA = {"type": "RobertaProcessing", "sep": ["a", 97], "cls": ["b", 98]}


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["model"]["merges"].append(["a", "b"]),
        lambda f: f["model"]["vocab"].update({"a": 98, "b": 97}),
        lambda f: f["pre_tokenizer"].update(add_prefix_space=True),
        lambda f: f.update(normalizer={"type": "NFC"}),
        lambda f: f.update(added_tokens=[{"id": 256, "content": "<s>"}]),
        lambda f: f.update(post_processor=ROBERTA),
        lambda f: f.pop("model"),
    ],
)
def test_load_tokenizer_says_how_to_install_the_package(saved, tmp_path, monkeypatch, change):
    package = pytest.importorskip("tokenizers")
    place = str(Path(package.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != place])
    with pytest.raises(DataError, match=r"pip install -e .\[hf\]"):
        load_tokenizer(changed(saved, tmp_path, change), 256)


def trained(directory):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat and the rat"] * 3, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.enable_truncation(4)
    made.save(str(directory / "tokenizer.json"))
    return made


def test_hub_tokenizer_gives_the_package_s_ids(tmp_path):
    theirs = trained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"x": 1}')
    ours = load_tokenizer(tmp_path, 512)
    assert isinstance(ours, HubTokenizer)
    assert ours.note == ""
    assert ours.vocab_size == theirs.get_vocab_size()
    text = "the cat sat on the mat, and so on: " * 3
    ids = ours.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) > 4, "the truncation in a file must not cut a corpus"
    assert ours.decode(ids) == text
    assert ours.decode_bytes(ids) == text.encode()
    assert ours.encode(text.encode()).tolist() == ids.tolist()
    assert ours.encode(text, add_special_tokens=True).tolist() == [0, *ids.tolist()]
    assert ours.decode([0]) == "<s>"
    with pytest.raises(DataError, match="at byte 3;"):
        ours.encode(b"the\xff")
    fewer = load_tokenizer(tmp_path, int(ids.max()))
    message = rf"tokenizer\.json': the text has the token .* with id {ids.max()}, and the model has"
    with pytest.raises(DataError, match=message):
        fewer.encode(text)
    with pytest.raises(DataError, match=message):
        fewer.encode_with_edges(text)
    copy = tmp_path / "copy"
    copy.mkdir()
    ours.save(copy)
    assert sorted(os.listdir(copy)) == ["tokenizer.json", "tokenizer_config.json"]
    for name in os.listdir(copy):
        assert (copy / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["model"]["merges"].append(["nowhere", "b"]),
        lambda f: f["model"]["vocab"].update(a=98),
        lambda f: f["model"].update(vocab={}),
        lambda f: f["model"].update(type="Unheard"),
    ],
)
def test_load_tokenizer_refuses_an_unusable_file(saved, tmp_path, change):
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(changed(saved, tmp_path, change), 256)


def test_load_tokenizer_refuses_a_damaged_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1, "a": 2}}}')
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, 256)


# ---- Llama 2's class -----------------------------------------------------------------------------

TEXTS = ["ab ab", "  ab", "<s>ab</s> ab", "ab</s>\nab", "", "é ab 日", "</s>"]


def write_llama_2(folder: Path, **settings: object) -> Path:
    """A small tokenizer.json as Llama 2's, whose normalizer puts a space behind special tokens."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab", "ab", "▁ab"]
    before = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    normalizers = [{"type": "Prepend", "prepend": "▁"}]
    normalizers += [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    fields = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **flags} for i, token in enumerate(special)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [before, text],
            "pair": [before, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": ["a b", "▁ ab"],
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(fields), "utf-8")
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [263, 2, 263]),  # as the file says
        ({"tokenizer_class": "LlamaTokenizer"}, [263, 2, 262]),
        ({"tokenizer_class": "LlamaTokenizerFast", "legacy": True}, [263, 2, 263]),
        ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, [262, 2, 262]),
    ],
)
def test_encode_of_llama_2_puts_spaces_as_its_class_does(tmp_path, settings, ids):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(write_llama_2(tmp_path, **settings), 300)
    assert tokenizer.encode("ab</s>ab").tolist() == ids
    if ids[0] == 263:
        assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"])
@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("add_prefix_space", [True, False, None])
def test_encode_of_llama_2_is_that_of_transformers(tmp_path, name, legacy, add_prefix_space):
    import transformers

    settings = {"legacy": legacy, "add_prefix_space": add_prefix_space, "tokenizer_class": name}
    folder = write_llama_2(tmp_path, **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, 300)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=True).tolist() == ids
        assert tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((1, 3), int), r"got shape \(1, 3\): give ids\[0\]"),
        ([[65, 66]], "got a list of lists"),
        (65, r"got 65: one id is \[id\]"),
        ("text", "takes a list of ids"),
        ([65.5], "ids must be integers, got 65.5"),
    ],
)
def test_decode_says_that_it_takes_the_ids_of_one_text(ids, message):
    with pytest.raises(DataError, match=message):
        ByteTokenizer().decode(ids)


def test_encode_says_that_it_takes_one_text():
    with pytest.raises(DataError, match="got list: encode takes one text"):
        ByteTokenizer().encode(["a", "b"])
