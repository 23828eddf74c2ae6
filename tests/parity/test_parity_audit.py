"""audit beside peft: its own merges are right, in memory, sharded, in 16 bits and twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import load_model, load_theirs, peft, torch
from tool_files import ADAPTERS, GOLDEN, base_of

from minilora.tools.auditing import audit

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
MERGED = [name for name in ADAPTERS if name != "gpt2--lora_wte"]


def save_merged(name: str, dtype: str, folder: Path, **options: Any) -> Path:
    """What peft's merge_and_unload makes of a golden adapter over its base in `dtype`."""
    base = load_model(base_of(name), dtype)
    base.save_pretrained(folder / "base")
    merged = load_theirs(base, GOLDEN / name).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder / "merged", **options)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MERGED)
def test_audit_of_peft_merge_and_unload_is_right(name: str, dtype: str, tmp_path: Path) -> None:
    save_merged(name, dtype, tmp_path)
    report = audit(tmp_path / "base", GOLDEN / name, tmp_path / "merged", threads=1)
    assert report["right"], report


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_audit_of_peft_with_the_base_of_another_dtype_is_right(dtype: str, tmp_path: Path) -> None:
    """The base in the file is float32, and peft loads and merges it in 16 bits."""
    save_merged("llama--lora", dtype, tmp_path)
    report = audit(GOLDEN / "llama", GOLDEN / "llama--lora", tmp_path / "merged", threads=1)
    assert report["right"], report


def test_audit_of_peft_in_shards_is_right(tmp_path: Path) -> None:
    save_merged("llama--rslora_all", "bfloat16", tmp_path, max_shard_size="5KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    report = audit(tmp_path / "base", GOLDEN / "llama--rslora_all", tmp_path / "merged")
    assert report["right"], report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_audit_of_peft_factors_in_16_bits_is_right(dtype: str, tmp_path: Path) -> None:
    """Without autocast, the factors have the dtype of the base."""
    base = load_model(GOLDEN / "llama", dtype)
    base.save_pretrained(tmp_path / "base")
    kind = getattr(torch, dtype)
    model = peft.PeftModel.from_pretrained(
        base, GOLDEN / "llama--rslora_all", autocast_adapter_dtype=False
    ).to(kind)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = audit(tmp_path / "base", GOLDEN / "llama--rslora_all", tmp_path / "merged")
    assert report["right"], report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama--lora", "llama--dora", "gpt2--lora", "gpt2--dora_proj"])
def test_audit_of_what_peft_merged_twice(name: str, dtype: str, tmp_path: Path) -> None:
    save_merged(name, dtype, tmp_path)
    once = load_model(tmp_path / "merged", dtype)
    twice = load_theirs(once, GOLDEN / name).merge_and_unload()
    twice.save_pretrained(tmp_path / "twice")
    report = audit(tmp_path / "base", GOLDEN / name, tmp_path / "twice", threads=1)
    assert report["verdict"].startswith("twice") or "twice" in report["hypotheses"], report
    assert not report["right"]


def test_audit_of_peft_with_an_embedding_tells_the_tied_head(tmp_path: Path) -> None:
    save_merged("gpt2--lora_wte", "float32", tmp_path)
    report = audit(tmp_path / "base", GOLDEN / "gpt2--lora_wte", tmp_path / "merged", threads=1)
    assert report["verdict"] == "tied head changed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_audit_of_torch_sums_in_float32_by_shard_is_right(dtype: str, tmp_path: Path) -> None:
    """As axolotl merges: shard by shard, W.float() + s B A rounded to the shard's dtype."""
    from safetensors.torch import load_file, save_file

    kind = getattr(torch, dtype)
    base = load_model(GOLDEN / "llama", dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    base.save_pretrained(tmp_path / "merged", max_shard_size="5KB")
    factors = load_file(GOLDEN / "llama--lora" / "adapter_model.safetensors")
    config = peft.LoraConfig.from_pretrained(GOLDEN / "llama--lora")
    s = config.lora_alpha / config.r
    for shard in (tmp_path / "merged").glob("*.safetensors"):
        tensors = load_file(shard)
        for key, W in tensors.items():
            stem = f"base_model.model.{key.removesuffix('.weight')}.lora_"
            if f"{stem}A.weight" in factors:
                delta = s * (factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"])
                tensors[key] = (W.float() + delta).to(kind)
        save_file(tensors, shard, metadata={"format": "pt"})
    report = audit(tmp_path / "base", GOLDEN / "llama--lora", tmp_path / "merged", threads=1)
    assert report["right"], report
    assert np.isfinite([row["|dW|/|W|"] for row in report["tensors"]]).all()
