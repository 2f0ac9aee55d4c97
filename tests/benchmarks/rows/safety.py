"""Rows about what is taken back from a memory, and about what a small session file costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence, Set
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cortex_core.intervals import paired_difference, wilson
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo, batches

if TYPE_CHECKING:
    from cortex_core.backbone.session import Session

NUM_EXAMPLES, GAP = 204, 1024
LOG_WRITES = 4096
CHANCE_GOAL, NEIGHBOUR_GOAL_POINTS, INT8_GOAL_POINTS, INT8_GOAL_RATIO = 0.02, 1.0, 0.5, 0.30
FORGET_ROWS = ("forgotten_fact_recall", "forgotten_fact_recall_before", "forgotten_neighbours_loss_points")
INT8_ROWS = ("int8_session_recall_loss_points", "int8_session_bytes_ratio")


class Told(NamedTuple):
    """Sessions that were told all facts of some examples and then read filler."""

    session: Session
    num_facts: int
    questions: list[list[list[int]]]
    """Tokens of each example's questions, in the order of its facts; the answer stands at `asked`."""
    asked: int
    """Position of the answer in a question: one token."""


def forgetting_one_fact(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Recall of one fact of six that the session was told to forget, and of its five neighbours, before and after.

    204 held-out examples of key-value recall. Each fact is read with a source of its own into a session with a log,
    then 1,024 tokens of held-out text; `forget` takes back one source, in turn the first to the last. Shares with
    Wilson 95 % intervals; the neighbours' loss, over all 1,020 questions, with Newcombe's paired one.
    """
    lost_before: list[bool] = []
    lost_after: list[bool] = []
    near_before: list[bool] = []
    near_after: list[bool] = []
    for indices in batches(range(NUM_EXAMPLES), demo.config.evaluation.batch_size):
        told = tell(demo, indices)
        before = answers(demo, told, told.session)
        for fact in range(told.num_facts):
            rows = [row for row, index in enumerate(indices) if index % told.num_facts == fact]
            demo.model.forget(told.session, _source(fact), rows=rows)
        after = answers(demo, told, told.session)
        for row, index in enumerate(indices):
            for fact in range(told.num_facts):
                forgotten = index % told.num_facts == fact
                (lost_before if forgotten else near_before).append(before[row][fact])
                (lost_after if forgotten else near_after).append(after[row][fact])
    for name, hits, goal in (
        ("forgotten_fact_recall", lost_after, CHANCE_GOAL), ("forgotten_fact_recall_before", lost_before, None),
    ):  # fmt: skip
        share = wilson(sum(hits), len(hits))
        better = "higher" if goal is None else "lower"
        yield Row(name, share.value, goal, better, "", len(hits), share.low, share.high)
    loss = paired_difference(near_before, near_after)
    yield Row(
        "forgotten_neighbours_loss_points", 100 * loss.value, NEIGHBOUR_GOAL_POINTS, "lower", "points",
        len(near_before), 100 * loss.low, 100 * loss.high,
    )  # fmt: skip


def int8_sessions(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """What saving a session as int8 costs: points of recall at gap 1,024, and bytes of its states against float32.

    204 held-out examples, all six questions each, asked of the session and of the one loaded from its int8 file;
    Newcombe's paired 95 % interval. Bytes are those of the states in the two files, integers and scales; the open
    segment's tokens and the file's header, the same in both, are not counted.
    """
    plain: list[bool] = []
    loaded: list[bool] = []
    ratio = float("nan")
    with tempfile.TemporaryDirectory() as folder:
        for indices in batches(range(NUM_EXAMPLES), demo.config.evaluation.batch_size):
            told = tell(demo, indices, logged=False)
            small, full = Path(folder) / "int8", Path(folder) / "float32"
            told.session.save(small, dtype="int8")
            told.session.save(full)
            ratio = _state_bytes(small) / _state_bytes(full)
            plain += chain.from_iterable(answers(demo, told, told.session))
            loaded += chain.from_iterable(answers(demo, told, demo.model.load_session(small)))
    loss = paired_difference(plain, loaded)
    yield Row(
        "int8_session_recall_loss_points", 100 * loss.value, INT8_GOAL_POINTS, "lower", "points", len(plain),
        100 * loss.low, 100 * loss.high,
    )  # fmt: skip
    yield Row("int8_session_bytes_ratio", ratio, INT8_GOAL_RATIO, "lower", "×", 1)


def tell(demo: Demo, indices: Sequence[int], *, logged: bool = True) -> Told:
    """Read the facts of these examples and `GAP` tokens of text; each fact with its source, if the session has a log."""
    import torch

    task, model = demo.task("text"), demo.model
    facts_of = demo.config.tasks.num_pairs
    sheets = [task.sheet(index, facts_of) for index in indices]
    session = model.new_session(len(indices), log_writes=LOG_WRITES if logged else None)
    # Prefix, facts and filler, as `example` lays them out, in runs of the same length in every row.
    texts = [task.example(index, GAP).tokens[: -task.query_tokens(index)] for index in indices]
    lengths = [len(part.tokens) for part in sheets[0].facts]
    edges = [len(texts[0]) - GAP - sum(lengths)]
    for length in lengths:
        edges.append(edges[-1] + length)
    pieces = [
        (0, edges[0], None),
        *((a, b, _source(n)) for n, (a, b) in enumerate(pairwise(edges))),
    ]
    for first, stop, source in [*pieces, (edges[-1], len(texts[0]), None)]:
        if stop > first:
            run = torch.tensor([text[first:stop].tolist() for text in texts], device=model.backbone.device)
            model.read(run, session, source=source if logged else None)
    # A question names the key behind its marker; the fact is the one that does so behind its own.
    skipped = len(demo.vocabulary.pieces[" remember"])
    questions = []
    for sheet in sheets:
        by_key = {part.tokens[part.answer_from - 1]: part.tokens for part in sheet.queries}
        questions.append([by_key[fact.tokens[skipped]] for fact in sheet.facts])
    return Told(session, facts_of, questions, sheets[0].queries[0].answer_from)


def answers(demo: Demo, told: Told, session: Session) -> list[list[bool]]:
    """For each example, whether each fact's question is answered right; the session does not change."""
    import torch

    found: list[list[bool]] = [[] for _ in told.questions]
    for fact in range(told.num_facts):
        ids = torch.tensor([questions[fact] for questions in told.questions], device=demo.model.backbone.device)
        with torch.no_grad():
            said = demo.model(input_ids=ids, session=session.fork()).logits[:, told.asked - 1].argmax(-1)
        for row, right in zip(found, (said == ids[:, told.asked]).tolist(), strict=True):
            row.append(right)
    return found


def _state_bytes(path: Path) -> int:
    from safetensors.torch import load_file

    return sum(t.numel() * t.element_size() for name, t in load_file(path).items() if name.startswith("layer."))


def _source(fact: int) -> str:
    return f"fact-{fact}"
