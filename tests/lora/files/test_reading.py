"""An adapter's file beside its configuration: what its keys decide, alike for every command.

tests/parity/ways.py has many more of these files, as peft writes them.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import assume, given
from hypothesis import strategies as st
from methods import move

from minilora import CausalLM, PeftModel, get_peft_model
from minilora.cli import main
from minilora.errors import ConfigError, FormatError
from minilora.formats import SafetensorsFile, load_file, save_file
from minilora.formats.dtypes import round_to, widen
from minilora.lora import LoraConfig
from minilora.lora.factors import Part
from minilora.lora.files.adapter import AdapterFile
from minilora.lora.files.repeats import UNITS, is_weight_of_base
from minilora.tools.combining import combine
from minilora.tools.converting import convert
from minilora.tools.factoring import resize
from minilora.tools.inspecting import inspect_adapter
from minilora.tools.merging import merge

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
EMBEDDING = "model.embed_tokens"
Edit = Callable[[Path], object]
V = small.CONFIG.vocab_size


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


# ---- files, changed ------------------------------------------------------------------------------


def fields_set(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def tensors_changed(change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = dict(load_file(folder / WEIGHTS))
        change(tensors)
        save_file(folder / WEIGHTS, tensors)

    return edit


def renamed(old: str, new: str) -> Edit:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new, 1)] = tensors.pop(key)

    return tensors_changed(change)


def removed(*keys: str) -> Edit:
    return tensors_changed(lambda tensors: [tensors.pop(PREFIX + key) for key in keys])


def rounded(dtype: str) -> Edit:
    """The tensors of the base in the file, rounded."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for key, array in tensors.items():
            if "lora_" not in key:
                tensors[key] = widen(round_to(array.astype(np.float64), dtype))

    return tensors_changed(change)


def with_base(*names: str) -> Edit:
    """Tensors of the base put into the file, as if they had been trained."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        base = dict(small.base("float64").named_parameters())
        tensors.update({PREFIX + name: base[name].numpy() for name in names})

    return tensors_changed(change)


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


SAVED = {"modules_to_save": ["model.norm", "lm_head"]}
TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
NO_SAVED = fields_set(modules_to_save=None, ensure_weight_tying=False)
ENDS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}

# name: (is the base tied?, options of the adapter, edit of its files, words of the note)
FILES: dict[str, tuple[bool, dict[str, Any], Edit, str]] = {
    "look-behind": (
        False,
        {},
        fields_set(target_modules=r".*(?<=self_attn\.)[qv]_proj"),
        "layers are those that have tensors in the file",
    ),
    "ranks behind": (
        False,
        {"rank_pattern": {"q_proj": 3}},
        fields_set(rank_pattern={r".*(?<=self_attn\.)q_proj": 3}),
        "the ranks are those of the file",
    ),
    "whole modules": (False, SAVED, NO_SAVED, "lm_head, model.norm: whole in the file"),
    "whole, tied": (True, TIED, NO_SAVED, "model.embed_tokens: whole in the file"),
    "a whole head, tied": (
        True,
        TIED,
        both(removed(f"{EMBEDDING}.weight"), NO_SAVED),
        "lm_head: whole in the file",
    ),
    "saved modules of other models": (
        False,
        SAVED,
        fields_set(modules_to_save=["model.norm", "lm_head", "score"]),
        "modules_to_save: 'score' match nothing in this base",
    ),
    "copies of the base": (
        False,
        {},
        with_base(f"{EMBEDDING}.weight", "lm_head.weight", "model.norm.weight"),
        "",
    ),
    "copies of the base in bfloat16": (
        False,
        {},
        both(with_base("lm_head.weight", "model.norm.weight"), rounded("BF16")),
        "",
    ),
    "bfloat16 copies": (False, ENDS, rounded("BF16"), ""),
    "float16 copies": (False, ENDS, rounded("F16"), ""),
    "a model without a head": (
        False,
        {"modules_to_save": ["norm"]},
        renamed(f"{PREFIX}model.", PREFIX),
        "those of a model without a head",
    ),
    "eva": (False, {}, fields_set(init_lora_weights="eva", eva_config={"rho": 2.0}), ""),
    "another task": (False, {}, fields_set(task_type="TOKEN_CLS"), ""),
}


def write(folder: Path, tied: bool, options: dict[str, Any]) -> np.ndarray:
    """A base and an adapter in `folder`; returns the logits of both."""
    base = small.base("float64", tie_word_embeddings=tied)
    base.save_pretrained(folder / "base")
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(base, config)
    move(model, "default")
    model.save_pretrained(folder / "adapter")
    return small.logits(model.eval())


def load(folder: Path, adapter: str, ids: np.ndarray = small.IDS) -> np.ndarray:
    base = CausalLM.from_pretrained(folder / "base", dtype="float64")
    return PeftModel.from_pretrained(base, folder / adapter)(ids).numpy()  # type: ignore[no-any-return]


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    return (
        got.shape == expected.shape and np.abs(got - expected).max() <= 1e-5 * abs(expected).max()
    )


def run_every_command(folder: Path, expected: np.ndarray, ids: np.ndarray = small.IDS) -> list[str]:
    """Each command reads base and adapter, and gives these logits; returns inspect's notes."""
    base, adapter = folder / "base", folder / "adapter"
    assert close(load(folder, "adapter", ids), expected)
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(base, dtype="float64"), adapter)
    model.save_pretrained(folder / "again")
    assert close(model.merge_and_unload(tied="untie")(ids).numpy(), expected)
    merge(base, [adapter], folder / "merged", tied="untie")
    merged = CausalLM.from_pretrained(folder / "merged", dtype="float64")
    assert close(merged(ids).numpy(), expected)
    resize(adapter, 9, folder / "resized")
    combine([adapter], folder / "combined", [1.0])
    convert(adapter, folder / "converted", dtype="float32")
    for made in ("again", "resized", "combined", "converted"):
        assert close(load(folder, made, ids), expected), made
    report = inspect_adapter(adapter, base)
    assert report["mismatches"] == []
    return report.get("notes", [])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_from_pretrained_and_every_command_read_alike(name: str, tmp_path: Path) -> None:
    tied, options, edit, words = FILES[name]
    expected = write(tmp_path, tied, options)
    edit(tmp_path / "adapter")
    notes = run_every_command(tmp_path, expected)
    assert bool(notes) == bool(words)
    assert words in " ".join(notes)
    # What is decided is said once, whoever reads the file.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tmp_path, "adapter")
    found = [str(w.message) for w in caught]
    assert len(found) == bool(words)
    for note in found:
        assert words in note
        assert note.startswith(repr(str(tmp_path / "adapter")))


@pytest.mark.filterwarnings("ignore")
def test_finetune_goes_on_from_a_file_whose_keys_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small.base(vocab_size=256)
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    fields_set(target_modules=r".*(?<=attn\.)[qv]_proj", task_type="TOKEN_CLS")(
        tmp_path / "adapter"
    )
    (tmp_path / "book.txt").write_text("a text to go on with, " * 20)
    monkeypatch.chdir(tmp_path)
    line = "finetune --base base --adapter adapter --data book.txt --out new --steps 1"
    assert main([*line.split(), "--context", "8", "--batch-size", "1", "--threads", "1"]) == 0
    fields = json.loads(Path("new/adapter_config.json").read_text())
    assert len(fields["target_modules"]) == 4
    assert fields["task_type"] == "CAUSAL_LM"
    assert set(load_file(f"new/{WEIGHTS}")) == set(load_file(f"adapter/{WEIGHTS}"))


# ---- another vocabulary --------------------------------------------------------------------------

WRITERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "factors": ENDS,
    "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, V + 1]},
}


def write_resized(folder: Path, tied: bool, options: dict[str, Any], size: int) -> np.ndarray:
    """A base of V tokens, and an adapter made after its vocabulary was resized; their logits."""
    whole = small.base("float64", tie_word_embeddings=tied, vocab_size=size)
    parts = small.base("float64", tie_word_embeddings=tied)
    for name, p in parts.named_parameters():
        W = dict(whole.named_parameters())[name].data
        rows = min(len(W), len(p.data))
        p.data = np.concatenate([W[:rows], p.data[rows:]]) if p.ndim == 2 else W
    parts.save_pretrained(folder / "base")
    ends = {f"{EMBEDDING}.weight": whole.model.embed_tokens.weight.numpy()}
    ends["lm_head.weight"] = whole.lm_head.weight.numpy()
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(whole, config)
    move(model, "default")
    model.save_pretrained(folder / "adapter")

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name, W in ends.items():
            path = name.removesuffix(".weight")
            if "trainable_token_indices" in options and (tied or path == EMBEDDING):
                path += ".token_adapter.base_layer"
            if f"{PREFIX}{path}.base_layer.weight" not in tensors:
                tensors.setdefault(f"{PREFIX}{path}.weight", W)

    tensors_changed(change)(folder / "adapter")
    return model.eval()(np.arange(size)[None, -10:]).numpy()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_from_pretrained_and_every_command_resize_the_vocabulary(
    writer: str, tied: bool, tmp_path: Path
) -> None:
    options = WRITERS[writer]
    if tied and writer in ("factors", "copies"):
        options = {**TIED, "target_modules": ["q_proj"]}
    expected = write_resized(tmp_path, tied, options, V + 3)
    ids = np.arange(V + 3)[None, -10:]
    notes = run_every_command(tmp_path, expected, ids)
    assert f"the base has {V} tokens and the file {V + 3}: resized" in " ".join(notes)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == V + 3


@pytest.mark.filterwarnings("ignore")
def test_load_adapter_resizes_a_base_in_16_bits_and_keeps_its_rows(tmp_path: Path) -> None:
    write_resized(tmp_path, False, {}, V + 3)
    convert(tmp_path / "base", tmp_path / "half", dtype="bfloat16")
    base = CausalLM.from_pretrained(tmp_path / "half", stored=True)
    before = base.model.embed_tokens.weight.numpy()
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert model.config.vocab_size == V + 3
    table = base.model.embed_tokens.weight
    assert table.fixed
    assert table.numpy()[:V].tobytes() == before.tobytes()
    with model.disable_adapter():
        assert model(np.arange(V + 3)[None, -10:]).shape[-1] == V + 3
    assert model.unload().config.vocab_size == V + 3


@pytest.mark.filterwarnings("ignore")
def test_load_adapter_resizes_no_ends_that_have_adapters(tmp_path: Path) -> None:
    write_resized(tmp_path, False, {}, V + 3)
    base = CausalLM.from_pretrained(tmp_path / "base", dtype="float64")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens"]))
    before = small.bits(model)
    with pytest.raises(FormatError, match="cannot be resized: they are quantised or have adapters"):
        model.load_adapter(tmp_path / "adapter", "other")
    assert small.bits(model) == before
    assert model.config.vocab_size == V


@pytest.mark.filterwarnings("ignore")
def test_merge_adds_adapters_of_one_resized_vocabulary(tmp_path: Path) -> None:
    write_resized(tmp_path, False, ENDS, V + 3)
    base = CausalLM.from_pretrained(tmp_path / "base", dtype="float64")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    # By its full name, an embedding is adapted without a copy of its weight in the file.
    targets = ["up_proj", EMBEDDING]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model.add_adapter("b", config)
    model.save_pretrained(tmp_path, ["b"])
    expected = model.merge_and_unload(adapter_names=["default", "b"])
    merge(tmp_path / "base", [tmp_path / "adapter", tmp_path / "b"], tmp_path / "merged")
    merged = CausalLM.from_pretrained(tmp_path / "merged", dtype="float64")
    ids = np.arange(V + 3)[None, -10:]
    assert close(merged(ids).numpy(), expected(ids).numpy())


# ---- what stays refused --------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], Edit, str]] = {
    "alphas": (
        {"alpha_pattern": {"q_proj": 3}},
        fields_set(alpha_pattern={r".*(?<=attn\.)q_proj": 3}),
        r"alpha_pattern in adapter_config.json: pattern .*, and no tensor says which layers",
    ),
    "biases": (
        {"bias": "lora_only"},
        tensors_changed(lambda t: [t.pop(key) for key in list(t) if "bias" in key]),
        r"bias = 'lora_only', but 4 trained biases are missing, such as .* set bias to 'none'",
    ),
    "another base": (
        ENDS,
        tensors_changed(
            lambda t: [np.multiply(t[key], 1.01, out=t[key]) for key in t if "base_layer" in key]
        ),
        r"base_layer.weight differs from the base's",
    ),
    "pissa_niter_4": (
        {},
        fields_set(init_lora_weights="pissa_niter_4"),
        "neither A0, B0 nor that base is given",
    ),
    "kasa": ({}, fields_set(init_lora_weights="kasa"), "init_lora_weights must be True, False"),
    "a malformed pattern": ({}, fields_set(target_modules="(q_proj"), r"a \( without its \)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_from_pretrained_merge_and_inspect_refuse_for_one_reason(name: str, tmp_path: Path) -> None:
    options, edit, words = REFUSED[name]
    write(tmp_path, False, options)
    edit(tmp_path / "adapter")
    error = (FormatError, ConfigError)
    with pytest.raises(error, match=words):
        load(tmp_path, "adapter")
    with pytest.raises(error, match=words):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if name in ("alphas", "pissa_niter_4", "kasa", "a malformed pattern"):  # known without the base
        for run in (resize, lambda adapter, r, out: combine([adapter], out, [1.0])):
            with pytest.raises(error, match=words):
                run(tmp_path / "adapter", 2, tmp_path / "out")
        with pytest.raises(error, match=words):
            inspect_adapter(tmp_path / "adapter")
    else:
        found = inspect_adapter(tmp_path / "adapter", tmp_path / "base")["mismatches"]
        assert re.search(words, " ".join(found))


def test_get_peft_model_refuses_what_a_file_may_say() -> None:
    for options, words in (
        ({"target_modules": ["q_proj", "w1"]}, "'w1' match nothing"),
        ({"modules_to_save": ["score"]}, "'score' match nothing"),
        ({"target_modules": r".*(?<=attn\.)q_proj"}, "supported are"),
        ({"init_lora_weights": "mica"}, "init_lora_weights"),
    ):
        with pytest.raises(ConfigError, match=words):
            get_peft_model(small.base(), LoraConfig(**options))


# ---- is it the base's weight? --------------------------------------------------------------------


def store(folder: Path, F: np.ndarray) -> Path:
    save_file(folder / "F.safetensors", {"F": F})
    return folder / "F.safetensors"


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["BF16", "F16", "F32"]),
    st.floats(-3, 1),
    st.booleans(),
)
def test_is_weight_of_base_accepts_a_merge_and_an_unmerge(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: str, size: float, table: bool
) -> None:
    """As peft rounds: dW is added, the sum rounded, a rounded dW taken away, and rounded again."""
    rng = np.random.default_rng(seed)
    part = Part(rng.standard_normal((2, 5)), rng.standard_normal((4, 2)), 10.0**size)
    dW = part.c * part.B @ part.A
    dW = dW.T if table else dW
    W = widen(round_to(rng.standard_normal(dW.shape), dtype)).astype(np.float64)
    merged = widen(round_to(W + dW, dtype)).astype(np.float64)
    F = widen(round_to(merged - widen(round_to(dW, dtype)), dtype)).astype(np.float32)
    file = store(tmp_path_factory.mktemp("F"), F)
    with SafetensorsFile(file) as opened:
        assert is_weight_of_base(opened, "F", W, part, table)
    # One element that is off by more is another base's.
    off = UNITS[dtype] * (np.abs(W + dW) + np.abs(dW) + np.abs(F)) * 4
    other = F.astype(np.float64)
    other[0, 0] = widen(round_to(W[0, 0] + off[0, 0] + np.zeros(1), dtype))[0]
    assume(abs(other[0, 0] - W[0, 0]) > 2 * off[0, 0] / 4)
    file = store(tmp_path_factory.mktemp("F"), other.astype(np.float32))
    with SafetensorsFile(file) as opened:
        assert not is_weight_of_base(opened, "F", W, part, table)


def test_adapter_file_leaves_nothing_open_if_a_note_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, False, {})
    fields_set(target_modules=r".*(?<=attn\.)q_proj")(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    with pytest.raises(UserWarning, match="layers are those"):  # every warning is an error here
        AdapterFile(tmp_path / "copy")
