"""The small backbone of `tests.tiny` with noise in its weights: what it says depends on everything that it has read.

Without the noise it repeats its last word, whatever came before. It is for tests that compare answers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cortex_core.backbone.model import Cortex
from tests import tiny


def model() -> Cortex:
    """With open gates, the same weights each time."""
    attached = tiny.model(open_gates=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in attached.backbone.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            weight.data += 3 * weight.data.std() * torch.randn(weight.shape, generator=generator)
    return attached


def save(folder: Path) -> list[str]:
    """Options of the command line for the model, written into `folder`."""
    attached = model()
    attached.backbone.save_pretrained(folder / "backbone")
    tiny.vocabulary().tokenizer.save_pretrained(folder / "backbone")
    attached.save_pretrained(folder / "sidecars")
    return ["--model", str(folder / "backbone"), "--sidecars", str(folder / "sidecars")]
