"""What a report's page says besides its charts: titles of parts, and tokens with their losses."""

from __future__ import annotations

from typing import NamedTuple

from .charts import is_known, percent, show, signed
from .content import ColouredText, Guess, TokenChange

PARTS = {  # in the order of the page; the names are those of a Report's fields
    "summary": "Summary",
    "architecture": "Architecture",
    "training": "Losses and forgetting",
    "maps": "Layer by layer",
    "spectra": "Singular values",
    "rank_curve": "How much rank it needs",
    "text": "A text, token by token",
    "intruders": "Intruder directions",
    "provenance": "Provenance",
    "omitted": "What is left out, and why",
}
LEAST_FULL = 0.5  # nats: a smaller change never has the full colour
FAINTEST = 0.1  # share of the full colour, below which a token stays as it is
LINE_END = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


class Expected(NamedTuple):
    """A token that a model expects, and its probability in words."""

    text: str
    share: str


class Token(NamedTuple):
    """A token as the page shows it.

    text       with visible line ends, each before the line end itself
    direction        "fall" or "rise" of the loss, or empty: hardly any change, or no loss
    strength   share of the full colour
    """

    text: str
    direction: str
    strength: str
    base: str
    adapted: str
    change: str
    base_guesses: list[Expected]
    adapted_guesses: list[Expected]


class Tokens(NamedTuple):
    """The tokens of a text, the change in nats that has the full colour, and a summary."""

    tokens: list[Token]
    full: str
    summary: str


def describe_tokens(text: ColouredText) -> Tokens | None:
    """The tokens with their colours; None without tokens."""
    if not text.tokens:
        return None
    changes = [_change(token) for token in text.tokens]
    sizes = sorted(abs(change) for change in changes if change is not None)
    full = max(sizes[len(sizes) * 9 // 10], LEAST_FULL) if sizes else LEAST_FULL
    tokens = [_describe(t, c, full) for t, c in zip(text.tokens, changes, strict=True)]
    falls = sum(token.direction == "fall" for token in tokens)
    rises = sum(token.direction == "rise" for token in tokens)
    count = sum(token.count for token in text.tokens)
    summary = f"{count} tokens"
    if count > len(tokens):
        summary += f", shown as {len(tokens)}, because some characters are several"
    summary += f": the loss falls at {falls} and rises at {rises}"
    if sizes:
        measured = sum(t.count for t, c in zip(text.tokens, changes, strict=True) if c is not None)
        mean = sum(change for change in changes if change is not None) / measured
        summary += f"; on average it changes by {signed(mean)} nats per token"
    return Tokens(tokens, show(full, 2), f"{summary}.")


def _change(token: TokenChange) -> float | None:
    if is_known(token.base) and is_known(token.adapted):
        return token.adapted - token.base
    return None


def _describe(token: TokenChange, change: float | None, full: float) -> Token:
    strength = min(abs(change or 0.0) / full, 1.0)
    direction = ""
    if change is not None and strength >= FAINTEST:
        direction = "fall" if change < 0 else "rise"
    return Token(
        text=token.text.replace("\n", f"{LINE_END}\n"),
        direction=direction,
        strength=f"{strength:.2f}",
        base=show(token.base, 3),
        adapted=show(token.adapted, 3),
        change=show(None) if change is None else signed(change),
        base_guesses=_expected(token.base_guesses),
        adapted_guesses=_expected(token.adapted_guesses),
    )


def _expected(guesses: list[Guess]) -> list[Expected]:
    return [
        Expected(guess.text.replace("\n", LINE_END), percent(guess.probability))
        for guess in guesses
    ]
