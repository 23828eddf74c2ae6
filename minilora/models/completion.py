"""The text that a model writes after a prompt, as its tokens come, and where it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..data.tokenizer import Tokenizer
from ..errors import ConfigError
from .generation import stream

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an unfinished character decode to


class Completion:
    """One text, which grows by a token at a time.

    prompt      ids whose text comes first; no end is looked for in it
    eos         the ids that end the text; they are not part of it
    stops       texts: the completion ends before the first of them, however it is cut into tokens
    ids         the prompt, and the tokens so far
    has_ended   whether one of these ends has come: further tokens change nothing
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        eos: Iterable[int] = (),
        stops: Sequence[str] = (),
    ):
        check_stops(stops)
        self.tokenizer = tokenizer
        self.eos = frozenset(eos)
        self.stops = tuple(stops)
        self.ids = [int(i) for i in prompt]
        self.start = len(tokenizer.decode(self.ids))  # of the completion, in characters
        self.has_ended = False

    def append(self, token: int) -> None:
        if self.has_ended:
            return
        if token in self.eos:
            self.has_ended = True
            return
        self.ids.append(int(token))
        if self.stops:
            text = self.tokenizer.decode(self.ids).rstrip(INCOMPLETE)
            self.has_ended = self._end(text) < len(text)

    @property
    def text(self) -> str:
        """The prompt and the completion, up to its end."""
        text = self.tokenizer.decode(self.ids)
        return text[: self._end(text)]

    @property
    def completion(self) -> str:
        """The text after the prompt."""
        return self.text[self.start :]

    @property
    def settled(self) -> str:
        """The beginning of `text` that no further token changes.

        What may become another character, or the beginning of a stop, is not part of it.
        """
        text = self.text
        if self.has_ended:
            return text
        text = text.rstrip(INCOMPLETE)
        pending = [_count_begun(text[self.start :], stop) for stop in self.stops]
        return text[: len(text) - max(pending, default=0)]

    def _end(self, text: str) -> int:
        """Where the first stop begins in the completion; the length of the text without one.

        The first is the one that is complete first, however the text is cut into tokens.
        """
        places = []
        for stop in self.stops:
            start = text.find(stop, self.start)
            if start >= 0:
                places.append((start + len(stop), start))
        return min(places)[1] if places else len(text)


def _count_begun(text: str, stop: str) -> int:
    """The characters at the end of a text with which a stop begins that may follow."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def check_stops(stops: Sequence[str]) -> None:
    """ConfigError for what is not a list of texts, each of at least one character."""
    is_list = isinstance(stops, Sequence) and not isinstance(stops, str)
    if not is_list or not all(isinstance(stop, str) and stop for stop in stops):
        raise ConfigError(f"stops must be a list of texts that are not empty, got {stops!r:.100}")


def stream_text(
    model: Any,
    ids: Any,
    max_new_tokens: int,
    completion: Completion,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the text of a `completion` in pieces, each as soon as it is settled.

    The prompt `ids` (T,) is continued; the completion's own prompt is what is shown of it. The
    pieces joined are `completion.text`. sampling as for `stream`, without eos.
    """
    shown = 0
    prompt = np.asarray(ids)[None]
    for (token,) in stream(model, prompt, max_new_tokens, eos=completion.eos, **sampling):
        completion.append(token)
        text = completion.settled
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if completion.has_ended:
            break
    yield completion.text[shown:]


def complete_all(
    model: Any,
    prompts: Sequence[Any],
    max_new_tokens: int,
    completions: Sequence[Completion],
    **sampling: Any,
) -> None:
    """Let each of the `completions` grow to its end, after the prompt that has its place."""
    eos = frozenset[int]().union(*(completion.eos for completion in completions))
    for tokens in stream(model, prompts, max_new_tokens, eos=eos, **sampling):
        for completion, token in zip(completions, tokens.tolist(), strict=True):
            completion.append(token)
        if all(completion.has_ended for completion in completions):
            break
