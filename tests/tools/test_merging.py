"""merge: the bits of merging in a model, each within half an ulp of the exact sum; tied weights;
what is refused."""

from __future__ import annotations

import functools
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import split
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import shape
from small import SMALLER
from tool_files import (
    ADAPTERS,
    CODES,
    GOLDEN,
    PREFIX,
    WEIGHTS,
    base_of,
    lora_tensors,
    read_weights,
    tree,
    write_base,
    write_small,
)

from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    PeftModel,
    dequantize,
    get_peft_model,
    quantize,
)
from minilora.errors import ConfigError, FormatError
from minilora.formats import (
    Entry,
    bf16_from,
    bf16_to_float32,
    load_file,
    read_adapter,
    read_checkpoint,
    read_json,
    write_adapter,
    write_checkpoint,
    write_stream,
)
from minilora.formats.checkpoint import is_stored_transposed
from minilora.formats.dtypes import DTYPES, widen
from minilora.lora.files.adapter import AdapterFile
from minilora.lora.files.fitting import base_key
from minilora.tools.converting import convert
from minilora.tools.factoring import resize
from minilora.tools.merging import merge

HALF = ("float16", "bfloat16")
MANTISSA = {"F32": 24, "F16": 11, "BF16": 8}  # bits, with the hidden one
SMALLEST = {"F32": -149, "F16": -24, "BF16": -133}  # exponents of the smallest positive numbers
NEEDS_CHOICE = "gpt2--lora_wte"  # its embedding is adapted, and the head tied to it
MERGED = [name for name in ADAPTERS if name != NEEDS_CHOICE]


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


def tie_in_config(folder: Path) -> bool | None:
    return read_json(folder / "config.json").get("tie_word_embeddings")


def require_equal_bits(model: Path, tool: Path) -> None:
    ours = stored_bits(model)
    theirs = stored_bits(tool)
    assert set(ours) == set(theirs)
    for key, bits in theirs.items():
        assert np.array_equal(widen(ours[key]), widen(bits)), key
        assert ours[key].dtype == bits.dtype or bits.ndim < 2, key


# ---- the same bits as in a model, and each the exact sum rounded once ----


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tied", [None, "share", "untie"])
def test_merge_has_the_bits_of_merge_and_unload_for_golden_adapters(name, tied, tmp_path):
    base = base_of(name)
    out = tmp_path / "tool"
    if tied is None and name == NEEDS_CHOICE:
        with pytest.raises(ConfigError, match="tied='untie'"):
            merge(base, [GOLDEN / name], out)
        return
    merge(base, [GOLDEN / name], out, tied=tied)
    model = merge_in_memory(base, GOLDEN / name, tmp_path / "model", tied=tied)
    require_equal_bits(model, out)
    assert (out / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert tie_in_config(out) == tie_in_config(model)
    CausalLM.from_pretrained(out)


@functools.cache
def random_base(root: Path, kind: str, tied: bool, width: int, dtype: str) -> Path:
    """A model of one block in `dtype`, written once for all examples."""
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1}
    config = shape(kind, tie_word_embeddings=tied, hidden_size=width, **heads)
    folder = root / f"{kind}-{tied}-{width}"
    CausalLM(config, seed=width).save_pretrained(folder / "float32")
    if dtype != "float32":
        convert(folder / "float32", folder / dtype, dtype=dtype)
    return folder / dtype


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Any, ...], Any, int, str | None]:
    """The arguments of `random_base`, an adapter's configuration, a seed, and `tied`."""
    kind = draw(st.sampled_from(["llama", "gpt2"]))
    tie = draw(st.booleans())
    width = draw(st.sampled_from([8, 12]))
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
    return (kind, tie, width, dtype), adapter, draw(st.integers(0, 2**20)), choice


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@settings(max_examples=200)
@given(case=cases())
def test_merge_has_the_bits_of_merge_and_unload_and_rounds_the_exact_sum_once(case, bases):
    of_base, config, seed, tied = case
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(place)
        base = random_base(bases, *of_base)
        model = get_peft_model(CausalLM.from_pretrained(base), config)
        for parameter in model.adapter_parameters("default").values():
            scale = 10.0 ** rng.integers(-4, 1)
            noise = scale * rng.standard_normal(parameter.shape)
            parameter.data = (parameter.numpy() + noise).astype(np.float32)
        adapter = root / "adapter"
        model.save_pretrained(adapter)
        merge(base, [adapter], root / "tool", tied=tied)
        merged = merge_in_memory(base, adapter, root / "model", base.name in HALF, tied)
        require_equal_bits(merged, root / "tool")
        require_one_rounding(base, adapter, root / "tool")


def require_one_rounding(base: Path, adapter: Path, merged: Path) -> None:
    """|W' - exact| <= (1/2 + 2^-20) ulp, in extended precision."""
    fields, before = read_checkpoint(base)
    _, after = read_checkpoint(merged)
    with before, after, AdapterFile(adapter) as file:
        for path in file.layers:
            key = base_key(after, f"{path}.weight")
            source = base_key(before, f"{path}.weight")
            if key is None or source is None:
                continue  # a tied head: its embedding's weight is compared
            W = before.read(source).astype(np.longdouble)
            got = after.read(key).astype(np.longdouble)
            if file.embeds(path) or is_stored_transposed(fields["model_type"], key):
                W = W.T
                got = got.T
            A, B, c, m = file.part(path)
            V = W + np.longdouble(c) * (B.astype(np.longdouble) @ A.astype(np.longdouble))
            if m is not None:
                V = V * (m / np.sqrt((V * V).sum(axis=1)))[:, None]
            code = after.dtype(key)
            exponent = np.floor(np.log2(np.maximum(np.abs(V), 2.0**-200)))
            step = 2.0 ** np.maximum(exponent - (MANTISSA[code] - 1), SMALLEST[code])
            assert (np.abs(got - V) <= (0.5 + 2.0**-20) * step).all(), path


# ---- beside the definition ----


def neighbours(numbers: np.ndarray, code: str) -> list[np.ndarray]:
    """The numbers of a format above and below."""
    if code == "BF16":
        bits = bf16_from(numbers)
        above = (bits + np.uint16(1)).astype(np.uint16)
        below = (bits - np.uint16(1)).astype(np.uint16)
        return [bf16_to_float32(above).astype(float), bf16_to_float32(below).astype(float)]
    exact = numbers.astype({"F64": "f8", "F32": "f4", "F16": "f2"}[code])
    limits = np.array([math.inf, -math.inf], exact.dtype)
    return [np.nextafter(exact, limit).astype(float) for limit in limits]


def require_nearest(got: np.ndarray, exact: np.ndarray, code: str) -> np.ndarray:
    """No neighbour in the format is nearer to the exact number; returns the errors."""
    error = np.abs(got - exact)
    for other in neighbours(got, code):
        assert (error <= np.abs(other - exact) + 1e-14).all()
    return error


@settings(max_examples=40)
@given(st.data())
def test_merge_gives_the_weighted_sum_rounded_once(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(sorted(CODES)))
    new_dtype = draw(st.sampled_from([None, *DTYPES]))
    is_gpt2 = draw(st.booleans())
    stem = "transformer.h.{}.mlp.c_fc" if is_gpt2 else "model.layers.{}.q_proj"
    sizes = {}
    weights = {"other.bias": rng.normal(size=5)}
    prefix = "transformer." if is_gpt2 and draw(st.booleans()) else ""
    for number in range(3):
        path = stem.format(number)
        O = draw(st.integers(1, 9))
        I = draw(st.integers(1, 9))
        sizes[path] = (O, I)
        key = f"{path}.weight".removeprefix(prefix)
        weights[key] = rng.normal(size=(I, O) if is_gpt2 else (O, I))
    multiples = draw(st.lists(st.sampled_from([1.0, -0.5, 0.3]), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        kind = "gpt2" if is_gpt2 else "llama"
        shards = draw(st.integers(1, 3))
        base = write_base(root / "base", weights, shards, dtype, model_type=kind)
        with read_checkpoint(base)[1] as checkpoint:
            exact = {key: checkpoint.read(key, "f8") for key in weights}
            shards_before = checkpoint.shards
        adapters = []
        for number, multiple in enumerate(multiples):
            r = draw(st.integers(1, 5))
            use_rslora = draw(st.booleans())
            first = stem.format(0)
            fields = {"r": r, "lora_alpha": 3, "use_rslora": use_rslora, "fan_in_fan_out": is_gpt2}
            fields |= {"target_modules": list(sizes), "alpha_pattern": {first: 5}}
            tensors = {}
            for path, (O, I) in sizes.items():
                A = np.float32(rng.normal(size=(r, I)))
                B = np.float32(rng.normal(size=(O, r)) * 0.1)
                tensors |= lora_tensors(path, A, B)
                alpha = 5 if path == first else 3
                s = alpha / (math.sqrt(r) if use_rslora else r)
                dW = multiple * s * (B.astype(float) @ A)
                key = f"{path}.weight".removeprefix(prefix)
                exact[key] = exact[key] + (dW.T if is_gpt2 else dW)
            adapters.append(root / f"adapter{number}")
            write_adapter(adapters[-1], fields, tensors)
        rows = merge(base, adapters, root / "out", multiples, new_dtype)
        lost = {row["tensor"]: row["lost"] * row["|dW|"] for row in rows}
        assert set(lost) == set(exact) - {"other.bias"}
        code = CODES[new_dtype or dtype]
        config, checkpoint = read_checkpoint(root / "out")
        assert config["dtype"] == (new_dtype or dtype)
        with checkpoint:
            assert checkpoint.shards == shards_before
            for key, sum_of_all in exact.items():
                assert checkpoint.dtype(key) == code
                error = require_nearest(checkpoint.read(key, "f8"), sum_of_all, code)
                if key in lost:
                    assert lost[key] == pytest.approx(np.linalg.norm(error), rel=1e-6, abs=1e-13)


def test_merge_rounds_to_bfloat16_directly_and_not_through_float32(tmp_path):
    """1 + 2^-8 + 2^-31 is above the tie of 1 and 1 + 2^-7; in float32 it is that tie, which would
    become 1."""
    base = write_base(tmp_path / "base", {"q.weight": np.ones((1, 1))}, dtype="bfloat16")
    fields = {"r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    tensors = lora_tensors("q", np.ones((1, 1)), np.full((1, 1), 2.0**-8 + 2.0**-31))
    write_adapter(tmp_path / "adapter", fields, tensors)
    merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert read_weights(tmp_path / "out")["q.weight"] == 1 + 2.0**-7


@pytest.mark.parametrize("name", MERGED)
def test_merge_gives_the_logits_of_peft(name, tmp_path):
    before = tree(base_of(name)) | tree(GOLDEN / name)
    assert merge(base_of(name), [GOLDEN / name], tmp_path / "merged")
    assert tree(base_of(name)) | tree(GOLDEN / name) == before
    expected = load_file(GOLDEN / name / "expect.safetensors")
    model = CausalLM.from_pretrained(tmp_path / "merged", dtype="float64")
    got = model(expected["input_ids"]).numpy()
    assert np.abs(got - expected["logits_merged"]).max() <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def randomise(model: Any) -> None:
    rng = np.random.default_rng(0)
    for parameter in model.adapter_parameters("default").values():
        noise = np.float32(rng.standard_normal(parameter.shape))
        parameter.data = noise.astype(parameter.dtype)


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_merge_of_dora_on_an_embedding_is_the_scaled_sum_rounded_once(dtype, tmp_path):
    """Column by column of the table W (V, C):  m (W + s (B A)^T) / |W + s (B A)^T|; and in memory
    the same model."""
    CausalLM(SMALLER, seed=0).save_pretrained(tmp_path / "float32")
    base = tmp_path / "base"
    if dtype == "float64":
        weights = read_weights(tmp_path / "float32")
        write_base(base, weights, **{**SMALLER.to_dict(), "dtype": dtype})
    else:
        convert(tmp_path / "float32", base, dtype=dtype)
    fields: dict[str, Any] = {"target_modules": ["embed_tokens"], "init_lora_weights": False}
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, **fields)
    model = get_peft_model(CausalLM.from_pretrained(base, dtype="float64"), config)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    (row,) = merge(base, [tmp_path / "adapter"], tmp_path / "out")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = f"{PREFIX}model.embed_tokens.lora_"
    A = tensors[f"{stem}embedding_A"].astype(float)
    B = tensors[f"{stem}embedding_B"].astype(float)
    m = tensors[f"{stem}magnitude_vector"].astype(float)
    key = "model.embed_tokens.weight"
    with read_checkpoint(base)[1] as before, read_checkpoint(tmp_path / "out")[1] as after:
        W = before.read(key, "f8")
        got = after.read(key, "f8")
    V = W + 1.5 * (B @ A).T
    exact = m / np.linalg.norm(V, axis=0) * V
    error = np.linalg.norm(require_nearest(got, exact, CODES[dtype]))
    assert row["|dW|"] == pytest.approx(np.linalg.norm(exact - W), rel=1e-12)
    assert row["lost"] * row["|dW|"] == pytest.approx(error, rel=1e-6, abs=1e-13)
    merged = model.merge_and_unload().get_input_embeddings().weight.data
    assert np.abs(merged - exact).max() < 1e-13


# ---- tied weights, tokens, biases, weights ----


def test_merge_tied_untie_writes_a_head_of_its_own_and_share_one_weight(tmp_path):
    base = GOLDEN / "gpt2"
    adapter = GOLDEN / NEEDS_CHOICE
    for tied in ("untie", "share"):
        merge(base, [adapter], tmp_path / tied, tied=tied)
    plain = stored_bits(base)
    untied = stored_bits(tmp_path / "untie")
    shared = stored_bits(tmp_path / "share")
    assert set(shared) == set(plain)
    assert set(untied) == {*plain, "lm_head.weight"}
    table = next(key for key in plain if key.endswith("wte.weight"))
    assert np.array_equal(untied["lm_head.weight"], plain[table])
    assert np.array_equal(untied[table], shared[table])
    assert not np.array_equal(untied[table], plain[table])
    ids = np.arange(6)[None]
    adapted = PeftModel.from_pretrained(CausalLM.from_pretrained(base), adapter)(ids).numpy()
    logits = {
        tied: CausalLM.from_pretrained(tmp_path / tied)(ids).numpy() for tied in ("untie", "share")
    }
    assert np.allclose(logits["untie"], adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
    assert np.abs(logits["share"] - adapted).max() > 0.1


def test_merge_refuses_an_adapted_embedding_with_a_tied_head_without_a_choice(tmp_path):
    message = "changes the embedding, and embedding and head share one weight"
    with pytest.raises(ConfigError, match=message):
        merge(GOLDEN / "gpt2", [GOLDEN / NEEDS_CHOICE], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_of_a_tied_pair_that_changes_alike_needs_no_choice(tmp_path):
    base, adapter = write_small(tmp_path, tied=True)
    fields, tensors = read_adapter(adapter)
    new = np.arange(28, dtype=np.float32).reshape(7, 4)
    for path in ("model.embed_tokens", "lm_head"):
        tensors[f"{PREFIX}{path}.weight"] = new
    write_adapter(adapter, {**fields, "modules_to_save": ["embed_tokens", "lm_head"]}, tensors)
    merge(base, [adapter], tmp_path / "out")
    merged = read_weights(tmp_path / "out")
    assert (merged["model.embed_tokens.weight"] == new).all()
    assert "lm_head.weight" not in merged


@pytest.mark.parametrize("tied", [True, False])
def test_merge_replaces_the_rows_of_trained_tokens(tied, tmp_path):
    base, adapter = write_small(tmp_path, tied=tied)
    fields, tensors = read_adapter(adapter)
    new = np.arange(8, dtype=np.float32).reshape(2, 4)
    tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = new
    write_adapter(adapter, {**fields, "trainable_token_indices": [5, 2]}, tensors)
    merge(base, [adapter], tmp_path / "out")
    expected = read_weights(base)["model.embed_tokens.weight"]
    expected[[5, 2]] = new
    assert (read_weights(tmp_path / "out")["model.embed_tokens.weight"] == expected).all()
    write_adapter(adapter, {**fields, "trainable_token_indices": [5, 7]}, tensors)
    with pytest.raises(FormatError, match="embed_tokens has no row 7, only 7"):
        merge(base, [adapter], tmp_path / "new")


@pytest.mark.parametrize("saved", ["ln_f", "mlp"])
def test_merge_and_resize_require_repeated_biases_to_be_equal(saved, tmp_path):
    """With bias="all" and a module that is saved whole, PEFT's files have its biases as they were,
    and twice."""
    base = GOLDEN / "gpt2"
    adapter = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=[saved], bias="all")
    model = get_peft_model(CausalLM.from_pretrained(base), config)
    layers = CausalLM.from_pretrained(base).config.num_hidden_layers
    randomise(model)
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    merge(base, [adapter], tmp_path / "files")
    merged = (tmp_path / "files" / WEIGHTS).read_bytes()
    assert merged == (tmp_path / "model" / WEIGHTS).read_bytes()
    fields, tensors = read_adapter(adapter)
    resize(adapter, 2, tmp_path / "resized")
    assert set(read_adapter(tmp_path / "resized")[1]) == set(tensors)
    again = [key for key in tensors if ".original_module." in key or ".modules_to_save." in key]
    assert len(again) == 2 * (1 if saved == "ln_f" else 2 * layers)
    for key in again[0], again[-1]:
        message = "differs from what it repeats"
        if ".original_module." in key:
            message = "differs from the base's"
        changed = {**tensors, key: tensors[key] + np.float32(1)}
        write_adapter(adapter, fields, changed)
        with pytest.raises(FormatError, match=message):
            merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("weights", [[np.float32(0.5)], np.array([0.5]), (np.int64(2),)])
def test_merge_takes_weights_of_numpy_types(weights, tmp_path):
    base, adapter = write_small(tmp_path)
    merge(base, [adapter], tmp_path / "out", weights)
    merge(base, [adapter], tmp_path / "same", [float(weights[0])])
    assert tree(tmp_path / "out") == tree(tmp_path / "same")


# ---- bases of codes, with rare dtypes, and with a flag that their weights contradict ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("shards", [1, 3])
def test_merge_over_codes_has_the_logits_of_the_adapted_model(tmp_path, kind, dtype, shards):
    base = tmp_path / "codes"
    model = CausalLM(shape(kind, initializer_range=0.4), seed=1)
    quantize(model, "nf4").save_pretrained(base)
    target = "c_attn" if kind == "gpt2" else "q_proj"
    adapted: Any = get_peft_model(
        CausalLM.from_pretrained(base), LoraConfig(target_modules=[target])
    )
    for p in adapted.adapter_parameters("default").values():
        p.data = np.random.default_rng(0).normal(size=p.shape).astype(np.float32)
    adapted.save_pretrained(tmp_path / "adapter")
    if shards > 1:
        split(base, shards)
    merge(base, [tmp_path / "adapter"], tmp_path / "out", dtype=dtype)
    config = read_json(tmp_path / "out" / "config.json")
    assert "quantization_config" not in config
    assert config["dtype"] == (dtype or "float32")  # which the base's config.json names
    with read_checkpoint(tmp_path / "out")[1] as checkpoint:
        assert {checkpoint.dtype(key) for key in checkpoint} == {DTYPES[dtype or "float32"]}
        assert not [key for key in checkpoint if ".weight." in key]
    ids = np.arange(9)[None]
    expected = adapted.eval()(ids).numpy()
    got = CausalLM.from_pretrained(tmp_path / "out")(ids).numpy()
    tolerance = 0.1 if dtype == "bfloat16" else 1e-5
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()


def test_merge_over_codes_rounds_the_sum_once(tmp_path):
    """W + dW is rounded to bfloat16, not W before it."""
    base = tmp_path / "codes"
    quantize(CausalLM(SMALLER, seed=1), "nf4").save_pretrained(base)
    dense = CausalLM.from_pretrained(base)
    dequantize(dense).save_pretrained(tmp_path / "dense")
    adapted: Any = get_peft_model(CausalLM(SMALLER), LoraConfig(target_modules="all-linear"))
    for p in adapted.adapter_parameters("default").values():
        p.data = np.random.default_rng(0).normal(size=p.shape).astype(np.float32)
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("codes", "dense"):
        merge(tmp_path / name, [tmp_path / "adapter"], tmp_path / f"{name}-out", dtype="bfloat16")
    ours, theirs = (stored_bits(tmp_path / f"{name}-out") for name in ("codes", "dense"))
    assert {key: array.tobytes() for key, array in ours.items()} == {
        key: array.tobytes() for key, array in theirs.items()
    }


def test_merge_copies_a_tensor_of_a_dtype_that_is_not_read(tmp_path):
    base, adapter = write_small(tmp_path)
    extra = Entry("extra", "F4", (3, 2), lambda: np.array([1, 2, 3], np.uint8))
    with read_checkpoint(base)[1] as checkpoint:
        entries = [extra]
        for key in checkpoint:
            read = functools.partial(checkpoint.read_bits, key)
            entries.append(Entry(key, checkpoint.dtype(key), checkpoint.shape(key), read))
        write_stream(tmp_path / "new", entries)
    (tmp_path / "new").replace(base / WEIGHTS)
    merge(base, [adapter], tmp_path / "out")
    with read_checkpoint(tmp_path / "out")[1] as checkpoint:
        assert (checkpoint.dtype("extra"), checkpoint.shape("extra")) == ("F4", (3, 2))
        assert checkpoint.read_bytes("extra").tolist() == [1, 2, 3]
    with pytest.raises(
        FormatError, match=r"'extra' of shape \(3, 2\) is F4, which is listed but not"
    ):
        merge(base, [adapter], tmp_path / "rounded", dtype="float16")
    assert not (tmp_path / "rounded").exists()


def test_merge_takes_the_weights_for_what_they_are_not_a_tied_flag(tmp_path):
    """A head that differs from the embedding is not tied to it, so `tied` is not needed."""
    base, _ = write_small(tmp_path, tie_word_embeddings=True)
    rng = np.random.default_rng(0)
    fields = {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    tensors = lora_tensors("lm_head", rng.normal(size=(2, 4)), rng.normal(size=(7, 2)))
    write_adapter(tmp_path / "of-head", fields, tensors)
    merge(base, [tmp_path / "of-head"], tmp_path / "out")
    before, after = read_weights(base), read_weights(tmp_path / "out")
    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    assert changed == ["lm_head.weight"]
    assert tie_in_config(tmp_path / "out") is False


@pytest.mark.parametrize("name", ["llama--lora", "gpt2--lora"])
def test_merge_takes_a_base_whose_keys_lack_the_decoder_s_name(tmp_path, name):
    """As a model without a head is saved; the files keep their keys."""
    base = tmp_path / "base"
    config, checkpoint = read_checkpoint(base_of(name))
    with checkpoint:
        keys = {key: key.removeprefix("model.").removeprefix("transformer.") for key in checkpoint}
        write_checkpoint(base, config, {bare: checkpoint.read(key) for key, bare in keys.items()})
    merge(base, [GOLDEN / name], tmp_path / "bare")
    merge(base_of(name), [GOLDEN / name], tmp_path / "whole")
    bare, whole = read_weights(tmp_path / "bare"), read_weights(tmp_path / "whole")
    assert {keys[key]: array.tobytes() for key, array in whole.items()} == {
        key: array.tobytes() for key, array in bare.items()
    }
    CausalLM.from_pretrained(tmp_path / "bare")
