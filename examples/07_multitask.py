"""Four tasks, one frozen base, one batch: each row of a batch runs the adapter of its own task.

You should see that each task's own adapter is the best one for its text (Hu et al. 2021, section
4.2), that a mixed batch gives what each task gives alone, that a step on one task reaches no other
adapter, and that a task can be exported as a plain adapter that PEFT reads (runs/multitask.png).
"""

import tempfile
from pathlib import Path

import numpy as np

from minilora import AdamW, ByteTokenizer, CausalLM, LoraConfig, TransformerConfig, no_grad
from minilora.data import Batch, TaskWindows, Windows
from minilora.data.texts import four_tasks, prose, split
from minilora.lab.plots import available, heat_table
from minilora.lora import PeftModel, get_multitask_model
from minilora.training.loop import bits_per_byte, evaluate
from minilora.training.parallel import ShardedStep

T, encode = 64, ByteTokenizer().encode
texts = {task: [*map(encode, split(text))] for task, text in four_tasks(200_000).items()}
tasks = list(texts)
shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
model = CausalLM(TransformerConfig(**shape, max_position_embeddings=T))


def train(model, windows, lr):
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)
    with ShardedStep(model) as sharded:
        for step in range(250):
            _, grads = sharded.gradients(windows.batch(step), optimizer.params, step=step)
            optimizer.step(grads)


def bits(model) -> list[float]:
    return [bits_per_byte(evaluate(model, texts[task][1], T, limit=64)) for task in tasks]


train(model, Windows(encode(split(prose())[0]), T, 16), 3e-3)  # the base: English prose
rows = [bits(model)]
config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_multitask_model(model, dict.fromkeys(tasks, config), shared=None, seed=0)
model.print_trainable_parameters()
train(model, TaskWindows({task: ids for task, (ids, _) in texts.items()}, T, 16), 5e-3)
for task in tasks:
    with model.task(task):
        rows.append(bits(model))
names = ["base", *tasks]
print(f"\n{'bits per byte on':24}" + "".join(f"{task:>9}" for task in tasks))
for name, row in zip(names, rows, strict=True):
    print(f"{name:24}" + "".join(f"{value:>9.3f}" for value in row))
best = np.argmin(rows, axis=0) == np.arange(1, 1 + len(tasks))
print(f"\na task's own adapter is the best for its text: {best.sum()} of {len(tasks)}")

ids = np.stack([texts[task][1][:T] for task in tasks])
with no_grad():
    mixed = model(ids, tasks=tasks).numpy()
    alone = np.stack([model(ids, tasks=task).numpy()[i] for i, task in enumerate(tasks)])
error = np.abs(mixed - alone).max() / np.abs(alone).max()
print(f"a mixed batch - each task alone: {error:.1e} of the largest logit")

trained = {name.split(".")[-2]: p for name, p in model.named_parameters() if p.requires_grad}
with ShardedStep(model) as sharded:  # of one parameter of each adapter
    batch = Batch(ids[:1, :-1], ids[:1, 1:], tasks=tasks[:1])
    _, grads = sharded.gradients(batch, list(trained.values()))
reached = [name for name, grad in zip(trained, grads, strict=True) if grad is not None]
print(f"rows of {tasks[0]} give a gradient only to the adapter of: {', '.join(reached)}")

with tempfile.TemporaryDirectory() as folder, no_grad():
    expected = model(ids, tasks=tasks[1]).numpy()
    model.export(tasks[1], folder)
    exported = PeftModel.from_pretrained(model.unload(), folder)(ids).numpy()
same = np.array_equal(exported, expected)
print(f"exported as a plain adapter, {tasks[1]} gives the same bits: {same}")

if available():
    Path("runs").mkdir(exist_ok=True)
    heat_table(Path("runs/multitask.png"), np.array(rows), names, tasks, "Bits per byte by adapter")
