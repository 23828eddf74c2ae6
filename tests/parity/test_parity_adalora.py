"""AdaLoRA beside peft's: the same fields, first values, and ranks at every allocation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import NAMES, in_double, load_ours, make_ours, make_theirs, peft, torch, trainable

from minilora import functional as F
from minilora.autograd import gradients
from minilora.lora import AdaLoraAdapter, AdaLoraConfig, RankAllocator
from minilora.optim import AdamW

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def test_adalora_config_has_the_fields_and_defaults_of_peft(tmp_path: Path) -> None:
    peft.AdaLoraConfig(total_step=10, inference_mode=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert AdaLoraConfig(total_step=10).to_dict() == written
    assert AdaLoraConfig.from_dict(written).to_dict() == written
    fields = {field.name for field in dataclasses.fields(AdaLoraConfig)}
    assert fields - {"extra"} <= {field.name for field in dataclasses.fields(peft.AdaLoraConfig)}


@pytest.mark.parametrize("init", [True, False])
def test_adalora_first_values_have_the_moments_of_peft(llama: tuple[Path, Any], init: bool) -> None:
    """Over all layers."""
    base, model = llama
    options = {"init_r": 8, "total_step": 9, "target_modules": NAMES, "init_lora_weights": init}
    torch.manual_seed(0)
    theirs = peft.get_peft_model_state_dict(make_theirs(model, options))
    ours = make_ours(base, options).state_dict()
    assert set(theirs) == set(ours)
    for tensor in AdaLoraAdapter.TENSORS:
        keys = [key for key in ours if tensor in key]
        a = np.concatenate([ours[key].ravel() for key in keys])
        b = np.concatenate([np.asarray(theirs[key]).ravel() for key in keys])
        assert len(a) == len(b) > 150
        assert a.any() == b.any()
        std = 0.0
        if a.any():
            std = 0.02 if init else 1.0
        for values in (a, b):  # five standard errors
            assert abs(values.mean()) <= 5 * std / np.sqrt(len(values))
            assert abs(values.std() - std) <= 5 * std / np.sqrt(2 * len(values))


SCHEDULES: dict[str, dict[str, Any]] = {}
SCHEDULES["every step"] = {"tinit": 20, "tfinal": 60, "deltaT": 1}
SCHEDULES["every seven steps"] = {"tinit": 35, "tfinal": 90, "deltaT": 7, "orth_reg_weight": 0.1}
SCHEDULES["every seven steps"] |= {"beta1": 0.7, "beta2": 0.93}
SCHEDULES["to the end"] = {"tinit": 0, "tfinal": 0, "deltaT": 10, "orth_reg_weight": 0.0}
SCHEDULES["to the end"] |= {"target_r": 1}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rank_allocator_gives_the_ranks_of_peft_over_300_steps(
    llama: tuple[Path, Any], tmp_path: Path, name: str
) -> None:
    base, model = llama
    options = {"init_r": 5, "target_r": 2, "lora_alpha": 16, "total_step": 300}
    options |= {"target_modules": NAMES, **SCHEDULES[name]}
    options["task_type"] = "CAUSAL_LM"  # without it, peft never adds the penalty
    theirs = in_double(make_theirs(model, options)).train()
    theirs.save_pretrained(tmp_path)
    ours = load_ours(base, tmp_path, "float64", is_trainable=True)
    assert {p.dtype for p in ours.parameters()} == {np.dtype(np.float64)}
    allocator = RankAllocator.of(ours)
    optimizer = AdamW(allocator.params, lr=3e-3)
    their_optimizer = torch.optim.AdamW(trainable(theirs).values(), lr=3e-3)
    config = theirs.peft_config["default"]

    # Near its minimum the penalty's gradient keeps its length, so rounding errors grow and runs
    # part. Losses are therefore compared up to the last allocation, and zeros after it.
    last = 300 - options["tfinal"]
    allocations = 0
    seen = set()
    rng = np.random.default_rng(1)
    for step in range(1, 301):
        first = rng.integers(0, 13, (4, 1))
        ids = (first + np.arange(10) * rng.integers(1, 4, (4, 1))) % 13  # something to learn
        batch = torch.tensor(ids)
        loss = theirs(input_ids=batch, labels=batch).loss
        loss.backward()
        their_optimizer.step()
        before = config.rank_pattern
        theirs.base_model.update_and_allocate(step)
        pattern = config.rank_pattern
        their_optimizer.zero_grad()

        cross = F.cross_entropy(ours(ids)[:, :-1], ids[:, 1:])
        penalty, penalty_grads = allocator.penalty()
        grads = gradients(cross, allocator.params)
        for i, gradient in enumerate(penalty_grads):
            if gradient is not None:
                grads[i] = grads[i] + gradient
        optimizer.step(grads)
        allocator.step(grads)
        if step <= last:
            bound = 1e-14 if step == 1 else 1e-8
            difference = cross.item() + float(penalty) - loss.item()
            assert abs(difference) <= bound * loss.item()
        allocated = pattern is not before
        if allocated:
            allocations += 1
            ranks = {key.removesuffix(".lora_E.default"): sum(pattern[key]) for key in pattern}
            assert allocator.ranks == ranks
            seen.add(tuple(ranks.values()))
        if allocations and (step >= last or allocated):
            for path, adapter in allocator.adapters.items():
                E = theirs.get_base_model().get_submodule(path).lora_E["default"]
                assert np.array_equal(adapter.lora_E.data == 0, E.detach().numpy() == 0)
    steps = range(options["tinit"] + 1, last)
    due = [step for step in steps if step % options["deltaT"] == 0]
    assert allocations == len(due) + 1
    assert len(seen) > 10  # ranks changed,
    assert len(set(allocator.ranks.values())) > 1  # and differ between layers
    assert sum(allocator.ranks.values()) == options["target_r"] * 21
