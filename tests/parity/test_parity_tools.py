"""The tools beside peft: its merge writes the same tensors, and it loads what the tools write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_golden
import numpy as np
import pytest
from mlx_golden import GOLDEN
from peers import (
    close,
    load_model,
    load_theirs,
    logits,
    make_theirs,
    randomise,
    torch,
    trainable,
)

from minilora.formats import load_file
from minilora.tools.converting import convert
from minilora.tools.factoring import extract, resize
from minilora.tools.merging import merge

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
ADAPTERS = sorted(file.parent.name for file in GOLDEN.glob("*/adapter_config.json"))
ADAPTERS.remove("gpt2--lora_wte")
IDS = np.arange(11)[None]


def base_of(adapter: str) -> Path:
    return GOLDEN / adapter.partition("--")[0]


# ---- merging ----


def compare_merges(base: Path, adapter: Path, theirs: Any, folder: Path) -> dict[str, np.ndarray]:
    """Our merged tensors, each compared with peft's."""
    theirs.merge_and_unload().save_pretrained(folder / "theirs")
    merge(base, [adapter], folder / "ours")
    tensors = load_file(folder / "ours" / "model.safetensors")
    expected = load_file(folder / "theirs" / "model.safetensors")
    assert set(tensors) == set(expected)
    for key, array in expected.items():
        assert close(tensors[key], array, 1e-6)
    return dict(tensors)


def save_random(base: Path, options: dict[str, Any], adapter: Path) -> Any:
    """peft's model with a random adapter, which is saved to the folder `adapter`."""
    theirs = make_theirs(load_model(base), options).double()
    randomise(trainable(theirs).values())
    theirs.save_pretrained(adapter)
    return theirs


@pytest.mark.parametrize("name", ADAPTERS)
def test_merge_writes_the_tensors_of_peft(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    theirs = load_theirs(load_model(base), GOLDEN / name).double()
    compare_merges(base, GOLDEN / name, theirs, tmp_path)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_merge_of_dora_on_an_embedding_writes_the_tensors_of_peft(
    targets: list[str], tmp_path: Path
) -> None:
    base = GOLDEN / "llama"
    options = {"r": 2, "lora_alpha": 3, "target_modules": targets, "use_dora": True}
    theirs = save_random(base, options, tmp_path / "adapter")
    tensors = compare_merges(base, tmp_path / "adapter", theirs, tmp_path)
    changed = set()
    for key, W in load_file(base / "model.safetensors").items():
        if not close(tensors[key], W, 1e-3):
            changed.add(key.split(".")[-2])
    assert changed == {*targets}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("saved", ["gpt2 ln_f", "gpt2 mlp", "qwen2 k_proj", "qwen2 attn"])
def test_merge_takes_the_biases_of_a_saved_module_as_peft(
    saved: str, bias: str, tmp_path: Path
) -> None:
    """With bias="all", the file has the biases of a module that is saved whole once more."""
    kind, module = saved.split()
    target = {"gpt2": "c_attn", "qwen2": "up_proj"}[kind]
    if module == "k_proj":
        target = "q_proj"
    options = {"r": 2, "target_modules": [target], "modules_to_save": [module], "bias": bias}
    options["task_type"] = "CAUSAL_LM"
    adapter = tmp_path / "adapter"
    theirs = save_random(GOLDEN / kind, options, adapter)
    keys = load_file(adapter / "adapter_model.safetensors")
    again = [key for key in keys if ".original_module." in key]
    assert bool(again) == (bias == "all")
    compare_merges(GOLDEN / kind, adapter, theirs, tmp_path)


# ---- what the other tools write ----


def file_logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Their logits in float64; every tensor of the adapter must have a place."""
    model = load_model(base)
    if adapter is not None:
        model = load_theirs(model, adapter)
        loaded = model.load_adapter(adapter, "default")
        assert not loaded.unexpected_keys
        assert not [key for key in loaded.missing_keys if "lora_" in key]
    return logits(model.eval().double(), IDS)


RESIZED = ["llama--lora", "llama--adalora", "llama--dora", "llama--patterns", "gpt2--lora"]
EXTRACTED = ["llama--lora", "llama--save_head", "gpt2--lora", "qwen3--lora"]
CONVERTED = ["llama--lora", "llama--dora", "llama--rslora_all", "mistral--lora"]


@pytest.mark.parametrize("name", RESIZED)
def test_resize_writes_an_adapter_that_peft_loads(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    resize(GOLDEN / name, 8, tmp_path / "out")
    assert close(file_logits(base, tmp_path / "out"), file_logits(base, GOLDEN / name), 1e-5)


@pytest.mark.parametrize("name", EXTRACTED)
def test_extract_writes_an_adapter_that_peft_loads(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    merge(base, [GOLDEN / name], tmp_path / "tuned")
    extract(base, tmp_path / "tuned", 4, tmp_path / "out")
    assert close(file_logits(base, tmp_path / "out"), file_logits(tmp_path / "tuned"), 1e-5)


@pytest.mark.parametrize("name", ["llama_tied_llama3rope", "gpt2"])
def test_extract_of_a_tied_model_tuned_in_full_writes_an_adapter_that_peft_loads(
    name: str, tmp_path: Path
) -> None:
    tuned = load_model(GOLDEN / name, "float32")
    for p in tuned.parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 8
    tuned.save_pretrained(tmp_path / "tuned")
    extract(GOLDEN / name, tmp_path / "tuned", 16, tmp_path / "out")
    assert close(file_logits(GOLDEN / name, tmp_path / "out"), file_logits(tmp_path / "tuned"))


@pytest.mark.parametrize("name", CONVERTED)
def test_convert_to_mlx_and_back_writes_an_adapter_that_peft_loads(
    name: str, tmp_path: Path
) -> None:
    base = base_of(name)
    convert(GOLDEN / name, tmp_path / "mlx", to="mlx")
    convert(tmp_path / "mlx", tmp_path / "peft", to="peft")
    assert close(file_logits(base, tmp_path / "peft"), file_logits(base, GOLDEN / name), 1e-10)


@pytest.mark.parametrize("name", sorted(mlx_golden.CASES.keys() - {*mlx_golden.REFUSED}))
def test_convert_from_mlx_gives_peft_the_logits_of_mlx(name: str, tmp_path: Path) -> None:
    convert(mlx_golden.FOLDER / name, tmp_path / "peft", to="peft")
    base = GOLDEN / mlx_golden.CASES[name][0]
    expected = np.load(mlx_golden.FOLDER / name / "logits.npy")
    # The file has no factors of a tied head, which file_logits would miss.
    model = load_theirs(load_model(base), tmp_path / "peft").double()
    assert close(logits(model, mlx_golden.IDS)[0], expected, 1e-5)
