"""The hard gates: exactly 0 in a dead zone, so that a gap of any length leaves the memory as it was."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cortex_core.fast_weights.address import earlier


class TappedGate(nn.Module):
    """An activation per head and token, from the layer's input at the token and at the few before it.

    A short causal convolution. What marks a fact ("remember", a colon, a quote) often stands a token or two before it.
    The layer's own input shows that, but mixed with everything else, and a gate that must stay shut for 100,000 tokens
    needs it unmixed.
    """

    def __init__(self, hidden: int, heads: int, taps: int, bias: float) -> None:
        super().__init__()
        self.taps = taps
        # Zero: every token starts as open as the bias says. In the dead zone it would have no gradient to leave it.
        self.weight = nn.Parameter(torch.zeros(taps, heads, hidden))
        self.bias = nn.Parameter(torch.full((heads,), bias))

    def forward(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch heads tokens"]:
        """Activations, 0 to 1."""
        # One product for all taps: the input, by far the largest thing here, is read once.
        seen = (hidden @ self.weight.flatten(0, 1).T).chunk(self.taps, dim=-1)
        logits = self.bias + seen[0]
        for tap in range(1, min(self.taps, hidden.shape[1])):
            logits = logits + earlier(seen[tap], tap)
        return torch.sigmoid(logits).transpose(1, 2)


def hard_gate(activation: Float[Tensor, "*shape"], dead_zone: float, saturation: float) -> Float[Tensor, "*shape"]:
    """0 up to `dead_zone`, 1 from `saturation`, linear in between (a clipped sigmoid, when fed with one)."""
    return ((activation - dead_zone) / (saturation - dead_zone)).clamp(0.0, 1.0)


def margin_penalty(activation: Float[Tensor, "*shape"], dead_zone: float, margin: float) -> Float[Tensor, "*shape"]:
    """How far an activation stands above the lower edge of the safety margin below the dead zone.

    The gate's own value has no gradient once it is 0; this one pushes on until the gate is `margin` away from opening,
    so that filler unlike any seen in training stays shut as well.
    """
    return (activation - (dead_zone - margin)).clamp_min(0.0)
