"""DoRA: the length of a weight's row and its direction are learned apart, as in full fine-tuning.

The paper's figure 2, row by row: how far the length of each row moved, and how far its direction.
LoRA moves both together, since one dW makes both; full fine-tuning need not, nor need DoRA, whose
lengths are parameters. You should see a correlation of about 0.6 for LoRA and of 0.25 or less for
the others (negative in the paper's large models), at about the same loss (runs/dora.png).
"""

from pathlib import Path

import numpy as np

from minilora import AdamW, ByteTokenizer, CausalLM, Linear, LoraConfig, TransformerConfig
from minilora.data import Windows
from minilora.data.texts import prose, python_sources, split
from minilora.lab import plots
from minilora.lora import get_peft_model
from minilora.training.loop import bits_per_byte, evaluate
from minilora.training.parallel import ShardedStep


def train(model, tokens, steps, lr):
    windows = Windows(tokens, context=64, batch_size=16)
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    with ShardedStep(model.train()) as sharded:
        for step in range(steps):
            _, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
            optimizer.step(grads)


def movement(before, after):
    """(|change of length|, 1 - cosine of the angle) of every row of a weight: two arrays (O,)."""
    was = np.linalg.norm(before, axis=1)
    now = np.linalg.norm(after, axis=1)
    return np.abs(now - was), 1 - (before * after).sum(axis=1) / (was * now)


# ---- 1. a base trained on prose, and its linear layers -------------------------------------------
to_ids = ByteTokenizer().encode
english, _ = map(to_ids, split(prose()))
python, held_out = map(to_ids, split(python_sources(600_000)))
shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
base = CausalLM(TransformerConfig(**shape, tie_word_embeddings=True), seed=0)
train(base, english, 200, 5e-3)
linear = [path for path, module in base.named_modules() if isinstance(module, Linear)]
keys = [f"{path}.weight" for path in linear if path != "lm_head"]
weights = {name: p.numpy() for name, p in base.named_parameters()}
print(f"a base with {len(keys)} layers, trained on prose; now each method learns code")

# ---- 2. three ways to adapt it -------------------------------------------------------------------
moved = {}
for method, lr in (("full fine-tuning", 1e-3), ("LoRA", 5e-3), ("DoRA", 5e-3)):
    model = CausalLM(base.config, seed=None)
    for name, p in model.named_parameters():
        p.data = weights[name].copy()
    if method != "full fine-tuning":
        dora = method == "DoRA"
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora)
        model = get_peft_model(model, config, seed=0)
    train(model, python, 120, lr)
    bits = bits_per_byte(evaluate(model, held_out, 64, limit=256))
    plain = model if method == "full fine-tuning" else model.merge_and_unload()
    after = {name: p.numpy().astype(float) for name, p in plain.named_parameters()}
    moved[method] = [movement(weights[key].astype(float), after[key]) for key in keys]
    mean = np.mean([np.corrcoef(*rows)[0, 1] for rows in moved[method]])
    print(f"{method:16} {bits:.3f} bits per byte   correlation of length and direction {mean:+.2f}")

if plots.available():
    plt = plots.styled_pyplot()
    figure, axes = plt.subplots(1, len(moved), figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, (method, rows) in zip(axes, moved.items(), strict=True):
        for length, direction in rows:  # divided by their means, so that all layers overlap
            x, y = direction / direction.mean(), length / length.mean()
            axis.plot(x, y, ".", color="#2a6f97", alpha=0.25)
        axis.set(title=method, xlabel="change of direction", xlim=(0, 3), ylim=(0, 5))
    axes[0].set_ylabel("change of length")
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/dora.png")
