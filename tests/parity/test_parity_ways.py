"""Every row of ways.py: read by each command as peft reads it, or refused by all for one reason."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import V, save_base
from peers import close, load_model, logits, peft, randomise, torch, trainable, transformers
from ways import WAYS, Way, base_fields, resize_tokens, write_way

from minilora import CausalLM, PeftModel
from minilora.errors import MiniloraError
from minilora.tools.combining import combine
from minilora.tools.converting import convert
from minilora.tools.factoring import resize
from minilora.tools.inspecting import inspect_adapter
from minilora.tools.merging import merge

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
ROWS = pytest.mark.parametrize("row", WAYS, ids=[row.name for row in WAYS])
EQUAL = pytest.mark.parametrize(
    "row",
    [row for row in WAYS if not row.refused],
    ids=[row.name for row in WAYS if not row.refused],
)
REFUSED = pytest.mark.parametrize(
    "row", [row for row in WAYS if row.refused], ids=[row.name for row in WAYS if row.refused]
)
IDS = np.random.default_rng(0).integers(0, V - 2, (2, 9))


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Way], tuple[Path, Path]]]:
    """Gives (base, adapter) of a row, each written once."""
    root = tmp_path_factory.mktemp("ways")
    made: dict[str, tuple[Path, Path]] = {}

    def give(row: Way) -> tuple[Path, Path]:
        base = root / row.base
        if not base.exists():
            dtype = "bfloat16" if row.base == "half" else "float32"
            save_base(base, *base_fields(row.base), dtype)
        if row.name not in made:
            adapter = root / str(len(made))
            write_way(row, base, adapter)
            if row.resized:
                base = root / f"{row.base} {row.tokens}"
                if not base.exists():
                    model = load_model(root / row.base, "float32")
                    resize_tokens(model, row.tokens)
                    model.save_pretrained(base)
            made[row.name] = base, adapter
        return made[row.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield give


def their_logits(row: Way, base: Path, adapter: Path) -> np.ndarray:
    """What peft computes with the files, in float64, over the base that they are for."""
    model = load_model(base, "float32")  # in which peft makes every start
    if (adapter / "before").exists():  # peft takes the file's rounded weight in place of the base's
        adapter /= "before"
    if not row.resized:
        resize_tokens(model, row.tokens)
    inner = model.base_model if row.headless else model
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(inner), adapter).eval().double()
    if row.headless:
        with torch.no_grad():
            hidden = theirs(torch.tensor(ids_of(row))).last_hidden_state
            return model.lm_head.double()(hidden).numpy()
    return logits(theirs, ids_of(row))


def ids_of(row: Way) -> np.ndarray:
    """Ids of all the row's tokens, new ones included."""
    ids = IDS.copy()
    if row.tokens > V:
        ids[:, -3:] = np.arange(row.tokens - 3, row.tokens)
    return ids


def our_logits(folder: Path, row: Way, adapter: Path | None = None) -> np.ndarray:
    model: Any = CausalLM.from_pretrained(folder, dtype="float64")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model(ids_of(row)).numpy()


@EQUAL
def test_from_pretrained_reads_each_way_as_peft_does(row, folders, tmp_path):
    base, adapter = folders(row)
    expected = their_logits(row, base, adapter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(CausalLM.from_pretrained(base, dtype="float64"), adapter)
    notes = [str(w.message) for w in caught if str(adapter) in str(w.message)]
    assert bool(notes) == bool(row.notes)
    assert all(len(note) <= 500 for note in notes)
    assert row.notes in " ".join(notes)
    assert close(model(ids_of(row)).numpy(), expected)
    plain = our_logits(base, row._replace(tokens=V))
    assert not close(model(IDS).numpy()[..., : plain.shape[-1]], plain[..., : row.tokens], 1e-3)
    # What is written again says all of it in peft's own words.
    model.save_pretrained(tmp_path / "again")
    assert close(our_logits(base, row, tmp_path / "again"), expected)
    if not row.headless:
        assert close(their_logits(row, base, tmp_path / "again"), expected)
    model = model.merge_and_unload(tied="untie")
    assert close(model(ids_of(row)).numpy(), expected)
    model.save_pretrained(tmp_path / "merged")
    assert close(logits(load_model(tmp_path / "merged"), ids_of(row)), expected)


@EQUAL
def test_merge_reads_each_way_as_peft_does(row, folders, tmp_path):
    base, adapter = folders(row)
    expected = their_logits(row, base, adapter)
    dtype = "float32" if row.base == "half" else None  # without the one rounding to 16 bits
    merge(base, [adapter], tmp_path / "merged", dtype=dtype, tied="untie")
    assert close(our_logits(tmp_path / "merged", row), expected)
    assert close(logits(load_model(tmp_path / "merged"), ids_of(row)), expected)
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert fields["vocab_size"] == row.tokens


@EQUAL
def test_tools_read_each_way_as_peft_does(row, folders, tmp_path):
    base, adapter = folders(row)
    expected = their_logits(row, base, adapter)
    report = inspect_adapter(adapter, base)
    assert report["mismatches"] == []
    assert row.notes in " ".join(report.get("notes", ()))
    made = ["resized", "combined", "float32"]
    resize(adapter, 13, tmp_path / "resized")
    combine([adapter], tmp_path / "combined", [1.0])
    convert(adapter, tmp_path / "float32", dtype="float32")
    if row.mlx:
        convert(adapter, tmp_path / "mlx", to="mlx")
        convert(tmp_path / "mlx", tmp_path / "peft", to="peft")
        made.append("peft")
    for name in made:
        assert close(our_logits(base, row, tmp_path / name), expected), name
    if "init_lora_weights" in row.options:  # which peft runs again, for the new rank
        assert close(their_logits(row, base, tmp_path / "resized"), expected)


@REFUSED
def test_commands_refuse_each_way_for_one_reason(row, folders, tmp_path):
    base, adapter = folders(row)
    load = lambda: our_logits(base, row, adapter)  # noqa: E731
    for run in (load, lambda: merge(base, [adapter], tmp_path / "out")):
        with pytest.raises(MiniloraError, match=row.refused) as caught:
            run()
        assert adapter.name in str(caught.value)
    assert not (tmp_path / "out").exists()
    try:
        mismatches = inspect_adapter(adapter, base)["mismatches"]
    except MiniloraError as error:
        mismatches = [str(error)]
    assert row.refused in " ".join(mismatches)


def test_merge_reads_an_adapter_for_a_classifier(tmp_path):
    """Its head is trained whole; that of other models, which peft names as well, is not there."""
    fields = {**base_fields("llama")[1], "num_labels": 3, "pad_token_id": 0}
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**fields)).eval()
    randomise(model.parameters())
    model.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(model, options).eval()
    randomise(trainable(theirs).values(), seed=3)
    theirs.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert close(logits(merged.eval()), logits(theirs))
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert report["mismatches"] == []
    assert "'classifier' match nothing" in " ".join(report["notes"])
    # A language model has no place for that head.
    save_base(tmp_path / "other", *base_fields("llama"))
    with pytest.raises(MiniloraError, match=r"unknown .*\.score\.weight"):
        PeftModel.from_pretrained(
            CausalLM.from_pretrained(tmp_path / "other"), tmp_path / "adapter"
        )


def test_ways_are_many():
    assert len(WAYS) - sum(bool(row.refused) for row in WAYS) >= 40
    assert len({row.name for row in WAYS}) == len(WAYS)
