"""The tools beside peft: its own merge gives the same files, and what they write loads there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_golden
import numpy as np
import pytest
from peers import close, peft, randomise, torch, transformers

from minilora.formats import load_file
from minilora.tools.converting import convert
from minilora.tools.factoring import extract, resize
from minilora.tools.merging import merge

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(
    p.name for p in GOLDEN.iterdir() if (p / "adapter_config.json").exists() and "wte" not in p.name
)
IDS = np.arange(11)[None]


def of(adapter: str) -> Path:
    return GOLDEN / adapter.partition("--")[0]


def logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Theirs, in float64; every tensor of the adapter must have found its place."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
        loaded = model.load_adapter(adapter, "default")
        assert not loaded.unexpected_keys
        assert not [key for key in loaded.missing_keys if "lora_" in key]
    with torch.no_grad():
        return model.eval().double()(torch.tensor(IDS)).logits.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_merges_into_the_same_files(name: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(of(name), dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(model, GOLDEN / name).double().merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    merge(of(name), [GOLDEN / name], tmp_path / "ours")
    ours, expected = (
        load_file(tmp_path / "ours/model.safetensors"),
        load_file(tmp_path / "theirs/model.safetensors"),
    )
    assert set(ours) == set(expected)
    for key, array in expected.items():
        assert close(ours[key], array, 1e-6)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_peft_merges_dora_on_an_embedding_into_the_same_files(
    targets: list[str], tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(of("llama"), dtype=torch.float64)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True)
    made = peft.get_peft_model(model, config).double()
    randomise(p for p in made.parameters() if p.requires_grad)
    made.save_pretrained(tmp_path / "adapter")
    made.merge_and_unload().save_pretrained(tmp_path / "theirs")
    merge(of("llama"), [tmp_path / "adapter"], tmp_path / "ours")
    ours, expected = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert set(ours) == set(expected)
    for key, array in expected.items():
        assert close(ours[key], array, 1e-6)
    changed = [
        key
        for key, W in load_file(of("llama") / "model.safetensors").items()
        if not close(ours[key], W, 1e-3)
    ]
    assert {key.split(".")[-2] for key in changed} == {*targets}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize(
    ("base", "target", "saved"),
    [
        ("gpt2", "c_attn", "ln_f"),
        ("gpt2", "c_attn", "mlp"),
        ("qwen2", "q_proj", "k_proj"),
        ("qwen2", "up_proj", "attn"),
    ],
)
def test_biases_of_a_module_that_is_saved_whole_are_in_a_file_again(
    base: str, target: str, saved: str, bias: str, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / base, dtype=torch.float64)
    config = peft.LoraConfig(
        r=2, target_modules=[target], modules_to_save=[saved], bias=bias, task_type="CAUSAL_LM"
    )
    made = peft.get_peft_model(model, config)
    randomise(p for p in made.parameters() if p.requires_grad)
    made.save_pretrained(tmp_path / "adapter")
    again = [
        key
        for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        if ".original_module." in key
    ]
    assert bool(again) == (bias == "all")
    made.merge_and_unload().save_pretrained(tmp_path / "theirs")
    merge(GOLDEN / base, [tmp_path / "adapter"], tmp_path / "ours")
    ours, expected = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert set(ours) == set(expected)
    for key, array in expected.items():
        assert close(ours[key], array, 1e-6)


@pytest.mark.parametrize(
    "name", ["llama--lora", "llama--adalora", "llama--dora", "llama--patterns", "gpt2--lora"]
)
def test_a_resized_adapter_loads_in_peft(name: str, tmp_path: Path) -> None:
    resize(GOLDEN / name, 8, tmp_path / "out")
    assert close(logits(of(name), tmp_path / "out"), logits(of(name), GOLDEN / name), 1e-5)


@pytest.mark.parametrize("name", ["llama--lora", "llama--save_head", "gpt2--lora", "qwen3--lora"])
def test_an_extracted_adapter_loads_in_peft(name: str, tmp_path: Path) -> None:
    merge(of(name), [GOLDEN / name], tmp_path / "tuned")
    extract(of(name), tmp_path / "tuned", 4, tmp_path / "out")
    assert close(logits(of(name), tmp_path / "out"), logits(tmp_path / "tuned"), 1e-5)


@pytest.mark.parametrize(
    "name", ["llama--lora", "llama--dora", "llama--rslora_all", "mistral--lora"]
)
def test_a_converted_adapter_loads_in_peft(name: str, tmp_path: Path) -> None:
    convert(GOLDEN / name, tmp_path / "mlx", to="mlx")
    convert(tmp_path / "mlx", tmp_path / "peft", to="peft")
    assert close(logits(of(name), tmp_path / "peft"), logits(of(name), GOLDEN / name), 1e-10)


@pytest.mark.parametrize("name", sorted(mlx_golden.CASES.keys() - {*mlx_golden.REFUSED}))
def test_what_mlx_lm_trained_has_its_logits_in_peft(name: str, tmp_path: Path) -> None:
    convert(mlx_golden.FOLDER / name, tmp_path / "peft", to="peft")
    base = GOLDEN / mlx_golden.CASES[name][0]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval().double()
    with torch.no_grad():
        got = model(torch.tensor(mlx_golden.IDS)).logits[0]
    assert close(got, np.load(mlx_golden.FOLDER / name / "logits.npy"), 1e-5)
