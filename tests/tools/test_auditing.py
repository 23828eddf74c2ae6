"""audit: every wrong merge is recognised, a right one never refuted, and files that do not belong
together are refused."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import merges
import mlx_golden
import numpy as np
import pytest
import small
from merges import ARITHMETICS, KINDS, Adapter
from tool_files import (
    ADAPTERS,
    GOLDEN,
    PREFIX,
    WEIGHTS,
    base_of,
    lora_tensors,
    read_weights,
    write_base,
)

from minilora import CausalLM, LoraConfig, PeftModel, dequantize, get_peft_model, quantize
from minilora.cli import main
from minilora.errors import ConfigError, FormatError
from minilora.formats import load_file, read_json, save_file, write_adapter, write_json
from minilora.formats.dtypes import DTYPES
from minilora.lora.maps import LoHaConfig
from minilora.lora.multitask import FILE as MULTITASK
from minilora.tools import hypotheses
from minilora.tools.auditing import audit
from minilora.tools.converting import convert
from minilora.tools.merging import merge

SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.mlp.down_proj": (64, 128),
    "model.layers.1.self_attn.q_proj": (64, 64),
}
OTHERS = {"model.layers.0.self_attn.k_proj": (64, 64), "model.embed_tokens": (48, 64)}
OTHERS["lm_head"] = (48, 64)
R, ALPHA = 8, 32.0  # so that every scaling is another number


def make_base(folder: Path, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a base; its weights as they are stored, by path."""
    rng = np.random.default_rng(seed)
    code = DTYPES[dtype]
    shapes = {**SHAPES, **OTHERS, "model.norm": (64,)}
    weights = {path: 0.02 * rng.standard_normal(shape) for path, shape in shapes.items()}
    write_base(folder, {f"{path}.weight": W for path, W in weights.items()}, dtype=dtype)
    return {path: merges.rounded(W, code) for path, W in weights.items()}


def make_adapter(
    folder: Path, weights: dict[str, np.ndarray], relative: float, **fields: Any
) -> dict[str, Adapter]:
    """Write an adapter with |dW| = `relative` |W|; its factors by path."""
    rng = np.random.default_rng(1)
    adapters = {}
    tensors = {}
    for path in SHAPES:
        W = weights[path].astype(float)
        A = rng.standard_normal((R, W.shape[1])).astype(np.float32)
        B = rng.standard_normal((W.shape[0], R))
        B *= relative * np.linalg.norm(W) / np.linalg.norm(ALPHA / R * B @ A)
        adapters[path] = Adapter(A, np.float32(B), ALPHA)
        tensors |= lora_tensors(path, A, B)
    targets = ["q_proj", "down_proj"]
    fields = {"r": R, "lora_alpha": ALPHA, "target_modules": targets, **fields}
    write_adapter(folder, fields, tensors)
    return adapters


class Case:
    """A base, an adapter, and checkpoints merged from them by `merges`."""

    def __init__(self, folder: Path, dtype: str = "float32", relative: float = 1e-2) -> None:
        self.folder, self.dtype = folder, dtype
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.weights = make_base(self.base, dtype)
        self.adapters = make_adapter(self.adapter, self.weights, relative)
        self.count = 0

    def merged(self, kinds: dict[str, str], arithmetic: str = "float64") -> dict[str, np.ndarray]:
        """All weights, those of `kinds` merged so."""
        code = DTYPES[self.dtype]
        weights = dict(self.weights)
        for path, kind in kinds.items():
            weights[path] = merges.merge_as(
                kind, weights[path], self.adapters[path], code, arithmetic
            )
        return weights

    def write(self, weights: dict[str, np.ndarray], shards: int = 1, prefix: str = "") -> Path:
        self.count += 1
        folder = self.folder / f"merged-{self.count}"
        named = {f"{prefix}{path}.weight": W for path, W in weights.items()}
        return write_base(folder, named, shards, self.dtype)

    def audit(self, folder: Path, **options: Any) -> dict[str, Any]:
        return audit(self.base, self.adapter, folder, threads=1, **options)

    def verdict(self, kind: str, arithmetic: str = "float64") -> dict[str, Any]:
        """The report on a merge that is `kind` in every layer where it can be."""
        kinds = dict.fromkeys(SHAPES, kind)
        if kind == "transposed":
            kinds["model.layers.0.mlp.down_proj"] = "right"
        return self.audit(self.write(self.merged(kinds, arithmetic)))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("audit"))


# ---- every wrong merge is recognised ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative", [1e-3, 1e-2])
def test_audit_recognises_every_kind_of_merge(dtype: str, relative: float, tmp_path: Path) -> None:
    case = Case(tmp_path, dtype, relative)
    for kind in KINDS:
        report = case.verdict(kind)
        names = report["hypotheses"]
        assert kind in names
        assert report["right"] is (kind == "right")
        sizes = [row["|dW|/|W|"] for row in report["tensors"] if row["|dW|/|W|"] is not None]
        assert sizes == pytest.approx([relative] * len(SHAPES), rel=1e-3)
        if "requantized to NF4" not in kind or dtype == "float32":
            # 64 absmax are hardly changed by double quantization.
            assert {name.replace("double-quantized ", "") for name in names} == {kind}
        # In 16 bits, a small dW changes few codes of these few numbers, or none.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_audit_names_the_arithmetic_or_a_tighter_one(
    dtype: str, arithmetic: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, dtype)
    report = case.verdict("right", arithmetic)
    assert report["verdict"] == "right"
    level = hypotheses.ARITHMETICS.index(report["arithmetic"])
    assert level <= ARITHMETICS.index(arithmetic)
    coarse = arithmetic in ("product", "factors") and dtype != "float32"
    assert level >= (2 if coarse else 0)


def test_audit_never_refutes_the_truth_in_random_merges() -> None:
    """1,000 of these are in benchmarks/audit.py."""
    for seed in range(30):
        drawn = merges.draw(seed)
        explanation = merges.explain_drawn(drawn)
        assert drawn.kind in explanation.survivors(), seed
        alike = [explanation.hypotheses[name] for name in explanation.survivors()]
        if drawn.scale >= 0.01 and drawn.relative > 1e-3:  # what is told apart by numbers
            factors = {h.change.c * (1 + h.change.again) for h in alike if not h.requantized}
            assert max(factors, default=0) - min(factors, default=0) < 1e-9, seed


@pytest.mark.parametrize("dtype", merges.DTYPES)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_explain_never_refutes_dora_in_a_listed_arithmetic(dtype: str, arithmetic: str) -> None:
    rng = np.random.default_rng(3)
    for r, relative in ((1, 1e-3), (4, 1e-2), (8, 0.3)):
        W = merges.rounded(0.02 * rng.standard_normal((64, 96)), dtype)
        A = rng.standard_normal((r, 96)).astype(np.float32)
        B = rng.standard_normal((64, r))
        B *= relative * np.linalg.norm(W.astype(float)) / np.linalg.norm(3 * B @ A)
        adapter = Adapter(A, np.float32(B), 3.0 * r)
        lengths = np.linalg.norm(W.astype(float) + 3 * B @ A, axis=1)
        m = np.float32(lengths * rng.uniform(0.9, 1.1, 64))
        M = merges.add_dora(W, adapter, m, dtype, arithmetic)
        explanation = merges.explain_merge(W, M, adapter, dtype, m.astype(float))
        assert explanation.levels["right"] <= ARITHMETICS.index(arithmetic)
        assert "right" in explanation.survivors()


@pytest.mark.parametrize("seed", range(3))
def test_explain_does_not_prefer_a_second_merge_for_its_wider_bound(seed: int) -> None:
    """DoRA in 16 bits, dW far below the distance of two numbers: a right merge is not "twice"."""
    rng = np.random.default_rng(seed)
    W = (1e-4 * rng.standard_normal((64, 64))).astype(np.float32)
    A = rng.standard_normal((16, 64)).astype(np.float32)
    B = rng.standard_normal((64, 16))
    B = np.float32(B * 1e-4 * np.linalg.norm(W) / np.linalg.norm(0.25 * B @ A))
    adapter = Adapter(A, B, 1.0, True)
    m = np.float32(np.linalg.norm(W, axis=1) * (1 + 0.05 * rng.standard_normal(64)))
    M = merges.add_dora(W, adapter, m, "F16", "factors")
    explanation = merges.explain_merge(merges.rounded(W, "F16"), M, adapter, "F16", m)
    assert "right" in explanation.survivors()


def test_explain_names_both_where_twice_s_is_another_scaling() -> None:
    """r = 4 and alpha / sqrt(r): twice s is alpha, and the bound of twice is the wider one."""
    names = {"twice", "alpha not divided by r"}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        W = merges.rounded(0.02 * rng.standard_normal((64, 64)), "BF16")
        A = rng.standard_normal((4, 64)).astype(np.float32)
        B = np.float32(1e-5 * rng.standard_normal((64, 4)))
        adapter = Adapter(A, B, 8.0, rslora=True)
        for kind in names:
            M = merges.merge_as(kind, W, adapter, "BF16", "factors")
            assert kind in merges.explain_merge(W, M, adapter, "BF16").survivors()


def test_explain_names_all_changes_that_leave_every_number_alone() -> None:
    """A dW below half a step is lost in rounding, whatever its factor was."""
    rng = np.random.default_rng(0)
    W = merges.rounded(rng.uniform(1, 2, (64, 64)), "BF16")
    A, B = np.full((2, 64), 1e-3, np.float32), np.full((64, 2), 1e-3, np.float32)
    adapter = Adapter(A, B, 8.0)
    names = set(merges.explain_merge(W, W, adapter, "BF16").survivors())
    assert {"right", "not merged", "subtracted", "twice"} <= names


def test_audit_names_all_that_cannot_be_told_apart(tmp_path: Path) -> None:
    case = Case(tmp_path)
    fields = read_json(case.adapter / "adapter_config.json")
    write_json(case.adapter / "adapter_config.json", {**fields, "lora_alpha": R})
    merge(case.base, [case.adapter], tmp_path / "merged")
    report = case.audit(tmp_path / "merged")
    assert report["verdict"] == "right or alpha ignored"
    assert report["right"]


def test_audit_names_a_merge_that_was_made_in_part(case: Case) -> None:
    first, *_ = SHAPES
    for kind, verdict in (("right", "partly merged"), ("twice", "partly merged (twice)")):
        report = case.audit(case.write(case.merged({first: kind})))
        assert (report["verdict"], report["right"]) == (verdict, False)
    kinds = dict(zip(SHAPES, ("right", "twice", "subtracted"), strict=True))
    assert case.audit(case.write(case.merged(kinds)))["verdict"] == "several faults"


def test_audit_tells_another_scaling(case: Case) -> None:
    weights = dict(case.weights)
    for path, adapter in case.adapters.items():
        weights[path] = merges.add(weights[path], adapter.A, adapter.B, 2.75, "F32", "float32")
    report = case.audit(case.write(weights))
    assert report["verdict"] == "other scaling"
    assert [row["c"] for row in report["tensors"]] == pytest.approx([2.75] * 3, rel=1e-4)


def test_audit_tells_another_adapter_from_another_base(case: Case, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    weights = case.merged(dict.fromkeys(SHAPES, "right"))
    for path, adapter in case.adapters.items():
        other = adapter._replace(A=rng.standard_normal(adapter.A.shape).astype(np.float32))
        weights[path] = merges.merge_as("right", case.weights[path], other, "F32", "float64")
    assert case.audit(case.write(weights))["verdict"] == "other adapter"
    right = case.merged(dict.fromkeys(SHAPES, "right"))
    for path in OTHERS:
        changed = right[path].copy()
        changed[-1, -1] = np.nextafter(changed[-1, -1], 1, dtype=np.float32)
        report = case.audit(case.write({**right, path: changed}))
        assert report["verdict"] == "other base"
        verdicts = {row["tensor"]: row["verdict"] for row in report["tensors"]}
        assert verdicts[f"{path}.weight"] == "not the base's"
    make_base(tmp_path / "base", "float32", seed=9)
    merge(tmp_path / "base", [case.adapter], tmp_path / "merged")
    assert case.audit(tmp_path / "merged")["verdict"] == "other base"


def test_audit_finds_one_wrong_number(case: Case) -> None:
    for path in SHAPES:
        weights = case.merged(dict.fromkeys(SHAPES, "right"))
        weights[path][-1, 3] *= 1 + 2.0**-17
        report = case.audit(case.write(weights))
        assert report["verdict"] == "other adapter"
        assert not report["right"]


def test_audit_names_patterns_that_were_ignored(tmp_path: Path) -> None:
    case = Case(tmp_path)
    fields = read_json(case.adapter / "adapter_config.json")
    config = case.adapter / "adapter_config.json"
    write_json(config, {**fields, "alpha_pattern": {"down_proj": 3.0}})
    assert case.verdict("right")["verdict"] == "patterns ignored"


@pytest.mark.parametrize("rslora", [True, False])
def test_audit_takes_the_root_from_the_configuration(rslora: bool, tmp_path: Path) -> None:
    case = Case(tmp_path)
    config = case.adapter / "adapter_config.json"
    write_json(config, {**read_json(config), "use_rslora": rslora})
    verdict = case.verdict("right")["verdict"]
    assert verdict == ("other root of r" if rslora else "right")


# ---- what merge and models write ----


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_audit_of_a_golden_adapter_merged_by_minilora_is_right(
    name: str, dtype: str | None, tmp_path: Path
) -> None:
    merge(base_of(name), [GOLDEN / name], tmp_path / "merged", dtype=dtype, tied="untie")
    report = audit(base_of(name), GOLDEN / name, tmp_path / "merged", threads=2)
    assert report["right"], report
    assert report["arithmetic"] == hypotheses.ARITHMETICS[0]


@pytest.mark.parametrize("name", [name for name in ADAPTERS if "dora" in name])
def test_audit_of_dora_sees_a_missing_magnitude_and_a_second_merge(
    name: str, tmp_path: Path
) -> None:
    base = base_of(name)
    plain = shutil.copytree(GOLDEN / name, tmp_path / "plain")
    config = read_json(plain / "adapter_config.json")
    write_json(plain / "adapter_config.json", {**config, "use_dora": False})
    tensors = load_file(plain / "adapter_model.safetensors")
    kept = {key: array for key, array in tensors.items() if "magnitude" not in key}
    save_file(plain / "adapter_model.safetensors", kept)
    merge(base, [plain], tmp_path / "merged")
    report = audit(base, GOLDEN / name, tmp_path / "merged", threads=1)
    assert report["verdict"] == "DoRA without magnitude"
    merge(base, [GOLDEN / name], tmp_path / "once")
    merge(tmp_path / "once", [GOLDEN / name], tmp_path / "again")
    report = audit(base, GOLDEN / name, tmp_path / "again", threads=1)
    assert report["verdict"] == "twice"
    assert audit(base, GOLDEN / name, base, threads=1)["verdict"] == "not merged"


def test_audit_sees_a_tied_head_that_changed(tmp_path: Path) -> None:
    name = "gpt2--lora_wte"
    merge(GOLDEN / "gpt2", [GOLDEN / name], tmp_path / "shared", tied="share")
    report = audit(GOLDEN / "gpt2", GOLDEN / name, tmp_path / "shared", threads=1)
    assert report["verdict"] == "tied head changed"
    verdicts = {row["tensor"]: row["verdict"] for row in report["tensors"]}
    assert verdicts["transformer.wte.weight"] == "right"
    assert verdicts["lm_head.weight"] == "tied head changed"


def test_audit_sees_a_tied_weight_that_was_merged_twice(tmp_path: Path) -> None:
    base, adapter = GOLDEN / "gpt2", GOLDEN / "gpt2--lora_wte"
    merge(base, [adapter], tmp_path / "once", tied="share")
    merge(tmp_path / "once", [adapter], tmp_path / "again", tied="share")
    assert "twice" in audit(base, adapter, tmp_path / "again", threads=1)["hypotheses"]


def test_audit_refuses_a_folder_of_several_tasks(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.adapter, tmp_path / "adapter")
    write_json(folder / MULTITASK, {"tasks": {"a": ["default"]}})
    with pytest.raises(ConfigError, match="an adapter for each of several tasks"):
        audit(case.base, folder, case.base)


def test_audit_takes_a_head_that_is_stored_beside_its_embedding(tmp_path: Path) -> None:
    name = "llama_tied_llama3rope--lora"
    merge(base_of(name), [GOLDEN / name], tmp_path / "merged")
    weights = read_weights(tmp_path / "merged")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    save_file(tmp_path / "merged" / WEIGHTS, weights)
    assert audit(base_of(name), GOLDEN / name, tmp_path / "merged", threads=1)["right"]
    weights["lm_head.weight"] = weights["lm_head.weight"] + np.float32(1)
    save_file(tmp_path / "merged" / WEIGHTS, weights)
    report = audit(base_of(name), GOLDEN / name, tmp_path / "merged", threads=1)
    assert report["verdict"] == "other base"


def test_audit_sees_a_saved_module_that_was_left_out(tmp_path: Path) -> None:
    name = "llama--save_head"
    merge(GOLDEN / "llama", [GOLDEN / name], tmp_path / "merged")
    weights = read_weights(tmp_path / "merged")
    weights["lm_head.weight"] = read_weights(GOLDEN / "llama")["lm_head.weight"]
    save_file(tmp_path / "merged" / WEIGHTS, weights)
    report = audit(GOLDEN / "llama", GOLDEN / name, tmp_path / "merged", threads=1)
    assert report["verdict"] == "partly merged"


def test_audit_takes_rows_of_trained_tokens(tmp_path: Path) -> None:
    base = GOLDEN / "llama"
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    model = get_peft_model(CausalLM.from_pretrained(base), config)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + rng.standard_normal(p.shape).astype(np.float32)
    model.save_pretrained(tmp_path / "adapter")
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert audit(base, tmp_path / "adapter", tmp_path / "merged", threads=1)["right"]
    weights = read_weights(tmp_path / "merged")
    name = "model.embed_tokens.weight"
    weights[name] = read_weights(base)[name]
    save_file(tmp_path / "merged" / WEIGHTS, weights)
    report = audit(base, tmp_path / "adapter", tmp_path / "merged", threads=1)
    assert report["verdict"] == "partly merged"
    weights[name][2] += 1
    save_file(tmp_path / "merged" / WEIGHTS, weights)
    report = audit(base, tmp_path / "adapter", tmp_path / "merged", threads=1)
    assert report["verdict"] == "other adapter"


@pytest.mark.parametrize("onto", [None, "nf4"])
def test_audit_of_an_adapter_that_only_replaces_tensors(onto: str | None, tmp_path: Path) -> None:
    base = GOLDEN / "llama"
    name = "model.embed_tokens.weight"
    rows = np.ones((2, read_weights(base)[name].shape[1]), np.float32)
    fields = {"target_modules": None, "trainable_token_indices": [1, 5], "r": 2}
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    write_adapter(tmp_path / "adapter", fields, {key: rows})
    merge(base, [tmp_path / "adapter"], tmp_path / "merged", onto=onto)
    assert audit(base, tmp_path / "adapter", tmp_path / "merged", onto, threads=1)["right"]
    report = audit(base, tmp_path / "adapter", base, threads=1)
    assert (report["verdict"], report["right"]) == ("not merged", False)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_audit_takes_other_shards_and_beginnings_of_keys(
    shards: int, prefix: str, case: Case
) -> None:
    weights = case.merged(dict.fromkeys(SHAPES, "right"), "float32")
    report = case.audit(case.write(weights, shards, prefix))
    assert report["verdict"] == "right"
    assert bool(report["notes"]) == bool(prefix)


def test_audit_takes_a_merge_in_another_dtype(case: Case) -> None:
    weights = case.merged(dict.fromkeys(SHAPES, "right"))
    case.dtype = "bfloat16"
    try:
        written = case.write(weights)
    finally:
        case.dtype = "float32"
    assert case.audit(written)["verdict"] == "right"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bfloat16") for name in mlx_golden.FUSED), ("lora", "float32"), ("head", "float32")],
)
def test_audit_of_what_mlx_lm_fused_is_right(name: str, dtype: str, tmp_path: Path) -> None:
    """mlx-lm had the base in bfloat16. That in `dtype` may be the one that was rounded to it."""
    base = GOLDEN / mlx_golden.CASES[name][0]
    if dtype == "bfloat16":
        convert(base, tmp_path / "base", dtype=dtype)
    convert(mlx_golden.FOLDER / name, tmp_path / "adapter", to="peft")
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copy(base / "config.json", merged)
    shutil.copy(mlx_golden.FOLDER / name / "fused.safetensors", merged / WEIGHTS)
    given = base if dtype == "float32" else tmp_path / "base"
    report = audit(given, tmp_path / "adapter", merged, threads=1)
    assert report["right"], report
    assert report["arithmetic"] == "product rounded before the sum"


# ---- merge --onto ----


@pytest.mark.parametrize("onto", ["nf4", "nf4,double"])
@pytest.mark.parametrize("name", ["llama--lora", "llama--dora", "gpt2--lora", "llama--save_head"])
def test_merge_onto_nf4_has_the_bits_of_merging_in_a_quantized_model(
    name: str, onto: str, tmp_path: Path
) -> None:
    base = base_of(name)
    rows = merge(base, [GOLDEN / name], tmp_path / "tool", onto=onto)
    model = quantize(CausalLM.from_pretrained(base), "nf4", double_quant=onto != "nf4")
    saved = PeftModel.from_pretrained(model, GOLDEN / name).merge_and_unload()
    plain = dequantize(saved) if name != "llama--dora" else saved
    plain.save_pretrained(tmp_path / "model")
    tool, theirs = read_weights(tmp_path / "tool"), read_weights(tmp_path / "model")
    assert all(np.array_equal(tool[key], theirs[key]) for key in theirs)
    assert all(0.01 < row["|V-W|/|dW|"] < 1 for row in rows)
    report = audit(base, GOLDEN / name, tmp_path / "tool", threads=1)
    wanted = "onto NF4" if onto == "nf4" else "onto double-quantized NF4"
    assert (report["verdict"], report["right"]) == (wanted, False)
    assert audit(base, GOLDEN / name, tmp_path / "tool", onto=onto)["right"]


def test_merge_onto_nf4_refuses_a_base_in_nf4_and_another_kind(tmp_path: Path) -> None:
    coded = GOLDEN / "bitsandbytes" / "llama--nf4"
    with pytest.raises(ConfigError, match="in 4 bits already"):
        merge(coded, [GOLDEN / "llama--lora"], tmp_path / "out", onto="nf4")
    with pytest.raises(ConfigError, match="--onto must be nf4 or nf4,double, got 'int8'"):
        merge(GOLDEN / "llama", [GOLDEN / "llama--lora"], tmp_path / "out", onto="int8")


def test_audit_reads_a_base_of_codes(tmp_path: Path) -> None:
    coded = GOLDEN / "bitsandbytes" / "llama--nf4"
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 64)), rng.standard_normal((64, 2))
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    adapter = tmp_path / "adapter"
    write_adapter(adapter, fields, lora_tensors("model.layers.0.self_attn.q_proj", A, B))
    merge(coded, [adapter], tmp_path / "merged")
    assert audit(coded, adapter, tmp_path / "merged", threads=1)["right"]
    assert "not merged" in audit(coded, adapter, coded, threads=1)["hypotheses"]


# ---- what does not belong together ----


def changed(case: Case, change: Any) -> Path:
    weights = case.merged(dict.fromkeys(SHAPES, "right"))
    change(weights)
    return case.write(weights)


def test_audit_refuses_other_names_and_shapes(case: Case) -> None:
    lost = changed(case, lambda weights: weights.pop("model.layers.1.self_attn.q_proj"))
    with pytest.raises(FormatError, match="missing model"):
        case.audit(lost)
    more = changed(case, lambda weights: weights.update(extra=np.zeros((2, 2))))
    with pytest.raises(FormatError, match="unknown extra"):
        case.audit(more)
    rows = {"model.embed_tokens": np.zeros((47, 64), np.float32)}
    with pytest.raises(FormatError, match=r"is \(47, 64\), expected \(48, 64\)"):
        case.audit(changed(case, lambda weights: weights.update(rows)))
    with pytest.raises(FormatError, match="not a merge into"):
        case.audit(GOLDEN / "llama")
    with pytest.raises(FormatError, match="does not fit this base"):
        audit(case.base, GOLDEN / "llama--lora", case.base)


def test_audit_refuses_a_model_that_was_saved_with_its_adapter(case: Case) -> None:
    path = "model.layers.0.self_attn.q_proj"

    def wrap(weights: dict[str, np.ndarray]) -> None:
        weights[f"{path}.base_layer"] = weights.pop(path)

    with pytest.raises(FormatError, match="saved with its adapter beside the weights"):
        case.audit(changed(case, wrap))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audit_of_numbers_that_are_not_finite(value: float, case: Case, tmp_path: Path) -> None:
    for path in ("model.layers.0.mlp.down_proj", "model.norm"):
        weights = case.merged(dict.fromkeys(SHAPES, "right"))
        weights[path] = weights[path].copy()
        weights[path][-1] = value
        assert case.audit(case.write(weights))["verdict"] == "not finite"
    broken = shutil.copytree(case.adapter, tmp_path / "adapter")
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = value
    save_file(broken / "adapter_model.safetensors", tensors)
    with pytest.raises(FormatError, match="has a NaN or an infinity"):
        audit(case.base, broken, case.base)


def test_audit_refuses_an_adapter_that_cannot_be_merged(case: Case, tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    A, B = np.ones((2, 64), np.float32), np.ones((64, 6), np.float32)
    stem = f"{PREFIX}{path}.lora_"
    tensors = {f"{stem}A.weight": A, f"{stem}B.weight": B}
    tensors[f"{stem}route.weight"] = np.ones((3, 64), np.float32)
    fields = {"r": 2, "target_modules": ["q_proj"], "peft_type": "HYDRALORA", "experts": 3}
    write_adapter(tmp_path / "adapter", fields, tensors)
    with pytest.raises((ConfigError, FormatError)):
        audit(case.base, tmp_path / "adapter", case.base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoHaConfig(target_modules=["q_proj"]), "LoHa has no factors A and B, which audit needs"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "changed base"),
    ],
)
def test_audit_refuses_a_method_without_factors_and_a_start_that_changed_the_base(
    config: LoraConfig, message: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    small.base("float32").save_pretrained(base)
    model = get_peft_model(CausalLM.from_pretrained(base), config)
    as_trained = {"as_trained": True} if config.init_lora_weights == "pissa" else {}
    model.save_pretrained(tmp_path / "adapter", **as_trained)
    with pytest.raises(ConfigError, match=message):
        audit(base, tmp_path / "adapter", base)


# ---- the command ----


def test_audit_command_ends_with_0_for_right_and_1_for_another_verdict(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    right = case.write(case.merged(dict.fromkeys(SHAPES, "right")))
    files = ["audit", "--base", str(case.base), "--adapter", str(case.adapter), "--merged"]
    assert main([*files, str(right)]) == 0
    assert "verdict: right (float64, rounded once)" in capsys.readouterr().out
    assert main([*files, str(case.base), "--json"]) == 1
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["verdict"] == "not merged"
    fields = {"tensor", "|dW|/|W|", "verdict", "arithmetic", "c", "differ", "runner-up"}
    assert [set(row) for row in report["tensors"]] == [fields] * len(SHAPES)
    assert "is not a right merge: not merged" in output.err
    assert main(files[:-1]) == 2
    assert main([*files, str(GOLDEN / "llama")]) == 3
    assert main([*files, str(right), "--onto", "int8"]) == 2
    assert main([*files, str(right), "--adapter", "other"]) == 2


def test_audit_holds_a_few_rows_of_a_tensor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = "model.layers.0.q_proj"
    W = rng.standard_normal((1024, 1024)).astype(np.float32)
    write_base(tmp_path / "base", {f"{path}.weight": W, "model.embed_tokens.weight": W})
    A, B = rng.standard_normal((2, 1024)), 1e-3 * rng.standard_normal((1024, 2))
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    write_adapter(tmp_path / "adapter", fields, lora_tensors(path, A, B))
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    tracemalloc.start()
    report = audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", threads=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report["right"]
    assert peak < 2 * W.nbytes  # a read of both tensors would be four, in float64
