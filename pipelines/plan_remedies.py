"""What to change about a run that does not fit; every proposal is planned anew before it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipelines.config import RunConfig
from pipelines.gpus import Hardware
from pipelines.plan import Plan, Planner
from pipelines.zero3 import offload_of

MOST_ROWS = 4096
"""Long sequences side by side on one GPU beyond which no larger batch is looked for."""
MOST_WORKERS_TIMES = 64
TRIES = 4
"""Plans by which the largest batch is found: bytes grow almost linearly with it."""


OFFLOAD: dict[str, Any] = {"sharding.stage": 3, "sharding.deepspeed": None, "sharding.offload": "cpu"}
"""What lets shards rest in the node's memory; a file of DeepSpeed's would contradict it."""


class Remedy(NamedTuple):
    """A change, and the plan with it."""

    change: str
    """As it is typed: overrides, or options."""
    plan: Plan


def largest_batch(planner: Planner, plan: Plan) -> int:
    """Largest `training.batch_size` with which everything else of the plan fits; 0 if not even one row does."""
    rows, fit, miss = plan.batch.rows, 0, MOST_ROWS + 1
    known = {}
    for _ in range(TRIES):
        known[rows] = tried = _with_rows(planner, plan, rows)
        if tried.fits:
            fit = max(fit, rows)
        else:
            miss = min(miss, rows)
        if miss - fit <= 1:
            break
        rows = min(max(_guess(known, plan.hardware), fit + 1), miss - 1)
    return fit * _parts(plan)


def _guess(known: Mapping[int, Plan], hardware: Hardware) -> int:
    """Rows with which the memory would be full, along the line through the two plans that are nearest to that."""
    room = hardware.gpu.memory_bytes
    nearest = sorted(known, key=lambda rows: abs(known[rows].memory.total_bytes - room))[:2]
    if len(nearest) == 1:
        (rows,) = nearest
        return 2 * rows if known[rows].fits else rows // 2
    one, other = nearest
    size_one, size_other = (known[rows].memory.total_bytes for rows in nearest)
    slope = (size_one - size_other) / (one - other)
    return math.floor(one + (room - size_one) / slope) if slope > 0 else 2 * max(nearest)


def remedies(planner: Planner, plan: Plan, largest: int) -> list[Remedy]:
    """Changes, one at a time, each with whether it is enough; if none is, also what saves most, together."""
    found = list(_single(planner, plan, largest))
    if any(remedy.plan.fits for remedy in found):
        return found
    saving = {"training.gradient_checkpointing": True} | ({} if _offloaded(plan) else OFFLOAD)
    parts = _parts(plan)
    small = {"training.batch_size": parts, "training.in_window_batch_size": min(parts, _windows(plan))}
    for change in (saving, saving | small):
        found.append(_changed(planner, plan, change))
        if found[-1].plan.fits:
            break
    return found


def _single(planner: Planner, plan: Plan, largest: int) -> Iterator[Remedy]:
    training, sharding, workers = plan.config.training, plan.config.sharding, plan.hardware.workers
    if largest:
        yield _changed(planner, plan, {"training.batch_size": largest})
    if (accumulated := _accumulated(planner, plan)) is not None:
        yield accumulated
    if not training.gradient_checkpointing:
        yield _changed(planner, plan, {"training.gradient_checkpointing": True})
    if sharding.stage == 0 and workers > 1:
        yield _changed(planner, plan, {"sharding.stage": 3})
    if not _offloaded(plan):
        yield _changed(planner, plan, OFFLOAD)
    if plan.dtype == "float32":
        yield _changed(planner, plan, {"backbone.dtype": "bfloat16"})
    if (wider := _more_gpus(planner, plan)) is not None:
        yield wider


def _accumulated(planner: Planner, plan: Plan) -> Remedy | None:
    """The fewest micro-batches of the same batch that fit, or the most that there can be."""
    training, found = plan.config.training, None
    for times in (n for n in range(2, plan.batch.rows + 1) if plan.batch.rows % n == 0):
        change: dict[str, Any] = {"training.accumulation_steps": training.accumulation_steps * times}
        windows, parts = _windows(plan), _parts(plan) * times
        if windows % parts:
            change["training.in_window_batch_size"] = math.ceil(windows / parts) * parts
        found = _changed(planner, plan, change)
        if found.plan.fits:
            break
    return found


def _more_gpus(planner: Planner, plan: Plan) -> Remedy | None:
    """The fewest doublings of the nodes that fit, each GPU reading as much as before; None if none does."""
    if plan.config.sharding.stage == 0:
        return None
    hardware, training, times = plan.hardware, plan.config.training, 2
    while times <= MOST_WORKERS_TIMES:
        wider = hardware._replace(nodes=hardware.nodes * times)
        change = {
            "training.batch_size": training.batch_size * times,
            "training.in_window_batch_size": training.in_window_batch_size * times,
        }
        found = planner.plan(_overridden(plan, change | {"cluster.num_workers": wider.workers}), wider)
        if found.fits:
            typed = " ".join([f"--nodes {wider.nodes} --gpus-per-node {wider.gpus_per_node}", *_typed(change)])
            return Remedy(typed, found)
        times *= 2
    return None


def _with_rows(planner: Planner, plan: Plan, rows: int) -> Plan:
    return planner.plan(_overridden(plan, {"training.batch_size": rows * _parts(plan)}), plan.hardware)


def _changed(planner: Planner, plan: Plan, change: Mapping[str, Any]) -> Remedy:
    change = {name: value for name, value in change.items() if _differs(plan, name, value)}
    return Remedy(" ".join(_typed(change)), planner.plan(_overridden(plan, change), plan.hardware))


def _overridden(plan: Plan, change: Mapping[str, Any]) -> RunConfig:
    """The run with some settings changed; not checked, as only valid ones are."""
    config = plan.config
    for name, value in change.items():
        section, key = name.split(".")
        inner = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: inner})
    return config


def _differs(plan: Plan, name: str, value: Any) -> bool:
    section, key = name.split(".")
    return getattr(getattr(plan.config, section), key) != value


def _typed(change: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_literal(value)}" for name, value in change.items()]


def _literal(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _offloaded(plan: Plan) -> bool:
    return offload_of(plan.config.sharding) != "none"


def _parts(plan: Plan) -> int:
    """Micro-batches of one step, over all workers."""
    return plan.hardware.workers * plan.config.training.accumulation_steps


def _windows(plan: Plan) -> int:
    return plan.config.training.in_window_batch_size
