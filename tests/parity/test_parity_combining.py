"""Sums of adapters beside peft's add_weighted_adapter, and sums that peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import (
    IDS,
    NAMES,
    close,
    in_double,
    load_model,
    load_ours,
    load_theirs,
    logits,
    peft,
    randomise,
    torch,
)
from test_combining import GOLDEN, PAIRS, of

from minilora import PeftModel
from minilora.formats import load_file
from minilora.lora.factors import Part, Term, clamp_factors
from minilora.lora.pruning import ELECTING, PRUNED, Pruning, prune_updates, pruned_sum
from minilora.tools.combining import combine
from minilora.tools.factoring import resize

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

ADAPTERS: dict[str, Any] = {}


def adapter(name: str, targets: list[str], r: int = 3, **options: Any) -> None:
    options |= {"target_modules": targets, "r": r, "init_lora_weights": False}
    ADAPTERS[name] = peft.LoraConfig(**options)


adapter("one", NAMES[:3], lora_alpha=2)
adapter("two", NAMES[2:], lora_alpha=5)
adapter("ends", ["embed_tokens", "lm_head", "q_proj"], lora_alpha=4)
adapter("wide", NAMES, r=5, lora_alpha=4, alpha_pattern={"q_proj": 7})
adapter("stable", NAMES[:3], lora_alpha=2, use_rslora=True)


@pytest.fixture
def both(llama: tuple[Path, Any], tmp_path: Path) -> tuple[Any, PeftModel]:
    """peft's model with every adapter of ADAPTERS, and ours with the same, in float64."""
    base = llama[0]
    first, *others = ADAPTERS
    theirs = peft.PeftModel(load_model(base), ADAPTERS[first], first)
    for name in others:
        theirs.add_adapter(name, ADAPTERS[name])
    randomise(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(base, tmp_path / first, "float64", adapter_name=first)
    for name in others:
        ours.load_adapter(tmp_path / name, name)
    return in_double(theirs.eval()), ours.eval()


def add(models: tuple[Any, PeftModel], names: list[str], weights: list[float], **how: Any) -> None:
    """Add the adapter "sum" to both models, and activate it."""
    for model in models:
        model.add_weighted_adapter(names, weights, "sum", **how)
        model.set_adapter("sum")


SUMS: list[tuple[list[str], list[float], dict[str, Any]]] = []


def total(names: list[str], weights: list[float], **how: Any) -> None:
    SUMS.append((names, weights, how))


total(["one", "two"], [0.7, -1.3], combination_type="cat")
total(["one", "ends", "wide"], [0.7, -1.3, 2.0], combination_type="cat")
total(["one", "two"], [0.7, -1.3], combination_type="linear")
total(["two", "ends", "one"], [-0.7, 1.3, -0.1], combination_type="linear")
total(["one"], [-0.7], combination_type="linear")
total(["one", "ends"], [0.75, -1.25])  # svd, of the largest rank
# Above a layer's full rank, the shapes of peft's svd do not fit.
total(["two", "wide", "one"], [0.75, -1.25, 1.0], svd_rank=4)
total(["two", "ends", "one"], [0.75, -1.25, 1.0], svd_rank=2)
total(["one", "stable"], [0.7, -1.3], combination_type="cat")


@pytest.mark.parametrize(("names", "weights", "how"), SUMS)
def test_add_weighted_adapter_agrees_with_peft(
    names: list[str], weights: list[float], how: dict[str, Any], both: tuple[Any, PeftModel]
) -> None:
    """In float64; but peft has the roots of `linear`, and the weights of svd, in float32."""
    theirs, ours = both
    add(both, names, weights, **how)
    expected = logits(theirs.double())
    tolerance = 1e-6 if how.get("combination_type") == "linear" else 1e-9
    assert close(ours(IDS).numpy(), expected, tolerance)
    theirs.set_adapter(names[0])
    assert not close(logits(theirs), expected, 1e-2)


def test_add_weighted_adapter_of_rslora_leaves_out_the_root_of_the_rank_in_peft(
    both: tuple[Any, PeftModel],
) -> None:
    """peft's sum keeps use_rslora with lora_alpha = r: s = sqrt(r), where 1 is meant."""
    theirs, ours = both
    add(both, ["stable", "one"], [1.0, 1.0], combination_type="cat")
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    layers = [layer for layer in layers if "sum" in layer.scaling]
    assert {layer.scaling["sum"] for layer in layers} == {6 / 6**0.5}
    for layer in layers:
        layer.scaling["sum"] = 1.0
    assert close(ours(IDS).numpy(), logits(theirs.double()), 1e-9)


# ---- pruned sums ---------------------------------------------------------------------------------

PRUNED_WEIGHTS = [0.75, -1.25, 2.0]  # peft has them in float32


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("how", PRUNED)
def test_pruned_sum_is_peft_s_of_the_same_dW(
    how: str, density: float, majority: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dare with our mask handed in; no two entries have one magnitude."""
    rng = np.random.default_rng(0)
    for O, I in ((5, 9), (40, 17), (1, 1), (3, 400)):
        terms = []
        for number, weight in enumerate(PRUNED_WEIGHTS):
            r = int(rng.integers(1, 5))
            part = Part(rng.normal(size=(r, I)), rng.normal(size=(O, r)), 0.5 + number)
            terms.append(Term(part, weight, number))
        pruning = Pruning(how, density, majority, seed=3)
        masks = iter(
            torch.tensor(update.keep(slice(0, O), np.zeros((O, I)))).double()
            for update in prune_updates(terms, pruning, "q")
            if update.keep is not None
        )
        dense = [torch.tensor(t.part.c * (t.part.B @ t.part.A)) for t in terms]
        method = getattr(peft.utils.merge_utils, how)
        more = {"majority_sign_method": majority} if how in ELECTING else {}
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bernoulli", lambda p, given=masks: next(given))
            expected = method(dense, torch.tensor(PRUNED_WEIGHTS), density, **more)
        total, _ = pruned_sum(terms, pruning, "q")
        assert expected.dtype == torch.float64
        scale = max(1e-300, float(expected.abs().max()))
        assert np.abs(total - expected.numpy()).max() < 1e-12 * scale


@pytest.mark.parametrize("how", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("rank", [2, 4])
def test_add_weighted_adapter_prunes_dW_as_peft_s_svd_forms_do(
    how: str, majority: str, rank: int, both: tuple[Any, PeftModel]
) -> None:
    theirs, _ = both
    options = (
        {"density": 0.4, "majority_sign_method": majority} if how == "ties" else {"density": 0.4}
    )
    names, weights = ["one", "two", "wide"], [0.75, -1.25, 0.5]
    add(both, names, weights, combination_type=f"{how}_svd", svd_rank=rank, **options)
    assert close(both[1](IDS).numpy(), logits(theirs.double()), 1e-9)


def test_add_weighted_adapter_differs_from_peft_s_pruned_factors(
    both: tuple[Any, PeftModel],
) -> None:
    """peft prunes A and B under the same names without _svd: their product is another matrix."""
    options = {"combination_type": "ties", "density": 0.5}
    for model in both:
        more = {"svd_rank": 4} if model is both[1] else {}
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", **options, **more)
    ours = both[1]._wrappers()
    distances = []
    for name, module in both[0].named_modules():
        if isinstance(module, peft.tuners.lora.Linear) and "sum" in module.lora_A:
            theirs = module.get_delta_weight("sum").detach().numpy()
            mine = ours[name.removeprefix("base_model.model.")].delta_weight("sum")
            distances.append(np.linalg.norm(theirs - mine) / np.linalg.norm(mine))
    assert min(distances) > 0.1


def test_clamp_factors_clips_as_peft() -> None:
    rng = np.random.default_rng(0)
    dW = torch.tensor(rng.normal(size=(7, 5)))
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    US = U[:, :3] * S[:3]
    for clamp in (0.7, 0.95, 1.0):
        high = torch.quantile(torch.cat([US.flatten(), Vh[:3].flatten()]), clamp)
        root = np.sqrt(S[:3].numpy())
        A, B = clamp_factors(root[:, None] * Vh[:3].numpy(), U[:, :3].numpy() * root, clamp)
        assert np.abs(A - Vh[:3].clamp(-high, high).numpy()).max() < 1e-12
        assert np.abs(B - US.clamp(-high, high).numpy()).max() < 1e-12


@pytest.mark.parametrize("rule", [{"energy": 0.7}, {"error": 0.3}, {"budget": 700}])
@pytest.mark.parametrize("name", ["llama--lora", "llama--rslora_all", "gpt2--lora", "llama--dora"])
def test_resize_by_a_rule_writes_ranks_that_peft_reads(
    name: str, rule: dict[str, Any], tmp_path: Path
) -> None:
    resize(GOLDEN / name, None, tmp_path, **rule)
    base = of(name)
    theirs = load_theirs(load_model(base), tmp_path)
    ours = load_ours(base, tmp_path, "float64")
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    assert close(ours(IDS).numpy(), logits(in_double(theirs)), 1e-9)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_combine_writes_an_adapter_that_peft_loads(
    how: str, pair: tuple[str, str], tmp_path: Path
) -> None:
    base = of(pair[0])
    ours, again = tmp_path / "ours", tmp_path / "again"
    combine([GOLDEN / name for name in pair], ours, [1.0, -2.0], how)
    theirs = load_theirs(load_model(base), ours)
    assert not theirs.load_adapter(ours, "default").unexpected_keys
    theirs.save_pretrained(again)
    file = "adapter_model.safetensors"
    shapes = [
        {key: array.shape for key, array in load_file(folder / file).items()}
        for folder in (again, ours)
    ]
    assert shapes[0] == shapes[1]
    file = "adapter_config.json"
    assert set(json.loads((again / file).read_text())) == set(json.loads((ours / file).read_text()))
    loaded = load_ours(base, ours, "float64")
    assert close(loaded(IDS).numpy(), logits(in_double(theirs)), 1e-9)


def test_combine_adds_files_as_peft(tmp_path: Path) -> None:
    one, two = GOLDEN / "llama--lora", GOLDEN / "llama--patterns"
    weights = [0.5, -2.0]
    combine([one, two], tmp_path, weights, "svd", 3)
    base = of(one.name)
    theirs = load_theirs(load_model(base), one, "one")
    theirs.load_adapter(two, "two")
    theirs.double().add_weighted_adapter(["one", "two"], weights, "sum", svd_rank=3)
    theirs.set_adapter("sum")
    ours = load_ours(base, tmp_path, "float64")
    assert close(ours(IDS).numpy(), logits(in_double(theirs)))
