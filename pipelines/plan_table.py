"""A plan as a table for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.plan import Plan
from pipelines.plan_remedies import Remedy
from pipelines.zero3 import offload_of

WIDTH = 96
GIB = 2**30
KEPT = {"layers": "decoder layers", "memory": "sidecars", "rest": "embedding, head and losses"}


def show(console: Console, plan: Plan, largest: int, changes: Sequence[Remedy]) -> None:
    """Print all of it."""
    for line in _about(plan):
        console.print(line, highlight=False, markup=False)
    for title, rows in (("Memory of one GPU", _memory_rows(plan)), ("One step", _time_rows(plan))):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in _verdict(plan, largest):
        console.print(line, highlight=False, markup=False)
    for remedy in changes:
        state = "fits" if remedy.plan.fits else "not enough"
        console.print(
            f"  {state:<10} {_gib(remedy.plan.memory.total_bytes):>9}  {_seconds(remedy.plan.time.serial_s):>9}  "
            f"{remedy.change}", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _about(plan: Plan) -> Iterator[str]:
    hardware, batch, training = plan.hardware, plan.batch, plan.config.training
    nodes = "" if hardware.nodes == 1 else f"{hardware.nodes} nodes x "
    layers = ", ".join(map(str, plan.layers))
    yield (
        f"{Path(plan.config.backbone.name).name}: {_count(plan.total_numel)} parameters, {plan.depth} layers, "
        f"{plan.dtype}; memory in layer {layers}, rank {plan.config.fast_weights.rank}"
    )
    yield (
        f"{nodes}{hardware.gpus_per_node} GPUs of {_gib(hardware.gpu.memory_bytes)}; sharding stage "
        f"{plan.config.sharding.stage}, offload {offload_of(plan.config.sharding)}, gradient checkpointing "
        f"{'on' if training.gradient_checkpointing else 'off'}"
    )
    yield (
        f"Batch {training.batch_size} = {hardware.workers} workers x {training.accumulation_steps} micro-batches of "
        f"{batch.rows}"
    )
    yield (
        f"Longest micro-batch: {batch.rows} x {batch.segments} segments of {batch.width} tokens, {batch.windows} "
        f"windows, {batch.fillers} of filler"
    )


def _memory_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    memory, hardware = plan.memory, plan.hardware
    yield "shards of the backbone, buffers", _gib(memory.shards_bytes), ""
    yield "gathered at the peak", _gib(memory.gathered_bytes), "a unit and the buffer it comes in"
    if memory.held_bytes:
        yield (
            "gathered, kept for the backward pass",
            _gib(memory.held_bytes),
            "experts; not with gradient checkpointing",
        )
    yield "sidecars", _gib(memory.sidecars_bytes), ""
    yield "their gradients", _gib(memory.gradients_bytes), ""
    yield "optimizer, weight average", _gib(memory.optimizer_bytes), ""
    yield "DDP's buckets", _gib(memory.buckets_bytes), ""
    yield "activations at the peak", _gib(memory.activations_bytes), "of these kept for the backward pass:"
    for part, kept in memory.kept_bytes.items():
        yield "", "", f"{_gib(kept)} {KEPT[part]}"
    yield "allocator", _gib(memory.margin_bytes), f"{hardware.margin_frac:.0%} of the above"
    yield "CUDA context, communication", _gib(memory.context_bytes), ""
    yield "total", _gib(memory.total_bytes), f"of {_gib(hardware.gpu.memory_bytes)}"
    if memory.host_bytes:
        place = "on the disk" if offload_of(plan.config.sharding) == "nvme" else "in the memory"
        yield f"{place} of each node", _gib(memory.host_bytes), "offloaded shards"
    yield "session, per sequence", f"{memory.session_bytes / 1024:.4g} KiB", "not in the total"


def _time_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    time, hardware = plan.time, plan.hardware
    yield (
        "compute",
        _seconds(time.compute_s),
        f"{time.flops / 1e12:.4g} TFLOP at {hardware.flops_share:.0%} of the peak",
    )
    if time.gathers:
        yield (
            "all-gathers",
            _seconds(time.gather_s),
            f"{time.gathers}, a layer {time.gathers_per_layer:.3g} times; {_gib(time.gathered_bytes)}",
        )
    if time.host_s:
        place = "disk" if offload_of(plan.config.sharding) == "nvme" else "memory"
        yield f"copies from the node's {place}", _seconds(time.host_s), ""
    yield "all-reduce of gradients", _seconds(time.all_reduce_s), ""
    yield "step, all transfers hidden", _seconds(time.overlapped_s), ""
    yield "step, none hidden", _seconds(time.serial_s), f"nearer to the truth; {time.tokens_per_s:,.0f} tokens/s"


def _verdict(plan: Plan, largest: int) -> Iterator[str]:
    room, total = plan.hardware.gpu.memory_bytes, plan.memory.total_bytes
    if plan.fits:
        yield f"It fits: {_gib(room - total)} of each GPU stay free."
    else:
        yield f"It does not fit: {_gib(total - room)} too much."
    if largest:
        yield f"Largest batch that fits, all else equal: training.batch_size={largest}"
    else:
        yield "No batch fits, all else equal."
    if not plan.fits:
        yield "What to change (total, step without overlap):"


def document(plan: Plan, largest: int, changes: Sequence[Remedy]) -> dict[str, Any]:
    """What `--json` prints. Names say the units."""
    return {
        "schema": "cortex-plan/1",
        "fits": plan.fits,
        "largest_batch_size": largest,
        "backbone": plan.config.backbone.name,
        "parameters": plan.total_numel,
        "dtype": plan.dtype,
        "layers": plan.depth,
        "memory_layers": list(plan.layers),
        "largest_unit_bytes": plan.largest_unit_bytes,
        "micro_batch": plan.batch._asdict(),
        "workers": plan.hardware.workers,
        "hardware": plan.hardware._asdict() | {"gpu": plan.hardware.gpu._asdict()},
        "memory": plan.memory._asdict(),
        "time": plan.time._asdict(),
        "remedies": [
            {
                "change": remedy.change,
                "fits": remedy.plan.fits,
                "total_bytes": remedy.plan.memory.total_bytes,
                "serial_s": remedy.plan.time.serial_s,
            }
            for remedy in changes
        ],
    }


def _count(number: int) -> str:
    return f"{number / 1e9:.4g} B" if number >= 1e9 else f"{number / 1e6:.4g} M"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _seconds(time: float) -> str:
    return f"{time:.3f} s" if time < 100 else f"{time:.0f} s"
