"""Streams that were read by two memory layers, with the state before every token; segments drawn from few causes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from cortex_core.config import SegmentsConfig
from cortex_core.consolidation.record import Chunk, LayerStats, Opened, Segment, StatesAt, record
from cortex_core.consolidation.segments import SegmentState, detect
from cortex_core.fast_weights.state import FastWeights

BATCH, TOKENS, HIDDEN, HEADS, RANK, DIM = 3, 60, 6, 2, 3, 4
LAYERS = (1, 5)
CONFIG = SegmentsConfig(average_decay=0.9, warmup_tokens=4, min_tokens=2, max_tokens=12)
SOURCES = ["a", "b", "c"]


class Stream:
    """What reading it gave, all of it."""

    def __init__(self, seed: int = 0, *, hebbian: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.token_ids = torch.randint(100, (BATCH, TOKENS), generator=generator)
        self.surprise = random(BATCH, TOKENS).exp()
        self.hidden = {layer: 5 + random(BATCH, TOKENS, HIDDEN) for layer in LAYERS}
        self.up = {layer: random(BATCH, TOKENS + 1, HEADS, RANK, DIM).cumsum(1) for layer in LAYERS}
        self.down = {layer: random(BATCH, TOKENS + 1, HEADS, RANK, RANK) if hebbian else None for layer in LAYERS}

    def states_at(self, row: int, position: int) -> Mapping[int, FastWeights]:
        context = torch.zeros(1, 3, HIDDEN)
        down = {layer: None if part is None else part[row, position][None] for layer, part in self.down.items()}
        return {n: FastWeights(self.up[n][row, position][None], down[n], context) for n in LAYERS}

    def chunk(self, start: int, stop: int) -> Chunk:
        now = slice(start, stop)
        hidden = {layer: part[:, now] for layer, part in self.hidden.items()}
        return Chunk(self.token_ids[:, now], self.surprise[:, now], hidden, torch.full((BATCH,), start))


def read_in_calls(stream: Stream, cuts: list[int], states_at: StatesAt | None = None) -> tuple[list[Segment], Opened]:
    """All segments in the order in which calls gave them out, and what is open at the end."""
    state, opened, segments = SegmentState.zeros(BATCH), (None,) * BATCH, []
    places = [0, *sorted(cuts), TOKENS]
    for start, stop in itertools.pairwise(places):
        chunk = stream.chunk(start, stop)
        marks, state = detect(chunk.surprise, state, CONFIG)
        done, opened = record(chunk, marks, opened, states_at or stream.states_at, sources=SOURCES, step=7)
        segments += done
    return segments, opened


def few_causes(count: int, *, causes: int = 3, noise: float = 0.05, seed: int = 0) -> list[Segment]:
    """Segments whose statistics are smooth functions of `causes` numbers each, and a little noise: what a code can find.
    The maps are the same for every seed."""
    fixed, drawn = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)

    def random(*shape: int, generator: torch.Generator = fixed) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps = {n: (random(causes, HIDDEN), random(causes, HIDDEN), random(causes, HEADS, DIM)) for n in LAYERS}
    addresses = {n: random(HEADS, RANK) for n in LAYERS}
    segments = []
    for number in range(count):
        z, stats = random(causes, generator=drawn), {}
        for layer, (means, variances, values) in maps.items():
            value = (2 + torch.einsum("c,chd->hd", z, values)) / 2
            delta = addresses[layer][..., None] * value[:, None]
            stats[layer] = LayerStats(
                z @ means + noise * random(HIDDEN, generator=drawn),
                (0.5 * torch.tanh(z @ variances) + noise * random(HIDDEN, generator=drawn)).exp(),
                delta + noise * random(HEADS, RANK, DIM, generator=drawn),
            )
        segments.append(Segment(torch.arange(5), number, number + 5, 2.0, 1.0, stats, "s", 0))
    return segments
