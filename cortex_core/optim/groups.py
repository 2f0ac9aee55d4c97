"""The optimizer that a configuration asks for, and what it does with which parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cortex_core.config import UpdateConfig
from cortex_core.optim.apollo import Apollo

MINI_SCALE = math.sqrt(128.0)
"""APOLLO-Mini's, from the paper."""


def build_optimizer(
    parameters: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    update: UpdateConfig,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    seed: int = 0,
    foreach: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW or APOLLO over `groups` of these parameters, each with its learning rate.

    APOLLO's projections hang on `seed` and on the names. `foreach` is how AdamW goes about it.
    """
    if update.name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, foreach=foreach)
    names = {id(parameter): name for name, parameter in parameters.items()}
    split: list[dict[str, Any]] = []
    for group in groups:
        by_rank: dict[int, list[tuple[str, Tensor]]] = {}
        for parameter in group["params"]:
            by_rank.setdefault(rank_of(parameter, update), []).append((names[id(parameter)], parameter))
        split += [{**group, "params": members, "rank": rank} for rank, members in by_rank.items()]
    mini = update.name == "apollo_mini"
    scale = update.scale if update.scale is not None else MINI_SCALE if mini else 1.0
    return Apollo(
        split, lr=0.0, rank=1, scale_type="tensor" if mini else "channel", scale=scale,
        update_proj_gap=update.update_proj_gap, betas=betas, weight_decay=weight_decay, lengths=update.lengths,
        seed=seed,
    )  # fmt: skip


def rank_of(parameter: Tensor, update: UpdateConfig) -> int:
    """Dimensions that this parameter's gradient is projected to, if it is a matrix."""
    if update.rank is not None:
        return update.rank
    quarter = min(parameter.shape) // 4 if parameter.ndim == 2 else 1
    return 1 if update.name == "apollo_mini" else max(1, quarter)
