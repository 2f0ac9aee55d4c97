"""Rows about six scales of protection: one factorial experiment, and five predictions."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Literal

from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from tests.benchmarks.scales import Analysis

NUM_SEEDS = 2
SCALES = ("parameter", "gradient", "data", "temporal", "architectural", "generative")
ASKED: dict[str, tuple[str, Literal["higher", "lower"]]] = {
    "known_at_once": ("", "higher"),
    "known_behind_text": ("", "higher"),
    "text_nats": ("nats", "lower"),
    "in_context": ("", "higher"),
}
"""Answers that have rows, with their unit and which way is better."""
FAILURES = ("log_failure_known", "log_failure_in_context", "log_text_nats")
INTERACTIONS = tuple(f"scales_interactions_{name}" for name in FAILURES)
ROWS = (*(f"scales_{name}_{scale}" for name in ASKED for scale in SCALES), *INTERACTIONS)
CRITERIA = {1: "abc", 2: "ab", 3: "abc", 4: "a", 5: "a"}
PREDICTION_ROWS = tuple(f"prediction_{number}_{letter}" for number, letters in CRITERIA.items() for letter in letters)


def six_scales(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Main effects of six scales in a half fraction of 2^6 lives, the backbone learning without a trust region.

    The model that ships, not the run's. Two seeds of 32 lives of 32 facts in 4 days (docs/predictions.md says what is on
    and off). An effect is the mean with the scale on minus the mean with it off: of the share of facts known with empty
    fast weights, at once and behind 40 tokens; of loss on held-out text over the bare model's; of recall in context
    after the last night over before the first. `interactions`: of 15 pairs, those that are not 0 on the logarithm of
    failures, where protections that multiply would add up (Bonferroni, 95 %). Results stay in `runs/predictions`.
    """
    from tests.benchmarks.scale_runs import Results
    from tests.benchmarks.scales import measured

    results = Results(demo.folder.parent / "predictions", say=_say)
    yield from (row for row in rows_of(measured(results, "backbone", range(NUM_SEEDS))) if row.name in wanted)


def rows_of(found: Mapping[str, Analysis]) -> Iterator[Row]:
    """Of an analysis."""
    for name, (unit, better) in ASKED.items():
        for scale in SCALES:
            low, high, value = found[name].effects[scale]
            yield Row(f"scales_{name}_{scale}", value, None, better, unit, found[name].n, low, high)
    for row, name in zip(INTERACTIONS, FAILURES, strict=True):
        yield Row(row, float(found[name].interactions_shown), None, "lower", "of 15", found[name].n)


def five_predictions(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Criteria of five predictions about stability and plasticity, with the bounds of docs/predictions.md as goals.

    Six seeds for the first four, three for the fifth. A goal that is missed does not refute: only an interval that lies
    outside altogether does. Results stay in `runs/predictions`; `make prediction N=1` to `N=5` measure the same.
    """
    from tests.benchmarks import predictions
    from tests.benchmarks.scale_runs import Results

    results = Results(demo.folder.parent / "predictions", say=_say)
    for number, judge in predictions.PREDICTIONS.items():
        if any(name.startswith(f"prediction_{number}_") for name in wanted):
            effects = [*judge(results, "backbone", range(predictions.SEEDS[number]))]
            yield from predictions.rows_of(number, effects)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
