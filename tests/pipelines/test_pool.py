"""A pool's samples: each once, none too stale, no more than there is room for, whoever dies. No Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import ValidationError

from pipelines.actor_config import PoolConfig
from pipelines.crew import Crew, Local
from pipelines.duties import Generating
from pipelines.pool import Pool, Sample
from tests.pipelines.beside_scenes import Plain, Stage, plain_stage, pool_on, same


def config(**settings: Any) -> PoolConfig:
    return PoolConfig(**{"num_generators": 2, "queue_items": 8, "max_staleness": 2, "backoff_s": 0.0} | settings)


def settle(pool: Pool, stage: Stage) -> None:
    """Everybody answers, until nobody is asked any more."""
    pool._tend()
    pool._tend()
    while stage.busy:
        stage.busy[0].answer()
        pool._tend()


def take(pool: Pool, n: int) -> list[Sample] | None:
    try:
        return pool.take(n, 0.0)
    except TimeoutError:
        return None


def tickets(samples: Sequence[Sample] | None) -> list[int] | None:
    return None if samples is None else [sample.ticket for sample in samples]


def test_in_this_process_without_ray() -> None:
    settings = config(max_staleness=0, num_generators=1)
    with Pool(Crew(lambda: Local(Generating(Plain, same)), 1, settings), settings) as pool:
        pool.publish(0, "first")
        assert [(s.ticket, s.version, s.value.weights) for s in pool.take(3, 5.0)] == [
            (n, 0, "first") for n in range(3)
        ]
        pool.publish(1, "second")
        assert [(s.ticket, s.version, s.value.weights) for s in pool.take(2, 5.0)] == [
            (3, 1, "second"),
            (4, 1, "second"),
        ]
        assert pool.state_dict() == {"used_below": 5, "used_above": []}
    with pytest.raises(RuntimeError, match=r"^the pool is closed"):
        pool.take(1, 1.0)


def test_nothing_is_begun_that_would_be_too_stale() -> None:
    stage = plain_stage()
    pool = pool_on(stage, config(max_staleness=0))
    pool.publish(0, "w")
    settle(pool, stage)
    assert stage.busy == [] and pool.metrics()["dream/queue_items"] == 0.0, "nobody has asked"
    assert take(pool, 3) is None
    settle(pool, stage)
    assert pool.metrics()["dream/queue_items"] == 2.0, "the third was not begun: nobody is asking any more"
    pool.publish(1, "w")
    settle(pool, stage)
    assert pool.metrics()["dream/queue_items"] == 0.0 and pool.metrics()["dream/reissued"] == 2.0


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_queue_never_holds_more_than_it_may(staleness: int) -> None:
    stage = plain_stage()
    pool = pool_on(stage, config(max_staleness=staleness, queue_items=5, tickets_per_call=2, num_generators=3))
    for version in range(6):
        pool.publish(version, "w")
        while (taken := take(pool, 4)) is None:
            assert len(pool._queue) + len(pool._under_way) <= 5
            for puppet in stage.busy:
                puppet.answer()
        assert len(taken) == 4 and len(pool._queue) + len(pool._under_way) <= 5


def test_a_sample_that_is_too_stale_is_made_again_and_waited_for_the_second_time() -> None:
    stage = plain_stage()
    pool = pool_on(stage, config(max_staleness=1, num_generators=2))
    pool.publish(0, "v0")
    slow = None
    for version in range(1, 6):
        while (taken := take(pool, 1)) is None:
            slow = slow or next((p for p in stage.busy if p.open and p.open[1][0] == [0]), None)
            for puppet in stage.busy:
                if puppet is not slow:
                    puppet.answer()
            if not [puppet for puppet in stage.busy if puppet is not slow]:
                pool._tend()
        if version == 2:
            break
        pool.publish(version, f"v{version}")
    assert slow is not None and tickets(taken) != [0]
    pool.publish(2, "v2")
    slow.answer()
    pool._tend()
    assert pool.metrics()["dream/reissued"] == 1.0 and pool.metrics()["dream/accept_frac"] < 1.0
    held = [puppet for puppet in stage.busy if puppet.open and puppet.open[1][0] == [0]]
    assert held and held[0].open and held[0].open[1][1] == 2, "it is made again, with the newest weights"
    pool.publish(3, "v3")
    for _ in range(10):  # training waits for it, with others in the queue
        assert take(pool, 1) is None
        for puppet in stage.busy:
            if puppet is not held[0]:
                puppet.answer()
    assert pool.metrics()["dream/queue_items"] >= 1.0
    held[0].answer()
    assert 0 in [ticket for _ in range(2) for ticket in tickets(take(pool, 1)) or []]


def test_metrics_say_how_it_goes() -> None:
    stage = plain_stage()
    pool = pool_on(stage, config())
    pool.publish(0, "w")
    assert take(pool, 4) is None
    stage.busy[0].die()
    while take(pool, 4) is None:
        for puppet in stage.busy:
            puppet.answer()
    assert pool.metrics() == {
        "dream/queue_items": 0.0, "dream/staleness_versions": 0.0, "dream/accept_frac": 1.0, "dream/restarts": 1.0,
        "dream/reissued": 1.0, "dream/wait_s": 0.0,
    }  # fmt: skip
    settle(pool, stage)
    assert pool.metrics()["dream/queue_items"] == 8.0
    pool.publish(2, "w")
    take(pool, 4)
    assert pool.metrics()["dream/staleness_versions"] == 2.0


def test_what_is_wrong_is_said() -> None:
    stage = plain_stage()
    pool = pool_on(stage, config(num_generators=1))
    with pytest.raises(ValueError, match=r"^take: there are no weights yet\. Call publish"):
        pool.take(1, 1.0)
    pool.publish(3, "w")
    with pytest.raises(ValueError, match=r"^version = 3: must be above 3"):
        pool.publish(3, "w")
    with pytest.raises(ValueError, match=r"^take\(n = 9\): must be from 1 to 8, queue_items"):
        pool.take(9, 1.0)
    with pytest.raises(ValueError, match=r"^load_state_dict: generators are working already"):
        pool.load_state_dict(pool.state_dict())
    assert take(pool, 2) is None
    stage.now += 2.0
    with pytest.raises(
        TimeoutError,
        match=r"^0 of 2 samples after timeout_s = 0: generator 0 is at tickets \[0\] of version 3 for 2\.0 s\. Raise timeout_s or num_generators",
    ):
        pool.take(2, 0.0)
    with pytest.raises(ValidationError, match=r"tickets_per_call = 9: must be at most 8, queue_items"):
        PoolConfig(queue_items=8, tickets_per_call=9)


def test_a_source_that_forgets_a_sample_is_told() -> None:
    class Forgetful(Plain):
        def generate(self, tickets: list[int]) -> list[Any]:
            return []

    stage = Stage(lambda: Generating(Forgetful, same))
    pool = pool_on(stage, config())
    pool.publish(0, "w")
    take(pool, 1)
    stage.busy[0].answer()
    with pytest.raises(RuntimeError, match=r"^0 samples for 1 tickets: Source\.generate must return one for each"):
        pool.take(1, 0.0)


def test_a_ticket_that_takes_every_generator_with_it_is_named() -> None:
    class Trap(Plain):
        def generate(self, tickets: list[int]) -> list[Any]:
            if 1 in tickets:
                raise MemoryError("out of memory")
            return super().generate(tickets)

    stage = Stage(lambda: Generating(Trap, same))
    pool = pool_on(stage, config(max_restarts=2))
    pool.publish(0, "w")

    def on() -> None:
        for version in range(1, 50):
            for _ in range(20):
                take(pool, 1)
                stage.now += 60.0
                for puppet in stage.busy:
                    puppet.answer()
            pool.publish(version, "w")

    with pytest.raises(
        RuntimeError,
        match=r"^ticket 1: 3 generators were lost with it, max_restarts = 2; the last one: MemoryError: out of memory\.",
    ):
        on()


def test_weights_that_cannot_be_loaded_make_no_samples_of_others() -> None:
    class Picky(Plain):
        def load(self, version: int, weights: str) -> None:
            if weights == "bad":
                raise OSError("cannot load")
            super().load(version, weights)

    body = Generating(Picky, same)
    assert body.work([0], 0, "good")[0].weights == "good"
    with pytest.raises(OSError, match="cannot load"):
        body.work([1], 1, "bad")
    assert body.work([1], 0, "good")[0].weights == "good", "loaded anew"


@given(generators=st.integers(1, 4), per_call=st.integers(1, 3), data=st.data())
def test_without_staleness_the_order_does_not_depend_on_the_generators(
    generators: int, per_call: int, data: st.DataObject
) -> None:
    """Nor on who is quick, who dies and when training takes up a checkpoint."""
    settings = config(max_staleness=0, num_generators=generators, tickets_per_call=per_call, max_restarts=-1)
    stage = plain_stage()
    pool = pool_on(stage, settings)
    got: list[tuple[int, int, str]] = []
    for version in range(4):
        pool.publish(version, f"v{version}")
        for n in (3, 2):
            while (taken := take(pool, n)) is None:
                if stage.busy:
                    puppet = data.draw(st.sampled_from(range(len(stage.busy))))
                    getattr(stage.busy[puppet], data.draw(st.sampled_from(["answer", "answer", "die"])))()
                stage.now += 60.0
            got += [(sample.ticket, sample.version, sample.value.weights) for sample in taken]
        if data.draw(st.booleans()):
            state = json.loads(json.dumps(pool.state_dict()))
            pool.close()
            pool = pool_on(stage, settings)
            pool.load_state_dict(state)
            pool.publish(version, f"v{version}") if version == 3 else None
    assert got == [(ticket, ticket // 5, f"v{ticket // 5}") for ticket in range(20)]


class Life(RuleBasedStateMachine):
    """A pool whose generators answer, die and hang in any order, and a training that dies, too."""

    @initialize(staleness=st.integers(0, 3), generators=st.integers(1, 3), per_call=st.integers(1, 3))
    def begin(self, staleness: int, generators: int, per_call: int) -> None:
        self.settings = config(
            max_staleness=staleness, num_generators=generators, tickets_per_call=per_call, max_restarts=-1, timeout_s=10
        )
        self.stage, self.version, self.learned = plain_stage(), 0, list[int]()
        self.pool = pool_on(self.stage, self.settings)
        self.pool.publish(0, "w0")
        self.save()

    @rule(n=st.integers(1, 4))
    def take(self, n: int) -> None:
        samples = take(self.pool, n) or []
        self.learned += [sample.ticket for sample in samples]
        for sample in samples:
            assert sample.value == (sample.ticket, f"w{sample.version}", sample.value.pid)
            assert 0 <= self.version - sample.version <= self.settings.max_staleness

    @rule()
    def publish(self) -> None:
        self.version += 1
        self.pool.publish(self.version, f"w{self.version}")

    @precondition(lambda self: self.stage.busy)
    @rule(data=st.data(), what=st.sampled_from(["answer", "answer", "answer", "die"]))
    def generator(self, data: st.DataObject, what: str) -> None:
        getattr(data.draw(st.sampled_from(self.stage.busy)), what)()

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.stage.now += seconds

    @rule()
    def save(self) -> None:
        self.saved = json.dumps(self.pool.state_dict()), [*self.learned], self.version

    @rule()
    def training_dies(self) -> None:
        self.pool.close()
        state, learned, self.version = self.saved
        self.learned, self.pool = [*learned], pool_on(self.stage, self.settings)
        self.pool.load_state_dict(json.loads(state))
        self.pool.publish(self.version, f"w{self.version}")

    @invariant()
    def each_once_and_no_more_than_fit(self) -> None:
        assert len(self.learned) == len({*self.learned})
        assert len(self.pool._queue) + len(self.pool._under_way) <= self.settings.queue_items

    def teardown(self) -> None:
        """When nothing happens any more, every ticket up to the last one that was begun arrives."""
        top = max([*self.learned, self.pool._ledger.first_missing(), *self.pool._under_way, *self.pool._queue])
        for _ in range(400):
            if {*range(top + 1)} <= {*self.learned}:
                break
            self.take(1)
            self.stage.now += 1.0
            for puppet in self.stage.busy:
                puppet.answer()
        assert {*range(top + 1)} <= {*self.learned} and len(self.learned) == len({*self.learned})


TestLife = Life.TestCase
