"""One line that says where the run is: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.train import Checkpoint, ControllerError, Result, UserCallback
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from cortex_core.errors import FINAL_ERRORS
from pipelines.actors import Gauges, ask, on_head, send
from pipelines.events import EventLog, reason
from pipelines.mailbox import Mailbox

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from pipelines.tracking import TrackedRun

PHASES = ("loading the backbone", "training", "evaluating", "collecting results", "reading and sleeping",
          "reading", "fitting codes")  # fmt: skip
"""What the number `phase` of a worker's report means."""
PLAIN_EVERY_S, STILL_EVERY_S, POLL_S, ABORT_TIMEOUT_S = 10.0, 60.0, 0.5, 20.0


class ProgressCallback(UserCallback):
    """Posts what rank 0 reports, and failures of workers, into a mailbox: an object, or an actor's handle."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called with one dict per rank after all of them have reported."""
        self.post(dict(metrics[0]))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called when workers have failed; Ray Train then starts them again or gives up."""
        rank, error = min(worker_exceptions.items())
        self.post({"failure": f"worker {rank} failed: {reason(error)}"})

    def post(self, item: dict[str, Any]) -> None:
        """Without waiting, and without a word if the mailbox is gone."""
        with contextlib.suppress(RayError):  # nobody trains less well for want of a progress bar
            send(self._mailbox.post, item)


class Refusals(UserCallback):
    """Ends a run whose workers raise what they would raise again: wrong input, a training that has diverged."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises that error, which Ray Train's controller does not forgive, and `run_to_end` hands on."""
        for error in worker_exceptions.values():
            raised = getattr(error, "_base_exc", error)
            if isinstance(raised, FINAL_ERRORS):
                raise raised


def line_printer(console: Console, run: str) -> Callable[[str], None]:
    """Prints a line of text. Anywhere but on a terminal it begins with the run's name, for logs of several may lie side
    by side."""
    prefix = f"{run}: " if run and not console.is_terminal else ""
    return lambda text: console.print(prefix + text, highlight=False, soft_wrap=True, markup=False, emoji=False)


class Progress:
    """Shows phases, then step, loss, accuracy, tokens per second and the time left.

    Reports may hold `phase` (an index into PHASES), `step`, `done_frac` (share of the training's work, for steps differ
    in length), `evaluated_frac` and metrics. They come through `callback()`, polled by a thread, with Ray or without.
    So do events, which go on to `events`.
    """

    def __init__(
        self, console: Console | None = None, *, total: int, run: str = "", events: EventLog | None = None
    ) -> None:
        self._console, self._total, self._events = console or Console(), total, events
        self._run, self._print = run, line_printer(self._console, run)
        self._phase, self._numbers = "", ""
        self._first: tuple[float, float] | None = None  # share of the work done at the first report, and when
        self._phase_began = self._said = self._news = time.monotonic()
        self._mailbox: Any = None
        self._seen = 0
        self._workers: int | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._bar, self._task = None, TaskID(0)
        if self._console.is_terminal:
            self._bar = Bar(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(),
                TextColumn("{task.fields[numbers]}", style="dim"), console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=None, numbers="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *exit_: object) -> None:
        self._closing.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def callback(self) -> ProgressCallback:
        """For Ray Train's `RunConfig(callbacks=[...])`, once Ray runs; without, call its `after_report`."""
        there = ray.is_initialized()
        self._mailbox, self._seen = on_head(Mailbox, on_change=Gauges(self._run)) if there else Mailbox(), 0
        return ProgressCallback(self._mailbox)

    @contextlib.contextmanager
    def listening(self) -> Iterator[ProgressCallback]:
        """`callback()` for the length of a block; at its end, what was posted is taken in."""
        try:
            yield self.callback()
        finally:
            self.catch_up()

    def catch_up(self) -> None:
        """Take in what was posted so far."""
        with self._lock:
            self._drain()

    def phase(self, name: str) -> None:
        """From now on the run is busy with `name`."""
        with self._lock:
            self._drain()
            self._begin(name)

    def show(self, report: Mapping[str, Any]) -> None:
        """Take in one report."""
        with self._lock:
            self._take_in(report)

    # --- what follows runs under the lock; the thread takes it itself

    def _follow(self) -> None:
        while not self._closing.wait(POLL_S):
            with self._lock:
                self._drain()
                if self._bar is None and time.monotonic() - max(self._said, self._news) > STILL_EVERY_S:
                    self._say(f"{self._phase}, {_duration(time.monotonic() - self._phase_began)} so far")
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        if self._mailbox is None:
            return
        try:
            for number, report in ask(self._mailbox.after, self._seen, timeout_s=2.0):
                self._seen = number
                self._take_in(report)
        except Exception:  # Ray is being shut down, or too busy: there is nothing to show, that is all
            return

    def _take_in(self, report: Mapping[str, Any]) -> None:
        self._news = time.monotonic()
        if "event" in report and self._events is not None:
            self._events.add(report)
        if "failure" in report:
            self._say(report["failure"])
            self._first = None
            self._begin("starting the workers again")
        if "phase" in report:
            self._begin(PHASES[int(report["phase"])])
        if "workers" in report:
            self._as_many(int(report["workers"]), int(report["num_workers"]))
        if damaged := int(report.get("damaged_checkpoints", 0)):
            self._say(_passed_over(damaged, int(report["resumed_step"])))
        if "evaluated_frac" in report:
            self._draw(report["evaluated_frac"], 1.0, "")
        elif "step" in report and self._phase in (PHASES[1], PHASES[4], PHASES[5]):
            self._step(int(report["step"]), report)

    def _as_many(self, workers: int, wanted: int) -> None:
        """Of a run whose number of workers may change, it is said where it is not what is wanted, or has changed."""
        if workers != (self._workers or max(wanted, 1)):
            self._say(f"{workers} of {wanted} workers")
            self._first = None
        self._workers = workers

    def _begin(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase, self._phase_began = phase, time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, total=None, description=phase, numbers="")
        else:
            self._say(phase)

    def _step(self, step: int, report: Mapping[str, Any]) -> None:
        now, share = time.monotonic(), float(report.get("done_frac", step / self._total))
        self._first = self._first or (share, now)
        parts = [f"step {step}/{self._total}"]
        for name, text in SHOWN.items():
            if name in report:
                parts.append(text(float(report[name])))
        done, elapsed = share - self._first[0], now - self._first[1]
        if done > 0 and step < self._total:
            parts.append(f"{_duration(elapsed / done * (1 - share))} left")
        self._draw(step, self._total, "  ".join(parts))

    def _draw(self, completed: float, total: float, numbers: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, total=total, numbers=numbers)
        elif completed >= total or time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._say(f"{self._phase}  {numbers or f'{completed / total:.0%}'}")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._print(text)


def run_to_end(trainer: TorchTrainer, on_interrupt: Callable[[], None] = lambda: None) -> Result:
    """`trainer.fit()`, which Ctrl-C ends cleanly: workers stopped, then KeyboardInterrupt. A second Ctrl-C
    forces.

    Fitting a trainer of the same name and storage path resumes from its last checkpoint. Raises what `fit` raises, but
    one of FINAL_ERRORS of a worker as itself.
    """
    controllers: list[Any] = []
    # Ray's own handler stays installed after the run and ends the process as if all were well. This is where
    # `fit` would install it, and the only place where it shows its controller.
    trainer._register_sigint_handler = controllers.append  # type: ignore[method-assign]
    try:
        return trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, FINAL_ERRORS):
            raise error.controller_failure from None
        raise
    except KeyboardInterrupt:
        on_interrupt()
        for controller in controllers:
            _abort(controller)
        raise


def _abort(controller: Any) -> None:
    try:
        ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
    except RayError:  # it ends itself when it is done; or it is too busy to answer
        pass
    finally:
        ray.kill(controller)


SHOWN: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.3f}".format,
    "accuracy": "accuracy {:.1%}".format,
    "sleep/known_frac": "known {:.1%}".format,
    "throughput/tokens_per_s": lambda rate: f"{_thousands(rate)} tokens/s",
}
"""Metrics that the line shows, in this order."""


def _passed_over(damaged: int, step: int) -> str:
    what = "the newest checkpoint is" if damaged == 1 else f"the newest {damaged} checkpoints are"
    return f"{what} damaged: going on from {f'the one before, of step {step}' if step else 'the start'}"


def _thousands(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_where(places: Mapping[str, object], tracked: TrackedRun, console: Console) -> None:
    """The last lines of a command: what MLflow did not take, where everything is, where MLflow shows it."""
    print_problems(tracked, console)
    command = tracked.ui_command()
    shown = f"{tracked.url}   (start it: {command})" if command else tracked.url
    for what, where in [*places.items(), ("MLflow", shown)]:
        console.print(f"{what:<9} {where}", soft_wrap=True, highlight=False)


def print_problems(tracked: TrackedRun, console: Console) -> None:
    """Close the run in MLflow; a line for each thing that it did not take."""
    for problem in tracked.finish():
        console.print(f"[yellow]{problem}[/]", soft_wrap=True)
