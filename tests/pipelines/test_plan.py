"""`cortex plan` as a user meets it, the search for a batch and for remedies, and the arithmetic of seconds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from cortex_core.backbone.shape import Unit, shard_numel
from cortex_core.training.rehearsal import Timeline
from pipelines import cli, plan_options
from pipelines.config import RunConfig, load_config
from pipelines.gpus import GPUS, Hardware
from pipelines.plan import Plan, Planner, batch_shape
from pipelines.plan_memory import Memory
from pipelines.plan_remedies import largest_batch, remedies
from pipelines.plan_table import WIDTH, show
from pipelines.plan_time import time_of

ROOT = Path(__file__).parents[2]
QUICK = (
    "demo", "backbone.segment_tokens=32", "fast_weights.rank=8", "training.max_segments=2", "training.batch_size=4",
    "training.filler_windows=0", "tasks.num_pairs=2", "tasks.num_queries=2",
)  # fmt: skip
NODE = Hardware(GPUS["h100"], 1, 2, 400.0, 0.4, 0.7, 1e9, 0.1)


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_run_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *QUICK]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 96
    for part in (" M parameters", "2 GPUs of 79.65 GiB", "shards of the backbone", "activations at the peak", "total",
                 "all-gathers", "step, none hidden", "It fits", "training.batch_size="):  # fmt: skip
        assert part in " ".join(text.split()), part


@pytest.mark.slow
def test_a_run_that_does_not_fit_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory-gib", "0.006", "--context-gib", "0", "--json")
    assert cli.main(["plan", *QUICK, *options]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "cortex-plan/1" and not found["fits"]
    memory = found["memory"]
    assert memory["total_bytes"] > found["hardware"]["gpu"]["memory_bytes"]
    assert memory["total_bytes"] == sum(list(memory.values())[:10])
    changes = {remedy["change"]: remedy for remedy in found["remedies"]}
    assert any("training.gradient_checkpointing=true" in change for change in changes)
    for change, remedy in list(changes.items())[:2]:  # planned as it is proposed
        typed = shlex.split(change)
        assert cli.main(["plan", *QUICK, *(typed if "--nodes" not in change else ()), *options]) == 1 - remedy["fits"]
        assert json.loads(capsys.readouterr().out)["memory"]["total_bytes"] == remedy["total_bytes"]


def test_a_model_that_cannot_be_planned_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for described, said in (
        ({"model_type": "nonsense"}, "nonsense"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(described))
        assert cli.main(["plan", "demo", f"backbone.name={tmp_path}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "backbone.name" in line and said in line


def test_a_file_for_deepspeed_says_where_weights_rest(capsys: pytest.CaptureFixture[str]) -> None:
    """On the node as with the setting; of a disk the speed has to be given."""
    planner, files = Planner(), ROOT / "cluster" / "deepspeed"
    name, *settings = QUICK

    def found(*overrides: str) -> Plan:
        return planner.plan(load_config(name, [*settings, *overrides]), NODE)

    by_setting, by_file = found("sharding.offload=cpu"), found(f"sharding.deepspeed={files}/zero3_cpu_offload.json")
    assert (by_file.memory, by_file.time) == (by_setting.memory, by_setting.time)
    assert by_file.memory.host_bytes > 0.0 < by_file.time.host_s
    assert found(f"sharding.deepspeed={files}/zero3.json").memory == found().memory
    on_disk = found(f"sharding.deepspeed={files}/zero3_nvme_offload.json")
    assert (on_disk.memory, on_disk.time) == (by_setting.memory, by_setting.time)
    show(Console(width=WIDTH), on_disk, 2, ())
    said = " ".join(capsys.readouterr().out.split())
    assert "offload nvme" in said and "on the disk of each node" in said and "copies from the node's disk" in said


def test_of_a_disk_the_speed_has_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = f"sharding.deepspeed={ROOT}/cluster/deepspeed/zero3_nvme_offload.json"
    for override, said in (
        (disk, "weights rest on a disk, whose speed is not known. Give --host-gb-s"),
        (f"sharding.deepspeed={tmp_path}/none.json", "cannot be read"),
    ):
        assert cli.main(["plan", *QUICK, override]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    plan_options.check_disk(load_config("demo", [disk]), 2.0)
    plan_options.check_disk(load_config("demo"), None)


def test_the_examples_of_the_help_are_valid() -> None:
    found = re.findall(r"^  cortex plan (.*)$", plan_options.EPILOG + cli.HELP, flags=re.MULTILINE)
    assert len(found) == 4
    for example in found:
        given = plan_options._parser().parse_intermixed_args(shlex.split(example))
        workers = plan_options.workers_of(given)
        config = load_config(given.recipe, [*given.overrides, f"cluster.num_workers={workers}"])
        assert plan_options.hardware_of(given, config.cluster.num_workers).workers == workers


def test_workers_are_the_shape_of_the_cluster_or_else_the_recipes() -> None:
    def hardware(*options: str) -> Hardware:
        given = plan_options._parser().parse_intermixed_args(["demo", *options])
        return plan_options.hardware_of(given, plan_options.workers_of(given) or 2)

    for options, shape in (
        ((), (1, 2)),
        (("--nodes", "2"), (2, 8)),
        (("--gpus-per-node", "4"), (1, 4)),
        (("--nodes", "3", "--gpus-per-node", "2"), (3, 2)),
    ):
        found = hardware(*options)
        assert (found.nodes, found.gpus_per_node) == shape, options
    own = hardware("--gpu", "l40s", "--memory-gib", "40", "--tflops", "100", "--link-gb-s", "20").gpu
    assert own == GPUS["l40s"]._replace(
        memory_bytes=40 * 2**30, bfloat16_tflops=100.0, float32_tflops=100.0, link_gb_s=20.0
    )


# --- the batch -------------------------------------------------------------------------------------------------------


def test_the_micro_batch_is_the_longest_of_a_run() -> None:
    config = load_config("demo", ["training.accumulation_steps=2", "tasks.num_queries=3"])
    assert batch_shape(config, 2)._asdict() == {
        "rows": 4, "segments": 6, "width": 256, "windows": 1, "fillers": 8, "answers": 3, "whole_text": False,
    }  # fmt: skip
    text = batch_shape(load_config("text"), 2)
    assert text.whole_text and text.fillers == 0
    made = text.batch()
    assert made.answer[:, 1:].sum() == made.answer[:, 1:].numel() - len(made.answer)


# --- what to change --------------------------------------------------------------------------------------------------


class Linear:
    """Plans whose bytes are a plain sum: `fixed` (halved by offloading) and `per_row` (a tenth with checkpointing)."""

    def __init__(self, fixed: float, per_row: float) -> None:
        self.fixed, self.per_row, self.asked = fixed, per_row, 0

    def plan(self, config: RunConfig, hardware: Hardware) -> Any:
        self.asked += 1
        batch = batch_shape(config, hardware.workers)
        row = self.per_row * (0.1 if config.training.gradient_checkpointing else 1.0)
        total = round(self.fixed * (0.5 if config.sharding.offload == "cpu" else 1.0) + row * batch.rows)
        memory = Memory(*([0] * 10), total, {}, 0, 0)  # type: ignore[arg-type]
        return SimpleNamespace(
            config=config, hardware=hardware, batch=batch, memory=memory, fits=memory.fits(hardware), dtype="bfloat16"
        )


def planned(fixed: float, per_row: float, *overrides: str) -> tuple[Any, Any]:
    planner: Any = Linear(fixed * 2**30, per_row * 2**30)
    return planner, planner.plan(load_config("demo", overrides), NODE)


@pytest.mark.parametrize(
    ("fixed", "per_row", "rows"), [(10, 1, 69), (10, 20, 3), (79, 0.1, 6), (70, 20, 0), (100, 0.1, 0)]
)
def test_the_largest_batch_is_found_in_a_few_plans(fixed: float, per_row: float, rows: int) -> None:
    planner, plan = planned(fixed, per_row)
    assert largest_batch(planner, plan) == 2 * rows
    assert planner.asked <= 5


def test_each_remedy_says_whether_it_is_enough() -> None:
    planner, plan = planned(60, 10)  # 8 rows: 140 of 79
    found = {remedy.change: remedy.plan.fits for remedy in remedies(planner, plan, largest_batch(planner, plan))}
    assert found.pop("training.batch_size=2") and found.pop("training.gradient_checkpointing=true")
    assert not found.pop("sharding.offload=cpu")
    assert found.pop("training.accumulation_steps=8 training.in_window_batch_size=16")
    assert not found


def test_a_file_without_offload_gives_way_to_the_setting(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"zero_optimization": {"stage": 3}}')
    planner, plan = planned(60, 10, f"sharding.deepspeed={tmp_path}/a.json")
    changes = [remedy.change for remedy in remedies(planner, plan, largest_batch(planner, plan))]
    assert "sharding.deepspeed=null sharding.offload=cpu" in changes


def test_together_where_nothing_alone_is_enough() -> None:
    planner, plan = planned(120, 12)
    *single, together = remedies(planner, plan, largest_batch(planner, plan))
    assert not any(remedy.plan.fits for remedy in single)
    assert together.plan.fits and together.change == "training.gradient_checkpointing=true sharding.offload=cpu"


# --- seconds ---------------------------------------------------------------------------------------------------------


def made_up(sharding: dict[str, Any], **training: Any) -> tuple[RunConfig, Any, Timeline]:
    """Two units of 1e9 and 2e9 elements in bfloat16, visited once and twice; 4e12 FLOPs; sidecars of 4e6 bytes."""
    config = load_config("demo", {f"sharding.{name}": value for name, value in sharding.items()} | training)
    units = (Unit("embedding", (10**9,), False), Unit("layer", (10**9, 10**9), True))
    shape = SimpleNamespace(
        units=units, dtype=torch.bfloat16, depth=1, model=SimpleNamespace(sidecars=nn.Linear(1000, 1000, bias=False))
    )
    flops = np.array([1e12, 1e12, 0.0, 2e12])
    timeline = Timeline(
        np.zeros((4, 3), np.int64), np.array([0, 1, 0, 1]), np.array([True, True, False, True]), flops,
        np.array([False, False, False, True]), np.zeros(2, np.int64),
    )  # fmt: skip
    return config, shape, timeline


def test_seconds_are_what_the_figures_give() -> None:
    gpu = GPUS["h100"]._replace(bfloat16_tflops=100.0, link_gb_s=100.0, host_gb_s=10.0)
    hardware = Hardware(gpu, 1, 4, 400.0, 0.5, 0.5, 0.0, 0.0)
    time = time_of(*made_up({}), hardware, tokens=1000)
    assert time.flops == 4e12 and time.compute_s == pytest.approx(4e12 / 50e12)
    assert (time.gathers, time.gathers_per_layer) == (3, 2.0)
    assert time.gathered_bytes == pytest.approx(10e9 * 3 / 4) and time.gather_s == pytest.approx(7.5 / 50)
    assert time.all_reduce_s == pytest.approx(2 * 4e6 * 3 / 4 / 50e9) and time.host_s == 0.0
    assert time.serial_s == pytest.approx(time.compute_s + time.gather_s + time.all_reduce_s)
    assert time.overlapped_s == pytest.approx(time.gather_s + time.all_reduce_s)
    assert time.tokens_per_s == pytest.approx(1000 / time.serial_s)
    far = time_of(*made_up({}), hardware._replace(nodes=2, gpus_per_node=2), tokens=1000)
    assert far.gather_s == pytest.approx(7.5 / 25), "the network of a node, 50 GB/s, is slower than its links"
    twice = time_of(*made_up({}, **{"training.accumulation_steps": 2}), hardware, tokens=1000)
    assert twice.gather_s == pytest.approx(2 * time.gather_s) and twice.all_reduce_s == time.all_reduce_s
    offloaded = time_of(*made_up({"offload": "cpu"}), hardware, tokens=1000)
    assert offloaded.host_s == pytest.approx(10e9 / 4 / 5e9)
    whole = time_of(*made_up({"stage": 0}), hardware, tokens=1000)
    assert (whole.gathers, whole.gather_s) == (0, 0.0) and whole.all_reduce_s == time.all_reduce_s


def test_reading_the_weights_takes_time_where_little_is_computed() -> None:
    gpu = GPUS["h100"]._replace(bfloat16_tflops=1e6, memory_gb_s=100.0)
    time = time_of(*made_up({}), Hardware(gpu, 1, 4, 400.0, 0.5, 0.5, 0.0, 0.0), tokens=1)
    assert time.compute_s == pytest.approx(10e9 / 50e9)


def test_each_tensor_is_cut_by_itself() -> None:
    units = [Unit("a", (5, 4), True, repeats=3), Unit("b", (1,), False)]
    assert shard_numel(units, 1) == 3 * 9 + 1
    assert shard_numel(units, 4) == 3 * (2 + 1) + 1
    assert Planner().on_gpu
