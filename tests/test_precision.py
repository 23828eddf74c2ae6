"""Products by a reduced arithmetic: operands rounded to nearest, ties to even, sums in float32."""

from __future__ import annotations

from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strict_xp import STRICT

import minilora.functional as F
from minilora.autograd import Tensor, gradients
from minilora.backend import NUMPY, Backend, get_backend
from minilora.cuda.launching import Kernels
from minilora.errors import ConfigError
from minilora.formats.dtypes import bf16_from, bf16_to_float32
from minilora.precision import (
    MANTISSA,
    check_compute,
    narrow_bfloat16,
    round_operand,
    widen_bfloat16,
)
from minilora.quant.half import HalfWeight, encode_half
from minilora.quant.linear import quantized_linear

ROUNDED = [name for name in MANTISSA if name != "float32"]
DEVICES = ["cpu", "strict", pytest.param("cuda", marks=pytest.mark.gpu)]
ANY_ARITHMETIC = pytest.mark.parametrize("compute", ROUNDED)
U = 2.0**-24  # the unit roundoff of float32
EDGES = [
    0.0, -0.0, 1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23,
    2.0**-126, 2.0**-149, -(2.0**-140), 3.3895314e38, 3.4e38, -3.4028235e38, np.inf, -np.inf,
]  # fmt: skip


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return STRICT if request.param == "strict" else get_backend(request.param)


def host(backend: Backend, array: Any) -> np.ndarray:
    return backend.to_numpy(array)


def randoms(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gradient(loss: Tensor, x: Tensor) -> Any:
    return gradients(loss, [x])[0]


def rounded(x: np.ndarray, compute: str) -> np.ndarray:
    """x as float64 with a mantissa of so many bits, by decimal arithmetic of powers of two."""
    wide = x.astype(np.float64)
    mantissa, exponent = np.frexp(wide)
    step = np.exp2(np.maximum(exponent, -125) - 1 - MANTISSA[compute])
    return np.where(mantissa == 0, wide, np.rint(wide / step) * step)


def product_bound(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far a sum of exact products in float32 may be from a @ b, in any order."""
    return 2 * a.shape[-1] * U * (abs(a) @ abs(b))


def device_slack(backend: Backend, compute: str, a: np.ndarray, b: np.ndarray) -> Any:
    """What a real GPU may add: its tensor cores may round an operand otherwise, by one step."""
    if not backend.name.startswith("cuda") or cupy_on_cpu.is_installed():
        return 0
    return 2.01 * 2.0 ** -MANTISSA[compute] * (abs(a) @ abs(b))


# ---- rounding ------------------------------------------------------------------------------------


@ANY_ARITHMETIC
@given(numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_round_operand_is_to_nearest_ties_to_even(compute: str, numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    found = round_operand(NUMPY, x, compute)
    expected = rounded(x, compute)
    is_finite = abs(expected) < 2.0**128
    assert (found[is_finite] == expected[is_finite]).all()
    assert np.isinf(found[~is_finite]).all()
    assert (np.signbit(found) == np.signbit(x)).all()


@ANY_ARITHMETIC
def test_round_operand_of_edges_on_any_device(compute: str, backend: Backend) -> None:
    x = np.array(EDGES, np.float32)
    found = host(backend, round_operand(backend, backend.from_numpy(x), compute))
    assert found.tobytes() == round_operand(NUMPY, x, compute).tobytes()
    assert found.dtype == np.float32
    ends = np.isinf(x)
    assert (found[ends] == x[ends]).all()


def test_round_operand_keeps_nan_and_the_array(backend: Backend) -> None:
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32)
    x = backend.from_numpy(bits.view(np.float32))
    for compute in ROUNDED:
        assert np.isnan(host(backend, round_operand(backend, x, compute))).all()
    codes = host(backend, backend.run(narrow_bfloat16, x))
    assert np.isnan(bf16_to_float32(codes)).all()
    assert host(backend, x).tobytes() == bits.tobytes()


@given(numbers=st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_narrow_bfloat16_has_the_bits_that_files_get(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    assert (narrow_bfloat16(NUMPY, x) == bf16_from(x)).all()


@pytest.mark.parametrize("size", [0, 1, 255, 4097])
def test_narrow_bfloat16_has_the_same_bits_on_any_device(size: int, backend: Backend) -> None:
    bits = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
    x = np.concatenate([bits.view(np.float32), np.array(EDGES, np.float32)])
    x = x[~np.isnan(x)]
    for array in (x, x[::2], x[: len(x) // 2 * 2].reshape(2, -1).T):
        there = backend.from_numpy(x)
        there = there[::2] if array.strides == (8,) else there
        there = there[: array.size].reshape(2, -1).T if array.ndim == 2 else there
        found = host(backend, backend.run(narrow_bfloat16, there))
        assert found.shape == array.shape
        assert (found == bf16_from(array)).all()
    wide = backend.run(widen_bfloat16, backend.from_numpy(bf16_from(x)), np.dtype("float32"))
    expected = round_operand(NUMPY, x, "bfloat16")
    assert host(backend, wide).tobytes() == expected.tobytes()


# ---- what is valid -------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp16", "", "TF32", None, 32, ["tf32"], np.dtype("float32")])
def test_check_compute_refuses_another_name(compute: Any) -> None:
    valid = "compute must be one of float32, tf32, bfloat16, got"
    with pytest.raises(ConfigError, match=valid):
        check_compute(compute, np.float32)


@ANY_ARITHMETIC
def test_matmul_refuses_to_round_other_dtypes(compute: str, backend: Backend) -> None:
    for dtype in ("float64", "float16"):
        x = backend.xp.ones((2, 2), dtype)
        with pytest.raises(ConfigError, match=f"compute='{compute}' with {dtype}: .* float32 only"):
            backend.matmul(x, x, compute=compute)
    x = backend.xp.ones((2, 2), "float32")
    with pytest.raises(ConfigError, match="compute must be one of"):
        backend.matmul(x, x, compute="fp8")


# ---- products ------------------------------------------------------------------------------------


@ANY_ARITHMETIC
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1, 3]),
)
def test_matmul_adds_up_products_of_rounded_operands(
    compute: str, shape: tuple[int, int, int], seed: int, scale: int
) -> None:
    M, K, N = shape
    a, b = randoms(M, K, seed=seed), randoms(K, N, seed=seed + 1)
    y = NUMPY.matmul(a, b, scale=scale, compute=compute)
    a, b = rounded(a, compute), rounded(b, compute)
    bound = scale * (product_bound(a, b) + U * (abs(a) @ abs(b)))
    assert (abs(y - scale * (a @ b)) <= bound).all()


@ANY_ARITHMETIC
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 64, 7), (33, 129, 65)], ids=str)
def test_matmul_of_a_device_is_the_reference_within_rounding(
    compute: str, shape: tuple[int, int, int], backend: Backend
) -> None:
    M, K, N = shape
    a, b = randoms(M, K), randoms(N, K, seed=1)
    there = [backend.from_numpy(x) for x in (a, b)]
    y = host(backend, backend.matmul(there[0], there[1].T, compute=compute))
    out = backend.xp.empty((M, N), np.float32)
    assert backend.matmul(there[0], there[1].T, out, compute=compute) is out
    assert host(backend, out).tobytes() == y.tobytes()
    a, b = rounded(a, compute), rounded(b, compute).T
    slack = device_slack(backend, compute, a, b)
    assert (abs(y - a @ b) <= product_bound(a, b) + slack).all()


@ANY_ARITHMETIC
def test_matmul_loses_what_only_an_exact_product_keeps(compute: str, backend: Backend) -> None:
    lost = 2.0 ** -(MANTISSA[compute] + 2)
    ones = backend.xp.ones((1, 1), np.float32)
    near = ones + np.float32(lost)
    for a, b in ((near, ones), (ones, near)):
        assert host(backend, backend.matmul(a, b)).item() == 1 + lost
        if not backend.name.startswith("cuda") or cupy_on_cpu.is_installed():
            assert host(backend, backend.matmul(a, b, compute=compute)).item() == 1


def test_matmul_takes_bfloat16_s_bits_as_they_are(backend: Backend) -> None:
    """The other operand is rounded to such bits; neither is decoded on a GPU."""
    a, b = randoms(5, 40), randoms(6, 40, seed=1)
    codes = [backend.from_numpy(bf16_from(x)) for x in (a, b)]
    floats = [backend.from_numpy(x) for x in (a, b)]
    wide = [bf16_to_float32(bf16_from(x)).astype(np.float64) for x in (a, b)]
    bound = product_bound(wide[0], wide[1].T)
    for first, second in ((floats[0], codes[1]), (codes[0], floats[1]), (codes[0], codes[1])):
        y = backend.matmul(first, second.T, compute="bfloat16")
        assert y.dtype == np.float32
        assert (abs(host(backend, y) - wide[0] @ wide[1].T) <= bound).all()


@pytest.mark.gpu
def test_matmul_of_bfloat16_s_bits_is_one_kernel_and_one_product(emulated: None) -> None:
    gpu = get_backend("cuda")
    x = gpu.from_numpy(randoms(5, 40))
    W = gpu.from_numpy(bf16_from(randoms(6, 40, seed=1)))
    for _ in range(2):
        with cupy_on_cpu.counted() as device:
            gpu.matmul(x, W.T, compute="bfloat16")
    assert device.counts.operations == 2
    assert device.counts.waits == 0
    with cupy_on_cpu.counted() as device:
        gpu.matmul(x, x.T, compute="tf32")
    assert device.counts.operations == 1


@pytest.mark.gpu
def test_matmul_rounds_without_cublas_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = get_backend("cuda")
    a, b = randoms(5, 40), randoms(40, 6, seed=1)
    monkeypatch.setitem(vars(gpu), "blas", None)
    for compute in ROUNDED:
        y = host(gpu, gpu.matmul(gpu.from_numpy(a), gpu.from_numpy(b), compute=compute))
        wide = rounded(a, compute), rounded(b, compute)
        assert (abs(y - wide[0] @ wide[1]) <= product_bound(*wide)).all()


# ---- linear --------------------------------------------------------------------------------------


@ANY_ARITHMETIC
def test_linear_rounds_y_and_dx_but_not_dw(compute: str, backend: Backend) -> None:
    X, W, dY = randoms(7, 20), randoms(9, 20, seed=1), randoms(7, 9, seed=2)
    x, weight = (Tensor(backend.from_numpy(a), True) for a in (X, W))
    y = F.linear(x, weight, compute=compute)
    dx, dw = gradients((y * Tensor(backend.from_numpy(dY))).sum(), [x, weight])
    Xr, Wr, dYr = (rounded(a, compute) for a in (X, W, dY))
    for found, a, b in ((y.data, Xr, Wr.T), (dx, dYr, Wr)):
        slack = device_slack(backend, compute, a, b)
        assert (abs(host(backend, found) - a @ b) <= product_bound(a, b) + slack).all()
    exact = dY.T.astype(np.float64), X.astype(np.float64)
    assert (abs(host(backend, dw) - exact[0] @ exact[1]) <= product_bound(*exact)).all()


@ANY_ARITHMETIC
def test_linear_of_representable_numbers_has_float32_s_bits(compute: str) -> None:
    X, W, dY = (
        rounded(randoms(*shape), compute).astype(np.float32) for shape in ((7, 20), (9, 20), (7, 9))
    )
    found = []
    for arithmetic in ("float32", compute):
        x = Tensor(X, True)
        y = F.linear(x, Tensor(W), compute=arithmetic)
        found.append((y.numpy().tobytes(), gradient((y * Tensor(dY)).sum(), x).tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@ANY_ARITHMETIC
def test_quantized_linear_of_half_weights_is_linear_of_their_values(
    compute: str, kind: str, backend: Backend
) -> None:
    half = encode_half(backend.from_numpy(randoms(9, 20, seed=1)), kind)
    X, dY = (Tensor(backend.from_numpy(a), True) for a in (randoms(7, 20), randoms(7, 9, seed=2)))
    stored = quantized_linear(X, HalfWeight(half), compute=compute)
    dense = F.linear(X, Tensor(half.decode()), compute=compute)
    W = host(backend, half.decode()).astype(np.float64)
    for by_weight in (stored, dense):
        dx = gradient((by_weight * dY).sum(), X)
        Xr, dYr, Wr = (rounded(a, compute) for a in (X.numpy(), dY.numpy(), W.astype(np.float32)))
        for found, a, b in ((by_weight.data, Xr, Wr.T), (dx, dYr, Wr)):
            slack = device_slack(backend, compute, a, b)
            assert (abs(host(backend, found) - a @ b) <= product_bound(a, b) + slack).all()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far."""
    names: list[str] = []
    launch = Kernels.launch

    def noting(self: Kernels, name: str, *rest: Any) -> None:
        names.append(name)
        launch(self, name, *rest)

    monkeypatch.setattr(Kernels, "launch", noting)
    return names


@pytest.mark.gpu
def test_bfloat16_products_decode_no_bfloat16_weight(launched: list[str]) -> None:
    gpu = get_backend("cuda")
    weight = HalfWeight(encode_half(gpu.from_numpy(randoms(9, 20)), "bfloat16"))
    x = Tensor(gpu.from_numpy(randoms(7, 20)), True)
    gradient(quantized_linear(x, weight, compute="bfloat16").sum(), x)
    assert launched == ["narrow_bfloat16"] * 2
    launched.clear()
    gradient(F.linear_cross_entropy(x, weight, np.arange(7), compute="bfloat16"), x)
    assert launched.count("narrow_bfloat16") == 2
    assert "widen_bfloat16" not in launched


# ---- the loss of a head --------------------------------------------------------------------------


@ANY_ARITHMETIC
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("is_half", [False, True])
def test_linear_cross_entropy_rounds_logits_and_their_gradient(
    compute: str, reduction: str, is_half: bool, backend: Backend
) -> None:
    X, W = 3 * randoms(11, 8), randoms(13, 8, seed=1)
    W[4] = 9 * X[2]  # a target that is nearly certain: p - 1 must not be rounded as p
    t = np.random.default_rng(0).integers(0, 13, 11)
    t[2] = 4
    t[[1, 7]] = -100
    X[1] = np.nan  # is not read
    head: Any = Tensor(backend.from_numpy(W))
    if is_half:
        head = HalfWeight(encode_half(head.data, "bfloat16"))
        W = head.numpy()
    x = Tensor(backend.from_numpy(X), True)
    loss = F.linear_cross_entropy(x, head, t, reduction=reduction, compute=compute)
    dx = host(backend, gradient(loss, x))

    Xr, Wr = rounded(np.nan_to_num(X), compute), rounded(W, compute)
    Z = Xr @ Wr.T
    share = 1 / 9 if reduction == "mean" else 1.0
    logits = Tensor(Z, True)
    expected = F.cross_entropy(logits, t, reduction=reduction)
    dZ = gradient(expected, logits)
    z_error = (product_bound(Xr, Wr.T) + device_slack(backend, compute, Xr, Wr.T)).max() + 99 * U
    assert loss.item() == pytest.approx(expected.item(), abs=share * 9 * 2 * z_error)
    # Logits that are off by z change p, and 1 - p, by factors up to exp(2 z); dZ is rounded once.
    step = 2.0 ** -(MANTISSA[compute] + 1)
    bound = (1.01 * (step + 2.1 * z_error + 26 * U) * abs(dZ) + 4 * U * share) @ abs(Wr)
    bound += device_slack(backend, compute, dZ, Wr)
    assert (abs(dx - dZ @ Wr) <= bound).all()
    assert not dx[[1, 7]].any()


@ANY_ARITHMETIC
def test_linear_cross_entropy_rounded_in_blocks_is_that_at_once(
    compute: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a head that trains is not rounded."""
    X, W = randoms(11, 8), randoms(6, 8, seed=1)
    t = np.array([0, 5, -100, 2, 3, 1, 1, 0, -100, 4, 4])
    found = []
    for logits in (6 * 11, 18):
        monkeypatch.setattr(backend, "sizes", backend.sizes._replace(loss_logits=logits))
        x, head = (Tensor(backend.from_numpy(a), True) for a in (X, W))
        loss = F.linear_cross_entropy(x, head, t, compute=compute)
        found.append([loss.numpy(), *(host(backend, g) for g in gradients(loss, [x, head]))])
    for whole, blocks in zip(*found, strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=0, atol=64 * U * abs(whole).max())
    Z = Tensor(rounded(X, compute) @ rounded(W, compute).T, True)
    dZ = gradient(F.cross_entropy(Z, t), Z)
    slack = 2.0 ** -MANTISSA[compute] if backend.name.startswith("cuda") else 0
    np.testing.assert_allclose(found[0][2], dZ.T @ X, atol=64 * U + 8 * slack)


@ANY_ARITHMETIC
def test_linear_cross_entropy_loses_what_only_exact_products_keep(
    compute: str, backend: Backend
) -> None:
    """Both words have probability 1/2, so dx is half of the second row less half of the first."""
    if backend.name.startswith("cuda") and not cupy_on_cpu.is_installed():
        pytest.skip("a GPU may compute better than it must")
    lost = np.float32(2.0 ** -(MANTISSA[compute] + 2))
    x = Tensor(backend.from_numpy(np.zeros((1, 1), np.float32)), True)
    head = Tensor(backend.from_numpy(np.array([[1 + lost], [0]], np.float32)))
    for arithmetic, expected in (("float32", -(1 + lost) / 2), (compute, -0.5)):
        loss = F.linear_cross_entropy(x, head, np.array([0]), compute=arithmetic)
        assert host(backend, gradient(loss, x)).item() == expected


def test_linear_cross_entropy_rounded_of_no_target_is_0(backend: Backend) -> None:
    x = Tensor(backend.from_numpy(randoms(3, 4)), True)
    head = Tensor(backend.from_numpy(randoms(5, 4)))
    for t in (np.full(3, -100), np.full(0, -100)):
        rows = x[: len(t)]
        loss = F.linear_cross_entropy(rows, head, t, compute="tf32")
        assert loss.item() == 0
        assert not host(backend, gradient(loss, x)).any()
