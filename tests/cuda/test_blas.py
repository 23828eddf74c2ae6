"""Products by cuBLAS: right for any layout, without copies, in graphs, and with clear errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy_on_cpu
import numpy as np
import pytest
from cupy_on_cpu import counted
from hypothesis import given
from hypothesis import strategies as st

from minilora.backend import Backend, get_backend
from minilora.cuda.blas import LARGEST, NOTHING, plan_product, product_shape
from minilora.errors import ConfigError, DeviceError

FLOATS = (np.float32, np.float64)


@pytest.fixture
def xp() -> Any:
    return get_backend("cuda").xp


# ---- a view of any layout ------------------------------------------------------------------------


class Layout(NamedTuple):
    """How an array is cut out of memory: the memory's axes, and what of them the array has.

    order      the array's axes as the memory has them
    pads       for each axis of the memory: numbers before and behind
    steps      for each: the distance of two neighbours, negative for the reverse order
    repeated   for each axis of the array: is it one, repeated by a stride of 0?
    """

    order: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    repeated: tuple[bool, ...]

    def memory_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = [1 if again else n for n, again in zip(shape, self.repeated, strict=True)]
        parts = zip((sizes[i] for i in self.order), self.pads, self.steps, strict=True)
        return tuple(first + n * abs(step) + last for n, (first, last), step in parts)

    def cut(self, xp: Any, memory: Any, shape: tuple[int, ...]) -> Any:
        """The array of `shape` in this memory."""
        keys = []
        for (first, last), step, size in zip(self.pads, self.steps, memory.shape, strict=True):
            inside = range(first, size - last, abs(step))[:: 1 if step > 0 else -1]
            stop = inside.stop if inside.stop >= 0 else None
            keys.append(slice(inside.start, stop, inside.step) if len(inside) else slice(0, 0))
        kept = memory[tuple(keys)].transpose(tuple(np.argsort(self.order)))
        return xp.broadcast_to(kept, shape) if any(self.repeated) else kept


@st.composite
def layouts(draw: st.DrawFn, ndim: int, may_repeat: bool = True) -> Layout:
    plain = draw(st.booleans())
    pads = st.just((0, 0)) if plain else st.tuples(st.integers(0, 2), st.integers(0, 2))
    steps = st.just(1) if plain else st.sampled_from([1, 1, 1, 2, -1])
    repeated = st.sampled_from([False, False, True]) if may_repeat else st.just(False)
    times = {"min_size": ndim, "max_size": ndim}
    in_order = [*range(ndim)]
    orders = [in_order, [*in_order[:-2], ndim - 1, ndim - 2]]
    return Layout(
        tuple(draw(st.one_of(st.sampled_from(orders), st.permutations(in_order)))),
        tuple(draw(st.lists(pads, **times))),
        tuple(draw(st.lists(steps, **times))),
        tuple(draw(st.lists(repeated, **times))),
    )


class Case(NamedTuple):
    shapes: tuple[Any, Any, Any]
    layouts: tuple[Layout, Layout, Layout]
    scale: float
    beta: float
    dtype: type
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.integers(1, 6)
    M, K, N, *full = draw(st.lists(sizes, min_size=3, max_size=6))
    empty = draw(st.integers(0, 29))
    M, K, N = (0 if i == empty else n for i, n in enumerate((M, K, N)))
    shapes = []
    for last in ((M, K), (K, N)):
        batch = [draw(st.sampled_from([n, n, 1])) for n in full]
        shapes.append((*batch[draw(st.integers(0, len(batch))) :], *last))
    out = product_shape(*shapes)
    return Case(
        (*shapes, out),
        (
            draw(layouts(len(shapes[0]))),
            draw(layouts(len(shapes[1]))),
            draw(layouts(len(out), False)),
        ),
        draw(st.sampled_from([1.0, 0.75, -2.0])),
        draw(st.sampled_from([0.0, 1.0, -0.5])),
        draw(st.sampled_from(FLOATS)),
        draw(st.integers(0, 99)),
    )


@pytest.mark.gpu
@given(cases())
def test_product_is_numpy_s_for_any_layout(case: Case) -> None:
    gpu = get_backend("cuda")
    rng = np.random.default_rng(case.seed)
    hosts = []
    devices = []
    memories = []
    for shape, layout in zip(case.shapes, case.layouts, strict=True):
        memory = rng.standard_normal(layout.memory_shape(shape)).astype(case.dtype)
        on_device = gpu.from_numpy(memory)
        hosts.append(layout.cut(np, memory, shape))
        devices.append(layout.cut(gpu.xp, on_device, shape))
        memories.append((memory, on_device))
    wide = [x.astype(np.float64) for x in hosts]
    expected = case.scale * (wide[0] @ wide[1]) + case.beta * wide[2]
    # Each of K terms is rounded in the product and in the sum, then the two factors and their sum.
    unit = np.finfo(case.dtype).eps / 2
    size = abs(case.scale) * (abs(wide[0]) @ abs(wide[1])) + abs(case.beta) * abs(wide[2])
    bound = (2 * case.shapes[0][-1] + 4) * unit * size
    if not case.beta:
        devices[2][...] = np.nan  # is not read
    result = gpu.blas.product(*devices, case.scale, case.beta)
    assert result is devices[2]
    got = gpu.to_numpy(result)
    assert got.dtype == case.dtype
    assert (np.abs(got - expected) <= bound).all()
    # What the layout leaves out of memory is untouched.
    hosts[2][...] = got
    assert gpu.to_numpy(memories[2][1]).tobytes() == memories[2][0].tobytes()


# ---- without a copy ------------------------------------------------------------------------------

B, T, S, K, G, D = (
    2,
    5,
    6,
    3,
    2,
    4,
)  # of attention: batch, queries, keys, heads of keys, groups, size


def attention_arrays(xp: Any) -> dict[str, Any]:
    """As attention has them: k (B, S, K, D), q (B, T, K G, D), scores in memory (B, S, K G T)."""
    rng = np.random.default_rng(0)

    def by_head(z: Any) -> Any:
        return z.reshape(B, z.shape[1], K, z.shape[2] // K, D).transpose(0, 2, 3, 1, 4)

    k = xp.asarray(rng.standard_normal((B, S, K, D)))
    q = xp.asarray(rng.standard_normal((B, T, K * G, D)))
    scores = xp.zeros((B, S, K * G * T)).reshape(B, S, K, G, T).transpose(0, 2, 3, 1, 4)
    return {"k": by_head(k), "q": by_head(q), "scores": scores, "keys": k[0], "queries": q[0]}


def operands(xp: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    arrays = {"M": (6, 8), "N": (8, 6), "V": (2, 6, 8), "X": (9, 8), "P": (2, 3, 6, 8)}
    arrays |= {"Q": (2, 3, 8, 5), "row": (1, 8), "column": (8, 1), "one": (1, 1)}
    made = {name: xp.asarray(rng.standard_normal(shape)) for name, shape in arrays.items()}
    return {**made, **attention_arrays(xp), "xp": xp}


ONE_PRODUCT = [
    "M, N",
    "M, M.T",
    "M.T, M",
    "N.T, M.T",
    "M[:, 2:5], N[1:4]",
    "M[::2], N",
    "M[1::2].T, M[::2]",
    "M, N[:, 1:3]",
    "X, V.swapaxes(-1, -2)",  # one X for several weights
    "X[None], V.swapaxes(-1, -2)",
    "xp.broadcast_to(X, (2, 9, 8)), V.swapaxes(-1, -2)",
    "V[:, :, 1:4].swapaxes(-1, -2), V[:, :, 4:]",
    "V[::-1][::-1], N",
    "P, Q",
    "P, N",
    "P[:, :1], Q[:, :1]",
    "P[1:], Q[0]",
    "P.swapaxes(-1, -2)[:, :, 1:], P",
    "row, column",
    "column, row",
    "one, row",
    "column.T, N",
    "M[:, :1], N[:1]",
    "M[:1], N[:, ::2][:, :1]",
    "M[:, 1::3][:, :1].T, M",
    "q[:1, :1], k[:1, :1].swapaxes(-1, -2)",
    "keys.transpose(1, 0, 2), queries.reshape(T, K, G, D)[:, :, 0].transpose(1, 2, 0)",
]
SIZES = {"T": T, "K": K, "G": G, "D": D}


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("expression", ONE_PRODUCT)
def test_product_of_what_cublas_can_address_is_one_call(expression: str, xp: Any) -> None:
    gpu = get_backend("cuda")
    a, b = eval(expression, {**operands(xp), **SIZES})
    with counted() as device:
        y = gpu.matmul(a, b)
    assert device.counts._replace(allocations=0) == (0, 1, 0, 0, 0, 0, 0, 0, 0)
    np.testing.assert_allclose(y.get(), a.get() @ b.get(), rtol=1e-13, atol=1e-13)
    y[...] = 3
    with counted() as device:
        gpu.add_matmul(y, a, b, 0.5)
    assert device.counts._replace(allocations=0) == (0, 1, 0, 0, 0, 0, 0, 0, 0)
    np.testing.assert_allclose(y.get(), 3 + a.get() @ b.get() / 2, rtol=1e-13, atol=1e-13)
    # The result stored by columns, and as a slice of columns.
    by_columns = xp.empty((*y.shape[:-2], *y.shape[:-3:-1])).swapaxes(-1, -2)
    sliced = xp.empty((*y.shape[:-1], y.shape[-1] + 3))[..., 1:-2]
    for out in (by_columns, sliced):
        with counted() as device:
            assert gpu.matmul(a, b, out=out) is out
        assert (device.operations, device.products) == (1, 1)
        np.testing.assert_allclose(out.get(), a.get() @ b.get(), rtol=1e-13, atol=1e-13)


# (product, launches and copies, calls)
OTHERS = [
    ("k, q.swapaxes(-1, -2), scores", 0, B * G),  # no two of the three axes continue each other
    ("scores.swapaxes(-1, -2), k, None", 0, B * G),
    ("P.swapaxes(0, 1), Q.swapaxes(0, 1), xp.empty((2, 3, 6, 5)).swapaxes(0, 1)", 0, 1),
    ("P.swapaxes(0, 1), Q.swapaxes(0, 1), None", 0, 2),
    ("M[:, ::2], N[::2], None", 1, 1),  # neither rows nor columns are contiguous
    ("M[:, ::-1], N, None", 1, 1),
    ("M[::-1], N[:, ::2], None", 2, 1),
    ("M, N, xp.empty((6, 12))[:, ::2]", 1, 1),
    ("xp.broadcast_to(row[0, 0], (6, 8)), N, None", 1, 1),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("expression", "copies", "calls"), OTHERS)
def test_product_loops_over_axes_and_copies_only_what_it_must(
    expression: str, copies: int, calls: int, xp: Any
) -> None:
    gpu = get_backend("cuda")
    a, b, out = eval(expression, {**operands(xp), **SIZES})
    with counted() as device:
        y = gpu.matmul(a, b, out=out)
    assert (device.products, device.operations) == (calls, calls + copies)
    np.testing.assert_allclose(y.get(), a.get() @ b.get(), rtol=1e-13, atol=1e-13)


@pytest.mark.gpu
def test_product_into_an_operand_s_memory_is_that_of_copies(xp: Any) -> None:
    gpu = get_backend("cuda")
    M = xp.asarray(np.random.default_rng(0).standard_normal((7, 7)))
    cases = [(M, M + 1, M), (M + 1, M, M), (M, M, M[::-1]), (M[1:], M.T, M[:-1])]
    for a, b, out in [*cases, (M[:-1], M + 1, M[1:])]:
        expected = a.get() @ b.get()
        np.testing.assert_allclose(gpu.matmul(a, b, out=out).get(), expected, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "shapes", [((0, 3), (3, 4)), ((2, 3), (3, 0)), ((0, 2, 3), (3, 4))], ids=str
)
def test_product_with_an_empty_result_asks_for_nothing(shapes: Any, xp: Any) -> None:
    a, b = (xp.zeros(shape) for shape in shapes)
    with counted() as device:
        y = get_backend("cuda").matmul(a, b)
        get_backend("cuda").blas.product(a, b, y, beta=0.5)
    assert y.shape == product_shape(*shapes)
    assert device.operations == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FLOATS, np.uint16])
@pytest.mark.parametrize(("beta", "expected"), [(0.0, 0.0), (1.0, 6.0), (0.5, 3.0)])
def test_product_of_no_terms_is_beta_times_out(
    beta: float, expected: float, dtype: Any, xp: Any
) -> None:
    out = xp.full((2, 3, 4), 6, np.float32)
    out = to_bfloat16(out) if dtype is np.uint16 else out.astype(dtype)
    a = xp.zeros((2, 3, 0), dtype)
    get_backend("cuda").blas.product(a, xp.zeros((0, 4), dtype), out, 1.0, beta)
    got = from_bfloat16(out) if dtype is np.uint16 else out
    assert (got == expected).all()


# ---- arithmetic ----------------------------------------------------------------------------------


def to_bfloat16(x: Any) -> Any:
    """float32 cut to bfloat16's bits."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(codes: Any) -> Any:
    return (codes.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("out", [np.float32, np.uint16])
@pytest.mark.parametrize("turned", [False, True])
def test_product_of_bfloat16_is_that_of_the_widened(turned: bool, out: Any, xp: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 40), (6, 40)) if turned else ((2, 5, 40), (40, 6))
    codes = [to_bfloat16(xp.asarray(rng.standard_normal(s).astype(np.float32))) for s in shapes]
    a, b = codes[0], codes[1].T if turned else codes[1]
    wide = [from_bfloat16(x).get().astype(np.float64) for x in (codes[0], codes[1])]
    wide[1] = wide[1].T if turned else wide[1]
    if out is np.float32:
        y = get_backend("cuda").blas.product(a, b)
    else:
        y = get_backend("cuda").blas.product(a, b, xp.empty((2, 5, 6), np.uint16))
    assert y.dtype == out
    got = (y if out is np.float32 else from_bfloat16(y)).get()
    unit = 2.0**-24 if out is np.float32 else 2.0**-8
    bound = 2 * 40 * 2.0**-24 + unit
    assert (abs(got - wide[0] @ wide[1]) <= bound * (abs(wide[0]) @ abs(wide[1]))).all()


@pytest.mark.gpu
def test_product_of_float16_is_that_of_the_widened(xp: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((5, 40), (40, 6)))
    y = get_backend("cuda").blas.product(xp.asarray(a), xp.asarray(b))
    assert y.dtype == np.float32
    wide = a.astype(np.float64), b.astype(np.float64)
    bound = 81 * 2.0**-24 * (abs(wide[0]) @ abs(wide[1]))
    assert (abs(y.get() - wide[0] @ wide[1]) <= bound).all()


MANTISSAS = {None: 23, "float32": 23, "tf32": 10, "bfloat16": 7}


@pytest.mark.gpu
@pytest.mark.parametrize("compute", MANTISSAS)
@pytest.mark.parametrize("is_new", [True, False])
def test_product_rounds_as_its_arithmetic_says(is_new: bool, compute: str | None, xp: Any) -> None:
    bits = MANTISSAS[compute]
    rng = np.random.default_rng(0)
    hosts = [rng.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (64, 64))]
    out = None if is_new else xp.empty((64, 64), np.float32)
    y = get_backend("cuda").blas.product(*map(xp.asarray, hosts), out, compute=compute).get()
    a, b = (x.astype(np.float64) for x in hosts)
    size = abs(a) @ abs(b)
    error = abs(y - a @ b)
    # Both operands lose at most 2^-bits, if the rest is cut off.
    rounding = 2.01 * 2.0**-bits if bits < 23 else 0
    assert (error <= (129 * 2.0**-24 + rounding) * size).all()
    if cupy_on_cpu.is_installed() and bits < 23:  # a real cuBLAS may compute better than it must
        assert error.max() > 2.0 ** -(bits + 5) * size.min()


@pytest.mark.gpu
def test_product_refuses_other_arithmetic_and_dtypes(xp: Any) -> None:
    product = get_backend("cuda").blas.product
    a = xp.ones((2, 2), np.float32)
    with pytest.raises(ConfigError, match=r"compute='fp8' .*expected float32 or tf32 or bfloat16$"):
        product(a, a, compute="fp8")
    with pytest.raises(
        ConfigError, match="compute='tf32' for operands of float64: expected float64"
    ):
        product(a.astype(np.float64), a.astype(np.float64), compute="tf32")
    with pytest.raises(ConfigError, match=r"operands of uint16: expected float32$"):
        product(a.astype(np.uint16), a.astype(np.uint16), compute="bfloat16")
    for other in (np.uint16, np.float64, np.int32, np.complex64):
        with pytest.raises(TypeError, match="two operands of one dtype, float32 to float32"):
            product(a, a.astype(other))
    with pytest.raises(TypeError, match="with a result of float64"):
        product(a, a, xp.empty((2, 2)))


SHAPES = [((2, 3), (4, 5)), ((2, 3, 4), (3, 4, 5)), ((2, 2, 3), (3, 2, 2))]


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_matmul_names_shapes_that_do_not_fit(shapes: Any, xp: Any) -> None:
    gpu = get_backend("cuda")
    a, b = (xp.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"matmul: expected \(\.\.\., M, K\) and .* got \(2, "):
        gpu.matmul(a, b)
    with pytest.raises(ValueError, match=r"out must have the shape \(2, 5\), got \(2, 6\)"):
        gpu.matmul(xp.ones((2, 3)), xp.ones((3, 5)), out=xp.ones((2, 6)))
    with pytest.raises(ValueError, match=r"out must have the shape \(2, 5\), got \(3, 2, 5\)"):
        gpu.add_matmul(xp.ones((3, 2, 5)), xp.ones((2, 3)), xp.ones((3, 5)))


@pytest.mark.gpu
def test_matmul_leaves_vectors_integers_and_mixed_dtypes_to_cupy(
    monkeypatch: pytest.MonkeyPatch, xp: Any
) -> None:
    gpu = get_backend("cuda")
    M = xp.arange(6).reshape(2, 3)
    floats = M.astype(np.float32)
    pairs = [(floats[0], floats.T), (floats, floats[0]), (floats[0], floats[0])]
    pairs += [(floats, floats.T.astype(np.float64)), (M, floats.T)]
    for a, b in pairs:
        y = gpu.matmul(a, b, scale=2)
        assert y.dtype == (a @ b).dtype
        assert y.tolist() == (2 * (a.get() @ b.get())).tolist()
    asked = []
    monkeypatch.setattr(Backend, "matmul", lambda self, *arrays, **options: asked.append(arrays))
    gpu.matmul(M, M.T)  # 2-d products of integers are not emulated
    assert len(asked) == 1
    monkeypatch.undo()
    with pytest.raises(ValueError):
        gpu.matmul(floats[0, 0], floats)
    with pytest.raises(TypeError):
        gpu.matmul(floats, np.ones((3, 2), np.float32))


# ---- plans: no device is needed ------------------------------------------------------------------


def view(*shape: int, itemsize: int = 4) -> Any:
    """A contiguous array as `plan_product` sees it; nothing is allocated."""
    strides = [itemsize]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(1, n))
    return shape, tuple(strides), itemsize


def test_plan_product_refuses_sizes_beyond_cublas_integers() -> None:
    n = LARGEST + 1
    for a, b in (((n, 2), (2, 1)), ((1, n), (n, 1)), ((1, 2), (2, n)), ((n, 1, 2), (2, 1))):
        with pytest.raises(
            DeviceError, match=f"{n}.* too large for cuBLAS, .* {LARGEST}: multiply"
        ):
            plan_product(view(*a), view(*b), view(*product_shape(a, b)))
    shape, (_, column), itemsize = view(2, 3)
    far = shape, (4 * n, column), itemsize  # the distance of two rows
    with pytest.raises(DeviceError, match="too large"):
        plan_product(far, view(3, 2), view(2, 2))
    n = LARGEST
    plan = plan_product(view(n, 1, 4), view(4, 2), view(n, 1, 2))
    assert plan is not None
    assert plan.together == n


def test_plan_product_has_none_for_reverse_orders_which_cublas_does_not_document() -> None:
    shape, strides, itemsize = view(5, 3, 2)
    for axis in range(3):
        reverse = tuple(-s if i == axis else s for i, s in enumerate(strides))
        assert plan_product((shape, reverse, itemsize), view(2, 6), view(5, 3, 6)) is None


def test_plan_product_has_none_for_strides_between_numbers() -> None:
    assert plan_product(((3, 2), (9, 4), 4), view(2, 6), view(3, 6)) is None
    assert plan_product(((5, 3, 2), (25, 8, 4), 4), view(2, 6), view(5, 3, 6)) is None


def test_plan_product_needs_one_call_for_axes_that_continue_each_other() -> None:
    plan = plan_product(view(5, 4, 3, 2), view(5, 4, 2, 6), view(5, 4, 3, 6))
    assert plan is not None
    assert (plan.together, plan.starts) == (20, ((0, 0, 0),))
    assert plan.steps == (12, 6, 18)  # of b, a, out: by rows, b is the first


def test_plan_product_loops_over_the_shorter_axis() -> None:
    plan = plan_product(view(5, 1, 3, 2), view(1, 4, 2, 6), view(5, 4, 3, 6))
    assert plan is not None
    assert (plan.together, len(plan.starts)) == (5, 4)
    assert plan.starts[1] == (0, 2 * 6 * 4, 3 * 6 * 4)  # of a, b, out


def test_plan_product_of_an_empty_array_is_nothing() -> None:
    assert plan_product(view(0, 3), view(3, 2), view(0, 2)) is NOTHING
    assert plan_product(view(4, 0), view(0, 2), view(4, 2)) is NOTHING


def test_plan_product_has_none_for_products_at_one_place() -> None:
    shape, strides, itemsize = view(5, 3, 6)
    out = shape, (0, *strides[1:]), itemsize
    assert plan_product(view(5, 3, 2), view(2, 6), out) is None
