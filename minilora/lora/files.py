"""An adapter's file: its tensors by layer, and whether they fit a base.

The orientation is the paper's: W (O, I), A (r, I), B (O, r). An embedding is a layer like any other
that reads one-hot rows: A (r, V), B (C, r), and its table is W's transpose, as GPT-2's linear
layers are in files.

A file repeats some things: the weight of an embedding or a head that is a target, which must be the
base's, what a tied head has of its embedding, and with bias="all" the biases of saved modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..formats import Checkpoint, SafetensorsFile
from ..formats.adapter import open_adapter
from ..formats.checkpoint import describe_prefix, describe_prefixes, differing_prefixes
from ..formats.disk import quoted
from ..formats.dtypes import FLOATS, round_to, widen
from .adalora import AdaLoraConfig
from .factors import Part
from .hydra import HydraConfig
from .names import ENDINGS, ENDS, PREFIX, TOKENS, TRANSPOSED, keys_without_name, read_config
from .plan import FIRST_EMBEDDINGS, HEAD, Base, Plan, describe_checkpoint, plan_adapter
from .targets import matches

DECODERS = ("model.", "transformer.")  # how names begin in models that nothing was put around

Array = np.ndarray
Read = Callable[[str], Array]  # gives a tensor of the base by its name, such as "lm_head.weight"


# ---- an adapter's folder -------------------------------------------------------------------------


class AdapterFile:
    """PEFT's folder of one adapter, open: use it in a `with` block.

    where      the folder, quoted for messages
    raw        the fields of adapter_config.json
    config     the configuration that they mean
    file       the open tensors, by PEFT's keys
    layers     path -> {"A": key, "B": key, ...}, the keys in the file
    replaced   name of a base's tensor -> key: modules_to_save and trained biases take its place
    tokens     path of an embedding -> key: trainable_token_indices, which replace some of its rows

    FormatError for tensors that are not floats, are unknown, or do not fit each other or the
    configuration.
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        """`check` False leaves it to `fit` to find what is unknown, missing or of another shape."""
        self.where = quoted(folder)
        self.raw, self.file = open_adapter(folder)
        self.layers: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        self.tokens: dict[str, str] = {}
        self.saved_name = "default"  # the adapter's name, where PEFT left it in a key
        try:
            self.file.rename(keys_without_name(self.file.keys()))
            self.config = read_config(self.raw, f"{folder}/adapter_config.json")
            self.file.require_floats(self.file)
            if check:
                self._sort_keys()
                for path in self.layers:
                    self._check_layer(path)
        except BaseException:
            self.file.close()
            raise

    def _sort_keys(self) -> None:
        file = self.file
        copies: dict[str, str] = {}
        for key in file.keys():
            self._sort_key(key, copies)
        for name, key in copies.items():
            trained = self.replaced.get(name)
            if trained is None or not np.array_equal(
                file.read(trained), file.read(key), equal_nan=True
            ):
                raise FormatError(
                    f"{self.where}: {quoted(key)} differs from the bias in modules_to_save"
                )

    def _sort_key(self, key: str, copies: dict[str, str]) -> None:
        name = key.removeprefix(PREFIX)
        ending = next((e for e in ENDINGS if name.endswith(e)), None)
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
            raise FormatError(f"{self.where}: {quoted(key)} is not a tensor of a known adapter")
        if is_token:
            self.tokens[name.removesuffix(f".{TOKENS}")] = key
            return
        if name.endswith(".bias"):  # with bias="all" also those of saved modules, twice
            path, copied, inside = name.partition(".modules_to_save.")
            if copied:
                if inside != "bias":  # what has parts comes after the adapter's name
                    self.saved_name, _, inside = inside.partition(".")
                copies[f"{path}.{inside}"] = key
                return
            if ".original_module." in name:
                return
        if ending is None:
            self.replaced[name.replace(".base_layer.bias", ".bias")] = key
            return
        layer = self.layers.setdefault(name.removesuffix(ending), {})
        part = ENDINGS[ending]
        if part in layer:
            raise FormatError(f"{self.where}: {quoted(key)} repeats {quoted(layer[part])}")
        layer[part] = key

    def _check_layer(self, path: str) -> None:
        config = self.config
        where = f"{self.where}: {path}"
        layer = {part: self.file.shape(key) for part, key in self.layers[path].items()}
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
        return self.layers[path]["A"].endswith(".lora_embedding_A")

    def part(self, path: str) -> Part:
        """dW of a layer as float64 factors, AdaLoRA's diag(E) A being the first.

        HydraLoRA's B has the columns of all its experts.
        """
        tensors = {}
        for part, key in self.layers[path].items():
            if part not in ("base", "route"):
                tensors[part] = self.file.read(key, np.float64)
        A = tensors["A"]
        if "E" in tensors:
            A = A * tensors["E"]
        return Part(A, tensors["B"], float(self.config.scaling(path)), tensors.get("m"))

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


def equal_as_stored(file: SafetensorsFile, key: str, expected: Array) -> bool:
    """Is a tensor of a file `expected`, or what rounding once to the file's dtype makes of it?"""
    stored = file.read_bits(key)
    if stored.shape != expected.shape or file.dtype(key) not in FLOATS:
        return False
    with np.errstate(over="ignore"):
        rounded = round_to(expected.astype(np.float64), file.dtype(key))
    return np.array_equal(widen(stored), widen(rounded), equal_nan=True)


# ---- does it fit a base? -------------------------------------------------------------------------


def fit(adapter: AdapterFile, base: Base, read: Read, warn: bool = True) -> Plan:
    """The adapter's plan over `base`. One FormatError lists everything that does not fit."""
    try:
        plan = plan_adapter(base, adapter.config, adapter.file.keys(), warn)
        wrong = mismatches(adapter, plan, read)
        prefix = _differing_prefix(adapter, plan) if wrong else ""
        if prefix:
            wrong = [prefix, *wrong]
        cause = None
    except ConfigError as error:
        wrong = [str(error)]
        cause = error
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(
            f"{adapter.where}: the adapter does not fit this base: {'; '.join(wrong[:3])}{more}"
        ) from cause
    return plan


def _differing_prefix(adapter: AdapterFile, plan: Plan) -> str:
    """How the adapter's keys differ from the planned ones if only their beginnings do, or "".

    The base is at fault if its own names have a beginning that no model has: `torch.compile`,
    DataParallel and PEFT put one before every name of a model that was not unwrapped.
    """
    keys = adapter.file.keys()
    if all(key.startswith(PREFIX) for key in keys):
        names = [key.removeprefix(PREFIX) for key in keys]
        prefixes = differing_prefixes(names, [key.removeprefix(PREFIX) for key in plan.shapes()])
        if prefixes and prefixes[1] not in ("", *DECODERS):
            wanted, given = prefixes
            return describe_prefixes("the base's", given, wanted)
    return describe_prefix(keys, plan.shapes())


def mismatches_with(
    adapter: AdapterFile, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> list[str]:
    """`mismatches` with a checkpoint, or why the configuration does not fit it."""
    base = describe_checkpoint(checkpoint, config)
    try:
        plan = plan_adapter(base, adapter.config, adapter.file.keys(), warn=False)
    except ConfigError as error:
        return [
            str(error),
            *(f"unknown {path}" for path in adapter.layers if path not in base.layers),
        ]
    return mismatches(adapter, plan, read_base(checkpoint))


def mismatches(adapter: AdapterFile, plan: Plan, read: Read) -> list[str]:
    """The missing and unknown keys, wrong shapes and wrong values of a file, one line for each."""
    file = adapter.file
    keys = dict.fromkeys(file.keys())

    def get(key: str) -> Array | None:
        return file.read(key) if key in keys else None

    expected = plan.shapes()
    copies = repeated(plan, adapter.saved_name, get, read)
    wrong = [f"missing {key}" for key in expected if key not in keys]
    wrong += [f"unknown {key}" for key in keys if key not in expected and key not in copies]
    for key, shape in expected.items():
        if key in keys and file.shape(key) != shape:
            wrong.append(f"{key} is {file.shape(key)}, the base needs {shape}")
    for key, array in copies.items():
        if key in keys and not equal_as_stored(file, key, array):
            wrong.append(f"{key} differs from the base's or from what it repeats")
    return wrong


def repeated(
    plan: Plan, adapter_name: str, get: Callable[[str], Array | None], read: Read
) -> dict[str, Array]:
    """The tensors in PEFT's file that follow from the adapter's others and from the base's.

    get    gives one of the adapter's tensors by its key, or None

    They are the base's embedding and head if they are targets by one of ENDS; a tied head's
    factors, or its copy; and with bias="all" the biases of a module that is saved whole, before and
    after training.
    """
    base = plan.base
    copies: dict[str, Array] = {}
    if _targets_name_an_end(plan):
        for path in plan.targets:
            if path in (base.embedding, base.head):
                copies[f"{PREFIX}{path}.base_layer.weight"] = read(f"{path}.weight")
    if plan.follows:
        head, embedding = (PREFIX + path for path in plan.follows)
        for of_head, of_embedding in TRANSPOSED.items():
            factor = get(f"{embedding}.{of_embedding}")
            if factor is not None:
                copies[f"{head}.{of_head}"] = np.ascontiguousarray(factor.T)
        weight = get(f"{embedding}.weight")
        if weight is not None:
            copies[f"{head}.weight"] = weight
    if plan.config.bias == "all":
        for path in plan.saved:
            for name, _ in base.below(path):
                if name.endswith(".bias"):
                    inside = name.removeprefix(f"{path}.")
                    copies[f"{PREFIX}{path}.original_module.{inside}"] = read(name)
                    trained = get(PREFIX + name)
                    if trained is not None:
                        # PEFT takes the adapter's name out of keys only where it is their end.
                        place = inside if inside == "bias" else f"{adapter_name}.{inside}"
                        copies[f"{PREFIX}{path}.modules_to_save.{place}"] = trained
    return copies


def _targets_name_an_end(plan: Plan) -> bool:
    """Does PEFT save the base's weight of an embedding or a head that is a target?"""
    targets = plan.config.target_modules
    if plan.config.trainable_token_indices is not None or targets is None:
        return False
    if isinstance(targets, str):
        ends = [path for path in plan.targets if path.rpartition(".")[2] in ENDS]
        return any(matches(path, targets) for path in ends)
    return any(name in targets for name in ENDS)


# ---- reading tensors by name ---------------------------------------------------------------------


def base_key(base: Checkpoint, name: str) -> str | None:
    """The key in `base` of the tensor that an adapter calls `name`, or None.

    GPT-2's files come with and without a prefix.
    """
    for key in (name, name.removeprefix("transformer."), f"transformer.{name}"):
        if key in base:
            return key
    return None


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
