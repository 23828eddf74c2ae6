"""The command line, end to end: what it does, and that a mistake ends in one line, a code, and nothing changed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import snapshot, unharmed
from hypothesis import given
from hypothesis import strategies as st

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
from minilora.cli.options import ADALORA_OPTIONS, LORA_OPTIONS
from minilora.data.tokenizer import ByteTokenizer
from minilora.errors import ConfigError
from minilora.formats import load_file, save_file
from minilora.training.methods import METHODS, QUANTIZE

# pytest would turn a warning into an exception; on the command line it is a line on stderr.
pytestmark = pytest.mark.filterwarnings("default")

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
COMMANDS = (
    "demo",
    "pretrain",
    "finetune",
    "generate",
    "evaluate",
    "merge",
    "inspect",
    "verify",
    "devices",
)
COMMANDS += ("combine", "diff", "extract", "resize", "convert")
TINY = "--batch-size 2 --context 16 --threads 2"
SHAPE = "--hidden-size 16 --intermediate-size 24 --num-hidden-layers 1 --num-attention-heads 2"
TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 10


def words(line: str, **quoted: str) -> list[str]:
    """A command line as a shell would cut it; {name} stands for a word that is hard to write in one."""
    return [word.format(**quoted) if quoted else word for word in shlex.split(line)]


def run(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> str:
    code, out, err = run(words(line))
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, adapters, texts, and each of them damaged in some way."""
    world = tmp_path_factory.mktemp("cli")
    before = Path.cwd()
    os.chdir(world)
    try:
        Path("book.txt").write_bytes(TEXT)
        Path("latin.txt").write_bytes("ÀÉÎÕÜ äöü ß ".encode("latin-1") * 40)
        Path("empty.txt").touch()
        Path("short.txt").write_bytes(b"abcd")
        Path("half.txt").write_bytes(TEXT[:18])
        Path("smile.txt").write_text("\N{SLIGHTLY SMILING FACE}", encoding="utf-8")
        sums = [
            {"prompt": f"{a} + {b} = ", "completion": f"{a + b}\n"}
            for a in range(9)
            for b in range(4)
        ]
        Path("sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
        Path("one.jsonl").write_text('{"text": "only one"}\n')
        Path("chat.jsonl").write_text('\n{"messages": [{"role": "user", "content": "hi"}]}\n')
        Path("wordy.jsonl").write_text(
            json.dumps({"prompt": "why? " * 9, "completion": "because"}) + "\n"
        )
        Path("damaged.jsonl").write_text('{"text": "well"}\n{"text": "not so')
        Path("bare.jsonl").write_text("\n\n")
        Path("folder").mkdir()
        Path("full").mkdir()
        Path("full", "mine.txt").write_text("keep me")
        ok(f"pretrain --data book.txt --out base --steps 4 --save-every 2 {TINY} {SHAPE}")
        ok(
            f"finetune --base base --data book.txt --out adapter --steps 4 --save-every 2 {TINY} --lr 0.05"
        )
        ok(
            f"finetune --base base --tasks book.txt latin.txt --shared-r 2 --out tasks --steps 4 {TINY} --lr 0.05"
        )
        ok(f"pretrain --data book.txt --out wide --steps 1 {TINY} {SHAPE.replace('16', '24')}")

        def damaged(source: str, name: str, file: str, change) -> None:
            shutil.copytree(source, name, ignore=shutil.ignore_patterns("checkpoints", "*.jsonl"))
            path = Path(name, file)
            path.write_bytes(change(path.read_bytes()))

        for source, weights, config in (
            ("base", "model.safetensors", "config.json"),
            ("adapter", "adapter_model.safetensors", "adapter_config.json"),
        ):
            damaged(source, f"{source}-cut", weights, lambda data: data[:-3])
            damaged(
                source,
                f"{source}-header",
                weights,
                lambda data: data[:20] + bytes([data[20] ^ 0xFF]) + data[21:],
            )
            damaged(source, f"{source}-nothing", weights, lambda data: b"")
            damaged(source, f"{source}-config-cut", config, lambda data: data[: len(data) // 2])
            damaged(source, f"{source}-config-list", config, lambda data: b"[]")
            damaged(
                source,
                f"{source}-config-twice",
                config,
                lambda data: data.replace(b"{", b'{"r": 8, "r": 9,', 1),
            )
            damaged(source, f"{source}-no-weights", weights, lambda data: data)
            Path(f"{source}-no-weights", weights).unlink()
        damaged(
            "base",
            "base-heads",
            "config.json",
            lambda data: data.replace(b'heads": 2', b'heads": 3'),
        )
        damaged(
            "base",
            "base-layers",
            "config.json",
            lambda data: data.replace(b'layers": 1', b'layers": 2'),
        )
        damaged(
            "adapter",
            "adapter-r0",
            "adapter_config.json",
            lambda data: data.replace(b'"r": 8', b'"r": 0'),
        )
        damaged(
            "adapter",
            "adapter-r4",
            "adapter_config.json",
            lambda data: data.replace(b'"r": 8', b'"r": 4'),
        )
        dora, biased = (
            lambda data, n=n: data.replace(b'"%s": false' % n, b'"%s": true' % n)
            for n in (b"use_dora", b"lora_bias")
        )
        damaged("adapter", "adapter-dora", "adapter_config.json", dora)
        damaged("adapter-dora", "adapter-dora-bias", "adapter_config.json", biased)
        damaged("base", "base-tokens", "tokenizer.json", lambda data: data[:100])
        damaged("base", "base-nan", "config.json", lambda data: data)
        tensors = load_file("base/model.safetensors")
        save_file(
            "base-nan/model.safetensors", {k: v * np.float32(np.nan) for k, v in tensors.items()}
        )
        damaged("adapter", "adapter-nan", "adapter_config.json", lambda data: data)
        tensors = load_file("adapter/adapter_model.safetensors")
        save_file(
            "adapter-nan/adapter_model.safetensors",
            {k: v * np.float32(np.nan) for k, v in tensors.items()},
        )
        yield world
    finally:
        os.chdir(before)


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


# ---- what the commands do ----


def test_the_parts_load_as_models(world):
    base = CausalLM.from_pretrained("base")
    assert base.config.hidden_size == 16
    adapted = PeftModel.from_pretrained(base, "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == "base"
    assert [p.name for p in sorted(Path("base/checkpoints").iterdir())] == ["step-2", "step-4"]


@pytest.mark.parametrize(
    "style",
    [str, lambda line: re.sub(r"(?<=\w)-(?=\w)", "_", line)],
    ids=["hyphens", "underscores"],
)
def test_hyphens_and_underscores_are_alike(style, world, tmp_path):
    options = style(
        "--batch-size=2 --target-modules o_proj --weight-decay 0.1 --lora-alpha 3 --eval-every 1"
    )
    ok(
        f"finetune --base base --data book.txt --steps 1 --context 8 --out '{tmp_path}/out' {options}"
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["target_modules"]) == (3, ["o_proj"])
    assert len((tmp_path / "out" / "eval.jsonl").read_text().splitlines()) == 2


def test_records_are_trained_on_and_measured(world, tmp_path):
    out = tmp_path / "out"
    line = f"finetune --base base --steps 8 --lr 0.05 --warmup 0 {TINY} --out '{out}'"
    said = ok(f"{line}/one --data sums.jsonl")
    found = re.search(r"per byte ([0-9.]+) -> ([0-9.]+)", said)
    assert found is not None
    assert float(found[2]) < float(found[1])
    # Two windows a step, of 17 bytes: each has room for one sum of 10 or 11, of which the last 2 or 3 count.
    log = [json.loads(x) for x in (out / "one" / "log.jsonl").read_text().splitlines()]
    assert {4, 5, 6} >= {x["tokens"] for x in log}
    loss = json.loads((out / "one" / "eval.jsonl").read_text().splitlines()[-1])["loss"]
    lines = Path("sums.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(lines[-4:]))  # the last tenth of 36
    (tmp_path / "kept.jsonl").write_text("".join(lines[:-4]))
    measured = ok(
        f"evaluate --base base --adapter '{out}/one' --data '{tmp_path}/held.jsonl' --context 16"
    )
    assert measured.startswith(f"loss {loss:.6f} nats a token, {loss / np.log(2):.4f} bits a byte")
    ok(f"{line}/two --data '{tmp_path}/kept.jsonl' --eval-data '{tmp_path}/held.jsonl'")
    files = [(out / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    ok(f"{line}/three --data sums.jsonl --eval-data book.txt")
    ok(f"{line}/four --data book.txt --eval-data sums.jsonl")
    ok(f"{line}/five --tasks sums.jsonl book.txt")
    assert MultiTask.from_pretrained(
        CausalLM.from_pretrained("base"), out / "five"
    ).tasks.keys() == {"sums", "book"}


def test_a_record_that_is_cut_is_told_of(world, tmp_path):
    (tmp_path / "long.jsonl").write_text('{"text": "' + "x" * 30 + '"}\n{"text": "short"}\n')
    line = f"finetune --base base --data '{tmp_path}/long.jsonl' --steps 1 {TINY} --out '{tmp_path}/out'"
    code, _, err = run(words(line))
    assert code == 0
    assert err.count("\n") == 1
    assert err.startswith("minilora: warning: ")
    assert "1 of 2 records are longer than 17 tokens and lose their ends, 13 of 35 tokens" in err


def test_a_value_keeps_its_underscores_and_hyphens(world):
    said = ok("generate --base base --prompt=a_b-c=d_e --max-new-tokens 0")
    assert said == "a_b-c=d_e\n"


def test_generate_goes_on_from_the_prompt_and_repeats_itself(world):
    for options in (
        "",
        "--temperature 0",
        "--top-k 3",
        "--top-k 100000",
        "--top-p 0.5",
        "--adapter adapter",
    ):
        line = f"generate --base base --prompt 'the quick' --max-new-tokens 8 --seed 3 {options}"
        first = ok(line)
        assert first.startswith("the quick")
        assert len(first) >= len("the quick") + 4
        assert ok(line) == first
    assert ok("generate --base base --prompt hi --max-new-tokens 0") == "hi\n"


def test_a_prompt_may_be_longer_than_the_context_and_hold_any_bytes(world):
    assert ok(f"generate --base base --prompt '{'long ' * 100}' --max-new-tokens 3").startswith(
        "long long"
    )
    code, out, _ = run(
        ["generate", "--base", "base", "--prompt", "\x1b[31m\udcff é", "--max-new-tokens", "2"]
    )
    assert code == 0
    assert out.startswith("\\x1b[31m\N{REPLACEMENT CHARACTER} é")


def test_merging_gives_the_same_measure_as_the_adapter(world, tmp_path):
    adapted = ok("evaluate --base base --adapter adapter --data book.txt")
    alone = ok("evaluate --base base --data book.txt --context 256 --threads 1")
    before = snapshot(Path("base")) | snapshot(Path("adapter"))
    ok(f"merge --base base --adapter adapter --out '{tmp_path}/merged'")
    assert snapshot(Path("base")) | snapshot(Path("adapter")) == before
    merged = ok(f"evaluate --base '{tmp_path}/merged' --data book.txt")

    def loss(said):
        return float(
            re.match(
                r"loss ([\d.]+) nats a token, [\d.]+ bits a byte, perplexity [\d.]+ \(context \d+\)\n$",
                said,
            )[1]
        )

    assert loss(merged) == pytest.approx(loss(adapted), abs=2e-6)
    assert abs(loss(alone) - loss(adapted)) > 1e-3
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )


def test_evaluate_with_a_limit(world):
    assert ok("evaluate --base base --data book.txt --context 16 --limit 1") != ok(
        "evaluate --base base --data book.txt"
    )


def test_several_tasks_are_adapters_by_the_names_of_their_files(world, tmp_path):
    line = (
        f"finetune --base base --tasks book.txt latin.txt --out '{tmp_path}/out' --steps 2 {TINY}"
    )
    said = ok(f"{line} --shared-r 2 --r 3 --save-every 1")
    assert f"book {len(TEXT) * 9 // 10:,}, latin" in said
    model = MultiTask.from_pretrained(CausalLM.from_pretrained("base"), tmp_path / "out")
    assert model.tasks == {"book": ("shared", "book"), "latin": ("shared", "latin")}
    assert {name: config.r for name, config in model.peft_config.items()} == {
        "shared": 2,
        "book": 3,
        "latin": 3,
    }
    assert set(
        json.loads((tmp_path / "out" / "eval.jsonl").read_text().splitlines()[0])["tasks"]
    ) == set(model.tasks)
    ok(f"{line} --shared-r 2 --r 3 --save-every 1 --resume")
    ok(
        f"finetune --base base --tasks book.txt latin.txt --method full --steps 1 {TINY} --out '{tmp_path}/full'"
    )
    assert CausalLM.from_pretrained(tmp_path / "full").config.hidden_size == 16


def test_a_task_is_chosen_by_its_name(world, tmp_path):
    model = MultiTask.from_pretrained(CausalLM.from_pretrained("base"), "tasks")
    ids = ByteTokenizer().encode(TEXT[:16])[None]
    for task in model.tasks:
        ok(f"merge --base base --adapter tasks --task {task} --out '{tmp_path}/{task}'")
        merged = CausalLM.from_pretrained(tmp_path / task)
        assert np.abs(merged(ids).data - model(ids, tasks=task).data).max() < 1e-4
    texts = {
        ok(f"evaluate --base base --adapter tasks --data book.txt --task {task}")
        for task in model.tasks
    }
    assert len(texts) == 2
    assert (
        ok("generate --base base --adapter tasks --task book --prompt hi --max-new-tokens 0")
        == "hi\n"
    )
    assert "model.layers.0" in ok("inspect tasks/book")


def test_inspect(world):
    said = ok("inspect adapter")
    assert "model.layers.0.self_attn.q_proj" in said
    assert re.search(r"^finite +True$", said, re.MULTILINE)
    report = json.loads(ok("inspect adapter --json"))
    tensors = load_file("adapter/adapter_model.safetensors")
    assert report["parameters"] == sum(a.size for a in tensors.values())
    assert [row["layer"] for row in report["tensors"]] == [
        f"model.layers.0.self_attn.{n}_proj" for n in "qv"
    ]
    name = report["tensors"][0]["layer"]
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(float) for x in "AB")
    assert float(report["tensors"][0]["|dW|"]) == pytest.approx(np.linalg.norm(B @ A), rel=1e-3)
    model = CausalLM.from_pretrained("base")
    for where in ("base", "base/model.safetensors"):
        assert json.loads(ok(f"inspect {where} --json"))["parameters"] == sum(
            p.size for p in model.parameters()
        )
    assert "model.embed_tokens.weight" in ok("inspect base")
    assert re.search(r"^finite +False$", ok("inspect adapter-nan"), re.MULTILINE)


def test_the_tools_turn_files_into_files(world, tmp_path):
    out = lambda name: shlex.quote(str(tmp_path / name))  # noqa: E731
    said = ok(
        f"merge --base base --adapter adapter --adapter adapter --weights -0.5,1 --out {out('tuned')}"
    )
    assert re.search(r"rounding took at most 0\.\d\d% of a dW: of model.layers.0", said)
    rows = json.loads(
        ok(f"merge --base base --adapter adapter --dtype bfloat16 --json --out {out('half')}")
    )["tensors"]
    assert [row["tensor"].rsplit(".", 2)[1] for row in rows] == ["q_proj", "v_proj"]
    assert all(row["lost"] > 0 for row in rows)
    report = json.loads(ok(f"diff base {out('tuned')} --json"))
    assert [row["tensor"] for row in report["tensors"] if row["|b - a|"]] == [
        row["tensor"] for row in rows
    ]
    assert "q_proj" in ok(f"diff base {out('tuned')} --no-ranks")
    assert "misses 0.000%" in ok(
        f"extract --base base --tuned {out('tuned')} --r 8 --out {out('extracted')}"
    )
    both = f"combine --adapter adapter --adapter {out('extracted')} --weights 0.5,-1"
    assert "of all layers together cat misses 0.000%" in ok(f"{both} --out {out('both')}")
    cancelled = ok(
        f"combine --adapter adapter --adapter adapter --weights -1,1 --out {out('cancelled')}"
    )
    assert re.search(r"together cat misses \d\S* of a dW that is 0 -> ", cancelled)
    rows = json.loads(ok(f"{both} --how svd --r 3 --json --out {out('near')}"))["tensors"]
    assert {row["r"] for row in rows} == {"8 + 8 -> 3"}
    assert (
        ok(f"resize --adapter {out('extracted')} --r 2 --out {out('small')}").count("8 -> 2") == 2
    )
    assert ok(f"convert {out('small')} --to mlx --out {out('mlx')}").startswith(
        "an adapter in mlx-lm's files -> "
    )
    ok(f"convert {out('mlx')} --to peft --out {out('peft')}")
    ok(f"convert base --dtype float16 --out {out('half-base')}")
    report = json.loads(ok(f"inspect {out('peft')} --base base --json"))
    assert report["mismatches"] == []
    assert all(len(values) == 2 for values in report["spectra"].values())
    assert re.search(
        r"^mismatches +q_proj|unknown|adapter is for",
        ok("inspect adapter --base wide"),
        re.MULTILINE,
    )


def test_escapes_in_a_file_do_not_reach_the_terminal(world, tmp_path):
    shutil.copytree("adapter", tmp_path / "evil")
    path = tmp_path / "evil" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "\x1b[2J\nevil"}))
    said = ok(f"inspect '{tmp_path}/evil'")
    said += ok(
        f"finetune --base base --data book.txt --steps 1 {TINY} --out '{tmp_path}/\x1b[2J\nevil'"
    )
    said += ok(f"convert adapter --to mlx --out '{tmp_path}/mlx\x1b[2J\nevil'")
    assert "\x1b" not in said
    assert said.count("\\x1b[2J\\nevil") == 3


def test_resuming_a_finished_run_writes_the_same_files(world, tmp_path):
    shutil.copytree("adapter", tmp_path / "again")
    before = load_file("adapter/adapter_model.safetensors")
    line = f"finetune --base base --data book.txt --steps 4 {TINY} --lr 0.05"
    ok(f"{line} --out '{tmp_path}/again' --resume")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    ok(f"{line} --out '{tmp_path}/elsewhere' --resume adapter/checkpoints/step-2")
    after = load_file(tmp_path / "elsewhere" / "adapter_model.safetensors")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_without_out_a_run_makes_its_own_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        ok(f"pretrain --data '{world}/book.txt' --steps 1 {TINY} {SHAPE}")
        assert (tmp_path / "runs" / f"pretrain-{number}" / "model.safetensors").is_file()


def test_a_weight_that_is_not_finite_is_refused_unless_it_is_allowed(world, tmp_path):
    """Some models are published with NaN in the rows of tokens that no text has."""
    base = tmp_path / "base"
    ok(f"pretrain --data book.txt --steps 1 {TINY} {SHAPE} --untied --out '{base}'")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][255] = np.nan
    save_file(base / "model.safetensors", tensors)
    for line in (
        f"evaluate --base '{base}' --data book.txt",
        f"generate --base '{base}' --prompt hi --max-new-tokens 2 --temperature 0",
        f"finetune --base '{base}' --data book.txt --steps 1 {TINY} --out '{tmp_path}/adapter'",
        f"merge --base '{base}' --adapter '{tmp_path}/adapter' --out '{tmp_path}/merged'",
    ):
        code, _, err = run(words(line))
        assert code == 5
        assert "model.embed_tokens.weight is not finite" in err
        ok(f"{line} --allow-nonfinite")
    assert np.isnan(
        load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"][255]
    ).all()


def test_texts_that_are_no_utf8_and_texts_of_their_own_to_evaluate_on(world, tmp_path):
    ok(
        f"pretrain --data latin.txt --eval-data book.txt --steps 1 {TINY} {SHAPE} --untied --out '{tmp_path}/latin'"
    )
    model = CausalLM.from_pretrained(tmp_path / "latin")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    ok(f"evaluate --base '{tmp_path}/latin' --data latin.txt")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"q_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("self_attn.o_proj", {"o_proj"}),
        ("model.layers.0.mlp.up_proj,", {"up_proj"}),
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (r".*\.(gate|up)_proj", {"gate_proj", "up_proj"}),
        ("model.layers.[0-9]+.self_attn.k_proj", {"k_proj"}),
    ],
)
def test_the_forms_of_target_modules(targets, expected, world, tmp_path):
    line = f"finetune --base base --data book.txt --steps 1 {TINY} --out '{tmp_path}/out' --target-modules '{targets}'"
    ok(line)
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in keys} == expected


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


def test_every_field_of_the_configuration_is_an_option():
    own = {"task_type", "base_model_name_or_path", "inference_mode", "extra"}
    fields, more = ({f.name for f in dataclasses.fields(c)} for c in (LoraConfig, AdaLoraConfig))
    assert set(LORA_OPTIONS) == fields - own == set(LORA_WORDS)
    assert (
        set(ADALORA_OPTIONS) == more - fields - {"total_step"} == set(ADALORA_WORDS)
    )  # that is --steps


@pytest.mark.parametrize("name", LORA_WORDS | ADALORA_WORDS)
def test_an_option_arrives_in_the_configuration(name, world, tmp_path, monkeypatch):
    seen = []

    def look(model, config, **rest):
        seen.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr("minilora.cli.commands.get_peft_model", look)
    word, value = (LORA_WORDS | ADALORA_WORDS)[name]
    option = [f"--{name.replace('_', '-')}", *([] if word is None else [word])]
    extra = ["--layers-to-transform", "0"] if name == "layers_pattern" else []
    extra += ["--method", "adalora"] if name in ADALORA_WORDS else []
    assert run([*words(f"finetune --base base --data book.txt {TINY}"), *option, *extra])[0] == 2
    assert getattr(seen[0], name) == value
    assert type(getattr(seen[0], name)) is type(value)
    if name in LORA_WORDS:
        run(words(f"finetune --base base --data book.txt {TINY}"))
        assert getattr(seen[1], name) == getattr(LoraConfig(), name)


@pytest.mark.parametrize("kind", QUANTIZE)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_over_every_base_trains_and_is_used(method, kind, world, tmp_path):
    out, base = tmp_path / "out", snapshot(Path("base"))
    held = {
        "nf4": "1,178",
        "fp4": "1,178",
        "int8": "2,266",
    }  # 2,176 codes, 34 absmax in bytes, two floats a layer
    line = f"finetune --base base --data book.txt --steps 12 {TINY} --warmup 0 --lr 0.1 --out '{out}' --method {method}"
    if method == "full" and kind != "none":
        code, _, err = run(words(f"{line} --quantize {kind}"))
        assert code == 2
        assert f"quantize = {kind}" in err
        return
    code, said, err = run(words(f"{line} --quantize {kind}"))
    assert code == 0
    assert snapshot(Path("base")) == base
    before, after = (
        json.loads(line)["loss"] for line in (out / "eval.jsonl").read_text().splitlines()
    )
    assert after < before
    assert err == ""
    assert (
        kind in ("none", "stored")
        or f"2,176 weights of 7 layers in {held[kind]} bytes of {kind}, " in said
    )
    files = {p.name for p in out.iterdir() if p.suffix != ".jsonl"}
    if method == "full":
        assert files == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        use = f"--base '{out}'"
    else:
        config = json.loads((out / "adapter_config.json").read_text())
        kinds = config["peft_type"], config["use_dora"]
        assert (
            kinds
            == {"lora": ("LORA", False), "dora": ("LORA", True), "adalora": ("ADALORA", False)}[
                method
            ]
        )
        pictures = {"rank_allocation.png"} if method == "adalora" and HAS_MATPLOTLIB else set()
        assert files == {"adapter_config.json", "adapter_model.safetensors"} | pictures
        use = f"--base base --adapter '{out}' --quantize {kind}"
    code, said, _ = run(words(f"evaluate --data book.txt --context 16 {use}"))
    assert code == 0
    assert run(words(f"generate --prompt hi --max-new-tokens 2 {use}"))[0] == 0
    model = CausalLM.from_pretrained(out if method == "full" else "base")  # the same by hand
    if kind not in ("none", "stored"):  # a file of float32 has nothing to hold in less
        quantize(model, kind)
    if method != "full":
        model = PeftModel.from_pretrained(model, out)
    assert said.startswith(
        f"loss {minilora.training.loop.evaluate(model, ByteTokenizer().encode(TEXT), 16):.6f} "
    )


def test_a_base_that_is_held_otherwise_does_not_go_on(world, tmp_path):
    line = f"finetune --base base --data book.txt --steps 4 --save-every 2 {TINY} --out '{tmp_path}/out'"
    ok(f"{line} --quantize nf4")
    code, _, err = run(words(f"{line} --quantize int8 --resume"))
    assert code == 3
    assert "frozen weights" in err


def test_a_base_that_is_held_as_codes_already_cannot_train_whole(world, tmp_path, monkeypatch):
    plain = CausalLM.from_pretrained
    monkeypatch.setattr(
        CausalLM, "from_pretrained", lambda *a, **k: quantize(plain(*a, **k), "int8")
    )
    code, _, err = run(
        words(f"finetune --base base --data book.txt {TINY} --out '{tmp_path}/out' --method full")
    )
    assert code == 2
    assert "'base' is held as int8" in err
    assert not (tmp_path / "out").exists()


def test_ranks_are_logged_and_drawn_for_a_run_that_went_on(world, tmp_path):
    line = f"finetune --base base --data book.txt --save-every 10 {TINY} --lr 0.02 --steps 40 --method adalora"
    ok(f"{line} --out '{tmp_path}/straight'")
    shutil.copytree(
        tmp_path / "straight" / "checkpoints" / "step-30",
        tmp_path / "on" / "checkpoints" / "step-30",
    )
    shutil.copy(tmp_path / "straight" / "log.jsonl", tmp_path / "on")
    shutil.copy(tmp_path / "straight" / "eval.jsonl", tmp_path / "on")
    ok(f"{line} --out '{tmp_path}/on' --resume")
    history, steps = minilora.training.loop.rank_history(tmp_path / "straight")
    assert minilora.training.loop.rank_history(tmp_path / "on") == (history, steps)
    assert steps == 40
    layers = [f"model.layers.0.self_attn.{n}_proj" for n in "qv"]
    assert history[0] == (0, dict.fromkeys(layers, 12))
    assert [sum(ranks.values()) for _, ranks in history] == sorted(
        (sum(r.values()) for _, r in history), reverse=True
    )
    pattern = json.loads((tmp_path / "straight" / "adapter_config.json").read_text())[
        "rank_pattern"
    ]
    assert {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()} == history[
        -1
    ][1]
    assert sum(history[-1][1].values()) == 16


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("False", False), ("gaussian", "gaussian")]
)
def test_initialisers(word, value):
    args = build_parser().parse_args(
        ["finetune", "--base", "b", "--data", "d", "--init-lora-weights", word]
    )
    assert args.init_lora_weights is value or args.init_lora_weights == value


# ---- help ----


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) <= 44
    assert max(map(len, lines)) <= 110
    assert err == ""
    if command:
        example = next(line for line in lines if line.startswith("example: "))
        build_parser().parse_args(shlex.split(example.removeprefix("example: minilora ")))
    else:
        assert all(name in out for name in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"minilora {__version__}\n"


def test_as_a_module(world):
    def module(*arguments, **options):
        return subprocess.run(
            [sys.executable, "-m", "minilora", *arguments], capture_output=True, **options
        )

    done = module(
        "generate", "--base", "base", "--prompt", "é", "--max-new-tokens", "2", "--temperature", "0"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith("é".encode())
    # A terminal without Unicode, and a byte in a path that is no character.
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = module("inspect", b"adapter\xff", env=plain)
    assert done.returncode == 4
    assert (
        done.stderr
        == b"minilora: error: no such model folder (nothing is downloaded): 'adapter\\udcff'\n"
    )
    done = module("generate", "--base", "base", "--prompt", "é", "--max-new-tokens", "0", env=plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xe9\n", b"")


def test_a_folder_whose_name_is_no_text_works(world, tmp_path):
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/od\xffd \n")
    try:
        shutil.copytree("base", odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert (
        run(
            [
                *words(f"finetune --data book.txt --steps 1 {TINY} --out"),
                odd + "/new",
                "--base",
                odd,
            ]
        )[0]
        == 0
    )
    assert (Path(odd) / "new" / "adapter_config.json").is_file()


def test_debug_shows_where_an_error_came_from(world):
    with pytest.raises(ConfigError, match="context"):
        main(words("evaluate --base base --data book.txt --context 1000 --debug"))


def test_an_interrupt_ends_without_a_traceback(world, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalLM, "from_pretrained", interrupted)
    code, out, err = run(words("evaluate --base base --data book.txt"))
    assert (code, out, err) == (130, "", "\nminilora: interrupted\n")


def test_memory_that_runs_out_ends_without_a_traceback(world, monkeypatch):
    def too_much(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr(CausalLM, "from_pretrained", too_much)
    assert run(words("evaluate --base base --data book.txt"))[::2] == (
        1,
        "minilora: error: out of memory\n",
    )


def test_warnings_are_one_line_and_showing_them_ends_with_the_command(world, tmp_path):
    import warnings

    shown = warnings.showwarning
    line = f"finetune --base base --data book.txt --steps 1 {TINY} --out '{tmp_path}/out' --fan-in-fan-out"
    code, _, err = run(words(line))
    assert code == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("minilora: warning: fan_in_fan_out")
    assert warnings.showwarning is shown


# ---- what cannot work ----

F = f"finetune --base base --data book.txt --out new {TINY}"
NO = F.replace("--base base", "--base missing")
P = f"pretrain --data book.txt --out new {TINY} {SHAPE}"
T = f"finetune --base base --tasks book.txt latin.txt --out new {TINY}"
G = "generate --base base --prompt hi --max-new-tokens 2"
E = "evaluate --base base --data book.txt"
M = "merge --base base --adapter adapter --out new"
LONG = "x" * 5000
# command line, exit code, what the message names
BAD = [
    # usage
    ("", 2, "no command"),
    ("nothing", 2, "'nothing'"),
    ("--nothing", 2, "--nothing"),
    ("finetune", 2, "required: --base"),
    ("generate --base base", 2, "--prompt"),
    ("inspect", 2, "DIR"),
    ("devices here", 2, "unrecognized arguments: here"),
    (f"{M} --device cpu", 2, "unrecognized arguments: --device cpu"),
    (f"{M} --seed 0", 2, "unrecognized arguments: --seed 0"),
    (f"{E} --nothing", 2, "--nothing"),
    (f"{E} extra words", 2, "extra words"),
    (f"{E} --thread 1", 2, "--thread"),
    (f"{E} --context", 2, "--context"),
    (
        "generate --base base --prompt --x",
        2,
        "--prompt: expected one argument; one that begins with - goes after =",
    ),
    (f"{M} --weights 0.5,", 2, "'0.5,' is no list of numbers"),
    (
        f"{M} --weights 1,1",
        2,
        "--weights: expected 1 finite numbers, one for each adapter, got [1.0, 1.0]",
    ),
    (f"{E} {LONG}", 2, "unrecognized"),
    (f"{E} --threads {'9' * 5000}", 2, "--threads"),
    (f"{E} --limit {'9' * 5000}", 2, "--limit"),
    # texts
    (f"{P} --data missing.txt", 4, "missing.txt"),
    (f"{P} --data folder", 3, "folder"),
    (f"{P} --data /dev/zero", 3, "/dev/zero"),
    (f"{P} --data empty.txt", 3, "empty.txt"),
    (f"{P} --data short.txt", 3, "short.txt"),
    (f"{P} --data smile.txt", 3, "smile.txt"),
    (f"{P} --data half.txt", 3, "half.txt: a context of 16 needs at least 17 tokens, it has 16"),
    (f"{P} --data book.txt/", 4, "book.txt/"),
    (f"{P} --data {LONG}", 4, "xxx"),
    (f"{P} --eval-data empty.txt", 3, "empty.txt"),
    (f"{P} --eval-data missing.txt", 4, "missing.txt"),
    (f"{P} --data ''", 2, "--data: '' is no path"),
    (f"{P} --eval-data ''", 2, "--eval-data: ''"),
    (f"{E} --data empty.txt", 3, "empty.txt"),
    (f"{F} --data short.txt", 3, "short.txt"),
    ("demo --out new --pretrain-data short.txt", 3, "--pretrain-data short.txt"),
    ("demo --out new --adapt-data missing.txt", 4, "missing.txt"),
    # records
    (f"{F} --data bare.jsonl", 3, "'bare.jsonl' has no record"),
    (f"{F} --data one.jsonl", 3, "--data one.jsonl: expected 2 records or more"),
    (
        f"{F} --data chat.jsonl",
        3,
        "'chat.jsonl' line 2: 'messages' needs a tokenizer.json and its chat template",
    ),
    (
        f"{F} --data wordy.jsonl",
        3,
        "'wordy.jsonl' line 1: there is nothing to learn: its first 45 of 52 tokens",
    ),
    (f"{F} --data missing.jsonl", 4, "missing.jsonl"),
    *[
        (f"{x} --data damaged.jsonl", 3, "'damaged.jsonl' line 2: not valid JSON")
        for x in (F, P, E)
    ],
    *[
        (f"{x} --eval-data damaged.jsonl", 3, "'damaged.jsonl' line 2: not valid JSON")
        for x in (F, P)
    ],
    (f"{F} --data sums.jsonl --eval-data empty.txt", 3, "empty.txt"),
    (T.replace("latin.txt", "one.jsonl"), 3, "--tasks one.jsonl: expected 2 records or more"),
    # context
    *[(f"{line} --context 0", 2, "context") for line in (P, F, E)],
    *[(f"{line} --context -1", 2, "context") for line in (P, F, E)],
    (f"{F} --context 257", 2, "max_position_embeddings = 256"),
    (f"{E} --context 257", 2, "max_position_embeddings = 256"),
    (f"{P} --context 600", 3, "context of 600"),
    (f"{P} --context 16 --max-position-embeddings 15", 2, "max_position_embeddings = 15"),
    (f"{P} --max-position-embeddings 0", 2, "--max-position-embeddings"),
    # numbers of a run
    *[(f"{F} --lr={x}", 2, "lr") for x in ("nan", "inf", "-1", "0", "x", "")],
    *[(f"{F} --steps={x}", 2, "steps") for x in ("-1", "0", "1e30", "1.5", "x", "9" * 30)],
    *[(f"{F} --batch-size={x}", 2, "batch") for x in ("-1", "0", "1.5", 10**18)],
    *[(f"{F} --accumulate={x}", 2, "accumulate") for x in ("-1", "0", 10**18)],
    *[
        (f"{F} --{name}={x}", 2, name)
        for name in ("weight_decay", "max_grad_norm")
        for x in ("nan", "-1", "inf")
    ],
    *[
        (f"{F} --{name}=0", 2, name)
        for name in ("save_every", "eval_every", "shard", "max_grad_norm")
    ],
    *[(f"{line} --seed {x}", 2, "--seed") for line in (F, P, G, E) for x in (-1, 2**64, "x")],
    *[
        (f"{line} --threads {x}", 2, "--threads")
        for line in (F, P, G, E, M, "demo --out new")
        for x in (0, -3, "1.5")
    ],
    *[
        (f"{line} --device {x}", 2, x)
        for line in (F, P, G, E, "demo --out new")
        for x in ("tpu", "cuda:x", "CPU")
    ],
    (f"{E} --limit 0", 2, "limit"),
    (f"{F} --warmup -1", 2, "warmup"),
    # the shape of a model
    (f"{P} --hidden-size 0", 2, "--hidden-size"),
    (f"{P} --hidden-size 15", 2, "hidden_size"),
    (
        f"{P} --hidden-size 2147483640 --intermediate-size 2147483640 --num-attention-heads 357913940",
        2,
        "parameters",
    ),
    (f"{P} --num-hidden-layers 1000000000", 2, "parameters"),
    (f"{P} --num-attention-heads 16", 2, "head_dim"),
    (f"{P} --num-key-value-heads 3", 2, "num_key_value_heads"),
    (f"{P} --num-hidden-layers 1e9", 2, "--num-hidden-layers"),
    # the adapter
    *[(f"{F} --r={x}", 2, "r must be") for x in ("0", "-1", 2**40)],
    *[(f"{F} --r={x}", 2, "argument --r:") for x in ("1.5", "x", "")],
    *[(f"{F} --lora-alpha={x}", 2, "lora_alpha") for x in ("nan", "inf", "0", "-2", "1e400")],
    (f"{F} --lora-alpha x", 2, "--lora-alpha: invalid number value: 'x'"),
    *[(f"{F} --lora-dropout={x}", 2, "dropout") for x in ("-0.1", "1", "nan", "x")],
    (f"{F} --target-modules nothing", 2, "q_proj"),
    (f"{F} --target-modules q_proj,nothing", 2, "'nothing'"),
    (f"{F} --target-modules '(([a-z_0-9]+)*\\.?)*!'", 2, "([a-z_0-9]+)*"),
    (f"{F} --target-modules '(q_proj'", 2, "(q_proj"),
    (f"{F} --target-modules ''", 2, "target_modules"),
    (f"{F} --target-modules ,", 2, "target_modules"),
    (f"{F} --target-modules embed_tokens --method adalora", 2, "embed_tokens"),
    (f"{F} --trainable-token-indices 256", 2, "has no row 256"),
    (f"{F} --trainable-token-indices 1,x", 2, "'1,x'"),
    (f"{F} --target-modules norm", 2, "norm"),
    (f"{F} --target-modules '{'(' * 500}'", 2, "((("),
    (f"{F} --exclude-modules 'q_proj,v_proj'", 2, "no target"),
    (f"{F} --rank-pattern '{{'", 2, "--rank-pattern"),
    (f"{F} --rank-pattern '[1]'", 2, "--rank-pattern"),
    (f"{F} --rank-pattern {'[' * 5000}", 2, "--rank-pattern"),
    (f'{F} --rank-pattern \'{{"q_proj": 1, "q_proj": 2}}\'', 2, "--rank-pattern"),
    (f"{F} --rank-pattern '{{\"q_proj\": 0}}'", 2, "rank_pattern"),
    (f"{F} --alpha-pattern '{{\"q_proj\": NaN}}'", 2, "--alpha-pattern"),
    (f"{F} --alpha-pattern '{{\"(\": 1}}'", 2, "("),
    (f"{F} --layers-to-transform x", 2, "--layers-to-transform"),
    (f"{F} --layers-to-transform 7", 2, "no target"),
    (f"{F} --layers-pattern layers", 2, "layers_pattern"),
    (f"{F} --modules-to-save nothing", 2, "'nothing'"),
    (f"{F} --bias some", 2, "--bias"),
    (f"{F} --init-lora-weights magic", 2, "init_lora_weights"),
    # the method: refused before the base is looked for
    *[
        (f"{line} --method lokr", 2, "--method: invalid choice: 'lokr'")
        for line in (F, "demo --out new")
    ],
    *[
        (f"{line} --quantize nf3", 2, "--quantize: invalid choice: 'nf3'")
        for line in (F, E, G, "demo --out new")
    ],
    *[
        (f"{line} --method full {options}", 2, named)
        for line in (NO, "demo --out new")
        for options, named in (
            ("--r 4", "r"),
            ("--lora-alpha 3", "lora_alpha"),
            ("--quantize nf4", "quantize = nf4"),
        )
    ],
    (f"{NO} --method full --use-dora --tinit 3", 2, "use_dora, tinit"),
    (f"{NO} --method dora --lora-bias", 2, "--lora-bias"),
    *[
        (f"{NO} --method {method} --{name.replace('_', '-')} 0.5", 2, name)
        for method in ("lora", "dora")
        for name in ("beta1", "beta2", "orth_reg_weight")
    ],
    *[
        (f"{NO} --{name.replace('_', '-')} 1", 2, name)
        for name in ("target_r", "init_r", "tinit", "tfinal", "deltaT")
    ],
    (f"{NO} --method adalora --r 4 --target-r 4", 2, "r and target_r"),
    (f"{NO} --method adalora --use-dora", 2, "use_dora must be False"),
    (f"{NO} --method adalora --use-rslora", 2, "use_rslora must be False"),
    (f"{NO} --method adalora --init-lora-weights gaussian", 2, "init_lora_weights"),
    (f"{NO} --method adalora --rank-pattern '{{\"q_proj\": 4}}'", 2, "rank_pattern"),
    (
        f"{NO} --method adalora --steps 100 --tinit 75",
        2,
        "tinit must be below total_step - tfinal = 75, got 75",
    ),
    (f"{NO} --method adalora --target-r 9 --init-r 8", 2, "target_r must be at most init_r = 8"),
    (f"{NO} --method adalora --deltaT 0", 2, "deltaT"),
    (f"{NO} --method adalora --beta1 1", 2, "beta1 must be between 0 and 1"),
    (f"{NO} --method adalora --orth-reg-weight nan", 2, "orth_reg_weight"),
    ("demo --out new --method adalora --r 0", 2, "target_r"),
    (f"{F} --quantize nf4 --modules-to-save up_proj", 2, "quantised"),
    # folders to read
    (f"{E} --base missing", 4, "missing"),
    (f"{E} --base book.txt", 4, "book.txt"),
    (f"{E} --base folder", 3, "config.json"),
    (f"{E} --base ''", 2, "--base: ''"),
    (f"{E} --adapter ''", 2, "--adapter: ''"),
    (f"{E} --adapter missing", 4, "missing"),
    (f"{E} --adapter base", 3, "adapter_config.json"),
    (f"{E} --base adapter", 3, "config.json"),
    ("inspect missing", 4, "missing"),
    ("inspect folder", 3, "folder"),
    ("inspect book.txt", 3, "book.txt"),
    ("inspect ''", 2, "DIR: ''"),
    *[(f"{E} --base base-{x}", 3, f"base-{x}") for x in ("cut", "header", "nothing", "no-weights")],
    *[(f"{E} --base base-config-{x}", 3, f"base-config-{x}") for x in ("cut", "list", "twice")],
    *[
        (f"inspect base-{x}", 3, f"base-{x}")
        for x in ("cut", "header", "nothing", "no-weights", "config-cut")
    ],
    *[
        (f"{E} --adapter adapter-{x}", 3, f"adapter-{x}")
        for x in ("cut", "header", "nothing", "no-weights")
    ],
    *[
        (f"{E} --adapter adapter-config-{x}", 3, f"adapter-config-{x}")
        for x in ("cut", "list", "twice")
    ],
    *[
        (f"inspect adapter-{x}", 3, f"adapter-{x}")
        for x in ("cut", "header", "nothing", "no-weights", "config-cut")
    ],
    (f"{E} --base base-heads", 3, "q_proj.weight is (16, 16), config.json says (24, 16); "),
    (f"{E} --base base-layers", 3, "model.layers.1"),
    (f"{E} --base base-tokens", 3, "tokenizer.json"),
    (f"{E} --adapter adapter-r0", 2, "adapter-r0"),
    (f"{E} --adapter adapter-r4", 3, "lora_A.weight is (8, 16), the base needs (4, 16)"),
    (
        f"{E} --adapter adapter-dora",
        3,
        "missing base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ),
    ("inspect adapter-dora", 3, "has no lora_magnitude_vector that fits it"),
    (f"{E} --adapter adapter-dora-bias", 2, "lora_bias"),
    (
        f"{E} --base wide --adapter adapter",
        3,
        "q_proj.lora_A.weight is (8, 16), the base needs (8, 24); ",
    ),
    (
        f"{E} --base wide --adapter adapter",
        3,
        "q_proj.lora_B.weight is (16, 8), the base needs (24, 8); ",
    ),
    (f"{E} --base wide --adapter adapter", 3, " and 1 more"),
    # weights that are no numbers
    (f"{E} --base base-nan", 5, "broken"),
    (f"{E} --adapter adapter-nan", 5, "broken"),
    (f"{G} --base base-nan", 5, "broken"),
    (f"{M} --adapter adapter-nan", 5, "finite"),
    # several tasks
    (f"{T} --data book.txt", 2, "--data FILE for one, or --tasks"),
    ("finetune --base base --out new", 2, "--data FILE for one, or --tasks"),
    (f"{F} --shared-r 2", 2, "name the tasks"),
    (f"{T} --shared-r 0", 2, "--shared-r"),
    (f"{T} --shared-r 2 --method dora", 2, "not with dora"),
    (f"{T} --shared-r 2 --method full", 2, "not with full"),
    (f"{T} --method adalora", 2, "one by one"),
    (f"{T} --eval-data book.txt", 2, "--eval-data is one text"),
    (T.replace("latin.txt", "latin.txt full/../book.txt"), 2, "two are alike"),
    (T.replace("latin.txt", "missing.txt"), 4, "missing.txt"),
    (T.replace("latin.txt", "''"), 2, "--tasks: '' is no path"),
    (T.replace("latin.txt", "short.txt"), 3, "--tasks short.txt"),
    (f"{T} --batch-size 1", 2, "cannot hold a sequence of each of 2 tasks"),
    (f"{T} --bias all", 2, "bias must be 'none'"),
    (f"{E} --adapter tasks", 2, "book, latin"),
    (f"{E} --adapter tasks --task other", 2, "no task 'other'; choose from book, latin, __base__"),
    (f"{E} --adapter adapter --task book", 2, "holds one adapter"),
    (f"{E} --task book", 2, "give that, too"),
    (f"{M.replace('--adapter adapter', '--adapter tasks')}", 2, "book, latin"),
    ("inspect tasks", 2, "book, latin, shared"),
    # folders to write
    *[(f"{line} --out full", 2, "'full' is not empty") for line in (F, P, M, "demo")],
    *[(f"{line} --out book.txt", 2, "'book.txt' is a file") for line in (F, P, M, "demo")],
    *[(f"{line} --out book.txt/new", 4, "book.txt/new") for line in (F, P, M, "demo")],
    *[(f"{line} --out ''", 2, "--out: ''") for line in (F, P, M, "demo")],
    *[(f"{line} --out {LONG}", 4, "File name too long") for line in (F, P, M, "demo")],
    (f"{M} --out base", 2, "--base"),
    (f"{M} --weights 1,2", 2, "--weights: expected 1 finite numbers"),
    (f"{M} --weights nan", 2, "--weights"),
    (f"{M} --weights x", 2, "--weights"),
    (f"{M} --dtype float8", 2, "--dtype"),
    (f"{M} --adapter ''", 2, "--adapter: ''"),
    (f"{M} --adapter missing", 4, "missing"),
    (f"{M} --base wide", 3, "q_proj: the adapter is for (16, 16), the base has (24, 24)"),
    (f"{M} --base missing", 4, "missing"),
    ("inspect base --base base", 2, "--base and --plot are for an adapter"),
    ("inspect adapter --plot spectra.xyz", 2, "--plot"),
    ("inspect adapter --plot ''", 2, "--plot: ''"),
    ("diff base missing", 4, "missing"),
    ("diff base", 2, "B"),
    ("resize --adapter adapter --r 0 --out new", 2, "--r"),
    ("resize --adapter adapter --r 99999999 --out new", 2, "--r must be"),
    ("resize --adapter base --r 1 --out new", 3, "adapter_config.json"),
    ("resize --adapter adapter-nan --r 1 --out new", 5, "not finite"),
    ("combine --adapter adapter --weights 1,2 --out new", 2, "--weights: expected 1"),
    ("combine --adapter adapter --how ties --out new", 2, "--how"),
    ("combine --adapter adapter --r 4 --out new", 2, "a rank is for svd"),
    ("combine --adapter adapter --adapter base --out new", 3, "adapter_config.json"),
    ("combine --adapter adapter --adapter adapter-nan --out new", 5, "not finite"),
    ("combine --adapter adapter --adapter '' --out new", 2, "--adapter: ''"),
    ("extract --base base --tuned base --r 1 --out new", 2, "nothing to extract"),
    ("extract --base base --tuned wide --r 1 --out new", 3, "differs in shape"),
    ("extract --base base --tuned '' --r 1 --out new", 2, "--tuned: ''"),
    ("convert adapter --out new", 2, "--dtype, or --to"),
    ("convert adapter --to peft --out new", 3, "adapters.safetensors"),
    ("convert base --to mlx --out new", 3, "adapter_config.json"),
    ("convert adapter-nan --to mlx --out new", 5, "not finite"),
    ("convert base-nan --dtype float16 --out new", 5, "not finite"),
    (f"{M} --out ./folder/../base", 2, "--base"),
    (f"{M} --out base/merged", 2, "--base"),
    (f"{M} --out adapter", 2, "--adapter"),
    (f"{M} --out adapter/merged", 2, "--adapter"),
    # going on
    (f"{F} --resume auto", 3, "no checkpoint"),
    (f"{F} --resume missing", 3, "missing"),
    (f"{F} --resume ''", 2, "--resume: ''"),
    (f"{F.replace(' --out new', '')} --resume", 2, "--out"),
    (f"{F} --out adapter --resume --steps 5 --lr 0.05", 3, "steps (4 in the checkpoint, 5 now)"),
    (
        f"{F} --out adapter --resume --steps 4 --lr 0.05 --lora-alpha 3",
        3,
        "lora_alpha (8 in the checkpoint, 3 now)",
    ),
    (
        f"{F} --out full --resume adapter/checkpoints/step-2 --steps 4 --lr 0.05",
        2,
        "'full' is not empty",
    ),
    # generating
    (f"{G} --temperature -1", 2, "temperature"),
    (f"{G} --temperature nan", 2, "temperature"),
    (f"{G} --temperature inf", 2, "temperature"),
    (f"{G} --top-k 0", 2, "top_k"),
    (f"{G} --top-p 0", 2, "top_p"),
    (f"{G} --top-p 1.5", 2, "top_p"),
    (f"{G} --top-p nan", 2, "top_p"),
    (f"{G} --max-new-tokens -1", 2, "max_new_tokens"),
    (f"{G} --prompt ''", 3, "--prompt"),
    # words that would steer a terminal
    ("inspect 'a\nb\x1b[2Jc\t\x07'", 4, r"a\nb\x1b[2Jc\t\x07"),
    (f"{E} --data 'a\nb\x1b[2Jc'", 4, r"a\nb\x1b[2Jc"),
    (f"{P} --data 'half\n.txt'", 4, r"half\n.txt"),
    (f"{F} --target-modules 'a\nb\x1b[2J'", 2, r"a\nb\x1b[2J"),
    ("'\x1b[2J'", 2, r"\x1b[2J"),
    (f"{E} '\x1b[2J\r\n'", 2, r"\x1b[2J\r\n"),
]
if Path("/proc/self").exists():
    BAD += [(f"{line} --out /proc/minilora", 4, "/proc/minilora") for line in (F, P, M, "demo")]


def name_of(line: str) -> str:
    """A name for the test: the command, and the end of its line, which is what is wrong with it."""
    shown = repr(line)[1:-1]
    return shown if len(shown) <= 60 else f"{shown[:8]} ... {shown[-45:]}"


@pytest.mark.parametrize(("line", "code", "named"), BAD, ids=[name_of(line) for line, _, _ in BAD])
def test_a_mistake_ends_in_one_line_and_changes_nothing(line, code, named, world):
    with unharmed(world, line):
        got, out, err = run(words(line))
    assert got == code, err
    lines = err.split("\n")
    assert len(lines) == 2
    assert lines[1] == ""
    assert lines[0].startswith("minilora: error: ")
    assert lines[0].isprintable()
    assert len(lines[0]) <= 500
    assert named in lines[0]
    assert "Traceback" not in out + err


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_known_before_training(world, tmp_path):
    tmp_path.chmod(0o500)
    assert run(words(f"{F} --out '{tmp_path}/new'"))[0] == 4
    tmp_path.chmod(0o700)


def test_the_targets_that_there_are_are_listed():
    model = CausalLM(
        TransformerConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ConfigError) as caught:
        get_peft_model(model, LoraConfig(target_modules=["nothing"]))
    assert all(
        f"{name}_proj" in str(caught.value) for name in ("q", "k", "v", "o", "gate", "up", "down")
    )


def test_training_that_overflows_ends_with_its_own_code(world, tmp_path):
    for start in (P, F):
        code, _, err = run(
            words(f"{start} --out '{tmp_path}/{start[:8]}' --lr 1e39 --warmup 0 --steps 5")
        )
        *others, last = err.splitlines()
        assert code == 5
        assert last.startswith("minilora: error: step ")
        assert all(line.startswith("minilora: warning: ") for line in others)


# ---- anything at all ----

OPTIONS = sorted(
    {
        o
        for a in build_parser()._subparsers._group_actions[0].choices.values()
        for o in a._option_string_actions
    }
)
WORDS = [
    "0",
    "1",
    "-1",
    "2",
    "nan",
    "1e30",
    "base",
    "adapter",
    "short.txt",
    "folder",
    "",
    "-",
    "--",
    "--r=2",
    "\udc80",
    "x\0y",
]
anything = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=8)
argvs = st.builds(
    lambda command, rest: [*command, *rest],
    st.lists(st.sampled_from(COMMANDS), max_size=1),
    st.lists(st.one_of(st.sampled_from(OPTIONS), st.sampled_from(WORDS), anything), max_size=9),
)
NEEDED = {  # so that some of them get past the parser
    "finetune": ["--base", "base", "--data", "short.txt"],
    "pretrain": ["--data", "short.txt"],
    "generate": ["--base", "base", "--prompt", "x", "--max-new-tokens", "3"],
    "evaluate": ["--base", "base", "--data", "short.txt"],
    "merge": ["--base", "base", "--adapter", "adapter", "--out", "merged"],
    "verify": ["--cases", "1"],
    "combine": ["--adapter", "adapter", "--adapter", "adapter", "--out", "combined"],
    "diff": ["base", "base"],
    "extract": ["--base", "base", "--tuned", "base", "--r", "2", "--out", "extracted"],
    "resize": ["--adapter", "adapter", "--r", "2", "--out", "resized"],
    "convert": ["adapter", "--out", "converted"],
}


@given(st.lists(argvs, min_size=4, max_size=4))
def test_no_words_whatever_give_a_traceback(made, several):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made / "playground" if (made / "playground").exists() else playground(made))
        patch.setattr(minilora.lab.demo, "demo", lambda *a, **k: {})
        patch.setattr(
            minilora.training.loop,
            "train",
            lambda *a, **k: minilora.training.loop.Result([], [(0, 1.0)], 0.0),
        )
        for argv in several:
            argv = [*argv[:1], *NEEDED.get(argv[0], []), *argv[1:]] if argv else argv
            try:
                code, _, err = run([word for word in argv if word != "--debug"])
            except SystemExit:
                assert {"--help", "-h", "--version"} & set(argv)
                continue
            assert type(code) is int
            assert 0 <= code <= 5
            assert "Traceback" not in err
            assert bool(code) == ("minilora: error: " in err)


def playground(made: Path) -> Path:
    for name in ("base", "adapter"):
        shutil.copytree(made / name, made / "playground" / name)
    (made / "playground" / "folder").mkdir()
    (made / "playground" / "short.txt").write_bytes(b"0123456789" * 20)
    return made / "playground"
