"""An adapter that was trained over a changed base, as plain LoRA over the base as it was.

    W' = R + s B A,  R = round(W - s B0 A0)        A' = [A; A0],  B' = [s B, -s B0]

The rank doubles, and W + B' A' is W' but for the rounding of R, which is lost. With a given rank it
is the nearest adapter of that rank (Eckart & Young 1936), and its error is reported.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ConfigError, NonFiniteError
from ..formats import Checkpoint, read_checkpoint, write_adapter
from ..formats.checkpoint import is_stored_transposed
from ..formats.dtypes import widen
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import LoraConfig
from ..lora.config import plain_fields
from ..lora.factors import Part, error_row, product_norm, truncate_rank
from ..lora.files.adapter import AdapterFile
from ..lora.files.fitting import base_key, fit, read_base
from ..lora.merging import merge_weight
from ..lora.targets.base import Base, describe_checkpoint
from ..training.methods import NAMES, method_of
from .factoring import factor_tensors
from .rewriting import Row, progress

Array = np.ndarray


def make_plain(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    initial: str | Path | None = None,
    r: int | None = None,
) -> list[Row]:
    """Write an adapter whose start changed the base as plain LoRA over the base as it was.

    base      the base as it was, from which pissa's and olora's first values are computed
    initial   the folder of the adapter as saved before training, by default `initial` in the
              adapter's folder; one of `base` and `initial` is needed
    r         the rank of every layer; None: the adapter's doubled, without an error

    Returns one row per layer: |dW|, the error of the rank, and with `base` the rounding of R as a
    share of |W|. DoRA's m and all other tensors stay as they are.

    ConfigError for an adapter that is plain already; FormatError, NonFiniteError, OSError. After an
    error `out` is as it was.
    """
    require_outside(out, adapter=adapter)
    rounding: dict[str, float] = {}
    with AdapterFile(adapter, initial=initial, over_base=base is not None) as file:
        method = method_of(file.config)
        if not file.began and method not in ("lora", "dora"):
            raise ConfigError(
                f"{file.where} is an adapter of {NAMES[method]}, over its base as it is: only "
                "LoRA's starts change the base, so that there is nothing to take back: use the "
                "adapter as it is"
            )
        if not file.began:
            raise ConfigError(
                f"{file.where}: init_lora_weights={file.raw.get('init_lora_weights', True)!r:.40} "
                "left the base as it is: the adapter is plain LoRA already"
            )
        if not file.is_low_rank:
            raise ConfigError(
                f"{file.where}: init_lora_weights={file.began!r:.40}: its base is decoded codes, "
                "from which W differs by full rank, so no plain LoRA is for W: merge it instead"
            )
        if base is not None:
            config, checkpoint = read_checkpoint(base)
            with checkpoint:
                described = describe_checkpoint(checkpoint, config)
                fit(file, described, read_base(checkpoint))
                for path, part in file.initial.items():
                    rounding[path] = _rounding(checkpoint, described, path, part)
        tensors = {key: _rounded(file, key) for key in file.file.keys()}
        rows = []
        for path in progress(file.layers, "plain"):
            part = file.part(path)
            row = error_row(part.c * product_norm(part.A, part.B), 0.0)
            if r is not None:
                A, B, row = truncate_rank(part.A, part.B, part.c, r)
                tensors |= factor_tensors(path, A, B, file.embeds(path))
            row = {"layer": path, "r": f"{len(part.A)} -> {r or len(part.A)}", **row}
            if base is not None:
                row["rounding / |W|"] = rounding.get(path, 0.0)
            rows.append(row)
        fields = {**file.config.to_dict(), **(plain_fields(r) if r is not None else {})}
    LoraConfig.from_dict(fields, str(adapter))  # so that what is written can be read
    with new_folder(out, {"source": fingerprint(adapter), "r": r}) as stage:
        write_adapter(stage, fields, tensors)
    return rows


def _rounded(file: AdapterFile, key: str) -> Array:
    """A tensor of the file, factors in float32. NonFiniteError."""
    array = file.file.read(key)
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{file.where}: {key} is not finite")
    is_factor = any(key in layer.values() for layer in file.layers.values())
    return file.file.read(key, np.float32) if is_factor else array


def _rounding(checkpoint: Checkpoint, base: Base, path: str, part: Part) -> float:
    """|R - (W - s B0 A0)| / |W|, for R in the dtype in which the checkpoint stores W."""
    name = f"{path}.weight"
    key = base_key(checkpoint, name)
    assert key is not None  # the adapter fits the base
    bits = checkpoint.read_bits(key)
    if is_stored_transposed(base.model_type, name):
        bits = np.ascontiguousarray(bits.T)
    size = float(np.linalg.norm(widen(bits).astype(np.float64)))
    lost = merge_weight(bits, [part._replace(c=-part.c)], checkpoint.dtype(key)).lost
    return lost / size if size else 0.0
