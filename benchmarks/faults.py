"""Kill runs at random moments of a save: the newest checkpoint must be sound, the end the same.

    python benchmarks/faults.py [--kills 50] [--seed 0] [--write]

A warm parent forks a run, waits for the beginning of one of its saves, sleeps for a random part of
a save's duration, and kills the run with SIGKILL. Then it searches for the newest checkpoint,
resumes from it, and compares the SHA-256 of the last checkpoint (losses, adapter, optimiser) and of
the log with those of a run that was not killed. It does the same to a naive writer, which must
fail: a test that does not notice a bad writer proves nothing about a good one. Exit code 1 if a
killed run of minilora loses its checkpoint or ends differently, or if the naive writer loses fewer
than a fifth of its checkpoints. `--write` stores the result in benchmarks/results/faults.json.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

import minilora.formats.disk
import minilora.formats.safetensors
import minilora.training.run
from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.errors import CheckpointError
from minilora.training.checkpoints import MANIFEST, find_checkpoint, save_checkpoint
from minilora.training.loop import Settings, train

RESULT = Path(__file__).parent / "results" / "faults.json"
STEPS = 5
SETTINGS = Settings(
    steps=STEPS, batch_size=1, context=16, lr=1e-2, warmup=2, threads=1, save_every=1
)
SHAPE = TransformerConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
)
# 2 MB, and 4 MB of the optimiser's moments
ADAPTER = LoraConfig(r=64, lora_alpha=64, lora_dropout=0.1, target_modules="all-linear")
TEXT = np.random.default_rng(0).integers(0, 256, 4_000).astype(np.int32)


def new_model(seed=0):
    return get_peft_model(CausalLM(SHAPE, seed=0), ADAPTER, seed=seed)


def naive_save(out, step, state, write):
    """Save without care: file by file, under the final names, nothing forced to the disk."""
    folder = out / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    write(folder)
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            entry = {"size": path.stat().st_size, "sha256": digest(path.read_bytes())}
            entries[path.relative_to(folder).as_posix()] = entry
    (folder / MANIFEST).write_text(json.dumps({"step": step, "state": state, "files": entries}))
    return folder


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def end_of(out: Path) -> str:
    """One SHA-256 of the last checkpoint, whose manifest has the losses, and of the log.

    The seconds in the log are left out.
    """
    last = out / "checkpoints" / f"step-{STEPS}"
    records = []
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("seconds", None)
        records.append(record)
    digests = []
    for path in last.rglob("*"):
        if path.is_file():
            digests.append((path.relative_to(last).as_posix(), digest(path.read_bytes())))
    return digest(repr(sorted(digests)).encode() + repr(records).encode())


def start(out: Path, save, model) -> tuple[int, int]:
    """Run in a forked child: (its process, a pipe).

    The pipe gets the byte b at the beginning of each save and the byte e at its end.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # BLAS has threads; it starts new ones in the child.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        os.close(writer)
        return child, reader

    def reporting_save(*arguments):
        os.write(writer, b"b")
        folder = save(*arguments)
        os.write(writer, b"e")
        return folder

    code = 1
    try:
        minilora.training.run.save_checkpoint = reporting_save
        if save is naive_save:
            for module in (minilora.formats.disk, minilora.formats.safetensors):
                module.atomic_file = lambda path: open(path, "wb")  # noqa: SIM115
        train(model, TEXT, SETTINGS, out)
        code = 0
    finally:
        os._exit(code)


def kill_while_saving(out: Path, save, model, which: int, wait: float) -> bool:
    """Kill a run `wait` seconds after its save number `which` began.

    True if it was saving when it died.
    """
    child, reader = start(out, save, model)
    try:
        while which:
            byte = os.read(reader, 1)
            assert byte, "the run ended before its kill"
            which -= byte == b"b"
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return not os.read(reader, 100).endswith(b"e")
    finally:
        os.close(reader)


def newest(out: Path) -> Path | None:
    """The newest checkpoint; None if it is damaged, even if an older one is sound."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return find_checkpoint("auto", out)[0]
        except (CheckpointError, UserWarning):
            return None


def duration_of_a_save(work: Path, save, model) -> float:
    """The median in seconds over one run that is not killed."""
    child, reader = start(work / "length", save, model)
    moments = []
    while os.read(reader, 1):
        moments.append(time.perf_counter())
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    shutil.rmtree(work / "length")
    durations = [end - begin for begin, end in zip(moments[::2], moments[1::2], strict=True)]
    return statistics.median(durations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    begun = time.perf_counter()
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        work, model = Path(folder), new_model()
        train(new_model(), TEXT, SETTINGS, work / "straight")
        expected = end_of(work / "straight")
        last = work / "straight" / "checkpoints" / f"step-{STEPS}"
        size = sum(path.stat().st_size for path in last.iterdir())
        for name, save in (("minilora", save_checkpoint), ("naive", naive_save)):
            duration = duration_of_a_save(work, save, model)
            count = {
                "save_ms": round(1000 * duration, 1),
                "kills": args.kills,
                "while_saving": 0,
                "temporaries_left": 0,
                "newest_sound": 0,
                "resumed_bit_identical": 0,
            }
            for number in range(args.kills):
                out = work / f"{name}-{number}"
                which = int(rng.integers(2, STEPS))
                wait = rng.uniform(0, 1.1) * duration
                count["while_saving"] += kill_while_saving(out, save, model, which, wait)
                count["temporaries_left"] += any(".tmp-" in p.name for p in out.rglob("*"))
                sound = newest(out)
                count["newest_sound"] += sound is not None
                if save is save_checkpoint and sound is not None:
                    train(new_model(seed=1), TEXT, SETTINGS, out, resume="auto")
                    names = [path.name for path in out.rglob("*")]
                    clean = ".lock" not in names and not any(".tmp-" in name for name in names)
                    count["resumed_bit_identical"] += clean and end_of(out) == expected
                shutil.rmtree(out)
            counts[name] = count
            values = ", ".join(f"{key} {value}" for key, value in count.items())
            print(f"{name:9} {values}", flush=True)
    del counts["naive"]["resumed_bit_identical"]
    result = {
        "command": "python benchmarks/faults.py --write",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "checkpoint_bytes": size,
        "seconds": round(time.perf_counter() - begun, 1),
        **counts,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    ours = counts["minilora"]
    naive = counts["naive"]
    good = ours["newest_sound"] == ours["resumed_bit_identical"] == args.kills
    seen = naive["kills"] - naive["newest_sound"] >= args.kills / 5
    verdict = "all conditions hold" if good and seen else "A CONDITION DOES NOT HOLD"
    print(f"{verdict}, in {result['seconds']} s")
    return 0 if good and seen else 1


if __name__ == "__main__":
    sys.exit(main())
