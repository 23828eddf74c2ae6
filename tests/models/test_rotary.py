"""Rotary frequencies beside scalar derivations, and how a file's parameters are read."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import LLAMA3, ROPES, shape

from minilora.errors import ConfigError
from minilora.models.config import TransformerConfig
from minilora.models.rotary import ROPE_FIELDS, Rotation, rotary_frequencies

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
YARN["original_max_position_embeddings"] = 32
dims = st.sampled_from([2, 4, 16, 64])
thetas = st.sampled_from([100.0, 1e4, 5e5])
factors = st.sampled_from([2.0, 8.0, 32.0])


def rotation(parameters: dict[str, Any], D: int = 16, context: int = 128) -> Rotation:
    """The rotation of a Llama with these parameters."""
    config = shape("llama", head_dim=D, rope_parameters=parameters, max_position_embeddings=context)
    return rotary_frequencies(config.rope_parameters, D, context)


# ---- frequencies --------------------------------------------------------------------------------


@given(dims, thetas, factors)
def test_rotary_frequencies_equal_a_scalar_derivation(
    dim: int, theta: float, factor: float
) -> None:
    low, high, old = 1.0, 4.0, 256

    def derived(i: int, kind: str) -> float:
        frequency = 1.0 / math.pow(theta, 2 * i / dim)
        if kind == "linear":
            return frequency / factor
        wavelength = 2 * math.pi / frequency
        if kind == "default" or wavelength < old / high:
            return frequency
        if wavelength > old / low:
            return frequency / factor
        smooth = (old / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    for kind in ("default", "linear", "llama3"):
        rope = LLAMA3 | {"rope_type": kind, "rope_theta": theta, "factor": factor}
        rope["original_max_position_embeddings"] = old
        found = rotation(rope, dim)
        expected = [derived(i, kind) for i in range(dim // 2)]
        np.testing.assert_allclose(found.frequencies, expected, rtol=1e-13)
        assert found.scale == 1


def test_rotary_frequencies_of_llama3_have_all_three_kinds_of_waves() -> None:
    plain = rotation({"rope_theta": 1000.0})
    ratio = rotation(LLAMA3).frequencies / plain.frequencies
    assert ratio[0] == 1
    assert ratio[-1] == 1 / 8
    assert ((ratio > 1 / 8) & (ratio < 1)).any()


betas = st.sampled_from([(16, 2), (4, 4)])


@given(dims, thetas, factors, st.sampled_from([16, 64, 2048]), betas, st.booleans())
def test_rotary_frequencies_of_yarn_equal_a_scalar_derivation(
    dim: int, theta: float, factor: float, old: int, beta: tuple[int, int], truncate: bool
) -> None:
    """Peng et al. 2023, section 3.2; the ramp is over the planes, as in transformers."""

    def plane_with(turns: float) -> float:
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = map(plane_with, beta)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    expected = []
    for i in range(dim // 2):
        slowed = min(max((i - first) / (last - first), 0), 1)
        frequency = theta ** (-2 * i / dim)
        expected.append((1 - slowed) * frequency + slowed * frequency / factor)
    rope = {**YARN, "rope_theta": theta, "factor": factor, "truncate": truncate}
    rope |= {"beta_fast": beta[0], "beta_slow": beta[1], "original_max_position_embeddings": old}
    found = rotation(rope, dim)
    np.testing.assert_allclose(found.frequencies, expected, rtol=1e-13)
    assert found.scale == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15)


def test_rotary_frequencies_of_yarn_say_how_cos_and_sin_grow() -> None:
    def scale(**fields: Any) -> float:
        return rotation({**YARN, **fields}).scale

    plain = 0.1 * math.log(4) + 1
    assert scale() == plain
    assert scale(factor=0.5) == 1
    assert scale(factor=None) == plain  # 128 / 32
    assert scale(attention_factor=2) == 2
    assert scale(mscale=1, mscale_all_dim=0.5) == plain / (0.05 * math.log(4) + 1)
    assert scale(mscale=0, mscale_all_dim=0.5) == scale(mscale=3) == plain
    assert scale(attention_factor=3.0, mscale=1, mscale_all_dim=0.5) == 3


def test_rotary_frequencies_of_proportional_turn_the_first_planes_alone() -> None:
    rope = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    found = rotation(rope, 8).frequencies
    np.testing.assert_allclose(found, [1, 100**-0.25, 0, 0], rtol=1e-15)
    assert np.array_equal(rotation({**rope, "factor": 2.0}, 8).frequencies, found / 2)


# ---- parameters ---------------------------------------------------------------------------------

NOT_A_NUMBER = ["2", True, [2.0], math.nan, math.inf, -1]
BAD: list[tuple[dict[str, Any], str]] = []


def bad(field: str, rope: dict[str, Any], values: list[Any]) -> None:
    for value in values:
        BAD.append(({**rope, field: value}, field))


PROPORTIONAL = {"rope_type": "proportional"}
for name in ("factor", "original_max_position_embeddings"):
    bad(name, YARN, [*NOT_A_NUMBER, 0])
    bad(name, LLAMA3, [*NOT_A_NUMBER, 0, None])
bad("original_max_position_embeddings", YARN, [None])
for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
    bad(name, YARN, NOT_A_NUMBER)
bad("beta_fast", YARN, [0.5])  # below beta_slow
bad("attention_factor", YARN, [*NOT_A_NUMBER, 0])
bad("truncate", YARN, [None, 0, 1, "true"])
bad("rope_theta", YARN, [1, 0.5])
bad("factor", PROPORTIONAL, [*NOT_A_NUMBER, 0, None])
bad("partial_rotary_factor", PROPORTIONAL, [*NOT_A_NUMBER, 0, None, 1.5])
for rope in (YARN, LLAMA3, ROPES["linear"]):
    bad("partial_rotary_factor", rope, [0.5, "1", True, None])
bad("partial_rotary_factor", ROPES["default"], [0.5, "1", True])
for kind in ("ntk", "longrope", "axial", "mrope", "su", "", None, 1, ["yarn"], {}):
    BAD.append(({"rope_type": kind, "factor": 2.0}, "rope_"))
    BAD.append(({"type": kind, "factor": 2.0}, "rope_"))
for field in ("factor", "low_freq_factor", "high_freq_factor"):
    BAD.append(({key: value for key, value in LLAMA3.items() if key != field}, field))
BAD.append(({"rope_type": "yarn"}, "factor is missing: rope_type yarn needs it"))


@pytest.mark.parametrize(("rope", "named"), BAD)
def test_transformer_config_refuses_rotary_parameters_by_name(
    rope: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        shape("llama", rope_parameters=rope)
    assert str(error.value).startswith("config: rope_parameters")


def test_transformer_config_names_the_rope_types() -> None:
    wanted = f"rope_type must be one of {', '.join(ROPE_FIELDS)}, got 'longrope'"
    with pytest.raises(ConfigError, match=wanted):
        shape("llama", rope_parameters={"type": "longrope", "factor": 2.0})


def read(**fields: Any) -> dict[str, Any]:
    """rope_parameters as read from a file with these fields."""
    written = shape("llama", max_position_embeddings=96).to_dict()
    del written["rope_parameters"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(TransformerConfig.from_dict({**written, **fields}).rope_parameters)


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def test_from_dict_gives_rotary_parameters_the_precedence_of_transformers() -> None:
    old = {"type": "linear", "factor": 2.0}
    assert read(rope_scaling=old) == read(rope_parameters=old) == LINEAR
    assert read(rope_scaling={**old, "rope_type": "default"})["rope_type"] == "default"
    # rope_scaling replaces rope_parameters whole, with its rope_theta.
    assert read(rope_scaling=old, rope_parameters={"rope_theta": 5.0}) == LINEAR
    for empty in (None, {}):
        assert read(rope_scaling=empty, rope_parameters=LINEAR) == LINEAR
        assert read(rope_scaling=empty, rope_parameters=empty) == DEFAULT
    # What is inside the object wins over what is beside it, ...
    assert read(rope_theta=7.0)["rope_theta"] == 7
    assert read(rope_theta=7.0, rope_parameters=LINEAR) == LINEAR
    assert read(rope_theta=7.0, rope_scaling=old)["rope_theta"] == 7
    whole = read(partial_rotary_factor=1.0)
    assert whole == {**DEFAULT, "partial_rotary_factor": 1.0}
    assert read(partial_rotary_factor=None) == DEFAULT
    # ... except for the old context.
    for rope in (YARN, LLAMA3):
        name = "original_max_position_embeddings"
        missing = {key: value for key, value in rope.items() if key != name}
        assert read(rope_parameters=missing)[name] == 96
        assert read(rope_parameters=rope)[name] == rope[name]
        assert read(rope_parameters=rope, **{name: 48})[name] == 48
    assert read(rope_parameters=LINEAR, original_max_position_embeddings=48) == LINEAR


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", None),
        ("rope_theta", "10000"),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", []),
        ("rope_scaling", "linear"),
        ("rope_parameters", 0),
    ],
)
def test_from_dict_refuses_rotary_fields_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        read(**{field: value})


def test_rotary_frequencies_of_dynamic_are_the_plain_ones_within_the_context() -> None:
    """It has others only for longer sequences, which CausalLM refuses."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0}
    plain = rotary_frequencies({"rope_type": "default", "rope_theta": 50.0}, 8, 96)
    found = rotary_frequencies(dynamic, 8, 96)
    assert np.array_equal(found.frequencies, plain.frequencies)
    assert found.scale == plain.scale
    with pytest.raises(ConfigError, match="rope_type dynamic needs a head_dim above 2"):
        rotary_frequencies(dynamic, 2, 96)


def test_from_dict_warns_of_rotary_parameters_without_effect() -> None:
    written = shape("llama", rope_parameters={**DEFAULT, "factor": 4.0, "foo": 1}).to_dict()
    wanted = "rope_parameters.factor, rope_parameters.foo"
    with pytest.warns(UserWarning, match=wanted):
        config = TransformerConfig.from_dict(written)
    assert config.to_dict() == written
