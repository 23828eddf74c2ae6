"""Starts beside the papers' formulas, written again here, and what they refuse."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given as draws
from hypothesis import settings
from hypothesis import strategies as st
from shapes import shape
from threadpoolctl import threadpool_limits

from minilora import CausalLM, get_peft_model, quantize
from minilora.errors import ConfigError, NonFiniteError
from minilora.lora import LoraConfig
from minilora.lora.starts.values import (
    GAMMA,
    STARTS,
    Given,
    Start,
    begin,
    find_start,
    orthogonal,
    redistribute,
)
from minilora.quant.codes import KINDS, encode

TARGETS = ["q_proj", "v_proj", "down_proj"]
DATA = [np.random.default_rng(i).integers(0, 16, (2, 11)) for i in range(3)]
SEEDS = st.integers(0, 2**32 - 1)


def decoder(kind: str) -> Any:
    return lambda W: encode(W.astype(np.float32), kind).decode(np.float64)


# ---- the papers' formulas ------------------------------------------------------------------------


@draws(SEEDS, st.sampled_from(KINDS), st.integers(1, 6), st.floats(0.1, 8))
@settings(max_examples=30, deadline=None)
def test_begin_loftq_is_the_papers_algorithm_and_keeps_its_best_round(
    seed: int, kind: str, r: int, s: float
) -> None:
    W = np.random.default_rng(seed).standard_normal((9, 12))
    begun = begin("loftq", "proj", W, r, s, Given(decode=decoder(kind), rounds=6))
    product = np.zeros_like(W)
    errors = []
    for _ in range(6):
        Q = decoder(kind)(W - product)
        U, S, Vt = np.linalg.svd(W - Q)
        product = sum(S[i] * np.outer(U[:, i], Vt[i]) for i in range(r))
        errors.append(np.linalg.norm(W - Q - product))
        if len(errors) == begun.rounds:
            np.testing.assert_allclose(begun.Q, Q)
            np.testing.assert_allclose(s * begun.B @ begun.A, product, atol=1e-12)
    assert begun.rounds == 1 + int(np.argmin(errors))
    plain = np.linalg.norm(W - decoder(kind)(W))
    assert min(errors) <= plain


@draws(SEEDS, st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_begin_lora_ga_is_the_papers(seed: int, r: int) -> None:
    rng = np.random.default_rng(seed)
    W, G = rng.standard_normal((2, 9, 12))
    begun = begin("lora_ga", "proj", W, r, 1.0, Given(gradient=G))
    values, V = np.linalg.eigh(G.T @ G)
    V = V[:, ::-1]
    c = 9**0.25 / GAMMA**0.5
    np.testing.assert_allclose(abs(begun.A), c * abs(V[:, :r].T), atol=1e-8)
    U = G @ V[:, r : 2 * r] / np.sqrt(values[::-1][r : 2 * r])
    np.testing.assert_allclose(abs(begun.B), c * abs(U), atol=1e-8)
    stable = begin("lora_ga_stable", "proj", W, r, 1.0, Given(gradient=G))
    np.testing.assert_allclose(abs(stable.B), abs(begun.B) * np.sqrt(values[::-1][r : 2 * r]))
    np.testing.assert_allclose(c * stable.A, begun.A)


@draws(SEEDS, st.floats(0.2, 5), st.booleans())
@settings(max_examples=20, deadline=None)
def test_begin_pissa_is_the_leading_part_whichever_way(seed: int, s: float, wide: bool) -> None:
    W = np.random.default_rng(seed).standard_normal((7, 11))
    W = W if wide else W.T
    exact = begin("pissa", "proj", W, 3, s, Given())
    fast = begin("pissa_niter_2", "proj", W, 3, s, Given())
    sigma = np.linalg.svd(W, compute_uv=False)
    for begun in (exact, fast):
        np.testing.assert_allclose(np.linalg.norm(W - s * begun.B @ begun.A, 2), sigma[3])
        np.testing.assert_allclose(begun.A @ begun.A.T, np.diag(sigma[:3]) / s, atol=1e-12)


def test_get_peft_model_eva_takes_the_inputs_covariance_and_shares_ranks() -> None:
    base = small.base("float64")
    config = LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=TARGETS, init_lora_weights="eva"
    )
    before = small.logits(base)
    model = get_peft_model(base, config, data=DATA).eval()
    assert small.logits(model).tobytes() == before.tobytes()
    adapters = model.adapters_by_path("default")
    assert sum(adapter.r for adapter in adapters.values()) == 2 * 6
    assert max(adapter.r for adapter in adapters.values()) <= 4
    for adapter in adapters.values():
        assert adapter.scaling == pytest.approx(3 / 2**0.5, rel=1e-15)
    # The first layer's inputs are the norm of the embeddings.
    layer = base.model.layers[0]
    X = np.concatenate(
        [
            layer.input_layernorm(base.model.embed_tokens(batch[:, :-1])).data.reshape(-1, 16)
            for batch in DATA
        ]
    )
    X = X - X.mean(axis=0)
    path = "model.layers.0.self_attn.q_proj"
    A = adapters[path].lora_A.numpy()
    best = np.linalg.svd(X, compute_uv=False)[: len(A)] ** 2
    np.testing.assert_allclose(((X @ A.T) ** 2).sum(axis=0), best)


def test_redistribute_gives_ranks_where_ratios_are_largest() -> None:
    ratios = {"a": np.array([0.9, 0.05, 0.05]), "b": np.array([0.5, 0.4, 0.1])}
    assert redistribute(ratios, {"a": 1, "b": 1}, rho=2.0) == {"a": 1, "b": 1}
    assert redistribute(ratios, {"a": 1, "b": 2}, rho=2.0) == {"a": 1, "b": 2}
    assert redistribute({**ratios, "c": np.array([0.01])}, dict.fromkeys("abc", 1)) == {
        "a": 1,
        "b": 2,
        "c": 0,
    }


# ---- in a model ----------------------------------------------------------------------------------


def make(name: str, **options: Any) -> Any:
    """The small model with a new adapter of this start."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": name}
    kind = "nf4" if name == "loftq" else None
    config = LoraConfig(**{**config, **options})
    return get_peft_model(small.base("float64"), config, data=DATA, quantize=kind)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", [*STARTS, "pissa_niter_3"])
def test_get_peft_model_begins_as_the_base_and_gives_it_back(name: str, use_dora: bool) -> None:
    before = small.base("float64")
    expected = small.logits(before)
    weights = small.bits(before)
    model = make(name, use_dora=use_dora)
    model.eval()
    if name == "loftq":  # whose base is codes, with the error of rank r less
        assert abs(small.logits(model) - expected).max() < 1.5
        return
    assert abs(small.logits(model) - expected).max() <= 1e-13 * abs(expected).max()
    with model.disable_adapter():
        assert small.logits(model).tobytes() == expected.tobytes()
    assert abs(small.logits(model) - expected).max() <= 1e-13 * abs(expected).max()
    assert small.bits(model.unload()) == weights


@pytest.mark.parametrize("name", ["pissa", "lora_ga"])
def test_get_peft_model_takes_a_start_out_before_it_quantises(name: str) -> None:
    base = small.base("float64")
    W = base.model.layers[0].self_attn.q_proj.weight.numpy()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=name)
    model = get_peft_model(base, config, data=DATA, quantize="nf4")
    layer = model.changed_layers["model.layers.0.self_attn.q_proj"]
    adapter = layer.adapters["default"]
    R = W - adapter.scaling * adapter.lora_B.numpy() @ adapter.lora_A.numpy()
    coded = encode(R, "nf4", 64, double_quant=True).decode(np.float64)
    assert np.array_equal(layer.base_layer.dense_weight(), coded)
    with model.disable_adapter():
        coded = encode(W, "nf4", 64, double_quant=True).decode(np.float64)
        assert np.array_equal(layer.base_layer.dense_weight(), coded)


def test_find_start_takes_a_new_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new start is a function and a line."""

    def tenth(W: np.ndarray, r: int, s: float, given: Given) -> Any:
        return orthogonal(W, r, s, given)._replace(A=W[:r] / 10, B=np.eye(len(W))[:, :r])

    monkeypatch.setitem(STARTS, "tenth", Start(tenth, "tenth"))
    model = make("tenth")
    assert abs(small.logits(model.eval()) - small.logits(small.base("float64"))).max() < 1e-13
    assert set(model.changed_layers) == set(model.adapters_by_path("default"))


# ---- refusals ------------------------------------------------------------------------------------


def test_begin_refuses_ranks_and_weights_that_no_start_fits() -> None:
    W = np.ones((4, 6))
    for name, r, words in (
        ("orthogonal", 3, "needs an even r, and proj has r = 3"),
        ("pissa", 5, r"proj is 4 x 6, which allows r up to 4, got 5"),
        ("olora", 5, "allows r up to 4"),
        ("lora_ga", 3, "allows r up to 2"),
        ("eva", 7, "allows r up to 6"),
    ):
        with pytest.raises(ConfigError, match=words):
            begin(name, "proj", W, r, 1.0, Given(covariance=np.eye(6), gradient=W))
    for name in ("pissa", "pissa_niter_4", "loftq"):
        with pytest.raises(ConfigError, match=r"divides by the scaling .*, which is 0 for proj"):
            begin(name, "proj", W, 1, 0.0, Given(decode=lambda W: W))
    with pytest.raises(NonFiniteError, match="proj: its weight is not finite"):
        begin("pissa", "proj", W * np.nan, 1, 1.0, Given())
    with pytest.raises(NonFiniteError, match="or its gradient is not finite"):
        begin("lora_ga", "proj", W, 1, 1.0, Given(gradient=W * np.inf))
    assert find_start("pissa_niter_") is find_start("pissa_niter_x") is find_start(True) is None


@pytest.mark.filterwarnings("ignore:.*above the full rank")
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("eva", {"data": None}, "begins from data, and none is given: .*orthogonal, pissa, olora"),
        ("lora_ga", {"data": []}, "begins from data, and none is given"),
        ("loftq", {}, "is for codes: choose quantize nf4, fp4 or int8"),
        ("pissa", {"config": {"target_modules": ["embed_tokens"]}}, "is for linear layers"),
        (
            "pissa",
            {"config": {"target_modules": ["lm_head"]}, "base": {"tie_word_embeddings": True}},
            "would change a head's weight that is the embedding's",
        ),
        ("pissa", {"config": {"r": 9}}, "v_proj is 8 x 16, which allows r up to 8, got 9"),
    ],
)
def test_get_peft_model_refuses_a_start_by_name(
    name: str, options: dict[str, Any], words: str
) -> None:
    base = small.base(**options.get("base", {}))
    bits = small.bits(base)
    fields = {"r": 2, "target_modules": TARGETS, **options.get("config", {})}
    with pytest.raises(ConfigError, match=f"{words}"):
        get_peft_model(base, LoraConfig(init_lora_weights=name, **fields), data=options.get("data"))
    assert small.bits(base) == bits


def test_add_adapter_refuses_a_second_adapter_beside_a_changed_base() -> None:
    model = make("pissa")
    with pytest.raises(ConfigError, match="trains over a base that its start changed"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model = get_peft_model(small.base(), LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ConfigError, match="changes the base, which the adapters default share"):
        model.add_adapter("other", LoraConfig(r=2, init_lora_weights="olora"))
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights="orthogonal"))


def test_get_peft_model_refuses_a_start_over_codes_and_on_gpt2s_layers() -> None:
    base = quantize(small.base())
    with pytest.raises(ConfigError, match="is in codes already, and its weight is gone"):
        get_peft_model(base, LoraConfig(r=2, init_lora_weights="pissa"))
    for name in ("olora", "loftq"):
        with pytest.raises(ConfigError, match="peft takes their weight for its transpose"):
            get_peft_model(
                CausalLM(shape("gpt2")),
                LoraConfig(r=2, init_lora_weights=name),
                quantize="nf4",
            )


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "lora_ga"])
def test_begin_has_the_same_bits_for_any_number_of_blas_threads(name: str) -> None:
    rng = np.random.default_rng(0)
    W, G, X = (rng.standard_normal((300, 260)) for _ in range(3))
    decode = functools.partial(np.round, decimals=1)
    given = Given(np.random.default_rng(1), np.cov(X, rowvar=False), G, decode)
    begun = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            given = given._replace(rng=np.random.default_rng(1))
            begun.append(begin(name, "proj", W, 8, 1.0, given))
    for one, two in zip(begun[0][:2], begun[1][:2], strict=True):
        assert one.tobytes() == two.tobytes()
