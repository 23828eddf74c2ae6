"""LoRA's relatives beside peft's: weights, gradients, random numbers, fields and files."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from maps import ROWS
from mlx_golden import GOLDEN
from peers import (
    close,
    load_model,
    load_ours,
    load_theirs,
    logits,
    peft,
    randomise,
    torch,
    trainable,
    transformers,
)

from minilora import CausalLM
from minilora.lora import get_peft_model
from minilora.lora.maps.streams import torch_permutation, torch_uniform, torch_words
from minilora.tools.merging import merge

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
NAMES = [name for name in ROWS if name != "intrinsic"]  # which peft does not have
THROUGH_FLOAT32 = {"fourierft", "unilora"}  # peft casts the spectrum, or the scales, to float32
ONLY_LINEAR = {"loha", "lokr", "miss", "oft"}  # peft has these on torch.nn.Linear alone


def their_config(name: str, **changes: Any) -> Any:
    row = ROWS[name]
    fields = copy.deepcopy({"target_modules": ["proj"], **row.fields, **changes})
    return getattr(peft, row.config.__name__)(**fields)


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, O: int, I: int, conv1d: bool) -> None:
        super().__init__()
        if conv1d:
            self.proj = transformers.pytorch_utils.Conv1D(O, I)
        else:
            self.proj = torch.nn.Linear(I, O)

    def forward(self, x: Any) -> Any:
        return self.proj(x)


SHAPES = [(8, 12), (12, 8), (9, 4), (16, 16)]


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("name", NAMES)
def test_map_has_the_weight_and_the_gradients_of_peft(name: str, conv1d: bool) -> None:
    """In float64, to 1e-9, or to 1e-6 where peft computes a part in float32."""
    if conv1d and name.partition("-")[0] in ONLY_LINEAR:
        pytest.skip("peft refuses Conv1D")
    tolerance = 1e-6 if name.partition("-")[0] in THROUGH_FLOAT32 else 1e-9
    if name.startswith(("loha", "lokr")):
        tolerance = 1e-7  # s is rounded to float32
    for seed, (O, I) in enumerate(SHAPES):
        for inputs in [False, True] if name == "ia3" else [False]:
            changes: dict[str, Any] = {}
            if name == "ia3":
                changes["feedforward_modules"] = ["proj"] if inputs else []
            if name == "miss-mini":
                changes["mini_r"] = [4, 3, 3, 8][seed]
            theirs = peft.get_peft_model(Net(O, I, conv1d).double(), their_config(name, **changes))
            theirs = theirs.double()
            randomise(theirs.parameters(), seed)
            base = theirs.base_model.model.proj.base_layer
            W = base.weight.detach().numpy().copy()
            W = W.T.copy() if conv1d else W
            b = base.bias.detach().numpy().copy()
            fields = {**ROWS[name].fields, **changes, "target_modules": ["proj"]}
            ours = ROWS[name].config(**fields).maps({"proj": (O, I)})["proj"]
            values = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
            theta = []
            leaves = []
            for tensor in (*ours.shapes(), *ours.SHARED):
                leaf = next(v for k, v in values.items() if f"{tensor}.default" in k)
                theta.append(leaf.detach().numpy())
                if isinstance(leaf, torch.nn.Parameter):
                    leaves.append(leaf)
            rng = np.random.default_rng(seed)
            X = rng.standard_normal((5, I))
            dY = rng.standard_normal((5, O))
            y = theirs(torch.tensor(X))
            slopes = torch.autograd.grad(y, leaves, torch.tensor(dY))
            dW = ours.delta(theta, W)
            moved = ours.moved_bias(theta, b) if ours.moves_bias else b
            assert close(X @ (W + dW).T + moved, y, tolerance)
            pulled = list(ours.pull(theta, W, dY.T @ X))
            if ours.moves_bias:
                pulled = [
                    g + more
                    for g, more in zip(pulled, ours.pull_bias(theta, b, dY.sum(0)), strict=True)
                ]
            assert len(pulled) == len(slopes)
            for got, expected in zip(pulled, slopes, strict=True):
                assert close(got, expected, tolerance)
            merged = theirs.merge_and_unload().proj
            V = merged.weight.detach().numpy()
            assert close(W + dW, V.T if conv1d else V, tolerance)
            assert close(moved, merged.bias, tolerance)


# ---- random numbers ----


@pytest.mark.parametrize("seed", [0, 777, 2**31, 2**32 - 1])
def test_torch_words_uniform_and_permutation_have_the_bits_of_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(3, 1001).uniform_(-0.37, 0.37, generator=generator)
    ours = torch_uniform(torch_words(seed, 3003), 0.37)
    assert drawn.numpy().reshape(-1).tobytes() == ours.tobytes()
    for size in (1, 2, 57, 10_007):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randperm(size, generator=generator).numpy()
        assert np.array_equal(torch_permutation(seed, size, size), expected)
        assert np.array_equal(torch_permutation(seed, size, size // 3), expected[: size // 3])


def test_vera_and_fourierft_follow_from_their_seeds_as_in_peft() -> None:
    net = peft.get_peft_model(Net(12, 20, False), their_config("vera", projection_prng_key=5))
    config = ROWS["vera"].make(projection_prng_key=5)
    A, B = config.maps({"proj": (12, 20)})["proj"].init_shared(np.random.default_rng(0))
    buffers = dict(net.named_buffers())
    for tensor, ours in (("vera_A", A), ("vera_B", B)):
        theirs = next(v for k, v in buffers.items() if f"{tensor}.default" in k)
        assert theirs.numpy().tobytes() == ours.tobytes()
    net = peft.get_peft_model(Net(12, 20, False), their_config("fourierft"))
    at = net.base_model.model.proj.indices["default"].numpy()
    ours = ROWS["fourierft"].make().maps({"proj": (12, 20)})["proj"]
    assert np.array_equal(at[0] * 20 + at[1], ours.at)  # type: ignore[attr-defined]


# ---- fields ----


@pytest.mark.parametrize("name", NAMES)
def test_map_config_has_the_fields_and_defaults_of_peft(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    their_config(name, inference_mode=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = row.config(**{**row.fields, "target_modules": ["proj"]})
    assert {**ours.to_dict(), "feedforward_modules": None} == {
        **written,
        "feedforward_modules": None,
    }
    assert row.config.from_dict(written).to_dict() == written
    fields = {field.name for field in dataclasses.fields(getattr(peft, row.config.__name__))}
    assert set(row.config.field_names()) <= fields


# ---- files ----


BASES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
FILES = [
    (name, base)
    for base in BASES
    for name in NAMES
    if base == "llama" or name.partition("-")[0] not in ONLY_LINEAR
]


@pytest.mark.parametrize(("name", "base"), FILES)
def test_files_of_peft_are_read_here_and_ours_there(name: str, base: str, tmp_path: Path) -> None:
    folder = GOLDEN / base
    fields: dict[str, Any] = {**ROWS[name].fields, "target_modules": BASES[base]}
    if name == "ia3":
        fields["feedforward_modules"] = BASES[base][-1:]
    if name.startswith(("loha", "lokr")) and base == "llama":
        key = "alpha_pattern" if "alpha" in fields else "rank_pattern"
        fields[key] = {"q_proj": 5}
    model = load_model(folder, "float32")
    config = getattr(peft, ROWS[name].config.__name__)(**copy.deepcopy(fields))
    theirs = peft.get_peft_model(model, config).eval()
    randomise(trainable(theirs).values(), 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.arange(11)[None]
    expected = logits(theirs, ids)
    ours = load_ours(folder, tmp_path / "theirs")
    assert close(ours(ids).data, expected)
    ours.save_pretrained(tmp_path / "ours")
    theirs_again = load_theirs(load_model(folder, "float32"), tmp_path / "ours")
    assert close(logits(theirs_again, ids), expected, 1e-6)

    made = get_peft_model(CausalLM.from_pretrained(folder), ROWS[name].config(**fields), seed=3)
    randomise(trainable(made).values(), 2)
    made.save_pretrained(tmp_path / "made")
    read = load_theirs(load_model(folder, "float32"), tmp_path / "made")
    assert close(logits(read, ids), made.eval()(ids).data)

    merge(folder, [tmp_path / "made"], tmp_path / "merged")
    merged = load_model(tmp_path / "merged", "float32")
    assert close(logits(merged, ids), made(ids).data)
    whole = made.merge_and_unload()
    assert close(CausalLM.from_pretrained(tmp_path / "merged")(ids).data, whole(ids).data, 1e-7)
