"""Rows about the frozen backbone on two ranks: how much of it each holds, and that nothing comes out differently.

Two real processes that talk over gloo, each with one thread, run the product's own `worker.build`, `replicate`,
`ReadingLoss` and `Learner`. The largest value of both ranks counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cortex_core.backbone.create import create_model
from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import read, restore
from cortex_core.config import BackboneConfig
from cortex_core.tasks.mixture import Mixture
from cortex_core.training.loop import Learner
from cortex_core.training.objectives import Batch, ReadingLoss
from pipelines import worker
from pipelines.config import RunConfig
from pipelines.sharding import Shards, replicate
from tests.benchmarks import child
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import SEED, Demo

RANKS, SEGMENTS, STEPS = 2, 4, 3
SHARE_GOAL, ERROR_GOAL, UNITS_GOAL = 0.51, 1e-5, 1.0
DEEP_LAYERS, DEEP_VOCABULARY, DEEP_WINDOW, DEEP_BATCH = 24, 128, 64, 4
WHEN = ("at_rest", "after_step", "peak_backward")

DEMO_ROWS = (
    *(f"frozen_parameters_per_rank_{when}" for when in WHEN), "gathered_modules_at_peak",
    "sharded_vs_unsharded_loss_error", "sharded_vs_unsharded_gradient_error",
)  # fmt: skip
DEEP_ROW = f"frozen_parameters_per_rank_peak_backward_{DEEP_LAYERS}_layers"


def sharding_of_the_demo(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Share of the demo backbone's weights that a rank of two holds, as DeepSpeed's tensors tell, and errors against an unsharded process.

    Three training steps over sequences of four segments; at the peak, what `Shards.watch` sees after every gather.
    Physics: a rank holds its half, and while a module computes, that module's weights whole. So a peak cannot be lower than
    0.5 plus the largest module's share, 0.3 for the embedding of the demo backbone; gathered_modules_at_peak is the peak
    minus the half, in largest modules: 1 is the least there can be. Errors: loss and gradients of one batch, split over two
    ranks under ZeRO-3 and DDP, against the mean over both halves in a single unsharded process; relative, and for gradients
    the worst of all sidecar tensors.
    """
    ranks = child.run(demo_scene, ranks=RANKS, run=str(demo.folder))
    for when in WHEN:
        name = f"frozen_parameters_per_rank_{when}"
        yield Row(name, _worst(ranks, when), SHARE_GOAL, "lower", "", 1 if when == "at_rest" else STEPS)
    units = max((rank["peak_backward"] - rank["at_rest"]) / rank["largest_module"] for rank in ranks)
    yield Row("gathered_modules_at_peak", units, UNITS_GOAL, "lower", "", STEPS)
    for what in ("loss", "gradient"):
        yield Row(
            f"sharded_vs_unsharded_{what}_error", _worst(ranks, f"{what}_error"), ERROR_GOAL, "lower", "", RANKS
        )


def sharding_of_a_deep_model(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """The same peak on a random decoder of 24 layers with 128 tokens of vocabulary, where no module is a large part of the whole."""
    with tempfile.TemporaryDirectory() as scratch:
        create_model(
            vocab_size=DEEP_VOCABULARY, hidden_size=64, num_layers=DEEP_LAYERS, num_heads=4, mlp_size=160,
            window_tokens=DEEP_WINDOW, rope_theta=1e4, tied_embeddings=True, seed=SEED,
        ).save_pretrained(scratch)  # fmt: skip
        ranks = child.run(deep_scene, ranks=RANKS, folder=scratch)
    yield Row(DEEP_ROW, _worst(ranks, "peak_backward"), SHARE_GOAL, "lower", "", STEPS)


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
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in whole.backbone.modules())
    return errors | shares | {"at_rest": at_rest, "largest_module": largest / shards.total_numel}


def deep_scene(folder: str) -> dict[str, float]:
    """One rank of two, in a process of its own: a random backbone, random tokens."""
    _join()
    config = _with_stage(RunConfig(backbone=BackboneConfig(name=folder, segment_tokens=DEEP_WINDOW)), 3)
    model, shards = worker.build(config)
    generator = torch.Generator().manual_seed(SEED + dist.get_rank())
    ids = torch.randint(3, DEEP_VOCABULARY, (DEEP_BATCH, SEGMENTS, DEEP_WINDOW), generator=generator)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -1, DEEP_WINDOW // 2] = True
    return _train(config, model, shards, Batch(ids, answer, ids[:, 0], answer[:, -1]))


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
    rows, windows = (
        range(rank * size // RANKS, (rank + 1) * size // RANKS)
        for size in (training.batch_size, max(training.in_window_batch_size, RANKS))
    )
    long = mixture.spanning_batch(rows, SEGMENTS * width, num_queries=tasks.num_queries, segment_tokens=width)
    near = mixture.in_window_batch(windows, width, num_queries=tasks.num_queries)
    tokens, answer = (torch.from_numpy(part).view(len(rows), SEGMENTS, width) for part in long)
    return Batch(tokens, answer, *(torch.from_numpy(part) for part in near))


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
    """Largest shares of the frozen weights on this rank, after and during a few optimizer steps."""
    objective = replicate(ReadingLoss(model, config.training))
    learner = Learner(model, objective, config.training, config.optimizer, after_backward=shards.release)
    peak = after = 0
    for _ in range(STEPS):
        with shards.watch() as seen:
            learner.step([batch])
        peak, after = max(peak, seen.backward_numel), max(after, shards.resident_numel())
    return {"peak_backward": peak / shards.total_numel, "after_step": after / shards.total_numel}


def _worst(ranks: list[dict[str, Any]], what: str) -> float:
    return max(rank[what] for rank in ranks)
