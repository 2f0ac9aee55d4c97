"""Small sources and consolidators, and workers that do what a test says, for the actors beside training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.crew import Crew, Worker
from pipelines.duties import Generating
from pipelines.pool import Pool


def same(shared: Any) -> Any:
    return shared


class Made(NamedTuple):
    """A sample that says what it is of."""

    ticket: int
    weights: str
    pid: int


class Plain:
    """The least that is a source."""

    def load(self, version: int, weights: str) -> None:
        self.weights = weights

    def generate(self, tickets: list[int]) -> list[Made]:
        return [Made(ticket, self.weights, os.getpid()) for ticket in tickets]


class Watched(Plain):
    """Writes its process into `calls` in a folder for every call, and can be held up there: while the folder has a file
    `hold`, calls last; the one that finds `hang` lasts for ever."""

    def __init__(self, folder: str, sleep_s: float = 0.0) -> None:
        self.folder, self.sleep_s = Path(folder), sleep_s

    def generate(self, tickets: list[int]) -> list[Made]:
        with (self.folder / "calls").open("a") as calls:
            calls.write(f"{os.getpid()}\n")
        try:
            (self.folder / "hang").rename(self.folder / "hung")
            time.sleep(3600)
        except FileNotFoundError:
            pass
        while (self.folder / "hold").exists():
            time.sleep(0.02)
        time.sleep(self.sleep_s)
        return super().generate(tickets)


class Puppet:
    """A worker whose answers come when the test says so. Knows what it has been asked."""

    def __init__(self, body: Any, *, starts: bool = True) -> None:
        self.body, self.alive = body, True
        self.open: tuple[str, Sequence[Any], Future[Any]] | None = None
        self._starts = starts

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        if not self.alive:
            answer.set_exception(RuntimeError("the actor is dead"))
        elif method == "ready" and self._starts:
            answer.set_result(None)
        else:
            assert self.open is None, "one call at a time"
            self.open = method, arguments, answer
        return answer

    def answer(self) -> None:
        """What it was asked, done."""
        assert self.open is not None
        method, arguments, answer = self.open
        self.open = None
        try:
            answer.set_result(getattr(self.body, method)(*arguments))
        except Exception as error:
            answer.set_exception(error)

    def die(self) -> None:
        """By itself."""
        self.alive = False
        if self.open is not None:
            self.open[2].set_exception(RuntimeError("The actor died.\nAnd here is a long explanation."))
            self.open = None

    def kill(self) -> None:
        self.alive, self.open = False, None


class Stage:
    """A crew of puppets, with a clock that the test moves."""

    def __init__(self, body: Callable[[], Any], *, starts: bool = True) -> None:
        self.now, self.hired = 0.0, list[Puppet]()
        self._body, self._starts = body, starts

    def hire(self) -> Worker:
        self.hired.append(Puppet(self._body(), starts=self._starts))
        return self.hired[-1]

    def clock(self) -> float:
        return self.now

    @property
    def busy(self) -> list[Puppet]:
        return [puppet for puppet in self.hired if puppet.open is not None]

    def crew(self, size: int, config: Any, what: str = "generator") -> Crew:
        return Crew(self.hire, size, config, what=what, clock=self.clock)


def pool_on(stage: Stage, config: Any) -> Pool:
    return Pool(stage.crew(config.num_generators, config), config, clock=stage.clock)


def plain_stage() -> Stage:
    return Stage(lambda: Generating(Plain, same))
