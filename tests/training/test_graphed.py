"""Steps of a GPU by captured graphs: the bits of steps in the ordinary way, in one launch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
import small

from minilora.backend import get_backend
from minilora.cuda import graphs
from minilora.data.batches import PackedRecords
from minilora.errors import NonFiniteError
from minilora.lora import (
    AdaLoraConfig,
    HydraConfig,
    LoraConfig,
    MultiTask,
    get_multitask_model,
    get_peft_model,
)
from minilora.models.transformer import CausalLM
from minilora.quant import quantize
from minilora.quant.half import convert_to_half, encode_half, half_weight_owners
from minilora.training.graphed import MOST_GRAPHS, WARM_UP
from minilora.training.loop import Settings, evaluate, train
from minilora.training.parallel import ShardedStep
from minilora.training.run import Run

pytestmark = pytest.mark.gpu

VOCABULARY = 16
TEXT = np.random.default_rng(3).integers(0, VOCABULARY, 600).astype(np.int32)
SETTINGS = Settings(steps=7, batch_size=3, context=6, lr=0.02, warmup=2, max_grad_norm=0.05)
ALL = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False}


def base(device: str, **changes: Any) -> CausalLM:
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": 8, **changes}
    return small.base("float32", get_backend(device), **config)


def lora(device: str, **changes: Any) -> Any:
    return get_peft_model(base(device), LoraConfig(**{**ALL, **changes}), seed=2)


def adalora(device: str, **changes: Any) -> Any:
    fields = {"init_r": 3, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 3, "total_step": 12}
    config = AdaLoraConfig(**{**fields, "target_modules": "all-linear", **changes})
    return get_peft_model(base(device), config, seed=2)


def on_codes(kind: str) -> Callable[[str], Any]:
    def build(device: str) -> Any:
        model = base(device)
        quantize(model, kind)
        return get_peft_model(model, LoraConfig(**ALL), seed=2)

    return build


def on_bfloat16(device: str) -> Any:
    model = base(device)
    for module in half_weight_owners(model).values():
        module.weight.data = encode_half(module.weight.data, "bfloat16").decode("float32")
    convert_to_half(model, "bfloat16")
    return get_peft_model(model, LoraConfig(**ALL), seed=2)


def rounding(compute: str, build: Callable[[str], Any]) -> Callable[[str], Any]:
    """A model whose products with frozen weights are rounded."""

    def build_rounded(device: str) -> Any:
        model = build(device)
        model.set_compute(compute)
        return model

    return build_rounded


def hydra(device: str) -> Any:
    fields = {"r": 3, "experts": 2, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(base(device), HydraConfig(**fields), seed=2)


def full(device: str) -> Any:
    return base(device)


def of_type(kind: str, **changes: Any) -> Callable[[str], Any]:
    def build(device: str) -> Any:
        model = base(device, model_type=kind, attention_bias=False, **changes)
        return get_peft_model(model, LoraConfig(**{**ALL, "lora_dropout": 0.2}), seed=2)

    return build


MODELS: dict[str, Callable[[str], Any]] = {
    "lora": lora,
    "dropout": lambda device: lora(device, lora_dropout=0.3),
    "dora": lambda device: lora(device, use_dora=True),
    "dora, dropout": lambda device: lora(device, use_dora=True, lora_dropout=0.3),
    "rslora, bias": lambda device: lora(device, use_rslora=True, bias="all"),
    "adalora": adalora,
    "adalora, dropout": lambda device: adalora(device, lora_dropout=0.3),
    "hydra": hydra,
    "nf4": on_codes("nf4"),
    "fp4": on_codes("fp4"),
    "int8": on_codes("int8"),
    "bfloat16": on_bfloat16,
    "embedding, head": lambda device: lora(
        device, target_modules=["embed_tokens", "q_proj", "lm_head"]
    ),
    "saved modules": lambda device: lora(
        device, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]
    ),
    "trainable tokens": lambda device: lora(
        device, target_modules=["q_proj"], trainable_token_indices=[1, 4]
    ),
    "tf32": rounding("tf32", lora),
    "tf32, bfloat16 stored": rounding("tf32", on_bfloat16),
    "tf32, nf4": rounding("tf32", on_codes("nf4")),
    "tf32, dora, dropout": rounding(
        "tf32", lambda device: lora(device, use_dora=True, lora_dropout=0.3)
    ),
    "bfloat16 products": rounding("bfloat16", lora),
    "bfloat16 products, stored": rounding("bfloat16", on_bfloat16),
    "bfloat16 products, adalora": rounding("bfloat16", adalora),
    "full": full,
    "gpt2": of_type("gpt2", rope_parameters={}, num_key_value_heads=2),
    "mistral": of_type("mistral", sliding_window=3),
    "qwen3": of_type("qwen3"),
}


def take_steps(
    build: Callable[[str], Any],
    graph: bool,
    device: str = "cuda",
    text: Any = TEXT,
    **changes: Any,
) -> tuple[Run, list[dict[str, Any]]]:
    """A run after all its steps, and the lines of its log without times."""
    model = build(device).train()
    settings = dataclasses.replace(SETTINGS, graph=graph, **changes)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(settings.gradient_checkpointing)
    run = Run(model, text, settings, Path("unused"))
    with ShardedStep(model, 1, run.settings.shard) as sharded:
        lines = [run.step(sharded) for _ in range(settings.steps)]
    for line in lines:
        del line["seconds"]
    return run, lines


def weights(run: Run) -> dict[str, bytes]:
    return {name: p.numpy().tobytes() for name, p in run.model.named_parameters()}


def moments(run: Run) -> tuple[dict[str, bytes], Any]:
    arrays, numbers = run.optimizer.state_dict()
    return {name: array.tobytes() for name, array in arrays.items()}, numbers


def assert_replay_is_eager(build: Callable[[str], Any], replays: int, **changes: Any) -> None:
    captured, lines = take_steps(build, True, **changes)
    eager, expected = take_steps(build, False, **changes)
    assert captured.graphs is not None
    assert captured.graphs.reason == ""
    assert captured.graphs.replays == replays
    assert eager.graphs is None
    assert lines == expected
    assert weights(captured) == weights(eager)
    assert moments(captured) == moments(eager)


@pytest.mark.parametrize("name", MODELS)
def test_run_step_by_a_graph_has_the_bits_of_an_ordinary_one(name: str) -> None:
    steps = 12 if "adalora" in name else SETTINGS.steps
    replays = steps - WARM_UP
    if "adalora" in name:
        # Steps 3, 6, 9 and 10 allocate; the two after the last are of another kind.
        replays = 12 - 4 - WARM_UP - 2
    assert_replay_is_eager(MODELS[name], replays, steps=steps)


CHANGES = {
    "accumulate": {"accumulate": 2, "shard": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "weight decay": {"weight_decay": 0.3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_run_step_by_a_graph_follows_the_settings(name: str) -> None:
    assert_replay_is_eager(MODELS["dropout"], SETTINGS.steps - WARM_UP, **CHANGES[name])


@pytest.mark.parametrize("optimizer", ["loraplus", "lorafa"])
@pytest.mark.parametrize("name", ["dropout", "dora, dropout"])
def test_run_step_by_a_graph_takes_optimizers_of_pairs(name: str, optimizer: str) -> None:
    """LoRA-FA's inverses are there before the capture, and stay."""
    assert_replay_is_eager(MODELS[name], SETTINGS.steps - WARM_UP, optimizer=optimizer)


def test_run_step_by_the_riemannian_optimizer_is_not_captured_and_says_why() -> None:
    run, lines = take_steps(lora, True, optimizer="riemannian")
    assert run.graphs is not None
    assert run.graphs.replays == run.graphs.captures == 0
    reason = "one operation at a time: the Riemannian step decomposes r x r matrices on the host"
    assert reason in run.graphs.explain()
    _, on_cpu = take_steps(lora, True, "cpu", optimizer="riemannian")
    for mine, reference in zip(lines, on_cpu, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_run_step_by_a_graph_takes_packed_records() -> None:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, VOCABULARY, 70)
    counts = rng.random(70) < 0.7
    counts[1::7] = True
    text = PackedRecords(ids, counts, np.arange(0, 71, 7), np.sort([*range(0, 70, 7), 3, 24, 45]))
    assert_replay_is_eager(lora, SETTINGS.steps - WARM_UP, text=text)


def two_tasks(device: str) -> MultiTask:
    tasks = {task: LoraConfig(**ALL) for task in ("code", "prose")}
    return get_multitask_model(base(device), tasks, seed=4)


def test_run_step_by_a_graph_takes_several_tasks() -> None:
    text = {"code": TEXT[:300], "prose": TEXT[300:]}
    assert_replay_is_eager(two_tasks, SETTINGS.steps - WARM_UP, text=text, batch_size=4)


def test_run_of_200_steps_by_graphs_has_the_bits_of_eager_steps_and_numpy_s_losses() -> None:
    changes = {"steps": 200, "lr": 1e-3, "max_grad_norm": 1.0, "shard": 2**31}
    on_gpu, there = take_steps(MODELS["dropout"], True, **changes)
    eager, expected = take_steps(MODELS["dropout"], False, **changes)
    _, here = take_steps(MODELS["dropout"], True, "cpu", **changes)
    assert on_gpu.graphs is not None
    assert on_gpu.graphs.replays == 200 - WARM_UP
    assert there == expected
    assert weights(on_gpu) == weights(eager)
    for mine, reference in zip(there, here, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5)


def test_run_step_by_a_graph_is_one_launch_and_three_copies(emulated: None) -> None:
    model = lora("cuda", lora_dropout=0.1).train()
    run = Run(model, TEXT, SETTINGS, Path("unused"))
    with ShardedStep(model, 1) as sharded:
        for _ in range(WARM_UP + 2):
            with cupy_on_cpu.counted() as device:
                run.step(sharded)
    counts = device.counts
    assert counts.replays == 1
    assert counts.uploads == counts.downloads == counts.waits == 1
    assert counts.operations == 2


def test_run_step_by_a_graph_that_is_not_finite_changes_nothing() -> None:
    model = lora("cuda").train()
    run = Run(model, TEXT, SETTINGS, Path("unused"))
    norm = model.get_base_model().model.norm.weight
    whole = norm.data.copy()
    with ShardedStep(model, 1) as sharded:
        for _ in range(WARM_UP + 2):
            run.step(sharded)
        before = weights(run), moments(run)
        broken = whole.copy()
        broken[0] = np.nan
        norm.data = broken
        with pytest.raises(NonFiniteError, match=f"step {WARM_UP + 2}: .* weights are unchanged"):
            run.step(sharded)
        norm.data = whole
        assert (weights(run), moments(run)) == before
        assert run.done == WARM_UP + 2
        line = run.step(sharded)
    _, expected = take_steps(lora, False)
    assert line["loss"] == expected[WARM_UP + 2]["loss"]


def test_run_step_that_cannot_be_captured_says_why_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, work: Any) -> Any:
        raise RuntimeError("the driver is too old\nfor this")

    monkeypatch.setattr(graphs.Recorder, "capture", refuse)
    with pytest.warns(UserWarning, match="cuda:0: .* one operation at a time: .* too old") as seen:
        run, lines = take_steps(lora, True)
    assert len(seen) == 1
    assert run.graphs is not None
    assert "the driver is too old" in run.graphs.explain()
    assert lines == take_steps(lora, False)[1]


def test_run_step_by_a_graph_after_work_that_waits_in_a_capture() -> None:
    """A loss that reads a value cannot be captured: the run goes on in the ordinary way."""
    model = lora("cuda").train()
    run = Run(model, TEXT, SETTINGS, Path("unused"))

    def loss(model: Any, batch: Any) -> Any:
        result = model(batch.ids, targets=batch.targets)
        float(result.data)
        return result

    warned = pytest.warns(UserWarning, match="one operation at a time")
    with ShardedStep(model, 1, loss=loss) as sharded, warned:
        for _ in range(5):
            run.step(sharded)
    expected = take_steps(lora, False)[1]
    assert run.losses == [line["loss"] for line in expected[:5]]


def test_graphed_step_gives_up_after_many_shapes() -> None:
    model = lora("cuda").train()
    run = Run(model, TEXT, dataclasses.replace(SETTINGS, steps=50), Path("unused"))
    with ShardedStep(model, 1) as sharded, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for size in range(1, MOST_GRAPHS + 2):
            run.windows.batch_size = size  # type: ignore[union-attr]
            for _ in range(WARM_UP + 1):
                run.step(sharded)
        run.step(sharded)
    assert len([w for w in seen if "graphs can hold" in str(w.message)]) == 1
    assert run.graphs is not None
    assert run.graphs.replays == MOST_GRAPHS
    assert "differ in more ways" in run.graphs.explain()


def test_evaluate_on_a_gpu_by_graphs_has_the_same_bits(emulated: None) -> None:
    model = lora("cuda")
    results = []
    for graph in (True, False):
        with ShardedStep(model, 1, graph=graph) as sharded, cupy_on_cpu.counted() as device:
            results.append(evaluate(model, TEXT, 6, sharded=sharded))
        replays = device.counts.replays
        assert (replays > 0) == graph
        assert device.counts.waits == 1
    assert results[0] == results[1]


def test_train_by_graphs_resumes_and_evaluates_as_without(tmp_path: Path) -> None:
    results = []
    for graph in (True, False):
        settings = dataclasses.replace(SETTINGS, graph=graph, eval_every=3, save_every=4)
        out = tmp_path / str(graph)
        straight = train(lora("cuda"), TEXT, settings, out, held_out=TEXT[:99])
        resumed = lora("cuda")
        again = train(
            resumed, TEXT, settings, tmp_path / f"again-{graph}", held_out=TEXT[:99],
            resume=out / "checkpoints" / "step-4",
        )  # fmt: skip
        assert again.losses == straight.losses
        results.append((straight.losses, straight.evaluations, again.evaluations))
    assert results[0] == results[1]
