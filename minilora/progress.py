"""Progress bars: on a terminal, in a notebook, and nowhere else."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def in_notebook() -> bool:
    """Does this program run in the kernel of a notebook?"""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


def progress_bar(*parts: Any, show: bool = True, **options: Any) -> Any:
    """tqdm's bar over `parts`, or one to be updated by hand; see tqdm for the options.

    It is on stderr if that is a terminal. In a notebook it is a widget, or a line of text where
    ipywidgets is not installed. Without `show`, and elsewhere, nothing is shown.
    """
    # A program without a console has no stderr at all.
    if not show or sys.stderr is None:
        return tqdm(*parts, **options, disable=True)
    if not in_notebook():
        return tqdm(*parts, **options, disable=None)
    try:
        # All that a widget is made of: tqdm would miss a part of it when the bar is half made.
        from ipywidgets import HTML as HTML
        from ipywidgets import FloatProgress as FloatProgress
        from ipywidgets import HBox as HBox
        from tqdm.notebook import tqdm as widget
    except ImportError:
        return tqdm(*parts, **options, disable=False)
    return widget(*parts, **options, disable=False)
