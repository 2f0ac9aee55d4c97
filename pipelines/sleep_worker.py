"""What runs on every worker of `cortex sleep`: facts told day by day, nights, and questions with empty fast weights.

All workers live the same life: each holds a part of the frozen backbone, all of them the slow weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.load import load_tokenizer
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import read, restore, write
from cortex_core.consolidation.sleep import slow_values
from cortex_core.errors import IncompatibleError
from cortex_core.eval.perplexity import drift, text_loss
from cortex_core.intervals import wilson
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training import checkpoint
from cortex_core.training.life import Day, Life, new_sleeper
from pipelines.config import EVALUATION, SIDECARS_FOLDER, RunConfig
from pipelines.disk import room_for
from pipelines.worker import Edge, build

SCHEMA, SLEEPING = "cortex-nights/1", 4.0
HISTORY = "history.json"
TEXT_TOKENS, TEXT_SEED = 1024, 53


def sleep(config: RunConfig, edge: Edge) -> None:
    """Live from the last checkpoint (or from the first day) to the last night; then ask for everything."""
    torch.set_num_threads(config.cluster.worker_threads)
    torch.manual_seed(config.seed)
    edge.report({"phase": 0.0, "workers": edge.world_size, "num_workers": config.cluster.num_workers}, None)
    tokenizer = load_tokenizer(config.backbone)
    vocabulary = TaskVocabulary.from_tokenizer(tokenizer)
    corpus = load_corpus(config.data, tokenizer)
    model, shards = build(config)
    backbone = fingerprint(model.backbone, shards.gathered)
    restored(model, config, backbone)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    sleeper = new_sleeper(model, encode, corpus, config.sleep, config.replay, config.dream, shards.release)
    life = Life(sleeper, config.life, vocabulary, TextFiller(corpus, "held_out"))
    history = History(life)
    with edge.resume_from() as folder:
        if folder is not None:
            sleeper.load(folder)
            history.load(folder)
    if life.day == 0:
        history.before = life.known()
    for day in life.live():
        _agree(model, edge)
        history.add(day)
        last = day.number + 1 == life.num_days
        due = last or (day.number + 1) % config.life.checkpoint_every_days == 0
        with tempfile.TemporaryDirectory() as scratch:
            saved = _save(Path(scratch), life, history) if due and edge.rank == 0 else None
            edge.report({"phase": SLEEPING, "step": day.number + 1, **history.metrics()}, saved)
    document = _document(life, history, model, corpus, config.evaluation.perplexity_tokens)
    document["backbone_parameters"] = shards.total_numel
    with tempfile.TemporaryDirectory() as scratch:
        saved = _save(Path(scratch), life, history, document, config, backbone) if edge.rank == 0 else None
        edge.report({"phase": 3.0, "step": life.num_days}, saved)


def restored(model: Cortex, config: RunConfig, backbone: str) -> None:
    """The sidecars that the run begins with. Raises DataError, IncompatibleError."""
    assert config.sidecars is not None
    saved = read(Path(config.sidecars))
    if saved.fast_weights != config.fast_weights or saved.segment_tokens != config.backbone.segment_tokens:
        raise IncompatibleError(
            f"sidecars = {config.sidecars}: were trained with other fast_weights or backbone.segment_tokens than these "
            "settings have; take those of the run that trained them"
        )
    restore(model.sidecars, saved, backbone)


class History:
    """What is known of each day's facts after each night."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.before: list[list[bool]] = []
        """Of each lead, of each fact, before the first day."""
        self.days: list[dict[str, float]] = []
        self.known: list[list[float]] = []
        """After each day and night, the share of the facts of this and every earlier day."""

    def add(self, day: Day) -> None:
        """After a day and its night."""
        life = self._life
        told = range(life.told_on(day.number).stop)
        right = life.recalled(told, life.config.lead_tokens[0]).double()
        self.known.append([float(right[[*life.told_on(n)]].mean()) for n in range(day.number + 1)])
        nights = [night.metrics for night in day.nights]
        names = dict.fromkeys(name for night in nights for name in night)  # none, if the day had no night
        means = {name: sum(night.get(name, 0.0) for night in nights) / len(nights) for name in names}
        self.days.append(means | {"sleep/known_frac": float(right.mean())})

    def metrics(self) -> dict[str, float]:
        """Of the last day."""
        return self.days[-1]

    def save(self, folder: Path) -> None:
        """One JSON file."""
        parts = {"before": self.before, "days": self.days, "known": self.known}
        (folder / HISTORY).write_text(json.dumps(parts))

    def load(self, folder: Path) -> None:
        """Go on from `save`."""
        parts = json.loads((folder / HISTORY).read_text())
        self.before, self.days, self.known = parts["before"], parts["days"], parts["known"]


def _agree(model: Cortex, edge: Edge) -> None:
    """Equal sums in another order may differ in a bit: all workers go on with those of the first."""
    if edge.world_size > 1:
        for value in slow_values(model).values():
            dist.broadcast(value.detach(), 0)


def _document(life: Life, history: History, model: Cortex, corpus: Corpus, tokens: int) -> dict[str, Any]:
    rows = []
    for when, found in (("before", history.before), ("after", life.known())):
        for lead, right in zip(life.config.lead_tokens, found, strict=True):
            low, high, share = wilson(sum(right), len(right))
            rows.append({"when": when, "lead_tokens": lead, "known": share, "low": low, "high": high, "n": len(right)})
    count = max(2, tokens // TEXT_TOKENS)
    excerpts = [corpus.excerpt((TEXT_SEED, row), TEXT_TOKENS, "held_out") for row in range(count)]
    text, bytes_per_token = torch.tensor(np.stack(excerpts)), corpus.held_out_bytes / len(corpus.held_out)
    return {
        "rows": rows,
        "days": history.days,
        "known_by_day": history.known,
        "nights": life.sleeper.num_nights,
        "nights_undone": life.sleeper.num_undone,
        "slow_bytes": sum(value.numel() * value.element_size() for value in slow_values(model).values()),
        "drift": drift(text_loss(model, text.to(model.backbone.device)), bytes_per_token) | {"rows": count},
    }


def _save(
    folder: Path, life: Life, history: History,
    document: dict[str, Any] | None = None, config: RunConfig | None = None, backbone: str = "",
) -> Path:  # fmt: skip
    """A checkpoint; the last one with the sidecars as users load them, slow weights and all."""
    with room_for("a checkpoint that is being written", folder):
        sleeper = life.sleeper
        sleeper.save(folder)
        history.save(folder)
        if document is not None and config is not None:
            weights = dict(sleeper.model.sidecars.state_dict())
            write(
                folder / SIDECARS_FOLDER, weights, sleeper.model.fast_weights, config.backbone.segment_tokens, backbone
            )
            (folder / EVALUATION).write_text(json.dumps(document))
        counters = {"schema": SCHEMA, "step": life.day, "files": [file.name for file in folder.glob("*.safetensors")]}
        (folder / checkpoint.COUNTERS).write_text(json.dumps(counters))
    return folder
