"""Population-based training: who goes on from whose weights, with what; that it is remembered; and a whole sweep."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from ray.tune import CheckpointConfig
from ray.tune.schedulers import TrialScheduler
from safetensors.torch import load_file, save_file

from cortex_core.eval.metric_names import LOSS, RECALL
from cortex_core.training.checkpoint import COUNTERS, TENSORS
from pipelines.config import RunConfig, load_config
from pipelines.population import Population, draw, mutation, seeded, within
from pipelines.runs import LAST, open_run, read_run
from pipelines.sweep_plan import trial_config
from pipelines.sweep_record import RESULTS_FILE, exchanges, recorded
from pipelines.toml_text import dump_toml
from tests import tiny
from tune_spaces.study import Choice, Real, Whole

ROOT = Path(__file__).parents[2]
RATE = "optimizer.learning_rate"
SPACE = {RATE: Real(1e-4, 1e-1, log=True)}
STEPS, EVERY = 9, 3


class ATrial:
    """As much of a trial as the scheduler looks at."""

    def __init__(self, name: str, rate: float) -> None:
        self.trial_id, self.config, self.status, self.experiment_tag = name, {RATE: rate}, "PENDING", ""
        manager = SimpleNamespace(checkpoint_config=CheckpointConfig())
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_status(self, status: str) -> None:
        self.status = status


class Sweep:
    """Four trials whose runs have folders, and Ray Tune's part in it."""

    search_alg = None

    def __init__(self, folder: Path) -> None:
        self.config = tiny.run_config(
            folder, training__steps=STEPS, validation__every_steps=EVERY, validation__gaps_tokens=[40]
        )
        self.trials: list[ATrial] = []

    def start(self) -> None:
        """The driver begins, or begins again: what trials and scheduler had in memory is gone."""
        self.population = Population(self.config.model_dump_json(), SPACE, 4)
        self.population.set_search_properties(LOSS, "min")
        self.trials = [ATrial(name, rate) for name, rate in zip("abcd", (1e-3, 2e-3, 4e-3, 8e-3), strict=True)]
        for trial in self.trials:
            self.population.on_trial_add(self, trial)  # type: ignore[arg-type]

    def get_trials(self) -> list[ATrial]:
        return self.trials

    def learn(self, name: str, step: int, loss: float) -> str:
        """A trial trains to a step, with a checkpoint there, and says how well."""
        trial = next(each for each in self.trials if each.trial_id == name)
        run, _ = open_run(trial_config(self.config, name, trial.config))
        folder = run.checkpoints / run.storage_name / LAST
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weights": torch.tensor([ord(name), step])}, folder / TENSORS)
        (folder / COUNTERS).write_text(json.dumps({"step": step}))
        run.update(state="KILLED")
        result = {"trial": name, "step": step, LOSS: loss, RECALL: 0.0, "sample": trial.config}
        with (self.config.run_dir / RESULTS_FILE).open("a") as file:
            file.write(json.dumps(result) + "\n")
        said = self.population.on_trial_result(self, trial, result)  # type: ignore[arg-type]
        trial.status = "PAUSED" if said == TrialScheduler.PAUSE else "RUNNING"
        return said

    def next(self) -> ATrial | None:
        """Who may start."""
        return self.population.choose_trial_to_run(self)  # type: ignore[arg-type, return-value]

    def run(self, name: str) -> RunConfig:
        return trial_config(self.config, name, {})

    def weights(self, name: str) -> list[int]:
        """Whose weights a trial goes on from, and of which step."""
        run = read_run(self.run(name).run_dir)
        assert run is not None
        newest = run.newest_checkpoint()
        assert newest is not None
        return load_file(newest / TENSORS)["weights"].tolist()


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """All trials have taken the first validation; c is the best and a the worst."""
    made = Sweep(tmp_path)
    made.start()
    for name, loss in (("a", 9.0), ("b", 2.0), ("c", 1.0), ("d", 3.0)):
        waiting = made.next()
        assert waiting is not None and waiting.trial_id == name, "the one that is furthest behind"
        assert made.learn(name, EVERY, loss) == TrialScheduler.PAUSE
    return made


def test_the_worst_goes_on_from_the_best_with_settings_near_its_own(sweep: Sweep) -> None:
    before = {name: sweep.weights(name) for name in "abcd"}
    assert sweep.next() is not None
    assert {name: sweep.weights(name) for name in "abcd"} == before | {"a": before["c"]}
    (exchange,) = exchanges(sweep.config.run_dir)
    (clone,) = exchange.clones
    assert (exchange.step, clone.trial, clone.source) == (EVERY, "a", "c")
    assert clone.sample[RATE] != sweep.trials[2].config[RATE] and sweep.trials[0].config == clone.sample
    run, resumed = open_run(trial_config(sweep.config, "a", clone.sample))
    assert resumed and run.attempt == 1, "a changed setting is not refused: the run's folder knows of it"
    assert load_config(run.config_file).optimizer.learning_rate == clone.sample[RATE]
    assert [trial.config[RATE] for trial in sweep.trials[1:]] == [2e-3, 4e-3, 8e-3]


def test_nothing_is_exchanged_before_all_have_come_so_far(tmp_path: Path) -> None:
    made = Sweep(tmp_path)
    made.start()
    for name in "abc":
        made.learn(name, EVERY, 1.0)
    made.trials[3].status = "RUNNING"
    assert made.next() is None and not exchanges(made.config.run_dir)
    made.trials[3].status = "ERROR"
    assert made.next() is not None and exchanges(made.config.run_dir), "nobody waits for one that has failed"


def test_a_loss_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    made = Sweep(tmp_path)
    made.start()
    for name, loss in zip("abcd", (4.0, float("nan"), 1.0, 3.0), strict=True):
        made.learn(name, EVERY, loss)
    made.next()
    assert [clone.trial for clone in exchanges(made.config.run_dir)[0].clones] == ["b"]


def test_at_the_last_step_nobody_takes_anything_over(sweep: Sweep) -> None:
    for step in (2 * EVERY, STEPS):
        sweep.next()
        said = [sweep.learn(name, step, 1.0) for name in "abcd"]
    assert said == [TrialScheduler.CONTINUE] * 4
    assert sweep.next() is None and [each.step for each in exchanges(sweep.config.run_dir)] == [EVERY, 2 * EVERY]


def test_an_interrupted_sweep_knows_what_was_decided(sweep: Sweep) -> None:
    """Ray Tune may have an older state of the trials on record, or none."""
    sweep.next()
    sweep.learn("b", 2 * EVERY, 2.0)
    cloned, decided = sweep.trials[0].config, exchanges(sweep.config.run_dir)
    sweep.start()
    assert sweep.trials[0].config == cloned and sweep.weights("a") == [ord("c"), EVERY]
    assert [trial.status for trial in sweep.trials] == ["PENDING", "PAUSED", "PENDING", "PENDING"], "b has to wait"
    assert exchanges(sweep.config.run_dir) == decided
    for name in "acd":
        sweep.learn(name, 2 * EVERY, 1.0)
    sweep.next()
    assert [clone.trial for clone in exchanges(sweep.config.run_dir)[1].clones] == ["b"]


def test_what_was_decided_is_carried_out_after_a_kill_and_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(Population, "_carry_out", lambda *_: pytest.exit)
        sweep.next()
    assert sweep.weights("a") == [ord("a"), EVERY] and len(exchanges(sweep.config.run_dir)) == 1
    sweep.start()
    assert sweep.weights("a") == [ord("c"), EVERY]
    sweep.learn("c", 2 * EVERY, 1.0)
    sweep.start()
    assert sweep.weights("a") == [ord("c"), EVERY], "what the other has learned since stays its own"


def test_settings_stay_in_their_ranges() -> None:
    space = {
        "rate": Real(1e-3, 1e-1, log=True),
        "windows": Whole(0, 40),
        "few": Whole(1, 3),
        "word": Choice(("x", "y")),
    }
    moved = within(space, {"rate": 0.12, "windows": -1, "few": 2, "word": "x"})
    assert moved == {"rate": 1e-1, "windows": 0, "few": 2, "word": "x"}
    assert mutation(space["few"]) == [1, 2, 3] and mutation(space["word"]) == ["x", "y"]
    with seeded("a"):
        one = [draw(space["rate"]) for _ in range(20)]
    with seeded("a"):
        assert [draw(space["rate"]) for _ in range(20)] == one and all(1e-3 <= value <= 1e-1 for value in one)
    assert {type(draw(space["windows"])) for _ in range(5)} == {int} and draw(space["word"]) in "xy"
    state = random.getstate()
    with seeded("b"):
        random.random()
    assert random.getstate() == state


STUDY = """
about = "a rate that is hopeless, and one that is not"
recipe = "RECIPE"
num_trials = 2
search = "pbt"
[overrides]
seed = 27
training.steps = 6
training.checkpoint_every_steps = 6
validation.every_steps = 3
validation.gaps_tokens = [40]
validation.num_examples = 8
evaluation.gaps_tokens = [0]
evaluation.num_examples = 6
evaluation.perplexity_tokens = 1024
cluster.cpus_per_worker = 0.5
[space]
optimizer.output_learning_rate = { low = 1e-11, high = 1e6, log = true }
"""
OUTPUT_RATE = "optimizer.output_learning_rate"


def command(out: Path, study: str, *options: str) -> list[str]:
    """The sweep, to be run in a process of its own."""
    recipe = tiny.run_config(out, cluster__num_workers=1, tasks__num_pairs=3)
    (out / "tiny.toml").write_text(dump_toml(recipe))
    (out / "study.toml").write_text(study.replace("RECIPE", str(out / "tiny.toml")))
    return [sys.executable, "-m", "pipelines.tune", str(out / "study.toml"), f"out_dir={out}", *options]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_hopeless_trial_goes_on_from_a_good_one(tmp_path: Path, mlflow_database: Callable[[Path], None]) -> None:
    """One trial at a time: each has to make room for the other. The seed is one with a good rate and a hopeless one."""
    mlflow_database(tmp_path)
    whole = command(tmp_path, STUDY, "--concurrent", "1")
    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "study"
    lines = [json.loads(text) for text in (folder / RESULTS_FILE).read_text().splitlines()]
    losses = {(each["trial"], each["step"]): each[LOSS] for each in lines}
    good, poor = sorted({each["trial"] for each in lines}, key=lambda name: losses[name, 3])
    assert len(lines) == 4 and losses[poor, 3] > losses[good, 3] + 1.0, losses
    assert losses[poor, 6] == pytest.approx(losses[good, 6], abs=0.2), losses
    assert [(c.trial, c.source) for each in exchanges(folder) for c in each.clones] == [(poor, good)]
    assert f"trial {poor}  takes over the weights of {good}: output_learning_rate" in done.stdout.replace(
        "optimizer.", ""
    )
    result = json.loads((folder / "sweep.json").read_text())
    assert [row["state"] for row in result["rows"]] == ["finished", "finished"]
    (row,) = [row for row in result["rows"] if row["trial"] == poor]
    assert [part["trial"] for part in row["schedule"]] == [good, poor]
    assert row["sample"][OUTPUT_RATE] == pytest.approx(row["schedule"][0]["sample"][OUTPUT_RATE], rel=0.21)
    _tracked(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), row, good)
    events = (json.loads(line) for line in (folder / "trials" / good / "events.jsonl").read_text().splitlines())
    ends = ("started", "resumed", "waiting", "finished")
    assert [each["event"] for each in events if each["event"] in ends] == ["started", "waiting", "resumed", "finished"]


def _tracked(client: MlflowClient, row: dict[str, Any], good: str) -> None:
    """The run of the trial that took over says so, with its first setting and its last, and has every step once."""
    run = client.get_run(row["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["sweep.weights_of"] == f"{good} at step 3"
    assert float(run.data.params[OUTPUT_RATE]) < 1e-4
    history = client.get_metric_history(run.info.run_id, f"sample/{OUTPUT_RATE}")
    assert [(point.step, point.value) for point in history] == [
        (0, pytest.approx(float(run.data.params[OUTPUT_RATE]))), (3, pytest.approx(row["sample"][OUTPUT_RATE])),
    ]  # fmt: skip
    _every_step_once(client, row, 6)


def _every_step_once(client: MlflowClient, row: dict[str, Any], last: int) -> None:
    steps = [point.step for point in client.get_metric_history(row["mlflow_run_id"], "loss")]
    assert steps == sorted(set(steps)) and steps[-1] == last


@pytest.mark.slow
@pytest.mark.nightly
def test_a_population_whose_driver_is_killed_goes_on_where_it_was(
    tmp_path: Path, mlflow_database: Callable[[Path], None]
) -> None:
    """Killed by SIGKILL when the first exchange is on record and one trial has gone on from there, the other not."""
    mlflow_database(tmp_path)
    study = STUDY.replace("training.steps = 6", "training.steps = 9")
    whole, folder = command(tmp_path, study, "--concurrent", "1"), tmp_path / "study"

    def heard(step: int) -> set[str]:
        return {each["trial"] for each in recorded(folder / RESULTS_FILE) if each["step"] == step}

    with (tmp_path / "said").open("w+") as said:
        driver = subprocess.Popen(whole, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while not heard(6):
                assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
                time.sleep(0.05)
            children = psutil.Process(driver.pid).children(recursive=True)
        finally:
            driver.kill()
            driver.wait()
    decided = exchanges(folder)
    assert [each.step for each in decided] == [3] and len(heard(6)) == 1, "killed in time"

    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = exchanges(folder)
    assert [each.step for each in made] == [3, 6] and made[:1] == decided
    rows = json.loads((folder / "sweep.json").read_text())["rows"]
    assert [row["state"] for row in rows] == ["finished", "finished"]
    assert all(heard(step) == {row["trial"] for row in rows} for step in (3, 6, 9))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for row in rows:
        _every_step_once(client, row, 9)
    # Ray's agents look once a minute whether the process that they serve is there.
    assert psutil.wait_procs(children, timeout=120)[1] == []
