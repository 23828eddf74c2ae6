"""Measure `minilora plan`: the predicted peak beside the measured one, over 20 configurations.

    python benchmarks/plan.py [--only NUMBER ...] [--scratch DIR] [--write]

Each configuration is a command `minilora plan ... --measure --json` in a process of its own:
methods, quantization, checkpointing, tasks, contexts from 64 to 2,048, and a GPT-2. The models have
random weights. One condition is checked; exit code 1 if it does not hold:

    peak     the prediction is within 10 % of the peak of the process that takes two steps

Seconds are shown and not checked: they depend on what else the machine does. `--write` stores the
numbers in benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minilora import CausalLM, TransformerConfig

RESULT = Path(__file__).parent / "results" / "plan.json"
MOST = 0.1  # of the measured peak
MIB = 1 << 20
SHAPES = {
    "small": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "middle": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    },
    "grouped": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "model_type": "gpt2",
        "hidden_act": "gelu_new",
    },
}
CONFIGURATIONS = (
    "--base small",
    "--base small --context 64 --batch-size 64 --accumulate 2",
    "--base small --context 1024 --batch-size 2",
    "--base small --context 2048 --batch-size 2 --gradient-checkpointing",
    "--base small --context 700 --batch-size 3 --method full --threads 1",
    "--base small --method dora --target-modules all-linear",
    "--base small --method adalora --target-modules all-linear",
    "--base small --method loha",
    "--base small --method vera --target-modules all-linear",
    "--base small --tasks text.txt other.txt",
    "--base middle --batch-size 8",
    "--base middle --batch-size 8 --method full",
    "--base middle --batch-size 8 --method full --gradient-checkpointing --keep best",
    "--base middle --batch-size 8 --quantize nf4",
    "--base middle --batch-size 8 --quantize int8 --compute bfloat16",
    "--base middle --batch-size 4 --quantize nf4 --gradient-checkpointing",
    "--base middle --batch-size 8 --lora-dropout 0.1 --target-modules all-linear",
    "--base middle --batch-size 4 --context 64 --init-lora-weights pissa",
    "--base grouped --batch-size 8 --context 256 --target-modules all-linear --r 64",
    "--base gpt2 --batch-size 8 --context 512",
)


def make(folder: Path) -> None:
    """Models with random weights, and texts."""
    for name, shape in SHAPES.items():
        config = TransformerConfig(**shape, max_position_embeddings=2048)
        CausalLM(config).save_pretrained(folder / name)
    text = "".join(f"Line {i} of a text, {i * i} characters from its end.\n" for i in range(2000))
    for name in ("text.txt", "other.txt"):
        (folder / name).write_text(text)


def measure(options: str, folder: Path) -> dict[str, Any]:
    """The report of `minilora plan` for one configuration."""
    data = [] if "--tasks" in options else ["--data", "text.txt"]
    command = [sys.executable, "-m", "minilora", "plan", *shlex.split(options), *data]
    ended = subprocess.run(
        [*command, "--measure", "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"{options}: {ended.stderr}")
    report = json.loads(ended.stdout)
    measured = report["measured"]
    return {
        "options": options,
        "phase": report["phase"],
        "predicted MiB": round(report["peak"] / MIB, 1),
        "measured MiB": round(measured["peak"] / MIB, 1),
        "off": round(report["peak"] / measured["peak"] - 1, 4),
        "predicted seconds": round(report["seconds_per_step"], 3),
        "measured seconds": round(measured["seconds"], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=int, nargs="+", help="configurations by number, from 1")
    parser.add_argument("--scratch", type=Path, help="where the models are made")
    parser.add_argument("--write", action="store_true", help=f"store the numbers in {RESULT.name}")
    args = parser.parse_args()
    numbers = args.only or range(1, len(CONFIGURATIONS) + 1)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        make(Path(scratch))
        for number in numbers:
            row = measure(CONFIGURATIONS[number - 1], Path(scratch))
            rows.append(row)
            sizes = f"{row['predicted MiB']:8.1f} MiB, measured {row['measured MiB']:8.1f}"
            print(f"{number:2} {row['off']:+7.1%} {sizes}  {row['options']}", flush=True)
    worst = max(abs(row["off"]) for row in rows)
    print(f"largest error: {worst:.1%} of the measured peak, at most {MOST:.0%} is promised")
    if args.write:
        RESULT.write_text(json.dumps({"largest error": worst, "rows": rows}, indent=1) + "\n")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
