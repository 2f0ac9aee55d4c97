"""Nights are merged once or not at all, whoever dies; a night that is refused leaves no trace. No Ray."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from cortex_core.errors import DataError
from pipelines.actor_config import NightsConfig
from pipelines.crew import Crew, Local
from pipelines.duties import Consolidating
from pipelines.nights import Night, Nights, Verdict
from tests.pipelines.beside_scenes import Stage


class Pairs(NamedTuple):
    """What there is to learn: a linear map."""

    inputs: Tensor
    outputs: Tensor


class Regression:
    """Some steps of gradient descent on a sample of the lessons."""

    def consolidate(self, snapshot: dict[str, Tensor], lessons: Pairs, seed: int) -> dict[str, Tensor]:
        chosen = torch.randperm(len(lessons.inputs), generator=torch.Generator().manual_seed(seed))[:8]
        inputs, outputs = lessons.inputs[chosen], lessons.outputs[chosen]
        weight = snapshot["map"].clone()
        for _ in range(20):
            weight -= 0.1 * inputs.T @ (inputs @ weight - outputs) / len(chosen)
        return {"map": weight - snapshot["map"]}


def lessons(number: int) -> Pairs:
    generator = torch.Generator().manual_seed(number)
    return Pairs(torch.randn(12, 3, generator=generator), torch.randn(12, 2, generator=generator))


def slow() -> dict[str, Tensor]:
    return {"map": torch.full((3, 2), 0.25)}


def nights_on(stage: Stage, **settings: Any) -> Nights:
    config = NightsConfig(**{"backoff_s": 0.0} | settings)
    return Nights(stage.crew(1, config, "sleeper"), config, clock=stage.clock)


def stage() -> Stage:
    return Stage(lambda: Consolidating(Regression))


def slept(nights: Nights, on: Stage) -> Night:
    for _ in range(6):
        if (night := nights.poll()) is not None:
            return night
        for puppet in on.busy:
            puppet.answer()
    raise AssertionError("nobody sleeps")


def test_waiting_is_calling_the_consolidator() -> None:
    config = NightsConfig()
    weights = slow()
    with Nights(Crew(lambda: Local(Consolidating(Regression)), 1, config), config) as nights:
        assert nights.submit(7, weights, lessons(0)) == 0
        seed = nights._seed(nights._works[0])
        night = nights.wait(10.0)
        expected = Regression().consolidate(slow(), lessons(0), seed)
        assert (night.number, night.version) == (0, 7) and torch.equal(night.delta["map"], expected["map"])
        assert nights.merge(night, weights, 7) == Verdict(True)
        assert torch.equal(weights["map"], slow()["map"] + expected["map"])
        with pytest.raises(ValueError, match=r"^night 0: is settled already"):
            nights.merge(night, weights, 7)
        assert nights.state_dict() == {"next": 1, "pending": []}
    assert nights.metrics() == {
        "sleep/nights": 1.0, "sleep/merged": 1.0, "sleep/stale": 0.0, "sleep/refused": 0.0, "sleep/given_up": 0.0,
        "sleep/restarts": 0.0, "sleep/wait_s": pytest.approx(0.0, abs=5.0),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=r"^the nights are closed"):
        nights.poll()


def test_training_goes_on_meanwhile_and_what_it_changes_is_not_slept_on() -> None:
    on, weights = stage(), slow()
    nights = nights_on(on)
    nights.submit(0, weights, lessons(0))
    assert nights.poll() is None and nights.poll() is None and len(on.busy) == 1
    weights["map"] += 1.0
    night = slept(nights, on)
    assert nights.poll() is night, "until it is merged"
    (_, arguments, _) = ("", (slow(), lessons(0), nights._seed(nights._works[0])), "")
    assert torch.equal(night.delta["map"], Regression().consolidate(*arguments)["map"])
    assert nights.merge(night, weights, 1).merged and nights.poll() is None


@pytest.mark.parametrize("why", ["drift", "not finite", "an error"])
def test_what_is_refused_leaves_no_trace_and_is_tried_again(why: str) -> None:
    on, weights = stage(), slow()
    weights["map"][0, 0] = -0.0
    before = weights["map"].numpy().tobytes()
    nights = nights_on(on)
    nights.submit(0, weights, lessons(0))
    night = slept(nights, on)
    first = night.delta["map"].clone()
    if why == "an error":
        with pytest.raises(KeyboardInterrupt):
            nights.merge(night, weights, 0, interrupted)
        assert weights["map"].numpy().tobytes() == before and nights.poll() is night
        return
    if why == "not finite":
        night.delta["map"][1, 1] = float("nan")
    asked: list[bool] = []
    verdict = nights.merge(night, weights, 0, lambda: bool(asked.append(torch.equal(weights["map"], slow()["map"]))))
    assert verdict == Verdict(False, "refused") and asked == ([False] if why == "drift" else [])
    assert weights["map"].numpy().tobytes() == before
    again = slept(nights, on)
    assert again.number == 0 and not torch.equal(again.delta["map"], first), "another seed"
    assert nights.merge(again, weights, 0).merged
    assert nights.metrics()["sleep/refused"] == 1.0 and nights.metrics()["sleep/nights"] == 2.0


def interrupted() -> bool:
    raise KeyboardInterrupt


def test_what_comes_too_late_is_slept_again_on_the_weights_as_they_are() -> None:
    on, weights = stage(), slow()
    nights = nights_on(on, max_staleness=1, max_tries=2)
    nights.submit(0, weights, lessons(0))
    night = slept(nights, on)
    weights["map"] *= 2.0
    assert nights.merge(night, weights, 2) == Verdict(False, "stale")
    again = slept(nights, on)
    assert again.version == 2
    expected = Regression().consolidate({"map": slow()["map"] * 2}, lessons(0), nights._seed(nights._works[0]))
    assert torch.equal(again.delta["map"], expected["map"])
    assert nights.merge(again, weights, 4) == Verdict(False, "stale", given_up=True)
    assert torch.equal(again.lessons.inputs, lessons(0).inputs), "the caller has them still"
    assert nights.poll() is None and nights.state_dict()["pending"] == [] and nights.metrics()["sleep/given_up"] == 1.0


def test_an_actor_that_dies_or_hangs_loses_nothing() -> None:
    on, weights = stage(), slow()
    nights = nights_on(on, timeout_s=10)
    for number in range(2):
        nights.submit(0, weights, lessons(number))
    nights.poll()
    on.busy[0].die()
    nights.poll()
    nights.poll()
    nights.poll()
    on.now += 11.0
    for number in range(2):
        night = slept(nights, on)
        assert night.number == number
        expected = Regression().consolidate(slow(), lessons(number), nights._seed(nights._works[number]))
        assert torch.equal(night.delta["map"], expected["map"])
        assert nights.merge(night, weights, number).merged
    assert nights.metrics()["sleep/restarts"] == 2.0


def test_what_is_wrong_is_said() -> None:
    on, weights = stage(), slow()
    nights = nights_on(on, queue_nights=1, max_restarts=1)
    with pytest.raises(ValueError, match=r"^wait: no lessons were handed in"):
        nights.wait(1.0)
    nights.submit(1, weights, lessons(0))
    assert nights.full
    with pytest.raises(RuntimeError, match=r"^1 nights wait already, queue_nights = 1\. Call wait and merge"):
        nights.submit(1, weights, lessons(1))
    with pytest.raises(
        TimeoutError,
        match=r"^no night has ended within timeout_s = 0: sleeper 0 is at night 0, try 1 for 0\.0 s\. Raise",
    ):
        nights.wait(0.0)
    night = slept(nights, on)
    with pytest.raises(ValueError, match=r"^version = 0: must be at least 1"):
        nights.merge(night, weights, 0)
    with pytest.raises(
        ValueError, match=r"^night 0: the delta has \{'map': \(3, 2\)\}, the slow weights are \{'other'"
    ):
        nights.merge(night, {"other": weights["map"]}, 1)
    with pytest.raises(ValueError, match=r"^load_state_dict: nights have been handed in already"):
        nights.load_state_dict(nights.state_dict(), 1, weights)
    assert nights.merge(night, weights, 1).merged
    nights.submit(1, weights, lessons(1))

    def lose_all() -> None:
        for _ in range(10):
            nights.poll()
            for puppet in on.busy:
                puppet.die()

    with pytest.raises(
        RuntimeError, match=r"^every sleeper was lost more than max_restarts = 1 times in a row: sleeper 0"
    ):
        lose_all()


@pytest.mark.parametrize(
    "state",
    [{}, {"next": 1}, {"next": 1, "pending": [{"number": 0}]}, {"next": 0, "pending": [{"number": 0, "tries": 0, "lessons": 0}]},
     {"next": 2, "pending": [{"number": 1, "tries": 0, "lessons": 0}] * 2}],
    ids=str,
)  # fmt: skip
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^nights: .*The checkpoint is damaged; go on from the one before it"):
        nights_on(stage()).load_state_dict(state, 0, slow())


class Life(RuleBasedStateMachine):
    """Nights and a training that merges them, both of which may die. What a night teaches is its number, so the slow
    weights say how often each was merged."""

    @initialize(staleness=st.integers(0, 2))
    def begin(self, staleness: int) -> None:
        self.staleness, self.on = staleness, Stage(lambda: Consolidating(Tally))
        self.nights, self.weights, self.version = self.new(), {"merged": torch.zeros(64)}, 0
        self.given_up: set[int] = set()
        self.save()

    def new(self) -> Nights:
        return nights_on(self.on, max_staleness=self.staleness, max_restarts=-1, timeout_s=10, queue_nights=3)

    @precondition(lambda self: not self.nights.full and self.nights._next < 64)
    @rule()
    def submit(self) -> None:
        self.nights.submit(self.version, self.weights, self.nights._next)

    @rule(agrees=st.booleans())
    def merge(self, agrees: bool) -> None:
        if (night := self.nights.poll()) is not None:
            verdict = self.nights.merge(night, self.weights, self.version, lambda: agrees)
            assert verdict.merged <= (agrees and self.version - night.version <= self.staleness)
            self.version += verdict.merged
            self.given_up |= {night.number} if verdict.given_up else set()

    @rule()
    def weights_change(self) -> None:
        self.version += 1

    @precondition(lambda self: self.on.busy)
    @rule(what=st.sampled_from(["answer", "answer", "die"]))
    def actor(self, what: str) -> None:
        getattr(self.on.busy[0], what)()

    @rule()
    def hang(self) -> None:
        self.on.now += 11.0

    @rule()
    def save(self) -> None:
        self.saved = copy.deepcopy((self.nights.state_dict(), self.weights, self.version, self.given_up))

    @rule()
    def training_dies(self) -> None:
        self.nights.close()
        state, self.weights, self.version, self.given_up = copy.deepcopy(self.saved)
        self.nights = self.new()
        self.nights.load_state_dict(state, self.version, self.weights)

    @invariant()
    def at_most_once(self) -> None:
        assert set(self.weights["merged"].tolist()) <= {0.0, 1.0}

    def teardown(self) -> None:
        """In the end each is merged or given up."""
        for _ in range(100):
            self.merge(True)
            for puppet in self.on.busy:
                puppet.answer()
        merged = {int(number) for number in self.weights["merged"].nonzero()}
        assert merged | self.given_up == {*range(self.nights._next)} and not merged & self.given_up


class Tally:
    def consolidate(self, snapshot: dict[str, Tensor], lessons: int, seed: int) -> dict[str, Tensor]:
        return {"merged": torch.eye(64)[lessons]}


TestLife = Life.TestCase
