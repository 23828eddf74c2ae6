"""A hundred thousand damaged files: none may crash a reader or hang it, none be accepted that the reference refuses.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--kinds config.json,records ...] [--jobs K] [--write]

Valid files, written by minilora and by the reference packages, are damaged (damage.py): bytes anywhere, the text of
their JSON, or its values. Each goes through the real readers, from a real folder with all that stands beside it; what
is accepted is used: a model runs, a text is encoded, an adapter is taken out again. The kinds, and how many of a
hundred inputs each has, are in KINDS.

A fault is anything but minilora's own errors, an error that does not say which file, more than 2 seconds of work or
1 GiB of memory, the end of the process (what a library in another language can do), a safetensors file that only
minilora accepts, or a value in which it differs from the reference. It ends in exit code 1, the input printed. Without
the packages `safetensors` and `tokenizers` (extras `oracle`, `hf`) there is no second opinion, and no tokenizer but our
own. `--write` keeps the counts in benchmarks/results/fuzz.json.
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
LIMIT = 2.0  # seconds of work of one input, as the process's clock has them: a loaded machine does not count
KILLED = 60.0  # seconds of any time, after which the process is ended from outside: for what Python cannot interrupt
MEMORY = 1 << 30  # bytes beyond those that the readers themselves take
BLOCK = 500  # inputs that have a sequence of random numbers of their own
REASONS = 12  # that are kept of each kind
TEXT = "the cat sat on the mat, and Ünïcode \N{SLIGHTLY SMILING FACE} too\n\t <s> [MASK]"
IDS = np.array([[1, 2, 3]])


class Wrong(Exception):
    """An input by which a reader shows a fault."""


class TooLong(BaseException):
    """The time of an input is over. No Exception, so that nobody takes it for a fault in a file."""


# ---- what is done with a damaged one --------------------------------------------------------------------------------

bases: dict[str, Any] = {}  # one of each, which adapters are put into and taken out of


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
    """Both commands end in an error, whatever the file: there are several adapters, and NaN is no weight."""
    merge = [
        "merge",
        "--base",
        str(GOLDEN / "llama"),
        "--task",
        "one",
        "--weights",
        "nan",
        "--out",
        str(file) + ".out",
    ]
    for line in (["inspect", str(file.parent)], [*merge, "--adapter", str(file.parent)]):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            if command_line(line) not in (2, 3, 4):
                raise Wrong(f"{line[0]} does not end in a user's error: {said.getvalue()}")


def as_tokenizer(file: Path) -> None:
    tokenizer = load_tokenizer(file.parent, 4096)
    ids = [*tokenizer.encode(TEXT, add_special_tokens=True), *tokenizer.encode(TEXT)]
    tokenizer.decode(ids)
    tokenizer.decode([0, 255, tokenizer.vocab_size - 1, 4095])
    _ = tokenizer.eos


def as_records(file: Path) -> None:
    pack(read_records(file, ByteTokenizer(), 16), 16)


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def by_minilora(path: Path) -> Tensors:
    with SafetensorsFile(path) as file:
        return {k: (file.dtype(k), file.shape(k), file.read_bits(k).tobytes()) for k in file.keys()}


def by_the_reference(path: Path) -> Tensors | None:
    try:
        found = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError:
        return None
    return {k: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for k, v in found.items()}


def as_tensors(file: Path) -> str | None:
    """What the two readers say together."""
    theirs = None if safetensors is None else by_the_reference(file)
    try:
        ours = by_minilora(file)
    except MiniloraError as error:
        require_shown(error)
        if safetensors is None:
            raise
        return (
            "refused by both"
            if theirs is None
            else f"only the reference accepts: {reason(error, file)}"
        )
    if safetensors is None:
        return None
    if theirs is None:
        raise Wrong("minilora accepts what the reference refuses")
    if ours != theirs:
        raise Wrong("the values differ")
    return "accepted by both, equal values"


# ---- the kinds ------------------------------------------------------------------------------------------------------

Damage = Callable[
    [random.Random, bytes, bytes], bytes
]  # of a valid file, with another one to take pieces from


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
    """How often, from which folders, which file there, how damaged, how read; what an error may call it but its path.

    Of a hundred inputs `share` are of it. One kind has no folders: its files are of many shapes, and stand alone.
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
Told = Callable[[str], None]  # is told of an input before it is read


class Input(NamedTuple):
    kind: str
    file: Path
    valid: bytes  # what the file holds again afterwards
    content: bytes


class World:
    """Valid files of the kinds, each in its folder."""

    def __init__(self, folder: Path, seed: int, kinds: tuple[str, ...] = tuple(KINDS)):
        self.seed, self.kinds = seed, kinds
        self.valid: dict[str, list[tuple[Path, bytes]]] = {}
        for name in kinds:
            kind, place = KINDS[name], folder / name
            if kind.folders is None:
                place.mkdir()
                self.valid[name] = [
                    (place / kind.file, data) for data in valid_files(random.Random(seed))
                ]
            else:
                files = [
                    made / kind.file for made in kind.folders(place) if (made / kind.file).exists()
                ]
                self.valid[name] = [(file, file.read_bytes()) for file in files]
        texts = [
            data for name in kinds if KINDS[name].damage is of_json for _, data in self.valid[name]
        ]
        self.pieces = [text for text in texts if len(text) < 10_000] or [
            b"{}"
        ]  # what others take pieces from

    def inputs(self, block: int) -> Iterator[Input]:
        """A block's, without end. The first ones of all are undamaged."""
        rng = random.Random(f"{self.seed} {block}")
        shares = [KINDS[name].share for name in self.kinds]
        if block == 0:
            yield from (
                Input(name, file, data, data)
                for name in self.kinds
                for file, data in self.valid[name]
            )
        while True:
            (name,) = rng.choices(self.kinds, shares)
            file, data = rng.choice(self.valid[name])
            if name == "safetensors":
                yield Input(
                    name,
                    file,
                    data,
                    damaged_safetensors(rng, [data for _, data in self.valid[name]]),
                )
            else:
                yield Input(
                    name, file, data, KINDS[name].damage(rng, data, rng.choice(self.pieces))
                )


# ---- running --------------------------------------------------------------------------------------------------------


def reason(error: Exception, file: Path) -> str:
    """What a message says, without names and numbers."""
    text = str(error).replace(str(file), "").replace(str(file.parent), "")
    text = re.sub(r"'[^']*'|\"[^\"]*\"|[0-9][0-9,.]*", "_", text)
    return text.split("(")[0][:60].strip(" :_/")


def require_shown(error: MiniloraError) -> None:
    """Wrong, if an error is not of one line that steers no terminal."""
    if len(str(error)) > 500 or not str(error).isprintable():
        raise Wrong(f"a message that is long or not printable: {str(error)[:700]!r}") from None


def outcome(one: Input) -> str:
    """In what the readers end; Wrong, or whatever a reader raises, for a fault."""
    ends = []
    for read in KINDS[one.kind].readers:
        try:
            ends.append(read(one.file) or "accepted")
        except MiniloraError as error:
            require_shown(error)
            if not any(
                word in str(error) for word in (str(one.file.parent), *KINDS[one.kind].names)
            ):
                raise Wrong(f"an error that does not say which file: {error}") from None
            ends.append(f"{type(error).__name__}: {reason(error, one.file)}")
    return ends[0]


def run(world: World, blocks: Iterator[tuple[int, int]], told: Told) -> Counts:
    """Counts of outcomes for each kind, over (block, how many inputs of it). SystemExit names a fault's input."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    before = signal.signal(signal.SIGPROF, _late)
    try:
        for block, count in blocks:
            for number, one in zip(range(count), world.inputs(block), strict=False):
                where = f"block {block} input {number} of seed {world.seed}, {one.kind}, {one.file}"
                told(where)
                one.file.write_bytes(one.content)
                try:
                    signal.setitimer(signal.ITIMER_PROF, LIMIT)
                    counts[one.kind][outcome(one)] += 1
                except (
                    BaseException
                ) as error:  # a panic of a library, and TooLong, are no Exceptions
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
    return {kind: dict(found.most_common()) for kind, found in sorted(counts.items())}


def _late(number: int, frame: Any) -> None:
    raise TooLong(f"more than {LIMIT:g} seconds")


def fuzz(
    count: int,
    seed: int,
    kinds: tuple[str, ...] = tuple(KINDS),
    share: tuple[int, int] = (0, 1),
    told: Told = lambda line: None,
    folder: Path | None = None,
) -> Counts:
    """Counts of outcomes for each kind, of a share of the blocks. SystemExit names the input that shows a fault."""
    blocks = [(at, min(BLOCK, count - at * BLOCK)) for at in range(-(-count // BLOCK))]
    with tempfile.TemporaryDirectory(dir=folder or in_memory()) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(World(Path(name), seed, kinds), iter(blocks[share[0] :: share[1]]), told)


def in_memory() -> Path | None:
    """A folder that no disk stands behind."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


# ---- a process for each core ----------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    """One share, in bounded time and memory; the counts as JSON. What is going on stands in the file `now`."""
    import resource

    now = os.open(args.folder / "now", os.O_RDWR | os.O_CREAT, 0o600)
    pages = (
        int(Path("/proc/self/statm").read_text().split()[0])
        if Path("/proc/self/statm").exists()
        else 0
    )
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def told(line: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, KILLED)  # nobody handles it: it ends the process
        os.pwrite(now, line.encode().ljust(400), 0)

    print(json.dumps(fuzz(args.inputs, args.seed, args.kinds, args.share, told, args.folder)))


def in_processes(args: argparse.Namespace) -> Counts:
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    environment = {**os.environ, **alone, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with contextlib.ExitStack() as opened:
        children = []
        for i in range(args.jobs):
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=in_memory())))
            said = opened.enter_context((folder / "said").open("w+b"))
            line = [
                sys.executable,
                SCRIPT,
                "--inputs",
                str(args.inputs),
                "--seed",
                str(args.seed),
                "--kinds",
            ]
            line += [",".join(args.kinds), "--share", f"{i}/{args.jobs}", "--folder", str(folder)]
            started = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=said)
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
                raise SystemExit((folder / "said").read_text(errors="replace")[-6000:])
            for kind, found in json.loads(out).items():
                counts[kind].update(found)
    return {kind: few(found) for kind, found in sorted(counts.items())}


def few(found: collections.Counter[str]) -> dict[str, int]:
    """The most common outcomes, the others summed up."""
    most = dict(found.most_common(REASONS))
    rest = found.total() - sum(most.values())
    return most | ({f"for {len(found) - len(most)} other reasons": rest} if rest else {})


def main() -> None:
    def some(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if not set(names) <= set(KINDS):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)}")
        return names

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", type=some, default=tuple(KINDS), help=f"some of {','.join(KINDS)} (all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)"
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
        "seconds of work": round(
            sum(os.times()[2:4]), 1
        ),  # of all processes: what a loaded machine does not lengthen
        "processes": args.jobs,
        "faults": 0,
        "accepted by minilora alone": 0 if safetensors else None,
        "inputs of each kind": {kind: sum(found.values()) for kind, found in counts.items()},
        "counts": counts,
    }
    if args.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
