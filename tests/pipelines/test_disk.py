"""A disk that is full is said in one line, before or after it was noticed."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow.fs import copy_files
from safetensors.torch import save_file

from cortex_core.errors import DataError
from pipelines import disk
from pipelines.disk import RESERVE_BYTES, free_bytes, room_for, size_of


def test_what_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 3_000_000)
    with room_for("a checkpoint", tmp_path, 3_000_000 - RESERVE_BYTES):
        pass
    with pytest.raises(DataError) as error, room_for("a checkpoint", tmp_path, 3_000_001 - RESERVE_BYTES):
        raise AssertionError("was begun")
    assert str(error.value) == (
        f"{tmp_path}: no space left for a checkpoint (it takes 3.0 MB with what is written beside it, 3.0 MB is free). "
        "Make room there and start the same command again: it goes on from the last whole checkpoint"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
    ids=["full", "quota", "library"],
)
def test_what_the_system_says_later_is_said_in_the_same_way(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}: no space left for it .*Make room") as said, \
         room_for("it", tmp_path):  # fmt: skip
        raise error
    assert "\n" not in str(said.value) and said.value.__cause__ is error


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kilobytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_full_says_so_through_those_who_write_checkpoints(full_disk: Path, tmp_path: Path) -> None:
    big = torch.zeros(100_000)
    with pytest.raises(DataError, match="no space left for it"), room_for("it", full_disk):
        save_file({"weights": big}, full_disk / "x.safetensors")
    (full_disk / "x.safetensors").unlink(missing_ok=True)
    for folder in (tmp_path / "from", full_disk / "to"):
        folder.mkdir()
    save_file({"weights": big}, tmp_path / "from" / "x.safetensors")
    with pytest.raises(DataError, match="no space left for it"), room_for("it", full_disk):
        copy_files(str(tmp_path / "from"), str(full_disk / "to"))  # as Ray Train does


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), room_for("it", tmp_path, 1):
        raise PermissionError(errno.EACCES, "no")


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(bytes(10))
    (tmp_path / "a" / "b" / "y").write_bytes(bytes(5))
    assert size_of(tmp_path / "a") == 15
    assert free_bytes(tmp_path / "not" / "yet" / "there") > 0
