"""Other ways to learn night by night, each as little different from `Sleeper` as it can be: what sleep is compared with.

All of them read the same days, and all but `Rehearser` are taught by the same teacher: the model with its fast weights.
None is guarded; a guard could only take something away from what they learn.
"""

from __future__ import annotations

from typing import Any

import torch

from cortex_core.backbone.low_rank import LowRankDeltas, linear_modules
from cortex_core.backbone.prompts import Prompts
from cortex_core.config import FisherConfig, UnfreezeConfig
from cortex_core.consolidation.elastic import ElasticWeights
from cortex_core.consolidation.lessons import Lessons, Taught
from cortex_core.consolidation.sleep import Evening, distillation_loss, slow_values, trained
from cortex_core.consolidation.sleeper import Sleeper, Slept
from cortex_core.consolidation.unfreeze import unfreeze
from cortex_core.optim.row_momentum import RowMomentum


class Elastic(Sleeper):
    """EWC: slow weights are held where earlier tasks left them, by online Fisher information (Schwarz et al. 2018).

    The Fisher matrix is the empirical one of the teacher's likeliest answers, measured and anchored when a task is over.
    """

    def __init__(self, *args: Any, fisher: FisherConfig, **kwargs: Any) -> None:
        """`fisher.weight` is EWC's λ; the rest as of `Sleeper`."""
        super().__init__(*args, **kwargs)
        self._held = ElasticWeights(self.model, fisher)
        self._learned: list[Lessons] = []

    def learn(self, evening: Evening) -> Slept:
        self._learned.append(evening.tonight)
        return super().learn(evening._replace(held=self._held.held()))

    def task_over(self) -> None:
        """Measure what the task's lessons depend on, and hold it from here on."""
        for lessons in self._learned:
            self._held.observe(lessons)
        self._learned = []
        self._held.anchor()


class Rehearser(Sleeper):
    """Replay alone: no teacher, but the text itself. Cross-entropy of the lines that tell, tonight's among old ones.

    It is told which tokens are lines that tell, which sleep has to find by itself.
    """

    LINE_TOKENS = 4

    def lessons(self) -> Lessons:
        """What comes next in each line, from its cue on: a target of one token with probability 1."""
        opens, closes = self.encode(" remember")[0], self.encode(";")[0]
        day, width = self._day, self.LINE_TOKENS
        lines = [
            day[at : at + width]
            for at in range(len(day) - width + 1)
            if day[at] == opens and day[at + width - 1] == closes
        ]
        pairs = [(line[:end], line[end]) for line in lines for end in range(width - 2, width)]
        targets = torch.tensor([target for _, target in pairs], dtype=torch.long)[:, None]
        certain = torch.zeros(len(pairs), 1)
        taught = Taught(targets, certain, torch.full((len(pairs),), -100.0))
        return Lessons(Prompts.of([cue for cue, _ in pairs]), taught, torch.ones(len(pairs)))


class LowRank(Sleeper):
    """LoRA-sequential (Hu et al. 2021): deltas of all of the backbone's linear modules learn the lessons of each night,
    by Adam, without replay."""

    def __init__(self, *args: Any, unfreezing: UnfreezeConfig, **kwargs: Any) -> None:
        """`unfreezing` says rank and learning rate; the rest as of `Sleeper`."""
        super().__init__(*args, **kwargs)
        self.unfreezing = unfreezing
        names = linear_modules(self.model.backbone)
        self.deltas = LowRankDeltas(self.model.backbone, names, unfreezing.rank, unfreezing.scale, unfreezing.seed)
        self.deltas.attach(self.model)

    def learn(self, evening: Evening) -> Slept:
        learned = unfreeze(self.model, self.deltas, evening, {}, self.unfreezing)
        return Slept(learned.metrics, kept=True)


class Joint(Sleeper):
    """Joint training: nothing is learned until all tasks have been told, then all of their lessons together."""

    def learn(self, evening: Evening) -> Slept:
        return Slept({}, kept=True)  # the buffer keeps tonight's lessons

    def learn_all(self, steps: int, batch_size: int) -> None:
        """So many steps on lessons of all days, evenly drawn; the step size falls to 0."""
        values = slow_values(self.model)
        with trained(values):
            optimizer = RowMomentum(values.values(), self.config.learning_rate)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = self.config.learning_rate * (1 - step / steps)
                drawn = self._replayed(batch_size)
                optimizer.zero_grad(set_to_none=True)
                distillation_loss(self.model, drawn, batch_size).backward()
                optimizer.step()
