"""What runs on every worker of `cortex sleep`: facts told day by day, nights, and questions with empty fast weights.

All workers live the same life: each holds a part of the frozen backbone, all of them the slow weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.load import load_tokenizer
from cortex_core.backbone.low_rank_files import save_deltas
from cortex_core.backbone.sidecar_files import write
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.consolidation.spread import fitted
from cortex_core.consolidation.unfreezer import DELTAS, Unfreezer
from cortex_core.tasks.corpus import load_corpus
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training import checkpoint
from cortex_core.training.life import Life, new_sleeper
from cortex_core.training.unfreezing import new_unfreezer
from pipelines.coding import night_codes
from pipelines.config import EVALUATION, SIDECARS_FOLDER, RunConfig
from pipelines.disk import room_for
from pipelines.life_history import History, document_of
from pipelines.worker import Edge, begin_with, build

SCHEMA, SLEEPING = "cortex-nights/1", 4.0


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
    begin_with(model, config, backbone)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    if config.sleep.place == "backbone":
        sleeper: Sleeper = new_unfreezer(
            model, encode, corpus, vocabulary, config.sleep, config.replay, config.unfreeze, config.dream,
            shards.release, backbone,
        )  # fmt: skip
    else:
        sleeper = new_sleeper(
            model, encode, corpus, config.sleep, config.replay, config.dream, shards.release, fisher=config.fisher,
            scaling=config.scaling, codes=night_codes(config, model, backbone),
        )  # fmt: skip
    life = Life(sleeper, config.life, vocabulary, TextFiller(corpus, "held_out"))
    history = History(life)
    with edge.resume_from() as folder:
        if folder is not None:
            sleeper.load(folder)
            history.load(folder)
    edge.report({"phase": SLEEPING}, None)  # a night may take minutes, and loading is over
    if life.day == 0:
        history.before = life.known()
    for day in life.live():
        _agree(sleeper, edge)
        history.add(day)
        history.catch_up()
        last = day.number + 1 == life.num_days
        due = last or (day.number + 1) % config.life.checkpoint_every_days == 0
        with tempfile.TemporaryDirectory() as scratch:
            saved = _save(Path(scratch), life, history) if due and edge.rank == 0 else None
            edge.report({"phase": SLEEPING, "step": day.number + 1, **history.metrics()}, saved)
    document = document_of(life, history, model, corpus, config.evaluation.perplexity_tokens)
    document["backbone_parameters"] = shards.total_numel
    with tempfile.TemporaryDirectory() as scratch:
        saved = _save(Path(scratch), life, history, document, config, backbone) if edge.rank == 0 else None
        edge.report({"phase": 3.0, "step": life.num_days}, saved)


def _agree(sleeper: Sleeper, edge: Edge) -> None:
    """Equal sums in another order may differ in a bit: all workers go on with those of the first."""
    if edge.world_size > 1:
        for value in [*sleeper.values().values(), *fitted(sleeper.model).values()]:
            dist.broadcast(value.detach(), 0)


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
            if isinstance(sleeper, Unfreezer) and sleeper.deltas is not None:
                save_deltas(sleeper.deltas, folder / SIDECARS_FOLDER / DELTAS, sleeper.model.backbone, backbone)
            (folder / EVALUATION).write_text(json.dumps(document))
        counters = {"schema": SCHEMA, "step": life.day, "files": [file.name for file in folder.glob("*.safetensors")]}
        (folder / checkpoint.COUNTERS).write_text(json.dumps(counters))
    return folder
