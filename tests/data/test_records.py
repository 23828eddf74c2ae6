"""Records: what a line may be, where learning begins, and that packing loses, repeats and misplaces nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import TEMPLATES, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from small import base, bits

from minilora import CausalLM, LoraConfig, get_multitask_model, get_peft_model
from minilora.data import PackedRecords, TaskWindows, Windows, evaluation_windows
from minilora.data.batches import IGNORE
from minilora.data.records import (
    MAX_LINE_BYTES,
    Record,
    bytes_per_token,
    is_records,
    pack,
    read_records,
    split_records,
)
from minilora.data.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer
from minilora.errors import CheckpointError, ConfigError, DataError, FormatError
from minilora.training.loop import Settings, evaluate, train

BYTES = ByteTokenizer()
LINE = {"prompt": "2+2=", "completion": "4"}


def record(ids: Any, first: int, size: float) -> Record:
    """One of which all from `first` on is learned."""
    return Record(np.array(ids, np.int32), np.arange(len(ids)) >= first, size)


def written(path: Path, *lines: object) -> Path:
    """A file of them: bytes as they are, all else as JSON."""
    path = path / "data.jsonl" if path.is_dir() else path
    path.write_bytes(
        b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines)
    )
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return (
        tmp_path_factory.mktemp("records") / "data.jsonl"
    )  # for Hypothesis, one file written again and again


# ---- packing --------------------------------------------------------------------------------------------------------


@st.composite
def packings(draw):
    """(records whose tokens are their own numbers, context)"""
    context = draw(st.integers(1, 12))
    records, end = [], 0
    for size in draw(st.lists(st.integers(2, context + 1), min_size=1, max_size=30)):
        first = draw(st.integers(1, size - 1))
        records.append(record(np.arange(end, end + size), first, size - first))
        end += size
    return records, context


def learned(records: list[Record]) -> list[int]:
    return [i for record in records for i in record.ids[record.learned].tolist()]


@given(packings())
def test_packing_keeps_every_token_once_and_in_order(case):
    records, context = case
    packed = pack(records, context)
    assert packed.ids.tolist() == list(range(len(packed)))
    assert np.flatnonzero(packed.counts).tolist() == learned(records)
    assert np.diff(packed.edges).max() <= context + 1
    starts = {int(record.ids[0]) for record in records}
    assert set(packed.edges.tolist()) <= starts | {len(packed)}, "a record is never in two windows"
    sizes = {int(record.ids[0]): len(record.ids) for record in records}
    for begin, end in pairwise(packed.edges[:-1].tolist()):
        assert end - begin + sizes[end] > context + 1, "a window that had room for the next record"


@given(packings(), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_learns_each_token_once_from_the_one_before_it(case, batch_size, seed, spare):
    records, context = case
    context += spare  # a window may be shorter than the context allows
    packed = pack(records, context)
    cut = Windows(packed, context, batch_size, seed)
    assert len(cut) == len(packed.edges) - 1
    steps = -(-2 * len(cut) // batch_size)
    rows = [row for step in range(steps) for row in zip(*arrays(cut.batch(step)), strict=True)]
    for epoch in (rows[: len(cut)], rows[len(cut) : 2 * len(cut)]):
        ids, targets = (np.stack(part) for part in zip(*epoch, strict=True))
        counted = targets != IGNORE
        assert sorted(targets[counted].tolist()) == learned(records)
        assert np.array_equal(ids[counted], targets[counted] - 1)
        for start, row in zip(
            ids[:, 0].tolist(), ids, strict=True
        ):  # the whole window but its last token, then zeros
            place = packed.edges.tolist().index(start)
            inside = np.arange(start, packed.edges[place + 1] - 1)
            assert row.tolist() == inside.tolist() + [0] * (context - len(inside))
    for step in range(2):
        assert cut.epoch(step) == step * batch_size // len(cut)
    batches = list(evaluation_windows(packed, context, batch_size))
    targets = np.concatenate([batch.targets for batch in batches])
    assert targets[targets != IGNORE].tolist() == learned(records)
    assert sum(batch.tokens for batch in batches) == int(packed.counts.sum())
    some = np.concatenate([b.ids for b in evaluation_windows(packed, context, batch_size, limit=2)])
    assert len(some) == min(2, len(cut))
    assert set(some[:, 0].tolist()) <= set(packed.edges[:-1].tolist())


def arrays(batch):
    assert batch.ids.dtype == batch.targets.dtype == np.int64
    return batch.ids, batch.targets


def test_windows_are_visited_in_another_order_in_each_epoch():
    packed = pack([record(np.full(4, i), 1, 3) for i in range(20)], 3)
    orders = {
        tuple(Windows(packed, 3, 20, s).batch(e).ids[:, 0].tolist())
        for s in range(3)
        for e in range(5)
    }
    assert len(orders) == 15
    again = [Windows(packed, 3, 20, 0).batch(4).ids.tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_tasks_may_be_packed_too():
    packed = pack([record(np.arange(4) + 10 * i, 2, 2) for i in range(5)], 3)
    texts = {"plain": np.arange(100, 150), "records": packed}
    batch = TaskWindows(texts, 3, 6, seed=1).batch(2)
    rows = [b for b, task in enumerate(batch.tasks) if task == "records"]
    assert batch.targets[rows].tolist() == Windows(packed, 3, 3, seed=1).batch(2).targets.tolist()
    assert (batch.targets[rows] != IGNORE).sum() == 2 * len(rows)


def test_records_that_do_not_fit_a_window_are_refused():
    long = record(np.arange(5), 1, 4)
    with pytest.raises(DataError, match="at most 4 tokens, got 5"):
        pack([long], 3)
    with pytest.raises(DataError, match="got none"):
        pack([], 3)
    with pytest.raises(DataError, match="up to 5 tokens: context must be 4 or more"):
        Windows(pack([long], 4), 3, 2)
    with pytest.raises(DataError, match="up to 5 tokens: context must be 4 or more"):
        evaluation_windows(pack([long], 4), 3, 2)


@pytest.mark.parametrize(
    ("counts", "edges", "named"),
    [
        ([1, 1, 1], [0, 4], "a bool for each"),
        ([1, 1, 1, 1], [0], "at least one window"),
        ([1, 1, 1, 1], [[0, 4]], "at least one window"),
        ([1, 1, 1, 1], [0, 3], "rise from 0 to 4"),
        ([1, 1, 1, 1], [1, 4], "rise from 0 to 4"),
        ([1, 1, 1, 1], [0, 2, 2, 4], "rise from 0 to 4"),
        (
            [0, 1, 1, 0],
            [0, 2, 4],
            "no token counts",
        ),  # of the second window only the first, which is no target
        ([0, 0, 0, 1], [0, 2, 4], "no token counts"),
    ],
)
def test_a_packed_text_is_sound(counts, edges, named):
    with pytest.raises(DataError, match=named):
        PackedRecords(np.arange(4), np.array(counts, bool), np.array(edges))
    with pytest.raises(DataError, match="a bool for each"):
        PackedRecords(np.arange(4), np.ones(4), np.array([0, 4]))
    counts = np.ones(4, bool)
    PackedRecords(np.arange(4), counts, np.array([0, 2, 4]))
    assert counts.all(), "the first of a window is no target, but what was given is not touched"


# ---- reading --------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WRITTEN = st.fixed_dictionaries({"text": TEXT}) | st.fixed_dictionaries(
    {"prompt": TEXT, "completion": TEXT}
)


@given(
    st.lists(
        st.tuples(WRITTEN, st.sampled_from([b"", b"\n", b"\r\n", b" \t\n"])), min_size=1, max_size=8
    )
)
def test_what_is_learned_is_the_text_after_the_prompt(place, lines):
    lines = [
        (r, gap)
        for r, gap in lines
        if "".join(r.values())[1:] and (r.get("completion") or r.get("text"))
    ]
    if not lines:
        return
    written(place, *(part for record, gap in lines for part in (record, gap)))
    records = read_records(place, BYTES, 1000)
    assert len(records) == len(lines)
    for found, (record, _) in zip(records, lines, strict=True):
        prompt = record.get("prompt", "").encode()
        whole = prompt + (record.get("completion") or record["text"]).encode()
        assert BYTES.decode_bytes(found.ids) == whole
        assert found.ids.dtype == np.int32
        assert found.learned.tolist() == [i >= max(1, len(prompt)) for i in range(len(whole))]
        assert found.size == pytest.approx(len(whole) - max(1, len(prompt)), rel=1e-12)
    assert bytes_per_token(records) == pytest.approx(1, rel=1e-12)


def test_what_is_longer_is_cut_and_said_once(tmp_path):
    path = written(
        tmp_path, {"text": "x" * 9}, {"text": "short"}, {"prompt": "abc", "completion": "defghijk"}
    )
    with pytest.warns(UserWarning, match="2 of 3 records") as caught:
        records = read_records(path, BYTES, 7)
    (said,) = caught
    assert "2 of 3 records are longer than 8 tokens and lose their ends, 4 of 25 tokens" in str(
        said.message
    )
    assert said.filename == __file__
    assert [BYTES.decode(record.ids) for record in records] == ["x" * 8, "short", "abcdefgh"]
    assert [record.learned.argmax() for record in records] == [1, 1, 3]
    assert bytes_per_token(records) == pytest.approx(1, rel=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_records(path, BYTES, 10)


@pytest.mark.parametrize(
    ("line", "error", "named"),
    [
        (b"{\n", FormatError, "not valid JSON"),
        (b"text\n", FormatError, "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}\n', FormatError, "not valid JSON"),
        (b'["text"]\n', FormatError, "expected a JSON object, found list"),
        (b"null\n", FormatError, "found NoneType"),
        (b'{"text": NaN}\n', FormatError, "not valid JSON"),
        (b'{"text": 1e999}\n', FormatError, "not valid JSON"),
        (b'{"text": "abc", "text": "def"}\n', FormatError, "'text' appears twice"),
        (b'{"text": "\\ud800"}\n', FormatError, "surrogates not allowed"),
        (b'{"text": "\xff"}\n', FormatError, "not valid JSON"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", FormatError, "nested deeper than"),
        (
            b'{"a": [' + b'"",' * 70_000 + b'""]}\n',
            FormatError,
            "more than 65536 lists, objects and texts",
        ),
        (b'\xef\xbb\xbf{"text": "abc"}\n', FormatError, "BOM"),
        (b'{"text": "abc"', FormatError, "not valid JSON"),  # the file ends inside it
        (
            b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}\n',
            DataError,
            "longer than 16,777,216 bytes",
        ),
        (
            b"{}\n",
            DataError,
            "expected 'text', or 'prompt' and 'completion', or 'messages', and no other key, found nothing",
        ),
        ({"Text": "abc"}, DataError, "no other key, found 'Text'"),
        ({"text": "abc", "id": 3}, DataError, "found 'text', 'id'"),
        (
            {"text": "abc", "prompt": "a", "completion": "b"},
            DataError,
            "found 'text', 'prompt', 'completion'",
        ),
        ({"prompt": "abc"}, DataError, "found 'prompt'"),
        ({"completion": "abc"}, DataError, "found 'completion'"),
        ({"\x1b[2J" * 5000: "abc"}, DataError, "no other key"),
        ({"messages": []}, DataError, "'messages' needs a tokenizer.json and its chat template"),
        ({"messages": [], "text": "a"}, DataError, "no other key, found 'messages', 'text'"),
        ({"text": 3}, DataError, "expected 'text' to be a text, found int"),
        ({"text": None}, DataError, "found NoneType"),
        ({"text": ["a", "b"]}, DataError, "found list"),
        (
            {"prompt": "a", "completion": {}},
            DataError,
            "expected 'completion' to be a text, found dict",
        ),
        (
            {"prompt": True, "completion": "a"},
            DataError,
            "expected 'prompt' to be a text, found bool",
        ),
        ({"text": ""}, DataError, "nothing to learn: no token follows its first"),
        ({"text": "a"}, DataError, "nothing to learn: no token follows its first"),
        (
            {"prompt": "", "completion": "a"},
            DataError,
            "nothing to learn: no token follows its first",
        ),
        (
            {"prompt": "abc", "completion": ""},
            DataError,
            "nothing to learn: no token follows the prompt",
        ),
        (
            {"prompt": "x" * 9, "completion": "y"},
            DataError,
            "its first 9 of 10 tokens are prompt, and a context of 8 ends",
        ),
        (
            {"prompt": "x" * 90, "completion": "y"},
            DataError,
            "its first 90 of 91 tokens are prompt",
        ),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, error, named):
    path = written(
        tmp_path,
        {"text": "good"},
        b"\n",
        line,
        {"text": "good"} if not isinstance(line, bytes) else b"",
    )
    with pytest.raises(error) as caught:
        read_records(path, BYTES, 8)
    assert type(caught.value) is error
    assert named in str(caught.value)
    assert "data.jsonl' line 3: " in str(caught.value)
    assert str(caught.value).isprintable()


GOOD = b'{"text": "good \\u00e9"}\n{"prompt": "a", "completion": "b"}\r\n\n{"text": "more"}'


@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 4), st.binary(max_size=4)), max_size=4
    )
)
def test_damage_ends_in_an_error_of_ours_or_in_records(place, damage):
    data = GOOD
    for at, gone, put in damage:
        data = data[:at] + put + data[at + gone :]
    try:
        records = read_records(written(place, data), BYTES, 40)
    except (FormatError, DataError) as error:
        said = str(error)
    else:
        said = ""
        assert all(
            r.learned.any() and not r.learned[0] and len(r.learned) == len(r.ids) <= 41
            for r in records
        )
        assert pack(records, 40).ids.size == sum(len(record.ids) for record in records)
    assert damage or not said
    assert "data.jsonl'" in said or not said


def test_a_file_that_is_no_text_is_refused(tmp_path):
    for nothing in (b"", b"\n \r\n\t"):
        with pytest.raises(DataError, match="has no record"):
            read_records(written(tmp_path, nothing), BYTES, 8)
    with pytest.raises(FormatError, match="not a regular file"):
        read_records(tmp_path, BYTES, 8)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "missing.jsonl", BYTES, 8)
    with pytest.raises(ConfigError, match="context must be 1 or more"):
        read_records(written(tmp_path, LINE), BYTES, 0)


def test_what_is_cut_off_is_not_kept_in_memory(tmp_path):
    size, lines = 1 << 17, 64
    path = written(tmp_path, *[{"text": "x" * size}] * lines)
    tracemalloc.start()
    try:
        with pytest.warns(UserWarning, match="64 of 64"):
            records = read_records(path, BYTES, 16)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(records) == lines
    assert held < size
    # One line and its copies, of 4 bytes a token at most each, not the file's 64.
    assert peak < 16 * size


def test_what_is_held_out_is_the_last_tenth():
    records = [record(np.arange(2), 1, 1.0) for _ in range(21)]
    learnt, kept = split_records(records)
    assert (learnt, kept) == (records[:18], records[18:])
    assert [len(part) for part in split_records(records[:2])] == [1, 1]
    with pytest.raises(
        DataError, match="2 records or more, one to train on and one to hold out, got 1"
    ):
        split_records(records[:1])
    with pytest.raises(ConfigError, match="fraction"):
        split_records(records, 1.0)


def test_records_are_known_by_their_name():
    assert [
        is_records(name)
        for name in ("a.jsonl", "A.JSONL", Path("b.jsonl"), "a.json", "jsonl", "a.jsonl.txt")
    ] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


# ---- a tokenizer with special tokens --------------------------------------------------------------------------------


def hub(folder: Path, template: str = "<s> $A", config: object = None) -> HubTokenizer:
    """Of words and marks, in which `ab` is one token if nothing is between its letters."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "c", "ab"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
    made.add_special_tokens(["<s>", "</s>"])
    if template:
        special = [("<s>", 0), ("</s>", 1)]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "model_max_length": 10**30} if config is None else config
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "tokenizer_config.json").write_bytes(text)
    found = load_tokenizer(folder, 6)
    assert isinstance(found, HubTokenizer)
    return found


@pytest.mark.parametrize(
    ("template", "line", "ids", "first", "size"),
    [
        ("<s> $A", {"text": "abc"}, [0, 5, 4, 1], 1, 3),
        (
            "",
            {"text": "abc"},
            [5, 4, 1],
            1,
            1.5,
        ),  # the first of two tokens is not learned, nor are its bytes counted
        (
            "<s> $A </s>",
            {"text": "abc"},
            [0, 5, 4, 1],
            1,
            3,
        ),  # an end of its own: there is no second
        ("<s> $A", {"prompt": "cc", "completion": "ab"}, [0, 4, 4, 5, 1], 3, 2),
        ("<s> $A </s>", {"prompt": "cc", "completion": "ab"}, [0, 4, 4, 5, 1], 3, 2),
        (
            "<s> $A",
            {"prompt": "ca", "completion": "bc"},
            [0, 4, 5, 4, 1],
            2,
            2,
        ),  # `ab` holds the edge: it is learned
        (
            "<s> $A",
            {"prompt": "c", "completion": ""},
            [0, 4, 1],
            2,
            0,
        ),  # to say nothing is something, too
        ("<s> $A", {"text": ""}, [0, 1], 1, 0),
    ],
)
def test_special_tokens_are_those_of_the_tokenizer(tmp_path, template, line, ids, first, size):
    tokenizer = hub(tmp_path, template)
    good = {"prompt": "a", "completion": "c"}
    records = read_records(written(tmp_path, line, good), tokenizer, 9)
    assert records[0].ids.tolist() == ids
    assert records[0].learned.tolist() == [i >= first for i in range(len(ids))]
    if template != "<s> $A </s>":  # there one token more, which has no bytes, shares them
        assert records[0].size == pytest.approx(size)
    packed = pack(records, 9)
    assert len(packed.edges) == 2
    assert packed.ids.tolist()[: len(ids) + 1] == [*ids, records[1].ids[0]], (
        "the end stands between two records"
    )


def test_a_record_that_was_cut_has_no_end(tmp_path):
    tokenizer = hub(tmp_path)
    with pytest.warns(UserWarning, match="1 of 1 records .* 4 of 8 tokens"):
        (record,) = read_records(written(tmp_path, {"text": "cccccc"}), tokenizer, 3)
    assert record.ids.tolist() == [0, 4, 4, 4]
    assert record.size == pytest.approx(3)
    with pytest.warns(UserWarning, match="1 of 1 records .* 1 of 8 tokens"):
        (record,) = read_records(
            written(tmp_path, {"text": "cccccc"}), tokenizer, 6
        )  # only the end was cut
    assert record.size == pytest.approx(6)


def test_an_end_that_stands_for_no_bytes_cannot_be_measured(tmp_path):
    records = read_records(written(tmp_path, {"prompt": "c", "completion": ""}), hub(tmp_path), 9)
    with pytest.raises(DataError, match="nothing to learn but where they end"):
        bytes_per_token(records)


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        ({"eos_token": "</s>"}, 1),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, 1),
        ({"eos_token": "<nowhere>"}, None),
        ({"eos_token": None}, None),
        ({"eos_token": 1}, None),
        ({"eos_token": {"content": ["</s>"]}}, None),
        ({}, None),
        ([], None),
        (b"{", "tokenizer_config.json"),
        (b"[" * 100_000, "tokenizer_config.json"),
        (b"\xff\xff\xff", "tokenizer_config.json"),
    ],
)
def test_the_end_of_a_text_is_the_tokenizer_s_own(tmp_path, config, eos):
    tokenizer = hub(tmp_path, config=config)
    if isinstance(eos, str):
        with pytest.raises(DataError, match=eos):
            read_records(written(tmp_path, {"text": "abc"}), tokenizer, 9)
    else:
        assert tokenizer.eos == eos
        (record,) = read_records(written(tmp_path, {"text": "abc"}), tokenizer, 9)
        assert record.ids.tolist() == [0, 5, 4] + [1] * (eos is not None)


# ---- conversations --------------------------------------------------------------------------------------------------

USER, TURN = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}


@pytest.fixture
def chat(tmp_path):
    """name of a template: a tokenizer that has it"""
    pytest.importorskip("jinja2")
    return lambda name: load_tokenizer(
        write_tokenizer(tmp_path, (TEMPLATES | {"none": None})[name]), 1000
    )


def test_of_a_conversation_the_assistant_s_turns_are_learned(tmp_path, chat):
    tokenizer = chat("zephyr")
    talk = [USER, TURN, USER, {"role": "assistant", "content": "é"}]
    lines = [
        {"messages": talk},
        {"prompt": "the", "completion": " mat"},
        {"text": "and"},
        {"messages": talk[:2]},
    ]
    records = read_records(written(tmp_path, *lines), tokenizer, 200)
    one = "<|user|>\nthe cat</s>\n<|assistant|>\n"
    assert [tokenizer.decode(record.ids) for record in records] == [
        f"{one}sat on</s>\n{one}é</s>\n",  # as it is: no other end follows
        "the mat</s>",
        "and</s>",
        f"{one}sat on</s>\n",
    ]
    assert [tokenizer.decode(record.ids[record.learned]) for record in records] == [
        "sat on</s>\né</s>\n",
        " mat</s>",
        "d</s>",  # `an` is the first token
        "sat on</s>\n",
    ]
    assert records[0].size == pytest.approx(len("sat on\né\n".encode()))
    packed = pack(records, 200)
    assert packed.ids.tolist() == [i for record in records for i in record.ids.tolist()]
    assert packed.counts.tolist() == [bool(x) for record in records for x in record.learned]


def test_a_conversation_that_is_too_long_loses_its_end(tmp_path, chat):
    tokenizer = chat("zephyr")
    path = written(tmp_path, {"messages": [USER, TURN, USER, TURN]})
    (whole,) = read_records(path, tokenizer, 200)
    first, places = int(whole.learned.argmax()), np.flatnonzero(whole.learned)
    for size in range(first + 1, len(whole.ids)):
        said = f"1 of 1 records are longer than {size} tokens and lose their ends, {len(whole.ids) - size} of"
        with pytest.warns(UserWarning, match=said):
            (record,) = read_records(path, tokenizer, size - 1)
        assert record.ids.tolist() == whole.ids[:size].tolist()
        assert record.learned.tolist() == whole.learned[:size].tolist()
        assert 0 < record.size <= whole.size
    with pytest.raises(
        DataError,
        match=f"line 1: .* its first {places[0]} of {len(whole.ids)} tokens are prompt, and",
    ):
        read_records(path, tokenizer, first - 1)


def test_turns_that_are_not_learned_are_counted(tmp_path, chat):
    thought = {"role": "assistant", "content": "<think>a</think>b"}
    path = written(
        tmp_path, {"messages": [USER, thought, USER, thought]}, {"messages": [USER, TURN]}
    )
    with pytest.warns(
        UserWarning, match="1 of the assistant's turns are not learned: the chat template"
    ) as caught:
        read_records(path, chat("qwen3"), 200)
    (said,) = caught
    assert said.filename == __file__


@pytest.mark.parametrize(
    ("name", "line", "named"),
    [
        (
            "zephyr",
            {"messages": []},
            "expected 'messages' to be a list of messages, found an empty one",
        ),
        (
            "zephyr",
            {"messages": [TURN | {"role": "bot"}]},
            "message 1: expected a role of system, user, assistant",
        ),
        (
            "zephyr",
            {"messages": [USER]},
            "no message is the assistant's, so nothing can be learned",
        ),
        (
            "zephyr",
            {"messages": [USER, TURN], "text": "a"},
            "and no other key, found 'messages', 'text'",
        ),
        (
            "zephyr",
            {"messages": [USER, TURN], "tools": []},
            "and no other key, found 'messages', 'tools'",
        ),
        ("none", {"messages": [USER, TURN]}, "needs a tokenizer.json and its chat template"),
        (
            "llama2",
            {"messages": [USER, USER, TURN]},
            "line 7: the template itself refuses these messages: 'user and",
        ),
    ],
)
def test_a_conversation_that_cannot_be_written_is_named(tmp_path, chat, name, line, named):
    with pytest.raises(DataError) as caught:
        read_records(written(tmp_path, {"text": "the cat"}, line), chat(name), 200)
    assert "data.jsonl' line 2: " in str(caught.value)
    assert re.search(named.replace("line 7", r"line \d+"), str(caught.value))


def test_bytes_have_no_end():
    assert BYTES.eos is None


# ---- training -------------------------------------------------------------------------------------------------------


def sums(count: int = 24) -> list[Record]:
    """Of 8 tokens in a vocabulary of 16; the last three are the first three again."""
    rng, records = np.random.default_rng(2), []
    for _ in range(count):
        word = rng.integers(1, 15, 3)
        records.append(record([*word, 15, 0, *word], 5, 3.0))
    return records


SETTINGS = Settings(steps=6, batch_size=4, context=15, lr=1e-2, warmup=0, save_every=3)


def adapted():
    return get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear"), seed=3)


def test_the_loss_is_that_of_the_tokens_that_count(tmp_path):
    model = get_peft_model(base("float64"), LoraConfig(r=2, target_modules="all-linear"), seed=3)
    packed = pack(sums(6), 15)
    assert np.diff(packed.edges).tolist() == [16, 16, 16]
    rows = packed.ids.reshape(3, 16)
    logits = model(rows[:, :-1].astype(np.int64)).numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    of_target = -np.take_along_axis(log_p, rows[:, 1:, None].astype(np.int64), -1)[..., 0]
    counted = packed.counts.reshape(3, 16)[:, 1:]
    assert counted.sum() == 18
    expected = of_target[counted].mean()
    assert abs(expected - of_target.mean()) > 1e-3, "all tokens alike would give another loss"
    assert evaluate(model, packed, 15) == pytest.approx(expected, rel=1e-13)
    settings = dataclasses.replace(SETTINGS, steps=1, batch_size=3)
    result = train(model, packed, settings, tmp_path / "out", held_out=packed)
    assert result.losses[0] == pytest.approx(expected, rel=1e-13)  # one batch is the epoch
    assert result.evaluations[0][1] == pytest.approx(expected, rel=1e-13)
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text())["tokens"] == 18


@pytest.mark.oracle
def test_a_prompt_is_masked_as_transformers_masks_it(llama):
    import torch

    folder, theirs = llama
    records = [dataclasses.replace(record, ids=record.ids % 13) for record in sums(5)]
    packed = pack(records, 15)
    ids, labels = np.zeros((3, 16), np.int64), np.full((3, 16), -100)
    for row, (start, stop) in enumerate(pairwise(packed.edges.tolist())):
        ids[row, : stop - start] = packed.ids[start:stop]
        labels[row, : stop - start] = np.where(packed.counts, packed.ids, -100)[start:stop]
    assert (labels[2] != -100).sum() == 3, "the last window holds one record, and padding"
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss.item()
    assert evaluate(CausalLM.from_pretrained(folder), packed, 15) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_run_on_records_goes_on_as_if_it_had_not_stopped(tmp_path):
    packed, model = pack(sums(), 15), adapted()
    straight = train(model, packed, SETTINGS, tmp_path / "straight", held_out=packed)
    assert straight.evaluations[-1][1] < straight.evaluations[0][1]
    resumed = adapted()
    again = train(
        resumed,
        packed,
        SETTINGS,
        tmp_path / "b",
        held_out=packed,
        resume=tmp_path / "straight/checkpoints/step-3",
    )
    assert again.losses == straight.losses
    assert bits(resumed) == bits(model)


@pytest.mark.parametrize("change", ["counts", "edges", "plain"])
def test_what_counts_belongs_to_a_run(tmp_path, change):
    packed = pack(sums(), 15)
    train(adapted(), packed, SETTINGS, tmp_path / "out")
    other = {
        "counts": lambda: dataclasses.replace(
            packed, counts=packed.counts | (np.arange(len(packed)) == 3)
        ),
        "edges": lambda: dataclasses.replace(packed, edges=np.array([0, 8, *packed.edges[1:]])),
        "plain": lambda: packed.ids,
    }[change]()
    with pytest.raises(CheckpointError, match=r"belongs to another run: text \("):
        train(adapted(), other, SETTINGS, tmp_path / "out", resume="auto")
    train(adapted(), dataclasses.replace(packed), SETTINGS, tmp_path / "out", resume="auto")


def test_several_tasks_of_records_train_side_by_side(tmp_path):
    packed = {"one": pack(sums(6), 15), "two": pack(sums(8)[6:], 15)}
    model = get_multitask_model(
        base(), dict.fromkeys(packed, LoraConfig(r=2, target_modules="all-linear")), seed=3
    )
    result = train(
        model,
        packed,
        dataclasses.replace(SETTINGS, save_every=None),
        tmp_path / "out",
        held_out=packed,
    )
    assert result.evaluations[-1][1] < result.evaluations[0][1]
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {line["tokens"] for line in lines} == {4 * 6}
