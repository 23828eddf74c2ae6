"""Special tokens on the command line: what generate reads, where it stops, which files are kept."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from special_folders import BOS, BYTES, EOS, TURN, VOCAB_SIZE, write_folder

from minilora import CausalLM, TransformerConfig, generate
from minilora.cli import main
from minilora.data.tokenizer import load_tokenizer
from minilora.display import printable

# pytest would turn a warning into an exception; on the command line it is a line on stderr.
pytestmark = pytest.mark.filterwarnings("default")

PROMPT = "the cat"
GENERATE = f"generate --base base --prompt '{PROMPT}' --temperature 0 --max-new-tokens 12"
CONFIG = TransformerConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.5,  # far from uniform, so that the text varies
)


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> tuple[str, str]:
    """(stdout, stderr) of a command that succeeds."""
    code, out, err = run(line)
    assert code == 0, err
    return out, err


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_base(**files: Any) -> CausalLM:
    """Write the folder `base`, with `files` as `write_folder` takes them; returns its model."""
    model = CausalLM(CONFIG, seed=2)
    model.save_pretrained("base")
    fields = json.loads(Path("base/config.json").read_text())
    write_folder(Path("base"), **{**files, "model": {**fields, **files.get("model", {})}})
    return model


def continued(model: CausalLM, before: list[int]) -> list[int]:
    """The likeliest 12 tokens after PROMPT in bytes, with ids before it."""
    tokenizer = load_tokenizer("base", VOCAB_SIZE)
    ids = np.array([[*before, *tokenizer.encode(PROMPT)]])
    return generate(model, ids, 12, temperature=0)[0, ids.shape[1] :].tolist()


def shown(ids: list[int]) -> str:
    tokenizer = load_tokenizer("base", VOCAB_SIZE)
    return printable(tokenizer.decode([*tokenizer.encode(PROMPT), *ids]), "\n\t") + "\n"


@pytest.mark.parametrize("processor", ["none", "bos", "bos and eos"])
def test_generate_continues_the_prompt_as_training_encodes_it(world, processor):
    model = write_base(processor=processor, settings={"eos_token": "</s>"})
    before = [] if processor == "none" else [BOS]
    new = continued(model, before)
    assert EOS not in new
    assert continued(model, [BOS]) != continued(model, [])
    out, err = ok(GENERATE)
    assert out == shown(new), "the BOS is not shown"
    assert err == ""


@pytest.mark.parametrize("file", ["model", "generation"])
def test_generate_stops_at_each_eos_and_does_not_show_it(world, file):
    new = continued(write_base(), [])
    first, last = new.index(new[5]), new.index(new[9])
    assert 0 < first < last
    settings = {"eos_token": "</s>"}
    for stop, place in ((new[5], first), ([new[9], new[5]], first), ([TURN, new[9]], last)):
        write_base(settings=settings, **{file: {"eos_token_id": stop}})
        assert ok(GENERATE) == (shown(new[:place]), "")
        assert ok(f"{GENERATE} --ignore-eos") == (shown(new), "")


CHAT_TEMPLATE = "{% for m in messages %}<x>{{ m.content }}</s>{% endfor %}"
CHAT_TEMPLATE += "{% if add_generation_prompt %}<x>{% endif %}"


def test_generate_chat_puts_the_prompt_into_the_template(world):
    pytest.importorskip("jinja2")
    settings = {"eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    model = write_base(processor="bos", settings=settings)
    tokenizer = load_tokenizer("base", VOCAB_SIZE)
    ids = tokenizer.encode(f"<x>{PROMPT}</s><x>")[None]
    new = generate(model, ids, 12, temperature=0, eos=EOS)[0, ids.shape[1] :].tolist()
    new = [id for id in new if id != EOS]
    out, err = ok(f"{GENERATE} --chat")
    assert out == printable(tokenizer.decode(new), "\n\t") + "\n"
    assert err == ""
    write_base(settings={"eos_token": "</s>"})
    code, _, err = run(f"{GENERATE} --chat")
    assert code == 3
    assert "chat template" in err


def test_generate_notes_that_no_token_ends_the_text(world):
    model = write_base()
    out, err = ok(GENERATE)
    assert out == shown(continued(model, []))
    assert "'base' names no token that ends a text" in err
    assert "--max-new-tokens" in err
    assert ok(f"{GENERATE} --ignore-eos") == (out, "")


def test_generate_and_evaluate_note_tokens_that_are_ignored(world):
    write_base(settings={"eos_token": "<nowhere>"}, generation={"eos_token_id": [EOS, 9999]})
    Path("book.txt").write_text("the cat sat on the mat. " * 9)
    for line in (GENERATE, "evaluate --base base --data book.txt --context 16"):
        _, err = ok(line)
        assert "eos_token '<nowhere>' is not a token of tokenizer.json" in err
        assert "eos_token_id [257, 9999] has ids outside" in err
        assert len(err.splitlines()) == 2


def test_generate_takes_an_empty_prompt_where_the_tokenizer_puts_a_bos(world):
    write_base(processor="bos", settings={"eos_token": "</s>"})
    code, _, _ = run("generate --base base --prompt '' --max-new-tokens 2")
    assert code == 0
    write_base(settings={"eos_token": "</s>"})
    code, _, err = run("generate --base base --prompt '' --max-new-tokens 2")
    assert code == 3
    assert "--prompt is empty" in err


def test_finetune_warns_of_records_without_an_end(world):
    write_base()
    records = [{"prompt": f"{i} is ", "completion": "a number"} for i in range(20)]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    line = "finetune --base base --data data.jsonl --steps 1 --batch-size 2 --context 32"
    _, err = ok(f"{line} --out one")
    assert "does not learn where the records" in err
    write_base(generation={"eos_token_id": EOS})
    _, err = ok(f"{line} --out two")
    assert "does not learn" not in err


def test_generate_stops_where_a_tuned_model_has_learned_to(world):
    """A model that is trained on one record stops after it, and without its BOS would not."""
    write_base(processor="bos", generation={"eos_token_id": [TURN, EOS]})
    record = json.dumps({"prompt": PROMPT, "completion": " sat on the mat"}) + "\n"
    Path("data.jsonl").write_text(record * 10)
    line = "finetune --base base --data data.jsonl --out tuned --method full --context 32"
    ok(f"{line} --steps 120 --batch-size 2 --lr 0.01 --warmup 5")
    out, err = ok(GENERATE.replace("base base", "base tuned").replace(" 12", " 40"))
    assert out == f"{PROMPT} sat on the mat\n"
    assert err == ""


def test_finetune_full_and_merge_and_convert_keep_the_files_beside_the_weights(world):
    write_base(
        settings={"eos_token": "</s>", "chat_template": "x"},
        tokens_map={"eos_token": "</s>"},
        generation={"eos_token_id": [TURN, EOS], "temperature": 0.5},
    )
    Path("base/added_tokens.json").write_text('{"<s>": 256}')
    Path("base/chat_template.jinja").write_text("{{ bos_token }}")
    Path("book.txt").write_text("the cat sat on the mat. " * 20)
    tuning = "finetune --base base --data book.txt --steps 1 --batch-size 2 --context 16"
    ok(f"{tuning} --method full --out full")
    ok(f"{tuning} --out adapter")
    ok("merge --base base --adapter adapter --out merged")
    ok("convert base --dtype bfloat16 --out converted")
    names = [file.name for file in Path("base").iterdir()]
    copied = set(names) - {"config.json", "model.safetensors"}
    assert len(copied) == 6
    for folder in ("full", "merged", "converted"):
        for name in copied:
            assert Path(folder, name).read_bytes() == Path("base", name).read_bytes(), name
        special = load_tokenizer(folder, VOCAB_SIZE).special
        assert special == load_tokenizer("base", VOCAB_SIZE).special


def test_generate_from_bytes_is_as_it_was(world):
    """Neither a BOS nor a stop, whatever config.json says: a text may have any byte."""
    CausalLM(CONFIG, seed=2).save_pretrained("base")
    fields = json.loads(Path("base/config.json").read_text())
    whole, err = ok(GENERATE)
    assert "no tokenizer.json" in err
    Path("base/config.json").write_text(json.dumps({**fields, "eos_token_id": list(range(BYTES))}))
    assert ok(GENERATE) == (whole, err)


def test_commands_name_the_file_of_a_text_that_the_tokenizer_cannot_read(world):
    write_base(settings={"eos_token": "</s>"})
    Path("latin.txt").write_bytes(b"caf\xe9 au lait " * 20)
    Path("one.txt").write_text("a")
    Path("good.txt").write_text("the cat sat on the mat. " * 20)
    Path("empty.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 4)
    tuning = "finetune --base base --out out --steps 1 --batch-size 2 --context 16"
    utf8 = (
        "'latin.txt': the text is not UTF-8 at byte 3; this model's tokenizer needs that: convert"
    )
    bare = "records have nothing to learn but where they end"
    for line, message in (
        (f"{tuning} --data latin.txt", utf8),
        (f"{tuning} --data good.txt --eval-data latin.txt", utf8),
        ("evaluate --base base --context 16 --data latin.txt", utf8),
        (f"{tuning} --data empty.jsonl", f"--data empty.jsonl: 1 {bare}"),
        ("evaluate --base base --context 16 --data one.txt", "--data one.txt: needs at least 2"),
        ("evaluate --base base --context 16 --data empty.jsonl", f"'empty.jsonl': 4 {bare}"),
    ):
        code, _, err = run(line)
        assert code == 3
        assert message in err
