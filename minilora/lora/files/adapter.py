"""An adapter's file, read without a model: its tensors by layer, and the configuration they mean.

The orientation is the paper's: W (O, I), A (r, I), B (O, r). An embedding is a layer like any other
that reads one-hot rows: A (r, V), B (C, r), and its table is W's transpose, as GPT-2's linear
layers are in files.

What a configuration leaves open, reading.py decides; whether the file fits a base, fitting.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, FormatError, shorten
from ...formats.adapter import open_adapter
from ...formats.checkpoint import is_stored_transposed
from ...formats.disk import quoted
from ..adalora import AdaLoraConfig
from ..config import NO_START, name_of_changed_start
from ..factors import Dense, Part
from ..hydra import HydraConfig
from ..maps import Map, MapConfig
from ..maps.adapter import dense_part
from ..names import (
    MODEL_PREFIX,
    PREFIX,
    TOKENS,
    base_weight_key,
    describe_tensors,
    find_ending,
    has_tensor,
    keys_without_name,
    map_tensors,
    read_config,
)
from ..starts.residual import (
    check_choice,
    find_initial,
    read_start,
    start_of,
    without_start,
)
from ..targets.plan import Plan
from .reading import (
    adapted_ranks,
    read_fields,
    targets_from,
)

SAME_METHOD = "peft_type in adapter_config.json must be that of the tensors"

Array = np.ndarray


class AdapterFile:
    """PEFT's folder of one adapter, open: use it in a `with` block.

    where      the folder, quoted for messages
    raw        the fields of adapter_config.json, without patterns that cannot be run
    config     the configuration that they mean; `fit` changes it to what it means for a base
    whole      modules that are whole in the file, although modules_to_save does not name them
    of_base    keys of what the file has of the base, besides the weights of targets
    start      PEFT's name of the start that changed the base; "" if the file is plain LoRA by now
    began      the same, whatever became of it
    initial    path -> A0, B0, s of an adapter whose start changed the base
    notes      what was decided for the user, who was warned of each
    file       the open tensors, by PEFT's keys
    layers     path -> {"A": key, "B": key, ...}, the keys in the file
    replaced   name of a base's tensor -> key: modules_to_save and trained biases take its place
    tokens     path of an embedding -> key: trainable_token_indices, which replace some of its rows
    shared     name -> key: tensors that all layers share
    maps       path -> the map of the layer, once `fit` knows the base; {} for methods without maps

    FormatError for tensors that are not floats, are unknown, or do not fit each other or the
    configuration.
    """

    def __init__(
        self,
        folder: str | Path,
        check: bool = True,
        initial: str | Path | None = None,
        base_is: str | None = None,
        over_base: bool = False,
        to_train: bool = False,
        is_initial: bool = False,
    ) -> None:
        """An adapter whose start changed the base is read as plain LoRA: see starts/residual.py.

        check       False leaves it to `fit` to find what is unknown, missing or of another shape
        initial     the folder of the adapter as saved before training; by default the folder
                    `initial` in its own, if that exists
        base_is     "residual" if the base that it meets is the changed one
        over_base   will `fit` be called, with a base from which the start may follow?
        to_train    A and B stay as they are; `initial` has their first values
        is_initial  was it saved before training, and its A and B are wanted?
        """
        self.where = quoted(folder)
        self.initial: dict[str, Part] = {}
        self.to_train = to_train
        raw, self.file = open_adapter(folder)
        self.layers: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        self.tokens: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        self.maps: dict[str, Map] = {}
        self.model_type = ""
        self.of_base: list[str] = []
        self.notes: list[str] = []
        self._is_sorted = check
        try:
            self.file.rename(keys_without_name(self.file.keys()))
            self.raw, self.whole, notes = read_fields(raw, self.file, self.where)
            self.config = read_config(self.raw, f"{folder}/adapter_config.json")
            self.file.require_floats(self.file)
            check_choice(base_is, self.config, initial, self.where)
            if check:
                self._sort_keys()
                for path in self.layers:
                    self._check_layer(path)
            if base_is is not None or is_initial:
                self.config = without_start(self.config)
                self.raw |= NO_START
            self.began = self.start
            if self.began:
                place = find_initial(folder, initial)
                before = AdapterFile(place, check=False, is_initial=True) if place else None
                with before or contextlib.nullcontext():
                    read_start(self, before, over_base)
                if not (self.start or over_base):  # no base to compare with
                    self._hide_changed_weights()
            for note in notes:
                self.note(note)
        except BaseException:
            self.file.close()
            raise

    @property
    def start(self) -> str:
        """PEFT's name of the start that changed the base; "" once the file is plain LoRA."""
        return start_of(self.config)

    @property
    def is_low_rank(self) -> bool:
        """Is what it does to the base it is for of low rank? Not if that became codes."""
        return name_of_changed_start(self.start) != "loftq"

    def note(self, text: str) -> None:
        """Warn of what was decided about this file."""
        self.notes.append(shorten(text))
        warnings.warn(self.notes[-1], stacklevel=4)

    def _hide_changed_weights(self) -> None:
        """Leave out the weights over which it trained: it is LoRA over the base as it was."""
        self.file.hide(map(base_weight_key, self.initial))
        if self._is_sorted:
            self._sort_keys()

    def _sort_keys(self) -> None:
        file = self.file
        self.layers.clear()
        self.replaced.clear()
        self.tokens.clear()
        self.shared.clear()
        self.of_base.clear()
        copies: dict[str, str] = {}
        for key in file.keys():
            self._sort_key(key, copies)
        for name, key in copies.items():
            trained = self.replaced.get(name)
            if trained is None or not np.array_equal(
                file.read(trained), file.read(key), equal_nan=True
            ):
                raise FormatError(
                    f"{self.where}: {quoted(key)} differs from what it repeats, "
                    f"{quoted(trained or PREFIX + name)}"
                )

    def _sort_key(self, key: str, copies: dict[str, str]) -> None:
        name = key.removeprefix(PREFIX)
        ending, part = find_ending(name) or (None, "")
        of_model = key.removeprefix(MODEL_PREFIX)
        if isinstance(self.config, MapConfig) and of_model in self.config.map.SHARED:
            self.shared[of_model] = key
            return
        is_token = name.endswith(f".{TOKENS}")
        unknown = ".lora_" in name or (".token_adapter." in name and not is_token)
        if name == key and ending is not None:
            _, prefix, rest = key.partition(PREFIX)
            renamed = PREFIX + (rest if prefix else key)
            raise FormatError(
                f"{self.where}: {quoted(key)} does not begin with {PREFIX!r}, as PEFT's keys do: "
                f"rename it, perhaps to {quoted(renamed)}, and the others likewise"
            )
        if name == key or (unknown and ending is None):
            advice = f": {SAME_METHOD}" if of_model in map_tensors() else ""
            raise FormatError(
                f"{self.where}: {quoted(key)} is not a tensor of a known adapter{advice}"
            )
        if is_token:
            self.tokens[name.removesuffix(f".{TOKENS}")] = key
            return
        if ".token_adapter." in name or ".original_module." in name:
            self.of_base.append(key)
            return
        path, copied, inside = name.partition(".modules_to_save.")
        if copied:
            if "." in inside:  # what has parts comes after the adapter's name
                inside = inside.partition(".")[2]
            copies[f"{path}.{inside}"] = key
            return
        if ending is None:
            self.replaced[name.replace(".base_layer.bias", ".bias")] = key
            return
        layer = self.layers.setdefault(name.removesuffix(ending), {})
        if part in layer:
            raise FormatError(f"{self.where}: {quoted(key)} repeats {quoted(layer[part])}")
        layer[part] = key

    def _check_layer(self, path: str) -> None:
        config = self.config
        where = f"{self.where}: {path}"
        layer = {part: self.file.shape(key) for part, key in self.layers[path].items()}
        others = [key for part, key in self.layers[path].items() if not has_tensor(config, part)]
        if others:
            raise FormatError(
                f"{where}: {quoted(others[0])} is not a tensor of {config.peft_type}, which has "
                f"{describe_tensors(config)}: {SAME_METHOD}"
            )
        if isinstance(config, MapConfig):
            return
        A = layer.get("A", ())
        B = layer.get("B", ())
        experts = config.experts if isinstance(config, HydraConfig) else 1
        if len(A) != 2 or len(B) != 2 or B[1] != experts * A[0]:
            raise FormatError(f"{where}: lora_A {A} has no lora_B that fits it, but {B or 'none'}")
        if not isinstance(config, AdaLoraConfig):
            if "E" in layer:
                raise FormatError(f"{where}: a lora_E, but not of AdaLoRA")
        elif layer.get("E") != (A[0], 1):
            raise FormatError(f"{where}: lora_A {A} has no lora_E that fits it")
        if not config.use_dora:
            if "m" in layer:
                raise FormatError(f"{where}: a lora_magnitude_vector, but use_dora is false")
        elif layer.get("m") != B[:1]:
            raise FormatError(f"{where}: lora_B {B} has no lora_magnitude_vector that fits it")
        r = config.rank(path)
        if A[0] != r:
            raise FormatError(f"{where}: lora_A is {A}, but adapter_config.json says r = {r}")

    def embeds(self, path: str) -> bool:
        """Does the layer `path` adapt an embedding?"""
        return self.layers.get(path, {}).get("A", "").endswith(".lora_embedding_A")

    def paths(self) -> list[str]:
        """The adapted layers; for a method without tensors of its own in layers, once they fit."""
        return list(self.maps or self.layers)

    def part(self, path: str, W: Array | None = None) -> Any:
        """dW of a layer as float64 factors (`Part`), AdaLoRA's diag(E) A being the first.

        HydraLoRA's B has the columns of all its experts. For a map it is dW itself (`Dense`), over
        the base's weight W (O, I) as it is stored, and only once the file fits a base.
        """
        if isinstance(self.config, MapConfig):
            return self._dense_part(path, W)
        tensors = {}
        for part, key in self.layers[path].items():
            if part not in ("base", "route"):
                tensors[part] = self.file.read(key, np.float64)
        A = tensors["A"]
        if "E" in tensors:
            A = A * tensors["E"]
        return Part(A, tensors["B"], float(self.config.scaling(path)), tensors.get("m"))

    def require_factors(self, what: str) -> None:
        """ConfigError if dW has no factors A and B, which `what` needs."""
        if isinstance(self.config, MapConfig):
            raise ConfigError(
                f"{self.where}: {self.config.title} has no factors A and B, which {what} needs: "
                "merge the adapter, then extract LoRA's factors from the difference to the base"
            )

    def tensor_keys(self, path: str) -> list[str]:
        """The keys of the tensors that dW of a layer is made of."""
        return [*self.layers.get(path, {}).values(), *self.shared.values()]

    def is_transposed(self, path: str) -> bool:
        """Does the base that the file fits store the layer's weight as (I, O)?"""
        return is_stored_transposed(self.model_type, f"{path}.weight")

    def _dense_part(self, path: str, W: Array | None) -> Dense:
        assert isinstance(self.config, MapConfig)
        if path not in self.maps:
            raise ConfigError(
                f"{self.where}: dW of {self.config.title} depends on the base: give its folder"
            )
        return dense_part(self.maps[path], self.theta(path), W)

    def theta(self, path: str) -> list[Array]:
        """The tensors of a layer that its map reads, in float64."""
        one = self.maps[path]
        keys = {**self.layers.get(path, {}), **self.shared}
        arrays = [self.file.read(keys[name], np.float64) for name in one.shapes()]
        if one.saves_shared:
            return arrays + [self.file.read(keys[name], np.float64) for name in one.SHARED]
        made = one.init_shared(np.random.default_rng(0))  # by their seed, so the rng is not read
        return arrays + [np.asarray(value, np.float64) for value in made]

    def rows(self, path: str) -> list[int]:
        """The tokens whose rows of the embedding `path` the adapter replaces."""
        wanted = self.config.trainable_token_indices
        if isinstance(wanted, dict):
            return next((rows for name, rows in wanted.items() if path.endswith(name)), [])
        return wanted or []

    def put_into(self, decoder: str) -> None:
        """Name the layers as a model does that has the decoder as a part: see `decoder_of`."""
        keys = self.file.keys()
        self.file.rename({key: f"{PREFIX}{decoder}.{key.removeprefix(PREFIX)}" for key in keys})
        self.whole = tuple(f"{decoder}.{path}" for path in self.whole)
        self.initial = {f"{decoder}.{path}": factors for path, factors in self.initial.items()}
        ranks = adapted_ranks(self.file)
        if ranks:  # patterns are for the names without the decoder's
            self.config = dataclasses.replace(self.config, **targets_from(ranks))
        self.note(
            f"{self.where}: the keys are those of a model without a head, such as AutoModel: "
            f"{decoder!r} is put before their names"
        )
        if self._is_sorted:
            self._sort_keys()

    def keep(self, plan: Plan) -> None:
        """Forget what only repeats other tensors, once `plan` says so; a tied head has the
        embedding's.
        """
        if not self._is_sorted:
            return
        self._hide_changed_weights()
        self.maps = plan.maps()
        self.model_type = plan.base.model_type
        expected = plan.shapes()
        self.replaced = {name: key for name, key in self.replaced.items() if key in expected}
        self.tokens = {path: key for path, key in self.tokens.items() if key in expected}
        head, embedding = plan.follows or ("", "")
        if embedding in plan.saved:
            self.replaced[f"{head}.weight"] = self.replaced[f"{embedding}.weight"]

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def require_single_adapter(adapters: Sequence[Any], option: str, value: Any) -> Any:
    """The value of an option; ConfigError if it is given for several adapters."""
    if value is not None and len(adapters) > 1:
        raise ConfigError(
            f"{option} {str(value)!r:.100} is for one adapter, got {len(adapters)}: make each "
            "plain first (minilora convert --to plain), or put its first values into its folder, "
            "as `initial`"
        )
    return value
