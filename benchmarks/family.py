"""Compare all methods, starts and optimisers at tuned learning rates.

    python benchmarks/family.py [--base DIR] [--arms NAME,NAME] [--jobs 2] [--write]

The base is the demo's, which takes two minutes to pretrain; `--base` names a folder that keeps it
for the next run. Each arm, a method with its fields and optimiser, trains on the demo's code: 160
steps of 8 windows of 64 bytes. Its bits per byte on held-out code are then measured, on one half to
choose the learning rate and on the other half to report.

Rates are tuned by factors of 2: on seed 0, from a first guess outwards until the best rate has a
worse one on each side. The best rate and its two neighbours are then run on seeds 1 and 2, and the
rate with the best mean of the three seeds is chosen. Every arm is compared with LoRA of rank 4 in
pairs of equal seeds, which have equal batches: mean difference d, and the interval d ± 2.48 sd
(Student's t, three seeds, 95 %).

    better, worse    the whole interval is beyond MARGIN on that side
    level            the whole interval is within MARGIN on both sides
    cannot tell      all other intervals

`--write` adds each run to benchmarks/results/family.json as soon as it is measured, skips the runs
that this file has, and draws results/family.png. Everything takes half an hour on two cores. The
exit code is 1 if one of these conditions does not hold:

    nf4       the base in nf4 costs LoRA at most 0.05 bits per byte
    layers    the quantized layers take at most 13.1 % of their bytes in float32
    weights   all frozen weights take at most 20 %
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minilora.lora
from minilora import CausalLM, get_peft_model, quantize
from minilora.data.texts import prose, python_sources, split
from minilora.data.tokenizer import ByteTokenizer
from minilora.errors import MiniloraError
from minilora.lab.demo import Plan
from minilora.training.loop import Settings, bits_per_byte, evaluate, train
from minilora.training.methods import adapter_config, measure_weight_memory
from minilora.training.pool import completed, open_pool

RESULT = Path(__file__).parent / "results" / "family.json"
PICTURE = RESULT.with_suffix(".png")
SETTINGS = Settings(steps=160, batch_size=8, context=64, threads=1)
WINDOWS = 160  # of each half of the held-out text
SEEDS = (0, 1, 2)
WIDEST = 8  # rates are within a factor of 2^8 of the first guess
T_95 = 2.48  # 4.30 / sqrt(3)
MARGIN = 0.02  # bits per byte
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
ALL = {"target_modules": "all-linear"}
LARGEST_GAP = 0.05  # bits per byte
LAYERS_PERCENT = 13.1  # of float32
FROZEN_PERCENT = 20.0


class Arm(NamedTuple):
    """A method with its adapter's fields, and lr, the first guess of the learning rate."""

    method: str
    fields: Mapping[str, Any]
    lr: float
    quantize: str = "none"
    optimizer: str = "adamw"


REFERENCE = "LoRA r=4"
ARMS = {
    **{f"LoRA r={r}": Arm("lora", {**LORA, "r": r, "lora_alpha": 4 * r}, 8e-3) for r in (1, 4, 16)},
    "all weights": Arm("full", {}, 2e-3),
    "DoRA": Arm("dora", LORA, 8e-3),
    "AdaLoRA": Arm("adalora", {**LORA, "lora_alpha": 256}, 1.6e-2),
    "LoRA over int8": Arm("lora", LORA, 8e-3, quantize="int8"),
    "QLoRA (nf4)": Arm("lora", LORA, 8e-3, quantize="nf4"),
    # The relatives.
    "LoHa": Arm("loha", {**ALL, "r": 2, "alpha": 8}, 1.6e-2),
    "LoKr": Arm("lokr", {**ALL, "r": 64, "alpha": 64, "decompose_factor": 8}, 8e-3),
    "HiRA": Arm("hira", {**ALL, "r": 4}, 3.2e-2),
    "VeRA": Arm("vera", {**ALL, "r": 256}, 3.2e-2),
    "OFT": Arm("oft", {**ALL, "oft_block_size": 16}, 8e-3),
    "IA3": Arm("ia3", {**ALL, "feedforward_modules": ["down_proj"]}, 3.2e-2),
    "FourierFT": Arm("fourierft", {**ALL, "n_frequency": 1000, "init_weights": True}, 6.4e-2),
    "MiSS": Arm("miss", {**ALL, "r": 8}, 4e-3),
    "Uni-LoRA": Arm("unilora", {**ALL, "r": 4, "theta_d_length": 20_000}, 8e-3),
    "intrinsic": Arm("intrinsic", {**ALL, "theta_d_length": 20_000}, 8e-3),
    # The starts of LoRA r=4.
    **{
        name: Arm("lora", {**LORA, "init_lora_weights": name}, 4e-3)
        for name in ("orthogonal", "pissa", "olora", "eva", "lora_ga", "lora_ga_stable")
    },
    "loftq (nf4)": Arm("lora", {**LORA, "init_lora_weights": "loftq"}, 4e-3, quantize="nf4"),
    # The optimisers of LoRA r=4.
    "LoRA+": Arm("lora", LORA, 2e-3, optimizer="loraplus"),
    "LoRA-FA": Arm("lora", LORA, 8e-3, optimizer="lorafa"),
    "Riemannian": Arm("lora", LORA, 8e-3, optimizer="riemannian"),
}
GROUPS = {"relatives": "LoHa", "starts": "orthogonal", "optimisers": "LoRA+"}  # their first arms

# The files of each method: minilora's in minilora/lora/, and PEFT's folders in peft/tuners/.
LINES = {
    "LoRA r=4": (("lora.py",), ("lora",)),
    "AdaLoRA": (("adalora.py", "allocator.py"), ("adalora",)),
    "LoHa": (("maps/loha.py",), ("loha",)),
    "LoKr": (("maps/lokr.py",), ("lokr",)),
    "HiRA": (("maps/hira.py",), ("hira",)),
    "VeRA": (("maps/vera.py", "maps/streams.py"), ("vera",)),
    "OFT": (("maps/oft.py",), ("oft",)),
    "IA3": (("maps/ia3.py",), ("ia3",)),
    "FourierFT": (("maps/fourierft.py",), ("fourierft",)),
    "MiSS": (("maps/miss.py",), ("miss",)),
    "Uni-LoRA": (("maps/scattered.py",), ("unilora",)),
}

Runs = dict[str, dict[str, dict[str, Any]]]  # arm -> "exponent of 2,seed" -> the measured run


# ---- one run -------------------------------------------------------------------------------------


def pretrain(folder: Path, threads: int | None = None) -> None:
    """Write the demo's base, of seed 0, into `folder`, unless it is there already."""
    if (folder / "config.json").exists():
        return
    plan = Plan()
    text = ByteTokenizer().encode(split(prose())[0])
    model = CausalLM(plan.model, seed=0)
    settings = dataclasses.replace(plan.pretrain, threads=threads)
    train(model, text, settings, folder, title="pretrain")
    model.save_pretrained(folder)


@functools.cache
def texts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the ids for training, for choosing the rate, for reporting)."""
    to_train, held_out = (ByteTokenizer().encode(text) for text in split(python_sources()))
    middle = len(held_out) // 2
    return to_train, held_out[:middle], held_out[middle:]


def measure(job: tuple[str, str, float, int]) -> dict[str, Any]:
    """The run of one arm: bits per byte of both halves, inf if it diverges; parameters, seconds.

    job   (the folder of the base, the name of the arm, the learning rate, the seed)
    """
    base, name, lr, seed = job
    arm = ARMS[name]
    to_train, *halves = texts()
    settings = dataclasses.replace(SETTINGS, lr=lr, seed=seed, optimizer=arm.optimizer)
    model: Any = CausalLM.from_pretrained(base)
    run: dict[str, Any] = {"lr": lr}
    config = adapter_config(arm.method, arm.quantize, arm.fields, settings.steps)
    options: dict[str, Any] = {}
    if arm.fields.get("init_lora_weights") == "loftq":
        options["quantize"] = arm.quantize
    elif arm.quantize != "none":
        quantize(model, arm.quantize)
        run["memory"] = measure_weight_memory(model)
    if config is not None:
        windows = np.lib.stride_tricks.sliding_window_view(to_train, settings.context + 1)
        rows = np.random.default_rng(seed).integers(0, len(windows), (8, settings.batch_size))
        options["data"] = [windows[row] for row in rows]
        model = get_peft_model(model, config, seed=seed, **options)
    run["trained"] = sum(p.size for p in model.parameters() if p.requires_grad)
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(model, to_train, settings, Path(folder), title=f"{name} {lr:.1e} {seed}")
        bits = [
            bits_per_byte(evaluate(model, half, 128, limit=WINDOWS, threads=1)) for half in halves
        ]
    except MiniloraError:  # DivergenceError or NonFiniteError
        bits = [math.inf, math.inf]
    run["tune"], run["report"] = (round(value, 5) for value in bits)
    return run


# ---- which runs an arm needs ---------------------------------------------------------------------


def read_runs(runs: Mapping[str, dict[str, Any]]) -> dict[int, dict[int, dict[str, Any]]]:
    """The runs of one arm: exponent -> seed -> run."""
    table: dict[int, dict[int, dict[str, Any]]] = {}
    for key, run in runs.items():
        exponent, seed = map(int, key.split(","))
        table.setdefault(exponent, {})[seed] = run
    return table


def missing_runs(runs: Mapping[str, dict[str, Any]]) -> list[tuple[int, int]]:
    """The pairs (exponent, seed) to measure next; [] if the arm is complete."""
    table = read_runs(runs)
    first = {k: row[0]["tune"] for k, row in table.items() if 0 in row}
    wanted = [(k, 0) for k in (-1, 0, 1) if k not in first]
    if wanted:
        return wanted
    outward = _outward(first)
    if outward is not None:
        return [(outward, 0)]
    best = min(first, key=lambda k: (first[k], k))
    near = [(k, seed) for k in (best - 1, best, best + 1) if k in first for seed in SEEDS]
    wanted = [(k, seed) for k, seed in near if seed not in table[k]]
    if wanted:
        return wanted
    outward = _outward(mean_tuned(table))
    if outward is None:
        return []
    return [(outward, seed) for seed in SEEDS if seed not in table.get(outward, {})]


def mean_tuned(table: Mapping[int, Mapping[int, dict[str, Any]]]) -> dict[int, float]:
    """exponent -> mean bits per byte of the tuning half, for rates with runs of all seeds."""
    return {
        k: statistics.fmean(row[seed]["tune"] for seed in SEEDS)
        for k, row in table.items()
        if all(seed in row for seed in SEEDS)
    }


def _outward(losses: Mapping[int, float]) -> int | None:
    """The next exponent beyond the best one, if that is at an end; otherwise None."""
    best = min(losses, key=lambda k: (losses[k], k))
    if best == min(losses) and best > -WIDEST:
        return best - 1
    if best == max(losses) and best < WIDEST:
        return best + 1
    return None


# ---- results -------------------------------------------------------------------------------------


def summarize(runs: Runs) -> dict[str, dict[str, Any]]:
    """By arm, if complete: its best rate, bits per byte, and the comparison with REFERENCE."""
    chosen = {}
    for name, its_runs in runs.items():
        if name in ARMS and its_runs and not missing_runs(its_runs):
            table = read_runs(its_runs)
            means = mean_tuned(table)
            chosen[name] = table[min(means, key=lambda k: (means[k], k))]
    rows = {}
    for name, row in chosen.items():
        bits = [row[seed]["report"] for seed in SEEDS]
        rows[name] = {
            "trained": row[0]["trained"],
            "lr": row[0]["lr"],
            "bits_per_byte": round(statistics.fmean(bits), 4),
            "seeds": bits,
        }
        if REFERENCE in chosen and name != REFERENCE:
            differences = [row[s]["report"] - chosen[REFERENCE][s]["report"] for s in SEEDS]
            d, half = statistics.fmean(differences), T_95 * statistics.stdev(differences)
            rows[name] |= {
                "difference": round(d, 4),
                "interval": [round(d - half, 4), round(d + half, 4)],
                "verdict": verdict(d - half, d + half),
            }
    return rows


def verdict(low: float, high: float) -> str:
    """The verdict on an interval of differences: see the module's docstring."""
    if high < -MARGIN:
        return "better"
    if low > MARGIN:
        return "worse"
    return "level" if low >= -MARGIN and high <= MARGIN else "cannot tell"


def conditions(runs: Runs, rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The conditions of the module's docstring, each with its measurement."""
    coded = "QLoRA (nf4)"
    if coded not in rows or REFERENCE not in rows:
        return {}
    memory = next(iter(runs[coded].values()))["memory"]
    limits = {
        "nf4 base, bits per byte above LoRA": (rows[coded]["difference"], LARGEST_GAP),
        "quantised layers, per cent of float32": (memory["percent"], LAYERS_PERCENT),
        "all frozen weights, per cent of float32": (memory["all_percent"], FROZEN_PERCENT),
    }
    return {
        name: {"measured": round(measured, 4), "at_most": limit, "ok": measured <= limit}
        for name, (measured, limit) in limits.items()
    }


def count_lines() -> dict[str, dict[str, int]]:
    """The number of lines of each method's files; PEFT's only if it is installed."""
    folder = Path(minilora.lora.__file__).parent
    spec = importlib.util.find_spec("peft")
    counts = {}
    for name, (files, folders) in LINES.items():
        counts[name] = {"ours": sum(map(_lines, (folder / file for file in files)))}
        if spec is not None and spec.origin:
            tuners = Path(spec.origin).parent / "tuners"
            theirs = [path for folder in folders for path in (tuners / folder).glob("*.py")]
            counts[name]["peft"] = sum(map(_lines, theirs))
    return counts


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


OFFSETS = {  # of the names in the picture, in points, where they would lie on each other
    "VeRA": (-24, -10),
    "LoKr": (-14, 7),
    "Uni-LoRA": (-2, 8),
    "intrinsic": (-14, -14),
    "FourierFT": (-2, -15),
    "LoHa": (7, 2),
    "HiRA": (-26, -4),
    "MiSS": (7, -3),
    "OFT": (-10, 7),
}
COLORS = {"better": "#2a6f97", "worse": "#c8553d", "level": "#222222", "cannot tell": "#999999"}


def draw(rows: Mapping[str, dict[str, Any]], before: float) -> None:
    """Bits per byte against trained numbers, and each arm's difference from REFERENCE."""
    from minilora.lab.plots import INK, WARM, styled_pyplot

    plt = styled_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 5), constrained_layout=True)
    loras = sorted((row for name, row in rows.items() if "LoRA r=" in name), key=_trained)
    x, y = ([row[key] for row in loras] for key in ("trained", "bits_per_byte"))
    left.plot(x, y, "-s", color=INK, label="LoRA, r = 1, 4, 16")
    names = list(rows)
    first, last = names.index("LoHa"), names.index("intrinsic")
    for name in [*names[first : last + 1], "all weights"]:
        point = rows[name]["trained"], rows[name]["bits_per_byte"]
        left.plot(*point, "o", color=WARM, markersize=5)
        shift = OFFSETS.get(name, (6, 3) if name != "all weights" else (-30, 7))
        left.annotate(name, point, textcoords="offset points", xytext=shift, fontsize=8)
    left.set_xscale("log")
    left.set_xlabel("trained numbers")
    left.set_ylabel("bits per byte of held-out code")
    left.set_title(f"LoRA and its relatives (the base has {before:.2f} bits)")
    left.legend(loc="upper right")
    compared = [name for name in names if "difference" in rows[name]]
    right.axvspan(-MARGIN, MARGIN, color="#eeeeee")
    right.axvline(0, color=INK, linewidth=0.8)
    for place, name in enumerate(compared):
        row = rows[name]
        color = COLORS[row["verdict"]]
        right.plot(row["interval"], [place, place], color=color, linewidth=2)
        right.plot(row["difference"], place, "o", color=color, markersize=4)
    for word, color in COLORS.items():
        right.plot([], [], "-o", color=color, markersize=4, label=word)
    right.set_yticks(range(len(compared)), compared, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("bits per byte above LoRA r = 4, and 95 % interval")
    right.set_title("Paired by seed; grey: the margin")
    right.legend(loc="lower right")
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def _trained(row: Mapping[str, Any]) -> int:
    return int(row["trained"])


def print_table(result: Mapping[str, Any]) -> None:
    """Print the rows of the table in benchmarks/README.md."""
    lines = result["lines"]
    for name, row in result["summary"].items():
        compared = ""
        if "difference" in row:
            low, high = row["interval"]
            compared = f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] | {row['verdict']}"
        count = lines.get(name, {})
        print(
            f"| {name} | {row['trained']:,} | {row['lr']:.1e} | {row['bits_per_byte']:.3f} | "
            f"{compared or '|'} | {count.get('ours', '')} | {count.get('peft', '')} |"
        )


def measure_missing(
    base: Path, names: Sequence[str], processes: int, runs: Runs, save: Callable[[], None]
) -> None:
    """Add to `runs` what the named arms need, until they are complete; `save` follows each run."""
    while True:
        jobs = {}
        for name in names:
            for k, seed in missing_runs(runs.setdefault(name, {})):
                jobs[str(base), name, ARMS[name].lr * 2.0**k, seed] = f"{k},{seed}"
        if not jobs:
            return
        with open_pool("processes", processes) as pool:
            for job, future in completed(pool, measure, jobs):
                runs[job[1]][jobs[job]] = future.result()
                print(job[1], jobs[job], future.result(), flush=True)
                save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="folder of the base; made if it is missing")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    names = args.arms.split(",")
    result: dict[str, Any] = {"command": "python benchmarks/family.py --write", "runs": {}}
    if args.write and RESULT.exists():
        stored = json.loads(RESULT.read_text())
        same = stored.get("numpy") == np.__version__ and "summary" in stored
        result = stored if same else result
    result |= {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }

    def save() -> None:
        if args.write:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        base = args.base or Path(scratch, "base")
        pretrain(base)
        if "before" not in result:
            half = texts()[2]
            loss = evaluate(CausalLM.from_pretrained(base), half, 128, limit=WINDOWS)
            result["before"] = round(bits_per_byte(loss), 4)
        measure_missing(base, names, args.jobs, result["runs"], save)
    rows = summarize(result["runs"])
    result["summary"] = {name: rows[name] for name in ARMS if name in rows}
    result["conditions"] = conditions(result["runs"], rows)
    lines = count_lines()
    for name, count in result.get("lines", {}).items():
        lines[name] = {**count, **lines[name]}
    result["lines"] = lines
    print_table(result)
    print(json.dumps(result["conditions"], indent=2))
    save()
    if args.write:
        draw(result["summary"], result["before"])
    return 0 if all(condition["ok"] for condition in result["conditions"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
