"""Beside torch, transformers and peft themselves: operations, models, and adapters that go there and come back."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import IDS, NAMES, close, peft, randomise, torch, transformers

from minilora import functional as F
from minilora.formats import load_file
from minilora.lab.demo import Plan, demo
from minilora.lora import LoraConfig, LoraLinear, PeftModel, get_peft_model
from minilora.models.config import TransformerConfig
from minilora.models.transformer import CausalLM
from minilora.optim import AdamW

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


# ---- models ----


@st.composite
def llama_configs(draw: st.DrawFn) -> dict[str, Any]:
    kv, groups, head_dim = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([2, 4, 8])),
    )
    rope: dict[str, Any] = {
        "rope_type": draw(st.sampled_from(["default", "linear", "llama3"])),
        "rope_theta": 1e3,
    }
    if rope["rope_type"] != "default":
        rope["factor"] = 4.0
    if rope["rope_type"] == "llama3":
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    return {
        "vocab_size": 13,
        "hidden_size": kv * groups * draw(st.sampled_from([head_dim, 5])),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv * groups,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_parameters": rope,
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def theirs(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()  # type: ignore[no-any-return]


@settings(max_examples=15)  # each takes transformers a second
@given(llama_configs())
def test_models_go_there_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("model")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    randomise(model.parameters())
    model.save_pretrained(folder / "theirs")
    ours = CausalLM.from_pretrained(folder / "theirs")
    assert close(ours(IDS).data, theirs(model), 1e-5)
    randomise(ours.parameters(), seed=1)
    ours.save_pretrained(folder / "ours")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "ours", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert close(ours(IDS).data, theirs(again), 1e-5)
    assert not close(ours(IDS).data, theirs(model), 1e-2)


# ---- adapters ----


@st.composite
def adapter_options(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    form = draw(st.sampled_from(["list", "pattern", "all-linear"]))
    forms = {
        "list": names,
        "pattern": rf".*\.[12]\..*\.({'|'.join(names)})",
        "all-linear": "all-linear",
    }
    # The first key that matches holds, and peft's files sort them: only sorted ones mean the same after a save.
    keys = sorted(draw(st.sets(st.sampled_from([*names, f"layers.1.*{names[0]}"]))))
    return {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.integers(1, 16)),
        "target_modules": forms[form],
        "use_rslora": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "rank_pattern": {key: draw(st.integers(1, 4)) for key in keys},
        "alpha_pattern": {key: draw(st.integers(1, 16)) for key in keys},
        "modules_to_save": draw(
            st.sampled_from([None, ["lm_head"], ["norm"], ["embed_tokens", "lm_head"]])
        ),
        "layers_to_transform": draw(st.sampled_from([None, 1, [1, 2]])) if form == "list" else None,
        "task_type": "CAUSAL_LM",
    }


@settings(max_examples=15)
@given(adapter_options())
def test_adapters_go_there_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, llama: tuple[Path, Any], options: dict[str, Any]
) -> None:
    base, plain = llama
    folder = tmp_path_factory.mktemp("adapter")
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(**copy.deepcopy(options))
    ).eval()
    randomise(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder / "theirs")
    ours = PeftModel.from_pretrained(CausalLM.from_pretrained(base), folder / "theirs")
    assert close(ours(IDS).data, theirs(model), 1e-5)

    made = get_peft_model(CausalLM.from_pretrained(base), LoraConfig(**options)).eval()
    assert made.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    randomise((p for p in made.parameters() if p.requires_grad), seed=1)
    made.save_pretrained(folder / "ours")
    files = [load_file(folder / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: (a.shape, a.dtype) for k, a in files[0].items()} == {
        k: (a.shape, a.dtype) for k, a in files[1].items()
    }
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder / "ours").eval()
    assert close(made(IDS).data, theirs(again), 1e-5)
    assert close(made.merge_and_unload()(IDS).data, theirs(again.merge_and_unload()), 1e-5)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_an_adapter_trains_on_here_and_goes_back(
    llama: tuple[Path, Any], tmp_path: Path, optimiser: str
) -> None:
    base, plain = llama
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], lora_dropout=0.1
    )
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    model.save_pretrained(tmp_path / "before")
    ours = PeftModel.from_pretrained(
        CausalLM.from_pretrained(base), tmp_path / "before", is_trainable=True
    )
    params = [p for p in ours.parameters() if p.requires_grad]
    step = AdamW(params, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(ours(IDS[:, :-1]), IDS[:, 1:])
        losses.append(loss.item())
        loss.backward()
        if optimiser == "adamw":
            step.step()
        for p in params:
            if optimiser == "sgd":
                p.data = p.data - np.float32(0.1) * p.grad
            p.grad = None
    assert losses[-1] < losses[0]
    ours.eval().save_pretrained(tmp_path / "after")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "after").eval()
    assert close(ours(IDS).data, theirs(again), 1e-5)
    assert not close(ours(IDS).data, theirs(model), 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": ["1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": "lm_head"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.[02]\.mlp\..*_proj"},
        {"target_modules": r".*\.layers\.\d\.self_attn\.[^qk]_proj"},
        {"target_modules": r"(?:.*up|.*q)_proj|lm_head"},
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "1.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
    ],
    ids=str,
)
def test_targets_are_those_that_peft_takes(
    llama: tuple[Path, Any], options: dict[str, Any]
) -> None:
    base, plain = llama
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=2, **copy.deepcopy(options))
    )
    expected = {
        n
        for n, m in model.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    ours = get_peft_model(CausalLM.from_pretrained(base), LoraConfig(r=2, **options))
    assert {n for n, m in ours.model.named_modules() if isinstance(m, LoraLinear)} == expected
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, model)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_first_values_have_peft_s_law(init: Any) -> None:
    n, m, r = 500, 400, 32
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": r, "target_modules": ["q_proj"], "init_lora_weights": init}
    shape = {
        "vocab_size": 3,
        "hidden_size": n,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "head_dim": m,
    }
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8}
    config = transformers.LlamaConfig(**shape)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(**options))
    ours = get_peft_model(CausalLM(TransformerConfig(**shape)), LoraConfig(**options)).state_dict()
    values = {k: np.asarray(v) for k, v in peft.get_peft_model_state_dict(model).items()}
    assert set(values) == set(ours)
    for key, expected in values.items():
        a, b = (np.sort(v.astype(np.float64), axis=None) for v in (ours[key], expected))
        assert len(a) == len(b)
        assert a.any() == b.any()
        # The two-sample Kolmogorov distance: beyond this with a probability of 2 exp(-2 * 2.5^2) = 7e-6.
        everywhere = np.concatenate([a, b])
        below = [np.searchsorted(v, everywhere, "right") for v in (a, b)]
        assert np.abs(below[0] - below[1]).max() / len(a) <= 2.5 * math.sqrt(2 / len(a))
        if init != "gaussian" and a.any():
            bound = np.float32(1 / math.sqrt(n if "lora_A" in key else r))
            for v in (a, b):
                assert bound * (1 - 50 / len(v)) < np.abs(v).max() <= bound


def test_the_lesson_s_snippet_counts_the_same(llama: tuple[Path, Any]) -> None:
    base, plain = llama
    counts = []
    for module, model in ((peft, copy.deepcopy(plain)), (None, CausalLM.from_pretrained(base))):
        config = (module.LoraConfig if module else LoraConfig)(
            r=64,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=0.1,
            bias="none",
            task_type="CAUSAL_LM",
        )
        make = module.get_peft_model if module else get_peft_model
        counts.append(make(model, config).get_nb_trainable_parameters())
    assert counts[0] == counts[1]
    assert counts[0][0] == 3 * 64 * ((8 + 8) + (8 + 4))


# ---- the main job ----


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo wrote: the run that MINILORA_DEMO names, or else a quick one."""
    if "MINILORA_DEMO" in os.environ:
        return Path(os.environ["MINILORA_DEMO"])
    folder = tmp_path_factory.mktemp("demo")
    demo(folder, Plan().quick(), pictures=False, say=lambda text: None)
    return folder


def test_the_demo_s_base_loads_in_transformers_and_its_adapter_in_peft(demo_folder: Path) -> None:
    base, adapter = demo_folder / "base", demo_folder / "adapter"
    text = "def read(path):\n    return "
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    ours, theirs = (
        CausalLM.from_pretrained(base),
        transformers.AutoModelForCausalLM.from_pretrained(base).eval(),
    )
    with torch.no_grad():
        assert close(theirs(torch.tensor([ids])).logits, ours([ids]).numpy(), 1e-5)
        ours, theirs = (
            PeftModel.from_pretrained(ours, adapter),
            peft.PeftModel.from_pretrained(theirs, adapter).eval(),
        )
        assert close(theirs(torch.tensor([ids])).logits, ours([ids]).numpy(), 1e-5)
        merged = theirs.merge_and_unload()
        assert close(
            merged(torch.tensor([ids])).logits, ours.merge_and_unload()([ids]).numpy(), 1e-5
        )
