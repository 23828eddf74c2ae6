"""The quick demo writes what it promises, and what it reports of its run is true."""

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
from minilora.lab.demo import PROMPT, Plan, _linear_weights, _spectra, demo
from minilora.training.loop import Settings, bits_per_byte, evaluate
from minilora.training.methods import FACTORED, method_of

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
HAS_PAGE = all(importlib.util.find_spec(name) for name in ("jinja2", "plotly"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(folder, summary, what was printed) of one run of `minilora demo --quick`."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("demo"))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            assert main(["demo", "--quick"]) == 0
        out = Path("runs/demo-001").resolve()
    finally:
        os.chdir(before)
    return out, read_json(out / "summary.json"), printed.getvalue()


def read_json(path):
    return json.loads(Path(path).read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_table_printed(summary, printed):
    for row in summary["bits_per_byte"].values():
        assert f"{row['prose']:8.3f}{row['code']:8.3f}" in printed


def test_demo_writes_all_that_it_promises(quick):
    out, summary, printed = quick
    pictures = ["loss.png", "delta_spectrum.png"] if HAS_MATPLOTLIB else []
    names = ["base", "adapter", "summary.json", *pictures]
    names += ["report.html"] if HAS_PAGE else []
    assert ("(no page: " in printed) != HAS_PAGE
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    assert [Path(p).name for p in summary["pictures"]] == pictures
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")
    for name in names:
        assert str(Path("runs", "demo-001", name)) in printed
    for run, steps in (("base", 120), ("adapter", 80)):
        log = lines(out / run / "log.jsonl")
        assert [line["step"] for line in log] == list(range(steps))
        evaluations = lines(out / run / "eval.jsonl")
        assert evaluations[-1]["loss"] < evaluations[0]["loss"]
        assert [line["step"] for line in evaluations] == list(range(0, steps + 1, 20))


def test_demo_summary_has_its_fields(quick):
    _, summary, _ = quick
    figures = summary["bits_per_byte"]
    assert set(figures) == {"base", "lora", "lzma"}
    for row in figures.values():
        assert set(row) == {"prose", "code"}
        assert all(0 < bits < 8 for bits in row.values())
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
    """The public functions, on the files and the held-out text, compute the same bits."""
    out, summary, _ = quick
    plan = Plan().quick()
    encode = ByteTokenizer().encode
    held_out = {"prose": encode(split(prose())[1]), "code": encode(split(python_sources())[1])}

    def measure(model):
        bits = {}
        for name, ids in held_out.items():
            loss = evaluate(model, ids, plan.pretrain.context, limit=plan.windows)
            bits[name] = bits_per_byte(loss)
        return bits

    base = CausalLM.from_pretrained(out / "base")
    # The tokenizer comes from the folder's files.
    assert load_tokenizer(out / "base", 256) == ByteTokenizer(note="")
    assert measure(base) == summary["bits_per_byte"]["base"]
    adapted = PeftModel.from_pretrained(base, out / "adapter")
    assert measure(adapted) == summary["bits_per_byte"]["lora"]
    base_file = out / "base" / "model.safetensors"
    adapter_file = out / "adapter" / "adapter_model.safetensors"
    trained = sum(a.size for a in load_file(adapter_file).values())
    frozen = sum(a.size for a in load_file(base_file).values())
    assert summary["trainable"] == trained
    assert summary["total"] == trained + frozen
    assert summary["adapter_bytes"] == adapter_file.stat().st_size
    assert summary["base_bytes"] == base_file.stat().st_size


def test_demo_report_agrees_with_the_summary(quick):
    _, summary, printed = quick
    assert_table_printed(summary, printed)
    assert f"{summary['trainable']:,} of {summary['total']:,}" in printed
    assert "yes, every bit" in printed
    assert all(c.isprintable() or c in "\n\N{REPLACEMENT CHARACTER}" for c in printed)
    assert max(map(len, printed.splitlines())) <= 110


# ---- variations, on a tiny model ----


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """`demo --quick` takes a few steps; the working folder is new and has two texts."""
    small = Settings(steps=3, batch_size=2, context=16, lr=1e-2, warmup=1)
    plan = Plan().quick()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape = dataclasses.replace(plan.model, **sizes)
    plan = dataclasses.replace(plan, model=shape, pretrain=small, adapt=small, windows=4, sample=5)
    monkeypatch.setattr(Plan, "quick", lambda self: plan)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(b"All work and no play makes Jack a dull boy. " * 60)
    Path("code.txt").write_bytes(b"while True: print(chr(42) * 3, end=str(None))\n" * 60)
    return tmp_path


OWN = ["demo", "--quick", "--pretrain-data", "book.txt", "--adapt-data", "code.txt", "--out", "out"]


def test_demo_takes_the_user_s_texts(tiny, capsys):
    assert main([*OWN, "--r", "2", "--lora-alpha", "6"]) == 0
    summary = read_json("out/summary.json")
    book = Path("book.txt").read_bytes()
    assert f"on {len(split_text(book)[0]):,} bytes of prose" in capsys.readouterr().out
    config = read_json("out/adapter/adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    model = PeftModel.from_pretrained(CausalLM.from_pretrained("out/base"), "out/adapter")
    assert code_bits(model) == summary["bits_per_byte"]["lora"]["code"]


def code_bits(model):
    """Bits per byte on the held-out part of the user's code."""
    _, held_out = split_text(Path("code.txt").read_bytes())
    return bits_per_byte(evaluate(model, ByteTokenizer().encode(held_out), 16, limit=4))


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("method", FACTORED[1:])
def test_demo_runs_other_methods_and_bases(method, kind, tiny, capsys):
    if (method, kind) == ("full", "nf4"):
        assert main([*OWN, "--method", method, "--quantize", kind]) == 2
        assert not Path("out").exists()
        return
    assert main([*OWN, "--method", method, "--quantize", kind]) == 0
    summary = read_json("out/summary.json")
    printed = capsys.readouterr().out
    coded = kind == "nf4"
    assert (summary["method"], summary["quantize"]) == (method, kind)
    assert ("held" in summary) == coded
    assert ("of nf4, " in printed) == coded
    rows = ["base", "quantized base", method, "lzma"]
    if not coded:
        rows.remove("quantized base")
    assert list(summary["bits_per_byte"]) == rows
    assert_table_printed(summary, printed)
    pictures = []
    if HAS_MATPLOTLIB:
        pictures = ["loss.png", "delta_spectrum.png"]
    if HAS_MATPLOTLIB and method == "adalora":
        pictures.append("rank_allocation.png")
    assert summary["pictures"] == pictures
    base = CausalLM.from_pretrained("out/base")
    if coded:
        quantize(base, kind)
    checks = summary["checks"]
    if method == "full":
        assert checks == {}
        model = CausalLM.from_pretrained("out/adapted")
        assert load_tokenizer("out/adapted", 256) == ByteTokenizer(note="")
        assert summary["trainable"] == summary["total"] == sum(p.size for p in model.parameters())
        assert (base.lm_head.weight.numpy() != model.lm_head.weight.numpy()).any()
    else:
        assert checks["base_bit_identical"] is True
        assert 0 <= checks["merge_identity_error"] < 1e-5
        model = PeftModel.from_pretrained(base, "out/adapter")
        assert method_of(model.peft_config["default"]) == method
    assert code_bits(model) == summary["bits_per_byte"][method]["code"]


def test_demo_refuses_records(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"text": "abc"}]')
    texts = ({"pretrain_data": str(path)}, {"adapt_data": str(path)})
    for text in texts:
        with pytest.raises(DataError, match=r"data\.json' has records, expected a plain text"):
            demo(tmp_path, Plan(), **text)


def test_demo_with_adalora_takes_r_as_the_final_rank(tiny, capsys):
    assert main([*OWN, "--method", "adalora", "--r", "2"]) == 0
    config = read_json("out/adapter/adapter_config.json")
    assert (config["target_r"], config["init_r"], config["lora_alpha"]) == (2, 3, 256)
    ranks = [sum(mask) for mask in config["rank_pattern"].values()]
    assert sum(ranks) == 2 * len(ranks) == 14


def test_demo_spectra_are_those_of_the_trained_weights():
    """Spectra of W before training and of dW.

    Without an adapter dW is what training added; AdaLoRA's have as many values as ranks are left.
    """
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape = dataclasses.replace(Plan().model, **sizes)
    model = CausalLM(shape)
    before = _linear_weights(model)
    assert len(before) == 7
    layer = model.model.layers[0].mlp.up_proj
    W = layer.weight.numpy().copy()
    dW = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    layer.weight.data = W + dW
    spectra = _spectra(model, before)
    of_weight, of_delta = spectra["model.layers.0.mlp.up_proj"]
    np.testing.assert_allclose(of_weight, np.linalg.svd(W, compute_uv=False), rtol=1e-5)
    np.testing.assert_allclose(of_delta, np.linalg.svd(dW, compute_uv=False), rtol=1e-4)
    _, unchanged = spectra["model.layers.0.mlp.down_proj"]
    assert not unchanged.any()
    for method, count in (("lora", 4), ("dora", 16), ("adalora", 6)):
        adapted = get_peft_model(CausalLM(shape), Plan().adapted_by(method).adapter)
        assert {len(of_delta) for _, of_delta in _spectra(adapted, {}).values()} == {count}


def test_demo_depends_on_the_seed_and_not_on_the_number_of_threads(tiny, capsys):
    def files(*options):
        assert main([*OWN, *options]) == 0
        arrays = load_file("out/adapter/adapter_model.safetensors")
        arrays |= load_file("out/base/model.safetensors")
        Path("out").rename(f"out{'-'.join(options)}")
        return {name: a.tobytes() for name, a in arrays.items()}

    first = files("--seed", "3", "--threads", "1")
    assert files("--seed", "3", "--threads", "3") == first
    assert files("--seed", "4", "--threads", "1") != first


def test_demo_without_matplotlib_draws_no_pictures(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(OWN) == 0
    assert "(no pictures: matplotlib is missing: pip install -e .[plot])" in capsys.readouterr().out
    assert read_json("out/summary.json")["pictures"] == []
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
    """The check itself can fail: one weight of the base changes while the adapter trains."""
    import minilora.lab.demo

    plain = minilora.lab.demo.train
    seeds = []

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
    assert read_json("out/summary.json")["checks"]["base_bit_identical"] is False
    assert "base weights unchanged  NO" in capsys.readouterr().out
