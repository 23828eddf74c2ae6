"""Adapters added up beside peft: its add_weighted_adapter gives the same, and what is written here loads there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import IDS, NAMES, close, in_double, logits, peft, randomise, torch, transformers
from test_combining import GOLDEN, PAIRS, of

from minilora import CausalLM, PeftModel
from minilora.formats import load_file
from minilora.tools.combining import combine

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
FIELDS: dict[str, dict[str, Any]] = {
    "one": {"r": 3, "lora_alpha": 2, "target_modules": NAMES[:3]},
    "two": {"r": 3, "lora_alpha": 5, "target_modules": NAMES[2:]},
    "ends": {"r": 3, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "wide": {"r": 5, "lora_alpha": 4, "target_modules": NAMES, "alpha_pattern": {"q_proj": 7}},
    "stable": {"r": 3, "lora_alpha": 2, "use_rslora": True, "target_modules": NAMES[:3]},
}


@pytest.fixture
def both(llama: tuple[Path, Any], tmp_path: Path) -> tuple[Any, PeftModel]:
    """peft's model with an adapter of each of FIELDS, and ours with the same, both in float64."""
    theirs: Any = None
    for name, fields in FIELDS.items():
        config = peft.LoraConfig(**fields, init_lora_weights=False)
        if theirs is None:
            base = transformers.AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.float64)
            theirs = peft.PeftModel(base, config, name)
        else:
            theirs.add_adapter(name, config)
    randomise(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path)
    names = iter(FIELDS)
    first = next(names)
    ours = PeftModel.from_pretrained(
        CausalLM.from_pretrained(llama[0], "float64"), tmp_path / first, first
    )
    for name in names:
        ours.load_adapter(tmp_path / name, name)
    return in_double(theirs.eval()), ours.eval()


@pytest.mark.parametrize(
    ("adapters", "weights", "options"),
    [
        (["one", "two"], [0.7, -1.3], {"combination_type": "cat"}),
        (["one", "ends", "wide"], [0.7, -1.3, 2.0], {"combination_type": "cat"}),
        (["one", "two"], [0.7, -1.3], {"combination_type": "linear"}),
        (["two", "ends", "one"], [-0.7, 1.3, -0.1], {"combination_type": "linear"}),
        (["one"], [-0.7], {"combination_type": "linear"}),
        (["one", "ends"], [0.75, -1.25], {}),  # svd, of the largest rank
        (
            ["two", "wide", "one"],
            [0.75, -1.25, 1.0],
            {"svd_rank": 4},
        ),  # above a layer's full rank peft's has no shape
        (["two", "ends", "one"], [0.75, -1.25, 1.0], {"svd_rank": 2}),
        (["one", "stable"], [0.7, -1.3], {"combination_type": "cat"}),
    ],
)
def test_peft_adds_up_the_same(
    adapters: list[str], weights: list[float], options: dict[str, Any], both: tuple[Any, PeftModel]
) -> None:
    """In float64, but that peft has the roots of `linear`, and the weights of svd, in float32."""
    theirs, ours = both
    theirs.add_weighted_adapter(adapters, weights, "sum", **options)
    ours.add_weighted_adapter(adapters, weights, "sum", **options)
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    expected = logits(theirs.double())
    assert close(
        ours(IDS).numpy(), expected, 1e-6 if options.get("combination_type") == "linear" else 1e-9
    )
    theirs.set_adapter(adapters[0])
    assert not close(logits(theirs), expected, 1e-2)


def test_peft_s_sum_of_rslora_is_larger_by_the_root_of_its_rank(
    both: tuple[Any, PeftModel],
) -> None:
    """It keeps use_rslora, and lora_alpha = r: s = sqrt(r), where 1 is meant."""
    theirs, ours = both
    theirs.add_weighted_adapter(["stable", "one"], [1.0, 1.0], "sum", combination_type="cat")
    ours.add_weighted_adapter(["stable", "one"], [1.0, 1.0], "sum", combination_type="cat")
    layers = [
        m
        for m in theirs.modules()
        if isinstance(m, peft.tuners.lora.LoraLayer) and "sum" in m.scaling
    ]
    assert {m.scaling["sum"] for m in layers} == {6 / 6**0.5}
    for layer in layers:
        layer.scaling["sum"] = 1.0
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    assert close(ours(IDS).numpy(), logits(theirs.double()), 1e-9)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_a_combined_adapter_loads_in_peft(how: str, pair: tuple[str, str], tmp_path: Path) -> None:
    combine([GOLDEN / name for name in pair], tmp_path / "out", [1.0, -2.0], how)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(of(pair[0]), dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    loaded = theirs.load_adapter(tmp_path / "out", "default")
    assert not loaded.unexpected_keys
    theirs.save_pretrained(tmp_path / "theirs")
    there, here = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "out")
    )
    assert {key: a.shape for key, a in there.items()} == {key: a.shape for key, a in here.items()}
    fields = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("theirs", "out")
    ]
    assert set(fields[0]) == set(fields[1])
    ours = PeftModel.from_pretrained(
        CausalLM.from_pretrained(of(pair[0]), "float64"), tmp_path / "out"
    )
    assert close(ours(IDS).numpy(), logits(in_double(theirs.double().eval())), 1e-9)


def test_peft_adds_up_files_as_combine_does(tmp_path: Path) -> None:
    names = ["llama--lora", "llama--patterns"]
    weights = [0.5, -2.0]
    combine([GOLDEN / name for name in names], tmp_path / "out", weights, "svd", 3)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        of(names[0]), dtype=torch.float64
    )
    theirs = peft.PeftModel.from_pretrained(model, GOLDEN / names[0], "one")
    theirs.load_adapter(GOLDEN / names[1], "two")
    theirs.double().add_weighted_adapter(["one", "two"], weights, "sum", svd_rank=3)
    theirs.set_adapter("sum")
    ours = PeftModel.from_pretrained(
        CausalLM.from_pretrained(of(names[0]), "float64"), tmp_path / "out"
    )
    assert close(ours(np.asarray(IDS)).numpy(), logits(in_double(theirs.double().eval())), 1e-5)
