"""The same LoRA step in PyTorch, transformers and peft: same weights, batches, order and rate."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora import CausalLM, LoraConfig, get_peft_model
from minilora.data.batches import Windows

from .bench import LORA, Bench
from .conducting import Facts
from .counting import count_step

PACKAGES = ("torch", "transformers", "peft")


def eager(bench: Bench, size: str) -> None:
    """PyTorch as it is; then with TF32."""
    compare(bench, size, compiled=False)


def compiled(bench: Bench, size: str) -> None:
    """Forward, backward and loss compiled by torch.compile."""
    compare(bench, size, compiled=True)


def reduce_overhead(bench: Bench, size: str) -> None:
    """Compiled, and launched as CUDA graphs."""
    compare(bench, size, compiled=True, mode="reduce-overhead")


def compare(bench: Bench, size: str, compiled: bool, mode: str | None = None) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        bench.notes.add(skipped=f"not installed: {', '.join(missing)}")
        return
    torch = importlib.import_module("torch")
    device = "cpu" if bench.emulated else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        bench.notes.add(skipped="this PyTorch sees no GPU")
        return
    if compiled and bench.emulated:
        bench.notes.add(skipped="a rehearsal compiles nothing")
        return
    _use_tf32(torch, False)
    step = TorchStep(bench, size, device, compiled, mode)
    bench.notes.add(attention=step.attention, tf32=False)
    bench.notes.add(**bench.time_steps(step, step.wait))
    if device == "cuda":
        reserved = round(torch.cuda.max_memory_reserved() / 1e6, 1)
        used = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        bench.notes.add(reserved_megabytes=reserved, used_megabytes=used)
        bench.notes.measure("counts", partial(count_step, bench, step))
    if not compiled:  # compiling a second time would take too long
        _use_tf32(torch, True)
        bench.notes.measure("with_tf32", partial(bench.time_steps, step, step.wait))


def _use_tf32(torch: Any, yes: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = yes


def files(bench: Bench, size: str) -> Path:
    """The folder with the base and the adapter with which our own step begins."""
    folder = bench.folder / size
    if not (folder / "adapter").exists():
        base = CausalLM(bench.sizes[size].config, seed=0)
        base.save_pretrained(folder / "base")
        config = LoraConfig(**LORA, task_type="CAUSAL_LM")
        get_peft_model(base, config, seed=0).save_pretrained(folder / "adapter")
    return folder


class TorchStep:
    """A step of the run that `bench.Step` takes, by PyTorch."""

    def __init__(self, bench: Bench, size: str, device: str, compiled: bool, mode: str | None):
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        peft = importlib.import_module("peft")
        folder = files(bench, size)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=torch.float32
        )
        self.attention = base.config._attn_implementation
        adapted = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
        self.torch = torch
        self.device = device
        self.model = adapted.to(device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0.0)
        s = bench.sizes[size]
        self.windows = Windows(bench.text(size), s["time"], s["batch"])
        self.done = 0
        options: Facts = {"mode": mode} if mode else {}
        self.loss = torch.compile(self._loss, **options) if compiled else self._loss

    def _loss(self, ids: Any, targets: Any) -> Any:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def __call__(self) -> float:
        batch = self.windows.batch(self.done)
        self.done += 1
        both = np.stack([batch.ids, batch.targets]).astype(np.int64)
        ids, targets = self.torch.from_numpy(both).to(self.device)
        loss = self.loss(ids, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return float(loss)

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
