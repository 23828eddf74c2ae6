"""Every type of model beside transformers and peft: a base and an adapter on it go there, and come back."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import NAMES as LLAMA
from peers import close, peft, torch, transformers

from minilora import CausalLM, LoraConfig, PeftModel, TransformerConfig, generate, get_peft_model
from minilora.formats import load_file
from minilora.lora.config import DEFAULT_TARGETS
from minilora.models.config import DIALECTS, MODEL_TYPES

transformers.utils.logging.disable_progress_bar()
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
V, T = 13, 9
IDS = np.random.default_rng(0).integers(0, V, (2, T))
BIASES = ["none", "all", "lora_only"]
GPT2 = ["c_attn", "c_fc", "mlp.c_proj", "attn.c_proj", "c_proj"]


def agree(ours: Any, expected: np.ndarray) -> bool:
    """To 1e-5; but a model so sensitive that float32's rounding alone moves it further may differ by four times that.

    (Of a width of 2 a norm can divide two small numbers that are left of large ones: about one example in 300.)
    """
    got = ours(IDS).data
    if close(got, expected):
        return True
    exact = copy.deepcopy(ours).to(dtype="float64")(IDS).data
    return close(got, expected, 4 * float(np.abs(got - exact).max() / np.abs(exact).max()))


def randomise(parameters: Iterable[Any], seed: int = 0) -> None:
    """Nothing stays at its first value, on either side."""
    rng = np.random.default_rng(seed)
    for p in parameters:
        values = (0.3 * rng.standard_normal(tuple(p.shape)) + (p.ndim == 1)).astype(np.float32)
        if torch.is_tensor(p):
            p.data.copy_(torch.tensor(values))
        else:
            p.data = values


def theirs(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()  # type: ignore[no-any-return]


def keys(file: Path) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for key, array in load_file(file).items()}


@st.composite
def bases(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A type of model, and the fields of its config.json."""
    kind, kv, groups = (
        draw(st.sampled_from(MODEL_TYPES)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
    )
    layers, width, tied = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([2, 4, 8])),
        draw(st.booleans()),
    )
    eps = draw(st.sampled_from([1e-6, 1e-5]))
    fields: dict[str, Any] = {
        "vocab_size": V,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "gpt2":
        width = draw(st.sampled_from([2, 3, 4]))  # nothing is rotated, so it may be odd
        return kind, fields | {
            "n_embd": kv * groups * width,
            "n_head": kv * groups,
            "n_layer": layers,
            "n_positions": 64,
            "n_inner": draw(st.sampled_from([None, 5, kv * groups * width])),
            "activation_function": draw(
                st.sampled_from(["gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh"])
            ),
            "layer_norm_epsilon": eps,
        }
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
    fields |= {
        "hidden_size": kv
        * groups
        * (width if kind == "qwen2" else draw(st.sampled_from([width, 5]))),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv * groups,
        "num_key_value_heads": draw(st.sampled_from([kv, kv * groups])),
        "max_position_embeddings": 64,
        "rms_norm_eps": eps,
        "rope_parameters": rope,
    }
    if kind != "qwen2":
        fields["head_dim"] = width
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        fields["mlp_bias"] = draw(st.booleans())
    if kind == "mistral":
        fields["sliding_window"] = draw(st.sampled_from([None, 1, 3, 4, 20]))
    if kind.startswith("qwen"):
        types = [
            draw(st.sampled_from(["full_attention", "sliding_attention"])) for _ in range(layers)
        ]
        fields["use_sliding_window"] = draw(st.booleans())
        fields["sliding_window"] = draw(st.sampled_from([1, 3, 4, 20]))
        fields["max_window_layers"] = draw(st.integers(0, 3))
        fields["layer_types"] = (
            draw(st.sampled_from([None, types])) if fields["use_sliding_window"] else None
        )
    return kind, fields


@st.composite
def adapters(draw: st.DrawFn, kind: str, tied: bool) -> dict[str, Any]:
    """The fields of an adapter_config.json."""
    names = draw(
        st.lists(
            st.sampled_from(GPT2 if kind == "gpt2" else LLAMA), min_size=1, max_size=4, unique=True
        )
    )
    dora = draw(st.booleans())
    whole = (
        ["ln_f", "wpe", "mlp", "attn.c_proj"]
        if kind == "gpt2"
        else ["model.norm", "q_norm", "input_layernorm"]
    )
    whole = [name for name in whole if name != "q_norm" or kind == "qwen3"] + (
        [] if tied else ["lm_head"]
    )
    keys = sorted(draw(st.sets(st.sampled_from(names))))
    saved = draw(st.sampled_from([None, *([name] for name in whole if name not in names)]))
    if saved in (["mlp"], ["attn.c_proj"]):
        names = ["c_attn"]
    # With bias="all" peft writes a copied module's bias twice more, under names that are no module's.
    biases = (
        ["none", "lora_only"]
        if kind == "gpt2" and saved in (["ln_f"], ["mlp"], ["attn.c_proj"])
        else BIASES
    )
    return {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.integers(1, 16)),
        "target_modules": draw(st.sampled_from([names, "all-linear", None])),
        "use_rslora": draw(st.booleans()),
        "use_dora": dora,
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "bias": draw(st.sampled_from(biases)),
        "rank_pattern": {key: draw(st.integers(1, 4)) for key in keys},
        "alpha_pattern": {key: draw(st.integers(1, 16)) for key in keys},
        "modules_to_save": saved,
        "task_type": "CAUSAL_LM",
    }


@settings(max_examples=40)
@given(st.data())
def test_a_base_and_its_adapter_go_there_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("base")
    kind, fields = data.draw(bases())
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **fields)
    ).eval()
    randomise(model.parameters())
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    model.to(getattr(torch, dtype)).save_pretrained(folder / "theirs")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "theirs", dtype=torch.float32
    )
    ours = CausalLM.from_pretrained(folder / "theirs")
    assert ours.config.model_type == kind
    assert agree(ours, theirs(model))

    ours.save_pretrained(folder / "again")
    config, before = (
        json.loads((folder / n / "config.json").read_text()) for n in ("again", "theirs")
    )
    assert {**config, "dtype": dtype} == before
    assert keys(folder / "again" / "model.safetensors") == keys(
        folder / "theirs" / "model.safetensors"
    )
    randomise(ours.parameters(), seed=1)
    ours.save_pretrained(folder / "ours")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "ours", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert agree(ours, theirs(again))
    assert not close(ours(IDS).data, theirs(model), 1e-2)

    options = data.draw(adapters(kind, fields["tie_word_embeddings"]))
    made = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**copy.deepcopy(options))
    ).eval()
    randomise((p for p in made.parameters() if p.requires_grad), seed=2)
    made.save_pretrained(folder / "their adapter")
    loaded = PeftModel.from_pretrained(
        CausalLM.from_pretrained(folder / "theirs"), folder / "their adapter"
    )
    assert agree(loaded, theirs(made))
    loaded.save_pretrained(folder / "saved again")
    configs = [
        json.loads((folder / n / "adapter_config.json").read_text())
        for n in ("saved again", "their adapter")
    ]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])  # a set there
    assert configs[0] == configs[1]

    mine = get_peft_model(CausalLM.from_pretrained(folder / "theirs"), LoraConfig(**options)).eval()
    assert mine.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()
    randomise((p for p in mine.parameters() if p.requires_grad), seed=3)
    mine.save_pretrained(folder / "our adapter")
    files = [
        keys(folder / name / "adapter_model.safetensors")
        for name in ("our adapter", "their adapter")
    ]
    assert files[0] == files[1]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "our adapter").eval()
    assert agree(mine, theirs(again))
    merged = mine.merge_and_unload()
    assert agree(merged, theirs(again.merge_and_unload()))
    merged.save_pretrained(folder / "merged")
    assert agree(
        merged, theirs(transformers.AutoModelForCausalLM.from_pretrained(folder / "merged"))
    )


@settings(max_examples=10)
@given(bases())
def test_greedy_text_is_theirs(
    tmp_path_factory: pytest.TempPathFactory, base: tuple[str, dict[str, Any]]
) -> None:
    kind, fields = base
    folder = tmp_path_factory.mktemp("base")
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    randomise(model.parameters())
    model.save_pretrained(folder)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor(IDS[:, :3]), attention_mask=torch.ones(2, 3), **options)
    got = generate(CausalLM.from_pretrained(folder, dtype="float64"), IDS[:, :3], 12, temperature=0)
    np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_what_a_config_json_leaves_out_means_what_it_means_there(kind: str) -> None:
    dialect, few = (
        DIALECTS[kind],
        {"vocab_size": V, "num_hidden_layers": 1, "num_attention_heads": 32},
    )
    few |= {"hidden_size": 64} | ({} if kind == "gpt2" else {"intermediate_size": 4})
    written = {dialect.names.get(k, k): v for k, v in few.items()}
    ours = TransformerConfig.from_dict({"model_type": kind, **written})
    config = transformers.AutoConfig.for_model(kind, **written)
    for field in set(dialect.fields) - {"layer_types", "rope_parameters"}:
        expected = getattr(config, dialect.names.get(field, field), None)
        expected = {"intermediate_size": 256, "head_dim": 2, "num_key_value_heads": 32}.get(field) or expected \
            if expected is None else expected  # fmt: skip
        assert getattr(ours, field) == expected, field
    if "rope_parameters" in dialect.fields:
        assert (
            dict(ours.rope_parameters).items()
            >= {"rope_theta": 10000.0, "rope_type": "default"}.items()
        )
        assert config.rope_parameters == ours.rope_parameters
    if "layer_types" in dialect.fields:
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        assert [ours.window(i) for i in range(1)] == [windows[t] for t in config.layer_types]


def test_default_targets_are_peft_s() -> None:
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {kind: table[kind] for kind in MODEL_TYPES} == DEFAULT_TARGETS
