"""get_peft_model, and PeftModel: a model with adapters, which merges, saves and loads them.

`get_peft_model` puts adapters into the model that it is given, as PEFT does; `unload` and
`merge_and_unload` take them out again.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats.checkpoint import to_file_layout
from ..modules import LoadedState, load_parameters
from ..nn import replace_module
from ..quant.linear import QuantizedLinear
from .adapted import AdaptedModel
from .combining import add_weighted_adapter
from .config import LoraConfig
from .files.adapter import AdapterFile
from .files.fitting import fit
from .files.repeats import repeated
from .files.writing import write_started
from .layer import Wrapper
from .maps import MapConfig
from .starts.layers import read_starts
from .targets.base import describe_model, modules_inside
from .targets.plan import check_wrapped
from .tying import copy_to_share, embedding_and_head, model_type_of, prepare_tie
from .vocabulary import check_resizable, resize_vocabulary

MAX_FOLDER_NAME = 255  # in bytes: the limit of most file systems


def get_peft_model(
    model: Any,
    config: LoraConfig,
    adapter_name: str = "default",
    seed: int = 0,
    data: Iterable[Any] | None = None,
    quantize: str | None = None,
    resumed: str | Path | None = None,
) -> PeftModel:
    """Freeze `model`, put the adapter that `config` describes into it, and return it wrapped.

    model      any Module. A language model also offers `get_input_embeddings()`,
               `get_output_embeddings()` and `config`, a dataclass with `model_type` and
               `tie_word_embeddings`; only options about these ends ask for that
    seed       of the adapter's first values, which also depend on the layer's name, and on the
               weights and data that a start reads
    data       batches of ids (B, T + 1), for the starts eva and lora_ga
    quantize   "nf4", "fp4" or "int8": the base's linear layers are stored in these codes, after the
               start has changed them
    resumed    the folder of a checkpoint: the adapter's start is read from it, not computed
    """
    return PeftModel(model, config, adapter_name, seed, data, quantize, resumed)


class PeftModel(AdaptedModel):
    """A model with named adapters, which can be merged, saved and loaded."""

    add_weighted_adapter = add_weighted_adapter

    # ---- merging ---------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,
        requantize: bool = False,
        tied: str | None = None,
    ) -> None:
        """Add the dW of active adapters, by default all, to the base's weights.

        Merging changes what the model computes only by rounding: before and after, its weights are

            W + the sum of dW of the active adapters

        where merged dW are part of the stored W. An adapter that is not active is refused with a
        ConfigError, because merging would activate it. (In PEFT a merged inactive adapter takes
        effect, and active ones that are not merged lose theirs.) `set_adapter` has already refused
        adapters whose dW cannot be added (DoRA and another adapter of one layer). Merged adapters
        cannot be trained: GraphError in a backward pass. See `LoraLinear.merge`.

        If a merged weight of any layer is not finite, no layer is merged: NonFiniteError names the
        layer. (PEFT checks this only with `safe_merge`, which makes no difference here.) If an
        adapter changes only one of an embedding and a head that share a weight, `tied` is required:
        "untie" gives each its own weight, and the output stays; "share" changes both, as in PEFT,
        and so the output.
        """
        names = self._known_or_active(adapter_names)
        self._require_active(names)
        if not self._is_enabled:
            raise ConfigError(
                "the adapters are disabled, and merging would enable them: call "
                "enable_adapter_layers() first"
            )
        self._merge([*self.merged_adapters, *names], requantize, tied)

    def _require_active(self, names: Sequence[str]) -> None:
        for layer in self._wrappers().values():
            layer.result([*self.active_adapters, *names])  # raises if they cannot run together
        inactive = [name for name in names if name not in self.active_adapters]
        if inactive:
            raise ConfigError(
                f"adapter {', '.join(map(repr, inactive))} is not active, and merging would "
                f"activate it; active: {', '.join(self.active_adapters)}. Call set_adapter() "
                "first, or merge_and_unload(adapter_names=...)"
            )

    def _merge(self, names: Sequence[str], requantize: bool, tied: str | None) -> None:
        names = list(dict.fromkeys(names))
        prepare_tie(self.model, names, tied)
        done: list[tuple[Wrapper, tuple[str, ...], bool]] = []
        for path, layer in self._wrappers().items():
            before = layer.merged, layer.requantized
            try:
                layer.merge(names, requantize)
            except BaseException as error:
                for changed, merged, requantized in done:
                    changed.unmerge()
                    changed.merge(merged, requantized)
                if isinstance(error, NonFiniteError):
                    raise NonFiniteError(f"{path}: {error}") from None
                raise
            done.append((layer, *before))

    def _require_merged_among(self, names: Sequence[str], problem: str) -> None:
        left = [name for name in self.merged_adapters if name not in names]
        if left:
            raise ConfigError(f"adapters {', '.join(left)} {problem}: call unmerge_adapter() first")

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
        tied: str | None = None,
    ) -> Any:
        """The plain model, with the dW of adapters added to its weights: see `merge_adapter`.

        Merged are the named adapters, active or not, and those that are merged already. A quantised
        layer becomes dense, unless `requantize`. An embedding or a head that was trained as a copy
        (`modules_to_save`) has its own weight afterwards; with tied="share" both have the copy's.
        (`progressbar` is PEFT's and has no effect.)
        """
        names = [*self.merged_adapters, *self._known_or_active(adapter_names)]
        for layer in self._wrappers().values():
            layer.result(names)  # raises if two of them cannot be active at once
        shared = copy_to_share(self.model, names) if tied == "share" else None
        self._merge(names, requantize, tied)
        if shared is not None:
            module, copied = shared
            module.weight = copied.weight
        return self._unwrap(names)

    def unload(self) -> Any:
        """The base as it was, without adapters."""
        self.unmerge_adapter()
        for layer in self.changed_layers.values():
            layer.restore_base()
        return self._unwrap([])

    def _unwrap(self, names: Sequence[str]) -> Any:
        for path, layer in self._wrappers().items():
            replace_module(self.model, path, layer.result(names))
        embedding, head = embedding_and_head(self.model)
        config = getattr(self.model, "config", None)
        tied = embedding and head and getattr(config, "tie_word_embeddings", False)
        if tied and head.weight is not embedding.weight:
            self.model.config = dataclasses.replace(self.model.config, tie_word_embeddings=False)
        for parameter in self.model.parameters():
            parameter.requires_grad = not parameter.fixed
        self.peft_config = {}
        self._plans = {}
        self.active_adapters = []
        self._is_enabled = True
        return self.model

    # ---- files -----------------------------------------------------------------------------------

    def state_dict(self, adapter_name: str = "default") -> dict[str, np.ndarray]:
        """The tensors of one adapter's file, by key."""
        tensors = {}
        for key, parameter in self.adapter_parameters(adapter_name).items():
            tensors[key] = to_file_layout(model_type_of(self.model), key, parameter.numpy())
        plan = self._plans[adapter_name]
        with self._unmerged():
            copies = repeated(plan, adapter_name, tensors.get, self._read_base)
        return {**tensors, **copies}

    def load_state_dict(  # type: ignore[override]
        self, state: Mapping[str, Any], adapter_name: str = "default", strict: bool = True
    ) -> LoadedState:
        """Copy tensors, as `state_dict` of an equal adapter returns them, into this adapter.

        ConfigError, before anything changes, lists missing and unexpected keys and other shapes.
        """
        self._require_known([adapter_name])
        kind = model_type_of(self.model)
        repeats = self.state_dict(adapter_name).keys() - self.adapter_parameters(adapter_name)
        values = {
            key: to_file_layout(kind, key, np.asarray(value))
            for key, value in state.items()
            if key not in repeats
        }
        parameters = self.adapter_parameters(adapter_name)
        return load_parameters(parameters, values, strict, f"adapter {adapter_name!r}")

    def save_pretrained(
        self,
        directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        as_trained: bool = False,
    ) -> None:
        """Write PEFT's files: the adapter "default" to `directory`, any other to a folder in it.

        An adapter whose start changed the base is written as plain LoRA of twice the rank for the
        base as it was. With `as_trained` it is written as in PEFT: A and B, and in the folder
        `initial` A0 and B0. With loftq only A and B can be written, because the difference of its
        base from W is not of low rank.
        """
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._require_known(names)
        folders = {name: adapter_folder(directory, name) for name in names}
        for name, folder in folders.items():
            write_started(self, name, folder, as_trained)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        directory: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        initial: str | Path | None = None,
        base_is: str | None = None,
    ) -> PeftModel:
        """`model` with the adapter in `directory`. Frozen and in eval mode unless `is_trainable`.

        See `load_adapter` for initial and base_is.

        An adapter for another base raises one FormatError that lists every mismatch, and leaves
        `model` as it was.
        """
        adapted = cls.__new__(cls)  # without the new adapter that __init__ would add
        adapted._wrap_model(model)
        adapted.load_adapter(directory, adapter_name, is_trainable, initial, base_is)
        adapted.set_adapter(adapter_name, inference_mode=not is_trainable)
        return adapted.train(is_trainable)  # type: ignore[no-any-return]

    def load_adapter(
        self,
        directory: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        initial: str | Path | None = None,
        base_is: str | None = None,
    ) -> None:
        """Add the adapter in `directory`, inactive until `set_adapter`; biases change at once.

        is_trainable   whether its parameters require a gradient from now on
        initial        for an adapter whose start changed the base: the folder of the adapter as
                       saved before training (by default `initial` in its folder)
        base_is        "residual" if the model's weights are those of the changed base

        An adapter of the same name is replaced, with a warning; the new one is active and
        trainable if the old one was. An adapter whose start changed the base is read as plain LoRA
        for the base as it was; if it is trainable, training goes on over the changed base. An
        adapter for another base raises one FormatError that lists every mismatch. If its file has
        an embedding and a head for another vocabulary, the base is resized to it: new rows are the
        file's, and stay when the adapter is unloaded.
        """
        with AdapterFile(
            directory,
            check=False,
            initial=initial,
            base_is=base_is,
            over_base=True,
            to_train=is_trainable,
        ) as file:
            self._check_name(adapter_name, file.config, replaces=True)
            is_taken = adapter_name in self.peft_config
            if is_taken:
                self._require_unmerged(adapter_name)
            self._check_use(file, is_trainable)
            file.config = dataclasses.replace(file.config, inference_mode=not is_trainable)
            with self._unmerged():
                plan = fit(file, describe_model(self.model), self._read_base)
                try:
                    check_wrapped(self.model, plan)
                    check_resizable(self.model, plan)
                except ConfigError as error:
                    raise FormatError(f"{file.where}: {error}") from error
                # All are read before the model changes: one may be damaged, or too large for the
                # dtype.
                dtype = np.result_type(*{p.dtype for p in self.model.parameters()})
                keys = [key for key in plan.shapes() if key in file.file]
                arrays = {key: file.file.read(key, dtype) for key in keys}
                layer_starts = read_starts(self.model, plan, file)
                if plan.vocabulary:
                    resize_vocabulary(self.model, plan)
                    plan = plan._replace(vocabulary={}, resized=True)
                if is_taken:
                    warnings.warn(f"adapter {adapter_name!r} is replaced", stacklevel=2)
                    replaced = self.adapter_parameters(adapter_name).values()
                    is_trainable |= any(parameter.requires_grad for parameter in replaced)
                    self._take_out(adapter_name)
                self._inject(adapter_name, plan, seed=0)
                self._put_starts(adapter_name, layer_starts)
        parameters = self.adapter_parameters(adapter_name)
        for key, array in arrays.items():
            parameter = parameters[key]
            array = to_file_layout(model_type_of(self.model), key, array)
            parameter.data = parameter.backend.from_numpy(array.astype(parameter.dtype, copy=False))
        self.set_requires_grad(adapter_name, is_trainable)

    def _check_use(self, file: AdapterFile, is_trainable: bool) -> None:
        """ConfigError or FormatError if this model cannot use a file's adapter, or train it."""
        if file.start and (is_trainable or not file.is_low_rank):
            self._require_alone(f"{file.where} has a start that changed the base")
        if file.start:
            self._require_weights(file)
        if is_trainable and file.config.extra.get("init_lora_weights") == "mica":
            file.note(f"{file.where}: peft trains A alone after 'mica'; here B is trained, too")
        if is_trainable and isinstance(file.config, MapConfig):
            file.config.require_trainable(file.where)

    def _require_weights(self, file: AdapterFile) -> None:
        """FormatError for a quantized base, from which the first values cannot be computed."""
        for path, module in modules_inside(self.model).items():
            if isinstance(module, QuantizedLinear):
                raise FormatError(
                    f"{file.where}: init_lora_weights={file.start!r:.40} needs the base's weights, "
                    f"and {path} is in codes: make the adapter plain first (minilora convert --to "
                    "plain), or load the base without quantising it"
                )

    def _read_base(self, name: str) -> np.ndarray:
        """A tensor of the base by its name, as it is in the base's files."""
        path, _, attribute = name.rpartition(".")
        parameter = getattr(modules_inside(self.model)[path], attribute)
        return to_file_layout(model_type_of(self.model), name, parameter.numpy())


def adapter_folder(directory: str | Path, name: str) -> Path:
    """The folder of an adapter that is saved to `directory`; "default" has `directory` itself.

    ConfigError for a name that no folder inside `directory` can have.
    """
    has_unpaired = name.encode(errors="ignore").decode() != name
    is_long = len(name.encode(errors="ignore")) > MAX_FOLDER_NAME
    is_path = name in ("", ".", "..") or any(char in name for char in "/\\\0")
    if has_unpaired or is_path or is_long:
        raise ConfigError(
            f"adapter {name!r:.99} cannot be saved: a folder gets its name, which must be without "
            "slashes, backslashes, zero bytes and unpaired surrogates, and of at most "
            f"{MAX_FOLDER_NAME} bytes; choose another name"
        )
    return Path(directory) if name == "default" else Path(directory) / name
