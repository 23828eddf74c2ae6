"""From a model and a configuration to a model with adapters, and back: put in, freeze, switch, merge, save, load.

`get_peft_model` puts adapters into the model that it is given, as PEFT does; `unload` and `merge_and_unload` take
them out again. Every change is planned and checked whole before the first layer is touched.
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
from .files import AdapterFile, fit
from .layer import LoraLinear, SavedModule, Wrapper, use_adapters
from .names import file_key, peft_name, repeated
from .plan import (
    PREFIX,
    Plan,
    adapter_class,
    check_wrapped,
    describe_model,
    modules_inside,
    plan_adapter,
    wrappers,
)
from .tokens import TokenRows, TrainableTokens
from .tying import prepare_tie, unwrap


def get_peft_model(
    model: Any, config: LoraConfig, adapter_name: str = "default", seed: int = 0
) -> PeftModel:
    """Freeze `model`, put the adapter that `config` describes into it, and return it wrapped.

    model   offers `get_input_embeddings()`, `get_output_embeddings()`, `named_modules()` and `config`, a dataclass with
            `model_type` and `tie_word_embeddings`
    seed    of the adapter's first values; they depend on it and on the layer's name, and on nothing else
    """
    return PeftModel(model, config, adapter_name, seed)


class PeftModel(Module):
    """A model with adapters, by name. The active ones add up; only their parameters require a gradient."""

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
                "the model has adapters already: use add_adapter or load_adapter, or unload it first"
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

    # ---- adding -----------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: LoraConfig, seed: int = 0) -> None:
        """Add another adapter; it stays inactive until `set_adapter`."""
        self._check_name(adapter_name, config)
        plan = plan_adapter(describe_model(self.model), config)
        check_wrapped(self.model, plan)
        self._inject(adapter_name, plan, seed)

    def _check_name(self, adapter_name: str, config: LoraConfig) -> None:
        """ConfigError if an adapter of this name and configuration cannot join those that are here."""
        if not isinstance(config, LoraConfig) or not isinstance(adapter_name, str):
            raise ConfigError(
                f"expected a LoraConfig and a name, got {config!r:.99} and {adapter_name!r:.99}"
            )
        if adapter_name in self.peft_config:
            raise ConfigError(
                f"there is an adapter {adapter_name!r} already: {', '.join(self.peft_config)}"
            )
        if adapter_name in "lora_" or any(
            c in adapter_name for c in "./\\\0"
        ):  # "" is a part of any text
            raise ConfigError(
                f"{adapter_name!r:.99} cannot name an adapter: no dot, no slash, no part of 'lora_'"
            )
        biased = [n for n, c in self.peft_config.items() if c.bias != "none"]
        if biased and config.bias != "none":
            raise ConfigError(
                f"adapter {biased[0]!r} trains the base's biases already: a second one needs bias='none'"
            )

    def _inject(self, adapter_name: str, plan: Plan, seed: int) -> None:
        inject(self.model, adapter_name, plan, seed)
        self.peft_config[adapter_name], self._plans[adapter_name] = plan.config, plan
        for parameter in self.adapter_parameters(adapter_name).values():
            parameter.requires_grad = False  # until set_adapter makes it the active one

    add_weighted_adapter = add_weighted_adapter  # several, added up to another

    # ---- switching --------------------------------------------------------------------------------------------------

    def set_adapter(
        self, adapter_name: str | Sequence[str], inference_mode: bool | None = None
    ) -> None:
        """Make these adapters the active ones. Only they require a gradient, and not if `inference_mode`.

        `inference_mode` None means what each adapter's configuration says: True for one that was loaded to be used.
        """
        names = (
            [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        )
        self._known(names)
        for layer in self._wrappers().values():
            layer.result(names)  # raises where two of them cannot be active at once
            if layer.merged and set(layer.merged) != {n for n in names if n in layer.held}:
                raise ConfigError(
                    f"adapters {', '.join(layer.merged)} are merged: unmerge_adapter first"
                )
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for layer in self._wrappers().values():
            layer.active = tuple(names)
        for name in names:
            frozen = (
                self.peft_config[name].inference_mode if inference_mode is None else inference_mode
            )
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad = not frozen
        self.active_adapters = names

    def adapter_parameters(self, adapter_name: str) -> dict[str, Parameter]:
        """One adapter's parameters by their keys in its file: factors, copied modules, biases if it trains them."""
        keys = ((file_key(name, adapter_name), name, p) for name, p in self.named_parameters())
        return {**self._biases(adapter_name), **{key: p for key, name, p in keys if key != name}}

    def _biases(self, adapter_name: str) -> dict[str, Parameter]:
        """The base's biases that this adapter trains, by their keys in its file, whatever other adapters there are."""
        mode = self.peft_config[adapter_name].bias
        layers = {
            p
            for p, m in self._wrappers().items()
            if isinstance(m, LoraLinear) and adapter_name in m.held
        }
        found = {}
        for path, parameter in self.model.named_parameters():
            owner = (
                path.removesuffix(".bias")
                .removesuffix(".base_layer")
                .replace(".original_module", "")
            )
            wanted = mode == "all" or (mode == "lora_only" and owner in layers)
            if path.endswith(".bias") and wanted and ".modules_to_save." not in path:
                found[PREFIX + owner + (".base_layer.bias" if owner in layers else ".bias")] = (
                    parameter
                )
        return found

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit (but for trained biases); merged adapters are out meanwhile."""
        if any(self.peft_config[n].bias != "none" for n in self.active_adapters):
            warnings.warn(
                "the adapter trained the base's biases: disabling it does not bring them back",
                stacklevel=3,
            )
        merged = [
            (layer, layer.merged, layer.requantized)
            for layer in self._wrappers().values()
            if layer.merged
        ]
        with use_adapters(self._wrappers().values(), None):
            try:
                for layer, *_ in merged:
                    layer.unmerge()
                yield
            finally:
                for layer, names, requantized in merged:
                    layer.merge(names, requantized)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others takes its place."""
        self._known([adapter_name])
        if any(layer.merged for layer in self._wrappers().values()):
            raise ConfigError(
                f"adapter {adapter_name!r} cannot be deleted while any is merged: unmerge_adapter first"
            )
        if len(self.peft_config) == 1:
            raise ConfigError(f"{adapter_name!r} is the only adapter: unload() gives the base back")
        del self.peft_config[adapter_name], self._plans[adapter_name]
        for path, layer in self._wrappers().items():
            layer.held.pop(adapter_name, None)
            if not layer.held:
                replace_module(self.model, path, layer.inner)
        if adapter_name in self.active_adapters:
            self.set_adapter(
                [n for n in self.active_adapters if n != adapter_name]
                or [next(iter(self.peft_config))]
            )

    def _known(self, names: Sequence[str]) -> None:
        unknown = [n for n in names if n not in list(self.peft_config)]  # whatever it is
        if unknown or not names:
            shown = ", ".join(map(repr, unknown)) or "(none named)"
            raise ConfigError(f"no adapter {shown}; there is {', '.join(self.peft_config)}")

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, requantize: bool = False,
        tied: str | None = None,
    ) -> None:  # fmt: skip
        """Put adapters (the active ones) into the base's weights; see `LoraLinear.merge`.

        All layers or none: NonFiniteError names the layer. (PEFT checks only if `safe_merge`; here it always is.)
        Where an adapter changes an embedding or a head, but not both, and they have one weight, `tied` has to say what
        is meant: "untie" gives them two, and the output stays; "share" changes both, as PEFT does, and the output.
        """
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
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
                raise (
                    NonFiniteError(f"{path}: {error}")
                    if isinstance(error, NonFiniteError)
                    else error
                ) from None
            done.append((layer, *before))

    def unmerge_adapter(self) -> None:
        """Take every merged adapter out again; the base comes back bit for bit."""
        for layer in self._wrappers().values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None,
        requantize: bool = False, tied: str | None = None,
    ) -> Any:  # fmt: skip
        """Merge, take the adapters out, and return the plain model. (`progressbar` is PEFT's: merging is quick.)

        A quantised layer becomes dense, unless `requantize`. See `merge_adapter`.
        """
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        for layer in self._wrappers().values():
            layer.result(names)  # raises where two of them cannot be active at once
        self.merge_adapter(names, safe_merge, requantize, tied)
        return self._unwrap(names)

    def unload(self) -> Any:
        """Take the adapters out and return the base as it was."""
        self.unmerge_adapter()
        return self._unwrap([])

    def _unwrap(self, names: Sequence[str]) -> Any:
        for path, layer in self._wrappers().items():
            replace_module(self.model, path, layer.result(names))
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if self.model.config.tie_word_embeddings and head.weight is not embedding.weight:
            self.model.config = dataclasses.replace(self.model.config, tie_word_embeddings=False)
        for parameter in self.model.parameters():
            parameter.requires_grad = not parameter.fixed
        self.peft_config, self._plans, self.active_adapters = {}, {}, []
        return self.model

    # ---- counting ---------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all), each parameter counted once."""
        sizes = [(p.size, p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def explain(self, tokens: int) -> str:
        """A line a layer: how a step over `tokens` positions computes it, and the operations either way would add."""
        lines = []
        for path, layer in self._wrappers().items():
            if isinstance(layer, LoraLinear) and layer.running:
                way, (merged, apart) = (
                    ("W + dW" if layer.merges(tokens) else "W, then A and B"),
                    layer.costs(tokens),
                )
                lines.append(
                    f"{path}: {way}   (W + dW once {merged:,} operations, A and B at each position {apart:,})"
                )
        return "\n".join(lines)

    def print_trainable_parameters(self) -> None:
        """trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        )

    # ---- files ------------------------------------------------------------------------------------------------------

    def state_dict(self, adapter_name: str = "default") -> dict[str, np.ndarray]:
        """What one adapter's file holds, by its keys there."""
        kind, own = self.config.model_type, self.adapter_parameters(adapter_name)
        tensors = {
            key: to_file_layout(kind, key, parameter.numpy()) for key, parameter in own.items()
        }
        return {
            **tensors,
            **repeated(self._plans[adapter_name], adapter_name, tensors, self._read_base),
        }

    def save_pretrained(
        self, directory: str | Path, selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write PEFT's files: the adapter "default" into `directory`, any other into a folder of its name there."""
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._known(names)
        for name in names:
            where = Path(directory) if name == "default" else Path(directory) / name
            write_adapter(where, self.peft_config[name].to_dict(), self.state_dict(name))

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        directory: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> PeftModel:
        """`model` with the adapter that a folder holds. Frozen and in eval mode unless `is_trainable`.

        An adapter for another base raises one FormatError that lists every mismatch, and leaves `model` as it was.
        """
        made = cls.__new__(cls)  # without the fresh adapter that __init__ would put in
        made._wrap_model(model)
        made.load_adapter(directory, adapter_name, is_trainable)
        made.set_adapter(adapter_name)
        return made.train(is_trainable)  # type: ignore[no-any-return]

    def load_adapter(
        self, directory: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Add the adapter that a folder holds, inactive until `set_adapter`; trained biases change at once.

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
            self._inject(adapter_name, plan, seed=0)
            own = self.adapter_parameters(adapter_name)
            for key in plan.shapes():
                array = to_file_layout(self.config.model_type, key, file.file.read(key))
                own[key].data = own[key].backend.from_numpy(array.astype(own[key].dtype))

    def _read_base(self, name: str) -> np.ndarray:
        """A tensor of the base by its name, as the base's files hold it."""
        modules = modules_inside(self.model)
        path, _, inside = name.rpartition(".")
        while path not in modules:  # inside a module that is saved whole
            path, _, last = path.rpartition(".")
            inside = f"{last}.{inside}"
        parameter: Any = modules[path]
        for part in inside.split("."):
            parameter = parameter[int(part)] if part.isdecimal() else getattr(parameter, part)
        return to_file_layout(self.config.model_type, name, parameter.numpy())


def inject(model: Module, adapter_name: str, plan: Plan, seed: int) -> None:
    """Put the adapter that `plan` describes into `model`, active nowhere yet.

    First values depend on `seed` and on the layer's name, and on nothing else.
    """
    head, embedding = plan.follows or ("", "")
    for path, described in plan.targets.items():
        is_embedding = described.kind == "embedding"
        layer = _wrap(model, path, LoraEmbedding if is_embedding else LoraLinear)
        place = zlib.crc32(path.encode())
        stream = mix_key(place, zlib.crc32(adapter_name.encode()))
        base = layer.as_linear(unwrap(layer))
        if path == head:  # after its embedding: see Plan
            source = _at(model, embedding)
            of_embedding = source.adapters[adapter_name]
            adapter: Any = HeadAdapter(of_embedding, plan.config.lora_dropout, stream)
            layer.follow(source)
        else:
            rng = np.random.default_rng([seed, place])
            kind = adapter_class(plan.config, described)
            adapter = kind(base, path, plan.config, rng, stream)
        layer.adapters[adapter_name] = adapter.train(base.training)
    for path in plan.saved:
        _wrap(model, path, SavedModule).add(adapter_name)
    if head in plan.saved:
        copies = [_at(model, path).held[adapter_name] for path in (head, embedding)]
        copies[0].weight = copies[1].weight
    for path, rows in plan.tokens.items():
        tokens = _wrap(model, path, TrainableTokens)
        tokens.adapters[adapter_name] = TokenRows(unwrap(tokens).weight, rows)
        if path == embedding:
            follower = _wrap(model, head, TrainableTokens, tokens.adapters)
            follower.follow(tokens)


def _at(model: Module, path: str) -> Any:
    return dict(model.named_modules())[path]


def _wrap(model: Module, path: str, kind: Any, *details: Any) -> Any:
    """The wrapper at `path`, put there if need be."""
    module = _at(model, path)
    if not isinstance(module, kind):
        module = kind(module, *details)
        replace_module(model, path, module)
    return module
