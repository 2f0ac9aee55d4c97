"""Dreams in place of old lessons: what is remembered of a day, what of a night's dreams may be learned, and that it keeps
what was told first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cortex_core.config import DreamConfig, LifeConfig, ReplayConfig, ScenarioConfig
from cortex_core.consolidation.lessons import Taught
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.dreaming import provenance
from cortex_core.errors import ConfigError
from cortex_core.training.dreams import Dreams, dreamed_in
from cortex_core.training.life import Life, new_sleeper
from tests.consolidation import sleepers

LIFE = LifeConfig(num_facts=12, facts_per_day=4, lead_tokens=(0, 30))
SHORT = DreamConfig(scenario=ScenarioConfig(max_filler_tokens=10, max_lines=2))


def lived(**sleep: object) -> Life:
    settings = sleepers.QUICK.model_copy(update={"guard_windows": 2, "dreams_per_night": 24, **sleep})
    reader = new_sleeper(sleepers.fresh_model(), sleepers.encode, sleepers.corpus(), settings, ReplayConfig(), SHORT)
    life = Life(reader, LIFE, sleepers.book().vocabulary, sleepers.book().filler)
    for day in life.live():
        assert len(day.nights) == 1
    return life


@pytest.fixture(scope="module")
def dreamer() -> Life:
    """A life that replays nothing but dreams."""
    return lived(dream_frac=1.0)


def test_a_life_on_dreams_keeps_no_lesson_and_knows_all_the_same(dreamer: Life) -> None:
    assert len(dreamer.sleeper.buffer) == 0
    assert all(sum(right) >= 10 for right in dreamer.known())


def test_dreams_are_of_what_was_written_and_those_that_pass_are_right(dreamer: Life) -> None:
    dreams = dreamer.sleeper.dreams
    assert isinstance(dreams, Dreams) and len(dreams.table) == 24
    facts = {tuple(dreamer.book.question(fact)): (fact.value,) for fact in dreamer.book.facts}
    assert len(dreams.graph) >= 12 and len(facts.keys() & dreams.graph.record.keys()) == 12
    kept = list(dreams.kept())
    assert len(kept) >= 12 and all(dream.answer.tokens == dreams.graph.record[dream.question] for dream in kept)
    told_last = {tuple(dreamer.book.question(fact)) for fact in dreamer.book.facts[8:]}
    assert not told_last & {dream.question for dream in kept}, "the last night dreams of the days before it"


def test_every_dream_of_a_life_is_on_record(dreamer: Life, tmp_path: Path) -> None:
    """Where each came from and what became of it, of all nights; a life that goes on from its files keeps it."""
    dreams = dreamer.sleeper.dreams
    assert isinstance(dreams, Dreams)
    rows = provenance.unpacked(dreams.packed_rows)
    assert [row["ticket"] for row in rows] == [*range(48)], "the first night has nothing to dream of"
    assert [row["night"] for row in rows] == [2] * 24 + [3] * 24
    assert [row["passed"] for row in rows[24:]] == [verdict.passed for _, verdict in dreams.table]
    assert all(row["walk"] and (row["passed"] or row["reasons"]) for row in rows)
    dreams.save(tmp_path)
    again = Dreams(dreams.model, SHORT, sleepers.QUICK, [0])
    again.load(tmp_path)
    assert provenance.unpacked(again.packed_rows) == rows == dreamed_in(tmp_path)


def test_draws_are_lessons_without_putting_back(dreamer: Life) -> None:
    dreams = dreamer.sleeper.dreams
    assert isinstance(dreams, Dreams)
    drawn = dreams.draw(1000)
    prompts = [tuple(ids[:n].tolist()) for ids, n in zip(drawn.prompts.input_ids, drawn.prompts.lengths, strict=True)]
    assert sorted(prompts) == sorted(dream.prompt for dream in dreams.kept())
    assert len(dreams.draw(3)) == 3 and drawn.taught.top_ids.shape == (len(drawn), sleepers.QUICK.top_tokens)


def test_half_of_the_replay_may_be_dreamed() -> None:
    life = lived(dream_frac=0.5, steps=2)
    assert len(life.sleeper.buffer) > 0 and life.sleeper.dreams is not None
    drawn = life.sleeper._replayed(10)
    assert int((drawn.gain_nats == 0).sum()) == 5, "real lessons have a gain, dreams have none"


def test_dreams_have_to_be_given() -> None:
    settings = sleepers.QUICK.model_copy(update={"dream_frac": 1.0})
    with pytest.raises(ConfigError, match=r"dream_frac = 1\.0: needs `dreams`"):
        Sleeper(sleepers.fresh_model(), settings, encode=sleepers.encode)


def test_a_right_answer_as_a_lesson() -> None:
    """Its KL is that of the two events, the answer and all else, whatever fills the table."""
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    answers = torch.tensor([8, 0, 4])
    right = logits.log_softmax(-1).gather(1, answers[:, None])[:, 0].exp()
    expected = 0.9 * (torch.tensor(0.9).log() - right.log()) + 0.1 * (torch.tensor(0.1).log() - (1 - right).log())
    torch.testing.assert_close(Taught.answered(answers, 1, 9, sure=0.9).kl(logits), expected)
    filled = Taught.answered(answers, 4, 9, sure=0.9)
    assert filled.top_ids[:, 0].equal(answers) and all(len(set(row)) == 4 for row in filled.top_ids.tolist())
    assert (filled.kl(logits) >= expected - 1e-5).all(), "other tokens are told apart as well"
