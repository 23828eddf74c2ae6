"""A chat model from training to transformers: the same ids, the same greedy text, the same stop."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import SPECIAL, TEMPLATES, write_tokenizer
from peers import torch, transformers
from special_folders import END, write_folder
from special_folders import VOCAB_SIZE as FOLDER_SIZE

from minilora.cli import main
from minilora.data.records import read_records
from minilora.data.tokenizer import load_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
VOCAB_SIZE = 384
QUESTION = "who sat"
ANSWER = "the cat and the rat"
TALK = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
STOPS = [SPECIAL.index(token) for token in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")]


def write_base(folder: Path, template: str) -> Path:
    """A chat model's folder: a BOS from the post-processor, and five ids that end a text.

    The tokenizer's own, `</s>`, is among those of generation_config.json, as in folders in use.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [SPECIAL.index("</s>"), *STOPS]
    model.save_pretrained(folder)
    write_tokenizer(folder, TEMPLATES[template])
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(fields))
    return folder


def ok(*words: object) -> str:
    """stdout of a command line that succeeds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    assert code == 0, err.getvalue()
    return out.getvalue()


def ids_of(theirs: Any, messages: Any, prompt: bool) -> list[int]:
    options = {"add_generation_prompt": prompt, "return_dict": True}
    return list(theirs.apply_chat_template(messages, **options)["input_ids"])


@pytest.mark.parametrize("template", ["llama2", "chatml", "zephyr", "mistral", "phi", "gemma"])
def test_generate_after_finetune_and_merge_is_that_of_transformers(
    tmp_path: Path, template: str
) -> None:
    base = write_base(tmp_path / "base", template)
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"messages": TALK}) + "\n") * 10)
    theirs = transformers.AutoTokenizer.from_pretrained(base)

    # Training reads what transformers' template writes.
    records = read_records(data, load_tokenizer(base, VOCAB_SIZE), 127)
    assert records[0].ids.tolist() == ids_of(theirs, TALK, prompt=False)

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    tuning = ["finetune", "--base", base, "--data", data, "--out", adapter, "--threads", 1]
    tuning += ["--steps", 80, "--batch-size", 2, "--context", 127, "--warmup", 5, "--lr", 0.02]
    ok(*tuning, "--r", 8, "--target-modules", "all-linear", "--modules-to-save", "lm_head")
    ok("merge", "--base", base, "--adapter", adapter, "--out", merged)
    settings = ["--temperature", 0, "--max-new-tokens", 40]
    use = ["generate", "--base", base, "--adapter", adapter, *settings]
    answer = ok(*use, "--prompt", QUESTION, "--chat")
    assert answer.strip() == ANSWER
    assert ok("generate", "--base", merged, *settings, "--prompt", QUESTION, "--chat") == answer

    # transformers continues the same ids, and stops at the same one.
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    prompt = ids_of(theirs, TALK[:1], prompt=True)
    options = {"do_sample": False, "max_new_tokens": 40}
    new = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert len(new) < 40
    assert new[-1] in load_tokenizer(merged, VOCAB_SIZE).special.eos
    assert theirs.decode(new[:-1]) + "\n" == answer

    # The text of the template is a prompt too, whose BOS is not put twice.
    text = theirs.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    if text.startswith("<s>"):
        assert load_tokenizer(merged, VOCAB_SIZE).encode_prompt(text).tolist() == prompt
        assert ok(*use, "--prompt", text) == text + answer


def test_generate_of_a_tuned_gpt2_stops_where_transformers_does(tmp_path: Path) -> None:
    """A folder as GPT-2's on the hub: no file but config.json names the end of a text."""
    base, full = tmp_path / "base", tmp_path / "full"
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": END, "eos_token_id": END}
    config = transformers.GPT2Config(vocab_size=FOLDER_SIZE, **sizes, **ends)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    (base / "generation_config.json").unlink()
    fields = json.loads((base / "config.json").read_text())
    write_folder(base, model=fields, settings={"model_max_length": 1024})
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"prompt": QUESTION, "completion": f"? {ANSWER}"}) + "\n") * 10)
    tuning = ["finetune", "--base", base, "--data", data, "--out", full, "--method", "full"]
    tuning += ["--steps", 150, "--batch-size", 2, "--context", 63, "--warmup", 5, "--lr", 0.01]
    ok(*tuning, "--threads", 1)
    settings = ["--temperature", 0, "--max-new-tokens", 40]
    text = ok("generate", "--base", full, "--prompt", QUESTION, *settings)
    assert text == f"{QUESTION}? {ANSWER}\n"

    theirs = transformers.AutoTokenizer.from_pretrained(full)
    model = transformers.AutoModelForCausalLM.from_pretrained(full)
    prompt = theirs(QUESTION, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0].tolist()
    assert ids[-1] == END
    assert theirs.decode(ids[:-1]) + "\n" == text
