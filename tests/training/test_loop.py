"""The training loop learns and stops in time; a run resumed at any step ends with the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tqdm
from faults import Disk, no_disk, no_room, stay_full

import minilora.training.checkpoints
import minilora.training.loop
from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    TransformerConfig,
    get_multitask_model,
    get_peft_model,
)
from minilora.autograd import observer
from minilora.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    Interrupted,
    LockError,
    NonFiniteError,
)
from minilora.formats import load_file
from minilora.formats.disk import parse_json
from minilora.formats.folders import LOCK, locked
from minilora.optim import warmup_cosine
from minilora.training.checkpoints import Log, find_checkpoint
from minilora.training.loop import Run, Settings, bits_per_byte, divergence, evaluate, train
from minilora.training.parallel import ShardedStep
from minilora.training.signals import stop_signals

CONFIG = TransformerConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)
GOLDEN = Path(__file__).parents[1] / "golden"
# Each token is near the one before.
TEXT = np.random.default_rng(0).integers(0, 4, 400).cumsum().astype(np.int32) % 16
HELD_OUT = TEXT[:60]
TEXTS = {"up": TEXT, "down": 15 - TEXT[:90]}
HELD_OUT_OF_TASKS = {task: ids[:60] for task, ids in TEXTS.items()}
PROC = Path("/proc/self/fd").exists()
SHORT = Settings(
    steps=6, batch_size=4, context=8, lr=1e-2, warmup=2, weight_decay=0.1, threads=1, shard=2
)


def full(seed=1):
    return CausalLM(CONFIG, seed=seed)


def lora(seed=1, dropout=0.1, r=2, alpha=4, base=1):
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", lora_dropout=dropout)
    return get_peft_model(full(base), config, seed=seed)


def with_head(seed=1):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], rank_pattern={"q_proj": 3}
    )
    return get_peft_model(full(), config, seed=seed)


def with_tasks(seed=1, tasks=("up", "down")):
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.1)
    return get_multitask_model(full(), dict.fromkeys(tasks, config), shared=config, seed=seed)


def short(**changes):
    """The settings of most runs here, with `changes`."""
    return dataclasses.replace(SHORT, **changes)


def checkpoints(out: Path):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def weights(model):
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


def bits(arrays):
    return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}


def lines(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_without_time(out: Path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(out / "log.jsonl")]


# ---- settings ----

NO_NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, True, False, "1", None, [1], 1j]
NO_COUNTS = [*NO_NUMBERS, 1.0, 1e30, 2**63, 2**70]
NO_OPTIONAL_COUNTS = [value for value in NO_COUNTS if value is not None]
NO_BOOLS = [value for value in NO_NUMBERS if type(value) is not bool]
BAD = {}
for field in ("steps", "batch_size", "context", "accumulate"):
    BAD[field] = [*NO_COUNTS, 0]
for field in ("warmup", "seed"):
    BAD[field] = NO_COUNTS
for field in ("shard", "part", "threads", "eval_every", "save_every"):
    BAD[field] = [*NO_OPTIONAL_COUNTS, 0]
for field in ("lr", "max_grad_norm"):
    BAD[field] = [*NO_NUMBERS, 0, 0.0]
for field in ("floor", "weight_decay"):
    BAD[field] = NO_NUMBERS
for field in ("abort_on_divergence", "gradient_checkpointing", "graph"):
    BAD[field] = [*NO_BOOLS, 0, 1]
BAD["optimizer"] = [*NO_NUMBERS, "sgd", "AdamW"]
NO_OPTIONAL_NUMBERS = [value for value in NO_NUMBERS if value is not None]
for field in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
    BAD[field] = [*NO_OPTIONAL_NUMBERS, 0, 0.0]
BAD["riemannian_reg"] = NO_OPTIONAL_NUMBERS
BAD["keep"] = [*NO_NUMBERS, "first", ""]
BAD_VALUES = [(name, value) for name, values in BAD.items() for value in values]


def test_settings_table_of_bad_values_has_every_field():
    assert set(BAD) == {f.name for f in dataclasses.fields(Settings)}


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_settings_error_names_the_bad_field(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be .*got "):
        Settings(**{name: value})


def test_settings_error_for_a_long_value_is_short():
    for name in BAD:
        with pytest.raises(ConfigError) as caught:
            Settings(**{name: "x" * 10_000})
        assert len(str(caught.value)) <= 500


def test_settings_limit_the_sequences_per_step():
    with pytest.raises(ConfigError, match="batch_size x accumulate"):
        Settings(batch_size=2**40, accumulate=2)


def test_settings_allow_zero_where_it_is_meaningful():
    Settings(warmup=0, seed=0, floor=0, weight_decay=0)


# ---- learning ----


def test_train_starts_at_the_uniform_loss_and_lowers_it(tmp_path):
    result = train(full(), TEXT, short(steps=60), tmp_path, held_out=HELD_OUT)
    assert result.losses[0] == pytest.approx(math.log(16), abs=0.1)
    assert result.losses[-1] < result.losses[0] - 0.8
    assert [step for step, _ in result.evaluations] == [0, 60]
    assert result.evaluations[-1][1] < result.evaluations[0][1] - 0.8


@pytest.mark.parametrize("adapt", [False, True], ids=["full", "lora"])
def test_train_learns_one_batch_by_heart(adapt, tmp_path):
    model = with_large_head()
    if adapt:
        config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, config)
    assert learned_loss(model, 300, tmp_path) < 0.01


def with_large_head():
    """A model whose frozen head is large enough to give sure predictions."""
    return CausalLM(dataclasses.replace(CONFIG, initializer_range=1.0))


def learned_loss(model, steps, out):
    """The lowest loss in `steps` steps on one batch."""
    settings = Settings(steps=steps, batch_size=1, context=8, lr=3e-2, warmup=5, threads=1)
    return min(train(model, np.arange(9) * 7 % 16, settings, out).losses)


def test_train_ends_in_eval_mode_and_evaluate_keeps_the_mode(tmp_path):
    model = lora()
    for mode in (True, False):
        model.train(mode)
        evaluate(model, HELD_OUT, 8, threads=1)
        assert {m.training for _, m in model.named_modules()} == {mode}
    train(model.train(), TEXT, short(steps=2), tmp_path, held_out=HELD_OUT)
    assert {m.training for _, m in model.named_modules()} == {False}


def test_train_changes_the_adapter_and_no_bit_of_the_base(tmp_path):
    model = lora()
    before = weights(model)
    train(model, TEXT, SHORT, tmp_path, held_out=HELD_OUT)
    after = weights(model)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in changed)
    assert len(changed) == 14


def test_train_refuses_a_model_with_nothing_to_train(tmp_path):
    model = full()
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(ConfigError, match="nothing to train"):
        train(model, TEXT, SHORT, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- what is measured ----


def test_evaluate_is_the_mean_over_every_token_but_the_first():
    model = CausalLM(CONFIG, seed=3, dtype="float64")
    tokens, context = TEXT[:61], 8
    total = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = model(window[None, :-1]).numpy()[0]  # (T, V)
        for row, target in zip(logits, window[1:], strict=True):
            total += np.logaddexp.reduce(row) - row[target]
    expected = total / (len(tokens) - 1)
    for threads in (1, 2, 4):
        loss = evaluate(model, tokens, context, threads=threads)
        assert loss == pytest.approx(expected, rel=1e-12)
    assert bits_per_byte(math.log(2)) == 1
    assert bits_per_byte(math.log(2) * 6, 3.0) == pytest.approx(2, rel=1e-15)


@pytest.mark.parametrize("threads", [1, 3])
def test_evaluate_with_a_disabled_adapter_disables_it_in_every_thread(threads):
    base, model = full(1), lora(dropout=0.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = p.data + np.float32(0.5)
    expected = evaluate(base, TEXT, 8, threads=1)
    with model.disable_adapter():
        assert evaluate(model, TEXT, 8, threads=threads) == expected
    assert evaluate(model, TEXT, 8, threads=threads) != expected


def test_evaluate_with_a_limit_reads_only_so_many_windows():
    model = full(3)

    def loss(ids, context=8, limit=None):
        return evaluate(model, ids, context, limit=limit, threads=1)

    assert loss(HELD_OUT, limit=1) == loss(HELD_OUT[:9])
    assert loss(HELD_OUT, limit=10**9) == loss(HELD_OUT)
    with pytest.raises(ConfigError):
        loss(HELD_OUT, limit=0)
    with pytest.raises(ConfigError):
        loss(HELD_OUT, context=0)
    with pytest.raises(DataError):
        loss(HELD_OUT[:1])


def test_train_logs_one_line_per_step_and_one_per_evaluation(tmp_path):
    settings = short(eval_every=4, accumulate=2)
    result = train(full(), TEXT, settings, tmp_path, held_out=HELD_OUT, bytes_per_token=2.0)
    log = lines(tmp_path / "log.jsonl")
    assert len(log) == 6
    for step, line in enumerate(log):
        assert list(line) == ["step", "loss", "lr", "grad_norm", "tokens", "seconds"]
        assert line["step"] == step
        assert line["loss"] == result.losses[step]
        assert line["lr"] == 1e-2 * warmup_cosine(step, 6, 2, 0.1)
        assert line["tokens"] == 2 * 4 * 8
        assert line["grad_norm"] > 0
        assert line["seconds"] > 0
    assert len(result.losses) == 6
    evaluations = lines(tmp_path / "eval.jsonl")
    for line in evaluations:
        assert list(line) == ["step", "loss", "bits_per_byte"]
        assert line["bits_per_byte"] == bits_per_byte(line["loss"], 2.0)
    assert [(line["step"], line["loss"]) for line in evaluations] == result.evaluations
    assert [step for step, _ in result.evaluations] == [0, 4, 6]


def test_train_without_resume_starts_new_logs_in_a_used_folder(tmp_path):
    for _ in range(2):
        train(full(), TEXT, short(steps=1), tmp_path, held_out=HELD_OUT)
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [0]
    assert [line["step"] for line in lines(tmp_path / "eval.jsonl")] == [0, 1]


# ---- the same bits ----


@pytest.mark.parametrize("make", [full, lora], ids=["full", "lora"])
def test_train_gives_the_same_bits_for_any_number_of_threads(make, tmp_path):
    results = []
    for threads in (1, 2, 4):
        model = make()
        out = tmp_path / str(threads)
        result = train(model, TEXT, short(threads=threads, eval_every=3), out, held_out=HELD_OUT)
        trained = bits(weights(model))
        results.append((result.losses, result.evaluations, trained, log_without_time(out)))
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_train_with_accumulation_equals_a_larger_batch_bit_for_bit(tmp_path):
    results = []
    for sizes in ({"batch_size": 4, "accumulate": 3}, {"batch_size": 12}):
        model = lora()
        result = train(model, TEXT, short(**sizes), tmp_path)
        results.append((result.losses, bits(weights(model)), log_without_time(tmp_path)))
    assert results[0] == results[1]
    first_line = results[0][2][0]
    assert first_line["tokens"] == 96


RUNS = {}
RUNS["lora"] = (lora, {})
RUNS["lora, accumulated"] = (lora, {"accumulate": 3})
RUNS["saved head"] = (with_head, {})
RUNS["full"] = (full, {})
RUNS["full, accumulated"] = (full, {"accumulate": 3})
RUNS["two tasks"] = (with_tasks, {})
RUNS["full, two texts"] = (full, {})


@pytest.mark.parametrize("name", RUNS)
def test_train_resumed_from_every_checkpoint_gives_the_same_bits(name, tmp_path, monkeypatch):
    make, changes = RUNS[name]
    text, held_out = TEXT, HELD_OUT
    if name.endswith(("tasks", "texts")):
        text, held_out = TEXTS, HELD_OUT_OF_TASKS
    settings = short(**changes, eval_every=2)
    straight = tmp_path / "straight"
    model = make()
    expected = train(model, text, settings, straight, held_out=held_out)
    assert not (straight / "checkpoints").exists()

    monkeypatch.setattr(minilora.training.checkpoints, "KEPT", 100)
    settings = dataclasses.replace(settings, save_every=1)
    saving = tmp_path / "saving"
    train(make(), text, settings, saving, held_out=held_out)
    last = saving / "checkpoints" / f"step-{settings.steps}"
    for step in range(1, settings.steps + 1):
        out = tmp_path / f"from-{step}"
        shutil.copytree(saving, out)
        for later in range(step + 1, settings.steps + 1):
            shutil.rmtree(out / "checkpoints" / f"step-{later}")
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write('{"step": 7, "lo')  # killed while it wrote a line
        resumed = make(seed=77)  # other initial values, which the checkpoint must replace
        threads = dataclasses.replace(settings, threads=1 + step % 2)
        result = train(resumed, text, threads, out, held_out=held_out, resume="auto")
        assert result.losses == expected.losses
        assert result.evaluations == expected.evaluations
        assert bits(weights(resumed)) == bits(weights(model))
        assert log_without_time(out) == log_without_time(straight)
        assert lines(out / "eval.jsonl") == lines(straight / "eval.jsonl")
        assert_same_files(out / "checkpoints" / last.name, last)


def assert_same_files(folder, expected):
    names = sorted(p.relative_to(expected) for p in expected.rglob("*") if p.is_file())
    assert names
    for name in names:
        if name.suffix == ".safetensors":
            assert bits(load_file(folder / name)) == bits(load_file(expected / name))
        else:
            assert (folder / name).read_bytes() == (expected / name).read_bytes()


# ---- resuming another run ----


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    train(lora(), TEXT, short(save_every=3), out)
    shutil.rmtree(out / "checkpoints" / "step-6")
    return out


OTHER = {"batch_size": 5, "context": 7, "lr": 2e-2, "warmup": 3, "floor": 0.2}
OTHER |= {
    "weight_decay": 0.2,
    "max_grad_norm": 2.0,
    "accumulate": 2,
    "seed": 1,
    "shard": 1,
    "part": 4,
    "optimizer": "riemannian",
}
# These need an optimizer, too: test_run_optimizers.py resumes with them.
OF_OPTIMIZERS = {"loraplus_lr_ratio", "loraplus_lr_embedding", "riemannian_reg"}


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(stopped, tmp_path, model, tokens, settings, *names):
    """The message with which a resumed run is refused; nothing may change, and it has `names`."""
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    before = contents(out)
    first = bits(weights(model))
    with pytest.raises(CheckpointError) as caught:
        train(model, tokens, settings, out, resume="auto")
    message = str(caught.value)
    assert "belongs to another run" in message
    for name in names:
        assert name in message
    assert len(message) <= 500
    assert contents(out) == before
    assert bits(weights(model)) == first
    return message


def test_settings_are_all_either_free_or_part_of_the_run():
    of_run = {"steps", "keep", *OTHER}  # "best" needs text that is held out: test_best.py
    known = of_run | {*OF_OPTIMIZERS} | set(Settings.FREE)
    assert known == {f.name for f in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", OTHER)
def test_resume_error_names_a_changed_setting(name, stopped, tmp_path):
    other = OTHER[name]
    message = refused(stopped, tmp_path, lora(), TEXT, short(**{name: other}), name)
    assert repr(other) in message
    before = SHORT.context if name == "part" else getattr(SHORT, name)  # whole sequences
    assert repr(before) in message


def test_resume_error_names_every_changed_setting(stopped, tmp_path):
    refused(stopped, tmp_path, lora(), TEXT, short(lr=2e-2, seed=5), "lr (", "seed (")


@pytest.mark.parametrize(
    ("changes", "done"), [({"floor": 1.0}, 6), ({"warmup": 4}, 5), ({"warmup": 9}, 6)]
)
@pytest.mark.parametrize("steps", [5, 6, 12])
def test_resume_takes_another_number_of_steps_that_changes_nothing_done(
    changes, done, steps, tmp_path
):
    """A constant learning rate, or a warm-up that still goes on: the bits of a straight run."""
    before = short(**changes, save_every=1)
    if steps < done:
        steps = done
    train(lora(), TEXT, before, tmp_path / "out", held_out=HELD_OUT)
    for later in range(done + 1, before.steps + 1):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step-{later}")
    now = dataclasses.replace(before, steps=steps)
    straight, resumed = lora(), lora(seed=5)
    expected = train(straight, TEXT, now, tmp_path / "straight", held_out=HELD_OUT)
    result = train(resumed, TEXT, now, tmp_path / "out", held_out=HELD_OUT, resume="auto")
    assert result.losses == expected.losses
    assert bits(weights(resumed)) == bits(weights(straight))
    assert log_without_time(tmp_path / "out") == log_without_time(tmp_path / "straight")


@pytest.mark.parametrize("steps", [5, 7, 60])
def test_resume_refuses_another_number_of_steps_that_changes_the_steps_done(steps, tmp_path):
    train(lora(), TEXT, short(save_every=1), tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-6")
    message = refused(tmp_path / "stopped", tmp_path, lora(), TEXT, short(steps=steps), "steps (")
    assert f"steps (was 6, now {steps}); resume with the values that it had" in message
    assert "the learning rates of the 5 steps done depend on steps" in message
    assert "with floor = 1 at any time" in message


def test_resume_refuses_fewer_steps_than_are_done(stopped, tmp_path):
    wanted = "step-3' has done 3 steps, more than steps = 2: give at least 3, or begin a new run"
    with pytest.raises(CheckpointError, match=wanted):
        train(
            lora(),
            TEXT,
            short(steps=2, floor=1.0),
            tmp_path,
            resume=stopped / "checkpoints" / "step-3",
        )


def test_resume_refuses_another_number_of_steps_for_adalora(tmp_path):
    """Its budget depends on the number of steps, whatever the learning rate is."""

    def adalora(steps):
        config = AdaLoraConfig(target_r=2, init_r=3, total_step=steps, target_modules="all-linear")
        return get_peft_model(full(), config, seed=1)

    settings = short(floor=1.0, save_every=3)
    train(adalora(6), TEXT, settings, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")
    more = dataclasses.replace(settings, steps=8)
    with pytest.raises(CheckpointError, match=r"another run: total_step \(was 6, now 8\); resume"):
        train(adalora(8), TEXT, more, tmp_path, resume="auto")


@pytest.mark.parametrize(("before", "now"), [("a" * 64, None), (None, "a" * 64), ("a" * 64, "b")])
def test_resume_refuses_a_run_of_another_origin(before, now, tmp_path):
    train(lora(), TEXT, short(save_every=3), tmp_path, origin=before)
    with pytest.raises(CheckpointError, match=r"belongs to another run: starting weights \(was "):
        train(lora(), TEXT, SHORT, tmp_path, resume="auto", origin=now)
    train(lora(), TEXT, SHORT, tmp_path, resume="auto", origin=before)


def test_resume_refuses_a_checkpoint_that_added_gradients_in_another_form(stopped, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    path = out / "checkpoints" / "step-3" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["state"]["run"]["sum"]  # as versions before the tree wrote it
    path.write_text(json.dumps(manifest))
    wanted = "older minilora, which added .* left to right; .* a binary tree .*: finish the run"
    with pytest.raises(CheckpointError, match=wanted):
        train(lora(), TEXT, SHORT, out, resume="auto")
    manifest["state"]["run"]["sum"] = "something later"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"another run: sum \(was 'something later', now"):
        train(lora(), TEXT, SHORT, out, resume="auto")


ONE_TOKEN_CHANGED = np.where(np.arange(400) == 399, TEXT ^ 1, TEXT)
ANOTHER = {}
ANOTHER["shorter text"] = (lora, TEXT[1:], "text")
ANOTHER["one token"] = (lora, ONE_TOKEN_CHANGED, "text")
ANOTHER["rank"] = (functools.partial(lora, r=3), TEXT, "parameters")
ANOTHER["no adapter"] = (full, TEXT, "parameters")
ANOTHER["alpha"] = (functools.partial(lora, alpha=8), TEXT, "lora_alpha")
ANOTHER["dropout"] = (functools.partial(lora, dropout=0.2), TEXT, "lora_dropout")
ANOTHER["base"] = (functools.partial(lora, base=2), TEXT, "frozen weights")


@pytest.mark.parametrize(("model", "tokens", "name"), ANOTHER.values(), ids=ANOTHER)
def test_resume_refuses_another_text_or_model(model, tokens, name, stopped, tmp_path):
    refused(stopped, tmp_path, model(), tokens, SHORT, name)


@pytest.mark.parametrize("base", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_resume_works_for_every_type_of_model(base, tmp_path):
    settings = short(steps=3, save_every=1)

    def model(seed=1):
        config = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[0, 7])
        return get_peft_model(CausalLM.from_pretrained(GOLDEN / base), config, seed=seed)

    expected = model()
    train(expected, TEXT, settings, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-3")
    resumed = model(seed=5)
    train(resumed, TEXT, settings, tmp_path, resume="auto")
    assert bits(weights(resumed)) == bits(weights(expected))


def test_resume_allows_free_settings_to_change(stopped, tmp_path):
    out = tmp_path / "out"
    model = lora()
    expected = train(model, TEXT, SHORT, tmp_path / "straight")
    shutil.copytree(stopped, out)
    resumed = lora(seed=5)
    free = short(threads=3, eval_every=2, save_every=2)
    assert train(resumed, TEXT, free, out, resume="auto").losses == expected.losses
    assert bits(weights(resumed)) == bits(weights(model))


DAMAGED_STATES = [{"run": None}, {"run": [1]}]
DAMAGED_STATES += [{"optimizer": 3}, {"optimizer": {"optimizer": "SGD", "steps": {}}}]
DAMAGED_STATES += [{"losses": None}, {"losses": ["a", "b", "c"]}, {"losses": [1.0, 2.0]}]
DAMAGED_STATES += [{"evaluations": [[1]]}, {"evaluations": 5}]


@pytest.mark.parametrize("change", DAMAGED_STATES, ids=repr)
def test_resume_refuses_a_damaged_state(change, stopped, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    path = out / "checkpoints" / "step-3" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"] |= change
    path.write_text(json.dumps(manifest))
    model = lora()
    first = bits(weights(model))
    with pytest.raises(CheckpointError):
        train(model, TEXT, SHORT, out, resume="auto")
    assert bits(weights(model)) == first


# ---- NaN and infinity ----


@pytest.fixture
def before_each_step(monkeypatch):
    """(weights before the gradients of each step, changes of what a step returns, by step)"""
    seen: list[dict] = []
    troubles: dict[int, object] = {}
    plain = ShardedStep.gradients_by_task

    def watched(self, batches, divisors, params, seed, step):
        if observer.get():  # the step is being explained, not taken
            return plain(self, batches, divisors, params, seed, step)
        seen.append(weights(self.model))
        result = plain(self, batches, divisors, params, seed, step)
        return troubles[step](*result) if step in troubles else result

    monkeypatch.setattr(ShardedStep, "gradients_by_task", watched)
    return seen, troubles


def nan_loss(loss, grads):
    return loss * math.nan, grads


def infinite_loss(loss, grads):
    return loss * math.inf, grads


def infinite_gradient(loss, grads):
    grads[-1].flat[0] = np.inf
    return loss, grads


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_train_stops_in_the_first_step_on_a_base_that_is_not_finite(
    value, tmp_path, before_each_step
):
    model = lora()
    model.get_base_model().model.norm.weight.data[3] = value
    why = (
        r"step 0: .*before the step, values that are not finite were in .*norm\.weight \(1 of \d+\)"
    )
    with pytest.raises(NonFiniteError, match=why):
        train(model, TEXT, SHORT, tmp_path)
    seen, _ = before_each_step
    assert bits(weights(model)) == bits(seen[-1])
    [line] = lines(tmp_path / "log.jsonl")
    assert (line["step"], line["loss"]) == (0, "nan")
    assert not (tmp_path / "checkpoints").exists()  # nothing was worth saving


@pytest.mark.parametrize(("save_every", "saved_steps"), [(None, [4]), (2, [2, 4]), (3, [3, 4])])
@pytest.mark.parametrize("trouble", [nan_loss, infinite_loss, infinite_gradient])
def test_train_stops_in_the_step_whose_loss_or_gradient_is_not_finite(
    trouble, save_every, saved_steps, tmp_path, before_each_step, monkeypatch
):
    seen, troubles = before_each_step
    troubles[4] = trouble
    model = full()
    saves = []
    plain = minilora.training.run.save_checkpoint

    def save(out, step, *rest):
        saves.append(step)
        return plain(out, step, *rest)

    monkeypatch.setattr(minilora.training.run, "save_checkpoint", save)
    settings = short(save_every=save_every, seed=7)
    why = r"step 4.*batch 4 with seed 7.*taken again, the step is finite"
    with pytest.raises(NonFiniteError, match=why) as caught:
        train(model, TEXT, settings, tmp_path)
    assert len(str(caught.value)) <= 500
    assert len(seen) == 5
    assert bits(weights(model)) == bits(seen[-1])
    log = (tmp_path / "log.jsonl").read_bytes().splitlines()
    records = [parse_json(line, "a line") for line in log]
    assert [line["step"] for line in records] == [0, 1, 2, 3, 4]
    first, last = records[0], records[-1]
    assert not math.isfinite(float(last["loss"]) + float(last["grad_norm"]))
    assert last.keys() == first.keys() - {"seconds"}
    assert saves == saved_steps  # the last good state, once
    saved = load_file(tmp_path / "checkpoints" / "step-4" / "model.safetensors")
    assert bits(saved) == bits(weights(model))
    assert all(np.isfinite(a).all() for a in saved.values())

    # Once the trouble is over, the resumed run has every line of the log once, and the same bits.
    troubles.clear()
    resumed = full(seed=5)
    straight = full()
    train(resumed, TEXT, settings, tmp_path, resume="auto")
    train(straight, TEXT, settings, tmp_path / "straight")
    assert bits(weights(resumed)) == bits(weights(straight))
    assert log_without_time(tmp_path) == log_without_time(tmp_path / "straight")


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*abort-on-divergence")
def test_train_with_a_huge_learning_rate_stops_in_the_step_that_overflows(
    tmp_path, before_each_step
):
    model = full()
    settings = short(lr=1e30, warmup=0, max_grad_norm=1e30)
    with pytest.raises(NonFiniteError) as caught:
        train(model, TEXT, settings, tmp_path)
    seen, _ = before_each_step
    last = len(seen) - 1
    why = rf"step {last}:.*; first (NaN|infinity): .* \w+\.py:\d+ in "
    assert re.search(why, str(caught.value))
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == list(range(last + 1))
    assert bits(weights(model)) == bits(seen[-1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_evaluate_raises_for_a_loss_that_is_not_finite(tmp_path):
    model = full()
    model.model.norm.weight.data[0] = np.nan
    with pytest.raises(NonFiniteError, match="held-out"):
        evaluate(model, HELD_OUT, 8, threads=1)
    with pytest.raises(NonFiniteError, match="held-out"):
        train(model, TEXT, SHORT, tmp_path, held_out=HELD_OUT)


# ---- divergence ----

HEALTHY = [2.5] * 10 + [2.0 + 0.4 * math.sin(step) for step in range(140)]


def first_reason(losses, **options):
    """(the first step at which the run counts as diverged, the reason), or None."""
    for step in range(len(losses)):
        reason = divergence(losses[: step + 1], 16, **options)
        if reason:
            return step, reason
    return None


def test_divergence_needs_fifty_steps_above_three_times_the_median():
    assert first_reason(HEALTHY) is None
    assert (
        first_reason([*HEALTHY, *[7.0] * 49, 2.0, *[7.0] * 49]) is None
    )  # below ln(16) + 5 = 7.77
    step, reason = first_reason([*HEALTHY, *[7.0] * 60])
    assert step == 199
    assert "for 50 steps" in reason
    assert first_reason([1.0] * 50 + [3.0] * 60) is None
    assert first_reason([1.0] * 50 + [3.01] * 60)[0] == 99
    assert first_reason([1.0] * 49 + [3.01] * 49) is None
    assert first_reason([1.0] * 30 + [3.01] * 75)[0] == 99  # fifty steps must precede
    assert first_reason([0.0] * 200) is None
    assert first_reason([*([1e-4] * 80), 0.9, *([1e-4] * 80)]) is None  # a spike


def test_divergence_after_the_warm_up_is_five_nats_above_guessing():
    losses = [2.0, 2.0, math.log(16) + 5.01, 2.0, math.log(16) + 4.99, math.log(16) + 5.01]
    assert first_reason(losses)[0] == 2
    assert first_reason(losses, warmup=2)[0] == 2
    step, reason = first_reason(losses, warmup=3)
    assert step == 5
    assert "7.773" in reason
    assert first_reason(losses, warmup=6) is None


@pytest.fixture
def diverging_from_step_3(before_each_step):
    """From step 3 on the loss is 100."""
    _, troubles = before_each_step
    for step in range(3, 1000):
        troubles[step] = lambda loss, grads: (0 * loss + 100, grads)


def test_train_warns_once_of_a_divergence(diverging_from_step_3, tmp_path):
    settings = short(save_every=2)
    with pytest.warns(UserWarning, match="--abort-on-divergence would stop here") as seen:
        result = train(lora(), TEXT, settings, tmp_path)
    assert len(seen) == 1
    assert str(seen[0].message).startswith("step 3: the loss (100) is above 7.773")
    assert len(result.losses) == 6


def test_train_aborts_on_divergence_if_set(diverging_from_step_3, tmp_path):
    settings = short(save_every=2, abort_on_divergence=True)
    why = r"step 3: the loss diverged .*: the loss \(100\) .*; the latest checkpoint is .*step-2'"
    with pytest.raises(DivergenceError, match=why) as caught:
        train(lora(), TEXT, settings, tmp_path)
    assert caught.value.exit_code == 5
    assert len(str(caught.value)) <= 500
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [0, 1, 2, 3]
    assert checkpoints(tmp_path) == ["step-2"]
    without = dataclasses.replace(settings, save_every=None)
    with pytest.raises(DivergenceError, match="no checkpoint was saved"):
        train(lora(), TEXT, without, tmp_path / "none")


def test_train_that_learns_does_not_diverge(tmp_path):
    """Ten seeds here; benchmarks/soak.py has a hundred runs."""
    settings = Settings(steps=150, batch_size=2, context=8, lr=3e-2, warmup=5, threads=1)
    for seed in range(10):
        settings = dataclasses.replace(settings, seed=seed, abort_on_divergence=True)
        result = train(full(seed), TEXT, settings, tmp_path / str(seed))
        assert len(result.losses) == 150


# ---- signals ----


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at({step: [signals]}): signals that arrive while the batch of a step is prepared."""
    plain = minilora.training.run.Windows.batch

    def arrange(plan):
        def batch(self, step):
            for number in plan.get(step, ()):
                signal.raise_signal(number)
            return plain(self, step)

        monkeypatch.setattr(minilora.training.run.Windows, "batch", batch)

    return arrange


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_train_on_a_signal_ends_the_step_and_saves_it(number, step, tmp_path, signal_at):
    out = tmp_path / "out"
    model = lora()
    expected = train(model, TEXT, SHORT, tmp_path / "straight", held_out=HELD_OUT)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(number)
    signal_at({step: [number]})
    with pytest.raises(Interrupted, match=number.name) as caught:
        train(lora(), TEXT, SHORT, out, held_out=HELD_OUT)
    assert caught.value.exit_code == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(number)) == handlers
    assert checkpoints(out) == [f"step-{step + 1}"]
    signal_at({})
    resumed = lora(seed=5)
    result = train(resumed, TEXT, SHORT, out, held_out=HELD_OUT, resume="auto")
    assert result.losses == expected.losses
    assert result.evaluations == expected.evaluations
    assert bits(weights(resumed)) == bits(weights(model))
    assert log_without_time(out) == log_without_time(tmp_path / "straight")


def test_train_on_a_signal_in_the_last_step_does_not_continue(tmp_path, signal_at):
    signal_at({5: [signal.SIGINT]})
    with pytest.raises(Interrupted, match="stopped after 6 steps"):
        train(lora(), TEXT, SHORT, tmp_path)
    assert len(train(lora(), TEXT, SHORT, tmp_path, resume="auto").losses) == 6


@pytest.fixture
def signal_in_evaluation(monkeypatch):
    """signal_in_evaluation(at, number): a signal at the second window of evaluation number `at`.

    The held-out text has many windows. The returned list has, for each evaluation, how many were
    read.
    """
    plain = minilora.training.loop.evaluation_windows

    def arrange(at, number):
        windows_read = []

        def windows(tokens, context, batch_size, limit=None):
            windows_read.append(0)
            for batch in plain(tokens, context, 1, limit):
                windows_read[-1] += 1
                if windows_read[-1] == 2 and len(windows_read) - 1 == at:
                    signal.raise_signal(number)
                yield batch

        monkeypatch.setattr(minilora.training.loop, "evaluation_windows", windows)
        return windows_read

    return arrange


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("at", "step"), [(0, 0), (1, 2), (2, 4), (3, 6)])
def test_train_on_a_signal_ends_an_evaluation_that_a_resumed_run_repeats(
    at, step, number, tmp_path, signal_in_evaluation, monkeypatch
):
    settings = short(eval_every=2, save_every=4)
    out = tmp_path / "out"
    straight = lora()
    signal_in_evaluation(99, number)
    expected = train(straight, TEXT, settings, tmp_path / "straight", held_out=TEXT)
    windows_read = signal_in_evaluation(at, number)
    with pytest.raises(Interrupted, match=f"stopped after {step} steps"):
        train(lora(), TEXT, settings, out, held_out=TEXT)
    assert windows_read[-1] <= 2 + 2 * SHORT.threads  # of fifty
    assert len(lines(out / "eval.jsonl")) == at
    for _ in range(2):  # a run that has ended may be resumed as well, and changes nothing
        signal_in_evaluation(99, number)
        resumed = lora(seed=5)
        result = train(resumed, TEXT, settings, out, held_out=TEXT, resume="auto")
        assert result.losses == expected.losses
        assert result.evaluations == expected.evaluations
        assert bits(weights(resumed)) == bits(weights(straight))
        assert log_without_time(out) == log_without_time(tmp_path / "straight")
        assert lines(out / "eval.jsonl") == lines(tmp_path / "straight" / "eval.jsonl")


def test_evaluate_returns_nan_when_it_is_stopped():
    assert math.isnan(evaluate(full(), TEXT, 8, threads=1, stopped=[signal.SIGINT]))


def test_train_that_is_resumed_and_stopped_at_once_saves_nothing(tmp_path, signal_in_evaluation):
    settings = short(eval_every=4, save_every=2)
    train(lora(), TEXT, settings, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")
    before = (tmp_path / "checkpoints" / "step-4" / "manifest.json").stat().st_mtime_ns
    signal_in_evaluation(0, signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped after 4 steps, saved in '.*step-4'"):
        train(lora(), TEXT, settings, tmp_path, held_out=TEXT, resume="auto")
    assert (tmp_path / "checkpoints" / "step-4" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_on_a_signal_while_saving_finishes_the_checkpoint(number, tmp_path, monkeypatch):
    plain = minilora.training.run.save_checkpoint

    def save(*arguments):
        signal.raise_signal(number)
        return plain(*arguments)

    monkeypatch.setattr(minilora.training.run, "save_checkpoint", save)
    with pytest.raises(Interrupted, match=r"stopped after 2 steps, saved in '.*step-2'") as caught:
        train(lora(), TEXT, short(save_every=2), tmp_path)
    assert caught.value.exit_code == 128 + number
    assert find_checkpoint("auto", tmp_path)[1]["step"] == 2


@pytest.mark.parametrize("where", ["_sha256", "write_json", "sync_folder"])
def test_train_on_a_second_signal_while_saving_leaves_a_sound_checkpoint(
    where, tmp_path, monkeypatch
):
    settings = short(save_every=2)
    train(lora(), TEXT, settings, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")
    plain = getattr(minilora.training.checkpoints, where)

    def hasty(*arguments):
        if "tmp-" in str(arguments[0]) or where == "sync_folder":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(minilora.training.checkpoints, where, hasty)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(lora(), TEXT, settings, tmp_path, resume="auto")
    assert caught.value.args == (signal.SIGTERM,)
    monkeypatch.undo()
    assert find_checkpoint("auto", tmp_path)[1]["step"] == (6 if where == "sync_folder" else 4)
    assert not [name for name in checkpoints(tmp_path) if ".tmp-" in name]
    assert len(train(lora(), TEXT, settings, tmp_path, resume="auto").losses) == 6


def test_train_on_a_second_signal_stops_at_once(tmp_path, signal_at):
    signal_at({3: [signal.SIGINT, signal.SIGINT]})
    before = signal.getsignal(signal.SIGINT)  # in a background job it may be ignored
    with pytest.raises(KeyboardInterrupt):
        train(lora(), TEXT, short(save_every=2), tmp_path)
    assert checkpoints(tmp_path) == ["step-2"]
    assert signal.getsignal(signal.SIGINT) is before


def test_train_in_another_thread_leaves_signals_alone(tmp_path):
    results = []

    def work():
        results.append(train(lora(), TEXT, SHORT, tmp_path / "thread"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    [result] = results
    assert result.losses == train(lora(), TEXT, SHORT, tmp_path / "main").losses


KILLED = """
import os, signal, sys
from minilora.data import Windows
from minilora.cli import main
plain = Windows.batch
def batch(self, step):
    if step == 3:
        os.kill(os.getpid(), int(sys.argv[1]))
    return plain(self, step)
Windows.batch = batch
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_pretrain_command_continues_after_a_signal(number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(bytes(range(97, 123)) * 40)
    model = ["--hidden-size=16", "--intermediate-size=16"]
    model += ["--num-hidden-layers=1", "--num-attention-heads=2"]
    arguments = ["pretrain", "--data=book.txt", "--steps=6", "--batch-size=4", *model]
    arguments += ["--context=8", "--threads=2"]
    command = [sys.executable, "-c", KILLED, str(int(number)), *arguments, "--out", "killed"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == code, killed.stderr
    assert "Traceback" not in killed.stderr
    last = killed.stderr.splitlines()[-1]
    assert last.startswith(f"minilora: interrupted: {number.name}: stopped after 4 steps")
    assert checkpoints(Path("killed")) == ["step-4"]

    from minilora.cli import main

    assert main([*arguments, "--out", "straight"]) == 0
    assert main([*arguments, "--out", "killed", "--resume", "auto"]) == 0
    for name in ("model.safetensors", "config.json", "eval.jsonl"):
        assert Path("killed", name).read_bytes() == Path("straight", name).read_bytes()
    assert log_without_time(Path("killed")) == log_without_time(Path("straight"))


@pytest.mark.parametrize("names", [["default", "task"], ["task"]])
def test_resume_continues_every_active_adapter(names, tmp_path):
    def model():
        made = lora()
        made.add_adapter("task", dataclasses.replace(made.peft_config["default"]), seed=1)
        made.set_adapter(names)
        return made

    settings = short(save_every=2)
    straight = model()
    train(straight, TEXT, settings, tmp_path)
    resumed = model()
    train(resumed, TEXT, settings, tmp_path, resume=tmp_path / "checkpoints" / "step-4")
    for name in names:
        assert bits(resumed.state_dict(name)) == bits(straight.state_dict(name))


def test_train_evaluates_each_task_with_the_same_weight(tmp_path):
    model = with_tasks()
    result = train(model, TEXTS, SHORT, tmp_path, held_out=HELD_OUT_OF_TASKS)
    alone = {}
    for task, ids in HELD_OUT_OF_TASKS.items():
        with model.task(task):
            alone[task] = evaluate(model, ids, SHORT.context)
    last = lines(tmp_path / "eval.jsonl")[-1]
    assert last["tasks"] == pytest.approx(alone, rel=1e-6)  # `train` cut other shards
    assert last["loss"] == result.evaluations[-1][1] == math.fsum(last["tasks"].values()) / 2


def test_train_refuses_texts_that_do_not_fit_the_tasks(tmp_path):
    with pytest.raises(ConfigError, match="no task 'down'; choose from up, left"):
        train(with_tasks(tasks=("up", "left")), TEXTS, SHORT, tmp_path / "a")
    with pytest.raises(ConfigError, match="cannot hold one of each of 2 tasks"):
        train(with_tasks(), TEXTS, short(batch_size=1), tmp_path / "b")
    with pytest.raises(DataError, match=r"task 'down': .* tokens"):
        train(with_tasks(), {**TEXTS, "down": TEXT[:5]}, SHORT, tmp_path / "c")


def test_resume_refuses_tasks_with_other_adapters(tmp_path):
    settings = short(save_every=2)
    train(with_tasks(), TEXTS, settings, tmp_path)
    other = with_tasks()
    other.tasks["up"] = ("up",)
    with pytest.raises(CheckpointError, match="belongs to another run: tasks"):
        train(other, TEXTS, settings, tmp_path, resume="auto")


def test_train_refuses_a_parameter_that_nothing_would_save(tmp_path):
    model = lora()
    model.get_base_model().model.norm.weight.requires_grad = True
    why = r"model\.norm\.weight would train, but belongs to no active adapter"
    with pytest.raises(ConfigError, match=why):
        train(model, TEXT, SHORT, tmp_path)


# ---- the folder, and the disk ----


def test_train_refuses_a_folder_that_another_run_uses(tmp_path, monkeypatch):
    settings = short(save_every=2)
    seen = []
    train(full(), TEXT, short(save_every=2, steps=2), tmp_path / "other")
    plain = Run.step

    def refused_elsewhere():
        with pytest.raises(LockError):
            train(full(), TEXT, settings, tmp_path)
        folder, _ = find_checkpoint("auto", tmp_path)  # readers may
        assert folder.is_dir()

    def step(self, sharded):
        if self.done == 2:
            with ThreadPoolExecutor(1) as other:
                other.submit(refused_elsewhere).result()
            seen.append(self.done)
        assert (tmp_path / LOCK).exists()
        return plain(self, sharded)

    monkeypatch.setattr(Run, "step", step)
    with locked(tmp_path):  # as a command does
        train(full(), TEXT, settings, tmp_path)
        assert (tmp_path / LOCK).exists()
    train(full(), TEXT, settings, tmp_path)
    assert len(seen) == 2
    assert not (tmp_path / LOCK).exists()


def test_train_makes_its_folder_and_leaves_no_lock(tmp_path):
    out = tmp_path / "a" / "b"
    train(full(), TEXT, short(steps=1), out)
    assert sorted(p.name for p in out.iterdir()) == ["eval.jsonl", "log.jsonl"]


@pytest.mark.parametrize("make", [full, lora])
@pytest.mark.parametrize("wrong", [no_room, no_disk, stay_full])
def test_run_save_can_be_repeated_after_any_failure(make, wrong, tmp_path):
    """The run in memory is as it was, and goes on to the same end as one that had no trouble."""
    expected, straight = full_run(make(), tmp_path / "straight")
    with Disk() as disk:
        full_run(make(), tmp_path / "counted", save_at=3)
    assert disk.changes >= 20
    for at in range(1, disk.changes + 1, 1 if wrong is no_room else 3):
        losses, model = full_run(make(), tmp_path / f"out-{at}", save_at=3, fault=(at, wrong))
        assert losses == expected
        assert bits(weights(model)) == bits(weights(straight))


def full_run(model, out, save_at=None, fault=None):
    """(losses, model) of a run that saves after `save_at` steps, first on a disk with a `fault`."""
    out.mkdir()
    run = Run(model.train(), TEXT, SHORT, out)

    def state():
        return bits(weights(model)), repr(run.optimizer.state_dict()), list(run.losses)

    with ShardedStep(model, 1, 2) as sharded:
        while run.done < SHORT.steps:
            run.step(sharded)
            if run.done == save_at:
                before = state()
                if fault:
                    with Disk(*fault), contextlib.suppress(OSError):
                        run.save()
                assert state() == before
                with Disk() if fault else contextlib.nullcontext():
                    run.save()
                _, manifest = find_checkpoint("auto", out)
                assert manifest["step"] == save_at
                assert checkpoints(out) == [f"step-{save_at}"]
    return run.losses, model


def test_train_syncs_the_logs_before_each_checkpoint(tmp_path, monkeypatch):
    order = []
    plain_save = minilora.training.run.save_checkpoint
    plain_sync = Log.sync

    def save(*args):
        order.append("save")
        return plain_save(*args)

    def sync(log):
        order.append("sync")
        plain_sync(log)

    monkeypatch.setattr(minilora.training.run, "save_checkpoint", save)
    monkeypatch.setattr(Log, "sync", sync)
    train(full(), TEXT, short(save_every=3), tmp_path)
    assert order == ["sync", "sync", "save"] * 2


def test_train_checks_the_free_space_before_the_first_step(tmp_path, monkeypatch):
    def disk_usage(path):
        return shutil._ntuple_diskusage(10**9, 10**9, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    size = sum(p.size for p in full().parameters()) * 4
    for save_every, needed in ((None, size), (2, 3 * size)):
        settings = short(save_every=save_every)
        out = tmp_path / str(save_every)
        free = needed - 1
        with pytest.raises(OSError, match="saving takes") as caught:
            train(full(), TEXT, settings, out)
        assert caught.value.errno == errno.ENOSPC
        assert not list(out.iterdir())
        free = needed
        train(full(), TEXT, settings, out)


def test_train_removes_what_a_killed_run_left(tmp_path):
    stale = tmp_path / "checkpoints" / "step-9.tmp-123"
    stale.mkdir(parents=True)
    train(full(), TEXT, short(steps=1), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_train_does_not_depend_on_the_clock(tmp_path, monkeypatch):
    out = tmp_path / "out"
    ticks = itertools.count(1e9, -3600)

    def bar(show, **options):
        return tqdm.tqdm(**options, disable=False, file=io.StringIO())

    train(lora(), TEXT, SHORT, tmp_path / "straight")
    monkeypatch.setattr(time, "time", lambda: next(ticks))
    monkeypatch.setattr(minilora.training.loop, "progress_bar", bar)
    train(lora(), TEXT, short(save_every=2), out)
    for p in (out / "checkpoints").rglob("*"):
        os.utime(p, (next(ticks), next(ticks)))
    _, manifest = find_checkpoint("auto", out)
    assert manifest["step"] == 6
    assert log_without_time(out) == log_without_time(tmp_path / "straight")


def test_resume_warns_of_another_numpy(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "step-3" / "manifest.json"
    path.write_text(path.read_text().replace(f'"{np.__version__}"', '"1.0.0"'))
    with pytest.warns(UserWarning, match=r"step-3' was written with NumPy '1\.0\.0', this is"):
        train(lora(), TEXT, SHORT, tmp_path / "out", resume="auto")


SEEDED = """
import dataclasses, hashlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_loop import *
model = lora()
result = train(model, TEXT, short(threads=int(sys.argv[2]), shard=1), Path(sys.argv[3]))
print(hashlib.sha256(repr((result.losses, bits(weights(model)))).encode()).hexdigest())
"""


def test_train_gives_the_same_bits_in_processes_with_other_threads_and_hash_seeds(tmp_path):
    folder = str(Path(__file__).parent)
    processes = []
    for threads, seed in ((1, "0"), (2, "1"), (4, "random"), (1, "random")):
        out = str(tmp_path / f"{seed}-{threads}")
        command = [sys.executable, "-c", SEEDED, folder, str(threads), out]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OPENBLAS_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
    sums = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert len(sums) == 1
    assert len(sums.pop()) == 64


ADAPTERS = {}


def adapter(name, target_modules="all-linear", **fields):
    ADAPTERS[name] = {"target_modules": target_modules, **fields}


adapter("q and v", ["q_proj", "v_proj"])
adapter("all, gaussian", init_lora_weights="gaussian")
adapter("rslora", use_rslora=True)
adapter("dora", use_dora=True)
adapter("with biases", bias="all")
adapter("a saved head", modules_to_save=["lm_head"])
adapter("patterns", rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 1})


@pytest.mark.parametrize("name", ADAPTERS)
def test_train_changes_no_bit_outside_any_kind_of_adapter(name, tmp_path):
    model = get_peft_model(full(), LoraConfig(r=4, lora_dropout=0.1, **ADAPTERS[name]))
    declared = {key for key, p in model.named_parameters() if p.requires_grad}
    before = weights(model)
    train(model, TEXT, SHORT, tmp_path, held_out=HELD_OUT)
    after = weights(model)
    changed = {key for key in before if before[key].tobytes() != after[key].tobytes()}
    assert changed == declared
    model.merge_adapter()
    model.unmerge_adapter()
    assert bits(weights(model)) == bits(after)


LEARNERS = [name for name in ADAPTERS if name != "q and v"]  # two maps of one layer are too few


@pytest.mark.parametrize("name", LEARNERS)
def test_train_learns_a_batch_by_heart_with_every_kind_of_adapter(name, tmp_path):
    config = LoraConfig(r=8, lora_alpha=8, **ADAPTERS[name])
    model = get_peft_model(with_large_head(), config)
    assert learned_loss(model, 600, tmp_path) < 0.01


def test_train_memory_does_not_grow_with_the_steps(tmp_path):
    """A few hundred steps, counted by tracemalloc; benchmarks/soak.py takes twenty thousand."""
    seen = []
    plain = Run.step

    def step(self, sharded):
        if self.done in (100, 300):
            gc.collect()
            size, _ = tracemalloc.get_traced_memory()
            descriptors = len(os.listdir("/proc/self/fd")) if PROC else 0
            seen.append((size, descriptors))
        return plain(self, sharded)

    settings = short(steps=301, eval_every=50, save_every=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        tracemalloc.start()
        try:
            train(lora(), TEXT, settings, tmp_path, held_out=HELD_OUT)
        finally:
            tracemalloc.stop()
    (size, descriptors), (later_size, later_descriptors) = seen
    assert later_descriptors == descriptors
    assert (later_size - size) / 200 < 100  # bytes per step; a loss in its list takes 32


def test_train_takes_a_folder_as_a_string(tmp_path):
    out = str(tmp_path / "out")
    train(lora(), TEXT, short(save_every=2), out)
    folder, manifest = find_checkpoint("auto", out)
    assert manifest["step"] == 6
    assert folder.parent.parent == tmp_path / "out"


def test_train_that_is_interrupted_leaves_its_model_in_eval_mode(tmp_path):
    model = lora()
    with stop_signals(report=False) as received:
        received.append(signal.SIGINT)
        with pytest.raises(Interrupted):
            train(model, TEXT, SHORT, tmp_path / "out")
    assert not model.training
    assert (tmp_path / "out" / "checkpoints").is_dir()
