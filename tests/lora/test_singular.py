"""leading_triplets beside the whole decomposition: the error of Eckart and Young, as measured and
as reported."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_files import WEIGHTS, lora_tensors, read_weights

from minilora.formats import Entry, bf16_from, write_adapter, write_json, write_stream
from minilora.lora import singular
from minilora.lora.files.adapter import AdapterFile
from minilora.lora.singular import SPARE, WORTH, leading_triplets
from minilora.tools.factoring import extract
from minilora.tools.merging import merge

EPS = np.finfo(np.float64).eps


def spectrum(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n singular values of a kind."""
    index = np.arange(n)
    if kind == "decaying":
        return 0.9**index
    if kind == "slowly decaying":
        return 1 / np.sqrt(1 + index)
    if kind == "one":
        return np.ones(n)
    if kind == "a cluster at the cut":
        return np.where(index < 5, 1, 1 - 1e-3)
    if kind == "of low rank":
        return np.where(index < rng.integers(1, 12), 1.0, 0)
    if kind == "of low rank, and noise":
        return np.where(index < 3, 1.0, 1e-3 * rng.random(n))
    if kind == "falling by 14 orders":
        return 10.0 ** -np.minimum(index, 14)
    assert kind == "zero"
    return np.zeros(n)


KINDS = ["a cluster at the cut", "decaying", "falling by 14 orders", "of low rank"]
KINDS += ["of low rank, and noise", "one", "slowly decaying", "zero"]


def with_values(values: np.ndarray, O: int, I: int, rng: np.random.Generator) -> np.ndarray:
    """A random matrix (O, I) with these singular values."""
    n = len(values)
    U = np.linalg.qr(rng.standard_normal((O, n)))[0]
    V = np.linalg.qr(rng.standard_normal((I, n)))[0]
    return (U * values) @ V.T


EXPONENTS = st.sampled_from([0, -900, -40, 40, 900])


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.integers(1, 6), st.booleans(), EXPONENTS, st.integers(0, 2**32))
def test_leading_triplets_have_the_error_of_the_best_of_this_rank(kind, r, tall, exponent, seed):
    """To 1e-10 of itself, or what rounding leaves: n eps |D|, which is what LAPACK promises of a
    singular value."""
    rng = np.random.default_rng(seed)
    n = WORTH * (r + SPARE) + int(rng.integers(0, 40))
    D = with_values(spectrum(kind, n, rng), n, n + 30, rng)
    D = D.T if tall else D
    U, values, Vt = leading_triplets(np.ldexp(D, exponent), r)
    values = np.ldexp(values, -exponent)
    # Values of noise are too close for so few rounds: then the decomposition is whole.
    assert len(values) == r + 1 or "noise" in kind
    U = U[:, :r]
    Vt = Vt[:r]
    rest = np.linalg.norm(values[r:])
    values = values[:r]
    exact = np.linalg.svd(D, compute_uv=False)
    norm = np.linalg.norm(exact)
    best = np.linalg.norm(exact[r:])
    rounding = len(D) * EPS * norm
    bound = 1e-10 * best + rounding
    assert abs(np.linalg.norm(D - (U * values) @ Vt) - best) <= bound
    assert abs(rest - best) <= bound
    assert (values <= exact[:r] + rounding).all()
    errors_of_squares = np.abs(values**2 - exact[:r] ** 2)
    assert (errors_of_squares <= 2e-10 * best**2 + rounding * norm).all()
    assert np.abs(U.T @ U - np.eye(r)).max() <= 100 * EPS
    assert np.abs(Vt @ Vt.T - np.eye(r)).max() <= 100 * EPS


@pytest.mark.parametrize("entries", [1, 11, 13, 20, 60])
def test_leading_triplets_ignore_residuals_that_vanish(entries):
    """Few entries, each a triplet of its own: the basis contains some of them exactly, and nothing
    of others."""
    D = np.zeros((300, 250))
    index = np.arange(entries)
    D[index, 3 * index] = entries - index
    U, values, Vt = leading_triplets(D, 4)
    best = math.sqrt(sum(i * i for i in range(entries - 3)))
    expected = pytest.approx(best, rel=1e-10, abs=1e-13 * entries)
    assert len(values) == 5
    assert values[4] == expected
    assert np.linalg.norm(D - (U * values[:4]) @ Vt) == expected


def test_leading_triplets_begin_anew_when_the_basis_is_full(monkeypatch):
    """The values of noise are so close that it takes more rounds than fit into a basis."""
    widths = []
    svd = np.linalg.svd

    def watched(B, **options):
        if B.shape[1] == 500:  # the basis, not what is added to it
            widths.append(len(B))
        return svd(B, **options)

    D = np.random.default_rng(0).standard_normal((400, 500))
    exact = svd(D, compute_uv=False)
    monkeypatch.setattr(np.linalg, "svd", watched)
    _, values, _ = leading_triplets(D, 4)
    assert max(widths) == singular.BLOCKS * 12
    assert len(widths) > 2 * singular.BLOCKS
    assert values[4] == pytest.approx(np.linalg.norm(exact[4:]), rel=1e-10)


@pytest.mark.parametrize("why", ["small", "out of rounds", "not orthonormal"])
def test_leading_triplets_leave_some_matrices_to_lapack(why, monkeypatch):
    D = np.random.default_rng(0).standard_normal((WORTH * 12 - (why == "small"), 300))
    if why == "out of rounds":
        monkeypatch.setattr(singular, "PRECISION", -1.0)
    elif why == "not orthonormal":
        wrong = lambda D, B, A: 0.9 * np.linalg.norm(D - B @ A)  # noqa: E731
        monkeypatch.setattr(singular, "distance", wrong)
    _, values, _ = leading_triplets(D, 4)
    assert np.array_equal(values, np.linalg.svd(D)[1])


def test_leading_triplets_of_equal_matrices_have_equal_bits_and_change_nothing():
    D = np.random.default_rng(0).standard_normal((300, 200))
    before = D.tobytes()
    first = leading_triplets(D, 4)
    again = leading_triplets(D.copy(), 4)
    for one, other in zip(first, again, strict=True):
        assert one.tobytes() == other.tobytes()
    assert D.tobytes() == before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_extract_recovers_an_adapter_that_was_merged_in_bfloat16(kind, tmp_path):
    """D = dW + N, N being the rounding; D_r is as near as any of rank r: |D_r - dW| <= |D_r - D| +
    |N| <= 2 |N|."""
    is_gpt2 = kind == "gpt2"
    rng = np.random.default_rng(0)
    O = 240
    I = 210
    path = "transformer.h.0.attn.c_proj" if is_gpt2 else "model.layers.0.self_attn.q_proj"
    A = np.float32(rng.standard_normal((4, I)))
    B = np.float32(rng.standard_normal((O, 4)) * 0.05)
    bits = bf16_from(rng.standard_normal((I, O) if is_gpt2 else (O, I)) * 0.1)
    base = tmp_path / "base"
    tuned = tmp_path / "tuned"
    base.mkdir()
    config = {"model_type": kind, "tie_word_embeddings": False, "dtype": "bfloat16"}
    write_json(base / "config.json", config)
    write_stream(base / WEIGHTS, [Entry(f"{path}.weight", "BF16", bits.shape, lambda: bits)])
    fields = {"r": 4, "lora_alpha": 4, "target_modules": [path], "fan_in_fan_out": is_gpt2}
    write_adapter(tmp_path / "adapter", fields, lora_tensors(path, A, B))
    merge(base, [tmp_path / "adapter"], tuned)
    (row,) = extract(base, tuned, 4, tmp_path / "out")

    def read_W(folder: Path) -> np.ndarray:
        W = read_weights(folder)[f"{path}.weight"].astype(float)
        return W.T if is_gpt2 else W

    dW = B.astype(float) @ A
    N = np.linalg.norm(read_W(tuned) - read_W(base) - dW, 2)
    with AdapterFile(tmp_path / "out") as file:
        part = file.part(path)
    extracted = part.c * part.B @ part.A
    assert np.linalg.norm(extracted - dW, 2) <= 2 * N * (1 + 1e-6)
    assert 0 < row["error"] <= math.sqrt(min(O, I)) * N
    assert 0.02 * np.linalg.norm(dW, 2) > N
