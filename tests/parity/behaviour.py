"""The rows of the behaviour table: what PEFT's users count on, each a function of one side.

A side has the names that both libraries share: `side.base()`, `side.config(...)`, `side.wrap(...)`,
`side.load(...)`. A row does something with it, and returns plain data: names, numbers, logits, or
REFUSED where it raised. Both sides must return the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import IDS, load_model, peft, torch

from minilora import CausalLM, LoraConfig, PeftModel, get_peft_model
from minilora.lora import get_layer_status, get_model_status

Row = Callable[["Side", Path], Any]
ROWS: dict[str, Row] = {}
# Rows in which the two differ, and why ours does not do what peft does.
DIFFERENT = {
    "state_after_delete_adapter_of_the_active_one": "the other adapter runs in both; peft's model "
    "says that none is active, because some of its layers have no other adapter",
    "state_after_delete_adapter_of_the_last_one": "peft's model says that nothing is active, and "
    "raises a KeyError when it is called; ours is its base",
    "targets_partly_unknown": "a misspelt name would train fewer layers than were asked for",
    "error_of_config_with_an_unknown_bias": "a misspelt mode would train no bias",
    "error_of_save_pretrained_of_an_unknown_one": "peft saves nothing, and says nothing",
}
REFUSED, WARNED = "refused", "warned"
QV = ["q_proj", "v_proj"]


def row(function: Row) -> Row:
    ROWS[function.__name__] = function
    return function


class Side:
    """One library."""

    def __init__(self, base: Path, scratch: Path):
        self.folder = base
        self.scratch = scratch

    def two(self, **options: Any) -> Any:
        """A model with the adapters "default", which is active, and "b"."""
        model = self.wrap(self.config(**options))
        model.add_adapter("b", self.config(target_modules=["v_proj", "up_proj"], lora_alpha=3))
        return fill(model)

    def saved(self, **options: Any) -> Path:
        """The folder of a saved adapter."""
        folder = self.scratch / "saved"
        fill(self.wrap(self.config(**options))).save_pretrained(folder)
        return folder


class Theirs(Side):
    status = peft.get_layer_status, peft.get_model_status

    def base(self) -> Any:
        return load_model(self.folder, "float64")

    def config(self, **options: Any) -> Any:
        return peft.LoraConfig(
            **{"r": 2, "target_modules": QV, "task_type": "CAUSAL_LM", **options}
        )

    def wrap(self, config: Any, name: str = "default") -> Any:
        return peft.get_peft_model(self.base(), config, name).eval()

    def load(self, folder: Path, **options: Any) -> Any:
        return peft.PeftModel.from_pretrained(self.base(), folder, **options)

    def logits(self, model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(IDS)).logits.numpy()  # type: ignore[no-any-return]

    def array(self, parameter: Any) -> np.ndarray:
        return parameter.detach().numpy()  # type: ignore[no-any-return]

    def generate(self, model: Any, **options: Any) -> list[list[int]]:
        ids = torch.tensor(IDS[:, :3])
        return model.generate(input_ids=ids, **options).tolist()  # type: ignore[no-any-return]


class Ours(Side):
    status = get_layer_status, get_model_status

    def base(self) -> Any:
        return CausalLM.from_pretrained(self.folder, dtype="float64")

    def config(self, **options: Any) -> Any:
        return LoraConfig(**{"r": 2, "target_modules": QV, **options})

    def wrap(self, config: Any, name: str = "default") -> Any:
        return get_peft_model(self.base(), config, name).eval()

    def load(self, folder: Path, **options: Any) -> Any:
        return PeftModel.from_pretrained(self.base(), folder, **options)

    def logits(self, model: Any) -> np.ndarray:
        return np.asarray(model(IDS).data)

    def array(self, parameter: Any) -> np.ndarray:
        return np.asarray(parameter.data)

    def generate(self, model: Any, **options: Any) -> list[list[int]]:
        ids = IDS[:, :3]
        return model.generate(input_ids=ids, **options).tolist()  # type: ignore[no-any-return]


def fill(model: Any) -> Any:
    """Give every adapter's tensors values that follow from their names."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = 0.3 * rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
        if torch.is_tensor(parameter):
            parameter.data.copy_(torch.tensor(values))
        else:
            parameter.data = values.astype(parameter.dtype)
    return model


def trained(model: Any) -> list[str]:
    """The names of the parameters that require a gradient."""
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def state(model: Any) -> tuple[Any, ...]:
    """Adapters, the active ones, and what requires a gradient."""
    return list(model.peft_config), list(model.active_adapters), trained(model)


def attempt(function: Callable[[], Any]) -> Any:
    """The result, with WARNED where it warned; REFUSED where it raised a ValueError or KeyError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function()
        except (ValueError, KeyError, TypeError, NotImplementedError, OSError):
            return REFUSED
    return (result, WARNED) if caught else result


# ---- names and counts ----------------------------------------------------------------------------


@row
def names_of_parameters(side: Side, scratch: Path) -> Any:
    return sorted(name for name, _ in side.two().named_parameters())


@row
def names_of_parameters_with_modules_to_save(side: Side, scratch: Path) -> Any:
    model = side.wrap(side.config(modules_to_save=["lm_head"]))
    return sorted(name for name, _ in model.named_parameters()), trained(model)


@row
def names_of_modules_of_the_base(side: Side, scratch: Path) -> Any:
    model = side.two()
    modules = [name for name, _ in model.base_model.model.named_modules()]
    return sorted(name for name in modules if name.endswith(("q_proj", "up_proj", "norm")))


@row
def counts_of_one_adapter(side: Side, scratch: Path) -> Any:
    return side.wrap(side.config()).get_nb_trainable_parameters()


@row
def counts_of_two_adapters(side: Side, scratch: Path) -> Any:
    model = side.two()
    counts = [model.get_nb_trainable_parameters()]
    for names in ("b", "default"):
        model.set_adapter(names)
        counts.append(model.get_nb_trainable_parameters())
    return counts


@row
def counts_with_a_saved_head(side: Side, scratch: Path) -> Any:
    return side.wrap(side.config(modules_to_save=["lm_head"])).get_nb_trainable_parameters()


@row
def counts_with_biases(side: Side, scratch: Path) -> Any:
    models = [side.wrap(side.config(bias=bias)) for bias in ("all", "lora_only")]
    return [(model.get_nb_trainable_parameters(), trained(model)) for model in models]


@row
def counts_with_patterns_of_rank(side: Side, scratch: Path) -> Any:
    options = {"rank_pattern": {"q_proj": 3}, "target_modules": "all-linear"}
    return side.wrap(side.config(**options)).get_nb_trainable_parameters()


@row
def counts_printed(side: Side, scratch: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        side.two().print_trainable_parameters()
    return text.getvalue()


# ---- what requires a gradient --------------------------------------------------------------------


@row
def state_of_a_new_model(side: Side, scratch: Path) -> Any:
    return state(side.wrap(side.config()))


@row
def state_after_add_adapter(side: Side, scratch: Path) -> Any:
    return state(side.two())


@row
def state_after_set_adapter(side: Side, scratch: Path) -> Any:
    model = side.two()
    states = []
    for name in ("b", "default", "b"):
        model.set_adapter(name)
        states.append(state(model))
    return states


@row
def state_after_set_adapter_in_inference_mode(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.set_adapter("b", inference_mode=True)
    frozen = state(model)
    model.set_adapter("b")
    return frozen, state(model)


@row
def state_of_a_loaded_model(side: Side, scratch: Path) -> Any:
    model = side.load(side.saved())
    frozen = state(model), model.training
    model.set_adapter("default")
    return frozen, state(model)


@row
def state_of_a_loaded_model_that_is_trained(side: Side, scratch: Path) -> Any:
    return state(side.load(side.saved(), is_trainable=True))


@row
def state_after_load_adapter(side: Side, scratch: Path) -> Any:
    model = side.wrap(side.config())
    model.load_adapter(side.saved(), "second")
    loaded = state(model)
    model.set_adapter("second")
    return loaded, state(model), side.logits(model)


@row
def state_after_load_adapter_that_is_trained(side: Side, scratch: Path) -> Any:
    model = side.wrap(side.config())
    model.load_adapter(side.saved(), "second", is_trainable=True)
    return state(model)


@row
def state_after_delete_adapter_of_the_active_one(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.delete_adapter("default")
    return state(model), side.logits(model)


@row
def state_after_delete_adapter_of_an_inactive_one(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.delete_adapter("b")
    return state(model), side.logits(model)


@row
def state_after_delete_adapter_of_the_last_one(side: Side, scratch: Path) -> Any:
    model = side.wrap(side.config())
    model.delete_adapter("default")
    return state(model), side.logits(model)


@row
def state_after_add_adapter_to_none(side: Side, scratch: Path) -> Any:
    model = side.wrap(side.config())
    model.delete_adapter("default")
    model.add_adapter("again", side.config())
    added = list(model.peft_config)
    model.set_adapter("again")
    return added, state(fill(model)), side.logits(model)


@row
def state_after_disable_adapter_layers(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.base_model.disable_adapter_layers()
    disabled = state(model), side.logits(model)
    model.base_model.enable_adapter_layers()
    return disabled, state(model), side.logits(model)


@row
def state_after_disable_adapter_layers_and_set_adapter(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.disable_adapter_layers()
    model.set_adapter("b")
    disabled = state(model), side.logits(model)
    model.enable_adapter_layers()
    return disabled, state(model), side.logits(model)


@row
def state_inside_disable_adapter(side: Side, scratch: Path) -> Any:
    model = side.two()
    with model.disable_adapter():
        logits = side.logits(model)
    return logits, state(model), side.logits(model)


@row
def state_inside_disable_adapter_with_a_saved_head(side: Side, scratch: Path) -> Any:
    model = fill(side.wrap(side.config(modules_to_save=["lm_head"])))
    with model.disable_adapter():
        logits = side.logits(model)
    return logits, side.logits(model)


@row
def state_after_unload(side: Side, scratch: Path) -> Any:
    base = side.two().unload()
    return sorted(name for name, _ in base.named_parameters()), side.logits(base)


# ---- outputs, merging ----------------------------------------------------------------------------


@row
def logits_of_each_adapter(side: Side, scratch: Path) -> Any:
    model = side.two()
    logits = [side.logits(model)]
    model.set_adapter("b")
    return [*logits, side.logits(model)]


@row
def logits_of_two_active_adapters(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.base_model.set_adapter(["default", "b"])
    return side.logits(model), trained(model)


@row
def logits_of_a_new_adapter_are_the_base_s(side: Side, scratch: Path) -> Any:
    return side.logits(side.wrap(side.config()))


@row
def logits_of_alpha_zero(side: Side, scratch: Path) -> Any:
    return side.logits(fill(side.wrap(side.config(lora_alpha=0))))


@row
def logits_of_rank_stabilised_lora(side: Side, scratch: Path) -> Any:
    options = {"use_rslora": True, "alpha_pattern": {"v_proj": 5}, "rank_pattern": {"q_proj": 3}}
    return side.logits(fill(side.wrap(side.config(**options))))


@row
def merge_and_unload_of_the_active_one(side: Side, scratch: Path) -> Any:
    base = side.two().merge_and_unload()
    return side.logits(base), sorted(name for name, _ in base.named_parameters())


@row
def merge_and_unload_of_chosen_ones(side: Side, scratch: Path) -> Any:
    return [
        side.logits(side.two().merge_and_unload(adapter_names=names))
        for names in (["b"], ["default", "b"], ["b", "default"])
    ]


@row
def merge_adapter_and_back(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.merge_adapter()
    merged = side.logits(model), sorted(name for name, _ in model.named_parameters())
    model.unmerge_adapter()
    return merged, side.logits(model), state(model)


@row
def merge_adapter_then_disable(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.merge_adapter()
    with model.disable_adapter():
        return side.logits(model)


@row
def merge_adapter_then_set_adapter(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.merge_adapter()
    outcome = attempt(lambda: model.set_adapter("b"))
    return outcome, side.logits(model), list(model.active_adapters)


@row
def merge_and_unload_with_a_saved_head(side: Side, scratch: Path) -> Any:
    return side.logits(fill(side.wrap(side.config(modules_to_save=["lm_head"]))).merge_and_unload())


@row
def merge_and_unload_of_a_magnitude(side: Side, scratch: Path) -> Any:
    return side.logits(fill(side.wrap(side.config(use_dora=True))).merge_and_unload())


@row
def add_weighted_adapter_of_two(side: Side, scratch: Path) -> Any:
    model = fill(side.wrap(side.config(r=2)))
    model.add_adapter("b", side.config(r=2, lora_alpha=3))
    fill(model)
    model.add_weighted_adapter(["default", "b"], [0.3, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    return state(model), side.logits(model)


# ---- files ---------------------------------------------------------------------------------------


@row
def save_pretrained_then_load(side: Side, scratch: Path) -> Any:
    folder = side.saved()
    files = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")
    )
    return files, side.logits(side.load(folder))


@row
def save_pretrained_of_two(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.save_pretrained(scratch / "two")
    paths = (scratch / "two").rglob("*.safetensors")
    return sorted(str(path.relative_to(scratch)) for path in paths)


@row
def save_pretrained_of_a_selected_one(side: Side, scratch: Path) -> Any:
    side.two().save_pretrained(scratch / "one", selected_adapters=["b"])
    paths = (scratch / "one").rglob("*.safetensors")
    return sorted(str(path.relative_to(scratch)) for path in paths)


@row
def from_pretrained_under_another_name(side: Side, scratch: Path) -> Any:
    model = side.load(side.saved(), adapter_name="other")
    return state(model), sorted(name for name, _ in model.named_parameters()), side.logits(model)


@row
def load_adapter_under_a_taken_name(side: Side, scratch: Path) -> Any:
    folder = side.saved()
    model = side.wrap(side.config())
    model.load_adapter(folder, "default")
    return state(model), side.logits(model)


def round_trip_under(name: str) -> None:
    def of_name(side: Side, scratch: Path) -> Any:
        model = side.wrap(side.config(), name)
        fill(model).save_pretrained(scratch / "named")
        again = side.load(scratch / "named" / name, adapter_name=name)
        return state(again), side.logits(again)

    ROWS[f"round_trip_under_the_name_{name}"] = of_name


for _name in ("a", "lora", "weight", "q_proj", "lora_B", "0", "model", "base_layer", "ä b"):
    round_trip_under(_name)


# ---- patterns ------------------------------------------------------------------------------------


def targets(name: str, **options: Any) -> None:
    def of_options(side: Side, scratch: Path) -> Any:
        try:
            parameters = side.wrap(side.config(**options)).named_parameters()
        except ValueError:
            return REFUSED
        return sorted(name for name, _ in parameters if "lora_A" in name)

    ROWS[f"targets_{name}"] = of_options


targets("of_all_linear", target_modules="all-linear")
targets("by_expression", target_modules=r".*\.1\..*(q|k)_proj")
targets("by_end", target_modules=["mlp.up_proj", "0.self_attn.q_proj"])
targets("by_default_names", target_modules=None)
targets("in_chosen_layers", layers_to_transform=[0, 2])
targets("in_one_layer", layers_to_transform=1, layers_pattern="layers")
targets("but_excluded_ones", target_modules="all-linear", exclude_modules=["down_proj", "q_proj"])
targets("but_excluded_ones_by_expression", target_modules=QV, exclude_modules=r".*\.0\..*")
targets("that_match_nothing", target_modules=["nothing"])
targets("that_are_all_excluded", target_modules=QV, exclude_modules=QV)
targets("that_are_no_linear_layer", target_modules=["mlp"])
targets("partly_unknown", target_modules=["q_proj", "nothing"])
targets("of_a_layer_that_is_not_there", layers_to_transform=[7])
targets("with_layers_and_an_expression", target_modules=r".*q_proj", layers_to_transform=[0])


# ---- errors --------------------------------------------------------------------------------------


def refuses(name: str, action: Callable[[Side, Any], Any]) -> None:
    def of_action(side: Side, scratch: Path) -> Any:
        model = side.two()
        outcome = attempt(lambda: (action(side, model), None)[1])
        return outcome, list(model.peft_config), list(model.active_adapters)

    ROWS[f"error_of_{name}"] = of_action


refuses("add_adapter_under_a_taken_name", lambda side, m: m.add_adapter("b", side.config()))
refuses("add_adapter_with_a_dot", lambda side, m: m.add_adapter("b.c", side.config()))
refuses("set_adapter_of_an_unknown_one", lambda side, m: m.set_adapter("unknown"))
refuses("delete_adapter_of_an_unknown_one", lambda side, m: m.delete_adapter("unknown"))
refuses("load_adapter_of_a_missing_folder", lambda side, m: m.load_adapter(Path("/no"), "c"))
refuses(
    "add_weighted_adapter_of_an_unknown_one",
    lambda side, m: m.add_weighted_adapter(["default", "unknown"], [1, 1], "c"),
)
refuses(
    "config_with_rank_zero",
    lambda side, m: side.config(r=0) and m.add_adapter("c", side.config(r=0)),
)
refuses("config_with_an_unknown_bias", lambda side, m: m.add_adapter("c", side.config(bias="some")))
refuses(
    "two_adapters_with_biases",
    lambda side, m: (
        m.add_adapter("c", side.config(bias="all")),
        m.add_adapter("d", side.config(bias="all")),
    ),
)
refuses("save_pretrained_of_an_unknown_one", lambda s, m: m.save_pretrained(s.scratch, ["unknown"]))


# ---- status, attributes, text --------------------------------------------------------------------


@row
def get_layer_status_of_two(side: Side, scratch: Path) -> Any:
    model = side.two()
    states = []
    for change in (lambda: None, lambda: model.set_adapter("b"), model.disable_adapter_layers):
        change()
        for layer in side.status[0](model):
            fields = (layer.enabled, list(layer.active_adapters), list(layer.merged_adapters))
            states.append((layer.name, *fields, layer.requires_grad, layer.available_adapters))
            states.append((layer.devices, layer.quantization_backend))
    return states


@row
def get_model_status_of_two(side: Side, scratch: Path) -> Any:
    model = side.two()
    states = []
    for change in (lambda: None, lambda: model.set_adapter("b"), model.merge_adapter):
        change()
        status = dataclasses.asdict(side.status[1](model))
        status.pop("parameters", None)  # ours alone
        for name in ("base_model_type", "adapter_model_type"):
            status.pop(name)
        status["peft_types"] = {
            k: str(v).rpartition(".")[2] for k, v in status["peft_types"].items()
        }
        states.append(status)
    return states


@row
def get_model_status_after_disable_adapter_layers(side: Side, scratch: Path) -> Any:
    model = side.two()
    model.disable_adapter_layers()
    status = side.status[1](model)
    return status.enabled, status.requires_grad, status.trainable_params, status.num_adapter_layers


@row
def attributes(side: Side, scratch: Path) -> Any:
    model = side.two()
    same = model.get_base_model() is model.base_model.model
    device, dtype = str(model.device), str(model.dtype).rpartition(".")[2]
    return same, device, dtype, model.active_adapter, model.base_model.active_adapters


@row
def generate_greedily(side: Side, scratch: Path) -> Any:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    model = side.two()
    texts = [side.generate(model, **options)]
    with model.disable_adapter():
        texts.append(side.generate(model, **options))
    return [*texts, side.generate(side.base(), **options)]


@row
def generate_until_an_end(side: Side, scratch: Path) -> Any:
    model = side.two()
    return [
        side.generate(model, max_new_tokens=9, do_sample=False, eos_token_id=end, pad_token_id=3)
        for end in (5, [1, 2, 7])
    ]
