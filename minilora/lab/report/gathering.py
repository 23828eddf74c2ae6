"""Measures what a report says. A part that cannot be measured is left out, with the reason.

architecture   the tree of modules            texts       a text, token by token
layers         dW beside W in each layer      intruders   directions that W does not have
ranks          the loss with fewer ranks      history     how a run went, from its logs
altering       scales an adapter, or cuts it  provenance  settings, hashes, versions
subject        the model before and after     measuring   losses in bits per byte
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...data.tokenizer import Tokenizer
from ...errors import ConfigError, MiniloraError, describe_os_error, shorten
from ...formats import SafetensorsFile
from ...formats.adapter import WEIGHTS_FILE
from ...lora import AdaLoraConfig, HydraConfig, LoraConfig
from ...lora.factors import effective_rank
from ...lora.files.adapter import AdapterFile
from ...lora.maps import MapConfig
from ...progress import progress_bar
from ...tools.effects import Effects, measure_effects
from ...tools.inspecting import inspect_adapter
from ...training.methods import NAMES, method_of
from .altering import find_whole
from .architecture import draw_architecture, draw_file
from .content import (
    ColouredText,
    Fact,
    Intruders,
    LayerMap,
    ModuleCount,
    RankCurve,
    Report,
    Spectrum,
    Training,
)
from .history import History, draw_training, format_change, list_results, read_history
from .intruders import count_intruders, scale_intruders
from .layers import (
    RANK_MAP,
    VALUES,
    Layer,
    draw_map,
    draw_maps,
    draw_ranks,
    draw_spectra,
    examine_layers,
)
from .measuring import UNIT, MeasuredText
from .provenance import list_provenance
from .ranks import draw_rank_curve
from .subject import Subject
from .texts import TOKENS, colour_text

T = TypeVar("T")
PARTS = 7  # that take time
NO_TEXT = "no text was given to measure: --data FILE is one"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a report is made from.

    title       of the page
    subject     the model before and after training; None if it cannot be loaded
    adapter     the adapter's folder; None for a model in memory, or without an adapter
    base        the base's name, for the summary
    tokenizer   of the texts
    text, also  what was learned, and a second text: what the model knew before
    run         the folder of a run, which has its logs; None for an adapter by itself
    keeps_best  whether the run's weights are those with the lowest held-out loss, and not the last
    command     the words of the command that made the run
    settings    of the run, by name
    files       files and folders whose hashes are shown, by what they are for
    missing     why something is not at hand, by the name of the part that lacks it
    """

    title: str
    subject: Subject | None = None
    adapter: Path | None = None
    base: str = ""
    tokenizer: Tokenizer | None = None
    text: MeasuredText | None = None
    also: MeasuredText | None = None
    run: Path | None = None
    keeps_best: bool = False
    command: Sequence[str] = ()
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)


def gather(sources: Sources, threads: int | None = None, tokens: int = TOKENS) -> Report:
    """Everything that a page says about a run, or about a base with an adapter.

    tokens   the most tokens of the text that are shown one by one
    """
    return _Gathering(sources, threads, tokens).report()


class _Gathering:
    """The parts of one report. Later ones use what earlier ones have measured."""

    def __init__(self, sources: Sources, threads: int | None, tokens: int):
        self.sources = sources
        self.threads = threads
        self.tokens = tokens
        self.omitted: dict[str, str] = {}
        self.history: History | None = None
        self.layers: dict[str, Layer] = {}
        self.spectra: list[Spectrum] = []
        self.effects: Effects | None = None
        self.bar: Any = None

    def report(self) -> Report:
        with progress_bar(total=PARTS, desc="report", unit=" parts") as bar:
            self.bar = bar
            training = self._measure("training", self._training)
            maps = self._measure("maps", self._maps)
            spectra = self._measure("spectra", self._spectra)
            rank_curve = self._measure("rank_curve", self._rank_curve)
            text = self._measure("text", self._text)
            intruders = self._measure("intruders", self._intruders)
            provenance = self._provenance()
            bar.update()
        return Report(
            title=self.sources.title,
            summary=self._summary(),
            architecture=self._architecture(),
            provenance=provenance,
            training=training,
            maps=maps or [],
            spectra=spectra or [],
            rank_curve=rank_curve,
            text=text,
            intruders=intruders,
            omitted=self.omitted,
        )

    def _measure(self, part: str, measure: Callable[[], T]) -> T | None:
        """What `measure` returns; None, with the reason in `omitted`, if it cannot be measured."""
        self.bar.set_postfix_str(part.replace("_", " "))
        result = None
        with self._noting(part):
            result = measure()
        self.bar.update()
        return result

    @contextlib.contextmanager
    def _noting(self, part: str) -> Iterator[None]:
        """Note why a part, or some of it, is left out; the first reason counts."""
        try:
            yield
        except MiniloraError as error:
            self.omitted.setdefault(part, str(error))
        except OSError as error:
            self.omitted.setdefault(part, describe_os_error(error))
        except (np.linalg.LinAlgError, MemoryError) as error:
            self.omitted.setdefault(part, shorten(f"{type(error).__name__}: {error}"))

    # ---- what several parts need -----------------------------------------------------------------

    @property
    def subject(self) -> Subject:
        """ConfigError, with the reason, if the model is not at hand."""
        if self.sources.subject is None:
            raise ConfigError(self.sources.missing.get("model", "the model is not at hand"))
        return self.sources.subject

    @property
    def text(self) -> MeasuredText:
        """ConfigError, with the reason, if the text is not at hand."""
        if self.sources.text is None:
            raise ConfigError(self.sources.missing.get("data", NO_TEXT))
        return self.sources.text

    def _require_layers(self) -> dict[str, Layer]:
        if not self.layers:
            raise ConfigError(self.omitted.get("maps", "no layer was changed"))
        return self.layers

    # ---- the parts -------------------------------------------------------------------------------

    def _training(self) -> Training:
        if self.sources.run is None:
            reason = "an adapter alone does not say how it was trained: give the folder of its run"
            raise ConfigError(self.sources.missing.get("training", reason))
        self.history = read_history(self.sources.run)
        return draw_training(self.history)

    def _maps(self) -> list[LayerMap]:
        if self.sources.subject is None and self.sources.adapter is not None:
            return self._maps_of_file(self.sources.adapter)
        maps = []
        with self._noting("maps"):
            self.layers = examine_layers(self.subject)
            maps += draw_maps(self.layers)
        with self._noting("maps"):
            self.subject.require_adapter()
            if isinstance(self.subject.config, AdaLoraConfig):
                maps.append(draw_ranks(self.subject))
            maps += self._maps_of_effects(self.text)
        return maps

    def _maps_of_effects(self, text: MeasuredText) -> list[LayerMap]:
        model = self.subject.adapted
        self.effects = measure_effects(model, text.tokens, text.context, text.limit, self.threads)
        gain = text.bits(self.effects.gain.mean)
        verb = "lowers" if gain >= 0 else "raises"
        whole = f"The whole adapter {verb} the loss of {text.name} by {abs(gain):.4g} {UNIT}."
        out, alone = (
            {path: text.bits(one.mean) for path, one in effects.items() if path}
            for effects in (self.effects.out, self.effects.alone)
        )
        return [
            draw_map(
                "Loss without the layer",
                f"By how many {UNIT} the loss rises if this layer's dW is left out. {whole}",
                out,
            ),
            draw_map(
                "Gain of the layer alone",
                f"By how many {UNIT} this layer's dW alone lowers the base's loss. {whole} "
                "Layers act on each other, so their effects do not add up to it.",
                alone,
            ),
        ]

    def _maps_of_file(self, adapter: Path) -> list[LayerMap]:
        """What an adapter's file alone says."""
        report = inspect_adapter(adapter)
        spectra = {path: values for path, values in report["spectra"].items() if values}
        self.spectra = [Spectrum(path, values[:VALUES], []) for path, values in spectra.items()]
        self.omitted["maps"] = self.sources.missing.get("model", "the base is not at hand")
        ranks = {path: effective_rank(np.array(values)) for path, values in spectra.items()}
        return [draw_map(*RANK_MAP, ranks)] if ranks else []

    def _spectra(self) -> list[Spectrum]:
        if self.sources.subject is None and self.spectra:
            return self.spectra
        spectra = draw_spectra(self._require_layers())
        if not spectra:
            raise ConfigError(
                "dW is zero in every layer, or too large to decompose without low-rank factors"
            )
        return spectra

    def _rank_curve(self) -> RankCurve:
        self.subject.require_adapter()
        curve = draw_rank_curve(self.subject, self._require_layers(), self.text, self.threads)
        whole = find_whole(self.subject)
        if whole:
            self.omitted["rank_curve"] = (
                f"the ranks of {', '.join(whole):.150}, which trained as a copy or by rows: they "
                "stay as trained at every rank above 0"
            )
        return curve

    def _text(self) -> ColouredText:
        subject, text = self.subject, self.text
        tokenizer = self.sources.tokenizer
        if tokenizer is None:
            raise ConfigError("the tokenizer is not at hand")
        return colour_text(subject, tokenizer, text, self.tokens)

    def _intruders(self) -> Intruders:
        counted = count_intruders(self._require_layers())
        with self._noting("intruders"):
            scalings = scale_intruders(
                self.subject, self.layers, self.text, self.sources.also, self.threads
            )
            return dataclasses.replace(counted, unit=UNIT, scalings=scalings)
        return counted

    def _provenance(self) -> list[Fact]:
        sources = self.sources
        settings = {name: value for name, value in sources.settings.items() if value is not None}
        return list_provenance(settings, sources.command, sources.files)

    def _architecture(self) -> ModuleCount:
        sources = self.sources
        if sources.subject is not None:
            return draw_architecture(sources.subject, Path(sources.base).name or "model")
        with self._noting("architecture"):
            if sources.adapter is not None:
                with SafetensorsFile(sources.adapter / WEIGHTS_FILE) as file:
                    return draw_file(file, sources.adapter.name)
        return ModuleCount("model", "not at hand", 0, 0, sources.missing.get("model", ""))

    # ---- the summary -----------------------------------------------------------------------------

    def _summary(self) -> list[Fact]:
        sources = self.sources
        facts = []
        with self._noting("summary"):
            facts += self._describe_method()
        if sources.base:
            facts.append(Fact("Base", sources.base))
        if self.history is not None:
            facts += list_results(self.history, sources.keeps_best)
        if self.effects is not None:
            facts += self._describe_effects(self.effects, self.text)
        return facts

    def _describe_method(self) -> list[Fact]:
        subject = self.sources.subject
        if subject is None:
            if self.sources.adapter is None:
                return []
            with AdapterFile(self.sources.adapter, check=False) as file:
                return _describe_config(file.config)
        if not subject.has_adapter:
            count = sum(p.size for p in subject.adapted.parameters())
            return [Fact("Method", NAMES["full"]), Fact("Trained parameters", f"{count:,}")]
        facts = _describe_config(subject.config)
        facts.append(Fact("Layers", f"{len(subject.wrappers):,}"))
        parameters = subject.adapted.adapter_parameters(subject.name).values()
        trained = sum(p.size for p in parameters if not p.fixed)
        total = sum(p.size for p in subject.adapted.parameters())
        share = f"{trained:,} of {total:,} ({trained / total:.2%})"
        return [*facts, Fact("Trained parameters", share)]

    def _describe_effects(self, effects: Effects, text: MeasuredText) -> list[Fact]:
        before, after = text.bits(effects.base.mean), text.bits(effects.adapter.mean)
        change = format_change(before, after, text.bits(effects.gain.error))
        windows = "1 window" if effects.windows == 1 else f"{effects.windows:,} windows"
        amount = f"{windows}, {effects.tokens:,} tokens of {text.name}"
        return [Fact("Measured for this page", amount), Fact(f"{UNIT.capitalize()} there", change)]


def _describe_config(config: LoraConfig) -> list[Fact]:
    """The method of an adapter and its fields in short."""
    if isinstance(config, MapConfig):
        fields = {name: getattr(config, name) for name in ("r",) if name in config.USES}
        fields |= {field.name: getattr(config, field.name) for field in config.added_fields()}
        return [Fact("Method", config.title), *(Fact(k, f"{v}") for k, v in fields.items())]
    title = "HydraLoRA" if isinstance(config, HydraConfig) else NAMES[method_of(config)]
    if isinstance(config, AdaLoraConfig):
        rank = f"{config.init_r} at first, {config.target_r} in the end, on average"
    else:
        rank = f"{config.r}"
    return [Fact("Method", title), Fact("r", rank), Fact("lora_alpha", f"{config.lora_alpha:g}")]
