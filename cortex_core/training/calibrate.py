"""Fits a new memory to its backbone before the first step: addresses that tell the layer's inputs apart."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.reading import read_segments
from cortex_core.backbone.segments import Layout
from cortex_core.fast_weights.sidecar import Sidecar

_ROWS = 16  # windows per call of the backbone


@torch.no_grad()
def calibrate(model: Cortex, input_ids: Tensor) -> None:
    """Whiten every layer's addresses on what that layer is given for `input_ids`, int64 [windows, tokens].

    For a memory that has learned nothing yet. Deterministic; under sharding every worker must call it, with the same
    tokens. An empty `input_ids` does nothing.
    """
    seen: defaultdict[Sidecar, list[Tensor]] = defaultdict(list)

    def keep(sidecar: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(sidecar, Sidecar)
        seen[sidecar].append(inputs[0].hidden.float().flatten(0, 1))

    hooks = [sidecar.register_forward_pre_hook(keep) for sidecar in model.sidecars_by_layer.values()]
    try:
        for start in range(0, len(input_ids), _ROWS):
            rows = input_ids[start : start + _ROWS].to(model.backbone.device)
            layout = Layout.plain(rows[:, None], 0)
            read_segments(model, rows[:, None], layout, model.empty_states(len(rows)), predict=False)
    finally:
        for hook in hooks:
            hook.remove()
    for sidecar, hidden in seen.items():
        sidecar.addresses.whiten(torch.cat(hidden))
