"""Merging an adapter into a checkpoint from file to file: tensor by tensor, summed in float64.

You should see that the merged checkpoint is exactly the float64 sum rounded once to bfloat16, that
rounding takes most of an update that is a thousandth of its weight (a bfloat16 keeps 8 bits; the
report says it per layer), and that merging needs the memory of a few tensors, not of the model.
"""

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.formats import load_file
from minilora.tools.converting import convert
from minilora.tools.merging import merge

with tempfile.TemporaryDirectory() as scratch:
    here = Path(scratch)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    model = CausalLM(TransformerConfig(**shape), seed=0)
    model.save_pretrained(here / "float32")
    convert(here / "float32", here / "base", dtype="bfloat16")  # as models are published
    size = (here / "base" / "model.safetensors").stat().st_size

    rng = np.random.default_rng(0)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # as after a short training: |dW| is a thousandth of |W|
            p.data = (2e-4 * rng.standard_normal(p.shape)).astype(np.float32)
    adapted.save_pretrained(here / "adapter")

    tracemalloc.start()
    rows = merge(here / "base", [here / "adapter"], here / "merged", threads=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{len(rows)} layers merged with {peak / 1e6:.1f} MB of arrays at most")
    print(f"the checkpoint has {size / 1e6:.1f} MB")
    for row in rows[:3]:
        print(f"  {row['tensor']}: |dW| {row['|dW|']:.4f}, rounding takes {row['lost']:.0%} of it")

    path = "model.layers.0.self_attn.q_proj"
    base = load_file(here / "base" / "model.safetensors")[f"{path}.weight"]
    merged = load_file(here / "merged" / "model.safetensors")[f"{path}.weight"]
    factors = load_file(here / "adapter" / "adapter_model.safetensors")
    A = factors[f"base_model.model.{path}.lora_A.weight"].astype(np.float64)
    B = factors[f"base_model.model.{path}.lora_B.weight"].astype(np.float64)

exact = base.astype(np.float64) + B @ A  # s = 1
spacing = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)  # between bfloat16's numbers
rounded = np.round(exact / spacing) * spacing  # to the nearest, ties to even
wrong = np.count_nonzero(merged != rounded)
print(f"numbers that are not the float64 sum rounded once: {wrong} of {merged.size:,}")
size = np.linalg.norm(B @ A)
error = np.linalg.norm(merged - exact)
print(f"|dW| / |W| = {size / np.linalg.norm(base):.4f}; rounding takes {error / size:.0%} of dW")
