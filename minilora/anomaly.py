"""Anomaly mode: which operation made the first NaN, going forward or backward, and on which line it was called.

Inside `detect_anomaly()` the engine shows every operation to an observer. It looks at the output, and puts a vjp in the
place of the operation's own that looks at the gradients. Outside, an operation pays for one look at a context variable.

Contents: detect_anomaly - what the observer does - explain_non_finite, for a training step that went wrong.
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

# No user's line is in these.
ENGINE = {
    f"minilora.{module}"
    for module in ("anomaly", "autograd", "functional", "effective", "nn", "training.nonfinite")
}


@contextlib.contextmanager
def detect_anomaly(infinities: bool = False, model: Module | None = None) -> Iterator[None]:
    """Inside, the first NaN is an error where it is made, and so is a write into an array that backward will read.

    infinities   an infinity counts like a NaN
    model        name the module, too, in which an operation was called

    NonFiniteError: an operation's output has a NaN and none of its inputs has; or, going backward, a gradient has one
    and the dy it was made from has none. GraphError: an array kept for backward is no longer what it was, which the
    versions see for `tensor.data = ...` and this mode for `tensor.data[0] = ...`, too (by a checksum).

    A graph recorded inside is checked by every backward that walks it. Slow: each array is read again, some twice.
    """
    paths = (
        {}
        if model is None
        else {id(module): path or "the model" for path, module in model.named_modules()}
    )
    token = observer.set(_Observer(infinities, paths))
    try:
        with np.errstate(invalid="ignore"):  # NumPy's warning would say the same, and not where
            yield
    finally:
        observer.reset(token)


class _Observer:
    def __init__(self, infinities: bool, paths: dict[int, str]):
        self.infinities = infinities
        self.paths = paths
        self.from_outside = (
            False  # has a leaf brought a NaN in? From there on no operation is to blame
        )

    def __call__(self, y: Tensor, inputs: tuple[Tensor, ...], vjp: Vjp) -> None:
        xp, name, place = y.backend.xp, _name(vjp), self.place()
        given = any(self.bad(xp, t.data) for t in inputs)
        if self.bad(xp, y.data) and not given:
            blown = not all(all_finite(xp, t.data) for t in inputs)
            raise self.error(xp, y.data, f"the output of {name} {y.shape}", f"made {place}", blown)
        self.from_outside |= given
        if y.node is not None:
            y.node.vjp = self.checked(
                y, [t.requires_grad for t in inputs], vjp, name, f"called {place}", given
            )

    def checked(
        self, y: Tensor, wanted: list[bool], vjp: Vjp, name: str, called: str, given: bool
    ) -> Vjp:
        """A vjp that does what `vjp` does, and looks at what it reads and at what it gives."""
        backend, shape = y.backend, y.shape
        kept = [(array, _checksum(backend, array)) for array in _arrays(vjp, type(y.data))]

        @functools.wraps(vjp)
        def checked(dy: Array) -> tuple[Array | None, ...]:
            xp = backend.xp
            for array, before in kept:
                if _checksum(backend, array) != before:
                    needed = f"an array {array.shape} that the backward of '{name}' needs"
                    raise GraphError(
                        f"{needed} was written to after the forward; the operation was {called}"
                    )
            brought = self.bad(xp, dy)
            if brought and not self.from_outside:  # no vjp made it, or it would have been reported
                what = f"the gradient that reached the output of {name} {shape}, given to backward or a sum of several"
                raise self.error(xp, dy, what, f"which was {called}")
            grads = vjp(dy)
            for i, g in enumerate(grads):
                if g is not None and wanted[i] and self.bad(xp, g) and not (given or brought):
                    what = f"the gradient of input {i} of {name} {tuple(g.shape)}"
                    raise self.error(xp, g, what, f"which was {called}", not all_finite(xp, dy))
            return grads

        return checked

    def bad(self, xp: Any, array: Array) -> bool:
        if self.infinities:
            return not all_finite(xp, array)
        return array.dtype.kind == "f" and bool(xp.isnan(array).any())

    def error(
        self, xp: Any, array: Array, what: str, place: str, blown: bool = False
    ) -> NonFiniteError:
        nan = xp.isnan(array)
        kind = "NaN" if nan.any() else "infinity"
        count = int((~xp.isfinite(array) if self.infinities else nan).sum())
        why = ", from numbers that were infinite" if blown else ""
        return NonFiniteError(
            f"first {kind}: {what}, {count} of {array.size} entries, {place}{why}"[:500]
        )

    def place(self) -> str:
        """The line outside the engine that called this operation; with a model, the innermost module that did."""
        frame, line, module = sys._getframe(2), "", None
        while frame is not None and not (line and (module or not self.paths)):
            if not line and frame.f_globals.get("__name__") not in ENGINE:
                line = f"at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            module = module or self.paths.get(id(frame.f_locals.get("self")))
            frame = frame.f_back  # type: ignore[assignment]
        return f"{line} in {module}" if module else line


def all_finite(xp: Any, array: Array) -> bool:
    return array.dtype.kind != "f" or bool(xp.isfinite(array).all())


def _name(vjp: Vjp) -> str:
    """The operation in which a vjp was defined: 'swiglu' for 'swiglu.<locals>.vjp'."""
    return vjp.__qualname__.split(".<locals>")[-2:][0].split(".")[-1]


def _arrays(item: Any, kind: type) -> Iterator[Array]:
    """Every array that a vjp holds: in its closure, in tuples and lists there, and in functions that it calls."""
    if isinstance(item, kind):
        yield item
    inner = item if isinstance(item, (tuple, list)) else getattr(item, "__closure__", None) or ()
    for i in inner:
        yield from _arrays(getattr(i, "cell_contents", i), kind)


def _checksum(backend: Backend, array: Array) -> int:
    return zlib.crc32(backend.to_numpy(array).tobytes())


# ---- a training step that went wrong --------------------------------------------------------------------------------
