"""A pull back to the original model on ordinary text, while something else is learned."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.config import UnfreezeConfig
from cortex_core.errors import ConfigError


class TextAnchor:
    """weight · KL(bare model || model) on windows of text that are drawn anew for every step.

    A trust region says only where the border is. Lessons run straight into it and stay there; with this in the loss
    they go along it. The windows must not be the guard's, or it would no longer see what happens to text.
    """

    def __init__(self, windows: Int[Tensor, "windows width"], config: UnfreezeConfig) -> None:
        """`windows` of ordinary text, none longer than a segment. Raises ConfigError if there are none."""
        if not len(windows):
            raise ConfigError("text anchor: needs at least one window of text, or text_weight = 0 and no anchor")
        self._windows, self._config = windows, config
        self._generator = Generator().manual_seed(config.seed)

    def begin(self, night: int) -> None:
        """Draw from here on what belongs to this night, whatever was drawn before: nights go on from files."""
        self._generator.manual_seed(hash((self._config.seed, night)) & 0x7FFF_FFFF)

    def __call__(self, model: Cortex) -> Float[Tensor, ""]:
        """To be added to a loss. Another draw each time."""
        drawn = torch.randperm(len(self._windows), generator=self._generator)[: self._config.text_windows]
        ids = self._windows[drawn].to(model.backbone.device)
        # Not kept from call to call: a large vocabulary's logits are larger than all else here.
        with torch.no_grad(), model.memory(False):
            bare = _log_probabilities(model, ids)
        now = _log_probabilities(model, ids)
        apart = functional.kl_div(now, bare, log_target=True, reduction="none").sum(-1).mean()
        return self._config.text_weight * apart


def _log_probabilities(model: Cortex, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    assert logits is not None
    return logits.float().log_softmax(-1)
