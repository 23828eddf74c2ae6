"""IA3: y = l ∘ (W x + b), or W (l ∘ x) for feed-forward layers (Liu et al. 2022).

W' = diag(l) W and b' = l ∘ b with l (O, 1), or W' = W diag(l) with l (1, I): so dW = (l - 1) ∘ W.
dl has the row sums of G ∘ W plus b ∘ db for the bias, or the column sums of G ∘ W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from ...backend import Array, Shape
from ...errors import ConfigError, Rule, is_flag
from ..targets.rules import Targets
from .contract import Layers, Map, MapConfig, Theta

FEEDFORWARD = ("down_proj", "mlp.c_proj")


class IA3(Map):
    TENSORS = ("ia3_l",)
    reads_W = True
    alone = "is IA3's and scales the layer's whole weight"

    def __init__(self, config: MapConfig, path: str, layers: Layers):
        super().__init__(config, path, layers)
        assert isinstance(config, IA3Config)
        names = config.feedforward_modules or []
        self.scales_inputs = Targets(names, anywhere=True).mean(path)
        self.moves_bias = not self.scales_inputs

    def shapes(self) -> dict[str, Shape]:
        return {"ia3_l": (1, self.I) if self.scales_inputs else (self.O, 1)}

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        (shape,) = self.shapes().values()
        is_one = self.config.init_ia3_weights  # type: ignore[attr-defined]
        return [np.ones(shape) if is_one else rng.standard_normal(shape)]

    def delta(self, theta: Theta, W: Array) -> Array:
        (l,) = theta
        return (l - 1) * W

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        return [(G * W).sum(axis=0 if self.scales_inputs else 1, keepdims=True)]

    def moved_bias(self, theta: Theta, b: Array) -> Array:
        (l,) = theta
        return l[:, 0] * b

    def pull_bias(self, theta: Theta, b: Array, db: Array) -> Sequence[Array]:
        return [(b * db)[:, None]]


def _is_names(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


@dataclasses.dataclass
class IA3Config(MapConfig):
    """W' = diag(l) W and b' = l ∘ b, or W' = W diag(l)    Liu et al. 2022

    feedforward_modules   targets whose inputs are scaled, as endings of names or a pattern; None:
                          those that end in FEEDFORWARD, as in PEFT
    init_ia3_weights      True: l is one; False: l ~ N(0, 1)
    """

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True

    peft_type = "IA3"
    method = "ia3"
    title = "IA3"
    map = IA3
    USES = ("exclude_modules", "fan_in_fan_out")
    RULES: ClassVar = [
        Rule("feedforward_modules", _is_names, "a list of names, or a pattern"),
        Rule("init_ia3_weights", is_flag, "True or False"),
    ]
    TARGETS: ClassVar = {
        "llama": ["k_proj", "v_proj", "down_proj"],
        "mistral": ["k_proj", "v_proj", "down_proj"],
        "qwen2": ["q_proj", "v_proj", "down_proj"],
        "qwen3": ["q_proj", "v_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
    }

    def __post_init__(self) -> None:
        given = self.feedforward_modules
        if isinstance(given, (set, tuple)):
            self.feedforward_modules = sorted(given)
        super().__post_init__()
        names = self.feedforward_modules
        targets = self.target_modules
        if isinstance(names, list) and isinstance(targets, list) and not {*names} <= {*targets}:
            missing = sorted({*names} - {*targets})
            raise ConfigError(
                f"feedforward_modules {missing!r:.120} are not in target_modules "
                f"{targets!r:.120}: add them there, or leave them out here"
            )

    def settle(self, paths: Iterable[str]) -> None:
        if self.feedforward_modules is None:
            targets = self.target_modules
            names = targets if isinstance(targets, list) else paths
            self.feedforward_modules = [name for name in names if name.endswith(FEEDFORWARD)]
            return
        self._settle_names(list(paths))

    def _settle_names(self, paths: list[str]) -> None:
        """Replace endings by full paths where "all-linear" did so in target_modules, as PEFT needs.

        ConfigError for a name that matches none of `paths`.
        """
        names, targets = self.feedforward_modules, self.target_modules
        if not (isinstance(names, list) and isinstance(targets, list)):
            return
        for name in names:
            if not any(Targets([name], anywhere=True).mean(path) for path in paths):
                raise ConfigError(
                    f"feedforward_modules: {name!r:.60} matches no target; the targets are "
                    f"{', '.join(paths)[:200]}: correct the name, or leave it out"
                )
        if not {*names} <= {*targets}:
            wanted = Targets(names, anywhere=True)
            self.feedforward_modules = [path for path in paths if wanted.mean(path)]
