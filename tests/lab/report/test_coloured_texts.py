"""A text token by token: its losses are those of evaluate, and its tokens join to the text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported import ALSO, BYTES, CONTEXT, TEXT, make_adapted, measured
from test_effects import PACKED

from minilora import CausalLM, LoraConfig, get_peft_model
from minilora.data.tokenizer import ByteTokenizer
from minilora.lab.report.content import ColouredText
from minilora.lab.report.subject import Subject
from minilora.lab.report.texts import colour_text, cut_text
from minilora.training.loop import evaluate

TOKENIZER = ByteTokenizer()


def mean_losses(coloured: ColouredText, tokens: int) -> tuple[float, float]:
    base = [one.base for one in coloured.tokens if one.base is not None]
    adapted = [one.adapted for one in coloured.tokens if one.adapted is not None]
    return math.fsum(base) / tokens, math.fsum(adapted) / tokens


@pytest.mark.parametrize("kind", ["lora", "dora", "hydra", "gpt2", "saved", "nf4 base"])
@pytest.mark.parametrize("most", [2, CONTEXT + 3, 300])
def test_colour_text_has_the_mean_loss_of_evaluate(kind, most):
    model = make_adapted(kind)
    coloured = colour_text(Subject(model), TOKENIZER, measured(), most)
    part = TEXT[:most]
    assert sum(one.count for one in coloured.tokens) == len(part)
    base, adapted = mean_losses(coloured, len(part) - 1)
    assert adapted == pytest.approx(evaluate(model, part, CONTEXT, threads=1), rel=1e-6)
    with model.disable_adapter():
        assert base == pytest.approx(evaluate(model, part, CONTEXT, threads=1), rel=1e-6)
    assert coloured.tokens[0].base is None


def test_colour_text_of_records_has_the_mean_loss_of_evaluate():
    model = make_adapted("lora")
    coloured = colour_text(Subject(model), TOKENIZER, measured(PACKED))
    count = int(PACKED.counts.sum()) - len(PACKED.starts)
    _, adapted = mean_losses(coloured, count)
    assert adapted == pytest.approx(evaluate(model, PACKED, CONTEXT, threads=1), rel=1e-6)
    firsts = [coloured.tokens[start].adapted for start in PACKED.starts]
    assert firsts == [None] * len(PACKED.starts)
    beginning = colour_text(Subject(model), TOKENIZER, measured(PACKED), 15)
    assert len(beginning.tokens) == 15
    assert beginning.tokens == coloured.tokens[:15]
    assert len(colour_text(Subject(model), TOKENIZER, measured(PACKED), 3).tokens) == 8


def test_colour_text_guesses_are_the_likeliest_tokens():
    model = make_adapted("lora")
    coloured = colour_text(Subject(model), TOKENIZER, measured(ALSO), CONTEXT)
    logits = model(ALSO[None, :CONTEXT]).numpy()[0].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert coloured.tokens[0].adapted_guesses == []
    for place, one in enumerate(coloured.tokens[1:]):
        order = np.argsort(-p[place])[:3]
        assert [guess.text for guess in one.adapted_guesses] == [chr(i) for i in order]
        shares = [guess.probability for guess in one.adapted_guesses]
        np.testing.assert_allclose(shares, p[place][order], rtol=1e-5)
        assert one.adapted == pytest.approx(-math.log(p[place, ALSO[place + 1]]), rel=1e-5)


def test_colour_text_joins_the_tokens_of_a_character():
    text = "naïve – 日本語 <b>&amp;</b> 🙂."
    ids = TOKENIZER.encode(text)
    model = get_peft_model(CausalLM(BYTES), LoraConfig(r=2)).eval()
    coloured = colour_text(Subject(model), TOKENIZER, measured(ids))
    assert "".join(one.text for one in coloured.tokens) == text
    assert [one.text for one in coloured.tokens] == list(text)
    assert [one.count for one in coloured.tokens] == [len(c.encode()) for c in text]
    base, adapted = mean_losses(coloured, len(ids) - 1)
    assert base == adapted == pytest.approx(evaluate(model, ids, CONTEXT, threads=1), rel=1e-6)


@given(st.binary(max_size=40))
def test_cut_text_joins_to_the_text_whatever_the_bytes(data):
    ids = TOKENIZER.encode(data)
    pieces = cut_text(TOKENIZER, ids)
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ids)
    assert sum(piece.size for piece in pieces) == len(ids)
    assert all(piece.size for piece in pieces)


class Words:
    """A tokenizer that leaves out the space with which a text begins, as sentencepiece does."""

    WORDS = (" a", " b", "c", " d")

    def decode(self, ids: Any) -> str:
        return "".join(self.WORDS[int(i) % 4] for i in ids).removeprefix(" ")


def test_colour_text_keeps_the_spaces_of_tokens():
    model: Any = make_adapted("lora")
    ids = np.array([0, 1, 2, 3, 1])
    coloured = colour_text(Subject(model), Words(), measured(ids))  # type: ignore[arg-type]
    assert [one.text for one in coloured.tokens] == ["a", " b", "c", " d", " b"]
    texts = {guess.text for one in coloured.tokens for guess in one.adapted_guesses}
    assert texts <= set(Words.WORDS)
