"""Where the write gate opened: per layer, on facts and on filler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.reading import read_segments
from cortex_core.backbone.segments import Layout
from cortex_core.eval.reach import padded
from cortex_core.tasks.layout import TextTask

GAP_SEGMENTS = 3


@torch.no_grad()
def gate_usage(model: Cortex, task: TextTask, indices: Sequence[int]) -> list[dict[str, Any]]:
    """One row per memory layer: how often and how strongly it wrote, read over facts followed by filler."""
    width = model.segment_tokens
    total = (GAP_SEGMENTS + 1) * width
    examples = [task.example(index, total) for index in indices]
    facts = [len(e.tokens) - total - task.query_tokens(i) for e, i in zip(examples, indices, strict=True)]
    ids, _ = padded([example.tokens[:total] for example in examples], model.backbone.device)
    is_fact = torch.from_numpy(np.arange(total) < np.array(facts)[:, None]).to(ids.device)
    segments = ids.view(len(ids), -1, width)
    _, memory = read_segments(model, segments, Layout.plain(segments, 0), model.empty_states(len(ids)), predict=False)
    rows = []
    for layer, reading in memory.readings.items():
        write = reading.write.mean(dim=1)
        rows.append(
            {
                "layer": layer,
                "write_frac": float((reading.write > 0).float().mean()),
                "mean_write_on_facts": float(write[is_fact].mean()),
                "mean_write_on_filler": float(write[~is_fact].mean()),
                "mean_surprise_on_facts": float(reading.surprise.mean(dim=1)[is_fact].mean()),
                "mean_surprise_on_filler": float(reading.surprise.mean(dim=1)[~is_fact].mean()),
            }
        )
    return rows
