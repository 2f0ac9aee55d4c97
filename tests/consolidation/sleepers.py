"""The model that ships, a day of facts, and readers that sleep through it quickly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.load import load_tokenizer
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.config import BackboneConfig, DataConfig, ReplayConfig, SleepConfig
from cortex_core.consolidation import sleeper as sleeper_module
from cortex_core.consolidation import spread
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.lessons import Lessons, Taught
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.tasks.fact_book import FactBook
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary

NAME = "builtin:stdlib-1m"
FACTS, PER_DAY, DAY = 12, 4, 256
QUICK = SleepConfig(every_tokens=DAY, steps=10, slots=512, questions=(" recall", "\n recall"))


@cache
def tokenizer() -> Any:
    """The model's."""
    return load_tokenizer(BackboneConfig(name=NAME))


def encode(text: str) -> list[int]:
    """Token ids without special ones."""
    return tokenizer()(text, add_special_tokens=False).input_ids


@cache
def corpus() -> Corpus:
    """A little text."""
    return load_corpus(DataConfig(max_bytes=400_000), tokenizer())


@cache
def book() -> FactBook:
    """Twelve facts in three days."""
    return FactBook(TaskVocabulary.from_tokenizer(tokenizer()), TextFiller(corpus(), "held_out"), FACTS)


def fresh_model() -> Cortex:
    """With the memory that ships, and nothing slept yet."""
    return Cortex.from_pretrained(NAME, sidecars=f"{NAME}/sidecars", dtype="float32")


def stream(days: int = FACTS // PER_DAY) -> list[int]:
    """What is read in these days and the first token of the next, with which the last one ends."""
    parts = [book().day(number, range(number * PER_DAY, (number + 1) * PER_DAY), DAY) for number in range(days)]
    return [token for day in parts for token in day] + [0]


def sleeper(model: Cortex | None = None, guard: DriftGuard | None = None, **changes: Any) -> Sleeper:
    """A reader of a model of its own, or of this one."""
    settings = QUICK.model_copy(update=changes)
    return Sleeper(model or fresh_model(), settings, ReplayConfig(), encode=encode, guard=guard)


def windows(count: int = 4) -> Tensor:
    """Held-out text, [count, 128]."""
    return torch.tensor([book().filler.tokens((99, number), 128).tolist() for number in range(count)])


@torch.no_grad()
def right(model: Cortex, facts: slice = slice(None), lead: tuple[int, ...] = ()) -> float:
    """Share of the facts that the model with empty fast weights knows."""
    asked = book().facts[facts]
    found = answers(model, Prompts.of([[*lead, *book().question(fact)] for fact in asked])).argmax(-1)
    return (found == torch.tensor([fact.value for fact in asked])).float().mean().item()


def a_lesson(model: Cortex) -> Lessons:
    """One question, with the answer that the model gives anyway."""
    prompts = Prompts.of([book().question(book().facts[0])])
    return Lessons(prompts, Taught.from_logits(answers(model, prompts).detach(), QUICK.top_tokens), torch.ones(1))


_fits: dict[tuple[object, ...], dict[str, Tensor]] = {}


def _spread_once(model: Cortex, questions: Sequence[Sequence[int]]) -> None:
    """As the real one, which takes seconds and gives the same for the same: it is asked once."""
    backbone, sidecars = (fingerprint(part) for part in (model.backbone, model.sidecars))
    key = (backbone, sidecars, model.segment_tokens, *map(tuple, questions))
    if key not in _fits:
        spread.spread_addresses(model, questions)
        _fits[key] = {name: value.clone() for name, value in spread.fitted(model).items()}
    for name, value in spread.fitted(model).items():
        value.copy_(_fits[key][name])


sleeper_module.spread_addresses = _spread_once
