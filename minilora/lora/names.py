"""The names of an adapter's tensors: here, in PEFT's models, and in its files.

    here          model.layers.0.self_attn.q_proj.adapters.default.lora_A
    PEFT's        base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    the file's    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

A file says some things twice: the weight of an embedding or a head that is a target, which must be the base's, and
what a tied head has of its embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .config import LoraConfig
from .embedding import EmbeddingAdapter, OneHot
from .plan import BARE, NAMES, PREFIX, TENSORS, Plan, adapter_class
from .targets import matches
from .tokens import TokenRows
from .tying import embedding_and_head, unwrap

PARAMETERS = {
    *EmbeddingAdapter.TENSORS,
    *TokenRows.TENSORS,
}  # bare in PEFT's models, too, whatever the adapter


def peft_name(path: str, configs: Mapping[str, LoraConfig]) -> str:
    """An attribute path -> PEFT's name."""
    layer, inside, rest = path.rpartition(".adapters.")
    if not inside:
        return PREFIX + path
    adapter, tensor = rest.split(".")
    suffix = "" if tensor in PARAMETERS else adapter_class(configs[adapter]).SUFFIX
    wrapper = ".token_adapter" if tensor in TokenRows.TENSORS else ""
    return f"{PREFIX}{layer}{wrapper}.{tensor}.{adapter}{suffix}"


def file_key(name: str, adapter_name: str) -> str:
    """A parameter's name in PEFT -> its key in adapter_model.safetensors, which does not know the adapter's name."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in TENSORS and parts[i + 1] == adapter_name:
            return ".".join(parts[: i + 1] + ([] if part in BARE else parts[i + 2 :]))
        if part == "modules_to_save" and parts[i + 1] == adapter_name:
            return ".".join(parts[:i] + parts[i + 2 :])
    return name


def repeated(
    model: Any, plan: Plan, adapter_name: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What PEFT's file holds besides `tensors`, the adapter's own, and what follows from them and from the base.

    The base's embedding and head where they are targets by NAMES; a tied head's factors, or its copy; and with
    bias="all" the biases of a module that is saved whole, once more before and once more after.
    """
    found = {}
    for path, base in plan.targets.items() if _names_an_end(plan) else ():
        module: Any = base.embedding if isinstance(base, OneHot) else base
        if module in map(unwrap, embedding_and_head(model)):
            found[f"{PREFIX}{path}.base_layer.weight"] = module.weight.numpy()
    if plan.follows:
        head, embedding = (PREFIX + path for path in plan.follows)
        pairs = [
            ("lora_A.weight", "lora_embedding_B"),
            ("lora_B.weight", "lora_embedding_A"),
            ("weight", "weight"),
        ]
        for own, other in pairs:
            if (source := tensors.get(f"{embedding}.{other}")) is not None:
                found[f"{head}.{own}"] = source if own == other else np.ascontiguousarray(source.T)
    for path, module in plan.saved.items() if plan.config.bias == "all" else ():
        for name, p in module.named_parameters():
            if name.rpartition(".")[2] == "bias":
                place = (
                    name if name == "bias" else f"{adapter_name}.{name}"
                )  # PEFT takes its name out of ends alone
                found[f"{PREFIX}{path}.original_module.{name}"] = p.numpy()
                if (copy := tensors.get(f"{PREFIX}{path}.{name}")) is not None:
                    found[f"{PREFIX}{path}.modules_to_save.{place}"] = copy
    return found


def _names_an_end(plan: Plan) -> bool:
    """Does PEFT save the base's weight of an embedding or a head that is a target? By the configuration's words."""
    targets = plan.config.target_modules
    if plan.config.trainable_token_indices is not None or targets is None:
        return False
    if isinstance(targets, str):
        return any(
            path.rpartition(".")[2] in NAMES and matches(path, targets) for path in plan.targets
        )
    return any(name in targets for name in NAMES)
