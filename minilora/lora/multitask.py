"""Several tasks over one frozen base, in one batch: a task is a few adapters by name.

    sequences   tasks      each of them runs
    x_1         prose      W + s_0 B_0 A_0 + s_p B_p A_p       A_0, B_0: shared by all tasks
    x_2         code       W + s_0 B_0 A_0 + s_c B_c A_c       A_t, B_t: of one task, of any rank
    x_3         prose      W + s_0 B_0 A_0 + s_p B_p A_p
    x_4         __base__   W

Sequences never attend to each other, so a mixed batch is one batch per task: rows are grouped by
task, each group runs with its adapters, and rows return to their places (as S-LoRA batches
requests: Sheng et al. 2023, section 4.1). Forward and backward are those of a single task, whatever
its adapters are: of unequal ranks, DoRA, with a copied head (`modules_to_save`). An adapter that no
row of a batch runs gets no gradient at all.

The forms in use are all this one mechanism:

    one for all tasks   get_multitask_model(base, {"prose": None, "code": None}, shared=config)
    one for each task   get_multitask_model(base, {"prose": config, "code": another})
    both, added up      get_multitask_model(base, {"prose": config, "code": another}, shared=config)

`ShardedStep.gradients` trains on batches with `tasks`, and weights them;
`generate(model, ids, n, tasks=...)` writes.
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
from .adapted import list_names
from .config import LoraConfig
from .dora import DoraAdapter
from .embedding import LoraEmbedding
from .factors import cat
from .hydra import HydraAdapter
from .layer import LoraLinear, use_adapters
from .model import PeftModel, adapter_folder
from .names import LINEAR, PREFIX
from .targets.plan import wrappers
from .tokens import TrainableTokens

BASE = "__base__"  # the task of rows that run no adapter: PEFT's word
SHARED = "shared"  # the adapter of all tasks
FILE = "multitask.json"

# The models that run for one task, in this thread and in the threads that it hands shards to.
_inside_task = contextvars.ContextVar[frozenset[Any]]("inside_task", default=frozenset())


def get_multitask_model(
    model: Any,
    tasks: Mapping[str, LoraConfig | None],
    shared: LoraConfig | None = None,
    seed: int = 0,
) -> MultiTask:
    """Freeze `model`, put an adapter into it for each of `tasks`, and return it wrapped.

    tasks    by name: the configuration of the task's adapter, which has the task's name; None if it
             has only the shared one
    shared   the configuration of an adapter that every task runs too; its name is "shared"
    seed     as of `get_peft_model`; an adapter's first values also depend on its name

    ConfigError, with `model` as it was, for no task, invalid names, and adapters that cannot run
    together.
    """
    return MultiTask(model, tasks, shared, seed)


class MultiTask(PeftModel):
    """A model with several tasks. Each row runs the adapters of its task; all of them train.

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
        if shared is not None and SHARED in tasks:
            raise ConfigError(f"{SHARED!r} is the adapter of all tasks: a task needs another name")
        configs = dict(tasks) if shared is None else {SHARED: shared, **tasks}
        with _all_or_nothing(model):
            for name, config in configs.items():
                if config is not None:
                    place = zlib.crc32(str(name).encode(errors="surrogatepass"))
                    self.add_adapter(name, config, mix_key(seed, place))
            for task in tasks:
                names = [name for name in (SHARED, task) if configs.get(name) is not None]
                self.declare(task, names)
            self._require_tasks()
            self.set_adapter(list(self.peft_config))

    # ---- tasks and their adapters ----------------------------------------------------------------

    def declare(self, task: str, adapters: Sequence[str]) -> None:
        """Add a task that runs these adapters. ConfigError if they cannot run together."""
        if not isinstance(task, str) or not task or task == BASE or task in self.tasks:
            raise ConfigError(
                f"{task!r:.99} cannot name a task: choose a new name other than {BASE!r}"
            )
        if not adapters:
            raise ConfigError(
                f"task {task!r:.99} has no adapter: give it one, or all of them a shared one"
            )
        self._require_known(adapters)
        for path, layer in self._wrappers().items():
            try:
                layer.result(adapters)
            except ConfigError as error:
                raise ConfigError(f"task {task!r:.99}, {path}: {error}") from None
        self.tasks[task] = tuple(dict.fromkeys(adapters))

    def adapters_of(self, task: str) -> tuple[str, ...]:
        """The adapters that a task runs; none for "__base__". ConfigError for an unknown task."""
        if task == BASE:
            return ()
        if task not in self.tasks:
            raise ConfigError(f"no task {task!r:.99}; choose from {', '.join([*self.tasks, BASE])}")
        return self.tasks[task]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the ones that train and that a run saves; `task` says which run."""
        names = list_names(adapter_name)
        self._require_known(names)
        self._train_only(names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that no task runs: `del model.tasks[task]` comes first."""
        users = [task for task, names in self.tasks.items() if adapter_name in names]
        if users:
            raise ConfigError(
                f"adapter {adapter_name!r:.99} is run by task {', '.join(users)}: delete that first"
            )
        super().delete_adapter(adapter_name)

    def _check_name(self, adapter_name: str, config: LoraConfig, replaces: bool = False) -> None:
        super()._check_name(adapter_name, config, replaces)
        if config.bias != "none":
            raise ConfigError(
                f"adapter {adapter_name!r:.99}: bias must be 'none', because all tasks share the "
                "base's biases"
            )

    # ---- running ---------------------------------------------------------------------------------

    def __call__(
        self, ids: Any, *inputs: Any, tasks: str | Sequence[str] | None = None, **options: Any
    ) -> Tensor:
        """The outputs of the model inside, each row run as its task.

        tasks   a name for each row of the first axis, or one for all of them; "__base__" runs no
                adapter. Not needed inside `task` or `disable_adapter`

        With several tasks every argument is an array of as many rows, or None. If the outputs have
        rows, they come back in the order of the inputs; a scalar, such as the sum of the losses
        with `targets`, is added up.
        """
        if tasks is None:
            if self not in _inside_task.get():
                raise ConfigError(
                    "tasks is required: pass tasks=... or use `with model.task(...)`; "
                    f"{_choices(self)}"
                )
            return super().__call__(ids, *inputs, **options)
        groups = self.rows_of(tasks, len(ids))
        outputs = []
        for task, rows in groups.items():
            with self.task(task):
                if len(groups) == 1:
                    return super().__call__(ids, *inputs, **options)
                arguments = [_take_rows(value, rows) for value in (ids, *inputs)]
                named = {name: _take_rows(value, rows) for name, value in options.items()}
                outputs.append(super().__call__(*arguments, **named))
        if outputs[0].ndim:
            return interleave(outputs, list(groups.values()))
        return sum(outputs[1:], start=outputs[0])

    @contextlib.contextmanager
    def task(self, task: str) -> Iterator[None]:
        """Inside, the model runs this task, in this thread and in those that it hands shards to."""
        layers = self._wrappers()
        names = self.adapters_of(task)
        self._require_merged_among(names, f"are merged, and task {task!r:.99} runs without them")
        token = _inside_task.set(_inside_task.get() | {self})
        try:
            with use_adapters(layers.values(), names):
                yield
        finally:
            _inside_task.reset(token)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit, whatever tasks are named."""
        with super().disable_adapter(), self.task(BASE):
            yield

    def rows_of(self, tasks: str | Sequence[str], count: int) -> dict[str, np.ndarray]:
        """The indices of each task's rows. ConfigError unless `tasks` names a task for each row."""
        names = [tasks] * count if isinstance(tasks, str) else list(tasks)
        if len(names) != count or not count:
            raise ConfigError(
                f"{len(names)} tasks were named for {count} rows: "
                "expected one for each, or one for all"
            )
        for name in dict.fromkeys(names):
            self.adapters_of(name)
        return rows_by_task(names)

    # ---- one task by itself ----------------------------------------------------------------------

    def merge_task(self, task: str, requantize: bool = False, tied: str | None = None) -> Any:
        """A plain model: a copy of the base with this task's adapters merged.

        ConfigError if one cannot be merged.
        `merge_and_unload(adapter_names=model.adapters_of(task))` needs no copy, and leaves no other
        task.
        """
        names = self.adapters_of(task)
        backends = {id(p.backend): p.backend for p in self.model.parameters()}
        twin = copy.deepcopy(self, backends)  # the twin's backends are these
        twin.unmerge_adapter()
        if not names:
            return twin.unload()
        return twin.merge_and_unload(False, True, names, requantize, tied)

    def _known_or_active(self, names: Sequence[str] | None) -> list[str]:
        """As in `PeftModel`, but None is an error: all tasks' adapters together mean nothing."""
        if names is None:
            raise ConfigError(
                "adapter_names is required: pass adapter_names=model.adapters_of(task); "
                f"{_choices(self)}"
            )
        return super()._known_or_active(names)

    def _require_active(self, names: Sequence[str]) -> None:
        """Nothing: a task says what is active, and one without a merged adapter is refused."""

    def _unwrap(self, names: Sequence[str]) -> Any:
        self.tasks = {}
        return super()._unwrap(names)

    def task_adapter(self, task: str) -> tuple[LoraConfig, dict[str, np.ndarray]]:
        """This task as one adapter of PEFT's: its configuration, and its file's tensors by key.

        A task with one adapter is that adapter. Several become one LoRA of their ranks' sum, since
        with any s

            s [B_0 s_0/s, B_t s_t/s] [A_0; A_t] = s_0 B_0 A_0 + s_t B_t A_t

        s is the first one's, so that its numbers stay as they are. Dropout is left out: the
        adapters had different masks. ConfigError for "__base__", for HydraLoRA, which PEFT cannot
        read, and for DoRA or an adapted embedding beside another adapter.
        """
        names = self.adapters_of(task)
        if not names:
            raise ConfigError(f"{task} runs no adapter: export another task")
        self._require_exportable(names)
        if len(names) == 1:
            return self.peft_config[names[0]], self.state_dict(names[0])
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        tensors: dict[str, np.ndarray] = {}
        for path, layer in self._wrappers().items():
            if not isinstance(layer, LoraLinear):
                continue
            adapters = [layer.adapters[name] for name in names if name in layer.adapters]
            adapters = [adapter for adapter in adapters if adapter.r]  # AdaLoRA may leave rank 0
            if not adapters:
                continue
            s = adapters[0].scaling or 1.0
            dtype = adapters[0].lora_A.dtype
            parts = [adapter.part() for adapter in adapters]
            A, B = cat([part._replace(c=part.c / s) for part in parts])
            tensors[f"{PREFIX}{path}.{LINEAR['A']}"] = A.astype(dtype)
            tensors[f"{PREFIX}{path}.{LINEAR['B']}"] = B.astype(dtype)
            ranks[path] = len(A)
            alphas[path] = s * len(A)
        saved = []
        for name in names:
            modules = self.peft_config[name].modules_to_save
            if modules:
                saved += modules
                plan = self._plans[name]
                tensors_of_name = self.state_dict(name)
                for path in plan.saved:
                    for key, _ in plan.base.below(path):
                        tensors[PREFIX + key] = tensors_of_name[PREFIX + key]
        r, rank_pattern = _split_common(ranks)
        lora_alpha, alpha_pattern = _split_common(alphas)
        first = self.peft_config[names[0]]
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            target_modules=list(ranks),
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            modules_to_save=saved or None,
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
        )
        return config, tensors

    def _require_exportable(self, names: Sequence[str]) -> None:
        """ConfigError if these adapters, which run together, cannot be one adapter of PEFT's."""
        for layer in self._wrappers().values():
            for name in names:
                adapter = layer.entries.get(name)
                if isinstance(adapter, HydraAdapter):
                    raise ConfigError(
                        f"adapter {name!r} is HydraLoRA's: a mixture is not one LoRA, "
                        "and PEFT cannot read it"
                    )
                if adapter is None or len(names) == 1:
                    continue
                if isinstance(layer, (LoraEmbedding, TrainableTokens)):
                    raise ConfigError(
                        f"{', '.join(names)} adapt an embedding, where two cannot be put together "
                        "as one LoRA"
                    )
                if isinstance(adapter, DoraAdapter):
                    raise ConfigError(
                        f"adapter {name!r} is DoRA's: beside {', '.join(names)} it is not a part "
                        "of one LoRA"
                    )

    def export(self, task: str, directory: str | Path) -> None:
        """Write `task_adapter` as PEFT's folder, for PEFT and for `PeftModel.from_pretrained`."""
        config, tensors = self.task_adapter(task)
        write_adapter(directory, config.to_dict(), tensors)

    # ---- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        as_trained: bool = False,
    ) -> None:
        """Write each adapter's folder as PEFT does; without a selection also multitask.json."""
        super().save_pretrained(directory, selected_adapters, as_trained)
        if selected_adapters is None:
            tasks = {task: list(names) for task, names in self.tasks.items()}
            write_json(Path(directory) / FILE, {"tasks": tasks})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: Any, directory: str | Path, *, is_trainable: bool = False
    ) -> MultiTask:
        """`model` with all the tasks that `save_pretrained` wrote.

        Frozen and in eval mode unless `is_trainable`. FormatError for what is damaged or does not
        fit, with `model` as it was.
        """
        file = Path(directory) / FILE
        tasks = read_json(file).get("tasks")
        if not isinstance(tasks, dict) or not all(map(_is_list_of_names, tasks.values())):
            raise FormatError(
                f"{str(file)!r}: expected tasks, and for each of them the names of its adapters"
            )
        made = cls.__new__(cls)
        made.tasks = {}
        made._wrap_model(model)
        with _all_or_nothing(model):
            try:
                for name in dict.fromkeys(name for names in tasks.values() for name in names):
                    made._check_name(name, LoraConfig())  # before it is part of a path
                    folder = adapter_folder(directory, name)
                    if not os.path.isdir(folder):  # a name may be too long for Path.is_dir
                        raise FormatError(
                            f"{str(file)!r}: the folder of the adapter {name!r:.99} is missing"
                        )
                    made.load_adapter(folder, name, is_trainable)
                for task, names in tasks.items():
                    made.declare(task, names)
                made._require_tasks()
            except ConfigError as error:
                raise FormatError(f"{str(file)!r}: {error}") from error
            made.set_adapter(list(made.peft_config), inference_mode=not is_trainable)
        return made.train(is_trainable)  # type: ignore[no-any-return]

    def _require_tasks(self) -> None:
        if not self.tasks:
            raise ConfigError("expected at least one task, got none")


def _split_common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent of some layers' values, and a pattern with the other layers' values."""
    common = collections.Counter(values.values()).most_common(1)[0][0]
    return common, {path: value for path, value in values.items() if value != common}


# ---- rows in their places again ------------------------------------------------------------------


def interleave(parts: Sequence[Tensor], rows: Sequence[np.ndarray]) -> Tensor:
    """y (B, ...) with y[rows[i]] = parts[i].

    parts (B_i, ...), rows (B_i,), which contain each of the B = sum B_i indices once
    """
    xp = namespace(*parts)
    at = [parts[0].backend.from_numpy(group) for group in rows]
    y = xp.empty((sum(map(len, rows)), *parts[0].shape[1:]), parts[0].dtype)
    for part, group in zip(parts, at, strict=True):
        y[group] = part.data
    return record(y, tuple(parts), lambda dy: tuple(dy[group] for group in at))


def _take_rows(value: Any, rows: np.ndarray) -> Any:
    """Those rows of an argument."""
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[rows]
    if not getattr(value, "ndim", 0):
        raise ConfigError(
            "rows of several tasks take arrays with as many rows, "
            f"got {type(value).__name__}: run each task by itself"
        )
    return value[backend_of(value).from_numpy(rows)]


def _choices(model: MultiTask) -> str:
    return f"choose from {', '.join(model.tasks)}"


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


@contextlib.contextmanager
def _all_or_nothing(model: Any) -> Iterator[None]:
    """If anything raises inside, `model` is left without adapters."""
    try:
        yield
    except BaseException:
        for path, layer in list(wrappers(model)):
            replace_module(model, path, layer.inner)
        raise
