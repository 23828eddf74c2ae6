"""minilora report, and finetune --report: what is read for a page, and where it is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_lines import ok, refused, run_words
from pages import NAME, stand_in

from minilora.formats import load_file, save_file
from minilora.lab.report.content import Report
from minilora.lab.report.writing import MARK

pytestmark = pytest.mark.filterwarnings("default")

TINY = "--batch-size 2 --context 16 --threads 1 --steps 4"
SHAPE = "--hidden-size 16 --intermediate-size 24 --num-hidden-layers 1 --num-attention-heads 2"
FINETUNE = f"finetune --base base --data book.txt {TINY} --lr 0.05"
GIVEN = "report --base base --adapter run --data book.txt --context 16 --threads 1"


@pytest.fixture
def pages(monkeypatch):
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with contextlib.chdir(folder):
        Path("book.txt").write_text("the quick brown fox jumps över the lazy dog, again. " * 12)
        Path("old.txt").write_text("other words, and more of them, are here. " * 10)
        Path("record.jsonl").write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n' * 4)
        ok(f"pretrain --data old.txt --out base {TINY} {SHAPE}")
        ok(f"{FINETUNE} --out run --also-evaluate old.txt --save-every 2")
        ok(f"{FINETUNE} --out full --method full")
        ok(f"finetune --base base --tasks book.txt old.txt --out tasks {TINY}")
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch, pages):
    for path in made.iterdir():
        copied = tmp_path / path.name
        shutil.copytree(path, copied) if path.is_dir() else shutil.copy(path, copied)
    monkeypatch.chdir(tmp_path)
    return pages


def facts(rows: Any) -> dict[str, str]:
    return {row.name: row.value for row in rows}


# ---- a run ---------------------------------------------------------------------------------------


def test_report_of_a_run_has_every_part(world):
    printed = ok("report run")
    (report,) = world.reports
    assert report.omitted == {}
    page = Path("run/report.html")
    assert printed == f"run/report.html, {page.stat().st_size / 1e6:.1f} MB\n"
    assert page.read_bytes().endswith(MARK)
    evaluations = [json.loads(line) for line in Path("run/eval.jsonl").read_text().splitlines()]
    summary = facts(report.summary)
    assert summary["Method"] == "LoRA"
    assert summary["Steps"] == "4"
    for name, key in (("Held-out", "bits_per_byte"), ("Second text's", "also_bits_per_byte")):
        first, last = evaluations[0][key], evaluations[-1][key]
        assert f"{first:.4f} -> {last:.4f} (" in summary[f"{name} bits per byte"]
    assert "of the held-out part of book.txt" in summary["Measured for this page"]
    first, last = (evaluations[place]["bits_per_byte"] for place in (0, -1))
    assert f"{first:.4f} -> {last:.4f} (" in summary["Bits per byte there"]
    provenance = facts(report.provenance)
    assert provenance["command"].startswith("minilora finetune --base base --data book.txt")
    for what in ("base: model.safetensors", "adapter: adapter_model.safetensors"):
        assert len(provenance[f"SHA-256 of {what}"]) == 64
    assert {"SHA-256 of text: book.txt", "SHA-256 of second text: old.txt"} <= provenance.keys()
    assert provenance["lr"] == "0.05"
    assert report.intruders.scalings[0].old
    ok("report run")  # an earlier page is replaced


def test_report_of_a_run_leaves_out_what_is_gone(world):
    Path("book.txt").rename("moved.txt")
    ok("report run")
    report = world.reports[-1]
    assert report.omitted.keys() == {"maps", "rank_curve", "text", "intruders"}
    assert all("'book.txt'" in reason for reason in report.omitted.values())
    assert len(report.maps) == 2
    ok("report run --data moved.txt")
    assert world.reports[-1].omitted == {}
    assert world.reports[-1].text.name == "moved.txt"
    Path("base").rename("moved")
    ok("report run")
    report = world.reports[-1]
    assert report.omitted.keys() == {"maps", "rank_curve", "text", "intruders"}
    assert "'base', which the run names, cannot be read" in report.omitted["maps"]
    assert report.spectra
    assert report.training is not None
    ok("report run --base moved --data moved.txt")
    assert world.reports[-1].omitted == {}
    refused("report run --base nowhere", 4, "nowhere")
    refused("report run --base moved --data nowhere.txt", 4, "nowhere.txt")


def test_report_of_a_run_without_its_command_or_log(world):
    Path("run/command.json").unlink()
    ok("report run")
    report = world.reports[-1]  # the adapter itself names its base
    assert "command.json" in report.omitted["text"]
    assert report.spectra
    ok("report run --data book.txt --also old.txt")
    assert world.reports[-1].omitted == {}
    Path("run/log.jsonl").write_text("[1]\n")
    ok("report run")
    assert "not the log of a run" in world.reports[-1].omitted["training"]
    Path("run/log.jsonl").unlink()
    ok("report run")
    assert "log.jsonl" in world.reports[-1].omitted["training"]


def test_report_of_a_stopped_run_reads_its_newest_checkpoint(world):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        Path("run", name).unlink()
    ok("report run")
    assert world.reports[-1].omitted == {}
    shutil.rmtree("run/checkpoints")
    ok("report run")
    assert "no checkpoint" in world.reports[-1].omitted["maps"]
    assert world.reports[-1].training is not None


def test_report_of_full_training_and_of_tasks(world):
    ok("report full")
    report = world.reports[-1]
    assert facts(report.summary)["Method"] == "all weights"
    assert report.maps
    assert report.text is not None
    ok("report tasks")
    report = world.reports[-1]
    assert "one adapter per task" in report.omitted["maps"]
    assert report.training is not None
    ok("report --base base --adapter tasks/book --data book.txt --context 16")
    assert world.reports[-1].rank_curve is not None
    ok("report base")
    assert "base is not at hand" in world.reports[-1].omitted["maps"]


def test_report_of_damaged_weights_says_what_is_wrong(world):
    weights = Path("run/adapter_model.safetensors")
    tensors = load_file(weights)
    save_file(weights, {key: a * np.float32(np.nan) for key, a in tensors.items()})
    for line in ("report run", GIVEN):
        ok(line)
        omitted = world.reports[-1].omitted
        assert all("not finite" in omitted[part] for part in ("maps", "spectra", "text"))
    weights.write_bytes(weights.read_bytes()[:300])
    ok("report run")
    report = world.reports[-1]
    assert "not a safetensors file" in report.omitted["architecture"]
    assert report.training is not None
    refused(GIVEN, 3, "not a safetensors file")


def test_report_of_a_folder_with_an_odd_name(world):
    name = os.fsdecode(b"\xff<b>&")
    Path("run").rename(name)
    code, out, err = run_words(["report", name])
    assert code == 0, err
    assert out.startswith(r"\udcff<b>&/report.html, ")
    assert Path(name, "report.html").is_file()


# ---- a base and an adapter -----------------------------------------------------------------------


def test_report_of_a_base_and_an_adapter(world):
    assert ok(GIVEN).startswith("run/report.html, ")
    report = world.reports[-1]
    assert report.omitted.keys() == {"training"}
    assert report.intruders.scalings[0].old == []
    ok(f"{GIVEN} --also record.jsonl --limit 1 --out x.html --quantize nf4")
    report = world.reports[-1]
    assert report.intruders.scalings[0].old
    assert facts(report.summary)["Measured for this page"] == "1 window, 16 tokens of book.txt"
    ok("report --base base --adapter run --data record.jsonl --out x.html")
    assert any(one.adapted is not None for one in world.reports[-1].text.tokens)


def test_report_refuses_options_that_do_not_fit(world):
    refused("report", 2, "give RUN")
    refused("report --base base", 2, "--adapter DIR")
    refused("report run --adapter run", 2, "either RUN")
    refused("report --base base --adapter run --also old.txt", 2, "--also", "--data")
    refused("report nowhere", 2, "RUN must be the folder of a run")
    refused("report book.txt", 2, "RUN must be the folder of a run")
    Path("empty").mkdir()
    refused("report empty", 2, "not the folder of a run")
    refused("report --base base --adapter tasks", 2, "several tasks")
    refused("report --base base --adapter base --data book.txt", 3, "adapter_config.json")
    refused(f"{GIVEN} --context 100000", 2, "--context")
    assert world.reports == []


def test_report_overwrites_nothing_but_a_report(world):
    Path("notes.html").write_text("<p>mine")
    refused(f"{GIVEN} --out notes.html", 2, "notes.html", "not a report", "--out")
    refused(f"{GIVEN} --out notes.txt", 2, "must end in .html")
    Path("folder.html").mkdir()
    refused(f"{GIVEN} --out folder.html", 2, "is a folder")
    refused(f"{GIVEN} --out nowhere/x.html", 4, "nowhere")
    assert world.reports == []  # before anything is computed
    assert Path("notes.html").read_text() == "<p>mine"
    Path("run/report.html").write_text("")
    refused("report run", 2, "report.html", "not a report")


def test_report_without_the_extra_computes_nothing(world, monkeypatch):
    world.reason = 'jinja2 is missing: pip install "minilora[page]"'
    refused("report run", 2, 'pip install "minilora[page]"')
    assert not Path("run/report.html").exists()


# ---- finetune --report ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "--method dora", "--quantize nf4", "--method full"])
def test_finetune_report_writes_the_page_at_the_end(world, options):
    printed = ok(f"{FINETUNE} --out new --report {options}")
    assert printed.splitlines()[-1].startswith("new/report.html, ")
    (report,) = world.reports
    assert report.training is not None
    assert report.text.name == "the held-out part of book.txt"
    whole = Path("new/report.html").read_bytes()
    ok("report new")  # the same, but for nothing
    assert Path("new/report.html").read_bytes() == whole


def test_finetune_report_that_fails_leaves_the_run_as_it_is(world, monkeypatch):
    def fail(report: Report) -> str:
        raise RuntimeError("the pen is broken")

    monkeypatch.setattr(sys.modules[NAME], "render", fail)
    printed = ok(f"{FINETUNE} --out new --report")
    assert printed.splitlines()[-1] == "(no page: RuntimeError: the pen is broken)"
    assert Path("new/adapter_model.safetensors").is_file()
    assert not Path("new/report.html").exists()
    world.reason = "jinja2 is missing"
    printed = ok(f"{FINETUNE} --out other --report")
    assert printed.splitlines()[-1] == "(no page: jinja2 is missing)"


def test_finetune_without_report_writes_no_page(world):
    ok(f"{FINETUNE} --out new")
    assert not Path("new/report.html").exists()
    assert world.reports == []


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_finetune_report_of_a_changed_base_measures_over_the_weights(world, start):
    """The adapter that is saved is for the weights, whatever codes the run trained over."""
    ok(f"{FINETUNE} --out new --quantize nf4 --init-lora-weights {start} --report")
    (report,) = world.reports
    assert report.omitted == {}
    bits = facts(report.summary)["Bits per byte there"].split(" (")[0].split(" -> ")
    evaluation = Path("run/eval.jsonl").read_text().splitlines()[0]  # of the base's weights
    expected = f"{json.loads(evaluation)['bits_per_byte']:.4f}"
    assert (bits[0] == expected) == (start != "loftq")  # whose base is what its codes decode to


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "log.jsonl", "eval.jsonl"])
def test_report_of_a_run_that_lacks_a_file_says_what_is_left_out(world, name):
    Path("run", name).unlink()
    ok("report run --out page.html")
    (report,) = world.reports
    assert ("maps" in report.omitted) == (name == "adapter_model.safetensors")
    assert ("training" in report.omitted) == (name == "log.jsonl")
    reasons = " ".join(report.omitted.values())
    assert "Errno" not in reasons
    assert "'base', which the run names" not in reasons  # nothing is wrong with it


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        ("--context 100000", 2, "100000"),
        ("--initial nowhere", 2, "--initial"),
        ("--data nowhere", 4, "nowhere"),
    ],
)
def test_report_of_a_run_refuses_a_wrong_option_and_writes_nothing(world, options, code, word):
    refused(f"report run {options}", code, word)
    assert world.reports == []
    assert not Path("run/report.html").exists()


def test_finetune_report_says_an_error_of_the_disk_as_the_command_does(world, monkeypatch):
    def fail(report: Report) -> str:
        raise OSError(28, "No space left on device", "new/report.html")

    monkeypatch.setattr(sys.modules[NAME], "render", fail)
    printed = ok(f"{FINETUNE} --out new --report")
    assert printed.splitlines()[-1] == "(no page: No space left on device: 'new/report.html')"


def test_report_of_a_run_without_its_text_says_what_to_give(world):
    Path("run/command.json").unlink()
    ok("report run --out page.html")
    assert world.reports[-1].omitted["text"].startswith("give --data FILE")


def test_report_of_a_folder_of_runs_names_one_of_them(world):
    Path("swept").mkdir()
    refused("report swept", 2, "not the folder of a run", "nor log.jsonl")
    Path("run").rename("swept/r=2")
    refused("report swept", 2, "give one of the runs in it, such as", "r=2")
