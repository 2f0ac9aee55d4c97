"""A trial alone, its run in this process: what it says at the end when it has nothing left to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cortex_core.errors import DataError
from cortex_core.eval.metric_names import LOSS, RECALL
from pipelines.events import EVENTS_FILE
from pipelines.mailbox import Mailboxes
from pipelines.metric_log import latest
from pipelines.runs import finished_run, read_run, take_over
from pipelines.sweep_plan import trial_config
from pipelines.sweep_record import Clone, Exchange, write_exchanges
from pipelines.trial import CLONED_TAG, ENDED, Trial
from tests import tiny

RANK = {"fast_weights.rank": 4}


def results(sweep: str, sample: Mapping[str, Any] = RANK, waits: bool = False) -> list[dict[str, Any]]:
    """Everything that a new trial of one name reports, to its end, or to where it waits."""

    class Alone(Trial):
        def setup(self, config: dict[str, Any], **given: Any) -> None:
            super().setup(config, sweep=sweep, mailboxes=Mailboxes(), waits=waits)

    trial = Alone(config=dict(sample))
    try:
        found = [trial.step()]
        while ENDED not in found[-1] and (not waits or found[-1]["step"] == 6):
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

    config = trial_config(sweep, "default", RANK)
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


def test_a_trial_of_a_population_waits_and_goes_on_with_other_settings(
    tmp_path: Path, mlflow_database: Callable[[Path], None]
) -> None:
    """Here from its own weights. What it says twice, because nobody heard it, is trained once."""
    mlflow_database(tmp_path)
    asked = {"validation__every_steps": 3, "validation__gaps_tokens": [40], "validation__num_examples": 4}
    sweep = tiny.run_config(tmp_path, tasks__num_pairs=3, **asked)
    name, before, after = (
        "optimizer.learning_rate",
        {"optimizer.learning_rate": 1e-2},
        {"optimizer.learning_rate": 1e-3},
    )
    first = results(sweep.model_dump_json(), before, waits=True)
    assert [result["step"] for result in first] == [3]
    assert results(sweep.model_dump_json(), before, waits=True) == first

    config = trial_config(sweep, "default", after)
    run = read_run(config.run_dir)
    assert run is not None and run.state == "KILLED" and not (config.run_dir / "evaluation.json").exists()
    write_exchanges(sweep.run_dir, [Exchange(3, (Clone("default", "another", after, 1),))])
    take_over(config, config.run_dir, attempt=1)
    last = results(sweep.model_dump_json(), after, waits=True)
    assert [result["step"] for result in last] == [6, 6] and ENDED in last[-1]
    done = finished_run(config)
    assert done is not None and done.mlflow_run_id == run.mlflow_run_id
    client, id_ = MlflowClient(tracking_uri=config.tracking_uri), str(run.mlflow_run_id)
    values = [(point.step, point.value) for point in client.get_metric_history(id_, f"sample/{name}")]
    assert values == [(0, 1e-2), (3, 1e-3)]
    tracked = client.get_run(id_)
    assert tracked.data.tags[CLONED_TAG] == "another at step 3" and tracked.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(id_, "loss")]
    assert steps == sorted(set(steps)) and steps[-1] == 6
