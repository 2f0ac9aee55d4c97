"""What the plasticity controller is told about a token. All causal, all known inside the layer, in one pass.

The source takes surprise and uncertainty from the next-token loss. When many segments share one backbone call those are
known only after the call; a second pass would double the cost. The memory's own prediction error against the state at
the start of the chunk, and the spread of the layer's own attention, are known at the token, the same in training and in
generation (Behrouz et al. 2024, "Titans", section 3.1, take the memory's error for the same reason).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

EPSILON = 1e-6


def surprise(
    values: Float[Tensor, "*shape head_dim"], predicted: Float[Tensor, "*shape head_dim"]
) -> Float[Tensor, "*shape"]:
    """How wrong the memory is about a value, 0 (it knew) to 1 (nothing stored, or the opposite). Not differentiated."""
    with torch.no_grad():
        scale = values.norm(dim=-1) + predicted.norm(dim=-1)
        return (values - predicted).norm(dim=-1) / (scale + EPSILON)


def uncertainty(
    attended: Float[Tensor, "*shape head_dim"], values: Float[Tensor, "*shape head_dim"]
) -> Float[Tensor, "*shape"]:
    """How spread out attention is, 0 to 1. Averaging many unlike values shortens the result: |mean| / |value| falls
    like the square root of the attention weights' participation ratio. Not differentiated."""
    with torch.no_grad():
        own, mean = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (values, attended))
        return own / (own + mean + EPSILON)


def phase(positions: Int[Tensor, "*shape"], period_tokens: int) -> Float[Tensor, "*shape"]:
    """sin(2 pi t / period), t counted over the whole session; reduced as an integer, so exact for any t."""
    return torch.sin((positions % period_tokens).float() * (2 * math.pi / period_tokens))
