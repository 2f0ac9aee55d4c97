"""Processes that a run has started, by what they do."""

from __future__ import annotations

import contextlib

import psutil


def at_work(what: str, driver: int | None = None) -> list[psutil.Process]:
    """Those below a driver (by default this process) whose command line has `what` in it, and that have not ended."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            if what in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
