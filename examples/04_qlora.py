"""QLoRA: a frozen base in four bits, and an adapter over it that trains as if nothing had happened.

You should see why NF4: weights are normally distributed, and its 16 levels stand where they are, so its error is below
FP4's and below that of equal steps. Then a base in NF4, an eighth of its size, ends within a few hundredths of a bit
of the same LoRA over the dense base: the adapter makes up for what was rounded away. runs/qlora.png shows both.
"""

from pathlib import Path

import numpy as np

from minilora import (
    AdamW,
    ByteTokenizer,
    CausalLM,
    LoraConfig,
    TransformerConfig,
    get_peft_model,
    quantize,
)
from minilora.data import Windows
from minilora.data.texts import prose, python_sources, split
from minilora.lab import plots
from minilora.quant import LEVELS, encode, quantization_report
from minilora.training.loop import bits_per_byte, evaluate
from minilora.training.parallel import ShardedStep

# ---- 1. sixteen levels for normal weights ----------------------------------------------------------------------------
w = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
absmax = np.abs(w.reshape(-1, 64)).max(axis=1, keepdims=True)
equal = absmax / 7  # int4: -7 ... 7 times this
errors = {kind: np.abs(encode(w, kind).decode() - w).mean() for kind in ("nf4", "fp4")}
errors["int4"] = np.abs(np.round(w.reshape(-1, 64) / equal) * equal - w.reshape(-1, 64)).mean()
print(
    "mean error of a standard normal weight:",
    ", ".join(f"{kind} {error:.4f}" for kind, error in errors.items()),
)

# ---- 2. a base that knows prose --------------------------------------------------------------------------------------
english, python = (
    tuple(map(ByteTokenizer().encode, split(text))) for text in (prose(), python_sources(600_000))
)
shape = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
base = CausalLM(TransformerConfig(**shape, tie_word_embeddings=True), seed=0)


def train(model, tokens, steps, lr):
    """The loss of each step, in bits a byte."""
    windows, losses = Windows(tokens, context=64, batch_size=16), []
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    with ShardedStep(model.train()) as sharded:
        for step in range(steps):
            loss, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
            optimizer.step(grads)
            losses.append(bits_per_byte(float(loss)))
    return losses


train(base, english[0], 200, 5e-3)
weights = {name: p.numpy() for name, p in base.named_parameters()}

# ---- 3. the same LoRA over the base as it is, and over its codes -----------------------------------------------------
curves, ends = {}, {}
for kind in ("dense", "nf4"):
    model = CausalLM(base.config, seed=None)
    for name, p in model.named_parameters():
        p.data = weights[name].copy()
    if kind != "dense":
        report = quantization_report(quantize(model, kind))
        held, dense = sum(r.nbytes for r in report), 4 * sum(r.parameters for r in report)
        print(
            f"{len(report)} layers in {held:,} bytes, {held / dense:.1%} of {dense:,}; each is wrong by",
            end=" ",
        )
        print(f"{np.mean([r.error for r in report]):.1%} of its norm")
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"), seed=0
    )
    curves[kind] = train(model, python[0], 150, 5e-3)
    ends[kind] = bits_per_byte(evaluate(model, python[1], 64, limit=256))
    print(f"LoRA over the {kind:5} base: {ends[kind]:.3f} bits a byte of held-out code")
print(f"QLoRA - LoRA: {ends['nf4'] - ends['dense']:+.3f}")

if plots.available():
    import matplotlib.pyplot as plt

    Path("runs").mkdir(exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.hist((w.reshape(-1, 64) / absmax).ravel(), 200, color="#dddddd")
    for height, levels in enumerate((LEVELS["nf4"], LEVELS["fp4"], np.arange(-7, 8) / 7), start=1):
        left.plot(levels, np.full(len(levels), 3000 * height), "|", markersize=12, color="#222222")
    left.set_yticks([3000, 6000, 9000], [f"{kind}  {error:.3f}" for kind, error in errors.items()])
    left.set_title("Weights in their blocks, the levels, the mean error", loc="left")
    for (kind, losses), color in zip(curves.items(), ("#2a6f97", "#c8553d"), strict=True):
        right.plot(
            np.convolve(losses, np.full(10, 0.1), "valid"), label=f"{kind} base", color=color
        )
    right.set_title("LoRA on code, bits a byte", loc="left")
    right.legend()
    figure.savefig("runs/qlora.png")
