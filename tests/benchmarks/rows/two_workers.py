"""What the workers of `machinery.py` run, in processes of their own."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, LoggingConfig
from ray.train.torch import TorchTrainer
from torch.nn import functional

from cortex_core.config import BackboneConfig
from cortex_core.training.batches import BatchSource
from cortex_core.training.calibrate import calibrate
from cortex_core.training.loop import Learner, parameter_groups
from cortex_core.training.objectives import ReadingLoss
from cortex_core.training.schedules import sparsity_factor
from pipelines import cluster, sharding, worker
from pipelines.config import RunConfig, load_config
from pipelines.sharding import frozen_linear, replicate
from tests.benchmarks import child, pairs
from tests.benchmarks.rows.demo import Demo
from tests.benchmarks.rows.two_ways import _flat

PAIRS, WARM_UP = 9, 1
BLOCK_STEPS, REPORT_STEPS, SHARDED_STEPS = 20, 10, 5


def pipeline_and_ddp(run: str) -> list[float]:
    """In a process of its own: starts Ray, and two workers that time both ways. Returns the ratios of rank 0."""
    config = _settings(run, stage=0, steps=BLOCK_STEPS * (PAIRS + WARM_UP))
    with tempfile.TemporaryDirectory() as scratch, cluster.connect(config.cluster):
        out = Path(scratch) / "ratios.json"
        TorchTrainer(
            _time_both,
            train_loop_config={"config": config.model_dump_json(), "out": str(out)},
            scaling_config=cluster.scaling(config.cluster),
            run_config=ray.train.RunConfig(
                storage_path=scratch, logging_config=LoggingConfig(log_level="ERROR"),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        ).fit()  # fmt: skip
        return json.loads(out.read_text())


def _time_both(given: dict[str, str]) -> None:
    """On each worker of Ray Train."""
    cluster.quiet_worker()
    config = RunConfig.model_validate_json(given["config"])
    torch.set_num_threads(1)
    context = ray.train.get_context()

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if folder else None)

    edge = worker.Edge(context.get_world_rank(), context.get_world_size(), report, nullcontext)
    learner, batches = _learner(config), _batches(config)

    def pipeline() -> None:
        until = learner.step_number + BLOCK_STEPS
        worker._train_steps(edge, worker.Trained(config, learner, ""), batches, None, until)

    ratios = pairs.ratios(pipeline, _plain_loop(config, batches), pairs=PAIRS, warm_up=WARM_UP)
    if edge.rank == 0:
        Path(given["out"]).write_text(json.dumps(ratios))


def _plain_loop(config: RunConfig, batches: BatchSource) -> Callable[[], None]:
    """What one would write without this project: DDP, AdamW, and the next `BLOCK_STEPS` steps at each call."""
    model, _ = worker.build(config)
    calibrate(model, batches.calibration_ids())
    parameters = dict(model.sidecars.named_parameters())
    objective = replicate(ReadingLoss(model, config.training))
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(parameters, settings), betas=settings.betas, weight_decay=settings.weight_decay
    )
    done = 0

    def block() -> None:
        nonlocal done
        for step in range(done, done + BLOCK_STEPS):
            for batch in batches.micro_batches(step, dist.get_rank(), dist.get_world_size()):
                optimizer.zero_grad(set_to_none=True)
                loss, _ = objective(batch, sparsity_factor(step, config.training))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm)
                optimizer.step()
        done += BLOCK_STEPS

    return block


def sharded_and_replicated(run: str) -> list[float]:
    """One rank of two: seconds of a block of steps with shards, over those with the backbone whole."""
    _join()
    ways = []
    for stage, linear in ((3, frozen_linear), (0, sharding._linear)):
        config = _settings(run, stage=stage, steps=SHARDED_STEPS * (PAIRS + WARM_UP))
        ways.append(_block(_learner(config), _batches(config), linear))
    return pairs.ratios(*ways, pairs=PAIRS, warm_up=WARM_UP)


def _block(learner: Learner, batches: BatchSource, linear: Callable[..., Any]) -> Callable[[], None]:
    def block() -> None:
        functional.linear = linear  # each way has the process's to itself
        for _ in range(SHARDED_STEPS):
            learner.step(batches.micro_batches(learner.step_number, dist.get_rank(), dist.get_world_size()))

    return block


def checkpoint(run: str) -> dict[str, Any]:
    """Bytes of a checkpoint and of what is in it, and seconds of writing one over those of a step."""
    torch.set_num_threads(1)
    config = _settings(run, stage=0, steps=2 * (PAIRS + WARM_UP))
    learner, batches = _learner(config), _batches(config)

    def step() -> None:
        learner.step(batches.micro_batches(learner.step_number, 0, 1))

    step()
    with tempfile.TemporaryDirectory() as scratch:
        state = worker.Trained(config, learner, "")
        folder = state.save(Path(scratch))
        ratios = pairs.ratios(lambda: state.save(folder), step, pairs=PAIRS, warm_up=WARM_UP)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    sidecars = sum(value.numel() * value.element_size() for value in learner.average.values())
    return {"bytes": size, "sidecar_bytes": sidecars, "state_bytes": 4 * sidecars, "ratios": ratios}


def loading(folder: str) -> dict[str, float]:
    """One rank of two: what loading adds to its memory at the peak, as a share of the whole backbone's bytes."""
    _join()
    sharding._quiet_deepspeed()
    import transformers.models.llama.modeling_llama  # noqa: F401

    backbone = BackboneConfig(name=folder, dtype="float32")
    child.reset_peak()
    before, private = child.peak_bytes(), _private_bytes()
    with _watched() as seen:
        model, shards = sharding.load_backbone(backbone, stage=3)
    whole = 4 * shards.total_numel
    assert model is not None and shards.owned_numel < 0.6 * shards.total_numel
    return {"resident": (child.peak_bytes() - before) / whole, "private": (max(seen) - private) / whole}


@contextmanager
def _watched() -> Iterator[list[int]]:
    seen, done = [_private_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            seen.append(_private_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def _join() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def _settings(run: str, *, stage: int, steps: int) -> RunConfig:
    """The demo's, over whole segments from the first step on."""
    demo = Demo(Path(run))
    return load_config(
        None,
        _flat(demo.config.model_dump())
        | {
            "training.steps": steps, "training.short_frac": 0.0, "training.accumulation_steps": 1,
            "training.autocast": "none", "training.report_every_steps": REPORT_STEPS,
            "training.checkpoint_every_steps": BLOCK_STEPS, "validation.every_steps": 0,
            "data.max_bytes": 4_000_000, "cluster.num_workers": 2, "cluster.cpus_per_worker": 1.0,
            "cluster.use_gpu": False, "sharding.stage": stage, "sharding.offload": "none",
        },
    )  # fmt: skip


def _until(config: RunConfig, steps: int) -> RunConfig:
    """For the loop alone: data, schedule and penalty know of all steps."""
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def _batches(config: RunConfig) -> BatchSource:
    return worker._batches(config, *worker._words(config))


def _learner(config: RunConfig) -> Learner:
    model, shards = worker.build(config)
    calibrate(model, _batches(config).calibration_ids())
    shards.release()
    objective = replicate(ReadingLoss(model, config.training))
    return Learner(model, objective, config.training, config.optimizer, after_backward=shards.release)
