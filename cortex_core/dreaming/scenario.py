"""What a dream is about: memories of a walk that collide, in a new order, and a question about one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cortex_core.config import ScenarioConfig
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.memories import Memory, Tokens

_SCENARIOS = 32  # keeps these draws apart from a ticket's other draws


class Scenario(NamedTuple):
    """Everything about a dream that is known before the model is asked."""

    walk: tuple[int, ...]
    """Ids of the memories on the walk, in order, as often as it came by."""
    asked: Memory
    """What the question is about."""
    lines: tuple[Memory, ...]
    """Whose lines are read, in this order."""
    cuts: tuple[int, ...]
    """Tokens of filler before each of these lines."""
    context: Tokens
    """From which filler is decoded."""
    num_filler: int
    """Tokens of filler."""

    def prompt(self, filler: Sequence[int]) -> Tokens:
        """Filler, with the lines at their places in it, and the question."""
        tokens, at = [], 0
        for line, cut in zip(self.lines, self.cuts, strict=True):
            tokens += [*filler[at:cut], *line.tokens]
            at = cut
        return (*tokens, *filler[at:], *self.asked.cue)


def scenarios(graph: MemoryGraph, tickets: Sequence[int], seed: int, config: ScenarioConfig) -> list[Scenario]:
    """One per ticket; each depends on graph, ticket, seed and settings alone."""
    return [
        _scenario(graph, places.tolist(), np.random.default_rng((seed, ticket, _SCENARIOS)), config)
        for ticket, places in zip(tickets, graph.walks(tickets, seed), strict=True)
    ]


def _scenario(graph: MemoryGraph, walk: list[int], rng: np.random.Generator, config: ScenarioConfig) -> Scenario:
    num_lines = int(rng.integers(config.max_lines + 1))
    num_filler = int(rng.integers(config.max_filler_tokens + 1))
    own_line = bool(rng.random() < config.own_line_frac)
    asked, *others = collision(graph, walk, rng)
    cue = graph.memories[asked].cue
    # A line with the same cue would give the answer away, or another one.
    others = [place for place in others if graph.memories[place].cue != cue][:num_lines]
    told = [*others, asked] if own_line else others
    told = [told[at] for at in rng.permutation(len(told))]
    cuts = np.sort(rng.integers(num_filler + 1, size=len(told)))
    scene = graph.memories[walk[rng.integers(len(walk))]]
    return Scenario(
        tuple(graph.memories[place].id for place in walk),
        graph.memories[asked],
        tuple(graph.memories[place] for place in told),
        tuple(cuts.tolist()),
        (scene.context or scene.tokens)[-config.context_tokens :],
        num_filler,
    )


def collision(graph: MemoryGraph, walk: Sequence[int], rng: np.random.Generator) -> list[int]:
    """The places on a walk, each once: two that collide, then the others, those first that collide with the ones
    before. Two collide the more, the less they are linked and the fewer dreams they have met in."""
    places = rng.permutation(list(dict.fromkeys(walk))).tolist()  # of equals, any
    shares, met = graph.among(places)
    clash = (1.0 - shares) / (1.0 + met)
    np.fill_diagonal(clash, -np.inf)
    order = [int(at) for at in np.unravel_index(clash.argmax(), clash.shape)][: len(places)]
    while len(order) < len(places):
        with_those_before = clash[order].sum(0)  # -inf for these themselves
        order.append(int(with_those_before.argmax()))
    return [places[at] for at in order]
