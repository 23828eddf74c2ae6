"""Trainable tokens: some rows of an embedding, of a head, or of both if they share one weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, bits, logits
from strict_xp import STRICT, counted, no_sync

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


def base(tie: bool = True) -> Any:
    return small.base("float64", tie_word_embeddings=tie)


def config(tokens: Any = ROWS, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, **options)


def model(tokens: Any = ROWS, tie: bool = True, **options: Any) -> PeftModel:
    """A model whose trained rows differ from the base's."""
    made = get_peft_model(base(tie), config(tokens, **options))
    rng = np.random.default_rng(3)
    for name, p in rows(made).items():
        p.data = p.data + rng.standard_normal(p.shape) * (1 + ("lm_head" in name))
    return made


def rows(made: PeftModel) -> dict[str, Any]:
    return {name: p for name, p in made.named_parameters() if "trainable_tokens_delta" in name}


def loss_of(made: Any) -> Tensor:
    return F.cross_entropy(made(IDS)[:, :-1], IDS[:, 1:])


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_replace_rows_and_its_gradients(v: int, c: int, data: st.DataObject) -> None:
    indices = st.lists(st.integers(0, v - 1), min_size=1, max_size=v, unique=True)
    at = np.array(data.draw(indices))
    rng = np.random.default_rng(v)
    W = rng.standard_normal((v, c))
    new = rng.standard_normal((len(at), c))
    dy = rng.standard_normal((v, c))
    inputs = [Tensor(W, requires_grad=True), Tensor(new, requires_grad=True)]
    out = replace_rows(inputs[0], at, inputs[1])
    dW, drows = gradients(out, inputs, dy)
    others = np.setdiff1d(np.arange(v), at)
    assert dW is not None and drows is not None  # noqa: PT018
    assert np.array_equal(out.data[at], new)
    assert np.array_equal(out.data[others], W[others])
    assert np.array_equal(drows, dy[at])
    assert np.array_equal(dW[others], dy[others])
    assert not dW[at].any()
    assert directional_error(lambda w, z: replace_rows(w, at, z), W, new) < 1e-9


def test_trainable_tokens_send_their_indices_to_a_device_once() -> None:
    made = model().to(STRICT)
    ids = STRICT.from_numpy(IDS)
    made(ids)
    with counted() as meter, no_sync():
        y = made(ids)
        gradients(y, list(rows(made).values()), y.data)
    assert meter.uploads == []


@pytest.mark.parametrize("tie", [False, True])
def test_trainable_tokens_start_as_the_base_s_rows(tie: bool) -> None:
    plain = base(tie)
    before = logits(plain)
    count = sum(p.size for p in plain.parameters())
    made = get_peft_model(plain, config())
    assert np.array_equal(logits(made), before)
    added = 2 * 2 * (16 + 16) + len(ROWS) * C
    assert made.get_nb_trainable_parameters() == (added, count + added)
    params = rows(made)
    assert list(params) == [NAME]
    W = made.get_base_model().model.embed_tokens.weight.data
    assert np.array_equal(params[NAME].data, W[ROWS])


@pytest.mark.parametrize("tie", [False, True])
def test_trainable_tokens_have_the_gradient_of_the_merged_weight_s_rows(tie: bool) -> None:
    """With a tied head it is the sum of both uses: the rows are one parameter."""
    made = model(tie=tie)
    (grad,) = gradients(loss_of(made), [rows(made)[NAME]])
    plain = made.merge_and_unload()
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tie
    (G,) = gradients(loss_of(plain), [plain.get_input_embeddings().weight])
    assert grad is not None and G is not None  # noqa: PT018
    assert np.abs(grad - G[ROWS]).max() <= 1e-13 * np.abs(G).max()


TOKENS = [ROWS, {"embed_tokens": ROWS}]
TOKENS += [{"embed_tokens": ROWS, "lm_head": ROWS}, {"embed_tokens": [1], "lm_head": [2]}]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tie", [False, True])
def test_merge_adapter_puts_trainable_tokens_in_their_places(tie: bool, tokens: Any) -> None:
    named = {"embed_tokens": tokens} if isinstance(tokens, list) else tokens
    at = named["embed_tokens"]
    apart = tie and named.get("lm_head", at) != at
    choice = "untie" if apart else None
    made = model(tokens, tie)
    assert (HEAD in rows(made)) == ("lm_head" in named and (apart or not tie))
    before = bits(made)
    unmerged = logits(made)
    if apart:
        with pytest.raises(ConfigError, match="adapter default changes both, each in its own way"):
            made.merge_adapter()
        assert bits(made) == before
    made.merge_adapter(tied=choice)
    layer = made.get_base_model().model.embed_tokens
    assert np.array_equal(layer.base_layer.weight.data[at], rows(made)[NAME].data)
    difference = layer.delta_weight("default").T
    others = np.setdiff1d(np.arange(V), at)
    assert not difference[others].any()
    assert np.abs(logits(made) - unmerged).max() <= 1e-12 * np.abs(unmerged).max()
    with made.disable_adapter():
        assert np.array_equal(logits(made), logits(base(tie)))
    made.unmerge_adapter()
    assert bits(made) == before
    assert np.array_equal(logits(made), unmerged)
    plain = made.merge_and_unload(tied=choice)
    assert plain.config.tie_word_embeddings == (tie and not apart)


def test_merge_adapter_refuses_trainable_tokens_that_are_not_finite() -> None:
    made = model()
    p = rows(made)[NAME]
    p.data = p.data * np.nan
    before = bits(made)
    message = r"model\.embed_tokens: merging default gives weights that are not finite"
    with pytest.raises(NonFiniteError, match=message):
        made.merge_adapter()
    assert bits(made) == before


def test_set_adapter_allows_the_trainable_tokens_of_one_adapter_at_a_time() -> None:
    made = model()
    before = logits(made)
    made.add_adapter("b", config([1]))
    assert np.array_equal(logits(made), before)
    message = "adapters default, b each have rows of one embedding: only one can be active"
    with pytest.raises(ConfigError, match=message):
        made.set_adapter(["default", "b"])
    made.set_adapter("b")
    assert np.array_equal(logits(made), logits(base()))
    made.delete_adapter("default")
    assert isinstance(made.get_base_model().lm_head, TrainableTokens)
    assert list(rows(made)) == [NAME.replace("default", "b")]
    plain = made.unload()
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


APART = {"embed_tokens": [1], "lm_head": [2]}


@pytest.mark.parametrize(("first", "second"), [(ROWS, APART), ({"lm_head": [2]}, ROWS)])
def test_add_adapter_refuses_tokens_that_a_head_shares_in_one_adapter_alone(
    first: Any, second: Any
) -> None:
    made = model(first)
    before = bits(made)
    with pytest.raises(ConfigError, match="lm_head has its own trainable tokens in one adapter"):
        made.add_adapter("b", config(second))
    assert bits(made) == before
    assert list(made.peft_config) == ["default"]


def test_add_adapter_allows_tokens_of_another_module_beside_a_tied_adapter() -> None:
    fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    options = LoraConfig(r=2, trainable_token_indices={"layers.0.mlp.down_proj": [1]}, **fields)
    made = get_peft_model(base(), options)
    made.add_adapter("b", options)
    made.set_adapter("b")
    assert np.array_equal(logits(made), logits(base()))


def test_state_dict_with_trainable_tokens_has_no_weight_of_the_base() -> None:
    keys = []
    for tokens in (ROWS, None):
        options = LoraConfig(target_modules=["lm_head"], trainable_token_indices=tokens)
        state = get_peft_model(small.base(), options).state_dict()
        keys.append({key.removeprefix("base_model.model.") for key in state})
    factors = {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    assert keys[0] == factors | {"model.embed_tokens.token_adapter.trainable_tokens_delta"}
    assert keys[1] == factors | {"lm_head.base_layer.weight"}
