"""Bad and odd command lines: arguments, options, texts and folders. See hostile.py."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path

from hostile import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_WEIGHTS,
    CONFIG,
    EVALUATE,
    FINETUNE,
    GENERATE,
    HAS_PROC,
    LATIN,
    LONG,
    LORA,
    MERGE,
    NOWHERE,
    PRETRAIN,
    TEXT,
    TINY,
    both,
    command,
    cut,
    removed,
    set_to,
    written,
)

from minilora import CausalLM, TransformerConfig, get_multitask_model
from minilora.cli import main
from minilora.data.tokenizer import ByteTokenizer

DEMO = "demo --out new"
TASKS = f"finetune --base base --tasks book.txt latin.txt --out new {TINY}"
TRAIN = f"finetune --base base --data book.txt --steps 4 --save-every 2 --lr 0.05 {TINY}"


def refused(kind: int, line: str, *says: str) -> None:
    """A command line that is a mistake of usage: exit code 2."""
    command(kind, line, 2, *says)


def refused_values(
    kind: int, line: str, option: str, word: str, values: Iterable[object], *says: str
) -> None:
    """Values that an option refuses; the message has a word of its name, and the value."""
    for value in values:
        refused(kind, f"{line} --{option}={value}", word, str(value), *says)


def add_usage_rows() -> None:
    refused(66, "", "no command")
    refused(66, "nothing", "'nothing'", "finetune")
    refused(66, "--nothing", "--nothing")
    refused(66, "finetune", "required: --base")
    refused(66, "generate --base base", "--prompt")
    refused(66, f"{GENERATE} --prompts book.txt", "--prompts", "not allowed with", "--prompt")
    refused(66, f"{GENERATE} --batch-size 2", "--batch-size", "give --prompts")
    refused(66, "inspect", "DIR")
    refused(66, "diff base", "B")
    refused(66, "devices here", "unrecognized arguments: here")
    # Merging is NumPy's, and nothing in it is random.
    refused(66, f"{MERGE} --device cpu", "unrecognized arguments: --device cpu")
    refused(66, f"{MERGE} --seed 0", "unrecognized arguments: --seed 0")
    refused(66, f"{EVALUATE} --nothing", "--nothing")
    refused(66, f"{EVALUATE} extra words", "extra words")
    refused(66, f"{EVALUATE} --thread 1", "--thread")
    refused(66, f"{EVALUATE} --context", "--context")
    refused(66, "generate --base base --prompt --x", "--prompt: expected one argument", "after =")
    refused(66, f"{EVALUATE} {LONG}", "unrecognized")
    refused(66, "'\x1b[2J'", r"\x1b[2J")
    refused(66, f"{EVALUATE} '\x1b[2J\r\n'", r"\x1b[2J\r\n")


def add_number_rows() -> None:
    for line in (PRETRAIN, FINETUNE, EVALUATE):
        refused_values(56, line, "context", "context", (0, -1))
    limit = ("context 257", "max_position_embeddings = 256")
    refused(56, f"{FINETUNE} --context 257", *limit)
    refused(56, f"{EVALUATE} --context 257", *limit)
    command(56, f"{PRETRAIN} --context 600", 3, "context of 600")
    line = f"{PRETRAIN} --context 16"
    refused(56, f"{line} --max-position-embeddings 15", "max_position_embeddings = 15")
    refused_values(56, PRETRAIN, "max-position-embeddings", "--max-position-embeddings", [0])
    refused_values(56, FINETUNE, "lr", "lr", ("nan", "inf", -1, 0, "x", ""))
    refused_values(56, FINETUNE, "steps", "steps", (-1, 0, "1e30", 1.5, "x", "9" * 30))
    refused_values(56, FINETUNE, "batch-size", "batch", (-1, 0, 1.5, 10**18))
    refused_values(56, FINETUNE, "accumulate", "accumulate", (-1, 0, 10**18))
    refused_values(56, FINETUNE, "weight_decay", "weight_decay", ("nan", -1, "inf"))
    refused_values(56, FINETUNE, "max_grad_norm", "max_grad_norm", ("nan", -1, "inf", 0))
    refused_values(56, FINETUNE, "warmup", "warmup", [-1])
    line = f"{FINETUNE} --optimizer loraplus"
    for name in ("loraplus-lr-ratio", "loraplus-lr-embedding"):
        refused_values(56, line, name, name.replace("-", "_"), ("nan", -1, "inf", 0, "x"))
    line = f"{FINETUNE} --optimizer riemannian"
    refused_values(56, line, "riemannian-reg", "riemannian_reg", ("nan", -1, "inf", "x"))
    refused(56, f"{FINETUNE} --riemannian-reg 1", "is for optimizer riemannian", "leave it out")
    refused(56, f"{FINETUNE} --optimizer sgd", "--optimizer", "'sgd'", "lorafa")
    for name in ("lorafa", "riemannian"):
        refused(56, f"{FINETUNE} --optimizer {name} --method adalora", name, "ADALORA", "loraplus")
    refused(56, f"{FINETUNE} --optimizer loraplus --method full", "loraplus", "use adamw")
    for name in ("save_every", "eval_every", "shard"):
        refused_values(56, FINETUNE, name, name, [0])
    refused_values(56, EVALUATE, "limit", "limit", [0])
    refused(56, f"{EVALUATE} --limit {'9' * 5000}", "--limit")
    for line in (FINETUNE, PRETRAIN, GENERATE, EVALUATE):
        refused_values(56, line, "seed", "--seed", (-1, 2**64, "x"), "at least 0")
    for line in (FINETUNE, PRETRAIN, GENERATE, EVALUATE, MERGE, DEMO):
        refused_values(56, line, "threads", "--threads", (0, -3, 1.5), "at least 1")
    refused(56, f"{EVALUATE} --threads {'9' * 5000}", "--threads", "at least 1")
    for line in (FINETUNE, PRETRAIN, GENERATE, EVALUATE, DEMO):
        refused_values(56, line, "device", "", ("tpu", "cuda:x", "CPU"))
    refused_values(56, PRETRAIN, "hidden-size", "--hidden-size", [0], "at least 1")
    refused(56, f"{PRETRAIN} --hidden-size 15", "hidden_size", "15")
    refused(56, f"{PRETRAIN} --num-attention-heads 16", "head_dim")
    refused(56, f"{PRETRAIN} --num-key-value-heads 3", "num_key_value_heads", "3")
    refused_values(56, PRETRAIN, "num-hidden-layers", "--num-hidden-layers", ["1e9"])
    refused(56, f"{PRETRAIN} --num-hidden-layers 1000000000", "parameters", "4,294,967,296")
    wide = "--hidden-size 2147483640 --intermediate-size 2147483640 --num-attention-heads 357913940"
    refused(56, f"{PRETRAIN} {wide}", "parameters", "4,294,967,296")
    refused_values(56, GENERATE, "temperature", "temperature", (-1, "nan", "inf"))
    refused_values(56, GENERATE, "top-k", "--top-k", [0], "at least 1")
    refused_values(56, GENERATE, "top-p", "top_p", (0, 1.5, "nan"))
    refused_values(56, GENERATE, "max-new-tokens", "--max-new-tokens", [-1])
    command(56, f"{GENERATE} --top-k 100000", None)
    command(57, f"{GENERATE} --prompt ''", 3, "--prompt is empty")
    command(57, f"{GENERATE} --chat", 3, "chat template")
    prompts = "generate --base base --max-new-tokens 2 --prompts"
    refused_values(56, f"{prompts} book.txt", "batch-size", "--batch-size", (0, -1, 1.5))
    command(57, f"{prompts} book.txt", 3, "'book.txt' line 1", "620 tokens", "= 256", "shorten")
    command(57, f"{prompts} latin.txt", 3, "'latin.txt' line 1", "not UTF-8 at byte 1")
    command(57, f"{prompts} base", 3, "not a regular file")
    command(57, f"{prompts} nowhere.txt", 4, "nowhere.txt")
    command(57, f"{GENERATE} --prompt '{'long ' * 100}'", None)
    command(57, f"{GENERATE} --prompt '\udcff\x1b\U0001f600 é'", None)


def add_adapter_rows() -> None:
    refused_values(44, FINETUNE, "r", "r must be", (0, -1, 2**40), "at least 1")
    refused_values(44, FINETUNE, "r", "--r must be", (1.5, "x", ""), "at least 1")
    refused_values(45, FINETUNE, "lora-alpha", "lora_alpha", ("nan", "inf", -2))
    refused(45, f"{FINETUNE} --lora-alpha 1e400", "lora_alpha", "inf")
    at_least = "lora_alpha must be a number of at least 0"
    refused(45, f"{FINETUNE} --lora-alpha x", at_least, "got 'x'")
    refused_values(45, FINETUNE, "lora-dropout", "dropout", (-0.1, 1, "nan", "x"))
    target = f"{FINETUNE} --target-modules"
    refused(47, f"{target} nothing", "'nothing'", "match nothing", "q_proj", "down_proj")
    refused(47, f"{target} q_proj,nothing", "'nothing'")
    refused(46, f"{target} '(([a-z_0-9]+)*\\.?)*!'", "([a-z_0-9]+)*")
    refused(46, f"{target} '(q_proj'", "(q_proj")
    refused(46, f"{target} '{'(' * 500}'", "(((")
    refused(47, f"{target} ''", "target_modules")
    refused(47, f"{target} ,", "target_modules")
    refused(47, f"{target} norm", "norm")
    refused(47, f"{target} 'a\nb\x1b[2J'", r"a\nb\x1b[2J")
    refused(47, f"{target} embed_tokens --method adalora", "embed_tokens")
    refused(47, f"{FINETUNE} --trainable-token-indices 256", "row 256")
    refused_values(47, FINETUNE, "trainable-token-indices", "--trainable", ["1,x"], "0,1")
    refused(47, f"{FINETUNE} --exclude-modules 'q_proj,v_proj'", "no target")
    refused(44, f"{FINETUNE} --rank-pattern '{{'", "--rank-pattern")
    refused(44, f"{FINETUNE} --rank-pattern '[1]'", "--rank-pattern")
    refused(44, f"{FINETUNE} --rank-pattern {'[' * 5000}", "--rank-pattern")
    twice = '{"q_proj": 1, "q_proj": 2}'
    refused(44, f"{FINETUNE} --rank-pattern '{twice}'", "--rank-pattern", "twice")
    refused(44, f"{FINETUNE} --rank-pattern '{{\"q_proj\": 0}}'", "rank_pattern")
    refused(45, f"{FINETUNE} --alpha-pattern '{{\"q_proj\": NaN}}'", "--alpha-pattern")
    refused(46, f"{FINETUNE} --alpha-pattern '{{\"(\": 1}}'", "(")
    refused_values(47, FINETUNE, "layers-to-transform", "--layers-to-transform", ["x"], "0,1")
    refused(47, f"{FINETUNE} --layers-to-transform 7", "no target")
    refused(47, f"{FINETUNE} --layers-pattern layers", "layers_pattern", "layers_to_transform")
    refused(47, f"{FINETUNE} --modules-to-save nothing", "'nothing'")
    refused(48, f"{FINETUNE} --bias some", "--bias", "'some'", "lora_only")
    refused(48, f"{FINETUNE} --init-lora-weights magic", "init_lora_weights", "gaussian")
    refused(67, f"{FINETUNE} --quantize nf4 --modules-to-save up_proj", "quantised")


def add_method_rows() -> None:
    """What a method does not allow is refused before the base is read."""
    line = FINETUNE.replace("--base base", "--base missing")
    for start in (FINETUNE, DEMO):
        refused(48, f"{start} --method boft", "--method: invalid choice: 'boft'", "adalora")
    for start in (FINETUNE, EVALUATE, GENERATE, DEMO):
        refused(48, f"{start} --quantize nf3", "--quantize: invalid choice: 'nf3'", "nf4")
    for start in (line, DEMO):
        refused(67, f"{start} --method full --r 4", "method full")
        refused(67, f"{start} --method full --lora-alpha 3", "method full", "lora_alpha")
        refused(67, f"{start} --method full --lora-alpha 3 --r 4", "full", "r, lora_alpha")
        refused(67, f"{start} --method full --quantize nf4", "full", "quantize = nf4")
    refused(67, f"{line} --method full --use-dora --tinit 3", "use_dora, tinit")
    refused(67, f"{line} --method dora --lora-bias", "--lora-bias")
    for name in ("beta1", "beta2", "orth_reg_weight"):
        refused(67, f"{line} --method lora --{name} 0.5", name)
        refused(67, f"{line} --method dora --{name} 0.5", name)
    for name in ("target_r", "init_r", "tinit", "tfinal", "deltaT"):
        refused(67, f"{line} --{name} 1", name)
    line += " --method adalora"
    refused(67, f"{line} --r 4 --target-r 4", "r and target_r")
    refused(67, f"{line} --use-dora", "use_dora must be False")
    refused(67, f"{line} --use-rslora", "use_rslora must be False")
    refused(67, f"{line} --init-lora-weights gaussian", "init_lora_weights")
    refused(67, f"{line} --rank-pattern '{{\"q_proj\": 4}}'", "rank_pattern")
    refused(67, f"{line} --steps 100 --tinit 75", "tinit", "total_step - tfinal", "75")
    refused(67, f"{line} --target-r 9 --init-r 8", "target_r", "at most init_r", "8")
    refused_values(67, line, "deltaT", "deltaT", [0])
    refused_values(67, line, "beta1", "beta1 must be a number above 0 and below 1", [1])
    refused_values(67, line, "orth-reg-weight", "orth_reg_weight", ["nan"])
    refused(44, f"{DEMO} --method adalora --r 0", "--r", "at least 1")


# ---- texts ---------------------------------------------------------------------------------------


def text(kind: int, line: str, content: bytes, code: int | None, *says: str) -> None:
    """A command line and the text.txt that it reads."""
    command(kind, line, code, *says, build=written("text.txt", content))


def add_text_rows() -> None:
    folder = lambda f: (f / "text.txt").mkdir()  # noqa: E731
    empty = written("empty.txt", b"")
    for start in (PRETRAIN, FINETUNE, EVALUATE):
        line = start.replace("book.txt", "text.txt")
        command(53, line, 4, "text.txt")
        command(53, line, 3, "text.txt", "regular file", build=folder)
        text(53, line, b"", 3, "text.txt", "empty")
        text(53, line, b"a", 3, "at least 2" if start == EVALUATE else "--data text.txt")
    needs = ("--data text.txt", "context of 16", "at least 17 tokens")
    for start in (PRETRAIN, FINETUNE):
        line = start.replace("book.txt", "text.txt")
        text(53, line, TEXT[:18], 3, *needs, "it has 16 once its last tenth is held out")
        text(53, f"{line} --eval-data book.txt", TEXT[:16], 3, *needs, "it has 16")
        text(54, line, "\N{SLIGHTLY SMILING FACE}".encode(), 3, "text.txt")
        command(53, f"{start} --eval-data text.txt", 4, "text.txt")
        command(53, f"{start} --eval-data empty.txt", 3, "empty.txt", build=empty)
        text(53, f"{start} --eval-data text.txt", b"a", 3, "--eval-data text.txt", "at least 2")
    text(53, f"{DEMO} --pretrain-data text.txt", b"abcd", 3, "--pretrain-data text.txt", "has 4")
    text(53, f"{DEMO} --adapt-data text.txt", b"abcd", 3, "--adapt-data text.txt", "has 4")
    command(53, f"{DEMO} --adapt-data missing.txt", 4, "missing.txt")
    command(53, f"{PRETRAIN} --data /dev/zero", 3, "/dev/zero")
    command(53, f"{PRETRAIN} --data book.txt/", 4, "book.txt/")
    command(53, f"{PRETRAIN} --data {LONG}", 4, LONG[:60])
    refused(53, f"{PRETRAIN} --data ''", "--data must not be empty")
    refused(53, f"{PRETRAIN} --eval-data ''", "--eval-data must not be empty")
    half = written("half\n.txt", b"abcd")
    command(53, f"{PRETRAIN} --data 'half\n.txt'", 3, r"half\n.txt", build=half)
    command(53, f"{PRETRAIN} --data 'half\n.txt'", 4, r"half\n.txt")
    command(53, f"{EVALUATE} --data 'a\nb\x1b[2Jc'", 4, r"a\nb\x1b[2Jc")
    # Odd, and read all the same: a text is bytes.
    line = f"{EVALUATE.replace('book.txt', 'text.txt')} --limit 2"
    text(53, line, b"\n" * 400, None)
    text(53, line, b"\0" * 400, None)
    text(53, line, b"a\r\n" * 200, None)
    text(53, line, b"\xef\xbb\xbf" + TEXT, None)
    text(53, line, b"x" * 100_000, None)
    text(54, line, LATIN, None)
    text(54, line, TEXT.decode().encode("utf-16"), None)
    text(54, line, TEXT + "é".encode()[:1], None)


# ---- folders -------------------------------------------------------------------------------------


def add_output_rows() -> None:
    for line in (FINETUNE, PRETRAIN, MERGE, "demo"):
        refused(58, f"{line} --out full", "--out 'full' is not empty")
        refused(58, f"{line} --out book.txt", "'book.txt' is a file")
        refused(59, f"{line} --out ''", "--out must not be empty")
        command(59, f"{line} --out book.txt/new", 4, "book.txt/new")
        command(59, f"{line} --out {LONG}", 4, "File name too long")
        command(59, f"{line} --out {'n' * 300}", 4, "File name too long")
        if HAS_PROC:
            command(59, f"{line} --out {NOWHERE}", 4, NOWHERE)
    for out in ("base", "./full/../base", "base/merged"):
        refused(58, f"{MERGE} --out {out}", out, "--base")
    for out in ("adapter", "adapter/merged"):
        refused(58, f"{MERGE} --out {out}", out, "--adapter")


def add_input_rows() -> None:
    command(40, f"{EVALUATE} --base missing", 4, "missing")
    command(40, f"{EVALUATE} --base book.txt", 4, "book.txt")
    command(40, f"{EVALUATE} --base full", 3, "config.json")
    command(40, f"{EVALUATE} --base adapter", 3, "config.json")
    refused(40, f"{EVALUATE} --base ''", "--base must not be empty")
    command(40, f"{EVALUATE} --adapter missing", 4, "missing")
    command(40, f"{EVALUATE} --adapter base", 3, "adapter_config.json")
    refused(40, f"{EVALUATE} --adapter ''", "--adapter must not be empty")
    command(40, "inspect missing", 4, "missing")
    command(40, "inspect full", 3, "full")
    command(40, "inspect book.txt", 3, "book.txt")
    refused(40, "inspect ''", "DIR must not be empty")
    command(40, "inspect 'a\nb\x1b[2Jc\t\x07'", 4, r"a\nb\x1b[2Jc\t\x07")
    # Damage to a folder ends the commands that read it in the same way.
    damaged("base", BASE_WEIGHTS, BASE_CONFIG, EVALUATE)
    damaged("adapter", ADAPTER_WEIGHTS, ADAPTER_CONFIG, f"{EVALUATE} --adapter adapter")
    # An adapter that does not fit.
    line = f"{EVALUATE} --adapter adapter"
    command(44, line, 2, "adapter", "r must be", build=set_to(ADAPTER_CONFIG, r=0))
    rank = set_to(ADAPTER_CONFIG, r=4)
    command(43, line, 3, "lora_A.weight", "(2, 16)", "(4, 16)", build=rank)
    dora = set_to(ADAPTER_CONFIG, use_dora=True)
    magnitude = "q_proj.lora_magnitude_vector"
    command(43, line, 3, "missing", f"model.layers.0.self_attn.{magnitude}", build=dora)
    command(43, "inspect adapter", 3, "lora_magnitude_vector", build=dora)
    biased = set_to(ADAPTER_CONFIG, use_dora=True, lora_bias=True)
    command(43, line, 2, "lora_bias", build=biased)
    line = f"{EVALUATE} --base wide --adapter adapter"
    says = ("q_proj.lora_A.weight", "(2, 16)", "(2, 24)", "q_proj.lora_B.weight", "1 more")
    command(43, line, 3, *says, build=wide)
    says = ("q_proj", "(2, 24)", "(2, 16)")
    command(43, f"{MERGE} --base wide", 3, *says, build=wide)


def damaged(folder: str, weights: str, config: str, line: str) -> None:
    def flip(root: Path) -> None:
        data = bytearray((root / weights).read_bytes())
        data[20] ^= 0xFF
        (root / weights).write_bytes(data)

    for reader in (line, f"inspect {folder}"):
        command(26, reader, 3, weights, build=cut(weights, 400))
        command(7, reader, 3, weights, build=flip)
        command(1, reader, 3, weights, build=cut(weights, 0))
        command(34, reader, 3, folder, build=removed(weights))
        command(10, reader, 3, config, build=cut(config, 50))
        command(11, reader, 3, config, build=written(config, b"[]"))
        command(18, reader, 3, config, build=written(config, b'{"r": 8, "r": 9}'))


def wide(folder: Path) -> None:
    """Another base, which the adapter does not fit."""
    config = TransformerConfig(
        hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    CausalLM(config, seed=1).save_pretrained(folder / "wide")
    ByteTokenizer().save(folder / "wide")


# ---- several tasks, and runs that continue -------------------------------------------------------


def multitask(folder: Path) -> None:
    tasks = {"book": LORA, "latin": LORA}
    model = get_multitask_model(CausalLM(CONFIG, seed=1), tasks, LORA)
    model.save_pretrained(folder / "tasks")


def add_task_rows() -> None:
    refused(65, f"{TASKS} --data book.txt", "--data FILE", "--tasks FILE")
    refused(65, "finetune --base base --out new", "--data FILE", "--tasks FILE")
    refused(65, f"{FINETUNE} --shared-r 2", "--shared-r", "--tasks")
    refused_values(65, TASKS, "shared-r", "--shared-r", [0], "at least 1")
    refused(65, f"{TASKS} --shared-r 2 --method dora", "--shared-r", "dora", "--method lora")
    refused(65, f"{TASKS} --shared-r 2 --method full", "--shared-r", "full", "--method lora")
    refused(65, f"{TASKS} --method adalora", "--method adalora", "--tasks", "one adapter per run")
    refused(65, f"{TASKS} --eval-data book.txt", "--eval-data", "--tasks")
    files = "latin.txt full/../book.txt"
    refused(65, TASKS.replace("latin.txt", files), "--tasks book.txt", "full/../book.txt", "alike")
    command(65, TASKS.replace("latin.txt", "missing.txt"), 4, "missing.txt")
    refused(65, TASKS.replace("latin.txt", "''"), "--tasks must not be empty")
    short = written("short.txt", b"abcd")
    command(65, TASKS.replace("latin.txt", "short.txt"), 3, "--tasks short.txt", build=short)
    refused(65, f"{TASKS} --batch-size 1", "--batch-size 1", "at least", "--tasks", "2")
    refused(65, f"{TASKS} --bias all", "bias must be 'none'")
    line = f"{EVALUATE} --adapter tasks"
    command(65, line, 2, "book, latin", "--task", build=multitask)
    says = ("book, latin, __base__", "'other'")
    command(65, f"{line} --task other", 2, *says, build=multitask)
    refused(65, f"{EVALUATE} --adapter adapter --task book", "--adapter 'adapter'", "--task")
    refused(65, f"{EVALUATE} --task book", "--task", "give --adapter")
    line = MERGE.replace("--adapter adapter", "--adapter tasks")
    command(65, line, 2, "book, latin", "--task", build=multitask)
    command(65, f"{line} --task other", 2, "book, latin", "'other'", build=multitask)
    says = ("--adapter", "once", "--task", "got 2")
    command(65, f"{line} --adapter adapter --task book", 2, *says, build=multitask)
    command(65, f"{MERGE} --adapter tasks", 2, *says, build=multitask)
    refused(65, f"{MERGE} --adapter adapter --task book", *says)
    command(65, "inspect tasks", 2, "book, latin, shared", build=multitask)


def trained(folder: Path) -> None:
    """A finished run with two checkpoints."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert main([*TRAIN.split(), "--out", "run"]) == 0


def add_resume_rows() -> None:
    command(68, f"{FINETUNE} --resume auto", 3, "no checkpoint")
    command(68, f"{FINETUNE} --resume missing", 3, "missing")
    refused(68, f"{FINETUNE} --resume ''", "--resume must not be empty")
    refused(68, f"{FINETUNE.replace(' --out new', '')} --resume", "--resume auto", "--out")
    line = f"{TRAIN} --out run --resume"
    command(68, f"{line} --steps 3", 3, "steps", "4", "3", build=trained)
    command(68, f"{line} --lora-alpha 3", 3, "lora_alpha", "8", "3", build=trained)
    line = f"{TRAIN} --out full --resume run/checkpoints/step-2"
    command(68, line, 2, "'full' is not empty", build=trained)
    damage = both(trained, cut("run/checkpoints/step-2/manifest.json", 20))
    command(68, line, 3, "step-2", build=damage)


add_usage_rows()
add_number_rows()
add_adapter_rows()
add_method_rows()
add_text_rows()
add_output_rows()
add_input_rows()
add_task_rows()
add_resume_rows()
