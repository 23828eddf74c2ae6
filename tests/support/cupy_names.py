"""Which names, and which of their parameters, CuPy really has: the allow-list of the stand-in in strict_xp.py.

    python tests/support/cupy_names.py      writes cupy_names.json; needs CuPy, but no GPU

Not a test itself. test_strict_xp compares the file with the CuPy that is installed, where one is.
"""

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("cupy_names.json")


def survey() -> dict[str, Any]:
    """The namespace of `cupy` and the attributes of `cupy.ndarray`, by kind, parameters as one string of names."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about libraries that only a GPU needs, and about names on their way out
        import cupy
        import numpy

        found = {name: getattr(cupy, name) for name in dir(cupy) if not name.startswith("_")}
    names: dict[str, Any] = {"cupy": cupy.__version__, "functions": {}, "ufuncs": [], "others": []}
    for name, thing in found.items():
        if isinstance(thing, cupy.ufunc):
            names["ufuncs"].append(name)
        elif callable(thing) and not isinstance(thing, type):
            names["functions"][name] = _signature(thing)
        else:
            names["others"].append(name)
    members = {name: getattr(cupy.ndarray, name) for name in dir(cupy.ndarray)}
    methods = {name: m for name, m in members.items() if callable(m) and not name.startswith("_")}
    names["methods"] = {name: _signature(m) for name, m in methods.items()}
    compared = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    both = set(members) & set(dir(numpy.ndarray)) - set(dir(object)) | compared
    names["operators"] = sorted(name for name in both if name.startswith("__"))
    names["attributes"] = [
        name for name in members if name not in methods and not name.startswith("_")
    ]
    return names


def _signature(function: Any) -> str:
    """The names of its parameters, `*` and `**` in front where there may be more; compiled ones tell in their help."""
    try:
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        names = [
            stars.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()
        ]
    except ValueError:
        found = re.match(r"[\w.]+\(([^)]*)\)", function.__doc__ or "")
        names = (
            [part.split("=")[0].split()[-1] for part in found[1].split(",")]
            if found and found[1]
            else ["*args"]
        )
    return " ".join(name for name in names if name not in ("self", "*"))


def as_text(names: dict[str, Any]) -> str:
    """As JSON, a kind a line: whoever compares two versions of CuPy sees what came and went."""
    lines = [f"{json.dumps(kind)}: {json.dumps(value)}" for kind, value in names.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(as_text(survey()), encoding="utf-8")
    print(f"wrote {FILE}")
