"""Count the lines of each method's files here and in peft.

    python benchmarks/lines.py [--write]

Comments and docstrings count. peft's folder of LoRA also has its starts, its quantized layers and
its variants. `--write` stores the counts in benchmarks/results/lines.json. peft must be installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Iterable
from pathlib import Path

import minilora.lora

RESULT = Path(__file__).parent / "results" / "lines.json"
FOLDER = Path(minilora.lora.__file__).parent
# Method: (the files in minilora/lora/, the folder in peft/tuners/).
METHODS = {
    "LoRA": (("lora.py",), "lora"),
    "AdaLoRA": (("adalora.py", "allocator.py"), "adalora"),
    "LoHa": (("maps/loha.py",), "loha"),
    "LoKr": (("maps/lokr.py",), "lokr"),
    "HiRA": (("maps/hira.py",), "hira"),
    "VeRA": (("maps/vera.py", "maps/streams.py"), "vera"),
    "OFT": (("maps/oft.py",), "oft"),
    "IA3": (("maps/ia3.py",), "ia3"),
    "FourierFT": (("maps/fourierft.py",), "fourierft"),
    "MiSS": (("maps/miss.py",), "miss"),
    "Uni-LoRA": (("maps/scattered.py",), "unilora"),
}


def count_lines(files: Iterable[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        parser.error("peft is not installed: python -m pip install peft")
    tuners = Path(spec.origin).parent / "tuners"
    counts = {}
    for name, (files, folder) in METHODS.items():
        ours = count_lines(FOLDER / file for file in files)
        theirs = count_lines((tuners / folder).glob("*.py"))
        counts[name] = {"minilora": ours, "peft": theirs}
        print(f"| {name} | {ours} | {theirs:,} |")
    result = {
        "command": "python benchmarks/lines.py --write",
        "date": time.strftime("%Y-%m-%d"),
        "peft": importlib.metadata.version("peft"),
        "lines": counts,
    }
    if args.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
