"""The one table of bad and odd inputs, of files and of command lines: how a row is made.

A row says what is built in a folder, how that is opened, and how this must end. A row that ends in
None must be read or must run. KINDS lists the kinds of rows; each has at least one. The rows:

hostile_files      safetensors, JSON, folders of bases and adapters, tokenizers
hostile_bases      the hub's cache, names of models, codes, dtypes, tokenizers with more tokens
hostile_commands   options of the command line, texts, folders
hostile_tools      records, and the commands that turn files into files

tests/cli/test_hostile.py runs all of them. Not a test itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora import (
    AdamW,
    CausalLM,
    LoraConfig,
    PeftModel,
    TransformerConfig,
    get_peft_model,
    gradients,
)
from minilora.data.tokenizer import ByteTokenizer
from minilora.formats import Checkpoint, load_file, save_file
from minilora.functional import cross_entropy

KINDS = dict(
    enumerate(
        """\
an empty file
a file of seven bytes
a header of length 0
a length of 2^64 - 1
a length of 2^63
a length beyond the file or the limit
text that is not UTF-8
a byte order mark
half of a surrogate pair
JSON that is cut or malformed
JSON that is not an object
NaN and infinity in JSON
sizes that are not plain integers
nesting
integers of thousands of digits
small files that would take much memory
the same tensor twice
the same field twice
padding other than spaces at the end
unknown fields
metadata that are not strings
negative sizes
offsets that are not a pair
a gap between tensors
bytes after the last tensor
data that are cut
tensors on the same bytes
tensors that overlap
tensors without elements
no elements, but sides beyond the integers
products that wrap around
too many dimensions
unknown dtypes
sizes that contradict each other
a bool other than 0 and 1
names with a meaning elsewhere
tensors out of alignment
weights that are not finite
a file that changes while it is read
a path that is not a regular file
pickles and files of other formats
an index that leads out of the folder
an adapter for another base
ranks
lora_alpha and lora_dropout
patterns that take very long
target modules
unsupported methods, and code to import
configurations that ask for code
impossible shapes of a model
weights that contradict config.json
tokenizers
texts that are too short or odd
texts that are not UTF-8
a text that changes while it is trained on
numbers on the command line
prompts
output that would overwrite
output that cannot be written
one byte changed anywhere
records to train on
adapters of mlx-lm
adapters that cannot be merged
an interruption while files are written
several tasks in a folder
arguments that are not a command
options that do not fit together
a checkpoint to continue from""".splitlines(),
        start=1,
    )
)

Build = Callable[[Path], object]
Tensors = dict[str, np.ndarray]


@dataclass
class World:
    """The folder of a row, which is the working directory, and a model that must not change."""

    folder: Path
    victim: PeftModel


@dataclass(frozen=True)
class Row:
    kind: int
    name: str
    build: Build  # changes the folder of the row
    open: Callable[[World], object] | str  # a call, or a command line
    ends: type[BaseException] | int | None  # the exact class, or the exit code; None: it is read
    says: tuple[str, ...] = ()  # words of the message
    whole: bool = True  # whether the folder has a base, an adapter and texts before `build`
    worst: bool = False  # run once more with hardly any memory


ROWS: list[Row] = []


def add(
    kind: int, name: str, build: Build, open: Any, ends: Any, *says: str, **options: bool
) -> None:
    ROWS.append(Row(kind, name, build, open, ends, says, **options))


def command(kind: int, line: str, code: int | None, *says: str, build: Build | None = None) -> None:
    """A row of a command line; its name shows the command and the end of the line."""
    shown = repr(line)[1:-1]
    if len(shown) > 60:
        shown = f"{shown[:8]} ... {shown[-45:]}"
    add(kind, shown, build or nothing, line, code, *says)


# ---- the folder of a row -------------------------------------------------------------------------

TINY = "--batch-size 2 --context 16 --threads 1"
SHAPE = "--hidden-size 16 --intermediate-size 24 --num-hidden-layers 1 --num-attention-heads 2"
FINETUNE = f"finetune --base base --data book.txt --out new {TINY}"
PRETRAIN = f"pretrain --data book.txt --out new {TINY} {SHAPE}"
GENERATE = "generate --base base --prompt hi --max-new-tokens 2"
EVALUATE = "evaluate --base base --data book.txt"
MERGE = "merge --base base --adapter adapter --out new"
LONG = "x" * 5000
TEXT = b"the quick brown fox jumps over the lazy dog, again and again. " * 10
LATIN = "ÀÉÎÕÜ äöü ß ".encode("latin-1") * 40
CONFIG = TransformerConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
ADAPTER_KEY = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
BASE_CONFIG = "base/config.json"
BASE_WEIGHTS = "base/model.safetensors"
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
HAS_PROC = Path("/proc/self").exists()
NOWHERE = "/proc/minilora" if HAS_PROC else "book.txt/new"  # a folder that nobody can make


def make_world(folder: Path) -> None:
    """A base, an adapter for it, and texts."""
    CausalLM(CONFIG, seed=1).save_pretrained(folder / "base")
    ByteTokenizer().save(folder / "base")
    save_adapter(folder / "adapter", LORA)
    (folder / "book.txt").write_bytes(TEXT)
    (folder / "latin.txt").write_bytes(LATIN)
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep me")


def save_adapter(folder: Path, config: LoraConfig) -> None:
    """An adapter for the base, whose B is not 0."""
    model = get_peft_model(CausalLM(CONFIG, seed=1), config)
    for parameter in model.adapter_parameters("default").values():
        parameter.data = parameter.data + np.float32(0.01)
    model.save_pretrained(folder)


def make_victim() -> tuple[PeftModel, AdamW]:
    """A model in training: what is loaded beside it and fails must not change it."""
    model = get_peft_model(CausalLM(CONFIG, seed=1), LORA)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = np.arange(12).reshape(2, 6)
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    optimizer.step(gradients(loss, optimizer.params))
    return model, optimizer


# ---- how a folder is changed ---------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """The folder is right; what is wrong is how it is opened."""


def both(first: Build, second: Build) -> Build:
    def build(folder: Path) -> None:
        first(folder)
        second(folder)

    return build


def written(path: str, content: bytes | Callable[[], bytes]) -> Build:
    def build(folder: Path) -> None:
        (folder / path).write_bytes(content if isinstance(content, bytes) else content())

    return build


def edited(path: str, change: Callable[[dict[str, Any]], object]) -> Build:
    """A file of JSON with a change, which is made in place or returned."""

    def build(folder: Path) -> None:
        value = json.loads((folder / path).read_text())
        changed = change(value)
        (folder / path).write_text(json.dumps(value if changed is None else changed))

    return build


def set_to(path: str, **fields: object) -> Build:
    return edited(path, lambda value: value.update(fields))


def changed_tensors(path: str, change: Callable[[Tensors], object]) -> Build:
    def build(folder: Path) -> None:
        tensors = load_file(folder / path)
        change(tensors)
        save_file(folder / path, tensors)

    return build


def with_tensor(path: str, name: str, array: Any) -> Build:
    return changed_tensors(path, lambda tensors: tensors.update({name: np.asarray(array)}))


def broken(path: str, key: str, value: float) -> Build:
    """The last element of the tensor with `key` in its name becomes `value`."""

    def spoil(tensors: Tensors) -> None:
        (name,) = [name for name in tensors if key in name]
        tensors[name].flat[-1] = value

    return changed_tensors(path, spoil)


def cut(path: str, size: int) -> Build:
    return lambda folder: os.truncate(folder / path, size)


def removed(path: str) -> Build:
    return lambda folder: (folder / path).unlink()


def renamed(old: str, new: str) -> Build:
    return lambda folder: (folder / old).rename(folder / new)


def replaced_by_pipe(path: str) -> Build:
    def build(folder: Path) -> None:
        (folder / path).unlink()
        os.mkfifo(folder / path)

    return build


# ---- shards --------------------------------------------------------------------------------------


def split(folder: Path, shards: int = 3) -> dict[str, str]:
    """Rewrite a whole checkpoint as shards; returns the weight map."""
    with Checkpoint(folder) as whole:
        tensors = {key: whole.read(key) for key in whole.keys()}
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, key in enumerate(tensors):
        weight_map[key] = f"model-{1 + i % shards:05}-of-{shards:05}.safetensors"
    for shard in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == shard}
        save_file(folder / shard, part)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def first_shard(shard: str) -> Callable[[Path, dict[str, str]], object]:
    return lambda folder, weight_map: weight_map.update({next(iter(weight_map)): shard})
