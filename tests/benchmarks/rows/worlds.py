"""Rows about stories of a small world: bAbI's first five kinds of question, the facts strewn over 131,072 tokens of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from tests.benchmarks.row import Row
from tests.benchmarks.rows import trained
from tests.benchmarks.rows.demo import Demo

GAP, NUM_EXAMPLES = 131_072, 100
GOAL = 0.97
RELATIONS: trained.Settings = {
    "fast_weights.reversed_frac": 0.5, "fast_weights.binding": True, "fast_weights.shared_values": True,
    "tasks.any_token_frac": 1.0, "training.sparsity_span": [0.4, 0.6], "training.steps": 400,
}  # fmt: skip
"""For facts of three words, of which any can be asked for."""
RUNS: Mapping[str, trained.Settings] = {
    "world_qa1": {"training.steps": 300},
    "world_qa2": {**RELATIONS, "fast_weights.layers": [1, 3], "tasks.names": ["world_qa1", "world_qa2"]},
    "world_qa3": {**RELATIONS, "fast_weights.layers": [1, 3], "tasks.names": ["world_qa1", "world_qa2", "world_qa3"]},
    "world_qa4": RELATIONS,
    "world_qa5": RELATIONS,
}
"""By kind of question, what its run changes in the demo's recipe."""
AVERAGE_ROW = f"worlds_recall_average_{GAP}"
ROWS = (*(f"{task}_{what}" for task in RUNS for what in (f"recall_{GAP}", "bare_in_window")), AVERAGE_ROW)


def stories_of_a_small_world(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Exact match of bAbI-style QA1 to QA5, one to three supporting facts among others in 131,072 tokens of held-out text.

    A run of `cortex train demo tasks.names=[...]` for each kind. Held-out words, 100 stories each; Wilson's interval, of
    the average over all 500. Beside them what the bare backbone answers where the whole story stands in its window. A
    finished run is not trained again.
    """
    runs = {
        task: {
            "tasks.names": [task], "evaluation.tasks": [task], "evaluation.fillers": ["text"],
            "evaluation.gaps_tokens": [0, GAP], "evaluation.num_examples": NUM_EXAMPLES, **settings,
        }
        for task, settings in RUNS.items()
        if AVERAGE_ROW in wanted or any(name.startswith(f"{task}_") for name in wanted)
    }  # fmt: skip
    names = {task: f"demo-{task.replace('_', '-')}" for task in runs}
    documents = trained.evaluations(demo.folder.parent, {names[task]: settings for task, settings in runs.items()})
    yield from (row for row in rows_of({task: documents[names[task]] for task in runs}) if row.name in wanted)


def rows_of(documents: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """By task, from its run's `evaluation.json`; the average if all five are there."""
    from cortex_core.eval.intervals import wilson

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
