"""AdaLoRA: training finds out which layers need a high rank.

A teacher is the base with updates of rank 4 in three of its 21 linear layers. A student, the base
with AdaLoRA on all of them, sees only the teacher's logits, and may keep 21 triplets.
You should see that the three layers keep 4 or more of 6 triplets, and the others 0.4 on
average; runs/rank_allocation.png shows when the ranks were cut. Nobody planted ranks in real texts:
`minilora lab adalora` measures where they go after training on code.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from minilora import AdaLoraConfig, AdamW, CausalLM, Tensor, TransformerConfig, gradients, no_grad
from minilora.lab import plots
from minilora.lora import RankAllocator, get_peft_model
from minilora.optim import clip_by_global_norm, warmup_cosine

STEPS, RANK = 400, 4
CHANGED = ["layers.0.mlp.up_proj", "layers.1.self_attn.v_proj", "layers.2.self_attn.o_proj"]
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
config = TransformerConfig(**shape, num_attention_heads=2, initializer_range=0.1)
rng = np.random.default_rng(0)

# ---- 1. the teacher: dW of rank 4 with the norm of W, in three layers ----------------------------
teacher = CausalLM(config, seed=0)
layers = dict(teacher.model.named_modules())
for path in CHANGED:
    weight = layers[path].weight
    O, I = weight.shape
    dW = rng.standard_normal((O, RANK)) @ rng.standard_normal((RANK, I))
    dW *= np.linalg.norm(weight.data) / np.linalg.norm(dW)
    weight.data = weight.data + dW.astype(np.float32)

# ---- 2. the student: six triplets per layer, of which the average layer keeps one ----------------
schedule = {"total_step": STEPS, "tinit": 40, "tfinal": 100, "deltaT": 4, "orth_reg_weight": 0.1}
ranks = {"init_r": 6, "target_r": 1, "lora_alpha": 60, "target_modules": "all-linear"}
adalora = AdaLoraConfig(**ranks, **schedule)
model = get_peft_model(CausalLM(config, seed=0), adalora).train()
optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
allocator = RankAllocator.of(model)
index = {id(p): i for i, p in enumerate(optimizer.params)}
allocated = [index[id(p)] for p in allocator.params]  # their positions among the optimizer's

history = [(0, allocator.ranks)]
for step in tqdm(range(STEPS), disable=None):
    ids = rng.integers(0, config.vocab_size, (8, 16))
    with no_grad():
        wanted = teacher(ids).numpy()
    error = model(ids) - Tensor(wanted)
    loss = (error * error).mean()
    grads = gradients(loss, optimizer.params)
    _, penalties = allocator.penalty()  # for orthonormal rows of A and columns of B
    for i, penalty in zip(allocated, penalties, strict=True):
        if penalty is not None:
            grads[i] = grads[i] + penalty
    grads, _ = clip_by_global_norm(grads, 1.0)
    optimizer.step(grads, warmup_cosine(step, STEPS, warmup=10, floor=0.1))
    allocator.step([grads[i] for i in allocated])
    if allocator.ranks != history[-1][1]:
        history.append((step, allocator.ranks))
    if step % 80 == 0 or step == STEPS - 1:
        unexplained, kept = loss.item() / wanted.var(), sum(allocator.ranks.values())
        print(f"step {step:3}   unexplained {unexplained:6.1%}   {kept:3} triplets")
allocator.prune()

# ---- 3. where the ranks are ----------------------------------------------------------------------
ranks = {path.removeprefix("model."): rank for path, rank in history[-1][1].items()}
found = {path: ranks[path] for path in CHANGED}
others = [rank for path, rank in ranks.items() if path not in CHANGED]
print("triplets in the changed layers:", found)
print(f"triplets in another layer, on average: {np.mean(others):.2f}")
share = sum(found.values()) / sum(ranks.values())
print(f"share of all triplets in the changed layers: {share:.0%}; by chance 14%")
if plots.available():
    Path("runs").mkdir(exist_ok=True)
    plots.rank_allocation(Path("runs", "rank_allocation.png"), history, STEPS)
