"""Bases as they are found, beside transformers: the hub's cache, and tied flags."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import save_base, small_base
from peers import close, have_logits, load_model, logits, transformers

from minilora import CausalLM, LoraConfig, get_peft_model
from minilora.formats import load_file, save_file
from minilora.models.dialects import MODEL_TYPES
from minilora.tools.merging import merge

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(cache: Path, model: Any, folder: Path, shard: str) -> Path:
    """Save transformers' model as shards, and link them into a cache as the hub's package does."""
    hub = pytest.importorskip("huggingface_hub.file_download")
    model.save_pretrained(folder, max_shard_size=shard)
    repository = cache / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number}"
        shutil.move(path, blob)
        hub._create_symlink(str(blob), str(snapshot / path.name))
    return snapshot


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_from_pretrained_reads_the_hub_s_cache_in_bfloat16_and_shards(tmp_path, monkeypatch, kind):
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "first", kind, small_base(kind, tied=False), "bfloat16")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="auto")
    snapshot = put_into_cache(cache, saved, tmp_path / "saved", shard="1KB")
    assert len(list(snapshot.glob("*.safetensors"))) > 2
    assert all(path.is_symlink() for path in snapshot.iterdir())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        "org/model", dtype="float32", cache_dir=cache, local_files_only=True
    ).eval()
    for name in ("org/model", f"org/model@{COMMIT}", snapshot):
        assert have_logits(CausalLM.from_pretrained(name), logits(theirs))
    ours: Any = get_peft_model(CausalLM.from_pretrained("org/model"), LoraConfig(r=2))
    ours.save_pretrained(tmp_path / "adapter")
    merge(snapshot, [tmp_path / "adapter"], tmp_path / "merged")
    assert close(logits(load_model(tmp_path / "merged", "float32")), logits(theirs))


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(path, tensors)


def embedding_of(tensors: dict[str, np.ndarray]) -> str:
    return next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))


def another_head(tensors: dict[str, np.ndarray]) -> None:
    W = tensors[embedding_of(tensors)]
    tensors["lm_head.weight"] = np.random.default_rng(0).normal(size=W.shape).astype(W.dtype)


def one_bit(tensors: dict[str, np.ndarray]) -> None:
    W = tensors[embedding_of(tensors)].copy()
    W[-1, -1] = np.nextafter(W[-1, -1], np.float32(9))
    tensors["lm_head.weight"] = W


def same_head(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors[embedding_of(tensors)].copy()


def head_alone(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors.pop(embedding_of(tensors))


def nothing(tensors: dict[str, np.ndarray]) -> None:
    """The head is not stored, as transformers saves it."""


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("change", [another_head, one_bit, same_head, head_alone, nothing])
def test_from_pretrained_ties_what_transformers_ties(tmp_path, kind, change):
    """The flag is true; whether embedding and head are one weight the files decide."""
    save_base(tmp_path, kind, small_base(kind, tied=True))
    change_weights(tmp_path, change)
    theirs = load_model(tmp_path, "float32")
    is_tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert is_tied == (change not in (another_head, one_bit))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = CausalLM.from_pretrained(tmp_path)
    noted = [str(w.message) for w in caught if "tie_word_embeddings" in str(w.message)]
    assert len(noted) == (not is_tied)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == is_tied
    assert ours.config.tie_word_embeddings == is_tied
    assert have_logits(ours, logits(theirs))
    ours.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["tie_word_embeddings"] == is_tied
    assert close(logits(load_model(tmp_path / "again", "float32")), logits(theirs))
