"""Rows about codes of segments: how much of what a memory read and wrote comes out of 128 numbers again."""

from __future__ import annotations

from collections.abc import Iterator, Set

from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

SEEDS = (0, 1, 2)
MEAN, LOG_VARIANCE, DIRECTIONS, WRITTEN, WROTE = ROWS = (
    "codes_mean_explained",
    "codes_log_variance_explained",
    "codes_directions_explained",
    "codes_written_explained",
    "codes_segments_that_wrote",
)
KEYS = {
    MEAN: "codes/mean_explained",
    LOG_VARIANCE: "codes/log_variance_explained",
    DIRECTIONS: "codes/delta_up_explained",
    WRITTEN: "codes/whole_delta_up_explained",
    WROTE: "wrote_frac",
}


def segment_codes(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Variance explained, on segments of held-out text, of the statistics of what was surprising.

    As `cortex train codes`, under its settings' defaults, with the demo's memory and three seeds of text, facts and
    coder: 8 streams of 4,096 tokens fitted, 2 of held-out text asked. Means and logarithms of variances of what the
    memory's layers saw, the two strongest directions of what was written, and all of what was written. Student's t
    interval over the seeds. `wrote`: the share of held-out segments that wrote anything.
    """
    from cortex_core.consolidation.diary import Diary
    from cortex_core.intervals import mean_interval
    from cortex_core.tasks.vocabulary import Split
    from cortex_core.training.streams import fact_streams
    from pipelines.codes_worker import fitted

    codes, width = demo.config.codes, demo.model.segment_tokens
    windows = -(-codes.stream_tokens // width)
    counts: dict[Split, int] = {"train": codes.num_streams, "held_out": codes.held_out_streams}
    found: list[dict[str, float]] = []
    for seed in SEEDS:
        segments = []
        for split, count in counts.items():
            streams = fact_streams(demo.vocabulary, demo.corpus, split, count, windows, width, seed)
            diary = Diary(demo.model, demo.config.segments, [f"{split}-{number}" for number in range(count)])
            segments.append(diary.read(streams))
        found.append(fitted(*segments, demo.config.model_copy(update={"seed": seed}))[1])
    for name in (name for name in ROWS if name in wanted):
        low, high, value = mean_interval([document[KEYS[name]] for document in found])
        yield Row(name, value, None, "higher", "", len(found), low, high)
