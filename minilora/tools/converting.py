"""A checkpoint or an adapter in another dtype; adapters between PEFT's files and mlx-lm's.

                PEFT                                              mlx-lm
    files       adapter_model.safetensors                         adapters.safetensors
                adapter_config.json                               adapter_config.json
    A (r, I)    base_model.model.<path>.lora_A.weight             <path>.lora_a, transposed: (I, r)
    B (O, r)    base_model.model.<path>.lora_B.weight             <path>.lora_b, transposed: (r, O)
    embedding   <path>.lora_embedding_A and _B                    as any other layer; a tied head
                                                                  has it, too
    m (O,)      base_model.model.<path>.lora_magnitude_vector     <path>.m
    s           lora_alpha / r, per layer                         lora_parameters.scale, one for all

mlx-lm names the adapted layers by paths inside a block, or by whole paths (the head's). GPT-2's
blocks are its model.h.

If I = r, or everything is square, a transposed factor has the right shape, too. So the name alone
says how a factor is stored, and the configuration's rank must be where the name puts it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    ConfigError,
    FormatError,
    NonFiniteError,
    Rule,
    check_fields,
    integer_rules,
    is_plain_number,
    number_rules,
)
from ..formats import (
    Entry,
    SafetensorsFile,
    read_json,
    save_file,
    write_adapter,
    write_json,
    write_stream,
)
from ..formats.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..formats.disk import quoted, require_folder
from ..formats.dtypes import DTYPES
from ..formats.folders import fingerprint, new_folder, require_outside
from ..lora import LoraConfig
from ..lora.config import MAX_COUNT
from ..lora.files.adapter import AdapterFile
from ..lora.files.reading import decoder_of
from ..lora.names import PREFIX
from ..lora.starts.residual import FOLDER as INITIAL
from ..lora.targets.base import HEAD
from .rewriting import DTYPE_RULE, read_dense, rewrite, stored

MLX_FILE = "adapters.safetensors"
EMBEDDING = "embed_tokens"
BLOCKS = ("model.layers.", "transformer.h.")
PARTS = {"A": ".lora_a", "B": ".lora_b", "m": ".m"}
ENDINGS = {".lora_a": "lora_A.weight", ".lora_b": "lora_B.weight", ".m": "lora_magnitude_vector"}
EMBEDDED = {".lora_a": "lora_embedding_A", ".lora_b": "lora_embedding_B"}
Array = np.ndarray
Tensors = dict[str, Array]
OpenOut = Callable[[], AbstractContextManager[Path]]  # makes the new folder


RULES = (Rule("--to", lambda to: to in (None, "peft", "mlx"), "peft or mlx"), DTYPE_RULE)
MLX_RULES = (
    Rule("fine_tune_type", lambda kind: kind in ("lora", "dora"), "lora or dora"),
    *integer_rules("rank", least=1, limit=MAX_COUNT),
    *number_rules("scale", is_kind=is_plain_number, above=0, below=1e300),
)


def convert(
    source: str | Path,
    out: str | Path,
    dtype: str | None = None,
    to: str | None = None,
    allow_nonfinite: bool = False,
    initial: str | Path | None = None,
    base_is: str | None = None,
) -> str:
    """Write the checkpoint or adapter `source` to the folder `out`; returns what it is now, in
    words.

    dtype   "float32", "float16" or "bfloat16": every float is rounded to it once
    to      "peft" or "mlx": an adapter gets files of that format
    initial, base_is   with to="mlx": see AdapterFile

    ConfigError for what the other format cannot express, or if both or neither is given;
    FormatError, NonFiniteError, OSError; `out` is then as it was.
    """
    if (dtype is None) == (to is None):
        raise ConfigError("convert needs one of two options: --dtype, or --to")
    check_fields({"--to": to, "--dtype": dtype}, RULES)
    if to != "mlx" and (initial is not None or base_is is not None):
        raise ConfigError("--initial and --base-is are for --to mlx and --to plain: leave them out")
    require_outside(out, source=source)
    require_folder(source, "model or adapter")
    inputs = {
        "source": fingerprint(source),
        "dtype": dtype,
        "to": to,
        "allow_nonfinite": allow_nonfinite,
    }
    open_out = partial(new_folder, out, inputs)
    folder = Path(source)
    if dtype is None:
        start = {"initial": initial, "base_is": base_is}
        _change_format(folder, str(to), open_out, allow_nonfinite, **start)
        return f"an adapter in {'PEFT' if to == 'peft' else 'mlx-lm'}'s files"
    if (folder / CONFIG_FILE).exists():
        _round_adapter(folder, DTYPES[dtype], open_out, allow_nonfinite)
        return f"an adapter in {dtype}"
    _round_checkpoint(folder, dtype, open_out, allow_nonfinite)
    return f"a checkpoint in {dtype}"


# ---- another dtype ----


def _round_adapter(folder: Path, code: str, open_out: OpenOut, allow_nonfinite: bool) -> None:
    """Round the tensors of an adapter, and those of its first values if it has them beside."""
    with open_out() as stage:
        _round_tensors(folder, code, stage, allow_nonfinite)
        if (folder / INITIAL / CONFIG_FILE).exists():
            (stage / INITIAL).mkdir(exist_ok=True)
            _round_tensors(folder / INITIAL, code, stage / INITIAL, allow_nonfinite)


def _round_tensors(folder: Path, code: str, stage: Path, allow_nonfinite: bool) -> None:
    name = WEIGHTS_FILE if (folder / WEIGHTS_FILE).exists() else MLX_FILE
    fields = read_json(folder / CONFIG_FILE)
    with SafetensorsFile(folder / name) as file:
        file.require_floats(file)
        entries = []
        for key in file.keys():
            read = partial(stored, file, key, code, allow_nonfinite)
            entries.append(Entry(key, code, file.shape(key), read))
        write_stream(stage / name, entries)
        write_json(stage / CONFIG_FILE, fields)


def _round_checkpoint(folder: Path, dtype: str, open_out: OpenOut, allow_nonfinite: bool) -> None:
    config, checkpoint, _ = read_dense(folder, dtype)
    with checkpoint:

        def make(key: str) -> tuple[Array, None]:
            return stored(checkpoint, key, DTYPES[dtype], allow_nonfinite), None

        with open_out() as stage:
            rewrite(checkpoint, config, stage, make, dtype, "convert", {})


# ---- another format ----


def _change_format(
    folder: Path, to: str, open_out: OpenOut, allow_nonfinite: bool, **start: Any
) -> None:
    config, tensors = from_mlx(folder) if to == "peft" else to_mlx(folder, **start)
    for key, array in tensors.items():
        if not allow_nonfinite and not np.isfinite(array).all():
            raise NonFiniteError(f"{quoted(folder)}: {key} is not finite")
    with open_out() as stage:
        if to == "peft":
            write_adapter(stage, config, tensors)
        else:
            save_file(stage / MLX_FILE, tensors)
            write_json(stage / CONFIG_FILE, config)


def from_mlx(folder: str | Path) -> tuple[dict[str, Any], Tensors]:
    """mlx-lm's adapter -> PEFT's configuration and tensors, in float32."""
    folder = Path(folder)
    where = quoted(folder)
    if not (folder / MLX_FILE).exists():
        raise FormatError(f"{where} has no {MLX_FILE}, so it is not an adapter of mlx-lm's")
    fields = read_json(folder / CONFIG_FILE)
    kind = fields.get("fine_tune_type", "lora")
    given = fields.get("lora_parameters")
    file_where = quoted(folder / CONFIG_FILE)
    if not isinstance(given, dict):
        raise ConfigError(f"{file_where}: lora_parameters must be an object, got {given!r:.100}")
    parameters = {"rank": None, "scale": None, "dropout": 0.0, **given}
    check_fields({**parameters, "fine_tune_type": kind}, MLX_RULES, f"{file_where}: ")
    r: Any = parameters["rank"]
    use_dora = kind == "dora"
    tensors, layers = _read_mlx_tensors(folder)
    for path, shapes in layers.items():
        a, b, m = (shapes.get(ending, ()) for ending in ENDINGS)
        if a[1:] != (r,) or b[:-1] != (r,) or m != (b[1:] if use_dora else ()):
            raise FormatError(
                f"{where}: {path}: lora_a {a}, lora_b {b}, m {m}: expected (in, {r}), ({r}, out), "
                f"{'(out,)' if use_dora else '()'}"
            )
    base = fields.get("model")
    peft_fields = {
        "r": r,
        "lora_alpha": r * parameters["scale"],
        "target_modules": sorted(layers),
        "lora_dropout": parameters["dropout"],
        "task_type": "CAUSAL_LM",
        "use_dora": use_dora,
        "fan_in_fan_out": any(path.startswith("transformer.h.") for path in layers),
        "ensure_weight_tying": any(path.endswith(EMBEDDING) for path in layers),
        "base_model_name_or_path": base if isinstance(base, str) else None,
    }
    config = LoraConfig.from_dict(peft_fields, f"{where}: adapter_config.json")
    return config.to_dict(), tensors


def _read_mlx_tensors(folder: Path) -> tuple[Tensors, dict[str, dict[str, tuple[int, ...]]]]:
    """(PEFT's tensors by key, mlx-lm's shapes by layer and ending) of mlx-lm's file."""
    where = quoted(folder)
    tensors: Tensors = {}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    with SafetensorsFile(folder / MLX_FILE) as file:
        file.require_floats(file)
        for key in file.keys():
            ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
            if ending is None:
                raise FormatError(
                    f"{where}: {quoted(key)} is not a tensor of an adapter of mlx-lm's"
                )
            path = _rename(key.removesuffix(ending), "model.h.", "transformer.h.")
            if path.endswith((".wte", ".wpe")):
                raise ConfigError(
                    f"{where}: {path}: mlx-lm adapts GPT-2's embeddings together with the "
                    "head, PEFT does not"
                )
            names = EMBEDDED if path.endswith(EMBEDDING) else ENDINGS
            if ending not in names:
                raise ConfigError(
                    f"{where}: DoRA of {path} has one magnitude per token in mlx-lm, "
                    "one per channel in PEFT"
                )
            array = file.read(key, np.float32)
            layers.setdefault(path, {})[ending] = array.shape
            tensors[f"{PREFIX}{path}.{names[ending]}"] = np.ascontiguousarray(array.T)
    return tensors, layers


def to_mlx(
    folder: str | Path, initial: str | Path | None = None, base_is: str | None = None
) -> tuple[dict[str, Any], Tensors]:
    """PEFT's adapter -> mlx-lm's configuration and tensors.

    mlx-lm has one rank and one scale for all layers. num_layers = -1 adapts every block: a layer
    for which the file has no tensors gets B = 0, which changes nothing.
    """
    with AdapterFile(folder, initial=initial, base_is=base_is) as file:
        decoder = decoder_of(file.file.keys())
        if decoder:
            file.put_into(decoder)
        config = file.config
        other = file.replaced or file.tokens or any(map(file.embeds, file.layers))
        if other or config.peft_type != "LORA":
            raise ConfigError(
                f"{file.where}: mlx-lm has LoRA and DoRA on linear layers, and nothing else"
            )
        if not file.layers:
            raise ConfigError(f"{file.where} adapts no layer: mlx-lm has no adapter without one")
        kinds = {(config.rank(path), config.scaling(path)) for path in file.layers}
        keys = {_mlx_path(path) for path in file.layers}
        if len(kinds) != 1 or "" in keys:
            raise ConfigError(
                f"{file.where} has {sorted(kinds)[:3]} (rank, scale) and {sorted(file.layers)[0]}: "
                "mlx-lm has one rank and one scale for all layers, in blocks or the head"
            )
        tensors = {}
        for path, layer in file.layers.items():
            mlx_path = _rename(path, "transformer.h.", "model.h.")
            for part, ending in PARTS.items():
                if part in layer:
                    array = file.file.read(layer[part], np.float32)
                    tensors[mlx_path + ending] = np.ascontiguousarray(array.T)
        r, scale = kinds.pop()
        dropout = config.lora_dropout
        parameters = {"rank": r, "scale": scale, "dropout": dropout, "keys": sorted(keys)}
        kind = "dora" if config.use_dora else "lora"
        fields = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
        return {**fields, "model": config.base_model_name_or_path}, tensors


def _mlx_path(path: str) -> str:
    """A layer's path inside its block (self_attn.q_proj), or the head's; "" for a layer that mlx-lm
    cannot name."""
    if path == HEAD:
        return path
    for prefix in BLOCKS:
        if path.startswith(prefix):
            return path.removeprefix(prefix).partition(".")[2]
    return ""


def _rename(path: str, before: str, after: str) -> str:
    return after + path.removeprefix(before) if path.startswith(before) else path
