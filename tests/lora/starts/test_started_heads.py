"""A targeted head that a start changed: its weight in files, and what reads these files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small

from minilora import CausalLM, PeftModel, get_peft_model
from minilora.errors import FormatError
from minilora.formats import load_file
from minilora.formats.safetensors import save_file
from minilora.lora import LoraConfig
from minilora.tools.combining import combine
from minilora.tools.factoring import resize
from minilora.tools.merging import merge
from minilora.tools.plain import make_plain

KEY = "base_model.model.lm_head.base_layer.weight"
DATA = [np.random.default_rng(i).integers(0, 16, (2, 11)) for i in range(3)]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


def write(folder: Path, name: str) -> np.ndarray:
    """Write `base`, and an adapter in `adapter` and `plain`; returns its logits."""
    base = small.base()
    base.save_pretrained(folder / "base")
    targets = ["lm_head", "q_proj"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=name)
    quantize = "nf4" if name == "loftq" else None
    model = get_peft_model(base, config, data=DATA, quantize=quantize).eval()
    rng = np.random.default_rng(0)
    for p in model.adapter_parameters("default").values():
        p.data = p.data + (0.1 * rng.standard_normal(p.shape)).astype(p.dtype)
    model.save_pretrained(folder / "adapter", as_trained=True)
    model.save_pretrained(folder / "plain")
    return small.logits(model)


def read(folder: Path, adapter: str, **options: bool) -> np.ndarray:
    model = CausalLM.from_pretrained(folder / "base")
    return small.logits(PeftModel.from_pretrained(model, folder / adapter, **options).eval())


def merged(folder: Path, adapter: str) -> np.ndarray:
    merge(folder / "base", [folder / adapter], folder / f"merged-{adapter}")
    return small.logits(CausalLM.from_pretrained(folder / f"merged-{adapter}"))


@pytest.mark.parametrize("name", ["pissa", "olora", "lora_ga"])
def test_save_pretrained_writes_a_started_head_that_can_be_read(name: str, tmp_path: Path) -> None:
    expected = write(tmp_path, name)
    W = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    assert np.array_equal(load_file(tmp_path / "plain" / "adapter_model.safetensors")[KEY], W)
    R = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[KEY]
    assert abs(R - W).max() > 0.01
    make_plain(tmp_path / "adapter", tmp_path / "made", tmp_path / "base")
    combine([tmp_path / "adapter"], tmp_path / "sum")
    resize(tmp_path / "adapter", 4, tmp_path / "resized")
    for adapter in ("plain", "adapter", "made", "sum", "resized"):
        assert np.allclose(read(tmp_path, adapter), expected, atol=2e-4), adapter
        assert np.allclose(merged(tmp_path, adapter), expected, atol=2e-4), adapter
    assert np.allclose(read(tmp_path, "adapter", is_trainable=True), expected, atol=2e-4)


def test_merge_reads_a_head_over_the_codes_of_loftq(tmp_path: Path) -> None:
    write(tmp_path, "loftq")
    assert np.allclose(merged(tmp_path, "adapter"), read(tmp_path, "adapter"), atol=1e-4)


def test_merge_refuses_a_head_that_no_start_left(tmp_path: Path) -> None:
    write(tmp_path, "pissa")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = tensors[KEY].copy()
    changed[3, 2] += 0.01
    save_file(file, {**tensors, KEY: changed})
    with pytest.raises(FormatError, match=r"lm_head\.base_layer\.weight differs"):
        merged(tmp_path, "adapter")
