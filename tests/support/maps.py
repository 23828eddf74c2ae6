"""Every map theta -> dW: the rows of test_maps.py and of the parity table."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minilora.lora import maps

# Layers of all kinds: wide, tall, square, and one that IA3 takes for a feed-forward layer.
LAYERS = {"q_proj": (8, 12), "k_proj": (16, 8), "v_proj": (9, 8), "down_proj": (8, 4)}


class Row(NamedTuple):
    """A method as it is configured.

    fields   of its configuration
    count    the number of trainable numbers in a layer (O, I), or of the whole model
    """

    config: type[maps.MapConfig]
    fields: dict[str, Any]
    count: Any

    def make(self, **changes: Any) -> maps.MapConfig:
        return self.config(**{"target_modules": "all-linear", **self.fields, **changes})


def lokr(a: int, b: int, c: int, d: int) -> int:
    return a * c + b * d


ROWS = {
    "loha": Row(maps.LoHaConfig, {"r": 2, "alpha": 3}, lambda O, I: 4 * (O + I)),
    "lokr": Row(maps.LoKrConfig, {"r": 90, "alpha": 40}, None),
    "lokr-ranks": Row(maps.LoKrConfig, {"r": 1, "alpha": 2, "decompose_both": True}, None),
    "lokr-factor": Row(
        maps.LoKrConfig, {"r": 1, "decompose_factor": 2, "init_weights": "lycoris"}, None
    ),
    "hira": Row(maps.HiraConfig, {"r": 2}, lambda O, I: 2 * (O + I)),
    "vera": Row(maps.VeraConfig, {"r": 5}, lambda O, I: 5 + O),
    "vera-unsaved": Row(
        maps.VeraConfig,
        {"r": 5, "save_projection": False, "projection_prng_key": 3},
        lambda O, I: 5 + O,
    ),
    "oft": Row(maps.OFTConfig, {"oft_block_size": 4}, lambda O, I: I // 4 * 6),
    "oft-exact": Row(
        maps.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False}, lambda O, I: I // 4 * 6
    ),
    "oft-shared": Row(maps.OFTConfig, {"oft_block_size": 4, "block_share": True}, lambda O, I: 6),
    "oft-blocks": Row(maps.OFTConfig, {"r": 2, "oft_block_size": 0}, None),
    "ia3": Row(maps.IA3Config, {}, None),
    "fourierft": Row(
        maps.FourierFTConfig, {"n_frequency": 20, "init_weights": True}, lambda O, I: 20
    ),
    "miss": Row(maps.MissConfig, {"r": 3}, lambda O, I: 3 * O),
    "miss-mini": Row(maps.MissConfig, {"r": 3, "init_weights": "mini"}, lambda O, I: 3),
    "unilora": Row(maps.UniLoraConfig, {"r": 2, "theta_d_length": 30}, 30),
    "intrinsic": Row(maps.IntrinsicConfig, {"theta_d_length": 30}, 30),
}


def draw_theta(one: maps.Map, rng: np.random.Generator, size: float = 0.3) -> list[np.ndarray]:
    """A random theta of a map, the shared tensors last."""
    shapes = {**one.shapes(), **one.shared_shapes()}
    return [size * rng.standard_normal(shape) for shape in shapes.values()]


def maps_of(row: Row) -> dict[str, maps.Map]:
    """The maps of LAYERS."""
    return row.make().maps(LAYERS)
