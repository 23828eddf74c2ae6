"""Adapters added up, in a model and from files alone: beside the sum of what they are, and leaving nothing behind."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from strict_xp import STRICT
from tool_files import GOLDEN, PREFIX, deltas, logits, tree
from tool_files import base_of as of

from minilora import CausalLM
from minilora.errors import ConfigError, FormatError, MiniloraError, NonFiniteError
from minilora.formats import read_adapter, write_adapter
from minilora.lora import AdaLoraConfig, HydraConfig, LoraConfig, PeftModel, get_peft_model
from minilora.lora.combining import COMBINATION_TYPES, combine_layer
from minilora.lora.factors import Part
from minilora.lora.files import AdapterFile
from minilora.tools.combining import combine
from minilora.tools.merging import merge

U32, U64 = 2.0**-24, 2.0**-53
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens")
PAIRS = [  # golden adapters of one base that can be added up
    ("llama--lora", "llama--rslora_all"),
    ("llama--adalora", "llama--patterns"),
    ("llama--save_head", "llama--regex_layer1"),
    ("gpt2--lora", "gpt2--lora_wte"),
]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr("os.fsync", lambda file: None)
        yield


# ---- files -----------------------------------------------------------------------------------------------------------


def write(
    folder: Path, parts: dict[str, Part], rng: np.random.Generator, kind: str, alpha: float
) -> Path:
    """An adapter whose layers have these ranks: c is their s."""
    tensors, patterns, ranks = {}, {}, {path: len(p.A) for path, p in parts.items()}
    for path, p in parts.items():
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if "embed" in path
            else ("lora_A.weight", "lora_B.weight")
        )
        names = ("lora_A", "lora_B") if kind == "ADALORA" else names
        E = rng.normal(size=(len(p.A), 1)).astype(np.float32) if kind == "ADALORA" else None
        tensors |= {f"{PREFIX}{path}.{n}": np.float32(a) for n, a in zip(names, p[:2], strict=True)}
        tensors |= {} if E is None else {f"{PREFIX}{path}.lora_E": E}
        patterns[path] = p.c
    r = max(ranks.values())
    fields: dict[str, Any] = {
        "peft_type": kind,
        "target_modules": sorted(parts),
        "lora_alpha": alpha,
    }
    if kind == "ADALORA":
        fields |= {"init_r": r, "target_r": r, "total_step": 9}
    else:
        fields |= {
            "r": r,
            "rank_pattern": ranks,
            "use_rslora": kind == "RSLORA",
            "peft_type": "LORA",
        }
    write_adapter(folder, fields, tensors)
    return folder


def sums(
    adapters: list[Path], weights: list[float]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By layer: the sum of w s B A, and that of |w s| |B| |A|."""
    total: dict[str, Any] = {}
    scale: dict[str, Any] = {}
    for folder, w in zip(adapters, weights, strict=True):
        with AdapterFile(folder) as file:
            for path in file.layers:
                A, B, s, _ = file.part(path)
                total[path] = total.get(path, 0) + w * s * (B @ A)
                scale[path] = scale.get(path, 0) + abs(w * s) * (abs(B) @ abs(A))
    return total, scale


def cross_terms(adapters: list[Path], weights: list[float], path: str) -> tuple[Any, Any]:
    """Of linear: sum over i != j of sgn(c_j) sqrt|c_i c_j| B_i A_j; and the absolute values of that and of the sum."""
    found = []
    for folder, w in zip(adapters, weights, strict=True):
        with AdapterFile(folder) as file:
            if path in file.layers:
                A, B, s, _ = file.part(path)
                found.append((A, B, w * s))
    cross, scale = 0.0, 0.0
    for (i, (_, B, c)), (j, (A, _, d)) in itertools.product(enumerate(found), repeat=2):
        term = math.sqrt(abs(c) * abs(d)) * (B @ A)
        cross = cross + (math.copysign(1, d) * term if i != j else 0)
        scale = scale + math.sqrt(abs(c) * abs(d)) * (abs(B) @ abs(A))
    return cross, scale


@settings(max_examples=40)
@given(st.data())
def test_a_combined_adapter_is_the_sum_or_as_far_from_it_as_it_says(data: st.DataObject) -> None:
    draw, rng = data.draw, np.random.default_rng(data.draw(st.integers(0, 2**32)))
    how, count = draw(st.sampled_from(COMBINATION_TYPES)), draw(st.integers(1, 3))
    sizes = {path: (draw(st.integers(1, 9)), draw(st.integers(1, 9))) for path in PATHS}
    weights = draw(
        st.lists(st.sampled_from([1.0, 0.5, -0.75, 2.0, 0.0]), min_size=count, max_size=count)
    )
    same = draw(st.integers(1, 4)) if how == "linear" else None
    with tempfile.TemporaryDirectory() as scratch:
        adapters = []
        for i in range(count):
            kind = draw(st.sampled_from(["LORA", "RSLORA", "ADALORA"]))
            own = draw(
                st.lists(
                    st.sampled_from(PATHS[:2] if kind == "ADALORA" else PATHS),
                    min_size=1,
                    unique=True,
                )
            )
            r = draw(st.integers(1, 5))
            parts = {}
            for path in own:
                r, (O, I) = (
                    same or (r if kind == "ADALORA" else draw(st.integers(1, 5))),
                    sizes[path],
                )
                parts[path] = Part(rng.normal(size=(r, I)), rng.normal(size=(O, r)), 1)
            adapters.append(
                write(Path(scratch, f"a{i}"), parts, rng, kind, draw(st.sampled_from([1, 3.5])))
            )
        before = tree(Path(scratch))
        r = draw(st.integers(1, 9)) if how == "svd" else None
        rows = combine(adapters, Path(scratch, "out"), weights, how, r)
        got, (want, scale) = deltas(Path(scratch, "out")), sums(adapters, weights)
        shutil.copytree(Path(scratch, "out"), Path(scratch, "kept"))
        for path, row in {row["layer"]: row for row in rows}.items():
            cross, size = (
                cross_terms(adapters, weights, path) if how == "linear" else (0.0, scale[path])
            )
            # A and B are rounded once each. Of svd |B| |A| may be larger than the sum's.
            bound = (2 * U32 + U32**2) * (
                size if how != "svd" else sized(Path(scratch, "out"), path)
            )
            bound = bound + 64 * 9 * U64 * np.linalg.norm(size)
            missed = np.linalg.norm(got[path] - want[path])
            assert abs(row["error"] - missed) <= 64 * 9 * U64 * np.linalg.norm(size)
            assert row["|dW|"] == pytest.approx(
                np.linalg.norm(want[path]), rel=1e-11, abs=64 * 9 * U64 * size.max()
            )
            if how == "svd":
                values = np.linalg.svd(want[path], compute_uv=False)
                kept = int(row["r"].rpartition(" ")[2])
                assert abs(missed - np.linalg.norm(values[kept:])) <= np.linalg.norm(bound)
            else:
                assert (abs(got[path] - want[path] - cross) <= bound).all()
        assert set(got) == set(want) == {row["layer"] for row in rows}
        assert before == {k: v for k, v in tree(Path(scratch)).items() if k in before}
        fields, tensors = read_adapter(Path(scratch, "out"))
        assert (fields["lora_alpha"], fields["use_rslora"], fields["rank_pattern"]) == (
            fields["r"],
            False,
            {},
        )
        ranks = {a.shape[0] for k, a in tensors.items() if "_A" in k}
        added = [[int(n) for n in row["r"].partition(" -> ")[0].split(" + ")] for row in rows]
        assert (
            ranks
            == {fields["r"]}
            == {r or max(sum(own) if how == "cat" else max(own) for own in added)}
        )


def sized(folder: Path, path: str) -> np.ndarray:
    with AdapterFile(folder) as file:
        A, B, s, _ = file.part(path)
        return s * (abs(B) @ abs(A))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*above the full rank")
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_what_is_combined_is_both_at_once(pair: tuple[str, str], tmp_path: Path) -> None:
    """cat by default: the logits of the base with both active, as far as float32 holds the factors."""
    base, folders = of(pair[0]), [GOLDEN / name for name in pair]
    combine(folders, tmp_path / "both")
    model = PeftModel.from_pretrained(
        CausalLM.from_pretrained(base, dtype="float64"), folders[0], "one"
    )
    model.load_adapter(folders[1], "two")
    model.set_adapter(["one", "two"])
    both = np.asarray(model(np.arange(7)[None]).numpy())
    assert np.abs(logits(base, tmp_path / "both") - both).max() <= 1e-6 * np.abs(both).max()
    model.set_adapter("one")
    assert np.abs(np.asarray(model(np.arange(7)[None]).numpy()) - both).max() > 1e-3


@pytest.mark.parametrize("how", COMBINATION_TYPES)
def test_what_merges_as_two_merges_as_one(how: str, tmp_path: Path) -> None:
    names = [GOLDEN / "llama--lora", GOLDEN / "llama--lora"]
    combine(names, tmp_path / "both", [0.75, -0.25], how)
    merge(of("llama--lora"), names, tmp_path / "two", [0.75, -0.25])
    merge(of("llama--lora"), [tmp_path / "both"], tmp_path / "one")
    assert np.abs(logits(tmp_path / "one") - logits(tmp_path / "two")).max() < 1e-6


def test_svd_without_a_rank_takes_the_largest(tmp_path: Path) -> None:
    rows = combine(
        [GOLDEN / "llama--lora", GOLDEN / "llama--rslora_all"], tmp_path / "out", how="svd"
    )
    assert {row["r"] for row in rows} == {"4 + 3 -> 4", "3 -> 4"}
    assert read_adapter(tmp_path / "out")[0]["r"] == 4


def test_a_weight_that_is_one_keeps_the_bits_of_A(tmp_path: Path) -> None:
    combine([GOLDEN / "llama--lora"] * 2, tmp_path / "out")
    (_, one), (_, two) = read_adapter(GOLDEN / "llama--lora"), read_adapter(tmp_path / "out")
    assert set(one) == set(two)
    for key, array in one.items():
        axis = 0 if "lora_A" in key else 1
        assert (
            two[key] == np.concatenate([array * (axis + 1)] * 2, axis=axis)
        ).all()  # s = 8 / 4 goes into B


@pytest.mark.parametrize(
    "name", ["llama--dora", "llama--save_head", "qwen2--lora_bias_only", "gpt2--lora_wte"]
)
def test_one_adapter_alone_keeps_all_that_it_is(name: str, tmp_path: Path) -> None:
    combine([GOLDEN / name], tmp_path / "out")
    assert set(read_adapter(tmp_path / "out")[1]) == set(read_adapter(GOLDEN / name)[1])
    assert np.abs(logits(of(name), tmp_path / "out") - logits(of(name), GOLDEN / name)).max() < 1e-5


OTHERS: dict[str, dict[str, Any]] = {
    "a copied module": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [3, 1]},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "a pattern": {"target_modules": r".*layers\.1\..*(q|down)_proj"},
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("what", OTHERS)
def test_what_only_one_has_stays(what: str, first: int, tmp_path: Path) -> None:
    """The other one is of a layer alone, and says so by a number and by what it excludes."""
    model, rng = small.base("float64"), np.random.default_rng(0)
    model.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    narrow = {"exclude_modules": ["down_proj"], "layers_to_transform": [1]}
    for name, fields in (
        ("0", OTHERS[what]),
        ("1", narrow if what == "a pattern" else {"layers_to_transform": [1]}),
    ):
        made = get_peft_model(model, LoraConfig(**{"r": 2, **targets, **fields}), name)
        for key, p in made.adapter_parameters(name).items():
            if "lora_" not in key:  # in a file: what is trained there, and not here
                p.data = p.data + rng.normal(size=p.shape)
        made.save_pretrained(tmp_path)
        made.unload()
    model = PeftModel.from_pretrained(
        CausalLM.from_pretrained(tmp_path / "base", "float64"), tmp_path / "0", "zero"
    )
    model.load_adapter(tmp_path / "1", "one")
    model.set_adapter(["zero", "one"])
    both = np.asarray(model(np.arange(7)[None]).numpy())
    combine([tmp_path / str(first), tmp_path / str(1 - first)], tmp_path / "out")
    assert (
        np.abs(logits(tmp_path / "base", tmp_path / "out") - both).max()
        <= 1e-6 * np.abs(both).max()
    )


@pytest.mark.parametrize("first", [0, 1])
def test_how_a_base_s_files_lie_is_said_by_whichever_adapter_knows(
    first: int, tmp_path: Path
) -> None:
    folders = [GOLDEN / "gpt2--lora", tmp_path / "wte"]
    fields, tensors = read_adapter(GOLDEN / "gpt2--lora_wte")
    tensors = {key: a for key, a in tensors.items() if "wte" in key}
    write_adapter(
        folders[1], {**fields, "target_modules": ["wte"], "fan_in_fan_out": False}, tensors
    )
    combine([folders[first], folders[1 - first]], tmp_path / "out")
    assert read_adapter(tmp_path / "out")[0]["fan_in_fan_out"]


def tied(folder: Path) -> Path:
    """A base whose head has the embedding's weight, and two adapters that both adapt both as one."""
    model = small.base(dtype="float64", tie_word_embeddings=True)
    model.save_pretrained(folder / "base")
    for seed in (0, 1):
        targets = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
        made = get_peft_model(
            model, LoraConfig(r=2 + seed, init_lora_weights=False, **targets), seed=seed
        )
        made.save_pretrained(folder / f"{seed}")
        made.unload()
    return folder


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_a_head_goes_on_following_its_embedding(how: str, tmp_path: Path) -> None:
    folders = [tied(tmp_path) / "0", tmp_path / "1"]
    combine(folders, tmp_path / "out", [0.5, -1.0], how, r=5 if how == "svd" else None)
    merge(tmp_path / "base", folders, tmp_path / "two", [0.5, -1.0])
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "one")
    expected = logits(tmp_path / "two")
    assert np.abs(logits(tmp_path / "one") - expected).max() < 1e-4 * np.abs(expected).max()
    assert (
        np.abs(logits(tmp_path / "base", tmp_path / "out") - expected).max()
        < 1e-4 * np.abs(expected).max()
    )
    assert read_adapter(tmp_path / "out")[0]["ensure_weight_tying"]


def spoil(folder: Path, how: str) -> dict[str, Any]:
    """Adapters that cannot be combined; options for combine."""
    rng, q = np.random.default_rng(0), "model.layers.0.self_attn.q_proj"
    one = {q: Part(rng.normal(size=(2, 4)), rng.normal(size=(4, 2)), 1)}
    folders = [write(folder / name, one, rng, "LORA", 2) for name in ("a", "b")]
    options: dict[str, Any] = {"adapters": folders, "out": folder / "out"}
    fields, tensors = read_adapter(folders[1])
    bias, head = (
        {f"{PREFIX}{q}.base_layer.bias": np.ones(4)},
        {f"{PREFIX}lm_head.weight": np.ones((7, 4))},
    )
    token = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 4))}
    wide = {f"{PREFIX}{q}.lora_A.weight": np.ones((2, 5), np.float32)}
    change: tuple[dict[str, Any], dict[str, Any]] = {
        "DoRA": ({"use_dora": True}, {f"{PREFIX}{q}.lora_magnitude_vector": np.ones(4)}),
        "head": ({"modules_to_save": ["lm_head"]}, head),
        "two heads": ({"modules_to_save": ["lm_head"]}, head),
        "biases": ({"bias": "lora_only"}, bias),
        "biases of others": ({"bias": "lora_only"}, bias),
        "two tokens": ({"trainable_token_indices": [3]}, token),
        "tokens": ({"trainable_token_indices": [3]}, token),
        "tokens elsewhere": ({"trainable_token_indices": [3]}, token),
        "another shape": ({}, wide),
        "NaN": ({}, {f"{PREFIX}{q}.lora_A.weight": np.full((2, 4), np.nan)}),
        "too large": ({}, {f"{PREFIX}{q}.lora_B.weight": np.full((4, 2), 3e38)}),
    }.get(how, ({}, {}))
    write_adapter(
        folders[1], fields | change[0], tensors | {k: np.float32(a) for k, a in change[1].items()}
    )
    if how.startswith("two"):
        shutil.rmtree(folders[0])
        shutil.copytree(folders[1], folders[0])
    elif how in ("head", "biases", "tokens"):
        options["weights"] = [1.0, 0.5]
    elif how == "too large":
        options["weights"] = [1.0, 100.0]
    elif how == "biases of others":
        other = {"model.layers.1.self_attn.q_proj": one[q]}
        write(folders[0], other, rng, "LORA", 2)
    elif how == "tokens elsewhere":
        there = {
            key.replace("model.embed_tokens", "lm_head"): np.float32(a) for key, a in token.items()
        }
        write_adapter(
            folders[0], {**fields, "trainable_token_indices": {"lm_head": [3]}}, tensors | there
        )
    elif how == "ranks":
        write(
            folders[0],
            {q: Part(rng.normal(size=(3, 4)), rng.normal(size=(4, 3)), 1)},
            rng,
            "LORA",
            2,
        )
        options["how"] = "linear"
    elif how == "Hydra":
        with_route = {f"{PREFIX}{q}.lora_route.weight": np.ones((1, 4), np.float32)}
        write_adapter(
            folders[1], {**fields, "peft_type": "HYDRALORA", "experts": 1}, tensors | with_route
        )
    elif how == "nothing":
        for path in folders:
            write_adapter(path, {"trainable_token_indices": [3], "target_modules": None}, token)
        options["adapters"] = folders[:1]
    elif how == "inside":
        options["out"] = folders[0] / "out"
    elif how == "exists":
        shutil.copytree(folders[0], options["out"])
    else:
        options |= {
            "weights": {"weights": [1.0]},
            "NaN times": {"weights": [1.0, math.nan]},
            "no numbers": {"weights": 2},
            "a long number": {"weights": [1, 10**400]},
            "no adapters": {"adapters": []},
            "no list": {"adapters": "a"},
            "a way": {"how": "ties"},
            "r": {"r": 3},
            "r = 0": {"how": "svd", "r": 0},
        }.get(how, {})
    return options


SPOILT: dict[str, tuple[type[MiniloraError], str]] = {
    "DoRA": (ConfigError, "b'.*what it does to .*q_proj.weight cannot be added"),
    "head": (ConfigError, r"lm_head.weight.*0\.5 times"),
    "two heads": (ConfigError, "lm_head.weight cannot be added"),
    "biases": (ConfigError, r"q_proj.bias.*0\.5 times"),
    "biases of others": (
        ConfigError,
        "biases of its layers, but does not adapt model.layers.1.self_attn.q_proj",
    ),
    "two tokens": (ConfigError, "embed_tokens.weight cannot be added"),
    "tokens": (ConfigError, r"embed_tokens.weight.*0\.5 times"),
    "tokens elsewhere": (ConfigError, "only one adapter can have trainable tokens, .*/a' has some"),
    "another shape": (
        FormatError,
        r"q_proj is another layer than the other adapters': \(4, 4\), \(4, 5\)",
    ),
    "NaN": (NonFiniteError, "q_proj: the sum of its adapters is not finite"),
    "too large": (NonFiniteError, "q_proj: the sum of its adapters is too large for float32"),
    "ranks": (ConfigError, "q_proj: linear adds factors of one rank, and these have 3, 2"),
    "Hydra": (ConfigError, "HydraLoRA"),
    "nothing": (ConfigError, "no layer is adapted"),
    "inside": (ConfigError, "--out .* is inside --adapter"),
    "exists": (ConfigError, "out"),
    "weights": (ConfigError, "--weights: expected 2 finite numbers"),
    "NaN times": (ConfigError, "--weights: expected 2 finite numbers"),
    "no numbers": (ConfigError, "--weights: expected 2 finite numbers.*got 2$"),
    "a long number": (ConfigError, "--weights: expected 2 finite numbers"),
    "no adapters": (ConfigError, r"adapters: expected a list of one or more, got \[\]"),
    "no list": (ConfigError, "adapters: expected a list of one or more, got 'a'"),
    "a way": (ConfigError, "cat, svd, linear; there is no 'ties'"),
    "r": (ConfigError, "a rank is for svd.*cat got 3"),
    "r = 0": (ConfigError, "from 1 to 65536; svd got 0"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_cannot_be_combined_is_named_and_leaves_nothing(how: str, tmp_path: Path) -> None:
    options = spoil(tmp_path, how)
    before = tree(tmp_path)
    kind, says = SPOILT[how]
    with pytest.raises(kind, match=says):
        combine(**options)
    assert tree(tmp_path) == before


def test_adapters_that_name_different_bases_are_told_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = {
        "model.layers.0.self_attn.q_proj": Part(rng.normal(size=(2, 4)), rng.normal(size=(4, 2)), 1)
    }
    folders = [write(tmp_path / name, part, rng, "LORA", 2) for name in ("a", "b", "c")]
    for folder, base in zip(folders, ("one", "two\n", None), strict=True):
        fields, tensors = read_adapter(folder)
        write_adapter(folder, {**fields, "base_model_name_or_path": base}, tensors)
    with pytest.warns(
        UserWarning, match=r"different bases, and a sum is for one model: 'one', 'two\\n'"
    ):
        combine(folders, tmp_path / "out")
    combine(
        [folders[0], folders[2], folders[0]], tmp_path / "quiet"
    )  # a warning would be an error here


@pytest.mark.parametrize("way", COMBINATION_TYPES)
def test_a_sum_too_large_for_its_own_singular_values_is_refused(way: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = {
        "model.layers.0.self_attn.q_proj": Part(
            rng.normal(size=(2, 64)), rng.uniform(size=(64, 2)), 1
        )
    }
    with pytest.raises(
        NonFiniteError, match=r"q_proj: the sum of its adapters is too large for float64"
    ):
        combine([write(tmp_path / "a", part, rng, "LORA", 2)], tmp_path / "out", [1e308], way)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("way", COMBINATION_TYPES)
def test_a_sum_that_cancels_is_nothing(way: str, tmp_path: Path) -> None:
    """And no dW of 1e-17, of which the new adapter then misses most."""
    folders, weights = [GOLDEN / "llama--lora"] * 3, [0.7, -1.0, 0.3]
    rows = combine(folders, tmp_path / "out", weights, way)
    assert all(row["|dW|"] == row["relative"] == 0 for row in rows)
    assert way == "linear" or all(row["error"] < 1e-6 for row in rows)
    rows = combine(folders, tmp_path / "more", [0.7, -1.0, 0.3 + 1e-9], way)
    assert all(0 < row["|dW|"] < 1e-8 for row in rows)  # what does not cancel whole is not lost


def test_an_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "gpt2--lora_wte", tmp_path / "other")
    fields, tensors = read_adapter(tmp_path / "other")
    base = {f"{PREFIX}transformer.wte.base_layer.weight": np.ones((3, 3), np.float32)}
    write_adapter(tmp_path / "one", fields, {**tensors, **base})
    write_adapter(tmp_path / "other", fields, {**tensors, **{k: a + 1 for k, a in base.items()}})
    with pytest.raises(FormatError, match=r"wte\.base_layer\.weight differs from another"):
        combine([tmp_path / "one", tmp_path / "other"], tmp_path / "out")
    DoRA = GOLDEN / "gpt2--dora_proj"
    with pytest.raises(
        ConfigError, match="gpt2--dora_proj': DoRA's scales cannot be added to another adapter"
    ):
        combine([DoRA, GOLDEN / "gpt2--lora"], tmp_path / "out")


# ---- in a model ------------------------------------------------------------------------------------------------------

CONFIGS = {
    "one": LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    "two": LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 7},
    ),
    "ends": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False),
}  # fmt: skip


def several(dtype: str = "float64", device: Any = "cpu", **more: LoraConfig) -> PeftModel:
    model = get_peft_model(
        small.base(dtype, device, tie_word_embeddings=False), CONFIGS["one"], "one"
    )
    for seed, (name, config) in enumerate({**CONFIGS, **more}.items()):
        if name != "one":
            model.add_adapter(name, config, seed)
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["cat", "svd"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sum_of_adapters_is_what_all_of_them_give(way: str, dtype: str) -> None:
    model, weights = several(dtype), {"two": -1.5, "one": 0.5, "ends": 2.0}
    before = small.bits(model)
    rows = model.add_weighted_adapter(
        [*weights], [*weights.values()], "sum", way, svd_rank=8 if way == "svd" else None
    )
    assert {k: v for k, v in small.bits(model).items() if ".sum" not in k} == before
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)
    model.set_adapter("sum")
    got = small.logits(model)
    for layer in model._wrappers().values():
        for name, weight in weights.items():
            if name in layer.held:
                layer.held[name].scaling *= weight
    model.set_adapter(list(weights))
    both = small.logits(model)
    assert np.abs(got - both).max() <= (1e-4 if dtype == "float32" else 1e-12) * np.abs(both).max()
    assert max(row["relative"] for row in rows) < (1e-6 if dtype == "float32" else 1e-14)


@pytest.mark.parametrize("pair", [PAIRS[0], ("llama--lora", "llama--patterns")], ids="+".join)
@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_model_and_files_alone_give_the_same_bits(
    pair: tuple[str, str], way: str, tmp_path: Path
) -> None:
    folders = [GOLDEN / name for name in pair]
    rows = combine(folders, tmp_path / "files", [0.3, -2.0], way)
    model = PeftModel.from_pretrained(CausalLM.from_pretrained(of(pair[0])), folders[0], "one")
    model.load_adapter(folders[1], "two")
    said = model.add_weighted_adapter(["one", "two"], [0.3, -2.0], "sum", way)
    model.save_pretrained(tmp_path / "model", ["sum"])
    (one, ours), (two, theirs) = (
        read_adapter(tmp_path / "files"),
        read_adapter(tmp_path / "model" / "sum"),
    )
    assert {k: a.tobytes() for k, a in ours.items()} == {k: a.tobytes() for k, a in theirs.items()}
    assert sorted(said, key=lambda row: row["layer"]) == rows
    assert {k for k in one if one[k] != two[k]} <= {"base_model_name_or_path", "task_type"}


def test_a_sum_on_another_backend_is_the_same() -> None:
    here, there = several("float32"), several("float32", STRICT)
    for model in (here, there):
        model.add_weighted_adapter(["one", "ends"], [1.0, 0.5], "sum")
    assert small.bits(here) == small.bits(there)


MORE = {
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "ada": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"]),
    "hydra": HydraConfig(r=2, experts=2, target_modules=["q_proj"]),
    "biased": LoraConfig(r=2, bias="all", target_modules=["q_proj"]),
    "saved": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
}


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ((["one", "dora"], [1, 1], "sum"), ConfigError, "'dora' is DoRA's"),
        ((["one", "ada"], [1, 1], "sum"), ConfigError, "'ada' is of ADALORA"),
        ((["hydra", "one"], [1, 1], "sum"), ConfigError, "'hydra' is of HYDRALORA"),
        ((["biased", "one"], [1, 1], "sum"), ConfigError, "'biased' trains biases"),
        ((["saved", "one"], [1, 1], "sum"), ConfigError, "'saved' replaces modules or tokens"),
        ((["one", "nobody"], [1, 1], "sum"), ConfigError, "no adapter 'nobody'"),
        (([], [], "sum"), ConfigError, "a list of one or more"),
        (("one", [1], "sum"), ConfigError, "a list of one or more, got 'one'"),
        ((["one", ["two"]], [1, 1], "sum"), ConfigError, r"no adapter \['two'\]"),
        ((["one", "two"], [1, 1], None), ConfigError, "expected a LoraConfig and a name, got .* and None"),
        ((["one", "two"], 1, "sum"), ConfigError, "weights: expected 2 finite numbers.*got 1$"),
        ((["one", "two"], [1], "sum"), ConfigError, "weights: expected 2 finite numbers"),
        ((["one", "two"], [1, "x"], "sum"), ConfigError, "weights: expected 2 finite numbers"),
        ((["one", "two"], [1, math.inf], "sum"), ConfigError, "weights: expected 2 finite numbers"),
        ((["one", "two"], [1, 1], "two"), ConfigError, "there is an adapter 'two' already"),
        ((["one", "two"], [1, 1], "one.two"), ConfigError, "cannot name an adapter"),
        ((["one", "two"], [1, 1], "sum", "ties"), ConfigError, "there is no 'ties'"),
        ((["one", "two"], [1, 1], "sum", "cat", 4), ConfigError, "a rank is for svd"),
        ((["one", "two"], [1, 1], "sum", "svd", 0), ConfigError, "svd got 0"),
        ((["one", "two"], [1, 1], "sum", "linear"), ConfigError, "linear adds factors of one rank"),
        ((["one", "two"], [1e300, 1e300], "sum"), NonFiniteError, "q_proj: the sum of its adapters is too large"),
    ],
)  # fmt: skip
def test_what_is_no_sum_of_factors_is_refused_and_nothing_changes(
    arguments: tuple[Any, ...], kind: type[MiniloraError], says: str
) -> None:
    model = several("float32", **MORE)
    before, modules = small.bits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(kind, match=says):
        model.add_weighted_adapter(*arguments)
    assert small.bits(model) == before
    assert [name for name, _ in model.named_modules()] == modules
    assert "sum" not in model.peft_config


def test_an_embedding_that_a_head_follows_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(small.base(tie_word_embeddings=True), config)
    with pytest.raises(ConfigError, match="the head that is tied"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# ---- one layer -------------------------------------------------------------------------------------------------------


def test_no_matrix_as_large_as_dW_is_formed() -> None:
    """60,000 x 60,000 would be 29 GB."""
    parts = [
        Part(np.ones((2, 60_000)), np.ones((60_000, 2)), 1.0),
        Part(np.eye(1, 60_000), np.eye(60_000, 1), -1.0),
    ]
    for way in ("cat", "svd"):
        row = combine_layer("q", parts, way, 3)[2]
        assert row["|dW|"] == pytest.approx(math.sqrt(60_000**2 * 4 - 2 * 2 + 1), rel=1e-12)
        assert row["relative"] < 1e-6


@pytest.mark.parametrize("way", COMBINATION_TYPES)
@pytest.mark.parametrize("x", [1e160, 1e200, 1e308])
def test_a_sum_beyond_float64_is_refused_before_it_is_decomposed(way: str, x: float) -> None:
    """Its factors are finite. Of the infinite core between them LAPACK's decomposition may never end."""
    parts = [Part(np.full((2, 5), x), np.full((4, 2), sign * x), 1.0) for sign in (1, -1)]
    with pytest.raises(NonFiniteError, match="q: the sum of its adapters is too large for float64"):
        combine_layer("q", parts, way, 4, np.float64)


def test_an_empty_rank_adds_nothing() -> None:
    """AdaLoRA may have cut all of a layer's triplets."""
    for way in COMBINATION_TYPES:
        A, B, row = combine_layer("q", [Part(np.zeros((0, 3)), np.zeros((2, 0)), 1.0)], way, 1)
        assert (A.shape, B.shape, row["|dW|"], row["error"]) == ((1, 3), (2, 1), 0.0, 0.0)
