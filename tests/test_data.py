"""minilora/data.py: tokenizers against the packages that will read their files, batches against their promises."""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import data
from minilora.backend import NUMPY
from minilora.errors import ConfigError, DataError, FormatError

GOLDEN = Path(__file__).parent / "golden"


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_of_a_text_come_back(text):
    tokenizer = data.ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.binary())
def test_any_bytes_come_back(raw):
    tokenizer = data.ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw
    assert tokenizer.decode(tokenizer.encode(raw)) == raw.decode("utf-8", "replace")
    argument = raw.decode("utf-8", "surrogateescape")  # as sys.argv holds it
    assert tokenizer.decode_bytes(tokenizer.encode(argument)) == raw
    assert tokenizer.decode(tokenizer.encode(argument), errors="surrogateescape") == argument


def test_half_of_a_surrogate_pair_has_no_bytes():
    with pytest.raises(DataError, match="character 2 "):
        data.ByteTokenizer().encode("ab\ud83d")


@given(st.lists(st.integers(-5, 600)))
def test_an_id_that_is_no_byte_is_a_replacement_character(ids):
    pieces = [bytes([i]) if 0 <= i < 256 else "\ufffd".encode() for i in ids]
    assert data.ByteTokenizer().decode(np.array(ids, int)) == b"".join(pieces).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    data.ByteTokenizer().save(directory)
    return directory


def test_the_tokenizers_package_gives_the_same_ids(saved):
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert theirs.get_vocab_size() == 256
    ours = data.ByteTokenizer()

    @given(st.text())
    def same(text):
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text

    same()
    every = "".join(map(chr, range(0x800))) + "\u2028\U0001f600  \r\n"
    assert theirs.encode(every).ids == list(every.encode())
    # All 256 bytes, those that no UTF-8 text has among them.
    piece = data._byte_level()["model"]["vocab"]
    assert [theirs.token_to_id(token) for token in piece] == list(piece.values()) == list(range(256))
    assert theirs.decode([0xFF, 0x20, 0xC3, 0xA9]) == b"\xff \xc3\xa9".decode("utf-8", "replace")


@pytest.mark.oracle
@pytest.mark.parametrize("model", [None, "llama"])
def test_transformers_gives_the_same_ids(saved, tmp_path, model):
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path)
    if model:  # with a config.json beside it, AutoTokenizer may prefer the class of that architecture
        shutil.copy(GOLDEN / model / "config.json", tmp_path)
    kinds = [transformers.AutoTokenizer.from_pretrained(tmp_path)]
    kinds.append(transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")))
    ours = data.ByteTokenizer()

    @given(st.text())
    def same(text):
        for theirs in kinds:
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode(text).tolist()
            assert theirs.decode(ids) == text

    same()
    again = tmp_path / "again"
    kinds[0].save_pretrained(again)
    assert data.load_tokenizer(again, 256) == data.ByteTokenizer()


def test_our_own_file_needs_no_package(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert data.load_tokenizer(saved, 256) == data.ByteTokenizer()
    assert data.load_tokenizer(saved, 300).note == ""
    with pytest.raises(DataError, match="256 ids, more than the model's vocab_size of 255"):
        data.load_tokenizer(saved, 255)


def test_without_a_file_texts_are_bytes_and_the_tokenizer_says_so(tmp_path):
    tokenizer = data.load_tokenizer(tmp_path, 256)
    assert isinstance(tokenizer, data.ByteTokenizer)
    assert "no tokenizer.json" in tokenizer.note
    assert "cannot be used" not in tokenizer.note
    with pytest.raises(DataError, match=r"no tokenizer\.json.*vocab_size of 255"):
        data.load_tokenizer(tmp_path, 255)
    (tmp_path / "tokenizer.model").touch()
    assert "tokenizer.model cannot be used" in data.load_tokenizer(tmp_path, 256).note


def test_what_does_not_change_the_ids_does_not_make_another_tokenizer(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
    options = {"version": "2.0", "decoder": {"type": "ByteLevel"}, "post_processor": template, "truncation": {"x": 1}}
    assert data.load_tokenizer(changed(saved, tmp_path, lambda f: f.update(options)), 256) == data.ByteTokenizer()


def changed(saved, tmp_path, change):
    found = json.loads((saved / "tokenizer.json").read_text())
    change(found)
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["model"]["merges"].append(["a", "b"]),
        lambda f: f["model"]["vocab"].update({"a": 98, "b": 97}),
        lambda f: f["pre_tokenizer"].update(add_prefix_space=True),
        lambda f: f.update(normalizer={"type": "NFC"}),
        lambda f: f.update(added_tokens=[{"id": 256, "content": "<s>"}]),
        lambda f: f.update(post_processor={"type": "RobertaProcessing", "sep": ["a", 97], "cls": ["b", 98]}),
        lambda f: f.pop("model"),
    ],
)
def test_any_other_file_needs_the_package_and_says_how_to_get_it(saved, tmp_path, monkeypatch, change):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install -e .\[hf\]"):
        data.load_tokenizer(changed(saved, tmp_path, change), 256)


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
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(4)
    made.save(str(directory / "tokenizer.json"))
    return made


def test_a_tokenizer_of_the_hub(tmp_path):
    theirs = trained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"x": 1}')
    ours = data.load_tokenizer(tmp_path, 512)
    assert isinstance(ours, data.HubTokenizer)
    assert ours.note == ""
    assert ours.vocab_size == theirs.get_vocab_size()
    text = "the cat sat on the mat, and so on: " * 3
    ids = ours.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) > 4, "a file's truncation must not cut a corpus"
    assert ours.decode(ids) == text
    assert ours.decode_bytes(ids) == text.encode()
    assert ours.encode(text.encode()).tolist() == ids.tolist()
    assert ours.encode(text, add_special_tokens=True).tolist() == [0, *ids.tolist()]
    assert ours.decode([0]) == "<s>"
    with pytest.raises(DataError, match="at byte 3;"):
        ours.encode(b"the\xff")
    with pytest.raises(DataError, match=f"{ours.vocab_size} ids, more than the model's vocab_size of 200"):
        data.load_tokenizer(tmp_path, 200)
    copy = tmp_path / "copy"
    copy.mkdir()
    ours.save(copy)
    assert sorted(os.listdir(copy)) == ["tokenizer.json", "tokenizer_config.json"]
    assert all((copy / name).read_bytes() == (tmp_path / name).read_bytes() for name in os.listdir(copy))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["model"]["merges"].append(["nowhere", "b"]),
        lambda f: f["model"]["vocab"].update(a=98),
        lambda f: f["model"].update(vocab={}),
        lambda f: f["model"].update(type="Unheard"),
    ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused(saved, tmp_path, change):
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        data.load_tokenizer(changed(saved, tmp_path, change), 256)


def test_a_damaged_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1, "a": 2}}}')
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        data.load_tokenizer(tmp_path, 256)


# ---- texts ----------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1))
def test_a_text_is_read_as_it_is(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "text"
    path.write_bytes(raw)
    assert data.read_text(path) == raw


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty"):
        data.read_text(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(DataError, match="not a regular file"):
            data.read_text(path)
    with pytest.raises(FileNotFoundError):
        data.read_text(tmp_path / "nothing")


def test_prose_comes_with_python():
    found = data.prose()
    assert found == sorted(found)
    assert 300_000 < sum(len(text) for _, text in found) < 2_000_000
    assert len(found) > 50


def test_prose_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="--pretrain-data"):
        data.prose()


def test_code_comes_with_python():
    found = data.python_sources()
    names = [name for name, _ in found]
    assert names == sorted(set(names))
    assert found == data.python_sources()
    assert 2_000_000 < sum(len(text) for _, text in found) <= 3_000_000
    assert sum("/" not in name for name in names) < 0.8 * len(names), "packages as well as single modules"
    for name, text in found:
        text.decode("utf-8")
        assert name.endswith(".py")
        assert not {"test", "tests", "idle_test", "site-packages", "pydoc_data"} & set(name.split("/"))
    fewer = data.python_sources(500_000)
    assert 400_000 < sum(len(text) for _, text in fewer) <= 500_000


def test_only_sources_of_a_standard_library_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="without its sources"):
        data.python_sources()
    latin = "# é".encode("latin-1")
    for name, text in {
        "a.py": b"a", "z/b.py": b"bb", "z/c.txt": b"c", "empty.py": b"", "latin.py": latin, "test/d.py": b"d",
        "z/tests/e.py": b"e", "site-packages/f.py": b"f", "_sysconfigdata_x.py": b"g", "config-3/h.py": b"h",
        "long.py": b"x" * 9, "__pycache__/i.py": b"i",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(text)
    assert data.python_sources(5) == [("a.py", b"a"), ("z/b.py", b"bb")]
    assert data.python_sources(2) in ([("a.py", b"a")], [("z/b.py", b"bb")])


DOCUMENTS = st.lists(st.binary(max_size=40).map(lambda text: text.replace(b"\n", b"")), max_size=12).map(
    lambda texts: [(str(i), text) for i, text in enumerate(texts)]
)


@given(DOCUMENTS, st.floats(0.01, 0.99), st.integers(0, 100))
def test_documents_are_held_out_whole(documents, fraction, seed):
    texts = [text for _, text in documents if text]
    if len(texts) < 2:
        with pytest.raises(DataError, match=f"got {len(texts)}"):
            data.split(documents, fraction, seed)
        return
    sides = data.split(documents, fraction, seed)
    assert sides == data.split(documents, fraction, seed)
    train, held = (side.split(b"\n") for side in sides)
    assert all((train, held, *sides))
    assert sorted(train + held) == sorted(texts)
    left = iter(texts)
    assert all(text in left for text in train), "the order is kept"
    size = sum(map(len, held))
    budget = fraction * sum(map(len, texts))
    assert size <= budget or (held == [min(texts, key=len)] and len(held[0]) > budget)
    assert all(size + len(text) > budget for text in train), "no document more would fit"


def test_a_document_that_fits_exactly_is_held_out():
    documents = [(str(i), b"%010d" % i) for i in range(10)]
    assert len(data.split(documents, 0.2)[1]) == 10 + 1 + 10


def test_another_seed_holds_out_other_documents():
    documents = [(str(i), b"%d" % (100 + i)) for i in range(50)]
    assert len({data.split(documents, 0.1, seed)[1] for seed in range(10)}) == 10


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.floats(0.01, 0.99))
def test_the_end_of_a_text_is_held_out(text, fraction):
    try:
        train, held = data.split_text(text, fraction)
    except DataError:
        assert len(text) * (1 - fraction) < 4
        return
    assert train
    assert held
    assert train + held == text
    assert 0 <= len(held) - len(text) * fraction < 4
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    train.decode()
    held.decode()


def test_the_cut_moves_by_three_bytes_at_most():
    assert data.split_text(b"\x80" * 10, 0.5) == (b"\x80" * 2, b"\x80" * 8)
    assert data.split_text("a\U0001f600".encode(), 0.2) == (b"a", "\U0001f600".encode())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_that_holds_out_nothing_or_all_is_refused(fraction):
    with pytest.raises(ConfigError, match="fraction"):
        data.split([("a", b"a"), ("b", b"b")], fraction)
    with pytest.raises(ConfigError, match="fraction"):
        data.split_text(b"a text", fraction)


# ---- batches --------------------------------------------------------------------------------------------------------


@st.composite
def windows(draw):
    context, batch_size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    tokens = np.arange(draw(st.integers(context + 1, 80)), dtype=draw(st.sampled_from([np.int32, np.uint8, np.int64])))
    return data.Windows(tokens, context, batch_size, seed=draw(st.integers(0, 2**64)))


@given(windows(), st.integers(0, 30))
def test_targets_are_the_ids_one_position_later(cut, step):
    batch = cut.batch(step)
    assert batch.ids.shape == batch.targets.shape == (cut.batch_size, cut.context)
    assert batch.ids.dtype == batch.targets.dtype == np.int64
    assert (batch.first, len(batch), batch.tokens) == (0, cut.batch_size, cut.batch_size * cut.context)
    # The tokens of these texts are their own positions.
    assert np.array_equal(batch.targets, batch.ids + 1)
    assert np.array_equal(batch.ids, batch.ids[:, :1] + np.arange(cut.context))
    assert batch.ids.min() >= 0
    assert batch.targets.max() < len(cut.tokens)


@given(windows())
def test_each_epoch_visits_each_window_once(cut):
    n, steps = len(cut), 3 * len(cut) // cut.batch_size + 1
    starts = np.concatenate([cut.batch(step).ids[:, 0] for step in range(steps)])
    for epoch in range(3):
        visited = np.sort(starts[epoch * n : (epoch + 1) * n])
        assert np.array_equal(visited, visited[0] + cut.context * np.arange(n))
    for step in range(steps):
        assert cut.epoch(step) == step * cut.batch_size // n
    assert n == 1 or n * cut.context + 2 * cut.context > len(cut.tokens), "at most a stride and an offset are left out"


@given(windows(), st.lists(st.integers(0, 60), max_size=8))
def test_a_batch_depends_on_no_batch_before_it(cut, history):
    fresh = [data.Windows(cut.tokens, cut.context, cut.batch_size, cut.seed).batch(step) for step in history]
    for step, batch in zip(history, fresh, strict=True):
        assert np.array_equal(cut.batch(step).ids, batch.ids)


def test_order_and_offset_differ_from_epoch_to_epoch_and_seed_to_seed():
    tokens = np.arange(1000)
    epochs = [data.Windows(tokens, 9, 110, seed).batch(epoch).ids[:, 0] for seed in range(5) for epoch in range(20)]
    assert len({tuple(np.argsort(starts).tolist()) for starts in epochs}) == 100
    offsets = [int(starts.min()) for starts in epochs]
    assert (min(offsets), max(offsets)) == (0, 1000 - 1 - 110 * 9)
    assert len(set(offsets)) == 10


def test_every_window_is_as_likely_to_come_first():
    # Chi-square over 1,000 epochs with 9 degrees of freedom: 33.7 is passed with probability 1e-4.
    cut = data.Windows(np.arange(45), context=4, batch_size=10, seed=3)
    assert len(cut) == 10
    orders = [np.argsort(np.argsort(cut.batch(epoch).ids[:, 0])) for epoch in range(1000)]
    for place in (0, 5, 9):
        counts = np.bincount([order[place] for order in orders], minlength=10)
        assert ((counts - 100) ** 2 / 100).sum() < 33.7


def test_the_shortest_text_is_one_window():
    batch = data.Windows(np.array([5, 6, 7]), context=2, batch_size=2).batch(4)
    assert batch.ids.tolist() == [[5, 6]] * 2
    assert batch.targets.tolist() == [[6, 7]] * 2
    with pytest.raises(DataError, match="needs at least 4 tokens, has 3"):
        data.Windows(np.array([5, 6, 7]), context=3, batch_size=1)


@pytest.mark.parametrize("options", [{"context": 0}, {"batch_size": 0}, {"seed": -1}])
def test_numbers_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        data.Windows(np.arange(9), **{"context": 2, "batch_size": 2, **options})


@pytest.mark.parametrize("tokens", [np.zeros((3, 3), int), np.zeros(9), np.array(1)])
def test_tokens_that_are_no_text_are_refused(tokens):
    with pytest.raises(DataError, match=r"integers \(N,\)"):
        data.Windows(tokens, 2, 2)
    with pytest.raises(DataError, match=r"integers \(N,\)"):
        data.evaluation_windows(tokens, 2, 2)


@given(windows(), st.lists(st.integers(0, 9), max_size=5))
def test_shards_together_are_the_batch(cut, cuts):
    batch = cut.batch(1)
    places = sorted({0, len(batch), *(min(c, len(batch)) for c in cuts)})
    shards = [batch.shard(a, b) for a, b in pairwise(places)]
    assert np.array_equal(np.concatenate([s.ids for s in shards]), batch.ids)
    assert np.array_equal(np.concatenate([s.targets for s in shards]), batch.targets)
    assert [s.first for s in shards] == places[:-1]
    assert sum(s.tokens for s in shards) == batch.tokens
    for shard in shards:  # a shard of a shard knows its place too
        inner = shard.shard(len(shard) - 1, 99)
        assert np.array_equal(inner.ids[0], batch.ids[inner.first])
        assert len(inner) == 1
        assert np.shares_memory(inner.ids, batch.ids)


def test_ignored_targets_do_not_count():
    batch = data.Batch(np.zeros((2, 3), np.int64), np.array([[1, data.IGNORE, 0], [data.IGNORE] * 3]))
    assert (batch.tokens, batch.shard(1, 2).tokens) == (2, 0)


@given(st.lists(st.sampled_from(["b", "a", "__base__", "c"]), max_size=9), st.integers(0, 9))
def test_a_batch_sorted_by_task_is_cut_between_tasks(tasks, first):
    ids = np.arange(len(tasks))[:, None] + np.zeros((1, 2), np.int64)
    batch = data.Batch(ids, ids + 1, first, tasks)
    parts = batch.by_task()
    assert [task for task, _ in parts] == sorted(set(tasks))
    order = [i for _, part in parts for i in part.ids[:, 0].tolist()]
    assert order == sorted(range(len(tasks)), key=lambda i: tasks[i])  # stably
    place = first
    for task, part in parts:
        assert list(part.tasks) == [task] * len(part)
        assert (part.first, part.targets.tolist()) == (place, (part.ids + 1).tolist())
        place += len(part)


@given(st.lists(st.integers(20, 200), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 9), st.integers(0, 40))
def test_a_batch_of_several_texts_has_each_task_s_own_windows(sizes, more, seed, step):
    texts = {f"task {i}": np.arange(size, dtype=np.int32) + 1000 * i for i, size in enumerate(sizes)}
    count = len(texts) + more
    batch = data.TaskWindows(texts, 7, count, seed).batch(step)
    assert [task for task, _ in zip(batch.tasks, batch.ids, strict=True)] == [
        list(texts)[b % len(texts)] for b in range(count)
    ]
    for task, ids in texts.items():
        rows = [b for b, name in enumerate(batch.tasks) if name == task]
        alone = data.Windows(ids, 7, len(rows), seed).batch(step)
        assert np.array_equal(batch.ids[rows], alone.ids)
        assert np.array_equal(batch.targets[rows], alone.targets)


def test_texts_that_no_batch_can_hold():
    text = np.arange(50)
    for texts, size in (({}, 4), ({"a": text, "b": text}, 1)):
        with pytest.raises(ConfigError, match="cannot hold one of each"):
            data.TaskWindows(texts, 7, size)
    with pytest.raises(DataError, match="task 'b': "):
        data.TaskWindows({"a": text, "b": text[:7]}, 7, 2)


def test_four_tasks_come_with_python():
    found = data.four_tasks(100_000)
    assert list(found) == ["python", "c", "charmap", "json"]
    for documents in found.values():
        sizes = [len(text) for _, text in documents]
        assert min(sizes) > 0
        assert 20_000 < sum(sizes) <= 100_000
        assert len(dict(documents)) > 2  # documents are held out whole
    line = json.loads(found["json"][0][1].decode().splitlines()[33])
    assert line == {"code": "U+0041", "name": "LATIN CAPITAL LETTER A", "category": "Lu", "char": "A"}


def test_a_task_without_a_text_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(np, "get_include", lambda: str(tmp_path))
    with pytest.raises(DataError, match="the texts of task 'c'"):
        data.four_tasks()


@given(st.lists(st.sampled_from(["b", "a"]), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 9))
def test_a_shard_keeps_the_tasks_of_its_sequences(tasks, start, stop):
    ids = np.zeros((len(tasks), 2), np.int64)
    batch = data.Batch(ids, ids, 0, tasks)
    assert batch.shard(start, stop).tasks == tasks[start:stop]
    assert batch.to(NUMPY, 3).tasks == tasks
    assert data.Batch(ids, ids).by_task()[0][0] is None
    assert data.Batch(ids, ids).shard(start, stop).tasks is None


@given(st.integers(2, 90), st.integers(1, 9), st.integers(1, 9), st.sampled_from([np.uint8, np.int32, np.uint64]))
def test_evaluation_counts_each_target_once(size, context, batch_size, dtype):
    tokens = np.arange(size).astype(dtype) + dtype(100)
    batches = list(data.evaluation_windows(tokens, context, batch_size))
    targets = np.concatenate([batch.targets for batch in batches]).ravel()
    ids = np.concatenate([batch.ids for batch in batches]).ravel()
    counted = targets != data.IGNORE
    assert targets[counted].tolist() == tokens[1:].tolist()
    assert ids[counted].tolist() == tokens[:-1].tolist()
    assert not ids[~counted].any()
    assert len(ids) - size < context
    assert sum(batch.tokens for batch in batches) == size - 1
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert {batch.ids.shape[1] for batch in batches} == {context}


@given(st.integers(2, 300), st.integers(1, 9), st.integers(1, 40))
def test_a_limited_evaluation_is_spread_over_the_text(size, context, limit):
    whole = np.concatenate([b.ids for b in data.evaluation_windows(np.arange(size) + 1, context, 3)])
    some = np.concatenate([b.ids for b in data.evaluation_windows(np.arange(size) + 1, context, 3, limit)])
    assert len(some) == min(limit, len(whole))
    chosen = (some[:, 0] - 1) // context
    assert np.array_equal(whole[chosen], some)
    gaps = np.diff([*chosen, len(whole)])
    assert chosen[0] == 0
    assert gaps.max() - gaps.min() <= 1
    assert gaps.min() >= 1


def test_evaluation_refuses_what_it_cannot_measure():
    with pytest.raises(DataError, match="needs at least 2 tokens, has 1"):
        data.evaluation_windows(np.arange(1), 4, 1)
    for options in ((0, 1), (1, 0), (1, 1, 0)):
        with pytest.raises(ConfigError, match="must be 1 or more"):
            data.evaluation_windows(np.arange(9), *options)
