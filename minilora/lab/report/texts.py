"""The beginning of a text, token by token: its loss in both models, and what each expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...autograd import no_grad
from ...data.batches import Batch, PackedRecords, evaluation_windows
from ...data.tokenizer import Tokenizer
from ...errors import NonFiniteError
from ...functional import IGNORE
from ...threads import one_blas_thread
from .content import ColouredText, Guess, TokenChange
from .measuring import MeasuredText
from .subject import Subject

Array = np.ndarray
TOKENS = 300
GUESSES = 3
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an unfinished character decode to


class Piece(NamedTuple):
    """The text of `size` tokens in a row; several where they share a character."""

    text: str
    size: int


class Prediction(NamedTuple):
    """What a model expected in the place of a token: its loss, and the likeliest tokens."""

    loss: float
    guesses: list[tuple[int, float]]


def colour_text(
    subject: Subject, tokenizer: Tokenizer, text: MeasuredText, most: int = TOKENS
) -> ColouredText:
    """The first tokens of a text, at most `most`, with their losses in nats in both models.

    They are read in the windows in which the text is evaluated. ConfigError; NonFiniteError.
    """
    subject.require_comparable()
    ids, windows = _beginning(text, most)
    with subject.as_base() as model:
        before = _predict(model, windows, len(ids))
    with subject.as_adapted() as model:
        after = _predict(model, windows, len(ids))
    name_token = _naming(tokenizer, ids)

    def name_guesses(prediction: Prediction | None) -> list[Guess]:
        guesses = [] if prediction is None else prediction.guesses
        return [Guess(name_token(i), probability) for i, probability in guesses]

    tokens = []
    place = 0
    for piece in cut_text(tokenizer, ids):
        at = slice(place, place + piece.size)
        losses = _sum(before[at]), _sum(after[at])
        guesses = name_guesses(before[place]), name_guesses(after[place])
        tokens.append(TokenChange(piece.text, *losses, *guesses, piece.size))
        place += piece.size
    return ColouredText(text.name, tokens)


def _beginning(text: MeasuredText, most: int) -> tuple[Array, list[tuple[int, Batch]]]:
    """(the first ids, windows over them with the place where each begins)."""
    tokens = text.tokens
    if isinstance(tokens, PackedRecords):
        edges = tokens.edges
        count = max(1, int(np.searchsorted(edges, most, "right")) - 1)
        starts = edges[:count].tolist()
        ids = tokens.ids[: edges[count]]
    else:
        ids = tokens = tokens[:most]
        starts = list(range(0, len(ids) - 1, text.context))
    windows = evaluation_windows(tokens, text.context, 1)
    return ids, list(zip(starts, windows, strict=False))


def _predict(
    model: Any, windows: Sequence[tuple[int, Batch]], count: int
) -> list[Prediction | None]:
    """What the model expected in the place of each of `count` tokens; None where none counts."""
    was_training = model.training
    model.eval()
    predictions: list[Prediction | None] = [None] * count
    try:
        with one_blas_thread(), no_grad():
            for start, window in windows:
                window = window.trim()
                logits = model(window.ids, first_key=window.first_key).numpy()[0]
                for place, target in enumerate(window.targets[0].tolist()):
                    if target != IGNORE:
                        predictions[start + place + 1] = _look_at(logits[place], target)
    finally:
        model.train(was_training)
    return predictions


def _look_at(logits: Array, target: int) -> Prediction:
    """logits (V,). NonFiniteError."""
    wide = logits.astype(np.float64)
    if not np.isfinite(wide).all():
        raise NonFiniteError("the model gives logits that are not finite: repair its weights")
    logarithms = wide - wide.max()
    logarithms -= math.log(np.exp(logarithms).sum())
    likeliest = np.argsort(-logarithms, kind="stable")[:GUESSES].tolist()
    guesses = [(i, math.exp(float(logarithms[i]))) for i in likeliest]
    return Prediction(-float(logarithms[target]), guesses)


def _sum(predictions: Sequence[Prediction | None]) -> float | None:
    """The loss of the tokens that count; None if none of them does."""
    losses = [one.loss for one in predictions if one is not None]
    return math.fsum(losses) if losses else None


# ---- what tokens are as text ---------------------------------------------------------------------


def cut_text(tokenizer: Tokenizer, ids: Array) -> list[Piece]:
    """The text of the ids in pieces, which joined are the text.

    A piece is one token, or as many as a character has that is cut into several tokens.
    """
    numbers = ids.tolist()
    whole = tokenizer.decode(numbers)
    pieces = []
    begun = 0  # characters in earlier pieces
    first = 0  # the token with which the next piece begins
    for i in range(len(numbers)):
        end = len(whole)
        if i < len(numbers) - 1:
            end = min(end, len(tokenizer.decode(numbers[: i + 1]).rstrip(INCOMPLETE)))
        if end > begun or i == len(numbers) - 1:
            pieces.append(Piece(whole[begun : max(begun, end)], i + 1 - first))
            begun, first = max(begun, end), i + 1
    return pieces


def _naming(tokenizer: Tokenizer, ids: Array) -> Callable[[int], str]:
    """A function from an id to its text, as it is behind another token.

    A tokenizer may leave out a space with which a text begins, and such a space tells tokens apart.
    """
    before: list[int] = []
    for i in dict.fromkeys(ids.tolist()):
        if tokenizer.decode([i]).rstrip(INCOMPLETE):
            before = [i]
            break
    start = len(tokenizer.decode(before))
    texts: dict[int, str] = {}

    def name(i: int) -> str:
        if i not in texts:
            texts[i] = tokenizer.decode([*before, i])[start:]
        return texts[i]

    return name
