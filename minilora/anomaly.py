"""Anomaly mode: which operation made the first NaN, forward or backward, and on which line.

Inside `detect_anomaly()` the engine shows every operation to an observer. It checks the output, and
replaces the operation's vjp by one that checks the gradients. Outside, an operation pays for one
look at a context variable.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .autograd import Tensor, Vjp, observer
from .backend import Array, Backend
from .errors import GraphError, NonFiniteError
from .nn import Module

# A line in one of these modules is never the user's.
_MODULES = ("anomaly", "attention", "autograd", "effective", "functional", "graph", "losses", "nn")
ENGINE = {f"minilora.{module}" for module in (*_MODULES, "protocols", "training.nonfinite")}


@contextlib.contextmanager
def detect_anomaly(infinities: bool = False, model: Module | None = None) -> Iterator[None]:
    """Inside, the first NaN is an error where it is made; so is a write into an array of the graph.

    infinities   an infinity counts like a NaN
    model        name the module, too, in which an operation was called

    NonFiniteError: an operation's output contains a NaN and none of its inputs does; or, going
    backward, a gradient contains one and the dy it was made from does not. GraphError: an array
    kept for backward has changed, which the versions detect for `tensor.data = ...` and this mode
    for `tensor.data[0] = ...`, too (by a checksum).

    A graph recorded inside is checked by every backward that walks it. Slow: each array is read
    again, some twice.
    """
    modules = () if model is None else model.named_modules()
    paths = {id(module): path or "the model" for path, module in modules}
    token = observer.set(_Observer(infinities, paths))
    try:
        # NumPy's warning would say the same, but not where.
        with np.errstate(invalid="ignore"):
            yield
    finally:
        observer.reset(token)


class _Observer:
    def __init__(self, infinities: bool, paths: dict[int, str]):
        self.infinities = infinities
        self.paths = paths
        # Whether an input of an operation contained a NaN; from then on no operation is to blame.
        self.from_outside = False

    def __call__(self, y: Tensor, inputs: tuple[Tensor, ...], vjp: Vjp) -> None:
        xp = y.backend.xp
        place = self.place()
        given = any(self.is_bad(xp, t.data) for t in inputs)
        if self.is_bad(xp, y.data) and not given:
            what = f"the output of {operation_name(vjp)} {y.shape}"
            finite = all(all_finite(xp, t.data) for t in inputs)
            raise self.error(xp, y.data, what, f"made {place}", finite)
        self.from_outside |= given
        if y.node is not None:
            y.node.vjp = self.checked(y, [t.requires_grad for t in inputs], vjp, place, given)

    def checked(self, y: Tensor, wanted: list[bool], vjp: Vjp, place: str, given: bool) -> Vjp:
        """A vjp that does what `vjp` does, and checks what it reads and what it returns.

        given   whether an input of the operation contained a NaN
        """
        backend = y.backend
        xp = backend.xp
        name = operation_name(vjp)
        output = f"{name} {y.shape}"
        checksums = [
            (array, _checksum(backend, array)) for array in saved_arrays(vjp, type(y.data))
        ]

        @functools.wraps(vjp)
        def checked(dy: Array) -> tuple[Array | None, ...]:
            for array, before in checksums:
                if _checksum(backend, array) != before:
                    raise GraphError(
                        f"an array {array.shape} that the backward of '{name}' needs was "
                        f"written to after the forward; the operation was called {place}"
                    )
            called = f"which was called {place}"
            brought = self.is_bad(xp, dy)
            if brought and not self.from_outside:  # no vjp made it: it would have been reported
                what = f"the gradient that reached the output of {output}"
                raise self.error(xp, dy, f"{what}, given to backward or a sum of several", called)
            grads = vjp(dy)
            if given or brought:
                return grads
            for i, g in enumerate(grads):
                if g is not None and wanted[i] and self.is_bad(xp, g):
                    what = f"the gradient of input {i} of {name} {tuple(g.shape)}"
                    raise self.error(xp, g, what, called, all_finite(xp, dy))
            return grads

        return checked

    def is_bad(self, xp: Any, array: Array) -> bool:
        if self.infinities:
            return not all_finite(xp, array)
        return array.dtype.kind == "f" and bool(xp.isnan(array).any())

    def error(
        self, xp: Any, array: Array, what: str, place: str, finite: bool = True
    ) -> NonFiniteError:
        """The error for `array`; `finite` says whether it was made from finite numbers."""
        nan = xp.isnan(array)
        kind = "NaN" if nan.any() else "infinity"
        count = int((~xp.isfinite(array) if self.infinities else nan).sum())
        why = "" if finite else ", from numbers that were infinite"
        return NonFiniteError(
            f"first {kind}: {what}, {count} of {array.size} entries, {place}{why}"
        )

    def place(self) -> str:
        """The line outside the engine that called this operation.

        With a model, also the innermost module that did.
        """
        frame = sys._getframe(2)
        line = ""
        module = None
        while frame is not None and not (line and (module or not self.paths)):
            if not line and frame.f_globals.get("__name__") not in ENGINE:
                line = f"at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            module = module or self.paths.get(id(frame.f_locals.get("self")))
            frame = frame.f_back  # type: ignore[assignment]
        return f"{line} in {module}" if module else line


def all_finite(xp: Any, array: Array) -> bool:
    """Whether an array contains neither NaN nor infinity."""
    return array.dtype.kind != "f" or bool(xp.isfinite(array).all())


def operation_name(vjp: Vjp) -> str:
    """The operation in which a vjp was defined: 'swiglu' for 'swiglu.<locals>.vjp'."""
    return vjp.__qualname__.split(".<locals>")[-2:][0].split(".")[-1]


def saved_arrays(item: Any, kind: type) -> Iterator[Array]:
    """Every array that a vjp keeps: in its closure, in tuples and lists in it, in what it calls."""
    if isinstance(item, kind):
        yield item
    inner = item if isinstance(item, (tuple, list)) else getattr(item, "__closure__", None) or ()
    for i in inner:
        yield from saved_arrays(getattr(i, "cell_contents", i), kind)


def _checksum(backend: Backend, array: Array) -> int:
    return zlib.crc32(backend.to_numpy(array).tobytes())
