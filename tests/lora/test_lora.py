"""LoRA: first values and counts, then targeting, switching, merging and files.

The identities that the mathematics promises of one layer are in test_verify.py. Shapes: W (m, n), A (r, n), B (m, r).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small import CONFIG, IDS, LINEAR, bits, logits

import minilora.lora
from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.effective import costs
from minilora.errors import ConfigError, FormatError
from minilora.formats import PEFT_CONFIG_DEFAULTS, load_file, save_file
from minilora.lora import (
    LoraAdapter,
    LoraConfig,
    LoraLinear,
    PeftModel,
    SavedModule,
    get_peft_model,
)
from minilora.models.transformer import CausalLM
from minilora.nn import Linear, LinearBase
from minilora.verify import make_case

NAMES = [name.rpartition(".")[2] for name in LINEAR]
PATHS = {f"model.layers.{i}.{name}": size for i in range(2) for name, size in LINEAR.items()}


def base(dtype: str = "float64", **changes: Any) -> CausalLM:
    return small.base(dtype, **changes)


def lora(**changes: Any) -> LoraConfig:
    """A configuration whose adapter does something from the start: B is random."""
    return LoraConfig(
        **({"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | changes)
    )


def sized(inputs: int, outputs: int) -> LinearBase:
    """A base that has a size and nothing else: no memory."""
    made = LinearBase()
    made.in_features, made.out_features = inputs, outputs
    return made


def close(a: np.ndarray | None, b: np.ndarray | None, tolerance: float = 1e-12) -> bool:
    assert a is not None
    assert b is not None
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def wrapped(model: Any) -> dict[str, LoraLinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear)}


def trainable(model: PeftModel) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def factors(path: str, name: str = "default") -> set[str]:
    return {f"{path}.lora_{x}.{name}.weight" for x in "AB"}


# ---- one layer -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2), st.booleans())
def test_a_step_that_was_prepared_ends(
    seed: int, inputs: int, outputs: int, count: int, bias: bool
) -> None:
    case = make_case(seed, inputs, outputs, [3, 2], [4, 1], bias=bias)
    layer, x = case.layer(), Tensor(case.x)
    layer.active = list(layer.adapters)[:count]
    before = layer(x).data.tobytes()
    layer.prepare_step()
    if layer.base_layer.bias is not None:
        layer.base_layer.bias.requires_grad = True
        (db,) = gradients(
            layer(x), [layer.base_layer.bias], np.ones((*case.x.shape[:2], outputs), np.float32)
        )
        assert np.array_equal(db, np.full(outputs, 6))
    layer.enabled = False  # a reference model may be asked for in the middle of a step
    assert layer(x).data.tobytes() == layer.base_layer(x).data.tobytes()
    layer.enabled = True
    layer.end_step()
    assert layer(x).data.tobytes() == before
    for adapter in layer.adapters.values():
        adapter.lora_B.data = 0 * adapter.lora_B.data
    layer.prepare_step()  # W + 0 is W
    assert layer(x).data.tobytes() == layer.base_layer(x).data.tobytes()


def test_the_effective_weight_is_formed_once_and_dropped() -> None:
    layer = LoraLinear(Linear(np.ones((3, 4))))
    adapter = LoraAdapter(layer.base_layer, "x", lora(), np.random.default_rng(0))
    layer.adapters["a"], layer.active = adapter, ["a"]
    x = Tensor(np.ones((1, 4)))
    layer.prepare_step()
    weight, ones = layer.base_layer.weight, np.ones((1, 3))
    assert (
        gradients(layer(x), [weight], ones)[0] is not None
    )  # a base that trains is not merged away
    layer.end_step()
    weight.requires_grad = False
    layer.prepare_step()
    before = layer(x).data
    adapter.lora_B.data = adapter.lora_B.data + 1
    assert np.array_equal(layer(x).data, before)
    layer.end_step()
    assert not np.array_equal(layer(x).data, before)


# ---- dropout ----


# ---- merging one layer ----


def test_the_lesson_s_numbers() -> None:
    layer = LoraLinear(Linear(np.arange(1.0, 13.0).reshape(4, 3)))
    adapter = LoraAdapter(
        layer.base_layer, "x", LoraConfig(r=1, lora_alpha=1), np.random.default_rng(0)
    )
    adapter.lora_B.data, adapter.lora_A.data = (
        np.array([[1.0], [0], [-1], [2]]),
        np.array([[2.0, -1, 3]]),
    )
    layer.adapters["default"], layer.active = adapter, ["default"]
    layer.merge()
    assert layer.base_layer.weight.data.tolist() == [[3, 1, 6], [4, 5, 6], [5, 9, 6], [14, 9, 18]]


# ---- first values ----


def kolmogorov_p(values: np.ndarray, cdf: Callable[[float], float]) -> float:
    """The chance of a sample at least this far from `cdf` (Kolmogorov's limit, with Stephens' correction)."""
    n = values.size
    F_ = np.array([cdf(float(v)) for v in np.sort(values, axis=None)])
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - F_).max(), (F_ - steps[:-1]).max())
    z = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    return float(
        min(1, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * z * z) for k in range(1, 101)))
    )


def first_values(
    seed: int, init: Any, r: int = 80, n: int = 100, m: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    adapter = LoraAdapter(
        Linear(np.zeros((m, n))), "x", LoraConfig(r=r, init_lora_weights=init), rng
    )
    return adapter.lora_A.data, adapter.lora_B.data


@pytest.mark.parametrize("seed", range(20))
def test_first_values_follow_their_laws(seed: int) -> None:
    A, B = first_values(seed, True)
    bound = 1 / math.sqrt(100)
    assert A.shape == (80, 100)
    assert not B.any()
    assert np.abs(A).max() <= bound
    assert np.abs(A).max() > bound * (1 - 50 / A.size)  # fails with probability e^-50
    assert kolmogorov_p(A, lambda x: (x / bound + 1) / 2) > 1e-4 / 20

    A, B = first_values(seed, "gaussian")
    assert not B.any()
    assert kolmogorov_p(A, lambda x: (1 + math.erf(x * 80 / math.sqrt(2))) / 2) > 1e-4 / 20
    assert abs(A.std() * 80 - 1) < 5 / math.sqrt(2 * A.size)  # five standard deviations

    A, B = first_values(seed, False)
    assert np.abs(A).max() <= bound
    assert np.abs(B).max() <= 1 / math.sqrt(80)
    assert kolmogorov_p(A, lambda x: (x / bound + 1) / 2) > 1e-4 / 20
    assert kolmogorov_p(B, lambda x: (x * math.sqrt(80) + 1) / 2) > 1e-4 / 20


@given(
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sampled_from(["default", "other"]),
    st.integers(0, 99),
)
def test_first_values_depend_on_the_seed_and_the_layer_alone(
    names: set[str], adapter_name: str, seed: int
) -> None:
    names |= {"q_proj"}
    whole = get_peft_model(base(), lora(target_modules="all-linear"), seed=seed).state_dict()
    some = get_peft_model(
        base(), lora(target_modules=sorted(names)), adapter_name, seed=seed
    ).state_dict(adapter_name)
    assert len(some) == 4 * len(names)
    assert all(np.array_equal(array, whole[key]) for key, array in some.items())
    assert len({a.tobytes() for a in whole.values()}) == len(whole)  # no two layers start alike
    other = get_peft_model(base(), lora(target_modules=sorted(names)), seed=seed + 1).state_dict()
    assert all(not np.array_equal(other[key], whole[key]) for key in some)


# ---- counts ----


def test_counts_of_the_lesson() -> None:
    def count(n: int, m: int, r: int) -> int:
        return sum(math.prod(shape) for shape in LoraAdapter.shapes(sized(n, m), r).values())

    assert LoraAdapter.shapes(sized(768, 1024), 64) == {"lora_A": (64, 768), "lora_B": (1024, 64)}
    assert count(768, 1024, 64) == 114_688
    assert 1024 * 768 == 786_432
    assert round(100 * 114_688 / 786_432, 1) == 14.6
    adapter = LoraAdapter(
        Linear(np.zeros((1024, 768))), "x", LoraConfig(r=64), np.random.default_rng(0)
    )
    assert sum(p.size for p in adapter.parameters()) == 114_688


@st.composite
def configs(draw: st.DrawFn) -> LoraConfig:
    """Any configuration that fits CONFIG, and of which no part is idle (which would warn)."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    listed = draw(st.booleans())
    pattern = rf".*\.1\.\w+\.({'|'.join(names)})"
    some = draw(st.lists(st.sampled_from(names), unique=True))
    return LoraConfig(
        r=draw(st.integers(1, 4)),
        lora_alpha=draw(st.sampled_from([1, 8, 2.5])),
        target_modules=names if listed else pattern,
        lora_dropout=draw(st.sampled_from([0.0, 0.1])),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        use_rslora=draw(st.booleans()),
        init_lora_weights=draw(st.sampled_from([True, False, "gaussian"])),
        rank_pattern={name: draw(st.integers(1, 4)) for name in some},
        alpha_pattern={name: draw(st.sampled_from([1, 16])) for name in some},
        layers_to_transform=draw(st.sampled_from([None, 0, [1], [0, 1]])) if listed else None,
        modules_to_save=draw(st.sampled_from([None, ["lm_head"], ["norm", "embed_tokens"]])),
        task_type=draw(st.sampled_from([None, "CAUSAL_LM"])),
    )


def meant(config: LoraConfig) -> dict[str, tuple[int, int]]:
    """The layers that a configuration of `configs` means, with their (in, out), worked out apart from the package."""
    names, only = config.target_modules, config.layers_to_transform
    if isinstance(names, str):
        names, only = names.partition("(")[2].rstrip(")").split("|"), 1
    kept = [0, 1] if only is None else [only] if isinstance(only, int) else only
    assert names is not None
    return {
        p: s
        for p, s in PATHS.items()
        if p.rpartition(".")[2] in names and int(p.split(".")[2]) in kept
    }


@given(configs())
def test_counts_are_the_formula(config: LoraConfig) -> None:
    plain = base()
    total = sum(p.size for p in plain.parameters())
    model, targets = get_peft_model(plain, config), meant(config)
    assert set(wrapped(model.model)) == set(targets)
    ranks = {p: config.rank_pattern.get(p.rpartition(".")[2], config.r) for p in targets}
    added = sum(ranks[p] * (n + m) for p, (n, m) in targets.items())
    saved = {
        "lm_head": 16 * 16,
        "norm": 5 * 16,
        "embed_tokens": 16 * 16,
    }  # "norm" also ends the layers' own
    added += sum(saved[name] for name in config.modules_to_save or [])
    attention = {
        p: m for p, (_, m) in PATHS.items() if "self_attn" in p
    }  # the layers that have a bias
    biased = {
        "none": {},
        "all": attention,
        "lora_only": {p: m for p, m in attention.items() if p in targets},
    }
    assert model.get_nb_trainable_parameters() == (
        added + sum(biased[config.bias].values()),
        total + added,
    )


def test_counts_are_printed_as_peft_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(base(tie_word_embeddings=True), lora())
    model.print_trainable_parameters()
    total = sum(p.size for p in base(tie_word_embeddings=True).parameters()) + 224
    expected = (
        f"trainable params: 224 || all params: {total:,} || trainable%: {22400 / total:.4f}\n"
    )
    assert capsys.readouterr().out == expected


# ---- whole models ----------------------------------------------------------------------------------------------------


def test_the_lesson_s_snippet() -> None:
    for name in ("LoraConfig", "get_peft_model"):
        assert name in minilora.lora.__all__
    model = CausalLM(
        dataclasses.replace(CONFIG, hidden_size=128, num_key_value_heads=2, head_dim=64)
    )
    lora_config = LoraConfig(
        r=64,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.1,
        bias="none",
        task_type="CAUSAL_LM",
    )
    before = logits(model)
    model = get_peft_model(model, lora_config)
    assert np.array_equal(logits(model), before)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 64 * (128 + 128)
    assert {layer.adapters["default"].scaling for layer in wrapped(model).values()} == {0.25}


@given(configs(), st.sampled_from(["float32", "float64"]))
def test_b_zero_and_disabled_are_the_base_bit_for_bit(config: LoraConfig, dtype: str) -> None:
    plain = base(dtype)
    before, original = logits(plain).tobytes(), bits(plain)
    model = get_peft_model(plain, dataclasses.replace(config, bias="none"))
    if config.init_lora_weights is not False:
        assert logits(model).tobytes() == before
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + p.dtype.type(0.5)
    changed = logits(model.eval())
    assert changed.tobytes() != before
    with model.disable_adapter():
        with model.disable_adapter():
            assert logits(model).tobytes() == before
        assert logits(model).tobytes() == before  # the inner block gives back what it found
    assert logits(model).tobytes() == changed.tobytes()
    assert {p.dtype for p in model.parameters()} == {np.dtype(dtype)}
    assert model.unload() is plain
    assert logits(plain).tobytes() == before
    assert bits(plain) == original
    assert all(p.requires_grad for p in plain.parameters())


def test_disabling_warns_where_it_is_not_the_base() -> None:
    model = get_peft_model(base(), lora(bias="all"))
    with pytest.warns(UserWarning, match="trained the base's biases"), model.disable_adapter():
        pass


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_only_what_should_train_does(bias: str) -> None:
    plain = base()
    original = bits(plain)
    model = get_peft_model(plain, lora(bias=bias, modules_to_save=["lm_head"]))
    adapted = {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"}
    others = {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "ko"}
    biases = {"none": set(), "lora_only": {f"{p}.base_layer.bias" for p in adapted}}
    biases["all"] = biases["lora_only"] | {f"{p}.bias" for p in others}
    expected = {name for p in adapted for name in factors(p)} | biases[bias]
    expected |= {"lm_head.modules_to_save.default.weight"}
    assert trainable(model) == expected
    prefix = "base_model.model."
    keys = {prefix + k.replace(".default", "").replace(".modules_to_save", "") for k in expected}
    assert set(model.state_dict()) == keys

    before = bits(model)
    leaves = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        loss = F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])
        for p, g in zip(leaves, gradients(loss, leaves), strict=True):
            assert g is not None
            p.data = p.data - 0.1 * g
    changed = {name.removeprefix(prefix) for name, b in bits(model).items() if b != before[name]}
    assert changed == expected
    model.unload()
    assert {name for name, b in bits(plain).items() if b != original[name]} == {
        name.replace(".base_layer", "") for name in biases[bias]
    }


def test_a_new_adapter_is_in_the_mode_of_its_model() -> None:
    for training in (True, False):
        model = get_peft_model(base().train(training), lora(lora_dropout=0.5))
        model.add_adapter("b", lora(lora_dropout=0.5))
        for name in ("default", "b"):
            model.set_adapter(name)
            assert np.array_equal(logits(model), logits(model)) is not training


def test_saved_modules_replace_the_original() -> None:
    plain = base(tie_word_embeddings=True)
    before = logits(plain)
    model = get_peft_model(plain, lora(init_lora_weights=True, modules_to_save=["lm_head"]))
    assert np.array_equal(logits(model), before)
    head = model.get_base_model().lm_head
    assert isinstance(head, SavedModule)
    assert head.current.weight is not head.original_module.weight
    head.current.weight.data = head.current.weight.data * 2
    assert np.array_equal(logits(model), before * 2)
    with model.disable_adapter():
        assert np.array_equal(logits(model), before)
    merged = model.merge_and_unload()
    assert np.array_equal(logits(merged), before * 2)
    assert (
        not merged.config.tie_word_embeddings
    )  # the head is no longer the embedding, and the files must say so


def test_a_merged_model_saves_as_a_plain_one(tmp_path: Path) -> None:
    for changes in ({}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}):
        model = get_peft_model(base(tie_word_embeddings=True), lora(**changes))
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data + 0.25
        expected = logits(model)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        again = CausalLM.from_pretrained(tmp_path, dtype="float64")
        assert np.array_equal(logits(again), logits(merged))
        assert close(logits(again), expected)
        assert again.config.tie_word_embeddings is (not changes)


# ---- targeting ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": None}, r"self_attn\.[qv]_proj"),
        ({"target_modules": ["q_proj"]}, r"self_attn\.q_proj"),
        ({"target_modules": ("q_proj",)}, r"self_attn\.q_proj"),
        ({"target_modules": {"q_proj", "up_proj"}}, r"(q|up)_proj"),
        ({"target_modules": ["self_attn.q_proj"]}, r"q_proj"),
        ({"target_modules": ["0.self_attn.q_proj"]}, r"layers\.0.*q_proj"),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, r"1.*up_proj"),
        ({"target_modules": ["lm_head"]}, r"lm_head"),
        ({"target_modules": r".*\.self_attn\.[kv]_proj"}, r"[kv]_proj"),
        ({"target_modules": r"model\.layers\.1\..*_proj"}, r"layers\.1"),
        ({"target_modules": "all-linear"}, r"layers"),
        ({"target_modules": "ALL-Linear"}, r"layers"),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, r"layers(?!.*down)"),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, r"layers\.1"),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.k_proj"]},
            r"q_proj|1.*k_proj",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, r"1.*q_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, r"0.*q_proj"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            r"0.*q_proj",
        ),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [0, 1],
                "layers_pattern": ["h", "layers"],
            },
            r"q_proj",
        ),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, r"layers\.1"),
        ({"target_modules": "all-linear", "modules_to_save": ["mlp"]}, r"self_attn"),
        (
            {"target_modules": "all-linear", "modules_to_save": ["0.mlp", "lm_head"]},
            r"self_attn|1\.mlp",
        ),
        ({"target_modules": r".*_proj", "modules_to_save": ["k_proj"]}, r"(?<!k)_proj"),
    ],
)
def test_which_layers_are_meant(options: dict[str, Any], expected: str) -> None:
    model = get_peft_model(base(), lora(**options))
    assert set(wrapped(model.model)) == {p for p in [*PATHS, "lm_head"] if re.search(expected, p)}
    for path in wrapped(model.model):
        assert factors(path) <= trainable(model)


def test_a_file_says_which_layers_all_linear_meant() -> None:
    given_ = lora(target_modules="all-linear")
    model = get_peft_model(base(), given_)
    assert model.peft_config["default"].target_modules == sorted(PATHS)
    assert given_.target_modules == "all-linear"  # the caller's own object is left alone
    by_type = get_peft_model(base(), lora(target_modules=None)).peft_config["default"]
    assert by_type.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "qproj"]},
            "'qproj' match nothing; choose from down_proj, gate_proj, k_proj, lm",
        ),
        ({"target_modules": ["proj"]}, "'proj' match nothing"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["heads"]},
            "modules_to_save: 'heads' match nothing",
        ),
        ({"target_modules": "q_proj"}, "match nothing"),  # a pattern is for the whole name
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
            "exclude_modules ['self_attn.q",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 7},
            "layers_to_transform 7 match nothing",
        ),
        (
            {"target_modules": ["mlp"]},
            "target model.layers.0.mlp is not a linear layer but of kind MLP",
        ),
        (
            {"target_modules": ["model.norm"]},
            "target model.norm is not a linear layer but of kind RMSNorm",
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "'q_proj' match nothing"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "up_proj"]},
            "mlp cannot be saved whole and also",
        ),
        ({"target_modules": r"(.*"}, "a ( without its )"),
    ],
)
def test_targets_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    plain = base()
    before = bits(plain)
    with pytest.raises(ConfigError) as error:
        get_peft_model(plain, lora(**options))
    assert message in str(error.value)
    assert bits(plain) == before  # names and values: nothing was wrapped
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_modules": ["up_proj"]}, "exclude_modules .* excludes nothing"),
        ({"rank_pattern": {"up_proj": 3}}, "rank_pattern: 'up_proj' matches no target"),
        ({"alpha_pattern": {"proj": 3}}, "alpha_pattern: 'proj' matches no target"),
        ({"r": 9}, "v_proj: r = 9 is above the full rank 8"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out .* set to False"),
    ],
)
def test_what_is_hardly_meant_warns(options: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        model = get_peft_model(base(), lora(**options))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert model.peft_config["default"].fan_in_fan_out is False


@pytest.mark.parametrize(
    ("patterns", "ranks"),  # of layers 0 and 1: q_proj, v_proj
    [
        ({}, [2, 2, 2, 2]),
        ({"q_proj": 3}, [3, 2, 3, 2]),
        ({"layers.1.self_attn.q_proj": 1}, [2, 2, 1, 2]),
        ({"layers.1.self_attn.q_proj": 1, "q_proj": 3}, [3, 2, 1, 2]),
        (
            {"q_proj": 3, "layers.1.self_attn.q_proj": 1},
            [3, 2, 3, 2],
        ),  # the first that matches holds
        ({r"layers\.0\..*": 4}, [4, 4, 2, 2]),
        ({r"^model\.layers\.1.*v_proj": 1}, [2, 2, 2, 1]),
        ({"[qv]_proj": 1}, [1, 1, 1, 1]),
    ],
)
def test_patterns_of_ranks_and_scales(patterns: dict[str, int], ranks: list[int]) -> None:
    paths = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a key that a former one shadows matches a target all the same
        model = get_peft_model(
            base(), lora(rank_pattern=patterns, alpha_pattern=patterns, lora_alpha=2)
        )
    held = {path: layer.adapters["default"] for path, layer in wrapped(model.model).items()}
    assert [len(held[p].lora_A) for p in paths] == ranks
    assert [held[p].scaling for p in paths] == [1] * 4  # alpha / r, both from their patterns


# ---- several adapters ----


def two() -> PeftModel:
    model = get_peft_model(base(), lora(), seed=1)
    model.add_adapter(
        "b", lora(target_modules=["q_proj", "up_proj"], modules_to_save=["norm"], r=3), seed=2
    )
    return model


def owned(model: PeftModel, name: str) -> set[str]:
    return {
        n.removeprefix("base_model.model.")
        for n, _ in model.named_parameters()
        if name in n.split(".")
    }


def test_switching_decides_what_trains() -> None:
    model = two()
    a, b = owned(model, "default"), owned(model, "b")
    assert len(a) == 8
    assert len(b) == 8 + 5
    assert trainable(model) == a
    for names, expected in (("b", b), (["default"], a), (["default", "b"], a | b), ("default", a)):
        model.set_adapter(names)
        assert trainable(model) == expected
        assert model.active_adapters == ([names] if isinstance(names, str) else names)
        assert model.active_adapter == model.active_adapters[0]
    model.set_adapter(["b", "b"])
    assert model.active_adapters == ["b"]
    once = logits(model)
    model.set_adapter("b", inference_mode=True)
    assert trainable(model) == set()
    assert np.array_equal(logits(model), once)
    model.set_adapter("default")
    with pytest.raises(ConfigError, match="no adapter 'c'; choose from default, b"):
        model.set_adapter(["b", "c"])
    for nothing in ([], "c"):
        with pytest.raises(ConfigError, match="no adapter"):
            model.set_adapter(nothing)
    assert trainable(model) == a
    model.delete_adapter("default")
    assert trainable(model) == b
    assert {p.rpartition(".")[2] for p in wrapped(model.model)} == {"q_proj", "up_proj"}


@pytest.mark.parametrize("name", ["", "a.b", "lora_", "ora", "default"])
def test_a_name_that_no_adapter_can_have(name: str) -> None:
    model = two()
    before = bits(model)
    with pytest.raises(
        ConfigError, match=r"cannot name an adapter|an adapter 'default' exists already"
    ):
        model.add_adapter(name, lora())
    assert bits(model) == before


def test_adapters_that_cannot_be_together() -> None:
    model = get_peft_model(base(), lora(bias="all", modules_to_save=["lm_head"]))
    clashes = [
        (lora(bias="lora_only"), "trains the base's biases already"),
        (
            lora(modules_to_save=["q_proj"], target_modules=["k_proj"]),
            "cannot be saved whole and also",
        ),
        (
            lora(modules_to_save=["mlp", "self_attn"], target_modules=["lm_head"]),
            "cannot be saved whole and also",
        ),
        (lora(target_modules=["lm_head"]), "cannot be saved whole and also"),
    ]
    before = bits(model)
    for config, message in clashes:
        with pytest.raises(ConfigError, match=message):
            model.add_adapter("b", config)
    assert bits(model) == before
    assert list(model.peft_config) == ["default"]
    model.add_adapter("c", lora(modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="default, c each replace the same module"):
        model.set_adapter(["default", "c"])
    assert model.active_adapters == ["default"]
    for wrap in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match="has adapters already"):
            get_peft_model(wrap, lora())
    model.merge_adapter(["c"])
    with pytest.raises(ConfigError, match="merged"):
        model.delete_adapter("c")
    with pytest.raises(ConfigError, match="adapters c are merged"):
        model.set_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("c")
    with pytest.raises(ConfigError, match="is the only adapter"):
        model.delete_adapter("default")


class Adapters(RuleBasedStateMachine):
    """Any order of adding, switching, merging and removing: what the model computes is known at every moment."""

    POOL = ("x", "y", "z")
    CHOICES = (["q_proj"], ["q_proj", "v_proj"], "all-linear", ["lm_head", "up_proj"])

    @initialize(modules=st.sampled_from(CHOICES))
    def start(self, modules: Any) -> None:
        plain = base(num_hidden_layers=1)
        self.original, self.before = bits(plain), logits(plain).tobytes()
        self.model = get_peft_model(plain, lora(target_modules=modules), "x")
        self.adapters, self.active, self.merged = ["x"], ["x"], []

    @precondition(lambda self: len(self.adapters) < 3)
    @rule(modules=st.sampled_from(CHOICES), r=st.integers(1, 4), seed=st.integers(0, 9))
    def add(self, modules: Any, r: int, seed: int) -> None:
        name = next(n for n in self.POOL if n not in self.adapters)
        self.model.add_adapter(name, lora(target_modules=modules, r=r), seed=seed)
        self.adapters.append(name)

    @rule(names=st.lists(st.sampled_from(POOL), min_size=1, unique=True))
    def switch(self, names: list[str]) -> None:
        layers = wrapped(self.model.model).values()
        if set(names) <= set(self.adapters):
            if any(
                m.merged and set(m.merged) != {n for n in names if n in m.adapters} for m in layers
            ):
                with pytest.raises(ConfigError, match="are merged"):
                    self.model.set_adapter(names)
                return
            self.model.set_adapter(names)
            self.active = names
        else:
            with pytest.raises(ConfigError, match="no adapter"):
                self.model.set_adapter(names)

    @rule(name=st.sampled_from(POOL))
    def delete(self, name: str) -> None:
        merged = any(m.merged for m in wrapped(self.model.model).values())
        if name not in self.adapters or merged or len(self.adapters) == 1:
            with pytest.raises(ConfigError):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        self.adapters.remove(name)
        if name in self.active:
            self.active = [n for n in self.active if n != name] or self.adapters[:1]

    @rule(names=st.none() | st.lists(st.sampled_from(POOL), min_size=1))
    def merge(self, names: list[str] | None) -> None:
        names = self.active if names is None else [n for n in names if n in self.adapters]
        if names:
            self.model.merge_adapter(None if names is self.active else names)
            self.merged += [n for n in dict.fromkeys(names) if n not in self.merged]

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @rule(modules=st.sampled_from(CHOICES))
    def unload(self, modules: Any) -> None:
        plain = self.model.unload()
        assert bits(plain) == self.original
        assert logits(plain).tobytes() == self.before
        self.start(modules)

    @rule(modules=st.sampled_from(CHOICES))
    def merge_and_unload(self, modules: Any) -> None:
        self.merged += [n for n in self.active if n not in self.merged]
        expected = self.expected()
        plain = self.model.merge_and_unload()
        assert set(bits(plain)) == set(self.original)
        assert close(logits(plain), expected, 1e-11)
        self.start(modules)

    def expected(self) -> np.ndarray:
        """The logits of a plain model whose weights are written out by hand."""
        plain = base(num_hidden_layers=1)
        weights = dict(plain.named_parameters())
        for path, layer in wrapped(self.model.model).items():
            names = [n for n in self.merged if n in layer.adapters] or self.active
            for a in (layer.adapters[n] for n in names if n in layer.adapters):
                weight = weights[path + ".weight"]
                weight.data = weight.data + a.scaling * a.lora_B.data @ a.lora_A.data
        return logits(plain)

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        if not hasattr(self, "model"):
            return
        assert close(logits(self.model), self.expected(), 1e-11)
        weights = bits(self.model)
        with self.model.disable_adapter():
            assert logits(self.model).tobytes() == self.before
            names = [
                n.removeprefix("base_model.model.").replace(".base_layer", "") for n in weights
            ]
            now = dict(zip(names, bits(self.model).values(), strict=True))
            assert self.original.items() <= now.items()
        assert bits(self.model) == weights
        assert trainable(self.model) == set().union(*(owned(self.model, n) for n in self.active))
        assert list(self.model.peft_config) == self.adapters
        assert self.model.active_adapters == self.active


TestAdapters = Adapters.TestCase


# ---- files -----------------------------------------------------------------------------------------------------------


@given(configs(), st.sampled_from(["default", "other", "weight", "lora_A", "modules_to_save"]))
def test_an_adapter_survives_its_files(
    tmp_path_factory: pytest.TempPathFactory, config: LoraConfig, name: str
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(base("float32"), config, name)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = rng.standard_normal(p.shape).astype(np.float32)
    expected, state = logits(model.eval()).tobytes(), model.state_dict(name)
    model.save_pretrained(folder)
    where = folder if name == "default" else folder / name
    assert sorted(p.name for p in where.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not any(name in key.split(".") for key in state if name not in ("weight", "lora_A"))
    as_default = get_peft_model(base("float32"), config).state_dict()
    assert {k: a.shape for k, a in as_default.items()} == {k: a.shape for k, a in state.items()}

    again = PeftModel.from_pretrained(base("float32"), where, "b")
    assert logits(again).tobytes() == expected
    assert trainable(again) == set()
    assert not any(m.training for _, m in again.named_modules())
    assert {k: a.tobytes() for k, a in again.state_dict("b").items()} == {
        k: a.tobytes() for k, a in state.items()
    }
    written = json.loads((where / "adapter_config.json").read_text())
    assert set(written) == set(PEFT_CONFIG_DEFAULTS)
    assert again.peft_config["b"].to_dict() == written
    assert written["inference_mode"] is True

    trained = PeftModel.from_pretrained(base("float32"), where, is_trainable=True)
    assert sum(p.size for p in trained.parameters() if p.requires_grad) == sum(
        a.size for a in state.values()
    )
    assert all(m.training for _, m in trained.named_modules())

    if config.bias == "none":
        beside = get_peft_model(base("float32"), lora(target_modules="all-linear"), "x").eval()
        beside.load_adapter(where, "b")
        beside.set_adapter("b")
        assert logits(beside).tobytes() == expected


def test_several_adapters_have_a_folder_each(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors"}
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == files | {f"b/{name}" for name in files}
    model.save_pretrained(tmp_path / "some", selected_adapters=["b"])
    assert {p.name for p in (tmp_path / "some").iterdir()} == {"b"}
    with pytest.raises(ConfigError, match="no adapter 'c'"):
        model.save_pretrained(tmp_path, selected_adapters=["c"])
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    again.load_adapter(tmp_path / "b", "b")
    for names in ("default", "b", ["default", "b"]):
        model.set_adapter(names)
        again.set_adapter(names)
        assert logits(again).tobytes() == logits(model).tobytes()
    with pytest.raises(ConfigError, match="has adapters already"):
        PeftModel.from_pretrained(again.get_base_model(), tmp_path)


def test_biases_are_saved_alike_whatever_else_is_there(tmp_path: Path) -> None:
    get_peft_model(base(), lora(target_modules=["v_proj"], bias="all")).save_pretrained(tmp_path)
    beside = get_peft_model(
        base(), lora(target_modules=["q_proj"], modules_to_save=["k_proj"]), "x"
    )
    beside.load_adapter(tmp_path, "default")
    assert set(beside.state_dict()) == set(load_file(tmp_path / "adapter_model.safetensors"))
    beside.save_pretrained(tmp_path / "again", ["default"])
    PeftModel.from_pretrained(base(), tmp_path / "again")
    both = get_peft_model(
        base(), lora(target_modules=["v_proj"], modules_to_save=["q_proj"], bias="all")
    )
    both.save_pretrained(tmp_path / "both")
    assert set(PeftModel.from_pretrained(base(), tmp_path / "both").state_dict()) == set(
        both.state_dict()
    )


def test_an_adapter_of_another_base_is_refused_whole(tmp_path: Path) -> None:
    get_peft_model(base(), lora()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    tensors = load_file(file)
    plain, peft = base(), two()
    for changed in (
        {k: a for k, a in tensors.items() if k != key.format(0, "q", "A")},
        tensors | {"base_model.model.stranger": np.zeros(1)},
        tensors | {key.format(1, "v", "B"): np.zeros((5, 2))},
        {k: a for k, a in tensors.items() if k != key.format(0, "q", "A")}
        | {"base_model.model.stranger": np.zeros(1), key.format(1, "v", "B"): np.zeros((5, 2))},
    ):
        save_file(file, changed)
        messages = set()
        for model, load in (
            (plain, lambda: PeftModel.from_pretrained(plain, tmp_path)),
            (peft, lambda: peft.load_adapter(tmp_path, "c")),
        ):
            before, output = bits(model), logits(model).tobytes()
            training = [p.requires_grad for p in model.parameters()]
            with pytest.raises(FormatError, match="does not fit this base") as error:
                load()
            messages.add(str(error.value))
            assert bits(model) == before
            assert logits(model).tobytes() == output
            assert [p.requires_grad for p in model.parameters()] == training
        assert len(messages) == 1
    (message,) = messages
    assert f"missing {key.format(0, 'q', 'A')}" in message
    assert "unknown base_model.model.stranger" in message
    assert f"{key.format(1, 'v', 'B')} is (5, 2), the base needs (8, 2)" in message
    assert not wrapped(plain)

    save_file(file, tensors)
    with pytest.raises(FormatError, match=r"missing .*layers\.2\..* and 1 more"):
        PeftModel.from_pretrained(base(num_hidden_layers=3), tmp_path)
    with pytest.raises(FormatError, match="unknown"):
        PeftModel.from_pretrained(base(num_hidden_layers=1), tmp_path)
    with pytest.raises(FormatError, match=r"the base needs \(2, 12\)"):
        PeftModel.from_pretrained(base(hidden_size=12, head_dim=4), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["c_attn"]})
    )
    with pytest.raises(FormatError, match="'c_attn' match nothing"):
        PeftModel.from_pretrained(plain, tmp_path)


# ---- configuration ----

NOT_A_COUNT = [0, -1, True, 2.0, "8", None, math.nan, 2**24, [8]]
NOT_POSITIVE = [0, -1, True, "8", None, math.nan, math.inf, 10**400, [8]]
BAD: dict[str, list[Any]] = {
    "r": NOT_A_COUNT,
    "lora_alpha": NOT_POSITIVE,
    "target_modules": [
        [],
        "",
        5,
        [""],
        ["q_proj", 1],
        [None],
        True,
        "(",
        "a{2",
        "(?=a)",
        ["x"] * 10_001,
    ],
    "exclude_modules": [5, [""], [1], "[a", True],
    "lora_dropout": [-0.1, 1.0, 1, True, None, math.nan, math.inf, "0", 10**400],
    "bias": ["", "some", None, True, []],
    "use_rslora": [1, 0, None, "true"],
    "use_dora": [1, 0, None, "true"],
    "init_lora_weights": ["", "pissa", "eva", None, 1, 0, 1.0, []],
    "rank_pattern": [{"q": bad} for bad in NOT_A_COUNT] + [{1: 2}, ["q"], "q", {"(": 2}],
    "alpha_pattern": [{"q": bad} for bad in NOT_POSITIVE] + [{1: 2}, ["q"], "q", {"(": 2}],
    "layers_to_transform": [True, "0", 1.0, [True], ["0"], [None]],
    "layers_pattern": [5, True, [1], "layers"],  # the last without layers_to_transform
    "modules_to_save": ["lm_head", [""], [1], 5, True],
    "fan_in_fan_out": [1, None, "false"],
    "task_type": ["SEQ_CLS", 1, True, []],
    "inference_mode": [1, None, "false"],
}
CASES = [(field, value) for field, values in BAD.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f}-{str(v)[:30]}" for f, v in CASES])
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    pattern = isinstance(value, str) or (isinstance(value, dict) and "(" in value)
    with pytest.raises(ConfigError, match=f"{field}|^pattern" if pattern else field) as error:
        LoraConfig(**{field: value})
    assert len(str(error.value)) <= 500
    with pytest.raises(ConfigError, match=r"^here: "):
        LoraConfig.from_dict({field: value}, "here")


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="layers_to_transform needs target_modules as a list"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=[0])
    with pytest.raises(TypeError, match="unknown"):
        LoraConfig(unknown=1)  # type: ignore[call-arg]


def test_the_smallest_file_that_peft_accepts() -> None:
    config = LoraConfig.from_dict(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    )
    assert config == LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    assert config.to_dict() == {**PEFT_CONFIG_DEFAULTS, "r": 4, "target_modules": ["q_proj"]}
    assert LoraConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


UNSUPPORTED: dict[str, Any] = {
    "lora_bias": True,
    "layer_replication": [[0, 1], [0, 2]],
    "use_qalora": True,
    "qalora_group_size": 32,
    "alora_invocation_tokens": [1, 2],
    "target_parameters": ["mlp.experts"],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "use_bdlora": {"a": 1},
    "megatron_config": {"a": 1},
    "megatron_core": "other",
    "init_lora_weights": "pissa",
    "peft_type": "ADALORA",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_option_that_is_not_supported_is_refused_by_name(name: str) -> None:
    assert name in PEFT_CONFIG_DEFAULTS
    with pytest.raises(ConfigError, match=name):
        LoraConfig.from_dict({name: UNSUPPORTED[name]})
    idle = [PEFT_CONFIG_DEFAULTS[name]]
    if name not in ("init_lora_weights", "peft_type"):
        idle += [None, False, {}, []]
    for value in idle:
        assert LoraConfig.from_dict({name: value}).to_dict()[name] == value


def test_every_option_of_peft_is_a_field_or_known_to_be_unsupported() -> None:
    own = {f.name for f in dataclasses.fields(LoraConfig)} - {"extra"}
    harmless = {"peft_version", "revision", "auto_mapping"}
    assert own | set(UNSUPPORTED) | harmless == set(PEFT_CONFIG_DEFAULTS)
    for name in harmless:
        assert LoraConfig.from_dict({name: "anything"}).to_dict()[name] == "anything"


def test_what_only_the_future_knows_is_kept(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text()) | {
        "from_the_future": [1, {"a": None}],
        "peft_version": "9.9",
    }
    file.write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="'from_the_future' is not a known field"):
        again = PeftModel.from_pretrained(base(), tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == written


def test_the_order_of_patterns_survives_saving(tmp_path: Path) -> None:
    patterns = {
        "q_proj": 1,
        "layers.1.*q_proj": 200,
    }  # the first match holds; sorted, the second would come first
    model = get_peft_model(base(), lora(alpha_pattern=patterns))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert list(again.peft_config["default"].alpha_pattern) == list(patterns)
    assert (
        again.get_base_model().model.layers[1].self_attn.q_proj.adapters["default"].scaling == 1 / 2
    )


def test_a_name_in_use_is_the_caller_s_mistake_not_the_file_s(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="already"):
        model.load_adapter(tmp_path, "default")


# ---- what must not happen in silence ----


def test_a_model_with_adapters_in_it_is_not_saved_as_a_base(tmp_path: Path) -> None:
    plain = base()
    get_peft_model(plain, lora())
    with pytest.raises(ConfigError, match="the model holds adapters"):
        plain.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\\b", "/x", "..", "\0", "lora", "_"])
def test_a_name_that_could_leave_the_folder_or_the_scheme_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        get_peft_model(base(), lora(), name)


@pytest.mark.parametrize("wrong", [{"r": 4}, None, "lora"])
def test_what_is_no_configuration_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="expected a LoraConfig"):
        get_peft_model(base(), wrong)
    with pytest.raises(ConfigError, match="expected a model"):
        get_peft_model("base", lora())


def test_deleting_an_inactive_adapter_leaves_the_active_one_as_it_was() -> None:
    model = get_peft_model(base(), lora())
    model.add_adapter("b", lora())
    model.set_adapter("default", inference_mode=True)
    model.delete_adapter("b")
    assert trainable(model) == set()


def test_adapters_of_one_layer_have_masks_of_their_own() -> None:
    model = get_peft_model(base(), lora(lora_dropout=0.5))
    model.add_adapter("b", lora(lora_dropout=0.5))
    for layer in wrapped(model.model).values():
        assert layer.adapters["default"].dropout.stream != layer.adapters["b"].dropout.stream


def test_merging_keeps_the_copy_that_its_own_adapter_saved() -> None:
    model = get_peft_model(base(), lora(modules_to_save=["lm_head"]))
    model.add_adapter("b", lora(modules_to_save=["lm_head"]))
    heads = model.get_base_model().lm_head.modules_to_save
    merged = model.merge_and_unload(adapter_names=["b"])
    assert merged.lm_head is heads["b"]


def test_another_thread_s_disabling_is_its_own_affair() -> None:
    model = get_peft_model(base(), lora()).eval()
    expected = logits(model)
    with model.disable_adapter():
        disabled = logits(model)
        beside: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: beside.append(logits(model)))
        thread.start()
        thread.join()
    assert np.array_equal(beside[0], expected)
    assert not np.array_equal(disabled, expected)


def test_the_way_to_compute_follows_from_shapes() -> None:
    few, many = 1, 10_000
    for W in ((128, 128), (512, 128), (4096, 4096)):
        for tokens, pays in ((few, False), (many, True)):
            merged, apart = costs(tokens, *W, 8)
            assert (merged < apart) == pays
    attention = get_peft_model(base(), lora()).get_base_model().model.layers[0].self_attn
    for tokens, joint in ((few, False), (many, True)):
        attention.prepare_step(tokens)
        assert any(attention._effective.values()) == joint
        assert not any(
            attention.q_proj._effective.values()
        )  # it is a part of the joint one, or computes W x + s B A x


def test_a_model_shows_where_adapters_can_go() -> None:
    shown = repr(base())
    assert "model.layers.1.self_attn.q_proj: Linear {'weight': [16, 16], 'bias': [16]}" in shown


def test_a_model_explains_how_it_computes_a_step() -> None:
    model = get_peft_model(base(), lora(target_modules=["q_proj", "down_proj"])).train()
    few, many = model.explain(1), model.explain(10_000)
    assert few.count("\n") + 1 == many.count("\n") + 1 == 4
    assert all(": W, then A and B " in line for line in few.splitlines())
    assert all(": W + dW " in line for line in many.splitlines())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert (
        f"once {layer.costs(1)[0]:,} operations, A and B at each position {layer.costs(1)[1]:,}"
        in few
    )
    dropped = get_peft_model(base(), lora(lora_dropout=0.5)).train()
    assert "W + dW " not in dropped.explain(10_000).replace("W + dW once", "")
