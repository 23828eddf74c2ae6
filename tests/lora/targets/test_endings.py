"""Many names and patterns at once: the answers of each by itself, in linear time."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import minilora
from minilora.formats import write_adapter
from minilora.lora import LoraConfig
from minilora.lora.targets.base import Base, Layer
from minilora.lora.targets.endings import ANY, plain_text
from minilora.lora.targets.patterns import Pattern
from minilora.lora.targets.plan import plan_adapter
from minilora.lora.targets.rules import Patterns, Targets
from minilora.tools.inspecting import inspect_adapter

PACKAGE = str(Path(minilora.__file__).parent)


def joined(parts, least, most):
    return st.lists(parts, min_size=least, max_size=most).map("".join)


# Few characters, so that texts meet; "." is any character in a pattern, and "\\." a dot.
LITERAL = joined(st.sampled_from(["a", "b", "ab", ".", "_"]), 1, 5)
PLAIN = joined(
    st.sampled_from(["a", "b", ".", r"\.", r"\_", "_", "[ab]", "a*", "^", "$", "(a|b)"]), 0, 5
)
MANY_NAMES = st.lists(LITERAL, max_size=6)


@given(st.lists(LITERAL, max_size=6), MANY_NAMES, st.booleans())
def test_targets_mean_what_each_name_means_by_itself(targets, names, anywhere):
    def means(target, name):
        return name == target or name.endswith(target if anywhere else f".{target}")

    made = Targets(targets, anywhere)
    for name in names:
        assert made.mean(name) == any(means(target, name) for target in targets)
    expected = {target: [name for name in names if means(target, name)] for target in targets}
    assert made.group(names) == expected


@given(st.lists(PLAIN, max_size=6), MANY_NAMES)
@example(["a.b", r"a\.b", "a_b"], ["a.b", "a_b", "x.a.b", "xa.b"])
@example(["", "$", "^"], ["a.", "a"])
@example([r"a\d", r"\w"], ["ad", "a"])
def test_patterns_answer_as_re_does_for_each_by_itself(texts, names):
    def matches_alone(text, name):
        return re.match(rf"(.*\.)?({text})$", name) is not None

    made = Patterns(texts)
    for name in names:
        numbers = [i for i, text in enumerate(texts) if matches_alone(text, name)]
        assert made.first(name) == (numbers[0] if numbers else None)
    unused = [text for text in texts if not any(matches_alone(text, name) for name in names)]
    assert made.unused(names) == unused


@pytest.mark.parametrize("text", ["a.b", r"a\.b", "", "a-b", "]", "a" * 200])
def test_plain_text_matches_what_the_pattern_matches(text):
    plain = plain_text(text)
    if text == "]":
        assert plain is None  # `Pattern` reads it, and everything that is not plain
        return
    assert len(plain) == Pattern(text).width
    for name in ("a.b", "axb", "a-b", "", "a" * 200):
        fits = len(name) == len(plain) and all(
            one in (ANY, other) for one, other in zip(plain, name, strict=True)
        )
        assert fits == Pattern(text).fullmatch(name)


def count_lines(function, *inputs):
    """How many lines of the package run: work that no machine's speed changes."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if PACKAGE not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*inputs)
    finally:
        sys.settrace(before)
    return lines


def wide_base(count):
    """`count` linear layers, and as many norms, with names of one length."""
    layers = {}
    parameters = {}
    for i in range(100, 100 + count):
        path = f"model.layers.{i}.mlp.up_proj"
        layers[path] = Layer("linear", (8, 8), None, False)
        parameters[f"{path}.weight"] = (8, 8)
        norm = f"model.layers.{i}.norm"
        layers[norm] = Layer("RMSNorm", (), None, False)
        parameters[f"{norm}.weight"] = (8,)
    return Base("llama", layers, parameters, "", "", False)


def every_field(base):
    linear = [path for path in base.layers if path.endswith("up_proj")]
    ranks = {path.replace(".", r"\."): 1 + i % 3 for i, path in enumerate(linear)}
    half = len(linear) // 2
    return {
        "target_modules": linear,
        "rank_pattern": ranks,
        "alpha_pattern": dict.fromkeys(linear, 3),
        "exclude_modules": linear[half:],
        "modules_to_save": [path for path in base.layers if path.endswith("norm")],
        "layers_to_transform": list(range(100, 100 + len(linear))),
        "layers_pattern": ["h", "layers", *linear[: half // 2]],
    }


@pytest.mark.parametrize("field", [None, *every_field(wide_base(1))])
def test_plan_adapter_takes_work_in_proportion_to_names_and_layers(field):
    """Twice as many names over twice as many layers: twice the work, not four times."""
    work = []
    for count in (40, 80):
        base = wide_base(count)
        fields = every_field(base)
        if field is not None:
            fields = {"target_modules": ["up_proj"], field: fields[field]}
        if "layers_pattern" in fields:
            fields["layers_to_transform"] = list(range(100, 100 + count))

        def plan(base=base, fields=fields):
            config = LoraConfig(**fields)
            plan_adapter(base, config, warn=True).shapes()
            for path in base.layers:
                config.scaling(path)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work.append(count_lines(plan))
    assert work[1] <= 2.2 * work[0]


def test_inspect_adapter_takes_work_in_proportion_to_names_and_layers(tmp_path):
    work = []
    for count in (10, 20):
        base = wide_base(count)
        fields = every_field(base)
        fields = {name: fields[name] for name in ("target_modules", "rank_pattern")}
        plan = plan_adapter(base, LoraConfig(**fields))
        tensors = {key: np.ones(shape, np.float32) for key, shape in plan.shapes().items()}
        write_adapter(tmp_path / str(count), plan.config.to_dict(), tensors)
        inspect_adapter(tmp_path / str(count))  # imports are no work of the kind
        work.append(count_lines(inspect_adapter, tmp_path / str(count)))
    assert work[1] <= 2.2 * work[0]
