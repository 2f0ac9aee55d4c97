"""Calls a function in fresh processes: for what depends on the process, such as peak memory, ranks, or the work before.

`python -m tests.benchmarks.child MODULE:FUNCTION ARGUMENTS OUT` is what a fresh process runs.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SHOWN_LINES = 15


def run(
    name: str,
    *,
    ranks: int = 1,
    timeout_s: float = 3600.0,
    variables: Mapping[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Call `name` ("module:function") in `ranks` processes at once; returns what each returned, in order of rank.

    Arguments and results travel as JSON; `variables` are added to the environment. With several ranks the variables are
    set from which torch.distributed makes a process group. Raises RuntimeError, with the end of what was printed, if a
    process fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outs = [Path(scratch) / f"{rank}.json" for rank in range(ranks)]
        logs = [out.with_suffix(".log") for out in outs]
        processes = []
        try:
            for environment, out, log in zip(_environments(ranks), outs, logs, strict=True):
                command = [sys.executable, "-m", __name__, name, json.dumps(arguments), str(out)]
                with log.open("wb") as said:
                    processes.append(
                        subprocess.Popen(
                            command,
                            cwd=ROOT,
                            env=environment | dict(variables or {}),
                            stdout=said,
                            stderr=subprocess.STDOUT,
                        )
                    )
            codes = _wait(processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for code, log in sorted(zip(codes, logs, strict=True), key=lambda pair: not pair[0]):
            if code != 0:
                said = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
                raise RuntimeError("\n".join([f"{name} failed in its own process (exit {code}):", *said]))
        return [json.loads(out.read_text()) for out in outs]


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Exit codes, as soon as all have ended or one has failed: the others would wait for it."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.05)
    raise RuntimeError(f"{processes[0].args} did not end within {timeout_s:.0f} s")


def _environments(ranks: int) -> list[dict[str, str]]:
    common = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    if ranks == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    common |= address | {"WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def reset_peak() -> None:
    """From here on, `peak_bytes` counts anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """This process's peak resident memory since `reset_peak`, or since it started."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    wanted, given, out = sys.argv[1:]
    module, _, function = wanted.partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(given))
    Path(out).write_text(json.dumps(result))
