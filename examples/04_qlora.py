"""QLoRA: a frozen base in four bits, and an adapter that trains over it as over the dense base.

You should see why NF4: its 16 levels are placed for normally distributed weights, so its error is
below FP4's and below that of equal steps. Then LoRA over a base in NF4, an eighth of its size, ends
within a few hundredths of a bit of LoRA over the dense base. runs/qlora.png shows both.
"""

from pathlib import Path

import numpy as np

from minilora import AdamW, ByteTokenizer, CausalLM, LoraConfig, TransformerConfig
from minilora.data import Windows
from minilora.data.texts import prose, python_sources, split
from minilora.lab import plots
from minilora.lora import get_peft_model
from minilora.quant import LEVELS, encode, quantization_report, quantize
from minilora.training.loop import bits_per_byte, evaluate
from minilora.training.parallel import ShardedStep


def train(model, tokens, steps, lr):
    """The loss of each step, in bits per byte."""
    windows, losses = Windows(tokens, context=64, batch_size=16), []
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    with ShardedStep(model.train()) as sharded:
        for step in range(steps):
            loss, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
            optimizer.step(grads)
            losses.append(bits_per_byte(float(loss)))
    return losses


# ---- 1. sixteen levels for normal weights --------------------------------------------------------
blocks = np.random.default_rng(0).standard_normal((1 << 14, 64)).astype(np.float32)
absmax = np.abs(blocks).max(axis=1, keepdims=True)
errors = {kind: np.abs(encode(blocks, kind).decode() - blocks).mean() for kind in ("nf4", "fp4")}
equal = absmax / 7  # int4: -7 ... 7 times this
errors["int4"] = np.abs(np.round(blocks / equal) * equal - blocks).mean()
print("mean error of a standard normal weight:", {k: f"{e:.4f}" for k, e in errors.items()})

# ---- 2. a base trained on prose ------------------------------------------------------------------
english, _ = map(ByteTokenizer().encode, split(prose()))
python, held_out = map(ByteTokenizer().encode, split(python_sources(600_000)))
shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
base = CausalLM(TransformerConfig(**shape, tie_word_embeddings=True), seed=0)
train(base, english, 200, 5e-3)

# ---- 3. the same LoRA over the dense base and over its codes -------------------------------------
lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
curves = {}
for kind in ("dense", "nf4"):
    model = CausalLM(base.config, seed=None)
    for p, original in zip(model.parameters(), base.parameters(), strict=True):
        p.data = original.numpy().copy()
    if kind == "nf4":
        report = quantization_report(quantize(model, kind))
        share = sum(r.nbytes for r in report) / sum(4 * r.parameters for r in report)
        error = np.mean([r.error for r in report])
        print(f"{len(report)} layers take {share:.1%} of their bytes, with an error of {error:.1%}")
    model = get_peft_model(model, lora, seed=0)
    curves[kind] = train(model, python, 150, 5e-3)
    bits = bits_per_byte(evaluate(model, held_out, 64, limit=256))
    print(f"LoRA over the {kind:5} base: {bits:.3f} bits per byte of held-out code")

if plots.available():
    plt = plots.styled_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.hist((blocks / absmax).ravel(), 200, color="#dddddd")
    for i, levels in enumerate([LEVELS["nf4"], LEVELS["fp4"], np.arange(-7, 8) / 7], start=1):
        left.plot(levels, np.full(len(levels), 3000 * i), "|", markersize=12, color="#222222")
    left.set_yticks([3000, 6000, 9000], [f"{kind}  {error:.3f}" for kind, error in errors.items()])
    left.set_title("Weights in blocks, levels, mean error", loc="left")
    for kind, losses in curves.items():
        right.plot(np.convolve(losses, np.full(10, 0.1), "valid"), label=f"{kind} base")
    right.legend(title="LoRA on code, bits per byte")
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/qlora.png")
