"""Sums of adapters beside peft's add_weighted_adapter, and sums that peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
)
from test_combining import GOLDEN, PAIRS, of

from minilora import PeftModel
from minilora.formats import load_file
from minilora.tools.combining import combine

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
