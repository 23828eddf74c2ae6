"""Folders that name special tokens in many ways, for the tests of `minilora.data.special`.

Not a test itself.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

BYTES = 256
TOKENS = ["<s>", "</s>", "<|endoftext|>", "<|im_end|>", "<pad>", "<x>"]  # ids 256 to 261
IDS = {token: BYTES + i for i, token in enumerate(TOKENS)}
BOS, EOS, END, TURN, PAD, OWN = IDS.values()
SIZE = BYTES + len(TOKENS)  # of the tokenizer
VOCAB_SIZE = SIZE + 2  # of the model: a few rows of its embedding have no token

# Post-processors of tokenizer.json, by a name.
LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(*single: str) -> dict[str, Any]:
    """A TemplateProcessing with these tokens; "$A" is the text."""
    pieces: list[object] = []
    for token in single:
        name, id = ("Sequence", "A") if token == "$A" else ("SpecialToken", token)
        pieces.append({name: {"id": id, "type_id": 0}})
    tokens = {
        token: {"id": token, "ids": [IDS[token]], "tokens": [token]}
        for token in single
        if token != "$A"
    }
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": tokens
    }  # fmt: skip


PROCESSORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ByteLevel": LEVEL,
    "bos": template("<s>", "$A"),
    "bos and eos": template("<s>", "$A", "</s>"),
    "two before": template("<s>", "<x>", "$A"),
    "a sequence": {"type": "Sequence", "processors": [LEVEL, template("<s>", "$A", "</s>")]},
    "a sequence the other way": {
        "type": "Sequence", "processors": [template("<s>", "<x>", "$A", "</s>"), LEVEL]
    },
    "Bert": {"type": "BertProcessing", "sep": ["</s>", EOS], "cls": ["<s>", BOS]},
    "Roberta": {
        "type": "RobertaProcessing", "sep": ["</s>", EOS], "cls": ["<s>", BOS],
        "trim_offsets": False, "add_prefix_space": False,
    },
}  # fmt: skip


def write_folder(folder: Path, **files: Any) -> Path:
    """Write a model's folder without weights: bytes, and TOKENS after them.

    processor     a name in PROCESSORS (default: none)
    added         the tokens that tokenizer.json lists as added (default: all)
    tokens        all tokens beside the bytes (default: TOKENS)
    padding       pad_token of tokenizer.json's padding
    model, settings, tokens_map, generation
                  fields of config.json, tokenizer_config.json, special_tokens_map.json and
                  generation_config.json; the latter three are left out if they are None
    """
    tokenizers = pytest.importorskip("tokenizers")
    tokens = files.get("tokens", TOKENS)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    vocabulary |= {token: IDS[token] for token in tokens}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([token for token in files.get("added", TOKENS) if token in tokens])
    if files.get("padding"):
        made.enable_padding(pad_token=files["padding"], pad_id=IDS[files["padding"]])
    fields = json.loads(made.to_str())
    fields["post_processor"] = PROCESSORS[files.get("processor", "none")]
    model = {"model_type": "llama", "vocab_size": VOCAB_SIZE, **files.get("model", {})}
    written = {
        "tokenizer.json": fields,
        "config.json": model,
        "tokenizer_config.json": files.get("settings"),
        "special_tokens_map.json": files.get("tokens_map"),
        "generation_config.json": files.get("generation"),
    }
    folder.mkdir(exist_ok=True)
    for name, value in written.items():
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def random_files(seed: int) -> dict[str, Any]:
    """The arguments of `write_folder` for one of many folders."""
    pick = random.Random(seed).choice
    weighted = random.Random(-1 - seed).random

    def token(text: str) -> Any:
        added = {"content": text, "lstrip": False, "normalized": False, "special": True}
        added |= {"rstrip": False, "single_word": False}
        return pick([text, {"__type": "AddedToken", **added}, None])

    def some_tokens() -> dict[str, Any]:
        named = {}
        for name in ("bos", "eos", "pad", "unk", "cls"):
            if weighted() < 0.4:
                named[f"{name}_token"] = token(pick([*TOKENS, "<nowhere>"]))
        return named

    def some_ids() -> dict[str, Any]:
        ids: dict[str, Any] = {}
        if weighted() < 0.7:
            ids["eos_token_id"] = pick([TURN, [EOS, END], [], None, [5], BYTES + 40])
        for name in ("bos", "pad"):
            if weighted() < 0.5:
                ids[f"{name}_token_id"] = pick([BOS, PAD, None, 7])
        return ids

    added = pick([TOKENS, TOKENS[:2], []])
    settings = some_tokens()
    if weighted() < 0.6:
        settings["tokenizer_class"] = pick(
            [
                "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer",
                "LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend", "Nowhere",
            ]
        )  # fmt: skip
    if weighted() < 0.3:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        settings["added_tokens_decoder"] = {
            str(IDS[text]): {"content": text, "special": True, **flags} for text in added
        }
    if weighted() < 0.3:
        settings |= {"add_bos_token": pick([True, False]), "add_eos_token": pick([True, False])}
    if weighted() < 0.2:
        settings["image_token"] = "<x>"
    kind = pick(["llama", "mistral", "qwen2", "qwen3", "gpt2"])
    tokens_map = {}
    for name, value in some_tokens().items():
        if isinstance(value, dict):
            del value["__type"]
        tokens_map[name] = value
    if weighted() < 0.3:
        settings[pick(["additional_special_tokens", "extra_special_tokens"])] = pick(
            [["<x>", "<pad>"], []]
        )
    if weighted() < 0.2:
        tokens_map["additional_special_tokens"] = ["<|im_end|>"]
    return {
        "processor": pick(list(PROCESSORS)),
        "added": added,
        "padding": pick([None, None, "<pad>"]),
        "model": {"model_type": kind, **some_ids()},
        "settings": pick([settings, settings, settings, None]),
        "tokens_map": pick([tokens_map, None]),
        "generation": pick([some_ids(), None]),
    }
