"""Train for twenty thousand steps: memory, descriptors, time per step, false alarms.

    python benchmarks/soak.py [--steps 20000] [--runs 100] [--write]

One run of tiny steps through `train` itself, with its log, evaluations and checkpoints. Growth of
memory is the least-squares slope over the second half of the run. Then a hundred short runs that
learn, from different seeds: none of them may be reported as diverging. Exit code 1 if memory grows
by 1 kB per step, a descriptor stays open, a step gets 10 % slower, or a run is reported.
`--write` stores the result in benchmarks/results/soak.json.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.training.loop import Run, Settings, train

RESULT = Path(__file__).parent / "results" / "soak.json"
SHAPE = TransformerConfig(
    vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)
ADAPTER = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear")
TEXT = np.random.default_rng(0).integers(0, 4, 4_000).cumsum().astype(np.int32) % 16
EVERY = 50  # steps between two measurements of the process


def resident() -> int:
    """The resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(steps: int, out: Path) -> dict:
    model = get_peft_model(CausalLM(SHAPE, seed=0), ADAPTER, seed=0)
    settings = Settings(
        steps=steps,
        batch_size=4,
        context=8,
        lr=1e-3,
        shard=2,
        threads=2,
        eval_every=steps // 40,
        save_every=steps // 10,
    )
    states = []  # (step, resident bytes, open descriptors)
    seconds = []
    original_step = Run.step

    def step(self, sharded):
        if self.done % EVERY == 0:
            states.append((self.done, resident(), len(os.listdir("/proc/self/fd"))))
        # On a shared machine the clock says nothing.
        started = time.process_time()
        record = original_step(self, sharded)
        seconds.append(time.process_time() - started)
        return record

    Run.step = step
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # train prints each evaluation
            train(model, TEXT, settings, out, held_out=TEXT[:200])
    finally:
        Run.step = original_step
    at, memory, descriptors = np.array(states).T
    half = len(at) // 2
    early = statistics.median(seconds[steps // 20 : steps // 4])
    late = statistics.median(seconds[-steps // 5 :])
    slope = float(np.polyfit(at[half:], memory[half:], 1)[0])
    return {
        "steps": steps,
        "bytes_a_step": round(slope, 1),
        "resident_mib": [round(float(memory[i]) / 2**20, 1) for i in (1, half, -1)],
        "descriptors": [int(descriptors[1:].min()), int(descriptors[1:].max())],
        "step_cpu_ms": [round(1000 * early, 3), round(1000 * late, 3)],
        "step_cpu_drift_percent": round(100 * (late / early - 1), 1),
    }


def false_alarms(runs: int, out: Path) -> int:
    """The number of warnings of divergence in `runs` short runs that learn."""
    count = 0
    for seed in range(runs):
        lr = (3e-3, 1e-2, 3e-2)[seed % 3]
        settings = Settings(steps=150, batch_size=2, context=8, lr=lr, seed=seed, threads=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train(CausalLM(SHAPE, seed=seed), TEXT, settings, out / str(seed))
        count += len(seen)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        measured = soak(args.steps, Path(folder) / "soak")
        alarms = false_alarms(args.runs, Path(folder))
    result = {
        "command": "python benchmarks/soak.py --write",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(time.perf_counter() - begun, 1),
        **measured,
        "healthy_runs": args.runs,
        "false_alarms_of_divergence": alarms,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    lowest, highest = measured["descriptors"]
    steady = lowest == highest and measured["step_cpu_drift_percent"] < 10
    return 0 if measured["bytes_a_step"] < 1024 and steady and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
