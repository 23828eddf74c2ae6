"""Several tasks beside peft: each task is an adapter there, and mixed rows are `adapter_names`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import NAMES, close, in_double, load_ours, load_theirs, logits, randomise, trainable

from minilora.lora import AdaLoraConfig, LoraConfig, MultiTask, get_multitask_model
from minilora.lora.multitask import BASE
from minilora.models.transformer import CausalLM

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
IDS = np.random.default_rng(0).integers(0, 13, (6, 9))
ALL = LoraConfig(r=2, target_modules="all-linear")
SHARED = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


def make_tasks(base: Path, shared: Any, seed: int = 0, **tasks: LoraConfig | None) -> MultiTask:
    """Our model with these tasks' adapters and the shared one, all random."""
    model = get_multitask_model(CausalLM.from_pretrained(base), tasks, shared).eval()
    randomise(trainable(model).values(), seed)
    return model


@st.composite
def configs(draw: st.DrawFn, heads: bool = False) -> LoraConfig:
    """LoRA on some linear layers, and with `heads` perhaps a copy of the head."""
    return LoraConfig(
        r=draw(st.integers(1, 6)),
        lora_alpha=draw(st.integers(1, 16)),
        use_rslora=draw(st.booleans()),
        target_modules=draw(some(NAMES)),
        rank_pattern=draw(st.sampled_from([{}, {"q_proj": 2}])),
        alpha_pattern=draw(st.sampled_from([{}, {"up_proj": 3}])),
        modules_to_save=draw(st.sampled_from([None, ["lm_head"]])) if heads else None,
        task_type="CAUSAL_LM",
    )


@settings(max_examples=15)
@given(configs(heads=True), configs(), st.none() | configs(), st.integers(0, 99))
def test_export_writes_any_task_as_one_adapter_of_peft(
    tmp_path_factory: pytest.TempPathFactory,
    llama: tuple[Path, Any],
    prose: LoraConfig,
    code: LoraConfig,
    shared: LoraConfig | None,
    seed: int,
) -> None:
    base, plain = llama
    folder = tmp_path_factory.mktemp("tasks")
    ours = make_tasks(base, shared, seed, prose=prose, code=code)
    for task in ours.tasks:
        ours.export(task, folder / task)
        exact = load_ours(base, folder / task, "float64")(IDS).data
        theirs = load_theirs(plain, folder / task)
        assert close(logits(theirs, IDS), ours(IDS, tasks=task).data)
        merged = ours.merge_task(task)
        assert close(logits(theirs.merge_and_unload(), IDS), merged(IDS).data)
        double = in_double(load_theirs(plain, folder / task))
        assert close(logits(double, IDS), exact, 1e-9)


MIXED = ["prose", "code", BASE, "prose", "code", "code"]


@pytest.mark.parametrize("shared", [None, SHARED])
@pytest.mark.parametrize("tasks", [MIXED, ["code"] * 5 + ["prose"]])
def test_multitask_rows_are_those_of_adapter_names_in_peft(
    shared: LoraConfig | None, tasks: list[str], llama: tuple[Path, Any], tmp_path: Path
) -> None:
    base, plain = llama
    code = LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    ours = make_tasks(base, shared, prose=ALL, code=code)
    for task in ours.tasks:
        ours.export(task, tmp_path / task)
    theirs = load_theirs(plain, tmp_path / "prose", "prose")
    theirs.load_adapter(tmp_path / "code", "code")
    expected = logits(theirs.eval(), IDS, adapter_names=tasks)
    assert close(ours(IDS, tasks=tasks).data, expected)
    alone = CausalLM.from_pretrained(base)
    assert np.array_equal(ours(IDS, tasks=BASE).data, alone(IDS).data)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_multitask_save_pretrained_writes_folders_of_peft(
    llama: tuple[Path, Any], tmp_path: Path, method: str
) -> None:
    """Each folder is an adapter, and peft's active adapters add up as a task's do."""
    base, plain = llama
    shared = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    if method == "adalora":
        shared = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["v_proj"])
    ours = make_tasks(base, shared, prose=ALL, code=None)
    ours.save_pretrained(tmp_path)
    theirs = load_theirs(plain, tmp_path / "shared", "shared")
    assert close(logits(theirs, IDS), ours(IDS, tasks="code").data)
    prose = ours(IDS, tasks="prose").data
    if method == "lora":  # peft's active adapters must be of one type
        theirs.load_adapter(tmp_path / "prose", "prose")
        theirs.base_model.set_adapter(["shared", "prose"])
        assert close(logits(theirs, IDS), prose)
    ours.export("prose", tmp_path / "one")  # with AdaLoRA, A is diag(E) A
    assert close(logits(load_theirs(plain, tmp_path / "one"), IDS), prose)
