"""resize, extract and combine by energy, error and budget: ranks, files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from tool_files import ADAPTERS, GOLDEN, PREFIX, base_of, deltas, logits, tree, write_base

from minilora.errors import ConfigError
from minilora.formats import read_adapter
from minilora.lora import LoraConfig, get_peft_model
from minilora.tools.combining import combine
from minilora.tools.factoring import extract, resize, rounding_noise
from minilora.tools.merging import merge

Tool = Callable[..., list[dict[str, Any]]]


def ranks_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {row["layer"]: int(row["r"].rpartition(" ")[2]) for row in rows}


def numbers_of(folder: Path) -> int:
    """The numbers in the factors of an adapter's file."""
    return sum(array.size for key, array in read_adapter(folder)[1].items() if ".lora_" in key)


def assert_file_has(folder: Path, ranks: dict[str, int]) -> None:
    """The file has these ranks, with s = 1, and no layer of rank 0."""
    fields, tensors = read_adapter(folder)
    present = {path: k for path, k in ranks.items() if k}
    shapes = {len(array) for key, array in tensors.items() if ".lora_A" in key}
    assert shapes <= set(present.values())
    assert set(deltas(folder)) == set(present)
    if len(set(present.values())) > 1:
        assert fields["rank_pattern"] == fields["alpha_pattern"] == present
    else:
        assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert fields["r"] == fields["lora_alpha"] == max(present.values())
    assert not fields["use_rslora"]


PLAIN = ["llama--lora", "llama--patterns", "llama--adalora", "llama--rslora_all", "gpt2--lora"]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rule", [{"energy": 0.6}, {"error": 0.3}, {"error": 0.05}])
def test_resize_by_energy_or_error_gives_the_smallest_rank(
    name: str, rule: dict[str, float], tmp_path: Path
) -> None:
    rows = resize(GOLDEN / name, None, tmp_path / "out", **rule)  # type: ignore[arg-type]
    allowed = rule.get("error") or np.sqrt(1 - rule["energy"])
    before, after = deltas(GOLDEN / name), deltas(tmp_path / "out")
    ranks = ranks_of(rows)
    assert_file_has(tmp_path / "out", ranks)
    for path, dW in before.items():
        values = np.linalg.svd(dW, compute_uv=False)
        k = ranks[path]
        size = np.linalg.norm(dW)
        assert np.linalg.norm(values[k:]) <= allowed * size < np.linalg.norm(values[k - 1 :])
        assert np.linalg.norm(after[path] - dW) <= allowed * size * (1 + 1e-5) + 1e-6 * size
    # The model is what the ranks' own nearest matrices make of it.
    assert np.isfinite(logits(base_of(name), tmp_path / "out")).all()


def test_resize_by_a_budget_spends_at_most_that_and_drops_layers(tmp_path: Path) -> None:
    name = "llama--rslora_all"
    whole = numbers_of(GOLDEN / name)
    errors = []
    for share in (0.05, 0.3, 0.7, 1.0):
        out = tmp_path / str(share)
        budget = int(share * whole)
        rows = resize(GOLDEN / name, None, out, budget=budget)
        ranks = ranks_of(rows)
        assert set(ranks) == set(deltas(GOLDEN / name))
        assert_file_has(out, ranks)
        assert numbers_of(out) <= budget
        errors.append(sum(row["error"] ** 2 for row in rows))
    assert errors == sorted(errors, reverse=True)
    assert 0 in ranks_of(resize(GOLDEN / name, None, tmp_path / "few", budget=whole // 20)).values()
    fields, _ = read_adapter(tmp_path / "few")
    assert sorted(deltas(tmp_path / "few")) == fields["target_modules"]


def test_resize_keeps_rank_1_where_more_than_factors_would_be_lost(tmp_path: Path) -> None:
    """DoRA's m, trained biases, and the weight of a targeted embedding."""
    for name in ("llama--dora", "qwen2--lora_bias_only"):
        before = read_adapter(GOLDEN / name)[1]
        rows = resize(GOLDEN / name, None, tmp_path / name, error=0.999)
        assert set(ranks_of(rows).values()) == {1}
        after = read_adapter(tmp_path / name)[1]
        for key, array in before.items():
            if ".lora_A" not in key and ".lora_B" not in key:
                assert np.array_equal(after[key], array)
        rows = combine([GOLDEN / name], tmp_path / f"{name}-sum", how="svd", error=0.999)
        assert set(ranks_of(rows).values()) == {1}
        assert set(read_adapter(tmp_path / f"{name}-sum")[1]) == set(before)
        with pytest.raises(ConfigError, match=r"--budget 10 is too small: .* cannot have rank 0"):
            resize(GOLDEN / name, None, tmp_path / "none", budget=10)
        with pytest.raises(ConfigError, match=r"--budget 10 is too small: .* cannot have rank 0"):
            combine([GOLDEN / name], tmp_path / "none", how="svd", budget=10)


@pytest.mark.parametrize("tool", ["resize", "combine"])
def test_rank_rules_give_a_tied_head_the_rank_of_its_embedding(tool: str, tmp_path: Path) -> None:
    base = small.base(dtype="float64", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    fields = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    folders = []
    for seed in (0, 1):
        config = LoraConfig(r=4, init_lora_weights=False, **fields)
        model = get_peft_model(base, config, seed=seed)
        folders.append(tmp_path / str(seed))
        model.save_pretrained(folders[-1])
        model.unload()
    out = tmp_path / "out"
    if tool == "resize":
        rows = resize(folders[0], None, out, error=0.3)
    else:
        rows = combine(folders, out, how="svd", error=0.3)
    ranks = ranks_of(rows)
    assert ranks["lm_head"] == ranks["model.embed_tokens"] < 8
    tensors = read_adapter(out)[1]
    A = tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"]
    assert np.array_equal(tensors[f"{PREFIX}lm_head.lora_B.weight"], A.T)
    assert np.isfinite(logits(tmp_path / "base", out)).all()


@pytest.mark.parametrize("name", ["llama--lora", "gpt2--lora"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_extract_by_energy_leaves_rounding_out(
    name: str, dtype: str | None, tmp_path: Path
) -> None:
    """In bfloat16 the difference has full rank by rounding alone; the adapter's rank is chosen."""
    base = base_of(name)
    if dtype is not None:
        merge(base, [GOLDEN / name], tmp_path / "base", [0.0], dtype=dtype)
        base = tmp_path / "base"
    merge(base, [GOLDEN / name], tmp_path / "tuned", [8.0])
    rows = extract(base, tmp_path / "tuned", None, tmp_path / "out", energy=1.0)
    true = deltas(GOLDEN / name)
    assert_file_has(tmp_path / "out", ranks_of(rows))
    for path, k in ranks_of(rows).items():
        assert 1 <= k <= np.linalg.matrix_rank(true[path])
        extracted = deltas(tmp_path / "out")[path]
        assert np.linalg.norm(extracted - 8 * true[path]) < 0.05 * np.linalg.norm(8 * true[path])


def test_rounding_noise_is_the_size_of_what_rounding_adds() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float16, np.float32):
        for shape in ((300, 200), (40, 500)):
            W = rng.standard_normal(shape)
            rounded = W.astype(dtype)
            level = rounding_noise(rounded)
            actual = np.linalg.norm(rounded.astype(float) - W, 2)
            assert 0.8 * level < actual < 1.2 * level


def test_extract_by_a_budget_takes_the_layers_that_changed_most(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    weights = {name: rng.standard_normal((10, 6)) for name in names}
    base = write_base(tmp_path / "base", weights)
    tuned = dict(weights)
    for i, size in enumerate((3.0, 1.0, 2.0)):
        tuned[names[i]] = weights[names[i]] + size * np.outer(np.ones(10), np.ones(6))
    other = write_base(tmp_path / "tuned", tuned)
    rows = extract(base, other, None, tmp_path / "out", budget=33)
    assert [row["r"] for row in rows] == ["1", "0", "1"]
    assert rows[1]["relative"] == 1
    fields, tensors = read_adapter(tmp_path / "out")
    assert fields["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    assert not any("layers.1." in key for key in tensors)
    rows = extract(base, other, None, tmp_path / "more", budget=50)
    assert [row["r"] for row in rows] == ["1", "1", "1"]


@pytest.mark.parametrize("how", ["svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("rule", [{"energy": 0.5}, {"budget": 90}])
def test_combine_by_a_rule_has_ranks_of_its_own(
    how: str, rule: dict[str, Any], tmp_path: Path
) -> None:
    folders = [GOLDEN / "llama--lora", GOLDEN / "llama--patterns"]
    options = {} if how == "svd" else {"density": 0.5}
    rows = combine(folders, tmp_path / "out", [1.0, -0.5], how, **options, **rule)
    ranks = ranks_of(rows)
    assert_file_has(tmp_path / "out", ranks)
    if "budget" in rule:
        assert numbers_of(tmp_path / "out") <= 90
        assert 0 in ranks.values()
    for row in rows:
        if "energy" in rule:
            assert row["relative"] ** 2 <= 0.5 + 1e-6
    whole = combine(folders, tmp_path / "whole", [1.0, -0.5], how, 32, **options)
    for row, full in zip(rows, whole, strict=True):
        assert row["|dW|"] == pytest.approx(full["|dW|"], rel=1e-9)
        assert full["error"] < 1e-6 * full["|dW|"]
        values = np.linalg.svd(deltas(tmp_path / "whole")[row["layer"]], compute_uv=False)
        missed = np.linalg.norm(values[ranks[row["layer"]] :])
        assert row["error"] == pytest.approx(missed, rel=1e-4, abs=1e-6)


PRUNED_ROW = {"layer", "r", "|dW|", "error", "relative", "kept", "conflict", "cosine"}


def test_combine_by_a_pruned_sum_reports_each_layer(tmp_path: Path) -> None:
    folders = [GOLDEN / "llama--lora", GOLDEN / "llama--rslora_all"]
    options = {"how": "ties", "density": 0.25, "majority_sign_method": "frequency"}
    rows = combine(folders, tmp_path / "out", **options)  # type: ignore[arg-type]
    counts = set()
    for row in rows:
        assert set(row) == PRUNED_ROW
        counts.add(len(row["kept"]))
        assert all(0.25 < share < 1 for share in row["kept"])
        assert 0 <= row["conflict"] < 1
        assert 0 < row["cosine"] <= 1
    assert counts == {1, 2}  # some layers are in one adapter alone


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"how": "cat", "energy": 0.9}, "--energy 0.9 chooses ranks of svd, ties, .* not of cat"),
    ({"how": "linear", "budget": 9}, "--budget 9 chooses ranks of svd"),
    ({"how": "svd", "r": 4, "error": 0.1}, "one of --r, .* got --r and --error"),
    ({"how": "ties"}, "ties needs density"),
    ({"how": "ties", "density": 1.5}, r"density must be a number in \(0, 1\]"),
    ({"how": "svd", "density": 0.5}, "density is for ties"),
    ({"how": "ties", "density": 0.5, "weights": [1.0, float("nan")]}, "2 finite numbers"),
    ({"how": "svd", "energy": 0.0}, r"--energy must be a number in \(0, 1\]"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_combine_refuses_options_that_do_not_go_together(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folders = [GOLDEN / "llama--lora", GOLDEN / "llama--patterns"]
    with pytest.raises(ConfigError, match=message):
        combine(folders, tmp_path / "out", **options)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_combine_refuses_to_prune_a_single_adapter(how: str, tmp_path: Path) -> None:
    message = f"{how} adds up two or more adapters, got 1: use cat, svd, linear for a single one"
    with pytest.raises(ConfigError, match=message):
        combine([GOLDEN / "llama--lora"], tmp_path / "out", how=how, density=0.5)


def test_combine_refuses_to_leave_nothing(tmp_path: Path) -> None:
    folders = [GOLDEN / "llama--lora"] * 2
    with pytest.raises(ConfigError, match=r"--energy 0\.9 leaves no layer with a rank above 0"):
        combine(folders, tmp_path / "out", [1.0, -1.0], "svd", energy=0.9)
    with pytest.raises(ConfigError, match="--budget 1 leaves no layer"):
        combine(folders, tmp_path / "out", how="svd", budget=1)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ADAPTERS)
def test_resize_by_energy_1_keeps_the_model_of_every_adapter(name: str, tmp_path: Path) -> None:
    resize(GOLDEN / name, None, tmp_path / "out", energy=1.0)
    before = logits(base_of(name), GOLDEN / name)
    assert np.abs(logits(base_of(name), tmp_path / "out") - before).max() < 2e-6
