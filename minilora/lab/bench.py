"""The bench: bases and fits, made once and stored, and what is measured on them.

What is computed depends on the arm, the rate, the seed and the plan alone: never on the folder, on
the number of workers, or on what was measured before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.batches import Ids
from ..errors import NonFiniteError
from ..formats import load_file, read_json, save_file, write_json
from ..formats.disk import JsonObject
from ..formats.folders import new_folder
from ..lora import LoraLinear, MultiTask, PeftModel, get_peft_model
from ..lora.factors import Part
from ..models.transformer import CausalLM
from ..nn import Linear
from ..quant.linear import quantize
from ..training.checkpoints import read_log
from ..training.loop import Settings, bits_per_byte, evaluate, train
from ..training.methods import adapter_config
from ..training.run import Text
from .protocol import (
    BASES,
    CODE,
    FIT,
    SHUFFLED,
    VERSION,
    Arm,
    Plan,
    documents,
    find_base,
    spread,
    texts_checksum,
    to_ids,
    training_ids,
)

Weights = dict[str, np.ndarray]
START_BATCHES = 8  # that a start may read
LOST = 99.0  # bits per byte that stand for a loss which is not finite


class Bench:
    """Where cases are measured: bases and fits by name, from the folder or made now.

    folder   where bases and fits are stored; several processes may share it
    plan     how much is measured
    """

    def __init__(self, folder: str | Path, plan: Plan):
        self.folder = Path(folder)
        self.plan = plan
        self._bases: dict[str, Weights] = {}

    # ---- bases ----

    def base_folder(self, name: str) -> Path:
        """Where the base is stored: the name has a checksum of its configuration and its text."""
        base = find_base(name)
        content = {"model": base.model.to_dict(), "pretrain": dataclasses.asdict(base.pretrain)}
        return self.folder / "bases" / f"{name}-{_key(content | {'texts': texts_checksum()})[:12]}"

    def has_base(self, name: str) -> bool:
        return (self.base_folder(name) / "config.json").exists()

    def make_base(self, name: str) -> Path:
        """Train the base on prose with seed 0, unless its folder has it; returns the folder."""
        folder = self.base_folder(name)
        if self.has_base(name):
            return folder
        base = BASES[name]
        settings = self.plan.shorten(base.pretrain)
        with new_folder(folder, {"base": folder.name}) as stage:
            model = CausalLM(base.model, seed=0)
            _train(model, training_ids("prose"), settings)
            model.save_pretrained(stage)
        return folder

    def base(self, name: str) -> CausalLM:
        """A copy of the base, whose weights nobody else changes."""
        if name not in self._bases:
            self._bases[name] = self._read_base(name)
        return self.model_with(name, self._bases[name])

    def _read_base(self, name: str) -> Weights:
        if name.startswith(SHUFFLED):
            return shuffle_linear(self.base_weights(name.removeprefix(SHUFFLED)))
        self.make_base(name)
        model = CausalLM.from_pretrained(self.base_folder(name))
        return {key: p.numpy() for key, p in model.named_parameters()}

    def base_weights(self, name: str) -> Weights:
        """The base's weights by name; do not change them."""
        self.base(name)
        return self._bases[name]

    def model_with(self, name: str, weights: Mapping[str, np.ndarray]) -> CausalLM:
        """A model of the base's shape with these weights."""
        model = CausalLM(find_base(name).model, seed=None)
        for key, p in model.named_parameters():
            p.data = weights[key]
        model.eval()
        return model

    # ---- texts ----

    def held_out(self, task: str) -> dict[str, Ids]:
        """The texts that a fit is measured on: two halves of the task's, and prose."""
        return _held_out(task, *self.plan.held_out)

    def bits(self, model: Any, part: str = "report", task: str = CODE) -> float:
        """Bits per byte of a part of `held_out`; LOST if the model's loss is not finite."""
        try:
            loss = evaluate(model, self.held_out(task)[part], FIT.context, threads=1)
        except NonFiniteError:
            return LOST
        return bits_per_byte(loss)

    # ---- fits ----

    def prepare(self, arm: Arm, seed: int) -> Any:
        """The base with what the arm trains, before its first step."""
        model = self.base(arm.base)
        codes = None  # that the start makes, because it depends on their error
        if arm.fields.get("init_lora_weights") == "loftq":
            codes = arm.quantize
        elif arm.quantize != "none":
            quantize(model, arm.quantize)
        if arm.method == "linear":
            for p in model.parameters():
                p.requires_grad = False
            for path, module in model.named_modules():
                if isinstance(module, Linear) and path != "lm_head":
                    module.weight.requires_grad = True
            return model
        config = adapter_config(arm.method, arm.quantize, arm.fields, self.settings(arm).steps)
        if config is None:
            return model
        data = self.start_batches(arm, seed)
        return get_peft_model(model, config, seed=seed, data=data, quantize=codes)

    def start_batches(self, arm: Arm, seed: int) -> list[Ids]:
        """Batches (B, T + 1) of the arm's text for starts that read data: eva and lora_ga."""
        ids = training_ids(arm.task)
        size = FIT.context + 1
        rng = np.random.default_rng(seed)
        places = rng.integers(0, len(ids) - size, (START_BATCHES, FIT.batch_size, 1))
        return list(ids[places + np.arange(size)])

    def settings(self, arm: Arm, lr: float = 1e-3, seed: int = 0) -> Settings:
        steps = find_base(arm.base).fit_steps
        given = {"steps": steps, "lr": lr, "seed": seed} | dict(arm.settings)
        return self.plan.shorten(dataclasses.replace(FIT, **given))

    def fit(self, arm: Arm, lr: float, seed: int) -> JsonObject:
        """What a fit measures; trained now unless the folder has it.

        before, tune, report, prose   bits per byte: of the report half before training, and after
                                      it of both halves and of prose; None if training diverged
        trained      how many numbers
        first_norm   the norm of the first step's gradient
        curve        [step, report, prose] of evaluations on the way
        ranks        of AdaLoRA's layers at the end
        """
        place = self._place(arm, lr, seed)
        if place.exists():
            return read_json(place)
        model = self.prepare(arm, seed)
        result: JsonObject = {"trained": sum(p.size for p in model.parameters() if p.requires_grad)}
        settings = self.settings(arm, lr, seed)
        result |= _train(model, training_ids(arm.task), settings, self.held_out(arm.task))
        trained = {n: p.numpy() for n, p in model.named_parameters() if p.requires_grad}
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(place.with_suffix(".safetensors"), trained)
        write_json(place, result)  # the last: a fit that has this file is whole
        return result

    def fit_tasks(self, model: MultiTask, arm: Arm, lr: float, seed: int) -> dict[str, list[float]]:
        """Train a model of several tasks in batches with sequences of all of them; not stored.

        Returns the bits per byte of both halves of each task's held-out text, in the model's order.
        If training diverges, they are those of the last weights before it does.

        arm   its base and settings; its task and method are not used
        """
        texts = {task: training_ids(task) for task in model.tasks}
        settings = self.settings(arm, lr, seed)
        least = max(settings.batch_size, len(texts))  # a quick plan's batches are smaller
        _train(model, texts, dataclasses.replace(settings, batch_size=least))
        measured: dict[str, list[float]] = {"tune": [], "report": []}
        for task in model.tasks:
            with model.task(task):
                for part, bits in measured.items():
                    bits.append(self.bits(model, part, task))
        return measured

    def trained(self, arm: Arm, lr: float, seed: int) -> Any:
        """The model after a fit. Not of AdaLoRA, whose factors change their shapes."""
        self.fit(arm, lr, seed)
        arrays = load_file(self._place(arm, lr, seed).with_suffix(".safetensors"))
        model = self.prepare(arm, seed)
        for name, p in model.named_parameters():
            if name in arrays:
                p.data = arrays[name]
        return model.eval()

    def trained_weights(self, arm: Arm, lr: float, seed: int) -> Weights:
        """The weights after a fit, by the base's names: an adapter is merged."""
        model = self.trained(arm, lr, seed)
        plain = model.merge_and_unload() if isinstance(model, PeftModel) else model
        return {name: p.numpy() for name, p in plain.named_parameters()}

    def changes(self, arm: Arm, lr: float, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(W, dW) in float64 of every linear layer, by the name of its weight."""
        before = self.base_weights(arm.base)
        after = self.trained_weights(arm, lr, seed)
        return {
            name: (before[name].astype(float), after[name].astype(float) - before[name])
            for name in linear_names(before)
        }

    def _place(self, arm: Arm, lr: float, seed: int) -> Path:
        content = {
            "arm": arm.identity(),
            "settings": dataclasses.asdict(self.settings(arm, lr, seed)),
            "base": self.base_folder(arm.base).name,
            "held out": self.plan.held_out,
            "version": VERSION,
        }
        return self.folder / "fits" / f"{_key(content)[:32]}.json"


def linear_names(weights: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the weights of linear layers in the blocks."""
    return [name for name in weights if name.endswith("_proj.weight")]


def shuffle_linear(weights: Weights) -> Weights:
    """The weights with the entries of each linear layer in another order: nothing is learnt."""
    rng = np.random.default_rng(0)
    shuffled = {}
    for name in linear_names(weights):
        W = weights[name]
        shuffled[name] = rng.permutation(W.reshape(-1)).reshape(W.shape)
    return weights | shuffled


def adapter_parts(model: PeftModel) -> list[Part]:
    """The factors of every layer's adapter."""
    layers = [m for _, m in model.get_base_model().named_modules() if isinstance(m, LoraLinear)]
    return [layer.adapters["default"].part() for layer in layers]


def interpolate(before: Weights, after: Weights, share: float) -> Weights:
    """W + share dW for every weight."""
    return {n: (W + share * (after[n] - W)).astype(W.dtype) for n, W in before.items()}


@functools.cache
def _held_out(task: str, blocks: int, size: int) -> dict[str, Ids]:
    _, tune, report = documents(task)
    parts = {"tune": tune, "report": report, "prose": documents("prose")[2]}
    return {name: spread(to_ids(part), blocks, size) for name, part in parts.items()}


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _train(
    model: Any, tokens: Text, settings: Settings, held_out: Mapping[str, Ids] | None = None
) -> JsonObject:
    """Train a model, in silence and without files that stay; returns figures as `Bench.fit`."""
    with tempfile.TemporaryDirectory() as folder, silent():
        diverged = False
        try:
            train(model, tokens, settings, folder, held_out=held_out)
        except NonFiniteError:
            diverged = True
        lines = read_log(Path(folder, "log.jsonl"))
        measured = read_log(Path(folder, "eval.jsonl")) if held_out else []
    result: JsonObject = {"first_norm": lines[0]["grad_norm"], "curve": []}
    for line in measured:
        bits = {name: bits_per_byte(loss) for name, loss in line["tasks"].items()}
        result["curve"].append([line["step"], bits["report"], bits["prose"]])
        result |= dict.fromkeys(bits) if diverged else bits
    if measured:
        result["before"] = result["curve"][0][1]
    ranks = [line["ranks"] for line in lines if "ranks" in line]
    return result | ({"ranks": ranks[-1]} if ranks else {})


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Inside, nothing is printed: a run reports its progress, and here it is one of hundreds.

    Neither are warnings: a rate that is too high makes a fit overflow, which its figures say.
    """
    with (
        warnings.catch_warnings(action="ignore"),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
