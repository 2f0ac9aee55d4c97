"""Code reconstruction by night: a coder goes on learning segments of the day, among those of old days."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.config import ReplayConfig, SegmentsConfig
from cortex_core.consolidation.codes import SegmentCoder, load_coder, save_coder
from cortex_core.consolidation.diary import Diary
from cortex_core.consolidation.record import Segment
from cortex_core.consolidation.replay import Item, ReplayBuffer
from cortex_core.consolidation.statistics import Recoverable, Statistics

CODER, SEGMENTS = "coder.safetensors", "segments.safetensors"
CODE = "code"


class NightCodes:
    """What is kept of each day's segments: their statistics and their codes, in a bounded buffer, and the coder.

    Its parameters are its own, so its part of a night's loss is learned beside the others, not traded against them.
    """

    def __init__(
        self, model: Cortex, coder: SegmentCoder, segments: SegmentsConfig, replay: ReplayConfig, backbone: str
    ) -> None:
        """`backbone`: fingerprint of the model's."""
        self.model, self.coder, self._segments, self._backbone = model, coder, segments, backbone
        self.buffer = ReplayBuffer(replay)

    def night(self, day: Sequence[int], steps: int) -> dict[str, float]:
        """Read the day again, from its beginning and with empty fast weights, as it was read; then `steps` steps on its
        segments and as many old ones. Returns metrics: errors are of today's segments, before and after."""
        width = self.model.segment_tokens
        windows = len(day) // width
        if not windows:
            return {"codes/segments": 0.0}
        diary = Diary(self.model, self._segments, ["day"])
        ids = torch.tensor([list(day[: windows * width])], device=self.model.backbone.device)
        found = [*diary.read(ids, self.buffer.num_sleeps), *diary.finish(self.buffer.num_sleeps)]
        metrics = {"codes/segments": float(len(found))}
        if found:
            metrics |= self._learn(found, steps)
        self.buffer.sleep_passed()
        return metrics

    def _learn(self, found: list[Segment], steps: int) -> dict[str, float]:
        coder, config = self.coder, self.coder.config
        tonight = Recoverable.of(Statistics.of(found), config.num_directions)
        coder.observe(tonight)
        before = self._error(tonight)
        optimizer = torch.optim.AdamW(coder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        for _ in range(steps):
            old = [Segment.from_payload(_without_code(item.tensors), item.notes) for item in self._drawn(len(found))]
            given = tonight
            if old:
                replayed = Recoverable.of(Statistics.of(old), config.num_directions)
                given = Recoverable(*(torch.cat(parts) for parts in zip(tonight, replayed, strict=True)))
            optimizer.zero_grad(set_to_none=True)
            torch.stack([*coder.errors(given).values()]).sum().backward()
            optimizer.step()
        with torch.no_grad():
            codes = coder.encode(tonight)
        for segment, code in zip(found, codes, strict=True):
            tensors, notes = segment.payload()
            self.buffer.add(
                tensors | {CODE: code}, notes, importance=segment.peak_surprise, surprise=segment.mean_surprise
            )
        return {"codes/error_before": before, "codes/error_after": self._error(tonight)}

    def _drawn(self, most: int) -> Sequence[Item]:
        return self.buffer.draw(most) if len(self.buffer) else []

    @torch.no_grad()
    def _error(self, given: Recoverable) -> float:
        return float(torch.stack([*self.coder.errors(given).values()]).sum())

    def save(self, folder: str | Path) -> None:
        """Write coder and buffer into a folder."""
        save_coder(self.coder, Path(folder) / CODER, self._backbone)
        self.buffer.save(Path(folder) / SEGMENTS)

    def load(self, folder: str | Path) -> None:
        """Go on from `save`. Raises DataError, IncompatibleError."""
        self.coder = load_coder(Path(folder) / CODER, self._backbone)
        self.buffer = ReplayBuffer.load(Path(folder) / SEGMENTS, self.buffer.config)


def _without_code(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: part for name, part in tensors.items() if name != CODE}
