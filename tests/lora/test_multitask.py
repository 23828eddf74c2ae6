"""MultiTask: several tasks in one batch.

Each row gives the output and the gradients of its task, a step weighs the tasks, and any task can
be merged or exported.
"""

from __future__ import annotations

import collections
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods import layers
from peft_models import is_close, lora
from small import SMALLER, bits
from strict_xp import STRICT, no_sync

from minilora.autograd import Tensor, gradients
from minilora.data import Batch
from minilora.data.batches import IGNORE
from minilora.errors import ConfigError, FormatError
from minilora.formats import load_file
from minilora.gradcheck import check_gradient
from minilora.lora import (
    AdaLoraConfig,
    HydraConfig,
    LoraConfig,
    LoraLinear,
    MultiTask,
    PeftModel,
    RankAllocator,
    SavedModule,
    get_multitask_model,
    get_peft_model,
)
from minilora.lora.multitask import BASE, FILE, interleave
from minilora.models.generation import generate
from minilora.models.transformer import CausalLM, KeyValueCache
from minilora.nn import FusedProjection, dropout_counter
from minilora.optim import AdamW
from minilora.quant import quantize
from minilora.training.loop import Settings, train
from minilora.training.parallel import ShardedStep, language_modelling_loss

NAMES = ["code", "prose", BASE]

# ---- models: FORMS[name] is the tasks' configurations and the shared one ----

Tasks = dict[str, LoraConfig | None]
FORMS: dict[str, tuple[Tasks, LoraConfig | None]] = {}


def all_linear(**changes: Any) -> LoraConfig:
    """Both factors are random, so that no gradient is zero by chance."""
    return lora(**{"target_modules": "all-linear"} | changes)


def add_form(name: str, prose: Any, code: Any, shared: LoraConfig | None = None) -> None:
    FORMS[name] = ({"prose": prose, "code": code}, shared)


PLAIN = all_linear()
LARGER = all_linear(r=3)
RANDOM = {"init_lora_weights": False}
TWO_LAYERS = {"target_modules": ["q_proj", "up_proj"]}
SAVED_HEAD = all_linear(modules_to_save=["lm_head"])
DORA = all_linear(use_dora=True)
DORA_IN_Q = lora(use_dora=True, target_modules=["q_proj"])
HYDRA = HydraConfig(r=2, target_modules="all-linear", **RANDOM)
ADALORA = AdaLoraConfig(init_r=3, target_r=2, total_step=9, **TWO_LAYERS, **RANDOM)
add_form("shared adapter only", None, None, LARGER)
add_form("task adapters only", PLAIN, lora(r=5, lora_alpha=3, **TWO_LAYERS))
add_form("both", PLAIN, all_linear(r=3, use_rslora=True), all_linear(r=4, lora_alpha=5))
add_form("one task adapter", None, lora(target_modules=["o_proj"]), LARGER)
add_form("heads", SAVED_HEAD, PLAIN, lora(target_modules=["v_proj"]))
add_form("DoRA", DORA, all_linear(use_dora=True, r=4))
add_form("DoRA in other layers", DORA_IN_Q, None, lora(target_modules=["down_proj"]))
add_form("HydraLoRA", HYDRA, PLAIN, LARGER)
add_form("AdaLoRA", ADALORA, PLAIN, all_linear(r=1))


def base(dtype: str = "float64", device: Any = "cpu") -> CausalLM:
    return CausalLM(SMALLER, seed=1, dtype=dtype, device=device)


def with_tasks(
    prose: Any, code: Any, shared: LoraConfig | None = None, dtype: str = "float64"
) -> MultiTask:
    return get_multitask_model(base(dtype), {"prose": prose, "code": code}, shared, seed=2)


def make_model(name: str = "both", dtype: str = "float64", device: Any = "cpu") -> MultiTask:
    """The model of a form; a saved module differs from the module that it is a copy of."""
    model = get_multitask_model(base(dtype, device), *FORMS[name], seed=2)
    for path, p in model.named_parameters():
        if "modules_to_save" in path:
            values = np.random.default_rng(7).standard_normal(p.shape)
            p.data = p.backend.from_numpy(values.astype(p.dtype))
    return model


MODELS = {name: make_model(name).eval() for name in FORMS}  # for tests that change nothing
ANY_FORM = pytest.mark.parametrize("form", FORMS)
FORM_NAMES = st.sampled_from(list(FORMS))
TASKS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=7)
TRAINABLE_TASKS = TASKS.filter(lambda tasks: set(tasks) != {BASE})

# ---- batches, rows and steps ----


def random_ids(rows: int, length: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 13, (rows, length))


def random_batch(*tasks: str, seed: int = 0) -> Batch:
    tokens = random_ids(len(tasks), 6, seed)
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), tasks=list(tasks))


def row_loss(model: MultiTask, batch: Batch, i: int) -> Tensor:
    assert batch.tasks is not None
    row = slice(i, i + 1)
    return model(batch.ids[row], targets=batch.targets[row], tasks=batch.tasks[i])


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def trained_names(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def step(
    model: Any, batch: Batch, *counters: int, threads: int = 2, shard: int = 1, **options: Any
) -> tuple[float, list[Any]]:
    """The loss and the gradients of one step."""
    with ShardedStep(model, threads, shard=shard, **options) as sharded:
        loss, grads = sharded.gradients(batch, trained(model), *counters)
    return float(loss), grads


def array_bytes(arrays: Any) -> list[Any]:
    return [None if array is None else array.tobytes() for array in arrays]


def is_prepared(model: Any) -> bool:
    return any(getattr(module, "_effective", None) for _, module in model.named_modules())


def changed_names(before: dict[str, bytes], model: Any) -> set[str]:
    return {name for name, data in bits(model).items() if data != before[name]}


def is_owned(name: str, adapters: Any) -> bool:
    """Whether the parameter `name` belongs to one of the adapters."""
    return not set(adapters).isdisjoint(name.split("."))


# ---- forward ----


@given(FORM_NAMES, TASKS, st.randoms(use_true_random=False))
def test_multitask_gives_each_row_the_output_of_its_task_in_any_order(
    form: str, tasks: list[str], random: Any
) -> None:
    model = MODELS[form]
    ids = random_ids(len(tasks), 4, seed=len(tasks))
    y = model(ids, tasks=tasks).data
    for i, task in enumerate(tasks):
        assert is_close(y[i : i + 1], model(ids[i : i + 1], tasks=task).data)
    order = random.sample(range(len(tasks)), len(tasks))
    shuffled = model(ids[order], tasks=[tasks[i] for i in order])
    assert is_close(shuffled.data, y[order])


def expected_adapters(form: str, task: str) -> tuple[str, ...]:
    configs, shared = FORMS[form]
    names = [] if shared is None else ["shared"]
    if configs[task] is not None:
        names.append(task)
    return tuple(names)


@ANY_FORM
@pytest.mark.parametrize("task", ["prose", "code"])
def test_multitask_computes_a_task_as_a_plain_model_with_its_adapters(form: str, task: str) -> None:
    """The definition: one PeftModel in which the task's adapters are active."""
    model = MODELS[form]
    names = model.adapters_of(task)
    assert names == expected_adapters(form, task)
    first, *others = names
    plain = get_peft_model(base(), model.peft_config[first], first)
    for name in others:
        plain.add_adapter(name, model.peft_config[name])
    plain.set_adapter(names)
    values = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        if name in values:
            p.data = values[name].data
    ids = random_ids(3)
    assert np.array_equal(model(ids, tasks=task).data, plain(ids).data)


@ANY_FORM
def test_multitask_computes_base_rows_as_the_base_and_tasks_apart(form: str) -> None:
    model = MODELS[form]
    ids = random_ids(3)
    outputs = {task: model(ids, tasks=task).data.tobytes() for task in NAMES}
    assert outputs[BASE] == base()(ids).data.tobytes()
    assert len(set(outputs.values())) == (2 if form == "shared adapter only" else 3)


def test_multitask_runs_over_a_quantized_base() -> None:
    plain = quantize(base("float32"))
    tasks = {"prose": PLAIN, "code": LARGER}
    model = get_multitask_model(plain, tasks, all_linear(r=1), seed=2)
    batch = random_batch("code", "prose", BASE, "code")
    y = model(batch.ids, tasks=batch.tasks).data
    assert is_close(y[1:2], model(batch.ids[1:2], tasks="prose").data, 1e-5)
    loss, grads = step(model, batch)
    assert np.isfinite(loss)
    for g in grads:
        assert np.isfinite(g).all()


def test_multitask_with_targets_gives_the_sum_of_the_rows_losses() -> None:
    model = MODELS["both"]
    batch = random_batch("prose", BASE, "code", "prose")
    together = model(batch.ids, targets=batch.targets, tasks=batch.tasks)
    assert together.shape == ()
    expected = sum(row_loss(model, batch, i).item() for i in range(4))
    assert together.item() == pytest.approx(expected, rel=1e-13)


# ---- which task runs: contexts ----


def test_multitask_without_tasks_is_refused() -> None:
    model = MODELS["both"]
    ids = random_ids(2)
    with pytest.raises(ConfigError, match=r"tasks=.*prose, code"):
        model(ids)
    with pytest.raises(ConfigError, match=r"tasks=.*prose, code"):
        step(model, Batch(ids, ids))


def test_task_contexts_nest_and_disable_adapter_wins() -> None:
    model = MODELS["both"]
    ids = random_ids(2)
    prose = model(ids, tasks="prose").data
    code = model(ids, tasks="code").data
    plain = model(ids, tasks=BASE).data
    with model.task("prose"):
        assert np.array_equal(model(ids).data, prose)
        with model.task("code"):
            assert np.array_equal(model(ids).data, code)
            assert np.array_equal(model(ids, tasks="prose").data, prose)
        assert np.array_equal(model(ids).data, prose)
    with model.task(BASE):
        assert np.array_equal(model(ids).data, plain)
        assert np.array_equal(model(ids, tasks="code").data, code)
    with model.disable_adapter():
        assert np.array_equal(model(ids).data, plain)
        assert np.array_equal(model(ids, tasks="code").data, plain)
    assert np.array_equal(model(ids, tasks="code").data, code)


def test_task_context_concerns_one_thread_and_one_model() -> None:
    model = MODELS["both"]
    ids = random_ids(1)
    code = model(ids, tasks="code").data
    results = []

    def run_beside() -> None:
        with model.task("code"):
            results.append(model(ids).data)
        with pytest.raises(ConfigError):
            model(ids)
        results.append(None)

    with model.task("prose"):
        thread = threading.Thread(target=run_beside)
        thread.start()
        thread.join()
        with pytest.raises(ConfigError):
            MODELS["DoRA"](ids)
    assert len(results) == 2
    assert np.array_equal(results[0], code)


# ---- gradients ----


@given(FORM_NAMES, TRAINABLE_TASKS)
def test_multitask_gradients_are_sums_over_rows_and_none_for_adapters_that_no_row_runs(
    form: str, tasks: list[str]
) -> None:
    model = MODELS[form]
    batch = random_batch(*tasks)
    names = trained_names(model)
    params = trained(model)
    sums: dict[str, Any] = {}
    for i, task in enumerate(tasks):
        if task != BASE:
            for name, g in zip(names, gradients(row_loss(model, batch, i), params), strict=True):
                if g is not None:
                    sums[name] = sums.get(name, 0) + g
    largest = max(np.abs(g).max() for g in sums.values())
    running = {adapter for task in tasks for adapter in model.adapters_of(task)}
    loss = model(batch.ids, targets=batch.targets, tasks=tasks)
    for name, g in zip(names, gradients(loss, params), strict=True):
        assert (name in sums) == is_owned(name, running)
        if name in sums:
            assert np.abs(g - sums[name]).max() <= 1e-12 * largest
        else:
            assert g is None


@given(st.permutations(range(6)), st.lists(st.integers(1, 5), max_size=3))
def test_interleave_restores_rows_and_its_gradient_matches_differences(
    order: list[int], cuts: list[int]
) -> None:
    rows = np.split(np.array(order), sorted(set(cuts)))
    parts = []
    for i, group in enumerate(rows):
        parts.append(np.random.default_rng(i).standard_normal((len(group), 2, 3)))
    y = interleave([Tensor(part) for part in parts], rows).data
    for part, group in zip(parts, rows, strict=True):
        assert np.array_equal(y[group], part)
    check_gradient(lambda *leaves: interleave(leaves, rows), *parts)


# ---- a step ----


def weighted_mean(
    model: MultiTask, batch: Batch, weights: dict[str, float] | None
) -> tuple[float, list[np.ndarray]]:
    """The weighted mean of the tasks' mean losses, and its gradients, computed row by row.

    Without weights: the mean over all tokens.
    """
    assert batch.tasks is not None
    tokens: collections.Counter[str] = collections.Counter()
    for i, task in enumerate(batch.tasks):
        tokens[task] += batch.shard(i, i + 1).tokens
    present = [task for task in tokens if tokens[task]]
    params = trained(model)
    mean = 0.0
    grads = [np.zeros(p.shape) for p in params]
    for i, task in enumerate(batch.tasks):
        if task not in present:
            continue
        if weights is None:
            scale = 1 / tokens.total()
        else:
            total = sum(weights.get(name, 1.0) for name in present)
            scale = weights.get(task, 1.0) / total / tokens[task]
        loss = row_loss(model, batch, i)
        mean += scale * loss.item()
        if loss.requires_grad:
            for total_g, g in zip(grads, gradients(loss, params), strict=True):
                if g is not None:
                    total_g += scale * g
    return mean, grads


@given(
    TRAINABLE_TASKS,
    st.integers(1, 4),
    st.sampled_from([{}, {"prose": 3.0, "code": 0.5}, None]),
    st.integers(0, 99),
    st.sampled_from(["both", "task adapters only", "DoRA", "HydraLoRA", "heads"]),
    st.sampled_from([0.1, 0.7]),
)
def test_sharded_step_is_the_weighted_mean_of_the_tasks_means_for_any_shard(
    tasks: list[str],
    shard: int,
    weights: dict[str, float] | None,
    seed: int,
    form: str,
    counted: float,
) -> None:
    model = MODELS[form]
    batch = random_batch(*tasks, seed=seed)
    ignored = np.random.default_rng(seed).random(batch.targets.shape) >= counted
    batch.targets[ignored] = IGNORE  # a row, and so a task, may count nothing
    expected, expected_grads = weighted_mean(model, batch, weights)
    balance: Any = "tokens" if weights is None else weights or "tasks"
    loss, grads = step(model, batch, shard=shard, balance=balance)
    assert loss == pytest.approx(expected, rel=1e-12, abs=1e-300)
    largest = max(np.abs(g).max() for g in expected_grads)
    for g, want in zip(grads, expected_grads, strict=True):
        assert np.abs((0 if g is None else g) - want).max() <= 1e-12 * largest


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sharded_step_with_tasks_has_the_same_bits_for_any_number_of_threads(
    dropout: float,
) -> None:
    prose = all_linear(lora_dropout=dropout)
    shared = all_linear(r=1, lora_dropout=dropout)
    model = with_tasks(prose, LARGER, shared, "float32").train()
    batch = random_batch("prose", "code", "prose", BASE, "code", "code", "prose")
    results = []
    for threads in (1, 2, 4):
        loss, grads = step(model, batch, 5, 6, threads=threads, shard=2)
        result = [loss, *array_bytes(grads)]
        if not dropout:
            with ShardedStep(model, threads, shard=2) as sharded:
                result += sharded.losses([batch, batch.shard(1, 4)])
        results.append(result)
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_sharded_step_of_one_task_has_the_bits_of_a_step_inside_that_task() -> None:
    model = make_model(dtype="float32")
    named = random_batch(*["code"] * 5)
    plain = Batch(named.ids, named.targets)
    loss, grads = step(model, named, shard=2)
    with model.task("code"):
        expected, expected_grads = step(model, plain, shard=2)
    assert loss == expected
    assert array_bytes(grads) == array_bytes(expected_grads)


def test_sharded_step_drops_by_the_position_in_the_sorted_batch() -> None:
    config = all_linear(lora_dropout=0.4)
    model = with_tasks(config, config).train()
    batch = random_batch("prose", "code", "prose")
    order = [1, 0, 2]
    tasks = ["code", "prose", "prose"]
    ordered = Batch(batch.ids[order], batch.targets[order], tasks=tasks)
    loss, _ = step(model, batch, 3, 4)
    assert step(model, ordered, 3, 4)[0] == loss
    means = []
    for i, task in enumerate(tasks):
        with model.task(task), dropout_counter(3, 4, i):
            summed = language_modelling_loss(model, ordered.shard(i, i + 1))
        means.append(summed.item() / 5)
    expected = (means[0] + (means[1] + means[2]) / 2) / 2
    assert loss == pytest.approx(expected, rel=1e-13)


def test_sharded_step_prepares_one_weight_per_task_and_drops_them() -> None:
    """Seen inside the step. A fused projection prepares a weight for "__base__", too."""
    model = make_model()
    prepared = {}
    for path, module in model.model.named_modules():
        if isinstance(module, FusedProjection):
            prepared[path] = (module, 3)
        elif path.endswith(("o_proj", "down_proj")):
            prepared[path] = (module, 2)
    calls = []

    def count_and_run(model: Any, batch: Batch) -> Tensor:
        for module, count in prepared.values():
            assert len(list(filter(None, module._effective.values()))) == count
        calls.append(batch)
        return language_modelling_loss(model, batch)

    step(model, random_batch("prose", "code", BASE), loss=count_and_run)
    assert len(calls) == 3
    assert len(prepared) == 2 * 4
    assert not is_prepared(model.model)


def test_gradient_checkpointing_computes_again_for_the_same_task() -> None:
    """A block runs in backward, too, outside of any task's context."""
    model = make_model()
    batch = random_batch("prose", BASE, "code", "prose")
    results = []
    for checkpointing in (False, True):
        model.get_base_model().gradient_checkpointing_enable(checkpointing)
        loss, grads = step(model, batch)
        y = model(batch.ids, targets=batch.targets, tasks=batch.tasks)
        grads += gradients(y, trained(model))
        results.append([loss, *array_bytes(grads)])
    assert results[0] == results[1]


def test_sharded_step_leaves_nothing_prepared_after_an_exception() -> None:
    model = make_model()

    def fail(model: Any, batch: Batch) -> Tensor:
        assert is_prepared(model.model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step(model, random_batch("prose", "code"), loss=fail)
    assert not is_prepared(model.model)


def test_optimizer_leaves_adapters_that_no_row_runs_unchanged() -> None:
    model = make_model(dtype="float32").train()
    names = trained_names(model)
    named = list(zip(names, trained(model), strict=True))
    optimizer = AdamW(named, lr=0.1, weight_decay=0.1)
    for tasks in (["prose", "code"], ["code"], [BASE, "code"]):
        before = bits(model)
        state = optimizer.state_dict()[0]
        optimizer.step(step(model, random_batch(*tasks))[1])
        running = {adapter for task in tasks for adapter in model.adapters_of(task)}
        assert changed_names(before, model) == {n for n in names if is_owned(n, running)}
    after = optimizer.state_dict()[0]
    for name, moment in state.items():
        assert np.array_equal(moment, after[name]) == (".prose." in name)


def test_multitask_learns_a_different_continuation_for_each_task() -> None:
    ids = np.tile(np.arange(6), (2, 1))
    targets = np.stack([np.full(6, 3), np.full(6, 8)])
    tasks = ["prose", "code"]
    batch = Batch(ids, targets, tasks=tasks)
    model = with_tasks(PLAIN, PLAIN, dtype="float32").train()
    optimizer = AdamW(trained(model), lr=0.02)
    for _ in range(60):
        optimizer.step(step(model, batch)[1])
    assert np.array_equal(model(ids, tasks=tasks).data.argmax(-1), targets)


def test_rank_allocator_of_one_task_runs_beside_another_task() -> None:
    model = make_model("AdaLoRA", "float32").train()
    allocator = RankAllocator.of(model, "prose")
    params = trained(model)
    optimizer = AdamW(params, lr=0.01)
    for i in range(9):
        tasks = ["prose", "code"] if i % 3 else ["code"]
        _, grads = step(model, random_batch(*tasks, seed=i))
        optimizer.step(grads)
        by_parameter = dict(zip(map(id, params), grads, strict=True))
        allocator.step([by_parameter[id(p)] for p in allocator.params])
    allocator.prune()
    assert sum(allocator.ranks.values()) == 2 * 4
    _, tensors = model.task_adapter("prose")
    ranks = [len(array) for key, array in tensors.items() if "lora_A" in key]
    assert sum(ranks) == 2 * 4 + 14
    ids = random_ids(2)
    merged = model.merge_task("prose")
    assert is_close(merged(ids).data, model.eval()(ids, tasks="prose").data, 1e-5)


def test_train_inside_a_task_trains_that_task(tmp_path: Path) -> None:
    model = make_model(dtype="float32")
    text = random_ids(1, 300)[0].astype(np.int32)
    settings = Settings(steps=3, batch_size=4, context=6, save_every=3)
    before = bits(model)
    with model.task("code"):
        result = train(model, text, settings, tmp_path, held_out=text[:50])
    assert len(result.losses) == 3
    changed = changed_names(before, model)
    assert changed
    for name in changed:
        assert is_owned(name, ["code", "shared"])
    again = MultiTask.from_pretrained(base("float32"), tmp_path / "checkpoints" / "step-3")
    expected = bits(model)
    for name, data in bits(again).items():
        assert "lora" not in name or data == expected[name]


def test_losses_are_those_of_the_rows_sorted_by_task() -> None:
    """A task is prepared for its first batch and stays prepared for later ones."""
    model = MODELS["both"]
    batches = [random_batch("prose", "prose")]
    batches.append(random_batch("code", "prose", BASE, seed=1))
    batches.append(random_batch("code", seed=2))
    orders = [[0, 1], [2, 0, 1], [0]]  # "__base__", code, prose
    expected = []
    for batch, order in zip(batches, orders, strict=True):
        expected += [row_loss(model, batch, i).item() for i in order]
    with ShardedStep(model, 2, shard=1) as sharded:
        losses = list(sharded.losses(batches))
    assert [count for _, count in losses] == [5] * 6
    assert [loss for loss, _ in losses] == pytest.approx(expected, rel=1e-13)
    assert not is_prepared(model.model)


def test_multitask_has_the_same_bits_on_a_device_without_waiting() -> None:
    batch = random_batch("prose", "code", BASE, "prose")
    results = []
    for device in ("cpu", STRICT):
        model = make_model("heads", "float32", device).train()
        params = trained(model)
        backend = params[0].backend
        with no_sync():
            with ShardedStep(model, 1, shard=4) as sharded:
                loss, grads = sharded.gradients(batch, params)
            y = model(batch.ids, tasks=batch.tasks)
            more = gradients(y, params, y.data)
        arrays = [y.data, *filter(lambda g: g is not None, [*grads, *more])]
        results.append([float(loss), *(backend.to_numpy(array).tobytes() for array in arrays)])
        with model.task("prose"):
            on_device = model(backend.from_numpy(batch.ids))
        assert on_device.shape == (4, 5, 13)
    assert results[0] == results[1]


# ---- bad input: named, and nothing changes ----


def test_multitask_refuses_an_unknown_task_and_changes_nothing() -> None:
    model = make_model()
    batch = random_batch("prose", "verse")
    ids = batch.ids
    before = bits(model)

    def refuses(call: Any, *inputs: Any, **options: Any) -> None:
        with pytest.raises(ConfigError, match=r"'verse'.*prose, code, __base__"):
            call(*inputs, **options)

    refuses(model, ids, tasks=batch.tasks)
    refuses(model, ids, tasks="verse")
    refuses(model.adapters_of, "verse")
    refuses(model.rows_of, ["prose", "verse"], 2)
    refuses(model.task("verse").__enter__)
    refuses(model.merge_task, "verse")
    refuses(model.task_adapter, "verse")
    refuses(generate, model, ids, 2, tasks=["prose", "verse"])
    refuses(step, model, batch)
    with ShardedStep(model, 1) as sharded:
        refuses(next, sharded.losses([batch]))
    assert bits(model) == before
    assert not is_prepared(model.model)


@pytest.mark.parametrize("tasks", [[], ["prose"], ["prose"] * 3])
def test_multitask_refuses_another_number_of_tasks_than_rows(tasks: list[str]) -> None:
    ids = random_ids(2)
    with pytest.raises(ConfigError, match=rf"\b{len(tasks)}\b.*\b2\b"):
        MODELS["both"](ids, tasks=tasks)
    with pytest.raises(ConfigError, match=rf"\b2\b.*tasks.*\b{len(tasks)}\b"):
        Batch(ids, ids, tasks=tasks)


def test_sharded_step_and_generate_refuse_tasks_for_a_model_without_tasks() -> None:
    model = get_peft_model(base(), lora())
    with pytest.raises(ConfigError, match="tasks"):
        step(model, random_batch("prose"))
    with pytest.raises(ConfigError, match="tasks"):
        generate(model, random_ids(1), 1, tasks="prose")


def test_sharded_step_refuses_a_batch_of_base_rows_alone() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        step(make_model(), random_batch(BASE, BASE))


BAD_BALANCES = ["rows", None, 1, {"prose": 0}, {"prose": -1.0}, {"prose": np.inf}, {"code": "x"}]


@pytest.mark.parametrize("balance", BAD_BALANCES)
def test_sharded_step_refuses_a_bad_balance(balance: Any) -> None:
    with pytest.raises(ConfigError, match=r"balance.*'tasks'.*'tokens'"):
        ShardedStep(MODELS["DoRA"], 1, balance=balance)


def test_multitask_refuses_one_cache_for_several_tasks() -> None:
    model = MODELS["both"]
    with pytest.raises(ConfigError, match="KeyValueCache"):
        model(random_ids(2), KeyValueCache(model, 2, 8), tasks=["prose", "code"])


WRONG: list[Any] = []


def add_wrong(label: str, message: str, tasks: Any, shared: LoraConfig | None = None) -> None:
    WRONG.append(pytest.param(tasks, shared, message, id=label))


TARGETS_NOTHING = lora(target_modules=["nothing"])
SAVED_Q = lora(modules_to_save=["q_proj"], target_modules=["v_proj"])
add_wrong("DoRA beside the shared one", "task 'prose', .*'prose'.*DoRA", {"prose": DORA}, PLAIN)
add_wrong("a shared DoRA", "'shared'.*DoRA", {"prose": PLAIN}, DORA)
add_wrong("two heads", "shared, prose", {"prose": SAVED_HEAD}, SAVED_HEAD)
add_wrong("saved here, adapted there", "q_proj.*saved", {"prose": SAVED_Q, "code": PLAIN})
add_wrong("no task", "task", {}, PLAIN)
add_wrong("no adapter", "'prose'", {"prose": None})
add_wrong("not a dictionary", r"\['prose'\]", ["prose"], PLAIN)
add_wrong("the base's name", "'__base__'", {BASE: PLAIN})
add_wrong("the shared one's name", "'shared'", {"shared": PLAIN}, PLAIN)
add_wrong("an adapter's bad name", r"'a\.b'", {"a.b": PLAIN})
add_wrong("a number for a name", r"\b3\b", {3: PLAIN})
add_wrong("a number for a name, shared", r"\b3\b", {3: None}, PLAIN)
add_wrong("not a configuration", "LoraConfig.*'lora'", {"prose": "lora"})
add_wrong("biases", "bias.*'none'", {"prose": all_linear(bias="all")})
add_wrong("no such layer", "'nothing'", {"prose": PLAIN, "code": TARGETS_NOTHING})


def describe(model: CausalLM) -> tuple[Any, ...]:
    return repr(model), bits(model), [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(("tasks", "shared", "message"), WRONG)
def test_get_multitask_model_refuses_what_does_not_fit_and_changes_nothing(
    tasks: Any, shared: LoraConfig | None, message: str
) -> None:
    plain = base()
    plain.model.norm.weight.requires_grad = False
    before = describe(plain)
    with pytest.raises(ConfigError, match=message):
        get_multitask_model(plain, tasks, shared)
    assert describe(plain) == before
    assert isinstance(get_multitask_model(plain, {"prose": PLAIN}), MultiTask)


# ---- adapters and tasks ----


def values_of(model: MultiTask, name: str) -> dict[str, bytes]:
    """The values of one adapter's parameters."""
    return {path: data for path, data in bits(model).items() if is_owned(path, [name])}


def test_get_multitask_model_takes_first_values_from_the_seed_and_the_name_alone() -> None:
    one = get_multitask_model(base(), {"prose": PLAIN, "code": PLAIN}, seed=3)
    other = get_multitask_model(base(), {"code": PLAIN}, PLAIN, seed=3)
    another = get_multitask_model(base(), {"code": PLAIN}, seed=4)
    code = values_of(one, "code")
    assert values_of(other, "code") == code
    prose = values_of(one, "prose")
    different = values_of(another, "code")
    for name, data in code.items():
        assert different[name] != data
        assert prose[name.replace(".code.", ".prose.")] != data


def test_declare_refuses_what_cannot_run_and_declares_nothing() -> None:
    model = make_model("task adapters only")
    model.add_adapter("verse", DORA)
    with pytest.raises(ConfigError, match=r"'verse'.*DoRA"):
        model.declare("verse", ["prose", "verse"])
    with pytest.raises(ConfigError, match="'elsewhere'"):
        model.declare("verse", ["elsewhere"])
    with pytest.raises(ConfigError, match="'prose'"):
        model.declare("prose", ["verse"])
    assert list(model.tasks) == ["prose", "code"]


def test_declare_adds_adapters_up_in_every_layer() -> None:
    model = make_model("task adapters only")
    model.declare("together", ["prose", "code"])
    ids = random_ids(1)
    plain = model(ids, tasks=BASE).data
    prose = model(ids, tasks="prose").data
    code = model(ids, tasks="code").data
    together = model(ids, tasks="together").data
    assert not np.array_equal(together, prose + code - plain)  # as it would be at the end


def test_delete_adapter_refuses_an_adapter_that_a_task_runs() -> None:
    model = make_model("task adapters only")
    model.declare("together", ["prose", "code"])
    with pytest.raises(ConfigError, match=r"'prose'.*prose, together"):
        model.delete_adapter("prose")
    del model.tasks["prose"]
    del model.tasks["together"]
    model.delete_adapter("prose")
    assert list(model.peft_config) == ["code"]


def test_set_adapter_of_a_multitask_model_decides_what_trains() -> None:
    model = make_model("task adapters only")
    model.set_adapter("code")
    assert {name.split(".")[-2] for name in trained_names(model)} == {"code"}
    model.set_adapter(["prose", "code"], inference_mode=True)
    assert not trained(model)


# ---- one task by itself ----

NOT_PLAIN: dict[tuple[str, str], str] = {}  # (form, task): why no plain adapter is this task
NOT_PLAIN["HydraLoRA", "prose"] = "'prose'.*HydraLoRA"
NOT_PLAIN["DoRA in other layers", "prose"] = "'prose'.*DoRA.*shared, prose"


@ANY_FORM
@pytest.mark.parametrize("task", ["prose", "code"])
def test_export_writes_a_task_as_one_plain_adapter(form: str, task: str, tmp_path: Path) -> None:
    model = MODELS[form]
    if (form, task) in NOT_PLAIN:
        with pytest.raises(ConfigError, match=NOT_PLAIN[form, task]):
            model.export(task, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        return
    model.export(task, tmp_path)
    names = model.adapters_of(task)
    peft_type = model.peft_config[names[0]].peft_type if len(names) == 1 else "LORA"
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == peft_type
    alone = PeftModel.from_pretrained(base(), tmp_path)
    ids = random_ids(3)
    assert is_close(alone(ids).data, model(ids, tasks=task).data)
    if len(names) == 1:
        return
    originals = layers(model)
    for path, layer in layers(alone).items():
        adapters = originals[path].adapters
        present = [name for name in names if name in adapters]
        assert layer.adapters["default"].r == sum(adapters[name].r for name in present)
        delta = sum(originals[path].delta_weight(name) for name in present)
        assert is_close(layer.delta_weight("default"), delta, 1e-14)


def test_task_adapter_keeps_the_shared_factors_bit_for_bit() -> None:
    model = make_model("both")
    config, tensors = model.task_adapter("code")
    assert (config.r, config.lora_alpha) == (7, 5 / 4 * 7)
    for key, p in model.adapter_parameters("shared").items():
        first = tensors[key][:4] if "lora_A" in key else tensors[key][:, :4]
        assert first.tobytes() == p.numpy().tobytes()


def test_task_adapter_refuses_the_base() -> None:
    with pytest.raises(ConfigError, match="__base__"):
        MODELS["DoRA"].task_adapter(BASE)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "HydraLoRA"])
def test_merge_task_gives_a_plain_model_and_changes_nothing(form: str) -> None:
    model = MODELS[form]
    ids = random_ids(3)
    before = bits(model)
    for task in NAMES:
        expected = model(ids, tasks=task).data
        merged = model.merge_task(task)
        assert type(merged) is CausalLM
        for _, module in merged.named_modules():
            assert not isinstance(module, (LoraLinear, SavedModule))
        assert is_close(merged(ids).data, expected)
        assert np.array_equal(model(ids, tasks=task).data, expected)
    assert bits(model) == before


def test_merge_task_refuses_hydralora() -> None:
    with pytest.raises(ConfigError, match="HydraLoRA"):
        MODELS["HydraLoRA"].merge_task("prose")


def test_merge_adapter_and_merge_and_unload_need_the_names_of_adapters() -> None:
    model = make_model()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="adapter_names"):
            merge()


def test_merge_adapter_refuses_tasks_until_unmerge_adapter() -> None:
    model = make_model()
    ids = random_ids(2)
    before = model(ids, tasks="prose").data
    plain = model(ids, tasks=BASE).data
    model.merge_adapter(model.adapters_of("prose"))
    with pytest.raises(ConfigError, match=r"prose are merged, and task 'code' runs without"):
        model(ids, tasks="code")
    assert is_close(model(ids, tasks="prose").data, before)
    with model.disable_adapter():
        assert np.array_equal(model(ids).data, plain)
    model.unmerge_adapter()
    assert np.array_equal(model(ids, tasks="prose").data, before)


def test_merge_and_unload_of_one_task_leaves_no_task() -> None:
    model = make_model()
    ids = random_ids(2)
    before = model(ids, tasks="prose").data
    merged = model.merge_and_unload(adapter_names=model.adapters_of("prose"))
    assert is_close(merged(ids).data, before)
    with pytest.raises(ConfigError, match="'prose'"):
        model(ids, tasks="prose")


# ---- generation ----


def test_generate_continues_each_prompt_as_its_own_task() -> None:
    model = make_model("heads").eval()
    ids = random_ids(5, 3)
    tasks = ["prose", BASE, "code", "prose", "code"]
    tokens = generate(model, ids, 5, tasks=tasks, temperature=0)
    assert tokens.shape == (5, 8)
    for i, task in enumerate(tasks):
        with model.task(task):
            alone = generate(model, ids[i : i + 1], 5, temperature=0)
        assert np.array_equal(tokens[i : i + 1], alone)
    assert np.array_equal(generate(model, ids, 0, tasks=tasks), ids)


def test_generate_of_several_tasks_fills_the_texts_that_have_ended() -> None:
    model = make_model("heads").eval()
    ids = random_ids(4, 3)
    tasks = ["prose", "code", "prose", BASE]
    whole = generate(model, ids, 6, tasks=tasks, temperature=0)
    stop = int(whole[1, 4])
    ended = generate(model, ids, 6, tasks=tasks, temperature=0, eos=[stop], pad=0)
    for row, text in zip(whole, ended, strict=True):
        places = np.flatnonzero(row[3:] == stop)
        length = 4 + int(places[0]) if len(places) else 9
        assert np.array_equal(text[:length], row[:length])
        assert not text[length:].any()
    texts = generate(model, ids[:2], 6, tasks=tasks[:2], temperature=0, eos=range(1, 13), pad=0)
    assert texts.shape[1] <= 5


def test_generate_takes_one_task_for_all_prompts() -> None:
    model = make_model("heads").eval()
    ids = random_ids(2, 3)
    results = set()
    for task in NAMES:
        tokens = generate(model, ids, 5, tasks=task, temperature=0)
        assert np.array_equal(tokens, generate(model, ids, 5, tasks=[task] * 2, temperature=0))
        results.add(tokens.tobytes())
    assert len(results) == 3


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_generate_of_several_tasks_takes_prompts_of_several_lengths(temperature: float) -> None:
    """A text follows from its prompt, its task, its row and the seed."""
    model = make_model("heads").eval()
    prompts = [random_ids(1, length)[0] for length in (3, 1, 5, 3, 3)]
    tasks = ["prose", BASE, "code", "prose", "code"]
    options = {"temperature": temperature, "seed": 2}
    texts = generate(model, prompts, 5, tasks=tasks, **options)
    for row, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
        with model.task(task):
            alone = generate(model, prompt[None], 5, **options, rows=[row])
        assert np.array_equal(texts[row], alone[0])
    some = generate(model, prompts[2:], 5, tasks=tasks[2:], **options, rows=[2, 3, 4])
    assert all(map(np.array_equal, some, texts[2:]))


# ---- files ----


@ANY_FORM
def test_from_pretrained_reads_the_tasks_that_save_pretrained_wrote(
    form: str, tmp_path: Path
) -> None:
    model = make_model(form, "float32")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*model.peft_config, FILE}
    again = MultiTask.from_pretrained(base("float32"), tmp_path)
    assert again.tasks == model.tasks
    assert list(again.peft_config) == list(model.peft_config)
    assert not trained(again)
    assert not any(module.training for _, module in again.named_modules())
    assert bits(again) == bits(model)
    batch = random_batch("code", BASE, "prose", "code")
    y = model(batch.ids, tasks=batch.tasks)
    assert np.array_equal(again(batch.ids, tasks=batch.tasks).data, y.data)
    resumed = MultiTask.from_pretrained(base("float32"), tmp_path, is_trainable=True)
    assert trained_names(resumed) == trained_names(model)
    assert all(module.training for _, module in resumed.named_modules())
    for name in model.peft_config:  # each folder is an adapter of PEFT's
        alone = PeftModel.from_pretrained(base("float32"), tmp_path / name)
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert alone.state_dict().keys() == stored.keys()


DAMAGED: list[Any] = []


def add_damaged(label: str, message: str, written: dict[str, Any]) -> None:
    DAMAGED.append(pytest.param(written, message, id=label))


add_damaged("no tasks", "tasks", {})
add_damaged("a list", "tasks", {"tasks": ["prose"]})
add_damaged("no names", "tasks", {"tasks": {"prose": "prose"}})
add_damaged("an empty task", "tasks", {"tasks": {"prose": []}})
add_damaged("numbers", "tasks", {"tasks": {"prose": [1]}})
add_damaged("none", "task", {"tasks": {}})
add_damaged("a path", r"'\.\./elsewhere'", {"tasks": {"prose": ["../elsewhere"]}})
add_damaged("the base", "'__base__'", {"tasks": {BASE: ["prose"]}})
add_damaged("unequal", "DoRA", {"tasks": {"prose": ["prose", "code"]}})


@pytest.mark.parametrize(("written", "message"), DAMAGED)
def test_from_pretrained_refuses_a_damaged_list_of_tasks_and_changes_nothing(
    written: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    model = make_model("DoRA", "float32")
    model.save_pretrained(folder)
    model.save_pretrained(tmp_path / "elsewhere")
    (folder / FILE).write_text(json.dumps(written))
    plain = base("float32")
    before = describe(plain)
    with pytest.raises(FormatError, match=rf"{re.escape(FILE)}.*{message}"):
        MultiTask.from_pretrained(plain, folder)
    assert describe(plain) == before


def test_from_pretrained_refuses_a_folder_without_one_of_its_adapters(tmp_path: Path) -> None:
    make_model(dtype="float32").save_pretrained(tmp_path)
    (tmp_path / "code" / "adapter_config.json").unlink()
    plain = base("float32")
    before = describe(plain)
    with pytest.raises(FormatError, match="adapter_config"):
        MultiTask.from_pretrained(plain, tmp_path)
    assert describe(plain) == before


def test_from_pretrained_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MultiTask.from_pretrained(base("float32"), tmp_path / "nowhere")
