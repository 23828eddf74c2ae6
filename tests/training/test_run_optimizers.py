"""Runs by each optimizer: the same bits resumed and in any threads; what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from test_run_compute import edit_run

from minilora.errors import CheckpointError, ConfigError
from minilora.lora import AdaLoraConfig, LoraConfig, get_multitask_model, get_peft_model
from minilora.training.loop import Settings, train

TEXT = np.random.default_rng(3).integers(0, 16, 600).astype(np.int32)
SETTINGS = Settings(steps=6, batch_size=3, context=6, lr=0.02, warmup=1, max_grad_norm=0.5)
ALL = {"r": 2, "target_modules": "all-linear"}
NAMES = ["loraplus", "lorafa", "riemannian"]
EACH = pytest.mark.parametrize("optimizer", NAMES)


def lora(**fields: Any) -> Any:
    config = LoraConfig(**{**ALL, **fields})
    return get_peft_model(small.base(), config, seed=2)


def by(optimizer: str, **changes: Any) -> Settings:
    return dataclasses.replace(SETTINGS, optimizer=optimizer, **changes)


@EACH
def test_train_by_an_optimizer_resumes_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    settings = by(optimizer, save_every=2)
    straight = lora(use_dora=True, lora_dropout=0.1)
    result = train(straight, TEXT, settings, tmp_path / "a")
    resumed = lora(use_dora=True, lora_dropout=0.1)
    checkpoint = tmp_path / "a" / "checkpoints" / "step-4"
    again = train(resumed, TEXT, settings, tmp_path / "b", resume=checkpoint)
    assert again.losses == result.losses
    assert small.bits(resumed) == small.bits(straight)
    plain = train(lora(use_dora=True, lora_dropout=0.1), TEXT, SETTINGS, tmp_path / "c")
    assert plain.losses[0] == result.losses[0]
    assert plain.losses[1:] != result.losses[1:]


@EACH
def test_train_by_an_optimizer_has_the_bits_of_any_number_of_threads(
    optimizer: str, tmp_path: Path
) -> None:
    results = []
    for threads in (1, 3):
        model = lora()
        train(model, TEXT, by(optimizer, threads=threads, shard=1), tmp_path / str(threads))
        results.append(small.bits(model))
    assert results[0] == results[1]


@EACH
def test_train_by_an_optimizer_takes_several_tasks(optimizer: str, tmp_path: Path) -> None:
    tasks = {task: LoraConfig(r=2, target_modules=["q_proj"]) for task in ("code", "prose")}
    model = get_multitask_model(small.base(), tasks, seed=4)
    text = {"code": TEXT[:300], "prose": TEXT[300:]}
    result = train(model, text, by(optimizer, batch_size=4), tmp_path)
    assert len(result.losses) == SETTINGS.steps
    if optimizer == "lorafa":
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 4
        assert all("lora_B" in name for name in trained)


def test_train_by_loraplus_of_ratio_1_has_the_bits_of_adamw(tmp_path: Path) -> None:
    results = []
    for i, settings in enumerate((SETTINGS, by("loraplus", loraplus_lr_ratio=1.0))):
        model = lora()
        losses = train(model, TEXT, settings, tmp_path / str(i)).losses
        results.append((losses, small.bits(model)))
    assert results[0] == results[1]


def test_train_by_loraplus_allocates_the_ranks_of_adalora(tmp_path: Path) -> None:
    """The allocator has the gradients by their places among the optimiser's."""
    fields = {"init_r": 3, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 6}
    results = []
    for i, settings in enumerate((SETTINGS, by("loraplus", loraplus_lr_ratio=1.0))):
        config = AdaLoraConfig(**fields, target_modules="all-linear")
        model = get_peft_model(small.base(), config, seed=2)
        losses = train(model, TEXT, settings, tmp_path / str(i)).losses
        results.append((losses, small.bits(model)))
    assert results[0] == results[1]


def test_resume_refuses_another_optimizer_and_other_rates(tmp_path: Path) -> None:
    for name in ("loraplus", "riemannian"):
        train(lora(), TEXT, by(name, save_every=2), tmp_path / name)
    for name, settings, what in (
        ("loraplus", SETTINGS, r"optimizer \(was 'loraplus', now 'adamw'\)"),
        ("loraplus", by("loraplus", loraplus_lr_ratio=8.0), r"loraplus_lr_ratio \(was None, now 8"),
        ("loraplus", by("loraplus", loraplus_lr_embedding=0.5), "loraplus_lr_embedding"),
        ("riemannian", by("riemannian", riemannian_reg=0.5), r"riemannian_reg \(was None, now 0.5"),
    ):
        checkpoint = tmp_path / name / "checkpoints" / "step-4"
        with pytest.raises(CheckpointError, match=f"belongs to another run: {what}"):
            train(lora(), TEXT, settings, tmp_path / "b", resume=checkpoint)


def test_resume_takes_a_checkpoint_from_before_there_were_optimizers(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, save_every=2)
    straight = train(lora(), TEXT, settings, tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoints" / "step-4"
    fields = ("optimizer", "loraplus_lr_ratio", "loraplus_lr_embedding", "riemannian_reg")
    edit_run(checkpoint, **dict.fromkeys(fields))
    again = train(lora(), TEXT, settings, tmp_path / "b", resume=checkpoint)
    assert again.losses == straight.losses


def test_settings_refuse_what_the_optimizer_does_not_use() -> None:
    for field, other in (("loraplus_lr_ratio", "lorafa"), ("riemannian_reg", "adamw")):
        owner = field.partition("_")[0]
        message = f"{field} is for optimizer {owner}, got optimizer {other}: leave it out"
        with pytest.raises(ConfigError, match=message):
            by(other, **{field: 1.0})
        by(owner, **{field: 1.0})
    with pytest.raises(ConfigError, match=r"optimizer must be one of adamw, .* got 'sgd'"):
        by("sgd")
    for value in (0.0, -1.0, float("nan"), True, "2"):
        with pytest.raises(ConfigError, match="loraplus_lr_ratio must be a finite number above 0"):
            by("loraplus", loraplus_lr_ratio=value)
    with pytest.raises(ConfigError, match="riemannian_reg must be a finite number of at least 0"):
        by("riemannian", riemannian_reg=-1.0)
