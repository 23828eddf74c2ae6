"""What LoRA costs on a model that is too large to be made here, by formulas."""

from __future__ import annotations

from typing import Any

from ..quant.linear import quantize
from ..training.methods import measure_weight_memory

# Llama-2-7B: 32 blocks of these (outputs, inputs), an embedding, a head and 65 norms.
BLOCKS = 32
ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096))
MLP = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
LINEAR = BLOCKS * sum(O * I for O, I in (ATTENTION | MLP).values())
OTHERS = 2 * 32000 * 4096 + 65 * 4096
STATE = 16  # bytes of a trained number: itself, its gradient, and Adam's two moments in float32
ADAPTERS = {
    "q, v, r=8": (8, ("q_proj", "v_proj")),
    "q, v, r=64": (64, ("q_proj", "v_proj")),
    "all linear, r=64": (64, (*ATTENTION, *MLP)),
}


def count_trained(r: int, targets: tuple[str, ...]) -> int:
    """r (I + O) numbers for each target of each block."""
    shapes = ATTENTION | MLP
    return BLOCKS * sum(r * sum(shapes[name]) for name in targets)


def llama_costs(model: Any) -> dict[str, Any]:
    """Percent trained and gigabytes, by adapter, of Llama-2-7B in NF4.

    model   any model: its layers say how many bits a weight takes in NF4, constants included
    """
    memory = measure_weight_memory(quantize(model, "nf4"))
    bits = 8 * memory["bytes"] / memory["weights"]
    weights = LINEAR * bits / 8 + 2 * OTHERS  # the rest stays in float16
    trained = {name: count_trained(*adapter) for name, adapter in ADAPTERS.items()}
    return {
        "percent": {name: 100 * n / (LINEAR + OTHERS) for name, n in trained.items()},
        "nf4_bits": bits,
        "weights_gb": weights / 1e9,
        "state_gb": {name: STATE * n / 1e9 for name, n in trained.items()},
    }
