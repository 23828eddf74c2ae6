"""Everything that PEFT writes, on every type of model: it goes there and comes back, and trains to the same numbers.

The bases are drawn by test_bases_oracle.py; here it is what stands on them: embeddings, heads, tied or not, trainable
tokens, copies, biases, and a training of twenty steps beside transformers and peft.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bases_oracle import BIASES, GPT2, IDS, LLAMA, V, bases, close, keys, randomise, theirs

from minilora import CausalLM, LoraConfig, PeftModel, get_peft_model
from minilora import functional as F
from minilora.architecture import MODEL_TYPES
from minilora.autograd import gradients
from minilora.formats import load_file
from minilora.optim import AdamW

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

transformers.utils.logging.disable_progress_bar()
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@st.composite
def adapters(draw: st.DrawFn, kind: str, tied: bool) -> dict[str, Any]:
    """The fields of an adapter_config.json: something at one end of the model at least."""
    gpt2 = kind == "gpt2"
    embedding, layers = ("wte", GPT2) if gpt2 else ("embed_tokens", LLAMA)
    names = draw(st.lists(st.sampled_from(layers), min_size=0, max_size=3, unique=True))
    ends = [embedding, "lm_head", *(["wpe"] if gpt2 else [])]
    targets = draw(st.lists(st.sampled_from(ends), max_size=3, unique=True))
    free = [name for name in ends if name not in targets]
    saved = draw(st.sampled_from([None, *([name] for name in free), ["ln_f" if gpt2 else "model.norm"]]))
    bias = draw(st.sampled_from(BIASES))
    tokens: Any = None
    taken = {*targets, *(saved or [])}
    if embedding not in taken and not (tied and "lm_head" in taken) and draw(st.booleans()):
        rows = st.lists(st.integers(0, V - 1), min_size=1, max_size=4, unique=True)
        tokens = draw(rows)
        form = draw(st.sampled_from(["list", "name", "both"]))
        if form == "name" or (form == "both" and "lm_head" in taken):
            tokens = {embedding: tokens}
        elif form == "both":
            tokens = {embedding: tokens, "lm_head": draw(st.sampled_from([tokens, draw(rows)]))}
    if not (targets or names):
        names = layers[:1]
    form = draw(st.sampled_from(["list", "pattern"]))
    patterns = sorted(draw(st.sets(st.sampled_from([*targets, *names]))))
    return {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.integers(1, 16)),
        "target_modules": [*targets, *names] if form == "list" else rf"(.*\.)?({'|'.join([*targets, *names])})",
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "bias": bias,
        "rank_pattern": {key: draw(st.integers(1, 4)) for key in patterns},
        "alpha_pattern": {key: draw(st.integers(1, 16)) for key in patterns},
        "modules_to_save": saved,
        "trainable_token_indices": tokens,
        "task_type": "CAUSAL_LM",
    }


def beside(folder: Path, base: Path, model: Any, options: dict[str, Any], untied: bool = True) -> None:
    """One adapter: theirs comes here and is saved again, ours goes there; merged it is what it was."""
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise((p for p in made.parameters() if p.requires_grad), seed=2)
    made.save_pretrained(folder / "their adapter")
    loaded = PeftModel.from_pretrained(CausalLM.from_pretrained(base), folder / "their adapter")
    assert close(loaded(IDS).data, theirs(made))
    loaded.save_pretrained(folder / "saved again")
    files = [load_file(folder / n / "adapter_model.safetensors") for n in ("saved again", "their adapter")]
    assert {k: a.tobytes() for k, a in files[0].items()} == {k: a.tobytes() for k, a in files[1].items()}
    configs = [json.loads((folder / n / "adapter_config.json").read_text()) for n in ("saved again", "their adapter")]
    for config in configs:
        for field in ("target_modules", "modules_to_save"):
            if isinstance(config[field], list):
                config[field] = sorted(config[field])  # a set there
    assert configs[0] == configs[1]

    mine = get_peft_model(CausalLM.from_pretrained(base), LoraConfig(**options)).eval()
    randomise((p for p in mine.parameters() if p.requires_grad), seed=3)
    mine.save_pretrained(folder / "our adapter")
    ours, other = (keys(folder / name / "adapter_model.safetensors") for name in ("our adapter", "their adapter"))
    assert ours == other
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "our adapter").eval()
    assert close(mine(IDS).data, theirs(again))
    before = mine(IDS).data
    merged = mine.merge_and_unload(tied="untie")
    assert close(merged(IDS).data, before, 2e-5)
    merged.save_pretrained(folder / "merged")
    assert close(merged(IDS).data, theirs(transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")))


def written(folder: Path, kind: str, fields: dict[str, Any]) -> Any:
    """A base of theirs in a folder, and their model of it."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields)).eval()
    randomise(model.parameters())
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@settings(max_examples=40)
@given(st.data())
def test_an_adapter_of_any_kind_goes_there_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    kind, fields = data.draw(bases())
    model = written(folder / "base", kind, fields)
    beside(folder, folder / "base", model, data.draw(adapters(kind, fields["tie_word_embeddings"])))
