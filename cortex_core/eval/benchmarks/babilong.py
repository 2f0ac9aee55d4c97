"""BABILong: the facts of bAbI's tasks qa1 to qa20, scattered over books, at lengths from 0k to 10M tokens.

Format: `data/qa1/4k.json`, a list of input, question and target; also `4k/qa1-00000-of-00001.parquet`, as in the sets
with 1,000 examples. Kuratov et al. (2024), "BABILong: testing the limits of LLMs with long context
reasoning-in-a-haystack", NeurIPS. https://github.com/booydar/babilong. The prompts are our own, without solved
examples; as they ask for an answer on one line, an answer ends with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from cortex_core.errors import DataError
from cortex_core.eval.benchmarks.example import Benchmark, Example, Place, Selection, Source, Task

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("no", "yes")
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _ROOMS),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES_NO),
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", *_YES_NO),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "garden", "kitchen", "bored", "hungry", "thirsty", "tired"),
}
"""All answers that each task has."""
_HINTS = {
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), "yes or no"),
    "qa7": "a number, written as a word",
    "qa8": "the things, with commas between them, or nothing",
    "qa10": "yes, no or maybe",
    "qa19": "the two directions by their first letters, with a comma between them",
}
MAX_NEW_TOKENS = 20
"""As published."""
TASKS = {
    f"qa{number}": Task(
        f"\n\nQuestion about the facts: {{question}}\nThe answer is {_HINTS.get(f'qa{number}', 'one word')}.\nAnswer:",
        MAX_NEW_TOKENS,
        ("label",),
        "The text below has a few facts in it. Remember them.\n\n",
        first_line=True,
    )
    for number in range(1, 21)
}
_TASK = re.compile(r"(?:^|[/_-])(qa\d+)(?=[/._-])")
_LENGTH = re.compile(r"(?:^|[/_-])(\d+[kM])(?=[/._-])")


def place(name: str) -> Place | None:
    """Task and length stand in the names of the file and its folder, in either order."""
    tasks, lengths = _TASK.findall(name), _LENGTH.findall(name)
    if not tasks or not lengths or tasks[-1] not in TASKS:
        return None
    return Place(tasks[-1], lengths[-1]) if PurePosixPath(name).suffix in (".json", ".jsonl", ".parquet") else None


def examples(source: Source) -> Iterator[Example]:
    """One per record; they have no id but their number, from 0. Raises DataError."""
    task, length = source.place
    if task is None or length is None:
        raise DataError(f"{source.parts[0]}: its name does not tell task and length: name it as published, qa1/4k.json")
    for number, record in enumerate(source.records()):
        yield Example(
            key=f"{task}/{length}/{number}",
            id=str(number),
            task=task,
            length=length,
            context=(record.text("input"),),
            question=record.text("question"),
            answers=(record.text("target"),),
            classes=LABELS[task],
        )


def hub_files(selection: Selection) -> list[str]:
    """A file per task and length, in the three layouts that the data sets have had."""
    return [
        pattern
        for task in selection.tasks or ("qa*",)
        for length in selection.lengths or ("*",)
        for pattern in (f"data/{task}/{length}.json", f"{length}/{task}-*.parquet", f"{task}/{length}-*.parquet")
    ]


BABILONG = Benchmark(
    "BABILong",
    "RMT-team/babilong",
    TASKS,
    place,
    examples,
    hub_files,
    Selection(("qa1", "qa2", "qa3", "qa4", "qa5"), ("0k", "1k", "2k", "4k", "8k", "16k", "32k")),
)
