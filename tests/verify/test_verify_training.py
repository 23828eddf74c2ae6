"""The theorems of training hold for any small model, and each fails under a mistake of its kind.

A mistake is a patch of the engine, under `@breaks(names)`: the true claims that it violates, and
the false ones that it makes pass. Those and no others are not ok in `measure`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verify_mistakes import after, around
from test_verify_run import run_command

import minilora.lora.lora
import minilora.lora.merging
import minilora.lora.optimizers
import minilora.optim
import minilora.verify.training
from minilora.lora import DoraAdapter, LoraAdapter, LoraConfig
from minilora.lora.layer import Wrapper
from minilora.nn import Linear, Parameter
from minilora.optim import SGD, AdamW, Optimizer
from minilora.training.graphed import Divisor
from minilora.training.parallel import ShardedStep
from minilora.verify import (
    THEOREMS,
    Measured,
    Property,
    Study,
    forgetting,
    gauge,
    measure,
    merges,
    random_study,
    steps,
    studies,
    updates,
    verify_training,
)
from minilora.verify.run import worst_row

Patch = Callable[[pytest.MonkeyPatch], None]
BY_NAME = {theorem.name: theorem for theorem in THEOREMS}
TRUE = {theorem.name for theorem in THEOREMS if theorem.is_true}
EXACT = {
    "four dials, SGD", "four dials, AdamW", "four dials, DoRA", "adapters commute",
    "beside a merged adapter",
}  # fmt: skip
SABOTAGES: dict[str, tuple[set[str], Patch]] = {}


def breaks(*names: str) -> Callable[[Patch], Patch]:
    """Register a mistake and the claims that come out otherwise: these and no others."""

    def add(patch: Patch) -> Patch:
        SABOTAGES[patch.__name__] = set(names), patch
        return patch

    return add


def with_group(rates: Any, **numbers: float) -> Any:
    """The rates of an update with other hyper-parameters."""
    return rates._replace(group={**rates.group, **numbers})


# ---- Adam, SGD, clipping and decay ---------------------------------------------------------------


@breaks("four dials, AdamW")
@around(AdamW, "update")
def adam_has_one_epsilon(real, self, params, grads, moments, rates):
    """1e-30 stays: it is as good as none."""
    eps = rates.group["eps"]
    return real(self, params, grads, moments, with_group(rates, eps=1e-3 if eps > 1e-4 else eps))


@breaks("four dials, one ε")
@around(AdamW, "update")
def adam_has_no_epsilon(real, self, params, grads, moments, rates):
    eps = rates.group["eps"]
    return real(self, params, grads, moments, with_group(rates, eps=1e-30 if eps == 1e-8 else eps))


@breaks("four dials, AdamW")
@around(AdamW, "rates")
def adamw_decays_all_groups_alike(real, self, group, steps, lr):
    decay = group["weight_decay"]
    return real(self, {**group, "weight_decay": 0.5 if decay else 0.0}, steps, lr)


@breaks("four dials, one decay")
@around(AdamW, "rates")
def adamw_forgets_decay(real, self, group, steps, lr):
    return real(self, {**group, "weight_decay": 0.0}, steps, lr)


@breaks("four dials, SGD")
@around(SGD, "update")
def sgd_decays_all_groups_alike(real, self, params, grads, moments, rates):
    decay = rates.group["weight_decay"]
    return real(self, params, grads, moments, with_group(rates, weight_decay=0.125 * bool(decay)))


@breaks("A frozen, decay")
@around(SGD, "update")
def sgd_forgets_decay(real, self, params, grads, moments, rates):
    return real(self, params, grads, moments, with_group(rates, weight_decay=0.0))


@breaks("four dials, clipping")
def gradients_are_never_clipped(mp):
    mp.setattr(studies, "clip_by_global_norm", lambda grads, max_norm: (grads, np.zeros(())))


@breaks(
    *("four dials, SGD", "four dials, AdamW", "four dials, DoRA", "A frozen, SGD"),
    *("first step, SGD", "balance of a run", "gauge", "two tasks' first steps"),
)
@around(studies, "clip_by_global_norm")
def gradients_are_always_clipped(real, grads, max_norm):
    return real(grads, min(max_norm, 0.05))


@breaks("A frozen, SGD")
@around(SGD, "update")
def momentum_damps_the_gradient(real, self, params, grads, moments, rates):
    """As Adam's does: u <- μ u + (1 - μ) g."""
    share = 1 - rates.group["momentum"]
    return real(self, params, [share * g for g in grads], moments, rates)


@breaks("A frozen, SGD", "balance of a run", "restart, A trains", "two tasks' later steps")
@around(Optimizer, "step")
def only_the_first_step_changes_anything(real, self, *rest):
    if not any(member.steps for member in self.members):
        real(self, *rest)


@breaks("gradient of full training")
@after(Linear, "write_effective_weight")
def a_whole_weight_has_a_thousandth_more_gradient(parts, self, *rest):
    def larger(pull):
        return pull._replace(gradients=lambda X, dY: (1.001 * pull.gradients(X, dY)[0],))

    return [(params, larger(pull)) for params, pull in parts]


@breaks("first step, SGD")
@around(SGD, "update")
def sgd_moves_what_has_no_gradient(real, self, params, grads, moments, rates):
    new = real(self, params, grads, moments, rates)
    return [p if g.any() else p * (1 + 2.0**-40) for p, g in zip(new, grads, strict=True)]


@breaks("balance of a run")
@around(SGD, "update")
def A_learns_a_thousandth_slower(real, self, params, *rest):
    new = real(self, params, *rest)
    is_A = [len(p) < p.shape[1] for p in params]
    rates = np.where(is_A, 0.999, 1.0)
    return [p + rate * (q - p) for p, q, rate in zip(params, new, rates, strict=True)]


@breaks("first step, Adam")
@around(AdamW, "rates")
def adam_corrects_no_bias(real, self, group, steps, lr):
    _, _, keep = real(self, group, steps, lr)
    return -lr, 1.0, keep


@breaks("four dials, AdamW", "four dials, DoRA", "balance, Adam", "gauge, signs")
def adam_takes_plain_steps(mp):
    def update(self, params, grads, moments, rates):
        (lr,) = rates.numbers
        return [p - lr * g for p, g in zip(params, grads, strict=True)]

    mp.setattr(AdamW, "rates", lambda self, group, steps, lr: (lr,))
    mp.setattr(AdamW, "update", update)


@breaks("A frozen, Adam")
def adam_is_sgd_where_A_is_frozen(mp):
    def make(params: Any, **options: Any) -> Optimizer:
        if len(params) > 4:  # A trains, too
            return AdamW(params, **options)
        return SGD(params, lr=steps.ETA, momentum=steps.MOMENTUM)

    mp.setattr(steps, "AdamW", make)


@breaks("restart, A frozen")
@after(Optimizer, "load_state_dict")
def moments_are_lost(_, self, *rest):
    for member in self.members:
        for moment in member.moments.values():
            moment[...] = 0


# ---- a trained A ---------------------------------------------------------------------------------


def in_module(module: Any) -> Patch:
    """No A is frozen in the theorems of one module."""

    def patch(mp: pytest.MonkeyPatch) -> None:
        mp.setattr(module, "freeze_first_factors", lambda model: None)

    patch.__name__ = f"A_trains_in_{module.__name__}"
    return patch


breaks("A frozen, SGD")(in_module(steps))
breaks("restart, A frozen")(in_module(merges))
breaks("nothing forgotten")(in_module(forgetting))


@breaks("A frozen, SGD", "restart, A frozen", "nothing forgotten", "gauge")
@around(minilora.lora.optimizers, "trained_pairs")
def pairs_have_copies_of_A(real, model):
    """No A is frozen, and none has its gradient preconditioned."""
    return [pair._replace(A=Parameter(pair.A.data.copy())) for pair in real(model)]


@breaks("restart, A trains", "balance of a run", "gradient of full training")
@around(LoraAdapter, "_add_update")
def A_has_no_gradient(real, self, W, a):
    pull = real(self, W, a)

    def without_A(X, dY):
        dA, dB = pull(X, dY)
        return 0 * dA, dB

    return without_A


@breaks("balance of a run", "gradient of full training")
@around(LoraAdapter, "_add_update")
def dA_is_a_thousandth_too_large(real, self, W, a):
    pull = real(self, W, a)

    def larger(X, dY):
        dA, dB = pull(X, dY)
        return 1.001 * dA, dB

    return larger


# ---- the gauge -----------------------------------------------------------------------------------


@breaks("gauge")
@around(minilora.lora.optimizers, "invert_grams")
def the_riemannian_step_is_always_damped(real, factors, damping, weights=None):
    return real(factors, max(damping, 1e-3), weights)


@breaks("gauge, damped, any P")
@around(minilora.lora.optimizers, "invert_grams")
def the_riemannian_step_is_never_damped(real, factors, damping, weights=None):
    return real(factors, 0.0, weights)


@breaks("gauge, damped")
@around(minilora.lora.optimizers, "invert_grams")
def the_first_direction_is_damped_less(real, factors, damping, weights=None):
    inverses = real(factors, damping, weights)
    for K in inverses:
        K[0, 0] *= 1 + 1e-3 * (damping > 0)
    return inverses


@breaks("gauge, SGD", "gauge, damped, any P")
def every_P_is_orthogonal(mp):
    mp.setattr(gauge, "shear", gauge.rotate)


# ---- adapters ------------------------------------------------------------------------------------


@breaks("four dials, DoRA")
@after(DoraAdapter, "write_effective_weight")
def dora_reads_B_beside_the_product(parts, self, W, *rest):
    W *= 1 + 1e-3 * abs(self.lora_B.data).max()
    return parts


@breaks("what A sees of G")
@around(minilora.lora.lora, "normal")
def every_normal_A_is_the_same(real, rng, *rest):
    return real(np.random.default_rng(7), *rest)


@breaks("PiSSA and back")
@around(LoraConfig, "scaling")
def twice_the_rank_has_another_scaling(real, self, name):
    return real(self, name) * (1.001 if self.r >= 8 else 1)


@breaks("PiSSA and back, rank r")
@around(updates, "truncate_rank")
def the_last_direction_is_too_short(real, A, B, s, r):
    A, B, row = real(A, B, s, r)
    A[-1] *= 0.9
    return A, B, row


@breaks("expressive power")
@around(LoraAdapter, "__call__")
def an_adapter_counts_a_thousandth_more(real, self, x, y, base):
    return y + (real(self, x, y, base) - y) * 1.001


@breaks("adapters commute")
@around(minilora.lora.merging, "sort_parts")
def terms_are_added_as_they_come(real, parts):
    return parts


@breaks("beside a merged adapter")
def a_merged_adapter_runs_again(mp):
    running = property(lambda self: tuple(self.entries[name] for name in self.active))
    mp.setattr(Wrapper, "running", running)


@breaks(
    *("forgotten with a random A", "expressive power", "four dials, SGD"),
    "forgetting of a head",
)
@around(LoraAdapter, "__call__")
def an_adapter_adds_nothing(real, self, x, y, base):
    """Where no W + dW is formed."""
    return y


# ---- losses --------------------------------------------------------------------------------------


@breaks("two tasks' first steps")
@after(ShardedStep, "divisors")
def a_large_batch_counts_more(divisors, self, task_batches):
    [(task, batch)] = task_batches
    large = batch.tokens > studies.SEQUENCES * studies.CONTEXT
    return {task: Divisor.of(batch.tokens * (1 - 1e-6 * large))}


@breaks("forgetting of a head")
@after(ShardedStep, "gradients")
def a_whole_weight_has_its_gradient_turned_round(result, self, batch, params, *rest):
    loss, grads = result
    return loss, [-g for g in grads] if len(params) == 1 else grads


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only two theorems, of which one is false."""
    chosen = [BY_NAME["A frozen, SGD"], BY_NAME["A frozen, decay"]]
    monkeypatch.setattr(minilora.verify.training, "THEOREMS", chosen)


SAMPLE = Study(1, "float64", 5, use_rslora=True, blocks=1)


@pytest.mark.parametrize("name", SABOTAGES)
def test_verify_training_finds_a_mistake_by_the_theorems_that_it_violates_and_no_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, patch = SABOTAGES[name]
    patch(monkeypatch)
    rows = measure([SAMPLE], THEOREMS)
    assert {row.property for row in rows if not row.ok} == expected


def test_theorems_that_are_true_have_a_mistake_each_that_no_other_claim_sees() -> None:
    alone: set[str] = set()
    noticed: set[str] = set()
    for names, _ in SABOTAGES.values():
        noticed |= names
        alone |= names if len(names) == 1 else set()
    assert alone >= TRUE
    assert noticed == set(BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=4)
@given(data=st.data())
def test_theorem_holds_or_fails_for_any_small_model(name: str, data: st.DataObject) -> None:
    study = Study(
        seed=data.draw(st.integers(0, 2**32)),
        dtype=data.draw(st.sampled_from(["float32", "float64"])),
        r=data.draw(st.integers(4, 8)),
        use_rslora=data.draw(st.booleans()),
        blocks=1,
    )
    theorem = BY_NAME[name]
    m = theorem.check(study)
    assert m.ok == theorem.is_true, m
    assert not m.note
    assert (m.bound == 0) == (name in EXACT)


def test_verify_training_measures_every_theorem_and_its_bounds_are_tight() -> None:
    rows = verify_training(models=2)
    assert [row.property for row in rows] == list(BY_NAME)
    assert len(BY_NAME) == len(THEOREMS)
    for row in rows:
        assert row.ok, row
        assert row.cases == 2
        if row.property in EXACT:
            assert (row.measured, row.bound) == (0, 0)
        elif row.is_true:
            assert 1e-3 < row.ratio <= 1, row
        else:
            assert row.ratio > 100, row


def test_verify_training_repeats_itself(few: None) -> None:
    assert verify_training(2, seed=5) == verify_training(2, seed=5) != verify_training(2, seed=6)


def test_random_study_reaches_both_dtypes_scalings_and_several_ranks() -> None:
    made = [random_study(seed) for seed in range(20)]
    assert {study.dtype for study in made} == {"float32", "float64"}
    assert {study.use_rslora for study in made} == {True, False}
    assert len({study.r for study in made}) >= 3


# ---- the command ---------------------------------------------------------------------------------


def test_verify_command_measures_training() -> None:
    code, out, err = run_command("--training", "--cases", "1")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    names = ["property", "equation", "claim", "measured", "bound", "ratio", "ok", "source"]
    assert header.split() == names
    for name, theorem in BY_NAME.items():
        claim = "true" if theorem.is_true else "false"
        row = re.compile(rf"^{re.escape(name)} .* {claim} .* True +{re.escape(theorem.source)}$")
        assert any(row.search(line) for line in lines), name
    false = len(BY_NAME) - len(TRUE)
    assert lines[-2].startswith("worst measured / bound: ")
    assert lines[-2].endswith(f", of {len(TRUE)} properties")
    assert lines[-1] == f"false claims that fail: {false} of {false}"


def test_verify_command_measures_eight_models_by_default_and_says_in_json_what_is_true(
    few: None,
) -> None:
    code, out, _ = run_command("--training", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["worst_ratio"] <= 1
    assert [row["is_true"] for row in report["rows"]] == [True, False]
    assert [row["cases"] for row in report["rows"]] == [8, 8]


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("momentum_damps_the_gradient", "property 'A frozen, SGD' fails: W "),
        ("sgd_forgets_decay", "'A frozen, decay' is false and must fail, but holds: the same with"),
    ],
)
def test_verify_command_names_a_theorem_that_comes_out_otherwise(
    sabotage: str, message: str, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, patch = SABOTAGES[sabotage]
    patch(monkeypatch)
    code, out, err = run_command("--training", "--cases", "1")
    assert code == 1
    assert err.startswith(f"minilora: error: {message}")
    assert "float32, LoRA" in err
    [failing] = [line for line in out.splitlines() if " False " in line]
    assert failing.startswith("A frozen")


@pytest.mark.parametrize("option", ["--base", "--adapter"])
def test_verify_command_refuses_files_beside_training(option: str) -> None:
    code, out, err = run_command("--training", option, "folder")
    assert (code, out) == (2, "")
    assert err == (
        "minilora: error: --training measures random models, and "
        f"{option} was given: leave out one of the two\n"
    )


def test_verify_command_shows_the_theorems_that_were_measured_before_ctrl_c(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Property.check
    measured: list[str] = []

    def interrupt(p: Property, study: Study) -> Measured:
        measured.append(p.name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return real(p, study)

    monkeypatch.setattr(Property, "check", interrupt)
    code, out, err = run_command("--training", "--cases", "3")
    assert code == 130
    assert err.strip() == "minilora: interrupted"
    assert out.splitlines()[-1] == "interrupted: 1 of 3 models were measured whole"
    assert "A frozen, SGD" in out


# ---- rows of false claims ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "ok", "ratio"),
    [
        ([(3.0, 1.0), (9.0, 1.0)], True, 3.0),
        ([(0.5, 1.0), (9.0, 1.0)], False, 0.5),
        ([(1.0, 1.0)], False, 1.0),
        ([(math.nan, 0.0)], False, math.inf),
        ([(9.0, 1.0), (math.nan, 0.0)], False, math.inf),
        ([(math.inf, 1.0)], False, math.inf),
    ],
)
def test_worst_row_of_a_false_claim_is_ok_if_every_case_is_beyond_its_bound(
    measured: list[tuple[float, float]], ok: bool, ratio: float
) -> None:
    cases = [(str(i), Measured(*m)) for i, m in enumerate(measured)]
    row = worst_row("name", "equation", "source", cases, is_true=False)
    assert row.ok == ok
    assert row.ratio == ratio
    assert not row.is_true


def test_property_check_of_a_false_claim_that_cannot_be_computed_is_not_ok() -> None:
    def fail(study: Study) -> Measured:
        raise np.linalg.LinAlgError("no decomposition")

    false = Property("name", "equation", "source", fail, lambda study: True, is_true=False)
    [row] = measure([SAMPLE], [false])
    assert not row.ok
    assert row.note == "no decomposition"


def test_on_grid_gives_short_binary_numbers_of_the_same_dtype() -> None:
    grid = studies.on_grid(np.float32([0.3, -0.1]), 3)
    assert grid.dtype == np.float32
    assert grid.tolist() == [0.25, -0.125]


def test_recorder_gives_the_gradients_that_the_optimiser_gets() -> None:
    model = SAMPLE.model(init_lora_weights=False)
    [batch] = SAMPLE.batches(1)
    params = studies.trained(model)
    recorder = studies.Recorder(model)
    _, grads = studies.loss_gradients(model, batch, params)
    by_id: dict[int, Any] = {id(p): g for p, g in zip(params, grads, strict=True)}
    recorded = list(recorder.take())
    assert len(recorded) == len(studies.TARGETS)
    for step in recorded:
        tensors: list[tuple[Parameter, Any, Any]] = [
            (step.adapter.lora_A, step.dA, step.bound_A),
            (step.adapter.lora_B, step.dB, step.bound_B),
        ]
        for p, exact, bound in tensors:
            assert (abs(by_id[id(p)] - exact) <= bound).all()
