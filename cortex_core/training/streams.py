"""Streams of text in which facts are told, for a memory to read."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.fact_book import FactBook
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import Split, TaskVocabulary

FACTS_PER_WINDOW = 2


def fact_streams(
    vocabulary: TaskVocabulary, corpus: Corpus, split: Split, count: int, windows: int, width: int, seed: int
) -> Int[Tensor, "count tokens"]:
    """`count` streams of `windows` windows of `width` tokens: text of one split, and two facts in each window."""
    filler, told = TextFiller(corpus, split), FACTS_PER_WINDOW
    # A book has no more keys than the tokenizer has words: streams tell each of theirs as often as they have to.
    book = FactBook(vocabulary, filler, told * 32, seed)
    return torch.tensor(
        [
            [
                token
                for window in range(windows)
                for token in book.day(
                    stream * windows + window, range(told * (window % 32), told * (window % 32 + 1)), width
                )
            ]
            for stream in range(count)
        ]
    )
