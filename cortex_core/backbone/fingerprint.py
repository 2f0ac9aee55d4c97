"""Fingerprints: which backbone and which sidecars a state belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

SAMPLE = 64


def fingerprint(
    module: nn.Module,
    gathered: Callable[[Any], AbstractContextManager[Any]] = lambda _: nullcontext(),
    without: str | None = None,
) -> str:
    """16 hex digits from the name, shape and first 64 values of every parameter whose name does not end in `without`.

    Values count in bfloat16, so that a backbone has the same fingerprint in float32 and in bfloat16. In float16 it may
    have another one: rounded twice, values can differ. `gathered(parameter)` makes a sharded parameter whole while it
    is read; every rank must then call this together.
    """
    digest = hashlib.sha256()
    names, samples = [], []
    for name, parameter in sorted(module.named_parameters(), key=lambda item: item[0]):
        if without is not None and name.endswith(without):
            continue
        with gathered(parameter):
            names.append(f"{name}{tuple(parameter.shape)}")
            samples.append(parameter.detach().flatten()[:SAMPLE].to(torch.bfloat16, copy=True))
    if not samples:
        return digest.hexdigest()[:16]
    # To the CPU all at once: a GPU is waited for each time.
    together = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu().view(torch.int16)
    for name, sample in zip(names, together.split([len(sample) for sample in samples]), strict=True):
        digest.update(name.encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
