"""train(also=...): a second text beside the held-out one, which changes nothing of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from minilora import LoraConfig, get_peft_model
from minilora.errors import ConfigError
from minilora.lora.multitask import get_multitask_model
from minilora.training.loop import Result, Settings, bits_per_byte, evaluate, train

RNG = np.random.default_rng(0)
TEXT, HELD_OUT, OLD, OTHER = (RNG.integers(0, 16, size) for size in (200, 40, 50, 30))


def model() -> Any:
    return get_peft_model(small.base(), LoraConfig(r=2))


def short(**changes: Any) -> Settings:
    fields = {"steps": 4, "batch_size": 2, "context": 8, "warmup": 0, "eval_every": 2}
    return Settings(**{**fields, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_evaluates_a_second_text_at_each_evaluation(tmp_path):
    trained = model()
    before = evaluate(trained, OLD, 8)
    options = {"held_out": HELD_OUT, "also": OLD, "also_bytes_per_token": 2.0}
    result = train(trained, TEXT, short(), tmp_path, **options)
    assert [step for step, _ in result.also] == [0, 2, 4]
    # The run cuts its shards by its own sequences, so last bits may differ.
    assert result.also[0][1] == pytest.approx(before, rel=1e-6)
    assert result.also[-1][1] == pytest.approx(evaluate(trained, OLD, 8), rel=1e-6)
    assert result.also[0][1] != result.also[-1][1]
    evaluations = lines(tmp_path / "eval.jsonl")
    assert [(line["step"], line["also_loss"]) for line in evaluations] == result.also
    for line in evaluations:
        assert line["also_bits_per_byte"] == bits_per_byte(line["also_loss"], 2.0)


def test_train_has_the_same_bits_with_a_second_text(tmp_path):
    with_text, without = model(), model()
    train(with_text, TEXT, short(), tmp_path / "a", held_out=HELD_OUT, also=OLD)
    train(without, TEXT, short(), tmp_path / "b", held_out=HELD_OUT)
    assert small.bits(with_text) == small.bits(without)
    one, other = lines(tmp_path / "a/eval.jsonl"), lines(tmp_path / "b/eval.jsonl")
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert list(other[0]) == ["step", "loss", "bits_per_byte"]


def resumed(tmp_path: Path, out: str, also: np.ndarray | None) -> Result:
    """A run of 4 steps that goes on from its checkpoint after 2."""
    train(model(), TEXT, short(save_every=2), tmp_path, held_out=HELD_OUT, also=OLD)
    resume = tmp_path / "checkpoints/step-2"
    options = {"held_out": HELD_OUT, "resume": resume, "also": also}
    return train(model(), TEXT, short(), tmp_path / out, **options)


def test_train_resumes_with_the_evaluations_of_the_second_text(tmp_path):
    straight = train(model(), TEXT, short(), tmp_path / "x", held_out=HELD_OUT, also=OLD)
    assert resumed(tmp_path, "again", OLD).also == straight.also


def test_train_leaves_out_evaluations_of_another_second_text(tmp_path):
    with pytest.warns(UserWarning, match="another one than before"):
        result = resumed(tmp_path, "again", OTHER)
    assert [step for step, _ in result.also] == [4]
    assert resumed(tmp_path, "without", None).also == []


def test_train_refuses_a_second_text_without_held_out_or_for_tasks(tmp_path):
    with pytest.raises(ConfigError, match="held_out"):
        train(model(), TEXT, short(), tmp_path, also=OLD)
    tasks = get_multitask_model(small.base(), {"a": LoraConfig(r=2)})
    with pytest.raises(ConfigError, match="no task"):
        train(tasks, {"a": TEXT}, short(), tmp_path, held_out={"a": HELD_OUT}, also=OLD)
