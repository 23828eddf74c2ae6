"""Records: what one may be, where learning begins, and that packing keeps every token once."""

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
from minilora.data.files import MAX_RECORD_BYTES
from minilora.data.records import (
    Record,
    bytes_per_token,
    is_records,
    pack,
    read_records,
    split_records,
)
from minilora.data.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer
from minilora.errors import CheckpointError, ConfigError, DataError, FormatError
from minilora.threads import blocks
from minilora.training import run
from minilora.training.loop import Settings, evaluate, train

BYTES = ByteTokenizer()
LINE = {"prompt": "2+2=", "completion": "4"}


def record(ids: Any, first: int, size: float) -> Record:
    """A record whose tokens from `first` on are learned."""
    return Record(np.array(ids, np.int32), np.arange(len(ids)) >= first, size)


def written(path: Path, *lines: object) -> Path:
    """A file of these lines: bytes as they are, all else as JSON."""
    if path.is_dir():
        path = path / "data.jsonl"
    with path.open("wb") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One file, which Hypothesis writes again and again."""
    return tmp_path_factory.mktemp("records") / "data.jsonl"


# ---- packing -------------------------------------------------------------------------------------


@st.composite
def packings(draw):
    """(records whose tokens are their own numbers, context)"""
    context = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(2, context + 1), min_size=1, max_size=30))
    records = []
    end = 0
    for size in sizes:
        first = draw(st.integers(1, size - 1))
        records.append(record(np.arange(end, end + size), first, size - first))
        end += size
    return records, context


def learned(records: list[Record]) -> list[int]:
    return [i for record in records for i in record.ids[record.learned].tolist()]


@given(packings())
def test_pack_keeps_every_token_once_and_in_order(case):
    records, context = case
    packed = pack(records, context)
    assert packed.ids.tolist() == list(range(len(packed)))
    assert np.flatnonzero(packed.counts).tolist() == learned(records)
    assert np.diff(packed.edges).max() <= context + 1
    sizes = {int(record.ids[0]): len(record.ids) for record in records}
    edges = packed.edges.tolist()
    assert set(edges) <= sizes.keys() | {len(packed)}, "a record is never in two windows"
    for begin, end in pairwise(edges[:-1]):
        assert end - begin + sizes[end] > context + 1, "the next record would have fitted"


@given(packings(), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_windows_of_packed_records_learn_each_token_once_per_epoch(case, batch_size, seed, spare):
    records, context = case
    context += spare  # a window may be shorter than the context allows
    packed = pack(records, context)
    cut = Windows(packed, context, batch_size, seed)
    assert len(cut) == len(packed.edges) - 1
    batches = [cut.batch(step) for step in range(-(-2 * len(cut) // batch_size))]
    all_ids = np.concatenate([batch.ids for batch in batches])
    all_targets = np.concatenate([batch.targets for batch in batches])
    first_keys = np.concatenate([batch.first_key for batch in batches])
    assert first_keys.min() >= 0
    assert (first_keys <= np.arange(context)).all()
    assert all_ids.dtype == all_targets.dtype == np.int64
    edges = packed.edges.tolist()
    for epoch in blocks(2 * len(cut), len(cut)):
        ids = all_ids[epoch]
        targets = all_targets[epoch]
        counted = targets != IGNORE
        assert sorted(targets[counted].tolist()) == learned(records)
        assert np.array_equal(ids[counted], targets[counted] - 1)
        # The first key of each token is the first token of its own record.
        starts = packed.starts.tolist()
        for batch_ids, batch_keys in zip(ids, first_keys[epoch], strict=True):
            for token, first_key in zip(batch_ids.tolist(), batch_keys.tolist(), strict=True):
                if token:
                    begin = max(start for start in starts if start <= token)
                    assert first_key == batch_ids.tolist().index(begin)
        # A row is a whole window but its last token, then zeros.
        for row in ids.tolist():
            window = edges.index(row[0])
            inside = list(range(row[0], edges[window + 1] - 1))
            assert row == inside + [0] * (context - len(inside))
    for step in range(2):
        assert cut.epoch(step) == step * batch_size // len(cut)
    batches = list(evaluation_windows(packed, context, batch_size))
    targets = np.concatenate([batch.targets for batch in batches])
    assert targets[targets != IGNORE].tolist() == learned(records)
    assert sum(batch.tokens for batch in batches) == int(packed.counts.sum())
    limited = evaluation_windows(packed, context, batch_size, limit=2)
    some = np.concatenate([batch.ids for batch in limited])
    assert len(some) == min(2, len(cut))
    assert set(some[:, 0].tolist()) <= set(edges[:-1])


def test_windows_of_packed_records_have_another_order_in_each_epoch():
    packed = pack([record(np.full(4, i), 1, 3) for i in range(20)], 3)
    orders = set()
    for seed in range(3):
        cut = Windows(packed, 3, 20, seed)
        orders |= {tuple(cut.batch(epoch).ids[:, 0].tolist()) for epoch in range(5)}
    assert len(orders) == 15
    again = [Windows(packed, 3, 20, 0).batch(4).ids.tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_windows_of_packed_records_never_have_the_first_token_of_a_record_for_a_target():
    counts = np.ones(6, bool)
    packed = PackedRecords(np.arange(6), counts, np.array([0, 6]), np.array([0, 2, 3]))
    batch = packed.windows(np.array([0]), 7)
    assert batch.targets.tolist() == [[1, IGNORE, IGNORE, 4, 5, IGNORE, IGNORE]]
    assert batch.first_key.tolist() == [[0, 0, 2, 3, 3, 3, 3]]
    two = dataclasses.replace(packed, edges=np.array([0, 3, 6]), starts=np.array([0, 2, 3]))
    message = "padding sees the last record of its own window"
    assert two.windows(np.array([0]), 5).first_key.tolist() == [[0, 0, 2, 2, 2]], message


def test_task_windows_takes_packed_records():
    packed = pack([record(np.arange(4) + 10 * i, 2, 2) for i in range(5)], 3)
    texts = {"plain": np.arange(100, 150), "records": packed}
    batch = TaskWindows(texts, 3, 6, seed=1).batch(2)
    rows = [b for b, task in enumerate(batch.tasks) if task == "records"]
    alone = Windows(packed, 3, 3, seed=1).batch(2)
    assert batch.targets[rows].tolist() == alone.targets.tolist()
    assert batch.first_key[rows].tolist() == alone.first_key.tolist()
    others = [b for b, task in enumerate(batch.tasks) if task == "plain"]
    assert not batch.first_key[others].any(), "a plain text sees all before"
    assert (batch.targets[rows] != IGNORE).sum() == 2 * len(rows)


def test_pack_refuses_records_that_do_not_fit_a_window():
    long = record(np.arange(5), 1, 4)
    with pytest.raises(DataError, match="at most 4 tokens, got 5"):
        pack([long], 3)
    with pytest.raises(DataError, match="got none"):
        pack([], 3)
    with pytest.raises(DataError, match="up to 5 tokens: context must be 4 or more"):
        Windows(pack([long], 4), 3, 2)
    with pytest.raises(DataError, match="up to 5 tokens: context must be 4 or more"):
        evaluation_windows(pack([long], 4), 3, 2)


UNSOUND: list[tuple[object, ...]] = []


def unsound(counts: list[int], edges: object, message: str) -> None:
    UNSOUND.append((counts, edges, message))


unsound([1, 1, 1], [0, 4], "a bool for each")
unsound([1, 1, 1, 1], [0], "at least one window")
unsound([1, 1, 1, 1], [[0, 4]], "at least one window")
unsound([1, 1, 1, 1], [0, 3], "rise from 0 to 4")
unsound([1, 1, 1, 1], [1, 4], "rise from 0 to 4")
unsound([1, 1, 1, 1], [0, 2, 2, 4], "rise from 0 to 4")
# Only the first token of the second window counts, which is not a target.
unsound([0, 1, 1, 0], [0, 2, 4], "no token counts")
unsound([0, 0, 0, 1], [0, 2, 4], "no token counts")


@pytest.mark.parametrize(("counts", "edges", "named"), UNSOUND)
def test_packed_records_refuses_unsound_arrays(counts, edges, named):
    with pytest.raises(DataError, match=named):
        PackedRecords(np.arange(4), np.array(counts, bool), np.array(edges), np.array([0, 2]))
    with pytest.raises(DataError, match="a bool for each"):
        PackedRecords(np.arange(4), np.ones(4), np.array([0, 4]), np.array([0]))
    counts = np.ones(4, bool)
    PackedRecords(np.arange(4), counts, np.array([0, 2, 4]), np.array([0, 2]))
    assert counts.all(), "the first token of a window is not a target, but the input is only read"


@pytest.mark.parametrize("starts", [[0, 1, 3], [0, 2, 2], [2, 0], [0, 2, 4], [[0, 2]], [2], []])
def test_packed_records_refuses_starts_that_are_not_those_of_records(starts):
    with pytest.raises(DataError, match="starts of the records must rise, begin each window"):
        PackedRecords(np.arange(4), np.ones(4, bool), np.array([0, 2, 4]), np.array(starts, int))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
def test_packed_records_takes_every_dtype_of_integers(dtype):
    counts = np.ones(6, bool)
    edges, starts = np.array([0, 3, 6], dtype), np.array([0, 1, 3], dtype)
    packed = PackedRecords(np.arange(6), counts, edges, starts)
    [batch] = evaluation_windows(packed, 3, 2)
    np.testing.assert_array_equal(batch.first_key, [[0, 1, 1], [0, 0, 0]])
    # In unsigned integers every difference is positive.
    with pytest.raises(DataError, match="rise from 0 to 6"):
        PackedRecords(np.arange(6), counts, np.array([0, 4, 3, 6], dtype), starts)
    with pytest.raises(DataError, match="must rise, begin each window"):
        PackedRecords(np.arange(6), counts, edges, starts[[0, 2, 1]])
    for name, wrong in (("edges", (edges * 1.0, starts)), ("starts", (edges, starts > 0))):
        with pytest.raises(DataError, match=f"^{name} must be integers, got"):
            PackedRecords(np.arange(6), counts, *wrong)


# ---- reading -------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WRITTEN = st.fixed_dictionaries({"text": TEXT}) | st.fixed_dictionaries(
    {"prompt": TEXT, "completion": TEXT}
)


GAPS = st.sampled_from([b"", b"\n", b"\r\n", b" \t\n"])


@given(st.lists(st.tuples(WRITTEN, GAPS), min_size=1, max_size=8))
def test_read_records_learns_the_text_after_the_prompt(place, lines):
    parts = []
    expected = []
    for fields, gap in lines:
        prompt = fields.get("prompt", "").encode()
        text = (fields.get("completion") or fields.get("text") or "").encode()
        if text and len((prompt + text).decode()) > 1:
            parts += [fields, gap]
            expected.append((prompt + text, max(1, len(prompt))))
    if not expected:
        return
    records = read_records(written(place, *parts), BYTES, 1000)
    for record, (whole, first) in zip(records, expected, strict=True):
        assert BYTES.decode_bytes(record.ids) == whole
        assert record.ids.dtype == np.int32
        assert record.learned.tolist() == [i >= first for i in range(len(whole))]
        assert record.size == pytest.approx(len(whole) - first, rel=1e-12)
    assert bytes_per_token(records) == pytest.approx(1, rel=1e-12)


def test_read_records_cuts_long_records_and_warns_once(tmp_path):
    pair = {"prompt": "abc", "completion": "defghijk"}
    path = written(tmp_path, {"text": "x" * 9}, {"text": "short"}, pair)
    with pytest.warns(UserWarning, match="2 of 3 records") as caught:
        records = read_records(path, BYTES, 7)
    (warning,) = caught
    text = "2 of 3 records are longer than 8 tokens and lose their ends, 4 of 25 tokens"
    assert text in str(warning.message)
    assert warning.filename == __file__
    assert [BYTES.decode(record.ids) for record in records] == ["x" * 8, "short", "abcdefgh"]
    assert [record.learned.argmax() for record in records] == [1, 1, 3]
    assert bytes_per_token(records) == pytest.approx(1, rel=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_records(path, BYTES, 10)


BAD_LINES: list[tuple[object, type[Exception], str]] = []


def not_json(line: bytes, message: str) -> None:
    BAD_LINES.append((line, FormatError, message))


def bad_line(line: object, message: str) -> None:
    BAD_LINES.append((line, DataError, message))


def bad_pair(prompt: object, completion: object, message: str) -> None:
    bad_line({"prompt": prompt, "completion": completion}, message)


not_json(b"{\n", "not valid JSON")
not_json(b"text\n", "not valid JSON")
not_json(b'{"text": "a"} {"text": "b"}\n', "not valid JSON")
not_json(b'["text"]\n', "expected a JSON object, found list")
not_json(b"null\n", "found NoneType")
not_json(b'{"text": NaN}\n', "not valid JSON")
not_json(b'{"text": 1e999}\n', "not valid JSON")
not_json(b'{"text": "abc", "text": "def"}\n', "'text' appears twice")
not_json(b'{"text": "\\ud800"}\n', "surrogates not allowed")
not_json(b'{"text": "\xff"}\n', "not valid JSON")
not_json(b'{"text": ' + b"[" * 100_000 + b"\n", "nested deeper than")
MANY = b'{"a": [' + b'"",' * 70_000 + b'""]}\n'
not_json(MANY, "more than 65536 lists, objects and texts")
not_json(b'\xef\xbb\xbf{"text": "abc"}\n', "BOM")
not_json(b'{"text": "abc"', "not valid JSON")  # the file ends inside it
bad_line(b'{"text": "' + b"x" * MAX_RECORD_BYTES + b'"}\n', "longer than 16,777,216 bytes")
KEYS = "expected the fields messages, or conversations, or prompt + completion, or instruction"
bad_line(b"{}\n", KEYS)
bad_line(b"{}\n", "or text; found nothing")
bad_line({"Text": "abc"}, "; found 'Text'")
bad_line({"prompt": "abc"}, "; found 'prompt'")
bad_line({"completion": "abc"}, "; found 'completion'")
bad_line({"\x1b[2J" * 5000: "abc"}, "; found '\\x1b[2J")
TALK = {"messages": [{"role": "assistant", "content": "a"}]}
bad_line(TALK, "a list of messages needs a tokenizer.json and its chat template")
bad_line({"text": 3}, "expected 'text' to be a text, found int")
bad_line({"text": ["a", "b"]}, "found list")
not_json(b'{"text": "abc"}\0\0\n', "byte 16 is NUL: the file is damaged")
bad_pair("a", {}, "expected 'completion' to be a text, found dict")
bad_pair(True, "a", "expected 'prompt' to be a text, found bool")


@pytest.mark.parametrize(("line", "error", "named"), BAD_LINES)
def test_read_records_names_a_bad_line(tmp_path, line, error, named):
    last = b"" if isinstance(line, bytes) else {"text": "good"}
    path = written(tmp_path, {"text": "good"}, b"\n", line, last)
    with pytest.raises(error) as caught:
        read_records(path, BYTES, 8)
    assert type(caught.value) is error
    assert named in str(caught.value)
    assert "data.jsonl' line 3: " in str(caught.value)
    assert str(caught.value).isprintable()


EMPTY: list[tuple[object, str]] = []


def empty(line: object, message: str) -> None:
    EMPTY.append((line, message))


empty({"text": ""}, "nothing to learn: it is empty")
empty({"prompt": "", "completion": ""}, "nothing to learn: it is empty")
empty({"messages": [{"role": "assistant", "content": None}]}, "'content' to be a text, found None")
empty({"text": "a"}, "nothing to learn: no token follows its first")
empty({"prompt": "", "completion": "a"}, "nothing to learn: no token follows its first")
empty({"prompt": "abc", "completion": ""}, "nothing to learn: no token follows the prompt")
IS_PROMPT = "tokens are prompt, and a context of 8 ends before the rest"
empty({"prompt": "x" * 9, "completion": "y"}, f"its first 9 of 10 {IS_PROMPT}")
empty({"prompt": "x" * 90, "completion": "y"}, f"its first 90 of 91 {IS_PROMPT}")
empty({"text": None}, "nothing to learn: 'text' is null")
empty({"instruction": "a", "output": None}, "nothing to learn: 'output' is null")
empty({"messages": []}, "expected 'messages' to be a list of messages, found an empty one")
empty({"conversations": []}, "expected 'conversations' to be a list of messages, found an")
empty({"messages": [{"role": "user", "content": "a"}]}, "no message is the assistant's")


@pytest.mark.parametrize(("line", "reason"), EMPTY)
def test_read_records_skips_what_has_nothing_to_learn_and_counts_it(tmp_path, line, reason):
    good = {"text": "good"}
    path = written(tmp_path, good, b"\n", line, good, {"text": ""})
    with pytest.warns(UserWarning, match="2 of 4 records are skipped, the first at line 3") as told:
        records = read_records(path, BYTES, 8)
    (warning,) = told
    assert reason in str(warning.message)
    assert warning.filename == __file__
    alone = read_records(written(tmp_path, good, good), BYTES, 8)
    assert [r.ids.tolist() for r in records] == [r.ids.tolist() for r in alone]
    with pytest.raises(DataError, match=r"data.jsonl' line 3: ") as caught:
        read_records(written(tmp_path, good, b"\n", line), BYTES, 8, strict=True)
    assert reason in str(caught.value)
    with pytest.raises(DataError, match="no record to train on: all 2 are skipped, the first at"):
        read_records(written(tmp_path, line, {"text": ""}), BYTES, 8)


def test_read_records_that_is_strict_refuses_to_cut(tmp_path):
    path = written(tmp_path, {"text": "x" * 9}, {"text": "x" * 10})
    message = "line 2: 10 tokens, at most 9 fit into a context of 8: shorten it or give a larger"
    with pytest.raises(DataError, match=message):
        read_records(path, BYTES, 8, strict=True)
    assert len(read_records(path, BYTES, 9, strict=True)) == 2


def test_read_records_tells_unused_columns_once(tmp_path):
    lines = [{"text": "abc", "id": 1, "n": None}, {"text": "abc", "id": 2, "x\x1b": []}]
    with pytest.warns(UserWarning, match="columns that are not used") as told:
        records = read_records(written(tmp_path, *lines), BYTES, 8)
    (warning,) = told
    assert str(warning.message).endswith(r"have them): 'id' (2), 'x\x1b' (1)")
    assert [BYTES.decode(record.ids) for record in records] == ["abc", "abc"]
    many = [{"text": "abc", f"column {i}": i} for i in range(300)]
    with pytest.warns(UserWarning, match=r"'column 0' \(1\), .*'column 4' \(1\), \.\.\.$"):
        read_records(written(tmp_path, *many), BYTES, 8)


def test_read_records_of_an_instruction_is_alpaca_without_a_chat_template(tmp_path):
    fields = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    path = written(tmp_path, fields, {"question": "2 + 2?", "answer": "4"})
    with_input, without = read_records(path, BYTES, 1000)
    assert BYTES.decode(with_input.ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3"
    )
    assert BYTES.decode(with_input.ids[with_input.learned]) == "3"
    assert BYTES.decode(without.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n2 + 2?\n\n### Response:\n4"
    )
    assert BYTES.decode(without.ids[without.learned]) == "4"


GOOD = b'{"text": "good \\u00e9"}\n{"prompt": "a", "completion": "b"}\r\n\n{"text": "more"}'


DAMAGE = st.tuples(st.integers(0, len(GOOD)), st.integers(0, 4), st.binary(max_size=4))


@given(st.lists(DAMAGE, max_size=4))
def test_read_records_of_a_damaged_file_raises_or_gives_records(place, damage):
    data = GOOD
    for start, removed, inserted in damage:
        data = data[:start] + inserted + data[start + removed :]
    try:
        records = read_records(written(place, data), BYTES, 40)
    except (FormatError, DataError) as error:
        message = str(error)
        assert damage
        assert "data.jsonl'" in message
        return
    for record in records:
        assert record.learned.any()
        assert not record.learned[0]
        assert len(record.learned) == len(record.ids) <= 41
    assert pack(records, 40).ids.size == sum(len(record.ids) for record in records)


def test_read_records_refuses_files_without_records(tmp_path):
    for nothing in (b"", b"\n \r\n\t"):
        with pytest.raises(DataError, match="has no record to train on"):
            read_records(written(tmp_path, nothing), BYTES, 8)
    with pytest.raises(FormatError, match="not a regular file"):
        read_records(tmp_path, BYTES, 8)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "missing.jsonl", BYTES, 8)
    with pytest.raises(ConfigError, match="context must be 1 or more"):
        read_records(written(tmp_path, LINE), BYTES, 0)


def test_read_records_frees_what_it_cuts_off(tmp_path):
    size, lines = 1 << 17, 64
    path = written(tmp_path, *[{"text": "x" * size}] * lines)
    tracemalloc.start()
    try:
        with pytest.warns(UserWarning, match="64 of 64"):
            records = read_records(path, BYTES, 16)
        remaining, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(records) == lines
    assert remaining < size
    # One line and its copies, of 4 bytes per token at most each, not the file's 64 lines.
    assert peak < 16 * size


def test_split_records_holds_out_the_last_tenth():
    records = [record(np.arange(2), 1, 1.0) for _ in range(21)]
    assert split_records(records) == (records[:18], records[18:])
    assert [len(part) for part in split_records(records[:2])] == [1, 1]
    message = "2 records or more, one to train on and one to hold out, got 1"
    with pytest.raises(DataError, match=message):
        split_records(records[:1])
    with pytest.raises(ConfigError, match="fraction"):
        split_records(records, 1.0)


def test_is_records_looks_at_the_content(tmp_path):
    for name in ("a.jsonl", "b.json", "c.txt"):
        assert is_records(written(tmp_path / name, LINE))
    (tmp_path / "d.txt").write_text("[a](b)\n")
    assert not is_records(tmp_path / "d.txt")
    with pytest.raises(FormatError, match="line 1: not valid JSON"):
        is_records(written(tmp_path / "a.jsonl", b"text\n"))


# ---- a tokenizer with special tokens -------------------------------------------------------------


def hub(folder: Path, template: str = "<s> $A", config: object = None) -> HubTokenizer:
    """A tokenizer of words and marks, in which `ab` is one token if it is written together."""
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
    if config is None:
        config = {"eos_token": "</s>", "model_max_length": 10**30}
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "tokenizer_config.json").write_bytes(text)
    tokenizer = load_tokenizer(folder, 6)
    assert isinstance(tokenizer, HubTokenizer)
    return tokenizer


ENCODED: list[tuple[object, ...]] = []


def encoded(template: str, line: object, ids: list[int], first: int, size: float) -> None:
    ENCODED.append((template, line, ids, first, size))


encoded("<s> $A", {"text": "abc"}, [0, 5, 4, 1], 1, 3)
# The first of two tokens is not learned, nor are its bytes counted.
encoded("", {"text": "abc"}, [5, 4, 1], 1, 1.5)
# The tokenizer adds an end itself: no second one follows.
encoded("<s> $A </s>", {"text": "abc"}, [0, 5, 4, 1], 1, 3)
encoded("<s> $A", {"prompt": "cc", "completion": "ab"}, [0, 4, 4, 5, 1], 3, 2)
encoded("<s> $A </s>", {"prompt": "cc", "completion": "ab"}, [0, 4, 4, 5, 1], 3, 2)
# `ab` is at the edge: it is learned.
encoded("<s> $A", {"prompt": "ca", "completion": "bc"}, [0, 4, 5, 4, 1], 2, 2)
# To say nothing is something, too.
encoded("<s> $A", {"prompt": "c", "completion": ""}, [0, 4, 1], 2, 0)


@pytest.mark.parametrize(("template", "line", "ids", "first", "size"), ENCODED)
def test_read_records_adds_the_tokenizer_s_special_tokens(
    tmp_path, template, line, ids, first, size
):
    tokenizer = hub(tmp_path, template)
    good = {"prompt": "a", "completion": "c"}
    records = read_records(written(tmp_path, line, good), tokenizer, 9)
    assert records[0].ids.tolist() == ids
    assert records[0].learned.tolist() == [i >= first for i in range(len(ids))]
    assert records[0].size == pytest.approx(size)
    packed = pack(records, 9)
    assert len(packed.edges) == 2
    beginning = packed.ids.tolist()[: len(ids) + 1]
    assert beginning == [*ids, records[1].ids[0]], "the end token is between two records"


def test_read_records_cuts_off_the_end_token(tmp_path):
    tokenizer = hub(tmp_path)
    path = written(tmp_path, {"text": "cccccc"})
    with pytest.warns(UserWarning, match="1 of 1 records .* 4 of 8 tokens"):
        (record,) = read_records(path, tokenizer, 3)
    assert record.ids.tolist() == [0, 4, 4, 4]
    assert record.size == pytest.approx(3)
    # Only the end is cut.
    with pytest.warns(UserWarning, match="1 of 1 records .* 1 of 8 tokens"):
        (record,) = read_records(path, tokenizer, 6)
    assert record.size == pytest.approx(6)


def test_bytes_per_token_refuses_records_without_bytes(tmp_path):
    records = read_records(written(tmp_path, {"prompt": "c", "completion": ""}), hub(tmp_path), 9)
    with pytest.raises(DataError, match="nothing to learn but where they end"):
        bytes_per_token(records)


ENDS: list[tuple[object, object]] = []


def ends(config: object, eos: object) -> None:
    ENDS.append((config, eos))


ends({"eos_token": "</s>"}, 1)
ends({"eos_token": {"content": "</s>", "lstrip": False}}, 1)
ends({"eos_token": "<nowhere>"}, None)
ends({"eos_token": None}, None)
ends({}, None)
ends([], None)
ends({"eos_token": 1}, "eos_token must be a text")
ends({"eos_token": {"content": ["</s>"]}}, "eos_token must be a text")
ends(b"{", "tokenizer_config.json")
ends(b"[" * 100_000, "tokenizer_config.json")
ends(b"\xff\xff\xff", "tokenizer_config.json")


@pytest.mark.parametrize(("config", "eos"), ENDS)
def test_read_records_ends_each_with_the_token_of_tokenizer_config(tmp_path, config, eos):
    if isinstance(eos, str):
        with pytest.raises((DataError, FormatError), match=eos):
            hub(tmp_path, config=config)
        return
    tokenizer = hub(tmp_path, config=config)
    path = written(tmp_path, {"text": "abc"})
    if eos is None:
        with pytest.warns(UserWarning, match="no token that ends a text"):
            (record,) = read_records(path, tokenizer, 9)
    else:
        (record,) = read_records(path, tokenizer, 9)
    assert record.ids.tolist() == [0, 5, 4] + [1] * (eos is not None)


def test_read_records_skips_an_empty_text_though_a_bos_and_an_end_surround_it(tmp_path):
    path = written(tmp_path, {"text": ""}, {"text": "abc"}, {"prompt": "", "completion": ""})
    with pytest.warns(UserWarning, match="2 of 3 records are skipped, the first at line 1"):
        (record,) = read_records(path, hub(tmp_path, "<s> $A"), 9)
    assert record.ids.tolist() == [0, 5, 4, 1]


def test_read_records_ends_each_with_the_first_of_several(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    tokenizer = hub(tmp_path, config={})
    path = written(tmp_path, {"text": "ac"}, {"text": "ab</s>"})
    first, second = read_records(path, tokenizer, 9)
    assert first.ids.tolist() == [0, 2, 4, 3]
    assert second.ids.tolist() == [0, 5, 1], "which ends a text already"


def test_read_records_puts_one_bos_before_a_text_that_has_one(tmp_path):
    tokenizer = hub(tmp_path)
    (record,) = read_records(written(tmp_path, {"text": "<s>abc"}), tokenizer, 9)
    assert record.ids.tolist() == [0, 5, 4, 1]


# ---- conversations -------------------------------------------------------------------------------

USER, TURN = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}


@pytest.fixture
def chat(tmp_path):
    """A function of a template's name: a tokenizer that has this template."""
    pytest.importorskip("jinja2")
    return lambda name: load_tokenizer(write_tokenizer(tmp_path, TEMPLATES.get(name)), 1000)


def test_read_records_learns_the_assistant_s_turns(tmp_path, chat):
    tokenizer = chat("zephyr")
    talk = [USER, TURN, USER, {"role": "assistant", "content": "é"}]
    pair = {"prompt": "the", "completion": " mat"}
    path = written(tmp_path, {"messages": talk}, pair, {"text": "and"}, {"messages": talk[:2]})
    records = read_records(path, tokenizer, 200)
    one = "<|user|>\nthe cat</s>\n<|assistant|>\n"
    assert [tokenizer.decode(record.ids) for record in records] == [
        f"{one}sat on</s>\n{one}é</s>\n",  # no other end follows
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
    assert np.array_equal(packed.ids, np.concatenate([record.ids for record in records]))
    assert np.array_equal(packed.counts, np.concatenate([record.learned for record in records]))


def test_read_records_cuts_a_long_conversation(tmp_path, chat):
    tokenizer = chat("zephyr")
    path = written(tmp_path, {"messages": [USER, TURN, USER, TURN]})
    (whole,) = read_records(path, tokenizer, 200)
    first = int(whole.learned.argmax())
    count = len(whole.ids)
    for size in range(first + 1, count):
        lost = f"longer than {size} tokens and lose their ends, {count - size} of"
        with pytest.warns(UserWarning, match=f"1 of 1 records are {lost}"):
            (record,) = read_records(path, tokenizer, size - 1)
        assert record.ids.tolist() == whole.ids[:size].tolist()
        assert record.learned.tolist() == whole.learned[:size].tolist()
        assert 0 < record.size <= whole.size
    message = f"skipped, the first at line 1 .* its first {first} of {count} tokens are prompt, and"
    with pytest.raises(DataError, match=message):
        read_records(path, tokenizer, first - 1)


def test_read_records_counts_turns_that_are_not_learned(tmp_path, chat):
    thought = {"role": "assistant", "content": "<think>a</think>b"}
    talk = [USER, thought, USER, thought]
    path = written(tmp_path, {"messages": talk}, {"messages": [USER, TURN]})
    message = "1 of the assistant's turns are not learned: the chat template"
    with pytest.warns(UserWarning, match=message) as caught:
        read_records(path, chat("qwen3"), 200)
    (warning,) = caught
    assert warning.filename == __file__


def test_read_records_learns_a_turn_that_a_question_follows(tmp_path, chat):
    """Qwen3's template writes no thoughts in it, unless it ends the conversation."""
    tokenizer = chat("qwen3")
    path = written(tmp_path, {"messages": [USER, TURN, USER]}, {"messages": [USER, TURN]})
    records = read_records(path, tokenizer, 200)
    assert records[0].ids.tolist() == records[1].ids.tolist()
    assert tokenizer.decode(records[0].ids[records[0].learned]).startswith("<think>")


def test_read_records_skips_a_conversation_that_the_template_does_not_separate(tmp_path):
    """The generation prompt begins with a thought, as DeepSeek's, and the first turn has none."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template), 1000)
    thought = {"role": "assistant", "content": "<think>b</think>c"}
    path = written(tmp_path, {"messages": [USER, TURN]}, {"messages": [USER, thought]})
    with pytest.warns(UserWarning, match="1 of 2 records are skipped, .*no turn can be told apart"):
        (record,) = read_records(path, tokenizer, 200)
    assert tokenizer.decode(record.ids[record.learned]) == "b</think>c"
    with pytest.raises(DataError, match=r"line 1: .*no turn can be told apart"):
        read_records(path, tokenizer, 200, strict=True)


BAD_TALKS: list[tuple[str, object, str]] = []


def bad_talk(template: str, messages: object, message: str, **more: object) -> None:
    BAD_TALKS.append((template, {"messages": messages, **more}, message))


bad_talk("zephyr", 3, "expected 'messages' to be a list of messages, found int")
BOT = {"role": "bot", "content": "sat on"}
bad_talk("zephyr", [BOT], "message 1: expected a role of system, user, assistant")
bad_talk("zephyr", [USER, TURN], "to be a list of objects, or its JSON, found '3'", tools=3)
bad_talk("none", [USER, TURN], "needs a tokenizer.json and its chat template")
REFUSED = r"line \d+: the template itself refuses these messages: 'user and"
bad_talk("llama2", [USER, USER, TURN], REFUSED)


@pytest.mark.parametrize(("name", "line", "named"), BAD_TALKS)
def test_read_records_names_a_bad_conversation(tmp_path, chat, name, line, named):
    with pytest.raises(DataError) as caught:
        read_records(written(tmp_path, {"text": "the cat"}, line), chat(name), 200)
    assert "data.jsonl' line 2: " in str(caught.value)
    assert re.search(named, str(caught.value))


def test_eos_of_bytes_is_empty():
    assert BYTES.special.eos == ()


# ---- training ------------------------------------------------------------------------------------


def sums(count: int = 24) -> list[Record]:
    """Records of 8 tokens in a vocabulary of 16; the last three are the first three again."""
    rng = np.random.default_rng(2)
    records = []
    for _ in range(count):
        word = rng.integers(1, 15, 3)
        records.append(record([*word, 15, 0, *word], 5, 3.0))
    return records


SETTINGS = Settings(steps=6, batch_size=4, context=15, lr=1e-2, warmup=0, save_every=3)


CONFIG = LoraConfig(r=2, target_modules="all-linear")


def adapted(*dtype: str):
    return get_peft_model(base(*dtype), CONFIG, seed=3)


def test_train_and_evaluate_average_over_the_tokens_that_count(tmp_path):
    model = adapted("float64")
    packed = pack(sums(6), 15)
    assert np.diff(packed.edges).tolist() == [16, 16, 16]
    rows = packed.ids.reshape(6, 8).astype(np.int64)  # a record each
    logits = model(rows[:, :-1]).numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    of_target = -np.take_along_axis(log_p, rows[:, 1:, None], -1)[..., 0]
    counted = packed.counts.reshape(6, 8)[:, 1:]
    assert counted.sum() == 18
    expected = of_target[counted].mean()
    assert abs(expected - of_target.mean()) > 1e-3, "all tokens together have another loss"
    assert evaluate(model, packed, 15) == pytest.approx(expected, rel=1e-13)
    settings = dataclasses.replace(SETTINGS, steps=1, batch_size=3)
    result = train(model, packed, settings, tmp_path / "out", held_out=packed)
    assert result.losses[0] == pytest.approx(expected, rel=1e-13)  # one batch is the epoch
    assert result.evaluations[0][1] == pytest.approx(expected, rel=1e-13)
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text())["tokens"] == 18


@pytest.mark.oracle
def test_evaluate_masks_a_prompt_as_transformers_does(llama):
    import torch

    folder, theirs = llama
    records = [dataclasses.replace(record, ids=record.ids % 13) for record in sums(5)]
    packed = pack(records, 15)
    ids = packed.ids.reshape(5, 8).astype(np.int64)
    labels = np.where(packed.counts, packed.ids, -100).reshape(5, 8).astype(np.int64)
    assert len(packed.edges) == 4, "two windows of two records, one of one and padding"
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss.item()
    model = CausalLM.from_pretrained(folder)
    assert evaluate(model, packed, 15) == pytest.approx(expected, rel=1e-5)


def test_train_on_records_resumes_bit_for_bit(tmp_path):
    packed, model = pack(sums(), 15), adapted()
    straight = train(model, packed, SETTINGS, tmp_path / "straight", held_out=packed)
    assert straight.evaluations[-1][1] < straight.evaluations[0][1]
    resumed = adapted()
    step = tmp_path / "straight/checkpoints/step-3"
    again = train(resumed, packed, SETTINGS, tmp_path / "b", held_out=packed, resume=step)
    assert again.losses == straight.losses
    assert bits(resumed) == bits(model)


@pytest.mark.parametrize("change", ["counts", "edges", "plain"])
def test_train_refuses_to_resume_with_other_targets(tmp_path, change):
    packed = pack(sums(), 15)
    train(adapted(), packed, SETTINGS, tmp_path / "out")
    other = packed.ids
    if change == "counts":
        counts = packed.counts.copy()
        counts[3] = True
        other = dataclasses.replace(packed, counts=counts)
    if change == "edges":
        other = dataclasses.replace(packed, edges=np.array([0, 8, *packed.edges[1:]]))
    with pytest.raises(CheckpointError, match=r"belongs to another run: text \("):
        train(adapted(), other, SETTINGS, tmp_path / "out", resume="auto")
    train(adapted(), dataclasses.replace(packed), SETTINGS, tmp_path / "out", resume="auto")


def test_train_refuses_to_resume_records_that_were_packed_in_another_form(tmp_path, monkeypatch):
    packed = pack(sums(), 15)
    with monkeypatch.context() as earlier:
        earlier.setattr(run, "PACKING", "records see each other")
        train(adapted(), packed, SETTINGS, tmp_path / "out")
    message = r"packing \(was 'records see each other', now 'records do not see"
    with pytest.raises(CheckpointError, match=message):
        train(adapted(), packed, SETTINGS, tmp_path / "out", resume="auto")


def test_train_takes_several_tasks_of_records(tmp_path):
    packed = {"one": pack(sums(6), 15), "two": pack(sums(8)[6:], 15)}
    model = get_multitask_model(base(), dict.fromkeys(packed, CONFIG), seed=3)
    settings = dataclasses.replace(SETTINGS, save_every=None)
    result = train(model, packed, settings, tmp_path / "out", held_out=packed)
    assert result.evaluations[-1][1] < result.evaluations[0][1]
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {line["tokens"] for line in lines} == {4 * 6}
