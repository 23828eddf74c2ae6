"""Everything that PEFT writes, on every type of model: it goes there and comes back, and trains to the same numbers.

test_bases_oracle.py draws the bases; here what stands on them is drawn: embeddings, heads, tied or not, trainable
tokens, copies, biases. And a training of twenty steps goes beside transformers and peft.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import close, in_double, peft, torch, transformers
from test_bases_oracle import BIASES, GPT2, IDS, LLAMA, V, keys, randomise, theirs

from minilora import CausalLM, LoraConfig, PeftModel, get_peft_model
from minilora import functional as F
from minilora.autograd import gradients
from minilora.formats import load_file
from minilora.models.config import MODEL_TYPES
from minilora.optim import AdamW

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
    saved = draw(
        st.sampled_from([None, *([name] for name in free), ["ln_f" if gpt2 else "model.norm"]])
    )
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
        "target_modules": [*targets, *names]
        if form == "list"
        else rf"(.*\.)?({'|'.join([*targets, *names])})",
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


def beside(
    folder: Path, base: Path, model: Any, options: dict[str, Any], untied: bool = True
) -> None:
    """One adapter: theirs comes here and is saved again, ours goes there; merged it is what it was."""
    made = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**copy.deepcopy(options))
    ).eval()
    randomise((p for p in made.parameters() if p.requires_grad), seed=2)
    made.save_pretrained(folder / "their adapter")
    loaded = PeftModel.from_pretrained(CausalLM.from_pretrained(base), folder / "their adapter")
    assert close(loaded(IDS).data, theirs(made))
    loaded.save_pretrained(folder / "saved again")
    files = [
        load_file(folder / n / "adapter_model.safetensors")
        for n in ("saved again", "their adapter")
    ]
    assert {k: a.tobytes() for k, a in files[0].items()} == {
        k: a.tobytes() for k, a in files[1].items()
    }
    assert fields(folder / "saved again") == fields(folder / "their adapter")

    mine = get_peft_model(CausalLM.from_pretrained(base), LoraConfig(**options)).eval()
    randomise((p for p in mine.parameters() if p.requires_grad), seed=3)
    mine.save_pretrained(folder / "our adapter")
    ours, other = (
        keys(folder / name / "adapter_model.safetensors")
        for name in ("our adapter", "their adapter")
    )
    assert ours == other
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "our adapter").eval()
    assert close(mine(IDS).data, theirs(again))
    before = mine(IDS).data
    merged = mine.merge_and_unload(tied="untie")
    assert close(merged(IDS).data, before, 2e-5)
    merged.save_pretrained(folder / "merged")
    assert close(
        merged(IDS).data,
        theirs(transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")),
    )


def fields(folder: Path, *unknown: None) -> dict[str, Any]:
    """An adapter_config.json, and in it the order of names as PEFT has it: none. Of a new one the base is `unknown`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "modules_to_save"):
        if isinstance(config[name], list):
            config[name] = sorted(config[name])
    return config | ({"base_model_name_or_path": None} if unknown else {})


def written(folder: Path, kind: str, fields: dict[str, Any]) -> Any:
    """A base of theirs in a folder, and their model of it."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **fields)
    ).eval()
    randomise(model.parameters())
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[Path, Any]]:
    """A base of each type, tied and not: its folder, and their model of it."""
    folders = {
        (kind, tied): tmp_path_factory.mktemp("base")
        for kind in MODEL_TYPES
        for tied in (False, True)
    }
    return {
        (kind, tied): (path, written(path, kind, small(kind, tied)))
        for (kind, tied), path in folders.items()
    }


@settings(max_examples=40)
@given(st.data())
def test_an_adapter_of_any_kind_goes_there_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    models: dict[tuple[str, bool], tuple[Path, Any]],
    data: st.DataObject,
) -> None:
    kind, tied = data.draw(st.sampled_from(MODEL_TYPES)), data.draw(st.booleans())
    beside(
        tmp_path_factory.mktemp("adapters"), *models[kind, tied], data.draw(adapters(kind, tied))
    )


# ---- a head that goes by its embedding ----

TIED = {  # and the keys of its file that are at the ends of the model, without PEFT's prefix
    "named": ({"target_modules": ["END", "LAYER"]}, "base factors"),
    "the head alone": ({"target_modules": ["lm_head"]}, "factors"),
    "both": ({"target_modules": ["END", "lm_head", "LAYER"], "use_rslora": True}, "base factors"),
    "a pattern": ({"target_modules": r".*(lm_head|END)"}, "base factors"),
    "saved": ({"target_modules": ["LAYER"], "modules_to_save": ["END", "lm_head"]}, "copies"),
    "saved by the head": ({"target_modules": ["LAYER"], "modules_to_save": ["lm_head"]}, "copies"),
    "tokens": ({"target_modules": ["LAYER"], "trainable_token_indices": [1, 5]}, "rows"),
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_head_goes_by_its_embedding_as_peft_s_does(
    models: dict[tuple[str, bool], tuple[Path, Any]], kind: str, name: str, tmp_path: Path
) -> None:
    gpt2 = kind == "gpt2"
    end, layer, path = (
        ("wte", "c_attn", "transformer.wte")
        if gpt2
        else ("embed_tokens", "q_proj", "model.embed_tokens")
    )
    options, expected = copy.deepcopy(TIED[name])
    for field, value in options.items():
        words = value if isinstance(value, list) else [value]
        words = [
            w.replace("END", end).replace("LAYER", layer) if isinstance(w, str) else w
            for w in words
        ]
        options[field] = words if isinstance(value, list) else words[0]
    options |= {"ensure_weight_tying": True, "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"}
    if gpt2 and name == "named":
        options["target_modules"] = [
            "lm_head",
            layer,
        ]  # PEFT knows an embedding only by another name
        expected = "factors"
    base, model = models[kind, True]
    made = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**copy.deepcopy(options))
    ).eval()
    own = {n: p for n, p in made.named_parameters() if p.requires_grad}
    randomise(
        p for n, p in own.items() if not n.startswith("base_model.model.lm_head")
    )  # which are over its storage
    made.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(CausalLM.from_pretrained(base), tmp_path / "theirs")
    assert close(loaded(IDS).data, theirs(made))
    mine = get_peft_model(CausalLM.from_pretrained(base), LoraConfig(**options)).eval()
    randomise((p for p in mine.parameters() if p.requires_grad), seed=3)
    mine.save_pretrained(tmp_path / "ours")
    there, here = (keys(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    if gpt2 and "base" in expected and isinstance(options["target_modules"], list):
        expected = "factors"
    factors = {
        "lm_head.lora_A.weight",
        "lm_head.lora_B.weight",
        f"{path}.lora_embedding_A",
        f"{path}.lora_embedding_B",
    }
    ends = {
        "factors": factors,
        "base factors": factors | {"lm_head.base_layer.weight", f"{path}.base_layer.weight"},
        "copies": {"lm_head.weight", f"{path}.weight"},
        "rows": {f"{path}.token_adapter.trainable_tokens_delta"},
    }[expected]
    assert here == there
    assert {key.removeprefix("base_model.model.") for key in here} >= ends
    loaded.save_pretrained(tmp_path / "again")
    assert fields(tmp_path / "again") == fields(tmp_path / "theirs")
    assert fields(tmp_path / "ours", None) == fields(tmp_path / "theirs", None)
    if not gpt2 or expected in (
        "copies",
        "rows",
    ):  # of GPT-2 PEFT drops the head's factors when it loads them
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert close(mine(IDS).data, theirs(again))
    before = mine(IDS).data
    merged = mine.merge_and_unload()  # one parameter: there is nothing to choose
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert close(merged(IDS).data, before)


def small(kind: str, tied: bool = True) -> dict[str, Any]:
    """The fields of a config.json, of two layers."""
    fields: dict[str, Any] = {
        "vocab_size": V,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "gpt2":
        return {**fields, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 64}
    fields |= {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    fields |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    fields |= {"sliding_window": 4} if kind == "mistral" else {}
    return {**fields, "head_dim": 4} if kind in ("llama", "qwen3", "mistral") else fields


# ---- training ----


TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear", "bias": "all"},
    "dora": {"target_modules": ["LAYER", "END"], "use_dora": True},
    "rslora": {"target_modules": ["LAYER", "lm_head"], "use_rslora": True, "bias": "lora_only"},
    "embedding": {"target_modules": ["END", "LAYER"]},
    "tokens": {"target_modules": ["LAYER"], "trainable_token_indices": [0, 3, 7]},
    "copies": {"target_modules": ["LAYER"], "modules_to_save": ["END", "lm_head"]},
    "one copy": {
        "target_modules": ["LAYER"],
        "modules_to_save": ["lm_head"],
        "ensure_weight_tying": True,
    },
}


# Each in double, each type of model in single: twice.
IN_DOUBLE = [
    (MODEL_TYPES[(2 * i + j) % 5], name, "float64")
    for i, name in enumerate(TRAINED)
    for j in range(2)
]
IN_SINGLE = [(kind, name, "float32") for kind, name, _ in IN_DOUBLE[::3]]


@pytest.mark.parametrize(("kind", "name", "dtype"), [*IN_DOUBLE, *IN_SINGLE])
def test_twenty_steps_are_those_of_transformers_and_peft(
    models: dict[tuple[str, bool], tuple[Path, Any]],
    kind: str,
    name: str,
    dtype: str,
    tmp_path: Path,
) -> None:
    end, layer = ("wte", "c_attn") if kind == "gpt2" else ("embed_tokens", "q_proj")
    options = copy.deepcopy(TRAINED[name])
    for field, value in options.items():
        if isinstance(value, list):
            options[field] = [{"END": end, "LAYER": layer}.get(word, word) for word in value]
    folder, model = models[kind, name != "rslora"]
    made = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options)
    )
    made = (in_double(made) if dtype == "float64" else made).train()
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2's own, which there are none of here
    made.save_pretrained(tmp_path / "start")
    ours = PeftModel.from_pretrained(
        CausalLM.from_pretrained(folder, dtype=dtype), tmp_path / "start", is_trainable=True
    )
    theirs_by_name = {n: p for n, p in made.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert set(trained) == set(theirs_by_name)
    start = {n: p.numpy().copy() for n, p in trained.items()}
    for n, p in trained.items():  # in double, and not as the file has rounded it
        p.data = theirs_by_name[n].detach().numpy().copy()
    optimizer = AdamW(list(trained.values()), lr=1e-2)
    their_optimizer = torch.optim.AdamW(theirs_by_name.values(), lr=1e-2)
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids = rng.integers(0, V, (3, 8))
        logits = made(input_ids=torch.tensor(ids)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
        )
        their_optimizer.zero_grad()
        loss.backward()
        their_optimizer.step()
        mine = F.cross_entropy(ours(ids)[:, :-1], ids[:, 1:])
        optimizer.step(gradients(mine, list(trained.values())))
        assert abs(mine.item() - loss.item()) <= {"float64": 1e-9, "float32": 1e-5}[dtype] * max(
            1, loss.item()
        )
    for n, p in trained.items():
        if dtype == "float64":
            assert np.abs(p.numpy() - theirs_by_name[n].detach().numpy()).max() <= 1e-7, n
        assert np.abs(p.numpy() - start[n]).max() > 1e-3, n  # it did move
