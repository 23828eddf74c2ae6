"""Four tasks, one frozen base, one batch: each row of a batch runs the adapter of its own task.

You should see that each task's own adapter is the best one for its text (Hu et al. 2021, section
4.2), that a mixed batch gives what each task gives alone, that a step on one task reaches no other
adapter, and that a task can be exported as a plain adapter that PEFT reads (runs/multitask.png).

The base, the texts and the training are the laboratory's in short: one seed, one learning rate, and
a base that was trained for seconds. Whether one adapter for each task is better than one for all of
them is measured by `minilora lab interference`, and both together by `minilora lab sharing`.
"""

import tempfile
from pathlib import Path

import numpy as np

from minilora import LoraConfig, no_grad
from minilora.data import Batch
from minilora.lab.bench import Bench
from minilora.lab.experiments.sharing import TASKS
from minilora.lab.plots import available, heat_table
from minilora.lab.protocol import Arm, BriefPlan
from minilora.lora import PeftModel, get_multitask_model
from minilora.training.parallel import ShardedStep

tasks = list(TASKS)
with tempfile.TemporaryDirectory() as folder:
    bench = Bench(folder, BriefPlan())

    # ---- 1. one adapter for each task, trained in batches with sequences of all ------------------
    def bits(model) -> list[float]:
        return [bench.bits(model, "report", task) for task in tasks]

    base = bench.base("micro")
    rows = [bits(base)]
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_multitask_model(base, dict.fromkeys(tasks, config), shared=None, seed=0)
    model.print_trainable_parameters()
    bench.fit_tasks(model, Arm("batches of all", settings={"batch_size": 32}), 8e-3, seed=0)
    for task in tasks:
        with model.task(task):
            rows.append(bits(model))
    names = ["base", *tasks]
    print(f"\n{'bits per byte on':24}" + "".join(f"{task:>9}" for task in tasks))
    for name, row in zip(names, rows, strict=True):
        print(f"{name:24}" + "".join(f"{value:>9.3f}" for value in row))
    best = np.argmin(rows, axis=0) == np.arange(1, 1 + len(tasks))
    print(f"\na task's own adapter is the best for its text: {best.sum()} of {len(tasks)}")

    # ---- 2. a mixed batch is each task's batch, and its gradients are too ------------------------
    ids = np.stack([bench.held_out(task)["report"][:48] for task in tasks])
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

    # ---- 3. one task leaves as a plain adapter ---------------------------------------------------
    with no_grad():
        expected = model(ids, tasks=tasks[1]).numpy()
        model.export(tasks[1], Path(folder, "exported"))
        exported = PeftModel.from_pretrained(model.unload(), Path(folder, "exported"))(ids).numpy()
    same = np.array_equal(exported, expected)
    print(f"exported as a plain adapter, {tasks[1]} gives the same bits: {same}")

if available():
    Path("runs").mkdir(exist_ok=True)
    heat_table(Path("runs/multitask.png"), np.array(rows), names, tasks, "Bits per byte by adapter")
