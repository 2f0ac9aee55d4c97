"""Lessons of earlier nights as items of a replay buffer, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cortex_core.backbone.prompts import Prompts
from cortex_core.consolidation.lessons import Lessons, Taught
from cortex_core.consolidation.replay import Item, ReplayBuffer


def keep(buffer: ReplayBuffer, lessons: Lessons) -> None:
    """Each as an item of its own; what it had to teach is its importance and its surprise."""
    for at in range(len(lessons)):
        gain, length = float(lessons.gain_nats[at]), int(lessons.prompts.lengths[at])
        prompt = {"prompt": lessons.prompts.input_ids[at, :length]}
        taught = {name: part[at] for name, part in lessons.taught._asdict().items()}
        buffer.add(prompt | taught, importance=gain, surprise=gain)


def lessons_of(items: Sequence[Item], device: torch.device) -> Lessons:
    """As they were kept; answers on `device`. At least one."""
    rows = [item.tensors["prompt"] for item in items]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    taught = Taught(*(torch.stack([item.tensors[name] for item in items]).to(device) for name in Taught._fields))
    gains = torch.tensor([item.importance for item in items], device=device)
    return Lessons(Prompts(ids, lengths), taught, gains)
