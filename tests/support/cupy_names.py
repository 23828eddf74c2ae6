"""Which names, and which of their parameters, CuPy has: the list of allowed names in strict_xp.py.

    python tests/support/cupy_names.py      writes cupy_names.json; needs CuPy, but no GPU

Not a test itself. test_strict_xp compares the file with the installed CuPy, if there is one.
"""

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("cupy_names.json")
# The buffer protocol, which NumPy shows since 2.5 and Python since 3.12: it is for C code only.
BUFFER = {"__buffer__", "__release_buffer__"}
COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}


def survey() -> dict[str, Any]:
    """The names in `cupy` and the attributes of `cupy.ndarray`, by kind.

    The parameters of each are one string of names.
    """
    with warnings.catch_warnings():
        # CuPy warns about libraries that only a GPU needs, and about deprecated names.
        warnings.simplefilter("ignore")
        import cupy
        import numpy

        things = {name: getattr(cupy, name) for name in dir(cupy) if not name.startswith("_")}
    names: dict[str, Any] = {"cupy": cupy.__version__, "functions": {}, "ufuncs": [], "others": []}
    for name, thing in things.items():
        if isinstance(thing, cupy.ufunc):
            names["ufuncs"].append(name)
        elif callable(thing) and not isinstance(thing, type):
            names["functions"][name] = _signature(thing)
        else:
            names["others"].append(name)
    members = {name: getattr(cupy.ndarray, name) for name in dir(cupy.ndarray)}
    public = [name for name in members if not name.startswith("_")]
    methods = [name for name in public if callable(members[name])]
    names["methods"] = {name: _signature(members[name]) for name in methods}
    names["operators"] = operators(set(members), set(dir(numpy.ndarray)))
    names["attributes"] = [name for name in public if name not in methods]
    return names


def operators(ours: set[str], numpys: set[str]) -> list[str]:
    """The special methods that two classes of arrays have in common."""
    both = ours & numpys - set(dir(object)) - BUFFER | COMPARISONS
    return sorted(name for name in both if name.startswith("__"))


def _signature(function: Any) -> str:
    """The names of a function's parameters, with `*` and `**` in front of variable ones.

    Compiled functions name them in their docstring only.
    """
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    try:
        parameters = inspect.signature(function).parameters.values()
        names = [stars.get(p.kind, "") + p.name for p in parameters]
    except ValueError:
        text = re.match(r"[\w.]+\(([^)]*)\)", function.__doc__ or "")
        names = ["*args"]
        if text and text[1]:
            names = [part.split("=")[0].split()[-1] for part in text[1].split(",")]
    return " ".join(name for name in names if name not in ("self", "*"))


def as_text(names: dict[str, Any]) -> str:
    """As JSON with one line per kind, so that a diff of two versions shows what changed."""
    lines = [f"{json.dumps(kind)}: {json.dumps(value)}" for kind, value in names.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(as_text(survey()), encoding="utf-8")
    print(f"wrote {FILE}")
