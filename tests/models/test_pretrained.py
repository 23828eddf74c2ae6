"""A model's folder with layers of 4 bits: as transformers writes it, read, and written again.

Folders of dense tensors are in test_checkpoint.py and test_transformer.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bitsandbytes_golden import FOLDER
from harness import snapshot
from small import base, bits, logits
from strict_xp import STRICT

from minilora import LoraConfig, PeftModel, get_peft_model
from minilora.errors import ConfigError, FormatError
from minilora.formats import load_file, save_file
from minilora.models.transformer import CausalLM
from minilora.quant import dequantize, quantization_report, quantize

CODES = "model.layers.0.mlp.up_proj.weight"
STATE = CODES + ".quant_state.bitsandbytes__nf4"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def quantization_of(folder: Path) -> dict[str, Any] | None:
    fields = json.loads((folder / "config.json").read_text())
    return fields.get("quantization_config")  # type: ignore[no-any-return]


def same_logits(one: Any, other: Any) -> bool:
    return logits(one).tobytes() == logits(other).tobytes()


# ---- what transformers wrote --------------------------------------------------------------------


def test_from_pretrained_has_the_logits_of_transformers() -> None:
    model = CausalLM.from_pretrained(FOLDER)
    golden = load_file(FOLDER / "logits.safetensors")
    assert [row.kind for row in quantization_report(model)] == ["nf4"] * 7
    found = model(golden["ids"]).numpy()
    assert np.abs(found - golden["logits"]).max() <= 1e-5 * np.abs(found).max()


def test_save_pretrained_repeats_what_transformers_wrote(tmp_path: Path) -> None:
    CausalLM.from_pretrained(FOLDER).save_pretrained(tmp_path)
    theirs = load_file(FOLDER / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype
        assert ours[key].shape == array.shape
        assert ours[key].tobytes() == array.tobytes()
    written = quantization_of(tmp_path)
    # null there, which means the output layer
    assert written.pop("llm_int8_skip_modules") == ["lm_head"]
    assert written.items() <= quantization_of(FOLDER).items()


# ---- what is written here -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_gives_the_quantised_model_that_was_saved(
    tmp_path: Path, kind: str, double_quant: bool, dtype: str, tied: bool
) -> None:
    skip = ["lm_head", "layers.1.mlp.up_proj"]
    model = quantize(base(dtype, tie_word_embeddings=tied), kind, 32, double_quant, skip)
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path, dtype)
    assert bits(again) == bits(model)
    assert same_logits(again, model)
    for ours, saved in zip(quantization_report(again), quantization_report(model), strict=True):
        assert ours[:5] == saved[:5]
    assert not any(m.training for _, m in again.named_modules())
    moved = CausalLM.from_pretrained(tmp_path, dtype, STRICT)
    assert {p.backend for p in moved.parameters()} == {STRICT}
    assert bits(moved) == bits(model)
    wide = CausalLM.from_pretrained(tmp_path, "float64")
    assert {p.dtype for p in wide.parameters()} == {np.dtype("float64")}


def test_from_pretrained_takes_a_quantised_head_and_adapters_over_it(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    quantize(base(), skip=()).save_pretrained(folder)
    assert quantization_of(folder)["llm_int8_skip_modules"] == []
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    made = get_peft_model(CausalLM.from_pretrained(folder), config)
    made.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(CausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert same_logits(again, made)
    merged = made.merge_and_unload(requantize=True)
    merged.save_pretrained(tmp_path / "codes")
    assert same_logits(CausalLM.from_pretrained(tmp_path / "codes"), merged)


def test_save_pretrained_of_a_dequantised_model_has_no_quantization_config(tmp_path: Path) -> None:
    quantize(base()).save_pretrained(tmp_path / "codes")
    model = CausalLM.from_pretrained(tmp_path / "codes")
    expected = logits(model)
    dequantize(model).save_pretrained(tmp_path / "dense")
    assert quantization_of(tmp_path / "dense") is None
    again = CausalLM.from_pretrained(tmp_path / "dense")
    assert not quantization_report(again)
    assert logits(again).tobytes() == expected.tobytes()


def test_save_pretrained_refuses_int8_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    model = quantize(base(), "int8")
    # not the first layer that is looked at
    model.model.layers[0].mlp = quantize(base()).model.layers[0].mlp
    with pytest.raises(ConfigError, match=r"q_proj is int8: .* dequantize first"):
        model.save_pretrained(folder)
    assert not folder.exists()
    dequantize(model).save_pretrained(folder)


# ---- what is refused ----------------------------------------------------------------------------

Change = Callable[[dict[str, Any], dict[str, Any]], Any]  # of the config and the tensors
REFUSED: dict[str, tuple[Change, type[Exception], str]] = {}


def scheme(case: str, error: type[Exception], message: str, **changes: Any) -> None:
    """Changes to the quantization_config."""
    REFUSED[case] = (lambda c, t: c["quantization_config"].update(changes), error, message)


def config(case: str, message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    REFUSED[case] = (lambda c, t: change(c), FormatError, message)


def tensors(case: str, message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    REFUSED[case] = (lambda c, t: change(t), FormatError, message)


def transpose_the_shape(tensors: dict[str, Any]) -> None:
    text = tensors[STATE].tobytes().replace(b"[24, 16]", b"[16, 24]")
    tensors[STATE] = np.frombuffer(text, np.uint8)


def make_all_dense(tensors: dict[str, Any]) -> None:
    tensors.clear()
    for name, p in base().named_parameters():
        tensors[name] = p.numpy()


def tie_a_quantised_head(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight.absmax"] = tensors[STATE]


UP = r"model\.layers\.0\.mlp\.up_proj"
only_4_bits = "only bitsandbytes' 4 bits, nf4 and fp4, can be read"
scheme("gptq", ConfigError, only_4_bits, quant_method="gptq")
not_8_bits = "load_in_8bit must be false"
scheme("8 bits", ConfigError, not_8_bits, load_in_8bit=True, load_in_4bit=False)
fp4 = "q_proj is nf4 with double quantisation, quant"
scheme("another kind", FormatError, fp4, bnb_4bit_quant_type="fp4")
single = "quantization_config says nf4$"
scheme("another scheme", FormatError, single, bnb_4bit_use_double_quant=False)
REFUSED["no object"] = (
    lambda c, t: c.update(quantization_config=True),
    ConfigError,
    "must be an object",
)
config("not said", r"unknown .*weight\.absmax", lambda c: c.pop("quantization_config"))
config("far too large", "config.json describes", lambda c: c.update(vocab_size=10**9))
all_dense = "quantization_config says nf4 with double .* no linear"
tensors("said and not done", all_dense, make_all_dense)
tensors("codes missing", f"{UP}: missing weight", lambda t: t.pop(CODES))
tensors("state missing", f"{UP}: expected one weight.quant_state", lambda t: t.pop(STATE))
tensors("something else", f"{UP}: unknown", lambda t: t.update({CODES + ".x": t[STATE]}))
tensors("bias missing", f"missing {BIAS}", lambda t: t.pop(BIAS))
norm = "model.norm.weight.x"
tensors("a norm of codes", "unknown model", lambda t: t.update({norm: t[STATE]}))
tensors("shape", rf"{UP} is \(16, 24\), config.json says \(24, 16\)", transpose_the_shape)
tied = r"unknown lm_head\.weight\.absmax"
REFUSED["tied"] = (tie_a_quantised_head, FormatError, tied)


@pytest.mark.parametrize("case", REFUSED)
def test_from_pretrained_refuses_a_folder_that_contradicts_itself(
    case: str, tmp_path: Path
) -> None:
    change, error, message = REFUSED[case]
    quantize(base()).save_pretrained(tmp_path)
    config_file = tmp_path / "config.json"
    weights_file = tmp_path / "model.safetensors"
    fields = json.loads(config_file.read_text())
    arrays = load_file(weights_file)
    change(fields, arrays)
    config_file.write_text(json.dumps(fields))
    save_file(weights_file, arrays)
    before = snapshot(tmp_path)
    with pytest.raises(error, match=message):
        CausalLM.from_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


# ---- a tied flag that the weights contradict ----


def test_from_pretrained_unties_a_head_that_differs_and_saves_it_so(tmp_path: Path) -> None:
    base(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    config_file = tmp_path / "base" / "config.json"
    fields = json.loads(config_file.read_text())
    expected = logits(CausalLM.from_pretrained(tmp_path / "base"))
    config_file.write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    says = r"tie_word_embeddings is true in config\.json, but lm_head\.weight differs from model"
    for stored in (False, True):
        with pytest.warns(UserWarning, match=says):
            model = CausalLM.from_pretrained(tmp_path / "base", stored=stored)
        assert logits(model).tobytes() == expected.tobytes()
        assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "again")
    assert logits(CausalLM.from_pretrained(tmp_path / "again")).tobytes() == expected.tobytes()
