"""Rows about chance: the demo's recipe trained from five seeds, each asked by its own evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from tests.benchmarks.row import Row
from tests.benchmarks.rows import trained
from tests.benchmarks.rows.demo import FILLERS, Demo

SEEDS = (0, 1, 2, 3, 4)
GAPS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
PER_SEED = 100
RECALL_GOAL, SPREAD_GOAL_POINTS = 0.99, 1.0
MIN_ROW, SPREAD_ROW = "seeds_recall_min", "seeds_spread_points"
ROWS = (*(f"seeds_recall_{filler}_{gap}" for filler in FILLERS for gap in GAPS), MIN_ROW, SPREAD_ROW)

Hits = Mapping[tuple[str, int], tuple[int, int]]
"""By filler and gap: right answers, and questions."""


def recall_over_seeds(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Key-value recall of five runs that differ in the seed alone, gaps 256 to 65,536, text and random filler.

    Each run is `cortex train demo` with another seed (of weights, training data and held-out questions), beside the
    demo's own folder; runs that are finished are not trained again. 100 questions per seed, filler and gap; Wilson's
    interval over all of them. seeds_recall_min is the worst cell; seeds_spread_points the best seed minus the worst,
    each over all of its questions.
    """
    gaps = {"evaluation.gaps_tokens": [0, *GAPS], "evaluation.num_examples": PER_SEED}
    runs = {f"demo-seed-{seed}": {"seed": seed} | gaps for seed in SEEDS}
    documents = trained.evaluations(demo.folder.parent, runs)
    found = rows_of([hits(document) for document in documents.values()])
    yield from (row for row in found if row.name in wanted)


def hits(evaluation: Mapping[str, Any]) -> Hits:
    """Right answers with memory on beyond the window, from an `evaluation.json`."""
    return {
        (row["filler"], row["gap_tokens"]): (round(row["accuracy"] * row["n"]), row["n"])
        for row in evaluation["rows"]
        if row["task"] == "key_value" and row["memory"] == "on" and row["gap_tokens"] > 0
    }


def rows_of(runs: list[Hits]) -> Iterator[Row]:
    """A row for every cell, the worst of them, and the spread over runs."""
    from cortex_core.intervals import wilson

    cells = {
        (filler, gap): wilson(sum(run[filler, gap][0] for run in runs), sum(run[filler, gap][1] for run in runs))
        for filler in FILLERS
        for gap in GAPS
    }
    total = {cell: sum(run[cell][1] for run in runs) for cell in cells}
    for (filler, gap), found in cells.items():
        name = f"seeds_recall_{filler}_{gap}"
        yield Row(name, found.value, RECALL_GOAL, "higher", "", total[filler, gap], found.low, found.high)
    worst = min(cells, key=lambda cell: cells[cell].value)
    low, value, high = cells[worst].low, cells[worst].value, cells[worst].high
    yield Row(MIN_ROW, value, RECALL_GOAL, "higher", "", total[worst], low, high)
    means = [sum(run[cell][0] for cell in cells) / sum(run[cell][1] for cell in cells) for run in runs]
    spread = 100 * (max(means) - min(means))
    yield Row(SPREAD_ROW, spread, SPREAD_GOAL_POINTS, "lower", "points", len(runs))
