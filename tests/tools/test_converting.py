"""convert: another dtype, and adapters from and to mlx-lm's files, beside what mlx-lm itself
trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_golden
import numpy as np
import pytest
from hostile import split
from small import SMALLER
from tool_files import GOLDEN, WEIGHTS, as_bytes, base_of, deltas, logits

from minilora import CausalLM, dequantize, quantize
from minilora.errors import ConfigError, FormatError
from minilora.formats import (
    Checkpoint,
    bf16_from,
    bf16_to_float32,
    dtypes,
    load_file,
    read_adapter,
    read_json,
    save_file,
    write_adapter,
    write_json,
)
from minilora.lora import LoraConfig, get_peft_model
from minilora.lora.files.adapter import AdapterFile
from minilora.tools.converting import convert

ROUND_TRIPS = ["llama--lora", "llama--dora", "llama--regex_layer1", "llama--rslora_all"]
ROUND_TRIPS += ["qwen3--lora", "gpt2--dora_proj"]
MLX_CASES = sorted(mlx_golden.CASES.keys() - {*mlx_golden.REFUSED})


def read_mlx(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return read_json(folder / "adapter_config.json"), load_file(folder / "adapters.safetensors")


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_convert_to_mlx_and_back_restores_every_bit(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "mlx", to="mlx")
    fields, converted = read_mlx(tmp_path / "mlx")
    with AdapterFile(GOLDEN / name) as file:
        for path in file.layers:
            part = file.part(path)
            mlx_path = path.replace("transformer.h", "model.h")
            assert (converted[f"{mlx_path}.lora_a"] == part.A.T).all()
            assert (converted[f"{mlx_path}.lora_b"] == part.B.T).all()
            assert fields["lora_parameters"]["scale"] == part.c
    assert fields["fine_tune_type"] == ("dora" if "dora" in name else "lora")
    convert(tmp_path / "mlx", tmp_path / "peft", to="peft")
    _, before = read_adapter(GOLDEN / name)
    _, after = read_adapter(tmp_path / "peft")
    assert as_bytes(after) == as_bytes(before)
    difference = logits(base_of(name), tmp_path / "peft") - logits(base_of(name), GOLDEN / name)
    assert np.abs(difference).max() < 1e-12


@pytest.mark.filterwarnings("ignore:ensure_weight_tying")
@pytest.mark.parametrize("name", MLX_CASES)
def test_convert_of_what_mlx_lm_trained_has_its_logits_and_comes_back(name, tmp_path):
    trained = mlx_golden.FOLDER / name
    convert(trained, tmp_path / "peft", to="peft")
    base = GOLDEN / mlx_golden.CASES[name][0]
    expected = np.load(trained / "logits.npy")
    got = logits(base, tmp_path / "peft")[0, : len(expected)]
    plain = logits(base)[0, : len(expected)]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(got - plain).max() > 0.1
    if name == "tied-embedding":
        return
    convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    _, before = read_mlx(trained)
    fields, after = read_mlx(tmp_path / "mlx")
    assert as_bytes(after) == as_bytes(before)
    assert ("lm_head" in fields["lora_parameters"]["keys"]) == (name == "head")


def test_convert_refuses_embeddings_that_mean_another_thing_to_mlx(tmp_path):
    peft = tmp_path / "peft"
    message = r"DoRA of model\.embed_tokens has one magnitude per token in mlx-lm"
    with pytest.raises(ConfigError, match=message):
        convert(mlx_golden.FOLDER / "dora-embedding", peft, to="peft")
    message = r"model\.wte: mlx-lm adapts GPT-2's embeddings together with the head"
    with pytest.raises(ConfigError, match=message):
        convert(mlx_golden.FOLDER / "gpt2-embedding", peft, to="peft")
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = CausalLM(replace(SMALLER, tie_word_embeddings=True))
    get_peft_model(model, config).save_pretrained(peft)
    with pytest.raises(ConfigError, match="on linear layers, and nothing else"):
        convert(peft, tmp_path / "mlx", to="mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def write_mlx(folder: Path, a: np.ndarray, b: np.ndarray, **parameters: Any) -> Path:
    folder.mkdir()
    given = {"rank": 2, "scale": 20.0, "dropout": 0.0, **parameters}
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": given}
    write_json(folder / "adapter_config.json", fields)
    path = "model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_a": np.float32(a), f"{path}.lora_b": np.float32(b)}
    save_file(folder / "adapters.safetensors", tensors)
    return folder


def test_convert_transposes_square_factors_too(tmp_path):
    a = np.arange(4.0).reshape(2, 2)
    b = np.arange(4.0, 8).reshape(2, 2)
    convert(write_mlx(tmp_path / "mlx", a, b), tmp_path / "peft", to="peft")
    (dW,) = deltas(tmp_path / "peft").values()
    assert np.abs(dW - 20 * (a @ b).T).max() < 1e-4


@pytest.mark.parametrize(
    ("a", "b", "parameters", "kind"),
    [
        ((2, 5), (2, 5), {}, FormatError),  # lora_a as PEFT has it
        ((5, 2), (5, 2), {}, FormatError),
        ((5, 3), (3, 5), {}, FormatError),  # not the configuration's rank
        ((5, 2), (2, 5), {"rank": 0}, ConfigError),
        ((5, 2), (2, 5), {"scale": None}, ConfigError),
        ((5, 2), (2, 5), {"dropout": 2}, ConfigError),
    ],
)
def test_convert_refuses_factors_that_do_not_fit_the_parameters(a, b, parameters, kind, tmp_path):
    source = write_mlx(tmp_path / "mlx", np.ones(a), np.ones(b), **parameters)
    with pytest.raises(kind):
        convert(source, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


REFUSED = ["llama--patterns", "llama--save_head", "llama--adalora", "gpt2--lora_wte"]


@pytest.mark.parametrize("name", REFUSED)
def test_convert_refuses_what_mlx_cannot_express(name, tmp_path):
    with pytest.raises(ConfigError, match="mlx-lm has"):
        convert(GOLDEN / name, tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()


def test_convert_to_mlx_refuses_an_adapter_without_layers(tmp_path):
    write_adapter(tmp_path / "none", LoraConfig(target_modules=["q_proj"]).to_dict(), {})
    with pytest.raises(ConfigError, match="none' adapts no layer"):
        convert(tmp_path / "none", tmp_path / "out", to="mlx")


def test_convert_refuses_an_unknown_format(tmp_path):
    with pytest.raises(ConfigError, match="--to must be peft or mlx, got 'onnx'"):
        convert(GOLDEN / "llama--lora", tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", dtypes.DTYPES)
@pytest.mark.parametrize("source", ["llama", "llama--lora"])
def test_convert_to_another_dtype_rounds_every_number_once(source, dtype, tmp_path):
    convert(GOLDEN / source, tmp_path / "out", dtype=dtype)
    name = WEIGHTS if source == "llama" else "adapter_model.safetensors"
    before = load_file(GOLDEN / source / name)
    after = load_file(tmp_path / "out" / name)
    assert set(after) == set(before)
    for key, array in before.items():
        if dtype == "bfloat16":
            expected = bf16_to_float32(bf16_from(array))
        else:
            expected = array.astype(dtype)
        assert after[key].dtype == expected.dtype
        assert (after[key] == expected).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_convert_decodes_codes_and_rounds_them_once(tmp_path, dtype):
    codes = tmp_path / "codes"
    quantize(CausalLM(SMALLER, seed=1), "nf4").save_pretrained(codes)
    dequantize(CausalLM.from_pretrained(codes)).save_pretrained(tmp_path / "dense")
    split(codes, 4)
    for name in ("codes", "dense"):
        assert (
            convert(tmp_path / name, tmp_path / f"{name}-out", dtype) == f"a checkpoint in {dtype}"
        )
    config = read_json(tmp_path / "codes-out" / "config.json")
    assert config == read_json(tmp_path / "dense-out" / "config.json")
    results = []
    for name in ("codes-out", "dense-out"):
        with Checkpoint(tmp_path / name) as checkpoint:
            results.append(
                {key: checkpoint.read_bytes(key).tobytes() for key in sorted(checkpoint)}
            )
    assert results[0] == results[1]
    index = read_json(tmp_path / "codes-out" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(results[0])
    assert index["metadata"]["total_size"] == sum(map(len, results[0].values()))
    CausalLM.from_pretrained(tmp_path / "codes-out")


def test_convert_leaves_out_a_shard_of_which_nothing_is_left(tmp_path):
    """One that has nothing but what stood beside codes."""
    codes = tmp_path / "codes"
    quantize(CausalLM(SMALLER, seed=1), "nf4").save_pretrained(codes)
    tensors = load_file(codes / WEIGHTS)
    beside = {key: array for key, array in tensors.items() if ".weight." in key}
    parts = {"a.safetensors": beside}
    parts["b.safetensors"] = {key: tensors[key] for key in tensors if key not in beside}
    (codes / WEIGHTS).unlink()
    weight_map = {}
    for shard, part in parts.items():
        save_file(codes / shard, part)
        weight_map |= dict.fromkeys(part, shard)
    write_json(codes / "model.safetensors.index.json", {"weight_map": weight_map})
    convert(codes, tmp_path / "out", "float16")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        "b.safetensors"
    ]
    CausalLM.from_pretrained(tmp_path / "out")


def test_convert_leaves_a_damaged_layer_of_codes_unwritten(tmp_path):
    codes = tmp_path / "codes"
    quantize(CausalLM(SMALLER, seed=1), "nf4").save_pretrained(codes)
    tensors = load_file(codes / WEIGHTS)
    key = next(key for key in tensors if key.endswith("nested_absmax"))
    save_file(codes / WEIGHTS, {**tensors, key: -tensors[key]})
    with pytest.raises(FormatError, match="nested_absmax is negative"):
        convert(codes, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
