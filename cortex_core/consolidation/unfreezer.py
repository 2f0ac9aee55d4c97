"""A reader whose nights change the backbone: low-rank deltas inside a trust region, in place of slow weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from cortex_core.backbone.low_rank import LowRankDeltas
from cortex_core.backbone.low_rank_files import load_deltas, save_deltas
from cortex_core.backbone.model import Cortex
from cortex_core.config import ReplayConfig, SleepConfig, UnfreezeConfig
from cortex_core.consolidation.leads import Leads
from cortex_core.consolidation.select import candidates, chosen_deltas
from cortex_core.consolidation.sleep import Evening
from cortex_core.consolidation.sleeper import Sleeper, Slept
from cortex_core.consolidation.text_anchor import TextAnchor
from cortex_core.consolidation.unfreeze import Region, unfreeze
from cortex_core.errors import DataError

DELTAS = "backbone-deltas.safetensors"
SELECTION_WINDOWS = 8
"""Of the text, those that say what each module's change would cost it."""


class Unfreezer(Sleeper):
    """Guarded unfreezing, night by night. Its first lessons choose the modules; from then on these alone learn.

    The frozen weights are never written: `deltas.remove()` gives the original model back, to the bit.
    """

    def __init__(
        self, model: Cortex, config: SleepConfig, replay: ReplayConfig, unfreezing: UnfreezeConfig,
        text: Int[Tensor, "windows width"], region: Region, backbone: str | None = None, **rest: Any,
    ) -> None:  # fmt: skip
        """`text`: ordinary text that lessons may not change, and not what the guards of `region` watch, which were made
        of this model (`trust_region`). Steps and replay of a night are those of `unfreezing`. `backbone` is its
        fingerprint, where it is sharded. The rest as of `Sleeper`."""
        settings = config.model_copy(update={"steps": unfreezing.steps, "replayed": unfreezing.replayed})
        super().__init__(model, settings, replay, mixed_text=text, **rest)
        self.unfreezing, self._region, self._text, self._backbone = unfreezing, region, text, backbone
        self._anchor = TextAnchor(text, unfreezing) if unfreezing.text_weight else None
        self._lead = Leads(text, unfreezing.lead_tokens, unfreezing.seed)
        self.deltas: LowRankDeltas | None = None
        """What was learned; None before the first lessons."""
        self.num_rollbacks = 0
        """Steps that had left the region, so far."""

    def _grow(self) -> None:
        """Slow weights are not needed."""

    def learn(self, evening: Evening) -> Slept:
        config = self.unfreezing
        if self.deltas is None:
            found = candidates(self.model, evening.tonight, self._text[:SELECTION_WINDOWS], config)
            self.deltas = chosen_deltas(self.model, found, config).attach(self.model)
            self._after_backward()
        if self._anchor is not None:
            self._anchor.begin(self.num_nights)
        self._lead.begin(self.num_nights)
        learned = unfreeze(
            self.model, self.deltas, evening, self._region, config, self._anchor, self._after_backward, self.config,
            self._lead,
        )  # fmt: skip
        rollbacks = int(learned.metrics["unfreeze/rollbacks"])
        self.num_rollbacks += rollbacks
        return Slept(learned.metrics, kept=learned.metrics["unfreeze/steps"] > 0)

    def values(self) -> dict[str, Tensor]:
        return {} if self.deltas is None else self.deltas.values()

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        if self.deltas is not None:
            save_deltas(self.deltas, Path(folder) / DELTAS, self.model.backbone, self._backbone)

    def load(self, folder: str | Path) -> None:
        super().load(folder)
        path = Path(folder) / DELTAS
        if self.deltas is not None:
            self.deltas.remove()
            self.deltas = None
        if path.is_file():
            self.deltas = load_deltas(path, self.model.backbone, self._backbone).attach(self.model)
        elif self.num_nights - self.num_undone and len(self.buffer):
            raise DataError(f"{path}: is missing after {self.num_nights} nights; the checkpoint is damaged")
