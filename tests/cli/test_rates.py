"""minilora lab rates and finetune --lr auto: a learning rate from short runs."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import types
from pathlib import Path

import pytest

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.cli import main, rates
from minilora.cli.rates import FILE, Search, choose_rate
from minilora.errors import CheckpointError, ConfigError
from minilora.formats import load_file
from minilora.training import ladder
from minilora.training.ladder import FACTOR

pytestmark = pytest.mark.filterwarnings("default")  # a warning is a line on stderr

CONFIG = TransformerConfig(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    initializer_range=0.3,
)
SHORT = "--batch-size 2 --context 8 --steps 4 --warmup 1 --threads 1"
TRAIN = f"--lr auto --base base --data book.txt --target-modules all-linear {SHORT}"
GIVEN = TRAIN.removeprefix("--lr auto ")
FIRST = 0.1  # near the best rates of so small a model, in place of 0.002


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rates")
    CausalLM(CONFIG).save_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(CausalLM(CONFIG), config, seed=1).save_pretrained(folder / "adapter")
    for name in ("book.txt", "other.txt"):
        (folder / name).write_text("abcab" * 40)
    records = [json.dumps({"prompt": "a", "completion": "bab"}) for _ in range(30)]
    (folder / "records.jsonl").write_text("\n".join(records))
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rates, "FIRST", FIRST)
    return tmp_path


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> str:
    code, out, err = run(line)
    assert code == 0, err
    return out


def refused(line: str, *words: str, code: int = 2) -> None:
    result, _, err = run(line)
    assert result == code, err
    assert all(word in err.splitlines()[-1] for word in words), err


def bits(folder: str) -> dict[str, bytes]:
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    return {name: array.tobytes() for name, array in tensors.items()}


# ---- lab rates -----------------------------------------------------------------------------------


def test_lab_rates_shows_the_curve_and_the_interval(world):
    before = sorted(world.iterdir())
    out = ok(f"lab rates {TRAIN} --r 2")
    table = json.loads(ok(f"lab rates {TRAIN} --r 2 --json"))
    assert sorted(world.iterdir()) == before, "lab rates writes nothing"
    low, high = table["interval"]
    runs = table["short runs"]
    first, *rest = out.splitlines()
    assert first == f"{len(runs)} short runs of 4 of 4 steps, in two orders of the data"
    assert rest[-1] == f"the best rate is between {low:.4g} and {high:.4g}: --lr {table['lr']:g}"
    lines = [line.split() for line in rest[2:-3]]
    assert [float(line[0]) for line in lines] == sorted({run["rate"] for run in runs})
    for entry in runs:
        rung = entry["rate"] / FIRST
        assert rung == FACTOR ** round(ladder.math.log(rung, FACTOR))
        assert (entry["loss"] is None) == (entry["steps"] < 4) or entry["steps"] == 4
    assert low <= table["lr"] <= high


def test_lab_rates_help_has_the_options_of_finetune(capsys):
    texts = {}
    for command in ("lab rates", "finetune"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        texts[command] = capsys.readouterr().out.splitlines()
    lines = texts["lab rates"]
    assert lines[0] == "usage: minilora lab rates [options]"
    assert lines[-1].startswith("example: minilora lab rates --base")
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 110
    missing = {line for line in texts["finetune"] if line.startswith("  --")} - set(lines)
    names = [line.split()[0] for line in sorted(missing)]
    assert names == ["--also-evaluate", "--out", "--report", "--resume"]
    with pytest.raises(SystemExit):
        main(["lab", "--help"])
    assert "minilora lab rates --help" in " ".join(capsys.readouterr().out.split())


def test_lab_rates_begins_at_lr(world):
    runs = json.loads(ok(f"lab rates {TRAIN} --r 2 --lr 0.3 --json"))["short runs"]
    assert {0.15, 0.3, 0.6} <= {run["rate"] for run in runs}


METHODS = [
    "--method full",
    "--method adalora --r 2 --steps 40 --tinit 20 --tfinal 10 --deltaT 5",
    "--method dora --r 2 --lora-dropout 0.1",
    "--method ia3 --target-modules v_proj,down_proj --feedforward-modules down_proj",
    "--r 2 --quantize nf4 --gradient-checkpointing",
    "--r 2 --optimizer loraplus --keep best --eval-every 2 --save-every 1",
    "--r 2 --init-lora-weights lora_ga",
]


@pytest.mark.parametrize("options", METHODS)
def test_lab_rates_takes_the_options_of_finetune(world, options, monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", 30)
    train = TRAIN.replace("--target-modules all-linear", "") if "full" in options else TRAIN
    table = json.loads(ok(f"lab rates {train} {options} --json"))
    whole = 40 if "40" in options else 4
    assert table["steps of the run"] == whole
    assert table["steps"] == min(whole, ladder.SHORTEST)


@pytest.mark.parametrize("data", ["--tasks book.txt other.txt", "--data records.jsonl"])
def test_lab_rates_takes_tasks_and_records(world, data):
    line = f"lab rates {TRAIN} --r 2 --json"
    assert json.loads(ok(line.replace("--data book.txt", data)))["short runs"]


def test_lab_rates_goes_on_from_an_adapter(world):
    line = f"lab rates {TRAIN} --adapter adapter --json".replace("--target-modules all-linear", "")
    assert json.loads(ok(line))["short runs"]


MISTAKES = {
    "lab rates": "--base",
    f"lab rates {TRAIN} --target-modules qproj": "choose from",
    f"lab rates {TRAIN} --lr 0": "lr must be a finite number above 0",
    f"lab rates {TRAIN} --lr fast": "lr must be a finite number above 0",
    f"lab rates {TRAIN} --out new": "unrecognized arguments: --out new (see minilora lab rates",
    f"lab rates rank {TRAIN}": "unrecognized arguments: rank",
    "lab list rates": "stands alone: minilora lab rates --base DIR --data FILE",
    "lab --out new rates": "stands alone",
    f"sweep --grid r=1,2 --out new {TRAIN}": "--lr auto is for finetune",
    f"sweep --grid lr=auto,0.1 --out new {GIVEN}": "lr=auto: --lr auto is for finetune",
    f"pretrain --data book.txt {SHORT} --lr auto --out new": "lr must be a finite number above 0",
    f"finetune {TRAIN} --lr Auto --out new": "lr must be a finite number above 0, or auto",
    f"finetune {TRAIN} --context 100 --out new": "context",
    f"finetune {TRAIN} --out new --resume": "no checkpoint",
    f"finetune {TRAIN} --resume auto": "--resume auto needs --out",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_lab_rates_and_lr_auto_refuse(world, line):
    refused(line, MISTAKES[line], code=3 if line.endswith("new --resume") else 2)
    assert not Path("new").exists()


def test_lab_rates_ends_where_nothing_can_be_chosen(world, monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", 1)
    monkeypatch.setattr(rates, "FIRST", 1e-4)
    line = f"{TRAIN} --r 2"
    refused(f"lab rates {line}", "the last rate that they try", "train with a number as --lr")
    refused(f"finetune {line} --out new", "the last rate that they try")
    assert not Path("new").exists()


def test_search_is_for_one_process():
    ranks = types.SimpleNamespace(size=3)
    with pytest.raises(ConfigError, match=r"mpiexec started 3: .* `minilora lab rates`"):
        Search(types.SimpleNamespace(ranks=ranks, lr="auto"))


# ---- finetune --lr auto --------------------------------------------------------------------------


def test_finetune_lr_auto_trains_as_with_the_rate_that_it_finds(world):
    line = f"finetune {TRAIN} --r 2 --lora-dropout 0.1 --save-every 2 --eval-every 2"
    out = ok(f"{line} --out auto")
    table = json.loads(Path("auto", FILE).read_text())
    low, high = table["interval"]
    described, curve, chosen, *_ = out.splitlines()
    assert described.startswith(f"--lr auto: {len(table['short runs'])} short runs of 4 of 4")
    assert curve.startswith("rate, held-out bits per byte in both orders: ")
    assert chosen == (
        f"the best rate is between {low:.4g} and {high:.4g}: training at {table['lr']:g}"
    )
    ok(f"{line} --lr {table['lr']!r} --out given")
    assert bits("auto") == bits("given")
    report = json.loads(ok("replay auto --from 2 --set lr=0.5 --json"))
    assert report["equal steps"] == 2
    assert table == json.loads(ok(f"lab rates {TRAIN} --r 2 --lora-dropout 0.1 --json"))
    refused("replay auto --from 2 --set lr=auto", "--lr auto is for finetune")


def test_finetune_lr_auto_resumes_without_a_search(world, monkeypatch):
    line = f"finetune {TRAIN} --r 2 --save-every 2"
    ok(f"{line} --out whole")
    ok(f"{line} --out halves")
    written = Path("halves", FILE).read_bytes()
    monkeypatch.setattr(rates, "Search", None)
    monkeypatch.setattr("minilora.cli.training.Search", None)
    ok(f"{line} --out halves --resume halves/checkpoints/step-2")
    assert bits("halves") == bits("whole")
    assert Path("halves", FILE).read_bytes() == written
    words = json.loads(Path("halves", "command.json").read_text())["command"]
    assert words[-1] == f"--lr={json.loads(written)['lr']!r}"


def test_finetune_lr_auto_refuses_a_folder_before_it_searches(world, monkeypatch):
    def find(self):
        raise AssertionError("searched")

    monkeypatch.setattr(Search, "find", find)
    Path("full").mkdir()
    Path("full", "notes").write_text("mine")
    refused(f"finetune {TRAIN} --out full", "full")
    with pytest.raises(AssertionError, match="searched"):
        run(f"finetune {TRAIN} --out new")
    assert not Path("new").exists()


def test_finetune_lr_auto_says_notes_and_warnings_once(world):
    _, _, err = run(f"finetune {TRAIN} --r 2 --out new")
    assert err.count("texts are read as bytes") == 1


def test_plan_takes_lr_auto(world):
    assert ok(f"plan {TRAIN} --r 2") != ""


def test_choose_rate_reads_that_of_a_resumed_run_and_names_a_damaged_one(monkeypatch):
    states = [{"run": {"lr": 0.125}}, {"run": {}}, {"run": {"lr": "fast"}}, {}]

    def find_checkpoint(resume, out):
        assert (resume, out) == ("auto", Path("run"))
        return Path("run", "checkpoints"), {"state": states.pop(0)}

    monkeypatch.setattr(rates, "find_checkpoint", find_checkpoint)
    args = types.SimpleNamespace(resume="auto")
    assert choose_rate(args, Path("run"), None) == 0.125
    while states:
        with pytest.raises(CheckpointError, match="checkpoints' is damaged"):
            choose_rate(args, Path("run"), None)


@pytest.mark.parametrize("command", ["lab rates", "finetune"])
@pytest.mark.parametrize("rate", ["AUTO", "fast"])
def test_lr_that_is_not_a_number_may_be_auto(world, command, rate):
    line = f"{command} {GIVEN} --lr {rate}"
    refused(line, f"--lr must be a finite number above 0, or auto, got '{rate}'")


def test_lab_rates_at_the_end_of_the_ladder_says_how_to_begin_elsewhere(world):
    refused(f"lab rates {GIVEN} --lr 1e-300", "begin at another rate with `minilora lab rates")
