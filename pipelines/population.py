"""Population-based training (Jaderberg et al. 2017) with Ray Tune's scheduler: poor trials go on from good ones.

All trials wait at each validation until the last has taken it. Then each of the worst quarter takes over the weights of
one of the best, with settings near that one's. Nothing runs while that is decided, so it is done in the runs' folders.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from cortex_core.eval.metric_names import LOSS
from pipelines.config import RunConfig
from pipelines.runs import read_run, take_over
from pipelines.sweep_plan import TRIALS_FOLDER, trial_config
from pipelines.sweep_record import RESULTS_FILE, Clone, Exchange, clones_of, earlier, exchanges, write_exchanges
from tune_spaces.study import Choice, Domain, Real

QUANTILE, RESAMPLE = 0.25, 0.25
"""Share of trials that is replaced, by as many; how often a setting is drawn anew instead of moved by a fifth."""
FEW = 8
"""A range of so many whole numbers is gone through one by one: a fifth of a small number rounds to nothing."""


class Population(PopulationBasedTraining):
    """Ray's PBT, `synch`, that goes on after an interruption: every exchange is on record before it is carried out.

    Ray's own hangs if the trial that the others wait for fails, and after a restart, when it has forgotten everything.
    """

    def __init__(self, sweep: str, space: Mapping[str, Domain], num_trials: int) -> None:
        """`sweep`: the run that is varied, as JSON."""
        self._sweep, self._num_trials = RunConfig.model_validate_json(sweep), num_trials
        self._folder, self._steps = self._sweep.run_dir, self._sweep.training.steps
        super().__init__(
            time_attr="step",
            perturbation_interval=self._sweep.validation.every_steps,
            hyperparam_mutations={name: mutation(of) for name, of in space.items()},
            quantile_fraction=QUANTILE,
            resample_probability=RESAMPLE,
            custom_explore_fn=partial(within, dict(space)),
            log_config=False,
            synch=True,
        )

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Of a trial that was there before, take up what it had reported and what was decided for it."""
        super().on_trial_add(tune_controller, trial)
        made = exchanges(self._folder)
        decided = made[-1].step if made else 0
        self._next_perturbation_sync = decided + self._perturbation_interval
        before = [r for r in earlier(self._folder / RESULTS_FILE, trial.trial_id) if r["step"] < self._steps]
        if not before or trial.is_finished():
            return
        state, last = self._trial_state[trial], before[-1]
        self._save_trial_state(state, last["step"], last, trial)
        clone = clones_of(trial.trial_id, made).get(last["step"])
        if clone is not None:
            self._carry_out(clone)
        trial.set_config(clone.sample if clone else last["sample"])
        if last["step"] >= self._next_perturbation_sync:
            trial.set_status(Trial.PAUSED)  # it waits for the others; Ray Tune would start it

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """A trial waits after each validation but the last: whoever is there has nothing left to learn."""
        if result["step"] >= self._steps:
            return TrialScheduler.CONTINUE
        self._save_trial_state(self._trial_state[trial], result["step"], result, trial)
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The trial that is furthest behind; once none is, the exchange comes first."""
        live = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        due = all(
            trial.status == Trial.PAUSED and self._trial_state[trial].last_train_time >= self._next_perturbation_sync
            for trial in live
        )
        if live and due and len(tune_controller.get_trials()) == self._num_trials:
            self._exchange()
        return super().choose_trial_to_run(tune_controller)

    def _exchange(self) -> None:
        step = int(self._next_perturbation_sync)
        lower, upper = self._quantiles()
        clones: dict[Trial, Clone] = {}
        with seeded(f"{self._sweep.seed} {step}"):
            for trial in lower:
                clone = self._clone(trial, random.choice(upper))
                if clone is not None:
                    clones[trial] = clone
        write_exchanges(self._folder, [*exchanges(self._folder), Exchange(step, tuple(clones.values()))])
        for trial, clone in clones.items():
            self._carry_out(clone)
            trial.set_config(clone.sample)
        self._next_perturbation_sync = step + self._perturbation_interval

    def _clone(self, trial: Trial, source: Trial) -> Clone | None:
        """None if there is nothing to take over."""
        mine, other = (read_run(self._folder / TRIALS_FOLDER / each.trial_id) for each in (trial, source))
        if mine is None or other is None or other.newest_checkpoint() is None:
            return None
        sample, _ = self._get_new_config(trial, source)
        return Clone(trial.trial_id, source.trial_id, sample, mine.attempt + 1)

    def _carry_out(self, clone: Clone) -> None:
        config = trial_config(self._sweep, clone.trial, clone.sample)
        take_over(config, self._folder / TRIALS_FOLDER / clone.source, clone.attempt)

    def _save_trial_state(self, state: Any, time: int, result: dict[str, Any], trial: Trial) -> float:
        """A loss that is not a number is the worst one. Ray leaves such a trial alone."""
        loss = result[LOSS] if math.isfinite(result[LOSS]) else math.inf
        return super()._save_trial_state(state, time, {**result, LOSS: loss}, trial)


def mutation(of: Domain) -> Any:
    """A range as Ray's PBT has it: a list to go through step by step, or a function that draws."""
    if isinstance(of, Choice):
        return list(of.values)
    if not isinstance(of, Real) and of.high - of.low < FEW:
        return list(range(of.low, of.high + 1))
    return partial(draw, of)


def draw(of: Domain) -> Any:
    """A value of the range, from `random`."""
    if isinstance(of, Choice):
        return random.choice(of.values)
    share = random.random()
    value = of.low * (of.high / of.low) ** share if of.log else of.low + (of.high - of.low) * share
    return value if isinstance(of, Real) else round(value)


def within(space: Mapping[str, Domain], sample: dict[str, Any]) -> dict[str, Any]:
    """The sample, with what was moved out of its range brought back to the range's end."""
    ranges = {name: of for name, of in space.items() if not isinstance(of, Choice)}
    return sample | {name: min(max(sample[name], of.low), of.high) for name, of in ranges.items()}


@contextmanager
def seeded(seed: str) -> Iterator[None]:
    """Within it, `random`, which Ray's PBT draws from, depends on the seed alone."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
