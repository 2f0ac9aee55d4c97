"""A disk that is full, said in one line: what was to be written, where, how much it takes, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cortex_core.errors import DataError

RESERVE_BYTES = 2**20
"""Stays free beside a checkpoint: for Ray's record of the checkpoints, which would be empty if it were cut short."""


@contextmanager
def room_for(what: str, where: Path, size_bytes: int = 0) -> Iterator[None]:
    """Write `what` into the folder `where` within the block. Raises DataError, beforehand if there is no room for
    `size_bytes`, or for the system's word that the disk is full."""
    if size_bytes and free_bytes(where) < size_bytes + RESERVE_BYTES:
        raise _full(what, where, size_bytes)
    try:
        yield
    except Exception as error:  # safetensors and pyarrow have errors of their own
        if _says_full(error):
            raise _full(what, where, size_bytes) from error
        raise


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def free_bytes(folder: Path) -> int:
    """What this user may still write where the folder is, or will be."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(there).free


def _says_full(error: Exception) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def _full(what: str, where: Path, size_bytes: int) -> DataError:
    free = "none"
    with suppress(OSError):
        free = _megabytes(free_bytes(where))
    needs = f"it takes {_megabytes(size_bytes + RESERVE_BYTES)} with what is written beside it, " if size_bytes else ""
    return DataError(
        f"{where}: no space left for {what} ({needs}{free} is free). Make room there and start the same command "
        "again: it goes on from the last whole checkpoint"
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
