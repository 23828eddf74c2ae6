"""Merging, comparing, factoring and converting files: beside their definitions, and leaving nothing behind."""

from __future__ import annotations

import errno
import json
import math
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SMALLER

from minilora import CausalLM
from minilora.errors import ConfigError, FormatError, MiniloraError, NonFiniteError
from minilora.formats import (
    Entry,
    bf16_from,
    bf16_to_float32,
    dtypes,
    folders,
    load_file,
    read_adapter,
    read_checkpoint,
    save_file,
    write_adapter,
    write_json,
    write_stream,
)
from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.lora.files import AdapterFile
from minilora.tools import rewriting
from minilora.tools.comparing import count_above, diff
from minilora.tools.converting import convert
from minilora.tools.factoring import extract, resize
from minilora.tools.merging import merge

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(p.name for p in GOLDEN.iterdir() if (p / "adapter_config.json").exists())
PREFIX = "base_model.model."
MERGED = [
    name for name in ADAPTERS if name != "gpt2--lora_wte"
]  # whose embedding is adapted, and the head tied to it
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def of(adapter: str) -> Path:
    return GOLDEN / adapter.partition("--")[0]


def logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    model: Any = CausalLM.from_pretrained(base, dtype="float64")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    return np.asarray(model(np.arange(7)[None]).numpy())


def write_base(
    folder: Path, tensors: dict[str, np.ndarray], shards: int = 1, dtype: str = "float32", **config
) -> Path:
    """A checkpoint of float64 arrays, rounded to `dtype`."""
    folder.mkdir(parents=True)
    write_json(
        folder / "config.json",
        {"model_type": "llama", "tie_word_embeddings": False, "dtype": dtype, **config},
    )
    bits = {k: bf16_from(a) if dtype == "bfloat16" else a.astype(dtype) for k, a in tensors.items()}
    if shards == 1:
        names = {"model.safetensors": list(bits)}
    else:
        names = {f"part-{i}.safetensors": list(bits)[i::shards] for i in range(shards)}
        index = {key: name for name, keys in names.items() for key in keys}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"of": "us"}, "weight_map": index}
        )
    for name, keys in names.items():
        write_stream(
            folder / name,
            [Entry(k, CODES[dtype], bits[k].shape, lambda k=k: bits[k]) for k in keys],
        )  # type: ignore[misc]
    return folder


def lora(path: str, A: np.ndarray, B: np.ndarray) -> dict[str, np.ndarray]:
    return {
        f"{PREFIX}{path}.lora_A.weight": np.float32(A),
        f"{PREFIX}{path}.lora_B.weight": np.float32(B),
    }


def small(folder: Path, **config: Any) -> tuple[Path, Path]:
    """A base with a linear layer, an embedding and a head, and an adapter on the layer."""
    rng = np.random.default_rng(0)
    names = {"model.embed_tokens": (7, 4), "model.layers.0.q_proj": (4, 4), "lm_head": (7, 4)}
    if config.pop("tied", False):
        del names["lm_head"]
    write_base(
        folder / "base", {f"{n}.weight": rng.normal(size=s) for n, s in names.items()}, **config
    )
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    write_adapter(
        folder / "adapter",
        fields,
        lora("model.layers.0.q_proj", rng.normal(size=(2, 4)), np.ones((4, 2))),
    )
    return folder / "base", folder / "adapter"


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# ---- merge ----


def neighbours(got: np.ndarray, code: str) -> tuple[np.ndarray, ...]:
    """The numbers of a format above and below."""
    if code == "BF16":
        bits = bf16_from(got)
        return tuple(
            bf16_to_float32((bits + np.uint16(step)).astype(np.uint16)).astype(float)
            for step in (1, 65535)
        )
    own = got.astype({"F64": "f8", "F32": "f4", "F16": "f2"}[code])
    return tuple(
        np.nextafter(own, own.dtype.type(way)).astype(float) for way in (math.inf, -math.inf)
    )


@settings(max_examples=40)
@given(st.data())
def test_a_merged_weight_is_the_sum_rounded_once(data: st.DataObject) -> None:
    draw, rng = data.draw, np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dtype, kind = draw(st.sampled_from(sorted(CODES))), draw(st.sampled_from(["llama", "gpt2"]))
    to = draw(st.sampled_from([None, *dtypes.DTYPES]))
    names = [
        f"transformer.h.{i}.mlp.c_fc" if kind == "gpt2" else f"model.layers.{i}.q_proj"
        for i in range(3)
    ]
    sizes = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in names]
    W = {
        f"{n}.weight": rng.normal(size=s[::-1] if kind == "gpt2" else s)
        for n, s in zip(names, sizes, strict=True)
    }
    W["other.bias"] = rng.normal(size=5)
    bare = kind == "gpt2" and draw(st.booleans())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stored = {k.removeprefix("transformer.") if bare else k: a for k, a in W.items()}
        base = write_base(folder / "base", stored, draw(st.integers(1, 3)), dtype, model_type=kind)
        with read_checkpoint(base)[1] as there:
            exact, shards = {k: there.read(k, "f8") for k in stored}, there.shards
        weights = draw(st.lists(st.sampled_from([1.0, -0.5, 0.3]), min_size=1, max_size=3))
        for i, weight in enumerate(weights):
            r, rs = draw(st.integers(1, 5)), draw(st.booleans())
            fields = {"r": r, "lora_alpha": 3, "use_rslora": rs, "fan_in_fan_out": kind == "gpt2"}
            fields |= {"target_modules": names, "alpha_pattern": {names[0]: 5}}
            tensors = {}
            for name, (O, I) in zip(names, sizes, strict=True):
                A, B = (
                    np.float32(rng.normal(size=(r, I))),
                    np.float32(rng.normal(size=(O, r)) * 0.1),
                )
                tensors |= lora(name, A, B)
                s = (5 if name == names[0] else 3) / (math.sqrt(r) if rs else r)
                delta = weight * s * (B.astype(float) @ A)
                key = next(k for k in exact if f"{name}.weight".endswith(k))
                exact[key] = exact[key] + (delta.T if kind == "gpt2" else delta)
            write_adapter(folder / f"adapter{i}", fields, tensors)
        rows = merge(
            base, [folder / f"adapter{i}" for i in range(len(weights))], folder / "out", weights, to
        )
        code, lost = CODES[to or dtype], {row["tensor"]: row["lost"] * row["|dW|"] for row in rows}
        config, checkpoint = read_checkpoint(folder / "out")
        assert config["dtype"] == (to or dtype)
        assert set(lost) == set(exact) - {"other.bias"}
        with checkpoint:
            assert checkpoint.shards == shards
            for key, want in exact.items():
                assert checkpoint.dtype(key) == code
                got = checkpoint.read(key, "f8")
                error = np.abs(got - want)
                for other in neighbours(got, code):
                    assert (error <= np.abs(other - want) + 1e-14).all()
                if key in lost:
                    assert lost[key] == pytest.approx(np.linalg.norm(error), rel=1e-6, abs=1e-13)


def test_the_rounding_to_bfloat16_does_not_go_by_way_of_float32(tmp_path: Path) -> None:
    """1 + 2^-8 + 2^-31 is above the tie of 1 and 1 + 2^-7; in float32 it is that tie, which would go to 1."""
    base = write_base(tmp_path / "base", {"q.weight": np.ones((1, 1))}, dtype="bfloat16")
    fields = {"r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    write_adapter(
        tmp_path / "adapter",
        fields,
        lora("q", np.ones((1, 1)), np.full((1, 1), 2.0**-8 + 2.0**-31)),
    )
    merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["q.weight"] == 1 + 2.0**-7


@pytest.mark.parametrize("name", MERGED)
def test_merged_files_give_the_logits_that_peft_s_gave(name: str, tmp_path: Path) -> None:
    before = tree(of(name)) | tree(GOLDEN / name)
    rows = merge(of(name), [GOLDEN / name], tmp_path / "merged")
    assert tree(of(name)) | tree(GOLDEN / name) == before
    assert rows
    expect = load_file(GOLDEN / name / "expect.safetensors")
    got = CausalLM.from_pretrained(tmp_path / "merged", dtype="float64")(
        expect["input_ids"]
    ).numpy()
    assert np.abs(got - expect["logits_merged"]).max() <= 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("name", [name for name in MERGED if "dora" not in name])
def test_the_bits_are_those_of_merging_a_model(name: str, tmp_path: Path) -> None:
    """But for DoRA, whose norms a model has in its own precision, and a file in float64."""
    merge(of(name), [GOLDEN / name], tmp_path / "files")
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(of(name)), GOLDEN / name)
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    assert (
        tree(tmp_path / "files")["model.safetensors"]
        == tree(tmp_path / "model")["model.safetensors"]
    )


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_dora_on_an_embedding_is_the_scaled_sum_rounded_once(dtype: str, tmp_path: Path) -> None:
    """Column by column of the table W (V, C):  m (W + s (B A)^T) / |W + s (B A)^T|; and in memory the same model."""
    model = CausalLM(SMALLER, seed=0)
    model.save_pretrained(tmp_path / "float32")
    if dtype == "float64":
        tensors = {
            k: a.astype(dtype)
            for k, a in load_file(tmp_path / "float32" / "model.safetensors").items()
        }
        base = write_base(tmp_path / "base", tensors, **{**SMALLER.to_dict(), "dtype": dtype})
    else:
        base = tmp_path / "base"
        convert(tmp_path / "float32", base, dtype=dtype)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["embed_tokens"], use_dora=True, init_lora_weights=False
    )
    made = get_peft_model(CausalLM.from_pretrained(base, dtype="float64"), config)
    rng = np.random.default_rng(0)
    for p in made.adapter_parameters("default").values():
        p.data = np.float32(rng.standard_normal(p.shape)).astype(float)
    made.save_pretrained(tmp_path / "adapter")
    (row,) = merge(base, [tmp_path / "adapter"], tmp_path / "out")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A, B, m = (tensors[f"{PREFIX}model.embed_tokens.lora_{x}"].astype(float) for x in
               ("embedding_A", "embedding_B", "magnitude_vector"))  # fmt: skip
    key = "model.embed_tokens.weight"
    with read_checkpoint(base)[1] as there, read_checkpoint(tmp_path / "out")[1] as merged:
        W, got = there.read(key, "f8"), merged.read(key, "f8")
    V = W + 1.5 * (B @ A).T
    want = m / np.linalg.norm(V, axis=0) * V
    error = np.abs(got - want)
    for other in neighbours(got, CODES[dtype]):
        assert (error <= np.abs(other - want) + 1e-14).all()
    assert row["|dW|"] == pytest.approx(np.linalg.norm(want - W), rel=1e-12)
    assert row["lost"] * row["|dW|"] == pytest.approx(np.linalg.norm(error), rel=1e-6, abs=1e-13)
    assert np.abs(made.merge_and_unload().get_input_embeddings().weight.data - want).max() < 1e-13


@pytest.mark.parametrize("saved", ["ln_f", "mlp"])
def test_biases_that_a_file_has_again_must_be_those(saved: str, tmp_path: Path) -> None:
    """With bias="all" and a module that is saved whole, PEFT's files have its biases as they were, and twice."""
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=[saved], bias="all")
    made = get_peft_model(CausalLM.from_pretrained(of("gpt2")), config)
    rng = np.random.default_rng(0)
    for p in made.adapter_parameters("default").values():
        p.data = np.float32(rng.standard_normal(p.shape))
    made.save_pretrained(tmp_path / "adapter")
    made.merge_and_unload().save_pretrained(tmp_path / "model")
    file = "model.safetensors"
    merge(of("gpt2"), [tmp_path / "adapter"], tmp_path / "files")
    assert (tmp_path / "files" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    fields, tensors = read_adapter(tmp_path / "adapter")
    resize(tmp_path / "adapter", 2, tmp_path / "resized")
    assert set(read_adapter(tmp_path / "resized")[1]) == set(tensors)
    again = [key for key in tensors if ".original_module." in key or ".modules_to_save." in key]
    assert len(again) == 2 * (
        1 if saved == "ln_f" else 2 * CausalLM.from_pretrained(of("gpt2")).config.num_hidden_layers
    )
    for key in again[0], again[-1]:
        says = (
            "differs from the base's"
            if ".original_module." in key
            else "differs from the bias in modules_to_save"
        )
        write_adapter(tmp_path / "adapter", fields, {**tensors, key: tensors[key] + np.float32(1)})
        with pytest.raises(FormatError, match=says):
            merge(of("gpt2"), [tmp_path / "adapter"], tmp_path / "out")


def spoil(folder: Path, how: str) -> dict[str, Any]:
    """A base and an adapter that cannot be merged; options for merge."""
    base, adapter = small(folder, tied=how.startswith("tied"))
    fields, tensors = read_adapter(adapter)
    layer, options = "model.layers.0.q_proj", {}
    head = {f"{PREFIX}lm_head.weight": np.ones((7, 4), np.float32)}
    embedding = {f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 7), np.float32)}
    embedding |= {f"{PREFIX}model.embed_tokens.lora_embedding_B": np.ones((4, 2), np.float32)}
    if how == "tied head":
        fields, tensors = {**fields, "modules_to_save": ["lm_head"]}, tensors | head
    elif how == "tied embedding":
        fields, tensors = (
            {**fields, "target_modules": ["q_proj", "embed_tokens"]},
            tensors | embedding,
        )
    elif how == "DoRA beside another":
        m = {f"{PREFIX}{layer}.lora_magnitude_vector": np.ones(4, np.float32)}
        write_adapter(folder / "dora", {**fields, "use_dora": True}, tensors | m)
        options["adapters"] = [adapter, folder / "dora"]
    elif how == "half a head":
        fields, tensors = {**fields, "modules_to_save": ["lm_head"]}, tensors | head
        options["weights"] = [0.5]
    elif how == "weights":
        options["weights"] = [1.0, 2.0]
    elif how == "no adapters":
        options["adapters"] = []
    elif how == "too large a weight":
        options["weights"] = [1e300]
    elif how == "threads":
        options["threads"] = -1
    elif how == "another shape":
        tensors = lora(layer, np.ones((2, 5)), np.ones((4, 2)))
    elif how == "another layer":
        tensors = lora("model.layers.9.q_proj", np.ones((2, 4)), np.ones((4, 2)))
    elif how == "another rank":
        fields = {**fields, "r": 3}
    elif how == "no B":
        del tensors[f"{PREFIX}{layer}.lora_B.weight"]
    elif how == "another base's embedding":
        fields = {**fields, "target_modules": ["q_proj", "embed_tokens"]}
        tensors |= embedding | {
            f"{PREFIX}model.embed_tokens.base_layer.weight": np.ones((7, 4), np.float32)
        }
    elif how == "an unknown tensor":
        tensors[f"{PREFIX}{layer}.lora_magic"] = np.ones(1, np.float32)
    elif how == "NaN":
        tensors[f"{PREFIX}{layer}.lora_A.weight"][0, 0] = np.nan
    elif how == "NaN elsewhere":
        weights = load_file(base / "model.safetensors")
        weights["lm_head.weight"][6, 3] = np.inf
        save_file(base / "model.safetensors", weights)
    elif how == "too large":
        options["dtype"] = "float16"
        tensors[f"{PREFIX}{layer}.lora_A.weight"][:] = 1e6
    elif how == "codes":
        write_json(
            base / "config.json",
            {"model_type": "llama", "quantization_config": {"load_in_4bit": True}},
        )
    elif how == "outside":
        (base / "model.safetensors").unlink()
        write_json(base / "model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}})
    elif how == "missing shard":
        (base / "model.safetensors").unlink()
        write_json(base / "model.safetensors.index.json", {"weight_map": {"a": "x.safetensors"}})
    write_adapter(adapter, fields, tensors)
    return {"base": base, "adapters": [adapter], "out": folder / "out", **options}


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_take_their_places(tied: bool, tmp_path: Path) -> None:
    base, adapter = small(tmp_path, tied=tied)
    fields, tensors = read_adapter(adapter)
    new = np.arange(8, dtype=np.float32).reshape(2, 4)
    tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = new
    write_adapter(adapter, {**fields, "trainable_token_indices": [5, 2]}, tensors)
    merge(base, [adapter], tmp_path / "out")
    before, after = (
        load_file(f / "model.safetensors")["model.embed_tokens.weight"]
        for f in (base, tmp_path / "out")
    )
    before[[5, 2]] = new
    assert (after == before).all()
    write_adapter(adapter, {**fields, "trainable_token_indices": [5, 7]}, tensors)
    with pytest.raises(FormatError, match="embed_tokens has no row 7, only 7"):
        merge(base, [adapter], tmp_path / "new")


def test_the_golden_head_that_is_tied_to_an_adapted_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"changes the embedding, and embedding and head share one weight"
    ):
        merge(of("gpt2"), [GOLDEN / "gpt2--lora_wte"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


SPOILT = {
    "tied head": (ConfigError, "changes the head.*tied"),
    "tied embedding": (ConfigError, "changes the embedding.*tied"),
    "DoRA beside another": (ConfigError, "q_proj.weight cannot be added"),
    "half a head": (ConfigError, r"lm_head.weight.*0\.5 times"),
    "weights": (ConfigError, "--weights: expected 1"),
    "no adapters": (ConfigError, "adapters: expected a list of one or more"),
    "threads": (ConfigError, "--threads must be an integer of at least 1, got -1"),
    "another shape": (FormatError, r"q_proj.lora_A.weight is \(2, 5\), the base needs \(2, 4\)"),
    "another layer": (FormatError, "missing .*layers.0.q_proj.*unknown .*layers.9.q_proj"),
    "another rank": (FormatError, "q_proj: lora_A is .2, 4., but adapter_config.json says r = 3"),
    "no B": (FormatError, "q_proj: lora_A .2, 4. has no lora_B"),
    "another base's embedding": (FormatError, "embed_tokens.base_layer.weight differs"),
    "an unknown tensor": (FormatError, "q_proj.lora_magic"),
    "NaN": (NonFiniteError, "q_proj.weight is not finite"),
    "NaN elsewhere": (NonFiniteError, "lm_head.weight is not finite"),
    "too large": (NonFiniteError, "q_proj.weight is not finite"),
    "too large a weight": (
        NonFiniteError,
        r"--weights \[1e\+300\]: .*q_proj.weight with its adapters",
    ),
    "codes": (ConfigError, "quantization_config"),
    "outside": (FormatError, "is outside"),
    "missing shard": (FormatError, "x.safetensors' is missing"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_cannot_be_merged_is_named_and_leaves_nothing(how: str, tmp_path: Path) -> None:
    options = spoil(tmp_path, how)
    before = tree(tmp_path)
    kind, says = SPOILT[how]
    with pytest.raises(kind, match=says):
        merge(**options)
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_merges_where_it_is_allowed(tmp_path: Path) -> None:
    options = spoil(tmp_path, "NaN")
    (row,) = merge(**options, allow_nonfinite=True)
    assert row["lost"] is None
    assert np.isnan(
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.q_proj.weight"]
    ).any()


def test_a_tied_pair_that_changes_alike_is_merged(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, tied=True)
    fields, tensors = read_adapter(adapter)
    new = np.arange(28, dtype=np.float32).reshape(7, 4)
    tensors |= {f"{PREFIX}{name}.weight": new for name in ("model.embed_tokens", "lm_head")}
    write_adapter(adapter, {**fields, "modules_to_save": ["embed_tokens", "lm_head"]}, tensors)
    merge(base, [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert (merged["model.embed_tokens.weight"] == new).all()
    assert "lm_head.weight" not in merged


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left"), MemoryError()]
)
def test_an_end_in_the_middle_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch
) -> None:
    base, adapter = small(tmp_path, shards=3)
    before = tree(tmp_path)
    calls = []

    def failing(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise error
        write_stream(path, *rest)

    monkeypatch.setattr(rewriting, "write_stream", failing)
    with pytest.raises(type(error)):
        merge(base, [adapter], tmp_path / "out")
    assert len(calls) == 2
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_folders_whose_names_begin_alike_are_made_at_once(tmp_path: Path) -> None:
    """The longest name that a file system takes is one of them."""
    names = [
        "x" * 40,
        "x" * 41,
        "x" * 254 + "a",
        "x" * 254 + "b",
        "\N{SNOWMAN}" * 40 + "a",
        "\N{SNOWMAN}" * 40 + "b",
    ]
    with ExitStack() as opened:
        for name in names:
            stage = opened.enter_context(folders.new_folder(tmp_path / name, {"of": name}))
            (stage / "mine").write_text(name)
    assert {file.parent.name: file.read_text() for file in tmp_path.glob("*/mine")} == {
        name: name for name in names
    }


@pytest.mark.parametrize("same", [True, False])
def test_a_killed_merge_goes_on_if_nothing_changed(same: bool, tmp_path: Path, monkeypatch) -> None:
    base, adapter = small(tmp_path, shards=3)
    rows = merge(base, [adapter], tmp_path / "whole", [0.5])
    made: list[str] = []

    def counting(path: Path, *rest: Any) -> None:
        made.append(path.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        write_stream(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "write_stream", counting)
        patch.setattr(
            folders.shutil, "rmtree", lambda *_, **__: None
        )  # a killed process takes nothing away
        with pytest.raises(KeyboardInterrupt):
            merge(base, [adapter], tmp_path / "out", [0.5])
    assert (tmp_path / ".out.unfinished").exists()
    monkeypatch.setattr(rewriting, "write_stream", counting)
    made[:] = ["", "", ""]
    again = merge(base, [adapter], tmp_path / "out", [0.5 if same else 1.0])
    assert len(made) - 3 == (1 if same else 3)
    assert (tree(tmp_path / "out") == tree(tmp_path / "whole")) == same
    assert (again == rows) == same
    assert not (tmp_path / ".out.unfinished").exists()


# ---- resize, extract, diff ----


def deltas(adapter: Path) -> dict[str, np.ndarray]:
    with AdapterFile(adapter) as file:
        return {path: f.c * (f.B @ f.A) for path in file.layers for f in [file.part(path)]}


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("name", ADAPTERS)
def test_resizing_misses_what_eckart_and_young_say(name: str, r: int, tmp_path: Path) -> None:
    rows = resize(GOLDEN / name, r, tmp_path / "out")
    before, after = deltas(GOLDEN / name), deltas(tmp_path / "out")
    assert [row["layer"] for row in rows] == list(before)
    for row in rows:
        dense, got = before[row["layer"]], after[row["layer"]]
        values = np.linalg.svd(dense, compute_uv=False)
        assert row["|dW|"] == pytest.approx(np.linalg.norm(dense), rel=1e-12)
        assert row["error"] == pytest.approx(np.linalg.norm(values[r:]), rel=1e-9, abs=1e-13)
        assert np.linalg.norm(got - dense) == pytest.approx(
            row["error"], rel=1e-4, abs=4e-7 * row["|dW|"]
        )
    if r == 8:
        assert (
            np.abs(logits(of(name), tmp_path / "out") - logits(of(name), GOLDEN / name)).max()
            < 2e-6
        )


@pytest.mark.parametrize(("x", "says"), [(1e60, "too large for float32"), (1e160, "is not finite")])
def test_factors_whose_product_nothing_can_hold_are_refused(
    x: float, says: str, tmp_path: Path
) -> None:
    """Finite in the file, in float64; beyond it, LAPACK's decomposition of their product may never end."""
    config, tensors = read_adapter(GOLDEN / "llama--lora")
    write_adapter(
        tmp_path / "large", config, {key: np.full(a.shape, x) for key, a in tensors.items()}
    )
    with pytest.raises(NonFiniteError, match=f"layers.0.*{says}"):
        resize(tmp_path / "large", 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama--lora", "llama--save_head", "gpt2--lora", "qwen3--lora"])
def test_an_extracted_adapter_is_the_difference(name: str, tmp_path: Path) -> None:
    merge(of(name), [GOLDEN / name], tmp_path / "tuned")
    rows = extract(of(name), tmp_path / "tuned", 4, tmp_path / "out")
    assert {row["layer"] for row in rows} == set(deltas(GOLDEN / name))
    assert max(row["relative"] for row in rows) < 1e-6
    assert np.abs(logits(of(name), tmp_path / "out") - logits(tmp_path / "tuned")).max() < 2e-6
    rows = extract(of(name), tmp_path / "tuned", 1, tmp_path / "one")
    for row in rows:
        values = np.linalg.svd(deltas(GOLDEN / name)[row["layer"]], compute_uv=False)
        assert row["error"] == pytest.approx(np.linalg.norm(values[1:]), rel=1e-5)


def test_diff_finds_the_rank_that_was_merged(tmp_path: Path) -> None:
    merge(of("llama--lora"), [GOLDEN / "llama--lora"], tmp_path / "tuned")
    report = diff(of("llama--lora"), tmp_path / "tuned")
    expected = deltas(GOLDEN / "llama--lora")
    for row in report["tensors"]:
        delta = expected.get(row["tensor"].removesuffix(".weight"))
        assert row["rank"] == (4 if delta is not None else 0 if " x " in row["shape"] else None)
        assert row["|b - a|"] == pytest.approx(
            0 if delta is None else np.linalg.norm(delta), rel=1e-6
        )
        assert row["relative"] == 0 or row["relative"] > 0
    assert report["equal"] == len(report["tensors"]) - len(expected)
    assert report["only in a"] == report["only in b"] == []


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(-12, 0),
    st.sampled_from([0, -530, -600, 600]),
    st.integers(0, 99),
)
def test_values_above_a_threshold_are_counted_however_near_they_are(
    O: int, I: int, power: int, exponent: int, seed: int
) -> None:
    """The threshold is one of the values, or a bit below or above it, or anything."""
    rng, n = np.random.default_rng(seed), min(O, I)
    values = np.sort(10.0 ** rng.uniform(power, 0, n))[::-1]
    D = (np.linalg.qr(rng.standard_normal((O, n)))[0] * values) @ np.linalg.qr(
        rng.standard_normal((I, n))
    )[0].T
    D = np.ldexp(D, exponent)
    exact = np.linalg.svd(D, compute_uv=False)
    at = exact[rng.integers(n)]
    for threshold in (
        at,
        np.nextafter(at, 0),
        at * (1 + 1e-9),
        exact[-1] / 2,
        np.ldexp(2.0, exponent),
    ):
        assert count_above(D, threshold) == (exact > threshold).sum()


@pytest.mark.parametrize("scale", [0, 1e-9, 1])
def test_the_rank_of_a_difference_does_not_count_what_rounded_the_larger(
    scale: float, tmp_path: Path
) -> None:
    """u v^T, stored in float32, has small singular values besides, of its own rounding; in either of the two files."""
    rng = np.random.default_rng(0)
    W = scale * rng.standard_normal((40, 50))
    write_base(tmp_path / "a", {"w": W})
    write_base(
        tmp_path / "b", {"w": W + np.outer(rng.standard_normal(40), rng.standard_normal(50))}
    )
    for one, other in ("ab", "ba"):
        (row,) = diff(tmp_path / one, tmp_path / other)["tensors"]
        assert row["rank"] == 1


def test_diff_names_what_only_one_has_and_shapes_that_differ(tmp_path: Path) -> None:
    write_base(tmp_path / "a", {"x": np.ones(3), "y": np.ones((2, 2)), "z": np.full(2, np.nan)})
    write_base(tmp_path / "b", {"w": np.ones(3), "y": np.ones((2, 3)), "z": np.ones(2)})
    report = diff(tmp_path / "a", tmp_path / "b")
    assert (report["only in a"], report["only in b"]) == (["x"], ["w"])
    assert [(row["shape"], row["|b - a|"]) for row in report["tensors"]] == [
        ("2 x 2 and 2 x 3", None),
        ("2", None),
    ]
    json.dumps(report, allow_nan=False)


def test_equal_checkpoints_and_tied_embeddings_give_no_adapter(tmp_path: Path) -> None:
    base, _ = small(tmp_path, tied=True)
    with pytest.raises(ConfigError, match="nothing to extract"):
        extract(base, base, 1, tmp_path / "out")
    shutil.copytree(base, tmp_path / "tuned")
    tensors = load_file(base / "model.safetensors")
    save_file(tmp_path / "tuned" / "model.safetensors", {k: a + 1 for k, a in tensors.items()})
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight changed, and the head is tied"):
        extract(base, tmp_path / "tuned", 1, tmp_path / "out")
    save_file(tmp_path / "tuned" / "model.safetensors", {**tensors, "more": np.ones(1, np.float32)})
    with pytest.raises(FormatError, match="more is in one alone"):
        extract(base, tmp_path / "tuned", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- convert ----


@pytest.mark.parametrize(
    "name",
    [
        "llama--lora",
        "llama--dora",
        "llama--regex_layer1",
        "llama--rslora_all",
        "qwen3--lora",
        "gpt2--dora_proj",
    ],
)
def test_an_adapter_goes_to_mlx_and_comes_back(name: str, tmp_path: Path) -> None:
    convert(GOLDEN / name, tmp_path / "mlx", to="mlx")
    fields, there = (
        json.loads((tmp_path / "mlx/adapter_config.json").read_text()),
        load_file(tmp_path / "mlx/adapters.safetensors"),
    )
    with AdapterFile(GOLDEN / name) as file:
        for path in file.layers:
            f = file.part(path)
            name_there = path.replace("transformer.h", "model.h")
            assert (there[f"{name_there}.lora_a"] == f.A.T).all()
            assert (there[f"{name_there}.lora_b"] == f.B.T).all()
            assert fields["lora_parameters"]["scale"] == f.c
    assert fields["fine_tune_type"] == ("dora" if "dora" in name else "lora")
    convert(tmp_path / "mlx", tmp_path / "peft", to="peft")
    _, before = read_adapter(GOLDEN / name)
    _, after = read_adapter(tmp_path / "peft")
    assert {k: a.tobytes() for k, a in after.items()} == {k: a.tobytes() for k, a in before.items()}
    assert (
        np.abs(logits(of(name), tmp_path / "peft") - logits(of(name), GOLDEN / name)).max() < 1e-12
    )


@pytest.mark.filterwarnings("ignore:ensure_weight_tying")
@pytest.mark.parametrize("name", sorted(mlx_golden.CASES.keys() - {*mlx_golden.REFUSED}))
def test_what_mlx_lm_trained_has_its_logits_here_and_comes_back(name: str, tmp_path: Path) -> None:
    convert(mlx_golden.FOLDER / name, tmp_path / "peft", to="peft")
    base = GOLDEN / mlx_golden.CASES[name][0]
    expected = np.load(mlx_golden.FOLDER / name / "logits.npy")
    got, plain = (
        logits(base, tmp_path / "peft")[0, : len(expected)],
        logits(base)[0, : len(expected)],
    )
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(got - plain).max() > 0.1
    if name != "tied-embedding":
        convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
        there, back = (
            load_file(f / "adapters.safetensors")
            for f in (mlx_golden.FOLDER / name, tmp_path / "mlx")
        )
        assert {k: a.tobytes() for k, a in back.items()} == {
            k: a.tobytes() for k, a in there.items()
        }
        keys = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())[
            "lora_parameters"
        ]["keys"]
        assert ("lm_head" in keys) == (name == "head")


def test_an_embedding_may_mean_another_thing_to_mlx(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"DoRA of model\.embed_tokens has a length for each token"
    ):
        convert(mlx_golden.FOLDER / "dora-embedding", tmp_path / "peft", to="peft")
    with pytest.raises(
        ConfigError, match=r"model\.wte: GPT-2's embeddings are adapted there with the head"
    ):
        convert(mlx_golden.FOLDER / "gpt2-embedding", tmp_path / "peft", to="peft")
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    get_peft_model(CausalLM(replace(SMALLER, tie_word_embeddings=True)), config).save_pretrained(
        tmp_path / "peft"
    )
    with pytest.raises(ConfigError, match="on linear layers, and nothing else"):
        convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


def mlx(folder: Path, a: np.ndarray, b: np.ndarray, **parameters: Any) -> Path:
    folder.mkdir()
    given = {"rank": 2, "scale": 20.0, "dropout": 0.0, **parameters}
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": given}
    write_json(folder / "adapter_config.json", fields)
    path = "model.layers.0.self_attn.q_proj"
    save_file(
        folder / "adapters.safetensors",
        {f"{path}.lora_a": np.float32(a), f"{path}.lora_b": np.float32(b)},
    )
    return folder


def test_a_square_factor_is_turned_all_the_same(tmp_path: Path) -> None:
    a, b = np.arange(4.0).reshape(2, 2), np.arange(4.0, 8).reshape(2, 2)
    convert(mlx(tmp_path / "mlx", a, b), tmp_path / "peft", to="peft")
    (delta,) = deltas(tmp_path / "peft").values()
    assert np.abs(delta - 20 * (a @ b).T).max() < 1e-4


@pytest.mark.parametrize(
    ("a", "b", "parameters", "kind"),
    [
        ((2, 5), (2, 5), {}, FormatError),  # lora_a as PEFT has it
        ((5, 2), (5, 2), {}, FormatError),
        ((5, 3), (3, 5), {}, FormatError),  # another rank than is said
        ((5, 2), (2, 5), {"rank": 0}, ConfigError),
        ((5, 2), (2, 5), {"scale": None}, ConfigError),
        ((5, 2), (2, 5), {"dropout": 2}, ConfigError),
    ],
)
def test_factors_that_lie_the_wrong_way_are_refused(
    a: tuple[int, int],
    b: tuple[int, int],
    parameters: dict[str, Any],
    kind: type[MiniloraError],
    tmp_path: Path,
) -> None:
    source = mlx(tmp_path / "mlx", np.ones(a), np.ones(b), **parameters)
    with pytest.raises(kind):
        convert(source, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["llama--patterns", "llama--save_head", "llama--adalora", "gpt2--lora_wte"]
)
def test_what_mlx_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlx-lm has"):
        convert(GOLDEN / name, tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_layer_is_none_to_mlx(tmp_path: Path) -> None:
    write_adapter(tmp_path / "none", LoraConfig(target_modules=["q_proj"]).to_dict(), {})
    with pytest.raises(ConfigError, match="none' adapts no layer"):
        convert(tmp_path / "none", tmp_path / "out", to="mlx")


def test_adapters_are_converted_to_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--to must be peft or mlx, got 'onnx'"):
        convert(GOLDEN / "llama--lora", tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [[np.float32(0.5)], np.array([0.5]), (np.int64(2),)])
def test_weights_may_be_numpy_s(weights: Any, tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    merge(base, [adapter], tmp_path / "out", weights)
    merge(base, [adapter], tmp_path / "same", [float(weights[0])])
    assert tree(tmp_path / "out") == tree(tmp_path / "same")


@pytest.mark.parametrize("dtype", dtypes.DTYPES)
@pytest.mark.parametrize("source", ["llama", "llama--lora"])
def test_another_dtype_rounds_every_number_once(source: str, dtype: str, tmp_path: Path) -> None:
    convert(GOLDEN / source, tmp_path / "out", dtype=dtype)
    name = "model.safetensors" if source == "llama" else "adapter_model.safetensors"
    before, after = load_file(GOLDEN / source / name), load_file(tmp_path / "out" / name)
    assert set(after) == set(before)
    for key, array in before.items():
        want = bf16_to_float32(bf16_from(array)) if dtype == "bfloat16" else array.astype(dtype)
        assert after[key].dtype == want.dtype
        assert (after[key] == want).all()


@pytest.mark.parametrize("tool", ["merge", "resize", "convert", "extract"])
def test_nothing_is_written_inside_what_is_read(tool: str, tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    before = tree(tmp_path)
    run = {
        "merge": lambda out: merge(base, [adapter], out),
        "resize": lambda out: resize(adapter, 1, out),
        "convert": lambda out: convert(adapter, out, dtype="float16"),
        "extract": lambda out: extract(base, adapter, 1, out),
    }[tool]
    for out in (adapter, adapter / "new", tmp_path / "base" / ".." / "adapter"):
        with pytest.raises(ConfigError, match=r"--out .* is inside --"):
            run(out)
    assert tree(tmp_path) == before
