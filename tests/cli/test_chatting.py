"""generate --chat as a conversation, --system, --stop, and an adapter's own tokenizer."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from special_folders import VOCAB_SIZE, write_folder
from test_prompts import CONFIG, run

from minilora import CausalLM, LoraConfig, get_peft_model

pytest.importorskip("jinja2")
pytestmark = pytest.mark.filterwarnings("default")

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}a{% endif %}"
CHAT = "generate --base base --max-new-tokens 3 --temperature 0 --chat --ignore-eos"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a base that has a chat template, and an adapter without one."""
    monkeypatch.chdir(tmp_path)
    model = CausalLM(CONFIG, seed=2)
    model.save_pretrained("base")
    model_fields = json.loads(Path("base/config.json").read_text())
    write_folder(Path("base"), model=model_fields, settings={"chat_template": TEMPLATE})
    get_peft_model(model, LoraConfig(r=2)).save_pretrained("adapter")


@pytest.fixture
def say(monkeypatch):
    """A function that runs a command with bytes on standard input."""

    def say(line: str, given: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        return run(line)

    return say


def answer(say, text: str) -> str:
    """What one question, written as the template writes it, is answered."""
    code, out, err = run(f"{CHAT.replace(' --chat', '')} --prompt '{text}'")
    assert code == 0, err
    return out.removesuffix("\n")[len(text) :]


def test_generate_chat_keeps_the_conversation(world, say):
    code, out, err = say(CHAT, b"hi\r\n\n  \nyes\n")
    first = answer(say, "uhi;a")
    second = answer(say, f"uhi;a{first};uyes;a")
    assert (code, out, err) == (0, f"{first}\n{second}\n", "")
    assert say(CHAT, "\ufeffhi".encode())[:2] == (0, f"{first}\n")


def test_generate_chat_leaves_out_the_oldest_turns_where_the_context_is_full(world, say):
    code, out, err = say(CHAT, b"0123456789\n0123456789abcdef\n")
    assert code == 0
    assert "the 1 oldest questions and answers are left out" in err
    assert out.splitlines()[1] == say(CHAT, b"0123456789abcdef\n")[1].rstrip("\n")
    code, _, err = say(CHAT, b"x" * 40)
    assert code == 3
    assert "the message has 43 tokens, but the model has max_position_embeddings = 32" in err


def test_generate_system_comes_before_each_conversation(world, say):
    expected = answer(say, "sno;uhi;a")
    assert say(f"{CHAT} --system no", b"hi\n")[1] == f"{expected}\n"
    assert run(f"{CHAT} --system no --prompt hi")[1] == f"{expected}\n"
    Path("base/chat_template.jinja").write_text("{{ messages[-1].content }}")
    code, _, err = run(f"{CHAT} --system no --prompt hi")
    assert code == 3
    assert "leaves out the system's message: do not give --system" in err


BAD = {
    b"": "standard input is empty: --chat reads a message from each line",
    b"\n \n": "standard input is empty",
    b"hi\nx\xff\n": "standard input line 2 is not UTF-8 at byte 2: convert",
    b"x" * (1 << 20) + b"y": "standard input line 1 has more than 1,048,576 bytes",
}


@pytest.mark.parametrize("given", BAD)
def test_generate_chat_refuses_what_is_no_message(given, world, say):
    code, _, err = say(CHAT, given)
    assert code == 3
    assert BAD[given] in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(None, 0), (15, 143)])
def test_generate_chat_ends_well_at_ctrl_c(number, code, world, monkeypatch):
    class Interrupting(io.BytesIO):
        def readline(self, size=-1):
            raise KeyboardInterrupt(*[number] * (number is not None))

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Interrupting()))
    assert run(CHAT)[0] == code


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("generate --base base --prompt x --stop ''", 2, "--stop must be a text"),
        ("generate --base base --prompt x --system y", 2, "--system is for a chat template"),
        ("generate --base base", 2, "--chat for a conversation"),
        ("generate --base base --chat --batch-size 2", 2, "--batch-size is for several prompts"),
    ],
)
def test_generate_refuses_options_that_do_not_fit(line, code, message, world):
    assert run(line)[0] == code
    assert message in run(line)[2]


def test_generate_stop_ends_texts_streams_and_files_alike(world):
    line = "generate --base base --max-new-tokens 9 --temperature 0 --ignore-eos"
    Path("it.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a"}\n')
    records = run(f"{line} --prompts it.jsonl")[1].splitlines()
    texts = [json.loads(record)["completion"] for record in records]
    stop = next(texts[0][i : i + 2] for i in range(2, 8) if texts[0][i : i + 2].isalnum())
    stopped = run(f"{line} --prompts it.jsonl --stop unlikely --stop {stop}")[1].splitlines()
    expected = [text.partition(stop)[0] for text in texts]
    assert [json.loads(record)["completion"] for record in stopped] == expected
    assert expected[0] != texts[0]
    whole = run(f"{line} --prompt 'the cat'")[1]
    assert run(f"{line} --prompt 'the cat' --stop {stop}")[1] == whole.partition(stop)[0] + "\n"


@pytest.mark.parametrize("kind", ["tokenizer", "template"])
def test_commands_use_the_tokenizer_and_the_template_of_the_adapter(kind, world, say):
    template = "{{ messages[-1].content }}!"
    if kind == "tokenizer":
        write_folder(Path("adapter"), processor="bos", settings={"chat_template": template})
        Path("adapter/config.json").unlink(missing_ok=True)
    else:
        Path("adapter/chat_template.jinja").write_text(template)
    chat = f"{CHAT} --adapter adapter --prompt hi"
    code, out, err = run(chat)
    assert code == 0
    assert "--adapter 'adapter' has a tokenizer or a chat template: it is used" in err
    assert out.rstrip("\n") == answer(say, "hi!")
    Path("book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options = "--data book.txt --steps 1 --context 8 --batch-size 2 --out on"
    code, _, err = run(f"finetune --base base --adapter adapter {options}")
    assert code == 0, err
    assert "it is used" in err
    assert Path("on/chat_template.jinja").exists() or Path("on/tokenizer.json").exists()
    assert run(chat.replace("--adapter adapter", "--adapter on"))[0] == 0
    assert "it is used" in run("evaluate --base base --adapter on --data book.txt --context 8")[2]
    assert CONFIG.vocab_size == VOCAB_SIZE
    shutil.rmtree("on")
