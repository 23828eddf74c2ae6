"""resize and extract: beside the dense dW and its singular values."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tool_files import (
    ADAPTERS,
    GOLDEN,
    PREFIX,
    WEIGHTS,
    base_of,
    deltas,
    logits,
    read_weights,
    write_small,
)

from minilora import CausalLM, PeftModel
from minilora.errors import ConfigError, FormatError, NonFiniteError
from minilora.formats import (
    Entry,
    array_entry,
    read_adapter,
    read_checkpoint,
    read_json,
    save_file,
    write_adapter,
    write_checkpoint,
    write_stream,
)
from minilora.tools.factoring import extract, resize
from minilora.tools.merging import merge


def values_beyond(dW: np.ndarray, r: int) -> float:
    """The error of the best approximation of rank r."""
    return float(np.linalg.norm(np.linalg.svd(dW, compute_uv=False)[r:]))


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("name", ADAPTERS)
def test_resize_misses_what_eckart_and_young_say(name, r, tmp_path):
    rows = resize(GOLDEN / name, r, tmp_path / "out")
    before = deltas(GOLDEN / name)
    after = deltas(tmp_path / "out")
    assert [row["layer"] for row in rows] == list(before)
    others = {key for key in read_adapter(GOLDEN / name)[1] if ".lora_" not in key}
    assert others <= set(read_adapter(tmp_path / "out")[1])
    for row in rows:
        dW = before[row["layer"]]
        size = row["|dW|"]
        error = row["error"]
        assert size == pytest.approx(np.linalg.norm(dW), rel=1e-12)
        assert error == pytest.approx(values_beyond(dW, r), rel=1e-9, abs=1e-13)
        distance = np.linalg.norm(after[row["layer"]] - dW)
        assert distance == pytest.approx(error, rel=1e-4, abs=4e-7 * size)
    if r == 8:
        difference = logits(base_of(name), tmp_path / "out") - logits(base_of(name), GOLDEN / name)
        assert np.abs(difference).max() < 2e-6


def test_resize_keeps_the_weight_of_a_targeted_embedding(tmp_path):
    fields, tensors = read_adapter(GOLDEN / "gpt2--lora_wte")
    key = f"{PREFIX}transformer.wte.base_layer.weight"
    tensors[key] = np.ones((3, 3), np.float32)
    write_adapter(tmp_path / "whole", fields, tensors)
    resize(tmp_path / "whole", 2, tmp_path / "out")
    assert (read_adapter(tmp_path / "out")[1][key] == 1).all()


@pytest.mark.parametrize(
    ("x", "message"), [(1e60, "too large for float32"), (1e160, "is not finite")]
)
def test_resize_refuses_factors_with_a_product_beyond_float32_or_float64(x, message, tmp_path):
    """Finite in the file, in float64; beyond it, LAPACK's decomposition of their product may never
    end."""
    config, tensors = read_adapter(GOLDEN / "llama--lora")
    large = {key: np.full(array.shape, x) for key, array in tensors.items()}
    write_adapter(tmp_path / "large", config, large)
    with pytest.raises(NonFiniteError, match=f"layers.0.*{message}"):
        resize(tmp_path / "large", 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama--lora", "llama--save_head", "gpt2--lora", "qwen3--lora"])
def test_extract_gives_the_adapter_that_was_merged(name, tmp_path):
    base = base_of(name)
    tuned = tmp_path / "tuned"
    merge(base, [GOLDEN / name], tuned)
    rows = extract(base, tuned, 4, tmp_path / "out")
    expected = deltas(GOLDEN / name)
    assert {row["layer"] for row in rows} == set(expected)
    assert max(row["relative"] for row in rows) < 1e-6
    assert np.abs(logits(base, tmp_path / "out") - logits(tuned)).max() < 2e-6
    rows = extract(base, tuned, 1, tmp_path / "one")
    for row in rows:
        assert row["error"] == pytest.approx(values_beyond(expected[row["layer"]], 1), rel=1e-5)


def test_extract_refuses_equal_checkpoints_and_other_tensors(tmp_path):
    base, _ = write_small(tmp_path, tied=True)
    tuned = tmp_path / "tuned"
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="nothing to extract"):
        extract(base, base, 1, out)
    shutil.copytree(base, tuned)
    weights = read_weights(base)
    save_file(tuned / WEIGHTS, {**weights, "more": np.ones(1, np.float32)})
    with pytest.raises(FormatError, match="more is in one alone"):
        extract(base, tuned, 1, out)
    assert not out.exists()


# ---- other forms of keys, and another vocabulary ----


def rewritten(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A checkpoint with other keys."""
    config, checkpoint = read_checkpoint(source)
    with checkpoint:
        tensors = {rename(key): checkpoint.read(key) for key in checkpoint}
    write_checkpoint(folder, config, tensors)
    return folder


def bare(key: str) -> str:
    return key.removeprefix("model.").removeprefix("transformer.")


FORMS: dict[str, Callable[[str], str]] = {
    "whole": lambda key: key,
    "bare": bare,
    "module": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "peft": lambda key: f"base_model.model.{key}",
}


@pytest.mark.parametrize("name", ["llama--lora", "gpt2--lora"])
@pytest.mark.parametrize(
    ("of_base", "of_tuned"),
    [("whole", form) for form in FORMS] + [("bare", "whole"), ("bare", "bare"), ("bare", "module")],
)
def test_extract_gives_one_adapter_for_every_form_of_keys(tmp_path, name, of_base, of_tuned):
    merge(base_of(name), [GOLDEN / name], tmp_path / "merged")
    base = rewritten(base_of(name), tmp_path / "base", FORMS[of_base])
    tuned = rewritten(tmp_path / "merged", tmp_path / "tuned", FORMS[of_tuned])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extract(base, tuned, 4, tmp_path / "out")
    assert len(caught) == (of_base != of_tuned)
    assert not [w for w in caught if "taken for the same" not in str(w.message)]
    extract(base_of(name), tmp_path / "merged", 4, tmp_path / "expected")
    ours, theirs = (read_adapter(tmp_path / folder)[1] for folder in ("out", "expected"))
    assert {key: array.tobytes() for key, array in ours.items()} == {
        key: array.tobytes() for key, array in theirs.items()
    }
    assert np.abs(logits(base, tmp_path / "out") - logits(tmp_path / "merged")).max() < 2e-6


def with_tokens(source: Path, folder: Path, count: int, seed: int) -> Path:
    """A checkpoint with `count` tokens, new ones with random rows, and the first row changed."""
    config, checkpoint = read_checkpoint(source)
    rng = np.random.default_rng(seed)
    tensors = {}
    with checkpoint:
        for key in checkpoint:
            W = checkpoint.read(key)
            if len(W) == config["vocab_size"] and W.ndim == 2:
                new = rng.standard_normal((count, W.shape[1])).astype(W.dtype)
                new[1 : len(W)] = W[1:count]
                W = new
            tensors[key] = W
    write_checkpoint(folder, {**config, "vocab_size": count}, tensors)
    return folder


@pytest.mark.parametrize("name", ["llama--lora", "llama_tied_llama3rope--lora", "gpt2--lora"])
@pytest.mark.parametrize("more", [3, -5])
def test_extract_saves_another_vocabulary_whole(tmp_path, name, more):
    base = base_of(name)
    merge(base, [GOLDEN / name], tmp_path / "merged")
    size = read_json(base / "config.json")["vocab_size"]
    tuned = with_tokens(tmp_path / "merged", tmp_path / "tuned", size + more, seed=1)
    says = f"has {size + more} tokens, the base {size}: .* saved whole .1 of the first"
    with pytest.warns(UserWarning, match=says):
        extract(base, tuned, 4, tmp_path / "out")
    ids = np.array([[0, 1, 2, size + more - 1]])
    expected = CausalLM.from_pretrained(tuned, dtype="float64")(ids).numpy()
    with pytest.warns(UserWarning, match="resized"):
        model: Any = PeftModel.from_pretrained(
            CausalLM.from_pretrained(base, dtype="float64"), tmp_path / "out"
        )
    assert model.config.vocab_size == size + more
    assert np.abs(model(ids).numpy() - expected).max() < 2e-6
    with pytest.warns(UserWarning, match="resized"):
        merge(base, [tmp_path / "out"], tmp_path / "again", tied=None)
    got = CausalLM.from_pretrained(tmp_path / "again", dtype="float64")(ids).numpy()
    assert np.abs(got - expected).max() < 1e-5


def test_extract_refuses_a_vocabulary_of_one_end_alone(tmp_path):
    base, _ = write_small(tmp_path)
    for key, other in (("lm_head", "embed_tokens"), ("model.embed_tokens", "lm_head")):
        tuned = tmp_path / key
        shutil.copytree(base, tuned)
        weights = read_weights(base)
        weights[f"{key}.weight"] = np.ones((9, 4), np.float32)
        save_file(tuned / WEIGHTS, weights)
        with pytest.raises(FormatError, match=f"{key}.* another number of tokens .*{other}"):
            extract(base, tuned, 1, tmp_path / "out")


def test_extract_compares_dtypes_that_are_not_read_by_their_bytes(tmp_path):
    base, adapter = write_small(tmp_path)
    merge(base, [adapter], tmp_path / "tuned")
    for folder, value in ((base, 1), (tmp_path / "tuned", 1)):
        weights = read_weights(folder)
        entries = [array_entry(key, array) for key, array in weights.items()]
        byte = np.full(4, value, np.uint8)
        write_stream(
            folder / WEIGHTS, [*entries, Entry("model.x", "F8_E5M2", (4,), lambda b=byte: b)]
        )
    assert extract(base, tmp_path / "tuned", 2, tmp_path / "out")
    other = np.zeros(4, np.uint8)
    entries.append(Entry("model.x", "F8_E5M2", (4,), lambda: other))
    write_stream(tmp_path / "tuned" / WEIGHTS, entries)
    with pytest.raises(FormatError, match=r"model\.x' is F8_E5M2, expected F64"):
        extract(base, tmp_path / "tuned", 2, tmp_path / "second")
