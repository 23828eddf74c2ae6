"""What training changed in each layer: sizes, ranks and directions of dW beside those of W.

One layer at a time is decomposed, and what is kept of it is small: singular values, and the
directions that the curve of ranks and the intruders need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...lora.factors import effective_rank
from ...lora.singular import leading_triplets
from ...progress import progress_bar
from ...threads import one_blas_thread
from ...tools.overlap import find_directions
from ..geometry import Decomposition, decompose, likeness
from .content import LayerMap, Row, Spectrum
from .subject import Change, Subject, require_finite

Array = np.ndarray
TOP = 10  # left directions of W + dW that are compared with those of W
RANKS = 8  # of a curve of ranks
VALUES = 64  # singular values of a layer that a picture shows
WORK = 1e11  # of all decompositions together: the sum of O I min(O, I), minutes on two cores
RANK_MAP = (
    "Effective rank of dW",
    "exp of the entropy of the shares sigma_i^2 / sum sigma^2: how many directions dW really uses. "
    "1: one direction; r: r equally strong ones.",
)
OUTSIDE = "outside"  # the column of layers that are in no block


class Factors(NamedTuple):
    """U (O, k), values (k,) falling, Vt (k, I) of a matrix U diag(values) Vt."""

    U: Array
    values: Array
    Vt: Array

    def first(self, k: int) -> Factors:
        """The leading k, in arrays of their own: a view would keep the whole ones."""
        return Factors(self.U[:, :k].copy(), self.values[:k].copy(), self.Vt[:k].copy())


class Layer(NamedTuple):
    """What is known of one layer.

    relative   |dW| / |W|; None where W is zero
    values     the singular values of dW that rounding does not explain; None if not computed
    weight     the largest singular values of W; [] if not computed
    update     as many of dW's leading directions as a curve of ranks needs; None if not computed
    likeness   (k,): how like a direction of W each of the first k of W + dW is; None as before
    leading    these k directions with their singular values
    is_linear  whether it is a linear layer, and not an embedding or a norm
    """

    path: str
    relative: float | None
    values: Array | None
    weight: list[float]
    update: Factors | None
    likeness: Array | None
    leading: Factors | None
    is_linear: bool


def examine_layers(subject: Subject, work: float = WORK) -> dict[str, Layer]:
    """What training changed, by path. ConfigError if the method has no dW; NonFiniteError.

    work   the most operations that may be spent on whole decompositions: beyond it the leading
           values of W alone are computed, and nothing of a dW without factors
    """
    changes = subject.changes()
    shapes = [shape for shape in subject.shapes().values() if len(shape) == 2]
    is_small = sum(float(math.prod(shape)) * min(shape) for shape in shapes) <= work
    # All directions are those of the adapter itself, which the curve runs as it is.
    most = choose_ranks(max(map(min, shapes), default=0))[-2:][0]
    layers = {}
    with one_blas_thread():
        for path in progress_bar(list(changes), desc="layers", unit=" layers", leave=False):
            change = require_finite(path, changes[path]())
            layers[path] = _examine(path, change, is_small, most)
    return layers


def choose_ranks(largest: int, count: int = RANKS) -> list[int]:
    """At most `count` ranks from 0 to the largest, close together where they are small."""
    if largest < count:
        return list(range(largest + 1))
    ranks = [0]
    for rank in np.geomspace(1, largest, count - 1):
        ranks.append(max(ranks[-1] + 1, round(float(rank))))
    return ranks


def _examine(path: str, change: Change, is_small: bool, most: int) -> Layer:
    size = float(np.linalg.norm(change.W))
    is_matrix = change.W.ndim == 2
    update = _decompose_update(change, is_small)
    moved = float(np.linalg.norm(change.dW if update is None else update.values))  # type: ignore[arg-type]
    weight: list[float] = []
    nearest = leading = None
    if is_matrix and is_small:
        before = decompose(change.W)
        weight = before.values[:VALUES].tolist()
        if change.is_linear:
            after = decompose(change.W + change.dense())
            nearest = likeness(before, after, TOP)
            leading = Factors(*after).first(TOP)
    elif is_matrix:
        weight = leading_triplets(change.W, VALUES)[1][:VALUES].tolist()
    values = None if update is None else update.values
    if update is not None and change.part is None:
        first = update.first(most)
        update = Factors(*(array.astype(np.float32) for array in first))
    relative = moved / size if size else None
    return Layer(path, relative, values, weight, update, nearest, leading, change.is_linear)


def _decompose_update(change: Change, is_small: bool) -> Factors | None:
    """dW by its directions; None for a vector, and for a large dW without factors."""
    if change.part is not None:
        outputs, inputs, values = find_directions(change.part)
        return Factors(outputs, values, inputs.T).first(len(values))
    assert change.dW is not None
    if change.dW.ndim != 2 or not is_small:
        return None
    parts: Decomposition = decompose(change.dW)
    smallest = np.finfo(np.float64).eps * max(change.dW.shape) * parts.values.max(initial=0.0)
    return Factors(*parts).first(int((parts.values > smallest).sum()))


# ---- maps ----------------------------------------------------------------------------------------


def draw_map(title: str, explanation: str, numbers: Mapping[str, float | None]) -> LayerMap:
    """A map of one number per layer, by path: a row for each kind of layer, a column per block."""
    places = {path: place_of(path) for path in numbers}
    short = _short_names({kind for kind, _ in places.values()})
    kinds = list(dict.fromkeys(short[kind] for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values()}, key=_by_number)
    values: list[Row] = [[None] * len(blocks) for _ in kinds]
    for path, number in numbers.items():
        kind, block = places[path]
        is_finite = number is not None and math.isfinite(number)
        values[kinds.index(short[kind])][blocks.index(block)] = number if is_finite else None
    return LayerMap(title, explanation, kinds, blocks, values)


def place_of(path: str) -> tuple[str, str]:
    """("self_attn.q_proj", "3") of model.layers.3.self_attn.q_proj; (path, OUTSIDE) otherwise."""
    words = path.split(".")
    for i, word in enumerate(words[:-1]):
        if word.isdecimal():
            return ".".join(words[i + 1 :]), word
    return path, OUTSIDE


def _short_names(kinds: set[str]) -> dict[str, str]:
    """Each kind by its last name, or whole where two have the same last name."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {
        kind: kind if last.count(kind.rpartition(".")[2]) > 1 else kind.rpartition(".")[2]
        for kind in kinds
    }


def _by_number(block: str) -> tuple[bool, int]:
    return (True, 0) if block == OUTSIDE else (False, int(block))


def draw_maps(layers: Mapping[str, Layer]) -> list[LayerMap]:
    """|dW| / |W| and the effective rank of every layer."""
    sizes = {path: layer.relative for path, layer in layers.items()}
    ranks = {
        path: None if layer.values is None else effective_rank(layer.values)
        for path, layer in layers.items()
    }
    return [
        draw_map("|dW| / |W|", "Frobenius norms: how far training moved each weight.", sizes),
        draw_map(*RANK_MAP, ranks),
    ]


def draw_ranks(subject: Subject) -> LayerMap:
    """The ranks that AdaLoRA's budget left to each layer."""
    ranks: dict[str, float | None] = {}
    for path, layer in subject.wrappers.items():
        E: Any = getattr(layer.entries[subject.name], "lora_E", None)
        if E is not None:
            ranks[path] = float(np.count_nonzero(E.numpy()))
    return draw_map("Ranks", "Triplets that AdaLoRA's budget left to each layer.", ranks)


def draw_spectra(layers: Mapping[str, Layer]) -> list[Spectrum]:
    """Singular values of dW and the largest of W, for each layer with a dW that is not zero."""
    spectra = []
    for path, layer in layers.items():
        if layer.values is not None and len(layer.values):
            spectra.append(Spectrum(path, layer.values[:VALUES].tolist(), layer.weight))
    return spectra
