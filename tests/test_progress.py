"""Progress bars: on a terminal, in a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

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


@pytest.mark.parametrize("parts", [(), ("HTML",), ("HTML", "FloatProgress")])
def test_progress_bar_is_text_where_ipywidgets_lacks_a_part(parts, monkeypatch, recwarn):
    """Quietly: no warning, and nothing about a bar that was half made."""
    shell = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    ipywidgets: Any = types.ModuleType("ipywidgets")
    for part in parts:
        setattr(ipywidgets, part, object)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "ipywidgets", ipywidgets)
    monkeypatch.delitem(sys.modules, "tqdm.notebook", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=2, desc="train") as bar:
        bar.update()
    assert "train" in sys.stderr.getvalue()
    assert "Error" not in sys.stderr.getvalue()
    assert not recwarn.list


def test_progress_bar_is_a_widget_where_ipywidgets_is_whole(monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    ipywidgets: Any = types.ModuleType("ipywidgets")
    for part in ("HTML", "FloatProgress", "HBox"):
        setattr(ipywidgets, part, object)
    notebook: Any = types.ModuleType("tqdm.notebook")
    notebook.tqdm = lambda *parts, **options: ("widget", parts, options)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "ipywidgets", ipywidgets)
    monkeypatch.setitem(sys.modules, "tqdm.notebook", notebook)
    assert progress_bar(total=2) == ("widget", (), {"total": 2, "disable": False})
