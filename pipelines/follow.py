"""What a sweep says while it runs, and the record that it keeps: each validation of each trial as it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from cortex_core.eval.metric_names import LOSS, RECALL
from pipelines.config import RunConfig
from pipelines.progress import line_printer
from pipelines.sweep_record import RESULTS_FILE, exchanges
from pipelines.trial import ENDED

FAILURES_FILE = "failures.jsonl"


class Follower(tune.Callback):
    """Prints a line per validation, end and failure of a trial; appends results and failures to files.

    Ray Tune pickles it with its own state: it holds no open file and no console.
    """

    def __init__(self, config: RunConfig, total: int) -> None:
        self._results = config.run_dir / RESULTS_FILE
        self._failures = config.run_dir / FAILURES_FILE
        self._name, self._total, self._steps = config.name, total, config.training.steps

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial begins, or goes on. One of a population goes on after each validation."""
        sample = "  ".join(f"{name}={shown(value)}" for name, value in trial.config.items())
        made = exchanges(self._results.parent)
        if not made:
            self._say(trials, trial, sample)
        for clone in made[-1].clones if made else ():
            if clone.trial == trial.trial_id:
                self._say(trials, trial, f"takes over the weights of {clone.source}: {sample}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called after each validation; the end of a trial repeats the last one."""
        line = {
            "trial": trial.trial_id, "step": result["step"], LOSS: result[LOSS], RECALL: result[RECALL],
            "sample": trial.config,
        }  # fmt: skip
        if ENDED not in result:
            with self._results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            numbers = f"loss {result[LOSS]:.3f}  recall {result[RECALL]:.1%}"
            self._say(trials, trial, f"step {result['step']}/{self._steps}  {numbers}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial has ended, by itself or because it was stopped."""
        self._say(trials, trial, "finished" if ENDED in trial.last_result else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial has failed. The sweep goes on with the others."""
        said = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        reason = (said.strip().splitlines() or ["no reason was given"])[-1][:300]
        with self._failures.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": trial.trial_id, "sample": trial.config, "reason": reason}) + "\n")
        self._say(trials, trial, f"failed: {reason}")

    def _say(self, trials: list[Any], trial: Any, text: str) -> None:
        ended = sum(each.is_finished() for each in trials)
        line_printer(Console(), self._name)(f"{ended}/{self._total} ended  trial {trial.trial_id}  {text}")


def shown(value: object) -> str:
    """A sample's value with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
