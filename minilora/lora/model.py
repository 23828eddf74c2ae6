"""A model with adapters: add them, switch, merge, count, save, load.

`get_peft_model` puts adapters into the model that it is given, as PEFT does; `unload` and
`merge_and_unload` take them out again. Every change is planned and checked before the first layer
is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import Tensor
from ..backend import mix_key
from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import write_adapter
from ..formats.checkpoint import to_file_layout
from ..nn import Module, Parameter, replace_module
from .combining import add_weighted_adapter
from .config import LoraConfig
from .embedding import HeadAdapter, LoraEmbedding
from .files import AdapterFile, fit, repeated
from .layer import LoraLinear, SavedModule, Wrapper, use_adapters
from .names import PREFIX, adapter_class, file_key, peft_name
from .plan import Plan, check_wrapped, describe_model, modules_inside, plan_adapter, wrappers
from .tokens import TokenRows, TrainableTokens
from .tying import embedding_and_head, prepare_tie, unwrap


def get_peft_model(
    model: Any, config: LoraConfig, adapter_name: str = "default", seed: int = 0
) -> PeftModel:
    """Freeze `model`, put the adapter that `config` describes into it, and return it wrapped.

    model   offers `get_input_embeddings()`, `get_output_embeddings()`, `named_modules()` and
            `config`, a dataclass with `model_type` and `tie_word_embeddings`
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
        self.set_adapter(adapter_name)

    def _wrap_model(self, model: Any) -> None:
        if not isinstance(model, Module):
            raise ConfigError(f"expected a model to put an adapter into, got {model!r:.99}")
        if isinstance(model, PeftModel) or any(wrappers(model)):
            raise ConfigError(
                "the model has adapters already: use add_adapter or load_adapter, "
                "or unload it first"
            )
        self.model: Any = model
        self.peft_config: dict[str, LoraConfig] = {}
        self._plans: dict[str, Plan] = {}
        self.active_adapters: list[str] = []

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return self.model(*inputs, **options)  # type: ignore[no-any-return]

    def get_base_model(self) -> Any:
        """The model inside, adapters and all."""
        return self.model

    config = property(lambda self: self.model.config)
    active_adapter = property(lambda self: self.active_adapters[0])

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) under PEFT's names."""
        for path, parameter in self.model.named_parameters():
            yield peft_name(path, self.peft_config), parameter

    def _wrappers(self) -> dict[str, Wrapper]:
        return dict(wrappers(self.model))

    # ---- adding ----------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: LoraConfig, seed: int = 0) -> None:
        """Add another adapter; it stays inactive until `set_adapter`."""
        self._check_name(adapter_name, config)
        plan = plan_adapter(describe_model(self.model), config)
        check_wrapped(self.model, plan)
        self._inject(adapter_name, plan, seed)

    def _check_name(self, adapter_name: str, config: LoraConfig) -> None:
        """ConfigError if an adapter of this name and configuration cannot join the others."""
        if not isinstance(config, LoraConfig):
            raise ConfigError(f"expected a LoraConfig, got {config!r:.99}")
        # Keys are searched for "lora_", and "" is a part of any text.
        is_text = isinstance(adapter_name, str) and adapter_name not in "lora_"
        if not is_text or any(c in adapter_name for c in "./\\\0"):
            raise ConfigError(
                f"{adapter_name!r:.99} cannot name an adapter: "
                "choose a text without dots or slashes that 'lora_' does not contain"
            )
        if adapter_name in self.peft_config:
            raise ConfigError(
                f"an adapter {adapter_name!r} exists already; "
                f"choose a name other than {', '.join(self.peft_config)}"
            )
        biased = [name for name, other in self.peft_config.items() if other.bias != "none"]
        if biased and config.bias != "none":
            raise ConfigError(
                f"adapter {biased[0]!r} trains the base's biases already: "
                "a second one needs bias='none'"
            )

    def _inject(self, adapter_name: str, plan: Plan, seed: int) -> None:
        inject(self.model, adapter_name, plan, seed)
        self.peft_config[adapter_name] = plan.config
        self._plans[adapter_name] = plan
        for parameter in self.adapter_parameters(adapter_name).values():
            parameter.requires_grad = False  # until set_adapter makes it the active one

    add_weighted_adapter = add_weighted_adapter

    # ---- switching -------------------------------------------------------------------------------

    def set_adapter(
        self, adapter_name: str | Sequence[str], inference_mode: bool | None = None
    ) -> None:
        """Make these adapters the active ones. Only they require a gradient.

        With `inference_mode` they require none either; None means the value in each adapter's
        configuration, which is True for one that was loaded to be used.
        """
        names = list_names(adapter_name)
        self._require_known(names)
        layers = self._wrappers().values()
        for layer in layers:
            layer.result(names)  # raises if two of them cannot be active at once
            if layer.merged and {*layer.merged} != {*names} & {*layer.entries}:
                raise ConfigError(
                    f"adapters {', '.join(layer.merged)} are merged: unmerge_adapter first"
                )
        self._train_only(names, inference_mode)
        for layer in layers:
            layer.active = tuple(names)

    def _train_only(self, names: list[str], inference_mode: bool | None) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for name in names:
            frozen = inference_mode
            if frozen is None:
                frozen = self.peft_config[name].inference_mode
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad = not frozen
        self.active_adapters = names

    def adapter_parameters(self, adapter_name: str) -> dict[str, Parameter]:
        """The parameters of one adapter by their keys in its file.

        They are its factors, copied modules, and biases if it trains them.
        """
        parameters = self._biases(adapter_name)
        for name, parameter in self.named_parameters():
            key = file_key(name, adapter_name)
            if key != name:
                parameters[key] = parameter
        return parameters

    def _biases(self, adapter_name: str) -> dict[str, Parameter]:
        """The base's biases that this adapter trains, by their keys in its file."""
        mode = self.peft_config[adapter_name].bias
        biases: dict[str, Parameter] = {}
        if mode == "none":
            return biases
        layers = self._wrappers().items()
        adapted = {p for p, m in layers if isinstance(m, LoraLinear) and adapter_name in m.adapters}
        for path, parameter in self.model.named_parameters():
            if not path.endswith(".bias") or ".modules_to_save." in path:
                continue
            owner = path.removesuffix(".bias").removesuffix(".base_layer")
            owner = owner.replace(".original_module", "")
            if owner in adapted:
                biases[f"{PREFIX}{owner}.base_layer.bias"] = parameter
            elif mode == "all":
                biases[f"{PREFIX}{owner}.bias"] = parameter
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
        layers = self._wrappers().values()
        merged = [(layer, layer.merged, layer.requantized) for layer in layers if layer.merged]
        with use_adapters(layers, None):
            try:
                self.unmerge_adapter()
                yield
            finally:
                for layer, names, requantized in merged:
                    layer.merge(names, requantized)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others takes its place."""
        self._require_known([adapter_name])
        if any(layer.merged for layer in self._wrappers().values()):
            raise ConfigError(
                f"adapter {adapter_name!r} cannot be deleted while any is merged: "
                "unmerge_adapter first"
            )
        if len(self.peft_config) == 1:
            raise ConfigError(
                f"{adapter_name!r} is the only adapter: call unload() to restore the base"
            )
        del self.peft_config[adapter_name]
        del self._plans[adapter_name]
        for path, layer in self._wrappers().items():
            layer.entries.pop(adapter_name, None)
            if not layer.entries:
                replace_module(self.model, path, layer.inner)
        if adapter_name in self.active_adapters:
            others = [name for name in self.active_adapters if name != adapter_name]
            self.set_adapter(others or next(iter(self.peft_config)))

    def _require_known(self, names: Sequence[str]) -> None:
        known = list(self.peft_config)
        unknown = [name for name in names if name not in known]  # also one that cannot be hashed
        if unknown or not names:
            shown = ", ".join(map(repr, unknown)) or "(none named)"
            raise ConfigError(f"no adapter {shown}; choose from {', '.join(known)}")

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
        """Put adapters (the active ones) into the base's weights; see `LoraLinear.merge`.

        All layers or none: NonFiniteError names the layer. (PEFT checks only if `safe_merge`; here
        that makes no difference.) If an adapter changes an embedding or a head, but not both, and
        they share one weight, `tied` must be given: "untie" gives each its own weight, and the
        output stays; "share" changes both, as PEFT does, and so the output.
        """
        names = self._known_or_active(adapter_names)
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

    def unmerge_adapter(self) -> None:
        """Take every merged adapter out again; the base comes back bit for bit."""
        for layer in self._wrappers().values():
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

        A quantised layer becomes dense, unless `requantize`. See `merge_adapter`. (`progressbar` is
        PEFT's; merging is quick and shows none.)
        """
        names = self._known_or_active(adapter_names)
        for layer in self._wrappers().values():
            layer.result(names)  # raises if two of them cannot be active at once
        self.merge_adapter(names, safe_merge, requantize, tied)
        return self._unwrap(names)

    def unload(self) -> Any:
        """Take the adapters out and return the base as it was."""
        self.unmerge_adapter()
        return self._unwrap([])

    def _unwrap(self, names: Sequence[str]) -> Any:
        for path, layer in self._wrappers().items():
            replace_module(self.model, path, layer.result(names))
        embedding, head = embedding_and_head(self.model)
        if self.model.config.tie_word_embeddings and head.weight is not embedding.weight:
            self.model.config = dataclasses.replace(self.model.config, tie_word_embeddings=False)
        for parameter in self.model.parameters():
            parameter.requires_grad = not parameter.fixed
        self.peft_config = {}
        self._plans = {}
        self.active_adapters = []
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

    def explain(self, tokens: int) -> str:
        """How a step over `tokens` positions computes each layer, one line per layer.

        A line also says how many operations each of the two ways would add.
        """
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
            tensors[key] = to_file_layout(self.config.model_type, key, parameter.numpy())
        plan = self._plans[adapter_name]
        return {**tensors, **repeated(plan, adapter_name, tensors.get, self._read_base)}

    def save_pretrained(
        self, directory: str | Path, selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write PEFT's files: the adapter "default" to `directory`, any other to a folder in it."""
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._require_known(names)
        for name in names:
            folder = adapter_folder(directory, name)
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
        made.set_adapter(adapter_name)
        return made.train(is_trainable)  # type: ignore[no-any-return]

    def load_adapter(
        self, directory: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Add the adapter in `directory`, inactive until `set_adapter`; biases change at once.

        An adapter for another base raises one FormatError that lists every mismatch.
        """
        with AdapterFile(directory, check=False) as file:
            self._check_name(adapter_name, file.config)
            file.config = dataclasses.replace(file.config, inference_mode=not is_trainable)
            plan = fit(file, describe_model(self.model), self._read_base)
            try:
                check_wrapped(self.model, plan)
            except ConfigError as error:
                raise FormatError(f"{file.where}: {error}") from error
            # All are read before the model changes: one may be damaged, or too large for the dtype.
            dtype = np.result_type(*{p.dtype for p in self.model.parameters()})
            arrays = {key: file.file.read(key, dtype) for key in plan.shapes()}
        self._inject(adapter_name, plan, seed=0)
        parameters = self.adapter_parameters(adapter_name)
        for key, array in arrays.items():
            parameter = parameters[key]
            array = to_file_layout(self.config.model_type, key, array)
            parameter.data = parameter.backend.from_numpy(array.astype(parameter.dtype, copy=False))

    def _read_base(self, name: str) -> np.ndarray:
        """A tensor of the base by its name, as it is in the base's files."""
        modules = modules_inside(self.model)
        path, _, inside = name.rpartition(".")
        while path not in modules:  # inside a module that is saved whole
            path, _, last = path.rpartition(".")
            inside = f"{last}.{inside}"
        parameter: Any = modules[path]
        for part in inside.split("."):
            parameter = parameter[int(part)] if part.isdecimal() else getattr(parameter, part)
        return to_file_layout(self.config.model_type, name, parameter.numpy())


def adapter_folder(directory: str | Path, name: str) -> Path:
    """The folder of an adapter that is saved to `directory`; "default" has `directory` itself."""
    return Path(directory) if name == "default" else Path(directory) / name


def list_names(names: str | Sequence[str]) -> list[str]:
    """One name, or several, each once, as a list."""
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


# ---- from a plan to modules ----------------------------------------------------------------------


def inject(model: Module, adapter_name: str, plan: Plan, seed: int) -> None:
    """Put the adapter that `plan` describes into `model`, active nowhere yet.

    First values depend on `seed` and on the layer's name, and on nothing else.
    """
    head, embedding = plan.follows or ("", "")
    for path, described in plan.targets.items():
        layer = _wrap(model, path, LoraEmbedding if described.kind == "embedding" else LoraLinear)
        place = zlib.crc32(path.encode())
        stream = mix_key(place, zlib.crc32(adapter_name.encode()))
        base = layer.as_linear(unwrap(layer))
        if path == head:  # after its embedding: see Plan
            source = _module_at(model, embedding)
            of_embedding = source.adapters[adapter_name]
            adapter: Any = HeadAdapter(of_embedding, plan.config.lora_dropout, stream)
            layer.follow(source)
        else:
            rng = np.random.default_rng([seed, place])
            kind = adapter_class(plan.config, described.kind)
            adapter = kind(base, path, plan.config, rng, stream)
        layer.adapters[adapter_name] = adapter.train(base.training)
    for path in plan.saved:
        _wrap(model, path, SavedModule).add(adapter_name)
    if head in plan.saved:
        copies = [_module_at(model, path).entries[adapter_name] for path in (head, embedding)]
        copies[0].weight = copies[1].weight
    for path, rows in plan.tokens.items():
        tokens = _wrap(model, path, TrainableTokens)
        tokens.adapters[adapter_name] = TokenRows(unwrap(tokens).weight, rows)
        if path == embedding:
            _wrap(model, head, TrainableTokens, tokens.adapters).follow(tokens)


def _module_at(model: Module, path: str) -> Any:
    return dict(model.named_modules())[path]


def _wrap(model: Module, path: str, kind: Any, *details: Any) -> Any:
    """The wrapper of this kind at `path`; a new one if it has none yet."""
    module = _module_at(model, path)
    if not isinstance(module, kind):
        module = kind(module, *details)
        replace_module(model, path, module)
    return module
