"""Each ticket reaches training exactly once, in whatever order things happen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cortex_core.errors import DataError
from pipelines.ledger import Ledger


def test_tickets_are_issued_in_order_and_what_was_lost_comes_first() -> None:
    ledger = Ledger()
    assert ledger.issue(4) == [0, 1, 2, 3]
    ledger.deliver([0, 2])
    ledger.lose([3, 1])
    assert ledger.first_missing() == 1
    ledger.reject([0])
    assert ledger.issue(4) == [0, 1, 3, 4]
    assert ledger.first_missing() == 0 and {*ledger.out} == {0, 1, 3, 4} and {*ledger.delivered} == {2}


def test_what_is_kept_is_a_number_and_the_few_above_it() -> None:
    ledger = Ledger()
    ledger.issue(1000)
    ledger.deliver(range(1000))
    ledger.use([n for n in range(1000) if n not in (990, 995)])
    state = ledger.state_dict()
    assert state == {"used_below": 990, "used_above": [991, 992, 993, 994, 996, 997, 998, 999]}
    again = Ledger()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.issue(4) == [990, 995, 1000, 1001] and again.num_used == 998
    assert again.used(989) and again.used(994) and not again.used(990)


@pytest.mark.parametrize("move", ["deliver", "lose", "reject", "use"])
def test_nothing_moves_twice(move: str) -> None:
    ledger = Ledger()
    ledger.issue(2)
    ledger.deliver([1])
    ticket = 1 if move in ("deliver", "lose") else 0
    with pytest.raises(ValueError, match=rf"^tickets \[{ticket}\]: must be (out|delivered), or something would reach"):
        getattr(ledger, move)([ticket])
    assert ledger.state_dict() == {"used_below": 0, "used_above": []}


@pytest.mark.parametrize(
    "state",
    [{}, {"used_below": -1, "used_above": []}, {"used_below": 1, "used_above": None}, {"used_below": True, "used_above": []},
     {"used_below": 2, "used_above": [1]}, {"used_below": 2, "used_above": [2]}, {"used_below": 0, "used_above": [3, 3]},
     {"used_below": 0, "used_above": ["3"]}],
    ids=str,
)  # fmt: skip
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^ledger: used_.*The checkpoint is damaged; go on from the one before it"):
        Ledger().load_state_dict(state)


class Life(RuleBasedStateMachine):
    """A ledger, and a training that remembers what it got, with its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.learned = Ledger(), list[int]()
        self.saved: tuple[str, list[int]] = json.dumps(self.ledger.state_dict()), []

    @rule(count=st.integers(0, 5))
    def issue(self, count: int) -> None:
        self.ledger.issue(count)

    @precondition(lambda self: self.ledger.out)
    @rule(data=st.data(), move=st.sampled_from(["deliver", "deliver", "lose"]))
    def come_back(self, data: st.DataObject, move: str) -> None:
        getattr(self.ledger, move)(data.draw(st.sets(st.sampled_from(sorted(self.ledger.out)))))

    @precondition(lambda self: self.ledger.delivered)
    @rule(data=st.data(), rejected=st.booleans())
    def leave(self, data: st.DataObject, rejected: bool) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.ledger.delivered))))
        if rejected:
            self.ledger.reject(chosen)
        else:
            self.ledger.use(chosen)
            self.learned += chosen

    @rule()
    def save(self) -> None:
        self.saved = json.dumps(self.ledger.state_dict()), [*self.learned]

    @rule()
    def training_dies(self) -> None:
        state, learned = self.saved
        self.ledger, self.learned = Ledger(), [*learned]
        self.ledger.load_state_dict(json.loads(state))

    @invariant()
    def nothing_was_learned_twice(self) -> None:
        assert len(self.learned) == len({*self.learned}) == self.ledger.num_used
        assert all(self.ledger.used(ticket) for ticket in self.learned)

    @invariant()
    def tickets_are_in_one_place(self) -> None:
        out, delivered = {*self.ledger.out}, {*self.ledger.delivered}
        assert not out & delivered and not (out | delivered) & {*self.learned}
        missing = self.ledger.first_missing()
        assert {*range(missing)} <= {*self.learned} | delivered and missing not in {*self.learned} | delivered

    def teardown(self) -> None:
        """Whatever has happened, nothing is lost."""
        self.ledger.lose({*self.ledger.out})
        self.ledger.use({*self.ledger.delivered})
        top = max([*self.learned, self.ledger.num_used, self.ledger.first_missing()])
        while self.ledger.first_missing() <= top:
            (ticket,) = self.ledger.issue(1)
            self.ledger.deliver([ticket])
            self.ledger.use([ticket])
        state = self.ledger.state_dict()
        assert state["used_above"] == [] and state["used_below"] == self.ledger.num_used > top


TestLife = Life.TestCase
