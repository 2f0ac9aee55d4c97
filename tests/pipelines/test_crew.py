"""Who dies, hangs or raises is replaced; who cannot be replaced is named. No Ray: a clock that the test moves."""

from __future__ import annotations

import threading
import time

import pytest

from cortex_core.errors import DataError
from pipelines.actor_config import CrewConfig
from pipelines.crew import Crew, Local, Outcome
from tests.pipelines.beside_scenes import Stage

CONFIG = CrewConfig(timeout_s=10, start_timeout_s=30, max_restarts=2, backoff_s=1.0)


class Echo:
    def ready(self) -> None: ...

    def work(self, given: str) -> str:
        if given == "wrong":
            raise DataError("the file is empty")
        if given == "bad":
            raise ZeroDivisionError("by nought")
        return given.upper()


def staged(size: int = 1, *, config: CrewConfig = CONFIG, starts: bool = True) -> tuple[Stage, Crew]:
    stage = Stage(Echo, starts=starts)
    crew = stage.crew(size, config, "echo")
    crew.tend()
    crew.tend()  # takes up that they have started
    return stage, crew


def test_work_comes_back_with_its_answer() -> None:
    stage, crew = staged(2)
    assert crew.free() == [0, 1] and len(crew) == 2
    crew.give(1, "first", "a")
    assert crew.free() == [0] and crew.tend() == []
    stage.hired[1].answer()
    assert crew.tend() == [Outcome("first", "A")] and crew.free() == [0, 1] and crew.restarts == 0


def test_who_dies_is_replaced_at_once_and_then_ever_later() -> None:
    stage, crew = staged()
    crew.give(0, "work", "a")
    stage.hired[0].die()
    assert crew.tend() == [Outcome("work", lost="RuntimeError: The actor died.")] and crew.free() == []
    for pause in (0.0, 1.0):
        stage.now += pause - 0.01
        crew.tend()
        assert len(stage.hired) == 1 + int(pause) or pause == 0.0
        stage.now += 0.01
        crew.tend()
        crew.tend()
        crew.give(0, "work", "a")
        stage.busy[0].die()
        crew.tend() if pause == 0.0 else None
    with pytest.raises(
        RuntimeError,
        match=r"^every echo was lost more than max_restarts = 2 times in a row: echo 0 is replaced in 2.0 s \(3 lost in a row, the last one: RuntimeError: The actor died\.\)\. See to the reason, or raise",
    ):
        crew.tend()
    assert crew.restarts == 3


def test_an_answer_forgives_the_losses_before() -> None:
    stage, crew = staged()
    for _ in range(10):
        crew.give(0, "work", "a")
        stage.busy[0].die()
        assert crew.tend()[0].lost
        crew.tend()
        crew.tend()
        crew.give(0, "work", "a")
        stage.busy[0].answer()
        assert crew.tend()[0].lost is None
    assert crew.restarts == 10


def test_one_that_is_hopeless_is_tried_now_and_then_while_others_work() -> None:
    stage, crew = staged(2)
    for _ in range(6):
        crew.give(0, "work", "a")
        stage.hired[-1 if crew.restarts else 0].die()
        crew.tend()
        stage.now += 60.0
        crew.tend()
        crew.tend()
    assert crew.restarts == 6 and crew.free() == [0, 1]


def test_who_hangs_is_ended_and_its_answer_is_not_heard_any_more() -> None:
    stage, crew = staged()
    crew.give(0, "work", "a")
    stage.now += 10.0
    assert crew.tend() == []
    stage.now += 0.1
    assert crew.tend() == [Outcome("work", lost="did not answer for 10 s (timeout_s)")]
    assert not stage.hired[0].alive
    crew.tend()
    assert len(stage.hired) == 2


def test_who_never_starts_is_replaced_with_no_work_lost() -> None:
    stage, crew = staged(starts=False)
    assert crew.free() == [] and "echo 0 is starting for 0.0 s" in crew.describe()
    stage.now += 30.1
    assert crew.tend() == [] and crew.restarts == 1
    assert "did not answer for 30 s (start_timeout_s; it needs CPU 1)" in crew.describe()


def test_who_dies_while_idle_is_found_out_by_the_next_work() -> None:
    stage, crew = staged()
    stage.hired[0].die()
    crew.give(0, "work", "a")
    assert crew.tend() == [Outcome("work", lost="RuntimeError: the actor is dead")]


def test_what_raises_is_a_loss_unless_it_would_raise_again() -> None:
    crew = Crew(lambda: Local(Echo()), 1, CONFIG)
    crew.tend()
    crew.tend()
    crew.give(0, "work", "bad")
    assert crew.tend() == [Outcome("work", lost="ZeroDivisionError: by nought")]
    crew.tend()
    crew.tend()
    crew.give(0, "work", "wrong")
    with pytest.raises(DataError, match="the file is empty"):
        crew.tend()


def test_without_a_limit_there_is_always_hope() -> None:
    stage, crew = staged(config=CONFIG.model_copy(update={"max_restarts": -1}))
    for _ in range(50):
        crew.give(0, "work", "a")
        stage.busy[0].die()
        crew.tend()
        stage.now += 60.0  # the longest pause
        crew.tend()
        crew.tend()
    assert crew.restarts == 50 and crew.free() == [0]


def test_waiting_ends_with_an_answer_new_work_or_its_time() -> None:
    stage = Stage(Echo)
    crew = Crew(stage.hire, 1, CONFIG)
    crew.tend()
    crew.tend()
    for happens in (lambda: crew.give(0, "work", "a"), lambda: stage.hired[0].answer(), crew.wake):
        other = threading.Timer(0.05, happens)
        start = time.monotonic()
        other.start()
        crew.wait(20.0)
        other.join()
        assert time.monotonic() - start < 10.0
        crew.tend()
    start = time.monotonic()
    crew.wait(0.05)
    assert 0.04 < time.monotonic() - start < 10.0


def test_after_the_end_nobody_is_left_and_nobody_comes() -> None:
    stage, crew = staged(2)
    crew.give(0, "work", "a")
    crew.close()
    crew.close()
    assert not any(puppet.alive for puppet in stage.hired)
    stage.now += 1e6
    assert crew.tend() == [] and len(stage.hired) == 2 and crew.free() == []
