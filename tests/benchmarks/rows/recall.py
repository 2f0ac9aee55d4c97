"""Rows about what is recalled, and what the memory costs where none is needed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

from cortex_core.intervals import paired_difference, wilson
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import FILLERS, Answers, Demo, batches

if TYPE_CHECKING:
    from cortex_core.tasks.layout import TextTask

GAPS = (256, 512, 1024, 2048, 4096, 8192, 16384)
FAR = 65536
NUM_EXAMPLES = 200
RECALL_GOAL, FAR_GOAL, CHANCE_BOUND, LOSS_GOAL_POINTS = 0.98, 0.95, 0.05, 1.0

RECALL_ROWS = (*(f"recall_{filler}_{gap}" for filler in FILLERS for gap in (*GAPS, FAR)), "recall_min")


def recall_by_gap(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Share of questions answered exactly right, memory on, by filler and gap in tokens; and the least of them.

    The least (recall_min) is that of gaps 256 to 16,384. 200 independent held-out examples of key-value recall per
    filler, the same at every gap, with their Wilson 95 % interval. `cortex_core.eval.reach.recall` reads each example
    once, up to the longest gap wanted, in calls of bounded size with the session handed on, so memory does not grow
    with the gap; at each gap a fork of the session is asked.
    """
    for filler in FILLERS:
        gaps = [gap for gap in (*GAPS, FAR) if f"recall_{filler}_{gap}" in wanted]
        if "recall_min" in wanted:
            gaps = sorted({*gaps, *GAPS})
        answers = _ask(demo, filler, gaps)
        for gap in gaps:
            if f"recall_{filler}_{gap}" in wanted:
                yield _recall_row(f"recall_{filler}_{gap}", answers[gap], FAR_GOAL if gap == FAR else RECALL_GOAL)
    if "recall_min" in wanted:
        cells = [demo.answers[filler, gap] for filler in FILLERS for gap in GAPS]
        yield _recall_row("recall_min", min(cells, key=lambda cell: sum(cell.with_memory)), RECALL_GOAL)


def bare_beyond_window(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Largest accuracy of the bare model over both fillers and all gaps: it sees the last window, and must guess.

    Gaps 256 to 16,384. The same examples as the recall rows. The goal is an upper bound of chance; its Wilson interval
    is that of one cell.
    """
    cells = [cell for filler in FILLERS for cell in _ask(demo, filler, GAPS).values()]
    worst = max(cells, key=lambda cell: sum(cell.bare))
    interval = wilson(sum(worst.bare), len(worst.bare))
    yield Row(
        "bare_beyond_window",
        interval.value,
        CHANCE_BOUND,
        "lower",
        "",
        len(worst.bare),
        interval.low,
        interval.high,
    )


def cut_question_recall(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Accuracy where the end of a segment cuts the question: its first word ends one segment, its key begins the next.

    200 held-out examples, two to three windows of text between fact and question; Wilson's interval.
    """
    task, window = demo.task("text"), demo.model.segment_tokens
    told = task.overhead_tokens(0) - task.query_tokens(0)  # the same for every example
    gap = 3 * window - 1 - told
    found = measure(demo, task, [gap], range(NUM_EXAMPLES))[gap]
    yield _recall_row("cut_question_recall", found, RECALL_GOAL)


def in_window_recall_loss_points(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Accuracy of the bare model minus that with memory on, in points, where everything stands in one window.

    600 examples, each asked of both: 200 without any filler (gap 0, where the fillers are the same), 200 others with
    half a window of text between fact and question, and 200 with random tokens. Newcombe's paired 95 % interval.
    """
    window = demo.model.segment_tokens
    bare: list[bool] = []
    with_memory: list[bool] = []
    for number, (filler, gap) in enumerate((("text", 0), ("text", window // 2), ("random", window // 2))):
        task = demo.task(filler)
        indices = range(number * NUM_EXAMPLES, (number + 1) * NUM_EXAMPLES)
        gap = min(gap, window - max(task.overhead_tokens(index) for index in indices))
        found = measure(demo, task, [gap], indices)[gap]
        bare += found.bare
        with_memory += found.with_memory
    loss = paired_difference(bare, with_memory)
    yield Row(
        "in_window_recall_loss_points", 100 * loss.value, LOSS_GOAL_POINTS, "lower", "points", len(bare),
        100 * loss.low, 100 * loss.high,
    )  # fmt: skip


def _ask(demo: Demo, filler: str, gaps: Sequence[int]) -> dict[int, Answers]:
    """Answers at these gaps; only what this session has not asked yet is measured."""
    missing = [gap for gap in gaps if (filler, gap) not in demo.answers]
    if missing:
        measured = measure(demo, demo.task(filler), missing, range(NUM_EXAMPLES))
        demo.answers |= {(filler, gap): answers for gap, answers in measured.items()}
    return {gap: demo.answers[filler, gap] for gap in gaps}


def measure(demo: Demo, task: TextTask, gaps: Sequence[int], indices: Sequence[int]) -> dict[int, Answers]:
    """By gap, whether each of these examples was answered exactly right, memory on and off."""
    from cortex_core.eval.reach import recall

    found = {gap: Answers((), (), 0.0) for gap in gaps}
    for batch in batches(indices, demo.config.evaluation.batch_size):
        since = time.perf_counter()
        for hits in recall(demo.model, task, gaps, batch):
            before, now = found[hits.gap_tokens], time.perf_counter()
            found[hits.gap_tokens] = Answers(
                before.with_memory + hits.with_memory, before.bare + hits.bare, before.seconds + now - since
            )
            since = now
    return found


def _recall_row(name: str, answers: Answers, goal: float) -> Row:
    interval = wilson(sum(answers.with_memory), len(answers.with_memory))
    seconds = 0.0 if name == "recall_min" else answers.seconds
    return Row(
        name,
        interval.value,
        goal,
        "higher",
        "",
        len(answers.with_memory),
        interval.low,
        interval.high,
        seconds,
    )
