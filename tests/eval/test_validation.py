"""Validation: the same numbers for any number of workers, those of `recall`, and on words of its own."""

from __future__ import annotations

import threading
from functools import cache

import numpy as np
import pytest
import torch

from cortex_core.backbone.load import load_tokenizer
from cortex_core.config import EvaluationConfig, ValidationConfig
from cortex_core.errors import ConfigError
from cortex_core.eval.validation import LOSS, RECALL, Validation
from cortex_core.tasks.mixture import Mixture, build_task, check_tasks
from cortex_core.tasks.vocabulary import TaskVocabulary
from tests import tiny
from tests.eval.test_suite import Meeting

CONFIG = ValidationConfig(every_steps=1, gaps_tokens=(0, 40), num_examples=7)
ASKED = EvaluationConfig(fillers=("text", "random"), batch_size=3)
PAIRS = 3


@cache
def vocabulary() -> TaskVocabulary:
    return TaskVocabulary.from_tokenizer(load_tokenizer(tiny.backbone_config()), validation=True)


def validation(**of_worker: object) -> Validation:
    return Validation(CONFIG, ASKED, vocabulary(), tiny.corpus(), PAIRS, seed=0, **of_worker)  # type: ignore[arg-type]


@torch.no_grad()
def test_the_numbers_are_those_of_each_question_asked_alone() -> None:
    model = tiny.model(open_gates=True)
    losses, rights = [], []
    for filler in ASKED.fillers:
        task = build_task("key_value", filler, vocabulary(), tiny.corpus(), split="validation", num_pairs=PAIRS)
        for gap in CONFIG.gaps_tokens:
            for index in range(CONFIG.num_examples):
                tokens, answer = task.example(index, gap)
                asked = torch.from_numpy(np.flatnonzero(answer))
                logits = model(input_ids=torch.from_numpy(tokens)[None]).logits
                assert logits is not None
                expected = torch.from_numpy(tokens)[asked]
                losses.append(-logits[0, asked - 1].log_softmax(-1).gather(-1, expected[:, None]).mean())
                rights.append(bool((logits[0, asked - 1].argmax(-1) == expected).all()))
    found = validation().run(model)
    assert found[RECALL] == pytest.approx(np.mean(rights)) and 0 < found[RECALL] < 1
    assert found[LOSS] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_workers_finds_the_same(world_size: int) -> None:
    meeting, found = Meeting(world_size), [dict[str, float]() for _ in range(world_size)]
    models = [tiny.model(open_gates=True) for _ in found]

    def work(rank: int) -> None:
        of_worker = validation(rank=rank, world_size=world_size, gather=meeting.gather(rank))
        found[rank] = of_worker.run(models[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = validation().run(tiny.model(open_gates=True))
    for one in found:
        assert one == pytest.approx(alone, rel=1e-6)


def test_no_other_split_has_its_words() -> None:
    apart, usual = vocabulary(), tiny.vocabulary()
    for with_validation, without in ((apart.keys, usual.keys), (apart.values, usual.values)):
        assert with_validation["held_out"].tolist() == without["held_out"].tolist()
        both = [*with_validation["train"], *with_validation["validation"]]
        assert both == without["train"].tolist() and len(with_validation["validation"]) >= PAIRS
    set_aside = {*apart.keys["validation"].tolist(), *apart.values["validation"].tolist()}
    assert not set_aside & set(apart.shared_ids.tolist())
    mixture = Mixture.from_config(
        tiny.TASKS.model_copy(update={"any_token_frac": 0.5, "fillers": ("text",), "num_pairs": 3}),
        apart,
        tiny.corpus(),
    )
    facts = {token for index in range(60) for part in mixture.tasks[0].sheet(index, 1).facts for token in part.tokens}
    assert not set_aside & facts


def test_too_few_words_to_set_aside_are_refused() -> None:
    few = len(vocabulary().keys["validation"])
    config = tiny.run_config(tiny.folder(), tasks__num_pairs=few + 1, validation__every_steps=2)
    with pytest.raises(ConfigError, match=rf"tasks\.num_pairs = {few + 1}: must be at most {few}, .* to validate on"):
        check_tasks(config, vocabulary(), tiny.corpus())
