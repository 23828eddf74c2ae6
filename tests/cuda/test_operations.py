"""Each kernel in the place of a reference body, beside that body in float64 on the CPU.

Bounds are relative to the largest number of a result, or to 1, the scale of the inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operations import block_sizes

from minilora import functional, losses, precision
from minilora.autograd import Tensor, gradients
from minilora.backend import NUMPY, Backend, get_backend, gpus, mix_key
from minilora.cuda import launching
from minilora.cuda.launching import Kernels
from minilora.cuda.operations import OPERATIONS, kernels_of
from minilora.lora import dora
from minilora.quant import codes, half

pytestmark = pytest.mark.gpu
BOUNDS = {"float64": 2e-12, "float32": 2e-6}
SOURCE = Path(launching.__file__).with_name("kernels.cu").read_text(encoding="utf-8")
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\w+\)\s*)?(\w+)\(')
# The operations and kernels that other files test.
ELSEWHERE = {
    "cuda/test_launching.py": {"add_rows", "row_dot"},
    "cuda/test_optimizer.py": {"_clip", "sum_squares", "clip_factor", "scale_all"}
    | {"_adamw", "adamw"},
    "cuda/test_attention.py": {"_rotate_and_attend", "rotate", "attention"}
    | {"attention_dq", "attention_dkv", "_attend_newest", "attend_newest"},
    "models/test_captured.py": {"_pick_largest", "pick_largest"},
    "test_precision.py": {"narrow_bfloat16"},
}

# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A body with what it is tried on.

    inputs     inputs(rng, N, C): its arguments after the backend, floats in float64
    kernels    those that the forward launches, in order
    back       those that the backward launches
    others     what CuPy launches besides, products included; None: that depends on the products
    exact      whether the kernel must have the bits of the body in the same dtype
    """

    body: Callable[..., Any]
    variant: str
    inputs: Callable[[np.random.Generator, int, int], list[Any]]
    kernels: tuple[str, ...]
    back: tuple[str, ...] = ()
    others: int | None = 0
    exact: bool = False

    @property
    def id(self) -> str:
        return f"{self.body.__name__}-{self.variant}"


TABLE: list[Row] = []


def row(body: Callable[..., Any], variant: str, *rest: Any, **options: Any) -> None:
    TABLE.append(Row(body, variant, *rest, **options))


def matrix(rng: np.random.Generator, N: int, C: int) -> list[Any]:
    return [rng.standard_normal((N, C))]


def pair(rng: np.random.Generator, N: int, C: int) -> list[Any]:
    return [rng.standard_normal((2, N, C))]


row(functional._silu, "any", matrix, ("silu",), ("silu_back",))
row(functional._gelu, "any", matrix, ("gelu",), ("gelu_back",))
row(functional._gelu_tanh, "any", matrix, ("gelu_tanh",), ("gelu_tanh_back",))
row(functional._swiglu, "any", pair, ("swiglu",), ("swiglu_back",))


def dropout(p: float, first: int, step: int | None, start: int = 0) -> None:
    number = None if step is None else np.array([step], np.uint64)

    def inputs(rng: np.random.Generator, N: int, C: int) -> list[Any]:
        return [rng.standard_normal((N, C)), p, mix_key(5, 2**63), first, number, start]

    variant = f"{p}, {first}, {step}, {start}"
    row(functional._dropout, variant, inputs, ("dropout",), ("dropout",), exact=True)


dropout(0.1, 0, None)
dropout(0.5, 2**40, 2**64 - 1)
dropout(1 - 2**-40, 3, 7)
dropout(0.5, 3, 7, 2 * 11)


def norm(body: Callable[..., Any], name: str, *needed: bool) -> None:
    def inputs(rng: np.random.Generator, N: int, C: int) -> list[Any]:
        vectors = [rng.standard_normal(C) for _ in needed[1:]]
        return [rng.standard_normal((N, C)), *vectors, 1e-3, *needed]

    of_weights = ("norm_weights_back",) if any(needed[1:]) else ()
    of_x = (f"{name}_back",) if needed[0] else ()
    row(body, str(needed), inputs, (name,), of_weights + of_x)


for need_dx in (True, False):
    for need_dw in (True, False):
        norm(functional._rms_norm, "rms_norm", need_dx, need_dw)
        norm(functional._layer_norm, "layer_norm", need_dx, need_dw, need_dx)
        norm(functional._layer_norm, "layer_norm", need_dx, need_dw, not need_dx)


def targets(rng: np.random.Generator, N: int, V: int) -> np.ndarray:
    """One in four is ignored."""
    return np.where(rng.random(N) < 0.25, -100, rng.integers(0, V, N))


def loss(reduction: str, *needed: bool) -> None:
    forward = ("mean_weight",) if reduction == "mean" else ()

    def of_logits(rng: np.random.Generator, N: int, V: int) -> list[Any]:
        logits = 4 * rng.standard_normal((N, V))
        return [logits, targets(rng, N, V), -100, reduction, needed[0]]

    def of_a_head(rng: np.random.Generator, N: int, V: int) -> list[Any]:
        X = rng.standard_normal((N, 5))
        head = Tensor(rng.standard_normal((V, 5)))
        return [X, head, targets(rng, N, V), -100, reduction, *needed]

    variant = f"{reduction}, {needed}"
    names = (*forward, "cross_entropy", "add_up")
    if len(set(needed)) == 1:
        row(losses._cross_entropy, variant, of_logits, names, (), int(needed[0]))
    row(losses._linear_cross_entropy, variant, of_a_head, names, (), None)


for reduction in ("mean", "sum"):
    for need_dx in (True, False):
        for need_dw in (True, False):
            loss(reduction, need_dx, need_dw)


def scaled_rows(rng: np.random.Generator, N: int, C: int) -> list[Any]:
    V = rng.standard_normal((N, C))
    m = rng.standard_normal(N)
    V[1:2] = 0  # its scale is 1
    m[2:3] = 0  # its scale is the least one
    return [V, m, np.zeros((N, C)), 2.0**-80]


def magnitudes(rng: np.random.Generator, N: int, C: int) -> list[Any]:
    m, norms = rng.standard_normal(C), 0.1 + rng.random(C)
    norms[1:2] = 0  # its scale is 1
    return [m, norms]


def outputs(rng: np.random.Generator, N: int, C: int) -> list[Any]:
    dY, Y, k, norms = (rng.standard_normal(shape) for shape in ((N, C), (N, C), C, C))
    norms[1:2] = 0
    return [dY, Y, np.sign(k) + k, np.abs(norms) + (norms != 0)]


row(dora._row_scales, "any", magnitudes, ("row_scales",), ("row_scales_back",))
row(dora._row_norms, "any", matrix, ("scale_rows",))
row(dora._scale_rows, "any", scaled_rows, ("scale_rows",))
row(dora._magnitude_gradient, "any", outputs, ("magnitudes_back",))


def quantized(kind: str, block_size: int, double_quant: bool) -> None:
    def inputs(rng: np.random.Generator, N: int, C: int) -> list[Any]:
        values = rng.standard_normal((max(1, N), C)) * 10.0 ** rng.integers(-9, 9, (max(1, N), 1))
        return [codes.encode(values, kind, block_size, double_quant), np.dtype("float64")]

    variant = f"{kind}, {block_size}, {double_quant}"
    row(codes._decode, variant, inputs, ("decode",), exact=True)


for kind in codes.KINDS:
    quantized(kind, 32, False)
    quantized(kind, 64, True)


def bfloat16(rng: np.random.Generator, N: int, C: int) -> list[Any]:
    return [rng.integers(0, 2**16, (N, C)).astype(np.uint16) & 0x7FFF | 0x80, np.dtype("float64")]


row(precision.widen_bfloat16, "any", bfloat16, ("widen_bfloat16",), exact=True)

# ---- running a row -------------------------------------------------------------------------------


def strided(xp: Any, array: Any) -> Any:
    """The same numbers, two places apart."""
    wide = xp.empty((*array.shape, 2), array.dtype)
    wide[..., 0] = array
    return wide[..., 0]


def placed(value: Any, backend: Backend, dtype: str, apart: bool = False) -> Any:
    """An argument of a body on a device, in a dtype."""
    if isinstance(value, np.dtype):
        return np.dtype(dtype)
    if isinstance(value, codes.Quantized):
        return value.to(backend)
    if isinstance(value, Tensor):
        return Tensor(placed(value.data, backend, dtype, apart))
    if not isinstance(value, np.ndarray):
        return value
    array = backend.from_numpy(value.astype(dtype) if value.dtype.kind == "f" else value)
    return strided(backend.xp, array) if apart else array


def results(
    row: Row, backend: Backend, arguments: list[Any], dtype: str, apart: bool = False
) -> list[np.ndarray]:
    """What a body gives, and the gradients that follow from it, on the host."""
    placed_arguments = [placed(a, backend, dtype, apart) for a in arguments]
    with np.errstate(all="ignore"):
        found = backend.run(row.body, *placed_arguments)
        arrays: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
        if callable(arrays[-1]):
            y, back = arrays
            dy = np.asarray(np.random.default_rng(1).standard_normal(y.shape))
            is_used = row.body is not losses._cross_entropy or arguments[-1]
            grads = back(placed(dy, backend, dtype, apart and dy.ndim > 0)) if is_used else ()
            arrays = y, *(grads if isinstance(grads, tuple) else (grads,))
    arrays = (*arrays, *(a for a in placed_arguments[2:3] if row.body is dora._scale_rows))
    return [backend.to_numpy(a) for a in arrays if a is not None]


def assert_row_is_right(row: Row, N: int, C: int, dtype: str, apart: bool = False) -> None:
    """The kernel equals the body in float64 on the same inputs; twice, with the same bits."""
    gpu = get_backend("cuda")
    arguments = row.inputs(np.random.default_rng([N, C]), N, C)
    rounded = [placed(a, NUMPY, dtype) for a in arguments]
    expected = results(row, NUMPY, rounded, dtype if row.exact else "float64")
    got = results(row, gpu, arguments, dtype, apart)
    again = results(row, gpu, arguments, dtype, apart)
    for mine, second, reference in zip(got, again, expected, strict=True):
        assert mine.shape == reference.shape
        assert mine.dtype == dtype
        assert mine.tobytes() == second.tobytes()
        if row.exact:
            assert mine.tobytes() == reference.tobytes()
            continue
        scale = max(1.0, float(np.abs(reference).max(initial=0)))
        assert np.abs(mine - reference).max(initial=0) <= BOUNDS[dtype] * scale


ROWS = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
DTYPES = pytest.mark.parametrize("dtype", BOUNDS)
SHAPES = [(0, 5), (1, 1), (3, 1000), (1, 4097), (257, 33)]


@ROWS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operations_of_a_gpu_are_their_bodies(row: Row, dtype: str, shape: tuple[int, int]) -> None:
    assert_row_is_right(row, *shape, dtype)


@ROWS
@DTYPES
def test_operations_of_a_gpu_take_arrays_that_are_not_contiguous(row: Row, dtype: str) -> None:
    assert_row_is_right(row, 5, 37, dtype, apart=True)


@given(st.sampled_from(TABLE), st.integers(0, 70), st.integers(1, 300), st.sampled_from([*BOUNDS]))
def test_operations_of_a_gpu_are_their_bodies_for_any_shape(
    row: Row, N: int, C: int, dtype: str
) -> None:
    assert_row_is_right(row, N, C, dtype)


# ---- what is launched ----------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far."""
    names: list[str] = []
    launch = Kernels.launch

    def noting(self: Kernels, name: str, blocks: int, *rest: Any) -> None:
        names.extend([name] * (blocks > 0))
        launch(self, name, blocks, *rest)

    monkeypatch.setattr(Kernels, "launch", noting)
    return names


@ROWS
@DTYPES
def test_operations_of_a_gpu_launch_what_the_table_says(
    row: Row, dtype: str, launched: list[str]
) -> None:
    gpu = get_backend("cuda")
    arguments = [placed(a, gpu, dtype) for a in row.inputs(np.random.default_rng(0), 6, 70)]
    shapes = {"_cross_entropy": (), "_row_scales": (70,)}
    dy = gpu.xp.ones(shapes.get(row.body.__name__, (6, 70)), dtype)
    codes._tables("dynamic", gpu)  # made when a layer moves to the device
    counting = cupy_on_cpu.is_installed()
    before = cupy_on_cpu.counting.now() if counting else None
    found = gpu.run(row.body, *arguments)
    assert launched == [*row.kernels]
    if isinstance(found, tuple) and callable(found[-1]) and (row.back or row.others):
        found[-1](dy)
    assert launched == [*row.kernels, *row.back]
    if counting and row.others is not None:
        after = cupy_on_cpu.counting.now()
        assert after.operations - before.operations == len(launched) + row.others


@ROWS
@DTYPES
def test_operations_of_a_gpu_write_nothing_beside_their_results(
    row: Row, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = get_backend("cuda")
    xp = gpu.xp
    wholes = []

    def empty(shape: Any, dtype: Any) -> Any:
        size = math.prod(np.atleast_1d(shape).tolist())
        whole = xp.full(size + 64, 7, dtype)
        wholes.append(whole)
        return whole[32 : 32 + size].reshape(shape)

    monkeypatch.setattr(xp, "empty", empty)
    monkeypatch.setattr(xp, "empty_like", lambda array: empty(array.shape, array.dtype))
    results(row, gpu, row.inputs(np.random.default_rng(0), 5, 37), dtype)
    assert wholes
    for whole in wholes:
        assert (gpu.to_numpy(whole)[[*range(32), *range(-32, 0)]] == 7).all()


def test_magnitude_gradient_of_a_gpu_reads_slices_of_columns_without_a_copy() -> None:
    """As layers that share an input have their outputs side by side."""
    gpu = get_backend("cuda")
    dY, Y, k, norms = (placed(a, gpu, "float64") for a in outputs(np.random.default_rng(0), 9, 40))
    contiguous = gpu.run(dora._magnitude_gradient, dY, Y, k, norms)
    wide = gpu.xp.full((9, 100), np.nan)
    wide[:, 7:47] = dY
    taller = gpu.xp.full((9, 60), np.nan)
    taller[:, 20:60] = Y
    counting = cupy_on_cpu.is_installed()
    before = cupy_on_cpu.counting.now() if counting else None
    sliced = gpu.run(dora._magnitude_gradient, wide[:, 7:47], taller[:, 20:60], k, norms)
    if counting:
        assert cupy_on_cpu.counting.now().operations - before.operations == 1
    assert gpu.to_numpy(sliced).tobytes() == gpu.to_numpy(contiguous).tobytes()


def test_table_has_every_operation_and_every_kernel() -> None:
    named = {row.body.__name__ for row in TABLE}
    named |= {name for row in TABLE for name in row.kernels + row.back}
    for names in ELSEWHERE.values():
        assert not named & names
        named |= names
    kernels = KERNEL.findall(SOURCE)
    assert len(kernels) == SOURCE.count('extern "C"')
    assert named == {*kernels, *OPERATIONS}


def test_operations_of_a_gpu_leave_other_dtypes_to_the_body(launched: list[str]) -> None:
    gpu = get_backend("cuda")
    X = gpu.xp.ones((2, 3), "float16")
    y, _ = gpu.run(functional._silu, X)
    assert y.dtype == "float16"
    X = gpu.xp.ones((2, 3), "float32")
    w = gpu.xp.ones(3, "float64")
    gpu.run(functional._rms_norm, X, w, 1e-6, True, True)
    assert not {"silu", "rms_norm"} & set(launched)


def test_operations_of_a_gpu_run_on_the_gpu_of_their_arrays() -> None:
    if len(gpus()) < 2:
        pytest.skip("there is one GPU only")
    first, second = (get_backend(name) for name in ("cuda:0", "cuda:1"))
    for row in TABLE:
        arguments = row.inputs(np.random.default_rng(0), 4, 70)
        found = []
        for gpu, other in ((first, second), (second, first)):
            there = [placed(a, gpu, "float32") for a in arguments]
            array = gpu.xp.zeros(1)
            other.select()
            assert kernels_of(gpu, array) is not None
            assert gpu.cupy.cuda.Device().id == gpu.device  # type: ignore[attr-defined]
            other.select()
            found.append([a.tobytes() for a in results(row, gpu, there, "float32")])
        assert found[0] == found[1]


# ---- what is not finite --------------------------------------------------------------------------

BAD = [np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0]


@DTYPES
@pytest.mark.parametrize("name", ["_silu", "_gelu", "_gelu_tanh", "_swiglu", "_dropout"])
def test_operations_of_a_gpu_treat_what_is_not_finite_as_the_body_does(
    name: str, dtype: str
) -> None:
    first = next(row for row in TABLE if row.body.__name__ == name)
    arguments = first.inputs(np.random.default_rng(0), 7, 7)
    arguments[0] = np.broadcast_to(np.array(BAD), arguments[0].shape).copy()
    if name == "_swiglu":
        arguments[0][1] = arguments[0][1].T
    expected = results(first, NUMPY, arguments, dtype)
    got = results(first, get_backend("cuda"), arguments, dtype)
    for mine, reference in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=BOUNDS[dtype], atol=1e-30)


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["_rms_norm", "_layer_norm", "_scale_rows", "_row_norms"])
def test_rows_of_a_gpu_that_are_not_finite_leave_the_others_alone(
    name: str, bad: float, dtype: str
) -> None:
    first = next(row for row in TABLE if row.body.__name__ == name)
    arguments = first.inputs(np.random.default_rng(0), 5, 70)
    arguments[0][3, 66] = bad
    expected = results(first, NUMPY, arguments, dtype)
    got = results(first, get_backend("cuda"), arguments, dtype)
    for mine, reference in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-4)


@DTYPES
def test_row_scales_of_a_gpu_are_nan_for_a_norm_that_is_not_finite(dtype: str) -> None:
    gpu = get_backend("cuda")
    m = placed(np.array([1.0, 2.0, 3.0, 4.0]), gpu, dtype)
    norms = placed(np.array([np.inf, np.nan, 0.0, 2.0]), gpu, dtype)
    k, _ = gpu.run(dora._row_scales, m, norms)
    assert gpu.to_numpy(k).tolist() == pytest.approx([np.nan, np.nan, 1.0, 2.0], nan_ok=True)


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [-np.inf] * 600, [np.inf, np.inf]])
@pytest.mark.parametrize("target", [0, 3, -100])
def test_cross_entropy_of_a_gpu_treats_what_is_not_finite_as_the_body_does(
    bad: list[float], target: int, reduction: str, dtype: str
) -> None:
    """The bad logits are in the row of this target, the first of them among them."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((4, 600))
    Z[2, : len(bad)] = bad
    t = np.array([1, -100, target, 5])
    gpu = get_backend("cuda")
    both = []
    for backend in (NUMPY, gpu):
        arguments = placed(Z, backend, dtype), placed(t, backend, dtype), -100, reduction, True
        with np.errstate(all="ignore"):
            y, back = backend.run(losses._cross_entropy, *arguments)
            both.append([backend.to_numpy(y), backend.to_numpy(back(backend.xp.ones((), dtype)))])
    for reference, mine in zip(*both, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_of_a_gpu_does_not_read_ignored_rows(
    reduction: str, dtype: str
) -> None:
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    X = rng.standard_normal((6, 5))
    X[[1, 4]] = np.nan
    head = rng.standard_normal((9, 5))
    for t in (np.array([3, -100, 0, 8, -100, 2]), np.full(6, -100)):
        found = []
        for backend in (NUMPY, gpu):
            there = (placed(a, backend, dtype) for a in (X, Tensor(head), t))
            options = -100, reduction, True, True
            found.append(backend.run(losses._linear_cross_entropy, *there, *options))
        for mine, reference in zip(found[1], found[0], strict=True):
            mine = gpu.to_numpy(mine)
            scale = max(1.0, float(np.abs(reference).max()))
            assert np.abs(mine - reference).max() <= BOUNDS[dtype] * scale
        assert not gpu.to_numpy(found[1][1])[[1, 4]].any()


@pytest.mark.parametrize("target", [7, -1, 2**62])
def test_cross_entropy_of_a_gpu_is_nan_for_a_target_outside(target: int) -> None:
    """Ids on a GPU are not checked: a loss that is NaN ends a run, and nothing outside is read."""
    gpu = get_backend("cuda")
    logits = Tensor(gpu.xp.zeros((2, 7)), True)
    loss = functional.cross_entropy(logits, gpu.from_numpy(np.array([3, target])))
    assert np.isnan(loss.item())
    (gradient,) = gradients(loss, [logits])
    assert np.isnan(gpu.to_numpy(gradient)).all(axis=1).tolist() == [False, True]


@DTYPES
@pytest.mark.parametrize("shift", [3e4, -3e4, -1e30])
def test_cross_entropy_of_a_gpu_is_right_for_logits_of_any_size(shift: float, dtype: str) -> None:
    """One logit of each row is 1e3 above the others, of which each thread of a block has some."""
    logits = np.tile(np.arange(600.0) / 600, (20, 1))
    logits[np.arange(20), 31 * np.arange(20)] += 1e3
    arguments = [shift + logits, np.full(20, 3), -100, "mean", True]
    first = next(row for row in TABLE if row.body is losses._cross_entropy)
    rounded = [placed(a, NUMPY, dtype) for a in arguments]
    expected = results(first, NUMPY, rounded, "float64")
    for mine, reference in zip(
        results(first, get_backend("cuda"), arguments, dtype), expected, strict=True
    ):
        np.testing.assert_allclose(mine, reference, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def test_linear_cross_entropy_of_a_gpu_in_blocks_is_that_at_once(launched: list[str]) -> None:
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    x, head = (Tensor(gpu.from_numpy(rng.standard_normal(s)), True) for s in ((11, 4), (6, 4)))
    t = gpu.from_numpy(targets(rng, 11, 6))
    whole = functional.linear_cross_entropy(x, head, t)
    assert launched.count("cross_entropy") == 1
    with block_sizes(gpu, loss_logits=18):  # three rows at a time
        blocks = functional.linear_cross_entropy(x, head, t)
    assert launched.count("cross_entropy") == 1 + 4
    assert blocks.item() == pytest.approx(whole.item(), rel=1e-14)
    for one, other in zip(*(gradients(y, [x, head]) for y in (whole, blocks)), strict=True):
        np.testing.assert_allclose(gpu.to_numpy(one), gpu.to_numpy(other), rtol=0, atol=1e-14)


# ---- stored weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", codes.KINDS)
def test_decode_of_a_gpu_has_the_body_s_bits_or_0_for_a_subnormal_number(kind: str) -> None:
    """A GPU's arithmetic takes subnormal numbers as 0: that is all that may differ."""
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    exponents = np.arange(-126, 128)[:, None]
    w = (rng.uniform(-0.9, 0.9, (254, 64)) * np.exp2(exponents)).astype(np.float32)
    there = codes.encode(w, kind, 64)
    reference = there.decode()
    decoded = gpu.to_numpy(there.to(gpu).decode())
    subnormal = np.abs(reference) < 2.0**-126
    assert decoded[~subnormal].tobytes() == reference[~subnormal].tobytes()
    assert ((decoded == reference) | (decoded == 0))[subnormal].all()
    assert subnormal.any()


def test_half_decode_of_a_gpu_has_the_body_s_bits_for_every_bfloat16() -> None:
    """In float64 a subnormal number may be 0."""
    gpu = get_backend("cuda")
    stored = half.Half("bfloat16", np.arange(2**16, dtype=np.uint16).reshape(256, 256))
    reference = stored.decode()
    decoded = gpu.to_numpy(stored.to(gpu).decode())
    assert decoded.tobytes() == reference.tobytes()
    wide = gpu.to_numpy(stored.to(gpu).decode(np.float64))
    subnormal = np.abs(reference) < 2.0**-126
    np.testing.assert_array_equal(wide[~subnormal], reference[~subnormal])
    assert ((wide == reference) | (wide == 0))[subnormal].all()
    rows = gpu.from_numpy(np.array([3, 250, 3]))
    picked = gpu.to_numpy(stored.to(gpu).decode(np.float32, rows))
    assert picked.tobytes() == reference[[3, 250, 3]].tobytes()
