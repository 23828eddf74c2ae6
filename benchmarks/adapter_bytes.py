"""Check that training still writes adapters with the bytes that it wrote before.

    python benchmarks/adapter_bytes.py [--write]

In a temporary folder it runs `demo --quick --seed 0`, then `finetune` over the demo's base with
LoRA, DoRA, AdaLoRA and LoRA over an NF4 base: 60 steps each, all linear layers. It prints the
SHA-256 of each adapter_model.safetensors beside the expected one; exit code 1 if one differs. The
bytes depend on the processor and on the BLAS that NumPy uses, so the expected values hold for the
machine in the results file. --write stores both in benchmarks/results/adapter-bytes.json. Under a
minute on two idle cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "adapter-bytes.json"
# Adapter -> further options of finetune.
RUNS = {
    "lora": [],
    "dora": ["--method", "dora"],
    "adalora": ["--method", "adalora"],
    "nf4": ["--quantize", "nf4"],
}
# The demo's was written by the flat package, before its files moved into folders. The others have
# four shards a step: written since the sum over shards is a tree, with the flat package's bytes
# until then.
EXPECTED = {
    "demo/adapter": "ed4744d2dafb4c383b238c595c0c8f1266dde5eb5f708e3e4d1a8f1b3abf2630",
    "lora": "2731799c150f30c012255f85df9ba97219c3413251dad078af00e6694f262fa4",
    "dora": "f278a509856010928fe662a4fb28a6aa1a3cec5d741fb141ee5d246c3bf00a90",
    "adalora": "91e3145935bf4abfaa0b50dc68d4a4bc2a55f4bfbcaee99c77c909e7299a8e0e",
    "nf4": "b74cf018e59b34f41280b10b6fa6e0dec8500aac6afbe211451ef65e9fd53732",
}


def run(*arguments: object) -> None:
    """Run a command of minilora; its errors appear on stderr."""
    command = [sys.executable, "-m", "minilora", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def train_adapters(folder: Path) -> None:
    """Write the adapters of EXPECTED below `folder`."""
    run("demo", "--quick", "--seed", 0, "--out", folder / "demo")
    text = folder / "text.txt"
    lines = [f"line {i}: {i * i} is the square of {i}\n" for i in range(3000)]
    text.write_text("".join(lines))
    files = ["--base", folder / "demo" / "base", "--data", text]
    settings = ["--steps", 60, "--target-modules", "all-linear"]
    for name, options in RUNS.items():
        run("finetune", *files, "--out", folder / name, *settings, *options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    adapters = {}
    with tempfile.TemporaryDirectory() as scratch:
        train_adapters(Path(scratch))
        for name, expected in EXPECTED.items():
            content = Path(scratch, name, "adapter_model.safetensors").read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            adapters[name] = {"sha256": digest, "expected": expected, "equal": digest == expected}
            verdict = "as expected" if digest == expected else f"expected {expected}"
            print(f"{name:12} {digest}   {verdict}")
    if args.write:
        result = {
            "command": "python benchmarks/adapter_bytes.py --write",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "numpy": np.__version__,
            "adapters": adapters,
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(adapter["equal"] for adapter in adapters.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
