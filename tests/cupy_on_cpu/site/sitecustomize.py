"""Python imports this module when it starts if its folder is in PYTHONPATH: cupy is emulated."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
import cupy_on_cpu

cupy_on_cpu.install()
