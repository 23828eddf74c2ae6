"""What a report is made from: the folders and texts of a run, or of a base and an adapter.

A file that a run's command names may be gone: the page leaves out what needs it, with the reason.
A file that is given for the report must be there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.tokenizer import Tokenizer
from ..errors import CheckpointError, ConfigError, DataError, MiniloraError, shorten
from ..formats import read_json
from ..formats.adapter import CONFIG_FILE
from ..lab.report.gathering import Sources
from ..lab.report.measuring import MeasuredText, choose_windows
from ..lab.report.subject import Subject
from ..lora import PeftModel
from ..lora.config import CHANGED
from ..lora.multitask import FILE as MULTITASK
from ..models.transformer import CausalLM
from ..precision import FLOAT32
from ..training.checkpoints import find_checkpoint
from ..training.settings import Settings
from .measuring import CONTEXT
from .options import Args, select_fields
from .reading import (
    Tokens,
    load_base,
    read_tokenizer,
    read_tokens,
    read_training_text,
    require_context,
)

MODEL_CONFIG = "config.json"


class Place(NamedTuple):
    """A file or folder, and whether the user gave it for the report; if not, a run names it."""

    path: str
    is_given: bool


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is read for a report; None where nothing says it.

    run       the folder of a run
    options   those of the command that made the run
    words     of that command
    adapter   the folder of the adapter
    trained   the folder of a model whose weights all trained
    context, limit, strict   how texts are measured
    missing   why something is not at hand, by what it is
    """

    run: Path | None
    options: Args | None
    words: Sequence[str]
    adapter: Path | None
    trained: Path | None
    base: Place | None
    data: Place | None
    also: Place | None
    context: int | None
    limit: int | None
    strict: bool
    missing: dict[str, str]


def inputs_of_adapter(given: Args) -> Inputs:
    """A base and an adapter that the user has given, and perhaps texts."""
    return Inputs(
        run=None,
        options=None,
        words=(),
        adapter=Path(given.adapter),
        trained=None,
        base=Place(given.base, True),
        data=None if given.data is None else Place(given.data, True),
        also=None if given.also is None else Place(given.also, True),
        context=given.context,
        limit=given.limit,
        strict=given.strict,
        missing={},
    )


def inputs_of_run(
    run: Path,
    options: Args | None,
    words: Sequence[str],
    missing: dict[str, str],
    given: Args | None = None,
) -> Inputs:
    """What a run's folder and its command name; what is `given` counts before that.

    ConfigError if the folder is not that of a run.
    """
    adapter, trained = _find_weights(run, missing)
    places: dict[str, Place | None] = {}
    for name, noted in (("base", "base"), ("data", "data"), ("also", "also_evaluate")):
        path = getattr(given, name, None)
        of_command = getattr(options, noted, None)
        if of_command is None and name == "base" and adapter is not None:
            of_command = read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
        places[name] = None
        if path is not None:
            places[name] = Place(path, True)
        elif isinstance(of_command, str) and of_command:
            places[name] = Place(of_command, False)
    return Inputs(
        run=run,
        options=options,
        words=words,
        adapter=adapter,
        trained=trained,
        **places,
        context=getattr(given, "context", None) or getattr(options, "context", None),
        limit=getattr(given, "limit", None),
        strict=bool(getattr(given, "strict", False) or getattr(options, "strict", False)),
        missing=missing,
    )


def _find_weights(run: Path, missing: dict[str, str]) -> tuple[Path | None, Path | None]:
    """(the folder of the adapter, or that of a whole model) that a run has saved.

    A run that was stopped has them in its newest checkpoint. ConfigError for another folder.
    """
    if not run.is_dir():
        raise ConfigError(f"{str(run)!r:.200} is not the folder of a run: give one of finetune")
    if (run / MULTITASK).is_file():
        missing["model"] = (
            f"{run.name} has one adapter per task: give --base, and with --adapter the folder of "
            "one of them, which is inside"
        )
        return None, None
    folder = run
    if not any((run / name).is_file() for name in (CONFIG_FILE, MODEL_CONFIG)):
        try:
            folder, _ = find_checkpoint("auto", run)
        except CheckpointError as error:
            if not (run / "log.jsonl").is_file():
                raise ConfigError(
                    f"{str(run)!r:.200} is not the folder of a run: it has neither an adapter, nor "
                    f"a model, nor log.jsonl{_name_runs_inside(run)}"
                ) from None
            missing["model"] = str(error)
            return None, None
    if (folder / CONFIG_FILE).is_file():
        return folder, None
    return None, folder if (folder / MODEL_CONFIG).is_file() else None


def _name_runs_inside(folder: Path) -> str:
    """What to give in the place of a folder of runs, such as that of a sweep or of a replay."""
    runs = sorted(log.parent for log in folder.glob("*/log.jsonl"))
    return f"; give one of the runs in it, such as {str(runs[0])!r:.200}" if runs else ""


# ---- reading -------------------------------------------------------------------------------------


class Reader:
    """Reads what `inputs` name; `missing` says why something is left out."""

    def __init__(self, inputs: Inputs, args: Args):
        self.inputs = inputs
        self.args = args
        self.missing = inputs.missing
        self.files: dict[str, Path] = {}

    def read(self) -> Sources:
        inputs = self.inputs
        subject = tokenizer = text = also = None
        with self._omitting("model", inputs.base, "initial", "base_is"):
            subject = self._read_subject()
        if subject is not None:
            self._context(subject)  # an error of --context is the user's, not the text's
            with self._omitting("data", inputs.data):
                tokenizer, text = self._read_text(subject)
            with self._omitting("also", inputs.also):
                also = self._read_also(tokenizer, subject)
        place = inputs.run or inputs.adapter
        settings = {} if inputs.options is None else select_fields(inputs.options, Settings)
        settings.pop("threads", None)  # which changes no bit
        return Sources(
            title="minilora" if place is None else place.resolve().name,
            subject=subject,
            adapter=inputs.adapter,
            base="" if inputs.base is None else inputs.base.path,
            tokenizer=tokenizer,
            text=text,
            also=also,
            run=inputs.run,
            keeps_best=getattr(inputs.options, "keep", None) == "best",
            command=inputs.words,
            settings=settings,
            files=self.files,
            missing=self.missing,
        )

    @contextlib.contextmanager
    def _omitting(self, what: str, place: Place | None, *options: str) -> Iterator[None]:
        """Note why something is left out, unless the user has given it, or one of `options`."""
        try:
            yield
        except (MiniloraError, OSError) as error:
            if place is None or place.is_given:
                raise
            if any(getattr(self.args, name, None) is not None for name in options):
                raise
            failed = f"{place.path!r:.150}, which the run names,"
            if what == "model" and "base" in self.files:  # which has been read
                failed = "what the run saved"
            self.missing.setdefault(what, shorten(f"{failed} cannot be read: {error}"))

    # ---- models ----------------------------------------------------------------------------------

    def _read_subject(self) -> Subject | None:
        inputs = self.inputs
        if inputs.adapter is None and inputs.trained is None:
            return None
        base = self._read_base()
        if inputs.trained is not None:
            self.files["model"] = inputs.trained
            model = CausalLM.from_pretrained(inputs.trained)
            return Subject(model, base)
        assert inputs.adapter is not None
        self.files["adapter"] = inputs.adapter
        if base is None:
            self.missing["model"] = "nothing names the base: give its folder with --base"
            return None
        size = base.config.vocab_size
        start: dict[str, Any] = {
            name: getattr(self.args, name, None) for name in ("initial", "base_is")
        }
        adapted = PeftModel.from_pretrained(base, inputs.adapter, **start)
        return Subject(adapted, resized=adapted.get_base_model().config.vocab_size != size)

    def _read_base(self) -> CausalLM | None:
        """The base in float32, or in the codes in which the run had it."""
        if self.inputs.base is None:
            return None
        args = self.args
        args.base = self.inputs.base.path
        args.device, args.compute = "cpu", FLOAT32
        if args.quantize == "none" and not self._started_changed():
            args.quantize = getattr(self.inputs.options, "quantize", "none")
        if args.quantize == "stored":
            args.quantize = "none"  # float32 has the same values
        base = load_base(args)
        self.files["base"] = Path(args.base)
        return base

    def _started_changed(self) -> bool:
        """Did the run begin over a changed base? Its adapter is for the weights, not for codes."""
        start = getattr(self.inputs.options, "init_lora_weights", None)
        return str(start).startswith(CHANGED)

    # ---- texts -----------------------------------------------------------------------------------

    def _read_tokenizer(self, subject: Subject) -> Tokenizer:
        inputs = self.inputs
        folder = inputs.trained if self.inputs.base is None else self.args.base
        size = subject.adapted.get_base_model().config.vocab_size
        adapter = None if inputs.adapter is None else str(inputs.adapter)
        return read_tokenizer(str(folder), size, adapter)

    def _read_text(self, subject: Subject) -> tuple[Tokenizer | None, MeasuredText | None]:
        """(the tokenizer, the given text, or what the run has held out of its own)."""
        place, options = self.inputs.data, self.inputs.options
        if place is None:
            return None, None
        tokenizer = self._read_tokenizer(subject)
        context = self._context(subject)
        name = Path(place.path).name
        strict = self.inputs.strict
        if place.is_given or options is None:
            tokens, ratio = read_tokens(place.path, tokenizer, context, strict)
        else:
            other = options.eval_data
            _, tokens, ratio = read_training_text(
                place.path, other, tokenizer, context, strict=strict
            )
            name = f"the held-out part of {name}" if other is None else Path(other).name
            if other is not None:
                self.files["held-out text"] = Path(other)
        self.files["text"] = Path(place.path)
        return tokenizer, self._measured(subject, name, tokens, ratio)

    def _read_also(self, tokenizer: Tokenizer | None, subject: Subject) -> MeasuredText | None:
        place = self.inputs.also
        if place is None or tokenizer is None:
            return None
        context = self._context(subject)
        tokens, ratio = read_tokens(place.path, tokenizer, context, self.inputs.strict)
        self.files["second text"] = Path(place.path)
        return self._measured(subject, Path(place.path).name, tokens, ratio)

    def _measured(self, subject: Subject, name: str, tokens: Tokens, ratio: float) -> MeasuredText:
        if len(tokens) < 2:
            raise DataError(f"{name} needs at least 2 tokens to measure, has {len(tokens)}")
        context = self._context(subject)
        size = sum(p.size for p in subject.adapted.parameters())
        layers = len(subject.wrappers) if subject.has_adapter else 0
        limit = self.inputs.limit or choose_windows(size, layers, context)
        return MeasuredText(name, tokens, ratio, context, limit)

    def _context(self, subject: Subject) -> int:
        config = subject.adapted.get_base_model().config
        context = self.inputs.context or min(CONTEXT, config.context)
        require_context(context, config)
        return int(context)
