"""DoRA beside peft's: adapters go there and come back, and training in float64 takes the same steps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import IDS, NAMES, close, in_double, logits, peft, randomise, torch

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.data import Batch
from minilora.formats import load_file
from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.models.transformer import CausalLM
from minilora.optim import AdamW
from minilora.training.parallel import ShardedStep

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("prepared", [False, True])
def test_20_steps_in_float64_are_peft_s(
    llama: tuple[Path, Any], tmp_path: Path, prepared: bool
) -> None:
    """Layer by layer as it stands, and with the weights of a step formed beforehand: every number to 1e-9."""
    base, plain = llama
    config = peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=NAMES)
    model = in_double(peft.get_peft_model(copy.deepcopy(plain), config)).train()
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(
        CausalLM.from_pretrained(base, dtype="float64"), tmp_path, is_trainable=True
    )
    start = {name: p.numpy().copy() for name, p in ours.named_parameters()}
    for (
        name,
        p,
    ) in model.named_parameters():  # the start, in double, and not as the file has rounded it
        if p.requires_grad:
            dict(ours.named_parameters())[name].data = p.detach().numpy().copy()
    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-2)
    their_optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids = rng.integers(0, 13, (4, 10))
        loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss
        their_optimizer.zero_grad()
        loss.backward()
        their_optimizer.step()
        if prepared:
            with ShardedStep(ours, shard=2) as sharded:
                value, grads = sharded.gradients(Batch(ids[:, :-1], ids[:, 1:]), trained)
        else:
            cross = F.cross_entropy(ours(ids)[:, :-1], ids[:, 1:])
            value, grads = cross.item(), gradients(cross, trained)
        optimizer.step(grads)
        assert abs(float(value) - loss.item()) <= 1e-9
    for name, p in ours.named_parameters():
        if p.requires_grad:
            there = dict(model.named_parameters())[name].detach().numpy()
            assert np.abs(p.numpy() - there).max() <= 1e-9
            assert np.abs(p.numpy() - start[name]).max() > 1e-3  # it did move


def test_dropout_falls_on_the_same_parts(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """With peft's own masks, in one layer."""
    base, plain = llama
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_dora=True, target_modules=["q_proj"], lora_dropout=0.4
    )
    model = peft.get_peft_model(copy.deepcopy(plain), config).double()
    randomise(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    theirs = model.base_model.model.model.layers[0].self_attn.q_proj.train()
    ours = PeftModel.from_pretrained(CausalLM.from_pretrained(base, dtype="float64"), tmp_path)
    layer = ours.get_base_model().model.layers[0].self_attn.q_proj.train()
    x = np.random.default_rng(0).standard_normal((2, 5, 8))
    torch.manual_seed(3)
    expected = theirs(torch.tensor(x)).detach().numpy()
    torch.manual_seed(3)
    mask = theirs.lora_dropout["default"](torch.ones(2, 5, 8).double()).numpy()
    assert (mask == 0).any()

    class Fallen:
        active = True

        def __call__(self, x: Any) -> Any:
            return x * mask

    layer.adapters["default"].dropout = Fallen()
    assert np.abs(layer(Tensor(x)).data - expected).max() <= 1e-12 * np.abs(expected).max()


@st.composite
def adapter_options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 16)),
        "use_rslora": draw(st.booleans()),
        "use_dora": True,
        "target_modules": draw(
            st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
        ),
        "rank_pattern": draw(st.sampled_from([{}, {"q_proj": 2}])),
        "init_lora_weights": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "modules_to_save": draw(st.sampled_from([None, ["lm_head"]])),
        "task_type": "CAUSAL_LM",
    }


@settings(max_examples=15)
@given(adapter_options(), st.integers(0, 99))
def test_adapters_go_there_and_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    llama: tuple[Path, Any],
    options: dict[str, Any],
    seed: int,
) -> None:
    base, plain = llama
    folder = tmp_path_factory.mktemp("adapter")
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(**copy.deepcopy(options))
    ).eval()
    made = get_peft_model(CausalLM.from_pretrained(base), LoraConfig(**options)).eval()
    if options["init_lora_weights"]:
        assert np.array_equal(made(IDS).data, CausalLM.from_pretrained(base)(IDS).data)
    norms = {n: p.detach().numpy() for n, p in model.named_parameters() if "magnitude" in n}
    if options["init_lora_weights"]:  # otherwise B is random, and so are they
        for name, p in made.named_parameters():
            assert "magnitude" not in name or close(p.numpy(), norms[name], 1e-6)
    randomise((p for p in model.parameters() if p.requires_grad), seed)
    model.save_pretrained(folder / "theirs")
    ours = PeftModel.from_pretrained(CausalLM.from_pretrained(base), folder / "theirs")
    assert close(ours(IDS).data, logits(model), 1e-5)

    assert made.get_nb_trainable_parameters()[0] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    randomise((p for p in made.parameters() if p.requires_grad), seed + 1)
    made.save_pretrained(folder / "ours")
    files = [load_file(folder / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: (a.shape, a.dtype) for k, a in files[0].items()} == {
        k: (a.shape, a.dtype) for k, a in files[1].items()
    }
    written = [
        json.loads((folder / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
    ]
    assert [w["use_dora"] for w in written] == [True, True]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder / "ours").eval()
    assert close(logits(again), made(IDS).data, 1e-5)
    assert close(logits(again.merge_and_unload()), made.merge_and_unload()(IDS).data, 1e-5)
