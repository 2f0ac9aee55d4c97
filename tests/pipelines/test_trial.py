"""A trial alone, its run in this process: what it says at the end when it has nothing left to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cortex_core.errors import DataError
from cortex_core.eval.metric_names import LOSS, RECALL
from pipelines.events import EVENTS_FILE
from pipelines.mailbox import Mailboxes
from pipelines.metric_log import latest
from pipelines.runs import finished_run
from pipelines.sweep_plan import trial_config
from pipelines.trial import ENDED, Trial
from tests import tiny


def results(sweep: str) -> list[dict[str, Any]]:
    """Everything that a new trial of one name reports, to its end."""

    class Alone(Trial):
        def setup(self, config: dict[str, Any], **given: Any) -> None:
            super().setup(config, sweep=sweep, mailboxes=Mailboxes())

    trial = Alone(config={"fast_weights.rank": 4})
    try:
        found = [trial.step()]
        while ENDED not in found[-1]:
            found.append(trial.step())
    finally:
        trial.cleanup()
    return found


@pytest.mark.parametrize("state", ["FINISHED", "KILLED"])
def test_a_trial_that_has_taken_all_its_steps_says_again_what_came_of_it(
    state: str, tmp_path: Path, mlflow_database: Callable[[Path], None]
) -> None:
    """The driver may be killed before Ray Tune has on record that a trial ended, or during its last evaluation."""
    mlflow_database(tmp_path)
    asked = {"validation__every_steps": 3, "validation__gaps_tokens": [40], "validation__num_examples": 4}
    sweep = tiny.run_config(tmp_path, tasks__num_pairs=3, **asked)
    first = results(sweep.model_dump_json())
    assert [result["step"] for result in first] == [3, 6, 6]
    assert first[-1] == first[-2] | {"done": True, ENDED: True}

    config = trial_config(sweep, "default", {"fast_weights.rank": 4})
    record = finished_run(config)
    assert record is not None
    evaluation = config.run_dir / "evaluation.json"
    happened = [json.loads(line)["event"] for line in (config.run_dir / EVENTS_FILE).read_text().splitlines()]
    assert happened == [
        "started", "cluster ready", *["checkpoint written"] * 3, "evaluation begun", "checkpoint written", "finished",
    ]  # fmt: skip
    record, written = record.update(state=state), evaluation.stat().st_mtime_ns
    again = results(sweep.model_dump_json())
    assert again == first[-2:]
    assert (evaluation.stat().st_mtime_ns == written) == (state == "FINISHED"), "finished: not done again"
    assert finished_run(config) == record.update(state="FINISHED")
    assert latest(config.tracking_uri, str(record.mlflow_run_id), [LOSS, RECALL]) == {
        name: again[0][name] for name in ("step", LOSS, RECALL)
    }
    with pytest.raises(DataError, match="has no absent of its last step; start this run anew"):
        latest(config.tracking_uri, str(record.mlflow_run_id), [LOSS, "absent"])
