"""What messages say about optional packages: a clone is installed, as the README says."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALL = "pip install "


def test_messages_install_an_extra_of_the_clone():
    """The package index does not have minilora yet, so that `minilora[extra]` cannot be found."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = settings["options.extras_require"]
    ways = []
    for file in sorted((ROOT / "minilora").rglob("*.py")):
        for rest in file.read_text(encoding="utf-8").split(INSTALL)[1:]:
            ways.append((file.name, rest.split("]")[0]))
    assert ways
    wrong = [way for way in ways if way[1] not in {f"-e .[{extra}" for extra in extras}]
    assert wrong == []
