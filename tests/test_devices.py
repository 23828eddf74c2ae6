"""The engine on every backend: NumPy, the strict replacement for CuPy, and a GPU if there is one.

On the replacement the arithmetic is NumPy's, so every result must have the same bits; on a GPU it
must be as near as the precision allows. The replacement also counts what moved: a training step
uploads its batch, downloads two numbers, and waits for nothing else.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import operations
import pytest
from edges import EDGES, Edge
from shapes import shape
from small import CONFIG
from strict_xp import METER, STRICT, counted, no_sync

from minilora import (
    CausalLM,
    LoraConfig,
    PeftModel,
    generate,
    get_peft_model,
    gradients,
    no_grad,
    quant,
    quantize,
)
from minilora.autograd import Tensor
from minilora.backend import NUMPY, Backend, get_backend, gpus
from minilora.data import Batch
from minilora.data.batches import IGNORE
from minilora.errors import DataError, DeviceError, GraphError, NonFiniteError
from minilora.functional import cross_entropy
from minilora.models.dialects import MODEL_TYPES
from minilora.models.generation import stream
from minilora.optim import SGD, AdamW, clip_by_global_norm
from minilora.training.loop import Run, Settings, evaluate, train
from minilora.training.parallel import ShardedStep, language_modelling_loss

DEVICES = ["strict", pytest.param("cuda", marks=pytest.mark.gpu)]  # compared with NumPy
# Sequences per shard. A GPU takes a batch whole, so NumPy must, too, to give the same bits.
WHOLE = 2**31
TEXT = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 600).astype(np.int32)


def backend_named(name: str) -> Backend:
    return STRICT if name == "strict" else get_backend(name)


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_named(request.param)


@pytest.fixture(params=["cpu", *DEVICES])
def any_backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy too, for tests that say what is right and not only that it is the same."""
    return backend_named(request.param)


def is_cuda(backend: Backend) -> bool:
    return backend.name.startswith("cuda")


def host(x: Any) -> np.ndarray:
    """An array, Tensor or number of any backend, on the host."""
    if isinstance(x, Tensor):
        x = x.data
    if np.isscalar(x) or isinstance(x, np.ndarray):
        return np.asarray(x)
    owner = STRICT if isinstance(x, STRICT.xp.ndarray) else get_backend("cuda")
    return owner.to_numpy(x)


def assert_agrees(
    mine: Any, reference: Any, backend: Backend, rounding: float = 1e-5, exact: bool = True
) -> None:
    """The same bits; on a GPU, or if not `exact`, within `rounding` of the largest value.

    `rounding` is for float32; float64 has 2^-29 of it.
    """
    mine = host(mine)
    reference = host(reference)
    assert mine.shape == reference.shape
    assert mine.dtype == reference.dtype
    rounds = is_cuda(backend) or not exact
    if rounds and reference.size and reference.dtype.kind == "f":
        bound = rounding * 2.0 ** (-29 if reference.dtype == np.float64 else 0)
        top = np.abs(reference[np.isfinite(reference)]).max(initial=0)
        np.testing.assert_allclose(mine, reference, rtol=0, atol=bound * max(top, 1e-30))
    else:
        assert mine.tobytes() == reference.tobytes()


def assert_all_agree(results: list[list[Any]], backend: Backend, rounding: float = 1e-5) -> None:
    """Two lists of results agree one by one."""
    for mine, reference in zip(*results, strict=True):
        assert_agrees(mine, reference, backend, rounding)


def lora_model(device: Any = "cpu", dropout: float = 0.0, **changes: Any) -> PeftModel:
    """Both factors random, so that no gradient is zero by chance."""
    options = {"r": 3, "target_modules": "all-linear", "lora_dropout": dropout}
    config = LoraConfig(**{**options, "init_lora_weights": False, **changes})
    return get_peft_model(CausalLM(CONFIG, seed=1, device=device), config, seed=2)


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


def assert_same_weights(
    mine: Any, reference: Any, backend: Backend, rounding: float = 1e-5
) -> None:
    mine = weights(mine)
    reference = weights(reference)
    assert list(mine) == list(reference)
    for name in mine:
        assert_agrees(mine[name], reference[name], backend, rounding)


# ---- operations ----------------------------------------------------------------------------------

# These operations upload arrays that they make on the host.
UPLOADS = {"index", "embedding", "cross_entropy", "linear_cross_entropy", "attention"}
UPLOADS |= {"effective_linear", "where"}
UPLOADS.add("gelu")  # its table of erf, once


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", operations.TABLE, ids=lambda op: op.id)
def test_operations_and_their_gradients_agree(
    op: operations.Operation, dtype: type, backend: Backend
) -> None:
    here = op.leaves(dtype)
    there = [t.to(backend) for t in op.leaves(dtype)]
    reference = op.function(*here)
    dy = np.asarray(np.random.default_rng(0).standard_normal(reference.shape), dtype)
    dy_there = backend.from_numpy(dy)
    with counted():
        mine = op.function(*there)
        grads = gradients(mine, there, dy_there)
        uploads = len(METER.uploads)
        waited = list(METER.syncs)
    assert mine.backend is backend
    # Hidden keys are left out on the host alone, where first_key is known: sums group otherwise.
    exact = not op.variant.startswith("records")
    assert_agrees(mine, reference, backend, exact=exact)
    for one, other in zip(grads, gradients(reference, here, dy), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_agrees(one, other, backend, exact=exact)
    assert uploads == 0 or op.name in UPLOADS
    # The number of True in a mask decides a shape.
    assert waited == [] or "mask" in op.variant


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.id)
def test_operations_at_their_edges_have_the_stated_values(edge: Edge, backend: Backend) -> None:
    leaves = [t.to(backend) for t in edge.leaves()]
    with np.errstate(all="ignore"):
        y = edge.function(*leaves)
        grads = gradients(y, leaves, backend.from_numpy(edge.dy))
    for mine, stated in zip([y, *grads], [edge.value, *edge.gradients], strict=True):
        np.testing.assert_allclose(host(mine), stated, rtol=1e-15, atol=0)


BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.matmul]


@pytest.mark.parametrize("combine", BINARY)
def test_operators_with_an_array_on_the_left_keep_the_graph(
    combine: Any, any_backend: Backend
) -> None:
    left = np.array([1.5, 2.0, 0.5], np.float32)
    right = np.array([2.0, -1.0, 3.0], np.float32)
    array = any_backend.from_numpy(left)
    x = Tensor(any_backend.from_numpy(right), True)
    reference = Tensor(right, True)
    operands = [(array, x, left), (np.float32(2), x, np.float32(2)), (np.float64(2), x, 2.0)]
    for a, t, on_host in operands[: 1 if combine is operator.matmul else 3]:
        y = combine(a, t)
        expected = combine(on_host, reference)
        assert isinstance(y, Tensor)
        assert y.backend is any_backend
        assert_agrees(y, expected, any_backend)
        dy = np.ones(y.shape, np.float32)
        (g,) = gradients(y, [x], any_backend.from_numpy(dy))
        (g_expected,) = gradients(expected, [reference], dy)
        assert_agrees(g, g_expected, any_backend)


COMPARE = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


@pytest.mark.parametrize("compare", COMPARE)
def test_comparisons_give_booleans_on_the_device(compare: Any, any_backend: Backend) -> None:
    left = np.array([1.0, 2.0, 3.0], np.float32)
    right = np.array([2.0, 2.0, 2.0], np.float32)
    array = any_backend.from_numpy(left)
    x = Tensor(any_backend.from_numpy(left), True)
    other = Tensor(any_backend.from_numpy(right), True)
    for a, b in ((x, other), (array, other), (x, other.data), (x, 2.0)):
        got = compare(a, b)
        assert type(got) is any_backend.xp.ndarray
        assert_agrees(got, compare(left, right), any_backend)
    assert 2.0 in x
    assert 5.0 not in x


def test_numpy_functions_of_a_tensor_stay_on_its_device(any_backend: Backend) -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    x = Tensor(any_backend.from_numpy(values), True)
    functions = [np.tanh, np.sum, np.transpose, lambda t: np.maximum(t, 2.5)]
    functions += [lambda t: np.concatenate([t, t]), lambda t: np.where(True, t, 0)]
    functions += [lambda t: np.clip(t, 2, 3), lambda t: np.stack([t, t], axis=1)]
    for function in functions:
        y = function(x)
        assert isinstance(y, Tensor)
        assert y.backend is any_backend
        assert y.requires_grad
        assert_agrees(y, np.asarray(function(values)), any_backend)
    for function in (np.sin, np.cumsum, np.add.reduce):
        with pytest.raises(GraphError, match="no gradient here"):
            function(x)
    assert_agrees(np.isnan(x), np.isnan(values), any_backend)
    assert_agrees(np.sin(x.detach()), np.sin(values), any_backend)


def test_operators_in_place_refuse_or_assign_on_the_device(any_backend: Backend) -> None:
    values = np.array([1.0, 2.0], np.float32)
    array = any_backend.from_numpy(values.copy())
    x = Tensor(any_backend.from_numpy(values.copy()), True)
    with pytest.raises((GraphError, TypeError)):
        array -= x
    assert_agrees(array, values, any_backend)
    with pytest.raises(GraphError, match="in place"):
        x -= array
    storage = x.data
    with no_grad():
        x -= array
    assert x.data is storage
    assert_agrees(x, np.zeros(2, np.float32), any_backend)


IDS = np.array([[1, 15, 0]])
TARGETS = np.array([[15, IGNORE, 5]])


def test_batch_ids_may_be_on_either_side(any_backend: Backend) -> None:
    model = CausalLM(CONFIG, device=any_backend)
    batch = Batch(IDS, TARGETS).to(any_backend, CONFIG.vocab_size)
    assert_agrees(model(batch.ids), model(IDS), any_backend)
    loss = cross_entropy(model(batch.ids), batch.targets)
    assert_agrees(loss, cross_entropy(model(IDS), TARGETS), any_backend)


@pytest.mark.parametrize("wrong", [16, -1])
@pytest.mark.parametrize(("field", "word"), [("ids", "id"), ("targets", "target")])
def test_batch_ids_are_checked_on_the_host(
    wrong: int, field: str, word: str, any_backend: Backend
) -> None:
    model = CausalLM(CONFIG, device=any_backend)
    arrays = {"ids": IDS.copy(), "targets": TARGETS.copy()}
    arrays[field][0, 2] = wrong
    message = rf"^{word} {wrong} is outside \[0, 16\)$"
    with counted(), pytest.raises(DataError, match=message):
        language_modelling_loss(model, Batch(**arrays))
    assert METER.uploads == []


def test_batch_moves_in_one_piece(any_backend: Backend) -> None:
    ids = np.arange(6).reshape(2, 3)
    batch = Batch(ids, ids + 1, first=5, first_key=ids // 2)
    with counted():
        moved = batch.to(any_backend, 7)
    assert len(METER.uploads) == (any_backend is STRICT)
    assert_agrees(moved.ids, batch.ids, any_backend)
    assert_agrees(moved.targets, batch.targets, any_backend)
    assert_agrees(moved.first_key, batch.first_key, any_backend)
    assert moved.first == 5


def test_tensors_of_two_devices_do_not_mix(backend: Backend) -> None:
    here = Tensor(np.ones(3))
    there = Tensor(np.ones(3)).to(backend)
    mixes = [lambda: there + here, lambda: here @ there, lambda: there * np.ones(3)]
    mixes += [lambda: np.ones(3) * there, lambda: np.maximum(np.ones(3), there)]
    for mix in mixes:
        with pytest.raises(DeviceError, match=backend.name):
            mix()


def test_tensor_accepts_numbers_and_indices_of_the_host(any_backend: Backend) -> None:
    t = Tensor(np.arange(6, dtype=np.float32)).to(any_backend)
    with counted():
        y = (t * 2.5 + 1) / np.float64(3) - t**2
    assert METER.uploads == []  # a number is written on the device
    assert y.dtype == np.float32
    assert_agrees(t[[0, 0, 5]], np.array([0, 0, 5], np.float32), any_backend)
    assert_agrees(t[np.array([4, 1])], np.array([4, 1], np.float32), any_backend)
    assert t[[]].shape == (0,)


# ---- optimisers and clipping ---------------------------------------------------------------------

OPTIMIZERS = [(SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}), (AdamW, {})]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_optimizers_agree_and_wait_for_nothing(
    kind: Any, options: dict[str, float], backend: Backend
) -> None:
    results = []
    for device in (backend, NUMPY):
        rng = np.random.default_rng(0)
        params = []
        for size in ((3, 4), (5,), ()):
            value = rng.standard_normal(size).astype(np.float32)
            params.append(Tensor(value, True, device=device))
        optimizer = kind(params, **options)
        with counted():
            for step in range(4):
                drawn = [np.asarray(rng.standard_normal(p.shape), np.float32) for p in params]
                grads = [device.from_numpy(g) for g in drawn]
                if step == 2:
                    grads[1] = None
                with no_sync():
                    optimizer.step(grads, scale=1 / (step + 1))
            assert len(METER.uploads) == (12 if device is STRICT else 0)  # the gradients above
        arrays, numbers = optimizer.state_dict()
        again = kind(params, **options)
        again.load_state_dict(arrays, numbers)
        loaded, _ = again.state_dict()
        results.append([*params, *arrays.values(), *loaded.values()])
    assert_all_agree(results, backend)


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip_by_global_norm_decides_on_the_device(
    max_norm: float, bad: float | None, backend: Backend
) -> None:
    first = np.random.default_rng(0).standard_normal((3, 1)).astype(np.float32)
    second = np.random.default_rng(1).standard_normal((3, 2))
    if bad is not None:
        second[0, 0] = bad
    there = [backend.from_numpy(first), None, backend.from_numpy(second)]
    with no_sync():
        (one, none, two), norm = clip_by_global_norm(there, max_norm)
    assert none is None
    (clipped, _, clipped_too), expected = clip_by_global_norm([first, None, second], max_norm)
    assert_agrees(one, clipped, backend)
    assert_agrees(two, clipped_too, backend)
    assert_agrees(norm, np.asarray(expected), backend)


# ---- models and their files ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_causal_lm_logits_and_every_gradient_agree(dtype: str, backend: Backend) -> None:
    ids = TEXT[:24].reshape(2, 12)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    # A GPU adds in another order than NumPy: the gradient of k's bias, nearly 0, is up to 7e-6 off
    # that in float64 on either side. So float64 is what a GPU is compared with.
    exact = "float64" if is_cuda(backend) else dtype
    results = []
    for device, precision in ((backend, dtype), (NUMPY, exact)):
        model = CausalLM(CONFIG, seed=4, dtype=precision, device=device)
        loss = language_modelling_loss(model, batch)
        grads = gradients(loss, list(model.parameters()))
        results.append([host(z).astype(dtype) for z in (model(ids), loss, *grads)])
    assert_all_agree(results, backend)


# In float32 NumPy's own gradients of these models are up to 1.3e-5 off those in float64, and so are
# those of any other order of sums.
GRADIENT_ROUNDING = 4e-5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type_of_model_agrees(model_type: str, dtype: str, backend: Backend) -> None:
    ids = np.random.default_rng(2).integers(0, 11, (3, 13))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    results = []
    for device in (backend, NUMPY):
        base = CausalLM(shape(model_type), seed=4, dtype=dtype, device=device)
        model = get_peft_model(base, config, seed=2)
        params = [p for p in model.parameters() if p.requires_grad]
        with ShardedStep(model, shard=WHOLE) as step:
            loss, grads = step.gradients(batch, params)
        text = generate(model.eval(), ids[:, :3], 12, temperature=0)
        loss = loss.astype(dtype)  # a float64 sum of losses of that dtype
        # As one vector: a small gradient has the rounding of the larger ones that it is made from.
        results.append([model(ids), loss, np.concatenate([host(g).ravel() for g in grads]), text])
    assert_all_agree(results, backend, GRADIENT_ROUNDING)


SAMPLED = {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "seed": 7}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED])
def test_generate_agrees_past_the_end_of_the_context(
    sampling: dict[str, Any], backend: Backend
) -> None:
    prompt = TEXT[:10].reshape(2, 5)  # 25 tokens in a context of 16 positions
    mine = generate(lora_model(backend).eval(), prompt, 20, **sampling)
    reference = generate(lora_model().eval(), prompt, 20, **sampling)
    np.testing.assert_array_equal(mine, reference)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED])
def test_generate_agrees_for_prompts_of_several_lengths(
    sampling: dict[str, Any], model_type: str, backend: Backend
) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 11, length) for length in (7, 1, 7, 20)]
    config = shape(model_type, max_position_embeddings=16)
    results = []
    for device in (backend, NUMPY):
        model = CausalLM(config, seed=4, dtype="float64", device=device).eval()
        results.append(generate(model, prompts, 14, **sampling))
    for mine, reference in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, reference)


def test_save_pretrained_writes_the_same_files_which_load_on_either_device(
    backend: Backend, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    there = tmp_path / "there"
    for folder, device in ((there, backend), (here, NUMPY)):
        CausalLM(CONFIG, seed=5, device=device).save_pretrained(folder / "base")
        lora_model(device).save_pretrained(folder / "adapter")
    for path in here.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (there / path.relative_to(here)).read_bytes()
    models = []
    for folder, device in ((here, backend), (there, NUMPY)):
        base = CausalLM.from_pretrained(folder / "base", device=device)
        models.append(PeftModel.from_pretrained(base, folder / "adapter"))
    mine, reference = models
    ids = TEXT[:8][None]
    assert_agrees(mine(ids), reference(ids), backend)
    for p in mine.parameters():
        assert p.backend is backend
    assert_same_weights(mine.to("cpu"), reference, NUMPY)


def test_merge_adapter_and_the_effective_weight_agree(backend: Backend) -> None:
    mine = lora_model(backend, modules_to_save=["lm_head"])
    reference = lora_model(modules_to_save=["lm_head"])
    models = mine, reference
    ids = TEXT[:12][None]
    before = weights(mine)
    for model in models:
        for _, module in model.named_modules():
            module.prepare_step(10**6)
    assert_agrees(mine(ids), reference(ids), backend)
    for model in models:
        for _, module in model.named_modules():
            module.end_step()
        model.merge_adapter()
    assert_agrees(mine(ids), reference(ids), backend)
    others = dict(reference.named_modules())
    deltas = 0
    for name, layer in mine.named_modules():
        if hasattr(layer, "delta_weight") and hasattr(layer, "base_layer"):
            delta = others[name].delta_weight("default")
            assert_agrees(layer.delta_weight("default"), delta, backend)
            deltas += 1
    assert deltas > 0
    mine.unmerge_adapter()
    for name, after in weights(mine).items():
        assert np.array_equal(before[name], after)
    with mine.disable_adapter():
        assert_agrees(mine(ids), CausalLM(CONFIG, seed=1)(ids), backend)
    assert_same_weights(mine.merge_and_unload(), reference.merge_and_unload(), backend)


# ---- a training step, and a whole run ------------------------------------------------------------

SHORT = Settings(steps=6, batch_size=3, context=8, lr=0.02, warmup=2, shard=WHOLE)
SHORT = dataclasses.replace(SHORT, max_grad_norm=0.05, eval_every=3)


# Without dropout the layers compute with W + dW; with it, on the low-rank path.
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_dora", [False, True])
def test_training_step_uploads_its_batch_and_downloads_two_numbers(
    use_dora: bool, dropout: float, backend: Backend, tmp_path: Path
) -> None:
    runs = []
    for device in (backend, NUMPY):
        model = lora_model(device, dropout, use_dora=use_dora).train()
        runs.append(Run(model, TEXT, SHORT, tmp_path))
    mine, reference = runs
    for step in range(3):
        with counted(), ShardedStep(mine.model, 1, WHOLE) as sharded:
            line = mine.step(sharded)
        if backend is STRICT:
            uploads = 3 if step == 0 else 1  # at first the rotary tables, too
            assert METER.uploads == ["from_numpy"] * uploads
            assert METER.downloads == METER.syncs == ["to_numpy"]  # loss and norm together
            assert METER.operations > 100
        with ShardedStep(reference.model, 1, WHOLE) as sharded:
            expected = reference.step(sharded)
        for key in ("loss", "grad_norm"):
            dtype = np.float32 if is_cuda(backend) else np.float64
            assert_agrees(dtype(line[key]), dtype(expected[key]), backend)
        assert line["grad_norm"] > SHORT.max_grad_norm  # the step did clip
    assert_same_weights(mine.model, reference.model, backend, 1e-4)


def test_train_agrees_with_evaluation_checkpoints_and_resume(
    backend: Backend, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SHORT, save_every=2)
    held_out = TEXT[:99]
    results = []
    models = []
    for name, device in (("there", backend), ("here", NUMPY)):
        out = tmp_path / name
        out.mkdir()
        model = lora_model(device, 0.1)
        models.append(model)
        results.append(train(model, TEXT, settings, out, held_out=held_out))
    mine, reference = results
    rounding = 1e-5 if is_cuda(backend) else 0
    assert mine.losses == pytest.approx(reference.losses, rel=rounding, abs=0)
    assert mine.evaluations == reference.evaluations or is_cuda(backend)
    assert_same_weights(*models, backend, 1e-4)
    # Each side continues from the other's checkpoint.
    for name, device in (("here", backend), ("there", NUMPY)):
        out = tmp_path / f"from-{name}"
        out.mkdir()
        resumed = lora_model(device, 0.1)
        checkpoint = tmp_path / name / "checkpoints" / "step-4"
        again = train(resumed, TEXT, settings, out, held_out=held_out, resume=checkpoint)
        assert len(again.losses) == settings.steps
        assert_same_weights(resumed, models[1], backend, 1e-4)
    mine, reference = (evaluate(model, TEXT, 8, limit=20) for model in models)
    assert mine == pytest.approx(reference, rel=1e-5)


def test_train_changes_nothing_in_a_step_that_is_not_finite(
    any_backend: Backend, tmp_path: Path
) -> None:
    model = lora_model(any_backend)
    norm = model.get_base_model().model.norm.weight
    broken = norm.numpy().copy()
    broken[0] = np.nan
    norm.data = any_backend.from_numpy(broken)
    before = weights(model)
    with pytest.raises(NonFiniteError, match="step 0"):
        train(model, TEXT, SHORT, tmp_path)
    for name, after in weights(model).items():
        assert np.array_equal(before[name], after, equal_nan=True)


@pytest.mark.gpu
def test_train_twice_on_a_gpu_has_the_same_bits(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        out = tmp_path / name
        out.mkdir()
        model = lora_model("cuda", 0.1)
        result = train(model, TEXT, SHORT, out)
        bits = [array.tobytes() for array in weights(model).values()]
        runs.append((result.losses, bits))
    assert runs[0] == runs[1]


# ---- two GPUs in one process ---------------------------------------------------------------------


@pytest.fixture
def two_gpus() -> Iterator[list[Backend]]:
    """cuda:0 and cuda:1; the emulation has both."""
    if gpus().get("cuda:1", "").startswith("usable"):
        yield [get_backend("cuda:0"), get_backend("cuda:1")]
        get_backend("cuda:0")
    else:
        pytest.skip("there is one GPU only")


@pytest.mark.gpu
def test_from_numpy_and_operations_use_the_backend_s_own_gpu(two_gpus: list[Backend]) -> None:
    first, second = two_gpus
    a = np.arange(6, dtype=np.float32).reshape(3, 2)
    for gpu, other in ((first, second), (second, first)):
        x = Tensor(gpu.from_numpy(a), requires_grad=True)
        other.select()
        again = gpu.from_numpy(a)
        other.select()
        words = gpu.random_words(1, 2, 3, 4)
        other.select()
        rows = gpu.add_rows(gpu.from_numpy(np.array([1, 0, 1])), again, 2)
        other.select()
        erf = gpu.erf(again)
        other.select()
        y = (x * x).sum()
        one = gpu.xp.ones_like(y.data)
        other.select()
        (dx,) = gradients(y, [x], one)
        other.select()
        assert gpu.to_numpy(dx).tolist() == (2 * a).tolist()
        codes = quant.encode(x.data).codes
        for array in (again, words, rows, erf, y.data, dx, codes):
            assert array.device.id == gpu.device  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("op", operations.TABLE, ids=lambda op: op.id)
def test_operations_run_on_their_own_gpu(op: operations.Operation, two_gpus: list[Backend]) -> None:
    other, gpu = two_gpus
    leaves = [t.to(gpu) for t in op.leaves(np.float32)]
    other.select()
    y = op.function(*leaves)
    dy = gpu.xp.ones_like(y.data)
    other.select()
    grads = gradients(y, leaves, dy)
    for array in (y.data, *(g for g in grads if g is not None)):
        assert array.device.id == gpu.device  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
def test_models_on_two_gpus_compute_as_on_one(
    quantized: bool, two_gpus: list[Backend], tmp_path: Path
) -> None:
    """Every step of each model follows one of the other, some of them in another thread."""
    ids = TEXT[:24].reshape(2, 12)
    batch = Batch(ids[:, :-1], ids[:, 1:])

    def steps(gpu: Backend, out: Path) -> Iterator[Any]:
        base = CausalLM(CONFIG, seed=1, device=gpu)
        if quantized:
            quantize(base, "nf4")
        config = LoraConfig(r=3, lora_dropout=0.1, init_lora_weights=False)
        model = get_peft_model(base, config, seed=2)
        yield None
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW(params)
        for step in range(2):
            with ShardedStep(model.train(), shard=WHOLE) as sharded:
                loss, grads = sharded.gradients(batch, params, step=step)
                yield gpu.to_numpy(loss).tobytes()
                grads, norm = clip_by_global_norm(grads, 0.1)
                yield gpu.to_numpy(norm).tobytes()
                optimizer.step(grads)
                yield None
        out.mkdir()
        model.save_pretrained(out)
        yield sorted(path.read_bytes() for path in out.iterdir())
        yield list(ShardedStep(model.eval()).losses([batch]))
        tokens = stream(model, ids[:, :3], 20, temperature=0)
        for token in tokens:
            yield token.tolist()

    alone = list(steps(two_gpus[0], tmp_path / "alone"))
    runs = [steps(gpu, tmp_path / gpu.name[-1]) for gpu in two_gpus]
    with ThreadPoolExecutor(1) as pool:
        for i, expected in enumerate(alone):
            for run in runs:
                found = pool.submit(next, run).result() if i % 3 == 2 else next(run)
                assert found == expected
