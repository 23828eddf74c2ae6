"""Four tasks, one frozen base, one batch: adapters by name, and which of them a row runs is its task's affair.

You should see that each task's own adapter is the best one for its text (the claim of Hu et al. 2021, section 4.2:
many small modules share one model), that a mixed batch gives what each task gives by itself, that a step with one task
reaches no other task's adapter, and that a task leaves as one plain adapter that PEFT reads. runs/multitask.png shows
who is best where.
"""

import tempfile
from pathlib import Path

import numpy as np

from minilora import (
    AdamW,
    ByteTokenizer,
    CausalLM,
    LoraConfig,
    PeftModel,
    TransformerConfig,
    no_grad,
)
from minilora.data import Batch, TaskWindows, Windows
from minilora.data.texts import four_tasks, prose, split
from minilora.lab.plots import available, heat_table
from minilora.lora import get_multitask_model
from minilora.training.loop import bits_per_byte, evaluate
from minilora.training.parallel import ShardedStep

encode, T = ByteTokenizer().encode, 64
texts = {
    task: [encode(part) for part in split(documents)]
    for task, documents in four_tasks(200_000).items()
}
tasks = list(texts)
shape = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "max_position_embeddings": T,
}
model = CausalLM(TransformerConfig(**shape))


def fit(model, windows, steps: int, lr: float) -> None:
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    with ShardedStep(model) as sharded:
        for step in range(steps):
            _, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
            optimizer.step(grads)


def bits(model) -> list[float]:
    return [bits_per_byte(evaluate(model, texts[task][1], T, limit=64)) for task in tasks]


fit(model, Windows(encode(split(prose())[0]), T, 16), 250, 3e-3)  # the base: English prose
rows = [bits(model)]

own = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_multitask_model(model, dict.fromkeys(tasks, own), shared=None, seed=0)
model.print_trainable_parameters()
fit(model, TaskWindows({task: both[0] for task, both in texts.items()}, T, 16), 250, 5e-3)

for task in tasks:
    with model.task(task):
        rows.append(bits(model))
print(f"\n{'bits per byte on':24}" + "".join(f"{task:>9}" for task in tasks))
for name, row in zip(names := ["base", *tasks], rows, strict=True):
    print(f"{name:24}" + "".join(f"{value:>9.3f}" for value in row))
best = sum(int(column.argmin()) == 1 + j for j, column in enumerate(np.array(rows).T))
print(f"\nthe best for its text is a task's own adapter: {best} of {len(tasks)}")

ids = np.stack([texts[task][1][:T] for task in tasks])
with no_grad():
    mixed = model(ids, tasks=tasks).numpy()
    alone = np.stack([model(ids, tasks=task).numpy()[i] for i, task in enumerate(tasks)])
apart = np.abs(mixed - alone).max() / np.abs(alone).max()
print(f"a mixed batch - each task by itself: {apart:.1e} of the largest one")

trained = {
    name.split(".")[-2]: p for name, p in model.named_parameters() if p.requires_grad
}  # one of each adapter
with ShardedStep(model) as sharded:
    _, grads = sharded.gradients(
        Batch(ids[:1, :-1], ids[:1, 1:], tasks=tasks[:1]), list(trained.values())
    )
reached = [name for name, g in zip(trained, grads, strict=True) if g is not None]
print(f"rows of {tasks[0]} alone give a gradient to the adapter of: {', '.join(reached)}")

with tempfile.TemporaryDirectory() as folder, no_grad():
    expected = model(ids, tasks=tasks[1]).numpy()
    model.export(tasks[1], folder)
    same = np.array_equal(PeftModel.from_pretrained(model.unload(), folder)(ids).numpy(), expected)
    print(f"exported as a plain adapter, {tasks[1]} gives the same bits: {same}")

if available():
    Path("runs").mkdir(exist_ok=True)
    heat_table(
        Path("runs", "multitask.png"),
        np.array(rows),
        names,
        tasks,
        "Bits per byte of each text, by adapter",
    )
