"""minilora on the device: steps at every size, other methods, evaluation, generation, variants."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora import generate
from minilora.training.loop import evaluate

from .bench import Bench, can_capture, make_model
from .conducting import Facts
from .counting import NO_GRAPH, count_step, queued_milliseconds


def ours(bench: Bench, size: str) -> None:
    """A LoRA step through `Run`: eager, and where steps are captured, replayed."""
    bench.notes.add(size=bench.sizes[size], tf32=False)
    before = compiled_kernels(bench)
    step = bench.step(size, graph=False)
    bench.notes.add(**bench.time_steps(step))
    bench.notes.add(kernels_compiled=compiled_kernels(bench) - before)
    bench.notes.add(**memory(bench))
    # The device's time, beside the wall's above.
    bench.notes.measure("device_busy_milliseconds", partial(queued_milliseconds, bench, step))
    replayed = None
    if can_capture():
        replayed = bench.step(size, graph=True)
        bench.notes.measure("graph", partial(bench.time_steps, replayed))
        busy = partial(queued_milliseconds, bench, replayed)
        bench.notes.measure("graph_device_busy_milliseconds", busy)
    else:
        bench.notes.add(graph={"skipped": NO_GRAPH})
    # Last: on a real device this imports PyTorch.
    bench.notes.measure("counts", partial(count_step, bench, step))
    if replayed is not None:
        bench.notes.measure("graph_counts", partial(count_step, bench, replayed))


def method(bench: Bench, name: str) -> None:
    """A few steps of a relative of LoRA at size small."""
    step = bench.step("small", method=name)
    bench.notes.add(size="small", **bench.time_steps(step))
    bench.notes.add(**memory(bench))
    bench.notes.measure("device_busy_milliseconds", partial(queued_milliseconds, bench, step))
    bench.notes.measure("counts", partial(count_step, bench, step))


def speed(bench: Bench) -> None:
    """Tokens per second of an evaluation, and of generation by likelihood and by chance."""
    for size in ("tiny", "gpt2"):
        model = make_model(bench, size)
        bench.notes.measure(f"evaluate:{size}", partial(_evaluate, bench, model, size))
        for way, sampling in SAMPLING.items():
            work = partial(_generate, bench, model, size, sampling)
            bench.notes.measure(f"generate:{size}:{way}", work)


SAMPLING: dict[str, Facts] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_k": 8},
}


def _evaluate(bench: Bench, model: Any, size: str) -> Facts:
    text = bench.text(size)
    context = bench.sizes[size]["time"]
    windows = bench.few(16)

    def work() -> int:
        evaluate(model, text, context, limit=windows)
        return windows * context

    return _rate(bench, work)


def _generate(bench: Bench, model: Any, size: str, sampling: Facts) -> Facts:
    prompt = np.zeros((1, 4), np.int64)
    new = 4 if bench.rehearse else bench.sizes[size]["time"] // 2

    def work() -> int:
        text = generate(model, prompt, new, **sampling)
        return len(text[0]) - len(prompt[0])

    return _rate(bench, work)


def _rate(bench: Bench, work: Callable[[], int]) -> Facts:
    """Tokens per second the second time: the first compiles. `work` returns how many tokens."""
    work()
    bench.wait()
    begun = time.perf_counter()
    tokens = work()
    bench.wait()
    seconds = time.perf_counter() - begun
    return {"tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


# What is in the environment before cupy is imported.
VARIANTS = {
    "tf32": {"CUPY_TF32": "1"},
    "workspace-4-mib": {"CUBLAS_WORKSPACE_CONFIG": ":4096:1"},  # KiB : how many
    "workspace-32-mib": {"CUBLAS_WORKSPACE_CONFIG": ":32768:1"},
    "no-cub": {"CUPY_ACCELERATORS": ""},
}


def variant(bench: Bench, name: str) -> None:
    """Milliseconds of the two larger sizes with something else than the default."""
    os.environ |= VARIANTS[name]
    compute = "tf32" if name == "tf32" else "float32"
    bench.notes.add(environment=VARIANTS[name], compute=compute)
    for size in ("small", "gpt2"):
        step = bench.step(size, compute=compute)
        bench.notes.measure(size, partial(bench.time_steps, step))


def memory(bench: Bench) -> Facts:
    """Megabytes that CuPy's pool has taken from the device, and of them those in use."""
    pool = bench.backend.xp.get_default_memory_pool()
    return {
        "pool_reserved_megabytes": round(pool.total_bytes() / 1e6, 1),
        "pool_used_megabytes": round(pool.used_bytes() / 1e6, 1),
    }


def compiled_kernels(bench: Bench) -> int:
    """How many compiled kernels are kept on disk."""
    bench.backend.select()  # the emulation keeps its own
    cache = Path(os.environ.get("CUPY_CACHE_DIR", Path.home() / ".cupy" / "kernel_cache"))
    if bench.emulated:
        return len(list((cache.parent / "kernels").glob("*.so")))
    return len(list(cache.glob("*.cubin")))
