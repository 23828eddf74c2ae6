"""Options for fields that only some methods have.

`minilora finetune --method vera --help` explains those of VeRA; the help without --method has none
of them. Each option of a map is a field of its configuration, and the configuration's docstring is
the help text.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from ..lora import AdaLoraConfig
from ..lora.maps import MapConfig
from ..training.methods import MAPS_BY_METHOD
from .options import Args, Parser, option, select_fields, true_false_or_name

ADALORA = "adalora"
METAVARS = {
    "int": "N",
    "float": "X",
    "dict[str, int]": "JSON",
    "list[str] | str | None": "NAMES",
}
HOW = "HOW"  # true, false or a word


def add_fields_of_methods(parser: Parser) -> None:
    """Add the options of AdaLoRA and of all maps; the help shows those of the given --method."""
    given = [word.rpartition("=")[2] for word in parser.words]
    _add_adalora_fields(parser, is_explained=ADALORA in given)
    added: set[str] = set()
    for method in sorted(MAPS_BY_METHOD, key=lambda method: method not in given):
        config = MAPS_BY_METHOD[method]
        texts = explain_fields(config)
        group = parser.add_argument_group(f"{config.title} (--method {method})")
        for field in config.added_fields():
            if field.name not in added:
                text = texts[field.name] if method in given else argparse.SUPPRESS
                _add_field(group, field, text)
                added.add(field.name)


def explain_fields(config: type[MapConfig]) -> dict[str, str]:
    """The text of the configuration's docstring for each field that LoraConfig does not have."""
    texts = {field.name: "" for field in config.added_fields()}
    explained = ""
    for line in inspect.cleandoc(config.__doc__ or "").splitlines():
        name, gap, text = line.partition("   ")
        if gap and name in texts:
            explained = name
            texts[name] = text.strip()
        elif line.startswith(" ") and explained:
            texts[explained] += f" {line.strip()}"
        else:
            explained = ""
    return texts


def select_adapter_fields(args: Args) -> dict[str, Any]:
    """The given options that are fields of a configuration, with their values."""
    fields: dict[str, Any] = {}
    for config in (AdaLoraConfig, *MAPS_BY_METHOD.values()):
        fields |= select_fields(args, config)
    return fields


def _add_field(group: Any, field: dataclasses.Field[Any], text: str) -> None:
    metavar = METAVARS.get(str(field.type), HOW)
    reading = {"type": true_false_or_name} if metavar == HOW else {}
    default = field.default
    if text is not argparse.SUPPRESS and default not in (None, dataclasses.MISSING):
        shown = str(default).lower() if isinstance(default, bool) else default
        text = f"{text} (default: {shown})".replace("%", "%%")
    words = f"--{field.name.replace('_', '-')} {metavar}"
    option(group, words, text, default=argparse.SUPPRESS, **reading)


def _add_adalora_fields(parser: Parser, is_explained: bool) -> None:
    group = parser.add_argument_group("AdaLoRA (--method adalora)")
    beta1, beta2 = AdaLoraConfig.beta1, AdaLoraConfig.beta2
    texts = {
        "--target-r R": "rank of the average layer at the end (default: r)",
        "--init-r R": "rank at the start, at least target_r (default: 1.5 r)",
        "--tinit N": "steps before the first cut, at least 0 (default: steps / 10)",
        "--tfinal N": "steps after the last cut, at least 0 (default: steps / 4)",
        "--deltaT N": "steps between cuts, at least 1 (default: steps / 100)",
        "--beta1 X": f"smoothing of the importance, in (0, 1) (default: {beta1})",
        "--beta2 X": f"smoothing of its uncertainty, in (0, 1) (default: {beta2})",
        "--orth-reg-weight X": "weight of the orthogonality penalty, at least 0 (default: 0.1)",
    }
    for words, text in texts.items():
        shown = text if is_explained else argparse.SUPPRESS
        option(group, words, shown, default=argparse.SUPPRESS)
