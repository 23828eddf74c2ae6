"""Adapters that were trained over a changed base R: their first values, and the way back to W.

    R = W - s B0 A0          the base during training
    W' = R + s B A           the trained model
       = W + s [B, -B0] [A; A0]

So for W the adapter is plain LoRA of twice the rank, exact but for the rounding of R. Every command
reads it in this form; only training goes on over R. The file of a trained adapter does not have A0
and B0. They are read from the adapter as saved before training (`--initial`, or the folder
`initial` in the adapter's folder), or computed from W (recomputed.py). The start loftq has no A0
and B0: its base is Q, which codes decode to. A user who has R itself says so (`--base-is
residual`); over R the adapter is plain LoRA.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, FormatError
from ...formats import SafetensorsFile
from ...formats.checkpoint import is_stored_transposed
from ...formats.disk import JsonObject
from ...threads import one_blas_thread
from ..config import NO_START, LoraConfig, name_of_changed_start, plain_fields
from ..factors import Part, product_norm
from ..files.reading import adapted_ranks
from ..files.repeats import Read, is_rounded_to
from ..names import LINEAR, PREFIX, factor_keys
from ..targets.base import Base
from .recomputed import (
    LEAST_SHARE,
    RECOMPUTED,
    coded_base,
    energy_along,
    looks_like_residual,
    recompute,
)

Array = np.ndarray
FOLDER = "initial"  # inside an adapter's folder
RESIDUAL = "residual"


def start_of(config: LoraConfig) -> str:
    """PEFT's init_lora_weights in a file whose start changed the base; "" for other files."""
    value = config.extra.get("init_lora_weights")
    return str(value) if name_of_changed_start(value) else ""


def without_start(config: LoraConfig) -> LoraConfig:
    """The configuration of the same adapter for a base that needs no start: R, or W if plain."""
    extra = {name: value for name, value in config.extra.items() if name not in NO_START}
    return dataclasses.replace(config, extra=extra)


def check_choice(base_is: str | None, config: LoraConfig, initial: Any, where: str) -> None:
    """ConfigError if the options --base-is and --initial do not fit each other or the adapter."""
    if base_is not in (None, RESIDUAL):
        raise ConfigError(f"--base-is must be {RESIDUAL!r}, got {base_is!r:.60}: or leave it out")
    if base_is and initial is not None:
        raise ConfigError("--initial takes W for the base, --base-is residual R: give one of them")
    if (base_is or initial is not None) and not start_of(config):
        given = "--base-is residual" if base_is else "--initial"
        raise ConfigError(
            f"{given}: {where} was trained over its base as it is, with no start that changes it: "
            "leave the option out"
        )


def find_initial(folder: str | Path, initial: str | Path | None) -> str | Path | None:
    """The folder of the adapter as saved before training: `initial`, or else `folder`/initial."""
    if initial is None and os.path.isdir(Path(folder, FOLDER)):
        return Path(folder, FOLDER)
    return initial


# ---- reading -------------------------------------------------------------------------------------


def read_start(adapter: Any, before: Any, over_base: bool) -> None:
    """Make an AdapterFile plain LoRA if A0 and B0 are given.

    before      the AdapterFile of the adapter as saved before training, or None
    over_base   whether A0 and B0 may be computed from a base later, by `resolve_start`

    FormatError if A0 and B0 are not given and cannot be computed.
    """
    word = name_of_changed_start(adapter.began)
    ranks = adapted_ranks(adapter.file)
    if not ranks:
        raise FormatError(f"{adapter.where} has no lora_A: it adapts no layer")
    _refuse_transposed(adapter, adapter.config.fan_in_fan_out)
    if before is not None and word != "loftq":
        adapter.initial = read_initial(before, adapter.file, adapter.config, ranks)
        if not adapter.to_train:
            _become_plain(adapter)
    elif not over_base or word not in (*RECOMPUTED, "loftq"):
        raise _refusal(adapter.where, adapter.began, over_base)


def resolve_start(adapter: Any, base: Base, read: Read) -> None:
    """Compute A0 and B0 from the base's weights, and make an AdapterFile plain LoRA over the base.

    FormatError if these weights do not determine them.
    """
    paths = [path for path in adapted_ranks(adapter.file) if path in base.layers]
    paths = [path for path in paths if base.layers[path].kind == "linear"]
    if base.head in paths and base.tied:
        raise FormatError(
            f"{adapter.where}: init_lora_weights={adapter.began!r:.40} changed the head's weight, "
            "which this base shares with its embedding: untie the two, and train again"
        )
    _refuse_transposed(adapter, base.model_type == "gpt2")
    word = name_of_changed_start(adapter.began)
    if not adapter.is_low_rank or not (adapter.initial or word in RECOMPUTED):
        return  # loftq: the base becomes Q, see base_weight
    with one_blas_thread():
        _find_initial_values(adapter, paths, base, read)


def _find_initial_values(adapter: Any, paths: Sequence[str], base: Base, read: Read) -> None:
    is_given = bool(adapter.initial)
    word = name_of_changed_start(adapter.began)
    for path in paths:
        W = read(f"{path}.weight").astype(np.float64)
        W = W.T if is_stored_transposed(base.model_type, f"{path}.weight") else W
        key = f"{PREFIX}{path}.{LINEAR['B']}"
        B = adapter.file.read(key, np.float64) if key in adapter.file else np.zeros((0, 0))
        if B.ndim != 2 or len(B) != len(W):
            return  # the adapter does not fit the base: a later check raises
        if not is_given:
            s = adapter.config.scaling(path)
            adapter.initial[path] = recompute(word, path, W, B, s, adapter.where)
        elif word.startswith("pissa"):
            _require_original(path, W, adapter.initial[path], adapter)
    if not (is_given or adapter.to_train):
        _become_plain(adapter)


def _require_original(path: str, W: Array, initial: Part, adapter: Any) -> None:
    """FormatError if W (O, I) lacks what the start took out of it: then it is R already."""
    largest = product_norm(initial.A, initial.c * initial.B) ** 2  # |s B0 A0|^2
    if energy_along(initial.B, W) < LEAST_SHARE * largest:
        raise looks_like_residual(adapter.where, adapter.began, path)


def base_weight(adapter: Any, path: str, W: Array) -> Array:
    """The weight (O, I) to which a layer of an AdapterFile adds its dW: W, or loftq's Q."""
    if adapter.is_low_rank or adapter.embeds(path):
        return W
    return coded_base(adapter.config, path, W.astype(np.float64), adapter.where)


def is_left_by_start(adapter: Any, key: str, path: str, W: Array, transposed: bool) -> bool:
    """Is a tensor of an AdapterFile the base's weight as its start left it?

    W            the base's weight as it is in files: (O, I), or (I, O) if `transposed`

    peft saves a targeted head with the weight R or Q over which it trained.
    """
    W = (W.T if transposed else W).astype(np.float64)
    if not adapter.is_low_rank:
        changed = base_weight(adapter, path, W)
    elif path in adapter.initial:
        A0, B0, s, *_ = adapter.initial[path]
        changed = W - s * (B0 @ A0)
    else:
        return False
    return is_rounded_to(adapter.file, key, changed.T if transposed else changed, W)


def _become_plain(adapter: Any) -> None:
    """Replace an AdapterFile's factors and fields by those of plain LoRA over W."""
    file = adapter.file
    ranks = adapted_ranks(file)

    def read(key: str) -> Array:
        return file.read(key, np.float64)  # type: ignore[no-any-return]

    tensors, fields = plain_form(file.__contains__, read, adapter.config, ranks, adapter.initial)
    file.override(tensors)
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    changed = {name: fields[name] for name in names}
    adapter.config = dataclasses.replace(without_start(adapter.config), **changed)
    adapter.raw |= fields


def _refuse_transposed(adapter: Any, transposed: bool) -> None:
    """FormatError for starts that PEFT computes from the transpose of Conv1D's weight."""
    if transposed and name_of_changed_start(adapter.began) in ("olora", "loftq"):
        raise FormatError(
            f"{adapter.where}: init_lora_weights={adapter.began!r:.40}: peft takes Conv1D's weight "
            "for its transpose there, so that the adapter never began as the base; only the base "
            "that peft changed can be used, with --base-is residual"
        )


def _refusal(where: str, word: str, base_known: bool) -> FormatError:
    """The error for an adapter whose first values are neither given nor computable."""
    head = f"{where}: init_lora_weights={word!r:.40}: trained on "
    if name_of_changed_start(word) == "loftq":
        return FormatError(
            f"{head}decoded codes Q; W - Q has full rank, so no adapter of low rank is for W: "
            "use it with its base (merge, generate), or give Q with --base-is residual"
        )
    if name_of_changed_start(word) in RECOMPUTED and not base_known:
        return FormatError(
            f"{head}W-s B0 A0, and A0, B0 follow from W, which is not given here. Give --initial "
            "DIR (the adapter as saved before training), or make it plain first: minilora convert "
            "--to plain --base DIR"
        )
    return FormatError(
        f"{head}W-s B0 A0, and neither A0, B0 nor that base is given; on this base it is another "
        "model. Give --initial DIR (the adapter as saved before training), or the changed base "
        "with --base-is residual; for a command without these, minilora convert --to plain takes "
        "--initial"
    )


# ---- A0 and B0 from a folder ---------------------------------------------------------------------


def read_initial(
    initial: Any, file: SafetensorsFile, config: LoraConfig, ranks: Mapping[str, int]
) -> dict[str, Part]:
    """A0, B0 and s of each linear layer that `file` adapts.

    initial   the AdapterFile of the adapter as saved before training
    ranks     by path, of the layers that have an A in `file`

    FormatError if `initial` is not the same adapter: it lacks a layer, or has another rank or
    scaling.
    """
    head = f"--initial {initial.where}"
    advice = "give the same adapter as saved before training"
    factors = {}
    for path in ranks:
        keys = [f"{PREFIX}{path}.{LINEAR[part]}" for part in "AB"]
        if keys[0] not in file:  # an embedding, whose weight no start changes
            continue
        for key in keys:
            shape = initial.file.shape(key) if key in initial.file else "missing"
            if key not in file or shape != file.shape(key):
                trained = file.shape(key) if key in file else "missing"
                raise FormatError(
                    f"{head}: {key} is {shape}, in the trained adapter {trained}: {advice}"
                )
        before, now = (one.scaling(path) for one in (initial.config, config))
        if before != now:
            raise FormatError(
                f"{head}: {path} has the scaling {before:g}, in the trained adapter {now:g}: "
                f"{advice}"
            )
        A0, B0 = (initial.file.read(key, np.float64) for key in keys)
        factors[path] = Part(A0, B0, now)
    return factors


# ---- plain LoRA over W ---------------------------------------------------------------------------


def plain_form(
    has: Callable[[str], bool],
    read: Callable[[str], Array],
    config: LoraConfig,
    ranks: Mapping[str, int],
    initial: Mapping[str, Sequence[Any]],
) -> tuple[dict[str, Array], JsonObject]:
    """(the factors over W by key, in float64; the changed fields) of an adapter over R.

    has, read   key -> whether the adapter has this tensor; key -> the tensor in float64
    ranks       by path, of the layers that have an A
    initial     A0 and B0, by path; a layer without them stays as it is

    B' contains the scaling, so that s = 1 in every layer, for all patterns and rsLoRA.
    """
    tensors: dict[str, Array] = {}
    new_ranks = {}
    for path, r in ranks.items():
        embeds = has(factor_keys(path, embeds=True)[0])
        keys = factor_keys(path, embeds)
        A, B = map(read, keys)
        A0, B0, *_ = initial.get(path, (A[:0], B[:, :0]))
        new = difference(A, B, A0, B0, config.scaling(path))
        tensors |= dict(zip(keys, new, strict=True))
        new_ranks[path] = r + len(A0)
    most = max(new_ranks.values())
    others = {path: rank for path, rank in new_ranks.items() if rank != most}
    patterns = {"rank_pattern": others, "alpha_pattern": dict(others)}
    return tensors, {**plain_fields(most), **patterns}


def difference(A: Array, B: Array, A0: Array, B0: Array, s: float) -> tuple[Array, Array]:
    """A' (r + r0, I) and B' (O, r + r0) with B' A' = s (B A - B0 A0)."""
    return np.concatenate([A, A0]), np.concatenate([s * B, -s * B0], axis=1)
