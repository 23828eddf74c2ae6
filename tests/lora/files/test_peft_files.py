"""An adapter's files: written and read again, several in one folder, files that do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from methods import layers, move
from peft_models import PREFIX, adapted, base, configs, is_close, lora, with_two_adapters
from small import bits, logits

from minilora.errors import ConfigError, FormatError
from minilora.formats import PEFT_CONFIG_DEFAULTS, load_file, save_file
from minilora.lora import AdaLoraConfig, HydraConfig, LoraConfig, PeftModel, get_peft_model
from minilora.models.transformer import CausalLM

CONFIG_FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Files are saved hundreds of times; test_disk checks that they are on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


def read_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())  # type: ignore[no-any-return]


def change_json(folder: Path, **changes: Any) -> dict[str, Any]:
    changed = read_json(folder) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(changed))
    return changed


def array_bytes(state: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in state.items()}


def shapes(state: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for key, array in state.items()}


def is_training(model: PeftModel) -> set[bool]:
    return {module.training for _, module in model.named_modules()}


# ---- written and read again ----


@given(configs(), st.sampled_from(["default", "other", "weight", "lora_A", "modules_to_save"]))
def test_from_pretrained_reads_what_save_pretrained_wrote(
    tmp_path_factory: pytest.TempPathFactory, config: LoraConfig, name: str
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(base("float32"), config, name)
    move(model, name)
    expected = logits(model.eval()).tobytes()
    state = model.state_dict(name)
    model.save_pretrained(folder)
    where = folder if name == "default" else folder / name
    assert sorted(path.name for path in where.iterdir()) == [CONFIG_FILE, WEIGHTS]
    # The keys do not tell the adapter's name.
    assert shapes(get_peft_model(base("float32"), config).state_dict()) == shapes(state)

    again = PeftModel.from_pretrained(base("float32"), where, "b")
    assert logits(again).tobytes() == expected
    assert not any(p.requires_grad for p in again.parameters())
    assert is_training(again) == {False}
    assert array_bytes(again.state_dict("b")) == array_bytes(state)
    written = read_json(where)
    assert set(written) == set(PEFT_CONFIG_DEFAULTS)
    assert again.peft_config["b"].to_dict() == written
    assert written["inference_mode"] is True

    trained = PeftModel.from_pretrained(base("float32"), where, is_trainable=True)
    trainable, _ = trained.get_nb_trainable_parameters()
    assert trainable == sum(array.size for array in state.values())
    assert is_training(trained) == {True}

    if config.bias == "none":
        beside = get_peft_model(base("float32"), lora(target_modules="all-linear"), "x").eval()
        beside.load_adapter(where, "b")
        beside.set_adapter("b")
        assert logits(beside).tobytes() == expected


def test_save_pretrained_keeps_unknadded_fields(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    written = change_json(tmp_path, from_the_future=[1, {"a": None}], peft_version="9.9")
    with pytest.warns(UserWarning, match="'from_the_future'"):
        again = PeftModel.from_pretrained(base(), tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again") == written


def test_save_pretrained_keeps_the_order_of_patterns(tmp_path: Path) -> None:
    # The first match counts; sorted, the second would come first.
    patterns = {"q_proj": 1, "layers.1.*q_proj": 200}
    adapted(alpha_pattern=patterns).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert list(again.peft_config["default"].alpha_pattern) == list(patterns)
    layer = layers(again)["model.layers.1.self_attn.q_proj"]
    assert layer.adapters["default"].scaling == 1 / 2


def test_save_pretrained_refuses_a_base_with_adapters(tmp_path: Path) -> None:
    plain = base()
    get_peft_model(plain, lora())
    with pytest.raises(ConfigError, match="adapters"):
        plain.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens"]])
def test_merge_and_unload_gives_a_model_that_saves_as_a_plain_one(
    saved: list[str] | None, tmp_path: Path
) -> None:
    model = get_peft_model(base(tie_word_embeddings=True), lora(modules_to_save=saved))
    move(model, "default")
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path, dtype="float64")
    assert np.array_equal(logits(again), logits(merged))
    assert is_close(logits(again), expected)
    assert again.config.tie_word_embeddings is (saved is None)


# ---- several adapters ----


def test_save_pretrained_writes_one_folder_for_each_adapter(tmp_path: Path) -> None:
    model = with_two_adapters()
    model.save_pretrained(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {str(path.relative_to(tmp_path)) for path in files}
    assert names == {CONFIG_FILE, WEIGHTS, f"b/{CONFIG_FILE}", f"b/{WEIGHTS}"}
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    again.load_adapter(tmp_path / "b", "b")
    for active in ("default", "b", ["default", "b"]):
        model.set_adapter(active)
        again.set_adapter(active)
        assert logits(again).tobytes() == logits(model).tobytes()


def test_save_pretrained_writes_selected_adapters_only(tmp_path: Path) -> None:
    model = with_two_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    with pytest.raises(ConfigError, match="'c'"):
        model.save_pretrained(tmp_path, selected_adapters=["c"])


def test_from_pretrained_refuses_a_model_with_adapters(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="adapters"):
        PeftModel.from_pretrained(adapted().get_base_model(), tmp_path)


def test_load_adapter_refuses_a_name_as_the_caller_s_mistake(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'a\.b'") as error:
        model.load_adapter(tmp_path, "a.b")
    assert not isinstance(error.value, FormatError)


def test_state_dict_has_the_same_biases_beside_any_other_adapter(tmp_path: Path) -> None:
    adapted(target_modules=["v_proj"], bias="all").save_pretrained(tmp_path)
    config = lora(target_modules=["q_proj"], modules_to_save=["k_proj"])
    beside = get_peft_model(base(), config, "x")
    beside.load_adapter(tmp_path, "default")
    assert set(beside.state_dict()) == set(load_file(tmp_path / WEIGHTS))
    beside.save_pretrained(tmp_path / "again", ["default"])
    PeftModel.from_pretrained(base(), tmp_path / "again")


def test_state_dict_has_the_same_biases_in_a_saved_module(tmp_path: Path) -> None:
    model = adapted(target_modules=["v_proj"], modules_to_save=["q_proj"], bias="all")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert set(again.state_dict()) == set(model.state_dict())


# ---- files that do not fit the base ----

KEY = PREFIX + "model.layers.{}.self_attn.{}_proj.lora_{}.weight"
MISSING = KEY.format(0, "q", "A")
WRONG_SHAPE = KEY.format(1, "v", "B")
UNKNOWN = PREFIX + "model.nothing"
# What the error says of each change to the file.
MISMATCHES = {
    "missing": f"missing {re.escape(MISSING)}",
    "unknown": f"unknown {re.escape(UNKNOWN)}",
    "shape": re.escape(WRONG_SHAPE) + r".*\(5, 2\).*\(8, 2\)",
}


def damage(tensors: dict[str, np.ndarray], *kinds: str) -> dict[str, np.ndarray]:
    changed = dict(tensors)
    if "missing" in kinds:
        del changed[MISSING]
    if "unknown" in kinds:
        changed[UNKNOWN] = np.zeros(1)
    if "shape" in kinds:
        changed[WRONG_SHAPE] = np.zeros((5, 2))
    return changed


def load_into(model: CausalLM | PeftModel, folder: Path) -> None:
    if isinstance(model, PeftModel):
        model.load_adapter(folder, "c")
    else:
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("kinds", [["missing"], ["unknown"], ["shape"], list(MISMATCHES)])
def test_load_adapter_lists_all_mismatches_and_changes_nothing(
    kinds: list[str], tmp_path: Path
) -> None:
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tmp_path / WEIGHTS, damage(tensors, *kinds))
    messages = []
    for model in (base(), with_two_adapters()):
        before = bits(model)
        output = logits(model).tobytes()
        training = [p.requires_grad for p in model.parameters()]
        with pytest.raises(FormatError, match="does not fit") as error:
            load_into(model, tmp_path)
        messages.append(str(error.value))
        assert bits(model) == before
        assert logits(model).tobytes() == output
        assert [p.requires_grad for p in model.parameters()] == training
    assert messages[0] == messages[1]
    assert not re.search(r"and \d+ more", messages[0])
    for kind, mismatch in MISMATCHES.items():
        assert bool(re.search(mismatch, messages[0])) == (kind in kinds)


def refuses(folder: Path, message: str, **changes: Any) -> None:
    with pytest.raises(FormatError, match=message):
        PeftModel.from_pretrained(base(**changes), folder)


def test_from_pretrained_refuses_an_adapter_of_another_base(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    refuses(tmp_path, r"missing .*layers\.2\..* and 1 more", num_hidden_layers=3)
    refuses(tmp_path, "unknown", num_hidden_layers=1)
    refuses(tmp_path, r"\(2, 12\)", hidden_size=12, head_dim=4)
    change_json(tmp_path, target_modules=["c_attn"])
    refuses(tmp_path, "'c_attn'")


# ---- keys that hold the adapter's name ----

NAMED_KINDS: dict[str, LoraConfig] = {
    "lora": lora(modules_to_save=["lm_head"]),
    "dora": lora(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "adalora": AdaLoraConfig(init_r=2, target_r=1, total_step=9),
    "hydra": HydraConfig(r=2),
}


def names_in_keys(model: PeftModel, name: str) -> dict[str, np.ndarray]:
    """The adapter's tensors by PEFT's names in models, as a training loop may have saved them."""
    parameters = [p for p in model.named_parameters() if p[1].requires_grad]
    tensors = {key: p.numpy() for key, p in parameters}
    assert all(name in key.split(".") for key in tensors)
    return tensors


@pytest.mark.parametrize("name", ["default", "lora_A", "modules_to_save", "q_proj", "ä b"])
@pytest.mark.parametrize("kind", NAMED_KINDS)
def test_load_adapter_reads_keys_that_hold_the_adapter_s_name(
    kind: str, name: str, tmp_path: Path
) -> None:
    model = get_peft_model(base(), NAMED_KINDS[kind], name)
    move(model, name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    save_file(folder / WEIGHTS, names_in_keys(model, name))
    again = PeftModel.from_pretrained(base(), folder)
    assert array_bytes(again.state_dict()) == array_bytes(model.state_dict(name))


@pytest.mark.parametrize("change", ["two names", "both", "no path", "a short one"])
def test_load_adapter_refuses_names_in_keys_that_are_not_one(change: str, tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    tensors = names_in_keys(model, "default")
    first, *_ = tensors
    if change == "two names":
        tensors[first.replace(".default.", ".other.")] = tensors.pop(first)
    elif change == "both":
        tensors[first.replace(".default.", ".")] = tensors[first]
    elif change == "no path":
        tensors["lora_A.default.weight"] = tensors.pop(first)
    else:
        tensors["x"] = tensors.pop(first)
    save_file(tmp_path / WEIGHTS, tensors)
    with pytest.raises(FormatError, match="does not fit this base"):
        PeftModel.from_pretrained(base(), tmp_path)
