"""Modules: parameters with names, in a tree.

A Module is a plain object. Its parameters, sub-modules, and lists or dictionaries of sub-modules
are its attributes, in the order of assignment; nothing is registered. Calling a module computes its
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .autograd import Tensor
from .backend import Array, Backend, backend_of, get_backend
from .display import equal_neighbours, render_module
from .errors import ConfigError, DeviceError


class Parameter(Tensor):
    """A leaf that training may change.

    It requires a gradient unless it is frozen, and cannot require one if it is `fixed`. One that is
    `encoded` is stored in codes or in 16 bits, and cannot be written.
    """

    __slots__ = ()
    fixed = False
    encoded = False
    is_parameter = True

    def __init__(self, data: Array, requires_grad: bool = True):
        super().__init__(data, requires_grad=requires_grad)

    def move(self, backend: Backend, dtype: Any) -> None:
        """Give the parameter new storage, on another device or in another dtype."""
        self._array = backend.from_numpy(self.numpy().astype(dtype, copy=False))
        self.backend = backend
        self.grad = None
        assert self.version is not None
        self.version[0] += 1


class LoadedState(NamedTuple):
    """What `load_state_dict` did not load."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """Anything with parameters. `training` switches dropout, and nothing else.

    A subclass defines what it computes as `__call__` or as `forward`; both names then call it.
    """

    training = True

    def __init_subclass__(cls, **options: Any) -> None:
        """Give the class both names of its computation, if it defines one of them."""
        super().__init_subclass__(**options)
        defined: Any = vars(cls)
        made: Any = cls
        if "forward" in defined and "__call__" not in defined:
            made.__call__ = defined["forward"]
        elif "__call__" in defined and "forward" not in defined:
            made.forward = defined["__call__"]

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} does not say what it computes: define forward(self, x) in class {name}"
        )

    forward = __call__

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of each direct child. Attributes that begin with _ are not children."""
        for name, value in vars(self).items():
            if not name.startswith("_"):
                yield from _modules_in(name, value)

    def __repr__(self) -> str:
        """The tree of modules with their shapes, as torch prints it; equal neighbours once."""
        lines = []
        for names, text, _ in equal_neighbours(self.named_children()):
            count = f"{len(names)} x " if len(names) > 1 else ""
            label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            lines.append(f"({label}): {count}{text}".replace("\n", "\n  "))
        details = self.extra_repr()
        name = type(self).__name__
        if not lines:
            return f"{name}({details})"
        inner = "\n  ".join([details, *lines] if details else lines)
        return f"{name}(\n  {inner}\n)"

    def _repr_html_(self) -> str:
        return render_module(self)

    def extra_repr(self) -> str:
        """What `repr` says of this module itself: by default its parameters."""
        return describe_parameters(self)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module (path "") and all below it, parents first."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter), each parameter once: a tied one under its first path."""
        seen = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def parameters(self) -> Iterator[Parameter]:
        """The parameters of `named_parameters`."""
        for _, parameter in self.named_parameters():
            yield parameter

    def zero_grad(self) -> None:
        """Forget every p.grad."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters on the host, by name; a tied one under each of its names."""
        return {name: np.array(p.numpy()) for name, p in _named_with_ties(self)}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadedState:
        """Copy the values of a `state_dict` into the parameters, in each parameter's dtype.

        state    NumPy's or CuPy's arrays, Tensors, or anything that NumPy makes arrays of
        strict   every parameter and no other name must be in it

        ConfigError, before anything changes, lists all missing and unexpected names and all wrong
        shapes. Without `strict` the names are returned, as from torch.
        """
        return load_parameters(dict(_named_with_ties(self)), state, strict, type(self).__name__)

    def train(self, mode: bool = True) -> Any:
        """Set `training` of this module and all below it; returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Any:
        """`train(False)`."""
        return self.train(False)

    def to(self, device: str | Backend | None = None, dtype: Any = None) -> Any:
        """Move every parameter to a device, or to a float dtype, in place; returns the module."""
        if dtype is not None:
            for _, module in self.named_modules():
                module._check_dtype(np.dtype(dtype))
        for p in self.parameters():
            backend = p.backend if device is None else get_backend(device)
            new_dtype = np.dtype(dtype or p.dtype)
            if backend is not p.backend or p.dtype != new_dtype:
                p.move(backend, new_dtype)
        return self

    def _check_dtype(self, dtype: Any) -> None:
        """ConfigError if this module cannot compute in `dtype`."""

    def set_compute(self, compute: str) -> None:
        """Set the arithmetic of the products with the weights of all linear layers.

        "float32" rounds nothing; "tf32" and "bfloat16" round x and W in y = x W^T, and dy and W in
        dx = dy W, and add up in float32 (precision.py). It is for weights that are frozen: what
        belongs to an adapter is computed in float32, so keep adapters unmerged, whose dW rounding
        W + dW would mostly lose. ConfigError, before anything changes, for another name, and for
        one that rounds in a model in float64.
        """
        for _, child in self.named_children():
            child.set_compute(compute)

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        """The functions to call once before a step's shards run forward over `tokens` positions.

        Any thread may call them, in any order. None means many tokens. Weights must not change
        before `end_step`.
        """
        for _, child in self.named_children():
            yield from child.preparations(tokens)

    def prepare_step(self, tokens: int | None = None) -> None:
        """Compute what the shards of a step share."""
        for prepare in self.preparations(tokens):
            prepare()

    def end_step(self) -> None:
        """Drop what was prepared: the step is over."""
        for _, child in self.named_children():
            child.end_step()


def get_module(model: Module, path: str) -> Any:
    """The module at `path`, which leads through attributes, lists and dictionaries."""
    item: Any = model
    for name in path.split(".") if path else ():
        item = getattr(item, name) if isinstance(item, Module) else item[_key(item, name)]
    return item


def replace_module(model: Module, path: str, module: Module) -> None:
    """Put `module` at `path`. ConfigError for a place that nothing else can be put into."""
    before, _, last = path.rpartition(".")
    parent = get_module(model, before)
    if isinstance(parent, tuple) or not path:
        where = f"{path} is in a tuple" if path else f"{type(model).__name__} is the whole model"
        raise ConfigError(
            f"{where}, where nothing can take its place: use a list, or Sequential(layer, ...)"
        )
    if isinstance(parent, Module):
        setattr(parent, last, module)
    else:
        parent[_key(parent, last)] = module


def _key(items: Any, name: str) -> Any:
    """The index or key under which a list, tuple or dictionary has the module named `name`."""
    return next(key for key in items if str(key) == name) if isinstance(items, dict) else int(name)


def _modules_in(name: str, value: Any) -> Iterator[tuple[str, Module]]:
    """(name, module) of a value that is a module, or that lists, tuples and dictionaries hold."""
    if isinstance(value, Module):
        yield name, value
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _modules_in(f"{name}.{key}", item)


def describe_parameters(module: Module, shapes: bool = True) -> str:
    """The shapes of a module's own parameters, their dtype, device and requires_grad, in words."""
    named = {name: p for name, p in vars(module).items() if isinstance(p, Parameter)}
    texts = [f"{name}={p.shape}" for name, p in named.items()] if shapes else []
    dtypes = dict.fromkeys(str(p.dtype) for p in named.values())
    devices = dict.fromkeys(p.backend.name for p in named.values() if p.backend.name != "cpu")
    trained = dict.fromkeys(str(p.requires_grad) for p in named.values())
    if named:
        texts += [" and ".join(dtypes), *devices, f"requires_grad={' and '.join(trained)}"]
    return ", ".join(texts)


def _named_with_ties(module: Module) -> Iterator[tuple[str, Parameter]]:
    """(name, parameter) of every place that has one: a tied parameter comes several times."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Parameter):
                yield f"{path}.{name}" if path else name, value


def _host_array(value: Any) -> np.ndarray:
    """A Tensor, or an array of any library, as a NumPy array."""
    if isinstance(value, Tensor):
        return value.numpy()
    if hasattr(value, "detach"):  # of another library: NumPy takes it without its gradient alone
        value = value.detach()
    try:
        return backend_of(value).to_numpy(value)
    except DeviceError:  # a list, or an array of another library
        return np.asarray(value)


def load_parameters(
    parameters: Mapping[str, Parameter], state: Any, strict: bool, owner: str
) -> LoadedState:
    """Copy `state` into parameters by name, all or none: see `Module.load_state_dict`.

    owner   whose parameters they are, for messages
    """
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"load_state_dict got {type(state).__name__}: give a dictionary from names to "
            "arrays, as state_dict() returns"
        )
    arrays = {}
    for name in parameters:
        if name in state:
            arrays[name] = _host_array(state[name])
    # A tied parameter needs one of its names.
    given = {id(parameters[name]) for name in arrays}
    missing = [name for name, p in parameters.items() if id(p) not in given]
    unexpected = [str(name) for name in state if name not in parameters]
    problems = []
    for name, array in arrays.items():
        problem = _why_not(array, parameters[name])
        if problem:
            problems.append(f"{name}: {problem}")
    if strict and missing:
        problems.append(f"missing: {', '.join(missing)}")
    if strict and unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    if problems:
        raise ConfigError(
            f"this state does not fit {owner}: {'; '.join(problems)}; "
            "give what state_dict() of an equal module returns"
        )
    for name, array in arrays.items():
        p = parameters[name]
        p.data = p.backend.from_numpy(array.astype(p.dtype))
    return LoadedState(missing, unexpected)


def _why_not(array: np.ndarray, parameter: Parameter) -> str:
    """Why the array cannot be a parameter's value; empty if it can."""
    if parameter.encoded:
        return "is quantised or in 16 bits, so its values cannot be set: load before quantising"
    if array.dtype.kind not in "iuf":
        return f"expected real numbers, got {array.dtype}"
    if array.shape != parameter.shape:
        return f"expected shape {parameter.shape}, got {array.shape}"
    return ""
