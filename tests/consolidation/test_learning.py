"""The switches of a night: each does what it says, and what is off changes nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.low_rank import LowRankDeltas
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers, continuations
from cortex_core.config import NightConfig, ReplayConfig, SleepConfig
from cortex_core.consolidation import sleep
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.learning import Pace, lesson_losses, optimizer_of, slow_learning_at, text_loss
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
from tests.consolidation.unfreeze_scenes import QUICK, facts, nothing, scene, text

FREE = QUICK.model_copy(update={"steps": 6})
LAST = 2  # the last token of each question of `facts`


def changed(**values: object) -> NightConfig:
    return NightConfig.model_validate(values)


def with_deltas() -> tuple[Cortex, LowRankDeltas]:
    """A model with deltas that add something."""
    model, deltas = scene()
    with torch.no_grad():
        for number, up in enumerate(deltas.up):
            up += 0.3 * torch.randn(up.shape, generator=torch.Generator().manual_seed(number))
    return model, deltas


def with_slow() -> Cortex:
    """A model with slow weights that add something."""
    model, deltas = scene()
    deltas.remove()
    model.grow_slow_weights(64, 4)
    with torch.no_grad():
        for number, values in enumerate(sleep.slow_values(model).values()):
            values += torch.randn(values.shape, generator=torch.Generator().manual_seed(number))
    return model


def gradients(values: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(values, torch.autograd.grad(loss, list(values.values()), materialize_grads=True), strict=True))


# --- gradient: what is learned from a question -----------------------------------------------------------------------


def test_frozen_context_adds_nothing_to_the_gradient_of_deltas() -> None:
    """To the bit: an answer before the only token at which anything is learned does not depend on it."""
    model, deltas = with_deltas()
    prompts, at = facts()[0].prompts, torch.zeros(8, 3, dtype=torch.bool)
    at[:, LAST] = True
    with trained(deltas.values()):
        with deltas.learning_at(at):
            frozen = gradients(deltas.values(), continuations(model, prompts)[:, :LAST].square().sum())
        free = gradients(deltas.values(), continuations(model, prompts)[:, :LAST].square().sum())
    assert all(not grad.any() for grad in frozen.values())
    assert all(grad.any() for grad in free.values())


def test_with_a_frozen_context_deltas_learn_what_they_add_at_the_last_token() -> None:
    """Against finite differences: what the loss does if a delta is another at the last token alone."""
    model, deltas = with_deltas()
    lessons, name = facts()[0], deltas.names[1]
    module = model.backbone.get_submodule(name)
    with trained(deltas.values()):
        loss = distillation_loss(model, lessons, 64, "answer_context_frozen", deltas.learning_at)
        found = gradients(deltas.values(), loss)["up.1"]
        whole = gradients(deltas.values(), distillation_loss(model, lessons, 64))["up.1"]
    direction = found / found.norm()

    def other(length: float, module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        change = deltas.scale * length * inputs[0] @ deltas.down[1].T @ direction.T
        return output + functional.pad(change[:, LAST:], (0, 0, LAST, 0))

    losses = []
    for length in (0.02, -0.02):
        hook = module.register_forward_hook(partial(other, length))
        losses.append(distillation_loss(model, lessons, 64).item())
        hook.remove()
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float(found.norm()), rel=0.02)
    assert float((whole - found).norm()) > 0.05 * float(found.norm())


def test_with_a_frozen_context_slow_weights_learn_what_is_read_at_the_last_token() -> None:
    model = with_slow()
    lessons, values = facts()[0], sleep.slow_values(model)
    name = next(iter(values))
    slow = next(iter(model.sidecars_by_layer.values())).slow
    assert slow is not None
    at = torch.zeros(8, 3, dtype=torch.bool)
    at[:, LAST] = True
    with trained(values):
        with slow_learning_at(model, at):
            early = gradients(values, continuations(model, lessons.prompts)[:, :LAST].square().sum())
        free = gradients(values, continuations(model, lessons.prompts)[:, :LAST].square().sum())
        loss = distillation_loss(model, lessons, 64, "answer_context_frozen", partial(slow_learning_at, model))
        found = gradients(values, loss)[name]
    assert all(not grad.any() for grad in early.values()) and free[name].any()
    direction = found / found.norm()

    def other(length: float, module: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        if module.values.data_ptr() != values[name].data_ptr():
            return output
        with torch.no_grad():
            module.values += length * direction
            change = module.forward(*inputs) - output
            module.values -= length * direction
        return output + functional.pad(change[:, :, LAST:], (0, 0, LAST, 0))

    losses = []
    for length in (0.05, -0.05):
        hook = slow.register_forward_hook(partial(other, length))
        losses.append(distillation_loss(model, lessons, 64).item())
        hook.remove()
    assert (losses[0] - losses[1]) / 0.1 == pytest.approx(float(found.norm()), rel=0.05)


def test_a_frozen_context_answers_the_same_and_is_let_go() -> None:
    model, deltas = with_deltas()
    lessons = facts()[0]
    with torch.no_grad():
        plain, frozen = (
            lesson_losses(model, lessons, kind, deltas.learning_at) for kind in ("answer", "answer_context_frozen")
        )
    assert torch.equal(plain, frozen)
    assert deltas._learns is None
    slow = with_slow()
    with slow_learning_at(slow, torch.ones(8, 3, dtype=torch.bool)):
        pass
    assert not any(sidecar.slow._forward_hooks for sidecar in slow.sidecars_by_layer.values())  # type: ignore[union-attr]


def test_all_tokens_is_the_mean_over_a_question_whatever_it_is_padded_to() -> None:
    model, deltas = with_deltas()
    lessons = facts()[0]
    losses = lesson_losses(model, lessons, "all_tokens", deltas.learning_at)
    nats = continuations(model, lessons.prompts).log_softmax(-1)
    ids = lessons.prompts.input_ids
    for row in range(len(lessons)):
        read = -sum(nats[row, at, ids[row, at + 1]] for at in range(LAST))
        answered = lessons.taught.kl(answers(model, lessons.prompts))[row]
        torch.testing.assert_close(losses[row], (read + answered) / 3)
    wide = Lessons(Prompts(functional.pad(ids, (0, 2)), lessons.prompts.lengths), *lessons[1:])
    torch.testing.assert_close(lesson_losses(model, wide, "all_tokens", deltas.learning_at), losses)


def test_a_question_with_a_frozen_context_fits_a_segment() -> None:
    model, deltas = with_deltas()
    long = facts()[0]
    ids = long.prompts.input_ids.repeat(1, 12)
    long = Lessons(Prompts(ids, torch.full((8,), 36)), *long[1:])
    with pytest.raises(ConfigError, match="36 tokens, and can have at most 32"):
        lesson_losses(model, long, "answer_context_frozen", deltas.learning_at)


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
    unfreeze(model, deltas, facts()[0], nothing, {}, FREE, night=night)
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
    unfreeze(model, one, facts()[0], nothing, {}, FREE)
    unfreeze(other, two, facts()[0], nothing, {}, FREE, night=changed(optimizer="adamw"))
    for name, value in one.values().items():
        torch.testing.assert_close(value, two.values()[name])


def test_warm_up_rises_to_the_rate() -> None:
    model, deltas = scene()
    out = unfreeze(model, deltas, facts()[0], nothing, {}, FREE, night=changed(warmup_steps=4))
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
        unfreeze(model, deltas, facts()[0], nothing, {}, FREE, night=changed(**switches))
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
    unfreeze(model, one, facts()[0], nothing, {"g": Refusing()}, FREE, night=changed(ema_decay=0.9))
    unfreeze(other, two, facts()[0], nothing, {}, FREE)
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
    unfreeze(model, one, facts()[0], nothing, {}, FREE)
    unfreeze(other, two, facts()[0], nothing, {}, FREE, night=changed(mixed_text_weight=0.0), text=windows)
    unfreeze(third, three, facts()[0], nothing, {}, FREE, night=changed(mixed_text_weight=3.0), text=windows)
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
