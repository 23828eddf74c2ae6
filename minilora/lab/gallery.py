"""The gallery: a page with each experiment's claim, picture, verdict and numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..formats import atomic_file
from ..formats.disk import JsonObject, quoted
from .experiments import EXPERIMENTS
from .running import draw_results
from .store import Store
from .verdicts import describe_part

PAGE = "README.md"


def write_gallery(store: Store, say: Callable[[str], None] = print) -> Path:
    """Write the page into the store's folder, and each picture that is missing; returns the page.

    ConfigError if no experiment has results.
    """
    surroundings = store.surroundings()
    results = {}
    for name in EXPERIMENTS:
        content = store.read_results(name)
        if content is not None:
            results[name] = content
    if not results:
        raise ConfigError(
            f"--out {quoted(store.folder)} has no results yet: run `minilora lab all` first"
        )
    seconds = {name: math.fsum(store.seconds(name).values()) for name in results}
    for name, content in results.items():
        if not store.picture_file(name).exists():
            draw_results(store.results_file(name), content, store.picture_file(name), say)
    page = store.folder / PAGE
    with atomic_file(page) as file:
        file.write(gallery_text(results, seconds, surroundings).encode())
    return page


def gallery_text(
    results: dict[str, JsonObject], seconds: dict[str, float], surroundings: JsonObject
) -> str:
    """The page in Markdown: it depends on its arguments alone.

    results   by the experiment's name, in the order of the page
    seconds   of all of its cases together
    """
    machine = surroundings["machine"]
    lines = [
        "# What LoRA is said to do, measured",
        "",
        "Each claim was measured on small models that train in minutes on a processor: every arm",
        "at its best learning rate, over several seeds, beside a control. The rule of each verdict",
        "was fixed before the run; a half-width is that of a 95 % interval over the seeds.",
        "",
        f"Made by minilora {surroundings['minilora']} with Python {surroundings['python']} and "
        f"NumPy {machine['numpy']} on {machine['processor']}.",
        "",
        "| experiment | claim | verdict |",
        "|---|---|---|",
    ]
    for name, content in results.items():
        lines.append(f"| [{name}](#{name}) | {content['claim']} | {content['verdict']} |")
    for name, content in results.items():
        lines += ["", *_section(name, content, seconds[name])]
    return "\n".join(lines) + "\n"


def _section(name: str, content: JsonObject, seconds: float) -> list[str]:
    picture = os.path.join(name, f"{name}.png").replace(os.sep, "/")
    lines = [
        f"## {name}",
        "",
        f"{content['claim']}. Source: {content['source']}.",
        "",
        f"![{content['claim']}: {content['verdict']}]({picture})",
        "",
        f"**{content['verdict'].capitalize()}.** {content['note']}".rstrip(),
        f"Control: {content['control']}.",
        "",
    ]
    lines += [f"- {describe_part(part)}" for part in content["parts"]]
    lines += ["", f"`minilora lab {name}`: {seconds:.0f} seconds of all cases together."]
    return lines
