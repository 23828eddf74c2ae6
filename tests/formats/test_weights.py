"""Which tensor of a folder is which parameter: names, transposes, buffers, shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import bits, randomised, shape

from minilora import CausalLM, LoraConfig, PeftModel, QuantizedLinear, get_peft_model, quantize
from minilora.errors import ConfigError, FormatError
from minilora.formats import Entry, bf16_from, load_file, save_file, write_stream
from minilora.formats.checkpoint import FAN_IN_FAN_OUT, is_stored_transposed, to_file_layout
from minilora.lora.config import DEFAULT_TARGETS
from minilora.models.dialects import MODEL_TYPES

IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])


def saved(folder: Path, kind: str) -> tuple[CausalLM, dict[str, np.ndarray]]:
    """(a model, the tensors of the file that it is saved as)."""
    model = randomised(shape(kind), "float32")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(folder / "model.safetensors", tensors)


def test_save_pretrained_transposes_gpt2_s_layers_even_square_ones(tmp_path: Path) -> None:
    model, tensors = saved(tmp_path, "gpt2")
    assert "lm_head.weight" not in tensors  # it is the embedding
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(tensors)
    # Written out, because FAN_IN_FAN_OUT itself is tested.
    layers = ("c_attn", "c_proj", "c_fc")
    transposed = 0
    for key, array in tensors.items():
        expected = parameters[key].data
        if key.removesuffix(".weight").rpartition(".")[2] in layers:
            expected = expected.T
            transposed += 1
        np.testing.assert_array_equal(array, expected)
    assert transposed == 2 * 4
    square = tensors["transformer.h.0.attn.c_proj.weight"]
    assert square.shape == square.T.shape
    assert not np.array_equal(square, square.T)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    assert bits(CausalLM.from_pretrained(tmp_path)) == bits(model)


TYPES = st.sampled_from([*MODEL_TYPES, "another"])
LAYERS = st.sampled_from(["c_attn", "q_proj", "lm_head", "my_c_attn", "wte"])


@given(TYPES, LAYERS)
def test_to_file_layout_is_its_own_inverse(kind: str, layer: str) -> None:
    array = np.arange(6.0).reshape(2, 3)
    for tensor in ("weight", "bias", "lora_A.weight"):
        key = f"h.0.{layer}.{tensor}"
        stored = to_file_layout(kind, key, array)
        assert stored.flags.c_contiguous
        np.testing.assert_array_equal(to_file_layout(kind, key, stored), array)
        expected = tensor == "weight" and layer in FAN_IN_FAN_OUT.get(kind, ())
        assert (stored.shape != array.shape) == expected == is_stored_transposed(kind, key)
    is_gpt2_layer = kind == "gpt2" and layer == "c_attn"
    assert is_stored_transposed(kind, f"h.0.{layer}.weight") == is_gpt2_layer


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_from_pretrained_reads_keys_with_and_without_the_decoder_s_name(
    tmp_path: Path, kind: str
) -> None:
    model, tensors = saved(tmp_path, kind)
    prefix = "transformer." if kind == "gpt2" else "model."
    rewrite(tmp_path, {key.removeprefix(prefix): array for key, array in tensors.items()})
    again = CausalLM.from_pretrained(tmp_path)
    assert bits(again) == bits(model)
    again.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tensors)
    short = "ln_f.weight" if kind == "gpt2" else "norm.weight"
    tensors[short] = tensors.pop(prefix + short)
    rewrite(tmp_path, tensors)
    with pytest.raises(FormatError, match=f"missing {prefix}{short}; unknown {short}"):
        CausalLM.from_pretrained(tmp_path)


def test_from_pretrained_skips_buffers_of_old_files_and_nothing_else(tmp_path: Path) -> None:
    model, tensors = saved(tmp_path, "gpt2")
    mask = np.ones((1, 1, 32, 32), np.float32)
    buffers = {}
    for i in range(2):
        buffers[f"transformer.h.{i}.attn.bias"] = mask
        buffers[f"transformer.h.{i}.attn.masked_bias"] = mask
    rewrite(tmp_path, {**tensors, **buffers})
    assert bits(CausalLM.from_pretrained(tmp_path)) == bits(model)
    rewrite(tmp_path, {**tensors, "transformer.h.0.attn.c_attn.masks": mask})
    with pytest.raises(FormatError, match=r"unknown transformer\.h\.0\.attn\.c_attn\.masks"):
        CausalLM.from_pretrained(tmp_path)


def test_from_pretrained_refuses_a_weight_that_is_not_transposed(
    tmp_path: Path,
) -> None:
    _, tensors = saved(tmp_path, "gpt2")
    key = "transformer.h.1.attn.c_attn.weight"
    rewrite(tmp_path, {**tensors, key: np.ascontiguousarray(tensors[key].T)})
    message = r"h\.1\.attn\.c_attn\.weight is \(24, 8\), config\.json says \(8, 24\)"
    with pytest.raises(FormatError, match=message):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_from_pretrained_reads_shards_and_names_a_missing_one(tmp_path: Path, kind: str) -> None:
    model, tensors = saved(tmp_path, kind)
    (tmp_path / "model.safetensors").unlink()
    names = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    weight_map = {key: names[i % 3] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: array for key, array in tensors.items() if weight_map[key] == name}
        save_file(tmp_path / name, part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert bits(CausalLM.from_pretrained(tmp_path)) == bits(model)
    (tmp_path / names[1]).unlink()
    with pytest.raises(FormatError, match=f"shard '?{names[1]}'? is missing"):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_from_pretrained_widens_half_precision_exactly(
    tmp_path: Path, kind: str, stored: str
) -> None:
    _, tensors = saved(tmp_path, kind)
    rounded = {}
    entries = []
    for key, array in tensors.items():
        if stored == "BF16":
            half = bf16_from(array)
            wide = (half.astype(np.uint32) << 16).view(np.float32)
        else:
            half = array.astype(np.float16)
            wide = half.astype(np.float32)
        rounded[key] = to_file_layout(kind, key, wide).astype(np.float64)
        entries.append(Entry(key, stored, array.shape, lambda half=half: half))
    write_stream(tmp_path / "model.safetensors", entries)
    for dtype in ("float32", "float64"):
        for name, p in CausalLM.from_pretrained(tmp_path, dtype=dtype).named_parameters():
            assert p.dtype == dtype
            np.testing.assert_array_equal(p.data, rounded[name])


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_save_pretrained_saves_a_merged_quantised_base_as_what_it_computes(
    tmp_path: Path, kind: str
) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = quantize(randomised(shape(kind, hidden_size=32, head_dim=None), "float32").eval())
    merged = get_peft_model(model, config).merge_and_unload()
    merged.save_pretrained(tmp_path)
    np.testing.assert_array_equal(CausalLM.from_pretrained(tmp_path)(IDS).data, merged(IDS).data)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_from_pretrained_reads_codes_without_transposing_them(tmp_path: Path, kind: str) -> None:
    """bitsandbytes codes GPT-2's layers as (out, in), too."""
    model = quantize(randomised(shape(kind, hidden_size=32, head_dim=None), "float32").eval())
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    codes = {}
    for path, layer in again.named_modules():
        if isinstance(layer, QuantizedLinear):
            codes[path] = layer.weight.quantized.codes
    assert codes
    for path, layer in model.named_modules():
        if path in codes:
            np.testing.assert_array_equal(codes[path], layer.weight.quantized.codes)
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)


# ---- the same in the files of adapters ----


@pytest.mark.parametrize("saved_module", ["attn.c_proj", "mlp", "ln_f", "wpe"])
def test_save_pretrained_stores_a_copied_layer_as_the_base_does(
    tmp_path: Path, saved_module: str
) -> None:
    options = {"modules_to_save": [saved_module], "init_lora_weights": False}
    config = LoraConfig(r=2, target_modules=["c_attn"], **options)
    model = get_peft_model(randomised(shape("gpt2"), "float32"), config)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    copied = {key: array for key, array in file.items() if ".lora_" not in key}
    parameters = model.adapter_parameters("default")
    assert copied
    for key, array in copied.items():
        expected = parameters[key].data
        if key.endswith(("c_proj.weight", "c_fc.weight")):
            expected = expected.T
        np.testing.assert_array_equal(array, expected)
    again = PeftModel.from_pretrained(randomised(shape("gpt2"), "float32", seed=0), tmp_path)
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_lora_config_default_targets_and_fan_in_fan_out_follow_the_type(
    tmp_path: Path, kind: str
) -> None:
    model = get_peft_model(randomised(shape(kind), "float32"), LoraConfig(r=2))
    assert model.peft_config["default"].target_modules == DEFAULT_TARGETS[kind]
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] == (kind == "gpt2")
    shapes = {
        key.split(".h.0.")[1]: a.shape for key, a in model.state_dict().items() if ".h.0." in key
    }
    if kind == "gpt2":
        assert shapes == {"attn.c_attn.lora_A.weight": (2, 8), "attn.c_attn.lora_B.weight": (24, 2)}
    again = LoraConfig(r=2, fan_in_fan_out=True)
    if kind == "gpt2":
        get_peft_model(randomised(shape(kind)), again)
    else:
        with pytest.warns(UserWarning, match="fan_in_fan_out is for layers whose files store W as"):
            get_peft_model(randomised(shape(kind)), again)


def test_get_peft_model_all_linear_leaves_out_the_head() -> None:
    model = randomised(shape("gpt2"), "float32")
    everything = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).state_dict()
    assert len(everything) == 2 * 2 * 4  # A and B, two blocks, four layers each: not the head


def test_get_peft_model_skips_targets_inside_a_module_to_save() -> None:
    """PEFT's files for "all-linear" name such targets, and load."""
    inside = [f"transformer.h.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]
    config = LoraConfig(r=2, target_modules=["c_attn", *inside], modules_to_save=["mlp"])
    model = get_peft_model(randomised(shape("gpt2"), "float32"), config)
    paths = [key.split(".lora_")[0] for key in model.state_dict() if ".lora_" in key]
    assert {path.rpartition(".")[2] for path in paths} == {"c_attn"}
    config = LoraConfig(r=2, target_modules=["c_attn", "c_gate"])
    with pytest.raises(ConfigError, match="'c_gate' match nothing"):
        get_peft_model(randomised(shape("gpt2")), config)
