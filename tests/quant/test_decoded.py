"""DecodedCheckpoint: floats in the place of codes, the numbers that the model computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import shape

from minilora import CausalLM, QuantizedLinear, quantize
from minilora.errors import FormatError
from minilora.formats import Checkpoint, load_file, read_json, save_file
from minilora.formats.checkpoint import to_file_layout
from minilora.quant.bitsandbytes import read_quantization_config
from minilora.quant.decoded import DecodedCheckpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "bitsandbytes" / "llama--nf4"


def decoded(folder: Path) -> DecodedCheckpoint:
    config = read_json(folder / "config.json")
    scheme = read_quantization_config(config["quantization_config"])
    return DecodedCheckpoint(folder, config["model_type"], scheme)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights that a model of codes computes with, as its type's files hold them."""
    model: Any = CausalLM.from_pretrained(folder)
    result = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            key = f"{path}.weight"
            result[key] = to_file_layout(model.config.model_type, key, module.dense_weight())
    return result


@pytest.mark.parametrize("kind", ["llama", "gpt2", "golden"])
@pytest.mark.parametrize("double", [True, False])
def test_decoded_checkpoint_has_the_weights_that_the_model_computes_with(tmp_path, kind, double):
    folder = GOLDEN
    if kind != "golden":
        folder = tmp_path
        model = CausalLM(shape(kind, initializer_range=0.4), seed=1)
        quantize(model, "nf4", double_quant=double).save_pretrained(folder)
    expected = weights(folder)
    assert expected
    with Checkpoint(folder) as stored, decoded(folder) as checkpoint:
        beside = {key for key in stored if ".weight." in key}
        assert set(checkpoint) == set(stored) - beside
        assert sorted(*checkpoint.shards.values()) == sorted(checkpoint)
        checkpoint.require_floats(checkpoint)
        for key in checkpoint:
            if key not in expected:
                assert checkpoint.read_bytes(key).tobytes() == stored.read_bytes(key).tobytes()
                assert checkpoint.dtype(key) == stored.dtype(key)
                continue
            W = expected[key]
            assert (checkpoint.dtype(key), checkpoint.shape(key)) == ("F32", W.shape)
            for array in (checkpoint.read(key), checkpoint.read_bits(key)):
                assert array.dtype == np.float32
                assert array.tobytes() == W.tobytes()
            assert checkpoint.read_bytes(key).tobytes() == W.tobytes()
            assert checkpoint.read(key, np.float64).dtype == np.float64


def test_decoded_checkpoint_refuses_another_scheme_and_damaged_layers(tmp_path):
    quantize(CausalLM(shape("llama"), seed=1), "nf4").save_pretrained(tmp_path)
    scheme = read_quantization_config(read_json(tmp_path / "config.json")["quantization_config"])
    with DecodedCheckpoint(tmp_path, "llama", scheme._replace(kind="fp4")) as checkpoint:
        key = next(key for key in checkpoint if key.endswith("q_proj.weight"))
        with pytest.raises(
            FormatError, match=r"q_proj is nf4 with .* quantization_config says fp4"
        ):
            checkpoint.read(key)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tmp_path / "model.safetensors", {**tensors, key: tensors[key][1:]})
    with pytest.raises(FormatError, match=r"q_proj: the codes are .* too many or too few for \("):
        decoded(tmp_path)
    save_file(tmp_path / "model.safetensors", {"a.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(FormatError, match=r"quantization_config says nf4 .* no layer is stored so"):
        decoded(tmp_path)


def test_read_rows_of_codes_has_the_rows_of_read_bits() -> None:
    with decoded(GOLDEN) as checkpoint:
        for key in checkpoint.keys():
            bits = checkpoint.read_bits(key)
            assert np.array_equal(checkpoint.read_rows(key, slice(1, 3)), bits[1:3])
