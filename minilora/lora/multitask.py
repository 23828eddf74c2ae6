"""Several tasks over one frozen base, in one batch: a task is a few adapters by name.

       sequences     their tasks        what each of them runs
           x_1         prose            W + s_0 B_0 A_0 + s_p B_p A_p       A_0, B_0: shared by all tasks
           x_2         code             W + s_0 B_0 A_0 + s_c B_c A_c       A_t, B_t: a task's own, of any rank
           x_3         prose            W + s_0 B_0 A_0 + s_p B_p A_p
           x_4         __base__         W

Sequences never look at each other, so a mixed batch is a batch a task: rows are taken apart by task, each group runs
with its own adapters, and rows go back to where they came from (as S-LoRA batches what it serves: Sheng et al. 2023,
section 4.1). Forward and backward are those of a single task, whatever its adapters are: of unequal ranks, DoRA, with a
head of its own (`modules_to_save`). What no row of a batch runs gets no gradient at all.

The forms in use are all this one mechanism:

    one adapter for all tasks        get_multitask_model(base, {"prose": None, "code": None}, shared=config)
    one for each                     get_multitask_model(base, {"prose": config, "code": another})
    both, added up                   get_multitask_model(base, {"prose": config, "code": another}, shared=config)

`ShardedStep.gradients` trains on batches with `tasks`, and weighs them; `generate(model, ids, n, tasks=...)` writes.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import Tensor, namespace, record
from ..backend import backend_of, mix_key
from ..data.batches import rows_by_task
from ..errors import ConfigError, FormatError
from ..formats import write_adapter
from ..formats.disk import read_json, write_json
from ..nn import replace_module
from .config import LoraConfig
from .dora import DoraAdapter
from .embedding import LoraEmbedding
from .factors import cat
from .hydra import HydraAdapter
from .layer import LoraLinear, use_adapters
from .model import PeftModel
from .plan import PREFIX, wrappers
from .tokens import TrainableTokens

BASE = "__base__"  # the task of rows that run no adapter: PEFT's word
SHARED = "shared"  # the adapter of all tasks
FILE = "multitask.json"

# The models that this thread, and the shards it hands to others, runs for one task.
_told: contextvars.ContextVar[frozenset[Any]] = contextvars.ContextVar("told", default=frozenset())


def get_multitask_model(
    model: Any,
    tasks: Mapping[str, LoraConfig | None],
    shared: LoraConfig | None = None,
    seed: int = 0,
) -> MultiTask:
    """Freeze `model`, put an adapter into it for each of `tasks`, and return it wrapped.

    tasks    by name: the configuration of its own adapter, which has the same name; None if it has only the shared one
    shared   the configuration of an adapter that every task runs besides; its name is "shared"
    seed     as of `get_peft_model`; an adapter's first values also depend on its name

    ConfigError, with `model` as it was: no task, a name that cannot be one, adapters that cannot run together.
    """
    return MultiTask(model, tasks, shared, seed)


class MultiTask(PeftModel):
    """A model with several tasks. Which adapters run is each row's task's affair; all of them train.

    tasks   by name: the adapters that a task runs. `declare` adds one
    """

    def __init__(
        self,
        model: Any,
        tasks: Mapping[str, LoraConfig | None],
        shared: LoraConfig | None = None,
        seed: int = 0,
    ):
        if not isinstance(tasks, Mapping):
            raise ConfigError(
                f"expected a dictionary from tasks to configurations, got {tasks!r:.99}"
            )
        self.tasks: dict[str, tuple[str, ...]] = {}
        self._wrap_model(model)
        own = {SHARED: shared, **tasks} if shared is not None else dict(tasks)
        if shared is not None and SHARED in tasks:
            raise ConfigError(f"{SHARED!r} is the adapter of all tasks: a task needs another name")
        with _all_or_nothing(model):
            for name, config in own.items():
                if config is not None:
                    self.add_adapter(name, config, mix_key(seed, zlib.crc32(str(name).encode())))
            for task in tasks:
                self.declare(task, [name for name in (SHARED, task) if own.get(name) is not None])
            self._require_tasks()
            self.set_adapter(list(self.peft_config))

    # ---- tasks and their adapters -----------------------------------------------------------------------------------

    def declare(self, task: str, adapters: Sequence[str]) -> None:
        """From now on there is this task, and it runs these adapters. ConfigError if they cannot run together."""
        if not isinstance(task, str) or not task or task == BASE or task in self.tasks:
            raise ConfigError(
                f"{task!r:.99} cannot name a task: expected a new name, and not {BASE!r}"
            )
        if not adapters:
            raise ConfigError(
                f"task {task!r:.99} has no adapter: give it one, or all of them a shared one"
            )
        self._known(adapters)
        for path, layer in self._wrappers().items():
            try:
                layer.result(adapters)
            except ConfigError as error:
                raise ConfigError(f"task {task!r:.99}, {path}: {error}") from None
        self.tasks[task] = tuple(dict.fromkeys(adapters))

    def adapters_of(self, task: str) -> tuple[str, ...]:
        """The adapters that a task runs; none for "__base__". ConfigError for a task that there is not."""
        if task == BASE:
            return ()
        if task not in self.tasks:
            raise ConfigError(f"no task {task!r:.99}; there is {', '.join([*self.tasks, BASE])}")
        return self.tasks[task]

    def set_adapter(
        self, adapter_name: str | Sequence[str], inference_mode: bool | None = None
    ) -> None:
        """Say which adapters train, and are saved by a run. Which ones run is not asked here: see `task`."""
        names = (
            [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        )
        self._known(names)
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for name in names:
            frozen = (
                self.peft_config[name].inference_mode if inference_mode is None else inference_mode
            )
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad = not frozen
        self.active_adapters = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that no task runs: `del model.tasks[task]` comes first."""
        users = [task for task, names in self.tasks.items() if adapter_name in names]
        if users:
            raise ConfigError(
                f"adapter {adapter_name!r:.99} is run by task {', '.join(users)}: delete that first"
            )
        super().delete_adapter(adapter_name)

    def _check_name(self, adapter_name: str, config: LoraConfig) -> None:
        if not isinstance(adapter_name, str):
            raise ConfigError(f"{adapter_name!r:.99} cannot name an adapter: expected a text")
        super()._check_name(adapter_name, config)
        if config.bias != "none":
            raise ConfigError(
                f"adapter {adapter_name!r:.99}: bias must be 'none': the base's biases are every task's"
            )

    # ---- running ----------------------------------------------------------------------------------------------------

    def __call__(
        self, ids: Any, *inputs: Any, tasks: str | Sequence[str] | None = None, **options: Any
    ) -> Tensor:
        """What the model inside gives, row by row as each row's task has it.

        tasks   a name for each row of the first axis, or one for all of them; "__base__" runs no adapter. Not needed
                inside `task` or `disable_adapter`

        With several tasks every argument is an array of as many rows, or None. Outputs of a row each come back in the
        order of the rows; a scalar, such as the sum of the losses with `targets`, is added up.
        """
        if tasks is None:
            if self not in _told.get():
                raise ConfigError(
                    f"whose rows are these? Say tasks=..., or `with model.task(...)`: {_names(self)}"
                )
            return super().__call__(ids, *inputs, **options)
        groups, outputs = self.rows_of(tasks, len(ids)), []
        for task, rows in groups.items():
            with self.task(task):
                if len(groups) == 1:
                    return super().__call__(ids, *inputs, **options)
                taken = {name: _taken(value, rows) for name, value in options.items()}
                outputs.append(
                    super().__call__(*(_taken(value, rows) for value in (ids, *inputs)), **taken)
                )
        return (
            interleave(outputs, list(groups.values()))
            if outputs[0].ndim
            else sum(outputs[1:], start=outputs[0])
        )

    @contextlib.contextmanager
    def task(self, task: str) -> Iterator[None]:
        """Inside, the model is this task's: in this thread and the shards it hands to others, not in one beside it."""
        layers, names = self._wrappers(), self.adapters_of(task)
        merged = next((layer.merged for layer in layers.values() if layer.merged), None)
        if merged:
            raise ConfigError(
                f"adapters {', '.join(merged)} are merged: unmerge_adapter first, or use merge_task"
            )
        token = _told.set(_told.get() | {self})
        try:
            with use_adapters(layers.values(), names):
                yield
        finally:
            _told.reset(token)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit, whatever tasks are named."""
        with super().disable_adapter(), self.task(BASE):
            yield

    def rows_of(self, tasks: str | Sequence[str], count: int) -> dict[str, np.ndarray]:
        """Which of `count` rows are each task's. ConfigError for another number of names, or a task there is not."""
        names = [tasks] * count if isinstance(tasks, str) else list(tasks)
        if len(names) != count or not count:
            raise ConfigError(
                f"{len(names)} tasks were named for {count} rows: expected one for each, or one for all"
            )
        for name in dict.fromkeys(names):
            self.adapters_of(name)
        return rows_by_task(names)

    # ---- one task by itself -----------------------------------------------------------------------------------------

    def merge_task(self, task: str, requantize: bool = False, tied: str | None = None) -> Any:
        """A plain model, this task's adapters merged into a copy of the base. ConfigError if one cannot be merged.

        `merge_and_unload(adapter_names=model.adapters_of(task))` needs no copy, and leaves no other task.
        """
        names = self.adapters_of(task)
        twin = copy.deepcopy(self, {id(p.backend): p.backend for p in self.model.parameters()})
        return (
            twin.merge_and_unload(False, True, names, requantize, tied) if names else twin.unload()
        )

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, requantize: bool = False,
        tied: str | None = None,
    ) -> None:  # fmt: skip
        """As in `PeftModel`, but adapters must be named: those of all tasks together mean nothing."""
        super().merge_adapter(self._named(adapter_names), safe_merge, requantize, tied)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None,
        requantize: bool = False, tied: str | None = None,
    ) -> Any:  # fmt: skip
        """As in `PeftModel`, but adapters must be named."""
        return super().merge_and_unload(
            progressbar, safe_merge, self._named(adapter_names), requantize, tied
        )

    def _unwrap(self, names: Sequence[str]) -> Any:
        self.tasks = {}
        return super()._unwrap(names)

    def _named(self, adapter_names: Sequence[str] | None) -> Sequence[str]:
        if adapter_names is None:
            raise ConfigError(
                f"which task's adapters? Say adapter_names=model.adapters_of(task): {_names(self)}"
            )
        return adapter_names

    def task_adapter(self, task: str) -> tuple[LoraConfig, dict[str, np.ndarray]]:
        """This task as one adapter of PEFT's: its configuration, and what its file holds by key.

        A task with one adapter is that adapter. Several become one LoRA of their ranks' sum, since with any s

            s [B_0 s_0/s, B_t s_t/s] [A_0; A_t] = s_0 B_0 A_0 + s_t B_t A_t

        s is the first one's, so that its numbers stay as they are. Dropout is left out: each had masks of its own.
        ConfigError for "__base__", HydraLoRA, which no PEFT adapter is, and DoRA beside another one, which is no LoRA.
        """
        names = self.adapters_of(task)
        if not names:
            raise ConfigError(f"{task} runs no adapter: there is nothing to export")
        layers = {path: m for path, m in self._wrappers().items() if isinstance(m, LoraLinear)}
        ends = [
            m for m in self._wrappers().values() if isinstance(m, (LoraEmbedding, TrainableTokens))
        ]
        if len(names) > 1 and any(name in end.held for end in ends for name in names):
            raise ConfigError(
                f"{', '.join(names)} adapt an embedding, where two cannot be put together as one LoRA"
            )
        for name in names:
            kinds = {
                type(layer.adapters[name]) for layer in layers.values() if name in layer.adapters
            }
            if HydraAdapter in kinds:
                raise ConfigError(
                    f"adapter {name!r} is HydraLoRA's: a mixture is no LoRA, and PEFT cannot read it"
                )
            if DoraAdapter in kinds and len(names) > 1:
                raise ConfigError(
                    f"adapter {name!r} is DoRA's: beside {', '.join(names)} it is no part of one LoRA"
                )
        if len(names) == 1:
            return self.peft_config[names[0]], self.state_dict(names[0])
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        tensors: dict[str, np.ndarray] = {}
        for path, layer in layers.items():
            there = [layer.adapters[name] for name in names if name in layer.adapters]
            there = [adapter for adapter in there if adapter.r]  # AdaLoRA may leave a layer nothing
            if there:
                s = there[0].scaling
                dtype = there[0].lora_A.dtype
                parts = [adapter.part() for adapter in there]
                A, B = cat([part._replace(c=part.c / s) for part in parts])
                A, B = A.astype(dtype), B.astype(dtype)
                tensors |= {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
                ranks[path], alphas[path] = len(A), s * len(A)
        configs = [self.peft_config[name] for name in names]
        saved = [module for config in configs for module in config.modules_to_save or []]
        for name, config in zip(names, configs, strict=True):
            if config.modules_to_save:
                own = self.state_dict(name)
                tensors |= {key: own[key] for key in own if ".lora_" not in key}
        r = collections.Counter(ranks.values()).most_common(1)[0][
            0
        ]  # what most layers have; patterns say the rest
        alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
        return LoraConfig(
            r=r,
            lora_alpha=alpha,
            target_modules=list(ranks),
            rank_pattern={path: n for path, n in ranks.items() if n != r},
            alpha_pattern={path: a for path, a in alphas.items() if a != alpha},
            modules_to_save=saved or None,
            task_type=configs[0].task_type,
            base_model_name_or_path=configs[0].base_model_name_or_path,
        ), tensors

    def export(self, task: str, directory: str | Path) -> None:
        """Write `task_adapter` as PEFT's folder. It is loaded by PEFT, or by `PeftModel.from_pretrained`."""
        config, tensors = self.task_adapter(task)
        write_adapter(directory, config.to_dict(), tensors)

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, directory: str | Path, selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write each adapter's folder as PEFT does, and, when it is all of them, multitask.json: who runs which."""
        super().save_pretrained(directory, selected_adapters)
        if selected_adapters is None:
            write_json(
                Path(directory) / FILE,
                {"tasks": {task: list(names) for task, names in self.tasks.items()}},
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: Any, directory: str | Path, *, is_trainable: bool = False
    ) -> MultiTask:
        """`model` with all the tasks that `save_pretrained` wrote. Frozen and in eval mode unless `is_trainable`.

        FormatError for what is damaged or does not fit, with `model` as it was.
        """
        where, made = Path(directory) / FILE, cls.__new__(cls)
        tasks = read_json(where).get("tasks")
        if not isinstance(tasks, dict) or not all(_is_names(names) for names in tasks.values()):
            raise FormatError(
                f"{str(where)!r}: expected tasks, and for each of them the names of its adapters"
            )
        made.tasks = {}
        made._wrap_model(model)
        with _all_or_nothing(model):
            try:
                for name in dict.fromkeys(name for names in tasks.values() for name in names):
                    made._check_name(name, LoraConfig())  # before it is part of a path
                    folder = Path(directory) if name == "default" else Path(directory) / name
                    if not os.path.isdir(folder):  # a name may be too long for Path.is_dir
                        raise FormatError(
                            f"{str(where)!r}: there is no folder of the adapter {name!r:.99}"
                        )
                    made.load_adapter(folder, name, is_trainable)
                for task, names in tasks.items():
                    made.declare(task, names)
                made._require_tasks()
            except ConfigError as error:
                raise FormatError(f"{str(where)!r}: {error}") from error
            made.set_adapter(list(made.peft_config))
        return made.train(is_trainable)  # type: ignore[no-any-return]

    def _require_tasks(self) -> None:
        if not self.tasks:
            raise ConfigError("there is no task: expected at least one")


# ---- rows back in their places --------------------------------------------------------------------------------------


def interleave(parts: Sequence[Tensor], rows: Sequence[np.ndarray]) -> Tensor:
    """y with y[rows[i]] = parts[i]    parts (B_i, ...), rows (B_i,): every one of B = sum B_i once -> (B, ...)"""
    xp, backend = namespace(*parts), parts[0].backend
    at = [backend.from_numpy(group) for group in rows]
    y = xp.empty((sum(map(len, rows)), *parts[0].shape[1:]), parts[0].dtype)
    for part, group in zip(parts, at, strict=True):
        y[group] = part.data
    return record(y, tuple(parts), lambda dy: tuple(dy[group] for group in at))


def _taken(value: Any, rows: np.ndarray) -> Any:
    """Those rows of an argument."""
    value = np.asarray(value) if isinstance(value, (list, tuple)) else value
    if value is None or isinstance(value, Tensor):
        return value if value is None else value[rows]
    if not getattr(value, "ndim", 0):
        what = type(value).__name__
        raise ConfigError(
            f"rows of several tasks take arrays with as many rows, got {what}: run each task by itself"
        )
    return value[backend_of(value).from_numpy(rows)]


def _names(model: MultiTask) -> str:
    return f"there is {', '.join(model.tasks)}"[:300]


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


@contextlib.contextmanager
def _all_or_nothing(model: Any) -> Iterator[None]:
    """If anything raises inside, no adapter is left in `model`."""
    try:
        yield
    except BaseException:
        for path, layer in list(wrappers(model)):
            replace_module(model, path, layer.inner)
        raise
