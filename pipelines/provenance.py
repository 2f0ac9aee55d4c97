"""What a run was made from, in MLflow: its settings, the git revision, and what differed from that."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import RunConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DIFF_FILE = "source.diff"
MAX_PARAMS_PER_CALL, MAX_PARAM_CHARACTERS, MAX_DIFF_BYTES = 100, 6000, 5_000_000


def log_config(client: MlflowClient, run: Run, config: RunConfig) -> None:
    """Parameters in MLflow are written once; a resumed run that has other values now says so in tags."""
    before, now = run.data.params, _flatten(config.model_dump(mode="json"))
    log_params(client, run, now)
    for name, value in now.items():
        if before.get(name, value) != value:
            client.set_tag(run.info.run_id, f"resumed_with.{name}", value)


def log_params(client: MlflowClient, run: Run, values: Mapping[str, str]) -> None:
    """Those that `run` does not have yet."""
    from mlflow.entities import Param

    new = [Param(name, value[:MAX_PARAM_CHARACTERS]) for name, value in values.items() if name not in run.data.params]
    for first in range(0, len(new), MAX_PARAMS_PER_CALL):
        client.log_batch(run.info.run_id, params=new[first : first + MAX_PARAMS_PER_CALL])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[prefix + name] = text[:MAX_PARAM_CHARACTERS]
    return flat


def log_source(client: MlflowClient, run_id: str) -> None:
    """Which code this is. An installed package has no revision, which is fine."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return  # or it lies, installed, inside somebody else's repository
    revision = _git("rev-parse", "HEAD") or ""
    client.set_tag(run_id, "mlflow.source.git.commit", revision.strip())
    changed = _git("status", "--porcelain") or ""
    client.set_tag(run_id, "source.dirty", str(bool(changed)).lower())
    if changed:
        diff = f"{changed}\n{_git('diff', 'HEAD') or ''}"
        client.log_text(run_id, diff[:MAX_DIFF_BYTES], DIFF_FILE)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
