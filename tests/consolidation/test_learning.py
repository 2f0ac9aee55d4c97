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
from cortex_core.consolidation import sleep
from cortex_core.consolidation.learning import lesson_losses, slow_learning_at
from cortex_core.consolidation.lessons import Lessons
from cortex_core.consolidation.sleep import distillation_loss, trained
from cortex_core.errors import ConfigError
from tests.consolidation.unfreeze_scenes import facts, scene, with_slow

LAST = 2  # the last token of each question of `facts`


def with_deltas() -> tuple[Cortex, LowRankDeltas]:
    """A model with deltas that add something."""
    model, deltas = scene()
    with torch.no_grad():
        for number, up in enumerate(deltas.up):
            up += 0.3 * torch.randn(up.shape, generator=torch.Generator().manual_seed(number))
    return model, deltas


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
