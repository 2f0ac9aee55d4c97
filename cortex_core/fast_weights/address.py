"""Where a memory writes and reads: keys and queries of unit length, from what the layer is given."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cortex_core.config import FastWeightsConfig


class Addresses(nn.Module):
    """One map of the layer's input into the key space, and a short causal convolution each for keys and queries.

    At the start a token is stored under the one before it, and looked up by itself: "what followed this the last
    time?" (token shift: Peng et al. 2023, "RWKV"; short convolutions of keys and queries: Yang et al. 2025, "Gated
    Delta Networks"). In reversed heads, the first ones, it is what stands at a token that is stored under that token.
    Training moves on from there. A random map keeps angles (Johnson and Lindenstrauss), so tokens have nearly
    orthogonal addresses before anything is learned, whatever the backbone.

    With `binding`, a second map makes a factor of what stood before: the key of a token two tokens back, a query one.
    Products of vectors stand for pairs (Plate 1995, "Holographic Reduced Representations"; here by channel, as in
    Kanerva 2009, "Hyperdimensional Computing").
    """

    def __init__(self, hidden: int, heads: int, config: FastWeightsConfig, rank: int) -> None:
        super().__init__()
        taps, width = config.taps, heads * rank
        self.heads, self.num_reversed = heads, round(config.reversed_frac * heads)
        self.content = nn.Parameter(torch.randn(hidden, width) / hidden**0.5)
        key_taps = _one_tap(1, taps, width)
        key_taps[:, : self.num_reversed * rank] = _one_tap(0, taps, self.num_reversed * rank)
        self.key_taps = nn.Parameter(key_taps)
        self.query_taps = nn.Parameter(_one_tap(0, taps, width))
        if config.binding:
            # From 0 it would have to be found twice at once: how much of a factor helps a query only if keys have it.
            self.relation = nn.Parameter(torch.randn(hidden, width) / hidden**0.5)
            self.key_binding = nn.Parameter(_one_tap(2, taps, width))
            self.query_binding = nn.Parameter(_one_tap(1, taps, width))
        self.binding = config.binding
        self.register_buffer("live", torch.ones(heads, rank))
        self.live: Tensor  # 1 for the dimensions that are used, 0 for those that were pruned (`ranks`)

    def forward(
        self, hidden: Float[Tensor, "batch tokens hidden"], *, read: bool
    ) -> tuple[Float[Tensor, "batch heads tokens rank"], Float[Tensor, "batch heads tokens rank"]]:
        """Keys and queries. Without `read`, queries are the keys, unused."""
        content = hidden @ (self.content * self.live.flatten())
        keys = convolved(content, self.key_taps)
        queries = convolved(content, self.query_taps) if read else keys
        if self.binding:
            relation = hidden @ self.relation
            keys = keys * (1 + convolved(relation, self.key_binding))
            queries = queries * (1 + convolved(relation, self.query_binding)) if read else keys
        keys = self._unit(keys)
        return keys, self._unit(queries) if read else keys

    @torch.no_grad()
    def whiten(self, hidden: Float[Tensor, "tokens hidden"]) -> None:
        """Make the maps treat all directions of such inputs alike; before training, or what was learned is bent.

        What a layer is given has a large part that all tokens share, and a few directions that outweigh the rest. A
        random map keeps both, and every address is close to every other. The inverse square root of the second moment
        takes them out (Kessy et al. 2018, "Optimal Whitening and Decorrelation", ZCA, without centring: no bias is
        needed). Shrunk towards the identity by the share of directions to tokens, so that few tokens do little.
        """
        tokens, size = hidden.shape
        wide = hidden.double()
        moment = wide.T @ wide / max(tokens, 1)
        shrink = size / (size + tokens)
        even = moment.diagonal().mean() * torch.eye(size, dtype=wide.dtype, device=wide.device)
        values, vectors = torch.linalg.eigh((1 - shrink) * moment + shrink * even)
        root = (vectors * values.clamp_min(1e-12).rsqrt()) @ vectors.T
        for weights in (self.content, self.relation) if self.binding else (self.content,):
            weights.copy_((root @ weights.double()).to(weights.dtype))

    def _unit(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens rank"]:
        return functional.normalize(x.unflatten(-1, (self.heads, -1)).transpose(1, 2), dim=-1, eps=1e-6)


def earlier(x: Float[Tensor, "batch tokens channels"], tap: int) -> Float[Tensor, "batch tokens channels"]:
    """For every token, what stood `tap` (at least 1) tokens before it; 0 before the first."""
    return functional.pad(x[:, :-tap], (0, 0, tap, 0))


def convolved(
    x: Float[Tensor, "batch tokens channels"], taps: Float[Tensor, "taps channels"]
) -> Float[Tensor, "batch tokens channels"]:
    """A short causal convolution, each channel on its own."""
    mixed = x * taps[0]
    for tap in range(1, min(len(taps), x.shape[1])):
        mixed = mixed + earlier(x, tap) * taps[tap]
    return mixed


def _one_tap(which: int, taps: int, channels: int) -> Tensor:
    """All weight on one tap, or on the last if there are too few."""
    weights = torch.zeros(taps, channels)
    weights[min(which, taps - 1)] = 1.0
    return weights
