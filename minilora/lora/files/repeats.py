"""What PEFT's files hold twice, or hold of the base: to write it as PEFT does, and to recognise it.

A file repeats the weight of an embedding or a head that is a target, of one that was resized, and
of what is saved whole; what a tied head has of its embedding; with bias="all" the biases of saved
modules; and whatever else of the base a program put into it. What is a repetition must be equal to
what it repeats, and is then not needed: the base's weight up to what 16 bits, or a merge and an
unmerge, leave of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ...formats import SafetensorsFile
from ...formats.dtypes import FLOATS, round_to, row_blocks, widen
from ..factors import Part
from ..names import ENDS, PREFIX, TRANSPOSED, base_weight_key
from ..targets.plan import Plan
from ..targets.rules import matches

Array = np.ndarray
Read = Callable[[str], Array]  # gives a tensor of the base by its name, such as "lm_head.weight"

# By dtype, the narrow ones first: a rounded number is off by at most this share of itself.
UNITS = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}

SLACK = 2.0**-16  # what 32 bits leave of the product of a start's factors


# ---- to write them -------------------------------------------------------------------------------


def repeated(
    plan: Plan, adapter_name: str, get: Callable[[str], Array | None], read: Read
) -> dict[str, Array]:
    """The tensors in PEFT's file that follow from the adapter's others and from the base's.

    get    gives one of the adapter's tensors by its key, or None

    They are the base's embedding and head if they are targets by one of ENDS; a tied head's
    factors, or its copy; with bias="all" the biases of a module that is saved whole, before and
    after training; and for another vocabulary than that of the base's files all its rows.
    """
    base = plan.base
    copies: dict[str, Array] = {}
    if _targets_name_an_end(plan):
        for path in plan.targets:
            if path in (base.embedding, base.head):
                copies[base_weight_key(path)] = read(f"{path}.weight")
    if plan.resized:
        for path in filter(None, (base.embedding, base.head)):
            if path not in plan.saved:
                copies[_key_of_weight(plan, path)] = read(f"{path}.weight")
    if plan.follows:
        head, embedding = (PREFIX + path for path in plan.follows)
        for of_head, of_embedding in TRANSPOSED.items():
            factor = get(f"{embedding}.{of_embedding}")
            if factor is not None:
                copies[f"{head}.{of_head}"] = np.ascontiguousarray(factor.T)
        weight = get(f"{embedding}.weight")
        if weight is not None:
            copies[f"{head}.weight"] = weight
    if plan.config.bias == "all":
        for path in plan.saved:
            for name, _ in base.below(path):
                if name.endswith(".bias"):
                    inside = name.removeprefix(f"{path}.")
                    copies[f"{PREFIX}{path}.original_module.{inside}"] = read(name)
                    trained = get(PREFIX + name)
                    if trained is not None:
                        # PEFT takes the adapter's name out of keys only where it is their end.
                        place = inside if inside == "bias" else f"{adapter_name}.{inside}"
                        copies[f"{PREFIX}{path}.modules_to_save.{place}"] = trained
    return copies


def _key_of_weight(plan: Plan, path: str) -> str:
    """The key of the base's weight of an embedding or a head, which PEFT may have wrapped."""
    inside = ""
    if path in plan.targets:
        inside = ".base_layer"
    elif path in plan.tokens or (plan.follows and path in plan.follows and plan.tokens):
        inside = ".token_adapter.base_layer"
    return f"{PREFIX}{path}{inside}.weight"


def _targets_name_an_end(plan: Plan) -> bool:
    """Does PEFT save the base's weight of an embedding or a head that is a target?"""
    targets = plan.config.target_modules
    if plan.config.trainable_token_indices is not None or targets is None:
        return False
    if isinstance(targets, str):
        ends = [path for path in plan.targets if path.rpartition(".")[2] in ENDS]
        return any(matches(path, targets) for path in ends)
    return any(name in targets for name in ENDS)


# ---- to recognise them ---------------------------------------------------------------------------


def names_of_base(key: str) -> Iterator[str]:
    """The tensors of the base, by name, that `key` of a file may repeat."""
    name = key.removeprefix(PREFIX)
    yield name
    for tensor in ("weight", "bias"):
        path = name.removesuffix(f".base_layer.{tensor}")
        if path != name:
            yield f"{path.removesuffix('.token_adapter')}.{tensor}"
    path, marker, inside = name.partition(".original_module.")
    if marker:
        yield f"{path}.{inside}"


def keys_of_adapter(key: str, follows: tuple[str, str] | None) -> Iterator[tuple[str, bool]]:
    """(key, transposed?) of the adapter's own tensors that `key` of a file may repeat.

    follows   (head, embedding) of a `Plan`
    """
    path, marker, inside = key.partition(".modules_to_save.")
    if marker:
        yield f"{path}.{inside}", False
        yield f"{path}.{inside.partition('.')[2]}", False  # after the adapter's name
    head, embedding = follows or ("", "")
    if head and key.startswith(f"{PREFIX}{head}."):
        inside = key.removeprefix(f"{PREFIX}{head}.")
        yield f"{PREFIX}{embedding}.{inside}", False
        if inside in TRANSPOSED:
            yield f"{PREFIX}{embedding}.{TRANSPOSED[inside]}", True


def is_weight_of_base(
    file: SafetensorsFile, key: str, W: Array, part: Part | None = None, table: bool = False
) -> bool:
    """Is a tensor of a file the base's W, but for what rounding has made of it?

    part    what the adapter adds to W: then it may have been merged into F and taken out again
    table   W is an embedding's table (V, C): the transpose of the matrix that `part` adds to

    With F the file's tensor it is, if each element of F is that of W in the file's dtype, if each
    of one is that of the other in 16 bits, or if in each place

        |F - W| <= u (|W + dW| + |dW| + |F|),    u of the narrowest dtype that holds all of F:

    peft adds dW, unrounded, to W, rounds, takes the rounded dW away and rounds again.
    """
    F = file.read_bits(key)
    dtype = file.dtype(key)
    if F.shape != W.shape or dtype not in FLOATS:
        return False
    F = np.atleast_1d(F)
    W = np.atleast_1d(W)
    blocks = row_blocks(F.shape)

    def all_are(test: Callable[[Array, Array, slice], Array]) -> bool:
        with np.errstate(over="ignore", invalid="ignore"):
            pairs = ((widen(F[at]).astype(np.float64), W[at].astype(np.float64)) for at in blocks)
            return all(test(f, w, at).all() for (f, w), at in zip(pairs, blocks, strict=True))

    def is_rounded(f: Array, w: Array, at: slice) -> Array:
        equal = _equal(f, _rounded(w, dtype))
        for half in ("BF16", "F16"):
            equal |= _equal(f, _rounded(w, half)) | _equal(w, _rounded(f, half))
        return equal

    if all_are(is_rounded):
        return True
    if part is None or part.m is not None:
        return False
    unit = next(
        unit
        for narrow, unit in UNITS.items()
        if all_are(lambda f, w, at, t=narrow: _equal(f, _rounded(f, t)))  # type: ignore[misc]
    )
    left, right = (part.A.T, part.B.T) if table else (part.B, part.A)

    def was_merged(f: Array, w: Array, at: slice) -> Array:
        dW = part.c * (left[at] @ right)
        bound = unit * (np.abs(w + dW) + np.abs(dW) + np.abs(f))
        return np.asarray(np.abs(f - w) <= bound)

    return left.shape[0] == len(F) and right.shape[1:] == F.shape[1:] and all_are(was_merged)


def is_rounded_to(file: SafetensorsFile, key: str, R: Array, W: Array) -> bool:
    """Is a tensor of a file R, computed from W (O, I) in 32 bits and rounded to the file's dtype?

    In each place |F - R| <= u |R| + 2^-16 w, with w the length of W's longest row.
    """
    dtype = file.dtype(key)
    if file.shape(key) != R.shape or dtype not in UNITS:
        return False
    F = file.read(key, np.float64)
    longest = np.linalg.norm(W, axis=1).max(initial=0.0)
    bound = UNITS[dtype] * np.abs(R) + SLACK * longest
    return bool((np.abs(F - R) <= bound).all())


def _rounded(numbers: Array, dtype: str) -> Array:
    """float64 numbers, rounded once to the format's `dtype`."""
    return widen(round_to(numbers, dtype)).astype(np.float64)


def _equal(a: Array, b: Array) -> Array:
    return np.asarray((a == b) | (np.isnan(a) & np.isnan(b)))
