"""base + adapters -> checkpoint, from files alone:  W' = round(W + sum_i w_i s_i B_i A_i), or DoRA's round(k (W + dW)).

The sum is in float64, a few rows at a time, and it is rounded once, to what the file stores. In bfloat16, with 8 bits
a number, that takes away a part of dW that is worth knowing: most of a small one, where |dW| is far below |W| / 256. So
each layer's row says how much:  lost = |W' - (W + dW)| / |dW|,  Frobenius norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import Checkpoint, read_checkpoint
from ..formats.checkpoint import is_stored_transposed
from ..formats.dtypes import DTYPES, FLOATS, round_to, widen
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import HydraConfig
from ..lora.combining import check_weights
from ..lora.factors import Part
from ..lora.files import AdapterFile, base_key, fit, read_base
from ..lora.merging import Map, merge_weight
from ..lora.plan import HEAD, describe_checkpoint
from ..lora.tying import are_transposed, choose
from ..threads import Workers, available_cores, keep_memory
from .rewriting import Row, not_finite, rewrite, stored

Array = np.ndarray
HEAD_WEIGHT = f"{HEAD}.weight"


class Term(NamedTuple):
    """What one adapter does to one tensor: `weight` times a layer's dW, or a tensor (`key`) in its place, or in some
    rows' place (`rows`)."""

    adapter: AdapterFile
    weight: float
    path: str = ""
    key: str = ""
    rows: tuple[int, ...] = ()

    def part(self) -> Part:
        """`weight` times the factors of the layer `path`."""
        part = self.adapter.part(self.path)
        return part._replace(c=part.c * self.weight)


def merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    tied: str | None = None,
) -> list[Row]:
    """Merge PEFT adapters, times `weights` (1), into the checkpoint `base`; write the result to the folder `out`.

    dtype   "float32", "float16" or "bfloat16" for every float; None: each tensor's own
    tied    "untie" or "share": see lora/tying.py. It is needed if the adapters change an embedding
            or the head that shares its weight, but not both alike

    Files, index and keys are the base's; an untied head is one tensor more. Returns one row per
    layer: |dW|, and how much of it rounding took. Memory holds one tensor.

    FormatError if something does not fit; ConfigError for adapters that cannot be added up (DoRA
    beside another one, HydraLoRA) and if `tied` is needed; NonFiniteError for a NaN or infinity;
    OSError. `out` is then as it was.
    """
    weights = check_weights(adapters, weights, "--weights")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype must be {', '.join(DTYPES)}, got {dtype!r:.60}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError(f"--threads must be an integer of at least 1, got {threads!r:.60}")
    require_outside(out, base=base)
    for folder in adapters:
        require_outside(out, adapter=folder)
    with ExitStack() as opened:
        config, checkpoint = read_checkpoint(base)
        opened.enter_context(checkpoint)
        if config.get("quantization_config") is not None:
            raise ConfigError(
                f"--base {str(base)!r} holds codes (quantization_config): a merged weight is none of them"
            )
        files = [opened.enter_context(AdapterFile(folder)) for folder in adapters]
        plan, twins = plan_merge(checkpoint, config, files, weights, tied)
        inputs: dict[str, Any] = {
            "base": fingerprint(base),
            "adapters": [fingerprint(folder) for folder in adapters],
        }
        inputs |= {"weights": weights, "dtype": dtype, "allow_nonfinite": allow_nonfinite}
        inputs["tied"] = tied
        stage = opened.enter_context(new_folder(out, inputs))
        opened.enter_context(
            threadpoolctl.threadpool_limits(1, "blas")
        )  # threads have blocks of rows, not products
        keep_memory()
        workers = opened.enter_context(Workers(threads or available_cores()))
        kind = str(config.get("model_type"))

        def make(key: str) -> tuple[Array, Row | None]:
            terms = plan.get(key, [])
            source = twins.get(key, key)
            if not terms:
                return stored(checkpoint, source, code, allow_nonfinite), None
            bits, row = _changed(checkpoint, source, terms, kind, code, workers.map)
            if not allow_nonfinite and not math.isfinite(row.pop("sum")):
                if set(weights) != {1.0}:
                    raise NonFiniteError(
                        f"--weights {weights}: {key} with its adapters times these is not finite"
                    )
                raise not_finite(checkpoint.directory, key)
            row.pop("sum", None)
            return bits, row if row else None

        code = None if dtype is None else DTYPES[dtype]
        if tied == "untie" and HEAD_WEIGHT in plan:
            config = {**config, "tie_word_embeddings": False}
        return rewrite(checkpoint, config, stage, make, dtype, "merge", twins)


# ---- what is done to which tensor ----


def plan_merge(
    base: Checkpoint,
    config: dict[str, Any],
    adapters: Sequence[AdapterFile],
    weights: Sequence[float],
    tied: str | None,
) -> tuple[dict[str, list[Term]], dict[str, str]]:
    """The keys that change with what is done to each, and twins: new keys, with the key each is made from."""
    described = describe_checkpoint(base, config)
    read = read_base(base)
    plan: dict[str, list[Term]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        changes = terms(adapter, weight)
        fit(adapter, described, read, warn=False)
        for name, term in changes.items():
            plan.setdefault(base_key(base, name) or name, []).append(term)
    twins = {}
    if described.tied:
        embedding = base_key(base, f"{described.embedding}.weight")
        assert embedding is not None
        twins = _settle_tie(base, embedding, plan, tied)
    for key, own in plan.items():
        require_addable(key, own)
    return plan, twins


def _settle_tie(
    base: Checkpoint, embedding: str, plan: dict[str, list[Term]], tied: str | None
) -> dict[str, str]:
    """Change `plan` to what `tied` says about the one weight of embedding and head; returns the twins."""
    of_head = plan.get(HEAD_WEIGHT, [])
    of_embedding = [term for term in plan.get(embedding, []) if not term.rows]
    rows = [term for term in plan.get(embedding, []) if term.rows]  # the head has these too
    same = len(of_head) == len(of_embedding) and all(map(alike, of_embedding, of_head))
    names = ", ".join(dict.fromkeys(t.adapter.where for t in (*of_embedding, *of_head)))
    how = choose(tied, names, bool(of_embedding), bool(of_head), same)
    if same:
        changes = of_embedding
    elif how == "share":
        changes = of_embedding or of_head
    else:
        plan[HEAD_WEIGHT] = [*of_head, *rows]
        return {} if HEAD_WEIGHT in base else {HEAD_WEIGHT: embedding}
    plan[embedding] = [*changes, *rows]
    plan[HEAD_WEIGHT] = plan[embedding]
    return {}


def terms(adapter: AdapterFile, weight: float) -> dict[str, Term]:
    """What `weight` times an adapter does, by the names of tensors. ConfigError for what cannot be taken so often."""
    if isinstance(adapter.config, HydraConfig):
        raise ConfigError(
            f"{adapter.where} is HydraLoRA's: its dW is another one at every position, none to merge"
        )
    found = {f"{path}.weight": Term(adapter, weight, path=path) for path in adapter.layers}
    found |= {name: Term(adapter, weight, key=key) for name, key in adapter.replaced.items()}
    for path, key in adapter.tokens.items():
        found[f"{path}.weight"] = Term(adapter, weight, key=key, rows=tuple(adapter.rows(path)))
    for name, term in found.items():
        if weight != 1 and (term.key or adapter.config.use_dora):
            what = "a tensor that replaces the base's" if term.key else "DoRA's scales"
            raise ConfigError(
                f"{adapter.where}: {name} is {what}, and cannot be taken {weight:g} times"
            )
    return found


def require_addable(key: str, terms: Sequence[Term]) -> None:
    """ConfigError if several adapters change the tensor `key`, and one of them by more than adding to it."""
    alone = [t for t in terms if t.key or t.adapter.config.use_dora]
    if alone and len(terms) > 1:
        why = "it replaces the base's" if alone[0].key else "DoRA scales the sum"
        what = f"what it does to {key} cannot be added to another adapter's"
        raise ConfigError(f"{alone[0].adapter.where}: {what}: {why}")


def alike(embedding: Term, head: Term) -> bool:
    """Do the two change the tied weight (V, C) in the same way?"""
    if embedding.adapter is not head.adapter or bool(embedding.key) != bool(head.key):
        return False
    file = embedding.adapter
    if embedding.key:
        return np.array_equal(file.file.read(embedding.key), file.file.read(head.key))
    return are_transposed(file.part(embedding.path), file.part(head.path))


# ---- one tensor ----


def _changed(
    base: Checkpoint, key: str, terms: list[Term], kind: str, code: str | None, over: Map
) -> tuple[Array, Row]:
    """A tensor's new bits, and its row; row["sum"] is not finite if a number in it is not."""
    target = code or base.dtype(key)
    if base.dtype(key) not in FLOATS:
        raise FormatError(
            f"{base.directory!r}: {key} is {base.dtype(key)}: only {', '.join(FLOATS)} can be changed"
        )
    first = terms[0]
    if first.key:
        array = first.adapter.file.read(first.key, np.float64)
        bits = round_to(array, target)
        if first.rows:
            table = stored(base, key, code, allow_nonfinite=True)
            table[list(first.rows)] = bits
            return table, {
                "sum": float(np.abs(widen(table[list(first.rows)])).sum(dtype=np.float64))
            }
        return bits, {"sum": float(np.abs(widen(bits)).sum(dtype=np.float64))}
    bits = base.read_bits(key)
    parts = [term.part() for term in terms]
    out = bits if target == base.dtype(key) else None
    if is_stored_transposed(
        kind, f"{first.path}.weight"
    ):  # as models hold it, so the bits are theirs
        merged = merge_weight(np.ascontiguousarray(bits.T), parts, target, over=over)
        merged = merged._replace(weight=np.ascontiguousarray(merged.weight.T))
    else:
        merged = merge_weight(bits, parts, target, first.adapter.embeds(first.path), out, over)
    size = merged.size(parts)
    share = merged.lost / size if size else 0.0
    known = math.isfinite(share)
    return merged.weight, {
        "tensor": key,
        "|dW|": size if known else None,
        "lost": share if known else None,
        "sum": merged.lost + size,
    }
