"""How the laboratory measures: bases, texts, and arms that are trained on a task.

A base is trained once on English prose. An arm says what is then trained on the task, Python code,
and how; a fit is an arm at one learning rate and one seed, which sets both the start of the adapter
and the order of the data. Arms are compared at the same seeds, each at its best rate (tuning.py).

Bases and fits are stored in the laboratory's folder and made once, by whichever experiment needs
them first. What is computed depends on the arm, the rate and the seed alone: never on the folder,
on the number of workers, or on what was there before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..data.batches import Ids
from ..data.texts import Documents, four_tasks, join, prose, python_sources, split_documents
from ..data.tokenizer import ByteTokenizer
from ..errors import NonFiniteError
from ..formats import load_file, read_json, save_file, write_json
from ..formats.disk import JsonObject
from ..formats.folders import new_folder
from ..lora import PeftModel, get_peft_model
from ..models.config import TransformerConfig
from ..models.transformer import CausalLM
from ..nn import Linear
from ..quant.linear import quantize
from ..training.checkpoints import read_log
from ..training.loop import Settings, bits_per_byte, evaluate, train
from ..training.methods import adapter_config
from ..training.run import Text

VERSION = 1  # of the protocol: raise it when a change here changes numbers
Weights = dict[str, np.ndarray]
T = TypeVar("T")

# ---- sizes ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured. A quick one shows that everything runs, and no more."""

    quick: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        return (0, 1) if self.quick else (0, 1, 2)

    @property
    def extensions(self) -> int:
        """How often a grid of rates is extended because the best one is at its edge."""
        return 0 if self.quick else 8

    @property
    def held_out(self) -> tuple[int, int]:
        """(blocks, bytes per block) of a held-out text: see `spread`."""
        return (1, 96) if self.quick else (24, 480)

    def shorten(self, settings: Settings) -> Settings:
        """The settings, or three small steps of them."""
        if not self.quick:
            return settings
        return dataclasses.replace(settings, steps=min(settings.steps, 3), batch_size=2)

    def pick(self, values: Sequence[T], most: int = 1) -> Sequence[T]:
        """The values; of a quick plan the first ones alone."""
        return values[:most] if self.quick else values


@dataclasses.dataclass(frozen=True)
class Base:
    """A model and how it is trained on prose; `fit_steps` is the length of a fit on top of it."""

    model: TransformerConfig
    pretrain: Settings
    fit_steps: int


def _shape(hidden: int, intermediate: int, layers: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )


_PRETRAIN = Settings(steps=1500, batch_size=16, context=48, lr=3e-3, weight_decay=0.1, threads=1)
BASES = {
    "micro": Base(_shape(64, 192, 2), _PRETRAIN, 160),
    "mid": Base(_shape(96, 288, 3), dataclasses.replace(_PRETRAIN, steps=900, context=64), 240),
    "narrow": Base(_shape(32, 96, 2), _PRETRAIN, 160),
    "wide": Base(_shape(128, 384, 2), _PRETRAIN, 160),
}
FIT = Settings(batch_size=8, context=48, warmup=10, floor=0.1, max_grad_norm=1.0, threads=1)
LOST = 99.0  # bits per byte that stand for a loss which is not finite
CODE = "code"  # the task unless an arm has another
MEMORY = "memory "
LORA_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
FULL_RATES = (5e-4, 1e-3, 2e-3, 4e-3)

# ---- texts ---------------------------------------------------------------------------------------


@functools.cache
def documents(name: str) -> tuple[Documents, Documents, Documents]:
    """(train, tune, report) of a text by name: prose, code, or a task of `four_tasks`.

    A tenth of the bytes is held out, in whole documents. One half of these documents chooses the
    learning rate, and the other is what a result is reported on. Of "memory N", which are N kB of
    code to learn by heart, all parts are the same; names joined by + are texts one after another.
    """
    if "+" in name:
        several = [documents(one) for one in name.split("+")]
        training, tune, report = (
            list(itertools.chain.from_iterable(parts)) for parts in zip(*several, strict=True)
        )
        return training, tune, report
    if name.startswith(MEMORY):
        text = join(documents(CODE)[0])[: 1000 * int(name.removeprefix(MEMORY))]
        return ([(name, text)],) * 3
    if name == "prose":
        whole = prose()
    elif name == CODE:
        whole = python_sources(1_000_000)
    else:
        whole = four_tasks()[name]
    training, held_out = split_documents(whole)
    tune, report = split_documents(held_out, 0.5, seed=1)
    return training, tune, report


@functools.cache
def training_ids(name: str) -> Ids:
    """The text that is trained on."""
    return _to_ids(documents(name)[0])


def _to_ids(some: Documents) -> Ids:
    return ByteTokenizer().encode(join(some))


@functools.cache
def texts_checksum() -> str:
    """SHA-256 of all texts, which come with Python and differ between its versions."""
    digest = hashlib.sha256()
    for name in ("prose", CODE, *four_tasks()):
        for part in documents(name):
            digest.update(hashlib.sha256(join(part)).digest())
    return digest.hexdigest()


def spread(ids: Ids, blocks: int, size: int) -> Ids:
    """Up to `blocks` blocks of `size` ids, spread evenly over a text."""
    count = max(1, len(ids) // size)
    blocks = min(count, blocks)
    starts = (np.arange(blocks) * count // blocks * size).tolist()
    return np.concatenate([ids[start : start + size] for start in starts])


# ---- arms ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained, and how: one line of a comparison.

    name      in rows and pictures; it does not change what is computed
    method    lora, dora, adalora or full (training/methods.py), or linear: full training of the
              linear layers alone, which are the ones that adapters change
    fields    the adapter's fields, by PEFT's names
    base      of BASES
    task      the text that it learns
    quantize  how the frozen base is stored
    settings  fields of Settings that differ from FIT, such as steps, optimizer and warmup
    rates     the first grid of learning rates, rising by factors of two
    """

    name: str
    method: str = "lora"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: str = "micro"
    task: str = CODE
    quantize: str = "none"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rates: Sequence[float] = LORA_RATES

    def identity(self) -> JsonObject:
        """What the arm computes, without its name and its grid, which do not change a fit."""
        content = dataclasses.asdict(self)
        del content["name"], content["rates"]
        return content


def lora(r: int, name: str = "", **others: Any) -> Arm:
    """LoRA of rank r on all linear layers, with alpha = 32 for every rank."""
    fields = {"r": r, "lora_alpha": 32, "target_modules": "all-linear"} | others.pop("fields", {})
    return Arm(name or f"LoRA r={r}", fields=fields, **others)


def full(name: str = "full", method: str = "linear", **others: Any) -> Arm:
    """Training without an adapter; "linear": of the weights that an adapter would change."""
    return Arm(name, method=method, rates=FULL_RATES, **others)


# ---- the bench -----------------------------------------------------------------------------------


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
        base = BASES[name]
        content = {"model": base.model.to_dict(), "pretrain": dataclasses.asdict(base.pretrain)}
        return self.folder / "bases" / f"{name}-{_key(content | {'texts': texts_checksum()})[:12]}"

    def make_base(self, name: str) -> Path:
        """Train the base on prose with seed 0, unless its folder has it; returns the folder."""
        folder = self.base_folder(name)
        if (folder / "config.json").exists():
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
            self.make_base(name)
            model = CausalLM.from_pretrained(self.base_folder(name))
            self._bases[name] = {key: p.numpy() for key, p in model.named_parameters()}
        return self.model_with(name, self._bases[name])

    def base_weights(self, name: str) -> Weights:
        """The base's weights by name; do not change them."""
        self.base(name)
        return self._bases[name]

    def model_with(self, name: str, weights: Mapping[str, np.ndarray]) -> CausalLM:
        """A model of the base's shape with these weights."""
        model = CausalLM(BASES[name].model, seed=None)
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
        if arm.quantize != "none":
            quantize(model, arm.quantize)
        if arm.method == "linear":
            for p in model.parameters():
                p.requires_grad = False
            for path, module in model.named_modules():
                if isinstance(module, Linear) and path != "lm_head":
                    module.weight.requires_grad = True
            return model
        config = adapter_config(arm.method, arm.quantize, arm.fields, self.settings(arm).steps)
        return model if config is None else get_peft_model(model, config, seed=seed)

    def settings(self, arm: Arm, lr: float = 1e-3, seed: int = 0) -> Settings:
        given = {"steps": BASES[arm.base].fit_steps, "lr": lr, "seed": seed} | dict(arm.settings)
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
        base = self.base_folder(arm.base).name
        content = {"arm": arm.identity(), "lr": lr, "seed": seed, "base": base, "version": VERSION}
        return self.folder / "fits" / f"{_key(content)[:32]}.json"


def linear_names(weights: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the weights of linear layers in the blocks."""
    return [name for name in weights if name.endswith("_proj.weight")]


def interpolate(before: Weights, after: Weights, share: float) -> Weights:
    """W + share dW for every weight."""
    return {n: (W + share * (after[n] - W)).astype(W.dtype) for n, W in before.items()}


@functools.cache
def _held_out(task: str, blocks: int, size: int) -> dict[str, Ids]:
    _, tune, report = documents(task)
    parts = {"tune": tune, "report": report, "prose": documents("prose")[2]}
    return {name: spread(_to_ids(part), blocks, size) for name, part in parts.items()}


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
