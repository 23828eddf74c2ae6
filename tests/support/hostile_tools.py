"""Bad and odd records, and what the commands on files are given. See hostile.py."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from faults import Disk, stay_full
from hostile import (
    ADAPTER_KEY,
    ADAPTER_WEIGHTS,
    BASE_WEIGHTS,
    CONFIG,
    EVALUATE,
    FINETUNE,
    HAS_PROC,
    LONG,
    MERGE,
    NOWHERE,
    PRETRAIN,
    Build,
    World,
    add,
    both,
    broken,
    changed_tensors,
    command,
    cut,
    first_shard,
    nothing,
    removed,
    save_adapter,
    split,
    with_tensor,
    write_index,
    written,
)
from hostile_commands import TASKS, refused, wide

from minilora import CausalLM, LoraConfig, get_multitask_model
from minilora.cli import main
from minilora.data.files import MAX_RECORD_BYTES
from minilora.errors import FormatError
from minilora.formats import load_file, save_file, write_json
from minilora.lora import MultiTask

COMBINE = "combine --adapter adapter --out new"
EXTRACT = "extract --base base --tuned tuned --r 1 --out new"
RESIZE = "resize --adapter adapter --r 1 --out new"
CONVERT = "convert adapter --dtype float16 --out new"
HALVE_BASE = "convert base --dtype float16 --out new"
Q_PROJ = "model.layers.0.self_attn.q_proj"

# ---- records -------------------------------------------------------------------------------------

GOOD = b'{"text": "the quick brown fox"}\n'
TRAIN = f"{FINETUNE.replace('book.txt', 'data.jsonl')} --steps 1"


def record(content: bytes, *says: str) -> None:
    """Line 2 of a file of records is bad."""
    build = written("data.jsonl", GOOD + content + b"\n" + GOOD)
    add(61, f"finetune of {content[:30]!r}", build, TRAIN, 3, "data.jsonl", *says)


def records(line: str, code: int, content: bytes | Callable[[], bytes], *says: str) -> None:
    command(61, line, code, *says, build=written("data.jsonl", content))


def add_record_rows() -> None:
    line2 = "line 2: "
    record(b"the lazy dog", line2, "not valid JSON")
    record(b'{"text": "cut', line2, "not valid JSON")
    record(b'{"text": "a"} {"text": "b"}', line2, "not valid JSON")
    record(b'["text"]', line2, "JSON object", "list")
    record(b'{"text": "caf\xe9"}', line2, "utf-8")
    record(GOOD.decode().encode("utf-16"))
    record(b'{"text": "\\ud800"}', line2, "surrogates")
    record(b'{"text": ' + b"9" * 5000 + b"}", line2, "integer")
    record(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", line2, "deeper")
    record(b'{"text": ["a"]}', line2, "'text'", "list")
    record(b'{"id": 3}', line2, "expected the fields", "found 'id'")
    record(b'{"prompt": "a b"}', line2, "'prompt'")
    record(b'{"text": "abc", "text": "abc"}', line2, "'text'", "twice")
    record(b'{"\\u001b[2J": "abc"}', line2, r"\x1b[2J")
    record(b'{"messages": 5}', line2, "messages")
    record(b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', line2, "images")
    object_content = b'{"role": "user", "content": {"a": "{{ 7 * 7 }}"}}'
    record(b'{"messages": [' + object_content + b"]}", line2, "message 1", "'content'", "dict")
    chat = b'{"messages": [{"role": "assistant", "content": "hi"}]}'
    record(chat, line2, "messages", "tokenizer.json", "chat template")
    long = b'{"prompt": "' + b"x" * 200 + b'", "completion": "y"}'
    strict = f"{TRAIN} --strict"
    short = b'{"text": "fox"}\n'
    records(strict, 3, short + long + b"\n" + short, "data.jsonl", line2, "nothing to learn")
    records(TRAIN, 3, long, "no record to train on", "all 1 are skipped")
    huge = lambda: GOOD + b'{"text": "' + b"x" * MAX_RECORD_BYTES + b'"}\n'  # noqa: E731
    records(TRAIN, 3, huge, "'data.jsonl' line 2: ", "longer than")
    records(TRAIN, 3, b"\n\r\n", "data.jsonl", "no record")
    records(TRAIN, 3, GOOD, "--data data.jsonl", "2 records")
    records(TASKS.replace("latin.txt", "data.jsonl"), 3, GOOD, "--tasks data.jsonl", "2 records")
    records(f"{TRAIN} --eval-data book.jsonl", 4, GOOD * 9, "book.jsonl")
    empty = both(written("data.jsonl", GOOD * 9), written("empty.txt", b""))
    command(61, f"{TRAIN} --eval-data empty.txt", 3, "empty.txt", build=empty)
    command(61, f"{FINETUNE} --data missing.jsonl", 4, "missing.jsonl")
    damaged = GOOD + b'{"text": "not so'
    says = ("'data.jsonl' line 2: ", "not valid JSON")
    records(f"{PRETRAIN} --data data.jsonl", 3, damaged, *says)
    records(f"{EVALUATE} --data data.jsonl", 3, damaged, *says)
    records(f"{FINETUNE} --eval-data data.jsonl", 3, damaged, *says)
    records(f"{PRETRAIN} --eval-data data.jsonl", 3, damaged, *says)
    add_file_rows()


def add_file_rows() -> None:
    """Files that are not the records or the text that they are given for."""
    line = TRAIN.replace("data.jsonl", "data.json")

    def file(content: bytes, *says: str, worst: bool = False) -> None:
        name = f"finetune of a .json file {content[:30]!r}"
        add(61, name, written("data.json", content), line, 3, "data.json", *says, worst=worst)

    good = GOOD.strip()
    file(b"[" + good + b", " + good + b",]", "line 1: expected ] and the end", "',]'")
    file(b"[" + good + b",\n" + good[:9], "line 2: what begins here does not end")
    file(b"[" + good + b",\n\n" + b'{"text": NaN}]', "record 2 (line 3)", "not valid JSON")
    file(b"[" + good + b"," + b'{"text": "caf\xe9"}]', "record 2 (line 1)", "0xe9")
    file(b'[{"text": ' + b"[" * 10**6 + b"]" * 10**6 + b"}]", "deeper", worst=True)
    file(b"[" * 10**6, "does not end", worst=True)
    file(b'{"a": ' * 10**6, "does not end", worst=True)
    file(b'[{"text": "' + b'\\"' * 10**6, "does not end", worst=True)
    file(b'{"train": [' + good + b'], "test": [' + good + b"]}", "'train', 'test'", "its own")
    file(b'{"text": "a", "a": [' + b"0," * 10**5 + b'0], "text": "b"}', "'text'", "twice")
    file(b"[1, 2]", "expected a list of objects", "rename it to .txt")
    file(b"a text", "line 1: not valid JSON", "rename it to .txt")
    for content, says in (
        (b"\x1f\x8b\x08\0", "compressed with gzip"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"\xff\xfe{\0", "in UTF-16"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    ):
        file(content, says)
        records(f"{PRETRAIN} --data data.jsonl", 3, content, "data.jsonl", says)
    demo = "demo --quick --out new --pretrain-data data.jsonl"
    records(demo, 3, GOOD * 9, "'data.jsonl' has records, expected a plain text")
    command(61, f"{FINETUNE} --data base", 3, "'base' is not a regular file but a folder")


# ---- adapters of mlx-lm --------------------------------------------------------------------------

MLX_WEIGHTS = "mlx/adapters.safetensors"
TO_PEFT = "convert mlx --to peft --out new"


def make_mlx(
    a: tuple[int, ...] = (16, 2), b: tuple[int, ...] = (2, 16), more: Any = None, **given: Any
) -> Build:
    """An adapter of mlx-lm on one layer, in the folder `mlx`."""

    def build(folder: Path) -> None:
        (folder / "mlx").mkdir()
        parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, **given}
        fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
        write_json(folder / "mlx" / "adapter_config.json", {**fields, **(more or {})})
        A = np.ones(a, np.float32)
        B = np.ones(b, np.float32)
        save_file(folder / MLX_WEIGHTS, {f"{Q_PROJ}.lora_a": A, f"{Q_PROJ}.lora_b": B})

    return build


def mlx(code: int, *says: str, then: Build = nothing, **fields: Any) -> None:
    name = f"{fields or says}"[:60]
    add(62, name, both(make_mlx(**fields), then), TO_PEFT, code, "mlx", *says)


def add_mlx_rows() -> None:
    for scale in (0, -1, None, True, "20", [20.0], 1e300):
        mlx(2, "adapter_config.json", "scale", "above 0 and below 1e+300", scale=scale)
    for rank in (0, -2, 2.0, True, "2", 2**31):
        mlx(2, "rank", "at least 1", rank=rank)
    for dropout in (1.0, -0.5, "a", None):
        mlx(2, "lora_dropout must be", dropout=dropout)
    mlx(2, "fine_tune_type must be", more={"fine_tune_type": "full"})
    mlx(2, "fine_tune_type must be", more={"fine_tune_type": 1})
    mlx(2, "lora_parameters must be", more={"lora_parameters": None})
    mlx(2, "lora_parameters must be", more={"lora_parameters": [2]})
    wanted = "(in, 2), (2, out)"
    mlx(3, wanted, a=(2, 16), b=(16, 2))  # as PEFT has them
    mlx(3, wanted, a=(2, 16), b=(2, 16))
    mlx(3, wanted, a=(16, 2), b=(16, 2))
    mlx(3, wanted, a=(16, 3), b=(3, 16))  # another rank
    mlx(3, wanted, a=(16,), b=(2, 16))
    mlx(3, wanted, a=(), b=())
    mlx(3, wanted, a=(16, 2, 1), b=(2, 16))
    mlx(3, wanted, a=(0, 2), b=(3, 16))
    mlx(3, wanted, a=(2, 2), b=(3, 3))  # in a square matrix only the rank tells the two sides
    for key in ("x.lora_A", "x.weight", "\x1b[2J"):
        unknown = with_tensor(MLX_WEIGHTS, key, np.ones((16, 2), np.float32))
        mlx(3, "mlx-lm", repr(key)[1:-1], then=unknown)
    mlx(3, "mlx-lm", then=removed(MLX_WEIGHTS))
    mlx(3, "a file of 200", then=cut(MLX_WEIGHTS, 200))
    damaged = written("mlx/adapter_config.json", b'{"lora_parameters": {')
    mlx(3, "not valid JSON", then=damaged)
    mlx(5, "not finite", then=broken(MLX_WEIGHTS, "lora_a", np.nan))
    command(
        62, "convert adapter --to peft --out new", 3, "adapter", "mlx-lm", "adapters.safetensors"
    )
    line = "convert mlx --to mlx --out new"
    command(62, line, 3, "mlx", "adapter_model.safetensors", build=make_mlx())


# ---- what cannot be merged -----------------------------------------------------------------------


def second(config: LoraConfig, name: str = "second") -> Build:
    """Another adapter for the base."""
    return lambda folder: save_adapter(folder / name, config)


def tuned(folder: Path) -> None:
    """The base, trained on."""
    shutil.copytree(folder / "base", folder / "tuned", dirs_exist_ok=True)

    def add_one(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{Q_PROJ}.weight"] += np.float32(1)

    changed_tensors("tuned/model.safetensors", add_one)(folder)


def sharded(change: Callable[[Path, dict[str, str]], object] | None = None) -> Build:
    """The base in three shards, with its index changed in place."""

    def build(folder: Path) -> None:
        weight_map = split(folder / "base")
        if change is not None:
            change(folder / "base", weight_map)
        write_index(folder / "base", weight_map)

    return build


def leading_outside(folder: Path, weight_map: dict[str, str]) -> None:
    save_file(folder.parent / "secret.safetensors", {"x": np.zeros(1)})
    first_shard("../secret.safetensors")(folder, weight_map)


def shards(change: Callable[[Path, dict[str, str]], object], *says: str) -> None:
    """Every command that reads a sharded base refuses it."""
    build = both(tuned, sharded(change))
    for line in (MERGE, HALVE_BASE, "diff base tuned", "inspect base"):
        name = f"{line.split()[0]}: {' '.join(says)}"[:60]
        add(42, name, build, line, 3, *says)


def add_merge_rows() -> None:
    index = "model.safetensors.index.json"
    shard = "model-00002-of-00003.safetensors"
    shards(leading_outside, index, "not the name of")
    shards(first_shard("/etc/passwd.safetensors"), index, "not the name of")
    shards(first_shard("model-00009-of-00003.safetensors"), index, "missing")
    shards(lambda b, w: (b / shard).unlink(), index, shard, "missing")
    shards(lambda b, w: (b / shard).write_bytes(b""), shard, "not a safetensors file")
    shards(lambda b, w: w.pop("model.norm.weight"), index, "in it but not listed")

    key = ADAPTER_KEY.format

    def misfit(build: Build, *says: str) -> None:
        command(43, MERGE, 3, "adapter", *says, build=build)

    def having(name: str, array: Any) -> Build:
        return with_tensor(ADAPTER_WEIGHTS, name, array)

    def without(*names: str) -> Build:
        return changed_tensors(ADAPTER_WEIGHTS, lambda t: [t.pop(name) for name in names])

    misfit(having(key("v", "B"), np.zeros((5, 2))), "v_proj", "(5, 2)", "(16, 2)")
    misfit(having(key("v", "A"), np.zeros((2, 2, 16))), "v_proj", "lora_B")
    misfit(having(key("v", "A"), np.zeros(())), "lora_A ()")
    misfit(without(key("v", "B")), "v_proj", "lora_B")
    misfit(
        without(key("v", "A"), key("v", "B")),
        "missing base_model.model.model.layers.0.self_attn.v_proj",
    )
    misfit(
        having("base_model.model.extra.weight", np.zeros(1)),
        "unknown base_model.model.extra.weight",
    )
    misfit(having("\x1b[2J", np.zeros(1)), r"\x1b[2J")
    misfit(
        having("base_model.model.lora_A.weight", np.zeros((2, 16))),
        "unknown base_model.model.lora_A.weight",
    )

    for weights in ("x", "''", "1,", ",", "0.5,", "1;2", "0x10", "1e", LONG):
        refused(56, f"{MERGE} --weights={weights}", "--weights", "list of numbers", "0.5,-1")
    for weights in ("1,2", "nan", "inf", "-inf", "1e999", "1,2,3", "1,1"):
        refused(56, f"{MERGE} --weights={weights}", "--weights", "1 finite numbers")
    refused(63, f"{MERGE} --dtype float8", "--dtype", "'float8'", "bfloat16")
    refused(63, f"{MERGE} --tied both", "--tied", "'both'", "untie", "share")
    refused(63, f"{MERGE} --adapter ''", "--adapter must not be empty")
    command(63, f"{MERGE} --base missing", 4, "missing")
    beside = f"{MERGE} --adapter second"
    dora = second(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    command(63, beside, 2, "cannot be added", build=dora)
    command(63, f"{beside} --weights 1,0.5", 2, "0.5", build=dora)
    saved = LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"])
    twice = both(second(saved), second(saved, "third"))
    command(63, f"{beside} --adapter third", 2, "lm_head.weight", "cannot be added", build=twice)
    command(63, f"{MERGE} --adapter missing", 4, "missing")
    command(63, f"{MERGE} --adapter base", 3, "'base'", "adapter_config.json")
    refused(63, f"{MERGE} --task one", "--adapter 'adapter'", "--task")
    refused(63, f"{MERGE} --adapter ''", "--adapter must not be empty")
    # What is not finite is merged only where that is asked for.
    not_finite(broken(BASE_WEIGHTS, "lm_head", np.nan), "lm_head.weight")
    not_finite(broken(BASE_WEIGHTS, "q_proj", np.inf), f"{Q_PROJ}.weight")
    not_finite(broken(ADAPTER_WEIGHTS, "q_proj.lora_B", np.nan), f"{Q_PROJ}.weight")
    command(38, f"{MERGE} --weights 1e300", 5, "--weights", "1e+300", "q_proj.weight")
    large = broken(BASE_WEIGHTS, "lm_head", 1e30)
    command(38, f"{MERGE} --dtype float16", 5, "lm_head", build=large)


def not_finite(build: Build, name: str) -> None:
    """With --allow-nonfinite the merge succeeds, and its tensor `name` is not finite."""
    line = f"{MERGE} --allow-nonfinite --threads 2"

    def run(world: World) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(line.split()) == 0
        merged = load_file(world.folder / "new" / "model.safetensors")
        assert not np.isfinite(merged[name]).all()
        shutil.rmtree(world.folder / "new")

    add(38, f"{name} is not finite, and that is allowed", build, run, None)


# ---- the other tools -----------------------------------------------------------------------------


def tool(kind: int, line: str, code: int, *says: str, build: Build = nothing) -> None:
    """A command line beside a base that was trained on."""
    command(kind, line, code, *says, build=both(tuned, build))


def add_tool_rows() -> None:
    tool(40, "diff base missing", 4, "missing")
    tool(40, "diff missing base", 4, "missing")
    tool(40, "diff base adapter", 3, "adapter")
    tool(40, "diff base book.txt", 4, "book.txt")
    tool(40, "diff base full", 3, "'full'")
    tool(40, "diff base ''", 2, "B must not be empty")
    tool(40, EXTRACT.replace("tuned tuned", "tuned missing"), 4, "missing")
    tool(40, EXTRACT.replace("base base", "base adapter"), 3, "adapter")
    tool(40, EXTRACT.replace("tuned tuned", "tuned full"), 3, "full")
    tool(40, EXTRACT.replace("tuned tuned", "tuned ''"), 2, "--tuned must not be empty")
    tool(40, EXTRACT.replace("tuned tuned", "tuned base"), 2, "nothing to extract")
    tool(40, EXTRACT.replace("tuned tuned", "tuned wide"), 3, "shape", build=wide)
    tool(40, f"{RESIZE} --adapter base", 3, "'base'", "adapter_config.json")
    tool(40, f"{RESIZE} --adapter missing", 4, "missing")
    tool(40, f"{RESIZE} --adapter book.txt", 4, "book.txt")
    tool(40, f"{RESIZE} --adapter full", 3, "full")
    tool(40, "convert missing --to mlx --out new", 4, "missing")
    tool(40, "convert full --dtype float16 --out new", 3, "full")
    tool(40, "convert book.txt --to peft --out new", 4, "book.txt")
    tool(40, "convert adapter --out new", 2, "--dtype", "--to")
    tool(40, "convert adapter --to mlx --dtype float16 --out new", 2, "--dtype", "--to")
    tool(40, "convert base --to mlx --out new", 3, "base", "adapter_config.json")
    tool(40, "convert adapter --dtype float8 --out new", 2, "--dtype", "'float8'", "bfloat16")
    tool(40, "inspect adapter --base missing", 4, "missing")
    tool(40, "inspect adapter --base adapter", 3, "config.json")
    tool(40, "inspect base --base base", 2, "--base", "for an adapter", "'base'")
    tool(40, "inspect adapter --plot new.txt", 2, "--plot", "'new.txt'", ".png, .svg, .pdf")
    tool(40, "inspect adapter --plot ''", 2, "--plot must not be empty")
    tool(63, f"{COMBINE} --weights 1,2", 2, "--weights", "1 finite numbers", "[1.0, 2.0]")
    tool(63, f"{COMBINE} --how mean", 2, "--how", "'mean'", "svd", "ties")
    tool(63, f"{COMBINE} --how ties", 2, "ties needs density", "(0, 1]")
    tool(63, f"{COMBINE} --how ties --density 0.5", 2, "two or more adapters, got 1", "cat")
    tool(63, f"{COMBINE} --how dare_ties --density 1.5", 2, "density", "(0, 1]", "1.5")
    tool(63, f"{COMBINE} --density 0.5", 2, "density is for ties", "not for cat")
    tool(63, f"{COMBINE} --energy 0.9", 2, "--energy 0.9", "svd", "not of cat")
    tool(63, f"{RESIZE} --energy 0.9", 2, "one of --r, --energy", "--r and --energy")
    tool(63, RESIZE.replace("--r 1", "--energy 0"), 2, "--energy", "(0, 1]", "got 0")
    tool(63, RESIZE.replace("--r 1", "--error -0.1"), 2, "--error", "at least 0", "-0.1")
    tool(63, RESIZE.replace("--r 1", "--budget 1"), 2, "--budget 1", "no layer")
    tool(63, RESIZE.replace("--r 1", ""), 2, "one of --r, --energy", "none of them")
    tool(63, f"{COMBINE} --r 4", 2, "rank", "svd")
    tool(63, f"{COMBINE} --adapter base", 3, "adapter_config.json")
    tool(63, f"{COMBINE} --adapter ''", 2, "--adapter must not be empty")
    for r in (0, -1, "x", 1.5, 2**16 + 1, "9" * 30):
        tool(44, f"{RESIZE} --r={r}", 2, "--r must be", str(r))
    for line in (EXTRACT, RESIZE, CONVERT):  # hostile_commands has these rows of merge
        start = line.removesuffix("new")
        tool(58, f"{start}full", 2, "'full' is not empty")
        tool(58, f"{start}book.txt", 2, "'book.txt' is a file")
        tool(58, f"{start}''", 2, "--out must not be empty")
        tool(59, f"{start}book.txt/new", 4, "book.txt/new")
        tool(59, f"{start}{LONG}", 4, "File name too long")
        if HAS_PROC:
            tool(59, f"{start}{NOWHERE}", 4, NOWHERE)
    in_the_way = written(".new.unfinished", b"mine")
    for line in (MERGE, EXTRACT, RESIZE, CONVERT):
        source = "adapter" if "adapter" in line else "base"
        link = lambda f, source=source: (f / "link").symlink_to(f / source)  # noqa: E731
        tool(58, f"{line.removesuffix('new')}link/new", 2, "is inside", build=link)
        tool(58, line, 3, ".new.unfinished'", build=in_the_way)
    spoilt = broken(ADAPTER_WEIGHTS, "q_proj.lora_B", np.nan)
    tool(38, RESIZE, 5, "q_proj", "not finite", build=spoilt)
    tool(38, COMBINE, 5, "q_proj", "not finite", build=spoilt)
    tool(38, "convert adapter --to mlx --out new", 5, "q_proj", "not finite", build=spoilt)
    spoilt = broken("tuned/model.safetensors", "q_proj", np.inf)
    tool(38, EXTRACT, 5, "q_proj", "not finite", build=spoilt)
    tool(38, "convert tuned --dtype float16 --out new", 5, "q_proj", "not finite", build=spoilt)


# ---- an interruption while files are written -----------------------------------------------------


def interrupt(disk: Disk, kind: str) -> None:
    raise KeyboardInterrupt


def run_quietly(line: str) -> tuple[int, str]:
    """(exit code, stderr)"""
    threads = ["--threads", "1"] if line.startswith("merge") else []
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main([*line.split(), *threads])
    return code, said.getvalue()


def interrupted(
    line: str, wrong: Callable[[Disk, str], None], code: int, says: str, empty: bool = False
) -> Callable[[World], None]:
    """The command, into a new folder or an `empty` one, on a disk of which one change goes wrong.

    That is one of the first ten, some in the middle, or the last three. Each time the folder is
    then as it was, or, if everything was written, complete. The next run works.
    """

    def clear() -> None:
        shutil.rmtree("new", ignore_errors=True)
        if empty:
            Path("new").mkdir()

    def run(world: World) -> None:
        clear()
        before = contents(world.folder)
        with Disk() as whole:
            assert run_quietly(line) == (0, "")
        done = contents(world.folder)
        last = whole.changes
        clear()
        codes = []
        for at in [*range(1, 11), *range(11, last - 3, 13), last - 2, last - 1, last]:
            with Disk(at, wrong):
                ended, message = run_quietly(line)
            codes.append(ended)
            assert ended in (0, code), message
            assert ended == 0 or says in message
            present = contents(world.folder)
            is_done = present == done and (ended == 0 or at == last)
            assert present == before or is_done, f"change {at} of {last}"
            clear()
        assert codes.count(code) > len(codes) / 2
        assert run_quietly(line) == (0, "")
        assert contents(world.folder) == done
        shutil.rmtree("new")

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    found = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def add_interrupted_rows() -> None:
    build = both(tuned, sharded())
    for line in (MERGE, EXTRACT, RESIZE, CONVERT):
        name = line.split()[0]
        full = interrupted(line, stay_full, 4, "No space left on device")
        add(64, f"{name}, the disk is full", build, full, None)
        stopped = interrupted(line, interrupt, 130, "interrupted")
        add(64, f"{name}, interrupted", build, stopped, None)
    empty = interrupted(RESIZE, interrupt, 130, "interrupted", empty=True)
    add(64, "resize into an empty folder, interrupted", nothing, empty, None)


# ---- several tasks in a folder -------------------------------------------------------------------


def tasks(value: object) -> Build:
    """A folder with two tasks, and `value` for what its file says of them."""

    def build(folder: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"])
        model = get_multitask_model(CausalLM(CONFIG, seed=1), {"one": config, "two": config})
        model.save_pretrained(folder / "tasks")
        (folder / "tasks" / "multitask.json").write_text(json.dumps(value))

    return build


def load_tasks(world: World) -> None:
    MultiTask.from_pretrained(CausalLM.from_pretrained("base"), "tasks")


def add_task_rows() -> None:
    line = "merge --base base --adapter tasks --task one --out new"
    file = "multitask.json"

    def bad(tables: object) -> None:
        build = tasks(tables)
        add(65, f"merge {tables!r}", build, line, 3, file, "expected")
        add(65, f"inspect {tables!r}", build, "inspect tasks", 3, file, "expected")
        add(65, f"load {tables!r}", build, load_tasks, FormatError, file, "expected")

    bad([])
    bad({})
    bad({"tasks": []})
    bad({"tasks": {"one": 1}})
    bad({"tasks": {"one": "one"}})
    bad({"tasks": {"one": [1]}})
    bad({"tasks": {"one": None, "two": ["two"]}})
    bad({"tasks": {"one": [["one"]]}})
    for name in ("..", "../base", "/etc", "a/b", "a\\b", "\0", ""):
        build = tasks({"tasks": {"one": [name]}})
        add(65, f"merge {name!r}", build, line, 3, file)
        add(65, f"load {name!r}", build, load_tasks, FormatError, file)
    for name in ("three", "x" * 300, "\N{BULLET}" * 200):
        build = tasks({"tasks": {"one": ["one", name]}})
        add(65, f"no folder {name!r}", build, load_tasks, FormatError, file, "folder")
        add(65, f"merge of no folder {name!r}", build, line, 4, name[:30])


add_record_rows()
add_mlx_rows()
add_merge_rows()
add_tool_rows()
add_interrupted_rows()
add_task_rows()
