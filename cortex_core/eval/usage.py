"""Where the write gate opened: per layer, on facts and on filler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.reading import read_segments
from cortex_core.backbone.segments import Layout
from cortex_core.eval.reach import padded
from cortex_core.fast_weights.controller import Plasticity
from cortex_core.tasks.layout import TextTask

GAP_SEGMENTS = 3
CONSTANT = 1e-5
"""Standard deviation below which a signal in 0 to 1 is rounding alone."""


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
    with _told(model) as told:
        layout, states = Layout.plain(segments, 0), model.empty_states(len(ids))
        _, memory = read_segments(model, segments, layout, states, predict=False)
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
                "gate_surprise_r": _pearson(told.get(layer, [])),
            }
        )
    return rows


@contextmanager
def _told(model: Cortex) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Within the block: per layer with a controller, call by call, the surprise that it was told and its gate."""
    told: dict[int, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    for layer, sidecar in model.ports.values():
        if sidecar.controller is not None:

            def keep(_: nn.Module, signals: tuple[Tensor, ...], said: Plasticity, layer: int = layer) -> None:
                told.setdefault(layer, []).append((signals[0], said.gate))

            handles.append(sidecar.controller.register_forward_hook(keep))
    try:
        yield told
    finally:
        for handle in handles:
            handle.remove()


def _pearson(told: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Pearson's r of surprise and the controller's gate over heads and tokens; None where one of them is constant.

    Surprise is an input of the gate, so a high r shows no use: `controller_test` does.
    """
    if not told:
        return None
    both = torch.stack([torch.cat([pair[i].flatten() for pair in told]).double() for i in range(2)])
    if bool((both.std(dim=1) < CONSTANT).any()):
        return None
    return float(torch.corrcoef(both)[0, 1])
