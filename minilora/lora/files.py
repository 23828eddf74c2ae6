"""An adapter's file: its tensors by layer, and whether they fit a base.

The orientation is the paper's: W (O, I), A (r, I), B (O, r). An embedding is a layer like any other
that reads one-hot rows: A (r, V), B (C, r), and its table is W's transpose, as GPT-2's linear
layers are in files.

What a configuration leaves open, reading.py decides; what a file repeats, repeats.py recognises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, shorten
from ..formats import Checkpoint, SafetensorsFile
from ..formats.adapter import open_adapter
from ..formats.checkpoint import (
    describe_prefix,
    describe_prefixes,
    differing_prefixes,
    is_stored_transposed,
)
from ..formats.disk import quoted
from ..formats.dtypes import round_to, widen
from .adalora import AdaLoraConfig
from .config import NO_START, LoraConfig, name_of_changed_start
from .factors import Dense, Part
from .hydra import HydraConfig
from .maps import Map, MapConfig
from .maps.adapter import dense_part
from .names import (
    EMBEDDING,
    LINEAR,
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
from .reading import (
    adapted_ranks,
    decoder_of,
    read_fields,
    settle_saved,
    settle_vocabulary,
    targets_from,
    with_vocabulary,
)
from .repeats import Read, is_weight_of_base, keys_of_adapter, names_of_base
from .starts.residual import (
    check_choice,
    find_initial,
    is_left_by_start,
    read_start,
    resolve_start,
    start_of,
    without_start,
)
from .targets.base import DECODERS, FIRST_EMBEDDINGS, HEAD, Base, describe_checkpoint
from .targets.plan import Plan, plan_adapter

SAME_METHOD = "peft_type in adapter_config.json must be that of the tensors"
DECODER_PREFIXES = tuple(f"{decoder}." for decoder in DECODERS)

Array = np.ndarray


# ---- an adapter's folder -------------------------------------------------------------------------


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
            _, found, rest = key.partition(PREFIX)
            renamed = PREFIX + (rest if found else key)
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


# ---- does it fit a base? -------------------------------------------------------------------------


def fit(adapter: AdapterFile, base: Base, read: Read, warn: bool = True) -> Plan:
    """The adapter's plan over `base`, whose vocabulary the adapter may have changed.

    One FormatError lists everything that does not fit.
    """
    plan, wrong, cause = match(adapter, base, read, warn)
    if plan is None or wrong:
        prefix = _differing_prefix(adapter, plan) if plan else ""
        wrong = [prefix, *wrong] if prefix else wrong
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(
            f"{adapter.where}: the adapter does not fit this base: {'; '.join(wrong[:3])}{more}"
        ) from cause
    return plan


def match(
    adapter: AdapterFile, base: Base, read: Read, warn: bool = False
) -> tuple[Plan | None, list[str], ConfigError | None]:
    """(the plan over `base` or None, what does not fit, the error that left no plan or None)."""
    file = adapter.file
    try:
        decoder = decoder_of(file.keys(), base.parameters)
        if decoder:
            adapter.put_into(decoder)
        vocabulary = settle_vocabulary(file, base, read)
        read = reading_first(vocabulary, read)
        resized = with_vocabulary(base, vocabulary)
        if adapter.began:
            resolve_start(adapter, resized, read)
        adapter.config, notes = settle_saved(file, adapter.config, adapter.whole, resized, read)
        plan = plan_adapter(resized, adapter.config, file.keys(), warn)
        plan = plan._replace(vocabulary=vocabulary)
    except ConfigError as error:
        return None, [str(error)], error
    wrong = mismatches(adapter, plan, read)
    if not wrong:
        adapter.keep(plan)
        for name, W in vocabulary.items():
            before = base.parameters[name][0]
            notes.append(f"{name}: the base has {before} tokens and the file {len(W)}: resized")
        for note in (*notes, *plan.notes):
            adapter.note(f"{adapter.where}: {note}")
    return plan, wrong, None


def reading_first(tensors: Mapping[str, Array], read: Read) -> Read:
    """A function that gives these tensors by their names, and others as `read` does."""
    return lambda name: tensors[name] if name in tensors else read(name)


def _differing_prefix(adapter: AdapterFile, plan: Plan) -> str:
    """How the adapter's keys differ from the planned ones if only their beginnings do, or "".

    The base is at fault if its own names have a beginning that no model has: `torch.compile`,
    DataParallel and PEFT put one before every name of a model that was not unwrapped.
    """
    keys = adapter.file.keys()
    if all(key.startswith(PREFIX) for key in keys):
        names = [key.removeprefix(PREFIX) for key in keys]
        prefixes = differing_prefixes(names, [key.removeprefix(PREFIX) for key in plan.shapes()])
        if prefixes and prefixes[1] not in ("", *DECODER_PREFIXES):
            wanted, given = prefixes
            return describe_prefixes("the base's", given, wanted)
    return describe_prefix(keys, plan.shapes())


def mismatches_with(
    adapter: AdapterFile, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> list[str]:
    """`mismatches` with a checkpoint, or why the configuration does not fit it."""
    base = describe_checkpoint(checkpoint, config)
    plan, wrong, _ = match(adapter, base, read_base(checkpoint))
    if plan is None:
        wrong += [f"unknown {path}" for path in adapter.layers if path not in base.layers]
    return wrong


def mismatches(adapter: AdapterFile, plan: Plan, read: Read) -> list[str]:
    """The missing and unknown keys, wrong shapes and wrong values of a file, one line for each."""
    file = adapter.file
    keys = dict.fromkeys(file.keys())
    expected = plan.shapes()
    # A module that only its keys declare may be there in part: the rest stays the base's.
    partial = [path for path in adapter.whole if path in plan.saved]
    optional = {PREFIX + name for path in partial for name, _ in plan.base.below(path)}
    missing = [key for key in expected if key not in keys and key not in optional]
    repeats = {key: _repeats(adapter, key, plan, read) for key in keys if key not in expected}
    wrong = _describe_missing(missing, plan.config.bias)
    if any(key == f"{MODEL_PREFIX}vera_A" for key in missing):
        wrong = [
            "base_model.vera_A and base_model.vera_B are missing, but save_projection is true: "
            "set it to false in adapter_config.json to compute them from projection_prng_key"
        ]
    wrong += [f"unknown {key}" for key, equal in repeats.items() if equal is None]
    for key, shape in expected.items():
        if key in keys and file.shape(key) != shape:
            wrong.append(f"{key} is {file.shape(key)}, the base needs {shape}")
    for key, equal in repeats.items():
        if equal is False:
            wrong.append(f"{key} differs from the base's or from what it repeats")
    return wrong


def _describe_missing(missing: list[str], bias: str) -> list[str]:
    """A line for each missing key; one for all biases if nothing else is missing."""
    if missing and bias != "none" and all(key.endswith(".bias") for key in missing):
        return [
            f"bias = {bias!r}, but {len(missing)} trained biases are missing, such as {missing[0]} "
            "(peft had versions that did not save them): set bias to 'none' in "
            "adapter_config.json to have the base's biases, as peft does, or save it again"
        ]
    return [f"missing {key}" for key in missing]


def _repeats(adapter: AdapterFile, key: str, plan: Plan, read: Read) -> bool | None:
    """Is a tensor equal to what it repeats, in the file or in the base? None if it repeats none."""
    file = adapter.file
    for other, transposed in keys_of_adapter(key, plan.follows):
        if other in file:
            array = file.read(other, np.float64)
            return _equal_as_stored(file, key, array.T if transposed else array)
    for name in names_of_base(key):
        if name in plan.base.parameters:
            path = name.removesuffix(".weight")
            part = None
            if path in plan.targets:
                part = _plain_part(file, path, plan.config)
            transposed = is_stored_transposed(plan.base.model_type, name)
            table = transposed or plan.base.layers[path].kind == "embedding" if part else False
            W = read(name)
            if is_weight_of_base(file, key, W, part, table):
                return True
            is_linear = path in plan.targets and plan.base.layers[path].kind == "linear"
            return is_linear and is_left_by_start(adapter, key, path, W, transposed)
    return None


def _plain_part(file: SafetensorsFile, path: str, config: LoraConfig) -> Part | None:
    """What plain LoRA adds to the layer `path`; None for every other method."""
    for names in (LINEAR, EMBEDDING):
        A, B = (f"{PREFIX}{path}.{names[part]}" for part in "AB")
        if A in file and B in file and not config.use_dora:
            s = float(config.scaling(path))
            return Part(file.read(A, np.float64), file.read(B, np.float64), s)
    return None


def _equal_as_stored(file: SafetensorsFile, key: str, expected: Array) -> bool:
    """Is a tensor of a file `expected`, or what rounding once to the file's dtype makes of it?"""
    stored = file.read_bits(key)
    rounded = round_to(expected, file.dtype(key))
    return np.array_equal(widen(stored), widen(rounded), equal_nan=True)


# ---- reading tensors by name ---------------------------------------------------------------------


def base_key(base: Checkpoint, name: str) -> str | None:
    """The key in `base` of the tensor that an adapter calls `name`, or None.

    Files come with and without the decoder's name.
    """
    bare = [name.removeprefix(prefix) for prefix in DECODER_PREFIXES]
    return next((key for key in (name, *bare, f"transformer.{name}") if key in base), None)


def read_base(base: Checkpoint) -> Read:
    """A function that reads a tensor of a checkpoint by the name that an adapter has for it."""

    def read(name: str) -> Array:
        key = stored_key(base, name)
        if key is None:
            raise FormatError(f"{base.directory!r} has no {name}")
        return base.read(key)

    return read


def stored_key(base: Checkpoint, name: str) -> str | None:
    """The key in `base` where `name` is stored: that of the embedding for a head that is tied."""
    names = [name]
    if name == f"{HEAD}.weight":  # tied if it is missing, so its weight is the embedding's
        names += [f"{path}.weight" for path in FIRST_EMBEDDINGS]
    keys = (base_key(base, alias) for alias in names)
    return next((key for key in keys if key is not None), None)
