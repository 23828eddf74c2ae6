"""Messages keep their start and their end, escape control characters, and name the broken rule."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import CausalLM, LoraConfig, TransformerConfig, errors, get_peft_model
from minilora.display import print_table
from minilora.errors import (
    ConfigError,
    FormatError,
    MiniloraError,
    Rule,
    check_fields,
    is_flag,
    is_integer,
    is_number,
    is_plain_number,
    one_of,
    optional,
    printable,
    rules_for,
    shorten,
)
from minilora.nn import Linear

START = "the start says what was given: "
CURE = "; the end says what to do"


# ---- short and printable -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 499, 500])
def test_shorten_keeps_a_text_of_at_most_500_characters(length: int) -> None:
    assert shorten("x" * length) == "x" * length


@pytest.mark.parametrize("length", [501, 502, 10**6])
def test_shorten_keeps_the_start_and_the_end(length: int) -> None:
    text = ("0123456789" * length)[:length]
    short = shorten(text)
    assert len(short) == 500
    assert short == text[:300] + " ... " + text[-195:]


@given(st.text(max_size=2000))
def test_minilora_error_is_short_and_printable(text: str) -> None:
    message = str(MiniloraError(text))
    assert len(message) <= 500
    assert message.isprintable()
    if len(text) <= 500 and text.isprintable():
        assert message == text


@pytest.mark.parametrize("middle", ["x" * 10**5, "\x1b[2J" * 10**4, "\n" * 499, "é\n" * 300])
def test_minilora_error_keeps_the_start_and_the_cure(middle: str) -> None:
    message = str(MiniloraError(START + middle + CURE))
    assert message.startswith(START)
    assert message.endswith(CURE)


def test_minilora_error_escapes_control_characters() -> None:
    message = str(MiniloraError("a\x1b[2Jb\nc\td\u2028e\x00f é"))
    assert message == r"a\x1b[2Jb\nc\td\u2028e\x00f é"


def test_minilora_error_without_a_message_is_empty() -> None:
    assert str(MiniloraError()) == ""


def test_printable_escapes_all_but_the_allowed_control_characters() -> None:
    assert printable("a\n\tb\r\x07é") == r"a\n\tb\r\x07é"
    assert printable("a\n\tb\r\x07é", "\n\t") == "a\n\tb\\r\\x07é"


def test_print_table_aligns_columns_and_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a\x1b", "count": 1}, {"name": "longer", "count": 1234567}]
    print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name    count", r"a\x1b   1", "longer  1234567"]


# ---- a message is never cut before its cure ------------------------------------------------------

TINY = TransformerConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2
)


def wide_model() -> CausalLM:
    """A model of so many layers that no message can list them."""
    model = CausalLM(TINY)
    for i in range(99):
        setattr(model, f"extra_projection_{i:02}", Linear(np.ones((2, 2), np.float32)))
    return model


UNMATCHED: list[dict[str, Any]] = []
UNMATCHED.append({"target_modules": ["no_such_layer"]})
UNMATCHED.append({"target_modules": ["no_such_layer", *(f"other_{i}" for i in range(99))]})
UNMATCHED.append({"target_modules": "no_such_layer.*"})


@pytest.mark.parametrize("options", UNMATCHED, ids=str)
def test_get_peft_model_is_never_cut_before_its_cure(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        get_peft_model(wide_model(), LoraConfig(**options))
    message = str(caught.value)
    assert len(message) == 500
    assert "target_modules" in message[:100]
    assert "no_such_layer" in message[:100]
    assert message.endswith("lm_head, o_proj, q_proj, up_proj, v_proj")


# ---- rules ---------------------------------------------------------------------------------------

RULES = [Rule("r", is_integer(1), "a positive integer"), Rule("bias", one_of("none"), "'none'")]


def refusal(values: dict[str, Any], where: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        check_fields(values, RULES, where)
    return str(caught.value)


def test_check_fields_accepts_valid_values_and_ignores_other_fields() -> None:
    check_fields({"r": 1, "bias": "none", "other": None}, RULES)
    check_fields({}, [])


def test_check_fields_names_the_first_broken_rule_and_where() -> None:
    assert refusal({"r": 0, "bias": "all"}) == "r must be a positive integer, got 0"
    assert refusal({"r": 1, "bias": "all"}) == "bias must be 'none', got 'all'"
    message = refusal({"r": "x", "bias": "all"}, "adapter_config.json: ")
    assert message == "adapter_config.json: r must be a positive integer, got 'x'"


def test_check_fields_shows_at_most_200_characters_of_a_value() -> None:
    message = refusal({"r": "x" * 999})
    assert message == "r must be a positive integer, got '" + "x" * 199


def test_check_fields_raises_the_given_kind_of_error() -> None:
    with pytest.raises(FormatError, match=r"^file: r must be a positive integer, got 0$"):
        check_fields({"r": 0, "bias": "none"}, RULES, "file: ", FormatError)


def test_rules_for_gives_one_rule_per_field_in_order() -> None:
    rules = rules_for(("a", "b"), is_flag, "True or False")
    assert rules == [Rule("a", is_flag, "True or False"), Rule("b", is_flag, "True or False")]


NAN = math.nan
INF = math.inf
VALID: list[tuple[Any, list[Any]]] = []
VALID.append((is_flag, [True, False]))
VALID.append((is_integer(), [-(10**30), -1, 0, 1]))
VALID.append((is_integer(1, 8), [1, 8]))
VALID.append((is_number(), [-1e308, 0, 0.5, np.float32(0.5), np.float64(2), np.int64(3)]))
VALID.append((is_number(0, below=1), [0, 0.0, 1 - 1e-16]))
VALID.append((is_number(above=0), [5e-324, 1, 1e308]))
VALID.append((is_number(above=0, below=9, kinds=(int, float)), [1, 0.5, np.float64(0.5)]))
VALID.append((is_plain_number(), [-1e308, 0, 0.5, 10**308]))
VALID.append((is_plain_number(least=0, below=1), [0, 0.0, 1 - 1e-16]))
VALID.append((is_plain_number(above=0), [5e-324, 1]))
VALID.append((optional(is_integer(1)), [None, 1]))
VALID.append((one_of("a", 1, None, False), ["a", 1, None, False]))
INVALID: list[tuple[Any, list[Any]]] = []
INVALID.append((is_flag, [0, 1, None, "True"]))
INVALID.append((is_integer(), [True, False, 1.0, "1", None, NAN]))
INVALID.append((is_integer(1, 8), [0, 9, True, 1.0]))
INVALID.append((is_number(), [True, False, NAN, INF, -INF, "1", None, 1j, [1]]))
INVALID.append((is_number(0, below=1), [-5e-324, 1, 1.0, True, False]))
INVALID.append((is_number(above=0), [0, 0.0, -1, INF, NAN, True]))
INVALID.append((is_number(kinds=(int, float)), [True, np.float32(0.5), np.int64(3), NAN]))
INVALID.append((is_number(above=0, below=9, kinds=(int, float)), [0, 9, INF]))
INVALID.append(
    (is_plain_number(), [True, NAN, INF, "1", None, np.float64(1), np.int64(1), 10**400])
)
INVALID.append((is_plain_number(least=0, below=1), [-5e-324, 1]))
INVALID.append((is_plain_number(above=0), [0, 0.0, -1]))
INVALID.append((optional(is_integer(1)), [0, False, "None"]))
INVALID.append((one_of("a", 1, None, False), ["b", True, 1.0, 0, ["a"]]))


@pytest.mark.parametrize(("predicate", "values"), VALID)
def test_predicates_accept_valid_values(predicate: Any, values: list[Any]) -> None:
    for value in values:
        assert predicate(value), value


@pytest.mark.parametrize(("predicate", "values"), INVALID)
def test_predicates_refuse_invalid_values(predicate: Any, values: list[Any]) -> None:
    for value in values:
        assert not predicate(value), value


# ---- exit codes ----------------------------------------------------------------------------------

EXIT_CODES = {"MiniloraError": 1, "GraphError": 1, "ConfigError": 2, "DeviceError": 2}
EXIT_CODES |= {"FormatError": 3, "DataError": 3, "NothingToLearnError": 3, "CheckpointError": 3}
EXIT_CODES |= {"NonFiniteError": 5, "DivergenceError": 5, "LockError": 6, "SweepError": 1}


def kinds_of_error() -> dict[str, type[MiniloraError]]:
    kinds = {}
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, MiniloraError):
            kinds[name] = value
    return kinds


def test_exit_codes_of_every_kind_of_error() -> None:
    codes = {name: kind.exit_code for name, kind in kinds_of_error().items()}
    assert codes.pop("Interrupted") == 1  # before a signal is known
    assert codes == EXIT_CODES


def test_errors_are_also_python_s_kinds() -> None:
    for kind in (errors.ConfigError, errors.FormatError, errors.DataError):
        assert issubclass(kind, ValueError)
    for kind in (errors.DeviceError, errors.GraphError):
        assert issubclass(kind, RuntimeError)
    for kind in (errors.NonFiniteError, errors.DivergenceError):
        assert issubclass(kind, ArithmeticError)


def test_interrupted_exits_with_128_and_the_signal() -> None:
    error = errors.Interrupted("stopped\n", 15)
    assert error.exit_code == 143
    assert str(error) == r"stopped\n"


def test_sweep_error_exits_with_the_code_of_a_point() -> None:
    error = errors.SweepError("2 of 3 points failed", 5)
    assert error.exit_code == pickle.loads(pickle.dumps(error)).exit_code == 5


def test_errors_of_every_kind_survive_a_process_pool() -> None:
    for name, kind in kinds_of_error().items():
        error = kind("what", 15) if name == "Interrupted" else kind("what")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, "what")
        assert again.exit_code == error.exit_code


def test_non_finite_error_carries_what_the_step_measured() -> None:
    assert errors.NonFiniteError("a").line == {}
    assert errors.NonFiniteError("a", {"step": 3}).line == {"step": 3}
