"""Rows about the rank: recall of the demo's recipe at several ranks, and of one that chose where its dimensions lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from tests.benchmarks.row import Row
from tests.benchmarks.rows import trained
from tests.benchmarks.rows.demo import Demo

RANKS, BUDGET, PRUNED_FROM = (8, 16, 32), 8, 32
GAPS, NUM_EXAMPLES = (1024, 16384), 200
GAIN_ROW, BYTES_ROW = "adaptive_rank_gain_points", "adaptive_rank_state_bytes_ratio"
ROWS = (*(f"rank_{rank}_recall" for rank in RANKS), "adaptive_rank_recall", GAIN_ROW, BYTES_ROW)


def recall_by_rank(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Key-value recall by rank, and of a memory that begins with rank 32 and keeps 8 dimensions per head on average.

    Each is `cortex train demo` with another rank, up to the width of the backbone's heads, 32: no memory is wider than
    its head. All are asked about the same 200 held-out examples, after gaps of 1,024 and 16,384 of text and of random
    tokens. n counts the examples: Wilson's interval, as if each were one question; for the gain of the adaptive memory
    over rank 8, Student's of the paired differences. A run that is finished is not trained again.
    """
    asked = {"evaluation.gaps_tokens": list(GAPS), "evaluation.num_examples": NUM_EXAMPLES}
    adaptive = bool(wanted & {"adaptive_rank_recall", GAIN_ROW, BYTES_ROW})  # is compared with an even rank
    settings: dict[str, dict[str, Any]] = {
        name: {"fast_weights.rank": rank}
        for rank in RANKS
        if (name := f"rank_{rank}_recall") in wanted or (adaptive and rank == BUDGET)
    }
    if adaptive:
        settings["adaptive_rank_recall"] = {"fast_weights.rank": PRUNED_FROM, "fast_weights.rank_budget": BUDGET}
    runs = {f"demo-{name.removesuffix('_recall')}": changed | asked for name, changed in settings.items()}
    documents = trained.evaluations(demo.folder.parent, runs)
    found = rows_of(dict(zip(settings, documents.values(), strict=True)))
    yield from (row for row in found if row.name in wanted)


def rows_of(documents: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """A row for each evaluation; and, where it is there, the adaptive memory against the even one of equal size."""
    from cortex_core.intervals import mean_interval, wilson

    right = {name: trained.shares(document, GAPS) for name, document in documents.items()}
    for name, shares in right.items():
        found = wilson(sum(shares), len(shares))
        yield Row(name, found.value, None, "higher", "", len(shares), found.low, found.high)
    if "adaptive_rank_recall" in right:
        even = f"rank_{BUDGET}_recall"
        both = zip(right["adaptive_rank_recall"], right[even], strict=True)
        gain = mean_interval([100 * (ours - theirs) for ours, theirs in both], lowest=-100.0, highest=100.0)
        yield Row(GAIN_ROW, gain.value, 0.0, "higher", "points", len(right[even]), gain.low, gain.high)
        size = documents["adaptive_rank_recall"]["state_bytes"] / documents[even]["state_bytes"]
        yield Row(BYTES_ROW, size, 1.0, "lower", "", 1)
