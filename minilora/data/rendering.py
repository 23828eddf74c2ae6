"""A chat template of unknown origin, run by Jinja in a process of limited rights, memory and time.

    python -I rendering.py    lines of JSON in, one line of JSON out for each after the first

The first line is {"path": sys.path, "template": text, "given": variables of the template by name,
"seconds": processor time}. Each other line is {"messages": [...], "tools": [...] or null, "parts":
[[number of messages, add_generation_prompt], ...]}. The answer is [text of the first part,
lengths], where lengths has one entry per part: its length if the first part begins with it, else
null. After a failure the answer is {"error": reason}.

Jinja's sandbox keeps a template from Python. The system keeps it from all else: before it is
parsed, this process loses the right to open a file or (root excepted) start another, and gets
limits to its memory and time. Where a system has no limits, the caller ends this process. It
imports nothing of minilora, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sys
import traceback
from typing import Any

# RLIMIT_CPU, the processor time, grows with the work.
LIMITS = {"AS": 1 << 30, "FSIZE": 0, "NOFILE": 0, "NPROC": 0, "CORE": 0}

# Processor time besides the first line's: some twenty times what Qwen3's template takes.
SECONDS_PER_PART = 0.02
SECONDS_PER_BYTE = 1e-6

# A text may have this many characters, and this many times those of the messages.
CHARACTERS = 1 << 20
COPIES = 64

# Jinja's names for a template that is not a file, while it runs and while it is parsed.
TEMPLATE_FILES = ("<template>", "<unknown>")


def main() -> None:
    lines = iter(sys.stdin.buffer.readline, b"")
    order = json.loads(next(lines))
    sys.path[:] = order["path"]
    try:
        environment = sandbox()
    except ImportError:
        return answer({"error": " needs the package 'jinja2': pip install -e .[hf]"})
    for name, value in LIMITS.items():
        set_limit(name, value)
    template = None
    seconds = order["seconds"]
    for line in lines:
        task = json.loads(line)
        seconds += len(task["parts"]) * (SECONDS_PER_PART + SECONDS_PER_BYTE * len(line))
        set_limit("CPU", math.ceil(seconds))
        try:
            template = template or environment.from_string(order["template"])
            answer(render(template, order["given"], **task))
        except Exception as error:
            answer({"error": describe(error)})


def set_limit(name: str, value: int) -> None:
    """Limit this process, where the system has such a limit, and no lower one is in force."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def answer(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def describe(error: Exception) -> str:
    """What went wrong, and in which line of the template."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename in TEMPLATE_FILES:
            place = f" line {line}"
    return f"{place}: {str(error)[:300] or type(error).__name__}"


def render(
    template: Any, given: dict[str, Any], messages: list[Any], parts: list[Any], tools: Any
) -> tuple[str, list[Any]]:
    """(the first part's text, for each part its length if the first part begins with it)."""
    given = {**given, "tools": tools}
    most = CHARACTERS + COPIES * (count_characters(messages) + count_characters(tools))
    whole = None
    lengths = []
    for count, prompt in parts:
        pieces = []
        size = 0
        for piece in template.generate(
            messages=messages[:count], add_generation_prompt=prompt, **given
        ):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise ValueError(f"it writes more than {most:,} characters")
        text = "".join(pieces)
        text.encode()  # half of a surrogate pair is not text
        if whole is None:
            whole = text
        lengths.append(size if whole.startswith(text) else None)
    return whole or "", lengths


def count_characters(value: Any) -> int:
    """The characters of all texts in a JSON value; keys and numbers count as nothing."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(count_characters, value)) if isinstance(value, list) else 0


def sandbox() -> Any:
    """Jinja as transformers sets it up, except that its clock never moves.

    What a record becomes must not depend on the day it is read, or no run could be resumed the
    next day.
    """
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):  # type: ignore[misc, unused-ignore]
        """{% generation %} ... {% endgeneration %}, around what a model writes: without effect."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc, unused-ignore]
        """A namespace without the names that Python itself looks up in an object, and calls."""

        def __init__(self, /, *given: Any, **named: Any):
            super().__init__()
            for name, value in dict(*given, **named).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.sandbox.SecurityError(f"a namespace may not have {name!r}")
            super().__setitem__(name, value)

    def to_json(
        value: Any,
        ensure_ascii: Any = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: Any = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def refuse(message: str) -> None:
        raise ValueError(f"the template itself refuses these messages: {message!r}")

    def strftime_now(form: str) -> str:
        return datetime.datetime(2024, 7, 26).strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "namespace": Namespace}
    environment.globals["strftime_now"] = strftime_now
    # This imports what Jinja imports late, while files can still be opened.
    with contextlib.suppress(TypeError):
        environment.from_string("{{ 'a' + 1 }}").render()
    return environment


if __name__ == "__main__":
    main()
