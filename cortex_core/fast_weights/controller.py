"""The plasticity controller: surprise, uncertainty, reward and phase decide when, and how strongly, to write.

Where uncertainty is high it may not write strongly, whatever the other signals say: noise would be kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cortex_core.config import FastWeightsConfig

NUM_SIGNALS = 4


class Plasticity(NamedTuple):
    """The controller's word on each token, both 0 to 1."""

    gate: Float[Tensor, "batch heads tokens"]
    """Multiplies the write gate's activation before the dead zone: whether to write."""
    scale: Float[Tensor, "batch heads tokens"]
    """Multiplies what passes it: how strongly."""


class Controller(nn.Module):
    """A small MLP from the four signals to `Plasticity`, one for all heads of a layer."""

    def __init__(self, config: FastWeightsConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden = nn.Linear(NUM_SIGNALS, config.controller_hidden)
        self.out = nn.Linear(config.controller_hidden, 2)
        # Starts open (sigmoid(3) = .95) and indifferent: the signals earn their influence.
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, 3.0)

    def forward(
        self,
        surprise: Float[Tensor, "batch heads tokens"],
        uncertainty: Float[Tensor, "batch heads tokens"],
        reward: Float[Tensor, "batch tokens"],
        phase: Float[Tensor, "batch tokens"],
    ) -> Plasticity:
        """Signals of some tokens to their plasticity."""
        if self.config.controller_test == "shuffled_surprise":
            surprise = surprise[:, :, _shuffled(surprise.shape[2]).to(surprise.device)]
        shared = [signal[:, None].expand_as(surprise) for signal in (reward, phase)]
        signals = torch.stack([surprise, uncertainty, *shared], dim=-1)
        gate, scale = torch.sigmoid(self.out(torch.tanh(self.hidden(signals)))).unbind(-1)
        if self.config.controller_test == "mean_gate":
            gate = gate.mean(dim=(0, 2), keepdim=True).expand_as(gate)
        uncertain = uncertainty > self.config.uncertainty_threshold
        return Plasticity(gate, torch.where(uncertain, scale.clamp_max(self.config.uncertain_scale), scale))


def _shuffled(tokens: int) -> Tensor:
    """An order of `tokens`, always the same."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))
