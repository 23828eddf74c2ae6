"""Every failure of the disk names the file that failed, also where the system does not."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faults import Disk

from minilora.data.records import read_records
from minilora.data.texts import read_text
from minilora.data.tokenizer import ByteTokenizer
from minilora.formats import read_json, write_checkpoint, write_json
from minilora.formats.disk import open_regular
from minilora.formats.folders import locked, new_folder
from minilora.training.checkpoints import Log, save_checkpoint

CODES = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "ESTALE", "EACCES")


def failing(number: int):
    """A failure of the disk as the system reports it for a descriptor: it names no file."""

    def fail(disk: Disk, kind: str) -> None:
        if kind in ("write", "fsync"):
            raise OSError(number, os.strerror(number))

    return fail


def write_checkpoint_of(folder: Path) -> None:
    write_checkpoint(folder, {"model_type": "llama"}, {"a": np.zeros(99, np.float32)})


def save_step(folder: Path) -> None:
    with locked(folder), Log(folder / "log.jsonl") as log:
        log.write(step=1)
        log.sync()
        save = lambda stage: write_json(stage / "a.json", {})  # noqa: E731
        save_checkpoint(folder, 1, {}, save)


def make_new_folder(folder: Path) -> None:
    with new_folder(folder, {"a": 1}) as stage:
        write_json(stage / "a.json", {"a": 1})


WRITERS = (write_checkpoint_of, save_step, make_new_folder)


def failures(write, folder: Path, number: int) -> Iterator[OSError]:
    """What `write` raises if change number 1, 2, ... of the disk goes wrong."""
    for at in itertools.count(1):
        place = folder / str(at) / "place"
        place.parent.mkdir()
        with Disk(at, failing(number)) as disk:
            try:
                write(place)
            except OSError as error:
                yield error
        if disk.changes < at:
            return


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("write", WRITERS)
def test_writers_name_the_file_of_every_failure(tmp_path, write, code):
    number = getattr(errno, code)
    errors = list(failures(write, tmp_path, number))
    assert len(errors) >= 5
    for error in errors:
        assert error.errno == number
        assert str(error.filename).startswith(str(tmp_path))
        name = Path(str(error.filename)).name
        assert ".tmp-" not in name or name.startswith("step-")  # a folder before it is renamed


def test_write_json_does_not_name_its_temporary_file(tmp_path, monkeypatch):
    def refuse(path, *rest, **options):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    for name in ("open", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(PermissionError) as caught:
                write_json(tmp_path / "a.json", {})
        assert caught.value.filename == str(tmp_path / "a.json")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read")
def test_readers_name_the_file_that_cannot_be_read(tmp_path):
    """The kernel answers a read at address 0 with EIO."""
    unreadable = tmp_path / "data.jsonl"
    unreadable.symlink_to("/proc/self/mem")
    tokenizer = ByteTokenizer()
    reads = [read_json, read_text, lambda path: read_records(path, tokenizer, 9)]
    for read in reads:
        with pytest.raises(OSError, match="Input/output") as caught:
            read(unreadable)
        assert caught.value.filename == str(unreadable)
    for read in (lambda file: file.read(), lambda file: file.readinto(bytearray(9))):
        with (
            open_regular(unreadable) as file,
            pytest.raises(OSError, match="Input/output") as caught,
        ):
            read(file)
        assert caught.value.filename == str(unreadable)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "file/inside", "folder"])
def test_write_json_names_the_path_that_was_given(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"^\[Errno") as caught:
        write_json(tmp_path / name, {})
    assert str(caught.value.filename) == str(tmp_path / name)
