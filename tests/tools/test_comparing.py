"""diff and its ranks: beside the dense difference and LAPACK's singular values."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_files import GOLDEN, WEIGHTS, base_of, deltas, write_base

from minilora.formats import Entry, write_stream
from minilora.tools import comparing
from minilora.tools.comparing import count_above, diff
from minilora.tools.merging import merge


def test_diff_finds_the_rank_that_was_merged(tmp_path):
    name = "llama--lora"
    merge(base_of(name), [GOLDEN / name], tmp_path / "tuned")
    report = diff(base_of(name), tmp_path / "tuned")
    expected = deltas(GOLDEN / name)
    for row in report["tensors"]:
        dW = expected.get(row["tensor"].removesuffix(".weight"))
        if dW is not None:
            assert row["rank"] == 4
        elif " x " in row["shape"]:
            assert row["rank"] == 0
        else:
            assert row["rank"] is None
        norm = 0 if dW is None else np.linalg.norm(dW)
        assert row["|b - a|"] == pytest.approx(norm, rel=1e-6)
        assert row["relative"] == 0 or row["relative"] > 0
    assert report["equal"] == len(report["tensors"]) - len(expected)
    assert report["only in a"] == report["only in b"] == []


def orthonormal(rng: np.random.Generator, side: int, count: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((side, count)))[0]


SIDES = st.integers(1, 9)


@given(SIDES, SIDES, st.integers(-12, 0), st.sampled_from([0, -530, -600, 600]), st.integers(0, 99))
def test_count_above_counts_values_however_near_the_threshold(O, I, power, exponent, seed):
    """The threshold is one of the values, or a bit below or above it, or anything."""
    rng = np.random.default_rng(seed)
    n = min(O, I)
    values = np.sort(10.0 ** rng.uniform(power, 0, n))[::-1]
    D = (orthonormal(rng, O, n) * values) @ orthonormal(rng, I, n).T
    D = np.ldexp(D, exponent)
    exact = np.linalg.svd(D, compute_uv=False)
    value = exact[rng.integers(n)]
    thresholds = [value, np.nextafter(value, 0), value * (1 + 1e-9)]
    thresholds += [exact[-1] / 2, np.ldexp(2.0, exponent)]
    for threshold in thresholds:
        assert count_above(D, threshold) == (exact > threshold).sum()


@pytest.mark.parametrize("scale", [0, 1e-9, 1])
def test_diff_rank_does_not_count_the_rounding_of_the_larger_tensor(scale, tmp_path):
    """u v^T, stored in float32, has small singular values of its rounding, too; in either of the
    two files."""
    rng = np.random.default_rng(0)
    W = scale * rng.standard_normal((40, 50))
    D = np.outer(rng.standard_normal(40), rng.standard_normal(50))
    a = write_base(tmp_path / "a", {"w": W})
    b = write_base(tmp_path / "b", {"w": W + D})
    for one, other in ((a, b), (b, a)):
        (row,) = diff(one, other)["tensors"]
        assert row["rank"] == 1


def test_diff_ranks_says_whether_ranks_are_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "RANKED", 2)
    a = write_base(tmp_path / "a", {"w": np.zeros((2, 3)), "wide": np.zeros((3, 3))})
    b = write_base(tmp_path / "b", {"w": np.ones((2, 3)), "wide": np.ones((3, 3))})
    for ranks, expected in ((None, [1, None]), (True, [1, 1]), (False, [None, None])):
        rows = diff(a, b, ranks)["tensors"]
        assert [row["rank"] for row in rows] == expected


def test_diff_lists_tensors_of_one_alone_and_shapes_that_differ(tmp_path):
    a = write_base(tmp_path / "a", {"x": np.ones(3), "y": np.ones((2, 2)), "z": np.full(2, np.nan)})
    b = write_base(tmp_path / "b", {"w": np.ones(3), "y": np.ones((2, 3)), "z": np.ones(2)})
    report = diff(a, b)
    assert report["only in a"] == ["x"]
    assert report["only in b"] == ["w"]
    rows = [(row["shape"], row["|b - a|"]) for row in report["tensors"]]
    assert rows == [("2 x 2 and 2 x 3", None), ("2", None)]
    json.dumps(report, allow_nan=False)


# ---- other forms of keys, another vocabulary, dtypes that are not read ----

LAYERS = {
    "embed_tokens.weight": (6, 4),
    "layers.0.self_attn.q_proj.weight": (4, 4),
    "layers.1.self_attn.q_proj.weight": (4, 4),
    "norm.weight": (4,),
}


def write_form(folder, prefix, head, tokens=6, more=()):
    """A checkpoint whose keys begin with `prefix`, one weight changed in layer 1."""
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in LAYERS.items():
        tensors[prefix + key] = rng.standard_normal(shape)
    if head:
        tensors[head] = rng.standard_normal((6, 4))
    for key in tensors:
        if len(tensors[key]) == 6:
            tensors[key] = np.concatenate([tensors[key], np.ones((9, 4))])[:tokens]
    tensors |= {key: np.ones(2) for key in more}
    return write_base(folder, tensors)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("model.", "lm_head.weight"), ("", "lm_head.weight")),
        (("", "lm_head.weight"), ("model.", "lm_head.weight")),
        (("model.", ""), ("", "lm_head.weight")),
        (("model.", "lm_head.weight"), ("", "")),
        (("model.", "lm_head.weight"), ("module.model.", "module.lm_head.weight")),
        (("_orig_mod.model.", "_orig_mod.lm_head.weight"), ("model.", "lm_head.weight")),
        (("base_model.model.model.", "base_model.model.lm_head.weight"), ("", "lm_head.weight")),
        (("transformer.", ""), ("model.", "")),
    ],
)
def test_diff_compares_keys_that_differ_in_their_beginning_alone(tmp_path, a, b):
    one = write_form(tmp_path / "a", *a)
    other = write_form(tmp_path / "b", *b, more=["vision.tower.bias"])
    report = diff(one, other)
    keys = {a[0] + key for key in LAYERS}
    heads = {a[1]} if a[1] and b[1] else set()
    assert {row["tensor"] for row in report["tensors"]} == keys | heads
    assert report["equal"] == len(keys | heads)
    assert report["only in a"] == ([a[1]] if a[1] and not heads else [])
    assert report["only in b"] == sorted(
        ["vision.tower.bias", *([b[1]] if not heads and b[1] else [])]
    )
    (note,) = report["notes"]
    assert note.startswith("the keys of b ")
    assert note.endswith(": taken for the same")


def test_diff_aligns_no_keys_of_other_layers_or_of_few_tensors(tmp_path):
    one = write_base(tmp_path / "a", {"layers.0.q.weight": np.ones(2), "y.z.bias": np.ones(2)})
    other = {"layers.1.q.weight": np.ones(2), "x.z.bias": np.ones(2), "u.v": np.ones(2)}
    report = diff(one, write_base(tmp_path / "b", {**other, "s.t": np.ones(2)}))
    assert report["tensors"] == []
    assert "notes" not in report


@pytest.mark.parametrize("tokens", [(6, 9), (9, 6)])
def test_diff_compares_the_rows_that_both_vocabularies_have(tmp_path, tokens):
    one, other = (
        write_form(tmp_path / str(count), "model.", "lm_head.weight", count) for count in tokens
    )
    report = diff(one, other)
    rows = {row["tensor"]: row for row in report["tensors"]}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert rows[key]["|b - a|"] == 0
        assert rows[key]["shape"] == f"{tokens[0]} x 4 and {tokens[1]} x 4"
    assert report["equal"] == len(rows) - 2, "two have other rows"
    assert len(report["notes"]) == 2
    says = f"has {tokens[0]} rows in a and {tokens[1]} in b: the first 6 are compared"
    assert all(says in note for note in report["notes"])


def test_diff_compares_bytes_of_dtypes_that_are_not_read(tmp_path):
    folders = []
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        folder = write_base(tmp_path / name, {})
        byte = np.array([value], np.uint8)
        write_stream(folder / WEIGHTS, [Entry("x", "F8_E8M0", (1,), lambda byte=byte: byte)])
        folders.append(folder)
    for other, expected in zip(folders[1:], (0, None), strict=True):
        (row,) = diff(folders[0], other)["tensors"]
        assert (row["|b - a|"], row["rank"]) == (expected, None)
