"""The leading singular triplets, beside the whole decomposition: the error of Eckart and Young, measured and found."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.formats import Entry, bf16_from, load_file, write_adapter, write_json, write_stream
from minilora.lora.files import AdapterFile
from minilora.tools import leading as room
from minilora.tools.factoring import extract
from minilora.tools.leading import SPARE, WORTH, leading_triplets
from minilora.tools.merging import merge

EPS = np.finfo(np.float64).eps
SPECTRA = {
    "decaying": lambda n, rng: 0.9 ** np.arange(n),
    "slowly decaying": lambda n, rng: 1 / np.sqrt(1 + np.arange(n)),
    "one": lambda n, rng: np.ones(n),
    "a cluster at the cut": lambda n, rng: np.where(np.arange(n) < 5, 1, 1 - 1e-3),
    "of low rank": lambda n, rng: np.where(np.arange(n) < rng.integers(1, 12), 1.0, 0),
    "of low rank, and noise": lambda n, rng: np.where(np.arange(n) < 3, 1.0, 1e-3 * rng.random(n)),
    "falling by 14 orders": lambda n, rng: 10.0 ** -np.minimum(np.arange(n), 14),
    "zero": lambda n, rng: np.zeros(n),
}


def with_values(values: np.ndarray, O: int, I: int, rng: np.random.Generator) -> np.ndarray:
    U, V = (np.linalg.qr(rng.standard_normal((side, len(values))))[0] for side in (O, I))
    return (U * values) @ V.T


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(SPECTRA)), st.integers(1, 6), st.booleans(), st.sampled_from([0, -900, -40, 40, 900]),
    st.integers(0, 2**32),
)  # fmt: skip
def test_the_error_is_that_of_the_best_of_this_rank(
    kind: str, r: int, tall: bool, exponent: int, seed: int
) -> None:
    """To 1e-10 of itself, or what rounding leaves: n eps |D|, which is what LAPACK promises of a singular value."""
    rng = np.random.default_rng(seed)
    n = WORTH * (r + SPARE) + int(rng.integers(0, 40))
    D = with_values(SPECTRA[kind](n, rng), n, n + 30, rng)
    D = D.T if tall else D
    U, values, Vt = leading_triplets(np.ldexp(D, exponent), r)
    values = np.ldexp(values, -exponent)
    U, Vt, few = U[:, :r], Vt[:r], len(values) == r + 1
    values = np.append(values[:r], np.linalg.norm(values[r:]))
    assert few or "noise" in kind  # whose values lie too close for so few rounds
    exact = np.linalg.svd(D, compute_uv=False)
    norm, best = np.linalg.norm(exact), np.linalg.norm(exact[r:])
    rounding = len(D) * EPS * norm
    assert abs(np.linalg.norm(D - (U * values[:r]) @ Vt) - best) <= 1e-10 * best + rounding
    assert abs(values[r] - best) <= 1e-10 * best + rounding
    assert (values[:r] <= exact[:r] + rounding).all()
    assert (np.abs(values[:r] ** 2 - exact[:r] ** 2) <= 2e-10 * best**2 + rounding * norm).all()
    assert np.abs(U.T @ U - np.eye(r)).max() <= 100 * EPS
    assert np.abs(Vt @ Vt.T - np.eye(r)).max() <= 100 * EPS


@pytest.mark.parametrize("entries", [1, 11, 13, 20, 60])
def test_residuals_that_vanish_add_no_direction(entries: int) -> None:
    """Few entries, each a triplet of its own: the basis holds all of some, and nothing of others."""
    D = np.zeros((300, 250))
    D[np.arange(entries), 3 * np.arange(entries)] = np.arange(entries, 0, -1)
    U, values, Vt = leading_triplets(D, 4)
    best = math.sqrt(sum(i * i for i in range(entries - 3)))
    assert len(values) == 5
    assert values[4] == pytest.approx(best, rel=1e-10, abs=1e-13 * entries)
    assert np.linalg.norm(D - (U * values[:4]) @ Vt) == pytest.approx(
        best, rel=1e-10, abs=1e-13 * entries
    )


def test_a_basis_that_is_full_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of noise lie so close that it takes more rounds than a basis has room for."""
    widths = []

    def watched(B: np.ndarray, **options: bool) -> tuple[np.ndarray, ...]:
        widths.extend([len(B)] if B.shape[1] == 500 else [])  # and not of what is added
        return svd(B, **options)

    svd = np.linalg.svd
    D = np.random.default_rng(0).standard_normal((400, 500))
    exact = svd(D, compute_uv=False)
    monkeypatch.setattr(np.linalg, "svd", watched)
    _, values, _ = leading_triplets(D, 4)
    assert max(widths) == room.BLOCKS * 12
    assert len(widths) > 2 * room.BLOCKS
    assert values[4] == pytest.approx(np.linalg.norm(exact[4:]), rel=1e-10)


@pytest.mark.parametrize("why", ["small", "out of rounds", "not orthonormal"])
def test_where_it_does_not_pay_or_end_lapack_does_it(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    D = np.random.default_rng(0).standard_normal((WORTH * 12 - (why == "small"), 300))
    if why == "out of rounds":
        monkeypatch.setattr(room, "PRECISION", -1.0)
    elif why == "not orthonormal":
        monkeypatch.setattr(room, "_left", lambda D, B, A: 0.9 * np.linalg.norm(D - B @ A))
    _, values, _ = leading_triplets(D, 4)
    assert np.array_equal(values, np.linalg.svd(D)[1])


def test_equal_matrices_have_equal_bits_and_stay_as_they_are() -> None:
    D = np.random.default_rng(0).standard_normal((300, 200))
    before = D.tobytes()
    first, again = leading_triplets(D, 4), leading_triplets(D.copy(), 4)
    assert [a.tobytes() for a in first] == [a.tobytes() for a in again]
    assert D.tobytes() == before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_that_was_merged_in_bfloat16_comes_back(kind: str, tmp_path: Path) -> None:
    """Of D = dW + N, N being the rounding, D_r is as near as any of rank r: |D_r - dW| <= |D_r - D| + |N| <= 2 |N|."""
    rng, O, I = np.random.default_rng(0), 240, 210
    path = "transformer.h.0.attn.c_proj" if kind == "gpt2" else "model.layers.0.self_attn.q_proj"
    A, B = np.float32(rng.standard_normal((4, I))), np.float32(rng.standard_normal((O, 4)) * 0.05)
    W = bf16_from(rng.standard_normal((I, O) if kind == "gpt2" else (O, I)) * 0.1)
    base = tmp_path / "base"
    base.mkdir()
    write_json(
        base / "config.json",
        {"model_type": kind, "tie_word_embeddings": False, "dtype": "bfloat16"},
    )
    write_stream(base / "model.safetensors", [Entry(f"{path}.weight", "BF16", W.shape, lambda: W)])
    fields = {"r": 4, "lora_alpha": 4, "target_modules": [path], "fan_in_fan_out": kind == "gpt2"}
    tensors = {f"base_model.model.{path}.lora_{x}.weight": a for x, a in (("A", A), ("B", B))}
    write_adapter(tmp_path / "adapter", fields, tensors)
    merge(base, [tmp_path / "adapter"], tmp_path / "tuned")
    (row,) = extract(base, tmp_path / "tuned", 4, tmp_path / "out")
    dW = B.astype(float) @ A
    before, after = (
        load_file(f / "model.safetensors")[f"{path}.weight"].astype(float)
        for f in (base, tmp_path / "tuned")
    )
    N = np.linalg.norm((after - before).T - dW if kind == "gpt2" else after - before - dW, 2)
    with AdapterFile(tmp_path / "out") as file:
        found = file.part(path)
    assert np.linalg.norm(found.c * found.B @ found.A - dW, 2) <= 2 * N * (1 + 1e-6)
    assert 0 < row["error"] <= math.sqrt(min(O, I)) * N
    assert 0.02 * np.linalg.norm(dW, 2) > N
