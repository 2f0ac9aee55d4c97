"""Momentum with one step size per tensor: for tables of which an example touches a few rows, some of them lightly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class RowMomentum(Optimizer):
    """Adam (Kingma & Ba 2015) whose second moment is one number per tensor: of its rows' mean squares the largest.

    The row that matters most moves by `lr` per step (root mean square over its entries), every other in proportion to
    its gradient. Adam itself would move all entries by about `lr`, also of rows that hardly have to do with what is
    learned, and what they hold for others would be lost. Parameters [rows, ...]; state: one moment and two numbers.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        """`lr`: in units of the parameter; `betas`: what a step leaves of the two moments."""
        super().__init__(params, {"lr": lr, "betas": betas})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move against the gradients; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["moment"] = torch.zeros_like(parameter)
            state["square"] = gradient.new_zeros((), dtype=torch.float32)
        state["step"] += 1
        state["moment"].mul_(first).add_(gradient, alpha=1 - first)
        strongest = gradient.flatten(1).float().square().mean(1).amax()
        state["square"].mul_(second).add_(strongest, alpha=1 - second)
        scale = (state["square"] / (1 - second ** state["step"])).sqrt() + torch.finfo(torch.float32).tiny
        parameter.sub_(state["moment"] / scale, alpha=group["lr"] / (1 - first ** state["step"]))
