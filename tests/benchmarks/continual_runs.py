"""`python -m tests.benchmarks.continual_runs FOLDER`: facts in tasks, learned one after the other in several ways.

Each way and seed leaves one JSON file in the folder; one that is there is not measured again, so what was interrupted
goes on where it was. `tests/benchmarks/rows/continual.py` makes figures of these files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cortex_core.backbone.load import load_tokenizer
from cortex_core.backbone.model import Cortex
from cortex_core.config import (
    BackboneConfig,
    DataConfig,
    FisherConfig,
    LifeConfig,
    ReplayConfig,
    SleepConfig,
    UnfreezeConfig,
)
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.errors import DataError
from cortex_core.eval.perplexity import text_loss
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training.continual import LEAD_TOKENS, accuracies, learn_in_sequence, tasks_of
from cortex_core.training.life import Life, new_sleeper
from tests.benchmarks import skill
from tests.benchmarks.continual_peers import Elastic, Joint, LowRank, Rehearser

NAME = "builtin:stdlib-1m"
SCHEMA = "cortex-continual/2"
METHODS = ("sleep", "joint", "naive", "ewc", "replay_only", "lora")
TEXT_SEED = 20_001


@dataclass(frozen=True)
class Scale:
    """How much there is to learn, and how it is asked. Results of different scales do not mix."""

    num_tasks: int = 30
    num_facts: int = 2000
    facts_per_day: int = 8
    day_tokens: int = 512
    lead_tokens: int = LEAD_TOKENS
    slots: int = 32768
    capacity_items: int = 8192
    text_rows: int = 64
    text_tokens: int = 1024
    examples: int = 200
    """Of what the model could do before: recall from its memory, and being told something new."""


@dataclass(frozen=True)
class Rates:
    """What each way was tuned to, on seed 1000 with as many slots to a fact as at full scale: 48 facts in 3 tasks, the
    best ACC, of equals the least harm to text. EWC: up to 300 nothing changes there, but over 10 tasks its penalty adds
    up until little is learned; 30 is as good as none in 10 tasks of 80 facts. LoRA: 3e-3, the best there, diverges in
    longer lives. In 3 tasks of 66 facts 1e-3, 3e-4 and 1e-4 know 4, 1 and 1 of 198 behind other text, and text is worse by
    1.25, 0.84 and 0.25 nats."""

    elastic_weight: float = 30.0
    rehearsal: float = 0.3
    low_rank: float = 1e-4
    low_rank_steps: int = 16
    joint: float = 0.1
    joint_steps_per_night: int = 16
    joint_batch: int = 128

    def of(self, method: str) -> dict[str, float]:
        """Those that matter to one of METHODS."""
        names = {"ewc": "elastic", "replay_only": "rehearsal", "lora": "low_rank", "joint": "joint"}
        return {name: rate for name, rate in asdict(self).items() if name.startswith(names.get(method, "none"))}


@dataclass(frozen=True)
class Subject:
    """The model that ships, and the text that it reads. Every run takes a model of its own."""

    corpus: Corpus
    tokenizer: Any = field(default_factory=lambda: load_tokenizer(BackboneConfig(name=NAME)))

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def model(self) -> Cortex:
        """With the memory that ships, and nothing slept yet."""
        return Cortex.from_pretrained(NAME, sidecars=f"{NAME}/sidecars", dtype="float32")


@cache
def shipped() -> Subject:
    """With all of the standard library's text."""
    tokenizer = load_tokenizer(BackboneConfig(name=NAME))
    return Subject(load_corpus(DataConfig(), tokenizer), tokenizer)


class Way(NamedTuple):
    """One way to learn: a reader, and what it does at the end of a task."""

    sleeper: Sleeper
    task_over: Callable[[], None]


def way(method: str, subject: Subject, scale: Scale, rates: Rates) -> Way:
    """One of METHODS, with a model of its own. The step size of slow weights is sleep's default if nothing else is
    tuned; all buffers hold as much and draw evenly."""
    sleep = SleepConfig(slots=scale.slots, every_tokens=scale.day_tokens)
    alone = sleep.model_copy(update={"replayed": 0})
    replay = ReplayConfig(capacity_items=scale.capacity_items, draw_decay=1.0, surprise_power=0.0)
    model, encode = subject.model(), subject.encode
    match method:
        case "sleep" | "naive":
            settings = sleep if method == "sleep" else alone
            sleeper = new_sleeper(model, encode, subject.corpus, settings, replay)
        case "ewc":
            fisher = FisherConfig(weight=rates.elastic_weight, decay=1.0)
            sleeper = Elastic(model, alone, replay, encode=encode, fisher=fisher)
            return Way(sleeper, sleeper.task_over)
        case "replay_only":
            changed = sleep.model_copy(update={"learning_rate": rates.rehearsal})
            sleeper = Rehearser(model, changed, replay, encode=encode)
        case "lora":
            changed = alone.model_copy(update={"steps": rates.low_rank_steps})
            unfreezing = UnfreezeConfig(learning_rate=rates.low_rank)
            sleeper = LowRank(model, changed, replay, encode=encode, unfreezing=unfreezing)
        case _:
            all_of_them = replay.model_copy(update={"capacity_items": 2**31, "decay": 1.0})
            changed = sleep.model_copy(update={"learning_rate": rates.joint})
            sleeper = Joint(model, changed, all_of_them, encode=encode)
    return Way(sleeper, lambda: None)


def run(
    method: str,
    seed: int,
    scale: Scale,
    subject: Subject,
    rates: Rates | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Learn all tasks in one way. Accuracies, before [T] and after [rows, T], have a row per task, of joint training
    one alone; `text_nats`: of each row of held-out text, the loss over that of the bare model, per token; `recalled`,
    before and after, and `told_anew`: as of `skill`, "1" where an answer was right."""
    since, rates = time.perf_counter(), rates or Rates()
    chosen = way(method, subject, scale, rates)
    life = Life(
        chosen.sleeper,
        LifeConfig(num_facts=scale.num_facts, facts_per_day=scale.facts_per_day, seed=seed),
        TaskVocabulary.from_tokenizer(subject.tokenizer),
        TextFiller(subject.corpus, "held_out"),
    )
    model, vocabulary = chosen.sleeper.model, life.book.vocabulary
    rows, recalled = list[list[float]](), [skill.recalled(model, vocabulary, subject.corpus, scale.examples)]
    if isinstance(chosen.sleeper, Joint):
        tasks = tasks_of(life, scale.num_tasks)
        rows.append(accuracies(life, tasks, scale.lead_tokens))
        nights = sum(len(day.nights) for day in life.live())
        say(f"{method}, seed {seed}: {len(chosen.sleeper.buffer)} lessons, {time.perf_counter() - since:.0f} s")
        chosen.sleeper.learn_all(rates.joint_steps_per_night * nights, rates.joint_batch)
        rows.append(accuracies(life, tasks, scale.lead_tokens))
    else:
        for row in learn_in_sequence(life, scale.num_tasks, scale.lead_tokens, chosen.task_over):
            rows.append(row)
            done = len(rows) - 1
            known = float(np.mean(row[:done])) if done else 0.0
            seconds = time.perf_counter() - since
            say(f"{method}, seed {seed}: task {done} of {scale.num_tasks}, {known:.3f} of it known, {seconds:.0f} s")
    text = [subject.corpus.excerpt((TEXT_SEED, row), scale.text_tokens, "held_out") for row in range(scale.text_rows)]
    losses = text_loss(model, torch.as_tensor(np.stack(text)))
    recalled.append(skill.recalled(model, vocabulary, subject.corpus, scale.examples))
    return {
        "schema": SCHEMA,
        "method": method,
        "seed": seed,
        "scale": asdict(scale),
        "rates": rates.of(method),
        "before": rows[0],
        "after": rows[1:],
        "text_nats": (losses.with_memory - losses.bare).tolist(),
        "recalled": [_bits(right) for right in recalled],
        "told_anew": _bits(skill.told_anew(life, scale.examples)),
        "nights": chosen.sleeper.num_nights,
        "nights_undone": chosen.sleeper.num_undone,
        "seconds": time.perf_counter() - since,
    }


def _bits(right: Sequence[bool]) -> str:
    return "".join("01"[each] for each in right)


def results(
    folder: Path,
    scale: Scale,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    subject: Callable[[], Subject] = shipped,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """What is in the folder, and what was not, measured now. Seed by seed, so that all ways have as many.

    Raises DataError for a file that is damaged or of another scale.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in seeds:
        for method in methods:
            path = folder / f"{method}-{seed}.json"
            if not path.is_file():
                document = run(method, seed, scale, subject(), say=say)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(document) + "\n")
                part.replace(path)
            found.append(_read(path, scale))
    return found


def _read(path: Path, scale: Scale) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
        settings = (document["schema"], document["scale"], document["rates"])
        expected = (SCHEMA, asdict(scale), Rates().of(document["method"]))
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: remove it, and it is measured again") from None
    if settings != expected:
        raise DataError(f"{path} was measured at another scale or with other rates: name another folder")
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not in the folder yet."""
    parser = argparse.ArgumentParser(prog="continual_runs", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where results are, and go")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of [%(default)s]")
    parser.add_argument("--seeds", default="0,1,2", help="[%(default)s]")
    parser.add_argument("--tasks", type=int, default=Scale.num_tasks, help="[%(default)s]")
    parser.add_argument("--facts", type=int, default=Scale.num_facts, help="of all tasks [%(default)s]")
    parser.add_argument("--slots", type=int, default=Scale.slots, help="of slow weights [%(default)s]")
    given = parser.parse_args(argv)
    methods = given.methods.split(",")
    if unknown := sorted(set(methods) - set(METHODS)):
        parser.error(f"--methods: {unknown[0]} is none of {', '.join(METHODS)}")
    scale = Scale(num_tasks=given.tasks, num_facts=given.facts, slots=given.slots)
    results(given.folder, scale, methods, [int(seed) for seed in given.seeds.split(",")], say=_say)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
