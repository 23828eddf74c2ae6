"""Where the boxes of a drawn graph go: layer below layer, with few crossings and short edges.

The method is Sugiyama's (1981): a layer for each vertex by the longest path to it, dummy vertices
where an edge passes a layer, an order in each layer by medians of neighbours, then coordinates.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Point = tuple[float, float]
Size = tuple[float, float]  # width, height
Neighbours = list[list[int]]

SWEEPS = 8  # down and up through the layers, for the order and again for the coordinates
GAP = 14.0  # between two boxes of a layer
LAYER_GAP = 34.0
MARGIN = 12.0
DUMMY_WEIGHT = 4.0  # how much more a long edge wants to be straight than a box wants its place


class Layout(NamedTuple):
    """A drawing.

    centres        of each vertex, with y downwards
    routes         the points of each edge: from the lower side of its source to the upper side of
                   its target, and between them a vertical stretch in each layer that it passes
    width, height  of the whole
    """

    centres: list[Point]
    routes: list[list[Point]]
    width: float
    height: float


def lay_out(sizes: Sequence[Size], edges: Sequence[tuple[int, int]]) -> Layout:
    """The layout of vertices of these sizes. Each edge (source, target) has source < target."""
    layers = _assign_layers(len(sizes), edges)
    chains = []
    all_sizes = list(sizes)
    for source, target in edges:
        passed = range(layers[source] + 1, layers[target])
        dummies = range(len(all_sizes), len(all_sizes) + len(passed))
        layers += passed
        all_sizes += [(0.0, 0.0)] * len(passed)
        chains.append([source, *dummies, target])
    above: Neighbours = [[] for _ in all_sizes]
    below: Neighbours = [[] for _ in all_sizes]
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            below[upper].append(lower)
            above[lower].append(upper)
    rows: list[list[int]] = [[] for _ in range(max(layers, default=-1) + 1)]
    for vertex, layer in enumerate(layers):
        rows[layer].append(vertex)
    rows = _order(rows, above, below)
    x = _place(rows, above, below, all_sizes, len(sizes))
    tops, bottoms = _heights(rows, all_sizes)

    def route(chain: list[int]) -> list[Point]:
        source, *dummies, target = chain
        middle = (tops[layers[source]] + bottoms[layers[source]]) / 2
        points = [(x[source], middle + sizes[source][1] / 2)]
        for dummy in dummies:
            points += [(x[dummy], tops[layers[dummy]]), (x[dummy], bottoms[layers[dummy]])]
        middle = (tops[layers[target]] + bottoms[layers[target]]) / 2
        return [*points, (x[target], middle - sizes[target][1] / 2)]

    centres = []
    for vertex in range(len(sizes)):
        layer = layers[vertex]
        centres.append((x[vertex], (tops[layer] + bottoms[layer]) / 2))
    rights = [x + width / 2 for x, (width, _) in zip(x, all_sizes, strict=True)]
    width = max(rights, default=0.0) + MARGIN
    height = bottoms[-1] + MARGIN if bottoms else 2 * MARGIN
    return Layout(centres, [route(chain) for chain in chains], width, height)


def _assign_layers(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The layer of each vertex: below all that it is made from, and directly above a reader.

    So a weight is beside what reads it, and not at the top.
    """
    layers = [0] * count
    readers: Neighbours = [[] for _ in range(count)]
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        layers[target] = max(layers[target], layers[source] + 1)
        readers[source].append(target)
    for vertex in reversed(range(count)):
        if readers[vertex]:
            layers[vertex] = min(layers[reader] for reader in readers[vertex]) - 1
    return layers


def _order(rows: list[list[int]], above: Neighbours, below: Neighbours) -> list[list[int]]:
    """The rows, each in the order with the fewest crossings that the sweeps have come to."""
    best = rows
    fewest = _crossings(rows, below)
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        neighbours = above if downwards else below
        new: list[list[int]] = []
        previous: list[int] = []
        for row in rows if downwards else reversed(rows):
            previous = _sort_by_medians(row, previous, neighbours)
            new.append(previous)
        rows = new if downwards else new[::-1]
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _sort_by_medians(row: list[int], previous: list[int], neighbours: Neighbours) -> list[int]:
    """A row by the median positions of neighbours in the previous row; others keep their place."""
    places = {vertex: i for i, vertex in enumerate(previous)}
    scale = len(previous) / max(len(row), 1)

    def median(item: tuple[int, int]) -> float:
        i, vertex = item
        positions = [places[other] for other in neighbours[vertex] if other in places]
        return statistics.median(positions) if positions else i * scale

    return [vertex for _, vertex in sorted(enumerate(row), key=median)]


def _crossings(rows: list[list[int]], below: Neighbours) -> int:
    """The number of pairs of edges between neighbouring rows that cross."""
    count = 0
    for upper, lower in itertools.pairwise(rows):
        places = {vertex: i for i, vertex in enumerate(lower)}
        ends: list[int] = []
        for vertex in upper:
            targets = [places[other] for other in below[vertex]]
            count += sum(end > target for target in targets for end in ends)
            ends += targets
    return count


def _place(
    rows: list[list[int]],
    above: Neighbours,
    below: Neighbours,
    sizes: Sequence[Size],
    boxes: int,
) -> list[float]:
    """The x of every vertex: near its neighbours, in the row's order, and GAP from the next box.

    boxes   how many vertices are boxes; the others are dummies
    """
    x = [0.0] * len(sizes)
    for row in rows:
        for i, vertex in enumerate(row):
            x[vertex] = i * GAP
    for sweep in range(2 * SWEEPS):
        neighbours = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = []
            weights = []
            for vertex in row:
                near = [x[other] for other in neighbours[vertex]]
                wanted.append(statistics.fmean(near) if near else x[vertex])
                weights.append(1.0 if vertex < boxes else DUMMY_WEIGHT)
            widths = [sizes[vertex][0] for vertex in row]
            for vertex, place in zip(row, _separate(wanted, weights, widths), strict=True):
                x[vertex] = place
    lefts = [x - width / 2 for x, (width, _) in zip(x, sizes, strict=True)]
    shift = MARGIN - min(lefts, default=0.0)
    return [value + shift for value in x]


def _separate(
    wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float]
) -> list[float]:
    """The places nearest to the wanted ones, by weighted squares, at which no two boxes overlap.

    Without the widths to the left of each, the places must not decrease: that is isotonic
    regression, which merges neighbours in the wrong order into their mean.
    """
    offsets = [0.0]
    for left, right in itertools.pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2 + GAP)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of vertices
    for place, weight, offset in zip(wanted, weights, offsets, strict=False):
        mean, count = place - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, other_weight, other_count = blocks.pop()
            total = weight + other_weight
            mean = (mean * weight + other * other_weight) / total
            weight, count = total, count + other_count
        blocks.append((mean, weight, count))
    means: Iterable[float] = itertools.chain(*([mean] * count for mean, _, count in blocks))
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


def _heights(rows: list[list[int]], sizes: Sequence[Size]) -> tuple[list[float], list[float]]:
    """The top and the bottom of each row, as high as its highest box."""
    tops = []
    bottoms = []
    y = MARGIN
    for row in rows:
        tops.append(y)
        y += max(sizes[vertex][1] for vertex in row)
        bottoms.append(y)
        y += LAYER_GAP
    return tops, bottoms
