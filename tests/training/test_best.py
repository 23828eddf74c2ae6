"""keep = "best": a run ends with the weights of its lowest held-out loss, however it got there."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import small
from faults import in_child

from minilora import AdaLoraConfig, LoraConfig, get_peft_model
from minilora.errors import CheckpointError, ConfigError
from minilora.formats import load_file
from minilora.training.loop import Settings, evaluate, train

TEXT = np.random.default_rng(0).integers(0, 16, 400)
HELD_OUT = np.random.default_rng(1).integers(0, 16, 90)
STEPS = 12
SETTINGS = {
    "steps": STEPS, "batch_size": 2, "context": 8, "lr": 0.02, "warmup": 0, "floor": 1.0,
    "threads": 1, "eval_every": 2, "save_every": 3, "keep": "best",
}  # fmt: skip


def adapted(config=None):
    config = config or LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return get_peft_model(small.base(), config, seed=3)


def run(out, model=None, resume=None, held_out=HELD_OUT, **changes):
    """(the model, its result) after a run."""
    model = model or adapted()
    settings = Settings(**{**SETTINGS, **changes})
    return model, train(model, TEXT, settings, out, held_out=held_out, resume=resume)


def adapter_bits(model):
    return {name: p.numpy().tobytes() for name, p in model.named_parameters() if p.requires_grad}


def test_train_keep_best_ends_with_the_weights_of_the_lowest_held_out_loss(tmp_path):
    model, result = run(tmp_path / "best")
    step, loss = min(result.evaluations, key=lambda pair: pair[1])
    assert result.step == step < STEPS  # these random texts have nothing in common
    assert result.loss == loss == pytest.approx(evaluate(model, HELD_OUT, 8), rel=1e-6)
    last, of_last = run(tmp_path / "last", keep="last")
    assert of_last.evaluations == result.evaluations
    assert of_last.step == STEPS
    assert of_last.loss == result.evaluations[-1][1] > loss
    assert adapter_bits(last) != adapter_bits(model)


@pytest.mark.parametrize("rate", [1e-3, 0.02])
def test_train_keep_best_has_the_bits_of_a_run_that_ends_at_that_step(rate, tmp_path):
    # With a constant learning rate a shorter run takes the same steps.
    model, result = run(tmp_path / "best", lr=rate)
    if result.step == 0:
        assert adapter_bits(model) == adapter_bits(adapted())
        return
    shorter, _ = run(tmp_path / "short", lr=rate, steps=result.step, keep="last")
    assert adapter_bits(shorter) == adapter_bits(model)


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7, 11])
def test_train_keep_best_killed_and_resumed_ends_with_the_same_bits(step, tmp_path):
    model, result = run(tmp_path / "whole")
    assert 0 < result.step < STEPS

    def die():
        from minilora.training.run import Run

        plain = Run.step

        def dying(self, sharded):
            if self.done == step:
                os.kill(os.getpid(), 9)
            return plain(self, sharded)

        Run.step = dying
        run(tmp_path / "killed")

    in_child(die)
    resumable = (tmp_path / "killed" / "checkpoints").exists()
    assert resumable == (step >= 3)
    resumed, again = run(tmp_path / "killed", resume="auto" if resumable else None)
    assert adapter_bits(resumed) == adapter_bits(model)
    assert (again.evaluations, again.step) == (result.evaluations, result.step)


def test_train_keep_best_resumes_from_a_checkpoint_in_another_folder(tmp_path):
    model, _ = run(tmp_path / "whole")
    # The checkpoint alone is enough, though the best weights are those of an earlier step.
    shutil.copytree(tmp_path / "whole/checkpoints/step-9", tmp_path / "elsewhere/step-9")
    resumed, _ = run(tmp_path / "new", resume=tmp_path / "elsewhere/step-9")
    assert adapter_bits(resumed) == adapter_bits(model)


def test_train_keep_best_of_adalora_has_the_final_ranks(tmp_path):
    names = ["q_proj", "v_proj"]
    options = {"target_r": 1, "init_r": 3, "tinit": 2, "tfinal": 4, "deltaT": 2}

    def fresh():
        return adapted(AdaLoraConfig(target_modules=names, total_step=STEPS, **options))

    model, result = run(tmp_path / "best", fresh())
    late = [pair for pair in result.evaluations if pair[0] >= STEPS - 4]
    assert result.step == min(late, key=lambda pair: pair[1])[0]
    # Otherwise the ranks are cut after the loss was measured, and it would be another.
    assert result.loss == pytest.approx(evaluate(model, HELD_OUT, 8), rel=1e-5)
    resumed, _ = run(tmp_path / "best", fresh(), resume=tmp_path / "best/checkpoints/step-9")
    assert adapter_bits(resumed) == adapter_bits(model)


def test_train_keep_best_without_held_out_text_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="no text is held out: give one"):
        run(tmp_path, held_out=None)
    with pytest.raises(ConfigError, match="keep must be 'last' or 'best', got 'worst'"):
        Settings(keep="worst")


def test_train_keep_best_warns_where_only_the_ends_are_evaluated(tmp_path):
    with pytest.warns(UserWarning, match="set eval_every"):
        run(tmp_path, eval_every=None)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"keep": "last"}, "keep"),
        ({"eval_every": 3}, "eval_every"),
        ({"held_out": TEXT[:50]}, "held-out text"),
    ],
)
def test_train_keep_best_resumes_no_other_run(changes, field, tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=f"belongs to another run: {field} "):
        run(tmp_path, resume="auto", **changes)


def test_train_keep_last_still_resumes_with_other_evaluations(tmp_path):
    model, _ = run(tmp_path, keep="last")
    resumed, _ = run(tmp_path, keep="last", eval_every=3, held_out=TEXT[:50], resume="auto")
    assert adapter_bits(resumed) == adapter_bits(model)
    with pytest.raises(CheckpointError, match=r"keep \(was 'last', now 'best'\)"):
        run(tmp_path, resume="auto")


def test_train_keep_best_refuses_a_checkpoint_whose_copy_is_damaged(tmp_path):
    run(tmp_path)
    path = tmp_path / "checkpoints/step-12/best.safetensors"
    assert load_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is damaged: 'best\.safetensors'"):
        run(tmp_path, resume=path.parent)
