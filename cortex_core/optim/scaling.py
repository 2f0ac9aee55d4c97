"""APOLLO's arithmetic: Adam's moments of what is seen of a gradient, the factors that follow, the limit of growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ScaleType = Literal["channel", "tensor"]
Lengths = Literal["exact", "projected"]
GROWTH = 1.01
"""Most that the norm of a scaled gradient may grow from step to step (gamma in the paper)."""
UNSEEN = 1e-18
"""Lengths up to this count as 0: the squares of smaller numbers are none of float32's normal ones."""


def adam_directions(
    seen: list[Tensor], states: Sequence[dict[str, Tensor]], betas: tuple[float, float], eps: float
) -> list[Tensor]:
    """Takes in what is seen of some gradients, and gives Adam's bias-corrected m / (sqrt(v) + eps) for each of them."""
    first, second = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
    steps = [state["step"].item() for state in states]
    torch._foreach_lerp_(first, seen, 1.0 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, seen, seen, 1.0 - betas[1])
    roots = torch._foreach_sqrt(second)
    torch._foreach_div_(roots, [math.sqrt(1.0 - betas[1] ** step) for step in steps])
    torch._foreach_add_(roots, eps)
    directions = torch._foreach_div(first, roots)
    torch._foreach_div_(directions, [1.0 - betas[0] ** step for step in steps])
    return list(directions)


def factors(
    measured: Float[Tensor, "k n"], direction: Float[Tensor, "rank n"], scale_type: ScaleType
) -> Float[Tensor, "*n"]:
    """Length of Adam's direction over that of what it is measured by, the gradient or its projection; of each column or
    of the matrix. 0 where the latter is 0."""
    across = 0 if scale_type == "channel" else None
    before, after = (torch.linalg.vector_norm(x, dim=across) for x in (measured, direction))
    return torch.where(before > UNSEEN, after / before, 0.0)


def limited(
    factor: Float[Tensor, "*n"], gradient: Float[Tensor, "m n"], last: Float[Tensor, ""]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, ""]]:
    """Factors under which the scaled gradient's norm is at most `GROWTH` times the `last` one, and that norm.

    After a norm of 0, at the start or where a gradient vanished, there is no limit: nothing would grow from it.
    """
    lengths = torch.linalg.vector_norm(gradient, dim=0 if factor.ndim else None)
    norm = torch.linalg.vector_norm(factor * lengths)
    share = torch.where(last > 0, GROWTH * last / norm, 1.0).clamp(max=1.0)
    return factor * share, norm * share
