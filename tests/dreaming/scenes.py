"""Memories and dreams made by hand."""

from __future__ import annotations

import numpy as np

from cortex_core.dreaming.decode import Decoded
from cortex_core.dreaming.dream import Dream
from cortex_core.dreaming.judge import Reason, Scores, Verdict
from cortex_core.dreaming.memories import Memory

ASK = 7
"""The token before a cue."""
LINE = 50
"""Tokens of the stream from one memory to the next."""


def memory(number: int, **changed: object) -> Memory:
    """The fact that key 100 + number has the value 300 + number."""
    key, value = 100 + number, 300 + number
    address = np.random.default_rng(number).normal(size=6).astype(np.float32)
    plain = Memory(
        number, (5, key, value, 6), (ASK, key), (value,), (11, 12, 13), LINE * number + 2, number // 4, address, 1.0
    )
    return plain._replace(**changed)


def memories(count: int) -> list[Memory]:
    return [memory(number) for number in range(count)]


def dream(ticket: int, **changed: object) -> Dream:
    """Asks for the memory of its ticket, and answers right; its filler is its own and neither dull nor noise."""
    filler = tuple(1000 * (ticket + 1) + step for step in range(12))
    asked = memory(ticket)
    plain: dict = {
        "ticket": ticket, "seed": 0, "model_version": "v1", "walk": (ticket, ticket + 1), "asked": ticket, "lines": (ticket + 1,),
        "question": asked.cue, "filler": Decoded(filler, (-3.0,) * 12, (0.1,) * 12), "prompt": (*filler, *asked.cue),
        "answer": Decoded(asked.answer, (-0.2,), (2.0,)),
    }  # fmt: skip
    return Dream(**plain | changed)


def filled(ticket: int, nats: float, tokens: int = 12) -> Dream:
    """With filler that surprises by `nats`."""
    filler = tuple(1000 * (ticket + 1) + step for step in range(tokens))
    question = memory(ticket).cue
    return dream(ticket, filler=Decoded(filler, (-nats,) * tokens, (0.0,) * tokens), prompt=(*filler, *question))


def verdict(passed: bool, of: str = "v1/0/0") -> Verdict:
    reasons = () if passed else (Reason.WRONG_ANSWER,)
    return Verdict(of, True, reasons, Scores(-0.2, 2.0, 3.0, None, 1.0, 0.0))
