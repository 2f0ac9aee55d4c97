"""A reader whose nights unfreeze the backbone, with the text and the questions that say how far it may go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts
from cortex_core.config import DreamConfig, ReplayConfig, SleepConfig, UnfreezeConfig
from cortex_core.consolidation.sleeper import Encode
from cortex_core.consolidation.unfreeze import trust_region
from cortex_core.consolidation.unfreezer import Unfreezer
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.fact_book import FactBook
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training.dreams import Dreams

ANCHOR_WINDOWS, GUARD_WINDOWS, WINDOW_TOKENS = 64, 8, 256
PROBES, TOLD, PROBE_TOKENS, PROBE_SEED = 32, 4, 40, 7919
_ANCHOR, _GUARD, _PROBE = 41, 43, 47


def new_unfreezer(
    model: Cortex, encode: Encode, corpus: Corpus, vocabulary: TaskVocabulary, sleep: SleepConfig,
    replay: ReplayConfig, unfreezing: UnfreezeConfig, dream: DreamConfig | None = None,
    after_backward: Callable[[], None] = lambda: None, backbone: str | None = None,
) -> Unfreezer:  # fmt: skip
    """As `new_sleeper`, for nights that change the backbone. The region is made of held-out text, and of questions
    about facts that are told in the prompt itself: what is learned may not cost what the memory could do before.
    `backbone` as of `Unfreezer`.

    Raises ConfigError, DataError.
    """
    tokens = min(WINDOW_TOKENS, model.segment_tokens)
    held_out, train = (TextFiller(corpus, split) for split in ("held_out", "train"))
    region = trust_region(
        model,
        _windows(held_out, GUARD_WINDOWS, tokens, _GUARD),
        Prompts.of([*_probes(vocabulary, held_out)]),
        unfreezing,
    )
    dreams = Dreams(model, dream or DreamConfig(), sleep, encode(sleep.questions[0]))
    text = _windows(train, ANCHOR_WINDOWS, tokens, _ANCHOR)
    return Unfreezer(
        model,
        sleep,
        replay,
        unfreezing,
        text,
        region,
        backbone,
        encode=encode,
        dreams=dreams,
        after_backward=after_backward,
    )


def _windows(filler: TextFiller, count: int, tokens: int, stream: int) -> Tensor:
    return torch.tensor(np.stack([filler.tokens((number, stream), tokens) for number in range(count)]))


def _probes(vocabulary: TaskVocabulary, filler: TextFiller) -> Iterator[list[int]]:
    """Of facts of another book than any that is lived with: some are told, one of them is asked for."""
    book = FactBook(vocabulary, filler, PROBES * TOLD, PROBE_SEED)
    for number in range(PROBES):
        told = book.facts[number * TOLD : (number + 1) * TOLD]
        lines = [token for fact in told for token in book.told(fact)]
        lead = filler.tokens((number, _PROBE), PROBE_TOKENS).tolist()
        yield [*lead, *lines, *book.question(told[number % TOLD])]
