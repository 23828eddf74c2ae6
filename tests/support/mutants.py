"""Forty mistakes in the source, each with the check that has to reject it.

Not a test itself: test_mutants applies them one by one, by a replacement of text in memory while
the check runs; no file is changed. The replaced text must occur exactly once, so the table keeps up
with the code.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import os
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from operations import TABLE
from test_functional import test_operation_equals_its_definition as equals_definition

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.autograd import Tensor, gradients
from minilora.data import Batch
from minilora.errors import GraphError
from minilora.formats import disk
from minilora.gradcheck import check_gradient
from minilora.nn import Parameter
from minilora.optim import SGD, AdamW
from minilora.training.checkpoints import MANIFEST, save_checkpoint
from minilora.training.loop import Settings, train
from minilora.training.parallel import ShardedStep, language_modelling_loss

Check = Callable[[], None]


@dataclass(frozen=True)
class Mutant:
    kind: str
    module: str
    old: str
    new: str
    check: Check


MUTANTS: list[Mutant] = []

# ---- applying a mistake and taking it back -------------------------------------------------------


def source_of(name: str) -> tuple[types.ModuleType, str]:
    """A module of minilora and its source as `ast.unparse` writes it, however its lines are cut."""
    module = importlib.import_module(f"minilora.{name}")
    path = Path(inspect.getsourcefile(module) or "")
    return module, ast.unparse(ast.parse(path.read_text(encoding="utf-8")))


def functions(names: dict[str, Any], file: str) -> Iterator[tuple[str, types.FunctionType]]:
    """(name, function) of every function and method that a module's source defines, unwrapped."""
    for name, value in names.items():
        if inspect.isclass(value) and value.__name__ == name:
            for inner, f in functions(dict(vars(value)), file):
                yield f"{name}.{inner}", f
            continue
        parts = {"": value, ".get": getattr(value, "fget", None)}
        parts[".set"] = getattr(value, "fset", None)
        for part, f in parts.items():
            f = getattr(f, "__func__", f)
            if not callable(f):
                continue
            f = inspect.unwrap(f)
            if isinstance(f, types.FunctionType) and f.__code__.co_filename == file:
                yield name + part, f


@contextlib.contextmanager
def applied(name: str, old: str, new: str) -> Iterator[None]:
    """Inside, the module runs with `new` in place of `old` in its source.

    Its functions get the code of the changed source and stay the same objects, so a module that
    imported one, or put it into a table, calls the changed one.
    """
    module, source = source_of(name)
    assert source.count(old) == 1, f"{name} has {source.count(old)} times: {old}"
    file = str(module.__file__)
    package = module.__name__
    if not hasattr(module, "__path__"):
        package = package.rpartition(".")[0]
    names: dict[str, Any] = {"__name__": module.__name__, "__package__": package, "__file__": file}
    exec(compile(source.replace(old, new), file, "exec"), names)
    changed = dict(functions(names, file))
    before = []
    try:
        for path, f in functions(vars(module), file):
            before.append((f, f.__code__, f.__defaults__))
            f.__code__ = changed[path].__code__
            f.__defaults__ = changed[path].__defaults__
        yield
    finally:
        for f, code, defaults in before:
            f.__code__ = code
            f.__defaults__ = defaults


# ---- the checks ----------------------------------------------------------------------------------


def gradient(*names: str) -> Check:
    """The gradients of these operations in the table, at the tolerance that they have there."""

    def check() -> None:
        for op in TABLE:
            if op.name in names:
                check_gradient(op.function, *op.inputs, tolerance=op.tolerance)

    return check


def definition(name: str) -> Check:
    """The definition in elementary operations."""

    def check() -> None:
        for op in TABLE:
            if op.name == name:
                equals_definition(op)

    return check


def paths_add_up() -> None:
    x = Tensor(np.array([1.0, 2.0]), True)
    y = x * 3.0
    (dx,) = gradients(y * y + y, [x], np.ones(2))
    np.testing.assert_array_equal(dx, 18 * x.data + 3)


def backwards_add_up() -> None:
    x = Tensor(np.array([1.0, 2.0]), True)
    for _ in range(2):
        (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, 4 * x.data)


def a_detached_branch_gets_nothing() -> None:
    x = Tensor(np.array([3.0]), True)
    (dx,) = gradients(x * x.detach(), [x], np.ones(1))
    np.testing.assert_array_equal(dx, [3.0])


def a_changed_value_is_noticed() -> None:
    x = Tensor(np.array([3.0]), True)
    loss = x * x
    x.data = np.array([4.0])
    try:
        loss.backward()
    except GraphError:
        return
    raise AssertionError("a gradient of values that are gone")


def adamw_is_the_paper_s() -> None:
    p = Parameter(np.array([0.7]))
    x = 0.7
    m = v = 0.0
    optimizer = AdamW([p], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    for t in range(1, 6):
        g = 1.3 - 0.4 * t
        m = 0.8 * m + (1 - 0.8) * g
        v = 0.9 * v + (1 - 0.9) * g * g
        mean = m / (1 - 0.8**t)
        deviation = (v / (1 - 0.9**t)) ** 0.5
        x -= 0.1 * (0.1 * x + mean / (deviation + 1e-3))
        optimizer.step([np.array([g])])
        assert abs(p.data[0] - x) < 1e-14


CONFIG = TransformerConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
)


def adapted_model(dtype: str = "float64") -> Any:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(CausalLM(CONFIG, seed=1, dtype=dtype), config, seed=2)


def trainable(model: Any) -> list[Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def a_cut_batch_is_the_whole_batch() -> None:
    model = adapted_model()
    ids = np.random.default_rng(0).integers(0, 13, (5, 7))
    targets = ids[:, 1:].copy()
    targets[2:, 3:] = -100
    counted = int((targets != -100).sum())
    batch = Batch(ids[:, :-1], targets)
    params = trainable(model)
    loss = language_modelling_loss(model, batch)
    expected = [g / counted for g in gradients(loss, params)]
    with ShardedStep(model, threads=1, shard=2) as step:
        mean, grads = step.gradients(batch, params)
    assert abs(mean - loss.item() / counted) < 1e-12
    for g, e in zip(grads, expected, strict=True):
        assert np.abs(g - e).max() <= 1e-12 * max(1e-3, np.abs(e).max())


def base_bytes(model: Any) -> dict[str, bytes]:
    named = model.named_parameters()
    return {name: p.data.tobytes() for name, p in named if ".lora_" not in name}


def the_base_stays_as_it_is() -> None:
    model = adapted_model()
    ids = np.arange(12).reshape(2, 6)
    optimizer = SGD(trainable(model), lr=0.1)
    before = base_bytes(model)
    loss = language_modelling_loss(model, Batch(ids[:, :-1], ids[:, 1:]))
    optimizer.step(gradients(loss, optimizer.params))
    assert base_bytes(model) == before


def a_resumed_run_is_the_whole_run() -> None:
    text = np.random.default_rng(0).integers(0, 13, 200)
    options: dict[str, Any] = {"steps": 4, "batch_size": 2, "context": 6, "threads": 1}
    settings = Settings(save_every=2, warmup=1, **options)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for resume in (None, str(out / "checkpoints" / "step-2")):
            model = adapted_model("float32")
            losses = train(model, text, settings, out, resume=resume).losses
            runs.append((losses, [p.data.tobytes() for p in model.parameters()]))
    assert runs[0] == runs[1]


def a_file_is_on_the_disk_before_it_has_its_name() -> None:
    done: list[str] = []
    real = {"fsync": os.fsync, "replace": os.replace}
    try:
        for name, call in real.items():
            setattr(os, name, lambda *a, n=name, c=call: (done.append(n), c(*a))[1])
        with tempfile.TemporaryDirectory() as folder, disk.atomic_file(Path(folder) / "x") as file:
            file.write(b"x")
            assert not done
    finally:
        for name, call in real.items():
            setattr(os, name, call)
    assert done[:2] == ["fsync", "replace"]


def the_manifest_comes_last() -> None:
    def write(folder: Path) -> None:
        assert "files" not in json.loads((folder / MANIFEST).read_text())
        (folder / "weights").write_bytes(b"w")

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(Path(folder), 1, {}, write)
        assert (checkpoint / MANIFEST).exists()


# ---- the mistakes -------------------------------------------------------------------------------

CONSTANT = "a constant is off by 1e-4"
EPS = "another eps in the backward"
TERM = "a mean or variance term is missing"
BROADCAST = "a sum over broadcast axes, or a kept dimension, is missing"
AXIS = "a wrong axis, or operand transposed"
ADD = "= for += in accumulation"
COUNT = "a wrong 1/N, or count of targets"
LOW = "saved in lower precision"
MASK = "a mask is shifted by one"


def mutant(kind: str, module: str, old: str, new: str, check: Check) -> None:
    MUTANTS.append(Mutant(kind, module, old, new, check))


mutant(
    CONSTANT,
    "functional",
    "* (1 / math.sqrt(2 * math.pi))",
    "* (1.0001 / math.sqrt(2 * math.pi))",
    gradient("gelu"),
)
mutant(CONSTANT, "functional", "c + 3 * 0.044715 * c", "c + 3 * 0.0447195 * c", gradient("gelu"))
mutant(CONSTANT, "functional", "(c + 0.044715 * c", "(c + 0.0447105 * c", gradient("gelu"))
mutant(
    CONSTANT,
    "functional",
    "dy * (s * (1 + X * (1 - s)))",
    "dy * (s * (1.0001 + X * (1 - s)))",
    gradient("silu"),
)
mutant(
    CONSTANT,
    "optim",
    "math.sqrt(1 - b2 ** steps)",
    "math.sqrt(1.0001 - b2 ** steps)",
    adamw_is_the_paper_s,
)
mutant(
    CONSTANT,
    "functional",
    "dU = backend.matmul(dY, b, scale=scaling)",
    "dU = backend.matmul(dY, b, scale=scaling * 0.9999)",
    gradient("lora_linear"),
)
mutant(
    EPS,
    "functional",
    "xhat = X * rstd",
    "xhat = X / xp.sqrt((X * X).mean(axis=-1, keepdims=True))",
    gradient("rms_norm"),
)
mutant(EPS, "functional", "dx *= rstd", "dx *= (rstd**-2 + 9 * eps) ** -0.5", gradient("rms_norm"))
mutant(
    EPS,
    "functional",
    "xhat = (X - mean) * rstd",
    "xhat = (X - mean) / backend.xp.sqrt(((X - mean) ** 2).mean(axis=-1, keepdims=True))",
    gradient("layer_norm"),
)
mutant(
    EPS,
    "functional",
    "rstd * (dxhat - along)",
    "(rstd ** -2 - 0.9 * eps) ** -0.5 * (dxhat - along)",
    gradient("layer_norm"),
)
mutant(
    TERM,
    "functional",
    "along = dxhat.mean(axis=-1, keepdims=True) + along",
    "along = along",
    gradient("layer_norm"),
)
mutant(
    TERM,
    "functional",
    "along = dxhat.mean(axis=-1, keepdims=True) + along",
    "along = dxhat.mean(axis=-1, keepdims=True)",
    gradient("layer_norm"),
)
mutant(TERM, "functional", "dx -= xhat\n", "dx -= 0\n", gradient("rms_norm"))
mutant(
    TERM,
    "functional",
    "(y * (dy - (dy * y).sum(axis=along, keepdims=True)),)",
    "(y * dy,)",
    gradient("softmax"),
)
mutant(
    BROADCAST,
    "autograd",
    "(unbroadcast(dy, sa), unbroadcast(dy, sb))",
    "(unbroadcast(dy, sa), dy)",
    gradient("add"),
)
mutant(BROADCAST, "autograd", "else unbroadcast(dy * B, sa)", "else dy * B", gradient("mul"))
mutant(
    BROADCAST,
    "autograd",
    "g = g.sum(axis=tuple(range(g.ndim - len(shape))))",
    "g = g[(0,) * (g.ndim - len(shape))]",
    gradient("broadcast_to", "matmul"),
)
mutant(
    BROADCAST,
    "functional",
    "xp.exp(y) * dy.sum(axis=along, keepdims=True)",
    "xp.exp(y) * dy.sum(axis=along)",
    gradient("log_softmax"),
)
mutant(
    AXIS,
    "functional",
    "dW = backend.matmul(dY.T, X_kept)",
    "dW = backend.matmul(X_kept.T, dY).reshape(dY.shape[1], X_kept.shape[1])",
    gradient("linear"),
)
mutant(
    AXIS,
    "functional",
    "(dy * y).sum(axis=along, keepdims=True)",
    "(dy * y).sum(axis=0, keepdims=True)",
    gradient("softmax"),
)
mutant(
    AXIS,
    "attention",
    "total[..., keys, :] +=",
    "total[..., -a.shape[3] :, :] +=",
    gradient("attention"),
)
mutant(
    AXIS,
    "autograd",
    "(dy.transpose(back),)",
    "(dy.transpose(order).reshape(dy.transpose(back).shape),)",
    gradient("transpose"),
)
mutant(ADD, "graph", "sums[key] = sums[key] + g", "sums[key] = g", paths_add_up)
mutant(
    ADD,
    "autograd",
    "leaf.grad = g if leaf.grad is None else leaf.grad + g",
    "leaf.grad = g",
    backwards_add_up,
)
mutant(
    COUNT,
    "losses",
    "weight / xp.maximum(weight.sum(), 1)",
    "weight / max(len(weight), 1)",
    definition("cross_entropy"),
)
mutant(
    COUNT,
    "losses",
    "weight = (~ignored).astype(np.float64)",
    "weight = xp.ones(len(targets))",
    definition("cross_entropy"),
)
mutant(
    COUNT,
    "training.parallel",
    "counts = {task: task_batch.tokens for",
    "counts = {task: task_batch.ids.size for",
    a_cut_batch_is_the_whole_batch,
)
mutant(
    LOW,
    "functional",
    "lambda dy: (y * (dy -",
    "lambda dy: (y.astype(np.float32) * (dy -",
    gradient("softmax"),
)
mutant(
    LOW, "functional", "xhat = X * rstd", "xhat = X * rstd.astype(np.float32)", gradient("rms_norm")
)
mutant(
    LOW,
    "autograd",
    "lambda dy: (dy * y,)",
    "lambda dy: (dy * y.astype(np.float32),)",
    gradient("exp"),
)
mutant(
    MASK,
    "attention",
    "order[:, None] > order,",
    "order[:, None] > order + 1,",
    definition("attention"),
)
mutant(
    MASK,
    "attention",
    "last = S - T + at.stop",
    "last = S - T + at.stop - 1",
    definition("attention"),
)
mutant(
    "another order of the pairs",
    "attention",
    "z.reshape(B, T, *pairs)[..., ::-1, :]",
    "z.reshape(B, T, h, D // 2, 2).swapaxes(-1, -2)[..., ::-1, :]",
    definition("attention"),
)
mutant(
    "survivors are not scaled",
    "functional",
    "scale = 1 / (1 - p)",
    "scale = 1.0",
    definition("dropout"),
)
mutant(
    "a detached branch passes a gradient",
    "autograd",
    "        tensor = Tensor(self.data)\n",
    "        tensor = self\n",
    a_detached_branch_gets_nothing,
)
mutant(
    "a change is not counted",
    "autograd",
    "self.version[0] += 1",
    "self.version[0] += 0",
    a_changed_value_is_noticed,
)
mutant(
    "the base is trained",
    "lora.adapted",
    "            parameter.requires_grad = False\n        for name",
    "            parameter.requires_grad = True\n        for name",
    the_base_stays_as_it_is,
)
mutant(
    "a resumed run takes a batch again",
    "training.run",
    "self.done = done\n",
    "self.done = done - 1\n",
    a_resumed_run_is_the_whole_run,
)
mutant(
    "a name before its bytes",
    "formats.disk",
    "                os.fsync(file.fileno())\n            os.replace(temporary, target)",
    "                os.replace(temporary, target)\n                os.fsync(file.fileno())",
    a_file_is_on_the_disk_before_it_has_its_name,
)
mutant(
    "the manifest comes first",
    "training.checkpoints",
    "        write(temporary)\n",
    '        write_json(temporary / MANIFEST, {"files": {}})\n        write(temporary)\n',
    the_manifest_comes_last,
)
