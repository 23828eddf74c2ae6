"""A chat template or a tokenizer.json of unknown origin, in a process of limited rights.

    python -IS sandboxed.py    lines of JSON in, one line of JSON out for each after the first

A line in has "payloads", the names of fields that are bytes: the line gives their numbers, and the
bytes follow it in this order.

The first line is {"path": sys.path, "seconds": processor time, "memory": bytes}, and one of

    "template": its text, "given": variables of the template by name
    "tokenizer": the bytes of the file, "special": texts of tokens to cut a text at,
                 "prepend_scheme": that of a Metaspace, for a LlamaTokenizer

Each other line is a question. It has "seconds" and "memory", which it may take besides, and what
`Template.answer` or `Tokenizer.answer` reads. After a failure the answer is {"error": reason}.
Texts and arrays of int32 come back in base 64.

Jinja's sandbox keeps a template from Python. The system keeps all of this from all else: before it
reads what it runs, this process loses the right to open a file or (root excepted) start another,
and gets limits to its memory and time. Where a system has no limits, the caller ends this process.
It imports nothing of minilora, so that it starts at once.
"""

from __future__ import annotations

import array
import base64
import contextlib
import datetime
import json
import math
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import Any

LIMITS = {"FSIZE": 0, "NOFILE": 0, "NPROC": 0, "CORE": 0}

# A text may have this many characters, and this many times those of the messages.
CHARACTERS = 1 << 20
COPIES = 64

# A rendering may take this many steps, and so many more per message. A step is one turn of a loop,
# one call, or one number of a range.
STEPS = 100_000
STEPS_PER_MESSAGE = 1000
INTEGER_BITS = 4096  # integers in a template stay below 2^4096: larger ones take long to multiply

ALLOWANCES = ("seconds", "memory")  # the fields of a question that are for `main`
LONGEST_TOKEN = 1024  # characters; the longest in use are runs of some hundred spaces

# Jinja's names for a template that is not a file, while it runs and while it is parsed.
TEMPLATE_FILES = ("<template>", "<unknown>")


def main() -> None:
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when this ends
    order = read()
    sys.path[:] = order["path"]
    kind, package = (Template, "jinja2") if "template" in order else (Tokenizer, "tokenizers")
    try:
        program = kind(order)
    except ImportError:
        return write({"error": f" needs the package '{package}': pip install -e .[hf]"})
    for name, value in LIMITS.items():
        set_limit(name, value)
    seconds = order["seconds"]
    memory = order["memory"]
    while question := read():
        seconds += question["seconds"]
        set_limit("CPU", math.ceil(seconds))
        set_limit("AS", memory + question["memory"])
        try:
            write(program.answer(question))
        except BaseException as error:  # a panic of the package `tokenizers` is no Exception
            write({"error": program.describe(error)})


def set_limit(name: str, value: int) -> None:
    """Limit this process, where the system has such a limit, and no lower one is in force."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def read() -> dict[str, Any]:
    """The next line with its payloads; empty at the end."""
    fields: dict[str, Any] = json.loads(sys.stdin.buffer.readline() or b"{}")
    for name in fields.pop("payloads", ()):
        fields[name] = sys.stdin.buffer.read(fields[name])
    return fields


def to_base64(data: Any) -> str:
    return base64.b64encode(data).decode("ascii")


def write(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


# ---- tokenizers ----------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer.json, run by the package `tokenizers`; it is read with the first question."""

    def __init__(self, order: dict[str, Any]):
        import tokenizers

        self.package = tokenizers
        self.content = order["tokenizer"]
        self.special = order.get("special", [])
        self.prepend_scheme = order.get("prepend_scheme")
        self.whole: Any = None
        self.bare: Any = None

    def answer(self, question: dict[str, Any]) -> Any:
        """What the method that the question names returns, given the question's other fields."""
        if self.whole is None:
            self._read()
        fields = {name: question[name] for name in question if name not in ("do", *ALLOWANCES)}
        return getattr(self, question["do"])(**fields)

    def _read(self) -> None:
        whole = self.package.Tokenizer.from_buffer(self.content)
        self.content = None
        self.padding = whole.padding or {}
        # A file may ask for both, but a corpus is one long text.
        whole.no_truncation()
        whole.no_padding()
        if self.prepend_scheme and isinstance(whole.model, self.package.models.BPE):
            self._make_llama(whole)
        self.whole = whole
        self.add_special(self.special)

    def _make_llama(self, whole: Any) -> None:
        """Cut texts as transformers 5's LlamaTokenizer does.

        It takes the vocabulary and the merges of the file, but not the rules by which the file puts
        spaces: those of Llama 2 put one behind each special token.
        """
        package = self.package
        whole.normalizer = None
        whole.pre_tokenizer = package.pre_tokenizers.Metaspace(
            prepend_scheme=self.prepend_scheme, split=False
        )
        whole.model.fuse_unk = True
        whole.model.byte_fallback = True

    def summary(self) -> dict[str, Any]:
        """The number of tokens, of different ids, the largest id; padding and post-processor."""
        ids = list(self.whole.get_vocab(with_added_tokens=True).values())
        processor = self.whole.post_processor
        return {
            "tokens": len(ids),
            "ids": len(set(ids)),
            "largest": max(ids, default=-1),
            "pad_token": self.padding.get("pad_token"),
            "processor": None if processor is None else json.loads(processor.__getstate__()),
        }

    def add_special(self, texts: list[str]) -> dict[str, Any]:
        """Cut texts at these tokens from now on, if the vocabulary has them.

        {"ids": {text: id or null}, "added": the ids of all tokens that texts are cut at}
        """
        before = {token.content for token in self.whole.get_added_tokens_decoder().values()}
        ids = {text: self.whole.token_to_id(text) for text in texts}
        missing = [text for text, id in ids.items() if id is not None and text not in before]
        add = self.package.AddedToken
        self.whole.add_special_tokens([add(text, special=True) for text in missing])
        return {"ids": ids, "added": sorted(self.whole.get_added_tokens_decoder())}

    def encode(self, text: bytes, special: bool) -> str:
        """The ids of a text."""
        decoded = text.decode("utf-8")
        encoding = self.whole.encode(decoded, add_special_tokens=special)
        return self._packed(encoding.ids, len(decoded))

    def edges(self, text: bytes) -> list[str]:
        """[ids, starts, ends], without what the tokenizer puts around a text.

        In some files that trims spaces off tokens' places, too.
        """
        if self.bare is None:
            self.bare = self.package.Tokenizer.from_str(self.whole.to_str())
            self.bare.post_processor = self.package.processors.ByteLevel(trim_offsets=False)
        decoded = text.decode("utf-8")
        encoding = self.bare.encode(decoded, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        ends = [end for _, end in encoding.offsets]
        return [self._packed(values, len(decoded)) for values in (encoding.ids, starts, ends)]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        text = self.whole.decode(ids, skip_special_tokens=False)
        most = CHARACTERS + LONGEST_TOKEN * len(ids)
        if len(text) > most:
            raise ValueError(f"it makes more than {most:,} characters of {len(ids):,} tokens")
        return to_base64(text.encode("utf-8"))

    def token(self, id: int) -> str | None:
        """The token of an id, as the vocabulary has it."""
        return self.whole.id_to_token(id)  # type: ignore[no-any-return]

    def _packed(self, values: Iterable[int], characters: int) -> str:
        packed = array.array("i", values)
        most = CHARACTERS + COPIES * characters
        if len(packed) > most:
            raise ValueError(f"it makes more than {most:,} tokens of {characters:,} characters")
        return to_base64(packed)

    def describe(self, error: BaseException) -> str:
        return f" is not a usable tokenizer: {str(error)!r:.200}"


# ---- templates -----------------------------------------------------------------------------------


class Template:
    """A chat template, run by Jinja; it is parsed with the first question."""

    def __init__(self, order: dict[str, Any]):
        self.environment = sandbox()
        self.order = order
        self.template: Any = None

    def answer(self, question: dict[str, Any]) -> Any:
        """[text of the first part, lengths] of {"messages", "parts", "tools"}.

        A part is [number of messages, add_generation_prompt]. Its length is null unless the first
        part begins with it.
        """
        if self.template is None:
            self.template = self.environment.from_string(self.order["template"])
        return self._render(question["messages"], question["parts"], question["tools"])

    def _render(self, messages: list[Any], parts: list[Any], tools: Any) -> tuple[str, list[Any]]:
        given = {**self.order["given"], "tools": tools}
        most = CHARACTERS + COPIES * (count_characters(messages) + count_characters(tools))
        whole = None
        lengths = []
        for count, prompt in parts:
            self.environment.steps_left = STEPS + STEPS_PER_MESSAGE * count
            pieces = []
            size = 0
            for piece in self.template.generate(
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

    def describe(self, error: BaseException) -> str:
        """What went wrong, and in which line of the template."""
        place = ""
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename in TEMPLATE_FILES:
                place = f" line {line}"
        return f"{place}: {str(error)[:300] or type(error).__name__}"


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

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc, unused-ignore]
        """Jinja's sandbox, with an end to loops, calls and large products.

        Processor time would end them too, but later, and without the reason.
        """

        intercepted_binops = frozenset(["*", "**"])
        steps_left = 0

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(jinja2.nodes.For):
                take_step = jinja2.nodes.EnvironmentAttribute("take_steps", lineno=loop.lineno)
                call = jinja2.nodes.Call(take_step, [], [], None, None, lineno=loop.lineno)
                loop.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=loop.lineno))
            return tree.set_environment(self)

        def take_steps(self, count: int = 1) -> None:
            self.steps_left -= count
            if self.steps_left < 0:
                raise ValueError(
                    f"it takes more than {STEPS:,} steps (turns of loops, calls, numbers of "
                    f"ranges) and {STEPS_PER_MESSAGE:,} per message"
                )

        def call(self, /, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            self.take_steps()
            result = super().call(context, function, *args, **kwargs)
            if isinstance(result, range):
                self.take_steps(len(result))
            return result

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            self._check_product(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def _check_product(self, operator: str, left: Any, right: Any) -> None:
            """ValueError for a product that would be a large text, list or integer."""
            if isinstance(right, int) and hasattr(left, "__len__"):
                size, most = len(left) * right, CHARACTERS
            elif isinstance(left, int) and hasattr(right, "__len__"):
                size, most = len(right) * left, CHARACTERS
            elif isinstance(left, int) and isinstance(right, int):
                size, most = left.bit_length(), INTEGER_BITS
                size = size * right if operator == "**" else size + right.bit_length()
            else:
                return
            if size > most:
                unit = "bits" if most == INTEGER_BITS else "characters or entries"
                raise ValueError(f"a product of more than {most:,} {unit}")

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

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "namespace": Namespace}
    environment.globals["strftime_now"] = strftime_now
    # This imports what Jinja imports late, while files can still be opened.
    environment.steps_left = STEPS
    environment.from_string("{{ ''|striptags }}{{ lipsum(1) }}").render()
    with contextlib.suppress(TypeError):
        environment.from_string("{{ 'a' + 1 }}").render()
    return environment


if __name__ == "__main__":
    main()
