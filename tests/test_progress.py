"""Progress bars: on a terminal, in a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
import types

import pytest

from minilora.progress import in_notebook, progress_bar


def test_progress_bar_shows_nothing_without_a_terminal(monkeypatch):
    assert not in_notebook()
    for stderr in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert progress_bar(total=3).disable


@pytest.mark.parametrize("show", [True, False])
def test_progress_bar_shows_in_a_notebook(show, monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=3, desc="train", show=show) as bar:
        assert bar.disable is not show
        bar.update()
    assert ("train" in sys.stderr.getvalue()) is show
