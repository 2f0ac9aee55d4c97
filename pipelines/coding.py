"""The coder that the nights of a run go on training, if it has one."""

from __future__ import annotations

from pathlib import Path

from cortex_core.backbone.model import Cortex
from cortex_core.consolidation.codes import load_coder
from cortex_core.consolidation.night_codes import NightCodes
from pipelines.config import RunConfig


def night_codes(config: RunConfig, model: Cortex, backbone: str) -> NightCodes | None:
    """`backbone`: fingerprint of the model's. Raises DataError, IncompatibleError."""
    if config.coder is None:
        return None
    coder = load_coder(Path(config.coder), backbone)
    return NightCodes(model, coder, config.segments, config.replay, backbone)
