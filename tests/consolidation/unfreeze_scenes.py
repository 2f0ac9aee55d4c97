"""Eight questions whose answers a model is to learn, and text on which it is to stay as it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.low_rank import LowRankDeltas, linear_modules
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.config import UnfreezeConfig
from cortex_core.consolidation.lessons import Lessons, Taught
from cortex_core.consolidation.sleep import Evening, slow_values
from tests.backbone.families import VOCAB, random_ids, with_memory

QUICK = UnfreezeConfig(
    modules=("*mlp*",), steps=8, learning_rate=0.01, rank=4, replayed=0, max_text_nats=0.004, max_probe_nats=0.004
)
"""Few steps; a bound that some of them hit."""


def facts(count: int = 8, seed: int = 0, *, sure: float = 12.0) -> tuple[Lessons, Tensor]:
    """Lessons of `count` prompts of three tokens, and their answers. The teacher is sure of them."""
    ids = random_ids(count, 3, seed=100 + seed)
    right = torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(seed))[:count] + 3
    taught = Taught.from_logits(sure * functional.one_hot(right, VOCAB).float(), top=8)
    prompts = Prompts(ids, torch.full((count,), 3))
    return Lessons(prompts, taught, torch.ones(count)), right


def text(windows: int = 4, seed: int = 7) -> Tensor:
    return random_ids(windows, 24, seed=seed)


def probes() -> Prompts:
    """Ragged, and no lesson among them."""
    return Prompts.of(
        [row[:length].tolist() for row, length in zip(random_ids(5, 9, seed=55), range(4, 9), strict=True)]
    )


def scene(family: str = "qwen2", config: UnfreezeConfig = QUICK, **memory: object) -> tuple[Cortex, LowRankDeltas]:
    """A random model with a memory that matters, and deltas on it that do not yet."""
    model = with_memory(family, **memory)
    names = linear_modules(model.backbone, config.modules)
    deltas = LowRankDeltas(model.backbone, names, config.rank, config.scale, config.seed)
    return model, deltas.attach(model)


def with_slow() -> Cortex:
    """A model with slow weights that add something."""
    model, deltas = scene()
    deltas.remove()
    model.grow_slow_weights(64, 4)
    with torch.no_grad():
        for number, values in enumerate(slow_values(model).values()):
            values += torch.randn(values.shape, generator=torch.Generator().manual_seed(number))
    return model


@torch.no_grad()
def share_right(model: Cortex, lessons: Lessons, right: Tensor) -> float:
    """How many questions are answered, with fast weights that hold nothing."""
    return float((answers(model, lessons.prompts).argmax(-1) == right).float().mean())


def evening(
    tonight: Lessons, config: UnfreezeConfig, old: Lessons | None = None, text: Tensor | None = None
) -> Evening:
    """Of as many steps as `config` says, each with the same old lessons, or none."""
    return Evening(tonight, [Lessons.none(8) if old is None else old] * config.steps, text)
