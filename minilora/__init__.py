"""minilora: LoRA from scratch in NumPy, to read, to run, and to check.

The public names are listed in `minilora.public`. `minilora.functional`, `minilora.formats` and
`minilora.verify` are modules to import by name; the folder `minilora.training` holds the training
loop.

Nothing is imported until the first of these names is used. So the command line can handle Ctrl-C
before NumPy is imported, which takes most of the time until it starts.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, whose import would take longer than all of this
if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> object:
    """A module of the package, or a public name, for which all public names are imported now."""
    import sys

    module = f"{__name__}.{name}"
    is_special = name.startswith("__")
    try:
        # Before the public names: `from .. import functional` inside the package asks here, too,
        # and may be a part of the import of these very names.
        if name.isidentifier() and not is_special:
            __import__(module)
            return sys.modules[module]
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    names = globals()
    if "__all__" not in names and (not is_special or name == "__all__"):
        from .public import public_names

        names.update(public_names())
        names["__all__"] = list(public_names())
    if name in names:
        return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})  # type: ignore[misc]
