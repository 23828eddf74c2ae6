"""A stranger's chat template, run by Jinja in a process of its own that may take only so much.

    python -I rendering.py    a line of JSON in, a line of JSON out, until no more comes

The first line is {"path": sys.path, "template": a text, "given": what it gets by name, "seconds": of processor time}.
Each other is {"messages": [...], "parts": [[how many of them, add_generation_prompt], ...]}, and the answer [the first
part's text, [the length of each part's, where the first begins with it, else null]], or {"error": what went wrong}.

Jinja's sandbox keeps a template from Python. The system keeps it from all else: before it is looked at, this process
loses the right to open a file or (root excepted) start another, and gets limits to its memory and its time. Where a
system has none, whoever waits for the answer ends this process. It imports nothing of minilora: so it starts at once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sys
import traceback
from typing import Any

LIMITS = {
    "RLIMIT_AS": 1 << 30,
    "RLIMIT_FSIZE": 0,
    "RLIMIT_NOFILE": 0,
    "RLIMIT_NPROC": 0,
    "RLIMIT_CORE": 0,
}
SECONDS_A_PART, SECONDS_A_BYTE = (
    0.02,
    1e-6,
)  # that all may take besides: some twenty times what Qwen3's format takes
CHARACTERS, COPIES = (
    1 << 20,
    64,
)  # a text may have: so many, and each of the messages' so many times


def main() -> None:
    lines = iter(sys.stdin.buffer.readline, b"")
    order = json.loads(next(lines))
    sys.path[:] = order["path"]  # that of whoever started this
    try:
        environment, template = sandbox(), None
    except ImportError:
        return answer({"error": " needs the package 'jinja2': pip install -e .[hf]"})
    for name, value in LIMITS.items():
        limit(name, value)
    seconds = order["seconds"]
    for line in lines:
        task = json.loads(line)
        seconds += len(task["parts"]) * (SECONDS_A_PART + SECONDS_A_BYTE * len(line))
        limit("RLIMIT_CPU", math.ceil(seconds))
        try:
            template = template or environment.from_string(order["template"])
            answer(render(template, order["given"], **task))
        except Exception as error:
            answer({"error": said(error)})


def limit(name: str, value: int) -> None:
    """For this process, where the system has such a limit, and no lower one is in force."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def answer(found: Any) -> None:
    sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
    sys.stdout.buffer.flush()


def said(error: Exception) -> str:
    """What went wrong, and in which line of the template."""
    files = (
        "<template>",
        "<unknown>",
    )  # Jinja's names for one that is no file, when it is run and when it is read
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename in files
    ]
    return (f" line {lines[-1]}" if lines else "") + f": {str(error)[:300] or type(error).__name__}"


def render(
    template: Any, given: dict[str, Any], messages: list[Any], parts: list[Any]
) -> tuple[str, list[Any]]:
    most = CHARACTERS + COPIES * sum(len(text) for message in messages for text in message.values())
    whole: str | None = None
    lengths = []
    for count, prompt in parts:
        pieces, size = [], 0
        for piece in template.generate(
            messages=messages[:count], add_generation_prompt=prompt, **given
        ):
            pieces.append(piece)
            if (size := size + len(piece)) > most:
                raise ValueError(f"it writes more than {most:,} characters")
        text = "".join(pieces)
        text.encode()  # half of a surrogate pair is no text
        whole = text if whole is None else whole
        lengths.append(size if whole.startswith(text) else None)
    return whole or "", lengths


def sandbox() -> Any:
    """Jinja as transformers sets it up, but that its clock stands: what a record becomes must not depend on the day it
    is read, or no run could be resumed on the morrow.
    """
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):  # type: ignore[misc, unused-ignore]
        """{% generation %} ... {% endgeneration %}, around what a model is to write: a tag without an effect."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc, unused-ignore]
        """One without the names that Python itself asks an object for, and calls what it finds."""

        def __init__(self, /, *given: Any, **named: Any):
            super().__init__()
            for name, value in dict(*given, **named).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.sandbox.SecurityError(f"a namespace may not have {name!r}")
            super().__setitem__(name, value)

    def tojson(
        x: Any,
        ensure_ascii: Any = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: Any = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def refuse(message: str) -> None:
        raise ValueError(f"the template itself refuses these messages: {message!r}")

    options = {
        "trim_blocks": True,
        "lstrip_blocks": True,
        "extensions": [Generation, jinja2.ext.loopcontrols],
    }
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": refuse, "namespace": Namespace}
    made.globals["strftime_now"] = lambda form: datetime.datetime(2024, 7, 26).strftime(form)
    with contextlib.suppress(
        TypeError
    ):  # imports what Jinja imports late, while files can still be opened
        made.from_string("{{ 'a' + 1 }}").render()
    return made


if __name__ == "__main__":
    main()
