"""merge_adapter of some of the active adapters: the output stays the sum of all active ones.

W' = W + the sum of dW of the merged adapters        y = W' x + the other active ones' dW x
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods import BASES, METHODS, Combination, layers, move
from peft_models import adapted, base, is_close, lora, trainable
from small import IDS, bits, logits
from test_embedding import model as tied_model

from minilora import functional as F
from minilora.autograd import gradients, no_grad
from minilora.errors import ConfigError, GraphError
from minilora.lora import (
    AdaLoraConfig,
    HydraConfig,
    LoraConfig,
    PeftModel,
    get_multitask_model,
    get_peft_model,
)
from minilora.models.transformer import CausalLM

NAMES = ("a", "b", "c", "d")
CONFIGS = {
    "a": lora(target_modules=["q_proj", "v_proj"]),
    "b": lora(target_modules=["q_proj", "up_proj"], r=3, use_rslora=True),
    "c": AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["q_proj", "o_proj"]),
    "d": HydraConfig(r=2, target_modules=["v_proj", "q_proj"]),
}


def with_adapters(plain: CausalLM | None = None, names: Any = NAMES) -> PeftModel:
    plain = base(num_hidden_layers=1) if plain is None else plain
    first, *others = names
    model = get_peft_model(plain, CONFIGS[first], first)
    for name in others:
        model.add_adapter(name, CONFIGS[name])
    for seed, name in enumerate(names):
        move(model, name, seed)
    model.set_adapter(list(names), inference_mode=True)
    return model.eval()  # type: ignore[no-any-return]


MODEL = with_adapters()
BEFORE = bits(MODEL)


@given(
    st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    st.lists(st.lists(st.sampled_from(NAMES[:3]), min_size=1), max_size=3),
)
def test_merge_adapter_of_any_active_ones_keeps_the_sum_of_the_active_ones(
    active: list[str], portions: list[list[str]]
) -> None:
    """Whatever is active, and however it is merged: or else a refusal that changes nothing."""
    MODEL.set_adapter(active, inference_mode=True)
    whole = logits(MODEL)
    expected = base(num_hidden_layers=1)
    weights = dict(expected.named_parameters())
    for path, layer in layers(MODEL).items():
        for name in active:
            if name in layer.adapters and name != "d":
                weight = weights[f"{path}.weight"]
                weight.data = weight.data + layer.delta_weight(name)
    if "d" not in active:
        assert is_close(whole, logits(expected), 1e-11)
    merged: list[str] = []
    try:
        for names in portions:
            before = bits(MODEL)
            if set(names) <= set(active):
                MODEL.merge_adapter(names)
                merged += (name for name in names if name not in merged)
            else:
                with pytest.raises(ConfigError, match="is not active, and merging would activate"):
                    MODEL.merge_adapter(names)
                assert bits(MODEL) == before
            assert sorted(MODEL.merged_adapters) == sorted(merged)
            assert is_close(logits(MODEL), whole, 1e-11)
        for path, layer in layers(MODEL).items():
            inside = [name for name in merged if name in layer.adapters]
            update = sum(layer.delta_weight(name) for name in inside) if inside else 0
            W = base(num_hidden_layers=1)
            stored = dict(W.named_parameters())[f"{path}.weight"].data
            assert np.abs(layer.base_layer.dense_weight() - (stored + update)).max() < 1e-13
    finally:
        MODEL.unmerge_adapter()
    assert bits(MODEL) == BEFORE
    assert np.array_equal(logits(MODEL), whole)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", BASES)
def test_merge_adapter_puts_every_method_on_top_of_a_merged_one(method: str, kind: str) -> None:
    """Over a base of codes the merged layer is dense; in 16 bits merging rounds."""
    plain = Combination(method, kind, "cpu").base()
    model = get_peft_model(plain, lora(target_modules=["up_proj", "q_proj"]), "a")
    other = {"target_modules": ["q_proj", "o_proj"] if method != "dora" else ["o_proj"]}
    model.add_adapter("b", METHODS[method].config(**other))
    move(model, "a", 1)
    move(model, "b", 2)
    model.set_adapter(["a", "b"])
    model.eval()
    before = bits(model)
    whole = logits(model)
    model.merge_adapter(["a"])
    assert is_close(logits(model), whole, 0.1 if kind == "bfloat16" else 1e-4)
    if METHODS[method].merges:
        model.merge_adapter(["b"])
        assert is_close(logits(model), whole, 0.1 if kind == "bfloat16" else 1e-4)
    else:
        with pytest.raises(ConfigError, match="HydraLoRA cannot be merged"):
            model.merge_adapter()
        assert model.merged_adapters == ["a"]
    model.unmerge_adapter()
    assert bits(model) == before
    assert np.array_equal(logits(model), whole)


def test_merge_adapter_keeps_the_sum_where_a_copy_and_biases_are_trained_too() -> None:
    model = get_peft_model(base(), lora(modules_to_save=["lm_head"], bias="lora_only"), "a")
    model.add_adapter("b", lora(target_modules=["q_proj", "k_proj"]), seed=3)
    move(model, "a")
    model.set_adapter(["a", "b"])
    whole = logits(model)
    for names in (["a"], ["b"], ["a", "b"]):
        model.merge_adapter(names)
        assert is_close(logits(model), whole, 1e-11)
        model.unmerge_adapter()
        assert np.array_equal(logits(model), whole)
    model.merge_adapter(["a"])
    # "b" is named, and "a" is in the weights already: with its copy of the head.
    plain = model.merge_and_unload(adapter_names=["b"])
    assert is_close(logits(plain), whole, 1e-11)


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "embedding": ({"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}, None),
    "head": ({"target_modules": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}, None),
    "tokens": ({"trainable_token_indices": [1, 2]}, {"target_modules": ["q_proj"]}, None),
    "tied, one adapter for both": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        None,
    ),
    "tied, embedding": (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"]},
        "untie",
    ),
    "tied, head": ({"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, "untie"),
    "tied, tokens": ({"trainable_token_indices": [1, 2]}, {"target_modules": ["q_proj"]}, None),
}


@pytest.mark.parametrize("case", ENDS)
def test_merge_adapter_of_an_end_keeps_the_other_adapter_of_it(case: str) -> None:
    first, second, tied = ENDS[case]
    plain = base(tie_word_embeddings="tied" in case, num_hidden_layers=1)
    options: dict[str, Any] = {"r": 2, "init_lora_weights": False}
    model = get_peft_model(plain, LoraConfig(**{**options, **first}), "a")
    model.add_adapter("b", LoraConfig(**{**options, **second}))
    move(model, "a", 1)
    move(model, "b", 2)
    model.set_adapter(["a", "b"])
    before = bits(model)
    whole = logits(model)
    model.merge_adapter(["a"], tied=tied)
    assert is_close(logits(model), whole, 1e-11)
    with model.disable_adapter():
        disabled = logits(model)
    assert np.array_equal(
        disabled, logits(base(tie_word_embeddings="tied" in case, num_hidden_layers=1))
    )
    assert is_close(logits(model), whole, 1e-11)
    model.merge_adapter(["b"], tied=tied)
    assert is_close(logits(model), whole, 1e-11)
    model.unmerge_adapter()
    assert bits(model) == before
    assert np.array_equal(logits(model), whole)


def test_merge_adapter_refuses_to_share_a_weight_that_another_merged_one_changes_elsewhere() -> (
    None
):
    model = tied_model("lm_head")
    model.add_adapter("b", lora(target_modules=["embed_tokens"]))
    model.set_adapter(["default", "b"])
    before = bits(model)
    model.merge_adapter(["default"], tied="share")
    merged = logits(model)
    for tied in (None, "share", "untie"):
        with pytest.raises(ConfigError, match="tied"):
            model.merge_adapter(["b"], tied=tied)
        assert np.array_equal(logits(model), merged)
    model.unmerge_adapter()
    assert bits(model) == before


def test_add_adapter_beside_a_shared_merged_weight_starts_from_the_base() -> None:
    """While the head's adapter is merged with tied="share", the embedding has the merged weight."""
    apart = tied_model("lm_head")
    merged = copy.deepcopy(apart)
    merged.merge_adapter(tied="share")
    shared = logits(merged)
    for name, config in {
        "dora": LoraConfig(target_modules=["embed_tokens"], use_dora=True),
        "plain": LoraConfig(target_modules=["q_proj"]),
    }.items():
        for model in (apart, merged):
            model.add_adapter(name, config)
        assert np.array_equal(logits(merged), shared)
        expected = apart.state_dict(name)
        for key, tensor in merged.state_dict(name).items():
            assert np.array_equal(tensor, expected[key])


# ---- switching, deleting, saving while something is merged ----


def test_set_adapter_unmerges_what_would_be_inactive() -> None:
    model = with_adapters(names=("a", "b", "c"))
    for names in (["b"], ["c"], ["b", "c"]):
        model.set_adapter(names)
        expected = logits(model).tobytes()
        model.set_adapter(["a", "b"])
        model.merge_adapter(["a"])
        with pytest.warns(UserWarning, match="unmerged, to be inactive: a"):
            model.set_adapter(names)
        assert logits(model).tobytes() == expected
    model.set_adapter(["a", "b"])
    model.merge_adapter(["a"])
    model.set_adapter(["c", "a"])
    with_c = logits(model)
    model.set_adapter("a")
    assert not is_close(logits(model), with_c, 1e-3)
    model.unmerge_adapter()
    model.set_adapter(["c", "a"])
    assert is_close(logits(model), with_c, 1e-11)


def test_delete_adapter_removes_all_but_the_merged_ones() -> None:
    model = with_adapters(names=("a", "b", "c"))
    model.merge_adapter(["a"])
    with pytest.raises(ConfigError, match=r"'a' is merged: call unmerge_adapter\(\)"):
        model.delete_adapter("a")
    model.delete_adapter("b")
    assert model.active_adapters == ["a", "c"]
    merged = logits(model)
    model.unmerge_adapter()
    assert is_close(logits(model), merged, 1e-11)


def test_save_pretrained_and_load_adapter_are_the_same_while_some_are_merged(
    tmp_path: Path,
) -> None:
    model = with_adapters(names=("a", "b"))
    model.save_pretrained(tmp_path / "apart")
    model.merge_adapter(["a"])
    model.save_pretrained(tmp_path / "merged")
    for file in (tmp_path / "apart").rglob("*.*"):
        other = tmp_path / "merged" / file.relative_to(tmp_path / "apart")
        assert file.read_bytes() == other.read_bytes()
    whole = logits(model)
    model.load_adapter(tmp_path / "merged" / "b", "again")
    assert np.array_equal(logits(model), whole)
    model.set_adapter(["a", "again"])
    assert is_close(logits(model), whole, 1e-11)


def test_to_moves_the_base_below_what_is_merged() -> None:
    model = with_adapters(names=("a", "b"))
    model.merge_adapter(["a"])
    model.to(dtype="float32")
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {np.dtype("float32")}


def test_task_runs_on_top_of_a_merged_shared_adapter_and_is_refused_without_it() -> None:
    config = lora(target_modules=["q_proj"])
    plain = base(num_hidden_layers=1)
    model = get_multitask_model(plain, {"x": config, "y": config, "z": config}, shared=config)
    model.eval()
    model.tasks["z"] = ("z",)
    expected = {task: logits_of(model, task) for task in ("x", "y", "z")}
    model.merge_adapter(["shared"])
    for task in ("x", "y"):
        assert is_close(logits_of(model, task), expected[task], 1e-11)
        merged = model.merge_task(task)
        assert is_close(merged(IDS).numpy(), expected[task], 1e-11)
    assert is_close(model.merge_task("z")(IDS).numpy(), expected["z"], 1e-11)
    with pytest.raises(ConfigError, match="shared are merged, and task 'z' runs without them"):
        logits_of(model, "z")
    model.unmerge_adapter()
    assert np.array_equal(logits_of(model, "z"), expected["z"])


def logits_of(model: Any, task: str) -> np.ndarray:
    return model(IDS, tasks=task).numpy()  # type: ignore[no-any-return]


# ---- training ----

TRAINED: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj"]},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both ends": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 4]},
    "a copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def loss_of(model: Any) -> Any:
    return F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("case", TRAINED)
def test_gradients_refuse_to_train_what_is_merged(case: str, prepared: bool) -> None:
    plain = base(tie_word_embeddings=case == "both ends")
    model = get_peft_model(plain, LoraConfig(r=2, **TRAINED[case]))
    if case == "tokens":  # the rows alone, without the default targets
        for name, p in model.named_parameters():
            p.requires_grad = "trainable_tokens" in name
    params = [p for p in model.parameters() if p.requires_grad]
    model.merge_adapter()
    with no_grad():
        logits(model)  # running is no training
    if prepared:
        model.prepare_step()
    loss = loss_of(model)
    with pytest.raises(GraphError, match=r"'default' is merged.*call unmerge_adapter\(\)"):
        gradients(loss, params)
    model.end_step()
    model.unmerge_adapter()
    assert all(g is not None for g in gradients(loss_of(model), params))


@pytest.mark.parametrize("prepared", [False, True])
def test_gradients_of_an_adapter_on_top_of_a_frozen_merged_one_are_those_of_the_sum(
    prepared: bool,
) -> None:
    model = adapted(target_modules=["q_proj", "up_proj"])
    model.add_adapter("b", lora(), seed=5)
    model.set_adapter(["default", "b"], inference_mode=True)
    for p in model.adapter_parameters("b").values():
        p.requires_grad = True
    params = [p for p in model.parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in trainable(model)} == {"b"}
    expected = gradients(loss_of(model), params)
    model.merge_adapter(["default"])
    if prepared:
        model.prepare_step()
    for grad, other in zip(gradients(loss_of(model), params), expected, strict=True):
        assert is_close(grad, other, 1e-10)
