"""Ray Tune for one sweep: what draws samples, what stops trials early, how it goes on after its driver was killed."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from cortex_core.eval.metric_names import LOSS
from pipelines.actors import HEAD
from pipelines.cluster import exported
from pipelines.population import Population
from pipelines.sweep_plan import SweepPlan
from pipelines.sweep_record import RESULTS_FILE, earlier
from pipelines.tracking import TrackedRun
from pipelines.trial import Trial
from tune_spaces.study import Choice, Domain, Real

TUNE_FOLDER = "tune"
"""Ray Tune's own state, in the sweep's folder. It is pickled: go on only with folders that nobody else may write to."""
REDUCTION, GRACE_FRAC = 3, 0.4
"""ASHA's: of the trials at a rung, one in three goes on. None is judged before two fifths of the steps or so are done:
by default, training is on short segments until then."""
SAVE_EVERY_S = "2"
QUIET = {
    "TUNE_GLOBAL_CHECKPOINT_S": SAVE_EVERY_S,  # a driver that is killed loses what came after the last one
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Rungs(ASHAScheduler):
    """ASHA that knows what trials had reached when the sweep was interrupted: Ray Tune forgets its scheduler then."""

    def __init__(self, results: str, steps: int, grace: int) -> None:
        # No rung at the last step: who is there has nothing left to be spared.
        super().__init__(
            time_attr="step", max_t=steps - 1, grace_period=grace, reduction_factor=REDUCTION, stop_last_trials=False
        )
        self._results = results

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Of a trial that was there before, take up what it had reported."""
        super().on_trial_add(tune_controller, trial)
        for result in earlier(Path(self._results), trial.trial_id):
            self._trial_info[trial.trial_id].on_result(trial, result["step"], self._metric_op * result[LOSS])


def search(plan: SweepPlan, parent: TrackedRun, mailboxes: Any, concurrent: int, follower: tune.Callback) -> bool:
    """Run the trials that have not ended. Returns whether all have; False after Ctrl-C or SIGTERM."""
    for name in ("ray.tune", "ray.train", "optuna"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    root, population = plan.config.run_dir / TUNE_FOLDER, plan.study.search == "pbt"
    trainable = tune.with_resources(
        tune.with_parameters(
            Trial,
            sweep=plan.config.model_dump_json(),
            mailboxes=mailboxes,
            parent_run_id=parent.run_id,
            waits=population,
        ),
        # Room is counted in workers, and given by `concurrent`: a trial that held CPUs while its workers wait for them
        # would wait for ever. It is pinned where the driver is, which does not go away. Of a population all trials are
        # there from the start: its room is a share of that node.
        tune.PlacementGroupFactory([{"CPU": 0.0, HEAD: 9900 // concurrent / 10_000 if population else 0.001}]),
    )
    with exported(QUIET), _sigterm_as_ctrl_c(parent):
        if any(root.glob("experiment_state-*.json")) and tune.Tuner.can_restore(str(root)):
            tuner = tune.Tuner.restore(str(root), trainable, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_space(plan),
                tune_config=_tune_config(plan, concurrent),
                run_config=tune.RunConfig(
                    name=TUNE_FOLDER,
                    storage_path=str(root.parent),
                    verbose=0,
                    callbacks=[follower],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run's folder has them
                ),
            )
        before = signal.getsignal(signal.SIGINT)
        try:
            tuner.fit()
            # Ray Tune puts this handler back when it was interrupted, and returns as if nothing had been.
            return signal.getsignal(signal.SIGINT) is not before
        finally:
            signal.signal(signal.SIGINT, before)


def _tune_config(plan: SweepPlan, concurrent: int) -> tune.TuneConfig:
    study, steps = plan.study, plan.config.training.steps
    results = str(plan.config.run_dir / RESULTS_FILE)
    every = plan.config.validation.every_steps
    grace = max(every, round(GRACE_FRAC * steps / every) * every)
    algorithm = BasicVariantGenerator(random_state=plan.config.seed, max_concurrent=concurrent)
    scheduler = FIFOScheduler()
    if study.search == "tpe":
        algorithm = OptunaSearch(seed=plan.config.seed)
    if study.search == "pbt":
        algorithm = BasicVariantGenerator(random_state=plan.config.seed)
        scheduler = Population(plan.config.model_dump_json(), study.space, study.num_trials)
    elif plan.stop_early and grace < steps:
        scheduler = Rungs(results, steps, grace)
    return tune.TuneConfig(
        metric=LOSS,
        mode="min",
        num_samples=1 if study.search == "grid" else study.num_trials,
        search_alg=algorithm,
        scheduler=scheduler,
        max_concurrent_trials=concurrent if study.search == "tpe" else None,
        reuse_actors=True,
        trial_dirname_creator=_folder_name,
    )


def _folder_name(trial: Any) -> str:
    return trial.trial_id


def _space(plan: SweepPlan) -> dict[str, Any]:
    if plan.study.search == "grid":
        points = plan.study.grid_points
        return {name: tune.grid_search(of.grid(points)) for name, of in plan.study.space.items()}
    return {name: _domain(of) for name, of in plan.study.space.items()}


def _domain(of: Domain) -> Any:
    if isinstance(of, Choice):
        return tune.choice(list(of.values))
    if isinstance(of, Real):
        return tune.loguniform(of.low, of.high) if of.log else tune.uniform(of.low, of.high)
    return tune.lograndint(of.low, of.high + 1) if of.log else tune.randint(of.low, of.high + 1)


@contextmanager
def _sigterm_as_ctrl_c(parent: TrackedRun) -> Iterator[None]:
    """Ray Tune saves its state on SIGINT; on SIGTERM, which ends a submitted job, it would not.

    A job that is stopped has three seconds, less than trials may need to end: what MLflow says is said at once.
    """

    def close() -> None:
        parent.interrupted()
        parent.close_children()

    def handle(*_: object) -> None:
        threading.Thread(target=close, daemon=True).start()
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
