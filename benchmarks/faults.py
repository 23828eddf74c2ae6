"""Runs killed while they save, at random moments: is the newest checkpoint sound, does it lead to the same end?

    python benchmarks/faults.py [--kills 50] [--seed 0] [--write]

A warm parent forks a run, waits for the beginning of one of its saves, sleeps a random part of a save's length, and
kills it with SIGKILL. Then it looks for the newest checkpoint, goes on from there, and compares the SHA-256 of the
last checkpoint (losses, adapter, optimiser) and of the log with those of a run that nobody killed. The same is done to
a naive writer, which must fail: a harness that cannot see a bad writer says nothing about a good one. Exit code 1 if
anything is not as it should be. `--write` keeps the result in benchmarks/results/faults.json.
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
import minilora.training.loop
from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.errors import CheckpointError
from minilora.training.loop import Settings, train
from minilora.training.runs import MANIFEST, find_checkpoint, save_checkpoint

RESULT = Path(__file__).parent / "results" / "faults.json"
STEPS = 5
SETTINGS = Settings(
    steps=STEPS, batch_size=1, context=16, lr=1e-2, warmup=2, threads=1, save_every=1
)
SHAPE = TransformerConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
)
ADAPTER = LoraConfig(
    r=64, lora_alpha=64, lora_dropout=0.1, target_modules="all-linear"
)  # 2 MB, and 4 MB of moments
TEXT = np.random.default_rng(0).integers(0, 256, 4_000).astype(np.int32)


def new_model(seed=0):
    return get_peft_model(CausalLM(SHAPE, seed=0), ADAPTER, seed=seed)


def naive_save(out, step, state, write):
    """What `save_checkpoint` would be without care: file by file, under the final names, nothing forced to the disk."""
    folder = out / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    write(folder)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    entries = {
        k: {"size": p.stat().st_size, "sha256": digest(p.read_bytes())} for k, p in files.items()
    }
    (folder / MANIFEST).write_text(json.dumps({"step": step, "state": state, "files": entries}))
    return folder


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def end_of(out: Path) -> str:
    """One sum of the last checkpoint, whose manifest has the losses, and of the log, without the time it took."""
    last = out / "checkpoints" / f"step-{STEPS}"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = repr([{k: v for k, v in line.items() if k != "seconds"} for line in log])
    contents = {
        p.relative_to(last).as_posix(): p.read_bytes() for p in last.rglob("*") if p.is_file()
    }
    return digest(
        repr([(name, digest(contents[name])) for name in sorted(contents)]).encode() + rows.encode()
    )


def start(out: Path, save, model) -> tuple[int, int]:
    """(process, a pipe that gets a byte at the beginning of every save and one at its end) of a run in a child."""
    begins, ours = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # BLAS has threads; it makes new ones in the child
        child = os.fork()
    if child:
        os.close(ours)
        return child, begins

    def told(*arguments):
        os.write(ours, b"b")
        folder = save(*arguments)
        os.write(ours, b"e")
        return folder

    code = 1
    try:
        minilora.training.loop.save_checkpoint = told
        if save is naive_save:
            for module in (minilora.formats.disk, minilora.formats.safetensors):
                module.atomic_file = lambda path: open(path, "wb")  # noqa: SIM115
        train(model, TEXT, SETTINGS, out)
        code = 0
    finally:
        os._exit(code)


def kill_while_saving(out: Path, save, model, which: int, wait: float) -> bool:
    """Kill a run `wait` seconds after its save number `which` began. Whether it was saving when it died."""
    child, begins = start(out, save, model)
    try:
        while which:
            byte = os.read(begins, 1)
            assert byte, "the run ended by itself"
            which -= byte == b"b"
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return not os.read(begins, 100).endswith(b"e")
    finally:
        os.close(begins)


def newest(out: Path) -> Path | None:
    """The newest checkpoint; None if it is damaged, though there may be a sound one before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return find_checkpoint("auto", out)[0]
        except (CheckpointError, UserWarning):
            return None


def length_of_a_save(work: Path, save, model) -> float:
    """The median, in seconds, over a run of its own."""
    child, begins = start(work / "length", save, model)
    moments = []
    while os.read(begins, 1):
        moments.append(time.perf_counter())
    os.close(begins)
    assert os.waitpid(child, 0)[1] == 0
    shutil.rmtree(work / "length")
    return statistics.median(
        end - begin for begin, end in zip(moments[::2], moments[1::2], strict=True)
    )


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
        size = sum(
            p.stat().st_size
            for p in (work / "straight" / "checkpoints" / f"step-{STEPS}").iterdir()
        )
        for name, save in (("minilora", save_checkpoint), ("naive", naive_save)):
            length = length_of_a_save(work, save, model)
            count = {"save_ms": round(1000 * length, 1), "kills": args.kills}
            count |= dict.fromkeys(
                ("while_saving", "temporaries_left", "newest_sound", "resumed_bit_identical"), 0
            )
            for number in range(args.kills):
                out = work / f"{name}-{number}"
                which, part = int(rng.integers(2, STEPS)), rng.uniform(0, 1.1)
                count["while_saving"] += kill_while_saving(out, save, model, which, part * length)
                count["temporaries_left"] += any(".tmp-" in p.name for p in out.rglob("*"))
                sound = newest(out)
                count["newest_sound"] += sound is not None
                if save is save_checkpoint and sound is not None:
                    train(new_model(seed=1), TEXT, SETTINGS, out, resume="auto")
                    clean = not [
                        p for p in out.rglob("*") if ".tmp-" in p.name or p.name in (".lock",)
                    ]
                    count["resumed_bit_identical"] += clean and end_of(out) == expected
                shutil.rmtree(out)
            counts[name] = count
            print(
                f"{name:9}", ", ".join(f"{key} {value}" for key, value in count.items()), flush=True
            )
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
    ours, naive = counts["minilora"], counts["naive"]
    good = ours["newest_sound"] == ours["resumed_bit_identical"] == args.kills
    seen = naive["kills"] - naive["newest_sound"] >= args.kills / 5
    print(
        f"{'as it should be' if good and seen else 'NOT AS IT SHOULD BE'}, in {result['seconds']} s"
    )
    return 0 if good and seen else 1


if __name__ == "__main__":
    sys.exit(main())
