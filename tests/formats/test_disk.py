"""Atomic files: what killed writers leave, two writers at once, and a disk that fails."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from faults import (
    NO_DISK,
    NO_ROOM,
    Disk,
    in_child,
    no_disk,
    no_room,
    power_off,
    read_tree,
    start,
    stay_full,
    wait,
)

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.formats import atomic_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes as POSIX has them")


def write(path: Path, content: bytes = b"new") -> None:
    with atomic_file(path) as file:
        file.write(content)


def beside(folder: Path):
    return sorted(p.name for p in folder.iterdir())


def ended_process() -> int:
    """The number of a process that has ended."""
    child = start(lambda: None)
    assert wait(child) == 0
    return child


def killed_while_writing(path: Path) -> None:
    def work() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            os._exit(9)

    assert in_child(work) == 9


@pytest.mark.parametrize("name", ["model.safetensors", "a", "ü" * 60, "x.tmp-1-abcdefgh"])
def test_atomic_file_removes_what_a_killed_writer_left(name, tmp_path):
    path = tmp_path / name
    write(path, b"old")
    for _ in range(2):
        killed_while_writing(path)
        assert len(beside(tmp_path)) == 2
    assert path.read_bytes() == b"old"
    write(path)
    assert beside(tmp_path) == [name]
    assert path.read_bytes() == b"new"


def test_atomic_file_leaves_files_of_others_and_files_in_use(tmp_path):
    dead = ended_process()
    stays = [
        f".other.tmp-{dead}-0123abcd",  # of another file
        f"a.tmp-{dead}-0123abcd",
        f".a.tmp-{dead}-0123abc",
        f".a.tmp-{dead}-0123abcde",
        f".a.tmp-{dead}",
        f".a.tmp--{dead}-0123abcd",
        ".a.tmp-x-0123abcd",
        ".a.tmp-",
        f".a.tmp-{os.getppid()}-0123abcd",  # a process that lives
        ".a.tmp-1-0123abcd",  # so does this one, for as long as the machine
    ]
    removed = [f".a.tmp-{number}-0123abcd" for number in (dead, os.getpid(), 10**30)]
    for name in stays + removed:
        (tmp_path / name).touch()
    write(tmp_path / "a")
    assert beside(tmp_path) == sorted({*stays, "a"})  # the parent may be process 1


def test_atomic_file_may_be_used_by_two_threads_at_once(tmp_path):
    both = threading.Barrier(2, timeout=60)
    done = []

    def work(content: bytes) -> None:
        for _ in range(50):
            with atomic_file(tmp_path / "a") as file:
                both.wait()  # both temporary files exist
                file.write(content)
                both.wait()
        done.append(content)

    threads = [threading.Thread(target=work, args=(content,)) for content in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [b"one", b"two"]
    assert beside(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() in (b"one", b"two")


def test_atomic_file_writes_into_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "listdir", refuse)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"


# ---- what a run leaves at its end ----


SHAPE = TransformerConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)


def model(value: int):
    made = CausalLM(SHAPE)
    for p in made.parameters():
        p.data = np.full_like(p.data, value)
    return made


def adapter(value: int):
    made = get_peft_model(model(0), LoraConfig(r=1, target_modules=["q_proj"]))
    for _, p in made.named_parameters():
        p.data = np.full_like(p.data, value)
    return made


@pytest.mark.parametrize("make", [model, adapter])
@pytest.mark.parametrize("wrong", [no_room, no_disk, stay_full, power_off])
@pytest.mark.parametrize("over", [False, True], ids=["into an empty folder", "over an older one"])
def test_save_pretrained_leaves_each_file_whole_after_a_fault_at_any_change(
    make, wrong, over, tmp_path
):
    before = tmp_path / "before"
    before.mkdir()
    new = make(2)
    if over:
        make(1).save_pretrained(before)
    old_files = read_tree(before)
    with Disk() as disk:
        new.save_pretrained(tmp_path / "after")
    new_files = read_tree(tmp_path / "after")
    assert disk.changes >= 10
    for at in range(1, disk.changes + 1):
        out = tmp_path / f"out-{at}"
        codes = []
        shutil.copytree(before, out)

        def work(out=out, at=at, codes=codes) -> None:
            with Disk(at, wrong):
                try:
                    new.save_pretrained(out)
                except OSError as error:
                    codes.append(error.errno)

        if wrong is power_off:
            assert in_child(work) == 9
        else:
            work()
            assert codes in ([], [NO_ROOM.errno], [NO_DISK.errno])
            assert not [name for name in beside(out) if ".tmp-" in name]
        for name, content in read_tree(out).items():
            assert ".tmp-" in name or content in (old_files.get(name), new_files[name])
        with Disk():
            new.save_pretrained(out)
        assert read_tree(out) == new_files
        shutil.rmtree(out)
