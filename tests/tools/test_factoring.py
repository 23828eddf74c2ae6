"""resize and extract: beside the dense dW and its singular values."""

from __future__ import annotations

import shutil

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

from minilora.errors import ConfigError, FormatError, NonFiniteError
from minilora.formats import read_adapter, save_file, write_adapter
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
