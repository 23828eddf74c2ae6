"""`import minilora`: public names that are imported when they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import minilora

ROOT = Path(minilora.__file__).parents[1]


def test_minilora_gives_every_public_name_and_module():
    for name in minilora.__all__:
        assert getattr(minilora, name).__name__ == name
    assert minilora.functional.__name__ == "minilora.functional"
    assert {*minilora.__all__, "__version__"} <= set(dir(minilora))
    for name in ("nothing", "_private", "__wrapped__", "nothing.at_all", "cli.streams", ""):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(minilora, name)


def test_import_minilora_imports_nothing_until_a_name_is_used():
    program = """
import sys, minilora
assert not {"numpy", "typing", "argparse"} & set(sys.modules)
from minilora import Tensor
from minilora import *
assert "numpy" in sys.modules
assert generate.__module__ == "minilora.models.generation"
"""
    subprocess.run([sys.executable, "-S", "-c", SETUP + program], check=True)


@pytest.mark.parametrize(
    "module", ["models.transformer", "models.gpt2", "lora", "training.loop", "functional", "verify"]
)
def test_minilora_has_modules_that_can_be_imported_first(module):
    program = f"import minilora.{module}; from minilora import Tensor, generate, CausalLM"
    subprocess.run([sys.executable, "-c", SETUP + program], check=True)


SETUP = f"import sys; sys.path[:0] = {[str(ROOT), *sys.path]!r}\n"


@pytest.mark.parametrize("closed", [False, True])
def test_main_says_in_one_line_why_a_package_cannot_be_imported(closed):
    program = "import os; sys.modules['numpy'] = None; sys.argv = ['minilora', '--version']\n"
    program += f"if {closed}: os.close(2)\n"
    program += "from minilora.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", SETUP + program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert (done.stderr == "") == closed
    if not closed:
        assert done.stderr.startswith("minilora: error: cannot start: 'ModuleNotFoundError: ")
        assert done.stderr.count("\n") == 1
