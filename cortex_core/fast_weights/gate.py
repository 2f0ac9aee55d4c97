"""The hard write gate: exactly 0 in a dead zone, so that a gap of any length leaves the memory as it was."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def hard_gate(
    activation: Float[Tensor, "*shape"], dead_zone: float, saturation: float
) -> Float[Tensor, "*shape"]:
    """0 up to `dead_zone`, 1 from `saturation`, linear in between (a clipped sigmoid, when fed with one)."""
    return ((activation - dead_zone) / (saturation - dead_zone)).clamp(0.0, 1.0)


def margin_penalty(
    activation: Float[Tensor, "*shape"], dead_zone: float, margin: float
) -> Float[Tensor, "*shape"]:
    """How far an activation stands above the lower edge of the safety margin below the dead zone.

    The gate's own value has no gradient once it is 0; this one pushes on until the gate is `margin` away from opening,
    so that filler unlike any seen in training stays shut as well.
    """
    return (activation - (dead_zone - margin)).clamp_min(0.0)
