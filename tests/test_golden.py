"""What torch, transformers and peft computed for tiny models and adapters, in float64, beside what is computed here."""

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
DTYPES = {
    "float64": (1e-10, 1e-9),
    "float32": (1e-5, 1e-5),
}  # tolerance of logits; of the loss and its gradients


def adapted(name: str, dtype: str = "float64") -> PeftModel:
    base = CausalLM.from_pretrained(GOLDEN / name.partition("--")[0], dtype=dtype)
    return PeftModel.from_pretrained(base, GOLDEN / name, is_trainable=True)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def bits(model: CausalLM | PeftModel) -> dict[str, bytes]:
    return {name: p.numpy().tobytes() for name, p in model.named_parameters()}


def test_the_golden_data_is_all_here() -> None:
    assert len(BASES) == 6
    assert len(ADAPTERS) == 15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BASES)
def test_base_logits(name: str, dtype: str) -> None:
    expect = load_file(GOLDEN / name / "expect.safetensors")
    model = CausalLM.from_pretrained(GOLDEN / name, dtype=dtype)
    assert_close(model(expect["input_ids"]).numpy(), expect["logits"], DTYPES[dtype][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_logits_loss_and_gradients(name: str, dtype: str) -> None:
    expect = load_file(GOLDEN / name / "expect.safetensors")
    tolerance, loose = DTYPES[dtype]
    model, ids = adapted(name, dtype), expect["input_ids"]
    logits = model(ids)
    assert_close(logits.numpy(), expect["logits"], tolerance)
    loss = F.cross_entropy(logits[:, :-1], ids[:, 1:])
    assert_close(loss.numpy().reshape(1), expect["loss"], loose)

    trained = model.state_dict()
    own = {id(p.data): p for p in model.parameters() if p.requires_grad}
    assert len(own) == len(trained)  # the file holds exactly what trains
    found = gradients(loss, [own[id(array)] for array in trained.values()])
    wanted = {key.removeprefix("grad:"): g for key, g in expect.items() if key.startswith("grad:")}
    assert set(trained) == set(wanted)
    largest = max(np.abs(g).max() for g in wanted.values())
    for key, g in zip(trained, found, strict=True):
        assert g is not None
        assert g.shape == wanted[key].shape
        assert np.abs(g - wanted[key]).max() <= loose * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_logits_and_the_way_back(name: str, dtype: str) -> None:
    expect = load_file(GOLDEN / name / "expect.safetensors")
    tied = "share" if name == "gpt2--lora_wte" else None
    model = adapted(name, dtype)
    before, unmerged = bits(model), model(expect["input_ids"]).numpy()
    model.merge_adapter(tied=tied)
    assert bits(model) != before
    assert_close(model(expect["input_ids"]).numpy(), expect["logits_merged"], DTYPES[dtype][0])
    model.unmerge_adapter()
    assert bits(model) == before
    assert np.array_equal(model(expect["input_ids"]).numpy(), unmerged)
    plain = model.merge_and_unload(tied=tied)
    assert [n for n, _ in plain.named_parameters()] == [
        n for n, _ in CausalLM(plain.config).named_parameters()
    ]
    assert_close(plain(expect["input_ids"]).numpy(), expect["logits_merged"], DTYPES[dtype][0])


def test_merging_into_an_embedding_whose_weight_the_head_has_too_must_say_which_of_the_two_is_meant() -> (
    None
):
    expect = load_file(GOLDEN / "gpt2--lora_wte" / "expect.safetensors")
    assert 8.8 < np.abs(expect["logits_merged"] - expect["logits"]).max() < 9
    model = adapted("gpt2--lora_wte")
    before = bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=r"tied='untie'.*tied='share'.*and so the output"):
            merge()
        assert bits(model) == before
    assert_close(model(expect["input_ids"]).numpy(), expect["logits"], 1e-10)
    plain = model.merge_and_unload(tied="untie")
    assert plain.config.tie_word_embeddings is False
    assert_close(plain(expect["input_ids"]).numpy(), expect["logits"], 1e-10)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_saved_again_is_the_file_that_peft_wrote(name: str, tmp_path: Path) -> None:
    adapted(name, "float32").save_pretrained(tmp_path)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, GOLDEN / name)
    )
    assert {a.dtype for a in ours.values()} == {a.dtype for a in theirs.values()}
    assert {k: a.tobytes() for k, a in ours.items()} == {k: a.tobytes() for k, a in theirs.items()}
    written, original = (
        json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, GOLDEN / name)
    )
    assert written == original


@pytest.mark.parametrize("name", BASES)
def test_a_base_saved_again_is_the_file_that_transformers_wrote(name: str, tmp_path: Path) -> None:
    CausalLM.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / name))
    assert {k: a.tobytes() for k, a in ours.items()} == {k: a.tobytes() for k, a in theirs.items()}
    written, original = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path, GOLDEN / name)
    )
    assert written == original
