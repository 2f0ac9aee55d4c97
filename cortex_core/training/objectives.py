"""What sidecars are trained for: answer from memory, write seldom, and change nothing that the bare model could do."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cortex_core.backbone.attention import only_at
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.passes import MemoryPass, States
from cortex_core.backbone.reading import gate_activations, read_segments
from cortex_core.backbone.segments import Layout
from cortex_core.config import TrainingConfig
from cortex_core.fast_weights.gate import margin_penalty

KL_STRIDE = 4
SHORT_SEGMENT = 8
"""Tokens; no segment may be shorter (`BackboneConfig.segment_tokens`)."""
LEAK_FLOOR = 0.05
"""Sum of squared excesses at which a window of filler counts half."""


class Batch(NamedTuple):
    """One micro-batch of one worker."""

    input_ids: Int[Tensor, "batch segments width"]
    """Long sequences, cut into segments."""
    answer: Bool[Tensor, "batch segments width"]
    """Tokens that must be predicted, from what was read before them."""
    forced: Bool[Tensor, "batch segments width"]
    """Tokens that are written whatever the gate says (`TrainingConfig.write_noise`)."""
    in_window_ids: Int[Tensor, "windows width"]
    """Windows that the bare model handles alone; may be empty (0 rows)."""
    in_window_answer: Bool[Tensor, "windows width"]
    filler_ids: Int[Tensor, "fillers width"]
    """Windows in which nothing is worth writing; may be empty (0 rows)."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class ReadingLoss(nn.Module):
    """The training objective as one module, so that DDP sees a single forward whatever happens inside."""

    def __init__(self, model: Cortex, config: TrainingConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch, sparsity: float = 1.0) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss in nats and detached metrics. `sparsity` scales its weight (`Learner`).

        Every term is a mean over rows, so that equal shares of a batch add up to the batch, on any number of workers.
        """
        logits, target, row, passes = self._read_and_predict(batch)
        losses = functional.cross_entropy(logits.float(), target, reduction="none")
        answer_loss = _mean_of_rows(losses, row, len(batch.input_ids))
        penalty = _sparsity(passes, self.model, self.config.sparsity_margin)
        loss = answer_loss + sparsity * self.config.sparsity_weight * penalty
        metrics = {
            "loss/answer_nats": answer_loss.detach(),
            "accuracy": (logits.argmax(-1) == target).float().mean(),
            "loss/sparsity": penalty.detach(),
            "memory/write_frac": _write_frac(passes),
            "memory/state_norm": _state_norm(passes[-1].final),
        }
        if len(batch.filler_ids):
            leak = self._leak(batch.filler_ids, batch.input_ids[0].numel(), passes[-1].final)
            loss = loss + sparsity * self.config.sparsity_weight * leak
            metrics["loss/filler"] = leak.detach()
        if len(batch.in_window_ids):
            kl = self._kl_to_bare_model(batch, passes[-1].final)
            loss = loss + self.config.kl_weight * kl
            metrics["loss/in_window_kl_nats"] = kl.detach()
        metrics["loss"] = loss.detach()
        return loss, metrics

    def _read_and_predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[MemoryPass]]:
        """Logits, targets and rows [answers]. Segments before the first answer are read without the upper layers."""
        total, width = batch.input_ids.shape[1:]
        before = _before(batch.answer.flatten(1))
        first = int(before.any(0).nonzero()[0]) // width
        keep = self.config.truncate_segments
        cuts = sorted({0, max(0, first - keep) if keep else 0, first, total})
        states, passes, logits = self.model.empty_states(len(batch.input_ids)), [], None
        for start, stop in itertools.pairwise(cuts):
            if start and keep and start <= first - keep:
                states = _detached(states)
            ids = batch.input_ids[:, start:stop]
            wanted = before.view(batch.answer.shape)[:, start:stop] if stop == total else False
            forced = batch.forced[:, start:stop].flatten(0, 1)
            layout = Layout.plain(ids, start * width)._replace(forced=forced)
            logits, memory = read_segments(
                self.model, ids, layout, states, predict=wanted, read_strength=self.config.read_strength
            )
            states = memory.final
            passes.append(memory)
        assert logits is not None
        target = batch.input_ids.flatten(1)[:, 1:][before[:, :-1]]
        return logits, target, before.nonzero()[:, 0], passes

    def _leak(self, ids: Tensor, start: int, states: States) -> Tensor:
        """How far gates stand open in filler, in nats: per window, a mean over those that stand above the margin.

        Each of them is an error, however few they are: in a mean over all gates, the last one in a thousand would weigh
        a thousandth of what it takes to push it shut. The cross-entropy with "shut" pulls at wide-open gates as well,
        and each counts by the square of its excess: those that write (Lin et al. 2017, "Focal Loss"). The first tokens
        of a segment, which attend to next to nothing, are unlike all others, and few; so each window is also read in
        short segments.
        """
        other = _of_other_rows(states, len(ids))
        dead_zone = self.model.fast_weights.dead_zone
        margin = min(self.config.sparsity_margin, dead_zone)
        total = torch.zeros((), device=ids.device)
        for width in (ids.shape[1], SHORT_SEGMENT):
            segments = ids[:, : ids.shape[1] // width * width].unflatten(1, (-1, width))
            found = gate_activations(self.model, segments, start, other)
            excess = torch.cat([margin_penalty(gate, dead_zone, margin).flatten(1) for gate in found.values()], dim=1)
            weight = excess.detach().square()
            nats = -(1.001 - excess).log()  # finite at a gate that is open as far as float32 can tell
            shut = (weight * nats).sum(1) / (weight.sum(1) + LEAK_FLOOR)
            total = total + shut.mean() / 2
        return total

    def _kl_to_bare_model(self, batch: Batch, states: States) -> Tensor:
        """KL(bare || with memory), nats: of text plus of answers. The memory is full of other facts.

        Text is sampled, one token in `KL_STRIDE`: neighbours say much the same, and logits are the costly part.
        """
        ids = batch.in_window_ids
        asked = _before(batch.in_window_answer)
        wanted = asked.clone()
        wanted[:, ::KL_STRIDE] = True
        with torch.no_grad(), only_at(wanted):
            bare = self.model.backbone(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        other = _of_other_rows(states, len(ids))
        layout = Layout.plain(ids[:, None], batch.input_ids[0].numel())
        logits, _ = read_segments(self.model, ids[:, None], layout, other, predict=wanted[:, None])
        assert logits is not None
        kl = functional.kl_div(logits.float().log_softmax(-1), bare, log_target=True, reduction="none").sum(-1)
        at_answers, row = asked[wanted], wanted.nonzero()[:, 0]
        text = _mean_of_rows(kl[~at_answers], row[~at_answers], len(ids))
        return text + _mean_of_rows(kl[at_answers], row[at_answers], len(ids))


def _of_other_rows(states: States, windows: int) -> States:
    """Per window the state of a row, without its gradient: a memory that is full of other facts.

    In proportion, not in turn: so that a share of the batch pairs windows with the rows that the whole would.
    """
    batch = len(next(iter(states.values())).up)
    rows = torch.arange(windows) * batch // windows
    return {n: s.map(lambda part: part.detach()[rows.to(part.device)]) for n, s in states.items()}


def _before(answer: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """The positions whose next token is an answer. A sequence cannot begin with one."""
    return torch.cat([answer[:, 1:], torch.zeros_like(answer[:, :1])], dim=1)


def _mean_of_rows(values: Float[Tensor, " found"], row: Int[Tensor, " found"], rows: int) -> Float[Tensor, ""]:
    """Mean over rows of the mean within each; a row without values counts as 0."""
    sums = values.new_zeros(rows).index_add(0, row, values)
    return (sums / row.bincount(minlength=rows).clamp_min(1)).mean()


def _sparsity(passes: list[MemoryPass], model: Cortex, margin: float) -> Tensor:
    dead_zone = model.fast_weights.dead_zone
    gates = [r.activation for memory in passes for r in memory.readings.values()]
    total = sum(margin_penalty(gate, dead_zone, margin).sum() for gate in gates)
    return torch.as_tensor(total / sum(gate.numel() for gate in gates))


@torch.no_grad()
def _write_frac(passes: list[MemoryPass]) -> Tensor:
    """Share of tokens that the gates wrote; those that were forced do not count."""
    written = total = 0
    for memory in passes:
        assert memory.layout.forced is not None
        chosen = ~memory.layout.to_sequences(memory.layout.forced)[:, None]
        written = written + sum(((r.write > 0) & chosen).sum() for r in memory.readings.values())
        total = total + sum(r.write.numel() for r in memory.readings.values())
    return torch.as_tensor(written / total)


@torch.no_grad()
def _state_norm(states: States) -> Tensor:
    return torch.stack([s.up.norm(dim=(-2, -1)).mean() for s in states.values()]).mean()


def _detached(states: States) -> States:
    return {n: s.detach() for n, s in states.items()}
