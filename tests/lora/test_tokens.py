"""Trainable tokens: a few rows of an embedding, of a head, or of both where they have one weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, bits, logits

from minilora import functional as F
from minilora.autograd import Tensor, gradients
from minilora.errors import ConfigError, NonFiniteError
from minilora.gradcheck import directional_error
from minilora.lora import LoraConfig, PeftModel, TrainableTokens, get_peft_model
from minilora.lora.tokens import replace_rows

V = C = 16
ROWS = [5, 2, 9]
NAME = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta.default"


def config(tokens: Any = ROWS, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, **options)


def model(tokens: Any = ROWS, tie: bool = True, **options: Any) -> PeftModel:
    """One whose rows are no longer the base's."""
    made = get_peft_model(small.base("float64", tie_word_embeddings=tie), config(tokens, **options))
    rng = np.random.default_rng(3)
    for name, p in rows(made).items():
        p.data = p.data + rng.standard_normal(p.shape) * (1 + ("lm_head" in name))
    return made


def rows(made: PeftModel) -> dict[str, Any]:
    return {name: p for name, p in made.named_parameters() if "trainable_tokens_delta" in name}


def loss_of(made: Any) -> Tensor:
    return F.cross_entropy(made(IDS)[:, :-1], IDS[:, 1:])


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_other_rows_and_where_gradients_go(v: int, c: int, data: st.DataObject) -> None:
    at = np.array(data.draw(st.lists(st.integers(0, v - 1), min_size=1, max_size=v, unique=True)))
    rng = np.random.default_rng(v)
    W, own, dy = (rng.standard_normal(shape) for shape in ((v, c), (len(at), c), (v, c)))
    inputs = Tensor(W, requires_grad=True), Tensor(own, requires_grad=True)
    out = replace_rows(inputs[0], at, inputs[1])
    dW, drows = gradients(out, list(inputs), dy)
    others = np.setdiff1d(np.arange(v), at)
    assert dW is not None and drows is not None  # noqa: PT018
    assert np.array_equal(out.data[at], own)
    assert np.array_equal(out.data[others], W[others])
    assert np.array_equal(drows, dy[at])
    assert np.array_equal(dW[others], dy[others])
    assert not dW[at].any()
    assert directional_error(lambda w, z: replace_rows(w, at, z), W, own) < 1e-9


@pytest.mark.parametrize("tie", [False, True])
def test_only_these_rows_are_trained_and_the_start_is_the_base(tie: bool) -> None:
    plain = small.base("float64", tie_word_embeddings=tie)
    before, count = logits(plain), sum(p.size for p in plain.parameters())
    made = get_peft_model(plain, config())
    assert np.array_equal(logits(made), before)
    low_rank = 2 * 2 * (16 + 16)
    assert made.get_nb_trainable_parameters() == (
        low_rank + len(ROWS) * C,
        count + low_rank + len(ROWS) * C,
    )
    own = rows(made)
    assert list(own) == [NAME]
    assert np.array_equal(
        own[NAME].data, made.get_base_model().model.embed_tokens.weight.data[ROWS]
    )


@pytest.mark.parametrize("tie", [False, True])
def test_rows_have_the_gradient_of_the_whole_weight_there(tie: bool) -> None:
    """With a tied head it is the sum of both uses: the rows are one parameter."""
    made = model(tie=tie)
    (found,) = gradients(loss_of(made), [rows(made)[NAME]])
    plain = made.merge_and_unload()
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tie
    (G,) = gradients(loss_of(plain), [plain.get_input_embeddings().weight])
    assert found is not None and G is not None  # noqa: PT018
    assert np.abs(found - G[ROWS]).max() <= 1e-13 * np.abs(G).max()


@pytest.mark.parametrize(
    "tokens",
    [
        ROWS,
        {"embed_tokens": ROWS},
        {"embed_tokens": ROWS, "lm_head": ROWS},
        {"embed_tokens": [1], "lm_head": [2]},
    ],
)
@pytest.mark.parametrize("tie", [False, True])
def test_merging_puts_the_rows_in_their_places_bit_for_bit(tie: bool, tokens: Any) -> None:
    made = model(tokens, tie)
    apart = (
        tie and isinstance(tokens, dict) and tokens.get("lm_head", ROWS) != tokens["embed_tokens"]
    )
    assert (HEAD in rows(made)) == (
        isinstance(tokens, dict) and "lm_head" in tokens and (apart or not tie)
    )
    before, unmerged = bits(made), logits(made)
    if apart:
        with pytest.raises(ConfigError, match="adapter default changes both, each in its own way"):
            made.merge_adapter()
        assert bits(made) == before
    made.merge_adapter(tied="untie" if apart else None)
    layer = made.get_base_model().model.embed_tokens
    at = tokens if isinstance(tokens, list) else tokens["embed_tokens"]
    assert np.array_equal(layer.base_layer.weight.data[at], rows(made)[NAME].data)
    difference = layer.delta_weight("default").T
    others = np.setdiff1d(np.arange(V), at)
    assert not difference[others].any()
    assert np.abs(logits(made) - unmerged).max() <= 1e-12 * np.abs(unmerged).max()
    with made.disable_adapter():
        assert np.array_equal(logits(made), logits(small.base("float64", tie_word_embeddings=tie)))
    made.unmerge_adapter()
    assert bits(made) == before
    assert np.array_equal(logits(made), unmerged)
    plain = made.merge_and_unload(tied="untie" if apart else None)
    assert plain.config.tie_word_embeddings == (tie and not apart)


def test_rows_that_are_not_finite_are_not_merged() -> None:
    made = model()
    rows(made)[NAME].data = rows(made)[NAME].data * np.nan
    before = bits(made)
    with pytest.raises(
        NonFiniteError,
        match=r"model\.embed_tokens: merging default gives weights that are not finite",
    ):
        made.merge_adapter()
    assert bits(made) == before


def test_two_adapters_have_rows_of_their_own_and_take_turns() -> None:
    made = model()
    before = logits(made)
    made.add_adapter("b", config([1]))
    assert np.array_equal(logits(made), before)
    with pytest.raises(
        ConfigError,
        match="adapters default, b each have rows of one embedding: only one can be active",
    ):
        made.set_adapter(["default", "b"])
    made.set_adapter("b")
    assert np.array_equal(logits(made), logits(small.base("float64", tie_word_embeddings=True)))
    made.delete_adapter("default")
    assert isinstance(made.get_base_model().lm_head, TrainableTokens)
    assert list(rows(made)) == [NAME.replace("default", "b")]
    plain = made.unload()
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def test_a_head_goes_by_the_embedding_in_all_adapters_or_in_none() -> None:
    for first, second in ((ROWS, {"embed_tokens": [1], "lm_head": [2]}), ({"lm_head": [2]}, ROWS)):
        made = model(first)
        before = bits(made)
        with pytest.raises(
            ConfigError, match="lm_head has its own trainable tokens in one adapter"
        ):
            made.add_adapter("b", config(second))
        assert bits(made) == before
        assert list(made.peft_config) == ["default"]


def test_a_file_with_trained_rows_holds_no_weight_of_the_base() -> None:
    made = get_peft_model(
        small.base(), LoraConfig(target_modules=["lm_head"], trainable_token_indices=ROWS)
    )
    ends = {key.removeprefix("base_model.model.") for key in made.state_dict()}
    factors = {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    assert ends == factors | {"model.embed_tokens.token_adapter.trainable_tokens_delta"}
    without = get_peft_model(small.base(), LoraConfig(target_modules=["lm_head"])).state_dict()
    assert {key.removeprefix("base_model.model.") for key in without} == factors | {
        "lm_head.base_layer.weight"
    }
