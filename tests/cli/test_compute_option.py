"""--compute: products with frozen weights by a reduced arithmetic, from the command line."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.formats import load_file
from minilora.lora import MultiTask

TRAIN = "--data book.txt --steps 4 --batch-size 2 --context 8 --threads 1 --lr 0.05"
SHAPE = "--hidden-size 8 --intermediate-size 8 --num-hidden-layers 1 --num-attention-heads 2"
FINETUNE = f"finetune --base base {TRAIN}"
COMMANDS = {
    "finetune": FINETUNE,
    "evaluate": "evaluate --base base --data book.txt",
    "generate": "generate --base base --prompt the",
}
ANY_ARITHMETIC = pytest.mark.parametrize("compute", ["tf32", "bfloat16"])


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(line.split())
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> str:
    code, out, err = run(line)
    assert code == 0, err
    return out


def refused(line: str, *parts: str) -> None:
    code, _, err = run(line)
    assert code == 2, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compute")
    with chdir(folder):
        Path("book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
        ok(f"pretrain {TRAIN} {SHAPE} --out base")
        ok(f"{FINETUNE} --init-lora-weights false --out exact")
        shutil.copy("book.txt", "other.txt")
        tasks = FINETUNE.replace("--data book.txt", "--tasks book.txt other.txt")
        ok(f"{tasks} --init-lora-weights false --out tasks")
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@ANY_ARITHMETIC
def test_finetune_compute_is_used_said_and_part_of_the_run(compute, world):
    line = f"{FINETUNE} --init-lora-weights false --save-every 2"
    out = ok(f"{line} --compute {compute} --out run")
    assert f"products with frozen weights: {compute}\n" in out
    weights = load_file("run/adapter_model.safetensors")
    exact = load_file("exact/adapter_model.safetensors")
    assert {key: a.tobytes() for key, a in weights.items()} != {
        key: a.tobytes() for key, a in exact.items()
    }
    manifest = json.loads(Path("run/checkpoints/step-4/manifest.json").read_text())
    assert manifest["state"]["run"]["compute"] == compute
    shutil.rmtree("run/checkpoints/step-4")
    code, _, err = run(f"{line} --out run --resume")
    assert code == 3
    assert f"compute (was '{compute}', now 'float32')" in err
    ok(f"{line} --compute {compute} --out run --resume")
    again = load_file("run/adapter_model.safetensors")
    assert {k: a.tobytes() for k, a in again.items()} == {
        k: a.tobytes() for k, a in weights.items()
    }


def test_finetune_compute_float32_is_the_default(world):
    out = ok(f"{FINETUNE} --init-lora-weights false --compute float32 --out run")
    assert "products" not in out
    weights = Path("run/adapter_model.safetensors").read_bytes()
    assert weights == Path("exact/adapter_model.safetensors").read_bytes()


@ANY_ARITHMETIC
@pytest.mark.parametrize("adapter", ["exact", "tasks --task book", "tasks --task __base__"])
def test_evaluate_and_generate_take_compute(adapter, compute, world):
    line = f"evaluate --base base --adapter {adapter} --data book.txt --context 8"
    exact, found = ok(line), ok(f"{line} --compute {compute}")
    losses = [float(text.split()[1]) for text in (exact, found)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert compute == "tf32" or exact != found
    line = f"generate --base base --adapter {adapter} --prompt the --max-new-tokens 3"
    assert ok(f"{line} --temperature 0 --compute {compute}").startswith("the")


def test_compute_runs_a_task_s_adapters_beside_the_base(world, monkeypatch):
    """W + dW, which merging forms, would be rounded."""

    def refuse(*_, **__):
        raise AssertionError("merged")

    line = "evaluate --base base --adapter tasks --task other --data book.txt --context 8"
    exact = ok(line)
    monkeypatch.setattr(MultiTask, "merge_task", refuse)
    found = ok(f"{line} --compute tf32")
    losses = [float(text.split()[1]) for text in (exact, found)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("quantize", ["nf4", "int8", "stored"])
def test_compute_goes_with_quantize(quantize, world):
    ok("convert base --dtype bfloat16 --out half")
    options = f"--quantize {quantize} --compute bfloat16"
    line = FINETUNE.replace("--base base", "--base half")
    ok(f"{line} {options} --out run")
    ok(f"evaluate --base half --adapter run --data book.txt {options}")


@pytest.mark.parametrize("command", COMMANDS)
def test_compute_refuses_another_name(command, world):
    refused(
        f"{COMMANDS[command]} --compute fp16",
        "--compute", "'fp16'", "float32", "tf32", "bfloat16",
    )  # fmt: skip
    refused(f"{COMMANDS[command]} --compute", "--compute: expected one argument")


@ANY_ARITHMETIC
def test_finetune_method_full_refuses_compute(compute, world):
    refused(
        f"{FINETUNE} --method full --compute {compute} --out run",
        f"--method full trains all weights, and --compute {compute} is for frozen ones",
    )
    assert not Path("run").exists()
    ok(f"{FINETUNE} --method full --compute float32 --out run")


def test_pretrain_has_no_compute(world):
    refused(f"pretrain {TRAIN} {SHAPE} --compute tf32 --out new", "--compute")
    assert not Path("new").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_compute(command):
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main([command, "--help"])
    assert "products with frozen weights: float32, tf32, bfloat16" in out.getvalue()
