"""What a folder holds, without running anything: an adapter's layers and their spectra, or a checkpoint's tensors.

singular_values, effective_rank     of dW = s B A, from the small factors
inspect_adapter, inspect_checkpoint   a report: what there is to say, and a row for each layer or tensor
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..formats import SafetensorsFile, read_checkpoint
from ..lora import AdaLoraConfig, HydraConfig
from ..lora.factors import effective_rank, singular_values
from ..lora.files import AdapterFile, base_key, mismatches_with

Report = dict[str, Any]


def inspect_adapter(folder: Path, base: str | Path | None = None) -> Report:
    """An adapter's folder: its configuration in short, and of each layer the size of dW and the rank it uses.

    Of DoRA dW stands for s B A, what is added to the direction, and beside it is how far the rows' lengths reach: how
    long they were is the base's to say. Of HydraLoRA it is what an even mixture of its experts adds. With `base` a row
    has |dW| / |W|, too, and "mismatches" lists what keeps the two apart. "spectra" are dW's singular values, by layer.
    FormatError for a file that is damaged, or a lora_A without a lora_B (AdaLoRA's lora_E, DoRA's
    lora_magnitude_vector) that fits it.
    """
    with AdapterFile(folder) as file:
        config, rows, spectra = file.config, [], {}
        for path in file.layers:
            A, B, s, m = file.part(path)
            experts = config.experts if isinstance(config, HydraConfig) else 1
            values = singular_values(A, B.reshape(len(B), experts, -1).mean(axis=1), s)
            row = {
                "layer": path,
                "shape": f"{B.shape[0]} x {A.shape[1]}",
                "r": A.shape[0],
                "scaling": f"{s:g}",
            }
            row |= {
                "|dW|": f"{np.linalg.norm(values):.4g}",
                "rank": f"{effective_rank(values):.2f}",
            }
            if m is not None:
                row["magnitude"] = f"{m.min():.4g} to {m.max():.4g}"
            rows.append(row)
            spectra[path] = [float(value) for value in values]
        sizes, broken = 0, []
        for key in file.file.keys():
            array = file.file.read(key)
            sizes += array.size
            nan, inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
            broken += [f"{key}: {nan} NaN, {inf} infinite"] if nan or inf else []
        report: Report = {
            "adapter": str(folder),
            "base": str(config.base_model_name_or_path),
            "r": config.init_r if isinstance(config, AdaLoraConfig) else config.r,
            "lora_alpha": config.lora_alpha,
            "parameters": sizes,
            "bytes": (Path(folder) / "adapter_model.safetensors").stat().st_size,
            "finite": not broken,
        }
        report |= {"not finite": broken} if broken else {}
        if base is not None:
            fields, checkpoint = read_checkpoint(base)
            with checkpoint:
                report["mismatches"] = mismatches_with(file, checkpoint, fields)
                for row in rows:
                    there = base_key(checkpoint, f"{row['layer']}.weight")
                    W = 0.0 if there is None else norm(checkpoint.read(there))
                    row["|dW| / |W|"] = (
                        f"{float(np.linalg.norm(spectra[str(row['layer'])])) / W:.4g}" if W else "-"
                    )
    return {
        **report,
        "spectra": {p: None if np.isnan(v).any() else v for p, v in spectra.items()},
        "tensors": rows,
    }


def norm(W: np.ndarray) -> float:
    """The Frobenius norm, summed in float64 without a copy of W in it."""
    return math.sqrt(
        float(np.sum(np.square(W, dtype=np.float64) if W.size < 1 << 16 else _squares(W)))
    )


def _squares(W: np.ndarray) -> np.ndarray:
    flat = W.reshape(-1)
    parts = range(0, flat.size, 1 << 16)
    return np.array([np.square(flat[i : i + (1 << 16)], dtype=np.float64).sum() for i in parts])


def inspect_checkpoint(path: Path) -> Report:
    """A model's folder, or one safetensors file: how many numbers, and each tensor's shape and stored dtype."""
    config: dict[str, Any] = {}
    if path.is_file():
        with SafetensorsFile(path) as file:
            rows = _tensors(file)
    else:
        config, checkpoint = read_checkpoint(path)
        with checkpoint:
            rows = _tensors(checkpoint)
    report: Report = {"checkpoint": str(path), "model_type": config.get("model_type", "-")}
    report["parameters"] = sum(math.prod(row["shape"]) for row in rows)
    return {**report, "tensors": rows}


def _tensors(file: Any) -> list[Report]:
    return [
        {"tensor": key, "shape": list(file.shape(key)), "dtype": file.dtype(key)}
        for key in list(file.keys())
    ]
