"""AdaLoRA: nobody says which layers need a high rank; training finds out.

A teacher is the base with updates of rank 4 hidden in three of its 21 linear layers. A student, the base with AdaLoRA
on all of them, sees only the teacher's logits, and may keep 21 triplets. You should see the ranks go where the updates
are: the three layers keep 4 or more of 6, the others next to nothing; runs/rank_allocation.png shows when.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from minilora import (
    AdaLoraConfig,
    AdamW,
    CausalLM,
    Tensor,
    TransformerConfig,
    get_peft_model,
    gradients,
    no_grad,
)
from minilora.lab import plots
from minilora.lora import RankAllocator
from minilora.optim import clip_by_global_norm, warmup_cosine

STEPS, RANK = 400, 4
HIDDEN = [
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.2.self_attn.o_proj",
]
shape = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
config = TransformerConfig(**shape, initializer_range=0.1)
rng = np.random.default_rng(0)

# ---- 1. the teacher: dW of rank 4, as large as W, in three layers ----------------------------------------------------
teacher, student = CausalLM(config, seed=0), CausalLM(config, seed=0)
layers = dict(teacher.named_modules())
for path in HIDDEN:
    weight = layers[path].weight
    dW = rng.standard_normal((weight.shape[0], RANK)) @ rng.standard_normal((RANK, weight.shape[1]))
    weight.data = weight.data + (dW * (np.linalg.norm(weight.data) / np.linalg.norm(dW))).astype(
        np.float32
    )

# ---- 2. the student: six triplets a layer, of which the average layer keeps one --------------------------------------
schedule = {"total_step": STEPS, "tinit": 40, "tfinal": 100, "deltaT": 4, "orth_reg_weight": 0.1}
adalora = AdaLoraConfig(
    target_r=1, init_r=6, lora_alpha=60, target_modules="all-linear", **schedule
)
model = get_peft_model(student, adalora).train()
optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
allocator = RankAllocator.of(model)
place = {id(p): i for i, p in enumerate(optimizer.params)}
own = [
    place[id(p)] for p in allocator.params
]  # where the allocator's parameters are among the optimiser's

history = [(0, allocator.ranks)]
for step in tqdm(range(STEPS), disable=None):
    ids = rng.integers(0, config.vocab_size, (8, 16))
    with no_grad():
        wanted = teacher(ids).numpy()
    error = model(ids) - Tensor(wanted)
    loss = (error * error).mean()
    grads = gradients(loss, optimizer.params)
    for i, more in zip(
        own, allocator.penalty()[1], strict=True
    ):  # keeps A's rows and B's columns orthonormal
        grads[i] = grads[i] if more is None else grads[i] + more
    grads, _ = clip_by_global_norm(grads, 1.0)
    optimizer.step(grads, warmup_cosine(step, STEPS, warmup=10, floor=0.1))
    allocator.step([grads[i] for i in own])
    if allocator.ranks != history[-1][1]:
        history.append((step, allocator.ranks))
    if step % 80 == 0 or step == STEPS - 1:
        kept = sum(allocator.ranks.values())
        print(f"step {step:3}   unexplained {loss.item() / wanted.var():6.1%}   {kept:3} triplets")
allocator.prune()

# ---- 3. where they are -----------------------------------------------------------------------------------------------
found = {path: history[-1][1][path] for path in HIDDEN}
others = [rank for path, rank in history[-1][1].items() if path not in HIDDEN]
print("kept where an update was hidden:", found)
print(f"kept elsewhere, on average: {np.mean(others):.2f}")
print(
    f"of all triplets in the three layers: {sum(found.values()) / sum(history[-1][1].values()):.0%}; by chance 14%"
)
if plots.available():
    Path("runs").mkdir(exist_ok=True)
    plots.rank_allocation(Path("runs", "rank_allocation.png"), history, STEPS)
