"""Rows about a text of a million tokens: what is recalled, and whether time and memory stay what they were."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks import child, pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import FILLERS, SEED, Demo

if TYPE_CHECKING:
    from cortex_core.backbone.session import Session

NEAR, FAR, ROWS_READ, READ_TOKENS, PAIRS = 1 << 16, 1 << 20, 50, 4096, 9
ROWS = (
    *(f"recall_{filler}_{FAR}" for filler in FILLERS), "million_peak_memory_ratio", "million_time_per_token_ratio",
)  # fmt: skip


def a_million_tokens(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Key-value recall after 1,048,576 tokens of filler, and peak memory and time per token against 65,536.

    50 held-out examples per filler, in a fresh process each, read side by side in calls of 4,096 tokens; the filler is
    made as it is read. Peak resident memory from the first to the last token over that to token 65,536. Time: 9 times,
    alternately, both sessions read the same 4,096 tokens on.
    """
    from cortex_core.intervals import wilson

    for filler in FILLERS:
        name = f"{__name__}:read_far"
        found = child.run(name, timeout_s=36_000, run=str(demo.folder), filler=filler, near=NEAR, far=FAR)[0]
        right = wilson(sum(found["right"]), len(found["right"]))
        yield Row(f"recall_{filler}_{FAR}", right.value, 0.98, "higher", "", ROWS_READ, right.low, right.high)
    memory, time = found["peak_far"] / found["peak_near"], pairs.median(found["time_ratios"])
    yield Row("million_peak_memory_ratio", memory, 1.02, "lower", "", 1)
    yield Row("million_time_per_token_ratio", time.value, 1.05, "lower", "", time.n, time.low, time.high)


def read_far(run: str, filler: str, near: int, far: int, rows: int = ROWS_READ) -> dict[str, Any]:
    """In a process of its own: whether each of `rows` questions is answered after `far` tokens, and what it took."""
    import numpy as np
    import torch

    from cortex_core.eval.reach import ask, padded

    demo = Demo(Path(run))
    model, task = demo.model, demo.task(filler)
    examples = [task.example(index, 0) for index in range(rows)]
    starts = [len(e.tokens) - task.query_tokens(index) for index, e in enumerate(examples)]
    session = model.new_session(rows)
    told = [e.tokens[:start] for e, start in zip(examples, starts, strict=True)]

    def read(into: Session, pieces: list[np.ndarray]) -> None:
        ids, mask = padded(pieces, model.backbone.device)
        model.read(ids, into, attention_mask=mask)

    def gap(number: int) -> list[np.ndarray]:
        return [task.filler.tokens((SEED, row, number), READ_TOKENS) for row in range(rows)]

    with torch.no_grad():
        read(session, told)
        read(session.fork(), gap(0))  # what the first call allocates once and for all
        child.reset_peak()
        for number in range(near // READ_TOKENS):
            read(session, gap(number))
        at_near, peak_near = session.fork(), child.peak_bytes()
        for number in range(near // READ_TOKENS, far // READ_TOKENS):
            read(session, gap(number))
        peak_far, more = child.peak_bytes(), gap(0)
        questions = [(e.tokens[s:], e.answer[s:]) for e, s in zip(examples, starts, strict=True)]
        right = [answer.right for answer in ask(model, session.fork(), questions)]
        ratios = pairs.ratios(lambda: read(session.fork(), more), lambda: read(at_near.fork(), more), pairs=PAIRS)
    return {"right": right, "peak_near": peak_near, "peak_far": peak_far, "time_ratios": ratios}
