"""On a GPU a memory does what it does on a CPU: reading, answering, generating, forgetting, training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.session import Session
from tests import tiny

pytestmark = pytest.mark.gpu
CLOSE = 2e-4  # sums in another order, through a backbone


def on_both() -> tuple[Cortex, Cortex]:
    """The same memory, with a controller, on either device."""
    here, there = tiny.model(open_gates=True), tiny.model(open_gates=True)
    return here, there.to("cuda")


def ids(rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, 200, (rows, tokens), generator=generator)


def far(one: Tensor, other: Tensor) -> float:
    """Largest distance, relative to the largest entry."""
    one, other = one.detach().cpu().float(), other.detach().cpu().float()
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))


def states_far(one: Session, other: Session) -> float:
    return max(far(state.up, other.states[layer].up) for layer, state in one.states.items())


@torch.no_grad()
def test_reads_and_answers() -> None:
    here, there = on_both()
    read, asked = ids(2, 5 * tiny.SEGMENT + 7), ids(2, 11)
    sessions = [model.new_session(2) for model in (here, there)]
    for model, session in zip((here, there), sessions, strict=True):
        model.read(read.to(model.device), session)
    assert states_far(*sessions) < CLOSE
    answers = [
        model(input_ids=asked.to(model.device), session=session).logits
        for model, session in zip((here, there), sessions, strict=True)
    ]
    assert far(*answers) < CLOSE


@torch.no_grad()
def test_generates_and_goes_on_from_a_file(tmp_path: Path) -> None:
    """A session file moves between devices."""
    here, there = on_both()
    read = ids(1, 3 * tiny.SEGMENT + 5)
    session = there.new_session()
    there.read(read[:, :50].to("cuda"), session)
    session.save(tmp_path / "chat.safetensors")
    sessions = [model.load_session(tmp_path / "chat.safetensors") for model in (here, there)]
    made = [
        model.generate(read[:, 50:].to(model.device), session, max_new_tokens=40, do_sample=False).cpu()
        for model, session in zip((here, there), sessions, strict=True)
    ]
    assert torch.equal(*made) and states_far(*sessions) < CLOSE


@torch.no_grad()
def test_forgets() -> None:
    sessions, taken_back = [], []
    for model in on_both():
        read = ids(1, 5 * tiny.SEGMENT).to(model.device)
        session = model.new_session(log_writes=1000)
        for source, part in zip("aba", read.split((50, 40, 70), dim=1), strict=True):
            model.read(part, session, source=source)
        taken_back.append(model.forget(session, "b"))
        sessions.append(session)
    assert taken_back[0] == taken_back[1] > 0
    assert states_far(*sessions) < CLOSE


def test_trains() -> None:
    """Three steps with everything that a step can hold."""
    config = tiny.training(steps=3, in_window_batch_size=4, filler_windows=2, ema_decay=0.9)
    losses = []
    for model in on_both():
        of = tiny.learner(config, model)
        losses.append([metrics["loss"] for metrics in tiny.train(of, tiny.batches(config), 3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
