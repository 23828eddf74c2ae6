"""What a notebook shows: well-formed HTML of few kilobytes, without scripts, whatever names say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strict_xp import STRICT

from minilora import (
    AdaLoraConfig,
    Linear,
    LoraConfig,
    Module,
    Parameter,
    Sequential,
    Tensor,
    get_peft_model,
    quantize,
)
from minilora.display import CORNER, LIMIT, Picture, render_losses
from minilora.quant.half import convert_to_half
from minilora.training.loop import Result
from minilora.training.settings import Settings

HOSTILE = [
    "<script>alert(1)</script>",
    "</div></details><img src=x onerror=alert(1)>",
    "&lt;b&gt; ' \"",
    "\x00\x1b[2J\u202e\ud800\uffff",
    "x" * 10_000,
    "<" * 10_000,
    "\U0001f600" * 10_000,
]
TAGS = {"div", "b", "small", "table", "tr", "th", "td", "details", "summary"}
TAGS |= {"svg", "title", "polyline", "circle", "text"}


def html_of(item: Any) -> ElementTree.Element:
    """The HTML of an object as a tree: it is well-formed, small, and can do nothing."""
    text = item._repr_html_()
    assert len(text.encode()) < LIMIT
    root = ElementTree.fromstring(text)
    for element in root.iter():
        assert element.tag.rpartition("}")[2] in TAGS
        assert not any(name.startswith("on") or "href" in name for name in element.attrib)
    return root


def text_of(item: Any) -> str:
    return " ".join(" ".join(html_of(item).itertext()).split())


def cells(item: Any) -> list[list[str]]:
    return [[td.text or "" for td in tr.iter("td")] for tr in html_of(item).iter("tr")]


# ---- Tensor --------------------------------------------------------------------------------------

DTYPES = st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u2", "?", "c8"])
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12))


@given(ARRAYS)
def test_repr_html_of_any_tensor(array):
    with np.errstate(all="ignore"):
        shown = cells(Tensor(array))
    rows = 1 if array.ndim < 2 else min(array.shape[-2], CORNER)
    columns = min(array.shape[-1], CORNER) if array.ndim else 1
    expected = rows * columns if array.size else 0
    assert sum(map(len, shown)) == expected
    assert f"{array.shape} {array.dtype}" in text_of(Tensor(array))


def test_repr_html_of_a_tensor_shows_its_range_and_corner():
    array = np.arange(400, dtype=np.float32).reshape(20, 20)
    assert "from 0 to 399" in text_of(Tensor(array))
    assert cells(Tensor(array))[1][:3] == ["20", "21", "22"]
    assert len(cells(Tensor(array))) == CORNER
    array[3, 4:7] = np.nan, np.inf, -np.inf
    assert "from 0 to 399, 1 NaN, 2 infinite" in text_of(Tensor(array))
    assert "1 NaN, 0 infinite" in text_of(Tensor(np.array([np.nan])))


def test_repr_html_of_a_tensor_says_where_its_gradient_goes():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    assert "requires a gradient" in text_of(x)
    assert "made by mul" in text_of(x * 2.0)
    assert "gradient" not in text_of(x.detach())


def test_repr_html_of_a_tensor_on_another_device():
    assert "strict" in text_of(Tensor(np.ones((3, 3), np.float32)).to(STRICT))


def test_repr_html_of_weights_in_few_bits():
    model = quantize(small.base())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert "QuantizedWeight (24, 16) float32" in text_of(weight)
    for parameter in model.parameters():
        if not parameter.fixed:
            parameter.data = parameter.data.astype(np.float16).astype(np.float32)
    convert_to_half(model, "float16")
    assert "HalfWeight (16, 16) float32" in text_of(model.model.embed_tokens.weight)


# ---- modules -------------------------------------------------------------------------------------


class Named(Module):
    def __init__(self, *names: str):
        self.layers = {name: Linear(2, 2) for name in names}


@pytest.mark.parametrize("name", HOSTILE)
def test_repr_html_of_a_module_with_hostile_names(name):
    text = text_of(Named(name, name + "2"))
    if len(name) < 40 and name.isprintable():
        assert f"layers.{name}" in text
    hostile = type(name[:90].replace("\x00", "0").encode(errors="ignore").decode(), (Module,), {})
    html_of(Named(*[f"{i}{name}" for i in range(100)]))
    html_of(Sequential(*[hostile() for _ in range(100)]))


def test_repr_html_of_a_module_counts_parameters_and_groups_equal_layers():
    model = small.base(num_hidden_layers=4)
    model.model.norm.weight.requires_grad = False
    text = text_of(model)
    total = sum(p.size for p in model.parameters())
    assert text.startswith(f"CausalLM: {total:,} parameters, {total - 16:,} train")
    assert "layers.0 to layers.3, 4 alike" in text
    assert text.count("gate_proj") == 1
    assert "all frozen" in text
    assert "all train" in text
    root = html_of(model)
    assert len(list(root.iter("details"))) == 5  # the model, its decoder, a block, attention, mlp


def test_repr_html_of_a_deep_and_of_a_wide_module():
    deep: Any = Linear(2, 2)
    for _ in range(30):
        deep = Sequential(deep)
    html_of(deep)
    wide = Sequential(*[Linear(2, size + 1) for size in range(300)])
    assert "... and 284 more" in text_of(wide)
    bushy = Sequential(*[Sequential(*[Linear(i + 1, j + 1) for i in range(9)]) for j in range(9)])
    html_of(Sequential(*[Sequential(bushy, Linear(1, k + 1)) for k in range(9)]))


def test_repr_html_of_a_module_without_parameters():
    assert "no parameters" in text_of(Sequential())


# ---- PeftModel -----------------------------------------------------------------------------------


def test_repr_html_of_a_peft_model_shows_adapters_targets_and_the_trained_share():
    model = get_peft_model(small.base(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=".*down_proj")
    model.add_adapter("second", config)
    trained, total = model.get_nb_trainable_parameters()
    assert f"{total:,} parameters, {trained:,} train ({trained / total:.2%})" in text_of(model)
    header, first, second, *_ = cells(model)
    assert header == []
    assert first == ["default", "LoraConfig", "active", "2", f"{trained:,}", "q_proj, up_proj"]
    assert second[:4] == ["second", "AdaLoraConfig", "inactive", "3"]
    model.merge_adapter()
    assert "active, merged" in text_of(model)
    assert "lora_A=(2, 16)" in text_of(model)


def test_repr_html_of_a_peft_model_with_many_hostile_adapters():
    network = Sequential(Linear(2, 2))
    config = LoraConfig(r=1, target_modules=["0"])
    model = get_peft_model(network, config)
    for i in range(60):
        model.add_adapter(f"{i}{'<' * 200}", config)
    assert cells(model)[-1][0].startswith("... and ")


# ---- runs ----------------------------------------------------------------------------------------


def test_repr_html_of_settings_shows_what_was_changed_first():
    settings = Settings(lr=1e-2, steps=7)
    assert cells(settings)[:2] == [["steps", "7"], ["lr", "0.01"]]
    assert len(cells(settings)) == 2 + len(dataclasses.fields(Settings))


LOSSES = st.lists(st.floats(), max_size=40)
EVALUATIONS = st.lists(st.tuples(st.integers(0, 10**9), st.floats()), max_size=40)


@given(LOSSES, EVALUATIONS)
def test_repr_html_of_any_result(losses, evaluations):
    html_of(Result(losses, evaluations, 1.0))


def test_repr_html_of_a_long_result_is_small_and_has_its_picture():
    losses = list(np.geomspace(9, 2, 100_000))
    evaluations = [(step, 9 - step / 20_000) for step in range(0, 100_001, 10)]
    result = Result(losses, evaluations, 61.25, 100_000)
    text = text_of(result)
    assert "100,000 steps in 61.2 seconds; held-out loss 4.0000 with the weights of step" in text
    root = html_of(result)
    (line,) = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert 200 < len(str(line.get("points")).split()) <= 240
    assert cells(result)[-1] == ["100000", "4.0000"]


def test_repr_html_of_a_result_without_losses():
    assert text_of(Result([], [], 0.0)) == "Result : 0 steps in 0.0 seconds"
    assert render_losses([math.nan], [(0, math.inf)]) == ""


# ---- pictures ------------------------------------------------------------------------------------


def test_picture_is_shown_by_its_format(tmp_path):
    for name, method in {"a.png": "_repr_png_", "b.SVG": "_repr_svg_"}.items():
        path = tmp_path / name
        path.write_bytes(b"data")
        picture = Picture(path)
        shown = {m for m in ("_repr_png_", "_repr_svg_") if getattr(picture, m)() is not None}
        assert shown == {method}
        assert repr(picture) == f"Picture({str(path)!r})"
    assert Picture(tmp_path / "c.pdf")._repr_png_() is None


def test_parameter_s_html_says_its_class():
    assert "Parameter (2,) float32" in text_of(Parameter(np.ones(2, np.float32)))
