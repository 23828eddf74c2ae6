"""AdaLoRA beside peft's: the same ranks at every allocation, and adapters that go there and come back."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import IDS, NAMES, close, in_double, logits, peft, randomise, torch

from minilora import functional as F
from minilora.autograd import gradients
from minilora.formats import load_file
from minilora.lora import AdaLoraAdapter, AdaLoraConfig, PeftModel, RankAllocator, get_peft_model
from minilora.models.transformer import CausalLM
from minilora.optim import AdamW

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


# ---- the configuration ----


def test_fields_and_defaults_are_peft_s(tmp_path: Path) -> None:
    peft.AdaLoraConfig(total_step=10, inference_mode=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert AdaLoraConfig(total_step=10).to_dict() == written
    assert AdaLoraConfig.from_dict(written).to_dict() == written
    own = {f.name for f in dataclasses.fields(AdaLoraConfig)} - {"extra"}
    assert own <= {f.name for f in dataclasses.fields(peft.AdaLoraConfig)}


# ---- the allocator ----

SCHEDULES = {
    "every step": {"tinit": 20, "tfinal": 60, "deltaT": 1},
    "now and then": {
        "tinit": 35,
        "tfinal": 90,
        "deltaT": 7,
        "beta1": 0.7,
        "beta2": 0.93,
        "orth_reg_weight": 0.1,
    },
    "to the end": {"tinit": 0, "tfinal": 0, "deltaT": 10, "target_r": 1, "orth_reg_weight": 0.0},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_300_steps_give_the_ranks_of_peft_s_allocator(
    llama: tuple[Path, Any], tmp_path: Path, name: str
) -> None:
    base, plain = llama
    options = {
        "init_r": 5,
        "target_r": 2,
        "lora_alpha": 16,
        "total_step": 300,
        "target_modules": NAMES,
    }
    options |= SCHEDULES[name] | {
        "task_type": "CAUSAL_LM"
    }  # without the type, peft never adds the penalty
    model = in_double(
        peft.get_peft_model(copy.deepcopy(plain), peft.AdaLoraConfig(**copy.deepcopy(options)))
    ).train()
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(
        CausalLM.from_pretrained(base, dtype="float64"), tmp_path, is_trainable=True
    )
    assert {p.dtype for p in ours.parameters()} == {np.dtype(np.float64)}
    allocator = RankAllocator.of(ours)
    optimizer = AdamW(allocator.params, lr=3e-3)
    their_optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    # The penalty's gradient keeps its length however near its minimum is: there rounding grows, and runs part. So the
    # losses are held to each other up to the last allocation, and zeros after it.
    last = 300 - options["tfinal"]
    allocations, seen, rng = 0, set(), np.random.default_rng(1)
    for step in range(1, 301):
        ids = (
            rng.integers(0, 13, (4, 1)) + np.arange(10) * rng.integers(1, 4, (4, 1))
        ) % 13  # something to learn
        loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss
        loss.backward()
        their_optimizer.step()
        before = model.peft_config["default"].rank_pattern
        model.base_model.update_and_allocate(step)
        pattern = model.peft_config["default"].rank_pattern
        their_optimizer.zero_grad()

        cross = F.cross_entropy(ours(ids)[:, :-1], ids[:, 1:])
        value, more = allocator.penalty()
        grads = [
            g if m is None else g + m
            for g, m in zip(gradients(cross, allocator.params), more, strict=True)
        ]
        optimizer.step(grads)
        allocator.step(grads)
        if step <= last:
            assert (
                abs(cross.item() + float(value) - loss.item())
                <= (1e-14 if step == 1 else 1e-8) * loss.item()
            )
        if pattern is not before:
            allocations += 1
            ranks = {
                key.removesuffix(".lora_E.default"): sum(kept) for key, kept in pattern.items()
            }
            assert allocator.ranks == ranks
            seen.add(tuple(ranks.values()))
        if allocations and (step >= last or pattern is not before):
            for path, adapter in allocator.adapters.items():
                there = (
                    model.get_base_model().get_submodule(path).lora_E["default"].detach().numpy()
                )
                assert np.array_equal(adapter.lora_E.data == 0, there == 0)
    due = [t for t in range(options["tinit"] + 1, last) if t % options["deltaT"] == 0]
    assert allocations == len(due) + 1
    assert len(seen) > 10  # the ranks did move,
    assert len(set(allocator.ranks.values())) > 1  # and apart
    assert sum(allocator.ranks.values()) == options["target_r"] * 21


# ---- files ----


@st.composite
def adapter_options(draw: st.DrawFn) -> dict[str, Any]:
    init_r = draw(st.integers(2, 5))
    return {
        "init_r": init_r,
        "target_r": draw(st.integers(1, init_r)),
        "lora_alpha": draw(st.integers(1, 16)),
        "total_step": 3,
        "tfinal": 1,
        "target_modules": draw(
            st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
        ),
        "init_lora_weights": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "modules_to_save": draw(st.sampled_from([None, ["lm_head"]])),
        "task_type": "CAUSAL_LM",
    }


@settings(max_examples=15)
@given(adapter_options(), st.booleans(), st.integers(0, 99))
def test_adapters_go_there_and_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    llama: tuple[Path, Any],
    options: dict[str, Any],
    cut: bool,
    seed: int,
) -> None:
    """Whole, and cut to a random pattern in which some layer has nothing left."""
    base, plain = llama
    folder, rng = tmp_path_factory.mktemp("adapter"), np.random.default_rng(seed)
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.AdaLoraConfig(**copy.deepcopy(options))
    ).eval()
    randomise((p for p in model.parameters() if p.requires_grad), seed)
    layers = [
        n.removesuffix(".lora_E.default")
        for n, _ in model.base_model.model.named_parameters()
        if "lora_E" in n
    ]
    masks = {layer: rng.random(options["init_r"]) < 0.5 for layer in layers}
    masks[layers[0]][:] = False
    if cut:
        for layer, mask in masks.items():
            E = model.base_model.model.get_submodule(layer).lora_E["default"]
            E.data[torch.tensor(~mask)] = 0
        model.peft_config["default"].rank_pattern = {
            f"{k}.lora_E.default": v.tolist() for k, v in masks.items()
        }
    expected = logits(model)
    model.save_pretrained(folder / "theirs")
    ours = PeftModel.from_pretrained(CausalLM.from_pretrained(base), folder / "theirs")
    assert close(ours(IDS).data, expected, 1e-5)

    made = get_peft_model(CausalLM.from_pretrained(base), AdaLoraConfig(**options))
    assert made.get_nb_trainable_parameters()[0] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    randomise((p for p in made.parameters() if p.requires_grad), seed)
    if cut:
        allocator = RankAllocator.of(made)
        for adapter, mask in zip(allocator.adapters.values(), masks.values(), strict=True):
            adapter.lora_E.data = np.where(mask[:, None], adapter.lora_E.data, np.float32(0))
        state, _ = allocator.state_dict()
        allocator.load_state_dict(
            {**state, "kept": np.concatenate(list(masks.values()))}, {"steps": 3}
        )
        whole = made.eval()(IDS).data
        allocator.prune()
        assert close(made(IDS).data, whole, 1e-5)
    made.eval().save_pretrained(folder / "ours")
    files = [load_file(folder / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: (a.shape, a.dtype) for k, a in files[0].items()} == {
        k: (a.shape, a.dtype) for k, a in files[1].items()
    }
    written = [
        json.loads((folder / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
    ]
    assert written[0]["rank_pattern"] == written[1]["rank_pattern"]
    assert bool(written[0]["rank_pattern"]) == cut
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder / "ours").eval()
    assert close(logits(again), made(IDS).data, 1e-5)
    assert close(logits(again.merge_and_unload()), made.merge_and_unload()(IDS).data, 1e-5)


@pytest.mark.parametrize("init", [True, False])
def test_first_values_have_peft_s_law(llama: tuple[Path, Any], init: bool) -> None:
    """By their moments, over all layers."""
    base, plain = llama
    options = {"init_r": 8, "total_step": 9, "target_modules": NAMES, "init_lora_weights": init}
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(plain), peft.AdaLoraConfig(**copy.deepcopy(options)))
    ours = get_peft_model(CausalLM.from_pretrained(base), AdaLoraConfig(**options)).state_dict()
    values = {k: np.asarray(v) for k, v in peft.get_peft_model_state_dict(model).items()}
    assert set(values) == set(ours)
    for tensor in AdaLoraAdapter.TENSORS:
        a, b = (
            np.concatenate([v.ravel() for k, v in side.items() if tensor in k])
            for side in (ours, values)
        )
        assert len(a) == len(b) > 150
        assert a.any() == b.any()
        std = 0.0 if not a.any() else 0.02 if init else 1.0
        for v in (a, b):  # five standard errors
            assert abs(v.mean()) <= 5 * std / np.sqrt(len(v))
            assert abs(v.std() - std) <= 5 * std / np.sqrt(2 * len(v))
