"""Runs that rows train for themselves: the demo's recipe with a few settings changed, beside the demo's own folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.child import ROOT


def evaluation(out_dir: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation of `cortex train demo` with these settings; a run that is finished is not trained again.

    Raises RuntimeError, with its last words.
    """
    from pipelines.runs import STATE_FILE

    folder = out_dir / name
    state = folder / STATE_FILE
    if not (state.is_file() and json.loads(state.read_text())["state"] == "FINISHED"):
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        command = [sys.executable, "-m", "pipelines.train", "demo", f"name={name}", f"out_dir={out_dir}", *given]
        done = subprocess.run(
            command, check=False, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return json.loads((folder / "evaluation.json").read_text())
