"""The ladder of learning rates: the search on known curves, and short runs of small models."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import CausalLM, LoraConfig, MultiTask, TransformerConfig, get_peft_model, quantize
from minilora.errors import ConfigError
from minilora.lora import get_multitask_model
from minilora.training.ladder import (
    FACTOR,
    HELD_OUT,
    ORDERS,
    RUNGS,
    SHARE,
    SHORTEST,
    TRAINING,
    Arm,
    Rates,
    ShortRuns,
    climb,
    find_rates,
    interval,
    shorten,
)
from minilora.training.methods import adapter_config
from minilora.training.run import Run
from minilora.training.settings import Settings

CONFIG = TransformerConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    initializer_range=0.3,
)
WHOLE = Settings(steps=4, batch_size=2, context=4, lr=0.05, warmup=1, threads=1)
TEXT = np.tile([1, 2, 3, 4, 5], 12)  # easy to learn
LORA = LoraConfig(r=2, target_modules="all-linear")
UNSEEN = np.tile([2, 3, 4, 5, 1], 6)


# ---- the search ----------------------------------------------------------------------------------


def valley(best: float, lost: float = math.inf, calls: list[tuple[int, int]] | None = None):
    """Short runs whose loss is the square of the distance from `best`; None from `lost` on."""

    def measure(rung: int, order: int) -> Arm:
        if calls is not None:
            calls.append((rung, order))
        return Arm(FACTOR**rung, order, None if rung >= lost else (rung - best) ** 2, [])

    return measure


@given(st.floats(-RUNGS + 1.4, RUNGS - 1.4))
def test_climb_meets_the_lowest_loss_and_has_both_neighbours_of_it(best):
    calls: list[tuple[int, int]] = []
    arms, bests = climb(valley(best, calls=calls))
    assert len(bests) == ORDERS
    assert len(set(calls)) == len(calls) == len(arms), "no run is made twice"
    for order, rung in enumerate(bests):
        assert abs(rung - best) <= 0.5
        assert {(rung - 1, order), (rung, order), (rung + 1, order)} <= set(calls)
    second = [rung for rung, order in calls if order == 1]
    assert sorted(second) == [bests[0] - 1, bests[0], bests[0] + 1]


@given(st.integers(-RUNGS + 2, RUNGS - 2), st.integers(1, 3))
def test_climb_turns_back_from_rates_at_which_training_is_lost(best, distance):
    _, bests = climb(valley(best, lost=best + distance))
    assert bests == [best] * ORDERS
    _, bests = climb(valley(best + 2, lost=best + 1))  # the lowest point itself is beyond them
    assert bests == [best] * ORDERS


def test_climb_finds_the_best_rung_of_each_order():
    def measure(rung: int, order: int) -> Arm:
        return valley((-3, 2)[order])(rung, order)

    assert climb(measure)[1] == [-3, 2]


@pytest.mark.parametrize("best", [-RUNGS - 1, RUNGS + 1])
def test_climb_ends_where_no_rate_between_is_best(best):
    calls: list[tuple[int, int]] = []
    with pytest.raises(ConfigError, match=r"the last rate that they try.* a number as --lr"):
        climb(valley(best, calls=calls))
    assert len(calls) <= RUNGS + 2
    with pytest.raises(ConfigError, match="each short run was lost, also at the lowest rate"):
        climb(valley(0, lost=-math.inf))


@given(st.lists(st.integers(-RUNGS, RUNGS), min_size=1, max_size=3))
def test_interval_reaches_from_the_lowest_best_rung_above_the_highest(bests):
    assert interval(bests) == (min(bests), max(bests) + 1)


@given(st.floats(1e-6, 1.0), st.integers(0, 6))
def test_rates_train_at_the_middle_of_the_interval(low, rungs):
    high = low * FACTOR**rungs
    middle = Rates([], 1, 1, HELD_OUT, low, high).middle
    assert middle == pytest.approx(math.sqrt(low * high), rel=5e-3)
    assert float(repr(middle)) == middle
    assert len(f"{middle:g}") <= len("1.23e-06")


# ---- the schedule --------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(0, 3_000))
def test_shorten_keeps_the_form_of_the_schedule(steps, warmup):
    whole = Settings(steps=steps, warmup=warmup, eval_every=5, save_every=5, keep="best")
    short = shorten(whole)
    assert short.steps == max(steps // SHARE, min(SHORTEST, steps))
    assert 2 * abs(short.warmup * steps - warmup * short.steps) <= steps
    rest = {"steps": short.steps, "warmup": short.warmup}
    rest |= {"eval_every": None, "save_every": None, "keep": "last"}
    assert short == dataclasses.replace(whole, **rest)


def model_of(method: str = "lora", quantization: str = "none", steps: int = WHOLE.steps, **fields):
    model = CausalLM(CONFIG, seed=0)
    if method != "full":
        fields = {"target_modules": "all-linear", **fields}
    if quantization != "none":
        quantize(model, quantization)
    config = adapter_config(method, quantization, fields, steps)
    return model if config is None else get_peft_model(model, config, seed=0)


@pytest.fixture
def steps_taken(monkeypatch):
    """(batch, learning rate, the optimiser's rates) of every step that is taken."""
    taken = []
    step = Run.step

    def noted(self, sharded):
        line = step(self, sharded)
        ids = self.batch(line["step"]).ids.tolist()
        taken.append(
            (self.settings, ids, line["lr"], [group["lr"] for group in self.optimizer.groups])
        )
        return line

    monkeypatch.setattr(Run, "step", noted)
    return taken


def test_short_runs_have_the_batches_and_the_schedule_of_the_run(steps_taken):
    whole = dataclasses.replace(WHOLE, steps=40, warmup=8, floor=0.25)
    runs = ShortRuns(model_of(r=2), TEXT, shorten(whole), UNSEEN)
    for rate, order in ((0.01, 0), (0.02, 0), (0.01, 1)):
        runs.train(rate, order)
    first, second, other = (steps_taken[at : at + 20] for at in (0, 20, 40))
    batches = [[ids for _, ids, _, _ in run] for run in (first, second, other)]
    windows = Run(model_of(r=2), TEXT, whole, "none").windows
    assert batches[0] == [windows.batch(step).ids.tolist() for step in range(20)]
    assert batches[1] == batches[0]
    assert batches[2] != batches[0]
    rates = [lr for _, _, lr, _ in first]
    assert rates[3] == max(rates) == 0.01, "the warm-up is half as long, as the run is"
    assert rates[0] == pytest.approx(0.01 / 4)
    assert rates[-1] == pytest.approx(0.25 * 0.01)
    assert [2 * lr for lr in rates] == pytest.approx([lr for _, _, lr, _ in second])


# ---- short runs ----------------------------------------------------------------------------------

METHODS = {
    "lora": {"r": 2, "lora_dropout": 0.2},
    "pissa": {"r": 2, "init_lora_weights": "pissa"},
    "adalora": {"r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "dora": {"r": 2},
    "full": {},
    "vera": {"r": 4},
    "nf4": {"r": 2},
}


def made(name: str):
    method = name if name not in ("pissa", "nf4") else "lora"
    return model_of(method, "nf4" if name == "nf4" else "none", **METHODS[name])


def weights(model) -> dict[str, bytes]:
    return {name: p.numpy().tobytes() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_short_runs_begin_alike_and_leave_nothing_behind(name):
    model = made(name)
    before = weights(model)
    runs = ShortRuns(model, TEXT, WHOLE, UNSEEN)
    runs.train(0.2, 0)
    runs.best.clear()  # which stops others
    again = runs.train(0.01, 0), runs.train(0.01, 1), runs.train(0.01, 0)
    runs.restore()
    assert weights(model) == before
    assert not model.training
    fresh = ShortRuns(made(name), TEXT, WHOLE, UNSEEN)
    assert again == (fresh.train(0.01, 0), fresh.train(0.01, 1), again[0])
    assert runs.train(0.02, 0).losses[0] == again[0].losses[0], "the same start and batch"


def test_short_runs_keep_the_ratio_of_lora_plus(steps_taken):
    settings = dataclasses.replace(WHOLE, optimizer="loraplus", loraplus_lr_ratio=8.0)
    runs = ShortRuns(model_of(r=2), TEXT, settings, UNSEEN)
    runs.train(0.01, 0)
    runs.train(0.02, 0)
    for rate, at in ((0.01, 0), (0.02, WHOLE.steps)):
        rates = set(steps_taken[at][3])
        assert rates == {rate, 8 * rate}


def test_short_runs_stop_one_bit_above_the_best(steps_taken):
    runs = ShortRuns(model_of("full"), TEXT, WHOLE, UNSEEN)
    good = runs.train(0.01, 0)
    assert good.loss is not None
    lost = runs.train(30.0, 0)
    assert lost.loss is None
    assert lost.score == math.inf
    assert 1 < len(lost.losses) < WHOLE.steps
    assert lost.losses[-1] > good.losses[len(lost.losses) - 1] + math.log(2)
    assert lost.losses[-2] <= good.losses[len(lost.losses) - 2] + math.log(2)
    assert len(steps_taken) == WHOLE.steps + len(lost.losses)
    assert len(runs.train(30.0, 1).losses) > len(lost.losses), "nothing to compare with yet"
    assert runs.train(1e30, 1).loss is None, "not finite"


def test_find_rates_reports_an_interval_around_the_bests():
    seen: list[Arm] = []
    model = model_of(r=2)
    before = weights(model)
    rates = find_rates(model, TEXT, WHOLE, UNSEEN, seen.append)
    assert weights(model) == before
    assert sorted(seen, key=lambda arm: (arm.order, arm.rate)) == rates.arms
    assert rates.judge == HELD_OUT
    assert (rates.steps, rates.whole) == (4, 4)
    bests = []
    for order in range(ORDERS):
        arms = [arm for arm in rates.arms if arm.order == order]
        bests.append(min(arms, key=lambda arm: arm.score).rate / WHOLE.lr)
    low, high = interval([round(math.log(best, FACTOR)) for best in bests])
    assert rates.low == WHOLE.lr * FACTOR**low
    assert rates.high == WHOLE.lr * FACTOR**high
    assert rates.low <= rates.middle <= rates.high
    table = rates.to_dict()
    assert table["interval"] == [rates.low, rates.high]
    assert len(table["short runs"]) == len(rates.arms)


def test_find_rates_has_the_same_bits_for_any_number_of_threads():
    settings = dataclasses.replace(WHOLE, batch_size=4, shard=1)
    results = []
    for threads in (1, 3):
        given_threads = dataclasses.replace(settings, threads=threads)
        results.append(find_rates(model_of(r=2), TEXT, given_threads, UNSEEN))
    assert results[0] == results[1]


@pytest.mark.gpu
def test_find_rates_on_a_gpu_has_the_losses_of_a_processor():
    results = []
    for device in ("cpu", "cuda"):
        model = get_peft_model(CausalLM(CONFIG, seed=0, device=device), LORA, seed=0)
        results.append(find_rates(model, TEXT, WHOLE, UNSEEN))
    one, other = results
    assert (one.low, one.high) == (other.low, other.high)
    for arm, same in zip(one.arms, other.arms, strict=True):
        assert same.losses == pytest.approx(arm.losses, abs=1e-3)


def test_find_rates_without_held_out_text_judges_by_the_training_loss():
    rates = find_rates(model_of(r=2), TEXT, WHOLE)
    assert rates.judge == TRAINING
    for arm in rates.arms:
        assert arm.loss is None or arm.loss == pytest.approx(np.mean(arm.losses[2:]))


def test_find_rates_of_tasks_judges_by_the_mean_over_them():
    model = get_multitask_model(CausalLM(CONFIG), dict.fromkeys("ab", LORA), seed=0)
    assert isinstance(model, MultiTask)
    texts = {"a": TEXT, "b": TEXT[::-1].copy()}
    rates = find_rates(model, texts, WHOLE, {"a": UNSEEN, "b": UNSEEN[::-1].copy()})
    assert rates.low < rates.high


def test_find_rates_refuses_ranks_that_are_planned_for_the_whole_run():
    whole = dataclasses.replace(WHOLE, steps=400)
    with pytest.raises(ConfigError, match="total_step = 400, but the run has steps = 50"):
        find_rates(model_of("adalora", steps=400, r=2), TEXT, whole, UNSEEN)
