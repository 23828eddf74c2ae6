"""merge: each mistake is one error that names it, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tool_files import LAYER, PREFIX, WEIGHTS, lora_tensors, read_weights, tree, write_small

from minilora.errors import ConfigError, FormatError, MiniloraError, NonFiniteError
from minilora.formats import read_adapter, save_file, write_adapter, write_json
from minilora.tools.merging import merge

HEAD = {f"{PREFIX}lm_head.weight": np.ones((7, 4), np.float32)}
EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 7), np.float32),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": np.ones((4, 2), np.float32),
}
INDEX = "model.safetensors.index.json"


class Case:
    """A base and an adapter, both good until a mistake changes them, and options for merge."""

    def __init__(self, folder: Path, tied: bool) -> None:
        self.folder = folder
        self.base, self.adapter = write_small(folder, tied=tied)
        self.fields, self.tensors = read_adapter(self.adapter)
        self.options: dict[str, Any] = {"adapters": [self.adapter]}

    def merge(self, **options: Any) -> list[dict[str, Any]]:
        return merge(self.base, out=self.folder / "out", **self.options, **options)

    def replace_weights(self, index: dict[str, Any]) -> None:
        (self.base / WEIGHTS).unlink()
        write_json(self.base / INDEX, {"weight_map": index})


Mistake = Callable[[Case], None]
MISTAKES: dict[str, tuple[Mistake, type[MiniloraError], str]] = {}


def mistake(kind: type[MiniloraError], message: str) -> Callable[[Mistake], Mistake]:
    def register(change: Mistake) -> Mistake:
        MISTAKES[change.__name__] = (change, kind, message)
        return change

    return register


@mistake(ConfigError, "changes the head.*tied")
def tied_head(case):
    case.fields["modules_to_save"] = ["lm_head"]
    case.tensors |= HEAD


@mistake(ConfigError, "changes the embedding.*tied")
def tied_embedding(case):
    case.fields["target_modules"] = ["q_proj", "embed_tokens"]
    case.tensors |= EMBEDDING


@mistake(ConfigError, "q_proj.weight cannot be added")
def dora_beside_another(case):
    m = {f"{PREFIX}{LAYER}.lora_magnitude_vector": np.ones(4, np.float32)}
    dora = case.folder / "dora"
    write_adapter(dora, {**case.fields, "use_dora": True}, case.tensors | m)
    case.options["adapters"].append(dora)


@mistake(ConfigError, r"lm_head.weight.*0\.5 times")
def half_a_head(case):
    case.fields["modules_to_save"] = ["lm_head"]
    case.tensors |= HEAD
    case.options["weights"] = [0.5]


@mistake(ConfigError, "--weights: expected 1")
def two_weights(case):
    case.options["weights"] = [1.0, 2.0]


@mistake(ConfigError, "adapters: expected a list of one or more")
def no_adapters(case):
    case.options["adapters"] = []


@mistake(ConfigError, "--threads must be an integer of at least 1, got -1")
def negative_threads(case):
    case.options["threads"] = -1


@mistake(ConfigError, "--dtype must be float32 or float16 or bfloat16, got 'float8'")
def unknown_dtype(case):
    case.options["dtype"] = "float8"


@mistake(FormatError, r"q_proj.lora_A.weight is \(2, 5\), the base needs \(2, 4\)")
def another_shape(case):
    case.tensors |= lora_tensors(LAYER, np.ones((2, 5)), np.ones((4, 2)))


@mistake(FormatError, "missing .*layers.0.q_proj.*unknown .*layers.9.q_proj")
def another_layer(case):
    case.tensors = lora_tensors("model.layers.9.q_proj", np.ones((2, 4)), np.ones((4, 2)))


@mistake(FormatError, "q_proj: lora_A is .2, 4., but adapter_config.json says r = 3")
def another_rank(case):
    case.fields["r"] = 3


@mistake(FormatError, "q_proj: lora_A .2, 4. has no lora_B")
def no_B(case):
    del case.tensors[f"{PREFIX}{LAYER}.lora_B.weight"]


@mistake(FormatError, "embed_tokens.base_layer.weight differs")
def embedding_of_another_base(case):
    case.fields["target_modules"] = ["q_proj", "embed_tokens"]
    weight = np.ones((7, 4), np.float32)
    case.tensors |= {**EMBEDDING, f"{PREFIX}model.embed_tokens.base_layer.weight": weight}


@mistake(FormatError, "q_proj.lora_magic")
def unknown_tensor(case):
    case.tensors[f"{PREFIX}{LAYER}.lora_magic"] = np.ones(1, np.float32)


@mistake(NonFiniteError, "q_proj.weight is not finite")
def nan_in_the_adapter(case):
    case.tensors[f"{PREFIX}{LAYER}.lora_A.weight"][0, 0] = np.nan


@mistake(NonFiniteError, "lm_head.weight is not finite")
def infinity_in_the_base(case):
    weights = read_weights(case.base)
    weights["lm_head.weight"][6, 3] = np.inf
    save_file(case.base / WEIGHTS, weights)


@mistake(NonFiniteError, "beyond 65504, the largest of float16: choose float32 or bfloat16")
def too_large_for_float16(case):
    case.options["dtype"] = "float16"
    case.tensors[f"{PREFIX}{LAYER}.lora_A.weight"][:] = 1e6


@mistake(NonFiniteError, r"--weights \[1e\+300\]: .*q_proj.weight with its adapters")
def too_large_weight(case):
    case.options["weights"] = [1e300]


@mistake(ConfigError, "config.json': it is quantized: .*quant_method must be .*the checkpoint that")
def quantized_base(case):
    fields = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    write_json(case.base / "config.json", fields)


@mistake(FormatError, "quantization_config says fp4, but no layer is stored so")
def quantized_in_config_alone(case):
    fields = {"model_type": "llama", "quantization_config": {"load_in_4bit": True}}
    write_json(case.base / "config.json", fields)


@mistake(FormatError, "is not the name of a safetensors file")
def shard_outside_the_folder(case):
    case.replace_weights({"a": "../x.safetensors"})


@mistake(FormatError, "x.safetensors' is missing")
def missing_shard(case):
    case.replace_weights({"a": "x.safetensors"})


def spoil(folder: Path, name: str) -> Case:
    case = Case(folder, tied=name.startswith("tied"))
    MISTAKES[name][0](case)
    write_adapter(case.adapter, case.fields, case.tensors)
    return case


@pytest.mark.parametrize("name", MISTAKES)
def test_merge_names_the_mistake_and_leaves_nothing(name, tmp_path):
    case = spoil(tmp_path, name)
    before = tree(tmp_path)
    _, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        case.merge()
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_merge_writes_nonfinite_weights_if_allowed(tmp_path):
    (row,) = spoil(tmp_path, "nan_in_the_adapter").merge(allow_nonfinite=True)
    assert row["lost"] is None
    assert np.isnan(read_weights(tmp_path / "out")[f"{LAYER}.weight"]).any()
