"""The plasticity controller: surprise, uncertainty, reward and phase decide when, and how strongly, to write."""

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
        shared = [signal[:, None].expand_as(surprise) for signal in (reward, phase)]
        signals = torch.stack([surprise, uncertainty, *shared], dim=-1)
        gate, scale = torch.sigmoid(self.out(torch.tanh(self.hidden(signals)))).unbind(-1)
        return Plasticity(gate, scale)
