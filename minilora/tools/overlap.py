"""How two adapters overlap, layer by layer: from their factors, without forming dW.

    <dW1, dW2> = s1 s2 tr(B1^T B2 A2 A1^T)        two r1 x r2 products, in place of two O x I

The columns of B span the outputs that dW can reach, the rows of A the inputs that it reads. With
B = Q R, A^T = P S and R s S^T = U diag(sigma) V^T the singular vectors of dW are Q U and P V. The
first i of one adapter and the first j of the other overlap by

    phi(i, j) = |U1_i^T U2_j|^2 / min(i, j)      in [0, 1];  max(i, j) / n for random directions,

where n is O or I (Hu et al. 2021, section 7.2). Principal angles: Bjoerck & Golub 1973.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import read_checkpoint
from ..lora import HydraConfig
from ..lora.factors import Part, product_norm
from ..lora.files.adapter import AdapterFile
from ..lora.files.fitting import fit, read_base
from ..lora.targets.base import describe_checkpoint
from .rewriting import progress

Array = np.ndarray
Report = dict[str, Any]
LARGEST = 1e150  # whose square float64 has
SUMS = ("|dW1|^2", "|dW2|^2", "<dW1, dW2>", "|B1 A2|^2", "|B2 A1|^2")


class Directions(NamedTuple):
    """The singular vectors of dW whose singular values rounding does not explain.

    outputs (O, k), inputs (I, k), values (k,) falling
    """

    outputs: Array
    inputs: Array
    values: Array


# ---- one layer -----------------------------------------------------------------------------------


def inner_product(one: Part, other: Part) -> float:
    """<dW1, dW2>, the sum of the products of their entries, from matrices r1 x r2."""
    outputs = one.B.T @ other.B
    inputs = one.A @ other.A.T
    return float(one.c * other.c * np.vdot(outputs, inputs))


def find_directions(part: Part) -> Directions:
    """The singular vectors of c B A, from the QR decompositions of B and A^T."""
    Q, R = np.linalg.qr(part.B)
    P, S = np.linalg.qr(part.A.T)
    U, values, Vt = np.linalg.svd(part.c * (R @ S.T), full_matrices=False)
    size = abs(part.c) * float(np.linalg.norm(R) * np.linalg.norm(S))
    smallest = size * np.finfo(np.float64).eps * max(len(part.B), part.A.shape[1])
    count = int((values > smallest).sum())
    return Directions(Q @ U[:, :count], P @ Vt[:count].T, values[:count])


def principal_angles(U: Array, V: Array) -> Array:
    """The angles between the spaces of the columns of U (n, i) and V (n, j), rising, in radians.

    The columns of each are orthonormal. There are min(i, j) angles. Small ones come from their
    sines, because a cosine near 1 has lost them.
    """
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    products = U.T @ V
    cosines = np.linalg.svd(products, compute_uv=False).clip(0, 1)
    sines = np.linalg.svd(V - U @ products, compute_uv=False)[::-1].clip(0, 1)
    return np.asarray(np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines)))


def overlap(U: Array, V: Array, i: int, j: int) -> float:
    """phi(i, j) of the first i columns of U and the first j of V."""
    return float(np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j))


def chance(size: int, i: int, j: int) -> float:
    """The mean of phi(i, j) over random directions in `size` dimensions."""
    return max(i, j) / size


def overlap_table(U: Array, V: Array) -> list[Report]:
    """phi and its chance level for i and j = 1, 2, 4, ... and all columns."""
    rows = []
    for i in _doubling(U.shape[1]):
        for j in _doubling(V.shape[1]):
            row = {"i": i, "j": j, "phi": overlap(U, V, i, j), "chance": chance(len(U), i, j)}
            rows.append(row)
    return rows


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... below `most`, and `most` itself; none for 0."""
    counts = [1 << k for k in range(most.bit_length()) if 1 << k < most]
    return [*counts, most] if most else []


def compare_parts(one: Part, other: Part) -> Report:
    """The numbers of one layer that both adapters have.

    The cross terms are what adding factors in place of products would add (PEFT's `linear`): they
    exist for equal ranks only, and have the factor sqrt(s1 s2).
    """
    sizes = [abs(part.c) * product_norm(part.A, part.B) for part in (one, other)]
    inner = inner_product(one, other)
    cross: list[float | None] = [None, None]
    if len(one.A) == len(other.A):
        root = math.sqrt(abs(one.c * other.c))
        cross = [root * product_norm(other.A, one.B), root * product_norm(one.A, other.B)]
    row: Report = {
        "r": [len(one.A), len(other.A)],
        "|dW1|": sizes[0],
        "|dW2|": sizes[1],
        "<dW1, dW2>": inner,
        "cosine": inner / (sizes[0] * sizes[1]) if all(sizes) else None,
        "|B1 A2|": cross[0],
        "|B2 A1|": cross[1],
    }
    first, second = find_directions(one), find_directions(other)
    for side in ("outputs", "inputs"):
        U, V = getattr(first, side), getattr(second, side)
        row[side] = {
            "angles": np.degrees(principal_angles(U, V)).tolist() if U.size and V.size else [],
            "phi": overlap_table(U, V),
        }
    return row


# ---- two files -----------------------------------------------------------------------------------


def compare(a: str | Path, b: str | Path, base: str | Path | None = None) -> Report:
    """How two adapters of one base overlap: a row for each layer that both have, and the total.

    "only in a", "only in b": the other layers, with which the total's |dW| counts. Angles are in
    degrees. With `base` both must fit it, and starts that changed the base can be undone.

    ConfigError for an adapter without a dW that factors give (DoRA, HydraLoRA, a map, a base of
    codes); FormatError for adapters that do not belong together, and for a damaged file;
    NonFiniteError.
    """
    with ExitStack() as opened:
        over_base = base is not None
        files = [
            opened.enter_context(AdapterFile(folder, over_base=over_base)) for folder in (a, b)
        ]
        for file in files:
            _require_product(file)
        if base is not None:
            config, checkpoint = read_checkpoint(base)
            opened.enter_context(checkpoint)
            described = describe_checkpoint(checkpoint, config)
            for file in files:
                fit(file, described, read_base(checkpoint))
        one, other = files
        common = [path for path in one.paths() if path in other.layers]
        _require_one_model(one, other, common, over_base)
        total = dict.fromkeys(SUMS, 0.0)
        rows = []
        for path in progress(common, "compare"):
            row = compare_parts(_read_part(one, path), _read_part(other, path))
            rows.append({"layer": path, **row})
            _add_squares(total, row)
        alone: dict[str, list[str]] = {}
        for name, file in zip("ab", files, strict=True):
            alone[name] = [path for path in file.paths() if path not in common]
            for path in alone[name]:
                part = _read_part(file, path)
                key = "|dW1|^2" if name == "a" else "|dW2|^2"
                total[key] += (part.c * product_norm(part.A, part.B)) ** 2
        return {
            "a": str(a),
            "b": str(b),
            "only in a": alone["a"],
            "only in b": alone["b"],
            "replaced": sorted({*one.replaced, *other.replaced, *one.tokens, *other.tokens}),
            "layers": rows,
            "total": _total(total, rows),
        }


def _require_product(file: AdapterFile) -> None:
    """ConfigError unless what the adapter adds to each weight is s B A."""
    file.require_factors("compare")
    title = ""
    if file.config.use_dora:
        title = "DoRA scales the rows of W + s B A"
    elif isinstance(file.config, HydraConfig):
        title = "HydraLoRA adds another matrix at every position"
    elif not file.is_low_rank:
        title = "its start replaced the base by decoded codes"
    if title:
        raise ConfigError(
            f"{file.where}: {title}, so its change of a weight is not s B A, from which compare "
            "computes: give an adapter of LoRA or AdaLoRA"
        )


def _require_one_model(
    one: AdapterFile, other: AdapterFile, common: Sequence[str], over_base: bool
) -> None:
    """FormatError for adapters of different models."""
    if not common and not over_base:
        raise FormatError(
            f"{one.where} and {other.where} have no layer in common: {_first(one)} and "
            f"{_first(other)}: give two adapters of one model, or its folder with --base if both "
            "are for one"
        )
    for path in common:
        shapes = [_describe_layer(file, path) for file in (one, other)]
        if shapes[0] != shapes[1]:
            raise FormatError(
                f"{path} is {shapes[0]} in {one.where} and {shapes[1]} in {other.where}: "
                "give two adapters of one model"
            )


def _first(file: AdapterFile) -> str:
    return next(iter(file.paths()), "no layer")


def _describe_layer(file: AdapterFile, path: str) -> str:
    keys = file.layers[path]
    O, I = file.file.shape(keys["B"])[0], file.file.shape(keys["A"])[1]
    return f"{O} x {I}{' of an embedding' if file.embeds(path) else ''}"


def _read_part(file: AdapterFile, path: str) -> Part:
    """s B A of a layer. NonFiniteError if it, or a sum of its squares, is not finite."""
    part: Part = file.part(path)
    if not abs(part.c) * product_norm(part.A, part.B) < LARGEST:
        raise NonFiniteError(
            f"{file.where}: dW of {path} is not finite, or its square is not: repair the file"
        )
    return part


def _add_squares(total: dict[str, float], row: Mapping[str, Any]) -> None:
    for key in SUMS:
        name = key.removesuffix("^2")
        value = row[name]
        if value is None:
            total[key] = math.nan
        else:
            total[key] += value if name == key else value**2


def _total(sums: Mapping[str, float], rows: Sequence[Report]) -> Report:
    """What the layers add up to. Cross terms need equal ranks everywhere."""
    total: Report = {}
    for key, value in sums.items():
        norm = value if key == "<dW1, dW2>" else math.sqrt(value)
        total[key.removesuffix("^2")] = None if math.isnan(norm) else norm
    sizes = total["|dW1|"] * total["|dW2|"]
    total["cosine"] = total["<dW1, dW2>"] / sizes if sizes else None
    for side in ("outputs", "inputs"):
        tables = [row[side]["phi"] for row in rows if row[side]["phi"]]
        for name, place in (("first", 0), ("all", -1)):
            entries = [table[place] for table in tables]
            for measure in ("phi", "chance"):
                mean = float(np.mean([entry[measure] for entry in entries])) if entries else None
                total[f"{measure} of {name} {side}"] = mean
    return total
