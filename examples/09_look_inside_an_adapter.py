"""What is inside an adapter: the rank it really uses, layer by layer, and what a smaller one would lose.

An adapter of rank 8 is written whose dW has two large singular values and six small ones in each layer. You should see
that inspecting finds an effective rank of about 2, and that resizing to rank 2 leaves exactly the error of Eckart and
Young (1936): the root of the sum of the squares of the values that were cut. runs/spectra.png shows them.
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
    base = CausalLM(
        TransformerConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2), seed=0
    )
    base.save_pretrained(here / "base")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    for name, p in model.named_parameters():  # dW = B A = U diag(VALUES) V^T
        if "lora_A" in name:
            p.data = orthonormal(p.shape[1], 8).T.astype(np.float32)
        elif "lora_B" in name:
            p.data = (orthonormal(p.shape[0], 8) * VALUES).astype(np.float32)
    model.save_pretrained(here / "adapter")

    report = inspect_adapter(here / "adapter", here / "base")
    print(
        f"{report['parameters']:,} parameters in {len(report['tensors'])} layers, of rank 8. Four of them:"
    )
    for row in report["tensors"][:4]:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))

    resize(here / "adapter", 2, here / "small")
    before, after = (
        load_file(here / name / "adapter_model.safetensors") for name in ("adapter", "small")
    )
    errors = []
    for key in (key for key in before if "lora_A" in key):
        dW, dW2 = (
            file[key.replace("lora_A", "lora_B")].astype(float) @ file[key]
            for file in (before, after)
        )
        errors.append(np.linalg.norm(dW2 - dW))  # s = 1 in both
    expected = float(np.sqrt((VALUES[2:] ** 2).sum()))
    print(
        f"resized to rank 2: an error of {min(errors):.6f} to {max(errors):.6f}; Eckart and Young say {expected:.6f}"
    )
    print(f"that is {expected / np.linalg.norm(VALUES):.1%} of dW, for a quarter of the parameters")
    if plots.available():
        Path("runs").mkdir(exist_ok=True)
        plots.spectra(Path("runs", "spectra.png"), report["spectra"])
