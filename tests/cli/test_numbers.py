"""Every number on the command line and in a configuration: what is refused, by which limits."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from hostile import FINETUNE, GENERATE, MERGE, PRETRAIN, make_world

from minilora import AdaLoraConfig, LoraConfig, TransformerConfig
from minilora.cli import build_parser, main
from minilora.cli.fields import explain_fields
from minilora.errors import ConfigError, describe_integer, describe_number
from minilora.lora.maps import MapConfig
from minilora.training.loop import Settings
from minilora.training.methods import MAPS_BY_METHOD

INTEGERS = ("N", "K", "R", "T")
NUMBERS = ("X", "P")
LISTS = ("N,N", "X,X")
# Neither Python's other spellings of a number, nor what is none.
ODD = ["１", "1_000", " 1", "1 ", "", "x", "0x10", "nan", "inf", "-inf", "1e400", "--1"]
NOT_INTEGERS = [*ODD, "1.5", "1e3", "1.0", "-1", "9" * 30, "9" * 5000]
NOT_NUMBERS = [*ODD, "-1e400", "9" * 400]
LIMITS = ("at least ", "above ", "in (0, 1]", "a list of numbers such as", "finite number")
LINES = {
    "demo": "demo --out new",
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "generate": GENERATE,
    "evaluate": "evaluate --base base --data book.txt",
    "merge": MERGE,
    "convert": "convert adapter --to plain --base base --out new",
    "graph": "graph --base base --block 0",
    "audit": "audit --base base --adapter adapter --merged base",
    "compare": "compare adapter adapter --base base --data book.txt",
    "inspect": "inspect adapter --base base --data book.txt",
    "replay": "replay adapter --from 0",
    "report": "report --base base --adapter adapter --data book.txt --out new.html",
    "lab": "lab counts --quick --out new",
    "combine": "combine --adapter adapter --how svd --out new",
    "extract": "extract --base base --tuned base --out new",
    "resize": "resize --adapter adapter --out new",
    "verify": "verify",
    "sweep": "sweep --base base --data book.txt --grid quantize=none,nf4 --out new",
}


def options():
    """(command, option, what its help calls the value) of every number."""
    (commands,) = [a for a in build_parser()._actions if isinstance(a.choices, dict)]
    finetune = [action.dest for action in commands.choices["finetune"]._actions]
    for command, parser in commands.choices.items():
        for action in parser._actions:
            if command in ("sweep", "plan") and action.dest in finetune:
                continue  # finetune itself reads and checks them
            if action.metavar in (*INTEGERS, *NUMBERS, *LISTS):
                yield command, action.option_strings[0], action.metavar


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    make_world(folder)
    return folder


@pytest.mark.parametrize(("command", "option", "metavar"), list(options()))
def test_main_states_the_limits_of_a_number(command, option, metavar, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    adalora = {"target-r", "init-r", "tinit", "tfinal", "deltaT", "beta1", "beta2"}
    line = LINES[command]
    if option[2:] in adalora or option == "--orth-reg-weight":
        line += " --method adalora"
    for method, config in MAPS_BY_METHOD.items():
        if option[2:].replace("-", "_") in explain_fields(config):
            line += f" --method {method}"
            break
    line = line.replace("--weights 1", "")
    refused = NOT_NUMBERS if metavar in (*NUMBERS, "X,X") else NOT_INTEGERS
    if metavar == "N,N":
        refused = [text for text in refused if text.lstrip("-") not in ("1", "9" * 30)]
    negative = VALID.get(option[2:].replace("-", "_"))
    refused = [text for text in refused if text != str(negative)]
    for text in refused:
        code = main([*shlex.split(line), f"{option}={text}"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2, (text, error)
        name = option[2:].replace("-", "_")
        assert name in error.replace("-", "_")
        assert any(words in error for words in LIMITS), error
        if metavar in INTEGERS and text == "9" * 30:
            assert "below " in error or "up to" in error or "from 1 to " in error, error
        if text in ("inf", "1e400") and metavar in NUMBERS:
            assert any(words in error for words in ("finite", "below ", "in (0, 1]")), error
    assert not Path("new").exists()


# ---- fields --------------------------------------------------------------------------------------

LORA = {"target_modules": ["q_proj"]}
ADALORA = {**LORA, "total_step": 100, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}
CONFIGS = {Settings: {}, LoraConfig: LORA, AdaLoraConfig: ADALORA}
CONFIGS[TransformerConfig] = {"model_type": "mistral", "sliding_window": 4}
CONFIGS |= {config: {} for config in MAPS_BY_METHOD.values()}
NUMERIC = ("int", "float", "int | None")
WRONG = [float("nan"), float("inf"), -float("inf"), -1, 10**400, "1", "", True, [1]]
VALID = {"decompose_factor": -1, "scaling": -1, "d_initial": -1}  # although it is negative
NO_LIMIT = {"layers_to_transform"}


def fields():
    for config in CONFIGS:
        of_method = config.field_names() if issubclass(config, MapConfig) else None
        for field in dataclasses.fields(config):
            if field.type in NUMERIC and (of_method is None or field.name in of_method):
                yield config, field.name, str(field.type)


@pytest.mark.parametrize(("config", "field", "kind"), list(fields()))
def test_config_states_the_limits_of_a_field(config, field, kind):
    wrong = [value for value in WRONG if value != VALID.get(field)]
    for value in [*wrong, *([1.5, 1.0] if kind.startswith("int") else [])]:
        with pytest.raises(ConfigError) as caught:
            config(**{**CONFIGS[config], field: value})
        message = str(caught.value)
        assert f"{field} must be " in message
        limits = ("at least ", "above ", "positive", "default", "even", "a finite number")
        assert any(words in message for words in limits), message
        if value == 10**400:
            assert any(words in message for words in ("below ", "finite", "default")), message


def test_describe_number_states_every_bound():
    assert describe_integer(1) == "an integer of at least 1"
    assert describe_integer(0, 2**63) == "an integer of at least 0 and below 2^63"
    assert describe_integer(1, 2**24) == "an integer of at least 1 and below 16777216"
    assert describe_number(least=0) == "a finite number of at least 0"
    assert describe_number(above=0, below=1) == "a number above 0 and below 1"
