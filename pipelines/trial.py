"""One trial of a sweep: a run of Ray Train that Ray Tune can follow, stop early and go on with."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.tune import Trainable

from cortex_core.eval.metric_names import LOSS, RECALL
from cortex_core.training.checkpoint import step_of
from pipelines import cluster, tracking
from pipelines.actors import ask, send
from pipelines.config import SIDECARS_FOLDER, RunConfig
from pipelines.events import EventCallback, EventLog
from pipelines.launch import launch
from pipelines.metric_log import latest
from pipelines.runs import finished_run, locked, open_run
from pipelines.sweep_plan import trial_config
from pipelines.sweep_record import clones_of, exchanges
from pipelines.tracking import TrackedRun
from pipelines.train import begin, publish_evaluation

POLL_S, ABORT_TIMEOUT_S = 0.3, 8.0
ENDED = "ended"
"""In the last result of a trial that has taken all its steps. Ray Tune says `done` of one that it stops, too."""
CLONED_TAG = "sweep.weights_of"


class Trial(Trainable):
    """Starts the run in a thread and hands on what its workers' validations say; the end of the run is its last result.

    A result has `step`, LOSS and RECALL. The last one has ENDED as well. A trial that was interrupted goes on from its
    last checkpoint, because the folder of its run does.

    One of a population `waits`: its run ends at each validation, so that nothing is learned while it is decided whose
    weights it goes on with (`population.Population`, in the run's folder).
    """

    def setup(
        self,
        config: dict[str, Any],
        sweep: str = "",
        mailboxes: Any = None,
        parent_run_id: str = "",
        waits: bool = False,
    ) -> None:
        """`sweep`: the run that is varied, as JSON; `mailboxes`: of `Mailboxes`, an actor's handle."""
        cluster.quiet_worker()
        self._waits = waits
        self._sweep, self._mailboxes, self._parent = RunConfig.model_validate_json(sweep), mailboxes, parent_run_id
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune gives this process to another trial: starting one takes seconds."""
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next validation. Raises what the run raised."""
        while True:
            alive = self._thread.is_alive()  # before the look into the mailbox: what it left there is seen
            for report in self._new_reports():
                if LOSS in report:
                    self._last = {name: report[name] for name in ("step", LOSS, RECALL)}
                    if self._whole:
                        return dict(self._last)
            if not alive:
                self._events.close(self._error, waits=not self._whole)
                if self._error is not None:
                    raise self._error
                heard = bool(self._last)
                if not heard:  # all steps were taken before this part of the sweep
                    self._last = latest(self._config.tracking_uri, self._run_id, (LOSS, RECALL))
                return self._last | {"done": True, ENDED: True} if heard and self._whole else dict(self._last)
            time.sleep(POLL_S)

    def cleanup(self) -> None:
        """Stop the run if it goes on. Its last checkpoint stays, and its status in MLflow becomes KILLED."""
        self._stopping = True
        if self._thread.is_alive():
            for _ in self._new_reports():
                pass
            if self._controller is not None:
                _abort(self._controller)
            self._thread.join(ABORT_TIMEOUT_S)
        self._events.close(KeyboardInterrupt() if self._thread.is_alive() else self._error, waits=not self._whole)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """The run's folder is the state. Ray Tune asks for one before a trial may wait."""
        return dict(self._last)

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to do: `_begin` has found the run's folder."""

    def _new_reports(self) -> Iterator[dict[str, Any]]:
        """What the run has said since, one at a time: a report that is not taken is there the next time."""
        for number, report in ask(self._mailboxes.after, self._box, self._seen, timeout_s=60.0):
            self._seen = number
            self._controller = report.get("controller", self._controller)
            if "event" in report:
                self._events.add(report)
            else:
                yield report

    def _begin(self, sample: Mapping[str, Any]) -> None:
        self._config, self._sample = trial_config(self._sweep, self.trial_id, sample), dict(sample)
        made = exchanges(self._sweep.run_dir) if self._waits else []
        after = (made[-1].step if made else 0) + self._sweep.validation.every_steps
        self._until = min(after, self._config.training.steps) if self._waits else self._config.training.steps
        self._whole = self._until == self._config.training.steps
        self._box = f"{self.trial_id} to {self._until}"
        self._seen, self._last, self._error, self._run_id = 0, dict[str, Any](), None, ""
        self._stopping, self._controller = False, None
        self._events = EventLog(self._config.run_dir, self._config.name)
        self._thread = threading.Thread(target=self._work, name=f"run of {self.trial_id}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            with locked(self._config.run_dir):
                self._run()
        except BaseException as error:
            self._error = error

    def _run(self) -> None:
        """`pipelines.train.work` without a terminal. A run that has ended unheard by any sweep is not done anew."""
        done = finished_run(self._config)
        if done is not None and done.mlflow_run_id is not None:
            self._run_id = done.mlflow_run_id
            return
        record, resumed = open_run(self._config)
        with tracking.start(self._config, run_id=record.mlflow_run_id, parent_run_id=self._parent) as tracked:
            record = record.update(mlflow_run_id=tracked.run_id, state="KILLED")  # true until it is done
            self._run_id = tracked.run_id
            begin(self._events, tracked, record, resumed)
            newest = record.newest_checkpoint()
            since = (step_of(newest) if newest else None) or 0
            if since >= self._until and not self._whole:  # an earlier part of the sweep has not heard of it
                tracked.finish("KILLED")
                return
            if self._waits:
                self._say_sample(tracked, since)
            self._events.write("cluster ready", workers=self._config.cluster.num_workers, nodes=cluster.num_nodes())
            post = Post(self._mailboxes, self._box)
            callbacks = [tracked.callback(), post, Introduce(post), EventCallback(post.post, tracked.unsent)]
            try:
                finished = launch("train", self._config, record, callbacks, until_step=self._until)
            except Exception:
                if self._stopping:
                    raise KeyboardInterrupt from None  # it was ended, it has not failed
                raise
            if not self._whole:
                tracked.finish("KILLED")  # it waits, and may do so for ever
                return
            publish_evaluation(self._config, finished, finished / SIDECARS_FOLDER, tracked)
            record.publish_config()
        record.update(state="FINISHED")

    def _say_sample(self, tracked: TrackedRun, since: int) -> None:
        """In MLflow, where parameters cannot change: from which step on a setting had which value, and whose weights
        were taken over."""
        tracked.log_metrics({f"sample/{name}": value for name, value in self._sample.items()}, since)
        clones = clones_of(self.trial_id, exchanges(self._sweep.run_dir))
        if clones:
            text = ", ".join(f"{clone.source} at step {step}" for step, clone in clones.items())
            tracked.log_tags({CLONED_TAG: text})


class Post(UserCallback):
    """Leaves what rank 0 reports in the trial's mailbox. Runs on Ray Train's controller."""

    def __init__(self, mailboxes: Any, name: str) -> None:
        self._mailboxes, self._name = mailboxes, name

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called with one dict per rank after all of them have reported."""
        self.post(metrics[0])

    def post(self, report: dict[str, Any]) -> None:
        """Without waiting, and without a word if the mailboxes are gone: the sweep has ended, then."""
        with contextlib.suppress(RayError):
            send(self._mailboxes.post, self._name, report)


class Introduce(ControllerCallback):
    """Tells the trial who its controller is: the only one who can end the run and give its resources back."""

    def __init__(self, post: Post) -> None:
        self._post = post

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called once, on the controller."""
        self._post.post({"controller": ray.get_runtime_context().current_actor})


def _abort(controller: Any) -> None:
    with contextlib.suppress(RayError):  # it ends itself when it is done; or it is too busy to answer
        ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
    ray.kill(controller)
