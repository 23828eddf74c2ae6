"""The command line, end to end: what each command does, its options and its help.

Bad command lines are rows of the table in tests/support/hostile.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import snapshot
from hypothesis import given
from hypothesis import strategies as st
from pages import stand_in

import minilora.lab.demo
import minilora.training.loop
from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    MultiTask,
    PeftModel,
    TransformerConfig,
    __version__,
    get_peft_model,
    quantize,
)
from minilora.cli import build_parser, main
from minilora.cli.fields import explain_fields
from minilora.data.tokenizer import ByteTokenizer
from minilora.errors import ConfigError
from minilora.formats import load_file, save_file
from minilora.training.methods import FACTORED, MAPS_BY_METHOD, METHODS, QUANTIZE

# pytest would turn a warning into an exception; on the command line it is a line on stderr.
pytestmark = pytest.mark.filterwarnings("default")

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
NAMES = "demo pretrain finetune generate evaluate merge inspect verify devices combine diff extract"
COMMANDS = f"{NAMES} resize convert sweep graph audit compare replay plan report".split()
TINY = "--batch-size 2 --context 16 --threads 2"
SHAPE = "--hidden-size 16 --intermediate-size 24 --num-hidden-layers 1 --num-attention-heads 2"
PRETRAIN = f"pretrain {TINY} {SHAPE}"
FINETUNE = f"finetune --base base {TINY}"
TRAIN = f"{FINETUNE} --data book.txt --steps 2"
TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 10


def run(line: str | list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line, cut into words as a shell does it."""
    out, err = io.StringIO(), io.StringIO()
    argv = shlex.split(line) if isinstance(line, str) else line
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> str:
    """stdout of a command that succeeds."""
    code, out, err = run(line)
    assert code == 0, err
    return out


def as_json(line: str) -> Any:
    return json.loads(ok(f"{line} --json"))


def lines_of(path: Path) -> list[Any]:
    """The values in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def bits(folder: str | Path) -> dict[str, bytes]:
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    return {key: array.tobytes() for key, array in tensors.items()}


def spoil(source: str, name: str, file: str) -> None:
    """A copy of a folder in which every weight is NaN."""
    shutil.copytree(source, name, ignore=shutil.ignore_patterns("checkpoints", "*.jsonl"))
    tensors = load_file(f"{source}/{file}")
    save_file(f"{name}/{file}", {key: a * np.float32(np.nan) for key, a in tensors.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, adapters and texts."""
    folder = tmp_path_factory.mktemp("cli")
    with contextlib.chdir(folder):
        Path("book.txt").write_bytes(TEXT)
        Path("latin.txt").write_bytes("ÀÉÎÕÜ äöü ß ".encode("latin-1") * 40)
        with Path("sums.jsonl").open("w") as file:
            for a in range(9):
                for b in range(4):
                    record = {"prompt": f"{a} + {b} = ", "completion": f"{a + b}\n"}
                    file.write(json.dumps(record) + "\n")
        ok(f"{PRETRAIN} --data book.txt --out base --steps 4 --save-every 2")
        train = f"{FINETUNE} --steps 4 --lr 0.05"
        ok(f"{train} --data book.txt --out adapter --save-every 2")
        ok(f"{train} --tasks book.txt latin.txt --shared-r 2 --out tasks")
        ok(f"{PRETRAIN} --data book.txt --out wide --steps 1 --hidden-size 24")
        spoil("adapter", "adapter-nan", "adapter_model.safetensors")
    return folder


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


# ---- what the commands do ------------------------------------------------------------------------


def test_pretrain_and_finetune_write_folders_that_load(world):
    base = CausalLM.from_pretrained("base")
    assert base.config.hidden_size == 16
    adapted = PeftModel.from_pretrained(base, "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == "base"
    checkpoints = sorted(path.name for path in Path("base/checkpoints").iterdir())
    assert checkpoints == ["step-2", "step-4"]


@pytest.mark.parametrize("style", ["hyphens", "underscores"])
def test_main_takes_hyphens_and_underscores_in_options(style, world, tmp_path):
    options = "--batch-size=2 --target-modules o_proj --weight-decay 0.1"
    options += " --lora-alpha 3 --eval-every 1"
    if style == "underscores":
        options = re.sub(r"(?<=\w)-(?=\w)", "_", options)
    start = "finetune --base base --data book.txt --steps 1 --context 8"
    ok(f"{start} --out '{tmp_path}/out' {options}")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 3
    assert config["target_modules"] == ["o_proj"]
    assert len(lines_of(tmp_path / "out" / "eval.jsonl")) == 2


def test_finetune_trains_on_records_and_measures_them(world, tmp_path):
    out = tmp_path / "out"
    line = f"{FINETUNE} --steps 8 --lr 0.05 --warmup 0"
    printed = ok(f"{line} --data sums.jsonl --out '{out}/one'")
    found = re.search(r"per byte ([0-9.]+) -> ([0-9.]+)", printed)
    assert found is not None
    assert float(found[2]) < float(found[1])
    # Two windows of 17 bytes per step: each has one sum of 10 or 11, whose last 2 or 3 count.
    assert {4, 5, 6} >= {step["tokens"] for step in lines_of(out / "one" / "log.jsonl")}
    loss = lines_of(out / "one" / "eval.jsonl")[-1]["loss"]
    records = Path("sums.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(records[-4:]))  # the last tenth of 36
    (tmp_path / "kept.jsonl").write_text("".join(records[:-4]))
    evaluate = f"evaluate --base base --adapter '{out}/one' --context 16"
    measured = ok(f"{evaluate} --data '{tmp_path}/held.jsonl'")
    bits_per_byte = loss / np.log(2)
    assert measured.startswith(f"loss {loss:.6f} nats per token, {bits_per_byte:.4f} bits per byte")
    texts = f"--data '{tmp_path}/kept.jsonl' --eval-data '{tmp_path}/held.jsonl'"
    ok(f"{line} {texts} --out '{out}/two'")
    assert bits(out / "one") == bits(out / "two")
    ok(f"{line} --data sums.jsonl --eval-data book.txt --out '{out}/three'")
    ok(f"{line} --data book.txt --eval-data sums.jsonl --out '{out}/four'")
    ok(f"{line} --tasks sums.jsonl book.txt --out '{out}/five'")
    model = MultiTask.from_pretrained(CausalLM.from_pretrained("base"), out / "five")
    assert model.tasks.keys() == {"sums", "book"}


def test_commands_read_records_whatever_the_name_of_their_file(world, tmp_path):
    """A JSON array and JSON Lines of other names give the bits of JSON Lines."""
    lines = Path("sums.jsonl").read_text().splitlines()
    (tmp_path / "sums.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    (tmp_path / "sums.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    (tmp_path / "wrapped.json").write_text('{"version": 1, "data": [' + ",".join(lines) + "]}")
    train = f"{FINETUNE} --steps 2 --out '{tmp_path}/{{}}' --data"
    ok(f"{train.format('lines')} sums.jsonl")
    evaluate = "evaluate --base base --context 16 --data"
    measured = ok(f"{evaluate} sums.jsonl")
    kinds = {
        "sums.json": "a JSON array of",
        "sums.txt": "JSON Lines, one",
        "wrapped.json": "list 'da",
    }
    for name, kind in kinds.items():
        code, _, err = run(f"{train.format(name + '-out')} '{tmp_path}/{name}'")
        assert code == 0
        assert err.startswith(f"minilora: warning: '{tmp_path}/{name}' is read as ")
        assert kind in err
        assert err.count("\n") == 1
        assert bits(tmp_path / f"{name}-out") == bits(tmp_path / "lines")
        assert ok(f"{evaluate} '{tmp_path}/{name}'") == measured
    ok(f"{train.format('eval')} sums.jsonl --eval-data '{tmp_path}/sums.json'")
    ok(f"{FINETUNE} --steps 1 --tasks '{tmp_path}/sums.json' book.txt --out '{tmp_path}/tasks'")
    ok(f"{PRETRAIN} --steps 1 --data '{tmp_path}/sums.json' --out '{tmp_path}/base'")


def test_finetune_trains_on_a_text_that_begins_with_a_bracket(world, tmp_path):
    text = b"[a link](b) and {more}\n" * 30
    (tmp_path / "links.md").write_bytes(text)
    (tmp_path / "plain.txt").write_bytes(b"\n" + text[:-1])
    line = f"{FINETUNE} --steps 1 --data '{tmp_path}/links.md' --out '{tmp_path}/out'"
    code, out, err = run(line)
    assert code == 0
    assert f"{len(text) * 9 // 10} tokens" in out
    assert err.startswith(f"minilora: warning: '{tmp_path}/links.md' does not begin with a record")
    _, _, err = run(f"evaluate --base base --data '{tmp_path}/plain.txt'")
    assert err.startswith("minilora: warning: ")
    (tmp_path / "plain.txt").write_bytes(b"a" + text)
    assert run(f"evaluate --base base --data '{tmp_path}/plain.txt'")[2] == ""


def test_commands_skip_empty_records_and_refuse_them_when_strict(world, tmp_path):
    record = '{"prompt": "1 + 1 = ", "completion": "2\\n", "id": 7}\n'
    empty = '{"prompt": "1 + 1 = ", "completion": ""}\n'
    (tmp_path / "data.jsonl").write_text(record + empty + record)
    data = f"--data '{tmp_path}/data.jsonl'"
    lines = [f"{FINETUNE} --steps 1 --out '{tmp_path}/adapter' {data}"]
    lines.append(f"{PRETRAIN} --steps 1 --out '{tmp_path}/base' {data}")
    lines.append(f"evaluate --base base --context 16 {data}")
    held_out = f"--data sums.jsonl --eval-data '{tmp_path}/data.jsonl'"
    lines.append(f"{FINETUNE} --steps 1 --out '{tmp_path}/other' {held_out}")
    for line in lines:
        code, _, err = run(line)
        assert code == 0
        assert "1 of 3 records are skipped, the first at line 2 (nothing to learn: no token" in err
        assert "columns that are not used (number of records that have them): 'id' (2)" in err
        assert err.count("\n") == 2
        code, _, err = run(f"{line} --strict")
        assert code == 3
        assert "data.jsonl' line 2: nothing to learn: no token follows the prompt" in err
    (tmp_path / "data.jsonl").write_text(empty)
    code, _, err = run(f"evaluate --base base {data}")
    assert code == 3
    assert "has no record to train on: all 1 are skipped, the first at line 1" in err


def test_finetune_warns_of_records_that_are_cut(world, tmp_path):
    (tmp_path / "long.jsonl").write_text('{"text": "' + "x" * 30 + '"}\n{"text": "short"}\n')
    line = f"{FINETUNE} --data '{tmp_path}/long.jsonl' --steps 1 --out '{tmp_path}/out'"
    code, _, err = run(line)
    assert code == 0
    assert err.count("\n") == 1
    assert err.startswith("minilora: warning: ")
    assert "1 of 2 records" in err
    assert "17 tokens" in err
    assert "13 of 35 tokens" in err


def test_generate_keeps_underscores_and_hyphens_in_a_value(world):
    printed = ok("generate --base base --prompt=a_b-c=d_e --max-new-tokens 0")
    assert printed == "a_b-c=d_e\n"


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--temperature 0",
        "--top-k 3",
        "--top-k 100000",
        "--top-p 0.5",
        "--adapter adapter",
        "--adapter adapter --seed 4",
    ],
)
def test_generate_continues_the_prompt_and_repeats_itself(options, world):
    line = f"generate --base base --prompt 'the quick' --max-new-tokens 8 --seed 3 {options}"
    first = ok(line)
    assert first.startswith("the quick")
    assert len(first) >= len("the quick") + 4
    assert ok(line) == first


def test_generate_takes_prompts_of_any_length_and_any_bytes(world):
    assert ok("generate --base base --prompt hi --max-new-tokens 0") == "hi\n"
    long = "long " * 100
    printed = ok(f"generate --base base --prompt '{long}' --max-new-tokens 3")
    assert printed.startswith("long long")
    prompt = "\x1b[31m\udcff é"
    code, out, _ = run(["generate", "--base", "base", "--prompt", prompt, "--max-new-tokens", "2"])
    assert code == 0
    assert out.startswith("\\x1b[31m\N{REPLACEMENT CHARACTER} é")


def loss_of(printed: str) -> float:
    pattern = (
        r"loss ([\d.]+) nats per token, [\d.]+ bits per byte, perplexity [\d.]+ \(context \d+\)\n"
    )
    match = re.fullmatch(pattern, printed)
    assert match is not None
    return float(match[1])


def test_merge_measures_as_the_adapter_and_leaves_its_inputs(world, tmp_path):
    adapted = loss_of(ok("evaluate --base base --adapter adapter --data book.txt"))
    alone = loss_of(ok("evaluate --base base --data book.txt --context 256 --threads 1"))
    before = snapshot(Path("base")) | snapshot(Path("adapter"))
    ok(f"merge --base base --adapter adapter --out '{tmp_path}/merged'")
    assert snapshot(Path("base")) | snapshot(Path("adapter")) == before
    merged = loss_of(ok(f"evaluate --base '{tmp_path}/merged' --data book.txt"))
    assert merged == pytest.approx(adapted, abs=2e-6)
    assert abs(alone - adapted) > 1e-3
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files == expected


def test_merge_asks_for_tied_and_takes_either_choice(world, tmp_path):
    golden = Path(__file__).parents[1] / "golden"
    line = f"merge --base '{golden}/gpt2' --adapter '{golden}/gpt2--lora_wte'"
    code, _, err = run(f"{line} --out '{tmp_path}/none'")
    assert code == 2
    assert "--tied" in err
    assert not (tmp_path / "none").exists()
    for tied in ("untie", "share"):
        ok(f"{line} --out '{tmp_path}/{tied}' --tied {tied}")
        merged = CausalLM.from_pretrained(tmp_path / tied)
        assert merged.config.tie_word_embeddings == (tied == "share")


def test_evaluate_with_a_limit_measures_fewer_windows(world):
    line = "evaluate --base base --data book.txt"
    assert ok(f"{line} --context 16 --limit 1") != ok(line)


def test_finetune_tasks_names_adapters_after_files(world, tmp_path):
    start = f"{FINETUNE} --tasks book.txt latin.txt"
    line = f"{start} --steps 2 --out '{tmp_path}/out' --shared-r 2 --r 3 --save-every 1"
    assert f"book {len(TEXT) * 9 // 10:,}, latin" in ok(line)
    model = MultiTask.from_pretrained(CausalLM.from_pretrained("base"), tmp_path / "out")
    assert model.tasks == {"book": ("shared", "book"), "latin": ("shared", "latin")}
    ranks = {name: config.r for name, config in model.peft_config.items()}
    assert ranks == {"shared": 2, "book": 3, "latin": 3}
    evaluation = lines_of(tmp_path / "out" / "eval.jsonl")[0]
    assert set(evaluation["tasks"]) == set(model.tasks)
    ok(f"{line} --resume")
    ok(f"{start} --method full --steps 1 --out '{tmp_path}/full'")
    assert CausalLM.from_pretrained(tmp_path / "full").config.hidden_size == 16


def test_merge_evaluate_and_generate_choose_a_task_by_name(world, tmp_path):
    model = MultiTask.from_pretrained(CausalLM.from_pretrained("base"), "tasks")
    ids = ByteTokenizer().encode(TEXT[:16])[None]
    losses = set()
    for task in model.tasks:
        ok(f"merge --base base --adapter tasks --task {task} --out '{tmp_path}/{task}'")
        merged = CausalLM.from_pretrained(tmp_path / task)
        assert np.abs(merged(ids).data - model(ids, tasks=task).data).max() < 1e-4
        losses.add(ok(f"evaluate --base base --adapter tasks --data book.txt --task {task}"))
    assert len(losses) == 2
    line = "generate --base base --adapter tasks --task book --prompt hi --max-new-tokens 0"
    assert ok(line) == "hi\n"
    assert "model.layers.0" in ok("inspect tasks/book")


def test_inspect_shows_adapters_and_checkpoints(world):
    printed = ok("inspect adapter")
    assert "model.layers.0.self_attn.q_proj" in printed
    assert re.search(r"^finite +True$", printed, re.MULTILINE)
    report = as_json("inspect adapter")
    tensors = load_file("adapter/adapter_model.safetensors")
    assert report["parameters"] == sum(a.size for a in tensors.values())
    layers = [row["layer"] for row in report["tensors"]]
    assert layers == [f"model.layers.0.self_attn.{n}_proj" for n in "qv"]
    A = tensors[f"base_model.model.{layers[0]}.lora_A.weight"].astype(float)
    B = tensors[f"base_model.model.{layers[0]}.lora_B.weight"].astype(float)
    norm = float(report["tensors"][0]["|dW|"])
    assert norm == pytest.approx(np.linalg.norm(B @ A), rel=1e-3)
    size = sum(p.size for p in CausalLM.from_pretrained("base").parameters())
    assert as_json("inspect base")["parameters"] == size
    assert as_json("inspect base/model.safetensors")["parameters"] == size
    assert "model.embed_tokens.weight" in ok("inspect base")
    assert re.search(r"^finite +False$", ok("inspect adapter-nan"), re.MULTILINE)


def test_tools_turn_files_into_files(world, tmp_path):
    def out(name: str) -> str:
        return shlex.quote(str(tmp_path / name))

    weights = "--adapter adapter --adapter adapter --weights -0.5,1"
    printed = ok(f"merge --base base {weights} --out {out('tuned')}")
    assert re.search(r"rounding took at most 0\.\d\d% of a dW, in model.layers.0", printed)
    half = f"merge --base base --adapter adapter --dtype bfloat16 --out {out('half')}"
    rows = as_json(half)["tensors"]
    merged = [row["tensor"] for row in rows]
    assert [name.rsplit(".", 2)[1] for name in merged] == ["q_proj", "v_proj"]
    assert all(row["lost"] > 0 for row in rows)
    report = as_json(f"diff base {out('tuned')}")
    assert [row["tensor"] for row in report["tensors"] if row["|b - a|"]] == merged
    assert "q_proj" in ok(f"diff base {out('tuned')} --no-ranks")
    extract = f"extract --base base --tuned {out('tuned')} --r 8 --out {out('extracted')}"
    assert "error with rank 8 over all layers: 0.000% of dW" in ok(extract)
    both = f"combine --adapter adapter --adapter {out('extracted')} --weights 0.5,-1"
    assert "error with cat over all layers: 0.000% of dW" in ok(f"{both} --out {out('both')}")
    cancel = "combine --adapter adapter --adapter adapter --weights -1,1"
    printed = ok(f"{cancel} --out {out('cancelled')}")
    assert re.search(r"error with cat over all layers: \d\S* of a dW that is 0 -> ", printed)
    rows = as_json(f"{both} --how svd --r 3 --out {out('near')}")["tensors"]
    assert {row["r"] for row in rows} == {"8 + 8 -> 3"}
    printed = ok(f"{both} --how ties --density 0.5 --out {out('ties')}")
    assert re.search(r"layer +r +\|dW\| +kept +conflict +cosine +error +relative", printed)
    [first, _] = as_json(f"{both} --how dare_linear --density 0.5 --seed 3 --out {out('dare')}")[
        "tensors"
    ]
    assert len(first["kept"]) == 2
    printed = ok(f"resize --adapter {out('extracted')} --energy 0.5 --out {out('half-energy')}")
    assert "error with energy 0.5 over all layers: " in printed
    assert "% of its energy stays)" in printed
    printed = ok(f"resize --adapter {out('extracted')} --r 2 --out {out('small')}")
    assert printed.count("8 -> 2") == 2
    printed = ok(f"convert {out('small')} --to mlx --out {out('mlx')}")
    assert printed.startswith("an adapter in mlx-lm's files -> ")
    ok(f"convert {out('mlx')} --to peft --out {out('peft')}")
    converted = as_json(f"convert base --dtype float16 --out {out('half-base')}")
    assert converted.keys() == {"out", "is"}
    report = as_json(f"inspect {out('peft')} --base base")
    assert report["mismatches"] == []
    assert all(len(values) == 2 for values in report["spectra"].values())
    printed = ok("inspect adapter --base wide")
    assert re.search(r"^mismatches +q_proj|unknown|missing|the base needs", printed, re.MULTILINE)


def test_commands_print_no_escape_of_a_file_to_the_terminal(world, tmp_path):
    shutil.copytree("adapter", tmp_path / "evil")
    path = tmp_path / "evil" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "\x1b[2J\nevil"}))
    printed = ok(f"inspect '{tmp_path}/evil'")
    printed += ok(f"{FINETUNE} --data book.txt --steps 1 --out '{tmp_path}/\x1b[2J\nevil'")
    printed += ok(f"convert adapter --to mlx --out '{tmp_path}/mlx\x1b[2J\nevil'")
    assert "\x1b" not in printed
    assert printed.count("\\x1b[2J\\nevil") == 3


def test_finetune_resume_of_a_finished_run_writes_the_same_files(world, tmp_path):
    shutil.copytree("adapter", tmp_path / "again")
    line = f"{FINETUNE} --data book.txt --steps 4 --lr 0.05"
    ok(f"{line} --out '{tmp_path}/again' --resume")
    assert bits(tmp_path / "again") == bits("adapter")
    ok(f"{line} --out '{tmp_path}/elsewhere' --resume adapter/checkpoints/step-2")
    assert bits(tmp_path / "elsewhere") == bits("adapter")


def test_pretrain_without_out_makes_a_numbered_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        ok(f"{PRETRAIN} --data '{world}/book.txt' --steps 1")
        assert (tmp_path / "runs" / f"pretrain-{number}" / "model.safetensors").is_file()


def test_commands_refuse_a_weight_that_is_not_finite_unless_it_is_allowed(world, tmp_path):
    """Some models are published with NaN in the rows of tokens that occur in no text."""
    base = tmp_path / "base"
    name = "model.embed_tokens.weight"
    ok(f"{PRETRAIN} --data book.txt --steps 1 --untied --out '{base}'")
    tensors = load_file(base / "model.safetensors")
    tensors[name][255] = np.nan
    save_file(base / "model.safetensors", tensors)
    prompt = "--prompt hi --max-new-tokens 2 --temperature 0"
    adapter = tmp_path / "adapter"
    for line in (
        f"evaluate --base '{base}' --data book.txt",
        f"generate --base '{base}' {prompt}",
        f"{FINETUNE} --base '{base}' --data book.txt --steps 1 --out '{adapter}'",
        f"merge --base '{base}' --adapter '{adapter}' --out '{tmp_path}/merged'",
    ):
        code, _, err = run(line)
        assert code == 5
        assert name in err
        assert "not finite" in err
        ok(f"{line} --allow-nonfinite")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert np.isnan(merged[name][255]).all()


def test_pretrain_takes_texts_that_are_not_utf8_and_texts_to_evaluate_on(world, tmp_path):
    out = tmp_path / "latin"
    texts = "--data latin.txt --eval-data book.txt"
    ok(f"{PRETRAIN} {texts} --steps 1 --untied --out '{out}'")
    model = CausalLM.from_pretrained(out)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    ok(f"evaluate --base '{out}' --data latin.txt")


# ---- options -------------------------------------------------------------------------------------


ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"q_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("self_attn.o_proj", {"o_proj"}),
        ("model.layers.0.mlp.up_proj,", {"up_proj"}),
        ("all-linear", ALL_LINEAR),
        (r".*\.(gate|up)_proj", {"gate_proj", "up_proj"}),
        ("model.layers.[0-9]+.self_attn.k_proj", {"k_proj"}),
    ],
)
def test_finetune_target_modules_takes_names_and_patterns(targets, expected, world, tmp_path):
    line = f"{FINETUNE} --data book.txt --steps 1 --out '{tmp_path}/out'"
    ok(f"{line} --target-modules '{targets}'")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in keys} == expected


# Each field of a configuration with a value as it is written, and as it must arrive.
LORA_WORDS = {
    "r": ("3", 3),
    "lora_alpha": ("32", 32),
    "target_modules": ("q_proj,o_proj", ["q_proj", "o_proj"]),
    "exclude_modules": ("o_proj", ["o_proj"]),
    "lora_dropout": ("0.25", 0.25),
    "bias": ("lora_only", "lora_only"),
    "use_rslora": (None, True),
    "use_dora": (None, True),
    "init_lora_weights": ("gaussian", "gaussian"),
    "rank_pattern": ('{"q_proj": 2}', {"q_proj": 2}),
    "alpha_pattern": ('{"q_proj": 2.5}', {"q_proj": 2.5}),
    "layers_to_transform": ("0,2", [0, 2]),
    "layers_pattern": ("layers", ["layers"]),
    "modules_to_save": ("lm_head,norm", ["lm_head", "norm"]),
    "trainable_token_indices": ("3,1", [3, 1]),
    "ensure_weight_tying": (None, True),
    "fan_in_fan_out": (None, True),
}
ADALORA_WORDS = {
    "target_r": ("3", 3),
    "init_r": ("9", 9),
    "tinit": ("7", 7),
    "tfinal": ("11", 11),
    "deltaT": ("2", 2),
    "beta1": ("0.5", 0.5),
    "beta2": ("0.25", 0.25),
    "orth_reg_weight": ("0.75", 0.75),
}


def parser_of(command: str) -> Any:
    """The parser of one command."""
    (subparsers,) = build_parser()._subparsers._group_actions
    return subparsers.choices[command]


def fields_of(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def test_finetune_has_an_option_for_every_field_of_a_configuration():
    own = {"task_type", "base_model_name_or_path", "inference_mode", "extra"}
    assert fields_of(LoraConfig) - own == set(LORA_WORDS)
    more = fields_of(AdaLoraConfig) - fields_of(LoraConfig)
    assert more - {"total_step"} == set(ADALORA_WORDS)  # that is --steps
    options = {action.dest for action in parser_of("finetune")._actions}
    assert options >= set(LORA_WORDS) | set(ADALORA_WORDS)


@pytest.mark.parametrize("name", LORA_WORDS | ADALORA_WORDS)
def test_finetune_passes_an_option_to_the_configuration(name, world, monkeypatch):
    seen = []

    def look(model, config, **rest):
        seen.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr("minilora.cli.preparing.get_peft_model", look)
    word, value = (LORA_WORDS | ADALORA_WORDS)[name]
    line = shlex.split(f"{FINETUNE} --data book.txt")
    options = [f"--{name.replace('_', '-')}"]
    if word is not None:
        options.append(word)
    if name == "layers_pattern":
        options += ["--layers-to-transform", "0"]
    if name in ADALORA_WORDS:
        options += ["--method", "adalora"]
    assert run([*line, *options])[0] == 2
    assert getattr(seen[0], name) == value
    assert type(getattr(seen[0], name)) is type(value)
    if name in LORA_WORDS:
        run(line)
        assert getattr(seen[1], name) == getattr(LoraConfig(), name)


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("False", False), ("gaussian", "gaussian")]
)
def test_finetune_init_lora_weights_takes_true_false_and_names(word, value):
    line = f"finetune --base b --data d --init-lora-weights {word}"
    args = build_parser().parse_args(line.split())
    assert args.init_lora_weights is value or args.init_lora_weights == value


# ---- methods and quantized bases -----------------------------------------------------------------

# Bytes of 2,176 codes and 34 absmax values, and two floats per layer.
QUANTIZED_BYTES = {"nf4": "1,178", "fp4": "1,178", "int8": "2,266"}
PEFT_TYPES = {"lora": ("LORA", False), "dora": ("LORA", True), "adalora": ("ADALORA", False)}
PEFT_TYPES |= {method: (config.peft_type, False) for method, config in MAPS_BY_METHOD.items()}
ITS_FIELDS = {  # where the defaults are for larger layers
    "oft": "--oft-block-size 4",
    "fourierft": "--n-frequency 20 --init-weights true",
    "miss": "--r 2",
    "unilora": "--theta-d-length 50",
    "intrinsic": "--theta-d-length 50",
}


@pytest.mark.parametrize("kind", QUANTIZE)
@pytest.mark.parametrize("method", METHODS)
def test_finetune_method_over_every_base_trains_and_is_used(method, kind, world, tmp_path):
    out = tmp_path / "out"
    before = snapshot(Path("base"))
    line = f"{FINETUNE} --data book.txt --steps 12 --warmup 0 --lr 0.1 --out '{out}'"
    fields = ITS_FIELDS.get(method, "")
    code, printed, err = run(f"{line} --method {method} {fields} --quantize {kind}")
    if method == "full" and kind != "none":
        assert code == 2
        assert f"quantize = {kind}" in err
        return
    assert code == 0
    assert err == ""
    assert snapshot(Path("base")) == before
    first, last = (line["loss"] for line in lines_of(out / "eval.jsonl"))
    assert last < first
    if kind in QUANTIZED_BYTES:
        size = f"2,176 weights of 7 layers in {QUANTIZED_BYTES[kind]} bytes of {kind}, "
        assert size in printed
    files = {path.name for path in out.iterdir() if path.suffix != ".jsonl"}
    if method == "full":
        expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        use = f"--base '{out}'"
    else:
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["peft_type"], config.get("use_dora", False)) == PEFT_TYPES[method]
        expected = {"adapter_config.json", "adapter_model.safetensors"}
        if method == "adalora" and HAS_MATPLOTLIB:
            expected.add("rank_allocation.png")
        use = f"--base base --adapter '{out}' --quantize {kind}"
    if HAS_MATPLOTLIB:
        expected.add("loss.png")
    assert files == expected | {"command.json"}
    printed = ok(f"evaluate --data book.txt --context 16 {use}")
    ok(f"generate --prompt hi --max-new-tokens 2 {use}")
    # The same in Python. "stored" changes nothing, because the file has float32.
    model = CausalLM.from_pretrained(out if method == "full" else "base")
    if kind not in ("none", "stored"):
        quantize(model, kind)
    if method != "full":
        model = PeftModel.from_pretrained(model, out)
    loss = minilora.training.loop.evaluate(model, ByteTokenizer().encode(TEXT), 16)
    assert printed.startswith(f"loss {loss:.6f} ")


def test_finetune_resume_refuses_a_base_with_another_quantization(world, tmp_path):
    line = f"{FINETUNE} --data book.txt --steps 4 --save-every 2 --out '{tmp_path}/out'"
    ok(f"{line} --quantize nf4")
    code, _, err = run(f"{line} --quantize int8 --resume")
    assert code == 3
    assert "frozen weights" in err


def test_finetune_method_full_refuses_a_base_of_codes(world, tmp_path, monkeypatch):
    plain = CausalLM.from_pretrained

    def load(*arguments, **options):
        return quantize(plain(*arguments, **options), "int8")

    monkeypatch.setattr(CausalLM, "from_pretrained", load)
    code, _, err = run(f"{FINETUNE} --data book.txt --out '{tmp_path}/out' --method full")
    assert code == 2
    assert "--method full" in err
    assert "'base'" in err
    assert "int8" in err
    assert not (tmp_path / "out").exists()


def test_finetune_adalora_logs_and_draws_ranks_of_a_run_that_continued(world, tmp_path):
    straight = tmp_path / "straight"
    resumed = tmp_path / "on"
    options = "--save-every 10 --lr 0.02 --steps 40 --method adalora"
    line = f"{FINETUNE} --data book.txt {options}"
    ok(f"{line} --out '{straight}'")
    step = Path("checkpoints", "step-30")
    shutil.copytree(straight / step, resumed / step)
    shutil.copy(straight / "log.jsonl", resumed)
    shutil.copy(straight / "eval.jsonl", resumed)
    ok(f"{line} --out '{resumed}' --resume")
    history, steps = minilora.training.loop.rank_history(straight)
    assert minilora.training.loop.rank_history(resumed) == (history, steps)
    assert steps == 40
    layers = [f"model.layers.0.self_attn.{n}_proj" for n in "qv"]
    assert history[0] == (0, dict.fromkeys(layers, 12))
    totals = [sum(ranks.values()) for _, ranks in history]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 16
    pattern = json.loads((straight / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()}
    assert ranks == history[-1][1]


def test_main_names_the_help_that_has_the_options_of_a_command():
    assert run("devices --bse x")[2] == (
        "minilora: error: unrecognized arguments: --bse x (see minilora devices --help)\n"
    )
    assert "(see minilora --help)" in run("--bse")[2]


@pytest.mark.parametrize(
    "line", ["generate --prompt x", "evaluate --data book.txt", "verify", TRAIN]
)
def test_commands_of_one_adapter_refuse_a_second_one(line, world):
    base = "" if "--base" in line else "--base base"
    code, _, err = run(f"{line} {base} --adapter adapter --adapter other --out nowhere")
    assert code == 2
    assert "--adapter must be given once, got 'adapter' and 'other': combine makes one" in err


def test_finetune_refused_before_it_writes_leaves_no_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "book.txt"):
        (tmp_path / name).symlink_to(world / name)
    ok(f"{TRAIN} --save-every 1 --out run")
    checkpoint = next(Path("run/checkpoints").iterdir())
    (tmp_path / "mine").mkdir()
    for out in ("", "--out new", "--out mine"):
        code, _, err = run(f"{TRAIN} --seed 5 --resume {checkpoint} {out}")
        assert (code, "seed (was 0, now 5)" in err) == (3, True)
    assert not os.listdir("runs")
    assert not Path("new").exists()
    assert not os.listdir("mine")  # which was there before, and stays


def test_finetune_resume_names_what_differs_before_it_looks_for_more(world, tmp_path):
    ok(f"{TRAIN} --save-every 1 --out {tmp_path}/run")
    code, _, err = run(f"{TRAIN} --method adalora --resume --out {tmp_path}/run")
    assert code == 3
    assert "belongs to another run: target_r (was None" in err


DAMAGED = {
    "losses": (["nan"], "its state cannot be read (ValueError(\"a loss of 'nan'\")"),
    "evaluations": ([[0, math.inf]], "cannot be read"),
    "optimizer": ({"optimizer": "AdamW", "steps": {}}, "the optimiser's state differs in"),
}


@pytest.mark.parametrize("field", DAMAGED)
def test_finetune_resume_names_the_checkpoint_whose_state_is_damaged(field, world, tmp_path):
    ok(f"{TRAIN} --save-every 1 --out {tmp_path}/run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-2")
    folder = tmp_path / "run/checkpoints/step-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    value, says = DAMAGED[field]
    manifest["state"][field] = value
    (folder / "manifest.json").write_text(json.dumps(manifest).replace("Infinity", "1e400"))
    code, _, err = run(f"{TRAIN} --resume {folder} --out {tmp_path}/run")
    assert code == 3
    assert err.startswith(f"minilora: error: '{folder}' is damaged: ")
    assert says in err


def test_finetune_resume_of_a_run_s_folder_says_what_to_give(world, tmp_path):
    code, _, err = run(f"{TRAIN} --resume {tmp_path} --out {tmp_path}/run")
    assert code == 3
    assert "manifest.json is missing; give --resume a folder step-N that a run has in" in err


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_training_interrupted_when_it_has_ended_is_saved(command, world, tmp_path, monkeypatch):
    """Between the last step and the end of saving: nothing else has the trained weights."""
    kind = CausalLM if command == "pretrain" else PeftModel
    plain = kind.save_pretrained

    def save_pretrained(self, out):
        os.kill(os.getpid(), signal.SIGINT)
        plain(self, out)

    monkeypatch.setattr(kind, "save_pretrained", save_pretrained)
    line = f"{PRETRAIN} --data book.txt --steps 2" if command == "pretrain" else TRAIN
    code, _, err = run(f"{line} --out {tmp_path}/run")
    assert code == 130
    assert f"minilora: interrupted: SIGINT: all steps are done, saved in '{tmp_path}/run'" in err
    monkeypatch.undo()
    expected = "adapter_model.safetensors" if command == "finetune" else "tokenizer.json"
    assert (tmp_path / "run" / expected).is_file()
    assert not list((tmp_path / "run").glob(".*"))


# ---- help ----------------------------------------------------------------------------------------


def help_of(command: str, capsys: Any) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_shows_an_example(command, capsys):
    lines = help_of(command, capsys)
    # finetune has 66 options, each with its help; plan and sweep have nearly all, and their own.
    assert len(lines) <= {"finetune": 79, "plan": 79, "sweep": 84, "pretrain": 45}.get(command, 44)
    assert max(map(len, lines)) <= 110
    if command:
        example = next(line for line in lines if line.startswith("example: "))
        build_parser().parse_args(shlex.split(example.removeprefix("example: minilora ")))
    else:
        assert all(name in "\n".join(lines) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_its_default(command, capsys):
    text = " ".join(" ".join(help_of(command, capsys)).split())
    for action in parser_of(command)._actions:
        name = action.option_strings[-1] if action.option_strings else action.metavar
        if action.help is argparse.SUPPRESS:  # a field of some methods: the test below
            continue
        assert name in text
        assert action.help
        assert " ".join(action.help.split()) in text
        if action.default not in (None, "==SUPPRESS==", False):
            assert f"(default: {action.default})" in action.help


@pytest.mark.parametrize("method", [method for method in METHODS if method not in FACTORED])
def test_help_of_a_method_explains_its_fields(method, capsys):
    text = " ".join(" ".join(help_of(f"finetune --method {method}", capsys)).split())
    config = MAPS_BY_METHOD[method]
    assert f"{config.title} (--method {method})" in text
    for name, explanation in explain_fields(config).items():
        assert f"--{name.replace('_', '-')} " in text
        assert explanation
        assert explanation in text
    others = {field for c in MAPS_BY_METHOD.values() for field in explain_fields(c)}
    for name in others - set(explain_fields(config)) - {"r"}:
        assert f"--{name.replace('_', '-')} " not in text


def test_help_of_adalora_explains_its_fields(capsys):
    assert "--target-r R" in "\n".join(help_of("finetune --method=adalora", capsys))
    assert "--target-r R" not in "\n".join(help_of("finetune", capsys))


def test_help_shows_the_defaults_of_the_configuration(capsys):
    lines = help_of("finetune", capsys)
    for name in ("r", "lora_alpha", "lora_dropout", "bias"):
        option = f"  --{name.replace('_', '-')} "
        (line,) = [line for line in lines if line.startswith(option)]
        assert f"(default: {getattr(LoraConfig(), name)})" in line


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"minilora {__version__}\n"


# ---- main: as a module, errors, signals ----------------------------------------------------------


def module(*arguments: str | bytes, **options: Any) -> Any:
    command = [sys.executable, "-m", "minilora", *arguments]
    return subprocess.run(command, capture_output=True, **options)


def test_main_runs_as_a_module_and_on_a_terminal_without_unicode(world):
    line = ["generate", "--base", "base", "--prompt", "é", "--max-new-tokens"]
    done = module(*line, "2", "--temperature", "0")
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.startswith("é".encode())
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    # A byte in a path that is not a character.
    done = module("inspect", b"adapter\xff", env=plain)
    assert done.returncode == 4
    assert done.stderr.startswith(b"minilora: error: ")
    assert done.stderr.endswith(b"'adapter\\udcff'\n")
    done = module(*line, "0", env=plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xe9\n", b"")


def test_main_succeeds_if_nobody_reads_its_output(world):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "minilora", "inspect", "base"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_finetune_takes_a_folder_whose_name_is_not_text(world, tmp_path):
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/od\xffd \n")
    try:
        shutil.copytree("base", odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    line = shlex.split(f"finetune --data book.txt --steps 1 {TINY}")
    assert run([*line, "--out", f"{odd}/new", "--base", odd])[0] == 0
    assert (Path(odd) / "new" / "adapter_config.json").is_file()


def test_main_with_debug_shows_where_an_error_came_from(world):
    line = "evaluate --base base --data book.txt --context 1000 --debug"
    with pytest.raises(ConfigError, match="context"):
        main(line.split())


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "\nminilora: interrupted\n"),
        (MemoryError(), 1, "minilora: error: out of memory\n"),
        (OSError(28, "No space", "x"), 4, "minilora: error: No space: 'x'\n"),
        (OSError(28, "No space"), 4, "minilora: error: No space\n"),
        (OSError("disk"), 4, "minilora: error: disk\n"),
    ],
)
def test_main_ends_without_a_traceback(error, code, expected, world, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(CausalLM, "from_pretrained", fail)
    assert run("evaluate --base base --data book.txt") == (code, "", expected)


def test_main_prints_a_warning_as_one_line_and_restores_the_handler(world, tmp_path):
    shown = warnings.showwarning
    code, _, err = run(
        f"{FINETUNE} --data book.txt --steps 1 --out '{tmp_path}/out' --fan-in-fan-out"
    )
    assert code == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("minilora: warning: fan_in_fan_out")
    assert warnings.showwarning is shown


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_finetune_refuses_a_read_only_folder_before_training(world, tmp_path):
    tmp_path.chmod(0o500)
    assert run(f"{FINETUNE} --data book.txt --out '{tmp_path}/new'")[0] == 4
    tmp_path.chmod(0o700)


def test_get_peft_model_lists_the_targets_of_the_model():
    config = TransformerConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ConfigError) as caught:
        get_peft_model(CausalLM(config), LoraConfig(target_modules=["nothing"]))
    assert all(name in str(caught.value) for name in ALL_LINEAR)


@pytest.mark.parametrize("start", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_training_that_overflows_ends_with_its_own_code(start, world, tmp_path):
    line = f"{start} --data book.txt --out '{tmp_path}/out' --lr 1e39 --warmup 0 --steps 5"
    code, _, err = run(line)
    *others, last = err.splitlines()
    assert code == 5
    assert last.startswith("minilora: error: step ")
    assert all(line.startswith("minilora: warning: ") for line in others)


# ---- arbitrary arguments -------------------------------------------------------------------------

OPTIONS = {option for name in COMMANDS for option in parser_of(name)._option_string_actions}
WORDS = ["0", "1", "-1", "2", "nan", "1e30", "base", "adapter", "short.txt", "folder"]
WORDS += ["", "-", "--", "--r=2", "\udc80", "x\0y"]
anything = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=8)
words = st.one_of(st.sampled_from(sorted(OPTIONS)), st.sampled_from(WORDS), anything)
commands = st.lists(st.sampled_from(COMMANDS), max_size=1)
argvs = st.builds(lambda command, rest: [*command, *rest], commands, st.lists(words, max_size=9))
NEEDED = {  # so that some of them get past the parser
    "finetune": "--base base --data short.txt",
    "pretrain": "--data short.txt",
    "sweep": "--base base --data short.txt --grid r=1,2 --out swept",
    "generate": "--base base --prompt x --max-new-tokens 3",
    "evaluate": "--base base --data short.txt",
    "merge": "--base base --adapter adapter --out merged",
    "audit": "--base base --adapter adapter --merged base",
    "compare": "adapter adapter",
    "inspect": "adapter",
    "replay": "adapter --from 0",
    "verify": "--cases 1",
    "combine": "--adapter adapter --adapter adapter --out combined",
    "diff": "base base",
    "extract": "--base base --tuned base --r 2 --out extracted",
    "resize": "--adapter adapter --r 2 --out resized",
    "convert": "adapter --out converted",
    "graph": "--base base --block 0",
    "report": "--base base --adapter adapter --out report.html",
    "plan": "--base base --data short.txt --batch-size 2 --context 8 --threads 1",
}


@pytest.fixture(scope="module")
def playground(made):
    folder = made / "playground"
    for name in ("base", "adapter"):
        shutil.copytree(made / name, folder / name)
    (folder / "folder").mkdir()
    (folder / "short.txt").write_bytes(b"0123456789" * 20)
    return folder


def train_nothing(*arguments: Any, **options: Any) -> Any:
    return minilora.training.loop.Result([], [(0, 1.0)], 0.0)


@given(st.lists(argvs, min_size=4, max_size=4))
def test_main_never_ends_in_a_traceback(playground, several):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(playground)
        patch.setattr(minilora.lab.demo, "demo", lambda *arguments, **options: {})
        patch.setattr(minilora.training.loop, "train", train_nothing)
        stand_in(patch)
        for argv in several:
            if argv:
                argv = [argv[0], *NEEDED.get(argv[0], "").split(), *argv[1:]]
            try:
                code, _, err = run([word for word in argv if word != "--debug"])
            except SystemExit:
                assert {"--help", "-h", "--version"} & set(argv)
                continue
            assert type(code) is int
            assert 0 <= code <= 5
            assert "Traceback" not in err
            assert bool(code) == ("minilora: error: " in err)
