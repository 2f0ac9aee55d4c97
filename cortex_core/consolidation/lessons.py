"""What a night has to teach: questions about what was written by day, and the answers of who still has it in mind.

A question is a cue, the few tokens that stood before one that was written, behind the words with which the model is
used to being asked. The teacher is the model with everything that the session holds; the student is the same model
with fast weights that hold nothing. Nobody has to say what a fact is: where teacher and student agree there is
nothing to learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.backbone.session import Session
from cortex_core.errors import DataError

_LEADS = 59  # keeps these draws apart from others
_NEVER_NATS = -30.0
"""Log-probability of what is not said."""


class Taught(NamedTuple):
    """What a teacher says comes next: the likeliest tokens, and the rest as one. In nats; sums to 1."""

    top_ids: Int[Tensor, "prompts top"]
    top_nats: Float[Tensor, "prompts top"]
    """Log-probabilities."""
    rest_nats: Float[Tensor, " prompts"]
    """Log-probability of all other tokens together."""

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "prompts vocab"], top: int) -> Taught:
        """The `top` likeliest tokens of each row."""
        found, ids = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
        return cls(ids, found, _rest(found))

    @classmethod
    def answered(cls, ids: Int[Tensor, " prompts"], top: int, vocab_size: int, sure: float = 0.99) -> Taught:
        """One right answer each, with probability `sure`: what cloning a behaviour learns from, not distillation.

        The other `top` - 1 likeliest tokens, which fill the table, are any that have next to no probability.
        """
        top = min(top, vocab_size)
        nats = torch.full((len(ids), top), _NEVER_NATS)
        nats[:, 0] = math.log(sure)
        rest = torch.full((len(ids),), math.log(1 - sure))
        return cls((ids[:, None] + torch.arange(top)) % vocab_size, nats, rest)

    def kl(self, logits: Float[Tensor, "prompts vocab"]) -> Float[Tensor, " prompts"]:
        """KL(taught || said) in nats, over the likeliest tokens and the rest: a lower bound of that over all tokens."""
        said = logits.float().log_softmax(-1).gather(-1, self.top_ids)
        likely = (self.top_nats.exp() * (self.top_nats - said)).sum(-1)
        return likely + self.rest_nats.exp() * (self.rest_nats - _rest(said))


class Lessons(NamedTuple):
    """Questions, answers, and how much each answer would tell the student, in nats."""

    prompts: Prompts
    taught: Taught
    gain_nats: Float[Tensor, " prompts"]

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.prompts)

    @classmethod
    def none(cls, top: int) -> Lessons:
        """There is nothing to learn."""
        table, numbers = torch.zeros(0, top), torch.zeros(0)
        return cls(Prompts.of([]), Taught(table.long(), table, numbers), numbers)

    def at(self, chosen: Tensor) -> Lessons:
        """Some of them: a mask, or indices."""
        return Lessons(
            Prompts(*(part[chosen] for part in self.prompts)),
            Taught(*(part[chosen] for part in self.taught)),
            self.gain_nats[chosen],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {**self.prompts._asdict(), **self.taught._asdict(), "gain_nats": self.gain_nats}
        return {name: value.contiguous() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Lessons:
        """What `tensors` gave. Raises DataError for anything else."""
        expected = {*Prompts._fields, *Taught._fields, "gain_nats"}
        if {*tensors} != expected or len({len(value) for value in tensors.values()}) > 1:
            raise DataError(
                f"lessons: must be {', '.join(sorted(expected))}, as many of each; got "
                f"{', '.join(f'{name} {list(value.shape)}' for name, value in sorted(tensors.items()))}; damaged"
            )
        prompts, taught = ([tensors[name] for name in kind._fields] for kind in (Prompts, Taught))
        return cls(Prompts(*prompts), Taught(*taught), tensors["gain_nats"])

    @classmethod
    def joined(cls, parts: Iterable[Lessons]) -> Lessons:
        """One after the other."""
        parts = list(parts)
        width = max(part.prompts.input_ids.shape[1] for part in parts)
        ids = [
            torch.nn.functional.pad(part.prompts.input_ids, (0, width - part.prompts.input_ids.shape[1]))
            for part in parts
        ]
        prompts = Prompts(torch.cat(ids), torch.cat([part.prompts.lengths for part in parts]))
        taught = Taught(*(torch.cat(columns) for columns in zip(*(part.taught for part in parts), strict=True)))
        return cls(prompts, taught, torch.cat([part.gain_nats for part in parts]))


@torch.no_grad()
def lessons(model: Cortex, session: Session, prompts: Prompts, top: int, batch_size: int) -> Lessons:
    """What `session`, of one row, knows about the prompts and the model without it does not; asked `batch_size` at a
    time."""
    parts = [Lessons.none(top)]
    for part in prompts.split(batch_size) if len(prompts) else ():
        taught = Taught.from_logits(answers(model, part, session), top)
        parts.append(Lessons(part, taught, taught.kl(answers(model, part))))
    return Lessons.joined(parts[1:] or parts)


@torch.no_grad()
def lessons_of_text(model: Cortex, rows: Mapping[tuple[int, ...], int], top: int, batch_size: int) -> Lessons:
    """Without a teacher: after each of these rows of tokens comes this one, and nothing else."""
    prompts, parts = Prompts.of(list(rows)), [Lessons.none(top)]
    right = torch.tensor(list(rows.values()), dtype=torch.long)
    vocab_size = model.backbone.config.get_text_config().vocab_size
    taught = Taught.answered(right, top, vocab_size)
    for chosen in torch.arange(len(rows)).split(batch_size) if rows else ():
        asked = Prompts(*(part[chosen] for part in prompts))
        told = Taught(*(part[chosen].to(model.backbone.device) for part in taught))
        parts.append(Lessons(asked, told, told.kl(answers(model, asked))))
    return Lessons.joined(parts[1:] or parts)


def questions(
    words: Iterable[Sequence[int]], cues: Sequence[Sequence[int]], text: Sequence[int], lead_tokens: int, seed: int
) -> list[tuple[int, ...]]:
    """Each cue behind each of some words, and these behind up to `lead_tokens` tokens from anywhere in `text`, how many
    is drawn evenly; each question once. The same numbers draw the same leads."""
    rng, asked = np.random.default_rng([seed, _LEADS]), dict[tuple[int, ...], None]()
    most = min(lead_tokens, len(text))
    for spoken in words:
        for cue in cues:
            length = int(rng.integers(most + 1))
            first = int(rng.integers(len(text) - length + 1))
            asked[*text[first : first + length], *spoken, *cue] = None
    return list(asked)


def cues(tokens: Sequence[int], first: int, written: Iterable[int], width: int) -> list[list[int]]:
    """For each position that was written, the `width` tokens before it. `tokens` begin at position `first`; positions
    without as many before them are passed over."""
    return [list(tokens[at - first - width : at - first]) for at in sorted(set(written)) if at - first >= width]


def _rest(nats: Float[Tensor, "prompts top"]) -> Float[Tensor, " prompts"]:
    """log(1 - sum of probabilities), finite and with a finite gradient also where they sum to 1."""
    return torch.log((1.0 - nats.exp().sum(-1)).clamp_min(1e-6))
