"""Measure how long minilora's import takes beside `import numpy`, and what it imports.

    python benchmarks/import_time.py [--runs 20] [--write]

Fresh processes take turns, so that a busy machine slows both. The result has the median of each and
the median of the ratios of all pairs. `import minilora` alone imports nothing until a public name
is used: what counts is the import with that. `--write` stores the result in
benchmarks/results/import-time.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STATEMENT = "from minilora import Tensor"
RESULT = Path(__file__).parent / "results" / "import-time.json"


def processor_seconds(statement: str, cache: str) -> float:
    """The processor time of a fresh interpreter that runs `statement`.

    cache   folder for compiled modules: like an installed package, both are compiled before
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    runs = args.runs
    with tempfile.TemporaryDirectory() as cache:
        pairs = []
        for _ in range(runs + 1):
            numpy_seconds = processor_seconds("import numpy", cache)
            minilora_seconds = processor_seconds(STATEMENT, cache)
            pairs.append((numpy_seconds, minilora_seconds))
    del pairs[0]  # the first run compiles
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys; {STATEMENT}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    heavy = sorted({"cupy", "matplotlib", "torch", "scipy", "tqdm", "threadpoolctl"} & set(loaded))
    import numpy

    result = {
        "command": "python benchmarks/import_time.py --write",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "runs": runs,
        "import_numpy_seconds": round(statistics.median(a for a, _ in pairs), 4),
        "import_minilora_seconds": round(statistics.median(b for _, b in pairs), 4),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "optional_packages_imported": heavy,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
