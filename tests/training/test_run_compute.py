"""Runs over a base whose products are rounded: what makes two runs the same, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from minilora import LoraConfig, get_multitask_model, get_peft_model
from minilora.errors import CheckpointError, ConfigError
from minilora.training.checkpoints import MANIFEST
from minilora.training.loop import Settings, evaluate, train

TEXT = np.random.default_rng(3).integers(0, 16, 600).astype(np.int32)
SETTINGS = Settings(steps=4, batch_size=3, context=6, lr=0.02, warmup=1)
ROUNDED = ["tf32", "bfloat16"]
ANY_ARITHMETIC = pytest.mark.parametrize("compute", ROUNDED)
ALL = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


def lora(compute: str, **fields: Any) -> Any:
    model = get_peft_model(small.base(), LoraConfig(**{**ALL, **fields}), seed=2)
    model.set_compute(compute)
    return model


def edit_run(folder: Path, **changes: Any) -> None:
    """Change what a checkpoint says of its run; None removes a field."""
    manifest = json.loads((folder / MANIFEST).read_text())
    run = manifest["state"]["run"]
    for key, value in changes.items():
        run[key] = value
        if value is None:
            del run[key]
    (folder / MANIFEST).write_text(json.dumps(manifest))


@ANY_ARITHMETIC
def test_train_over_a_rounded_base_resumes_with_the_same_bits(compute: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=6, save_every=2)
    straight = train(lora(compute, lora_dropout=0.1), TEXT, settings, tmp_path / "a")
    exact = train(lora("float32", lora_dropout=0.1), TEXT, settings, tmp_path / "b")
    assert straight.losses != exact.losses
    assert straight.losses[0] == pytest.approx(exact.losses[0], rel=0.01)  # Adam enlarges the rest
    resumed = train(
        lora(compute, lora_dropout=0.1), TEXT, settings, tmp_path / "c",
        resume=tmp_path / "a" / "checkpoints" / "step-4",
    )  # fmt: skip
    assert resumed.losses == straight.losses


@ANY_ARITHMETIC
def test_train_over_a_rounded_base_has_the_bits_of_any_number_of_threads(
    compute: str, tmp_path: Path
) -> None:
    found = []
    for threads in (1, 3):
        settings = dataclasses.replace(SETTINGS, threads=threads, shard=1)
        model = lora(compute)
        losses = train(model, TEXT, settings, tmp_path / str(threads)).losses
        found.append((losses, small.bits(model)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("before", "now"), [("float32", "tf32"), ("tf32", "float32"), ("tf32", "bfloat16")]
)
def test_resume_refuses_a_run_of_another_compute(before: str, now: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, save_every=2)
    train(lora(before), TEXT, settings, tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoints" / "step-2"
    reason = rf"belongs to another run: compute \(was '{before}', now '{now}'\); resume with"
    with pytest.raises(CheckpointError, match=reason):
        train(lora(now), TEXT, settings, tmp_path / "b", resume=checkpoint)


def test_resume_takes_an_older_checkpoint_for_one_of_float32(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, save_every=2)
    straight = train(lora("float32"), TEXT, settings, tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoints" / "step-2"
    edit_run(checkpoint, compute=None)
    resumed = train(lora("float32"), TEXT, settings, tmp_path / "b", resume=checkpoint)
    assert resumed.losses == straight.losses
    with pytest.raises(CheckpointError, match=r"compute \(was 'float32', now 'tf32'\)"):
        train(lora("tf32"), TEXT, settings, tmp_path / "c", resume=checkpoint)


@ANY_ARITHMETIC
def test_train_refuses_to_train_a_weight_whose_products_are_rounded(
    compute: str, tmp_path: Path
) -> None:
    model = small.base()
    model.set_compute(compute)
    before = small.bits(model)
    reason = f"q_proj.weight would train, but compute='{compute}' is for frozen weights: add an"
    with pytest.raises(ConfigError, match=reason):
        train(model, TEXT, SETTINGS, tmp_path / "a")
    assert small.bits(model) == before
    model.set_compute("float32")
    assert len(train(model, TEXT, SETTINGS, tmp_path / "b").losses) == SETTINGS.steps


@ANY_ARITHMETIC
def test_train_with_modules_to_save_and_biases_over_a_rounded_base(
    compute: str, tmp_path: Path
) -> None:
    model = lora(compute, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all")
    result = train(model, TEXT, SETTINGS, tmp_path, held_out=TEXT[:99])
    assert np.isfinite(result.losses).all()


@ANY_ARITHMETIC
def test_train_several_tasks_over_a_rounded_base(compute: str, tmp_path: Path) -> None:
    tasks = {task: LoraConfig(**ALL) for task in ("a", "b")}
    model = get_multitask_model(small.base(), tasks, seed=4)
    model.set_compute(compute)
    text = {"a": TEXT[:300], "b": TEXT[300:]}
    settings = dataclasses.replace(SETTINGS, batch_size=4, save_every=2)
    losses = train(model, text, settings, tmp_path).losses
    assert np.isfinite(losses).all()


@ANY_ARITHMETIC
def test_evaluate_of_a_rounded_model_is_its_mean_loss(compute: str) -> None:
    model = small.base()
    model.set_compute(compute)
    text = TEXT[:36]  # five windows of 7 tokens, and one more target
    loss = evaluate(model, text, 7)
    total = model(text[None, :7], targets=text[None, 1:8]).item()
    for start in range(7, 35, 7):
        ids = text[None, start : start + 8]
        total += model(ids[:, :-1], targets=ids[:, 1:]).item()
    assert loss == pytest.approx(total / 35, rel=1e-6)
