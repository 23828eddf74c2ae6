"""minilora lab: the list, a quick run that is killed and goes on, the gallery, refusals."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from minilora.cli import main
from minilora.cli.lab import minutes_left
from minilora.lab.experiments import EXPERIMENTS
from minilora.lab.gallery import BEGIN, END

pytestmark = pytest.mark.filterwarnings("default")
POSIX = pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs signals as POSIX has them")


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return code, out.getvalue(), err.getvalue()


def results(folder):
    return {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*.json")
        if file.name != "seconds.json"
    }


def test_lab_list_has_a_line_each_with_the_name_first():
    code, out, _ = run("lab list")
    lines = out.splitlines()[1:]
    assert code == 0
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)


@pytest.mark.parametrize("line", ["lab rnak", "lab rank everything"])
def test_lab_unknown_name_is_told_what_there_is(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(line)
    assert code == 2
    assert "all" in err
    assert "counts" in err
    assert "gallery" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["lab rate", "lab nosuch"])
def test_lab_wrong_name_gets_one_sentence_that_knows_rates(line):
    code, _, err = run(line)
    assert code == 2
    assert ("did you mean rates? It knows counts" in err) == (line == "lab rate")
    assert ("'nosuch': it knows counts" in err) == (line == "lab nosuch")
    assert err.rstrip().endswith("gallery, rates")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_lab_list_that_cannot_be_printed_fails():
    words = [sys.executable, "-m", "minilora", "lab", "list"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, stdout=full, stderr=subprocess.PIPE).returncode == 4


@pytest.mark.parametrize("line", ["lab gallery rank", "lab list counts", "lab rank all"])
def test_lab_names_of_all_experiments_are_given_alone(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(line)
    assert code == 2
    assert "give it alone, or name experiments only" in err
    assert not list(tmp_path.iterdir())


def test_lab_gallery_without_results_says_what_to_do(tmp_path):
    code, _, err = run(f"lab gallery --out {tmp_path}")
    assert code == 2
    assert "run an experiment first" in err


def test_lab_gallery_page_is_of_the_gallery_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("lab rank --quick --page README.md")
    assert code == 2
    assert "--page is of `minilora lab gallery`" in err
    assert not list(tmp_path.iterdir())


def test_lab_gallery_page_of_quick_runs_is_refused_and_stays(tmp_path):
    page = tmp_path / "README.md"
    text = f"# A page\n\n{BEGIN}\n{END}\n"
    page.write_text(text, encoding="utf-8")
    assert run(f"lab counts --quick --pool here --out {tmp_path}/lab")[0] == 0
    code, _, err = run(f"lab gallery --out {tmp_path}/lab --page {page}")
    assert code == 2
    assert "without --quick" in err
    assert page.read_text(encoding="utf-8") == text
    code, _, err = run(f"lab gallery --out {tmp_path}/lab --page {tmp_path}/none.md")
    assert code == 4
    assert "none.md" in err


def test_lab_refuses_a_folder_of_full_runs_for_quick_ones(tmp_path):
    assert run(f"lab counts --quick --pool here --out {tmp_path}/lab")[0] == 0
    before = results(tmp_path)
    code, _, err = run(f"lab counts --pool here --out {tmp_path}/lab")
    assert code == 2
    assert "in which --quick was on, and now it is off" in err
    assert results(tmp_path) == before


@POSIX
def test_lab_killed_goes_on_to_the_bytes_of_an_uninterrupted_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(f"lab rank --quick --pool here --out {whole}")[0] == 0
    line = f"lab rank --quick --jobs 2 --out {killed}"
    command = [sys.executable, "-m", "minilora", *shlex.split(line)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not list(killed.glob("rank/cases/*.json")) and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "rank" / "results.json").exists()
    code, out, _ = run(line.replace("--jobs 2", "--pool here"))
    assert code == 0
    assert "\nrank: " in f"\n{out}"  # after a line about matplotlib, where that is missing
    assert results(killed) == results(whole)
    code, out, _ = run(f"lab gallery --out {killed}")
    page = (killed / "README.md").read_text()
    assert code == 0
    assert "## rank" in page
    assert EXPERIMENTS["rank"].CLAIM in page
    assert "rank/rank.png" in page


@pytest.mark.parametrize(
    ("left", "expected", "taken", "minutes"),
    [(600, 0, 0, 10), (600, 0, 90, 13), (3600, 5, 60, 71), (3600, 3600, 7200, 115), (1, 9, 9, 1)],
)
def test_lab_minutes_left_are_near_the_expected_ones_at_first(left, expected, taken, minutes):
    assert minutes_left(left, expected, taken) == minutes
