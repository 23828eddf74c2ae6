"""minilora replay: one thing changed beside a twin that must have the bits of the log."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from command_lines import ok, refused, run

from minilora import CausalLM, TransformerConfig
from minilora.data.tokenizer import ByteTokenizer
from minilora.training.replaying import CHANGEABLE
from minilora.training.run import Run

CONFIG = TransformerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
)
TRAIN = "--batch-size 2 --context 8 --steps 6 --warmup 0 --eval-every 3 --save-every 2 --threads 1"
METHODS = {
    "lora": "--r 2 --lora-dropout 0.1",
    "adalora": "--method adalora --r 2 --tinit 1 --tfinal 1 --deltaT 1",
    "best": "--r 2 --keep best --optimizer loraplus",
    "pissa": "--r 2 --init-lora-weights pissa",
    "full": "--method full",
    "lora_ga": "--r 2 --init-lora-weights lora_ga",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replaying")
    with contextlib.chdir(folder):
        CausalLM(CONFIG).save_pretrained(folder / "base")
        ByteTokenizer().save(folder / "base")
        Path("book.txt").write_text("".join(f"{n} and {n * n}. " for n in range(40)))
        for name, options in METHODS.items():
            ok(f"finetune --base base --data book.txt {TRAIN} {options} --out {name}")
    return folder


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize(("name", "step"), [("lora", 0), *((name, 4) for name in METHODS)])
def test_replay_with_nothing_changed_has_the_bits_of_the_log(world, tmp_path, name, step):
    out = ok(f"replay {name} --from {step} --out '{tmp_path}/out'")
    assert f"has the bits of the log: {6 - step} steps from step {step}" in out
    twin = lines(tmp_path / "out/twin/log.jsonl")
    for line, other in zip(lines(world / name / "log.jsonl")[step:], twin, strict=True):
        assert {**line, "seconds": 0} == {**other, "seconds": 0}
    assert not (tmp_path / "out/changed").exists()


@pytest.mark.parametrize("step", [0, 4])
def test_replay_with_the_same_value_changes_no_bit(world, tmp_path, step):
    line = f"replay lora --from {step} --set lora-dropout=0.1 --out '{tmp_path}/out' --json"
    report = json.loads(ok(line))
    assert report["equal steps"] == 6 - step
    for row in [*report["training"], *report["held out"]]:
        assert row["difference"] == 0


CHANGES = {
    "lr": 0.02, "floor": 1, "warmup": 5, "steps": 8, "weight_decay": 0.5, "max_grad_norm": 0.01,
    "seed": 3, "batch_size": 4, "accumulate": 2, "context": 16, "lora_alpha": 32,
    "lora_dropout": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_replay_changes_one_thing_from_the_checkpoint(world, tmp_path, name):
    line = f"replay lora --from 4 --set {name}={CHANGES[name]} --out '{tmp_path}/out' --json"
    report = json.loads(ok(line))
    assert report["set"] == {name: str(CHANGES[name])}
    assert [row["step"] for row in report["training"]] == [4, 5]
    rows = [*report["training"], *report["held out"]]
    assert any(row["difference"] for row in rows)
    twin, changed = (lines(tmp_path / "out" / kind / "log.jsonl") for kind in ("twin", "changed"))
    assert [line["step"] for line in twin] == [4, 5]
    assert changed[0]["step"] == 4
    names = [name for name in twin[0] if name != "seconds"]
    assert any(one[k] != two[k] for one, two in zip(twin, changed, strict=False) for k in names)


def test_replay_can_change_what_belongs_to_an_optimizer(world, tmp_path):
    line = f"replay best --from 4 --set loraplus-lr-ratio=1 --out '{tmp_path}/out'"
    assert "the difference is what the change causes" in ok(line)
    assert {*CHANGES, "loraplus_lr_ratio", "loraplus_lr_embedding", "riemannian_reg"} == {
        *CHANGEABLE
    }


def test_replay_keeps_the_start_of_the_run_whatever_changes(world, tmp_path):
    """lora_ga begins from the first batches, which another seed would draw anew."""
    out = ok(f"replay lora_ga --from 4 --set seed=3 --out '{tmp_path}/out'")
    assert "changed: seed = 3" in out


@pytest.mark.parametrize("file", ["log.jsonl", "eval.jsonl"])
def test_replay_refuses_a_twin_that_differs_from_the_log(world, tmp_path, file):
    shutil.copytree("lora", tmp_path / "run")
    path = tmp_path / "run" / file
    changed = lines(path)
    changed[-1]["loss"] += 1e-15 * 4
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    line = f"replay '{tmp_path}/run' --from 4 --set lr=0.1 --out '{tmp_path}/out'"
    refused(line, 3, "step", "the unchanged twin has", "loss")
    assert not (tmp_path / "out/changed").exists()


def test_replay_refuses_files_that_are_not_those_of_the_run(world, tmp_path, monkeypatch):
    shutil.copytree(".", tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    text = Path("book.txt").read_text()
    Path("book.txt").write_text(text + "more text, which changes what is trained on. " * 3)
    refused("replay lora --from 4", 3, "belongs to another run", "text")
    Path("book.txt").write_text(text)
    CausalLM(CONFIG, seed=5).save_pretrained("base")
    refused("replay lora --from 4", 3, "belongs to another run", "frozen weights")
    shutil.rmtree("base")
    refused("replay lora --from 4", 4, "base")


def test_replay_refuses_what_cannot_be_replayed(world, tmp_path):
    refused("replay base --from 0", 2, "no command.json")
    refused("replay nowhere --from 0", 4, "no such run folder", "nowhere")
    refused("replay book.txt --from 0", 4, "the run must be a folder", "book.txt")
    refused("replay lora --from 3", 2, "choose among 0, 4, 6")
    refused("replay lora --from 6", 2, "nothing to replay")
    refused("replay lora --from 4 --set lr", 2, "--set must be name=value")
    refused("replay lora --from 4 --set r=4", 2, "--set r cannot change")
    refused("replay lora --from 4 --set lr=0.1 --set seed=2", 2, "--set must be given once")
    refused("replay lora --from 4 --set lr=-1", 2, "lr must be")
    refused("replay lora --from 4 --set lr=x", 2, "lr must be")
    refused("replay lora --from 4 --set loraplus_lr_ratio=2", 2, "optimizer")
    refused("replay lora --from 4 --set =3", 2, "--set must be name=value")
    refused(
        "replay lora --from 4 --set lr=0.1 --out lora", 2, "choose another folder, or remove it"
    )
    refused("replay full --from 4 --set lora_alpha=3", 2, "lora")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("lora --set steps=3", 2, "--set steps=3 leaves no step to take after --from 4"),
        ("lora --set steps=4", 2, "give at least steps=5"),
        ("lora --set context=99", 2, "max_position_embeddings = 32"),
        ("adalora --set steps=8", 2, "--set steps=8 changes what step 4 has behind it"),
    ],
)
def test_replay_refuses_a_change_before_the_twin_trains(world, tmp_path, line, code, words):
    name, _, change = line.partition(" ")
    refused(f"replay {name} --from 4 {change} --out '{tmp_path}/out'", code, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [0, 4])
def test_replay_names_the_file_that_is_another_one(world, tmp_path, monkeypatch, step):
    """Also from step 0, for which the run has no checkpoint; nothing is put down to --set."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    Path("book.txt").write_text(Path("book.txt").read_text().replace("and", "und"))
    for change in ("", "--set lr=0.1"):
        refused(f"replay lora --from {step} --out new {change}", 3, "step-", "text (was")
        assert not Path("new").exists()


def test_finetune_that_is_refused_keeps_the_command_of_the_run(world, tmp_path):
    shutil.copytree("lora", tmp_path / "run")
    command = tmp_path / "run/command.json"
    before = command.read_bytes()
    line = f"finetune --base base --data book.txt {TRAIN} {METHODS['lora']} --out '{tmp_path}/run'"
    refused(f"{line} --resume --seed 5", 3, "seed (was 0, now 5)")
    assert command.read_bytes() == before


def test_replay_of_a_run_that_was_stopped(world, tmp_path, monkeypatch):
    """Its log ends early: what it has is compared."""
    line = f"finetune --base base --data book.txt {TRAIN} {METHODS['lora']} --out '{tmp_path}/run'"
    step = Run.step

    def stopped(self: Run, sharded: Any) -> Any:
        result = step(self, sharded)
        if self.done == 5:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Run, "step", stopped)
    assert run(line)[0] == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.chdir(world)
    out = ok(f"replay '{tmp_path}/run' --from 4 --out '{tmp_path}/out'")
    assert "has the bits of the log: 1 step from step 4" in out


def test_replay_repeats_a_run_of_several_tasks(world, tmp_path):
    Path("other.txt").write_text("the quick brown fox. " * 20)
    ok(f"finetune --base base --tasks book.txt other.txt {TRAIN} --r 2 --out '{tmp_path}/tasks'")
    out = ok(f"replay '{tmp_path}/tasks' --from 4 --set lr=0.1 --out '{tmp_path}/out'")
    assert "has the bits of the log" in out


def test_finetune_trains_on_a_file_whose_name_is_not_utf_8(world, tmp_path):
    """Its command is no JSON, so that the run cannot be replayed."""
    name = str(tmp_path / "book\udcff.txt")
    shutil.copy("book.txt", name)
    ok(f"finetune --base base --data '{name}' {TRAIN} --r 2 --out '{tmp_path}/run'")
    refused(f"replay '{tmp_path}/run' --from 4", 2, "no command.json", "UTF-8")


def test_replay_reads_the_command_as_finetune_does(world, tmp_path):
    """A command file is as strict as the command line, and only that of finetune."""
    shutil.copytree("lora", tmp_path / "run")
    command = tmp_path / "run/command.json"
    line = f"replay '{tmp_path}/run' --from 4"
    for content, code, word in (
        ({"command": ["merge", "--base", "base"]}, 2, "runs of finetune"),
        ({"command": []}, 2, "runs of finetune"),
        ({"command": "finetune"}, 3, "a list of words"),
        ({"command": ["finetune", "--data", 1]}, 3, "a list of words"),
        ({"command": ["finetune", "--base", "base", "--nonsense", "1"]}, 2, "nonsense"),
        ({"command": ["finetune"]}, 2, "--base"),
    ):
        command.write_text(json.dumps(content))
        refused(line, code, word)
    command.write_text("{")
    refused(line, 3, "command.json")
