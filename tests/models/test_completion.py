"""Completion: the text after a prompt as it grows, and the first of its ends."""

from __future__ import annotations

import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from minilora import ByteTokenizer, generate
from minilora.errors import ConfigError
from minilora.models.completion import Completion, complete_all, stream_text

BYTES = ByteTokenizer()
TEXTS = st.text("abé\N{GRINNING FACE}", max_size=12)
STOPS = st.lists(st.text("abé\N{GRINNING FACE}", min_size=1, max_size=4), max_size=3)


def grow(text: str, stops: list[str], prompt: str = "") -> tuple[Completion, list[str]]:
    """(the completion of a prompt by the bytes of a text, what is settled after each byte)"""
    completion = Completion(BYTES, BYTES.encode(prompt).tolist(), stops=stops)
    settled = []
    for byte in BYTES.encode(text).tolist():
        completion.append(byte)
        settled.append(completion.settled)
    return completion, settled


def cut(text: str, stops: list[str]) -> str:
    """The text before the first stop that is complete; of several, the longest."""
    for end in range(1, len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return text[: end - max(sizes)]
    return text


@given(TEXTS, STOPS, TEXTS)
def test_completion_ends_before_the_first_stop_and_ignores_the_prompt(text, stops, prompt):
    completion, settled = grow(text, stops, prompt)
    expected = cut(text, stops)
    assert completion.completion == expected
    assert completion.text == prompt + expected
    assert completion.has_ended == (expected != text)
    # What is settled only grows, and never has to be taken back.
    for before, after in zip(settled, [*settled, completion.text][1:], strict=True):
        assert after.startswith(before)


def test_completion_holds_back_what_may_become_a_stop():
    _, settled = grow("a</sb</s>c", ["</s>"])
    assert settled == ["a", "a", "a", "a", "a</sb", "a</sb", "a</sb", "a</sb", "a</sb", "a</sb"]


def test_completion_ends_at_eos_without_it():
    completion = Completion(BYTES, eos=[10])
    for byte in b"ab\ncd":
        completion.append(byte)
    assert (completion.text, completion.has_ended) == ("ab", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "ab", [3], None])
def test_completion_refuses_stops_that_are_no_texts(stops):
    with pytest.raises(ConfigError, match="stops must be a list of texts"):
        Completion(BYTES, stops=stops)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_stream_text_and_complete_all_end_at_a_stop_across_tokens(size):
    model = small.base(vocab_size=256)
    prompts = [[104, 105], [97], [100, 101, 102]]
    whole = [Completion(BYTES) for _ in prompts]
    complete_all(model, prompts, 20, whole, seed=5)
    first = generate(model, [prompts[0]], 20, seed=5)[0][2:].tolist()
    assert whole[0].ids == first
    stop = whole[0].text[4 : 4 + size]
    completions = [Completion(BYTES, stops=[stop]) for _ in prompts]
    complete_all(model, prompts, 20, completions, seed=5)
    assert [c.text for c in completions] == [cut(c.text, [stop]) for c in whole]
    completion = Completion(BYTES, stops=[stop])
    pieces = stream_text(model, prompts[0], 20, completion, seed=5)
    assert "".join(pieces) == completions[0].text
    assert len(completion.ids) < 20  # it does not go on after the stop
