"""An adapter's folder without a model: layers by path, the factors of one at a time, and where they stand in a base.

The orientation is the paper's: W (O, I), A (r, I), B (O, r). An embedding is a layer like any other that reads one-hot
rows: A (r, V), B (d, r), and its table holds W's transpose, as GPT-2's linear layers do in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..formats import Checkpoint, SafetensorsFile
from ..formats.adapter import open_adapter
from ..formats.disk import quoted
from .adalora import AdaLoraConfig
from .factors import Part
from .hydra import HydraConfig
from .names import repeated
from .plan import (
    FIRST_EMBEDDINGS,
    HEAD,
    PREFIX,
    TOKENS,
    Base,
    Plan,
    describe_checkpoint,
    plan_adapter,
    read_config,
)

Array = np.ndarray
# What a key of PEFT's ends in -> what it is.
ENDINGS = {
    ".lora_A.weight": "A", ".lora_A": "A", ".lora_embedding_A": "A",
    ".lora_B.weight": "B", ".lora_B": "B", ".lora_embedding_B": "B",
    ".lora_E": "E", ".lora_magnitude_vector": "m", ".base_layer.weight": "base", ".lora_route.weight": "route",
}  # fmt: skip


class AdapterFile:
    """PEFT's folder of one adapter, open: use it in a `with` block. FormatError for what does not belong together.

    layers     path -> {"A": key, "B": key, ...}, the keys in the file
    replaced   name of a base's tensor -> key: what modules_to_save and trained biases put in its place
    tokens     path of an embedding -> key: what trainable_token_indices put in place of some rows
    originals  name of a base's bias -> key: what bias="all" says again of a module that is saved whole, from before
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        """`check` False leaves it to `fit` to find what is unknown, missing or of another shape."""
        self.where = quoted(folder)
        self.raw, self.file = open_adapter(folder)
        try:
            self.config = read_config(self.raw, f"{folder}/adapter_config.json")
            self.layers: dict[str, dict[str, str]] = {}
            self.replaced: dict[str, str] = {}
            self.tokens: dict[str, str] = {}
            self.originals: dict[str, str] = {}
            self.saved_name = "default"  # the adapter's name, where PEFT left it in a key
            again: dict[str, str] = {}
            if not check:
                return
            for key in self.file.keys():
                self._place(key, again)
            for path in self.layers:
                self._check(path)
            for name, key in again.items():
                if name not in self.replaced or not equal_as_stored(
                    self.file.read(self.replaced[name]), self.file.read(key)
                ):
                    raise FormatError(
                        f"{self.where}: {quoted(key)} is not what modules_to_save has there"
                    )
        except BaseException:
            self.file.close()
            raise

    def _place(self, key: str, again: dict[str, str]) -> None:
        name = key.removeprefix(PREFIX)
        path, copied, inside = name.partition(".modules_to_save.")
        ending = next((e for e in ENDINGS if name.endswith(e)), None)
        strange = ".lora_" in name or (
            ".token_adapter." in name and not name.endswith(f".{TOKENS}")
        )
        if name == key or (ending is None and strange):
            raise FormatError(
                f"{self.where}: {quoted(key)} is not a tensor of an adapter that is known here"
            )
        if name.endswith(f".{TOKENS}"):
            self.tokens[name.removesuffix(f".{TOKENS}")] = key
        elif copied and name.endswith(".bias"):  # of what has parts, after the adapter's name
            if inside != "bias":
                self.saved_name, _, inside = inside.partition(".")
            again[f"{path}.{inside}"] = key
        elif ".original_module." in name and name.endswith(".bias"):
            self.originals[name.replace(".original_module.", ".")] = key
        elif ending is None:
            self.replaced[name.replace(".base_layer.bias", ".bias")] = key
        elif ENDINGS[ending] in self.layers.setdefault(name.removesuffix(ending), {}):
            raise FormatError(f"{self.where}: {quoted(key)} is there twice, under two endings")
        else:
            self.layers[name.removesuffix(ending)][ENDINGS[ending]] = key

    def _check(self, path: str) -> None:
        layer = {part: self.file.shape(key) for part, key in self.layers[path].items()}
        A, B, r = layer.get("A", ()), layer.get("B", ()), self.config.rank(path)
        experts = self.config.experts if isinstance(self.config, HydraConfig) else 1
        where = f"{self.where}: {path}"
        if len(A) != 2 or len(B) != 2 or B[1] != experts * A[0]:
            raise FormatError(f"{where}: lora_A {A} has no lora_B that fits it, but {B or 'none'}")
        adaptive, dora = isinstance(self.config, AdaLoraConfig), self.config.use_dora
        if layer.get("E") != ((A[0], 1) if adaptive else None):
            what = f"lora_A {A} has no lora_E that fits it"
            raise FormatError(f"{where}: {what if adaptive else 'a lora_E, but not of AdaLoRA'}")
        if layer.get("m") != (B[:1] if dora else None):
            what = f"lora_B {B} has no lora_magnitude_vector that fits it"
            raise FormatError(
                f"{where}: {what if dora else 'a lora_magnitude_vector, but use_dora is false'}"
            )
        if A[0] != r:
            raise FormatError(f"{where}: lora_A is {A}, but adapter_config.json says r = {r}")

    def embeds(self, path: str) -> bool:
        """Does the layer `path` adapt an embedding?"""
        return self.layers[path]["A"].endswith(".lora_embedding_A")

    def part(self, path: str) -> Part:
        """dW of a layer as float64 factors; with AdaLoRA's E in A. HydraLoRA's B holds all its experts."""
        layer = {
            name: self.file.read(key, np.float64)
            for name, key in self.layers[path].items()
            if name != "base"
        }
        A = layer["A"] * layer["E"] if "E" in layer else layer["A"]
        return Part(A, layer["B"], float(self.config.scaling(path)), layer.get("m"))

    def rows(self, path: str) -> list[int]:
        """The tokens whose rows of the embedding `path` the adapter replaces."""
        wanted = self.config.trainable_token_indices
        if isinstance(wanted, dict):
            return next((rows for name, rows in wanted.items() if path.endswith(name)), [])
        return wanted or []

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def equal_as_stored(one: Array, other: Array) -> bool:
    """Have two arrays equal numbers, as far as the precision of `one` goes?"""
    return one.shape == other.shape and np.array_equal(one, other.astype(one.dtype), equal_nan=True)


# ---- where an adapter's names stand in a base's files ----


def base_key(base: Checkpoint, name: str) -> str | None:
    """The key in `base` of what an adapter calls `name`, or None: GPT-2's files come with and without a prefix."""
    return next(
        (k for k in (name, name.removeprefix("transformer."), f"transformer.{name}") if k in base),
        None,
    )


def plan_of(adapter: AdapterFile, base: Base, warn: bool = True) -> Plan:
    """The plan of the adapter over `base`. ConfigError if its configuration means nothing there."""
    return plan_adapter(base, adapter.config, adapter.file.keys(), warn)


def mismatches(adapter: AdapterFile, plan: Plan, read: Callable[[str], Array]) -> list[str]:
    """What keeps the adapter's file from being the plan's, one line each: missing and unknown keys, shapes, values.

    read   gives a tensor of the base by its name
    """
    file = adapter.file
    keys = file.keys()
    expected = plan.shapes()
    tensors = _Tensors(file)
    wrong = [f"missing {key}" for key in expected if key not in keys]
    more = repeated(plan, adapter.saved_name, tensors, read)
    wrong += [f"unknown {key}" for key in keys if key not in expected and key not in more]
    for key, shape in expected.items():
        if key in keys and file.shape(key) != shape:
            wrong.append(f"{key} is {file.shape(key)}, the base needs {shape}")
    for key, array in more.items():
        if key in keys and not equal_as_stored(file.read(key), array):
            wrong.append(f"{key} differs from the base's or from what it repeats")
    return wrong


def fit(adapter: AdapterFile, base: Base, read: Callable[[str], Array], warn: bool = True) -> Plan:
    """The adapter's plan over `base`. One FormatError lists everything that does not fit."""
    try:
        plan = plan_of(adapter, base, warn)
        wrong = mismatches(adapter, plan, read)
    except ConfigError as error:
        raise FormatError(
            f"{adapter.where}: the adapter does not fit this base: {error}"
        ) from error
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(
            f"{adapter.where}: the adapter does not fit this base: {'; '.join(wrong[:3])}{more}"
        )
    return plan


def mismatches_with(
    adapter: AdapterFile, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> list[str]:
    """`mismatches` with a checkpoint; one line if the adapter's configuration means nothing there."""
    base = describe_checkpoint(checkpoint, config)
    try:
        plan = plan_of(adapter, base, warn=False)
    except ConfigError as error:
        return [str(error), *(f"unknown {p}" for p in adapter.layers if p not in base.layers)]
    return mismatches(adapter, plan, read_base(checkpoint))


class _Tensors(Mapping[str, Array]):
    """A file's tensors by key, each read when it is asked for."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file = file

    def __getitem__(self, key: str) -> Array:
        if key not in self.file.keys():
            raise KeyError(key)
        return self.file.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


def read_base(base: Checkpoint) -> Callable[[str], Array]:
    """A function that reads a tensor of a checkpoint by the name that an adapter has for it."""

    def read(name: str) -> Array:
        key = base_key(base, name)
        if key is None and name == f"{HEAD}.weight":  # tied, so its weight is the embedding's
            key = next(k for p in FIRST_EMBEDDINGS if (k := base_key(base, f"{p}.weight")))
        if key is None:
            raise FormatError(f"{base.directory!r} has no {name}")
        return base.read(key)

    return read
