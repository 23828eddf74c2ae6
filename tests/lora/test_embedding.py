"""Adapters at the two ends of a model: on the embedding, on the head, and where both have one weight.

Shapes: W (V, C), A (r, V), B (C, r); W' is what stands for W with the adapter in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, bits, logits
from strict_xp import STRICT

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.data import Batch
from minilora.errors import ConfigError, FormatError, NonFiniteError
from minilora.formats import load_file, save_file
from minilora.lora import (
    AdaLoraConfig,
    LoraConfig,
    LoraEmbedding,
    PeftModel,
    get_multitask_model,
    get_peft_model,
)
from minilora.lora.embedding import DoraEmbeddingAdapter, EmbeddingAdapter, HeadAdapter
from minilora.models.generation import generate
from minilora.nn import Embedding
from minilora.training.parallel import ShardedStep
from minilora.verify import verify_files

V, C = 16, 16


def lora(*targets: str, **options: Any) -> LoraConfig:
    """A configuration whose adapter does something from the start."""
    usual: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": list(targets),
        "init_lora_weights": False,
    }
    return LoraConfig(**(usual | options))


def model(
    *targets: str, tie: bool = True, dtype: str = "float64", device: Any = "cpu", **options: Any
) -> PeftModel:
    made = get_peft_model(
        small.base(dtype, device, tie_word_embeddings=tie), lora(*targets, **options)
    )
    for name, p in made.named_parameters():
        if "magnitude" in name:
            p.data = p.data * np.float32(1.5)
    return made


def trained(made: PeftModel) -> dict[str, Any]:
    return {name: p for name, p in made.named_parameters() if p.requires_grad}


def step(made: PeftModel) -> dict[str, np.ndarray]:
    """The gradients of the mean cross-entropy, by name."""
    own = trained(made)
    loss = F.cross_entropy(made(IDS)[:, :-1], IDS[:, 1:])
    found = gradients(loss, list(own.values()))
    return {name: g for name, g in zip(own, found, strict=True) if g is not None}


def near(got: Any, expected: Any, tolerance: float = 1e-12) -> bool:
    assert got.shape == expected.shape
    return bool(np.abs(got - expected).max() <= tolerance * np.abs(expected).max())


# ---- one embedding ----


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_rows_are_those_of_the_formula(
    v: int, c: int, r: int, rslora: bool, dora: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    layer = LoraEmbedding(Embedding(rng.standard_normal((v, c))))
    config = lora("wte", r=r, use_rslora=rslora, use_dora=dora)
    kind = DoraEmbeddingAdapter if dora else EmbeddingAdapter
    layer.adapters["a"] = adapter = kind(layer.as_linear(layer.base_layer), "wte", config, rng)
    layer.active = ["a"]
    shapes = kind.shapes(layer.as_linear(layer.base_layer), r)
    assert {name: getattr(adapter, name).shape for name in kind.TENSORS} == shapes
    assert sum(p.size for p in adapter.parameters()) == r * (v + c) + c * dora
    W, A, B = (p.data for p in (layer.weight, adapter.lora_embedding_A, adapter.lora_embedding_B))
    s = 5 / np.sqrt(r) if rslora else 5 / r
    whole, size = W + s * (B @ A).T, np.abs(W) + s * (np.abs(B) @ np.abs(A)).T
    ids, u = rng.integers(0, v, (2, 3)), np.finfo(np.float64).eps / 2
    if dora:
        m = adapter.lora_magnitude_vector.data = rng.standard_normal(c)
        k = m / np.linalg.norm(whole, axis=0)
        assert (
            abs(layer(ids).data - (k * whole)[ids])
            <= (2 * v + 4 * r + 40) * u * (abs(k) * size)[ids]
        ).all()
    else:
        assert (abs(layer(ids).data - whole[ids]) <= 4 * (r + 4) * u * size[ids]).all()
    before, unmerged = layer(ids).data, layer.weight.data
    layer.merge()
    assert near(layer(ids).data, before)
    layer.unmerge()
    assert layer.weight.data is unmerged
    assert np.array_equal(layer(ids).data, before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_the_start_is_the_base_bit_for_bit_and_b_is_random(tie: bool, dora: bool) -> None:
    plain = small.base(tie_word_embeddings=tie)
    before = logits(plain)
    made = get_peft_model(plain, lora("embed_tokens", init_lora_weights=True, use_dora=dora))
    assert np.array_equal(logits(made), before)
    A, B = (
        trained(made)[f"base_model.model.model.embed_tokens.lora_embedding_{x}.default"].data
        for x in "AB"
    )
    assert not A.any()
    assert 0.5 < B.std() < 1.5
    assert made.get_nb_trainable_parameters()[0] == 3 * (V + C) + C * dora


def test_gradients_are_the_projections_of_the_whole_one() -> None:
    """dA = s B^T G^T and dB = s G^T A^T, for G = dL/dW' (V, C), which a model that is trained whole has."""
    made = model("embed_tokens", tie=False)
    found, adapter = step(made), made.get_base_model().model.embed_tokens.adapters["default"]
    s, A, B = adapter.scaling, adapter.lora_embedding_A.data, adapter.lora_embedding_B.data
    plain = made.merge_and_unload()
    (G,) = gradients(
        F.cross_entropy(plain(IDS)[:, :-1], IDS[:, 1:]), [plain.get_input_embeddings().weight]
    )
    dA, dB = (
        found[f"base_model.model.model.embed_tokens.lora_embedding_{x}.default"] for x in "AB"
    )
    assert G is not None
    assert near(dA, s * B.T @ G.T)
    assert near(dB, s * G.T @ A.T)


def test_dora_s_gradients_take_the_norms_for_constants() -> None:
    made = model("embed_tokens", tie=False, use_dora=True)
    layer, prefix = made.get_base_model().model.embed_tokens, "base_model.model.model.embed_tokens"
    adapter = layer.adapters["default"]
    W, A, B = layer.weight.data, adapter.lora_embedding_A.data, adapter.lora_embedding_B.data
    m, s = adapter.lora_magnitude_vector.data, adapter.scaling
    norm = np.linalg.norm(W + s * (B @ A).T, axis=0)
    found = step(made)
    plain = made.merge_and_unload()
    (G,) = gradients(
        F.cross_entropy(plain(IDS)[:, :-1], IDS[:, 1:]), [plain.get_input_embeddings().weight]
    )
    assert G is not None
    assert near(found[f"{prefix}.lora_embedding_A.default"], s * (B.T * (m / norm)) @ G.T)
    assert near(found[f"{prefix}.lora_embedding_B.default"], s * (G * (m / norm)).T @ A.T)
    wanted = (G * (W + s * (B @ A).T)).sum(axis=0) / norm
    assert near(found[f"{prefix}.lora_magnitude_vector.default.weight"], wanted)


# ---- one weight in two places ----


def test_a_tied_adapter_is_one_parameter_whose_gradient_is_the_sum_of_both_uses() -> None:
    """The merged model is trained whole, its weight once in both places and once in two: G = G_embedding + G_head."""
    made = model("embed_tokens", "q_proj", ensure_weight_tying=True)
    inside = made.get_base_model()
    embedding, head = inside.model.embed_tokens, inside.lm_head
    assert type(head.adapters["default"]) is HeadAdapter
    assert np.array_equal(head.delta_weight("default"), embedding.delta_weight("default").T)
    assert made.get_nb_trainable_parameters()[0] == 3 * (V + C) + 2 * 3 * (16 + 16)
    assert not any("lm_head" in name for name in trained(made))
    found, adapter = step(made), embedding.adapters["default"]
    s, A, B = adapter.scaling, adapter.lora_embedding_A.data, adapter.lora_embedding_B.data
    plain = made.merge_and_unload()
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    loss = F.cross_entropy(plain(IDS)[:, :-1], IDS[:, 1:])
    (G,) = gradients(loss, [plain.lm_head.weight])
    plain.lm_head.weight = type(plain.lm_head.weight)(plain.lm_head.weight.data.copy())
    loss = F.cross_entropy(plain(IDS)[:, :-1], IDS[:, 1:])
    uses = gradients(loss, [plain.get_input_embeddings().weight, plain.lm_head.weight])
    assert G is not None and uses[0] is not None and uses[1] is not None  # noqa: PT018
    assert near(uses[0] + uses[1], G)
    for use in uses:
        assert not near(use, G, 0.01)
    dA, dB = (
        found[f"base_model.model.model.embed_tokens.lora_embedding_{x}.default"] for x in "AB"
    )
    assert near(dA, s * B.T @ G.T)
    assert near(dB, s * G.T @ A.T)


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_at_one_end_of_a_tied_model_must_be_told_what_is_meant(
    targets: tuple[str, ...], dora: bool
) -> None:
    made = model(*targets, use_dora=dora)
    before, unmerged = bits(made), logits(made)
    place = {
        1: "the head" if targets == ("lm_head",) else "the embedding",
        2: "both, each in its own way",
    }[len(targets)]
    for merge in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(
            ConfigError, match=f"adapter default changes {place}, .*tied='untie'.*tied='share'"
        ):
            merge()
        with pytest.raises(ConfigError, match="tied must be 'untie' or 'share', got 'both'"):
            merge(tied="both")
        assert bits(made) == before
    made.merge_adapter(tied="untie")
    assert near(logits(made), unmerged)
    made.unmerge_adapter()
    assert bits(made) == before
    if len(targets) == 2:
        with pytest.raises(ConfigError, match="tied='share' needs a change of one place"):
            made.merge_adapter(tied="share")
    else:
        made.merge_adapter(tied="share")
        ends = [made.model.get_input_embeddings(), made.model.get_output_embeddings()]
        weights = [getattr(end, "current", end).weight for end in ends]
        assert weights[0] is weights[1]
        shared = logits(made)
        assert np.abs(shared - unmerged).max() > 0.1
        with made.disable_adapter():
            assert np.array_equal(
                logits(made), logits(small.base("float64", tie_word_embeddings=True))
            )
        assert np.array_equal(logits(made), shared)
        made.unmerge_adapter()
        assert bits(made) == before
        assert np.array_equal(logits(made), unmerged)
        made.merge_adapter(tied="untie")  # what was chosen before is forgotten
        assert near(logits(made), unmerged)
        made.unmerge_adapter()
    plain = made.merge_and_unload(tied="untie")
    assert plain.config.tie_word_embeddings is False
    assert near(logits(plain), unmerged)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize(("first", "then"), [("share", "untie"), ("untie", "share")])
def test_what_is_merged_in_one_way_is_not_taken_for_the_other(
    target: str, first: str, then: str
) -> None:
    made = model(target)
    unmerged = logits(made)
    made.merge_adapter(tied=first)
    before = logits(made)
    for merge in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(
            ConfigError,
            match=f"default is merged with tied='{first}', got tied='{then}'",
        ):
            merge(tied=then)
        assert np.array_equal(logits(made), before)
    made.merge_adapter()  # it has been said
    plain = made.merge_and_unload(tied=first) if target == "lm_head" else made.merge_and_unload()
    assert plain.config.tie_word_embeddings == (first == "share")
    assert np.array_equal(logits(plain), before)
    assert near(before, unmerged) == (first == "untie")


def test_an_adapter_elsewhere_and_an_untied_model_need_not_say() -> None:
    for made in (model("q_proj"), model("embed_tokens", "lm_head", tie=False)):
        before = logits(made)
        assert near(logits(made.merge_and_unload()), before)


def test_beside_a_tied_adapter_one_of_the_embedding_alone_has_to_be_told_again() -> None:
    made = model("embed_tokens", ensure_weight_tying=True)
    made.add_adapter("b", lora("embed_tokens", r=2))
    made.set_adapter(["default", "b"])
    before = logits(made)
    with pytest.raises(ConfigError, match="adapter default, b changes both, each in its own way"):
        made.merge_adapter()
    made.merge_adapter(tied="untie")
    assert near(logits(made), before)
    made.unmerge_adapter()
    made.set_adapter("default")
    made.merge_adapter()
    assert made.model.lm_head.base_layer.weight is made.model.model.embed_tokens.base_layer.weight


def test_a_broken_adapter_merges_nowhere() -> None:
    made = model("embed_tokens", "q_proj", tie=False)
    p = trained(made)["base_model.model.model.embed_tokens.lora_embedding_B.default"]
    p.data = p.data * np.inf
    before = bits(made)
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens"):
        made.merge_adapter()
    assert bits(made) == before


def test_by_the_weights_of_a_step_gradients_are_the_same() -> None:
    made = model("embed_tokens", "q_proj", ensure_weight_tying=True)
    alone = step(made)
    made.prepare_step()
    assert made.get_base_model().lm_head._effective
    prepared = step(made)
    made.end_step()
    assert list(prepared) == list(alone)
    assert all(near(prepared[name], alone[name]) for name in alone)


# ---- what does not go together ----

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora in two places": ({"ensure_weight_tying": True, "use_dora": True}, "would be scaled apart"),
    "another rank": ({"ensure_weight_tying": True, "rank_pattern": {"lm_head": 2}}, "must have the rank and the"),
    "both": ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "adapted or saved, not both"),
    "saved and adapted": ({"modules_to_save": ["embed_tokens"]}, "match nothing"),
    "tokens of a target": ({"trainable_token_indices": [1]}, "model.embed_tokens is a target or a module to save"),
    "tokens of a tied target": (
        {"target_modules": ["lm_head"], "trainable_token_indices": [1]}, "lm_head is a target or a module to save"
    ),
    "no such row": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, V]}, "has no row 16, only 16"),
    "no such name": ({"target_modules": ["q_proj"], "trainable_token_indices": {"wte": [1]}}, "'wte' matches nothing"),
    "not an embedding": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"model.norm": [1]}}, "is a RMSNorm, not an embedding"
    ),
    "other tokens": (
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]},
            "ensure_weight_tying": True,
        },
        "must have the same trainable tokens",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:ensure_weight_tying")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_changes(name: str) -> None:
    options, message = REFUSED[name]
    plain = small.base(tie_word_embeddings=True)
    before = bits(plain)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(plain, lora(**{"target_modules": ["embed_tokens"], **options}))
    assert bits(plain) == before


def test_adalora_has_no_triplets_for_an_embedding() -> None:
    with pytest.raises(
        ConfigError, match=r"target model\.embed_tokens is not a linear layer but of kind embedding"
    ):
        get_peft_model(small.base(), AdaLoraConfig(target_modules=["embed_tokens"], total_step=9))


@pytest.mark.parametrize(
    ("value"),
    [[], {}, [1, 1], [-1], [True], [1.0], "1", {"embed_tokens": []}, {1: [1]}, {"embed_tokens": 1}],
    ids=str,
)
def test_trainable_tokens_are_a_list_of_different_ones(value: Any) -> None:
    with pytest.raises(
        ConfigError,
        match="trainable_token_indices must be a list of different tokens, or one for each",
    ):
        lora("q_proj", trainable_token_indices=value)


@pytest.mark.parametrize("tie", [False, True])
def test_tying_that_concerns_nothing_warns(tie: bool) -> None:
    says = "no target and no module to save ends in" if tie else "have weights of their own"
    with pytest.warns(UserWarning, match=f"ensure_weight_tying: .*{says}"):
        made = model("q_proj", tie=tie, ensure_weight_tying=True)
    assert made.peft_config["default"].target_modules == ["q_proj"]


# ---- files ----


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [1]},
        },
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 2]},
        },
    ],
    ids=str,
)
def test_what_was_saved_is_loaded_under_any_name(options: dict[str, Any], tmp_path: Path) -> None:
    made = model(**options, bias="all").eval()
    rng = np.random.default_rng(0)
    for p in trained(made).values():
        p.data = rng.standard_normal(p.shape)
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        small.base("float64", tie_word_embeddings=True), tmp_path, "other"
    )
    assert np.array_equal(logits(again), logits(made))
    again.save_pretrained(tmp_path)
    files = [
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "other")
    ]
    assert {k: a.tobytes() for k, a in files[0].items()} == {
        k: a.tobytes() for k, a in files[1].items()
    }


@pytest.mark.parametrize(
    "key", ["model.embed_tokens.base_layer", "lm_head.base_layer", "lm_head.lora_A"]
)
def test_what_a_file_says_twice_must_be_what_is_here(key: str, tmp_path: Path) -> None:
    model("embed_tokens", ensure_weight_tying="lm_head" in key).save_pretrained(tmp_path)
    key += ".weight"
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    plain = small.base("float64", tie_word_embeddings=True)
    before = bits(plain)
    for change in (1e-9, np.nan):
        changed = tensors[f"base_model.model.{key}"].copy()
        changed[1, 1] += change
        save_file(file, {**tensors, f"base_model.model.{key}": changed})
        with pytest.raises(FormatError, match=f"base_model.model.{key} differs from the base"):
            PeftModel.from_pretrained(plain, tmp_path)
        assert bits(plain) == before
    save_file(file, {k: a for k, a in tensors.items() if k != f"base_model.model.{key}"})
    PeftModel.from_pretrained(plain, tmp_path)  # whoever wrote it left it out


# ---- running ----

SHAPES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "lora_dropout": 0.2},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4]},
    "copies": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_on_a_device_has_the_bits_of_one_here(name: str) -> None:
    batch = Batch(IDS[:, :-1].astype(np.int32), IDS[:, 1:].astype(np.int32))
    results = []
    for device in ("cpu", STRICT):
        made = model(**SHAPES[name], dtype="float32", device=device).train()
        own = trained(made)
        with ShardedStep(made, shard=2**31) as sharded:
            loss, found = sharded.gradients(batch, list(own.values()))
        grads = [own[n].backend.to_numpy(g).tobytes() for n, g in zip(own, found, strict=True)]
        results.append((float(loss), list(own), grads))
        made.merge_adapter(tied="untie" if name in ("embedding", "dora") else None)
        results[-1] += (logits(made).tobytes(),)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", SHAPES)
def test_generated_text_is_that_of_the_logits(name: str) -> None:
    made = model(**SHAPES[name]).eval()
    ids = IDS[:1, :4]
    expected = ids
    for _ in range(6):
        expected = np.concatenate(
            [expected, made(expected).numpy()[:, -1].argmax(axis=-1)[:, None]], axis=1
        )
    assert np.array_equal(generate(made, ids, 6, temperature=0), expected)


def test_an_embedding_reads_ids_and_refuses_what_is_outside() -> None:
    made = model("embed_tokens").get_base_model().model.embed_tokens
    assert isinstance(made(np.array(3)), Tensor)
    assert made(np.array(3)).shape == (C,)
    with pytest.raises(Exception, match=r"id 16 is outside \[0, 16\)"):
        made(np.array([16]))


def test_rows_of_several_tasks_meet_their_own_embeddings() -> None:
    tasks = {"x": lora("embed_tokens"), "y": lora("q_proj"), "z": lora("lm_head", r=2)}
    made = get_multitask_model(small.base("float64", tie_word_embeddings=True), tasks).eval()
    for p in trained(made).values():
        p.data = np.random.default_rng(p.size).standard_normal(p.shape)
    ids, names = np.concatenate([IDS, IDS]), ["z", "y", "x", "__base__"]
    mixed = made(ids, tasks=names).numpy()
    for row, name in enumerate(names):
        assert near(mixed[row], made(ids[row : row + 1], tasks=name).numpy()[0])
    assert near(made.merge_task("x", tied="untie")(ids).numpy()[2], mixed[2])
    with pytest.raises(ConfigError, match="tied='untie'"):
        made.merge_task("x")
    made.declare("both", ["x", "z"])
    with pytest.raises(
        ConfigError, match="x, z adapt an embedding, where two cannot be put together as one LoRA"
    ):
        made.task_adapter("both")


@pytest.mark.parametrize("tying", [False, True])
def test_verify_measures_what_stands_between_the_ends(tying: bool, tmp_path: Path) -> None:
    small.base(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    made = model("embed_tokens", "q_proj", dtype="float32", ensure_weight_tying=tying)
    made.save_pretrained(tmp_path / "adapter")
    report = verify_files(tmp_path / "base", tmp_path / "adapter")
    assert [f.layer.rpartition(".")[2] for f in report.layers] == ["q_proj"] * 2
    assert all(row.ok for row in report.rows)
