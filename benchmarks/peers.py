"""Time a training step of minilora, PyTorch + peft and JAX on the same weights and batches.

    python benchmarks/peers.py [--sizes micro,tiny,small,gpt2,long,wide]
                               [--methods lora,family,maps,recomputed,full,generate]
                               [--contenders minilora,torch,torch-compile,transformers,jax]
                               [--starts 3] [--rounds 2] [--steps N] [--threads 2] [--write]

Every contender is a separate process that waits between its turns. A turn is one step that does not
count, because the other contenders have used the caches, and `--steps` steps that count (by default
about one second). After `--rounds` turns of each the processes end, and new ones take their place,
`--starts` times: now and then a process is slow for as long as it lives. The printed time is the
median over all turns. The ratio is the median of the ratios of each round, so that a machine whose
speed drifts does not decide. The losses of all contenders must agree to 1e-4. A contender that is
not installed is left out, with a message.

`--write` stores the results in benchmarks/results/cpu-peers.json, in place of earlier results for
the same sizes and methods. Everything takes 45 minutes. This takes two minutes:
--sizes micro,tiny --contenders minilora,torch,transformers --methods lora --starts 1.

Sizes: `long` is one sequence of 1,024 tokens through the size gpt2, `wide` one of 2,048 through 4
layers of width 1,024.

Methods: `lora` trains LoRA on all linear layers. `family` adds DoRA and AdaLoRA (with the penalty
and an allocation of ranks in every step), and peft's DoRA beside peft's LoRA. `maps` has minilora's
step of each method of lora/maps/ beside its LoRA step, in sizes tiny and small. `recomputed` is
minilora's LoRA step with gradient checkpointing, to measure its memory. `full` trains all weights.
`generate` is greedy decoding by the base alone, compared with transformers: a step is one call that
appends 96 tokens to a prompt of 32, in size small also to 16 prompts; the tokens must be equal.
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
    "wide": (4, 1024, 2736, 16, 256, 1, 2048),
}
METHODS = ["lora", "family", "maps", "recomputed", "full", "generate"]
# Contender -> the contender whose losses it must reproduce.
FAMILY = {
    "minilora": "minilora",
    "torch": "minilora",
    "minilora-dora": "minilora-dora",
    "torch-dora": "minilora-dora",
    "minilora-adalora": "minilora-adalora",
}
MAPS = {  # with their fields where the defaults do not fit layers of width 128 and 384
    "loha": {"r": 4},
    "lokr": {"r": 64, "decompose_factor": 8},
    "hira": {"r": 8},
    "vera": {"r": 256},
    "oft": {"oft_block_size": 32},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "fourierft": {"n_frequency": 1000, "init_weights": True},
    "miss": {"r": 8},
    "unilora": {"r": 8, "theta_d_length": 20_000},
    "intrinsic": {"theta_d_length": 20_000},
}
STEPS = {"micro": 30, "tiny": 8, "small": 2}  # per turn; other sizes take one
PEERS = ("torch", "torch-compile", "transformers", "jax")
PACKAGES = {
    "torch": "torch",
    "torch-compile": "torch",
    "transformers": "transformers",
    "jax": "jax",
}
# JAX has no tied heads here. torch.compile takes minutes to compile and gains little.
LEFT_OUT = {("jax", "full"), ("torch-compile", "full")}
LEFT_OUT |= {(peer, "recomputed") for peer in PEERS}
LEFT_OUT |= {(peer, "generate") for peer in ("torch", "torch-compile", "jax")}
AGREE = 1e-4  # largest difference of two losses
# Least share of equal tokens: the two likeliest tokens may differ by less than float32 resolves.
SAME = 0.99
PROMPTS = {"tiny": (1,), "small": (1, 16)}  # prompts per call of `generate`
PROMPT, NEW = 32, 96  # tokens; NEW is smaller where the context ends earlier
# Seconds before a turn: the other contenders' worker threads spin after their work and use a core.
PAUSE = 0.5


def prepare(work: Path, shape: tuple[int, ...], method: str, r: int = 8, count: int = 8) -> None:
    """Write the base, adapters over all linear layers (alpha = 2 r), and batches of random ids.

    shape   layers, width, MLP width, heads, vocabulary, batch, context
    count   of batches: prompts for `generate`, else windows of context + 1 ids
    """
    from minilora import AdaLoraConfig, CausalLM, LoraConfig, TransformerConfig, get_peft_model

    layers, C, M, heads, V, B, T = shape
    config = TransformerConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=M,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(T, 64),
    )
    model = CausalLM(config, seed=0)
    model.save_pretrained(work / "base")
    options: dict[str, Any] = {"lora_alpha": 2 * r, "target_modules": "all-linear"}
    kinds = {"adapter": LoraConfig(r=r, **options)}
    if method == "family":
        # Every measured step is in the period in which AdaLoRA allocates ranks.
        schedule = {"tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 1 << 20}
        kinds["dora"] = LoraConfig(r=r, use_dora=True, **options)
        kinds["adalora"] = AdaLoraConfig(init_r=r, target_r=r // 2, **schedule, **options)
    if method == "maps":
        from minilora.training.methods import MAPS_BY_METHOD

        for name, fields in MAPS.items():
            kinds[name] = MAPS_BY_METHOD[name](target_modules="all-linear", **fields)
    for name, kind in kinds.items():
        get_peft_model(model, kind).save_pretrained(work / name)
        model = CausalLM(config, seed=0)
    new = min(NEW, T - PROMPT)
    length = PROMPT if method == "generate" else T + 1
    tokens = new if method == "generate" else T
    batches = np.random.default_rng(0).integers(0, V, (count, B, length))
    np.save(work / "batches.npy", batches)
    job = {
        "method": method,
        "scaling": 2.0,
        "tokens": B * tokens,
        "new": new,
        "weights": 4 * config.parameter_count(),
    }
    (work / "job.json").write_text(json.dumps(job))


# ---- the process of one contender ----------------------------------------------------------------


def serve(name: str, work: Path, threads: int) -> None:
    """Answer each line "n" on stdin: take n + 1 steps and print one line of JSON.

    It has the seconds and page faults of the last n steps, and the results of all.
    """
    begun = time.perf_counter()
    from contenders import CONTENDERS, GENERATORS, MiniloraMap

    method = json.loads((work / "job.json").read_text())["method"]
    if method == "maps" and name not in CONTENDERS:
        contender = MiniloraMap(work, threads, name.removeprefix("minilora-"))
    else:
        contender = (GENERATORS if method == "generate" else CONTENDERS)[name](work, threads)
    results = [contender.step(0)]
    answer: dict[str, Any] = {"ready": time.perf_counter() - begun, "results": results}
    print(json.dumps(answer), flush=True)
    number = 1
    for line in sys.stdin:
        seconds = []
        faults = []
        results = []
        for _ in range(int(line) + 1):
            faults_before = page_faults()
            started = time.perf_counter()
            results.append(contender.step(number))
            seconds.append(time.perf_counter() - started)
            faults.append(page_faults() - faults_before)
            number += 1
        # The floor measures its time itself.
        counted = results[1:] if name == "floor" else seconds[1:]
        answer = {"seconds": counted, "results": results}
        answer |= {"peak": peak_memory(), "faults": faults[1:]}
        print(json.dumps(answer), flush=True)


def page_faults() -> int:
    """The number of times that this process used memory which the system had to map first."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux's ru_maxrss starts at the peak of the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Process:
    """A contender's process, with its answers so far.

    checkout   the copy of minilora whose benchmarks/peers.py and package the process runs; without
               it this file and the package that this process would import
    """

    def __init__(
        self, name: str, work: Path, threads: int, timeout: float, checkout: Path | None = None
    ):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": "cpu",
        }
        script = __file__
        if checkout is not None:
            script = str(checkout / "benchmarks" / "peers.py")
            environment["PYTHONPATH"] = str(checkout)
        command = [sys.executable, script, "--serve", name]
        command += ["--work", str(work), "--threads", str(threads)]
        self.name = name
        self.timeout = timeout
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - __exit__ closes it
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
            self.__exit__()  # the caller has no object to close
            raise
        self.ready = started["ready"]
        # The loss of each step, or the tokens that it generated.
        self.results: list[Any] = started["results"]

    def turn(self, steps: int) -> None:
        """Take one step that does not count and `steps` that do."""
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
            reason = f"no answer within {self.timeout:g} seconds"
            if readable:
                reason = "".join(self.log.read().strip().splitlines()[-1:])
            raise RuntimeError(f"{self.name}: {reason}")
        return json.loads(line)  # type: ignore[no-any-return]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        with self.popen:  # closes its pipes, and waits
            self.popen.kill()
        self.log.close()


# ---- one size and method -------------------------------------------------------------------------


def compare(
    size: str, method: str, names: list[str], args: argparse.Namespace, prompts: int = 0
) -> dict[str, Any]:
    """Time the contenders on one size and method; `prompts` per call where they generate text."""
    shape = SIZES[size]
    if prompts:
        shape = (*shape[:5], prompts, shape[6])
    if method != "generate":
        names = [*names, "floor"]
    measured: dict[str, list[Process]] = {name: [] for name in names}  # a process for each start
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, shape, method)
        job = json.loads((work / "job.json").read_text())
        for _ in range(args.starts):
            take_turns(measured, left_out, size, work, args)
    ours = measured["minilora"]
    medians = {}
    for name, processes in measured.items():
        medians[name] = statistics.median(s for turn in turns(processes) for s in turn)
    floor = medians.pop("floor", None)
    rows: dict[str, dict[str, Any]] = {}
    for name, median in medians.items():
        processes = measured[name]
        ratios = []
        for turn, our_turn in zip(turns(processes), turns(ours), strict=True):
            ratios.append(statistics.median(turn) / statistics.median(our_turn))
        row: dict[str, Any] = {
            "milliseconds": round(1e3 * median, 3),
            "over_minilora": round(statistics.median(ratios), 3),
        }
        if floor:
            row["over_floor"] = round(median / floor, 3)
        peak = statistics.median(process.peak for process in processes)
        faults = statistics.median(count for process in processes for count in process.faults)
        ready = statistics.median(process.ready for process in processes)
        row |= {
            "tokens_per_second": round(job["tokens"] / median),
            "peak_megabytes": round(peak / 1e6, 1),
            "over_weights_megabytes": round((peak - job["weights"]) / 1e6, 1),
            "faults_per_step": faults,
            "seconds_to_first_step": round(ready, 2),
        }
        reference = measured[reference_of(name, method)]
        agree = same_tokens if method == "generate" else same_losses
        rows[name] = row | agree(f"{size} {method} {name}", results(processes), results(reference))
    result: dict[str, Any] = {"size": size, "method": method, "starts": args.starts}
    if prompts:
        result["prompts"] = prompts
    if floor:
        result["floor_milliseconds"] = round(1e3 * floor, 3)
    result["contenders"] = rows
    if left_out:
        result["left_out"] = left_out
    return result


def reference_of(name: str, method: str) -> str:
    """The contender whose losses another one must reproduce: itself, if no other has its method."""
    if method == "maps":
        return name
    return FAMILY[name] if method == "family" else "minilora"


def take_turns(
    measured: dict[str, list[Process]],
    left_out: dict[str, str],
    size: str,
    work: Path,
    args: argparse.Namespace,
) -> None:
    """Start each contender once, and add its process to `measured` after all its turns.

    One that cannot be started goes from `measured` to `left_out`, with the reason.
    """
    with ExitStack() as stack:
        for name in list(measured):
            try:
                process = stack.enter_context(Process(name, work, args.threads, args.timeout))
            except RuntimeError as error:
                left_out[name] = str(error)[:300]
                del measured[name]
            else:
                measured[name].append(process)
        for _ in range(args.rounds):
            for processes in measured.values():
                time.sleep(PAUSE)
                processes[-1].turn(args.steps or STEPS.get(size, 1))


def turns(processes: list[Process]) -> list[list[float]]:
    """The seconds of each step of each turn."""
    return [turn for process in processes for turn in process.turns]


def results(processes: list[Process]) -> list[Any]:
    """The loss of each step, or the tokens that it generated."""
    return [result for process in processes for result in process.results]


def same_losses(what: str, peer: list[Any], ours: list[Any]) -> dict[str, float]:
    """The largest difference of the losses. SystemExit if it exceeds AGREE."""
    difference = float(np.max(np.abs(np.subtract(peer, ours))))
    if not difference <= AGREE:
        raise SystemExit(
            f"{what}: the losses differ by {difference}, at most {AGREE:g} is valid: the "
            "contenders do not compute the same step"
        )
    return {"loss_difference": difference}


def same_tokens(what: str, peer: list[Any], ours: list[Any]) -> dict[str, Any]:
    """The share of equal tokens, and the first difference as (step, prompt, token), if any."""
    equal = np.equal(peer, ours)
    share = float(equal.mean())
    if not share > SAME:
        raise SystemExit(
            f"{what}: {1 - share:.1%} of the tokens differ, less than {1 - SAME:.0%} is valid: the "
            "contenders do not compute the same text"
        )
    if equal.all():
        return {"tokens_equal": share}
    return {"tokens_equal": share, "first_difference": np.argwhere(~equal)[0].tolist()}


def show(result: dict[str, Any]) -> None:
    about = ""
    if "floor_milliseconds" in result:
        about = f"   (floor {result['floor_milliseconds']:.1f} ms)"
    if "prompts" in result:
        about = f"   (prompts: {result['prompts']})"
    print(f"\n{result['size']}, {result['method']}{about}")
    columns = f"{'ms':>9}{'/ ours':>8}{'/ floor':>9}{'tokens/s':>10}{'peak MB':>9}{'faults':>8}"
    print(f"  {'':14}{columns}{'first step s':>14}")
    for name, row in result["contenders"].items():
        floor = f"{row['over_floor']:9.2f}" if "over_floor" in row else f"{'':9}"
        print(
            f"  {name:14}{row['milliseconds']:9.1f}{row['over_minilora']:8.2f}{floor}"
            f"{row['tokens_per_second']:10,}{row['peak_megabytes']:9.0f}"
            f"{row['faults_per_step']:8.0f}{row['seconds_to_first_step']:14.2f}"
        )
        if "first_difference" in row:
            print(
                f"  {'':14} {row['tokens_equal']:.2%} equal tokens, first difference "
                f"(step, prompt, token) {row['first_difference']}"
            )
    for name, reason in result.get("left_out", {}).items():
        print(f"  {name:14} left out: {reason}")


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["size"], result["method"], result.get("prompts")


def _place(result: dict[str, Any]) -> tuple[int, int, int]:
    size = list(SIZES).index(result["size"])
    return size, METHODS.index(result["method"]), result.get("prompts", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--contenders", default=",".join(("minilora", *PEERS)))
    parser.add_argument("--starts", type=int, default=3, help="processes of each contender")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each process")
    parser.add_argument("--steps", type=int, help="per turn")
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
            if method == "recomputed" and size != "long":
                continue
            if size in ("long", "wide") and method in ("family", "full", "generate"):
                continue
            if method == "maps" and size not in ("tiny", "small"):
                continue
            chosen = [name for name in names if (name, method) not in LEFT_OUT]
            if method == "family":
                chosen = [name for name in FAMILY if name.partition("-")[0] in names]
            if method == "maps":
                chosen = ["minilora", *(f"minilora-{name}" for name in MAPS)]
            for prompts in PROMPTS.get(size, ()) if method == "generate" else (0,):
                result = compare(size, method, chosen, args, prompts)
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
        stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        versions = {**stored.get("versions", {}), **versions}  # of contenders that were not run now
        measured = {_key(result) for result in results}
        results += [row for row in stored.get("results", []) if _key(row) not in measured]
        results.sort(key=_place)
        machine = (
            f"{platform.machine()}, {args.threads} threads, Python {platform.python_version()}"
        )
        report = {"machine": machine, "versions": versions, "results": results}
        RESULT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
