"""A dreamer: tickets in, dreams out. What a ticket gives depends on the model, the memories and the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.session import Session
from cortex_core.config import DreamConfig
from cortex_core.dreaming.decode import Decoded, decode
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.memories import Tokens
from cortex_core.dreaming.scenario import Scenario, scenarios
from cortex_core.errors import ConfigError, DataError

_FILLERS = 33  # keeps the draws of fillers apart from a ticket's other draws


@dataclass(frozen=True)
class Dream:
    """A question in a scene, and what the model answered."""

    ticket: int
    seed: int
    model_version: str
    walk: tuple[int, ...]
    """Ids of the memories on the walk that it comes from."""
    asked: int
    """Id of the memory that the question is about."""
    lines: tuple[int, ...]
    """Ids of the memories whose lines stand in it, in order."""
    question: Tokens
    filler: Decoded
    """What the model decoded around the lines."""
    prompt: Tokens
    """All of it up to the answer: filler, lines, question."""
    answer: Decoded
    """What the model said."""

    @property
    def id(self) -> str:
        """Names the dream among those of all seeds and versions of a model."""
        return f"{self.model_version}/{self.seed}/{self.ticket}"

    @property
    def memories(self) -> tuple[int, ...]:
        """Ids of the memories that are in it, the one that is asked for first."""
        return tuple(dict.fromkeys((self.asked, *self.lines)))


class Dreamer:
    """A model that dreams of a graph's memories. It changes neither, nor a session that it is given."""

    def __init__(
        self,
        model: Cortex,
        graph: MemoryGraph,
        config: DreamConfig | None = None,
        *,
        model_version: str,
        session: Session | None = None,
    ) -> None:
        """Without a `session`, of one row, the model dreams with fast weights that hold nothing. `model_version` names
        what the slow weights have learned so far. Raises ConfigError for a session of several rows, DataError for an
        empty graph or memories of another vocabulary."""
        if session is not None and session.batch_size != 1:
            raise ConfigError(f"session has {session.batch_size} rows: a dreamer goes on from one; fork it row by row")
        vocab_size = model.backbone.config.get_text_config().vocab_size
        used = {token for m in graph.memories for part in (m.tokens, m.cue, m.answer, m.context) for token in part}
        if used and not 0 <= min(used) <= max(used) < vocab_size:
            raise DataError(
                f"the memories have tokens {min(used)} to {max(used)}, the model knows 0 to {vocab_size - 1}: the "
                "graph belongs to another tokenizer"
            )
        if not len(graph):
            raise DataError("the memory graph holds no memory: there is nothing to dream of")
        self.model, self.graph, self.config = model, graph, config or DreamConfig()
        self.model_version, self.session = model_version, session

    def dream(self, tickets: Sequence[int]) -> list[Dream]:
        """One dream per ticket, a number from 0 on, in their order. A ticket's dream is the same in any company."""
        if tickets and min(tickets) < 0:
            raise ConfigError(f"ticket = {min(tickets)}: tickets count from 0")
        size = self.config.scenario.batch_size
        return [dream for at in range(0, len(tickets), size) for dream in self._batch(tickets[at : at + size])]

    def _batch(self, tickets: Sequence[int]) -> Iterator[Dream]:
        config = self.config.scenario
        plans = scenarios(self.graph, tickets, self.config.seed, config)
        fillers = self._fillers(tickets, plans)
        prompts = [plan.prompt(filler.tokens) for plan, filler in zip(plans, fillers, strict=True)]
        wanted = [len(plan.asked.answer) or config.answer_tokens for plan in plans]
        answers = decode(self.model, prompts, max(wanted), self.session)
        for at, (ticket, plan) in enumerate(zip(tickets, plans, strict=True)):
            yield Dream(
                ticket=ticket,
                seed=self.config.seed,
                model_version=self.model_version,
                walk=plan.walk,
                asked=plan.asked.id,
                lines=tuple(memory.id for memory in plan.lines),
                question=plan.asked.cue,
                filler=fillers[at],
                prompt=prompts[at],
                answer=answers[at].first(wanted[at]),
            )

    def _fillers(self, tickets: Sequence[int], plans: Sequence[Scenario]) -> list[Decoded]:
        config = self.config.scenario
        longest = max(plan.num_filler for plan in plans)
        draws = [np.random.default_rng((self.config.seed, ticket, _FILLERS)).random(longest) for ticket in tickets]
        made = decode(
            self.model,
            [plan.context for plan in plans],
            longest,
            self.session,
            np.stack(draws),
            temperature=config.temperature,
            top_p=config.top_p,
        )
        return [decoded.first(plan.num_filler) for decoded, plan in zip(made, plans, strict=True)]
