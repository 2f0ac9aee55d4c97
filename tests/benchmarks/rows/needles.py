"""Rows about needles in a haystack (RULER-style) far beyond any sequence that the memory was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Set

from cortex_core.config import TaskName
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import FILLERS, Demo
from tests.benchmarks.rows.recall import measure

TIMES_LONGER, PER_FILLER = 8, 100
GOALS: dict[TaskName, float | None] = {"needle_single": 0.95, "needle_multi_key": 0.90, "needle_multi_query": None}
ROWS = tuple(f"{name}_recall" for name in GOALS)


def needles(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Needles found in a haystack eight times as long as the longest training sequence, by a memory of key-value recall.

    " remember river stone;" stands somewhere in the haystack, " recall river" after it: one needle; one of eight; four
    of eight, all of which must be right. The run was trained on key-value recall alone, whose facts stand together.
    Held-out words; 100 examples in text and 100 others in random tokens each, Wilson's interval.
    """
    from cortex_core.intervals import wilson

    haystack = TIMES_LONGER * demo.config.training.max_segments * demo.model.segment_tokens
    for name, goal in GOALS.items():
        if f"{name}_recall" in wanted:
            right: list[bool] = []
            for number, filler in enumerate(FILLERS):  # other facts for each, or the answers would not be independent
                indices = range(number * PER_FILLER, (number + 1) * PER_FILLER)
                found = measure(demo, demo.task(filler, name), [haystack], indices)
                right += found[haystack].with_memory
            interval = wilson(sum(right), len(right))
            yield Row(f"{name}_recall", interval.value, goal, "higher", "", len(right), interval.low, interval.high)
