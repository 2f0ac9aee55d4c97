"""Lives of facts with some of the six scales on: what is known, what text costs, what can still be told in a prompt.

Each way, seed and stress leaves one JSON file in a folder; what is there is not measured again. docs/predictions.md says
what each scale is when it is on and when it is off. `scales.py` and `predictions.py` make figures of these files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cortex_core.backbone.low_rank import LowRankDeltas, linear_modules
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.config import DreamConfig, LifeConfig, ReplayConfig, ScenarioConfig, SleepConfig, UnfreezeConfig
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.consolidation.unfreezer import Unfreezer
from cortex_core.errors import DataError
from cortex_core.eval.perplexity import text_loss
from cortex_core.tasks.fact_book import Fact, FactBook
from cortex_core.tasks.filler import RandomFiller, TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training.dreams import Dreams
from cortex_core.training.life import Life, mixed_text, new_sleeper
from tests.benchmarks.continual_runs import Subject, shipped

SCHEMA = "cortex-scales/1"
SCALES = ("parameter", "gradient", "data", "temporal", "architectural", "generative")
Place = Literal["backbone", "slow_weights"]
Stress = Literal["plain", "rate", "crowd", "noise", "tenth"]
FACTORS = {"rate": 10.0, "tenth": 0.1}
TUNING_SEED = 1000
GRIDS: dict[str, tuple[float, ...]] = {
    "backbone-adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "backbone-apollo_mini": (3e-4, 1e-3, 3e-3, 1e-2),
    "slow_weights-adamw": (0.01, 0.03, 0.1, 0.3),
    "slow_weights-apollo_mini": (0.001, 0.003, 0.01, 0.03),
}
"""Learning rates that are tried, by place and optimizer."""
LEARNED = (
    "\n    def read(self):\n        return recall", "import os\n\nprint( recall", "\n# the value that we recall",
    "\n    if name is None: raise recall",
)  # fmt: skip
"""Forms of questions that are learned: all where data are diverse, else the first."""
NOVEL = ("\n\nwhile True:\n    yield recall", "\n    assert left == recall", " so we recall")
LEAD = 40
_TEXT, _LEAD, _PROBE, _PROBE_BOOK = 20_003, 53, 59, 7919


@dataclass(frozen=True)
class Size:
    """How much there is to learn, and how it is measured. Results of different sizes do not mix."""

    days: int = 4
    facts_per_day: int = 8
    day_tokens: int = 256
    steps: int = 12
    few_steps: int = 3
    replayed: int = 16
    dreams: int = 24
    rank: int = 8
    slots: int = 2048
    text_rows: int = 8
    text_tokens: int = 512
    probes: int = 64


@dataclass(frozen=True)
class Way:
    """Which scales are on, where, and under which stress."""

    on: tuple[bool, ...] = (True,) * len(SCALES)
    """By `SCALES`."""
    place: Place = "backbone"
    stress: Stress = "plain"

    @property
    def name(self) -> str:
        """Of files."""
        return f"{self.place}-{''.join(str(int(scale)) for scale in self.on)}-{self.stress}"

    @property
    def optimizer(self) -> Literal["adamw", "apollo_mini"]:
        return "apollo_mini" if self.on[0] else "adamw"

    def without(self, scale: str) -> Way:
        """The same with this scale off."""
        return replace(self, on=tuple(on and name != scale for on, name in zip(self.on, SCALES, strict=True)))

    def alone(self, scale: str | None) -> Way:
        """The same with no other scale on."""
        return replace(self, on=tuple(name == scale for name in SCALES))


def reader(way: Way, subject: Subject, size: Size, rate: float) -> Sleeper:
    """One of these ways, with a model of its own, and nothing that guards it."""
    _, frozen, diverse, many, teacher, dreams = way.on
    rate = rate * FACTORS.get(way.stress, 1.0) * (1 if many else size.steps / size.few_steps)
    steps = size.steps if many else size.few_steps
    sleep = SleepConfig(
        optimizer=way.optimizer,
        gradient="answer_context_frozen" if frozen else "all_tokens",
        questions=LEARNED if diverse else LEARNED[:1],
        mixed_text_weight=1.0 if diverse else 0.0,
        mixed_text_windows=1,
        warmup_steps=4 if many else 0,
        ema_decay=0.8 if many else 0.0,
        teacher=teacher,
        dream_frac=0.5 if dreams else 0.0,
        dreams_per_night=size.dreams,
        every_tokens=size.day_tokens,
        steps=steps,
        learning_rate=rate,
        replayed=size.replayed,
        slots=size.slots,
        guard_windows=0,
    )
    brief = DreamConfig(scenario=ScenarioConfig(max_filler_tokens=24, max_lines=2))
    model, replay = subject.model(), ReplayConfig()
    if way.place == "slow_weights":
        return new_sleeper(model, subject.encode, subject.corpus, sleep, replay, brief)
    unfreezing = UnfreezeConfig(
        rank=size.rank,
        steps=steps,
        learning_rate=rate,
        replayed=size.replayed,
        text_weight=0.0,
        lead_tokens=0,
    )
    asleep = Dreams(model, brief, sleep, subject.encode(sleep.questions[0]))
    text = mixed_text(model, subject.corpus)
    sleeper = Unfreezer(model, sleep, replay, unfreezing, text, {}, encode=subject.encode, dreams=asleep)
    sleeper.deltas = LowRankDeltas(model.backbone, linear_modules(model.backbone), size.rank).attach(model)
    return sleeper


class Questions:
    """What a model is asked, with empty fast weights."""

    def __init__(self, subject: Subject, size: Size) -> None:
        self.subject, self.size = subject, size
        self.vocabulary = TaskVocabulary.from_tokenizer(subject.tokenizer)
        self.filler = TextFiller(subject.corpus, "held_out")
        text = [subject.corpus.excerpt((_TEXT, row), size.text_tokens, "held_out") for row in range(size.text_rows)]
        self.text = torch.as_tensor(np.stack(text))
        self.probes, self.told = self._probes()
        self.before = self.in_context(subject.model())

    def asked(self, model: Cortex, facts: Sequence[Fact], words: Sequence[Sequence[int]]) -> list[bool]:
        """Which facts are known, each behind words of its own."""
        rows = [[*before, fact.key] for before, fact in zip(words, facts, strict=True)]
        return _right(model, Prompts.of(rows), torch.tensor([fact.value for fact in facts]))

    def measured(self, model: Cortex, facts: Sequence[Fact], seed: int) -> dict[str, Any]:
        """All of it."""
        recall = self.subject.encode(" recall")
        leads = [self.filler.tokens((seed, n, _LEAD), LEAD).tolist() for n in range(len(facts))]
        forms = {"at_once": " recall"} | {f"novel{n}": form for n, form in enumerate(NOVEL)}
        forms |= {f"learned{n}": form for n, form in enumerate(LEARNED)}
        known = {
            name: self.asked(model, facts, [self.subject.encode(form)] * len(facts)) for name, form in forms.items()
        }
        known["behind"] = self.asked(model, facts, [[*lead, *recall] for lead in leads])
        losses = text_loss(model, self.text)
        return {
            "known": known,
            "text_nats": (losses.with_memory - losses.bare).tolist(),
            "in_context": self.in_context(model),
        }

    def in_context(self, model: Cortex) -> list[bool]:
        """Which of the facts that a prompt tells are known at its end."""
        return _right(model, self.probes, self.told)

    def _probes(self) -> tuple[Prompts, Tensor]:
        book = FactBook(self.vocabulary, self.filler, 4 * self.size.probes, _PROBE_BOOK)
        rows, values = [], []
        for number in range(self.size.probes):
            told = book.facts[4 * number : 4 * number + 4]
            asked = told[number % 4]
            lines = [token for fact in told for token in book.told(fact)]
            rows.append([*self.filler.tokens((number, _PROBE), LEAD).tolist(), *lines, *book.question(asked)])
            values.append(asked.value)
        return Prompts.of(rows), torch.tensor(values)


@torch.no_grad()
def _right(model: Cortex, prompts: Prompts, values: Tensor) -> list[bool]:
    found = torch.cat([answers(model, part).argmax(-1).cpu() for part in prompts.split(64)])
    return (found == values).tolist()


def run(way: Way, seed: int, size: Size, rate: float, questions: Questions) -> dict[str, Any]:
    """One life."""
    since = time.perf_counter()
    sleeper = reader(way, questions.subject, size, rate)
    crowd = size.facts_per_day * (2 if way.stress == "crowd" else 1)
    config = LifeConfig(num_facts=crowd * size.days, facts_per_day=crowd, seed=seed)
    filler = RandomFiller(questions.vocabulary) if way.stress == "noise" else questions.filler
    life = Life(sleeper, config, questions.vocabulary, filler)
    nights = [night.metrics for day in life.live() for night in day.nights]
    return {
        "schema": SCHEMA,
        "way": asdict(way) | {"on": list(way.on)},
        "seed": seed,
        "size": asdict(size),
        "rate": rate,
        **questions.measured(sleeper.model, life.book.facts, seed),
        "in_context_before": questions.before,
        "lessons": [night["sleep/lessons"] for night in nights],
        "seconds": time.perf_counter() - since,
    }


# --- folders of results ----------------------------------------------------------------------------------------------


class Results:
    """What is in a folder, measured where it is not."""

    def __init__(
        self,
        folder: Path,
        size: Size | None = None,
        subject: Callable[[], Subject] = shipped,
        say: Callable[[str], None] = print,
        grids: dict[str, tuple[float, ...]] | None = None,
    ) -> None:
        self.folder, self.size, self._subject, self._say = folder, size or Size(), subject, say
        self._grids = grids or GRIDS
        self._questions: Questions | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, way: Way, seed: int) -> dict[str, Any]:
        """One life, at the tuned rate. Raises DataError for a file that is damaged or of another size."""
        return self._found(way, seed, self.rate(way.place, way.optimizer), "")

    def rate(self, place: Place, optimizer: Literal["adamw", "apollo_mini"]) -> float:
        """Of those of `GRIDS`, the lowest at which as much is known as at the best, but for 0.02, on another seed."""
        way = Way(place=place, on=(optimizer == "apollo_mini", *(True,) * (len(SCALES) - 1)))
        grid = self._grids[f"{place}-{optimizer}"]
        shares = {rate: known(self._found(way, TUNING_SEED, rate, f"-rate{rate:g}")) for rate in grid}
        return min(rate for rate, share in shares.items() if share >= max(shares.values()) - 0.02)

    def _found(self, way: Way, seed: int, rate: float, ending: str) -> dict[str, Any]:
        path = self.folder / f"{way.name}-{seed}{ending}.json"
        if not path.is_file():
            self._questions = self._questions or Questions(self._subject(), self.size)
            document = run(way, seed, self.size, rate, self._questions)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document) + "\n")
            part.replace(path)
            self._say(f"{path.stem}: {summary(document)}")
        try:
            document = json.loads(path.read_text())
            expected = (document["schema"], document["size"], document["rate"]) == (SCHEMA, asdict(self.size), rate)
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged: remove it, and it is measured again") from None
        if not expected:
            raise DataError(f"{path} was measured at another size or rate: name another folder")
        return document


def share(right: Sequence[bool]) -> float:
    """Of answers that are right."""
    return sum(right) / len(right)


def known(document: dict[str, Any], *forms: str) -> float:
    """Share of the facts that is known, mean over forms: those given, or all that were never learned."""
    never = ("at_once", "behind", *(f"novel{n}" for n in range(len(NOVEL))))
    return float(np.mean([share(document["known"][form]) for form in forms or never]))


def text_nats(document: dict[str, Any]) -> float:
    """Loss on held-out text over that of the bare model."""
    return float(np.mean(document["text_nats"]))


def context_change(document: dict[str, Any]) -> float:
    """Of recall in context, after the last night over before the first."""
    return share(document["in_context"]) - share(document["in_context_before"])


def summary(document: dict[str, Any]) -> str:
    """For people."""
    return (
        f"known {known(document, 'at_once'):.2f} at once, {known(document, 'behind'):.2f} behind text, "
        f"text {text_nats(document):+.4f} nats, in context {share(document['in_context_before']):.2f} to "
        f"{share(document['in_context']):.2f}, {document['seconds']:.0f} s"
    )
