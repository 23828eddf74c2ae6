"""What the parts share: sizes, models, LoRA steps as training takes them, and their timing."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilora import CausalLM, LoraConfig, PeftModel, TransformerConfig, get_peft_model
from minilora.backend import Backend, get_backend
from minilora.quant import quantize
from minilora.training.loop import Run, Settings
from minilora.training.methods import adapter_config
from minilora.training.parallel import ShardedStep

from .conducting import Facts
from .part import Notes

WHOLE = (
    2**31
)  # sequences per shard: the whole batch at once, on the CPU too where bits are compared
LORA: Facts = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
STEPS = 400  # of a run: more than any part takes
LONGEST = 3.0  # seconds of timed steps


class Size(dict[str, int]):
    """layers, width C, heads, time T, batch B, vocabulary V"""

    def __init__(self, layers: int, width: int, heads: int, time: int, batch: int, vocabulary: int):
        super().__init__(
            layers=layers, width=width, heads=heads, time=time, batch=batch, vocabulary=vocabulary
        )

    @property
    def config(self) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=self["vocabulary"],
            hidden_size=self["width"],
            intermediate_size=3 * self["width"],
            num_hidden_layers=self["layers"],
            num_attention_heads=self["heads"],
            max_position_embeddings=self["time"],
        )


SIZES = {
    "micro": Size(layers=2, width=64, heads=2, time=64, batch=16, vocabulary=32),
    "tiny": Size(layers=4, width=128, heads=4, time=128, batch=16, vocabulary=256),
    "small": Size(layers=6, width=384, heads=6, time=256, batch=8, vocabulary=256),
    "gpt2": Size(layers=12, width=768, heads=12, time=256, batch=2, vocabulary=50257),
}
# For a rehearsal: an emulated device takes seconds for what a real one does in milliseconds.
REHEARSED = {
    "micro": Size(layers=1, width=16, heads=2, time=8, batch=2, vocabulary=32),
    "tiny": Size(layers=1, width=16, heads=2, time=8, batch=4, vocabulary=32),
    "small": Size(layers=2, width=16, heads=2, time=16, batch=2, vocabulary=32),
    "gpt2": Size(layers=2, width=32, heads=2, time=16, batch=2, vocabulary=48),
}


class Bench:
    """A part's device and sizes, its notes, and the folder for files that parts share."""

    def __init__(self, notes: Notes, folder: Path, end: float, rehearse: bool, emulated: bool):
        self.notes = notes
        self.folder = folder
        self.end = end  # by time.monotonic()
        self.rehearse = rehearse
        self.emulated = emulated
        self.sizes = REHEARSED if rehearse else SIZES
        self.steps = 4 if rehearse else 200  # of the comparison of CPU and GPU
        self.warm_up = 2 if rehearse else 5
        self.timed = 2 if rehearse else 30

    def few(self, count: int) -> int:
        """How often to repeat something: `count` times, less in a rehearsal."""
        return min(count, 3) if self.rehearse else count

    @property
    def backend(self) -> Backend:
        return get_backend("cuda")

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        self.backend.xp.cuda.Device().synchronize()

    def text(self, size: str) -> np.ndarray:
        """Random ids: enough for batches that differ from step to step."""
        s = self.sizes[size]
        count = 40 * s["batch"] * s["time"]
        return np.random.default_rng(0).integers(0, s["vocabulary"], count).astype(np.int32)

    def settings(self, size: str, **more: Any) -> Settings:
        s = self.sizes[size]
        usual: Facts = {"steps": STEPS, "lr": 1e-3, "warmup": 0, "floor": 1.0, "shard": WHOLE}
        usual |= {"batch_size": s["batch"], "context": s["time"]}
        return Settings(**{**usual, **more})

    def step(self, size: str, **options: Any) -> Step:
        return Step(self, size, **options)

    def time_steps(
        self, step: Callable[[], float], wait: Callable[[], None] | None = None
    ) -> Facts:
        """The first step's seconds, then quartiles of the milliseconds of steps after a warm-up.

        Before the clock is stopped, the device has done the step. The losses are those of the
        first steps.
        """
        wait = wait or self.wait
        begun = time.perf_counter()
        losses = [step()]
        wait()
        first = time.perf_counter() - begun
        losses += [step() for _ in range(self.warm_up - 1)]
        wait()
        seconds: list[float] = []
        while len(seconds) < self.timed and sum(seconds) < LONGEST:
            start = time.perf_counter()
            losses.append(step())
            wait()
            seconds.append(time.perf_counter() - start)
        several = seconds if len(seconds) > 1 else seconds * 2
        quartiles = statistics.quantiles(several, n=4, method="inclusive")
        names = ("q1", "median", "q3")
        milliseconds = {n: round(1000 * q, 3) for n, q in zip(names, quartiles, strict=True)}
        return {
            "first_step_seconds": round(first, 3),
            "milliseconds": milliseconds,
            "steps": len(seconds),
            "losses": losses[:5],
        }


class Step:
    """Takes the next step of a training run each time it is called; returns the step's loss.

    method   lora, dora, adalora or nf4
    graph    whether to replay a captured graph; None: the default. Without effect where
             `can_capture` is False
    compute  the arithmetic of products with frozen weights
    """

    def __init__(
        self,
        bench: Bench,
        size: str,
        method: str = "lora",
        graph: bool | None = None,
        device: str = "cuda",
        dropout: float = 0.0,
        compute: str = "float32",
        **settings: Any,
    ):
        self.model = make_model(bench, size, method, device, dropout)
        self.model.set_compute(compute)
        if graph is not None and can_capture():
            settings["graph"] = graph
        self.run = Run(self.model, bench.text(size), bench.settings(size, **settings), bench.folder)
        self.sharded = ShardedStep(self.model, shard=WHOLE).__enter__()  # until the process ends

    def __call__(self) -> float:
        return float(self.run.step(self.sharded)["loss"])

    def bits(self) -> tuple[list[float], list[bytes]]:
        """The losses so far and all weights: what two runs must have in common."""
        weights = [p.numpy().tobytes() for p in self.model.parameters()]
        return [float(loss) for loss in self.run.losses], weights


def can_capture() -> bool:
    """Whether this minilora captures steps as graphs, and has a setting for that."""
    return "graph" in {field.name for field in dataclasses.fields(Settings)}


def make_model(
    bench: Bench, size: str, method: str = "lora", device: str = "cuda", dropout: float = 0.0
) -> PeftModel:
    """A base with seeded random weights and an adapter on every linear layer, in training mode."""
    base = CausalLM(bench.sizes[size].config, seed=0, device=device)
    if method == "nf4":
        quantize(base, "nf4")
    fields = {"target_modules": LORA["target_modules"], "r": LORA["r"], "lora_dropout": dropout}
    if method in ("dora", "adalora"):
        config = adapter_config(method, "none", fields, STEPS)
    else:
        config = LoraConfig(**{**LORA, "lora_dropout": dropout})
    assert config is not None
    model: PeftModel = get_peft_model(base, config, seed=0)
    model.train()
    return model
