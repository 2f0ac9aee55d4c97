"""A row about ordinary text: what a memory that was trained on text saves in long files that training never saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

MIN_WINDOWS, GOAL_PERCENT = 8, 2.0


def long_files_bits_saved_percent(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """By how much bits per byte of long held-out files are lower with memory than without, in percent.

    A run of `cortex train text` (--run runs/text). Every held-out file longer than eight windows, each in a session of
    its own from its first token to its last whole segment; the bare model reads the same segments one by one. n is the
    number of files; 95 % interval of a ratio of sums over files.
    """
    import torch

    from cortex_core.eval.perplexity import text_loss

    corpus, width = demo.corpus, demo.model.segment_tokens
    ends = [*corpus.held_out_starts[1:].tolist(), len(corpus.held_out)]
    with_memory, bare = [], []
    for start, end in zip(corpus.held_out_starts.tolist(), ends, strict=True):
        segments = (end - start) // width
        if end - start <= MIN_WINDOWS * width:
            continue
        losses = text_loss(demo.model, torch.from_numpy(corpus.held_out[start:end].astype("int64"))[None])
        with_memory.append(float(losses.with_memory) * segments)
        bare.append(float(losses.bare) * segments)
    value, low, high = saved_percent(with_memory, bare)
    yield Row("long_files_bits_saved_percent", value, GOAL_PERCENT, "higher", "%", len(bare), low, high)


def saved_percent(with_memory: Sequence[float], bare: Sequence[float]) -> tuple[float, float, float]:
    """100 (1 - sum / sum) of the losses of each file, with the interval of a ratio estimator (Cochran 1977, 6.4)."""
    from cortex_core.intervals import mean_interval

    total, n = sum(bare), len(bare)
    ratio = sum(with_memory) / total
    parts = [ratio + n * (on - ratio * off) / total for on, off in zip(with_memory, bare, strict=True)]
    interval = mean_interval(parts)
    return 100 * (1 - ratio), 100 * (1 - interval.high), 100 * (1 - interval.low)
