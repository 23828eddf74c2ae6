"""Every row of variations.py beside transformers, and every field that its classes know."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import close, logits, randomise, torch, transformers
from variations import BASES, CONTEXT, SETTINGS, VARIATIONS, Variation, word

from minilora import CausalLM, TransformerConfig
from minilora.errors import ConfigError
from minilora.models.dialects import DIALECTS, knadded_fields

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
IDS = np.arange(3, 67).reshape(1, -1) % 64  # more positions than the old context of 32
Weights = dict[Any, tuple[Any, Path]]  # transformers' tensors and their file, by names and shapes


@pytest.fixture(scope="module")
def weights() -> Weights:
    return {}


@pytest.fixture(autouse=True)
def _without_fsync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(60)  # it logs a warning for many of these files
    yield
    transformers.logging.set_verbosity(verbosity)


def their_logits(folder: Path, weights: Weights) -> np.ndarray:
    """The logits of transformers' model of folder/config.json.

    Models of the same shapes have the same weights; the folder gets a link to their file. Rotary
    positions are computed in `torch.float`, which means float64 here: in float32 their rounding
    comes to 1e-5.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    config.dtype = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        return _logits_with(weights, model, folder)


def _logits_with(weights: Weights, model: Any, folder: Path) -> np.ndarray:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    config = model.config
    key = (config.model_type, config.tie_word_embeddings, shapes)
    if key not in weights:
        randomise(model.parameters())
        model.save_pretrained(folder / "weights")
        weights[key] = model.state_dict(), folder / "weights" / "model.safetensors"
    tensors, file = weights[key]
    model.load_state_dict(tensors)
    os.link(file, folder / "model.safetensors")
    return logits(model.double(), IDS, use_cache=False)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("variation", [row for row in VARIATIONS if not row.refused], ids=str)
def test_from_dict_means_what_transformers_makes_of_a_config(
    variation: Variation, weights: Weights, tmp_path: Path
) -> None:
    expected = their_logits(write(tmp_path / "theirs", variation.config), weights)
    ours = CausalLM.from_pretrained(tmp_path / "theirs", dtype="float64")
    assert close(ours(IDS).data, expected)
    # What is written means the same to both, and keeps what was not understood.
    written = ours.config.to_dict()
    again = their_logits(write(tmp_path / "again", written), weights)
    assert np.array_equal(again, expected)
    assert TransformerConfig.from_dict(written).to_dict() == written
    unread = set(variation.fields) - knadded_fields(variation.kind)
    assert {name: written[name] for name in unread} == {
        name: variation.fields[name] for name in unread
    }


def test_variations_are_many_and_differ(weights: Weights, tmp_path: Path) -> None:
    """A table whose rows all gave the same logits would prove nothing."""
    rows = [row for row in VARIATIONS if row.refused is None]
    assert len(rows) >= 100
    assert len(VARIATIONS) - len(rows) >= 100
    distinct = set()
    for number, setting in enumerate(SETTINGS):
        row = Variation("llama", word(setting, 500.0, 0))
        found = their_logits(write(tmp_path / str(number), row.config), weights)
        distinct.add(found.tobytes())
    assert len(distinct) >= 15  # the others say in other words what one of these says


# ---- more positions than max_position_embeddings -------------------------------------------------

LONG_IDS = np.arange(300).reshape(1, -1) * 7 % 64
BEYOND = [setting for setting in SETTINGS if setting["rope_type"] in ("linear", "yarn")]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("setting", BEYOND, ids=str)
def test_causal_lm_reads_the_stretched_context_as_transformers_does(
    setting: dict[str, Any], kind: str, weights: Weights, tmp_path: Path
) -> None:
    """max_position_embeddings is 128."""
    variation = Variation(kind, {"rope_scaling": setting, "rope_theta": 500.0})
    folder = write(tmp_path / "theirs", variation.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_parity_config.IDS", LONG_IDS)
        expected = their_logits(folder, weights)
        ours = CausalLM.from_pretrained(folder, dtype="float64")
    count = min(ours.config.context, LONG_IDS.shape[1])
    factor = setting["factor"] or 1
    if setting["rope_type"] == "linear":
        assert ours.config.context == max(CONTEXT, int(CONTEXT * factor))
    assert close(ours(LONG_IDS[:, :count]).data, expected[:, :count])


# ---- the fields of transformers' classes --------------------------------------------------------


def their_fields(kind: str) -> set[str]:
    """Every field that transformers' class of this type has, or that its code reads from it."""
    cls = type(transformers.AutoConfig.for_model(kind, **BASES[kind]))
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    names |= set(transformers.GenerationConfig._get_default_generation_params())
    start = inspect.getsource(transformers.PreTrainedConfig.__post_init__)
    names |= set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', start))
    if kind == "gpt2":
        names -= {"rope_scaling", "rope_theta"}  # of classes with rotary positions
    return names


@pytest.mark.parametrize("kind", DIALECTS)
def test_knadded_fields_are_all_that_the_class_of_transformers_knows(kind: str) -> None:
    assert their_fields(kind) - knadded_fields(kind) == set()


def test_from_dict_refuses_what_the_class_of_transformers_cannot_set() -> None:
    cls = transformers.LlamaConfig
    members = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    properties = {name: m for name, m in members.items() if isinstance(m, property)}
    fixed = [name for name, member in properties.items() if member.fset is None]
    assert fixed
    for name in fixed:
        config = Variation("llama", {name: None}).config
        with pytest.raises(AttributeError):
            cls.from_dict(dict(config))
        with pytest.raises(ConfigError, match=f"{name} must be left out"):
            TransformerConfig.from_dict(config)
