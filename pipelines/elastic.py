"""As many workers as there is room for, between `cluster.min_workers` and `cluster.num_workers`.

Ray Train's own policy for such a range (2.60) takes any number in it, also one that batches cannot be shared by; goes
by a picture of the cluster up to twenty seconds old, so that it waits for nodes that have just died; and where even the
fewest do not fit, it waits without end and without a pause. This one decides anew, with what Ray counts for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from cortex_core.errors import ConfigError
from pipelines import cluster
from pipelines.config import ClusterConfig, RunConfig

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

SETTLE_S = 5.0
"""After a failure: until then Ray may count a node that is gone."""
POLL_S, ANSWER_TIMEOUT_S = 0.5, 5.0


class Elastic(ElasticScalingPolicy):
    """On Ray Train's controller. Starts the largest of `sizes` (ascending) that fits, waiting `patience_s` for the
    largest of all; a run with fewer grows when there is room, and a healthy one never shrinks.

    Raises ConfigError, which ends the run, if for `cluster.worker_start_timeout_s` not even the smallest fits.
    """

    def __init__(self, config: ClusterConfig, sizes: Sequence[int], patience_s: float) -> None:
        super().__init__(cluster.scaling(config))
        self._each, self._timeout_s = cluster.share(config), config.worker_start_timeout_s
        self._sizes, self._patience_s = tuple(sizes), patience_s
        self._since: float | None = None
        self._started = False
        self._placing: int | None = None
        """Workers that were asked for and have not been seen to run since."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """At the start and after each failure; without a decision Ray asks again at once."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        waited = now - self._since
        if not self._started or waited >= SETTLE_S:
            room, sizes = self._room(), self._possible()
            fits = max((size for size in sizes if size <= room), default=None)
            if fits is not None and (fits == sizes[-1] or waited >= self._patience_s):
                return self._decide(fits)
            if fits is None and waited >= self._timeout_s:
                raise self._too_few(room)
        time.sleep(POLL_S)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Several times a second, while all is well."""
        self._maybe_send_resource_request()
        self._placing = None
        workers, now = worker_group_state.num_workers, time.monotonic()
        last_look = max(worker_group_state.start_time, self._latest_monitor_time)
        if workers == self._sizes[-1] or now - last_look < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._latest_monitor_time = now
        room = min(self._room(), workers + self._free())
        fits = max((size for size in self._sizes if size <= room), default=0)
        return self._decide(fits) if fits > workers else NoopDecision()

    def _decide(self, workers: int) -> ResizeDecision:
        self._since, self._started, self._placing = None, True, workers
        return self._get_resize_decision(workers)

    def _possible(self) -> Sequence[int]:
        """Not again what was tried and never ran, if there is less: others may hold what Ray counts."""
        return [size for size in self._sizes if self._placing is None or size < self._placing] or self._sizes

    def _room(self) -> int:
        """Workers that fit into what Ray has set apart for this run, of all nodes that are alive now."""
        coordinator: Any = self._autoscaling_coordinator
        try:
            mine: dict[str, dict[str, float]] = ray.get(  # type: ignore[assignment]
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=ANSWER_TIMEOUT_S
            )
        except RayError:  # it is busy, or being started again: ask later
            return 0
        return cluster.fitting(mine.values(), self._each)

    def _free(self) -> int:
        """Workers that fit into what nobody uses."""
        nodes = available_resources_per_node().values()  # type: ignore[attr-defined]
        return cluster.fitting(nodes, self._each)

    def _too_few(self, room: int) -> ConfigError:
        fewer = f", or set cluster.min_workers={room}" if room else ""
        return ConfigError(
            f"cluster.min_workers = {self._sizes[0]}: the Ray cluster had room for {room} for {self._timeout_s:g} s "
            f"(cluster.worker_start_timeout_s). Add nodes and start the same command again{fewer}; it goes on from "
            "the last checkpoint"
        )


def scale(trainer: TorchTrainer, config: RunConfig) -> None:
    """Put this policy in the place of Ray's. Only where the cluster grows on demand is there anything to wait for."""
    grows = cluster.room(config.cluster) is None
    policy = Elastic(config.cluster, config.world_sizes, config.cluster.worker_start_timeout_s if grows else 0.0)
    run = trainer._initialize_and_run_controller
    trainer._initialize_and_run_controller = lambda **given: run(**given | {"scaling_policy": policy})  # type: ignore[method-assign]
