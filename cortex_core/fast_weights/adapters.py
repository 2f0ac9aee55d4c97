"""Learned low-rank maps around a memory: of what is stored, and of what is read. At the start they change nothing.

Without them a memory stores a frozen layer's own values and adds what it reads to that layer's attention. That is
enough where the answer is one of the tokens that were written. It is not where what has to be stored stood a token or
two earlier, or where a reading has to take its place beside what the layer's attention found in the window.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights.address import convolved


class Adapters(nn.Module):
    """Two low-rank maps, as in LoRA (Hu et al. 2022), and a share per head of the attention that a reading replaces.

    The map of values has a short causal convolution in the middle (Yang et al. 2025, "Gated Delta Networks", have one
    on their values): each of its channels begins with another mixture of the last few tokens.
    """

    def __init__(self, hidden: int, heads: int, value_dim: int, config: FastWeightsConfig) -> None:
        super().__init__()
        rank, width = config.adapter_rank, heads * value_dim
        self.heads = heads
        self.value_down = nn.Parameter(torch.randn(hidden, rank) / hidden**0.5)
        self.value_taps = nn.Parameter(torch.randn(config.taps, rank) / config.taps**0.5)
        self.value_up = nn.Parameter(torch.zeros(rank, width))
        self.read_down = nn.Parameter(torch.randn(width, rank) / width**0.5)
        self.read_up = nn.Parameter(torch.zeros(rank, width))
        self.read_bias = nn.Parameter(torch.zeros(width))
        self.attention_share = nn.Parameter(torch.zeros(heads))

    def values(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch heads tokens value_dim"]:
        """What is added to each token's values."""
        return self._by_head(convolved(hidden @ self.value_down, self.value_taps) @ self.value_up)

    def read(self, out: Float[Tensor, "batch heads tokens value_dim"]) -> Float[Tensor, "batch heads tokens value_dim"]:
        """What was read, and what follows from the readings of all heads together."""
        together = out.transpose(1, 2).flatten(2)
        return out + self._by_head(together @ self.read_down @ self.read_up + self.read_bias)

    def _by_head(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens value_dim"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
