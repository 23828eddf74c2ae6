"""What a report says, as plain data: `gathering` measures it, `page` draws it.

All texts may come from files and contain anything: what draws them escapes them. Numbers are
finite, or None where there is none. Losses are in the unit that their part names.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

Row = list[float | None]


class Fact(NamedTuple):
    """One line of a table of two columns."""

    name: str
    value: str


@dataclasses.dataclass(frozen=True)
class ModuleCount:
    """A module with the numbers of its parameters, and the modules inside it.

    Equal neighbours, such as the blocks of a decoder, are one entry, named "layers.0 ... 11".
    """

    name: str
    kind: str  # of the class: Linear, RMSNorm ...
    parameters: int
    trained: int
    note: str = ""  # the adapter: "LoRA, r = 8"
    inside: list[ModuleCount] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values over steps."""

    name: str
    steps: list[int]
    values: Row


@dataclasses.dataclass(frozen=True)
class Training:
    """The losses of a run: of its batches, of the held-out text, and of a second text."""

    unit: str
    curves: list[Curve]


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """One number for each adapted layer: values[kind][block], None where none is adapted."""

    title: str
    explanation: str
    kinds: list[str]  # q_proj, k_proj ...
    blocks: list[str]
    values: list[Row]
    digits: int = 3  # significant ones


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer's dW and the largest of W, both in descending order."""

    layer: str
    update: list[float]
    weight: list[float]


@dataclasses.dataclass(frozen=True)
class RankCurve:
    """The loss with every layer's dW cut to its `ranks[i]` largest singular values."""

    unit: str
    text: str  # name of the text
    ranks: list[int]  # ascending, from 0, the base, to the whole rank
    losses: list[float]
    errors: Row  # standard errors of the differences from the whole rank's loss
    energies: list[float]  # share of sum sigma^2 that is left, over all layers


class Guess(NamedTuple):
    """A token that a model expects, and its probability."""

    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class TokenChange:
    """One token of a text, its loss in nats in both models, and what each expected there."""

    text: str
    base: float | None  # None for a token that nothing precedes
    adapted: float | None
    base_guesses: list[Guess] = dataclasses.field(default_factory=list)
    adapted_guesses: list[Guess] = dataclasses.field(default_factory=list)
    count: int = 1  # how many tokens it is: a character may be several, whose losses are added


@dataclasses.dataclass(frozen=True)
class ColouredText:
    """The beginning of a text, token by token."""

    name: str
    tokens: list[TokenChange]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Losses with a part of dW multiplied by each of `factors`."""

    name: str  # intruders; as many other directions; all of dW
    factors: list[float]
    new: list[float]  # of the text that was learned
    old: Row  # of the second text, if there is one


@dataclasses.dataclass(frozen=True)
class Intruders:
    """Directions among the leading ones of W + dW that no direction of W is near to.

    limits   upper limits of |cos| for which directions were counted; `counts` belong to them
    """

    examined: int  # directions that were looked at, over all layers
    limits: list[float]
    counts: list[int]
    limit: float  # the one that the scalings use
    unit: str = ""
    scalings: list[Scaling] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Report:
    """The parts of a page in their order. None or empty: `omitted` says why, by the part's name."""

    title: str
    summary: list[Fact]
    architecture: ModuleCount
    provenance: list[Fact]  # settings, SHA-256 of files, versions
    training: Training | None = None
    maps: list[LayerMap] = dataclasses.field(default_factory=list)
    spectra: list[Spectrum] = dataclasses.field(default_factory=list)
    rank_curve: RankCurve | None = None
    text: ColouredText | None = None
    intruders: Intruders | None = None
    omitted: dict[str, str] = dataclasses.field(default_factory=dict)
