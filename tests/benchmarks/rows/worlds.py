"""Rows about stories of a small world: bAbI's first five kinds of question, the facts strewn over 131,072 tokens of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from tests.benchmarks.row import Row
from tests.benchmarks.rows import trained
from tests.benchmarks.rows.demo import Demo

GAP, NUM_EXAMPLES = 131_072, 100
GOAL = 0.97
TWO_HOPS: trained.Settings = {"fast_weights.layers": [1, 3]}
"""What is read in one layer can be asked for in another."""
RUNS: Mapping[str, tuple[str, trained.Settings]] = {
    "world_qa1": ("demo", {"training.steps": 300}),
    "world_qa2": ("relations", {**TWO_HOPS, "tasks.names": ["world_qa1", "world_qa2"], "training.steps": 600}),
    "world_qa3": ("relations", {**TWO_HOPS, "tasks.names": ["world_qa1", "world_qa2", "world_qa3"]}),
    "world_qa4": ("relations", {}),
    "world_qa5": ("relations", {}),
}
"""By kind of question, its recipe and what its run changes in it."""
AVERAGE_ROW = f"worlds_recall_average_{GAP}"
ROWS = (*(f"{task}_{what}" for task in RUNS for what in (f"recall_{GAP}", "bare_in_window")), AVERAGE_ROW)


def stories_of_a_small_world(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Exact match of bAbI-style QA1 to QA5, one to three supporting facts among others in 131,072 tokens of held-out text.

    A run of `cortex train relations tasks.names=[...]` for each kind, of QA1 the demo's recipe. Held-out words, 100
    stories each; Wilson's interval, of the average over all 500. Beside them what the bare backbone answers where the
    whole story stands in its window. A finished run is not trained again.
    """
    runs = {
        task: {
            "tasks.names": [task], "evaluation.tasks": [task], "evaluation.fillers": ["text"],
            "evaluation.gaps_tokens": [0, GAP], "evaluation.num_examples": NUM_EXAMPLES, **settings,
        }
        for task, (_, settings) in RUNS.items()
        if AVERAGE_ROW in wanted or any(name.startswith(f"{task}_") for name in wanted)
    }  # fmt: skip
    names = {task: f"demo-{task.replace('_', '-')}" for task in runs}
    documents = trained.evaluations(
        demo.folder.parent,
        {names[task]: settings for task, settings in runs.items()},
        {names[task]: RUNS[task][0] for task in runs},
    )
    yield from (row for row in rows_of({task: documents[names[task]] for task in runs}) if row.name in wanted)


def rows_of(documents: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """By task, from its run's `evaluation.json`; the average if all five are there."""
    from cortex_core.intervals import wilson

    right: list[float] = []
    for task, document in documents.items():
        answers = trained.shares(document, [GAP])
        right += answers
        far = wilson(sum(answers), len(answers))
        yield Row(f"{task}_recall_{GAP}", far.value, None, "higher", "", len(answers), far.low, far.high)
        (bare,) = (row for row in document["rows"] if (row["gap_tokens"], row["memory"]) == (0, "off"))
        near = wilson(round(bare["accuracy"] * bare["n"]), bare["n"])
        yield Row(f"{task}_bare_in_window", near.value, None, "higher", "", bare["n"], near.low, near.high)
    if documents.keys() == RUNS.keys():
        average = wilson(sum(right), len(right))
        yield Row(AVERAGE_ROW, average.value, GOAL, "higher", "", len(right), average.low, average.high)
