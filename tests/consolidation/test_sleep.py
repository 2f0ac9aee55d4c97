"""A night: what it changes, what it leaves, and that the facts of the day are known afterwards."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts
from cortex_core.consolidation import sleep
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.lessons import Lessons, lessons
from cortex_core.errors import ConfigError, DataError
from tests.consolidation import sleepers
from tests.consolidation.sleepers import QUICK, right


def digest(model: Cortex, *, slow: bool) -> str:
    """Of all parameters; with or without the slow weights."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if slow or not name.endswith("slow.values"):
            found.update(value.detach().float().numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def learned() -> tuple[Cortex, Lessons]:
    model = sleepers.fresh_model()
    model.grow_slow_weights(QUICK.slots, QUICK.active)
    session = model.new_session(1)
    model.read(torch.tensor([sleepers.stream(1)]), session)
    told = sleepers.book().facts[: sleepers.PER_DAY]
    questions = Prompts.of([sleepers.book().question(fact) for fact in told])
    return model, lessons(model, session, questions, QUICK.top_tokens, QUICK.batch_size)


def alone(tonight: Lessons, steps: int = QUICK.steps) -> sleep.Evening:
    """Without old lessons."""
    return sleep.Evening(tonight, [Lessons.none(QUICK.top_tokens)] * steps)


def test_a_night_gives_a_delta_and_leaves_the_model_as_it_was(learned: tuple[Cortex, Lessons]) -> None:
    model, tonight = learned
    before = digest(model, slow=True)
    night = sleep.consolidate(model, alone(tonight), QUICK)
    assert digest(model, slow=True) == before and not any(p.requires_grad for p in sleep.slow_values(model).values())
    assert night.metrics["sleep/loss_last_nats"] < 0.3 * night.metrics["sleep/loss_first_nats"]
    assert right(model, slice(sleepers.PER_DAY)) == 0
    sleep.add(model, night.delta)
    try:
        assert right(model, slice(sleepers.PER_DAY)) >= 0.75
    finally:
        sleep.add(model, {name: -change for name, change in night.delta.items()})


def test_the_same_night_gives_the_same_delta_whatever_fits_side_by_side(learned: tuple[Cortex, Lessons]) -> None:
    model, tonight = learned
    nights = [
        sleep.consolidate(model, alone(tonight), QUICK.model_copy(update={"batch_size": size})) for size in (64, 64, 3)
    ]
    for name, delta in nights[0].delta.items():
        assert torch.equal(delta, nights[1].delta[name])
        torch.testing.assert_close(delta, nights[2].delta[name], atol=1e-3, rtol=1e-2)


def test_a_penalty_holds_the_slow_weights(learned: tuple[Cortex, Lessons]) -> None:
    model, tonight = learned
    free = sleep.consolidate(model, alone(tonight), QUICK)
    values = sleep.slow_values(model)
    to_zero = sleep.Held(
        {n: torch.full_like(v, 20.0) for n, v in values.items()}, {n: 0 * v for n, v in values.items()}
    )
    held = sleep.consolidate(model, alone(tonight)._replace(held=to_zero), QUICK)
    assert held.metrics["sleep/delta_norm"] < 0.5 * free.metrics["sleep/delta_norm"]


def test_every_step_has_its_own_old_lessons(learned: tuple[Cortex, Lessons]) -> None:
    model, tonight = learned
    first, second = tonight.at(torch.tensor([0, 1])), tonight.at(torch.tensor([2]))
    deltas = [
        sleep.consolidate(model, sleep.Evening(second, old), QUICK).delta
        for old in ([first, second], [second, first], [first, second], [first])
    ]
    one, other, same, shorter = (torch.cat([d.flatten() for d in delta.values()]) for delta in deltas)
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, shorter)


def test_replay_is_drawn_anew_for_every_step() -> None:
    reader, tokens, dawn = (
        sleepers.sleeper(steps=3, replayed=2, every_tokens=10_000),
        sleepers.stream(2),
        sleepers.DAY + 1,
    )
    reader.read(tokens[:dawn])
    reader.sleep()
    reader.read(tokens[dawn:])
    evening, metrics = reader.evening()
    assert [len(old) for old in evening.replayed] == [2, 2, 2] and metrics["sleep/buffer_items"] == len(reader.buffer)
    assert len({str(old.prompts.input_ids.tolist()) for old in evening.replayed}) > 1


def test_an_evening_can_be_slept_elsewhere(learned: tuple[Cortex, Lessons]) -> None:
    model, tonight = learned
    evening = sleep.Evening(tonight, [tonight.at(torch.tensor([0, 2])), Lessons.none(QUICK.top_tokens)])
    found = sleep.Evening.from_tensors(evening.tensors(), torch.device("cpu"))
    mine, theirs = (sleep.consolidate(model, each, QUICK).delta for each in (evening, found))
    assert all(torch.equal(delta, theirs[name]) for name, delta in mine.items())
    damaged = evening.tensors()
    del damaged["step0000.top_ids"]
    with pytest.raises(DataError, match="lessons: must be"):
        sleep.Evening.from_tensors(damaged, torch.device("cpu"))
    with pytest.raises(DataError, match="none of tonight"):
        sleep.Evening.from_tensors({}, torch.device("cpu"))


def test_the_guard_measures_from_the_bare_model() -> None:
    model = sleepers.fresh_model()
    guard = DriftGuard(sleepers.windows(), 0.01)
    at_first = guard.drift(model)
    assert 0 <= at_first < 0.002
    model.grow_slow_weights(QUICK.slots, QUICK.active)
    assert guard.drift(model) == at_first, "new slow weights add exactly nothing"
    for value in sleep.slow_values(model).values():
        value.data.normal_(std=30.0, generator=torch.Generator().manual_seed(0))
    drift = guard.drift(model)
    assert drift > 0.01 and not guard.allows(drift) and guard.allows(0.01)
    assert not guard.allows(float("nan"))
    with pytest.raises(ConfigError, match="window"):
        DriftGuard(torch.zeros(0, 8, dtype=torch.long), 0.01)


def test_what_was_read_by_day_is_known_after_the_night() -> None:
    """Three days and nights: nothing is known by day one's morning, all of it in the end; only slow weights changed."""
    model = sleepers.fresh_model()
    reader = sleepers.sleeper(model, DriftGuard(sleepers.windows(), 0.01))
    before = digest(model, slow=False)
    assert right(model) == 0
    nights = reader.read(sleepers.stream())
    assert [night.kept for night in nights] == [True] * 3 and reader.num_nights == 3
    assert right(model) >= 0.9 and right(model, lead=(50, 60, 70)) >= 0.75
    assert digest(model, slow=False) == before
    assert all(state.up.count_nonzero() == 0 for state in reader.session.states.values()), "the fast weights are empty"
    assert len(reader.buffer) == sum(night.metrics["sleep/lessons"] for night in nights)


def test_nights_do_not_depend_on_how_the_stream_is_cut() -> None:
    whole, cut = sleepers.sleeper(), sleepers.sleeper()
    tokens = sleepers.stream(2)
    nights = whole.read(tokens)
    places = [0, 1, 100, 256, 257, 400, len(tokens)]
    others = [night for a, b in itertools.pairwise(places) for night in cut.read(tokens[a:b])]
    assert [n.metrics["sleep/lessons"] for n in nights] == [n.metrics["sleep/lessons"] for n in others]
    for mine, theirs in zip(*(sleep.slow_values(r.model).values() for r in (whole, cut)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)


def test_a_night_that_leads_too_far_is_undone_exactly() -> None:
    reader = sleepers.sleeper(guard=DriftGuard(sleepers.windows(), 0.01), learning_rate=3000.0, steps=2)
    before = digest(reader.model, slow=True)
    (night,) = reader.read(sleepers.stream(1))
    assert not night.kept and night.metrics["sleep/undone"] == 1 and reader.num_undone == 1
    assert digest(reader.model, slow=True) == before
    assert len(reader.buffer) == 0, "what was not learned is not kept as an old lesson"


def test_a_sleeper_goes_on_from_its_files(tmp_path: Path) -> None:
    undisturbed, tokens, cut = sleepers.sleeper(), sleepers.stream(), 2 * sleepers.DAY + 90
    undisturbed.read(tokens)
    first = sleepers.sleeper()
    first.read(tokens[:cut])
    first.save(tmp_path)
    second = sleepers.sleeper()
    second.load(tmp_path)
    assert second.num_nights == first.num_nights == 2 and second.num_tokens == cut
    second.read(tokens[cut:])
    for mine, theirs in zip(*(sleep.slow_values(r.model).values() for r in (undisturbed, second)), strict=True):
        assert torch.equal(mine, theirs)
    assert [i.tensors["prompt"].tolist() for i in second.buffer.items] == [
        i.tensors["prompt"].tolist() for i in undisturbed.buffer.items
    ]


def test_other_slow_weights_than_those_that_are_there() -> None:
    model = sleepers.sleeper().model
    with pytest.raises(ConfigError, match=r"512 slots already, .* Keep those \(sleep.slots, sleep.active\)"):
        sleepers.sleeper(model, slots=1024)
    assert sleepers.sleeper(model).model.fast_weights.slow_slots == 512
