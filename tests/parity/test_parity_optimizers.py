"""LoRA+, LoRA-FA and the Riemannian step beside peft's optimisers, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import IDS, NAMES, in_double, load_model, load_ours, peft, randomise, torch
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)

from minilora.autograd import gradients
from minilora.functional import cross_entropy
from minilora.lora import optimizers
from minilora.optim import SGD, AdamW

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 5},
    "rslora, patterns": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 7},
    },
}


@pytest.fixture(params=OPTIONS)
def both(request: Any, llama: tuple[Path, Any], tmp_path: Path) -> tuple[Any, Any]:
    """peft's model and ours with one adapter, in float64, to train."""
    options = copy.deepcopy(OPTIONS[request.param])
    config = peft.LoraConfig(target_modules=NAMES, **options)
    theirs = peft.get_peft_model(load_model(llama[0]), config)
    randomise(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(llama[0], tmp_path, "float64", is_trainable=True)
    return in_double(theirs).train(), ours.train()


def train_both(both: tuple[Any, Any], their_optimizer: Any, our_optimizer: Any) -> float:
    """The largest difference of any parameter after four steps, over the largest one."""
    theirs, ours = both
    targets = IDS[:, 1:]
    for _ in range(4):
        their_optimizer.zero_grad()
        logits = theirs(torch.tensor(IDS)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.tensor(targets).reshape(-1)
        )
        loss.backward()
        their_optimizer.step()
        loss = cross_entropy(ours(IDS[:, :-1]), targets)
        our_optimizer.step(gradients(loss, our_optimizer.params))
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    worst = 0.0
    for name, p in ours.named_parameters():
        if "lora_" in name:
            difference = np.abs(p.numpy() - expected[name]).max()
            worst = max(worst, float(difference / np.abs(expected[name]).max()))
    return worst


def test_create_loraplus_optimizer_steps_as_peft(both: tuple[Any, Any]) -> None:
    rates: dict[str, Any] = {"lr": 0.01, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.2}
    theirs = create_loraplus_optimizer(both[0], torch.optim.AdamW, **rates)
    ours = optimizers.create_loraplus_optimizer(both[1], AdamW, **rates)
    assert train_both(both, theirs, ours) < 1e-9


def test_create_riemannian_optimizer_steps_as_peft(both: tuple[Any, Any]) -> None:
    theirs = create_riemannian_optimizer(both[0], torch.optim.SGD, lr=0.01, reg=0.02)
    ours = optimizers.create_riemannian_optimizer(both[1], SGD, lr=0.01, reg=0.02)
    assert train_both(both, theirs, ours) < 1e-9


def test_create_lorafa_optimizer_steps_as_peft(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft rounds its product to bfloat16 wherever torch can; its eps has another place."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    config = both[0].peft_config["default"]
    scaling = {"r": config.r, "lora_alpha": config.lora_alpha}
    theirs = create_lorafa_optimizer(both[0], **scaling, lr=0.01)
    for group in theirs.param_groups:
        group["eps"] = 0.0
    ours = optimizers.create_lorafa_optimizer(both[1], AdamW, lr=0.01, eps=0.0)
    assert train_both(both, theirs, ours) < 1e-9


@pytest.mark.parametrize("use_dora", [False, True])
def test_loraplus_groups_are_those_of_peft(use_dora: bool) -> None:
    """But a LayerNorm's weight, which peft does not decay, is not known by its name."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(9, 4)
            self.norm = torch.nn.LayerNorm(4)
            self.lin = torch.nn.Linear(4, 4)

        def forward(self, ids: Any) -> Any:
            return self.lin(self.norm(self.embed(ids)))

    config = peft.LoraConfig(
        r=2, target_modules=["embed", "lin"], modules_to_save=["norm"], use_dora=use_dora
    )
    model = peft.get_peft_model(Model(), config)
    rates = {"lr": 0.1, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.3}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, **rates)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {}
    for group in theirs.param_groups:
        for p in group["params"]:
            expected[names[id(p)]] = group["lr"], group["weight_decay"]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    got = {}
    for group in optimizers.loraplus_groups(trained, 0.1, 8.0):
        for name, _ in group["params"]:
            got[name] = group["lr"], group.get("weight_decay", 0.3)
    norm = "base_model.model.norm.modules_to_save.default.weight"
    assert expected.pop(norm) == (0.8, 0.0)
    assert got.pop(norm) == (0.8, 0.3)
    assert got == expected
    assert {lr for lr, _ in got.values()} == {1e-6, 0.1, 0.8}
