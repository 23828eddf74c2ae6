"""Read a hundred thousand damaged files: no reader may crash, hang, or accept what it must not.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--kinds config.json,records ...]
                              [--jobs K] [--write]

damage.py damages valid files, written by minilora and by the reference packages: any bytes, the
text of their JSON, or its values. The real readers read each file in a real folder that is
otherwise complete, and what they accept is used: a model computes, a text is encoded, an adapter is
removed again. KINDS has the kinds of files, and how many of a hundred inputs are of each.

These are faults:

    an exception that is not one of minilora's, or an error that does not say which file
    more than 2 seconds of work or 1 GiB of memory
    the end of the process, which a library in another language can cause
    a safetensors file that only minilora accepts, or a value that differs from the reference's

A fault ends the program with exit code 1 and prints the input. Without the packages `safetensors`
and `tokenizers` (extras `oracle`, `hf`) nothing is compared with the reference, and the byte
tokenizer is the only one. `--write` stores the counts in benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from damage import (
    altered_json,
    damaged_bytes,
    damaged_json,
    damaged_safetensors,
    tensor,
    with_tensor,
)
from samples import (
    GOLDEN,
    adapter_folders,
    coded_folders,
    mlx_folders,
    model_folders,
    record_folders,
    sharded_folders,
    task_folders,
    tokenizer_folders,
    valid_files,
)

from minilora import CausalLM
from minilora.cli import main as command_line
from minilora.data.records import pack, read_records
from minilora.data.tokenizer import ByteTokenizer, load_tokenizer
from minilora.errors import MiniloraError
from minilora.formats import SafetensorsFile
from minilora.lora import MultiTask, PeftModel
from minilora.tools.converting import convert, to_mlx
from minilora.tools.inspecting import inspect_adapter

try:
    import safetensors
    import safetensors.numpy
except ImportError:
    safetensors = None
try:
    import tokenizers
except ImportError:
    tokenizers = None

SCRIPT = __file__
RESULT = Path(__file__).parent / "results" / "fuzz.json"
LIMIT = 2.0  # seconds of processor time per input
# Seconds of any time per input, after which a signal ends the process: for code that Python cannot
# interrupt.
KILLED = 60.0
MEMORY = 1 << 30  # bytes more than the process has after its imports
BLOCK = 500  # inputs that share one sequence of random numbers
REASONS = 12  # outcomes per kind that the results name
TEXT = "the cat sat on the mat, and Ünïcode \N{SLIGHTLY SMILING FACE} too\n\t <s> [MASK]"
IDS = np.array([[1, 2, 3]])


class Wrong(Exception):
    """A fault of a reader."""


class TooLong(BaseException):
    """An input took too long. Not an Exception, so that no reader handles it as a bad file."""


# ---- what the readers do with a damaged file -----------------------------------------------------

# One model per golden base, into which adapters are loaded and from which they are removed.
bases: dict[str, Any] = {}


def base_of(adapter: Path) -> Any:
    name = adapter.name.partition("--")[0]
    if name not in bases:
        bases[name] = CausalLM.from_pretrained(GOLDEN / name)
    return bases[name]


def as_model(file: Path) -> None:
    model = CausalLM.from_pretrained(file.parent)
    model(IDS[:, : model.config.max_position_embeddings])
    type(model.config).from_dict(model.config.to_dict())


def as_adapter(file: Path) -> None:
    base = base_of(file.parent)
    names = [name for name, _ in base.named_parameters()]
    try:
        model = PeftModel.from_pretrained(base, file.parent)
        model(IDS)
        model.peft_config["default"].to_dict()
        model.unload()
    finally:
        if [name for name, _ in base.named_parameters()] != names:
            raise Wrong("the base is another one")


def as_inspected(file: Path) -> None:
    inspect_adapter(file.parent, GOLDEN / file.parent.name.partition("--")[0])


def as_mlx(file: Path) -> None:
    to_mlx(file.parent)


def from_mlx(file: Path) -> None:
    out = file.parent.parent / "converted"
    try:
        convert(file.parent, out, to="peft")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def as_tasks(file: Path) -> None:
    model = MultiTask.from_pretrained(base_of(file.parent), file.parent)
    model(IDS, tasks=next(iter(model.tasks)))
    model.unload()


def on_the_command_line(file: Path) -> None:
    """Both commands end in an error for every file: the folder has several adapters, and NaN is
    not a valid weight."""
    merge = ["merge", "--base", str(GOLDEN / "llama"), "--adapter", str(file.parent)]
    merge += ["--task", "one", "--weights", "nan", "--out", f"{file}.out"]
    for command in (["inspect", str(file.parent)], merge):
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            code = command_line(command)
        if code not in (2, 3, 4):
            raise Wrong(f"{command[0]} does not end in a user's error: {output.getvalue()}")


def as_tokenizer(file: Path) -> None:
    tokenizer = load_tokenizer(file.parent, 4096)
    ids = [*tokenizer.encode(TEXT, add_special_tokens=True), *tokenizer.encode(TEXT)]
    tokenizer.decode(ids)
    tokenizer.decode([0, 255, tokenizer.vocab_size - 1, 4095])
    tokenizer.encode_prompt(TEXT)


def as_records(file: Path) -> None:
    pack(read_records(file, ByteTokenizer(), 16), 16)


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def by_minilora(path: Path) -> Tensors:
    with SafetensorsFile(path) as file:
        tensors = {}
        for key in file.keys():
            tensors[key] = file.dtype(key), file.shape(key), file.read_bits(key).tobytes()
        return tensors


def by_the_reference(path: Path) -> Tensors | None:
    """The tensors, or None if the reference package refuses the file."""
    try:
        entries = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError:
        return None
    tensors = {}
    for key, entry in entries.items():
        tensors[key] = entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])
    return tensors


def as_tensors(file: Path) -> str | None:
    """The outcome of both readers; None without the reference package."""
    theirs = None if safetensors is None else by_the_reference(file)
    try:
        ours = by_minilora(file)
    except MiniloraError as error:
        require_shown(error)
        if safetensors is None:
            raise
        if theirs is None:
            return "refused by both"
        return f"only the reference accepts: {reason(error, file)}"
    if safetensors is None:
        return None
    if theirs is None:
        raise Wrong("minilora accepts what the reference refuses")
    if ours != theirs:
        raise Wrong("the values differ")
    return "accepted by both, equal values"


# ---- the kinds of files --------------------------------------------------------------------------

# (random numbers, a valid file, another one to take pieces from) -> a damaged file
Damage = Callable[[random.Random, bytes, bytes], bytes]


def of_json(rng: random.Random, data: bytes, other: bytes) -> bytes:
    how = rng.random()
    if how < 0.08:
        return damaged_bytes(rng, data)
    return altered_json(rng, data, other) if how < 0.7 else damaged_json(rng, data, other)


def of_records(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.choice([i for i, line in enumerate(lines) if line])
    lines[at] = of_json(rng, lines[at], other)
    return b"\n".join(lines) if rng.random() < 0.8 else damaged_bytes(rng, b"\n".join(lines))


def of_quant_state(rng: random.Random, data: bytes, other: bytes) -> bytes:
    name, state = tensor(data, "quant_state.bitsandbytes__")
    return with_tensor(data, name, of_json(rng, state, other))


def of_tensors(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return damaged_safetensors(rng, [data])


class Kind(NamedTuple):
    """A kind of file: its share of the inputs, how it is made, damaged and read.

    share     of a hundred inputs
    folders   writes the valid folders; None for files that need no folder
    file      the name in the folder
    names     words besides the path by which an error may name the file
    """

    share: float
    folders: Callable[[Path], Iterator[Path]] | None
    file: str
    damage: Damage
    readers: tuple[Callable[[Path], str | None], ...]
    names: tuple[str, ...] = ()


ADAPTED, TOKENS = (as_adapter, as_inspected, as_mlx), ("tokenizer",)
ADAPTER, MODEL = "adapter_config.json", "adapter_model.safetensors"
KINDS = {
    "safetensors": Kind(39, None, "file", of_tensors, (as_tensors,)),
    "index": Kind(9, sharded_folders, "model.safetensors.index.json", of_json, (as_model,)),
    "config.json": Kind(15, model_folders, "config.json", of_json, (as_model,), ("config",)),
    "quant_state": Kind(2, coded_folders, "model.safetensors", of_quant_state, (as_model,)),
    ADAPTER: Kind(12, adapter_folders, ADAPTER, of_json, ADAPTED, ("adapter",)),
    MODEL: Kind(2, adapter_folders, MODEL, of_tensors, ADAPTED, ("adapter",)),
    "tokenizer.json": Kind(
        10, tokenizer_folders, "tokenizer.json", of_json, (as_tokenizer,), TOKENS
    ),
    "tokenizer_config.json": Kind(
        2, tokenizer_folders, "tokenizer_config.json", of_json, (as_tokenizer,), TOKENS
    ),
    "records": Kind(5, record_folders, "data.jsonl", of_records, (as_records,)),
    "mlx": Kind(1.5, mlx_folders, ADAPTER, of_json, (from_mlx,)),
    "mlx-tensors": Kind(1, mlx_folders, "adapters.safetensors", of_tensors, (from_mlx,)),
    "multitask.json": Kind(
        1.5, task_folders, "multitask.json", of_json, (as_tasks, on_the_command_line)
    ),
}
Counts = dict[str, dict[str, int]]
Report = Callable[[str], None]  # called with a description of each input before it is read


class Input(NamedTuple):
    kind: str
    file: Path
    valid: bytes  # the content to restore
    content: bytes


class World:
    """Valid files of all kinds, each in its folder."""

    def __init__(self, folder: Path, seed: int, kinds: tuple[str, ...] = tuple(KINDS)):
        self.seed = seed
        self.kinds = kinds
        self.valid: dict[str, list[tuple[Path, bytes]]] = {}
        self.pieces: list[bytes] = []  # texts from which damaged ones take pieces
        for name in kinds:
            kind = KINDS[name]
            place = folder / name
            if kind.folders is None:
                place.mkdir()
                contents = valid_files(random.Random(seed))
                self.valid[name] = [(place / kind.file, content) for content in contents]
            else:
                files = [path / kind.file for path in kind.folders(place)]
                self.valid[name] = [(file, file.read_bytes()) for file in files if file.exists()]
            if kind.damage is of_json:
                texts = [content for _, content in self.valid[name]]
                self.pieces += [text for text in texts if len(text) < 10_000]
        self.pieces = self.pieces or [b"{}"]

    def inputs(self, block: int) -> Iterator[Input]:
        """The endless sequence of a block; block 0 begins with all files undamaged."""
        rng = random.Random(f"{self.seed} {block}")
        shares = [KINDS[name].share for name in self.kinds]
        if block == 0:
            for name in self.kinds:
                for file, content in self.valid[name]:
                    yield Input(name, file, content, content)
        while True:
            (name,) = rng.choices(self.kinds, shares)
            file, valid = rng.choice(self.valid[name])
            if name == "safetensors":
                content = damaged_safetensors(rng, [data for _, data in self.valid[name]])
            else:
                content = KINDS[name].damage(rng, valid, rng.choice(self.pieces))
            yield Input(name, file, valid, content)


# ---- running -------------------------------------------------------------------------------------


def reason(error: Exception, file: Path) -> str:
    """The beginning of a message without names and numbers."""
    text = str(error).replace(str(file), "").replace(str(file.parent), "")
    text = re.sub(r"'[^']*'|\"[^\"]*\"|[0-9][0-9,.]*", "_", text)
    return text.split("(")[0][:60].strip(" :_/")


def require_shown(error: MiniloraError) -> None:
    """Raise Wrong unless the message is one short line without control characters."""
    if len(str(error)) > 500 or not str(error).isprintable():
        raise Wrong(f"a message that is long or not printable: {str(error)[:700]!r}") from None


def outcome(one: Input) -> str:
    """The outcome of the first reader. A fault raises Wrong, or what the reader raises."""
    outcomes = []
    kind = KINDS[one.kind]
    names = (str(one.file.parent), *kind.names)
    for read in kind.readers:
        try:
            outcomes.append(read(one.file) or "accepted")
        except MiniloraError as error:
            require_shown(error)
            if not any(name in str(error) for name in names):
                raise Wrong(f"an error that does not say which file: {error}") from None
            outcomes.append(f"{type(error).__name__}: {reason(error, one.file)}")
    return outcomes[0]


def run(world: World, blocks: Iterator[tuple[int, int]], report: Report) -> Counts:
    """The number of each outcome by kind. SystemExit names the input that shows a fault.

    blocks   (block, number of inputs)
    """
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    before = signal.signal(signal.SIGPROF, _late)
    try:
        for block, count in blocks:
            for number, one in zip(range(count), world.inputs(block), strict=False):
                where = f"block {block} input {number} of seed {world.seed}, {one.kind}, {one.file}"
                report(where)
                one.file.write_bytes(one.content)
                try:
                    signal.setitimer(signal.ITIMER_PROF, LIMIT)
                    counts[one.kind][outcome(one)] += 1
                except BaseException as error:  # TooLong and panics of libraries are not Exceptions
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    raise SystemExit(
                        f"{where}: {type(error).__name__}: {error}\n{one.content[:3000]!r}"
                    ) from error
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                one.file.write_bytes(one.valid)
    finally:
        signal.signal(signal.SIGPROF, before)
    return {kind: dict(outcomes.most_common()) for kind, outcomes in sorted(counts.items())}


def _late(number: int, frame: Any) -> None:
    raise TooLong(f"more than {LIMIT:g} seconds")


def fuzz(
    count: int,
    seed: int,
    kinds: tuple[str, ...] = tuple(KINDS),
    share: tuple[int, int] = (0, 1),
    report: Report = lambda line: None,
    folder: Path | None = None,
) -> Counts:
    """The number of each outcome by kind. SystemExit names the input that shows a fault.

    count   of inputs
    share   (i, n): every n-th block from block i on
    """
    first, step = share
    blocks = []
    for block in range(-(-count // BLOCK)):
        blocks.append((block, min(BLOCK, count - block * BLOCK)))
    with tempfile.TemporaryDirectory(dir=folder or in_memory()) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(World(Path(name), seed, kinds), iter(blocks[first::step]), report)


def in_memory() -> Path | None:
    """A folder in memory, if the system has one."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


# ---- one process per core ------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    """Read one share in bounded time and memory, and print the counts as JSON.

    The file `now` has the input that is being read.
    """
    import resource

    now = os.open(args.folder / "now", os.O_RDWR | os.O_CREAT, 0o600)
    status = Path("/proc/self/statm")
    if status.exists():
        pages = int(status.read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def report(line: str) -> None:
        # No handler: the signal ends the process.
        signal.setitimer(signal.ITIMER_REAL, KILLED)
        os.pwrite(now, line.encode().ljust(400), 0)

    print(json.dumps(fuzz(args.inputs, args.seed, args.kinds, args.share, report, args.folder)))


def in_processes(args: argparse.Namespace) -> Counts:
    """Start one child per job, and return the sum of their counts."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    environment = {**os.environ, **threads}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with contextlib.ExitStack() as opened:
        children = []
        for i in range(args.jobs):
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=in_memory())))
            errors = opened.enter_context((folder / "errors").open("w+b"))
            command = [sys.executable, SCRIPT, "--inputs", str(args.inputs)]
            command += ["--seed", str(args.seed), "--kinds", ",".join(args.kinds)]
            command += ["--share", f"{i}/{args.jobs}", "--folder", str(folder)]
            started = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors
            )
            opened.callback(started.kill)
            children.append((started, folder))
        for started, folder in children:
            out = started.communicate()[0]
            if started.returncode < 0:
                now = (folder / "now").read_text().strip()
                content = Path(now.split(", ")[-1]).read_bytes()[:3000]
                raise SystemExit(
                    f"{now}: the process was ended by signal {-started.returncode}\n{content!r}"
                )
            if started.returncode:
                raise SystemExit((folder / "errors").read_text(errors="replace")[-6000:])
            for kind, outcomes in json.loads(out).items():
                counts[kind].update(outcomes)
    return {kind: shorten(outcomes) for kind, outcomes in sorted(counts.items())}


def shorten(outcomes: collections.Counter[str]) -> dict[str, int]:
    """The most common outcomes, and the sum of the others."""
    most = dict(outcomes.most_common(REASONS))
    rest = outcomes.total() - sum(most.values())
    if rest:
        most[f"for {len(outcomes) - len(most)} other reasons"] = rest
    return most


def main() -> None:
    def kinds(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in KINDS:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown; choose from {', '.join(KINDS)}"
                )
        return names

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", type=kinds, default=tuple(KINDS), help=f"some of {','.join(KINDS)} (all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one per core)"
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument(
        "--share", type=lambda text: tuple(map(int, text.split("/"))), help=argparse.SUPPRESS
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share:
        return child(args)
    begun = time.perf_counter()
    counts = in_processes(args)
    result = {
        "command": f"python benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed} --write",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "reference": f"safetensors {safetensors.__version__}" if safetensors else None,
        "tokenizers": tokenizers.__version__ if tokenizers else None,
        "inputs": args.inputs,
        "seconds": round(time.perf_counter() - begun, 1),
        # Processor time of all processes, which a busy machine does not lengthen.
        "seconds of work": round(sum(os.times()[2:4]), 1),
        "processes": args.jobs,
        "faults": 0,
        "accepted by minilora alone": 0 if safetensors else None,
        "inputs of each kind": {kind: sum(counts[kind].values()) for kind in counts},
        "counts": counts,
    }
    if args.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
