"""How many workers a run gets, and when, as the room on its cluster changes. With real nodes: `test_faults`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from cortex_core.errors import ConfigError
from pipelines import cluster, elastic
from pipelines.config import ClusterConfig
from pipelines.elastic import SETTLE_S, Elastic


class Controller:
    """A cluster with some room, a clock that is told the time, and Ray Train's controller, which asks the policy."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], room: int, patience_s: float = 0.0
    ) -> None:
        self.now, self.room, self.free = 100.0, room, 0
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(elastic, "time", clock)
        monkeypatch.setattr(Elastic, "_maybe_send_resource_request", lambda policy: None)
        monkeypatch.setattr(Elastic, "_room", lambda policy: self.room)
        monkeypatch.setattr(Elastic, "_free", lambda policy: self.free)
        config = ClusterConfig(min_workers=sizes[0], num_workers=sizes[-1], worker_start_timeout_s=60.0)
        self.policy = Elastic(config, sizes, patience_s)
        self.began = 0.0

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def start(self) -> tuple[int, float]:
        """Workers that are started, and after how many seconds."""
        began = self.now
        while isinstance(decision := self.policy.make_decision_for_non_running_worker_group(), NoopDecision):
            assert self.now > began, "it has to pause, for Ray asks again at once"
        assert isinstance(decision, ResizeDecision)
        self.began = self.now
        return decision.num_workers, self.now - began

    def look(self, workers: int, after_s: float = 0.0) -> int:
        """What a healthy group of `workers` is told to be, some time later."""
        self.now += after_s
        state: Any = SimpleNamespace(num_workers=workers, start_time=self.began)
        decision = self.policy.make_decision_for_running_worker_group(state, None)
        return decision.num_workers if isinstance(decision, ResizeDecision) else workers


@pytest.mark.parametrize(("room", "workers"), [(9, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_a_run_starts_at_once_with_the_most_that_fit_and_share_evenly(
    monkeypatch: pytest.MonkeyPatch, room: int, workers: int
) -> None:
    assert Controller(monkeypatch, (1, 2, 4), room).start() == (workers, 0.0)


def test_after_a_failure_ray_is_given_time_to_see_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, (1, 2), room=2)
    assert controller.start() == (2, 0.0)
    assert controller.look(2, after_s=1.0) == 2
    controller.room = 1
    assert controller.start() == (1, SETTLE_S)
    assert controller.look(1, after_s=1.0) == 1
    controller.room = 2
    assert controller.start() == (2, SETTLE_S), "a restart is when a run grows for nothing"


def test_where_nodes_come_on_demand_it_waits_for_all_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, (1, 2, 4), room=2, patience_s=30.0)
    assert controller.start() == (2, 30.0)
    controller = Controller(monkeypatch, (1, 2, 4), room=4, patience_s=30.0)
    assert controller.start() == (4, 0.0)


def test_too_little_room_for_too_long_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, (2, 4), room=1)
    with pytest.raises(ConfigError) as error:
        controller.start()
    assert controller.now == 160.0
    assert str(error.value) == (
        "cluster.min_workers = 2: the Ray cluster had room for 1 for 60 s (cluster.worker_start_timeout_s). Add nodes "
        "and start the same command again, or set cluster.min_workers=1; it goes on from the last checkpoint"
    )
    controller = Controller(monkeypatch, (2, 4), room=0)
    with pytest.raises(ConfigError, match=r"had room for 0 for 60 s .* again; it goes on"):
        controller.start()


def test_what_could_not_be_placed_is_tried_with_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts what others hold as well: a start that ran into its timeout is not made again as it was."""
    controller = Controller(monkeypatch, (1, 2, 4), room=4)
    assert [controller.start()[0] for _ in range(4)] == [4, 2, 1, 4]
    assert controller.look(4) == 4
    assert controller.start()[0] == 4


def test_a_healthy_run_grows_when_there_is_room_and_never_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, every = Controller(monkeypatch, (1, 2, 4), room=1), cluster.GROW_EVERY_S
    assert controller.start() == (1, 0.0)
    controller.room = 4
    assert controller.look(1, after_s=every - 1) == 1, "not yet"
    assert controller.look(1, after_s=1) == 1, "others hold it"
    controller.free = 2
    assert controller.look(1, after_s=1) == 1, "it has only just looked"
    assert controller.look(1, after_s=every) == 2, "three have room, but do not share evenly"
    controller.began, controller.free = controller.now, 2
    assert controller.look(2, after_s=every) == 4
    controller.began, controller.room, controller.free = controller.now, 0, 0
    assert controller.look(4, after_s=every) == 4


def test_shares_of_a_cpu_add_up() -> None:
    assert cluster.fitting([{"CPU": 1.0}, {"CPU": 0.3, "GPU": 1.0}], {"CPU": 0.1}) == 13
    assert cluster.fitting([{"CPU": 1.0}, {"CPU": 0.3, "GPU": 1.0}], {"CPU": 0.1, "GPU": 1.0}) == 1
