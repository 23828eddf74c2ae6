"""A layer or a block, recorded while it computes: every operation and what it holds for backward.

The engine shows each operation to an observer, with its inputs and its vjp. What backward needs are
the arrays in the vjp's closure, and so the bytes that an operation keeps can be counted exactly.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from ..anomaly import operation_name, saved_arrays
from ..autograd import Tensor, Vjp, observer
from ..errors import ConfigError
from ..graph import owner_of
from ..lora.names import PREFIX
from ..nn import Module, Parameter
from .graphs import CONSTANT, INPUT, OPERATION, OUTPUT, PARAMETER, Edge, Graph, Vertex

Buffers = dict[int, int]  # size in bytes of the memory of arrays, by id of the array that owns it


class Operation(NamedTuple):
    """One call of an operation.

    module    path of the innermost module that called it; None: it is outside of what is recorded
    buffers   the memory that it refers to until backward
    """

    name: str
    module: str | None
    y: Tensor
    inputs: tuple[Tensor, ...]
    buffers: Buffers
    arrays: list[Any]  # keeps the ids of `buffers` valid


def record_graph(model: Any, path: str, *inputs: Any, title: str | None = None) -> Graph:
    """The graph of what the module at `path` computes in model(*inputs).

    model    any Module, also a PeftModel; it is recorded as it is, in training or evaluation mode,
             and after `prepare_step` as a training step computes it
    path     of the module in the model, or in the model inside a PeftModel; "" is all of it
    inputs   arrays and Tensors, of which the model gets copies

    The model runs twice. Memory that both runs refer to belongs to the model: weights, and tables
    such as those of rotary positions. What is left was made by the forward, and it is that which
    is kept for backward. ConfigError for a path without a module, or one that computes nothing.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(inner.named_modules())
    path = path.removeprefix(PREFIX)
    if path not in modules:
        nearest = difflib.get_close_matches(path, modules, 1, cutoff=0.3)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(
            f"{type(inner).__name__} has no module {path!r:.200}: {hint}"
            "Its modules are those of named_modules()"
        )
    scope = modules[path]
    runs = [_record(model, scope, inputs) for _ in range(2)]
    persistent = _all_buffers(runs[0]).keys() & _all_buffers(runs[1]).keys()
    if not any(operation.module is not None for operation in runs[1]):
        raise ConfigError(
            f"nothing is computed inside {path!r:.200}: name a module that runs by itself, "
            "such as the one around it"
        )
    builder = _Builder(inner, path, scope, runs[1], persistent)
    for operation in builder.operations:
        builder.add_operation(operation)
    builder.add_outputs()
    shown = path or type(inner).__name__
    return Graph(title or shown, builder.vertices, builder.edges)


# ---- while the model runs ------------------------------------------------------------------------


def _record(model: Any, scope: Module, inputs: tuple[Any, ...]) -> list[Operation]:
    """All operations of one run, in their order."""
    recorder = _Recorder(scope)
    token = observer.set(recorder)
    try:
        model(*map(_copy, inputs))
    finally:
        observer.reset(token)
    return recorder.operations


def _copy(value: Any) -> Any:
    """A copy of an array or a Tensor, so that its memory is not the caller's."""
    if isinstance(value, Tensor):
        return Tensor(value.data.copy(), value.requires_grad)
    return value.copy() if hasattr(value, "dtype") else value


class _Recorder:
    """Gets every operation from the engine: see `graph.observer`."""

    def __init__(self, scope: Module):
        self.paths = {id(module): path for path, module in scope.named_modules()}
        self.operations: list[Operation] = []

    def __call__(self, y: Tensor, inputs: tuple[Tensor, ...], vjp: Vjp) -> None:
        arrays = []
        if y.node is not None:
            arrays = [owner_of(array) for array in saved_arrays(vjp, type(y.data))]
        buffers = {id(array): int(array.nbytes) for array in arrays}
        operation = operation_name(vjp), self._calling_module(), y, inputs, buffers, arrays
        self.operations.append(Operation(*operation))

    def _calling_module(self) -> str | None:
        """The path of the innermost recorded module among the callers."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            path = self.paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
            frame = frame.f_back
        return None


def _all_buffers(operations: list[Operation]) -> Buffers:
    buffers: Buffers = {}
    for operation in operations:
        buffers |= operation.buffers
    return buffers


# ---- afterwards ----------------------------------------------------------------------------------


class _Builder:
    """Vertices and edges, made from the operations inside one module.

    persistent   ids of memory that belongs to the model
    """

    def __init__(
        self,
        model: Any,
        path: str,
        scope: Module,
        operations: list[Operation],
        persistent: Collection[int],
    ):
        self.operations = [o for o in operations if o.module is not None]
        self.others = [o for o in operations if o.module is None]
        self.modules = dict(scope.named_modules())
        self.persistent = persistent
        self.names: dict[int, str] = {}  # of parameters inside the module, by id
        prefix = f"{path}." if path else ""
        for name, parameter in model.named_parameters():
            self.names[id(parameter)] = name.removeprefix(prefix)
        self.read = {id(tensor) for o in self.operations for tensor in o.inputs}
        self.vertices: list[Vertex] = []
        self.edges: list[Edge] = []
        self.numbers: dict[int, int] = {}  # of a vertex, by id of its Tensor
        self.counted: set[int] = set()  # ids of memory that counts for an operation already

    def add_operation(self, operation: Operation) -> None:
        """Add an operation, after what it reads."""
        y = operation.y
        sources = [(self._number_of(t), t.requires_grad) for t in operation.inputs]
        sources += [(self._number_of(p), False) for p in self._weights_as_codes(operation)]
        made = {key: n for key, n in operation.buffers.items() if key not in self.persistent}
        new = sum(n for key, n in made.items() if key not in self.counted)
        self.counted |= made.keys()
        memory = new, sum(made.values()) - new
        number = self._add(y, OPERATION, operation.name, operation.module or "", *memory)
        for source, requires_grad in dict(sources).items():
            self.edges.append(Edge(source, number, requires_grad and y.requires_grad))

    def _weights_as_codes(self, operation: Operation) -> Iterator[Parameter]:
        """The weights in few bits that the operation's module has: it reads their codes."""
        module = self.modules[operation.module or ""]
        for parameter in vars(module).values():
            is_fixed = isinstance(parameter, Parameter) and parameter.fixed
            if is_fixed and all(parameter is not tensor for tensor in operation.inputs):
                yield parameter

    def add_outputs(self) -> None:
        """Add what is read outside of the module, or by nothing."""
        read_outside = {id(tensor) for o in self.others for tensor in o.inputs}
        for y in [operation.y for operation in self.operations]:
            if id(y) in read_outside or id(y) not in self.read:
                number = self.numbers[id(y)]
                self._add(y, OUTPUT, OUTPUT, "")
                self.edges.append(Edge(number, len(self.vertices) - 1, y.requires_grad))

    def _number_of(self, tensor: Tensor) -> int:
        """The vertex of what an operation reads, added if it is new."""
        number = self.numbers.get(id(tensor))
        if number is not None:
            return number
        if id(tensor) in self.names:
            return self._add_parameter(tensor)
        is_constant = tensor.node is None and not tensor.requires_grad and tensor.ndim == 0
        kind = CONSTANT if is_constant else INPUT
        return self._add(tensor, kind, kind, "")

    def _add_parameter(self, tensor: Tensor) -> int:
        module, _, name = self.names[id(tensor)].rpartition(".")
        return self._add(tensor, PARAMETER, name, module)

    def _add(self, tensor: Tensor, kind: str, name: str, module: str, *memory: int) -> int:
        """Add a vertex for the value of a tensor; returns its number."""
        stored = getattr(tensor, "quantized", None)  # codes, of which `data` would be decoded
        dtype = str(tensor.dtype if stored is None else stored.kind)
        nbytes = tensor.data.nbytes if stored is None else stored.nbytes
        number = len(self.vertices)
        details = tensor.shape, dtype, int(nbytes), tensor.requires_grad
        self.vertices.append(Vertex(kind, name, module, *details, *memory))
        self.numbers.setdefault(id(tensor), number)
        return number
