"""What a report says: every method, and every reason to leave something out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from reported import ADAPTERS, ALSO, MAPS, make_adapted, make_base, measured

from minilora import LoraConfig, get_multitask_model, get_peft_model
from minilora.data.tokenizer import ByteTokenizer
from minilora.lab.report.content import Report
from minilora.lab.report.gathering import NO_TEXT, Sources, gather
from minilora.lab.report.subject import Subject
from minilora.tools.effects import measure_effects

ALONE = "an adapter alone does not say how it was trained: give the folder of its run"
NO_DW = "HydraLoRA adds another matrix at every position, so no dW exists"
BIASES = dict.fromkeys(("maps", "rank_curve", "text", "intruders"), "bias = 'all'")
COPIES = dict.fromkeys(("rank_curve", "intruders"), "trained as a copy or by rows")
OMITTED: dict[str, dict[str, str]] = {
    "hydra": dict.fromkeys(("maps", "spectra", "rank_curve", "intruders"), NO_DW),
    "biases": BIASES,
    "saved": COPIES,
    "tied copies": COPIES,
    "tokens": COPIES,
}


def report_of(kind: str, **fields: Any) -> Report:
    text, also = measured(limit=3), measured(ALSO, "old", limit=2)
    given = {"tokenizer": ByteTokenizer(), "text": text, "also": also}
    sources = Sources("title", Subject(make_adapted(kind)), **{**given, **fields})
    return gather(sources, threads=1)


def as_json(report: Report) -> str:
    """The report as JSON, which has no NaN."""
    return json.dumps(dataclasses.asdict(report), allow_nan=False)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gather_shows_every_method_or_says_why_not(kind):
    report = report_of(kind)
    as_json(report)
    wanted = {"training": ALONE, **OMITTED.get(kind, {})}
    assert report.omitted.keys() == wanted.keys()
    for part, words in wanted.items():
        assert words in report.omitted[part]
    titles = [one.title for one in report.maps]
    has_dW = kind != "hydra"
    has_losses = kind != "biases"
    assert ("|dW| / |W|" in titles) == ("Effective rank of dW" in titles) == has_dW
    assert ("Loss without the layer" in titles) == has_losses
    assert ("Ranks" in titles) == (kind == "adalora")
    assert bool(report.spectra) == has_dW
    assert (report.text is None) == ("text" in wanted)
    assert (report.rank_curve is None) == (kind in ("hydra", "biases"))
    if has_dW:
        assert report.intruders is not None
        assert report.intruders.counts == sorted(report.intruders.counts)
        assert bool(report.intruders.scalings) == ("intruders" not in wanted)
    tree = report.architecture
    model = make_adapted(kind)
    assert tree.parameters == sum(p.size for p in model.parameters())
    assert tree.trained == sum(p.size for p in model.parameters() if p.requires_grad)
    if report.rank_curve is not None:
        require_ends(report, kind)


def require_ends(report: Report, kind: str) -> None:
    """The curve of ranks ends with the base and the adapter, to the bit, and so does lambda."""
    text = measured(limit=3)
    model = make_adapted(kind)
    effects = measure_effects(model, text.tokens, text.context, text.limit, threads=1)
    curve = report.rank_curve
    assert curve is not None
    assert curve.ranks[0] == 0
    assert curve.losses[0] == text.bits(effects.base.mean)
    assert curve.losses[-1] == text.bits(effects.adapter.mean)
    assert curve.errors[0] == pytest.approx(text.bits(effects.gain.error))
    assert curve.errors[-1] == 0
    assert curve.energies[0] == 0
    assert curve.energies == sorted(curve.energies)
    assert curve.energies[-1] == pytest.approx(1)
    for whole in report.intruders.scalings[-1:]:
        assert whole.name == "all of dW"
        assert (whole.new[0], whole.new[-1]) == (curve.losses[0], curve.losses[-1])
    out = next(one for one in report.maps if one.title == "Loss without the layer")
    verb = "lowers" if effects.gain.mean >= 0 else "raises"
    amount = text.bits(abs(effects.gain.mean))
    assert f"The whole adapter {verb} the loss of text by {amount:.4g} bits" in out.explanation
    shown = {value for row in out.values for value in row if value is not None}
    assert shown == {text.bits(one.mean) for path, one in effects.out.items() if path}


def test_gather_without_a_text_says_so():
    report = report_of("lora", text=None, also=None)
    parts = ("maps", "rank_curve", "text", "intruders")
    assert report.omitted == {"training": ALONE, **dict.fromkeys(parts, NO_TEXT)}
    assert len(report.maps) == 2
    assert report.intruders.scalings == []
    assert report.intruders.counts[-1] > 0


def test_gather_takes_the_reason_of_what_is_missing():
    missing = {"model": "the model is elsewhere", "training": "no log"}
    report = gather(Sources("title", missing=missing))
    assert report.omitted.pop("training") == "no log"
    assert set(report.omitted) == {"maps", "spectra", "rank_curve", "text", "intruders"}
    assert set(report.omitted.values()) == {"the model is elsewhere"}
    assert report.architecture.note == "the model is elsewhere"
    missing = {"data": "the text is elsewhere"}
    report = gather(Sources("title", Subject(make_adapted("lora")), missing=missing))
    assert report.omitted["text"] == report.omitted["rank_curve"] == "the text is elsewhere"


@pytest.mark.parametrize("kind", ["lora", "adalora", "dora", *list(MAPS)[:2]])
def test_gather_of_an_adapter_without_its_base_shows_what_its_file_says(kind, tmp_path):
    make_adapted(kind).save_pretrained(tmp_path / "a")
    report = gather(Sources("title", adapter=tmp_path / "a", missing={"model": "gone"}))
    as_json(report)
    assert report.omitted["maps"] == "gone"
    is_map = kind in MAPS
    assert bool(report.spectra) == (not is_map)
    assert all(spectrum.weight == [] for spectrum in report.spectra)
    assert next(fact.name for fact in report.summary) == "Method"
    assert report.architecture.trained > 0
    if kind == "lora":
        whole = report_of(kind)
        paths = {one.layer: one.update for one in report.spectra}
        for spectrum in whole.spectra:
            np.testing.assert_allclose(paths[spectrum.layer], spectrum.update, rtol=1e-6)


def test_gather_of_several_active_adapters_says_that_a_report_is_about_one():
    model = get_multitask_model(make_base("lora"), {"a": LoraConfig(r=2), "b": LoraConfig(r=2)})
    model.set_adapter(["a", "b"])
    report = gather(Sources("title", Subject(model), tokenizer=ByteTokenizer(), text=measured()))
    as_json(report)
    for part in ("maps", "spectra", "rank_curve", "text", "intruders"):
        assert "2 active adapters" in report.omitted[part]
    assert "LoRA, r = 2; LoRA, r = 2" in as_json(report)


def test_gather_of_a_changed_vocabulary_compares_no_losses():
    subject = Subject(make_adapted("lora"), resized=True)
    report = gather(Sources("title", subject, tokenizer=ByteTokenizer(), text=measured()))
    for part in ("maps", "rank_curve", "text", "intruders"):
        assert "number of tokens" in report.omitted[part]
    assert report.spectra


def test_gather_of_full_training_shows_what_changed_and_the_text():
    base, trained = make_base("lora"), make_base("lora")
    rng = np.random.default_rng(0)
    for p in trained.parameters():
        p.data = p.data + rng.normal(0, 0.05, p.shape).astype(p.dtype)
    sources = Sources("t", Subject(trained, base), tokenizer=ByteTokenizer(), text=measured())
    report = gather(sources, threads=1)
    as_json(report)
    assert report.omitted.keys() == {"training", "maps", "rank_curve", "intruders"}
    assert "all weights" in report.omitted["rank_curve"]
    before = dict(base.named_modules())["model.layers.1.mlp.up_proj"].weight.numpy()
    after = dict(trained.named_modules())["model.layers.1.mlp.up_proj"].weight.numpy()
    row = report.maps[0].values[report.maps[0].kinds.index("up_proj")]
    ratio = np.linalg.norm(after.astype(float) - before) / np.linalg.norm(before)
    assert row[report.maps[0].blocks.index("1")] == pytest.approx(ratio, rel=1e-6)
    assert any(one.base != one.adapted for one in report.text.tokens)
    assert report.architecture.trained == report.architecture.parameters


def test_gather_of_weights_that_are_not_finite_leaves_parts_out():
    model = make_adapted("lora")
    layer = next(iter(model.adapters_by_path("default").values()))
    layer.lora_B.data = layer.lora_B.data * np.float32(np.nan)
    report = gather(Sources("t", Subject(model), tokenizer=ByteTokenizer(), text=measured()))
    as_json(report)
    assert "not finite" in report.omitted["maps"]
    assert report.rank_curve is None


def test_gather_of_an_adapter_that_changes_nothing_has_no_spectra():
    model = get_peft_model(make_base("lora"), LoraConfig(r=2)).eval()
    report = gather(Sources("t", Subject(model), tokenizer=ByteTokenizer(), text=measured()))
    as_json(report)
    assert "dW is zero in every layer" in report.omitted["spectra"]
    assert report.rank_curve.ranks == [0]
    assert report.rank_curve.energies == [1]
    assert report.intruders.counts[:5] == [0] * 5


def test_gather_passes_hostile_names_through_as_plain_text(tmp_path):
    name = "<script>alert('1')</script>\u202e"
    model = make_adapted("lora")
    folder = tmp_path / "a<b>"
    model.save_pretrained(folder)
    sources = Sources(
        title=name,
        subject=Subject(model),
        base=name,
        tokenizer=ByteTokenizer(),
        text=measured(name=name),
        command=["finetune", name],
        settings={"<i>": name},
        files={name: folder},
        missing={"training": name},
    )
    report = gather(sources, threads=1)
    assert report.title == report.text.name == report.rank_curve.text == name
    assert report.omitted["training"].startswith("<script>alert('1')</script>")
    facts = {fact.name: fact.value for fact in report.provenance}
    assert facts["<i>"] == name
    assert facts["command"] == f"minilora finetune {name}"
    assert f"SHA-256 of {name}: adapter_model.safetensors" in facts
