"""generate --prompts: a text for each line of a file, as --prompt would give it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_lines import ok, run
from special_folders import EOS, VOCAB_SIZE, write_folder

from minilora import CausalLM, TransformerConfig, generate
from minilora.data.tokenizer import load_tokenizer
from minilora.display import printable

# pytest would turn a warning into an exception; on the command line it is a line on stderr.
pytestmark = pytest.mark.filterwarnings("default")

GENERATE = "generate --base base --max-new-tokens 9"
CONFIG = TransformerConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.5,  # far from uniform, so that the text varies
)
PROMPTS = ["the cat", "é", "a longer line of text", "the dog", "\ttab", "the cat"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The model of the folder `base`, which is beside the file prompts.txt."""
    monkeypatch.chdir(tmp_path)
    model = CausalLM(CONFIG, seed=2)
    model.save_pretrained("base")
    write_folder(Path("base"), model=json.loads(Path("base/config.json").read_text()))
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return model


def text_of(model: CausalLM, prompt: str, row: int, seed: int) -> str:
    """What `generate` writes after one prompt, up to its end."""
    tokenizer = load_tokenizer("base", VOCAB_SIZE)
    ids = tokenizer.encode_prompt(prompt)[None]
    options = {"temperature": 0.8, "seed": seed, "eos": EOS, "rows": [row]}
    new = generate(model, ids, 9, **options)[0, ids.shape[1] :].tolist()
    new = new[: new.index(EOS)] if EOS in new else new
    return tokenizer.decode([*tokenizer.encode(prompt), *new])


@pytest.mark.parametrize("size", ["", "--batch-size 1", "--batch-size 4", "--batch-size 99"])
def test_generate_prompts_prints_a_line_for_each_in_order(size, model):
    out = ok(f"{GENERATE} --prompts prompts.txt --seed 3 {size}")
    texts = [text_of(model, prompt, row, 3) for row, prompt in enumerate(PROMPTS)]
    assert out == "".join(printable(text, "\t") + "\n" for text in texts)
    assert texts[0] != texts[-1]  # equal prompts have random numbers of their own
    assert ok(f"{GENERATE} --prompt 'the cat' --seed 3") == printable(texts[0], "\n\t") + "\n"


def test_generate_prompts_stops_each_text_at_its_own_end(model):
    tokenizer = load_tokenizer("base", VOCAB_SIZE)
    line = f"{GENERATE} --prompts prompts.txt --temperature 0"
    whole = ok(f"{line} --ignore-eos").splitlines()
    ids = tokenizer.encode_prompt(PROMPTS[0])[None]
    new = generate(model, ids, 9, temperature=0)[0, ids.shape[1] :].tolist()
    stop = new[4]
    write_folder(
        Path("base"),
        model=json.loads(Path("base/config.json").read_text()),
        generation={"eos_token_id": stop},
    )
    ended = ok(line).splitlines()
    new = new[: new.index(stop)]
    assert ended[0] == printable(tokenizer.decode([*tokenizer.encode(PROMPTS[0]), *new]), "\t")
    assert ended != whole
    assert ok(f"{line} --ignore-eos").splitlines() == whole


def test_generate_prompts_of_json_lines_prints_json_lines(model):
    records = [{"prompt": "two\nlines"}, {"prompt": "the cat", "more": 1}]
    Path("prompts.jsonl").write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8")
    printed = [json.loads(line) for line in ok(f"{GENERATE} --prompts prompts.jsonl").splitlines()]
    for row, (record, result) in enumerate(zip(records, printed, strict=True)):
        assert list(result) == ["prompt", "completion"]
        assert result["prompt"] == record["prompt"]
        assert result["prompt"] + result["completion"] == text_of(model, record["prompt"], row, 0)


def test_generate_prompts_takes_ends_of_lines_of_every_system(model):
    expected = ok(f"{GENERATE} --prompts prompts.txt")
    text = "\ufeff" + "\r\n".join(PROMPTS)
    Path("prompts.txt").write_bytes(text.encode())
    assert ok(f"{GENERATE} --prompts prompts.txt") == expected
    assert ok(f"{GENERATE} --prompts prompts.txt --max-new-tokens 0").splitlines() == PROMPTS


def test_generate_prompts_puts_each_line_into_the_template(model):
    write_folder(
        Path("base"),
        model=json.loads(Path("base/config.json").read_text()),
        settings={"chat_template": "{{ messages[0].content }}!"},
    )
    printed = ok(f"{GENERATE} --prompts prompts.txt --chat --temperature 0").splitlines()
    for prompt, line in zip(PROMPTS, printed, strict=True):
        Path("one.jsonl").write_text(json.dumps({"prompt": prompt}))
        alone = ok(f"{GENERATE} --prompts one.jsonl --chat --temperature 0")
        assert printable(json.loads(alone)["completion"], "\t") == line
        assert not line.startswith(prompt)


BAD = {
    "": "'it' is empty: give a text to continue in each line",
    "x\n\ny": "'it' line 2 is empty: give the model at least one token",
    "\n": "'it' line 1 is empty: give the model at least one token",
    "fine\nx\udcff": "'it' line 2 is not UTF-8 at byte 2: convert the file to UTF-8",
    "fine\n" + "x" * 33: "'it' line 2 has 33 tokens, but the model has max_position_",
}
BAD_JSON = {
    "\n\n": "'it.jsonl' has no prompt: give at least one line",
    '{"prompt": "x"}\n\n{}': "'it.jsonl' line 3: expected {\"prompt\": a text}, got no prompt",
    '{"prompt": ["x"]}': "'it.jsonl' line 1: expected {\"prompt\": a text}, got ['x']",
    '{"prompt": ""}': "'it.jsonl' line 1 is empty",
    '{"prompt": "\\ud800"}': "'it.jsonl' line 1: not valid JSON",
    '["x"]': "'it.jsonl' line 1",
    "x": "'it.jsonl' line 1: not valid JSON",
}


@pytest.mark.parametrize("text", [*BAD, *BAD_JSON])
def test_generate_prompts_refuses_a_file_and_names_the_line(text, model):
    """Before a text is printed: a mistake in the last line is found first."""
    name = "it" if text in BAD else "it.jsonl"
    Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
    CausalLM(CONFIG, seed=2).save_pretrained("plain")
    load_tokenizer(".", 259).save("plain")  # bytes, without a BOS
    code, out, err = run(f"generate --base plain --prompts {name} --max-new-tokens 3")
    assert code == 3
    assert out == ""
    (line,) = err.splitlines()
    assert (BAD | BAD_JSON)[text] in line
