"""One vector theta (d,) for a whole model, scattered to D numbers of its layers: x = P theta.

Each of the D numbers is one entry of theta, divided by the square root of n, the number of places
that have this entry. So P is linear and keeps lengths, |x| = |theta|, and the gradient of an entry
is the sum of dL/dx over its places, divided by the same root.

    intrinsic dimension   x is dW of all layers (Li et al. 2018; Aghajanyan et al. 2021, with
                          another random projection)
    Uni-LoRA              x is A and B of all layers, without a scaling: dW = B A (Li et al. 2025)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ...backend import Array, Shape, backend_of
from ...errors import ConfigError, Rule, integer_rules, is_flag, is_plain_number, number_rules
from .contract import LARGE, Layers, Map, MapConfig, Theta, refuse_unused

# The order of the modules of a block: it decides which entries of x belong to which layer.
ORDER = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "attn.c_attn", "attn.c_proj"),
    *("gate_proj", "up_proj", "down_proj", "mlp.c_fc", "mlp.c_proj", "lm_head"),
)


@functools.lru_cache(maxsize=4)
def scatter(count: int, d: int, seed: int) -> tuple[Array, Array]:
    """The indices (count,) into theta, and 1 / sqrt(n) (d,) for the n places of each entry.

    n is count // d or one more. NumPy's generator draws the order, as in PEFT.
    """
    rng = np.random.default_rng(seed)
    entries = np.repeat(np.arange(d), count // d)
    if count % d:
        extra = rng.choice(d, size=count % d, replace=False)
        entries = np.concatenate([entries, extra])
    rng.shuffle(entries)
    counts = np.bincount(entries, minlength=d)
    return entries, 1 / np.sqrt(np.maximum(counts, 1))


def module_order(path: str) -> tuple[Any, ...]:
    """A sort key by which paths come in the order of a model's modules, as a file's may not."""
    numbers = [int(part) for part in path.split(".") if part.isdecimal()]
    place = next((i for i, name in enumerate(ORDER) if path.endswith(name)), len(ORDER))
    return (path.endswith("lm_head"), numbers, place, path)


class Scattered(Map):
    """A map with `count(O, I)` of the D numbers in this layer, after those of the layers before."""

    SHARED_TRAINS = True

    def __init__(self, config: MapConfig, path: str, layers: Layers):
        super().__init__(config, path, layers)
        self.d = vars(config)["theta_d_length"]
        start = total = 0
        for other in sorted(layers, key=module_order):
            start = total if other == path else start
            total += self.count(*layers[other])
        self.total = total
        entries, scales = scatter(total, self.d, vars(config)["proj_seed"])
        self.entries = entries[start : start + self.count(self.O, self.I)]
        self.scales = scales[self.entries]

    def check(self) -> None:
        if self.d > self.total:
            raise ConfigError(
                f"theta_d_length = {self.d}: {self.config.title} scatters theta over {self.total} "
                f"numbers, and the others would never train: set it to at most {self.total}"
            )

    def count(self, O: int, I: int) -> int:
        """How many of the D numbers a layer (O, I) has."""
        raise NotImplementedError

    def shapes(self) -> dict[str, Shape]:
        return {}

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        return ()

    def shared_shapes(self) -> dict[str, Shape]:
        return dict.fromkeys(self.SHARED, (self.d,))

    def spread(self, theta: Theta) -> Array:
        """The layer's numbers (count,) from theta (d,)."""
        (z,) = theta
        return z[self.on_device(z, "entries")] * self.on_device(z, "scales").astype(z.dtype)

    def gather(self, d_numbers: Array) -> Sequence[Array]:
        """[dL/dtheta (d,)] from the gradient (count,) of the layer's numbers."""
        xp = backend_of(d_numbers).xp
        parts = d_numbers * self.on_device(d_numbers, "scales").astype(d_numbers.dtype)
        sums = xp.bincount(self.on_device(parts, "entries"), parts, minlength=self.d)
        return [sums.astype(d_numbers.dtype)]


class Intrinsic(Scattered):
    SHARED = ("intrinsic_theta",)

    def count(self, O: int, I: int) -> int:
        return O * I

    def init_shared(self, rng: np.random.Generator) -> Sequence[Array]:
        return [np.zeros(self.d)]

    def delta(self, theta: Theta, W: Array) -> Array:
        return self.spread(theta).reshape(self.O, self.I)

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        return self.gather(G.reshape(-1))


class UniLora(Scattered):
    SHARED = ("unilora_theta_d",)
    starts_as_base = False

    def count(self, O: int, I: int) -> int:
        return vars(self.config)["r"] * (O + I)  # type: ignore[no-any-return]

    def check(self) -> None:
        super().check()
        config = self.config
        assert isinstance(config, UniLoraConfig)
        if not config.init_weights:
            refuse_unused(config, "init_theta_d_bound", "init_weights = True")

    def init_shared(self, rng: np.random.Generator) -> Sequence[Array]:
        config = self.config
        assert isinstance(config, UniLoraConfig)
        bound = config.init_theta_d_bound
        if config.init_weights:
            return [rng.uniform(-bound, bound, self.d)]
        return [rng.standard_normal(self.d)]

    def factors(self, theta: Theta) -> tuple[Array, Array]:
        """A (r, I), B (O, r), one after the other in the layer's numbers."""
        numbers = self.spread(theta)
        end = self.r * self.I
        return numbers[:end].reshape(self.r, self.I), numbers[end:].reshape(self.O, self.r)

    def delta(self, theta: Theta, W: Array) -> Array:
        A, B = self.factors(theta)
        return B @ A

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        A, B = self.factors(theta)
        xp = backend_of(G).xp
        return self.gather(xp.concatenate([(B.T @ G).reshape(-1), (G @ A.T).reshape(-1)]))

    def rank_bound(self, W: Array) -> int:
        return min(self.r, self.O, self.I)


@dataclasses.dataclass
class IntrinsicConfig(MapConfig):
    """dW of all layers scattered from one theta (d)    Aghajanyan et al. 2021; not in PEFT

    theta_d_length   d, the numbers that train in the whole model
    proj_seed        the seed of the order
    """

    theta_d_length: int = 256
    proj_seed: int = 42

    peft_type = "INTRINSIC"  # minilora's own name
    method = "intrinsic"
    title = "intrinsic dimension"
    map = Intrinsic
    RULES: ClassVar = [
        *integer_rules("theta_d_length", least=1, limit=2**31),
        *integer_rules("proj_seed", least=0, limit=2**63),
    ]


@dataclasses.dataclass
class UniLoraConfig(MapConfig):
    """dW = B A with A and B scattered from one theta (d)    Li et al. 2025

    theta_d_length       d, the numbers that train in the whole model
    proj_seed            the seed of the order
    init_theta_d_bound   theta ~ U(-bound, bound), so that a new adapter changes the model's output
    init_weights         False: theta ~ N(0, 1)
    unilora_dropout      probability of dropping an element of the map's input, in training
    """

    r: int = 4
    theta_d_length: int = 256
    proj_seed: int = 42
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    init_weights: bool = True

    peft_type = "UNILORA"
    method = "unilora"
    title = "Uni-LoRA"
    map = UniLora
    USES = ("layers_to_transform", "layers_pattern", "r", "fan_in_fan_out")
    FIXED: ClassVar = {"bias": "none", "save_indices": False}
    DROPOUT = "unilora_dropout"
    RULES: ClassVar = [
        *IntrinsicConfig.RULES,
        *number_rules("unilora_dropout", is_kind=is_plain_number, least=0, below=1),
        *number_rules("init_theta_d_bound", is_kind=is_plain_number, least=0, below=LARGE),
        Rule("init_weights", is_flag, "True or False"),
    ]
