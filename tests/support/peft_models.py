"""Small models with LoRA adapters, and what tests of `PeftModel` ask of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import small
from hypothesis import strategies as st

from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.models.transformer import CausalLM

PREFIX = "base_model.model."  # of PEFT's names
NAMES = [name.rpartition(".")[2] for name in small.LINEAR]
# path -> (in, out) of all linear layers but the head
PATHS = {f"model.layers.{i}.{name}": size for i in range(2) for name, size in small.LINEAR.items()}


def base(dtype: str = "float64", **changes: Any) -> CausalLM:
    return small.base(dtype, **changes)


def lora(**changes: Any) -> LoraConfig:
    """A configuration whose adapter changes the output from the start: B is random."""
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**options | changes)


def adapted(**changes: Any) -> PeftModel:
    return get_peft_model(base(), lora(**changes))


def with_two_adapters() -> PeftModel:
    model = get_peft_model(base(), lora(), seed=1)
    second = lora(target_modules=["q_proj", "up_proj"], modules_to_save=["norm"], r=3)
    model.add_adapter("b", second, seed=2)
    return model


def trainable(model: PeftModel) -> set[str]:
    """The names of the parameters that train, without PEFT's prefix."""
    named = model.named_parameters()
    return {name.removeprefix(PREFIX) for name, p in named if p.requires_grad}


def owned(model: PeftModel, adapter: str) -> set[str]:
    """The names of one adapter's parameters, without PEFT's prefix."""
    names = [name for name, _ in model.named_parameters()]
    return {name.removeprefix(PREFIX) for name in names if adapter in name.split(".")}


def is_close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


@st.composite
def configs(draw: st.DrawFn) -> LoraConfig:
    """Any configuration that fits small.CONFIG and of which every part is used; others warn."""

    def choose(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    in_patterns = draw(st.lists(st.sampled_from(names), unique=True))
    targets: Any = rf".*\.1\.\w+\.({'|'.join(names)})"
    layers = None
    if draw(st.booleans()):
        targets = names
        layers = choose(None, 0, [1], [0, 1])
    return LoraConfig(
        r=choose(1, 2, 3, 4),
        lora_alpha=choose(1, 8, 2.5),
        target_modules=targets,
        lora_dropout=choose(0.0, 0.1),
        bias=choose("none", "all", "lora_only"),
        use_rslora=choose(False, True),
        init_lora_weights=choose(True, False, "gaussian"),
        rank_pattern={name: choose(1, 2, 3, 4) for name in in_patterns},
        alpha_pattern={name: choose(1, 16) for name in in_patterns},
        layers_to_transform=layers,
        modules_to_save=choose(None, ["lm_head"], ["norm", "embed_tokens"]),
        task_type=choose(None, "CAUSAL_LM"),
    )
