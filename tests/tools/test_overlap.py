"""compare: everything from factors is what the dense dW give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError, FormatError, NonFiniteError
from minilora.formats import write_adapter
from minilora.lora.factors import Part
from minilora.tools.overlap import (
    chance,
    compare,
    compare_parts,
    find_directions,
    inner_product,
    overlap,
    principal_angles,
)

CLOSE = 1e-12


def orthonormal(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    return np.asarray(np.linalg.qr(rng.standard_normal((n, k)))[0])


def dense(part: Part) -> np.ndarray:
    return np.asarray(part.c * (part.B @ part.A))


@st.composite
def parts(draw: Any) -> tuple[Part, Part]:
    """Two updates of one layer. Their singular values are 2^0, 2^-1, ..., so that each direction is
    well determined; the factors are mixed by an invertible matrix, which leaves dW as it is."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    O, I = draw(st.integers(4, 20)), draw(st.integers(4, 20))
    made = []
    for _ in range(2):
        r = draw(st.integers(1, 4))
        mix = orthonormal(rng, r, r) * 2.0 ** rng.integers(-1, 2, r)
        B = orthonormal(rng, O, r) * 2.0 ** -np.arange(r) @ mix
        A = np.linalg.inv(mix) @ orthonormal(rng, I, r).T
        made.append(Part(A, B, draw(st.sampled_from([0.5, 2.0, -3.0]))))
    return made[0], made[1]


@given(parts())
def test_compare_parts_equals_the_dense_updates(pair):
    one, other = pair
    D, E = dense(one), dense(other)
    sizes = np.linalg.norm(D), np.linalg.norm(E)
    row = compare_parts(one, other)
    assert row["|dW1|"] == pytest.approx(sizes[0], rel=CLOSE)
    assert row["|dW2|"] == pytest.approx(sizes[1], rel=CLOSE)
    assert abs(row["<dW1, dW2>"] - np.vdot(D, E)) <= CLOSE * sizes[0] * sizes[1]
    assert abs(row["cosine"] - np.vdot(D, E) / sizes[0] / sizes[1]) <= CLOSE
    if len(one.A) == len(other.A):
        root = math.sqrt(abs(one.c * other.c))
        crossed = np.linalg.norm(one.B @ other.A), np.linalg.norm(other.B @ one.A)
        assert row["|B1 A2|"] == pytest.approx(root * crossed[0], rel=CLOSE)
        assert row["|B2 A1|"] == pytest.approx(root * crossed[1], rel=CLOSE)
    else:
        assert row["|B1 A2|"] is None
    U, _, Vt = np.linalg.svd(D)
    X, _, Yt = np.linalg.svd(E)
    for side, first, second in (("outputs", U, X), ("inputs", Vt.T, Yt.T)):
        for entry in row[side]["phi"]:
            i, j = entry["i"], entry["j"]
            phi = np.linalg.norm(first[:, :i].T @ second[:, :j]) ** 2 / min(i, j)
            assert abs(entry["phi"] - phi) <= CLOSE
            assert entry["chance"] == max(i, j) / len(first)
        first, second = first[:, : len(one.A)], second[:, : len(other.A)]
        cosines = np.linalg.svd(first.T @ second, compute_uv=False).clip(0, 1)
        angles = np.radians(row[side]["angles"])
        assert np.abs(np.cos(angles) - cosines).max() <= CLOSE
        assert (np.diff(angles) >= -CLOSE).all()


@given(parts())
def test_inner_product_is_symmetric_and_with_itself_the_square(pair):
    one, other = pair
    size = np.linalg.norm(dense(one)) * np.linalg.norm(dense(other))
    assert abs(inner_product(one, other) - inner_product(other, one)) <= CLOSE * size
    assert inner_product(one, one) == pytest.approx(np.linalg.norm(dense(one)) ** 2, rel=CLOSE)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-12, 1e-7, 1e-3, 0.7, math.pi / 2]))
def test_principal_angles_are_exact_where_a_cosine_has_lost_them(seed, angle):
    rng = np.random.default_rng(seed)
    basis = orthonormal(rng, 9, 5)
    U = basis[:, :2]
    V = np.stack([basis[:, 0], math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 2]], 1)
    V = V @ orthonormal(rng, 2, 2)
    assert np.abs(principal_angles(U, V) - [0, angle]).max() < 1e-14 * 9
    wide = np.concatenate([V, basis[:, 3:4]], axis=1)
    assert np.abs(principal_angles(U, wide) - [0, angle]).max() < 1e-14 * 9
    assert np.abs(principal_angles(wide, U) - [0, angle]).max() < 1e-14 * 9


@pytest.mark.parametrize(("i", "j"), [(1, 1), (1, 8), (3, 8)])
def test_chance_is_the_mean_over_random_directions(i, j):
    rng = np.random.default_rng(0)
    values = [overlap(orthonormal(rng, 24, i), orthonormal(rng, 24, j), i, j) for _ in range(400)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - chance(24, i, j)) < 4 * error


def test_find_directions_leaves_out_what_rounding_explains():
    """Two equal columns of B are one direction; an adapter before training has none."""
    rng = np.random.default_rng(0)
    B = rng.standard_normal((6, 1)) @ np.ones((1, 3))
    part = Part(rng.standard_normal((3, 5)), B, 2.0)
    assert len(find_directions(part).values) == 1
    zero = part._replace(B=0 * B)
    assert find_directions(zero).values.size == 0
    row = compare_parts(part, zero)
    assert row["cosine"] is None
    assert row["outputs"] == {"angles": [], "phi": []}


# ---- files ---------------------------------------------------------------------------------------


def save(folder: Any, layers: dict[str, tuple[int, int]], seed: int = 0, r: int = 2, **fields: Any):
    """An adapter of random factors: {path: (O, I)}."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, (O, I) in layers.items():
        for name, shape in (("A", (r, I)), ("B", (O, r))):
            array = rng.standard_normal(shape).astype(np.float32)
            tensors[f"base_model.model.{path}.lora_{name}.weight"] = array
    targets = sorted({path.rpartition(".")[2] for path in layers})
    write_adapter(folder, {"r": r, "target_modules": targets, **fields}, tensors)
    return folder


def test_compare_adds_layers_up_to_the_total(tmp_path):
    a = save(tmp_path / "a", {"x.q": (6, 4), "x.k": (5, 4), "x.v": (3, 4)}, 0)
    b = save(tmp_path / "b", {"x.q": (6, 4), "x.k": (5, 4), "x.o": (4, 4)}, 1)
    report = compare(a, b)
    assert [row["layer"] for row in report["layers"]] == ["x.k", "x.q"]
    assert (report["only in a"], report["only in b"]) == (["x.v"], ["x.o"])
    inner = sum(row["<dW1, dW2>"] for row in report["layers"])
    assert report["total"]["<dW1, dW2>"] == pytest.approx(inner)
    alone = compare(a, a)["layers"]
    size = math.sqrt(sum(row["|dW1|"] ** 2 for row in alone))
    assert report["total"]["|dW1|"] == pytest.approx(size)
    cosine = inner / size / report["total"]["|dW2|"]
    assert report["total"]["cosine"] == pytest.approx(cosine)


def test_compare_of_an_adapter_with_itself_is_one_everywhere(tmp_path):
    a = save(tmp_path / "a", {"x.q": (6, 4)})
    report = compare(a, a)
    assert report["total"]["cosine"] == pytest.approx(1, abs=1e-14)
    [row] = report["layers"]
    assert max(row["outputs"]["angles"] + row["inputs"]["angles"]) < 1e-12
    assert report["total"]["phi of all outputs"] == pytest.approx(1, abs=1e-14)


def test_compare_has_no_cross_terms_for_other_ranks(tmp_path):
    a = save(tmp_path / "a", {"x.q": (6, 4)})
    b = save(tmp_path / "b", {"x.q": (6, 4)}, r=3)
    total = compare(a, b)["total"]
    assert total["|B1 A2|"] is None
    assert total["cosine"] is not None


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"y.q": (6, 4)}, "no layer in common: x.q and y.q"),
        ({"x.q": (6, 5)}, "x.q is 6 x 4 in .* and 6 x 5 in"),
    ],
)
def test_compare_refuses_adapters_of_other_models(tmp_path, layers, words):
    a = save(tmp_path / "a", {"x.q": (6, 4)})
    b = save(tmp_path / "b", layers)
    with pytest.raises(FormatError, match=words):
        compare(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_compare_refuses_numbers_that_are_not_finite(tmp_path, value):
    a = save(tmp_path / "a", {"x.q": (6, 4)})
    keys = [f"base_model.model.x.q.lora_{name}.weight" for name in "AB"]
    arrays = [np.full((2, 4), value, np.float32), np.ones((6, 2), np.float32)]
    fields = {"r": 2, "target_modules": ["q"], "lora_alpha": 1e120}
    write_adapter(tmp_path / "b", fields, dict(zip(keys, arrays, strict=True)))
    with pytest.raises(NonFiniteError, match=r"dW of x\.q is not finite"):
        compare(a, tmp_path / "b")


@pytest.mark.parametrize("name", ["dora", "hydra", "loha"])
def test_compare_refuses_methods_whose_change_is_not_a_product(tmp_path, name):
    import small

    from minilora import HydraConfig, LoraConfig, get_peft_model
    from minilora.lora.maps import LoHaConfig

    config: LoraConfig = {
        "dora": LoraConfig(r=2, use_dora=True),
        "hydra": HydraConfig(r=2, experts=2),
        "loha": LoHaConfig(r=2),
    }[name]
    get_peft_model(small.base(), config).save_pretrained(tmp_path / name)
    get_peft_model(small.base(), LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="compare"):
        compare(tmp_path / "lora", tmp_path / name)
