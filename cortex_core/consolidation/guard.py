"""What a night may not do: change the model on text that has nothing to do with what was learned."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.errors import ConfigError


@runtime_checkable
class Guard(Protocol):
    """Says how far a model is from the original one, and whether that is too far."""

    def drift(self, model: Cortex) -> float:
        """In nats, 0 for the original."""
        ...

    def allows(self, drift_nats: float) -> bool:
        """Whether a model that is so far away may stay as it is."""
        ...


class DriftGuard:
    """Measures how far a model with its slow weights, and empty fast ones, is from the bare model.

    The bare model is the original, for good: a bound on each night alone would let many nights wander off together.
    """

    def __init__(self, windows: Int[Tensor, "windows width"], bound_nats: float) -> None:
        """`windows` of held-out text, none longer than a segment; `bound_nats`: largest drift that is let through."""
        if not len(windows):
            raise ConfigError("guard: needs at least one window of held-out text")
        self._windows, self.bound_nats = windows, bound_nats
        self._bare: Float[Tensor, "windows width vocab"] | None = None

    @torch.no_grad()
    def drift(self, model: Cortex) -> float:
        """KL(bare model || model) in nats, mean over the tokens of the windows."""
        windows = self._windows.to(model.backbone.device)
        if self._bare is None:
            with model.memory(False):
                self._bare = _log_probabilities(model, windows)
        now = _log_probabilities(model, windows)
        return _mean_kl(self._bare, now)

    def allows(self, drift_nats: float) -> bool:
        """Whether a model that is so far away may stay as it is; one that is not a number away may not."""
        return drift_nats <= self.bound_nats


class ProbeGuard:
    """Measures how far answers are from what they were when this was made: what may not change, memory included.

    Not from those of the bare model, as on text: in a prompt that tells something, the memory is there to make a
    difference. So make it before anything is learned, or where what was learned is off (`LowRankDeltas.off`).
    """

    @torch.no_grad()
    def __init__(self, model: Cortex, prompts: Prompts, bound_nats: float) -> None:
        """`prompts`: what is asked; `bound_nats`: largest drift that is let through."""
        if not len(prompts):
            raise ConfigError("probe guard: needs at least one prompt")
        self._prompts, self.bound_nats = prompts, bound_nats
        self._original = answers(model, prompts).float().log_softmax(-1)

    @torch.no_grad()
    def drift(self, model: Cortex) -> float:
        """KL(original || model) in nats, of what comes after a prompt; mean over the prompts."""
        return _mean_kl(self._original, answers(model, self._prompts).float().log_softmax(-1))

    def allows(self, drift_nats: float) -> bool:
        """Whether a model that is so far away may stay as it is; one that is not a number away may not."""
        return drift_nats <= self.bound_nats


def _mean_kl(bare: Float[Tensor, "*rows vocab"], now: Float[Tensor, "*rows vocab"]) -> float:
    return float(functional.kl_div(now, bare, log_target=True, reduction="none").sum(-1).mean())


def _log_probabilities(model: Cortex, windows: Tensor) -> Float[Tensor, "windows width vocab"]:
    logits = model(input_ids=windows).logits
    assert logits is not None
    return logits.float().log_softmax(-1)
