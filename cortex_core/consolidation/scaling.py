"""Synaptic scaling (Turrigiano 2008): what a unit can be driven by in all stays near a target, what it prefers stays.

Learning that strengthens some weights and never weakens others runs away. Cells answer by multiplying all their
synapses alike, so that the differences between them, in which the memory lies, are kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cortex_core.config import ScalingConfig
from cortex_core.errors import ConfigError


def unit_norms(weights: Float[Tensor, "*units inputs"]) -> Float[Tensor, "*units"]:
    """Length of each unit's weights: what `scaled` may be told to keep."""
    return torch.linalg.vector_norm(weights, dim=-1)


def scaled(
    weights: Float[Tensor, "*units inputs"], config: ScalingConfig, target: Float[Tensor, "*units"] | None = None
) -> Float[Tensor, "*units inputs"]:
    """The weights, each unit's (a row's) multiplied by (target / norm)^rate, within `max_factor`.

    `target` is `config.target_norm` unless it is given. A unit without weights stays without. Raises ConfigError for a
    target that is not positive.
    """
    if target is None:
        target = weights.new_full(weights.shape[:-1], config.target_norm)
    if not bool((torch.isfinite(target) & (target > 0)).all()):
        raise ConfigError(f"target = {float(target.min())}: the norm of a unit must be finite and above 0 to aim at")
    norms = unit_norms(weights)
    factor = (target / norms).pow(config.rate).clamp(1.0 / config.max_factor, config.max_factor)
    return weights * torch.where(norms > 0, factor, 1.0)[..., None]
