"""Rows about what the memory costs: text that it is no use for, memory of the process, time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Set
from pathlib import Path

from tests.benchmarks import child, pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import FILLERS, Demo

DRIFT_TOKENS = 262_144
SHORT_GAP, LONG_GAP, REPEATS = 1024, 16384, 3
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
READING_ROWS, READING_PAIRS = 16, 15


def text_perplexity_drift_percent(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """How much higher the perplexity of held-out text is with memory on, in percent, while the memory holds facts.

    262,144 tokens in rows of eight segments, each row after six facts, the same segments for both (`Suite`, as in every
    run's report); 95 % interval over rows.
    """
    suite = demo.suite(
        tasks=("key_value",),
        fillers=("text",),
        gaps_tokens=(0,),
        num_examples=2,
        perplexity_tokens=DRIFT_TOKENS,
    )
    drift = suite.run(demo.model)["drift"]
    value, low, high = (100 * (drift[key] - 1) for key in ("ratio", "low", "high"))
    yield Row("text_perplexity_drift_percent", value, 1.0, "lower", "%", drift["rows"], low, high)


def evaluation_peak_memory_ratio(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Peak resident memory of an evaluation at gap 16,384 over that at gap 1,024, each in a fresh process.

    Each process loads the demo model, then evaluates recall on one batch at one gap, for both fillers. The rest of an
    evaluation does not depend on the gap, and is left out because it could hide what does; for the same reason the
    kernel's peak (VmHWM) is set back after loading. The C library gives freed blocks back at once: what it would keep
    is a matter of luck, a tenth of the whole. Median of 3 pairs, alternately; smallest to largest.
    """
    found = []
    for _ in range(REPEATS):
        name, run = f"{__name__}:peak_of_evaluation", str(demo.folder)
        short, long = (
            child.run(name, variables=GIVE_BACK, run=run, gap_tokens=gap)[0] for gap in (SHORT_GAP, LONG_GAP)
        )
        found.append(long / short)
    value, low, high = statistics.median(found), min(found), max(found)
    yield Row("evaluation_peak_memory_ratio", value, 1.05, "lower", "", REPEATS, low, high)


def peak_of_evaluation(run: str, gap_tokens: int) -> int:
    """In a process of its own: peak resident bytes while one batch is evaluated at one gap."""
    from cortex_core.eval.reach import recall

    demo = Demo(Path(run))
    model, tasks = demo.model, [demo.task(filler) for filler in FILLERS]
    child.reset_peak()
    for task in tasks:
        for _ in recall(model, task, [gap_tokens], range(demo.config.evaluation.batch_size)):
            pass
    return child.peak_bytes()


def memory_overhead_ratio(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Time to read and predict 16 windows of held-out text with memory on, over the time with it off.

    15 pairs in one process, alternating; median with its 95 % interval.
    """
    import torch

    model = demo.model
    ids = torch.from_numpy(demo.excerpts(READING_ROWS, model.segment_tokens)).to(model.backbone.device)

    def read(on: bool) -> None:
        with torch.no_grad(), model.memory(on):
            model(input_ids=ids)

    ratio = pairs.median(pairs.ratios(lambda: read(True), lambda: read(False), pairs=READING_PAIRS))
    yield Row("memory_overhead_ratio", ratio.value, None, "lower", "", ratio.n, ratio.low, ratio.high)
