"""The process for templates and tokenizers: its limits, its end, and that it starts again."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from hostile_files import replacing

from minilora.data import sandbox as sandbox_module
from minilora.data.sandbox import Sandbox
from minilora.data.tokenizer import ByteTokenizer, load_tokenizer
from minilora.errors import DataError

pytest.importorskip("tokenizers")


@pytest.fixture
def tokenizer_of(tmp_path):
    """A function of changes to our own tokenizer.json: the tokenizer, run in a process."""

    def load(**changes):
        ByteTokenizer().save(tmp_path)
        fields = json.loads((tmp_path / "tokenizer.json").read_text())
        fields.update(changes)
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
        return load_tokenizer(tmp_path, 1000)

    return load


# `é` becomes 100,000 letters: one is too much, and none is no work.
GROWING = {"type": "Replace", "pattern": {"String": "é"}, "content": "a" * 10**5}
GROWING = {"type": "Sequence", "normalizers": [GROWING, *replacing(1, "b" * 10**5)]}


def test_sandbox_starts_again_after_a_text_was_too_much(tokenizer_of):
    tokenizer = tokenizer_of(normalizer=GROWING)
    first = tokenizer._sandbox.process.pid
    with pytest.raises(DataError, match=r"tokenizer\.json' takes too much time or memory"):
        tokenizer.encode("é")
    assert tokenizer.encode("xyz").tolist() == list(b"xyz")
    assert tokenizer._sandbox.process.pid != first
    assert tokenizer.decode(list(b"xyz")) == "xyz"


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_sandbox_ends_its_process_with_the_tokenizer(tokenizer_of):
    tokenizer = tokenizer_of(normalizer={"type": "NFC"})
    pid = tokenizer._sandbox.process.pid
    assert is_running(pid)
    del tokenizer
    gc.collect()
    assert not is_running(pid)


def test_sandbox_ends_its_process_after_an_interruption(tokenizer_of, monkeypatch):
    """A late answer must not be taken for the answer to the next question."""
    tokenizer = tokenizer_of(normalizer={"type": "NFC"})
    pid = tokenizer._sandbox.process.pid

    def interrupted(timer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Timer, "cancel", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode("old")
    assert not is_running(pid)
    assert tokenizer.encode("new").tolist() == list(b"new")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_sandbox_process_leaves_ctrl_c_to_the_program(tokenizer_of):
    tokenizer = tokenizer_of(normalizer={"type": "NFC"})
    pid = tokenizer._sandbox.process.pid
    os.kill(pid, signal.SIGINT)
    assert tokenizer.encode("abc").tolist() == list(b"abc")
    assert tokenizer._sandbox.process.pid == pid


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads them in /proc")
def test_sandbox_limits_grow_with_the_work(tokenizer_of):
    tokenizer = tokenizer_of(normalizer={"type": "NFC"})

    def limits():
        pid = tokenizer._sandbox.process.pid
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
        return {line[:26].strip(): line[26:].split()[0] for line in lines}

    values = limits()
    assert values["Max open files"] == values["Max file size"] == values["Max processes"] == "0"
    assert values["Max cpu time"] == "2"
    assert int(values["Max address space"]) < (1 << 29) + (1 << 20)
    tokenizer.encode("a" * 400_000)  # 10 microseconds and 512 bytes for each
    values = limits()
    assert values["Max cpu time"] == "6"
    assert int(values["Max address space"]) > (1 << 29) + 400_000 * 512


def test_sandbox_reports_a_program_that_is_not_usable():
    sandbox = Sandbox("FILE", {"tokenizer": b"{}"}, 1.0, 1 << 29)
    with pytest.raises(DataError, match=r"^FILE is not a usable tokenizer: "):
        sandbox.ask({"do": "summary"}, 0.0)
    sandbox.close()
    sandbox.close()


def test_sandbox_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for program, package in (({"tokenizer": b""}, "tokenizers"), ({"template": ""}, "jinja2")):
        sandbox = Sandbox("FILE", program, 1.0, 1 << 29)
        with pytest.raises(DataError, match=f"FILE needs the package '{package}': pip install"):
            sandbox.ask({"do": "summary"}, 0.0)
        sandbox.close()


def test_ask_names_the_program_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(sandbox_module.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="Too many open files") as caught:
        Sandbox("FILE", {"tokenizer": b"{}"}, 1.0, 1 << 29).ask({"do": "summary"}, 0)
    assert caught.value.filename.endswith("sandboxed.py")


@pytest.mark.parametrize("template", ["{{ 'a<b>c</b>'|striptags }}", "{{ lipsum(1)|length > 9 }}"])
def test_template_may_use_what_jinja_imports_late(template: str) -> None:
    sandbox = Sandbox("FILE", {"template": template, "given": {}}, 1.0, 1 << 29)
    question = {"messages": [], "parts": [[0, False]], "tools": None}
    assert sandbox.ask(question, 1.0)[0] in ("ac", "True")
    sandbox.close()
