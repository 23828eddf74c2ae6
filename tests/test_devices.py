"""The engine on every backend: NumPy, the strict stand-in for CuPy, and a GPU where there is one.

On the stand-in the arithmetic is NumPy's, so every result must have the same bits; on a GPU it must be as near as the
precision allows. The stand-in also tells what moved: a training step uploads its batch, downloads two numbers, and
waits for nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import operations
import pytest
from shapes import shape
from small import CONFIG
from strict_xp import METER, STRICT, counted, no_sync

from minilora import CausalLM, LoraConfig, PeftModel, generate, get_peft_model, gradients
from minilora.autograd import Tensor
from minilora.backend import NUMPY, Backend, get_backend
from minilora.data import Batch
from minilora.data.batches import IGNORE
from minilora.errors import DataError, DeviceError, NonFiniteError
from minilora.functional import cross_entropy
from minilora.models.config import MODEL_TYPES
from minilora.optim import SGD, AdamW, clip_by_global_norm
from minilora.training.loop import Run, Settings, evaluate, train
from minilora.training.parallel import ShardedStep, language_modelling_loss

DEVICES = ["strict", pytest.param("cuda", marks=pytest.mark.gpu)]  # what is compared with NumPy
WHOLE = 2**31  # sequences a shard: a GPU takes a batch whole, so NumPy must, to have the same bits
TEXT = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 600).astype(np.int32)


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return STRICT if request.param == "strict" else get_backend(request.param)


@pytest.fixture(params=["numpy", *DEVICES])
def any_backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy too, where a test says what is right and not only that it is the same."""
    return {"numpy": NUMPY, "strict": STRICT}.get(request.param) or get_backend(request.param)


def host(x: Any) -> np.ndarray:
    """An array, Tensor or number of any backend, on the host."""
    x = x.data if isinstance(x, Tensor) else x
    owner = next((b for b in (STRICT, NUMPY) if isinstance(x, b.xp.ndarray)), None)
    return (
        np.asarray(x)
        if owner is NUMPY or np.isscalar(x)
        else (owner or get_backend("cuda")).to_numpy(x)
    )


def assert_agrees(mine: Any, reference: Any, backend: Backend, rounding: float = 1e-5) -> None:
    """The same bits, but on a GPU: there within `rounding` (float32; float64 has 2^-29 of it) of the largest value."""
    mine, reference = host(mine), host(reference)
    assert (mine.shape, mine.dtype) == (reference.shape, reference.dtype)
    if backend.name.startswith("cuda") and reference.size and reference.dtype.kind == "f":
        bound = rounding * 2.0 ** (-29 if reference.dtype == np.float64 else 0)
        top = np.abs(reference[np.isfinite(reference)]).max(initial=0)
        np.testing.assert_allclose(mine, reference, rtol=0, atol=bound * max(top, 1e-30))
    else:
        assert mine.tobytes() == reference.tobytes()


def lora_model(
    device: Any = "cpu", dropout: float = 0.0, dtype: str = "float32", **changes: Any
) -> PeftModel:
    """Both factors random, so that no gradient is zero by chance."""
    options = {
        "r": 3,
        "target_modules": "all-linear",
        "lora_dropout": dropout,
        "init_lora_weights": False,
        **changes,
    }
    return get_peft_model(
        CausalLM(CONFIG, seed=1, dtype=dtype, device=device), LoraConfig(**options), seed=2
    )


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


def assert_same_weights(
    mine: Any, reference: Any, backend: Backend, rounding: float = 1e-5
) -> None:
    mine, reference = weights(mine), weights(reference)
    assert list(mine) == list(reference)
    for name in mine:
        assert_agrees(mine[name], reference[name], backend, rounding)


# ---- operations ----

BRINGS_ARRAYS = {  # of its own, from the host
    "index", "embedding", "cross_entropy", "linear_cross_entropy", "attention", "effective_linear", "where",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", operations.TABLE, ids=lambda op: op.id)
def test_operations_and_gradients(op: operations.Operation, dtype: type, backend: Backend) -> None:
    there, here = [t.to(backend) for t in op.leaves(dtype)], op.leaves(dtype)
    reference = op.function(*here)
    dy = np.asarray(np.random.default_rng(0).standard_normal(reference.shape), dtype)
    dy_there = backend.from_numpy(dy)
    with counted():
        mine = op.function(*there)
        found = gradients(mine, there, dy_there)
        uploads, waited = len(METER.uploads), list(METER.syncs)
    assert mine.backend is backend
    assert_agrees(mine, reference, backend)
    for one, other in zip(found, gradients(reference, here, dy), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_agrees(one, other, backend)
    assert (
        uploads == 0 or op.name in BRINGS_ARRAYS or op.name == "gelu"
    )  # whose table of erf goes up once
    assert waited == [] or "mask" in op.variant  # how many are True decides a shape


def test_ids_are_checked_on_the_host_and_may_come_from_either_side(any_backend: Backend) -> None:
    model = CausalLM(CONFIG, device=any_backend)
    ids, targets = np.array([[1, 15, 0]]), np.array([[15, IGNORE, 5]])
    batch = Batch(ids, targets).to(any_backend, CONFIG.vocab_size)
    assert_agrees(model(batch.ids), model(ids), any_backend)
    loss = cross_entropy(model(batch.ids), batch.targets)
    assert_agrees(loss, cross_entropy(model(ids), targets), any_backend)
    for wrong in (16, -1):
        for name in ("ids", "targets"):
            arrays = {"ids": ids.copy(), "targets": targets.copy()}
            arrays[name][0, 2] = wrong
            with (
                counted(),
                pytest.raises(
                    DataError,
                    match=rf"^{name[:-1].replace('ids', 'id')} {wrong} is outside \[0, 16\)$",
                ),
            ):
                language_modelling_loss(model, Batch(**arrays))
            assert METER.uploads == []


def test_a_batch_moves_in_one_piece(any_backend: Backend) -> None:
    batch = Batch(np.arange(6).reshape(2, 3), np.arange(1, 7).reshape(2, 3), first=5)
    with counted():
        moved = batch.to(any_backend, 7)
    assert len(METER.uploads) == (any_backend is STRICT)
    assert_agrees(moved.ids, batch.ids, any_backend)
    assert_agrees(moved.targets, batch.targets, any_backend)
    assert moved.first == 5


def test_tensors_of_two_devices_do_not_mix(backend: Backend) -> None:
    there, here = Tensor(np.ones(3)).to(backend), Tensor(np.ones(3))
    for mix in (lambda: there + here, lambda: here @ there, lambda: there * np.ones(3)):
        with pytest.raises(DeviceError, match=backend.name):
            mix()


def test_numbers_and_hosts_indices_are_welcome_beside_a_tensor(any_backend: Backend) -> None:
    t = Tensor(np.arange(6, dtype=np.float32)).to(any_backend)
    with counted():
        y = (t * 2.5 + 1) / np.float64(3) - t**2
    assert METER.uploads == []  # a number is written on the device
    assert y.dtype == np.float32
    assert_agrees(t[[0, 0, 5]], np.array([0, 0, 5], np.float32), any_backend)
    assert_agrees(t[np.array([4, 1])], np.array([4, 1], np.float32), any_backend)
    assert t[[]].shape == (0,)


# ---- optimisers and clipping ----


@pytest.mark.parametrize(
    "make", [functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01), AdamW]
)
def test_optimisers(make: Any, backend: Backend) -> None:
    runs = []
    for where in (backend, NUMPY):
        rng = np.random.default_rng(0)
        params = [
            Tensor(rng.standard_normal(shape).astype(np.float32), True, device=where)
            for shape in ((3, 4), (5,), ())
        ]
        optimizer = make(params)
        with counted():
            for step in range(4):
                grads = [
                    where.from_numpy(np.asarray(rng.standard_normal(p.shape), np.float32))
                    for p in params
                ]
                grads[1] = None if step == 2 else grads[1]
                with no_sync():
                    optimizer.step(grads, scale=1 / (step + 1))
            assert len(METER.uploads) == (12 if where is STRICT else 0)  # the gradients above
        arrays, numbers = optimizer.state_dict()
        again = make(params)
        again.load_state_dict(arrays, numbers)
        runs.append([*params, *arrays.values(), *again.state_dict()[0].values()])
    for mine, reference in zip(*runs, strict=True):
        assert_agrees(mine, reference, backend)


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_decides_on_the_device(
    max_norm: float, bad: float | None, backend: Backend
) -> None:
    grads = [
        np.random.default_rng(i).standard_normal((3, i + 1)).astype(d)
        for i, d in enumerate(("f4", "f8"))
    ]
    if bad is not None:
        grads[1][0, 0] = bad
    there = [backend.from_numpy(grads[0]), None, backend.from_numpy(grads[1])]
    with no_sync():
        (one, none, two), norm = clip_by_global_norm(there, max_norm)
    (first, _, second), expected = clip_by_global_norm([grads[0], None, grads[1]], max_norm)
    assert none is None
    assert_agrees(one, first, backend)
    assert_agrees(two, second, backend)
    assert_agrees(norm, np.asarray(expected), backend)


# ---- models and their files ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_and_every_gradient_of_a_full_model(dtype: str, backend: Backend) -> None:
    ids = TEXT[:24].reshape(2, 12)
    results = []
    for where in (backend, NUMPY):
        model = CausalLM(CONFIG, seed=4, dtype=dtype, device=where)
        loss = language_modelling_loss(model, Batch(ids[:, :-1], ids[:, 1:]))
        results.append([model(ids), loss, *gradients(loss, list(model.parameters()))])
    for mine, reference in zip(*results, strict=True):
        assert_agrees(mine, reference, backend)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_type_of_model(kind: str, backend: Backend) -> None:
    ids = np.random.default_rng(2).integers(0, 11, (3, 13))
    config, results = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), []
    for where in (backend, NUMPY):
        model = get_peft_model(CausalLM(shape(kind), seed=4, device=where), config, seed=2)
        params = [p for p in model.parameters() if p.requires_grad]
        with ShardedStep(model, shard=WHOLE) as step:
            loss, found = step.gradients(Batch(ids[:, :-1], ids[:, 1:]), params)
        text = generate(model.eval(), ids[:, :3], 12, temperature=0)
        results.append([model(ids), loss, *found, text])
    for mine, reference in zip(*results, strict=True):
        assert_agrees(mine, reference, backend)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "seed": 7}]
)
def test_generation(sampling: dict[str, Any], backend: Backend) -> None:
    prompt = TEXT[:10].reshape(2, 5)
    texts = [
        generate(lora_model(where).eval(), prompt, 20, **sampling) for where in (backend, NUMPY)
    ]
    np.testing.assert_array_equal(
        *texts
    )  # past the context's end too: 25 tokens through 16 positions


def test_files_are_the_same_whichever_device_wrote_them_and_load_on_either(
    backend: Backend, tmp_path: Path
) -> None:
    folders = {}
    for name, where in (("there", backend), ("here", NUMPY)):
        folders[name] = tmp_path / name
        CausalLM(CONFIG, seed=5, device=where).save_pretrained(folders[name] / "base")
        lora_model(where).save_pretrained(folders[name] / "adapter")
    for path in sorted(p for p in folders["here"].rglob("*") if p.is_file()):
        assert (
            path.read_bytes() == (folders["there"] / path.relative_to(folders["here"])).read_bytes()
        )
    models = [
        PeftModel.from_pretrained(
            CausalLM.from_pretrained(folders[n] / "base", device=d), folders[n] / "adapter"
        )
        for n, d in (("here", backend), ("there", NUMPY))
    ]
    ids = TEXT[:8][None]
    assert_agrees(models[0](ids), models[1](ids), backend)
    assert all(p.backend is backend for p in models[0].parameters())
    back = models[0].to("cpu")
    assert_same_weights(back, models[1], NUMPY)


def test_merging_and_the_effective_weight(backend: Backend) -> None:
    mine, reference = (
        lora_model(backend, modules_to_save=["lm_head"]),
        lora_model(modules_to_save=["lm_head"]),
    )
    ids, before = TEXT[:12][None], weights(mine)
    for model in (mine, reference):
        for _, module in model.named_modules():
            module.prepare_step(10**6)
    assert_agrees(mine(ids), reference(ids), backend)
    for model in (mine, reference):
        for _, module in model.named_modules():
            module.end_step()
        model.merge_adapter()
    assert_agrees(mine(ids), reference(ids), backend)
    name, layer = next(
        (n, m)
        for n, m in mine.named_modules()
        if hasattr(m, "delta_weight") and hasattr(m, "base_layer")
    )
    assert_agrees(
        layer.delta_weight("default"),
        dict(reference.named_modules())[name].delta_weight("default"),
        backend,
    )
    mine.unmerge_adapter()
    assert all(np.array_equal(before[name], after) for name, after in weights(mine).items())
    with mine.disable_adapter():
        assert_agrees(mine(ids), CausalLM(CONFIG, seed=1)(ids), backend)
    assert_same_weights(mine.merge_and_unload(), reference.merge_and_unload(), backend)


# ---- a training step, and a whole run ----

SHORT = Settings(
    steps=6,
    batch_size=3,
    context=8,
    lr=0.02,
    warmup=2,
    max_grad_norm=0.05,
    shard=WHOLE,
    eval_every=3,
)


@pytest.mark.parametrize(
    "dropout", [0.0, 0.3]
)  # without, the layers compute with W + dW; with it, on the low-rank path
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_training_step_moves_its_batch_up_and_two_numbers_down(
    use_dora: bool, dropout: float, backend: Backend, tmp_path: Path
) -> None:
    models = [lora_model(where, dropout, use_dora=use_dora).train() for where in (backend, NUMPY)]
    runs = [Run(model, TEXT, SHORT, tmp_path) for model in models]
    for step in range(3):
        lines = []
        for run in runs:
            with counted(), ShardedStep(run.model, 1, WHOLE) as sharded:
                lines.append(run.step(sharded))
            if run.model is runs[0].model and backend is STRICT:
                assert METER.uploads == ["from_numpy"] * (
                    3 if step == 0 else 1
                )  # first the rotary tables, then the batch
                assert (
                    METER.downloads == METER.syncs == ["to_numpy"]
                )  # loss and gradient norm together
                assert METER.operations > 100
        for key in ("loss", "grad_norm"):
            assert_agrees(
                *(
                    np.float32(line[key]) if backend.name[:4] == "cuda" else line[key]
                    for line in lines
                ),
                backend,
            )
        assert lines[0]["grad_norm"] > SHORT.max_grad_norm  # the step did clip
    assert_same_weights(runs[0].model, runs[1].model, backend, 1e-4)


def test_a_whole_run_with_evaluation_checkpoints_and_resume(
    backend: Backend, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SHORT, save_every=2)
    results, models = [], []
    for name, where in (("there", backend), ("here", NUMPY)):
        (tmp_path / name).mkdir()
        models.append(lora_model(where, 0.1))
        results.append(train(models[-1], TEXT, settings, tmp_path / name, held_out=TEXT[:99]))
    mine, reference = results
    for one, other in zip(mine.losses, reference.losses, strict=True):
        assert one == other or (
            backend.name.startswith("cuda") and abs(one - other) <= 1e-5 * other
        )
    assert mine.evaluations == reference.evaluations or backend.name.startswith("cuda")
    assert_same_weights(models[0], models[1], backend, 1e-4)
    for name, where in (
        ("here", backend),
        ("there", NUMPY),
    ):  # each side goes on from the other's checkpoint
        out = tmp_path / f"from-{name}"
        out.mkdir()
        resumed = lora_model(where, 0.1)
        checkpoint = tmp_path / name / "checkpoints" / "step-4"
        again = train(resumed, TEXT, settings, out, held_out=TEXT[:99], resume=checkpoint)
        assert len(again.losses) == settings.steps
        assert_same_weights(resumed, models[1], backend, 1e-4)
    assert evaluate(models[0], TEXT, 8, limit=20) == pytest.approx(
        evaluate(models[1], TEXT, 8, limit=20), rel=1e-5
    )


def test_a_step_that_is_not_finite_changes_nothing_on_any_device(
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
    assert all(
        np.array_equal(before[name], w, equal_nan=True) for name, w in weights(model).items()
    )


@pytest.mark.gpu
def test_two_runs_on_a_gpu_have_the_same_bits(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        model = lora_model("cuda", 0.1)
        runs.append(
            (
                train(model, TEXT, SHORT, tmp_path / name).losses,
                [w.tobytes() for w in weights(model).values()],
            )
        )
    assert runs[0] == runs[1]
