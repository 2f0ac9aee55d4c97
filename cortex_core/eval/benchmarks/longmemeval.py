"""LongMemEval: 500 questions, each about a history of chats: 40 in `s`, 500 in `m`, only those needed in `oracle`.

Format: `longmemeval_s.json`, a list of question_id, question_type, question, answer, question_date, haystack_dates and
haystack_sessions, each a list of turns with role and content. An id that ends in `_abs` marks a question that the
history does not answer. Wu et al. (2025), "LongMemEval: benchmarking chat assistants on long-term interactive memory",
ICLR. https://github.com/xiaowu0162/LongMemEval. The official score is a language model's judgement of the answers; the
measures here only compare words. `results.write_hypotheses` writes what the official judge reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from cortex_core.errors import DataError
from cortex_core.eval.benchmarks.example import Benchmark, Example, Place, Selection, Source, Task
from cortex_core.eval.benchmarks.records import Record

ABSTENTION = "abstention"
"""The task of the questions that have no answer, whatever their published type."""
_BEFORE = "Chats with a user, from the first to the last.\n"
_AFTER = "\n\n[{date}] The user asks: {question}\nShort answer from the chats above:"
MAX_NEW_TOKENS = 128
TASKS = {
    name: Task(_AFTER, MAX_NEW_TOKENS, measures, _BEFORE)
    for name, measures in {
        "single-session-user": ("contains", "f1"),
        "single-session-assistant": ("contains", "f1"),
        "multi-session": ("contains", "f1"),
        "temporal-reasoning": ("contains", "f1"),
        "knowledge-update": ("contains", "f1"),
        "single-session-preference": ("f1",),  # the published answer describes a good one
        ABSTENTION: ("abstains",),
    }.items()
}
_NAME = re.compile(r"longmemeval_([a-z]+)")


def place(name: str) -> Place | None:
    """`longmemeval_s.json`, `longmemeval_s_cleaned.json`, or without a suffix, as it was first published."""
    path = PurePosixPath(name)
    found = _NAME.match(path.name.lower())
    return Place(length=found[1]) if found and path.suffix in ("", ".json", ".jsonl") else None


def examples(source: Source) -> Iterator[Example]:
    """One per question; the sessions in order of their dates. Raises DataError."""
    for record in source.records():
        name, task = record.text("question_id"), record.text("question_type")
        if task not in TASKS:
            raise DataError(f"{record.where} has question_type {task!r}, unknown in LongMemEval")
        length = source.place.length or PurePosixPath(source.parts[0].name).stem
        yield Example(
            key=f"{length}/{name}",
            id=name,
            task=ABSTENTION if name.endswith("_abs") else task,
            length=length,
            context=tuple(_sessions(record)),
            question=record.text("question"),
            answers=(_answer(record),),
            date=record.text("question_date"),
        )


def hub_files(selection: Selection) -> list[str]:
    """One file per length."""
    return [
        f"longmemeval_{length}{rest}" for length in selection.lengths or ("*",) for rest in ("", ".json", "_*.json")
    ]


def _sessions(record: Record) -> Iterator[str]:
    dates, sessions = record.texts("haystack_dates"), record.values.get("haystack_sessions")
    if not isinstance(sessions, list) or len(sessions) != len(dates) or not sessions:
        raise DataError(f"{record.where} has not as many 'haystack_sessions' as 'haystack_dates', at least one")
    # Dates are written from the year to the minute, so their order is that of the texts.
    for date, turns in sorted(zip(dates, sessions, strict=True), key=lambda pair: pair[0]):
        yield f"\n[{date}]\n" + "".join(_turn(record, turn) for turn in _list(record, turns))


def _list(record: Record, turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise DataError(f"{record.where} has {type(turns).__name__} in 'haystack_sessions', expected lists of turns")
    return turns


def _turn(record: Record, turn: Any) -> str:
    if not isinstance(turn, dict):
        raise DataError(f"{record.where} has {type(turn).__name__} in 'haystack_sessions', expected role and content")
    turn = Record(record.where, turn)
    return f"{turn.text('role').capitalize()}: {turn.text('content').strip()}\n"


def _answer(record: Record) -> str:
    """Some answers are published as numbers."""
    value = record.values.get("answer")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else record.text("answer")


LONGMEMEVAL = Benchmark(
    "LongMemEval",
    "xiaowu0162/longmemeval-cleaned",
    TASKS,
    place,
    examples,
    hub_files,
    Selection(lengths=("s",)),
)
