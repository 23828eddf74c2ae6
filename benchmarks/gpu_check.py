"""Check minilora on this machine's GPU, and time a LoRA step beside PyTorch + peft.

    python benchmarks/gpu_check.py
        takes under ten minutes and writes benchmarks/results/gpu-check.json
    python benchmarks/gpu_check.py --dry-run
        does the same with small sizes on strict_xp's stand-in for a GPU, and writes nothing

Without a GPU it prints the reason and ends. Each part runs in a separate process with a time limit,
so that a failure is recorded and the other parts still run:

    prepare    writes a base and an adapter of every size, as files that both sides load
    parity     200 training steps on the CPU and twice on the GPU: losses agree within 1e-5, and the
               two GPU runs agree bit for bit
    tests      pytest -m gpu: all must pass, and none may be skipped
    traffic    what one step launches and moves (the part says what is counted, and how)
    ours       a LoRA step: gradients, clipping, one read of loss and norm, AdamW
    eager, compiled
               the same step in PyTorch, transformers' Llama under peft: same files, batch and order

Every timing waits for the device before it stops the clock; all is float32, with TF32 off. The
machine is measured as it is: nothing here tunes it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# This copy of minilora, and the stand-in.
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402

from minilora import (  # noqa: E402
    CausalLM,
    LoraConfig,
    PeftModel,
    TransformerConfig,
    get_peft_model,
)
from minilora.backend import Backend, CupyBackend, get_backend  # noqa: E402
from minilora.data import Batch  # noqa: E402
from minilora.errors import DeviceError  # noqa: E402
from minilora.optim import AdamW, clip_by_global_norm  # noqa: E402
from minilora.training.loop import Run, Settings  # noqa: E402
from minilora.training.parallel import ShardedStep  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "gpu-check.json"
LIMIT = 570  # seconds for everything
WARM_UP = 5  # steps
TIMED = 30  # steps
LONGEST = 12  # seconds of timed steps
# Sequences per shard: the whole batch at once, on the CPU too where bits are compared.
WHOLE = 2**31
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SIZES: dict[str, dict[str, int]] = {  # layers, C, heads, T, B, V
    "micro": {"layers": 2, "width": 64, "heads": 2, "time": 64, "batch": 16, "vocabulary": 32},
    "tiny": {"layers": 4, "width": 128, "heads": 4, "time": 128, "batch": 16, "vocabulary": 256},
    "small": {"layers": 6, "width": 384, "heads": 6, "time": 256, "batch": 8, "vocabulary": 256},
    "gpt2": {"layers": 12, "width": 768, "heads": 12, "time": 256, "batch": 2, "vocabulary": 50257},
}
DRY_SIZES = {
    "micro": {"layers": 1, "width": 16, "heads": 2, "time": 8, "batch": 2, "vocabulary": 32}
}


class Bench:
    """What every part needs: the device, the sizes, and the folder of the files."""

    def __init__(self, dry: bool, folder: Path):
        self.dry, self.folder = dry, folder
        self.sizes = DRY_SIZES if dry else SIZES
        self.steps = 4 if dry else 200
        self.timed = (1, 3) if dry else (WARM_UP, TIMED)

    def device(self) -> Backend:
        if self.dry:
            from strict_xp import STRICT

            return STRICT
        return get_backend("cuda")

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if not self.dry:
            self.device().xp.cuda.Device().synchronize()

    def config(self, size: str) -> TransformerConfig:
        s = self.sizes[size]
        return TransformerConfig(
            vocab_size=s["vocabulary"],
            hidden_size=s["width"],
            intermediate_size=3 * s["width"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            max_position_embeddings=s["time"],
        )

    def batch(self, size: str) -> Batch:
        s = self.sizes[size]
        tokens = np.random.default_rng(0).integers(0, s["vocabulary"], (s["batch"], s["time"] + 1))
        return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy())

    def model(self, size: str) -> PeftModel:
        base = CausalLM.from_pretrained(self.folder / size / "base", device=self.device())
        return PeftModel.from_pretrained(base, self.folder / size / "adapter", is_trainable=True)

    def time(self, step: Callable[[], float], wait: Callable[[], None]) -> dict[str, Any]:
        """Milliseconds per step, and the losses of the first steps, warm-up included."""
        warm_up, timed = self.timed
        losses = [step() for _ in range(warm_up)]
        wait()
        seconds: list[float] = []
        while len(seconds) < timed and sum(seconds) < LONGEST:
            start = time.perf_counter()
            losses.append(step())
            wait()
            seconds.append(time.perf_counter() - start)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        milliseconds = {
            name: round(1000 * q, 3)
            for name, q in zip(("q1", "median", "q3"), quartiles, strict=True)
        }
        return {
            "milliseconds": milliseconds,
            "steps": len(seconds),
            "warm_up": warm_up,
            "losses": losses[:5],
        }


# ---- the parts -----------------------------------------------------------------------------------


def prepare(bench: Bench) -> dict[str, Any]:
    parameters = {}
    for size in bench.sizes:
        base = CausalLM(bench.config(size), seed=0)
        base.save_pretrained(bench.folder / size / "base")
        model = get_peft_model(base, LoraConfig(**LORA), seed=0)
        model.save_pretrained(bench.folder / size / "adapter")
        parameters[size] = dict(
            zip(("trained", "all"), model.get_nb_trainable_parameters(), strict=True)
        )
    return {"parameters": parameters, "sizes": bench.sizes, "lora": LORA}


def parity(bench: Bench) -> dict[str, Any]:
    """Compare losses and weights of the same run on the CPU and, twice, on the device.

    The run has dropout, so that the masks must agree.
    """
    size = bench.sizes["micro"]
    # 8 of 32 ids: something to learn.
    tokens = np.random.default_rng(1).integers(0, 8, 5000).astype(np.int32)
    settings = Settings(
        steps=bench.steps, batch_size=size["batch"], context=size["time"], lr=1e-3, shard=WHOLE
    )
    runs = []
    for device in ("cpu", bench.device(), bench.device()):
        base = CausalLM(bench.config("micro"), seed=0, device=device)
        model = get_peft_model(base, LoraConfig(**LORA, lora_dropout=0.1), seed=0).train()
        run = Run(model, tokens, settings, bench.folder)
        with ShardedStep(model, shard=WHOLE) as sharded:
            for _ in range(settings.steps):
                run.step(sharded)
        runs.append((run.losses, [p.numpy().tobytes() for p in model.parameters()]))
    (here, _), (there, _), _ = runs
    difference = max(abs(a - b) / abs(a) for a, b in zip(here, there, strict=True))
    return {
        "ok": difference <= 1e-5 and runs[1] == runs[2],
        "steps": settings.steps,
        "loss_first": here[0],
        "loss_last": here[-1],
        "largest_relative_difference": difference,
        "two_runs_bitwise_equal": runs[1] == runs[2],
    }


# The one reason for which a test of a GPU may be skipped.
MAY_SKIP = "there is one GPU only"


def files_of_gpu_tests() -> list[str]:
    """The files with tests marked `gpu`, without those of the emulation that stands for a GPU."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path) for path in marked if path.name != "test_cupy_on_cpu.py"]


def tests(bench: Bench) -> dict[str, Any]:
    """Run the tests marked `gpu`: passed, failed by name with the last line of each error, skipped.

    Not ok unless one passed, none failed and none was skipped (but for MAY_SKIP). In a dry run,
    which has no GPU, they may all be skipped.
    """
    report = bench.folder / "tests.xml"
    files = [str(ROOT / "tests" / "test_backend.py")] if bench.dry else files_of_gpu_tests()
    options = ["-c", str(ROOT / "setup.cfg"), "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfE"]
    # A warning of another library, at an import or later, says nothing about this GPU.
    options += ["-W", "default", "--continue-on-collection-errors", "--durations", "10"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "60"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *files]
    search_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    if not report.exists():
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-6:])
        return {"ok": False, "error": f"pytest ended with {done.returncode}: {tail[-2000:]}"}
    found = read_report(report)
    wrong = [f"{name}: {line}" for name, line in found["failed"].items()]
    wrong += [reason for reason in found["skipped"] if reason != MAY_SKIP and not bench.dry]
    if not found["passed"] and not bench.dry:
        wrong.append("no test passed")
    if done.returncode and not wrong:
        wrong.append(f"pytest ended with {done.returncode}")
    found |= {"ok": not wrong, "command": "python -m pytest -m gpu"}
    return found | ({"error": "; ".join(wrong)[:2000]} if wrong else {})


def read_report(path: Path) -> dict[str, Any]:
    """{passed: how many, failed: {name: the error's last line}, skipped: {reason: how many}}"""
    passed = 0
    failed: dict[str, str] = {}
    skipped: dict[str, int] = {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        for outcome in outcomes:
            message = outcome.get("message") or ""
            if outcome.tag == "skipped":
                skipped[message] = skipped.get(message, 0) + 1
            else:
                lines = (outcome.text or message).strip().splitlines() or [""]
                failed[name] = lines[-1][:300]
        passed += not outcomes
    return {"passed": passed, "failed": failed, "skipped": skipped}


def traffic(bench: Bench) -> dict[str, Any]:
    """Count what one step after the first launches and moves, as far as it can be counted:

    array_operations   calls of the engine that return a new array, on the stand-in: a lower bound
                       of the kernels, since a matrix product or a reduction may take several
    moves              calls of from_numpy and to_numpy on the device
    cuda               kernels, copies and waits as the driver reports them to PyTorch's profiler,
                       which sees every library of the process; None without PyTorch
    waits_in_gradients False if gradients and clipping ran while CuPy forbade waiting; None if CuPy
                       cannot forbid it
    """
    from strict_xp import METER, STRICT, counted

    found: dict[str, Any] = {}
    for size in bench.sizes:
        strict = _stepper(bench.folder / size, STRICT, bench.batch(size))
        strict()
        with counted():
            strict()
            found[size] = {"array_operations": METER.operations}
            stand_in = {
                "uploads": len(METER.uploads),
                "downloads": len(METER.downloads),
                "waits": len(METER.syncs),
            }
        if bench.dry:
            found[size]["moves"] = stand_in
            continue
        moves = {"from_numpy": 0, "to_numpy": 0}
        for name in moves:
            _count(CupyBackend, name, moves)
        step = _stepper(bench.folder / size, bench.device(), bench.batch(size))
        step()
        bench.wait()
        moves |= dict.fromkeys(moves, 0)
        step()
        found[size] |= {"moves": dict(moves), "on_the_stand_in": stand_in}
        for name, look, given in (
            ("cuda", _as_the_driver_saw, step),
            ("waits_in_gradients", _waits, size),
        ):
            try:
                found[size][name] = look(bench, given)
            except Exception as error:  # of any class; the counts above remain valid
                found[size][name] = f"failed: {error!r:.300}"
    return found


def _stepper(folder: Path, backend: Backend, batch: Batch) -> Callable[[], float]:
    """A function that takes one LoRA step on fixed data, as `train` does, and returns the loss."""
    base = CausalLM.from_pretrained(folder / "base", device=backend)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    sharded = ShardedStep(model, shard=WHOLE).__enter__()  # until the process ends

    def step() -> float:
        mean, grads = sharded.gradients(batch, optimizer.params)
        grads, length = clip_by_global_norm(grads, 1.0)
        loss, _ = backend.to_numpy(backend.xp.stack([mean, length])).tolist()
        optimizer.step(grads)
        return float(loss)

    return step


def _count(owner: type, name: str, counts: dict[str, int]) -> None:
    plain = getattr(owner, name)

    def counting(*args: Any) -> Any:
        counts[name] += 1
        return plain(*args)

    setattr(owner, name, counting)


def _as_the_driver_saw(bench: Bench, step: Callable[[], float]) -> dict[str, int] | None:
    try:
        import torch
    except ImportError:
        return None
    torch.cuda.init()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    host = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CPU
    ]
    copies = {
        way: sum(name.startswith(f"Memcpy {way}") for name in names)
        for way in ("HtoD", "DtoH", "DtoD")
    }
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": kernels, **copies, "waits": sum("Synchronize" in name for name in host)}


def _waits(bench: Bench, size: str) -> bool | None:
    try:
        import cupyx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy deprecates it
            forbidden = cupyx.allow_synchronize(False)
    except (ImportError, AttributeError):
        return None
    model = bench.model(size).train()
    params = [p for p in model.parameters() if p.requires_grad]
    with ShardedStep(model, shard=WHOLE) as sharded:
        clip_by_global_norm(sharded.gradients(bench.batch(size), params)[1], 1.0)  # uploads tables
        try:
            with forbidden:
                clip_by_global_norm(sharded.gradients(bench.batch(size), params)[1], 1.0)
        except cupyx.DeviceSynchronized:
            return True
    return False


def ours(bench: Bench, size: str) -> dict[str, Any]:
    result = bench.time(
        _stepper(bench.folder / size, bench.device(), bench.batch(size)), bench.wait
    )
    if not bench.dry:
        result["memory_pool_megabytes"] = round(
            bench.device().xp.get_default_memory_pool().total_bytes() / 1e6, 1
        )
    return result


def eager(bench: Bench, size: str, compiled: bool = False) -> dict[str, Any]:
    missing = [name for name in ("torch", "transformers", "peft") if not _version(name)]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    import peft
    import torch
    import transformers

    device = "cpu" if bench.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return {"skipped": "this PyTorch sees no GPU"}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        bench.folder / size / "base", dtype=torch.float32
    )
    model = (
        peft.PeftModel.from_pretrained(base, bench.folder / size / "adapter", is_trainable=True)
        .to(device)
        .train()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    batch = bench.batch(size)

    def loss_of(ids: Any, targets: Any) -> Any:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        both = torch.from_numpy(np.stack([batch.ids, batch.targets])).to(device)
        loss = loss_of(both[0], both[1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss)

    result = bench.time(step, torch.cuda.synchronize if device == "cuda" else lambda: None)
    if device == "cuda":
        result["peak_megabytes"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return {
        **result,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "attention": base.config._attn_implementation,
    }


def compiled(bench: Bench, size: str) -> dict[str, Any]:
    return (
        {"skipped": "a dry run compiles nothing"}
        if bench.dry
        else eager(bench, size, compiled=True)
    )


# ---- running them --------------------------------------------------------------------------------

# The parts and their time limits in seconds: once, and for each size.
ONCE: dict[str, tuple[Callable[..., Any], int]] = {
    "prepare": (prepare, 90),
    "parity": (parity, 90),
    "tests": (tests, 200),
    "traffic": (traffic, 120),
}
EACH: dict[str, tuple[Callable[..., Any], int]] = {
    "ours": (ours, 40),
    "eager": (eager, 60),
    "compiled": (compiled, 90),
}


def run_part(name: str, bench: Bench, seconds: float) -> dict[str, Any]:
    """The result of a part that runs in a separate process and process group.

    When its time is over, the processes that it started end too.
    """
    command = [sys.executable, __file__, "--part", name, "--folder", str(bench.folder)]
    begun = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command + ["--dry-run"] * bench.dry, start_new_session=True, **pipes
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
            last = (out.strip().splitlines() or [""])[-1]
            if process.returncode == 0:
                outcome = {"ok": True, **json.loads(last)}
            else:
                outcome = {
                    "ok": False,
                    "error": "\n".join(errors.strip().splitlines()[-6:])[-2000:],
                }
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            outcome = {"ok": False, "error": f"more than {seconds:.0f} seconds"}
        except ValueError:
            outcome = {"ok": False, "error": f"its output must end in JSON, got {last[-500:]!r}"}
    return {**outcome, "seconds": round(time.perf_counter() - begun, 1)}


def check(bench: Bench) -> dict[str, Any]:
    """Run every part in turn and return the result that is written."""
    begun, parts = time.perf_counter(), {}
    names = [(name, seconds) for name, (_, seconds) in ONCE.items()]
    names += [
        (f"{name}:{size}", seconds) for name, (_, seconds) in EACH.items() for size in bench.sizes
    ]
    for name, seconds in names:
        left = LIMIT - (time.perf_counter() - begun)
        if left > 5:
            parts[name] = run_part(name, bench, min(seconds, left))
        else:
            parts[name] = {"ok": False, "error": "not run: the time for all parts was over"}
        state = (
            "ok" if parts[name]["ok"] else f"FAILED: {parts[name].get('error', parts[name])!s:.300}"
        )
        print(
            f"{name:16} {parts[name].get('seconds', 0):6.1f} s  {state}",
            file=sys.stderr,
            flush=True,
        )
    differences = _loss_differences(parts, bench)
    return {
        "command": "python benchmarks/gpu_check.py" + " --dry-run" * bench.dry,
        "date": time.strftime("%Y-%m-%d"),
        "device": "the stand-in of tests/support/strict_xp.py" if bench.dry else device_facts(),
        "versions": {
            name: _version(name)
            for name in ("numpy", "cupy-cuda13x", "torch", "transformers", "peft")
        }
        | {"python": platform.python_version()},
        "seconds": round(time.perf_counter() - begun, 1),
        "ok": all(part["ok"] for part in parts.values())
        and all(d <= 1e-4 for d in differences.values()),
        "losses_differ_from_ours_by": differences,
        "parts": parts,
    }


def _loss_differences(parts: dict[str, Any], bench: Bench) -> dict[str, float]:
    """The largest relative difference of PyTorch's first losses from ours.

    The times can be compared only if both sides computed the same thing.
    """
    found = {}
    for size in bench.sizes:
        mine = parts[f"ours:{size}"].get("losses")
        for name in ("eager", "compiled"):
            theirs = parts[f"{name}:{size}"].get("losses")
            if mine and theirs:
                found[f"{name}:{size}"] = max(
                    abs(a - b) / abs(a) for a, b in zip(mine, theirs, strict=False)
                )
    return found


def device_facts() -> dict[str, Any]:
    cupy = get_backend("cuda").xp
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "memory_bytes": properties["totalGlobalMem"],
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "tf32": os.environ.get("CUPY_TF32", "0") not in ("", "0"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run small sizes on the stand-in; print the result",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, _, size = args.part.partition(":")
        part = {**ONCE, **EACH}[name][0]
        print(json.dumps(part(Bench(args.dry_run, args.folder), *([size] if size else []))))
        return 0
    if not args.dry_run:
        try:
            get_backend("cuda")
        except DeviceError as error:
            print(f"nothing checked: {error}")
            return 0
    with tempfile.TemporaryDirectory() as folder:
        result = check(Bench(args.dry_run, Path(folder)))
    text = json.dumps(result, indent=2) + "\n"
    if not args.dry_run:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
