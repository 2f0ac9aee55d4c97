"""What each of two ranks runs in a process of its own; `sharding.py` starts them and makes rows of it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import read, restore
from cortex_core.config import BackboneConfig
from cortex_core.tasks.mixture import Mixture
from cortex_core.training.loop import Learner
from cortex_core.training.objectives import Batch, ReadingLoss
from pipelines import worker
from pipelines.config import RunConfig
from pipelines.sharding import Shards, decoder_layers, replicate
from tests.benchmarks.rows.demo import SEED, Demo
from tests.benchmarks.rows.sharding import DEEP_VOCABULARY, DEEP_WINDOW, RANKS, STEPS

SEGMENTS, DEEP_BATCH = 4, 4


def demo_scene(run: str) -> dict[str, float]:
    """One rank of two, in a process of its own: the demo backbone with its trained memory."""
    _join()
    demo = Demo(Path(run))
    config = _with_stage(demo.config, 3)
    model, shards = worker.build(config)
    whole, unsharded = worker.build(_with_stage(demo.config, 0))
    for each, its in ((model, shards), (whole, unsharded)):
        restore(each.sidecars, read(demo.sidecars), fingerprint(each.backbone, its.gathered))
    halves = [_demo_batch(demo, rank) for rank in range(RANKS)]
    at_rest = shards.resident_numel() / shards.total_numel
    errors = _errors(config, model, shards, whole, halves)
    shares = _train(config, model, shards, halves[dist.get_rank()])
    return errors | shares | {"at_rest": at_rest}


def deep_scene(folder: str) -> dict[str, float]:
    """One rank of two, in a process of its own: a random backbone, random tokens."""
    _join()
    config = _with_stage(RunConfig(backbone=BackboneConfig(name=folder, segment_tokens=DEEP_WINDOW)), 3)
    model, shards = worker.build(config)
    generator = torch.Generator().manual_seed(SEED + dist.get_rank())
    ids = torch.randint(3, DEEP_VOCABULARY, (DEEP_BATCH, SEGMENTS, DEEP_WINDOW), generator=generator)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -1, DEEP_WINDOW // 2] = True
    return _train(config, model, shards, Batch(ids, answer, torch.zeros_like(answer), ids[:, 0], answer[:, -1]))


def _join() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def _with_stage(config: RunConfig, stage: int) -> RunConfig:
    sharding = config.sharding.model_copy(update={"stage": stage, "offload": "none"})
    training = config.training.model_copy(update={"accumulation_steps": 1})
    return config.model_copy(update={"sharding": sharding, "training": training})


def _demo_batch(demo: Demo, rank: int) -> Batch:
    """One rank's half of a training batch of the run's size, in sequences of four segments."""
    tasks, training, width = demo.config.tasks, demo.config.training, demo.config.backbone.segment_tokens
    mixture = Mixture.from_config(tasks, demo.vocabulary, demo.corpus, seed=SEED)
    sizes = (
        training.batch_size,
        max(training.in_window_batch_size, RANKS),
        training.filler_windows * training.batch_size,
    )
    rows, windows, fillers = (range(rank * size // RANKS, (rank + 1) * size // RANKS) for size in sizes)
    long = mixture.spanning_batch(rows, SEGMENTS * width, num_queries=tasks.num_queries, segment_tokens=width)
    near = mixture.in_window_batch(windows, width, num_queries=tasks.num_queries)
    tokens, answer = (torch.from_numpy(part).view(len(rows), SEGMENTS, width) for part in long)
    filler = mixture.filler_batch(fillers, width)
    return Batch(tokens, answer, torch.zeros_like(answer), *(torch.from_numpy(part) for part in (*near, filler)))


def _errors(config: RunConfig, model: Cortex, shards: Shards, whole: Cortex, halves: list[Batch]) -> dict[str, float]:
    """Largest relative differences between this rank's loss and gradients and those of the unsharded model."""
    losses = torch.tensor([_backward(ReadingLoss(whole, config.training), half) / RANKS for half in halves])
    expected = {name: p.grad / RANKS for name, p in whole.sidecars.named_parameters() if p.grad is not None}
    mine = torch.tensor(_backward(replicate(ReadingLoss(model, config.training)), halves[dist.get_rank()]) / RANKS)
    shards.release()
    dist.all_reduce(mine)
    got = {name: p.grad for name, p in model.sidecars.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    return {
        "loss_error": float((mine - losses.sum()).abs() / losses.sum().abs()),
        "gradient_error": max(_relative(got[name], expected[name]) for name in got),
    }


def _backward(objective: torch.nn.Module, batch: Batch) -> float:
    loss, _ = objective(batch)
    loss.backward()
    return float(loss.detach())


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm()) if b.any() else float(a.norm())


def _train(config: RunConfig, model: Cortex, shards: Shards, batch: Batch) -> dict[str, float]:
    """Largest shares of the frozen weights on this rank after and during a few steps, and units gathered at the peak."""
    objective = replicate(ReadingLoss(model, config.training))
    learner = Learner(model, objective, config.training, config.optimizer, after_backward=shards.release)
    peak = after = 0
    for _ in range(STEPS):
        with shards.watch() as seen:
            learner.step([batch])
        peak, after = max(peak, seen.backward_numel), max(after, shards.resident_numel())
    return {
        "peak_backward": peak / shards.total_numel,
        "after_step": after / shards.total_numel,
        "units_at_peak": (peak - shards.owned_numel) / _largest_unit(model),
    }


def _largest_unit(model: Cortex) -> int:
    """Elements of the largest decoder layer, or module outside the layers, of a sharded backbone."""
    layers = decoder_layers(model.backbone)
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in model.backbone.modules() if module not in inside]
    parts = [layer.parameters() for layer in layers] + [m.parameters(recurse=False) for m in outside]
    return max(sum(p.ds_numel for p in part) for part in parts)  # type: ignore[attr-defined]
