"""Several tasks beside peft: any task loads there as one adapter, and mixed rows are those of its `adapter_names`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import NAMES, close, peft, randomise, torch

from minilora.lora import AdaLoraConfig, LoraConfig, MultiTask, get_multitask_model
from minilora.lora.multitask import BASE
from minilora.models.transformer import CausalLM

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
IDS = np.random.default_rng(0).integers(0, 13, (6, 9))


def theirs(model: Any, ids: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids), **options).logits.numpy()  # type: ignore[no-any-return]


def made(
    base: Path, tasks: dict[str, LoraConfig | None], shared: LoraConfig | None, seed: int = 0
) -> MultiTask:
    model = get_multitask_model(CausalLM.from_pretrained(base), tasks, shared).eval()
    randomise((p for p in model.parameters() if p.requires_grad), seed)
    return model


@st.composite
def configs(draw: st.DrawFn, heads: bool = False) -> LoraConfig:
    return LoraConfig(
        r=draw(st.integers(1, 6)),
        lora_alpha=draw(st.integers(1, 16)),
        use_rslora=draw(st.booleans()),
        target_modules=draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)),
        rank_pattern=draw(st.sampled_from([{}, {"q_proj": 2}])),
        alpha_pattern=draw(st.sampled_from([{}, {"up_proj": 3}])),
        modules_to_save=draw(st.sampled_from([None, ["lm_head"]])) if heads else None,
        task_type="CAUSAL_LM",
    )


@settings(max_examples=15)
@given(configs(heads=True), configs(), st.none() | configs(), st.integers(0, 99))
def test_every_task_loads_there_as_one_adapter(
    tmp_path_factory: pytest.TempPathFactory,
    llama: tuple[Path, Any],
    prose: LoraConfig,
    code: LoraConfig,
    shared: LoraConfig | None,
    seed: int,
) -> None:
    base, plain = llama
    folder = tmp_path_factory.mktemp("tasks")
    ours = made(base, {"prose": prose, "code": code}, shared, seed)
    for task in ours.tasks:
        ours.export(task, folder / task)
        alone = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder / task).eval()
        assert close(theirs(alone, IDS), ours(IDS, tasks=task).data, 1e-5)
        assert close(theirs(alone.merge_and_unload(), IDS), ours.merge_task(task)(IDS).data, 1e-5)


@pytest.mark.parametrize(
    "shared", [None, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])]
)
@pytest.mark.parametrize(
    "tasks", [["prose", "code", BASE, "prose", "code", "code"], ["code"] * 5 + ["prose"]]
)
def test_mixed_rows_are_those_of_adapter_names(
    shared: LoraConfig | None, tasks: list[str], llama: tuple[Path, Any], tmp_path: Path
) -> None:  # fmt: skip
    base, plain = llama
    configs: dict[str, LoraConfig | None] = {
        "prose": LoraConfig(r=2, target_modules="all-linear"),
        "code": LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "up_proj"]),
    }
    ours = made(base, configs, shared)
    for task in ours.tasks:
        ours.export(task, tmp_path / task)
    model = peft.PeftModel.from_pretrained(
        copy.deepcopy(plain), tmp_path / "prose", adapter_name="prose"
    )
    model.load_adapter(tmp_path / "code", "code")
    there = theirs(model.eval(), IDS, adapter_names=tasks)
    assert close(ours(IDS, tasks=tasks).data, there, 1e-5)
    assert np.array_equal(ours(IDS, tasks=BASE).data, CausalLM.from_pretrained(base)(IDS).data)


def test_the_folders_of_all_tasks_are_peft_s(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """Each is an adapter by its name there, and peft's active adapters add up as a task's do."""
    base, plain = llama
    shared = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["v_proj"])
    for kind in (LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), shared):
        folder = tmp_path / kind.peft_type
        ours = made(
            base, {"prose": LoraConfig(r=2, target_modules="all-linear"), "code": None}, kind
        )
        ours.save_pretrained(folder)
        model = peft.PeftModel.from_pretrained(
            copy.deepcopy(plain), folder / "shared", adapter_name="shared"
        ).eval()
        assert close(theirs(model, IDS), ours(IDS, tasks="code").data, 1e-5)
        if kind is not shared:  # peft holds adapters of one kind at a time
            model.load_adapter(folder / "prose", "prose")
            model.base_model.set_adapter(["shared", "prose"])
            assert close(theirs(model, IDS), ours(IDS, tasks="prose").data, 1e-5)
        ours.export("prose", folder / "one")  # of AdaLoRA and LoRA together: A is diag(E) A
        model = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder / "one").eval()
        assert close(theirs(model, IDS), ours(IDS, tasks="prose").data, 1e-5)
