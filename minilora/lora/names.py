"""The names of an adapter's tensors: here, in PEFT's models, and in its files.

    here          model.layers.0.self_attn.q_proj.adapters.default.lora_A
    PEFT's        base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    the file's    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

A file says some things twice: the weight of an embedding or a head that is a target, which must be the base's, and
what a tied head has of its embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .config import LoraConfig
from .embedding import EmbeddingAdapter
from .plan import BARE, ENDS, PREFIX, TENSORS, Plan, adapter_class
from .targets import matches
from .tokens import TokenRows

Array = np.ndarray
TRANSPOSED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
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
    plan: Plan, adapter_name: str, tensors: Mapping[str, Array], read: Callable[[str], Array]
) -> dict[str, Array]:
    """What PEFT's file holds besides `tensors`, the adapter's: what follows from them and from the base.

    read   gives a tensor of the base by its name, such as "lm_head.weight"

    The base's embedding and head if they are targets by one of ENDS; a tied head's factors, or its
    copy; and with bias="all" the biases of a module that is saved whole, before and after training.
    """
    more: dict[str, Array] = {}
    if _names_an_end(plan):
        for path in plan.targets:
            if path in (plan.base.embedding, plan.base.head):
                more[f"{PREFIX}{path}.base_layer.weight"] = read(f"{path}.weight")
    if plan.follows:
        head, embedding = (PREFIX + path for path in plan.follows)
        for of_head, of_embedding in TRANSPOSED.items():
            if (source := tensors.get(f"{embedding}.{of_embedding}")) is not None:
                more[f"{head}.{of_head}"] = np.ascontiguousarray(source.T)
        if (copy := tensors.get(f"{embedding}.weight")) is not None:
            more[f"{head}.weight"] = copy
    if plan.config.bias == "all":
        for path in plan.saved:
            for name, _ in plan.base.below(path):
                if name.endswith(".bias"):
                    inside = name.removeprefix(f"{path}.")
                    more[f"{PREFIX}{path}.original_module.{inside}"] = read(name)
                    # PEFT takes the adapter's name out of keys only where it is their end.
                    place = inside if inside == "bias" else f"{adapter_name}.{inside}"
                    if (copy := tensors.get(PREFIX + name)) is not None:
                        more[f"{PREFIX}{path}.modules_to_save.{place}"] = copy
    return more


def _names_an_end(plan: Plan) -> bool:
    """Does PEFT save the base's weight of an embedding or a head that is a target? By the configuration's names."""
    targets = plan.config.target_modules
    if plan.config.trainable_token_indices is not None or targets is None:
        return False
    if isinstance(targets, str):
        return any(
            path.rpartition(".")[2] in ENDS and matches(path, targets) for path in plan.targets
        )
    return any(name in targets for name in ENDS)
