"""What all benchmarks have in common: an example, how its task asks and scores, and what is to be read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cortex_core.eval.benchmarks.records import Part, Record, records

_NUMBERED = re.compile(r"(\D*)(\d+)(.*)")


class Example(NamedTuple):
    """A long context, a question, and what counts as an answer."""

    key: str
    """Unique within a benchmark, and the same every time it is read."""
    id: str
    """As published; the number in the file where none is."""
    task: str
    length: str
    """Of the context, as the benchmark names it: `4k`, `8k+`, `s`."""
    context: tuple[str, ...]
    """One text, or one per session; read one after another."""
    question: str
    answers: tuple[str, ...]
    """Each of them is right."""
    classes: tuple[str, ...] = ()
    """All answers that there are, where the task has a closed set."""
    date: str = ""
    """When the question is asked, where the benchmark says so."""


@dataclass(frozen=True)
class Task:
    """How the examples of one task are asked and scored. The prompt is `before`, the context, `after`."""

    after: str
    """With `{question}` and `{date}`."""
    max_new_tokens: int
    measures: tuple[str, ...]
    """Names in `measures.MEASURES`; the first is the score."""
    before: str = ""
    first_line: bool = False
    """Score only the first line of the answer: what follows is the next example that the model makes up."""

    def closing(self, example: Example) -> str:
        """The end of the prompt. Braces in a question stay as they are."""
        return self.after.replace("{date}", example.date).replace("{question}", example.question)


class Place(NamedTuple):
    """What a file holds, as far as its name says."""

    task: str | None = None
    length: str | None = None


class Source(NamedTuple):
    """The files that hold the same task and length, in order."""

    place: Place
    parts: tuple[Part, ...]

    def records(self) -> Iterator[Record]:
        """Of all files, lazily. Raises DataError."""
        for part in self.parts:
            yield from records(part)


class Selection(NamedTuple):
    """What is asked of all that there is. An empty tuple is everything."""

    tasks: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()
    limit: int | None = None
    """Examples of each task and length, the first ones."""

    def wants(self, task: str | None, length: str | None) -> bool:
        """Whether something of that task and length is selected; None is not known yet."""
        return (task is None or not self.tasks or task in self.tasks) and (
            length is None or not self.lengths or length in self.lengths
        )


def by_size(name: str) -> tuple[str, int, str]:
    """Sorts names of tasks and lengths: qa2 before qa10, 4k before 16k before 1M."""
    found = _NUMBERED.fullmatch(name)
    if not found:
        return name, 0, ""
    return found[1], int(found[2]) * (1000 if found[3] == "M" else 1), found[3]


@dataclass(frozen=True)
class Benchmark:
    """A published format."""

    title: str
    hub: str
    """The dataset's id on the hub."""
    tasks: Mapping[str, Task]
    place: Callable[[str], Place | None]
    """What a file of that name holds (`Part.name`); None if it is not one of this benchmark."""
    examples: Callable[[Source], Iterator[Example]]
    """Lazily. Raises DataError."""
    hub_files: Callable[[Selection], list[str]]
    """Patterns of the files to fetch."""
    hub_default: Selection
    """What is fetched from the hub unless told otherwise: all of it may be hundreds of gigabytes."""
