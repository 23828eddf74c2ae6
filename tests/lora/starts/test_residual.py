"""Adapters of a changed base: read as plain LoRA over W, refused, resumed, and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from minilora import CausalLM, PeftModel, get_peft_model
from minilora.cli import main
from minilora.errors import ConfigError, FormatError
from minilora.formats import load_file
from minilora.lora import LoraConfig
from minilora.tools.combining import combine
from minilora.tools.converting import convert
from minilora.tools.factoring import resize
from minilora.tools.inspecting import inspect_adapter
from minilora.tools.merging import merge
from minilora.tools.plain import make_plain

TARGETS = ["q_proj", "v_proj", "down_proj"]
DATA = [np.random.default_rng(i).integers(0, 16, (2, 11)) for i in range(3)]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "pissa_niter_4": {"use_rslora": True, "rank_pattern": {"v_proj": 3}},
    "olora": {"use_dora": True, "alpha_pattern": {"q_proj": 7}},
    "lora_ga": {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"q_proj": 4}},
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


def write(folder: Path, name: str, quantize: str | None = None) -> np.ndarray:
    """`base`, and a trained adapter as PEFT writes it, in `adapter`; the logits of both."""
    base = small.base("float64")
    base.save_pretrained(folder / "base")
    fields = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **CONFIGURATIONS.get(name, {})}
    config = LoraConfig(init_lora_weights=name, **fields)
    model = get_peft_model(base, config, data=DATA, quantize=quantize).eval()
    rng = np.random.default_rng(0)
    for p in model.adapter_parameters("default").values():
        p.data = p.data + 0.1 * rng.standard_normal(p.shape)
    model.save_pretrained(folder / "adapter", as_trained=True)
    model.save_pretrained(folder / "plain")
    return small.logits(model)


def load(folder: Path, adapter: str, base: str = "base", **options: Any) -> np.ndarray:
    model = CausalLM.from_pretrained(folder / base, dtype="float64")
    return small.logits(PeftModel.from_pretrained(model, folder / adapter, **options).eval())


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> bool:
    return bool(abs(got - expected).max() <= tolerance * abs(expected).max())


@pytest.mark.filterwarnings("ignore:.*above the full rank")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_command_reads_a_changed_base_as_plain_lora(name: str, tmp_path: Path) -> None:
    expected = write(tmp_path, name)
    adapter = tmp_path / "adapter"
    base = tmp_path / "base"
    # Exact in float64, from A0 and B0 as from W, to use and to train.
    assert close(load(tmp_path, "plain"), expected)
    assert close(load(tmp_path, "adapter"), expected)
    assert close(load(tmp_path, "adapter", is_trainable=True), expected)
    merge(base, [adapter], tmp_path / "merged", dtype=None)
    merged = CausalLM.from_pretrained(tmp_path / "merged", dtype="float64")
    assert close(small.logits(merged), expected)
    report = inspect_adapter(adapter, base)
    assert report["mismatches"] == []
    assert report["start"].startswith(name)
    # In float32, in which the tools write.
    resize(adapter, 12, tmp_path / "resized")
    combine([adapter], tmp_path / "combined", [1.0])
    make_plain(adapter, tmp_path / "again", base)
    convert(adapter, tmp_path / "converted", dtype="float32")
    for made in ("resized", "combined", "again", "converted"):
        assert close(load(tmp_path, made), expected, 1e-5), made
    rows = make_plain(adapter, tmp_path / "small", r=1)
    assert all(0 < row["error"] <= row["|dW|"] for row in rows)
    fields = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert fields["init_lora_weights"] is True
    with pytest.raises(ConfigError, match="left the base as it is: the adapter is plain LoRA"):
        make_plain(tmp_path / "again", tmp_path / "twice", base)
    # Its first values lie apart, and are found by --initial.
    shutil.move(adapter / "initial", tmp_path / "first")
    assert close(load(tmp_path, "adapter", initial=tmp_path / "first"), expected)
    resize(adapter, 12, tmp_path / "resized again", initial=tmp_path / "first")
    assert close(load(tmp_path, "resized again"), expected, 1e-5)
    if name in ("pissa", "olora"):
        assert close(load(tmp_path, "adapter"), expected)
        make_plain(adapter, tmp_path / "from W", base)
        assert close(load(tmp_path, "from W"), expected, 1e-5)
        words = "A0, B0 follow from W, which is not given here. Give --initial DIR"
    else:
        words = (
            r"trained on W-s B0 A0, and neither A0, B0 nor that base is given; on this base it is "
            r"another model. Give --initial DIR \(the adapter as saved before training\), or the "
            r"changed base with --base-is residual"
        )
        for run in (
            lambda: load(tmp_path, "adapter"),
            lambda: load(tmp_path, "adapter", is_trainable=True),
            lambda: merge(base, [adapter], tmp_path / "out"),
            lambda: inspect_adapter(adapter, base),
        ):
            with pytest.raises(FormatError, match=words):
                run()
    for run in (
        lambda: resize(adapter, 2, tmp_path / "out"),
        lambda: combine([adapter], tmp_path / "out"),
        lambda: inspect_adapter(adapter),
        lambda: convert(adapter, tmp_path / "out", to="mlx"),
        lambda: make_plain(adapter, tmp_path / "out"),
    ):
        with pytest.raises(FormatError, match=r"Give --initial DIR \(the adapter as saved"):
            run()
    assert not (tmp_path / "out").exists()


def test_from_pretrained_tells_w_from_the_residual(tmp_path: Path) -> None:
    expected = write(tmp_path, "pissa")
    model = PeftModel.from_pretrained(
        CausalLM.from_pretrained(tmp_path / "base", dtype="float64"),
        tmp_path / "adapter",
        is_trainable=True,
    )
    changed = small.base("float64")
    weights = dict(changed.named_parameters())
    for path, layer in model.changed_layers.items():
        weights[f"{path}.weight"].data = layer.base_layer.dense_weight()
    changed.save_pretrained(tmp_path / "residual")
    for initial in (tmp_path / "adapter" / "initial", None):
        with pytest.raises(FormatError, match="looks like the residual already; say --base-is"):
            load(tmp_path, "adapter", "residual", initial=initial)
        shutil.rmtree(tmp_path / "adapter" / "initial", ignore_errors=True)
    assert close(load(tmp_path, "adapter", "residual", base_is="residual"), expected)
    merge(tmp_path / "residual", [tmp_path / "adapter"], tmp_path / "out", base_is="residual")
    merged = CausalLM.from_pretrained(tmp_path / "out", dtype="float64")
    assert close(small.logits(merged), expected)
    for options, words in (
        ({"base_is": "original"}, "--base-is must be 'residual', got 'original'"),
        ({"base_is": "residual", "initial": "x"}, "give one of them"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(tmp_path, "adapter", **options)
    with pytest.raises(ConfigError, match="trained over its base as it is, with no start"):
        load(tmp_path, "plain", base_is="residual")


def test_read_initial_refuses_another_adapter(tmp_path: Path) -> None:
    write(tmp_path, "lora_ga")
    initial = tmp_path / "adapter" / "initial"
    path = initial / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"lora_alpha": 9}))
    with pytest.raises(FormatError, match=r"has the scaling 2\.25, in the trained"):
        load(tmp_path, "adapter")
    path.write_text(before)
    other = get_peft_model(small.base(), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(FormatError, match=r"q_proj.lora_A.weight is \(2, 16\), in the trained"):
        load(tmp_path, "adapter", initial=tmp_path / "other")


def test_recompute_refuses_a_weight_that_does_not_say_the_start(tmp_path: Path) -> None:
    for name, words in (("pissa", "equal singular values number 2 and 3"), ("olora", "depend on")):
        write(tmp_path / name, name)
        shutil.rmtree(tmp_path / name / "adapter" / "initial")
        base = small.base("float64")
        W = np.eye(16) if name == "pissa" else np.ones((16, 16))
        base.model.layers[0].self_attn.q_proj.weight.data = W
        base.save_pretrained(tmp_path / name / "base")
        with pytest.raises(FormatError, match=f"{words}.*give --initial DIR"):
            load(tmp_path / name, "adapter")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_loftq_is_read_over_the_codes_that_it_began_with(kind: str, tmp_path: Path) -> None:
    write(tmp_path, "loftq", kind)
    base = small.base("float64")
    fields = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS}
    begun = get_peft_model(base, LoraConfig(init_lora_weights="loftq", **fields), quantize=kind)
    read = PeftModel.from_pretrained(
        CausalLM.from_pretrained(tmp_path / "base", dtype="float64"), tmp_path / "adapter"
    )
    assert set(read.changed_layers) == set(begun.changed_layers)
    for path, layer in read.changed_layers.items():
        Q = begun.changed_layers[path].base_layer.dense_weight()
        assert close(layer.base_layer.dense_weight(), Q, 1e-6)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = CausalLM.from_pretrained(tmp_path / "merged", dtype="float64")
    assert close(small.logits(merged), small.logits(read.eval()), 1e-6)
    for run in (
        lambda: resize(tmp_path / "adapter", 2, tmp_path / "out"),
        lambda: merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", onto="nf4"),
        lambda: merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", [2.0]),
        lambda: make_plain(tmp_path / "adapter", tmp_path / "out", tmp_path / "base"),
    ):
        with pytest.raises((FormatError, ConfigError), match="codes"):
            run()


@pytest.mark.parametrize("name", ["pissa", "olora", "eva", "lora_ga", "orthogonal"])
def test_finetune_resumes_a_start_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.base(vocab_size=256).save_pretrained(tmp_path / "base")
    (tmp_path / "book.txt").write_text("a text to go on with, " * 20)
    monkeypatch.chdir(tmp_path)
    line = f"finetune --base base --data book.txt --r 2 --init-lora-weights {name} --context 8 "
    line += "--batch-size 1 --threads 1 --warmup 9 --save-every 1 --target-modules q_proj,v_proj"
    assert main([*line.split(), "--out", "whole", "--steps", "2"]) == 0
    assert main([*line.split(), "--out", "half", "--steps", "1"]) == 0
    assert main([*line.split(), "--out", "half", "--steps", "2", "--resume", "--as-trained"]) == 0
    for step in (1, 2):
        for file in ("adapter_model.safetensors", "initial/adapter_model.safetensors"):
            whole = tmp_path / "whole" / "checkpoints" / f"step-{step}" / file
            half = tmp_path / "half" / "checkpoints" / f"step-{step}" / file
            changes_base = name in ("pissa", "olora", "lora_ga")
            assert whole.exists() == half.exists() == (changes_base or "initial" not in file)
            assert not whole.exists() or whole.read_bytes() == half.read_bytes()
    plain = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    trained = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert plain.keys() == trained.keys()
    logits = [
        small.logits(
            PeftModel.from_pretrained(CausalLM.from_pretrained("base", dtype="float64"), folder)
        )
        for folder in ("whole", "half")
    ]
    assert close(*logits, 1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--init-lora-weights loftq", "--quantize is none: give --quantize nf4 or fp4 or int8"),
        ("--initial x", "--initial says how --adapter began"),
        ("--method full --as-trained", "--as-trained is for an adapter"),
        ("--as-trained", "--as-trained saves what a start left, and this adapter has none"),
        ("--as-trained --method loha", "--as-trained saves what a start left"),
        ("--as-trained --init-lora-weights gaussian", "--as-trained saves what a start left"),
        ("--init-lora-weights pissa --lora-alpha 0 --r 2", "divides by the scaling"),
        ("--init-lora-weights orthogonal --r 3", "needs an even r"),
        ("--init-lora-weights magic", "init_lora_weights must be True, False, 'gaussian'"),
    ],
)
def test_finetune_refuses_options_of_starts_that_do_not_fit(
    options: str, words: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.base(vocab_size=256).save_pretrained(tmp_path / "base")
    (tmp_path / "book.txt").write_text("a text to go on with, " * 20)
    monkeypatch.chdir(tmp_path)
    line = f"finetune --base base --data book.txt --context 8 --out out {options}"
    assert main(line.split()) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_convert_to_plain_prints_the_error_of_a_rank(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(tmp_path, "pissa")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "adapter", "--to", "plain", "--base", "base", "--out", "two"]) == 0
    assert "rounding / |W|" in capsys.readouterr().out
    assert close(load(tmp_path, "two"), expected, 1e-5)
    assert main(["convert", "adapter", "--to", "plain", "--r", "1", "--out", "one"]) == 0
    assert "error with plain LoRA over all layers" in capsys.readouterr().out
    assert main(["convert", "adapter", "--to", "peft", "--base", "base", "--out", "three"]) == 2
    assert "--base: for --to plain alone" in capsys.readouterr().err
