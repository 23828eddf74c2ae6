"""A model with adapters: add them, switch, merge, count, save, load.

`get_peft_model` puts adapters into the model that it is given, as PEFT does; `unload` and
`merge_and_unload` take them out again. Every change is planned and checked before the first layer
is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import Tensor
from ..backend import Backend
from ..display import render_adapted_model
from ..errors import ConfigError, FormatError, NonFiniteError, is_integer
from ..formats import write_adapter
from ..formats.checkpoint import to_file_layout
from ..modules import LoadedState, load_parameters
from ..nn import Module, Parameter, replace_module
from .combining import add_weighted_adapter
from .config import LoraConfig
from .files import AdapterFile, fit
from .injecting import inject
from .layer import LoraLinear, Wrapper, use_adapters
from .names import PREFIX, EntryParameter, entry_parameters
from .plan import Plan, check_wrapped, describe_model, modules_inside, plan_adapter, wrappers
from .repeats import repeated
from .status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from .tying import copy_to_share, embedding_and_head, model_type_of, prepare_tie
from .vocabulary import check_resizable, resize_vocabulary

MAX_FOLDER_NAME = 255  # in bytes: the limit of most file systems


def get_peft_model(
    model: Any, config: LoraConfig, adapter_name: str = "default", seed: int = 0
) -> PeftModel:
    """Freeze `model`, put the adapter that `config` describes into it, and return it wrapped.

    model   any Module. A language model also offers `get_input_embeddings()`,
            `get_output_embeddings()` and `config`, a dataclass with `model_type` and
            `tie_word_embeddings`; only options about these ends ask for that
    seed    of the adapter's first values; they depend on it and on the layer's name, and on nothing
            else
    """
    return PeftModel(model, config, adapter_name, seed)


class PeftModel(Module):
    """A model with adapters, by name.

    The active ones add up; only their parameters require a gradient.
    """

    def __init__(
        self, model: Any, config: LoraConfig, adapter_name: str = "default", seed: int = 0
    ):
        self._wrap_model(model)
        self.add_adapter(adapter_name, config, seed)
        self.set_adapter(adapter_name, config.inference_mode)

    def _wrap_model(self, model: Any) -> None:
        if not isinstance(model, Module):
            raise ConfigError(
                f"expected a model to put an adapter into, got {model!r:.99}: "
                "give a Module, such as CausalLM.from_pretrained(...) or Sequential(...)"
            )
        if isinstance(model, PeftModel) or any(wrappers(model)):
            raise ConfigError(
                "the model has adapters already: use add_adapter or load_adapter, "
                "or unload it first"
            )
        if next(model.named_children(), None) is None:
            raise ConfigError(
                f"{type(model).__name__} has no modules inside, and adapters go into these by "
                "name: give Sequential(model), whose first module has the name '0'"
            )
        self.model: Any = model
        self.peft_config: dict[str, LoraConfig] = {}
        self._plans: dict[str, Plan] = {}
        self.active_adapters: list[str] = []
        self._is_enabled = True

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return self.model(*inputs, **options)  # type: ignore[no-any-return]

    def _repr_html_(self) -> str:
        return render_adapted_model(self)

    def get_base_model(self) -> Any:
        """The model inside, adapters and all."""
        return self.model

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """What the model inside generates with the active adapters: see `CausalLM.generate`."""
        kind = type(self.model)
        if not hasattr(kind, "generate"):
            raise ConfigError(f"{kind.__name__} generates no text: it has no method generate()")
        return kind.generate(self, *inputs, **options)

    @property
    def base_model(self) -> PeftModel:
        """This object: PEFT has the same methods on two, `model` and `model.base_model`."""
        return self

    @property
    def active_adapter(self) -> str | None:
        """The first of the active adapters; None if none is active."""
        return next(iter(self.active_adapters), None)

    config = property(lambda self: self.model.config)
    device = property(lambda self: self.model.device)
    dtype = property(lambda self: self.model.dtype)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) under PEFT's names."""
        names = {id(entry.parameter): entry.name for entry in self._entry_parameters()}
        for path, parameter in self.model.named_parameters():
            yield names.get(id(parameter), PREFIX + path), parameter

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, as `named_parameters` has them, without the time that names take."""
        return self.model.parameters()  # type: ignore[no-any-return]

    def to(self, device: str | Backend | None = None, dtype: Any = None) -> Any:
        """As `Module.to`; what is merged is merged again, into the base as it is then."""
        with self._unmerged():
            return super().to(device, dtype)

    def _wrappers(self) -> dict[str, Wrapper]:
        return dict(wrappers(self.model))

    def _entry_parameters(self) -> Iterator[EntryParameter]:
        return entry_parameters(wrappers(self.model))

    # ---- adding ----------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: LoraConfig, seed: int = 0) -> None:
        """Add another adapter; it stays inactive and frozen until `set_adapter`."""
        self._check_name(adapter_name, config)
        with self._unmerged():
            plan = plan_adapter(describe_model(self.model), config)
            check_wrapped(self.model, plan)
            self._inject(adapter_name, plan, seed)

    def _check_name(self, adapter_name: str, config: LoraConfig, replaces: bool = False) -> None:
        """ConfigError if an adapter of this name and configuration cannot join the others.

        replaces   may it take the place of one that has its name?
        """
        if not isinstance(config, LoraConfig):
            raise ConfigError(f"expected a LoraConfig, got {config!r:.99}")
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ConfigError(
                f"{adapter_name!r:.99} cannot name an adapter: choose a text without dots "
                "that is not empty"
            )
        if adapter_name in self.peft_config and not replaces:
            raise ConfigError(
                f"an adapter {adapter_name!r} exists already; "
                f"choose a name other than {', '.join(self.peft_config)}"
            )
        others = {name: c for name, c in self.peft_config.items() if name != adapter_name}
        biased = [name for name, other in others.items() if other.bias != "none"]
        if biased and config.bias != "none":
            raise ConfigError(
                f"adapter {biased[0]!r} trains the base's biases already: "
                "a second one needs bias='none'"
            )

    def _inject(self, adapter_name: str, plan: Plan, seed: int) -> None:
        inject(self.model, adapter_name, plan, seed)
        self.peft_config[adapter_name] = plan.config
        self._plans[adapter_name] = plan
        self.set_requires_grad(adapter_name, False)  # until set_adapter makes it the active one
        for layer in self._wrappers().values():  # some of them may be new
            layer.active = tuple(self.active_adapters)
            layer.enabled = self._is_enabled

    add_weighted_adapter = add_weighted_adapter

    # ---- switching -------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones. Only they require a gradient.

        With `inference_mode` they require none either. Adapters that are merged, and not among
        them, are taken out of the base's weights first, with a warning.
        """
        names = list_names(adapter_name)
        self._require_known(names)
        layers = self._wrappers().values()
        for layer in layers:
            layer.result(names)  # raises if two of them cannot be active at once
        merged = [name for name in self.merged_adapters if name not in names]
        if merged:
            warnings.warn(f"unmerged, to be inactive: {', '.join(merged)}", stacklevel=2)
            self.unmerge_adapter()
        self._train_only(names, inference_mode)
        for layer in layers:
            layer.active = tuple(names)

    def _train_only(self, names: list[str], inference_mode: bool) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for name in names:
            self.set_requires_grad(name, not inference_mode)
        self.active_adapters = names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Train these adapters, or freeze them; which ones are active stays as it is."""
        names = list_names(adapter_names)
        self._require_known(names)
        for name in names:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad = requires_grad

    def adapter_parameters(self, adapter_name: str) -> dict[str, Parameter]:
        """The parameters of one adapter by their keys in its file.

        They are its factors, copied modules, and biases if it trains them.
        """
        parameters = self._biases(adapter_name)
        for entry in self._entry_parameters():
            if entry.adapter_name == adapter_name:
                parameters[entry.key] = entry.parameter
        return parameters

    def _biases(self, adapter_name: str) -> dict[str, Parameter]:
        """The base's biases that this adapter trains, by their keys in its file."""
        plan = self._plans[adapter_name]
        mode = plan.config.bias
        biases: dict[str, Parameter] = {}
        if mode == "none":
            return biases
        for path, module in modules_inside(self.model).items():
            bias = vars(module).get("bias")
            if not isinstance(bias, Parameter):
                continue
            if path in plan.targets:
                biases[f"{PREFIX}{path}.base_layer.bias"] = bias
            elif mode == "all":
                biases[f"{PREFIX}{path}.bias"] = bias
        return biases

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit (but for trained biases).

        Merged adapters are taken out, and put in again at the end.
        """
        if any(self.peft_config[n].bias != "none" for n in self.active_adapters):
            warnings.warn(
                "the adapter trained the base's biases: disabling it does not bring them back",
                stacklevel=3,
            )
        with use_adapters(self._wrappers().values(), None), self._unmerged():
            yield

    def disable_adapter_layers(self) -> None:
        """Run the base alone, and train nothing, until `enable_adapter_layers`.

        Merged adapters are taken out of the base's weights, and stay beside them afterwards.
        """
        self.unmerge_adapter()
        self._enable(False)
        for name in self.peft_config:
            self.set_requires_grad(name, False)

    def enable_adapter_layers(self) -> None:
        """Run the active adapters again, and train them."""
        self._enable(True)
        if self.active_adapters:
            self.set_adapter(self.active_adapters)

    def _enable(self, enabled: bool) -> None:
        self._is_enabled = enabled
        for layer in self._wrappers().values():
            layer.enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others takes its place.

        Without any adapter the model is its base. It gets a new one by `add_adapter` or
        `load_adapter`, and `set_adapter`.
        """
        self._require_known([adapter_name])
        self._require_unmerged(adapter_name)
        self._take_out(adapter_name)
        if adapter_name in self.active_adapters:
            others = [name for name in self.active_adapters if name != adapter_name]
            others = others or list(self.peft_config)[:1]
            if others:
                self.set_adapter(others)
            else:
                self._train_only([], inference_mode=True)

    def _require_unmerged(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ConfigError(
                f"adapter {adapter_name!r} is merged: call unmerge_adapter() before it is deleted "
                "or replaced"
            )

    def _take_out(self, adapter_name: str) -> None:
        del self.peft_config[adapter_name]
        del self._plans[adapter_name]
        for path, layer in self._wrappers().items():
            layer.entries.pop(adapter_name, None)
            if not layer.entries:
                replace_module(self.model, path, layer.inner)

    def _require_known(self, names: Sequence[str]) -> None:
        known = list(self.peft_config)
        unknown = [name for name in names if name not in known]  # also one that cannot be hashed
        if unknown or not names:
            shown = ", ".join(map(repr, unknown)) or "(none named)"
            choice = f"choose from {', '.join(known)}"
            if not known:
                choice = "the model has none: add_adapter or load_adapter comes first"
            raise ConfigError(f"no adapter {shown}; {choice}")

    def _known_or_active(self, names: Sequence[str] | None) -> list[str]:
        chosen = list(self.active_adapters if names is None else names)
        self._require_known(chosen)
        return chosen

    # ---- merging ---------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,
        requantize: bool = False,
        tied: str | None = None,
    ) -> None:
        """Put active adapters (all of them) into the base's weights; see `LoraLinear.merge`.

        Merging never changes what the model computes, but for rounding: before and after, it is

            base + the sum of dW of the active adapters

        with the merged ones in the weights and the others beside them. So an adapter that is not
        active is refused, because merging it would activate it: ConfigError. (In PEFT an inactive
        adapter that is merged takes effect, and the active ones that are not merged lose theirs.)
        Where a sum has no meaning (DoRA beside another adapter of a layer) it was refused already
        by `set_adapter`. Merged adapters cannot be trained: GraphError in a backward pass.

        All layers or none: NonFiniteError names the layer. (PEFT checks only if `safe_merge`; here
        that makes no difference.) If an adapter changes an embedding or a head, but not both, and
        they share one weight, `tied` must be given: "untie" gives each its own weight, and the
        output stays; "share" changes both, as PEFT does, and so the output.
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

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged in any layer."""
        merged: dict[str, None] = {}
        for layer in self._wrappers().values():
            merged |= dict.fromkeys(layer.merged)
        return list(merged)

    def _require_merged_among(self, names: Sequence[str], problem: str) -> None:
        left = [name for name in self.merged_adapters if name not in names]
        if left:
            raise ConfigError(f"adapters {', '.join(left)} {problem}: call unmerge_adapter() first")

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Inside, nothing is merged; then the same is merged again, to the same bits."""
        layers = self._wrappers().values()
        merged = [(layer, layer.merged, layer.requantized) for layer in layers if layer.merged]
        try:
            self.unmerge_adapter()
            yield
        finally:
            for layer, names, requantized in merged:
                layer.merge(names, requantized)

    def unmerge_adapter(self) -> None:
        """Take every merged adapter out again; the base comes back bit for bit."""
        for layer in self._wrappers().values():
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
        tied: str | None = None,
    ) -> Any:
        """Merge, take the adapters out, and return the plain model.

        The adapters are the named ones, active or not, and those that are merged already. A
        quantised layer becomes dense, unless `requantize`. See `merge_adapter`. An embedding or a
        head that was trained as a copy (`modules_to_save`) has its own weight afterwards, or with
        tied="share" both have it. (`progressbar` is PEFT's; merging is quick and shows none.)
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
        """Take the adapters out and return the base as it was."""
        self.unmerge_adapter()
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

    # ---- counting --------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all), each parameter counted once."""
        trainable = total = 0
        for parameter in self.model.parameters():
            total += parameter.size
            if parameter.requires_grad:
                trainable += parameter.size
        return trainable, total

    def get_layer_status(self) -> list[LayerStatus]:
        """What each layer with adapters has: see `status.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """The same of the whole model: see `status.get_model_status`."""
        return get_model_status(self)

    def explain(self, tokens: int) -> str:
        """How a step over `tokens` positions computes each layer, one line per layer.

        A line also says how many operations each of the two ways would add.
        """
        if not is_integer(least=1)(tokens):
            got = f"shape {tokens.shape}" if hasattr(tokens, "shape") else f"{tokens!r:.99}"
            raise ConfigError(
                f"explain takes the number of positions in a step, got {got}: give ids.size"
            )
        lines = []
        for path, layer in self._wrappers().items():
            if isinstance(layer, LoraLinear) and layer.running:
                way = "W + dW" if layer.merges(tokens) else "W, then A and B"
                merged, apart = layer.count_operations(tokens)
                lines.append(
                    f"{path}: {way}   (W + dW once {merged:,} operations, "
                    f"A and B at each position {apart:,})"
                )
        return "\n".join(lines)

    def print_trainable_parameters(self) -> None:
        """trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"""
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percent:.4f}"
        )

    # ---- files -----------------------------------------------------------------------------------

    def state_dict(self, adapter_name: str = "default") -> dict[str, np.ndarray]:
        """The tensors in one adapter's file, by key."""
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
        """Copy what `state_dict` of an equal adapter returned into this one.

        ConfigError, before anything changes, lists what is missing, unexpected or of another shape.
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
        self, directory: str | Path, selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write PEFT's files: the adapter "default" to `directory`, any other to a folder in it."""
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._require_known(names)
        folders = {name: adapter_folder(directory, name) for name in names}
        for name, folder in folders.items():
            write_adapter(folder, self.peft_config[name].to_dict(), self.state_dict(name))

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        directory: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> PeftModel:
        """`model` with the adapter in `directory`. Frozen and in eval mode unless `is_trainable`.

        An adapter for another base raises one FormatError that lists every mismatch, and leaves
        `model` as it was.
        """
        made = cls.__new__(cls)  # without the fresh adapter that __init__ would put in
        made._wrap_model(model)
        made.load_adapter(directory, adapter_name, is_trainable)
        made.set_adapter(adapter_name, inference_mode=not is_trainable)
        return made.train(is_trainable)  # type: ignore[no-any-return]

    def load_adapter(
        self, directory: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Add the adapter in `directory`, inactive until `set_adapter`; biases change at once.

        It requires a gradient from now on if `is_trainable`. An adapter of the same name is
        replaced, with a warning: the new one is active, and requires a gradient, if that one was.
        An adapter for another base raises one FormatError that lists every mismatch. If its file
        has an embedding and a head for another vocabulary, the base gets the same: their new rows
        are the file's, and stay when the adapter is unloaded.
        """
        with AdapterFile(directory, check=False) as file:
            self._check_name(adapter_name, file.config, replaces=True)
            is_taken = adapter_name in self.peft_config
            if is_taken:
                self._require_unmerged(adapter_name)
            if is_trainable and file.config.extra.get("init_lora_weights") == "mica":
                file.note(f"{file.where}: peft trains A alone after 'mica'; here B is trained, too")
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
                if plan.vocabulary:
                    resize_vocabulary(self.model, plan)
                    plan = plan._replace(vocabulary={}, resized=True)
                if is_taken:
                    warnings.warn(f"adapter {adapter_name!r} is replaced", stacklevel=2)
                    replaced = self.adapter_parameters(adapter_name).values()
                    is_trainable |= any(parameter.requires_grad for parameter in replaced)
                    self._take_out(adapter_name)
                self._inject(adapter_name, plan, seed=0)
        parameters = self.adapter_parameters(adapter_name)
        for key, array in arrays.items():
            parameter = parameters[key]
            array = to_file_layout(model_type_of(self.model), key, array)
            parameter.data = parameter.backend.from_numpy(array.astype(parameter.dtype, copy=False))
        self.set_requires_grad(adapter_name, is_trainable)

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


def list_names(names: str | Sequence[str]) -> list[str]:
    """One name, or several, each once, as a list."""
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))
