"""DoRA: the length of a weight's row and its direction are learned apart, as in full fine-tuning.

The paper's figure 2, row by row: how far the length of each row moved, and how far its direction.
LoRA moves both together, since one dW makes both; full fine-tuning need not, nor need DoRA, whose
lengths are parameters. You should see that the correlation of LoRA is the largest, and those of the
others 0.3 or less (negative in the paper's large models), at similar losses (runs/dora.png).

This is the experiment `dora` of the laboratory in short: one seed, one learning rate per method,
and a base that was trained for seconds. `minilora lab dora` tunes the rates, takes three seeds and
comes to a verdict.
"""

import tempfile
from pathlib import Path

from minilora.lab import plots
from minilora.lab.bench import Bench
from minilora.lab.experiments import dora
from minilora.lab.protocol import BriefPlan

RATES = {"full": 1e-3, "LoRA": 8e-3, "DoRA": 4e-3}

with tempfile.TemporaryDirectory() as folder:
    # ---- 1. a base trained on prose, for all three -----------------------------------------------
    bench = Bench(folder, BriefPlan())
    layers = sum(name.endswith("_proj.weight") for name in bench.base_weights("micro"))
    print(f"a base with {layers} adaptable layers, trained on prose; now each method learns code")

    # ---- 2. three ways to adapt it ---------------------------------------------------------------
    rows = []
    for arm in dora.ARMS:
        case = {"arm": arm.name, "lr": RATES[arm.name], "seed": 0}
        row = case | dora.measure(bench, case)
        print(
            f"{arm.name:5} {row['before']:.3f} -> {row['report']:.3f} bits per byte   "
            f"correlation of length and direction {row['correlation']:+.2f}"
        )
        rows.append(row)

if plots.available():
    Path("runs").mkdir(exist_ok=True)
    plots.panels("runs/dora.png", "Length and direction of a weight's rows", dora.panels(rows))
