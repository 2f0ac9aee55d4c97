"""Rows about speed, each a ratio of two ways that take turns."""

from __future__ import annotations

from collections.abc import Iterator, Set

from tests.benchmarks import pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

PIPELINE_PAIRS, SCAN_PAIRS = 5, 9


def pipeline_throughput_ratio(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Training tokens/s of one worker under Ray Train with ZeRO-3, over those of the same loop in a bare process.

    Both run `worker.train` on the demo's settings and the same batches; the bare process knows no Ray and loads the
    backbone whole. Each is a fresh process per run of 15 steps, of which the first 5 warm up. Five pairs in one
    session, alternately, while the same cluster is up; median, smallest to largest. Ray lowers the priority of its
    workers, which on a busy machine would measure the neighbours: here it may not.
    """
    from tests.benchmarks.rows import two_ways

    ratio = pairs.median(two_ways.interleaved(demo.config, PIPELINE_PAIRS))
    yield Row("pipeline_throughput_ratio", ratio.value, 0.9, "higher", "", ratio.n, ratio.low, ratio.high)


def chunk_vs_oracle_speedup(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """How many times faster the chunked scan is than the same recurrence token by token, forward and backward together.

    1,024 tokens, 2 x 4 heads of 64 dimensions, rank 16, gradients of all inputs. 9 pairs in one process, alternating;
    median with its 95 % interval.
    """
    from tests.benchmarks.rows import scan

    inputs = scan.streams(scan.TOKENS)
    found = pairs.ratios(lambda: scan.oracle(inputs), lambda: scan.scan(inputs), pairs=SCAN_PAIRS, warm_up=1)
    ratio = pairs.median(found)
    yield Row("chunk_vs_oracle_speedup", ratio.value, None, "higher", "x", ratio.n, ratio.low, ratio.high)
