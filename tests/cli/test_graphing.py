"""minilora graph: DOT text or a picture of a layer or a block, from files."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_lines import run

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.lora.multitask import get_multitask_model

CONFIG = TransformerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)
Q_PROJ = "model.layers.1.self_attn.q_proj"


def ok(line: str) -> str:
    code, out, err = run(line)
    assert code == 0, err
    assert err == ""
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    CausalLM(CONFIG).save_pretrained(folder / "base")
    for name, use_dora in {"adapter": False, "dora": True}.items():
        config = LoraConfig(r=2, target_modules="all-linear", use_dora=use_dora)
        get_peft_model(CausalLM(CONFIG), config).save_pretrained(folder / name)
    tasks = get_multitask_model(CausalLM(CONFIG), {"a": LoraConfig(r=2)})
    tasks.save_pretrained(folder / "tasks")
    return folder


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def test_graph_prints_dot_text_of_a_layer(world):
    out = ok(f"graph --base base --adapter adapter --layer {Q_PROJ}")
    assert out.startswith(f'digraph "{Q_PROJ} of base + adapter" {{')
    assert out.endswith("}\n")
    assert "lora_linear" in out
    assert out.count(" -> ") == 7
    again = ok(f"graph --base base --adapter adapter --layer base_model.model.{Q_PROJ}")
    assert again.count(" -> ") == 7


def test_graph_writes_pictures_and_prints_a_table(world, tmp_path):
    for name in ("block.svg", "block.dot"):
        out = ok(f"graph --base base --adapter adapter --block 1 --out {tmp_path / name}")
        header, *rows = out.splitlines()
        assert header.split() == ["operation", "in", "shape", "kept", "gradients", "none"]
        assert sum(row.startswith("lora_linear") for row in rows) == 7
        assert rows[-1].endswith(f"bytes kept for backward -> {tmp_path / name}")
    ElementTree.parse(tmp_path / "block.svg")
    dot = ok("graph --base base --adapter adapter --block 1")
    assert (tmp_path / "block.dot").read_text() == dot


def test_graph_prints_json_in_which_frozen_weights_keep_nothing(world):
    value = json.loads(ok("graph --base base --adapter dora --block 0 --quantize nf4 --json"))
    vertices = value["vertices"]
    frozen = {i for i, v in enumerate(vertices) if v["dtype"] == "nf4"}
    assert len(frozen) == 7
    for edge in value["edges"]:
        if edge["source"] in frozen:
            assert not edge["gradient"]
            assert vertices[edge["target"]]["backward_bytes"] == 0
    assert value["backward_bytes"] == sum(v["backward_bytes"] for v in vertices) > 0


def test_graph_of_a_step_has_one_product_for_q_k_and_v(world):
    value = json.loads(ok("graph --base base --adapter adapter --block 0 --step --json"))
    products = [v["module"] for v in value["vertices"] if v["name"] == "effective_linear"]
    assert products == ["self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"]
    code, _, err = run(f"graph --base base --adapter adapter --layer {Q_PROJ} --step")
    assert code == 2
    assert "nothing is computed inside" in err


def test_graph_of_a_base_alone_shows_that_all_weights_train(world):
    out = ok(f"graph --base base --layer {Q_PROJ}")
    assert "trains, 1,024 B" in out
    assert "frozen, " not in out


def test_graph_takes_the_context_of_a_model_that_has_less_than_the_default(world, tmp_path):
    config = dataclasses.replace(CONFIG, max_position_embeddings=8)
    CausalLM(config).save_pretrained(tmp_path)
    assert "1 x 8 x 16" in ok(f"graph --base {tmp_path} --block 0")


def test_graph_counts_bytes_of_the_batch_that_was_asked_for(world):
    line = f"graph --base base --adapter adapter --layer {Q_PROJ} --json"
    small, large = (
        json.loads(ok(f"{line} --batch-size {b} --context {t}"))["backward_bytes"]
        for b, t in ((1, 4), (2, 8))
    )
    assert large == 4 * small == 4 * 4 * (16 + 2) * 4


ERRORS = {
    "--block 2": "--block must be from 0 to 1",
    "--block -1": "--block must be an integer of at least 0",
    "--layer model.layers.1.self_attn.q_pro": f"did you mean {Q_PROJ}?",
    "--layer ''": "--layer must",
    "": "one of the arguments --layer --block is required",
    "--block 0 --layer lm_head": "not allowed with argument",
    "--block 0 --out block.png": "--out must end in .svg or .dot, got 'block.png'",
    "--block 0 --context 33": "--context 33 must be at most",
    "--block 0 --context 0": "--context must be",
    "--block 0 --adapter tasks": "--adapter 'tasks' has several tasks",
    "--block 0 --adapter base": "adapter_config.json",
    "--layer model.layers.0.self_attn.nothing": "did you mean",
}


@pytest.mark.parametrize("options", ERRORS)
def test_graph_refuses_what_does_not_fit(options, world):
    code, out, err = run(f"graph --base base {options}")
    assert code in (2, 3, 4)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("minilora: error: ")
    assert ERRORS[options] in line


def test_graph_leaves_a_picture_alone_when_it_fails(world, tmp_path):
    path = tmp_path / "block.svg"
    path.write_text("before")
    assert run(f"graph --base base --block 7 --out {path}")[0] == 2
    assert path.read_text() == "before"
    missing = tmp_path / "nowhere" / "block.svg"
    assert run(f"graph --base base --block 0 --out {missing}")[0] == 4


@pytest.mark.parametrize("name", ["<script>alert(1)<&\"'\\N", "\u202ebase\x1b[2J", "b&lt;]]>"])
def test_graph_makes_text_of_a_hostile_folder(name, world, tmp_path):
    base = tmp_path / name.replace("/", "")
    shutil.copytree("base", base)
    svg = tmp_path / "block.svg"
    line = f"graph --base {shlex.quote(str(base))} --block 0"
    out = ok(line)
    assert out.isprintable() or set(filter(lambda c: not c.isprintable(), out)) == {"\n"}
    ok(f"{line} --out {svg}")
    text = svg.read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    ElementTree.fromstring(text)
    assert Path(base).exists()
