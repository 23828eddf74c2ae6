"""An adapter's folder without a model: layers by path, the factors of one at a time, and where they stand in a base.

The orientation is the paper's: W (O, I), A (r, I), B (O, r). An embedding is a layer like any other that reads one-hot
rows: A (r, V), B (d, r), and its table holds W's transpose, as GPT-2's linear layers do in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..formats import Checkpoint
from ..formats.adapter import open_adapter
from ..formats.checkpoint import is_stored_transposed
from ..formats.disk import quoted
from . import AdaLoraConfig, HydraConfig, read_config
from .config import DEFAULT_TARGETS
from .factors import Part
from .plan import PREFIX, TOKENS
from .targets import in_layers, matches

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

    def __init__(self, folder: str | Path) -> None:
        self.where = quoted(folder)
        self.raw, self.file = open_adapter(folder)
        try:
            self.config = read_config(self.raw, f"{folder}/adapter_config.json")
            self.layers: dict[str, dict[str, str]] = {}
            self.replaced: dict[str, str] = {}
            self.tokens: dict[str, str] = {}
            self.originals: dict[str, str] = {}
            again: dict[str, str] = {}
            for key in self.file.keys():
                self._place(key, again)
            for path in self.layers:
                self._check(path)
            for name, key in again.items():
                if name not in self.replaced or not same(
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
            again[f"{path}.{inside if inside == 'bias' else inside.partition('.')[2]}"] = key
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


def same(one: Array, other: Array) -> bool:
    """Have two arrays equal numbers, as far as the precision of `one` goes?"""
    return one.shape == other.shape and np.array_equal(one, other.astype(one.dtype), equal_nan=True)


# ---- where an adapter's names stand in a base's files ----


def base_key(base: Checkpoint, name: str) -> str | None:
    """The key in `base` of what an adapter calls `name`, or None: GPT-2's files come with and without a prefix."""
    return next(
        (k for k in (name, name.removeprefix("transformer."), f"transformer.{name}") if k in base),
        None,
    )


def lies_transposed(adapter: AdapterFile, path: str, model_type: str) -> bool:
    """Do the files of the base hold the transpose of the layer's W (O, I)? Its name tells; a square shape could not."""
    return adapter.embeds(path) or is_stored_transposed(model_type, f"{path}.weight")


def mismatches(adapter: AdapterFile, base: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """What keeps an adapter from fitting a base, a line each: names that one of them lacks, shapes that differ."""
    return list(_mismatches(adapter, base, str(config.get("model_type"))))


def _mismatches(adapter: AdapterFile, base: Checkpoint, kind: str) -> Iterator[str]:
    tied = "lm_head.weight" not in base
    for path, layer in adapter.layers.items():
        key = base_key(base, f"{path}.weight")
        O, I = adapter.file.shape(layer["B"])[0], adapter.file.shape(layer["A"])[1]
        shape = (I, O) if lies_transposed(adapter, path, kind) else (O, I)
        if key is None:
            if not (tied and path == "lm_head"):
                yield f"unknown {path}"
        elif base.shape(key) != shape:
            yield f"{path}: the adapter is for {shape}, the base has {base.shape(key)}"
    for name, key in adapter.replaced.items():
        there = base_key(base, name)
        if there is None:
            if not (tied and name == "lm_head.weight"):
                yield f"unknown {name}"
        elif base.shape(there) != adapter.file.shape(key):
            yield f"{name} is {adapter.file.shape(key)}, the base has {base.shape(there)}"
    for name, key in adapter.originals.items():
        there = base_key(base, name)
        if there is None or not same(adapter.file.read(key), base.read(there)):
            yield f"{key.removeprefix(PREFIX)} is another one in the base"
    for path, key in adapter.tokens.items():
        there, rows = base_key(base, f"{path}.weight"), adapter.rows(path)
        V, d = base.shape(there) if there else (0, 0)
        if adapter.file.shape(key) != (len(rows), d) or max(rows, default=V) >= V:
            yield f"{path}: {adapter.file.shape(key)} for {len(rows)} tokens, the base has {(V, d)}"
    yield from (
        f"missing {path}" for path in targets(adapter, base, kind) if path not in adapter.layers
    )
    config = adapter.config
    if config.bias != "none":
        for path in adapter.layers:
            if base_key(base, f"{path}.bias") and f"{path}.bias" not in adapter.replaced:
                yield f"missing {path}.base_layer.bias"
    for name in config.modules_to_save or ():
        if not any(_is_inside(key, (name,)) for key in adapter.replaced):
            yield f"missing what modules_to_save calls {name!r:.99}"


def targets(adapter: AdapterFile, base: Checkpoint, model_type: str) -> list[str]:
    """The paths of the base's matrices that the adapter's configuration means; none where it says "all-linear"."""
    config = adapter.config
    if config.target_modules is None and adapter.tokens:
        return []
    wanted = (
        DEFAULT_TARGETS.get(model_type, [])
        if config.target_modules is None
        else config.target_modules
    )
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return []
    paths = [key.removesuffix(".weight") for key in base.keys() if key.endswith(".weight")]
    paths = [path for path in paths if len(base.shape(f"{path}.weight")) == 2]
    if model_type == "gpt2":  # in an adapter's names the prefix always is
        paths = [
            f"transformer.{path.removeprefix('transformer.')}"
            for path in paths
            if path != "lm_head"
        ]
    saved = tuple(config.modules_to_save or ())
    found = [p for p in paths if matches(p, wanted) and not _is_inside(f"{p}.weight", saved)]
    where = config.layers_to_transform, config.layers_pattern
    found = [
        p for p in found if (not isinstance(wanted, str) and p in wanted) or in_layers(p, *where)
    ]
    return [
        p for p in found if not config.exclude_modules or not matches(p, config.exclude_modules)
    ]


def _is_inside(key: str, names: tuple[str, ...]) -> bool:
    """Is the tensor `key` one of a module whose path ends in one of `names`, or of a part of it?"""
    parts = key.split(".")
    return any(".".join(parts[:i]).endswith(names) for i in range(1, len(parts)))
