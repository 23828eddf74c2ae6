"""A checkpoint or an adapter in another dtype; adapters between PEFT's files and mlx-lm's.

               PEFT                                        mlx-lm
    files      adapter_model.safetensors                   adapters.safetensors, and each an adapter_config.json
    A (r, I)   base_model.model.<path>.lora_A.weight       <path>.lora_a, transposed: (I, r)
    B (O, r)   base_model.model.<path>.lora_B.weight       <path>.lora_b, transposed: (r, O)
    of an embedding   <path>.lora_embedding_A and _B       the same as any other; and a tied head has it, too
    m (O,)     base_model.model.<path>.lora_magnitude_vector   <path>.m
    s          lora_alpha / r, by layer                    lora_parameters.scale, one for all

What is adapted, mlx-lm says by paths inside a block, or by whole ones (the head's). GPT-2's blocks are its model.h.

Where I = r, or everything is square, a factor that lies the wrong way has the right shape. So its name alone says how
it lies, and the configuration's rank must be where the name puts it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import (
    Entry,
    SafetensorsFile,
    read_checkpoint,
    read_json,
    save_file,
    write_adapter,
    write_json,
    write_stream,
)
from ..formats.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..formats.disk import quoted, require_folder
from ..formats.dtypes import DTYPES, FLOATS
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import LoraConfig
from ..lora.files import AdapterFile
from ..lora.names import PREFIX
from .rewriting import rewrite, stored

MLX_FILE = "adapters.safetensors"
EMBEDDING, HEAD = "embed_tokens", "lm_head"
ENDINGS = {".lora_a": "lora_A.weight", ".lora_b": "lora_B.weight", ".m": "lora_magnitude_vector"}
EMBEDDED = {".lora_a": "lora_embedding_A", ".lora_b": "lora_embedding_B"}
Array = np.ndarray
Tensors = dict[str, Array]
Begin = Callable[[], AbstractContextManager[Path]]  # of the folder that is to be


def convert(
    source: str | Path,
    out: str | Path,
    dtype: str | None = None,
    to: str | None = None,
    allow_nonfinite: bool = False,
) -> str:
    """Write the checkpoint or adapter `source` to the folder `out`; returns what it is there, in words.

    With `dtype` ("float32", "float16", "bfloat16") every float is rounded to it once; with `to` ("peft", "mlx") an
    adapter gets the other's files. ConfigError for what the other cannot say, or where nothing is asked for;
    FormatError, NonFiniteError, OSError; `out` is then as it was.
    """
    if (dtype is None) == (to is None):
        raise ConfigError("convert takes --dtype, or --to")
    if to not in (None, "peft", "mlx"):
        raise ConfigError(f"--to must be peft or mlx, got {to!r:.60}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype must be {', '.join(DTYPES)}, got {dtype!r:.60}")
    require_outside(out, source=source)
    require_folder(source, "model or adapter")
    inputs = {
        "source": fingerprint(source),
        "dtype": dtype,
        "to": to,
        "allow_nonfinite": allow_nonfinite,
    }
    begin, here = partial(new_folder, out, inputs), Path(source)
    if to is not None:
        _for_the_other(here, to, begin, allow_nonfinite)
        return f"an adapter in {'PEFT' if to == 'peft' else 'mlx-lm'}'s files"
    assert dtype is not None
    adapter = (here / CONFIG_FILE).exists()
    (_adapter_as if adapter else _checkpoint_as)(here, dtype, begin, allow_nonfinite)
    return f"{'an adapter' if adapter else 'a checkpoint'} in {dtype}"


def _for_the_other(here: Path, to: str, begin: Begin, allow_nonfinite: bool) -> None:
    config, tensors = from_mlx(here) if to == "peft" else to_mlx(here)
    for key, array in tensors.items():
        if not allow_nonfinite and not np.isfinite(array).all():
            raise NonFiniteError(f"{quoted(here)}: {key} is not finite")
    with begin() as stage:
        if to == "peft":
            write_adapter(stage, config, tensors)
        else:
            save_file(stage / MLX_FILE, tensors)
            write_json(stage / CONFIG_FILE, config)


def _adapter_as(here: Path, dtype: str, begin: Begin, allow_nonfinite: bool) -> None:
    name, code = WEIGHTS_FILE if (here / WEIGHTS_FILE).exists() else MLX_FILE, DTYPES[dtype]
    fields = read_json(here / CONFIG_FILE)
    with SafetensorsFile(here / name) as file, begin() as stage:
        entries = []
        for key in file.keys():
            kind = code if file.dtype(key) in FLOATS else file.dtype(key)
            entries.append(
                Entry(key, kind, file.shape(key), partial(stored, file, key, code, allow_nonfinite))
            )
        write_stream(stage / name, entries)
        write_json(stage / CONFIG_FILE, fields)


def _checkpoint_as(here: Path, dtype: str, begin: Begin, allow_nonfinite: bool) -> None:
    config, checkpoint = read_checkpoint(here)
    with checkpoint:
        if config.get("quantization_config") is not None:
            raise ConfigError(
                f"{str(here)!r} holds codes (quantization_config), which have no other dtype"
            )

        def make(key: str) -> tuple[Array, None]:
            return stored(checkpoint, key, DTYPES[dtype], allow_nonfinite), None

        with begin() as stage:
            rewrite(checkpoint, config, stage, make, dtype, "convert")


def from_mlx(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """mlx-lm's adapter -> PEFT's configuration and tensors, in float32."""
    where = quoted(folder)
    if not (folder / MLX_FILE).exists():
        raise FormatError(f"{where} has no {MLX_FILE}: no adapter of mlx-lm's")
    fields = read_json(folder / CONFIG_FILE)
    kind, given = fields.get("fine_tune_type", "lora"), fields.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(given, dict):
        raise ConfigError(
            f"{where}: expected fine_tune_type lora or dora, and lora_parameters; got {kind!r:.60}"
        )
    r: Any = given.get("rank")
    scale: Any = given.get("scale")
    if (
        type(r) is not int
        or not 0 < r < 2**24
        or type(scale) not in (int, float)
        or not 0 < scale < 1e300
    ):
        raise ConfigError(
            f"{where}: lora_parameters need a rank of at least 1 and a positive scale, got {given!r:.100}"
        )
    tensors: Tensors = {}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    with SafetensorsFile(folder / MLX_FILE) as file:
        for key in file.keys():
            ending = next((e for e in ENDINGS if key.endswith(e)), None)
            if ending is None:
                raise FormatError(
                    f"{where}: {quoted(key)} is not a tensor of an adapter of mlx-lm's"
                )
            path, array = (
                _renamed(key.removesuffix(ending), "model.h.", "transformer.h."),
                file.read(key, np.float32),
            )
            if path.endswith((".wte", ".wpe")):
                raise ConfigError(
                    f"{where}: {path}: GPT-2's embeddings are adapted there with the head, in PEFT without"
                )
            layers.setdefault(path, {})[ending] = array.shape
            name = (EMBEDDED if path.endswith(EMBEDDING) else ENDINGS).get(ending)
            if name is None:
                raise ConfigError(
                    f"{where}: DoRA of {path} has a length for each token there, for each channel in PEFT"
                )
            tensors[f"{PREFIX}{path}.{name}"] = np.ascontiguousarray(array.T)
    for path, shapes in layers.items():
        a, b, m = (shapes.get(ending, ()) for ending in ENDINGS)
        if (
            len(a) != 2
            or len(b) != 2
            or a[1] != r
            or b[0] != r
            or m != ((b[1],) if kind == "dora" else ())
        ):
            raise FormatError(
                f"{where}: {path}: lora_a {a}, lora_b {b}, m {m}: expected (in, {r}), ({r}, out), (out,)"
            )
    said = {
        "r": r,
        "lora_alpha": scale * r,
        "target_modules": sorted(layers),
        "lora_dropout": given.get("dropout", 0.0),
        "task_type": "CAUSAL_LM",
        "use_dora": kind == "dora",
        "fan_in_fan_out": any(path.startswith("transformer.h.") for path in layers),
        "ensure_weight_tying": any(path.endswith(EMBEDDING) for path in layers),
        "base_model_name_or_path": _text(fields.get("model")),
    }
    config = LoraConfig.from_dict(said, f"{where}: adapter_config.json")
    return config.to_dict(), tensors


def to_mlx(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """PEFT's adapter -> mlx-lm's configuration and tensors.

    mlx-lm has one rank and one scale for all layers. num_layers = -1 adapts every block: one that the file has nothing
    for gets B = 0, which changes nothing.
    """
    with AdapterFile(folder) as file:
        config = file.config
        if (
            config.peft_type != "LORA"
            or file.replaced
            or file.tokens
            or any(map(file.embeds, file.layers))
        ):
            raise ConfigError(
                f"{file.where}: mlx-lm has LoRA and DoRA on linear layers, and nothing else"
            )
        if not file.layers:
            raise ConfigError(f"{file.where} adapts no layer: mlx-lm has no adapter without one")
        kinds = {(config.rank(path), config.scaling(path)) for path in file.layers}
        inside = {path: _inside(path) for path in file.layers}
        if len(kinds) != 1 or not all(inside.values()):
            raise ConfigError(
                f"{file.where}: mlx-lm has one rank and one scale for all layers, in blocks or the head; here are "
                f"{sorted(kinds)[:3]} (rank, scale) and {sorted(file.layers)[0]}"
            )
        (r, scale), tensors = kinds.pop(), {}
        for path, layer in file.layers.items():
            for part, ending in ("A", ".lora_a"), ("B", ".lora_b"), ("m", ".m"):
                if part in layer:
                    there = _renamed(path, "transformer.h.", "model.h.")
                    tensors[f"{there}{ending}"] = np.ascontiguousarray(
                        file.file.read(layer[part], np.float32).T
                    )
        parameters = {
            "rank": r,
            "scale": scale,
            "dropout": config.lora_dropout,
            "keys": sorted(set(inside.values())),
        }
        kind = "dora" if config.use_dora else "lora"
        fields = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
        return {**fields, "model": config.base_model_name_or_path}, tensors


def _inside(path: str) -> str:
    """self_attn.q_proj of model.layers.0.self_attn.q_proj, or the head; "" for what has another name there."""
    if path == HEAD:
        return path
    blocks = next((b for b in ("model.layers.", "transformer.h.") if path.startswith(b)), None)
    return path.removeprefix(blocks).partition(".")[2] if blocks else ""


def _renamed(path: str, before: str, now: str) -> str:
    return now + path.removeprefix(before) if path.startswith(before) else path


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
