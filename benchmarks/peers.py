"""A training step of minilora beside PyTorch + peft and JAX: the same weights, batches and optimiser, in turn.

    python benchmarks/peers.py [--sizes micro,tiny,small,gpt2,long] [--methods lora,family,recomputed,full,generate]
                               [--contenders minilora,torch,torch-compile,transformers,jax]
                               [--rounds 5] [--steps N] [--threads 2] [--write]

Every contender is a process of its own that waits between its turns; a turn is one step that does not count (the
others have had the caches) and `--steps` that do, by default about a second's worth. The figure is the median over all
turns; the ratio is the median of the ratios turn by turn, so that a machine whose speed drifts does not decide. The
losses of all must agree to 1e-4. A contender that is not installed is left out and named. `--write` keeps the result
in benchmarks/results/cpu-peers.json, in place of what was measured there before: 25 minutes. Two minutes:
--sizes micro,tiny --contenders minilora,torch,transformers --methods lora --rounds 3.

`long` is one sequence of 1,024 tokens through the size gpt2; `family` has DoRA and
AdaLoRA (penalty and allocation in every step) beside LoRA, and peft's DoRA beside peft's LoRA; `recomputed` is
minilora's LoRA step with gradient checkpointing, for its memory. The method `generate` is greedy decoding by the
plain base, minilora's beside transformers' own: a step is one call, which appends 96 tokens to one prompt of 32, in
size small also to 16, and the tokens must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULT = HERE / "results" / "cpu-peers.json"
SIZES = {  # Llama-shaped: layers, width, MLP width, heads, vocabulary, batch, context
    "micro": (2, 64, 192, 2, 32, 16, 64),
    "tiny": (4, 128, 384, 4, 256, 16, 128),
    "small": (6, 384, 1024, 6, 256, 8, 256),
    "gpt2": (12, 768, 2048, 12, 50257, 2, 256),
    "long": (12, 768, 2048, 12, 50257, 1, 1024),
}
METHODS = ["lora", "family", "recomputed", "full", "generate"]
FAMILY = {
    "minilora": "minilora",
    "torch": "minilora",
    "minilora-dora": "minilora-dora",
    "torch-dora": "minilora-dora",
    "minilora-adalora": "minilora-adalora",
}  # whose losses must agree with whose
STEPS = {"micro": 30, "tiny": 8, "small": 2}  # a turn; elsewhere one
PEERS = ("torch", "torch-compile", "transformers", "jax")
PACKAGES = {
    "torch": "torch",
    "torch-compile": "torch",
    "transformers": "transformers",
    "jax": "jax",
}
LEFT_OUT = {  # JAX has no tied heads or DoRA here; torch.compile takes minutes for nothing: it gains little with LoRA
    ("jax", "full"), ("torch-compile", "full"), *((peer, "recomputed") for peer in PEERS),
    *((peer, "generate") for peer in ("torch", "torch-compile", "jax")),
}  # fmt: skip
AGREE = 1e-4  # losses, at most this far apart
SAME = 0.99  # of the tokens, at least: two likeliest tokens may be closer to each other than float32 can say
PROMPTS = {"tiny": (1,), "small": (1, 16)}  # generation's batch sizes
PROMPT, NEW = 32, 96  # tokens, as far as the context reaches
PAUSE = 0.5  # seconds before a turn: the others' worker threads spin for a while after their work, and take a core


def prepare(work: Path, shape: tuple[int, ...], method: str, r: int = 8, count: int = 8) -> None:
    """Write the base, an adapter over all linear layers (alpha = 2 r), and `count` batches of random ids.

    A step of `generate` takes a batch of prompts, the others one of windows, whose last ids are targets only.
    """
    from minilora import AdaLoraConfig, CausalLM, LoraConfig, TransformerConfig, get_peft_model

    layers, C, M, heads, V, B, T = shape
    config = TransformerConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=max(T, 64),
    )  # fmt: skip
    model = CausalLM(config, seed=0)
    model.save_pretrained(work / "base")
    options: dict[str, Any] = {"lora_alpha": 2 * r, "target_modules": "all-linear"}
    kinds = {"adapter": LoraConfig(r=r, **options)}
    if method == "family":
        schedule = {
            "tinit": 1,
            "tfinal": 1,
            "deltaT": 1,
            "total_step": 1 << 20,
        }  # a step of the time in which ranks are cut
        kinds["dora"] = LoraConfig(r=r, use_dora=True, **options)
        kinds["adalora"] = AdaLoraConfig(init_r=r, target_r=r // 2, **schedule, **options)
    for name, kind in kinds.items():
        get_peft_model(model, kind).save_pretrained(work / name)
        model = CausalLM(config, seed=0)
    new = min(NEW, T - PROMPT)
    length, tokens = (PROMPT, new) if method == "generate" else (T + 1, T)
    np.save(work / "batches.npy", np.random.default_rng(0).integers(0, V, (count, B, length)))
    job = {
        "method": method,
        "scaling": 2.0,
        "tokens": B * tokens,
        "new": new,
        "weights": 4 * config.parameter_count(),
    }
    (work / "job.json").write_text(json.dumps(job))


# ---- the process of one contender ----------------------------------------------------------------------------------


def serve(name: str, work: Path, threads: int) -> None:
    """Answer each line "n" on stdin by n + 1 steps: a line of JSON with the seconds and faults of the last n."""
    begun = time.perf_counter()
    from contenders import CONTENDERS, GENERATORS

    method = json.loads((work / "job.json").read_text())["method"]
    contender = (GENERATORS if method == "generate" else CONTENDERS)[name](work, threads)
    results = [contender.step(0)]
    answer: dict[str, Any] = {"ready": time.perf_counter() - begun, "results": results}
    print(json.dumps(answer), flush=True)
    number = 1
    for line in sys.stdin:
        seconds, faults, results = [], [], []
        for _ in range(int(line) + 1):
            before, tick = page_faults(), time.perf_counter()
            results.append(contender.step(number))
            seconds.append(time.perf_counter() - tick)
            faults.append(page_faults() - before)
            number += 1
        counted = results[1:] if name == "floor" else seconds[1:]  # the floor measures itself
        answer = {
            "seconds": counted,
            "results": results,
            "peak": peak_memory(),
            "faults": faults[1:],
        }
        print(json.dumps(answer), flush=True)


def page_faults() -> int:
    """How often this process has touched memory that the system had to map first."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_memory() -> int:
    """Bytes: the largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would not do: it begins with the peak of the process that started this one
        return (
            next(
                int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line
            )
            * 1024
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


class Process:
    """A contender's process, and what it has answered so far."""

    def __init__(self, name: str, work: Path, threads: int, timeout: float):
        command = [
            sys.executable,
            __file__,
            "--serve",
            name,
            "--work",
            str(work),
            "--threads",
            str(threads),
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
        }
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": "cpu",
        }
        self.name, self.timeout = name, timeout
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.turns: list[list[float]] = []
        self.faults: list[int] = []
        self.peak = 0
        try:
            started = self._answer()
        except RuntimeError:
            self.__exit__()  # nobody else could
            raise
        self.ready = started["ready"]
        self.results: list[Any] = started[
            "results"
        ]  # of each step its loss, or the tokens that it generated

    def turn(self, steps: int) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{steps}\n")
        self.popen.stdin.flush()
        answer = self._answer()
        self.turns.append(answer["seconds"])
        self.faults += answer["faults"]
        self.results += answer["results"]
        self.peak = answer["peak"]

    def _answer(self) -> dict[str, Any]:
        import select

        assert self.popen.stdout is not None
        readable, _, _ = select.select([self.popen.stdout], [], [], self.timeout)
        line = self.popen.stdout.readline() if readable else ""
        if not line.startswith("{"):
            self.log.seek(0)
            reason = "took too long" if not readable else self.log.read().strip().splitlines()[-1:]
            raise RuntimeError(f"{self.name}: {reason}")
        return json.loads(line)  # type: ignore[no-any-return]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        with self.popen:  # closes its pipes, and waits
            self.popen.kill()
        self.log.close()


# ---- one size and method ---------------------------------------------------------------------------------------------


def compare(
    size: str, method: str, names: list[str], args: argparse.Namespace, prompts: int = 0
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        shape = SIZES[size] if not prompts else (*SIZES[size][:5], prompts, SIZES[size][6])
        prepare(work, shape, method)
        running: list[Process] = []
        left_out: dict[str, str] = {}
        for name in (
            names if method == "generate" else [*names, "floor"]
        ):  # the floor is a training step's
            try:
                running.append(stack.enter_context(Process(name, work, args.threads, args.timeout)))
            except RuntimeError as error:
                left_out[name] = str(error)[:300]
        for _ in range(args.rounds):
            for process in running:
                time.sleep(PAUSE)
                process.turn(args.steps or STEPS.get(size, 1))
        job = json.loads((work / "job.json").read_text())
    ours = next(p for p in running if p.name == "minilora")

    def like(name: str) -> Process:
        """Whose losses, or tokens, must be those of this contender."""
        return next(
            p for p in running if p.name == (FAMILY[name] if method == "family" else "minilora")
        )

    medians = {p.name: statistics.median(s for turn in p.turns for s in turn) for p in running}
    floor = medians.pop("floor", None)
    rows: dict[str, dict[str, Any]] = {}
    for p in running:
        if p.name not in medians:
            continue
        median = medians[p.name]
        ratios = [
            statistics.median(a) / statistics.median(b)
            for a, b in zip(p.turns, ours.turns, strict=True)
        ]
        rows[p.name] = {
            "milliseconds": round(1e3 * median, 3),
            "over_minilora": round(statistics.median(ratios), 3),
            **({"over_floor": round(median / floor, 3)} if floor else {}),
            "tokens_per_second": round(job["tokens"] / median),
            "peak_megabytes": round(p.peak / 1e6, 1),
            "over_weights_megabytes": round((p.peak - job["weights"]) / 1e6, 1),
            "faults_per_step": statistics.median(p.faults),
            "seconds_to_first_step": round(p.ready, 2),
            **(same_tokens if method == "generate" else same_losses)(
                f"{size} {method} {p.name}", p, like(p.name)
            ),
        }
    return (
        {"size": size, "method": method}
        | ({"prompts": prompts} if prompts else {})
        | ({"floor_milliseconds": round(1e3 * floor, 3)} if floor else {})
        | {"contenders": rows}
        | ({"left_out": left_out} if left_out else {})
    )


def same_losses(what: str, peer: Process, ours: Process) -> dict[str, float]:
    apart = float(np.max(np.abs(np.subtract(peer.results, ours.results))))
    if not apart <= AGREE:
        raise SystemExit(f"{what}: the losses differ by {apart}, so not the same thing is timed")
    return {"loss_difference": apart}


def same_tokens(what: str, peer: Process, ours: Process) -> dict[str, Any]:
    """The part of the tokens that agrees, and where the first difference is: (step, prompt, token)."""
    equal = np.equal(peer.results, ours.results)
    if not equal.mean() > SAME:
        raise SystemExit(
            f"{what}: {1 - equal.mean():.1%} of the tokens differ, so not the same thing is timed"
        )
    return {"tokens_equal": float(equal.mean())} | (
        {} if equal.all() else {"first_difference": np.argwhere(~equal)[0].tolist()}
    )


def show(result: dict[str, Any]) -> None:
    about = f"floor {result['floor_milliseconds']:.1f} ms" if "floor_milliseconds" in result else ""
    about = f"prompts: {result['prompts']}" if "prompts" in result else about
    print(f"\n{result['size']}, {result['method']}   ({about})")
    columns = f"{'ms':>9}{'/ ours':>8}{'/ floor':>9}{'tokens/s':>10}{'peak MB':>9}{'faults':>8}{'first step s':>14}"
    print(f"  {'':14}{columns}")
    for name, row in result["contenders"].items():
        floor = f"{row['over_floor']:9.2f}" if "over_floor" in row else f"{'':9}"
        print(
            f"  {name:14}{row['milliseconds']:9.1f}{row['over_minilora']:8.2f}{floor}{row['tokens_per_second']:10,}"
            f"{row['peak_megabytes']:9.0f}{row['faults_per_step']:8.0f}{row['seconds_to_first_step']:14.2f}"
        )
        if "first_difference" in row:
            where = row["first_difference"]
            print(
                f"  {'':14} {row['tokens_equal']:.2%} equal tokens, first difference (step, prompt, token) {where}"
            )
    for name, reason in result.get("left_out", {}).items():
        print(f"  {name:14} left out: {reason}")


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["size"], result["method"], result.get("prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="micro,tiny,small,gpt2,long")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--contenders", default=",".join(("minilora", *PEERS)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds that one answer may take"
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.work, args.threads)

    import importlib.util

    names = args.contenders.split(",")
    missing = [n for n in names if n in PACKAGES and importlib.util.find_spec(PACKAGES[n]) is None]
    for name in missing:
        print(f"{name} is left out: {PACKAGES[name]} is not installed")
    names = [n for n in names if n not in missing]
    results = []
    for size in args.sizes.split(","):
        for method in args.methods.split(","):
            if (method == "recomputed") > (size == "long") or (
                size == "long" and method in ("family", "full", "generate")
            ):
                continue
            for prompts in PROMPTS.get(size, ()) if method == "generate" else (0,):
                who = [n for n in names if (n, method) not in LEFT_OUT]
                if method == "family":
                    who = [n for n in FAMILY if n.partition("-")[0] in names]
                result = compare(size, method, who, args, prompts)
                show(result)
                results.append(result)
    if args.write:
        versions = {}
        for package in ("numpy", "torch", "peft", "transformers", "jax"):
            if importlib.util.find_spec(package):
                from importlib.metadata import version

                versions[package] = version(package)
        command = "python " + " ".join(["benchmarks/peers.py", *sys.argv[1:]])
        for result in results:
            result |= {"command": command, "date": time.strftime("%Y-%m-%d")}
        old = json.loads(RESULT.read_text())["results"] if RESULT.exists() else []
        new = {_key(result) for result in results}
        results = [result for result in old if _key(result) not in new] + results
        report = {
            "machine": f"{platform.machine()}, {args.threads} threads, Python {platform.python_version()}",
            "versions": versions,
            "results": sorted(
                results, key=lambda r: (list(SIZES).index(r["size"]), METHODS.index(r["method"]))
            ),
        }
        RESULT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
