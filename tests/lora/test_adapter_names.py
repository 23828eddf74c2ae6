"""Names of adapters: any text without a dot, also one that is an attribute's or a tensor's name.

No key is ever taken apart, so no name can be mistaken for a part of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from methods import METHODS, move
from peft_models import PREFIX, base, is_close, lora, owned
from small import IDS, bits, logits

from minilora.errors import ConfigError
from minilora.lora import LoraConfig, MultiTask, PeftModel, get_multitask_model, get_peft_model

ATTRIBUTES = [
    "adapters", "weight", "bias", "base_layer", "original_module", "modules_to_save",
    "token_adapter", "trainable_tokens_delta", "lora_A", "lora_B", "lora_E", "lora_", "lora", "_",
    "lora_embedding_A", "lora_magnitude_vector", "running", "active", "merged", "entries", "inner",
    "0", "model", "base_model", "lm_head", "q_proj", "self_attn", "training", "__class__",
]  # fmt: skip
OTHERS = [
    "ä ö",
    "\u65e5\u672c",
    "a b",
    " ",
    "-",
    "a\nb",
    "a\tb",
    "\u202e",
    "x" * 99,
    "'",
    '"',
    "%s",
]
OTHERS += ["{}", "*", "(", "C:", "~", "CON"]
# What no folder inside another can be named.
UNSAFE = ["a/b", "/", "/etc", "\\", "a\\b", "\0", "a\0b", "\ud800", "n" * 256, "ä" * 128]

KINDS: dict[str, dict[str, Any]] = {
    "whole": {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["lm_head", "mlp"]},
    "dora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}
TABLE = [(name, kind) for name in ATTRIBUTES for kind in KINDS]
TABLE += [(name, "whole") for name in OTHERS]


def make(kind: str, name: str) -> PeftModel:
    config = LoraConfig(r=2, init_lora_weights=False, **KINDS[kind])
    return get_peft_model(base(num_hidden_layers=1), config, name)


PLAIN_NAMED = {kind: make(kind, "plain name") for kind in KINDS}


def check_name(kind: str, name: str) -> None:
    """Everything but files, under any name, gives what it gives under a plain one."""
    expected = PLAIN_NAMED[kind]
    model = make(kind, name)
    state = expected.state_dict("plain name")
    assert list(model.state_dict(name)) == list(state)
    assert set(model.adapter_parameters(name)) <= set(state)
    names = [p for p, _ in model.named_parameters()]
    assert len(set(names)) == len(names)
    for mine, other in zip(names, expected.named_parameters(), strict=True):
        assert mine == other[0].replace("plain name", name)

    model.add_adapter("second", lora())
    move(model, name)
    whole = logits(model)
    model.set_adapter("second")
    model.set_adapter(name)
    assert np.array_equal(logits(model), whole)
    before = bits(model)
    model.merge_adapter(tied=None)
    assert is_close(logits(model), whole, 1e-10)
    model.unmerge_adapter()
    assert bits(model) == before
    model.set_adapter("second")
    model.delete_adapter(name)
    assert list(model.peft_config) == ["second"]
    model.add_adapter(name, lora(target_modules=["o_proj"]))
    model.delete_adapter("second")
    assert set(model.state_dict(name)) == {
        f"{PREFIX}model.layers.0.self_attn.o_proj.lora_{factor}.weight" for factor in "AB"
    }


@pytest.mark.parametrize(
    ("name", "kind"), [*TABLE, *((name, "whole") for name in UNSAFE)], ids=ascii
)
def test_peft_model_takes_any_name_without_a_dot(name: str, kind: str) -> None:
    check_name(kind, name)


@given(st.text(min_size=1, max_size=8).filter(lambda name: "." not in name))
@example("default")
def test_peft_model_takes_any_text_without_a_dot(name: str) -> None:
    if name != "second":
        check_name("tokens", name)


@pytest.mark.parametrize(("name", "kind"), [("default", "whole"), *TABLE], ids=ascii)
def test_save_pretrained_and_load_adapter_take_any_name_that_a_folder_can_have(
    name: str, kind: str, tmp_path: Path
) -> None:
    model = make(kind, name)
    move(model, name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert (folder / "adapter_config.json").exists()
    again = PeftModel.from_pretrained(base(num_hidden_layers=1), folder, name)
    expected = model.state_dict(name)
    for key, tensor in again.state_dict(name).items():
        assert np.array_equal(tensor, expected[key])
    assert np.array_equal(logits(again), logits(model))


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_save_pretrained_refuses_a_name_that_no_folder_can_have_and_writes_nothing(
    name: str, tmp_path: Path
) -> None:
    model = make("tokens", "first")
    model.add_adapter(name, lora())
    inside = tmp_path / "inside"
    with pytest.raises(ConfigError, match=r"cannot be saved: .*choose another name"):
        model.save_pretrained(inside)
    assert not any(tmp_path.iterdir())
    model.save_pretrained(inside, ["first"])
    tasks = get_multitask_model(base(num_hidden_layers=1), {name: lora()})
    with pytest.raises(ConfigError, match="cannot be saved"):
        tasks.save_pretrained(tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize("name", ATTRIBUTES[:14], ids=ascii)
def test_multitask_model_takes_any_name(name: str, tmp_path: Path) -> None:
    tasks = {name: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), "other": lora()}
    model = get_multitask_model(base(num_hidden_layers=1), tasks, shared=lora())
    move(model, name)
    rows = [name, "other"]
    whole = model(IDS, tasks=rows).numpy()
    model.save_pretrained(tmp_path)
    again = MultiTask.from_pretrained(base(num_hidden_layers=1), tmp_path)
    assert np.array_equal(again(IDS, tasks=rows).numpy(), whole)
    merged = model.merge_task(name)
    assert is_close(merged(IDS).numpy()[0], whole[0], 1e-10)
    model.export(name, tmp_path / "exported")
    single = PeftModel.from_pretrained(base(num_hidden_layers=1), tmp_path / "exported")
    assert is_close(logits(single)[0], whole[0], 1e-6)
    del model.tasks[name]
    model.delete_adapter(name)
    assert np.array_equal(model(IDS, tasks="other").numpy()[1], whole[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["adapters", "lora_A", "lora_B", "lora_E"])
def test_named_parameters_have_pefts_names_for_every_method(method: str, name: str) -> None:
    config = METHODS[method].config(target_modules=["q_proj"])
    model = get_peft_model(base(num_hidden_layers=1), config, name)
    path = "model.layers.0.self_attn.q_proj"
    expected = set()
    for key in METHODS[method].keys:
        tensor, dot, weight = key.partition(".")
        if tensor == "lora_magnitude_vector":
            dot, weight = ".", "weight"
        expected.add(f"{path}.{tensor}.{name}{dot}{weight}")
    assert {n for n in owned(model, name) if f"q_proj.{name}" not in n} >= expected - {
        n for n in expected if f"q_proj.{name}" in n
    }
    assert {n.removeprefix(PREFIX) for n, p in model.named_parameters() if p.requires_grad} == (
        expected
    )
