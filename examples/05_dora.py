"""DoRA: how long a row of the weight is and where it points, learnt apart, as in training all weights.

The paper's figure 2, row by row: how far each row's length moved, and how far its direction. LoRA moves both together,
since one dW makes both; full fine-tuning need not, and DoRA, whose lengths are parameters of their own, need not
either. You should see a correlation of about 0.6 for LoRA, and 0.25 or less for the others (in the paper's large models
theirs is negative), at much the same loss. runs/dora.png shows every row.
"""

from pathlib import Path

import numpy as np

from minilora import (
    AdamW,
    ByteTokenizer,
    CausalLM,
    Linear,
    LoraConfig,
    TransformerConfig,
    get_peft_model,
)
from minilora.data import Windows
from minilora.data.texts import prose, python_sources, split
from minilora.lab import plots
from minilora.training.loop import bits_per_byte, evaluate
from minilora.training.parallel import ShardedStep

tokenizer = ByteTokenizer()
english, python = (
    tuple(map(tokenizer.encode, split(text))) for text in (prose(), python_sources(600_000))
)
shape = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
base = CausalLM(TransformerConfig(**shape, tie_word_embeddings=True), seed=0)


def train(model, tokens, steps, lr):
    windows = Windows(tokens, context=64, batch_size=16)
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    with ShardedStep(model.train()) as sharded:
        for step in range(steps):
            _, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
            optimizer.step(grads)


# ---- 1. a base, and its linear layers --------------------------------------------------------------------------------
train(base, english[0], 200, 5e-3)
weights = {name: p.numpy() for name, p in base.named_parameters()}
layers = [
    path
    for path, module in base.named_modules()
    if isinstance(module, Linear) and path != "lm_head"
]
print(f"{len(layers)} layers of a base that knows prose; now each method learns code")


def movement(before, after):
    """(|change of length|, 1 - cosine of the angle) of every row of a weight: two arrays (O,)."""
    was, now = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    return np.abs(now - was), 1 - (before * after).sum(axis=1) / (was * now)


# ---- 2. three ways to adapt it ---------------------------------------------------------------------------------------
moved = {}
for method, lr in (("full fine-tuning", 1e-3), ("LoRA", 5e-3), ("DoRA", 5e-3)):
    model = CausalLM(base.config, seed=None)
    for name, p in model.named_parameters():
        p.data = weights[name].copy()
    if method != "full fine-tuning":
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", use_dora=method == "DoRA"
        )
        model = get_peft_model(model, config, seed=0)
    train(model, python[0], 120, lr)
    bits = bits_per_byte(evaluate(model, python[1], 64, limit=256))
    after = model.merge_and_unload() if method != "full fine-tuning" else model
    after = {name: p.numpy() for name, p in after.named_parameters()}
    moved[method] = [
        movement(*(w[f"{path}.weight"].astype(float) for w in (weights, after))) for path in layers
    ]
    together = np.mean([np.corrcoef(*rows)[0, 1] for rows in moved[method]])
    print(
        f"{method:16} {bits:.3f} bits a byte   correlation of length and direction, a layer's rows: {together:+.2f}"
    )

if plots.available():
    import matplotlib.pyplot as plt

    Path("runs").mkdir(exist_ok=True)
    figure, axes = plt.subplots(1, len(moved), figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, (method, found) in zip(axes, moved.items(), strict=True):
        for (
            lengths,
            directions,
        ) in found:  # in units of the layer's mean, so that layers lie on each other
            axis.plot(
                directions / directions.mean(),
                lengths / lengths.mean(),
                ".",
                color="#2a6f97",
                alpha=0.25,
            )
        axis.set(title=method, xlabel="change of direction", xlim=(0, 3), ylim=(0, 5))
    axes[0].set_ylabel("change of length")
    figure.savefig("runs/dora.png")
