"""Tiny models and adapters: what is computed here, and what torch, transformers and peft computed.

They computed in float64.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minilora import functional as F
from minilora.autograd import gradients
from minilora.errors import ConfigError
from minilora.formats import load_file
from minilora.lora import PeftModel
from minilora.models.transformer import CausalLM

GOLDEN = Path(__file__).parent / "golden"
BASES = sorted(p.name for p in GOLDEN.iterdir() if (p / "config.json").exists())
ADAPTERS = sorted(p.name for p in GOLDEN.iterdir() if (p / "adapter_config.json").exists())
# The tolerance of logits; of the loss and its gradients.
DTYPES = {"float64": (1e-10, 1e-9), "float32": (1e-5, 1e-5)}


def load_base(name: str, dtype: str = "float32") -> CausalLM:
    return CausalLM.from_pretrained(GOLDEN / name.partition("--")[0], dtype=dtype)


def adapted(name: str, dtype: str = "float64") -> PeftModel:
    return PeftModel.from_pretrained(load_base(name, dtype), GOLDEN / name, is_trainable=True)


def expectations(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / name / "expect.safetensors")


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def bits(model: CausalLM | PeftModel) -> dict[str, bytes]:
    return {name: p.numpy().tobytes() for name, p in model.named_parameters()}


def assert_same_files(ours: Path, theirs: Path, weights: str, config: str) -> None:
    """The same dtypes and bytes of all tensors, and the same JSON."""
    found = load_file(ours / weights)
    expected = load_file(theirs / weights)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        assert found[key].tobytes() == array.tobytes()
    written = json.loads((ours / config).read_text())
    assert written == json.loads((theirs / config).read_text())


def test_golden_data_is_complete() -> None:
    assert len(BASES) == 6
    assert len(ADAPTERS) == 15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BASES)
def test_from_pretrained_has_the_golden_logits(name: str, dtype: str) -> None:
    expect = expectations(name)
    logits = load_base(name, dtype)(expect["input_ids"]).numpy()
    assert_close(logits, expect["logits"], DTYPES[dtype][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_model_has_the_golden_logits_loss_and_gradients(name: str, dtype: str) -> None:
    expect = expectations(name)
    tolerance, loose = DTYPES[dtype]
    model = adapted(name, dtype)
    ids = expect["input_ids"]
    logits = model(ids)
    assert_close(logits.numpy(), expect["logits"], tolerance)
    loss = F.cross_entropy(logits[:, :-1], ids[:, 1:])
    assert_close(loss.numpy().reshape(1), expect["loss"], loose)

    trained = model.state_dict()
    params = {id(p.data): p for p in model.parameters() if p.requires_grad}
    assert len(params) == len(trained)  # the file holds exactly what trains
    found = gradients(loss, [params[id(array)] for array in trained.values()])
    golden = {}
    for key, g in expect.items():
        if key.startswith("grad:"):
            golden[key.removeprefix("grad:")] = g
    assert set(trained) == set(golden)
    largest = max(np.abs(g).max() for g in golden.values())
    for key, g in zip(trained, found, strict=True):
        assert g is not None
        assert g.shape == golden[key].shape
        assert np.abs(g - golden[key]).max() <= loose * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_merge_adapter_has_the_golden_logits_and_unmerges_to_the_same_bits(
    name: str, dtype: str
) -> None:
    expect = expectations(name)
    ids = expect["input_ids"]
    golden = expect["logits_merged"]
    tolerance = DTYPES[dtype][0]
    tied = "share" if name == "gpt2--lora_wte" else None
    model = adapted(name, dtype)
    before = bits(model)
    unmerged = model(ids).numpy()
    model.merge_adapter(tied=tied)
    assert bits(model) != before
    assert_close(model(ids).numpy(), golden, tolerance)
    model.unmerge_adapter()
    assert bits(model) == before
    assert np.array_equal(model(ids).numpy(), unmerged)
    plain = model.merge_and_unload(tied=tied)
    assert list(bits(plain)) == list(bits(CausalLM(plain.config)))
    assert_close(plain(ids).numpy(), golden, tolerance)


def test_merge_adapter_of_a_tied_embedding_needs_to_know_which_weight_is_meant() -> None:
    expect = expectations("gpt2--lora_wte")
    ids = expect["input_ids"]
    golden = expect["logits"]
    assert 8.8 < np.abs(expect["logits_merged"] - golden).max() < 9
    model = adapted("gpt2--lora_wte")
    before = bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=r"tied='untie'.*tied='share'.*and so the output"):
            merge()
        assert bits(model) == before
    assert_close(model(ids).numpy(), golden, 1e-10)
    plain = model.merge_and_unload(tied="untie")
    assert plain.config.tie_word_embeddings is False
    assert_close(plain(ids).numpy(), golden, 1e-10)


@pytest.mark.parametrize("name", ADAPTERS)
def test_save_pretrained_writes_the_adapter_that_peft_wrote(name: str, tmp_path: Path) -> None:
    adapted(name, "float32").save_pretrained(tmp_path)
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert_same_files(tmp_path, GOLDEN / name, *files)


@pytest.mark.parametrize("name", BASES)
def test_save_pretrained_writes_the_base_that_transformers_wrote(name: str, tmp_path: Path) -> None:
    load_base(name).save_pretrained(tmp_path)
    assert_same_files(tmp_path, GOLDEN / name, "model.safetensors", "config.json")
