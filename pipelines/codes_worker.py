"""What runs on every worker for `stage = "codes"`: read with a trained memory, and fit codes of what was surprising.

All workers read the same streams: each holds a part of the frozen backbone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.load import load_tokenizer
from cortex_core.consolidation.codes import SegmentCoder, StatisticsShape, fit, save_coder
from cortex_core.consolidation.diary import Diary
from cortex_core.consolidation.record import Segment
from cortex_core.consolidation.statistics import Recoverable, Statistics
from cortex_core.errors import DataError
from cortex_core.tasks.corpus import load_corpus
from cortex_core.tasks.vocabulary import Split, TaskVocabulary
from cortex_core.training import checkpoint
from cortex_core.training.streams import fact_streams
from pipelines.config import CODER, EVALUATION, RunConfig
from pipelines.worker import Edge, begin_with, build

READING, FITTING = 5.0, 6.0
FEWEST_SEGMENTS = 8


def code(config: RunConfig, edge: Edge) -> None:
    """Read all streams, fit, ask what is kept of the held-out ones; the coder is reported as a checkpoint."""
    torch.set_num_threads(config.cluster.worker_threads)
    torch.manual_seed(config.seed)
    edge.report({"phase": 0.0, "workers": edge.world_size, "num_workers": config.cluster.num_workers}, None)
    tokenizer, settings = load_tokenizer(config.backbone), config.codes
    vocabulary, corpus = TaskVocabulary.from_tokenizer(tokenizer), load_corpus(config.data, tokenizer)
    model, shards = build(config)
    backbone = fingerprint(model.backbone, shards.gathered)
    begin_with(model, config, backbone)
    width = model.segment_tokens
    windows = -(-settings.stream_tokens // width)
    read: dict[str, list[Segment]] = {}
    splits: tuple[tuple[Split, int], ...] = (("train", settings.num_streams), ("held_out", settings.held_out_streams))
    for split, count in splits:
        streams = fact_streams(vocabulary, corpus, split, count, windows, width, config.seed)
        diary, read[split] = Diary(model, config.segments, [f"{split}-{n}" for n in range(count)]), []
        for window, ids in enumerate(streams.split(width, dim=1)):
            read[split] += diary.read(ids.to(model.backbone.device), step=window)
            shards.release()
            done = window + 1 + (windows if split == "held_out" else 0)
            edge.report({"phase": READING, "step": done, "codes/segments": float(len(read[split]))}, None)
    edge.report({"phase": FITTING}, None)
    coder, document = fitted(read["train"], read["held_out"], config)
    document["tokens"] = windows * width * (settings.num_streams + settings.held_out_streams)
    with tempfile.TemporaryDirectory() as scratch:
        saved = _save(Path(scratch), coder, document, backbone, 2 * windows) if edge.rank == 0 else None
        edge.report({"phase": 3.0, "step": 2 * windows}, saved)


def fitted(train: list[Segment], held_out: list[Segment], config: RunConfig) -> tuple[SegmentCoder, dict[str, Any]]:
    """A coder of `train`, and what it keeps of `held_out`. Raises DataError if there were too few segments."""
    if min(len(train), len(held_out)) < FEWEST_SEGMENTS:
        raise DataError(
            f"{len(train)} segments to fit and {len(held_out)} held out: there must be at least {FEWEST_SEGMENTS} of "
            "each. Raise codes.stream_tokens or codes.num_streams, or lower segments.open_ratio"
        )
    statistics = Statistics.of(train)
    given = Recoverable.of(statistics, config.codes.num_directions)
    torch.manual_seed(config.seed)
    coder = SegmentCoder(StatisticsShape.of(statistics), config.codes)
    coder.observe(given)
    errors = fit(coder, given, generator=torch.Generator().manual_seed(config.seed))
    wrote = sum(any(bool(stats.delta_up.any()) for stats in segment.stats.values()) for segment in held_out)
    document = errors | coder.explained_variance(Statistics.of(held_out))
    return coder, document | {
        "segments": len(train),
        "held_out_segments": len(held_out),
        "segment_tokens": sum(segment.num_tokens for segment in held_out) / len(held_out),
        "wrote_frac": wrote / len(held_out),
        "code_size": config.codes.code_size,
    }


def _save(folder: Path, coder: SegmentCoder, document: dict[str, Any], backbone: str, step: int) -> Path:
    save_coder(coder, folder / CODER, backbone)
    (folder / EVALUATION).write_text(json.dumps(document))
    (folder / checkpoint.COUNTERS).write_text(
        json.dumps({"schema": "cortex-codes-run/1", "step": step, "files": [CODER]})
    )
    return folder
