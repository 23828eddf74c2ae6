"""One contract for every method that adds a map theta -> dW to a frozen weight W.

A step of training forms W' = W + dW once for each layer, and its backward pass can form

    G = dL/dW' = dY^T X (O, I)

So a method is a map, its gradient and a few facts. `Map` has them, `MapConfig` its fields:

    shapes         the tensors theta that a layer (O, I) trains
    init           their first values
    delta          theta, W -> dW (O, I)
    pull           theta, W, G -> dL/dtheta, linear in G
    rank_bound     an upper bound of rank(dW)
    reads_W        dW depends on W, which is then the base's weight without any adapter
    alone          dW multiplies W, so no other adapter of the layer can run or merge beside it
    moves_bias     the bias changes, too: `moved_bias`, `pull_bias`
    SHARED         tensors that all layers of a model share

`MapAdapter` does the rest for all methods: training by W + dW, merging, files, counts. It applies a
pull to the G of each shard, and adds the gradients up in the order of the shards: the bits do not
depend on the number of threads.

theta is a sequence of arrays, first the tensors of the layer, then the shared ones. The same lines
compute in float32 for a step, on NumPy or CuPy, and in float64 for merging.
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
from ..targets.rules import pattern_value

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
    """The configuration of a method: some fields of LoraConfig, and those that it adds.

    method       the method's name for --method
    title        its name in messages
    map          its `Map`
    USES         the fields of LoraConfig that it has besides COMMON
    FIXED        PEFT's fields for which one value is supported, with that value
    IN_TRAINING  PEFT's fields that act only in training, each with the value that does nothing; an
                 adapter with another value can be used, but not trained
    DROPOUT      the name of the field with the dropout probability of the map's input, or ""
    RULES        the valid values of the added fields
    TARGETS      PEFT's target_modules by model_type, where they differ from LoRA's

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
        """The fields of this method that LoraConfig does not have."""
        inherited = {field.name for field in dataclasses.fields(LoraConfig)}
        return [field for field in dataclasses.fields(cls) if field.name not in inherited]

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the fields that this method has."""
        return (*COMMON, *cls.USES, *(field.name for field in cls.added_fields()))

    @classmethod
    def require_known(cls, fields: Mapping[str, Any]) -> None:
        """ConfigError if the method does not have one of these fields."""
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
        """Whether an adapter's file may have a tensor of this name for a layer.

        "base" is the weight of the base's layer, which a file may repeat.
        """
        return name in cls.map.TENSORS or name == "base"

    @property
    def dropout(self) -> float:
        """The dropout probability of the map's input."""
        return float(getattr(self, self.DROPOUT)) if self.DROPOUT else 0.0

    def factor(self, name: str) -> float:
        """The scaling of the layer `name`: alpha / r, or 1 for a method without alpha."""
        if "alpha_pattern" not in self.USES:
            return 1.0
        alpha: float = pattern_value(name, self.alpha_pattern, vars(self)["alpha"])
        return alpha / self.rank(name)

    def settle(self, paths: Iterable[str]) -> None:
        """Set the fields whose defaults depend on the adapted layers `paths`."""

    def maps(self, layers: Layers) -> dict[str, Map]:
        """The map of each layer. ConfigError for a layer whose shape the method cannot adapt."""
        return {path: self.map(self, path, layers) for path in layers}

    def require_trainable(self, where: str) -> None:
        """ConfigError if a field asks for something in training that is not supported."""
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
        """ConfigError for a file whose tensors mean something else than PEFT 0.21's."""

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
    """The map theta -> dW of one layer; each method is a subclass. See the module's docstring.

    O, I     outputs and inputs of the layer
    r, s     its rank and scaling, for the methods that have them
    layers   (O, I) of every adapted layer, by path
    """

    SUFFIX = ""  # ends the names of its tensors in PEFT's files, after their own
    INSIDE = ""  # follows the layer's path in these names
    TENSORS: tuple[str, ...] = ()  # the names that tensors of a layer can have
    SHARED: tuple[str, ...] = ()
    SHARED_TRAINS = False  # whether the shared tensors are trained
    reads_W = False
    alone = ""  # the reason, which completes "adapter 'a' ..."; "" if other adapters can be added
    moves_bias = False
    starts_as_base = True  # whether the first dW is zero

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
        """The shapes of the layer's tensors, without the shared ones, by PEFT's names."""
        raise NotImplementedError

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        """First values for `shapes`, in float64."""
        raise NotImplementedError

    def delta(self, theta: Theta, W: Array) -> Array:
        """dW (O, I) in theta's dtype. W (O, I) is None unless `reads_W`."""
        raise NotImplementedError

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        """dL/dtheta for G = dL/dW' (O, I): one array per trained tensor, in theta's order."""
        raise NotImplementedError

    # ---- what it may define ----

    def check(self) -> None:
        """ConfigError for values that a file may have, but a new adapter may not."""

    def shared_shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors in SHARED, by name."""
        return {}

    def init_shared(self, rng: np.random.Generator) -> Sequence[Array]:
        """First values for `shared_shapes`."""
        return ()

    @property
    def saves_shared(self) -> bool:
        """Whether the file has the shared tensors."""
        return True

    def moved_bias(self, theta: Theta, b: Array) -> Array:
        """b' (O,), the bias of the layer with the adapter."""
        return b

    def pull_bias(self, theta: Theta, b: Array, db: Array) -> Sequence[Array]:
        """The part of dL/dtheta that comes through `moved_bias`, for db = dL/db' (O,)."""
        raise NotImplementedError

    def rank_bound(self, W: Array) -> int:
        """An upper bound of rank(dW) over W (O, I)."""
        return min(self.O, self.I)

    # ---- for all methods ----

    def file_shapes(self) -> dict[str, Shape]:
        """The shapes of the layer's tensors in the adapter's file, with the shared ones."""
        return {**self.shapes(), **(self.shared_shapes() if self.saves_shared else {})}

    def on_device(self, like: Array, name: str) -> Array:
        """The attribute `name`, an array on the host, on the device of `like`; copied once."""
        key = name, backend_of(like)
        if key not in self._places:
            self._places[key] = key[1].from_numpy(getattr(self, name))
        return self._places[key]


def uniform_fan_in(rng: np.random.Generator, shape: Shape) -> Array:
    """U(-1/sqrt(n), 1/sqrt(n)) in the shape (m, n): torch's kaiming_uniform with a = sqrt 5."""
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
