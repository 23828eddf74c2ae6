"""One contract for every method that adds a map theta -> dW to a frozen weight W.

A step of training forms W' = W + dW once for each layer, and its backward pass can form

    G = dL/dW' = dY^T X (O, I)

So a method is a map, its gradient and a few facts. `Map` has them, `MapConfig` its fields:

    shapes         what is trained in a layer of I inputs and O outputs
    init           its first values
    delta          theta, W -> dW (O, I)
    pull           theta, W, G -> dL/dtheta, linear in G
    rank_bound     the most that rank(dW) can be
    reads_W        dW depends on W; then W is the base's own, never a sum so far
    alone          dW multiplies W, so no other adapter of the layer can run or merge beside it
    moves_bias     it changes the bias, too: `moved_bias`, `pull_bias`
    SHARED         tensors that all layers of a model share

Everything else is `MapAdapter`'s, for all of them: training by W + dW, merging, files, counts. A
pull is linear in G, so it is applied to each shard's G, and the gradients are added up in the order
of the shards: the bits do not depend on the number of threads.

theta is a tuple of arrays, the layer's own tensors first and the shared ones after them. The same
lines compute in float32 for a step, on NumPy or CuPy, and in float64 for merging.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ...backend import Array, Shape, backend_of
from ...errors import ConfigError, Rule, check_fields
from ...formats.disk import JsonObject
from ..config import HARMLESS, LoraConfig, is_file_only
from ..targets import pattern_value

Theta = Sequence[Array]
Layers = Mapping[str, Shape]  # (O, I) of each adapted layer by its path

LARGE = 1e30  # first values of this size are a mistake, and float32 holds them

# The fields of LoraConfig that every method has, and those that most have.
COMMON = (
    "target_modules",
    "modules_to_save",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
)
USUAL = ("exclude_modules", "layers_to_transform", "layers_pattern")
# The plan sets these, whatever the method.
SET_BY_PLAN = ("fan_in_fan_out", "extra")


@dataclasses.dataclass
class MapConfig(LoraConfig):
    """The configuration of a map: those of LoraConfig's fields that it has, and its own.

    method       its name for --method
    title        its name in messages
    map          its mathematics
    USES         the fields of LoraConfig that it has besides COMMON
    FIXED        PEFT's fields that have one value here
    IN_TRAINING  PEFT's fields that act in training alone, with the values that do nothing: files
                 may have other ones, and can then be used, but not trained
    DROPOUT      the field with the probability of dropout of the map's input, or ""
    RULES        what its own fields must be
    TARGETS      PEFT's choice of target_modules by type of model, where it differs from LoRA's

    ConfigError for a field that the method does not have.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    map: ClassVar[type[Map]]
    USES: ClassVar[tuple[str, ...]] = USUAL
    FIXED: ClassVar[Mapping[str, Any]] = {}
    IN_TRAINING: ClassVar[Mapping[str, Any]] = {}
    DROPOUT: ClassVar[str] = ""
    RULES: ClassVar[Sequence[Rule]] = ()
    TARGETS: ClassVar[Mapping[str, list[str]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = self.field_names()
        for field in dataclasses.fields(LoraConfig):
            if field.name in fields or field.name in SET_BY_PLAN:
                continue
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = getattr(self, field.name)
            if value != default:
                raise ConfigError(self._unknown(field.name, value))
        check_fields(vars(self), self.RULES)

    @classmethod
    def added_fields(cls) -> list[dataclasses.Field[Any]]:
        """The fields of this method that LoRA does not have."""
        of_lora = {field.name for field in dataclasses.fields(LoraConfig)}
        return [field for field in dataclasses.fields(cls) if field.name not in of_lora]

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the fields that this method has."""
        return (*COMMON, *cls.USES, *(field.name for field in cls.added_fields()))

    @classmethod
    def require_known(cls, fields: Mapping[str, Any]) -> None:
        """ConfigError if one of these fields is not this method's."""
        for name, value in fields.items():
            if name not in cls.field_names():
                raise ConfigError(cls._unknown(name, value))

    @classmethod
    def _unknown(cls, name: str, value: Any) -> str:
        valid = ", ".join(sorted({*cls.field_names(), *cls.FIXED, *cls.IN_TRAINING}))
        return (
            f"{name:.60} = {value!r:.60}: {cls.title} has no such field; its fields are {valid}: "
            "leave it out"
        )

    @classmethod
    def has_tensor(cls, name: str) -> bool:
        """Can a layer have a tensor of this name, or the base's weight beside it?"""
        return name in cls.map.TENSORS or name == "base"

    @property
    def dropout(self) -> float:
        """The probability of dropout of the map's input."""
        return float(getattr(self, self.DROPOUT)) if self.DROPOUT else 0.0

    def factor(self, name: str) -> float:
        """alpha / r of the layer `name`, for the methods that have them; 1 for the others."""
        if "alpha_pattern" not in self.USES:
            return 1.0
        alpha: float = pattern_value(name, self.alpha_pattern, vars(self)["alpha"])
        return alpha / self.rank(name)

    def settle(self, paths: Iterable[str]) -> None:
        """Choose what the configuration leaves open, once the adapted layers are known."""

    def maps(self, layers: Layers) -> dict[str, Map]:
        """The map of each layer. ConfigError for a layer whose shape the method cannot adapt."""
        return {path: self.map(self, path, layers) for path in layers}

    def require_trainable(self, where: str) -> None:
        """ConfigError if training would need what is not computed here."""
        for name, idle in self.IN_TRAINING.items():
            value = self.extra.get(name, idle)
            if value != idle:
                raise ConfigError(
                    f"{where}: {name} = {value!r:.60} would act in training, where "
                    f"{self.title} supports {idle!r} alone: use the adapter without training it, "
                    f"or set {name} to {idle!r}"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "adapter_config.json") -> LoraConfig:
        """See LoraConfig.from_dict; a field that the method does not have raises if it is set."""
        kind = config.get("peft_type")
        if kind != cls.peft_type:
            raise ConfigError(f"{where}: peft_type must be {cls.peft_type!r}, got {kind!r:.200}")
        cls.check_file(config, where)
        names = cls.field_names()
        given = {}
        extra = {}
        for name, value in config.items():
            if name in names and not is_file_only(name, value, cls.peft_type):
                given[name] = value
            elif name in cls.FIXED:
                if value not in (cls.FIXED[name], None):
                    raise ConfigError(
                        f"{where}: {name} = {value!r:.60} is not supported: {cls.title} has "
                        f"{name} = {cls.FIXED[name]!r} here"
                    )
            elif (
                name in cls.IN_TRAINING
                or name in HARMLESS
                or is_file_only(name, value, cls.peft_type)
            ):
                extra[name] = value
            elif name != "peft_type" and value:
                raise ConfigError(f"{where}: {cls._unknown(name, value)}")
        try:
            return cls(**given, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def check_file(cls, config: Mapping[str, Any], where: str) -> None:
        """ConfigError for a file whose tensors have another meaning than those of PEFT 0.21."""

    def to_dict(self) -> JsonObject:
        """Every field that PEFT 0.21 writes for this method."""
        values = {name: getattr(self, name) for name in self.field_names()}
        return {
            "auto_mapping": None,
            "peft_version": "0.21.2",
            "revision": None,
            **self.FIXED,
            **self.IN_TRAINING,
            **values,
            **self.extra,
            "peft_type": self.peft_type,
            "inference_mode": True,
        }


class Map:
    """theta -> dW in one layer: a subclass is a method; see the module's docstring.

    O, I     outputs and inputs of the layer
    r, s     its rank and scaling, for the methods that have them
    layers   (O, I) of all layers that the adapter has
    """

    SUFFIX = ""  # ends the names of its tensors in PEFT's files, after their own
    INSIDE = ""  # follows the layer's path in these names
    TENSORS: tuple[str, ...] = ()  # the names that a layer's own tensors can have
    SHARED: tuple[str, ...] = ()
    SHARED_TRAINS = False  # whether the shared tensors are trained
    reads_W = False
    alone = ""  # why it is alone: completes "adapter 'a' ..."
    moves_bias = False
    starts_as_base = True  # whether dW is zero at first

    def __init__(self, config: MapConfig, path: str, layers: Layers):
        self.config = config
        self.path = path
        self.layers = layers
        self.O, self.I = layers[path]
        self.r = config.rank(path)
        self.s = config.factor(path)
        self._places: dict[Any, Array] = {}

    # ---- what a method defines ----

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the layer's own tensors, by PEFT's names."""
        raise NotImplementedError

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        """First values for `shapes`, in float64."""
        raise NotImplementedError

    def delta(self, theta: Theta, W: Array) -> Array:
        """dW (O, I) in the dtype of theta. W (O, I) is None unless `reads_W`."""
        raise NotImplementedError

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        """dL/dtheta for G = dL/dW' (O, I): one array for each tensor that trains."""
        raise NotImplementedError

    # ---- what it may define ----

    def check(self) -> None:
        """ConfigError for what a file may hold, and a new adapter should not."""

    def shared_shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors SHARED."""
        return {}

    def init_shared(self, rng: np.random.Generator) -> Sequence[Array]:
        """First values for `shared_shapes`."""
        return ()

    @property
    def saves_shared(self) -> bool:
        """Are the shared tensors in the file?"""
        return True

    def moved_bias(self, theta: Theta, b: Array) -> Array:
        """The bias (O,) that the layer has with the map."""
        return b

    def pull_bias(self, theta: Theta, b: Array, db: Array) -> Sequence[Array]:
        """What dL/dtheta gains by `moved_bias` for db = dL/db' (O,)."""
        raise NotImplementedError

    def rank_bound(self, W: Array) -> int:
        """The most that rank(dW) can be over W."""
        return min(self.O, self.I)

    # ---- for all methods ----

    def file_shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors in the adapter's file."""
        return {**self.shapes(), **(self.shared_shapes() if self.saves_shared else {})}

    def on_device(self, like: Array, name: str) -> Array:
        """The attribute `name`, an array on the host, where `like` is; transferred once."""
        key = name, backend_of(like)
        if key not in self._places:
            self._places[key] = key[1].from_numpy(getattr(self, name))
        return self._places[key]


def uniform_fan_in(rng: np.random.Generator, shape: Shape) -> Array:
    """U(-1/sqrt(n), 1/sqrt(n)) in the shape (m, n): PEFT's kaiming_uniform(a = sqrt 5)."""
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape)


def refuse_shape(map: Map, given: str, valid: str) -> ConfigError:
    """The error for a layer that a method cannot adapt as it is configured."""
    return ConfigError(
        f"{map.config.title}: {map.path} is {map.O} x {map.I}, and {given}: {valid}, "
        "or leave the layer out of target_modules"
    )


def refuse_unused(config: MapConfig, field: str, use: str) -> None:
    """ConfigError if a field is set, and only `use` would read it."""
    value = getattr(config, field)
    default = next(f.default for f in dataclasses.fields(config) if f.name == field)
    if value != default:
        raise ConfigError(f"{field} = {value!r:.60} is for {use}: leave it out, or set that too")
