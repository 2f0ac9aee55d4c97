"""What a model could do before it learned facts for good: recall what it has just read, and be told something new."""

from __future__ import annotations

import numpy as np
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.eval.reach import recall
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training.life import Life

GAP_TOKENS, NUM_PAIRS, SEED = 1024, 6, 20_003
BEFORE_TOKENS, AFTER_TOKENS = 200, 568
"""Of held-out text, before and after a fact that is told anew: three of its windows in all."""
AT_ONCE = 50


def recalled(model: Cortex, vocabulary: TaskVocabulary, corpus: Corpus, count: int) -> list[bool]:
    """Of so many examples of key-value recall, 1,024 tokens of held-out text between fact and question, which are
    answered right with memory on. The same ones for every model."""
    task = build_task("key_value", "text", vocabulary, corpus, split="held_out", seed=SEED, num_pairs=NUM_PAIRS)
    parts = torch.arange(count).split(AT_ONCE)
    found = [recall(model, task, [GAP_TOKENS], part.tolist(), bare=False) for part in parts]
    return [right for hits in found for each in hits for right in each.with_memory]


@torch.no_grad()
def told_anew(life: Life, count: int) -> list[bool]:
    """Of the first `count` facts of a life, which are answered with another value when it was told with that one among
    held-out text, two windows ago, and all that was slept on says otherwise."""
    book, model = life.book, life.sleeper.model
    values, random = book.vocabulary.values["held_out"], np.random.default_rng(SEED)
    rows, new = [], []
    for number, fact in enumerate(book.facts[:count]):
        new.append(int(random.choice(values[values != fact.value])))
        text = book.filler.tokens((SEED, number), BEFORE_TOKENS + AFTER_TOKENS).tolist()
        line = book.told(fact._replace(value=new[-1]))
        rows.append([*text[:BEFORE_TOKENS], *line, *text[BEFORE_TOKENS:], *book.question(fact)])
    said = []
    for part in torch.tensor(rows).split(AT_ONCE):
        logits = model(input_ids=part.to(model.backbone.device), session=model.new_session(len(part))).logits
        assert logits is not None
        said += logits[:, -1].argmax(-1).tolist()
    return [answer == value for answer, value in zip(said, new, strict=True)]
