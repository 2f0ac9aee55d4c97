"""Trains a small language model from scratch with one optimizer or another: what the rows about optimizers compare."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cortex_core.backbone.create import create_model
from cortex_core.backbone.load import load_tokenizer
from cortex_core.config import BackboneConfig, DataConfig, UpdateConfig
from cortex_core.optim.groups import build_optimizer
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.training.pretrain import rate_at
from cortex_core.training.pretrain_config import PretrainConfig

CONFIG = PretrainConfig(steps=300, batch_size=8, warmup_steps=30, decay_frac=0.5)
WINDOW = 128
EVALUATED = 320
"""Windows of each of the two texts that a trained model reads."""
BACKBONE = "builtin:stdlib-1m"


class Losses(NamedTuple):
    """Nats per token of a trained model, on files that neither training nor the tokenizer has seen."""

    validation: float
    held_out: float


@cache
def corpus() -> Corpus:
    return load_corpus(DataConfig(), load_tokenizer(BackboneConfig(name=BACKBONE)))


@cache
def texts() -> tuple[Tensor, Tensor]:
    """A validation and a held-out text: every other of the held-out files each, int64 [EVALUATED, WINDOW] twice."""
    found = corpus()
    bounds = [*found.held_out_starts.tolist(), len(found.held_out)]
    files = [found.held_out[start:end] for start, end in itertools.pairwise(bounds)]
    windows = []
    for half in (np.concatenate(files[::2]), np.concatenate(files[1::2])):
        starts = np.linspace(0, len(half) - WINDOW, EVALUATED).astype(int)
        windows.append(torch.from_numpy(np.stack([half[s : s + WINDOW] for s in starts]).astype(np.int64)))
    return windows[0], windows[1]


class Trained:
    """A model with the shipped one's shape and fresh weights, its optimizer, and how many steps it has done."""

    def __init__(self, update: UpdateConfig, seed: int) -> None:
        shape = CONFIG.decoder.model_dump()
        self.model, self.seed, self.steps = create_model(**shape, seed=seed), seed, 0
        parameters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(
            parameters, [{"params": list(parameters.values()), "lr": 0.0}], update, betas=CONFIG.betas,
            weight_decay=CONFIG.weight_decay, seed=seed, foreach=True,
        )  # fmt: skip

    def step(self, rate: float) -> float:
        """One step on the next windows of training text; their loss before it."""
        rows = [corpus().excerpt((self.seed, 21, self.steps, row), WINDOW, "train") for row in range(CONFIG.batch_size)]
        loss = self.loss(torch.from_numpy(np.stack(rows)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CONFIG.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats per token."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def read(self, windows: Tensor) -> float:
        """Mean loss on some text."""
        return float(torch.stack([self.loss(part) for part in windows.split(32)]).mean())

    @property
    def state_numbers(self) -> int:
        """Numbers that the optimizer keeps."""
        return sum(value.numel() for state in self.optimizer.state.values() for value in state.values())


def train(update: UpdateConfig, learning_rate: float, seed: int) -> Losses:
    """A run of its own from fresh weights; infinite losses where it diverged."""
    torch.set_flush_denormal(True)
    try:
        run = Trained(update, seed)
        while run.steps < CONFIG.steps:
            if not math.isfinite(run.step(learning_rate * rate_at(run.steps, CONFIG))):
                return Losses(math.inf, math.inf)
        return Losses(*map(run.read, texts()))
    finally:
        torch.set_flush_denormal(False)
