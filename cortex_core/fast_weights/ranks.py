"""Adaptive rank: one budget of key-space dimensions for all layers and heads, kept where they are used.

How much a dimension is used is measured while the memory trains: the squared first-order change of the loss if it were
left out (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8). It costs nothing: the
scale of a dimension multiplies its column of the address map, so its gradient is that column's product with its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cortex_core.fast_weights.address import Addresses

MEMORY_STEPS = 50
"""Steps over which the measure is averaged."""


@torch.no_grad()
def importance(addresses: Addresses) -> Float[Tensor, "heads rank"]:
    """Of each dimension, from the gradient that is there; 0 without one."""
    content = addresses.content
    if content.grad is None:
        return torch.zeros(addresses.live.shape, device=content.device)
    return (content * content.grad).sum(0).square().view(addresses.live.shape)


class Usage:
    """Importance of every dimension of some sidecars, averaged over the last steps. Equal on all workers, because
    gradients are."""

    def __init__(self, sidecars: nn.ModuleDict) -> None:
        self.addresses = {name: module for name, module in sidecars.named_modules() if isinstance(module, Addresses)}
        self.scores = {name: torch.zeros_like(addresses.live) for name, addresses in self.addresses.items()}

    def measure(self) -> None:
        """Take in the gradients of one step."""
        for name, addresses in self.addresses.items():
            self.scores[name].lerp_(importance(addresses), 1 / MEMORY_STEPS)

    def prune(self, mean_rank: float) -> None:
        """Keep `mean_rank` dimensions per head, on average over all layers and heads: those that matter most."""
        kept = allocate([*self.scores.values()], round(mean_rank * sum(len(score) for score in self.scores.values())))
        for addresses, live in zip(self.addresses.values(), kept, strict=True):
            addresses.live.copy_(live)


def allocate(scores: Sequence[Float[Tensor, "heads rank"]], keep: int) -> list[Bool[Tensor, "heads rank"]]:
    """The `keep` dimensions with the highest scores, over all layers and heads; of equals, the earlier ones."""
    flat = torch.cat([score.flatten() for score in scores])
    live = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    live[torch.sort(flat, descending=True, stable=True).indices[:keep]] = True
    parts = live.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
