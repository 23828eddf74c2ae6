"""compare and inspect --data: what adapters do to a text, from files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_lines import ok, refused, run

from minilora import CausalLM, LoraConfig, PeftModel, TransformerConfig, get_peft_model
from minilora.data.tokenizer import ByteTokenizer
from minilora.formats import load_file, read_json, save_file, write_json
from minilora.lora.multitask import get_multitask_model

CONFIG = TransformerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
    attention_bias=True,
)
DATA = "--base base --data book.txt --context 16 --threads 2"


def make_adapter(folder: Path, seed: int, **fields: Any) -> PeftModel:
    """An adapter whose factors all differ from zero."""
    options = {"r": 2, "target_modules": "all-linear", **fields}
    model = get_peft_model(CausalLM(CONFIG), LoraConfig(**options), seed=seed)
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = rng.normal(0, 0.1, p.shape).astype(np.float32)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explaining")
    CausalLM(CONFIG).save_pretrained(folder / "base")
    ByteTokenizer().save(folder / "base")
    make_adapter(folder / "a", 1)
    make_adapter(folder / "b", 2)
    make_adapter(folder / "q", 3, target_modules=["q_proj"])
    make_adapter(folder / "v", 4, target_modules=["v_proj"])
    make_adapter(folder / "dora", 5, use_dora=True)
    get_multitask_model(CausalLM(CONFIG), {"x": LoraConfig(r=2)}).save_pretrained(folder / "tasks")
    text = "".join(f"{n} times {n} is {n * n}. " for n in range(20))
    (folder / "book.txt").write_text(text)
    return folder


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


# ---- compare -------------------------------------------------------------------------------------


def test_compare_prints_a_row_for_each_layer_and_the_total(world):
    lines = ok("compare a b").splitlines()
    assert lines[0].split()[:2] == ["layer", "r"]
    assert sum("self_attn" in line or "mlp" in line for line in lines) == 14
    assert any(line.startswith("total") for line in lines)
    report = json.loads(ok("compare a b --json"))
    assert len(report["layers"]) == 14
    assert report["only in a"] == report["only in b"] == []


def test_compare_data_measures_the_interference(world):
    report = json.loads(ok(f"compare a b {DATA} --json"))
    losses = {name: one["mean"] for name, one in report["loss"].items()}
    parts = losses["both"] - losses["a"] - losses["b"] + losses["base"]
    assert losses["interference"] == pytest.approx(parts, abs=1e-6)
    assert report["loss"]["interference"]["error"] > 0
    for adapter in "ab":  # the model's own evaluation, whose shards round differently
        line = f"evaluate --adapter {adapter} {DATA}"
        assert f"loss {losses[adapter]:.3f}" in ok(line)
    assert "interference" in ok(f"compare a b {DATA}")


def test_compare_data_of_an_adapter_without_effect_is_exactly_the_base(world, tmp_path):
    get_peft_model(CausalLM(CONFIG), LoraConfig(r=2)).save_pretrained(tmp_path / "new")
    report = json.loads(ok(f"compare a '{tmp_path}/new' {DATA} --json"))
    loss = report["loss"]
    assert loss["b"] == loss["base"]
    assert loss["both"] == loss["a"]
    assert loss["interference"] == {"mean": 0.0, "error": 0.0}
    assert report["total"]["cosine"] is None


def test_compare_with_a_base_takes_adapters_without_a_common_layer(world):
    refused("compare q v", 3, "no layer in common", "--base")
    report = json.loads(ok("compare q v --base base --json"))
    assert report["layers"] == []
    assert report["total"]["<dW1, dW2>"] == 0
    assert "total" in ok("compare q v --base base")


def test_compare_refuses_what_does_not_belong_together(world, tmp_path):
    refused("compare a dora", 2, "DoRA", "give an adapter of LoRA")
    refused("compare a tasks", 2, "several tasks")
    refused("compare a nowhere", 4, "nowhere")
    refused("compare a base", 3, "adapter_config.json")
    refused("compare a b --data book.txt", 2, "--base")
    refused("compare a b --context 16", 2, "--context is for a text")
    refused("compare a b --base base --limit 2", 2, "--limit is for a text")
    other = TransformerConfig(**{**vars(CONFIG), "hidden_size": 32})
    CausalLM(other).save_pretrained(tmp_path / "wide")
    refused(f"compare a b --base '{tmp_path}/wide'", 3, "does not fit this base")
    refused(f"compare a b {DATA.replace('16', '64')}", 2, "--context 64")
    (tmp_path / "empty.txt").write_text("x")
    refused(f"compare a b --base base --data '{tmp_path}/empty.txt'", 3, "at least 2 tokens")


def test_compare_data_refuses_adapters_of_different_tokenizers(world, tmp_path):
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install -e .[hf]")
    shutil.copytree("b", tmp_path / "b")
    ByteTokenizer().save(tmp_path / "b")
    ok(f"compare a '{tmp_path}/b' {DATA}")  # the same tokens
    config = json.loads((tmp_path / "b/tokenizer.json").read_text())
    vocabulary = config["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(config))
    refused(f"compare a '{tmp_path}/b' {DATA}", 2, "different tokenizers", "leave out --data")


def test_compare_data_refuses_weights_that_are_not_finite(world, tmp_path):
    shutil.copytree("base", tmp_path / "base")
    weights = {name: array.copy() for name, array in load_file("base/model.safetensors").items()}
    weights["model.norm.weight"][0] = math.nan
    save_file(tmp_path / "base/model.safetensors", weights)
    line = f"compare a b {DATA}".replace("base base", f"base '{tmp_path}/base'")
    refused(line, 5, "not finite")


# ---- inspect --data ------------------------------------------------------------------------------


def test_inspect_data_has_a_row_for_each_layer_and_their_sum(world):
    out = ok(f"inspect a {DATA} --directions o_proj")
    assert "out: the loss without the layer" in out
    assert out.count("+-") == 3 + 2 * 15 + 4 + 5  # losses, layers and sum, directions, lambda
    report = json.loads(ok(f"inspect a {DATA} --directions layers.0.self_attn.o_proj --json"))
    effects = report["effects"]
    assert len(effects["layers"]) == 14
    assert [row["i"] for row in effects["directions"]] == [1, 2]
    gain = effects["base"]["mean"] - effects["adapter"]["mean"]
    assert effects["gain"]["mean"] == pytest.approx(gain, abs=1e-9)
    assert effects["lambda"][0]["loss"] == effects["base"]
    assert effects["lambda"][-1]["loss"] == effects["adapter"]
    assert effects["lambda"][0]["change"] == {"mean": 0.0, "error": 0.0}
    total = sum(row["out"]["mean"] for row in effects["layers"])
    assert effects["sum"]["out"]["mean"] == pytest.approx(total, abs=1e-9)


def test_inspect_data_of_dora_has_no_lambda(world):
    assert "no lambda" in ok(f"inspect dora {DATA} --limit 2")


def test_inspect_data_has_the_same_bits_for_any_number_of_threads(world):
    lines = [f"inspect a {DATA} --json --threads {n}" for n in (1, 3)]
    one, other = (json.loads(ok(line.replace("--threads 2 ", ""))) for line in lines)
    assert one == other


def test_inspect_data_of_one_window_has_no_error(world):
    effects = json.loads(ok(f"inspect a {DATA} --limit 1 --json"))["effects"]
    assert effects["gain"]["error"] is None
    assert "+- unknown" in ok(f"inspect a {DATA} --limit 1")


def test_inspect_data_refuses_what_does_not_belong_together(world, tmp_path):
    refused("inspect a --data book.txt", 2, "--base")
    refused("inspect a --base base --directions q_proj", 2, "--directions is for a text")
    refused("inspect base --data book.txt --base base", 2, "for an adapter")
    refused(f"inspect a {DATA} --directions nothing", 2, "'nothing' is not the name")
    refused(f"inspect dora {DATA} --directions q_proj", 2, "not s B A")
    refused(f"inspect tasks {DATA}", 2, "inspect one of these")
    other = TransformerConfig(**{**vars(CONFIG), "hidden_size": 32})
    CausalLM(other).save_pretrained(tmp_path / "wide")
    line = f"inspect a {DATA}".replace("base base", f"base '{tmp_path}/wide'")
    refused(line, 3, "does not fit this base")
    make_adapter(tmp_path / "biased", 6, bias="all")
    refused(f"inspect '{tmp_path}/biased' {DATA}", 2, "bias = 'all'", "evaluate")
    refused(f"compare a '{tmp_path}/biased' {DATA}", 2, "bias = 'all'", "evaluate")


# ---- finetune --also-evaluate --------------------------------------------------------------------

TRAIN = "--batch-size 2 --context 16 --steps 4 --eval-every 2 --threads 2 --r 2"


def test_finetune_evaluates_a_second_text(world, tmp_path):
    (tmp_path / "old.txt").write_text("the quick brown fox. " * 9)
    (tmp_path / "x.txt").write_text("x")
    line = f"finetune --base base --data book.txt {TRAIN} --out '{tmp_path}/run'"
    out = ok(f"{line} --also-evaluate '{tmp_path}/old.txt'")
    text = (tmp_path / "run/eval.jsonl").read_text()
    evaluations = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    bits = [f"{line['also_bits_per_byte']:.3f}" for line in evaluations]
    assert f"second text's bits per byte {bits[0]} -> {bits[-1]}" in out
    assert f"second text {bits[1]}" in out
    assert "second text's loss, last" in out
    line = line.replace("/run'", "/other'")
    refused(f"{line} --also-evaluate nowhere.txt", 4, "nowhere.txt")
    refused(f"{line} --also-evaluate '{tmp_path}/x.txt'", 3, "at least 2 tokens")
    tasks = line.replace("--data book.txt", f"--tasks book.txt '{tmp_path}/old.txt'")
    refused(f"{tasks} --also-evaluate book.txt", 2, "--also-evaluate", "--tasks")
    assert not (tmp_path / "other").exists()


def test_compare_and_inspect_data_name_no_option_that_they_lack(world, tmp_path):
    """Weights that are not finite, and an adapter whose first values are needed."""
    base, adapter = shutil.copytree("base", tmp_path / "base"), tmp_path / "start"
    weights = {**load_file(base / "model.safetensors")}
    weights["lm_head.weight"] = np.full_like(weights["lm_head.weight"], np.nan)
    save_file(base / "model.safetensors", weights)
    for line in ("compare a b", "inspect a"):
        _, _, err = run(f"{line} --base {base} --data book.txt --context 16")
        assert err.endswith("is not finite: repair the weights\n")
    shutil.copytree("a", adapter)
    fields = {**read_json(adapter / "adapter_config.json"), "init_lora_weights": "pissa_niter_4"}
    write_json(adapter / "adapter_config.json", fields)
    for line in (f"compare a {adapter}", f"graph --base base --adapter {adapter} --block 0"):
        refused(line, 3, "without these, minilora convert --to plain takes --initial")
