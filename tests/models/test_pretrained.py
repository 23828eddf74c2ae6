"""A model's folder with layers of four bits: as transformers and bitsandbytes write it, read, and written again.

What a folder of dense tensors may hold, and what of it is refused, is in test_checkpoint.py and test_transformer.py.
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


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


# ---- what transformers wrote ----


def test_a_folder_that_transformers_wrote_has_the_logits_that_it_has_there() -> None:
    model, expected = CausalLM.from_pretrained(FOLDER), load_file(FOLDER / "logits.safetensors")
    rows = quantization_report(model)
    assert [row.kind for row in rows] == ["nf4"] * 7
    found = model(expected["ids"]).numpy()
    assert np.abs(found - expected["logits"]).max() <= 1e-5 * np.abs(found).max()


def test_it_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    CausalLM.from_pretrained(FOLDER).save_pretrained(tmp_path)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (FOLDER, tmp_path))
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert (ours[key].dtype, ours[key].shape, ours[key].tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )
    written = said(tmp_path)
    assert written.pop("llm_int8_skip_modules") == [
        "lm_head"
    ]  # null there: its output layer, by default
    assert written.items() <= said(FOLDER).items()


# ---- what is written here ----


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_as_it_was(
    tmp_path: Path, kind: str, double_quant: bool, dtype: str, tied: bool
) -> None:
    skip = ["lm_head", "layers.1.mlp.up_proj"]
    model = quantize(base(dtype, tie_word_embeddings=tied), kind, 32, double_quant, skip)
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path, dtype)
    assert bits(again) == bits(model)
    assert logits(again).tobytes() == logits(model).tobytes()
    assert [row[:5] for row in quantization_report(again)] == [
        row[:5] for row in quantization_report(model)
    ]
    assert not any(m.training for _, m in again.named_modules())
    moved = CausalLM.from_pretrained(tmp_path, dtype, STRICT)
    assert {p.backend for p in moved.parameters()} == {STRICT}
    assert bits(moved) == bits(model)
    wide = CausalLM.from_pretrained(tmp_path, "float64")
    assert {p.dtype for p in wide.parameters()} == {np.dtype("float64")}


def test_a_head_of_codes_and_adapters_over_a_folder(tmp_path: Path) -> None:
    quantize(base(), skip=()).save_pretrained(tmp_path / "base")
    assert said(tmp_path / "base")["llm_int8_skip_modules"] == []
    options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    made = get_peft_model(CausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**options))  # type: ignore[arg-type]
    made.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        CausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert logits(again).tobytes() == logits(made).tobytes()
    merged = made.merge_and_unload(requantize=True)
    merged.save_pretrained(tmp_path / "codes")
    assert (
        logits(CausalLM.from_pretrained(tmp_path / "codes")).tobytes() == logits(merged).tobytes()
    )


def test_a_model_that_is_dense_again_does_not_say_otherwise(tmp_path: Path) -> None:
    quantize(base()).save_pretrained(tmp_path / "codes")
    model = CausalLM.from_pretrained(tmp_path / "codes")
    expected = logits(model)
    dequantize(model).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = CausalLM.from_pretrained(tmp_path / "dense")
    assert not quantization_report(again)
    assert logits(again).tobytes() == expected.tobytes()


def test_int8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = quantize(base(), "int8")
    model.model.layers[0].mlp = (
        quantize(base()).model.layers[0].mlp
    )  # not the first layer that is asked
    with pytest.raises(ConfigError, match=r"q_proj is int8: .* dequantize first"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    dequantize(model).save_pretrained(tmp_path / "new")


# ---- what is refused ----


def _config(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda config, tensors: config["quantization_config"].update(changes)


def _tensors(
    change: Callable[[dict[str, Any]], Any],
) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda config, tensors: change(tensors)


def _reshaped(tensors: dict[str, Any]) -> None:
    text = tensors[STATE].tobytes().replace(b"[24, 16]", b"[16, 24]")
    tensors[STATE] = np.frombuffer(text, np.uint8)


def _all_dense(tensors: dict[str, Any]) -> None:
    tensors.clear()
    tensors.update({name: p.numpy() for name, p in base().named_parameters()})


UP = r"model\.layers\.0\.mlp\.up_proj"
REFUSED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "gptq": (_config(quant_method="gptq"), ConfigError, "only the 4 bits of bitsandbytes are read"),
    "8 bits": (_config(load_in_8bit=True, load_in_4bit=False), ConfigError, "load_in_8bit must be false"),
    "no object": (lambda c, t: c.update(quantization_config=True), ConfigError, "must be an object"),
    "not said": (lambda c, t: c.pop("quantization_config"), FormatError, r"unknown .*weight\.absmax"),
    "said and not done": (_tensors(_all_dense), FormatError, "quantization_config says nf4 with double .* no linear"),
    "another kind": (_config(bnb_4bit_quant_type="fp4"), FormatError, "q_proj is nf4 with double quantisation, quant"),
    "another way": (_config(bnb_4bit_use_double_quant=False), FormatError, "quantization_config says nf4$"),
    "codes missing": (_tensors(lambda t: t.pop(CODES)), FormatError, f"{UP}: missing weight"),
    "state missing": (_tensors(lambda t: t.pop(STATE)), FormatError, f"{UP}: expected one weight.quant_state"),
    "something else": (_tensors(lambda t: t.update({CODES + ".x": t[STATE]})), FormatError, f"{UP}: unknown"),
    "bias missing": (_tensors(lambda t: t.pop(BIAS)), FormatError, f"missing {BIAS}"),
    "a norm of codes": (_tensors(lambda t: t.update({"model.norm.weight.x": t[STATE]})), FormatError, "unknown model"),
    "shape": (_tensors(_reshaped), FormatError, rf"{UP} is \(16, 24\), config.json says \(24, 16\)"),
    "tied": (lambda c, t: (c.update(tie_word_embeddings=True), t.update({"lm_head.weight.absmax": t[STATE]})),
             FormatError, r"unknown lm_head\.weight\.absmax"),
    "far too large": (lambda c, t: c.update(vocab_size=10**9), FormatError, "config.json describes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    change, kind, message = REFUSED[case]
    quantize(base()).save_pretrained(tmp_path)
    config, tensors = (
        json.loads((tmp_path / "config.json").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tmp_path / "model.safetensors", tensors)
    before = snapshot(tmp_path)
    with pytest.raises(kind, match=message):
        CausalLM.from_pretrained(tmp_path)
    assert snapshot(tmp_path) == before
