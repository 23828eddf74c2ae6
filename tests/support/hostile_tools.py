"""More of the table of hostile inputs: records to train on, and what the tools on files are given. See hostile.py."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faults import Disk, stay_full
from hostile import (
    ADAPTER_KEY,
    CONFIG,
    LONG,
    TINY,
    Row,
    World,
    broken,
    changed_tensors,
    command,
    cut,
    first_shard,
    nothing,
    split,
    write_index,
    written,
)  # fmt: skip

from minilora import CausalLM, LoraConfig, get_multitask_model, get_peft_model
from minilora.cli import main
from minilora.data.records import MAX_LINE_BYTES
from minilora.errors import FormatError
from minilora.formats import load_file, save_file, write_json
from minilora.lora import MultiTask
from minilora.quant import quantize

Build = Callable[[Path], object]
MERGE = "merge --base base --adapter adapter --out new"
TOOLS = {
    "merge": MERGE,
    "extract": "extract --base base --tuned tuned --r 1 --out new",
    "resize": "resize --adapter adapter --r 1 --out new",
    "convert": "convert adapter --dtype float16 --out new",
}
NOWHERE = "/proc/minilora" if Path("/proc/self").exists() else "book.txt/new"


def rows() -> Iterator[Row]:
    yield from record_rows()
    yield from mlx_rows()
    yield from merge_rows()
    yield from tool_rows()
    yield from interrupted_rows()
    yield from task_rows()


# ---- records --------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "the quick brown fox"}\n'


def record_rows() -> Iterator[Row]:
    line = f"finetune --base base --data data.jsonl --out new --steps 1 {TINY}"
    where = "'data.jsonl' line 2: "
    for bad, *says in (
        (b"the lazy dog", "not valid JSON"),
        (b'{"text": "cut', "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b'["text"]', "expected a JSON object, found list"),
        (b'{"text": "caf\xe9"}', "utf-8"),
        (GOOD.decode().encode("utf-16"), "data.jsonl"),
        (b'{"text": "\\ud800"}', "surrogates"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not an integer"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
        (b'{"text": ["a"]}', "'text'", "found list"),
        (b'{"text": "a b", "id": 3}', "found 'text', 'id'"),
        (b'{"prompt": "a b"}', "found 'prompt'"),
        (b'{"text": "abc", "text": "abc"}', "'text' appears twice"),
        (b'{"\\u001b[2J": "abc"}', r"\x1b[2J"),
        (b'{"messages": 5}', "messages"),
        (b'{"messages": [{"role": "user", "content": {"a": "{{ 7 * 7 }}"}}]}', "messages"),
        (b'{"prompt": "' + b"x" * 200 + b'", "completion": "y"}', "nothing to learn"),
    ):
        build = written("data.jsonl", GOOD + bad + b"\n" + GOOD)
        yield Row(61, f"finetune of {bad[:30]!r}", build, line, 3, ("data.jsonl", *says))
    huge = written("data.jsonl", lambda: GOOD + b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}\n')
    yield command(61, line, 3, where, "longer than", build=huge)
    yield command(
        61, line, 3, "data.jsonl", "has no record", build=written("data.jsonl", b"\n\r\n")
    )
    yield command(61, line, 3, "expected 2 records or more", build=written("data.jsonl", GOOD))
    yield command(
        61, f"{line} --eval-data book.jsonl", 4, "book.jsonl", build=written("data.jsonl", GOOD * 9)
    )


# ---- adapters of mlx-lm's -------------------------------------------------------------------------------------------

MLX_PATH = "model.layers.0.self_attn.q_proj"


def mlx(
    folder: Path,
    a: tuple[int, ...] = (16, 2),
    b: tuple[int, ...] = (2, 16),
    more: Any = None,
    **given: Any,
) -> None:
    """An adapter of mlx-lm's on one layer, in the folder `mlx`."""
    (folder / "mlx").mkdir()
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, **given}
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    write_json(folder / "mlx" / "adapter_config.json", {**fields, **(more or {})})
    tensors = {
        f"{MLX_PATH}.lora_a": np.ones(a, np.float32),
        f"{MLX_PATH}.lora_b": np.ones(b, np.float32),
    }
    save_file(folder / "mlx" / "adapters.safetensors", tensors)


def mlx_rows() -> Iterator[Row]:
    line = "convert mlx --to peft --out new"

    def row(code: int, says: str, then: Build = nothing, **fields: Any) -> Row:
        def build(folder: Path) -> None:
            mlx(folder, **fields)
            then(folder)

        return Row(62, f"{fields or says}"[:60], build, line, code, ("mlx", says))

    for scale in (0, -1, None, True, "20", [20.0], 1e300):
        yield row(2, "scale must be a positive number", scale=scale)
    for rank in (0, -2, 2.0, True, "2", 2**31):
        yield row(2, "rank must be an integer of at least 1", rank=rank)
    for dropout in (1.0, -0.5, "a", None):
        yield row(2, "lora_dropout must be", dropout=dropout)
    for more in (
        {"fine_tune_type": "full"},
        {"lora_parameters": None},
        {"lora_parameters": [2]},
        {"fine_tune_type": 1},
    ):
        yield row(2, f"{next(iter(more))} must be", more=more)
    shapes: tuple[tuple[Any, Any], ...] = (
        ((2, 16), (16, 2)), ((2, 16), (2, 16)), ((16, 2), (16, 2)), ((16, 3), (3, 16)), ((16,), (2, 16)), ((), ()),
        ((16, 2, 1), (2, 16)), ((0, 2), (3, 16)),
    )  # fmt: skip
    for a, b in shapes:  # such as PEFT has them, or of another rank
        yield row(3, "expected (in, 2), (2, out)", a=a, b=b)
    # In a square matrix nothing but the rank tells what lies the wrong way.
    yield row(3, "expected (in, 2), (2, out)", a=(2, 2), b=(3, 3))
    file = "mlx/adapters.safetensors"
    for key in ("x.lora_A", "x.weight", "\x1b[2J"):
        yield row(
            3,
            "is not a tensor of an adapter of mlx-lm's",
            changed_tensors(file, lambda t, k=key: t.update({k: t[next(iter(t))]})),
        )
    yield row(3, "not an adapter of mlx-lm's", lambda f: (f / file).unlink())
    yield row(3, "a file of 200", cut(file, 200))
    yield row(3, "not valid JSON", written("mlx/adapter_config.json", b'{"lora_parameters": {'))
    yield row(5, "not finite", broken(file, "lora_a", np.nan))
    yield Row(
        62,
        "PEFT's as mlx-lm's",
        nothing,
        "convert adapter --to peft --out new",
        3,
        ("adapter", "mlx-lm"),
    )
    yield Row(
        62,
        "mlx-lm's as PEFT's",
        mlx,
        "convert mlx --to mlx --out new",
        3,
        ("mlx", "adapter_model.safetensors"),
    )


# ---- what cannot be merged ------------------------------------------------------------------------------------------


def second(config: LoraConfig, name: str = "second") -> Build:
    """Another adapter for the base."""

    def build(folder: Path) -> None:
        model = get_peft_model(CausalLM(CONFIG, seed=1), config)
        for parameter in model.adapter_parameters("default").values():
            parameter.data = parameter.data + np.float32(0.01)
        model.save_pretrained(folder / name)

    return build


def quantised(folder: Path) -> None:
    quantize(CausalLM(CONFIG, seed=1)).save_pretrained(folder / "base")


def sharded(
    change: Callable[[Path, dict[str, str]], object] = lambda folder, weight_map: None,
) -> Build:
    """The base in three shards, with its index changed in place."""

    def build(folder: Path) -> None:
        weight_map = split(folder / "base")
        change(folder / "base", weight_map)
        write_index(folder / "base", weight_map)

    return build


def leading_outside(folder: Path, weight_map: dict[str, str]) -> None:
    save_file(folder.parent / "secret.safetensors", {"x": np.zeros(1)})
    first_shard("../secret.safetensors")(folder, weight_map)


def made_not_finite(line: str, name: str) -> Callable[[World], None]:
    """The command ends well, without a warning, and the tensor `name` of what it made is not finite."""

    def run(world: World) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(line.split()) == 0
        assert not np.isfinite(load_file(world.folder / "new" / "model.safetensors")[name]).all()
        shutil.rmtree(world.folder / "new")

    return run


def merge_rows() -> Iterator[Row]:
    second_shard = "model-00002-of-00003.safetensors"
    index = "model.safetensors.index.json"
    for build, *says in (
        (sharded(leading_outside), index, "lies outside the folder"),
        (sharded(first_shard("/etc/passwd.safetensors")), index, "lies outside the folder"),
        (sharded(first_shard("model-00009-of-00003.safetensors")), index, "is missing"),
        (sharded(lambda b, w: (b / second_shard).unlink()), index, second_shard, "is missing"),
        (
            sharded(lambda b, w: (b / second_shard).write_bytes(b"")),
            second_shard,
            "not a safetensors file",
        ),
        (sharded(lambda b, w: w.pop("model.norm.weight")), index, "in it but not listed"),
    ):
        for line in (
            MERGE,
            "convert base --dtype float16 --out new",
            "diff base tuned",
            "inspect base",
        ):
            yield Row(
                42,
                f"{line.split()[0]}: {' '.join(says)}"[:60],
                lambda f, b=build: (tuned(f), b(f)),
                line,
                3,
                tuple(says),
            )
    key, file = ADAPTER_KEY.format, "adapter/adapter_model.safetensors"
    for change, says in (
        (
            lambda t: t.update({key("v", "B"): np.zeros((5, 2))}),
            "v_proj: the adapter is for (5, 16)",
        ),
        (lambda t: t.update({key("v", "A"): np.zeros((2, 2, 16))}), "has no lora_B that fits it"),
        (lambda t: t.update({key("v", "A"): np.zeros(())}), "lora_A ()"),
        (lambda t: t.pop(key("v", "B")), "has no lora_B that fits it"),
        (lambda t: [t.pop(key("v", x)) for x in "AB"], "missing model.layers.0.self_attn.v_proj"),
        (
            lambda t: t.update({"base_model.model.stranger.weight": np.zeros(1)}),
            "unknown stranger.weight",
        ),
        (lambda t: t.update({"\x1b[2J": np.zeros(1)}), r"\x1b[2J"),
        (
            lambda t: t.update({"base_model.model.lora_A.weight": np.zeros((2, 16))}),
            "unknown lora_A.weight",
        ),
    ):
        yield command(43, MERGE, 3, "adapter", says, build=changed_tensors(file, change))
    for weights in (
        "x",
        "''",
        "1,",
        ",",
        "1,2",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "1;2",
        "1,2,3",
        "0x10",
        "1e",
        LONG,
    ):
        yield command(56, f"{MERGE} --weights={weights}", 2, "--weights")
    yield command(63, MERGE, 2, "quantization_config", build=quantised)
    yield command(
        63, "convert base --dtype float16 --out new", 2, "quantization_config", build=quantised
    )
    beside = f"{MERGE} --adapter second"
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    yield command(63, beside, 2, "cannot be added to another adapter's", build=second(dora))
    yield command(
        63, f"{beside} --weights 1,0.5", 2, "cannot be taken 0.5 times", build=second(dora)
    )
    saved = LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"])
    both = lambda folder: (second(saved)(folder), second(saved, "third")(folder))  # noqa: E731
    yield command(63, f"{beside} --adapter third", 2, "lm_head.weight cannot be added", build=both)
    yield command(63, f"{MERGE} --adapter missing", 4, "missing")
    yield command(63, f"{MERGE} --adapter base", 3, "'base' has no adapter_config.json")
    yield command(63, f"{MERGE} --task one", 2, "there is no task to choose")
    # What is not finite is merged where that is asked for, and stays what it is.
    for spoilt, name in (
        (broken("base/model.safetensors", "lm_head", np.nan), "lm_head.weight"),
        (
            broken("base/model.safetensors", "q_proj", np.inf),
            "model.layers.0.self_attn.q_proj.weight",
        ),
        (broken(file, "q_proj.lora_B", np.nan), "model.layers.0.self_attn.q_proj.weight"),
    ):
        allowed = made_not_finite(f"{MERGE} --allow-nonfinite --threads 2", name)
        yield Row(38, f"{name} is not finite, and may be so", spoilt, allowed, None)
    large = f"{MERGE} --weights 1e300"
    yield command(38, large, 5, "--weights [1e+300]", "q_proj.weight with its adapters")
    yield command(
        38,
        f"{MERGE} --dtype float16",
        5,
        "lm_head",
        build=broken("base/model.safetensors", "lm_head", 1e30),
    )


# ---- the other tools ------------------------------------------------------------------------------------------------


def tuned(folder: Path) -> None:
    """The base, trained on."""
    shutil.copytree(folder / "base", folder / "tuned", dirs_exist_ok=True)
    q = "model.layers.0.self_attn.q_proj.weight"
    changed_tensors("tuned/model.safetensors", lambda t: t.update({q: t[q] + np.float32(1)}))(
        folder
    )


def tool_rows() -> Iterator[Row]:
    def row(kind: int, line: str, code: int, *says: str, build: Build = nothing) -> Row:
        return command(kind, line, code, *says, build=lambda folder: (tuned(folder), build(folder)))

    extract, resize = "extract --r 1 --out new", "resize --r 1 --out new"
    for line, code, says in (
        ("diff base missing", 4, "missing"), ("diff missing base", 4, "missing"), ("diff base adapter", 3, "adapter"),
        ("diff base book.txt", 4, "book.txt"), ("diff base full", 3, "'full' has no"), ("diff base ''", 2, "DIR"),
        (f"{extract} --base base --tuned missing", 4, "missing"),
        (f"{extract} --base adapter --tuned tuned", 3, "adapter"),
        (f"{extract} --base base --tuned full", 3, "full"), (f"{extract} --base base --tuned ''", 2, "--tuned"),
        (f"{extract} --base base --tuned base", 2, "there is nothing to extract"),
        (f"{resize} --adapter base", 3, "'base' has no adapter_config.json"),
        (f"{resize} --adapter missing", 4, "missing"),
        (f"{resize} --adapter book.txt", 4, "book.txt"), (f"{resize} --adapter full", 3, "full"),
        ("convert missing --to mlx --out new", 4, "missing"), ("convert full --dtype float16 --out new", 3, "full"),
        ("convert book.txt --to peft --out new", 4, "book.txt"), ("convert adapter --out new", 2, "--dtype, or --to"),
        ("convert adapter --to mlx --dtype float16 --out new", 2, "--dtype, or --to"),
        ("convert base --to mlx --out new", 3, "base"), ("convert adapter --dtype float8 --out new", 2, "float8"),
        ("inspect adapter --base missing", 4, "missing"), ("inspect adapter --base adapter", 3, "config.json"),
        ("inspect base --base base", 2, "for an adapter"), ("inspect adapter --plot new.txt", 2, "a picture's name"),
    ):  # fmt: skip
        yield row(40, line, code, says)
    for r in (0, -1, "x", 1.5, 2**16 + 1, "9" * 30):
        yield row(44, f"resize --adapter adapter --out new --r={r}", 2, "--r")
    for line in TOOLS.values():
        for out, code, says in (("full", 2, "'full' is not empty"), ("book.txt", 2, "'book.txt' is a file"),
                                ("book.txt/new", 4, "book.txt/new"), (LONG, 4, "File name too long"),
                                (NOWHERE, 4, NOWHERE), ("''", 2, "--out")):  # fmt: skip
            if not line.startswith(
                "merge"
            ):  # test_cli.py and the rows of hostile.py have them of merge
                yield row(58 if code == 2 else 59, line.removesuffix("new") + out, code, says)
        source = "adapter" if "adapter" in line else "base"
        link = lambda folder, source=source: (folder / "link").symlink_to(folder / source)  # noqa: E731
        yield row(58, line.removesuffix("new") + "link/new", 2, "is inside", build=link)
        in_the_way = lambda folder: (folder / ".new.unfinished").write_text("mine")  # noqa: E731
        yield row(58, line, 3, ".new.unfinished' is in the way", build=in_the_way)
    spoilt = broken("adapter/adapter_model.safetensors", "q_proj.lora_B", np.nan)
    yield row(38, TOOLS["resize"], 5, "q_proj", "not finite", build=spoilt)
    spoilt = broken("tuned/model.safetensors", "q_proj", np.inf)
    yield row(38, TOOLS["extract"], 5, "q_proj", "not finite", build=spoilt)
    yield row(
        38, "convert tuned --dtype float16 --out new", 5, "q_proj", "not finite", build=spoilt
    )


# ---- an end in the middle -------------------------------------------------------------------------------------------


def interrupt(disk: Disk, kind: str) -> None:
    raise KeyboardInterrupt


def ended(
    line: str, wrong: Callable[[Disk, str], None], code: int, says: str, empty: bool = False
) -> Callable[[World], None]:
    """The command, into a new folder or an `empty` one, with a disk of which one change goes wrong: the first ten, some
    in the middle, the last three.

    Each time the folder is then as it was, or, where nothing is left to be written, all is done. The next try works.
    """

    def run(world: World) -> None:
        def call() -> tuple[int, str]:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()) as said,
            ):
                return main(
                    [*line.split(), *(["--threads", "1"] if line.startswith("merge") else [])]
                ), said.getvalue()

        def again() -> None:
            shutil.rmtree("new", ignore_errors=True)
            if empty:
                Path("new").mkdir()

        again()
        before = contents(world.folder)
        with Disk() as whole:
            assert call() == (0, "")
        done, last = contents(world.folder), whole.changes
        again()
        ends = []
        for at in [*range(1, 11), *range(11, last - 3, 13), last - 2, last - 1, last]:
            with Disk(at, wrong):
                ends.append(call())
            there = contents(world.folder)
            assert there == before or (there == done and (ends[-1][0] == 0 or at == last)), (
                f"change {at} of {last}"
            )
            assert ends[-1][0] in (0, code), ends[-1]
            assert ends[-1][0] == 0 or says in ends[-1][1]
            again()
        assert sum(end[0] == code for end in ends) > len(ends) / 2
        assert call() == (0, "")
        assert contents(world.folder) == done
        shutil.rmtree("new")

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def interrupted_rows() -> Iterator[Row]:
    build = lambda folder: (tuned(folder), sharded()(folder))  # noqa: E731
    for name, line in TOOLS.items():
        for wrong, code, says in (
            (stay_full, 4, "No space left on device"),
            (interrupt, 130, "interrupted"),
        ):
            yield Row(64, f"{name}, {wrong.__name__}", build, ended(line, wrong, code, says), None)
    empty = ended(TOOLS["resize"], interrupt, 130, "interrupted", empty=True)
    yield Row(64, "resize into an empty folder, interrupt", nothing, empty, None)


# ---- several tasks in a folder --------------------------------------------------------------------------------------


def tasks(value: object) -> Build:
    def build(folder: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"])
        get_multitask_model(
            CausalLM(CONFIG, seed=1), {"one": config, "two": config}
        ).save_pretrained(folder / "tasks")
        (folder / "tasks" / "multitask.json").write_text(json.dumps(value))

    return build


def load_tasks(world: World) -> None:
    MultiTask.from_pretrained(CausalLM.from_pretrained("base"), "tasks")


def task_rows() -> Iterator[Row]:
    line = "merge --base base --adapter tasks --task one --out new"
    for value in ([], {}, {"tasks": []}, {"tasks": {"one": 1}}, {"tasks": {"one": "one"}}, {"tasks": {"one": [1]}},
                  {"tasks": {"one": None, "two": ["two"]}}, {"tasks": {"one": [["one"]]}}):  # fmt: skip
        for run in (line, "inspect tasks"):
            yield Row(
                65,
                f"{run.split()[0]} {value!r}",
                tasks(value),
                run,
                3,
                ("multitask.json", "expected"),
            )
        yield Row(
            65,
            f"load {value!r}",
            tasks(value),
            load_tasks,
            FormatError,
            ("multitask.json", "expected"),
        )
    for name in ("..", "../base", "/etc", "a/b", "a\\b", "\0", ""):
        yield Row(
            65, f"merge {name!r}", tasks({"tasks": {"one": [name]}}), line, 3, ("multitask.json",)
        )
        yield Row(
            65,
            f"load {name!r}",
            tasks({"tasks": {"one": [name]}}),
            load_tasks,
            FormatError,
            ("multitask.json",),
        )
    for name in ("three", "x" * 300, "\N{BULLET}" * 200):
        missing = tasks({"tasks": {"one": ["one", name]}})
        yield Row(
            65,
            f"no folder {name!r}",
            missing,
            load_tasks,
            FormatError,
            ("multitask.json", "there is no folder of"),
        )
        yield Row(65, f"merge of no folder {name!r}", missing, line, 4, (name[:30],))
