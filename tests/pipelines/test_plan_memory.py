"""What is planned is what is measured: bytes, gathers and shards of real steps of small models, within 10 %."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cortex_core.config import BackboneConfig
from cortex_core.training.objectives import ReadingLoss
from pipelines import worker
from pipelines.config import RunConfig, ShardingConfig
from pipelines.gpus import GPUS, Hardware
from pipelines.plan import Plan, Planner
from tests import tiny
from tests.benchmarks.rows import plan as rows
from tests.benchmarks.step_memory import kept_bytes, measure, random_batch
from tests.pipelines import plan_scenes

BOUND = 0.1
SCENES, ROOT = Path(__file__).with_name("plan_scenes.py"), Path(__file__).parents[2]


def alone(workers: int = 1) -> Hardware:
    """Nothing but the step itself."""
    return Hardware(GPUS["h100"], 1, workers, 400.0, 0.4, 0.7, context_bytes=0.0, margin_frac=0.0)


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all kept", "checkpointing"]
)
@pytest.mark.parametrize("shape", rows.SHAPES)
def test_every_part_is_what_a_step_takes(tmp_path: Path, shape: str, checkpointing: bool) -> None:
    compared = rows.compare(tmp_path, shape, checkpointing)
    assert set(compared) == {"shards", "sidecars", "gradients", "optimizer", "kept", "activations", "session", "total"}
    for part, (planned, measured) in compared.items():
        assert planned == pytest.approx(measured, rel=BOUND), part


def test_it_holds_for_the_batches_of_a_run(tmp_path: Path) -> None:
    """The longest batch that the tiny run's own source makes, instead of one made for the purpose."""
    config = tiny.run_config(
        tmp_path, training__filler_windows=2, training__sparsity_weight=10.0, training__short_frac=0
    )
    model, _ = worker.build(config)
    source = replace(tiny.batches(config.training), segment_tokens=tiny.SEGMENT)
    longest = max(range(config.training.steps), key=source.tokens)
    (batch,) = source.micro_batches(longest, 0, 1)
    assert batch.input_ids.shape[1] == config.training.max_segments
    planned = Planner(on_gpu=False).plan(config, alone())
    measured = measure(model, batch, config.training)
    assert [len(batch.input_ids), len(batch.in_window_ids), len(batch.filler_ids)] == [
        planned.batch.rows, planned.batch.windows, planned.batch.fillers,
    ]  # fmt: skip
    assert planned.memory.activations_bytes == pytest.approx(measured.activations, rel=BOUND)
    assert sum(planned.memory.kept_bytes.values()) == pytest.approx(measured.kept, rel=BOUND)


def _random(folder: Path, family: str) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": plan_scenes.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    if family == "llama":
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    else:
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).save_pretrained(folder)
    return str(folder)


def _two_ranks(folder: str, checkpointing: bool, out: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(plan_scenes.RANKS):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(plan_scenes.RANKS),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, str(SCENES), folder, str(checkpointing), str(out / f"{rank}.json")]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * plan_scenes.RANKS, "\n".join(said)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(plan_scenes.RANKS)]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_ranks_gather_and_keep_what_is_planned(tmp_path: Path, family: str, checkpointing: bool) -> None:
    """Experts too: without checkpointing the graph keeps what was gathered of them."""
    folder = _random(tmp_path / family, family)
    planned = Planner(on_gpu=False).plan(plan_scenes.run_config(folder, checkpointing), alone(plan_scenes.RANKS))
    assert planned.batch == plan_scenes.BATCH
    assert (planned.memory.held_bytes > 0) is (family == "mixtral" and not checkpointing)
    for rank in _two_ranks(folder, checkpointing, tmp_path):
        assert planned.total_numel == rank["total"]
        assert rank["owned"] == rank["at_rest"]
        assert planned.memory.shards_bytes == pytest.approx(4 * rank["owned"], rel=0.01)
        assert planned.largest_unit_bytes == 4 * rank["gathered_numel"]
        assert planned.time.gathers == pytest.approx(rank["gathers"], rel=BOUND)
        if not checkpointing:  # what little is kept then, `test_checkpointing_keeps_what_is_planned` measures
            kept = sum(planned.memory.kept_bytes.values()) + planned.memory.held_bytes
            assert kept == pytest.approx(rank["kept"], rel=BOUND), rank


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_checkpointing_keeps_what_is_planned(tmp_path: Path, family: str) -> None:
    """In one process: of what a collective's threads let go, torch's profiler does not hear."""
    folder = _random(tmp_path / family, family)
    config = plan_scenes.run_config(folder, checkpointing=True)
    planned = Planner(on_gpu=False).plan(config, alone(plan_scenes.RANKS))
    model, _ = worker.build(config.model_copy(update={"sharding": ShardingConfig(stage=0)}))
    kept = kept_bytes(
        ReadingLoss(model, config.training), random_batch(plan_scenes.BATCH.batch(), plan_scenes.VOCABULARY)
    )
    assert sum(planned.memory.kept_bytes.values()) == pytest.approx(kept, rel=BOUND)
    assert planned.memory.held_bytes == 0


def test_a_run_of_equal_layers_is_as_if_all_were_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _random(tmp_path, "llama")
    config = plan_scenes.run_config(folder, checkpointing=False)
    short = Planner().plan(config, alone(2))
    monkeypatch.setattr("cortex_core.backbone.shape.KEPT_OF_A_RUN", 100)
    whole = Planner().plan(config, alone(2))
    assert short.time == whole.time
    assert short.memory.total_bytes == pytest.approx(whole.memory.total_bytes, rel=0.001)


def _memory(config: RunConfig, hardware: Hardware) -> Plan:
    return Planner().plan(config, hardware)


def test_the_kernel_keeps_less_than_the_plain_form(tmp_path: Path) -> None:
    config = plan_scenes.run_config(_random(tmp_path, "llama"), checkpointing=False)
    on_gpu, plain = (Planner(on_gpu=on).plan(config, alone()).memory.kept_bytes for on in (True, False))
    assert on_gpu["memory"] < 0.8 * plain["memory"]
    assert on_gpu["layers"] == plain["layers"]


def test_what_is_sharded_offloaded_and_replicated(tmp_path: Path) -> None:
    """Shards go down with the number of workers, everything of the sidecars stays, DDP adds its buckets."""
    config = plan_scenes.run_config(_random(tmp_path, "llama"), checkpointing=False)
    planner = Planner()
    one, four = planner.plan(config, alone()).memory, planner.plan(config, alone(2)).memory
    buffers = planner.plan(_with(config, stage=3, offload="cpu"), alone()).memory.shards_bytes
    assert (one.shards_bytes - buffers) / (four.shards_bytes - buffers) == pytest.approx(2.0, rel=0.01)
    assert (one.gathered_bytes, one.buckets_bytes) == (0, 0)
    assert four.buckets_bytes == four.sidecars_bytes == four.gradients_bytes == one.sidecars_bytes
    assert four.optimizer_bytes == 3 * four.sidecars_bytes
    offloaded = planner.plan(_with(config, stage=3, offload="cpu"), alone(2)).memory
    assert offloaded.host_bytes == 2 * (four.shards_bytes - buffers) and offloaded.gathered_bytes == four.gathered_bytes
    copied = planner.plan(_with(config, stage=0, offload="none"), alone(2)).memory
    assert copied.shards_bytes == one.shards_bytes and copied.gathered_bytes == 0
    assert four.total_bytes == sum(four[:10])


def _with(config: RunConfig, **sharding: Any) -> RunConfig:
    return config.model_copy(update={"sharding": config.sharding.model_copy(update=sharding)})


def test_a_folder_needs_a_description_alone(tmp_path: Path) -> None:
    folder = Path(_random(tmp_path / "whole", "llama"))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    config = plan_scenes.run_config(str(folder), checkpointing=False)
    config = config.model_copy(update={"backbone": BackboneConfig(name=str(folder), segment_tokens=32, dtype="fast")})
    assert _memory(config, alone()).dtype == "bfloat16"
