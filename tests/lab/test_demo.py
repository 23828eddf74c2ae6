"""The main job, whole: the quick demo writes what it promises, and what it says of its own run is true."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora import CausalLM, PeftModel, get_peft_model, quantize
from minilora.cli import main
from minilora.data.texts import prose, python_sources, split, split_text
from minilora.data.tokenizer import ByteTokenizer, load_tokenizer
from minilora.errors import DataError
from minilora.formats import load_file
from minilora.lab.demo import PROMPT, Plan, _linear_weights, _spectra
from minilora.training.loop import Settings, bits_per_byte, evaluate
from minilora.training.methods import METHODS, method_of

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(folder, summary, what was printed) of one run of `minilora demo --quick`."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("demo"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            assert main(["demo", "--quick"]) == 0
        out = Path("runs/demo-001").resolve()
    finally:
        os.chdir(before)
    return out, json.loads((out / "summary.json").read_text()), said.getvalue()


def test_demo_writes_all_that_it_promises(quick):
    out, summary, said = quick
    pictures = ["loss.png", "delta_spectrum.png"] if HAS_MATPLOTLIB else []
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["base", "adapter", "summary.json", *pictures]
    )
    assert [Path(p).name for p in summary["pictures"]] == pictures
    assert all((out / name).read_bytes().startswith(b"\x89PNG\r\n") for name in pictures)
    for name in ("base", "adapter", "summary.json", *pictures):
        assert str(Path("runs", "demo-001", name)) in said
    for run, steps in (("base", 120), ("adapter", 80)):
        log = [json.loads(line) for line in (out / run / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == list(range(steps))
        held_out = [
            json.loads(line)["loss"] for line in (out / run / "eval.jsonl").read_text().splitlines()
        ]
        assert held_out[-1] < held_out[0]
        held_out = [
            json.loads(line)["step"] for line in (out / run / "eval.jsonl").read_text().splitlines()
        ]
        assert held_out == list(range(0, steps + 1, 20))


def test_demo_summary_has_its_fields(quick):
    _, summary, _ = quick
    figures = summary["bits_per_byte"]
    assert set(figures) == {"base", "lora", "lzma"}
    assert all(
        set(row) == {"prose", "code"} and all(0 < v < 8 for v in row.values())
        for row in figures.values()
    )
    assert set(summary["seconds"]) == {"pretrain", "evaluate base", "adapt", "evaluate adapter"}
    assert all(v > 0 for v in summary["seconds"].values())
    assert 0 < summary["trainable"] < summary["total"]
    assert all(sample.startswith(PROMPT) for sample in summary["samples"].values())
    assert summary["samples"]["base"] != summary["samples"]["lora"]


def test_demo_adapter_learns_code(quick):
    figures = quick[1]["bits_per_byte"]
    assert figures["lora"]["code"] < figures["base"]["code"] - 0.05
    assert figures["base"]["prose"] < 5.5  # of 8 before any training


def test_demo_checks_hold(quick):
    checks = quick[1]["checks"]
    assert checks["base_bit_identical"] is True
    assert 0 < checks["merge_identity_error"] < 1e-5


def test_demo_folders_give_the_figures_again(quick):
    """From the disk, by the public functions, on the text that was held out: the same bits."""
    out, summary, _ = quick
    plan, encode = Plan().quick(), ByteTokenizer().encode
    held_out = {"prose": encode(split(prose())[1]), "code": encode(split(python_sources())[1])}

    def measure(model):
        losses = {
            k: evaluate(model, v, plan.pretrain.context, limit=plan.windows)
            for k, v in held_out.items()
        }
        return {name: bits_per_byte(loss) for name, loss in losses.items()}

    base = CausalLM.from_pretrained(out / "base")
    assert load_tokenizer(out / "base", 256) == ByteTokenizer(
        note=""
    )  # said by its files, not guessed
    assert measure(base) == summary["bits_per_byte"]["base"]
    adapted = PeftModel.from_pretrained(base, out / "adapter")
    assert measure(adapted) == summary["bits_per_byte"]["lora"]
    arrays = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(a.size for a in arrays.values()) == summary["trainable"]
    assert sum(a.size for a in load_file(out / "base" / "model.safetensors").values()) == (
        summary["total"] - summary["trainable"]
    )
    for name, folder in (("adapter_bytes", "adapter/adapter_model"), ("base_bytes", "base/model")):
        assert (out / f"{folder}.safetensors").stat().st_size == summary[name]


def test_demo_report_agrees_with_the_summary(quick):
    _, summary, said = quick
    for row in summary["bits_per_byte"].values():
        assert f"{row['prose']:8.3f}{row['code']:8.3f}" in said
    assert f"{summary['trainable']:,} of {summary['total']:,}" in said
    assert "yes, every bit" in said
    assert all(c.isprintable() or c in "\n\N{REPLACEMENT CHARACTER}" for c in said)
    assert max(map(len, said.splitlines())) <= 110


# ---- variations, on a model that takes no time ----


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """`demo --quick` is a demo of a few steps; the working folder is new, and holds two texts."""
    small = Settings(steps=3, batch_size=2, context=16, lr=1e-2, warmup=1)
    plan = Plan().quick()
    shape = dataclasses.replace(
        plan.model, hidden_size=16, intermediate_size=16, num_hidden_layers=1
    )
    plan = dataclasses.replace(plan, model=shape, pretrain=small, adapt=small, windows=4, sample=5)
    monkeypatch.setattr(Plan, "quick", lambda self: plan)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(b"All work and no play makes Jack a dull boy. " * 60)
    Path("code.txt").write_bytes(b"while True: print(chr(42) * 3, end=str(None))\n" * 60)
    return tmp_path


OWN = ["demo", "--quick", "--pretrain-data", "book.txt", "--adapt-data", "code.txt", "--out", "out"]


def test_demo_takes_the_user_s_texts(tiny, capsys):
    assert main([*OWN, "--r", "2", "--lora-alpha", "6"]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    book, code = Path("book.txt").read_bytes(), Path("code.txt").read_bytes()
    assert f"on {len(split_text(book)[0]):,} bytes of prose" in capsys.readouterr().out
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    model = PeftModel.from_pretrained(CausalLM.from_pretrained("out/base"), "out/adapter")
    loss = evaluate(model, ByteTokenizer().encode(split_text(code)[1]), 16, limit=4)
    assert bits_per_byte(loss) == summary["bits_per_byte"]["lora"]["code"]


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_demo_runs_other_methods_and_bases(method, kind, tiny, capsys):
    if (method, kind) == ("full", "nf4"):
        assert main([*OWN, "--method", method, "--quantize", kind]) == 2
        assert not Path("out").exists()
        return
    assert main([*OWN, "--method", method, "--quantize", kind]) == 0
    summary, said = json.loads(Path("out/summary.json").read_text()), capsys.readouterr().out
    assert (summary["method"], summary["quantize"]) == (method, kind)
    assert ("held" in summary) == ("of nf4, " in said) == (kind == "nf4")
    rows = ["base", *(["quantized base"] if kind == "nf4" else []), method, "lzma"]
    assert list(summary["bits_per_byte"]) == rows
    assert all(
        f"{row['prose']:8.3f}{row['code']:8.3f}" in said
        for row in summary["bits_per_byte"].values()
    )
    pictures = [
        "loss.png",
        "delta_spectrum.png",
        *(["rank_allocation.png"] if method == "adalora" else []),
    ]
    assert summary["pictures"] == (pictures if HAS_MATPLOTLIB else [])
    base = CausalLM.from_pretrained("out/base")
    if kind == "nf4":
        quantize(base, kind)
    if method == "full":
        assert summary["checks"] == {}
        model = CausalLM.from_pretrained("out/adapted")
        assert load_tokenizer("out/adapted", 256) == ByteTokenizer(note="")
        assert summary["trainable"] == summary["total"] == sum(p.size for p in model.parameters())
        assert (base.lm_head.weight.numpy() != model.lm_head.weight.numpy()).any()
    else:
        assert summary["checks"]["base_bit_identical"] is True
        assert 0 <= summary["checks"]["merge_identity_error"] < 1e-5
        model = PeftModel.from_pretrained(base, "out/adapter")
        assert method_of(model.peft_config["default"]) == method
    loss = evaluate(
        model, ByteTokenizer().encode(split_text(Path("code.txt").read_bytes())[1]), 16, limit=4
    )
    assert bits_per_byte(loss) == summary["bits_per_byte"][method]["code"]


def test_demo_with_adalora_takes_r_as_the_final_rank(tiny, capsys):
    assert main([*OWN, "--method", "adalora", "--r", "2"]) == 0
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert (config["target_r"], config["init_r"], config["lora_alpha"]) == (2, 3, 256)
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(ranks) == 2 * len(ranks) == 14


def test_demo_spectra_are_those_of_the_trained_weights():
    """Of W as it was, and of dW: without an adapter what training added, and of AdaLoRA as many as ranks are left."""
    shape = dataclasses.replace(
        Plan().model, hidden_size=16, intermediate_size=24, num_hidden_layers=1
    )
    model = CausalLM(shape)
    before = _linear_weights(model)
    assert len(before) == 7
    layer, rng = model.model.layers[0].mlp.up_proj, np.random.default_rng(0)
    W, dW = layer.weight.numpy().copy(), rng.standard_normal((24, 16)).astype(np.float32)
    layer.weight.data = W + dW
    of_weight, of_delta = _spectra(model, before)["model.layers.0.mlp.up_proj"]
    np.testing.assert_allclose(of_weight, np.linalg.svd(W, compute_uv=False), rtol=1e-5)
    np.testing.assert_allclose(of_delta, np.linalg.svd(dW, compute_uv=False), rtol=1e-4)
    assert not _spectra(model, before)["model.layers.0.mlp.down_proj"][1].any()
    for method, count in (("lora", 4), ("dora", 16), ("adalora", 6)):
        adapted = get_peft_model(CausalLM(shape), Plan().adapted_by(method).adapter)
        assert {len(of_delta) for _, of_delta in _spectra(adapted, {}).values()} == {count}


def test_demo_depends_on_the_seed_and_not_on_the_number_of_threads(tiny, capsys):
    def files(*options):
        assert main([*OWN, *options]) == 0
        arrays = load_file("out/adapter/adapter_model.safetensors") | load_file(
            "out/base/model.safetensors"
        )
        Path("out").rename(f"out{'-'.join(options)}")
        return {name: a.tobytes() for name, a in arrays.items()}

    first = files("--seed", "3", "--threads", "1")
    assert files("--seed", "3", "--threads", "3") == first
    assert files("--seed", "4", "--threads", "1") != first


def test_demo_without_matplotlib_draws_no_pictures(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(OWN) == 0
    assert "no pictures: pip install -e .[plot]" in capsys.readouterr().out
    assert json.loads(Path("out/summary.json").read_text())["pictures"] == []
    assert not list(Path("out").glob("*.png"))


def test_demo_without_the_prose_asks_for_a_text(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="--pretrain-data"):
        prose()
    assert main(["demo", "--quick", "--out", "out"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("minilora: error: ")
    assert "--pretrain-data FILE" in error
    assert not Path("out").exists()
    assert main(OWN) == 0


def test_demo_notices_a_base_that_changed(tiny, capsys, monkeypatch):
    """The check itself can fail: spoil one weight of the base while the adapter trains."""
    import minilora.lab.demo

    plain, seeds = minilora.lab.demo.train, []

    def spoiling(model, tokens, settings, *rest, **options):
        seeds.append(settings.seed)
        result = plain(model, tokens, settings, *rest, **options)
        if isinstance(model, PeftModel):
            norm = model.get_base_model().model.norm.weight
            norm.data = norm.data * np.float32(1.0000001)
        return result

    monkeypatch.setattr(minilora.lab.demo, "train", spoiling)
    assert main([*OWN, "--seed", "7"]) == 0
    assert seeds == [7, 7]
    assert json.loads(Path("out/summary.json").read_text())["checks"]["base_bit_identical"] is False
    assert "base weights unchanged  NO" in capsys.readouterr().out
