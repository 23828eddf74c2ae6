"""What is inside an adapter: the rank that it really uses, per layer, and what a smaller one loses.

The example writes an adapter of rank 8 whose dW has two large singular values and six small ones in
each layer. You should see that inspecting finds an effective rank of about 2, and that resizing to
rank 2 leaves exactly the error of Eckart and Young (1936): the root of the sum of the squares of
the values that were cut. runs/spectra.png shows them.
"""

import tempfile
from pathlib import Path

import numpy as np

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.formats import load_file
from minilora.lab import plots
from minilora.tools.factoring import resize
from minilora.tools.inspecting import inspect_adapter

VALUES = np.array([4.0, 3.0, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01])  # of every layer's dW
rng = np.random.default_rng(0)


def orthonormal(rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


with tempfile.TemporaryDirectory() as scratch:
    here = Path(scratch)
    config = TransformerConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    base = CausalLM(config, seed=0)
    base.save_pretrained(here / "base")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    for name, p in model.named_parameters():  # dW = B A = U diag(VALUES) V^T
        if "lora_A" in name:
            p.data = orthonormal(p.shape[1], 8).T.astype(np.float32)
        elif "lora_B" in name:
            p.data = (orthonormal(p.shape[0], 8) * VALUES).astype(np.float32)
    model.save_pretrained(here / "adapter")

    report = inspect_adapter(here / "adapter", here / "base")
    layers = report["tensors"]
    print(f"{report['parameters']:,} parameters in {len(layers)} layers of rank 8. The first four:")
    for row in layers[:4]:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))

    resize(here / "adapter", 2, here / "small")
    before = load_file(here / "adapter" / "adapter_model.safetensors")
    after = load_file(here / "small" / "adapter_model.safetensors")

errors = []
for key_A in before:
    if "lora_A" in key_A:
        key_B = key_A.replace("lora_A", "lora_B")
        dW = before[key_B].astype(float) @ before[key_A]
        smaller = after[key_B].astype(float) @ after[key_A]
        errors.append(np.linalg.norm(smaller - dW))  # s = 1 in both
expected = float(np.sqrt((VALUES[2:] ** 2).sum()))
print(f"resized to rank 2, the error is {min(errors):.6f} to {max(errors):.6f}")
print(f"Eckart and Young give {expected:.6f}")
print(f"that is {expected / np.linalg.norm(VALUES):.1%} of dW, for a quarter of the parameters")
if plots.available():
    Path("runs").mkdir(exist_ok=True)
    plots.spectra(Path("runs", "spectra.png"), report["spectra"])
