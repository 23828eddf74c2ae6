"""How the laboratory measures: bases, texts, and arms that are trained on a task.

A base is trained once on English prose. An arm says what is then trained on the task, Python code,
and how; a fit is an arm at one learning rate and one seed, which sets both the start of the adapter
and the order of the data (bench.py). Arms are compared at the same seeds, each at its best rate
(tuning.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..data.batches import Ids
from ..data.texts import Documents, four_tasks, join, prose, python_sources, split_documents
from ..data.tokenizer import ByteTokenizer
from ..formats.disk import JsonObject
from ..models.config import TransformerConfig
from ..training.loop import Settings

VERSION = 1  # of the protocol: raise it when a change here changes numbers
Case = dict[str, Any]  # what is measured: numbers and texts
Row = dict[str, Any]  # a case with its results
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


class BriefPlan(Plan):
    """What an example measures in seconds: one seed, over a base that was trained for 200 steps."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return (0,)

    def shorten(self, settings: Settings) -> Settings:
        return dataclasses.replace(settings, steps=min(settings.steps, 200))


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
SHUFFLED = "shuffled "  # "shuffled NAME": the base with the entries of each linear layer shuffled
FIT = Settings(batch_size=8, context=48, warmup=10, floor=0.1, max_grad_norm=1.0, threads=1)
CODE = "code"  # the task unless an arm has another
MEMORY = "memory "
LORA_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
FULL_RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def find_base(name: str) -> Base:
    """The model and settings of a base, which are the same if it is shuffled."""
    return BASES[name.removeprefix(SHUFFLED)]


# ---- texts ---------------------------------------------------------------------------------------


@functools.cache
def documents(name: str) -> tuple[Documents, Documents, Documents]:
    """(train, tune, report) of a text by name: prose, code, or a task of `four_tasks`.

    A tenth of the bytes is held out, in whole documents. One half of these documents chooses the
    learning rate, and the other is what a result is reported on. "memory N" is N kB of code to
    learn by heart, the same in all parts; names joined by + are texts one after another.
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
        whole = _tasks()[name]
    training, held_out = split_documents(whole)
    tune, report = split_documents(held_out, 0.5, seed=1)
    return training, tune, report


@functools.cache
def _tasks() -> dict[str, Documents]:
    return four_tasks()


@functools.cache
def training_ids(name: str) -> Ids:
    """The text that is trained on."""
    return to_ids(documents(name)[0])


def to_ids(some: Documents) -> Ids:
    return ByteTokenizer().encode(join(some))


@functools.cache
def texts_checksum() -> str:
    """SHA-256 of all texts, which come with Python and differ between its versions."""
    digest = hashlib.sha256()
    for name in ("prose", CODE, *_tasks()):
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
    method    as in training/methods.py, or linear: full training of the linear layers alone, which
              are the ones that adapters change
    fields    the adapter's fields, by PEFT's names
    base      of BASES, perhaps behind SHUFFLED
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
