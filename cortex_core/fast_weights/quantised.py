"""Eight bits per number, for what lies on disk: computing goes on in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = 127
"""Largest integer; symmetric, so that 0 is exactly 0."""


def to_int8(x: Float[Tensor, "*rows width"]) -> tuple[Int8[Tensor, "*rows width"], Float[Tensor, "*rows 1"]]:
    """Integers and, per row, the positive float32 scale that makes `x` of them again, to half a scale."""
    largest = x.detach().float().abs().amax(-1, keepdim=True)
    # A row below the smallest normal scale is 0: a subnormal one would not divide exactly.
    scale = torch.where(largest / LEVELS >= torch.finfo(torch.float32).tiny, largest / LEVELS, 1.0)
    return (x.detach().float() / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def from_int8(integers: Int8[Tensor, "*rows width"], scale: Float[Tensor, "*rows 1"]) -> Float[Tensor, "*rows width"]:
    """Float32 again."""
    return integers.float() * scale
