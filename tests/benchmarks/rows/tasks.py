"""Rows about the other tasks of the source: lists copied backwards, items counted back, long numbers added, by gap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from tests.benchmarks.row import Row
from tests.benchmarks.rows import trained
from tests.benchmarks.rows.demo import FILLERS, Demo

GAPS, NUM_EXAMPLES = (256, 512, 1024, 2048, 4096, 16384), 200
RECALL_GOAL, LOSS_GOAL_POINTS = 0.97, 1.0
RUNS: Mapping[str, tuple[str, trained.Settings]] = {
    "copy_reverse": ("digits", {}),
    "n_back": ("demo", {}),
    "split_addition": ("digits", {"training.steps": 800}),
    "long_addition": ("digits", {"training.steps": 800}),
}
"""By task, its recipe and what its run changes in it."""
ROWS = tuple(
    f"{task}_{what}"
    for task in RUNS
    for what in (*(f"recall_{gap}" for gap in GAPS), "recall_min", "in_window_loss_points")
)


def recall_of_tasks(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Exact match of copy-reverse (12 digits), n-back (8 items), split and long addition (32 digits), by gap.

    A run of `cortex train digits tasks.names=[...]` for each task, of n-back the demo's recipe. Held-out examples, each
    after a gap of text and one of random tokens; n counts the examples: Wilson's interval, as if each were one question.
    The loss in the window is the bare model's accuracy minus that with memory on, where nothing stands between facts and
    question; Newcombe's paired interval. A finished run is not trained again.
    """
    runs = {
        task: {
            "tasks.names": [task], "evaluation.tasks": [task], "evaluation.gaps_tokens": [0, *GAPS],
            "evaluation.num_examples": NUM_EXAMPLES, **settings,
        }
        for task, (_, settings) in RUNS.items()
        if any(name.startswith(f"{task}_") for name in wanted)
    }  # fmt: skip
    names = {task: f"demo-{task.replace('_', '-')}" for task in runs}
    documents = trained.evaluations(
        demo.folder.parent,
        {names[task]: settings for task, settings in runs.items()},
        {names[task]: RUNS[task][0] for task in runs},
    )
    for task in runs:
        yield from (row for row in rows_of(task, documents[names[task]]) if row.name in wanted)


def rows_of(task: str, document: Mapping[str, Any]) -> Iterator[Row]:
    """From a run's `evaluation.json`: a row for every gap, the least of them, and the loss within the window."""
    from cortex_core.intervals import paired_difference, wilson

    right = {gap: trained.shares(document, [gap]) for gap in GAPS}
    found = {gap: wilson(sum(answers), len(answers)) for gap, answers in right.items()}
    least = min(found.values(), key=lambda interval: interval.value)
    for name, interval in {**{f"recall_{gap}": found[gap] for gap in GAPS}, "recall_min": least}.items():
        n = len(right[GAPS[0]])
        yield Row(f"{task}_{name}", interval.value, RECALL_GOAL, "higher", "", n, interval.low, interval.high)
    in_window = {
        row["memory"]: [letter == "1" for letter in letters]
        for row, letters in zip(document["rows"], document["outcomes"], strict=True)
        if (row["gap_tokens"], row["filler"]) == (0, FILLERS[0])  # without a gap there is no filler
    }
    bare, with_memory = in_window["off"], in_window["on"]
    loss = paired_difference(bare, with_memory)
    yield Row(
        f"{task}_in_window_loss_points", 100 * loss.value, LOSS_GOAL_POINTS, "lower", "points", len(bare),
        100 * loss.low, 100 * loss.high,
    )  # fmt: skip
