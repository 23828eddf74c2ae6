"""base + adapters -> checkpoint, from files alone:  W' = round(W + sum_i w_i s_i B_i A_i), or
DoRA's round(k (W + dW)).

The sum is formed in float64, a few rows at a time, and is rounded once, to the dtype of the file.
In bfloat16, with 8 bits per number, rounding takes away a part of dW that is worth knowing: most of
a small dW, where |dW| is far below |W| / 256. So each layer's row says how much, in Frobenius
norms: lost = |W' - (W + dW)| / |dW|.

A merge first plans which `Change` each adapter makes to which tensor of the base, then settles what
happens to a weight that embedding and head share, and then writes the base again, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError, NonFiniteError, Rule, check_fields
from ..formats import Checkpoint
from ..formats.checkpoint import is_stored_transposed, to_file_layout
from ..formats.disk import quoted
from ..formats.dtypes import DTYPES, FLOATS, NUMPY_FLOATS, round_to, too_large, widen
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import HydraConfig
from ..lora.combining import check_weights
from ..lora.files.adapter import AdapterFile, require_single_adapter
from ..lora.files.fitting import base_key, fit, read_base, reading_first
from ..lora.maps import MapConfig
from ..lora.merging import Map, merge_weight
from ..lora.starts.residual import base_weight
from ..lora.targets.base import HEAD, describe_checkpoint, says_tied
from ..lora.tying import are_transposed, choose
from ..quant.codes import nearest_codes
from ..quant.decoded import DecodedCheckpoint
from ..threads import Workers, available_cores, keep_memory, one_blas_thread
from .rewriting import DTYPE_RULE, Row, not_finite, read_dense, rewrite, stored

Array = np.ndarray
HEAD_WEIGHT = f"{HEAD}.weight"
NUMPY_CODES = {np.dtype(kind): code for code, kind in NUMPY_FLOATS.items()}
ONTO = ("nf4", "nf4,double")
RULES = (
    DTYPE_RULE,
    Rule("--onto", lambda onto: onto is None or onto in ONTO, " or ".join(ONTO)),
    Rule("--threads", lambda count: type(count) is int and count >= 1, "an integer of at least 1"),
)


class Change(NamedTuple):
    """What one adapter does to one tensor of the base: it adds to it, or replaces it.

    path   the layer whose dW, times `weight`, is added; "" if the tensor is replaced
    key    the adapter's tensor that replaces the base's; "" if dW is added
    rows   the rows that are replaced; () for all
    bias   is it the layer's bias that changes with the weight?
    """

    adapter: AdapterFile
    weight: float
    path: str = ""
    key: str = ""
    rows: tuple[int, ...] = ()
    bias: bool = False

    def part(self, W: Array | None = None) -> Any:
        """`weight` times dW of the layer `path`, over its weight W (O, I) as it is stored."""
        part = self.adapter.part(self.path, W)
        return part._replace(c=part.c * self.weight)

    def why_alone(self) -> str:
        """Why it cannot be scaled, or added to another adapter's change; "" if it can."""
        if self.key:
            return "it replaces the base's"
        if not self.adapter.is_low_rank:
            return "it is for a base of codes"
        config = self.adapter.config
        if isinstance(config, MapConfig) and config.map.alone:
            return f"{config.title} multiplies the weight"
        return "DoRA scales the sum" if config.use_dora else ""


Changes = dict[str, list[Change]]  # by the name of a tensor


class MergePlan(NamedTuple):
    """What a merge does.

    changes   by the base's key
    twins     new keys, each with the key of the base that it is made from
    untied    are embedding and head two weights afterwards?
    resized   weights that take the place of the base's, with another number of tokens, by its key
    """

    changes: Changes
    twins: dict[str, str]
    untied: bool
    resized: dict[str, Array]


def merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    tied: str | None = None,
    initial: str | Path | None = None,
    base_is: str | None = None,
    onto: str | None = None,
) -> list[Row]:
    """Merge PEFT adapters, times `weights` (1), into the checkpoint `base`; write the result to the
    folder `out`.

    dtype   "float32", "float16" or "bfloat16" for every float; None: each tensor keeps its dtype,
            and a base of bitsandbytes' codes, which are decoded, gets the one in its config.json
    tied    "untie" or "share": see lora/tying.py. It is needed if the adapters change an embedding
            or the head that shares its weight, but not both alike

    initial, base_is   of a single adapter whose start changed the base: see AdapterFile

    Files, index and keys are the base's; an untied head is one tensor more. Returns one row per
    layer: |dW|, and how much of it rounding took; with `onto`, also |V - W| / |dW|, where V is what
    NF4 makes of W. Memory holds one tensor.

    FormatError if something does not fit; ConfigError for adapters that cannot be added up (DoRA
    beside another one, HydraLoRA) and if `tied` is needed; NonFiniteError for a NaN or infinity;
    OSError. `out` is then as it was.
    """
    weights = check_weights(adapters, weights, "--weights")
    threads = available_cores() if threads is None else threads
    check_fields({"--dtype": dtype, "--onto": onto, "--threads": threads}, RULES)
    require_outside(out, base=base)
    for folder in adapters:
        require_outside(out, adapter=folder)
    with ExitStack() as opened:
        config, checkpoint, dtype = read_dense(base, dtype)
        opened.enter_context(checkpoint)
        encoded = _find_encoded(checkpoint, config) if onto else frozenset()
        start = {
            "initial": require_single_adapter(adapters, "--initial", initial),
            "base_is": require_single_adapter(adapters, "--base-is", base_is),
            "over_base": True,
        }
        files = [opened.enter_context(AdapterFile(folder, **start)) for folder in adapters]
        for file in files:
            if onto and not file.is_low_rank:
                raise ConfigError(
                    f"--onto {onto}: {file.where} began with loftq, and is for codes of its own: "
                    "leave --onto out"
                )
        plan = plan_merge(checkpoint, config, files, weights, tied)
        inputs = {
            "base": fingerprint(base),
            "adapters": [fingerprint(folder) for folder in adapters],
            "weights": weights,
            "dtype": dtype,
            "allow_nonfinite": allow_nonfinite,
            "tied": tied,
            "initial": None if initial is None else fingerprint(initial),
            "base_is": base_is,
            "onto": onto,
        }
        stage = opened.enter_context(new_folder(out, inputs))
        opened.enter_context(one_blas_thread())  # threads work on blocks of rows, not on products
        keep_memory()
        workers = opened.enter_context(Workers(threads))
        model_type = str(config.get("model_type"))
        code = None if dtype is None else DTYPES[dtype]

        def make(key: str) -> tuple[Array, Row | None]:
            changes = plan.changes.get(key)
            source = plan.twins.get(key, key)
            coded = None
            if source in encoded and not (changes and changes[0].key):
                coded = _through_nf4(checkpoint, source, model_type, onto == "nf4,double")
            if not changes and coded is not None:
                return round_to(coded, code or checkpoint.dtype(source)), None
            if not changes:
                bits = stored(checkpoint, source, code, allow_nonfinite)
                return resize_rows(bits, plan.resized.get(source)), None
            bits, row, total = _change_tensor(
                checkpoint, source, changes, model_type, code, workers.map, plan.resized, coded
            )
            if allow_nonfinite or math.isfinite(total):
                return bits, row
            if set(weights) == {1.0}:
                target = code or checkpoint.dtype(source)
                if target != "F64" and _sources_are_finite(checkpoint, source, changes):
                    where = f"{quoted(checkpoint.directory)} with its adapters"
                    raise too_large(key, where, target)
                raise not_finite(checkpoint.directory, key)
            raise NonFiniteError(
                f"--weights {weights}: {key} with its adapters times these is not finite"
            )

        if plan.untied:
            config = {**config, "tie_word_embeddings": False}
        shapes = {}
        for key, W in plan.resized.items():
            shapes[key] = W.shape
            config = {**config, "vocab_size": len(W)}
        return rewrite(checkpoint, config, stage, make, dtype, "merge", plan.twins, shapes)


# ---- which tensors change, and how ----


def plan_merge(
    base: Checkpoint,
    config: dict[str, Any],
    adapters: Sequence[AdapterFile],
    weights: Sequence[float],
    tied: str | None,
) -> MergePlan:
    """What merging does to the base. FormatError if an adapter does not fit; ConfigError as for
    `merge`."""
    described = describe_checkpoint(base, config)
    untied = says_tied(config) and not described.tied  # as the files have it
    read = read_base(base)
    changes: Changes = {}
    resized = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        changes_of(adapter, weight)  # raises for what cannot be merged over any base
        plan = fit(adapter, described, read, warn=False)
        described = plan.base  # the next adapter is for the same vocabulary
        read = reading_first(plan.vocabulary, read)
        for name, W in plan.vocabulary.items():
            key = base_key(base, name)
            if key is not None:
                resized[key] = W
        for name, change in changes_of(adapter, weight).items():
            key = base_key(base, name) or name
            if change.bias and key not in base:
                continue
            changes.setdefault(key, []).append(change)
    twins = {}
    embedding = base_key(base, f"{described.embedding}.weight")
    if described.tied and embedding:
        untied = _settle_tie(embedding, changes, tied)
        if untied and HEAD_WEIGHT not in base:
            twins[HEAD_WEIGHT] = embedding
    for key, several in changes.items():
        require_addable(key, several)
    return MergePlan(changes, twins, untied, resized)


def _settle_tie(embedding: str, changes: Changes, tied: str | None) -> bool:
    """Change `changes` to what `tied` says about the one weight of embedding and head. Are they two
    now?"""
    of_head = changes.get(HEAD_WEIGHT, [])
    before = changes.get(embedding, [])
    # Both places get an adapter's rows, unless it has other ones for the head.
    apart = [change.adapter for change in of_head if change.rows]
    of_rows = [change for change in before if change.rows and change.adapter not in apart]
    of_embedding = [change for change in before if change not in of_rows]
    same = len(of_head) == len(of_embedding) and all(map(alike, of_embedding, of_head))
    names = dict.fromkeys(change.adapter.where for change in (*of_embedding, *of_head))
    how = choose(tied, ", ".join(names), bool(of_embedding), bool(of_head), same)
    if how == "untie":
        changes[HEAD_WEIGHT] = [*of_head, *of_rows]
        return True
    changes[embedding] = [*(of_embedding or of_head), *of_rows]
    changes[HEAD_WEIGHT] = changes[embedding]
    return False


def changes_of(adapter: AdapterFile, weight: float) -> dict[str, Change]:
    """What `weight` times an adapter does, by names of tensors. ConfigError if it has no such
    multiple."""
    if isinstance(adapter.config, HydraConfig):
        raise ConfigError(
            f"{adapter.where} is HydraLoRA's: its dW differs from token to token and "
            "cannot be merged"
        )
    changes = {f"{path}.weight": Change(adapter, weight, path) for path in adapter.paths()}
    for path, one in adapter.maps.items():
        if one.moves_bias:
            changes[f"{path}.bias"] = Change(adapter, weight, path, bias=True)
    for name, key in adapter.replaced.items():
        changes[name] = Change(adapter, weight, key=key)
    for path, key in adapter.tokens.items():
        rows = tuple(adapter.rows(path))
        changes[f"{path}.weight"] = Change(adapter, weight, key=key, rows=rows)
    for name, change in changes.items():
        why = change.why_alone()
        if why and weight != 1:
            raise ConfigError(
                f"{adapter.where}: what it does to {name} cannot be taken {weight:g} times: {why}"
            )
    return changes


def require_addable(key: str, changes: Sequence[Change]) -> None:
    """ConfigError if several adapters change the tensor `key`, and one of them does more than add
    to it."""
    for change in changes:
        why = change.why_alone()
        if why and len(changes) > 1:
            where = change.adapter.where
            raise ConfigError(
                f"{where}: what it does to {key} cannot be added to another adapter's: {why}"
            )


def alike(embedding: Change, head: Change) -> bool:
    """Do the two change the tied weight (V, C) in the same way?"""
    adapter = embedding.adapter
    if head.adapter is not adapter or bool(embedding.key) != bool(head.key):
        return False
    if embedding.rows != head.rows:
        return False
    if head.key:
        return np.array_equal(adapter.file.read(embedding.key), adapter.file.read(head.key))
    return are_transposed(adapter.part(embedding.path), adapter.part(head.path))


# ---- one tensor ----


def _sources_are_finite(base: Checkpoint, key: str, changes: list[Change]) -> bool:
    """Are all numbers finite that make a tensor's new numbers?"""
    arrays = [base.read(key)]
    for change in changes:
        file = change.adapter.file
        keys = [change.key] if change.key else change.adapter.tensor_keys(change.path)
        arrays += [file.read(one) for one in keys]
    return all(bool(np.isfinite(array).all()) for array in arrays)


def _change_tensor(
    base: Checkpoint,
    key: str,
    changes: list[Change],
    model_type: str,
    code: str | None,
    over: Map,
    resized: Mapping[str, Array],
    coded: Array | None,
) -> tuple[Array, Row | None, float]:
    """A tensor's new bits, its row (None if it is replaced), and a sum: NaN or inf if a new number
    is.

    resized   of `MergePlan`
    coded     what dW is added to in place of the stored weight, or None
    """
    source = base.dtype(key)
    target = code or source
    if source not in FLOATS:
        raise FormatError(
            f"{base.directory!r}: {key} is {source}: only {', '.join(FLOATS)} can be changed"
        )
    adapter, _, path, new, rows, is_bias = changes[0]
    if is_bias:
        theta = adapter.theta(path)
        b = widen(base.read_bits(key)).astype(np.float64)
        bits = round_to(adapter.maps[path].moved_bias(theta, b), target)
        return bits, None, float(np.abs(widen(bits)).sum(dtype=np.float64))
    if new:
        bits = round_to(adapter.file.read(new, np.float64), target)
        total = float(np.abs(widen(bits)).sum(dtype=np.float64))
        if rows:
            table = resize_rows(stored(base, key, code, allow_nonfinite=True), resized.get(key))
            table[list(rows)] = bits
            bits = table
        return bits, None, total
    bits = resize_rows(base.read_bits(key), resized.get(key)) if coded is None else coded
    if not adapter.is_low_rank:
        bits = base_weight(adapter, path, widen(bits))
        source = "F64"
    if is_stored_transposed(model_type, f"{path}.weight"):
        # Rows as models have them, so that the bits are theirs.
        W = np.ascontiguousarray(bits.T)
        parts = [change.part(W) for change in changes]
        merged = merge_weight(W, parts, target, over=over)
        bits = np.ascontiguousarray(merged.weight.T)
    else:
        out = bits if target == source and coded is None else None
        parts = [change.part(bits) for change in changes]
        merged = merge_weight(bits, parts, target, adapter.embeds(path), out, over)
        bits = merged.weight
    size = merged.size(parts)
    lost = merged.lost / size if size else 0.0
    row: Row = {"tensor": key, "|dW|": None, "lost": None}
    if math.isfinite(lost):
        row |= {"|dW|": size, "lost": lost}
    if coded is not None:
        error = float(np.linalg.norm(coded - base.read(key, np.float64)))
        row["|V-W|/|dW|"] = error / size if size else None
    return bits, row, merged.lost + size


def _find_encoded(base: Checkpoint, config: Mapping[str, Any]) -> frozenset[str]:
    """The keys of the weights that QLoRA has in NF4: all linear layers but the head."""
    if isinstance(base, DecodedCheckpoint):
        raise ConfigError(
            f"--onto: {quoted(base.directory)} is in 4 bits already, and its codes are what dW is "
            "added to: leave --onto out"
        )
    described = describe_checkpoint(base, config)
    linear = [path for path, layer in described.layers.items() if layer.kind == "linear"]
    keys = [base_key(base, f"{path}.weight") for path in linear if path != HEAD]
    return frozenset(key for key in keys if key is not None)


def _through_nf4(base: Checkpoint, key: str, model_type: str, double: bool) -> Array:
    """A weight as NF4 has it, in float32 and the file's layout."""
    W = to_file_layout(model_type, key, widen(base.read_bits(key)))
    try:
        return to_file_layout(model_type, key, nearest_codes(W, double))
    except NonFiniteError:
        raise not_finite(base.directory, key) from None


def resize_rows(bits: Array, W: Array | None) -> Array:
    """A tensor's bits with as many rows as W, of which the new ones are W's; themselves for None.

    Rows that both have keep their bits.
    """
    if W is None:
        return bits
    dtype = "BF16" if bits.dtype == np.uint16 else NUMPY_CODES[bits.dtype]
    return np.concatenate([bits[: len(W)], round_to(W[len(bits) :], dtype)])
