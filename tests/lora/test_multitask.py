"""Several tasks in one batch: rows and gradients are each task's own, steps weigh them, any task can be taken out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import SMALLER as SHAPE
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


def lora(**changes: Any) -> LoraConfig:
    """Both factors random, so that no gradient is zero by chance."""
    return LoraConfig(
        **{"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | changes
    )


def adaptive(**changes: Any) -> AdaLoraConfig:
    options = {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["q_proj", "up_proj"]}
    return AdaLoraConfig(**options | {"init_lora_weights": False} | changes)


def hydra() -> HydraConfig:
    return HydraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


# By name: each task's configuration, and that of the shared adapter.
FORMS: dict[str, Callable[[], tuple[dict[str, LoraConfig | None], LoraConfig | None]]] = {
    "one for all": lambda: ({"prose": None, "code": None}, lora(r=3)),
    "one for each": lambda: (
        {"prose": lora(), "code": lora(r=5, lora_alpha=3, target_modules=["q_proj", "up_proj"])},
        None,
    ),
    "shared and own": lambda: (
        {"prose": lora(), "code": lora(r=3, use_rslora=True)},
        lora(r=4, lora_alpha=5),
    ),
    "some have their own": lambda: (
        {"prose": None, "code": lora(target_modules=["o_proj"])},
        lora(r=3),
    ),
    "heads": lambda: (
        {"prose": lora(modules_to_save=["lm_head"]), "code": lora()},
        lora(target_modules=["v_proj"]),
    ),
    "DoRA": lambda: ({"prose": lora(use_dora=True), "code": lora(use_dora=True, r=4)}, None),
    "DoRA in other layers": lambda: (
        {"prose": lora(use_dora=True, target_modules=["q_proj"]), "code": None},
        lora(target_modules=["down_proj"]),
    ),
    "HydraLoRA": lambda: ({"prose": hydra(), "code": lora()}, lora(r=3)),
    "AdaLoRA": lambda: ({"prose": adaptive(), "code": lora()}, lora(r=1)),
}


def base(dtype: str = "float64", device: Any = "cpu") -> CausalLM:
    return CausalLM(SHAPE, seed=1, dtype=dtype, device=device)


def model(
    form: str = "shared and own", dtype: str = "float64", device: Any = "cpu", **options: Any
) -> MultiTask:
    tasks, shared = FORMS[form]()
    made = get_multitask_model(base(dtype, device), tasks, shared, seed=2, **options)
    for name, p in made.named_parameters():
        if "modules_to_save" in name:  # a copy: let it differ from what it is a copy of
            p.data = p.backend.from_numpy(
                np.random.default_rng(7).standard_normal(p.shape).astype(p.dtype)
            )
    return made


def trained(made: Any) -> list[Any]:
    return [p for p in made.parameters() if p.requires_grad]


def bits(made: Any) -> dict[str, bytes]:
    return {name: p.numpy().tobytes() for name, p in made.named_parameters()}


def batch_of(tasks: list[str] | None, length: int = 5, seed: int = 0, rows: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 13, (len(tasks or []) or rows, length + 1))
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), tasks=tasks)


def close(a: Any, b: Any, rel: float = 1e-12) -> bool:
    return a.shape == b.shape and bool(
        np.abs(a - b).max(initial=0) <= rel * np.abs(b).max(initial=1e-300)
    )


ANY_FORM = st.sampled_from(list(FORMS))
TASKS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=7)


# ---- forward ----


@given(ANY_FORM, TASKS, st.randoms(use_true_random=False))
def test_a_row_is_what_its_task_gives_wherever_it_stands(
    form: str, tasks: list[str], random: Any
) -> None:
    made, ids = MODELS[form], np.random.default_rng(len(tasks)).integers(0, 13, (len(tasks), 4))
    y = made(ids, tasks=tasks).data
    for i, task in enumerate(tasks):
        assert close(y[i : i + 1], made(ids[i : i + 1], tasks=task).data)
    order = random.sample(range(len(tasks)), len(tasks))
    assert close(made(ids[order], tasks=[tasks[i] for i in order]).data, y[order])


@pytest.mark.parametrize("form", FORMS)
def test_a_task_is_the_plain_model_with_its_adapters(form: str) -> None:
    """The definition: one PeftModel, whose active adapters are the task's."""
    made, ids = MODELS[form], batch_of(None, rows=3).ids
    assert np.array_equal(made(ids, tasks=BASE).data, base()(ids).data)
    tasks, shared = FORMS[form]()
    for task in tasks:
        names = made.adapters_of(task)
        assert names == tuple(
            n for n, c in (("shared", shared), (task, tasks[task])) if c is not None
        )
        plain = get_peft_model(base(), made.peft_config[names[0]], names[0])
        for name in names[1:]:
            plain.add_adapter(name, made.peft_config[name])
        plain.set_adapter(names)
        own = dict(made.named_parameters())
        for name, p in plain.named_parameters():
            p.data = own[name].data if name in own else p.data
        assert np.array_equal(made(ids, tasks=task).data, plain(ids).data)
    if form != "some have their own":
        assert len({made(ids, tasks=task).data.tobytes() for task in NAMES}) == 2 + (
            form != "one for all"
        )


def test_rows_over_a_quantised_base() -> None:
    made = get_multitask_model(
        quantize(base("float32")), {"prose": lora(), "code": lora(r=3)}, lora(r=1), seed=2
    )
    batch = batch_of(["code", "prose", BASE, "code"])
    y = made(batch.ids, tasks=batch.tasks).data
    assert close(y[1:2], made(batch.ids[1:2], tasks="prose").data, 1e-5)
    with ShardedStep(made, 2, shard=1) as sharded:
        loss, found = sharded.gradients(batch, trained(made))
    assert np.isfinite(float(loss))
    assert all(g is not None and np.isfinite(g).all() for g in found)


def test_the_sum_of_the_losses_is_the_sum_over_rows() -> None:
    made, batch = MODELS["shared and own"], batch_of(["prose", BASE, "code", "prose"])
    together = made(batch.ids, targets=batch.targets, tasks=batch.tasks)
    assert together.shape == ()
    each = [
        made(batch.ids[i : i + 1], targets=batch.targets[i : i + 1], tasks=t)
        for i, t in enumerate(batch.tasks)
    ]
    assert together.item() == pytest.approx(sum(loss.item() for loss in each), rel=1e-13)


# ---- whose rows: contexts ----


def test_without_a_task_nothing_runs_silently() -> None:
    made, ids = MODELS["shared and own"], batch_of(None, rows=2).ids
    with pytest.raises(ConfigError, match=r"tasks is required: .*; choose from prose, code"):
        made(ids)
    with pytest.raises(ConfigError, match="tasks is required"), ShardedStep(made, 1) as sharded:
        sharded.gradients(batch_of(None, rows=2), trained(made))


def test_contexts_nest_and_disabling_wins() -> None:
    made, ids = MODELS["shared and own"], batch_of(None, rows=2).ids
    prose, code, plain = (made(ids, tasks=task).data for task in ("prose", "code", BASE))
    with made.task("prose"):
        assert np.array_equal(made(ids).data, prose)
        with made.task("code"):
            assert np.array_equal(made(ids).data, code)
            assert np.array_equal(made(ids, tasks="prose").data, prose)
        assert np.array_equal(made(ids).data, prose)
    with made.task(BASE):
        assert np.array_equal(made(ids).data, plain)
        assert np.array_equal(made(ids, tasks="code").data, code)
    with made.disable_adapter():
        assert np.array_equal(made(ids).data, plain)
        assert np.array_equal(made(ids, tasks="code").data, plain)
    assert np.array_equal(made(ids, tasks="code").data, code)


def test_a_task_is_one_thread_s_and_one_model_s() -> None:
    made, other, ids, seen = (
        MODELS["shared and own"],
        MODELS["DoRA"],
        batch_of(None, rows=1).ids,
        [],
    )
    code = made(ids, tasks="code").data

    def beside() -> None:
        with made.task("code"):
            seen.append(made(ids).data)
        with pytest.raises(ConfigError):
            made(ids)
        seen.append(None)

    with made.task("prose"):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        with pytest.raises(ConfigError):
            other(ids)
    assert np.array_equal(seen[0], code)
    assert len(seen) == 2


# ---- backward ----


@given(ANY_FORM, TASKS.filter(lambda tasks: set(tasks) != {BASE}))
def test_gradients_are_the_sum_of_each_row_s_and_none_for_what_is_absent(
    form: str, tasks: list[str]
) -> None:
    made, batch = MODELS[form], batch_of(tasks)
    names, params = zip(
        *((n, p) for n, p in made.named_parameters() if p.requires_grad), strict=True
    )
    found = gradients(made(batch.ids, targets=batch.targets, tasks=tasks), params)
    expected: list[Any] = [None] * len(params)
    for i, task in enumerate(tasks):
        if task != BASE:
            with made.task(task):
                each = gradients(
                    made(batch.ids[i : i + 1], targets=batch.targets[i : i + 1]), params
                )
            expected = [
                a if b is None else b if a is None else a + b
                for a, b in zip(expected, each, strict=True)
            ]
    top = max(np.abs(g).max() for g in expected if g is not None)
    running = {adapter for task in tasks for adapter in made.adapters_of(task)}
    for name, g, other in zip(names, found, expected, strict=True):
        assert (
            (g is not None)
            == (other is not None)
            == any(adapter in name.split(".") for adapter in running)
        )
        assert g is None or np.abs(g - other).max() <= 1e-12 * top


@given(st.permutations(range(6)), st.lists(st.integers(1, 5), max_size=3))
def test_interleaving_is_checked_by_differences(order: list[int], cuts: list[int]) -> None:
    rows = np.split(np.array(order), sorted(set(cuts)))
    parts = [np.random.default_rng(i).standard_normal((len(r), 2, 3)) for i, r in enumerate(rows)]
    y = interleave([Tensor(p) for p in parts], rows).data
    for part, group in zip(parts, rows, strict=True):
        assert np.array_equal(y[group], part)
    check_gradient(lambda *leaves: interleave(leaves, rows), *parts)


# ---- a step ----


def definition(
    made: MultiTask, batch: Batch, params: list[Any], weights: dict[str, float] | None
) -> Any:
    """Each task's mean, weighed; or, without weights, the mean of all tokens: no ShardedStep, no dropout."""
    assert batch.tasks is not None
    sums: dict[str, Any] = {}
    for i, task in enumerate(batch.tasks):
        loss = made(batch.ids[i : i + 1], targets=batch.targets[i : i + 1], tasks=task)
        found = gradients(loss, params) if loss.requires_grad else [None] * len(params)
        own = sums.setdefault(task, [0.0, [np.zeros(p.shape) for p in params], 0])
        own[0] += loss.item()
        own[1] = [a if g is None else a + g for a, g in zip(own[1], found, strict=True)]
        own[2] += batch.shard(i, i + 1).tokens
    present = {task: own for task, own in sums.items() if own[2]}
    if weights is None:
        scale = dict.fromkeys(present, 1 / max(1, sum(own[2] for own in present.values())))
    else:
        total = sum(weights.get(task, 1.0) for task in present)
        scale = {task: weights.get(task, 1.0) / total / own[2] for task, own in present.items()}
    loss = sum(scale[task] * own[0] for task, own in present.items())
    zero = [np.zeros(p.shape) for p in params]
    return loss, [
        sum((scale[t] * own[1][i] for t, own in present.items()), start=z)
        for i, z in enumerate(zero)
    ]


@given(
    TASKS.filter(lambda tasks: set(tasks) != {BASE}),
    st.integers(1, 4),
    st.sampled_from([{}, {"prose": 3.0, "code": 0.5}, None]),
    st.integers(0, 99),
    st.sampled_from(["shared and own", "one for each", "DoRA", "HydraLoRA", "heads"]),
    st.sampled_from([0.1, 0.7]),
)
def test_any_cut_is_the_weighted_mean_of_the_tasks_means(
    tasks: list[str],
    shard: int,
    weights: dict[str, float] | None,
    seed: int,
    form: str,
    counted: float,
) -> None:
    made, batch = MODELS[form], batch_of(tasks, seed=seed)
    keep = np.random.default_rng(seed).random(batch.targets.shape) < counted
    batch.targets[~keep] = IGNORE  # a row, and so a task, may count nothing
    params = trained(made)
    expected, slopes = definition(made, batch, params, weights)
    balance: Any = "tokens" if weights is None else weights or "tasks"
    with ShardedStep(made, threads=2, shard=shard, balance=balance) as sharded:
        loss, found = sharded.gradients(batch, params)
    assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-300)
    top = max(np.abs(g).max() for g in slopes)
    for mine, other in zip(found, slopes, strict=True):
        assert np.abs((0 if mine is None else mine) - other).max() <= 1e-12 * top


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_number_of_threads_changes_no_bit(dropout: float) -> None:
    configs = {"prose": lora(lora_dropout=dropout), "code": lora(r=3)}
    made = get_multitask_model(
        base("float32"), configs, lora(r=1, lora_dropout=dropout), seed=2
    ).train()
    params, batch, results = (
        trained(made),
        batch_of(["prose", "code", "prose", BASE, "code", "code", "prose"]),
        [],
    )
    for threads in (1, 2, 4):
        with ShardedStep(made, threads, shard=2) as sharded:
            loss, found = sharded.gradients(batch, params, 5, 6)
            held_out = list(sharded.losses([batch, batch.shard(1, 4)])) if not dropout else []
            results.append((float(loss), [g.tobytes() for g in found], held_out))
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_a_batch_of_one_task_has_the_bits_of_a_step_inside_that_task() -> None:
    made, plain = model(dtype="float32"), batch_of(None, rows=5)
    params, named = trained(made), Batch(plain.ids, plain.targets, tasks=["code"] * 5)
    with ShardedStep(made, 1, shard=2) as sharded:
        loss, found = sharded.gradients(named, params)
        with made.task("code"):
            other, expected = sharded.gradients(plain, params)
    assert float(loss) == float(other)
    for one, two in zip(found, expected, strict=True):
        assert (one is None and two is None) or one.tobytes() == two.tobytes()


def test_dropout_falls_by_the_place_in_the_sorted_batch() -> None:
    made = get_multitask_model(
        base(), {"prose": lora(lora_dropout=0.4), "code": lora(lora_dropout=0.4)}, seed=2
    ).train()
    batch, params = batch_of(["prose", "code", "prose"]), trained(made)
    ordered = Batch(
        batch.ids[[1, 0, 2]], batch.targets[[1, 0, 2]], tasks=["code", "prose", "prose"]
    )
    with ShardedStep(made, 2, shard=1) as sharded:
        found = sharded.gradients(batch, params, 3, 4)
        expected = sharded.gradients(ordered, params, 3, 4)
    assert float(found[0]) == float(expected[0])
    losses = []
    for place, task in enumerate(ordered.tasks or ()):
        with made.task(task), dropout_counter(3, 4, place):
            losses.append(language_modelling_loss(made, ordered.shard(place, place + 1)).item() / 5)
    assert float(found[0]) == pytest.approx(
        (losses[0] + (losses[1] + losses[2]) / 2) / 2, rel=1e-13
    )


def test_every_task_has_its_weight_for_one_step() -> None:
    """A fan and a single layer, seen from inside the step; of "__base__" a fan has one, too."""
    made, seen = model(), []
    layers = [
        m
        for _, m in made.model.named_modules()
        if isinstance(m, FusedProjection) or m in _single(made)
    ]

    def loss(model: Any, batch: Batch) -> Tensor:
        seen.append([len([e for e in layer._effective.values() if e]) for layer in layers])
        return language_modelling_loss(model, batch)

    with ShardedStep(made, 2, shard=1, loss=loss) as sharded:
        sharded.gradients(batch_of(["prose", "code", BASE]), trained(made))
    assert seen == [[3 if isinstance(layer, FusedProjection) else 2 for layer in layers]] * 3
    assert not any(layer._effective for layer in layers)


def _single(made: MultiTask) -> list[Any]:
    return [m for path, m in made.model.named_modules() if path.endswith(("o_proj", "down_proj"))]


def test_what_is_computed_again_for_backward_is_the_same_task_s() -> None:
    """With gradient checkpointing a block runs in backward, too, where nobody says any more whose rows these are."""
    made, batch, results = model(), batch_of(["prose", BASE, "code", "prose"]), []
    params = trained(made)
    for checkpointing in (False, True):
        made.get_base_model().gradient_checkpointing_enable(checkpointing)
        with ShardedStep(made, 2, shard=1) as sharded:
            loss, found = sharded.gradients(batch, params)
        slopes = gradients(made(batch.ids, targets=batch.targets, tasks=batch.tasks), params)
        results.append([float(loss), *(g.tobytes() for g in (*found, *slopes) if g is not None)])
    assert results[0] == results[1]


def test_an_exception_leaves_nothing_prepared() -> None:
    made = model()

    def loss(model: Any, batch: Batch) -> Tensor:
        raise ZeroDivisionError

    with ShardedStep(made, 2, shard=1, loss=loss) as sharded, pytest.raises(ZeroDivisionError):
        sharded.gradients(batch_of(["prose", "code"]), trained(made))
    assert not any(getattr(m, "_effective", None) for _, m in made.model.named_modules())


def test_the_optimiser_leaves_what_is_absent_alone() -> None:
    made = model(dtype="float32").train()
    named = [(n, p) for n, p in made.named_parameters() if p.requires_grad]
    optimizer = AdamW(named, lr=0.1, weight_decay=0.1)
    with ShardedStep(made, 2, shard=1) as sharded:
        for tasks in (["prose", "code"], ["code"], [BASE, "code"]):
            before, state = bits(made), optimizer.state_dict()[0]
            _, found = sharded.gradients(batch_of(tasks), optimizer.params)
            optimizer.step(found)
            changed = {n for n, b in bits(made).items() if b != before[n]}
            running = {adapter for task in tasks for adapter in made.adapters_of(task)}
            assert changed == {n for n, _ in named if running & set(n.split("."))}
    after = optimizer.state_dict()[0]
    for name, moment in state.items():
        assert np.array_equal(moment, after[name]) == (".prose." in name)


def test_tasks_learn_apart_from_each_other() -> None:
    """One text with two continuations: which one is right only the task says."""
    ids = np.tile(np.arange(6), (2, 1))
    targets = np.stack([np.full(6, 3), np.full(6, 8)])
    made = get_multitask_model(base("float32"), {"prose": lora(), "code": lora()}, seed=2).train()
    optimizer = AdamW(trained(made), lr=0.02)
    with ShardedStep(made, 2, shard=1) as sharded:
        for _ in range(60):
            _, found = sharded.gradients(
                Batch(ids, targets, tasks=["prose", "code"]), optimizer.params
            )
            optimizer.step(found)
    said = made(ids, tasks=["prose", "code"]).data.argmax(-1)
    assert np.array_equal(said, targets)


def test_a_task_s_ranks_are_allocated_beside_another_task() -> None:
    made = model("AdaLoRA", "float32").train()
    allocator, params = RankAllocator.of(made, "prose"), trained(made)
    place = {id(p): i for i, p in enumerate(params)}
    own = [place[id(p)] for p in allocator.params]
    optimizer = AdamW(params, lr=0.01)
    with ShardedStep(made, 1, shard=1) as sharded:
        for step in range(9):
            tasks = ["prose", "code"] if step % 3 else ["code"]
            _, found = sharded.gradients(batch_of(tasks, seed=step), params)
            optimizer.step(found)
            allocator.step([found[i] for i in own])
    allocator.prune()
    assert sum(allocator.ranks.values()) == 2 * 4
    ids = batch_of(None, rows=2).ids
    _, tensors = made.task_adapter("prose")
    assert sum(len(t) for key, t in tensors.items() if "lora_A" in key) == 2 * 4 + 14
    assert close(made.merge_task("prose")(ids).data, made.eval()(ids, tasks="prose").data, 1e-5)


def test_the_ordinary_loop_trains_the_task_that_it_is_run_in(tmp_path: Path) -> None:
    made, text = (
        model(dtype="float32"),
        np.random.default_rng(0).integers(0, 13, 300).astype(np.int32),
    )
    before = bits(made)
    with made.task("code"):
        result = train(
            made,
            text,
            Settings(steps=3, batch_size=4, context=6, save_every=3),
            tmp_path,
            held_out=text[:50],
        )
    assert len(result.losses) == 3
    changed = {n for n, b in bits(made).items() if b != before[n]}
    assert changed
    assert all(".code." in n or ".shared." in n for n in changed)
    again = MultiTask.from_pretrained(base("float32"), tmp_path / "checkpoints" / "step-3")
    assert {n: b for n, b in bits(again).items() if "lora" in n} == {
        n: b for n, b in bits(made).items() if "lora" in n
    }


def test_the_losses_of_many_batches() -> None:
    """A task is prepared when its first batch comes, and kept; the sums are those of the rows."""
    made = MODELS["shared and own"]
    batches = [
        batch_of(["prose", "prose"]),
        batch_of(["code", "prose", BASE], seed=1),
        batch_of(["code"], seed=2),
    ]
    expected = [
        made(b.ids[i : i + 1], targets=b.targets[i : i + 1], tasks=b.tasks[i]).item()
        for b, order in zip(
            batches, ([0, 1], [2, 0, 1], [0]), strict=True
        )  # sorted: __base__, code, prose
        for i in order
    ]
    with ShardedStep(made, 2, shard=1) as sharded:
        found = list(sharded.losses(batches))
    assert [count for _, count in found] == [5] * 6
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-13)
    assert not any(getattr(m, "_effective", None) for _, m in made.model.named_modules())


def test_another_device_has_the_same_bits_and_waits_for_nothing() -> None:
    results = []
    for where in ("cpu", STRICT):
        made = model("heads", "float32", where).train()
        params, batch = trained(made), batch_of(["prose", "code", BASE, "prose"])
        with ShardedStep(made, 1, shard=4) as sharded, no_sync():
            loss, found = sharded.gradients(batch, params)
            y = made(batch.ids, tasks=batch.tasks)
            slopes = gradients(y, params, y.data)
        host = params[0].backend.to_numpy
        arrays = [y.data, *(g for g in (*found, *slopes) if g is not None)]
        results.append([float(loss), *(host(a).tobytes() for a in arrays)])
        with made.task("prose"):
            logits = made(made.model.get_input_embeddings().weight.backend.from_numpy(batch.ids))
        assert host(logits.data).shape == (4, 5, 13)
    assert results[0] == results[1]


# ---- bad input: by name, and before anything changes ----


def test_a_task_that_does_not_exist() -> None:
    made, batch = model(), batch_of(["prose", "verse"])
    before = bits(made)
    calls: list[Callable[[], Any]] = [
        lambda: made(batch.ids, tasks=batch.tasks),
        lambda: made(batch.ids, tasks="verse"),
        lambda: made.adapters_of("verse"),
        lambda: made.rows_of(["prose", "verse"], 2),
        lambda: made.task("verse").__enter__(),
        lambda: made.merge_task("verse"),
        lambda: made.task_adapter("verse"),
        lambda: generate(made, batch.ids, 2, tasks=["prose", "verse"]),
        lambda: next(ShardedStep(made, 1).losses([batch])),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="no task 'verse'; choose from prose, code, __base__"):
            call()
    with ShardedStep(made, 2) as sharded, pytest.raises(ConfigError, match="no task 'verse'"):
        sharded.gradients(batch, trained(made))
    assert bits(made) == before
    assert not any(getattr(m, "_effective", None) for _, m in made.model.named_modules())


@pytest.mark.parametrize("tasks", [[], ["prose"], ["prose"] * 3])
def test_the_number_of_tasks_is_the_number_of_rows(tasks: list[str]) -> None:
    made, ids = MODELS["shared and own"], batch_of(None, rows=2).ids
    with pytest.raises(ConfigError, match=f"{len(tasks)} tasks were named for 2 rows"):
        made(ids, tasks=tasks)
    with pytest.raises(ConfigError, match=f"2 sequences needs as many tasks, got {len(tasks)}"):
        Batch(ids, ids, tasks=tasks)


def test_a_model_without_tasks_says_so() -> None:
    made = get_peft_model(base(), lora())
    with (
        ShardedStep(made, 1) as sharded,
        pytest.raises(ConfigError, match="the model has no tasks"),
    ):
        sharded.gradients(batch_of(["prose"]), trained(made))
    with pytest.raises(ConfigError, match="the model has none"):
        generate(made, batch_of(None, rows=1).ids, 1, tasks="prose")


def test_rows_of_the_base_alone_train_nothing() -> None:
    made = model()
    with (
        ShardedStep(made, 1) as sharded,
        pytest.raises(ConfigError, match="nothing to train"),
    ):
        sharded.gradients(batch_of([BASE, BASE]), trained(made))


@pytest.mark.parametrize(
    "balance", ["rows", None, 1, {"prose": 0}, {"prose": -1.0}, {"prose": np.inf}, {"code": "x"}]
)
def test_a_balance_that_means_nothing(balance: Any) -> None:
    with pytest.raises(
        ConfigError, match="balance must be 'tasks', 'tokens' or positive numbers by task"
    ):
        ShardedStep(MODELS["DoRA"], 1, balance=balance)


def test_a_cache_holds_one_task_s_rows() -> None:
    made, ids = MODELS["shared and own"], batch_of(None, rows=2).ids
    with pytest.raises(ConfigError, match="got KeyValueCache"):
        made(ids, KeyValueCache(made, 2, 8), tasks=["prose", "code"])


WRONG: dict[str, tuple[Any, Any, str]] = {
    "DoRA beside the shared one": ({"prose": lora(use_dora=True)}, lora(), "task 'prose', .*'prose' is DoRA's"),
    "a shared DoRA": ({"prose": lora()}, lora(use_dora=True), "'shared' is DoRA's"),
    "two heads": (
        {"prose": lora(modules_to_save=["lm_head"])}, lora(modules_to_save=["lm_head"]), "each replace the same module"
    ),
    "saved here, adapted there": (
        {"prose": lora(modules_to_save=["q_proj"], target_modules=["v_proj"]), "code": lora()}, None, "saved whole"
    ),
    "no task": ({}, lora(), "expected at least one task"),
    "neither": ({"prose": None}, None, "task 'prose' has no adapter"),
    "no dictionary": (["prose"], lora(), "expected a dictionary"),
    "the base's name": ({BASE: lora()}, None, "'__base__' cannot name a task"),
    "the shared one's name": ({"shared": lora()}, lora(), "a task needs another name"),
    "an adapter's bad name": ({"a/b": lora()}, None, "cannot name an adapter"),
    "no name": ({3: lora()}, None, "cannot name"),
    "no name, shared": ({3: None}, lora(), "cannot name"),
    "no configuration": ({"prose": "lora"}, None, "expected a LoraConfig"),
    "biases": ({"prose": lora(bias="all")}, None, "bias must be 'none'"),
    "no such layer": ({"prose": lora(), "code": lora(target_modules=["nothing"])}, None, "match nothing"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_what_cannot_be_is_refused_and_the_model_stays_as_it_was(how: str) -> None:
    tasks, shared, message = WRONG[how]
    plain = base()
    plain.model.norm.weight.requires_grad = False
    before = repr(plain), bits(plain), [p.requires_grad for p in plain.parameters()]
    with pytest.raises(ConfigError, match=message):
        get_multitask_model(plain, tasks, shared)
    assert (repr(plain), bits(plain), [p.requires_grad for p in plain.parameters()]) == before
    assert isinstance(get_multitask_model(plain, {"prose": lora()}), MultiTask)


def test_first_values_depend_on_the_seed_and_the_adapter_s_name_alone() -> None:
    one = get_multitask_model(base(), {"prose": lora(), "code": lora()}, seed=3)
    other = get_multitask_model(base(), {"code": lora()}, lora(), seed=3)
    another = get_multitask_model(base(), {"code": lora()}, seed=4)
    own = [
        {n: p.numpy() for n, p in made.named_parameters() if ".code." in n}
        for made in (one, other, another)
    ]
    prose = {n: p.numpy() for n, p in one.named_parameters() if ".prose." in n}
    for name, values in own[0].items():
        assert np.array_equal(values, own[1][name])
        assert not np.array_equal(values, own[2][name])
        assert not np.array_equal(values, prose[name.replace(".code.", ".prose.")])


def test_tasks_are_declared_and_adapters_deleted_one_by_one() -> None:
    made = model("one for each")
    made.add_adapter("verse", lora(use_dora=True))
    with pytest.raises(ConfigError, match="'verse' is DoRA's"):
        made.declare("verse", ["prose", "verse"])
    with pytest.raises(ConfigError, match="no adapter 'elsewhere'"):
        made.declare("verse", ["elsewhere"])
    with pytest.raises(ConfigError, match="'prose' cannot name a task"):
        made.declare("prose", ["verse"])
    assert list(made.tasks) == ["prose", "code"]
    made.declare("both", ["prose", "code"])
    made.declare("verse", ["verse"])
    ids = batch_of(None, rows=1).ids
    plain, *others = (made(ids, tasks=task).data for task in (BASE, "prose", "code", "both"))
    assert not np.array_equal(
        others[2], others[0] + others[1] - plain
    )  # they add up in every layer, not at the end
    with pytest.raises(ConfigError, match="'prose' is run by task prose, both"):
        made.delete_adapter("prose")
    del made.tasks["prose"], made.tasks["both"]
    made.delete_adapter("prose")
    assert list(made.peft_config) == ["code", "verse"]
    made.set_adapter("verse")
    assert {n.split(".")[-2] for n, p in made.named_parameters() if p.requires_grad} == {"verse"}
    made.set_adapter(["code", "verse"], inference_mode=True)
    assert not trained(made)


# ---- one task by itself ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ["prose", "code"])
def test_an_exported_task_is_one_plain_adapter(form: str, task: str, tmp_path: Path) -> None:
    made, ids = MODELS[form], batch_of(None, rows=3).ids
    if (form, task) in (("HydraLoRA", "prose"), ("DoRA in other layers", "prose")):
        with pytest.raises(
            ConfigError, match=r"HydraLoRA's: a mixture|'prose' is DoRA's: beside shared, prose"
        ):
            made.export(task, tmp_path / "there")
        assert not (tmp_path / "there").exists()
        return
    made.export(task, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == (
        "LORA"
        if len(made.adapters_of(task)) > 1
        else made.peft_config[task if task in made.peft_config else "shared"].peft_type
    )
    alone = PeftModel.from_pretrained(base(), tmp_path)
    assert close(alone(ids).data, made(ids, tasks=task).data)
    if len(made.adapters_of(task)) > 1:
        layers = {p: m for p, m in made.model.named_modules() if isinstance(m, LoraLinear)}
        for path, layer in alone.model.named_modules():
            if isinstance(layer, LoraLinear):
                there = [
                    layers[path].adapters[n]
                    for n in made.adapters_of(task)
                    if n in layers[path].adapters
                ]
                assert layer.adapters["default"].r == sum(a.r for a in there)
                delta = sum(
                    layers[path].delta_weight(n)
                    for n in made.adapters_of(task)
                    if n in layers[path].adapters
                )
                assert close(layer.delta_weight("default"), delta, 1e-14)


def test_the_shared_factors_are_exported_as_they_are() -> None:
    made = model("shared and own")
    config, tensors = made.task_adapter("code")
    assert (config.r, config.lora_alpha) == (7, 5 / 4 * 7)
    own = made.adapter_parameters("shared")
    for key, p in own.items():
        kept = tensors[key][:4] if "lora_A" in key else tensors[key][:, :4]
        assert kept.tobytes() == p.numpy().tobytes()


def test_what_cannot_be_exported() -> None:
    with pytest.raises(ConfigError, match="__base__ runs no adapter"):
        MODELS["DoRA"].task_adapter(BASE)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "HydraLoRA"])
def test_a_merged_task_is_a_plain_model_and_leaves_the_others(form: str) -> None:
    made, ids = MODELS[form], batch_of(None, rows=3).ids
    before = bits(made), made(ids, tasks="prose").data
    for task in NAMES:
        merged = made.merge_task(task)
        assert type(merged) is CausalLM
        assert not any(isinstance(m, (LoraLinear, SavedModule)) for _, m in merged.named_modules())
        assert close(merged(ids).data, made(ids, tasks=task).data)
    assert bits(made) == before[0]
    assert np.array_equal(made(ids, tasks="prose").data, before[1])


def test_merging_is_of_named_adapters_and_tasks_wait_until_it_is_undone() -> None:
    made, ids = model(), batch_of(None, rows=2).ids
    before, plain = made(ids, tasks="prose").data, made(ids, tasks=BASE).data
    for method in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(ConfigError, match="adapter_names is required"):
            method()
    with pytest.raises(ConfigError, match="HydraLoRA cannot be merged"):
        MODELS["HydraLoRA"].merge_task("prose")
    made.merge_adapter(made.adapters_of("prose"))
    with pytest.raises(ConfigError, match="shared, prose are merged"):
        made(ids, tasks="code")
    with made.disable_adapter():
        assert np.array_equal(made(ids).data, plain)
    made.unmerge_adapter()
    assert np.array_equal(made(ids, tasks="prose").data, before)
    merged = made.merge_and_unload(adapter_names=made.adapters_of("prose"))
    assert close(merged(ids).data, before)
    with pytest.raises(ConfigError, match="no task 'prose'"):
        made(ids, tasks="prose")


# ---- generation ----


def test_prompts_of_several_tasks_are_continued_each_by_its_own() -> None:
    made, ids = model("heads").eval(), batch_of(None, length=3, rows=5).ids
    tasks = ["prose", BASE, "code", "prose", "code"]
    tokens = generate(made, ids, 5, tasks=tasks, temperature=0)
    assert tokens.shape == (5, 8)
    for i, task in enumerate(tasks):
        with made.task(task):
            assert np.array_equal(
                tokens[i : i + 1], generate(made, ids[i : i + 1], 5, temperature=0)
            )
    assert np.array_equal(generate(made, ids[:1], 5, tasks="prose", temperature=0), tokens[:1])
    assert (
        len({generate(made, ids[:1], 5, tasks=task, temperature=0).tobytes() for task in NAMES})
        == 3
    )
    assert np.array_equal(generate(made, ids, 0, tasks=tasks), ids)


# ---- files ----


@pytest.mark.parametrize("form", FORMS)
def test_all_tasks_go_into_a_folder_and_come_back(form: str, tmp_path: Path) -> None:
    made = model(form, "float32")
    made.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*made.peft_config, FILE}
    again = MultiTask.from_pretrained(base("float32"), tmp_path)
    assert again.tasks == made.tasks
    assert list(again.peft_config) == list(made.peft_config)
    assert not trained(again)
    assert bits(again) == bits(made)
    batch = batch_of(["code", BASE, "prose", "code"])
    assert np.array_equal(
        again(batch.ids, tasks=batch.tasks).data, made(batch.ids, tasks=batch.tasks).data
    )
    go_on = MultiTask.from_pretrained(base("float32"), tmp_path, is_trainable=True)
    assert [n for n, p in go_on.named_parameters() if p.requires_grad] == [
        n for n, p in made.named_parameters() if p.requires_grad
    ]
    for name in made.peft_config:  # each folder is an adapter of PEFT's
        alone = PeftModel.from_pretrained(base("float32"), tmp_path / name)
        assert (
            alone.state_dict().keys()
            == load_file(tmp_path / name / "adapter_model.safetensors").keys()
        )


BROKEN: dict[str, tuple[Any, str]] = {
    "no tasks": ({}, "expected tasks"),
    "a list": ({"tasks": ["prose"]}, "expected tasks"),
    "no names": ({"tasks": {"prose": "prose"}}, "expected tasks"),
    "an empty task": ({"tasks": {"prose": []}}, "expected tasks"),
    "numbers": ({"tasks": {"prose": [1]}}, "expected tasks"),
    "none": ({"tasks": {}}, "expected at least one task"),
    "a way out": ({"tasks": {"prose": ["../elsewhere"]}}, "cannot name an adapter"),
    "the base": ({"tasks": {BASE: ["prose"]}}, "cannot name a task"),
    "unequal": ({"tasks": {"prose": ["prose", "code"]}}, "is DoRA's"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_list_of_tasks_is_refused_and_the_model_stays_as_it_was(
    how: str, tmp_path: Path
) -> None:
    model("DoRA", "float32").save_pretrained(tmp_path / "here")
    model("DoRA", "float32").save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "here" / FILE).write_text(json.dumps(BROKEN[how][0]))
    plain = base("float32")
    before = repr(plain), [p.requires_grad for p in plain.parameters()]
    with pytest.raises(FormatError, match=BROKEN[how][1]):
        MultiTask.from_pretrained(plain, tmp_path / "here")
    assert (repr(plain), [p.requires_grad for p in plain.parameters()]) == before


def test_a_folder_without_one_of_its_adapters_is_refused(tmp_path: Path) -> None:
    model("shared and own", "float32").save_pretrained(tmp_path)
    (tmp_path / "code" / "adapter_config.json").unlink()
    plain = base("float32")
    before = repr(plain)
    with pytest.raises(FormatError, match="no adapter_config"):
        MultiTask.from_pretrained(plain, tmp_path)
    assert repr(plain) == before
    with pytest.raises(FileNotFoundError):
        MultiTask.from_pretrained(plain, tmp_path / "nowhere")


MODELS = {form: model(form).eval() for form in FORMS}  # of tests that change nothing
