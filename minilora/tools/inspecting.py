"""What a folder contains, without running anything: an adapter's layers and their spectra, or a
checkpoint's tensors.

inspect_adapter      a report on an adapter, with a row for each layer
inspect_checkpoint   a report on a checkpoint, with a row for each tensor
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..formats import Checkpoint, SafetensorsFile, read_checkpoint
from ..formats.adapter import WEIGHTS_FILE
from ..lora import AdaLoraConfig, HydraConfig, LoraConfig
from ..lora.factors import effective_rank, singular_values
from ..lora.files.adapter import AdapterFile
from ..lora.files.fitting import base_key, mismatches_with, read_base
from ..lora.maps import MapConfig
from ..threads import blocks
from .rewriting import read_dense

Report = dict[str, Any]


def inspect_adapter(
    folder: str | Path,
    base: str | Path | None = None,
    initial: str | Path | None = None,
    base_is: str | None = None,
) -> Report:
    """A report on an adapter's folder: its configuration in short, and for each layer the size of
    dW and its rank.

    For DoRA dW means s B A, what is added to the direction, and the row has the range of its
    magnitudes m, too: the lengths of the rows before are the base's. For HydraLoRA dW is what an
    even mixture of its experts adds. With `base` a row has |dW| / |W|, too, and "mismatches" lists
    what does not fit. "spectra" are dW's singular values, by layer. FormatError for a damaged file,
    or a lora_A without a lora_B (AdaLoRA's lora_E, DoRA's lora_magnitude_vector) that fits it. A
    method without factors has dW, its rank and spectrum only over a base that it fits. An adapter
    whose start changed the base is shown as plain LoRA over the base as it was: `initial` and
    `base_is` are those of AdapterFile.
    """
    over_base = base is not None
    with AdapterFile(folder, initial=initial, base_is=base_is, over_base=over_base) as file:
        mismatches = _mismatches(file, base)
        config = file.config
        is_map = isinstance(config, MapConfig)
        described = [_describe_map(file, path) for path in file.layers] if is_map else []
        if not is_map:
            described = [_describe_factors(file, path) for path in file.layers]
        parameters, broken = _count_numbers(file)
        report: Report = {
            "adapter": str(folder),
            "base": str(config.base_model_name_or_path),
            **_describe_config(config),
            "parameters": parameters,
            "bytes": (Path(folder) / WEIGHTS_FILE).stat().st_size,
            "finite": not broken,
        }
        if broken:
            report["not finite"] = broken
        if base is not None:
            _, checkpoint, _ = read_dense(base)
            with checkpoint:
                report["mismatches"] = mismatches
                if file.maps:
                    described = [_describe_map(file, path, checkpoint) for path in file.maps]
                for row, values in described:
                    size = float(np.linalg.norm(values))
                    W = _weight_norm(checkpoint, row["layer"])
                    row["|dW| / |W|"] = f"{size / W:.4g}" if W else "-"
        if file.began:
            report["start"] = f"{file.began}, shown over {_describe_base(file)}"
        if file.notes:
            report["notes"] = file.notes
    spectra = {}
    for row, values in described:
        if len(values) or not is_map:
            spectra[row["layer"]] = None if np.isnan(values).any() else values.tolist()
    return {**report, "spectra": spectra, "tensors": [row for row, _ in described]}


def _count_numbers(file: AdapterFile) -> tuple[int, list[str]]:
    """(how many numbers the file has, a line for each tensor with a NaN or an infinity)."""
    count = 0
    broken = []
    for key in file.file.keys():
        array = file.file.read(key)
        count += array.size
        nan = np.isnan(array).sum()
        infinite = np.isinf(array).sum()
        if nan or infinite:
            broken.append(f"{key}: {nan} NaN, {infinite} infinite")
    return count, broken


def _weight_norm(base: Checkpoint, path: str) -> float:
    """|W| of the layer `path`; 0 if the base does not have it."""
    key = base_key(base, f"{path}.weight")
    if key is None:
        return 0.0
    base.require_floats([key])
    return norm(base.read(key))


def _describe_config(config: LoraConfig) -> Report:
    """What a configuration says in a few fields."""
    if isinstance(config, MapConfig):
        fields = {name: getattr(config, name) for name in ("r",) if name in config.USES}
        added = {field.name: getattr(config, field.name) for field in config.added_fields()}
        return {"method": config.title, **fields, **added}
    r = config.init_r if isinstance(config, AdaLoraConfig) else config.r
    return {"r": r, "lora_alpha": config.lora_alpha}


def _describe_factors(file: AdapterFile, path: str) -> tuple[Report, np.ndarray]:
    """(the row of a layer, the singular values of its dW)"""
    experts = file.config.experts if isinstance(file.config, HydraConfig) else 1
    A, B, s, m = file.part(path)
    B = B.reshape(len(B), experts, -1).mean(axis=1)
    values = singular_values(A, B, s)
    row = {
        "layer": path,
        "shape": f"{len(B)} x {A.shape[1]}",
        "r": len(A),
        "scaling": f"{s:g}",
        "|dW|": f"{float(np.linalg.norm(values)):.4g}",
        "rank": f"{effective_rank(values):.2f}",
    }
    if m is not None:
        row["magnitude"] = f"{m.min():.4g} to {m.max():.4g}"
    return row, values


def _describe_map(
    file: AdapterFile, path: str, base: Checkpoint | None = None
) -> tuple[Report, np.ndarray]:
    """(the row of a layer, the singular values of its dW, or none without a base)"""
    numbers = [math.prod(file.file.shape(key)) for key in file.layers.get(path, {}).values()]
    row: Report = {"layer": path, "numbers": sum(numbers)}
    values = np.zeros(0)
    if base is not None:
        one = file.maps[path]
        W = read_base(base)(f"{path}.weight")
        W = np.ascontiguousarray(W.T) if file.is_transposed(path) else W
        dW = file.part(path, W).dW
        is_finite = bool(np.isfinite(dW).all())
        values = np.linalg.svd(dW, compute_uv=False) if is_finite else np.array([np.nan])
        row |= {"shape": f"{one.O} x {one.I}", "|dW|": f"{float(np.linalg.norm(values)):.4g}"}
        row["rank"] = f"{effective_rank(values):.2f}"
    return row, values


def _mismatches(file: AdapterFile, base: str | Path | None) -> list[str]:
    """What of the adapter does not fit the base; now, because its rank may follow from the base."""
    if base is None:
        return []
    fields, checkpoint = read_checkpoint(base)
    with checkpoint:
        return mismatches_with(file, checkpoint, fields)


def _describe_base(file: AdapterFile) -> str:
    return "W" if file.is_low_rank else "Q, its codes decoded"


def norm(W: np.ndarray) -> float:
    """The Frobenius norm, summed in float64 without a float64 copy of W."""
    numbers = W.reshape(-1)
    squares = [np.square(numbers[at], dtype=np.float64).sum() for at in blocks(W.size, 1 << 16)]
    return math.sqrt(np.sum(squares))


def inspect_checkpoint(path: str | Path) -> Report:
    """A report on a model's folder, or one safetensors file: each tensor's shape and dtype."""
    path = Path(path)
    config: dict[str, Any] = {}
    file: Checkpoint | SafetensorsFile
    if path.is_file():
        file = SafetensorsFile(path)
    else:
        config, file = read_checkpoint(path)
    parameters = 0
    rows = []
    with file:
        for key in file.keys():
            shape = file.shape(key)
            parameters += math.prod(shape)
            rows.append({"tensor": key, "shape": list(shape), "dtype": file.dtype(key)})
    report = {"checkpoint": str(path), "model_type": config.get("model_type", "-")}
    return {**report, "parameters": parameters, "tensors": rows}
