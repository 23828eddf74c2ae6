"""Merging by the tool and in a model: the same bits, and each within half an ulp of the exact sum."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import shape

from minilora import AdaLoraConfig, CausalLM, LoraConfig, PeftModel, get_peft_model
from minilora.errors import ConfigError
from minilora.formats import read_checkpoint
from minilora.formats.checkpoint import is_stored_transposed
from minilora.formats.dtypes import widen
from minilora.lora.files import AdapterFile, base_key
from minilora.tools.converting import convert
from minilora.tools.merging import merge

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(f.name for f in GOLDEN.iterdir() if "--" in f.name)
HALF = ("float16", "bfloat16")
MANTISSA = {"F32": 24, "F16": 11, "BF16": 8}  # bits, with the hidden one
SMALLEST = {"F32": -149, "F16": -24, "BF16": -133}  # exponents of the smallest positive numbers


def stored_bits(folder: Path) -> dict[str, np.ndarray]:
    _, checkpoint = read_checkpoint(folder)
    with checkpoint:
        return {key: checkpoint.read_bits(key) for key in checkpoint.keys()}


def merge_in_memory(
    base: Path, adapter: Path, out: Path, stored: bool = False, tied: str | None = None
) -> Path:
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(base, stored=stored), adapter)
    model.merge_and_unload(tied=tied).save_pretrained(out)
    return out


def require_equal_bits(model: Path, tool: Path) -> None:
    ours, theirs = stored_bits(model), stored_bits(tool)
    assert set(ours) == set(theirs)
    for key, bits in theirs.items():
        assert np.array_equal(widen(ours[key]), widen(bits)), key
        assert ours[key].dtype == bits.dtype or bits.ndim < 2, key


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tied", [None, "share", "untie"])
def test_merge_has_the_bits_of_merge_and_unload_for_golden_adapters(name, tied, tmp_path):
    base, adapter = GOLDEN / name.split("--")[0], GOLDEN / name
    if tied is None and name == "gpt2--lora_wte":
        with pytest.raises(ConfigError, match="tied='untie'"):
            merge(base, [adapter], tmp_path / "tool")
        return
    merge(base, [adapter], tmp_path / "tool", tied=tied)
    require_equal_bits(
        merge_in_memory(base, adapter, tmp_path / "model", tied=tied), tmp_path / "tool"
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, dict[str, Any], Any, str, int, str | None]:
    """A model's shape, its dtype on disk, an adapter's configuration, a seed, and `tied`."""
    kind = draw(st.sampled_from(["llama", "gpt2"]))
    tie = draw(st.booleans())
    width = draw(st.sampled_from([8, 12]))
    config = shape(kind, tie_word_embeddings=tie, hidden_size=width, num_attention_heads=2)
    method = draw(st.sampled_from(["lora", "rslora", "dora", "adalora"]))
    table = "wte" if kind == "gpt2" else "embed_tokens"
    linear = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    ends = [] if method == "adalora" else draw(st.sampled_from([[], [table], ["lm_head"]]))
    fields: dict[str, Any] = {"target_modules": [*linear, *ends]}
    fields["lora_alpha"] = draw(st.sampled_from([1, 3, 16]))
    if method == "adalora":
        adapter: Any = AdaLoraConfig(init_r=3, target_r=2, total_step=9, **fields)
    else:
        fields["r"] = draw(st.integers(1, 5))
        follows = tie and ends == [table] and method != "dora" and table == "embed_tokens"
        fields["ensure_weight_tying"] = follows and draw(st.booleans())
        adapter = LoraConfig(use_dora=method == "dora", use_rslora=method == "rslora", **fields)
    choice = draw(st.sampled_from(["share", "untie"])) if tie else None
    dtype = draw(st.sampled_from(["float32", *HALF]))
    return config, dtype, adapter, draw(st.integers(0, 2**20)), choice


@settings(max_examples=200)
@given(cases())
def test_merge_has_the_bits_of_merge_and_unload_and_rounds_the_exact_sum_once(case):
    config, dtype, adapter, seed, tied = case
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(place)
        CausalLM(config, seed=seed).save_pretrained(root / "float32")
        base = root / dtype
        if dtype != "float32":
            convert(root / "float32", base, dtype=dtype)
        model = get_peft_model(CausalLM.from_pretrained(base), adapter)
        for parameter in model.adapter_parameters("default").values():
            scale = 10.0 ** rng.integers(-4, 1)
            noise = scale * rng.standard_normal(parameter.shape)
            parameter.data = (parameter.numpy() + noise).astype(np.float32)
        model.save_pretrained(root / "adapter")
        merge(base, [root / "adapter"], root / "tool", tied=tied)
        merged = merge_in_memory(base, root / "adapter", root / "model", dtype in HALF, tied)
        require_equal_bits(merged, root / "tool")
        require_one_rounding(base, root / "adapter", root / "tool", tied)


def require_one_rounding(base: Path, adapter: Path, merged: Path, tied: str | None) -> None:
    """|W' - exact| <= (1/2 + 2^-20) ulp, in extended precision."""
    fields, before = read_checkpoint(base)
    _, after = read_checkpoint(merged)
    with before, after, AdapterFile(adapter) as file:
        for path in file.layers:
            key = base_key(after, f"{path}.weight")
            source = base_key(before, f"{path}.weight")
            if key is None or source is None:
                continue  # a head that is tied: its embedding's weight is looked at
            W = before.read(source).astype(np.longdouble)
            if file.embeds(path) or is_stored_transposed(fields["model_type"], key):
                W = W.T
            A, B, c, m = file.part(path)
            V = W + np.longdouble(c) * (B.astype(np.longdouble) @ A.astype(np.longdouble))
            if m is not None:
                V = V * (m / np.sqrt((V * V).sum(axis=1)))[:, None]
            got = after.read(key).astype(np.longdouble)
            got = got if got.shape == V.shape and not file.embeds(path) else got.T
            if is_stored_transposed(fields["model_type"], key) and got.shape[0] == got.shape[1]:
                got = after.read(key).astype(np.longdouble).T
            code = after.dtype(key)
            exponent = np.floor(np.log2(np.maximum(np.abs(V), 2.0**-200)))
            step = 2.0 ** np.maximum(exponent - (MANTISSA[code] - 1), SMALLEST[code])
            assert (np.abs(got - V) <= (0.5 + 2.0**-20) * step).all(), path


def test_merge_tied_untie_writes_a_head_of_its_own_and_share_one_weight(tmp_path):
    base, adapter = GOLDEN / "gpt2", GOLDEN / "gpt2--lora_wte"
    for tied in ("untie", "share"):
        merge(base, [adapter], tmp_path / tied, tied=tied)
    untied, shared, plain = (stored_bits(f) for f in (tmp_path / "untie", tmp_path / "share", base))
    assert set(shared) == set(plain)
    assert set(untied) == {*plain, "lm_head.weight"}
    table = next(key for key in plain if key.endswith("wte.weight"))
    assert np.array_equal(untied["lm_head.weight"], plain[table])
    assert np.array_equal(untied[table], shared[table])
    assert not np.array_equal(untied[table], plain[table])
    ids = np.arange(6)[None]
    adapted = PeftModel.from_pretrained(CausalLM.from_pretrained(base), adapter)(ids).numpy()
    logits = {t: CausalLM.from_pretrained(tmp_path / t)(ids).numpy() for t in ("untie", "share")}
    assert np.allclose(logits["untie"], adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
    assert np.abs(logits["share"] - adapted).max() > 0.1
