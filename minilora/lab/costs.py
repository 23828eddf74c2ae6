"""What LoRA costs: a worked example, a large model by formulas, files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .. import nn
from ..lora import LoraConfig, get_peft_model
from ..quant.linear import quantize
from ..training.methods import measure_weight_memory
from .bench import Bench

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


def worked_example() -> dict[str, Any]:
    """The worked example, by a LoRA layer; it writes y = x W, so that its W is ours transposed."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    W = np.arange(1.0, 13.0, dtype=np.float32).reshape(4, 3)
    model[0].weight.data = W.T.copy()
    adapted = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    values = {"lora_A": [[1, 0, -1, 2]], "lora_B": [[2], [-1], [3]]}
    for name, p in adapted.named_parameters():
        for key, value in values.items():
            if key in name:
                p.data = np.array(value, np.float32)
    merged = adapted.merge_and_unload()[0].weight.numpy().T
    return {"merged": merged.tolist(), "trained": 64 * (768 + 1024), "of": 768 * 1024}


def measure_files(bench: Bench) -> dict[str, Any]:
    """The files of a base and of an adapter, and the bits after a switch and back."""
    base = bench.base("mid")
    ids = bench.held_out("code")["report"][None, :64]
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config, seed=0)
    model.add_adapter("other", config, seed=1)
    before = model(ids).numpy()
    model.set_adapter("other")
    between = model(ids).numpy()
    model.set_adapter("default")
    after = model(ids).numpy()
    model.delete_adapter("other")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter = Path(folder, "adapter_model.safetensors").stat().st_size
    whole = bench.base_folder("mid") / "model.safetensors"
    same = before.tobytes() == after.tobytes()
    is_other = bool((between != before).any())
    return {"adapter": adapter, "base": whole.stat().st_size, "same": same, "is_other": is_other}
