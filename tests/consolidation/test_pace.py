"""The pace of a night, the text among its lessons, and a night without a teacher; what is off changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.config import NightConfig, ReplayConfig, SleepConfig
from cortex_core.consolidation import sleep
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.learning import Pace, optimizer_of, text_loss
from cortex_core.consolidation.lessons import Lessons
from cortex_core.consolidation.sleep import Evening, distillation_loss, trained
from cortex_core.consolidation.sleeper import READ_TOKENS
from cortex_core.consolidation.unfreeze import unfreeze
from cortex_core.errors import ConfigError
from cortex_core.optim.apollo import Apollo
from cortex_core.optim.groups import MINI_SCALE
from cortex_core.optim.row_momentum import RowMomentum
from cortex_core.training.life import mixed_text, new_sleeper
from tests.consolidation import sleepers
from tests.consolidation.unfreeze_scenes import QUICK, evening, facts, scene, text, with_slow

FREE = QUICK.model_copy(update={"steps": 6})


def changed(**values: object) -> NightConfig:
    return NightConfig.model_validate(values)


# --- optimizer, warm-up, average -------------------------------------------------------------------------------------


def test_the_optimizer_is_the_one_that_is_named() -> None:
    values = {"table": torch.randn(6, 8)}
    assert isinstance(optimizer_of(values, changed(), 0.1, RowMomentum), RowMomentum)
    assert isinstance(optimizer_of(values, changed(), 0.1, torch.optim.Adam), torch.optim.Adam)
    assert isinstance(optimizer_of(values, changed(optimizer="row_momentum"), 0.1, torch.optim.Adam), RowMomentum)
    assert isinstance(optimizer_of(values, changed(optimizer="adamw"), 0.1, RowMomentum), torch.optim.AdamW)
    kinds = {
        name: optimizer_of(values, changed(optimizer=name), 0.1, RowMomentum) for name in ("apollo", "apollo_mini")
    }
    assert [kinds[name].param_groups[0]["scale_type"] for name in kinds] == ["channel", "tensor"]


def test_apollo_mini_in_a_night_is_the_optimizer_run_by_hand() -> None:
    night = changed(optimizer="apollo_mini")
    model, deltas = scene()
    unfreeze(model, deltas, evening(facts()[0], FREE), {}, FREE, night=night)
    other, plain = scene()
    with trained(plain.values()):
        named = [*plain.values().items()]
        optimizer = Apollo(
            [{"params": named}], FREE.learning_rate, 1, "tensor", MINI_SCALE, betas=(0.9, 0.98), weight_decay=0.0
        )
        for _ in range(FREE.steps):
            optimizer.zero_grad()
            distillation_loss(other, facts()[0], 64).backward(inputs=list(plain.values().values()))
            optimizer.step()
    for name, value in deltas.values().items():
        assert torch.equal(value, plain.values()[name]), name


def test_adamw_is_adam_where_nothing_decays() -> None:
    (model, one), (other, two) = scene(), scene()
    unfreeze(model, one, evening(facts()[0], FREE), {}, FREE)
    unfreeze(other, two, evening(facts()[0], FREE), {}, FREE, night=changed(optimizer="adamw"))
    for name, value in one.values().items():
        torch.testing.assert_close(value, two.values()[name])


def test_warm_up_rises_to_the_rate() -> None:
    model, deltas = scene()
    out = unfreeze(model, deltas, evening(facts()[0], FREE), {}, FREE, night=changed(warmup_steps=4))
    shares = [step.learning_rate / FREE.learning_rate for step in out.log]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert Pace({}, changed()).factor(1) == 1.0


def test_the_average_of_a_night_is_that_of_its_steps() -> None:
    values = {"a": torch.zeros(2)}
    pace = Pace(values, changed(ema_decay=0.5))
    for step in (1.0, 2.0, 4.0):
        values["a"].fill_(step)
        pace.stepped()
    pace.end()
    torch.testing.assert_close(values["a"], torch.full((2,), (0.25 * 1 + 0.5 * 2 + 4) / 1.75))


@pytest.mark.parametrize("place", ["slow_weights", "backbone"])
def test_without_decay_the_night_is_the_plain_one(place: str) -> None:
    def learned(**switches: Any) -> dict[str, Tensor]:
        if place == "slow_weights":
            config = SleepConfig.model_validate({"learning_rate": 0.1, **switches})
            return sleep.consolidate(with_slow(), Evening(facts()[0], [Lessons.none(8)] * 6), config).delta
        model, deltas = scene()
        unfreeze(model, deltas, evening(facts()[0], FREE), {}, FREE, night=changed(**switches))
        return deltas.values()

    plain, off, on = learned(), learned(ema_decay=0.0, warmup_steps=0), learned(ema_decay=0.9)
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert any(not torch.equal(plain[name], on[name]) for name in plain)


def test_an_average_outside_of_the_region_is_not_taken() -> None:
    """The guard lets every step pass, and then does not."""

    class Refusing:
        asked = 0

        def drift(self, model: Cortex) -> float:
            return 0.0

        def allows(self, drift_nats: float) -> bool:
            self.asked += 1
            return self.asked != FREE.steps + 2

    (model, one), (other, two) = scene(), scene()
    unfreeze(model, one, evening(facts()[0], FREE), {"g": Refusing()}, FREE, night=changed(ema_decay=0.9))
    unfreeze(other, two, evening(facts()[0], FREE), {}, FREE)
    assert all(torch.equal(value, two.values()[name]) for name, value in one.values().items())


# --- text among the lessons ------------------------------------------------------------------------------------------


def test_mixed_text_is_next_token_loss_and_a_weight_of_0_is_none() -> None:
    (model, one), (other, two), (third, three) = scene(), scene(), scene()
    windows = text(12).view(FREE.steps, 2, 24)
    loss = text_loss(model, windows[0])
    logits = model(input_ids=windows[0]).logits
    torch.testing.assert_close(
        loss, functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[0][:, 1:].flatten())
    )
    unfreeze(model, one, evening(facts()[0], FREE), {}, FREE)
    unfreeze(other, two, evening(facts()[0], FREE, text=windows), {}, FREE, night=changed(mixed_text_weight=0.0))
    unfreeze(third, three, evening(facts()[0], FREE, text=windows), {}, FREE, night=changed(mixed_text_weight=3.0))
    assert all(torch.equal(value, two.values()[name]) for name, value in one.values().items())
    with torch.no_grad():
        assert text_loss(third, windows[0]) < text_loss(model, windows[0])


def test_an_evening_travels_with_its_text() -> None:
    evening = Evening(facts()[0], [Lessons.none(8)] * 2, text(4).view(2, 2, 24))
    found = Evening.from_tensors(evening.tensors(), torch.device("cpu"))
    assert torch.equal(found.text, evening.text) and len(found.replayed) == 2  # type: ignore[arg-type]
    assert Evening.from_tensors(evening._replace(text=None).tensors(), torch.device("cpu")).text is None


def test_text_for_nights_is_drawn_anew_for_each_and_not_what_the_guard_watches() -> None:
    config = sleepers.QUICK.model_copy(update={"mixed_text_weight": 0.5, "mixed_text_windows": 3})
    model, corpus = sleepers.fresh_model(), sleepers.corpus()
    reader = new_sleeper(model, sleepers.encode, corpus, config, ReplayConfig())
    first, again = reader._text_of(4), reader._text_of(4)
    reader.num_nights = 1
    second = reader._text_of(4)
    assert first is not None and second is not None and again is not None
    assert first.shape == (4, 3, 256) and torch.equal(first, again) and not torch.equal(first, second)
    assert isinstance(reader.guard, DriftGuard)
    watched = {tuple(window) for window in reader.guard._windows.tolist()}
    assert not watched & {tuple(window) for window in mixed_text(model, corpus).tolist()}
    with pytest.raises(ConfigError, match=r"mixed_text_weight = 1.0: needs `mixed_text`"):
        sleepers.sleeper(mixed_text_weight=1.0)


# --- one stage -------------------------------------------------------------------------------------------------------


def test_without_a_teacher_what_was_read_is_the_answer_whatever_the_session_holds() -> None:
    awake = {"min_gain_nats": 0.0, "every_tokens": 1024}
    reader, day = sleepers.sleeper(teacher=False, **awake), sleepers.stream(1)
    reader.read(day)
    told = sleepers.book().facts[: sleepers.PER_DAY]
    found = reader.lessons()
    for state in reader.session.states.values():
        state.up.zero_()
    again = reader.lessons()
    rows = [
        (tuple(ids[:length].tolist()), int(top[0]))
        for ids, length, top in zip(*found.prompts, found.taught.top_ids, strict=True)
    ]
    assert sorted(rows) == sorted(
        (tuple(ids[:length].tolist()), int(top[0]))
        for ids, length, top in zip(*again.prompts, again.taught.top_ids, strict=True)
    )
    for fact in told:
        at = next(n for n in range(1, len(day)) if day[n - 1 : n + 1] == [fact.key, fact.value])
        assert (tuple(day[at - READ_TOKENS : at]), fact.value) in rows
        assert all(((*sleepers.encode(words), fact.key), fact.value) in rows for words in sleepers.QUICK.questions)
    assert found.taught.top_nats[:, 0].exp().min() > 0.98
    taught = sleepers.sleeper(**awake)
    taught.read(day)
    assert 0 < len(taught.lessons()) < len(found)


def test_a_night_without_a_teacher_teaches() -> None:
    reader = sleepers.sleeper(teacher=False)
    reader.read(sleepers.stream(1))
    assert sleepers.right(reader.model, slice(sleepers.PER_DAY)) >= 0.5
