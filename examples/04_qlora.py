"""QLoRA: a frozen base in four bits, and an adapter that trains over it as over the dense base.

You should see why NF4: its 16 levels are placed for normally distributed weights, so its error is
below FP4's and below that of equal steps. Then LoRA over a base in NF4 ends within a few hundredths
of a bit of LoRA over the dense base, and its layers take an eighth of the bytes. runs/qlora.png
shows both.

The second half is the experiment `qlora` of the laboratory in short: one seed, one learning rate,
and a base that was trained for seconds. `minilora lab qlora` tunes the rates, takes three seeds and
compares all types and four ways to merge.
"""

import tempfile
from pathlib import Path

import numpy as np

from minilora.lab import plots
from minilora.lab.bench import Bench
from minilora.lab.experiments import qlora
from minilora.lab.panels import bar, bars, draw
from minilora.lab.protocol import BriefPlan
from minilora.quant import LEVELS, encode, quantization_report, quantize

# ---- 1. sixteen levels for normal weights --------------------------------------------------------
blocks = np.random.default_rng(0).standard_normal((1 << 14, 64)).astype(np.float32)
absmax = np.abs(blocks).max(axis=1, keepdims=True)
errors = {kind: np.abs(encode(blocks, kind).decode() - blocks).mean() for kind in ("nf4", "fp4")}
equal = absmax / 7  # int4: -7 ... 7 times this
errors["int4"] = np.abs(np.round(blocks / equal) * equal - blocks).mean()
print("mean error of a standard normal weight:", {k: f"{e:.4f}" for k, e in errors.items()})

# ---- 2. the same LoRA over a dense base and over its codes ---------------------------------------
rows = {}
with tempfile.TemporaryDirectory() as folder:
    bench = Bench(folder, BriefPlan())
    report = quantization_report(quantize(bench.base("micro"), "nf4"))
    share = sum(r.nbytes for r in report) / sum(4 * r.parameters for r in report)
    error = np.mean([r.error for r in report])
    print(f"{len(report)} layers take {share:.1%} of their bytes, with an error of {error:.1%}")
    for kind, name in ((qlora.DENSE, "dense"), ("nf4", "nf4")):
        row = rows[name] = qlora.measure(bench, {"arm": kind, "lr": 8e-3, "seed": 0})
        before, after = row["before"], row["report"]
        print(f"LoRA over the {name:5} base: {before:.3f} -> {after:.3f} bits per byte of code")
print(f"merged onto what the codes decode to: {rows['nf4']['onto_decoded']:.3f}")

if plots.available():
    plt = plots.styled_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.hist((blocks / absmax).ravel(), 200, color="#dddddd")
    for i, levels in enumerate([LEVELS["nf4"], LEVELS["fp4"], np.arange(-7, 8) / 7], start=1):
        left.plot(levels, np.full(len(levels), 3000 * i), "|", markersize=12, color="#222222")
    left.set_yticks([3000, 6000, 9000], [f"{kind}  {error:.3f}" for kind, error in errors.items()])
    left.set_title("Weights in blocks, levels, mean error", loc="left")
    stages = {"base": "before", "with LoRA": "report"}
    content = [bar(name, [row[s] for s in stages.values()]) for name, row in rows.items()]
    draw(right, bars("Bits per byte of code", "bits per byte", list(stages), content, zoom=True))
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/qlora.png")
