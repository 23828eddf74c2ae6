"""audit: dtypes in which a tensor may have been merged before it was stored, and config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import merges
import numpy as np
import pytest
from merges import Adapter
from tool_files import lora_tensors, write_base

from minilora.formats import write_adapter
from minilora.formats.dtypes import DTYPES
from minilora.tools.auditing import audit
from minilora.tools.merging import merge
from minilora.tools.places import compare_configs

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
CODES = {code: name for name, code in DTYPES.items()}


def write(folder: Path, weights: dict[str, np.ndarray], code: str, **config: Any) -> Path:
    named = {f"{path}.weight": W.astype(float) for path, W in weights.items()}
    return write_base(folder, named, dtype=CODES[code], **config)


def merge_in(
    folder: Path, base: str, merged: str, stored: str, scale: float, kind: str = "right"
) -> dict[str, Any]:
    """The report on a base of dtype `base` that was merged in another, and stored in a third.

    scale   of W; 1e-6 makes numbers that are subnormal in float16
    """
    rng = np.random.default_rng(7)
    weights = {path: merges.rounded(scale * rng.standard_normal((64, 64)), base) for path in (Q, K)}
    A = rng.standard_normal((3, 64)).astype(np.float32)
    B = rng.standard_normal((64, 3))
    B *= 0.01 * np.linalg.norm(weights[Q].astype(float)) / np.linalg.norm(3 * B @ A)
    adapter = Adapter(A, np.float32(B), 9.0)
    write(folder / "base", weights, base)
    fields = {"r": 3, "lora_alpha": 9.0, "target_modules": ["q_proj"]}
    write_adapter(folder / "adapter", fields, lora_tensors(Q, A, np.float32(B)))
    tensors = {
        Q: merges.merge_as(kind, weights[Q], adapter, merged, "float64"),
        K: merges.rounded(weights[K], merged),
    }
    write(folder / "merged", tensors, stored)
    return audit(folder / "base", folder / "adapter", folder / "merged", threads=1)


@pytest.mark.parametrize("scale", [0.02, 1e-6])
@pytest.mark.parametrize(
    ("base", "merged", "stored"),
    [
        ("F32", "F16", "F32"),
        ("BF16", "F16", "F32"),
        ("F32", "BF16", "F32"),
        ("F32", "BF16", "F16"),
        ("BF16", "BF16", "F16"),
        ("F16", "F16", "BF16"),
    ],
)
def test_audit_takes_a_merge_in_16_bits_that_is_stored_otherwise(
    base: str, merged: str, stored: str, scale: float, tmp_path: Path
) -> None:
    report = merge_in(tmp_path, base, merged, stored, scale)
    assert report["right"], report
    assert report["equal"] == 1


def test_audit_recognises_a_wrong_merge_in_16_bits_that_is_stored_otherwise(tmp_path: Path) -> None:
    assert merge_in(tmp_path, "F16", "F16", "BF16", 0.02, "twice")["verdict"] == "twice"


def test_audit_notes_fields_of_the_configuration_that_differ(tmp_path: Path) -> None:
    write(tmp_path / "base", {Q: np.ones((4, 4))}, "F32", rope_theta=10000.0)
    write_adapter(
        tmp_path / "adapter",
        {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]},
        lora_tensors(Q, np.ones((1, 4), np.float32), np.ones((4, 1), np.float32)),
    )
    write(tmp_path / "merged", {Q: 2 * np.ones((4, 4))}, "F32", rope_theta=500000.0)
    report = audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", threads=1)
    assert report["right"]
    [note] = report["notes"]
    assert "rope_theta is 500000.0, in the base 10000.0" in note


def test_compare_configs_leaves_out_what_changes_no_output() -> None:
    base = {"architectures": ["A"], "dtype": "float32", "vocab_size": 3, "use_cache": True}
    merged = {"architectures": ["B"], "dtype": "float16", "vocab_size": 5, "use_cache": False}
    assert compare_configs(base, {**merged, "rms_norm_eps": 1e-5}) == []


@pytest.mark.parametrize("seed", [4, 5, 10])
def test_audit_does_not_let_one_dtype_decide_alone(seed: int, tmp_path: Path) -> None:
    """In numbers of bfloat16 that are subnormal in float16, float16's bounds may leave "twice"
    alone, whose bound is wider than that of the truth, alpha = 2 s."""
    rng = np.random.default_rng(seed)
    W = merges.rounded(1e-4 * rng.standard_normal((32, 32)), "BF16")
    A, B = rng.standard_normal((2, 32)).astype(np.float32), rng.standard_normal((32, 2))
    B = np.float32(B * 0.3 * np.linalg.norm(W.astype(float)) / np.linalg.norm(4 * B @ A))
    write(tmp_path / "base", {Q: W}, "BF16")
    fields = {"r": 2, "lora_alpha": 8.0, "target_modules": ["q_proj"]}
    write_adapter(tmp_path / "adapter", fields, lora_tensors(Q, A, B))
    M = merges.add(W, A, B, 8.0, "BF16", "product")
    write(tmp_path / "merged", {Q: M}, "F16")
    report = audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", threads=1)
    assert report["hypotheses"] == ["alpha not divided by r", "twice"]


@pytest.mark.parametrize("onto", [None, "nf4", "nf4,double"])
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], ["q_proj"]])
def test_audit_leaves_a_head_out_of_nf4_as_merge_does(
    targets: list[str], onto: str | None, tmp_path: Path
) -> None:
    """Right for what was asked and nothing else, also if the head alone has an adapter: then the
    other layers say whether they are in NF4."""
    rng = np.random.default_rng(3)
    paths = {"lm_head": (48, 64), "model.embed_tokens": (48, 64), Q: (64, 64), K: (64, 64)}
    weights = {path: 0.02 * rng.standard_normal(shape) for path, shape in paths.items()}
    write(tmp_path / "base", weights, "F32")
    tensors = {}
    for path in (path for path in paths if path.rpartition(".")[2] in targets):
        A, B = rng.standard_normal((2, 64)), 1e-3 * rng.standard_normal((paths[path][0], 2))
        tensors |= lora_tensors(path, A.astype(np.float32), B.astype(np.float32))
    fields = {"r": 2, "lora_alpha": 8.0, "target_modules": targets}
    write_adapter(tmp_path / "adapter", fields, tensors)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", onto=onto)
    for asked in (None, "nf4", "nf4,double"):
        folders = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
        report = audit(*folders, onto=asked, threads=1)
        assert report["right"] == (asked == onto), report
