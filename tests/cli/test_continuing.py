"""finetune --adapter: training goes on from an adapter, whose own configuration holds."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from minilora import CausalLM, PeftModel
from minilora.cli import main
from minilora.data.texts import split_text
from minilora.formats import load_file, save_file
from minilora.lora.files.adapter import AdapterFile
from minilora.training.loop import Settings, train

TRAIN = "--data book.txt --steps 4 --batch-size 2 --context 8 --threads 1 --lr 0.05"
SHAPE = "--hidden-size 8 --intermediate-size 8 --num-hidden-layers 1 --num-attention-heads 2"
FINETUNE = f"finetune --base base {TRAIN}"

# Every kind of adapter that finetune makes, by its options.
KINDS = {
    "lora": '--rank-pattern {"q_proj":3} --lora-dropout 0.1 --use-rslora',
    "dora": "--method dora --r 2",
    "adalora": "--method adalora --r 2 --steps 12",
    "saved": "--target-modules q_proj --modules-to-save lm_head",
    "tokens": "--target-modules q_proj --trainable-token-indices 1,97",
    "tied": "--target-modules embed_tokens,lm_head --ensure-weight-tying",
}


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(line.split())
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> str:
    code, out, err = run(line)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuing")
    with chdir(folder):
        Path("book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
        ok(f"pretrain {TRAIN} {SHAPE} --out base")
        ok(f"pretrain {TRAIN} {SHAPE} --hidden-size 12 --out wide")
        for kind, options in KINDS.items():
            ok(f"{FINETUNE} {options} --out {kind}")
        ok(f"{FINETUNE.replace('--data', '--tasks')} --out tasks")
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def bits(folder: str) -> dict[str, bytes]:
    arrays = load_file(f"{folder}/adapter_model.safetensors")
    return {key: array.tobytes() for key, array in arrays.items()}


def config_of(folder: str) -> dict:
    return json.loads(Path(folder, "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_goes_on_from_an_adapter(kind, world):
    """At step 0 it computes what the adapter computed at its end; what is saved is an adapter."""
    steps = "--steps 8" if kind == "adalora" else ""
    out = ok(f"{FINETUNE} {steps} --adapter {kind} --out new")
    assert f"goes on from {kind}\n" in out
    first = json.loads(Path("new/eval.jsonl").read_text().splitlines()[0])
    last = json.loads(Path(kind, "eval.jsonl").read_text().splitlines()[-1])
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-6)
    before, after = bits(kind), bits("new")
    assert before.keys() == after.keys()
    assert before != after
    schedule = ["tinit", "tfinal", "deltaT", "total_step", "rank_pattern"]
    left_out = schedule if kind == "adalora" else []
    was, now = config_of(kind), config_of("new")
    assert all(was[key] == now[key] for key in was if key not in left_out)
    PeftModel.from_pretrained(CausalLM.from_pretrained("base"), "new")


def test_finetune_with_an_adapter_is_train_from_its_weights(world):
    """The optimizer is new, and steps count from 0: the bits of `train` with the loaded adapter."""
    ok(f"{FINETUNE} --adapter lora --out new")
    base = CausalLM.from_pretrained("base")
    model = PeftModel.from_pretrained(base, "lora", is_trainable=True)
    text, _ = split_text(Path("book.txt").read_bytes())
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    settings = Settings(steps=4, batch_size=2, context=8, threads=1, lr=0.05)
    losses = train(model, ids, settings, Path("by-hand")).losses
    lines = Path("new/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_finetune_with_an_adapter_resumes_to_the_same_bits(kind, world):
    steps = "--steps 8" if kind == "adalora" else "--steps 4"
    line = f"{FINETUNE} {steps} --adapter {kind} --save-every 2"
    ok(f"{line} --out straight")
    shutil.copytree("straight", "new")
    last = "step-8" if kind == "adalora" else "step-4"
    shutil.rmtree(f"new/checkpoints/{last}")
    Path("new/adapter_model.safetensors").unlink()
    ok(f"{line} --out new --resume")
    assert bits("new") == bits("straight")


def test_finetune_resumed_with_another_adapter_is_another_run(world):
    ok(f"{FINETUNE} --adapter lora --save-every 2 --out new")
    shutil.rmtree("new/checkpoints/step-4")
    ok(f"{FINETUNE} --adapter lora --lr 0.01 --out other")
    for options in ("--adapter other", KINDS["lora"]):
        code, _, err = run(f"{FINETUNE} {options} --out new --resume")
        assert code == 3
        assert "belongs to another run: starting weights (was '" in err


REFUSED = {
    "--adapter lora --r 4": "--r 4, but --adapter 'lora' has r = 8: leave it out",
    "--adapter lora --lora-alpha 3": "--lora-alpha 3, but --adapter 'lora' has lora_alpha = 8",
    "--adapter lora --lora-dropout 0": "--lora-dropout 0, but --adapter 'lora' has",
    "--adapter lora --target-modules q_proj": "--target-modules ['q_proj'], but --adapter 'lora'",
    "--adapter lora --use-dora": "--use-dora True, but --adapter 'lora' has use_dora = False",
    "--adapter lora --method dora": "--method dora, but --adapter 'lora' has method lora",
    "--adapter dora --method lora": "--method lora, but --adapter 'dora' has method dora",
    "--adapter lora --method full": "--method full, but --adapter 'lora' has method lora",
    "--adapter lora --target-r 2": "--target-r is for AdaLoRA, and --adapter 'lora' is not",
    "--adapter adalora --r 3": "--r 3, but --adapter 'adalora' has target_r = 2",
    "--adapter adalora --tfinal 4": "tinit must be below total_step - tfinal = 0",
    "--adapter tokens --trainable-token-indices 1": "--trainable-token-indices [1], but",
    "--adapter tasks": "--adapter 'tasks' has one adapter per task: give the folder of one of them",
    "--adapter lora --shared-r 2": "--shared-r is for an adapter that tasks share",
    "--adapter lora --tasks book.txt": "--adapter goes on from one adapter, not from one per task",
}


@pytest.mark.parametrize("options", REFUSED)
def test_finetune_refuses_options_that_contradict_the_adapter(options, world):
    line = FINETUNE.replace("--data book.txt", "") if "--tasks" in options else FINETUNE
    code, _, err = run(f"{line} {options} --out new")
    assert code == 2
    assert err.startswith(f"minilora: error: {REFUSED[options]}")
    assert not Path("new").exists()


def test_finetune_takes_options_that_agree_with_the_adapter(world):
    ok(f"{FINETUNE} --adapter lora --r 8 --target-modules v_proj,q_proj --method lora --out new")
    ok(f"{FINETUNE} --adapter adalora --r 2 --tinit 1 --deltaT 2 --out ada")
    assert (config_of("ada")["tinit"], config_of("ada")["total_step"]) == (1, 4)


def test_finetune_refuses_an_adapter_of_another_base_or_with_nan(world):
    code, _, err = run(f"{FINETUNE.replace('base base', 'base wide')} --adapter lora --out new")
    assert code == 3
    assert "the adapter does not fit this base" in err
    shutil.copytree("lora", "nan")
    arrays = load_file("lora/adapter_model.safetensors")
    spoilt = {key: array * np.float32("nan") for key, array in arrays.items()}
    save_file("nan/adapter_model.safetensors", spoilt)
    assert run(f"{FINETUNE} --adapter nan --out new")[0] == 5
    assert not Path("new").exists()


def test_finetune_goes_on_from_one_task_of_several(world):
    with AdapterFile("tasks/book") as file:
        r = file.config.r
    ok(f"{FINETUNE} --adapter tasks/book --r {r} --out new")
