"""LoRA+, LoRA-FA and the Riemannian step: groups, what the gradients become, whole steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import small

from minilora.backend import get_backend
from minilora.errors import ConfigError, NonFiniteError
from minilora.lora import AdaLoraConfig, HydraConfig, LoraConfig, get_peft_model
from minilora.lora.optimizers import (
    DAMPING,
    OPTIMIZERS,
    LoraFA,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    invert_grams,
    loraplus_groups,
    make_optimizer,
    trained_pairs,
)
from minilora.nn import Parameter
from minilora.optim import SGD, AdamW

NAN, INF = math.nan, math.inf

# ---- LoRA+ ---------------------------------------------------------------------------------------

STEM = "base_model.model.model.layers.0.self_attn.q_proj."
SLOW = {}
SLOW[STEM + "lora_A.default.weight"] = (2, 4)
SLOW[STEM + "lora_A.lora_B_of_before.weight"] = (2, 4)
SLOW[STEM + "lora_E.default"] = (2, 1)
SLOW["base_model.model.lora_B.lora_A.default.weight"] = (2, 4)
SLOW["lm_head.modules_to_save.default.weight"] = (4, 4)
SLOW["head.lora_B"] = (4, 4)
SLOW["head.logit_scale"] = ()
FAST = {}
FAST[STEM + "lora_B.default.weight"] = (4, 2)
FAST[STEM + "lora_B.default"] = (4, 2)
FAST[STEM + "lora_magnitude_vector.default.weight"] = (4,)
FAST["base_model.model.model.norm.weight"] = (4,)
BIASES = {"base_model.model.model.norm.bias": (4,), STEM + "base_layer.bias": (4,)}


def test_loraplus_groups_give_b_and_vectors_the_higher_rate():
    shapes = SLOW | FAST | BIASES
    order = np.random.default_rng(0).permutation(sorted(shapes))
    named = [(str(name), Parameter(np.ones(shapes[name]))) for name in order]
    slow, fast, biases = loraplus_groups(named, lr=0.1, loraplus_lr_ratio=8.0)
    assert slow["params"] == [(name, p) for name, p in named if name in SLOW]
    assert fast["params"] == [(name, p) for name, p in named if name in FAST]
    assert biases["params"] == [(name, p) for name, p in named if name in BIASES]
    assert [group["lr"] for group in (slow, fast, biases)] == [0.1, 0.8, 0.8]
    optimizer = AdamW([slow, fast, biases], weight_decay=0.5)
    optimizer.step([np.ones(p.shape) for p in optimizer.params])
    for name, p in named:
        lr = 0.1 if name in SLOW else 0.8
        decay = 0.0 if name in BIASES else 0.5
        assert np.allclose(p.data, 1 - lr - lr * decay, rtol=1e-6)


def test_loraplus_groups_give_embeddings_a_rate_of_their_own():
    stem = "base_model.model.model.embed_tokens."
    embeddings = {}
    for factor, shape in (("lora_embedding_A", (2, 9)), ("lora_embedding_B", (4, 2))):
        embeddings[stem + factor + ".default"] = Parameter(np.zeros(shape))
    magnitude = stem + "lora_magnitude_vector.default.weight", Parameter(np.zeros(4))
    B = STEM + "lora_B.default.weight", Parameter(np.zeros((4, 2)))
    named = [*embeddings.items(), magnitude, B]
    middle, fast = loraplus_groups(named, 0.1, 8.0)
    assert middle == {"params": list(embeddings.items()), "lr": 1e-6}
    assert fast == {"params": [magnitude, B], "lr": 0.8}
    slow = STEM + "lora_A.lora_B.weight", Parameter(np.zeros((2, 4)))
    groups = loraplus_groups([slow], 0.1, 8.0)
    assert groups == [{"params": [slow], "lr": 0.1}], "an adapter may have any name"
    middle, _ = loraplus_groups(named, 0.1, 8.0, loraplus_lr_embedding=0.02)
    assert middle["lr"] == 0.02
    with pytest.raises(ConfigError, match="loraplus_lr_embedding must be a finite number above 0"):
        loraplus_groups(named, 0.1, loraplus_lr_embedding=0.0)


def test_loraplus_groups_leave_out_an_empty_group():
    pair = "x.lora_B.default.weight", Parameter(np.zeros((2, 2)))
    assert loraplus_groups([pair], 0.5) == [{"params": [pair], "lr": 8.0}]


@pytest.mark.parametrize(("lr", "ratio"), [(0.0, 16.0), (NAN, 16.0), (0.1, -1.0), (0.1, INF)])
def test_loraplus_groups_refuse_invalid_numbers(lr, ratio):
    with pytest.raises(ConfigError, match="must be a finite number above 0"):
        loraplus_groups([("x", Parameter(np.zeros((2, 2))))], lr, ratio)


# ---- the gradients of pairs ----------------------------------------------------------------------

ALL = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False}


def lora(dtype: str = "float64", **fields: Any) -> Any:
    return get_peft_model(small.base(dtype), LoraConfig(**{**ALL, **fields}), seed=2)


def draw_gradients(optimizer: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(p.shape).astype(p.dtype) for p in optimizer.params]


def updates_of(model: Any) -> dict[str, np.ndarray]:
    """dW of each layer."""
    return {path: layer.delta_weight("default") for path, layer in model._wrappers().items()}


def full_gradients(model: Any, optimizer: Any) -> tuple[dict[str, np.ndarray], list[Any]]:
    """A random G = dL/dW of each layer, and the gradients s B^T G, s G A^T that follow from it."""
    rng = np.random.default_rng(7)
    places = {id(p): i for i, p in enumerate(optimizer.params)}
    grads: list[Any] = [None] * len(places)
    of_layers = {}
    for path, layer in model._wrappers().items():
        adapter = layer.adapters["default"]
        A, B, s = adapter.lora_A, adapter.lora_B, adapter.scaling
        G = of_layers[path] = rng.standard_normal((len(B), A.shape[1]))
        if id(A) in places:
            grads[places[id(A)]] = s * B.data.T @ G
        grads[places[id(B)]] = s * G @ A.data.T
    return of_layers, grads


@pytest.mark.parametrize("use_rslora", [False, True])
def test_create_lorafa_optimizer_projects_the_gradient_of_dW(use_rslora: bool) -> None:
    """-lr G P_A, to the damping; neither s nor the lengths of A's rows matter."""
    model = lora(use_rslora=use_rslora, alpha_pattern={"q_proj": 11}, rank_pattern={"v_proj": 2})
    optimizer = create_lorafa_optimizer(model, SGD, lr=0.25)
    assert all(".lora_B." in member.name for member in optimizer.members)
    before = updates_of(model)
    bits = {name: p.numpy().copy() for name, p in model.named_parameters() if "lora_A" in name}
    G, grads = full_gradients(model, optimizer)
    optimizer.step(grads)
    for path, dW in updates_of(model).items():
        A = model._wrappers()[path].adapters["default"].lora_A.data
        projected = G[path] @ np.linalg.pinv(A) @ A
        assert np.allclose(dW - before[path], -0.25 * projected, rtol=0, atol=1e-5)
    for name, p in model.named_parameters():
        if name in bits:
            assert np.array_equal(p.numpy(), bits[name])


def test_create_riemannian_optimizer_does_not_depend_on_the_factors_of_dW() -> None:
    """With reg = 0, for any invertible P in (P A, B P^-1); plain SGD is another matter."""
    changes: dict[str, list[dict[str, np.ndarray]]] = {"riemannian": [], "plain": []}
    for gauge in (False, True):
        for kind, of_kind in changes.items():
            model = lora()
            if gauge:
                rng = np.random.default_rng(3)
                for pair in trained_pairs(model):
                    P = rng.standard_normal((len(pair.A.data),) * 2) + 3 * np.eye(len(pair.A.data))
                    pair.A.data = P @ pair.A.data
                    pair.B.data = pair.B.data @ np.linalg.inv(P)
            if kind == "plain":
                optimizer: Any = make_optimizer(model, "adamw", lr=0.25)
                optimizer = SGD(optimizer.params, lr=0.25)
            else:
                optimizer = create_riemannian_optimizer(model, SGD, lr=0.25, reg=0.0)
            before = updates_of(model)
            _, grads = full_gradients(model, optimizer)
            optimizer.step(grads)
            of_kind.append({path: dW - before[path] for path, dW in updates_of(model).items()})
    for kind, (one, other) in changes.items():
        distance = 0.0
        for path, dW in one.items():
            distance = max(distance, np.abs(other[path] - dW).max() / np.abs(dW).max())
        assert (distance < 1e-9) == (kind == "riemannian"), (kind, distance)


def test_create_riemannian_optimizer_leaves_other_parameters_as_without() -> None:
    """Embeddings, DoRA's magnitudes and copied modules."""
    fields = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    results = []
    for name in ("riemannian", "adamw"):
        model = lora("float32", use_dora=True, **fields)
        optimizer = make_optimizer(model, name, 0.1)
        for seed in range(3):
            optimizer.step(draw_gradients(optimizer, seed))
        results.append({member.name: member.parameter.data for member in optimizer.members})
    for name, values in results[0].items():
        assert np.array_equal(values, results[1][name]) == (
            "q_proj.lora_A" not in name and "q_proj.lora_B" not in name
        )


def test_invert_grams_leaves_out_what_only_rounding_fills() -> None:
    """Of two equal rows: the inverse of A A^T + 1e-8 would be 1e8 where only rounding is."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((3, 8)).astype(np.float32)
    A[2] = A[1]
    [inverse] = invert_grams([A], DAMPING)
    assert np.abs(inverse).max() < 10
    assert inverse.dtype == np.float32
    [zero] = invert_grams([np.zeros((2, 4))], 0.0)
    assert not zero.any()
    with pytest.raises(NonFiniteError, match="a factor of an adapter is not finite"):
        invert_grams([A, np.full((2, 3), np.nan, np.float32)], DAMPING)


def test_lorafa_inverts_again_only_where_an_A_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora("float32")
    optimizer = create_lorafa_optimizer(model, SGD, lr=0.1)
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return invert_grams(*arguments)

    monkeypatch.setattr("minilora.lora.optimizers.invert_grams", counted)
    grads = draw_gradients(optimizer)
    for _ in range(3):
        optimizer.step(grads)
    assert len(calls) == 1
    pair = trained_pairs(model)[0]
    pair.A.data = 2 * pair.A.data
    before = optimizer.precondition(grads)
    assert len(calls) == 2
    fresh = LoraFA(optimizer, trained_pairs(model))(grads)
    assert all(map(np.array_equal, before, fresh))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_create_loraplus_optimizer_of_ratio_1_has_the_bits_of_adamw(weight_decay: float) -> None:
    fields = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    results = []
    for kind in ("adamw", "loraplus"):
        model = lora("float32", **fields)
        options = {"loraplus_lr_ratio": 1.0, "loraplus_lr_embedding": 0.1}
        optimizer = make_optimizer(
            model, kind, 0.1, weight_decay, **(options if kind != "adamw" else {})
        )
        for seed in range(4):
            optimizer.step(draw_gradients(optimizer, seed), scale=1 / (1 + seed))
        results.append(([m.name for m in optimizer.members], small.bits(model)))
    assert results[0] == results[1]


def test_create_loraplus_optimizer_with_sgd_is_plain_sgd_over_scaled_factors() -> None:
    """(p A, q B, s / pq) at lr p^2, lr q^2: the same run of dW, to the bit for powers of two."""
    results = []
    for p, q in ((1.0, 1.0), (2.0, 4.0)):
        model = lora("float64")
        for layer in model._wrappers().values():
            adapter = layer.adapters["default"]
            adapter.lora_A.data = p * adapter.lora_A.data
            adapter.lora_B.data = q * adapter.lora_B.data
            adapter.scaling /= p * q
        rates = {"lr": 0.125 * p * p, "loraplus_lr_ratio": q * q / (p * p)}
        optimizer = create_loraplus_optimizer(model, SGD, **rates)
        for _ in range(3):
            _, grads = full_gradients(model, optimizer)
            optimizer.step(grads)
        results.append(updates_of(model))
    for path, dW in results[0].items():
        assert np.array_equal(dW, results[1][path])


# ---- what is refused -----------------------------------------------------------------------------

OTHERS = {
    "ADALORA": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"]),
    "HYDRALORA": HydraConfig(r=2, experts=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("optimizer", ["lorafa", "riemannian"])
def test_make_optimizer_refuses_adapters_without_a_pair(optimizer: str, kind: str) -> None:
    model = get_peft_model(small.base(), OTHERS[kind])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    message = f"optimizer {optimizer} is for the A and B .* not for {kind}: use adamw or loraplus"
    with pytest.raises(ConfigError, match=message):
        make_optimizer(model, optimizer, 0.1)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    make_optimizer(model, "loraplus", 0.1)


def test_make_optimizer_refuses_what_it_cannot_train() -> None:
    with pytest.raises(ConfigError, match="one of adamw, loraplus, lorafa, riemannian, got 'adam'"):
        make_optimizer(lora(), "adam", 0.1)
    for optimizer in OPTIMIZERS[1:]:
        with pytest.raises(ConfigError, match="all weights train: use adamw, or train an adapter"):
            make_optimizer(small.base(), optimizer, 0.1)
    embedding = lora(target_modules=["embed_tokens"])
    for optimizer in ("lorafa", "riemannian"):
        with pytest.raises(ConfigError, match="no A and B of a linear layer trains"):
            make_optimizer(embedding, optimizer, 0.1)
    for reg in (-1.0, NAN, INF, True, "1"):
        with pytest.raises(ConfigError, match="reg must be a finite number of at least 0"):
            create_riemannian_optimizer(lora(), lr=0.1, reg=reg)


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loraplus", "lorafa", "riemannian"])
def test_optimizers_of_pairs_agree_on_a_gpu(name: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = get_peft_model(
            small.base("float32", get_backend(device)), LoraConfig(**ALL), seed=2
        )
        optimizer = make_optimizer(model, name, 0.01)
        backend = optimizer.params[0].backend
        for seed in range(3):
            grads = draw_gradients(optimizer, seed)
            optimizer.step([backend.from_numpy(g) for g in grads])
        results.append([p.numpy() for p in optimizer.params])
    for on_host, on_gpu in zip(*results, strict=True):
        assert np.allclose(on_host, on_gpu, rtol=1e-4, atol=1e-5)
