"""Adapters of the embedding, of the head, and of both if they share one weight.

Shapes: W (V, C), A (r, V), B (C, r); W' is W with the adapter merged.
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
EMBEDDING = "base_model.model.model.embed_tokens"


def lora(*targets: str, **options: Any) -> LoraConfig:
    """A configuration whose adapter changes the output from the start."""
    fields = {"r": 3, "lora_alpha": 5, "target_modules": list(targets), "init_lora_weights": False}
    return LoraConfig(**fields | options)


def tied_base(dtype: str = "float64") -> Any:
    return small.base(dtype, tie_word_embeddings=True)


def model(
    *targets: str, tie: bool = True, dtype: str = "float64", device: Any = "cpu", **options: Any
) -> PeftModel:
    base = small.base(dtype, device, tie_word_embeddings=tie)
    made = get_peft_model(base, lora(*targets, **options))
    scale_magnitudes(made)
    return made


def scale_magnitudes(made: PeftModel) -> None:
    for name, p in made.named_parameters():
        if "magnitude" in name:
            p.data = p.data * np.float32(1.5)


def trained(made: PeftModel) -> dict[str, Any]:
    return {name: p for name, p in made.named_parameters() if p.requires_grad}


def loss_of(made: Any) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(made(IDS)[:, :-1], IDS[:, 1:])


def step(made: PeftModel) -> dict[str, np.ndarray]:
    """The gradients of the loss, by name."""
    params = trained(made)
    grads = gradients(loss_of(made), list(params.values()))
    return {name: g for name, g in zip(params, grads, strict=True) if g is not None}


def gradient_of(plain: Any, weight: Any) -> np.ndarray:
    (G,) = gradients(loss_of(plain), [weight])
    assert G is not None
    return G


def near(got: Any, expected: Any, tolerance: float = 1e-12) -> bool:
    assert got.shape == expected.shape
    return bool(np.abs(got - expected).max() <= tolerance * np.abs(expected).max())


# ---- one embedding -------------------------------------------------------------------------------

SIZES = st.integers(1, 20)


@given(SIZES, SIZES, st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_lora_embedding_gives_the_rows_of_the_formula(
    v: int, c: int, r: int, rslora: bool, dora: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    layer = LoraEmbedding(Embedding(rng.standard_normal((v, c))))
    base = layer.as_linear(layer.base_layer)
    config = lora("wte", r=r, use_rslora=rslora, use_dora=dora)
    kind = DoraEmbeddingAdapter if dora else EmbeddingAdapter
    adapter = kind(base, "wte", config, rng)
    layer.adapters["a"] = adapter
    layer.active = ["a"]
    shapes = {name: getattr(adapter, name).shape for name in kind.TENSORS}
    assert shapes == kind.shapes(base, r)
    assert sum(p.size for p in adapter.parameters()) == r * (v + c) + c * dora
    W, A, B = (p.data for p in (layer.weight, adapter.lora_embedding_A, adapter.lora_embedding_B))
    s = 5 / np.sqrt(r) if rslora else 5 / r
    expected = W + s * (B @ A).T
    size = np.abs(W) + s * (np.abs(B) @ np.abs(A)).T
    ulps = 4 * (r + 4)
    if dora:
        m = adapter.lora_magnitude_vector.data = rng.standard_normal(c)
        k = m / np.linalg.norm(expected, axis=0)
        expected = k * expected
        size = abs(k) * size
        ulps = 2 * v + 4 * r + 40
    ids = rng.integers(0, v, (2, 3))
    before = layer(ids).data
    u = np.finfo(np.float64).eps / 2
    assert (abs(before - expected[ids]) <= ulps * u * size[ids]).all()
    unmerged = layer.weight.data
    layer.merge()
    assert near(layer(ids).data, before)
    layer.unmerge()
    assert layer.weight.data is unmerged
    assert np.array_equal(layer(ids).data, before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_embedding_adapter_starts_as_the_base_with_A_zero_and_B_random(
    tie: bool, dora: bool
) -> None:
    plain = small.base(tie_word_embeddings=tie)
    before = logits(plain)
    made = get_peft_model(plain, lora("embed_tokens", init_lora_weights=True, use_dora=dora))
    assert np.array_equal(logits(made), before)
    params = trained(made)
    assert not params[f"{EMBEDDING}.lora_embedding_A.default"].data.any()
    assert 0.5 < params[f"{EMBEDDING}.lora_embedding_B.default"].data.std() < 1.5
    assert made.get_nb_trainable_parameters()[0] == 3 * (V + C) + C * dora


def test_embedding_adapter_has_the_gradients_of_the_merged_weight_projected() -> None:
    """dA = s B^T G^T and dB = s G^T A^T for G = dL/dW' (V, C), the gradient of the merged model."""
    made = model("embed_tokens", tie=False)
    grads = step(made)
    adapter = made.get_base_model().model.embed_tokens.adapters["default"]
    plain = made.merge_and_unload()
    require_projections(grads, adapter, gradient_of(plain, plain.get_input_embeddings().weight))


def require_projections(grads: dict[str, np.ndarray], adapter: Any, G: np.ndarray) -> None:
    s = adapter.scaling
    A = adapter.lora_embedding_A.data
    B = adapter.lora_embedding_B.data
    assert near(grads[f"{EMBEDDING}.lora_embedding_A.default"], s * B.T @ G.T)
    assert near(grads[f"{EMBEDDING}.lora_embedding_B.default"], s * G.T @ A.T)


def test_dora_embedding_adapter_takes_the_norms_for_constants_in_gradients() -> None:
    made = model("embed_tokens", tie=False, use_dora=True)
    layer = made.get_base_model().model.embed_tokens
    adapter = layer.adapters["default"]
    A = adapter.lora_embedding_A.data
    B = adapter.lora_embedding_B.data
    whole = layer.weight.data + adapter.scaling * (B @ A).T
    norm = np.linalg.norm(whole, axis=0)
    k = adapter.lora_magnitude_vector.data / norm
    grads = step(made)
    plain = made.merge_and_unload()
    G = gradient_of(plain, plain.get_input_embeddings().weight)
    require_projections(grads, adapter, G * k)
    dm = (G * whole).sum(axis=0) / norm
    assert near(grads[f"{EMBEDDING}.lora_magnitude_vector.default.weight"], dm)


# ---- one weight in two places --------------------------------------------------------------------


def test_head_adapter_shares_parameters_whose_gradient_is_the_sum_of_both_uses() -> None:
    """G = G_embedding + G_head: the merged model with one weight, and with two."""
    made = model("embed_tokens", "q_proj", ensure_weight_tying=True)
    inside = made.get_base_model()
    embedding = inside.model.embed_tokens
    head = inside.lm_head
    assert type(head.adapters["default"]) is HeadAdapter
    assert np.array_equal(head.delta_weight("default"), embedding.delta_weight("default").T)
    assert made.get_nb_trainable_parameters()[0] == 3 * (V + C) + 2 * 3 * (16 + 16)
    assert not any("lm_head" in name for name in trained(made))
    grads = step(made)
    plain = made.merge_and_unload()
    weight = plain.lm_head.weight
    assert weight is plain.get_input_embeddings().weight
    G = gradient_of(plain, weight)
    plain.lm_head.weight = type(weight)(weight.data.copy())
    of_embedding = gradient_of(plain, weight)
    of_head = gradient_of(plain, plain.lm_head.weight)
    assert near(of_embedding + of_head, G)
    assert not near(of_embedding, G, 0.01)
    assert not near(of_head, G, 0.01)
    require_projections(grads, embedding.adapters["default"], G)


PLACES = {
    ("embed_tokens",): "the embedding",
    ("lm_head",): "the head",
    ("embed_tokens", "lm_head"): "both, each in its own way",
}


@pytest.mark.parametrize("targets", PLACES)
@pytest.mark.parametrize("dora", [False, True])
def test_merge_adapter_of_a_tied_model_needs_a_choice(targets: tuple[str, ...], dora: bool) -> None:
    made = model(*targets, use_dora=dora)
    before = bits(made)
    unmerged = logits(made)
    needed = f"adapter default changes {PLACES[targets]}, .*tied='untie'.*tied='share'"
    for merge in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(ConfigError, match=needed):
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
    plain = made.merge_and_unload(tied="untie")
    assert plain.config.tie_word_embeddings is False
    assert near(logits(plain), unmerged)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dora", [False, True])
def test_merge_adapter_with_tied_share_changes_both_places(target: str, dora: bool) -> None:
    made = model(target, use_dora=dora)
    before = bits(made)
    unmerged = logits(made)
    made.merge_adapter(tied="share")
    ends = [made.model.get_input_embeddings(), made.model.get_output_embeddings()]
    weights = [getattr(end, "current", end).weight for end in ends]
    assert weights[0] is weights[1]
    shared = logits(made)
    assert np.abs(shared - unmerged).max() > 0.1
    with made.disable_adapter():
        assert np.array_equal(logits(made), logits(tied_base()))
    assert np.array_equal(logits(made), shared)
    made.unmerge_adapter()
    assert bits(made) == before
    assert np.array_equal(logits(made), unmerged)
    made.merge_adapter(tied="untie")  # the first choice is forgotten
    assert near(logits(made), unmerged)
    made.unmerge_adapter()
    plain = made.merge_and_unload(tied="untie")
    assert plain.config.tie_word_embeddings is False
    assert near(logits(plain), unmerged)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize(("first", "then"), [("share", "untie"), ("untie", "share")])
def test_merge_adapter_refuses_another_choice_than_before(
    target: str, first: str, then: str
) -> None:
    made = model(target)
    unmerged = logits(made)
    made.merge_adapter(tied=first)
    before = logits(made)
    message = f"default is merged with tied='{first}', got tied='{then}'"
    for merge in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(ConfigError, match=message):
            merge(tied=then)
        assert np.array_equal(logits(made), before)
    made.merge_adapter()  # the choice is known
    plain = made.merge_and_unload(tied=first if target == "lm_head" else None)
    assert plain.config.tie_word_embeddings == (first == "share")
    assert np.array_equal(logits(plain), before)
    assert near(before, unmerged) == (first == "untie")


def test_merge_and_unload_needs_no_choice_without_a_changed_tie() -> None:
    for made in (model("q_proj"), model("embed_tokens", "lm_head", tie=False)):
        before = logits(made)
        assert near(logits(made.merge_and_unload()), before)


def test_merge_adapter_needs_a_choice_for_a_tied_adapter_beside_the_embedding_s() -> None:
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
    inside = made.model
    assert inside.lm_head.base_layer.weight is inside.model.embed_tokens.base_layer.weight


def test_merge_adapter_merges_nothing_if_an_embedding_s_adapter_is_not_finite() -> None:
    made = model("embed_tokens", "q_proj", tie=False)
    p = trained(made)[f"{EMBEDDING}.lora_embedding_B.default"]
    p.data = p.data * np.inf
    before = bits(made)
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens"):
        made.merge_adapter()
    assert bits(made) == before


def test_prepare_step_changes_no_gradient_of_a_tied_adapter() -> None:
    made = model("embed_tokens", "q_proj", ensure_weight_tying=True)
    alone = step(made)
    made.prepare_step()
    assert made.get_base_model().lm_head._effective
    prepared = step(made)
    made.end_step()
    assert list(prepared) == list(alone)
    for name, expected in alone.items():
        assert near(prepared[name], expected)


# ---- what does not go together -------------------------------------------------------------------

REFUSED: dict[str, tuple[LoraConfig, str]] = {}


def refused(name: str, message: str, target: str = "embed_tokens", **options: Any) -> None:
    REFUSED[name] = lora(target, **options), message


TIED = {"ensure_weight_tying": True}
ROWS_OF_TWO = {"embed_tokens": [1], "lm_head": [2]}
refused("dora in two places", "would be scaled apart", **TIED, use_dora=True)
refused("another rank", "must have the rank and the", **TIED, rank_pattern={"lm_head": 2})
refused("both", "adapted or saved, not both", **TIED, modules_to_save=["lm_head"])
refused("saved and adapted", "match nothing", modules_to_save=["embed_tokens"])
TAKEN = "is a target or a module to save"
refused("tokens of a target", f"model.embed_tokens {TAKEN}", trainable_token_indices=[1])
refused("tokens of a tied target", f"lm_head {TAKEN}", "lm_head", trainable_token_indices=[1])
refused("no such row", "has no row 16, only 16", "q_proj", trainable_token_indices=[3, V])
refused("no such name", "'wte' matches nothing", "q_proj", trainable_token_indices={"wte": [1]})
NORM = {"model.norm": [1]}
refused("a norm", "is a RMSNorm, not an embedding", "q_proj", trainable_token_indices=NORM)
SAME = "must have the same trainable tokens"
refused("other tokens", SAME, "q_proj", trainable_token_indices=ROWS_OF_TWO, **TIED)


@pytest.mark.filterwarnings("ignore:ensure_weight_tying")
@pytest.mark.parametrize("name", REFUSED)
def test_get_peft_model_refuses_what_does_not_go_together_and_changes_nothing(name: str) -> None:
    config, message = REFUSED[name]
    plain = tied_base("float32")
    before = bits(plain)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(plain, config)
    assert bits(plain) == before


def test_get_peft_model_refuses_adalora_on_an_embedding() -> None:
    message = r"target model\.embed_tokens is not a linear layer but of kind embedding"
    with pytest.raises(ConfigError, match=message):
        get_peft_model(small.base(), AdaLoraConfig(target_modules=["embed_tokens"], total_step=9))


NOT_TOKENS: list[Any] = [[], {}, [1, 1], [-1], [True], [1.0], "1"]
NOT_TOKENS += [{"embed_tokens": []}, {1: [1]}, {"embed_tokens": 1}]


@pytest.mark.parametrize("value", NOT_TOKENS, ids=str)
def test_lora_config_refuses_tokens_that_are_not_lists_of_different_ones(value: Any) -> None:
    message = "trainable_token_indices must be a list of different tokens, or one for each"
    with pytest.raises(ConfigError, match=message):
        lora("q_proj", trainable_token_indices=value)


@pytest.mark.parametrize("tie", [False, True])
def test_get_peft_model_warns_of_ensure_weight_tying_that_concerns_nothing(tie: bool) -> None:
    why = "no target and no module to save ends in" if tie else "have weights of their own"
    with pytest.warns(UserWarning, match=f"ensure_weight_tying: .*{why}"):
        made = model("q_proj", tie=tie, ensure_weight_tying=True)
    assert made.peft_config["default"].target_modules == ["q_proj"]


# ---- files ---------------------------------------------------------------------------------------

SAVED: list[LoraConfig] = []


def saved(*targets: str, **options: Any) -> None:
    SAVED.append(lora(*targets, bias="all", **options))


saved("embed_tokens")
saved("embed_tokens", use_dora=True)
saved("lm_head", "embed_tokens", "q_proj")
saved("lm_head", ensure_weight_tying=True)
saved("q_proj", modules_to_save=["lm_head"], ensure_weight_tying=True)
saved("q_proj", trainable_token_indices=[5, 2])
saved("q_proj", trainable_token_indices={"embed_tokens": [5, 2], "lm_head": [1]})
saved("q_proj", trainable_token_indices={"embed_tokens": [5, 2], "lm_head": [5, 2]})


@pytest.mark.parametrize("config", SAVED, ids=range(len(SAVED)))
def test_from_pretrained_loads_under_any_name_what_was_saved(
    config: LoraConfig, tmp_path: Path
) -> None:
    made = get_peft_model(tied_base(), config).eval()
    rng = np.random.default_rng(0)
    for p in trained(made).values():
        p.data = rng.standard_normal(p.shape)
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tied_base(), tmp_path, "other")
    assert np.array_equal(logits(again), logits(made))
    again.save_pretrained(tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    after = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert set(after) == set(before)
    for key, array in before.items():
        assert after[key].tobytes() == array.tobytes()


REPEATED = ["model.embed_tokens.base_layer", "lm_head.base_layer", "lm_head.lora_A"]


@pytest.mark.parametrize("layer", REPEATED)
def test_from_pretrained_compares_what_a_file_repeats(layer: str, tmp_path: Path) -> None:
    model("embed_tokens", ensure_weight_tying="lm_head" in layer).save_pretrained(tmp_path)
    key = f"base_model.model.{layer}.weight"
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    array = tensors.pop(key)
    plain = tied_base()
    before = bits(plain)
    for change in (1e-9, np.nan):
        changed = array.copy()
        changed[1, 1] += change
        save_file(file, {**tensors, key: changed})
        with pytest.raises(FormatError, match=f"{key} differs from the base"):
            PeftModel.from_pretrained(plain, tmp_path)
        assert bits(plain) == before
    save_file(file, tensors)
    PeftModel.from_pretrained(plain, tmp_path)  # a file may leave it out


# ---- running -------------------------------------------------------------------------------------

RUNNING = {
    "embedding": lora("embed_tokens", "q_proj"),
    "dora": lora("embed_tokens", "lm_head", use_dora=True),
    "tied": lora("embed_tokens", **TIED, lora_dropout=0.2),
    "tokens": lora("q_proj", trainable_token_indices=[1, 4]),
    "copies": lora("q_proj", modules_to_save=["embed_tokens"], **TIED),
}


def running(name: str, dtype: str = "float64", device: Any = "cpu") -> PeftModel:
    made = get_peft_model(small.base(dtype, device, tie_word_embeddings=True), RUNNING[name])
    scale_magnitudes(made)
    return made


@pytest.mark.parametrize("name", RUNNING)
def test_sharded_step_has_the_same_bits_on_a_device(name: str) -> None:
    batch = Batch(IDS[:, :-1].astype(np.int32), IDS[:, 1:].astype(np.int32))
    results = []
    for device in ("cpu", STRICT):
        made = running(name, "float32", device).train()
        params = trained(made)
        with ShardedStep(made, shard=2**31) as sharded:
            loss, grads = sharded.gradients(batch, list(params.values()))
        hosted = {}
        for (path, p), grad in zip(params.items(), grads, strict=True):
            hosted[path] = p.backend.to_numpy(grad).tobytes()
        made.merge_adapter(tied="untie" if name in ("embedding", "dora") else None)
        results.append((float(loss), list(hosted.items()), logits(made).tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", RUNNING)
def test_generate_follows_the_logits_of_adapted_ends(name: str) -> None:
    made = running(name).eval()
    ids = IDS[:1, :4]
    expected = ids
    for _ in range(6):
        following = made(expected).numpy()[:, -1].argmax(axis=-1)
        expected = np.concatenate([expected, following[:, None]], axis=1)
    assert np.array_equal(generate(made, ids, 6, temperature=0), expected)


def test_lora_embedding_reads_ids_and_refuses_others() -> None:
    layer = model("embed_tokens").get_base_model().model.embed_tokens
    y = layer(np.array(3))
    assert isinstance(y, Tensor)
    assert y.shape == (C,)
    with pytest.raises(Exception, match=r"id 16 is outside \[0, 16\)"):
        layer(np.array([16]))


def test_multitask_model_gives_each_row_its_task_s_embedding() -> None:
    tasks = {"x": lora("embed_tokens"), "y": lora("q_proj"), "z": lora("lm_head", r=2)}
    made = get_multitask_model(tied_base(), tasks).eval()
    for p in trained(made).values():
        p.data = np.random.default_rng(p.size).standard_normal(p.shape)
    ids = np.concatenate([IDS, IDS])
    names = ["z", "y", "x", "__base__"]
    mixed = made(ids, tasks=names).numpy()
    for row, name in enumerate(names):
        alone = made(ids[row : row + 1], tasks=name).numpy()
        assert near(mixed[row], alone[0])
    merged = made.merge_task("x", tied="untie")
    assert near(merged(ids).numpy()[2], mixed[2])
    with pytest.raises(ConfigError, match="tied='untie'"):
        made.merge_task("x")
    made.declare("both", ["x", "z"])
    message = "x, z adapt an embedding, where two cannot be put together as one LoRA"
    with pytest.raises(ConfigError, match=message):
        made.task_adapter("both")


@pytest.mark.parametrize("tying", [False, True])
def test_verify_files_measures_the_layers_between_adapted_ends(tying: bool, tmp_path: Path) -> None:
    tied_base("float32").save_pretrained(tmp_path / "base")
    made = model("embed_tokens", "q_proj", dtype="float32", ensure_weight_tying=tying)
    made.save_pretrained(tmp_path / "adapter")
    report = verify_files(tmp_path / "base", tmp_path / "adapter")
    assert [finding.layer.rpartition(".")[2] for finding in report.layers] == ["q_proj"] * 2
    assert all(row.ok for row in report.rows)
