"""A backbone of 77,000 fresh weights with a tokenizer and text of its own: what runs end to end in seconds.

Built once per process, in a temporary folder. Its first weights can look up in the window what followed a token before
(`create_model`), so a memory can be trained on it at once, although it has learned nothing itself.
"""

from __future__ import annotations

import atexit
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which would say that it found no GPU

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging

from cortex_core.backbone.create import create_model, train_tokenizer
from cortex_core.backbone.load import load_backbone, load_tokenizer
from cortex_core.backbone.model import Cortex
from cortex_core.config import (
    BackboneConfig,
    DataConfig,
    FastWeightsConfig,
    OptimizerConfig,
    TasksConfig,
    TrainingConfig,
)
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.tasks.layout import Part, Sheet, TextTask
from cortex_core.tasks.mixture import Mixture, build_task
from cortex_core.tasks.vocabulary import DIGITS, MARKERS, Split, TaskVocabulary
from cortex_core.training.batches import BatchSource
from cortex_core.training.loop import Learner
from cortex_core.training.objectives import ReadingLoss

if TYPE_CHECKING:
    from pipelines.config import RunConfig

logging.disable_progress_bar()

NOUNS = [f"{a}{b}{c}" for a, b, c in itertools.product(("ba", "ko", "lu", "mi"), ("na", "re", "so", "ti"), "nrst")]
"""64 made-up words."""
SEGMENT, WINDOW, CHUNK, RANK, PAIRS = 32, 64, 8, 16, 2
MEMORY = FastWeightsConfig(rank=RANK, chunk_size=CHUNK, dead_zone=0.35, saturation=0.95)
TASKS = TasksConfig(num_pairs=PAIRS, num_queries=2, any_token_frac=0.0)
FAST = OptimizerConfig(learning_rate=1e-2, gate_learning_rate=3e-2, output_learning_rate=0.2, warmup_steps=5)


@cache
def folder() -> Path:
    """Holds `backbone` (weights and tokenizer) and `text` (40 files, about eight of them held out)."""
    root = Path(tempfile.mkdtemp(prefix="cortex-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    tokenizer = train_tokenizer([" ".join(NOUNS * 20)], 700, (*MARKERS, *DIGITS))
    tokenizer.save_pretrained(root / "backbone")
    create_model(
        vocab_size=len(tokenizer), hidden_size=64, num_layers=2, num_heads=4, mlp_size=48, window_tokens=WINDOW,
        rope_theta=10_000.0, tied_embeddings=True, seed=0,
    ).save_pretrained(root / "backbone")  # fmt: skip
    (root / "text").mkdir()
    for number in range(40):
        words = random.Random(number).choices(NOUNS, k=100)
        (root / "text" / f"file{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return root


def backbone_config() -> BackboneConfig:
    """The backbone, read in segments of half its window."""
    return BackboneConfig(name=str(folder() / "backbone"), segment_tokens=SEGMENT)


def corpus_config() -> DataConfig:
    return DataConfig(path=str(folder() / "text"), held_out_frac=0.2)


@cache
def vocabulary() -> TaskVocabulary:
    """About 20 keys and 20 values to train on, 10 of each held out."""
    return TaskVocabulary.from_tokenizer(load_tokenizer(backbone_config()))


@cache
def corpus() -> Corpus:
    return load_corpus(corpus_config(), vocabulary().tokenizer)


def task(filler: str = "text", split: Split = "train") -> TextTask:
    """Key-value recall that fits into a segment."""
    return build_task("key_value", filler, vocabulary(), corpus(), split=split, num_pairs=PAIRS)


@dataclass(frozen=True)
class Ragged(TextTask):
    """A hand-made task: one to five facts of three words, answers of one or two tokens.

    Half of the questions can be answered by repeating their last word, which is what the bare backbone does.
    """

    name: ClassVar[str] = "ragged"

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng, words = self.rng(index), self.vocabulary.values[self.split]
        facts = [Part(rng.choice(words, 3).tolist()) for _ in range(1 + index % 5)]
        last, other = rng.choice(words, 2, replace=False).tolist()
        answer = [last if index % 2 else other] * (1 + index % 3 // 2)
        return Sheet(facts, [Part([*rng.choice(words, index % 4).tolist(), last, *answer], 1 + index % 4, 1 + index % 4 + len(answer))])  # fmt: skip


def ragged(filler: str = "text") -> Ragged:
    like = task(filler)
    return Ragged(like.vocabulary, like.filler)


def model(memory: FastWeightsConfig = MEMORY, *, open_gates: bool = False) -> Cortex:
    """The backbone with new sidecars, the same ones each time; with `open_gates` they matter, all taps of them."""
    backbone = load_backbone(backbone_config())
    torch.manual_seed(0)
    attached = Cortex.attach(backbone, memory, SEGMENT)
    if open_gates:
        generator = torch.Generator().manual_seed(1)
        for sidecar in attached.sidecars.values():
            nn.init.constant_(sidecar.output_gate, 1.5)
            for weights in (sidecar.write_gate.weight, sidecar.addresses.key_taps, sidecar.addresses.query_taps):
                nn.init.normal_(weights, std=0.3, generator=generator)
            nn.init.normal_(sidecar.controller.out.weight, generator=generator)
    return attached


def training(**settings: object) -> TrainingConfig:
    """Short, without windows beside the long sequences and without averaging unless asked for."""
    few = {
        "steps": 6, "batch_size": 4, "max_segments": 3, "short_frac": 0.3, "in_window_batch_size": 0,
        "filler_windows": 0, "sparsity_weight": 0.02, "sparsity_margin": 0.1, "ema_decay": 0.0,
    }  # fmt: skip
    return TrainingConfig(**few | settings)


def batches(config: TrainingConfig, tasks: TasksConfig = TASKS, seed: int = 0) -> BatchSource:
    """As a worker makes them."""
    long = Mixture.from_config(tasks, vocabulary(), corpus(), seed=seed)
    with_text = tasks.model_copy(update={"names": (*tasks.names, "corpus")})
    in_window = Mixture.from_config(with_text, vocabulary(), corpus(), seed=seed + 1)
    return BatchSource(long, in_window, tasks, config, SEGMENT, narrowest=24, seed=seed)


def learner(config: TrainingConfig, attached: Cortex | None = None, optimizer: OptimizerConfig = FAST) -> Learner:
    """A learner of `attached`, or of a new model."""
    attached = attached or model()
    return Learner(attached, ReadingLoss(attached, config), config, optimizer)


def train(of: Learner, source: BatchSource, steps: int) -> list[dict[str, float]]:
    """Metrics of the next `steps` steps, in this one process."""
    return [of.step(source.micro_batches(of.step_number, 0, 1)) for _ in range(steps)]


@cache
def trained() -> Cortex:
    """A memory that recalls most facts, after a few seconds of training. Do not change it."""
    config = training(steps=40, batch_size=12, max_segments=2)
    of = learner(config)
    train(of, batches(config), config.steps)
    return of.model


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference of any entry."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def run_config(out_dir: Path, **overrides: object) -> RunConfig:
    """A complete run that takes a second, in this process; dots in names of `overrides` are written as two underscores."""
    from pipelines.config import load_config

    settings: dict[str, object] = {
        "name": "tiny", "out_dir": str(out_dir),
        "backbone": backbone_config().model_dump(), "fast_weights": MEMORY.model_dump(),
        "data": corpus_config().model_dump(), "tasks": TASKS.model_dump(), "optimizer": FAST.model_dump(),
        "training": {
            "steps": 6, "batch_size": 4, "in_window_batch_size": 4, "max_segments": 3, "short_frac": 0.3,
            "sparsity_weight": 0.02, "sparsity_margin": 0.1, "ema_decay": 0.9,
            "checkpoint_every_steps": 2, "report_every_steps": 1,
        },
        "evaluation": {
            "fillers": ["text"], "gaps_tokens": [0, 70], "num_examples": 6, "batch_size": 4, "perplexity_tokens": 1024,
        },
        "cluster.num_workers": 0, "sharding.stage": 0, "tracking.system_metrics": False,
    }  # fmt: skip
    changed = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(overrides=settings | changed)


@contextmanager
def at_update(step: int, then: Callable[[], None]) -> Iterator[None]:
    """Within the block: `then` in the middle of an optimizer step, when the weights have changed, and the average has not."""
    numbers = itertools.count(1)

    def after_update(*_: object) -> None:
        if next(numbers) == step:
            then()

    handle = register_optimizer_step_post_hook(after_update)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def interrupted_in(step: int) -> Iterator[None]:
    """Ctrl-C in the middle of an optimizer step."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), at_update(step, interrupt):
        yield
