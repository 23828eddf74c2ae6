"""The gallery: a page with each experiment's claim, picture, verdict and numbers.

    write_gallery     the page of a laboratory's folder, beside its results
    publish_gallery   the same text in a page elsewhere, between two comments; beside that page, in
                      the folder `lab`, copies of what the text is made of:

    lab/NAME.json     the results of an experiment, as the laboratory's folder has them
    lab/NAME.png      its picture, which names the checksum of NAME.json
    lab/seconds.json  how long each experiment took

`published_text` makes the text from these copies alone, which a test compares with the page.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import ConfigError
from ..formats import atomic_file, read_json, write_json
from ..formats.disk import JsonObject, quoted
from .experiments import EXPERIMENTS
from .plots import why_unavailable
from .running import draw_results
from .store import LAB, Store, expecting
from .verdicts import describe_number

PAGE = "README.md"
COPIES = "lab"
SECONDS = "seconds.json"
BEGIN = "<!-- begin of the results of `minilora lab gallery --page` -->"
END = "<!-- end of the results -->"

Results = dict[str, JsonObject]  # by the experiment's name, in the order of EXPERIMENTS


def write_gallery(store: Store, say: Callable[[str], None] = print) -> Path:
    """Write the page into the store's folder, and each picture that is missing; returns the page.

    ConfigError if no experiment has results.
    """
    surroundings = store.surroundings()
    results = _read_results(store, surroundings)
    _draw_missing(store, results, say)
    page = store.folder / PAGE
    _write_text(page, gallery_text(results, _read_seconds(store, results), surroundings))
    return page


def _read_results(store: Store, surroundings: JsonObject) -> Results:
    """The results of all experiments that have some.

    FormatError if a file lacks what the page says; ConfigError if one was made otherwise than
    `surroundings` say, or if no experiment has results.
    """
    with expecting(store.folder / LAB, "give the folder of `minilora lab`"):
        _made_by(surroundings)
    results = {}
    for name in EXPERIMENTS:
        content = store.read_results(name)
        if content is None:
            continue
        place = store.results_file(name)
        with expecting(place, _again(name)):
            _section(name, content, "", 0.0)
        if content.get("made_with") != surroundings:
            raise ConfigError(
                f"{quoted(place)} was made with other versions, texts or another machine than "
                f"{LAB} says, and such numbers are not mixed: {_again(name)}"
            )
        results[name] = content
    if not results:
        raise ConfigError(
            f"--out {quoted(store.folder)} has no results yet: run `minilora lab all` first"
        )
    return results


def _again(name: str) -> str:
    return f"run `minilora lab {name}` in --out"


def _read_seconds(store: Store, results: Results) -> dict[str, float]:
    """The seconds of all cases of each experiment together."""
    return {name: math.fsum(store.seconds(name).values()) for name in results}


def _draw_missing(store: Store, results: Results, say: Callable[[str], None]) -> None:
    """Draw each picture that is missing or was drawn from other results."""
    for name, content in results.items():
        source, picture = store.results_file(name), store.picture_file(name)
        if not shows_results(picture, source):
            with expecting(source, _again(name)):
                draw_results(source, content, picture, say)


def shows_results(picture: Path, source: Path) -> bool:
    """Does the picture exist, and does it name the checksum of this file of results?"""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return picture.exists() and digest.encode() in picture.read_bytes()


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


# ---- a page elsewhere ----------------------------------------------------------------------------


def publish_gallery(store: Store, page: str | Path, say: Callable[[str], None] = print) -> Path:
    """Put the text between BEGIN and END of the page, and the copies beside it; returns the page.

    ConfigError, before anything is written, if the page has no place for the text, if no experiment
    has results, if these are of quick runs, or if the copies of others were made otherwise.
    """
    page = Path(page)
    text = _read_page(page)
    surroundings = store.surroundings()
    if surroundings.get("quick"):
        raise ConfigError(
            f"--out {quoted(store.folder)} has results of --quick runs, which mean nothing: "
            "give the folder of a laboratory that ran without --quick"
        )
    results = _read_results(store, surroundings)
    folder = page.parent / COPIES
    _require_same_laboratory(folder, results, surroundings)
    _draw_missing(store, results, say)
    _require_pictures(store, results)
    folder.mkdir(exist_ok=True)
    seconds = read_copies(folder)[1] | _read_seconds(store, results)
    write_json(folder / SECONDS, {name: round(value, 1) for name, value in seconds.items()})
    for name in results:
        for source, target in (
            (store.results_file(name), folder / f"{name}.json"),
            (store.picture_file(name), folder / f"{name}.png"),
        ):
            with atomic_file(target) as file:
                file.write(source.read_bytes())
    _write_text(page, replace_marked(text, published_text(folder)))
    return page


def _read_page(page: Path) -> str:
    try:
        text = page.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"--page {quoted(page)} is not a text in UTF-8: give a Markdown file"
        ) from None
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        raise ConfigError(
            f"--page {quoted(page)} has no place for the gallery: put the lines {BEGIN} and {END} "
            "where it belongs, once each"
        )
    return text


def _require_same_laboratory(folder: Path, results: Results, surroundings: JsonObject) -> None:
    """ConfigError if copies that stay in the folder were made with other surroundings."""
    for name, content in read_copies(folder)[0].items():
        if name not in results and content.get("made_with") != surroundings:
            raise ConfigError(
                f"{quoted(folder / name)}.json is of another laboratory than --out, and numbers of "
                f"two are not mixed: run `minilora lab {name}` in --out, or remove that file"
            )


def _require_pictures(store: Store, results: Results) -> None:
    for name in results:
        if not store.picture_file(name).exists():
            raise ConfigError(f"--page needs pictures, and {name} has none: {why_unavailable()}")


def read_copies(folder: Path) -> tuple[Results, dict[str, float]]:
    """(results, seconds) by experiment, of those that have copies in the folder of a page."""
    files = {name: folder / f"{name}.json" for name in EXPERIMENTS}
    results = {name: read_json(file) for name, file in files.items() if file.exists()}
    return results, (read_json(folder / SECONDS) if results else {})


def published_text(folder: Path) -> str:
    """What a page has between BEGIN and END, made from the copies in its folder; "" without any."""
    results, seconds = read_copies(folder)
    if not results:
        return ""
    surroundings = next(iter(results.values()))["made_with"]
    pictures = {name: f"{folder.name}/{name}.png" for name in results}
    return gallery_text(results, seconds, surroundings, pictures, level=2)


def marked_text(page: str) -> str:
    """What a page has between BEGIN and END."""
    return page.split(f"{BEGIN}\n", 1)[1].split(END, 1)[0]


def replace_marked(page: str, text: str) -> str:
    """The page with another text between BEGIN and END."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{text}{END}{after}"


# ---- the text ------------------------------------------------------------------------------------


def gallery_text(
    results: Results,
    seconds: Mapping[str, float],
    surroundings: JsonObject,
    pictures: Mapping[str, str] | None = None,
    level: int = 1,
) -> str:
    """The page in Markdown: it depends on its arguments alone.

    seconds    of all cases of an experiment together
    pictures   by experiment the path of its picture, as a laboratory's folder has them
    level      of the first heading
    """
    lines = [
        f"{'#' * level} What LoRA is said to do, measured",
        "",
        "Each claim was measured on small models that train in minutes on a processor: every arm",
        "at its best learning rate, over several seeds, beside a control. The rule of each verdict",
        "was fixed before the run; a half-width is that of a 95 % interval over the seeds.",
        "",
        _made_by(surroundings),
        "",
    ]
    if surroundings.get("quick"):
        lines += ["These are runs of three steps (`--quick`): their verdicts mean nothing.", ""]
    lines += ["| experiment | claim | verdict |", "|---|---|---|"]
    for name, content in results.items():
        lines.append(f"| [{name}](#{name}) | {content['claim']} | {content['verdict']} |")
    for name, content in results.items():
        picture = f"{name}/{name}.png" if pictures is None else pictures[name]
        lines += ["", f"{'#' * (level + 1)} {name}", ""]
        lines += _section(name, content, picture, seconds[name])
    return "\n".join(lines) + "\n"


def _made_by(surroundings: JsonObject) -> str:
    machine = surroundings["machine"]
    return (
        f"Made by minilora {surroundings['minilora']} with Python {surroundings['python']} and "
        f"NumPy {machine['numpy']} on {machine['processor']}."
    )


def _section(name: str, content: JsonObject, picture: str, seconds: float) -> list[str]:
    lines = [
        f"{content['claim']}. Source: {content['source']}.",
        "",
        f"![{content['claim']}: {content['verdict']}]({picture})",
        "",
        f"**{content['verdict'].capitalize()}.** {content['note']}".rstrip(),
        f"Control: {content['control']}.",
        "",
    ]
    lines += ["| measured | number | claimed | verdict |", "|---|---|---|---|"]
    for part in content["parts"]:
        cells = part["what"], describe_number(part), part["claimed"], part["verdict"]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    lines += ["", f"`minilora lab {name}`: {seconds:.0f} seconds of all cases together."]
    return lines
